"""The efficient transformers of Tay et al.'s survey (arXiv 2009.06732, table 1) as data: which are here, how time grows.

    python tools/survey.py > docs/survey.md

Complexities, classes and whether a model can decode are the survey's; the explanations are ours. Time exponents are measured:
they come from a stored result of `longspan bench attention`, and where there is none the page says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from longspan.core.method import catalogue
from longspan.lm.base import Attention
from longspan.util.growth import UNTOLD, Growth, growth_of

MEASURED = Path(__file__).parents[1] / "reproductions" / "speed" / "attention.json"
"""Where the stored result lies in a checkout."""
UNKNOWN = "not measured yet"
DENSE = "dense SDPA"
"""What the bench calls full attention."""

CLASSES = {
    "FP": (
        "fixed patterns",
        "Which keys a query sees is decided before any text is read: blocks, windows, strides. Cheap on every machine, since "
        "the same tiles are computed each time; what lies outside the pattern is reached only through further layers.",
    ),
    "LP": (
        "learnable patterns",
        "The text itself decides who meets whom: tokens are hashed, clustered or sorted, and attend within their group. What "
        "belongs together can meet at any distance; sorting costs time, and neighbours may fall into different groups.",
    ),
    "M": (
        "memory",
        "A few extra places (global tokens, learned vectors) that many tokens read and write. Two steps then connect any two "
        "tokens, for a cost of length times places. What looks at the whole text cannot be used as it is to decode.",
    ),
    "LR": (
        "low rank",
        "Keys and values are projected to a fixed number of rows along the text's length. The projection mixes the future "
        "into every row and is made for one length, so that these are encoders.",
    ),
    "KR": (
        "kernels",
        "The softmax's exponential becomes a product of features of query and key. Sums over keys can then be taken before "
        "queries are known: linear time, and decoding with a state of one size. Features approximate the softmax or replace it.",
    ),
    "RC": (
        "recurrence",
        "A long text is read in segments, and states of earlier segments are kept as keys. It lengthens what is seen; within a "
        "segment attention is what it was.",
    ),
    "DS": (
        "downsampling",
        "The sequence itself becomes shorter from layer to layer, by pooling or by choosing tokens, and so everything after it "
        "cheaper.",
    ),
    "Sparse": (
        "sparse weights",
        "Attention stays; each token uses a part of the parameters (experts, sparse products). That buys size, not length.",
    ),
}
"""The survey's classes: name and what it means."""


@dataclass(frozen=True)
class Entry:
    """One model. `year` is 0 where none is known; `complexity` is in the text's length N and other sizes; `decodes` whether it
    can write token by token; `classes` keys of CLASSES; `method` the longspan method with its idea, None where there is none;
    `grows` the exponent of time that its complexity promises at long lengths with all other settings fixed, for those that are
    here."""

    model: str
    year: int
    complexity: str
    decodes: bool
    classes: tuple[str, ...]
    method: str | None = None
    grows: float | None = None
    note: str = ""


SURVEY = (
    Entry("Memory Compressed", 2018, "N·c²", True, ("FP", "M")),
    Entry("Image Transformer", 2018, "N·m", True, ("FP",)),
    Entry("Set Transformer", 2019, "k·N", False, ("M",)),
    Entry(
        "Transformer-XL",
        2019,
        "N²",
        True,
        ("RC",),
        "transformer-xl",
        1.0,
        "N is a segment's length; of the text, linear",
    ),
    Entry("Sparse Transformer", 2019, "N·√N", True, ("FP",)),
    Entry("Reformer", 2020, "N·log N", True, ("LP",), "lsh", 1.0),
    Entry("Routing Transformer", 2020, "N·√N", True, ("LP",)),
    Entry("Axial Transformer", 2019, "N·√N", True, ("FP",)),
    Entry("Compressive Transformer", 2020, "N²", True, ("RC",)),
    Entry("Sinkhorn Transformer", 2020, "B²", True, ("LP",)),
    Entry("Longformer", 2020, "n·(k + m)", True, ("FP", "M"), "longformer", 1.0),
    Entry("ETC", 2020, "N_g² + N·N_g", False, ("FP", "M"), "bigbird", 1.0, "its form with extra global tokens"),
    Entry("Synthesizer", 2020, "N²", True, ("LR", "LP")),
    Entry("Performer", 2020, "N", True, ("KR",), "performer", 1.0),
    Entry("Funnel Transformer", 2020, "N²", True, ("FP", "DS")),
    Entry("Linformer", 2020, "N", False, ("LR",), "linformer", 1.0),
    Entry("Linear Transformers", 2020, "N", True, ("KR",), "linear", 1.0),
    Entry("Big Bird", 2020, "N", False, ("FP", "M"), "bigbird", 1.0),
    Entry("Random Feature Attention", 2021, "N", True, ("KR",)),
    Entry("Long-Short Transformer", 2021, "k·N", True, ("FP", "LR")),
    Entry("Poolingformer", 2021, "N", False, ("FP", "M")),
    Entry("Nyströmformer", 2021, "k·N", False, ("M", "DS")),
    Entry("Perceiver", 2021, "k·N", True, ("M", "DS")),
    Entry("Clusterformer", 2020, "N·log N", False, ("LP",)),
    Entry("Luna", 2021, "k·N", True, ("M",)),
    Entry("TokenLearner", 2021, "k²", False, ("DS",)),
    Entry("Adaptive Sparse Transformer", 2019, "N²", True, ("Sparse",)),
    Entry("Product Key Memory", 2019, "N²", True, ("Sparse",)),
    Entry("Switch Transformer", 2021, "N²", True, ("Sparse",)),
    Entry("ST-MoE", 2022, "N²", True, ("Sparse",)),
    Entry("GShard", 2020, "N²", True, ("Sparse",)),
    Entry("Scaling Transformers", 2021, "N²", True, ("Sparse",)),
    Entry("GLaM", 2021, "N²", True, ("Sparse",)),
)
"""The survey's 33 rows."""

OTHERS = (
    Entry("Full attention", 2017, "N²", True, (), "full", 2.0),
    Entry("Window", 2020, "N·w", True, ("FP",), "window", 1.0),
    Entry("Simple local attention, disjoint blocks", 2021, "N·b", True, ("FP", "M"), "local", 1.0),
    Entry("Simple local attention, overlapping blocks", 2021, "N·2b", True, ("FP", "M"), "overlap", 1.0),
    Entry("LongNet", 2023, "N", True, ("FP",), "longnet", 1.0),
    Entry("FLASH (gated attention unit, mixed chunks)", 2022, "N·c", True, ("KR", "FP"), "flash", 1.0),
    Entry("Gated attention unit", 2022, "N²", True, (), "gau", 2.0),
    Entry("S4", 2021, "N·log N", True, (), "s4", 1.0, "a state space, no attention"),
    Entry("S4D", 2022, "N·log N", True, (), "s4d", 1.0, "likewise"),
)
"""What is here and not in the survey, put into its classes by us."""


def here_otherwise() -> tuple[Entry, ...]:
    """OTHERS, and every pattern and mixer of the package that no table names, as it describes itself."""
    named = {entry.method for entry in (*SURVEY, *OTHERS)}
    return OTHERS + tuple(
        Entry(
            cls.title, int((re.search(r"\d{4}", cls.paper) or ["0"])[0]), cls.cost, "causal" in cls.directions, (), name
        )
        for name, cls in catalogue().items()
        if issubclass(cls, Attention) and name not in named and cls.__module__.startswith("longspan.")
    )


def measured(path: Path = MEASURED) -> dict[str, Growth]:
    """How the forward's time grows, by method, from the rows that `longspan bench attention` wrote; empty where there is no
    file. Of a method that was measured several times (other settings, other ways) the first counts that has an exponent;
    dense SDPA stands for `full`."""
    if not path.exists():
        return {}
    found: dict[str, Growth] = {}
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    for name in dict.fromkeys(row["name"] for row in rows):
        method = "full" if name == DENSE else name.partition(":")[0]
        if (grows := growth_of(rows, name, "forward_s")) is not None:
            found.setdefault(method, grows)
    return found


def _row(entry: Entry, exponents: Mapping[str, Growth]) -> str:
    here = "" if entry.method is None else f"`{entry.method}`" + (f" ({entry.note})" if entry.note else "")
    promised, found = "", ""
    if entry.method is not None:
        promised = "" if entry.grows is None else f"{entry.grows:g}"
        found = str(exponents[entry.method]) if entry.method in exponents else UNKNOWN
    classes, decodes = " + ".join(entry.classes), "yes" if entry.decodes else "no"
    cells = entry.model, str(entry.year or ""), entry.complexity, decodes, classes, here, promised, found
    return "| " + " | ".join(cells) + " |"


def _table(entries: tuple[Entry, ...], exponents: Mapping[str, Growth]) -> list[str]:
    head = "model", "year", "complexity", "decodes", "class", "here", "exponent promised", "exponent measured"
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return lines + [_row(entry, exponents) for entry in entries]


def page(exponents: Mapping[str, Growth]) -> str:
    """The page in Markdown; exponents: log-log slope of time over length, by method."""
    here = sum(entry.method is not None for entry in SURVEY)
    return "\n".join(
        [
            "# Efficient transformers",
            "",
            "Written by `python tools/survey.py > docs/survey.md`. The table of Tay, Dehghani, Bahri and Metzler's survey "
            f"(arXiv 2009.06732): {len(SURVEY)} models, {here} of them here. N is the length of the text, other letters are "
            "settings. *Decodes* says whether the model can write token by token, *here* which method of longspan has its idea.",
            "",
            "The exponent is the slope of time over length, both as logarithms: 1 where twice the text takes twice the time, 2 "
            "where it takes four times. Promised is that of the complexity for long texts, a factor log N left out; measured is "
            f"that of `longspan bench attention`, with its 95 % interval; it {UNTOLD}.",
            "",
            *_table(SURVEY, exponents),
            "",
            "## Here, and not in the survey",
            "",
            "Put into its classes by us, where one fits.",
            "",
            *_table(here_otherwise(), exponents),
            "",
            "## Classes",
            "",
            *(f"- **{short}, {name}.** {text}" for short, (name, text) in CLASSES.items()),
        ]
    )


if __name__ == "__main__":
    print(page(measured()))
