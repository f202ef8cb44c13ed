"""One sentence: for this model at this length, this method, at this cost, because of these figures.

Nothing but what was measured decides, in this order:

1. A method works where it finished every task at the target length and kept what the bare model can do at its native
   length: at least half of a score, and no more than half a nat above a loss. A task that the bare model fails at its
   native length too, and that no method passes, says nothing and is left aside.
2. Of those that work, the ones stay that are not measurably worse than the best at a task where more is better: the
   interval of the paired difference does not exclude zero. A loss decides after that, since a low loss does not prove
   that a text was read: a method goes where another has a measurably lower loss and is not behind at anything. With
   many tokens the smallest difference can be measured, so losses within 0.01 nats, 1 % of perplexity, count as equal.
3. Of these the cheapest is named: time to read the input and write a hundred tokens. Within 5 % the bare model is named
   before any method, and else the better score.
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
"""How far a loss may lie above the bare model's native loss, in the loss's unit (nats per token)."""
SLIGHT = 0.01
"""Losses that differ by no more than this, in the loss's unit, count as equal."""
WRITTEN = 100
"""Tokens that are written after reading, in the time by which methods are compared."""
TIE = 1.05
"""Times within this factor count as equal."""
SMALL = 0.9
"""A cache below this share of the full one has dropped something."""
FEW = 20
"""Samples of a cell under which intervals are so wide that it has to be said."""


@dataclass(frozen=True)
class Advice:
    """`parts` is the sentence, each part with whether it is to stand out. `method` is None where nothing works."""

    method: str | None
    parts: tuple[tuple[str, bool], ...]
    notes: tuple[str, ...] = ()
    working: tuple[str, ...] = ()
    best: dict[str, str] = field(default_factory=dict)
    """The method with the best score at the target length, by task spec."""

    @property
    def sentence(self) -> str:
        return "".join(text for text, _ in self.parts)

    def data(self) -> dict[str, Any]:
        """The advice for programs."""
        return {
            "sentence": self.sentence,
            "method": self.method,
            "notes": list(self.notes),
            "working": list(self.working),
            "best": self.best,
        }


def advise(results: Results) -> Advice:
    """The advice for a run's longest finished length."""
    telling = [t for t in results.tasks if _tells(results, t)]
    working = [m for m in results.methods if telling and all(_works(results, m, t) for t in telling)]
    chosen = _cheapest(results, _not_worse(results, working, telling), telling) if working else None
    if results.methods == [BARE]:
        parts = _only_bare(results)
    elif chosen is None:
        parts = _nothing_works(results, telling) + _shorter(results)
    else:
        parts = _use(results, chosen, working, telling)
    best = {t.spec: b for t in results.tasks if (b := results.best(t, results.target))}
    return Advice(chosen, tuple(parts), tuple(_notes(results, chosen, telling)), tuple(working), best)


def forgets(results: Results, method: str, telling: Sequence[TaskFacts]) -> bool:
    """True where a method holds the loss with a smaller cache but loses what tasks ask for."""
    losses = [t for t in telling if not t.higher_is_better]
    asked = [t for t in telling if t.higher_is_better and results.ok(method, t, results.target)]
    keeps_loss = bool(losses) and all(_works(results, method, t) for t in losses)
    return keeps_loss and _drops(results, method) and any(not _works(results, method, t) for t in asked)


def _tells(results: Results, task: TaskFacts) -> bool:
    """False where a task only describes, where nobody finished, and where neither the bare model at its native length nor
    any method scores at all."""
    if not task.rates:
        return False
    scores = [results.score(m, task, results.target) for m in results.methods]
    here = [s for s in scores if s is not None]
    return bool(here) and (not task.higher_is_better or max(*here, _native(results, task) or 0.0, 0.0) > 0)


def _native(results: Results, task: TaskFacts) -> float | None:
    """What the bare model scores at its native length: what a method has to keep."""
    return results.score(BARE, task, results.native)


def _works(results: Results, method: str, task: TaskFacts) -> bool:
    score, native = results.score(method, task, results.target), _native(results, task)
    if score is None:
        return False
    if task.higher_is_better:
        return score > 0 and score >= KEPT * (native or 0.0)
    return native is None or score <= native + ROOM


def _drops(results: Results, method: str) -> bool:
    """True where the method's cache at the target length is clearly smaller than the whole input's."""
    cache, full = results.cost(method)["cache_bytes"], results.full_cache()
    return cache is not None and full is not None and cache < SMALL * full


def _worse(results: Results, method: str, other: str, task: TaskFacts, length: int) -> bool:
    """True where `method` is measurably worse than `other`, and not only slightly."""
    change = results.difference(method, other, task, length).value or 0.0
    return results.worse(method, other, task, length) and (task.higher_is_better or change > SLIGHT)


def _not_worse(results: Results, working: Sequence[str], telling: Sequence[TaskFacts]) -> list[str]:
    left = list(working)
    for task in (t for t in telling if t.higher_is_better):
        best = results.best(task, results.target, left)
        assert best is not None, "a method that works has a score"
        left = [m for m in left if not _worse(results, m, best, task, results.target)]
    return [m for m in left if not any(_beats(results, other, m, telling) for other in left)]


def _beats(results: Results, one: str, other: str, telling: Sequence[TaskFacts]) -> bool:
    """True where `one` is measurably better at a task and at none behind."""
    room = {t: 0.0 if t.higher_is_better else SLIGHT for t in telling}
    ahead = [t.gain(_score(results, one, t)) >= t.gain(_score(results, other, t)) - room[t] for t in telling]
    return all(ahead) and any(_worse(results, other, one, t, results.target) for t in telling)


def _score(results: Results, method: str, task: TaskFacts) -> float:
    """The score at the target length, the worst one where there is none."""
    score = results.score(method, task, results.target)
    return task.worst if score is None else score


def _expense(results: Results, method: str) -> float:
    """Seconds to read the input and write `WRITTEN` tokens; infinite where that was not measured."""
    cost = results.cost(method)
    if cost["prefill_s"] is None:
        return math.inf
    return cost["prefill_s"] + WRITTEN * (cost["decode_s_per_token"] or 0.0)


def _cheapest(results: Results, among: Sequence[str], telling: Sequence[TaskFacts]) -> str:
    least = min(_expense(results, m) for m in among)
    equal = [m for m in among if _expense(results, m) <= least * TIE]
    ranked = sorted(telling, key=lambda t: not t.higher_is_better)

    def rank(method: str) -> tuple[Any, ...]:
        scores = [-t.gain(_score(results, method, t)) for t in ranked]
        return (method != BARE, *scores, results.peak(method) or math.inf)

    return min(equal, key=rank)


def _use(results: Results, chosen: str, working: Sequence[str], telling: Sequence[TaskFacts]) -> list[tuple[str, bool]]:
    what = [("use no method", True)] if chosen == BARE else [("use ", False), (chosen, True)]
    bare = "the plain model" if chosen == BARE else "it"
    because = f": {bare} {_cost_phrase(results, chosen)}, because {_quality_phrase(results, chosen, working, telling)}"
    because += _reason(results, working, telling) + _harm_phrase(results, chosen)
    return [*_opening(results), *what, (because + _dropped_phrase(results, chosen, telling) + ".", False)]


def _opening(results: Results) -> list[tuple[str, bool]]:
    return [("For ", False), (results.name, True), (" at ", False), (f"{results.target:,} tokens", True), (", ", False)]


def _only_bare(results: Results) -> list[tuple[str, bool]]:
    scores = ", ".join(_score_phrase(results, BARE, t) for t in results.tasks)
    text = f"only the plain model was measured ({scores}), so there is nothing to choose from: name methods to compare"
    return [*_opening(results), (text + ".", False)]


def _nothing_works(results: Results, telling: Sequence[TaskFacts]) -> list[tuple[str, bool]]:
    parts = [*_opening(results), ("nothing that was measured works", True)]
    if not telling:
        return [
            *parts,
            (": no task shows a difference, since the plain model fails them at its native length too.", False),
        ]
    failed = [t for t in telling if not any(_works(results, m, t) for m in results.methods)]
    shown = failed[0] if failed else sorted(telling, key=lambda t: not t.higher_is_better)[0]
    best = results.best(shown, results.target)
    assert best is not None, "a task that tells has a score"
    native = _native(results, shown)
    beside = f", against {shown.number(native)} of the plain model at {results.native:,}" if native is not None else ""
    if shown.higher_is_better and _score(results, best, shown) <= 0:
        text = f": {shown.label} is {_number(results, best, shown)} with every method{beside}"
    else:
        text = f": the best {shown.label}, of {_named(best)}, is {_number(results, best, shown)}{beside}"
    if not failed:
        text += ", and no method holds the other tasks as well"
    if keeper := next((m for m in results.methods if forgets(results, m, telling)), None):
        text += f"; {_forget_phrase(results, keeper, telling)}"
    return [*parts, (text + ".", False)]


def _shorter(results: Results) -> list[tuple[str, bool]]:
    """The longest shorter length past the native one at which something works, and what."""
    finished = sorted({c["length"] for c in results.cells() if c["status"] == "ok"} - {results.target}, reverse=True)
    for length in (n for n in finished if n > results.native):
        shorter = results.up_to(length)
        if (method := advise(shorter).method) is not None:
            telling = [t for t in shorter.tasks if _tells(shorter, t)]
            scores = _and([_score_phrase(shorter, method, t) for t in telling])
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
    said = []
    if cost["prefill_s"] is not None:
        said.append(f"reads them in {duration(cost['prefill_s'])}")
    if cost["decode_s_per_token"] is not None:
        said.append(f"writes a token in {duration(cost['decode_s_per_token'])}")
    if peak is not None:
        said.append(f"needs {size(peak)} of memory at its peak")
    return _and(said) or "finished at a cost that was not measured"


def _quality_phrase(results: Results, method: str, working: Sequence[str], telling: Sequence[TaskFacts]) -> str:
    return _and(
        [
            f"{_score_phrase(results, method, t)}{_beside(results, method, working, t)}"
            for t in sorted(telling, key=lambda t: not t.higher_is_better)
        ]
    )


def _beside(results: Results, method: str, working: Sequence[str], task: TaskFacts) -> str:
    """What the plain model scores, and the best of those that work where it is another's, in brackets."""
    said = []
    if method != BARE:
        status = STATUS[results.status(BARE, task, results.target)]
        known = results.ok(BARE, task, results.target) is not None
        said.append(f"plain model: {_number(results, BARE, task) if known else status}")
    best = results.best(task, results.target, working)
    if best is not None and task.gain(_score(results, best, task)) > task.gain(_score(results, method, task)):
        said.append(f"best: {_number(results, best, task)} of {_named(best)}")
    return f" ({'; '.join(said)})" if said else ""


def _reason(results: Results, working: Sequence[str], telling: Sequence[TaskFacts]) -> str:
    verb = "are" if len(telling) > 1 else "is"
    return f" {verb} what nothing else here reaches" if len(working) == 1 else f" {verb} matched by nothing cheaper"


def _harm_phrase(results: Results, chosen: str) -> str:
    """What the method does to short inputs, which the bare model reads well without it."""
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


def _dropped_phrase(results: Results, chosen: str, telling: Sequence[TaskFacts]) -> str:
    """A warning where a small cache was chosen by its loss alone."""
    if not _drops(results, chosen) or any(t.higher_is_better for t in telling):
        return ""
    return (
        f"; it keeps {size(results.cost(chosen)['cache_bytes'] or 0)} of {size(results.full_cache() or 0)} of cache, so it "
        "forgets what it dropped, and no task here tells what that costs"
    )


def _forget_phrase(results: Results, method: str, telling: Sequence[TaskFacts]) -> str:
    losses = _and([_score_phrase(results, method, t) for t in telling if not t.higher_is_better])
    lost = [t for t in telling if t.higher_is_better and not _works(results, method, t)]
    found = _and([_score_phrase(results, method, t) for t in lost])
    cache = size(results.cost(method)["cache_bytes"] or 0)
    return f"{method} holds the loss ({losses}) with {cache} of cache but forgets: it cannot find what it dropped ({found})"


def _notes(results: Results, chosen: str | None, telling: Sequence[TaskFacts]) -> list[str]:
    """What the reader should know beside the sentence, each a sentence of its own."""
    notes = []
    if results.target < max(results.lengths):
        notes.append(f"Nothing finished at {max(results.lengths):,} tokens, so the advice is for {results.target:,}.")
    if chosen is not None:
        notes += [f"{_forget_phrase(results, m, telling)}." for m in results.methods if forgets(results, m, telling)]
    for task in results.tasks:
        if task not in telling and any(results.ok(m, task, results.target) for m in results.methods):
            notes.append(
                f"{task.spec} says nothing here: no method scores, nor does the plain model at its native length."
            )
    ended = [
        m for m in results.methods if any(results.status(m, t, results.target) == "out_of_memory" for t in telling)
    ]
    if ended:
        notes.append(f"Out of memory at {results.target:,} tokens: {_and([_named(m) for m in ended])}.")
    return notes + _method_notes(results) + _overlap_notes(results) + _few_notes(results, telling)


def _method_notes(results: Results) -> list[str]:
    """What the methods say of themselves (`Method.report_notes`)."""
    return [f"{m['spec']}: {note}" for m in results.manifest["methods"] for note in m.get("notes", ())]


def _overlap_notes(results: Results) -> list[str]:
    notes = []
    for task in results.tasks:
        if overlaps := results.overlaps(task):
            counted = [f"{n} at {length:,} tokens count as {known:.1f}" for length, (n, known) in overlaps.items()]
            notes.append(
                f"{task.spec}: the text is too short for windows that do not overlap: {_and(counted)}, and intervals are made "
                "for so many."
            )
    return notes


def _few_notes(results: Results, telling: Sequence[TaskFacts]) -> list[str]:
    notes = []
    for task in (t for t in telling if t.higher_is_better):
        most = max((c["n"] for m in results.methods if (c := results.ok(m, task, results.target))), default=0)
        if most < FEW:
            some = "1 sample" if most == 1 else f"{most} samples"
            notes.append(
                f"{task.spec} has {some} in each cell: its intervals are wide, and more would part the methods."
            )
    return notes


def _and(items: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(items[:-1]), *items[-1:]]))
