"""Long-context methods for Hugging Face language models, measured for quality and cost in one table.

    import longspan as ls
    model, tokenizer = ls.load("smollm2-135m")
    ls.apply(model, "yarn:factor=4")                      # ls.remove(model) undoes it
    run = ls.compare("smollm2-135m", methods=["none", "ntk"], tasks=["ppl"], lengths=[8192, 16384], out="runs/first")

Names are imported on first use, so that `import longspan` and the help of the command line take no time. Every method of the
catalogue is an attribute by the name of its class: `ls.YaRN(factor=4)`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longspan.apply import applied as applied
    from longspan.apply import apply as apply
    from longspan.compare import Run as Run
    from longspan.compare import compare as compare
    from longspan.core.method import Method as Method
    from longspan.core.method import catalogue as methods  # noqa: F401
    from longspan.generation import Chat as Chat
    from longspan.generation import generate_text as generate_text
    from longspan.hf.site import remove as remove
    from longspan.memory.document import Memory as Memory
    from longspan.memory.unlimiformer import Encoded as Encoded
    from longspan.models import load as load
    from longspan.reading.stream_decoder import StreamDecoder as StreamDecoder
    from longspan.reading.stream_decoder import stream_generate as stream_generate
    from longspan.tasks.base import Task as Task
    from longspan.training.run import TrainResult as TrainResult
    from longspan.training.run import train as train
    from longspan.util.errors import LongspanError as LongspanError
    from longspan.util.errors import NotSupported as NotSupported
    from longspan.util.errors import SpecError as SpecError

from longspan.util.version import __version__

_WHERE = {
    "applied": "longspan.apply:applied",
    "apply": "longspan.apply:apply",
    "remove": "longspan.hf.site:remove",
    "Run": "longspan.compare:Run",
    "compare": "longspan.compare:compare",
    "StreamDecoder": "longspan.reading.stream_decoder:StreamDecoder",
    "stream_generate": "longspan.reading.stream_decoder:stream_generate",
    "Encoded": "longspan.memory.unlimiformer:Encoded",
    "Memory": "longspan.memory.document:Memory",
    "LongspanError": "longspan.util.errors:LongspanError",
    "NotSupported": "longspan.util.errors:NotSupported",
    "SpecError": "longspan.util.errors:SpecError",
    "Chat": "longspan.generation:Chat",
    "generate_text": "longspan.generation:generate_text",
    "Method": "longspan.core.method:Method",
    "methods": "longspan.core.method:catalogue",
    "load": "longspan.models:load",
    "Task": "longspan.tasks.base:Task",
    "TrainResult": "longspan.training.run:TrainResult",
    "train": "longspan.training.run:train",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    """A public name, imported on first use, or the class of a method of the catalogue. Raises `AttributeError` for others."""
    if name in _WHERE:
        module, _, attribute = _WHERE[name].partition(":")
        value = globals()[name] = getattr(importlib.import_module(module), attribute)
        return value
    if name[0].isupper():  # classes; anything else would import the whole catalogue to look for a submodule
        from longspan.core.method import catalogue

        for cls in catalogue().values():
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module 'longspan' has no attribute {name!r}")


def __dir__() -> list[str]:
    from longspan.core.method import catalogue

    return sorted({*__all__, *(cls.__name__ for cls in catalogue().values())})


class _Package(ModuleType):
    """Importing the submodule `longspan.apply` must not hide the function `longspan.apply`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
