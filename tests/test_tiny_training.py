"""The parts of the tiny model's training that can be wrong without the loss showing it."""

import copy
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mtp_graft.quant import fp8_block, int4, mxfp4

TINY = Path(__file__).parents[1] / "models" / "tiny-dsv4"
CONFIG = TINY / "make" / "config.json"


@pytest.fixture(scope="module", autouse=True)
def scripts_importable() -> Iterator[None]:
    sys.path.insert(0, str(TINY / "make"))
    yield
    sys.path.remove(str(TINY / "make"))


@pytest.fixture(scope="module")
def weight() -> Tensor:
    torch.manual_seed(0)
    weight = torch.randn(3, 200, 256)
    weight[0, 0, :128] = 0
    weight[1] = (weight[1] * 4).round() / 4  # many ties
    weight[2] *= torch.logspace(-12, 6, 200)[:, None]
    return weight


def test_fake_quantization_equals_storing_and_reading_back(weight: Tensor) -> None:
    import fake_quant

    part = weight[2, :, :200]  # no whole number of FP8's blocks either way
    for fake, stored_as, original, scale in (
        (fake_quant.int4, int4, weight, int4.group_scale(weight, 128)),
        (fake_quant.mxfp4, mxfp4, weight, mxfp4.group_scale(weight)),
        (fake_quant.fp8_bf16_scale, fp8_block, part, fp8_block.block_scale(part)),
        (fake_quant.fp8_power_of_two_scale, fp8_block, part, fp8_block.power_of_two_scale(part)),
    ):
        stored = stored_as.decode(stored_as.encode(original, scale), scale)
        assert torch.equal(fake(original), stored), fake.__name__


def test_fake_quantization_passes_the_gradient_on(weight: Tensor) -> None:
    import fake_quant

    leaf = weight.clone().requires_grad_()
    quantized = fake_quant.straight_through(leaf, fake_quant.int4)
    assert torch.equal(quantized, fake_quant.int4(weight))
    (quantized * 3).sum().backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, torch.full_like(weight, 3.0))


@pytest.mark.slow
def test_training_forward_equals_transformers() -> None:
    """Substituted weights, own mask, skipped block selection, grouped experts: nothing differs."""
    import model as tiny
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4ForCausalLM

    model = tiny.TinyModel(CONFIG, "grouped_mm", dropout=0.0).eval()
    tiny.initialize(model, torch.ones(4096), seed=0)
    ids = torch.randint(3, 4096, (2, 150), generator=torch.Generator().manual_seed(1))
    plain = DeepseekV4ForCausalLM._from_config(
        copy.deepcopy(model.base.config),
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()
    plain.load_state_dict(model.base.state_dict())
    with torch.no_grad():
        logits, residual = model.run_base(model.base_weights(quantize=False), ids)
        expected = plain(ids, use_cache=False).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        again = plain.lm_head(plain.model.norm(plain.model.hc_head(residual)))
        torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)


def test_hash_routing_is_distinct_and_balanced_by_traffic() -> None:
    import model as tiny

    generator = torch.Generator().manual_seed(0)
    counts = (10_000 / torch.arange(1, 4097)).long()  # as words are distributed
    experts = tiny.balanced_experts(counts, 6, generator=generator)
    assert experts.shape == (4096, 6)
    assert all(len(set(row)) == 6 for row in experts.tolist())
    load = torch.zeros(64)
    for column in experts.T:
        load.index_add_(0, column, counts.float())
    # The few most frequent tokens alone outweigh an average expert; the rest evens out.
    assert load.median() / load.mean() > 0.9
    assert (load > 0).all()


def test_rows_start_with_a_document_and_are_full() -> None:
    import data

    rows = list(data.pack([[1, 2, 3], [4, 5], [6, 7, 8, 9], [10]], length=4))
    assert rows == [[1, 2, 3, 4], [6, 7, 8, 9]]


def test_changed_numbers_keep_their_length_and_the_text() -> None:
    import data

    text = "Tom has 10 apples and 305 pears at $2."
    changed = data.change_numbers(text, random.Random(1))
    assert changed != text
    shape = "".join("#" if char.isdigit() else char for char in changed)
    assert shape == "Tom has ## apples and ### pears at $#."
    numbers = [word.strip("$.") for word in changed.split() if word.strip("$.").isdigit()]
    assert not any(number.startswith("0") for number in numbers)


def test_distinct_ngrams_tell_loops_from_text() -> None:
    import evaluate

    assert evaluate.distinct_ngrams([list(range(20))]) == 1.0
    assert evaluate.distinct_ngrams([[5] * 20]) == pytest.approx(1 / 17)
