"""The recorder in vLLM's V2 runner, on a target that is a table: no engine.

`engine/test_capture.py` has it in the V1 runner, on a CPU, writing in the background.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("vllm", reason="the recorder reads vLLM's forward context: install an extra")

from mtp_graft.checkpoint import capture
from mtp_graft.checkpoint.capture import INTACT_NAME, RECORDINGS, SWITCH_NAME
from mtp_graft.errors import GraftError
from mtp_graft.vllm_plugin import cuda as v2
from mtp_graft.vllm_plugin import recording
from mtp_graft.vllm_plugin.cpu import recording as v1
from mtp_graft.vllm_plugin.recording import make_recorder

pytestmark = pytest.mark.vllm
MAX_TOKENS, STREAMS, HC_DIM, VOCAB = 16, 2, 6, 11


class Target(torch.nn.Module):
    """Writes half a token's id into the buffer; three times the id is the best next token.

    The mean of its streams after layer l is the id plus l.
    """

    start_layer, end_layer = 2, 9

    def __init__(self) -> None:
        super().__init__()
        self.aux: tuple[int, ...] = ()
        self.hc_head_fn = torch.zeros(STREAMS, HC_DIM)
        self._mtp_hidden_buffer: Tensor | None = None
        self.fills = True
        self.num_logits = 0

    @property
    def model(self) -> "Target":
        return self

    def set_aux_hidden_state_layers(self, layers: tuple[int, ...]) -> None:
        self.aux = layers

    def forward(self, input_ids: Tensor) -> Tensor | tuple[Tensor, list[Tensor]]:
        if self._mtp_hidden_buffer is not None and self.fills:
            self._mtp_hidden_buffer[: len(input_ids)] = input_ids[:, None].bfloat16() / 2
        hidden = torch.nn.functional.one_hot((input_ids * 3) % VOCAB, VOCAB).float()
        column = input_ids[:, None].bfloat16().expand(-1, HC_DIM // STREAMS)
        return (hidden, [column + layer - 1 for layer in self.aux]) if self.aux else hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        self.num_logits += len(hidden)
        return hidden


def at_once(work: Callable[..., None], *arguments: Any) -> Any:
    """In place of a thread's `submit`."""
    work(*arguments)
    return SimpleNamespace(result=lambda: None)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A capture folder that the environment names, recording switched on."""
    (tmp_path / RECORDINGS).mkdir()
    for name in (SWITCH_NAME, INTACT_NAME):
        (tmp_path / name).touch()
    monkeypatch.setenv(capture.RECORD_VARIABLE, str(tmp_path))
    monkeypatch.setattr(recording, "ThreadPoolExecutor", lambda *_: SimpleNamespace(submit=at_once))
    return tmp_path


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    place = SimpleNamespace(is_last_rank=True, rank=0)
    monkeypatch.setattr(recording, "get_pp_group", lambda: place)
    monkeypatch.setattr(recording, "get_tensor_model_parallel_rank", lambda: place.rank)
    return place


def vllm_config(data_parallel_size: int = 1) -> Any:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(data_parallel_size=data_parallel_size),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=MAX_TOKENS),
        model_config=SimpleNamespace(dtype=torch.bfloat16),
    )


Request = tuple[list[int], int, int]  # its tokens of this step, tokens before, prompt's length


class Runner:
    """Computes steps as CUDA graphs are replayed, without hooks, and samples."""

    def __init__(self) -> None:
        self.target = Target()
        recorder = make_recorder(self.target, vllm_config())
        assert recorder is not None

        def sample(_runner: Runner, grammar: Any) -> str:
            buffer = self.target._mtp_hidden_buffer
            if grammar is not None and self.target.fills:
                assert buffer is not None and buffer[:1].isfinite().all(), "a drafter reads it now"
            return "sampled"

        self.sample = v2.recording_first(sample, recorder)

    def step(self, *requests: Request, padding: int = 0) -> None:
        ids = torch.tensor([t for tokens, _, _ in requests for t in tokens] + [0] * padding)
        ends = np.cumsum([0, *(len(tokens) for tokens, _, _ in requests)])
        batch = SimpleNamespace(
            input_ids=ids,
            num_reqs=len(requests),
            query_start_loc_np=np.append(ends, ends[-1:].repeat(padding)),
            num_computed_tokens_np=np.array([computed for _, computed, _ in requests]),
            prefill_len_np=np.array([length for _, _, length in requests]),
        )
        state = SimpleNamespace(input_batch=batch, hidden_states=self.target(ids))
        for computed in (state, None):
            now = SimpleNamespace(execute_model_state=computed)
            assert self.sample(now, computed and "grammar") == "sampled"


@pytest.fixture
def runner(folder: Path) -> Runner:
    return Runner()


def prompt(*tokens: int) -> Request:
    return [*tokens], 0, len(tokens)


def recorded(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {p.name: load_file(p) for p in sorted((folder / RECORDINGS).glob("*.safetensors"))}


def tokens_in(folder: Path) -> list[list[int]]:
    return [found["token_ids"].tolist() for found in recorded(folder).values()]


def test_whole_prompts_of_a_step_lie_one_after_the_other(runner: Runner, folder: Path) -> None:
    """Decode steps, chunks of a prompt and padding are left out."""
    chunks = ([1, 2, 3], 0, 5), ([6, 7], 2, 4)
    runner.step(([9], 40, 12), prompt(4, 5), *chunks, prompt(8), padding=3)
    (found,) = recorded(folder).values()
    expected = {
        "token_ids": torch.tensor([4, 5, 8], dtype=torch.int32),
        "residual": torch.tensor([4, 5, 8]).bfloat16()[:, None].expand(3, HC_DIM) / 2,
        "targets": torch.tensor([12, 15, 24], dtype=torch.int32) % VOCAB,
        "starts": torch.tensor([0, 2], dtype=torch.int32),
    }
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_only_prompts_are_recorded_while_the_switch_is_on(runner: Runner, folder: Path) -> None:
    runner.step(([9], 40, 12))
    (folder / SWITCH_NAME).unlink()
    runner.step(prompt(4, 5))
    (folder / SWITCH_NAME).touch()
    runner.step(prompt(6))
    assert tokens_in(folder) == [[6]]


def test_earlier_recordings_are_kept(runner: Runner, folder: Path) -> None:
    save_file({"token_ids": torch.zeros(1)}, folder / RECORDINGS / "000041.safetensors")
    for token in (4, 5, 6):
        runner.step(prompt(token, token))
    assert list(recorded(folder)) == [f"0000{n}.safetensors" for n in (41, 42, 43, 44)]
    assert tokens_in(folder) == [[0], [4, 4], [5, 5], [6, 6]]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), GraftError("the disk is full")])
def test_a_failed_write_is_told_the_client_and_does_not_end_the_server(
    error: Any, runner: Runner, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    runner.step(prompt(4))
    assert (folder / INTACT_NAME).exists()
    with monkeypatch.context() as patched:
        patched.setattr(recording, "save_shard", Mock(side_effect=error))
        runner.step(prompt(5))
    assert not (folder / INTACT_NAME).exists()
    assert str(error) in caplog.text, "the log says why"
    runner.step(prompt(6))
    assert tokens_in(folder) == [[4], [6]]


def test_taps_are_recorded_layer_by_layer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(capture.TAPS_VARIABLE, "3,7")
    runner = Runner()
    runner.step(([9], 40, 12), prompt(4, 5), padding=2)
    (found,) = recorded(folder).values()
    assert found["taps"].tolist() == [[7.0] * 3 + [11.0] * 3, [8.0] * 3 + [12.0] * 3]
    assert found["targets"].tolist() == [12 % VOCAB, 15 % VOCAB], "the runner gets no taps"
    monkeypatch.setenv(capture.TAPS_VARIABLE, "3,9")
    with pytest.raises(GraftError, match=r"layers \[3, 9\], expected of 2 to 8"):
        Runner()


def test_a_residual_that_no_graph_wrote_is_not_finite(runner: Runner, folder: Path) -> None:
    runner.step(prompt(4))
    runner.target.fills = False
    runner.step(prompt(5))
    first, second = recorded(folder).values()
    assert first["residual"].isfinite().all() and second["residual"].isnan().all()


def test_only_one_rank_writes(folder: Path, place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    place.rank = 1
    helping = Runner()
    helping.step(prompt(4, 5))
    assert helping.target.num_logits == 2, "all ranks have to compute the logits"
    assert recorded(folder) == {}
    place.is_last_rank = False
    assert make_recorder(Target(), vllm_config()) is None
    place.is_last_rank = True
    with pytest.raises(GraftError, match="data parallel size 2, expected 1"):
        make_recorder(Target(), vllm_config(data_parallel_size=2))
    monkeypatch.delenv(capture.RECORD_VARIABLE)
    assert make_recorder(Target(), vllm_config()) is None


def test_a_step_whose_requests_are_not_told_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(attn_metadata={"layers.0": SimpleNamespace()})
    monkeypatch.setattr(v1, "get_forward_context", lambda: context)
    with pytest.raises(GraftError, match="query_start_loc_cpu"):
        v1.request_bounds()
