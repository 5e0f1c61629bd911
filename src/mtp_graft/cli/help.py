"""Help in sections, as plain text: rich's tables cut long names of options at 80 columns."""

from collections.abc import Iterable
from typing import Any

from typer.core import TyperCommand, TyperGroup

Row = tuple[str, str]

PIPELINE, SERVE, MEASURE, PUBLISH = "Pipeline", "Serve", "Measure", "Publish"
SPEED, QUALITY = "Speed", "Quality"
#: The sections of options: a command's own, those of a server (ours or not), and of its machine.
OPTIONS, SERVER, HARDWARE = "Options", "Server", "Hardware"
_ORDER = (
    *(PIPELINE, SERVE, MEASURE, PUBLISH, SPEED, QUALITY),
    *("Arguments", OPTIONS, SERVER, HARDWARE),
)


class SectionedCommand(TyperCommand):
    """A command whose options are shown by their `rich_help_panel`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and options."""
        rows = []
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                default = "Arguments" if param.param_type_name == "argument" else OPTIONS
                rows.append((getattr(param, "rich_help_panel", None) or default, record))
        _write_sections(rows, formatter)


class SectionedGroup(TyperGroup):
    """A group whose commands are shown by their `rich_help_panel`, each with its first sentence."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands."""
        rows = []
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            rows.append((command.rich_help_panel, (name, command.get_short_help_str(limit=200))))
        _write_sections(rows, formatter)


def _write_sections(rows: Iterable[tuple[str, Row]], formatter: Any) -> None:
    sections: dict[str, list[Row]] = {name: [] for name in _ORDER}
    for section, row in rows:
        sections[section].append(row)
    for section, section_rows in sections.items():
        if section_rows:
            with formatter.section(section):
                formatter.write_dl(section_rows, col_max=34)
