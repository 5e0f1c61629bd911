"""`mtp-graft serve --check` on the real engine, with a head that is not the model's."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.conftest import Checkpoints
from mtp_graft.checkpoint.shards import load_tensors, read_index, save_shard

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def spoil(checkpoint: Path, folder: Path) -> Path:
    """Copy a checkpoint and mix up the outputs of the projection that reads the residual."""
    shutil.copytree(checkpoint, folder)
    shard = read_index(folder)["mtp.0.h_proj.weight"]
    names = [name for name, its_shard in read_index(folder).items() if its_shard == shard]
    tensors = load_tensors(folder, names)
    for name, tensor in tensors.items():
        if name.startswith("mtp.0.h_proj."):
            order = torch.randperm(len(tensor), generator=torch.Generator().manual_seed(0))
            tensors[name] = tensor[order].contiguous()
    (folder / shard).unlink()
    save_shard(tensors, folder / shard)
    return folder


def test_a_head_with_wrong_weights_serves_but_fails_the_check(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    checkpoint = spoil(checkpoints.spliced, tmp_path / "spoiled")
    command = [sys.executable, "-m", "mtp_graft.cli", "serve", str(checkpoint), "--check"]
    command += ["--port", "0", "--max-model-len", "1024", "--log", str(tmp_path / "vllm.log")]
    done = subprocess.run(
        [*command, "--json", "-"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "the head is not the model's" in done.stderr
    result = json.loads(done.stdout)
    assert result["ok"] is False
    assert result["num_draft_tokens"] > 50
    assert result["acceptance"] < result["threshold"]
