"""Does the rounding that a GPU adds explain where it and a CPU choose other tokens?

    python benchmarks/gpu_rounding.py --cpu benchmarks/results/serve_check_cpu.json \
        --gpu benchmarks/results/serve_check_h200.json \
        --out benchmarks/results/gpu_rounding_cpu.json

CPU and GPU are results of `gpu_serve_check.py`, the GPU's with the CPU's as its reference. A CPU
reads the same text, and records the same prompts, four times: as it is; with the inputs of FP8
weights rounded to FP8 too, as a GPU with VLLM_USE_DEEP_GEMM_E8M0=0 has it; with FP8 weights whose
scales are powers of two, as vLLM's DeepGEMM kernels want them without that; and with those weights
and inputs rounded with powers of two. Each is compared with what the GPU chose and recorded.
"""

import argparse
import json
import os
import shutil
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from engines import EngineOptions, Send, exit_on_sigterm, in_child, start
from gpu_serve_check import CHUNK, LONG, MODEL, compare_recordings, record
from record import write_result
from safetensors.torch import load_file, save_file
from texts import Text, bundled_prompts, compare_forced, forced, tokens_of

from mtp_graft.checkpoint.capture import RECORD_VARIABLE, RECORDINGS
from mtp_graft.quant import fp8_block

SCALE = ".weight_scale"
Inputs = Literal["plain", "power_of_two"] | None  # the scales of rounded inputs
NOTE = (
    "The tiny model on a CPU, teacher-forced along the text that it once wrote, as the GPU was. "
    "unlike_text: tokens other than the text's; as_gpu: of the tokens in which the GPU leaves "
    "the text, those chosen here as by the GPU; gpu: the GPU's tokens against those chosen here, "
    "margins this CPU's; residual: relative difference from what the GPU recorded (estimated from "
    "16 projections of a row)."
)


def requantize(base: Path, out: Path) -> None:
    """Copy `base`, its FP8 weights rounded again with scales that are powers of two."""
    shutil.copytree(base, out)
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [n for n in tensors if n.endswith(SCALE) and ".experts." not in n]:
            weight = name.removesuffix(SCALE) + ".weight"
            decoded = fp8_block.decode(tensors[weight], tensors[name])
            scale = fp8_block.power_of_two_scale(decoded)
            tensors[weight] = fp8_block.encode(decoded, scale)
            tensors[name] = scale.float().to(tensors[name].dtype)  # exact
        save_file(tensors, file, metadata={"format": "pt"})


def observe(
    send: Send,
    base: Path,
    texts: list[Text],
    prompts: list[list[int]],
    folder: Path,
    inputs: Inputs,
) -> None:
    """Send the best tokens along `texts` and what was recorded; runs in a process of its own."""
    (folder / RECORDINGS).mkdir(parents=True)
    os.environ[RECORD_VARIABLE] = str(folder)
    llm = start(EngineOptions(base, max_num_batched_tokens=CHUNK))
    if inputs is not None:
        llm.collective_rpc("round_inputs_of_fp8", args=(inputs == "power_of_two",))
    read = forced(llm, prompts, texts)
    send({"read": read, "recording": record(llm, [p for p in prompts if len(p) <= CHUNK], folder)})


def compare(found: dict[str, Any], texts: list[Text], gpu: dict[str, Any]) -> dict[str, Any]:
    """Return how near the GPU these choices are; `gpu` has its measurements by part."""
    mine, written, theirs = tokens_of(found["read"]), tokens_of(texts), gpu["forced"]["best"]
    columns = (list(chain.from_iterable(lists)) for lists in (mine, written, theirs))
    tokens = list(zip(*columns, strict=True))
    apart = compare_recordings(gpu["recording"]["prompts"], found["recording"])
    return {
        "unlike_text": sum(m != w for m, w, _ in tokens),
        "gpu_unlike_text": sum(t != w for _, w, t in tokens),
        "as_gpu": sum(m == t != w for m, w, t in tokens),
        "gpu": compare_forced(found["read"], theirs),
        "residual": apart["rel_error"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", type=Path, required=True)
    parser.add_argument("--gpu", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    exit_on_sigterm()
    cpu, gpu = (
        {e["part"]: e for e in json.loads(file.read_text())["measurements"]}
        for file in (options.cpu, options.gpu)
    )
    texts = cpu["texts-k0"]["texts"]
    prompts = bundled_prompts(MODEL, len(texts) - 1, LONG)
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        again = Path(scratch) / "base"
        requantize(MODEL / "base", again)
        runs: dict[str, tuple[Path, Inputs]] = {
            "as_it_is": (MODEL / "base", None),
            "inputs": (MODEL / "base", "plain"),
            "weights": (again, None),
            "weights_and_inputs": (again, "power_of_two"),
        }
        for name, (base, inputs) in runs.items():
            folder, log = Path(scratch) / name, Path(scratch) / f"{name}.log"
            found = list(in_child(observe, base, texts, prompts, folder, inputs, log=log))[-1]
            results[name] = compare(found, texts, gpu)
            print(name, json.dumps(results[name]), flush=True)
    write_result(options.out, "gpu_rounding", results, note=NOTE)


if __name__ == "__main__":
    main()
