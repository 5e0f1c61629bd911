"""The stages in order, meeting only on disk: read this first.

    fetch      hub or folder          -> base checkpoint, upstream head
    capture    base served by vLLM    -> token ids, residual stream, the base's own next token
    quantize   capture + head         -> GPTQ's experts, errors of every variant
    score      capture + variants     -> offline acceptance, before anything is served
    splice     base + variants        -> checkpoints: hard links and one new shard each
    verify     checkpoints            -> every tensor accounted for and compared
    bench      checkpoints, served    -> acceptance of every variant, decode speed against the base
    report     all of it              -> Markdown and charts

A stage that is finished, and whose inputs are the same, returns what it found the first time.
Servers are the expensive part, so the base is started once for capture and bench, and every
variant once, which is also verify's proof that vLLM loads it.
"""

import fcntl
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from mtp_graft.bench.acceptance import KnownText, measure_acceptance
from mtp_graft.bench.decode import DecodeConfig, Report, compare, measure_base, measure_mtp
from mtp_graft.bench.report import write_report
from mtp_graft.bench.results import RunResults
from mtp_graft.checkpoint.capture import read_texts
from mtp_graft.checkpoint.manifest import (
    CONFIG_NAME,
    claim_folder,
    fingerprints,
    package_versions,
    write_manifest,
)
from mtp_graft.checkpoint.quant_manifest import MANIFEST_NAME
from mtp_graft.checkpoint.shards import write_json
from mtp_graft.errors import GraftError
from mtp_graft.recipe import Recipe
from mtp_graft.serving.client import ServerClient
from mtp_graft.serving.command import ServeOptions, find_vllm
from mtp_graft.serving.prompts import ChatPrompt, Prompt
from mtp_graft.serving.server import managed_server
from mtp_graft.stages import capture as capturing
from mtp_graft.stages.calibration import load_calibration
from mtp_graft.stages.fetch import fetch_base, fetch_head
from mtp_graft.stages.inputs import REPORT_NAME
from mtp_graft.stages.quantize import QuantizeConfig, quantize
from mtp_graft.stages.score import ScoreConfig, score
from mtp_graft.stages.splice import HEAD_SHARD, check_inputs, splice
from mtp_graft.stages.verify import verify

STAGES = ("fetch", "capture", "quantize", "score", "splice", "verify", "bench", "report")
EVALUATION = "evaluation"  # the split that scores and served acceptance are measured on
BUNDLED_RECIPE = Path("recipes/tiny.toml")
_SECONDS = "seconds.json"


def find_bundled_recipe() -> Path:
    """Return the tiny model's recipe in the checkout we run from; GraftError outside of one."""
    path = Path(__file__).parents[2] / BUNDLED_RECIPE
    if not path.is_file():
        raise GraftError(
            f"{path}: not found; the tiny model is in the repository, not in the wheel: "
            "run from a checkout, or `mtp-graft run` a recipe of your own"
        )
    return path


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
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GraftError(
            f"{folder}: cannot be a run folder ({error.strerror}); use another --run"
        ) from error
    with _locked(folder):
        if again:
            _forget(folder, stages)
        with ExitStack() as stack:
            return _Run(recipe, folder, report, stages, stack).result()


def _forget(folder: Path, stages: Sequence[str]) -> None:
    """Remove what the stages left, and the time they took."""
    for stage in stages:
        if (folder / stage).exists():
            shutil.rmtree(folder / stage)
    if (folder / _SECONDS).exists():
        seconds = json.loads((folder / _SECONDS).read_text())
        write_json({s: v for s, v in seconds.items() if s not in stages}, folder / _SECONDS)


def run_stage(recipe: Recipe, folder: Path, stage: str, report: Report) -> dict[str, Any]:
    """Run one stage of `recipe` in the run folder; return the stage's own JSON.

    Raises GraftError as `run_pipeline` does.
    """
    run_pipeline(recipe, folder, report, [stage])
    chosen = recipe.splice.variant
    match stage:
        case "fetch":
            base = fetch_base(recipe.model.base, recipe.model.base_revision)
            head = fetch_head(recipe.model.upstream, recipe.model.upstream_revision)
            return {"base": str(base), "upstream": str(head)}
        case "splice":
            found = folder / "splice" / chosen / recipe.model.name / MANIFEST_NAME
        case "verify":
            found = folder / "verify" / f"{chosen}.json"
        case _:
            found = folder / stage / REPORT_NAME
    result: dict[str, Any] = json.loads(found.read_text())
    return {"checkpoint": str(found.parent), **result} if stage == "splice" else result


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GraftError(f"{folder}: another mtp-graft works in this run folder") from None
        yield


class _Run:
    """One run: its folder, its recipe, and the base's server while several stages use it."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        report: Report,
        stages: Sequence[str],
        stack: ExitStack,
    ) -> None:
        self.recipe = recipe
        self.folder = folder
        self.report = report
        self.stages = stages
        self._stack = stack
        self._server: ExitStack | None = None
        self._client: ServerClient | None = None
        self.seconds: dict[str, float] = self._read(folder / _SECONDS) or {}

    def result(self) -> dict[str, Any]:
        """Run the chosen stages in order and put their results together."""
        work: dict[str, Callable[[], object]] = {
            "fetch": self.check_inputs,
            "capture": self.capture,
            "quantize": self.quantize,
            "score": self.score,
            "splice": self.splice,
            "verify": self.verify,
            "bench": self.bench,
            "report": self.write_report,
        }
        for stage in self.stages:
            with self._timed(stage):
                work[stage]()
            if stage in ("splice", "verify", "bench", "report"):
                self._write_manifest(stage)
            if stage == "capture" and "bench" in self.stages:
                with self._timed("bench"):
                    self.bench_base()
            if stage == "capture":
                self.stop_base_server()
        return self.summary()

    # fetch

    @cached_property
    def base(self) -> Path:
        """The base checkpoint's folder, fetched if it is on the hub."""
        return fetch_base(self.recipe.model.base, self.recipe.model.base_revision)

    @cached_property
    def upstream(self) -> Path:
        """The folder that has the upstream head, fetched if it is on the hub."""
        return fetch_head(self.recipe.model.upstream, self.recipe.model.upstream_revision)

    def check_inputs(self) -> None:
        """Look at base and upstream before hours of work depend on them."""
        check_inputs(self.base, self.upstream)

    # capture

    def capture(self) -> dict[str, Any]:
        self.check_inputs()
        wanted = self.recipe.capture
        calibration = load_calibration(wanted.calibration_prompts, wanted.calibration_count)
        same = wanted.evaluation_prompts == wanted.calibration_prompts
        skip = wanted.calibration_count if same else 0  # held out either way
        evaluation = load_calibration(wanted.evaluation_prompts, wanted.evaluation_count, skip)
        prompts = {"calibration": calibration, EVALUATION: evaluation}
        out, config = self.folder / "capture", self._capture_config()
        finished = capturing.finished_capture(self.base, out, config, prompts)
        if finished is not None:
            return finished
        return capturing.capture_with(
            self.base_client(), self.base, out, config, prompts, self.report, self._log("base")
        )

    def _capture_config(self) -> capturing.CaptureConfig:
        wanted = self.recipe.capture
        return capturing.CaptureConfig(
            wanted.max_prompt_tokens, wanted.new_tokens, wanted.concurrency, wanted.max_model_len
        )

    # quantize, score, splice, verify

    def quantize(self) -> dict[str, Any]:
        capture, out = self._finished("capture"), self.folder / "quantize"
        wanted = self.recipe.quantize
        config = QuantizeConfig(
            damp=wanted.damp,
            group_size=wanted.group_size,
            zero_tokens=wanted.zero_tokens,
            experts_per_batch=wanted.experts_per_batch,
            device=_torch_device(wanted.device),
        )
        return quantize(capture, self.upstream, self.base, out, config, self.report)

    def score(self) -> dict[str, Any]:
        capture, quantized = self._finished("capture"), self._finished("quantize")
        variants, device = self.recipe.quantize.variants, _torch_device(self.recipe.score.device)
        return score(
            capture,
            quantized,
            self.upstream,
            self.base,
            self.folder / "score",
            ScoreConfig(variants=variants, device=device),
            self.report,
        )

    @property
    def variants(self) -> list[str]:
        """The variants that become checkpoints, and are served: the chosen one, then the rest."""
        chosen = self.recipe.splice.variant
        return [chosen, *(v for v in self.recipe.bench.served_variants if v != chosen)]

    def checkpoint(self, variant: str) -> Path:
        return self.folder / "splice" / variant / self.recipe.model.name

    def splice(self) -> None:
        quantized = self._finished("quantize")
        for number, variant in enumerate(self.variants):
            self.report(f"splice: {variant}", number, len(self.variants))
            out = self.checkpoint(variant)
            out.parent.mkdir(parents=True, exist_ok=True)
            splice(
                self.base,
                self.upstream,
                out,
                variant,  # type: ignore[arg-type]
                quantized=quantized,
                copy=self.recipe.splice.copy,
            )

    def verify(self) -> None:
        quantized = self._finished("quantize")
        self._finished("splice")
        for number, variant in enumerate(self.variants):
            self.report(f"verify: {variant}", number, len(self.variants))
            found = verify(self.checkpoint(variant), self.base, self.upstream, quantized)
            found["loaded_in_vllm"] = True if self._has_served(variant) else None
            path = self._verify_file(variant)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(found, path)
            if not found["ok"]:
                raise GraftError(f"{self.checkpoint(variant)}: {_what_is_wrong(found)}")

    def _verify_file(self, variant: str) -> Path:
        return self.folder / "verify" / f"{variant}.json"

    # bench

    def bench(self) -> None:
        for needed in ("capture", "splice"):
            self._finished(needed)  # said before anything is served
        self.bench_base()
        self.stop_base_server()
        for variant in self.variants:
            if not self._is_served(variant):
                with self._serving(variant) as client:
                    self._bench_variant(variant, client)
        decode = compare(self._bench_unit("base"), self._bench_unit("mtp"))
        write_json(decode, self.folder / "bench" / "decode.json")

    def bench_base(self) -> None:
        """Decode the benchmark's prompts with the base alone."""
        bench, prompts = self.recipe.bench, self._bench_prompts()
        asked = json.dumps([asdict(prompt) for prompt in prompts])
        claim_folder(
            self.folder / "bench",
            {
                "bench": asdict(bench) | {"prompts": sha256(asked.encode()).hexdigest()},
                "serve": asdict(self.recipe.serve),
                "vllm": str(find_vllm().version),
                "capture": fingerprints([self._finished("capture") / CONFIG_NAME]),
            },
        )
        if self._read(self._bench_file("base")) is None:
            measured = measure_base(self.base_client(), prompts, self._decode_config(), self.report)
            write_json(measured, self._bench_file("base"))

    def _bench_prompts(self) -> list[Prompt | ChatPrompt]:
        """Return the prompts to time, none of them captured."""
        wanted, capture = self.recipe.bench, self.recipe.capture
        skip = 0
        if wanted.prompts == capture.calibration_prompts:
            skip += capture.calibration_count
        if wanted.prompts == capture.evaluation_prompts:
            skip += capture.evaluation_count
        return load_calibration(wanted.prompts, wanted.count, skip)

    def _has_served(self, variant: str) -> bool:
        """Return whether vLLM has loaded and served the variant's present head."""
        served = self._read(self._bench_file(f"served-{variant}"))
        return served is not None and served["head"] == self._head(variant)

    def _is_served(self, variant: str) -> bool:
        """Return whether all that a variant's server is needed for has been measured."""
        if not self._has_served(variant):
            return False
        return variant != self.recipe.splice.variant or self._bench_file("mtp").exists()

    def _bench_variant(self, variant: str, client: ServerClient) -> None:
        """Note that a served variant loaded; measure its acceptance, and decode if chosen."""
        verified = self._read(self._verify_file(variant))
        if verified is not None:
            write_json({**verified, "loaded_in_vllm": True}, self._verify_file(variant))
        label, concurrency = f"acceptance: {variant}", self.recipe.capture.concurrency
        served = measure_acceptance(client, self._known_texts(), concurrency, self.report, label)
        if variant == self.recipe.splice.variant:
            mtp = measure_mtp(client, self._bench_unit("base"), self._decode_config(), self.report)
            write_json(mtp, self._bench_file("mtp"))
        head = {"head": self._head(variant)}
        write_json(served | head, self._bench_file(f"served-{variant}"))

    def _head(self, variant: str) -> dict[str, str]:
        return fingerprints([self.checkpoint(variant) / HEAD_SHARD])

    def _known_texts(self) -> list[KnownText]:
        texts = [t for t in read_texts(self._finished("capture")) if t.split == EVALUATION]
        served = texts[: self.recipe.bench.acceptance_count]
        return [KnownText(t.id, t.prompt, t.continuation) for t in served]

    def _decode_config(self) -> DecodeConfig:
        return DecodeConfig(self.recipe.bench.max_tokens, self.recipe.bench.rounds)

    def _bench_file(self, unit: str) -> Path:
        return self.folder / "bench" / f"{unit}.json"

    def _bench_unit(self, unit: str) -> dict[str, Any]:
        found = self._read(self._bench_file(unit))
        assert found is not None, f"{unit} is measured before it is read"
        return found

    # servers

    def base_client(self) -> ServerClient:
        """Return a client of the base's server, which starts when it is first needed."""
        if self._client is None:
            self._server = self._stack.enter_context(ExitStack())
            out = self.folder / "capture"
            options = capturing.recording_options(self.base, out, self._capture_config())
            self._client = self._server.enter_context(self._managed(options, "base"))
        return self._client

    def stop_base_server(self) -> None:
        """Stop the base's server if it runs: two would share the machine."""
        if self._server is not None:
            self._server.close()
        self._server = self._client = None

    @contextmanager
    def _serving(self, variant: str) -> Iterator[ServerClient]:
        """Serve a spliced checkpoint as the base was served, with drafts."""
        out = self.folder / "capture"
        options = replace(
            capturing.recording_options(self.checkpoint(variant), out, self._capture_config()),
            record=None,
            num_speculative_tokens=self.recipe.bench.num_speculative_tokens,
        )
        with self._managed(options, variant) as client:
            yield client

    @contextmanager
    def _managed(self, options: ServeOptions, name: str) -> Iterator[ServerClient]:
        serve = self.recipe.serve
        options = replace(
            options,
            tensor_parallel_size=serve.tensor_parallel_size,
            kv_cache_gib=serve.kv_cache_gib,
            extra_args=serve.extra_args,
        )

        def on_start(elapsed_s: float, _line: str) -> None:
            self.report(f"{name}: starting vLLM, {elapsed_s:.0f} s", 0, 0)

        with managed_server(options, self._log(name), on_start=on_start) as client:
            yield client

    def _log(self, name: str) -> Path:
        return self.folder / "logs" / f"vllm-{name}.log"

    # results

    def summary(self) -> dict[str, Any]:
        """Return the JSON of `run` and `demo`; what has not been run yet is null."""
        decode = self._read(self.folder / "bench" / "decode.json") or {}
        scored = self._read(self.folder / "score" / "report.json") or {"acceptance": {}}
        served = self._served()
        main = served.get("gptq") or served.get(self.recipe.splice.variant) or {}
        report = self.folder / "report" / "report.md"
        return {
            "acceptance": main.get("acceptance"),
            "acceptance_served": {v: found["acceptance"] for v, found in served.items()},
            "acceptance_offline": {v: a["top1"] for v, a in scored["acceptance"].items()},
            "acceptance_offline_on_served": self._offline_on_served(scored["acceptance"], served),
            "intervals_served": {v: found["interval"] for v, found in served.items()},
            "drafts_served": {v: found["drafted"] for v, found in served.items()},
            "decode_tok_s": decode.get("decode_tok_s"),
            "greedy_identical": decode.get("greedy_identical"),
            "divergences": decode.get("divergences"),
            "seconds": self.seconds,
            "checkpoint": str(self.checkpoint(self.recipe.splice.variant)),
            "report": str(report) if report.exists() else None,
        }

    def _served(self) -> dict[str, dict[str, Any]]:
        found = {v: self._read(self._bench_file(f"served-{v}")) for v in self.variants}
        return {v: result for v, result in found.items() if result is not None}

    @staticmethod
    def _offline_on_served(
        scored: dict[str, dict[str, Any]], served: dict[str, dict[str, Any]]
    ) -> dict[str, float]:
        """Return each served variant's offline acceptance on the texts that were served."""
        rates = {}
        for variant in scored.keys() & served.keys():
            walks = scored[variant]["sequences"][: served[variant]["texts"]]
            rates[variant] = sum(w["accepted"] for w in walks) / sum(w["drafts"] for w in walks)
        return rates

    def write_report(self) -> None:
        on_cpu = find_vllm().platform == "cpu"
        notes = [_ERROR_NOTE, *self._identity_notes(), *([_CPU_NOTE] if on_cpu else [])]
        results = RunResults(
            result=self.summary(),
            capture=self._read(self.folder / "capture" / "report.json"),
            quantize=self._read(self.folder / "quantize" / "report.json"),
            score=self._read(self.folder / "score" / "report.json"),
            served=self._served() or None,
            decode=self._read(self.folder / "bench" / "decode.json"),
            verify=self._read(self._verify_file(self.recipe.splice.variant)),
            model=self.recipe.model.name,
            device=_device(),
            versions=package_versions(),
            notes=notes,
        )
        write_report(self.folder / "report", results)

    def _identity_notes(self) -> list[str]:
        """Say how many of the texts served at once came out as captured."""
        at_once = self.recipe.capture.concurrency
        return [
            f"{variant}: with drafts, {at_once} requests at once, {found['identical']} of "
            f"{found['texts']} texts equal the captured ones; sums then round in another order."
            for variant, found in self._served().items()
        ]

    def _write_manifest(self, stage: str) -> None:
        """Say how a stage came about that has no manifest of its own making."""
        recipe = self.recipe
        heads = [self.checkpoint(v) / MANIFEST_NAME for v in self.variants]  # with the hashes
        config, inputs = {
            "splice": (asdict(recipe.splice), [self.folder / "quantize" / REPORT_NAME]),
            "verify": ({"variants": self.variants}, heads),
            "bench": (asdict(recipe.bench), heads),
            "report": ({}, []),
        }[stage]
        folder = self.folder / stage
        write_manifest(folder, stage, config, inputs, _device(), self.seconds[stage])

    def _finished(self, stage: str) -> Path:
        """Return an earlier stage's folder; GraftError if it has not been finished."""
        folder = self.folder / stage
        if not (folder / "manifest.json").exists():
            raise GraftError(f"{folder}: not finished; run `mtp-graft {stage}` first")
        return folder

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """Add the time inside to what earlier calls spent on the stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent
            write_json(self.seconds, self.folder / _SECONDS)

    @staticmethod
    def _read(path: Path) -> dict[str, Any] | None:
        if not path.exists():
            return None
        try:
            found: dict[str, Any] = json.loads(path.read_text())
        except ValueError as error:
            raise GraftError(f"{path}: not JSON ({error}); remove it and run again") from error
        return found


def _what_is_wrong(found: dict[str, Any]) -> str:
    """Say in one line what `verify` found."""
    wrong = [*found["missing"], *found["unexpected"]]
    wrong += [f"{m['tensor']} ({m['why']})" for m in found["mismatched"]]
    if not wrong:
        return "the base is not the one that it was spliced from; splice again"
    return f"{len(wrong)} tensors are wrong: {', '.join(wrong[:3])}; remove it and splice again"


_ERROR_NOTE = (
    "Relative errors are weighted with the Hessian of the calibration tokens themselves, which "
    "flatters GPTQ; acceptance is measured on other texts."
)
_CPU_NOTE = (
    "Served on a CPU by the plugin's reference path, on a model of a few layers: speeds show that "
    "the pipeline is right, not what the real model gains, and only their ratio within this run "
    "means anything."
)


def _torch_device(wanted: str) -> str:
    """Return the recipe's device, `auto` being the GPU if there is one."""
    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def _device() -> str:
    return f"{_torch_device('auto')} ({platform.processor() or platform.machine()})"
