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

import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel, ValidationError

from mtp_graft.checkpoint.files import read_object, sha256
from mtp_graft.checkpoint.quantization_config import scheme_of
from mtp_graft.checkpoint.shards import INDEX_NAME
from mtp_graft.errors import GraftError
from mtp_graft.recipe import Linears, Variant

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
_CALIBRATION_KEYS = (
    *("damp", "damping", "group_size", "scale", "calibration_tokens"),
    *("tokens_per_expert", "replay", "zero_token_policy", "experts_without_tokens"),
)
_FP8, _BF16 = "upstream FP8 codes, scales as BF16 (exact)", "upstream FP8 decoded to BF16 (exact)"


class _Manifest(BaseModel):
    """What is relied on in the manifest of a head that somebody else may have spliced."""

    variant: Variant
    is_final_quality_preserving: bool
    method: str
    routed_experts: dict[str, Any]
    other_tensors: dict[str, str]
    tensors: int
    bytes: int
    calibration: dict[str, Any] | None
    rel_error: dict[str, Any] | None
    provenance: dict[str, Any]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of the head in a folder; raises GraftError if it has no sound one."""
    path = folder / MANIFEST_NAME
    found = read_object(path, "a spliced checkpoint's manifest")
    try:
        _Manifest.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise GraftError(
            f"{path}: {where}: {first['msg']}; expected what `mtp-graft splice` writes"
        ) from error
    return found


def read_report(quantized: Path) -> dict[str, Any]:
    """Return the lasting part of `quantized/report.json`.

    Raises GraftError if the quantize stage has not finished, or left a part out.
    """
    path = quantized / REPORT_NAME
    report = read_object(path, "a quantize report", "run `mtp-graft quantize` to its end")
    try:
        return {key: report[key] for key in ("variants", "rel_errors", *_CALIBRATION_KEYS)}
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
    expert = f"model.layers.{config['num_hidden_layers']}.ffn.experts.0.w1"
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
        "other_tensors": {
            "attn.{wq_a,wq_b,wkv,wo_a,wo_b}": _FP8,
            "e_proj, h_proj": _BF16 if linears == "bf16" else _FP8,
            "ffn.shared_experts.{w1,w2,w3}": _FP8 if linears == "fp8" else _BF16,
            "norms, gate, attn_sink, hc_*": "as upstream, F32 kept F32",
        },
        "tensors": num_tensors,
        "bytes": num_bytes,
        "calibration": {k: report[k] for k in _CALIBRATION_KEYS} if calibrated and report else None,
        "rel_error": None if report is None else _rel_error(variant, report),
        "provenance": dict(provenance),
    }


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


def base_provenance(base: Path, shards: list[str]) -> dict[str, Any]:
    """Return the hashes of a base's index, config and shard headers, and the shards' sizes.

    Hashing every shard whole would take longer than all the rest; a header has every tensor's
    name, dtype, shape and place.
    """
    return {
        INDEX_NAME: sha256(base / INDEX_NAME),
        "config.json": sha256(base / "config.json"),
        "shard_headers": {
            name: {"sha256": _sha256_of_header(base / name), "bytes": (base / name).stat().st_size}
            for name in sorted(shards)
        },
    }


def _sha256_of_header(path: Path) -> str:
    with path.open("rb") as file:
        length = file.read(8)
        return hashlib.sha256(length + file.read(int.from_bytes(length, "little"))).hexdigest()


def quantize_provenance(report: Mapping[str, Any], expert_files: list[Path]) -> dict[str, Any]:
    """Return the hashes of the quantize stage's output, the report's as canonical JSON."""
    text = json.dumps(report, sort_keys=True, separators=(",", ":"))
    return {
        "report": hashlib.sha256(text.encode()).hexdigest(),
        "experts": {path.name: sha256(path) for path in sorted(expert_files)},
    }


def manifest_text(content: Mapping[str, Any]) -> str:
    """Return MTP_QUANT_MANIFEST.md: the manifest for people."""
    experts = content["routed_experts"]
    rows = {
        "variant": content["variant"],
        "quality preserving": "yes" if content["is_final_quality_preserving"] else "**no**",
        "routed experts": f"{experts['count']} x 3 matrices, {experts['format']}",
        "method": content["method"],
        "tensors, bytes": f"{content['tensors']:,}, {content['bytes']:,}",
        **content["other_tensors"],
        **_calibration_rows(content["calibration"]),
    }
    if (errors := content["rel_error"]) is not None:
        rows["relative error, Hessian-weighted, mean"] = f"{errors['mean']:.5f}"
        for matrix in sorted(errors.keys() - {"mean"}):
            mean, largest = errors[matrix]["mean"], errors[matrix]["max"]
            rows[f"of {matrix}"] = f"mean {mean:.5f}, max {largest:.5f}"
    table = "".join(f"| {what} | {value} |\n" for what, value in rows.items())
    return (
        f"# The MTP head of this checkpoint\n\n| | |\n| --- | --- |\n{table}\nThe base's shards "
        f"are unchanged. Hashes of what this was made of are in `{MANIFEST_NAME}`.\n"
    )


def _calibration_rows(calibration: Mapping[str, Any] | None) -> dict[str, str]:
    if calibration is None:
        return {}
    tokens, damp = calibration["tokens_per_expert"], str(calibration["damp"])
    if calibration["damping"] != "fixed":
        damp = f"inputs / tokens, at least {damp}"
    return {
        "calibration tokens": f"{calibration['calibration_tokens']:,}",
        "tokens per expert": f"min {tokens['min']:,}, mean {tokens['mean']:,.1f}, "
        f"max {tokens['max']:,}; {tokens['zero']} experts without (policy: "
        f"{calibration['zero_token_policy']})",
        "damp, group": f"{damp}, {calibration['group_size']}",
        "scales": calibration["scale"],
        "replay": calibration["replay"],
    }


def recipe_text(content: Mapping[str, Any], base_recipe: str | None) -> str:
    """Return recipe.yaml: the base's own, if it has one, then a stage saying what the head got.

    It has the form of an llm-compressor recipe so that the same tools can read it, but
    llm-compressor has not run it.
    """
    stage = {"mtp_head_stage": {"mtp_head_modifiers": _modifier(content)}}
    before = "" if base_recipe is None else base_recipe.rstrip("\n") + "\n"
    return (
        f"{before}# The MTP head's stage, by mtp-graft, in the form of an llm-compressor recipe "
        f"(which\n# did not run it: see {MANIFEST_NAME} for method, calibration and hashes).\n"
        f"{yaml.safe_dump(stage, sort_keys=False, width=100)}"
    )


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
    damp = (content["calibration"] or {}).get("damp")
    return {"GPTQModifier": {**settings, "dampening_frac": damp}}
