"""Write calibration.jsonl, heal.jsonl and evaluation.jsonl: our own word problems, as chat prompts.

The last set has no template in common with the others: what is measured on it was never seen in
them. In a template `[3-9]` becomes a number of that range, and `@1` and `@2` become two names.
The same seed gives the same files: `python models/tiny-dsv4/make/prompts.py --out DIR`.
"""

import argparse
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

SEED = 20261124
COUNTS = {"calibration": 96, "evaluation": 144, "heal": 480}
CHAT = "<｜begin▁of▁sentence｜><｜User｜>{}<｜Assistant｜></think>"  # thinking off
NAMES = """\
Adele Bruno Carla Dario Edith Felix Gloria Henrik Irene Jonas Karin Leo Marta Nils Olga
Pedro Ruth Simon Teresa Victor Wanda Yusuf Zoe Alma Boris Clara Dennis Elsa Frank Gina"""

# ruff: noqa: E501, a template is one line
CALIBRATION = """\
@1 buys [3-9] notebooks for $[2-4] each and [2-5] pens for $[1-3] each. @1 has $[60-90] before that. How much money is left?
@1 reads [12-30] pages on Monday and twice as many on Tuesday. The book has [150-300] pages. How many pages are left?
There are [20-60] apples in a basket. @1 takes [3-9] apples and @2 takes [4-10] apples. How many apples stay in the basket?
@1 works [5-8] hours a day for [3-6] days and earns $[9-18] an hour. How much does @1 earn?
@1 has [40-90] stamps. @2 has [10-30] more stamps than @1. How many stamps do they have together?
A baker uses [2-5] eggs for a cake. How many eggs does the baker need for [6-14] cakes, if [3-9] eggs break on the way?
@1 runs [2-6] miles every morning and [2-4] miles every evening. How many miles does @1 run in [2-4] weeks?
A bus has [30-50] seats. At the first stop [8-15] people get on and at the second stop [6-12] more. How many seats are still free?
@1 plants [4-9] rows of tomatoes with [6-12] plants in a row. Each plant gives [5-10] tomatoes. How many tomatoes does @1 pick?
A tank holds [80-200] gallons. A pump takes out [4-9] gallons a minute. How many gallons are left after [5-8] minutes?
@1 saves $[5-15] a week. After [6-12] weeks @1 spends $[20-40] on a gift for @2. How much money is left?
A box holds [6-12] cups. A shop orders [8-20] boxes and finds that [3-11] cups are broken. How many cups can it sell?
@1 is [8-14] years old. @2 is [2-4] times as old as @1. How old will @2 be in [3-9] years?
A class of [18-32] children shares [3-6] trays of rolls with [12-24] rolls on each tray. [5-9] rolls fall down. How many rolls can be eaten?
@1 drives [40-65] miles an hour for [2-5] hours and then [10-35] miles more. How far does @1 drive in total?
A shirt costs $[15-40]. @1 buys [2-5] of them and has a coupon for $[5-12]. How much does @1 pay?
@1 cuts a rope of [60-120] inches into pieces of [4-6] inches. How many whole pieces does @1 get?
@1 feeds [3-8] dogs. Every dog eats [2-4] cups of food a day. How many cups does @1 need for [7-14] days?
A movie starts with [90-200] people in the hall. [10-30] people leave after one hour and half as many come in. How many are there now?
@1 paints [3-7] fences. Each fence takes [2-4] hours and [2-4] cans of paint that cost $[8-16] each. What does the paint cost?
@1 collects [15-35] shells on the first day and [4-9] more on each day after that. How many shells does @1 collect in [3-5] days?
A school buys [10-25] desks for $[40-75] each and [10-25] chairs for $[15-30] each. How much does the school pay?
@1 and @2 pick berries. @1 picks [12-28] cups and @2 picks [3-9] cups less. They sell each cup for $[2-5]. How much do they earn?
A phone plan costs $[18-35] a month and $[2-4] for every extra hour. @1 uses [3-8] extra hours in one month. What does @1 pay for that month?"""

EVALUATION = """\
A ferry makes [4-9] trips a day and carries [12-30] cars on each trip. How many cars does it carry in [3-7] days?
@1 sells lemonade for $[2-4] a glass. On Saturday @1 sells [14-30] glasses and on Sunday [8-20] glasses. The lemons cost $[6-12]. How much money does @1 make?
A farmer has [30-70] cows and [2-4] times as many sheep. How many animals are on the farm?
A puzzle has [200-500] pieces. @1 places [25-50] pieces each evening for [3-5] evenings. How many pieces are still to be placed?
@1 needs [3-6] yards of cloth for one curtain. The cloth costs $[4-9] a yard. How much does @1 pay for [4-8] curtains?
A cyclist rides [10-18] miles in one hour. How many miles are left of a tour of [80-150] miles after [3-5] hours?
@1 has [5-9] shelves with [14-26] books on each of them. @1 gives [10-40] books to @2. How many books does @1 keep?
A kitchen makes [20-45] sandwiches for lunch. Each sandwich has [2-3] slices of cheese. A pack has [10-20] slices. How many slices of cheese are used?
A hotel has [4-9] floors and [11-24] rooms on each floor. Tonight [15-35] rooms are empty. How many rooms are taken?
A carpenter builds a table in [4-7] hours and a chair in [2-3] hours. How many hours are needed for [2-4] tables and [8-16] chairs?
@1 pays $[25-60] for a coat and half as much for a hat. @2 pays $[5-15] less than @1 in all. How much does @2 pay?
A pool is filled with [15-30] buckets of water in the morning and [12-25] in the afternoon. Every bucket holds [3-6] gallons. How many gallons are in the pool?
@1 sends [6-15] letters and [3-8] parcels. A letter costs $[2-3] and a parcel costs $[7-13]. How much does @1 spend at the post office?
A team scores [8-19] points in the first game and [3-6] points more in every game after it. How many points does it score in the third game?
A jar has [90-180] beans. @1 and @2 each take [12-25] beans out, and then @2 puts [5-10] back. How many beans are in the jar?
A museum ticket costs $[8-14] for adults and $[3-6] for children. What do [2-4] adults and [5-11] children pay?
A truck is loaded with [12-24] crates that weigh [30-55] pounds each. The driver takes [2-6] crates off. How many pounds are left on the truck?
@1 makes [4-8] bracelets an hour. After [3-6] hours @1 sells all but [2-7] of them for $[3-6] each. How much money does @1 get?
A garden is [9-18] feet wide and [20-35] feet long. @1 walks around it [2-5] times. How many feet does @1 walk?
A library lends [45-95] books on Friday. On Saturday it lends [11-29] fewer. How many books does it lend on both days?
@1 watches [2-4] shows every day, and each show takes [20-45] minutes. How many minutes does @1 watch in [5-9] days?
A shop has [50-120] bottles of juice. It sells [6-14] bottles a day for [3-6] days and then gets [24-48] new ones. How many bottles does it have?
A bag of rice weighs [10-25] pounds. A family eats [2-3] pounds a week. How many pounds are left of [2-4] bags after [4-6] weeks?
@1 and @2 fold paper birds. @1 folds [9-16] birds an hour and @2 folds [5-8]. How many birds do they fold in [3-6] hours?"""

SETS = {"calibration": CALIBRATION, "evaluation": EVALUATION, "heal": CALIBRATION}


def fill(template: str, rng: random.Random) -> str:
    """Return the template with two names and with numbers."""
    first, second = rng.sample(NAMES.split(), 2)
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
