"""The stages in order, meeting only on disk: read this first, then `run`.

    fetch      hub or folder          -> base checkpoint, upstream head
    capture    base served by vLLM    -> token ids, residual stream, the base's own next token
    quantize   capture + head         -> GPTQ's experts, errors of every variant
    score      capture + variants     -> offline acceptance, before anything is served
    splice     base + variants        -> checkpoints: hard links and one new shard each
    verify     checkpoints            -> every tensor accounted for and compared
    bench      checkpoints, served    -> acceptance of every variant, decode speed against the base
    report     all of it              -> Markdown and charts

A stage that is finished, and whose inputs are the same, returns what it found the first time.
Quantize and score run in processes of their own, so that a GPU is empty when vLLM starts. The base
is served twice, recording and then to be measured, and every variant once, which is also verify's
proof that vLLM loads it.
"""

from pathlib import Path

from mtp_graft.errors import GraftError
from mtp_graft.pipeline.run import STAGES, choose_stages, plan_run, run_pipeline, run_stage

__all__ = [
    "STAGES",
    "choose_stages",
    "find_bundled_recipe",
    "plan_run",
    "run_pipeline",
    "run_stage",
]

BUNDLED_RECIPE = Path("recipes/tiny.toml")


def find_bundled_recipe() -> Path:
    """Return the tiny model's recipe in the checkout we run from; GraftError outside of one."""
    path = Path(__file__).parents[3] / BUNDLED_RECIPE
    if not path.is_file():
        raise GraftError(
            f"{path}: not found; the tiny model is in the repository, not in the wheel: "
            "run from a checkout, or `mtp-graft run` a recipe of your own"
        )
    return path
