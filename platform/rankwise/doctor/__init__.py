"""Checks of this machine and its services, for `rankwise doctor`.

The only change they make is one small artifact, which is written, read and deleted. Whatever needs torch or MLflow runs
in its own process, so that a library that hangs or crashes becomes a finding.
"""
