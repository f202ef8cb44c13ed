"""Gist tokens: the mask against a plain model under a 4-D mask, the cache of gist tokens against the mask, controls, refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen3Config,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

import longspan as ls
import tiny
from longspan.apply import applied, apply
from longspan.hf.compat import CACHE
from longspan.hf.site import current, remove
from longspan.lm import LongspanConfig
from longspan.memory.gist import encoder as gist_encoder
from longspan.memory.gist import method as gist
from longspan.memory.gist.decoder import GistCache
from longspan.memory.gist.encoder import GistStates
from longspan.util.errors import LongspanError, NotSupported, SpecError
from shared_model import (
    THREADS,
    assert_checkpoints_change_no_gradient,
    assert_threads_get_what_each_gets_alone,
    in_the_midst,
)

SIZES: dict[str, Any] = {**tiny.SIZES, "max_position_embeddings": 128}
FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "mistral": MistralConfig(**SIZES, sliding_window=9),
    "gemma3": Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 4, "head_dim": 8, "query_pre_attn_scalar": 8},
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "gpt2": GPT2Config(
        vocab_size=270, n_embd=32, n_layer=3, n_head=4, n_positions=128, eos_token_id=None, bos_token_id=0
    ),
    "ours": LongspanConfig(position="alibi", **SIZES),
}
PROMPTS = ["Instruction: add up", "Instruction: say"]
TEXTS = ["\nInput: 12\nOutput:", "\nIn: a\nOutput, now:"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """Weights large enough that tokens matter to one another."""
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "wpe" not in name and "positions" not in name:
            torch.nn.init.normal_(weight, std=1.2 * weight.shape[-1] ** -0.5)
    return model.eval()


def decoder(family: str = "llama", **more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return spread(AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family]), **more))


def encoder_decoder(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    ends = {"decoder_start_token_id": 0, "pad_token_id": 2, "eos_token_id": 1, "bos_token_id": 0}
    if family == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "num_decoder_layers": 2}
        return spread(T5ForConditionalGeneration(T5Config(vocab_size=270, dropout_rate=0.0, **sizes, **ends)))
    sizes = {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("layers", 3), ("attention_heads", 4), ("ffn_dim", 48))
    }
    return spread(
        BartForConditionalGeneration(
            BartConfig(
                vocab_size=270, d_model=32, max_position_embeddings=96, forced_eos_token_id=None, **sizes, **ends
            )
        )
    )


def prepared(model: PreTrainedModel, method: str = "gist:tokens=3") -> tuple[PreTrainedModel, Any]:
    tokenizer = tiny.tokenizer()
    return apply(model, method, tokenizer=tokenizer), tokenizer


def masked_by_hand(model: PreTrainedModel, ids: Tensor, mode: str, real: Tensor | None = None) -> Tensor:
    """Logits of the model without the method under an additive 4-D mask, written down here from the rule for one run."""
    wanted = gist.method_on(model)
    rows, length = ids.shape
    sees = torch.ones(length, length).tril().bool().repeat(rows, 1, 1)
    for row in range(rows):
        at = (ids[row] == wanted.id).nonzero()[:, 0].tolist()
        first, last = at[0], at[-1]
        sees[row, last + 1 :, : first if mode == "gist" else last + 1] = False
        if real is not None:
            sees[row, :, ~real[row].bool()] = False
    sees |= torch.eye(length).bool()
    numbers = torch.zeros(rows, 1, length, length, dtype=model.dtype)
    numbers.masked_fill_(~sees[:, None], torch.finfo(torch.float32).min)
    positions = None if real is None else (real.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), applied(model, "none"):
        return model(ids, attention_mask=numbers, position_ids=positions, use_cache=False).logits


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **more: Any) -> Tensor:
    return model(ids, **more).logits


def padded_left(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[1] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


# The mask


@pytest.mark.parametrize("mode", ["gist", "negative"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_mask_is_that_of_the_rule(family: str, attention: str, mode: str) -> None:
    """In float64, with left padding."""
    model, tokenizer = prepared(
        decoder(family, dtype=torch.float64, attn_implementation=attention), f"gist:tokens=3,mode={mode}"
    )
    rows = [gist.joined(model, tokenizer, *pair) for pair in zip(PROMPTS, TEXTS, strict=True)]
    ids, real = padded_left(rows)
    positions = (real.cumsum(1) - 1).clamp(min=0)
    mine = logits(model, ids, attention_mask=real, position_ids=positions)
    hand = masked_by_hand(model, ids, mode, real)
    assert torch.allclose(mine[real.bool()], hand[real.bool()], rtol=1e-6, atol=1e-7)  # eager's softmax is float32
    plain = logits(apply(model, "none"), ids, attention_mask=real, position_ids=positions)
    assert not torch.allclose(mine[:, -1], plain[:, -1], atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_and_single_tokens_give_what_one_pass_gives(family: str) -> None:
    """The prompt's tokens stay hidden from later calls on the same cache, in one that the model makes by itself too."""
    model, tokenizer = prepared(decoder(family))
    ids = torch.tensor([gist.joined(model, tokenizer, PROMPTS[0], TEXTS[0])] * 2)
    ids[1, :10] = ids[1, :10].flip(0)
    whole = logits(model, ids)
    with torch.no_grad():
        read = model(ids[:, :7], use_cache=True)
        parts, cache = [read.logits], read.past_key_values
        for part in (ids[:, 7:21], *ids[:, 21:].split(1, dim=1)):
            parts.append(model(part, past_key_values=cache, use_cache=True).logits)
    assert torch.allclose(torch.cat(parts, 1), whole, **CLOSE)


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize("rows", [[1, 0], [0, 0, 1, 1], [1], [1, 1, 0]])
def test_what_is_hidden_follows_the_rows_of_a_cache(rows: list[int], config: bool) -> None:
    """The rows' gist tokens stand in other places; rows are reordered, repeated and picked."""
    model, _ = prepared(decoder())
    ids = torch.randint(5, 200, (2, 20), generator=torch.Generator().manual_seed(0))
    ids[0, 4], ids[1, 9] = (gist.method_on(model).id,) * 2
    cache = DynamicCache(config=model.config) if config else DynamicCache()
    logits(model, ids[:, :12], past_key_values=cache, use_cache=True)
    if rows == [0, 0, 1, 1]:
        cache.batch_repeat_interleave(2)
    elif rows == [1, 0]:
        cache.reorder_cache(torch.tensor(rows))
    else:
        cache.batch_select_indices(torch.tensor(rows))
    ids = ids[rows]
    parts = [logits(model, part, past_key_values=cache, use_cache=True) for part in (ids[:, 12:13], ids[:, 13:])]
    assert torch.allclose(torch.cat(parts, 1), logits(model, ids)[:, 12:], **CLOSE)


def test_sliding_windows_stay() -> None:
    model, tokenizer = prepared(decoder("mistral"))
    long = "Instruction: a longer instruction that no window of nine holds"
    ids = torch.tensor([gist.joined(model, tokenizer, long, TEXTS[0])])
    mine = logits(model, ids)
    wide, _ = prepared(decoder("llama"))
    assert mine.shape == logits(wide, ids).shape
    other = ids.clone()
    other[0, -10:-9] = 77  # out of one layer's window, within that of three
    assert not torch.allclose(mine[:, -1], logits(model, other)[:, -1], atol=1e-4)
    far = ids.clone()
    far[0, 3] = 77
    changed = (mine - logits(model, far)).abs().amax(-1)[0] > 1e-6
    assert changed[3] and not changed[:3].any()


def test_what_the_prompt_says_goes_through_the_gist_tokens_alone() -> None:
    """Gradients of what follows reach the prompt, and none does where neither is seen."""
    for mode, reached in (("gist", True), ("negative", False), ("positive", True)):
        model, tokenizer = prepared(decoder(), f"gist:tokens=3,mode={mode}")
        ids = torch.tensor([gist.joined(model, tokenizer, PROMPTS[0], TEXTS[0])])
        seen: list[Tensor] = []
        handle = model.get_input_embeddings().register_forward_hook(
            lambda m, a, out, seen=seen: seen.append(out.detach().requires_grad_()) or seen[0]
        )
        model(ids, use_cache=False).logits[:, -len(TEXTS[0]) :].sum().backward()
        handle.remove()
        first = int((ids[0] == gist.method_on(model).id).nonzero()[0])
        assert bool(seen[0].grad[0, :first].any()) is reached
        assert bool(seen[0].grad[0, first : first + 3].any()) is reached


def test_controls() -> None:
    """The positive one is the model as it is; under the negative one prompts make no difference, under gist they do."""
    model, tokenizer = prepared(decoder(), "gist:tokens=3,mode=positive")
    ids = torch.tensor([gist.joined(model, tokenizer, PROMPTS[0], TEXTS[0])])
    assert torch.equal(logits(model, ids), logits(apply(model, "none"), ids))
    other = ids.clone()
    other[0, 2:12] = 70
    for mode, same in (("negative", True), ("gist", False)):
        apply(model, f"gist:tokens=3,mode={mode}", tokenizer=tokenizer)
        a, b = (logits(model, x)[:, -len(TEXTS[0]) :] for x in (ids, other))
        assert torch.equal(a, b) if same else not torch.allclose(a, b, atol=1e-3)


def test_a_second_prompt_in_the_same_conversation() -> None:
    """What follows the second run sees neither prompt nor the first run; the second run sees the first."""
    model, tokenizer = prepared(decoder())
    turns = [gist.joined(model, tokenizer, *pair) for pair in zip(PROMPTS, TEXTS, strict=True)]
    ids = torch.tensor([[*turns[0], *turns[1]]])
    whole = logits(model, ids)
    with torch.no_grad():
        held = gist.compress(model, tokenizer, PROMPTS[0])
        first = held.inputs(model, tokenizer, TEXTS[0])
        cache = first[CACHE]
        model(first["input_ids"][:, 3:], past_key_values=cache, use_cache=True)
        after = model(torch.tensor([turns[1]]), past_key_values=cache, use_cache=True).logits
    assert torch.allclose(after, whole[:, len(turns[0]) :], **CLOSE)


# The cache of gist tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_of_gist_tokens_gives_what_the_mask_gives(family: str) -> None:
    """Two prompts and two texts of different lengths in one batch; grouped heads, and every kind of positions."""
    model, tokenizer = prepared(decoder(family))
    held = gist.compress(model, tokenizer, PROMPTS)
    assert isinstance(held, GistCache) and (len(held), held.tokens) == (2, 3)
    given = held.inputs(model, tokenizer, TEXTS)
    new = given["input_ids"][:, 3:]
    with torch.no_grad():
        out = model(new, attention_mask=given["attention_mask"], past_key_values=given[CACHE]).logits
    for row, (prompt, text) in enumerate(zip(PROMPTS, TEXTS, strict=True)):
        whole = logits(model, torch.tensor([gist.joined(model, tokenizer, prompt, text)]))
        count = len(text)
        assert torch.allclose(out[row, -count:], whole[0, -count:], **CLOSE)


def test_it_is_small_and_its_positions_matter() -> None:
    model, tokenizer = prepared(decoder())
    held = gist.compress(model, tokenizer, PROMPTS[0])
    layers, heads, width = 3, 2, 8
    assert held.nbytes == 2 * layers * heads * 3 * width * 4
    given = held.inputs(model, tokenizer, TEXTS[0])
    right = model(given["input_ids"][:, 3:], past_key_values=held.copy()).logits
    wrong = GistCache(held.pairs(), torch.zeros_like(held.shift))
    assert not torch.allclose(model(given["input_ids"][:, 3:], past_key_values=wrong).logits, right, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "ours"])
def test_generate_from_it_says_what_generate_from_the_prompt_says(family: str) -> None:
    """One prompt for two texts, again and again; with beams; and a prompt for each."""
    model, tokenizer = prepared(decoder(family))
    held = gist.compress(model, tokenizer, PROMPTS[0])
    asked = {"max_new_tokens": 6, "do_sample": False}
    for more, beams in (({}, 1), ({"num_beams": 3}, 3), ({}, 1)):
        out = model.generate(**held.inputs(model, tokenizer, TEXTS, beams=beams), **asked, **more)
        for row, text in enumerate(TEXTS):
            ids = torch.tensor([gist.joined(model, tokenizer, PROMPTS[0], text)])
            whole = model.generate(ids, **asked, **more)
            assert out[row, -6:].tolist() == whole[0, -6:].tolist()
    out = model.generate(**gist.compress(model, tokenizer, PROMPTS).inputs(model, tokenizer, TEXTS), **asked)
    ids = torch.tensor([gist.joined(model, tokenizer, PROMPTS[1], TEXTS[1])])
    assert out[1, -6:].tolist() == model.generate(ids, **asked)[0, -6:].tolist()


def test_a_second_turn_goes_on_with_the_same_cache() -> None:
    model, tokenizer = prepared(decoder())
    asked = {"max_new_tokens": 5, "do_sample": False}
    given = gist.compress(model, tokenizer, PROMPTS[0]).inputs(model, tokenizer, TEXTS[0])
    first = model.generate(**given, **asked, return_dict_in_generate=True)
    more = torch.tensor([tokenizer("\nInput: b\n", add_special_tokens=False)["input_ids"]])
    ids = torch.cat((first.sequences, more), dim=1)
    turn = {"attention_mask": torch.ones_like(ids), "past_key_values": copy.deepcopy(first.past_key_values)}
    out = model.generate(ids, **turn, **asked)
    whole = torch.cat((torch.tensor([gist.joined(model, tokenizer, PROMPTS[0], "")]), ids[:, 3:]), dim=1)
    assert torch.equal(out[0, -5:], model.generate(whole, **asked)[0, -5:])


def test_rows_go_with_their_prompts() -> None:
    model, tokenizer = prepared(decoder())
    held = gist.compress(model, tokenizer, PROMPTS)
    swapped = held.copy()
    swapped.reorder_cache(torch.tensor([1, 0]))
    assert swapped.shift.tolist() == held.shift.flip(0).tolist()
    chosen = held.copy()
    chosen.batch_repeat_interleave(2)
    assert chosen.shift.tolist() == held.shift.repeat_interleave(2).tolist() and len(chosen.pairs()[0][0]) == 4
    chosen.batch_select_indices(torch.tensor([3]))
    ids = torch.tensor([tokenizer(TEXTS[1], add_special_tokens=False)["input_ids"]])
    whole = logits(model, torch.tensor([gist.joined(model, tokenizer, PROMPTS[1], TEXTS[1])]))
    assert torch.allclose(logits(model, ids, past_key_values=chosen), whole[:, -ids.shape[1] :], **CLOSE)


# Encoder and decoder


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_states_of_gist_tokens_give_what_the_mask_gives(family: str) -> None:
    model, tokenizer = prepared(encoder_decoder(family))
    tokenizer.pad_token = "</s>"
    held = gist.compress(model, tokenizer, PROMPTS)
    assert isinstance(held, GistStates) and held.states.shape == (4, 2, 3, 32)
    given, said = held.inputs(model, tokenizer, TEXTS), torch.tensor([[0, 50, 60, 70]] * 2)
    with torch.no_grad():
        out = model(decoder_input_ids=said, use_cache=False, **given).logits
    for row, (prompt, text) in enumerate(zip(PROMPTS, TEXTS, strict=True)):
        ids = torch.tensor([gist.joined(model, tokenizer, prompt, text)])
        whole = logits(model, ids, decoder_input_ids=said[:1], use_cache=False)
        assert torch.allclose(out[row], whole[0], **CLOSE)
    asked = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False}
    out = model.generate(**held.inputs(model, tokenizer, TEXTS), **asked)
    assert torch.equal(
        out[0], model.generate(torch.tensor([gist.joined(model, tokenizer, PROMPTS[0], TEXTS[0])]), **asked)[0]
    )


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_mask_is_that_of_the_rule(family: str) -> None:
    """Encoder states under a 4-D mask written down here, and the decoder on those that it may see."""
    model, tokenizer = prepared(encoder_decoder(family))
    ids = torch.tensor([gist.joined(model, tokenizer, PROMPTS[0], TEXTS[0])])
    said, length = torch.tensor([[0, 50, 60, 70]]), ids.shape[1]
    mine = logits(model, ids, decoder_input_ids=said, use_cache=False)
    at = (ids[0] == gist.method_on(model).id).nonzero()[:, 0]
    first, last = int(at[0]), int(at[-1])
    sees = torch.ones(length, length).bool()
    sees[last + 1 :, :first] = False
    sees[: last + 1, last + 1 :] = False
    numbers = torch.zeros(1, 1, length, length).masked_fill(~sees, torch.finfo(torch.float32).min)
    with torch.no_grad(), applied(model, "none"):
        states = model.get_encoder()(ids, attention_mask=numbers)[0]
        hand = model(encoder_outputs=(states[:, first:],), decoder_input_ids=said, use_cache=False).logits
        plain = model(ids, decoder_input_ids=said, use_cache=False).logits
    assert torch.allclose(mine, hand, **CLOSE) and not torch.allclose(mine, plain, atol=1e-2)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_controls_of_an_encoder(family: str) -> None:
    model, tokenizer = prepared(encoder_decoder(family), "gist:tokens=3,mode=positive")
    ids = torch.tensor([gist.joined(model, tokenizer, PROMPTS[0], TEXTS[0])])
    said, other = torch.tensor([[0, 50, 60]]), ids.clone()
    other[0, 2:12] = 70
    assert torch.equal(
        logits(model, ids, decoder_input_ids=said), logits(apply(model, "none"), ids, decoder_input_ids=said)
    )
    for mode, same in (("negative", True), ("gist", False)):
        apply(model, f"gist:tokens=3,mode={mode}", tokenizer=tokenizer)
        a, b = (logits(model, x, decoder_input_ids=said) for x in (ids, other))
        assert torch.allclose(a, b, atol=1e-6) is same
    model.train()(ids, labels=said).loss.backward()
    grad = model.get_input_embeddings().weight.grad
    assert bool(grad[70 if not same else int(ids[0, 2])].any())


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_copy_of_an_encoder_has_the_method_on_it(family: str) -> None:
    """It runs by itself, compresses prompts, and comes back to the plain model."""
    model, tokenizer = prepared(encoder_decoder(family))
    ids, said = torch.tensor([gist.joined(model, tokenizer, PROMPTS[0], TEXTS[0])]), torch.tensor([[0, 50, 60]])
    changed, twin = logits(model, ids, decoder_input_ids=said), copy.deepcopy(model)
    states = gist.compress(model, tokenizer, PROMPTS).states
    remove(model)
    plain = logits(model, ids, decoder_input_ids=said)
    assert not torch.allclose(plain, changed, atol=1e-3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin, ids, decoder_input_ids=said), changed), "the copy asks the original"
    assert torch.equal(gist.compress(twin, tokenizer, PROMPTS).states, states)
    remove(twin)
    assert current(twin) is None and torch.equal(logits(twin, ids, decoder_input_ids=said), plain)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in twin.modules())


@pytest.mark.parametrize("family", ["t5", "bart", "llama"])
def test_threads_share_a_model(family: str) -> None:
    """Some read a prompt, some go on after it, some read both together, all on one model."""
    model, tokenizer = prepared(encoder_decoder(family) if family != "llama" else decoder())
    asked = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    prompts = [PROMPTS[n % 2] + "!" * n for n in range(THREADS)]

    def answer(number: int) -> Tensor:
        ids = torch.tensor([gist.joined(model, tokenizer, prompts[number], TEXTS[number % 2])])
        whole = logits(model, ids, **({} if family == "llama" else {"decoder_input_ids": ids[:, :6]}))
        made = []
        for text in TEXTS:
            held = gist.compress(model, tokenizer, prompts[number])
            made.append(model.generate(**held.inputs(model, tokenizer, text), **asked)[:, -6:])
        return torch.cat((whole[0, -6:].flatten(), torch.cat(made).flatten()))

    assert_threads_get_what_each_gets_alone(answer)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_forward_in_the_midst_of_another(family: str) -> None:
    """Of a prompt that is being compressed, and of a text that has gist tokens."""
    model, tokenizer = prepared(encoder_decoder(family))
    layer = gist_encoder.layers_of(model.get_encoder())[0]
    ids, said = torch.tensor([gist.joined(model, tokenizer, PROMPTS[0], TEXTS[0])]), torch.tensor([[0, 50, 60]])
    plain = ids.masked_fill(ids == gist.method_on(model).id, 7)
    held, wanted = gist.compress(model, tokenizer, PROMPTS[0]).states, logits(model, ids, decoder_input_ids=said)

    def other() -> Tensor:
        return logits(model, plain, decoder_input_ids=said)

    assert torch.equal(in_the_midst(layer, lambda: logits(model, ids, decoder_input_ids=said), other), wanted)
    got = in_the_midst(layer, other, lambda: gist.compress(model, tokenizer, PROMPTS[0]))
    assert torch.equal(got, other())
    assert torch.equal(gist.compress(model, tokenizer, PROMPTS[0]).states, held)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_checkpoints_after_another_forward(family: str) -> None:
    model, tokenizer = prepared(encoder_decoder(family))
    texts = [torch.tensor([gist.joined(model, tokenizer, PROMPTS[0] + "!" * n, TEXTS[n])]) for n in (0, 1)]
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    assert_checkpoints_change_no_gradient(
        model, *(lambda ids=ids: model(input_ids=ids, labels=ids[:, :9]).loss for ids in texts)
    )


# The token, and what is saved


@pytest.mark.parametrize("family", ["llama", "tied", "gpt2"])
def test_a_new_row_is_the_mean_of_the_others(family: str) -> None:
    model = decoder(family)
    model.resize_token_embeddings(261, mean_resizing=False)  # as many as the tokenizer has
    before = [m.weight.detach().clone() for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    model, tokenizer = prepared(model)
    assert gist.method_on(model).id == 261 == len(tokenizer) - 1
    assert tokenizer.convert_ids_to_tokens(261) == gist.TOKEN == tokenizer.decode([261])
    for old, now in zip(before, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True):
        assert torch.equal(now.weight[:261], old)
        assert torch.allclose(now.weight[261], old.mean(0), atol=1e-7)


def test_a_learned_row_is_not_begun_anew() -> None:
    model, tokenizer = prepared(decoder())
    wanted = gist.method_on(model).id
    with torch.no_grad():
        model.get_input_embeddings().weight[wanted] += 1.0  # as a training would
    row = model.get_input_embeddings().weight[wanted].clone()
    for method in ("gist:tokens=1", "gist:tokens=2,mode=negative"):
        remove(model)
        apply(model, method, tokenizer=tokenizer)
        assert torch.equal(model.get_input_embeddings().weight[wanted], row)
    with pytest.raises(NotSupported, match="use gist:tokens=3,id=261"):
        apply(model, "gist:tokens=3")


def test_saved_with_the_model_and_on_it_again(tmp_path: Path) -> None:
    model, tokenizer = prepared(decoder(), "gist:tokens=2")
    with torch.no_grad():
        model.get_input_embeddings().weight[gist.method_on(model).id] += 1.0  # as a training would
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    again, its = ls.load(tmp_path / "m", device="cpu")
    assert gist.method_on(again) == gist.method_on(model) and current(again).spec == current(model).spec
    held = gist.compress(model, tokenizer, PROMPTS)
    gist.save(held, tmp_path / "held.safetensors", model)
    read = gist.load(tmp_path / "held.safetensors", again)
    given = read.inputs(again, its, TEXTS)
    asked = {"max_new_tokens": 5, "do_sample": False}
    out = again.generate(**given, **asked)
    assert torch.equal(out[:, -5:], model.generate(**held.inputs(model, tokenizer, TEXTS), **asked)[:, -5:])
    row = again.get_input_embeddings().weight[gist.method_on(again).id].clone()
    apply(again, "gist:tokens=2,mode=positive", tokenizer=its)  # a learned row is not begun anew
    assert torch.equal(row, again.get_input_embeddings().weight[gist.method_on(model).id])
    with torch.no_grad():
        again.model.norm.weight += 0.1
    apply(again, "gist:tokens=2", tokenizer=its)
    with pytest.raises(LongspanError, match="another model"):
        gist.load(tmp_path / "held.safetensors", again)
    (tmp_path / "no.safetensors").write_bytes(b"no")
    with pytest.raises(LongspanError, match="cannot be read"):
        gist.load(tmp_path / "no.safetensors", model)


def test_states_are_saved_too(tmp_path: Path) -> None:
    model, tokenizer = prepared(encoder_decoder("t5"))
    held = gist.compress(model, tokenizer, PROMPTS)
    gist.save(held, tmp_path / "held.safetensors", model)
    again = gist.load(tmp_path / "held.safetensors", model)
    assert isinstance(again, GistStates) and torch.equal(again.states, held.states)
    assert torch.equal(again.shift, held.shift)


def test_taken_off_the_model_is_as_before() -> None:
    model, tokenizer = prepared(decoder())
    ids = torch.tensor([gist.joined(model, tokenizer, PROMPTS[0], TEXTS[0])])
    remove(model)
    before = logits(model, ids)
    apply(model, "gist:tokens=3,id=261", tokenizer=tokenizer)
    remove(model)
    assert torch.equal(logits(model, ids), before)


# Refusals


def test_refusals() -> None:
    model, tokenizer = prepared(decoder())
    held = gist.compress(model, tokenizer, PROMPTS)
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(LongspanError, match="2 prompts cannot go before 3 texts"):
        held.inputs(model, tokenizer, ["a", "b", "c"])
    with pytest.raises(SpecError, match="empty"):
        held.inputs(model, tokenizer, ["a", ""])
    with pytest.raises(SpecError, match="empty"):
        gist.compress(model, tokenizer, [])
    with pytest.raises(SpecError, match="has <GIST> in it"):
        gist.compress(model, tokenizer, "Say<GIST>")
    with pytest.raises(NotSupported, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(NotSupported, match="DynamicCache"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=16), use_cache=True)
    with applied(model, "none"):
        filled = DynamicCache()
        model(ids, past_key_values=filled, use_cache=True)
        with pytest.raises(NotSupported, match="positions"):
            model(ids.repeat(2, 1), past_key_values=held.copy(), use_cache=True)
    with pytest.raises(NotSupported, match="filled while gist was not"):
        model(ids, past_key_values=filled, use_cache=True)
    apply(model, "gist:tokens=3,mode=negative", tokenizer=tokenizer)
    with pytest.raises(NotSupported, match="control"):
        gist.compress(model, tokenizer, PROMPTS)
    remove(model)
    with pytest.raises(NotSupported, match="no gist tokens"):
        gist.compress(model, tokenizer, PROMPTS)
    with pytest.raises(NotSupported, match="longspan train with method=gist:tokens=3"):
        apply(decoder(), "gist:tokens=3")
    with pytest.raises(NotSupported, match="which has 270"):
        apply(model, "gist:id=400")
    with pytest.raises(SpecError, match="id=3 is not <GIST>"):
        apply(model, "gist:id=3", tokenizer=tokenizer)
    with pytest.raises(NotSupported, match="no gist tokens"):
        gist.compress(apply(copy.deepcopy(model), "none", tokenizer=tokenizer), tokenizer, PROMPTS)
    for wrong in ("gist:tokens=0", "gist:mode=other", "gist:id=-1"):
        with pytest.raises(SpecError):
            apply(model, wrong)
    with pytest.raises(NotSupported, match="cannot be combined"):
        apply(model, "gist + streaming")


def test_a_learned_sink_is_refused() -> None:
    sunk = AutoModelForCausalLM.from_config(LongspanConfig(position="rope", sink="learned", **SIZES))
    with pytest.raises(NotSupported, match="sink"):
        apply(sunk, "gist", tokenizer=tiny.tokenizer())
