"""Strict loading names every tensor left over and every parameter left empty, and nothing else."""

import itertools
from collections.abc import Callable, Iterable, Iterator

import pytest

pytest.importorskip("vllm", reason="strict loading watches vLLM's layers: install an extra")

from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("vLLM for another platform than the CPU", allow_module_level=True)

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import MergedColumnParallelLinear
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from mtp_graft.errors import GraftError
from mtp_graft.vllm_plugin.cpu.dequantize import dequantize_on_load
from mtp_graft.vllm_plugin.strict_loading import load_strictly
from quantized import tiny_quantization
from vllm_layers import load_expert, one_rank_group, routed_experts

pytestmark = pytest.mark.vllm

Weights = Iterable[tuple[str, Tensor]]


class Small(nn.Module):
    """Two parameters, one of them in a submodule."""

    def __init__(self, *extra: str) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(3))
        self.inner = nn.Linear(3, 2, bias=False)
        for name in extra:
            self.register_parameter(name, nn.Parameter(torch.zeros(2)))


def load_by_name(model: nn.Module) -> Callable[[Weights], set[str]]:
    """Return a lenient `load_weights`, as vLLM's are: unknown names are passed over."""

    def load(weights: Weights) -> set[str]:
        loaded = set()
        parameters = dict(model.named_parameters())
        for name, tensor in weights:
            if name in parameters:
                parameter = parameters[name]
                getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)
                loaded.add(name)
        return loaded

    return load


def checkpoint_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.rand(parameter.shape) for name, parameter in model.named_parameters()}


def error_of(
    model: nn.Module, checkpoint: dict[str, Tensor], shared: set[str] = frozenset()
) -> str:
    with pytest.raises(GraftError) as caught:
        load_strictly(model, checkpoint.items(), load_by_name(model), shared)
    return str(caught.value)


def test_a_complete_checkpoint_is_loaded_and_reported() -> None:
    model = Small()
    checkpoint = checkpoint_of(model)
    loaded = load_strictly(model, checkpoint.items(), load_by_name(model))
    assert loaded == {"scale", "inner.weight"}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.data, checkpoint[name])


def test_an_unread_tensor_is_named() -> None:
    model = Small()
    checkpoint = {"first.bias": torch.zeros(1), **checkpoint_of(model), "last.bias": torch.zeros(1)}
    message = error_of(model, checkpoint)
    assert "2 checkpoint tensors that no parameter takes: first.bias, last.bias; " in message


def test_an_unwritten_parameter_is_named_with_its_parts() -> None:
    model = Small()
    checkpoint = checkpoint_of(model)
    del checkpoint["inner.weight"]
    message = error_of(model, checkpoint)
    assert "1 parameters that no checkpoint tensor fills: inner.weight (0 of 1 parts); " in message


def test_tensors_that_loading_stops_before_are_unread() -> None:
    model = Small()
    checkpoint = {**checkpoint_of(model), "late": torch.zeros(1), "later": torch.zeros(1)}

    def load_two(weights: Weights) -> set[str]:
        return load_by_name(model)(itertools.islice(weights, 2))

    with pytest.raises(
        GraftError, match="2 checkpoint tensors that no parameter takes: late, later"
    ):
        load_strictly(model, checkpoint.items(), load_two)


def test_a_long_list_is_cut_and_counted() -> None:
    model = Small()
    strangers = {f"x{number}": torch.zeros(1) for number in range(9)}
    message = error_of(model, {**checkpoint_of(model), **strangers})
    assert "9 checkpoint tensors" in message
    assert "x0, x1, x2, x3, x4, ...;" in message


def test_a_loaders_own_error_is_passed_on() -> None:
    model = Small()
    checkpoint = {**checkpoint_of(model), "scale": torch.zeros(5)}
    with pytest.raises(AssertionError, match="Attempted to load weight"):
        load_strictly(model, checkpoint.items(), load_by_name(model))


def test_shared_parameters_may_stay_unwritten_and_others_not() -> None:
    model = Small("embed")
    checkpoint = checkpoint_of(model)
    del checkpoint["embed"]
    assert "embed (0 of 1 parts)" in error_of(model, checkpoint)
    load = load_by_name(model)
    assert load_strictly(model, checkpoint.items(), load, {"embed"}) == {"scale", "inner.weight"}


def test_a_parameter_under_two_names_is_expected_once() -> None:
    model = Small()
    model.tied = nn.Linear(3, 2, bias=False)
    model.tied.weight = model.inner.weight
    checkpoint = checkpoint_of(model)
    assert set(checkpoint) == {"scale", "inner.weight"}
    load_strictly(model, checkpoint.items(), load_by_name(model))


def test_what_the_engine_owns_may_stay_unwritten() -> None:
    model = Small("w13_weight_g_idx", "w2_g_idx_sort_indices", "w2_weight_other")
    checkpoint = checkpoint_of(model)
    for name in ("w13_weight_g_idx", "w2_g_idx_sort_indices"):
        del checkpoint[name]
    load_strictly(model, checkpoint.items(), load_by_name(model))
    del checkpoint["w2_weight_other"]
    assert "1 parameters that no checkpoint tensor fills: w2_weight_other" in error_of(
        model, checkpoint
    )


def load_with_sinks(model: nn.Module, *, report: bool) -> Callable[[Weights], set[str]]:
    """Return a `load_weights` that copies attention sinks itself, past any weight loader."""

    def load(weights: Weights) -> set[str]:
        others = []
        for name, tensor in weights:
            if name.endswith("attn_sink") and report:
                model.attn_sink.data.copy_(tensor)
                others.append(name)
            elif not name.endswith("attn_sink"):
                others += load_by_name(model)([(name, tensor)])
        return set(others)

    return load


def test_attention_sinks_are_excused_when_reported_loaded() -> None:
    model = Small("attn_sink")
    checkpoint = checkpoint_of(model)
    loaded = load_strictly(model, checkpoint.items(), load_with_sinks(model, report=True))
    assert "attn_sink" in loaded
    with pytest.raises(GraftError, match="no parameter takes: attn_sink"):
        load_strictly(model, checkpoint.items(), load_with_sinks(model, report=False))
    del checkpoint["attn_sink"]
    with pytest.raises(GraftError, match=r"fills: attn_sink \(0 of 1 parts\)"):
        load_strictly(model, checkpoint.items(), load_with_sinks(model, report=True))


# vLLM's own fused layers


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_rank_group(tmp_path_factory.mktemp("group")):
        yield


@pytest.mark.usefixtures("one_rank")
def test_a_merged_linear_needs_every_part() -> None:
    layer = MergedColumnParallelLinear(8, [4, 6, 2], bias=False, params_dtype=torch.float32)
    model = nn.ModuleDict({"gate_up": layer})
    parts = {f"part.{i}": torch.rand(rows, 8) for i, rows in enumerate((4, 6, 2))}

    def load(weights: Weights) -> set[str]:
        for name, tensor in weights:
            layer.weight.weight_loader(layer.weight, tensor, int(name[-1]))
        return set()

    load_strictly(model, parts.items(), load)
    assert torch.equal(layer.weight.data, torch.cat(list(parts.values())))
    del parts["part.1"]
    with pytest.raises(GraftError, match=r"gate_up\.weight \(2 of 3 parts\)"):
        load_strictly(model, parts.items(), load)


def experts_model() -> nn.ModuleDict:
    config = CompressedTensorsConfig.from_config(tiny_quantization())
    prefix = "model.layers.0.ffn.experts"
    return nn.ModuleDict(
        {"experts": routed_experts(dequantize_on_load(config), prefix, 3, 128, 128)}
    )


def expert_checkpoint() -> dict[str, Tensor]:
    parts = {
        "weight_packed": torch.zeros(128, 16, dtype=torch.int32),
        "weight_scale": torch.ones(128, 1, dtype=torch.bfloat16),
        "weight_shape": torch.tensor([128, 128]),
    }
    return {
        f"{expert}.{matrix}.{part}": tensor
        for expert in range(3)
        for matrix in ("w1", "w2", "w3")
        for part, tensor in parts.items()
    }


def load_experts(model: nn.ModuleDict) -> Callable[[Weights], set[str]]:
    def load(weights: Weights) -> set[str]:
        for name, tensor in weights:
            expert, matrix, part = name.split(".")
            load_expert(model["experts"], int(expert), matrix, part, tensor)
        return set()

    return load


def test_experts_need_every_matrix_of_every_expert() -> None:
    model = experts_model()
    load_strictly(model, expert_checkpoint().items(), load_experts(model))
    for missing, report in (
        ("2.w3.weight_packed", "experts.w13_weight_packed (5 of 6 parts)"),
        ("0.w1.weight_shape", "experts.w13_weight_shape (5 of 6 parts)"),
        ("1.w2.weight_scale", "experts.w2_weight_scale (2 of 3 parts)"),
    ):
        model, checkpoint = experts_model(), expert_checkpoint()
        del checkpoint[missing]
        with pytest.raises(GraftError) as caught:
            load_strictly(model, checkpoint.items(), load_experts(model))
        assert f"1 parameters that no checkpoint tensor fills: {report}; " in str(caught.value)


def test_an_expert_of_another_rank_is_read_but_fills_nothing() -> None:
    model = Small()
    theirs = model.inner.weight
    theirs.weight_loader = lambda _parameter, _tensor: False
    checkpoint = checkpoint_of(model)
    message = error_of(model, checkpoint)
    assert "1 parameters that no checkpoint tensor fills: inner.weight (0 of 1 parts)" in message

    answers = iter([False, True])
    theirs.weight_loader = lambda _parameter, _tensor: next(answers)
    twice = [*checkpoint.items(), ("inner.weight", checkpoint["inner.weight"])]
    load_strictly(model, twice, load_by_name(model))
