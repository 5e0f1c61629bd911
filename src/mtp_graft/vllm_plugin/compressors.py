"""Gap: compressors and the indexer's `weights_proj` are built without quantization.

A base may store them in FP8 all the same, as pasta-paul's does. Stock vLLM then stops with a
KeyError at the first of their scales. They are decoded to BF16 while the checkpoint is read,
which is what other bases store. Read in vLLM 0.33.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from mtp_graft.dsv4.names import NEVER_QUANTIZED
from mtp_graft.errors import GraftError
from mtp_graft.quant import FP8_BLOCK, decode_fp8

Weights = Iterable[tuple[str, Tensor]]


def decode_compressors(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Yield `weights`, each FP8 compressor weight decoded and without its scale.

    A weight [O, I] (E4M3) is held back until its scale [ceil(O/128), ceil(I/128)] has come, and
    the reverse; all else passes through as it is. Raises GraftError for a half without the other
    and for a scale of another shape, which name the module.
    """
    pairs: dict[str, dict[str, Tensor]] = defaultdict(dict)  # that are not whole yet
    for name, tensor in weights:
        module, _, part = name.rpartition(".")
        is_codes = part == "weight" and tensor.dtype == torch.float8_e4m3fn
        if not NEVER_QUANTIZED.search(name) or not (is_codes or part == "weight_scale"):
            yield name, tensor
            continue
        pairs[module][part] = tensor
        if len(pairs[module]) == 2:
            yield f"{module}.weight", _decode(module, **pairs.pop(module))
    for module, (part,) in pairs.items():
        expected = "expected weight and weight_scale, or a BF16 weight: fetch the base again"
        raise GraftError(f"{module}: an FP8 {part} comes alone; {expected}")


def _decode(module: str, weight: Tensor, weight_scale: Tensor) -> Tensor:
    expected = [-(-size // FP8_BLOCK) for size in weight.shape]
    if list(weight_scale.shape) != expected:
        raise GraftError(
            f"{module}: its scale is {list(weight_scale.shape)}, expected {expected}, one a block "
            f"of 128 x 128 of {list(weight.shape)}; only FP8 in such blocks is decoded"
        )
    return decode_fp8(weight, weight_scale).to(torch.bfloat16)
