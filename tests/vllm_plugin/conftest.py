"""Fixtures of the tests on vLLM's own layers; those of its CPU build are left out elsewhere."""

import importlib.util
from collections.abc import Iterator

import pytest
import torch


def is_cpu_build() -> bool:
    if importlib.util.find_spec("vllm") is None:
        return False
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


collect_ignore_glob = [] if is_cpu_build() else ["test_cpu_*.py"]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A tensor parallel group of this process alone; vLLM's layers ask for its size."""
    from vllm import distributed
    from vllm.config import VllmConfig, set_current_vllm_config

    rendezvous = tmp_path_factory.mktemp("group") / "rendezvous"
    with set_current_vllm_config(VllmConfig()):
        distributed.init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
        distributed.initialize_model_parallel(1, 1)
        yield
        distributed.destroy_model_parallel()
        distributed.destroy_distributed_environment()


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
