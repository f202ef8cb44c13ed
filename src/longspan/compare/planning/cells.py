"""A cell: method, task and length, with a key for everything its result depends on.

The same key means the same measurement; any change of weights, settings, samples, code or versions gives another key.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.compare.statistics import Scale
from longspan.compare.storing import digest
from longspan.core.method import Combination, Method
from longspan.tasks.base import Task
from longspan.util import environment

SOURCES = ("core", "engine", "hf", "positions", "lm", "attention", "memory", "prompts", "reading", "tasks")
"""Folders of the package whose files decide results."""
_FILES = (
    "apply.py",
    "models.py",
    "meter.py",
    "compare/running/worker.py",
    "compare/statistics.py",
    "util/textfiles.py",
)


@dataclass(frozen=True)
class Cell:
    """The unit of work, of storage and of resume.

    requested: the method as the user wrote it; `method` has every setting filled in. samples: how many are drawn.
    dtype, device: torch's names; processor: the device's own name, without which times mean nothing.
    trained: folder of a trained model, which is measured as it was saved in place of `model`. saved: the methods in it.
    """

    model: str
    fingerprint: str
    requested: str
    method: Combination
    task: Task
    length: int
    samples: int
    seed: int
    dtype: str
    device: str
    processor: str
    trained: str | None = None
    saved: tuple[Method, ...] = ()

    @property
    def spec(self) -> str:
        """The name of the cell's row: the method's full spec, or a trained model's name."""
        return self.method.spec if self.trained is None else self.requested

    @property
    def parts(self) -> list[Method | Task]:
        """The cell's methods and its task, whose files decide the result."""
        return [*self.method.methods, *self.saved, self.task]

    @functools.cached_property
    def key(self) -> str:
        """sha256, in hex, of everything that the result depends on.

        Python's version (major and minor) is part of it, since generated texts come from its standard library.
        """
        versions = environment.versions()
        versions["python"] = ".".join(versions["python"].split(".")[:2])
        return digest(
            {
                "fingerprint": self.fingerprint,
                "method": "as it was saved" if self.trained else self.method.spec,
                "task": self.task.spec,
                "task_version": self.task.version,
                "data": self.task.data_digest(),
                "samples": [self.samples, self.seed],
                "length": self.length,
                "dtype": self.dtype,
                "device": [self.device, self.processor],
                "versions": versions,
                "code": code_digest(),
                "own_code": [source_digest(type(part)) for part in self.parts],
            }
        )

    def describe(self) -> dict[str, Any]:
        """The cell as JSON data, as the manifest and every record contain it."""
        return {
            "key": self.key,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "method": self.spec,
            "asked": self.requested,
            "task": self.task.name,
            "task_spec": self.task.spec,
            "task_version": self.task.version,
            "length": self.length,
            "seed": self.seed,
        }


@functools.cache
def code_digest() -> str:
    """sha256, in hex, of the package's sources that results depend on."""
    root = Path(__file__).resolve().parents[2]
    files = [root / name for name in _FILES] + [f for folder in SOURCES for f in (root / folder).rglob("*.py")]
    sha = hashlib.sha256()
    for file in sorted(f for f in files if f.exists()):
        sha.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return sha.hexdigest()


def source_digest(cls: type[Method | Task]) -> str | None:
    """sha256, in hex, of the file that defines a user's class.

    None for classes of this package.
    """
    if cls.__module__.startswith("longspan."):
        return None
    file = inspect.getsourcefile(cls)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None


def scale_of(task: Task, vocabulary: int) -> Scale:
    """The direction of a task's score, and the score of a failed sample.

    That is the task's `worst` where it defines one; else 0 where more is better, and ln(vocabulary), the loss of a
    uniform guess in nats, where less is.
    """
    worst = getattr(task, "worst", None)
    if worst is None:
        worst = 0.0 if task.higher_is_better else math.log(vocabulary)
    return Scale(task.higher_is_better, float(worst))
