"""Strict loading names every tensor left over and every parameter left empty.

That it names nothing else in a real model is for `engine/test_engines.py`.
"""

import itertools
import re
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import MergedColumnParallelLinear
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from mtp_graft.errors import GraftError
from mtp_graft.quant import decode_fp8
from mtp_graft.vllm_plugin.strict_loading import StrictDrafter, StrictTarget, load_strictly
from vllm_plugin.layers import config_for, load_expert, routed_experts

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_rank")]
Weights = Iterable[tuple[str, Tensor]]
Load = Callable[[Weights], set[str]]


class Lenient(nn.Module):
    """Loads as vLLM's models do: names are taken without `mtp.`, unknown ones passed over."""

    def load_weights(self, weights: Weights) -> set[str]:
        loaded, parameters = set(), dict(self.named_parameters())
        for stored, tensor in weights:
            if (name := stored.removeprefix("mtp.")) in parameters:
                parameter = parameters[name]
                getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)
                loaded.add(name)
        return loaded


class Small(Lenient):
    """Two parameters, one of them in a submodule, and such as are named."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(3))
        self.inner = nn.Linear(3, 2, bias=False)
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.zeros(2)))


def checkpoint_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.rand(parameter.shape) for name, parameter in model.named_parameters()}


def strictly(model: nn.Module, checkpoint: dict[str, Tensor], load: Load | None = None) -> set[str]:
    return load_strictly(model, checkpoint.items(), load or model.load_weights)


def test_a_complete_checkpoint_is_loaded_and_reported() -> None:
    """A parameter under two names, whichever, is expected once."""
    model = Small()
    model.tied = nn.Linear(3, 2, bias=False)
    model.tied.weight = model.inner.weight
    checkpoint = checkpoint_of(model)
    assert strictly(model, checkpoint) == checkpoint.keys() == {"scale", "inner.weight"}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.data, checkpoint[name])


UNREAD, UNWRITTEN = "checkpoint tensors that no parameter takes", "that no checkpoint tensor fills"


def test_what_is_left_over_or_left_empty_is_named() -> None:
    model = Small()
    load, whole = model.load_weights, checkpoint_of(model)
    strangers = {name: torch.zeros(1) for name in "abcdefghi"}
    with pytest.raises(GraftError, match=re.escape(f"9 {UNREAD}: a, b, c, d, e, ...; ")):
        strictly(model, strangers | whole)
    with pytest.raises(GraftError, match=f"1 {UNREAD}: i; "):  # which loading stops before
        islice = itertools.islice
        strictly(model, {**whole, "i": strangers["i"]}, lambda weights: load(islice(weights, 2)))
    del whole["inner.weight"]
    with pytest.raises(GraftError, match=rf"{UNWRITTEN}: inner.weight \(0 of 1 parts\); "):
        strictly(model, whole)


def test_parameters_of_the_engine_and_of_the_target_may_stay_unwritten() -> None:
    engines = ("w13_weight_g_idx", "w2_g_idx_sort_indices")
    unwritten = (*engines, "embed_tokens.weight", "lm_head.weight")
    model = type("Drafter", (StrictDrafter, Small), {})(*engines, "x_embed_tokens")
    model.embed_tokens, model.lm_head = nn.Embedding(2, 2), nn.Linear(2, 2, bias=False)
    stored = {n: tensor for n, tensor in checkpoint_of(model).items() if n not in unwritten}

    # The base's `scale` is passed over.
    checkpoint = {"scale": torch.ones(3), **{f"mtp.{name}": stored[name] for name in stored}}
    assert model.load_weights(checkpoint.items()) == stored.keys()
    assert torch.equal(model.scale.data, stored["scale"])


def test_a_module_that_vllm_built_unquantized_is_named() -> None:
    model = Small()
    checkpoint = {**checkpoint_of(model), "inner.weight_scale": torch.ones(1)}

    def load(weights: Weights) -> set[str]:
        parameters = dict(model.named_parameters())
        return {name for name, tensor in weights if parameters[name].data.copy_(tensor) is not None}

    with pytest.raises(GraftError, match=r"no parameter 'inner\.weight_scale'; .*unquantized"):
        strictly(model, checkpoint, load)


def test_a_base_is_loaded_with_decoded_compressors_and_without_its_head() -> None:
    module = wkv = nn.Linear(256, 128, bias=False)
    for name in ("wkv", "compressor", "attn"):
        module = nn.ModuleDict({name: module})
    model = type("Target", (StrictTarget, Lenient), {})()
    model.add_module("2", module)
    codes, scale = torch.ones(128, 256).to(torch.float8_e4m3fn), torch.tensor([[2.0, 3]])
    name = "2.attn.compressor.wkv"
    pair = {f"{name}.weight": codes, f"{name}.weight_scale": scale}
    model.load_weights({**pair, "mtp.0.enorm.weight": torch.ones(1)}.items())
    assert torch.equal(wkv.weight.data, decode_fp8(codes, scale))


@pytest.mark.parametrize(
    ("missing", "message"),
    [(None, f"{UNREAD}: attn_sink"), ("attn_sink", rf"{UNWRITTEN}: attn_sink \(0 of 1 parts\)")],
)
def test_attention_sinks_have_to_be_reported_loaded(missing: str | None, message: str) -> None:
    """vLLM copies them itself, past any weight loader."""
    model = Small("attn_sink")
    checkpoint = checkpoint_of(model)
    checkpoint.pop(missing, None)
    load = model.load_weights
    with pytest.raises(GraftError, match=message):
        strictly(model, checkpoint, lambda weights: load(w for w in weights if w[0] != "attn_sink"))


def test_a_merged_linear_needs_every_part() -> None:
    layer = MergedColumnParallelLinear(8, [4, 6, 2], bias=False, params_dtype=torch.float32)
    model = nn.ModuleDict({"gate_up": layer})
    parts = {f"part.{i}": torch.rand(layer.output_sizes[i], 8) for i in (0, 2)}

    def load(weights: Weights) -> set[str]:
        for name, tensor in weights:
            layer.weight.weight_loader(layer.weight, tensor, int(name[-1]))
        return set()

    with pytest.raises(GraftError, match=r"gate_up\.weight \(2 of 3 parts\)"):
        strictly(model, parts, load)
    parts = {f"{i}.part.{i}": torch.rand(layer.output_sizes[i], 8) for i in range(3)}
    with pytest.raises(GraftError, match=r"further checkpoint tensors overwrite: gate_up\.weight;"):
        strictly(model, {**parts, "other.part.1": parts["1.part.1"]}, load)


@pytest.mark.parametrize(
    ("missing", "message"),
    [("2.w3.weight_packed", r"w13_\w+ \(5 of 6 p"), ("1.w2.weight_scale", r"w2_\w+ \(2 of 3 p")],
)
def test_experts_need_every_matrix_of_every_expert(missing: str, message: str) -> None:
    layer = routed_experts(config_for("int4"), layer=0, num_experts=3)
    parts = {"weight_packed": torch.zeros(128, 16).int(), "weight_shape": torch.tensor([128, 128])}
    parts |= {"weight_scale": torch.ones(128, 1).bfloat16()}
    names = map(".".join, itertools.product("012", ("w1", "w2", "w3"), parts))
    checkpoint = {name: parts[name.split(".")[2]] for name in names if name != missing}

    def load(weights: Weights) -> set[str]:
        for name, tensor in weights:
            expert, matrix, part = name.split(".")
            load_expert(layer, int(expert), matrix, part, tensor)
        return set()

    with pytest.raises(GraftError, match=f"1 parameters {UNWRITTEN}: experts.{message}"):
        strictly(nn.ModuleDict({"experts": layer}), checkpoint, load)


def test_an_expert_of_another_rank_is_read_but_fills_nothing() -> None:
    model = Small()
    checkpoint = checkpoint_of(model)
    model.inner.weight.weight_loader = lambda _parameter, _tensor: False
    with pytest.raises(GraftError, match=rf"{UNWRITTEN}: inner.weight \(0 of 1 parts\)"):
        strictly(model, checkpoint)
