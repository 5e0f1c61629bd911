"""Prompts to decode from; the stages load theirs the same way."""

from mtp_graft.serving.prompts import Prompt, load_prompts

__all__ = ["Prompt", "load_prompts"]
