"""Long text that every machine has, so that a benchmark needs no download.

    prose   Python's own help: its topics, then the docstrings of its library (about 350,000 tokens of technical English)
    code    the sources of Python's standard library (over a million tokens)
    novel   Bram Stoker's Dracula (1897), which comes with longspan (about 200,000 tokens)
    PATH    a .txt or .txt.gz file, or a folder of them

The novel is in the public domain (Project Gutenberg's number 345). Python's texts differ between its versions, and a user's
files change, so every text goes by its sha256. A text is read as a ring: a window that starts near the end goes on at the
beginning, so that windows of every length can start in the same places, and the shorter are prefixes of the longer.
"""

from __future__ import annotations

import gzip
import hashlib
import inspect
import re
import sysconfig
import weakref
import zlib
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from longspan.core.tokens import encode_all
from longspan.util.errors import SpecError, nearest
from longspan.util.textfiles import decode

BUILT_IN = ("prose", "code", "novel")
NOVEL = Path(__file__).parents[1] / "texts" / "novel.txt.gz"
SUFFIXES = (".txt", ".txt.gz")
_DOCSTRING = re.compile(r'(?:\A|:[ \t]*\n)\s*[rR]?"""(.*?)"""', re.DOTALL)
"""What stands first in a module, or after a line that ends in a colon; far quicker than parsing."""

_known: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, dict[str, list[int]]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Text:
    """Documents in a fixed order; `name` is how the user calls them."""

    name: str
    documents: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Of the documents one after another, as UTF-8, in hex."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(document.encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Ring:
    """A text as token ids, without special tokens."""

    name: str
    sha256: str
    ids: list[int]

    def take(self, start: int, length: int, task: str) -> list[int]:
        """`length` tokens from `start` on, past the end from the beginning again. Raises `SpecError` where the whole
        text is shorter."""
        have = len(self.ids)
        if length > have:
            other = "text=code has over a million, or give" if self.name == "prose" else "give"
            raise SpecError(
                f"{task}: {length:,} tokens of text are needed and {self.name} has {have:,}; {other} text=PATH with a "
                f"longer one, or a length of at most {have:,}"
            )
        start %= have
        return (self.ids[start : start + length] + self.ids[: max(0, start + length - have)])[:length]


def check_text(name: str, task: str) -> None:
    """Raises `SpecError` unless `name` is a built-in text or a path with a text in it."""
    if name not in BUILT_IN:
        _files(name, task)


def read_text(name: str, task: str) -> Text:
    """The text that is called `name`. Raises `SpecError` where it is missing, empty or not UTF-8."""
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
    """The text's tokens, document by document; made once for each tokenizer and text."""
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
    """The standard library's single-file modules, which every distribution has, without those that it writes itself."""
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
