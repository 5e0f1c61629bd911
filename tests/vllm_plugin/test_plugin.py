"""What `register` does to vLLM: two or three names, on two platforms, once or often."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="the registry is vLLM's: install an extra")

import vllm.platforms
from vllm import ModelRegistry

from mtp_graft import vllm_plugin

pytestmark = pytest.mark.vllm
NAMES = {"DeepseekV4ForCausalLM": "DeepseekV4ForCausalLM", "DeepSeekV4MTPModel": "DeepSeekV4MTP"}
DSPARK = {"DSparkDraftModel": "DSparkDeepseekV4ForCausalLM"}


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm"])
def test_models_are_replaced_by_ours(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(ModelRegistry.models)
    monkeypatch.setattr(ModelRegistry, "models", dict(before))
    answers = {f"is_{kind}": lambda kind=kind: kind == platform for kind in ("cpu", "cuda")}
    monkeypatch.setattr(vllm.platforms, "current_platform", SimpleNamespace(**answers))
    vllm_plugin.register()
    vllm_plugin.register()
    changed = {k: m for k, m in ModelRegistry.models.items() if m is not before.get(k)}
    found = {name: f"{model.module_name}:{model.class_name}" for name, model in changed.items()}
    names = NAMES | (DSPARK if platform == "cuda" else {})
    ours = {name: f"mtp_graft.vllm_plugin.{platform}:{cls}" for name, cls in names.items()}
    assert found == ({} if platform == "rocm" else ours)
