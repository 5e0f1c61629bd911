"""What the quantize stage is given: its settings, and its inputs opened and checked."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

from mtp_graft.checkpoint import capture as capture_files
from mtp_graft.checkpoint.capture import CapturedSequence, read_sequences
from mtp_graft.checkpoint.manifest import claim_folder, fingerprints
from mtp_graft.checkpoint.shards import load_tensors, open_shard, read_index
from mtp_graft.dsv4 import names
from mtp_graft.dsv4.experts import GptqRules
from mtp_graft.errors import GraftError
from mtp_graft.stages.inputs import read_model_config
from mtp_graft.stages.ranks import Ranks

ZeroTokens = Literal["pool", "rtn", "error"]

REPLAY, GPTQ = "replay", "gptq"
_PARTS = ("replay", "hessian", "gptq", "pack", "errors", "io", "total")


@dataclass(frozen=True)
class QuantizeConfig:
    """How the experts are calibrated; every field decides the result's bytes."""

    damp: float = 0.01
    damping: Literal["fixed", "tokens"] = "tokens"
    group_size: int = 128
    order: Literal["stored", "activation"] = "stored"
    scale: Literal["absmax", "mse"] = "mse"
    #: What the experts' inputs are computed by: the head as it is ("true"), or without its
    #: attention ("identity"), as the published GPTQ head was calibrated.
    replay: Literal["true", "identity"] = "true"
    #: What calibrates an expert that no token reached: every token ("pool"), nothing, which is
    #: rounding to nearest ("rtn"), or the stage fails ("error").
    zero_tokens: ZeroTokens = "pool"
    experts_per_batch: int = 16
    split: str = "calibration"
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the replay
    #: On a GPU, whether products of replay, Hessians and errors take their inputs in TF32; sums
    #: are FP32 in any case, and GPTQ itself is.
    tf32: bool = True
    #: One by default, so that the bytes do not depend on the machine's cores; the products of a
    #: small head gain little from more, and waiting for a core that is busy costs far more.
    cpu_threads: int = 1

    def rules(self) -> GptqRules:
        """Return what GPTQ itself goes by."""
        return GptqRules(self.damp, self.damping, self.group_size, self.order, self.scale)


@dataclass(frozen=True)
class Job:
    """The stage's inputs, opened and checked."""

    capture: Path
    upstream: Path
    base: Path
    out: Path
    config: QuantizeConfig
    model: DeepseekV4Config
    head_names: list[str]
    sequences: list[CapturedSequence]
    ranks: Ranks
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_PARTS, 0.0))

    @property
    def device(self) -> str:
        """Return this rank's torch device."""
        return self.ranks.device(self.config.device)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count the time spent inside as `part`'s."""
        started = time.perf_counter()
        yield
        if self.config.device != "cpu":
            torch.cuda.synchronize(self.device)
        self.seconds[part] += time.perf_counter() - started

    @contextmanager
    def products(self) -> Iterator[None]:
        """Let float32 products inside take TF32 inputs on a GPU, if the settings say so."""
        if self.config.device == "cpu":
            yield
            return
        matmul = torch.backends.cuda.matmul
        before = matmul.fp32_precision
        matmul.fp32_precision = "tf32" if self.config.tf32 else "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = before

    def replay_file(self, sequence: CapturedSequence) -> Path:
        """Return where a sequence's rows are kept."""
        return self.out / REPLAY / f"{sequence.number:06d}.safetensors"

    def batch_file(self, experts: range) -> Path:
        """Return where a batch's quantized experts are kept."""
        return self.out / GPTQ / f"experts-{experts[0]:04d}-{experts[-1]:04d}.safetensors"

    def batches(self) -> list[range]:
        """Return the batches that the experts are quantized in."""
        step = self.config.experts_per_batch
        num_experts: int = self.model.n_routed_experts
        return [range(e, min(e + step, num_experts)) for e in range(0, num_experts, step)]

    def expert_tensors(self, experts: range) -> dict[str, Tensor]:
        """Read the upstream tensors of a batch to the stage's device."""
        return self._load(self.expert_names(experts))

    def other_tensors(self) -> dict[str, Tensor]:
        """Read the upstream tensors that are no routed expert's to the stage's device."""
        return self._load(self.other_names())

    def expert_names(self, experts: range) -> list[str]:
        """Return the names of some experts' upstream tensors."""
        prefixes = tuple(f"{names.HEAD_PREFIX}ffn.experts.{e}." for e in experts)
        return [n for n in self.head_names if n.startswith(prefixes)]

    def other_names(self) -> list[str]:
        """Return the names of the upstream tensors that are no routed expert's."""
        prefix = f"{names.HEAD_PREFIX}ffn.experts."
        return [n for n in self.head_names if not n.startswith(prefix)]

    def _load(self, tensor_names: list[str]) -> dict[str, Tensor]:
        pinned = self.config.device != "cpu"
        tensors = load_tensors(self.upstream, tensor_names, pinned=pinned)
        return {name: t.to(self.device, non_blocking=pinned) for name, t in tensors.items()}


def open_job(
    capture: Path, upstream: Path, base: Path, out: Path, config: QuantizeConfig, ranks: Ranks
) -> Job:
    """Check what can be checked before anything is computed, and claim the stage's folder."""
    head_map = read_index(upstream, "mtp.")
    head_names = names.upstream_head_names(head_map, upstream)
    model = read_model_config(base)
    _check_groups(model, config.group_size)
    split = [s for s in read_sequences(capture) if s.split == config.split]
    sequences = [s for s in split if s.calibration_tokens]
    if not sequences:
        raise GraftError(
            f"{capture}: no captured sequences of split {config.split!r} with three tokens or "
            "more; run `mtp-graft capture` first"
        )
    shards = sorted({upstream / head_map[name] for name in head_names})
    recordings = {capture / capture_files.RECORDINGS / s.recording for s in sequences}
    inputs = [capture / capture_files.INDEX_NAME, *sorted(recordings), *shards]
    inputs.append(base / read_index(base)["embed.weight"])
    if ranks.rank == 0:
        claim_folder(
            out, {**asdict(config), "inputs": fingerprints([base / "config.json", *inputs])}
        )
        for folder in (REPLAY, GPTQ):
            (out / folder).mkdir(exist_ok=True)
    ranks.wait()
    return Job(capture, upstream, base, out, config, model, head_names, sequences, ranks)


def _check_groups(model: DeepseekV4Config, group_size: int) -> None:
    first = f"{names.HEAD_PREFIX}ffn.experts.0"
    for matrix, inputs in (("w1", model.hidden_size), ("w2", model.moe_intermediate_size)):
        if inputs % group_size:
            raise GraftError(
                f"{first}.{matrix}: has {inputs} inputs, expected a multiple of the group size "
                f"{group_size}; choose a group size that divides it"
            )


def is_whole(path: Path) -> bool:
    """Say whether a unit's file is there and readable; one that is not, is made again."""
    try:
        with open_shard(path):
            return True
    except GraftError:
        return False
