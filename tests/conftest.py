"""What tests of several folders share. That this file lies here also puts `tests/` on the import path."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    torch.manual_seed(0)
