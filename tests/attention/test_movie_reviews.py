"""The script of the classification study, on a handful of texts that one word tells apart."""

from __future__ import annotations

import json
import runpy
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "reproductions" / "movie_reviews.py"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "movie_reviews.zip"
    with zipfile.ZipFile(path, "w") as made:
        for kind, word in (("neg", "dull "), ("pos", "fine ")):
            for n in range(16):
                made.writestr(f"movie_reviews/{kind}/cv{n:03}.txt", word * (6 + n % 5))
    return path


def test_every_text_is_tested_once_and_told(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = (
        "--texts 32 --folds 2 --epochs 8 --layers 1 --width 64 --length 48 --batch 8 --learning-rate 0.01 --dropout 0"
    )
    script, out = runpy.run_path(str(SCRIPT)), tmp_path / "out"
    options = [str(archive), *small.split(), "--out", str(out)]
    chosen = ["--attention", "longformer:window=8", "--attention", "bigbird:block=4"]
    for fold in "01":  # as the processes are called
        assert script["main"]([*options, "--attention", "bigbird:block=4", "--fold", fold]) == []
    results = script["main"]([*options, *chosen, "--jobs", "2"])
    assert [r["attention"] for r in results] == ["longformer:window=8", "bigbird:block=4"]
    for result in results:
        assert len(result["right"]) == 32 and result["accuracy"] == sum(result["right"]) / 32 == 1
        assert result["interval"][0] < 1 and result["tokens_per_s"] > 0
    assert json.loads((out / "results.json").read_text()) == results
    parts = [json.loads((out / f"longformer-window-8-{fold}.json").read_text()) for fold in (0, 1)]
    read = 2 * sum(1 + len("dull ") * (6 + n % 5) for n in range(16) if n % 5 < 4) + 2 * 3 * 48  # padding is not read
    assert sum(part["tokens"] for part in parts) == 8 * read  # each text in one of two parts, eight times
    assert capsys.readouterr().out.count("holds: ") == 3
    (out / "longformer-window-8-1.json").unlink()  # the first part alone, while the second is not there
    collected = script["collect"](script["arguments"]().parse_args([*options, *chosen]))
    assert [r["parts"] for r in collected] == [1, 1]
    with pytest.raises(SystemExit, match="other settings"):
        script["main"]([*options[:-2], "--seed", "3", "--out", str(out), *chosen[2:]])
