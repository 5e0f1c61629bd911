"""The Typer applications that commands register with, and options that several of them have."""

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from mtp_graft.cli.grouped import field_option
from mtp_graft.cli.help import MEASURE, SectionedGroup
from mtp_graft.cli.output import check_writable
from mtp_graft.cli.versions import show_versions
from mtp_graft.serving.command import ServeOptions

app = typer.Typer(
    cls=SectionedGroup,
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
bench = typer.Typer(
    cls=SectionedGroup,
    rich_markup_mode=None,
    help="Measure how fast a server is, or how good its answers are.",
    no_args_is_help=True,
)
app.add_typer(bench, name="bench", rich_help_panel=MEASURE)

#: In the place of a profile: what vLLM does by itself.
NO_PROFILE = "none"

JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        callback=check_writable,
        help="Write the result as JSON; - for standard output.",
    ),
]


def _server_option(name: str) -> Any:
    fields: dict[str, FieldInfo] = ServeOptions.__pydantic_fields__  # type: ignore[attr-defined]
    return field_option(fields[name])


SpeculativeOption = Annotated[int | None, _server_option("num_speculative_tokens")]
DraftLmHeadOption = Annotated[str | None, _server_option("draft_lm_head_quantization")]
DraftSampleOption = Annotated[str | None, _server_option("draft_sample_method")]
TensorParallelOption = Annotated[int | None, _server_option("tensor_parallel_size")]
MaxModelLenOption = Annotated[int | None, _server_option("max_model_len")]


def flag_of(word: str) -> str:
    """Return a word of vLLM's command line without its value, spelled with dashes."""
    return word.partition("=")[0].replace("_", "-")


def refuse_address(words: list[str] | None) -> list[str] | None:
    """Refuse what would have the server listen, or ask for a key, behind our back."""
    for word in words or ():
        flag = flag_of(word)
        if flag in ("--host", "--port", "--uds", "--api-key"):
            raise typer.BadParameter(
                f"{flag} after --: vLLM would listen elsewhere than it is asked; where "
                "mtp-graft has the option, give it before the --"
            )
    return words


ServeArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="ARGS",
        help="After --: arguments for vllm serve, as they are.",
        callback=refuse_address,
    ),
]


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=show_versions,
            is_eager=True,
            help="Show the versions of mtp-graft, vLLM and torch.",
        ),
    ] = False,
) -> None:
    """Give a quantized DeepSeek-V4 its multi-token-prediction head back."""
