"""HTML pages and their charts: the report of a sweep, the anatomy of an adapter, the history of a search."""
