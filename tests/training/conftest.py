"""Texts that all tests of training share."""

from __future__ import annotations

from pathlib import Path

import pytest
import recipes_tiny


@pytest.fixture(scope="session")
def have(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return recipes_tiny.folder(tmp_path_factory.mktemp("training"))
