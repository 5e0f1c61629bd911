"""The pipeline: stages in order that meet on disk, in a run folder. Read `run` first."""

from pathlib import Path
from typing import Literal, get_args

from mtp_graft.errors import GraftError

Stage = Literal[
    "fetch", "capture", "quantize", "heal", "score", "splice", "verify", "bench", "report"
]
STAGES: tuple[Stage, ...] = get_args(Stage)


def find_bundled_recipe() -> Path:
    """Return the tiny model's recipe in the checkout we run from; GraftError outside of one."""
    path = Path(__file__).parents[3] / "recipes/tiny.toml"
    if not path.is_file():
        raise GraftError(
            f"{path}: not found; the tiny model is in the repository, not in the wheel: "
            "run from a checkout, or `mtp-graft run` a recipe of your own"
        )
    return path
