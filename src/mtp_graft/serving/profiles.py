"""The serving profiles as data, and the reason for every flag and variable of `vllm serve`.

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


#: By name, the shortest context first. Of two with the same length `auto` prefers the first.
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
DEFAULT_PROFILE = "524k"  # of the container, as on the Acti card

#: The most that a GPU may take of a memory that it shares with the CPU.
UNIFIED_MEMORY_UTILIZATION = 0.85
#: `auto` serves as many sequences of full length as fit, and no more than Acti ever tried.
MOST_SEQUENCES = 8
#: The step size of Acti's 524k command. Its table gives none for the other profiles.
MAX_NUM_BATCHED_TOKENS = 8192
#: So that clients of Acti's server find their model.
SERVED_MODEL_NAMES = (
    *("deepseek-v4-flash", "deepseek-v4-flash-mtp"),
    *("DSV4-W4A16-FP8", "deepseek-ai/DeepSeek-V4-Flash"),
)

#: What every server of this model gets, with or without a profile. True: a flag without a value.
MODEL_FLAGS: Mapping[str, str | bool] = {
    "--tokenizer-mode": "deepseek_v4",
    "--reasoning-parser": "deepseek_v4",
    "--enable-auto-tool-choice": True,
    "--tool-call-parser": "deepseek_v4",
    "--block-size": "256",
}
ENVIRONMENT: Mapping[str, str] = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
#: On any GPU.
GPU_ENVIRONMENT: Mapping[str, str] = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
#: Where several GPUs of one host have no NVLink between them.
PCIE_FLAGS = ("--disable-custom-all-reduce",)
PCIE_ENVIRONMENT: Mapping[str, str] = {
    "NCCL_P2P_DISABLE": "1",
    "NCCL_IB_DISABLE": "1",
    "NCCL_SHM_DISABLE": "0",
    "NCCL_PROTO": "LL",
    "NCCL_ALGO": "Ring",
    "NCCL_MIN_NCHANNELS": "8",
    "NCCL_NTHREADS": "512",
}

#: Why a command has a flag or a variable. "Acti": its validated command or required environment.
REASONS: Mapping[str, str] = {
    "--host": "where it listens; Acti: 0.0.0.0 (--host, and then an --api-key)",
    "--tokenizer-mode": "the chat encoding is code in vLLM, there is no template file (Acti)",
    "--reasoning-parser": "thinking goes into `reasoning`, the answer into `content` (Acti)",
    "--enable-auto-tool-choice": "the model may call tools (Acti)",
    "--tool-call-parser": "reads the model's tool calls (Acti)",
    "--block-size": "the only KV block size that the attention takes (Acti)",
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
    "--disable-custom-all-reduce": "vLLM's own all-reduce can hang over PCIe, whatever NCCL is "
    "told (Acti; vllm-project/vllm#51513)",
    "--nnodes": "run this on every machine, each with its --node-rank; where vLLM takes the wrong "
    "network, set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME",
    "HF_HUB_OFFLINE": "a folder is served: nothing is downloaded",
    "VLLM_NO_USAGE_STATS": "nothing is reported",
    "VLLM_PLUGINS": "adds what stock vLLM lacks, where Acti patches vLLM (docs/engine.md)",
    "VLLM_ENGINE_READY_TIMEOUT_S": "half an hour, and a second for every 100 MB of weights",
    "VLLM_API_KEY": "the key that requests to /v1 must show",
    "VLLM_USE_FLASHINFER_SAMPLER": "Acti served without FlashInfer's sampler; not compared",
    "NCCL_P2P_DISABLE": "peer access over PCIe hung (Acti)",
    "NCCL_IB_DISABLE": "one host: there is no InfiniBand to look for (Acti)",
    "NCCL_SHM_DISABLE": "ranks speak through shared memory (Acti)",
    "NCCL_PROTO": "low latency for the small sums of decoding (Acti)",
    "NCCL_ALGO": "the same",
    "NCCL_MIN_NCHANNELS": "the same",
    "NCCL_NTHREADS": "the same",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "no worker process, which would import vLLM once more",
    "OMP_NUM_THREADS": "half of the CPUs; the rest is the server's",
    "VLLM_CPU_OMP_THREADS_BIND": "the CPUs of every rank",
}
