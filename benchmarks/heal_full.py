"""Time a step of healing at Flash's size, and its memory: random weights, 256 experts.

    python benchmarks/heal_full.py --input FOLDER --out result.json [--batch-tokens 4096 8192]

FOLDER is made here unless it is there: `synthetic_flash.py`'s, with what leads to logits. Experts
are upstream's, exact, in BF16 on the GPU. A step drafts three tokens after every one. `hours` are
those of three epochs of a million tokens.
"""

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import synthetic_flash
import torch
from record import add_measurements, arguments
from torch import Tensor

from mtp_graft.checkpoint.capture import read_sequences
from mtp_graft.checkpoint.shards import load_tensors
from mtp_graft.dsv4.heal import OUTPUT, BaseOutput, distance, trained_parts
from mtp_graft.dsv4.replay import build_head, model_config
from mtp_graft.dsv4.variants import decode_head, store_head
from mtp_graft.recipe import HealSection
from mtp_graft.stages import heal as stage
from mtp_graft.stages.inputs import CALIBRATION, open_inputs

SETTINGS = HealSection()
STEPS = 8  # the first two are not counted
NOTE = "One step: reading the capture, forward, backward, AdamW; loss tv + 0.1 kl, k = 3."


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--batch-tokens", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    config = synthetic_flash.TINY if options.tiny else synthetic_flash.FLASH
    if not options.input.exists():
        sequence = 64 if options.tiny else 512
        synthetic_flash.generate(options.input, config, 3 * max(options.batch_tokens), sequence)
    folder, device = options.input, "cuda" if torch.cuda.is_available() else "cpu"
    models = folder / "upstream", folder / "base"
    inputs = open_inputs(folder / "capture", *models, CALIBRATION, "embed.weight")
    began = time.perf_counter()
    master = inputs.read_upstream([*inputs.head.files])
    stored = store_head(master, "mxfp4")
    head = build_head(model_config(config), decode_head(stored), device=device)
    if device != "cpu":
        head.layer.mlp.experts.bfloat16()
    start_s = time.perf_counter() - began
    read = load_tensors(inputs.base, ["embed.weight", *OUTPUT])
    given = {name: tensor.to(device) for name, tensor in read.items()}
    fp8 = {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn}
    parts = trained_parts(head, fp8)
    base = BaseOutput(inputs.model, given)
    optimizer = torch.optim.AdamW(parts.values(), SETTINGS.lr)
    for tokens in options.batch_tokens:
        for recompute in (True, False):
            entry: dict[str, Any] = {"batch_tokens": tokens, "recompute": recompute}
            entry |= {"start_s": start_s, "trained": sum(p.numel() for p in parts.values())}
            try:
                entry |= steps(head, base, inputs, given["embed.weight"], optimizer, entry)
            except torch.OutOfMemoryError as error:
                entry["failed"] = str(error).partition(".")[0]
                optimizer.zero_grad()
            print(json.dumps(entry), flush=True)
            add_measurements(options.out, "heal_full", [entry], lambda f: {"results": f}, NOTE)


def steps(
    head: Any, base: Any, inputs: Any, embed: Tensor, optimizer: Any, how: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the median step's seconds, and the most memory."""
    device, seconds, on_gpu = embed.device, [], embed.is_cuda
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    weights = [SETTINGS.decay**draft for draft in range(SETTINGS.k)]
    batches = stage._batches(read_sequences(inputs.capture), how["batch_tokens"])
    for _, chosen in zip(range(STEPS), batches, strict=False):
        began = time.perf_counter()
        batch = stage._read_batch(inputs, chosen, embed)
        optimizer.zero_grad()
        with torch.nn.utils.parametrize.cached(), stage._precision(device):
            recompute = how["recompute"]
            loss = distance(head, base, batch, SETTINGS.loss, weights, recompute=recompute)
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        loss.item()
        seconds.append(time.perf_counter() - began)
    tokens, step_s = sum(s.tokens for s in chosen), median(seconds[2:])
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    hours = 3e6 / tokens * step_s / 3600
    return {"tokens": tokens, "step_s": step_s, "peak_gpu_bytes": peak, "hours": hours}


if __name__ == "__main__":
    main()
