"""`rankwise doctor`: looks at this machine and at what it is connected to, one small module for each group of checks.

Nothing is changed but one small artifact, which is written, read and deleted. What needs torch or MLflow runs in a
process of its own, so that a library that hangs or crashes is a finding too.
"""
