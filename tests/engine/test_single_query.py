"""The decoding kernel against the reference in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longspan.engine.core import reference_attention
from longspan.engine.decode.single_query import one_query_attention, serves
from longspan.engine.kernels import INTERPRETED


def _in_a_process(code: str, path: Path) -> str:
    """What `code` prints in a Python of its own, with `path` before everything else that modules come from."""
    places = [str(path), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_kernel_file_is_imported_when_a_kernel_is_launched(tmp_path: Path) -> None:
    """Not by importing any part of longspan, nor by its commands."""
    code = (
        "import contextlib, importlib, io, pkgutil, sys\n"
        "import longspan\n"
        "from longspan.cli.main import main\n"
        "for module in pkgutil.walk_packages(longspan.__path__, 'longspan.'):\n"
        "    if not module.name.startswith(('longspan.engine.kernels.', 'longspan.__main__')):\n"
        "        importlib.import_module(module.name)\n"
        "for command in (['methods'], ['plan', 'longspan-7m', '--length', '4k'], ['study', '--help']):\n"
        "    sys.argv = ['longspan', *command]\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "        main()\n"
        "print([name for name in sys.modules if name.startswith('longspan.engine.kernels.')])\n"
    )
    assert _in_a_process(code, tmp_path) == "[]\n"


def test_longspan_streams_on_a_machine_without_triton(tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text("raise ModuleNotFoundError('No module named triton', name='triton')\n")
    code = (
        "import torch, longspan as ls\n"
        "from longspan.engine import kernels\n"
        "from longspan.core.method import catalogue\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)\n"
        "model = LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=None)).eval()\n"
        "ls.apply(model, 'streaming:sinks=2,window=6')\n"
        "ids = model.generate(torch.arange(20)[None], max_new_tokens=4, custom_generate=ls.stream_generate)\n"
        "print(ids.shape[1], 'window' in catalogue(), kernels.refusal(torch.device('cuda')))\n"
    )
    assert _in_a_process(code, tmp_path) == "24 True Triton cannot be imported: No module named triton\n"


@pytest.mark.skipif(INTERPRETED, reason="the interpreter serves any device")
def test_only_one_query_in_16_bit_on_cuda() -> None:
    query, key = torch.zeros(1, 9, 1, 64, dtype=torch.bfloat16), torch.zeros(1, 3, 40, 64, dtype=torch.bfloat16)
    assert not serves(query, key)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "size", "width"),
    [
        (1, 9, 3, 2048, 64),
        (1, 9, 3, 17, 64),
        (1, 9, 3, 1, 64),
        (2, 32, 8, 1000, 128),
        (64, 8, 8, 333, 32),
        (2, 71, 1, 4000, 64),
        (1, 8, 1, 5000, 256),
    ],
)
def test_equals_the_reference(batch: int, heads: int, kv_heads: int, size: int, width: int, dtype: torch.dtype) -> None:
    query = torch.randn(batch, heads, 1, width, device="cuda", dtype=dtype)
    ring = torch.randn(2, 3, batch, kv_heads, size, width, device="cuda", dtype=dtype)
    key, value = ring[0, 1], ring[1, 2]  # as the rings of all layers lie in one tensor
    assert serves(query, key)
    mask = torch.ones(1, size, dtype=torch.bool, device="cuda")
    wanted = reference_attention(query.double(), key.double(), value.double(), mask, 0.1)
    for _ in range(3):  # each call leaves the counters as it found them
        got = one_query_attention(query, key, value, 0.1)
        torch.testing.assert_close(got.double(), wanted, rtol=2e-2, atol=2e-3)


@pytest.mark.kernels
@pytest.mark.parametrize(("heads", "kv_heads", "size", "width"), [(4, 2, 250, 32), (9, 3, 17, 16), (2, 2, 1, 16)])
def test_equals_the_reference_on_any_device(heads: int, kv_heads: int, size: int, width: int) -> None:
    """In Triton's interpreter as on CUDA; the interpreter has no bfloat16 arithmetic."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    query = torch.randn(2, heads, 1, width, device=device, dtype=torch.float16)
    key, value = torch.randn(2, 2, kv_heads, size, width, device=device, dtype=torch.float16)
    assert serves(query, key)
    mask = torch.ones(1, size, dtype=torch.bool, device=device)
    wanted = reference_attention(query.double(), key.double(), value.double(), mask, 0.1)
    torch.testing.assert_close(one_query_attention(query, key, value, 0.1).double(), wanted, rtol=2e-2, atol=2e-3)
