"""What a pattern keeps in a cache, and what it costs, with a window as the pattern."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from longspan.attention.window import Window
from longspan.engine import masks
from longspan.engine.call import AttentionCall, AttentionShape
from longspan.engine.patterns import attend
from longspan.lm import LongspanConfig, LongspanForCausalLM
from longspan.util.errors import NotSupported

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""Tables of angles and biases are float32."""
SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def model(attention: str | list[str] = "window:size=6,sinks=3", position: str = "rope") -> LongspanForCausalLM:
    torch.manual_seed(3)
    made = LongspanForCausalLM(LongspanConfig(**SIZES, attention=attention, position=position)).eval().double()
    with torch.no_grad():
        for weight in made.parameters():
            if weight.ndim == 2:
                weight.normal_(0, 1.5 * weight.shape[1] ** -0.5)
    return made


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(1, 96, (rows, length), generator=torch.Generator().manual_seed(0))


def held_bytes(cache: DynamicCache) -> int:
    tensors = {id(x): x for layer in cache.layers for x in vars(layer).values() if isinstance(x, Tensor)}
    return sum(x.untyped_storage().nbytes() for x in tensors.values() if x.is_floating_point())


@torch.no_grad()
@pytest.mark.parametrize("attention", ["window:size=6,sinks=3", "window:size=5", "window:size=1,sinks=1"])
def test_cache_stays_of_one_size(attention: str) -> None:
    network, cache, sizes = model(attention), DynamicCache(), []
    for length in (20, 1, 30, 1, 1):
        network(tokens(1, length), past_key_values=cache)
        sizes.append(held_bytes(cache))
    assert cache.get_seq_length() == 53
    pattern = network.config.attentions[0]
    assert len(set(sizes)) == 1 and sizes[0] == 3 * 2 * 12 * 8 * (2 * sum(pattern.sinks_and_window()) + pattern.sinks)


@torch.no_grad()
@pytest.mark.parametrize("position", ["rope", "xpos", "alibi", "rope + logn"])
@pytest.mark.parametrize("cut", [(1,) * 24, (2, 1, 1, 20), (9, 15), (5, 5, 1, 1, 1, 11), (23, 1), (4, 1, 7, 1, 2, 9)])
def test_any_cut_gives_one_forward(position: str, cut: tuple[int, ...]) -> None:
    """Left-padded rows too, of which one begins with later calls than the first."""
    network, ids, cache = model(position=position), tokens(4, 24), DynamicCache()
    mask = torch.ones_like(ids)
    mask[1, :2] = mask[2, :11] = mask[3, :5] = 0
    whole, parts, start = network(ids, attention_mask=mask).logits, [], 0
    for size in cut:
        end = start + size
        parts.append(network(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
        start = end
    got = torch.cat(parts, dim=1)
    for row, first in enumerate((0, 2, 11, 5)):
        torch.testing.assert_close(got[row, first:], whole[row, first:], **CLOSE)
        torch.testing.assert_close(got[row, first:], network(ids[row : row + 1, first:]).logits[0], **CLOSE)


@torch.no_grad()
def test_some_layers_keep_all() -> None:
    network, ids, cache = model(["window:size=6,sinks=2", "full", "window:size=4"]), tokens(2, 30), DynamicCache()
    parts = [network(part, past_key_values=cache).logits for part in ids.split((11, 1, 1, 8, 9), dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), network(ids).logits)
    assert [layer.keys.shape[2] for layer in cache.layers] == [8, 30, 4]


@torch.no_grad()
def test_beams_are_those_of_a_full_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    network, ids = model(), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0

    def beams() -> Tensor:
        return network.generate(
            ids, attention_mask=mask, max_new_tokens=9, num_beams=3, do_sample=False, pad_token_id=0
        )

    bounded = beams()
    monkeypatch.setattr(Window, "sinks_and_window", lambda self: None)
    assert torch.equal(bounded, beams())


def test_gradients_reach_what_a_cache_keeps() -> None:
    """Whoever trains through the cache gets a growing one."""
    network, ids, cache = model(), tokens(1, 20), DynamicCache()
    network(ids[:, :12], past_key_values=cache)
    loss = network(ids[:, 12:], past_key_values=cache).logits.sin().sum()
    got = torch.autograd.grad(loss, network.model.embed_tokens.weight)[0]
    whole = network(ids).logits[:, 12:].sin().sum()
    torch.testing.assert_close(got, torch.autograd.grad(whole, network.model.embed_tokens.weight)[0])


@torch.no_grad()
def test_a_cache_of_another_window_is_refused() -> None:
    cache = DynamicCache()
    model("window:size=5")(tokens(1, 9), past_key_values=cache)
    with pytest.raises(NotSupported, match="the model needs 0 and 6"):
        model("window:size=6")(tokens(1, 9), past_key_values=cache)
    with pytest.raises(NotSupported, match="brought back"):
        cache.crop(-2)


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_cost_grows_with_length_times_window(sinks: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores computed, and bytes kept for the backward."""
    scores: list[int] = []
    run = torch.nn.functional.scaled_dot_product_attention

    def counted(query: Tensor, key: Tensor, value: Tensor, **settings: object) -> Tensor:
        scores.append(query.shape[2] * key.shape[2])
        return run(query, key, value, **settings)

    monkeypatch.setattr(masks.F, "scaled_dot_product_attention", counted)

    def cost(length: int, window: int) -> tuple[int, int]:
        scores.clear()
        kept: dict[int, int] = {}

        def keep(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        query = torch.randn(1, 1, length, 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = attend(
                Window(window, sinks), AttentionCall(query, query, query, 0.3), AttentionShape(1, length, 0, causal)
            )
        out.sum().backward()
        return sum(scores), sum(kept.values())

    sides = 1 if causal else 2
    for window in (64, 256):
        short, long = cost(2048, window), cost(4096, window)
        assert all(big < 2.2 * small for big, small in zip(long, short, strict=True))
        assert long[0] < 4096 * (2.5 * sides * window + sinks)
    assert cost(4096, 16)[0] <= 4096 * (64 + sides * 16 + sinks)
