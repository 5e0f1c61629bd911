"""Draw the tiny model's training curves from its log.

    python models/tiny-dsv4/make/plot.py

Reads `training-log.jsonl` beside this folder and writes `docs/images/tiny-model-training.png`.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

TINY = Path(__file__).resolve().parents[1]
PICTURE = TINY.parents[1] / "docs" / "images" / "tiny-model-training.png"
COLOURS = {"gsm8k-test": "#0072b2", "shakespeare-tail": "#d55e00"}  # of the held-out splits
Event = dict[str, Any]


def read_events() -> list[Event]:
    """Return the log's events, steps counted through all stages under the key `at`."""
    events: list[Event] = []
    offset = 0
    for line in (TINY / "training-log.jsonl").read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["event"] == "saved":
            break  # what follows is the final evaluation of the finished model
        if event["event"] == "stage" and event["name"] == "head":
            offset = events[-1]["at"] + 1  # its own step numbers start again at 0
        if "step" in event:
            events.append(event | {"at": offset + event["step"]})
    return events


def draw(
    axes: Axes, name: str, title: str, limits: tuple[float, float], events: list[Event]
) -> None:
    """Draw what the log calls `name`, on training rows and both held-out splits, and the stages."""
    train = [e for e in events if e["event"] == "train" and name in e]
    at, values = [e["at"] for e in train], [e[name] for e in train]
    axes.plot(at, values, color="#888888", label="training rows")
    end = train[-1]["at"] + 1
    looks = [event for event in events if event["event"] == "held_out" and event["at"] < end]
    for split, colour in COLOURS.items():
        values = [event[f"{split}/{name}"] for event in looks]
        axes.plot([e["at"] for e in looks], values, color=colour, marker="o", ms=3, label=split)
    starts = [e for e in events if e["event"] == "stage" and e["at"] < end]
    for i, (start, following) in enumerate(zip(starts, [*starts[1:], {"at": end}], strict=True)):
        if i % 2:
            axes.axvspan(start["at"], following["at"], color="#f2f2f2", zorder=0)
        place = {"x": (start["at"] + following["at"]) / 2, "y": 0.97, "ha": "center", "va": "top"}
        axes.text(s=start["name"], transform=axes.get_xaxis_transform(), **place)
    axes.set(title=title, ylim=limits, xlim=(0, end), xlabel="step")
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left"})
    plt.rcParams["lines.linewidth"] = 1
    events = read_events()
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    draw(left, "base_ce", "Base: cross entropy (nats per token)", (0, 7), events)
    settled = [e for e in events if e["event"] != "train" or e["at"] >= 40]  # both guessed before
    draw(right, "agreement", "Head: top-1 agreement with the base", (0.5, 0.9), settled)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    # Without the software's version in it, the same log gives the same bytes.
    figure.savefig(PICTURE, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
