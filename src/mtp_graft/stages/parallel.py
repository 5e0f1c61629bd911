"""How a stage runs: files read ahead and written behind, its device, threads, time, process."""

import multiprocessing
import os
import platform
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from mtp_graft.errors import GraftError
from mtp_graft.recipe import Device
from mtp_graft.serving.topology import Hardware, find_gpus, visible_devices

Progress = Callable[[str, int, int], None]
Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def read_ahead(
    read: Callable[[Item], Result], items: Iterable[Item], readers: int
) -> Iterator[Iterator[Result]]:
    """Yield the results of `read`, or its error, in the items' order; `readers` are in work."""
    with ThreadPoolExecutor(readers) as pool:
        left = iter(items)
        pending = deque(pool.submit(read, item) for item in islice(left, readers))

        def results() -> Iterator[Result]:
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(read, item) for item in islice(left, 1))
                yield result

        try:
            yield results()
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def write_behind(writers: int = 1) -> Iterator[Callable[..., None]]:
    """Yield a function that calls another one in a thread, up to `writers` calls at once.

    It waits while as many are in work and another is waiting. All are done at the end, also after
    an error; a call's own error is raised by a later call or at the end.
    """
    with ThreadPoolExecutor(writers) as pool:
        pending: deque[Future[Any]] = deque()

        def write(call: Callable[..., Any], *arguments: Any) -> None:
            while len(pending) > writers:
                pending.popleft().result()
            pending.append(pool.submit(call, *arguments))

        yield write
        for future in pending:
            future.result()


@cache
def gpus() -> Hardware | None:
    """Return the GPUs that torch will see, None without; GraftError as `find_gpus` raises it."""
    import torch

    if torch.version.cuda is None or visible_devices() == []:
        return None
    # The driver is asked: a CUDA context in this process would take memory from what it starts.
    import pynvml

    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return None
    except pynvml.NVMLError:
        pass  # which `find_gpus` explains
    return find_gpus()


def find_device(wanted: Device) -> str:
    """Return the device to compute on: `auto` is the GPU if there is one."""
    return wanted if wanted != "auto" else "cuda" if gpus() else "cpu"


def device_name() -> str:
    """Return the GPUs' or the processor's model and how many, for manifests and the report."""
    if found := gpus():
        return f"{found.num_gpus}x {found.gpu}"
    lines = Path("/proc/cpuinfo").read_text().splitlines()  # `platform` knows no model on Linux
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(models, platform.machine())}, {os.cpu_count()} cores"


@contextmanager
def single_thread() -> Iterator[None]:
    """Let torch use one CPU thread inside, so that no byte depends on the number of cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Clock:
    """The seconds that each part of the stage takes on a device."""

    def __init__(self, device: str) -> None:
        import torch

        self.device, self._torch = device, torch
        self.seconds = dict.fromkeys(("replay", "hessian", "gptq", "pack", "errors", "io"), 0.0)
        if device != "cpu":
            self._torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def timed(self, part: str, *, tf32: bool = False) -> Iterator[None]:
        """Count the time inside as `part`'s; on a GPU, let float32 products take TF32 inputs."""
        matmul, started = self._torch.backends.cuda.matmul, time.perf_counter()
        before = matmul.fp32_precision
        matmul.fp32_precision = "tf32" if tf32 and self.device != "cpu" else before
        try:
            yield
        finally:
            matmul.fp32_precision = before
        if self.device != "cpu":
            self._torch.cuda.synchronize(self.device)
        self.seconds[part] += time.perf_counter() - started


def run_in_process(work: Callable[..., Result], *arguments: Any, report: Progress) -> Result:
    """Return `work(*arguments, report)`, called in a new process that is gone afterwards.

    The process ends with ours, however ours ends. A GraftError or OSError of `work` is raised here,
    other exceptions are printed by the process, and GraftError is raised if it ended without a
    result. To be called in the main thread.
    """
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sending, work, arguments))
    # Ctrl-C is ours to handle, and to end the process, which inherits that it ignores it.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)
    sending.close()
    try:
        while True:
            kind, value = receiving.recv()
            if kind == "done":
                return value
            if kind == "failed":
                raise value
            report(*value)
    except EOFError:
        process.join(10.0)
        how = f"ended with status {process.exitcode}; what it printed says why"
        if process.exitcode == -signal.SIGKILL:
            how = "was killed; out of memory? Run again to go on"
        raise GraftError(f"{work.__name__}: its process {how}") from None
    finally:
        process.kill()
        process.join()
        receiving.close()


def _child(sending: Connection, work: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    def end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        sending.send(("done", work(*arguments, lambda *step: sending.send(("progress", step)))))
    except (GraftError, OSError) as error:
        sending.send(("failed", error))
