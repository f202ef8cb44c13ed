"""ListOps: golden trees, what is drawn, and that the same seed draws the same."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from longspan.tasks.listops import OPERATIONS, Node, Tree, Trees, read, value, words
from longspan.util.errors import SpecError

GOLDEN = {
    "7": 7,
    "[MAX 2 9 [MIN 4 7 ] 0 ]": 9,
    "[MIN 5 [SM 9 9 9 ] 8 ]": 5,
    "[SM 5 5 ]": 0,
    "[SM [MAX 3 8 ] [MED 1 5 9 ] [MIN 6 2 ] 4 ]": 9,
    "[MED 1 2 ]": 1,
    "[MED 9 0 4 3 ]": 3,
    "[MED 8 1 8 8 0 ]": 8,
    "( ( ( [MAX 2 ) 9 ) ] )": 9,
}


def depth(tree: Tree) -> int:
    return 1 if isinstance(tree, int) else 1 + max(map(depth, tree.arguments))


def nodes(tree: Tree) -> list[Node]:
    return [] if isinstance(tree, int) else [tree, *(n for a in tree.arguments for n in nodes(a))]


@pytest.mark.parametrize(("text", "answer"), GOLDEN.items())
def test_golden_trees(text: str, answer: int) -> None:
    tree = read(text)
    assert value(tree) == answer
    assert words(tree) == text.replace("(", "").replace(")", "").split()


def test_drawn_trees_are_what_is_asked_for() -> None:
    drawn = list(itertools.islice(Trees(max_depth=4, max_args=5, min_length=5, max_length=60).draw(seed=3), 2000))
    assert len(set(drawn)) == 2000
    assert all(5 < len(words(t)) < 60 and read(" ".join(words(t))) == t and 0 <= value(t) <= 9 for t in drawn)
    assert max(map(depth, drawn)) == 4
    every = [n for t in drawn for n in nodes(t)]
    assert {len(n.arguments) for n in every} == {2, 3, 4, 5}
    shares = Counter(n.operation for n in every)
    assert all(0.2 < shares[o] / len(every) < 0.3 for o in OPERATIONS)


def test_the_same_seed_draws_the_same() -> None:
    first, again, other = (list(itertools.islice(Trees().draw(seed), 5)) for seed in (1, 1, 2))
    assert first == again != other
    assert all(500 < len(words(t)) < 2000 for t in first)


def test_what_is_no_expression_or_cannot_be_drawn_is_refused() -> None:
    for text in ("", "1 2", "[MAX ]", "[MAX 1", "1 ]", "[SUM 1 2 ]", "12"):
        with pytest.raises(SpecError):
            read(text)
    for settings in ({"max_depth": 1}, {"max_args": 1}, {"max_depth": 2}, {"min_length": 30, "max_length": 31}):
        with pytest.raises(SpecError):
            Trees(**settings)


def test_a_well_run_dry_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longspan.tasks.listops.PATIENCE", 20_000)
    with pytest.raises(SpecError, match="410 trees"):
        list(Trees(max_depth=2, max_args=2, min_length=0, max_length=10).draw(seed=0))
