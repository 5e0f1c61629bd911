"""What is read of a DeepSeek-V4 config.json: DeepSeek's keys, or transformers' (`..._types`)."""

import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from mtp_graft.errors import GraftError

#: No larger than a model's: shapes are enumerated, and multiplied, four sizes at most, in 64 bits.
_Size = Annotated[int, Field(ge=1, le=2**20)]
_Number = Annotated[int, Field(ge=1, le=2**9)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Dtype = Literal["bfloat16", "float16", "float32"]
#: transformers' name of a layer -> its ratio, of those that vLLM has kernels for.
_RATES = dict(sliding_attention=0, compressed_sparse_attention=4, heavily_compressed_attention=128)
#: Keys that vLLM 0.32 has no value of its own for.
_WITHOUT_DEFAULT = (
    *("n_shared_experts", "index_topk", "norm_topk_prob", "hc_sinkhorn_iters", "hc_eps"),
    *("rms_norm_eps", "hidden_act", "qk_rope_head_dim", "compress_rope_theta", "swiglu_limit"),
)


class _Rope(BaseModel, strict=True):
    type: str | None = None
    factor: _Positive | None = None
    beta_fast: _Positive | None = None
    beta_slow: _Positive | None = None
    original_max_position_embeddings: _Size | None = None


class Dimensions(BaseModel, strict=True):
    """The keys without which neither tensors nor memory are known, and others that vLLM reads."""

    architectures: Annotated[list[Literal["DeepseekV4ForCausalLM"]], Field(min_length=1)]
    topk_method: Literal["noaux_tc"]  # without it vLLM has no room for the routers' biases
    hidden_act: Literal["silu"] = "silu"
    vision_n_layers: Literal[0] = 0
    num_hidden_layers: Annotated[int, Field(ge=1, le=2**7)]
    hidden_size: _Size
    vocab_size: _Size
    hc_mult: _Number
    sliding_window: _Size
    num_attention_heads: _Size
    num_key_value_heads: _Number = 1
    head_dim: _Size
    q_lora_rank: _Size
    o_groups: _Number
    o_lora_rank: _Size
    n_routed_experts: _Number
    num_experts_per_tok: _Number
    moe_intermediate_size: _Size
    index_head_dim: _Size
    index_n_heads: _Size
    n_shared_experts: _Number = 1
    index_topk: _Size = 512
    norm_topk_prob: bool = True
    hc_sinkhorn_iters: _Number = 20
    hc_eps: _Positive = 1e-6
    rms_norm_eps: _Positive = 1e-6
    num_nextn_predict_layers: Annotated[int, Field(ge=0, le=64)] | None = None
    num_hash_layers: Annotated[int, Field(ge=0, le=2**12)] | None = None
    max_position_embeddings: Annotated[int, Field(ge=1, le=2**40)] | None = None
    layer_types: list[str] | None = None
    mlp_layer_types: list[str] | None = None
    compress_rates: dict[str, int] | None = None
    rope_theta: _Positive = 10000.0
    compress_rope_theta: _Positive = 160000.0
    swiglu_limit: _Positive = 10.0
    routed_scaling_factor: _Positive = 1.5
    scoring_func: Literal["sqrtsoftplus", "sigmoid", "softmax"] = "sqrtsoftplus"
    qk_rope_head_dim: _Size = 64
    torch_dtype: _Dtype | None = None
    dtype: _Dtype | None = None
    rope_scaling: _Rope | None = None


class DSparkDimensions(Dimensions):
    """With the keys that upstream's config.json has for a DSpark drafter."""

    dspark_block_size: _Number
    dspark_markov_rank: _Size
    dspark_noise_token_id: Annotated[int, Field(ge=0, lt=2**20)]
    dspark_target_layer_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    n_mtp_layers: Annotated[int, Field(ge=1, le=2**6)] | None = None


def num_stages(config: Mapping[str, Any]) -> int:
    """Return how many stages the DSpark drafter has that a config.json describes; 0 for MTP's."""
    is_dspark = config.get("dspark_block_size") is not None
    return (config.get("n_mtp_layers") or 3) if is_dspark else 0  # 3 is vLLM's default


def check_dimensions(
    config: Mapping[str, Any], file: object = "config.json", *, dspark: bool = False
) -> Dimensions:
    """Return the dimensions; raise GraftError naming all that are missing or of another model."""
    try:
        return (DSparkDimensions if dspark else Dimensions).model_validate(config)
    except ValidationError as error:
        wrong = [
            f"has no {each['loc'][0]!r}"
            if each["type"] == "missing"
            else f"{'.'.join(map(str, each['loc']))} is {reprlib.repr(each['input'])}"
            for each in error.errors()
        ]
        sizes = "its dimensions whole numbers above 0, as large as a model's"
        problem = f"{', '.join(wrong)}; expected a DeepSeek-V4 config, {sizes}"
        raise GraftError(f"{file}: {problem}") from error


def compress_ratios(config: Mapping[str, Any]) -> list[int] | None:
    """Return each layer's and the head's compression ratio; None without a list that says them."""
    listed = config.get("compress_ratios")
    if listed is None and (kinds := config.get("layer_types")) is not None:
        rates = _RATES | (config.get("compress_rates") or {})
        listed = [*map(rates.get, kinds[: config["num_hidden_layers"]]), 0]
    if not isinstance(listed, list) or len(listed) > 2**10:
        return None
    return listed if all(type(r) is int and r in _RATES.values() for r in listed) else None


def unread_keys(config: Mapping[str, Any], release: tuple[int, ...]) -> str:
    """Return what vLLM 0.32 stops at: it reads DeepSeek's keys alone, and needs all of them."""
    if release >= (0, 33):
        return ""
    kinds = [key for key in ("layer_types", "mlp_layer_types") if config.get(key) is not None]
    own = all(config.get(key) is not None for key in ("compress_ratios", "num_hash_layers"))
    absent = [f"no {key}" for key in _WITHOUT_DEFAULT if key not in config]
    if not kinds and config.get("num_hash_layers") is None:
        absent.append("no num_hash_layers")
    return " and ".join([*(kinds if len(kinds) > 1 or not own else ()), *absent])


def check_readable(config: Mapping[str, Any], file: object, release: tuple[int, ...]) -> None:
    """Raise GraftError for such keys."""
    if keys := unread_keys(config, release):
        expected = "DeepSeek's keys (compress_ratios, num_hash_layers, ...), which vLLM 0.32 reads"
        cure = "take vLLM 0.33, or config.json of the base's release"
        raise GraftError(f"{file}: has {keys}; expected {expected}; {cure}")
