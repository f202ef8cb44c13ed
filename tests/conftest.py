"""What tests of several folders share. That this file lies here also puts `tests/` on the import path."""

from __future__ import annotations

import gc

import pytest
import torch

from longspan.engine.kernels import INTERPRETED

pytest.register_assert_rewrite("checks")


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    """What is imported and collected by now stays to the end: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if item.get_closest_marker("kernels") and not (INTERPRETED or torch.cuda.is_available()):
        pytest.skip("no CUDA device, nor Triton's interpreter (TRITON_INTERPRET=1)")
