"""What `register` does to vLLM: two or three names, on two platforms, once or often."""

import os
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="the registry is vLLM's: install an extra")

import vllm.platforms
from vllm import ModelRegistry
from vllm.model_executor.models import registry
from vllm.v1.engine import utils

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


def test_a_cpu_server_imports_vllm_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((registry, "_run_in_subprocess"), (utils, "get_mp_context")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back afterwards
    monkeypatch.setattr(vllm.platforms.current_platform, "is_cpu", lambda: True)
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # as servers have it
    for workers, method in (("1", "spawn"), ("0", "fork")):
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", workers)
        vllm_plugin.register()
        assert utils.get_mp_context().get_start_method() == method
    assert registry._run_in_subprocess(os.getpid) == os.getpid()
