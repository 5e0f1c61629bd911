"""The recorder's hooks, on a target that is a table: no engine."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pytest.importorskip("vllm", reason="the recorder reads vLLM's forward context: install an extra")

from mtp_graft.checkpoint.capture import INTACT_NAME, RECORD_VARIABLE, RECORDINGS, SWITCH_NAME
from mtp_graft.errors import GraftError
from mtp_graft.vllm_plugin import recording
from mtp_graft.vllm_plugin.cpu import steps
from mtp_graft.vllm_plugin.cpu.recording import record_on_demand
from mtp_graft.vllm_plugin.cuda import recording as v2
from mtp_graft.vllm_plugin.recording import make_recorder

pytestmark = pytest.mark.vllm

ROWS, HC_DIM, VOCAB = 16, 6, 11
Step = Callable[..., None]


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hc_head_fn = nn.Parameter(torch.zeros(2, HC_DIM))
        self._mtp_hidden_buffer: Tensor | None = None
        self.fills = True

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = torch.nn.functional.one_hot((input_ids * 3) % VOCAB, VOCAB).float()
        if self._mtp_hidden_buffer is not None and self.fills:
            self._mtp_hidden_buffer[: len(input_ids)] = input_ids[:, None].bfloat16() / 2
        return hidden


class Target(nn.Module):
    """Token t has the residual t / 2 and the target 3 t."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Inner()
        self.logit_rows: list[int] = []

    def compute_logits(self, hidden: Tensor) -> Tensor:
        self.logit_rows.append(len(hidden))
        return hidden

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        return self.model(input_ids)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A capture folder that the environment names, recording switched on."""
    (tmp_path / RECORDINGS).mkdir()
    (tmp_path / SWITCH_NAME).touch()
    monkeypatch.setenv(RECORD_VARIABLE, str(tmp_path))
    return tmp_path


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Which rank this is, and the requests of the step."""
    place = SimpleNamespace(last=True, rank=0, metadata=None)
    monkeypatch.setattr(recording, "get_pp_group", lambda: SimpleNamespace(is_last_rank=place.last))
    monkeypatch.setattr(recording, "get_tensor_model_parallel_rank", lambda: place.rank)
    context = lambda: SimpleNamespace(attn_metadata=place.metadata)  # noqa: E731
    monkeypatch.setattr(steps, "get_forward_context", context)
    return place


def vllm_config(data_parallel_size: int = 1) -> Any:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(data_parallel_size=data_parallel_size),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=ROWS),
        model_config=SimpleNamespace(dtype=torch.bfloat16),
    )


@pytest.fixture
def target(folder: Path, place: SimpleNamespace) -> Target:
    target = Target()
    record_on_demand(target, vllm_config())
    return target


@pytest.fixture
def step(target: Target, place: SimpleNamespace) -> Step:
    """Run one step of requests, each a list of (token, position), and some padding."""

    def run(*requests: list[tuple[int, int]], padding: int = 0) -> None:
        rows = [row for request in requests for row in request] + [(0, 0)] * padding
        bounds = torch.tensor([0, *(len(request) for request in requests)]).cumsum(0)
        # Padded requests repeat the last bound, as in vLLM's CUDA graphs.
        bounds = torch.cat([bounds, bounds[-1:].repeat(padding)])
        place.metadata = {
            "layers.0": SimpleNamespace(),
            "layers.1": SimpleNamespace(query_start_loc_cpu=bounds),
        }
        tokens, positions = torch.tensor(rows).T
        target(input_ids=tokens, positions=positions)

    return run


def prompt(*tokens: int, start: int = 0) -> list[tuple[int, int]]:
    return [(token, start + i) for i, token in enumerate(tokens)]


def recorded(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return every recording by its name."""
    return {p.name: load_file(p) for p in sorted((folder / RECORDINGS).glob("*.safetensors"))}


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write at once, in the caller's thread."""

    class Now:
        def __init__(self, *_: Any) -> None: ...

        def submit(self, work: Callable[..., None], *arguments: Any) -> Any:
            work(*arguments)
            return SimpleNamespace(result=lambda: None)

    monkeypatch.setattr(recording, "ThreadPoolExecutor", Now)


@pytest.fixture
def caplog_vllm(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> pytest.LogCaptureFixture:
    """What is logged under vLLM's logger, which does not pass it on to the root's."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    return caplog


def test_whole_prompts_of_a_step_lie_one_after_the_other(
    written: None, step: Step, folder: Path
) -> None:
    """Decode steps, later chunks of a prompt and padding are left out."""
    step(prompt(9, start=40), prompt(4, 5), prompt(6, 7, start=2), prompt(8), padding=3)
    (found,) = recorded(folder).values()
    assert {name: str(tensor.dtype) for name, tensor in found.items()} == {
        "token_ids": "torch.int32",
        "residual": "torch.bfloat16",
        "targets": "torch.int32",
        "starts": "torch.int32",
    }
    assert found["token_ids"].tolist() == [4, 5, 8]
    assert found["starts"].tolist() == [0, 2]
    assert found["residual"].tolist() == [[t / 2] * HC_DIM for t in (4, 5, 8)]
    assert found["targets"].tolist() == [3 * t % VOCAB for t in (4, 5, 8)]


def test_nothing_is_written_without_prompts_or_with_the_switch_off(
    written: None, step: Step, target: Target, place: SimpleNamespace, folder: Path
) -> None:
    step(prompt(9, start=40))
    place.metadata = None  # vLLM's own runs to measure memory and warm up
    target(input_ids=torch.tensor([1, 2]), positions=torch.tensor([0, 1]))
    (folder / SWITCH_NAME).unlink()
    step(prompt(4, 5))
    assert recorded(folder) == {}
    (folder / SWITCH_NAME).touch()
    step(prompt(6))
    assert [found["token_ids"].tolist() for found in recorded(folder).values()] == [[6]]


def test_earlier_recordings_are_kept_and_new_ones_written_in_the_background(
    step: Step, folder: Path
) -> None:
    earlier = folder / RECORDINGS / "000041.safetensors"
    save_file({"kept": torch.zeros(1)}, earlier)
    for token in (4, 5, 6):
        step(prompt(token, token))  # overwrites what the step before left in the buffer
    end = time.monotonic() + 10
    while len(recorded(folder)) < 4 and time.monotonic() < end:
        time.sleep(0.01)
    found = recorded(folder)
    assert list(found) == [f"0000{n}.safetensors" for n in (41, 42, 43, 44)]
    assert "kept" in found.pop(earlier.name)
    assert [f["token_ids"].tolist() for f in found.values()] == [[t, t] for t in (4, 5, 6)]
    assert [f["residual"][0, 0].item() for f in found.values()] == [2, 2.5, 3]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), GraftError("the disk is full")])
def test_a_failed_write_is_told_the_client_and_does_not_end_the_server(
    error: Exception,
    written: None,
    step: Step,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog_vllm: pytest.LogCaptureFixture,
) -> None:
    def refuse(*_: Any) -> None:
        raise error

    (folder / INTACT_NAME).touch()
    step(prompt(4))
    assert (folder / INTACT_NAME).exists()
    with monkeypatch.context() as patched:
        patched.setattr(recording, "save_shard", refuse)
        step(prompt(5))
    assert not (folder / INTACT_NAME).exists()
    assert str(error) in caplog_vllm.text, "the log says why"
    step(prompt(6))
    assert [rows["token_ids"].tolist() for rows in recorded(folder).values()] == [[4], [6]]


def test_a_residual_that_the_graph_did_not_write_is_not_finite(
    written: None, step: Step, target: Target, folder: Path
) -> None:
    step(prompt(4))
    target.model.fills = False
    step(prompt(5))
    first, second = recorded(folder).values()
    assert first["residual"].isfinite().all()
    assert second["residual"].isnan().all()


def test_only_the_first_rank_of_the_last_stage_writes(
    written: None, folder: Path, place: SimpleNamespace
) -> None:
    place.rank = 1
    helping = Target()
    record_on_demand(helping, vllm_config())
    bounds = torch.tensor([0, 2])
    place.metadata = {"layers.0": SimpleNamespace(query_start_loc_cpu=bounds)}
    helping(input_ids=torch.tensor([4, 5]), positions=torch.tensor([0, 1]))
    assert helping.logit_rows == [2], "all ranks have to compute the logits"
    place.last = False
    record_on_demand(earlier_stage := Target(), vllm_config())
    assert earlier_stage.model._mtp_hidden_buffer is None and not earlier_stage._forward_hooks
    assert recorded(folder) == {}


def test_without_the_variable_nothing_changes(
    place: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(RECORD_VARIABLE, raising=False)
    target = Target()
    record_on_demand(target, vllm_config())
    assert target.model._mtp_hidden_buffer is None
    assert not target._forward_hooks


def test_what_cannot_be_recorded_is_refused(
    folder: Path, target: Target, place: SimpleNamespace
) -> None:
    with pytest.raises(GraftError, match="data parallel size 2, expected 1"):
        record_on_demand(Target(), vllm_config(data_parallel_size=2))
    for metadata in ([{}], {"layers.0": SimpleNamespace()}):
        place.metadata = metadata
        with pytest.raises(GraftError, match=r"micro-batches|query_start_loc_cpu"):
            target(input_ids=torch.tensor([4]), positions=torch.tensor([0]))


@pytest.fixture
def step_v2(folder: Path, place: SimpleNamespace) -> Step:
    """Run one step of the V2 runner: requests are (tokens, already computed, prompt's length)."""
    target = Target()
    recorder = make_recorder(target, vllm_config())
    assert recorder is not None
    sampled: list[Any] = []

    def take(_runner: Any, grammar: Any) -> None:
        buffer = target.model._mtp_hidden_buffer
        assert buffer is not None
        assert grammar is None or buffer[:1].isfinite().all(), "a drafter reads it now"
        sampled.append(grammar)

    sample = v2.recording_first(take, recorder)

    def run(*requests: tuple[list[int], int, int], padding: int = 0) -> None:
        ids = torch.tensor([t for tokens, _, _ in requests for t in tokens] + [0] * padding)
        ends = np.cumsum([0, *(len(tokens) for tokens, _, _ in requests)])
        batch = SimpleNamespace(
            input_ids=ids,
            num_reqs=len(requests),
            query_start_loc_np=np.append(ends, ends[-1:].repeat(padding)),
            num_computed_tokens_np=np.array([computed for _, computed, _ in requests]),
            prefill_len_np=np.array([length for _, _, length in requests]),
        )
        state = SimpleNamespace(input_batch=batch, hidden_states=target.model(ids))
        sample(SimpleNamespace(execute_model_state=state), "grammar")
        assert sampled.pop() == "grammar"
        sample(SimpleNamespace(execute_model_state=None), None)  # nothing was computed
        sampled.clear()

    return run


def test_v2_records_prompts_that_a_step_holds_whole(
    written: None, step_v2: Step, folder: Path
) -> None:
    decode, chunk, rest = ([9], 40, 12), ([1, 2, 3], 0, 5), ([4, 5], 3, 5)
    step_v2(decode, ([4, 5], 0, 2), chunk, rest, ([8], 0, 1), padding=3)
    (rows,) = recorded(folder).values()
    assert rows["token_ids"].tolist() == [4, 5, 8]
    assert rows["starts"].tolist() == [0, 2]
    assert rows["residual"][:, 0].tolist() == [2, 2.5, 4]
    assert rows["targets"].tolist() == [3 * t % VOCAB for t in (4, 5, 8)]
