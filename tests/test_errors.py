"""What fails in a write names the file, whoever wrote it."""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

import tiny
from longspan.cli.main import run
from longspan.training.metrics import append_line
from longspan.util.errors import NotSupported, writing
from longspan.util.files import write_atomically


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow past 2,000 bytes, as with `ulimit -f` or on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _append(path: Path) -> None:
    for _ in range(2):
        append_line(path, {"text": "x" * 1500})


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("x" * 3000),
    "safetensors": lambda path: save_file({"a": torch.zeros(1000)}, path),
    "torch": lambda path: torch.save({"a": torch.zeros(1000)}, path),
    "numpy": lambda path: np.save(path, np.zeros(1000)),
    "tokenizers": lambda path: tiny.tokenizer().backend_tokenizer.save(str(path)),
    "matplotlib": lambda path: Figure(figsize=(8, 8)).savefig(path, format="png"),
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_write_that_fails_names_its_file(writer: Callable, tmp_path: Path, small_files: None) -> None:
    path = tmp_path / "file.npy"
    with pytest.raises(OSError) as caught, writing(path):
        writer(path)
    assert caught.value.filename == str(path) and caught.value.strerror
    assert caught.value.errno in (errno.EFBIG, errno.EIO)


@pytest.mark.parametrize("writer", [lambda path: write_atomically(path, "x" * 3000), _append])
def test_so_do_those_of_runs(writer: Callable, tmp_path: Path, small_files: None) -> None:
    with pytest.raises(OSError) as caught:
        writer(tmp_path / "file")
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "file"))
    assert not list(tmp_path.glob(".*"))  # nothing half written is left


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    for error in (ValueError("a bug"), NotSupported("it cannot (os error 28)"), FileNotFoundError(2, "gone", "other")):
        with pytest.raises(type(error)) as caught, writing(tmp_path):
            raise error
        assert caught.value is error


def test_the_command_line_says_which_file(
    tmp_path: Path, small_files: None, capsys: pytest.CaptureFixture[str]
) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    folder = tiny.folder(tmp_path / "model")
    out = tmp_path / "bench.json"
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    command = ["bench", "decode", str(folder), "-m", "streaming:sinks=4,window=28", "--tokens", "8", "--out", str(out)]
    assert run(command) == 2
    assert f"error: File too large: {out}" in capsys.readouterr().err and not out.exists()
    assert run(["apply", str(folder), "yarn:factor=2", "--out", str(tmp_path / "new")]) == 2
    assert f"error: {tmp_path / 'new'} cannot be written: File too large" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
