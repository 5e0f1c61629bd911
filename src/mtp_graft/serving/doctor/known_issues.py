"""What is known of vLLM: support, the plugin, and hangs and corruptions by number.

A row of `ISSUES` holds for every supported version and applies where its condition does. Only
issues with a source are here; `source` says where the behaviour is described.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mtp_graft import SUPPORTED_VLLM, TRIED_VLLM
from mtp_graft.serving.command import PLUGIN_NAME, is_supported, is_untried
from mtp_graft.serving.doctor.findings import Finding, Severity
from mtp_graft.serving.doctor.formats import format_of
from mtp_graft.serving.doctor.survey import Survey
from mtp_graft.serving.doctor.target import Target
from mtp_graft.serving.profiles import UNIFIED_MEMORY_UTILIZATION


@dataclass(frozen=True)
class KnownIssue:
    """A defect of vLLM itself, and whom it meets."""

    id: str
    severity: Severity
    applies: Callable[[Survey, Target], bool]
    what: str
    why: str
    cure: str
    source: str


def _link(target: Target) -> str:
    return target.hardware.link if target.hardware is not None else "none"


def _is_hopper(target: Target) -> bool:
    gpu = target.hardware.gpu if target.hardware is not None else None
    return gpu is not None and re.search(r"\bG?H[12]00\b", gpu) is not None


def _has_int4(survey: Survey) -> bool:
    return any(format_of(parts) == "int4" for parts in survey.stems.values())


def _is_one_group(survey: Survey, tp: int) -> bool:
    inner, hidden = (survey.config.get(key) for key in ("moe_intermediate_size", "hidden_size"))
    if not (_has_int4(survey) and isinstance(inner, int) and isinstance(hidden, int)):
        return False
    return inner // tp <= survey.group_size < hidden


ISSUES = (
    KnownIssue(
        "vllm-51513",
        "warning",
        lambda _survey, target: target.tp == 2 and _link(target) == "pcie",
        "two ranks without NVLink",
        "vLLM's custom all-reduce stays on for exactly two PCIe GPUs, relies on peer access, and "
        "can wait for ever after the weights are loaded; NCCL_P2P_DISABLE does not reach it",
        "--disable-custom-all-reduce, which `mtp-graft serve --profile` and `run` set",
        "vllm-project/vllm#51513; Acti card",
    ),
    KnownIssue(
        "vllm-42063",
        "note",
        lambda _survey, target: target.tp >= 4 and _link(target) == "pcie",
        "four ranks or more without NVLink",
        "an engine on four RTX PRO 6000 was reported to hang while it loads, with another model; "
        "the issue is open",
        "if it hangs: --tp 2, and see the issue",
        "vllm-project/vllm#42063",
    ),
    KnownIssue(
        "vllm-50196",
        "warning",
        lambda survey, target: (
            target.platform == "cuda"
            and not _is_hopper(target)
            and _is_one_group(survey, target.tp)
        ),
        "a rank's share of an INT4 expert is one group of scales",
        "with Marlin, vLLM's kernels for INT4 experts on all but Hopper GPUs, the scales of w1 and "
        "w3 then trade places in each 64 columns: other text and no error",
        "fewer ranks",
        "vllm-project/vllm#50196; docs/engine.md",
    ),
    KnownIssue(
        "vllm-46307",
        "warning",
        lambda _survey, target: target.hardware is not None and target.hardware.unified_memory,
        "memory that CPU and GPU share",
        "gpu_memory_utilization is no upper bound while vLLM profiles: the machine can run out of "
        "memory and stop answering",
        f"leave room: --gpu-memory-utilization {UNIFIED_MEMORY_UTILIZATION} or less, which "
        "`mtp-graft serve --profile` and `run` set, and watch the first start",
        "vllm-project/vllm#46307",
    ),
    KnownIssue(
        "piecewise-graphs",
        "note",
        lambda _survey, target: target.platform == "cuda",
        "piecewise CUDA graphs, vLLM's default, in an offline engine",
        "one that is forked, as they are by default, leaves attention out of them, and the head "
        "drafts without it (read in 0.33); a server is not forked",
        "`mtp-graft serve`, or VLLM_WORKER_MULTIPROC_METHOD=spawn",
        "docs/engine.md",
    ),
)


def known_issues(survey: Survey, target: Target) -> Iterator[Finding]:
    """Find the rows of ISSUES that meet this checkpoint on this target."""
    for issue in ISSUES:
        if issue.applies(survey, target):
            yield Finding(
                issue.id,
                issue.severity,
                f"vLLM {target.vllm or '(any)'} on {target.hardware or 'unknown hardware'}",
                issue.what,
                "a combination that nothing is known against",
                f"{issue.why} ({issue.source})",
                issue.cure,
            )


def vllm_version(_survey: Survey, target: Target) -> Iterator[Finding]:
    """Find a vLLM that is missing, too old for the plugin, or newer than any that was tried."""
    if target.vllm is None:
        yield Finding(
            "vllm-unknown",
            "note",
            "this Python environment",
            "no vLLM",
            f"vllm{SUPPORTED_VLLM}",
            "checks that depend on the version were left out",
            "install vLLM, or say with --gpu what will serve",
        )
    elif not is_supported(target.vllm):
        yield Finding(
            "vllm-unsupported",
            "error",
            "vLLM",
            str(target.vllm),
            SUPPORTED_VLLM,
            "the plugin is written against the model classes of these versions; with others vLLM "
            "logs 'Failed to load plugin mtp_graft' and goes on without it, or the classes differ",
            f"pip install 'mtp-graft[{'cpu' if target.platform == 'cpu' else 'gpu'}]'",
        )
    elif target.platform is not None and is_untried(target.vllm, target.platform):
        yield Finding(
            "vllm-untried",
            "warning",
            "vLLM",
            str(target.vllm),
            f"{TRIED_VLLM[target.platform]}, the newest that was tried",
            "the classes that the plugin extends may differ; strict loading finds that, or nothing",
            "try it as docs/engine.md says",
        )


def plugin(_survey: Survey, target: Target) -> Iterator[Finding]:
    """Find an environment in which vLLM will not load the plugin."""
    if not target.installed:
        return  # another environment will serve
    allowed = target.plugins_allowed
    blocked = allowed is not None and PLUGIN_NAME not in allowed.split(",")
    if target.plugin_found and not blocked:
        return
    yield Finding(
        "plugin-missing",
        "error" if not target.plugin_found else "warning",
        "VLLM_PLUGINS" if target.plugin_found else "entry points of vllm.general_plugins",
        repr(allowed) if target.plugin_found else f"no {PLUGIN_NAME}",
        f"{PLUGIN_NAME} among them",
        "stock vLLM serves this checkpoint wrongly or not at all: on a CPU it stops with "
        "NotImplementedError for MTP, on CUDA a head that is loaded in part drafts worse unnoticed",
        "`mtp-graft serve` adds it; a bare `vllm serve` needs VLLM_PLUGINS to name it"
        if target.plugin_found
        else "install mtp-graft into vLLM's environment (pip install mtp-graft)",
    )
