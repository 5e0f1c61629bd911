"""Gap: compressors and the indexer's `weights_proj` are built without quantization.

A base may store them in FP8 all the same, as pasta-paul's does. Stock vLLM then stops with a
KeyError at the first of their scales. They are decoded to BF16 while the checkpoint is read,
which is what other bases store. Read in vLLM 0.33.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from mtp_graft.dsv4.names import NEVER_QUANTIZED
from mtp_graft.errors import GraftError
from mtp_graft.quant import fp8_block

Weights = Iterable[tuple[str, Tensor]]
_SCALE = ".weight_scale"


def decode_compressors(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Yield `weights`, each FP8 compressor weight decoded and without its scale.

    A weight [O, I] (E4M3) is held back until its scale [ceil(O/128), ceil(I/128)] has come, and
    the reverse; all else passes through as it is. Raises GraftError for a half without the other
    and for a scale of another shape, which name the tensor.
    """
    halves: dict[str, Tensor] = {}  # of pairs that are not whole yet
    for name, tensor in weights:
        if not _is_half(name, tensor):
            yield name, tensor
            continue
        weight = name.removesuffix(_SCALE).removesuffix(".weight") + ".weight"
        scale = weight.removesuffix(".weight") + _SCALE
        halves[name] = tensor
        if weight in halves and scale in halves:
            yield weight, _decode(weight, halves.pop(weight), halves.pop(scale))
    for name in halves:
        other = "FP8 weight" if name.endswith(_SCALE) else f"{_SCALE} beside it"
        raise GraftError(
            f"{name}: there is no {other}; expected both or a BF16 weight alone: fetch the base "
            "again"
        )


def _is_half(name: str, tensor: Tensor) -> bool:
    if not NEVER_QUANTIZED.search(name):
        return False
    is_codes = name.endswith(".weight") and tensor.dtype == torch.float8_e4m3fn
    return is_codes or name.endswith(_SCALE)


def _decode(name: str, codes: Tensor, scale: Tensor) -> Tensor:
    expected = tuple(-(-size // fp8_block.BLOCK) for size in codes.shape)
    if tuple(scale.shape) != expected:
        raise GraftError(
            f"{name}: its scale is {list(scale.shape)}, expected {list(expected)}, one a block of "
            f"128 x 128 of {list(codes.shape)}; only FP8 in such blocks is decoded"
        )
    return fp8_block.decode(codes, scale).to(torch.bfloat16)
