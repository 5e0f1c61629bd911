"""`serve --dry-run` to the letter, for every profile and for the hardware that the docs name.

MTP_GRAFT_WRITE_GOLDEN=1 writes the files anew; the difference is then what a review looks at.
"""

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mtp_graft import cli
from mtp_graft.serving import plan
from mtp_graft.stages.splice import splice

from .conftest import install, install_gpus, only_from
from .flash import cached_weights

GOLDEN = Path(__file__).parent / "golden"
MAX_Q = ("--gpu", "RTX PRO 6000 Max-Q", "--count", "2")
SPARKS = ("--gpu", "GB10", "--count", "2", "--master-addr", "192.0.2.1")
#: Acti's validated command.
CONSERVATIVE = ("--max-num-seqs", "2", "--k", "1", "--draft-sample-method", "greedy")
FLASH_CASES: dict[str, tuple[str, ...]] = {
    **{
        f"max-q-x2-{profile}": ("--profile", profile, *MAX_Q)
        for profile in ("128k", "256k", "256k-2", "524k", "640k", "1m", "auto")
    },
    "max-q-x2-524k-conservative": ("--profile", "524k", *MAX_Q, *CONSERVATIVE),
    "server-x2-524k": ("--profile", "524k", "--gpu", "RTX PRO 6000 Server", "--count", "2"),
    "spark-x2-524k-node-0": ("--profile", "524k", *SPARKS),
    "spark-x2-524k-node-1": ("--profile", "524k", *SPARKS, "--node-rank", "1"),
    "h100-x2-auto": ("--profile", "auto", "--gpu", "H100", "--count", "2"),
    "h200-x1-524k": ("--profile", "524k", "--gpu", "H200"),
    "h200-x2-524k": ("--profile", "524k", "--gpu", "H200", "--count", "2"),
    "h200-x8-524k": ("--profile", "524k", "--gpu", "H200", "--count", "8"),
    "h200-x8-auto": ("--profile", "auto", "--gpu", "H200", "--count", "8"),
}
Print = Callable[..., str]

pytestmark = pytest.mark.usefixtures("quiet_environment")


@pytest.fixture
def quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU does not get into the output, nor do GPUs that whoever runs the tests chose."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def dry_run(
    vllm: object, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Print:
    """Return a function that gives what `serve --dry-run` prints, errors included."""
    monkeypatch.setattr(plan, "weights_bytes_per_rank", cached_weights)

    def call(checkpoint: Path, *arguments: str) -> str:
        command = ["mtp-graft", "serve", str(checkpoint), "--dry-run", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit):
            cli.main()
            sys.exit(0)
        out, errors = capfd.readouterr()
        printed = out if "--json" in arguments else errors + out
        return printed.replace(sys.executable, "python").replace(str(checkpoint), "/model")

    return call


def compare(name: str, text: str) -> None:
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("MTP_GRAFT_WRITE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.parametrize("name", FLASH_CASES)
def test_the_dry_run_is_the_golden_file(dry_run: Print, flash: Path, name: str) -> None:
    compare(name, dry_run(flash, *FLASH_CASES[name]))


def test_the_dry_run_on_a_cpu_is_the_golden_file(
    dry_run: Print, tiny_model: Path, tmp_path: Path
) -> None:
    splice(tiny_model / "base", tiny_model / "upstream", tmp_path / "tiny", "mxfp4")
    compare("cpu-tiny-auto", dry_run(tmp_path / "tiny", "--profile", "auto"))
    assert {f.stem for f in GOLDEN.iterdir()} == FLASH_CASES.keys() | {"cpu-tiny-auto"}


@pytest.fixture
def dry_run_on_max_q(dry_run: Print, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Print:
    """The same where vLLM is a CUDA build and the driver tells of two cards on PCIe."""
    site = tmp_path / "cuda" / "site-packages"
    install(site, "vllm", "0.33.0")
    only_from(site, monkeypatch)
    card = "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition"
    install_gpus(monkeypatch, card, card, memory_mib=97887)

    def call(checkpoint: Path, *arguments: str) -> str:
        printed = dry_run(checkpoint, *arguments).replace(card, "RTX PRO 6000 Max-Q")
        return printed.replace("python -m vllm.entrypoints.cli.main", "vllm")

    return call


BY_DEFAULT = "# - no --profile given: auto, which took 1m; none leaves all to vLLM\n"


def test_gpus_that_are_found_give_the_same_as_their_name_and_auto_is_the_default(
    dry_run_on_max_q: Print, flash: Path
) -> None:
    printed = dry_run_on_max_q(flash, "--profile", "524k")
    assert printed == (GOLDEN / "max-q-x2-524k.txt").read_text()
    auto = (GOLDEN / "max-q-x2-auto.txt").read_text()
    for arguments in ((), MAX_Q):
        printed = dry_run_on_max_q(flash, *arguments)
        assert BY_DEFAULT in printed
        assert printed.replace(BY_DEFAULT, "") == auto


def test_every_flag_and_variable_has_a_reason(dry_run: Print, flash: Path) -> None:
    result = json.loads(dry_run(flash, *FLASH_CASES["max-q-x2-524k"], "--json", "-"))
    reasons = " ".join(result["notes"])
    for name in (*flags_of(result["argv"]), *result["env"]):
        assert name == "--port" or f"{name}: " in reasons, f"no reason for {name}"


# The Acti card's validated 524k command, and the environment that it requires.
ACTI_COMMAND = """
vllm serve LordNeel/DeepSeek-V4-Flash-Acti-MTP-W4A16-FP8
  --served-model-name deepseek-v4-flash deepseek-v4-flash-mtp
                      DSV4-W4A16-FP8 deepseek-ai/DeepSeek-V4-Flash
  --tensor-parallel-size 2 --kv-cache-dtype fp8 --block-size 256 --max-model-len 524288
  --max-num-seqs 2 --max-num-batched-tokens 8192 --gpu-memory-utilization 0.93
  --tokenizer-mode deepseek_v4 --tool-call-parser deepseek_v4 --enable-auto-tool-choice
  --reasoning-parser deepseek_v4 --trust-remote-code --disable-custom-all-reduce
  --speculative-config '{"method":"mtp","num_speculative_tokens":1}' --host 0.0.0.0 --port 8000
"""
ACTI_ENVIRONMENT = """
VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_ENABLE_DEEPSEEK_V4_SPARSE_MLA_WARMUP=0
NCCL_P2P_DISABLE=1 NCCL_IB_DISABLE=1 NCCL_SHM_DISABLE=0
NCCL_PROTO=LL NCCL_ALGO=Ring NCCL_MIN_NCHANNELS=8 NCCL_NTHREADS=512
"""


def flags_of(argv: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the values of every flag after the model's name, whatever their order."""
    flags: dict[str, tuple[str, ...]] = {}
    for word in argv[argv.index("serve") + 2 :]:
        if word.startswith("--"):
            flags[word] = ()
        else:
            name = list(flags)[-1]
            flags[name] = (*flags[name], word)
    return flags


def test_the_conservative_524k_is_the_seeds_command_but_for_these_differences() -> None:
    golden = (GOLDEN / "max-q-x2-524k-conservative.txt").read_text().splitlines()
    exports = [line.removeprefix("export ") for line in golden if line.startswith("export ")]
    both = ((exports, golden[-1]), (ACTI_ENVIRONMENT.split(), ACTI_COMMAND))
    ours, seeds = (
        {*variables, *(" ".join((f, *v)) for f, v in flags_of(shlex.split(words)).items())}
        for variables, words in both
    )
    left_out = "VLLM_ENABLE_DEEPSEEK_V4_SPARSE_MLA_WARMUP=0"  # no stock vLLM has it
    assert seeds - ours == {"--host 0.0.0.0", "--trust-remote-code", left_out}
    added = {"HF_HUB_OFFLINE=1", "VLLM_NO_USAGE_STATS=1", "VLLM_PLUGINS=mtp_graft"}
    assert ours - seeds >= added | {"--host 127.0.0.1"}
    [limit] = ours - seeds - added - {"--host 127.0.0.1"}
    assert limit.startswith("VLLM_ENGINE_READY_TIMEOUT_S=3")
