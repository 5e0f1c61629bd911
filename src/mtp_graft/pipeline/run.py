"""One run: the stages in order, each as the recipe wants it, in one run folder.

    fetch      hub or folder          -> base checkpoint, upstream head
    capture    base served by vLLM    -> token ids, residual stream, the base's own next token
    quantize   capture + head         -> GPTQ's experts, errors of every variant
    score      capture + variants     -> offline acceptance, before anything is served
    splice     base + variants        -> checkpoints: hard links and one new shard each
    verify     checkpoints            -> every tensor accounted for and compared
    bench      checkpoints, served    -> acceptance of every variant, decode speed against the base
    report     all of it              -> Markdown and charts

A stage that is finished, and whose inputs are the same, returns what it found the first time. That
a variant was served in the bench stage is also verify's proof that vLLM loads it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from mtp_graft.bench.requests import Report
from mtp_graft.checkpoint.manifest import CONFIG_NAME, fingerprints, read_result
from mtp_graft.checkpoint.quant_manifest import MANIFEST_NAME
from mtp_graft.checkpoint.shards import write_json
from mtp_graft.errors import GraftError, UsageError
from mtp_graft.pipeline.bench import Bench
from mtp_graft.pipeline.device import torch_device
from mtp_graft.pipeline.folder import STAGES, RunFolder, locked
from mtp_graft.pipeline.plan import check_run
from mtp_graft.pipeline.results import report_run, summarize
from mtp_graft.pipeline.servers import Servers
from mtp_graft.recipe import Device, Recipe
from mtp_graft.serving.client import ServerClient
from mtp_graft.serving.command import find_vllm
from mtp_graft.stages.calibration import load_calibration
from mtp_graft.stages.capture import capture
from mtp_graft.stages.fetch import FetchedModels, fetch
from mtp_graft.stages.inputs import REPORT_NAME
from mtp_graft.stages.parallel import num_ranks
from mtp_graft.stages.process import run_in_process
from mtp_graft.stages.quantize import quantize
from mtp_graft.stages.score import score
from mtp_graft.stages.splice import splice
from mtp_graft.stages.verify import require_sound, verify


def choose_stages(only: str | None = None, start: str | None = None) -> tuple[str, ...]:
    """Return the stages that `--only` or `--from` name; UsageError for both, or unknown ones."""
    if only is not None and start is not None:  # together they would remove what --only names
        raise UsageError("--only and --from together: expected one of them")
    name = only or start or STAGES[0]
    if name not in STAGES:
        raise UsageError(f"{name!r} is no stage; expected one of {', '.join(STAGES)}")
    return (only,) if only is not None else STAGES[STAGES.index(name) :]


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
    run_folder, chosen = RunFolder(folder, recipe), recipe.splice.variant
    if stage == "splice":
        checkpoint = run_folder.checkpoint(chosen)
        found = read_result(checkpoint / MANIFEST_NAME) or {}
        return {"checkpoint": str(checkpoint), **found}
    path = run_folder.stage(stage) / REPORT_NAME
    return read_result(run_folder.verified(chosen) if stage == "verify" else path) or {}


def check_prompts(recipe: Recipe, stages: Sequence[str]) -> None:
    """Raise GraftError for prompts that cannot be read or are too few; splits share none."""
    capture, bench = recipe.capture, recipe.bench
    wanted: Counter[str] = Counter()
    if "capture" in stages:
        wanted[capture.calibration_prompts] += capture.calibration_count
        wanted[capture.evaluation_prompts] += capture.evaluation_count
    if "bench" in stages:
        wanted[bench.prompts] += bench.count
    for source, count in wanted.items():
        load_calibration(source, count)


#: A stage's configuration and inputs, for its manifest.
MadeFrom = tuple[Mapping[str, Any], Sequence[Path]]


class _Run:
    """The stages of one recipe in one run folder, a method each.

    Those that leave no manifest of their own making return what theirs is to say.
    """

    def __init__(
        self, recipe: Recipe, folder: RunFolder, stages: Sequence[str], report: Report
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

    def fetch(self) -> None:
        """Find both checkpoints, once everything else that can be refused has been looked at."""
        if {"capture", "bench"} & set(self.stages):
            find_vllm()
        check_run(self.recipe, self.folder, self.stages)
        check_prompts(self.recipe, self.stages)
        _ = self.models

    def capture(self) -> None:
        """Capture the base; where it would be served alike, measure it on the same server."""
        if "fetch" not in self.stages:
            self.fetch()
        base, out, log = (
            self.models.base,
            self.folder.stage("capture"),
            self._servers.log("capture"),
        )
        options = self._servers.recording_options(base)
        with ExitStack() as stack:
            started: list[ServerClient] = []

            @contextmanager
            def serving() -> Iterator[ServerClient]:
                started.append(stack.enter_context(self._servers.serving(options, "capture")))
                yield started[0]

            capture(serving(), base, out, self.recipe.capture, self.progress, log)
            if "bench" in self.stages and options == self._servers.measuring_options(base, 0):
                for client in started:  # none, if the capture was finished before
                    with self.folder.timed("bench"):
                        self._bench.measure_base(client)

    def quantize(self) -> None:
        inputs = self.folder.finished("capture"), self.models.upstream, self.models.base
        settings, out = self.recipe.quantize, self.folder.stage("quantize")
        self._compute(settings.device, quantize, *inputs, out, settings)

    def score(self) -> None:
        captured, quantized = self.folder.finished("capture"), self.folder.finished("quantize")
        inputs = captured, quantized, self.models.upstream, self.models.base
        settings, out = self.recipe.score, self.folder.stage("score")
        variants = self.recipe.quantize.variants
        self._compute(settings.device, score, *inputs, out, variants, settings)

    def _compute(self, device: Device, stage: Callable[..., Any], *arguments: Any) -> None:
        """Call a stage; on a GPU in a process of its own, so that it is empty when vLLM starts."""
        if torch_device(device) == "cpu":
            stage(*arguments, self.progress)
        else:
            run_in_process(stage, *arguments, report=self.progress)

    def splice(self) -> MadeFrom:
        quantized, settings = self.folder.finished("quantize"), self.recipe.splice
        variants = self.recipe.served_variants
        for number, variant in enumerate(variants):
            self.progress(f"splice: {variant}", number, len(variants))
            out = self.folder.checkpoint(variant)
            out.parent.mkdir(parents=True, exist_ok=True)
            splice(
                *(self.models.base, self.models.upstream, out, variant),
                linears=settings.linears,
                quantized=quantized,
                copy=settings.copy,
            )
        return asdict(settings), [quantized / REPORT_NAME]

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
