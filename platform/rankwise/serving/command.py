"""The `vllm serve` line for an adapter that lies in a PEFT directory."""

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
from rankwise.modeling.adapter import CONFIG_NAME
from rankwise.modeling.fingerprint import differing_part, template_fingerprint
from rankwise.serving.server import differences, max_rank_for, obstacles, served_dtype, served_quantization
from rankwise.settings import Settings

TEMPLATE_NAME = "chat_template.jinja"


@dataclass(frozen=True, kw_only=True)
class ServeCommand:
    """How to serve an adapter with vLLM.

    Attributes:
        arguments: Of the program `vllm`; None where it cannot be served, or its base is not on this machine.
        differs: How the arithmetic differs from that of the training, in one sentence.
        obstacles: Why it cannot be served as it is.
        remarks: What else whoever sends requests must know.
    """

    arguments: tuple[str, ...] | None
    differs: str
    obstacles: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def line(self) -> str | None:
        """For a shell."""
        return None if self.arguments is None else shlex.join(("vllm", *self.arguments))

    def to_json(self) -> dict[str, Any]:
        """As `pull --json` prints it."""
        return {
            "line": self.line,
            "arguments": None if self.arguments is None else list(self.arguments),
            "differs": self.differs,
            "obstacles": list(self.obstacles),
            "remarks": list(self.remarks),
        }


def serve_command(directory: Path, metadata: AdapterMetadata, name: str, settings: Settings) -> ServeCommand:
    """The command that serves an adapter over its base.

    Args:
        directory: The PEFT directory.
        metadata: What the stored adapter says of itself.
        name: By which requests name the adapter.
        settings: Where bases are looked for. Nothing is downloaded: vLLM fetches a base of the hub itself.
    """
    facts = metadata.base
    config = json.loads((directory / CONFIG_NAME).read_bytes())
    differs = differences(facts.quantization, facts.compute_dtype)
    if found := obstacles(config):
        return ServeCommand(arguments=None, differs=differs, obstacles=tuple(found))
    base = _base_arguments(facts, settings)
    if base is None:
        where = (
            f"the base {facts.source} at {facts.revision} is not on this machine: `rankwise bases add "
            f"{shlex.quote(facts.source)}` brings it; then pull again"
        )
        return ServeCommand(arguments=None, differs=differs, obstacles=(where,))
    arguments = ["serve", *base, "--dtype", served_dtype(facts.compute_dtype)]
    if quantization := served_quantization(facts.quantization):
        arguments += ["--quantization", quantization]
    arguments += ["--enable-lora", "--max-lora-rank", str(max_rank_for(int(config["r"])))]
    arguments += ["--lora-modules", f"{re.sub('[^A-Za-z0-9._/-]+', '-', name)}={directory}"]
    remarks = []
    if template_fingerprint(directory) != facts.fingerprint.chat_template:
        # The server renders chats by the base's template otherwise; the adapter was trained with another one.
        if (directory / TEMPLATE_NAME).is_file():
            arguments += ["--chat-template", str(directory / TEMPLATE_NAME)]
        else:
            remarks.append("the adapter has no chat template of its own: send whole prompts (/v1/completions)")
    if metadata.system is not None:
        remarks.append(f"trained with the system message {metadata.system!r}: begin chats with it")
    return ServeCommand(arguments=tuple(arguments), differs=differs, remarks=tuple(remarks))


def _base_arguments(facts: BaseFacts, settings: Settings) -> list[str] | None:
    """The model and its pin; a directory only if its content is that of the base trained on."""
    source = parse_source(facts.source)
    if isinstance(source, HubSource):
        return [source.repo, "--revision", facts.revision]
    recorded = [Path(source.path)] if isinstance(source, LocalSource) else []
    for path in (*recorded, *local_bases(settings)):
        try:
            if path.is_dir() and differing_part(path, facts.fingerprint, settings) is None:
                return [str(path)]
        except AssetError:
            continue  # No whole base: another one may be.
    return None
