"""Longformer: the two-projection rule, the same as transformers' on the same weights, linear growth, LED."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, LongformerConfig, LongformerModel

import checks
import tiny
from growth import growth
from longspan.attention.longformer.layer import LongformerAttention
from longspan.attention.longformer.pattern import Longformer
from longspan.engine.call import AttentionCall, AttentionShape
from longspan.engine.patterns import attend, masked_attention
from longspan.lm import LongspanConfig, LongspanForCausalLM, LongspanForConditionalGeneration, LongspanForMaskedLM
from longspan.util.errors import NotSupported, SpecError

SIZES = {**checks.SIZES, "hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2, "eos_token_id": 1}


def config(spec: str, **settings: Any) -> LongspanConfig:
    return LongspanConfig(**{**SIZES, "attention": spec, "kind": "encoder", "position": "sinusoidal", **settings})


def layer(spec: str, **settings: Any) -> LongformerAttention:
    """One attention of an encoder in float64, its second projections unlike the first."""
    torch.manual_seed(7)
    model = LongspanForMaskedLM(config(spec, **settings)).double()
    made = model.model.layers[0].self_attn
    assert isinstance(made, LongformerAttention)
    for parameter in made.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    return made


def scattered(rows: list[list[int]], length: int) -> Tensor:
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for row, tokens in zip(mask, rows, strict=True):
        row[tokens] = 1
    return mask


def reference(module: LongformerAttention, x: Tensor, always_visible: Tensor, padding: Tensor) -> Tensor:
    """The rule as it is written: token by token, every score by itself, alibi's bias where the model has one."""
    pattern: Any = module.pattern
    heads, groups, width = module.config.num_attention_heads, module.num_key_value_groups, module.head_dim
    bias = module.place.bias if module.place.defines("bias") else None
    out = torch.zeros(*x.shape[:2], heads, width, dtype=x.dtype)
    local = [p(x).unflatten(-1, (-1, width)) for p in (module.q_proj, module.k_proj, module.v_proj)]
    far = [p(x).unflatten(-1, (-1, width)) for p in (module.q_global, module.k_global, module.v_global)]
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            for h in range(heads):
                apart = pattern.dilation if h >= heads - pattern.dilated else 1
                everywhere = bool(always_visible[b, i])
                q, k, v = far if everywhere else local
                steps = {i + apart * n for n in range(-(pattern.window // 2), pattern.window // 2 + 1)}
                keys = [
                    j
                    for j in range(x.shape[1])
                    if padding[b, j] and (everywhere or j in steps or bool(always_visible[b, j]))
                ]
                if not padding[b, i]:
                    continue
                scores = torch.stack([q[b, i, h] @ k[b, j, h // groups] for j in keys]) * width**-0.5
                if bias is not None:
                    scores = scores + bias(i - torch.tensor(keys))[h]
                out[b, i, h] = scores.softmax(0) @ torch.stack([v[b, j, h // groups] for j in keys])
    return module.o_proj(out.flatten(2))


@pytest.mark.parametrize("spec", ["longformer:window=4", "longformer:window=6,dilated=2,dilation=3"])
@pytest.mark.parametrize("position", ["sinusoidal", "alibi"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_two_projections_and_overwritten_rows(spec: str, position: str, side: str) -> None:
    module = layer(spec, position=position)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(3, 21, 32, generator=draw, dtype=torch.float64, requires_grad=True)
    padding = torch.ones(3, 21, dtype=torch.bool)
    padding[0, :5] = False
    if side == "right":
        padding = padding.flip(1)
    always_visible = scattered([[8], [0, 2, 3, 17], []], 21)  # a different number in each row, neighbours among them
    real = padding[..., None]
    close = {} if position == "sinusoidal" else {"rtol": 1e-4, "atol": 1e-4}  # biases are float32
    got = (
        module(x, position_ids=torch.arange(21)[None], padding=padding, global_attention_mask=always_visible)[0] * real
    )
    wanted = reference(module, x, always_visible, padding) * real
    torch.testing.assert_close(got, wanted, **close)
    pull = torch.randn(got.shape, generator=draw, dtype=torch.float64)
    weights = (x, *module.parameters())
    ours = torch.autograd.grad((got * pull).sum(), weights)
    torch.testing.assert_close(ours, torch.autograd.grad((wanted * pull).sum(), weights), **close)


def test_rotation_reaches_both_projections() -> None:
    """With the second projections as copies and a window over all, globals change nothing: both ways rotate alike."""
    torch.manual_seed(0)
    model = LongspanForMaskedLM(config("longformer:window=60", position="rope:share=0.5")).eval()
    ids = torch.arange(20)[None] + 2
    mask = torch.ones_like(ids)
    mask[0, 17:] = 0
    with torch.no_grad():
        got = model(ids, mask, global_attention_mask=scattered([[0, 3, 9]], 20)).logits[:, :17]
        plain = model(ids, mask).logits[:, :17]
        full = LongspanForMaskedLM(config("full", position="rope:share=0.5")).eval()
        full.load_state_dict(model.state_dict(), strict=False)
        torch.testing.assert_close(got, plain)
        torch.testing.assert_close(got, full(ids, mask).logits[:, :17])


def test_second_projections_begin_as_copies_and_serve_global_rows_only(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = LongspanForMaskedLM(config("longformer:window=4"))
    module = model.model.layers[1].self_attn
    for name in ("q", "k", "v"):
        assert torch.equal(getattr(module, f"{name}_global").weight, getattr(module, f"{name}_proj").weight)
    ids = torch.arange(30)[None] + 2
    model(ids, labels=ids).loss.backward()
    assert module.k_global.weight.grad is None
    states = model.model(ids, global_attention_mask=scattered([[4]], 30)).last_hidden_state
    states[:, 6:].sum().backward()  # the last layer's global row is not among these
    assert float(module.k_global.weight.grad.abs().sum()) == 0
    assert float(model.model.layers[0].self_attn.k_global.weight.grad.abs().sum()) > 0
    with torch.no_grad():
        module.k_global.weight.mul_(3)
    model.save_pretrained(tmp_path)
    again = LongspanForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.layers[1].self_attn.k_global.weight, module.k_global.weight)


def test_a_checkpoint_without_them_gets_copies(tmp_path: Any) -> None:
    torch.manual_seed(0)
    LongspanForMaskedLM(config("window:size=4")).save_pretrained(tmp_path)
    grown = LongspanForMaskedLM.from_pretrained(tmp_path, attention="longformer:window=6")
    module = grown.model.layers[1].self_attn
    assert torch.equal(module.v_global.weight, module.v_proj.weight)


def test_first_tokens_as_a_setting() -> None:
    torch.manual_seed(0)
    model = LongspanForMaskedLM(config("longformer:window=4,globals=2", position="alibi")).eval()
    other = LongspanForMaskedLM(config("longformer:window=4", position="alibi")).eval()
    other.load_state_dict(model.state_dict())
    ids = torch.randint(2, 100, (2, 25), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    with torch.no_grad():
        got = model(ids, mask).logits
        wanted = other(ids, mask, global_attention_mask=scattered([[6, 7], [0, 1]], 25)).logits
    torch.testing.assert_close(got[0, 6:], wanted[0, 6:])
    torch.testing.assert_close(got[1], wanted[1])
    with torch.no_grad():
        assert not torch.allclose(got[1], other(ids, mask).logits[1], atol=1e-4)


@pytest.mark.parametrize("window", [2, 20, 150])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_many_blocks_equal_the_definition(window: int, biased: bool, causal: bool) -> None:
    pattern = Longformer(window=window, dilated=1, dilation=5)
    draw = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, h, 333, 8, generator=draw).double().requires_grad_() for h in (4, 2, 2))
    padding = torch.ones(2, 333, dtype=torch.bool)
    padding[0, 300:] = padding[1, :40] = False
    slope = torch.tensor([0.5, 0.2, 0.1, 0.05])
    bias = (lambda d: -slope.view(-1, *[1] * d.ndim) * d.abs()) if biased else None
    call = AttentionCall(q, k, v, 0.4, padding, bias)
    grid = AttentionShape(4, 333, 0, causal)
    got = attend(pattern, call, grid) * padding[:, None, :, None]
    wanted = masked_attention(pattern, call, grid) * padding[:, None, :, None]
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if biased else {}  # biases are float32
    torch.testing.assert_close(got, wanted, **tolerance)
    pull = torch.randn(got.shape, generator=draw).double()
    ours = torch.autograd.grad((got * pull).sum(), (q, k, v))
    torch.testing.assert_close(ours, torch.autograd.grad((wanted * pull).sum(), (q, k, v)), **tolerance)


@pytest.mark.parametrize("globals_", [[[]] * 2, [[0], [5, 6, 30]], [[0, 1, 2, 40], []]])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_transformers(globals_: list[list[int]], padded: bool) -> None:
    """Every attention of a whole encoder of transformers, on what it was given there, forward and backward."""
    torch.manual_seed(4)
    theirs = LongformerModel(
        LongformerConfig(
            **tiny.sizes(100, 32, 48, 2, 4),
            max_position_embeddings=80,
            attention_window=[8, 16],
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ).train()
    for name, parameter in theirs.named_parameters():
        if "attention" in name:
            nn.init.normal_(parameter, 0, 0.25)
    seen: list[tuple[Tensor, Tensor]] = []
    for block in theirs.encoder.layer:
        block.attention.self.register_forward_hook(lambda m, args, out: seen.append((args[0], out[0])))
    ids = torch.randint(3, 100, (2, 48), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 41:] = 0
        ids[0, 41:] = 1
    always_visible = scattered(globals_, 48) * mask
    theirs(ids, attention_mask=mask, global_attention_mask=always_visible)
    for block, (given, wanted), window in zip(theirs.encoder.layer, seen, (8, 16), strict=True):
        ours = copied(block.attention.self, window)
        x = given.detach().requires_grad_()
        got = ours(x, position_ids=torch.arange(48)[None], padding=mask.bool(), global_attention_mask=always_visible)[0]
        torch.testing.assert_close(got * mask[..., None], wanted * mask[..., None], rtol=1e-5, atol=1e-5)
        pull = torch.randn(got.shape, generator=torch.Generator().manual_seed(6)) * mask[..., None]
        (got * pull).sum().backward()
        names, weights = zip(*block.attention.self.named_parameters(), strict=True)
        grads = torch.autograd.grad((wanted * pull).sum(), (given, *weights), allow_unused=True)
        torch.testing.assert_close(x.grad, grads[0], rtol=1e-4, atol=1e-5)
        for name, wanted_grad in zip(names, grads[1:], strict=True):
            own = ours.get_parameter(ours_name(name)).grad
            if own is None or wanted_grad is None:
                assert not any(g is not None and g.any() for g in (own, wanted_grad))
            else:
                torch.testing.assert_close(own, wanted_grad, rtol=1e-4, atol=1e-4, msg=name)


def ours_name(name: str) -> str:
    which, _, kind = name.partition(".")
    return f"{which[0]}_{'global' if which.endswith('global') else 'proj'}.{kind}"


def copied(theirs: nn.Module, window: int) -> LongformerAttention:
    """Our attention with the weights of theirs, and no projection after it."""
    model = LongspanForMaskedLM(config(f"longformer:window={window}", num_key_value_heads=4, attention_bias=True))
    ours = model.model.layers[0].self_attn
    assert isinstance(ours, LongformerAttention)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            ours.get_parameter(ours_name(name)).copy_(parameter)
        ours.o_proj.weight.copy_(torch.eye(32))
        ours.o_proj.bias.zero_()
    return ours


@pytest.mark.parametrize("spec", ["longformer:window=32", "longformer:window=32,dilated=2,dilation=4"])
@pytest.mark.parametrize("backward", [False, True])
def test_growth_is_linear(spec: str, backward: bool) -> None:
    module = layer(spec)

    def run(length: int) -> None:
        x = torch.zeros(1, length, 32, dtype=torch.float64, requires_grad=backward)
        always_visible = scattered([[0, 3]], length)
        with torch.set_grad_enabled(backward):
            out = module(x, position_ids=torch.arange(length)[None], global_attention_mask=always_visible)[0]
        if backward:
            out.sum().backward()

    total, largest = growth(run, 4096)
    assert total < 2.2
    assert largest < 2.2


def test_led_reads_with_windows_and_writes_with_full_attention(tmp_path: Any) -> None:
    torch.manual_seed(0)
    led = LongspanForConditionalGeneration(
        config("longformer:window=4,globals=1", kind="encoder-decoder", position="alibi", decoder_attention="full")
    ).eval()
    assert isinstance(led.encoder.layers[0].self_attn, LongformerAttention)
    assert led.decoder.layers[0].self_attn.pattern is None
    ids = torch.randint(2, 100, (2, 30), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, 22:] = 0
    always_visible = scattered([[0, 9], [0]], 30)
    led.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    made = led.generate(ids, attention_mask=mask, global_attention_mask=always_visible, max_new_tokens=6, num_beams=2)
    assert torch.equal(
        made,
        again.generate(ids, attention_mask=mask, global_attention_mask=always_visible, max_new_tokens=6, num_beams=2),
    )
    with torch.no_grad():
        first = led(ids, mask, decoder_input_ids=ids[:, :3], global_attention_mask=always_visible).logits
        alone = led(ids[:1, :22], decoder_input_ids=ids[:1, :3], global_attention_mask=always_visible[:1, :22]).logits
        without = led(ids, mask, decoder_input_ids=ids[:, :3]).logits
    torch.testing.assert_close(first[:1], alone, rtol=1e-4, atol=1e-5)
    assert not torch.equal(first[0], without[0])
    torch.testing.assert_close(first[1], without[1])
    led(ids, mask, labels=ids[:, :5], global_attention_mask=always_visible).loss.backward()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "at least 1"),
        ({"dilated": 2}, "dilated=2,dilation=2"),
        ({"dilation": 2}, "set both"),
        ({"dilated": -1, "dilation": 2}, "0 or more"),
        ({"globals": -1}, "0 or more"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, int], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Longformer(**settings)


def test_what_cannot_be_built_or_called() -> None:
    causal = {"kind": "decoder", "position": "rope"}
    with pytest.raises(NotSupported, match="sees later tokens"):
        LongspanForCausalLM(config("longformer:globals=1", **causal))
    with pytest.raises(NotSupported, match="window=8"):
        LongspanForMaskedLM(config("longformer:window=7"))
    with pytest.raises(SpecError, match="dilated=5 exceeds the 4 heads"):
        LongspanForMaskedLM(config("longformer:dilated=5,dilation=2"))
    with pytest.raises(NotSupported, match="attention=full"):
        LongspanForMaskedLM(config("longformer", position="tupe"))
    with pytest.raises(SpecError, match="kind=encoder-decoder"):
        config("full", decoder_attention="full")
    ids = torch.arange(10)[None]
    always_visible = torch.ones_like(ids)
    with pytest.raises(NotSupported, match="would see later ones"):
        LongspanForCausalLM(config("longformer", **causal))(ids, global_attention_mask=always_visible)
    with pytest.raises(NotSupported, match=r"\(1, 10\)"):
        LongspanForMaskedLM(config("longformer"))(ids, global_attention_mask=always_visible[:, :4])
    with pytest.raises(NotSupported, match="longformer"):
        LongspanForMaskedLM(config("full"))(ids, global_attention_mask=always_visible)


def test_half_precision_keeps_its_dtype_and_stays_near() -> None:
    module = layer("longformer:window=8,dilated=2,dilation=2", position="alibi")
    x, always_visible = torch.randn(1, 100, 32, generator=torch.Generator().manual_seed(1)), scattered([[0, 50]], 100)
    with torch.no_grad():
        wanted = module(x.double(), position_ids=torch.arange(100)[None], global_attention_mask=always_visible)[0]
        got = module.bfloat16()(
            x.bfloat16(), position_ids=torch.arange(100)[None], global_attention_mask=always_visible
        )[0]
    assert got.dtype == torch.bfloat16
    assert float((got.double() - wanted).norm() / wanted.norm()) < 0.02
