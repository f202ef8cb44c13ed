"""Checks how the package's files import one another: no circle, and imports within functions only where they are listed.

    python tools/imports.py

Every import counts, also one within a function or for type checkers alone. Prints the number of circles, which is 0, and what is
against the rules; the exit status is 1 where anything is. Which layer may import which is checked by import-linter
(`[tool.importlinter]` in pyproject.toml).
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "longspan"
LATE = {
    "longspan": "`import longspan` and the help of the command line must cost no time",
    "longspan.cli": "a command imports what it needs, and not what the others need",
    "longspan.engine": "a file of Triton kernels, which is imported when one of them is launched",
    "longspan.attention.random_features": "drawing, which imports matplotlib",
    "longspan.training.study": "drawing, which imports matplotlib",
}
"""Modules, and packages with all that is in them, that may import within functions, and why."""


def modules() -> dict[str, Path]:
    """Every module of the package by its name."""
    return {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def _name(path: Path) -> str:
    parts = ("longspan", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


def imports(path: Path, known: dict[str, Path]) -> Iterator[tuple[str, bool]]:
    """What a file imports of the package, and whether it does so within a function."""
    tree = ast.parse(path.read_text())
    late = {id(inner) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for inner in ast.walk(f)}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in whole]
        yield from ((name, id(node) in late) for name in names if name in known)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of two and more modules each of which imports the others, directly or through others (Tarjan 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for other in graph[module]:
            if other not in order:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == order[module]:
            at = stack.index(module)
            members = stack[at:]
            del stack[at:]
            if len(members) > 1:
                found.append(sorted(members))

    for module in graph:
        if module not in order:
            visit(module)
    return found


def allowed(module: str) -> bool:
    """Whether a module may import within functions."""
    return any(module == name or (name != "longspan" and module.startswith(f"{name}.")) for name in LATE)


def late_elsewhere() -> list[str]:
    """Files outside the package that import it within functions, but for files of Triton kernels."""
    root, known = PACKAGE.parents[1], modules()
    files = [
        file
        for folder in ("tests", "tools", "benchmarks", "reproductions")
        for file in sorted((root / folder).rglob("*.py"))
    ]
    return [
        f"{file.relative_to(root)} imports {name} within a function; import it at the top"
        for file in files
        for name, inside in imports(file, known)
        if inside and not name.endswith(".kernels")
    ]


def main() -> int:
    """The exit status: 0 where all is as it should be."""
    known = modules()
    found = {name: list(imports(path, known)) for name, path in known.items()}
    turning = circles({name: {other for other, _ in others if other != name} for name, others in found.items()})
    late = sorted({(name, other) for name, others in found.items() for other, inside in others if inside})
    wrong = [(name, other) for name, other in late if not allowed(name)]
    for members in turning:
        print("circle:", ", ".join(members))
    for name, other in wrong:
        print(
            f"{name} imports {other} within a function; import it at the top, or list the module in {Path(__file__).name}"
        )
    elsewhere = late_elsewhere()
    print(*elsewhere, sep="\n", end="\n" if elsewhere else "")
    print(f"{len(turning)} circles among {len(known)} files")
    print(f"{len(late)} imports within functions, {len(wrong) + len(elsewhere)} of them not listed")
    return 1 if turning or wrong or elsewhere else 0


if __name__ == "__main__":
    sys.exit(main())
