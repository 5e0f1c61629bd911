"""GPTQ of all 768 expert matrices of Flash's size, ours and llm-compressor's, in one run on a GPU.

    PYTHONPATH=SITE python benchmarks/gptq_core.py --out result.json [--rounds 3]

SITE holds llmcompressor 0.14.0.1 with compressed-tensors 0.19 (an environment of its own: vLLM
wants another). Both are given the same weights and Hessians in memory, the same group size and
damp, in batches of 16 matrices; timed is the quantization alone, after one batch to compile
kernels. llm-compressor overwrites its arguments: copies are made outside the timing. Errors are
||(W - Q) H^1/2|| / ||W H^1/2||, in float32, under the undamped Hessian. llm-compressor takes its
groups' scales from the weights as they are (absmax); ours by default searches those of the
corrected weights (mse), and `ours_absmax` is ours without the search.
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from record import arguments, write_result
from synthetic_flash import Activations
from torch import Tensor

from mtp_graft.dsv4.experts import expert_hessians
from mtp_graft.quant import int4
from mtp_graft.quant.gptq import Scale, gptq, relative_error

GROUP, DAMP, BATCH = 128, 0.01, 16
Matrices = dict[str, Tensor]  # of E experts: w1, w3 bf16 [E, M, D], w2 [E, D, M]; Hessians f32
Quantize = Callable[[Tensor, Tensor], Any]  # weights [B, O, I], Hessians [B, I, I]: values, or ours


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without-llmcompressor", action="store_true")
    options = parser.parse_args()
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    problem = random_problem(options.experts, options.hidden, options.inner, device)
    contestants = {"ours": ours("mse"), "ours_absmax": ours("absmax")}
    if not options.without_llmcompressor:
        contestants["llmcompressor"] = theirs()
    found: dict[str, dict[str, Any]] = {name: {"rounds": []} for name in contestants}
    for number in range(options.rounds + 1):  # the first one warms up
        for name, quantize in contestants.items():
            seconds, errors = run(*problem, quantize, stacked=name != "llmcompressor")
            if number == 0:
                found[name] |= {"rel_error": errors, "mean": statistics.fmean(errors.values())}
            else:
                found[name]["rounds"].append(seconds)
                found[name]["seconds"] = statistics.median(found[name]["rounds"])
        print(number, {name: each["rounds"] for name, each in found.items()}, flush=True)
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        of_all = {"matrices": 3 * options.experts, "peak_gpu_bytes": peak}
        write_result(options.out, "gptq_core", of_all | found)


def random_problem(experts: int, hidden: int, inner: int, device: str) -> tuple[Matrices, Matrices]:
    """Return weights, and Hessians of 1.5 D tokens for every expert."""
    generator = torch.Generator(device).manual_seed(0)
    activations = Activations({"hidden_size": hidden, "hc_mult": 1}, generator)
    shapes = {"w1": (inner, hidden), "w2": (hidden, inner), "w3": (inner, hidden)}
    weights = {
        m: torch.empty(experts, *s, dtype=torch.bfloat16, device=device) for m, s in shapes.items()
    }
    shared = torch.empty(experts, hidden, hidden, device=device)
    down = torch.empty(experts, inner, inner, device=device)
    for e in range(experts):
        for matrix, (outputs, inputs) in shapes.items():
            values = torch.randn(outputs, inputs, generator=generator, device=device)
            weights[matrix][e] = values * (1.2 / math.sqrt(inputs))
        one = {m: w[e : e + 1].float() for m, w in weights.items()}
        seen = activations.residual(3 * hidden // 2)[:, 0].float()  # [T, D]
        found = expert_hessians([[(seen, torch.ones(len(seen)))]], one, limit=10.0)
        shared[e], down[e] = found["w1"][0], found["w2"][0]
    return weights, {"w1": shared, "w2": down, "w3": shared}


def ours(scale: Scale) -> Quantize:
    return lambda weight, hessian: gptq(weight, hessian, DAMP, GROUP, scale=scale)


def theirs() -> Quantize:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    how = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=GROUP)

    def quantize(weight: Tensor, hessian: Tensor) -> Tensor:
        groups = weight.unflatten(-1, (-1, GROUP))  # [B, O, G, N]
        scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), how)
        values, _, fallback = quantize_weight(
            weight, hessian, scale, zero_point, None, how, percdamp=DAMP
        )
        assert not fallback.any()
        return values

    return quantize


def run(
    weights: Matrices, hessians: Matrices, quantize: Quantize, *, stacked: bool
) -> tuple[float, dict[str, float]]:
    """Return the seconds of quantizing everything, and the mean error of each matrix shape.

    `stacked`: w1 and w3, which have the same inputs, go as one matrix.
    """
    seconds, errors = 0.0, dict[str, list[float]]()
    synchronize = torch.cuda.synchronize if weights["w1"].is_cuda else lambda: None
    for together in (("w1", "w3"), ("w2",)) if stacked else (("w1",), ("w3",), ("w2",)):
        for first in range(0, len(hessians["w1"]), BATCH):
            experts = slice(first, first + BATCH)
            weight = torch.cat([weights[m][experts] for m in together], dim=1)
            hessian = hessians[together[0]][experts]
            given = weight.clone(), hessian if stacked else hessian.clone()
            synchronize()
            started = time.perf_counter()
            found = quantize(*given)
            synchronize()
            seconds += time.perf_counter() - started
            values = found if torch.is_tensor(found) else int4.decode(found.codes, found.scale)
            chunks = [each.chunk(len(together), 1) for each in (weight, values)]
            for matrix, part, value in zip(together, *chunks, strict=True):
                errors.setdefault(matrix, []).extend(relative_error(part, value, hessian).tolist())
    return seconds, {matrix: statistics.fmean(each) for matrix, each in errors.items()}


if __name__ == "__main__":
    main()
