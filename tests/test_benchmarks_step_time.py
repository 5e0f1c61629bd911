"""What the GPU scripts compute from their measurements, with known inputs."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import failing_work

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def load(name: str) -> Any:
    """Import a script of benchmarks/, which import each other by their bare names."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    return importlib.import_module(name)


def line(
    layers: int, base: float, mtp: float, gpu: tuple[float, float] | None = None
) -> dict[str, Any]:
    busy = gpu or (base, mtp)  # the GPU computes all the time
    times = {"step_ms_base": base, "step_ms_mtp": mtp}
    times |= {"gpu_ms_base": busy[0], "gpu_ms_mtp": busy[1]}
    return {"layers": layers, "variant": "int4", "k": 1, "streams": 1, **times}


def entry(variant: str, k: int, rate: float | None, step_ms: float) -> dict[str, Any]:
    place = {"layers": 5, "variant": variant, "k": k, "streams": 1, "context": 1000}
    return {
        **place,
        "rate": rate,
        "clock": False,
        "step_ms": {"median": step_ms},
        "aggregate_tok_s": 1000 / step_ms,
    }


def test_a_line_through_two_layer_counts_is_carried_on() -> None:
    # base: 1 + 0.5 a layer; MTP: 2 + 0.6 a layer
    results = [line(5, 3.5, 5.0), line(17, 9.5, 12.2)]
    assert load("step_time_table").extrapolate(results, 43)["int4", 1, 1] == pytest.approx(
        (22.5, 27.8)
    )


def test_an_engine_slower_than_the_gpu_sets_the_step() -> None:
    # The GPU computes 0.1 ms a layer, and a half more for the head; the engine takes 4 and 7 ms.
    few, many = line(5, 4.0, 7.0, (0.5, 1.0)), line(17, 4.1, 7.1, (1.7, 2.2))
    table = load("step_time_table")
    assert table.extrapolate([few, many], 43)["int4", 1, 1] == pytest.approx((4.3, 7.1))


def test_no_step_of_more_layers_is_shorter_than_one_that_was_measured() -> None:
    # The GPU computes for 8.0 of 10.5 ms: the gaps between kernels stay.
    few, many = line(17, 6.0, 7.0, (4.4, 5.0)), line(35, 10.5, 12.0, (8.0, 9.0))
    base, mtp = load("step_time_table").extrapolate([few, many], 43)["int4", 1, 1]
    assert (base, mtp) == pytest.approx((10.5 + 8 * 0.2, 12.0 + 8 * 4 / 18))


def test_the_gpus_time_alone_knows_no_host() -> None:
    few, many = line(17, 6.0, 9.0, (3.4, 4.0)), line(35, 7.5, 12.0, (7.0, 9.4))
    alone = load("step_time_table").extrapolate_gpu([few, many], 43)["int4", 1, 1]
    assert alone == pytest.approx((7.0 + 8 * 0.2, 9.4 + 8 * 0.3))


def test_layers_without_the_gpus_times_are_passed_over() -> None:
    untimed = line(43, 9.9, 9.9) | {"gpu_ms_base": None, "gpu_ms_mtp": None}
    lines = [line(5, 3.5, 5.0), line(17, 9.5, 12.2), untimed]
    assert load("step_time_table").extrapolate(lines, 43)["int4", 1, 1][0] == pytest.approx(22.5)


def test_without_the_gpus_times_nothing_is_extrapolated() -> None:
    lines = [line(n, 4.0, 7.0) | {"gpu_ms_base": None, "gpu_ms_mtp": None} for n in (5, 17)]
    assert load("step_time_table").extrapolate(lines, 43) == {}


def test_kernels_that_overlap_count_once() -> None:
    covered = load("gpu_clock").covered
    assert covered([(5.0, 7.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.8)]) == pytest.approx(5)
    assert covered([]) == 0


@pytest.mark.gpu
def test_the_gpu_clock_counts_the_kernels_of_replayed_graphs_twice_in_a_row() -> None:
    matrix = torch.randn(4096, 4096, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # captured before any profiler runs
        for _ in range(5):
            matrix = matrix.sin()
    runner = SimpleNamespace(execute_model=lambda _: graph.replay())
    for _ in range(2):
        clock = load("gpu_clock").GpuClock(runner)
        began = time.perf_counter()
        for scheduled in (8, 8, 0, 8, 8, 8, 8, 8):
            runner.execute_model(SimpleNamespace(total_num_scheduled_tokens=scheduled))
        steps, kernels, busy_ms = clock.stop()
        assert steps == 7 - load("gpu_clock").WARM_UP
        assert kernels == 5 * steps
        assert 0.01 < busy_ms < 1000 * (time.perf_counter() - began)


def test_a_gpu_clock_that_sees_no_kernel_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = SimpleNamespace(CUDA=torch.profiler.ProfilerActivity.CPU)
    monkeypatch.setattr(torch.profiler, "ProfilerActivity", cpu)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    runner = SimpleNamespace(execute_model=lambda _: None)
    execute = runner.execute_model
    clock = load("gpu_clock").GpuClock(runner)
    for _ in range(6):
        runner.execute_model(SimpleNamespace(total_num_scheduled_tokens=1))
    with pytest.raises(ValueError, match="0 kernels in 2 steps"):
        clock.stop()
    assert runner.execute_model is execute


def test_the_gpu_is_timed_when_all_streams_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = load("engines")
    calls: list[tuple[int, str]] = []
    at = 0

    def stepping(*_: Any) -> Any:
        nonlocal at
        for at in range(60):
            names = ["a"] if at < 10 else ["a", "b"]  # b comes later
            yield (
                0.0,
                [
                    SimpleNamespace(request_id=n, outputs=[SimpleNamespace(token_ids=[1])])
                    for n in names
                ],
            )

    def rpc(name: str) -> Any:
        calls.append((at, name))
        return [(28, 2800, 56.0), (28, 2900, 84.0)]

    monkeypatch.setattr(engines, "_stepping", stepping)
    llm = SimpleNamespace(collective_rpc=rpc)
    found = engines.time_gpu(llm, [[1], [2]], 1, 1.0, steps=32)
    first = 10 + engines.SETTLING - 1
    assert calls == [(first, "start_gpu_clock"), (first + 32, "stop_gpu_clock")]
    assert found == {"gpu_ms": 2.0, "kernels": 100.0}
    with pytest.raises(ValueError, match="ask for more tokens"):
        engines.time_gpu(llm, [[1], [2]], 1, 1.0, steps=100)


def test_a_benchmark_that_is_cut_off_takes_its_command_with_it(tmp_path: Path) -> None:
    command = tmp_path / "mtp_graft"
    command.mkdir()
    (command / "__init__.py").touch()
    (command / "cli.py").write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    words = [sys.executable, BENCHMARKS / "speed.py", "sweep", "--", "bench", "sweep"]
    process = subprocess.Popen(words, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    pid = tmp_path / "pid"
    while not (pid.exists() and pid.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_one_layer_count_is_not_extrapolated() -> None:
    assert load("step_time_table").extrapolate([line(5, 3.5, 5.0)], 43) == {}


@pytest.mark.parametrize(("k", "expected"), [(1, 1.7), (2, 2.19)])
def test_tokens_of_a_step_are_the_sum_of_the_powers_of_the_rate(k: int, expected: float) -> None:
    assert load("step_time").tokens_per_step(k, 0.7) == pytest.approx(expected)


def test_speed_up_is_tokens_of_a_step_over_its_cost() -> None:
    assert load("step_time_table").speed_ups(10.0, 12.5, 1)[0] == pytest.approx(1.6 * 10 / 12.5)


def test_results_pair_each_mtp_time_with_the_base_of_its_load_and_depth() -> None:
    entries = [entry("base", 0, None, 4.0), entry("int4", 1, 0.6, 5.0), entry("int4", 1, 0.7, 7.0)]
    untimed = line(5, 4.0, 6.0) | {"gpu_ms_base": None, "gpu_ms_mtp": None}
    assert load("step_time").summarize(entries) == [untimed]
    place = {"layers": 5, "streams": 1, "context": 1000, "rate": None, "clock": True}
    entries.append({**place, "variant": "base", "k": 0, "gpu_ms": 2.0})
    entries.append({**place, "variant": "int4", "k": 1, "gpu_ms": 3.0})
    assert load("step_time").summarize(entries) == [line(5, 4.0, 6.0, (2.0, 3.0))]


def test_a_head_without_its_base_gives_no_result() -> None:
    assert load("step_time").summarize([entry("int4", 1, 0.6, 5.0)]) == []


def test_table_keeps_measured_and_extrapolated_apart() -> None:
    report = {
        "device": "a GPU",
        "results": [line(5, 3.5, 5.0), line(17, 9.5, 12.2)],
        "measurements": [entry("base", 0, None, 4.0), entry("int4", 1, 0.6, 5.0)],
    }
    measured, extrapolated = load("step_time_table").markdown(report, 43).split("**Extrapolated**")
    assert "| 17 | int4 | 1 | 1 | 9.50 | 12.20 | 9.50, 12.20 |" in measured
    assert "| 43 | int4 | 1 | 1 | 22.50 | 27.80 |" in extrapolated
    assert "22.50" not in measured
    assert "**The GPU's time alone**" in extrapolated
    assert "| 60% | 250.0 | 200.0 | 0.80x |" in extrapolated


def test_a_step_that_mtp_makes_cheaper_is_called_noise() -> None:
    report = {"device": "a GPU", "results": [line(5, 4.0, 3.0)], "measurements": []}
    table = load("step_time_table")
    assert table.NOISE in table.markdown(report, 43)
    assert table.NOISE not in table.markdown(report | {"results": [line(5, 3.0, 4.0)]}, 43)


def test_only_steps_in_which_every_stream_decodes_are_timed() -> None:
    engines = load("engines")
    alone = [engines.Step(t / 10, {"a": 1}) for t in range(3)]  # b is still being prefilled
    both = [engines.Step(1 + t / 100, {"a": 1, "b": 2}) for t in range(engines.SETTLING + 11)]
    late = [engines.Step(9.0, {"b": 2})]
    summary = engines.summarize_steps([*alone, *both, *late], 2)
    assert summary["steps"] == 10
    assert summary["step_ms"]["median"] == pytest.approx(10)
    assert summary["tokens_per_step"] == pytest.approx(1.5)
    assert summary["aggregate_tok_s"] == pytest.approx(300)


def test_too_few_steps_are_an_error() -> None:
    with pytest.raises(ValueError, match="ask for more tokens"):
        load("engines").summarize_steps([], 1)


def test_synthetic_rates_are_those_of_all_drafts_up_to_each() -> None:
    config = load("engines").speculation(2, 0.7)
    assert config["synthetic_acceptance_rates"] == pytest.approx([0.7, 0.49])
    assert "rejection_sample_method" not in load("engines").speculation(2, None)


@pytest.mark.parametrize(
    ("work", "reason", "stall_s"),
    [
        (failing_work.raises, "no such GPU", 60),
        (failing_work.dies, "status 3", 60),
        (failing_work.hangs, "silent for 1 s", 1),
        (failing_work.sends_and_hangs, "silent for 4 s", 12),
    ],
)
def test_an_engine_that_fails_says_why_and_keeps_what_it_sent(
    work: Any, reason: str, stall_s: float, tmp_path: Path
) -> None:
    engines = load("engines")
    seen = []
    with pytest.raises(engines.EngineFailed, match=reason):
        for message in engines.in_child(work, log=tmp_path / "log", stall_s=stall_s):
            seen.append(message)
    sends = (failing_work.raises, failing_work.sends_and_hangs)
    assert seen == (["first"] if work in sends else [])


def test_an_engine_whose_messages_are_wanted_no_more_is_ended(tmp_path: Path) -> None:
    messages = load("engines").in_child(failing_work.goes_on, log=tmp_path / "log", stall_s=60)
    child = next(messages)
    os.kill(child, 0)
    messages.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_measurements_are_on_disk_at_once_and_failures_go_when_the_job_succeeds(
    tmp_path: Path,
) -> None:
    measurements = load("measurements")
    path = tmp_path / "result.json"

    def read() -> Any:
        return measurements.Measurements(path, "step_time", len, "a note")

    first = read()
    first.add({"layers": 5, "k": 0})
    first.fail("engine", "out of memory")
    again = read()
    assert again.has(layers=5) and not again.has(layers=17)
    assert json.loads(path.read_text())["failures"] == [
        {"job": "engine", "reason": "out of memory"}
    ]
    again.forget_failure("engine")
    again.add({"layers": 17})
    assert json.loads(path.read_text())["failures"] == []
    assert json.loads(path.read_text())["results"] == 2


def test_nothing_is_left_of_a_passed_deadline() -> None:
    deadline = load("measurements").Deadline.after(100)
    assert not deadline.passed() and not deadline.passed(50) and deadline.passed(200)


def test_stored_layers_stand_for_all_others_of_their_kind() -> None:
    layers = load("layers")
    assert [list(layers.copies(n, 9)) for n in range(5)] == [[], [], [], [5, 7], [6, 8]]
    ratios = load("synthetic_flash").FLASH["compress_ratios"]
    assert all(ratios[c] == ratios[n] for n in (3, 4) for c in layers.copies(n, 43))
    assert layers.layer_of("layers.12.attn.wkv.weight") == 12
    assert layers.layer_of("mtp.0.attn.wkv.weight") is None


def test_flash_width_has_the_tensors_of_the_bundled_base(tiny_model: Path) -> None:
    """The tiny model's own config must give exactly the bundled base's tensors."""
    from mtp_graft.checkpoint.shards import read_index, read_meta

    flash_width = load("flash_width")
    base = tiny_model / "base"
    config = json.loads((base / "config.json").read_text())
    wanted = {
        name: (tuple(t.shape), t.dtype) for name, t in read_meta(base, read_index(base)).items()
    }
    made: dict[str, Any] = {}
    for layer in range(-1, config["num_hidden_layers"]):
        made |= flash_width.stored_shapes(config, layer)
    assert made == wanted


def test_random_weights_keep_the_size_of_activations() -> None:
    flash_width = load("flash_width")
    place = {"generator": torch.Generator().manual_seed(0), "device": "cpu"}
    values = flash_width.fp8_bytes((256, 256), place).float()
    assert values.isfinite().all()
    assert values.square().mean().sqrt().item() == pytest.approx(flash_width.FP8_RMS, rel=0.01)


def test_flips_count_against_the_margin_of_the_text() -> None:
    texts = load("texts")
    text = [{"tokens": [1, 2, 3], "margins": [0.1, 0.9, 2.0]}]
    found = texts.compare_forced(text, [[9, 9, 3]])
    assert (found["positions"], found["positions_with_margin"], found["flips"]) == (3, 2, 2)
    assert found["flips_with_margin"] == [{"prompt": 0, "position": 1, "margin": 0.9}]


def test_both_engines_of_a_serve_check_have_a_folder_to_record_into(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = load("gpu_serve_check")
    started: list[int] = []

    def start(engine: Any) -> Any:
        started.append(engine.k)
        raise RuntimeError("no engine here")

    def run(self: Any, job: str, limits: Any, work: Any, *args: Any) -> None:
        with pytest.raises(RuntimeError, match="no engine here"):
            work(list.append, *args)

    monkeypatch.setattr(check, "start", start)
    monkeypatch.setattr(check.Measurements, "run", run)
    monkeypatch.setenv(check.RECORD_VARIABLE, "")  # set by each engine, gone after the test
    words = ["--model", str(tiny_model), "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["gpu_serve_check.py", *words])
    check.main()
    assert started == [0, 1]


def test_recordings_are_compared_by_their_projections() -> None:
    check = load("gpu_serve_check")
    expected = [{"targets": [1, 2], "projected": [[3.0, 4.0], [0.0, 0.0]]}]
    actual = [{"targets": [1, 3], "projected": [[3.0, 4.5], [0.0, 0.0]]}]
    found = check.compare_recordings(expected, actual)
    assert found == {"rows": 2, "rel_error": pytest.approx(0.1), "targets_equal": 1}
