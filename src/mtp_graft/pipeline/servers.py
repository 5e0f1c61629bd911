"""The servers of a run: one that records, and to measure, one for the base and one for every head.

Never two at a time: they would share the machine, and on a GPU the memory too. The base is measured
on a server of its own that differs from the heads' in the speculative config alone.
"""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

from mtp_graft.bench.decode import Report
from mtp_graft.pipeline.folder import RunFolder
from mtp_graft.recipe import Recipe
from mtp_graft.serving.client import COUNT_DRAFTS, ServerClient
from mtp_graft.serving.command import ServeOptions, find_vllm
from mtp_graft.serving.plan import adapt
from mtp_graft.serving.server import managed_server
from mtp_graft.serving.topology import hardware_for
from mtp_graft.stages.capture import CaptureConfig, recording_options


def capture_config(recipe: Recipe) -> CaptureConfig:
    """Return how the recipe wants the base to be captured."""
    wanted = recipe.capture
    return CaptureConfig(
        wanted.max_prompt_tokens, wanted.new_tokens, wanted.concurrency, wanted.max_model_len
    )


class Servers:
    """Starts servers as the recipe says and as the hardware needs.

    `adjusted` is what the hardware made of the options of the last one that was started.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, report: Report) -> None:
        self._recipe = recipe
        self._folder = folder
        self._report = report
        self._told: set[str] = set()
        self.adjusted: list[str] = []

    def recording(self, base: Path) -> AbstractContextManager[ServerClient]:
        """Serve the base so that it can be captured."""
        capture = self._folder.stage("capture")
        options = recording_options(base, capture, capture_config(self._recipe))
        return self._serving(options, "capture")

    def measured(
        self, checkpoint: Path, k: int | None, name: str
    ) -> AbstractContextManager[ServerClient]:
        """Serve a checkpoint to be measured, drafting `k` tokens a step (None: as `serve` does)."""
        bench, drafts = self._recipe.bench, k != 0
        options = ServeOptions(
            checkpoint,
            port=0,
            max_model_len=self._recipe.capture.max_model_len,
            max_num_seqs=self._recipe.capture.concurrency,
            prefix_caching=False,  # a prompt that comes again is computed again
            num_speculative_tokens=k,
            draft_lm_head_quantization=bench.draft_lm_head_quantization if drafts else None,
            draft_sample_method=bench.draft_sample_method if drafts else None,
            extra_args=COUNT_DRAFTS if drafts else (),
        )
        return self._serving(options, name)

    @contextmanager
    def _serving(self, options: ServeOptions, name: str) -> Iterator[ServerClient]:
        serve = self._recipe.serve
        options = replace(
            options,
            tensor_parallel_size=serve.tensor_parallel_size,
            kv_cache_gib=serve.kv_cache_gib,
            extra_args=(*options.extra_args, *serve.extra_args),
        )
        options, notes = adapt(options, hardware_for(find_vllm().platform))
        self._tell(notes)

        def on_start(elapsed_s: float, _line: str) -> None:
            self._report(f"{name}: starting vLLM, {elapsed_s:.0f} s", 0, 0)

        with managed_server(options, self._folder.log(name), on_start=on_start) as client:
            yield client

    def _tell(self, adjusted: list[str]) -> None:
        self.adjusted = adjusted
        for text in adjusted:
            if text not in self._told:
                print(f"serving: {text}", file=sys.stderr, flush=True)
        self._told.update(adjusted)
