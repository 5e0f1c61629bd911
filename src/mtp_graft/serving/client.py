"""What we ask of a running vLLM server: completions on token ids, tokenization, metrics."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from pydantic import AliasPath, BaseModel, Field
from pydantic_core import from_json

from mtp_graft.errors import GraftError, translated
from mtp_graft.serving.metrics import SpecDecodeCounters, Step, parse_spec_decode

_NOT_VLLM = "not an answer of vLLM's; is a vLLM server there?"
#: Idle connections may be closed just as they are used; proxies have no business here.
_HTTP: dict[str, Any] = {"trust_env": False, "limits": httpx.Limits(max_keepalive_connections=0)}
_HTTP["verify"] = httpx.create_ssl_context(trust_env=False)  # read once: it takes 0.03 s
#: What reading an answer raises that is no JSON, too deep, or of another structure.
READ_ERRORS = (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError)

Ids = tuple[int, ...]
#: Options of `vllm serve` with which it tells a client what it drafted for the client's request.
COUNT_DRAFTS = ("--per-request-spec-decode-metrics", "detailed")


@dataclass(frozen=True)
class Prompt:
    """A text to continue, or a conversation to answer, and the name that results give it."""

    id: str
    content: str | tuple[dict[str, str], ...]  # messages have `role` and `content`


class ServerUnreachable(GraftError):
    """No connection, or it broke before the answer was complete."""


class _Tokens(BaseModel):
    tokens: list[int]


class _Choice(BaseModel):
    token_ids: Ids
    tops: list[dict[str, float]] = Field([], validation_alias=AliasPath("logprobs", "top_logprobs"))


class _Answer(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    metrics: dict[str, dict[str, Any] | None] | None = None


Found = TypeVar("Found", bound=BaseModel)


class ServerClient(AbstractContextManager["ServerClient"]):
    """A client of one vLLM server; every method raises GraftError if it is away or refuses."""

    def __init__(self, base_url: str, api_key: str | None = None, silence_s: float = 600.0) -> None:
        self.base_url, self.api_key = base_url.rstrip("/").removesuffix("/v1"), api_key
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        # Silence is that between two bytes of an answer; the first step may compile kernels.
        timeout = httpx.Timeout(silence_s, connect=10.0, pool=None)
        self._http = httpx.Client(base_url=self.base_url, headers=headers, timeout=timeout, **_HTTP)

    def __exit__(self, *_error: object) -> None:
        self._http.close()

    def is_healthy(self) -> bool:
        """Return whether /health answers 200; an unreachable server is not healthy."""
        with suppress(httpx.RequestError):
            return self._http.get("/health", timeout=5.0).status_code == httpx.codes.OK
        return False

    def encode(self, prompt: Prompt) -> list[int]:
        """Return a prompt's token ids; a text has its own special tokens, a chat the server's."""
        body: dict[str, Any] = {"prompt": prompt.content, "add_special_tokens": False}
        if not isinstance(prompt.content, str):
            body = {"messages": prompt.content, "chat_template_kwargs": {"thinking": False}}
        return self._ask("/tokenize", body, _Tokens).tokens

    def complete(self, prompt: Sequence[int], max_tokens: int, *, ignore_eos: bool = False) -> Ids:
        """Return the greedy continuation of `prompt`."""
        return self._complete(prompt, max_tokens, ignore_eos=ignore_eos).choices[0].token_ids

    def complete_counted(self, prompt: Sequence[int], max_tokens: int) -> tuple[Ids, list[Step]]:
        """Return the same and its steps with drafts, of a server that was told to COUNT_DRAFTS."""
        answer = self._complete(prompt, max_tokens)
        # Null for an answer without a verified step: one token, which comes with the prompt.
        counted = (answer.metrics or {}).get("speculative_decoding") or {}
        steps = (counted.get(f"per_step_{what}") or () for what in ("drafted", "accepted"))
        return answer.choices[0].token_ids, [Step(*s) for s in zip(*steps, strict=True)]

    def score(
        self, prompt: Sequence[int], max_tokens: int, *, ignore_eos: bool = False
    ) -> tuple[Ids, list[float]]:
        """Return the same and each token's margin: its ln probability less the second best's."""
        logprobs = {"logprobs": 2, "return_tokens_as_token_ids": True}
        choice = self._complete(prompt, max_tokens, ignore_eos=ignore_eos, **logprobs).choices[0]
        best = [sorted(top.values(), reverse=True)[:2] for top in choice.tops]
        if len(best) != len(choice.token_ids) or any(len(two) != 2 for two in best):
            raise GraftError(f"{self.base_url}/v1/completions: {_NOT_VLLM} (without two logprobs)")
        return choice.token_ids, [first - second for first, second in best]

    def spec_decode_counters(self) -> SpecDecodeCounters | None:
        """Return the server's drafting counters so far, or None if it does not draft."""
        return parse_spec_decode(self._send("GET", "/metrics").text)

    def events(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """Yield the events of a streamed answer, or the whole one; also raises READ_ERRORS."""
        with self._errors(), self._http.stream("POST", path, json=body) as answer:
            if answer.is_error:
                answer.read()  # the error quotes it
            if not body.get("stream"):
                yield from_json(answer.raise_for_status().read())
                return
            rest = b""
            for chunk in answer.raise_for_status().iter_bytes():
                # httpx's own lines end at U+2028 and others, which JSON may have inside a string.
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
                        event: dict[str, Any] = from_json(data)
                        if event.get("error"):
                            raise GraftError(f"{self.base_url}{path}: {event['error']}")
                        yield event

    def _complete(self, prompt: Sequence[int], max_tokens: int, **options: object) -> _Answer:
        body = {"prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0.0, **options}
        return self._ask("/v1/completions", body | {"return_token_ids": True}, _Answer)

    def _ask(self, path: str, body: dict[str, Any], model: type[Found]) -> Found:
        answer = self._send("POST", path, json=body)
        with translated(f"{self.base_url}{path}: {_NOT_VLLM}", ValueError):
            return model.model_validate_json(answer.content)

    def _send(self, method: str, path: str, **request: Any) -> httpx.Response:
        with self._errors():
            return self._http.request(method, path, **request).raise_for_status()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPStatusError as error:
            where, answer = error.request.url, error.response
            found = f"status {answer.status_code}, expected 200: {answer.text[:300]}"
            raise GraftError(f"{where}: {found}") from error
        except httpx.RequestError as error:
            found = f"no answer ({str(error) or type(error).__name__})"
            raise ServerUnreachable(f"{self.base_url}: {found}; is the server running?") from error
