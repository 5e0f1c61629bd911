"""Every head of the tiny model, measured alike: size, error, offline and served acceptance, speed.

    python benchmarks/variants_table.py --run RUN --out result.json [--prompts 96]

RUN is a finished run of `recipes/tiny.toml`. Its GPTQ head is quantized once more on a replay
without attention (`gptq identity`); then the heads are served in turn, each on the same held-out
prompts. Differences of acceptance are between the same texts, with bootstrap intervals over texts.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from record import write_result

from mtp_graft.stages.quantize import QuantizeConfig, quantize
from mtp_graft.stages.score import ScoreConfig, score
from mtp_graft.stages.splice import splice

MODEL = Path(__file__).resolve().parent.parent / "models" / "tiny-dsv4"
HEADS = ("rtn", "gptq", "gptq identity", "mxfp4", "bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--max-tokens", type=int, default=96)
    options = parser.parse_args()
    identity = without_attention(options.run)
    reports = {
        name: (
            read(folder / "quantize" / "report.json"),
            read(folder / "score" / "report.json"),
        )
        for name, folder in (("true", options.run), ("identity", identity))
    }
    results: dict[str, dict[str, Any]] = {}
    for head in HEADS:
        variant, replay = head.split()[0], "identity" if " " in head else "true"
        quantized, scored = reports[replay]
        folder = identity if replay == "identity" else options.run
        (checkpoint,) = (folder / "splice" / variant).iterdir()
        offline = scored["acceptance"][variant]
        results[head] = {
            **quantized["variants"][variant],
            "acceptance_offline": {k: offline[k] for k in ("top1", "tokens", "interval")},
            "served": serve(
                checkpoint, options.prompts, options.max_tokens, folder / f"{variant}.json"
            ),
        }
        print(head, results[head]["acceptance_offline"]["top1"], flush=True)
        write_result(options.out, "variants_table", results)


def without_attention(run: Path) -> Path:
    """Quantize, score and splice a GPTQ head on a replay without attention; return its folder."""
    folder = run.with_name(f"{run.name}-identity")
    inputs = (run / "capture", MODEL / "upstream", MODEL / "base")
    config = replace(QuantizeConfig(), replay="identity")
    quantize(*inputs, folder / "quantize", config, lambda *_: None)
    scoring = ScoreConfig(variants=("gptq",))
    capture, upstream, base = inputs
    score(capture, folder / "quantize", upstream, base, folder / "score", scoring, lambda *_: None)
    out = folder / "splice" / "gptq" / "tiny-dsv4-mtp"
    out.parent.mkdir(parents=True, exist_ok=True)
    splice(base, upstream, out, "gptq", quantized=folder / "quantize")
    return folder


def serve(checkpoint: Path, prompts: int, max_tokens: int, out: Path) -> dict[str, Any]:
    """Return what `bench decode` says of one head."""
    words = ["bench", "decode", "--checkpoint", str(checkpoint), "--json", str(out)]
    words += ["--prompts", str(MODEL / "evaluation.jsonl"), "--limit", str(prompts)]
    words += ["--rounds", "1", "--max-tokens", str(max_tokens)]
    subprocess.run([sys.executable, "-m", "mtp_graft.cli", *words], check=True)
    found: dict[str, Any] = read(out)
    return found


def read(path: Path) -> Any:
    return json.loads(path.read_text())


if __name__ == "__main__":
    main()
