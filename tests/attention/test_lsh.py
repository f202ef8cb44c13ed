"""LSH attention against the paper's sets in float64, against transformers' Reformer, and what its forms promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, ReformerConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from longspan.attention.lsh import Lsh, LshAttention, hashed_attention, newest_attention
from longspan.core.method import parse
from longspan.lm import LongspanConfig, LongspanForCausalLM
from longspan.util.errors import NotSupported, SpecError

SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "position": "sinusoidal",
}


def visible(buckets: list[int], chunk: int, form: str, causal: bool) -> list[set[int]]:
    """The other tokens that each token sees in one round: equations (4) and (5), with lists and sets."""
    order = sorted(range(len(buckets)), key=lambda i: (buckets[i], i))
    place = {token: (order.index(token) // chunk, buckets[token]) for token in order}
    if form == "aligned":
        members = {b: [i for i in order if buckets[i] == b] for b in buckets}
        place = {i: (members[buckets[i]].index(i) // chunk, buckets[i]) for i in order}
    return [
        {
            j
            for j in range(len(buckets))
            if j != i and place[i][1] == place[j][1] and place[i][0] - place[j][0] in (0, 1) and (j < i or not causal)
        }
        for i in range(len(buckets))
    ]


def reference(qk: Tensor, value: Tensor, buckets: Tensor, method: Lsh, causal: bool, real: Tensor) -> Tensor:
    """Softmax over the union of what a token sees in all rounds, itself only where that is empty."""
    rows = []
    for b in range(qk.shape[0]):
        always_visible = real[b].nonzero()[:, 0].tolist()
        for h in range(qk.shape[1]):
            sets: list[set[int]] = [set() for _ in always_visible]
            for numbers in buckets[b, h].tolist():
                one = visible([numbers[i] for i in always_visible], method.chunk, method.form, causal)
                sets = [a | b for a, b in zip(sets, one, strict=True)]
            out = torch.zeros_like(value[b, h])
            for at, others in enumerate(sets):
                keys = [always_visible[j] for j in sorted(others)] or [always_visible[at]]
                unit = qk[b, h, keys] / (qk[b, h, keys].square().sum(-1, keepdim=True) + 1e-6 * qk.shape[-1]).sqrt()
                weights = (unit @ qk[b, h, always_visible[at]]).softmax(-1)
                out = out.index_put((torch.tensor(always_visible[at]),), weights @ value[b, h, keys])
            rows.append(out)
    return torch.stack(rows).view_as(value)


def drawn(length: int, rounds: int, buckets: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(7)
    qk, value = (torch.randn(2, 3, length, 8, generator=draw).double().requires_grad_() for _ in range(2))
    return qk, value, torch.randint(0, buckets, (2, 3, rounds, length), generator=draw)


@pytest.mark.parametrize("form", ["paper", "aligned"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "chunk", "buckets"), [(37, 4, 3), (32, 8, 4), (20, 32, 2), (9, 1, 2)])
@pytest.mark.parametrize("padded", [False, True])
def test_is_softmax_over_the_union_of_rounds(
    form: str, causal: bool, length: int, chunk: int, buckets: int, padded: bool
) -> None:
    method = Lsh(chunk=chunk, hashes=3, form=form)
    qk, value, number = drawn(length, 3, buckets)
    real = torch.ones(2, length, dtype=torch.bool)
    if padded:
        real[0, :5] = real[1, 6:] = False
    got = hashed_attention(qk, value, number, method, causal, real if padded else None, 0.0) * real[:, None, :, None]
    wanted = reference(qk, value, number, method, causal, real)
    torch.testing.assert_close(got, wanted)
    pull = torch.randn(got.shape, generator=torch.Generator().manual_seed(8)).double()
    ours = torch.autograd.grad((got * pull).sum(), (qk, value))
    torch.testing.assert_close(ours, torch.autograd.grad((wanted * pull).sum(), (qk, value)))


@pytest.mark.parametrize("form", ["paper", "aligned"])
def test_the_newest_token_gets_what_the_definition_says(form: str) -> None:
    chunk = 4 if form == "aligned" else 16  # in the paper's form equal only where no bucket is longer than a chunk
    method = Lsh(chunk=chunk, hashes=3, form=form)
    qk, value, number = drawn(30, 3, 4)
    assert number.flatten(0, 2).apply_(lambda b: b == 0).sum(-1).max() <= 16
    real = torch.ones(2, 30, dtype=torch.bool)
    real[0, :3] = False
    got = newest_attention(qk, value, number, method, True, real, 0.0)
    torch.testing.assert_close(got, reference(qk, value, number, method, True, real)[:, :, -1:])


def module(causal: bool, **settings: object) -> LshAttention:
    config = LongspanConfig(**SIZES, kind="decoder" if causal else "encoder", attention=Lsh(**settings).spec)
    torch.manual_seed(0)
    built = config.attentions[0].build(config, 0, config.build_position_encoding(causal=causal), causal=causal)
    assert isinstance(built, LshAttention)
    return built.double()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("hashes", [1, 3])
@pytest.mark.parametrize("buckets", [4, (4, 6)])
def test_trax_form_is_transformers_reformer(causal: bool, hashes: int, buckets: int | tuple[int, int]) -> None:
    """Their module with our weights and rotations, outputs and gradients. The first draw after their seed is theirs, so ours
    is set to it."""
    count = buckets if isinstance(buckets, int) else buckets[0] * buckets[1]
    ours = module(causal, chunk=8, hashes=hashes, buckets=count, form="trax")
    config = ReformerConfig(
        hidden_size=64,
        num_attention_heads=4,
        attention_head_size=16,
        attn_layers=["lsh"],
        lsh_attn_chunk_length=8,
        num_buckets=buckets if isinstance(buckets, int) else list(buckets),
        num_hashes=hashes,
        is_decoder=causal,
        hash_seed=3,
        lsh_attention_probs_dropout_prob=0.0,
        axial_pos_embds=False,
    )
    theirs = LSHSelfAttention(config).double()
    theirs.query_key.weight, theirs.value.weight = ours.qk_proj.weight, ours.v_proj.weight
    ours.factors = (buckets,) if isinstance(buckets, int) else buckets
    torch.manual_seed(3)
    ours.rotations = torch.randn(4, 16, hashes, sum(ours.factors) // 2, dtype=torch.float64).transpose(1, 2)
    ours.o_proj = torch.nn.Identity()
    hidden = torch.randn(2, 40, 64).double().requires_grad_()
    got, wanted = ours(hidden)[0], theirs(hidden).hidden_states
    torch.testing.assert_close(got, wanted)
    pull = torch.randn_like(got)
    given = (hidden, ours.qk_proj.weight, ours.v_proj.weight)
    ours_back = torch.autograd.grad((got * pull).sum(), given)
    torch.testing.assert_close(ours_back, torch.autograd.grad((wanted * pull).sum(), given))


@pytest.mark.parametrize("causal", [True, False])
def test_one_bucket_and_one_chunk_is_shared_full_attention(causal: bool) -> None:
    attention, hidden = module(causal, chunk=64, hashes=1, buckets=1), torch.randn(2, 40, 64).double()
    qk, value = (p(hidden).view(2, 40, 4, 16).transpose(1, 2) for p in (attention.qk_proj, attention.v_proj))
    scores = qk @ torch.nn.functional.normalize(qk, dim=-1).mT
    mask = torch.eye(40, dtype=torch.bool) if not causal else torch.ones(40, 40, dtype=torch.bool).triu()
    mask = mask.clone()
    if causal:
        mask[0, 0] = False
    weights = scores.masked_fill(mask, float("-inf")).softmax(-1)
    wanted = attention.o_proj((weights @ value).transpose(1, 2).reshape(2, 40, 64))
    torch.testing.assert_close(attention(hidden)[0], wanted, rtol=1e-4, atol=1e-5)


def test_more_rounds_come_closer_to_full_attention() -> None:
    """And the first rounds of many are those of few, so that a model can be run with more than it was trained with."""
    hidden = 3 * torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(1)).double()
    full = module(True, chunk=64, hashes=1, buckets=1)
    errors = []
    for hashes in (1, 4, 32):
        hashed = module(True, chunk=8, hashes=hashes)
        hashed.load_state_dict({k: v for k, v in full.state_dict().items() if k != "rotations"}, strict=False)
        errors.append((hashed(hidden)[0] - full(hidden)[0]).norm().item())
    assert errors[0] > 1.5 * errors[1] > 3 * errors[2]
    few, many = module(True, chunk=8, hashes=2), module(True, chunk=8, hashes=4)
    assert torch.equal(few.rotations, many.rotations[:, :2])
    assert not torch.equal(few.rotations[:, 0], few.rotations[:, 1])


def model(attention: str, **more: object) -> LongspanForCausalLM:
    torch.manual_seed(1)
    built = LongspanForCausalLM(LongspanConfig(**{**SIZES, "attention": attention, **more})).eval()
    with torch.no_grad():
        for weight in built.parameters():
            if weight.ndim == 2:
                weight.normal_(0, 1.5 * weight.shape[1] ** -0.5)
    return built


def ids(length: int = 40) -> Tensor:
    return torch.randint(2, 100, (2, length), generator=torch.Generator().manual_seed(3))


def in_pieces(built: LongspanForCausalLM, tokens: Tensor) -> Tensor:
    cache, parts = DynamicCache(), []
    with torch.no_grad():
        for begin, end in ((0, 17), (17, 30), *((t, t + 1) for t in range(30, tokens.shape[1]))):
            parts.append(built(tokens[:, begin:end], past_key_values=cache).logits)
    return torch.cat(parts, dim=1)


def test_decoding_is_exact_where_buckets_fit_a_chunk_and_near_it_elsewhere() -> None:
    with torch.no_grad():
        fits = model("lsh:chunk=64,buckets=4,form=paper")
        torch.testing.assert_close(in_pieces(fits, ids()), fits(ids()).logits, rtol=1e-4, atol=1e-4)
        small = model("lsh:chunk=8,buckets=4,form=paper")
        whole, pieces = small(ids()).logits, in_pieces(small, ids())
        assert not torch.allclose(whole, pieces, atol=1e-3)
        agree = (whole[:, 30:].argmax(-1) == pieces[:, 30:].argmax(-1)).float().mean()
        assert agree > 0.5


def test_of_later_tokens_only_the_choice_can_reach_earlier_ones() -> None:
    """The gradient of an earlier result for a later token is zero; the choice of keys moves in the paper's form where buckets
    outgrow chunks, and in the aligned one never."""
    other = ids().clone()
    other[:, 35:] = 7
    moved = {}
    for form in ("paper", "trax", "aligned"):
        built = model(f"lsh:chunk=4,buckets=4,form={form}")
        embeds = built.model.embed_tokens(ids()).detach().requires_grad_()
        built(inputs_embeds=embeds).logits[:, :30].square().sum().backward()
        assert embeds.grad[:, 30:].abs().max() == 0
        assert embeds.grad[:, :30].abs().max() > 0
        with torch.no_grad():
            moved[form] = not torch.equal(built(ids()).logits[:, :35], built(other).logits[:, :35])
    assert moved == {"paper": True, "trax": True, "aligned": False}
    fits = model(
        "lsh:chunk=64,buckets=4,form=paper"
    ).double()  # sorting otherwise adds in another order, and nothing else
    with torch.no_grad():
        torch.testing.assert_close(fits(ids()).logits[:, :35], fits(other).logits[:, :35], rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_in_the_papers_form(side: str) -> None:
    built, tokens = model("lsh:chunk=4,buckets=4,form=paper"), ids(30)
    mask = torch.ones_like(tokens)
    inside = slice(7, None) if side == "left" else slice(None, 23)
    mask[0] = 0
    mask[0, inside] = 1
    with torch.no_grad():
        got = built(tokens, attention_mask=mask).logits
        alone = built(tokens[:1, inside]).logits
    torch.testing.assert_close(got[:1, inside], alone, rtol=1e-4, atol=1e-4)


def test_rotations_are_saved_and_the_same_in_training(tmp_path: Path) -> None:
    built = model("lsh:chunk=8,seed=5")
    drawn_now = [layer.self_attn.rotations for layer in built.model.layers]
    assert not torch.equal(drawn_now[0], drawn_now[1])
    with torch.no_grad():
        built.model.layers[0].self_attn.rotations.mul_(-1).add_(0.1)  # not what the seed says: what is saved counts
        built.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again.model.layers[0].self_attn.rotations, built.model.layers[0].self_attn.rotations)
        torch.testing.assert_close(again.train()(ids()).logits, built.eval()(ids()).logits, rtol=0, atol=0)


def test_rope_turns_the_shared_vector_before_the_hash() -> None:
    """Scores see distances alone, and so do buckets."""
    built = model("lsh:chunk=64,buckets=1,hashes=1", position="rope")
    with torch.no_grad():
        plain = built(ids()).logits
        shifted = built(ids(), position_ids=torch.arange(40)[None] + 13).logits
        sinusoidal = model("lsh:chunk=64,buckets=1,hashes=1", position="nope")(ids()).logits
    torch.testing.assert_close(plain, shifted, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(plain, sinusoidal, atol=1e-2)


def test_layout_of_the_paper_and_shared_values() -> None:
    """Local layers and one of hashes in four, as in the authors' enwik8 models; values shared by groups of heads."""
    layout = ["window:size=8", "window:size=8", "lsh:chunk=8", "window:size=8"]
    built = model(layout, position="rope", num_hidden_layers=4, num_key_value_heads=2)
    kinds = [type(layer.self_attn).__name__ for layer in built.model.layers]
    assert kinds == ["LongspanAttention", "LongspanAttention", "LshAttention", "LongspanAttention"]
    with torch.no_grad():
        torch.testing.assert_close(in_pieces(built, ids()), built(ids()).logits, rtol=1e-4, atol=1e-4)


def test_the_default_sees_what_came_before_alone() -> None:
    """Though buckets outgrow chunks: no logit of a prefix depends on what follows it, and decoding equals one forward."""
    built, other = model("lsh:chunk=4,buckets=4"), ids().clone()
    other[:, 30:] = 7
    with torch.no_grad():
        whole = built(ids()).logits
        assert torch.equal(built(other).logits[:, :30], whole[:, :30])
    torch.testing.assert_close(in_pieces(built, ids()), whole, rtol=1e-4, atol=1e-4)


def test_a_saved_model_is_read_in_the_form_that_it_was_trained_in(tmp_path: Path) -> None:
    """What is saved names its form. A folder from the time when it did not, and `paper` was the default, is of that form."""
    layout = ["lsh:chunk=4,buckets=4", "window:size=8"]
    for form, saved in (("aligned", layout), ("paper", [f"{layout[0]},form=paper", layout[1]])):
        folder, built = tmp_path / form, model(saved)
        built.save_pretrained(folder)
        stored = json.loads((folder / "config.json").read_text())["attention"]
        assert stored == [f"{layout[0]},form={form}", layout[1]]
        again = AutoModelForCausalLM.from_pretrained(folder)
        assert [a.spec for a in again.config.attentions] == [a.spec for a in built.config.attentions]
        with torch.no_grad():
            torch.testing.assert_close(again(ids()).logits, built(ids()).logits, rtol=0, atol=0)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace(",form=paper", ""))
    with torch.no_grad():
        torch.testing.assert_close(
            AutoModelForCausalLM.from_pretrained(folder)(ids()).logits, built(ids()).logits, rtol=0, atol=0
        )
        now = AutoModelForCausalLM.from_pretrained(folder, attention=layout)  # who asks for the default gets today's
        assert not torch.allclose(now(ids()).logits, built(ids()).logits, atol=1e-3)
    now.save_pretrained(folder)
    assert AutoModelForCausalLM.from_pretrained(folder).config.attentions[0] == Lsh(chunk=4, buckets=4)
    for spec, stored in (("lsh", "lsh:form=aligned"), ("window:size=8", "window:size=8")):
        assert LongspanConfig(attention=spec).to_dict()["attention"] == stored


def test_number_of_buckets() -> None:
    assert Lsh(chunk=128).factors(1024) == (16,)
    assert Lsh(chunk=128).factors(64) == (2,)
    assert Lsh(chunk=256).factors(2**16) == (32, 16)  # the authors' 512 for 64k tokens
    assert Lsh(chunk=128, buckets=1, hashes=1).factors(1024) == ()
    for buckets in (130, 300, 512, 2050):
        first, second = Lsh(buckets=buckets).factors(1024)
        assert first % 2 == second % 2 == 0
        assert buckets <= first * second < 1.5 * buckets


def test_bfloat16_scores_are_float32() -> None:
    qk, value, number = drawn(64, 2, 4)
    method = Lsh(chunk=16)
    wanted = hashed_attention(qk, value, number, method, True, None, 0.0)
    got = hashed_attention(qk.bfloat16(), value.bfloat16(), number, method, True, None, 0.0)
    assert got.dtype == torch.bfloat16
    assert (got.double() - wanted).norm() / wanted.norm() < 1e-2


def test_dropout_is_in_training_only() -> None:
    built = model("lsh:chunk=8", attention_dropout=0.5)
    with torch.no_grad():
        assert torch.equal(built(ids()).logits, built(ids()).logits)
        built.train()
        assert not torch.equal(built(ids()).logits, built(ids()).logits)


@pytest.mark.parametrize(
    "spec",
    [
        "lsh:buckets=3",
        "lsh:chunk=0",
        "lsh:hashes=0",
        "lsh:buckets=1",
        "lsh:buckets=0",
        "lsh:buckets=1,hashes=1,seed=2",
        "lsh:form=x",
    ],
)
def test_impossible_settings(spec: str) -> None:
    with pytest.raises(SpecError):
        parse(spec)


@pytest.mark.parametrize("position", ["alibi", "t5", "xpos", "tupe"])
def test_schemes_whose_part_would_be_lost_are_refused(position: str) -> None:
    with pytest.raises(NotSupported, match="rope"):
        model("lsh:chunk=8", position=position)


def test_scaled_divides_scores_by_the_root_of_the_width() -> None:
    """Which is the same as shorter queries, since keys have length 1 anyway."""
    qk, value, number = drawn(37, 2, 4)
    for attend in (hashed_attention, newest_attention):
        plain = attend(qk / 8**0.5, value, number, Lsh(chunk=8), True, None, 0.0)
        scaled = attend(qk, value, number, Lsh(chunk=8, scaled=True), True, None, 0.0)
        torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-5)
