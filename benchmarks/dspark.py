"""What a DSpark drafter accepts: the tiny one, exact and quantized by GPTQ, offline.

    python benchmarks/dspark.py --run RUN --drafter FOLDER --out result.json

RUN has a capture of `heal.py`'s prompts with the taps of the drafter's layers: some of its texts
calibrate the experts, and it is scored on `held` ones, which no choice was made by. RUN/dspark gets
a checkpoint of each variant. Served, `heal.py --served` measures them.
"""

import time
from pathlib import Path
from typing import Any

from heal import JUDGED, part_of, progress
from record import MODEL, add_measurements, arguments, measurements

from mtp_graft.recipe import QuantizeSection, ScoreSection, Variant
from mtp_graft.stages.quantize import quantize
from mtp_graft.stages.score import score
from mtp_graft.stages.splice import splice
from mtp_graft.stages.verify import require_sound, verify

SCORED: tuple[Variant, ...] = ("mxfp4", "gptq")


def measure(run: Path, drafter: Path) -> list[dict[str, Any]]:
    """Quantize, splice, verify and score; return an entry a variant."""
    base, out, heads = MODEL / "base", run / "dspark", QuantizeSection(variants=SCORED)
    calibration = part_of(run / "capture", out / "calibration", "gsm8k", "choose", 300_000)
    began = time.perf_counter()
    done = quantize(calibration, drafter, base, out / "quantize", heads, progress("quantize"))
    seconds = time.perf_counter() - began
    for variant in SCORED:  # servers need not wait for the scores
        given = out / "quantize" if variant == "gptq" else None
        splice(base, drafter, out / variant, variant, quantized=given)
        require_sound(out / variant, verify(out / variant, base, drafter, given))
    scored = {
        kind: score(
            *(part_of(run / "capture", out / f"capture-{kind}", "-", kind), out / "quantize"),
            *(drafter, base, out / f"score-{kind}", heads, ScoreSection(k=5), progress(kind)),
        )["acceptance"]
        for kind in JUDGED
    }
    found = []
    for variant in SCORED:
        by_kind = {kind: each[variant]["by_k"] for kind, each in scored.items()}
        error = done["variants"][variant]["rel_error"]
        found.append({"name": f"dspark {variant}", "rel_error": error, "scored": by_kind})
    return [each | {"quantize_s": seconds} for each in found]


def summarize(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return variant -> accepted length at k = 1 to 5 by kind of text."""
    lengths = {
        each["name"]: {
            kind: {k: of_k["acceptance_length"] for k, of_k in by_k.items()}
            for kind, by_k in each["scored"].items()
        }
        for each in found
    }
    return {"results": lengths}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--drafter", type=Path, required=True)
    options = parser.parse_args()
    if not measurements(options.out):
        found = measure(options.run, options.drafter)
        add_measurements(options.out, "dspark", found, summarize, "offline, greedy")


if __name__ == "__main__":
    main()
