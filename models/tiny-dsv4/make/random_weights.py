"""Write a tiny model with random weights, to try the dimensions on every engine before training.

python models/tiny-dsv4/make/random_weights.py OUT
"""

import sys
from pathlib import Path

import torch
from export import export
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from mtp_graft.dsv4.head import MTPHead

HERE = Path(__file__).resolve().parent


def randomize(module: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Return a float32 state dict of `module` with values that keep activations near one."""
    state = {}
    for name, tensor in module.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("tid2eid"):
            tokens = torch.rand(tensor.shape[0], 64, generator=generator)
            state[name] = tokens.argsort(dim=1)[:, : tensor.shape[1]]
        elif name.endswith(("norm.weight", "layernorm.weight", ".scale", "hc_scale")):
            state[name] = 1 + 0.1 * noise
        elif tensor.dim() < 2:
            state[name] = 0.1 * noise
        else:
            state[name] = noise * tensor.shape[-1] ** -0.5
    return state


def main(out: Path, seed: int = 0) -> None:
    """Write `out/base` and `out/upstream`."""
    config = AutoConfig.from_pretrained(HERE)
    generator = torch.Generator().manual_seed(seed)
    base = randomize(AutoModelForCausalLM.from_config(config), generator)
    head = randomize(MTPHead(config), generator)
    export(base, head, HERE / "config.json", out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
