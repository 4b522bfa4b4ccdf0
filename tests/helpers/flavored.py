"""A tiny base with a stored adapter over it, made once for many tests of the flavor."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.bases import inject, logits
from helpers.local_store import prepared_home
from helpers.tiny import make_base


@dataclass(frozen=True)
class World:
    """What was made: a store, a base, an adapter in a PEFT directory, and the model directory of it."""

    root: Path
    settings: Any
    base_path: Path
    adapter: Path
    saved: Path
    logits: Any

    def load_base(self, **quantization):
        """The base anew, without adapters."""
        from rankwise.assets.base import resolve_base
        from rankwise.experiment.schema import QuantizationSpec
        from rankwise.modeling.base import load_base

        resolved = resolve_base(str(self.base_path), None, self.settings)
        return load_base(resolved, QuantizationSpec(**quantization), self.settings, device="cpu")

    def enter(self, monkeypatch) -> None:
        """Make its home, cache and store those that commands find in the environment."""
        monkeypatch.setenv("RANKWISE_HOME", str(self.settings.home))
        monkeypatch.setenv("RANKWISE_CACHE", str(self.settings.cache))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", self.settings.tracking_uri)

    def register(self, name: str) -> Any:
        """Register the adapter as the model `name`, with the alias `champion`; MLflow's ModelInfo."""
        import mlflow

        import rankwise.flavor as flavor

        before = mlflow.get_tracking_uri()
        mlflow.set_tracking_uri(self.settings.tracking_uri)
        try:
            info = flavor.log_adapter(self.adapter, self.load_base(), registered_model_name=name)
            mlflow.MlflowClient().set_registered_model_alias(name, "champion", info.registered_model_version)
        finally:
            mlflow.set_tracking_uri(before)
        return info

    def copy(self, target: Path) -> Path:
        """A copy of the model directory, to be spoilt."""
        shutil.copytree(self.saved, target)
        return target


def make_world(root: Path, home: Path | None = None) -> World:
    """Make it all below `root`; the adapter is of rank 4 on q_proj and v_proj, with random weights."""
    import rankwise.flavor as flavor
    from rankwise.assets.base import resolve_base
    from rankwise.experiment.schema import QuantizationSpec
    from rankwise.modeling.adapter import save_adapter
    from rankwise.modeling.base import load_base

    settings = prepared_home(home or root / "home")
    path = make_base(root / "bases" / "tiny")
    base = load_base(resolve_base(str(path), None, settings), QuantizationSpec(), settings, device="cpu")
    inject(base.model, "arm-1")
    wanted = logits(base.model)
    save_adapter(base.model, "arm-1", root / "peft", base_source=base.source, base_revision=base.revision)
    flavor.save_model(base.model, root / "saved", base.tokenizer, base=base, settings=settings)
    return World(
        root=root, settings=settings, base_path=path, adapter=root / "peft", saved=root / "saved", logits=wanted
    )


def make_versions(root: Path, home: Path | None = None) -> World:
    """A world whose registry has the model `one` with versions 1 and 2 that differ; the alias `champion` is on 1."""
    import mlflow

    import rankwise.flavor as flavor

    world = make_world(root, home)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(world.settings.tracking_uri)
    try:
        base = world.load_base()
        flavor.log_adapter(world.adapter, base, registered_model_name="one")
        inject(base.model, "arm-2", seed=7, r=2)
        flavor.log_model(base.model, base.tokenizer, base=base, adapter_name="arm-2", registered_model_name="one")
        mlflow.MlflowClient().set_registered_model_alias("one", "champion", "1")
    finally:
        mlflow.set_tracking_uri(before)
    return world
