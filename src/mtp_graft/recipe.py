"""A recipe: one TOML file that says what is grafted onto what, and how it is measured.

Every setting is defined here, once: a section is a frozen pydantic model, and a stage takes its
own section. A wrong key or value is an error that names the file, or the `--set` that gave it.
"""

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from mtp_graft.errors import GraftError, UsageError, translated

#: How the routed experts are stored: rounded to INT4, INT4 by GPTQ, upstream's codes, decoded.
Variant = Literal["rtn", "gptq", "mxfp4", "bf16"]
LinearDtype = Literal["fp8", "base", "bf16"]
ALL_VARIANTS: tuple[Variant, ...] = get_args(Variant)
#: How a draft's distribution differs from the base's: total variation, KL, cross-entropy.
Loss = Literal["tv", "kl", "ce"]
#: `auto` is the GPU if there is one.
Device = Literal["auto", "cpu", "cuda"]

_exact = ConfigDict(extra="forbid", allow_inf_nan=False)


def _check(holds: Callable[[Any], object], expected: str) -> AfterValidator:
    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(expected)
        return value

    return AfterValidator(check)


def _match(pattern: str, expected: str) -> AfterValidator:
    return _check(re.compile(pattern).fullmatch, expected)


Name = Annotated[str, _match(r"\w[\w.-]{0,59}", "up to 60 letters, digits, . _ or -")]
Word = Annotated[str, _match(r"[^\0]*", "text without a NUL")]
#: Paths are absolute by now.
_PROMPTS = r"/.*|hub:\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?"
Prompts = Annotated[str, _match(_PROMPTS, "a file or hub:owner/dataset[:split]")]
_FOLDER = "a hub id (owner/name) or a folder that starts with ./, ../, / or ~"
Checkpoint = Annotated[str, _match(r"/.*|[\w.-]+/[\w.-]+", _FOLDER)]
#: Numbers and switches are not read from text; True is no number.
Count = Annotated[int, Field(ge=1, le=2**40, strict=True)]
Bool = Annotated[bool, Field(strict=True)]
#: Layers of the base; ascending, as vLLM hands what is behind them to a drafter.
Layers = Annotated[
    tuple[Annotated[int, Field(ge=0, strict=True)], ...],
    _check(lambda layers: list(layers) == sorted(set(layers)), "layers in ascending order"),
]
#: The parts of a loss, with their weights.
Losses = Annotated[
    dict[Loss, Annotated[float, Field(ge=0, strict=True)]],
    _check(lambda loss: any(loss.values()), "at least one weight above 0"),
]


@dataclass(frozen=True, config=_exact)
class ModelSection:
    """The two checkpoints: a folder (`./x`, `../x`, `/x`, `~/x`) or a hub id (`owner/name`)."""

    name: Name  # of the spliced checkpoint's folder and of the report
    base: Checkpoint  # quantized, without its head
    upstream: Checkpoint  # the master that has the head
    base_revision: str | None = None  # of the hub: branch, tag or commit
    upstream_revision: str | None = None


@dataclass(frozen=True, config=_exact)
class CaptureSection:
    """What the base is asked and how long it answers; two sets, so that scores are held out."""

    calibration_prompts: Prompts  # JSON Lines file, or hub:owner/dataset
    evaluation_prompts: Prompts
    calibration_count: Count = 256
    evaluation_count: Count = 64
    calibration_tokens: Count | None = None  # of text, at most: enough with fewer prompts
    max_prompt_tokens: Count = 512  # longer prompts are left out; others take their place
    new_tokens: Count = 256  # per prompt, at most: the base ends a text where it ends
    concurrency: Count = 8  # prompts in work at a time
    max_model_len: Count = 2048
    taps: Layers | None = None  # record what is behind them, too; None: as upstream's DSpark needs

    def most_tokens(self, per_text: int) -> int:
        """Return how many tokens all texts have if each has so many."""
        enough = (self.calibration_tokens or 2**40) + per_text
        return min(self.calibration_count * per_text, enough) + self.evaluation_count * per_text

    def __post_init__(self) -> None:
        longest = self.max_prompt_tokens + self.new_tokens + 1  # one when they are recorded
        if longest > self.max_model_len:
            least = f"at least {longest}, max_prompt_tokens + new_tokens + 1"
            raise ValueError(f"[capture] max_model_len is {self.max_model_len}, expected {least}")


@dataclass(frozen=True, config=_exact)
class QuantizeSection:
    """How the head's routed experts are rounded."""

    variants: tuple[Variant, ...] = ALL_VARIANTS  # to be scored and spliced
    damp: Annotated[float, Field(ge=0, strict=True)] = 0.01  # of the mean of the Hessian's diagonal
    damping: Literal["fixed", "tokens"] = "tokens"  # more than `damp` for experts with few tokens
    scale: Literal["absmax", "mse"] = "mse"  # the rule for a group's scale
    group_size: Count = 128  # inputs per INT4 scale; as the base has it
    experts_per_batch: Count = 16  # the unit of resuming
    device: Device = "auto"


@dataclass(frozen=True, config=_exact)
class HealSection:
    """How the head's dense part is trained for the base; a recipe without it leaves it as it is."""

    steps: Annotated[Count, Field(ge=10)] = 400
    k: Annotated[Count, Field(le=16)] = 3  # drafts a step that are trained and judged
    loss: Losses = field(default_factory=lambda: {"tv": 1.0, "kl": 0.1})
    decay: Annotated[float, Field(gt=0, le=1)] = 0.6  # of a draft's weight, to the next one's
    lr: Annotated[float, Field(gt=0, strict=True)] = 4e-4
    batch_tokens: Count = 8192  # of a step, with padding; a longer text alone
    router: Bool = False  # train it, too
    recompute: Bool = False  # activations, in the backward pass: a third of the memory
    look_every: Count = 50  # steps between looks at the held-out texts, which are kept
    device: Device = "auto"


@dataclass(frozen=True, config=_exact)
class ScoreSection:
    """How the offline acceptance is computed."""

    k: Annotated[Count, Field(le=16)] = 3  # drafts a step, at most; all fewer are scored as well
    device: Device = "auto"


@dataclass(frozen=True, config=_exact)
class SpliceSection:
    """Which variant the final checkpoint carries."""

    variant: Variant = "gptq"
    linear_dtype: LinearDtype = "base"  # what the head's FP8 linears become
    copy: Bool = False  # copy the base's files instead of hard-linking them


@dataclass(frozen=True, config=_exact)
class BenchSection:
    """What is served and timed at the end."""

    prompts: Prompts  # JSON Lines file, or hub:owner/dataset
    count: Count = 8
    max_tokens: Count = 128
    rounds: Count = 3
    k: Count | None = None  # drafts a step; None: as `serve` does on this platform
    served_variants: tuple[Variant, ...] = ALL_VARIANTS
    acceptance_count: Count | None = None  # evaluation texts to serve; all of them are scored


@dataclass(frozen=True, config=_exact)
class ServeSection:
    """How vLLM serves base and grafted checkpoint; None leaves it to vLLM or the platform."""

    tensor_parallel_size: Count = 1
    kv_cache_gib: Annotated[float, Field(ge=0.01, strict=True)] | None = None  # as `serve` has it
    extra_args: tuple[Word, ...] = ()  # for `vllm serve`, as they are


@dataclass(frozen=True, config=_exact)
class Recipe:
    """Everything a run needs to know."""

    model: ModelSection
    capture: CaptureSection
    bench: BenchSection
    quantize: QuantizeSection = QuantizeSection()
    heal: HealSection | None = None
    score: ScoreSection = ScoreSection()
    splice: SpliceSection = SpliceSection()
    serve: ServeSection = ServeSection()

    @property
    def served_variants(self) -> tuple[Variant, ...]:
        """Return the variants that become checkpoints, and are served: the chosen one first."""
        return tuple(dict.fromkeys((self.splice.variant, *self.bench.served_variants)))

    def __post_init__(self) -> None:
        context, most = self.capture.max_model_len, self.bench.max_tokens
        if most >= context:
            raise ValueError(f"[bench] max_tokens is {most}, expected less than {context}")
        quantized = self.quantize.variants
        if missing := [name for name in self.served_variants if name not in quantized]:
            there = f"[quantize] variants has {', '.join(quantized)} only"
            raise ValueError(f"variant {missing[0]!r} is to be spliced, but {there}")


#: Of the optional one, too.
_SECTIONS = {name: (*get_args(hint), hint)[0] for name, hint in get_type_hints(Recipe).items()}
#: Keys whose value is a path or a hub id, and what a hub id begins with.
_PATHS = dict.fromkeys(("model.base", "model.upstream"), r"[^./~]")
for _key in ("capture.calibration_prompts", "capture.evaluation_prompts", "bench.prompts"):
    _PATHS[_key] = "hub:"


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in a TOML file, with `section.key=value` overrides applied in order.

    An override's value is read as TOML, or else as a bare string. Relative paths are relative to
    the recipe's folder, those in overrides to the current one. Raises GraftError for what is no
    recipe; UsageError where an override is to blame.
    """
    if path.exists() and not path.is_file():  # a device or a pipe may never end
        raise GraftError(f"{path}: not a file; expected a recipe")
    with translated(f"{path}: not a TOML file", OSError, ValueError, RecursionError):
        table = tomllib.loads(path.read_text())
    for section, values in table.items():
        for key, value in values.items() if isinstance(values, dict) else ():
            values[key] = _absolute(f"{section}.{key}", value, path.parent)
    to_blame, problem = None, _find_problem(table)
    for override in overrides:
        _apply(override, table)
        if problem is None:
            to_blame = override
        problem = _find_problem(table)
    if problem is None:
        return Recipe(**table)
    if to_blame is None:
        raise GraftError(f"{path}: {problem}")
    raise UsageError(f"--set {to_blame}: {problem}")


def _apply(override: str, table: dict[str, Any]) -> None:
    """Change `table` by `section.key=value`; UsageError for anything else."""
    dotted, equals, text = override.partition("=")
    section, dot, key = dotted.strip().partition(".")
    if not (equals and dot and section and key):
        raise UsageError(f"--set {override}: expected section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text.strip()  # a bare string: variant=gptq
    values = table.setdefault(section, {})
    if isinstance(values, dict):  # else the recipe itself is wrong
        values[key] = _absolute(f"{section}.{key}", value, Path.cwd())


def _absolute(name: str, value: Any, folder: Path) -> Any:
    """Return a key's path as an absolute one; a hub id, or what is no path, as it is."""
    if not isinstance(value, str) or name not in _PATHS or re.match(_PATHS[name], value):
        return value
    what = "[{}] {} is {!r}: no path".format(*name.split("."), value)
    with translated(what, OSError, RuntimeError, ValueError):
        return str((folder / Path(value).expanduser()).resolve())


def _find_problem(table: Mapping[str, Any]) -> str | None:
    """Say what was found in a recipe and what was expected; None if all is right."""
    try:
        Recipe(**table)
    except ValidationError as invalid:
        # An unknown key first: it may be the one that is missing.
        error = min(invalid.errors(), key=lambda e: e["type"] != "unexpected_keyword_argument")
    else:
        return None
    section, key = [*map(str, error["loc"]), "", ""][:2]
    where, found = f"[{section}] {key}".rstrip(), error["input"]
    expected = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    match error["type"]:
        case "value_error" if not key:  # values that do not fit each other
            return expected
        case "missing":
            return f"{where} is missing; give it a value"
        case "dataclass_type":
            return f"{section} is {found!r}, expected a section [{section}]"
        case "unexpected_keyword_argument":
            what = f"[{section}]: unknown key {key!r}" if key else f"unknown section {section!r}"
            known = fields(_SECTIONS[section] if key else Recipe)
            return f"{what}; there are {', '.join(sorted(f.name for f in known))}"
    return f"{where} is {found!r}, expected {expected.replace('tuple', 'list')}"
