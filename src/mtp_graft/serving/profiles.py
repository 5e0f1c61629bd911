"""The serving profiles as data, and every flag and variable of `vllm serve` with its reason.

The Acti card is the model card of LordNeel/DeepSeek-V4-Flash-Acti-MTP-W4A16-FP8, from which this
project started. Its numbers were taken on two RTX PRO 6000 Max-Q with a patched vLLM. `plan.py`
fits a profile to the hardware.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """How long and how many sequences may be, and the share of a GPU's memory for all of vLLM."""

    max_model_len: int
    max_num_seqs: int
    gpu_memory_utilization: float
    why: str


#: By name, the shortest context first. Of two that reach as far `auto` prefers the first.
PROFILES: Mapping[str, Profile] = {
    "128k": Profile(131072, 8, 0.90, "many chats or agents at once (Acti card, table)"),
    "256k": Profile(262144, 4, 0.95, "longer documents (Acti card, table)"),
    "256k-2": Profile(262144, 2, 0.93, "two long documents at once (Acti card, below its command)"),
    "524k": Profile(
        524288, 3, 0.93, "one to three users (Acti card, table; its command has --max-num-seqs 2)"
    ),
    "640k": Profile(
        655360, 2, 0.93, "Acti's second workload run, without flags; ours, not run on its hardware"
    ),
    "1m": Profile(1048576, 1, 0.93, "all positions of the model; ours, not run on its hardware"),
}

#: The most that a GPU may take of a memory that it shares with the CPU.
UNIFIED_MEMORY_UTILIZATION = 0.85
#: Of `auto`, the most that Acti tried: vLLM lets those wait that the cache has no room for.
MAX_NUM_SEQS = 8
#: The step size of Acti's 524k command. Its table gives none for the other profiles.
MAX_NUM_BATCHED_TOKENS = 8192
#: So that clients of Acti's server find their model.
SERVED_MODEL_NAMES = (
    "deepseek-v4-flash",
    "deepseek-v4-flash-mtp",
    "DSV4-W4A16-FP8",
    "deepseek-ai/DeepSeek-V4-Flash",
)


#: Flags and environment variables: the value (True: a flag without one), and why it is there.
Settings = Mapping[str, tuple[str | bool, str]]

#: What every server of this model gets. "Acti": its validated command or required environment.
ALWAYS: Settings = {
    "--tokenizer-mode": ("deepseek_v4", "vLLM has the chat encoding as code (Acti)"),
    "--reasoning-parser": ("deepseek_v4", "separates thinking (`reasoning`) from `content` (Acti)"),
    "--enable-auto-tool-choice": (True, "the model may call tools (Acti)"),
    "--tool-call-parser": ("deepseek_v4", "reads the model's tool calls (Acti)"),
    "--block-size": ("256", "the only KV block size that the attention takes (Acti)"),
    "--shutdown-timeout": ("10", "SIGTERM lets requests in work finish, for so many seconds"),
    "HF_HUB_OFFLINE": ("1", "a folder is served: nothing is downloaded"),
    "VLLM_NO_USAGE_STATS": ("1", "nothing is reported"),
}
ON_GPUS: Settings = {
    "VLLM_USE_FLASHINFER_SAMPLER": ("0", "Acti: served without FlashInfer's sampler; not compared")
}
#: Where several GPUs of one host have no NVLink between them.
ON_PCIE: Settings = {
    "--disable-custom-all-reduce": (
        True,
        "vLLM's own all-reduce can hang over PCIe (Acti; vllm-project/vllm#51513)",
    ),
    "NCCL_P2P_DISABLE": ("1", "peer access over PCIe hung (Acti)"),
    "NCCL_IB_DISABLE": ("1", "one host: there is no InfiniBand to look for (Acti)"),
    "NCCL_SHM_DISABLE": ("0", "ranks speak through shared memory (Acti)"),
    "NCCL_PROTO": ("LL", "low latency for the small sums of decoding (Acti)"),
    "NCCL_ALGO": ("Ring", "the same"),
    "NCCL_MIN_NCHANNELS": ("8", "the same"),
    "NCCL_NTHREADS": ("512", "the same"),
}


def split(settings: Settings) -> tuple[dict[str, str | bool], dict[str, str]]:
    """Return the values of the flags and of the environment variables."""
    flags = {name: value for name, (value, _) in settings.items() if name.startswith("--")}
    return flags, {name: str(value) for name, (value, _) in settings.items() if name not in flags}


#: Why a command has a flag or a variable.
REASONS: Mapping[str, str] = {
    **{name: why for group in (ALWAYS, ON_GPUS, ON_PCIE) for name, (_, why) in group.items()},
    "--host": "where it listens; Acti: 0.0.0.0 (--host, and then an --api-key)",
    "--kv-cache-dtype": "the type of the KV cache (Acti: fp8, for which the estimate is)",
    "--tensor-parallel-size": "how many GPUs share the model",
    "--max-model-len": "the longest sequence: as asked for, the profile's, or what fits",
    "--max-num-seqs": "requests at once",
    "--max-num-batched-tokens": "tokens of a step (Acti: 8192); on a CPU it holds a whole prompt",
    "--served-model-name": "clients of Acti's server find their model",
    "--gpu-memory-utilization": "vLLM's share of the memory; at most 0.85 where it is the machine's"
    " as well (vllm-project/vllm#46307; 0.92 was tight on two DGX Sparks)",
    "--kv-cache-memory-bytes": "the KV cache; without it vLLM on a CPU reserves most of the memory",
    "--enforce-eager": "nothing is compiled",
    "--speculative-config": "drafts a step: 3 on a GPU, where one CUDA graph computes them, else 1 "
    "as Acti (--k); probabilistic: accepted more often at a temperature above 0",
    "--nnodes": "run this on every machine, each with its --node-rank; where vLLM takes the wrong "
    "network, set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME",
    "VLLM_PLUGINS": "adds what stock vLLM lacks, where Acti patches vLLM (docs/engine.md)",
    "VLLM_ENGINE_READY_TIMEOUT_S": "half an hour, and a second for every 100 MB of weights",
    "VLLM_API_KEY": "the key that requests to /v1 must show",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "no worker process, which would import vLLM once more",
    "OMP_NUM_THREADS": "half of the CPUs; the rest is the server's",
    "VLLM_CPU_OMP_THREADS_BIND": "the CPUs of every rank",
}
