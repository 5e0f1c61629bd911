"""The bench stage: what is measured on which server, one file a measurement."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from mtp_graft.bench.acceptance import KnownText, measure_acceptance
from mtp_graft.bench.decode import DecodeConfig, Report, compare, measure_base, measure_mtp
from mtp_graft.checkpoint.capture import read_texts
from mtp_graft.checkpoint.manifest import CONFIG_NAME, claim_folder, fingerprints, read_result
from mtp_graft.checkpoint.shards import write_json
from mtp_graft.checkpoint.spliced import HEAD_SHARD
from mtp_graft.pipeline.folder import RunFolder
from mtp_graft.pipeline.servers import Servers
from mtp_graft.recipe import Recipe
from mtp_graft.serving.client import ServerClient
from mtp_graft.serving.command import find_vllm
from mtp_graft.serving.prompts import ChatPrompt, Prompt
from mtp_graft.stages.calibration import iterate_prompts, take_fitting
from mtp_graft.stages.inputs import REPORT_NAME

EVALUATION = "evaluation"  # the split that scores and served acceptance are measured on


class Bench:
    """The measurements of one run; those that are done are not done again."""

    def __init__(self, recipe: Recipe, folder: RunFolder, servers: Servers, report: Report) -> None:
        self._recipe = recipe
        self._folder = folder
        self._servers = servers
        self._report = report
        self._config = DecodeConfig(recipe.bench.max_tokens, recipe.bench.rounds)

    def run(self, base: Path) -> list[str]:
        """Measure whatever has not been, then compare decoding with the base's.

        The base comes first and the chosen head right after it. Each has its server for itself,
        since two do not fit on one GPU; `bench decode --against` takes turns. Returns what the
        hardware made of the servers' options.
        """
        for needed in ("capture", "splice"):
            self._folder.finished(needed)  # said before anything is served
        self._claim()
        if read_result(self._folder.bench_unit("base")) is None:
            found = self._measure_base(base)
            write_json(found | self._adjusted(), self._folder.bench_unit("base"))
        k = self._recipe.bench.k
        for variant in self._recipe.served_variants:
            if not self._is_done(variant):
                checkpoint = self._folder.checkpoint(variant)
                with self._servers.measured(checkpoint, k, variant) as client:
                    self._measure_variant(variant, client)
        base_unit, mtp_unit = self._unit("base"), self._unit("mtp")
        both = (*base_unit.get("adjusted", ()), *mtp_unit.get("adjusted", ()))
        adjusted = list(dict.fromkeys(both))
        decode = compare(base_unit, mtp_unit) | {"adjusted": adjusted}
        write_json(decode, self._folder.bench_unit("decode"))
        return adjusted

    def _measure_base(self, base: Path) -> dict[str, Any]:
        """Decode prompts that leave room for their answer, on a server of the base."""
        wanted = self._recipe.bench
        longest = self._recipe.capture.max_model_len - wanted.max_tokens
        with self._servers.measured(base, 0, "base") as client:
            fit, _ = take_fitting(client, self._prompts(), wanted.count, longest, "bench")
            prompts = [encoded.prompt for encoded in fit]
            return measure_base(client, prompts, self._config, self._report)

    def _claim(self) -> None:
        bench = self._recipe.bench
        asked = json.dumps([asdict(prompt) for prompt in islice(self._prompts(), bench.count)])
        claim_folder(
            self._folder.stage("bench"),
            {
                "bench": asdict(bench) | {"prompts": sha256(asked.encode()).hexdigest()},
                "serve": asdict(self._recipe.serve),
                "vllm": str(find_vllm().version),
                "capture": fingerprints([self._folder.finished("capture") / CONFIG_NAME]),
            },
        )

    def has_served(self, variant: str) -> bool:
        """Return whether vLLM has loaded and served the variant's present head."""
        served = read_result(self._folder.bench_unit(f"served-{variant}"))
        return served is not None and served["head"] == self._head(variant)

    def _is_done(self, variant: str) -> bool:
        """Return whether all that a variant's server is needed for has been measured."""
        if not self.has_served(variant):
            return False
        return variant != self._recipe.splice.variant or self._folder.bench_unit("mtp").exists()

    def _measure_variant(self, variant: str, client: ServerClient) -> None:
        """Note that a served variant loaded; measure its acceptance, and decode if chosen."""
        verified = read_result(self._folder.verified(variant))
        if verified is not None:
            write_json({**verified, "loaded_in_vllm": True}, self._folder.verified(variant))
        texts, captured = self._known_texts(), self._recipe.capture
        label, limits = f"acceptance: {variant}", (captured.new_tokens, captured.concurrency)
        served = measure_acceptance(client, texts, *limits, self._report, label)
        if variant == self._recipe.splice.variant:
            mtp = measure_mtp(client, self._unit("base"), self._config, self._report)
            write_json(mtp | self._adjusted(), self._folder.bench_unit("mtp"))
        head = {"head": self._head(variant)}
        write_json(served | head, self._folder.bench_unit(f"served-{variant}"))

    def _adjusted(self) -> dict[str, list[str]]:
        return {"adjusted": self._servers.adjusted}

    def _prompts(self) -> Iterator[Prompt | ChatPrompt]:
        """Yield prompts to time, none of them captured."""
        wanted, capture = self._recipe.bench, self._recipe.capture
        captured = read_result(self._folder.finished("capture") / REPORT_NAME) or {}
        taken = Counter(captured["splits"]) + Counter(
            p["split"] for p in captured.get("dropped", ())
        )
        skip = 0
        if wanted.prompts == capture.calibration_prompts:
            skip += taken["calibration"]
        if wanted.prompts == capture.evaluation_prompts:
            skip += taken[EVALUATION]
        return islice(iterate_prompts(wanted.prompts), skip, None)

    def _known_texts(self) -> list[KnownText]:
        texts = [t for t in read_texts(self._folder.finished("capture")) if t.split == EVALUATION]
        served = texts[: self._recipe.bench.acceptance_count]
        return [KnownText(t.id, t.prompt, t.continuation) for t in served]

    def _head(self, variant: str) -> dict[str, str]:
        return fingerprints([self._folder.checkpoint(variant) / HEAD_SHARD])

    def _unit(self, unit: str) -> dict[str, Any]:
        found = read_result(self._folder.bench_unit(unit))
        assert found is not None, f"{unit} is measured before it is read"
        return found
