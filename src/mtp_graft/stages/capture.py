"""Capture: what the base does on every prompt, recorded at the speed at which it is served.

    prompts -> texts.jsonl      the base continues each prompt greedily, as any server does
    texts   -> recordings/      recording on, it gets every finished text as a prompt: one prefill
               index.jsonl      gives the same values as the steps that made the text

A prompt's text, and then its recording, are the units that a killed run keeps.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from hashlib import sha256
from itertools import pairwise
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mtp_graft.checkpoint import capture as capture_files
from mtp_graft.checkpoint import manifest
from mtp_graft.checkpoint.capture import CapturedSequence, FinishedText, read_sequences, read_texts
from mtp_graft.checkpoint.files import read_object, write_json
from mtp_graft.checkpoint.shards import INDEX_NAME, Shard, read_index
from mtp_graft.errors import GraftError, translated
from mtp_graft.recipe import CaptureSection
from mtp_graft.serving.client import Prompt, ServerClient
from mtp_graft.serving.command import CPU_STEP, ServeOptions
from mtp_graft.serving.server import explain
from mtp_graft.stages.calibration import HUB, iterate_prompts, load_calibration, take_fitting
from mtp_graft.stages.inputs import CALIBRATION, EVALUATION, REPORT_NAME, Progress
from mtp_graft.stages.parallel import device_name

#: How long the server may take to write what it computed.
WRITE_TIMEOUT_S = 60.0
_Texts = list[FinishedText]


class _NotWritten(GraftError):
    """The server has computed a recording and could not write it."""


def recording_options(base: Path, out: Path, settings: CaptureSection) -> ServeOptions:
    """Return how `base` has to be served so that `out` can be captured from it."""
    return ServeOptions(
        base,
        port=0,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.concurrency,
        # Every sequence is computed whole, in one step.
        max_num_batched_tokens=step_tokens(settings.max_model_len),
        chunked_prefill=False,
        prefix_caching=False,
        num_speculative_tokens=0,
        record=out,
        taps=settings.taps or (),
    )


def with_taps(settings: CaptureSection, upstream: Path) -> CaptureSection:
    """Return `settings` with the taps that upstream's config.json lists, if they name none."""
    path, key = upstream / "config.json", "dspark_target_layer_ids"
    config = read_object(path, "a config") if path.exists() else {}
    if settings.taps is not None or key not in config:
        return settings
    with translated(f"{path}: {key} is {config[key]!r}", ValidationError):
        return replace(settings, taps=config[key])


def step_tokens(max_model_len: int) -> int:
    """Return how many tokens a step of a recording server may have."""
    return max(max_model_len, CPU_STEP)


def capture(
    serving: AbstractContextManager[ServerClient],
    base: Path,
    out: Path,
    settings: CaptureSection,
    report: Progress,
    log: Path | None = None,
) -> dict[str, Any]:
    """Capture the prompts wanted for each split into `out`, from a server of `base`.

    `serving` gives a server started with `recording_options` that gets no other requests; it is
    not entered if the capture is finished. What an earlier, killed call finished is not done again.
    Of the result, `dropped` are prompts that are too long, and the speed is null where no text was
    missing. Raises GraftError if the server fails (with the reason from its `log`) or does not
    record, for too few short prompts, and if `out` was begun with other inputs or settings.
    """
    if (finished := _finished(base, out, settings)) is not None:
        return finished
    started = time.perf_counter()
    with serving as client, _explained(client, log):
        asked, dropped = _choose(client, settings)
        generate_tok_s = _generate(client, out, settings, asked, report)
        _record(client, out, settings, report)
    sequences, seconds = read_sequences(out), time.perf_counter() - started
    result = {
        "sequences": len(sequences),
        "tokens": sum(s.tokens for s in sequences),
        "splits": dict(Counter(s.split for s in sequences)),
        "dropped": dropped,
        "tok_s": {"generate": generate_tok_s},
        "seconds": seconds,
    }
    write_json(result, out / REPORT_NAME)
    inputs = [base / "config.json", base / INDEX_NAME]
    manifest.write_manifest(out, "capture", asdict(settings), inputs, device_name(), seconds)
    return result


def wanted_prompts(settings: CaptureSection) -> dict[str, tuple[str, int]]:
    """Return split -> source of its prompts, and how many."""
    return {
        CALIBRATION: (settings.calibration_prompts, settings.calibration_count),
        EVALUATION: (settings.evaluation_prompts, settings.evaluation_count),
    }


def read_prompts(settings: CaptureSection, *, local: bool = False) -> list[Prompt]:
    """Return so many prompts of each source, or file if `local`; GraftError if two share some."""
    wanted = Counter[str]()  # splits of one source share none
    for source, count in wanted_prompts(settings).values():
        wanted[source] += 0 if local and source.startswith(HUB) else count
    found = [load_calibration(source, count) for source, count in wanted.items() if count]
    _expect_held_out(settings, *({str(p.content) for p in prompts} for prompts in found))
    return [prompt for prompts in found for prompt in prompts]


def _expect_held_out(settings: CaptureSection, *splits: set[Any]) -> None:
    if len(splits) == 2 and (shared := set.intersection(*splits)):
        found = f"{len(shared)} of its prompts are in {settings.calibration_prompts}, too"
        raise GraftError(f"{settings.evaluation_prompts}: {found}; remove them from either")


def _finished(base: Path, out: Path, settings: CaptureSection) -> dict[str, Any] | None:
    """Claim `out` for this capture; return its report if it is complete already, else None."""
    prompts = [asdict(prompt) for prompt in read_prompts(settings)]
    asked = json.dumps([prompts, {split: n for split, (_, n) in wanted_prompts(settings).items()}])
    files = [base / name for name in ("config.json", INDEX_NAME, *set(read_index(base).values()))]
    files += [p for p in (*base.glob("tokenizer*"), *base.glob("chat_template*")) if p.is_file()]
    keys = ("max_prompt_tokens", "new_tokens", "calibration_tokens")
    decisive: dict[str, Any] = {key: getattr(settings, key) for key in keys}
    decisive["taps"] = settings.taps or None  # null, as in captures from before there were any
    decisive["prompts"] = sha256(asked.encode()).hexdigest()
    manifest.claim_folder(out, decisive | {"base": manifest.fingerprints(sorted(files))})
    (out / capture_files.RECORDINGS).mkdir(exist_ok=True)
    (out / capture_files.SWITCH_NAME).unlink(missing_ok=True)  # of a call that was killed
    finished = manifest.finished_result(out, REPORT_NAME)
    return finished if finished and len(read_sequences(out)) == finished["sequences"] else None


@contextmanager
def _explained(client: ServerClient, log: Path | None) -> Iterator[None]:
    """Add to an error what the server's log says, unless the server is well and wrote all."""
    try:
        yield
    except GraftError as error:
        if log is None or (client.is_healthy() and not isinstance(error, _NotWritten)):
            raise
        raise GraftError(f"{error}; in {log}: {explain(log)}") from error


def _choose(client: ServerClient, settings: CaptureSection) -> tuple[_Texts, list[dict[str, Any]]]:
    """Return the prompts to continue, the same in every call, and which others are too long."""
    wanted = wanted_prompts(settings)
    sources = {source: iterate_prompts(source) for source, _ in wanted.values()}
    asked, dropped = _Texts(), list[dict[str, Any]]()
    for split, (source, count) in wanted.items():
        most = settings.calibration_tokens if split == CALIBRATION else None
        asking = sources[source], count, settings.max_prompt_tokens, split
        fit, rest = take_fitting(client, *asking, most, settings.new_tokens)
        for name, token_ids in fit.items():
            asked.append(FinishedText(len(asked), name, split, token_ids, ()))
        dropped += [{"id": n, "split": split, "tokens": len(ids)} for n, ids in rest.items()]
    _expect_held_out(settings, *({t.prompt for t in asked if t.split == split} for split in wanted))
    return asked, dropped


def _generate(
    client: ServerClient, out: Path, settings: CaptureSection, asked: _Texts, report: Progress
) -> float | None:
    """Have every prompt continued that is not yet; return the speed in tokens a second."""
    done = {text.number for text in read_texts(out)}
    missing = [text for text in asked if text.number not in done]

    def finish(text: FinishedText) -> FinishedText:
        return replace(text, continuation=client.complete(text.prompt, settings.new_tokens))

    report("capture: generate", len(done), len(asked))
    started, tokens = time.perf_counter(), 0
    with ThreadPool(settings.concurrency) as pool:  # whose threads do not keep Ctrl-C waiting
        for finished, text in enumerate(pool.imap_unordered(finish, missing), start=len(done) + 1):
            capture_files.append_row(out, text)
            tokens += len(text.continuation)
            report("capture: generate", finished, len(asked))
    return tokens / (time.perf_counter() - started) if tokens else None


def _record(client: ServerClient, out: Path, settings: CaptureSection, report: Progress) -> None:
    """Have every text recorded that is not yet, `concurrency` of them at a time."""
    texts, size = read_texts(out), settings.concurrency
    done = {sequence.number for sequence in read_sequences(out)}
    missing = [text for text in texts if text.number not in done]
    _remove_strays(out)
    with ThreadPool(size) as pool:
        for first in range(0, len(missing), size):
            report("capture: record", len(done) + first, len(texts))
            block = missing[first : first + size]
            with _recording(out):
                pool.map(lambda text: client.complete(text.token_ids, 1), block)
                _collect(out, block)
    report("capture: record", len(texts), len(texts))
    _remove_strays(out)


@contextmanager
def _recording(out: Path) -> Iterator[None]:
    """Let the server record in the block, at whose ends it has no requests."""
    for name in (capture_files.INTACT_NAME, capture_files.SWITCH_NAME):
        (out / name).touch()
    try:
        yield
    finally:
        for name in (capture_files.SWITCH_NAME, capture_files.INTACT_NAME):
            (out / name).unlink(missing_ok=True)


def _remove_strays(out: Path) -> None:
    """Remove recordings that no line of the index names, and unfinished ones."""
    named = {sequence.recording for sequence in read_sequences(out)}
    for path in (out / capture_files.RECORDINGS).iterdir():
        if path.name not in named:
            path.unlink()


def _collect(out: Path, texts: _Texts) -> None:
    """Find `texts`, which have been sent, in new recordings, and enter them in the index."""
    missing, seen = [*texts], {sequence.recording for sequence in read_sequences(out)}
    folder, deadline = out / capture_files.RECORDINGS, time.monotonic() + WRITE_TIMEOUT_S
    while missing:
        new = {path.name for path in folder.glob("*.safetensors")} - seen
        for name in sorted(new):
            _enter(out, name, missing)
        seen |= new
        if not (out / capture_files.INTACT_NAME).exists():
            cure = "make room there if the disk is full, and run again: what was written is kept"
            raise _NotWritten(f"{folder}: the server could not write what it recorded; {cure}")
        if new:
            deadline = time.monotonic() + WRITE_TIMEOUT_S
        elif time.monotonic() > deadline:
            found = f"prompt {missing[0].id!r} ({len(missing)} in all), sent, is in no recording"
            expected = "expected a server that records here, without prefix caching or chunks"
            raise GraftError(f"{folder}: {found}; {expected}; its log may say more")
        else:
            time.sleep(0.01)


def _enter(out: Path, name: str, missing: _Texts) -> None:
    """Enter in the index what a recording has of the `missing` texts; they no longer are."""
    with Shard(out / capture_files.RECORDINGS / name) as shard:
        recording = shard.read(("token_ids", "starts"))
    token_ids = tuple(recording["token_ids"].tolist())
    for start, end in pairwise([*recording["starts"].tolist(), len(token_ids)]):
        # Of equal prompts each copy stands for one; what is none is another's, or ours again.
        if text := next((t for t in missing if t.token_ids == token_ids[start:end]), None):
            missing.remove(text)
            about = text.number, text.id, text.split, len(text.prompt)
            capture_files.append_row(out, CapturedSequence(*about, end - start, name, start))
