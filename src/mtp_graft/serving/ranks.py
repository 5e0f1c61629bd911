"""Over how many ranks a model can be shared out."""

from collections.abc import Mapping
from typing import Any

from mtp_graft.checkpoint.quantization_config import int4_group_size
from mtp_graft.errors import GraftError, in_words


def most_ranks(config: Mapping[str, Any], num_gpus: int) -> int:
    """Return the largest power of two of GPUs that share the model evenly; 1 without any.

    Raises GraftError as `undivided`.
    """
    most = 1
    while 2 * most <= num_gpus and not undivided(config, 2 * most):
        most *= 2
    return most


def undivided(config: Mapping[str, Any], ranks: int) -> str | None:
    """Return what of heads, output groups and the experts' scale groups cannot be shared out.

    Raises GraftError for a config that is not a DeepSeek-V4's in W4A16-FP8.
    """
    try:
        group = int4_group_size(config["quantization_config"])
        inner = config["moe_intermediate_size"]
        heads, output_groups = config["num_attention_heads"], config["o_groups"]
        if heads % ranks:
            return f"{heads} attention heads"
        if output_groups % ranks:
            return f"{output_groups} output groups"
        if inner % (ranks * group):
            return f"moe_intermediate_size {inner} in groups of {group} that share a scale"
    except (KeyError, TypeError, AttributeError) as error:
        raise GraftError(
            f"config.json: {in_words(error)}; expected a DeepSeek-V4 in W4A16-FP8"
        ) from None
    return None
