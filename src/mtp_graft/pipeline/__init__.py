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
        cure = "run from a checkout, or `mtp-graft run` a recipe of your own"
        raise GraftError(f"{path}: not found, as the wheel has no tiny model: {cure}")
    return path
