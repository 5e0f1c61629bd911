"""Options that several commands have, declared once: as the fields of a dataclass."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from functools import wraps
from inspect import Parameter
from typing import Any

Command = Callable[..., Any]


def grouped(command: Command) -> Command:
    """Replace a command's parameters that are dataclasses by their fields.

    The fields are options as any others, shown after the command's own; the command gets them as
    the dataclass that they make.
    """
    parameters = inspect.signature(command).parameters.values()
    groups: dict[str, Any] = {
        p.name: p.annotation for p in parameters if is_dataclass(p.annotation)
    }

    @wraps(command)
    def with_groups(**given: Any) -> None:
        for name, group in groups.items():
            fields = inspect.signature(group).parameters
            given[name] = group(**{field: given.pop(field) for field in fields})
        command(**given)

    def flattened() -> Iterator[Parameter]:
        for parameter in sorted(parameters, key=lambda p: p.name in groups):
            group = groups.get(parameter.name)
            options = inspect.signature(group).parameters.values() if group else [parameter]
            yield from (option.replace(kind=Parameter.KEYWORD_ONLY) for option in options)

    # Where Typer looks for what a command takes.
    with_groups.__signature__ = inspect.Signature([*flattened()])  # type: ignore[attr-defined]
    return with_groups
