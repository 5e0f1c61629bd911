"""What a spliced checkpoint says about its head: MTP_QUANT_MANIFEST.json and .md, recipe.yaml.

All of it is a function of the inputs: no times, dates, versions or paths, so that the same inputs
give the same bytes.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from mtp_graft.checkpoint.files import read_object, sha256
from mtp_graft.checkpoint.quantization_config import scheme_of
from mtp_graft.checkpoint.shards import INDEX_NAME
from mtp_graft.errors import GraftError
from mtp_graft.recipe import Linears

MANIFEST_NAME = "MTP_QUANT_MANIFEST.json"
MANIFEST_TEXT_NAME = "MTP_QUANT_MANIFEST.md"
RECIPE_NAME = "recipe.yaml"
REPORT_NAME = "report.json"

_METHODS = {
    "rtn": "round to nearest: symmetric INT4, one BF16 scale a group, no calibration",
    "gptq": "GPTQ (Frantar et al., 2022), Cholesky form: symmetric INT4, one BF16 scale a group",
    "mxfp4": "kept: the upstream MXFP4 codes and scales, bit for bit",
    "bf16": "decoded: the upstream MXFP4 values, which BF16 holds exactly",
}
#: What of the quantize report depends on the capture and the settings alone.
_REPORT_KEYS = (
    "variants",
    "tokens_per_expert",
    "rel_errors",
    "zero_token_policy",
    "experts_without_tokens",
    "damp",
    "damping",
    "group_size",
    "order",
    "scale",
    "calibration_tokens",
    "replay",
)
_FP8, _BF16 = "upstream FP8 codes, scales as BF16 (exact)", "upstream FP8 decoded to BF16 (exact)"


def read_report(quantized: Path) -> dict[str, Any]:
    """Return the lasting part of `quantized/report.json`.

    Raises GraftError if the quantize stage has not finished, or left a part out.
    """
    path = quantized / REPORT_NAME
    if not path.exists():
        raise GraftError(f"{path}: not found; run `mtp-graft quantize` to its end")
    report = read_object(path, "a report of `mtp-graft quantize`")
    try:
        return {key: report[key] for key in _REPORT_KEYS}
    except KeyError as error:
        raise GraftError(
            f"{path}: not a report of `mtp-graft quantize` (has no {error})"
        ) from error


def manifest(
    variant: str,
    linears: Linears,
    config: Mapping[str, Any],
    report: Mapping[str, Any] | None,
    provenance: Mapping[str, Any],
    num_tensors: int,
    num_bytes: int,
) -> dict[str, Any]:
    """Return the content of MTP_QUANT_MANIFEST.json.

    `config` is the new checkpoint's config.json, `report` what `read_report` gives, or None.
    """
    layer = config["num_hidden_layers"]
    expert = f"model.layers.{layer}.ffn.experts.0.w1"
    scheme = scheme_of(config["quantization_config"], expert)
    calibrated = variant == "gptq" and report is not None
    return {
        "variant": variant,
        "is_final_quality_preserving": calibrated or variant in ("mxfp4", "bf16"),
        "method": _METHODS[variant],
        "routed_experts": {
            "count": config["n_routed_experts"],
            "format": "bfloat16" if scheme is None else scheme.get("format"),
            "weights": None if scheme is None else scheme["weights"],
        },
        "other_tensors": _other_tensors(linears),
        "tensors": num_tensors,
        "bytes": num_bytes,
        "calibration": _calibration(report) if calibrated and report else None,
        "rel_error": None if report is None else _rel_error(variant, report),
        "provenance": dict(provenance),
    }


def _other_tensors(linears: Linears) -> dict[str, str]:
    """Return what became of the tensors that are no routed expert's."""
    return {
        "attn.{wq_a,wq_b,wkv,wo_a,wo_b}": _FP8,
        "e_proj, h_proj": _BF16 if linears == "bf16" else _FP8,
        "ffn.shared_experts.{w1,w2,w3}": _FP8 if linears == "fp8" else _BF16,
        "norms, gate, attn_sink, hc_*": "as upstream, F32 kept F32",
    }


def _calibration(report: Mapping[str, Any]) -> dict[str, Any]:
    keys = (
        *("damp", "damping", "group_size", "order", "scale"),
        *("calibration_tokens", "tokens_per_expert", "replay"),
    )
    policy = ("zero_token_policy", "experts_without_tokens")
    return {key: report[key] for key in (*keys, *policy)}


def _rel_error(variant: str, report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the Hessian-weighted error's mean, and mean and maximum over experts a matrix."""
    summary = report["variants"].get(variant)
    if summary is None:
        return None
    matrices = {
        matrix: {"mean": fmean(errors), "max": max(errors), "per_expert": errors}
        for matrix, errors in report["rel_errors"].get(variant, {}).items()
    }
    return {"mean": summary["rel_error"], **matrices}


def _damp(calibration: Mapping[str, Any]) -> str:
    least = calibration["damp"]
    return str(least) if calibration["damping"] == "fixed" else f"inputs / tokens, at least {least}"


def base_provenance(base: Path, shards: list[str]) -> dict[str, Any]:
    """Return the hashes of a base's index, config and shard headers, and the shards' sizes.

    Hashing every shard whole would take longer than all the rest; a header has every tensor's
    name, dtype, shape and place.
    """
    return {
        INDEX_NAME: sha256(base / INDEX_NAME),
        "config.json": sha256(base / "config.json"),
        "shard_headers": {
            name: {"sha256": sha256_header(base / name), "bytes": (base / name).stat().st_size}
            for name in sorted(shards)
        },
    }


def upstream_provenance(upstream: Path, shards: list[str]) -> dict[str, str]:
    """Return the hashes of the shards that hold the head, whole."""
    return {name: sha256(upstream / name) for name in sorted(shards)}


def quantize_provenance(report: Mapping[str, Any], expert_files: list[Path]) -> dict[str, Any]:
    """Return the hashes of the quantize stage's output, the report's as canonical JSON."""
    text = json.dumps(report, sort_keys=True, separators=(",", ":"))
    return {
        "report": hashlib.sha256(text.encode()).hexdigest(),
        "experts": {path.name: sha256(path) for path in sorted(expert_files)},
    }


def sha256_header(path: Path) -> str:
    """Return the SHA-256 of a safetensors file's header, with its length."""
    with path.open("rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
    return hashlib.sha256(length + header).hexdigest()


def manifest_text(content: Mapping[str, Any]) -> str:
    """Return MTP_QUANT_MANIFEST.md: the manifest for people."""
    preserving = "yes" if content["is_final_quality_preserving"] else "**no**"
    experts = content["routed_experts"]
    lines = [
        "# The MTP head of this checkpoint",
        "",
        "| | |",
        "| --- | --- |",
        f"| variant | {content['variant']} |",
        f"| quality preserving | {preserving} |",
        f"| routed experts | {experts['count']} x 3 matrices, {experts['format']} |",
        f"| method | {content['method']} |",
        f"| tensors, bytes | {content['tensors']:,}, {content['bytes']:,} |",
        *(f"| {names} | {how} |" for names, how in content["other_tensors"].items()),
        *_calibration_lines(content["calibration"]),
        *_error_lines(content["rel_error"]),
        "",
        "The base's shards are unchanged. Hashes of what this was made of are in "
        f"`{MANIFEST_NAME}`.",
    ]
    return "\n".join(lines) + "\n"


def _calibration_lines(calibration: Mapping[str, Any] | None) -> list[str]:
    if calibration is None:
        return []
    tokens = calibration["tokens_per_expert"]
    return [
        f"| calibration tokens | {calibration['calibration_tokens']:,} |",
        f"| tokens per expert | min {tokens['min']:,}, mean {tokens['mean']:,.1f}, "
        f"max {tokens['max']:,}; {tokens['zero']} experts without (policy: "
        f"{calibration['zero_token_policy']}) |",
        f"| damp, group | {_damp(calibration)}, {calibration['group_size']} |",
        f"| order, scales | {calibration['order']}, {calibration['scale']} |",
        f"| replay | {calibration['replay']} |",
    ]


def _error_lines(errors: Mapping[str, Any] | None) -> list[str]:
    if errors is None:
        return []
    lines = [f"| relative error, Hessian-weighted, mean | {errors['mean']:.5f} |"]
    for matrix in sorted(errors.keys() - {"mean"}):
        mean, largest = errors[matrix]["mean"], errors[matrix]["max"]
        lines.append(f"| of {matrix} | mean {mean:.5f}, max {largest:.5f} |")
    return lines


def recipe_text(content: Mapping[str, Any], base_recipe: str | None) -> str:
    """Return recipe.yaml: the base's own, if it has one, then a stage saying what the head got.

    It has the form of an llm-compressor recipe so that the same tools can read it, but
    llm-compressor has not run it.
    """
    modifier = _modifier(content)
    lines = [
        "# The MTP head's stage, by mtp-graft, in the form of an llm-compressor recipe (which",
        "# did not run it: see MTP_QUANT_MANIFEST.json for method, calibration and hashes).",
        "mtp_head_stage:",
        "  mtp_head_modifiers:",
        *_yaml(modifier, depth=2),
    ]
    before = "" if base_recipe is None else base_recipe.rstrip("\n") + "\n"
    return before + "\n".join(lines) + "\n"


def _modifier(content: Mapping[str, Any]) -> dict[str, Any]:
    variant = content["variant"]
    if variant in ("mxfp4", "bf16"):
        return {"KeptModifier": {"targets": [r"re:mtp\.0\..*"], "method": content["method"]}}
    settings: dict[str, Any] = {
        "config_groups": {
            "mtp_experts": {
                "targets": [r"re:mtp\.0\.ffn\.experts\.\d+\.w[123]$"],
                "weights": content["routed_experts"]["weights"],
            }
        },
        "ignore": [r"re:mtp\.0\.(?!ffn\.experts\.).*"],
    }
    if variant == "rtn":
        return {"QuantizationModifier": settings}
    return {"GPTQModifier": {**settings, "dampening_frac": content["calibration"]["damp"]}}


def _yaml(value: Mapping[str, Any], depth: int) -> list[str]:
    """Return block-style YAML lines; scalars and lists are JSON, which YAML includes."""
    lines = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            lines += [f"{'  ' * depth}{key}:", *_yaml(item, depth + 1)]
        else:
            lines.append(f"{'  ' * depth}{key}: {json.dumps(item)}")
    return lines
