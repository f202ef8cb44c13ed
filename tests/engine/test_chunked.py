"""A function of tokens in chunks against all tokens at once: results, gradients, random numbers, and what is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from longspan.engine.chunked import in_chunks
from longspan.lm import LongspanConfig, LongspanForCausalLM
from longspan.util.errors import SpecError

SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def network() -> LlamaMLP:
    torch.manual_seed(0)
    return LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=256)).double()


def text(rows: int = 2, length: int = 37) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(rows, length, 64, generator=draw).double().requires_grad_()


@pytest.mark.parametrize("size", [1, 2, 8, 30, 74, 1000])
def test_equals_all_at_once(size: int) -> None:
    """Also where the chunk does not divide the length, and for chunks below a batch's one token of each row."""
    fn, x = network(), text()
    given = (x, *fn.parameters())
    got, wanted = in_chunks(fn, x, size), fn(x)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    pull = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2)).double()
    ours = torch.autograd.grad((got * pull).sum(), given)
    torch.testing.assert_close(ours, torch.autograd.grad((wanted * pull).sum(), given), rtol=0, atol=1e-10)


def test_tokens_at_once_are_counted_over_all_rows() -> None:
    seen = []

    def fn(x: Tensor) -> Tensor:
        seen.append(x.shape[:-1].numel())
        return x

    with torch.no_grad():
        in_chunks(fn, text(2, 37), 16)
        in_chunks(fn, text(1, 37)[0], 16)
    assert seen == [16, 16, 16, 16, 10, 16, 16, 5]


def test_the_second_run_drops_out_what_the_first_did() -> None:
    """The gradient of the sum through dropout is the mask of the first run itself."""
    x, dropout = text(), nn.Dropout(0.5)
    torch.manual_seed(3)
    out = in_chunks(lambda part: dropout(part) * 1.0, x, 8)
    torch.rand(5)
    (back,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(back * x, out)
    assert 0.3 < (out == 0).double().mean() < 0.7


def test_keeps_no_inner_activations() -> None:
    def kept(size: int | None) -> int:
        total: dict[int, int] = {}

        def pack(saved: Tensor) -> Tensor:
            storage = saved.untyped_storage()
            total[storage.data_ptr()] = storage.nbytes()
            return saved

        fn, x = network(), text(1, 512)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            out = fn(x) if size is None else in_chunks(fn, x, size)
        out.sum().backward()
        weights = {p.untyped_storage().data_ptr() for p in fn.parameters()} | {x.untyped_storage().data_ptr()}
        return sum(n for pointer, n in total.items() if pointer not in weights)

    assert kept(None) >= 3 * 512 * 256 * 8
    assert kept(64) == 0


@pytest.mark.parametrize("reversible", [False, True])
def test_mlp_chunk_of_a_model(reversible: bool) -> None:
    ids = torch.randint(2, 100, (2, 37), generator=torch.Generator().manual_seed(3))
    results = []
    for chunk in (None, 10):
        torch.manual_seed(1)
        model = LongspanForCausalLM(LongspanConfig(**SIZES, mlp_chunk=chunk, reversible=reversible)).train()
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append((loss, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_chunks_that_cannot_be() -> None:
    with pytest.raises(SpecError, match="mlp_chunk"):
        LongspanConfig(**SIZES, mlp_chunk=0)
