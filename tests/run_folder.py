"""A run folder made by hand, of real result files where the repository has them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtp_graft.bench.drafting import drafting_result
from mtp_graft.checkpoint import quant_manifest
from mtp_graft.checkpoint.manifest import fingerprints
from mtp_graft.checkpoint.quantization_config import add_head
from mtp_graft.dsv4.acceptance import wilson_interval
from mtp_graft.serving.metrics import SpecDecodeCounters

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


def recorded(benchmark: str) -> dict[str, Any]:
    """Return the results of one run of `bench decode` or `bench sweep`, kept for the tests."""
    found: dict[str, Any] = json.loads((TESTS / f"bench_results/{benchmark}.json").read_text())
    return found


def manifest(stage: str, device: str, vllm: str = "0.33.0", seconds: float = 61.5) -> Any:
    return {
        "stage": stage,
        "inputs": {"/home/someone/secret/file": "0" * 64},
        "git_commit": "91ae5e8c0ffee",
        "versions": {"python": "3.12.1", "vllm": vllm, "torch": "2.13.0"},
        "device": device,
        "seconds": seconds,
    }


def quantize_report() -> dict[str, Any]:
    rel_errors = {"rtn": 0.0945, "gptq": 0.054, "mxfp4": 0.0, "bf16": 0.0}
    bits = {"rtn": 4.125, "gptq": 4.125, "mxfp4": 4.25, "bf16": 16.0}
    counts = [175376, 431, 0, 0]
    return {
        "variants": {
            v: {"bits_per_weight": bits[v], "rel_error": e, "bytes": int(1e6 * bits[v])}
            for v, e in rel_errors.items()
        },
        "tokens_per_expert": {"min": 0, "mean": 43951.75, "max": 175376, "zero": 2}
        | {"counts": counts},
        "rel_errors": {v: {m: [e] * 4 for m in ("w1", "w2", "w3")} for v, e in rel_errors.items()},
        "zero_token_policy": "pool",
        "experts_without_tokens": [2, 3],
        "damp": 0.01,
        "damping": "tokens",
        "group_size": 128,
        "order": "stored",
        "scale": "mse",
        "calibration_tokens": 473216,
        "replay": "true attention",
        "seconds": {"hessian": 1.31, "gptq": 2.72, "io": 0.43},
        "peak_gpu_bytes": 0,
        "peak_host_bytes": 570224640,
    }


CAPTURE = {
    "sequences": 320,
    "tokens": 591520,
    "dropped": [{"id": "essay", "split": "calibration", "tokens": 3100}],
    "tok_s": {"generate": 449.53, "prefill": 3587.2, "prefill_recording": 3241.8},
    "seconds": 1500.2,
    "folder": "/home/someone/run/capture",
}
VERIFIED = {
    **{"ok": True, "variant": "gptq", "tensors": 1575, "rel_error_max": 0.18928},
    **{"missing": [], "unexpected": [], "mismatched": []},
    **{"base_files_linked": True, "base_unchanged": True, "loaded_in_vllm": True},
}


def scored() -> dict[str, Any]:
    """Return the score stage's acceptance."""
    return {
        v: {
            "top1": (a - 20) / DRAFTED,
            "accepted": a - 20,
            "tokens": DRAFTED,
            "interval": wilson_interval(a - 20, DRAFTED),
        }
        for v, a in ACCEPTED.items()
    }


def served() -> dict[str, Any]:
    """Return what each head's server counted, with one draft a step."""
    return {
        v: drafting_result(SpecDecodeCounters(DRAFTED, DRAFTED, a, (a,)))
        for v, a in ACCEPTED.items()
    }


def decoded() -> dict[str, Any]:
    """Return the pipeline's own comparison of base and MTP."""
    mtp = recorded("decode")
    base = mtp.pop("against")
    mtp.pop("ratio")  # servers did not take turns
    return {"base": base, "mtp": mtp, "greedy_identical": True, "divergences": []}


def checkpoint(folder: Path, variant: str = "gptq") -> None:
    """Write what a spliced checkpoint has, its shards being a few bytes."""
    config = json.loads((ROOT / "models/tiny-dsv4/base/config.json").read_text())
    experts: Any = variant if variant in ("mxfp4", "bf16") else "int4"
    config["quantization_config"] = add_head(config["quantization_config"], 4, experts, "base")
    content = quant_manifest.manifest(
        variant,  # type: ignore[arg-type]
        "base",
        config,
        quantize_report(),
        {"base": {"config.json": "2" * 64}},
        1575,
        3_550_000_123,
    )
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
    splice = manifest("splice", GPU) | {"config": {"variant": variant, "linears": "base"}}
    write(run / "splice/manifest.json", splice)
    models = {"base": "pastapaul/DeepSeek-V4-Flash-W4A16-FP8", "upstream": "deepseek-ai/DeepSeek"}
    commits = {"base_commit": "ab" * 20, "upstream_commit": "cd" * 20}
    folders = {"base": "/home/someone/base", "upstream": "/home/someone/up"}
    write(run / "fetch/report.json", {**folders, **commits, "model": {"name": NAME, **models}})
    write(run / "capture/report.json", CAPTURE)
    write(run / "capture/manifest.json", manifest("capture", GPU, seconds=1502.25))
    write(run / "quantize/report.json", quantize_report())
    write(run / "quantize/manifest.json", manifest("quantize", "cuda", seconds=187.4))
    write(run / "score/report.json", {"acceptance": scored()})
    write(run / f"verify/{variant}.json", VERIFIED | {"variant": variant})
    write(run / "verify/manifest.json", manifest("verify", GPU))
    return folder


def pipeline_bench(run: Path) -> None:
    """Write the pipeline's own measurements."""
    write(run / "bench/decode.json", decoded())
    for variant, counted in served().items():
        write(run / f"bench/served-{variant}.json", counted)
    write(run / "bench/manifest.json", manifest("bench", GPU))


def bench(
    run: Path,
    folder: str,
    result: Mapping[str, Any],
    device: str | None = GPU,
    vllm: str = "0.33.0",
    **config: Any,
) -> Path:
    """Write a result of a bench command, as `--run` keeps it; `device` None leaves no manifest."""
    where = run / "bench" / folder
    write(where / "result.json", result)
    if device is not None:
        write(where / "manifest.json", manifest(f"bench {folder}", device, vllm))
    [head] = run.glob(f"splice/*/*/{HEAD}")
    profile = folder.partition("-")[2] or None
    server = {"files": fingerprints([head]), "max_model_len": None, "profile": profile}
    write(where / "config.json", {"server": server | {"extra_args": []}, "k": None, **config})
    return where


def everyday() -> dict[str, Any]:
    found = {"decode_tok_s": 90.8, "ttft_ms": 154.0, "acceptance": 0.718, "requests": 3}
    return found | {
        "requests": 6,
        "categories": {"chat": found | {"decode_tok_s": 88.8}, "coding": found},
        "tasks": [{"id": "chat-kettle", "category": "chat"}],
        "errors": 0,
        "failures": [],
    }


def evaluated(
    benchmark: str, correct: int, total: int, kinds: Mapping[str, int] | None = None
) -> dict[str, Any]:
    return {
        "benchmark": benchmark,
        "score": correct / total,
        "correct": correct,
        "total": total,
        "failures": [
            {"id": f"{benchmark}/{kind}/{n}", "kind": kind, "detail": "what the model wrote"}
            for kind, how_many in (kinds or {}).items()
            for n in range(how_many)
        ],
        "seconds": 678.25,
    }


def whole_run(run: Path) -> Path:
    """Write a run with a result of everything; return the checkpoint's folder."""
    folder = stages(run)
    pipeline_bench(run)
    decode, slower = recorded("decode"), recorded("decode")
    slower["ratio"]["decode_tok_s"] |= {"estimate": 1.62, "interval": [1.5512, 1.6951]}
    bench(run, "decode-128k", decode)
    bench(run, "decode-524k", slower, k=1)
    bench(run, "sweep-128k", recorded("sweep"))
    bench(run, "workload-524k", everyday())
    bench(run, "gsm8k", evaluated("gsm8k", 93, 100, {"wrong answer": 7}))
    kinds = {"NameError": 3, "AssertionError": 2, "AttributeError": 1}
    bench(run, "humaneval", evaluated("humaneval", 158, 164, kinds))
    bench(run, "mmlu", evaluated("mmlu", 53, 100, {"wrong answer": 41, "no answer found": 6}))
    bench(run, "capability", evaluated("capability", 13, 14, {"repetition": 1}))
    return folder
