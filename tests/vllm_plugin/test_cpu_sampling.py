"""What a request asks for reaches each of its drafts, and its tokens follow that distribution."""

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from mtp_graft.vllm_plugin.cpu import sampling

pytestmark = pytest.mark.vllm

VOCABULARY = 8
REPEATS = 2000  # of each request, in one batch
SIGMAS = 5  # one in 1.7 million counts is farther off; some 500 are compared, with fixed seeds


@functools.cache
def take_vllms_kernels() -> None:
    """As each of vLLM's workers does when it starts."""
    current_platform.import_kernels()
    current_platform.register_triton_kernel_overrides()


def test_stock_vllm_gives_a_draft_no_temperature() -> None:
    """If this fails, vLLM has filled the gap: remove the remedy."""
    take_vllms_kernels()
    found = torch.full((3,), -7.0)
    rejection_sampler._expand(
        found, torch.tensor([0.8, 1.0]), torch.tensor([1, 3], dtype=torch.int32), 0, 1
    )
    assert found.tolist() == [-7.0, -7.0, -7.0]


@dataclass(frozen=True)
class Request:
    """What one request asks for, and how many tokens are drafted for it."""

    drafts: int
    temperature: float
    top_k: int = VOCABULARY
    top_p: float = 1.0

    def distribution(self, logits: Tensor) -> Tensor:
        """Return what its token has to follow after `logits` [V], one token at a time."""
        p = (logits.double() / (self.temperature or 1e-3)).softmax(-1)
        kept = torch.zeros_like(p)
        for token in p.argsort(descending=True)[: self.top_k].tolist():
            if kept.sum() >= self.top_p * p.topk(self.top_k).values.sum():
                break
            kept[token] = p[token]
        return kept / kept.sum()


REQUESTS = (
    Request(2, 1.0),
    Request(1, 0.0),
    Request(3, 0.8, top_k=3),
    Request(0, 0.8),
    Request(1, 0.5, top_p=0.7),
    Request(2, 0.0, top_k=2, top_p=0.5),
    Request(1, 1.0, top_k=5, top_p=0.9),
)


def settings_of(requests: list[Request]) -> Any:
    """Return `requests` as vLLM's sampler gets them; a top-p that nobody asks for is None."""
    temperature = torch.tensor([r.temperature for r in requests])
    nothing = torch.zeros(len(requests))
    top_p = torch.tensor([r.top_p for r in requests])
    return SamplingMetadata(
        temperature=temperature,
        all_greedy=False,
        all_random=False,
        top_p=None if (top_p == 1).all() else top_p,
        top_k=torch.tensor([r.top_k for r in requests], dtype=torch.int32),
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=nothing,
        presence_penalties=nothing,
        repetition_penalties=nothing,
        output_token_ids=[],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )


def drafts_of(requests: list[Request], tokens: list[int]) -> Any:
    """Return `tokens`, all requests' drafts, with what else vLLM's sampler gets to know of them."""
    rest = iter(tokens)
    metadata = SpecDecodeMetadata.make_dummy(
        [[next(rest) for _ in range(r.drafts)] for r in requests], torch.device("cpu")
    )
    ends = metadata.cu_num_sampled_tokens.long()
    is_bonus = torch.zeros(int(ends[-1]), dtype=torch.bool)
    is_bonus[ends - 1] = True
    metadata.bonus_logits_indices = ends - 1
    metadata.target_logits_indices = (~is_bonus).nonzero()[:, 0]
    return metadata


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's rejection sampler with the gaps filled; as stock again afterwards."""
    take_vllms_kernels()
    for name in ("expand_batch_to_tokens", "apply_top_k_top_p"):
        monkeypatch.setattr(rejection_sampler, name, getattr(rejection_sampler, name))
    sampling.fill_gaps()
    return rejection_sampler.RejectionSampler(Sampler())


@pytest.mark.parametrize("probabilistic", [False, True], ids=["greedy", "probabilistic"])
def test_tokens_follow_what_their_request_asks_for(probabilistic: bool, sampler: Any) -> None:
    """Whatever is drafted: the most probable of the drafter's tokens, or one drawn from it."""
    torch.manual_seed(18)
    logits = [torch.randn(r.drafts + 1, VOCABULARY) * 1.5 for r in REQUESTS]
    drafter = (torch.cat([rows[:-1] for rows in logits]) * 0.7).softmax(-1)  # less sure
    probabilities = drafter.repeat(REPEATS, 1)
    drawn = torch.multinomial(probabilities, 1)[:, 0] if probabilistic else probabilities.argmax(-1)
    requests = list(REQUESTS) * REPEATS
    output = sampler(
        drafts_of(requests, drawn.tolist()),
        probabilities if probabilistic else None,
        torch.cat(logits).repeat(REPEATS, 1),
        settings_of(requests),
    ).sampled_token_ids.view(REPEATS, len(REQUESTS), -1)
    for index, (request, rows) in enumerate(zip(REQUESTS, logits, strict=True)):
        for position, row in enumerate(rows):
            found = output[:, index, position]
            found = found[found >= 0]  # of those whose drafts were accepted up to here
            expected = request.distribution(row)
            share = found.long().bincount(minlength=VOCABULARY) / len(found)
            bound = SIGMAS * (expected * (1 - expected) / len(found)).sqrt()
            assert len(found) > REPEATS / 50, "hardly any draft was accepted"
            assert ((share - expected).abs() <= bound + 1e-9).all(), (request, position, share)
        assert (output[:, index, request.drafts + 1 :] == -1).all()


def test_a_step_of_prompts_alone_has_no_drafts(sampler: Any) -> None:
    requests = [Request(0, 1.0, top_k=1)] * 3
    logits = torch.randn(3, VOCABULARY)
    output = sampler(drafts_of(requests, []), None, logits, settings_of(requests))
    assert output.sampled_token_ids.tolist() == logits.argmax(-1, keepdim=True).tolist()
