"""The spliced checkpoint: the names of its files, and what they say about its head.

There are no times, versions or paths in it: the same inputs give the same bytes.
"""

import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, NotRequired

import yaml  # type: ignore[import-untyped]
from typing_extensions import TypedDict

from mtp_graft.checkpoint.files import read_as, read_object, sha256
from mtp_graft.checkpoint.manifest import expect_this_version, fingerprints, leaves
from mtp_graft.checkpoint.quantization_config import read_quantization
from mtp_graft.checkpoint.shards import INDEX_NAME
from mtp_graft.errors import GraftError
from mtp_graft.recipe import LinearDtype, Variant

#: The shard with the head, whatever its variant.
HEAD_SHARD = "model-mtp-w4a16.safetensors"
#: Beside a master that heal wrote: how it was trained.
HEALED_NAME = "healed.json"
MANIFEST_NAME = "MTP_QUANT_MANIFEST.json"
MANIFEST_TEXT_NAME = "MTP_QUANT_MANIFEST.md"
RECIPE_NAME = "recipe.yaml"
#: The model card, and its data.
CARD_NAME, TRACE_NAME = "README.md", "card.json"

_WORDS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
_FP8, _BF16 = _WORDS["fp8"], _WORDS["bf16"]


class Manifest(TypedDict):
    """The content of MTP_QUANT_MANIFEST.json."""

    drafter: NotRequired[str]  # "mtp" or "dspark"; without it "mtp"
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


class QuantizeReport(TypedDict):
    """The quantize stage's report.json without times and peaks: the same for the same inputs."""

    damp: float
    damping: str
    group_size: int
    scale: str
    calibration_tokens: int
    tokens_per_expert: dict[str, Any]
    experts_without_tokens: list[int]
    variants: dict[str, dict[str, Any]]
    rel_errors: dict[str, dict[str, list[float]]]


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of the head in a folder; raises GraftError if it has no sound one."""
    what = "a spliced checkpoint's manifest, as `mtp-graft splice` writes it"
    return read_as(Manifest, folder / MANIFEST_NAME, what)


def read_report(quantized: Path) -> QuantizeReport:
    """Return the lasting part of the report; GraftError if the quantize stage has not finished."""
    what, cure = "a quantize report", "run `mtp-graft quantize` to its end"
    return read_as(QuantizeReport, quantized / "report.json", what, cure)


def manifest(
    variant: Variant,
    dtype: LinearDtype,
    config: Mapping[str, Any],
    report: QuantizeReport | None,
    provenance: dict[str, Any],
    num_tensors: int,
    num_bytes: int,
) -> Manifest:
    """Return the manifest of a head; `config` is the new checkpoint's config.json."""
    expert = f"model.layers.{config['num_hidden_layers']}.ffn.experts.0.w1"
    is_dspark = config.get("dspark_block_size") is not None
    groups = config["quantization_config"]["config_groups"]
    scheme = groups.get(read_quantization(config).group_of(expert))
    calibration = None
    if variant == "gptq" and report is not None:
        calibration = {k: v for k, v in report.items() if k not in ("variants", "rel_errors")}
    others = "norms, gate, attn_sink, hc_*"
    return {
        "drafter": "dspark" if is_dspark else "mtp",
        "variant": variant,
        "is_final_quality_preserving": calibration is not None or variant in ("mxfp4", "bf16"),
        "method": _WORDS["methods"][variant],
        "routed_experts": {
            "count": config["n_routed_experts"],
            "format": "bfloat16" if scheme is None else scheme.get("format"),
            "weights": None if scheme is None else scheme["weights"],
        },
        "other_tensors": {
            "attn.{wq_a,wq_b,wkv,wo_a,wo_b}": _FP8,
            "main_proj" if is_dspark else "e_proj, h_proj": _BF16 if dtype == "bf16" else _FP8,
            "ffn.shared_experts.{w1,w2,w3}": _FP8 if dtype == "fp8" else _BF16,
            others + ", markov_head, confidence_head" * is_dspark: "as upstream, F32 kept F32",
        },
        "tensors": num_tensors,
        "bytes": num_bytes,
        "calibration": calibration,
        "rel_error": None if report is None else _rel_error(variant, report),
        "provenance": provenance,
    }


def _rel_error(variant: Variant, report: QuantizeReport) -> dict[str, Any] | None:
    """Return the Hessian-weighted error's mean, and mean and maximum over experts a matrix."""
    if variant not in report["variants"]:
        return None
    matrices = {
        matrix: {"mean": fmean(errors), "max": max(errors), "per_expert": errors}
        for matrix, errors in report["rel_errors"].get(variant, {}).items()
    }
    return {"mean": report["variants"][variant]["rel_error"], **matrices}


def base_provenance(base: Path, shards: Iterable[str]) -> dict[str, Any]:
    """Return the hashes of a base's index and config, and its shards' fingerprints."""
    return {
        **hashes([base / INDEX_NAME, base / "config.json"]),
        "shard_fingerprints": fingerprints([base / name for name in sorted(set(shards))]),
    }


def hashes(paths: Iterable[Path]) -> dict[str, str]:
    """Return file name -> SHA-256 of the whole file."""
    return {path.name: sha256(path) for path in sorted(set(paths))}


def quantize_provenance(report: QuantizeReport, expert_files: Iterable[Path]) -> dict[str, Any]:
    """Return the hashes of the quantize stage's output, the report's as canonical JSON."""
    text = json.dumps(report, sort_keys=True, separators=(",", ":"))
    return {"report": hashlib.sha256(text.encode()).hexdigest(), "experts": hashes(expert_files)}


def manifest_text(content: Manifest) -> str:
    """Return MTP_QUANT_MANIFEST.md: the manifest for people, without hashes and lists."""
    shown = leaves({key: value for key, value in content.items() if key != "provenance"})
    rows = "".join(
        f"| {name} | {round(value, 5) if isinstance(value, float) else value} |\n"
        for name, value in shown.items()
        if value is not None and not isinstance(value, list)
    )
    return (
        f"# The draft head of this checkpoint\n\n| | |\n| --- | --- |\n{rows}\nThe base's shards "
        f"are unchanged. Hashes of what this was made of are in `{MANIFEST_NAME}`.\n"
    )


def recipe_text(content: Manifest, base_recipe: str | None) -> str:
    """Return recipe.yaml: the base's own, if it has one, then a stage for the head."""
    calibration = content["calibration"] or {}
    told = ("variant", "method", "routed_experts", "other_tensors")
    stage: dict[str, Any] = {key: value for key, value in content.items() if key in told}
    stage |= {key: calibration[key] for key in ("damp", "damping") if calibration}
    before = "" if base_recipe is None else base_recipe.rstrip("\n") + "\n"
    return before + yaml.safe_dump({"mtp_head_stage": stage}, sort_keys=False, width=100)


class Spliced(NamedTuple):
    """A run's checkpoint."""

    variant: str
    folder: Path

    def identity(self) -> dict[str, str]:
        """Return what tells this checkpoint from another: the manifest has its origins' hashes."""
        hashed = sha256(self.folder / MANIFEST_NAME)
        return {"name": self.folder.name, "variant": self.variant, "manifest": hashed}


def find_spliced(run: Path) -> Spliced:
    """Return the checkpoint of the run's chosen variant; GraftError if none, two or of 0.1."""
    if (run / MANIFEST_NAME).is_file():
        expected = "the folder of a `mtp-graft run`, which measured one"
        cure = "a grafted one can be uploaded with `hf upload OWNER/NAME FOLDER`"
        raise GraftError(f"{run}: is a checkpoint with a head; expected {expected}: {cure}")
    expect_this_version(run)
    stage, cure = run / "splice", "run `mtp-graft splice` first"
    done = read_object(stage / "manifest.json", "the splice stage's manifest", cure)
    variant = done["config"]["variant"]
    manifests = (stage / variant).glob(f"*/{MANIFEST_NAME}")  # a hidden folder is not finished
    found = sorted(m.parent for m in manifests if not m.parent.name.startswith("."))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        cure = "remove the others, or run `mtp-graft splice` again"
        raise GraftError(f"{stage / variant}: {names} found, expected one checkpoint; {cure}")
    return Spliced(variant, found[0])
