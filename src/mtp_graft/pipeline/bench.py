"""The bench stage: servers of the base and of every head, one after the other, and what they do.

Each measurement is a file in `bench/` and is not repeated.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from mtp_graft.bench.decode import DecodeConfig, compare, measure_acceptance, measure_turn, measured
from mtp_graft.checkpoint.capture import read_texts
from mtp_graft.checkpoint.manifest import CONFIG_NAME, claim_folder, fingerprints
from mtp_graft.checkpoint.quant_manifest import HEAD_SHARD
from mtp_graft.pipeline.folder import Run
from mtp_graft.serving import plan, topology
from mtp_graft.serving.client import COUNT_DRAFTS, Prompt, ServerClient
from mtp_graft.serving.command import ServeOptions, find_vllm
from mtp_graft.serving.server import managed_server
from mtp_graft.stages.calibration import iterate_prompts, take_fitting
from mtp_graft.stages.capture import recording_options, wanted_prompts
from mtp_graft.stages.inputs import EVALUATION


def measuring_options(run: Run, checkpoint: Path, k: int | None) -> ServeOptions:
    """Return how a checkpoint is served to be measured: the base (`k` 0) as heads, but for `k`."""
    options = recording_options(checkpoint, run.path / "capture", run.capture)
    if find_vllm().platform != "cpu":  # where one server does for the base's capture, too
        options = replace(options, record=None, max_num_batched_tokens=None, chunked_prefill=True)
    if k == 0:
        return options
    return replace(options, num_speculative_tokens=k, extra_args=COUNT_DRAFTS)


@contextmanager
def serving(run: Run, options: ServeOptions, name: str) -> Iterator[ServerClient]:
    """Serve as the recipe says and the hardware needs, which is printed; `name` is the log's."""
    extra = *options.extra_args, *run.recipe.serve.extra_args
    options = replace(options, **(asdict(run.recipe.serve) | {"extra_args": extra}))
    options, notes = plan.adapt(options, topology.hardware_for(find_vllm().platform))
    for note in notes:
        if note not in run.adjusted:
            run.adjusted.append(note)
            print(f"serving: {note}", file=sys.stderr, flush=True)
    with managed_server(options, server_log(run, name), run.progress) as client:
        yield client


def server_log(run: Run, name: str) -> Path:
    """Return where a server's output goes."""
    return run.path / "logs" / f"vllm-{name}.log"


def bench(run: Run) -> list[Path]:
    """Measure whatever has not been, the chosen head first; compare decoding with the base."""
    for needed in ("capture", "splice"):
        run.finished(needed)  # said before anything is served
    base = measure_base(run, serving(run, measuring_options(run, run.models.base, 0), "base"))
    for variant in run.recipe.served_variants:
        if not has_served(run, variant):
            options = measuring_options(run, run.checkpoint(variant), run.recipe.bench.k)
            with serving(run, options, variant) as client:
                _measure_head(run, variant, base["prompts"], client)
    mtp = run.result("bench/mtp") or {}
    run.keep("bench/decode", compare([base], [mtp], _config(run)) | {"adjusted": mtp["adjusted"]})
    return run.manifests


def measure_base(run: Run, server: AbstractContextManager[ServerClient]) -> dict[str, Any]:
    """Decode prompts with room for an answer; `server`, of the base, is entered if need be."""
    recipe, wanted = run.recipe, run.recipe.bench
    asked = json.dumps([asdict(p) for p in islice(_prompts(run), wanted.count)])
    config = {
        "bench": asdict(wanted) | {"prompts": sha256(asked.encode()).hexdigest()},
        "serve": asdict(recipe.serve),
        "chosen": recipe.splice.variant,
        "vllm": str(find_vllm().version),
        "capture": fingerprints([run.finished("capture") / CONFIG_NAME]),
    }
    claim_folder(run.path / "bench", config)

    def measure() -> dict[str, Any]:
        with server as client:
            longest = recipe.capture.max_model_len - wanted.max_tokens
            prompts, _ = take_fitting(client, _prompts(run), wanted.count, longest, "bench")
            how = _config(run), run.progress, "base: decode"
            return measure_turn(client, prompts, *how, with_margins=True)

    return measured(run.path / "bench", "base", measure)


def has_served(run: Run, variant: str) -> bool:
    """Return whether vLLM has loaded and served the variant's present head."""
    served = run.result(f"bench/served-{variant}")
    return served is not None and served["head"] == _head(run, variant)


def _measure_head(run: Run, variant: str, prompts: Mapping[str, Any], client: ServerClient) -> None:
    """Note that a served head loaded; measure its acceptance, and decode `prompts` if chosen."""
    if (verified := run.result(f"verify/{variant}")) is not None:
        run.keep(f"verify/{variant}", verified | {"loaded_in_vllm": True})
    capture, label = run.recipe.capture, f"acceptance: {variant}"
    texts = [t for t in read_texts(run.path / "capture") if t.split == EVALUATION]
    texts = texts[: run.recipe.bench.acceptance_count]
    limits = capture.new_tokens, capture.concurrency
    served = measure_acceptance(client, texts, *limits, run.progress, label)
    if variant == run.recipe.splice.variant:
        found = measure_turn(client, prompts, _config(run), run.progress, "MTP: decode")
        run.keep("bench/mtp", found | {"adjusted": run.adjusted})
    run.keep(f"bench/served-{variant}", served | {"head": _head(run, variant)})


def _config(run: Run) -> DecodeConfig:
    return DecodeConfig(run.recipe.bench.max_tokens, run.recipe.bench.rounds)


def _prompts(run: Run) -> Iterator[Prompt]:
    """Yield prompts to time; those captured from the same source are left out."""
    capture, source = run.recipe.capture, run.recipe.bench.prompts
    sources = {split: asked for split, (asked, _) in wanted_prompts(capture).items()}
    dropped = (run.result("capture/report") or {}).get("dropped", ())
    seen = [(text.split, text.id) for text in read_texts(run.path / "capture")]
    seen += [(prompt["split"], prompt["id"]) for prompt in dropped]
    taken = {prompt_id for split, prompt_id in seen if sources[split] == source}
    return (prompt for prompt in iterate_prompts(source) if prompt.id not in taken)


def _head(run: Run, variant: str) -> dict[str, str]:
    return fingerprints([run.checkpoint(variant) / HEAD_SHARD])
