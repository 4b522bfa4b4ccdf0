"""Creates MLflow's bucket in the object store, saves it to stdout as a tar file, or loads one from stdin.

    OBJECT_STORE_URL=http://object-store:8333 OBJECT_STORE_ADMIN_KEY=... python bucket.py create

A tar file has one entry per object, with its content type. Only an empty bucket can be loaded.
"""

from __future__ import annotations

import os
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

BUCKET = "mlflow"
CONTENT_TYPE = "RANKWISE.content-type"
_IN_MEMORY = 64 << 20


def client() -> Any:
    """A client of the object store, with administrator access."""
    return boto3.client(
        "s3",
        endpoint_url=os.environ["OBJECT_STORE_URL"],
        aws_access_key_id="admin",
        aws_secret_access_key=os.environ["OBJECT_STORE_ADMIN_KEY"],
        region_name="us-east-1",
        config=Config(retries={"mode": "standard", "max_attempts": 5}),
    )


def create() -> None:
    """Create the bucket if it does not exist."""
    store = client()
    try:
        store.head_bucket(Bucket=BUCKET)
    except ClientError as error:
        if error.response["Error"]["Code"] not in {"404", "NoSuchBucket"}:
            raise
        store.create_bucket(Bucket=BUCKET)
        print(f"created the bucket {BUCKET}", file=sys.stderr)


def save() -> None:
    """Write all objects to stdout."""
    store, count = client(), 0
    with tarfile.open(fileobj=sys.stdout.buffer, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for listed in objects(store):
            try:
                reply = store.get_object(Bucket=BUCKET, Key=listed["Key"])
            except store.exceptions.NoSuchKey:
                continue  # Removed since the listing.
            entry = tarfile.TarInfo(listed["Key"])
            entry.size, entry.mtime, entry.mode = (
                reply["ContentLength"],
                int(reply["LastModified"].timestamp()),
                0o600,
            )
            entry.pax_headers = {CONTENT_TYPE: reply["ContentType"]}
            archive.addfile(entry, reply["Body"])
            count += 1
    print(f"saved {count} objects", file=sys.stderr)


def load() -> None:
    """Load the objects of a tar file from stdin into the empty bucket."""
    store, count = client(), 0
    create()
    if next(objects(store), None) is not None:
        sys.exit(f"the bucket {BUCKET} has objects: load into an empty bucket only (on a fresh volume)")
    with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as archive:
        for entry in archive:
            source = archive.extractfile(entry)
            if source is None:
                continue
            # boto3 seeks in its input, which a stream does not support.
            with tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY) as content:
                while chunk := source.read(1 << 20):
                    content.write(chunk)
                content.seek(0)
                kind = entry.pax_headers.get(CONTENT_TYPE, "binary/octet-stream")
                store.upload_fileobj(content, BUCKET, entry.name, ExtraArgs={"ContentType": kind})
            count += 1
    print(f"loaded {count} objects", file=sys.stderr)


def objects(store: Any) -> Iterator[dict[str, Any]]:
    """All objects of the bucket."""
    for page in store.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
        yield from page.get("Contents", [])


COMMANDS: dict[str, Callable[[], None]] = {"create": create, "save": save, "load": load}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in COMMANDS:
        sys.exit(f"usage: bucket.py {'|'.join(COMMANDS)}")
    COMMANDS[sys.argv[1]]()
