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

COLOURS = {"gsm8k-test": "#0072b2", "shakespeare-tail": "#d55e00"}  # of the held-out splits
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


def draw(axes: Axes, name: str, train: list[Event], held_out: list[Event]) -> None:
    """Draw what the log calls `name`, on training rows and on both held-out splits."""
    steps, values = [e["at"] for e in train], [e[name] for e in train]
    axes.plot(steps, values, color="#888888", label="training rows")
    for split, colour in COLOURS.items():
        values = [event[f"{split}/{name}"] for event in held_out]
        at = [event["at"] for event in held_out]
        axes.plot(at, values, color=colour, marker="o", ms=3, label=split)


def mark_stages(axes: Axes, starts: list[tuple[int, str]], end: int) -> None:
    """Shade every other of the stages that begin before `end`, and name them."""
    starts = [(start, name) for start, name in starts if start < end]
    bounds = [*(start for start, _ in starts), end]
    for i, (start, name) in enumerate(starts):
        if i % 2:
            axes.axvspan(start, bounds[i + 1], color="#f2f2f2", zorder=0)
        middle = (start + bounds[i + 1]) / 2
        axes.text(middle, 0.97, name, transform=axes.get_xaxis_transform(), ha="center", va="top")
    axes.set_xlim(0, end)
    axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    mpl.rcParams.update(
        {"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "lines.linewidth": 1}
    )
    events = read_events(LOG)
    train = [event for event in events if event["event"] == "train"]
    held_out = [event for event in events if event["event"] == "held_out"]
    starts = [(event["at"], event["name"]) for event in events if event["event"] == "stage"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    base = [event for event in train if "base_ce" in event]
    trained = [event for event in held_out if event["at"] <= base[-1]["at"]]
    draw(left, "base_ce", base, trained)
    left.set(title="Base: cross entropy (nats per token)", ylim=(0, 7))
    settled = [event for event in train if event["at"] >= 40]  # before, both guess one token
    draw(right, "agreement", settled, held_out)
    right.set(title="Head: top-1 agreement with the base", ylim=(0.5, 0.9))
    mark_stages(left, starts, starts[-1][0])  # the head stage leaves the base as it is
    mark_stages(right, starts, events[-1]["at"] + 1)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    # Without the software's version in it, the same log gives the same bytes.
    figure.savefig(PICTURE, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
