"""A worker: a parent that claims jobs and keeps them alive, and the child process that does them.

The parent imports no machine learning libraries and no MLflow: it starts at once, and neither a crash of CUDA nor the
kernel's out-of-memory killer takes its heartbeat down. What the child is, and what it does for each kind of job, is
given from above (`rankwise.tasks`); they speak JSON lines (`protocol`).
"""
