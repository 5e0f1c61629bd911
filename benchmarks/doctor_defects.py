"""Serve checkpoints with a planted defect, to see what vLLM does without doctor.

    python benchmarks/doctor_defects.py --out benchmarks/results/doctor_defects_cpu.json

Every defect of `tests/serving/doctor_defects.py` that is named below is planted into the spliced
tiny model (INT4 experts, rounded to nearest), which is then served on the CPU with k = 1. A run
is the error that ended the server, or the acceptance on the first prompts and whether the texts
are those of the checkpoint without a defect. `lenient` runs use a
copy of the package whose strict loading is taken out: what then happens is what happens to a load
that nobody counts. That copy's drafter is our own, not vLLM's.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from record import write_result

import mtp_graft
from mtp_graft.errors import GraftError
from mtp_graft.serving.command import ServeOptions
from mtp_graft.serving.prompts import load_prompts
from mtp_graft.serving.server import managed_server
from mtp_graft.stages.splice import splice

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "tiny-dsv4"
sys.path.insert(0, str(ROOT / "tests"))

STRICT = (
    "none",
    "shard-not-in-index",
    "unanchored-ignore",
    "ignore-takes-the-head",
    "target-for-mtp",
    "one-family-of-names",
    "wrong-group-size-in-config",
    "head-count-0",
    "no-head-count",
    "head-compressed",
    "fp8-compressor",
    "scale-inv",
    "gate-up-down-names",
    "missing-scale",
    "wrong-dtype",
    "wrong-shape",
    "wrong-group",
    "rounded-float32",
)
LENIENT = (
    "missing-parameter",
    "missing-scale",
    "entry-without-tensor",
    "gate-up-down-names",
    "scale-inv",
)
NO_COUNTING = """

def load_strictly(model, weights, load, shared=()):
    return load(weights)
"""


@contextmanager
def lenient_package(scratch: Path) -> Iterator[None]:
    """Let servers import a copy of the package that does not count what was loaded."""
    copy = scratch / "lenient" / "mtp_graft"
    shutil.copytree(Path(mtp_graft.__file__).parent, copy)
    with (copy / "vllm_plugin" / "strict_loading.py").open("a") as file:
        file.write(NO_COUNTING)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(copy.parent)
    try:
        yield
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def serve(good: Path, defect: str, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Plant, serve, ask; return the error or the acceptance."""
    from serving.doctor_defects import DEFECTS

    folder = scratch / defect
    shutil.copytree(good, folder)
    if defect != "none":
        DEFECTS[defect][1](folder)
    settings: dict[str, Any] = {}
    if defect == "shard-not-in-index":  # the command would find no head to draft with
        draft = '{"method":"mtp","num_speculative_tokens":1}'
        settings = {"num_speculative_tokens": 0, "extra_args": ("--speculative-config", draft)}
    try:
        return ask(ServeOptions(folder, port=0, max_model_len=1024, **settings), scratch, options)
    except GraftError as error:
        return {"error": str(error).replace(str(scratch), "")}
    finally:
        shutil.rmtree(folder)


def ask(options: ServeOptions, scratch: Path, asked: argparse.Namespace) -> dict[str, Any]:
    prompts = load_prompts(MODEL / "prompts.jsonl", asked.prompts)
    with managed_server(options, scratch / "server.log") as client:
        before = client.spec_decode_counters()
        texts = [
            client.complete(client.encode(prompt), asked.max_tokens, ignore_eos=True)
            for prompt in prompts
        ]
        after = client.spec_decode_counters()
        assert before is not None and after is not None
        gained = after - before
    return {
        "acceptance": gained.acceptance,
        "accepted": gained.num_accepted_tokens,
        "drafted": gained.num_draft_tokens,
        "texts": texts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    results: dict[str, dict[str, Any]] = {"strict": {}, "lenient": {}}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        good = scratch / "good"
        splice(MODEL / "base", MODEL / "upstream", good, "rtn", copy=True)
        for defect in STRICT:
            results["strict"][defect] = serve(good, defect, scratch, options)
            print(defect, str(results["strict"][defect])[:400], file=sys.stderr, flush=True)
        with lenient_package(scratch):
            for defect in LENIENT:
                results["lenient"][defect] = serve(good, defect, scratch, options)
                print(
                    "lenient",
                    defect,
                    str(results["lenient"][defect])[:400],
                    file=sys.stderr,
                    flush=True,
                )
    without_defect = results["strict"]["none"]["texts"]
    for result in (*results["strict"].values(), *results["lenient"].values()):
        if "texts" in result:
            result["same_texts"] = result.pop("texts") == without_defect
    write_result(options.out, "doctor_defects", results)


if __name__ == "__main__":
    main()
