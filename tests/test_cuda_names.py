"""Names that the CUDA shims supply: the parts of fused modules."""

from copy import deepcopy

import pytest

pytest.importorskip("vllm", reason="the shims patch vLLM: install an extra")

from torch import nn
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.model_loader.utils import configure_quant_config
from vllm.models.deepseek_v4.nvidia import model as stock_target
from vllm.models.deepseek_v4.nvidia import mtp as stock_drafter

from mtp_graft.checkpoint.quantization_config import add_head, base_quantization_config
from mtp_graft.vllm_plugin.cuda import models

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
    assert stock_target.DeepseekV4ForCausalLM.packed_modules_mapping == models.FUSED
