"""Make an input of DeepSeek-V4-Flash's size for the quantize stage, on the host that uses it.

    python benchmarks/synthetic_flash.py FOLDER [--tokens 473000] [--tiny]

FOLDER gets `base/` (config, embedding and what leads to logits), `upstream/` (an upstream-format
shard with the head, random weights: MXFP4 experts, FP8 linears) and `capture/` (residuals, token
ids). Activations have a common low-rank part, heavy tails and outlier channels; the router's bias
is fitted until the experts are as popular as those of the published calibration: 430 tokens for the
rarest, 11,094 on average, 175,375 for the most frequent of 473,000. With `--dspark-layers` the
upstream is a DSpark drafter for a base of so many layers, and its experts are equally popular.
`--tiny` is the same in small, for a CPU.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from record import MODEL
from torch import Tensor

sys.path.append(str(MODEL / "make"))

from export import upstream_tensors, write_checkpoint

from mtp_graft.checkpoint.capture import RECORDINGS, CapturedSequence, append_row
from mtp_graft.checkpoint.shards import save_shard
from mtp_graft.dsv4 import names
from mtp_graft.dsv4.names import head_shapes
from mtp_graft.dsv4.replay import build_head, model_config, replay_routing
from mtp_graft.dsv4.variants import decode_head
from mtp_graft.stages.parallel import write_behind

Config = dict[str, Any]
#: What the head needs of Flash's config.json (`design` facts of the model card and its config).
#: What Flash-DSpark's says besides (it reads the last three layers), and the bundled tiny model.
FLASH, DSPARK, TINY = json.loads((Path(__file__).parent / "flash.json").read_text()).values()
TINY = FLASH | TINY  # in Flash's pattern of layers
#: Tokens of an expert over the mean: least and most.
RAREST, MOST_FREQUENT = 430 / 11_094, 175_375 / 11_094
SEQUENCE, PER_RECORDING = 1848, 4  # tokens; sequences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=473_000)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--dspark-layers", type=int, metavar="N")
    options = parser.parse_args()
    config = TINY if options.tiny else FLASH
    if options.dspark_layers:
        config = with_dspark(config, options.dspark_layers)
    generate(options.folder, config, options.tokens)


def with_dspark(config: Config, layers: int) -> Config:
    """Return the config of a DSpark checkpoint whose base has so many layers."""
    read = {"dspark_target_layer_ids": [*range(layers - 3, layers)]}
    return config | DSPARK | read | {"dspark_noise_token_id": config["vocab_size"] - 1}


def generate(folder: Path, config: Config, tokens: int, sequence: int = SEQUENCE) -> None:
    """Write `base/`, `upstream/` and `capture/` for `config` under `folder`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    write_base(folder / "base", config, generator)
    activations = Activations(config, generator)
    write_capture(folder / "capture", activations, tokens, sequence)
    fitted = None if "n_mtp_layers" in config else activations
    write_upstream(folder / "upstream", config, fitted, generator)


def write_base(folder: Path, config: Config, generator: torch.Generator) -> None:
    shape = (config["vocab_size"], config["hidden_size"])
    embed = torch.randn(shape, generator=generator, device=generator.device).bfloat16()
    streams, hidden = config["hc_mult"], config["hidden_size"]
    tensors = {"embed.weight": embed.cpu(), "norm.weight": torch.ones(hidden).bfloat16()}
    tensors["head.weight"] = tensors["embed.weight"] / math.sqrt(hidden)
    tensors["hc_head_fn"] = torch.randn(streams, streams * hidden) / math.sqrt(streams * hidden)
    tensors |= {"hc_head_base": torch.zeros(streams), "hc_head_scale": torch.ones(1)}
    write_checkpoint({"model-00001-of-00001.safetensors": tensors}, config, folder)


class Activations:
    """Residual streams with a common low-rank part, heavy tails and outlier channels."""

    def __init__(self, config: Config, generator: torch.Generator) -> None:
        self.config, self.generator = config, generator
        size, streams, rank = config["hidden_size"], config["hc_mult"], 64
        self.common = self._randn(rank, size)
        self.of_stream = self._randn(streams, 1, size).mul(0.3).exp()
        channels = self._randn(size).mul(0.5).exp()
        outliers = torch.randperm(size, generator=generator, device=generator.device)
        channels[outliers[: max(1, size // 512)]] *= 30
        self.channels = channels

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.generator.device)

    def residual(self, tokens: int) -> Tensor:
        """Return the residual of `tokens` tokens, bf16 [T, S, D]."""
        rank, size = self.common.shape
        streams = len(self.of_stream)
        shared = self._randn(tokens, rank) @ self.common / math.sqrt(rank)  # [T, D]
        own = self._randn(tokens, streams, size)
        # Student's t with four degrees of freedom, a factor for each token.
        tail = (4 / self._randn(tokens, 4).square().sum(-1)).sqrt().clamp(max=20)
        values = (shared[:, None] + 0.7 * own) * tail[:, None, None]
        return (values * self.channels * self.of_stream[:, 0]).bfloat16()


def write_capture(folder: Path, activations: Activations, tokens: int, sequence: int) -> None:
    """Write `tokens` tokens in sequences of equal length, several to a recording."""
    (folder / RECORDINGS).mkdir(parents=True)
    count, vocab = max(1, tokens // sequence), activations.config["vocab_size"]
    ids = torch.Generator().manual_seed(1)
    with write_behind() as write:
        for first in range(0, count, PER_RECORDING):
            number_here = min(PER_RECORDING, count - first)
            rows = number_here * sequence
            name = f"{first:06d}.safetensors"
            drawn = torch.randint(vocab, (rows,), generator=ids, dtype=torch.int32)
            recording = {"token_ids": drawn, "targets": drawn.roll(-1)}
            recording["residual"] = activations.residual(rows).flatten(1).cpu()
            if taps := len(activations.config.get("dspark_target_layer_ids", ())):
                recording["taps"] = activations.residual(rows)[:, :taps].flatten(1).cpu()
            write(save_shard, recording, folder / RECORDINGS / name)
            for i in range(number_here):
                about = first + i, f"synthetic-{first + i}", "calibration"
                place = sequence // 8, sequence, name, i * sequence
                append_row(folder, CapturedSequence(*about, *place))


def write_upstream(
    folder: Path, config: Config, activations: Activations | None, generator: torch.Generator
) -> None:
    """Write the head in upstream's format; without activations to fit it on, a router of zero."""
    shapes = head_shapes(config).items()
    stored = dict(part for n, s in shapes for part in upstream_parts(n, s, generator))
    for bias in (name for name in stored if name.endswith(".ffn.gate.bias")):
        fitted = activations and fit_bias(config, stored, activations).cpu()
        stored[bias] = torch.zeros_like(stored[bias]) if fitted is None else fitted
    write_checkpoint({"model-00046-of-00046.safetensors": stored}, config, folder)


def upstream_parts(
    name: str, shape: tuple[int, ...], generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of one parameter as upstream stores it."""
    values = torch.randn(shape, generator=generator, device=generator.device)
    is_expert = names.EXPERT.match(name)
    values = values * (1.2 / math.sqrt(shape[-1])) if is_expert else plain(name, values)
    for part, tensor in upstream_tensors(name, values).items():
        yield part, tensor.cpu()


def plain(name: str, values: Tensor) -> Tensor:
    """Return the values of a tensor that is not an expert's, from normal ones."""
    if name.endswith("norm.weight"):
        return 1 + 0.1 * values
    if name == "embed.weight":
        return values
    if values.dim() == 2 and not name.endswith(".ape"):
        return values / math.sqrt(values.shape[-1])
    return 0.1 * values + (1.0 if name.endswith("_scale") else 0.0)


def fit_bias(config: Config, stored: dict[str, Tensor], activations: Activations) -> Tensor:
    """Return the router's bias f32 [E] under which experts are as popular as wanted."""
    experts, top = config["n_routed_experts"], config["num_experts_per_tok"]
    wanted = wanted_popularity(experts, top, activations.generator)
    dense = {name: tensor for name, tensor in stored.items() if ".ffn.experts." not in name}
    decoded, device = decode_head(dense), activations.generator.device
    head = build_head(model_config(config), decoded, with_experts=False, device=device)
    embed = torch.randn(2048, config["hidden_size"], device=wanted.device)
    sample = [activations.residual(2048) for _ in range(8)]
    x = torch.cat([replay_routing(head, residual, embed)[0] for residual in sample])
    gate = decoded[f"{names.HEAD_PREFIX}ffn.gate.weight"].to(x)
    scores = torch.nn.functional.softplus(x @ gate.T).sqrt()
    bias = torch.zeros(experts, device=x.device)
    for step in range(400):
        chosen = (scores + bias).topk(top).indices
        share = chosen.flatten().bincount(minlength=experts).float() / len(x)
        rate = 0.05 * 0.99**step  # the scores spread by about 0.3
        bias += rate * (wanted.log() - share.clamp(min=0.2 / len(x)).log())
    return bias.float()


def wanted_popularity(experts: int, top: int, generator: torch.Generator) -> Tensor:
    """Return each expert's share of the tokens: log-normal inside, its ends as published."""
    device = generator.device
    most = min(MOST_FREQUENT, experts / top / 2)  # of few experts none can be so frequent
    inside = torch.randn(experts - 2, generator=generator, device=device).mul(1.1).exp()
    inside = inside.clamp(2 * RAREST, most / 2)
    ends = torch.tensor([RAREST, most], device=device)
    left = experts - RAREST - most
    share = torch.cat((ends, inside * (left / inside.sum())))
    return (share * top / experts)[torch.randperm(experts, generator=generator, device=device)]


if __name__ == "__main__":
    main()
