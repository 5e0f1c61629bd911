"""What each option of GPTQ brings on the tiny model: errors on tokens it saw and on others.

    python benchmarks/gptq_options.py --capture RUN/capture --out result.json

Every option quantizes all experts on the calibration split's Hessians. Its error is measured on
those, and on the Hessians of the evaluation split, which no option has seen: the mean over experts
and matrices of ||(W - Q) H^1/2|| / ||W H^1/2||.
"""

from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from record import MODEL, arguments, write_result
from torch import Tensor

from mtp_graft.dsv4.experts import MATRICES, expert_hessians, quantize_experts
from mtp_graft.dsv4.variants import decode_head
from mtp_graft.quant import int4
from mtp_graft.quant.gptq import relative_error
from mtp_graft.recipe import QuantizeSection
from mtp_graft.stages.inputs import open_inputs
from mtp_graft.stages.parallel import Clock
from mtp_graft.stages.quantize import replay_capture

Matrices = dict[str, Tensor]
OPTIONS = {"default": QuantizeSection()}
for scale in ("absmax", "mse"):
    for damp in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0):
        rules = QuantizeSection(damp=damp, damping="fixed", scale=scale)
        OPTIONS[f"{scale}, damp {damp}"] = rules
    OPTIONS[f"{scale}, damp by tokens"] = QuantizeSection(scale=scale)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--capture", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    weights, seen, counts = calibrate(options.capture, "calibration")
    _, unseen, held_out = calibrate(options.capture, "evaluation")

    def errors(option: str, values: Matrices) -> dict[str, Any]:
        entry: dict[str, Any] = {"option": option}
        for split, hessians in (("calibration", seen), ("held_out", unseen)):
            of = {m: relative_error(weights[m], values[m], hessians[m]).tolist() for m in MATRICES}
            mean = fmean(error for each in of.values() for error in each)
            entry[split] = {"mean": mean, **{m: fmean(each) for m, each in of.items()}}
        return entry

    scales = {m: int4.group_scale(w, 128) for m, w in weights.items()}
    codes = {m: int4.encode(w, scales[m]) for m, w in weights.items()}
    results = [errors("rtn", {m: int4.decode(codes[m], scales[m]) for m in weights})]
    names = [*map(str, range(len(counts)))]
    for option, rules in OPTIONS.items():
        quantized = quantize_experts(weights, seen, counts, names, rules)
        values = {m: int4.decode(q.codes, q.scale) for m, q in quantized.items()}
        results.append(errors(option, values))
    tokens = {"calibration": sum(counts) // 6, "held_out": sum(held_out) // 6}
    write_result(options.out, "gptq_options", results, tokens=tokens)


def calibrate(capture: Path, split: str) -> tuple[Matrices, Matrices, list[int]]:
    """Return the original weights, the Hessians of a split, and each expert's tokens."""
    inputs = open_inputs(capture, MODEL / "upstream", MODEL / "base", split, "embed.weight")
    routed = replay_capture(inputs, Clock("cpu"), lambda *_: None)
    experts = range(inputs.model.n_routed_experts)
    decoded = decode_head(inputs.read_upstream([*inputs.head.files]))
    weights = {
        m: torch.stack([decoded[f"mtp.0.ffn.experts.{e}.{m}.weight"] for e in experts])
        for m in MATRICES
    }
    parts = [routed.of_expert(e) for e in experts]
    return weights, expert_hessians(parts, weights, inputs.model.swiglu_limit), routed.counts


if __name__ == "__main__":
    main()
