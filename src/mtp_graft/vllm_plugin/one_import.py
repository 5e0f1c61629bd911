"""Gap: a server on a CPU imports vLLM up to four times, ten seconds of a core each.

Its engine, and what looks at a model's class, are Pythons of their own, since CUDA, once begun,
survives no fork. Here the engine is a fork, and classes are looked at in place. OpenMP survives a
fork before its first threads: a server has none when it starts its engine. Seen in 0.32.
"""

import multiprocessing

from mtp_graft.vllm_plugin.replacing import replace


def import_once() -> None:
    """Replace both, in a process whose engine computes without workers."""
    from vllm.model_executor.models import registry
    from vllm.v1.engine import utils

    replace(registry, "_run_in_subprocess", lambda fn: fn())
    replace(utils, "get_mp_context", lambda: multiprocessing.get_context("fork"))
