"""Measure the tiny head's acceptance, and whether the base loops, on text it never saw.

    python benchmarks/heldout_acceptance.py --data ../shared/data --out result.json

Splits: `gsm8k-test`, the first questions of GSM8K's test set in the chat encoding, decoded until
the end token or `--max-tokens`; `shakespeare-tail`, windows from the last tenth of tinyshakespeare.
Acceptance comes from vLLM's own counters, k = 1, greedy. The distinct 4-gram ratio is that of the
generated texts, over all of a split's texts together and averaged per text.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from engines import EngineOptions, counters, gained, start
from record import write_result

from mtp_graft.stages.splice import splice

MODEL = Path(__file__).resolve().parent.parent / "models" / "tiny-dsv4"
sys.path.insert(0, str(MODEL / "make"))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k/ and text/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=100, help="per split")
    parser.add_argument("--max-tokens", type=int, default=128)
    return parser.parse_args()


def held_out_prompts(data: Path, count: int) -> dict[str, list[list[int]]]:
    """Return token ids of `count` prompts per split."""
    from data import chat_prompt
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL / "base")
    lines = (data / "gsm8k" / "test.jsonl").read_text().splitlines()[:count]
    questions = [chat_prompt(json.loads(line)["question"]) for line in lines]
    text = (data / "text" / "tinyshakespeare.txt").read_text()
    tail = text[len(text) * 9 // 10 :]
    ids = tokenizer.encode(tail, add_special_tokens=False)
    stride = (len(ids) - 64) // count
    bos = tokenizer.bos_token_id
    return {
        "gsm8k-test": [tokenizer.encode(q, add_special_tokens=False) for q in questions],
        "shakespeare-tail": [[bos, *ids[i * stride : i * stride + 64]] for i in range(count)],
    }


def distinct_ratio(texts: list[list[int]], n: int = 4) -> tuple[float, float]:
    """Return the share of distinct n-grams over all texts, and its mean per text."""
    grams = [[tuple(text[i : i + n]) for i in range(len(text) - n + 1)] for text in texts]
    everything = [gram for text in grams for gram in text]
    overall = len(set(everything)) / len(everything)
    return overall, mean(len(set(text)) / len(text) for text in grams if text)


def measure(checkpoint: Path, splits: dict[str, list[list[int]]], max_tokens: int) -> Any:
    """Decode every split with the head; return acceptance and repetition per split."""
    from vllm import SamplingParams

    llm = start(EngineOptions(checkpoint, k=1, max_model_len=2048, max_num_seqs=1))
    sampling = SamplingParams(
        temperature=0, max_tokens=max_tokens, detokenize=False, stop_token_ids=[1]
    )
    results = {}
    for split, prompts in splits.items():
        before = counters(llm)
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(requests, sampling, use_tqdm=False)
        counts = gained(before, counters(llm))
        texts = [list(output.outputs[0].token_ids) for output in outputs]
        overall, per_text = distinct_ratio(texts)
        results[split] = {
            "prompts": len(prompts),
            "tokens": sum(map(len, texts)),
            "finished": sum(text[-1] == 1 for text in texts),
            **counts,
            "distinct_4grams": overall,
            "distinct_4grams_mean_per_text": per_text,
        }
    return results


def main() -> None:
    options = parse_arguments()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    splits = held_out_prompts(options.data, options.prompts)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "tiny-bf16"
        splice(MODEL / "base", MODEL / "upstream", checkpoint, "bf16", copy=True)
        results = measure(checkpoint, splits, options.max_tokens)
    write_result(options.out, "heldout_acceptance", results)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
