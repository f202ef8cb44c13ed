"""Gated attention units: dense formulas forward and backward, chunks and their edges, what a decoder keeps, refusals."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from growth import Written
from longspan.attention.gau import ChunkedUnit, GatedUnit
from longspan.core.method import parse
from longspan.engine.linear import gated
from longspan.lm import LongspanConfig, LongspanForCausalLM
from longspan.util.errors import NotSupported, SpecError

WIDTH, SIZE, TRAINED = 12, 8, 48
SIZES = {"vocab_size": 100, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(spec: str, *, causal: bool = True, **settings: Any) -> GatedUnit:
    """With parameters large enough for every part to matter."""
    given = {**SIZES, "max_position_embeddings": TRAINED, "position": "nope", "attention": spec, **settings}
    config = LongspanConfig(**given, kind="decoder" if causal else "encoder")
    built = parse(spec).methods[0].build(config, 0, config.build_position_encoding(causal=causal), causal=causal)  # type: ignore[attr-defined]
    assert isinstance(built, GatedUnit)
    built.double()
    with torch.no_grad():
        for i, (name, weight) in enumerate(built.named_parameters()):
            weight.copy_(random(*weight.shape, seed=i) * (3 if name in ("gamma", "beta") else 0.6))
    return built


def bucket(distance: int, count: int, far: int, causal: bool) -> int:
    """T5's numbering, a distance at a time."""
    start = 0
    if not causal:
        count //= 2
        start, distance = (count, -distance) if distance < 0 else (0, distance)
    distance = max(distance, 0)
    if distance < count // 2:
        return start + distance
    grown = math.log(distance / (count // 2)) / math.log(far / (count // 2)) * (count - count // 2)
    return start + min(count // 2 + int(grown), count - 1)


def dense(made: GatedUnit, x: Tensor) -> Tensor:
    """The formula of one text (T, width) without padding, by one matrix of T × T."""
    method, length = made.method, len(x)
    u, v, z = (F.silu(x @ p.weight.T) for p in (made.u_proj, made.v_proj, made.z_proj))
    views = [z * g + b for g, b in zip(made.gamma, made.beta, strict=True)]
    at = [[bucket(i - j, 32, 128, made.causal) for j in range(length)] for i in range(length)]
    bias, scores = made.table[torch.tensor(at)], views[0] @ views[1].T
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    seen = j <= i if made.causal else torch.ones(length, length, dtype=torch.bool)
    n = torch.full((length, 1), float(TRAINED if made.causal else length), dtype=torch.float64)
    chunk = getattr(method, "chunk", None)
    if chunk is not None:
        n = torch.full_like(n, chunk)
    elif method.scale != "paper":  # type: ignore[attr-defined]
        n = seen.sum(1, keepdim=True).double()
    su = method.scale == "su"  # type: ignore[attr-defined]
    a = torch.relu(scores / (math.sqrt(SIZE) if su else n) + bias) ** 2 / (n if su else 1) * seen
    if chunk is not None:
        a = a * (i // chunk == j // chunk)
        before = (j // chunk < i // chunk) if made.causal else torch.ones_like(seen)
        divisor = {
            "paper": TRAINED if made.causal else length,
            "chunk": chunk,
            "count": (i // chunk * chunk).clamp(min=1),
        }
        a = a + before * (views[2] @ views[3].T) / divisor[method.linear]  # type: ignore[attr-defined]
    return (u * (a @ v)) @ made.o_proj.weight.T


CAUSAL = (
    "gau:size=8",
    "gau:size=8,scale=count",
    "gau:size=8,scale=su",
    "flash:size=8,chunk=7",
    "flash:size=8,chunk=7,scale=su,linear=chunk",
    "flash:size=8,chunk=10,linear=count",
    "flash:size=8,chunk=64",
)
BOTH_WAYS = ("gau:size=8", "gau:size=8,scale=su", "flash:size=8,chunk=7", "flash:size=8,chunk=64,scale=su")
EVERY = [(spec, True) for spec in CAUSAL] + [(spec, False) for spec in BOTH_WAYS]


@pytest.mark.parametrize("at_once", [512, 7])
@pytest.mark.parametrize(("spec", "causal"), EVERY)
def test_unit_is_its_dense_formula(spec: str, causal: bool, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, of rows with padding at either side."""
    monkeypatch.setattr(gated, "QUERIES_AT_ONCE", at_once)
    made, x = unit(spec, causal=causal), random(3, 30, WIDTH, seed=20).requires_grad_()
    padding = torch.ones(3, 30, dtype=torch.bool)
    padding[1, :5] = padding[2, 26:] = False
    pull = random(3, 30, WIDTH, seed=21) * padding[..., None]
    leaves = [x, *made.parameters()]
    got = made(x, padding=padding)[0]
    ours = torch.autograd.grad((got * pull).sum(), leaves)
    wanted = [dense(made, row[real]) for row, real in zip(x, padding, strict=True)]
    theirs = torch.autograd.grad(sum((w * p[r]).sum() for w, p, r in zip(wanted, pull, padding, strict=True)), leaves)
    for row, real, want in zip(got, padding, wanted, strict=True):
        torch.testing.assert_close(row[real], want)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(made(x[:1])[0][0], wanted[0])


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_where_padding_is_anywhere(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated, "QUERIES_AT_ONCE", 7)
    made, x, padding = (
        unit("gau:size=8", causal=causal),
        random(1, 30, WIDTH, seed=26).requires_grad_(),
        torch.ones(1, 30),
    )
    padding[0, [0, 1, 5, 6, 7, 20, 28]] = 0
    real, leaves = padding.bool(), [x, *made.parameters()]
    got, want = made(x, padding=real)[0][real], dense(made, x[real])
    torch.testing.assert_close(got, want)
    pull = torch.randn_like(want)
    torch.testing.assert_close(torch.autograd.grad(got, leaves, pull), torch.autograd.grad(want, leaves, pull))


class Looked(TorchDispatchMode):
    """How many gradients come to a table one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.gradients = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.embedding_dense_backward.default, torch.ops.aten.index_put_.default):
            self.gradients += args[0].numel()
        if func in (torch.ops.aten.index_put.default, torch.ops.aten._index_put_impl_.default):
            self.gradients += args[2].numel()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("causal", [True, False])
def test_backward_is_a_few_forward_passes(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes written, at two lengths alike; memory kept for it grows with the length; and the table of the bias receives one
    gradient for each distance of a block, not one for each pair: on a GPU those are added one by one."""
    monkeypatch.setattr(gated, "QUERIES_AT_ONCE", 64)
    made, passes, kept = unit("gau:size=8", causal=causal).float(), [], []
    for length in (512, 1024):
        x, held = random(1, length, WIDTH).float().requires_grad_(), {}

        def keep(t: Tensor, held: dict[int, int] = held) -> Tensor:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with Written() as forward, torch.no_grad():
            made(x)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = made(x)[0]
        with Written() as backward, Looked() as looked:
            out.sum().backward()
        assert 0 < looked.gradients < length**2 / 20
        passes.append(backward.total / forward.total)
        kept.append(sum(held.values()))
    assert max(passes) < 4 and passes[1] < 1.1 * passes[0]
    assert kept[1] < 2.2 * kept[0]


@pytest.mark.cuda
def test_backward_on_a_gpu() -> None:
    """Where it took a thousand forward passes."""
    script = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "gated_backward.py"))
    rows = script["main"](["-l", "8k", "--heads", "4", "--units", "gau"])
    assert all(row["over_forward"] < 10 for row in rows)


def test_rows_of_the_script() -> None:
    script = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "gated_backward.py"))
    rows = script["main"](["--device", "cpu", "-l", "64", "-l", "128", "--heads", "1", "--width", "16", "--turns", "1"])
    assert [(row["attention"], row["dtype"], row["tokens"]) for row in rows] == [
        (unit, dtype, length) for unit in ("gau", "flash") for dtype in ("bf16", "float32") for length in (64, 128)
    ]
    assert all(row["backward_ms"] > 0 and row["peak_gb"] is None for row in rows)


@pytest.mark.parametrize("spec", CAUSAL)
def test_padding_anywhere_and_any_cut_change_nothing(spec: str) -> None:
    """Two texts read in chunks and single tokens, with padding before, between and after, each row's its own."""
    made, x = unit(spec), random(2, 45, WIDTH, seed=22)
    padding = torch.ones(2, 45, dtype=torch.bool)
    padding[0, [0, 1, 2, 10, 11, 25, 26, 27, 28, 33, 41]] = False
    padding[1, [14, 15, 16, 17, 18, 19, 38, 42]] = False
    cache, parts = DynamicCache(), []
    for begin, end in ((0, 15), (15, 24), *((t, t + 1) for t in range(24, 38)), (38, 43), (43, 44), (44, 45)):
        parts.append(made(x[:, begin:end], past_key_values=cache, padding=padding[:, :end])[0])
    whole = made(x, padding=padding)[0]
    for got in (torch.cat(parts, dim=1), whole):
        for row in range(2):
            torch.testing.assert_close(got[row, padding[row]], dense(made, x[row, padding[row]]))


@pytest.mark.parametrize("spec", CAUSAL)
def test_nothing_leaks_across_the_edge_of_a_chunk(spec: str) -> None:
    made, x = unit(spec), random(1, 30, WIDTH, seed=23)
    for at in (6, 7, 13, 14, 20, 29):
        other = x.clone()
        other[:, at] += 1
        assert torch.equal(made(other)[0][:, :at], made(x)[0][:, :at])
        assert not torch.allclose(made(other)[0][:, at], made(x)[0][:, at])


def test_one_chunk_is_the_quadratic_unit() -> None:
    long = unit(f"flash:size=8,chunk={TRAINED}")
    quadratic = unit("gau:size=8")
    state = long.state_dict()
    quadratic.load_state_dict({**state, "gamma": state["gamma"][:2], "beta": state["beta"][:2]})
    x = random(2, 40, WIDTH, seed=24)
    torch.testing.assert_close(long(x)[0], quadratic(x)[0])


def test_long_texts_go_through_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = unit("gau:size=8"), random(1, 30, WIDTH, seed=25)
    whole = made(x)[0]
    monkeypatch.setattr("longspan.engine.linear.gated.QUERIES_AT_ONCE", 7)
    with torch.no_grad():
        torch.testing.assert_close(made(x)[0], whole)
        torch.testing.assert_close(
            unit("gau:size=8", causal=False)(x)[0][0], dense(unit("gau:size=8", causal=False), x[0])
        )


def test_rotation_turns_every_view() -> None:
    """By RoPE scores know distances alone, so all tokens may move together."""
    x, rates = random(1, 30, WIDTH, seed=27), 100.0 ** -torch.arange(4, dtype=torch.float64)

    def read(spec: str, places: Tensor) -> Tensor:
        angles = (places[:, None] * rates).repeat(1, 2)[None]
        return unit(spec, position="rope", head_dim=8)(x, rotation=(angles.cos(), angles.sin()))[0]

    places = torch.arange(30).double()
    for spec in ("gau:size=8", "flash:size=8,chunk=7"):
        first, moved, apart = (read(spec, p) for p in (places, places + 9, places * 3))
        torch.testing.assert_close(first, moved)
        assert not torch.allclose(first, apart, atol=1e-3)


def test_what_a_decoder_keeps() -> None:
    """FLASH: one matrix of size × values, and one chunk's keys, both ways, and values, from the first token on."""
    made, cache = unit("flash:size=8,chunk=10"), DynamicCache()
    wide = 2 * WIDTH
    for length in (3, 30, 1):
        made(random(1, length, WIDTH), past_key_values=cache)
        assert sum(x.numel() for x in cache.layers[0].tensors.values()) == 8 * wide + 10 * (2 * 8 + wide) + 1
    quadratic, cache = unit("gau:size=8"), DynamicCache()
    for length in (3, 30):
        quadratic(random(1, length, WIDTH), past_key_values=cache)
    assert cache.layers[0].keys.shape == (1, 1, 33, 8) and cache.layers[0].values.shape == (1, 1, 33, wide)


def test_weights_start_as_the_paper_says_and_two_units_are_one_layer() -> None:
    config = LongspanConfig(vocab_size=50, hidden_size=256, num_hidden_layers=1, head_dim=128, attention="flash")
    model = LongspanForCausalLM(config)
    made = model.model.layers[0].self_attn
    assert isinstance(made, ChunkedUnit) and not hasattr(model.model.layers[0], "mlp")
    assert made.gamma.shape == (4, 128) and 0.015 < made.gamma.std() < 0.025
    assert (made.beta == 0).all()
    weights = sum(m.weight.numel() for m in made.modules() if isinstance(m, nn.Linear))
    assert weights == 3 * 256 * 512 + 256 * 128  # 6d² and the head's; attention and feed-forward network have 12d²


def test_half_precision_in_and_out() -> None:
    """Sums and scores are float32: large scores give what float64 gives, as well as bfloat16 inputs can."""
    for spec in ("gau:size=8,scale=su", "flash:size=8,chunk=7"):
        exact, x = unit(spec), random(1, 40, WIDTH, seed=26)
        half = unit(spec).bfloat16()
        exact.load_state_dict(half.state_dict())
        wanted, got = exact(x.bfloat16().double())[0], half(x.bfloat16())[0]
        assert got.dtype == torch.bfloat16
        assert (got.double() - wanted).norm() < 0.03 * wanted.norm()
        full = unit(spec).float()
        with torch.autocast("cpu", torch.bfloat16):
            mixed = full(x.float())[0]
        assert (mixed.double() - full(x.float())[0].double()).norm() < 0.03 * wanted.norm()
        cache = DynamicCache()
        half(x.bfloat16(), past_key_values=cache)
        if spec.startswith("flash"):
            assert cache.layers[0].tensors["sums"].dtype == torch.float32


def test_what_cannot_be_is_refused() -> None:
    for spec in (
        "gau:size=0",
        "gau:buckets=2",
        "gau:far=3",
        "gau:expansion=0",
        "flash:chunk=0",
        "gau:scale=none",
        "flash:scale=count",
    ):
        with pytest.raises(SpecError):
            parse(spec)
    with pytest.raises(NotSupported, match="head_dim=8, or attention=gau:size=6"):
        unit("gau:size=8", position="rope")
    with pytest.raises(NotSupported, match="bias"):
        unit("flash:size=8", position="alibi")
    with pytest.raises(NotSupported, match="hidden_dropout"):
        unit("flash:size=8", attention_dropout=0.1)
    with pytest.raises(SpecError, match="linear=paper"):
        unit("flash:size=8,linear=count", causal=False)
    with pytest.raises(SpecError, match="scale=paper"):
        unit("gau:size=8,scale=count", causal=False)
    with pytest.raises(SpecError, match="divisible by 4"):
        unit("gau:size=8,buckets=6", causal=False)
