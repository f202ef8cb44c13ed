"""Models trained from the compared one, as rows beside its methods.

A method such as RMT or PoSE is not a setting of a model but another model. Its folder is written where a method would be
(`-m runs/pose`); it is measured on the same samples, and its row says what the training took.
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


def is_folder(value: Any) -> bool:
    """True for the path of a model's folder, or of a training with a model."""
    return isinstance(value, str | Path) and _model_folder(value) is not None


def trained_model(path: str | Path, base: str) -> tuple[str, ModelFacts, Combination]:
    """The folder with the trained model's weights, its facts, and the methods that it was saved with.

    Raises `NotSupported` where its tokenizer differs from that of `base`, the compared model, and `LongspanError` where
    there is no model in `path`.
    """
    folder = _model_folder(path)
    if folder is None:
        raise LongspanError(f"{path} contains no model; name the folder of a training, or of its model")
    facts = models.inspect_model(folder)
    base_ids, ids = (models.load_tokenizer(str(name))(PROBE, verbose=False)["input_ids"] for name in (base, folder))
    if ids != base_ids:
        raise NotSupported(
            f"{path} was not trained from {base}: its tokenizer splits a text into other tokens, so their samples cannot be the "
            "same. Compare it in a run of its own"
        )
    return str(folder), facts, models.saved_methods(folder)


def training_cost(path: str | Path) -> dict[str, Any] | None:
    """`seconds`, `tokens`, `steps` and `peak_bytes` of a model's training; None without a `result.json`.

    Raises `LongspanError` where that file is damaged.
    """
    folder = _model_folder(path)
    for place in filter(None, [folder, folder and folder.parent]):
        if (file := place / "result.json").is_file():
            result = read_object(file, "remove it, and longspan train with the same recipe makes it again")
            return {key: result.get(key) for key in ("seconds", "tokens", "steps", "peak_bytes")}
    return None


def _model_folder(path: str | Path) -> Path | None:
    here = Path(path).expanduser()
    return next((p for p in (here, here / "model") if (p / "config.json").is_file()), None)
