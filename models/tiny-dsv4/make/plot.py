"""Draw the tiny model's training curves from its log.

    python models/tiny-dsv4/make/plot.py

Reads `training-log.jsonl` beside this folder and writes `docs/images/tiny-model-training.png`.
Needs matplotlib, which only this script uses.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

HERE = Path(__file__).resolve().parent
LOG = HERE.parent / "training-log.jsonl"
PICTURE = HERE.parents[2] / "docs" / "images" / "tiny-model-training.png"

TRAIN, GSM8K, SHAKESPEARE, SHADE = "#888888", "#0072b2", "#d55e00", "#f2f2f2"
SPLITS = {"gsm8k-test": GSM8K, "shakespeare-tail": SHAKESPEARE}
Event = dict[str, Any]


def read_events(path: Path) -> list[Event]:
    """Return the log's events, steps counted through all stages under the key `at`.

    A stage logs its own step numbers, so that the head stage starts again at 0.
    """
    events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    offset, last = 0, 0
    for event in events:
        if event["event"] == "stage" and event["name"] == "head":
            offset = last + 1
        if event["event"] == "saved":
            break  # what follows is the final evaluation of the finished model
        if "step" in event:
            last = event["at"] = offset + event["step"]
    return [event for event in events if "at" in event]


def draw_losses(axes: Axes, train: list[Event], held_out: list[Event]) -> None:
    """Draw the base's cross entropy on training rows and on both held-out splits."""
    base = [event for event in train if "base_ce" in event]
    axes.plot([e["at"] for e in base], [e["base_ce"] for e in base], color=TRAIN, lw=1)
    axes.annotate("training rows", (1500, 1.05), color=TRAIN, ha="center", va="top")
    trained = [event for event in held_out if event["at"] <= base[-1]["at"]]
    for split, color in SPLITS.items():
        values = [event[f"{split}/base_ce"] for event in trained]
        axes.plot([e["at"] for e in trained], values, color=color, marker="o", ms=3)
        axes.annotate(split, (1500, values[-1] + 0.25), color=color, ha="center")
    axes.set_title("Base: cross entropy (nats per token)")
    axes.set_ylim(0, 7)


def draw_agreement(axes: Axes, train: list[Event], held_out: list[Event]) -> None:
    """Draw how often the head's best token is the base's, one step later."""
    settled = [event for event in train if event["at"] >= 40]  # before, both guess one token
    axes.plot([e["at"] for e in settled], [e["agreement"] for e in settled], color=TRAIN, lw=1)
    axes.annotate("training rows", (2070, 0.735), color=TRAIN, ha="center")
    for split, color in SPLITS.items():
        values = [event[f"{split}/agreement"] for event in held_out]
        axes.plot([e["at"] for e in held_out], values, color=color, marker="o", ms=3)
    axes.annotate("gsm8k-test", (250, 0.73), color=GSM8K)
    axes.annotate("shakespeare-tail", (1500, 0.535), color=SHAKESPEARE, ha="center")
    axes.set_title("Head: top-1 agreement with the base")
    axes.set_ylim(0.5, 0.9)


def mark_stages(axes: Axes, starts: list[tuple[int, str]], end: int) -> None:
    """Shade every other of the stages that begin before `end`, and name them."""
    starts = [(start, name) for start, name in starts if start < end]
    bounds = [*(start for start, _ in starts), end]
    for i, (start, name) in enumerate(starts):
        if i % 2:
            axes.axvspan(start, bounds[i + 1], color=SHADE, zorder=0)
        middle = (start + bounds[i + 1]) / 2
        axes.text(middle, 0.97, name, transform=axes.get_xaxis_transform(), ha="center", va="top")
    axes.set_xlim(0, end)
    axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    mpl.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left"})
    events = read_events(LOG)
    train = [event for event in events if event["event"] == "train"]
    held_out = [event for event in events if event["event"] == "held_out"]
    starts = [(event["at"], event["name"]) for event in events if event["event"] == "stage"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    draw_losses(left, train, held_out)
    draw_agreement(right, train, held_out)
    mark_stages(left, starts, starts[-1][0])  # the head stage leaves the base as it is
    mark_stages(right, starts, events[-1]["at"] + 1)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    # Without the software's version in it, the same log gives the same bytes.
    figure.savefig(PICTURE, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
