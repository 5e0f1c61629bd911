"""Numbers that know where they come from.

A result file is read as a `Node`, which remembers its file and its place in it. A node has no text:
the only way to show its value is `Citations.show`, which writes down what was shown and from where.
So a number cannot get into the card without its trace getting into `card.json`.
"""

from collections.abc import Iterator
from typing import Any, NoReturn

from mtp_graft.bench.card.styles import STYLES
from mtp_graft.errors import GraftError

#: In place of a pointer where the number is a file's size.
SIZE_POINTER = "#size"


class Node:
    """A value in a result file, with the file's name and the JSON pointer (RFC 6901) to it."""

    def __init__(self, file: str, value: Any, pointer: str = "") -> None:
        self.file = file
        self.value = value
        self.pointer = pointer

    def __getitem__(self, key: str | int) -> "Node":
        try:
            value = self.value[key]
        except (KeyError, IndexError, TypeError):
            raise GraftError(
                f"{self.file}: has no {self._below(key)}; it is not a result of this version of "
                "mtp-graft: remove it and measure again"
            ) from None
        return Node(self.file, value, self._below(key))

    def get(self, key: str) -> "Node | None":
        """Return what is below `key`; None if there is nothing, or null."""
        found = self.value.get(key) if isinstance(self.value, dict) else None
        return None if found is None else Node(self.file, found, self._below(key))

    def __iter__(self) -> Iterator["Node"]:
        """Go through a list's items."""
        return (self[number] for number in range(len(self.value)))

    def items(self) -> Iterator[tuple[str, "Node"]]:
        """Go through an object's keys and values."""
        return ((key, self[key]) for key in self.value)

    def __format__(self, _spec: str = "") -> NoReturn:
        raise TypeError(f"{self.file}{self.pointer}: show it through Citations")

    __str__ = __format__

    def _below(self, key: str | int) -> str:
        escaped = str(key).replace("~", "~0").replace("/", "~1")
        return f"{self.pointer}/{escaped}"


class Cited(str):
    """A text that was shown by `Citations`, with the files that it comes from."""

    files: tuple[str, ...]


class Name(str):
    """A text that may have digits in it and is no number: a profile, a tensor, a file."""


class Citations:
    """Everything that was shown, in order, each text with its origin once."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Any, ...], dict[str, Any]] = {}

    def show(self, style: str, *nodes: Node) -> Cited:
        """Return the nodes' values written in a style, and remember where they come from."""
        try:
            shown = Cited(STYLES[style].write(*(node.value for node in nodes)))
        except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            where = ", ".join(f"{node.file}{node.pointer}" for node in nodes)
            raise GraftError(
                f"{where}: cannot be shown as {style} ({error}); remove the file and measure again"
            ) from error
        shown.files = tuple(dict.fromkeys(map(_source, nodes)))
        origins = tuple((node.file, node.pointer) for node in nodes)
        entry = {
            "shown": str(shown),
            "style": style,
            "from": [{"file": file, "pointer": pointer} for file, pointer in origins],
        }
        self._entries.setdefault((shown, style, origins), entry)
        return shown

    def as_json(self) -> dict[str, Any]:
        """Return `numbers`, and what the styles mean; letters are the origins in their order."""
        used = {entry["style"] for entry in self._entries.values()}
        return {
            "styles": {name: style.how for name, style in STYLES.items() if name in used},
            "numbers": list(self._entries.values()),
        }


def _source(node: Node) -> str:
    """Return what a table names as its source: a file, or the folder whose files have that size."""
    return f"{node.file.rpartition('/')[0]}/" if node.pointer == SIZE_POINTER else node.file
