"""What shapes and memory are computed from in a DeepSeek-V4 config.json."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mtp_graft.errors import GraftError

#: No larger than a model could be: shapes are enumerated, so 10^9 experts would take all memory.
_Size = Annotated[int, Field(ge=1, le=2**24)]
_Number = Annotated[int, Field(ge=1, le=2**12)]


class Dimensions(BaseModel):
    """The keys without which neither tensors nor memory are known, and those that may be null."""

    model_config = ConfigDict(strict=True, extra="ignore")

    num_hidden_layers: _Number
    hidden_size: _Size
    vocab_size: _Size
    hc_mult: _Number
    sliding_window: _Size
    num_attention_heads: _Size
    head_dim: _Size
    q_lora_rank: _Size
    o_groups: _Number
    o_lora_rank: _Size
    n_routed_experts: _Number
    num_experts_per_tok: _Number
    moe_intermediate_size: _Size
    index_head_dim: _Size
    index_n_heads: _Size
    n_shared_experts: _Number | None = None
    num_nextn_predict_layers: Annotated[int, Field(ge=0, le=64)] | None = None
    num_hash_layers: Annotated[int, Field(ge=0, le=2**12)] | None = None
    max_position_embeddings: Annotated[int, Field(ge=1, le=2**40)] | None = None


def check_dimensions(config: Mapping[str, Any], file: object = "config.json") -> Dimensions:
    """Return the dimensions; raise GraftError naming all that are missing or no whole numbers."""
    try:
        return Dimensions.model_validate(config)
    except ValidationError as error:
        wrong = [
            f"has no {each['loc'][0]!r}"
            if each["type"] == "missing"
            else f"{each['loc'][0]} is {each['input']!r}"
            for each in error.errors()
        ]
        raise GraftError(
            f"{file}: {', '.join(wrong)}; expected a DeepSeek-V4 config, its dimensions whole "
            "numbers above 0"
        ) from error


def compress_ratios(config: Mapping[str, Any]) -> list[int] | None:
    """Return each layer's compression ratio; None if the config has no list of whole numbers."""
    listed = config.get("compress_ratios")
    if isinstance(listed, list) and all(type(ratio) is int and ratio >= 0 for ratio in listed):
        return listed
    return None
