"""The command `read`: a document read once, for `generate --memory`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.loading import load
from longspan.cli.options import Device, Dtype, Include, Json, Model
from longspan.cli.printing import print_json
from longspan.cli.text import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from longspan.memory.document import Memory

ROOM = 1024
"""Tokens for a question and its answer, which a method that is set by length counts with the document's."""


def read(
    model: Model,
    document: Annotated[Path, typer.Argument(help="A text file, .txt or .md; - reads standard input.")],
    out: Annotated[Path, typer.Option(help="The file to write, such as book.memory.")],
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="Spec. Left out: what the model was saved with, or none.")
    ] = None,
    plain: Annotated[bool, typer.Option(help="Read the text as it is, without the chat template.")] = False,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
    include: Include = None,
) -> None:
    """Reads a document once and keeps its KV cache in a file, which generate --memory asks."""
    from longspan.generation import reach_warning
    from longspan.reading.documents import document_ids, read_document
    from longspan.util.units import duration, size

    text = read_text(document)
    loaded = load(model, method, dtype, device)
    chat = not plain and loaded.tokenizer.chat_template is not None
    loaded.apply_method(len(document_ids(loaded.model, loaded.tokenizer, text, chat=chat)) + ROOM)
    ids = document_ids(loaded.model, loaded.tokenizer, text, chat=chat)
    if warning := reach_warning(loaded.model, len(ids)):
        typer.echo(f"warning: {warning}", err=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    memory = _with_progress(
        len(ids), as_json, lambda on_tokens: read_document(loaded.model, ids, chat=chat, on_tokens=on_tokens)
    )
    seconds = time.perf_counter() - begun
    memory.save(out)
    result = {
        "out": str(out),
        "method": memory.method,
        "tokens": memory.tokens,
        "cache_bytes": memory.nbytes,
        "file_bytes": out.stat().st_size,
        "seconds": seconds,
    }
    if as_json:
        return print_json(result)
    return typer.echo(
        f"{out}: {memory.tokens:,} tokens read with {memory.method} in {duration(seconds)}, {size(out.stat().st_size)}"
    )


def method_of_memory(path: Path) -> str | None:
    """The spec that a memory was read under; None for the plain model."""
    from longspan.memory.files import method_of

    return method_of(path)


def load_memory(path: Path, model: PreTrainedModel) -> Memory:
    """The memory in a file. Raises `LongspanError` where another model or method wrote it."""
    from longspan.memory.document import Memory

    return Memory.load(path, model)


def _with_progress(total: int, quiet: bool, work: Any) -> Any:
    """The result of `work(on_tokens)`, with a bar on a terminal's standard error."""
    if quiet or not sys.stderr.isatty():
        return work(None)
    with typer.progressbar(length=total, label="reading", file=sys.stderr) as bar:
        return work(lambda tokens: bar.update(tokens - bar.pos))
