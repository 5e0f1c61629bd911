"""Strict loading names every tensor left over and every parameter left empty, and nothing else."""

import itertools
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import MergedColumnParallelLinear
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from mtp_graft.errors import GraftError
from mtp_graft.quant import fp8_block
from mtp_graft.vllm_plugin.strict_loading import load_base, load_head, load_strictly
from vllm_plugin.layers import config_for, load_expert, routed_experts

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_rank")]

Weights = Iterable[tuple[str, Tensor]]
Load = Callable[[Weights], set[str]]


class Small(nn.Module):
    """Two parameters, one of them in a submodule, and such as are named."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(3))
        self.inner = nn.Linear(3, 2, bias=False)
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.zeros(2)))


def load_by_name(model: nn.Module) -> Load:
    """Return a lenient `load_weights`, as vLLM's are: unknown names are passed over."""

    def load(weights: Weights) -> set[str]:
        loaded, parameters = set(), dict(model.named_parameters())
        for name, tensor in weights:
            if name in parameters:
                parameter = parameters[name]
                getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)
                loaded.add(name)
        return loaded

    return load


def checkpoint_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.rand(parameter.shape) for name, parameter in model.named_parameters()}


def test_a_complete_checkpoint_is_loaded_and_reported() -> None:
    """A parameter under two names, whichever, is expected once."""
    model = Small()
    model.tied = nn.Linear(3, 2, bias=False)
    model.tied.weight = model.inner.weight
    checkpoint = checkpoint_of(model)
    loaded = load_strictly(model, checkpoint.items(), load_by_name(model))
    assert loaded == checkpoint.keys() == {"scale", "inner.weight"}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.data, checkpoint[name])


UNREAD, UNWRITTEN = "checkpoint tensors that no parameter takes", "that no checkpoint tensor fills"


@pytest.mark.parametrize(
    ("model", "strangers", "missing", "message"),
    [
        (Small(), ["a.bias", "b.bias"], [], f"2 {UNREAD}: a.bias, b.bias; "),
        (Small(), "abcdefghi", [], f"9 {UNREAD}: a, b, c, d, e, ...; "),
        (Small(), [], ["inner.weight"], f"{UNWRITTEN}: inner.weight (0 of 1 parts); "),
        (Small("w2_weight_other"), [], ["w2_weight_other"], f"{UNWRITTEN}: w2_weight_other"),
    ],
)
def test_what_is_left_over_or_left_empty_is_named(
    model: nn.Module, strangers: Iterable[str], missing: list[str], message: str
) -> None:
    checkpoint = {name: torch.zeros(1) for name in strangers} | checkpoint_of(model)
    for name in missing:
        del checkpoint[name]
    with pytest.raises(GraftError) as caught:
        load_strictly(model, checkpoint.items(), load_by_name(model))
    assert message in str(caught.value)


def test_tensors_that_loading_stops_before_are_unread() -> None:
    model = Small()
    checkpoint = {**checkpoint_of(model), "late": torch.zeros(1)}
    with pytest.raises(GraftError, match=f"1 {UNREAD}: late"):
        load_strictly(
            model, checkpoint.items(), lambda w: load_by_name(model)(itertools.islice(w, 2))
        )


def test_parameters_of_the_engine_and_of_the_target_may_stay_unwritten() -> None:
    model = Small("w13_weight_g_idx", "w2_g_idx_sort_indices", "x_embed_tokens")
    model.embed_tokens = nn.Embedding(2, 2)
    head = {f"mtp.{name}": tensor for name, tensor in checkpoint_of(model).items()}
    for name in ("w13_weight_g_idx", "w2_g_idx_sort_indices", "embed_tokens.weight"):
        del head[f"mtp.{name}"]

    def load(weights: Weights) -> set[str]:
        return load_by_name(model)((name.removeprefix("mtp."), tensor) for name, tensor in weights)

    checkpoint = {"scale": torch.ones(3), **head}  # the first is the base's, and passed over
    assert load_head(model, checkpoint.items(), load) == {"scale", "inner.weight", "x_embed_tokens"}
    assert torch.equal(model.scale.data, head["mtp.scale"])


def test_a_base_is_loaded_with_decoded_compressors_and_without_its_head() -> None:
    wkv = nn.Linear(256, 128, bias=False)
    compressor = nn.ModuleDict({"compressor": nn.ModuleDict({"wkv": wkv})})
    model = nn.ModuleDict({"2": nn.ModuleDict({"attn": compressor})})
    codes = torch.ones(128, 256).to(torch.float8_e4m3fn)
    pair = {
        "2.attn.compressor.wkv.weight": codes,
        "2.attn.compressor.wkv.weight_scale": torch.tensor([[2.0, 3]]),
    }
    load = load_by_name(model)
    load_base(model, {**pair, "mtp.0.enorm.weight": torch.ones(1)}.items(), load)
    expected = fp8_block.decode(codes, pair["2.attn.compressor.wkv.weight_scale"])
    assert torch.equal(wkv.weight.data, expected)


def test_attention_sinks_are_excused_when_reported_loaded() -> None:
    """vLLM copies them itself, past any weight loader."""
    model = Small("attn_sink")
    checkpoint = checkpoint_of(model)

    def load(weights: Weights, report: bool = True) -> set[str]:
        loaded = set()
        for name, tensor in weights:
            if name == "attn_sink":
                loaded |= {name} if report else set()
            else:
                loaded |= load_by_name(model)([(name, tensor)])
        return loaded

    assert "attn_sink" in load_strictly(model, checkpoint.items(), load)
    with pytest.raises(GraftError, match="no parameter takes: attn_sink"):
        load_strictly(model, checkpoint.items(), lambda weights: load(weights, report=False))
    del checkpoint["attn_sink"]
    with pytest.raises(GraftError, match=r"fills: attn_sink \(0 of 1 parts\)"):
        load_strictly(model, checkpoint.items(), load)


def test_a_merged_linear_needs_every_part() -> None:
    layer = MergedColumnParallelLinear(8, [4, 6, 2], bias=False, params_dtype=torch.float32)
    model = nn.ModuleDict({"gate_up": layer})
    parts = {f"part.{i}": torch.rand(rows, 8) for i, rows in enumerate((4, 6, 2))}

    def load(weights: Weights) -> set[str]:
        for name, tensor in weights:
            layer.weight.weight_loader(layer.weight, tensor, int(name[-1]))
        return set()

    load_strictly(model, parts.items(), load)
    del parts["part.1"]
    with pytest.raises(GraftError, match=r"gate_up\.weight \(2 of 3 parts\)"):
        load_strictly(model, parts.items(), load)


@pytest.mark.parametrize(
    ("missing", "report"),
    [
        (None, None),
        ("2.w3.weight_packed", r"w13_weight_packed \(5 of 6 parts\); "),
        ("0.w1.weight_shape", r"w13_weight_shape \(5 of 6 parts\); "),
        ("1.w2.weight_scale", r"w2_weight_scale \(2 of 3 parts\); "),
    ],
)
def test_experts_need_every_matrix_of_every_expert(missing: str | None, report: str | None) -> None:
    layer = routed_experts(config_for("int4"), "model.layers.0.ffn.experts", 3, 128, 128)
    parts = {
        "weight_packed": torch.zeros(128, 16, dtype=torch.int32),
        "weight_scale": torch.ones(128, 1, dtype=torch.bfloat16),
        "weight_shape": torch.tensor([128, 128]),
    }
    names = itertools.product("012", ("w1", "w2", "w3"), parts)
    checkpoint = {".".join(name): parts[name[2]] for name in names if ".".join(name) != missing}

    def load(weights: Weights) -> set[str]:
        for name, tensor in weights:
            expert, matrix, part = name.split(".")
            load_expert(layer, int(expert), matrix, part, tensor)
        return set()

    model = nn.ModuleDict({"experts": layer})
    if report is None:
        load_strictly(model, checkpoint.items(), load)
    else:
        with pytest.raises(GraftError, match=f"1 parameters {UNWRITTEN}: experts.{report}"):
            load_strictly(model, checkpoint.items(), load)


def test_an_expert_of_another_rank_is_read_but_fills_nothing() -> None:
    model = Small()
    checkpoint = checkpoint_of(model)
    answers = iter([False, True, False])
    model.inner.weight.weight_loader = lambda _parameter, _tensor: next(answers)
    twice = [*checkpoint.items(), ("inner.weight", checkpoint["inner.weight"])]
    load_strictly(model, twice, load_by_name(model))
    with pytest.raises(GraftError, match=rf"{UNWRITTEN}: inner.weight \(0 of 1 parts\)"):
        load_strictly(model, checkpoint.items(), load_by_name(model))
