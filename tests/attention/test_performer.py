"""Performer: the features and their estimate, attention by them against its formula, redraws, the swap on trained models."""

from __future__ import annotations

import copy
import itertools
import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

import dense
import longspan
import tiny
from longspan.apply import applied, apply
from longspan.attention.performer import Performer, PerformerAttention
from longspan.attention.random_features import Draw, Errors, RandomFeatures, draw_errors, errors
from longspan.core.method import parse
from longspan.engine.linear import attention as linear
from longspan.engine.linear.attention import bidirectional, causal
from longspan.hf.site import remove
from longspan.lm import LongspanConfig, LongspanForCausalLM
from longspan.util.errors import NotSupported, SpecError
from shared_model import gradients
from ties import UndefinedAtTies

SCRIPT = Path(__file__).parents[2] / "reproductions" / "performer_error.py"
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def config(**settings: Any) -> LongspanConfig:
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LongspanConfig(**{**sizes, "num_key_value_heads": 2, "attention": "performer:features=24", **settings})


def by_formula(q: Tensor, k: Tensor, v: Tensor, w: Tensor, scale: float, kind: str, *, tril: bool) -> Tensor:
    """All pairs of features at once, by the paper's formula as it stands: m^{-1/2} e^{W x̃ - |x̃|²/2}, or relu(W x̃) + 0.001."""

    def phi(x: Tensor) -> Tensor:
        x = x * scale**0.5
        if kind == "relu":
            return (x @ w.T).clamp(min=0) + 0.001
        return (x @ w.T - (x * x).sum(-1, keepdim=True) / 2).exp() / len(w) ** 0.5

    groups = q.shape[1] // k.shape[1]
    weights = phi(q) @ phi(k).repeat_interleave(groups, dim=1).mT
    if tril:
        weights = weights.tril()
    return (weights / weights.sum(-1, keepdim=True)) @ v.repeat_interleave(groups, dim=1)


class TestFeatures:
    @pytest.mark.parametrize("features", [16, 40])
    def test_rows_are_orthogonal_in_blocks(self, features: int) -> None:
        for norms in ("chi", "sqrt"):
            w = Draw(features, norms=norms).matrix(16, 1, 2)
            for block in w.split(16):
                products = block @ block.T
                assert (products - products.diagonal().diag()).abs().max() < 1e-4
        torch.testing.assert_close(w.norm(dim=-1), torch.full((features,), 4.0))

    def test_rows_are_normal_vectors(self) -> None:
        """Every entry normal, though rows are orthogonal: mean, variance, fourth moment, and the chi norms' mean."""
        for orthogonal in (True, False):
            w = torch.cat([Draw(16, orthogonal).matrix(16, n) for n in range(2000)])
            chi = math.sqrt(2) * math.exp(math.lgamma(8.5) - math.lgamma(8))
            assert abs(w.norm(dim=-1).mean().item() - chi) < 0.02
            for power, moment in ((1, 0), (2, 1), (4, 3)):
                assert (w.pow(power).mean(0) - moment).abs().max() < (0.03, 0.05, 0.3)[power // 2]

    def test_relu_features_have_no_slope_at_zero(self) -> None:
        """The embedding of a padding token is zero, so its projections are: a tie that does occur."""
        features = RandomFeatures(Draw(8), 4, 1, kernel="relu")
        x = torch.stack((torch.zeros(4), torch.ones(4))).requires_grad_()
        with UndefinedAtTies():
            (slope,) = torch.autograd.grad(features(x, scale=1.0).sum(), x)
        w = features.projection
        torch.testing.assert_close(slope, torch.stack((torch.zeros(4), w[w.sum(-1) > 0].sum(0))))

    @pytest.mark.parametrize("orthogonal", [True, False])
    def test_estimate_is_unbiased(self, orthogonal: bool) -> None:
        """The mean over 4,000 draws lies within four standard errors of e^{scale q·k}."""
        draw = torch.Generator().manual_seed(2)
        q, k = torch.randn(2, 6, 16, generator=draw, dtype=torch.float64)
        scale = 16**-0.5
        found = []
        for n in range(4000):
            random = RandomFeatures(Draw(24, orthogonal), 16, n).double()
            found.append((random(q, scale=scale) + random(k, scale=scale)).exp().sum(-1))
        means = torch.stack(found)
        off = (means.mean(0) - ((q * k).sum(-1) * scale).exp()) / (means.std(0) / 4000**0.5)
        assert off.abs().max() < 4, off

    def test_same_seed_same_features(self) -> None:
        first = Performer(features=20, seed=3).random_features(8, 1).projection
        assert torch.equal(first, Performer(features=20, seed=3).random_features(8, 1).projection)
        for other in (
            Performer(features=20, seed=4).random_features(8, 1),
            Performer(20, seed=3).random_features(8, 2),
        ):
            assert not torch.allclose(first, other.projection)
        torch.manual_seed(99)
        before = torch.get_rng_state()
        Performer().random_features(8, 0)
        assert torch.equal(torch.get_rng_state(), before)


class TestError:
    def test_falls_with_features_and_is_compared_with_equal_weights(self, tmp_path: Path) -> None:
        near = errors((16, 64, 256, 1024), std=0.25, length=512, draws=6)
        independent = errors((16, 64, 256, 1024), std=0.25, length=512, draws=6, orthogonal=False)
        for before, after in itertools.pairwise(near.mean):
            assert 0.3 < after / before < 0.7  # half for four times as many: the square of the error falls like 1 / m
        assert all(o < i for o, i in zip(near.mean, independent.mean, strict=True))
        assert near.mean[0] > near.equal_weights > near.mean[-1]
        far = errors((256,), std=1.0, length=512, draws=2)
        assert far.mean[0] > far.equal_weights  # of no use at the size that trained queries and keys have
        draw_errors([near, independent, far], tmp_path / "errors.png")
        assert (tmp_path / "errors.png").read_bytes()[:4] == b"\x89PNG"

    def test_stored_curves_are_what_the_script_judges(self, tmp_path: Path) -> None:
        script = runpy.run_path(str(SCRIPT))
        said = script["main"](["--out", str(tmp_path), "--length", "256", "--draws", "2"])
        assert len(said) == 5 and not said["std 1: 256 features beat equal weights"]
        stored = json.loads((SCRIPT.with_suffix("") / "errors.json").read_text())
        assert script["judge"]([Errors(**curve) for curve in stored["curves"]]) == stored["judged"]

    def test_is_that_of_its_formula(self) -> None:
        draw = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, 1, 64, 8, generator=draw).double() for _ in range(3))
        q, k = q * 0.5, k * 0.5
        w = Draw(32).matrix(8, 0, 0).double()
        made, exact = by_formula(q, k, v, w, 8**-0.5, "softmax", tril=False), (q @ k.mT / 8**0.5).softmax(-1) @ v
        wanted = ((made - exact).norm() / exact.norm()).item()
        assert errors((32,), std=0.5, width=8, length=64, draws=1).mean[0] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("kind", ["softmax", "relu"])
class TestAttention:
    def given(self, std: float = 1.0) -> list[Tensor]:
        draw = torch.Generator().manual_seed(4)
        return [(torch.randn(2, h, 150, 16, generator=draw).double() * std).requires_grad_() for h in (4, 2, 2)]

    @pytest.mark.parametrize("causally", [True, False])
    def test_is_its_formula(self, kind: Any, causally: bool) -> None:
        given, random = self.given(), RandomFeatures(Draw(40), 16, 7, kernel=kind).double()
        kernel = random.kernel(0.3)
        got = causal(*given, kernel)[0] if causally else bidirectional(*given, kernel)
        wanted = by_formula(*given, random.projection, 0.3, kind, tril=causally)
        torch.testing.assert_close(got, wanted, **EXACT)
        pull = torch.randn_like(got)
        ours = torch.autograd.grad((got * pull).sum(), given)
        torch.testing.assert_close(ours, torch.autograd.grad((wanted * pull).sum(), given), **EXACT)
        if causally:
            state, parts = None, []
            for t in range(150):
                part, state = causal(*(x[:, :, t : t + 1] for x in given), kernel, state)
                parts.append(part)
            torch.testing.assert_close(torch.cat(parts, dim=2), wanted, **EXACT)

    def test_great_queries_and_keys_do_not_fall_back_to_equal_weights(self, kind: Any) -> None:
        """Where the authors' 1e-6 drowns every feature (std 3): float32 still is the formula, and far from the mean of values."""
        given, random = self.given(3.0), RandomFeatures(Draw(40), 16, 7, kernel=kind)
        got, _ = causal(*(x.float() for x in given), random.kernel(0.25))
        wanted = by_formula(*given, random.projection.double(), 0.25, kind, tril=True)
        torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-3)
        means = given[2].cumsum(2) / torch.arange(1, 151)[:, None]
        if kind == "softmax":
            assert (wanted - means.repeat_interleave(2, dim=1)).norm() > 0.5 * wanted.norm()

    def test_no_bit_of_the_future(self, kind: Any) -> None:
        """The last key six times as long changes nothing before it; with the authors' stabiliser it moved outputs by 87 %."""
        q, k, v = (x.float() for x in self.given())
        kernel = RandomFeatures(Draw(40), 16, 7, kernel=kind).kernel(0.25)
        last = torch.arange(150)[:, None] == 149
        before, after = causal(q, k, v, kernel)[0], causal(q, torch.where(last, 6 * k, k), v, kernel)[0]
        assert torch.equal(before[:, :, :149], after[:, :, :149])
        assert not torch.equal(before[:, :, 149], after[:, :, 149])


class TestModel:
    def projections(self, model: torch.nn.Module) -> list[Tensor]:
        return [m.features.projection.clone() for m in model.modules() if isinstance(m, PerformerAttention)]

    def step(self, model: LongspanForCausalLM, times: int = 1) -> None:
        ids = torch.randint(2, 96, (2, 20))
        for _ in range(times):
            model(ids, labels=ids, use_cache=False).loss.backward()

    def test_layers_have_features_of_their_own(self) -> None:
        first, second = self.projections(LongspanForCausalLM(config()))
        assert first.shape == (24, 16) and not torch.allclose(first, second)

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_redraws_every_so_many_steps_of_training_only(self, checkpointing: bool) -> None:
        model = LongspanForCausalLM(config(attention="performer:features=24,redraw=3"))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        start = self.projections(model)
        self.step(model.train(), 3)
        assert all(map(torch.equal, start, self.projections(model)))
        model.eval()(torch.randint(2, 96, (1, 9)))
        with torch.no_grad():
            model.train()(torch.randint(2, 96, (1, 9)))
        assert all(map(torch.equal, start, self.projections(model)))
        self.step(model.train())
        second = self.projections(model)
        assert not any(map(torch.equal, start, second))
        wanted = Draw(24).matrix(16, 0, 1, 1)  # seed, layer, number of the draw
        assert torch.equal(second[1], wanted)

    def test_two_settings_count_for_themselves(self) -> None:
        model = LongspanForCausalLM(config(attention=["performer:features=24,redraw=2", "performer:redraw=5"])).train()
        first, second = self.projections(model)
        self.step(model, 3)
        after = self.projections(model)
        assert not torch.equal(first, after[0]) and torch.equal(second, after[1])

    def test_a_saved_model_goes_on_where_it_was(self, tmp_path: Path) -> None:
        model = LongspanForCausalLM(config(attention="performer:features=24,redraw=2")).train()
        self.step(model, 3)
        model.save_pretrained(tmp_path)
        again, info = LongspanForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert all(map(torch.equal, self.projections(model), self.projections(again)))
        for one in (model, again.train()):
            self.step(one, 2)
        assert all(map(torch.equal, self.projections(model), self.projections(again)))
        assert not torch.equal(self.projections(again)[0], Draw(24).matrix(16, 0, 0, 1))

    def test_a_copy_has_its_own(self) -> None:
        model = LongspanForCausalLM(config(attention="performer:features=24,redraw=1")).train()
        twin, before = copy.deepcopy(model), self.projections(model)
        self.step(twin, 2)
        assert all(map(torch.equal, before, self.projections(model)))
        assert not torch.equal(before[0], self.projections(twin)[0])

    def test_segments_that_run_again_after_another_forward(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A long text's features are made again in the backward pass, when the next forward has drawn others."""
        model = LongspanForCausalLM(config(attention="performer:features=8,redraw=1")).train()
        state, texts = copy.deepcopy(model.state_dict()), [torch.randint(2, 90, (1, n)) for n in (40, 50)]
        found = []
        for segment in (1024, 16):
            monkeypatch.setattr(linear, "SEGMENT", segment)
            model.load_state_dict(state)
            found.append(gradients(model, [lambda ids=ids: model(ids, labels=ids).loss for ids in texts]))
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)

    def test_weights_of_softmax_attention_are_taken(self, tmp_path: Path) -> None:
        """A checkpoint without random features: they are drawn from the seed."""
        LongspanForCausalLM(config(attention="full")).save_pretrained(tmp_path)
        model = LongspanForCausalLM.from_pretrained(tmp_path, config=config(attention="performer:features=24,redraw=2"))
        assert torch.equal(self.projections(model)[1], Draw(24).matrix(16, 0, 1, 0))
        assert all(m.features.steps == 0 for m in model.modules() if isinstance(m, PerformerAttention))

    def test_settings_that_cannot_be(self) -> None:
        for spec in ("performer:features=0", "performer:redraw=-1", "performer:kernel=cos", "performer:seed=-1"):
            with pytest.raises(SpecError, match="performer"):
                parse(spec)


class TestSwap:
    """On a trained model: every query's attention by the formula, with features drawn from the seed for each layer."""

    METHOD = "performer:features=48"

    def logits(self, model: Any, ids: Tensor) -> Tensor:
        """Of `ids` (B, T) by the formula, every layer written out."""
        x = model.model.embed_tokens(ids)
        angles = torch.arange(ids.shape[1], dtype=torch.float64)[:, None] * dense.frequencies(model)

        def turned(y: Tensor) -> Tensor:
            a, b = y.chunk(2, dim=-1)
            return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=-1)

        for number, layer in enumerate(model.model.layers):
            attention, normed = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (
                p(normed).unflatten(-1, (-1, 12)).transpose(1, 2)
                for p in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            w = Draw(48).matrix(12, 0, number, 0).double()
            out = by_formula(turned(q), turned(k), v, w, 12**-0.5, "softmax", tril=True)
            x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return model.lm_head(model.model.norm(x))

    def test_is_the_formula_in_one_piece_in_chunks_and_token_by_token(self) -> None:
        model, ids = dense.llama(layers=2), dense.tokens(2, 30)
        plain = model(ids).logits
        with torch.no_grad(), applied(model, self.METHOD):
            wanted = self.logits(model, ids)
            close = {"rtol": 1e-4, "atol": 1e-4}  # angles are float32
            torch.testing.assert_close(model(ids).logits, wanted, **close)
            assert not torch.allclose(plain, wanted, atol=0.1)
            cache, parts = DynamicCache(), []
            for begin, end in ((0, 13), (13, 22), *((t, t + 1) for t in range(22, 30))):
                parts.append(model(ids[:, begin:end], past_key_values=cache).logits)
            torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, rtol=1e-8, atol=1e-8)
        assert torch.equal(model(ids).logits, plain)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_is_not_there(self, side: str) -> None:
        model, ids, mask = dense.llama(layers=2), dense.tokens(2, 24), torch.ones(2, 24, dtype=torch.long)
        inside = slice(7, None) if side == "left" else slice(None, 17)
        mask[0] = 0
        mask[0, inside] = 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad(), applied(model, self.METHOD):
            got = model(ids, attention_mask=mask, position_ids=positions).logits
            torch.testing.assert_close(got[:1, inside], model(ids[:1, inside]).logits, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(got[1:], model(ids[1:]).logits, rtol=1e-6, atol=1e-6)
            if side == "left":
                made = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
                alone = model.generate(ids[:1, inside], max_new_tokens=6, do_sample=False)
                assert torch.equal(made[0, 7:], alone[0])

    def test_is_trained_back_towards_the_model(self) -> None:
        """What fine-tuning starts from: gradients in every weight, and a step along them lowers the loss."""
        model, ids = tiny.model(), torch.randint(2, 264, (4, 40))
        apply(model, "performer:features=32")
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-3), []
        for _ in range(8):
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.3
        remove(model)

    def test_a_saved_model_has_the_same_features(self, tmp_path: Path) -> None:
        folder = tiny.folder(tmp_path / "base")
        model, tokenizer = longspan.load(str(folder))
        apply(model, "performer:features=32,seed=5")
        ids = torch.randint(2, 264, (1, 20))
        model.save_pretrained(tmp_path / "tuned")
        tokenizer.save_pretrained(tmp_path / "tuned")
        again, _ = longspan.load(str(tmp_path / "tuned"))
        with torch.no_grad():
            torch.testing.assert_close(again.eval()(ids).logits, model.eval()(ids).logits)

    def test_other_frequencies_go_with_it(self) -> None:
        model, ids = dense.llama(), dense.tokens(1, 20)
        with torch.no_grad():
            with applied(model, self.METHOD):
                alone = model(ids).logits
            with applied(model, f"ntk:factor=4 + {self.METHOD}"):
                assert not torch.allclose(model(ids).logits, alone)

    def test_refusals_say_why(self) -> None:
        model, ids = dense.llama(), dense.tokens(1, 8)
        with pytest.raises(NotSupported, match="redraw"):
            apply(model, "performer:redraw=100")
        with pytest.raises(NotSupported, match="attention"):
            apply(model, f"{self.METHOD} + window:size=4")
        with applied(model, self.METHOD):
            with pytest.raises(NotSupported, match="padding"):
                model(ids, attention_mask=torch.ones(1, 1, 8, 8, dtype=torch.bool))
            with pytest.raises(NotSupported, match="pack several texts"):
                model(ids, position_ids=torch.arange(4).repeat(2)[None])
        small = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
        small |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
        with pytest.raises(NotSupported, match="window"):
            apply(MistralForCausalLM(MistralConfig(**small, sliding_window=4)), self.METHOD)
        capped = Gemma2Config(**small, layer_types=["full_attention"] * 2)
        with pytest.raises(NotSupported, match="caps its scores"):
            apply(Gemma2ForCausalLM(capped), self.METHOD)
        model.config.attention_dropout = model.model.layers[0].self_attn.attention_dropout = 0.1
        with applied(model, self.METHOD), pytest.raises(NotSupported, match="dropout"):
            model.train()(ids)
        for settings, says in (
            ({"attention": "full", "position": "alibi"}, "short input"),
            ({"attention": "window:size=9"}, "pattern"),
        ):
            with pytest.raises(NotSupported, match=says):
                apply(LongspanForCausalLM(config(**settings)), self.METHOD)
