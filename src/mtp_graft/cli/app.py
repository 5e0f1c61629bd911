"""The Typer applications that commands register with, and options that several of them have."""

import inspect
from collections.abc import Callable, Collection
from dataclasses import is_dataclass
from functools import wraps
from inspect import Parameter
from typing import Annotated, Any, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from mtp_graft.cli.output import check_writable
from mtp_graft.serving.command import argument, option

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


def with_options(command: Command) -> Command:
    """Let Typer parse what a command declares by `option` and `argument`.

    A parameter that is a pydantic dataclass stands for those of its fields that are declared so;
    what the dataclass refuses is wrong usage.
    """
    parameters = inspect.signature(command).parameters
    declared = {name: _declared(parameter) for name, parameter in parameters.items()}
    groups = {n: p.annotation for n, p in parameters.items() if is_dataclass(p.annotation)}

    @wraps(command)
    def flat(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = _make(group, {field: given.pop(field) for field in declared[name]})
        command(**given)

    parsed = [_parsed(*option) for group in declared.values() for option in group.items()]
    # Where Typer looks for what a command takes.
    flat.__signature__ = inspect.Signature(parsed)  # type: ignore[attr-defined]
    return flat


def _declared(parameter: Parameter) -> dict[str, FieldInfo]:
    """Return the options and arguments that a command's parameter stands for."""
    kind: Any = parameter.annotation
    if not is_dataclass(parameter.annotation):
        return {parameter.name: FieldInfo.from_annotated_attribute(kind, parameter.default)}
    fields: dict[str, FieldInfo] = kind.__pydantic_fields__
    return {name: field for name, field in fields.items() if field.json_schema_extra}


def _parsed(name: str, field: FieldInfo) -> Parameter:
    """Return what Typer is to parse for a declared option or argument."""
    assert isinstance(field.json_schema_extra, dict)
    kind: Any = field.annotation
    default = Parameter.empty if field.is_required() else field.default
    if get_origin(kind) is tuple:
        kind, default = list[str], []
    annotation = Annotated[kind, field.json_schema_extra["typer"]]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _make(group: Any, given: dict[str, Any]) -> Any:
    try:
        return group(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        flag = f"--{first['loc'][0]}".replace("_", "-").replace("model-names", "model-name")
        raise typer.BadParameter(first["msg"], param_hint=flag) from None


def refuse(words: Collection[str] | None, flags: set[str]) -> Collection[str] | None:
    """Return arguments for vLLM, which must have none of `flags`."""
    for flag in (word.partition("=")[0].replace("_", "-") for word in words or ()):
        if flag in flags:
            raise typer.BadParameter(
                f"{flag} after --: mtp-graft decides it; if it has an option for it, give that "
                "before the --"
            )
    return words


_JSON_HELP = "Write the result as JSON; - for standard output."
JSON_FILE = option(None, "FILE", _JSON_HELP, "--json", callback=check_writable)
DRY_RUN = option(False, None, "Print what would be done.", "--dry-run")
SERVE_ARGUMENTS = argument(
    "ARGS",
    "After --: arguments for vllm serve, as they are.",
    (),
    callback=lambda words: refuse(words, ADDRESS_FLAGS),
)


def _show_versions(wanted: bool) -> None:
    if wanted:
        from mtp_graft.checkpoint.manifest import package_versions  # takes seconds to import

        for package, version in package_versions().items():
            print(package, version)
        raise typer.Exit


_VERSION_HELP = "Show the versions of mtp-graft, vLLM and what else decides a result."


@app.callback()
@with_options
def _root(
    version: bool = option(
        False, None, _VERSION_HELP, "--version", callback=_show_versions, is_eager=True
    ),
) -> None:
    """Give a quantized DeepSeek-V4 its multi-token-prediction head back."""
