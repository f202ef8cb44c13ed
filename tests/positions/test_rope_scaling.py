"""Static RoPE scaling against published numbers, against transformers' own functions, and on the models themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import dense
import tiny
from longspan.apply import apply
from longspan.core.facts import RopeFacts, facts_of, rotary_modules
from longspan.core.method import parse
from longspan.hf.site import remove
from longspan.positions.rope_scaling import (
    Llama3,
    LongRoPE,
    NTKAware,
    NTKByParts,
    PositionInterpolation,
    RopeScaling,
    YaRN,
    plain_frequencies,
)
from longspan.util.errors import NotSupported, SpecError

LLAMA2 = RopeFacts(theta=1e4, dim=128, type="default", window=4096, per_layer_type=False)
LLAMA3 = RopeFacts(theta=5e5, dim=128, type="default", window=8192, per_layer_type=False)


@pytest.fixture
def factors(tmp_path: Path) -> Path:
    """LongRoPE factors for eight rotated pairs."""
    path = tmp_path / "factors.json"
    path.write_text(json.dumps({"long_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 3.0, 4.0, 4.0]}))
    return path


def every_method(factor: float, factors: Path) -> list[RopeScaling]:
    return [
        PositionInterpolation(factor),
        NTKAware(factor),
        NTKByParts(factor),
        YaRN(factor),
        YaRN(factor, ramp="paper"),
        Llama3(factor),
        LongRoPE(factor, factors=str(factors)),
    ]


# Against published numbers.


@pytest.mark.parametrize(("factor", "base"), [(2, 20221.26), (4, 40889.94), (8, 82684.62), (16, 167198.74)])
def test_ntk_base(factor: float, base: float) -> None:
    assert NTKAware(factor).theta(LLAMA2) == pytest.approx(base, abs=0.005)


def test_ntk_keeps_the_first_pair_and_divides_the_last() -> None:
    ratio = plain_frequencies(LLAMA2) / NTKAware(8).frequencies(LLAMA2)
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(8) and (np.diff(ratio) > 0).all()


@pytest.mark.parametrize(
    ("pair", "plain", "code", "paper"),
    [
        (20, 0.0562341, 0.0562341, 0.0562341),
        (25, 0.0273842, 0.0224471, 0.0156673),
        (30, 0.0133352, 0.00852684, 0.00393599),
        (40, 0.00316228, 0.000881789, 0.000299156),
        (45, 0.00153993, 0.000151772, 0.0000964259),
        (46, 0.00133352, 0.0000833451, 0.0000833451),
    ],
)
def test_yarn_in_both_forms(pair: int, plain: float, code: float, paper: float) -> None:
    assert plain_frequencies(LLAMA2)[pair] == pytest.approx(plain, rel=1e-5)
    assert YaRN(16).frequencies(LLAMA2)[pair] == pytest.approx(code, rel=1e-5)
    assert YaRN(16, ramp="paper").frequencies(LLAMA2)[pair] == pytest.approx(paper, rel=1e-5)
    assert NTKByParts(16).frequencies(LLAMA2)[pair] == pytest.approx(paper, rel=1e-5)


@pytest.mark.parametrize(
    ("factor", "scale"), [(1, 1), (2, 1.069315), (4, 1.138629), (8, 1.207944), (16, 1.277259), (32, 1.346574)]
)
def test_yarn_temperature(factor: float, scale: float) -> None:
    assert YaRN(factor).attention_factor(LLAMA2) == pytest.approx(scale, abs=1e-6)


@pytest.mark.parametrize(
    ("pair", "value"), [(28, 0.00321145), (29, 0.00216657), (30, 0.00137189), (32, 0.000524846), (34, 0.000178508)]
)
def test_llama3(pair: int, value: float) -> None:
    assert Llama3(8).frequencies(LLAMA3)[pair] == pytest.approx(value, rel=1e-5)


def test_llama3_ends() -> None:
    theta, new = plain_frequencies(LLAMA3), Llama3(8).frequencies(LLAMA3)
    assert (new[:29] == theta[:29]).all()
    np.testing.assert_allclose(new[35:], theta[35:] / 8, rtol=1e-15)


def test_llama3_is_ntk_by_parts_with_other_bounds() -> None:
    np.testing.assert_allclose(
        Llama3(8).frequencies(LLAMA3), NTKByParts(8, slow=1, fast=4).frequencies(LLAMA3), rtol=1e-15
    )


@pytest.mark.parametrize(
    ("factor", "window", "scale"), [(8, 4096, 1.118034), (32, 4096, 1.190238), (32, 2048, 1.206045), (1, 4096, 1)]
)
def test_longrope_attention_factor(factor: float, window: int, scale: float, factors: Path) -> None:
    rope = RopeFacts(1e4, 16, "default", window, False)
    assert LongRoPE(factor, factors=str(factors)).attention_factor(rope) == pytest.approx(scale, abs=1e-6)


# Against transformers' own functions.


def config_for(rope: RopeFacts, parameters: dict) -> LlamaConfig:
    heads = {"hidden_size": rope.dim * 2, "num_attention_heads": 2, "head_dim": rope.dim}
    return LlamaConfig(
        **heads,
        max_position_embeddings=rope.window,
        original_max_position_embeddings=rope.window,
        rope_parameters={"rope_theta": rope.theta, **parameters},
    )


@pytest.mark.parametrize("rope", [LLAMA2, LLAMA3], ids=["llama2", "llama3"])
@pytest.mark.parametrize("factor", [1.5, 4, 32])
@pytest.mark.parametrize("method", [PositionInterpolation, YaRN, Llama3])
def test_frequencies_equal_transformers(method: type[RopeScaling], factor: float, rope: RopeFacts) -> None:
    ours = method(factor)
    parameters = ours.rope_parameters(rope)
    theirs, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config_for(rope, parameters), None)
    np.testing.assert_allclose(theirs.double().numpy(), ours.frequencies(rope), rtol=2e-6)
    assert scale == pytest.approx(ours.attention_factor(rope), rel=1e-7)


def test_yarn_temperature_is_transformers_default() -> None:
    parameters = YaRN(8).rope_parameters(LLAMA2)
    del parameters["attention_factor"]
    _, scale = ROPE_INIT_FUNCTIONS["yarn"](config_for(LLAMA2, parameters), None)
    assert scale == pytest.approx(YaRN(8).attention_factor(LLAMA2), rel=1e-7)


@pytest.mark.parametrize("length", [100, 20_000])
def test_longrope_equals_transformers_at_any_length(length: int, factors: Path) -> None:
    rope = RopeFacts(1e4, 16, "default", 4096, False)
    ours = LongRoPE(8, factors=str(factors))
    parameters = ours.rope_parameters(rope)
    theirs, scale = ROPE_INIT_FUNCTIONS["longrope"](config_for(rope, parameters), None, seq_len=length)
    np.testing.assert_allclose(theirs.double().numpy(), ours.frequencies(rope), rtol=2e-6)
    del parameters["attention_factor"]
    _, default = ROPE_INIT_FUNCTIONS["longrope"](config_for(rope, parameters), None)
    assert scale == pytest.approx(ours.attention_factor(rope), rel=1e-7)
    assert default == pytest.approx(scale, rel=1e-7)


# On the models.


def small(model_type: str, **settings: object) -> PreTrainedModel:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**sizes, **settings})).eval()


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {"head_dim": 16}),
        ("llama", {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        ("phi", {"partial_rotary_factor": 0.5}),
        ("phi3", {"num_attention_heads": 4, "original_max_position_embeddings": 64}),
        ("stablelm", {"partial_rotary_factor": 0.5}),
        ("glm4", {"head_dim": 32}),
        ("gpt_neox", {"rotary_pct": 0.5}),
    ],
)
def test_the_model_turns_by_these_frequencies(model_type: str, settings: dict, factors: Path) -> None:
    model = small(model_type, **settings)
    facts = facts_of(model)
    assert facts.rope is not None and facts.rope.dim == 16
    for method in every_method(4.0, factors):
        apply(model, method)
        [(_, rotary)] = rotary_modules(model)
        np.testing.assert_allclose(rotary.inv_freq.double(), method.frequencies(facts.rope), rtol=3e-6)
        assert rotary.attention_scaling == pytest.approx(method.attention_factor(facts.rope), rel=1e-7)
        assert model.config.max_position_embeddings == 256
        cos, sin = rotary(torch.zeros(1), torch.tensor([[0, 1, 150]]))
        angles = np.outer([0, 1, 150], method.frequencies(facts.rope))
        scale = method.attention_factor(facts.rope)
        np.testing.assert_allclose(cos[0, :, :8], scale * np.cos(angles), atol=1e-4)
        np.testing.assert_allclose(sin[0, :, :8], scale * np.sin(angles), atol=1e-4)
        remove(model)
        np.testing.assert_allclose(
            rotary_modules(model)[0][1].inv_freq.double(), plain_frequencies(facts.rope), rtol=1e-6
        )


def test_only_full_attention_layers_of_gemma3_are_scaled() -> None:
    config = Gemma3TextConfig(
        **tiny.sizes(64, 32, 32, 2, 2, 1),
        head_dim=16,
        max_position_embeddings=64,
        layer_types=["sliding_attention", "full_attention"],
    )
    model = AutoModelForCausalLM.from_config(config)
    facts = facts_of(model)
    [(_, before)] = rotary_modules(model)
    apply(model, "ntk:factor=4")
    [(_, after)] = rotary_modules(model)
    assert torch.equal(before.sliding_attention_inv_freq, after.sliding_attention_inv_freq)
    np.testing.assert_allclose(after.full_attention_inv_freq.double(), NTKAware(4).frequencies(facts.rope), rtol=1e-6)
    assert facts.rope.theta == 1e6


def test_factor_one_changes_nothing(tmp_path: Path) -> None:
    ones = tmp_path / "ones.json"
    ones.write_text(json.dumps([1.0] * 64))
    for method in every_method(1.0, ones):
        np.testing.assert_allclose(method.frequencies(LLAMA2), plain_frequencies(LLAMA2), rtol=1e-15)
        assert method.attention_factor(LLAMA2) == 1 and method.neutral_length() == 2**31


def test_interpolated_positions_are_the_trained_ones() -> None:
    """PI by s at positions s·k is plain RoPE at k."""
    model, ids = dense.llama(), dense.tokens(1, 20)
    with torch.no_grad():
        plain = model(ids).logits
        apply(model, "pi:factor=3")
        stretched = model(ids, position_ids=3 * torch.arange(20)[None], attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(stretched, plain, rtol=0, atol=1e-5)


# Settings from a target length, and refusals.


def facts(**settings: object) -> object:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 32,
    }
    return facts_of(LlamaConfig(**{**sizes, "max_position_embeddings": 1000, **settings}))


@pytest.mark.parametrize(
    ("spec", "length", "resolved", "reach"),
    [
        ("yarn", 4000, "yarn:factor=4", 4000),
        ("yarn", 4001, "yarn:factor=4.25", 4250),
        ("yarn", 500, "yarn:factor=1", 1000),
        ("pi", 1500, "pi:factor=1.5", 1500),
        ("ntk", 4000, "ntk:factor=8", 4000),
        ("ntk", 900, "ntk:factor=1", 1000),
        ("yarn:factor=3", 9000, "yarn:factor=3", 3000),
        ("llama3:high=5", 2000, "llama3:factor=2,high=5", 2000),
    ],
)
def test_factor_from_a_target_length(spec: str, length: int, resolved: str, reach: int) -> None:
    method = parse(spec).resolve(facts(), length)
    assert method.spec == resolved
    assert method.reach(facts()) == reach


def test_neither_factor_nor_length() -> None:
    with pytest.raises(SpecError, match=r"yarn needs factor=… or a target length, for example yarn:factor=4"):
        parse("yarn").resolve(facts(), None)


@pytest.mark.parametrize("spec", ["pi:factor=2", "ntk:factor=2", "yarn:factor=2", "llama3:factor=2"])
def test_scaled_checkpoints_are_refused(spec: str) -> None:
    scaled = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1000}
    with pytest.raises(NotSupported, match=r"scaled already \(yarn, window 4,000\).*use none, or streaming"):
        parse(spec).resolve(facts(rope_parameters=scaled, max_position_embeddings=4000), None)


@pytest.mark.parametrize(
    "spec",
    [
        "yarn:factor=0.5",
        "yarn:factor=5000",
        "yarn:factor=2,slow=3,fast=2",
        "yarn:factor=2,slow=0",
        "llama3:factor=2,low=4,high=1",
        "ntk-by-parts:fast=1",
        "longrope:factor=2",
        "longrope:factor=2,factors=/no/such/file.json",
    ],
)
def test_impossible_settings(spec: str) -> None:
    with pytest.raises(SpecError, match=spec.partition(":")[0]):
        parse(spec)


@pytest.mark.parametrize(
    "text", ["[]", "[1, 2", '{"short_factor": [1]}', '["a"]', "[0.5, 1]", "[1e999]", "3", "[null]"]
)
def test_unusable_longrope_files(text: str, tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(SpecError, match="longrope"):
        parse(f"longrope:factors={tmp_path / 'f.json'}")


def test_longrope_factors_of_another_model(factors: Path) -> None:
    wide = facts(hidden_size=128, num_attention_heads=2)
    with pytest.raises(NotSupported, match="8 factors, and LlamaForCausalLM rotates 32 pairs"):
        parse(f"longrope:factor=2,factors={factors}").resolve(wide, None)


def test_frequencies_fall_along_the_head(factors: Path) -> None:
    """No rule turns two pairs round: a slower pair stays the slower one, and none turns faster than before."""
    rope = RopeFacts(1e4, 16, "default", 4096, False)
    for method in every_method(6.0, factors):
        new = method.frequencies(rope)
        assert (np.diff(new) < 0).all() and (new <= plain_frequencies(rope) * (1 + 1e-12)).all()
        assert new[-1] >= plain_frequencies(rope)[-1] / 6 * (1 - 1e-12)
