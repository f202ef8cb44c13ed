"""The advice of a report in one sentence: method, cost, and reason.

Only measurements decide, in this order:

1. A method works where it finished every task at the target length and keeps the bare model's quality at its native length:
   at least half of a score, and at most half a nat above a loss. A task that the bare model fails at its native length
   and that no method passes is ignored.
2. Of the working methods, those remain that are not measurably worse than the best at a task where more is better: the
   interval of the paired difference includes zero. Losses decide after that, since a low loss does not prove that a text
   was read: a method is dropped where another has a measurably lower loss and is not worse at anything. With many tokens
   tiny differences can be measured, so losses within 0.01 nats, 1 % of perplexity, count as equal.
3. Of these the cheapest is advised: time to read the input and write a hundred tokens. Within 5 % the bare model is
   preferred, and then the better score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from longspan.compare.report.results import BARE, STATUS, Results, TaskFacts
from longspan.util.units import duration, size

KEPT = 0.5
"""Share of the bare model's native score that a method must keep to count as working."""
ROOM = 0.5
"""How far a loss may be above the bare model's native loss, in nats per token."""
SLIGHT = 0.01
"""Losses that differ by no more than this, in nats per token, count as equal."""
WRITTEN = 100
"""Tokens written after the input, in the time by which methods are compared."""
TIE = 1.05
"""Times within this factor count as equal."""
SMALL = 0.9
"""A KV cache below this share of the full one has dropped tokens."""
FEW = 20
"""Samples of a cell below which a note says that intervals are wide."""


@dataclass(frozen=True)
class Advice:
    """The advice of a report; `method` is None where no method works.

    parts: the sentence in pieces, each with whether it is emphasised. notes: sentences beside it. working: all methods
    that work.
    """

    method: str | None
    parts: tuple[tuple[str, bool], ...]
    notes: tuple[str, ...] = ()
    working: tuple[str, ...] = ()
    best: dict[str, str] = field(default_factory=dict)
    """The method with the best score at the target length, by task spec."""

    @property
    def sentence(self) -> str:
        """The sentence as plain text."""
        return "".join(text for text, _ in self.parts)

    def data(self) -> dict[str, Any]:
        """The advice as JSON data."""
        return {
            "sentence": self.sentence,
            "method": self.method,
            "notes": list(self.notes),
            "working": list(self.working),
            "best": self.best,
        }


def advise(results: Results) -> Advice:
    """The advice for the longest length at which any cell of the run finished."""
    informative = [t for t in results.tasks if _is_informative(results, t)]
    working = [m for m in results.methods if informative and all(_works(results, m, t) for t in informative)]
    chosen = _cheapest(results, _not_worse(results, working, informative), informative) if working else None
    if results.methods == [BARE]:
        parts = _only_bare(results)
    elif chosen is None:
        parts = _nothing_works(results, informative) + _shorter(results)
    else:
        parts = _use(results, chosen, working, informative)
    best = {t.spec: b for t in results.tasks if (b := results.best(t, results.target))}
    return Advice(chosen, tuple(parts), tuple(_notes(results, chosen, informative)), tuple(working), best)


def forgets(results: Results, method: str, informative: Sequence[TaskFacts]) -> bool:
    """True where a method keeps the loss but, with a smaller cache, fails other tasks."""
    losses = [t for t in informative if not t.higher_is_better]
    scored = [t for t in informative if t.higher_is_better and results.ok(method, t, results.target)]
    keeps_loss = bool(losses) and all(_works(results, method, t) for t in losses)
    return keeps_loss and _drops(results, method) and any(not _works(results, method, t) for t in scored)


def _is_informative(results: Results, task: TaskFacts) -> bool:
    """True for a task that rates methods and that some method, or the bare model at its native length, does not fail."""
    if not task.rates:
        return False
    scores = [results.score(m, task, results.target) for m in results.methods]
    here = [s for s in scores if s is not None]
    return bool(here) and (not task.higher_is_better or max(*here, _native(results, task) or 0.0, 0.0) > 0)


def _native(results: Results, task: TaskFacts) -> float | None:
    """The bare model's score at its native length, which a method has to keep."""
    return results.score(BARE, task, results.native)


def _works(results: Results, method: str, task: TaskFacts) -> bool:
    score, native = results.score(method, task, results.target), _native(results, task)
    if score is None:
        return False
    if task.higher_is_better:
        return score > 0 and score >= KEPT * (native or 0.0)
    return native is None or score <= native + ROOM


def _drops(results: Results, method: str) -> bool:
    """True where the method's KV cache at the target length is clearly smaller than the full one."""
    cache, full = results.cost(method)["cache_bytes"], results.full_cache()
    return cache is not None and full is not None and cache < SMALL * full


def _worse(results: Results, method: str, other: str, task: TaskFacts, length: int) -> bool:
    """True where `method` is measurably worse than `other`, by more than `SLIGHT` for a loss."""
    change = results.difference(method, other, task, length).value or 0.0
    return results.worse(method, other, task, length) and (task.higher_is_better or change > SLIGHT)


def _not_worse(results: Results, working: Sequence[str], informative: Sequence[TaskFacts]) -> list[str]:
    left = list(working)
    for task in (t for t in informative if t.higher_is_better):
        best = results.best(task, results.target, left)
        assert best is not None, "a working method has a score"
        left = [m for m in left if not _worse(results, m, best, task, results.target)]
    return [m for m in left if not any(_beats(results, other, m, informative) for other in left)]


def _beats(results: Results, one: str, other: str, informative: Sequence[TaskFacts]) -> bool:
    """True where `one` is measurably better at a task and worse at none."""
    room = {t: 0.0 if t.higher_is_better else SLIGHT for t in informative}
    ahead = [t.gain(_score(results, one, t)) >= t.gain(_score(results, other, t)) - room[t] for t in informative]
    return all(ahead) and any(_worse(results, other, one, t, results.target) for t in informative)


def _score(results: Results, method: str, task: TaskFacts) -> float:
    """The score at the target length; the worst one without a score."""
    score = results.score(method, task, results.target)
    return task.worst if score is None else score


def _expense(results: Results, method: str) -> float:
    """Seconds to read the input and write `WRITTEN` tokens; infinite where not measured."""
    cost = results.cost(method)
    if cost["prefill_s"] is None:
        return math.inf
    return cost["prefill_s"] + WRITTEN * (cost["decode_s_per_token"] or 0.0)


def _cheapest(results: Results, among: Sequence[str], informative: Sequence[TaskFacts]) -> str:
    least = min(_expense(results, m) for m in among)
    equal = [m for m in among if _expense(results, m) <= least * TIE]
    ranked = sorted(informative, key=lambda t: not t.higher_is_better)

    def rank(method: str) -> tuple[Any, ...]:
        scores = [-t.gain(_score(results, method, t)) for t in ranked]
        return (method != BARE, *scores, results.peak(method) or math.inf)

    return min(equal, key=rank)


def _use(
    results: Results, chosen: str, working: Sequence[str], informative: Sequence[TaskFacts]
) -> list[tuple[str, bool]]:
    what = [("use no method", True)] if chosen == BARE else [("use ", False), (chosen, True)]
    bare = "the plain model" if chosen == BARE else "it"
    because = (
        f": {bare} {_cost_phrase(results, chosen)}, because {_quality_phrase(results, chosen, working, informative)}"
    )
    because += _reason(results, working, informative) + _harm_phrase(results, chosen)
    return [*_opening(results), *what, (because + _dropped_phrase(results, chosen, informative) + ".", False)]


def _opening(results: Results) -> list[tuple[str, bool]]:
    return [("For ", False), (results.name, True), (" at ", False), (f"{results.target:,} tokens", True), (", ", False)]


def _only_bare(results: Results) -> list[tuple[str, bool]]:
    scores = ", ".join(_score_phrase(results, BARE, t) for t in results.tasks)
    text = f"only the plain model was measured ({scores}), so there is nothing to choose from: name methods to compare"
    return [*_opening(results), (text + ".", False)]


def _nothing_works(results: Results, informative: Sequence[TaskFacts]) -> list[tuple[str, bool]]:
    parts = [*_opening(results), ("nothing that was measured works", True)]
    if not informative:
        return [
            *parts,
            (": no task shows a difference, since the plain model fails them at its native length too.", False),
        ]
    failed = [t for t in informative if not any(_works(results, m, t) for m in results.methods)]
    shown = failed[0] if failed else sorted(informative, key=lambda t: not t.higher_is_better)[0]
    best = results.best(shown, results.target)
    assert best is not None, "an informative task has a score"
    native = _native(results, shown)
    beside = f", against {shown.number(native)} of the plain model at {results.native:,}" if native is not None else ""
    if shown.higher_is_better and _score(results, best, shown) <= 0:
        text = f": {shown.label} is {_number(results, best, shown)} with every method{beside}"
    else:
        text = f": the best {shown.label}, of {_named(best)}, is {_number(results, best, shown)}{beside}"
    if not failed:
        text += ", and no method passes the other tasks as well"
    if keeper := next((m for m in results.methods if forgets(results, m, informative)), None):
        text += f"; {_forget_phrase(results, keeper, informative)}"
    return [*parts, (text + ".", False)]


def _shorter(results: Results) -> list[tuple[str, bool]]:
    """The longest shorter length beyond the native one at which a method works, with its scores."""
    finished = sorted({c["length"] for c in results.cells() if c["status"] == "ok"} - {results.target}, reverse=True)
    for length in (n for n in finished if n > results.native):
        shorter = results.up_to(length)
        if (method := advise(shorter).method) is not None:
            informative = [t for t in shorter.tasks if _is_informative(shorter, t)]
            scores = _and([_score_phrase(shorter, method, t) for t in informative])
            return [(f" Up to {length:,} tokens ", False), (_named(method), True), (f" works ({scores}).", False)]
    return []


def _named(method: str) -> str:
    return "the plain model" if method == BARE else method


def _number(results: Results, method: str, task: TaskFacts) -> str:
    return task.number(results.score(method, task, results.target))


def _score_phrase(results: Results, method: str, task: TaskFacts) -> str:
    return f"{task.label} {_number(results, method, task)}"


def _cost_phrase(results: Results, method: str) -> str:
    cost, peak = results.cost(method), results.peak(method)
    phrases = []
    if cost["prefill_s"] is not None:
        phrases.append(f"reads them in {duration(cost['prefill_s'])}")
    if cost["decode_s_per_token"] is not None:
        phrases.append(f"writes a token in {duration(cost['decode_s_per_token'])}")
    if peak is not None:
        phrases.append(f"needs {size(peak)} of memory at its peak")
    return _and(phrases) or "finished at a cost that was not measured"


def _quality_phrase(results: Results, method: str, working: Sequence[str], informative: Sequence[TaskFacts]) -> str:
    return _and(
        [
            f"{_score_phrase(results, method, t)}{_beside(results, method, working, t)}"
            for t in sorted(informative, key=lambda t: not t.higher_is_better)
        ]
    )


def _beside(results: Results, method: str, working: Sequence[str], task: TaskFacts) -> str:
    """The plain model's score, and the best score of the working methods where it is another's, in brackets."""
    phrases = []
    if method != BARE:
        status = STATUS[results.status(BARE, task, results.target)]
        known = results.ok(BARE, task, results.target) is not None
        phrases.append(f"plain model: {_number(results, BARE, task) if known else status}")
    best = results.best(task, results.target, working)
    if best is not None and task.gain(_score(results, best, task)) > task.gain(_score(results, method, task)):
        phrases.append(f"best: {_number(results, best, task)} of {_named(best)}")
    return f" ({'; '.join(phrases)})" if phrases else ""


def _reason(results: Results, working: Sequence[str], informative: Sequence[TaskFacts]) -> str:
    verb = "are" if len(informative) > 1 else "is"
    return f" {verb} what nothing else here reaches" if len(working) == 1 else f" {verb} matched by nothing cheaper"


def _harm_phrase(results: Results, chosen: str) -> str:
    """The method's effect on inputs of native length, which the bare model reads well without it."""
    if chosen == BARE or results.target == results.native:
        return ""
    known = [t for t in results.tasks if results.difference(chosen, BARE, t, results.native).interval]
    if not known:
        return f"; what it does at the native {results.native:,} tokens was not measured"
    harmed = [t for t in known if _worse(results, chosen, BARE, t, results.native)]
    if not harmed:
        return f"; at the native {results.native:,} tokens it does no measurable harm"
    changes = [f"{t.label} {t.number(results.difference(chosen, BARE, t, results.native).value, True)}" for t in harmed]
    return f"; at the native {results.native:,} tokens it does harm ({_and(changes)})"


def _dropped_phrase(results: Results, chosen: str, informative: Sequence[TaskFacts]) -> str:
    """A warning where a method with a small cache was chosen by its loss alone."""
    if not _drops(results, chosen) or any(t.higher_is_better for t in informative):
        return ""
    return (
        f"; it keeps {size(results.cost(chosen)['cache_bytes'] or 0)} of {size(results.full_cache() or 0)} of cache, so it "
        "forgets what it dropped, and no task here measures what that costs"
    )


def _forget_phrase(results: Results, method: str, informative: Sequence[TaskFacts]) -> str:
    losses = _and([_score_phrase(results, method, t) for t in informative if not t.higher_is_better])
    lost = [t for t in informative if t.higher_is_better and not _works(results, method, t)]
    found = _and([_score_phrase(results, method, t) for t in lost])
    cache = size(results.cost(method)["cache_bytes"] or 0)
    return f"{method} keeps the loss ({losses}) with {cache} of cache but forgets: it cannot find what it dropped ({found})"


def _notes(results: Results, chosen: str | None, informative: Sequence[TaskFacts]) -> list[str]:
    """Notes beside the sentence, each a sentence of its own."""
    notes = []
    if results.target < max(results.lengths):
        notes.append(f"Nothing finished at {max(results.lengths):,} tokens, so the advice is for {results.target:,}.")
    if chosen is not None:
        notes += [
            f"{_forget_phrase(results, m, informative)}." for m in results.methods if forgets(results, m, informative)
        ]
    for task in results.tasks:
        if task not in informative and any(results.ok(m, task, results.target) for m in results.methods):
            notes.append(
                f"{task.spec} is not informative here: no method scores, nor does the plain model at its native length."
            )
    ended = [
        m for m in results.methods if any(results.status(m, t, results.target) == "out_of_memory" for t in informative)
    ]
    if ended:
        notes.append(f"Out of memory at {results.target:,} tokens: {_and([_named(m) for m in ended])}.")
    return notes + _method_notes(results) + _overlap_notes(results) + _few_notes(results, informative)


def _method_notes(results: Results) -> list[str]:
    """What the methods say of themselves (`Method.report_notes`)."""
    return [f"{m['spec']}: {note}" for m in results.manifest["methods"] for note in m.get("notes", ())]


def _overlap_notes(results: Results) -> list[str]:
    notes = []
    for task in results.tasks:
        if overlaps := results.overlaps(task):
            counted = [f"{n} at {length:,} tokens count as {known:.1f}" for length, (n, known) in overlaps.items()]
            notes.append(
                f"{task.spec}: the text is too short for windows that do not overlap: {_and(counted)}, by which intervals "
                "are computed."
            )
    return notes


def _few_notes(results: Results, informative: Sequence[TaskFacts]) -> list[str]:
    notes = []
    for task in (t for t in informative if t.higher_is_better):
        most = max((c["n"] for m in results.methods if (c := results.ok(m, task, results.target))), default=0)
        if most < FEW:
            some = "1 sample" if most == 1 else f"{most} samples"
            notes.append(
                f"{task.spec} has {some} in each cell: its intervals are wide; more samples would separate the methods."
            )
    return notes


def _and(items: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(items[:-1]), *items[-1:]]))
