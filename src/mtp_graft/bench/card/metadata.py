"""The card's YAML header, as the hub reads it, and the licence, as the checkpoint states it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from mtp_graft.bench.card.cite import Citations
from mtp_graft.bench.card.collect import CardInputs
from mtp_graft.bench.card.made import hub_id
from mtp_graft.bench.card.quality import TITLES

_TAGS = ("deepseek-v4", "mtp", "speculative-decoding", "compressed-tensors", "mtp-graft")
#: By benchmark: hub id, config, split and metric. Our own tasks are no dataset of the hub.
_DATASETS = {
    "gsm8k": ("openai/gsm8k", "main", "test", "exact_match"),
    "humaneval": ("openai/openai_humaneval", None, "test", "pass@1"),
    "mmlu": ("cais/mmlu", "all", "test", "accuracy"),
}
_LICENSE_KEYS = ("license", "license_name", "license_link")
_LICENSE_TEXTS = {
    "apache-2.0": ("Apache License", "Version 2.0"),
    "mit": ("Permission is hereby granted, free of charge", 'THE SOFTWARE IS PROVIDED "AS IS"'),
}


@dataclass(frozen=True)
class License:
    """A licence, as the hub calls it, and the file of the checkpoint that says so."""

    metadata: dict[str, str]  # license, and for `other` license_name and license_link
    file: str | None


def find_license(checkpoint: Path) -> License:
    """Return the base's licence: of its README's header, or recognized by its text.

    Where neither says it, it is `unknown`: a licence is nothing to be guessed.
    """
    readme = checkpoint / "README.md"
    found = _stated(readme.read_text(errors="replace")) if readme.is_file() else {}
    if "license" in found:
        return License(found, readme.name)
    for path in sorted(checkpoint.glob("LICENSE*")):
        text = path.read_text(errors="replace")
        for name, marks in _LICENSE_TEXTS.items():
            if all(mark in text for mark in marks):
                return License({"license": name}, path.name)
    return License({"license": "unknown"}, None)


def _stated(readme: str) -> dict[str, str]:
    """Return what a README's YAML header says of the licence."""
    block = re.match(r"---\n(.*?)\n---\n", readme, re.DOTALL)
    lines = re.findall(
        r"^(license\w*):[ ]*[\"']?([^\s\"'#]+)", block[1] if block else "", re.MULTILINE
    )
    return {key: value for key, value in lines if key in _LICENSE_KEYS}


def header(inputs: CardInputs, license_: License, cite: Citations) -> str:
    """Return the YAML between the card's `---` lines; huggingface_hub checks the scores' form."""
    base = hub_id(inputs.stages.get("fetch"), "base")
    optional: dict[str, Any] = dict(license_.metadata)
    if base:
        optional |= {"base_model": base, "base_model_relation": "quantized"}
    data = ModelCardData(
        **optional,
        library_name="vllm",
        pipeline_tag="text-generation",
        tags=[*_TAGS, inputs.spliced.variant],
        model_name=inputs.name,
        eval_results=list(_eval_results(inputs, cite)) or None,
    )
    if data.eval_results is None:
        data.model_name = None
    return data.to_yaml().strip()


def _eval_results(inputs: CardInputs, cite: Citations) -> Iterator[EvalResult]:
    for measurement in inputs.of(*_DATASETS):
        dataset, config, split, metric = _DATASETS[measurement.benchmark]
        result = measurement.result
        yield EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=TITLES[measurement.benchmark],
            dataset_config=config,
            dataset_split=split,
            metric_type=metric,
            metric_name=f"{metric}, %, {cite.show('count', result['total'])} questions",
            metric_value=float(cite.show("percentage", result["score"])),
        )
