"""The commands `bench decode`, `bench prefill` and `bench attention`: speed and memory against named peers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longspan.cli.loading import load
from longspan.cli.options import Device, Dtype, Include, Json, Model, OneMethod, token_count
from longspan.cli.printing import print_attention, print_bench

if TYPE_CHECKING:
    from longspan.bench.attention import AttentionBench
    from longspan.bench.attention import Row as AttentionRow
    from longspan.bench.timings import Row

app = typer.Typer(help="Speed and memory against named peers, as ratios in one run.", no_args_is_help=True)
BenchOut = Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")]


@app.command()
def decode(
    model: Model,
    method: OneMethod = "streaming:sinks=4,window=2044",
    tokens: Annotated[int, typer.Option(help="Steps that are timed.")] = 64,
    out: BenchOut = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Time per output token at a full cache."""
    from longspan.bench import timings

    loaded = load(model, method, dtype, device)
    rows = timings.decode(loaded.model, method=method, tokens=tokens, on_row=_print_row)
    print_bench(rows, out, as_json)


@app.command()
def prefill(
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
    from longspan.bench import timings

    sizes = {"length": token_count(length), "chunk": token_count(chunk, "chunk")}
    loaded = load(model, method, dtype, device)
    rows = timings.prefill(loaded.model, method=method, repeats=repeats, on_row=_print_row, **sizes)
    print_bench(rows, out, as_json)


@app.command()
def attention(
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
    from longspan.bench import attention as attention_bench

    def keep(row: AttentionRow, so_far: AttentionBench) -> None:
        typer.echo(f"{row.name}, {row.length:,}: {row.note or f'{1e3 * (row.forward_s or 0):.4g} ms'}", err=True)
        if out is not None:
            so_far.write(out)

    rows = attention_bench.attention(
        lengths=[token_count(x) for x in lengths or ()],
        specs=patterns or (),
        shape=attention_bench.shape_of(heads, kv_heads or heads, head_dim, dtype, device),
        most_s=most_s,
        peers=peers,
        begun=attention_bench.AttentionBench.read(out) if out is not None and out.exists() else None,
        on_row=keep,
    )
    print_attention(rows, out, as_json)


def _print_row(row: Row) -> None:
    typer.echo(f"{row.name}: {row.note or f'{row.seconds:.4g} s'}", err=True)
