"""Does a GPU quantize as a CPU does? The whole stage on both, from the same files.

    python benchmarks/quantize_devices.py --folder FOLDER --out result.json

FOLDER gets `synthetic_flash.py`'s input in two sizes, and the runs. For each size: the experts'
errors under the Hessians that each device computed, and how far apart their INT4 codes are. A code
that rounds the other way moves every later one of its row, so `rows_beyond_1_after_a_flip` counts
the rows with codes further than 1 apart in which an earlier code differs by exactly 1.

`gram` is how the Hessians' products are computed on the GPU, against float64: BF16 rows as such,
float32 rows as TF32 and as they are, at Flash's width.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import synthetic_flash
import torch
from record import write_result
from safetensors.torch import load_file
from torch import Tensor

from mtp_graft.quant import int4
from mtp_graft.stages.quantize import GPTQ, QuantizeConfig, quantize

MIDDLE = synthetic_flash.FLASH | {
    **{"hidden_size": 1024, "vocab_size": 4096, "num_attention_heads": 16, "q_lora_rank": 256},
    **{"o_groups": 4, "o_lora_rank": 256, "n_routed_experts": 64, "moe_intermediate_size": 512},
}
SIZES = {"tiny": (synthetic_flash.TINY, 8192), "middle": (MIDDLE, 32_768)}
SEQUENCE, GRAM_ROWS = 512, 16_384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--devices", nargs=2, default=["cpu", "cuda"])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for size in options.sizes:
        folder = options.folder / size
        shutil.rmtree(folder, ignore_errors=True)
        config, tokens = SIZES[size]
        synthetic_flash.generate(folder, config, tokens, SEQUENCE)
        results[size] = compare(folder, options.devices)
        print(size, results[size], flush=True)
    if "cuda" in options.devices:
        results["gram"] = gram_errors()
        print(results["gram"], flush=True)
    write_result(options.out, "quantize_devices", results)


def compare(folder: Path, devices: list[str]) -> dict[str, Any]:
    """Run the stage on both devices; return the errors, and how the codes differ."""
    inputs = (folder / "capture", folder / "upstream", folder / "base")
    runs = [folder / f"run-{number}-{device}" for number, device in enumerate(devices)]
    reports = [
        quantize(*inputs, run, QuantizeConfig(device=device), lambda *_: None)
        for run, device in zip(runs, devices, strict=True)
    ]
    errors = [report["variants"]["gptq"]["rel_error"] for report in reports]
    return {
        "devices": devices,
        "tokens": reports[0]["calibration_tokens"],
        "rel_error": errors,
        "rel_error_ratio": errors[1] / errors[0],
        **compare_codes(*runs),
    }


def compare_codes(one: Path, other: Path) -> dict[str, Any]:
    """Return the number of codes, the share of equal ones, and how many are how far apart."""
    apart: dict[int, int] = {}
    rows_beyond = after_flip = 0
    for file in sorted((one / GPTQ).glob("*.safetensors")):
        theirs = load_file(other / GPTQ / file.name)
        for name, words in load_file(file).items():
            if name.endswith(".weight_packed"):
                distance = (unpacked(words) - unpacked(theirs[name])).abs()  # [O, I]
                for value, count in zip(*distance.unique(return_counts=True), strict=True):
                    apart[int(value)] = apart.get(int(value), 0) + int(count)
                for row in distance[distance.amax(1) > 1]:
                    rows_beyond += 1
                    first = int((row > 1).nonzero()[0])
                    after_flip += bool((row[:first] == 1).any())
    total = sum(apart.values())
    return {
        "codes": total,
        "equal": apart[0] / total,
        "codes_apart": {str(value): apart[value] for value in sorted(apart) if value},
        "rows_beyond_1": rows_beyond,
        "rows_beyond_1_after_a_flip": after_flip,
    }


def unpacked(words: Tensor) -> Tensor:
    return int4.unpack(words).int()


def gram_errors() -> dict[str, float]:
    """Return the relative errors of x^T x [D, D] in each arithmetic, Flash's D, 16,384 rows."""
    generator = torch.Generator("cuda").manual_seed(0)
    activations = synthetic_flash.Activations(synthetic_flash.FLASH, generator)
    x = activations.residual(GRAM_ROWS)[:, 0]  # one stream: BF16 [T, D]
    exact = x.double().T @ x.double()
    matmul = torch.backends.cuda.matmul

    def error(gram: Tensor) -> float:
        return float((gram.double() - exact).norm() / exact.norm())

    def in_float32(precision: str) -> Tensor:
        matmul.fp32_precision = precision
        return x.float().T @ x.float()

    return {
        "bf16_inputs": error(torch.mm(x.T, x, out_dtype=torch.float32)),
        "tf32_inputs": error(in_float32("tf32")),
        "fp32": error(in_float32("ieee")),
    }


if __name__ == "__main__":
    main()
