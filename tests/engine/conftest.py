"""With `--every-kernel`, a run in Triton's interpreter fails unless its tests launched each kernel in each of its forms."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from typing import Any

import pytest

from longspan import engine as package
from longspan.engine.kernels import INTERPRETED

BOTH: set[Any] = {False, True}
FORMS: dict[
    str, set[Any]
] = {  # what a kernel is compiled for, by the name of the argument: values that code depends on
    **dict.fromkeys(["ALWAYS", "CAUSAL", "ENDS", "FAR", "LAST", "STARTS", "UNIT", "WINDOW", "ZERO"], BOTH),
    "KIND": {"none", "linear", "table", "curve"},
    "GRAD": {"none", "linear", "curve", "ends"},
    "SINK": {0, 16, 32},
    "GROUP": {1, 2},
    "PARTS": {1, 4},
}
FEWER: dict[tuple[str, str], set[Any]] = {
    ("biased.forward.fill", "KIND"): {"log", "power", "table"},
    ("window.backward.backward_sinks", "SINK"): {16, 32},
    ("window.sink_correction.join", "SINK"): {16, 32},
    ("window.sink_correction.add_queries", "SINK"): {16, 32},
}
SIZES = {"BLOCK", "BLOCKS", "BM", "BN", "KEYS", "PRECISION", "ROWS", "S", "SCALE", "WIDTH"}
"""Arguments of the same kind that no branch depends on."""


def all_kernels() -> dict[str, Any]:
    """Every kernel by `family.file.name`. What is launched returns nothing and has a public name; helpers of kernels differ."""
    from triton.runtime.jit import KernelInterface

    found = {}
    for file in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        family = file.name.removeprefix(f"{package.__name__}.")
        if file.ispkg or "kernels" not in family.split(".")[1:]:
            continue
        module = importlib.import_module(file.name)
        for node in ast.parse(inspect.getsource(module)).body:
            if not (isinstance(node, ast.FunctionDef) and isinstance(getattr(module, node.name), KernelInterface)):
                continue
            returns = any(isinstance(x, ast.Return) and x.value is not None for x in ast.walk(node))
            if not returns and not node.name.startswith("_"):
                found[f"{family.replace('.kernels', '')}.{node.name}"] = getattr(module, node.name)
    return found


def bare(kernel: Any) -> Any:
    """A kernel without its autotuner."""
    return getattr(kernel, "fn", kernel) if hasattr(kernel, "configs") else kernel


def forms_of(name: str, kernel: Any) -> dict[str, set[Any]]:
    """The values that each compile-time argument is to have had."""
    arguments = inspect.signature(bare(kernel).fn).parameters.values()
    constants = [x.name for x in arguments if "constexpr" in str(x.annotation)]
    return {constant: FEWER.get((name, constant), FORMS[constant]) for constant in constants if constant not in SIZES}


class Launches:
    """What each kernel was launched with, in this process and in the workers of pytest-xdist."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, str, Any]] = set()
        self.wanting: list[str] = []

    def watch(self) -> None:
        for name, kernel in all_kernels().items():
            bare(kernel).add_pre_run_hook(lambda *_, name=name, **given: self.note(name, given))

    def note(self, name: str, given: dict[str, Any]) -> None:
        self.seen.add((name, "", ""))
        self.seen |= {(name, constant, given[constant]) for constant in given if constant in FORMS}

    def missing(self) -> list[str]:
        lines = []
        for name, kernel in all_kernels().items():
            if (name, "", "") not in self.seen:
                lines.append(f"{name} was launched by no test")
                continue
            for constant, values in forms_of(name, kernel).items():
                left = [value for value in values if (name, constant, value) not in self.seen]
                lines += [f"{name} was launched by no test with {constant}={value!r}" for value in sorted(left)]
        return lines

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.seen |= {tuple(one) for one in getattr(node, "workeroutput", {}).get("launches", ())}

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["launches"] = [list(one) for one in self.seen]
            return
        self.wanting = self.missing()
        if self.wanting:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for line in self.wanting:
            terminalreporter.write_line(f"FAILED {line}", red=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-kernel", action="store_true", help="fail where a form of a kernel is launched by no test")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--every-kernel", default=False):
        if not INTERPRETED:
            raise pytest.UsageError("--every-kernel watches Triton's interpreter: set TRITON_INTERPRET=1")
        launches = Launches()
        launches.watch()
        config.pluginmanager.register(launches)
