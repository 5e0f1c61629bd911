"""Say whether a demo's result is one: `python tools/check_demo.py RESULT.json`, after `make demo`.

That the numbers are right is for the tests; here every stage has run and the user has a report.
"""

import json
import sys
from pathlib import Path

HEADS = {"rtn", "gptq", "mxfp4", "bf16"}


def main() -> None:
    result = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    offline, served = result["acceptance_offline"], result["acceptance_served"]
    assert set(offline) == HEADS and "gptq" in served, (offline, served)
    assert all(0.7 < share < 0.9 for share in (*offline.values(), *served.values())), result
    assert result["acceptance"] == served["gptq"]
    assert len(result["acceptance_by_position"]) == result["k"]
    assert 1.5 < result["acceptance_length"] < 1 + result["k"]
    assert set(result["decode_tok_s"]) == {"base", "mtp"}
    assert all(speed > 0 for speed in result["decode_tok_s"].values()), result["decode_tok_s"]
    assert result["greedy_identical"] is True and result["divergences"] == []
    assert Path(result["report"]).stat().st_size > 20_000, result["report"]
    seconds = {stage: round(s) for stage, s in result["seconds"].items()}
    print(f"the demo's result is sane; {sum(seconds.values())} s: {seconds}")


if __name__ == "__main__":
    main()
