"""Gap: the mapper renames FP8 scales to `weight_scale_inv`; compressed-tensors says `weight_scale`.

vLLM's DeepSeek-V4 mappers are written for DeepSeek's own FP8 layers, whose parameter is called
`weight_scale_inv`. Compressed-tensors layers register `weight_scale`, the checkpoint's name, so
no scale is to be renamed. Seen in vLLM 0.32 and, by its source, in 0.33's CPU mapper.
"""

import dataclasses

from vllm.model_executor.models.utils import WeightsMapper


def keep_weight_scale(mapper: WeightsMapper) -> WeightsMapper:
    """Return `mapper` without the rules that rename quantization scales."""
    kept = {
        pattern: target
        for pattern, target in mapper.orig_to_new_regex.items()
        if target is None or not target.endswith("weight_scale_inv")
    }
    return dataclasses.replace(mapper, orig_to_new_regex=kept)
