"""Private and undocumented names of five libraries are used in `compat/` only."""

import ast
import re
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[3] / "platform" / "rankwise"
LIBRARIES = {"mlflow", "peft", "transformers", "bitsandbytes", "torch"}

# Modules of these libraries that other modules import from: those that the libraries' own documentation names.
DOCUMENTED = {
    "bitsandbytes",
    "mlflow",
    "mlflow.artifacts",
    "mlflow.entities",
    "mlflow.entities.model_registry",
    "mlflow.environment_variables",
    "mlflow.exceptions",
    "mlflow.models",
    "mlflow.models.model",
    "mlflow.projects",
    "mlflow.projects.backend.abstract_backend",  # As plugins import it.
    "mlflow.pyfunc",
    "mlflow.store.artifact.artifact_repo",  # As plugins import it.
    "mlflow.tracking.context.abstract_context",  # As plugins import it.
    "mlflow.types",
    "peft",
    "peft.tuners.lora",
    "peft.tuners.tuners_utils",
    "torch",
    "torch.nn",
    "torch.nn.utils",
    "torch.utils.checkpoint",
    "transformers",
    "transformers.utils",
}
# Undocumented attributes without an underscore that `compat/` reads or sets.
UNDOCUMENTED = {
    "support_avx512bf16_for_cpu", "packing_format_for_cpu", "SCB", "CB",
    "lora_variant", "lora_bias", "original_module", "artifact_dir",
}  # fmt: skip
# Underscore names that are not defined in the module that uses them, and are not private to one of the libraries:
# documented ones of sqlalchemy and `os`, and what `experiment.check` assigns to a specification.
OTHERS = {"_mapping", "_exit", "_expressions", "_elsewhere"}
_PRIVATE_MODULE = re.compile(rf"({'|'.join(LIBRARIES)})\.(\w+\.)*_[a-z]\w*(\.\w+)*")
_BY_NAME = {"getattr", "setattr", "hasattr", "delattr", "attrgetter", "methodcaller"}


def is_private(name):
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def attributes(tree):
    """Each attribute that a module uses, by a dot or by its name as a text: the line, the owner, the name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else None
            yield node.lineno, owner, node.attr
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if called in _BY_NAME:
                for argument in node.args:
                    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                        yield node.lineno, None, argument.value


def imports(tree):
    """Each import from the libraries: the line, the module, and the name that is imported from it, or None."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in LIBRARIES:
                    yield node.lineno, alias.name, None
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in LIBRARIES:
            for alias in node.names:
                yield node.lineno, node.module, alias.name


def own_names(tree):
    """Private names that a module defines: functions, classes, and attributes of `self` and `cls` or of a class."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}:
                yield node.attr
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


# Attributes of rankwise's own classes with the name of an undocumented one.
OWN = {("serving/vllm_options.py", "lora_bias")}


def misuses(source):
    """What a module uses that belongs into `compat/`, as texts."""
    tree = ast.parse(source)
    own = set(own_names(tree))
    found = []
    for line, module, name in imports(tree):
        parts = [*module.split("."), *([name] if name else [])]
        if any(map(is_private, parts)):
            found.append(f"{line}: private: {'.'.join(parts)}")
        elif module not in DOCUMENTED:
            found.append(f"{line}: undocumented: {module}")
    for line, owner, name in attributes(tree):
        known = name in OTHERS or name in own or name.startswith("_rankwise_") or owner in {"self", "cls"}
        if name in UNDOCUMENTED or (is_private(name) and not known):
            found.append(f"{line}: attribute: {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and _PRIVATE_MODULE.fullmatch(node.value):
            found.append(f"{node.lineno}: by name: {node.value}")
    return found


def modules(compat):
    return [path for path in sorted(SOURCES.rglob("*.py")) if (path.parent.name == "compat") is compat]


def used_in_compat():
    """Private names of the libraries, and the undocumented ones, that `compat/` uses."""
    found = set()
    for path in modules(compat=True):
        tree = ast.parse(path.read_text())
        found |= {name for _, _, name in attributes(tree)} | {name for *_, name in imports(tree) if name}
        found -= {name for name in own_names(tree) if is_private(name)}
    return {name for name in found if is_private(name) or name in UNDOCUMENTED}


def test_no_other_module_uses_a_private_name():
    paths = modules(compat=False)
    assert len(paths) > 100
    found = [f"{path.relative_to(SOURCES)}:{one}" for path in paths for one in misuses(path.read_text())]
    own = {f"{path}: {name}" for path, name in OWN}
    assert [one for one in found if re.sub(r":\d+: attribute:", ":", one) not in own] == []


def test_no_name_of_rankwise_s_own_hides_one_of_a_library():
    own = {name for path in modules(compat=False) for name in own_names(ast.parse(path.read_text()))}
    assert {name for name in own | OTHERS if is_private(name)} & used_in_compat() == set()


def test_the_list_of_undocumented_names_has_none_that_compat_does_not_use():
    assert used_in_compat() >= UNDOCUMENTED
    assert {"_save_example", "_active_adapter", "_attn_implementation", "_is_view"} <= used_in_compat()


@pytest.mark.parametrize(
    "source",
    [
        "from mlflow.models.utils import _save_example",
        "from mlflow.tracking._tracking_service.utils import set_tracking_uri",
        "import torch._dynamo",
        "import torch._dynamo as dynamo",
        "from torch import _C",
        "from transformers.pytorch_utils import Conv1D",
        "def f():\n    from peft.utils.other import get_pattern_key",
        "import mlflow\nmlflow.tracking.fluent._get_experiment_id()",
        "model.config._attn_implementation",
        "layer._active_adapter = []",
        "layers[0]._disable_adapters = False",
        "hasattr(model, '_hf_peft_config_loaded')",
        "operator.attrgetter('_is_view')",
        "layer.support_avx512bf16_for_cpu = False",
        "getattr(state, 'packing_format_for_cpu', False)",
        "logging.getLogger('bitsandbytes.autograd._functions')",
    ],
)
def test_a_use_is_found(source):
    assert len(misuses(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "from mlflow.models import Model",
        "from rankwise.compat.mlflow import save_example",
        "from rankwise.flavor.pyfunc import _load_pyfunc",
        "import os\nos._exit(1)",
        "self._rows = 1",
        "row._mapping",
        "module.__dict__.get('forward')",
        "getattr(model, '_rankwise_routing')",
        "logging.getLogger('mlflow.rankwise')",
        "'mlflow.source.git.commit'",
    ],
)
def test_other_code_is_left_alone(source):
    assert misuses(source) == []
