"""The dimensions in a DeepSeek-V4 config.json that shapes and memory are computed from."""

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
#: May be left out; the first two may be 0.
OPTIONAL = ("num_nextn_predict_layers", "num_hash_layers", "max_position_embeddings")


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
        for name in OPTIONAL
        if config.get(name) is not None
        and not _is_count(config[name], least=int(name == "max_position_embeddings"))
    ]
    if wrong:
        raise GraftError(
            f"{file}: {', '.join(wrong)}; expected a DeepSeek-V4 config, its dimensions whole "
            "numbers above 0"
        )


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
