"""The serving profiles as data: every flag and variable with its reason and its source.

The Acti card is the model card of LordNeel/DeepSeek-V4-Flash-Acti-MTP-W4A16-FP8, from which this
project started; its numbers were taken on two RTX PRO 6000 Max-Q with a patched vLLM. `plan.py`
fits a profile to the hardware at hand.
"""

from collections.abc import Mapping
from dataclasses import dataclass

ACTI = "Acti card"
ACTI_COMMAND = "Acti card, validated 524k command"
ACTI_ENVIRONMENT = "Acti card, required environment"
OURS = "ours, not in the Acti card and not run on its hardware"


@dataclass(frozen=True)
class Setting:
    """A flag or an environment variable of `vllm serve`."""

    name: str
    value: str | None  # None: a flag without a value
    why: str
    source: str

    def __str__(self) -> str:
        separator = " " if self.name.startswith("-") else "="
        return self.name if self.value is None else f"{self.name}{separator}{self.value}"

    def as_args(self) -> tuple[str, ...]:
        """Return a flag as words of a command line."""
        return (self.name,) if self.value is None else (self.name, self.value)


@dataclass(frozen=True)
class Profile:
    """How long and how many sequences may be."""

    max_model_len: int
    max_num_seqs: int
    gpu_memory_utilization: float
    why: str
    source: str


#: By name, the shortest context first; of two with the same length the first is what `auto` takes.
PROFILES: Mapping[str, Profile] = {
    "128k": Profile(131072, 8, 0.90, "many chats or agents at once", f"{ACTI}, table of profiles"),
    "256k": Profile(262144, 4, 0.95, "longer documents", f"{ACTI}, table of profiles"),
    "256k-2": Profile(
        262144, 2, 0.93, "two long streams; the rest as in the 524k command", ACTI_COMMAND
    ),
    "524k": Profile(
        524288,
        3,
        0.93,
        "one to three users with long contexts; the conservative variant is Acti's command "
        "with --max-num-seqs 2",
        f"{ACTI}, table of profiles",
    ),
    "640k": Profile(
        655360,
        2,
        0.93,
        "Acti ran 15 prompts at this length and gives no flags; taken from its 524k command",
        OURS,
    ),
    "1m": Profile(1048576, 1, 0.93, "all positions that the model has, one sequence", OURS),
}
DEFAULT_PROFILE = "524k"  # of the container, as on the Acti card

#: The most that a GPU may take of a memory that it shares with the CPU.
UNIFIED_MEMORY_UTILIZATION = 0.85
UNIFIED_MEMORY_WHY = (
    "the memory is the machine's as well, which can stop when it runs out while vLLM profiles "
    "(vllm-project/vllm#46307); 0.92 was tight on two DGX Sparks (pasta-paul's report in "
    "dsv4-flash-w4a16-fp8)"
)
#: `auto` lets as many sequences of full length run as fit, and no more than Acti ever tried.
MOST_SEQUENCES = 8

#: So that clients of Acti's server find their model; its validated 524k command.
SERVED_MODEL_NAMES = (
    "deepseek-v4-flash",
    "deepseek-v4-flash-mtp",
    "DSV4-W4A16-FP8",
    "deepseek-ai/DeepSeek-V4-Flash",
)
#: The step size of Acti's 524k command; its table gives none for the other profiles.
MAX_NUM_BATCHED_TOKENS = 8192
ACTI_HOST = "0.0.0.0"

#: What every server of this model gets, with or without a profile.
MODEL_FLAGS = (
    Setting(
        "--tokenizer-mode",
        "deepseek_v4",
        "the chat encoding is code in vLLM, there is no template file",
        ACTI_COMMAND,
    ),
    Setting(
        "--reasoning-parser",
        "deepseek_v4",
        "thinking goes into `reasoning`, the answer into `content`",
        ACTI_COMMAND,
    ),
    Setting("--enable-auto-tool-choice", None, "the model may call tools", ACTI_COMMAND),
    Setting("--tool-call-parser", "deepseek_v4", "reads the model's tool calls", ACTI_COMMAND),
)

#: On any GPU.
GPU_ENVIRONMENT = (
    Setting(
        "VLLM_USE_FLASHINFER_SAMPLER",
        "0",
        "Acti served without FlashInfer's sampler; not compared",
        ACTI_ENVIRONMENT,
    ),
)

#: Where several GPUs of one host have no NVLink between them.
PCIE_FLAGS = (
    Setting(
        "--disable-custom-all-reduce",
        None,
        "vLLM's own all-reduce uses peer access over PCIe with two ranks and can hang in it, "
        "whatever NCCL is told",
        f"{ACTI_COMMAND}; vllm-project/vllm#51513",
    ),
)
NCCL_SHARED_MEMORY = (
    Setting("NCCL_P2P_DISABLE", "1", "peer access over PCIe hung", ACTI_ENVIRONMENT),
    Setting("NCCL_IB_DISABLE", "1", "one host: no InfiniBand to look for", ACTI_ENVIRONMENT),
    Setting("NCCL_SHM_DISABLE", "0", "ranks speak through shared memory", ACTI_ENVIRONMENT),
)
NCCL_LATENCY = (
    Setting("NCCL_PROTO", "LL", "low latency for the small sums of decoding", ACTI_ENVIRONMENT),
    Setting("NCCL_ALGO", "Ring", "as above", ACTI_ENVIRONMENT),
    Setting("NCCL_MIN_NCHANNELS", "8", "as above", ACTI_ENVIRONMENT),
    Setting("NCCL_NTHREADS", "512", "as above", ACTI_ENVIRONMENT),
)
PCIE_ENVIRONMENT = NCCL_SHARED_MEMORY + NCCL_LATENCY

#: How the printed command differs from Acti's on purpose, whatever the hardware.
DIFFERENCES_FROM_ACTI = (
    "no --trust-remote-code: stock vLLM has the model's code",
    "VLLM_PLUGINS loads what stock vLLM lacks, where Acti patches vLLM (docs/engine.md)",
    "VLLM_ENABLE_DEEPSEEK_V4_SPARSE_MLA_WARMUP=0 left out: a switch of Acti's patched vLLM",
    "HF_HUB_OFFLINE and VLLM_NO_USAGE_STATS: a folder is served, nothing is fetched or reported",
    "VLLM_ENGINE_READY_TIMEOUT_S: half an hour, and a second for every 100 MB of weights",
)
