"""The card's tables: every cell with a digit in it is cited, and the files are named below."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mtp_graft.bench import markdown
from mtp_graft.bench.card.cite import Cited, Name


@dataclass(frozen=True)
class Table:
    """A Markdown table; `align` has l or r for every column.

    A cell is a text without digits, a `Cited`, or a `Name`; anything else is a mistake of ours.
    """

    heading: Sequence[str]
    rows: Sequence[Sequence[str]]
    align: str
    files: Sequence[str] = field(default=())

    def __post_init__(self) -> None:
        for row in self.rows:
            assert len(row) == len(self.heading) == len(self.align), row
            for cell in row:
                assert isinstance(cell, Cited | Name) or not any(map(str.isdigit, cell)), cell
        found = (file for row in self.rows for cell in row for file in getattr(cell, "files", ()))
        object.__setattr__(self, "files", tuple(dict.fromkeys(found)))

    def __str__(self) -> str:
        return f"{markdown.table(self.heading, self.rows, self.align)}\n\n{self._source()}"

    def _source(self) -> str:
        shown = [f"`{file}`" for file in self.files if not file.startswith("package:")]
        return f"<sub>From {', '.join(shown)}.</sub>" if shown else ""


@dataclass(frozen=True)
class Block:
    """Part of a section: on what it was measured, pictures, a table, remarks."""

    table: Table
    measured_on: str = ""
    pictures: Sequence[str] = ()  # Markdown
    remarks: Sequence[str] = ()

    def __iter__(self) -> Iterator[str]:
        """Yield the block's parts that there are, as Markdown."""
        if self.measured_on:
            yield self.measured_on
        yield from self.pictures
        yield str(self.table)
        if self.remarks:
            yield markdown.bullets(self.remarks)
