"""A run of a recipe: its folder, what each stage left there, and how long it took."""

import fcntl
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

from mtp_graft.checkpoint.files import write_json
from mtp_graft.checkpoint.manifest import expect_this_version, read_result
from mtp_graft.checkpoint.quant_manifest import MANIFEST_NAME
from mtp_graft.errors import GraftError, translated
from mtp_graft.pipeline import STAGES
from mtp_graft.recipe import CaptureSection, Recipe
from mtp_graft.stages.capture import with_taps
from mtp_graft.stages.fetch import FetchedModels, fetch
from mtp_graft.stages.inputs import HEALED, Progress


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Make the run folder and keep others out of it inside the block; GraftError if it cannot."""
    with translated(f"{path}: cannot be a run folder", OSError, then="; use another --run"):
        expect_this_version(path)
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GraftError(f"{path}: another mtp-graft works in this run folder") from None
        yield


@dataclass
class Run:
    """A recipe, the folder it is run in, and the stages to do, of those that the recipe has."""

    recipe: Recipe
    path: Path
    stages: Sequence[str] = STAGES
    report: Progress = lambda _label, _done, _total: None
    adjusted: list[str] = field(default_factory=list)  # what the hardware made of servers' options
    _timed: tuple[str | None, float] = None, 0.0  # the stage in work, and since when
    _lock: Lock = field(default_factory=Lock)  # downloads report from threads

    def __post_init__(self) -> None:
        if self.recipe.heal is None:
            self.stages = [stage for stage in self.stages if stage != "heal"]
            if not self.stages:
                raise GraftError("heal: the recipe has no section [heal]; add one, it may be empty")

    @cached_property
    def seconds(self) -> dict[str, float]:
        """What each stage has taken so far."""
        return (self.result("run") or {}).get("seconds", {})

    @cached_property
    def models(self) -> FetchedModels:
        """The folders of base and upstream, fetched if they are on the hub."""
        return fetch(self.recipe.model, self.path / "fetch", self.progress)

    @cached_property
    def capture(self) -> CaptureSection:
        """What to capture: with the taps that upstream's drafter reads."""
        return with_taps(self.recipe.capture, self.models.upstream)

    @property
    def upstream(self) -> Path:
        """The master that the head comes from: a healed one that is kept, else the fetched one.

        GraftError if the recipe has it healed and that is not finished.
        """
        healed = self.result("heal/report") if self.recipe.heal and self.finished("heal") else None
        return self.path / "heal" / HEALED if healed and healed["kept"] else self.models.upstream

    def finished(self, stage: str) -> Path:
        """Return an earlier stage's folder; GraftError if it has not been finished."""
        folder = self.path / stage
        if not (folder / "manifest.json").exists():
            raise GraftError(f"{folder}: not finished; run `mtp-graft {stage}` first")
        return folder

    def result(self, name: str) -> dict[str, Any] | None:
        """Return what was found, such as `score/report`, `verify/gptq`; None if nothing yet."""
        return read_result(self.path / f"{name}.json")

    def keep(self, name: str, result: Mapping[str, Any]) -> None:
        """Write what `result` will return."""
        path = self.path / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        write_json(result, path)

    def checkpoint(self, variant: str) -> Path:
        """Return where the checkpoint with this head is, or will be."""
        return self.path / "splice" / variant / self.recipe.model.name

    @property
    def manifests(self) -> list[Path]:
        """The checkpoints' manifests, which have the hashes of all their tensors."""
        return [self.checkpoint(v) / MANIFEST_NAME for v in self.recipe.served_variants]

    def forget(self) -> None:
        """Remove what the stages to do have left, and the time they took."""
        for stage in self.stages:
            if (self.path / stage).exists():
                shutil.rmtree(self.path / stage)
            self.seconds.pop(stage, None)
        self.keep("run", {"seconds": self.seconds})

    def progress(self, label: str, done: int, total: int) -> None:
        """Report progress, and keep the time so far: a killed call's counts, too."""
        stage, since = self._timed
        if time.perf_counter() - since > 1:
            self._time(stage)
        self.report(label, done, total)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time inside to the stage's, but for that which another stage takes inside."""
        outer = self._time(stage)
        try:
            yield
        finally:
            self._time(outer)

    def _time(self, stage: str | None) -> str | None:
        """Count the time from now on as the stage's; return the one that had it so far."""
        with self._lock:
            (before, since), now = self._timed, time.perf_counter()
            self._timed = stage, now
            if before is not None:
                self.seconds[before] = self.seconds.get(before, 0.0) + now - since
                self.keep("run", {"seconds": self.seconds})
        return before
