"""The stages in order, on the bundled tiny model: splice, then decode with and without the head."""

import platform
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mtp_graft.bench.decode import DecodeConfig, Report, compare_decode
from mtp_graft.bench.prompts import load_prompts
from mtp_graft.checkpoint.manifest import write_manifest
from mtp_graft.checkpoint.shards import INDEX_NAME, write_json
from mtp_graft.errors import GraftError
from mtp_graft.serving.command import ServeOptions, find_vllm
from mtp_graft.stages.splice import Variant, splice

#: Held-out prompts and continuations of the tiny model fit in here.
_MAX_MODEL_LEN = 2048


@dataclass(frozen=True)
class DemoConfig:
    """What the demo runs on; the defaults take a few minutes on two CPU cores."""

    variant: Variant = "bf16"
    num_speculative_tokens: int = 1
    num_prompts: int = 8
    decode: DecodeConfig = field(default_factory=DecodeConfig)


@dataclass(frozen=True)
class ModelFolder:
    """A base without its head, the upstream shard that has it, and held-out prompts."""

    root: Path

    @property
    def base(self) -> Path:
        """Return the quantized checkpoint without `mtp.*`."""
        return self.root / "base"

    @property
    def upstream(self) -> Path:
        """Return the folder of the upstream-format head."""
        return self.root / "upstream"

    @property
    def prompts(self) -> Path:
        """Return the file of held-out prompts."""
        return self.root / "prompts.jsonl"


def find_model(folder: Path | None = None) -> ModelFolder:
    """Return the model in `folder`, or else the tiny one of the checkout we run from.

    Raises GraftError if a part of it is missing.
    """
    root = folder or Path(__file__).parents[2] / "models" / "tiny-dsv4"
    if folder is None and not root.is_dir():
        raise GraftError(
            f"{root}: not found; the tiny model is in the repository, not in the wheel: "
            "run from a checkout, or pass --model DIR"
        )
    model = ModelFolder(root)
    for part in (model.base, model.upstream, model.prompts):
        if not part.exists():
            raise GraftError(f"{part}: not found; expected base/, upstream/ and prompts.jsonl")
    return model


def run_demo(run: Path, model: ModelFolder, config: DemoConfig, report: Report) -> dict[str, Any]:
    """Graft the head onto the model's base, serve both, and write `run/bench/decode.json`.

    Returns the keys of the `demo` command's JSON: acceptance, decode speeds, whether the greedy
    text stayed the same, and the seconds of each stage.
    """
    prompts = load_prompts(model.prompts, config.num_prompts)
    device = f"{find_vllm().platform} ({platform.processor() or platform.machine()})"
    started = time.perf_counter()
    report("splice", 0, 0)
    # Our own output of an earlier run: a splice never overwrites.
    spliced = run / "splice" / model.root.resolve().name
    shutil.rmtree(spliced, ignore_errors=True)
    splice(model.base, model.upstream, spliced, config.variant)
    splice_s = time.perf_counter() - started

    started = time.perf_counter()
    decode = compare_decode(
        _serve_options(model.base, 0),
        _serve_options(spliced, config.num_speculative_tokens),
        prompts,
        config.decode,
        run / "logs",
        report,
    )
    decode_s = time.perf_counter() - started

    bench = run / "bench"
    bench.mkdir(parents=True, exist_ok=True)
    write_json(decode, bench / "decode.json")
    inputs = [folder / INDEX_NAME for folder in (model.base, spliced)] + [model.prompts]
    write_manifest(bench, "bench", asdict(config), inputs, device, decode_s)
    return {
        "acceptance": decode["acceptance"],
        "acceptance_served": {config.variant: decode["acceptance"]},
        "decode_tok_s": decode["decode_tok_s"],
        "greedy_identical": decode["greedy_identical"],
        "divergences": decode["divergences"],
        "seconds": {"splice": splice_s, "decode": decode_s},
        "report": None,
        "decode": decode,
    }


def _serve_options(checkpoint: Path, num_speculative_tokens: int) -> ServeOptions:
    """Return options under which the same prompt is computed the same way every time."""
    return ServeOptions(
        checkpoint,
        port=0,
        max_model_len=_MAX_MODEL_LEN,
        max_num_seqs=4,
        num_speculative_tokens=num_speculative_tokens,
        prefix_caching=False,
    )
