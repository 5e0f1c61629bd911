"""Serve the tiny model without a part of the plugin, or with a planted defect: what does vLLM do?

    python benchmarks/gaps.py --runs gpu --out benchmarks/results/gaps_h200.json
    python benchmarks/gaps.py --runs cpu --out benchmarks/results/doctor_defects_cpu.json

A run plants a defect of `tests/serving/doctor_defects.py` into the spliced model (INT4 experts,
rounded to nearest) and serves it by a copy of the package in which one remedy may be taken out. It
records the error that ended the server, or the acceptance and how many greedy texts equal those of
the first run, which lacks nothing. `lenient` runs do not count what was loaded. Runs that `--out`
has are not done again. `two ranks` needs two GPUs.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
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

#: remedy: file in the package, what is replaced there, by what (None: appended).
REMEDIES = {
    "compressors": ("strict_loading.py", "decode_compressors(base)", "base"),
    "strict_loading": (
        "strict_loading.py",
        None,
        "\n\ndef load_strictly(model, weights, load, shared=()):\n    return load(weights)\n",
    ),
}


@dataclass(frozen=True)
class Run:
    """One server: what it lacks, what is wrong with its checkpoint, and how it is started."""

    without: str | None = None
    defect: str = "none"
    options: Mapping[str, Any] = field(default_factory=dict)  # of `ServeOptions`


GPU_RUNS = {
    "complete": Run(),
    "no plugin": Run(options={"environment": {"VLLM_PLUGINS": ""}}),
    "FP8 compressor": Run(defect="fp8-compressor"),
    "FP8 compressor, no decoding": Run("compressors", "fp8-compressor"),
    "misnamed experts": Run(defect="gate-up-down-names"),
    "misnamed experts, not strict": Run("strict_loading", "gate-up-down-names"),
    "missing parameter, not strict": Run("strict_loading", "missing-parameter"),
    "two ranks": Run(options={"tensor_parallel_size": 2}),
}
STRICT = (
    *("none", "wrong-group-size-in-config", "gate-up-down-names", "missing-scale", "scale-inv"),
    *("wrong-group", "rounded-float32", "no-head-count", "head-compressed", "wrong-dtype"),
    *("wrong-shape", "head-count-0", "fp8-compressor", "one-family-of-names", "unanchored-ignore"),
    *("ignore-takes-the-head", "target-for-mtp", "shard-not-in-index"),
)
LENIENT = ("gate-up-down-names", "missing-parameter", "entry-without-tensor", "missing-scale")
#: Of a checkpoint whose head is not in the index the command would say that there is none.
DRAFTING = {
    "num_speculative_tokens": 0,
    "extra_args": ("--speculative-config", '{"method":"mtp","num_speculative_tokens":1}'),
}
CPU_RUNS = {f"strict: {defect}": Run(defect=defect) for defect in STRICT} | {
    "strict: shard-not-in-index": Run(defect="shard-not-in-index", options=DRAFTING),
    **{f"lenient: {defect}": Run("strict_loading", defect) for defect in LENIENT},
}
#: By what they run on: little memory on a GPU, so that several fit.
RUNS = {"gpu": GPU_RUNS, "cpu": CPU_RUNS}
OPTIONS: dict[str, dict[str, Any]] = {
    "gpu": {"num_speculative_tokens": 3, "kv_cache_gib": 2.0, "gpu_memory_utilization": 0.1},
    "cpu": {"num_speculative_tokens": 1},
}


def package_without(remedy: str, scratch: Path) -> Path:
    """Copy the package, take one remedy out, and return the folder to import it from."""
    folder = scratch / "package"
    shutil.copytree(Path(mtp_graft.__file__).parent, folder / "mtp_graft")
    name, old, new = REMEDIES[remedy]
    file = folder / "mtp_graft" / "vllm_plugin" / name
    code = file.read_text()
    if old is not None and old not in code:
        raise GraftError(f"{name}: has no {old!r}; expected the remedy {remedy}")
    file.write_text(code + new if old is None else code.replace(old, new))
    return folder


def measure(run: Run, scratch: Path, log: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Do one run; return its error, or its texts and what was accepted."""
    from serving.doctor_defects import DEFECTS

    checkpoint = scratch / "checkpoint"
    splice(MODEL / "base", MODEL / "upstream", checkpoint, "rtn", copy=True)
    if run.defect != "none":
        DEFECTS[run.defect][1](checkpoint)
    chosen = OPTIONS[asked.runs] | dict(run.options)
    if run.without:
        path = [str(package_without(run.without, scratch)), os.environ.get("PYTHONPATH", "")]
        chosen["environment"] = {"PYTHONPATH": os.pathsep.join(path)}
    options = ServeOptions(checkpoint, port=0, max_model_len=1024, max_num_seqs=4, **chosen)
    try:
        with managed_server(options, log) as client:
            before = client.spec_decode_counters()
            texts = [
                client.complete(client.encode(prompt), asked.max_tokens, ignore_eos=True)
                for prompt in load_calibration(str(MODEL / "prompts.jsonl"), asked.prompts)
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
    parser.add_argument("--runs", choices=RUNS, required=True)
    parser.add_argument("--only", nargs="+", metavar="RUN")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--max-tokens", type=int, default=128)
    asked = parser.parse_args()
    runs = RUNS[asked.runs]
    found = json.loads(asked.out.read_text())["results"] if asked.out.exists() else {}
    logs = asked.out.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for name in asked.only or runs:
        if name in found:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            log = logs / f"gaps-{name.replace(' ', '-').replace(',', '').replace(':', '')}.log"
            found[name] = measure(runs[name], Path(scratch), log, asked)
        reference = found.get(next(iter(runs)), {}).get("texts")
        for result in found.values():
            if reference and "texts" in result:
                pairs = zip(reference, result["texts"], strict=True)
                result["equal_texts"] = sum(one == other for one, other in pairs)
        print(name, str({k: v for k, v in found[name].items() if k != "texts"}), file=sys.stderr)
        write_result(asked.out, "gaps", found, vllm=str(find_vllm().version))


if __name__ == "__main__":
    main()
