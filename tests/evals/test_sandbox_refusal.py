"""Machines that cannot confine, and layers that do not exist."""

import shutil
import subprocess
import sys

import pytest

from mtp_graft.bench.evals.sandbox import Sandbox
from mtp_graft.errors import GraftError


def test_a_layer_that_the_machine_refuses_stops_the_run_and_is_named() -> None:
    """Inside a user namespace that allows no further one, as in many containers."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("no unshare command to make such a machine with")
    code = (
        "from mtp_graft.bench.evals.sandbox import Sandbox, Task\n"
        "from mtp_graft.errors import GraftError\n"
        "task = Task('def f(): return 1', 'f', 'def check(c): assert c() == 1')\n"
        "for act in (Sandbox().require, lambda: Sandbox().judge(task)):\n"
        "    try:\n        act()\n    except GraftError as error:\n        print(error)\n"
        "print(Sandbox(frozenset({'namespaces'})).judge(task).passed)\n"
    )
    shell = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$0" -c "$1"'
    made = subprocess.run(
        [unshare, "-Ur", "sh", "-c", shell, sys.executable, code],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"such a machine cannot be made here: {made.stderr.strip()[-200:]}")
    first, second, last = made.stdout.splitlines()
    assert "namespaces: [Errno 28] unshare" in first
    assert "--sandbox-without namespaces" in first
    assert (second, last) == (first, "True")


def test_an_unknown_layer_is_an_error() -> None:
    with pytest.raises(GraftError, match="'chroot' is unknown; expected one of namespaces"):
        Sandbox(frozenset({"chroot"})).require()
