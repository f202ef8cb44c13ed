"""Long text for benchmarks: built-in, without a download, or the user's own files.

    prose   Python's own help: its topics, then the docstrings of its library (about 350,000 tokens of technical English)
    code    the sources of Python's standard library (over a million tokens)
    novel   Bram Stoker's Dracula (1897), which comes with longspan (about 200,000 tokens)
    PATH    a .txt or .txt.gz file, or a folder of them

The novel is in the public domain (Project Gutenberg's number 345). Python's texts differ between its versions, and a user's
files change, so every text is identified by its sha256. A text is read as a ring: a window that starts near the end
continues at the beginning, so that windows of every length can have the same starts, and shorter ones are prefixes.
"""

from __future__ import annotations

import gzip
import hashlib
import inspect
import math
import re
import sysconfig
import weakref
import zlib
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from longspan.core.tokens import encode_all
from longspan.util.errors import SpecError, nearest
from longspan.util.textfiles import decode

BUILT_IN = ("prose", "code", "novel")
NOVEL = Path(__file__).parents[1] / "texts" / "novel.txt.gz"
SUFFIXES = (".txt", ".txt.gz")
GOLDEN = (math.sqrt(5) - 1) / 2
"""Golden ratio: multiples of it, modulo 1, spread any number of windows evenly over a text."""
SHORTEST = 64
"""Tokens of the shortest window that a task draws."""
TEXT_SOURCES = "Python's own help texts or library sources, a novel that comes along, or a text file of yours"
"""Where the text of a task with a setting `text` comes from, for the catalogue."""
_DOCSTRING = re.compile(r'(?:\A|:[ \t]*\n)\s*[rR]?"""(.*?)"""', re.DOTALL)
"""A docstring at the start of a module, or after a line that ends in a colon; much faster than parsing."""

_known: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, dict[str, list[int]]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Text:
    """Documents in a fixed order, with the name or path of the text."""

    name: str
    documents: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """sha256, in hex, of the concatenated documents as UTF-8."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(document.encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Ring:
    """A text as token ids, without special tokens, whose end is followed by its beginning."""

    name: str
    sha256: str
    ids: list[int]

    def take(self, start: int, length: int, task: str) -> list[int]:
        """`length` token ids from `start` on, continued at the beginning of the text.

        Raises `SpecError`, which names `task`, where the whole text is shorter.
        """
        total = len(self.ids)
        if length > total:
            other = "text=code has over a million, or give" if self.name == "prose" else "give"
            raise SpecError(
                f"{task}: {length:,} tokens of text are needed and {self.name} has {total:,}; {other} text=PATH with a "
                f"longer one, or a length of at most {total:,}"
            )
        start %= total
        return (self.ids[start : start + length] + self.ids[: max(0, start + length - total)])[:length]

    def describe(self) -> dict[str, Any]:
        """Name, sha256 and number of tokens, as samples record them."""
        return {"text": self.name, "text_sha256": self.sha256, "text_tokens": len(self.ids)}


class ReadsText:
    """Mix-in of tasks with a setting `text`, a built-in text or a path."""

    name: ClassVar[str]
    text: str

    def data_digest(self) -> str:
        """sha256 of the text, in hex."""
        return read_text(self.text, self.name).sha256

    def ring(self, tokenizer: PreTrainedTokenizerBase) -> Ring:
        """The text as token ids; raises `SpecError` where it cannot be read."""
        return tokenised(tokenizer, read_text(self.text, self.name))


def check_text(name: str, task: str) -> None:
    """Raises `SpecError` unless `name` is a built-in text, a file, or a folder."""
    if name not in BUILT_IN:
        _files(name, task)


def read_text(name: str, task: str) -> Text:
    """The built-in text or file `name`.

    Raises `SpecError` where it is missing, empty or not UTF-8.
    """
    if name == "prose":
        documents = _prose(task)
    elif name == "code":
        documents = [p.read_text("utf-8") for p in _library_files(task)]
    else:
        documents = [_read_file(p, task) for p in ([NOVEL] if name == "novel" else _files(name, task))]
    whole = tuple(d.strip() + "\n\n" for d in documents if d.strip())
    if not whole:
        raise SpecError(f"{task}: text={name} is empty; use text=prose, text=code, or a file with text in it")
    return Text(name, whole)


def tokenised(tokenizer: PreTrainedTokenizerBase, text: Text) -> Ring:
    """The text as token ids, encoded document by document, once for each tokenizer and text."""
    digest = text.sha256
    known = _known.setdefault(tokenizer, {})
    if digest not in known:
        known[digest] = list(chain.from_iterable(encode_all(tokenizer, text.documents)))
    return Ring(text.name, digest, known[digest])


def _prose(task: str) -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise SpecError(f"{task}: this Python comes without its help texts (pydoc_data); use text=PATH") from error
    sources = (p.read_text("utf-8") for p in _library_files(task))
    docstrings = (inspect.cleandoc(d) for source in sources for d in _DOCSTRING.findall(source))
    return [*(topics[name] for name in sorted(topics)), *docstrings]


def _library_files(task: str) -> list[Path]:
    """The standard library's single-file modules that every distribution has, without generated ones."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    files = [p for p in files if not p.name.startswith(("_sysconfigdata", "sitecustomize"))]
    if not files:
        raise SpecError(f"{task}: this Python comes without its library's sources; use text=PATH")
    return files


def _files(name: str, task: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        if files := sorted(p for p in path.iterdir() if p.is_file() and p.name.endswith(SUFFIXES)):
            return files
        raise SpecError(f"{task}: text={name} is a folder without any .txt or .txt.gz file")
    if not path.exists():
        raise SpecError(
            f"{task}: text={name} is neither a built-in text nor a file; {nearest(name, BUILT_IN)}, or a .txt or .txt.gz "
            "file, or a folder of them"
        )
    if not path.name.endswith(SUFFIXES):
        raise SpecError(f"{task}: text={name} must be a .txt or .txt.gz file, or a folder of them")
    return [path]


def _read_file(path: Path, task: str) -> str:
    try:
        return decode(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise SpecError(f"{task}: {path} cannot be read as UTF-8 text: {error}") from error
