"""Serve the tiny model without a part of the plugin, or with a planted defect: what does vLLM do?

    python benchmarks/gaps.py --runs gpu --out benchmarks/results/gaps_h200.json
    python benchmarks/gaps.py --runs cpu --out benchmarks/results/doctor_defects_cpu.json

A run plants a defect of `tests/serving/doctor_defects.py` into the spliced model (INT4 experts,
rounded to nearest) and serves it by a copy of the package in which one remedy may be taken out. It
records the error that ended the server, or the acceptance and how many greedy texts equal those of
the first run, which lacks nothing. `lenient` runs do not count what was loaded. Runs that `--out`
has are not done again. `two ranks` needs two GPUs.
"""

import json
import os
import shutil
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from record import MODEL, arguments, write_result

import mtp_graft
from mtp_graft.errors import GraftError
from mtp_graft.serving.command import ServeOptions, find_vllm
from mtp_graft.serving.metrics import drafting_result
from mtp_graft.serving.server import managed_server
from mtp_graft.stages.calibration import load_calibration
from mtp_graft.stages.splice import splice

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

#: The remedies, and what is served on a GPU and on a CPU.
PLAN = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())


def package_without(remedy: str, scratch: Path) -> Path:
    """Copy the package, take one remedy out, and return the folder to import it from."""
    folder = scratch / "package"
    shutil.copytree(Path(mtp_graft.__file__).parent, folder / "mtp_graft")
    file, old, new = (PLAN["remedies"][remedy].get(key) for key in ("file", "old", "new"))
    path = folder / "mtp_graft" / "vllm_plugin" / file
    code = path.read_text()
    if old is not None and old not in code:
        raise GraftError(f"{file}: has no {old!r}; expected the remedy {remedy}")
    path.write_text(code + new if old is None else code.replace(old, new))
    return folder


def measure(run: Any, scratch: Path, log: Path, where: str) -> dict[str, Any]:
    """Do one run; return its error, or its texts and what was accepted."""
    from serving.doctor_defects import DEFECTS

    checkpoint = scratch / "checkpoint"
    splice(MODEL / "base", MODEL / "upstream", checkpoint, "rtn", copy=True)
    if "defect" in run:
        DEFECTS[run["defect"]][1](checkpoint)
    chosen = PLAN[where]["options"] | run.get("options", {})
    if "without" in run:
        path = [str(package_without(run["without"], scratch)), os.environ.get("PYTHONPATH", "")]
        chosen["environment"] = {"PYTHONPATH": os.pathsep.join(path)}
    options = ServeOptions(checkpoint, port=0, max_model_len=1024, max_num_seqs=4, **chosen)
    try:
        with managed_server(options, log) as client:
            before = client.spec_decode_counters()
            texts = [
                client.complete(client.encode(prompt), 128, ignore_eos=True)
                for prompt in load_calibration(str(MODEL / "prompts.jsonl"), 12)
            ]
            after = client.spec_decode_counters()
    except GraftError as error:
        return {"error": str(error).replace(str(scratch), "")[-1500:]}
    assert before is not None and after is not None
    counted = after - before
    return {
        "acceptance": counted.acceptance,
        **drafting_result(counted),
        "texts": [list(text) for text in texts],
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--runs", choices=("gpu", "cpu"), required=True)
    parser.add_argument("--only", nargs="+", metavar="RUN")
    asked = parser.parse_args()
    runs = PLAN[asked.runs]["runs"]
    found = json.loads(asked.out.read_text())["results"] if asked.out.exists() else {}
    logs = asked.out.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for name in asked.only or runs:
        if name in found:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            log = logs / f"gaps-{name.replace(' ', '-').replace(',', '').replace(':', '')}.log"
            found[name] = measure(runs[name], Path(scratch), log, asked.runs)
        reference = found.get(next(iter(runs)), {}).get("texts")
        for result in found.values():
            if reference and "texts" in result:
                pairs = zip(reference, result["texts"], strict=True)
                result["equal_texts"] = sum(one == other for one, other in pairs)
        print(name, str({k: v for k, v in found[name].items() if k != "texts"}), file=sys.stderr)
        write_result(asked.out, "gaps", found, vllm=str(find_vllm().version))


if __name__ == "__main__":
    main()
