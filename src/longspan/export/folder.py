"""The folder of an exported model: written under another name, renamed when it is complete, with its source's tokenizer."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longspan.util import files
from longspan.util.errors import LongspanError, writing

_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
    "LICENSE*",
)


@dataclass(frozen=True)
class ExportReport:
    """The files that were written, of `bytes` in all.

    window: tokens that the positions were scaled for. reach: the longest input, in tokens, that the method is meant for and that
    a server should accept.
    """

    folder: str
    model: str
    method: str
    dtype: str
    bytes: int
    window: int
    reach: int
    max_position_embeddings: int
    rope_parameters: dict[str, Any] | None
    notes: tuple[str, ...]

    @property
    def vllm(self) -> str:
        """The command that serves the folder."""
        return f"vllm serve {shlex.quote(self.folder)} --max-model-len {self.reach}"

    @property
    def auto_class(self) -> str:
        """The class of transformers that loads the folder."""
        return "AutoModelForCausalLM"

    @property
    def python(self) -> str:
        """The Python code that loads the folder without longspan."""
        return (
            f"from transformers import {self.auto_class}, AutoTokenizer\n"
            f"model = {self.auto_class}.from_pretrained({self.folder!r})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({self.folder!r})"
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "vllm": self.vllm, "python": self.python}


def free_place(out: Path, overwrite: bool, source: Path | None) -> Path:
    """The absolute path of `out`.

    Raises `LongspanError` for a file, for `source` itself, and for a folder with files in it.

    overwrite: an earlier model in the folder may be replaced.
    """
    place = out.expanduser().resolve()
    if source is not None and place in (source.resolve(), *source.resolve().parents):
        raise LongspanError(f"{out} holds the model to be exported; name another folder")
    if place.is_file():
        raise LongspanError(f"{out} is a file; name a folder that is new or empty")
    if place.is_dir() and any(place.iterdir()):
        if not overwrite:
            raise LongspanError(f"{out} is not empty; name another folder, or allow it to be replaced (--overwrite)")
        if not (place / "config.json").is_file():
            raise LongspanError(f"{out} does not hold a model and is not replaced; name another folder")
    return place


@contextlib.contextmanager
def filling(place: Path) -> Iterator[Path]:
    """A new folder that replaces `place` when the block succeeds.

    Raises `LongspanError` where the disk refuses a write.
    """
    try:
        with files.filling(place) as part, writing(place):
            yield part
    except OSError as error:
        raise LongspanError(f"{place} cannot be written: {error.strerror or error}") from error


def size_of(folder: Path) -> int:
    """Bytes of the files in `folder`."""
    return sum(p.stat().st_size for p in folder.iterdir())


def copy_tokenizer(source: Path, folder: Path, window: int) -> None:
    """Copies the tokenizer's files and corrects two of its settings for a model of `window` tokens.

    vLLM takes the smaller of the model's and the tokenizer's length. transformers 4 does not know the class that transformers 5
    names for a tokenizer.json that has no class itself.
    """
    for pattern in _TOKENIZER:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    settings = read_json(path)
    settings["model_max_length"] = max(window, settings.get("model_max_length") or 0)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(path, settings)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object as transformers writes its configurations."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
