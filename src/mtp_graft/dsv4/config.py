"""What shapes and memory are computed from in a DeepSeek-V4 config.json."""

from collections.abc import Mapping
from typing import Any

from mtp_graft.errors import GraftError

#: Without one of them neither tensors nor memory are known.
DIMENSIONS = (
    *("num_hidden_layers", "hidden_size", "vocab_size", "hc_mult", "sliding_window"),
    *("num_attention_heads", "head_dim", "q_lora_rank", "o_groups", "o_lora_rank"),
    *("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
    *("index_head_dim", "index_n_heads"),
)
#: What may be left out or null, and the least that it can be.
OPTIONAL = {"num_nextn_predict_layers": 0, "num_hash_layers": 0, "max_position_embeddings": 1}


def check_dimensions(config: Mapping[str, Any], file: object = "config.json") -> None:
    """Raise GraftError if a dimension is missing or no whole number above 0, naming all of them.

    `file` is what the error calls the config.
    """
    wrong = [
        f"{name} is {config[name]!r}" if name in config else f"has no {name!r}"
        for name in DIMENSIONS
        if not _is_count(config.get(name), least=1)
    ]
    wrong += [
        f"{name} is {config[name]!r}"
        for name, least in OPTIONAL.items()
        if config.get(name) is not None and not _is_count(config[name], least)
    ]
    if wrong:
        raise GraftError(
            f"{file}: {', '.join(wrong)}; expected a DeepSeek-V4 config, its dimensions whole "
            "numbers above 0"
        )


def compress_ratios(config: Mapping[str, Any]) -> list[int] | None:
    """Return each layer's compression ratio; None if the config has no list of whole numbers."""
    listed = config.get("compress_ratios")
    if isinstance(listed, list) and all(_is_count(ratio, least=0) for ratio in listed):
        return listed
    return None


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
