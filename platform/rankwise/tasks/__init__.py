"""Use cases: one module per kind of job or command, where queue, tracking and machine learning meet.

Unless stated otherwise, functions raise `TrackingError` if MLflow cannot be reached or refuses, `JobStoreError` if the
queue's database cannot be reached, `AssetError` if a base or rows are not available, and `StorageError` if the disk
fails.
"""
