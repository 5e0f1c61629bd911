"""Number formats read bit by bit from their definitions: slow oracles for several tests."""

import torch
from torch import Tensor


def e2m1(nibble: int) -> float:
    """Return the value of four bits: sign, two exponent bits (bias 1), one mantissa bit."""
    sign, exponent, mantissa = nibble >> 3, nibble >> 1 & 3, nibble & 1
    magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)
    return -magnitude if sign else magnitude


def e4m3(byte: int) -> float:
    """Return the value of eight bits: sign, four exponent bits (bias 7), three mantissa bits."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    if (exponent, mantissa) == (15, 7):
        return float("nan")  # the only one; there is no infinity
    if exponent == 0:
        magnitude = mantissa / 8 * 2.0**-6
    else:
        magnitude = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -magnitude if sign else magnitude


def e8m0(byte: int) -> float:
    """Return the value of eight exponent bits (bias 127)."""
    return float("nan") if byte == 255 else 2.0 ** (byte - 127)


def decode_fp8_blocks(codes: Tensor, scale: Tensor) -> Tensor:
    """Return float64 [O, I] of E4M3 codes and one scale per 128 x 128 block."""
    scales, rows = scale.double().tolist(), enumerate(codes.view(torch.uint8).tolist())
    w = [[e4m3(b) * scales[r // 128][c // 128] for c, b in enumerate(row)] for r, row in rows]
    return torch.tensor(w, dtype=torch.float64)


def decode_mxfp4(codes: Tensor, scale: Tensor) -> Tensor:
    """Return float64 [O, I] of E2M1 codes, two a byte, and E8M0 scales, one per 32 inputs."""
    rows = []
    bytes_, exponents = codes.view(torch.uint8).tolist(), scale.view(torch.uint8).tolist()
    for row, row_exponents in zip(bytes_, exponents, strict=True):
        nibbles = [nibble for byte in row for nibble in (byte & 15, byte >> 4)]
        rows.append([e2m1(n) * e8m0(row_exponents[c // 32]) for c, n in enumerate(nibbles)])
    return torch.tensor(rows, dtype=torch.float64)


def unpack_int4(words: Tensor) -> Tensor:
    """Return int8 codes [O, I] of int32 words [O, I/8], eight codes a word, each plus 8."""
    rows = []
    for row in words.tolist():
        row_bits = [word % 2**32 for word in row]
        rows.append([(word >> 4 * k & 15) - 8 for word in row_bits for k in range(8)])
    return torch.tensor(rows, dtype=torch.int8)


def decode_int4(words: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """Return float64 [O, I] of packed INT4 codes and one scale per `group_size` inputs."""
    codes, scales = unpack_int4(words).tolist(), scale.double().tolist()
    w = [[q * scales[r][c // group_size] for c, q in enumerate(row)] for r, row in enumerate(codes)]
    return torch.tensor(w, dtype=torch.float64)


def clamped_experts(
    x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, limit: float
) -> Tensor:
    """Return float64 [T, D]: w2(silu(min(gate, limit)) * clamp(up, -limit, limit)), weighted."""
    rows = []
    size = w2.shape[-1]
    for token, weights, experts in zip(x.double(), topk_weights, topk_ids, strict=True):
        row = torch.zeros_like(token)
        for weight, expert in zip(weights.tolist(), experts.tolist(), strict=True):
            gate = w13[expert, :size].double() @ token
            up = w13[expert, size:].double() @ token
            gate = torch.where(gate > limit, limit, gate)
            up = torch.where(up > limit, limit, torch.where(up < -limit, -limit, up))
            row += weight * (w2[expert].double() @ (gate / (1 + torch.exp(-gate)) * up))
        rows.append(row)
    return torch.stack(rows)
