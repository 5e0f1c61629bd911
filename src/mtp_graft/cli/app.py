"""The Typer applications that commands register with, and options that several of them have."""

import inspect
from collections.abc import Callable, Collection
from dataclasses import is_dataclass
from functools import wraps
from inspect import Parameter
from typing import Any

import typer

from mtp_graft.cli.output import check_writable
from mtp_graft.serving.command import argument, option

# Plain text: rich's tables cut long names of options at 80 columns.
_PLAIN: dict[str, Any] = {"rich_markup_mode": None, "no_args_is_help": True}
app = typer.Typer(**_PLAIN, pretty_exceptions_enable=False, add_completion=False)
bench = typer.Typer(**_PLAIN, help="Measure how fast a server is, or how good its answers are.")
app.add_typer(bench, name="bench")

#: In the place of a profile: what vLLM does by itself.
NO_PROFILE = "none"
#: Options of vLLM with which it would listen, or ask for a key, behind our back.
ADDRESS_FLAGS = {"--host", "--port", "--uds", "--api-key"}


def with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Let Typer parse the options of each `option_group` that a command takes."""
    groups: dict[str, Any] = {}
    parsed: list[Parameter] = []
    own = inspect.signature(command).parameters  # go before a group's of the same name
    for name, parameter in own.items():
        if is_dataclass(parameter.annotation):
            groups[name] = parameter.annotation
            parsed += [p for p in groups[name].__declared__ if p.name not in own]
        else:
            parsed.append(parameter.replace(kind=Parameter.KEYWORD_ONLY))

    @wraps(command)
    def flat(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{p.name: given[p.name] for p in group.__declared__})
        command(**{name: given[name] for name in own})

    # Where Typer looks for what a command takes.
    flat.__signature__ = inspect.Signature(parsed)  # type: ignore[attr-defined]
    return flat


def refuse(words: Collection[str] | None, flags: set[str]) -> Collection[str] | None:
    """Return arguments for vLLM, which must have none of `flags` and ADDRESS_FLAGS."""
    for flag in (word.partition("=")[0].replace("_", "-") for word in words or ()):
        if flag in flags | ADDRESS_FLAGS:
            cure = "if it has an option for it, give that before the --"
            raise typer.BadParameter(f"{flag} after --: mtp-graft decides it; {cure}")
    return words


_JSON_HELP = "Write the result as JSON; - for standard output."
JSON_FILE = option(None, "FILE", _JSON_HELP, "--json", callback=check_writable)
DRY_RUN = option(False, None, "Print what would be done.", "--dry-run")
_ARGS_HELP = "After --: arguments for vllm serve, as they are."
SERVE_ARGUMENTS = argument("ARGS", _ARGS_HELP, (), callback=lambda words: refuse(words, set()))


def _show_versions(wanted: bool) -> None:
    if wanted:
        from mtp_graft.checkpoint.manifest import package_versions  # takes seconds to import

        for package, version in package_versions().items():
            print(package, version)
        raise typer.Exit


_VERSION_HELP = "Show the versions of mtp-graft, vLLM and what else decides a result."
_VERSION = option(False, None, _VERSION_HELP, "--version", callback=_show_versions, is_eager=True)


@app.callback()
def _root(version: bool = _VERSION) -> None:
    """Give a quantized DeepSeek-V4 its multi-token-prediction head back."""
