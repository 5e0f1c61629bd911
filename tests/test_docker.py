"""The container without an engine for containers: its entrypoint, health check and files.

The image itself is not built here; docker/README.md says so.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtp_graft import TRIED_VLLM
from mtp_graft.serving.client import ServerClient
from mtp_graft.serving.profiles import DEFAULT_PROFILE, PROFILES
from mtp_graft.stages.splice import splice
from serving.conftest import (
    BASE_TENSORS,
    HEAD_TENSORS,
    install,
    read_record,
    wait_gone,
    write_checkpoint,
)

VARIABLES = {
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


@pytest.fixture(scope="session")
def docker(repo_root: Path) -> Path:
    return repo_root / "docker"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The stand-in as if it were vLLM for CUDA, as in the image."""
    site = tmp_path / "env" / "site-packages"
    install(site, "vllm", "0.33.0")
    return site


@pytest.fixture
def grafted(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "grafted", BASE_TENSORS + HEAD_TENSORS)


def environment(**variables: str) -> dict[str, str]:
    """Return a container's environment: nothing of ours but what finds the command.

    There are no GPUs to fit a profile to, unless a test names some.
    """
    return {
        "PROFILE": "none",
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
        **variables,
    }


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def start(docker: Path) -> Iterator[Any]:
    """Return a function that runs the entrypoint; what still runs at the end is stopped."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: str, **variables: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [str(docker / "entrypoint.sh"), *arguments],
            env=environment(**variables),
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


def dry_run(start: Any, site: Path, checkpoint: Path, **variables: str) -> dict[str, Any]:
    process = start(
        *("--dry-run", "--json", "-"),
        **{"MODEL_PATH": str(checkpoint), "PYTHONPATH": str(site), **variables},
    )
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    result: dict[str, Any] = json.loads(out[out.index("{") :])
    return result


def value(argv: list[str], flag: str) -> str:
    return argv[argv.index(flag) + 1]


def test_the_variables_reach_vllm(start: Any, site: Path, grafted: Path) -> None:
    result = dry_run(start, site, grafted, HOST="127.0.0.1", PORT="8123", **VARIABLES)
    argv = result["argv"]
    assert argv[1:3] == ["serve", str(grafted)]
    for flag, expected in {
        "--host": "127.0.0.1",
        "--port": "8123",
        "--max-model-len": "131072",
        "--max-num-seqs": "8",
        "--gpu-memory-utilization": "0.90",
        "--tensor-parallel-size": "2",
        "--max-num-batched-tokens": "4096",
        "--kv-cache-dtype": "auto",
        "--speculative-config": '{"method":"mtp","num_speculative_tokens":2,'
        '"draft_sample_method":"probabilistic"}',
    }.items():
        assert value(argv, flag) == expected
    at = argv.index("--served-model-name")
    assert argv[at + 1 : at + 3] == ["one", "two"]
    assert result["env"]["VLLM_API_KEY"] == "***"


def test_variables_that_are_empty_or_unset_leave_the_choice_to_mtp_graft(
    start: Any, site: Path, grafted: Path
) -> None:
    argv = dry_run(start, site, grafted, **dict.fromkeys(VARIABLES, ""))["argv"]
    assert argv == dry_run(start, site, grafted)["argv"]
    assert value(argv, "--host") == "0.0.0.0"
    assert "--max-model-len" not in argv


def test_a_profile_is_passed_on(start: Any, site: Path, tiny_model: Path, tmp_path: Path) -> None:
    splice(tiny_model / "base", tiny_model / "upstream", tmp_path / "tiny", "mxfp4")
    process = start(
        *("--dry-run", "--json", "-", "--gpu", "H200"),
        MODEL_PATH=str(tmp_path / "tiny"),
        PYTHONPATH=str(site),
        PROFILE="256k",
        MAX_MODEL_LEN="4096",
    )
    out, _ = process.communicate(timeout=60)
    result = json.loads(out[out.index("{") :])
    assert result["profile"] == "256k"
    assert value(result["argv"], "--max-num-seqs") == str(PROFILES["256k"].max_num_seqs)
    assert value(result["argv"], "--max-model-len") == "4096"


def test_a_key_can_come_from_a_file(start: Any, site: Path, grafted: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("from-a-file\n")
    record = tmp_path / "record"
    process = start(
        MODEL_PATH=str(grafted),
        PYTHONPATH=str(site),
        API_KEY_FILE=str(tmp_path / "key"),
        HOST="127.0.0.1",
        PORT=free_port(),
        FAKE_VLLM=json.dumps({"record": str(record)}),
    )
    found = read_record(record)
    assert found["env"]["VLLM_API_KEY"] == "from-a-file"
    assert "from-a-file" not in " ".join(found["argv"])
    process.send_signal(signal.SIGTERM)


def test_a_key_file_without_a_key_does_not_open_the_server(
    start: Any, site: Path, grafted: Path, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("\n")
    key = {"API_KEY_FILE": str(tmp_path / "key")}
    process = start("--dry-run", MODEL_PATH=str(grafted), PYTHONPATH=str(site), **key)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"{tmp_path / 'key'}: empty; expected the key" in out


def test_a_checkpoint_that_is_not_mounted_is_said(start: Any, site: Path, tmp_path: Path) -> None:
    process = start(MODEL_PATH=str(tmp_path / "nothing"), PYTHONPATH=str(site))
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "mount a spliced checkpoint" in out
    process = start(PYTHONPATH=str(site))
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "MODEL_PATH" in out


def healthcheck(docker: Path, port: str, host: str = "0.0.0.0") -> int:
    command = [sys.executable, str(docker / "healthcheck.py")]
    return subprocess.run(
        command, env=environment(PORT=port, HOST=host), check=False, capture_output=True
    ).returncode


def wait_healthy(docker: Path, port: str, process: subprocess.Popen[str]) -> None:
    """Ask twice a second, as the container's engine does less often."""
    while healthcheck(docker, port) != 0:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)


def test_the_container_is_healthy_when_vllm_is_and_ends_with_sigterm(
    start: Any, docker: Path, site: Path, grafted: Path, tmp_path: Path
) -> None:
    port, record = free_port(), tmp_path / "record"
    assert healthcheck(docker, port) != 0
    process = start(
        MODEL_PATH=str(grafted),
        PYTHONPATH=str(site),
        PORT=port,
        FAKE_VLLM=json.dumps({"record": str(record)}),
    )
    wait_healthy(docker, port, process)
    assert healthcheck(docker, port, host="") == 0
    pids = read_record(record)["pids"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert wait_gone(pids) == []
    assert healthcheck(docker, port) != 0


@pytest.mark.parametrize(
    ("host", "port", "url"),
    [
        ("::", "9", "http://[::1]:9/health"),
        ("fe80::2", "9", "http://[fe80::2]:9/health"),
        ("", "", "http://127.0.0.1:8000/health"),
    ],
)
def test_the_healthcheck_asks_where_the_server_listens(
    docker: Path, host: str, port: str, url: str
) -> None:
    command = [sys.executable, str(docker / "healthcheck.py")]
    environ = environment(PORT=port, HOST=host)
    done = subprocess.run(command, env=environ, check=False, capture_output=True, text=True)
    assert done.returncode != 0 and url in done.stderr


@pytest.mark.vllm
@pytest.mark.slow
def test_the_entrypoint_serves_the_tiny_model_with_the_real_vllm(
    start: Any, docker: Path, tiny_model: Path, tmp_path: Path
) -> None:
    splice(tiny_model / "base", tiny_model / "upstream", tmp_path / "tiny", "mxfp4")
    port = free_port()
    process = start(
        MODEL_PATH=str(tmp_path / "tiny"),
        PROFILE="auto",
        MAX_MODEL_LEN="1024",
        MAX_NUM_SEQS="2",
        HOST="127.0.0.1",
        PORT=port,
        SERVED_MODEL_NAME="tiny",
        HOME=str(tmp_path),
        # Else vLLM inspects the model's class anew, in one more process.
        VLLM_CACHE_ROOT=str(Path.home() / ".cache" / "vllm"),
        # What vLLM prints would fill the pipe, which nobody reads.
        VLLM_LOGGING_LEVEL="ERROR",
    )
    wait_healthy(docker, port, process)
    with ServerClient(f"http://127.0.0.1:{port}") as client:
        assert len(client.complete([0, 5, 6, 7], 8, ignore_eos=True)) == 8
        counters = client.spec_decode_counters()
    assert counters is not None and counters.num_drafts > 0
    process.send_signal(signal.SIGTERM)
    assert process.wait(180) == 0


@pytest.fixture(scope="session")
def dockerfile(docker: Path) -> str:
    text = (docker / "Dockerfile").read_text()
    return text.replace("\\\n", " ")


def test_the_base_image_is_pinned_to_the_vllm_that_was_tried(dockerfile: str) -> None:
    found = re.search(r"^ARG VLLM_VERSION=(\S+)$", dockerfile, re.MULTILINE)
    assert found is not None
    assert found[1] == TRIED_VLLM["cuda"]
    images = re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)
    assert images == ["vllm/vllm-openai:v${VLLM_VERSION}"]


def test_the_container_runs_as_a_user_without_privileges(dockerfile: str) -> None:
    users = re.findall(r"^USER (\S+)", dockerfile, re.MULTILINE)
    assert users[-1].split(":")[0] not in {"0", "root"}
    after = dockerfile.rpartition("\nUSER ")[2]
    assert "\nRUN " not in after
    assert "\nHEALTHCHECK " in after and "\nENTRYPOINT " in after


def test_all_that_is_copied_is_there_and_not_ignored(
    dockerfile: str, docker: Path, repo_root: Path
) -> None:
    kept = (docker / "Dockerfile.dockerignore").read_text().splitlines()
    sources = [
        source
        for line in re.findall(r"^COPY (.*)$", dockerfile, re.MULTILINE)
        for source in line.split()[:-1]
        if not source.startswith("--")
    ]
    assert sources
    for source in sources:
        assert (repo_root / source).exists(), source
        assert f"!{source.removeprefix('./')}" in kept, source


def test_compose_has_the_seeds_three_profiles_and_524k_is_the_default(docker: Path) -> None:
    compose = yaml.safe_load((docker / "compose.yaml").read_text())
    services = compose["services"]
    assert {name.removeprefix("mtp-") for name in services} == {"524k", "128k", "256k"}
    for name, service in services.items():
        profile = name.removeprefix("mtp-")
        assert service["environment"]["PROFILE"] == profile
        assert profile in PROFILES
        assert ("profiles" not in service) is (profile == DEFAULT_PROFILE)
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert any(volume.endswith(":/models/checkpoint:ro") for volume in service["volumes"])
        # As in Acti's docker run.
        assert service["shm_size"] == "16gb"
        assert service["ulimits"] == {"memlock": -1, "stack": 67108864}


def test_the_image_has_the_same_default_and_the_same_path(dockerfile: str) -> None:
    assert f"PROFILE={DEFAULT_PROFILE}" in dockerfile
    assert "MODEL_PATH=/models/checkpoint" in dockerfile


def variables_of(docker: Path) -> set[str]:
    """Return the variables that the entrypoint reads, and the one that it leaves to serve."""
    script = (docker / "entrypoint.sh").read_text()
    names = set(re.findall(r"\$\{([A-Z_]+)[:}]", script)) | {"VLLM_API_KEY"}
    assert names >= VARIABLES.keys()
    return names


def test_the_readme_explains_every_variable(docker: Path) -> None:
    readme = (docker / "README.md").read_text()
    for name in variables_of(docker):
        assert f"`{name}`" in readme, name
    assert os.access(docker / "entrypoint.sh", os.X_OK)


def test_compose_passes_on_every_variable_that_the_entrypoint_reads(docker: Path) -> None:
    compose = yaml.safe_load((docker / "compose.yaml").read_text())
    fixed = {"MODEL_PATH", "HOST", "PORT", "PROFILE"}  # by the mount, the ports and the service
    for service in compose["services"].values():
        passed = {k: v for k, v in service["environment"].items() if k != "PROFILE"}
        expected = {name: f"${{{name}:-}}" for name in variables_of(docker) - fixed}
        assert passed == expected | {"API_KEY_FILE": "${API_KEY_FILE:+/run/secrets/api_key}"}
        assert service["secrets"] == ["api_key"]
    assert compose["secrets"] == {"api_key": {"file": "${API_KEY_FILE:-/dev/null}"}}


def test_the_unit_in_the_docs_waits_for_readiness_and_signals_serve_alone(repo_root: Path) -> None:
    page = (repo_root / "docs" / "serving.md").read_text()
    unit = ConfigParser()
    unit.read_string(page.partition("```ini\n")[2].partition("```")[0])
    assert (unit["Service"]["Type"], unit["Service"]["KillMode"]) == ("notify", "mixed")


@pytest.mark.parametrize(
    ("linter", "files"),
    [("shellcheck", ("docker/entrypoint.sh", ".ci/run")), ("hadolint", ("docker/Dockerfile",))],
)
def test_the_linters_find_nothing(repo_root: Path, linter: str, files: tuple[str, ...]) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    program = shutil.which(linter, path=path)
    if program is None:
        pytest.skip(f"{linter} is not installed; it comes with the dev extra")
    done = subprocess.run(
        [program, *files], cwd=repo_root, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
