"""Options that several commands have, declared once: as the fields of a dataclass."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from functools import wraps
from inspect import Parameter
from typing import Annotated, Any, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from mtp_graft.cli.help import SERVER

Command = Callable[..., Any]


def grouped(command: Command) -> Command:
    """Replace a command's parameters that are dataclasses by their fields.

    The fields are options as any others, shown after the command's own; the command gets them as
    the dataclass that they make. Of a pydantic dataclass, those with a description are options.
    """
    parameters = inspect.signature(command).parameters.values()
    groups: dict[str, Any] = {
        p.name: p.annotation for p in parameters if is_dataclass(p.annotation)
    }

    @wraps(command)
    def with_groups(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = _made(group, {p.name: given.pop(p.name) for p in _parameters(group)})
        command(**given)

    def flattened() -> Iterator[Parameter]:
        for parameter in sorted(parameters, key=lambda p: p.name in groups):
            group = groups.get(parameter.name)
            options = _parameters(group) if group else [parameter]
            yield from (option.replace(kind=Parameter.KEYWORD_ONLY) for option in options)

    # Where Typer looks for what a command takes.
    with_groups.__signature__ = inspect.Signature([*flattened()])  # type: ignore[attr-defined]
    return with_groups


def _parameters(group: Any) -> list[Parameter]:
    """Return what Typer is to parse for a group."""
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
    """Return a pydantic field as an option of a server, or as an argument."""
    assert isinstance(field.json_schema_extra, dict)
    settings: dict[str, Any] = {"help": field.description, **field.json_schema_extra}
    names = settings.pop("names")
    if names is None:
        return typer.Argument(**settings)
    for limit in field.metadata:
        bounds = {"min": getattr(limit, "ge", None), "max": getattr(limit, "le", None)}
        settings |= {name: bound for name, bound in bounds.items() if bound is not None}
    return typer.Option(*names, rich_help_panel=SERVER, **settings)


def _made(group: Any, given: dict[str, Any]) -> Any:
    """Return the dataclass; what a field does not allow is wrong usage."""
    try:
        return group(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        names = field_option(group.__pydantic_fields__[first["loc"][0]]).param_decls
        flag = names[0] if names else f"--{first['loc'][0]}".replace("_", "-")
        raise typer.BadParameter(first["msg"], param_hint=flag) from None
