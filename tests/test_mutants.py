"""Broken inputs: each is one clear message or a finding, soon, and nothing else is written.

$MTP_GRAFT_MUTANTS is how many to try as processes of their own, one command each.
"""

import io
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.main import get_command

from mtp_graft import cli
from mtp_graft.checkpoint.files import sha256
from mtp_graft.checkpoint.shards import save_shard, write_index
from mtp_graft.dsv4.names import EXPERT, NEVER_QUANTIZED, base_shapes, head_shapes
from mtp_graft.dsv4.variants import stored_as
from serving.doctor_defects import Plant, edit_index, edit_shard, section, set_config

APART = int(os.environ.get("MTP_GRAFT_MUTANTS", "0"))
DRY = ("in/recipe.toml", "--dry-run", "--run", "out/run")
GPU = ("--gpu", "H200")
PROMPTS = ("--base-url", "http://127.0.0.1:9", "--prompts", "in/prompts.jsonl")
#: The commands that read a file, by what its name begins with.
READ_BY = {
    "base": (
        ("doctor", "in/base", *GPU),
        ("graft", "in/base", "in/upstream", "out/mxfp4"),
        ("run", *DRY),
        ("serve", "in/base", "--dry-run", *GPU),
    ),
    "upstream": (("graft", "in/base", "in/upstream", "out/bf16", "--head", "bf16"), ("run", *DRY)),
    "grafted": (
        ("doctor", "in/grafted", "--gpu", "cpu"),
        ("graft", "in/base", "in/grafted", "out/again"),
        ("serve", "in/grafted", "--dry-run", *GPU),
    ),
    "recipe": (("run", *DRY), ("splice", "in/recipe.toml", "--run", "out/run")),
    "prompts": (("bench", "decode", *PROMPTS), ("run", *DRY)),
}
#: There is no server, and nothing to splice.
ALWAYS_REFUSED = (READ_BY["prompts"][0], READ_BY["recipe"][1])
COMMAND = get_command(cli.app)  # built once, not for each call

SHARDS = ("model-1.safetensors", "model-2.safetensors")
_FP8 = re.compile(r"\.(w[qo]_[ab]|wkv|[eh]_proj)\.weight$|^mtp.*shared_experts")
_SMALL = {"vocab_size": 64, "hidden_size": 128, "head_dim": 64, "num_hidden_layers": 2}
_SMALL |= {"num_attention_heads": 2, "n_routed_experts": 2, "num_experts_per_tok": 1, "hc_mult": 2}
_SMALL |= {"moe_intermediate_size": 128, "index_n_heads": 2, "index_head_dim": 64}
_RECIPE = """[model]\nname = "mini"\nbase = "./base"\nupstream = "./upstream"
[capture]\ncalibration_prompts = "prompts.jsonl"\nevaluation_prompts = "prompts.jsonl"
calibration_count = 2\nevaluation_count = 2\nmax_prompt_tokens = 64\nnew_tokens = 8
[quantize]\ndamp = 0.01\nvariants = ["rtn", "gptq"]\n[splice]\nvariant = "gptq"\ncopy = false
[bench]\nprompts = "prompts.jsonl"\ncount = 1\nmax_tokens = 8\nserved_variants = ["gptq"]
[serve]\nextra_args = ["--seed", "7"]\nkv_cache_gib = 0.5\n"""


def write_miniature(folder: Path, tiny: Path) -> None:
    """Write base/, upstream/, recipe.toml and prompts.jsonl: two layers of two experts."""
    more = {"compress_ratios": [0, 4, 0], "num_hash_layers": 1}
    config: dict[str, Any] = json.loads((tiny / "base/config.json").read_text()) | _SMALL | more
    for place, shapes in (("base", base_shapes(config)), ("upstream", head_shapes(config))):
        tensors: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            kind = "fp8" if _FP8.search(name) and not NEVER_QUANTIZED.search(name) else "plain"
            if EXPERT.match(name):
                kind = "int4" if place == "base" else "mxfp4"
            stored = stored_as(name, shape, kind, 128)
            tensors |= stored if place == "base" or kind == "plain" else _as_upstream(stored)
        folder.joinpath(place).mkdir(parents=True)
        shard_of = {name: SHARDS[n % 2] for n, name in enumerate(tensors)}
        for shard in SHARDS:
            held = {n: _ones(n, t) for n, t in tensors.items() if shard_of[n] == shard}
            save_shard(held, folder / place / shard)
        write_index(shard_of, 0, folder / place)
        (folder / place / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "base" / name).write_bytes((tiny / "base" / name).read_bytes())
    rows: list[Any] = [{"id": n, "text": f"a text {n}"} for n in range(4)]
    rows.append({"prompt_id": "c", "messages": [{"role": "user", "content": "a question"}]})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.toml").write_text(_RECIPE)
    (folder / "base/recipe.yaml").write_text("quant_stage: {}\n")


def _as_upstream(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    (name, codes), (_, scale) = stored.items()
    name, codes = name.removesuffix("_packed"), codes.char() if "_packed" in name else codes
    return {name: codes, f"{name.removesuffix('weight')}scale": scale.to(torch.float8_e8m0fnu)}


def _ones(name: str, like: Tensor) -> Tensor:
    """Return ones, which every format has, or a packed matrix's shape."""
    shape = torch.tensor([128, 128])
    return shape if name.endswith("weight_shape") else torch.ones(like.shape).to(like.dtype)


_DEEP = "[" * 20_000
#: What stands where another value belongs, as JSON or TOML spells it.
VALUES = [
    *r"""null true 0 -1 1.5 4096 1000000000 -1e999 NaN -Infinity 9223372036854775808 "" "x" "." ".."
    [] {} [null] [[]] [""] {"a":null} {"":{}} {"a":1,"a":2} [0,1000000000000] "\ud800" ["\udfff"]
    "a\u0000b" ["\u0000"] "\n" "/etc/passwd" "sub/model-1.safetensors" "../base/config.json" "F16"
    "model-1.safetensors/" "~nobody/x" ["re:("] "re:*experts*" ["re:.*"] ["re:"] ["re:(.+)+!"]
    ["re:\ud800"] ["re:a{99999999999}"] ["re:(?P<a"]""".split(),  # noqa: SIM905
    *(f'["re:{"(" * 900}"]', f'"{"é" * 300}"', "9" * 5000),
    *(_DEEP, _DEEP + "]" * 20_000, '{"a":' * 20_000),
]
#: What files' names begin with, which are broken in turn.
KINDS = ("config", "model.", "model-", "recipe", "prompts", "tokenizer.", "MTP_QUANT_MANIFEST.js")
_HERE = "@here@"
Broken = tuple[str, bytes]  # what was done, and the file's new content


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container with a key or index in a JSON document."""
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


def _in_json(text: bytes, random: Random) -> Broken:
    """Put a value in a place, give a key twice, remove or misname it."""
    document, value = json.loads(text), random.choice(VALUES)
    parts = [document.get(key) for key in ("quantization_config", "weight_map")]
    part = next((p for p in parts if p and random.random() < 0.7), document)
    container, key = random.choice(list(_places(part)))
    how = random.choice(("set", "set", "set", "remove", "twice", "rename"))
    old, container[key] = container[key], _HERE
    if how in ("remove", "rename"):
        container.pop(key)
    if how == "rename" and isinstance(container, dict):
        container[random.choice(("", "\ud800", f"{key}\0"))] = old
    if how == "twice" and isinstance(key, str):
        value += f", {json.dumps(key)}: {json.dumps(old)}"
    told = f"{how} {key}: {value[:40]}"
    return told, json.dumps(document).replace(json.dumps(_HERE), value, 1).encode()


def _in_shard(content: bytes, random: Random) -> Broken:
    """Do the same in the header, lie about its length or a dtype, or leave no finite value."""
    end = 8 + int.from_bytes(content[:8], "little")
    if random.random() < 0.4:
        size = random.choice((0, 1, end - 9, end + 99, 2**31, 2**63, 2**64 - 1))
        return random.choice((
            (f"header of {size} bytes", size.to_bytes(8, "little") + content[8:]),
            ("BF16 labelled F16", content.replace(b'"BF16"', b'"F16" ')),
            ("NaN", content[:end] + b"\xff" * (len(content) - end)),
        ))  # fmt: skip
    told, header = _in_json(content[8:end], random)
    return told, len(header).to_bytes(8, "little") + header + content[end:]


def _in_lines(content: bytes, random: Random) -> Broken:
    """Put a value into a line of TOML or JSON Lines, or give the line twice."""
    lines, value = content.decode().splitlines(), random.choice(VALUES)
    n = random.randrange(len(lines))
    told, start = f"line {n + 1}: {value[:40]}", re.match(r"(\w+ = |\[|)", lines[n])
    if random.random() < 0.2:
        told, lines[n] = f"line {n + 1} twice", f"{lines[n]}\n{lines[n]}"
    elif lines[n].startswith("{") and random.random() < 0.7:
        told, row = _in_json(lines[n].encode(), random)
        lines[n] = row.decode()
    else:
        lines[n] = (start[0] if start else "") + value.replace("null", "nan")
    return told, "\n".join(lines).encode()


def _as_text(content: bytes, random: Random) -> Broken:
    at = random.randrange(len(content) - 1)
    return random.choice((
        (f"cut at {at}", content[:at]),
        ("BOM", b"\xef\xbb\xbf" + content),
        ("no UTF-8", content[:at] + b"\xff\xfe" + content[at:]),
        ("raw surrogate", content[:at] + b"\xed\xa0\x80" + content[at:]),
        ("NUL", content[:at] + b"\0" + content[at:]),
        ("twice", content * 2),
    ))  # fmt: skip


def _whole(path: Path, random: Random) -> str:
    """Put something else in a file's place, with which nothing can be done."""
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    contents = {"empty": b"", "null": b"null", "list": b"[1]", "nested": _DEEP.encode(), "LFS": lfs}
    links = {"device": "/dev/zero", "loop": path.name, "dangling": "none", "link": "/etc/passwd"}
    told = random.choice([*contents, *links, "UTF-16", "gone", "folder", "pipe"])
    content = path.read_bytes().decode("latin-1")
    path.unlink()
    if told in links:
        path.symlink_to(links[told])
    elif told == "folder":
        path.mkdir()
    elif told == "pipe":
        os.mkfifo(path)
    elif told != "gone":
        path.write_bytes(contents.get(told, content.encode("utf-16")))
    return told


def break_a_file(folder: Path, seed: int) -> tuple[str, str, bool]:
    """Break one file, drawn by the seed; return its name, what was done, and if nothing is left."""
    random, kind = Random(seed), KINDS[seed % len(KINDS)]
    files = [path for path in folder.rglob("*") if path.name.startswith(kind)]
    path = random.choice(sorted(files))
    name, content = str(path.relative_to(folder)), path.read_bytes()
    if random.random() < 0.25:
        return name, _whole(path, random), path.suffix != ".yaml"  # which is copied unread
    inside = {".json": _in_json, ".safetensors": _in_shard}.get(path.suffix, _in_lines)
    told, new = (inside if random.random() < 0.8 else _as_text)(content, random)
    path.unlink()
    path.write_bytes(new)
    return name, told, False


def call(*words: str, limit_s: int = 10) -> tuple[int, str]:
    """Run a command, here or as a process; return its status and errors."""
    if APART:
        command = [sys.executable, "-m", "mtp_graft.cli", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stderr
    status, errors = 0, io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", ["mtp-graft", *words])
        patch.setattr(cli, "app", COMMAND)
        signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"not done after {limit_s} s"))
        signal.alarm(limit_s)
        try:
            with redirect_stderr(errors):
                cli.main()
        except SystemExit as ended:
            status = int(ended.code or 0)
        finally:
            signal.alarm(0)
    return status, errors.getvalue()


def is_refused(words: tuple[str, ...]) -> bool:
    """Say whether a command finds anything; it says so in one line, doctor in findings."""
    status, errors = call(*words)
    said = sum(line.lower().startswith("error: ") for line in errors.splitlines())
    expected = {(0, 0), (1, 1), (2, 1)} | ({(1, 0)} if words[0] == "doctor" else set())
    assert (status, said) in expected and "Traceback" not in errors, (words, errors)
    return status != 0


def everything(folder: Path) -> dict[str, object]:
    """Return all that is below a folder but outputs, so that a change of it would show."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        name, kind = str(path.relative_to(folder)), path.lstat()
        if not name.startswith("out"):
            is_file = stat.S_ISREG(kind.st_mode)
            found[name] = (kind.st_mode, *((kind.st_mtime_ns, sha256(path)) if is_file else ()))
    return found


@pytest.fixture(scope="module")
def miniature(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs that all commands take."""
    folder = tmp_path_factory.mktemp("miniature")
    write_miniature(folder / "in", tiny_model)
    with chdir(folder):
        made = call("graft", "in/base", "in/upstream", "in/grafted", "--copy", limit_s=120)
        assert made[0] == 0, made
        refused = {words for calls in READ_BY.values() for words in calls if is_refused(words)}
    assert refused == {*ALWAYS_REFUSED}
    return folder / "in"


def enter(miniature: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `folder` the working directory, with a copy of the inputs as `in`."""
    shutil.copytree(miniature, folder / "in")
    (folder / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(folder / "tmp"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "out-of-torch"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "tmp"))
    monkeypatch.chdir(folder)


#: Of each kind of file the least share of mutants that a command refuses; what is not refused is
#: read by none, or as good as the original.
LEAST = dict(zip(KINDS, (0.6, 0.8, 0.7, 0.25, 0.7, 0.25, 0.5), strict=True))


@pytest.mark.timeout(0 if APART else 600)
@pytest.mark.parametrize("kind", KINDS)
def test_broken_inputs_are_one_message_each_and_change_nothing(
    miniature: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    seeds, num_refused = range(KINDS.index(kind), APART or 210, len(KINDS)), 0
    for seed in seeds:
        enter(miniature, folder := tmp_path / str(seed), monkeypatch)
        file, told, nothing_is_left = break_a_file(folder / "in", seed)
        print(seed, file, told)  # the last one is shown if it fails
        before = everything(folder)
        commands = next(words for start, words in READ_BY.items() if file.startswith(start))
        commands = (commands[seed // len(KINDS) % len(commands)],) if APART else commands
        refused = [words for words in commands if is_refused(words)]
        is_found = any(words not in ALWAYS_REFUSED for words in refused)
        assert is_found or not nothing_is_left or APART
        assert everything(folder) == before
        num_refused += is_found
        shutil.rmtree(folder)
    print(f"{kind}: {num_refused} of {len(seeds)} are refused")
    assert APART or num_refused >= LEAST[kind] * len(seeds)


def weights(**changes: object) -> Plant:
    return section(lambda q: q["config_groups"]["group_1"]["weights"].update(changes))


def value(name: str, times: float, kind: torch.dtype = torch.float32) -> Plant:
    return lambda folder: edit_shard(folder, lambda t: t | {name: (times * t[name]).to(kind)}, name)


def in_shard(name: str) -> Plant:
    return lambda folder: edit_index(folder, lambda listed: listed | {"norm.weight": name})


@pytest.mark.parametrize(
    ("folder", "plant"),
    [
        ("upstream", value("mtp.0.norm.weight", torch.nan)),
        ("upstream", value("mtp.0.hc_head_fn", torch.inf)),
        ("upstream", value("mtp.0.enorm.weight", 1, torch.float16)),
        *(("base", in_shard(name)) for name in ("../base/model-1.safetensors", "/etc/passwd")),
        *(("base", in_shard(name)) for name in ("a/model-1.safetensors", "..", "", "a\0")),
        *(("base", weights(group_size=size)) for size in (0, -5, None, "x")),
        ("base", value("norm.weight", 1, torch.float16)),
        ("base", lambda folder: (folder / "tokenizer.json").unlink()),
        ("base", section(lambda q: q["config_groups"]["group_0"].update(input_activations="x"))),
        ("base", set_config("compress_ratios", [0] * 10**6)),
        ("base", set_config("num_hidden_layers", 10**9)),
    ],
)
def test_what_vllm_would_not_load_or_read_as_noise_is_refused(
    miniature: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, plant: Plant
) -> None:
    enter(miniature, tmp_path / "here", monkeypatch)
    plant(tmp_path / "here/in" / folder)
    assert is_refused(READ_BY[folder][0])
