"""The scheme of the guide: one file, tested as the others are under the line that a scheme without peculiarities has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import test_schemes
from schemes import Line, build

from longspan.core import method
from longspan.plugins import load_user_file

GUIDE = Path(__file__).parents[2] / "docs" / "adding-a-method.md"


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Line:
    method.catalogue()  # fills the registry before it is copied
    monkeypatch.setattr(method.Method, "registry", dict(method.Method.registry))
    monkeypatch.setenv("LONGSPAN_INCLUDE", "")
    text = GUIDE.read_text()
    (tmp_path / "rootdecay.py").write_text(
        re.search(r"<!-- example: rootdecay.py -->\n```python\n(.*?)```", text, re.S)[1]
    )
    load_user_file(tmp_path / "rootdecay.py")
    written = re.search(r'`Line\("(.*?)"', text)
    return Line(written[1])


def test_the_line_tests_it(line: Line, tmp_path: Path) -> None:
    test_schemes.test_chunks_and_single_tokens_equal_one_forward(line)
    test_schemes.test_padding_changes_nothing(line, "left")
    test_schemes.test_shifted_positions(line)
    test_schemes.test_trains_with_and_without_checkpointing(line)
    test_schemes.test_saved_and_loaded(line, tmp_path)
    test_schemes.test_generation_uses_the_cache(line)
    test_schemes.test_encoder(line)
    test_schemes.test_encoder_decoder_generates_what_it_computes(line)
    assert build(line.spec).model.place.rates.shape == (4,)
