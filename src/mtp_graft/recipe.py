"""A recipe: one TOML file that says what is grafted onto what, and how it is measured.

Every section is a frozen dataclass. A key that no section has, or a value of another type or out of
bounds, is an error that names it. Numbers are 1 or more where a field has no bound of its own.
"""

import difflib
import math
import re
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mtp_graft.errors import GraftError

#: How the routed experts are stored: rounded to INT4, INT4 by GPTQ, upstream's codes, decoded.
Variant = Literal["rtn", "gptq", "mxfp4", "bf16"]
Linears = Literal["fp8", "base", "bf16"]
_ALL_VARIANTS: tuple[Variant, ...] = get_args(Variant)
#: `auto` is the GPU if there is one.
Device = Literal["auto", "cpu", "cuda"]
#: What experts are calibrated on: the head's true inputs to them, or those without its attention.
Replay = Literal["true", "identity"]
#: Such an expert is calibrated on every token, rounded to nearest, or ends the run.
ZeroTokens = Literal["pool", "rtn", "error"]


def _at_least(least: float, default: float | None) -> Any:
    """Return a field whose number has this bound."""
    return field(default=default, metadata={"least": least})


@dataclass(frozen=True)
class ModelSection:
    """The two checkpoints: a folder (`./x`, `../x`, `/x`, `~/x`) or a hub id (`owner/name`)."""

    name: str  # of the spliced checkpoint's folder and of the report
    base: str  # quantized, without its head
    upstream: str  # the master that has the head
    base_revision: str | None = None  # of the hub: branch, tag or commit
    upstream_revision: str | None = None


@dataclass(frozen=True)
class CaptureSection:
    """What the base is asked and how long it answers; two sets, so that scores are held out."""

    calibration_prompts: str  # JSON Lines file, or hub:owner/dataset
    evaluation_prompts: str
    calibration_count: int = 256
    evaluation_count: int = 64
    max_prompt_tokens: int = 512  # longer prompts are left out; others take their place
    new_tokens: int = 256  # per prompt, at most: the base ends a text where it ends
    concurrency: int = 8  # prompts in work at a time
    max_model_len: int = 2048


@dataclass(frozen=True)
class QuantizeSection:
    """How the head's routed experts are rounded."""

    variants: tuple[Variant, ...] = _ALL_VARIANTS
    damp: float = _at_least(0, 0.01)  # of the mean of the Hessian's diagonal
    damping: Literal["fixed", "tokens"] = "tokens"  # more than `damp` for experts with few tokens
    order: Literal["stored", "activation"] = "stored"  # in which inputs are rounded
    scale: Literal["absmax", "mse"] = "mse"  # the rule for a group's scale
    group_size: int = 128  # inputs per INT4 scale; as the base has it
    experts_per_batch: int = 16  # the unit of resuming
    zero_tokens: ZeroTokens = "pool"  # for an expert that no calibration token reached
    replay: Replay = "true"
    device: Device = "auto"


@dataclass(frozen=True)
class ScoreSection:
    """Where the offline acceptance is computed."""

    device: Device = "auto"


@dataclass(frozen=True)
class SpliceSection:
    """Which variant the final checkpoint carries."""

    variant: Variant = "gptq"
    linears: Linears = "base"  # what the head's FP8 linears become
    copy: bool = False  # copy the base's files instead of hard-linking them


@dataclass(frozen=True)
class BenchSection:
    """What is served and timed at the end."""

    prompts: str  # JSON Lines file, or hub:owner/dataset
    count: int = 8
    max_tokens: int = 128
    rounds: int = 3
    k: int | None = _at_least(1, None)  # drafts a step; None: as `serve` does on this platform
    draft_lm_head_quantization: str | None = None  # as `serve` has it, on GPUs
    draft_sample_method: str | None = None
    served_variants: tuple[Variant, ...] = _ALL_VARIANTS
    acceptance_count: int | None = None  # evaluation texts to serve; all of them are scored


@dataclass(frozen=True)
class ServeSection:
    """How vLLM serves base and grafted checkpoint; None leaves it to vLLM or the platform."""

    tensor_parallel_size: int = 1
    kv_cache_gib: float | None = _at_least(0.01, None)  # as `serve --kv-cache-gib`
    extra_args: tuple[str, ...] = ()  # for `vllm serve`, as they are


@dataclass(frozen=True)
class Recipe:
    """Everything a run needs to know."""

    model: ModelSection
    capture: CaptureSection
    bench: BenchSection
    quantize: QuantizeSection = field(default_factory=QuantizeSection)
    score: ScoreSection = field(default_factory=ScoreSection)
    splice: SpliceSection = field(default_factory=SpliceSection)
    serve: ServeSection = field(default_factory=ServeSection)

    @property
    def served_variants(self) -> tuple[Variant, ...]:
        """Return the variants that become checkpoints, and are served: the chosen one first."""
        chosen = self.splice.variant
        return (chosen, *(v for v in self.bench.served_variants if v != chosen))

    def as_dict(self) -> dict[str, Any]:
        """Return section -> key -> value, as manifests record it."""
        return asdict(self)


_SECTIONS: Mapping[str, type] = get_type_hints(Recipe)
_MODEL_KEYS = ("base", "upstream")  # a folder or a hub id
_PROMPT_KEYS = (
    ("capture", "calibration_prompts"),
    ("capture", "evaluation_prompts"),
    ("bench", "prompts"),
)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in a TOML file, with `section.key=value` overrides applied in order.

    An override's value is read as TOML, or else as a bare string. Relative paths are relative to
    the recipe's folder, those in overrides to the current one. Raises GraftError for a file that
    is not TOML, for keys nobody knows, missing keys and values of the wrong type.
    """
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise GraftError(f"{path}: not readable ({error.strerror}); expected a recipe") from error
    except ValueError as error:
        raise GraftError(f"{path}: not a TOML file ({error})") from error
    _resolve_paths(table, path.parent)
    origin = _Origin(str(path))
    for override in overrides:
        change = _parse_override(override)
        _resolve_paths(change, Path.cwd())
        for section, values in change.items():
            _known(section, _SECTIONS, f"--set {override}", "section")
            target = table.setdefault(section, {})
            if isinstance(target, dict):  # else the recipe itself is wrong, as is said below
                target.update(values)
                origin.overrides.update({(section, key): f"--set {override}" for key in values})
    return _build(table, origin)


@dataclass(frozen=True)
class _Origin:
    """Where values come from: the file, or the `--set` that gave the section's key."""

    file: str
    overrides: dict[tuple[str, str], str] = field(default_factory=dict)

    def of(self, *keys: tuple[str, str]) -> str:
        """Return who is to blame for these keys' values: the first `--set` among them, if any."""
        return next((self.overrides[key] for key in keys if key in self.overrides), self.file)


def _parse_override(override: str) -> dict[str, dict[str, Any]]:
    dotted, equals, text = override.partition("=")
    section, dot, key = dotted.strip().partition(".")
    if not (equals and dot and section and key):
        raise GraftError(f"--set {override}: expected section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        value = text.strip()  # a bare string: variant=gptq
    return {section: {key: value}}


def _resolve_paths(table: Mapping[str, Any], folder: Path) -> None:
    """Make the paths in `table` absolute, in place; hub ids stay, and wrong types for later."""
    for section, key in (*(("model", key) for key in _MODEL_KEYS), *_PROMPT_KEYS):
        values = table.get(section)
        if not isinstance(values, dict):
            continue
        value = values.get(key)
        if isinstance(value, str) and not _is_hub_id(section, value):
            values[key] = str((folder / Path(value).expanduser()).resolve())


def _is_hub_id(section: str, value: str) -> bool:
    if section == "model":
        return not value.startswith((".", "/", "~"))
    return value.startswith("hub:")


def _build(table: Mapping[str, Any], origin: _Origin) -> Recipe:
    for name in table:
        _known(name, _SECTIONS, origin.file, "section")
    sections = {}
    for name, kind in _SECTIONS.items():
        values = table.get(name, {})
        if not isinstance(values, dict):
            raise GraftError(f"{origin.file}: {name} is {values!r}, expected a section [{name}]")
        sections[name] = _build_section(name, kind, values, origin)
    recipe = Recipe(**sections)
    _check_numbers(recipe, origin)
    _check_values(recipe, origin)
    return recipe


def _build_section(section: str, kind: type, values: Mapping[str, Any], origin: _Origin) -> Any:
    hints = get_type_hints(kind)
    converted = {}
    for key, value in values.items():
        where = f"{origin.of((section, key))}: [{section}]"
        _known(key, hints, where, "key")
        converted[key] = _convert(value, hints[key], f"{where} {key}")
    required = [f.name for f in fields(kind) if f.default is MISSING and f.name not in values]
    if required:
        raise GraftError(f"{origin.file}: [{section}]: {required[0]} is missing; give it a value")
    return kind(**converted)


def _known(name: str, valid: Mapping[str, Any], where: str, what: str) -> None:
    if name in valid:
        return
    near = difflib.get_close_matches(name, valid, n=1)
    hint = f"did you mean {near[0]!r}? There are" if near else "there are"
    raise GraftError(f"{where}: unknown {what} {name!r}; {hint} {', '.join(sorted(valid))}")


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Return `value` as the type a field asks for; GraftError where it is another."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):  # X | None: TOML has no null, so it is X
        return _convert(value, next(a for a in arguments if a is not type(None)), where)
    if origin is tuple:
        if not isinstance(value, list):
            raise GraftError(f"{where}: is {value!r}, expected a list")
        return tuple(_convert(item, arguments[0], where) for item in value)
    if origin is Literal:
        if isinstance(value, bool):  # `replay = true` and `--set quantize.replay=true` are meant so
            value = str(value).lower()
        if value not in arguments:
            raise GraftError(f"{where}: is {value!r}, expected one of {', '.join(arguments)}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:  # exactly: True is an int, but no number
        raise GraftError(f"{where}: is {value!r}, expected {hint.__name__}")
    return value


def _check_numbers(recipe: Recipe, origin: _Origin) -> None:
    """Refuse numbers below their fields' bounds, and those that are none or endless."""
    for section in _SECTIONS:
        values = getattr(recipe, section)
        for known in fields(values):
            key, value = known.name, getattr(values, known.name)
            least = known.metadata.get("least", 1)
            if type(value) in (int, float) and not least <= value < math.inf:
                where = origin.of((section, key))
                raise GraftError(f"{where}: [{section}] {key} is {value}, expected >= {least}")


def _check_values(recipe: Recipe, origin: _Origin) -> None:
    """Refuse what no stage could do anything with."""
    for key in _MODEL_KEYS:
        value = getattr(recipe.model, key)
        if not value.startswith("/") and not re.fullmatch(r"[\w.-]+/[\w.-]+", value):
            raise GraftError(
                f"{origin.of(('model', key))}: [model] {key} is {value!r}, expected a hub id "
                "(owner/name) or a folder that starts with ./, ../, / or ~"
            )
    if not re.fullmatch(r"[\w][\w.-]*", recipe.model.name):
        raise GraftError(
            f"{origin.of(('model', 'name'))}: [model] name is {recipe.model.name!r}, expected "
            "letters, digits, . _ or -"
        )
    capture, context = recipe.capture, ("capture", "max_model_len")
    longest = capture.max_prompt_tokens + capture.new_tokens + 1
    if longest > capture.max_model_len:
        keys = (("capture", "max_prompt_tokens"), ("capture", "new_tokens"), context)
        raise GraftError(
            f"{origin.of(*keys)}: [capture] max_model_len is {capture.max_model_len}, expected at "
            f"least {longest}: {capture.max_prompt_tokens} tokens of prompt, {capture.new_tokens} "
            "new ones and one more when they are recorded"
        )
    if recipe.bench.max_tokens >= capture.max_model_len:
        raise GraftError(
            f"{origin.of(('bench', 'max_tokens'), context)}: [bench] max_tokens is "
            f"{recipe.bench.max_tokens}, expected less than [capture] max_model_len, "
            f"{capture.max_model_len}"
        )
    quantized, served = ("quantize", "variants"), ("bench", "served_variants")
    for where, variants in (
        (quantized, recipe.quantize.variants),
        (served, recipe.bench.served_variants),
    ):
        if len(set(variants)) < len(variants):
            raise GraftError(
                f"{origin.of(where)}: [{where[0]}] names a variant twice: {', '.join(variants)}"
            )
    for name in recipe.served_variants:
        if name not in recipe.quantize.variants:
            chosen = served if name in recipe.bench.served_variants else ("splice", "variant")
            raise GraftError(
                f"{origin.of(chosen, quantized)}: variant {name!r} is to be spliced, but "
                f"[quantize] variants has {', '.join(recipe.quantize.variants)} only"
            )
