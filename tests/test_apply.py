"""Putting methods on a model and taking them off: what is refused is left untouched, and nothing stays behind."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForQuestionAnswering,
    FalconConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import dense
import odd_attention
from longspan.apply import applied, apply
from longspan.core.method import Method
from longspan.engine.core import attention
from longspan.hf import compat
from longspan.hf.call import LayerCall
from longspan.hf.site import Site, current, remove
from longspan.util.errors import LongspanError, NotSupported, SpecError

OWN_DISTANCES = ["dynamic-ntk", "self-extend:group=2,window=4", "rerope:window=4", "streaming:sinks=2,window=6"]
EVERY_KIND = ["yarn:factor=2", *OWN_DISTANCES, "bca:size=6", "logn:window=6"]


@pytest.fixture
def model() -> LlamaForCausalLM:
    return dense.llama(layers=2)


@pytest.fixture
def untouched(model: LlamaForCausalLM) -> Iterator[Callable[[], None]]:
    """A check that the model is what it was: outputs, configuration, modules, hooks and attributes."""
    ids = dense.tokens(2, 40)

    def state() -> tuple:
        modules = {name: (id(m), type(m), set(vars(m)), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
        tensors = {name: id(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}
        return model.config.to_dict(), model.config._attn_implementation, modules, tensors, model.training

    before, logits = state(), model(ids).logits

    def check() -> None:
        assert state() == before
        assert torch.equal(model(ids).logits, logits)
        assert current(model) is None and not hasattr(model.config, "longspan")

    yield check
    check()


# On and off.


@pytest.mark.parametrize("spec", [*EVERY_KIND, "ntk:factor=4 + streaming:sinks=2,window=6", "none"])
def test_nothing_stays(model: LlamaForCausalLM, untouched: Callable[[], None], spec: str) -> None:
    for training in (False, True):
        model.train(training)
        assert apply(model, spec) is model
        assert model.training is training and all(m.training is training for m in model.modules())
        assert model.config.longspan == {"method": current(model).spec}
        model.generate(dense.tokens(1, 12), max_new_tokens=4, do_sample=False, pad_token_id=0)
        remove(model)
        model.eval()
        untouched()
    remove(model)


def test_one_method_takes_the_place_of_another(model: LlamaForCausalLM, untouched: Callable[[], None]) -> None:
    ids = dense.tokens(1, 40)
    for spec in (*EVERY_KIND, *reversed(EVERY_KIND)):
        fresh = apply(dense.llama(layers=2), spec)
        apply(model, spec)
        assert torch.equal(model(ids).logits, fresh(ids).logits)
    remove(model)


def test_settings_follow_from_a_length(model: LlamaForCausalLM, untouched: Callable[[], None]) -> None:
    apply(model, "yarn", length=128)
    assert current(model).spec == "yarn:factor=4"
    assert model.config.max_position_embeddings == 128 and model.config.rope_parameters["rope_theta"] == 1e4
    with pytest.raises(SpecError, match="needs factor"):
        apply(model, "pi")
    assert current(model).spec == "yarn:factor=4"
    remove(model)


def test_applied(model: LlamaForCausalLM, untouched: Callable[[], None]) -> None:
    """Blocks in one another; each end brings back what was before it, after errors too."""
    ids = dense.tokens(1, 40)
    with applied(model, "yarn:factor=2") as same:
        assert same is model
        yarn = model(ids).logits
        with applied(model, "streaming:sinks=2,window=6"):
            assert current(model).spec == "streaming:sinks=2,window=6"
            apply(model, "ntk:factor=2")  # what happens within the block ends with it
        assert current(model).spec == "yarn:factor=2" and torch.equal(model(ids).logits, yarn)
        with pytest.raises(KeyError), applied(model, "dynamic-ntk"):
            raise KeyError
        with pytest.raises(NotSupported), applied(model, "self-extend:group=2,window=400"):
            pass
        assert current(model).spec == "yarn:factor=2" and torch.equal(model(ids).logits, yarn)
    untouched()


def test_a_method_on_a_saved_one(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """What a checkpoint says of itself comes back when the method on top of it goes."""
    apply(model, "ntk:factor=4").save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    apply(loaded, "streaming:sinks=2,window=6")
    assert loaded.config.longspan == {"method": "streaming:sinks=2,window=6"}
    remove(loaded)
    assert loaded.config.longspan == {"method": "ntk:factor=4"} and current(loaded) is None


def test_the_decoder_takes_its_arguments_in_any_form(model: LlamaForCausalLM) -> None:
    ids, mask = dense.tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    for spec in EVERY_KIND:
        apply(model, spec)
        by_name = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        assert torch.equal(model.model(ids, mask).last_hidden_state, by_name)
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask).logits
        torch.testing.assert_close(embedded, model(ids, attention_mask=mask).logits)


@pytest.mark.parametrize("spec", EVERY_KIND)
def test_in_half_precision(spec: str) -> None:
    """Logits keep the model's dtype and stay near the full-precision ones; rounding alone moves a model without a method."""
    ids = dense.tokens(1, 40)
    exact = apply(dense.llama(layers=2), spec)(ids).logits
    noise = (dense.llama(layers=2).bfloat16()(ids).logits - dense.llama(layers=2)(ids).logits).norm()
    model = apply(dense.llama(layers=2).bfloat16(), spec)
    got = model(ids).logits
    cache = model(ids[:, :20]).past_key_values
    steps = torch.cat([model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(20, 40)], dim=1)
    assert got.dtype == steps.dtype == torch.bfloat16
    assert (got - exact).norm() < 2 * noise
    assert (steps - exact[:, 20:]).norm() < 2 * noise


# What cannot be done.


@pytest.mark.parametrize("spec", OWN_DISTANCES)
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (odd_attention.OddlyRotatedAttention, "rotates or attends in a way that the method does not know"),
        (odd_attention.DeafAttention, "rotates or attends in a way|called it in 0 of 2"),
        (odd_attention.FailingAttention, "does not run on LlamaForCausalLM: TypeError: unexpected implementation"),
    ],
)
def test_unknown_attention_is_refused(spec: str, kind: type, said: str) -> None:
    model = odd_attention.with_layers(dense.llama(layers=2), kind)
    ids, config = dense.tokens(1, 40), model.config.to_dict()
    before = model(ids).logits
    with pytest.raises(NotSupported, match=f"(?:{said}).*may still work: ntk, yarn"):
        apply(model, spec)
    assert torch.equal(model(ids).logits, before) and model.config.to_dict() == config
    assert current(apply(model, "yarn:factor=2")).spec == "yarn:factor=2"


@pytest.mark.parametrize("spec", ["bca:size=6", "logn:window=6"])
def test_what_rotates_nothing_runs_under_any_rotation(spec: str) -> None:
    """But not where the model asks nobody for its attention."""
    ids = dense.tokens(1, 40)
    odd = odd_attention.with_layers(dense.llama(layers=2), odd_attention.OddlyRotatedAttention)
    expected = apply(dense.llama(layers=2), spec)(ids).logits  # its layers turn as Llama's do, whatever its module says
    torch.testing.assert_close(apply(odd, spec)(ids).logits, expected)
    for kind in (odd_attention.DeafAttention, odd_attention.FailingAttention):
        with pytest.raises(NotSupported, match=r"called it in 0 of 2|does not run on LlamaForCausalLM"):
            apply(odd_attention.with_layers(dense.llama(layers=2), kind), spec)


def test_queries_are_scaled_before_any_attention(model: LlamaForCausalLM, untouched: Callable[[], None]) -> None:
    """The model's own and a method's, whichever of the two is named first."""
    ids = dense.tokens(1, 40)
    for other in ("", " + ntk:factor=2", " + self-extend:group=2,window=4", " + dynamic-ntk"):
        with applied(model, f"logn:window=6{other}"):
            got = model(ids).logits
        with applied(model, other.removeprefix(" + ") or "none"):
            assert (model(ids).logits - got)[:, -1].abs().max() > 1e-3
            torch.testing.assert_close(model(ids[:, :6]).logits, got[:, :6])
    with applied(model, "self-extend:group=2,window=4 + logn:window=6"), applied(model, "logn:window=6"):
        pass


def test_sinks_are_not_turned_by_a_rotation_that_is_not_the_models() -> None:
    """Nothing is turned in a short input, so the rotation is tried by itself."""
    model = odd_attention.with_layers(dense.llama(layers=1), odd_attention.OddlyRotatedAttention)
    with pytest.raises(NotSupported, match="rotates or attends"):
        apply(model, "streaming:sinks=4,window=28")


@dataclass(frozen=True)
class Broken(Method):
    """Fails at the end of `attach`, in the way that it is told."""

    error: str = ""

    slots: ClassVar[frozenset[str]] = frozenset({"attention"})

    def neutral_length(self) -> int:
        return 8

    def attach(self, site: Site) -> None:
        site.set_rope({"rope_type": "linear", "factor": 2.0}, 64)
        site.unrotate()
        site.attention(self.wrong)
        site.before_forward(lambda arguments: None)
        if self.error:
            raise {"key": KeyError, "stop": KeyboardInterrupt, "ours": NotSupported}[self.error]("told to")

    @staticmethod
    def wrong(call: LayerCall) -> Tensor:
        return attention(call.query, call.key, call.value, call.mask, call.scale, causal=True)


@pytest.mark.parametrize("error", ["", "key", "stop", "ours"])
@pytest.mark.parametrize("before", ["none", "ntk:factor=2", "streaming:sinks=2,window=6"])
def test_a_failure_leaves_what_was(
    model: LlamaForCausalLM, untouched: Callable[[], None], error: str, before: str
) -> None:
    ids = dense.tokens(1, 40)
    apply(model, before)
    logits = model(ids).logits
    with pytest.raises(KeyboardInterrupt if error == "stop" else NotSupported):
        apply(model, Broken(error))
    assert current(model).spec == before and torch.equal(model(ids).logits, logits)
    remove(model)


@pytest.mark.parametrize("spec", EVERY_KIND)
def test_a_copy_has_the_method_on_it(model: LlamaForCausalLM, untouched: Callable[[], None], spec: str) -> None:
    """Moving averages of weights and reference models are copies. A copy runs by itself, and comes back to the plain model."""
    ids = dense.tokens(1, 40)

    def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
        return model(ids, use_cache=False).logits

    plain = logits(model, ids)
    apply(model, spec)
    changed = logits(model, ids)
    assert not torch.equal(plain, changed)
    twin = copy.deepcopy(model)
    assert current(twin).spec == current(model).spec
    remove(model)
    assert torch.equal(logits(model, ids), plain)
    torch.testing.assert_close(logits(twin, ids), changed, rtol=0, atol=0)
    with torch.no_grad():
        twin.model.embed_tokens.weight.mul_(2)
    assert torch.equal(logits(model, ids), plain)
    assert not torch.equal(logits(twin, ids), changed)
    with torch.no_grad():
        twin.model.embed_tokens.weight.div_(2)
    remove(twin)
    assert current(twin) is None and torch.equal(logits(twin, ids), plain)


class Adapted(torch.nn.Module):
    """What PEFT's models do: they hand every attribute on, and have a mode and attributes of their own."""

    def __init__(self, inner: PreTrainedModel):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("spec", EVERY_KIND)
@pytest.mark.parametrize("around", [Adapted, lambda model: model.model], ids=["adapter", "decoder"])
def test_a_method_is_found_through_any_wrapper(
    model: LlamaForCausalLM, untouched: Callable[[], None], spec: str, around: Callable
) -> None:
    """Put on with an adapter around the model and taken off without it, or the other way round."""
    ids, other = dense.tokens(1, 40), around(model)
    expected = apply(copy.deepcopy(model), spec)(ids).logits
    for first, second in ((model, other), (other, model)):
        apply(first, "rerope:window=6")
        apply(second, spec)
        assert torch.equal(model(ids).logits, expected) and current(first).spec == current(second).spec
        remove(first)
        untouched()
        assert current(other) is None


@pytest.mark.parametrize("spec", ["focused:local=8", "landmark:block=4,retrieve=2,local=8,id=90"])
def test_the_mode_is_the_decoders(spec: str) -> None:
    """An adapter that stays in training mode when the model within it is taken out."""
    model = dense.llama(layers=2)
    adapted, ids = Adapted(model), dense.tokens(1, 25)
    apply(adapted, spec)
    expected = model(ids).logits
    adapted.training = True
    torch.testing.assert_close(model(ids).logits, expected)


def test_a_model_with_a_method_is_not_pickled(model: LlamaForCausalLM) -> None:
    apply(model, "streaming")
    with pytest.raises(NotSupported, match=r"cannot be pickled.*save_pretrained"):
        pickle.dumps(model)
    remove(model)


def test_our_attention_runs_only_on_our_models(model: LlamaForCausalLM) -> None:
    model.set_attn_implementation("longspan")
    with pytest.raises(LongspanError, match="runs only on a model that a method was applied to"):
        model(dense.tokens(1, 4))


@pytest.mark.parametrize("spec", EVERY_KIND)
def test_a_cache_of_fixed_size(model: LlamaForCausalLM, spec: str) -> None:
    """Static methods take one; methods that count from the last key refuse it instead of counting wrongly."""
    ids = dense.tokens(1, 40)

    def text(model: PreTrainedModel, **arguments: object) -> Tensor:
        return model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, **arguments)

    apply(model, spec)
    if spec.startswith("yarn"):
        assert torch.equal(text(model, cache_implementation="static"), text(model))
    else:
        with pytest.raises(NotSupported, match="use the default DynamicCache"):
            text(model, cache_implementation="static")


# What a configuration says.


def falcon(*, alibi: bool) -> PreTrainedModel:
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(
        FalconConfig(**sizes, alibi=alibi, num_kv_heads=2, eos_token_id=None)
    ).eval()


def test_a_rotary_module_that_is_never_called() -> None:
    """Falcon has one under ALiBi too; another base in it would change nothing."""
    model, ids = falcon(alibi=True), dense.tokens(1, 20)
    before, config = model(ids).logits, model.config.to_dict()
    for spec in ("yarn:factor=4", "ntk:factor=2", "llama3:factor=2"):
        with pytest.raises(NotSupported, match=r"changes nothing.*does not use it in its attention"):
            apply(model, spec)
    assert torch.equal(model(ids).logits, before) and model.config.to_dict() == config
    rotary = falcon(alibi=False)
    plain = rotary(ids).logits
    assert not torch.equal(apply(rotary, "yarn:factor=4")(ids).logits, plain)


@pytest.mark.parametrize(
    ("build", "has", "has_not"),
    [
        (lambda: falcon(alibi=True), "alibi", "rope"),
        (lambda: falcon(alibi=False), "rope", "alibi"),
        (lambda: of_type("mpt", d_model=64, n_heads=4, n_layers=2, attn_config={"alibi": True}), "alibi", "learned"),
        (lambda: of_type("mpt", d_model=64, n_heads=4, n_layers=2, attn_config={"alibi": False}), "", "alibi"),
        (lambda: of_type("bloom", hidden_size=64, n_layer=2, n_head=4), "alibi", "learned"),
        (lambda: of_type("gpt2", n_embd=64, n_layer=2, n_head=4), "learned", "alibi"),
        (lambda: dense.llama(), "rope", "alibi"),
        (lambda: of_type("longspan", hidden_size=64, num_hidden_layers=2, position="t5 + logn"), "t5", "rope"),
    ],
    ids=["falcon-alibi", "falcon", "mpt-alibi", "mpt", "bloom", "gpt2", "llama", "ours"],
)
def test_a_scheme_that_a_model_was_trained_with(build: Callable, has: str, has_not: str) -> None:
    """The reason is read off the configuration, and not off the model's type."""
    model = build()
    if has:
        with pytest.raises(NotSupported, match=f"was trained with {has} and has it already"):
            apply(model, has)
    with pytest.raises(NotSupported, match=f"was trained without it: train one .*position={has_not}"):
        apply(model, has_not)


def of_type(kind: str, **settings: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=96, **settings)).eval()


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": None, "bos_token_id": None}


def everything(model: PreTrainedModel) -> tuple:
    modules = {name: (id(m), type(m), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    tensors = [t.clone() for t in (*model.parameters(), *model.buffers())]
    return model.config.to_dict(), modules, tensors


def unchanged(model: PreTrainedModel, before: tuple) -> bool:
    config, modules, tensors = everything(model)
    return (config, modules) == before[:2] and all(map(torch.equal, tensors, before[2]))


@pytest.mark.parametrize("kind", ["mixtral", "minimax", "phimoe"])
def test_frequencies_that_transformers_cannot_make(kind: str, tmp_path: Path) -> None:
    """Its rotary module fails on a `head_dim` or an `mscale` of None, when the configuration has been changed already."""
    (tmp_path / "factors.json").write_text(json.dumps([2.0] * 8))
    more = {} if kind == "phimoe" else {"head_dim": None}
    model = of_type(kind, **SMALL, num_local_experts=2, **more)
    ids, before = dense.tokens(1, 20), everything(model)
    logits = model(ids, use_cache=False).logits
    for spec in ("yarn:factor=2", f"longrope:factor=2,factors={tmp_path}/factors.json"):
        with pytest.raises(NotSupported, match=r"does not run on .*TypeError"):
            apply(model, spec)
        assert unchanged(model, before) and torch.equal(model(ids, use_cache=False).logits, logits)
    apply(model, "ntk:factor=2")  # has a name in the configuration, and runs
    remove(model)
    assert unchanged(model, before)


def test_a_cache_of_the_models_own_kind() -> None:
    """MiniMax makes one that no other may stand in for; it knows the method that filled it."""
    model, ids = of_type("minimax", **SMALL, num_local_experts=2, head_dim=None), dense.tokens(1, 20)
    apply(model, "ntk:factor=2")
    whole = model(ids, use_cache=False).logits
    first = model(ids[:, :12])
    second = model(ids[:, 12:], past_key_values=compat.cache_of(first)).logits
    torch.testing.assert_close(torch.cat((first.logits, second), dim=1), whole, rtol=1e-4, atol=1e-5)
    apply(model, "pi:factor=2")
    with pytest.raises(NotSupported, match="was filled under ntk:factor=2"):
        model(ids[:, 12:], past_key_values=compat.cache_of(first))


def with_images(kind: str) -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    eye = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "intermediate_size": 48}
    if kind == "qwen2_vl":
        eye |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 1}
        rope |= {"mrope_section": [2, 3, 3]}
    elif kind == "qwen3_vl":
        eye |= {"out_hidden_size": 64, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
        rope |= {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
    else:
        eye = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        eye |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 4, "head_dim": 16}
    text = {**SMALL, "vocab_size": 96, "head_dim": 16, "rope_parameters": rope}
    text |= {"model_type": "mistral"} if kind == "mistral3" else {}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, text_config=text, vision_config=eye)
    return AutoModelForImageTextToText.from_config(config).eval()


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl", "mistral3"])
def test_only_the_decoders_rotary_module(kind: str) -> None:
    """The image encoder's has a configuration of its own, and what the model knows of its positions besides stays."""
    model, ids = with_images(kind), dense.tokens(1, 40)
    rope, before = dict(model.config.get_text_config().rope_parameters), everything(model)
    logits = model(input_ids=ids).logits
    apply(model, "yarn:factor=2")
    changed = {name for name, m in model.named_modules() if before[1].get(name, (0,))[0] != id(m)}
    assert changed == {"model.language_model.rotary_emb"}
    now = model.config.get_text_config().rope_parameters
    assert now["rope_type"] == "yarn" and now["factor"] == 2.0
    assert all(now[key] == value for key, value in rope.items() if key != "rope_type")
    assert (model(input_ids=ids).logits - logits).abs().max() > 1e-4
    remove(model)
    assert unchanged(model, before) and torch.equal(model(input_ids=ids).logits, logits)


@pytest.mark.parametrize(
    "spec", [*EVERY_KIND, "focused:local=8", "performer:features=32", "landmark:block=4,retrieve=2,local=8,id=90"]
)
def test_a_model_with_another_head_or_none(spec: str) -> None:
    """Or whose weights accelerate keeps elsewhere, and which is on the meta device itself."""
    config, ids = LlamaConfig(**SMALL, vocab_size=96), dense.tokens(1, 20)
    torch.manual_seed(0)
    whole = LlamaForCausalLM(config).eval()
    kinds = (AutoModel, AutoModelForQuestionAnswering)
    bare, asked = (kind.from_config(copy.deepcopy(config)).eval() for kind in kinds)
    bare.load_state_dict(whole.model.state_dict())
    getattr(asked, asked.base_model_prefix).load_state_dict(whole.model.state_dict())
    twin = cpu_offload(copy.deepcopy(whole), execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in twin.parameters())
    plain = twin(ids).logits
    for model in (whole, bare, asked, twin):
        apply(model, spec)
    states = whole.model(ids).last_hidden_state
    torch.testing.assert_close(bare(ids).last_hidden_state, states)
    torch.testing.assert_close(asked(ids).start_logits, asked.qa_outputs(states)[..., 0])
    torch.testing.assert_close(twin(ids).logits, whole(ids).logits)
    remove(twin)
    assert torch.equal(twin(ids).logits, plain)


def test_a_model_on_the_disk(tmp_path: Path) -> None:
    ids = dense.tokens(1, 20)
    torch.manual_seed(0)
    whole = LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=96)).eval()
    twin = disk_offload(copy.deepcopy(whole), str(tmp_path), execution_device=torch.device("cpu"))
    for spec in ("yarn:factor=2", "self-extend:group=2,window=4"):
        torch.testing.assert_close(apply(twin, spec)(ids).logits, apply(whole, spec)(ids).logits)
