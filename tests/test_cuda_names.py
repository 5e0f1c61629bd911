"""Names that the CUDA shims supply: parts of fused modules, and the output projection's scale."""

from copy import deepcopy
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the shims patch vLLM: install an extra")

import torch
from torch import nn
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.model_loader.utils import configure_quant_config
from vllm.models.deepseek_v4.nvidia import model as stock_target
from vllm.models.deepseek_v4.nvidia import mtp as stock_drafter
from vllm.models.deepseek_v4.nvidia.ops import o_proj

from mtp_graft.checkpoint.quantization_config import add_head, base_quantization_config
from mtp_graft.vllm_plugin.cuda import models, scale_alias

pytestmark = pytest.mark.vllm

FP8_MODULES = (
    "model.layers.0.attn.fused_wqa_wkv",  # the base's
    "model.layers.4.attn.fused_wqa_wkv",  # the head's
    "model.layers.4.ffn.shared_experts.gate_up_proj",
)


def formats_found_by(model_class: type[nn.Module]) -> list[str | None]:
    """Return what vLLM finds for the fused modules of a grafted checkpoint in `model_class`."""
    written = add_head(base_quantization_config(), 4, "int4", "fp8")
    config = CompressedTensorsConfig.from_config(deepcopy(written))
    configure_quant_config(config, model_class)
    found = [config.get_scheme_dict(nn.Linear(1, 1), name) for name in FP8_MODULES]
    return [scheme["format"] if scheme else None for scheme in found]


@pytest.mark.parametrize("model_class", [models.DeepseekV4ForCausalLM, models.DeepSeekV4MTP])
def test_fused_modules_find_the_scheme_of_their_parts(model_class: type[nn.Module]) -> None:
    assert formats_found_by(model_class) == ["float-quantized"] * len(FP8_MODULES)


def test_vllms_own_drafter_finds_none() -> None:
    """If this fails, vLLM's drafter names its parts: FUSED is not needed there any more."""
    assert formats_found_by(stock_drafter.DeepSeekV4MTP) == [None] * len(FP8_MODULES)


def test_the_parts_are_those_that_vllm_names_for_its_target() -> None:
    upstream = getattr(stock_target.DeepseekV4ForCausalLM, "packed_modules_mapping", None)
    if not upstream:
        pytest.skip("vLLM before 0.29 names none")
    assert upstream == models.FUSED


class Linear(nn.Module):
    """A compressed-tensors layer whose processing replaces the scale, as vLLM's does."""

    def __init__(self, *parameters: str) -> None:
        super().__init__()
        for name in parameters:
            self.register_parameter(name, nn.Parameter(torch.ones(2)))
        self.quant_method = SimpleNamespace(process_weights_after_loading=self.process)

    def process(self, layer: nn.Module) -> None:
        assert layer is self
        assert not hasattr(layer, "weight_scale_inv"), "a sign of the other layout"
        if hasattr(layer, "weight_scale"):
            layer.weight_scale = nn.Parameter(torch.full((2,), 3.0))


@pytest.fixture
def model() -> nn.Module:
    """Two layers' attention: FP8 in the first, `wo_a` without quantization in the second."""
    scaled = ("weight", "weight_scale")
    fp8 = {"wo_a": Linear(*scaled), "wo_b": Linear(*scaled)}
    plain = {"wo_a": Linear("weight"), "wo_b": Linear(*scaled)}
    return nn.ModuleDict({"0": nn.ModuleDict(fp8), "1": nn.ModuleDict(plain)})


def process_all(model: nn.Module) -> dict[str, Any]:
    """Process every layer as vLLM does after loading; return the aliases by name."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
    for layer in layers.values():
        layer.quant_method.process_weights_after_loading(layer)
    inverse = "weight_scale_inv"
    return {name: getattr(m, inverse) for name, m in layers.items() if hasattr(m, inverse)}


def module_of(source: str) -> ModuleType:
    """Return a module with that source, and a function that it imported."""
    module = ModuleType("o_proj")
    exec(source, vars(module))
    module.imported = scale_alias.alias_scale_of_wo_a  # type: ignore[attr-defined]
    return module


ONE_NAME = "def project(wo_a):\n    return wo_a.weight_scale_inv\n"  # as vLLM 0.26
EITHER_NAME = (
    "def project(wo_a):\n"
    "    named = hasattr(wo_a, 'weight_scale')\n"
    "    return wo_a.weight_scale if named else wo_a.weight_scale_inv\n"
)


@pytest.mark.parametrize(("source", "reads"), [(ONE_NAME, False), (EITHER_NAME, True)])
def test_it_is_seen_which_names_the_output_projection_reads(source: str, reads: bool) -> None:
    assert scale_alias.reads_weight_scale(module_of(source)) is reads


def test_the_installed_vllm_needs_no_alias() -> None:
    assert scale_alias.reads_weight_scale(o_proj)


def use(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    from vllm.models.deepseek_v4.nvidia import ops

    monkeypatch.setattr(ops, "o_proj", module_of(source))


def test_wo_a_has_its_scale_under_both_names_once_processed(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, ONE_NAME)
    scale_alias.apply(model)
    aliases = process_all(model)
    assert aliases.keys() == {"0.wo_a"}
    assert aliases["0.wo_a"] is model.get_submodule("0.wo_a").weight_scale
    assert aliases["0.wo_a"].tolist() == [3, 3], "the scale before processing"


def test_where_the_projection_reads_either_name_nothing_is_changed(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, EITHER_NAME)
    scale_alias.apply(model)
    assert not process_all(model)


@pytest.mark.parametrize("model_class", [models.DeepseekV4ForCausalLM, models.DeepSeekV4MTP])
def test_both_models_ask_for_the_alias_before_they_load(
    model_class: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AliasedError(Exception):
        pass

    def stop(_model: nn.Module) -> None:
        raise AliasedError

    monkeypatch.setattr(scale_alias, "apply", stop)
    weights = (pytest.fail("the weights were read first") for _ in [0])
    with pytest.raises(AliasedError):
        model_class.load_weights(nn.Module(), weights)
