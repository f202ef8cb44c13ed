"""What is said to combine is what is accepted."""

from __future__ import annotations

import pytest

from longspan.combinable import combinable
from longspan.core.method import catalogue, parse
from longspan.util.errors import NotSupported


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("flash", {"learned", "nope", "rope", "sinusoidal"}),
        ("s4", {"learned", "nope", "sinusoidal"}),
        ("linformer", {"learned", "sinusoidal"}),  # nope tells an encoder nothing
        ("tupe", {"full", "logn"}),
        ("streaming", {"llama3", "longrope", "ntk", "ntk-by-parts", "pi", "yarn"}),
        ("dynamic-ntk", {"logn"}),
        ("unlimiformer", set()),
        ("none", set()),
    ],
)
def test_combinable(name: str, beside: set[str]) -> None:
    assert set(combinable(catalogue()[name])) == beside


def test_what_can_be_put_on_and_trained_with_has_both_kinds() -> None:
    assert {"yarn", "alibi", "xpos"} <= set(combinable(catalogue()["window"]))


def test_a_refused_pair_is_told_what_works() -> None:
    with pytest.raises(NotSupported, match=r"alibi combines with: bigbird, full, .*window$"):
        parse("alibi + rope")
    with pytest.raises(NotSupported, match=r"dynamic-ntk combines with: logn$"):
        parse("dynamic-ntk + yarn")
