"""Which rows an adapter was trained on: from what its training has left in MLflow, or else from the training data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from rankwise.data.row_digests import MANY_ROWS, RowDigests, row_key
from rankwise.data.rows import Example
from rankwise.exceptions import AssetError, DatasetError, GateError
from rankwise.experiment.arm import ArmSpec
from rankwise.tasks.assess import Assessor
from rankwise.tasks.context import Context, Voice
from rankwise.tasks.recorded import read_artifact
from rankwise.tasks.setting import Setting
from rankwise.tracking.registry import ModelVersion

FILE = "row_digests.bin"
"""The artifact of the run that trained; the format is that of `data.row_digests`."""
FILE_TAG = "rankwise.row_digests"
"""SHA-256 of the artifact, on the LoggedModel and on the version from their creation on."""

Seen = Callable[[Example], bool]


def digests_of(arm: ArmSpec, examples: Sequence[Example], voice: Voice | None = None) -> bytes:
    """The content of an arm's artifact; the same arm and rows give the same bytes. A large one is told to `voice`."""
    keys = (row_key(example, arm.dataset.system) for example in examples)
    content = RowDigests.of(keys, name=arm.spec_hash, init_from=arm.init_from).to_bytes()
    if voice is not None and len(examples) > MANY_ROWS:
        voice.say(f"the digests of {len(examples):,} training rows take {len(content) / 1e6:,.0f} MB in MLflow")
    return content


def file_digest(content: bytes) -> str:
    """What `FILE_TAG` says of an artifact."""
    return "sha256:" + hashlib.sha256(content).hexdigest()


def seen_by(context: Context, candidate: ModelVersion, setting: Setting, assessor: Assessor) -> Seen:
    """Whether a row was in the training data of a version, or of an adapter that its training went on from.

    Args:
        context: The stores.
        candidate: The version.
        setting: What it was trained on, for versions whose training has left no digests.
        assessor: Reads the training data then.

    Raises:
        GateError: It is not known, and the message says what to do.
        TrackingError: MLflow cannot be reached.
    """
    system = setting.arm.dataset.system
    found: list[RowDigests] = []
    version: ModelVersion | None = candidate
    while version is not None:
        digests = _stored(context, version)
        if digests is None:
            if version is not candidate:
                raise GateError(
                    f"{candidate.uri} goes on from {version.uri}, and which rows that was trained on is not known: its "
                    f"run has no {FILE}. {_BY_FORCE}"
                )
            digests = _from_data(candidate, setting, assessor)
        found.append(digests)
        before = digests.init_from
        version = None if before is None else context.store.registry.resolve(before).version

    def seen(example: Example) -> bool:
        key = row_key(example, system)
        return any(key in digests for digests in found)

    return seen


_BY_FORCE = 'The alias can be moved without knowing it: --force --reason "..."'
_WAYS_OUT = (
    "Name a definition whose dataset.train is the training data and on this machine (--experiment FILE), or move the "
    'alias without knowing it (--force --reason "...")'
)


def _stored(context: Context, version: ModelVersion) -> RowDigests | None:
    """What a version's run has left; None where it has left nothing."""
    expected = version.tags.get(FILE_TAG)
    content = None if version.run_id is None else read_artifact(context, version.run_id, FILE)
    if content is None:
        return None
    where = f"the artifact {FILE} of run {version.run_id}"
    if expected is not None and file_digest(content) != expected:
        raise GateError(
            f"{where} is not what was stored: the tag {FILE_TAG} of {version.uri} says {expected}, found "
            f"{file_digest(content)}. {_BY_FORCE}"
        )
    try:
        return RowDigests.from_bytes(content, where)
    except AssetError as error:
        raise GateError(f"{error}. {_BY_FORCE}") from error


def _from_data(candidate: ModelVersion, setting: Setting, assessor: Assessor) -> RowDigests:
    try:
        examples = assessor.training_rows(setting)
    except (AssetError, DatasetError) as error:
        raise GateError(
            f"which rows {candidate.uri} was trained on is not known: its run has no {FILE}, and the training data "
            f"cannot be read here ({error}). {_WAYS_OUT}"
        ) from error
    arm = setting.arm
    keys = (row_key(example, arm.dataset.system) for example in examples)
    return RowDigests.of(keys, name=arm.spec_hash, init_from=arm.init_from)
