"""The rolling cache by itself, with keys that carry their token's number, against plain lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longspan.hf.rolling import StreamingLayer, streaming_cache
from longspan.util.errors import NotSupported


def numbered(start: int, count: int, rows: int = 1) -> Tensor:
    """Keys (rows, 1, count, 2) of the tokens start, start + 1, …; row r adds 1,000 r."""
    tokens = torch.arange(start, start + count, dtype=torch.float32)
    return (tokens[None, None, :, None] + 1000 * torch.arange(rows)[:, None, None, None]).expand(-1, -1, -1, 2).clone()


def feed(layer: StreamingLayer, sizes: list[int]) -> tuple[Tensor, Tensor]:
    for size in sizes:
        keys = numbered(layer.get_seq_length(), size)
        returned = layer.update(keys, -keys)
    return returned


def numbers(x: Tensor) -> list[int]:
    return [int(n) for n in x[0, 0, :, 0]]


@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=12), sinks=st.integers(0, 5), window=st.integers(1, 9))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_what_is_kept_and_returned(sizes: list[int], sinks: int, window: int) -> None:
    """Sinks, the tokens that the first new one still sees, and the new ones, in order; for single tokens the whole ring."""
    layer = StreamingLayer(sinks, window)
    keys, values = feed(layer, sizes)
    total, new = sum(sizes), sizes[-1]
    start = total - new
    assert layer.get_seq_length() == total
    assert torch.equal(keys, -values)
    if new == 1:
        assert sorted(numbers(keys)) == sorted(
            {*range(min(sinks, total)), *range(max(0, total - window), total)}
            | (set(range(sinks, total)) if total <= sinks + window else set())
        )
    elif start == 0:
        assert numbers(keys) == list(range(total))
    else:
        known = list(range(min(sinks, total))) + [0] * max(0, sinks - total)
        assert numbers(keys) == known + list(range(max(sinks, start - window + 1), total))
    assert numbers(layer.sink_keys)[:total] == list(range(min(sinks, total)))
    ring = layer.keys[0, 0, sinks:, 0]
    for token in range(max(sinks, total - window), total):
        assert ring[(token - sinks) % window] == token


def test_sizes_never_grow() -> None:
    layer = StreamingLayer(2, 5)
    feed(layer, [1])
    storage = layer.keys.untyped_storage().nbytes(), layer.values.untyped_storage().nbytes()
    address = layer.keys.data_ptr(), layer.values.data_ptr()
    feed(layer, [3, 40, 1, 1, 7, 1])
    assert (layer.keys.untyped_storage().nbytes(), layer.values.untyped_storage().nbytes()) == storage
    assert (layer.keys.data_ptr(), layer.values.data_ptr()) == address
    assert layer.keys.shape == (1, 1, 7, 2) and layer.sink_keys.shape == (1, 1, 2, 2)


def test_each_row_keeps_its_own_sinks() -> None:
    """Rows that begin later, in one piece and token by token, over the end of the ring."""
    for sizes in ([20], [1] * 20, [4, 1, 9, 1, 1, 4]):
        layer = StreamingLayer(3, 4)
        layer.set_padding(torch.tensor([0, 11, 6]))
        for size in sizes:
            keys = numbered(layer.get_seq_length(), size, rows=3)
            layer.update(keys, -keys)
        assert layer.sink_keys[:, 0, :, 0].tolist() == [[0, 1, 2], [1011, 1012, 1013], [2006, 2007, 2008]]
        assert torch.equal(layer.values[:, :, :3], -layer.sink_keys)


def test_sink_keys_are_a_new_tensor_when_they_change() -> None:
    """Whoever keeps something made from them sees by identity that it is stale."""
    layer = StreamingLayer(3, 4)
    feed(layer, [2])
    before = layer.sink_keys
    feed(layer, [1])
    assert layer.sink_keys is not before
    before = layer.sink_keys
    feed(layer, [1, 9, 1, 3])
    assert layer.sink_keys is before
    layer.reset()
    assert layer.sink_keys is not before and layer.get_seq_length() == 0 and layer.pad is None and layer.settled == 0


def test_nothing_that_is_kept_has_a_gradient() -> None:
    layer = StreamingLayer(2, 3)
    keys = numbered(0, 8).requires_grad_()
    layer.update(keys, keys)
    later = numbered(8, 4).requires_grad_()
    returned, _ = layer.update(later, later)
    assert not any(x.requires_grad for x in (layer.keys, layer.values, layer.sink_keys))
    [gradient] = torch.autograd.grad(returned.sum(), later)
    assert (gradient == 1).all()
    assert torch.autograd.grad(layer.update(later[:, :, :1], later[:, :, :1])[0].sum(), later)[0].sum() == 2


@pytest.mark.parametrize(("seen", "forget", "left"), [([5], -2, 3), ([5], -5, 0), ([4, 3], -1, 6), ([5], 0, 5)])
def test_crop(seen: list[int], forget: int, left: int) -> None:
    layer = StreamingLayer(2, 5)
    feed(layer, seen)
    layer.crop(forget)
    assert layer.get_seq_length() == left
    feed(layer, [2, 1])
    ring = layer.keys[0, 0, 2:, 0]
    assert all(ring[(t - 2) % 5] == t for t in range(max(2, left - 2), left + 3))


def test_crop_refused() -> None:
    layer = StreamingLayer(2, 5)
    feed(layer, [8])
    layer.crop(0)
    for forget, said in ((-1, "cannot be brought back"), (3, "negative")):
        with pytest.raises(NotSupported, match=said):
            layer.crop(forget)


def test_a_cache_of_many_layers() -> None:
    cache = streaming_cache(3, 2, 5)
    for number in range(3):
        cache.update(numbered(0, 9), numbered(0, 9), number)
    assert cache.get_seq_length() == 9 and not cache.is_compileable
    assert len({id(layer) for layer in cache.layers}) == 3
