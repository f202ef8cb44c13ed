"""The command line: parses, calls, prints. What a command does lives in the module that it imports when it runs.

Exit codes: 0 done, 2 a request that cannot be carried out (one line, `error: …`), 130 interrupted. A traceback is a
bug.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import io
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from longspan.cli.printing import console, print_attention, print_bench, print_catalogue, print_json, print_table
from longspan.util.errors import LongspanError, SpecError
from longspan.util.version import __version__

if TYPE_CHECKING:
    from longspan.bench.attention import Row as AttentionRow
    from longspan.bench.timings import Row
    from longspan.compare import Run
    from longspan.generation import Chat

    Ready = Callable[[int | None], Any]


class _Commands(TyperGroup):
    """Turns whatever a user can mend into one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.Exit:
            raise  # a RuntimeError like out of memory, which is looked for below with torch
        except LongspanError as error:
            _fail(str(error))
        except KeyboardInterrupt:
            typer.echo("\ninterrupted", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise  # the reader of our output has had enough: typer ends quietly
        except OSError as error:
            _fail(f"{error.strerror}: {str(error.filename)[:200]}" if error.strerror and error.filename else str(error))
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            _fail(f"out of memory: {_first_line(error)}; a shorter length, a smaller model or streaming needs less")


def _fail(message: str) -> NoReturn:
    typer.echo(f"{typer.style('error:', fg='red', bold=True)} {message}", err=True)
    raise typer.Exit(2) from None


def _out_of_memory(error: BaseException) -> bool:
    from longspan.compare.worker import is_out_of_memory

    return is_out_of_memory(error)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _include(paths: list[Path] | None) -> list[Path] | None:
    from longspan.plugins import include

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
bench = typer.Typer(help="Speed and memory against named peers, as ratios in one run.", no_args_is_help=True)
app.add_typer(bench, name="bench")
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

BenchOut = Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")]


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
    from longspan.core.method import catalogue

    print_catalogue(catalogue(), name, "method", ["title", "seam", "works_on", "cost", "exportable", "paper"], as_json)


@app.command()
def tasks(
    name: Annotated[str | None, typer.Argument(help="Show one task in full.")] = None,
    as_json: Json = False,
    include: Include = None,
) -> None:
    """The benchmarks: what each measures and where its data comes from."""
    from longspan.tasks.base import task_catalogue

    print_catalogue(
        task_catalogue(),
        name,
        "task",
        ["title", "measures", "metric", "higher_is_better", "offline", "source"],
        as_json,
    )


@app.command()
def models(as_json: Json = False) -> None:
    """The built-in models. A folder, a hub id and a .gguf file can stand wherever their names can."""
    from longspan.models import aliases

    known = {name: dataclasses.asdict(alias) for name, alias in aliases().items()}
    if as_json:
        return print_json(known)
    columns = ["name", "description", "parameters", "window", "download", "licence"]
    return print_table(
        columns, [[f"{a[c]:,}" if isinstance(a[c], int) else a[c] for c in columns] for a in known.values()]
    )


@app.command()
def compare(
    model: Model,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            help="Once for each method; or the folder of a model that was trained from this one. Left out: every method that the "
            "model can take.",
        ),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", "-t", help="Once for each task. Left out: ppl and passkey.")
    ] = None,
    length: Annotated[
        list[str] | None,
        typer.Option(
            "--length", "-l", help="Once for each length, like 16k. Left out: as far as half an hour reaches."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. Left out: runs/MODEL-DATE.")] = None,
    seed: Annotated[int, typer.Option(help="Draws the samples.")] = 0,
    samples: Annotated[int | None, typer.Option(help="Of each cell. Left out: each task's own number.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds after which a cell counts as failed.")] = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
    include: Include = None,
) -> None:
    """Methods × tasks × lengths, quality and cost, in one table and one page. The same command resumes."""
    from longspan.compare import compare as run_comparison

    made = run_comparison(
        model,
        methods=method,
        tasks=task,
        lengths=length,
        out=out or _default_out(model),
        seed=seed,
        samples=samples,
        dtype=dtype,
        device=device,
        timeout=timeout,
    )
    _report(made, None, as_json)


def _size(text: str, what: str = "length") -> int:
    """A number of tokens, at least 1."""
    from longspan.util.units import read_size

    if (size := read_size(text, what)) < 1:
        raise SpecError(f"{what} must be at least 1 token, not {text}")
    return size


def _default_out(model: str) -> Path:
    path = Path(model)
    last = "-".join(path.parts[-2:]) if path.name == "model" else path.name  # every training leaves a folder `model`
    name = re.sub(r"[^\w.-]+", "-", last).strip("-.") or "model"
    return Path("runs") / f"{name}-{datetime.date.today().isoformat()}"


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    html: Annotated[Path | None, typer.Option(help="Where the page goes. Left out: report.html in the run.")] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    as_json: Json = False,
) -> None:
    """The run's table in the terminal, and one page with its plots that needs nothing else."""
    from longspan.compare import Run

    page = _report(Run(run), html, as_json)
    if show and page is not None:
        typer.launch(page.resolve().as_uri())


def _report(made: Run, page: Path | None, as_json: bool) -> Path | None:
    """Prints the report; for people, or where `page` says where, it is written as a page too."""
    from longspan.compare.report import pages as report

    manifest, cells = made.manifest, made.cells()
    if not as_json:
        page = page or made.folder / "report.html"
    if page is not None:  # before anything is printed, which may fail
        report.html(manifest, cells, page)
    if as_json:
        print_json(report.table_json(manifest, cells))
    else:
        report.terminal(manifest, cells, console())
    if page is not None:
        typer.echo(f"page: {page}", err=as_json)
    return page


@app.command()
def apply(
    model: Model,
    method: Annotated[str, typer.Argument(help="Spec of a method that a checkpoint can hold.")],
    out: Annotated[Path, typer.Option(help="Folder of the new model.")],
    length: Annotated[str | None, typer.Option("--length", "-l", help="Target length, like 32k.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a model that is in the folder.")] = False,
    dtype: Annotated[str | None, typer.Option(help="Of the saved weights. Left out: the model's own.")] = None,
    as_json: Json = False,
    include: Include = None,
) -> None:
    """Saves a model that plain transformers loads."""
    from longspan.export import export

    size = None if length is None else _size(length)
    made = export(model, method, out, length=size, dtype=dtype, overwrite=overwrite)
    if as_json:
        return print_json(made.to_dict())
    typer.echo(f"{made.method} on {made.model} is in {made.folder}: {made.bytes / 1e6:,.1f} MB in {made.dtype}")
    typer.echo(f"it reads {made.reach:,} tokens")
    for note in made.notes:
        typer.echo(f"note: {note}")
    return typer.echo("\n" + "\n\n".join(filter(None, (made.python, made.vllm))))


@app.command()
def generate(
    model: Model,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="Spec. Left out: what the model was saved with, or none.")
    ] = None,
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
    print_json(dataclasses.asdict(made)) if as_json else typer.echo()


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
    """A conversation without end under constant memory. /stats, /reset and /exit are commands in it. A model without a chat
    template goes on with what you write."""
    from longspan import generation
    from longspan.models import inspect_model

    generation.check_settings(max_new_tokens, temperature, top_p, seed)
    system = system and _utf8(system, "--system")
    method = method or generation.default_chat_method(inspect_model(model))
    network, tokenizer, ready = _load(model, method, dtype, device)
    plain = tokenizer.chat_template is None
    if plain and system:
        raise SpecError(
            "--system: this model has no chat template, so nothing would tell instructions from text; leave it out"
        )
    ready(None)
    talk = generation.Chat(
        network,
        tokenizer,
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
    while (line := _ask()) is not None:
        _turn(talk, line.strip())


def _ask() -> str | None:
    """The user's next line; None at its end, or after /exit."""
    try:
        line = _utf8(input("> " if sys.stdin.isatty() else ""), "a line of standard input").removeprefix("\ufeff")
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
    return "\n\n".join([*parts, *([_utf8(prompt, "--prompt")] if prompt is not None else [])])


def _utf8(text: str, what: str) -> str:
    """Text from an argument or a terminal, in which bytes that are none stand as surrogates: read as UTF-8, whatever the
    system's own encoding is."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise LongspanError(f"{what} is not text in UTF-8") from error


def _read_text(file: Path) -> str:
    from longspan.util.textfiles import decode

    try:
        return decode(sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes())
    except UnicodeDecodeError as error:
        raise LongspanError(f"{file} is not text in UTF-8 (byte {error.start:,} is not); convert it first") from error
    except OSError as error:
        raise LongspanError(f"{str(file)[:200]} cannot be read: {error.strerror or error}") from error


def _load(model: str, method: str | None, dtype: str | None, device: str | None) -> tuple[Any, Any, Ready]:
    """(model, tokenizer, what puts the method on for a length). What can be refused is refused before weights load."""
    from longspan.apply import apply
    from longspan.core.method import parse
    from longspan.models import inspect_model, load

    wanted = None if method is None else parse(method)
    facts = inspect_model(model)
    if wanted is not None:
        wanted.check(facts)
    network, tokenizer = load(model, dtype=dtype, device=device)
    return network, tokenizer, lambda length: network if wanted is None else apply(network, wanted, length=length)


@app.command()
def plan(
    model: Model,
    length: Annotated[str, typer.Option("--length", "-l", help="Tokens to read, like 32k.")],
    method: OneMethod = "none",
    output_tokens: Annotated[str, typer.Option(help="Tokens to write after them.")] = "256",
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
    include: Include = None,
) -> None:
    """Before the run: memory, time, and which methods fit this machine."""
    from longspan import plan as planning

    sizes = {"length": _size(length), "output_tokens": _size(output_tokens, "output-tokens")}
    made = planning.plan(model, method=method, dtype=dtype, device=device, **sizes)
    print_json(made.to_dict()) if as_json else planning.terminal(made, console())


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file; docs/training.md lists its keys.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="On top of the recipe: training.steps=200")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it will take.")] = False,
    as_json: Json = False,
    include: Include = None,
) -> None:
    """A model from scratch, or a longer one of a model, as a recipe says. The same command resumes."""
    from longspan import training
    from longspan.training.recipe import read_overrides, read_recipe

    wanted = read_recipe(recipe, read_overrides(settings or []).items())
    if dry_run:
        made = training.plan_training(wanted)
        return print_json(made.to_dict()) if as_json else training.estimate.terminal(made, console())
    done = training.train(wanted)
    if int(os.environ.get("RANK", "0")):
        return None
    return print_json(done.to_dict()) if as_json else training.run.terminal(done, console())


@app.command()
def study(
    recipe: Annotated[Path, typer.Argument(help="YAML file of a model of type longspan, as train takes it.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="On top of the recipe: training.steps=200")
    ] = None,
    position: Annotated[
        list[str] | None, typer.Option("--position", "-p", help="Once for each scheme. Left out: all of them.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="How often each scheme is trained.")] = 1,
    times: Annotated[str, typer.Option(help="Lengths tested, as multiples of the training length.")] = "1,2,4,8,16,32",
    samples: Annotated[int, typer.Option(help="Windows of text at each length.")] = 8,
    text: Annotated[
        str, typer.Option(help="prose, code, novel, or a text file or folder that was not trained on.")
    ] = "prose",
    sliding: Annotated[bool, typer.Option(help="Measure the sliding protocol too.")] = True,
    out: Annotated[Path, typer.Option(help="Folder for the models and the results.")] = Path("runs/study"),
    as_json: Json = False,
    include: Include = None,
) -> None:
    """Every position scheme trained alike and read far past its training length. The same command resumes."""
    from longspan.training import study as studies
    from longspan.training.recipe import read_overrides
    from longspan.util.units import read_size

    multiples = tuple(read_size(part.strip(), "times") for part in times.split(","))
    wanted = studies.Settings(tuple(position or studies.SCHEMES), seeds, multiples, samples, text, sliding)
    say = functools.partial(typer.echo, err=True)
    folder = studies.study(recipe, wanted, out, say, **read_overrides(settings or []))
    if as_json:
        return print_json(json.loads((folder / "study.json").read_text(encoding="utf-8")))
    print_table(*studies.table(folder))
    return typer.echo(f"picture: {folder / 'curves.png'}")


@bench.command("decode")
def bench_decode(
    model: Model,
    method: OneMethod = "streaming:sinks=4,window=2044",
    tokens: Annotated[int, typer.Option(help="Steps that are timed.")] = 64,
    out: BenchOut = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Time per output token at a full cache."""
    from longspan.bench import timings as bench

    network, _, _ = _load(model, method, dtype, device)
    print_bench(bench.decode(network, method=method, tokens=tokens, on_row=_say_row), out, as_json)


@bench.command("prefill")
def bench_prefill(
    model: Model,
    length: Annotated[str, typer.Option("--length", "-l", help="Tokens to read, like 32k.")],
    method: OneMethod = "streaming:sinks=4,window=4092",
    chunk: Annotated[str, typer.Option(help="Tokens that go through the model at once.")] = "16k",
    repeats: Annotated[int, typer.Option(help="Of each contender.")] = 3,
    out: BenchOut = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Time and memory of reading a prompt."""
    from longspan.bench import timings as bench

    size, at_once = _size(length), _size(chunk, "chunk")
    network, _, _ = _load(model, method, dtype, device)
    made = bench.prefill(network, length=size, method=method, chunk=at_once, repeats=repeats, on_row=_say_row)
    print_bench(made, out, as_json)


@bench.command("attention")
def bench_attention(
    lengths: Annotated[
        list[str] | None,
        typer.Option("--lengths", "-l", help="A length, like 16k; once for each. Left out, 1k and on."),
    ] = None,
    patterns: Annotated[
        list[str] | None, typer.Option("--patterns", "-p", help="A pattern or mixer; once for each. Left out, all.")
    ] = None,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 16,
    kv_heads: Annotated[int | None, typer.Option(help="Key-value heads; as many as heads if left out.")] = None,
    head_dim: Annotated[int, typer.Option(help="Channels of a head.")] = 128,
    most_s: Annotated[float, typer.Option(help="Seconds of one call past which longer texts are left out.")] = 10.0,
    peers: Annotated[bool, typer.Option(help="Modules of other libraries too.")] = True,
    out: Annotated[
        Path | None,
        typer.Option(help="Also write this JSON file, and a plot beside it. What is in it is not measured again."),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
    include: Include = None,
) -> None:
    """Time and memory of every pattern and mixer, by length, beside dense attention."""
    from longspan.bench import attention as bench_attention

    def keep(row: AttentionRow, made: bench_attention.AttentionBench) -> None:
        typer.echo(f"{row.name}, {row.length:,}: {row.note or f'{1e3 * (row.forward_s or 0):.4g} ms'}", err=True)
        if out is not None:
            made.write(out)

    made = bench_attention.attention(
        lengths=[_size(x) for x in lengths or ()],
        specs=patterns or (),
        shape=bench_attention.shape_of(heads, kv_heads or heads, head_dim, dtype, device),
        most_s=most_s,
        peers=peers,
        begun=bench_attention.AttentionBench.read(out) if out is not None and out.exists() else None,
        on_row=keep,
    )
    print_attention(made, out, as_json)


def _say_row(row: Row) -> None:
    typer.echo(f"{row.name}: {row.note or f'{row.seconds:.4g} s'}", err=True)


def _settle_streams() -> None:
    """Where standard output is not Unicode (LC_ALL=C, latin-1), what it has no sign for is a question mark, and no error; what
    standard input cannot read as its encoding is kept to be looked at."""
    for stream, errors in ((sys.stdout, "replace"), (sys.stdin, "surrogateescape")):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors=errors)


def run(arguments: list[str] | None = None) -> int:
    """The command line as a function: prints, and returns the exit code."""
    _settle_streams()
    try:
        app(arguments, prog_name="longspan")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def main() -> None:
    sys.exit(run())
