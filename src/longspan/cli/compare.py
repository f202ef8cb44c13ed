"""The commands `compare` and `report`: a run, its table and its page."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longspan.cli.options import Device, Dtype, Include, Json, Model
from longspan.cli.printing import console, print_json

if TYPE_CHECKING:
    from longspan.compare import Run


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
    """Methods × tasks × lengths, quality and cost, in one table and one page.

    The same command resumes.
    """
    from longspan.compare import compare as run_comparison

    run = run_comparison(
        model,
        methods=method,
        tasks=task,
        lengths=length,
        out=out or default_folder(model),
        seed=seed,
        samples=samples,
        dtype=dtype,
        device=device,
        timeout=timeout,
    )
    _print_report(run, None, as_json)


def default_folder(model: str) -> Path:
    """`runs/MODEL-DATE`, where MODEL is a name or the end of a path.

    Characters that a folder cannot have are replaced.
    """
    path = Path(model)
    last = "-".join(path.parts[-2:]) if path.name == "model" else path.name  # every training leaves a folder `model`
    name = re.sub(r"[^\w.-]+", "-", last).strip("-.") or "model"
    return Path("runs") / f"{name}-{datetime.date.today().isoformat()}"


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    html: Annotated[Path | None, typer.Option(help="Where the page goes. Left out: report.html in the run.")] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    as_json: Json = False,
) -> None:
    """The run's table in the terminal, and one page with its plots that needs nothing else."""
    from longspan.compare import Run

    page = _print_report(Run(run), html, as_json)
    if show and page is not None:
        typer.launch(page.resolve().as_uri())


def _print_report(run: Run, page: Path | None, as_json: bool) -> Path | None:
    """Prints the report, writes it as a page (with `as_json` only where `page` names a file), and returns the page."""
    from longspan.compare.report import pages

    manifest, cells = run.manifest, run.cells()
    if not as_json:
        page = page or run.folder / "report.html"
    if page is not None:  # before anything is printed, which may fail
        pages.html(manifest, cells, page)
    if as_json:
        print_json(pages.table_json(manifest, cells))
    else:
        pages.terminal(manifest, cells, console())
    if page is not None:
        typer.echo(f"page: {page}", err=as_json)
    return page
