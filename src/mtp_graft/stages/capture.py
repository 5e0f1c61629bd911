"""Capture: what the base does on every prompt, recorded at the speed at which it is served.

First the base continues all prompts greedily, as any server does, until it ends the text or has
given as many tokens as were asked for. Then, recording switched on, it gets every finished sequence
as a prompt: one prefill gives the same values as the steps that made the sequence. A prompt's text,
and then its place in a recording, are the units that a killed run keeps.
"""

import json
import platform
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from mtp_graft.checkpoint import shards
from mtp_graft.checkpoint.capture import (
    INTACT_NAME,
    RECORDINGS,
    SWITCH_NAME,
    FinishedText,
    append_text,
    read_sequences,
    read_texts,
)
from mtp_graft.checkpoint.manifest import (
    claim_folder,
    fingerprints,
    finished_result,
    write_manifest,
)
from mtp_graft.errors import GraftError
from mtp_graft.serving.client import ServerClient
from mtp_graft.serving.command import ServeOptions, find_vllm
from mtp_graft.serving.concurrent import concurrently
from mtp_graft.serving.server import explain, managed_server
from mtp_graft.stages.calibration import iterate_prompts, load_calibration, take_fitting
from mtp_graft.stages.inputs import REPORT_NAME, Progress
from mtp_graft.stages.recordings import Collector, NotWritten, remove_strays, switched_on

#: Blocks that are also sent without recording, to compare the speeds.
_MEASURED_BLOCKS = 2


@dataclass(frozen=True)
class CaptureConfig:
    """What the base is asked, and how long it answers."""

    max_prompt_tokens: int = 512  # longer prompts are left out; others take their place
    new_tokens: int = 256  # per prompt, at most: the base ends a text where it ends
    concurrency: int = 8  # prompts in work at a time
    max_model_len: int = 2048


@dataclass(frozen=True)
class Wanted:
    """The next `count` prompts of `source` that are not too long; splits of a source share none."""

    source: str  # as `load_calibration` has it
    count: int


def capture(
    base: Path,
    out: Path,
    config: CaptureConfig,
    prompts: Mapping[str, Wanted],
    report: Progress,
) -> dict[str, Any]:
    """Serve `base` and capture the prompts wanted for each split; see `capture_with`."""
    if (finished := finished_capture(base, out, config, prompts)) is not None:
        return finished
    log = out / "vllm.log"

    def on_start(elapsed_s: float, _line: str) -> None:
        report(f"capture: starting vLLM, {elapsed_s:.0f} s", 0, 0)

    options = recording_options(base, out, config)
    with managed_server(options, log, on_start=on_start) as client:
        return capture_with(client, base, out, config, prompts, report, log)


def recording_options(base: Path, out: Path, config: CaptureConfig) -> ServeOptions:
    """Return how `base` has to be served so that `out` can be captured from it."""
    return ServeOptions(
        base,
        port=0,
        max_model_len=config.max_model_len,
        max_num_seqs=config.concurrency,
        # Every sequence is computed whole, in one step.
        max_num_batched_tokens=step_tokens(config.max_model_len),
        chunked_prefill=False,
        prefix_caching=False,
        num_speculative_tokens=0,
        record=out,
    )


def step_tokens(max_model_len: int) -> int:
    """Return how many tokens a step of a recording server may have."""
    return max(max_model_len, 2048)


def capture_with(
    client: ServerClient,
    base: Path,
    out: Path,
    config: CaptureConfig,
    prompts: Mapping[str, Wanted],
    report: Progress,
    log: Path | None = None,
) -> dict[str, Any]:
    """Capture the prompts wanted for each split into `out`, from a server of `base`.

    The server was started with `recording_options` and must have no other requests meanwhile.
    Prompts that an earlier, killed call finished are not done again; a finished capture is only
    reported. Returns `sequences`, `tokens`, `splits`, `dropped` (`id`, `split` and `tokens` of
    prompts that are too long), `tok_s` (`generate`, `prefill`, `prefill_recording`; null where
    nothing was left to measure), `seconds` and `folder`.

    Raises GraftError if the server fails (with the reason from `log`), does not record, if a
    source has too few prompts that are short enough, or if `out` was begun with another base,
    other prompts or another configuration.
    """
    if (finished := finished_capture(base, out, config, prompts)) is not None:
        return finished
    started = time.perf_counter()
    with _explained(client, log):
        asked, dropped = _choose(client, config, prompts)
        generating = _generate(client, out, config, asked, report)
        _check_space(base, out)
        plain, recording = _record_all(client, out, config, report)
    sequences = read_sequences(out)
    seconds = time.perf_counter() - started
    result = {
        "sequences": len(sequences),
        "tokens": sum(s.tokens for s in sequences),
        "splits": {split: sum(s.split == split for s in sequences) for split in prompts},
        "dropped": dropped,
        "tok_s": {
            "generate": generating.tok_s,
            "prefill": plain.tok_s,
            "prefill_recording": recording.tok_s,
        },
        "seconds": seconds,
        "folder": str(out),
    }
    shards.write_json(result, out / REPORT_NAME)
    inputs = [base / "config.json", base / shards.INDEX_NAME]
    device = f"{find_vllm().platform} ({platform.processor() or platform.machine()})"
    write_manifest(out, "capture", asdict(config), inputs, device, seconds)
    return result


def finished_capture(
    base: Path,
    out: Path,
    config: CaptureConfig,
    prompts: Mapping[str, Wanted],
) -> dict[str, Any] | None:
    """Claim `out` for this capture; return its report if it is complete already, else None.

    Raises GraftError if `out` was begun with another base, other prompts or another configuration,
    and for a configuration that cannot work.
    """
    longest = config.max_prompt_tokens + config.new_tokens + 1
    if longest > config.max_model_len:
        raise GraftError(
            f"max_model_len is {config.max_model_len}, expected at least {longest}: "
            f"{config.max_prompt_tokens} tokens of prompt, {config.new_tokens} new ones and one "
            "more when they are recorded"
        )
    totals: Counter[str] = Counter()  # prompts of each source
    for wanted in prompts.values():
        totals[wanted.source] += wanted.count
    rows = [asdict(p) for source, n in totals.items() for p in load_calibration(source, n)]
    asked = json.dumps([rows, {split: wanted.count for split, wanted in prompts.items()}])
    shard_names = sorted(set(shards.read_index(base).values()))
    files = [base / name for name in ("config.json", shards.INDEX_NAME, *shard_names)]
    identity = {
        "max_prompt_tokens": config.max_prompt_tokens,
        "new_tokens": config.new_tokens,
        "texts_end": "where the base ends them",  # unlike in captures of earlier versions
        "prompts": sha256(asked.encode()).hexdigest(),
        "base": fingerprints(files),
    }
    claim_folder(out, identity)
    (out / RECORDINGS).mkdir(exist_ok=True)
    for name in (SWITCH_NAME, INTACT_NAME):
        (out / name).unlink(missing_ok=True)  # of a call that was killed
    sequences = read_sequences(out)
    for name in sorted({sequence.recording for sequence in sequences}):
        if not (out / RECORDINGS / name).is_file():
            raise GraftError(
                f"{out / RECORDINGS / name}: not found, but the capture's index names it; "
                f"remove {out} and capture again"
            )
    finished = finished_result(out, REPORT_NAME)
    if finished is None or len(sequences) < totals.total():
        return None
    return finished | {"folder": str(out)}


def _check_space(base: Path, out: Path) -> None:
    """Raise GraftError if what is left to record does not fit the disk."""
    recorded = {sequence.number for sequence in read_sequences(out)}
    tokens = sum(len(t.token_ids) for t in read_texts(out) if t.number not in recorded)
    settings = json.loads((base / "config.json").read_text())
    try:
        needed = tokens * settings["hc_mult"] * settings["hidden_size"] * 2  # BF16
    except KeyError as error:
        raise GraftError(f"{base / 'config.json'}: has no {error}; expected DeepSeek-V4") from error
    free = shutil.disk_usage(out).free
    if free < needed:
        raise GraftError(
            f"{out}: {free:,} bytes free, {needed:,} needed for the residuals of {tokens:,} "
            "tokens; make room or use another --run"
        )


@contextmanager
def _explained(client: ServerClient, log: Path | None) -> Iterator[None]:
    """Add to an error what the server's log says, unless the server is well and wrote all."""
    try:
        yield
    except GraftError as error:
        if log is None or (client.is_healthy() and not isinstance(error, NotWritten)):
            raise
        raise GraftError(f"{error}; in {log}: {explain(log)}") from error


@dataclass
class _Meter:
    """Tokens, and the time they took."""

    tokens: int = 0
    seconds: float = 0.0

    @contextmanager
    def measure(self, tokens: int) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started
        self.tokens += tokens

    @property
    def tok_s(self) -> float | None:
        return self.tokens / self.seconds if self.tokens else None


def _choose(
    client: ServerClient, config: CaptureConfig, prompts: Mapping[str, Wanted]
) -> tuple[list[FinishedText], list[dict[str, Any]]]:
    """Return the prompts to continue, and `id`, `split` and `tokens` of those that are too long.

    Every call makes the same choice. Raises GraftError for a source that has too few others.
    """
    sources = {wanted.source: iterate_prompts(wanted.source) for wanted in prompts.values()}
    asked: list[FinishedText] = []
    dropped: list[dict[str, Any]] = []
    for split, wanted in prompts.items():
        source = sources[wanted.source]
        fit, rest = take_fitting(client, source, wanted.count, config.max_prompt_tokens, split)
        numbered = enumerate(fit, start=len(asked))
        asked += [FinishedText(n, e.prompt.id, split, e.token_ids, ()) for n, e in numbered]
        dropped += [{"id": e.prompt.id, "split": split, "tokens": len(e.token_ids)} for e in rest]
    return asked, dropped


def _generate(
    client: ServerClient,
    out: Path,
    config: CaptureConfig,
    asked: Sequence[FinishedText],
    report: Progress,
) -> _Meter:
    """Have every prompt continued that is not yet."""
    done = {text.number: text for text in read_texts(out)}
    for text in asked:
        if text.number in done and text.prompt != done[text.number].prompt:
            raise GraftError(
                f"{out}: prompt {text.id!r} was {done[text.number].id!r} when the capture began, "
                "or is encoded otherwise now; remove the folder or use another --run"
            )
    missing = [text for text in asked if text.number not in done]

    def finish(text: FinishedText) -> FinishedText:
        return replace(text, continuation=client.complete(text.prompt, config.new_tokens))

    meter = _Meter()
    with meter.measure(0):
        finished = len(done)
        report("capture: generate", finished, len(asked))
        for text in concurrently(finish, missing, config.concurrency):
            append_text(out, text)
            meter.tokens += len(text.continuation)
            finished += 1
            report("capture: generate", finished, len(asked))
    return meter


def _record_all(
    client: ServerClient, out: Path, config: CaptureConfig, report: Progress
) -> tuple[_Meter, _Meter]:
    """Have every text recorded that is not yet; return the speeds without and with recording.

    Both are of the first blocks, which are sent both ways, one first as often as the other.
    """
    texts = read_texts(out)
    recorded = {sequence.number for sequence in read_sequences(out)}
    missing = [text for text in texts if text.number not in recorded]
    remove_strays(out)
    collector = Collector(out, missing)
    plain, recording = _Meter(), _Meter()

    def send(text: FinishedText) -> None:
        client.complete(text.token_ids, 1)

    def send_all(block: Sequence[FinishedText], meter: _Meter) -> None:
        with meter.measure(sum(len(text.token_ids) for text in block)):
            for _ in concurrently(send, block, config.concurrency):
                pass

    def record(block: Sequence[FinishedText], meter: _Meter) -> None:
        with meter.measure(sum(len(text.token_ids) for text in block)), switched_on(out):
            for _ in concurrently(send, block, config.concurrency):
                collector.collect()
                report("capture: record", len(texts) - len(collector), len(texts))
            collector.wait_for(block)

    report("capture: record", len(recorded), len(texts))
    send_all(missing[: config.concurrency], _Meter())  # warm-up: the first prefills of such length
    size = config.concurrency
    for number, first in enumerate(range(0, len(missing), size)):
        block = missing[first : first + size]
        if number >= _MEASURED_BLOCKS:
            record(block, _Meter())
        elif number % 2:
            record(block, recording)
            send_all(block, plain)
        else:
            send_all(block, plain)
            record(block, recording)
    report("capture: record", len(texts), len(texts))
    remove_strays(out)
    return plain, recording
