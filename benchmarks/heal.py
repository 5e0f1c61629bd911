"""What each choice in healing brings: the tiny head healed once for each, on one capture.

    MTP_GRAFT_DATA=... python benchmarks/heal.py --run RUN --out result.json --prompts
    mtp-graft capture recipes/tiny.toml --run RUN --set capture.calibration_prompts=... # and so on:
    mtp-graft quantize recipes/tiny.toml --run RUN ...          # see heal_gpu.sh
    python benchmarks/heal.py --run RUN --out result.json [--only NAME ...]

The prompts are GSM8K's questions and pieces of tinyshakespeare. Heads are trained on what the base
says to GSM8K's training questions unless their name says otherwise, and chosen on the first 192
test questions. Then every head is scored, drafting 1 to 5 tokens a step, on these, on further
questions (`held`) that nothing was chosen by, and on the verse that the base continues from the
part of Shakespeare that it has never seen.

Several of these programs, each with its own names, may share a run folder and a result. With
`--served` servers of the heads, started to tell what they draft, write the held-out texts again.
"""

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import MODEL, add_measurements, arguments, measurements

from mtp_graft.bench.decode import measure_acceptance
from mtp_graft.checkpoint.capture import RECORDINGS, append_row, read_sequences, read_texts
from mtp_graft.dsv4.heal import EXPERTS
from mtp_graft.recipe import HealSection, LinearDtype, QuantizeSection, ScoreSection, Variant
from mtp_graft.serving.client import ServerClient
from mtp_graft.stages import heal as stage
from mtp_graft.stages.inputs import CALIBRATION, EVALUATION, HEALED
from mtp_graft.stages.quantize import quantize
from mtp_graft.stages.score import score

#: How many prompts of each kind are trained on, and how many heads are judged by.
VERSES, QUESTIONS = 500, 1800
JUDGED = {"choose": 192, "held": 288, "verse": 96}
VERSE_CHARACTERS = 160
CHAT = "<｜begin▁of▁sentence｜><｜User｜>{}<｜Assistant｜></think>"  # thinking off
NOTE = "by_k: offline, greedy; by_position given that the drafts before were accepted"


@dataclass(frozen=True)
class Ablation:
    """How one head is healed."""

    settings: Mapping[str, Any] = field(default_factory=dict)  # changes to the default
    tokens: int = 270_000  # of text to train on, at most
    text: str | tuple[str, ...] = "gsm8k"  # what the ids of its prompts begin with
    variant: Variant = "gptq"
    linear_dtype: LinearDtype = "base"
    experts: bool = False  # train them as well, unrounded: what rounding them costs is left out
    before_gptq: bool = False  # heal beside exact experts, which are calibrated afterwards


ABLATIONS = {
    "default": Ablation(),
    "mxfp4, gptq after": Ablation(variant="mxfp4", before_gptq=True),
    "rtn": Ablation(variant="rtn"),
    "k = 5": Ablation({"k": 5}),
    "k = 1": Ablation({"k": 1}),
    "30k tokens": Ablation(tokens=30_000),
    "100k tokens": Ablation(tokens=100_000),
    "loss kl": Ablation({"loss": {"kl": 1.0}}),
    "loss tv": Ablation({"loss": {"tv": 1.0}}),
    "loss ce": Ablation({"loss": {"ce": 1.0}}),
    "loss tv + 0.1 ce": Ablation({"loss": {"tv": 1.0, "ce": 0.1}}),
    "decay 1": Ablation({"decay": 1.0}),
    "decay 0.3": Ablation({"decay": 0.3}),
    "bf16 linears": Ablation(linear_dtype="bf16"),
    "router too": Ablation({"router": True}),
    "experts too": Ablation(experts=True),
    "verse": Ablation(text="verse"),
    "gsm8k and verse": Ablation(text=("gsm8k", "verse")),
    "1000 steps": Ablation({"steps": 1000}),
    "100 steps": Ablation({"steps": 100}),
    "lr 1e-3": Ablation({"lr": 1e-3}),
    "lr 1.5e-4": Ablation({"lr": 1.5e-4}),
}


def write_prompts(run: Path, data: Path, count: int) -> None:
    """Write what to train on (`count` questions, and verse) and to judge by."""
    questions = {
        split: [json.loads(row)["question"] for row in (data / f"gsm8k/{split}.jsonl").open()]
        for split in ("train", "test")
    }
    verse = (data / "text" / "tinyshakespeare.txt").read_text()
    seen, unseen = verse[: int(0.9 * len(verse))], verse[int(0.9 * len(verse)) :]
    asked = {
        CALIBRATION: chats("gsm8k", questions["train"], count) | pieces(seen, VERSES),
        EVALUATION: chats("choose", questions["test"], JUDGED["choose"])
        | chats("held", questions["test"][JUDGED["choose"] :], JUDGED["held"])
        | pieces(unseen, JUDGED["verse"]),
    }
    run.mkdir(parents=True, exist_ok=True)
    for split, prompts in asked.items():
        rows = [json.dumps({"id": name, "text": text}) for name, text in prompts.items()]
        (run / f"{split}.jsonl").write_text("\n".join(rows) + "\n")


def chats(name: str, questions: list[str], count: int) -> dict[str, str]:
    return {f"{name}-{i}": CHAT.format(question) for i, question in enumerate(questions[:count])}


def pieces(text: str, count: int) -> dict[str, str]:
    """Return beginnings of speeches, evenly spaced."""
    at = [i * (len(text) // (count + 1)) for i in range(count)]
    begins = [text.index("\n\n", i) + 2 for i in at]
    return {
        f"verse-{i}": f"<｜begin▁of▁sentence｜>{text[b : b + VERSE_CHARACTERS]}"
        for i, b in enumerate(begins)
    }


def part_of(
    capture: Path, out: Path, train: str | tuple[str, ...], judge: str, tokens: int = 10**9
) -> Path:
    """Make a capture of those texts whose ids begin so, at most so many tokens to train on."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / RECORDINGS).symlink_to((capture / RECORDINGS).resolve())
    for sequence in read_sequences(capture):
        trained = sequence.split == CALIBRATION
        if not sequence.id.startswith(train if trained else judge):
            continue
        if trained and (tokens := tokens - sequence.tokens) < 0:
            continue
        append_row(out, sequence)
    return out


def measure(name: str, run: Path) -> dict[str, Any]:
    """Heal one head and score it; return the entry of the result."""
    how, folder = ABLATIONS[name], run / "ablations" / name.replace(" ", "_")
    settings = replace(HealSection(), **how.settings)
    capture = part_of(run / "capture", folder / "capture", how.text, "choose", how.tokens)
    stage.EXPERTS = ".none." if how.experts else EXPERTS  # type: ignore[attr-defined]
    beside: Variant = "mxfp4" if how.before_gptq else how.variant
    given = (capture, run / "quantize", MODEL / "upstream", MODEL / "base", folder / "heal")
    began = time.perf_counter()
    report = stage.heal(*given, beside, how.linear_dtype, 128, settings, progress(name))
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    found = {"name": name, **asdict(how), "settings": asdict(settings), **report}
    found |= {"seconds": seconds, "peak_gpu_bytes": peak}
    if not how.experts:
        found["scored"] = scores(folder, run, folder / "heal" / HEALED, how)
    return found


def scores(folder: Path, run: Path, upstream: Path, how: Ablation) -> dict[str, Any]:
    """Return kind of text -> `by_k` of the head in `upstream`."""
    base, quantized, variant = MODEL / "base", run / "quantize", how.variant
    heads = QuantizeSection(variants=(variant,))
    if how.before_gptq:
        variant, heads, quantized = "gptq", QuantizeSection(variants=("gptq",)), folder / "quantize"
        quantize(run / "capture", upstream, base, quantized, heads, progress("quantize"))
    found = {}
    for kind in JUDGED:
        capture = part_of(run / "capture", folder / f"capture-{kind}", "-", kind)
        given = (capture, quantized, upstream, base, folder / f"score-{kind}", heads)
        scored = score(*given, ScoreSection(k=5), progress(kind))
        found[kind] = scored["acceptance"][variant]["by_k"]
    return found


def unhealed(run: Path) -> list[dict[str, Any]]:
    """Return entries of the heads as upstream has them."""
    found, variants = [], ("gptq", "rtn", "mxfp4")
    for v in variants:
        folder, how = run / "ablations" / f"unhealed-{v}", Ablation(variant=v)
        scored = scores(folder, run, MODEL / "upstream", how)
        found.append({"name": f"unhealed {v}", "variant": v, "scored": scored})
    return found


def served(name: str, url: str, run: Path, concurrency: int) -> dict[str, Any]:
    """Return what a server accepts while it writes the held-out texts again."""
    texts = [text for text in read_texts(run / "capture") if text.id.startswith("held")]
    with ServerClient(url) as client:
        found = measure_acceptance(client, texts, 96, concurrency, progress(name))
    steps = {each["id"]: each["steps"] for each in found.pop("sequences")}
    by_text = {name: (sum(a + 1 for _, a in each), len(each)) for name, each in steps.items()}
    return {"name": f"served {name}", "concurrency": concurrency, **found, "by_text": by_text}


def compare_served(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return each server's accepted length; healed beside upstream's, DSpark beside healed."""
    of = {each["name"]: each["by_text"] for each in found if "by_text" in each}
    drawn = {name: resampled(by_text) for name, by_text in of.items()}
    compared = {}
    for name, lengths in drawn.items():
        _, drafter, k = name.split(" ")
        tokens, steps = np.sum([*of[name].values()], axis=0)
        entry = {"length": tokens / steps, "interval": ends(lengths)}
        other = {"healed": "unhealed"}.get(drafter, "healed")
        before = None if drafter == "unhealed" else drawn.get(f"served {other} {k}")
        if before is not None:
            entry |= {"against": other, "ratio_interval": ends(lengths / before)}
            entry |= {"difference_interval": ends(lengths - before)}
        compared[f"{drafter} {k}"] = entry
    return compared


def resampled(by_text: Mapping[str, tuple[int, int]]) -> Any:
    """Return accepted lengths [resamples] of texts drawn again, the same ones each time."""
    counts = np.array([by_text[text] for text in sorted(by_text)], float)  # tokens, steps
    at = np.random.default_rng(0).integers(len(counts), size=(10_000, len(counts)))
    tokens, steps = counts[at].sum(axis=1).T
    return tokens / steps


def ends(values: Any) -> list[float]:
    return np.quantile(values, (0.025, 0.975)).tolist()


def progress(name: str) -> Any:
    def report(label: str, done: int, total: int) -> None:
        if done % 50 == 0:
            print(f"{time.strftime('%H:%M:%S')} {name}: {label} {done}/{total}", flush=True)

    return report


def summarize(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return name -> accepted length at k = 1, 3, 5 by kind of text, and what servers told."""
    return {
        "served": compare_served(found),
        "results": {
            entry["name"]: {
                kind: {k: by_k[k]["acceptance_length"] for k in ("1", "3", "5")}
                for kind, by_k in entry["scored"].items()
            }
            for entry in found
            if "scored" in entry
        },
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--prompts", action="store_true", help="write them")
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="with --prompts")
    parser.add_argument("--served", nargs=2, action="append", default=[], metavar=("NAME", "URL"))
    parser.add_argument("--concurrency", type=int, default=1, help="with --served")
    parser.add_argument("--only", nargs="+", default=["unhealed", *ABLATIONS])
    options = parser.parse_args()
    if options.prompts:
        data = Path(os.environ["MTP_GRAFT_DATA"])
        write_prompts(options.run, data, options.questions)
        return
    known = {entry["name"] for entry in measurements(options.out)}
    for name, url in options.served:
        if f"served {name}" in known:
            continue
        found = served(name, url, options.run, options.concurrency)
        add_measurements(options.out, "heal", [found], summarize, NOTE)
    for name in () if options.served else options.only:
        first = "unhealed gptq" if name == "unhealed" else name
        if first in known:
            continue
        new = unhealed(options.run) if name == "unhealed" else [measure(name, options.run)]
        add_measurements(options.out, "heal", new, summarize, NOTE)


if __name__ == "__main__":
    main()
