"""Is the DSpark drafter that vLLM serves the one of `dsv4.dspark`? Module by module, on one GPU.

    mtp-graft graft models/tiny-dsv4/base models/tiny-dsv4/dspark CHECKPOINT
    python benchmarks/dspark_layers.py CHECKPOINT --out result.json

What vLLM's modules give is kept in a .pt file beside the result; if it is there, no GPU is needed.
Each module of ours, in float32, is given what vLLM's module before it gave. Of ||ours - vLLM's|| /
||vLLM's|| the result has that of all rows together, the rows' 90th percentile and the worst row's.
vLLM computes in BF16, what leads to contexts and attention in E4M3; its experts near a tie differ.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from engines import EngineOptions, started
from record import MODEL, arguments, write_result
from texts import bundled_prompts, greedy
from torch import Tensor

from mtp_graft.checkpoint.shards import load_tensors
from mtp_graft.dsv4.dspark import block_tokens
from mtp_graft.dsv4.replay import build_dspark, model_config
from mtp_graft.dsv4.variants import decode_head

K, STAGES = 5, 2
#: What is compared -> module of vLLM's drafter, module of ours.
MODULES = {"context": ("model.main_norm", "main_norm"), "hidden": ("model", "")}
for s in range(STAGES):
    vllm, ours = f"model.layers.{s}", f"stages.{s}"
    MODULES[f"{s} context"] = f"{vllm}.attn.kv_norm", f"{ours}.self_attn.kv_norm"
    MODULES[f"{s} attention"] = f"{vllm}.attn", f"{ours}.self_attn.o_b_proj"
    MODULES[f"{s} experts"] = f"{vllm}.ffn", f"{ours}.mlp"
    MODULES[f"{s} streams"] = vllm, ours


class Watching:
    """Methods of vLLM's worker, which `collective_rpc` calls."""

    def watch(self) -> None:
        """Keep what the drafter's modules give in each step from now on."""
        from vllm.model_executor.kernels.mhc.tilelang import mhc_post_tilelang

        speculator = self.model_runner.speculator
        drafter, stock = speculator.model, speculator.propose
        self.steps, seen = list[dict[str, Tensor]](), dict[str, Tensor]()

        def keep(name: str, _module: Any, given: Any, out: Any) -> None:
            if type(out) is tuple:  # a layer leaves it to the next to mix its streams
                out = mhc_post_tilelang(*out)
            seen[name] = (given[0] if name == "taps" else out).clone()

        def propose(batch: Any, *args: Any, **more: Any) -> Tensor:
            drafts = stock(batch, *args, **more)
            step = seen | {"drafts": drafts[0], "tokens": speculator.input_buffers.input_ids}
            step["at"] = speculator.context_positions
            context = batch.num_tokens - int(args[5][0])  # less the drafts that were rejected
            for name, rows in step.items():  # without padding
                count = context if name.endswith(("context", "taps", "at")) else K
                step[name] = rows[:count].to("cpu", copy=True)
            self.steps.append(step)
            return drafts

        for name, (module, _) in (MODULES | {"taps": ("model.main_proj", "")}).items():
            drafter.get_submodule(module).register_forward_hook(partial(keep, name))
        speculator.propose = propose

    def save(self, path: str) -> None:
        torch.save({"steps": self.steps}, path)


@torch.inference_mode()
def compare(steps: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Return the errors, and the share of equal drafts."""
    theirs = {name: torch.cat([step[name] for step in steps]) for name in steps[0]}
    config = model_config(json.loads((MODEL / "dspark" / "config.json").read_text()))
    drafter = build_dspark(config, decode_head(load_tensors(MODEL / "dspark")), STAGES)
    embed, lm_head = load_tensors(MODEL / "base", ["embed.weight", "head.weight"]).values()
    found: dict[str, Tensor] = {}

    def exchange(name: str, _module: Any, _given: Any, ours: Tensor) -> Tensor | None:
        first = found.setdefault(name, ours) is ours  # `kv_norm` does the blocks' keys, too
        return theirs[name].to(ours).view_as(ours) if first else None

    for name, (_, module) in MODULES.items():
        drafter.get_submodule(module).register_forward_hook(partial(exchange, name))
    taps = theirs["taps"].float().unflatten(1, (-1, embed.shape[1]))  # [T, L, D]
    anchors = torch.tensor([len(step["at"]) for step in steps]).cumsum(0)  # [A]
    context, first = drafter.context(taps, theirs["at"]), theirs["at"][anchors - 1] + 1
    tokens = theirs["tokens"][::K].long()
    block = embed[block_tokens(tokens, drafter.noise, K)].float()  # [A, K, D]
    drafts = drafter.draft(drafter(block, context, anchors, first), tokens, lm_head.float())
    equal = (drafts.flatten() == theirs["drafts"]).float().mean().item()
    errors = {name: relative_errors(ours, theirs[name]) for name, ours in found.items()}
    return {"steps": len(steps), "context": len(taps), "equal_drafts": equal, "errors": errors}


def relative_errors(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    theirs = theirs.float().flatten(1)
    off, size = (ours.float().reshape(theirs.shape) - theirs).norm(dim=1), theirs.norm(dim=1)
    rows = off / size
    found = {"all": off.norm() / size.norm(), "p90": rows.quantile(0.9), "worst": rows.max()}
    return {name: float(f"{error.item():.3g}") for name, error in found.items()}


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("checkpoint", type=Path)
    options = parser.parse_args()
    kept = options.out.with_suffix(".pt")
    more = {"enforce_eager": True, "worker_extension_cls": "dspark_layers.Watching"}
    engine = EngineOptions(options.checkpoint, K, drafting={"method": "dspark"}, more=more)
    if not kept.exists():
        with started(engine) as llm:
            llm.collective_rpc("watch")
            greedy(llm, bundled_prompts(MODEL, 8, 400), 48)  # one is longer than the window
            llm.collective_rpc("save", args=(str(kept.resolve()),))
    write_result(options.out, "dspark_layers", compare(torch.load(kept)["steps"]))
