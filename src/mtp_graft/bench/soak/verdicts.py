"""What is wrong with an answer, beside the one to the same request that was asked alone."""

import re
import unicodedata
from collections import Counter
from collections.abc import Collection

from pydantic import ValidationError

from mtp_graft.bench.decode import first_difference
from mtp_graft.bench.requests import WHOLE_REASONS
from mtp_graft.bench.soak.ask import Answer
from mtp_graft.bench.soak.mix import TOOL, Reading, Request

EQUAL, NEAR_TIE, SOUND = "equal", "near tie", "sound"
#: Nats between two tokens of which rounding may choose either. On a sound H200: up to 0.7, and 2.1
#: once, after a long prompt.
NEAR_TIE_NATS = 2.5
#: No model writes them inside an answer. `/tokenize` says which tokens they are.
ENDS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
_CONTROL = re.compile(r"<[｜|][^｜|<>\n]{1,40}[｜|]>|</?think>|｜DSML｜")
#: A loop: so many tokens before the last, which repeat at most so many.
_LOOP_TOKENS, _LOOP_PERIOD = 64, 12
#: Letters, and their share, from which on a new script counts; tokens that must have some text.
_MIN_LETTERS, _MIN_SHARE, _MIN_TOKENS = 20, 0.3, 8


def judge(
    request: Request,
    answer: Answer,
    reference: Answer,
    end_ids: Collection[int] = (),
    near_tie_nats: float = NEAR_TIE_NATS,
) -> str:
    """Return EQUAL, NEAR_TIE, SOUND (sampled or penalized, of good form), or the kind of fault.

    What a small model says after a near tie, or sampled, may loop or name control tokens: these
    count only where a greedy text has no reason to differ.
    """
    body, alone = request.body, faults(request, reference, end_ids)
    found = [kind for kind in faults(request, answer, end_ids) if kind not in alone]
    if answer.usage.get("prompt_tokens") != reference.usage.get("prompt_tokens"):
        found.append("usage")
    if body["temperature"] == 0 and answer.said == reference.said and not found:
        return EQUAL if answer.finish_reason == reference.finish_reason else "finish reason"
    if _has_new_script(answer, reference):
        found.append("script")
    if found or body["temperature"]:
        return found[0] if found else SOUND
    if answer.token_ids == reference.token_ids[: len(answer.token_ids)]:
        return "truncated"
    if "frequency_penalty" in body:  # which log-probabilities do not show
        return SOUND
    if margin(answer, reference) <= near_tie_nats:
        return NEAR_TIE
    odd = [kind for kind in oddities(answer) if kind not in oddities(reference)]
    return odd[0] if odd else "other text"


def faults(request: Request, answer: Answer, end_ids: Collection[int] = ()) -> list[str]:
    """Return the kinds of fault in an answer's form."""
    body, reason, size = request.body, answer.finish_reason, len(answer.token_ids)
    calls, text = answer.calls.values(), answer.content
    prompt, new, both = (answer.usage.get(f"{n}_tokens") for n in ("prompt", "completion", "total"))
    called = calls and all(n == TOOL["function"]["name"] and _fits(given) for n, given in calls)
    found = {
        "truncated": reason is None or not answer.usage,
        "finish reason": reason not in WHOLE_REASONS
        or (reason == "length" and size < body["max_tokens"])
        or (reason == "tool_calls" and not calls),
        "usage": not prompt or new != size or size > body["max_tokens"] or prompt + size != both,
        # Tokens of a call that has only begun have no text.
        "empty": not size or (size >= _MIN_TOKENS and "tools" not in body and not any(answer.said)),
        "control tokens": not {*answer.token_ids[:-1]}.isdisjoint(end_ids),
        "broken JSON": reason == "stop" and "response_format" in body and not _fits(text),
        "broken tool call": reason != "length" and "tool_choice" in body and not called,
        "stop string": any(stop in text for stop in body.get("stop", ())),
    }
    return [kind for kind, is_there in found.items() if is_there]


def oddities(answer: Answer) -> list[str]:
    """Return what a large model does not write, and a small one may."""
    text = "".join(map(str, answer.said))
    end, periods = answer.token_ids[:-1][-_LOOP_TOKENS:], range(1, _LOOP_PERIOD + 1)
    loops = len(end) == _LOOP_TOKENS and any(end[n:] == end[:-n] for n in periods)
    return ["control tokens"] * bool(_CONTROL.search(text)) + ["loop"] * loops


def margin(answer: Answer, reference: Answer) -> float:
    """Return how far the two tokens where texts part are apart, in nats; past an end, infinitely.

    A token that is not among the reference's best counts as the last of them.
    """
    place = first_difference(reference.token_ids, answer.token_ids)
    if place is None or place >= min(len(reference.logprobs), len(answer.token_ids)):
        return float("inf")
    best = reference.logprobs[place]
    there = best.get(answer.token_ids[place], min(best.values()))
    return best[reference.token_ids[place]] - there


def _fits(text: str) -> bool:
    try:
        return bool(Reading.model_validate_json(text))
    except ValidationError:
        return False


def _has_new_script(answer: Answer, reference: Answer) -> bool:
    ours, theirs = (_scripts(a.reasoning + a.content) for a in (answer, reference))
    new = sum(count for script, count in ours.items() if script not in theirs)
    enough = min(ours.total(), theirs.total()) >= _MIN_LETTERS
    return enough and new >= _MIN_SHARE * ours.total()


def _scripts(text: str) -> Counter[str]:
    """Count the letters of each script."""
    names = (unicodedata.name(sign, "").partition(" ")[0] for sign in text if sign.isalpha())
    return Counter(names)
