"""What runs inside a jail: the code under test in one, the tests in another.

The two processes share nothing but a pipe. `candidate` executes the generated program and answers
calls; `checker` executes the dataset's tests, whose candidate function sends its arguments over.
Only plain values cross, and the checker builds them anew, so whatever the generated code replaces
in its own process (`__eq__`, `sys.exit`, builtins, our functions), the checker compares with values
and functions of its own. All that a program can do to pass is to return what the tests expect.

Standard library only: the jail runs this file without site-packages.
"""

import json
import os
import re
import sys
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import IO, Any

#: The longest message between the two; larger values count as a failure of the candidate.
MAX_MESSAGE_BYTES = 2**24
MAX_TEXT = 300
_KIND = re.compile(r"[A-Za-z_]\w{0,63}", re.ASCII)


class Foreign:
    """A value that cannot cross: it equals nothing, but its items can be looked through."""

    def __init__(self, type_name: str, items: list[Any] | None) -> None:
        self.type_name = type_name
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        if self._items is None:
            raise TypeError(f"{self.type_name!r} object is not iterable")
        return iter(self._items)


class Raised(Exception):
    """The candidate raised, or its process ended."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def encode(value: Any) -> Any:
    """Return a value as JSON with tags; `decode` is its inverse for plain Python values.

    A subclass crosses as the type it extends: a Counter as the dictionary that it equals.
    """
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return {"int": hex(int(value))}
    if isinstance(value, float):
        return {"float": float(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytearray" if isinstance(value, bytearray) else "bytes": value.hex()}
    if isinstance(value, (Decimal, Fraction)):
        return {"Decimal" if isinstance(value, Decimal) else "Fraction": str(value)}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[encode(k), encode(v)] for k, v in value.items()]}
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item) for item in value]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    items = [encode(item) for item in value] if hasattr(value, "__iter__") else None
    return {"foreign": [type(value).__name__, items]}


def decode(value: Any) -> Any:
    """Return the value of what `encode` gave; raises ValueError for anything else."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError("not an encoded value")
    [(tag, content)] = value.items()
    if tag in _SCALARS:
        return _SCALARS[tag](content)
    if tag in _COLLECTIONS:
        return _COLLECTIONS[tag](decode(item) for item in content)
    if tag == "dict":
        return {decode(key): decode(item) for key, item in content}
    if tag == "foreign":
        name, items = content
        return Foreign(str(name), None if items is None else decode(items))
    raise ValueError(f"not an encoded value: {tag!r}")


_SCALARS: dict[str, Any] = {
    "int": lambda text: int(text, 16),
    "float": float.fromhex,
    "complex": lambda parts: complex(*map(float.fromhex, parts)),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "Decimal": Decimal,
    "Fraction": Fraction,
    "range": lambda parts: range(*parts),
}
_COLLECTIONS: dict[str, Any] = {"tuple": tuple, "set": set, "frozenset": frozenset}


def send(stream: IO[bytes], message: Any) -> None:
    """Write one message."""
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """Return the next message; None at the end. Raises ValueError for what is none."""
    line = stream.readline(MAX_MESSAGE_BYTES)
    if not line:
        return None
    if not line.endswith(b"\n"):
        raise ValueError("a message that is cut off or too long")
    return json.loads(line)


def main(role: str, null: int) -> None:
    """Play `role`: candidate, checker, or ready (say that the jail holds)."""
    asked, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(null, 0)
    os.dup2(null, 1)  # what the code prints goes nowhere
    if role == "candidate":
        _answer_calls(asked, answers)
    elif role == "checker":
        task = receive(asked)
        with os.fdopen(task["calls"], "wb") as calls, os.fdopen(task["results"], "rb") as results:
            send(answers, _check(task, calls, results))
    else:
        send(answers, "ready")


def _answer_calls(asked: IO[bytes], answers: IO[bytes]) -> None:
    """Load a program, then call its function as often as asked, until the checker ends."""
    names: dict[str, Any] = {"__name__": "candidate"}
    program = receive(asked)
    while (call := receive(asked)) is not None:
        try:
            if program is not None:
                source, program = program["source"], None
                exec(compile(source, "<program>", "exec"), names)
            function = _named(names, call["function"])
            if "args" not in call:
                answer: dict[str, Any] = {"value": None}
            else:
                args, kwargs = decode(call["args"]), decode(call["kwargs"])
                value = encode(function(*args, **kwargs))
                answer = {"value": value, "args": encode(args)}
        except BaseException as error:  # SystemExit and KeyboardInterrupt are answers too
            answer = {"raised": type(error).__name__, "message": _text(error)}
        send(answers, answer)


def _named(names: dict[str, Any], name: str) -> Any:
    if name not in names:
        raise NameError(f"name {name!r} is not defined")
    return names[name]


def _text(error: BaseException) -> str:
    try:
        return str(error)[:MAX_TEXT]
    except Exception:  # generated code may raise in its own __str__; the type's name is kept
        return ""


def _check(task: dict[str, Any], calls: IO[bytes], results: IO[bytes]) -> dict[str, Any]:
    """Run the tests against the other process; return the verdict."""

    def ask(call: dict[str, Any]) -> dict[str, Any]:
        try:
            send(calls, call)
            answer = receive(results)
        except BrokenPipeError:
            answer = None
        except (ValueError, RecursionError) as error:
            raise Raised("ValueError", f"unreadable answer: {error}") from None
        if answer is None:
            raise Raised("ProcessEnded", "the process ended without an answer")
        if not isinstance(answer, dict) or "raised" in answer:
            raise _raised(answer)
        return answer

    def candidate(*args: Any, **kwargs: Any) -> Any:
        call = {"function": task["entry_point"], "args": encode(list(args))}
        answer = ask({**call, "kwargs": encode(kwargs)})
        try:
            value, after = decode(answer["value"]), decode(answer["args"])
            _copy_changes(args, after)
        except Exception as error:
            raise Raised("ValueError", f"unreadable answer: {error!r}") from None
        return value

    try:
        # The prompt's own helpers; its unfinished function is replaced by the candidate.
        names: dict[str, Any] = {"__name__": "tests"}
        exec(compile(task["prompt"], "<prompt>", "exec"), names)
        names[task["entry_point"]] = candidate
        exec(compile(task["tests"], "<tests>", "exec"), names)
        send(calls, {"source": task["program"]})
        ask({"function": task["entry_point"]})
        names["check"](candidate)
    except Raised as error:
        return {"passed": False, "kind": error.kind, "message": str(error)}
    except BaseException as error:
        return {"passed": False, "kind": type(error).__name__, "message": _text(error)}
    return {"passed": True, "kind": None, "message": ""}


def _raised(answer: Any) -> Raised:
    """Return the error that an answer tells of; a made-up name must not look like another."""
    kind = answer.get("raised") if isinstance(answer, dict) else None
    if not isinstance(kind, str) or not _KIND.fullmatch(kind):
        kind = "Exception"
    message = answer.get("message") if isinstance(answer, dict) else None
    return Raised(kind, message[:MAX_TEXT] if isinstance(message, str) else "")


def _copy_changes(args: tuple[Any, ...], after: Any) -> None:
    """Let arguments that the candidate changed in place be changed here as well."""
    if not isinstance(after, list) or len(after) != len(args):
        raise ValueError("arguments are missing")
    for before, now in zip(args, after, strict=True):
        if isinstance(before, list) and isinstance(now, list):
            before[:] = now
        elif isinstance(before, (dict, set)) and type(before) is type(now):
            before.clear()
            before.update(now)


if __name__ == "__main__":
    sys.exit("this file runs inside a jail; see jail.py")
