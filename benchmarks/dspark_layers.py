"""Is the DSpark drafter that vLLM serves the one of `dsv4.dspark`? Layer by layer, on one GPU.

    python benchmarks/dspark_layers.py --out result.json

Hooks keep what the bundled drafter (experts MXFP4) computes in each step of an eager engine: one
request at a time, greedy, five drafts. The reference computes the same in float32 from the same
taps, tokens and stored weights. An error is ||reference - vLLM|| / ||vLLM||: `alone` if each
module gets what vLLM's module before it gave, `in_all` if the reference goes on from its own
values, where a router's near tie may fall otherwise. vLLM rounds values to BF16, and to E4M3 what
FP8 matrices multiply and cached keys: an error of 2 to 4 % of each context and attention. What was
kept stays beside the result and is compared again if it is there.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from engines import EngineOptions, started
from record import MODEL, arguments, write_result
from texts import bundled_prompts, greedy
from torch import Tensor

from mtp_graft.checkpoint.manifest import package_versions
from mtp_graft.checkpoint.shards import load_tensors, read_index
from mtp_graft.dsv4.dspark import DSpark, block_tokens
from mtp_graft.dsv4.names import find_drafter
from mtp_graft.dsv4.replay import build_dspark, model_config
from mtp_graft.dsv4.variants import decode_head
from mtp_graft.stages.parallel import device_name
from mtp_graft.stages.splice import splice

K = 5
#: What nine in ten rows' errors of a module alone are within: with E4M3 inputs, and without.
ROUNDED, BOUND = {"context": 0.05, "attention": 0.08}, 0.02
EQUAL = 0.95  # the smallest share of equal drafts: rounding decides near ties
#: Point -> module of vLLM's drafter, and of ours; the latter of each stage.
ONCE = {"context": ("model.main_norm", "main_norm"), "hidden": ("model", "")}
STAGE = {
    "context": ("attn.kv_norm", "self_attn.kv_norm"),  # of the context alone
    "attention": ("attn", "self_attn"),
    "experts": ("ffn", "mlp"),
    "streams": ("", ""),
}


def modules(stages: int) -> dict[str, tuple[str, str]]:
    """Return the names of both modules by point."""
    return ONCE | {
        f"{s} {point}": (f"model.layers.{s}.{theirs}".strip("."), f"stages.{s}.{ours}".strip("."))
        for s in range(stages)
        for point, (theirs, ours) in STAGE.items()
    }


class Watching:
    """Methods of vLLM's worker, which `collective_rpc` calls."""

    model_runner: Any

    def watch_drafter(self) -> None:
        self.watched = watch(self.model_runner.speculator, self.model_runner.model)

    def save_steps(self, path: str) -> None:
        where = {"device": device_name(), "versions": package_versions()}
        torch.save({**self.watched, "where": where}, path)


def watch(speculator: Any, target: Any) -> dict[str, Any]:
    """Return where further steps will be found, each with its points, and by point what failed."""
    from vllm.model_executor.kernels.mhc.tilelang import mhc_post_tilelang
    from vllm.model_executor.kernels.mhc.torch import mhc_post_torch

    drafter, stock = speculator.model, speculator.propose
    steps, failed, seen = list[Any](), dict[str, str](), dict[str, list[Tensor]]()

    def attempt(point: str, value: Callable[[], Tensor]) -> None:
        try:
            seen.setdefault(point, []).append(value().clone())
        except Exception as error:  # the other points are compared all the same
            failed[point] = repr(error)

    def keep(point: str, module: Any, value: Callable[[Any, Any], Tensor]) -> None:
        module.register_forward_hook(lambda _, args, out: attempt(point, lambda: value(args, out)))

    def output(_args: Any, out: Any) -> Tensor:  # a layer leaves it to the next to mix its streams
        return mhc_post_tilelang(*out) if type(out) is tuple else out

    @torch.inference_mode()
    def propose(batch: Any, *args: Any, **more: Any) -> Tensor:
        drafts = stock(batch, *args, **more)
        try:
            buffers, (row,) = speculator.input_buffers, drafts
            step = {"tokens": buffers.input_ids[:K], "positions": buffers.positions[:K]}
            markov = drafter.markov_embed(torch.cat((step["tokens"][:1], row[:-1])))
            attempt("confidence", lambda: drafter.compute_confidence(seen["hidden"][0][:K], markov))
            context = batch.num_tokens - int(args[5][0])  # less num_rejected
            step |= {"drafts": row, "at": speculator.context_positions[:context]}
            for point, (first, *biases) in seen.items():  # without padding and rejected drafts
                step[point] = first[: context if point.endswith(("taps", "context")) else K]
                if biases:  # of the Markov head, a row each
                    step[point] = step[point].float() + torch.cat(biases).float()
            steps.append({name: each.to("cpu", copy=True) for name, each in step.items()})
        except Exception as error:
            failed[f"step {len(steps)}"] = repr(error)
        seen.clear()
        return drafts

    for n, layer in enumerate(drafter.model.target_layer_ids):
        means = lambda _, out: mhc_post_torch(*out).float().mean(1)  # noqa: E731
        keep(f"{n} taps", target.model.layers[layer], means)
    keep("taps", drafter.model.main_proj, lambda args, _: args[0])
    for point, (name, _) in modules(len(drafter.model.layers)).items():
        keep(point, drafter.get_submodule(name), output)
    keep("logits", drafter.logits_processor, output)
    speculator.propose = propose
    return {"steps": steps, "failed": failed}


def read_reference(checkpoint: Path) -> tuple[DSpark, Tensor, Tensor]:
    """Return the drafter that `checkpoint` stores, and the base's embedding and LM head."""
    _, stages, names = find_drafter(read_index(checkpoint), checkpoint)
    stored = load_tensors(checkpoint, [*names, "embed.weight", "head.weight"])
    embed, lm_head = (stored.pop(name).float() for name in ("embed.weight", "head.weight"))
    config = model_config(json.loads((checkpoint / "config.json").read_text()))
    return build_dspark(config, decode_head(stored), stages), embed, lm_head


@torch.inference_mode()
def recompute(
    drafter: DSpark, embed: Tensor, lm_head: Tensor, theirs: dict[str, Tensor], *, alone: bool
) -> dict[str, Tensor]:
    """Return the points of all steps; `alone`: what a module gives is then replaced by vLLM's."""
    found: dict[str, Tensor] = {}

    def keep(point: str, module: Any) -> Any:
        def hook(_module: Any, _args: Any, out: Any) -> Any:
            if point in found:  # kv_norm, which has done the context, does the block
                return out
            ours, *rest = out if type(out) is tuple else (out,)
            found[point] = ours
            ours = theirs[point].to(ours).view_as(ours) if alone and point in theirs else ours
            return (ours, *rest) if rest else ours

        return module.register_forward_hook(hook)

    pairs = modules(len(drafter.stages)).items()
    hooks = [keep(point, drafter.get_submodule(name)) for point, (_, name) in pairs]
    taps = theirs["taps"].float()  # [T, L * D]
    tokens, drafts = (theirs[name].long().view(-1, K) for name in ("tokens", "drafts"))
    first = theirs["positions"].view(-1, K)[:, 0]
    context = drafter.context(taps.unflatten(1, (-1, embed.shape[1])), theirs["at"])
    hidden = drafter(embed[tokens], context, theirs["anchors"], first)
    for hook in hooks:
        hook.remove()
    previous = torch.cat((tokens[:, :1], drafts[:, :-1]), dim=1)
    found |= {f"{n} taps": tap for n, tap in enumerate(taps.split(embed.shape[1], dim=1))}
    found["logits"] = drafter.logits(hidden, previous, lm_head)
    found["confidence"] = drafter.confidence(hidden, previous).sigmoid()
    return found | {"drafts": drafter.draft(hidden, tokens[:, 0], lm_head)}


def compare(saved: dict[str, Any], drafter: DSpark, embed: Tensor, lm_head: Tensor) -> Any:
    """Return errors by point, how many drafts are equal, what failed, and if all is as expected."""
    steps, failed = saved["steps"], dict(saved["failed"])
    theirs = {n: torch.cat([step[n] for step in steps]) for n in set(steps[0]).intersection(*steps)}
    theirs["anchors"] = torch.tensor([len(step["at"]) for step in steps]).cumsum(0)
    given = drafter, embed, lm_head, theirs
    ours = {"alone": recompute(*given, alone=True), "in_all": recompute(*given, alone=False)}
    same = {kind: each.pop("drafts").flatten() == theirs["drafts"] for kind, each in ours.items()}
    failed |= dict.fromkeys(ours["alone"].keys() - theirs.keys(), "not kept in every step")
    points: dict[str, Any] = {}
    for point in [point for point in ours["alone"] if point in theirs]:
        points[point] = {k: relative_error(each[point], theirs[point]) for k, each in ours.items()}
        points[point]["bound"] = ROUNDED.get(point.split()[-1], BOUND)
    beyond = [name for name, point in points.items() if point["alone"]["p90"] > point["bound"]]
    equal = {kind: each.float().mean().item() for kind, each in same.items()}
    end = torch.stack([step["at"][-1] for step in steps]) + 1  # each block's first position
    blocks = {"tokens": block_tokens(theirs["tokens"][::K], drafter.noise, K)}
    blocks["positions"] = end[:, None] + torch.arange(K)
    unlike = [name for name, ours in blocks.items() if not ours.flatten().equal(theirs[name])]
    return {
        "within": not (failed or unlike or beyond) and equal["alone"] >= EQUAL,
        **{"beyond": beyond, "failed": failed, "blocks_unlike_ours": unlike},
        "equal_drafts": {**equal, "bound": EQUAL},
        "points": points,
        **{"steps": len(steps), "tokens_of_context": len(theirs["at"])},
    }


def relative_error(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Return the error over all rows, what nine in ten rows' are within, and the worst row's."""
    theirs = theirs.float().reshape(len(theirs), -1)
    off, size = (ours.float().reshape(theirs.shape) - theirs).norm(dim=1), theirs.norm(dim=1)
    rows = off / size
    found = {"all": off.norm() / size.norm(), "p90": rows.quantile(0.9), "worst": rows.max()}
    return {name: float(f"{value.item():.3g}") for name, value in found.items()}


def record(checkpoint: Path, share: float, path: Path) -> None:
    """Write what vLLM's drafter computes on bundled prompts, one of them longer than the window."""
    limits = {"gpu_memory_utilization": share, "kv_cache_bytes": 2**31, "max_num_seqs": 4}
    more = {"enforce_eager": True, "worker_extension_cls": "dspark_layers.Watching"}
    engine = EngineOptions(checkpoint, K, drafting={"method": "dspark"}, more=more, **limits)
    with started(engine) as llm:
        llm.collective_rpc("watch_drafter")
        greedy(llm, bundled_prompts(MODEL, 8, 400), 48)
        llm.collective_rpc("save_steps", args=(str(path.resolve()),))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.08)
    options = parser.parse_args()
    kept = options.out.with_suffix(".pt")
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "spliced"
        splice(MODEL / "base", MODEL / "dspark", checkpoint, "mxfp4")
        if not kept.exists():
            record(checkpoint, options.gpu_memory_utilization, kept)
        saved, reference = torch.load(kept), read_reference(checkpoint)
    print(len(saved["steps"]), "steps; failed:", saved["failed"])
    results = compare(saved, *reference)
    write_result(options.out, "dspark_layers", results, **saved["where"])
    print(json.dumps(results, indent=1))
    sys.exit(not results["within"])


if __name__ == "__main__":
    main()
