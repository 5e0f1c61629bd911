"""Which kernels give a row other bits in a larger batch?

    python benchmarks/batch_rows.py --out benchmarks/results/batch_rows_h200.json

The tiny model with its head decodes greedily, k = 3, eager, 1 and 4 requests at a time: 4 and 16
rows a step. Wherever the target calls a kernel on T rows, the same call is made once more with the
first row alone, and the two results for that row are compared bit by bit. Inputs are the same bits,
so a difference is that kernel's own. Prefill steps are left out. Needs a GPU.
"""

import os
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the model is in this process

import torch
from record import MODEL, arguments, write_result
from texts import bundled_prompts
from torch import Tensor, nn

from mtp_graft.stages.splice import splice

K = 3
#: Functions by the module that looks them up, or the class that has them.
FUNCTIONS = {
    "vllm.models.deepseek_v4.nvidia.model": (
        "mhc_pre_broadcast_tilelang",
        "mhc_fused_post_pre_tilelang",
        "mhc_post_tilelang",
        "hc_head_fused_kernel_tilelang",
    ),
    "vllm.models.deepseek_v4.attention": ("fused_q_kv_rmsnorm",),
    "vllm.models.deepseek_v4.nvidia.flashmla": ("deep_gemm_fp8_o_proj", "flash_mla_with_kvcache"),
}
MODULES = ("fused_wqa_wkv", "wq_b", "wo_b", "gate_up_proj", "down_proj", "gate", "weights_proj")


class Watch:
    """Calls things on T rows, then on the first alone, and counts what differs."""

    def __init__(self) -> None:
        self.rows = 0  # T; 0: do not look, as inside a call that is looked at
        self.found: dict[tuple[str, int], dict[str, Any]] = {}

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return `call`, watched under `name`."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            rows, given = self.rows, (args, kwargs)
            if not rows or not any(is_rows(tensor, rows) for tensor in tensors(given)):
                return call(*args, **kwargs)
            whole, alone = copied(given), first_row(given, rows)
            output = call(*args, **kwargs)
            kept = changed(output, Tensor.clone)
            self.rows = 0
            self.compare(name, rows, call, whole, alone, kept)
            self.rows = rows
            for tensor, before in zip(tensors(output), tensors(kept), strict=True):
                tensor.copy_(before)  # it may lie in a workspace that the second call used
            return output

        return watched

    def compare(self, name: str, rows: int, call: Any, whole: Any, alone: Any, output: Any) -> None:
        """Call once more with the first row; note kernels the first time, and differences."""
        got, one = profiled(call, alone)
        again, all_rows = profiled(call, whole)  # the same rows: a kernel that varies
        kernels = {"kernels_one_row": one, "kernels_all_rows": all_rows}
        zero = {"calls": 0, "different": 0, "unrepeatable": 0, "largest": 0.0}
        entry = self.found.setdefault((name, rows), zero | kernels)
        error = difference(first_row(output, rows), got)
        entry["unrepeatable"] += difference(output, again) > 0
        entry["calls"] += 1
        entry["different"] += error > 0
        entry["largest"] = max(entry["largest"], error)


def changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return `value` with every tensor in it changed, and attention planned anew."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(changed(item, change) for item in value)
    if isinstance(value, dict):
        return {key: changed(item, change) for key, item in value.items()}
    if type(value).__name__ == "FlashMLASchedMeta":
        return type(value)()  # it plans for the batch that uses it first
    return value


def is_rows(tensor: Tensor, rows: int) -> bool:
    return not isinstance(tensor, nn.Parameter) and tensor.dim() > 0 and len(tensor) == rows


def first_row(value: Any, rows: int) -> Any:
    return changed(value, lambda t: t[:1].clone() if is_rows(t, rows) else t)


def copied(value: Any) -> Any:
    def copy(tensor: Tensor) -> Tensor:
        keep = isinstance(tensor, nn.Parameter) or not tensor.dim() or len(tensor) > 64
        return tensor if keep else tensor.clone()

    return changed(value, copy)


def tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    changed(value, lambda tensor: found.append(tensor) or tensor)
    return found


def profiled(call: Any, arguments: tuple[Any, Any]) -> tuple[Any, list[str]]:
    """Return the output, and the names of the CUDA kernels that ran."""
    activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity], acc_events=True) as profile:
        output = call(*arguments[0], **arguments[1])
        torch.cuda.synchronize()
    kernels = {event.key[:400] for event in profile.key_averages() if event.device_time_total > 0}
    return output, sorted(kernels)


def difference(expected: Any, got: Any) -> float:
    """Return the largest difference over all outputs, relative to each one's largest value."""
    worst = 0.0
    for one, other in zip(tensors(expected), tensors(got), strict=True):
        if one.shape != other.shape or torch.equal(one, other):
            continue
        a, b = one.float(), other.float()
        worst = max(worst, ((a - b).abs().max() / a.abs().max().clamp_min(1e-30)).item(), 1e-30)
    return worst


def install(watch: Watch, model: nn.Module) -> None:
    """Watch the target's kernels; the drafter's are the same ones."""
    for place, names in FUNCTIONS.items():
        module = import_module(place)
        for name in names:
            setattr(module, name, watch.around(name, getattr(module, name)))
    from vllm.model_executor.layers.fused_moe.experts import fused_humming_moe as humming

    apply = humming.HummingIndexedExperts.apply

    def apply_and_return(experts: Any, output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        apply(experts, output, *args, **kwargs)
        return output

    humming.HummingIndexedExperts.apply = watch.around("routed experts (Humming)", apply_and_return)
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if name in MODULES:
            label = f"{name} ({type(getattr(module, 'quant_method', None)).__name__})"
            module.forward = watch.around(label, module.forward)
    model.compute_logits = watch.around("lm_head", model.compute_logits)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--max-tokens", type=int, default=96)
    options = parser.parse_args()
    from vllm import LLM, SamplingParams

    watch = Watch()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        splice(MODEL / "base", MODEL / "upstream", checkpoint, "rtn")
        llm = LLM(
            model=str(checkpoint),
            skip_tokenizer_init=True,
            kv_cache_dtype="fp8",
            block_size=256,
            max_model_len=1024,
            kv_cache_memory_bytes=2**31,
            gpu_memory_utilization=0.1,
            enforce_eager=True,
            speculative_config={"method": "mtp", "num_speculative_tokens": K},
        )
    llm.collective_rpc(lambda worker: install(watch, worker.model_runner.model))
    sampling = SamplingParams(
        temperature=0, max_tokens=options.max_tokens, ignore_eos=True, detokenize=False
    )
    for requests in (1, 4):
        watch.rows = requests * (1 + K)
        prompts = bundled_prompts(MODEL, requests, 1)[:requests]
        llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    results = [{"kernel": n, "rows": r, **entry} for (n, r), entry in watch.found.items()]
    for entry in results:
        print({k: v for k, v in entry.items() if not k.startswith("kernels")})
    write_result(options.out, "batch_rows", results)


if __name__ == "__main__":
    main()
