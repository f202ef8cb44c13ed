"""Each scheme's formula: against independent forms in float64, against published vectors and other libraries' numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5Attention

from longspan.core.method import parse
from longspan.lm.attention import relative_bias, scheme_attention
from longspan.positions.absolute import sinusoid
from longspan.positions.alibi import slopes
from longspan.positions.scheme import PositionEncoding, Shape
from longspan.positions.t5_bias import buckets

HEADS, WIDTH, LENGTH = 4, 16, 24
FAR = torch.tensor([0, 1, 2, 4, 8, 16, 64, 128, 512, 1024, 4096])


def encoding(spec: str, heads: int = HEADS, causal: bool = True) -> PositionEncoding:
    shape = Shape(layers=2, hidden=heads * WIDTH, heads=heads, head_dim=WIDTH, window=64, causal=causal)
    return parse(spec).methods[0].build(shape)


def naive(at: PositionEncoding, spec: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Every score by itself, in float64, from the formulas as they are printed."""
    out = torch.zeros_like(query)
    for h in range(HEADS):
        for i in range(LENGTH):
            scores = torch.stack([score(at, spec, h, query[0, h, i], key[0, h // 2, j], i, j) for j in range(i + 1)])
            out[0, h, i] = scores.softmax(0) @ value[0, h // 2, : i + 1]
    return out


def score(at: PositionEncoding, spec: str, h: int, q: Tensor, k: Tensor, i: int, j: int) -> Tensor:
    d, name = i - j, spec.partition(":")[0]
    plain = q @ k / math.sqrt(WIDTH)
    if name == "alibi":
        return plain - 2.0 ** (-8 * (h + 1) / HEADS) * d
    if name == "kerple":
        r1, r2 = at.r1[h].double(), at.r2[h].double()
        bias = -r1 * torch.log(1 + r2 * d) if "power" not in spec else -r1 * (float(d) ** r2 if d else 0.0)
        return (q @ k + bias) / math.sqrt(WIDTH) if "before" in spec else plain + bias
    if name == "sandwich":
        total = sum(math.cos(d * 10_000 ** (-2 * m / 128)) for m in range(1, 65))
        return plain + (total - 64) / (8 * (h + 1) / HEADS)
    if name == "t5":
        number = d if d < 16 else min(31, 16 + int(math.log(d / 16) / math.log(128 / 16) * 16))
        return plain + at.table[number, h].double()
    if name == "xpos":
        total = 0.0
        for m in range(WIDTH // 2):
            angle, zeta = d * 10_000 ** (-2 * m / WIDTH), (2 * m / WIDTH + 0.4) / 1.4
            a, b, c, e = q[m], q[m + WIDTH // 2], k[m], k[m + WIDTH // 2]
            pair = (a * c + b * e) * math.cos(angle) + (a * e - b * c) * math.sin(angle)
            total = total + pair * zeta ** (d / 512)
        return total / math.sqrt(WIDTH)
    raise AssertionError(name)


@pytest.mark.parametrize(
    "spec", ["alibi", "kerple", "kerple:scale=before", "kerple:kind=power", "sandwich", "t5", "xpos"]
)
def test_forward_and_gradients_equal_the_formula(spec: str) -> None:
    at = encoding(spec)
    module = nn.Module()
    module.place, module.is_causal = at, True
    shapes = ((1, HEADS, LENGTH, WIDTH), (1, 2, LENGTH, WIDTH), (1, 2, LENGTH, WIDTH))
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    positions = torch.arange(LENGTH)[None] + 5
    got = scheme_attention(module, *inputs, None, WIDTH**-0.5, position_ids=positions)[0].transpose(1, 2)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    wanted = naive(at, spec, *wide)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    weight = torch.randn(got.shape, dtype=torch.float64)
    own = torch.autograd.grad((got * weight).sum(), [*inputs, *at.parameters()])
    true = torch.autograd.grad((wanted * weight).sum(), [*wide, *at.parameters()])
    for a, b in zip(own, true, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", ["alibi", "kerple", "sandwich", "t5"])
@pytest.mark.parametrize("gap", [0, 9])
def test_rows_of_distances_equal_pairs(spec: str, gap: int) -> None:
    """Whether positions run on or jump, each pair gets the bias of its distance."""
    at = encoding(spec)
    keys = torch.arange(20)[None].clone()
    keys[:, 12:] += gap
    queries = keys[:, 8:]
    pairs = at.bias(queries[0, :, None] - keys[0])[None]
    torch.testing.assert_close(relative_bias(at, queries, keys), pairs)


def test_alibi_slopes() -> None:
    assert slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    twelve = [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625, 0.70711, 0.35355, 0.17678, 0.08839]
    assert slopes(12).tolist() == pytest.approx(twelve, abs=1e-5)
    assert slopes(1).tolist() == [2.0**-8]
    assert len(slopes(20)) == 20


def test_alibi_is_blooms() -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    for heads in (8, 12, 16, 20):
        theirs = build_alibi_tensor(torch.ones(1, 30), heads, torch.float32).view(heads, 30)
        ours = encoding("alibi", heads).bias(29 - torch.arange(30))
        torch.testing.assert_close(ours - ours[:, -1:], theirs - theirs[:, -1:])


def test_sandwich_vectors() -> None:
    wanted = [-1.4466, -5.2020, -13.7603, -17.1340, -22.3407, -32.8718, -41.0083, -47.9613, -50.9083, -67.2693]
    got = encoding("sandwich", heads=8).bias(FAR)
    torch.testing.assert_close(
        got[0], torch.tensor([0.0, *wanted]), rtol=0, atol=2e-3
    )  # the first of 8 heads divides by 1
    torch.testing.assert_close(got[3], got[0] / 4)


def test_kerple_reduces_to_alibi() -> None:
    at = encoding("kerple:kind=power")
    with torch.no_grad():
        at.r1.copy_(100 * slopes(HEADS))  # the slowest slope lies below the least r1
        at.r2.fill_(1.0)
    torch.testing.assert_close(at.bias(FAR), 100 * encoding("alibi").bias(FAR))


def test_kerple_parameters_stay_within_bounds() -> None:
    at = encoding("kerple:kind=power")
    with torch.no_grad():
        at.r1.fill_(-3.0)
        at.r2.fill_(5.0)
    r1, r2 = at.parameters_within_bounds()
    assert r1.min().item() == pytest.approx(0.01)
    assert r2.max().item() == pytest.approx(2.0)
    at.bias(FAR).sum().backward()
    assert (at.r1.grad != 0).all()


@pytest.mark.parametrize(("distance", "bucket"), [(15, 15), (16, 16), (18, 16), (19, 17), (20, 17), (31, 21), (32, 21),
    (64, 26), (100, 30), (113, 31), (127, 31), (128, 31), (1000, 31), (-3, 0)])  # fmt: skip
def test_t5_bucket_edges(distance: int, bucket: int) -> None:
    assert buckets(torch.tensor([distance]), 32, 128, causal=True).item() == bucket


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("count", "far"), [(32, 128), (16, 64), (64, 1000)])
def test_t5_buckets_are_transformers(causal: bool, count: int, far: int) -> None:
    behind = torch.arange(-3000, 3000)
    theirs = T5Attention._relative_position_bucket(
        -behind, bidirectional=not causal, num_buckets=count, max_distance=far
    )
    assert torch.equal(buckets(behind, count, far, causal=causal), theirs)


def test_sinusoid() -> None:
    table = sinusoid(torch.arange(200), 64)
    assert table[7, 10].item() == pytest.approx(math.sin(7 / 10_000 ** (10 / 64)), abs=1e-6)
    assert table[7, 11].item() == pytest.approx(math.cos(7 / 10_000 ** (10 / 64)), abs=1e-6)
    products = table @ table.T
    torch.testing.assert_close(products.diagonal(5), products[0, 5].expand(195), rtol=1e-4, atol=1e-4)


def test_xpos_scale_vectors() -> None:
    """What a score keeps over 2,048 tokens, pair by pair (head of 64)."""
    shape = Shape(layers=2, hidden=64, heads=1, head_dim=64, window=64, causal=True)
    at = parse("xpos").methods[0].build(shape)
    kept = []
    for pair in (0, 16, 31):
        x = torch.zeros(1, 1, 1, 64)
        x[..., pair] = 1
        query, key = at.rotate_qk(x, x, torch.tensor([[2048]]), torch.tensor([[0]]))
        pairs = (
            (query.view(2, 32) * key.view(2, 32)).sum(0),
            query.view(2, 32).norm(dim=0) * key.view(2, 32).norm(dim=0),
        )
        kept.append(pairs[1][pair].item())
    assert kept == pytest.approx([0.006664, 0.170788, (0.977679) ** 4], rel=1e-3)


def test_xpos_far_away_is_finite_in_16_bit() -> None:
    at = encoding("xpos")
    x = torch.randn(1, 2, 4000, WIDTH, dtype=torch.bfloat16)
    positions = torch.arange(200_000, 204_000)[None]
    query, key = at.rotate_qk(x, x, positions, positions)
    assert query.isfinite().all()
    assert key.isfinite().all()


def xpos_scores(query: Tensor, key: Tensor, positions: Tensor) -> Tensor:
    """All scores (H, T, T) in float64, each from its own distance; query and key (1, H, T, D)."""
    m = torch.arange(WIDTH // 2, dtype=torch.float64)
    distance = (positions[:, None] - positions).double()[..., None]
    decay = ((2 * m / WIDTH + 0.4) / 1.4) ** (distance.clamp(min=0) / 512)
    angle = distance * 10_000.0 ** (-2 * m / WIDTH)
    a, b = query[0, :, :, None].double().chunk(2, dim=-1)
    c, e = key[0, :, None].double().chunk(2, dim=-1)
    pairs = ((a * c + b * e) * angle.cos() + (a * e - b * c) * angle.sin()) * decay
    return pairs.sum(-1) / math.sqrt(WIDTH)


@pytest.mark.parametrize(("dtype", "step", "close"), [(torch.float32, 1500, 1e-3), (torch.float16, 200, 5e-3)])
@pytest.mark.parametrize("kind", ["whole", "padded", "packed", "cached", "pattern", "zero"])
def test_xpos_holds_past_every_float_s_range(dtype: torch.dtype, step: int, close: float, kind: str) -> None:
    """Places up to 144,000 in float32 and 19,200 in float16: scales leave the range of the dtype unless counted anew."""
    module = nn.Module()
    module.place, module.is_causal, module.zero_key = encoding("xpos"), True, kind == "zero"
    positions = torch.arange(97) * step
    if kind == "packed":
        positions = torch.cat((positions[:60], positions[:37]))
    text = torch.zeros(97, dtype=torch.long)
    if kind == "packed":
        text[60:] = 1
    mask = (text[:, None] == text) & torch.ones(97, 97, dtype=torch.bool).tril()
    given = None
    if kind == "padded":
        mask[:, :9] = False
    if kind in ("padded", "packed"):
        given = mask[None, None]
    if kind == "pattern":
        module.pattern = parse("window:size=30").methods[0]
        mask = mask.triu(-29)
    q, k, v = ((torch.randn(1, h, 97, WIDTH) * 2).to(dtype).requires_grad_() for h in (HEADS, 2, 2))
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    keys, values = (x.repeat_interleave(2, dim=1) for x in wide[1:])
    scores = xpos_scores(wide[0], keys, positions)
    scores = scores.masked_fill(~mask & ~torch.eye(97, dtype=torch.bool), float("-inf"))
    if kind == "zero":
        scores = nn.functional.pad(scores, (0, 1))
    wanted = scores.softmax(-1)[..., :97] @ values
    first = 80 if kind == "cached" else 0
    got, _ = scheme_attention(
        module,
        q[:, :, first:],
        k,
        v,
        given,
        WIDTH**-0.5,
        position_ids=positions[None, first:],
        key_positions=positions[None],
    )
    real = slice(9 - first, None) if kind == "padded" else slice(None)
    got, wanted = got.transpose(1, 2)[:, :, real], wanted[:, :, first:][:, :, real]
    torch.testing.assert_close(got.double(), wanted, rtol=close, atol=close)
    pull = torch.randn(got.shape, dtype=torch.float64)
    ours = torch.autograd.grad((got * pull).sum(), (q, k, v))
    for mine, true in zip(ours, torch.autograd.grad((wanted * pull).sum(), wide), strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=10 * close, atol=10 * close)


def test_xpos_blocks_are_few_and_short() -> None:
    at, line = encoding("xpos"), torch.arange(100_000)[None]
    assert at.query_blocks(line[:, :26_157], torch.float32) == [(0, 26_157)]
    for dtype, most in ((torch.float32, 26_157), (torch.bfloat16, 26_157), (torch.float16, 2_043)):
        blocks = at.query_blocks(line, dtype)
        assert [b for b, _ in blocks[1:]] == [e for _, e in blocks[:-1]]
        assert blocks[0][0] == 0 and blocks[-1][1] == 100_000
        assert most / 2 <= max(e - b for b, e in blocks) <= most
    assert at.query_blocks(torch.tensor([[5, 6, 100_000, 100_001, 3]]), torch.float16) == [
        (0, 2),
        (2, 3),
        (3, 4),
        (4, 5),
    ]


def test_tupe_has_word_and_place_terms_only() -> None:
    """With the words' projections at zero the score depends on the places alone, and the other way round."""
    at = encoding("tupe")
    positions = torch.arange(10)[None]
    bias = at.pair_bias(positions, positions)
    places = torch.nn.functional.layer_norm(at.places, at.places.shape[-1:])[:10]
    for h in range(HEADS):
        rows = slice(h * WIDTH, (h + 1) * WIDTH)
        wanted = (places @ at.query[rows].T) @ (places @ at.key[rows].T).T / math.sqrt(2 * WIDTH)
        torch.testing.assert_close(bias[0, h], wanted, rtol=1e-4, atol=1e-5)
    assert at.score_scale == pytest.approx(1 / math.sqrt(2))


def test_tupe_unties_the_first_token() -> None:
    at = encoding("tupe:relative=true", causal=False)
    with torch.no_grad():
        at.cls.copy_(torch.arange(2 * HEADS).float().view(2, HEADS))
    positions = torch.arange(6)[None]
    bias = at.pair_bias(positions, positions)
    torch.testing.assert_close(bias[0, :, 0], at.cls[0][:, None].expand(-1, 6))
    torch.testing.assert_close(bias[0, :, 1:, 0], at.cls[1][:, None].expand(-1, 5))
    assert bias[0, 0, 1:, 1:].unique().numel() > 20


def test_product_of_two_sinusoids_falls_as_the_logarithm() -> None:
    """(2/d) p_m·p_n is about 1 - (ln n + γ) / ln base: the long-range decay of sinusoidal positions (Su, archives/8231)."""
    far = torch.tensor([1, 2, 5, 10, 30, 100, 300, 1000, 3000])
    p = sinusoid(far, 4096)
    product = (p @ sinusoid(torch.zeros(1), 4096).mT)[:, 0] / 2048
    law = 1 - (far.double().log() + 0.5772156649) / math.log(10_000)
    assert (product - law).abs().max() < 0.06
    assert (product[1:] < product[:-1]).all()
