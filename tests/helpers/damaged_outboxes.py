"""Outbox files as damage leaves them: bytes and values changed at random, and named cases."""

from __future__ import annotations

import json
import os
import random

from rankwise.tracking.outbox import Outbox

JUNK = (
    *(None, True, False, 0, -1, 1.5, 10**30, -(10**30), 1 << 63, "", "x", "../../x", "/etc/passwd", ".", "..", "a\0b"),
    *("\ud800", "\x1b[31m", "ä" * 300, "x" * 100_000, [], {}, [[]], {"m": {"a": 1.0}}, {"": ""}, [1, "2", None]),
    *("RUNNING", "FINISHED", "NONE", float("nan"), float("inf"), {"x": {"y": {"z": 1}}}),
)


def write_outbox(settings, run_id, *, points=3):
    """An outbox with every kind of record, whose writer has ended. Returns its path."""
    outbox = Outbox.create(settings.outbox, run_id, settings.tracking_uri, attempt=1)
    outbox.append({"status": "RUNNING"})
    outbox.append({"params": {"lora.r": "8"}})
    outbox.append({"tags": {"note": "a text", "other": "b"}})
    for step in range(points):
        outbox.append({"m": {"loss": 1.0 + step, "speed": 3.0}, "s": step, "t": 1000 + step})
    outbox.append(
        {
            "input": {
                "name": "rows",
                "digest": "sha256:" + "0" * 64,
                "source": "rows.jsonl",
                "source_type": "local",
                "context": "train",
                "columns": {"a": "long"},
                "profile": {"rows": 3},
            }
        }
    )
    outbox.append({"file": outbox.spool(b"{}", "table.json"), "to": "deep/table.json", "table": True})
    outbox.append({"end": "FINISHED", "t": 2000})
    outbox.close()
    return outbox.path


def damage(path, rng: random.Random) -> str:
    """Damage an outbox in one to three ways. Returns a description."""
    return " + ".join(rng.choice(WAYS)(path, rng) for _ in range(rng.choice((1, 1, 2, 3))))


def _bytes(path, rng):
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content) + 1)
    count = rng.choice((1, 2, 10, 100))
    way = rng.choice(("flip", "delete", "insert", "zero", "truncate", "repeat", "return"))
    if way == "flip":
        for position in range(start, min(start + count, len(content))):
            content[position] ^= 1 << rng.randrange(8)
    elif way == "delete":
        del content[start : start + count]
    elif way == "insert":
        content[start:start] = rng.randbytes(count)
    elif way == "zero":
        content[start : start + count] = bytes(count)
    elif way == "truncate":
        del content[start:]
    elif way == "repeat":
        content[start:start] = content[max(0, start - count) : start]
    else:
        content = content.replace(b"\n", b"\r\n", rng.randrange(1, 4))
    path.write_bytes(content)
    return f"{way} {count} bytes at {start}"


def _lines(path, rng):
    lines = path.read_bytes().splitlines(keepends=True)
    if not lines:
        return "empty"
    at = rng.randrange(len(lines))
    way = rng.choice(("drop", "double", "swap", "nest", "junk", "empty"))
    if way == "drop":
        del lines[at]
    elif way == "double":
        lines.insert(at, lines[at])
    elif way == "swap":
        other = rng.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    elif way == "nest":
        lines[at] = rng.choice((b"[", b'{"m":', b'{"tags":{"a":')) * 30_000 + b"\n"
    elif way == "junk":
        lines[at] = rng.randbytes(rng.choice((1, 50, 5000))).replace(b"\n", b"") + b"\n"
    else:
        lines[at] = b"\n"
    path.write_bytes(b"".join(lines))
    return f"{way} line {at}"


def _values(path, rng):
    lines = path.read_bytes().splitlines()
    at = rng.randrange(len(lines)) if lines else 0
    try:
        record = json.loads(lines[at])
    except (ValueError, RecursionError, IndexError):
        return "no JSON to change"
    place, described = record, f"line {at}"
    while isinstance(place, dict) and place:
        key = rng.choice(list(place))
        described += f".{key[:20]}"
        if isinstance(place[key], dict) and place[key] and rng.random() < 0.7:
            place = place[key]
            continue
        way = rng.choice(("value", "value", "value", "drop", "add", "rename"))
        value = rng.choice(JUNK)
        if way == "value":
            place[key] = value
        elif way == "drop":
            del place[key]
        elif way == "add":
            place[str(rng.choice(("m", "end", "x", "", "t")))] = value
        else:
            place[rng.choice(("m", "end", "x", "", "t"))] = place.pop(key)
        described += f" {way} {str(value)[:20]!r}"
        break
    lines[at] = json.dumps(record).encode()
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return described


def _beside(path, rng):
    offset, files = path.with_suffix(".offset"), path.with_suffix(".files")
    way = rng.choice(("offset", "offset", "number", "folder", "no file", "directory", "link"))
    (file,) = list(files.iterdir()) if files.is_dir() and len(list(files.iterdir())) == 1 else (None,)
    if way == "offset" and not offset.is_dir():
        offset.write_bytes(rng.choice((b"", b"-1\n", b"9" * 5000, "٣".encode(), b"\0\xff", b"1e3", rng.randbytes(20))))
    elif way == "number" and not offset.is_dir():
        offset.write_text(f"{rng.randrange(3000)}\n")
    elif way == "folder" and not offset.exists():
        offset.mkdir()
    elif file is not None and not file.is_dir():
        file.unlink()
        if way == "directory":
            file.mkdir()
        elif way == "link":
            os.symlink("/etc/hostname", file)
    return way


WAYS = (_bytes, _lines, _values, _values, _beside)
