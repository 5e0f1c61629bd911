"""Do the scales that vLLM mixes up on two ranks explain what two GPUs chose?

    python benchmarks/mixed_scales.py --gpus benchmarks/results/two_ranks_h200_unpatched.json \
        --out benchmarks/results/mixed_scales_cpu.json

GPUS is what `two_gpus.py tiny` measured without the plugin's `cuda/expert_scales.py`. The CPU reads
the same texts on one rank, once with the bundled base and once with one whose w1 and w3 have their
scales in the places where that defect puts them.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from engines import EngineOptions, exit_on_sigterm, in_child, start
from gpu_serve_check import MODEL
from record import write_result
from safetensors.torch import load_file, save_file
from texts import Text, bundled_prompts, forced, tokens_of

GROUP = 128
NOTE = (
    "The tiny model on a CPU, one rank, teacher-forced along the text of one GPU. differ: tokens "
    "unlike those that one GPU and two GPUs choose along it; as_two: of the tokens where two GPUs "
    "differ from one, those chosen here as by two."
)


def mix_up(base: Path, out: Path) -> None:
    """Copy `base`, the scales of w1 and w3 moved as if each had one group."""
    from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_permute_scales

    shutil.copytree(base, out)
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        for name, scales in tensors.items():
            if ".experts." in name and name.endswith((".w1.weight_scale", ".w3.weight_scale")):
                columns = torch.arange(len(scales))[None]
                read, given = (
                    marlin_permute_scales(columns, k, len(scales), GROUP)[0]
                    for k in (2 * GROUP, GROUP)
                )
                tensors[name] = torch.empty_like(scales).index_copy_(0, read, scales[given])
        save_file(tensors, file, metadata={"format": "pt"})


def read(send: Callable[[Any], None], base: Path, texts: list[Text]) -> None:
    """Send the best tokens along `texts`; runs in a process of its own."""
    llm = start(EngineOptions(base))
    send(tokens_of(forced(llm, bundled_prompts(MODEL, 8, 700), texts)))


def compare(best: list[list[int]], one: list[list[int]], two: list[list[int]]) -> dict[str, int]:
    rows = list(zip(*(chain.from_iterable(tokens) for tokens in (best, one, two)), strict=True))
    return {
        "positions": len(rows),
        "differ_from_one": sum(mine != a for mine, a, _ in rows),
        "differ_from_two": sum(mine != b for mine, _, b in rows),
        "two_differ_from_one": sum(a != b for _, a, b in rows),
        "as_two": sum(mine == b != a for mine, a, b in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    exit_on_sigterm()
    entries = json.loads(options.gpus.read_text())["measurements"]
    one, two = (
        next(e for e in entries if e["part"] == "tiny" and (e["ranks"], e["k"]) == (ranks, 0))
        for ranks in (1, 2)
    )
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        mixed = Path(scratch) / "base"
        mix_up(MODEL / "base", mixed)
        for name, base in (("bundled", MODEL / "base"), ("mixed_up", mixed)):
            log = Path(scratch) / f"{name}.log"
            best = list(in_child(read, base, one["texts"], log=log))[-1]
            results[name] = compare(best, tokens_of(one["read"]), tokens_of(two["read"]))
    write_result(options.out, "mixed_scales", results, note=NOTE)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
