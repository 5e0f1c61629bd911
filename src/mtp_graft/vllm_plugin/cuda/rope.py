"""Gap, until vLLM 0.30: sliding-window layers get the long-context YaRN scaling.

DeepSeek-V4 scales only the layers with compressed attention; sliding-window layers, the MTP head's
among them, have plain rotary embeddings of base `rope_theta`. Scaled, the output of a layer's
attention was off by 16 to 41 % in the tiny model's prefill, and by 4 to 8 % against a reference
with the same mistake (one H100, `benchmarks/results/layers_h100_unpatched.json`).
"""

from collections.abc import Callable
from copy import copy
from typing import Any

import vllm
from packaging.version import Version

BuildRope = Callable[..., Any]
_FIXED = Version("0.30.0")


def apply() -> None:
    """Let DeepSeek-V4's attention build its rotary embeddings right; safe to call twice."""
    if Version(vllm.__version__) >= _FIXED:
        return
    from vllm.models.deepseek_v4 import attention

    if not getattr(attention.build_deepseek_v4_rope, "is_plain_on_windows", False):
        attention.build_deepseek_v4_rope = plain_on_windows(attention.build_deepseek_v4_rope)


def plain_on_windows(build: BuildRope) -> BuildRope:
    """Return `build` without YaRN for `compress_ratio` <= 1; factor 1 scales nothing."""

    def build_rope(
        config: Any, *, compress_ratio: int, max_position_embeddings: int, **sizes: int
    ) -> Any:
        config = copy(config)
        config.rope_parameters = dict(config.rope_parameters)  # `build` writes into it
        if compress_ratio <= 1 and config.rope_parameters["rope_type"] != "default":
            config.rope_parameters["factor"] = 1.0
            config.rope_parameters["original_max_position_embeddings"] = max_position_embeddings
        return build(
            config,
            compress_ratio=compress_ratio,
            max_position_embeddings=max_position_embeddings,
            **sizes,
        )

    build_rope.is_plain_on_windows = True  # type: ignore[attr-defined]
    return build_rope
