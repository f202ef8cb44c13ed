"""Runs a comparison: plans the cells, runs missing ones, stores each.

A wrong request is refused before the first cell starts. After that only Ctrl-C, a kill or a full disk ends a run: running
out of memory is a result, and a cell that fails is recorded and runs again next time. The same command resumes a run.

Worker processes come from a fork server that has imported torch, transformers and longspan but never initialises a
device: a fresh process for each cell, without the seconds that the imports take.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import pickle
import pkgutil
import signal
import sys
import time
import types
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from longspan.compare.planning import cost
from longspan.compare.planning.cells import SOURCES, Cell
from longspan.compare.planning.plan import Plan, make_plan
from longspan.compare.planning.requests import MethodLike, Request, as_list
from longspan.compare.report.results import by_reason
from longspan.compare.running.screen import Screen
from longspan.compare.running.worker import Job, run_job
from longspan.compare.storing import LOGS, MANIFEST, Record, Run, Store, is_finished, read_manifest
from longspan.core.method import Combination, Method
from longspan.tasks.base import Task
from longspan.util import environment
from longspan.util.errors import LongspanError, SpecError
from longspan.util.units import duration, size

Ending = tuple[str, Any]
"""The last message of a worker: `("done", result)`, `("out_of_memory", text)` or `("failed", text)`."""


def compare(
    model: str | Path,
    *,
    methods: Iterable[MethodLike] | None = None,
    tasks: Iterable[str | Task] | None = None,
    lengths: Iterable[int | str] | None = None,
    out: str | Path,
    seed: int = 0,
    samples: int | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    timeout: float | None = None,
) -> Run:
    """Measures methods × tasks × lengths into the folder `out`, and returns the run.

    Defaults: every method of the catalogue that the model can take, the tasks `ppl` and `passkey`, and lengths from the
    native window upwards as far as memory and half an hour allow. The native window and the bare model are always among
    the cells. Cells that `out` already contains are not run again.

    methods: specs, methods, or folders of trainings that started from this model; such a model is measured on the same
    samples, and its row says what its training took. lengths: tokens, as numbers or like "16k". samples: how many of each
    cell (None: each task's own number). timeout: seconds after which a cell counts as failed.

    Raises `LongspanError` before anything runs where a part of the request cannot be carried out, and
    `KeyboardInterrupt` after Ctrl-C, when the worker has ended and finished cells are stored.
    """
    if not isinstance(model, str | Path):
        raise SpecError(
            f"compare takes the name or the folder of a model, not a {type(model).__name__}: workers load it"
        )
    if timeout is not None and not timeout > 0:
        raise SpecError(f"timeout must be a number of seconds above 0, not {timeout!r}")
    request = Request(
        model=str(model),
        methods=as_list(methods, (str, Path, Method, Combination)),
        tasks=as_list(tasks, (str, Task)),
        lengths=as_list(lengths, (str, int)),
        seed=seed,
        samples=samples,
        dtype=dtype,
        device=device,
    )
    plan = make_plan(request)
    with Store(out) as store:
        _refuse_other_model(store.folder, plan)
        store.write_manifest(plan.manifest() | {"written": _now()})
        _run(plan, store, progress, timeout)
    return Run(out)


def _refuse_other_model(folder: Path, plan: Plan) -> None:
    if (folder / MANIFEST).exists():
        before = read_manifest(folder)
        if before["fingerprint"] != plan.fingerprint:
            raise LongspanError(
                f"{folder} is a run of {before['model']}, whose weights differ from this model's; name a new folder"
            )


def _run(plan: Plan, store: Store, progress: bool, timeout: float | None) -> None:
    cells = plan.cells()
    memory = plan.machine["device_memory"]
    todo = [c for c in cells if not is_finished(store.records.get(c.key), memory)]
    done = len(cells) - len(todo)
    workers = Workers(plan)
    with Screen(progress, todo, {c.key: plan.seconds(c) for c in todo}) as screen:
        _announce(screen, plan, store, done, todo)
        try:
            for cell in todo:
                screen.start(cell)
                record = _record(cell, plan, *workers.run(cell, store.folder, timeout, screen))
                store.append(record)
                done += 1
                screen.finish(cell, record)
        except KeyboardInterrupt:
            screen.say(
                f"stopped: {done} of {len(cells)} cells are in {store.folder}; the same command goes on from there"
            )
            raise


def _announce(screen: Screen, plan: Plan, store: Store, done: int, todo: list[Cell]) -> None:
    """Says what will run, why, roughly how long it takes and how much memory it needs."""
    for problem in filter(None, [store.repaired, *store.problems]):
        screen.say(problem)
    native = plan.facts.window
    lengths = ", ".join(f"{x:,}" + (" (native)" if x == native else "") for x in plan.lengths)
    screen.say(
        f"{plan.request.model} on {plan.machine['device_name']} in {plan.dtype_name}: {len(plan.methods)} methods × "
        f"{len(plan.tasks)} tasks × {len(plan.lengths)} lengths = {done + len(todo)} cells, {done} of them finished"
    )
    screen.say(f"methods: {'; '.join(m.spec for m in plan.methods)}")
    for name, reason in by_reason(plan.left_out).items():
        screen.say(f"left out: {name}: {reason}")
    screen.say(f"tasks: {'; '.join(f'{spec} ({n} samples)' for spec, n in plan.counts.items())}")
    screen.say(f"lengths: {lengths} ({plan.why})")
    if todo:
        need = cost.memory_needed(plan.facts, max(c.length for c in todo), plan.dtype)
        have = plan.machine["device_memory"]
        screen.say(
            f"forecast: about {duration(round(sum(map(plan.seconds, todo))))}, up to {size(need)} of {size(have)} of memory"
            + ("; cells that do not fit are recorded as such" if need > have else "")
        )


def _record(cell: Cell, plan: Plan, kind: str, content: Any) -> Record:
    """The record of a cell that ended, however it ended."""
    empty: Record = {"score": None, "interval": None, "n": 0, "samples": [], "cost": {}, "first_prompt": None}
    result = content if kind == "done" else empty
    return {
        **cell.describe(),
        "status": "ok" if kind == "done" else kind,
        "error": None if kind == "done" else content,
        **result,
        "dtype": cell.dtype,
        "device": cell.device,
        "device_name": cell.processor,
        "threads": plan.machine["threads"],
        "device_memory": plan.machine["device_memory"],
        "versions": environment.versions(),
        "finished": _now(),
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class Workers:
    """Starts one process after another, a cell in each, and receives how it ends."""

    def __init__(self, plan: Plan):
        self.device = str(plan.device)
        # Apple's frameworks do not survive a fork, so macOS pays for the imports in each cell
        self._context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        if sys.platform == "linux":
            self._context.set_forkserver_preload(modules_to_preload(plan.facts.model_type))

    def run(self, cell: Cell, folder: Path, timeout: float | None, screen: Screen) -> Ending:
        """Runs a cell to its end and returns the worker's last message.

        The process has ended afterwards, whatever happens.

        timeout: seconds. Raises `LongspanError` where no worker can be started at all, and lets `KeyboardInterrupt`
        through.
        """
        log = folder.absolute() / LOGS / f"{cell.key[:16]}.log"
        variables = {k: v for k, v in os.environ.items() if k.startswith("LONGSPAN_")}
        job = Job(pickle.dumps(cell), self.device, str(log), variables)
        receive, send = self._context.Pipe(duplex=False)
        process = self._context.Process(target=run_job, args=(job, send), daemon=True)
        with _script_hidden(cell):
            process.start()
        send.close()
        try:
            ending = self.listen(process, receive, timeout, screen)
        finally:
            receive.close()
            if process.is_alive():
                process.kill()
            process.join()
            process.close()
        if ending is None:
            self._context = multiprocessing.get_context("spawn")
            return self.run(cell, folder, timeout, screen)
        if log.exists() and (ending[0] == "done" and not log.stat().st_size):
            log.unlink()
        return ending

    def listen(self, process: Any, receive: Connection, timeout: float | None, screen: Screen) -> Ending | None:
        """Receives a worker's messages up to its last.

        None where the fork server has made CUDA unusable for its children.
        """
        started, end = False, None  # the time for the cell begins when the worker has begun
        with contextlib.suppress(EOFError):
            while receive.poll(max(0.0, end - time.monotonic()) if end else None):
                kind, *content = receive.recv()
                if kind == "hello":
                    started, end = True, time.monotonic() + timeout if timeout else None
                    if content[0]:
                        return None
                elif kind == "sample":
                    screen.sample(*content)
                else:
                    process.join(10)
                    return kind, content[0]
            return "failed", f"took longer than the timeout of {timeout:g} s"
        process.join(10)
        return _died(process.exitcode, started)


def _died(exitcode: int | None, started: bool) -> Ending:
    """The ending of a worker that sent no last message.

    Raises `LongspanError` for one that never began.
    """
    if exitcode == -signal.SIGKILL:
        return "out_of_memory", "killed, most likely by the kernel for memory"
    if exitcode is not None and exitcode < 0:
        return "failed", f"ended by {signal.Signals(-exitcode).name}; its log is in the run's folder {LOGS}"
    if started:
        return "failed", f"the worker ended with code {exitcode}; its log is in the run's folder {LOGS}"
    raise LongspanError(
        f"a worker process ended with code {exitcode} before it began. A script that defines its own methods or tasks "
        'must call compare under `if __name__ == "__main__":`, since workers read the script to find them'
    )


@contextlib.contextmanager
def _script_hidden(cell: Cell) -> Iterator[None]:
    """Keeps multiprocessing from running the user's script again in the worker, so that a script needs no guard.

    Only where the cell's own method or task is defined in that script must it be read.
    """
    main = sys.modules["__main__"]
    if all(type(part).__module__ != "__main__" for part in cell.parts):
        sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def modules_to_preload(model_type: str) -> list[str]:
    """Modules that a worker imports, which the fork server imports once.

    Importing them must not initialise a device.
    """
    root = Path(__file__).parents[2]
    package = [f"longspan.{d}.{m.name}" for d in SOURCES for m in pkgutil.iter_modules([str(root / d)])]
    modeling = f"transformers.models.{model_type}.modeling_{model_type}"
    return ["torch", "transformers.generation.utils", modeling, "longspan.compare.running.worker", *package]
