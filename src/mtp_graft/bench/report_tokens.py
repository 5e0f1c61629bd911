"""The report's section about single answers: what every step with MTP gave, and when."""

from collections.abc import Iterator, Mapping
from typing import Any

from mtp_graft.bench.decode import Timed
from mtp_graft.bench.markdown import NOTHING, bullets, count, not_measured, percent, table
from mtp_graft.bench.recorded import Recording, read_recordings
from mtp_graft.bench.results import RunResults


def tokens_section(results: RunResults) -> Iterator[str]:
    """Return each recorded answer's steps, acceptance and time, and whether the texts agree."""
    recorded, recordings = results.recorded, read_recordings(results.recorded)
    if recorded is None or not recordings:
        yield not_measured("When each token came")
        return
    heading = ["prompt", "tokens", "chunks", "accepted of drafted", "acceptance", "base, s",
               "with MTP, s", "same tokens"]  # fmt: skip
    yield table(heading, [_row(recording) for recording in recordings], "lrrrrrrl")
    rounds = [f"{name}, {_which(recorded[key])}" for key, name in _SERVERS if recorded[key]]
    yield (
        f"The answers are those of the round with the median speed: {'; '.join(rounds)}. "
        "Seconds go from the request to the last token."
    )
    if recorded["base"] is None:
        yield not_measured("When each token of the base came")
    if doubts := [doubt for recording in recordings for doubt in _doubts(recording)]:
        yield bullets(doubts)


_SERVERS = (("base", "base"), ("mtp", "with MTP"))


def _which(stream: Mapping[str, Any]) -> str:
    return f"round {stream['round']} of {stream['rounds']}"


def _row(recording: Recording) -> list[str]:
    done, counted = recording.mtp.completion, recording.mtp.counters
    drafted = [NOTHING, NOTHING]
    if counted is not None:
        accepted = f"{counted.num_accepted_tokens:,} of {counted.num_draft_tokens:,}"
        drafted = [accepted, percent(counted.acceptance)]
    return [
        recording.id,
        f"{len(done.token_ids):,}",
        f"{len(done.chunks):,}",
        *drafted,
        _seconds(recording.base),
        _seconds(recording.mtp),
        _agreement(recording),
    ]


def _seconds(timed: Timed | None) -> str:
    return (
        NOTHING if timed is None else f"{timed.completion.ttft_s + timed.completion.decode_s:.2f}"
    )


def _agreement(recording: Recording) -> str:
    if recording.base is None:
        return NOTHING
    at = recording.divergence
    return "yes" if at is None else f"to position {at:,}"


def _doubts(recording: Recording) -> Iterator[str]:
    """Say why it is not known which tokens of an answer were drafts."""
    if recording.account is not None:
        return
    done, counted = recording.mtp.completion, recording.mtp.counters
    if counted is None:
        yield f"{recording.id}: the server counted no drafts."
        return
    yield (
        f"{recording.id}: {count(len(done.token_ids), 'token')} came in "
        f"{count(len(done.chunks), 'chunk')}, the first from prefill, but the server counted "
        f"{count(counted.num_drafts, 'step')} with drafts and {counted.num_accepted_tokens:,} "
        "accepted drafts, so a chunk is not always one step: which tokens were drafts is not known."
    )
