"""The `quantization_config` of a W4A16-FP8 checkpoint, as compressed-tensors and vLLM read it.

vLLM asks for a module's scheme by its own name: on CUDA it says `...experts.0.w1`, on a CPU
`...experts.0.gate_proj`, and for `mtp.0` layer `num_hidden_layers`. Patterns are anchored at a dot:
`re:.*e_proj` also matches `gate_proj`.
"""

import math
import re
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import regex
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError
from pydantic.functional_validators import model_validator

from mtp_graft.errors import GraftError, translated
from mtp_graft.recipe import LinearDtype, Variant

#: Kinds of routed experts that are packed integers with scales of groups.
INTEGERS = ("int4", "int4-asymmetric", "int8")
_DATA: dict[str, Any] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
_CLASSES = re.compile("|".join(f"(?P<{name}>{each})" for name, each in _DATA["classes"].items()))
_FP8_FORMATS = ("float-quantized", "naive-quantized", "int-quantized")
#: For all patterns of a section and the names of a model, which take some hundredths.
_MATCHING_SECONDS = 3


def add_head(
    config: dict[str, Any], head_layer: int, variant: Variant, dtype: LinearDtype, stages: int = 0
) -> dict[str, Any]:
    """Return `config` extended by the head's modules, which vLLM names layer `head_layer`.

    A DSpark drafter has `stages`, and as many layers from there on. The base's groups cover INT4
    experts; `dtype` says what the other linears are (`dsv4.variants` explains it).
    """
    numbers = "|".join(str(head_layer + stage) for stage in range(stages))
    layer = f"({numbers})" if stages else str(head_layer)
    table = _DATA["dspark" if stages else "mtp"]

    def patterns(kind: str, name: str) -> list[str]:
        return [pattern.replace("LAYER", layer) for pattern in table[kind].get(name, ())]

    groups, ignore = dict(config["config_groups"]), [*(config.get("ignore") or [])]
    ignore += patterns("ignore", dtype) + patterns("ignore_experts", variant)
    fp8, read = patterns("fp8", dtype), read_quantization({"quantization_config": config})
    attention = (f"model.layers.{head_layer}.attn.w{w}" for w in ("q_a", "q_b", "o_a", "o_b"))
    if not stages and None in map(read.group_of, attention):  # targets may name layers
        fp8 += patterns("fp8", "attention")
    if fp8:
        groups["mtp_projections"] = {"targets": fp8, **_DATA["schemes"]["fp8"]}
    if mxfp4 := patterns("experts", variant):  # the first match wins, so before the base's groups
        groups = {"mtp_experts": {"targets": mxfp4, **_DATA["schemes"]["mxfp4"]}, **groups}
    return {**config, "config_groups": groups, "ignore": ignore}


_compiled = cache(regex.compile)  # vLLM's own choice, not `re`


def _check_pattern(pattern: str) -> str:
    """Refuse what cannot be compiled, or would fill the memory."""
    if pattern.startswith("re:"):
        repeats = math.prod(map(int, re.findall(r"(?<=[{,])\d{1,9}(?=[,}])", pattern)))
        if max(repeats, len(pattern)) > 10**4:
            raise ValueError(f"{pattern[:60]!r} has more than 10,000 repeats or characters")
        try:
            _compiled(pattern[3:])
        except (regex.error, RecursionError) as error:
            raise ValueError(f"{pattern!r} is no regular expression ({error})") from error
    return pattern


#: A module's name, `re:` and a regular expression, or, of targets, a part of a class's name.
Pattern = Annotated[str, AfterValidator(_check_pattern)]
_LOWER = BeforeValidator(lambda v: v.lower() if isinstance(v, str) else v)
_SIDES = BeforeValidator(lambda v: [*map(int, v.split("x"))] if isinstance(v, str) else v)
_STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
_OR_NONE = BeforeValidator(lambda v: v or None)
_WHOLE = BeforeValidator(lambda v: int(v) if isinstance(v, float) and v.is_integer() else v)
_Count = Annotated[int, Field(ge=-1, le=2**16, strict=True)]
_Dtype = Annotated[str, Field(pattern=r"^(torch\.)?(u?int|b?float|half|bool)\d*(_\w+)?$")]


class Arguments(BaseModel, extra="forbid"):
    """How numbers are quantized: compressed-tensors' QuantizationArgs, which are slow to import."""

    num_bits: int = 8
    type: Annotated[Literal["int", "float"], _LOWER] = "int"
    symmetric: bool = True
    strategy: Annotated[str | None, _LOWER] = None
    group_size: Annotated[_Count | None, _WHOLE] = None  # -1: a scale a channel
    block_structure: Annotated[tuple[_Count, _Count] | None, _SIDES] = None
    dynamic: Annotated[Literal[True, False, "local"], _LOWER] = False
    actorder: Annotated[Literal["static", "weight", False] | None, _LOWER] = None  # no "group"
    scale_dtype: _Dtype | None = None
    zp_dtype: _Dtype | None = None
    observer: str | None = None
    observer_kwargs: dict[str, Any] = {}

    @model_validator(mode="after")
    def _fits_strategy(self) -> Self:
        size, by = self.group_size, self.strategy
        if by is None:
            by = self.strategy = "tensor" if size is None else "channel" if size < 0 else "group"
        if by == "channel" and size is None:
            self.group_size = -1
        dynamic = {"token": (True,), "tensor_group": (False, True, "local")}
        fits = {
            "strategy": by in _STRATEGIES,
            "group_size": ((size or 0) > 0) == (by in ("group", "tensor_group")),
            "block_structure": (self.block_structure is not None) == (by == "block"),
            "dynamic": self.dynamic in dynamic.get(by, (False, by in ("tensor", "group"))),
            "num_bits": self.type == "int" or self.num_bits in (4, 8) or self.zp_dtype is not None,
        }
        if wrong := [name for name, is_right in fits.items() if not is_right]:
            raise ValueError(f"{wrong[0]} does not fit {self.type} numbers by {by}")
        return self

    @property
    def inputs_per_scale(self) -> int:
        """Return how many inputs of a row share a scale; -1 for all."""
        return self.group_size or (self.block_structure or (0, -1))[1]


class Group(BaseModel):
    """A scheme and the modules that have it."""

    targets: list[Pattern]
    weights: Arguments
    input_activations: Annotated[Arguments | None, _OR_NONE] = None
    output_activations: Annotated[Arguments | None, _OR_NONE] = None
    format: str | None = None

    @property
    def kind(self) -> str:
        """Return `int4`, `int4-asymmetric`, `int8`, `mxfp4`, `nvfp4` or `fp8`; others in words."""
        w, inputs = self.weights, self.input_activations
        is_packed = self.format == "pack-quantized" and not (inputs or w.dynamic)
        is_fp8 = self.format in _FP8_FORMATS and w.block_structure == (128, 128)
        is_fp8 = is_fp8 and bool(inputs is None or inputs.dynamic)
        by = "group" if w.type == "int" and w.strategy == "channel" else str(w.strategy)
        known = {
            ("float", 4, "group", True): "mxfp4" if w.group_size == 32 else None,
            ("float", 4, "tensor_group", True): "nvfp4" if w.group_size == 16 else None,
            ("float", 8, "block", True): "fp8" if is_fp8 else None,
            ("int", 4, "group", True): "int4" if is_packed else None,
            ("int", 4, "group", False): "int4-asymmetric" if is_packed else None,
            ("int", 8, "group", True): "int8" if is_packed else None,
        }
        words = "" if w.symmetric else "asymmetric "
        words += f"{w.num_bits}-bit {w.type} by {w.strategy}, {self.format}"
        words += f", {'dynamic' if inputs.dynamic else 'static'} inputs" if inputs else ""
        return known.get((w.type, w.num_bits, by, w.symmetric)) or words


class _Sparsity(BaseModel):
    format: str
    targets: Annotated[list[str], Field(max_length=0)] | None = None


def _read_groups(groups: Any) -> Any:
    """Leave out what vLLM leaves out unread: groups of a class of attention, or of nothing."""
    if not isinstance(groups, dict):
        return groups
    targets = {key: str(g.get("targets")) for key, g in groups.items() if isinstance(g, dict)}
    unread = [key for key, t in targets.items() if re.fullmatch(r"\[('[^']*Attention')?\]", t)]
    return {key: group for key, group in groups.items() if key not in unread}


class _Patterns(dict[str, str]):
    """Patterns, as vLLM maps them, to their groups' keys, in the order in which it tries them."""

    def __init__(self, keys: dict[str, str]) -> None:
        super().__init__(keys)
        self.places = {pattern: place for place, pattern in enumerate(self)}
        self.regexes = [pattern for pattern in self if pattern.startswith("re:")]


class QuantizationConfig(BaseModel):
    """The section as vLLM reads it: which group, if any, has the scheme of a module."""

    quant_method: Literal["compressed-tensors"]
    config_groups: Annotated[dict[str, Group], BeforeValidator(_read_groups)]
    format: str | None = None
    kv_cache_scheme: Arguments | None = None
    sparsity_config: Annotated[_Sparsity | None, _OR_NONE] = None
    transform_config: Annotated[None, _OR_NONE] = None  # none is read here
    ignore: Annotated[list[Pattern], BeforeValidator(lambda v: [] if v is None else v)] = []
    _seconds: float = _MATCHING_SECONDS
    _path: Path | str = "config.json"
    _ignored: _Patterns
    _targets: _Patterns
    _of_class: dict[str, str | None] = {}  # as far as asked for

    def model_post_init(self, _context: Any) -> None:
        """Give groups without a format the section's, and map the patterns."""
        for group in self.config_groups.values():
            group.format = group.format or self.format
        keys = {t: key for key, group in self.config_groups.items() for t in group.targets}
        if "Linear" in keys:
            keys.setdefault("RoutedExperts", keys["Linear"])
        self._targets = _Patterns({_mapped(target): key for target, key in keys.items()})
        self._ignored = _Patterns(dict.fromkeys(map(_mapped, self.ignore), ""))

    def group_of(self, module: str) -> str | None:
        """Return the key of the group whose scheme loads a module; None if it is not quantized.

        `module` is vLLM's name, or vLLM's of the layer and a checkpoint's within it. What matches
        first wins: names and patterns, then those of a fused module's parts, then classes. Raises
        GraftError for a module that is ignored in part, and for patterns that take too long.
        """
        if self.ignored_by(module) is not None:
            return None
        own, *parts = _asked_as(module)
        for names in (own, *parts):
            found = [self._first(self._targets, name) for name in names]
            if found[0] is not None and all(found):
                return self._targets[found[0]]
        match = _CLASSES.search(own[0])
        of_class = str(match.lastgroup) if match else "ReplicatedLinear"
        if of_class not in self._of_class:
            of, targets = of_class.lower(), self._targets.items()
            keys = (k for t, k in targets if t.lower() in of or self._matches(t, of_class))
            self._of_class[of_class] = next(keys, None)
        return self._of_class[of_class]

    def ignored_by(self, module: str) -> str | None:
        """Return the ignore pattern that leaves a module without a scheme; raises likewise."""
        for names in _asked_as(module):
            found = [self._first(self._ignored, name) for name in names]
            if all(found):
                return found[0]
            if pattern := next(filter(None, found), None):
                problem = f"ignore has a part of {module} ({pattern}) and not the other"
                raise self._error(f"{problem}; vLLM wants one scheme for both")
        return None

    def group_size(self, layers: Iterable[int], *kinds: str) -> int:
        """Return the most inputs per scale, -1 for all, of some layers' experts; 1 without scales.

        Raises GraftError if there are `kinds` and no experts are of one.
        """
        asked = (f"model.layers.{n}.ffn.experts.0.{w}" for n in layers for w in ("w1", "gate_proj"))
        groups = [self.config_groups[key] for key in map(self.group_of, asked) if key]
        sizes = [g.weights.inputs_per_scale for g in groups if not kinds or g.kind in kinds]
        if sizes or not kinds:
            return max(sizes, default=1)
        found = ", ".join(sorted({group.kind for group in groups})) or "not quantized"
        cure = "`mtp-graft graft` gives a base of other experts an mxfp4 or bf16 head"
        raise self._error(f"routed experts are {found}; expected {' or '.join(kinds)}. {cure}")

    def kind_of(self, key: str | None) -> str:
        """Return the kind of a group by its key; `plain` for None."""
        return "plain" if key is None else self.config_groups[key].kind

    def _first(self, patterns: _Patterns, name: str) -> str | None:
        last, places = patterns.places.get(name, len(patterns)), patterns.places
        found = (p for p in patterns.regexes if places[p] < last and self._matches(p, name))
        return next(found, name if name in patterns else None)  # not searched among thousands

    def _matches(self, pattern: str, name: str) -> bool:
        if not pattern.startswith("re:"):
            return pattern == name
        start = time.process_time()
        try:
            return _compiled(pattern[3:]).match(name, timeout=max(self._seconds, 0.001)) is not None
        except TimeoutError as error:
            problem = f"{pattern!r} takes more than {_MATCHING_SECONDS} s to match"
            expected = "a pattern without repeats of repeats: simplify it"
            raise self._error(f"{problem}; expected {expected}") from error
        finally:
            self._seconds -= time.process_time() - start

    def _error(self, problem: str) -> GraftError:
        return GraftError(f"{self._path}: quantization_config: {problem}")


def _asked_as(module: str) -> Iterator[list[str]]:
    """Yield the names by which vLLM looks for a module: its own, then those of its parts."""
    for pattern, replacement in _DATA["loaded_by"].items():
        module = re.sub(pattern, replacement, module)
    yield [module]
    before, _, name = module.rpartition(".")
    if parts := _DATA["fused"].get(name):
        yield [f"{before}.{part}" for part in parts]


def _mapped(pattern: str) -> str:
    """Return a pattern as vLLM maps it: full names become its own, all else stays."""
    if pattern.startswith("re:"):
        return pattern
    pattern = pattern.replace(".shared_experts.w2", ".shared_experts.down_proj", 1)
    return f"model.{pattern}" if pattern.startswith("layers.") else pattern


def with_section(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with the section, if any, under the key and method that vLLM makes of it."""
    section = config.get("quantization_config")
    section = config.get("compression_config") if section is None else section
    if isinstance(section, dict) and isinstance(method := section.get("quant_method"), str):
        method = method.lower().replace("compressed_tensors", "compressed-tensors")
        section = {**section, "quant_method": method}
    found = {} if section is None else {"quantization_config": section}
    return {k: v for k, v in config.items() if k != "compression_config"} | found


def read_quantization(
    config: Mapping[str, Any], path: Path | str = "config.json"
) -> QuantizationConfig:
    """Return a config.json's section; raises GraftError for one that vLLM cannot read."""
    expected = "; expected the compressed-tensors section of a W4A16-FP8 checkpoint"
    with translated(f"{path}: quantization_config", ValidationError, then=expected):
        found = QuantizationConfig.model_validate(with_section(config).get("quantization_config"))
    found._path = path
    return found
