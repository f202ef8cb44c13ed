"""The contenders of `longspan bench attention`.

Patterns are timed as attention alone, on queries, keys and values that are there. What has projections of its own is timed as
a layer with them, beside full attention as a layer. Dense SDPA comes first. Modules of other libraries take part where they
are installed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from longspan.core.method import catalogue, parse
from longspan.engine.backends import choose, dense_first, use_backend
from longspan.engine.blocks.tables import block_size, bucket
from longspan.engine.call import AttentionCall, AttentionShape
from longspan.engine.masks import pieces
from longspan.engine.patterns import attend
from longspan.engine.window import fa4
from longspan.lm import LongspanConfig
from longspan.lm.base import Attention, Full, Pattern
from longspan.lm.layers import LongspanAttention
from longspan.lm.modeling import LongspanModel
from longspan.util.errors import LongspanError, NotSupported, SpecError

SIZED = {"window": ("window:size=1024", "window:size=1024,sinks=4")}
"""Specs of what has no size of its own; everything else comes with its defaults."""
DENSE = "dense SDPA"


@dataclass(frozen=True)
class Shape:
    """One text of one layer."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim

    def leaves(self, length: int) -> list[Tensor]:
        """Queries, keys and values (1, H or H_kv, length, D)."""
        return [
            torch.randn(1, heads, length, self.head_dim, dtype=self.dtype, device=self.device, requires_grad=True)
            for heads in (self.heads, self.kv_heads, self.kv_heads)
        ]

    def states(self, length: int) -> Tensor:
        return torch.randn(1, length, self.hidden, dtype=self.dtype, device=self.device, requires_grad=True)


@dataclass
class Work:
    """What is timed: `run` gives the output, `leaves` are what a backward reaches."""

    run: Callable[[], Tensor]
    leaves: list[Tensor]
    pairs: float | None = None
    """Pairs of a query and a key that it sees, of all heads together."""
    visited: float | None = None
    """Pairs of the blocks that hold any of these, of all heads (`Pattern.visited`); None where a pattern has no blocks."""
    way: str = ""
    why: str = ""
    mask_s: float | None = None
    """Seconds of building the masks, or the tables of blocks, that a call needs."""


@dataclass(frozen=True)
class Contender:
    """`prepare` makes its work for a length. Raises `NotSupported` for one that it cannot have."""

    name: str
    kind: str
    causal: bool
    prepare: Callable[[int], Work] = field(repr=False)
    linear: bool = False
    """Whether a query sees no more of a longer text, so that time grows as the length from some length on."""


def contenders(specs: list[str], shape: Shape, skipped: dict[str, str], *, peers: bool) -> Iterator[Contender]:
    """Of all attentions of the catalogue, or of `specs`; `skipped` gets who cannot take part, and why."""
    methods = [_read(spec) for spec in specs or _known()]
    yield Contender(DENSE, "attention", True, partial(_dense, shape))
    if shape.device.type == "cuda":
        yield Contender("FlexAttention", "attention", True, partial(_pattern, Full(), shape, True, "flex"))
    yield Contender("full, layer", "layer", True, partial(_layer, Full(), shape, True))
    for method in methods:
        causal = "causal" in method.directions
        try:
            layer = _build(method, shape, 256, causal).layers[0].self_attn
        except LongspanError as error:
            skipped[method.spec] = str(error)
            continue
        except Exception as error:  # of a method of the user's own, say
            skipped[method.spec] = f"{type(error).__name__}: {error}"
            continue
        if isinstance(method, Pattern) and type(layer) is LongspanAttention:
            linear = _is_linear(method, AttentionShape(shape.heads, 2**24, 0, causal))
            yield Contender(method.spec, "attention", causal, partial(_pattern, method, shape, causal, None), linear)
            for way, title in _slower(method, shape, causal):
                by_way = partial(_pattern, method, shape, causal, way)
                yield Contender(f"{method.spec}, {title}", "attention", causal, by_way, linear)
        elif not isinstance(method, Full):
            yield Contender(method.spec, "layer", causal, partial(_layer, method, shape, causal))
    for name, (kind, causal, make) in PEERS.items() if peers else ():
        try:
            yield Contender(name, kind, causal, make(shape))
        except ImportError as error:
            skipped[name] = f"{error.name or error} is not installed"
        except NotSupported as error:
            skipped[name] = str(error)


def _slower(pattern: Pattern, shape: Shape, causal: bool) -> Iterator[tuple[str, str]]:
    """Ways beside the one that a window goes by itself, and what they are called."""
    if shape.device.type == "cuda" and causal and pattern.sinks_and_window() is not None:
        if fa4.installed():
            yield "kernel", "own kernels"
        yield "flex", "FlexAttention"


def _known() -> list[str]:
    names = [n for n, cls in catalogue().items() if issubclass(cls, Attention) and n != "full"]
    return [spec for name in names for spec in SIZED.get(name, (name,))]


def _read(spec: str) -> Attention:
    methods = parse(spec).methods
    if len(methods) != 1 or not isinstance(methods[0], Attention):
        raise SpecError(f"{spec!r} is no pattern or mixer, such as window:size=1024; longspan methods lists them")
    return methods[0]


def _dense(shape: Shape, length: int) -> Work:
    query, key, value = leaves = shape.leaves(length)
    grouped = shape.heads != shape.kv_heads

    def run() -> Tensor:
        with dense_first(shape.device):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)

    return Work(run, leaves, shape.heads * length * (length + 1) / 2, way="sdpa")


def _pattern(pattern: Pattern, shape: Shape, causal: bool, way: str | None, length: int) -> Work:
    leaves = shape.leaves(length)
    call = AttentionCall(leaves[0], leaves[1], leaves[2], shape.head_dim**-0.5)
    grid = AttentionShape(shape.heads, length, 0, causal)

    def run() -> Tensor:
        with use_backend(way) if way else contextlib.nullcontext():
            return attend(pattern, call, grid)

    pairs = pattern.pairs(grid)
    if way is None and type(pattern).run is not Pattern.run:
        return Work(run, leaves, pairs, pattern.visited(grid, shape.device), "own")
    tables_s = _tables_s(pattern, grid, shape.device)  # first, since they are kept
    with use_backend(way) if way else contextlib.nullcontext():
        choice = choose(pattern, call, grid)
    mask_s = (
        tables_s if choice.backend == "flex" else _masks_s(pattern, call, grid) if choice.backend == "masks" else 0.0
    )
    return Work(run, leaves, pairs, pattern.visited(grid, shape.device), choice.backend, choice.why, mask_s)


def _is_linear(pattern: Pattern, grid: AttentionShape) -> bool:
    """Whether the last query of a very long text sees less than a hundredth of it."""
    return sum(high - low for low, high in pattern.ranges(grid.length - 1, grid.length, grid)) < grid.length / 100


def _tables_s(pattern: Pattern, grid: AttentionShape, device: torch.device) -> float | None:
    """Seconds of building the tables of blocks, where FlexAttention may need them."""
    if device.type != "cuda":
        return None
    for length in (128, grid.length):  # the first for the libraries that it loads
        wait(device)
        start = time.perf_counter()
        size = block_size(bucket(length), backward=False)
        blocks = pattern.blocks(replace(grid, length=length), size, device)
        if blocks is not None:
            blocks.padded(bucket(length)).mask()
        wait(device)
    return time.perf_counter() - start


def _masks_s(pattern: Pattern, call: AttentionCall, grid: AttentionShape) -> float:
    """Seconds of making the masks of one call, which every call does."""
    for _ in range(2):
        wait(call.query.device)
        start = time.perf_counter()
        for _ in pieces(pattern, call, grid):
            pass
        wait(call.query.device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _build(method: Attention, shape: Shape, length: int, causal: bool) -> LongspanModel:
    """One layer of it, without positions where it can be without."""
    sizes: dict[str, Any] = {"hidden_size": shape.hidden, "num_attention_heads": shape.heads, "num_hidden_layers": 1}
    sizes |= {
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": 64,
        "vocab_size": 8,
    }
    sizes |= {"kind": "decoder" if causal else "encoder", "max_position_embeddings": length, method.seam: method.spec}
    for position in ("nope", "rope"):
        with contextlib.suppress(LongspanError):
            model = LongspanModel(LongspanConfig(**sizes, position=position))
            break
    else:
        model = LongspanModel(LongspanConfig(**sizes, position="sinusoidal"))
    return nn.Module.to(model, shape.device, shape.dtype).eval()


def _layer(method: Attention, shape: Shape, causal: bool, length: int) -> Work:
    model = _build(method, shape, length, causal)
    layer: Any = model.layers[0].self_attn
    states = shape.states(length)
    positions = torch.arange(length, device=shape.device)[None]
    rotation = model.rotary_emb(states, positions) if hasattr(model, "rotary_emb") else None

    def run() -> Tensor:
        with dense_first(shape.device):
            return layer(states, None, rotation, None, position_ids=positions, padding=None)[0]

    return Work(run, [states, *layer.parameters()])


def _module(
    make: Callable[[int], tuple[nn.Module, Callable[[nn.Module, Tensor], Any]]], shape: Shape, length: int
) -> Work:
    """A module of another library, and how it is called with states."""
    module, call = make(length)
    module.to(shape.device, shape.dtype).eval()
    states = shape.states(length)
    return Work(lambda: call(module, states), [states, *module.parameters()])


def _longformer(shape: Shape) -> Callable[[int], Work]:
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    def make(length: int) -> tuple[nn.Module, Any]:
        if length % 512:
            raise NotSupported("it takes lengths in multiples of its window of 512")
        sizes: dict[str, Any] = {
            "hidden_size": shape.hidden,
            "num_attention_heads": shape.heads,
            "num_hidden_layers": 1,
        }
        module = LongformerSelfAttention(LongformerConfig(**sizes, attention_window=[512]), layer_id=0)
        mask = torch.zeros(1, length, dtype=shape.dtype, device=shape.device)
        masked = torch.zeros(1, length, dtype=torch.bool, device=shape.device)
        return module, lambda m, x: m(x, mask, masked, masked, False)[0]

    return partial(_module, make, shape)


def _big_bird(shape: Shape) -> Callable[[int], Work]:
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

    def make(length: int) -> tuple[nn.Module, Any]:
        if length % 64 or length < 1024:
            raise NotSupported("it takes lengths from 1,024 on, in multiples of its blocks of 64")
        sizes: dict[str, Any] = {
            "hidden_size": shape.hidden,
            "num_attention_heads": shape.heads,
            "max_position_embeddings": length,
        }
        module = BigBirdBlockSparseAttention(BigBirdConfig(**sizes), seed=0)
        ones = torch.ones(1, length, dtype=shape.dtype, device=shape.device)
        blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(ones, 64)
        return module, lambda m, x: m(x, band, rows, columns, blocked, blocked)[0]

    return partial(_module, make, shape)


def _reformer(shape: Shape) -> Callable[[int], Work]:
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    def make(length: int) -> tuple[nn.Module, Any]:
        if length % 64:
            raise NotSupported("it takes lengths in multiples of its chunks of 64")
        sizes: dict[str, Any] = {
            "hidden_size": shape.hidden,
            "num_attention_heads": shape.heads,
            "attention_head_size": shape.head_dim,
        }
        config = ReformerConfig(
            **sizes, num_hashes=4, num_buckets=None, is_decoder=True, max_position_embeddings=length
        )
        return LSHSelfAttention(config), lambda m, x: m(x)[0]

    return partial(_module, make, shape)


def _linear_attention(shape: Shape) -> Callable[[int], Work]:
    from fla.layers import LinearAttention

    def make(length: int) -> tuple[nn.Module, Any]:
        module = LinearAttention(hidden_size=shape.hidden, num_heads=shape.heads, feature_map="elu")  # as ours
        return module, lambda m, x: m(x)[0]

    return partial(_module, make, shape)


def _x_transformers(shape: Shape) -> Callable[[int], Work]:
    from x_transformers.x_transformers import Attention as PeerAttention

    def make(length: int) -> tuple[nn.Module, Any]:
        sizes = {"dim": shape.hidden, "heads": shape.heads, "dim_head": shape.head_dim}

        def call(module: nn.Module, states: Tensor) -> Tensor:
            out = module(states)
            return out[0] if isinstance(out, tuple) else out

        return PeerAttention(**sizes, causal=True, flash=True), call

    return partial(_module, make, shape)


def _gym_window(shape: Shape) -> Callable[[int], Work]:
    from attn_gym.masks import generate_sliding_window

    _need_cuda(shape)
    return partial(
        _masked, shape, lambda length: generate_sliding_window(1023)
    )  # so far back, besides the token itself


def _gym_longformer(shape: Shape) -> Callable[[int], Work]:
    from attn_gym.masks import generate_global_sliding_window

    _need_cuda(shape)

    def visible(length: int) -> Any:
        return generate_global_sliding_window(256, torch.arange(length, device=shape.device) == 0)

    return partial(_masked, shape, visible)


def _need_cuda(shape: Shape) -> None:
    if shape.device.type != "cuda":
        raise NotSupported("FlexAttention has no backward on a CPU")


def _masked(shape: Shape, make: Callable[[int], Any], length: int) -> Work:
    """FlexAttention under a function of query and key, whose blocks torch finds out."""
    query, key, value = leaves = shape.leaves(length)
    for _ in range(2):  # the first compiles
        wait(shape.device)
        start = time.perf_counter()
        mask = create_block_mask(make(length), None, None, length, length, device=shape.device.type, _compile=True)
        wait(shape.device)
    mask_s = time.perf_counter() - start
    grouped, attend = shape.heads != shape.kv_heads, torch.compile(flex_attention, dynamic=False)
    blocks = mask.kv_num_blocks.sum() + (0 if mask.full_kv_num_blocks is None else mask.full_kv_num_blocks.sum())
    visited = shape.heads * float(blocks) * mask.BLOCK_SIZE[0] * mask.BLOCK_SIZE[1]
    return Work(
        lambda: attend(query, key, value, block_mask=mask, enable_gqa=grouped),
        leaves,
        None,
        visited,
        "flex",
        "",
        mask_s,
    )


PEERS: dict[str, tuple[str, bool, Callable[[Shape], Callable[[int], Work]]]] = {
    "transformers Longformer": ("layer", False, _longformer),
    "transformers BigBird": ("layer", False, _big_bird),
    "transformers Reformer": ("layer", True, _reformer),
    "flash-linear-attention": ("layer", True, _linear_attention),
    "x-transformers": ("layer", True, _x_transformers),
    "attention-gym, window of 1024": ("attention", True, _gym_window),
    "attention-gym, Longformer's mask": ("attention", False, _gym_longformer),
}
"""What other libraries have: what it is timed as, whether it is causal, and what makes it; ImportError where it is not
installed."""
