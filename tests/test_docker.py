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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtp_graft import TRIED_VLLM
from mtp_graft.serving.profiles import PROFILES
from serving.conftest import (
    BASE_TENSORS,
    HEAD_TENSORS,
    install,
    read_record,
    wait_gone,
    write_checkpoint,
)

VARIABLES = {
    "HOST": "127.0.0.1",
    "PORT": "8123",
    "MAX_MODEL_LEN": "131072",
    "MAX_NUM_SEQS": "8",
    "GPU_MEMORY_UTILIZATION": "0.90",
    "TENSOR_PARALLEL_SIZE": "2",
    "MAX_NUM_BATCHED_TOKENS": "4096",
    "NUM_SPECULATIVE_TOKENS": "2",
    "KV_CACHE_DTYPE": "auto",
    "SERVED_MODEL_NAME": "one two",
    "VLLM_API_KEY": "s3cret",
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
    """The image's variables: the stand-in for vLLM as a CUDA build, and a checkpoint.

    There are no GPUs to fit a profile to, unless a test names some.
    """
    site = tmp_path / "env" / "site-packages"
    install(site, "vllm", "0.33.0")
    checkpoint = write_checkpoint(tmp_path / "grafted", BASE_TENSORS + HEAD_TENSORS)
    return {"PYTHONPATH": str(site), "MODEL_PATH": str(checkpoint), "PROFILE": "none"}


def environment(variables: dict[str, str]) -> dict[str, str]:
    """Return a container's environment: nothing of ours but what finds the command."""
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    ours = os.environ.get("PYTHONPATH", "")
    variables = {**variables, "PYTHONPATH": f"{variables.get('PYTHONPATH', '')}:{ours}"}
    return {"PATH": path, "OMP_NUM_THREADS": "1", **variables}


@pytest.fixture
def start(docker: Path) -> Iterator[Any]:
    """Return a function that runs the entrypoint; what still runs at the end is stopped."""
    started: list[subprocess.Popen[str]] = []

    def run(variables: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [str(docker / "entrypoint.sh"), *arguments],
            env=environment(variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def dry_run(start: Any, variables: dict[str, str], *arguments: str) -> dict[str, Any]:
    process = start(variables, "--dry-run", "--json", "-", *arguments)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    result: dict[str, Any]
    result, _ = json.JSONDecoder().raw_decode(out, out.index("{\n"))  # among the notes
    return result


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_the_variables_reach_vllm_and_empty_ones_leave_the_choice_to_mtp_graft(
    start: Any, image: dict[str, str]
) -> None:
    result = dry_run(start, image | VARIABLES)
    line = " ".join(result["argv"])
    assert all(flag in line for flag in FLAGS.split("|")), line
    assert result["env"]["VLLM_API_KEY"] == "***"
    empty = dry_run(start, image | dict.fromkeys(VARIABLES, ""))["argv"]
    assert empty == dry_run(start, image)["argv"]
    assert empty[empty.index("--host") + 1] == "0.0.0.0"
    assert "--max-model-len" not in empty


def test_a_profile_is_passed_on(start: Any, image: dict[str, str], tiny_model: Path) -> None:
    variables = {"MODEL_PATH": str(tiny_model / "base"), "PROFILE": "256k", "MAX_MODEL_LEN": "4096"}
    result = dry_run(start, image | variables, "--gpu", "H200")
    assert result["profile"] == "256k"
    line = " ".join(result["argv"])
    assert f"--max-model-len 4096 --max-num-seqs {PROFILES['256k'].max_num_seqs}" in line


def test_a_key_can_come_from_a_file(start: Any, image: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "key").write_text("from-a-file\n")
    record = tmp_path / "record"
    fake = json.dumps({"record": str(record)})
    key = {"API_KEY_FILE": str(tmp_path / "key"), "HOST": "127.0.0.1", "PORT": free_port()}
    start({**image, **key, "FAKE_VLLM": fake})
    found = read_record(record)
    assert found["env"]["VLLM_API_KEY"] == "from-a-file"
    assert "from-a-file" not in " ".join(found["argv"])


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"API_KEY_FILE": "/dev/null"}, "/dev/null: empty; expected the key"),
        ({"MODEL_PATH": "/nothing"}, "mount a spliced checkpoint"),
        ({"MODEL_PATH": ""}, "MODEL_PATH"),
    ],
)
def test_what_is_missing_is_said_before_anything_starts(
    start: Any, image: dict[str, str], variables: dict[str, str], message: str
) -> None:
    process = start(image | variables, "--dry-run")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert message in out


def healthcheck(docker: Path, port: str, host: str = "0.0.0.0") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(docker / "healthcheck.py")]
    variables = environment({"PORT": port, "HOST": host})
    return subprocess.run(command, env=variables, check=False, capture_output=True, text=True)


def test_the_container_is_healthy_when_vllm_is_and_ends_with_sigterm(
    start: Any, docker: Path, image: dict[str, str], tmp_path: Path
) -> None:
    port, record = free_port(), tmp_path / "record"
    process = start({**image, "PORT": port, "FAKE_VLLM": json.dumps({"record": str(record)})})
    while healthcheck(docker, port).returncode != 0:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
    assert healthcheck(docker, port, host="").returncode == 0
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert wait_gone(read_record(record)["pids"]) == []
    done = healthcheck(docker, port, host="::")
    assert done.returncode != 0 and f"http://[::1]:{port}/health" in done.stderr


def test_the_image_is_the_tried_vllm_with_files_that_are_there(
    docker: Path, repo_root: Path
) -> None:
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
