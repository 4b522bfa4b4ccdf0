"""One function per kind of job: where queue, tracking and machine learning meet."""
