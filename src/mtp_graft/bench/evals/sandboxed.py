"""What runs inside the sandbox: a generated program in one process, its tests in another.

The two share nothing but two pipes. Plain values cross them and are built anew on the tests' side,
so whatever a program replaces in its own process (`__eq__`, builtins, `sys.exit`), it passes only
if it returns what the tests expect. Standard library only: an isolated Python runs this source.
"""

import json
import os
import resource
import sys
from typing import IO, Any

_MAX_MESSAGE_BYTES = 2**24
_KINDS = (dict, list, tuple, set, frozenset, bytes)
_MAKERS: dict[str, Any] = {kind.__name__: kind for kind in _KINDS} | {"iterator": iter}


class Failed(Exception):
    """The program raised, or its process ended; `kind` is the exception's name."""

    def __init__(self, kind: Any, message: Any) -> None:
        super().__init__(str(message)[:300])
        self.kind = kind if isinstance(kind, str) and kind.isidentifier() else "Exception"


def encode(value: Any) -> Any:
    """Return a plain value as JSON with tags, a subclass as the type that it extends."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    for kind in _KINDS:
        if isinstance(value, kind):
            items = value.items() if isinstance(value, dict) else value
            return {kind.__name__: [encode(item) for item in items]}
    if hasattr(value, "__iter__"):  # equal to no list, but it can be made one
        return {"iterator": [encode(item) for item in value]}
    raise TypeError(f"a {type(value).__name__} cannot leave its process")


def decode(value: Any) -> Any:
    """Return the value of what `encode` gave; raises ValueError for anything else."""
    if not isinstance(value, (dict, list)):
        return value
    if not isinstance(value, dict) or len(value) != 1 or not value.keys() <= _MAKERS.keys():
        raise ValueError("not an encoded value")
    [(tag, items)] = value.items()
    return _MAKERS[tag]([decode(item) for item in items])


def send(stream: IO[bytes], message: Any) -> None:
    """Write one message."""
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """Return the next message. Raises EOFError at the end, ValueError for what is none."""
    line = stream.readline(_MAX_MESSAGE_BYTES)
    if not line:
        raise EOFError("the process ended without an answer")
    return json.loads(line)


def run_program(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Load a program, then call its function as often as asked."""
    names: dict[str, Any] = {"__name__": "program"}
    while True:
        request = receive(requests)
        try:
            if "source" in request:
                exec(compile(request["source"], "<program>", "exec"), names)
                function = eval(request["function"], names)  # a NameError if it has another name
                answer = {}
            else:
                args, kwargs = decode(request["args"]), decode(request["kwargs"])
                value = function(*args, **kwargs)
                answer = {"value": encode(value), "args": encode(args)}
        except BaseException as error:  # SystemExit and KeyboardInterrupt are answers, too
            answer = {"raised": type(error).__name__, "message": str(error)}
        send(answers, answer)


def run_tests(task: dict[str, Any], requests: IO[bytes], answers: IO[bytes]) -> list[str] | None:
    """Run the tests against the program in the other process; return what failed, or None."""

    def ask(request: dict[str, Any]) -> Any:
        try:
            send(requests, request)
            answer = receive(answers)
        except (BrokenPipeError, EOFError) as error:
            raise Failed("ProcessEnded", error) from None
        if "raised" in answer:
            raise Failed(answer["raised"], answer.get("message"))
        return answer

    def candidate(*args: Any, **kwargs: Any) -> Any:
        answer = ask({"args": encode(args), "kwargs": encode(kwargs)})
        for before, after in zip(args, decode(answer["args"]), strict=True):
            if type(before) is type(after) and isinstance(before, (list, dict, set)):
                before.clear()  # changed in place there, so here, too
                (before.extend if isinstance(before, list) else before.update)(after)
        return decode(answer["value"])

    names: dict[str, Any] = {"__name__": "tests"}
    try:
        # The prompt's own helpers; its unfinished function is replaced by the candidate.
        exec(compile(task["prompt"], "<prompt>", "exec"), names)
        names[task["entry_point"]] = candidate
        exec(compile(task["test"], "<tests>", "exec"), names)
        ask({"source": task["program"], "function": task["entry_point"]})
        names["check"](candidate)
    except BaseException as error:
        return [error.kind if isinstance(error, Failed) else type(error).__name__, str(error)]
    return None


def main(role: str, cpu_s: int) -> None:
    """Limit this process, then play `role`: program or tests."""
    limits = {"CPU": cpu_s, "AS": 2**30, "NOFILE": 64, "NPROC": 1}  # no other process or thread
    limits |= dict.fromkeys(("FSIZE", "CORE", "MEMLOCK", "MSGQUEUE"), 0)  # FSIZE in memory, too
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    sys.set_int_max_str_digits(0)
    inward, outward = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # what the code prints goes nowhere
        os.dup2(null, stream)
    if role == "program":
        run_program(inward, outward)
    task = receive(inward)
    with os.fdopen(task["requests"], "wb") as requests, os.fdopen(task["answers"], "rb") as answers:
        send(outward, run_tests(task, requests, answers))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
