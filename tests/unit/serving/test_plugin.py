from __future__ import annotations

import asyncio
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from rankwise.serving.plugin import NAME, LazyResolver, make_resolver, register

ROOT = Path(__file__).parents[3]
FAKE = ROOT / "tests" / "helpers" / "fake_vllm"
LINE = ["vllm", "serve", "BASE", "--enable-lora"]


@pytest.fixture
def vllm(monkeypatch):
    """A small vLLM, gone after the test."""
    monkeypatch.syspath_prepend(FAKE)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]


@pytest.fixture
def resolver(vllm, world, client, monkeypatch):
    world.enter(monkeypatch)
    opened = []
    real = LazyResolver._open
    monkeypatch.setattr(LazyResolver, "_open", lambda self: opened.append(real(self)) or opened[-1])
    yield make_resolver(LINE)
    for _, follower in opened:
        # A server follows aliases as long as it lives; the next tests are not to hear of it.
        follower.close()


def ask(resolver, base, name):
    return asyncio.run(resolver.resolve_lora(base, name))


def test_the_entry_point_registers_a_resolver_once(vllm, monkeypatch):
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    assert EntryPoint(NAME, declared[NAME], "vllm.general_plugins").load() is register
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    monkeypatch.setattr(LoRAResolverRegistry, "resolvers", {})
    monkeypatch.setattr(sys, "argv", LINE)
    register()
    first = LoRAResolverRegistry.get_resolver(NAME)
    assert isinstance(first, LoRAResolver)
    register()
    assert LoRAResolverRegistry.get_resolver(NAME) is first


def test_without_vllm_nothing_is_registered_and_nothing_raised(caplog):
    register()
    assert "the rankwise plugin is off: ModuleNotFoundError" in caplog.text


def test_the_plugin_starts_without_the_heavy_libraries():
    heavy = ["torch", "transformers", "mlflow", "peft", "datasets"]
    code = (
        f"import sys; sys.path[:0] = [{str(FAKE)!r}]\n"
        "before = set(sys.modules)\n"
        "import rankwise.serving.plugin as plugin\nplugin.register()\n"
        "from vllm.lora.resolver import LoRAResolverRegistry\n"
        "assert 'rankwise' in LoRAResolverRegistry.get_supported_resolvers()\n"
        f"print([name for name in {heavy} if name in set(sys.modules) - before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_of_adapters_are_resolved_and_the_answer_names_the_version(resolver, world):
    names = {
        "models:/served@champion": "models:/served@champion (version 1)",
        "served@champion": "served@champion (version 1)",
        "models:/served/1": "models:/served/1",
    }
    for name, shown in names.items():
        found = ask(resolver, str(world.base_path), name)
        assert found.lora_name == shown
        assert found.lora_int_id > 0
        assert (Path(found.lora_path) / "adapter_config.json").is_file()


def test_what_cannot_be_served_is_none_with_a_line_in_the_log(resolver, world, caplog):
    assert ask(resolver, str(world.base_path), "models:/nothing@here") is None
    assert "models:/nothing@here is not served: TrackingError: " in caplog.text
    assert ask(resolver, "/no/base", "models:/served/1") is None
    assert "models:/served/1 is not served: ConfigError" in caplog.text
    caplog.clear()
    # Names that are no adapters of a registry belong to other resolvers.
    assert ask(resolver, str(world.base_path), "org/some-lora") is None
    assert caplog.text == ""


def test_that_aliases_are_not_followed_is_said(vllm, world, client, monkeypatch, caplog):
    world.enter(monkeypatch)
    assert ask(make_resolver([*LINE, "--uds", "/run/vllm"]), str(world.base_path), "served@champion") is not None
    assert caplog.text.count("aliases that move are not followed") == 1


def test_the_server_s_event_loop_is_not_held_up(resolver, world, monkeypatch):
    import threading

    threads = []
    find = LazyResolver.find
    monkeypatch.setattr(
        LazyResolver, "find", lambda self, *names: threads.append(threading.current_thread()) or find(self, *names)
    )
    assert ask(resolver, str(world.base_path), "models:/served/1") is not None
    assert threads[0] is not threading.main_thread()
