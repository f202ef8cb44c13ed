"""Masks of gist tokens against the rule, spelled out token by token."""

from __future__ import annotations

import pytest
import torch

from longspan.engine.retrieval.gist_masks import kept, pieces, visible

ROWS = ["..GG...", "GG.....", ".......", ".G.GG..", "...G..G", "..GGG.."]


def rule(row: str, query: int, key: int, mode: str) -> bool:
    """A token sees what stands behind the last run of gist tokens that ended before it, and that run itself."""
    ends = [i for i in range(query) if row[i] == "G" and (i + 1 == len(row) or row[i + 1] != "G")]
    starts = [i for i in ends if i < query]
    own = [i for i in range(query, len(row)) if row[i] == "G" and row[i + 1 : i + 2] != "G"]
    last = own[0] if own else len(row) - 1  # where the query's own piece ends
    if not starts:
        return key <= last
    end = starts[-1]
    begin = end
    while begin > 0 and row[begin - 1] == "G":
        begin -= 1
    return (end < key <= last) or (mode == "gist" and begin <= key <= end)


@pytest.mark.parametrize("mode", ["gist", "negative"])
def test_every_pair(mode: str) -> None:
    gist = torch.tensor([[c == "G" for c in row] for row in ROWS])
    sees = visible(gist, gist.shape[1], mode)  # type: ignore[arg-type]
    for row, seen in zip(ROWS, sees, strict=True):
        for query in range(len(row)):
            assert seen[query].tolist() == [rule(row, query, key, mode) for key in range(len(row))], (row, query)


def test_the_last_tokens_alone_see_what_they_see_among_all() -> None:
    gist = torch.tensor([[c == "G" for c in row] for row in ROWS])
    assert torch.equal(visible(gist, 3, "gist"), visible(gist, 7, "gist")[:, -3:])


@pytest.mark.parametrize("mode", ["gist", "negative"])
def test_what_comes_after_sees_what_one_more_token_would(mode: str) -> None:
    gist = torch.tensor([[c == "G" for c in f"{row}."] for row in ROWS] + [[c == "G" for c in ".....GG."]])
    after = visible(gist, 1, mode)[:, 0, :-1]  # type: ignore[arg-type]
    assert torch.equal(kept(gist[:, :-1], mode), after)  # type: ignore[arg-type]


def test_pieces_are_cut_behind_runs() -> None:
    assert pieces(torch.tensor([[False, True, True, False, True]])).tolist() == [[0, 0, 0, 1, 1, 2]]
