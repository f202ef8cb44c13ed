"""Models that were trained from the one that is compared, as rows beside its methods: the folder of a training, with its cost.

A method such as RMT or PoSE is no setting of a model but another model. Its folder is given where a method would be
(`-m runs/pose`), is measured on the same samples, and its row says what the training took.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longspan import models
from longspan.core.facts import ModelFacts
from longspan.core.method import Combination
from longspan.util.errors import LongspanError, NotSupported
from longspan.util.files import read_object

PROBE = "The quick brown fox jumps over 13 lazy dogs; naïve? 世界!\n    def f(x): return x\n"


def is_folder(asked: Any) -> bool:
    """True for the folder of a model, or of a training that has one."""
    return isinstance(asked, str | Path) and bool(_found(asked))


def trained_model(asked: str | Path, base: str) -> tuple[str, ModelFacts, Combination]:
    """The model's own folder, its facts, and the methods that it was saved with.

    Raises `NotSupported` where it reads a text as other tokens than `base` does.
    """
    folder = _found(asked)
    if folder is None:
        raise LongspanError(f"{asked} holds no model")
    facts = models.inspect_model(folder)
    ours, theirs = (models.load_tokenizer(str(name))(PROBE, verbose=False)["input_ids"] for name in (base, folder))
    if ours != theirs:
        raise NotSupported(
            f"{asked} was not trained from {base}: it reads a text as other tokens, so their samples cannot be the same. Compare "
            "it by itself, and mind the tokenizer"
        )
    return str(folder), facts, models.saved_methods(folder)


def training_cost(asked: str | Path) -> dict[str, Any] | None:
    """`seconds`, `tokens`, `steps` and `peak_bytes` of the training that made a model; None where none is written beside it."""
    folder = _found(asked)
    for place in filter(None, [folder, folder and folder.parent]):
        if (file := place / "result.json").is_file():
            made = read_object(file, "remove it, and longspan train with the same recipe makes it again")
            return {key: made.get(key) for key in ("seconds", "tokens", "steps", "peak_bytes")}
    return None


def _found(asked: str | Path) -> Path | None:
    here = Path(asked).expanduser()
    return next((p for p in (here, here / "model") if (p / "config.json").is_file()), None)
