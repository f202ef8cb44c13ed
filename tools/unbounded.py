"""Prints what longspan and its tests require, without version bounds: `make test-newest` installs these.

pip install --upgrade $(python tools/unbounded.py)
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path


def requirements() -> list[str]:
    """Names of the required packages, those of every extra but docs among them, in alphabetical order."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = [lines for name, lines in project["optional-dependencies"].items() if name != "docs"]
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    names = {re.match(r"[\w.-]+", line).group() for line in lines}  # type: ignore[union-attr]
    return sorted(names - {project["name"]})


if __name__ == "__main__":
    print(*requirements())
