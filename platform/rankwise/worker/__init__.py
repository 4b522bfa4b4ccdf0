"""A worker: a parent process that claims jobs and renews their leases, and a child process that runs them.

The parent imports neither machine learning libraries nor MLflow, so that it starts fast and keeps its heartbeat when
CUDA crashes or the kernel kills the child for memory. `rankwise.tasks` supplies the child's program. The two exchange
JSON lines, see `protocol`.
"""
