"""Find the layer at which an engine leaves the reference: record on the engine, compare elsewhere.

    python benchmarks/engine_layers.py record --checkpoint DIR --prompts IDS.json --out RECORD
    python benchmarks/engine_layers.py compare --base DIR --record RECORD --out result.json

`record` runs vLLM in this process, eagerly, and keeps what goes into and comes out of the attention
and the experts of every layer, for the prefill and every decode step of the first `--prompts-kept`
prompts. `compare` runs transformers in float32 on the dequantized base over the same tokens and
gives relative errors (Frobenius) per step, layer and module. `--yarn-everywhere` gives the
reference vLLM 0.26.0's rotary embeddings, with YaRN on sliding-window layers too.
"""

import argparse
import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from record import commit, device_name, versions
from safetensors.torch import load_file, save_file
from torch import Tensor

TESTS = Path(__file__).resolve().parent.parent / "tests"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    record = commands.add_parser("record")
    record.add_argument("--checkpoint", type=Path, required=True)
    record.add_argument("--prompts", type=Path, required=True, help="JSON list of token id lists")
    record.add_argument("--out", type=Path, required=True, help="gets .json and .safetensors")
    record.add_argument("--k", type=int, default=0)
    record.add_argument("--max-tokens", type=int, default=12)
    record.add_argument("--prompts-kept", type=int, default=2)
    compare = commands.add_parser("compare")
    compare.add_argument("--base", type=Path, required=True)
    compare.add_argument("--record", type=Path, required=True)
    compare.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


class Recorder:
    """Keeps the inputs and outputs of hooked modules, one step of the engine after the other."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.step = 0
        self.on = False

    def hook(self, worker: Any) -> list[str]:
        """Hook the target of a vLLM worker; called in the engine's process, which is ours."""
        model = worker.model_runner.model
        names = [n for n, _ in model.named_modules() if n.endswith((".attn", ".ffn"))]
        for name in names:
            model.get_submodule(name).register_forward_hook(self._keep(name))
        model.register_forward_hook(self._next_step)
        return names

    def _keep(self, name: str) -> Any:
        layer, module = name.split(".")[-2:]

        def keep(_module: Any, arguments: tuple[Any, ...], output: Any) -> None:
            if not self.on:
                return
            key = f"{self.step:04d}.{layer}.{module}"
            entering = arguments[1] if module == "attn" else arguments[0]
            leaving = output if torch.is_tensor(output) else output[0]
            self.tensors[f"{key}.in"] = entering.detach().float().cpu().clone()
            self.tensors[f"{key}.out"] = leaving.detach().float().cpu().clone()
            if module == "attn":
                positions = arguments[0].detach().cpu().clone()
                self.tensors[f"{self.step:04d}.positions"] = positions

        return keep

    def _next_step(self, *_: Any) -> None:
        self.step += self.on


def record(options: argparse.Namespace) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # hooks need the model in this process
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    from vllm import LLM, SamplingParams

    speculation: dict[str, Any] = {}
    if options.k:
        config = {"method": "mtp", "num_speculative_tokens": options.k}
        speculation = {"speculative_config": config}
    llm = LLM(
        str(options.checkpoint),
        skip_tokenizer_init=True,
        kv_cache_dtype="fp8",
        block_size=256,
        max_model_len=2048,
        max_num_batched_tokens=2048,
        max_num_seqs=4,
        enable_prefix_caching=False,
        enforce_eager=True,
        gpu_memory_utilization=0.3,
        **speculation,
    )
    recorder = Recorder()
    llm.collective_rpc(recorder.hook)
    greedy = SamplingParams(temperature=0, max_tokens=options.max_tokens, ignore_eos=True)
    scoring = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2)
    for sampling in (greedy, scoring):
        sampling.detokenize = False
    texts = []
    for number, prompt in enumerate(json.loads(options.prompts.read_text())):
        recorder.on = number < options.prompts_kept
        first = recorder.step
        request = {"prompt_token_ids": prompt}
        output = llm.generate(request, greedy, use_tqdm=False)[0].outputs[0]
        recorder.on = False
        whole = {"prompt_token_ids": [*prompt, *output.token_ids]}
        scored = llm.generate(whole, scoring, use_tqdm=False)[0].prompt_logprobs
        best = [max(step, key=lambda t: step[t].logprob) for step in scored[1:]]
        own = [
            step[token].logprob
            for step, token in zip(scored[1:], whole["prompt_token_ids"][1:], strict=True)
        ]
        steps = [first, recorder.step]
        texts.append(
            {"prompt": prompt, "text": list(output.token_ids), "steps": steps}
            | {"best": best, "own": own}
        )
    about = {"device": device_name(), "versions": versions(), "commit": commit(), "texts": texts}
    options.out.with_suffix(".json").write_text(json.dumps(about))
    save_file(recorder.tensors, options.out.with_suffix(".safetensors"))


def compare(options: argparse.Namespace) -> None:
    sys.path[:0] = [str(TESTS / "engine"), str(TESTS)]
    from reference_model import load_reference

    about = json.loads(options.record.with_suffix(".json").read_text())
    recorded = load_file(options.record.with_suffix(".safetensors"))
    model = load_reference(options.base)
    results = {"plain": errors(model, about["texts"], recorded)}
    scale_sliding_window_layers(model)
    results["yarn_everywhere"] = errors(model, about["texts"], recorded)
    report = {
        "benchmark": "engine_layers",
        "device": about["device"],
        "commit": about["commit"],
        "versions": about["versions"],
        "command": " ".join(sys.argv),
        "results": results,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")


def scale_sliding_window_layers(model: Any) -> None:
    """Give the sliding-window layers YaRN over their own base, as vLLM 0.26.0 does."""
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding

    config = copy.deepcopy(model.config)
    main, compress = config.rope_parameters["main"], config.rope_parameters["compress"]
    config.rope_parameters["main"] = {**compress, **main, "rope_type": "yarn"}
    scaled = dict(DeepseekV4RotaryEmbedding(config).named_buffers())
    for module in model.modules():
        if isinstance(module, DeepseekV4RotaryEmbedding):
            for name, buffer in scaled.items():
                setattr(module, name, buffer)


@torch.no_grad()
def errors(model: Any, texts: list[Any], recorded: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Return the errors of every recorded text: by step, layer and module, and of its tokens."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, arguments: Any, keywords: Any, output: Any) -> None:
            entering = arguments[0] if arguments else keywords["hidden_states"]
            seen[f"{name}.in"] = entering[0]
            leaving = output if torch.is_tensor(output) else output[0]
            seen[f"{name}.out"] = leaving.reshape(entering[0].shape[0], -1)

        return hook

    hooks = []
    for number, layer in enumerate(model.model.layers):
        for name, module in (("attn", layer.self_attn), ("ffn", layer.mlp)):
            hook = keep(f"{number}.{name}")
            hooks.append(module.register_forward_hook(hook, with_kwargs=True))
    found = []
    for text in texts:
        if text["steps"][0] == text["steps"][1]:
            continue  # nothing was kept of it
        tokens = [*text["prompt"], *text["text"]]
        logprobs = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        found.append(
            {"tokens": _token_errors(text, tokens, logprobs)}
            | {"steps": [_step_errors(recorded, seen, s) for s in range(*text["steps"])]}
        )
    for hook in hooks:
        hook.remove()
    return found


def _step_errors(recorded: dict[str, Tensor], seen: dict[str, Tensor], step: int) -> dict[str, Any]:
    positions = recorded[f"{step:04d}.positions"]
    result: dict[str, Any] = {"positions": [int(positions[0]), int(positions[-1])]}
    for name, reference in seen.items():
        actual = recorded[f"{step:04d}.{name}"]
        expected = reference[positions[: len(actual)]]
        actual = actual[: len(expected)]
        result[name] = round(float((actual - expected).norm() / expected.norm()), 4)
    return result


def _token_errors(text: Any, tokens: list[int], logprobs: Tensor) -> dict[str, Any]:
    """Compare the prompt's positions, which were computed in one prefill."""
    positions = range(len(text["prompt"]) - 1)
    top = logprobs.topk(2)
    sure = [bool(top.values[i, 0] - top.values[i, 1] > 0.5) for i in positions]
    equal = [int(top.indices[i, 0]) == text["best"][i] for i in positions]
    own = [abs(float(logprobs[i, tokens[i + 1]]) - text["own"][i]) for i in positions]
    return {
        "positions": len(equal),
        "argmax_equal": sum(equal),
        "sure": sum(sure),
        "argmax_equal_where_sure": sum(e for e, s in zip(equal, sure, strict=True) if s),
        "mean_abs_dlogprob": round(sum(own) / len(own), 4),
    }


if __name__ == "__main__":
    parsed = parse_arguments()
    record(parsed) if parsed.command == "record" else compare(parsed)
