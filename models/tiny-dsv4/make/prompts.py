"""Write calibration.jsonl, heal.jsonl and evaluation.jsonl: our own word problems, as chat prompts.

The last set has no template in common with the others: what is measured on it was never seen in
them. In a template `[3-9]` becomes a number of that range, and `@1` and `@2` become two names.
The same seed gives the same files: `python models/tiny-dsv4/make/prompts.py --out DIR`.
"""

import argparse
import json
import random
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

SEED = 20261124
COUNTS = {"calibration": 96, "evaluation": 144, "heal": 480}
CHAT = "<｜begin▁of▁sentence｜><｜User｜>{}<｜Assistant｜></think>"  # thinking off
TEXTS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
SETS = {name: TEXTS[{"heal": "calibration"}.get(name, name)] for name in COUNTS}


def fill(template: str, rng: random.Random) -> str:
    """Return the template with two names and with numbers."""
    first, second = rng.sample(TEXTS["names"].split(), 2)
    named = template.replace("@1", first).replace("@2", second)
    return re.sub(r"\[(\d+)-(\d+)\]", lambda m: str(rng.randint(int(m[1]), int(m[2]))), named)


def make(templates: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """Return `count` different questions, every template as often as the others or once more."""
    questions: dict[str, None] = {}  # in order
    while len(questions) < count:
        questions[fill(templates[len(questions) % len(templates)], rng)] = None
    return list(questions)


def write(out: Path) -> None:
    """Write the files."""
    rng = random.Random(SEED)
    for name, templates in SETS.items():
        questions = make(templates.splitlines(), COUNTS[name], rng)
        rows = [
            {"id": f"{name}-{number:03d}", "text": CHAT.format(question)}
            for number, question in enumerate(questions)
        ]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1])
    write(parser.parse_args().out)
