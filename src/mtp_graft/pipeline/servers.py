"""The servers of a run: one that records, and to measure, one for the base and one for every head.

Never two at a time: they would share the machine, and on a GPU the memory too.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from mtp_graft.bench.requests import Report
from mtp_graft.pipeline.folder import RunFolder
from mtp_graft.recipe import Recipe
from mtp_graft.serving.client import COUNT_DRAFTS, ServerClient
from mtp_graft.serving.command import ServeOptions, find_vllm
from mtp_graft.serving.plan import adapt
from mtp_graft.serving.server import managed_server
from mtp_graft.serving.topology import hardware_for
from mtp_graft.stages.capture import recording_options


class Servers:
    """Starts servers as the recipe says and as the hardware needs.

    `adjusted` is what the hardware made of their options so far.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, report: Report) -> None:
        self._recipe = recipe
        self._folder = folder
        self._report = report
        self.adjusted: list[str] = []

    def log(self, name: str) -> Path:
        """Return where a server's output goes."""
        return self._folder.path / "logs" / f"vllm-{name}.log"

    def recording_options(self, checkpoint: Path) -> ServeOptions:
        """Return how the base is served to be captured."""
        return recording_options(checkpoint, self._folder.stage("capture"), self._recipe.capture)

    def measuring_options(self, checkpoint: Path, k: int | None) -> ServeOptions:
        """Return how a checkpoint is served to be measured.

        Base (`k` 0) and heads differ in the speculative config alone. On a CPU, where a start takes
        half a minute, all are served as the base is for its capture: one server does for both.
        """
        bench, drafts = self._recipe.bench, k != 0
        options = self.recording_options(checkpoint)
        if find_vllm().platform != "cpu":
            usual = ServeOptions(checkpoint)
            options = replace(
                options,
                record=None,
                max_num_batched_tokens=usual.max_num_batched_tokens,
                chunked_prefill=usual.chunked_prefill,
            )
        return replace(
            options,
            num_speculative_tokens=k,
            draft_lm_head_quantization=bench.draft_lm_head_quantization if drafts else None,
            draft_sample_method=bench.draft_sample_method if drafts else None,
            extra_args=COUNT_DRAFTS if drafts else (),
        )

    @contextmanager
    def serving(self, options: ServeOptions, name: str) -> Iterator[ServerClient]:
        """Serve inside the block; `name` tells the server's log from others."""
        serve = self._recipe.serve
        options = replace(
            options,
            tensor_parallel_size=serve.tensor_parallel_size,
            kv_cache_gib=serve.kv_cache_gib,
            extra_args=(*options.extra_args, *serve.extra_args),
        )
        options, notes = adapt(options, hardware_for(find_vllm().platform))
        for note in notes:
            if note not in self.adjusted:
                self.adjusted.append(note)
                print(f"serving: {note}", file=sys.stderr, flush=True)

        def on_start(elapsed_s: float) -> None:
            self._report(f"{name}: starting vLLM, {elapsed_s:.0f} s", 0, 0)

        with managed_server(options, self.log(name), on_start=on_start) as client:
            yield client
