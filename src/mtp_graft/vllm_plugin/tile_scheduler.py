"""The CPU metadata builder's missing entries for FlashMLA's tile scheduler.

vLLM's sliding-window metadata builder reads one scheduler plan for each layer type. Its CPU
subclass, which plans nothing, answers for fewer types than the base class reads.
"""

from typing import Any

# Fields of `DeepseekSparseSWAMetadata` are named after the layer types, with this prefix.
_FIELD_PREFIX = "tile_sched_"


def apply() -> None:
    """Let the CPU builder answer None for every layer type, if it forgets any.

    Does nothing when called again or when this vLLM's builder is complete.
    """
    from vllm.models.deepseek_v4.cpu.cpu_mla import (
        DeepseekV4CPUSparseSWAMetadataBuilder as Builder,
    )
    from vllm.v1.attention.backends.mla.sparse_swa import (
        DeepseekSparseSWAMetadata,
    )

    fields = DeepseekSparseSWAMetadata.__dataclass_fields__
    layer_types = [
        name.removeprefix(_FIELD_PREFIX) for name in fields if name.startswith(_FIELD_PREFIX)
    ]
    # Without decode tokens neither this method nor the base's reads the builder's state, so an
    # instance that was never initialized can be asked.
    if set(layer_types) <= Builder.__new__(Builder).build_tile_scheduler(0).keys():
        return

    def build_tile_scheduler(_self: Any, _num_decode_tokens: int) -> dict[str, None]:
        return dict.fromkeys(layer_types)

    Builder.build_tile_scheduler = build_tile_scheduler
