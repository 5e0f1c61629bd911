"""The pipeline: stages in order that meet on disk, in a run folder. Read `run` first."""

from pathlib import Path

from mtp_graft.errors import GraftError, UsageError

STAGES = ("fetch", "capture", "quantize", "score", "splice", "verify", "bench", "report")


def find_bundled_recipe() -> Path:
    """Return the tiny model's recipe in the checkout we run from; GraftError outside of one."""
    path = Path(__file__).parents[3] / "recipes/tiny.toml"
    if not path.is_file():
        raise GraftError(
            f"{path}: not found; the tiny model is in the repository, not in the wheel: "
            "run from a checkout, or `mtp-graft run` a recipe of your own"
        )
    return path


def choose_stages(only: str | None = None, start: str | None = None) -> tuple[str, ...]:
    """Return the stages that `--only` or `--from` name; UsageError for both, or unknown ones."""
    if only is not None and start is not None:  # together they would remove what --only names
        raise UsageError("--only and --from together: expected one of them")
    name = only or start or STAGES[0]
    if name not in STAGES:
        raise UsageError(f"{name!r} is no stage; expected one of {', '.join(STAGES)}")
    return (only,) if only is not None else STAGES[STAGES.index(name) :]
