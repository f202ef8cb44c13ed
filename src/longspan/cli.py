"""The command line: parses, calls, prints. What a command does lives in the module that it imports when it runs.

Exit codes: 0 done, 2 a request that cannot be carried out (one line, `error: …`), 130 interrupted. A traceback is a
bug.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from longspan import __version__
from longspan.errors import LongspanError, SpecError, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from longspan.generation import Chat

    Ready = Callable[[int | None], Any]


class _Commands(TyperGroup):
    """Turns whatever a user can mend into one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LongspanError as error:
            _fail(str(error))
        except KeyboardInterrupt:
            typer.echo("\ninterrupted", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise  # the reader of our output has had enough: typer ends quietly
        except OSError as error:
            _fail(f"{error.strerror}: {error.filename}" if error.strerror and error.filename else str(error))
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            _fail(f"out of memory: {_first_line(error)}; a shorter length, a smaller model or streaming needs less")


def _fail(message: str) -> NoReturn:
    typer.echo(f"{typer.style('error:', fg='red', bold=True)} {message}", err=True)
    raise typer.Exit(2) from None


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _include(paths: list[Path] | None) -> list[Path] | None:
    from longspan.include import include

    include(paths or [])
    return paths


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"longspan {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Long-context methods on language models, measured for quality and cost in one table.",
)
Include = Annotated[
    list[Path] | None,
    typer.Option(callback=_include, is_eager=True, help="Python file with methods or tasks of your own."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Model = Annotated[str, typer.Argument(help="Built-in name, folder, hub id or .gguf file.")]
OneMethod = Annotated[str, typer.Option("--method", "-m", help="Spec, for example [b]yarn:factor=4[/b].")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …")]
MaxNew = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Share of probability to sample from.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]


@app.callback()
def _settings(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Version.")] = False,
) -> None:
    # Our own messages say what matters; transformers' remarks would stand between table and answer.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show one method in full.")] = None,
    as_json: Json = False,
    include: Include = None,
) -> None:
    """The catalogue: what each method fills, costs and works on."""
    from longspan.method import catalogue

    _catalogue(catalogue(), name, "method", ["title", "seam", "works_on", "cost", "exportable", "paper"], as_json)


@app.command()
def tasks(
    name: Annotated[str | None, typer.Argument(help="Show one task in full.")] = None,
    as_json: Json = False,
    include: Include = None,
) -> None:
    """The benchmarks: what each measures and where its data comes from."""
    from longspan.tasks.base import task_catalogue

    _catalogue(task_catalogue(), name, "task", ["title", "measures", "higher_is_better", "source"], as_json)


def _catalogue(known: dict[str, type], name: str | None, kind: str, columns: list[str], as_json: bool) -> None:
    if name is not None and name not in known:
        raise SpecError(f"there is no {kind} {name!r}; {nearest(name, known)}")
    if as_json:
        _print_json(_describe(known[name]) if name else {n: _describe(cls) for n, cls in known.items()})
    elif name:
        _print_entry(_describe(known[name]))
    else:
        _print_table([kind, *columns], [[n, *(_cell(getattr(cls, c)) for c in columns)] for n, cls in known.items()])


def _describe(cls: Any) -> dict[str, Any]:
    """A method or a task as data: its class variables, its settings and what its author says of it."""
    facts = {
        key: sorted(value) if isinstance(value, frozenset) else value
        for base in reversed(cls.__mro__)
        for key, value in vars(base).items()
        if not key.startswith("_") and isinstance(value, str | bool | int | frozenset) and key not in _settings_of(cls)
    }
    partners = _partners(cls) if "slots" in facts else {}
    about = " ".join((cls.__doc__ or "").split())
    return {**facts, **partners, "settings": list(_settings_of(cls).values()), "about": about}


def _settings_of(cls: Any) -> dict[str, dict[str, Any]]:
    return {f.name: {"name": f.name, "type": f.type, "default": f.default} for f in dataclasses.fields(cls)}


def _partners(cls: Any) -> dict[str, list[str]]:
    from longspan.method import catalogue

    free = {n for n, other in catalogue().items() if other.slots and cls.slots and not other.slots & cls.slots}
    return {"combines_with": sorted(free)}


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def _print_table(columns: list[str], rows: list[list[str]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(*(c.replace("_", " ") for c in columns))
    for row in rows:
        table.add_row(*map(escape, row))
    _console().print(table)


def _print_entry(entry: dict[str, Any]) -> None:
    """One method or task: its facts, one a line, then its settings."""
    settings = entry.pop("settings")
    for key, value in entry.items():
        if value != "":
            typer.echo(f"{key.replace('_', ' '):>20}  {_cell(value)}")
    for s in settings:
        typer.echo(f"{'setting':>20}  {s['name']}: {s['type']} = {s['default']}")


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple | frozenset) else str(value)


@app.command()
def generate(
    model: Model,
    method: OneMethod = "none",
    prompt: Annotated[str | None, typer.Option(help="The prompt, or the question about --file.")] = None,
    file: Annotated[Path | None, typer.Option(help="A text file as prompt; - reads standard input.")] = None,
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
    text = _prompt(prompt, file)
    network, tokenizer, ready = _load(model, method, dtype, device)
    chat = False if plain else None
    length = len(generation.prompt_ids(tokenizer, text, chat=chat)) + max_new_tokens
    ready(length)
    if warning := generation.reach_warning(network, length):
        typer.echo(f"warning: {warning}", err=True)
    made = generation.generate_text(
        network,
        tokenizer,
        text,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        chat=chat,
        on_text=None if as_json else _stream,
    )
    _print_json(dataclasses.asdict(made)) if as_json else typer.echo()


@app.command()
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
    """A conversation without end under constant memory. /stats, /reset and /exit are commands in it."""
    from longspan import generation
    from longspan.models import inspect_model

    generation.check_settings(max_new_tokens, temperature, top_p, seed)
    method = method or generation.default_chat_method(inspect_model(model))
    network, tokenizer, ready = _load(model, method, dtype, device)
    ready(None)
    talk = generation.Chat(
        network,
        tokenizer,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    typer.echo(f"{model} with {method}. /stats, /reset, /exit", err=True)
    while (line := _ask()) is not None:
        _turn(talk, line.strip())


def _ask() -> str | None:
    """The user's next line; None at its end, or after /exit."""
    try:
        line = input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    return None if line.strip() == "/exit" else line


def _turn(talk: Chat, line: str) -> None:
    if line == "/reset":
        talk.reset()
    elif line == "/stats":
        speed = f", {talk.stats.tokens_per_s:.1f} tokens/s" if talk.stats.tokens_per_s else ""
        cache = f"{talk.stats.cache_bytes / 2**20:.1f} MiB of cache"
        typer.echo(f"{talk.stats.tokens:,} tokens seen in {talk.stats.turns} turns, {cache}{speed}", err=True)
    elif line.startswith("/"):
        typer.echo(f"no command {line.split()[0]}; there are /stats, /reset and /exit", err=True)
    elif line:
        try:
            talk.say(line, on_text=_stream)
        except KeyboardInterrupt:
            typer.echo(" … broken off; this turn is forgotten", err=True)
        typer.echo()
        if talk.warning:
            typer.echo(f"warning: {talk.warning}", err=True)


def _stream(text: str) -> None:
    typer.echo(text, nl=False)


def _prompt(prompt: str | None, file: Path | None) -> str:
    """The text of --file, of --prompt, or of both, the file's before the question about it."""
    if prompt is None and file is None:
        raise SpecError("no prompt: give --prompt TEXT, --file PATH, or --file - to read standard input")
    parts = [] if file is None else [_read_text(file)]
    return "\n\n".join([*parts, *([prompt] if prompt is not None else [])])


def _read_text(file: Path) -> str:
    try:
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LongspanError(f"{file} is not text in UTF-8 (byte {error.start:,} is not); convert it first") from error


def _load(model: str, method: str, dtype: str | None, device: str | None) -> tuple[Any, Any, Ready]:
    """(model, tokenizer, what puts the method on for a length). What can be refused is refused before weights load."""
    from longspan.apply import apply
    from longspan.method import parse
    from longspan.models import inspect_model, load

    wanted = parse(method)
    wanted.check(inspect_model(model))
    network, tokenizer = load(model, dtype=dtype, device=device)
    return network, tokenizer, lambda length: apply(network, wanted, length=length)


def run(arguments: list[str] | None = None) -> int:
    """The command line as a function: prints, and returns the exit code."""
    try:
        app(arguments, prog_name="longspan")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def main() -> None:
    sys.exit(run())
