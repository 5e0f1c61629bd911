"""Where a CPU server's drafts part from those that `score` counts, and how near a tie they do.

    python benchmarks/score_ties.py --run RUN --out benchmarks/results/score_cpu.json

Servers of the exact head, k = 1, 2, 3, write the evaluation texts of RUN/capture again. Of the
steps that both begin at the same token, those that accept another number of drafts are listed:
`margin` is that of the head's two best tokens (nats, offline) at the draft that one side missed;
`exchanged` the draft in which the router's last expert and the next, having changed places, give
the server's step, of several the one with the least `gap` between these experts' scores; without
one it is the least gap of the step's drafts so far. `gaps` has its deciles over all steps.
"""

from functools import cache, partial
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
import torch.nn.functional as F
from record import MODEL, arguments, write_result

from mtp_graft.bench.decode import measure_acceptance, measured
from mtp_graft.checkpoint.capture import read_texts
from mtp_graft.checkpoint.shards import load_tensors
from mtp_graft.dsv4.replay import build_head, unroll
from mtp_graft.dsv4.variants import decode_head
from mtp_graft.serving.client import COUNT_DRAFTS
from mtp_graft.serving.command import ServeOptions
from mtp_graft.serving.metrics import Step, count_steps, drafting_result
from mtp_graft.serving.server import managed_server
from mtp_graft.stages.inputs import EVALUATION, open_inputs
from mtp_graft.stages.parallel import single_thread
from mtp_graft.stages.score import draft_steps
from mtp_graft.stages.splice import splice

MODELS = MODEL / "upstream", MODEL / "base"
NOTE = "GSM8K test questions, at most 96 new tokens; the servers recorded the texts, too."


def serve(run: Path, k: int) -> dict[str, Any]:
    """Serve the head; return what `measure_acceptance` finds."""
    texts = [text for text in read_texts(run / "capture") if text.split == EVALUATION]
    checkpoint, longest = run / f"k{k}", max(len(text.continuation) for text in texts)
    splice(*reversed(MODELS), checkpoint, "mxfp4")
    limits = {"max_model_len": 1024, "max_num_seqs": 8, "num_speculative_tokens": k}
    options = ServeOptions(checkpoint, port=0, extra_args=COUNT_DRAFTS, **limits)
    with managed_server(options, run / f"vllm-{k}.log") as client:
        return measure_acceptance(client, texts, longest, 8, print)


def replay(
    inputs: Any, head: Any, embed: Any, lm_head: Any, text: Any, exchange: int | None = None
) -> tuple[Any, ...]:
    """Return the answer, and drafts, margins and gaps [R, 3]; experts `exchange` in one draft."""
    recorded, first = inputs.read_sequence(text), text.prompt_tokens
    gaps: list[Any] = []

    def route(router: Any, given: Any, routed: Any) -> Any:
        scores = router.score_fn(F.linear(given[0].flatten(0, -2), router.weight))
        best, experts = (scores + router.e_score_correction_bias).topk(router.top_k + 1)
        gaps.append((best[:, -2] - best[:, -1])[first - 1 :])
        if len(gaps) - 1 != exchange:
            return routed
        experts = torch.cat((experts[:, :-2], experts[:, -1:]), dim=1)
        weights = scores.gather(1, experts)
        weights *= router.routed_scaling_factor / weights.sum(1, keepdim=True)
        return routed[0], weights, experts

    hook = head.layer.mlp.gate.register_forward_hook(route)
    with torch.inference_mode():
        streams = unroll(head, recorded.residual[None], embed[recorded.token_ids][None], 3)
        best = [head.logits(each[:, first - 1 :], lm_head.float())[0].topk(2) for each in streams]
    hook.remove()
    drafts, margins = [t[:, 0] for _, t in best], [v[:, 0] - v[:, 1] for v, _ in best]
    found = (torch.stack(each, dim=1).tolist() for each in (drafts, margins, gaps))
    return recorded.token_ids[first:].tolist(), *found


def begun(steps: Any) -> dict[int, Step]:
    """Return a text's steps by the token that each begins at."""
    found, at = {}, 0
    for step in map(Step._make, steps):
        found[at] = step
        at += step.accepted + 1
    return found


@single_thread()
def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--run", type=Path, required=True)
    options = parser.parse_args()
    inputs = open_inputs(options.run / "capture", *MODELS, EVALUATION)
    tensors = load_tensors(MODELS[1], ["embed.weight", "head.weight"]).values()
    head = build_head(inputs.model, decode_head(inputs.store("mxfp4", [])))
    again = cache(partial(replay, inputs, head, *tensors))
    results = {}
    for k in (1, 2, 3):
        served = measured(options.run, f"served-{k}", partial(serve, options.run, k))
        told = {each["id"]: begun(each["steps"]) for each in served["sequences"]}
        steps, gaps, differences = list[Step](), list[float](), []
        for text in inputs.sequences:
            said, drafts, margins, found = again(text)
            offline = begun(draft_steps([d[:k] for d in drafts], said))
            steps += offline.values()
            for at in sorted(offline.keys() & told[text.id].keys()):
                mine, theirs = offline[at], told[text.id][at]
                place = min(mine.accepted, theirs.accepted, k - 1)
                order = sorted(range(place + 1), key=found[at].__getitem__)
                gaps.append(found[at][order[0]])
                if mine == theirs:
                    continue
                other = {j: draft_steps([again(text, j)[1][at][:k]], said[at:]) for j in order}
                fits = [j for j, its_steps in other.items() if next(its_steps) == theirs]
                where = {"id": text.id, "token": at, "offline": mine[1], "served": theirs[1]}
                tie = {"margin": margins[at][place], "gap": found[at][(fits or order)[0]]}
                differences.append({**where, **tie, "exchanged": [*fits, None][0]})
        del served["sequences"]
        counts = {"compared": len(gaps), "gaps": quantiles(gaps, n=10)}
        sides = {"served": served, "offline": drafting_result(count_steps(steps))}
        results[f"k={k}"] = {**sides, **counts, "differences": differences}
    write_result(options.out, "score", results, note=NOTE)


if __name__ == "__main__":
    main()
