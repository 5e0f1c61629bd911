"""Greedy texts of an engine, and how two engines' texts are compared.

Free-running texts of two engines part for good at their first difference. So the other engine also
reads the first one's text (teacher-forced), and its best token is compared at every position. A
text is read in one prefill and written in decode steps, by other kernels: the engine that wrote a
text may not choose each of its tokens when it reads it.
"""

import json
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

#: Nats between the two best tokens; above it another token is no rounding matter.
MARGIN = 0.5
Text = dict[str, Any]  # tokens, margins


def bundled_prompts(model: Path, count: int, long: int) -> list[list[int]]:
    """Return token ids of bundled prompts, and one prompt of `long` tokens made of all of them."""
    tokenizer = Tokenizer.from_file(str(model / "base" / "tokenizer.json"))
    lines = (model / "prompts.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    return [*ids[:count], list(islice(cycle(chain.from_iterable(ids)), long))]


def greedy(llm: Any, prompts: list[list[int]], max_tokens: int) -> list[Text]:
    """Continue each prompt alone; return its tokens and the margin at each of them."""
    texts = []
    for prompt in prompts:
        output = generate(llm, prompt, max_tokens, logprobs=2).outputs[0]
        margins = [margin(step) for step in output.logprobs]
        texts.append({"tokens": list(output.token_ids), "margins": margins})
    return texts


def forced(llm: Any, prompts: list[list[int]], texts: list[Text]) -> list[Text]:
    """Return the engine's best token, and its margin, at each position of the texts."""
    read = []
    for prompt, text in zip(prompts, texts, strict=True):
        output = generate(llm, prompt + text["tokens"], 1, prompt_logprobs=2)
        steps = output.prompt_logprobs[len(prompt) :]
        tokens = [min(step, key=lambda token: step[token].rank) for step in steps]
        read.append({"tokens": tokens, "margins": [margin(step) for step in steps]})
    return read


def compare_forced(texts: list[Text], best: list[list[int]]) -> dict[str, Any]:
    """Return where the best token is not the text's, and how many positions had a clear margin."""
    flips, positions, sure = [], 0, 0
    for number, (text, tokens) in enumerate(zip(texts, best, strict=True)):
        rows = zip(text["tokens"], text["margins"], tokens, strict=True)
        for position, (expected, its_margin, token) in enumerate(rows):
            positions += 1
            sure += its_margin > MARGIN
            if token != expected:
                flips.append({"prompt": number, "position": position, "margin": its_margin})
    clear = [flip for flip in flips if flip["margin"] > MARGIN]
    return {
        "positions": positions,
        "positions_with_margin": sure,
        "flips": len(flips),
        "flips_with_margin": clear,
    }


def divergences(base: list[Text], other: list[Text]) -> list[dict[str, Any]]:
    """Return the first position of every prompt at which `other` left the base's text."""
    found = []
    for prompt, (expected, actual) in enumerate(zip(base, other, strict=True)):
        pairs = enumerate(zip(expected["tokens"], actual["tokens"], strict=True))
        position = next((i for i, (a, b) in pairs if a != b), None)
        if position is not None:
            margin = expected["margins"][position]
            found.append({"prompt": prompt, "position": position, "margin": margin})
    return found


def margin(step: dict[int, Any]) -> float:
    """Return how far the best token is ahead, in nats."""
    best, second = sorted((entry.logprob for entry in step.values()), reverse=True)[:2]
    return best - second


def generate(llm: Any, prompt: list[int], max_tokens: int, **logprobs: int) -> Any:
    """Continue one prompt greedily, past any end of text; return vLLM's RequestOutput."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, **logprobs
    )
    return llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)[0]
