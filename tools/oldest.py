"""Prints the packages that pyproject.toml bounds from above, each at its oldest minor version: `make test-oldest` installs these.

pip install $(python tools/oldest.py)
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path


def requirements() -> list[str]:
    """Such as `torch~=2.11.0` for `torch>=2.11,<2.15`, in alphabetical order, without those of the extra docs."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = [lines for name, lines in project["optional-dependencies"].items() if name != "docs"]
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    bounded = filter(None, (re.match(r"([\w.-]+)>=(\d+\.\d+),<", line) for line in lines))
    return sorted(f"{name}~={version}.0" for name, version in (match.groups() for match in bounded))


if __name__ == "__main__":
    print(*requirements())
