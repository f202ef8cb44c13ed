"""Several texts in one row: what each gets by itself, forward and backward, and what cannot be."""

from __future__ import annotations

import pytest
import torch
from attentions import LINES, Line, build
from schemes import tokens
from transformers import DynamicCache

from longspan.lm import LongspanConfig, LongspanForConditionalGeneration, LongspanForMaskedLM
from longspan.lm.packed import put_back, texts_in
from longspan.training.proofs import prove_boundaries
from longspan.util.errors import NotSupported

SIZES = ((7, 1, 1, 18, 3), (30,))
"""Of the texts of two rows of 30 tokens."""
EXACT = [line for line in LINES if line.exact]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def places() -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in SIZES])


@pytest.mark.parametrize("line", [*EXACT, Line("full", bidirectional=True)], ids=lambda x: f"{x.spec}-{x.position}")
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_each_text_is_read_as_by_itself(line: Line, kind: str) -> None:
    if not (line.causal if kind == "decoder" else line.bidirectional):
        return
    more = {} if kind == "decoder" else {"cls": LongspanForMaskedLM, "kind": "encoder"}
    model, ids = build(line, **more), tokens(2, 30)  # type: ignore[arg-type]
    both: list[list[torch.Tensor]] = []
    given = {"use_cache": False} if kind == "decoder" else {}  # with a cache, full attention is transformers' own
    for apart in (False, True):
        if apart:
            parts = [
                [model(x, **given).logits for x in row[None].split(n, 1)] for row, n in zip(ids, SIZES, strict=True)
            ]
            out = torch.cat([torch.cat(row, dim=1) for row in parts])
        else:
            out = model(ids, position_ids=places(), **given).logits
        model.zero_grad()
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        both.append([out, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(both[0]) == len(both[1])
    for got, wanted in zip(*both, strict=True):
        torch.testing.assert_close(got / wanted.abs().max(), wanted / wanted.abs().max(), **CLOSE)


def test_global_tokens_stay_with_their_text() -> None:
    model, ids = build(Line("longformer:window=4"), cls=LongspanForMaskedLM, kind="encoder"), tokens(2, 30)
    named = torch.zeros_like(ids)
    named[0, 9], named[1, 4] = 1, 1  # the first of the text of 18
    with torch.no_grad():
        got = model(ids, position_ids=places(), global_attention_mask=named).logits
        wanted = model(ids[:1, 9:27], global_attention_mask=named[:1, 9:27]).logits
    torch.testing.assert_close(got[:1, 9:27], wanted, **CLOSE)


def test_padding_is_less_than_half() -> None:
    sizes = [1, 2, 3, 4, 5, 8, 9, 16, 17, 33]
    row = torch.cat([torch.arange(n) for n in sizes])[None]
    found = texts_in(row)
    assert sum(int(t.real.sum()) for t in found) == sum(sizes)
    assert all(int(t.real.sum()) * 2 > t.real.numel() for t in found)
    numbers = torch.arange(row.numel())[None, :, None]
    assert torch.equal(put_back([(t, t.take(numbers)) for t in found], 1), numbers)


def test_training_may_keep_documents_apart() -> None:
    for spec in ("window:size=9", "linear", "s4d:states=8"):
        prove_boundaries(build(Line(spec, position="nope" if spec.startswith("s4") else "rope")))


def test_what_cannot_be_packed_is_refused() -> None:
    model, ids = build(Line("window:size=9")), tokens(2, 30)
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    with pytest.raises(NotSupported, match="continues one text"):
        model(ids, position_ids=places(), past_key_values=cache)
    with pytest.raises(NotSupported, match="whole rows"):
        model(ids, position_ids=places(), output_hidden_states=True)
    sizes = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    both = LongspanForConditionalGeneration(
        LongspanConfig(**sizes, kind="encoder-decoder", attention="window:size=9", decoder_start_token_id=0)
    )
    with pytest.raises(NotSupported, match="an encoder's states"):
        both(ids, decoder_input_ids=ids, position_ids=places())
