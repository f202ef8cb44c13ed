"""Every cell of the table of forwards: it equals the same forwards by themselves, or is refused for the reason that the page
gives."""

from __future__ import annotations

import copy
import warnings

import families
import forwards
import pytest
import torch
from forwards import COLUMNS, ROWS, Column
from matrix import Line

from longspan.apply import apply
from longspan.core.method import catalogue


def test_every_method_has_a_row() -> None:
    """Every method that goes on a trained model of one stack or two: those that are only trained into a model have none."""
    tried = {part.strip().partition(":")[0] for row in ROWS for part in row.spec.split("+")}
    ours = {name for name, cls in catalogue().items() if cls.__module__.startswith("longspan.") and cls.slots}
    assert {name for name in ours if forwards.goes_on_a_model(name)} == tried


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.name)
@pytest.mark.parametrize("line", ROWS, ids=lambda line: line.name)
def test_as_the_page_says(line: Line, column: Column) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        expected = forwards.documented(line, column)
        if column.name == "gemma-3" and expected == "equal" and not families.installed("gemma3_text", line.spec):
            assert "does not run on" in forwards.outcome(line, column)
            return
        assert forwards.outcome(line, column) == expected


def test_an_image_across_the_end_of_the_window() -> None:
    """Under dynamic NTK queries on both sides of it take other bases; those before it still see the image's last tokens."""
    _, stock = copy.deepcopy(forwards.wrapped("gemma3_text"))
    model = apply(copy.deepcopy(stock), "dynamic-ntk:step=4")
    ids = forwards.tokens(1, 46)
    ids[0, 37:41] = forwards.IMAGE
    sight = {"pixel_values": torch.randn(1, 3, 16, 16), "token_type_ids": (ids == forwards.IMAGE).long()}
    got, expected = (forwards.logits(m, input_ids=ids, **sight) for m in (model, stock))
    torch.testing.assert_close(got[:, :40], expected[:, :40])  # its sliding layer has one base for all
    assert (got[:, 41:] - expected[:, 41:]).abs().max() > 1e-2
