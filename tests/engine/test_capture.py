"""The capture on the real engine: the tiny base, served and recorded."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine.conftest import MAX_MARGIN
from mtp_graft.checkpoint import capture as files
from mtp_graft.checkpoint.shards import load_tensors
from mtp_graft.dsv4.names import split_experts
from mtp_graft.dsv4.variants import decode_head
from mtp_graft.recipe import CaptureSection
from mtp_graft.serving.client import Prompt
from mtp_graft.serving.server import managed_server
from mtp_graft.stages.capture import capture, recording_options

pytestmark = [pytest.mark.vllm, pytest.mark.serves, pytest.mark.slow]
NEW_TOKENS = 56
STREAMS = 4
TAPS = (1, 3)  # the last one is behind the last layer
NUM_PROMPTS = 6
QUESTION = "How many legs have 7 cows?"
EOS = 1


def wanted(tiny_model: Path, folder: Path, concurrency: int) -> CaptureSection:
    """Ask for five bundled prompts, and a conversation that the server has to encode."""
    chat = {"prompt_id": "chat", "messages": [{"role": "user", "content": QUESTION}]}
    (folder / "chat.jsonl").write_text(json.dumps(chat))
    sources = str(tiny_model / "calibration.jsonl"), str(folder / "chat.jsonl")
    counts = {"calibration_count": NUM_PROMPTS - 1, "evaluation_count": 1}
    more = {"max_prompt_tokens": 256, "new_tokens": NEW_TOKENS, "max_model_len": 1024}
    return CaptureSection(*sources, **counts, **more, concurrency=concurrency, taps=TAPS)


class Captures(NamedTuple):
    """Folders: one prompt in work at a time, and three; and the token ids of the conversation."""

    alone: Path
    together: Path
    conversation: list[int]


@pytest.fixture(scope="module")
def captures(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Captures:
    """Captures by one server, which records into a link that points to one folder after another."""
    folder, base = tmp_path_factory.mktemp("capture"), tiny_model / "base"
    link = folder / "link"
    options = recording_options(base, link, wanted(tiny_model, folder, 3))
    with managed_server(options, folder / "vllm.log") as client:
        for name, concurrency in (("alone", 1), ("together", 3)):
            (folder / name).mkdir()
            link.unlink(missing_ok=True)
            link.symlink_to(folder / name)
            settings = wanted(tiny_model, folder, concurrency)
            capture(nullcontext(client), base, folder / name, settings, lambda *_: None)
        text = f"<｜begin▁of▁sentence｜><｜User｜>{QUESTION}<｜Assistant｜></think>"
        conversation = client.encode(Prompt("text", text))
    return Captures(folder / "alone", folder / "together", list(conversation))


def captured(folder: Path) -> list[tuple[files.CapturedSequence, files.Recorded]]:
    return [(s, files.read_recorded(folder, s, STREAMS)) for s in files.read_sequences(folder)]


def test_what_is_recorded_does_not_depend_on_what_else_was_computed(captures: Captures) -> None:
    together, alone = captured(captures.together), captured(captures.alone)
    recordings = [len({s.recording for s, _ in each}) for each in (alone, together)]
    assert recordings[1] < recordings[0] == NUM_PROMPTS, "no two prompts came together"
    for (_, ours), (_, theirs) in zip(together, alone, strict=True):
        assert torch.equal(ours.token_ids, theirs.token_ids)
        assert torch.equal(ours.targets, theirs.targets)
        assert torch.equal(ours.residual, theirs.residual)
        assert ours.taps is not None and theirs.taps is not None
        assert torch.equal(ours.taps, theirs.taps)
        assert torch.equal(ours.taps[:, 1], ours.residual.mean(dim=1))


def test_targets_are_the_tokens_generated(captures: Captures, measured: dict[str, Any]) -> None:
    """A prompt's pass has other kernels than a token's, which shows where the base hesitates."""
    same = []
    for sequence, recorded in captured(captures.alone):
        generated = recorded.token_ids[sequence.prompt_tokens :]
        same.append(recorded.targets[sequence.prompt_tokens - 1 : -1] == generated)
    share = torch.cat(same).float().mean().item()
    measured.update(targets_as_generated=share)
    assert share > 0.97


def test_texts_end_where_the_base_ends_them_or_at_the_limit(captures: Captures) -> None:
    texts = files.read_texts(captures.alone)
    assert any(len(text.continuation) < NEW_TOKENS for text in texts)
    for text, (sequence, recorded) in zip(texts, captured(captures.alone), strict=True):
        tokens = text.continuation
        assert EOS not in tokens[:-1]
        assert len(tokens) == NEW_TOKENS or tokens[-1] == EOS
        assert tuple(recorded.token_ids[sequence.prompt_tokens :].tolist()) == tokens
    assert list(texts[-1].prompt) == captures.conversation, "encoded as bundled prompts are"


def load_oracle(folder: Path) -> Any:
    """Return transformers' DeepSeek-V4 in float32 with the weights of a base, eager attention."""
    settings = json.loads((folder / "config.json").read_text())
    del settings["quantization_config"], settings["architectures"]
    config = AutoConfig.for_model(**settings)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).float().eval()
    stored = load_tensors(folder)
    tables = {name: stored.pop(name) for name in list(stored) if name.endswith(".tid2eid")}
    weights = decode_head(stored) | tables
    for name, tensor in model.state_dict().items():
        for native, part in split_experts(name, tensor).items():  # parts are views
            part.copy_(weights.pop(native))
    assert not weights, f"tensors that transformers does not take: {list(weights)[:5]}"
    return model


def test_as_in_transformers(captures: Captures, tiny_model: Path, measured: dict[str, Any]) -> None:
    """Within what BF16 and the FP8 KV cache cost: a few percent of a token's norm.

    Tokens at which a router hesitates get another expert, and are further away: hence the quantile.
    Targets are compared where transformers' two best are more than half a nat apart.
    """
    model = load_oracle(tiny_model / "base")
    seen: list[torch.Tensor] = []
    model.model.hc_head.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    model.model.layers[TAPS[0]].register_forward_hook(lambda _module, _, out: seen.append(out))
    errors, agree, decided = [], [], []
    for _, recorded in captured(captures.together)[:4]:
        with torch.no_grad():
            logits = model(input_ids=recorded.token_ids[None]).logits[0]  # [T, vocabulary]
        best = logits.topk(2).values
        decided.append(best[:, 0] - best[:, 1] > MAX_MARGIN)
        agree.append(logits.argmax(-1) == recorded.targets)
        behind_tap, expected = (each[0] for each in seen)  # [T, S, D]
        seen.clear()
        assert recorded.taps is not None
        tap, mean = recorded.taps[:, 0].float(), behind_tap.mean(dim=1)  # [T, D]
        pairs = (recorded.residual.float().flatten(1), expected.flatten(1)), (tap, mean)
        errors.append(torch.stack([(a - b).norm(dim=1) / b.norm(dim=1) for a, b in pairs]))
    relative, at_tap = torch.cat(errors, dim=1)
    median, q95 = relative.median().item(), relative.quantile(0.95).item()
    assert at_tap.median() < 0.05 and at_tap.quantile(0.95) < 0.2
    sure = torch.cat(decided)
    share = torch.cat(agree)[sure].float().mean().item()
    measured.update(tokens=len(relative), median=median, q95=q95, argmax_equal=share)
    assert median < 0.05 and q95 < 0.2
    assert sure.float().mean() > 1 / 3, "hardly any token is decided; this says nothing"
    assert share >= 0.98
