"""What is wrong with an answer, beside the one to the same request that was asked alone."""

import json
import re
import unicodedata
from collections import Counter

from mtp_graft.bench.decode import WHOLE_REASONS, Answer, first_difference
from mtp_graft.bench.soak.mix import Request

EQUAL, NEAR_TIE, SOUND = "equal", "near tie", "sound"
#: Nats between two tokens of which rounding may choose either. On a sound H200: up to 0.7, and 2.1
#: once, after a long prompt.
NEAR_TIE_NATS = 2.5
#: DeepSeek's begin and end of text, which no model writes inside an answer; control tokens' names.
_ENDS = {0, 1}
_CONTROL = re.compile(r"<[｜|][^｜|<>\n]{1,40}[｜|]>|</?think>|｜DSML｜")
#: A loop: so many tokens before the last, which repeat at most so many.
_LOOP_TOKENS, _LOOP_PERIOD = 64, 12
#: Letters, and their share, from which on a new script counts; tokens that must have some text.
_MIN_LETTERS, _MIN_SHARE, _MIN_TOKENS = 20, 0.3, 8


def judge(request: Request, answer: Answer, reference: Answer) -> str:
    """Return EQUAL, NEAR_TIE, SOUND (sampled or penalized, of good form), or the kind of fault.

    After a near tie, or sampled, a small model may loop or name control tokens: these count only
    where a greedy text has no reason to differ.
    """
    body, alone = request.body, faults(request, reference)
    found = [kind for kind in faults(request, answer) if kind not in alone]
    if answer.get("prompt_tokens") != reference.get("prompt_tokens"):
        found.append("usage")
    if not found and body["temperature"] == 0 and said(answer) == said(reference):
        if answer["finish_reason"] == reference["finish_reason"]:
            return EQUAL
        if answer["token_ids"] == reference["token_ids"]:
            return "finish reason"
    if _has_new_script(answer, reference):
        found.append("script")
    if found or body["temperature"]:
        return found[0] if found else SOUND
    if answer["token_ids"] == reference["token_ids"][: len(answer["token_ids"])]:
        return "truncated"
    if "frequency_penalty" in body:  # which log-probabilities do not show
        return SOUND
    if margin(answer, reference) <= NEAR_TIE_NATS:
        return NEAR_TIE
    odd = [kind for kind in oddities(answer) if kind not in oddities(reference)]
    return odd[0] if odd else "other text"


def said(answer: Answer) -> tuple[str, str, list[list[str]]]:
    """Return all that a user sees: reasoning, content, and tool calls with their arguments."""
    calls = [*answer.get("calls", {}).values()]
    return answer.get("reasoning", ""), "".join(answer["texts"]), calls


def faults(request: Request, answer: Answer) -> list[str]:
    """Return the kinds of fault in an answer's form."""
    body, reason, size = request.body, answer["finish_reason"], len(answer["token_ids"])
    reasoning, text, calls = said(answer)
    prompt, new, total = (answer.get(f"{n}_tokens", 0) for n in ("prompt", "completion", "total"))
    called = calls and all(name == "note_reading" and _fits(given) for name, given in calls)
    found = {
        "truncated": reason is None or "total_tokens" not in answer,
        "finish reason": reason not in WHOLE_REASONS
        or (reason == "length" and size < body["max_tokens"])
        or (reason == "tool_calls" and not calls),
        "usage": new != size or size > body["max_tokens"] or not prompt or prompt + new != total,
        # Tokens of a call that has only begun have no text.
        "empty": not size
        or (size >= _MIN_TOKENS and "tools" not in body and not (reasoning or text)),
        "control tokens": not _ENDS.isdisjoint(answer["token_ids"][:-1]),
        "broken JSON": reason == "stop" and "response_format" in body and not _fits(text),
        "broken tool call": reason != "length" and "tool_choice" in body and not called,
        "stop string": any(stop in text for stop in body.get("stop", ())),
    }
    return [kind for kind, is_there in found.items() if is_there]


def oddities(answer: Answer) -> list[str]:
    """Return what a large model does not write, and a small one may."""
    end, periods = answer["token_ids"][:-1][-_LOOP_TOKENS:], range(1, _LOOP_PERIOD + 1)
    loops = len(end) == _LOOP_TOKENS and any(end[n:] == end[:-n] for n in periods)
    names = bool(_CONTROL.search("".join(map(str, said(answer)))))
    return ["control tokens"] * names + ["loop"] * loops


def margin(answer: Answer, reference: Answer) -> float:
    """Return how far the two tokens where texts part are apart, in nats; past an end, infinitely.

    A token that is not among the reference's best counts as the last of them.
    """
    theirs, ours = reference["token_ids"], answer["token_ids"]
    place, known = first_difference(theirs, ours), reference.get("logprobs", [])
    if place is None or place >= min(len(theirs), len(ours), len(known)):
        return float("inf")
    best: dict[str, float] = known[place]
    there = best.get(f"token_id:{ours[place]}", min(best.values()))
    return best[f"token_id:{theirs[place]}"] - there


def _fits(text: str) -> bool:
    """Return whether a text is what the schema in mix.json asks for."""
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return found in [
        {"colour": c, "count": n} for c in ("red", "green", "blue") for n in range(100)
    ]


def _has_new_script(answer: Answer, reference: Answer) -> bool:
    ours, theirs = (_scripts("".join(said(a)[:2])) for a in (answer, reference))
    new = sum(count for script, count in ours.items() if script not in theirs)
    enough = min(ours.total(), theirs.total()) >= _MIN_LETTERS
    return enough and new >= _MIN_SHARE * ours.total()


def _scripts(text: str) -> Counter[str]:
    """Count the letters of each script."""
    return Counter(unicodedata.name(c, "").partition(" ")[0] for c in text if c.isalpha())
