"""Gap: vLLM loads quantized checkpoints leniently, and an unknown expert tensor not at all.

A head that loads half-way serves without an error and accepts nothing. So every load is watched
twice: a checkpoint tensor that was given to no parameter has not been read, and a parameter
that was written fewer times than it has parts has not been filled.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import MergedColumnParallelLinear
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from mtp_graft.errors import GraftError
from mtp_graft.vllm_plugin.compressors import Weights, decode_compressors

Load = Callable[[Weights], set[str]]
_SHOWN = 5
#: Set by the engine itself: the order of activation-ordered groups, which W4A16-FP8 never has.
#: Packed matrices' shapes are read by nobody, and some checkpoints lack them.
_ENGINE_OWNED = ("_weight_g_idx", "_g_idx_sort_indices", "weight_shape")


class StrictTarget:
    """A target; unread checkpoint tensors and unwritten parameters are errors."""

    def load_weights(self: Any, weights: Weights) -> set[str]:
        """Load the base's tensors; the head's (`mtp.*`) belong to the drafter."""
        base = ((name, tensor) for name, tensor in weights if not name.startswith("mtp."))
        return load_strictly(self, decode_compressors(base), super().load_weights)  # type: ignore[misc]


class StrictDrafter:
    """A drafter; unread checkpoint tensors and unwritten parameters are errors."""

    def load_weights(self: Any, weights: Weights) -> set[str]:
        """Load `mtp.*`; embedding and LM head are the target's."""
        head = ((name, tensor) for name, tensor in weights if name.startswith("mtp."))
        shared = {
            name
            for name, _ in self.named_parameters()
            if name.endswith((".shared_head.head.weight", "embed_tokens.weight", "lm_head.weight"))
        }
        return load_strictly(self, head, super().load_weights, shared)  # type: ignore[misc]


def load_strictly(
    model: nn.Module, weights: Weights, load: Load, shared: Collection[str] = ()
) -> set[str]:
    """Call `load(weights)` and raise GraftError for whatever was left unread or unwritten.

    `load` is the model's stock `load_weights`, which consumes the tensors one at a time. `shared`
    names parameters that come from another model. Returns the names that `load` reports.
    """
    expected = _expected_parts(model)
    offered, writes = _count(model)
    unread: list[str] = []
    watched = _watch(weights, offered, unread)
    try:
        loaded = load(watched)
    except KeyError as error:  # of vLLM's loaders, where they know a tensor's module
        raise GraftError(
            f"loading the checkpoint: vLLM's model has no parameter {error}; expected one, as the "
            "checkpoint has a tensor for it. It builds without a word unquantized what no target "
            "of config.json's quantization_config names, by its fused name: see docs/format.md"
        ) from error
    for _ in watched:
        pass  # left by `load`, so it is noted as unread
    # vLLM copies the attention sinks itself, past any weight loader.
    sinks = {name for name in loaded if name.endswith("attn_sink")}
    unread = [name for name in unread if not (sinks and name.endswith("attn_sink"))]
    unwritten = [
        f"{name} ({writes[name]} of {parts} parts)"
        for name, parts in expected.items()
        if writes[name] < parts and name not in {*sinks, *shared}
    ]
    # An expert's parts may also be copied to further ranks.
    twice = [n for n, parts in expected.items() if writes[n] > parts and ".experts." not in n]
    _require_none("checkpoint tensors that no parameter takes", unread)
    _require_none("parameters that further checkpoint tensors overwrite", twice)
    _require_none("parameters that no checkpoint tensor fills", unwritten)
    return loaded


def _require_none(what: str, names: list[str]) -> None:
    if names:
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        why = "The names or the quantization config do not match the model: see docs/format.md"
        found = f"{len(names)} {what}: {shown}; expected none"
        raise GraftError(f"loading the checkpoint: {found}. {why}")


def _count(model: nn.Module) -> tuple[set[str], Counter[str]]:
    """Wrap every parameter's weight loader to note by name that it was called, and count writes.

    They differ for an expert of another rank: its loader answers False and writes nothing.
    """
    offered: set[str] = set()
    writes: Counter[str] = Counter()

    def counting(name: str, loader: Callable[..., Any]) -> Callable[..., Any]:
        def count_and_load(*args: Any, **kwargs: Any) -> Any:  # vLLM asks for a loader's __name__
            result = loader(*args, **kwargs)
            offered.add(name)
            writes[name] += result is not False
            return result

        return count_and_load

    for name, parameter in model.named_parameters():
        loader = getattr(parameter, "weight_loader", default_weight_loader)
        parameter.weight_loader = counting(name, loader)  # type: ignore[attr-defined]
    return offered, writes


def _watch(weights: Weights, offered: set[str], unread: list[str]) -> Iterator[Any]:
    for name, tensor in weights:
        offered.clear()
        yield name, tensor
        if not offered:
            unread.append(name)


def _expected_parts(model: nn.Module) -> dict[str, int]:
    """Return how many checkpoint tensors each parameter is made of, but for the engine's own."""
    names = (name for name, _ in model.named_parameters())
    parts = {name: 1 for name in names if not name.endswith(_ENGINE_OWNED)}
    for name in parts:
        prefix, _, local = name.rpartition(".")
        module = model.get_submodule(prefix)
        if isinstance(module, MergedColumnParallelLinear):
            parts[name] = len(module.output_sizes)
        elif isinstance(module, RoutedExperts) and local.startswith(("w13_", "w2_")):
            parts[name] = module.local_num_experts * (2 if local.startswith("w13_") else 1)
    return parts
