"""Serve the tiny model on a GPU without each of the plugin's remedies: which does vLLM still need?

    python benchmarks/gaps.py --out benchmarks/results/gaps_h200.json [--only RUN ...]

Every run serves a checkpoint with k = 3, by a copy of the package in which one remedy is taken out,
and asks for the same greedy texts. It records the error that ended the server, or the acceptance by
position and how many texts equal those of the complete plugin (run `complete`, which comes first).
Runs that `--out` has are not done again. `two ranks` runs need two GPUs.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from record import write_result

import mtp_graft
from mtp_graft.errors import GraftError
from mtp_graft.serving.command import ServeOptions, find_vllm
from mtp_graft.serving.metrics import SpecDecodeCounters
from mtp_graft.serving.server import managed_server
from mtp_graft.stages.calibration import load_calibration
from mtp_graft.stages.splice import splice

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "tiny-dsv4"
sys.path.insert(0, str(ROOT / "tests"))

#: Little, so that several runs fit one GPU.
MEMORY = {"kv_cache_gib": 2.0, "gpu_memory_utilization": 0.1}
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
    defect: str = "none"  # of tests/serving/doctor_defects.py
    ranks: int = 1
    forked: bool = False  # an offline engine, as `LLM(...)` starts it, instead of a server
    environment: Mapping[str, str] = field(default_factory=dict)


RUNS = {
    "complete": Run(),
    "no plugin": Run(environment={"VLLM_PLUGINS": ""}),
    "FP8 compressor": Run(defect="fp8-compressor"),
    "FP8 compressor, no decoding": Run("compressors", "fp8-compressor"),
    "misnamed experts": Run(defect="gate-up-down-names"),
    "misnamed experts, not strict": Run("strict_loading", "gate-up-down-names"),
    "missing parameter, not strict": Run("strict_loading", "missing-parameter"),
    "forked": Run(forked=True),
    "two ranks": Run(ranks=2),
}

OFFLINE = """
import json, sys
from vllm import LLM, SamplingParams
asked = json.loads(sys.argv[1])
llm = LLM(**asked["engine"])
sampling = SamplingParams(temperature=0, max_tokens=asked["max_tokens"], ignore_eos=True)
texts = [
    list(llm.generate({"prompt_token_ids": p}, sampling, use_tqdm=False)[0].outputs[0].token_ids)
    for p in asked["prompts"]
]
found = {m.name: getattr(m, "value", getattr(m, "values", None)) for m in llm.get_metrics()}
names = ("drafts", "draft_tokens", "accepted_tokens", "accepted_tokens_per_pos")
with open(asked["out"], "w") as out:  # standard output is the engine's, too
    json.dump([texts, [found[f"vllm:spec_decode_num_{n}"] for n in names]], out)
"""


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


def ask_server(run: Run, checkpoint: Path, log: Path, asked: argparse.Namespace) -> Any:
    """Return the texts and the counters of a server."""
    options = ServeOptions(
        checkpoint,
        port=0,
        max_model_len=1024,
        max_num_seqs=4,
        tensor_parallel_size=run.ranks,
        num_speculative_tokens=3,
        **MEMORY,
        environment=run.environment,
    )
    with managed_server(options, log) as client:
        before = client.spec_decode_counters()
        texts = [
            client.complete(client.encode(prompt), asked.max_tokens, ignore_eos=True)
            for prompt in load_calibration(str(MODEL / "prompts.jsonl"), asked.prompts)
        ]
        after = client.spec_decode_counters()
    assert before is not None and after is not None
    return texts, after - before


def ask_offline(checkpoint: Path, log: Path, asked: argparse.Namespace) -> Any:
    """Return the texts and the counters of an engine that is forked."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    prompts = load_calibration(str(MODEL / "prompts.jsonl"), asked.prompts)
    engine = {
        "model": str(checkpoint),
        "tokenizer_mode": "deepseek_v4",
        "kv_cache_dtype": "fp8",
        "block_size": 256,
        "max_model_len": 1024,
        "max_num_seqs": 4,
        "gpu_memory_utilization": MEMORY["gpu_memory_utilization"],
        "kv_cache_memory_bytes": int(MEMORY["kv_cache_gib"] * 2**30),
        "disable_log_stats": False,
        "speculative_config": {"method": "mtp", "num_speculative_tokens": 3},
    }
    out = checkpoint.parent / "texts.json"
    work = {
        "out": str(out),
        "engine": engine,
        "max_tokens": asked.max_tokens,
        "prompts": [tokenizer.encode(p.content, add_special_tokens=False).ids for p in prompts],
    }
    with log.open("w") as stream:
        done = subprocess.run(
            [sys.executable, "-c", OFFLINE, json.dumps(work)],
            env=os.environ | {"VLLM_PLUGINS": "mtp_graft", "HF_HUB_OFFLINE": "1"},
            stdout=stream,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        raise GraftError("\n".join(log.read_text().splitlines()[-12:]))
    texts, (drafts, tokens, accepted, positions) = json.loads(out.read_text())
    counted = SpecDecodeCounters(int(drafts), int(tokens), int(accepted), tuple(positions))
    return [tuple(text) for text in texts], counted


def measure(run: Run, scratch: Path, log: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Do one run; return its error, or its texts and what was accepted."""
    from serving.doctor_defects import DEFECTS

    checkpoint = scratch / "checkpoint"
    splice(MODEL / "base", MODEL / "upstream", checkpoint, "rtn", copy=True)
    if run.defect != "none":
        DEFECTS[run.defect][1](checkpoint)
    before = os.environ.get("PYTHONPATH", "")
    if run.without:
        folder = package_without(run.without, scratch)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), before])
    try:
        work = (checkpoint, log, asked)
        texts, counted = ask_offline(*work) if run.forked else ask_server(run, *work)
    except GraftError as error:
        return {"error": str(error).replace(str(scratch), "")[-1500:]}
    finally:
        os.environ["PYTHONPATH"] = before
    return {
        "accepted": counted.num_accepted_tokens,
        "drafted": counted.num_draft_tokens,
        "acceptance_by_position": counted.acceptance_by_position,
        "texts": [list(text) for text in texts],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", metavar="RUN", choices=RUNS, default=list(RUNS))
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--max-tokens", type=int, default=128)
    asked = parser.parse_args()
    found = json.loads(asked.out.read_text())["results"] if asked.out.exists() else {}
    logs = asked.out.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for name in asked.only:
        if name in found:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            log = logs / f"gaps-{name.replace(' ', '-').replace(',', '')}.log"
            found[name] = measure(RUNS[name], Path(scratch), log, asked)
        reference = found.get("complete", {}).get("texts")
        for result in found.values():
            if reference and "texts" in result:
                pairs = zip(reference, result["texts"], strict=True)
                result["equal_texts"] = sum(one == other for one, other in pairs)
        print(name, str({k: v for k, v in found[name].items() if k != "texts"}), file=sys.stderr)
        write_result(asked.out, "gaps", found, vllm=str(find_vllm().version))


if __name__ == "__main__":
    main()
