"""One run: the stages in order, each as the recipe wants it, in one run folder."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mtp_graft.bench.decode import Report
from mtp_graft.checkpoint.manifest import CONFIG_NAME, fingerprints, read_result
from mtp_graft.checkpoint.quant_manifest import MANIFEST_NAME
from mtp_graft.checkpoint.shards import write_json
from mtp_graft.errors import GraftError
from mtp_graft.pipeline.bench import EVALUATION, Bench
from mtp_graft.pipeline.device import torch_device
from mtp_graft.pipeline.folder import RunFolder, locked
from mtp_graft.pipeline.plan import check_models, check_room, describe, find_needs
from mtp_graft.pipeline.results import report_run, summarize
from mtp_graft.pipeline.servers import Servers, capture_config
from mtp_graft.recipe import Recipe
from mtp_graft.serving.command import find_vllm
from mtp_graft.stages import capture as capturing
from mtp_graft.stages.calibration import load_calibration
from mtp_graft.stages.capture import Wanted
from mtp_graft.stages.fetch import FetchedModels, Source, already_fetched, fetch, survey
from mtp_graft.stages.inputs import REPORT_NAME
from mtp_graft.stages.process import run_in_process
from mtp_graft.stages.quantize import QuantizeConfig, quantize
from mtp_graft.stages.ranks import num_ranks
from mtp_graft.stages.score import ScoreConfig, score
from mtp_graft.stages.splice import splice
from mtp_graft.stages.verify import require_sound, verify

STAGES = ("fetch", "capture", "quantize", "score", "splice", "verify", "bench", "report")


def choose_stages(only: str | None = None, start: str | None = None) -> tuple[str, ...]:
    """Return the stages that `--only` or `--from` name; raises GraftError for unknown ones."""
    for name in (only, start):
        if name is not None and name not in STAGES:
            raise GraftError(f"{name!r} is no stage; expected one of {', '.join(STAGES)}")
    if only is not None:
        return (only,)
    return STAGES[STAGES.index(start) :] if start is not None else STAGES


def run_pipeline(
    recipe: Recipe,
    folder: Path,
    report: Report,
    stages: Sequence[str] = STAGES,
    *,
    again: bool = False,
) -> dict[str, Any]:
    """Run `stages` of `recipe` in the run folder; return the `run` command's JSON.

    What finished earlier is kept, unless `again` asks to remove the named stages' folders first.
    Raises GraftError if a stage fails, if an earlier one that it needs has not been run, or if
    another process works in the folder.
    """
    with locked(folder):
        run_folder = RunFolder(folder, recipe)
        if again:
            run_folder.forget(stages)
        _Run(recipe, run_folder, stages, report).do()
        return summarize(recipe, run_folder)


def run_stage(recipe: Recipe, folder: Path, stage: str, report: Report) -> dict[str, Any]:
    """Run one stage of `recipe` in the run folder; return the stage's own JSON.

    Under torchrun every rank calls it, for `quantize` alone. Raises GraftError as `run_pipeline`
    does.
    """
    if num_ranks() > 1 and stage != "quantize":
        raise GraftError(f"{stage}: started on {num_ranks()} ranks; only quantize shares its work")
    run_pipeline(recipe, folder, report, [stage])
    chosen = recipe.splice.variant
    match stage:
        case "splice":
            found = RunFolder(folder, recipe).checkpoint(chosen) / MANIFEST_NAME
        case "verify":
            found = RunFolder(folder, recipe).verified(chosen)
        case _:
            found = folder / stage / REPORT_NAME
    result: dict[str, Any] = json.loads(found.read_text())
    return {"checkpoint": str(found.parent), **result} if stage == "splice" else result


def plan_run(recipe: Recipe, folder: Path, stages: Sequence[str]) -> dict[str, Any]:
    """Return the JSON of `--dry-run`: what would be done, with sizes and times; nothing is.

    Raises GraftError if `folder` is something else than a folder.
    """
    if folder.exists() and not folder.is_dir():
        raise GraftError(f"{folder}: cannot be a run folder (it is a file); use another --run")
    run_folder = RunFolder(folder, recipe)
    return describe(recipe, run_folder, stages, lambda: survey_models(recipe, run_folder))


def survey_models(recipe: Recipe, folder: RunFolder) -> tuple[Source, Source]:
    """Return what is needed of base and upstream; of fetched ones, without asking the hub."""
    model = recipe.model
    fetched = already_fetched(folder.stage("fetch"), model)
    if fetched is not None:
        model = replace(model, base=str(fetched.base), upstream=str(fetched.upstream))
    return survey(model)


def check_run(recipe: Recipe, folder: RunFolder, stages: Sequence[str]) -> None:
    """Raise GraftError for models that no stage could work with, and for disk or memory too small.

    Of checkpoints on the hub, small files and the shards' headers are read.
    """
    sources = survey_models(recipe, folder)
    check_models(recipe, *sources)
    check_room(find_needs(recipe, folder, stages, sources))


#: A stage's configuration and inputs, for its manifest.
MadeFrom = tuple[Mapping[str, Any], Sequence[Path]]


class _Run:
    """The stages of one recipe in one run folder, a method each.

    Those that leave no manifest of their own making return what theirs is to say.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        stages: Sequence[str],
        report: Report,
    ) -> None:
        self.recipe = recipe
        self.folder = folder
        self.stages = stages
        self.progress = report
        self._servers = Servers(recipe, folder, report)
        self._bench = Bench(recipe, folder, self._servers, report)

    def do(self) -> None:
        """Run the stages in their order."""
        for stage in self.stages:
            with self.folder.timed(stage):
                made_from: MadeFrom | None = getattr(self, stage)()
            if made_from is not None:
                self.folder.write_manifest(stage, *made_from)

    @cached_property
    def models(self) -> FetchedModels:
        """The folders of base and upstream, fetched if they are on the hub."""
        return fetch(self.recipe.model, self.folder.stage("fetch"), self.progress)

    @cached_property
    def prompts(self) -> dict[str, Wanted]:
        """What the base is asked in capture, by split."""
        wanted = self.recipe.capture
        return {
            "calibration": Wanted(wanted.calibration_prompts, wanted.calibration_count),
            EVALUATION: Wanted(wanted.evaluation_prompts, wanted.evaluation_count),
        }

    def fetch(self) -> None:
        """Refuse what can be refused before shards are downloaded, then download them."""
        if {"capture", "bench"} & set(self.stages):
            find_vllm()
        check_run(self.recipe, self.folder, self.stages)
        check_prompts(self.recipe, self.stages)
        _ = self.models

    def capture(self) -> None:
        if "fetch" not in self.stages:
            self.fetch()
        base, out = self.models.base, self.folder.stage("capture")
        config, prompts = capture_config(self.recipe), self.prompts
        if capturing.finished_capture(base, out, config, prompts) is None:
            with self._servers.recording(base) as client:
                log = self.folder.log("capture")
                capturing.capture_with(client, base, out, config, prompts, self.progress, log)

    def quantize(self) -> None:
        capture, out = self.folder.finished("capture"), self.folder.stage("quantize")
        settings = asdict(self.recipe.quantize)
        del settings["variants"]  # which heads there are is for the later stages to know
        settings["device"] = torch_device(settings["device"])
        config = QuantizeConfig(**settings)
        models = self.models.upstream, self.models.base
        run_in_process(quantize, capture, *models, out, config, report=self.progress)

    def score(self) -> None:
        capture, quantized = self.folder.finished("capture"), self.folder.finished("quantize")
        variants, device = self.recipe.quantize.variants, torch_device(self.recipe.score.device)
        config, out = ScoreConfig(variants=variants, device=device), self.folder.stage("score")
        models = self.models.upstream, self.models.base
        run_in_process(score, capture, quantized, *models, out, config, report=self.progress)

    def splice(self) -> MadeFrom:
        quantized = self.folder.finished("quantize")
        variants = self.recipe.served_variants
        for number, variant in enumerate(variants):
            self.progress(f"splice: {variant}", number, len(variants))
            out = self.folder.checkpoint(variant)
            out.parent.mkdir(parents=True, exist_ok=True)
            splice(
                self.models.base,
                self.models.upstream,
                out,
                variant,
                linears=self.recipe.splice.linears,
                quantized=quantized,
                copy=self.recipe.splice.copy,
            )
        return asdict(self.recipe.splice), [quantized / REPORT_NAME]

    def verify(self) -> MadeFrom:
        quantized = self.folder.finished("quantize")
        self.folder.finished("splice")
        variants = self.recipe.served_variants
        for number, variant in enumerate(variants):
            self.progress(f"verify: {variant}", number, len(variants))
            checkpoint, path = self.folder.checkpoint(variant), self.folder.verified(variant)
            found = verify(checkpoint, self.models.base, self.models.upstream, quantized)
            found["loaded_in_vllm"] = True if self._bench.has_served(variant) else None
            found["base_as_captured"] = self._base_as_captured()
            found["ok"] = found["ok"] and found["base_as_captured"] is not False
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(found, path)
            require_sound(checkpoint, found)
        return {"variants": variants}, self._heads()

    def bench(self) -> MadeFrom:
        adjusted = self._bench.run(self.models.base)
        return asdict(self.recipe.bench) | {"adjusted": adjusted}, self._heads()

    def report(self) -> MadeFrom:
        report_run(self.recipe, self.folder)
        return {}, []

    def _base_as_captured(self) -> bool | None:
        """Return whether the base's files, values included, are those that were captured.

        By size, first and last MiB; None for a checkpoint whose capture is not here.
        """
        captured = read_result(self.folder.stage("capture") / CONFIG_NAME)
        if captured is None:
            return None
        known: dict[str, str] = captured["base"]
        return known == fingerprints([self.models.base / name for name in known])

    def _heads(self) -> list[Path]:
        """Return the checkpoints' manifests, which have the hashes."""
        variants = self.recipe.served_variants
        return [self.folder.checkpoint(variant) / MANIFEST_NAME for variant in variants]


def check_prompts(recipe: Recipe, stages: Sequence[str]) -> None:
    """Raise GraftError for prompts that cannot be read or are too few; splits share none."""
    wanted: Counter[str] = Counter()
    if "capture" in stages:
        capture = recipe.capture
        wanted[capture.calibration_prompts] += capture.calibration_count
        wanted[capture.evaluation_prompts] += capture.evaluation_count
    if "bench" in stages:
        wanted[recipe.bench.prompts] += recipe.bench.count
    for source, count in wanted.items():
        load_calibration(source, count)
