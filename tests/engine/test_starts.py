"""Starts that fail, each for a reason of its own, which is vLLM's and whole; all run at once."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from mtp_graft.serving.command import ServeOptions, build_command
from mtp_graft.serving.server import explain

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
#: Servers that are forks of one process: importing vLLM takes ten seconds.
START = """
import atexit, gc, json, os, runpy, sys
import vllm.entrypoints.openai.api_server as module
import vllm.v1.engine.core
gc.freeze()
for log, arguments in json.loads(sys.argv[1]):
    if not os.fork():
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 1), os.dup2(1, 2)
        sys.argv = ["vllm", *arguments]
        atexit.register(lambda: (sys.stdout.flush(), os._exit(1)))  # not three seconds later
        sys.exit(runpy.run_module(module.__name__, run_name="__main__"))
for _ in json.loads(sys.argv[1]):
    os.wait()
"""
#: A model that every CPU can run, unlike DeepSeek-V4.
LLAMA = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 128)
LLAMA |= dict.fromkeys(("num_attention_heads", "num_hidden_layers"), 1)
LLAMA |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
LLAMA |= {"max_position_embeddings": 2**16}
SMALL = "--load-format dummy --kv-cache-dtype auto --kv-cache-memory-bytes 1000000"
SHARD = "model-00002-of-00003.safetensors"
STARTS = {
    "flag": ("--no-such-flag", r"error: unrecognized arguments: --no-such-flag"),
    "field": ("--gpu-memory-utilization 7", r"CacheConfig gpu_memory_utilization Input .*=7\.0"),
    "scheme": ("--quantization gptq_marlin", r"Value error, Quantization .* \(gptq_marlin\)\."),
    "tokenizer": ("", r"Value error, .*tokenizer.* need to have sentencepiece or tiktoken"),
    "shard": ("", rf"^FileNotFoundError: [^|]*missing: {{'[^']*{SHARD}'}}$"),
    "memory": (SMALL, r"^ValueError: To serve at least one request .* GiB KV cache is .* details"),
}


@pytest.fixture(scope="module")
def logs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, jobs = tmp_path_factory.mktemp("starts"), []
    for name, (words, _) in STARTS.items():
        shutil.copytree(tiny_model / "base", folder / name)
        command = build_command(ServeOptions(folder / name, port=0, extra_args=(*words.split(),)))
        jobs.append((f"{folder / name}.log", command.argv[3:]))
    for file in (folder / "shard" / SHARD, *(folder / "tokenizer").glob("tokenizer*")):
        file.unlink()
    (folder / "memory/config.json").write_text(json.dumps(LLAMA))
    words, env = [sys.executable, "-c", START, json.dumps(jobs)], {**os.environ, **command.env}
    with subprocess.Popen(words, env=env, start_new_session=True) as process:
        try:
            process.wait(600)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return folder


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.serves] * (n == "shard")) for n in STARTS]
)
def test_a_start_that_fails_is_explained(logs: Path, name: str) -> None:
    assert re.search(STARTS[name][1], explain(logs / f"{name}.log"))
