"""Checks of config.json apart from its quantization section."""

from collections.abc import Iterator

from mtp_graft.serving.doctor.findings import Finding
from mtp_graft.serving.doctor.survey import Survey
from mtp_graft.serving.doctor.target import Target

_COUNT = "num_nextn_predict_layers"


def absent_head(survey: Survey, _target: Target) -> Iterator[Finding]:
    """Say so if the checkpoint is a base without a head."""
    if not survey.has_head:
        yield Finding(
            "head-absent",
            "note",
            "mtp.*",
            "no tensor of a head",
            "a base without its head serves, one token a step",
            "asked to draft with it, vLLM stops: 'MTP speculative decoding layer "
            f"{survey.num_layers} weights missing from checkpoint'",
            "`mtp-graft run` or `mtp-graft splice` adds the head",
        )


def head_count(survey: Survey, _target: Target) -> Iterator[Finding]:
    """Find a head that the config does not announce, or announces as several."""
    found = survey.config.get(_COUNT)
    if survey.has_head and found != 1:
        yield Finding(
            "nextn-count",
            "warning" if found is None else "error",
            f"config.json: {_COUNT}",
            "absent" if found is None else repr(found),
            "1, since mtp.0 is there",
            "vLLM takes the number of heads from here. Absent, it is 1 because transformers says "
            "so for this model; 0 stops vLLM with a ZeroDivisionError while it reads the "
            "speculative config; with more than 1 it looks for layers that are not there",
            "--fix sets it to 1",
            fixable=True,
        )


def compress_ratios(survey: Survey, _target: Target) -> Iterator[Finding]:
    """Find a list of compression ratios that does not fit the layers."""
    ratios, layers = survey.ratios, survey.num_layers
    where = "config.json: compress_ratios"
    wanted = f"{layers + 1} entries, the head's last and 0"
    if len(ratios) < layers:
        yield Finding(
            "compress-ratios",
            "error",
            where,
            f"{len(ratios)} entries" if ratios else repr(survey.config.get("compress_ratios")),
            f"at least one for each of {layers} layers",
            "vLLM stops with an IndexError when it builds the first layer beyond the list",
            "take config.json from the base's release",
        )
        return
    short, ends_wrong = len(ratios) == layers, len(ratios) > layers and ratios[layers] != 0
    if survey.has_head and (short or ends_wrong or len(ratios) > layers + 1):
        yield Finding(
            "compress-ratios",
            "warning",
            where,
            f"{len(ratios)} entries, {ratios[-1]} the last",
            wanted,
            "the head has a plain sliding window. vLLM 0.32 takes ratio 1 for it without looking; "
            "an engine that looks builds a compressor that no tensor fills, or finds no entry",
            "--fix sets the head's entry to 0",
            fixable=True,
        )
