"""What we ask of a running vLLM server: completions on token ids, tokenization, metrics."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from mtp_graft.errors import GraftError, in_words
from mtp_graft.serving.metrics import SpecDecodeCounters, parse_spec_decode
from mtp_graft.serving.prompts import ChatPrompt, Prompt

#: Silence allowed between two bytes of an answer; the first step may compile kernels.
READ_TIMEOUT_S = 600.0
#: What reading an answer raises that is no JSON, too deep, or of another structure.
READ_ERRORS = (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError)

#: Options of `vllm serve` with which it tells a client what it drafted for the client's request.
COUNT_DRAFTS = ("--per-request-spec-decode-metrics", "detailed")

Found = TypeVar("Found")


@dataclass(frozen=True)
class Completion:
    """One answer, with the arrival time of each chunk of tokens."""

    token_ids: tuple[int, ...]
    finish_reason: str | None
    started_s: float  # on time.perf_counter's clock, as the chunks
    chunks: tuple[tuple[float, int], ...]  # (arrival in s, tokens in it)
    texts: tuple[str, ...] = ()  # what each chunk adds to the text; empty if not asked for

    @property
    def ttft_s(self) -> float:
        """Return the seconds from the request to its first token."""
        return self.chunks[0][0] - self.started_s

    @property
    def decode_s(self) -> float:
        """Return the seconds between the first and the last chunk."""
        return self.chunks[-1][0] - self.chunks[0][0]

    @property
    def num_decoded(self) -> int:
        """Return the tokens that came after the first chunk (all but one, as a rule)."""
        return len(self.token_ids) - self.chunks[0][1]


@dataclass(frozen=True)
class ScoredCompletion:
    """One greedy answer and how sure the model was of each token."""

    token_ids: tuple[int, ...]
    margins: tuple[float, ...]  # logprob of the best token less that of the second best


@dataclass(frozen=True)
class Step:
    """How many tokens one step drafted, and how many of them, from the first on, it accepted."""

    drafted: int
    accepted: int


class ServerUnreachable(GraftError):
    """No connection, or it broke before the answer was complete."""


class ServerClient:
    """A client of one vLLM server; closes with its `with` block.

    Every method raises GraftError, naming the server, where it cannot be reached or refuses.
    """

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        timeout = httpx.Timeout(READ_TIMEOUT_S, connect=10.0)
        # A proxy of the environment has no business between us and a named server.
        self._http = httpx.Client(
            base_url=self.base_url, headers=headers, timeout=timeout, trust_env=False
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def is_healthy(self, timeout_s: float = 5.0) -> bool:
        """Return whether /health answers 200; an unreachable server is not healthy."""
        try:
            return self._http.get("/health", timeout=timeout_s).status_code == httpx.codes.OK
        except httpx.RequestError:
            return False

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the server's token ids of `text`."""
        body = {"prompt": text, "add_special_tokens": add_special_tokens}
        return self._read("/tokenize", body, _token_ids)

    def tokenize_chat(
        self, messages: Sequence[Mapping[str, str]], *, thinking: bool = False
    ) -> list[int]:
        """Return the token ids of a chat in the server's own encoding, ready for the answer."""
        body = {
            "messages": [dict(message) for message in messages],
            "chat_template_kwargs": {"thinking": thinking},
        }
        return self._read("/tokenize", body, _token_ids)

    def encode(self, prompt: Prompt | ChatPrompt) -> list[int]:
        """Return a prompt's token ids; a text has its own special tokens."""
        if isinstance(prompt, ChatPrompt):
            return self.tokenize_chat(prompt.messages, thinking=False)
        return self.tokenize(prompt.text, add_special_tokens=False)

    def complete(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        ignore_eos: bool = False,
        timeout_s: float | None = None,
    ) -> tuple[int, ...]:
        """Return the greedy continuation of `prompt`, not streamed."""
        body = _greedy_body(prompt, max_tokens, ignore_eos)
        return self._read("/v1/completions", body, _completed, timeout_s=timeout_s)

    def complete_counted(
        self, prompt: Sequence[int], max_tokens: int
    ) -> tuple[tuple[int, ...], list[Step]]:
        """Return the greedy continuation of `prompt`, and the steps that drafted for it.

        There are none unless the server was started with COUNT_DRAFTS.
        """
        body = _greedy_body(prompt, max_tokens, ignore_eos=False)
        return self._read("/v1/completions", body, lambda got: (_completed(got), _steps(got)))

    def score(
        self, prompt: Sequence[int], max_tokens: int, *, ignore_eos: bool = False
    ) -> ScoredCompletion:
        """Return the greedy continuation of `prompt` with the margin of every token.

        Margins are differences of natural-log probabilities, at least 0.
        """
        body = _greedy_body(prompt, max_tokens, ignore_eos)
        body |= {"logprobs": 2, "return_tokens_as_token_ids": True}
        return self._read("/v1/completions", body, _scored)

    def stream(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        ignore_eos: bool = False,
        temperature: float = 0.0,
    ) -> Completion:
        """Return a continuation of `prompt`, streamed to time its tokens."""
        body = _greedy_body(prompt, max_tokens, ignore_eos)
        body |= {"stream": True, "temperature": temperature}
        tokens: list[int] = []
        chunks: list[tuple[float, int]] = []
        texts: list[str] = []
        finish_reason = None
        started = time.perf_counter()
        for event in self._events("/v1/completions", body):
            arrived = time.perf_counter()
            choice = event["choices"][0]
            if choice["token_ids"]:
                tokens += choice["token_ids"]
                chunks.append((arrived, len(choice["token_ids"])))
                texts.append(choice["text"])
            elif texts:  # the rest of a character that the tokens before had begun
                texts[-1] += choice["text"]
            finish_reason = choice["finish_reason"] or finish_reason
        if not chunks:
            raise GraftError(f"{self.base_url}: an answer without tokens; expected at least one")
        return Completion(tuple(tokens), finish_reason, started, tuple(chunks), tuple(texts))

    def spec_decode_counters(self) -> SpecDecodeCounters | None:
        """Return the server's drafting counters so far, or None if it does not draft."""
        try:
            answer = self._http.get("/metrics")
        except httpx.RequestError as error:
            raise self._unreachable(error) from error
        self._check(answer)
        return parse_spec_decode(answer.text)

    def _read(
        self,
        path: str,
        body: dict[str, Any],
        read: Callable[[dict[str, Any]], Found],
        *,
        timeout_s: float | None = None,
    ) -> Found:
        answer = self._post(path, body, timeout_s=timeout_s)
        try:
            return read(answer)
        except READ_ERRORS as error:
            raise GraftError(
                f"{self.base_url}{path}: not an answer of vLLM's ({in_words(error)}); "
                "is a vLLM server at this address?"
            ) from error

    def _post(
        self, path: str, body: dict[str, Any], *, timeout_s: float | None = None
    ) -> dict[str, Any]:
        timeout = httpx.USE_CLIENT_DEFAULT if timeout_s is None else timeout_s
        try:
            answer = self._http.post(path, json=body, timeout=timeout)
        except httpx.RequestError as error:
            raise self._unreachable(error) from error
        self._check(answer)
        try:
            result: dict[str, Any] = answer.json()
        except READ_ERRORS as error:
            raise GraftError(
                f"{answer.request.url}: {in_words(error)}; is a vLLM server at this address?"
            ) from error
        return result

    def _events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        try:
            with self._http.stream("POST", path, json=body) as answer:
                if answer.is_error:
                    answer.read()
                self._check(answer)
                for line in answer.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        event: dict[str, Any] = json.loads(line.removeprefix("data: "))
                        if "error" in event:
                            raise GraftError(f"{self.base_url}{path}: {event['error']}")
                        yield event
        except httpx.RequestError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: httpx.RequestError) -> ServerUnreachable:
        reason = str(error) or type(error).__name__
        return ServerUnreachable(f"{self.base_url}: no answer ({reason}); is the server running?")

    def _check(self, answer: httpx.Response) -> None:
        if answer.is_error:
            raise GraftError(
                f"{answer.request.url}: status {answer.status_code}, expected 200: "
                f"{answer.text[:300]}"
            )


def _greedy_body(prompt: Sequence[int], max_tokens: int, ignore_eos: bool) -> dict[str, Any]:
    return {
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": ignore_eos,
        "return_token_ids": True,
    }


def _token_ids(answer: dict[str, Any]) -> list[int]:
    return [int(token) for token in answer["tokens"]]


def _completed(answer: dict[str, Any]) -> tuple[int, ...]:
    return tuple(answer["choices"][0]["token_ids"])


def _steps(answer: dict[str, Any]) -> list[Step]:
    counted = (answer.get("metrics") or {}).get("speculative_decoding") or {}
    # Null for an answer without a verified step: one token, which comes with the prompt.
    steps = (counted.get(f"per_step_{what}") or () for what in ("drafted", "accepted"))
    return [Step(*step) for step in zip(*steps, strict=True)]


def _scored(answer: dict[str, Any]) -> ScoredCompletion:
    choice = answer["choices"][0]
    margins = tuple(_margin(top) for top in choice["logprobs"]["top_logprobs"])
    return ScoredCompletion(tuple(choice["token_ids"]), margins)


def _margin(top_logprobs: dict[str, float]) -> float:
    best, second = sorted(top_logprobs.values(), reverse=True)[:2]
    return best - second
