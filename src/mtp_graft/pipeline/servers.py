"""The servers of a run: the base's, which several stages share, and one for every head.

Never two at a time: they would share the machine, and on a GPU the memory too.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

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
    """Starts servers as the recipe says and as the hardware needs; its `with` block ends them."""

    def __init__(self, recipe: Recipe, folder: RunFolder, report: Report) -> None:
        self._recipe = recipe
        self._folder = folder
        self._report = report
        self._base: ExitStack | None = None
        self._client: ServerClient | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop_base()

    def base_client(self, base: Path) -> ServerClient:
        """Return a client of the base's server, which starts when it is first needed."""
        if self._client is None:
            with ExitStack() as starting:
                options = recording_options(
                    base, self._folder.stage("capture"), capture_config(self._recipe)
                )
                self._client = starting.enter_context(self._managed(options, "base"))
                self._base = starting.pop_all()
        return self._client

    def stop_base(self) -> None:
        """Stop the base's server if it runs."""
        running, self._base, self._client = self._base, None, None
        if running is not None:
            running.close()

    @contextmanager
    def serving(self, variant: str) -> Iterator[ServerClient]:
        """Serve a spliced checkpoint as the base was served, with drafts."""
        self.stop_base()
        options = replace(
            recording_options(
                self._folder.checkpoint(variant),
                self._folder.stage("capture"),
                capture_config(self._recipe),
            ),
            record=None,
            num_speculative_tokens=self._recipe.bench.num_speculative_tokens,
            extra_args=COUNT_DRAFTS,
        )
        with self._managed(options, variant) as client:
            yield client

    @contextmanager
    def _managed(self, options: ServeOptions, name: str) -> Iterator[ServerClient]:
        serve = self._recipe.serve
        options = replace(
            options,
            tensor_parallel_size=serve.tensor_parallel_size,
            kv_cache_gib=serve.kv_cache_gib,
            extra_args=(*options.extra_args, *serve.extra_args),
        )
        vllm = find_vllm()
        options, _notes = adapt(options, hardware_for(vllm.platform), vllm)

        def on_start(elapsed_s: float, _line: str) -> None:
            self._report(f"{name}: starting vLLM, {elapsed_s:.0f} s", 0, 0)

        with managed_server(options, self._folder.log(name), on_start=on_start) as client:
            yield client
