"""The CPU metadata builder answers for every layer type that the base class reads."""

import re
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="the builder belongs to vLLM: install the cpu extra")

from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("vLLM for another platform than the CPU", allow_module_level=True)

from vllm.models.deepseek_v4.cpu.cpu_mla import DeepseekV4CPUSparseSWAMetadataBuilder as Builder
from vllm.v1.attention.backends.mla import sparse_swa

from mtp_graft.vllm_plugin import tile_scheduler

pytestmark = pytest.mark.vllm


@pytest.fixture
def uninitialized_builder() -> Builder:
    return Builder.__new__(Builder)


def layer_types_read_by_the_base() -> set[str]:
    source = Path(sparse_swa.__file__).read_text(encoding="utf-8")
    constants = set(re.findall(r"tile_sched\[(\w+)\]", source))
    assert constants
    return {getattr(sparse_swa, constant) for constant in constants}


@pytest.mark.parametrize("num_decode_tokens", [0, 1, 8])
def test_every_layer_type_the_base_reads_has_no_plan(
    uninitialized_builder: Builder, num_decode_tokens: int
) -> None:
    tile_scheduler.apply()
    plans = uninitialized_builder.build_tile_scheduler(num_decode_tokens)
    assert plans.keys() >= layer_types_read_by_the_base()
    assert set(plans.values()) == {None}


def test_applying_again_changes_nothing() -> None:
    tile_scheduler.apply()
    before = Builder.build_tile_scheduler
    tile_scheduler.apply()
    assert Builder.build_tile_scheduler is before


def test_a_complete_builder_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a vLLM that has closed the gap by answering as the base class does."""
    monkeypatch.setattr(
        Builder,
        "build_tile_scheduler",
        sparse_swa.DeepseekSparseSWAMetadataBuilder.build_tile_scheduler,
    )
    tile_scheduler.apply()
    assert (
        Builder.build_tile_scheduler
        is sparse_swa.DeepseekSparseSWAMetadataBuilder.build_tile_scheduler
    )


def test_a_builder_that_forgets_a_layer_type_is_completed(
    monkeypatch: pytest.MonkeyPatch, uninitialized_builder: Builder
) -> None:
    def only_one(_self: Builder, _num_decode_tokens: int) -> dict[str, None]:
        return {"c4a": None}

    monkeypatch.setattr(Builder, "build_tile_scheduler", only_one)
    tile_scheduler.apply()
    assert uninitialized_builder.build_tile_scheduler(3).keys() >= layer_types_read_by_the_base()
