"""`mtp-graft bench`, how fast a server is and how good its answers are, and `mtp-graft tune`."""

import importlib.util
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import date
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from mtp_graft.bench.page import as_html, percents, render
from mtp_graft.checkpoint.files import TUNED_NAME, write_json
from mtp_graft.cli.app import DRY_RUN, app, bench, with_options
from mtp_graft.cli.output import check_writable, progress_bar, show, table
from mtp_graft.cli.target import Result, Target, check_url
from mtp_graft.errors import GraftError
from mtp_graft.recipe import BenchSection, load_recipe
from mtp_graft.serving import command as serving
from mtp_graft.serving.command import K_HELP, NUM_SPECULATIVE_TOKENS, argument, option, option_group

if TYPE_CHECKING:  # `--help` need not wait for these
    from mtp_graft.bench.decode import Asked

THINKING = option(False, None, "Let the model think before it answers.")


@option_group
class Texts:
    """The options of `decode` and `sweep`: what is asked."""

    prompt_file: Path | None = option(
        None, "FILE", 'JSON Lines of {"id", "text"}. Default: bundled ones.', "--prompts"
    )
    limit: int | None = option(None, "N", "Use the first prompts only.", min=1)
    max_tokens: int = option(BenchSection.max_tokens, "N", "Tokens to write per prompt.", min=2)
    ignore_eos: bool = option(True, None, "Go on after an end-of-sequence token.")
    temperature: float = option(0.0, "T", "0 is greedy; above, texts are not compared.", min=0.0)

    def asked(self, rounds: int) -> "Asked":
        """Return the prompts of the file, or the tiny recipe's, and how they are asked."""
        from mtp_graft.bench.decode import DecodeConfig
        from mtp_graft.pipeline import find_bundled_recipe
        from mtp_graft.stages.calibration import iterate_prompts

        source = self.prompt_file or load_recipe(find_bundled_recipe()).bench.prompts
        config = DecodeConfig(self.max_tokens, rounds, self.ignore_eos, self.temperature)
        return list(islice(iterate_prompts(str(source)), self.limit)), config


@bench.command("decode")
@with_options
def bench_decode(
    target: Target,
    texts: Texts,
    against: str | None = option(None, "DIR|URL", "Take turns with this checkpoint, or server."),
    pairs: int | None = option(None, "N", "Turns with --against, even. Default: 6.", min=2),
    rounds: int = option(BenchSection.rounds, "N", "How often each turn asks all prompts.", min=1),
    k: int | None = NUM_SPECULATIVE_TOKENS,
) -> None:
    """Measure the decode speed of one request at a time, time to first token and acceptance.

    With --against, both servers take turns (base, MTP, MTP, base, ...) and the ratio of their
    speeds comes with an interval.
    """
    from mtp_graft.bench.decode import decode_result, measure_alternating, measured, serve_turn

    if against is None and pairs is not None:
        raise typer.BadParameter("--pairs needs --against")
    other = None if against is None else _other(target, against)
    prompts, config = asked = texts.asked(rounds)
    k = target.num_drafts(k)

    def measure(folder: Path) -> Result:
        with progress_bar() as report:
            ours = partial(target.client, report, k=k)
            if other is None:
                turn = partial(serve_turn, ours, asked, report)
                return decode_result([measured(folder, "decode", turn)], config)
            serve = {"mtp": ours, "base": partial(other.client, report, k=0)}
            return measure_alternating(serve, asked, pairs or 6, report, folder)

    # More pairs may be added to a folder later: each stands by itself.
    claim = {"decode": asdict(config), "k": k, "prompts": _hash(prompts)}
    claim |= {"against": other.identity()} if other else {}
    result = target.finish("decode", claim, measure)
    show(result, target.json_file, *_decode_parts(result))


def _other(target: Target, against: str) -> Target:
    """Return the server to compare with; it is ours if the first one is."""
    if ("://" in against) == (target.base_url is None):
        rule = "compare a --checkpoint with a checkpoint, and a --base-url with an address"
        raise typer.BadParameter(rule)
    if target.base_url:
        return replace(target, base_url=check_url(against))
    return replace(target, checkpoint=Path(against))


def _hash(asked: Sequence[Any]) -> str:
    """Return what tells these prompts or questions from others."""
    return sha256(repr(asked).encode()).hexdigest()


def _decode_parts(result: Result) -> list[str | Table]:
    other = [{"server": "against", **result["against"]}] if "against" in result else []
    records = [*other, {"server": "decode", **result}]
    speeds = table(records, "server", "decode_tok_s", "ttft_ms", "tpot_ms", "acceptance")
    parts: list[str | Table] = [speeds]
    if "ratio" in result:
        ratio = result["ratio"]["decode_tok_s"]
        interval = "95 % interval {:.3f} to {:.3f}".format(*ratio["interval"])
        of = f"{ratio['pairs']} pairs, {ratio['prompts']} prompts"
        parts.append(f"decode speed: {ratio['estimate']:.3f} times the other's ({interval}; {of})")
        parts.append(f"greedy text: {same_text(result)}")
    return [*parts, *drafting_lines(result)]


def same_text(result: Result) -> str:
    """Say whether a comparison's greedy texts are the same, and if not, where they differ."""
    if (identical := result["greedy_identical"]) is None:
        return "not compared, since texts are sampled"
    places = [f"{each['prompt']} at {each['position']}" for each in result["divergences"]]
    differs = f"differs ({', '.join(places) or 'between rounds'})"
    return "identical on every prompt" if identical else differs


def drafting_lines(result: Result) -> list[str]:
    """Return how many drafts were accepted at each position, if there were any."""
    if result["acceptance_length"] is None:
        return []
    ended = ", after the end of a text too" if result.get("config", {}).get("ignore_eos") else ""
    accepted = f"{percents(result['acceptance_by_position'])} (each given the ones before{ended})"
    length = f"{result['acceptance_length']:.2f} tokens a step"
    return [f"k = {result['k']}: accepted by position {accepted}, {length}"]


@bench.command("sweep")
@with_options
def bench_sweep(
    target: Target,
    texts: Texts,
    concurrency: str = option("1,2,3,4,6,8", "N,N,...", "Numbers of requests at a time."),
    k: str | None = option(None, "N,N,...", f"{K_HELP} Each has its own server.", "--k", "-k"),
    requests: int = option(4, "N", "Requests of a point, times its concurrency.", min=1),
) -> None:
    """Measure speed with several requests at a time, by `vllm bench serve`."""
    from mtp_graft.bench.sweep import measure_sweep

    given: Sequence[int | None] = [None] if k is None else _numbers("--k", k, 0)
    loads, ks = _numbers("--concurrency", concurrency, 1), [*map(target.num_drafts, given)]
    prompts, config = asked = texts.asked(requests)

    def measure(folder: Path) -> Result:
        with progress_bar() as report:
            serve = partial(target.client, report, "sweep")
            return measure_sweep(serve, asked, ks, loads, report, folder)

    # More loads or another k may be added to a folder later: each point stands by itself.
    claim = {"sweep": asdict(config), "prompts": _hash(prompts)}
    result = target.finish("sweep", claim, measure)
    columns = ("k", "concurrency", "per_stream_tok_s", "aggregate_tok_s", "ttft_ms")
    points = table(result["points"], *columns, "acceptance_by_position", "errors")
    show(result, target.json_file, points)


def _numbers(flag: str, text: str, least: int) -> tuple[int, ...]:
    """Return the numbers of a list such as 1,2,4."""
    numbers = tuple(int(word) for word in text.split(",") if word.strip().isdecimal())
    if len(set(numbers)) < text.count(",") + 1 or min(numbers) < least:
        expected = f"different numbers from {least} on, as in 1,2,3"
        raise typer.BadParameter(f"{flag} is {text!r}, expected {expected}")
    return numbers


@app.command()
@with_options
def tune(
    *,
    checkpoint: Path = argument("CHECKPOINT", "A checkpoint with a head."),
    target: Target,
    texts: Texts,
    base_url: str | None = option(None, None, "", hidden=True),
    ignore_eos: bool = option(False, None, "Go on after an end-of-sequence token."),
    temperature: float = option(1.0, "T", "As clients ask; 0 is greedy.", min=0.0),
    k: str | None = option(None, "N,N,...", "Beside 0. Default: 1,2,3,5; DSpark: 3, its block."),
    concurrency: str = option("1,2,4,8,16", "N,N,...", "Numbers of requests at a time."),
    rounds: int = option(2, "N", "Of all candidates; more narrow the intervals.", min=2),
    dry_run: bool = DRY_RUN,
) -> None:
    """Measure which drafts pay on this machine, for `serve`.

    Servers answer the same prompts in turn: the base and each k; at the best k, on GPUs, an FP8
    draft LM head and greedy drafts; what was decided, if it mixes these. Drafts are taken where the
    speed-up's 95 % interval lies above 1; where only some loads draft, k = 0 still runs the head.
    """
    from mtp_graft.bench import decode, sweep
    from mtp_graft.bench import tune as bench_tune

    block, on_gpu = serving.dspark_block(checkpoint), serving.find_vllm().platform == "cuda"
    given = _numbers("--k", k, 0) if k else (min(3, block), block) if block else (1, 2, 3, 5)
    ks = sorted({0, *map(target.num_drafts, given)})
    loads = sorted(_numbers("--concurrency", concurrency, 1))
    sampling = "probabilistic" if on_gpu else None
    choices = {"default": {"draft_lm_head_quantization": None, "draft_sample_method": sampling}}
    choices |= {"fp8": {"draft_lm_head_quantization": "fp8"}} if on_gpu and not block else {}
    choices |= {"greedy": {"draft_sample_method": "greedy"}} if on_gpu and temperature else {}
    if dry_run:
        starts = [rounds * len(ks), rounds * (2 + len(choices) * (len(choices) > 1))]
        plan = {"k": ks, "choices": [*choices], "starts": starts[0], "at_most_then": starts[1]}
        return show(plan, target.json_file, table([plan], *plan))
    check_writable(checkpoint / TUNED_NAME)
    prompts, config = asked = texts.asked(4)  # times a load's size: few of them end it alone

    def measure(folder: Path) -> Result:
        with progress_bar() as report:

            def serve(name: str, k: int, **drafts: Any) -> list[Result]:
                held = partial(target.client, report, name, **drafts), asked, [k], loads, report
                points = sweep.measure_sweep(*held, folder / name, len(prompts))["points"]
                return [point for point in points if point["concurrency"] in loads]

            hold = partial(bench_tune.hold, serve, len(prompts), rounds)
            found = bench_tune.tune(hold, loads, ks, choices)
        return decode.measured(folder, f"date{rounds}", lambda: {"date": f"{date.today()}"}) | found

    claim = {"tune": asdict(config), "prompts": _hash(prompts)}
    kept = replace(target, run=target.run or Path("runs", f"tune-{checkpoint.resolve().name}"))
    found = target.identity() | kept.finish("tune", claim, measure)
    write_json(found, checkpoint / TUNED_NAME)
    show(found, target.json_file, table(found["table"], "concurrency", "base_tok_s", "k", "tuned"))


@bench.command("workload")
@with_options
def bench_workload(
    target: Target,
    thinking: bool = THINKING,
    max_tokens: int | None = option(None, "N", "Cap on an answer. Default: the context.", min=2),
    k: int | None = NUM_SPECULATIVE_TOKENS,
) -> None:
    """Measure speed on fifteen everyday requests with a system prompt and tools."""
    from mtp_graft.bench.workload import load_workload, measure_workload

    requests, k = load_workload(thinking, max_tokens), target.num_drafts(k)

    def measure(folder: Path) -> Result:
        with progress_bar() as report, ExitStack() as stack:
            client = target.client(report, "workload", k)
            return measure_workload(lambda: stack.enter_context(client), requests, report, folder)

    claim = {"thinking": thinking, "max_tokens": max_tokens, "k": k, "prompts": _hash(requests)}
    result = target.finish("workload", claim, measure)
    records = [{"category": n, **found} for n, found in result["categories"].items()]
    records.append({"category": "all", **result})
    columns = ("requests", "completion_tokens", "decode_tok_s", "ttft_ms", "acceptance", "cut_off")
    show(result, target.json_file, table(records, "category", *columns))


@bench.command("soak")
@with_options
def bench_soak(
    target: Target,
    reference: str | None = option(None, "URL", "Asked alone. Default: same.", callback=check_url),
    minutes: float = option(10.0, "N", "How long to hold the load.", min=0.01),
    concurrency: int = option(8, "N", "Requests at a time.", min=1),
    seed: int = option(0, "N", "Draws the requests."),
    page: Path | None = option(None, "FILE", "Write a page with charts.", callback=check_writable),
    k: int | None = NUM_SPECULATIVE_TOKENS,
) -> None:
    """Compare answers under load with the same requests asked alone; 1 if any is corrupted."""
    from mtp_graft.bench.decode import measured
    from mtp_graft.bench.soak import SoakConfig, soak
    from mtp_graft.serving.client import ServerClient

    config, k = SoakConfig(minutes, concurrency, seed), target.num_drafts(k)

    def hold() -> Result:
        with progress_bar() as report, ExitStack() as stack:
            client = stack.enter_context(target.client(report, "soak", k, prefix_caching=True))
            other = reference and stack.enter_context(ServerClient(reference, target.api_key))
            return soak(client, other or client, config, report)

    claim = {"soak": config._asdict(), "reference": reference, "k": k}
    result = target.finish("soak", claim, lambda folder: measured(folder, "load", hold))
    if page:
        page.write_text(render("soak.html", as_html, result), "utf-8")
    columns = ("requests", "equal", "near_ties", "sound", "hung_up", "errors", "hangs")
    alone = [f"alone, {name}: {', '.join(kinds)}" for name, kinds in result["alone"].items()]
    show(result, target.json_file, table([result], *columns, "odd"), *alone)
    if bad := result["corrupted"] + result["failures"]:
        first = "{id} ({kind}, {where})".format_map(bad[0])
        raise GraftError(f"{len(bad)} answers are bad: {first}, ...; --json has them all")


def _add_command(name: str, num_questions: int | None, num_tokens: int, purpose: str) -> None:
    """Add a command that asks questions: how good the answers are."""
    how_many = f"How many questions. Default: {num_questions or 'all'}."

    @bench.command(name, help=purpose)
    @with_options
    def command(
        target: Target,
        data_dir: Path | None = option(None, "DIR", "Has gsm8k/, mmlu/, ... Default: the hub."),
        limit: int | None = option(num_questions, "N", how_many, min=1, show_default=False),
        seed: int = option(0, "N", "Draws the questions."),
        thinking: bool = THINKING,
        max_tokens: int = option(num_tokens, "N", "Cap on an answer, thinking included.", min=1),
        concurrency: int = option(4, "N", "Questions asked at a time.", min=1),
        k: int | None = NUM_SPECULATIVE_TOKENS,
    ) -> None:
        settings = {"limit": limit, "seed": seed, "thinking": thinking, "max_tokens": max_tokens}
        result = _evaluate(name, target, data_dir, k, settings | {"concurrency": concurrency})
        columns = ("benchmark", "score", "interval", "correct", "total", "kinds")
        show(result, target.json_file, table([result], *columns))


_add_command("gsm8k", 100, 1024, "Ask GSM8K's word problems: greedy, exact match on `#### N`.")
_add_command("humaneval", None, 1024, "Ask HumanEval's functions: greedy, pass@1, unit tests.")
_add_command("mmlu", 100, 128, "Ask MMLU's four-way questions: greedy, all subjects alike.")
_add_command("capability", None, 2048, "Ask fourteen small tasks, from arithmetic to tool calls.")


def _evaluate(
    name: str, target: Target, data_dir: Path | None, k: int | None, settings: dict[str, Any]
) -> Result:
    """Ask and judge; a finished result is given again."""
    if importlib.util.find_spec("inspect_ai") is None:
        cure = "pip install 'mtp-graft[evals]', or in a checkout -e '.[evals]'"
        raise GraftError(f"bench {name} needs Inspect: {cure}")
    from mtp_graft.bench.decode import measured
    from mtp_graft.bench.evals.run import TASKS, find_model, run_task

    if target.checkpoint or k is not None:  # a running server need not be vLLM
        k = target.num_drafts(k)
    task = TASKS[name](data_dir, settings["limit"], settings["seed"])
    # Files may change in the same folder; messages have an id that is new in every process.
    questions = [(s.id, s.input if isinstance(s.input, str) else None) for s in task.dataset]
    claim = {**settings, "k": k, "questions": _hash(questions)}

    def ask(logs: Path) -> Result:
        with ExitStack() as stack:
            with progress_bar() as report:
                server = stack.enter_context(target.client(report, name, k))
            return run_task(task, logs, find_model(server, settings)) | {"settings": settings}

    return target.finish(name, claim, lambda to: measured(to, "result", lambda: ask(to / "logs")))
