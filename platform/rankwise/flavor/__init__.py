"""The MLflow flavor `qlora`: an adapter that loads, by alias, over exactly the base it was trained on.

Three lines at the end of any training script that has a peft model:

    import rankwise.flavor
    with mlflow.start_run():
        rankwise.flavor.log_model(model, tokenizer, registered_model_name="my-model")

and one to get it back, in any process, without a network:

    adapter = rankwise.flavor.load_model("models:/my-model@champion")
"""

from __future__ import annotations

from rankwise.flavor.base import Override
from rankwise.flavor.fetch import Origin, download_adapter, read_metadata
from rankwise.flavor.load import LoadedAdapter, load_model, load_models
from rankwise.flavor.metadata import FLAVOR_NAME, AdapterMetadata, BaseFacts
from rankwise.flavor.pyfunc import _load_pyfunc
from rankwise.flavor.store import log_adapter, log_model, save_model

__all__ = [
    "FLAVOR_NAME",
    "AdapterMetadata",
    "BaseFacts",
    "LoadedAdapter",
    "Origin",
    "Override",
    "_load_pyfunc",
    "download_adapter",
    "load_model",
    "load_models",
    "log_adapter",
    "log_model",
    "read_metadata",
    "save_model",
]
