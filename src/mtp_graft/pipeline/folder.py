"""The run folder: where each stage leaves what, what has been finished, and how long it took."""

import fcntl
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mtp_graft.checkpoint.files import write_json
from mtp_graft.checkpoint.manifest import read_result, write_manifest
from mtp_graft.errors import GraftError
from mtp_graft.pipeline.device import device_name
from mtp_graft.recipe import Recipe
from mtp_graft.stages.parallel import is_first_rank

STAGES = ("fetch", "capture", "quantize", "score", "splice", "verify", "bench", "report")
#: What is said of the run as a whole: its `format`, and the `seconds` of every stage.
_RUN_NAME = "run.json"
#: The version of mtp-graft that was the first to lay out run folders as they are now.
_FORMAT = "0.2"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Make the run folder and keep others out of it inside the block.

    Of torchrun's ranks, which work in it together, the first holds it for all. Raises GraftError if
    it cannot be made, or if another process works in it.
    """
    if not is_first_rank():
        yield
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("w")
    except OSError as error:
        raise GraftError(
            f"{path}: cannot be a run folder ({error.strerror}); use another --run"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GraftError(f"{path}: another mtp-graft works in this run folder") from None
        yield


class RunFolder:
    """The folder of one run of a recipe; raises GraftError for one of mtp-graft 0.1."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path = path
        self._name = recipe.model.name
        about = read_result(path / _RUN_NAME) or {"format": self._made_by()}
        self.seconds: dict[str, float] = about.get("seconds", {})
        if about["format"] != _FORMAT:
            raise GraftError(
                f"{path}: is a run folder of mtp-graft {about['format']}, expected {_FORMAT}; "
                "remove it or use another --run"
            )

    def _made_by(self) -> str:
        """Return what the stages' manifests say, for a folder that does not say it itself."""
        manifests = (read_result(self.stage(stage) / "manifest.json") for stage in STAGES)
        versions = (m.get("versions", {}).get("mtp-graft", _FORMAT) for m in manifests if m)
        return next((v for v in versions if v.startswith("0.1.")), _FORMAT)

    def stage(self, stage: str) -> Path:
        """Return the folder of a stage."""
        return self.path / stage

    def finished(self, stage: str) -> Path:
        """Return an earlier stage's folder; GraftError if it has not been finished."""
        folder = self.stage(stage)
        if not (folder / "manifest.json").exists():
            raise GraftError(f"{folder}: not finished; run `mtp-graft {stage}` first")
        return folder

    def checkpoint(self, variant: str) -> Path:
        """Return where the checkpoint with this head is, or will be."""
        return self.stage("splice") / variant / self._name

    def verified(self, variant: str) -> Path:
        """Return the file with what `verify` found in a checkpoint."""
        return self.stage("verify") / f"{variant}.json"

    def bench_unit(self, unit: str) -> Path:
        """Return the file of one measurement: `base`, `mtp` or `served-VARIANT`."""
        return self.stage("bench") / f"{unit}.json"

    def forget(self, stages: Sequence[str]) -> None:
        """Remove what the stages left, and the time they took."""
        for stage in stages:
            if self.stage(stage).exists():
                shutil.rmtree(self.stage(stage))
            self.seconds.pop(stage, None)
        self._write()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time inside to what earlier calls spent on the stage.

        Time that another stage takes inside is that one's alone.
        """
        self._write()  # before anything else: whose folder it is
        started, before = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            spent = time.perf_counter() - started - (sum(self.seconds.values()) - before)
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent
            self._write()

    def write_manifest(self, stage: str, config: Mapping[str, Any], inputs: Sequence[Path]) -> None:
        """Say how a stage came about that has no manifest of its own making."""
        write_manifest(self.stage(stage), stage, config, inputs, device_name(), self.seconds[stage])

    def _write(self) -> None:
        if is_first_rank():
            write_json({"format": _FORMAT, "seconds": self.seconds}, self.path / _RUN_NAME)
