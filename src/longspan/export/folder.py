"""The folder of an exported model: made beside its place, renamed when it is whole, with the tokenizer of its source."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
    """What was written. `window` is in tokens: what the positions were scaled for; `reach` the longest input that the
    method is meant for, which is what should be served."""

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
    def python(self) -> str:
        """What loads the folder without longspan."""
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            f"model = AutoModelForCausalLM.from_pretrained({self.folder!r})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({self.folder!r})"
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "vllm": self.vllm, "python": self.python}


def free_place(out: Path, overwrite: bool, source: Path | None) -> Path:
    """Where the folder will be; refuses to write over anything but an earlier model, and that only when told to."""
    place = out.expanduser().resolve()
    if source is not None and place in (source.resolve(), *source.resolve().parents):
        raise LongspanError(f"{out} holds the model that is to be exported; name another folder")
    if place.is_file():
        raise LongspanError(f"{out} is a file; name a folder that is new or empty")
    if place.is_dir() and any(place.iterdir()):
        if not overwrite:
            raise LongspanError(f"{out} is not empty; name another folder, or say that it may be overwritten")
        if not (place / "config.json").is_file():
            raise LongspanError(f"{out} holds something else than a model and is left alone; name another folder")
    return place


@contextlib.contextmanager
def filling(place: Path) -> Iterator[Path]:
    """A folder beside `place` that takes its place, whole, when the block ends well."""
    part = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}")
    old = part.with_suffix(".old")
    try:
        part.mkdir(parents=True)
        with writing(place):
            yield part
        if place.is_dir():
            place.rename(old)
        part.rename(place)
    except OSError as error:
        if old.is_dir() and not place.exists():
            old.rename(place)
        raise LongspanError(f"{place} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def copy_tokenizer(source: Path, folder: Path, window: int) -> None:
    """The tokenizer's files, mended for a model of `window` tokens: vLLM takes the smaller of the model's and the tokenizer's
    length, and transformers 4 does not know the name that transformers 5 gives to a tokenizer.json without a class of its
    own."""
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
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
