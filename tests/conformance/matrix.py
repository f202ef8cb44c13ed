"""The matrix method × family: one line for each method, and whether a cell runs or is refused.

    python tests/conformance/matrix.py > docs/conformance.md

`test_matrix.py` proves every cell that runs; the table only says which these are.
"""

from __future__ import annotations

import functools
import json
import re
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import families
import transformers
from transformers import PreTrainedModel

from longspan.apply import applied
from longspan.core.facts import facts_of
from longspan.core.method import NoMethod, catalogue, parse
from longspan.util.errors import NotSupported

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"
FORWARDS = "## Concurrent and nested forwards, and images"
"""The heading of the second table, which `forwards.py` makes."""
HEAD = """# Which method runs on which model

Written by `python tests/conformance/matrix.py > docs/conformance.md`, from tiny random models of each family. Every cell
that runs is tested (`tests/conformance/test_matrix.py`): logits stay where the method changes nothing, are the same in one
forward, in chunks, token by token and in left-padded batches, and `remove` restores the model bit for bit.
"""


@dataclass(frozen=True)
class Line:
    """One row: `spec` as it is tried, `neutral` the same method where it must change nothing. `{ones}` and `{twos}` stand for
    files of LongRoPE factors. `neutral` equals `spec` for a method that leaves inputs within the window as they are."""

    spec: str
    neutral: str
    static: bool = False
    """Whether a saved checkpoint must hold the method."""

    @property
    def title(self) -> str:
        """The spec as the table shows it."""
        return re.sub(r"{\w+}", "FILE", self.spec)

    @property
    def name(self) -> str:
        """A name for tests."""
        return re.sub(r"[^a-z0-9-]+", "-", self.title.lower())


LISTED = (
    Line("pi:factor=2", "pi:factor=1", static=True),
    Line("ntk:factor=4", "ntk:factor=1", static=True),
    Line("ntk-by-parts:factor=2", "ntk-by-parts:factor=1", static=True),
    Line("yarn:factor=2", "yarn:factor=1", static=True),
    Line("yarn:factor=2,ramp=paper", "yarn:factor=1,ramp=paper", static=True),
    Line("llama3:factor=2", "llama3:factor=1", static=True),
    Line("longrope:factor=2,factors={twos}", "longrope:factor=1,factors={ones}", static=True),
    Line("dynamic-ntk:step=4", "dynamic-ntk:step=4"),
    Line("self-extend:group=4,window=6", "self-extend:group=1,window=6"),
    Line("rerope:window=6", "rerope:window=31"),
    Line("leaky-rerope:window=6,factor=4", "leaky-rerope:window=6,factor=1"),
    Line("window:size=12", "window:size=64"),
    Line("bca:size=18", "bca:size=64"),
    Line("local:block=10", "local:block=64"),
    Line("longnet:segments=8/16/24,dilations=1/2/3", "longnet:segments=64,dilations=1"),
    Line("logn:window=8", "logn:window=64"),
    Line("streaming:sinks=3,window=9", "streaming:sinks=3,window=64"),
    Line("focused:local=8,layers=0/1", "focused:local=32,layers=0/1"),
    Line("focused:local=8,k=4", "focused:local=32,k=4"),
    Line("ntk:factor=4 + self-extend:group=4,window=6", "ntk:factor=1 + self-extend:group=1,window=6"),
    Line("logn:window=8 + rerope:window=6", "logn:window=64 + rerope:window=31"),
    Line("yarn:factor=2 + streaming:sinks=3,window=9", "yarn:factor=1 + streaming:sinks=3,window=64"),
)
"""Methods with settings of several kinds, and combinations. Any other method is tried with its own `examples`."""


def _own_lines() -> tuple[Line, ...]:
    """A line for each method of the package that can be put on pretrained models and is not listed."""
    listed = {part.strip().partition(":")[0] for line in LISTED for part in line.spec.split("+")}
    return tuple(
        Line(*cls.examples)
        for name, cls in catalogue().items()
        if name not in {*listed, NoMethod.name}
        and NoMethod.works_on in cls.works_on
        and cls.__module__.startswith("longspan.")
        and len(cls.examples) == 2
    )


LINES = LISTED + _own_lines()


def filled(spec: str, model: PreTrainedModel, folder: Path) -> str:
    """`spec` with the names of files that hold factors for this model's rotated pairs."""
    if "{" not in spec:
        return spec
    rope = facts_of(model).rope
    for name, value in (("ones", 1.0), ("twos", 2.0)):
        (folder / f"{name}.json").write_text(json.dumps([value] * (rope.dim // 2 if rope else 8)))
        spec = spec.replace(f"{{{name}}}", str(folder / f"{name}.json"))
    return spec


def refusal(line: Line, family: str, folder: Path) -> str | None:
    """Why the cell is refused, told for any model and method; None where it runs."""
    model = families.build(family)
    spec = filled(line.spec, model, folder)
    try:
        with applied(model, spec):
            return None
    except NotSupported as error:
        reason = str(error).replace(type(model).__name__, "the model")
        return re.sub(rf"^({'|'.join(m.name for m in parse(spec).methods)})\b", "the method", reason)


def table() -> str:
    """The matrix in Markdown, with the reasons of refusals below it."""
    reasons: list[str] = []
    rows = [f"| | {' | '.join(f'`{line.title}`' for line in LINES)} |", "|---" * (len(LINES) + 1) + "|"]
    with tempfile.TemporaryDirectory() as folder:
        for family in families.FAMILIES:
            cells = []
            for line in LINES:
                reason = refusal(line, family, Path(folder))
                if reason is not None and reason not in reasons:
                    reasons.append(reason)
                cells.append("runs" if reason is None else f"no ({reasons.index(reason) + 1})")
            rows.append(f"| {family} | {' | '.join(cells)} |")
    notes = [f"{i}. {reason}" for i, reason in enumerate(reasons, 1)]
    since = [
        f"{family}{'' if begins == ('',) else ' with ' + ', '.join(begins[:-1])}: from transformers {version} on, where {why}."
        for family, (version, begins, why) in families.SINCE.items()
    ]
    return "\n".join([HEAD, *rows, "", *notes, "", *since])


@functools.cache
def _documented() -> dict[str, list[str]]:
    rows = [
        row.strip("| ").split(" | ")
        for row in PAGE.read_text().partition(FORWARDS)[0].splitlines()
        if row.startswith("| ")
    ]
    return {row[0]: row[1:] for row in rows[1:]}


def documented(family: str, line: Line) -> str:
    """What the page says of a cell: `runs`, or `no` with the number of the reason, or that transformers is too old."""
    row = _documented().get(family, [])
    said = row[LINES.index(line)] if len(row) == len(LINES) else "nothing: write the page again"
    return (
        said
        if said != "runs" or families.installed(family, line.spec)
        else "no (the installed transformers is too old)"
    )


if __name__ == "__main__":
    import forwards  # which imports this file

    transformers.logging.set_verbosity_error()  # tiny models are warned of, a hundred times over
    warnings.simplefilter("ignore", FutureWarning)
    print(table(), forwards.section(), sep="\n\n")
