"""The commands `generate` and `chat`: text from a model with a method applied."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longspan.cli.loading import load
from longspan.cli.memory import load_memory, method_of_memory
from longspan.cli.options import Device, Dtype, Include, Json, MaxNew, Model, Seed, Temperature, TopP
from longspan.cli.printing import print_json
from longspan.cli.text import as_utf8, prompt_text
from longspan.util.errors import SpecError

if TYPE_CHECKING:
    from longspan.generation import Chat


def generate(
    model: Model,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="Spec. Left out: what the model was saved with, or none.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt, or the question about --file.")] = None,
    file: Annotated[Path | None, typer.Option(help="A text file as prompt; - reads standard input.")] = None,
    memory: Annotated[
        Path | None, typer.Option(help="A document that longspan read has read; --prompt is a question about it.")
    ] = None,
    max_new_tokens: MaxNew = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    plain: Annotated[bool, typer.Option(help="Continue the text as it is, without the chat template.")] = False,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
    include: Include = None,
) -> None:
    """Text from a model with a method on it, streamed."""
    from longspan import generation

    generation.check_settings(max_new_tokens, temperature, top_p, seed)
    text = prompt_text(prompt, file)
    if memory is not None and file is not None:
        raise SpecError("--file and --memory: the memory is the document; leave --file out")
    method = method if memory is None else method or method_of_memory(memory)
    loaded = load(model, method, dtype, device)
    chat = False if plain else None
    length = len(generation.prompt_ids(loaded.tokenizer, text, chat=chat)) + max_new_tokens
    loaded.apply_method(length)
    book = None if memory is None else load_memory(memory, loaded.model)
    length += 0 if book is None else book.tokens
    if warning := generation.reach_warning(loaded.model, length):
        typer.echo(f"warning: {warning}", err=True)
    answer = generation.generate_text(
        loaded.model,
        loaded.tokenizer,
        text,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        chat=chat,
        memory=book,
        on_text=None if as_json else _print_piece,
    )
    print_json(dataclasses.asdict(answer)) if as_json else typer.echo()


def chat(
    model: Model,
    method: Annotated[str | None, typer.Option("--method", "-m", help="Spec; streaming if left out.")] = None,
    system: Annotated[str | None, typer.Option(help="Instructions that the model reads first.")] = None,
    max_new_tokens: MaxNew = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    dtype: Dtype = None,
    device: Device = None,
    include: Include = None,
) -> None:
    """A conversation without end under constant memory. /stats, /reset and /exit are commands in it.

    A model without a chat template goes on with what you write.
    """
    from longspan import generation
    from longspan.models import inspect_model

    generation.check_settings(max_new_tokens, temperature, top_p, seed)
    system = system and as_utf8(system, "--system")
    method = method or generation.default_chat_method(inspect_model(model))
    loaded = load(model, method, dtype, device)
    plain = loaded.tokenizer.chat_template is None
    if plain and system:
        raise SpecError(
            "--system: this model has no chat template, so nothing would tell instructions from text; leave it out"
        )
    loaded.apply_method(None)
    conversation = generation.Chat(
        loaded.model,
        loaded.tokenizer,
        system=system,
        plain=plain,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its arrow keys
    typer.echo(f"{model} with {method}. /stats, /reset, /exit", err=True)
    if plain:
        typer.echo(
            "this model has no chat template: it goes on with the text that you write, and answers no one", err=True
        )
    while (line := _next_line()) is not None:
        _run_turn(conversation, line.strip())


def _next_line() -> str | None:
    """The user's next line; None at the end of standard input, or after /exit."""
    try:
        line = as_utf8(input("> " if sys.stdin.isatty() else ""), "a line of standard input").removeprefix("\ufeff")
    except EOFError:
        return None
    return None if line.strip() == "/exit" else line


def _run_turn(conversation: Chat, line: str) -> None:
    if line == "/reset":
        conversation.reset()
    elif line == "/stats":
        _print_stats(conversation)
    elif line.startswith("/"):
        typer.echo(f"no command {line.split()[0]}; there are /stats, /reset and /exit", err=True)
    elif line:
        try:
            conversation.say(line, on_text=_print_piece)
        except KeyboardInterrupt:
            typer.echo(" … broken off; this turn is forgotten", err=True)
        typer.echo()
        if conversation.warning:
            typer.echo(f"warning: {conversation.warning}", err=True)


def _print_stats(conversation: Chat) -> None:
    stats = conversation.stats
    speed = f", {stats.tokens_per_s:.1f} tokens/s" if stats.tokens_per_s else ""
    cache = f"{stats.cache_bytes / 2**20:.1f} MiB of cache"
    typer.echo(f"{stats.tokens:,} tokens seen in {stats.turns} turns, {cache}{speed}", err=True)


def _print_piece(text: str) -> None:
    typer.echo(text, nl=False)
