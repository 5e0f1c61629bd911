"""A stand-in for the `vllm` command: the HTTP surface we use, with text and timing known.

FAKE_VLLM holds JSON: `mode` and the numbers below. The token at position i of any answer is
`(sum(prompt) + 7 * i) % 1000`; with a draft head, every second step accepts its drafts, or as
`accepts` says. With MTP_GRAFT_RECORD it records prompts as our plugin does, other prompts around
each. A chat's prompt is the bytes of its messages. Where an answer has EOS it ends, unless the
request ignores that.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from struct import pack
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # as a process of its own
import http_stand_in

SETTINGS: dict[str, Any] = {
    # ok, dies, never_healthy, refuses, ignores_sigterm, drains: no completion comes back, and
    # SIGTERM ends the server once its clients have hung up
    "mode": "ok",
    "step_s": 0.0,
    "accepts": None,  # how many drafts the steps of an answer accept, over and over
    "diverge_at": None,  # a server with a draft head says 999 at this position
    "ends": {},  # sum of a prompt -> position at which its answer has EOS
    "exit_status": 0,  # of a server that SIGTERM or SIGINT ended
    "record": None,  # file that gets argv, environment and process ids
    "requests": None,  # file that gets a line per completion asked: its number of new tokens
    "dies_at": None,  # the completion during which it dies
    "records": "whole",  # or None, "parts" (as of chunked prefill), "full disk"
    "streams": None,  # file that gets a line per stream asked: the sum of its prompt
    "fails": [],  # numbers of streams, from 1, that get a status of 500
    **json.loads(os.environ.get("FAKE_VLLM", "{}")),
}
ARGV = sys.argv[1:]


def argument(name: str, default: str) -> str:
    return ARGV[ARGV.index(name) + 1] if name in ARGV else default


NUM_DRAFT = json.loads(argument("--speculative-config", "{}")).get("num_speculative_tokens", 0)
ACCEPTED: list[int] = []  # by every step with drafts so far
EOS = 1
WIDTH = 8  # of a recorded row: streams times hidden size


def answer(body: dict[str, Any], prompt: list[int], max_tokens: int) -> list[int]:
    tokens = [(sum(prompt) + 7 * i) % 1000 for i in range(max_tokens)]
    at = SETTINGS["diverge_at"]
    if NUM_DRAFT and at is not None and at < max_tokens:
        tokens[at] = 999
    end = SETTINGS["ends"].get(str(sum(prompt)), max_tokens)
    if end < max_tokens:
        tokens[end] = EOS
    return tokens if body.get("ignore_eos") else tokens[: end + 1]


def steps(num_tokens: int) -> list[int]:
    """Split tokens into the steps that make them; the first comes from prefill alone."""
    sizes = [1]
    for accepted in accepted_drafts(num_tokens):
        if NUM_DRAFT:
            ACCEPTED.append(accepted)
        sizes.append(min(num_tokens - sum(sizes), 1 + accepted))
    return sizes


def accepted_drafts(num_tokens: int) -> list[int]:
    """Return what each step accepts, of the last also what is past the end, as vLLM counts it."""
    accepted: list[int] = []
    while 1 + len(accepted) + sum(accepted) < num_tokens:
        accepts = SETTINGS["accepts"] or (NUM_DRAFT, 0)
        accepted.append(min(accepts[len(accepted) % len(accepts)], NUM_DRAFT))
    return accepted


def counted(num_tokens: int) -> dict[str, Any] | None:
    """Return what a server that was asked to count tells of a request's drafts."""
    if argument("--per-request-spec-decode-metrics", "none") != "detailed":
        return None
    accepted = accepted_drafts(num_tokens)
    if not NUM_DRAFT or not accepted:
        nothing = {"per_step_accepted": None, "per_step_drafted": None}
        return {"speculative_decoding": {"num_spec_steps": 0} | nothing}
    drafted = [NUM_DRAFT] * len(accepted)
    return {"speculative_decoding": {"per_step_accepted": accepted, "per_step_drafted": drafted}}


def metrics() -> str:
    lines = ["# TYPE vllm:spec_decode_num_drafts counter", "vllm:num_requests_running 0.0"]
    label, told = 'engine="0",model_name="m{0}"', [*ACCEPTED]
    drafted = len(told) * NUM_DRAFT
    numbers = {"drafts": len(told), "draft_tokens": drafted, "accepted_tokens": sum(told)}
    for name, value in numbers.items() if NUM_DRAFT else ():
        lines.append(f"vllm:spec_decode_num_{name}_total{{{label}}} {float(value)}")
        lines.append(f"vllm:spec_decode_num_{name}_created{{{label}}} 1.7e+09")
    for at in range(NUM_DRAFT):
        place, value = f'{label},position="{at}"', sum(accepted > at for accepted in told)
        lines.append(f"vllm:spec_decode_num_accepted_tokens_per_pos_total{{{place}}} {value}.0")
    return "\n".join(lines) + "\n"


LOCK = threading.Lock()
ASKED: list[int] = []
STREAMED: list[int] = []


def note(seen: list[int], file: str, number: int) -> int:
    """Note a request by a number, in a file, too; return how many of its kind there were."""
    with LOCK:
        seen.append(number)
        if SETTINGS[file]:
            with open(SETTINGS[file], "a") as out:
                out.write(f"{number}\n")
        if seen is ASKED and len(seen) == SETTINGS["dies_at"]:
            print("RuntimeError: died in the middle", flush=True)
            os._exit(7)
        return len(seen)


def record(prompt: list[int]) -> None:
    """Write a recording of `prompt` between two prompts of somebody else."""
    folder = os.environ.get("MTP_GRAFT_RECORD")
    if not folder or not os.path.exists(f"{folder}/recording-on") or not SETTINGS["records"]:
        return
    if SETTINGS["records"] == "full disk":
        print("OSError: [Errno 28] No space left on device", flush=True)
        Path(folder, "recording-intact").unlink(missing_ok=True)
        return
    tokens = [1, 2, *(prompt[:-1] if SETTINGS["records"] == "parts" else prompt), 3]
    rows = [float(t * column % 61) for t in tokens for column in range(1, WIDTH + 1)]
    tensors = {
        "token_ids": ("I32", [len(tokens)], int32(tokens)),
        # A BF16 is the upper half of a float32; of such small numbers the lower half is zero.
        "residual": ("BF16", [len(tokens), WIDTH], b"".join(pack("<f", v)[2:] for v in rows)),
        "targets": ("I32", [len(tokens)], int32([token + 1 for token in tokens])),
        "starts": ("I32", [3], int32([0, 2, len(tokens) - 1])),
    }
    if taps := os.environ.get("MTP_GRAFT_RECORD_TAPS"):
        width = len(taps.split(",")) * WIDTH // 2  # of two streams' means
        tensors["taps"] = ("BF16", [len(tokens), width], bytes(2 * width * len(tokens)))
    with LOCK:
        number = len(os.listdir(f"{folder}/recordings"))
        while os.path.exists(path := f"{folder}/recordings/{number:06d}.safetensors"):
            number += 1
        with open(path + ".tmp", "wb") as file:
            file.write(as_safetensors(tensors))
        os.rename(path + ".tmp", path)


def int32(values: list[int]) -> bytes:
    return pack(f"<{len(values)}i", *values)


def as_safetensors(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """Return such a file's bytes; importing torch for it would take seconds of every test."""
    header, data = {}, b""
    for name, (dtype, shape, values) in tensors.items():
        extent = [len(data), len(data) + len(values)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": extent}
        data += values
    head = json.dumps(header).encode()
    return pack("<Q", len(head)) + head + data


class Handler(http_stand_in.Handler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/health":
            self.reply(503 if SETTINGS["mode"] == "never_healthy" else 200, "")
        elif self.path == "/v1/models":
            self.reply(200, {"data": [{"id": "m", "root": "m"}]})
        else:
            self.reply(200, metrics())

    def do_POST(self) -> None:
        body = self.body()
        if self.path == "/tokenize":
            text = body.get("prompt") or "".join(m["content"] for m in body["messages"])
            start = [0] if body.get("add_special_tokens", "messages" in body) else []
            self.reply(200, {"tokens": [*start, *text.encode()]})
        elif SETTINGS["mode"] == "refuses":
            print("ERROR 11-23 20:00:00 [serving.py:1] ValueError: no such kernel", flush=True)
            self.reply(500, {"error": {"message": "engine is broken"}})
        elif SETTINGS["mode"] == "drains":
            note(ASKED, "requests", body["max_tokens"])
            self.connection.recv(1)
            os._exit(SETTINGS["exit_status"])
        elif self.path == "/v1/chat/completions":
            prompt = list("".join(m["content"] for m in body["messages"]).encode())
            self.stream(body, prompt, body.get("max_tokens", 24), True)
        elif body.get("stream"):
            self.stream(body, body["prompt"], body["max_tokens"], False)
        else:
            note(ASKED, "requests", body["max_tokens"])
            record(body["prompt"])
            time.sleep(SETTINGS["step_s"])
            choice = self.choice(body)
            found = {"choices": [choice], "metrics": counted(len(choice["token_ids"]))}
            self.reply(200, found)

    def choice(self, body: dict[str, Any]) -> dict[str, Any]:
        tokens = answer(body, body["prompt"], body["max_tokens"])
        steps(len(tokens))
        choice: dict[str, Any] = {"token_ids": tokens, "finish_reason": "length"}
        if body.get("logprobs"):
            top = [{f"token_id:{t}": -0.5, "token_id:998": -0.75 - i} for i, t in enumerate(tokens)]
            choice["logprobs"] = {"top_logprobs": top}
        return choice

    def stream(self, body: dict[str, Any], prompt: list[int], max_tokens: int, chat: bool) -> None:
        number = note(STREAMED, "streams", sum(prompt))
        if body.get("temperature"):  # another text every time
            prompt = [*prompt, len(STREAMED)]
        if number in SETTINGS["fails"]:
            self.reply(500, {"error": {"message": "out of luck"}})
            return
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        if chat:
            self.event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        tokens, done = answer(body, prompt, max_tokens), 0
        for size in steps(len(tokens)):
            time.sleep(SETTINGS["step_s"])
            new = tokens[done : done + size]
            text: dict[str, Any] = {"text": "".join(f" {t}" for t in new)}
            if chat:
                text = {"delta": {"content": "x" * size}}
            self.event({"choices": [{"token_ids": new, "finish_reason": None, **text}]})
            done += size
        self.event({"choices": [{"token_ids": [], "finish_reason": "length", "text": ""}]})
        if body.get("stream_options"):
            usage = {"prompt_tokens": len(prompt), "completion_tokens": len(tokens)}
            self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, content: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(content)}\n\n".encode())


def stop(_signum: int, _frame: object) -> None:
    if SETTINGS["mode"] not in ("ignores_sigterm", "drains"):
        os._exit(SETTINGS["exit_status"])


def main() -> None:
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    # A worker that outlives its parent unless somebody ends the group.
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    if SETTINGS["record"]:
        Path(os.environ["VLLM_RPC_BASE_PATH"], "socket").touch()
        record = {"argv": ARGV, "env": dict(os.environ), "pids": [os.getpid(), worker.pid]}
        with open(SETTINGS["record"] + ".tmp", "w") as file:
            json.dump(record, file)
        os.rename(SETTINGS["record"] + ".tmp", SETTINGS["record"])
    if SETTINGS["mode"] == "dies":
        print("INFO loading", "(EngineCore pid=7) ERROR 11-23 20:00:00 [core.py:9] ", sep="\n")
        print("(EngineCore pid=7) ERROR 11-23 20:00:00 [core.py:9] KeyError: 'c1a'")
        print("RuntimeError: Engine core initialization failed. See root cause above.", flush=True)
        sys.exit(3)
    host, port = argument("--host", "127.0.0.1"), int(argument("--port", "8000"))
    with http_stand_in.serving(Handler, host, port):
        while True:  # `signal.pause` would miss a signal that comes just before it
            time.sleep(0.1)


if __name__ == "__main__":
    main()
