import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtp_graft.errors import GraftError, UsageError
from mtp_graft.serving import command
from mtp_graft.serving.command import (
    Platform,
    ServeCommand,
    ServeOptions,
    build_command,
    check_port,
    find_vllm,
    vllm_elsewhere,
)
from mtp_graft.serving.plan import Node, make_plan
from mtp_graft.serving.profiles import SERVED_MODEL_NAMES
from mtp_graft.serving.topology import named_gpus

from .conftest import install, only_from


def value(argv: list[str], name: str) -> str:
    return argv[argv.index(name) + 1]


def test_command_for_a_grafted_checkpoint_on_a_cpu_is_exact(
    vllm: Path, grafted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 1, 2, 3, 4})
    built = build_command(ServeOptions(grafted, max_model_len=2048, max_num_seqs=4))
    assert list(built.argv) == [
        *(str(vllm), "serve", str(grafted), "--host", "127.0.0.1", "--port", "8000"),
        *("--tokenizer-mode", "deepseek_v4", "--reasoning-parser", "deepseek_v4"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "deepseek_v4"),
        *("--kv-cache-dtype", "fp8", "--block-size", "256", "--tensor-parallel-size", "1"),
        *("--max-model-len", "2048", "--max-num-seqs", "4"),
        *("--kv-cache-memory-bytes", "1073741824", "--enforce-eager"),
        *("--speculative-config", '{"method":"mtp","num_speculative_tokens":1}'),
    ]
    assert built.env == {
        "VLLM_ENGINE_READY_TIMEOUT_S": "1800",
        "VLLM_PLUGINS": "mtp_graft",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "2",
    }
    assert built.base_url == "http://127.0.0.1:8000"


@pytest.mark.parametrize(("context", "step"), [(2048, None), (4096, "4096"), (None, "8192")])
def test_on_a_cpu_with_a_head_a_step_holds_the_longest_prompt(
    vllm: Path,
    grafted: Path,
    base: Path,
    context: int | None,
    step: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "has_amx", lambda: False)
    config = json.loads((grafted / "config.json").read_text())
    config["max_position_embeddings"] = 8192
    (grafted / "config.json").write_text(json.dumps(config))
    argv = list(build_command(ServeOptions(grafted, max_model_len=context)).argv)
    assert (value(argv, "--max-num-batched-tokens") if step else None) == step
    without = build_command(ServeOptions(base, max_model_len=context)).argv
    assert "--max-num-batched-tokens" not in without


def test_a_step_too_small_for_a_prompt_is_refused_on_a_cpu_without_amx(
    vllm: Path, grafted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ServeOptions(grafted, max_model_len=2048, max_num_batched_tokens=512)
    monkeypatch.setattr(command, "has_amx", lambda: False)
    with pytest.raises(GraftError, match="expected at least the context's 2048"):
        build_command(options)
    monkeypatch.setattr(command, "has_amx", lambda: True)
    assert value(list(build_command(options).argv), "--max-num-batched-tokens") == "512"


def test_a_gpu_keeps_its_own_memory_and_compilation_defaults(
    tmp_path: Path, grafted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "gpu" / "site", "vllm", "0.33.0")
    only_from(tmp_path / "gpu" / "site", monkeypatch)
    built = build_command(ServeOptions(grafted, tensor_parallel_size=8))
    assert "--enforce-eager" not in built.argv
    assert "--kv-cache-memory-bytes" not in built.argv
    assert "VLLM_CPU_OMP_THREADS_BIND" not in built.env


def test_a_base_is_served_without_drafting(vllm: Path, base: Path) -> None:
    built = build_command(ServeOptions(base))
    assert built.num_speculative_tokens == 0
    assert "--speculative-config" not in built.argv


def test_a_head_can_be_left_out_or_used_twice(vllm: Path, grafted: Path) -> None:
    without = build_command(ServeOptions(grafted, num_speculative_tokens=0))
    assert "--speculative-config" not in without.argv
    twice = build_command(ServeOptions(grafted, num_speculative_tokens=2))
    config = json.loads(value(list(twice.argv), "--speculative-config"))
    assert config == {"method": "mtp", "num_speculative_tokens": 2}


def test_a_gpu_drafts_three_tokens_as_it_is_told_to(grafted: Path) -> None:
    def config(**options: Any) -> Any:
        argv = list(build_command(ServeOptions(grafted, **options), vllm_elsewhere()).argv)
        return json.loads(value(argv, "--speculative-config"))

    usual = {
        "method": "mtp",
        "num_speculative_tokens": 3,
        "draft_sample_method": "probabilistic",  # what most requests are: at temperature 1
    }
    assert config() == usual
    assert config(draft_sample_method="greedy") == {"method": "mtp", "num_speculative_tokens": 3}
    fp8 = {"draft_lm_head_quantization": "fp8"}
    assert config(**fp8) == usual | fp8


@pytest.mark.parametrize(
    ("platform", "options", "message"),
    [
        ("cpu", {"draft_lm_head_quantization": "fp8"}, "-quantization fp8: vLLM has it on GPUs"),
        ("cpu", {"draft_sample_method": "greedy"}, "-method greedy: vLLM has it on GPUs alone"),
        ("cuda", {"draft_lm_head_quantization": "int8"}, "int8: expected one of fp8, nvfp4"),
    ],
)
def test_drafting_that_vllm_does_not_have_is_wrong_usage(
    grafted: Path, platform: Platform, options: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        build_command(ServeOptions(grafted, **options), vllm_elsewhere(platform))


def test_options_reach_the_command(vllm: Path, base: Path) -> None:
    options = ServeOptions(
        base,
        served_model_names=("a", "b"),
        kv_cache_gib=0.5,
        prefix_caching=False,
        enforce_eager=False,
        extra_args=("--seed", "7"),
    )
    argv = list(build_command(options).argv)
    assert argv[argv.index("--served-model-name") + 1 :][:2] == ["a", "b"]
    assert value(argv, "--kv-cache-memory-bytes") == str(2**29)
    assert "--no-enable-prefix-caching" in argv
    assert "--enforce-eager" not in argv
    assert argv[-2:] == ["--seed", "7"]


def test_plugins_that_the_user_chose_are_kept(
    vllm: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other,mtp_graft")
    assert build_command(ServeOptions(base)).env["VLLM_PLUGINS"] == "other,mtp_graft"


def test_threads_that_the_user_chose_are_kept(
    vllm: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert "OMP_NUM_THREADS" not in build_command(ServeOptions(base)).env
    # Only vLLM's worker binds its threads.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-2")
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in build_command(ServeOptions(base)).env


@pytest.mark.parametrize(
    ("cpus", "ranks", "binding"),
    [({0, 1}, 2, "0|1"), ({1, 3, 5, 7, 9}, 2, "1,3|5,7"), ({4, 2, 3}, 3, "2|3|4")],
)
def test_ranks_on_a_cpu_share_the_allowed_cpus(
    vllm: Path,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    cpus: set[int],
    ranks: int,
    binding: str,
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: cpus)
    built = build_command(ServeOptions(base, tensor_parallel_size=ranks))
    assert built.env["VLLM_CPU_OMP_THREADS_BIND"] == binding


def test_more_ranks_than_cpus_is_an_error(
    vllm: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0})
    with pytest.raises(GraftError, match="size 2 on 1 CPUs"):
        build_command(ServeOptions(base, tensor_parallel_size=2))


def test_the_api_key_is_in_neither_argv_nor_what_is_printed(vllm: Path, base: Path) -> None:
    built = build_command(ServeOptions(base, api_key="s3cret"))
    assert built.env["VLLM_API_KEY"] == "s3cret"
    assert "s3cret" not in " ".join(built.argv) + built.as_shell() + repr(built.printable_env())


@pytest.mark.parametrize(
    ("host", "url"),
    [("0.0.0.0", "http://127.0.0.1:8000"), ("::1", "http://[::1]:8000")],
)
def test_the_address_is_one_that_this_machine_can_reach(
    vllm: Path, base: Path, host: str, url: str
) -> None:
    assert build_command(ServeOptions(base, host=host)).base_url == url


def test_port_0_becomes_a_free_port(vllm: Path, base: Path) -> None:
    built = build_command(ServeOptions(base, port=0))
    assert built.port > 1023
    assert value(list(built.argv), "--port") == str(built.port)


def test_a_host_of_another_machine_is_an_error() -> None:
    with pytest.raises(GraftError, match=r"192\.0\.2\.1:0: cannot listen"):
        check_port("192.0.2.1", 0)


def test_speculative_tokens_without_a_head_are_an_error(vllm: Path, base: Path) -> None:
    with pytest.raises(GraftError, match=r"lists no mtp\.0\.\* tensor"):
        build_command(ServeOptions(base, num_speculative_tokens=1))


def damage_folder(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def damage_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def damage_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def damage_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')


def damage_shard(folder: Path) -> None:
    (folder / "model-1.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_folder, "not a folder"),
        (damage_config, "config.json: not found"),
        (damage_json, "not a model config"),
        (damage_type, "model_type is 'llama', expected 'deepseek_v4'"),
        (damage_shard, "model-1.safetensors: not found"),
    ],
)
def test_a_bad_checkpoint_is_named(
    vllm: Path, base: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(base)
    with pytest.raises(GraftError, match=message):
        build_command(ServeOptions(base))


def test_no_vllm_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_from(tmp_path, monkeypatch)
    with pytest.raises(GraftError, match="vLLM is not installed"):
        find_vllm()


@pytest.mark.parametrize(("name", "extra"), [("vllm", "gpu"), ("vllm-cpu", "cpu")])
def test_an_older_vllm_is_an_error_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, extra: str
) -> None:
    install(tmp_path / "site", name, "0.31.2")
    only_from(tmp_path / "site", monkeypatch)
    with pytest.raises(
        GraftError, match=rf"0\.31\.2 is installed, expected .*mtp-graft\[{extra}\]"
    ):
        find_vllm()


@pytest.mark.parametrize(
    ("name", "version", "warnings"),
    [
        ("vllm", "0.33.2", 0),
        ("vllm", "0.34.0", 1),
        ("vllm-cpu", "0.32.1", 0),
        ("vllm-cpu", "0.33.0", 1),
    ],
)
def test_a_newer_vllm_than_was_tried_gets_one_warning(
    tmp_path: Path,
    grafted: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    version: str,
    warnings: int,
) -> None:
    install(tmp_path / "site", name, version)
    only_from(tmp_path / "site", monkeypatch)
    for _ in range(2):
        build_command(ServeOptions(grafted))
    assert [f"vLLM {version} is newer" in text for text in caplog.messages] == [True] * warnings


@pytest.mark.parametrize(
    ("name", "version", "platform"),
    [
        ("vllm-cpu", "0.32.0", "cpu"),
        ("vllm", "0.32.0+cpu", "cpu"),
        ("vllm", "0.33.0rc1", "cuda"),
        ("vllm", "0.32.0", "cuda"),
    ],
)
def test_the_distribution_says_the_platform(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, version: str, platform: str
) -> None:
    script = install(tmp_path / "site", name, version)
    only_from(tmp_path / "site", monkeypatch)
    found = find_vllm()
    assert found.platform == platform
    assert (found.launcher == (str(script), "serve")) is (name == "vllm")


def test_vllm_cpu_is_started_by_its_module_because_its_command_does_not_start(
    tmp_path: Path, grafted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", "vllm-cpu", "0.32.0")
    only_from(tmp_path / "site", monkeypatch)
    argv = list(build_command(ServeOptions(grafted)).argv)
    module = "vllm.entrypoints.openai.api_server"
    assert argv[:5] == [sys.executable, "-m", module, "--model", str(grafted)]


def test_an_unpacked_wheel_is_started_by_its_module(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_from(site, monkeypatch)
    next(site.glob("*.dist-info/RECORD")).write_text("vllm/__init__.py,,\n")
    assert find_vllm().launcher[1:] == ("-m", "vllm.entrypoints.cli.main", "serve")


def parse_with_vllm(built: ServeCommand) -> Any:
    """Return what the installed vLLM understands by the arguments after the checkpoint."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    argv = list(built.argv)
    first = next(i for i, word in enumerate(argv) if word.startswith("--host"))
    return make_arg_parser(FlexibleArgumentParser()).parse_args(argv[first:])


@pytest.mark.vllm
@pytest.mark.slow
def test_the_installed_vllm_accepts_every_flag(grafted: Path) -> None:
    options = ServeOptions(
        grafted,
        max_model_len=64,
        max_num_seqs=2,
        served_model_names=("a", "b"),
        prefix_caching=False,
        enforce_eager=True,
    )
    parsed = parse_with_vllm(build_command(options))
    assert parsed.tool_call_parser == "deepseek_v4"
    assert parsed.enable_prefix_caching is False
    assert parsed.speculative_config == {"method": "mtp", "num_speculative_tokens": 1}


@pytest.mark.vllm
@pytest.mark.slow
def test_the_installed_vllm_accepts_the_flags_of_profiles(tiny_model: Path) -> None:
    """Those of two cards on PCIe, and those of the second of two machines."""
    options = ServeOptions(tiny_model / "base", max_model_len=4096)
    vllm = vllm_elsewhere()
    cards = make_plan(options, "524k", named_gpus("RTX PRO 6000 Max-Q", 2), vllm)
    parsed = parse_with_vllm(build_command(cards.options, vllm))
    assert parsed.disable_custom_all_reduce is True
    assert parsed.gpu_memory_utilization == 0.93
    assert parsed.max_num_batched_tokens == 8192
    assert parsed.served_model_name == list(SERVED_MODEL_NAMES)
    sparks = make_plan(options, "524k", named_gpus("GB10", 2), vllm, Node(1, "192.0.2.1"))
    parsed = parse_with_vllm(build_command(sparks.options, vllm))
    assert (parsed.nnodes, parsed.node_rank, parsed.master_addr) == (2, 1, "192.0.2.1")
    assert parsed.headless is True
