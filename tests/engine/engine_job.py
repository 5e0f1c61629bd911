"""Run vLLM engines for the tests, one after the other: a job a line in, its results a line out.

A job is {checkpoint, k, tensor_parallel_size, cores (one a rank), batches: [{prompts, max_tokens,
together, prompt_logprobs, sampling}]}; prompts are token ids. Decoding is greedy, except for what
`sampling` changes: one set of SamplingParams' arguments a prompt. The result has, per batch and
prompt, the tokens, the top-2 logprobs of every generated position and, if asked for, of every
prompt position; and the engine's own counts of drafted and accepted tokens.
"""

import json
import multiprocessing
import os
import sys
from itertools import chain
from typing import Any

os.environ.setdefault("VLLM_PLUGINS", "mtp_graft")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # as servers have it
# All engines and single ranks in this process: each of its own would import vLLM anew, ten seconds
# of a core. The tests that start servers have the usual processes.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def start(job: dict[str, Any]) -> Any:
    from vllm import LLM
    from vllm.v1.executor import multiproc_executor

    tensor_parallel_size = job.get("tensor_parallel_size", 1)
    if tensor_parallel_size > 1:  # workers are forks, for the same reason
        multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
        os.sched_setaffinity(0, job["cores"])
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, job["cores"]))
    speculation = {"method": "mtp", "num_speculative_tokens": job["k"]} if job["k"] else None
    options = {"kv_cache_dtype": "fp8", "kv_cache_memory_bytes": 2**29, "block_size": 256}
    options |= {"max_model_len": 4096, "max_num_batched_tokens": 4096, "max_num_seqs": 8}
    options |= {"max_logprobs": 3, "enforce_eager": True, "enable_prefix_caching": False}
    options |= {"skip_tokenizer_init": True, "disable_log_stats": False}
    options |= {"tensor_parallel_size": tensor_parallel_size, "speculative_config": speculation}
    return LLM(job["checkpoint"], **options)


def top(step: dict[int, Any], token: int) -> dict[str, Any]:
    """Return the two best tokens, their logprobs and the logprob of `token` itself."""
    best = sorted(step.items(), key=lambda item: item[1].rank)[:2]
    return {
        "tokens": [t for t, _ in best],
        "logprobs": [entry.logprob for _, entry in best],
        "own": step[token].logprob,
    }


def run_batch(llm: Any, batch: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    asked = batch.get("prompt_logprobs", False)
    greedy = {"temperature": 0, "max_tokens": batch["max_tokens"], "ignore_eos": True}
    greedy |= {"detokenize": False, "logprobs": 2, "prompt_logprobs": 2 if asked else None}
    prompts = batch["prompts"]
    sampling = [SamplingParams(**(greedy | p)) for p in batch.get("sampling", [{}] * len(prompts))]
    requests = list(zip(({"prompt_token_ids": p} for p in prompts), sampling, strict=True))
    groups = [requests] if batch.get("together") else [[request] for request in requests]
    calls = (map(list, zip(*group, strict=True)) for group in groups)
    outputs = chain.from_iterable(llm.generate(*call, use_tqdm=False) for call in calls)
    results = []
    for output in outputs:
        generated = output.outputs[0]
        tokens = list(generated.token_ids)
        result: dict[str, Any] = {
            "tokens": tokens,
            "steps": [top(s, t) for s, t in zip(generated.logprobs, tokens, strict=True)],
        }
        if asked:
            pairs = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
            result["prompt_steps"] = [top(step, token) for step, token in pairs]
        results.append(result)
    return results


def run(job: dict[str, Any]) -> list[dict[str, Any]]:
    llm = start(job)
    batches = []
    for batch in job["batches"]:
        before = counters(llm)
        results = run_batch(llm, batch)
        after = counters(llm)
        batches.append({"results": results, **{n: after[n] - before[n] for n in after}})
    llm.llm_engine.engine_core.shutdown()
    return batches


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what vLLM prints is no answer
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()


def counters(llm: Any) -> dict[str, float]:
    values = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    names = {"drafted": "draft", "accepted": "accepted"}
    return {k: values.get(f"vllm:spec_decode_num_{n}_tokens", 0) for k, n in names.items()}


if __name__ == "__main__":
    main()
