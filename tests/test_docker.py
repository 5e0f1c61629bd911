"""The container without an engine for containers: its entrypoint, health check and files.

The image itself is not built here; docker/README.md says so.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtp_graft import TRIED_VLLM
from serving import conftest as serving
from serving.conftest import install, read_record, wait_gone

VARIABLES = {
    **{"HOST": "127.0.0.1", "PORT": "8123", "MAX_MODEL_LEN": "131072", "MAX_NUM_SEQS": "8"},
    **{"GPU_MEMORY_UTILIZATION": "0.90", "TENSOR_PARALLEL_SIZE": "2", "KV_CACHE_DTYPE": "auto"},
    **{"MAX_NUM_BATCHED_TOKENS": "4096", "NUM_SPECULATIVE_TOKENS": "2"},
    **{"SERVED_MODEL_NAME": "one two", "VLLM_API_KEY": "s3cret"},
}
FLAGS = (
    "--host 127.0.0.1 --port 8123|--max-model-len 131072|--max-num-seqs 8|"
    "--gpu-memory-utilization 0.9|--tensor-parallel-size 2|--max-num-batched-tokens 4096|"
    '"num_speculative_tokens":2|--kv-cache-dtype auto|--served-model-name one two'
)


@pytest.fixture(scope="session")
def docker(repo_root: Path) -> Path:
    return repo_root / "docker"


@pytest.fixture
def image(tmp_path: Path) -> dict[str, str]:
    """The image's variables: the stand-in for vLLM as a CUDA build, and a checkpoint, no GPUs."""
    site = tmp_path / "env" / "site-packages"
    install(site, "vllm", "0.33.0")
    tensors = serving.BASE_TENSORS + serving.HEAD_TENSORS
    checkpoint = serving.write_checkpoint(tmp_path / "grafted", tensors)
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": path, "MODEL_PATH": str(checkpoint), "PROFILE": "none"}


def environment(variables: dict[str, str]) -> dict[str, str]:
    """Return a container's environment: nothing of ours but what finds the command."""
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    return {"PATH": path, "OMP_NUM_THREADS": "1", **variables}


def enter(docker: Path, variables: dict[str, str], *arguments: str) -> tuple[int, str]:
    words, both = [docker / "entrypoint.sh", *arguments], subprocess.PIPE
    streams: dict[str, Any] = {"stdout": both, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(words, env=environment(variables), check=False, timeout=300, **streams)
    return done.returncode, done.stdout


def test_the_variables_reach_vllm(docker: Path, image: dict[str, str]) -> None:
    status, out = enter(docker, image | VARIABLES, "--dry-run", "--json", "-")
    assert status == 0, out
    result, _ = json.JSONDecoder().raw_decode(out, out.index("{\n"))  # among the notes
    line = " ".join(result["argv"])
    assert all(flag in line for flag in FLAGS.split("|")), line
    assert result["env"]["VLLM_API_KEY"] == "***"


@pytest.mark.usefixtures("image")
def test_empty_variables_say_nothing_and_a_key_may_be_a_file(docker: Path, tmp_path: Path) -> None:
    stub = tmp_path / "mtp-graft"
    stub.write_text('#!/bin/sh\necho "${VLLM_API_KEY:-no key}:" "$@"\n')
    stub.chmod(0o755)
    (tmp_path / "key").write_text("of a file\n")
    given = {"MODEL_PATH": "grafted", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    where, own = "--host 0.0.0.0 --port 8000", {"PROFILE": "256k", "MAX_MODEL_LEN": "4096"}
    for variables, expected in (
        (dict.fromkeys(VARIABLES, ""), f"no key: serve grafted {where}"),
        ({"API_KEY_FILE": "key"}, f"of a file: serve grafted {where}"),
        (own, f"no key: serve grafted --profile 256k {where} --max-model-len 4096"),
    ):
        found = enter(docker, given | variables, "--gpu", "H200")
        assert found == (0, f"{expected} --gpu H200\n")


def test_what_is_missing_is_said_before_a_start(docker: Path, image: dict[str, str]) -> None:
    for name, value, message in (
        ("API_KEY_FILE", "/dev/null", "/dev/null: empty; expected the key"),
        ("MODEL_PATH", "/nothing", "mount a spliced checkpoint"),
        ("MODEL_PATH", "", "MODEL_PATH"),
    ):
        status, out = enter(docker, image | {name: value}, "--dry-run")
        assert status == 1 and message in out


def healthcheck(docker: Path, port: str, host: str = "0.0.0.0") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(docker / "healthcheck.py")]
    variables = environment({"PORT": port, "HOST": host})
    return subprocess.run(command, env=variables, check=False, capture_output=True, text=True)


def test_healthy_until_sigterm_ends_it(docker: Path, image: dict[str, str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    record = tmp_path / "record"
    variables = {**image, "PORT": port, "FAKE_VLLM": json.dumps({"record": str(record)})}
    with subprocess.Popen([docker / "entrypoint.sh"], env=environment(variables)) as process:
        try:
            while healthcheck(docker, port).returncode != 0:
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(0.5)
            assert healthcheck(docker, port, host="").returncode == 0
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()
    assert wait_gone(read_record(record)["pids"]) == []
    done = healthcheck(docker, port, host="::")
    assert done.returncode != 0 and f"http://[::1]:{port}/health" in done.stderr


def test_the_image_has_the_tried_vllm_and_our_files(docker: Path, repo_root: Path) -> None:
    text = (docker / "Dockerfile").read_text().replace("\\\n", " ")
    assert f"\nARG VLLM_VERSION={TRIED_VLLM['cuda']}\n" in text
    assert "PROFILE=524k" in text
    user, _, after = text.rpartition("\nUSER ")[2].partition("\n")
    assert user.split(":")[0] not in {"0", "root"} and "\nRUN " not in after
    kept = (docker / "Dockerfile.dockerignore").read_text().splitlines()
    copied = " ".join(re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE)).split()
    for source in (word for word in copied if not word.startswith("--")):
        assert (repo_root / source).exists(), source
        assert f"!{source.removeprefix('./')}" in kept, source


def test_compose_has_the_seeds_three_profiles_and_passes_every_variable_on(docker: Path) -> None:
    services = yaml.safe_load((docker / "compose.yaml").read_text())["services"]
    script, readme = ((docker / name).read_text() for name in ("entrypoint.sh", "README.md"))
    names = set(re.findall(r"\$\{([A-Z_]+)[:}]", script)) | {"VLLM_API_KEY"}
    assert names >= VARIABLES.keys()
    assert all(f"`{name}`" in readme for name in names)
    fixed = {"MODEL_PATH", "HOST", "PORT", "PROFILE"}  # by the mount, the ports and the service
    expected = {name: f"${{{name}:-}}" for name in names - fixed}
    expected |= {"API_KEY_FILE": "${API_KEY_FILE:+/run/secrets/api_key}"}
    assert {name.removeprefix("mtp-") for name in services} == {"524k", "128k", "256k"}
    for name, service in services.items():
        profile = name.removeprefix("mtp-")
        assert service["environment"] == {**expected, "PROFILE": profile}
        assert ("profiles" not in service) is (profile == "524k")
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        # As in Acti's docker run.
        assert service["shm_size"] == "16gb"
        assert service["ulimits"] == {"memlock": -1, "stack": 67108864}
