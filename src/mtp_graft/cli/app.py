"""The Typer applications that commands register with, and options that several of them have."""

from pathlib import Path
from typing import Annotated

import typer

from mtp_graft.cli.help import MEASURE, SERVER, SectionedGroup
from mtp_graft.cli.output import check_writable
from mtp_graft.cli.versions import show_versions

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
SpeculativeOption = Annotated[
    int | None,
    typer.Option(
        *("--k", "-k", "--num-speculative-tokens"),
        min=0,
        metavar="N",
        rich_help_panel=SERVER,
        help="Tokens to draft a step; 0 leaves the head out. Default: 3 on GPUs, 1 on a CPU.",
    ),
]
DraftLmHeadOption = Annotated[
    str | None,
    typer.Option(
        "--draft-lm-head-quantization",
        metavar="TYPE",
        rich_help_panel=SERVER,
        help="fp8 or nvfp4: a smaller LM head for drafts, on GPUs.",
    ),
]
DraftSampleOption = Annotated[
    str | None,
    typer.Option(
        "--draft-sample-method",
        metavar="METHOD",
        rich_help_panel=SERVER,
        help="greedy or probabilistic, on GPUs. Default: probabilistic.",
    ),
]
TensorParallelOption = Annotated[
    int | None,
    typer.Option(
        "--tensor-parallel-size",
        "--tp",
        min=1,
        metavar="N",
        rich_help_panel=SERVER,
        help="Ranks to shard over. Default: 1; with a profile, as many GPUs as can be used.",
    ),
]
MaxModelLenOption = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", rich_help_panel=SERVER, help="Longest sequence. Default: the model's."
    ),
]


def flag_of(word: str) -> str:
    """Return a word of vLLM's command line without its value, spelled with dashes."""
    return word.partition("=")[0].replace("_", "-")


def _refuse_address(words: list[str] | None) -> list[str] | None:
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
        callback=_refuse_address,
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
