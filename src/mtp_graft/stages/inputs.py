"""What the stages read: a head's tensors, a base's config, and a capture, checked when opened.

Shapes: T tokens of a sequence, S hyper-connection streams, D hidden size, V vocabulary.
"""

import logging
import re
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from mtp_graft.checkpoint import capture as capture_files
from mtp_graft.checkpoint import manifest
from mtp_graft.checkpoint.capture import CapturedSequence, Recorded, read_recorded, read_sequences
from mtp_graft.checkpoint.files import read_object, write_json
from mtp_graft.checkpoint.shards import INDEX_NAME, Shard, load_tensors, read_index, read_meta
from mtp_graft.dsv4.config import DSparkDimensions, check_dimensions, num_stages
from mtp_graft.dsv4.names import HEAD_COPIES, find_drafter, head_shapes, storage_dtype
from mtp_graft.dsv4.variants import decode_head, store_head
from mtp_graft.errors import GraftError, translated
from mtp_graft.recipe import Variant
from mtp_graft.serving.command import read_config

if TYPE_CHECKING:  # importing transformers' models takes seconds, and few stages need one
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

_warn_once = cache(logging.getLogger(__name__).warning)

Progress = Callable[[str, int, int], None]  # label, units done, units in all
Json = Mapping[str, Any]

#: Names that others have for a master's tensors.
_BIAS, _SCALE = map(re.compile, (r"\.gate\.e_score_correction_bias$", r"\.weight_scale(_inv)?$"))
REPORT_NAME = "report.json"
GPTQ = "gptq"  # of the quantize stage's folder, the part with the experts
HEALED = "upstream"  # of the heal stage's folder, the trained head as a master
#: The splits of a capture: what experts are calibrated on, and what heads are scored on.
CALIBRATION, EVALUATION = "calibration", "evaluation"


@dataclass(frozen=True)
class Tensors:
    """Tensors by name: the file that holds each, and its shape and dtype as a meta tensor."""

    files: Mapping[str, Path] = field(default_factory=dict)
    meta: Mapping[str, Tensor] = field(default_factory=dict)
    stored: Mapping[str, str] = field(default_factory=dict)  # name -> what its file calls it

    @classmethod
    def in_files(cls, paths: Iterable[Path]) -> Self:
        """Return all tensors of some shards."""
        files: dict[str, Path] = {}
        meta: dict[str, Tensor] = {}
        for path in paths:
            with Shard(path) as shard:
                meta |= shard.meta
                files |= dict.fromkeys(shard.meta, path)
        return cls(files, meta)

    @contextmanager
    def opened(self) -> Iterator["Values"]:
        """Open the files inside the block."""
        with ExitStack() as stack:
            shards = {path: stack.enter_context(Shard(path)) for path in set(self.files.values())}
            read = {name: shards[path].read for name, path in self.files.items()}
            yield Values({n: partial(read[n], [self.stored.get(n, n)]) for n in read})

    @contextmanager
    def named(self) -> Iterator[None]:
        """Let an error inside that is about one of the modules begin with its file."""
        try:
            yield
        except GraftError as error:
            module = str(error).partition(":")[0]
            file = next((self.files[n] for n in self.files if n.startswith(module)), None)
            if file is None:
                raise
            raise GraftError(f"{file}: {error}") from error


class Values(UserDict[str, Any]):
    """Tensors by name; `data` has what reads each from its open file when it is asked for."""

    def __getitem__(self, name: str) -> Tensor:
        (tensor,) = self.data[name]().values()
        return tensor


def read_master(upstream: Path) -> Tensors:
    """Return an upstream master's drafter without copies of the target's; GraftError if none."""
    shards = read_index(upstream, "mtp.")
    right = {name: _SCALE.sub(".scale", _BIAS.sub(".gate.bias", name)) for name in shards}
    stored = {name if new in shards else new: name for name, new in right.items()}
    names = [n for n in find_drafter(stored, upstream).names if n not in HEAD_COPIES]
    if copies := sorted(HEAD_COPIES & shards.keys()):
        _warn_once("%s: left out; drafts take embedding and LM head of the base", ", ".join(copies))
    meta = read_meta(upstream, "mtp.", complete=True)
    files = {name: upstream / shards[stored[name]] for name in names}
    return Tensors(files, {name: meta[stored[name]] for name in names}, stored)


def drafter_config(upstream: Path, head: Iterable[str]) -> dict[str, Any]:
    """Return what config.json says of a DSpark drafter (MTP: nothing); GraftError without."""
    kind, stages, _ = find_drafter(head, upstream)
    if kind == "mtp":
        return {}
    path = upstream / "config.json"
    given = check_dimensions(read_object(path, "a drafter's config"), path, dspark=True)
    # vLLM infers from the base's layers whether a block's rows see later ones: they always do.
    said = given.model_dump(include={*DSparkDimensions.__annotations__})
    return {**said, "n_mtp_layers": stages, "is_causal": False}


def check_head(upstream: Path, head: Tensors, config: Json, group_size: int = 128) -> None:
    """Raise GraftError for a head whose decoded tensors are not those that `config` asks for."""
    expected = head_shapes(config)
    with head.named():
        decoded = decode_head(head.meta, group_size=group_size)
    found = {name: tuple(tensor.shape) for name, tensor in decoded.items()}
    wrong = [n for n in {**expected, **found} if expected.get(n) != found.get(n)]
    if wrong:
        ours, theirs = (list(each.get(wrong[0], ())) or "none" for each in (found, expected))
        said = f"{wrong[0]} is {ours}, expected {theirs} by the base's config.json"
        why = "base and upstream are different models, or a shard is damaged: fetch it again"
        raise GraftError(f"{upstream}: {said} ({len(wrong)} of the {len(expected)} differ); {why}")
    for name, tensor in head.meta.items():
        right = storage_dtype(name)
        if tensor.dtype == torch.float16 or tensor.dtype != right == torch.float32:
            raise GraftError(f"{upstream}: {name} is {tensor.dtype}, expected {right}")


def expert_files(quantized: Path | None) -> list[Path]:
    """Return the files of GPTQ's experts in the stage's folder; GraftError if there are none."""
    files = sorted((quantized / GPTQ).glob("experts-*.safetensors")) if quantized else []
    if not files:
        where = quantized / GPTQ if quantized else "variant gptq"
        raise GraftError(f"{where}: no quantized experts; run `mtp-graft quantize`, or omit it")
    return files


@dataclass(frozen=True)
class Inputs:
    """A capture's sequences of one split, the base that it is of, and upstream's head."""

    capture: Path
    upstream: Path
    base: Path
    model: "DeepseekV4Config"
    head: Tensors
    stages: int  # of a DSpark drafter; 0: it is an MTP head
    sequences: list[CapturedSequence]
    files: list[Path]  # all that a stage's result depends on

    def calibration_rows(self, sequence: CapturedSequence) -> int:
        """Return how many inputs a sequence gives the experts of a stage."""
        if not self.stages:  # a head, which reads all tokens with a successor
            return sequence.calibration_tokens
        return self.model.dspark_block_size * max(0, sequence.tokens - 1 - sequence.prompt_tokens)

    def claim(self, out: Path, decisive: Json, *also: Path) -> dict[str, Any] | None:
        """Make `out` a stage's folder or raise GraftError; return its result if finished."""
        found = manifest.fingerprints([*self.files, *also])
        manifest.claim_folder(out, {**decisive, "inputs": found})
        return manifest.finished_result(out, REPORT_NAME)

    def finish(self, out: Path, stage: str, config: Json, result: Json, seconds: float) -> None:
        """Write a stage's result and its manifest, which has the files that name all others."""
        write_json(result, out / REPORT_NAME)
        inputs = [self.capture / capture_files.INDEX_NAME]
        inputs += [folder / INDEX_NAME for folder in (self.upstream, self.base)]
        manifest.write_manifest(out, stage, config, inputs, config["device"], seconds)

    def read_upstream(self, names: list[str], device: str = "cpu") -> dict[str, Tensor]:
        """Read some of upstream's tensors to `device`."""
        pinned = device != "cpu"
        stored = [self.head.stored.get(name, name) for name in names]
        tensors = load_tensors(self.upstream, stored, pinned=pinned).values()
        on_device = (tensor.to(device, non_blocking=pinned) for tensor in tensors)
        return dict(zip(names, on_device, strict=True))

    def store(self, variant: Variant, experts: Iterable[Path], **how: Any) -> dict[str, Tensor]:
        """Return `store_head` of all of upstream's head and of GPTQ's `experts` in some files."""
        with self.head.named(), Tensors.in_files(experts).opened() as gptq:
            return store_head(self.read_upstream([*self.head.files]), variant, gptq, **how)

    def read_sequence(self, sequence: CapturedSequence, device: str = "cpu") -> Recorded:
        """Return what was recorded, on `device`; GraftError if damaged or of another model."""
        model = self.model
        recorded = read_recorded(self.capture, sequence, model.hc_mult, device)
        hidden, largest = recorded.residual.shape[2], int(recorded.token_ids.max())
        layers = len(model.dspark_target_layer_ids) if self.stages else 0
        if layers and (recorded.taps is None or recorded.taps.shape[1] != layers):
            found = f"has not the taps of {layers} layers that a DSpark drafter reads"
            cure = "capture again with this upstream, or with [capture] taps"
            raise GraftError(f"{self.capture}: {found}; {cure}")
        if hidden == model.hidden_size and largest < model.vocab_size:
            return recorded
        path = self.capture / capture_files.RECORDINGS / sequence.recording
        found = f"prompt {sequence.id!r} has hidden size {hidden} and token {largest}"
        expected = f"{model.hidden_size} and less than {model.vocab_size} by the base's config.json"
        raise GraftError(f"{path}: {found}, expected {expected}; capture this base")


def open_inputs(capture: Path, upstream: Path, base: Path, split: str, *needed: str) -> Inputs:
    """Return the inputs; `needed` are tensors of the base. GraftError for no such head or base."""
    sequences = [s for s in read_sequences(capture) if s.split == split]
    from mtp_graft.dsv4.replay import model_config

    base_map, settings = read_index(base), read_config(base)
    expected = [settings["vocab_size"], settings["hidden_size"]]
    for name in needed:
        if name not in base_map:
            raise GraftError(f"{base}: its index lists no {name}; expected a whole checkpoint")
        if (found := list(read_meta(base, name)[name].shape)) != expected:
            raise GraftError(f"{base}: {name} is {found}, expected {expected} by its config.json")
    head = read_master(upstream)
    settings |= drafter_config(upstream, head.meta)
    check_head(upstream, head, settings)
    with translated(f"{base / 'config.json'}: not DeepSeek-V4's", ValueError, KeyError, TypeError):
        model = model_config(settings)
    files = [
        base / "config.json",
        capture / capture_files.INDEX_NAME,
        *(capture / capture_files.RECORDINGS / n for n in sorted({s.recording for s in sequences})),
        *sorted(set(head.files.values())),
        *(base / shard for shard in sorted({base_map[name] for name in needed})),
    ]
    return Inputs(capture, upstream, base, model, head, num_stages(settings), sequences, files)
