"""A run folder made by hand, of real result files where the repository has them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtp_graft.bench.drafting import drafting_result
from mtp_graft.bench.workload import CATEGORIES, WorkloadConfig, workload_result
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
        "status": "done",
        "config": {},
        "inputs": {"/home/someone/secret/file": "0" * 64},
        "git_commit": "91ae5e8c0ffee",
        "versions": {"python": "3.12.1", "vllm": vllm, "torch": "2.13.0"},
        "device": device,
        "seconds": seconds,
        "peak_memory_bytes": 123,
    }


def quantize_report() -> dict[str, Any]:
    errors = {v: {m: [e, 1.1 * e] for m in ("w1", "w2", "w3")} for v, e in _ERRORS.items()}
    return {
        "variants": {
            v: {"bits_per_weight": bits, "rel_error": _ERRORS[v], "bytes": int(1e6 * bits)}
            for v, bits in {"rtn": 4.125, "gptq": 4.125, "mxfp4": 4.25, "bf16": 16.0}.items()
        },
        "tokens_per_expert": {"min": 431, "mean": 11093.7, "max": 175376, "zero": 2},
        "rel_errors": errors,
        "zero_token_policy": "pool",
        "experts_without_tokens": [3, 17],
        "damp": 0.01,
        "damping": "tokens",
        "group_size": 128,
        "order": "stored",
        "scale": "mse",
        "calibration_tokens": 473216,
        "replay": "true attention",
    }


_ERRORS = {"rtn": 0.0945, "gptq": 0.054, "mxfp4": 0.0, "bf16": 0.0}


def checkpoint(folder: Path, variant: str = "gptq") -> None:
    """Write what a spliced checkpoint has, its shards being a few bytes."""
    base = ROOT / "models/tiny-dsv4/base/config.json"
    config = json.loads(base.read_text())
    kinds: dict[str, Any] = {"mxfp4": "mxfp4", "bf16": "bf16"}
    experts = kinds.get(variant, "int4")
    config["quantization_config"] = add_head(config["quantization_config"], 4, experts, "base")
    provenance = {
        "base": {
            "model.safetensors.index.json": "1" * 64,
            "config.json": "2" * 64,
            "shard_headers": {
                "model-00001-of-00001.safetensors": {"sha256": "3" * 64, "bytes": 4096}
            },
        },
        "upstream": {"model-00046-of-00046.safetensors": "4" * 64},
        "quantize": {"report": "5" * 64, "experts": {"experts-0000.safetensors": "6" * 64}},
    }
    content = quant_manifest.manifest(
        variant,  # type: ignore[arg-type]
        "base",
        config,
        quantize_report(),
        provenance,
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
    write(run / "capture/report.json", {"sequences": 320, "tokens": 591520, "seconds": 1500.2})
    write(run / "capture/manifest.json", manifest("capture", GPU, seconds=1502.25))
    write(run / "quantize/report.json", quantize_report())
    write(run / "quantize/manifest.json", manifest("quantize", "cuda", seconds=187.4))
    write(run / "score/report.json", {"acceptance": scored()})
    verify = {
        "ok": True, "variant": variant, "tensors": 1575, "missing": [], "unexpected": [],
        "mismatched": [], "rel_error_max": 0.18928, "base_unchanged": True,
        "loaded_in_vllm": True,
    }  # fmt: skip
    write(run / f"verify/{variant}.json", verify)
    write(run / "verify/manifest.json", manifest("verify", GPU))
    return folder


def scored() -> dict[str, Any]:
    return {
        v: {
            "top1": (a - 20) / DRAFTED,
            "accepted": a - 20,
            "tokens": DRAFTED,
            "interval": list(wilson_interval(a - 20, DRAFTED)),
        }
        for v, a in ACCEPTED.items()
    }


def pipeline_bench(run: Path, device: str = GPU) -> None:
    """Write the pipeline's own measurements."""
    decode = recorded("decode")
    base, mtp = decode.pop("against"), decode
    speeds = {name: r["decode_tok_s"]["median"] for name, r in (("base", base), ("mtp", mtp))}
    found = {"base": base, "mtp": mtp, "decode_tok_s": speeds, "acceptance": 0.78}
    write(run / "bench/decode.json", found | {"greedy_identical": True, "divergences": []})
    for variant, accepted in ACCEPTED.items():
        served = {
            "acceptance": accepted / DRAFTED,
            "accepted": accepted,
            "drafted": DRAFTED,
            "interval": list(wilson_interval(accepted, DRAFTED)),
            **drafting_result(SpecDecodeCounters(DRAFTED, DRAFTED, accepted, (accepted,))),
        }
        write(run / f"bench/served-{variant}.json", served)
    write(run / "bench/manifest.json", manifest("bench", device))


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
    tasks = [
        {
            "id": f"{category}-{number}", "category": category, "prompt_tokens": 900,
            "completion_tokens": 310 + 7 * number, "decoded_tokens": 300 + 7 * number,
            "decode_s": 3.5 + 0.11 * number, "decode_tok_s": 83.1 + 1.7 * number + len(category),
            "ttft_ms": 151.0 + 3 * number, "drafted": 170, "accepted": 121 + number,
            "finish_reason": "stop",
        }
        for category in CATEGORIES
        for number in range(3)
    ]  # fmt: skip
    return workload_result(tasks, WorkloadConfig()) | {"errors": 0, "failures": []}


def evaluated(
    benchmark: str, correct: int, total: int, kinds: Mapping[str, int] | None = None
) -> dict[str, Any]:
    return {
        "benchmark": benchmark,
        "score": correct / total,
        "correct": correct,
        "total": total,
        "interval": list(wilson_interval(correct, total)),
        "failures": [],
        "kinds": dict(kinds or {}),
        "seconds": 678.25,
        "categories": {},
        "retried": {"timeout": 2},
        "settings": {"limit": total, "seed": 0, "max_tokens": 1024, "thinking": False,
                     "concurrency": 4},
    }  # fmt: skip


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
