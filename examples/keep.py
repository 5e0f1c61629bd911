"""Copy what a run's card is traced to: the JSON that it names, and the sizes of the other files.

    python examples/keep.py RUN OUT

Files keep their place, so that OUT is the run folder less what is large. The paths of RUN and of
the checkout are left out of them, and of failures the details, which quote the benchmarks.
"""

import json
import sys
from pathlib import Path

from mtp_graft.bench.card.cite import SIZE_POINTER
from mtp_graft.checkpoint.shards import write_json

CHECKOUT = Path(__file__).resolve().parent.parent


def keep(run: Path, out: Path) -> None:
    card = json.loads((run / "card/card.json").read_text())
    origins = [origin for number in card["numbers"] for origin in number["from"]]
    files = {o["file"] for o in origins if not o["file"].startswith("package:")}
    read = {o["file"] for o in origins if o["pointer"] != SIZE_POINTER} & files
    for file in sorted(read):
        keep_json(run, file, out)
    sizes = {file: (run / file).stat().st_size for file in sorted(files - read)}
    write_json(sizes, out / "sizes.json")


def keep_json(run: Path, file: str, out: Path) -> None:
    text = (run / file).read_text().replace(f"{run}/", "").replace(f"{CHECKOUT}/", "")
    found = json.loads(text)
    for failure in found.get("failures", ()):
        failure.pop("detail", None)
    (out / file).parent.mkdir(parents=True, exist_ok=True)
    write_json(found, out / file)


if __name__ == "__main__":
    run, out = (Path(argument).resolve() for argument in sys.argv[1:3])
    if (run / "card").exists():
        keep(run, out)
    else:  # the base's run: every benchmark
        for result in sorted(run.glob("bench/*/result.json")):
            for file in (result, result.with_name("manifest.json")):
                keep_json(run, str(file.relative_to(run)), out)
