"""What `mtp-graft tune` measured beside a checkpoint, and how `serve` takes it."""

from dataclasses import replace
from typing import Any

from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt

from mtp_graft.checkpoint.files import TUNED_NAME, read_as
from mtp_graft.serving import command
from mtp_graft.serving.command import ServeOptions


class Tuned(BaseModel):
    """What `serve` reads of TUNED_NAME."""

    schedule: tuple[tuple[PositiveInt, PositiveInt, NonNegativeInt], ...] = Field(min_length=1)
    draft_lm_head_quantization: command.DraftLmHead | None
    draft_sample_method: command.DraftSampling | None
    device: str
    vllm: str
    serve: str  # a command that serves as it was measured, but for the drafts
    date: str


def with_tuned(options: ServeOptions, device: str, vllm: command.InstalledVllm) -> ServeOptions:
    """Return options that draft as given, tuned or by default; GraftError for a broken file."""
    path, on_gpu = options.checkpoint / TUNED_NAME, vllm.platform == "cuda"
    if options.num_speculative_tokens is not None:
        return options
    if not path.exists():
        k = command.num_speculative_tokens(options, vllm.platform)
        known = " (step times of Flash's size: docs/results.md)" if on_gpu and k == 3 else ""
        said = f"k = {k}: the default{known}; mtp-graft tune measures what pays here"
        return replace(options, why=(said,) if k else ())
    tuned = read_as(Tuned, path, "what mtp-graft tune writes", "remove it, or tune again")
    ks = ", ".join(f"{k} for {first} to {last} requests" for first, last, k in tuned.schedule)
    where = f"tuned on {tuned.device}, vLLM {tuned.vllm}, {tuned.date}, as `{tuned.serve}`"
    why: tuple[str, ...] = (f"k = {ks}: {where} ({TUNED_NAME}; or give --k)",)
    if (device, here := f"{vllm.version} ({vllm.platform})") != (tuned.device, tuned.vllm):
        why += (f"warning: tuned on another device or vLLM than {device}, vLLM {here}",)
    names = ("draft_lm_head_quantization", "draft_sample_method") if on_gpu else ()
    taken: dict[str, Any] = {name: getattr(options, name) or getattr(tuned, name) for name in names}
    k = max(k for *_, k in tuned.schedule)
    return replace(options, num_speculative_tokens=k, schedule=tuned.schedule, why=why, **taken)
