"""How fast a server of the base reads captured texts, recording them and not, in turn.

    python benchmarks/recording.py RECIPE --run RUN --url URL --folder FOLDER --out result.json

RUN is the recipe's, with a capture. The server has MTP_GRAFT_RECORD=FOLDER and computes prompts
whole, without prefix caching. It is asked as by the capture stage; the first turn warms up.
"""

import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

from record import arguments, write_result

from mtp_graft.checkpoint.capture import RECORDINGS, TEXTS_NAME, read_texts
from mtp_graft.recipe import load_recipe
from mtp_graft.serving.client import ServerClient
from mtp_graft.stages import capture


def main() -> None:
    parser = arguments(__doc__)
    for name in ("recipe", "--run", "--folder"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--url", required=True)
    options = parser.parse_args()
    settings, folder = load_recipe(options.recipe).capture, options.folder
    tokens = sum(len(text.token_ids) for text in read_texts(options.run / "capture"))
    off = {"_recording": lambda _: nullcontext(), "_collect": lambda *_: None}
    found: dict[str, list[float]] = {"off": [], "on": []}
    with ServerClient(options.url) as client:
        for turn in range(7):
            shutil.rmtree(folder, ignore_errors=True)
            (folder / RECORDINGS).mkdir(parents=True)
            shutil.copy(options.run / "capture" / TEXTS_NAME, folder)
            with nullcontext() if turn % 2 else patch.multiple(capture, **off):
                began = time.perf_counter()
                capture._record(client, folder, settings, lambda *_: None)
                found["on" if turn % 2 else "off"].append(tokens / (time.perf_counter() - began))
    results = {"tokens": tokens, "warm_up_tok_s": found["off"].pop(0), "tok_s": found}
    write_result(options.out, "recording", results)


if __name__ == "__main__":
    main()
