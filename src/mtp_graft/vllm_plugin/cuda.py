"""DeepSeek-V4 on NVIDIA GPUs: vLLM's own target and drafters, loaded strictly, and recorded.

In a CUDA graph that is replayed no hook of the model runs. But vLLM's V2 runner keeps a step's
inputs and hidden states until it samples, whether the step was a graph, in pieces or eager, and the
target's residual buffer still holds the step's rows. So they are read there, just before sampling.
"""

from functools import wraps
from itertools import pairwise
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.models import deepseek_v4 as stock

from mtp_graft.errors import GraftError
from mtp_graft.vllm_plugin.compressors import Weights
from mtp_graft.vllm_plugin.recording import Recorder, Span, make_recorder
from mtp_graft.vllm_plugin.strict_loading import StrictDrafter, StrictTarget


class DeepseekV4ForCausalLM(StrictTarget, stock.DeepseekV4ForCausalLM):
    """The target, recorded on demand."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        record_on_demand(self, vllm_config)


class DeepSeekV4MTP(StrictDrafter, stock.DeepSeekV4MTP):
    """The MTP drafter."""


class DSparkDeepseekV4ForCausalLM(StrictDrafter, stock.DSparkDeepseekV4ForCausalLM):
    """The DSpark drafter."""

    def load_weights(self, weights: Weights) -> set[str]:
        """Load the stages' tensors, but for those of a confidence head that is switched off."""
        if self.model.confidence_head is None:
            weights = ((n, t) for n, t in weights if ".confidence_head." not in n)
        return super().load_weights(weights)


def record_on_demand(target: Any, vllm_config: VllmConfig) -> None:
    """Have the runner record `target`'s prompts, if the environment names a folder for it."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    if (recorder := make_recorder(target, vllm_config)) is None:
        return
    if not vllm_config.use_v2_model_runner:
        cure = "unset VLLM_USE_V2_MODEL_RUNNER"
        raise GraftError(f"recording: vLLM chose its V1 runner, expected V2; {cure}")
    GPUModelRunner.sample_tokens = recording_first(GPUModelRunner.sample_tokens, recorder)


def recording_first(sample_tokens: Any, recorder: Recorder) -> Any:
    """Return `sample_tokens` of a runner, which records the step's whole prompts beforehand."""

    @wraps(sample_tokens)
    @torch.inference_mode()
    def record_and_sample(runner: Any, *args: Any, **kwargs: Any) -> Any:
        step = runner.execute_model_state
        if step is None or not recorder.is_on:
            return sample_tokens(runner, *args, **kwargs)
        batch = step.input_batch
        recorder.record(batch.input_ids, step.hidden_states, whole_prompts(batch))
        sampled = sample_tokens(runner, *args, **kwargs)  # a drafter reads the residual
        recorder.forget()
        return sampled

    return record_and_sample


def whole_prompts(batch: Any) -> list[Span]:
    """Return the rows of the requests of an `InputBatch` whose whole prompt is in this step."""
    bounds = batch.query_start_loc_np[: batch.num_reqs + 1].tolist()
    return [
        (start, end)
        for (start, end), computed, length in zip(
            pairwise(bounds), batch.num_computed_tokens_np, batch.prefill_len_np, strict=False
        )
        if computed == 0 and end - start == length
    ]
