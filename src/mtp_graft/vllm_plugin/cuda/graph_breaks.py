"""Gap: in a forked engine piecewise CUDA graphs leave attention out (read in 0.33).

vLLM cuts this model's graphs around attention with a decorator that does nothing unless
`VLLM_USE_BREAKABLE_CUDAGRAPH` is set when the module is imported. vLLM sets the variable itself,
but later: looking up the checkpoint's quantization has imported the module by then, and an engine
that is forked inherits the methods without the decorator. Attention is then captured in a dummy
step, which has nothing to attend to, and replayed like that. The drafter always takes piecewise
graphs.
"""

from typing import Any

#: The methods that vLLM decorates.
BREAKS = ("_prepare_and_attn_eager", "_sparse_indexer_and_attn")

#: The methods that `apply` found undecorated in this process.
remedied: list[str] = []


def apply() -> None:
    """Let attention run outside of the graphs, where vLLM meant it to; safe to call twice."""
    from vllm.compilation import breakable_cudagraph
    from vllm.models.deepseek_v4 import attention

    if breakable_cudagraph.is_breakable_cudagraph_enabled():
        remedied.extend(decorate(attention, breakable_cudagraph.eager_break_during_capture))


def decorate(module: Any, decorator: Any) -> list[str]:
    """Put `decorator` on those BREAKS of the classes in `module` that lack it; name them."""
    found: list[str] = []
    for owner in vars(module).values():
        if not isinstance(owner, type) or owner.__module__ != module.__name__:
            continue
        for name in BREAKS:
            method = vars(owner).get(name)
            if method is not None and not hasattr(method, "__wrapped__"):
                setattr(owner, name, decorator(method))
                found.append(f"{owner.__name__}.{name}")
    return found
