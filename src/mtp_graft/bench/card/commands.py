"""The commands that serve the checkpoint as it was measured."""

import shlex
from collections.abc import Iterator

from mtp_graft.bench.card.cite import Citations, Node
from mtp_graft.bench.card.collect import CardInputs, Measurement

_BENCHMARKS = ("decode", "sweep", "workload", "gsm8k", "humaneval", "mmlu", "capability")


def serve_commands(inputs: CardInputs, cite: Citations) -> list[str]:
    """Return each way it was served once, in a shell's words; `auto` where none was recorded."""
    found = dict.fromkeys(_served(inputs, cite))
    return list(found) or [shlex.join(["mtp-graft", "serve", inputs.name, "--profile", "auto"])]


def _served(inputs: CardInputs, cite: Citations) -> Iterator[str]:
    for measurement in inputs.of(*_BENCHMARKS):
        server = measurement.config.get("server") if measurement.config else None
        if server is not None and server.get("files") is not None:
            words = ["mtp-graft", "serve", inputs.name, *_options(measurement, server, cite)]
            yield shlex.join(words)


def _options(measurement: Measurement, server: Node, cite: Citations) -> Iterator[str]:
    profile = server.get("profile")  # without one `serve` would take one, on a GPU
    yield from ("--profile", "none" if profile is None else cite.show("text", profile))
    if ranks := server.get("tensor_parallel_size"):
        yield from ("--tp", cite.show("text", ranks))
    if length := server.get("max_model_len"):
        yield from ("--max-model-len", cite.show("text", length))
    assert measurement.config is not None
    if (k := measurement.config.get("k")) is not None:
        yield from ("-k", cite.show("text", k))
    for key in ("draft_sample_method", "draft_lm_head_quantization"):
        if value := server.get(key):
            yield from (f"--{key.replace('_', '-')}", cite.show("text", value))
    if extra := list(server.get("extra_args") or ()):
        yield from ("--", *(cite.show("text", word) for word in extra))
