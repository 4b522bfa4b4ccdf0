"""The `vllm serve` command line for an adapter in a PEFT directory."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.assets.base import local_bases
from rankwise.exceptions import AssetError
from rankwise.experiment.source import HubSource, LocalSource, parse_source
from rankwise.flavor.metadata import AdapterMetadata, BaseFacts
from rankwise.modeling.adapter_config import read_adapter_document
from rankwise.modeling.fingerprint import differing_part, template_fingerprint
from rankwise.serving.vllm_options import differences, max_rank_for, obstacles, served_dtype, served_quantization
from rankwise.settings import Settings

TEMPLATE_NAME = "chat_template.jinja"


@dataclass(frozen=True, kw_only=True)
class ServeCommand:
    """How to serve an adapter with vLLM.

    `arguments` is None if there are `obstacles`. `differs` says how the arithmetic differs from training.
    """

    arguments: tuple[str, ...] | None
    differs: str
    obstacles: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def line(self) -> str | None:
        """The command, quoted for a shell."""
        return None if self.arguments is None else shlex.join(("vllm", *self.arguments))

    def to_json(self) -> dict[str, Any]:
        """The form in `rankwise pull --json`."""
        return {
            "line": self.line,
            "arguments": None if self.arguments is None else list(self.arguments),
            "differs": self.differs,
            "obstacles": list(self.obstacles),
            "remarks": list(self.remarks),
        }


def serve_command(directory: Path, metadata: AdapterMetadata, name: str, settings: Settings) -> ServeCommand:
    """The command that serves the adapter in a PEFT directory over its base, under a name for requests.

    Downloads nothing: vLLM fetches a base of the hub itself.
    """
    facts = metadata.base
    config = read_adapter_document(directory)
    differs = differences(facts.quantization, facts.compute_dtype)
    if reasons := obstacles(config):
        return ServeCommand(arguments=None, differs=differs, obstacles=tuple(reasons))
    base = _base_arguments(facts, settings)
    if base is None:
        reason = (
            f"the base {facts.source} at {facts.revision} is not on this machine: run `rankwise bases add "
            f"{shlex.quote(facts.source)}`, then pull again"
        )
        return ServeCommand(arguments=None, differs=differs, obstacles=(reason,))
    arguments = ["serve", *base, "--dtype", served_dtype(facts.compute_dtype)]
    if quantization := served_quantization(facts.quantization):
        arguments += ["--quantization", quantization]
    arguments += ["--enable-lora", "--max-lora-rank", str(max_rank_for(config.r))]
    arguments += ["--lora-modules", f"{re.sub('[^A-Za-z0-9._/-]+', '-', name)}={directory}"]
    remarks = []
    if template_fingerprint(directory) != facts.fingerprint.chat_template:
        if (directory / TEMPLATE_NAME).is_file():
            arguments += ["--chat-template", str(directory / TEMPLATE_NAME)]
        else:
            remarks.append("the adapter has no chat template: send complete prompts (/v1/completions)")
    if metadata.reading.chat_template_kwargs:
        given = json.dumps(dict(metadata.reading.chat_template_kwargs), sort_keys=True)
        arguments += ["--default-chat-template-kwargs", given]
    if metadata.system is not None:
        remarks.append(f"trained with the system message {metadata.system!r}: start every chat with it")
    return ServeCommand(arguments=tuple(arguments), differs=differs, remarks=tuple(remarks))


def _base_arguments(facts: BaseFacts, settings: Settings) -> list[str] | None:
    """The model and its revision; a directory only if its content has the recorded fingerprint."""
    source = parse_source(facts.source)
    if isinstance(source, HubSource):
        return [source.repo, "--revision", facts.revision]
    recorded = [Path(source.path)] if isinstance(source, LocalSource) else []
    for path in (*recorded, *local_bases(settings)):
        try:
            if path.is_dir() and differing_part(path, facts.fingerprint, settings) is None:
                return [str(path)]
        except AssetError:
            continue  # An incomplete base.
    return None
