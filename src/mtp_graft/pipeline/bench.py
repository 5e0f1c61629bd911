"""The bench stage: what is measured on which server, one file a measurement."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from mtp_graft.bench.acceptance import measure_acceptance
from mtp_graft.bench.decode import DecodeConfig, compare, measure_turn
from mtp_graft.bench.requests import Report
from mtp_graft.checkpoint.capture import FinishedText, read_texts
from mtp_graft.checkpoint.manifest import CONFIG_NAME, claim_folder, fingerprints, read_result
from mtp_graft.checkpoint.shards import write_json
from mtp_graft.checkpoint.spliced import HEAD_SHARD
from mtp_graft.pipeline.folder import RunFolder
from mtp_graft.pipeline.servers import Servers
from mtp_graft.recipe import Recipe
from mtp_graft.serving.client import Prompt, ServerClient
from mtp_graft.serving.command import find_vllm
from mtp_graft.stages.calibration import iterate_prompts, take_fitting
from mtp_graft.stages.inputs import EVALUATION, REPORT_NAME


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

        The chosen head comes right after the base. Each has its server for itself, since two do
        not fit on one GPU; `bench decode --against` takes turns. Returns what the hardware made of
        the servers' options.
        """
        for needed in ("capture", "splice"):
            self._folder.finished(needed)  # said before anything is served
        self._claim()
        if self._measured("base") is None:
            with self._servers.serving(self._servers.measuring_options(base, 0), "base") as client:
                self.measure_base(client)
        for variant in self._recipe.served_variants:
            if not self.has_served(variant):
                checkpoint, k = self._folder.checkpoint(variant), self._recipe.bench.k
                options = self._servers.measuring_options(checkpoint, k)
                with self._servers.serving(options, variant) as client:
                    self._measure_variant(variant, client)
        mtp = self._measured("mtp") or {}
        compared = compare([self._measured("base") or {}], [mtp], self._config)
        self._write("decode", compared | {"adjusted": mtp["adjusted"]})
        return mtp["adjusted"]

    def measure_base(self, client: ServerClient) -> None:
        """Decode prompts that leave room for their answer, on a server of the base."""
        self._claim()
        wanted = self._recipe.bench
        longest = self._recipe.capture.max_model_len - wanted.max_tokens
        fit, _ = take_fitting(client, self._prompts(), wanted.count, longest, "bench")
        prompts = {each.prompt.id: each.token_ids for each in fit}
        found = measure_turn(
            client, prompts, self._config, self._report, "base: decode", with_margins=True
        )
        self._write("base", found)

    def has_served(self, variant: str) -> bool:
        """Return whether vLLM has loaded and served the variant's present head."""
        served = self._measured(f"served-{variant}")
        return served is not None and served["head"] == self._head(variant)

    def _claim(self) -> None:
        bench = self._recipe.bench
        asked = json.dumps([asdict(prompt) for prompt in islice(self._prompts(), bench.count)])
        claim_folder(
            self._folder.stage("bench"),
            {
                "bench": asdict(bench) | {"prompts": sha256(asked.encode()).hexdigest()},
                "serve": asdict(self._recipe.serve),
                "chosen": self._recipe.splice.variant,
                "vllm": str(find_vllm().version),
                "capture": fingerprints([self._folder.finished("capture") / CONFIG_NAME]),
            },
        )

    def _measure_variant(self, variant: str, client: ServerClient) -> None:
        """Note that a served variant loaded; measure its acceptance, and decode if chosen."""
        verified = read_result(self._folder.verified(variant))
        if verified is not None:
            write_json({**verified, "loaded_in_vllm": True}, self._folder.verified(variant))
        texts, captured = self._known_texts(), self._recipe.capture
        label, limits = f"acceptance: {variant}", (captured.new_tokens, captured.concurrency)
        served = measure_acceptance(client, texts, *limits, self._report, label)
        if variant == self._recipe.splice.variant:
            prompts = (self._measured("base") or {})["prompts"]
            found = measure_turn(client, prompts, self._config, self._report, "MTP: decode")
            self._write("mtp", found | {"adjusted": self._servers.adjusted})
        self._write(f"served-{variant}", served | {"head": self._head(variant)})

    def _prompts(self) -> Iterator[Prompt]:
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

    def _known_texts(self) -> list[FinishedText]:
        texts = [t for t in read_texts(self._folder.finished("capture")) if t.split == EVALUATION]
        return texts[: self._recipe.bench.acceptance_count]

    def _head(self, variant: str) -> dict[str, str]:
        return fingerprints([self._folder.checkpoint(variant) / HEAD_SHARD])

    def _measured(self, unit: str) -> dict[str, Any] | None:
        return read_result(self._folder.bench_unit(unit))

    def _write(self, unit: str, found: dict[str, Any]) -> None:
        write_json(found, self._folder.bench_unit(unit))
