"""What tests of several folders share. That this file lies here also puts `tests/` on the import path."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    torch.manual_seed(0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
