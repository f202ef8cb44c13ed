"""The Recurrent Memory Transformer by hand; how far gradients go; any pieces, padding and generation give what one pass gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    Qwen3Config,
)

from longspan.apply import apply
from longspan.core.facts import facts_of
from longspan.core.method import parse
from longspan.lm import LongspanConfig
from longspan.memory.rmt import RMT, RMTForCausalLM, around
from longspan.meter import cache_bytes
from longspan.util.errors import NotSupported, SpecError
from shared_model import assert_checkpoints_change_no_gradient, assert_threads_get_what_each_gets_alone, in_the_midst

SIZES: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": 2,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "gpt2": GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=1, bos_token_id=2),
    "ours": LongspanConfig(position="alibi", **SIZES),
}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def base(family: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "wpe" not in name:
            torch.nn.init.normal_(weight, std=1.2 * weight.shape[-1] ** -0.5)
    return model


def build(method: str = "rmt:tokens=3,segment=8", family: str = "llama") -> RMTForCausalLM:
    torch.manual_seed(1)
    (rmt,) = parse(method).methods
    assert isinstance(rmt, RMT)
    return around(base(family), rmt).eval()


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **given: Any) -> Tensor:
    return model(ids, **given).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_recurrence_by_hand(family: str) -> None:
    """Segment after segment through the model itself, with memory on both sides."""
    rmt, model, ids = build(family=family), base(family), tokens(2, 21)
    memory, parts = rmt.model.memory[None].expand(2, -1, -1), []
    with torch.no_grad():
        for part in ids.split(8, dim=1):
            embeds = torch.cat((memory, model.get_input_embeddings()(part), memory), dim=1)
            out = model(inputs_embeds=embeds, output_hidden_states=True, use_cache=False)
            memory = out.hidden_states[-1][:, -3:]
            parts.append(out.logits[:, 3:-3])
    torch.testing.assert_close(logits(rmt, ids), torch.cat(parts, dim=1), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_equal_the_whole(family: str) -> None:
    model, ids = build(family=family), tokens(2, 37)
    cache, parts = DynamicCache(config=model.config), []
    with torch.no_grad():
        for begin, end in ((0, 5), (5, 8), (8, 27), *((t, t + 1) for t in range(27, 37))):
            parts.append(model(ids[:, begin:end], past_key_values=cache, use_cache=True).logits)
    assert cache.get_seq_length() == 37
    torch.testing.assert_close(torch.cat(parts, dim=1), logits(model, ids, use_cache=False), **CLOSE)


@pytest.mark.parametrize("family", ["llama", "ours"])
def test_threads_share_a_model(family: str) -> None:
    model = build(family=family)

    def answer(number: int) -> Tensor:
        ids, mask = (tokens(2, 20 + 7 * number) + number) % 87 + 3, torch.ones(2, 20 + 7 * number, dtype=torch.long)
        mask[0, : 3 + 2 * number] = 0
        made = model.generate(ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        return torch.cat((logits(model, ids, attention_mask=mask, use_cache=False)[:, -1], made[:, -6:]), dim=1)

    assert_threads_get_what_each_gets_alone(answer)


def test_a_forward_in_the_midst_of_another() -> None:
    model, ids = build(), tokens(2, 37)
    inner = model.model.base.layers[1].self_attn.q_proj
    wanted = logits(model, ids[:1], use_cache=True)
    got = in_the_midst(inner, lambda: logits(model, ids[:1], use_cache=True), lambda: logits(model, ids[1:, :20]))
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("family", ["llama", "gpt2", "ours"])
@pytest.mark.parametrize("depth", [-1, 1])
def test_checkpoints_after_another_forward(family: str, depth: int) -> None:
    model, ids = build(f"rmt:tokens=3,segment=8,depth={depth}", family).train(), tokens(2, 37)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    texts = {"input_ids": ids, "attention_mask": mask}, {"input_ids": ids.flip(1)[:, :29]}
    losses = [lambda text=text: model(**text, labels=text["input_ids"], use_cache=False).loss for text in texts]
    assert_checkpoints_change_no_gradient(model, *losses)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cached", [False, True])
def test_padding_changes_nothing(side: str, cached: bool) -> None:
    model, ids = build(), tokens(3, 30)
    mask = torch.ones_like(ids)
    inside = [slice(9, None), slice(17, None)] if side == "left" else [slice(None, 21), slice(None, 13)]
    for row, kept in enumerate(inside):
        mask[row] = 0
        mask[row, kept] = 1
    got = logits(model, ids, attention_mask=mask, use_cache=cached)
    for row, kept in enumerate([*inside, slice(None)]):
        alone = logits(model, ids[row : row + 1, kept], use_cache=False)
        torch.testing.assert_close(got[row : row + 1, kept], alone, **CLOSE)


def test_generation_uses_what_was_read() -> None:
    model, ids = build(), tokens(2, 25)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    made = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    for row, begin in ((0, 6), (1, 0)):
        own = ids[row : row + 1, begin:]
        for _ in range(12):
            own = torch.cat((own, logits(model, own, use_cache=False)[:, -1:].argmax(-1)), dim=1)
        assert made[row, begin:].tolist() == own[0].tolist()


def test_beams() -> None:
    """With and without the cache the same beams win."""
    model, ids = build(), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    settings: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 9, "num_beams": 3, "do_sample": False}
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, **settings, use_cache=False))


@pytest.mark.parametrize(("depth", "reached"), [(-1, 4), (0, 0), (1, 1), (2, 2), (9, 4)])
@pytest.mark.parametrize("at", [3, 4])
def test_gradients_go_back_so_many_segments(depth: int, reached: int, at: int) -> None:
    """From the loss of any segment, not of the last alone."""
    model = build(f"rmt:tokens=3,segment=8,depth={depth}").train()
    embeds = torch.randn(1, 40, 32, requires_grad=True)
    model(inputs_embeds=embeds, use_cache=False).logits[0, 8 * at].square().sum().backward()
    assert embeds.grad is not None
    moved = [bool(part.abs().sum() > 0) for part in embeds.grad[0].split(8)]
    assert moved == [at - reached <= s <= at for s in range(5)]


def learns(depth: int, symbols: int, back: bool = False, steps: int = 60, learning_rate: float = 1e-2) -> float:
    """A small model is trained to say what stood at the beginning of three segments at their end, or the same backwards; the
    share of symbols that it then gets right, of which it would guess a sixth. Nothing but memory goes across."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = around(AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=16, **sizes)), RMT(3, 4, depth)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for step in range(steps + 1):
        ids = torch.randint(8, 16, (64 if step < steps else 512, 12))
        ids[:, :symbols] = torch.randint(0, 6, (len(ids), symbols))
        answer = ids[:, :symbols].flip(1) if back else ids[:, :symbols].clone()
        ids[:, -symbols - 1], ids[:, -symbols:] = 7, answer
        logits = model(ids, use_cache=False).logits[:, -symbols - 1 : -1]
        if step < steps:
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), answer.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    return (logits.argmax(-1) == answer).float().mean().item()


def test_a_fact_two_segments_back_is_learned_with_gradients_that_go_so_far() -> None:
    assert learns(2, 1) > 0.95 and learns(1, 1) < 0.5 and learns(0, 1) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("back", "steps", "learning_rate"), [(False, 250, 5e-3), (True, 150, 1e-2)])
def test_copy_and_reverse_over_three_segments(back: bool, steps: int, learning_rate: float) -> None:
    assert learns(2, 3, back, steps, learning_rate) > 0.9
    assert learns(0, 3, back, steps, learning_rate) < 0.4


def test_truncation_changes_no_value_and_checkpointing_no_gradient() -> None:
    ids = tokens(2, 30)
    whole = build().train()
    cut = build("rmt:tokens=3,segment=8,depth=1").train()
    torch.testing.assert_close(whole(ids, use_cache=False).logits, cut(ids, use_cache=False).logits, **CLOSE)
    whole(ids, labels=ids, use_cache=False).loss.backward()
    plain = {n: p.grad.clone() for n, p in whole.named_parameters()}
    assert plain["model.memory"].abs().sum() > 0
    whole.zero_grad()
    whole.gradient_checkpointing_enable({"use_reentrant": False})
    whole(ids, labels=ids, use_cache=False).loss.backward()
    for name, p in whole.named_parameters():
        torch.testing.assert_close(p.grad, plain[name], msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded(family: str, tmp_path: Path) -> None:
    model, ids = build(family=family), tokens(1, 30)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(logits(again.eval(), ids), logits(model, ids), rtol=0, atol=0)
    head, table = again.lm_head.weight, again.get_input_embeddings().weight
    assert (head.data_ptr() == table.data_ptr()) == FAMILIES[family].tie_word_embeddings


def test_state_has_one_size() -> None:
    """After any number of whole segments only the memory is there."""

    model, sizes = build(), []
    for length in (16, 160):
        cache = DynamicCache()
        with torch.no_grad():
            model(tokens(1, length), past_key_values=cache, use_cache=True)
        sizes.append(cache_bytes(cache))
        assert cache.layers[0].rows[0].cache is None
    assert sizes[0] == sizes[1] > 0


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(SpecError, match="use segment=44"):
        parse("rmt:tokens=10,segment=45").resolve(facts_of(FAMILIES["llama"]))
    with pytest.raises(NotSupported, match="train"):
        apply(base(), "rmt:tokens=3,segment=8")
    capped = Gemma2Config(**{**SIZES, "head_dim": 8}, final_logit_softcapping=5.0)
    with pytest.raises(NotSupported, match="logits"):
        around(AutoModelForCausalLM.from_config(capped), RMT(3, 8))
    model, cache = base(), DynamicCache()
    model(tokens(1, 5), past_key_values=cache)
    with pytest.raises(NotSupported, match="empty"):
        build()(tokens(1, 5), past_key_values=cache, use_cache=True)
    for what in ("output_hidden_states", "output_attentions"):
        with pytest.raises(NotSupported, match=f"keeps nothing for {what}"):
            build()(tokens(1, 5), **{what: True})
