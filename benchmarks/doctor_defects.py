"""Serve checkpoints with a planted defect, to see what vLLM does without doctor.

    python benchmarks/doctor_defects.py --out benchmarks/results/doctor_defects_cpu.json

Every defect of `tests/serving/doctor_defects.py` that is named below is planted into the spliced
tiny model (INT4 experts, rounded to nearest), which is then served on the CPU with k = 1. A run is
the error that ended the server, or the acceptance on the first prompts and a hash of the texts. A
defect that leaves the base as it is leaves the hash as it is for `none`. `lenient` runs use a copy
of the package whose strict loading is taken out: what then happens is what happens to a load that
nobody counts. That copy's drafter is our own, not vLLM's. Runs that `--out` has already are not
done again.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from record import write_result

import mtp_graft
from mtp_graft.errors import GraftError
from mtp_graft.serving.command import ServeOptions, find_vllm
from mtp_graft.serving.server import managed_server
from mtp_graft.stages.calibration import load_calibration
from mtp_graft.stages.splice import splice

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "tiny-dsv4"
sys.path.insert(0, str(ROOT / "tests"))

#: (mode, defect), the most telling first.
RUNS = (
    ("strict", "none"),
    ("strict", "wrong-group-size-in-config"),
    ("lenient", "gate-up-down-names"),
    ("lenient", "missing-parameter"),
    ("strict", "gate-up-down-names"),
    ("strict", "missing-scale"),
    ("strict", "scale-inv"),
    ("strict", "wrong-group"),
    ("strict", "rounded-float32"),
    ("strict", "no-head-count"),
    ("strict", "head-compressed"),
    ("strict", "wrong-dtype"),
    ("strict", "wrong-shape"),
    ("lenient", "entry-without-tensor"),
    ("lenient", "missing-scale"),
    ("strict", "head-count-0"),
    ("strict", "fp8-compressor"),
    ("strict", "one-family-of-names"),
    ("strict", "unanchored-ignore"),
    ("strict", "ignore-takes-the-head"),
    ("strict", "target-for-mtp"),
    ("strict", "shard-not-in-index"),
)
NO_COUNTING = """

def load_strictly(model, weights, load, shared=()):
    return load(weights)
"""


@contextmanager
def lenient_package(scratch: Path) -> Iterator[None]:
    """Let servers import a copy of the package that does not count what was loaded."""
    copy = scratch / "lenient" / "mtp_graft"
    shutil.copytree(Path(mtp_graft.__file__).parent, copy, dirs_exist_ok=True)
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
    prompts = load_calibration(str(MODEL / "prompts.jsonl"), asked.prompts)
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
        "texts_sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    results = json.loads(options.out.read_text())["results"] if options.out.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        good = scratch / "good"
        splice(MODEL / "base", MODEL / "upstream", good, "rtn", copy=True)
        for mode, defect in RUNS:
            run = f"{mode}: {defect}"
            if run in results:
                continue
            with lenient_package(scratch) if mode == "lenient" else nullcontext():
                results[run] = serve(good, defect, scratch, options)
            print(run, str(results[run])[:300], file=sys.stderr, flush=True)
            write_result(options.out, "doctor_defects", results, vllm=str(find_vllm().version))


if __name__ == "__main__":
    main()
