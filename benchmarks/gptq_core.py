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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from record import arguments, write_result
from synthetic_flash import Activations
from torch import Tensor

from mtp_graft.dsv4.experts import expert_hessians
from mtp_graft.quant import int4
from mtp_graft.quant.gptq import Scale, gptq, relative_error

GROUP, DAMP, BATCH = 128, 0.01, 16


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--without-llmcompressor", action="store_true")
    options = parser.parse_args()
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    problem = Problem.random(options.experts, options.hidden, options.inner, options.device)
    results: dict[str, Any] = {"matrices": 3 * options.experts, "group_size": GROUP, "damp": DAMP}
    rounds: dict[str, list[float]] = {}
    for number in range(options.rounds + 1):  # the first one warms up
        for name, quantize in contestants(options.without_llmcompressor).items():
            seconds, errors = run(problem, quantize, with_errors=number == 0)
            if number == 0:
                results[name] = {"rel_error": errors}
            else:
                rounds.setdefault(name, []).append(seconds)
                results[name]["seconds"] = statistics.median(rounds[name])
                results[name]["rounds"] = rounds[name]
        print(number, {n: r[-1] for n, r in rounds.items()}, flush=True)
        write_result(options.out, "gptq_core", summary(results))
    results["peak_gpu_bytes"] = torch.cuda.max_memory_allocated() if options.device != "cpu" else 0
    write_result(options.out, "gptq_core", summary(results))


@dataclass(frozen=True)
class Problem:
    """Weights bf16 of E experts: w1, w3 [E, M, D], w2 [E, D, M], and Hessians f32."""

    weights: dict[str, Tensor]
    hessians: dict[str, Tensor]

    @classmethod
    def random(cls, experts: int, hidden: int, inner: int, device: str) -> "Problem":
        """Make inputs of 1.5 D tokens for every expert."""
        generator = torch.Generator(device).manual_seed(0)
        activations = Activations({"hidden_size": hidden, "hc_mult": 1}, generator)
        shapes = {"w1": (inner, hidden), "w2": (hidden, inner), "w3": (inner, hidden)}
        weights = {
            m: torch.empty(experts, *s, dtype=torch.bfloat16, device=device)
            for m, s in shapes.items()
        }
        shared = torch.empty(experts, hidden, hidden, device=device)
        down = torch.empty(experts, inner, inner, device=device)
        for e in range(experts):
            for matrix, (outputs, inputs) in shapes.items():
                values = torch.randn(outputs, inputs, generator=generator, device=device)
                weights[matrix][e] = values * (1.2 / math.sqrt(inputs))
            one = {m: w[e : e + 1].float() for m, w in weights.items()}
            inputs_seen = activations.residual(3 * hidden // 2)[:, 0].float()  # [T, D]
            reached = inputs_seen, torch.ones(len(inputs_seen))
            found = expert_hessians([[reached]], one, limit=10.0)
            shared[e], down[e] = found["w1"][0], found["w2"][0]
        return cls(weights, {"w1": shared, "w2": down, "w3": shared})


Quantize = Callable[[Tensor, Tensor], Tensor]  # weights [B, O, I], Hessians [B, I, I]: values


def contestants(without_llmcompressor: bool) -> dict[str, tuple[Quantize, bool]]:
    """Return name -> how to quantize a batch, and whether w1 and w3 go as one matrix."""
    found: dict[str, tuple[Quantize, bool]] = {"ours": (ours("mse"), True)}
    if not without_llmcompressor:
        found["llmcompressor"] = (theirs(), False)
    found["ours_absmax"] = (ours("absmax"), True)
    return found


def ours(scale: Scale) -> Quantize:
    def quantize(weight: Tensor, hessian: Tensor) -> Any:
        return gptq(weight, hessian, DAMP, GROUP, scale=scale)

    return quantize


def theirs() -> Quantize:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    arguments = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=GROUP)

    def quantize(weight: Tensor, hessian: Tensor) -> Tensor:
        groups = weight.unflatten(-1, (-1, GROUP))  # [B, O, G, N]
        scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
        values, _, fallback = quantize_weight(
            weight, hessian, scale, zero_point, None, arguments, percdamp=DAMP
        )
        assert not fallback.any()
        return values

    return quantize


def batches(problem: Problem, stacked: bool) -> Iterator[tuple[tuple[str, ...], slice]]:
    """Yield which matrices go together, and which experts."""
    num_experts = len(problem.hessians["w1"])
    for matrices in (("w1", "w3"), ("w2",)) if stacked else (("w1",), ("w3",), ("w2",)):
        for first in range(0, num_experts, BATCH):
            yield matrices, slice(first, first + BATCH)


def run(
    problem: Problem, contestant: tuple[Quantize, bool], with_errors: bool
) -> tuple[float, dict[str, float]]:
    """Return the seconds of quantizing everything, and the mean error of each matrix shape."""
    quantize, stacked = contestant
    seconds, errors = 0.0, {m: [] for m in problem.weights}  # type: ignore[var-annotated]
    for matrices, experts in batches(problem, stacked):
        weight = torch.cat([problem.weights[m][experts] for m in matrices], dim=1)
        hessian = problem.hessians[matrices[0]][experts]
        given = hessian if stacked else hessian.clone()
        synchronize(weight)
        started = time.perf_counter()
        quantized = quantize(weight.clone(), given)
        synchronize(weight)
        seconds += time.perf_counter() - started
        if with_errors:
            values = quantized if torch.is_tensor(quantized) else decoded(quantized)
            parts = zip(matrices, weight.chunk(len(matrices), 1), strict=True)
            for (matrix, part), value in zip(parts, values.chunk(len(matrices), 1), strict=True):
                errors[matrix] += relative_error(part, value, hessian).tolist()
    return seconds, {m: statistics.fmean(e) for m, e in errors.items() if e}


def decoded(quantized: Any) -> Tensor:
    return int4.decode(quantized.codes, quantized.scale)


def synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """Return the results with what other tools look for: our defaults."""
    ours_, theirs_ = results.get("ours", {}), results.get("llmcompressor", {})
    mean = {
        name: statistics.fmean(found["rel_error"].values())
        for name, found in (("ours", ours_), ("llmcompressor", theirs_))
        if found
    }
    return {
        "matrices": results["matrices"],
        "ours_s": ours_.get("seconds"),
        "llmcompressor_s": theirs_.get("seconds"),
        "rel_error": mean,
        **results,
    }


if __name__ == "__main__":
    main()
