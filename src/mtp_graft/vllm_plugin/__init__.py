"""What stock vLLM lacks to serve a W4A16-FP8 DeepSeek-V4 with its MTP head, by kind of gap.

vLLM calls `register` in each of its processes. It names our variants of the DeepSeek-V4 classes in
vLLM's model registry, by path: they are imported, and the gaps filled, when such a model is built.
Other models never reach this package, but for `one_import` on a CPU.
"""

from mtp_graft.vllm_plugin import one_import


def register() -> None:
    """Name our DeepSeek-V4 target and drafters in vLLM's registry; safe to call twice."""
    from vllm import ModelRegistry, envs
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        platform = "cpu"
        if not envs.VLLM_ENABLE_V1_MULTIPROCESSING:
            one_import.import_once()
    elif current_platform.is_cuda():
        platform = "cuda"
    else:
        return
    package = f"{__name__}.{platform}"
    ModelRegistry.register_model("DeepseekV4ForCausalLM", f"{package}:DeepseekV4ForCausalLM")
    ModelRegistry.register_model("DeepSeekV4MTPModel", f"{package}:DeepSeekV4MTP")
    if platform == "cuda":  # vLLM has no DSpark for a CPU
        ModelRegistry.register_model("DSparkDraftModel", f"{package}:DSparkDeepseekV4ForCausalLM")
