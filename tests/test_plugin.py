"""What `register` does to vLLM: two names, on two platforms, once or often."""

import importlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="the registry is vLLM's: install an extra")

import vllm.platforms
from vllm import ModelRegistry

from mtp_graft import vllm_plugin

pytestmark = pytest.mark.vllm

NAMES = {"DeepseekV4ForCausalLM": "DeepseekV4ForCausalLM", "DeepSeekV4MTPModel": "DeepSeekV4MTP"}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """A copy of the registry's models for the time of a test."""
    models = dict(ModelRegistry.models)
    monkeypatch.setattr(ModelRegistry, "models", models)
    yield models


def platform(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    answers = {f"is_{kind}": lambda kind=kind: kind == name for kind in ("cpu", "cuda")}
    monkeypatch.setattr(vllm.platforms, "current_platform", SimpleNamespace(**answers))


def places(models: dict[str, object]) -> dict[str, tuple[str, str]]:
    """Return each model's module and class, which need not be imported for it."""
    return {
        name: (entry.module_name, entry.class_name)  # type: ignore[attr-defined]
        for name, entry in models.items()
    }


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_only_the_two_deepseek_v4_names_are_registered(
    registered: dict[str, object], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for model in NAMES:
        registered.pop(model, None)
    before = places(registered)
    platform(monkeypatch, name)
    vllm_plugin.register()
    ours = {
        model: (f"mtp_graft.vllm_plugin.{name}", class_name) for model, class_name in NAMES.items()
    }
    assert places(registered) == {**before, **ours}


def test_the_stock_models_are_replaced_and_registering_again_is_harmless(
    registered: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    platform(monkeypatch, "cpu")
    vllm_plugin.register()
    once = places(registered)
    assert once["DeepseekV4ForCausalLM"][0] == "mtp_graft.vllm_plugin.cpu"
    vllm_plugin.register()
    assert places(registered) == once


def test_nothing_is_registered_on_another_platform(
    registered: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = dict(registered)
    platform(monkeypatch, "rocm")
    vllm_plugin.register()
    assert registered == before


def test_registered_classes_exist_for_this_platform() -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() and not current_platform.is_cuda():
        pytest.skip("neither a CPU nor a CUDA build of vLLM")
    package = f"{vllm_plugin.__name__}.{'cpu' if current_platform.is_cpu() else 'cuda'}"
    module = importlib.import_module(package)
    for class_name in NAMES.values():
        assert isinstance(getattr(module, class_name), type)
