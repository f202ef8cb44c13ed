"""Memory layers against a plain form in float64, any cut of a text, padding, generation, files, and crossbatch's gradients."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import longspan as ls
import tiny
from longspan.core.facts import facts_of
from longspan.core.method import combination, parse
from longspan.engine.retrieval import crossbatch, memories
from longspan.hf.call import LayerCall
from longspan.hf.compat import CACHE, cache_of
from longspan.hf.rotary import rotate
from longspan.hf.site import Site, layer_number
from longspan.memory.document import Memory
from longspan.memory.focused.method import Focused, reader_of
from longspan.util.errors import LongspanError, NotSupported, SpecError
from shared_model import assert_checkpoints_change_no_gradient

LOCAL = 8
SPEC = f"focused:local={LOCAL},layers=1/2"


def model(layers: int = 4, kind: str = "llama", dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    torch.manual_seed(0)
    config, cls = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[kind]
    made = cls(
        config(
            **tiny.sizes(128, 64, 96, layers, 4, 2),
            head_dim=16,
            max_position_embeddings=128,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=0,
            **more,
        )
    )
    for parameter in made.parameters():  # so that attention is not flat
        if parameter.ndim == 2:
            parameter.data *= 4
    return made.to(dtype).eval()


def ids(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(2, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def plain(made: Any, tokens: Tensor, layers: tuple[int, ...], *, k: int | None = None, none: bool = False) -> Tensor:
    """Logits by the formula, every score held at once: a key of the same context at its place, an earlier one at place 0."""
    site = Site(made, combination("none"), facts_of(made))
    site.unrotate()
    length = tokens.shape[1]
    place = torch.arange(length) % LOCAL
    context = torch.arange(length) // LOCAL
    same, before = (context[:, None] == context), (context[:, None] > context)
    causal = torch.ones(length, length, dtype=torch.bool).tril()

    def attend(call: LayerCall) -> Tensor:
        number = layer_number(call.module)
        tables = site.rotary.tables(place[None], call.query)
        key, value = (x.repeat_interleave(2, dim=1) for x in (call.key, call.value))
        if none and number in layers:
            query = turned = call.query
            turned = key
        else:
            query, turned = rotate(call.module, call.query, *tables), rotate(call.module, key, *tables)
        near, far = query @ turned.mT * call.scale, query @ key.mT * call.scale
        scores = torch.where(same, near, far)
        seen = same & causal
        if number in layers:
            seen = seen | before if k is None else seen | _best(far, before, k)
        return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value

    return _logits_under(site, attend, tokens)


def _logits_under(site: Site, attend: Any, tokens: Tensor) -> Tensor:
    """Logits of the site's model where every layer's attention is `attend`; nothing stays on the model."""
    site.attention(attend, own_mask=True)
    try:
        with torch.no_grad():
            return site.model(tokens, use_cache=False).logits
    finally:
        site.undo()


def _best(scores: Tensor, before: Tensor, k: int) -> Tensor:
    """Boolean: the k best of the earlier keys for each query."""
    masked = scores.masked_fill(~before, float("-inf"))
    index = masked.topk(min(k, masked.shape[-1]), dim=-1).indices
    return torch.zeros_like(before.expand_as(scores)).scatter(-1, index, True) & before


@torch.no_grad()
def in_pieces(made: Any, tokens: Tensor, sizes: list[int], mask: Tensor | None = None) -> Tensor:
    cache, parts, at = DynamicCache(), [], 0
    for size in sizes:
        seen = None if mask is None else mask[:, : at + size]
        parts.append(made(tokens[:, at : at + size], past_key_values=cache, attention_mask=seen).logits)
        at += size
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_dense_memory_is_the_formula(kind: str) -> None:
    made, tokens = model(kind=kind), ids(2, 37)
    wanted = plain(made, tokens, (1, 2))
    ls.apply(made, SPEC)
    with torch.no_grad():
        got = made(tokens, use_cache=False).logits
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    assert (wanted - plain_of(made, tokens)).abs().max() > 1e-2  # and not the model as it is


def plain_of(made: Any, tokens: Tensor) -> Tensor:
    ls.remove(made)
    with torch.no_grad():
        return made(tokens, use_cache=False).logits


@pytest.mark.parametrize("sizes", [[37], [1] * 37, [5, 20, 1, 1, 10], [8, 8, 8, 8, 5], [30, 7]])
@pytest.mark.parametrize("more", ["", ",offload=true", ",k=5", ",k=5,offload=true"])
def test_any_pieces(sizes: list[int], more: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memories, "BLOCK", 6)  # many blocks, of which the last is not full
    made, tokens = model(), ids(2, 37)
    wanted = plain(made, tokens, (1, 2), k=5 if "k=" in more else None)
    ls.apply(made, SPEC + more)
    torch.testing.assert_close(in_pieces(made, tokens, sizes), wanted, rtol=1e-10, atol=1e-10)


def scaled() -> Any:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    return model(rope_parameters=rope)


def first_by_rotation(made: Any, tokens: Tensor, layers: tuple[int, ...]) -> Tensor:
    """Logits where every earlier key is rotated to place 0 by the model's own angles, whatever these are."""
    site = Site(made, combination("none"), facts_of(made))
    site.unrotate()
    length = tokens.shape[1]
    context = torch.arange(length) // LOCAL
    same, before = (context[:, None] == context), (context[:, None] > context)
    causal = torch.ones(length, length, dtype=torch.bool).tril()

    def attend(call: LayerCall) -> Tensor:
        places = (torch.arange(length) % LOCAL)[None]
        own, first = (site.rotary.tables(p, call.query) for p in (places, places * 0))
        key, value = (x.repeat_interleave(2, dim=1) for x in (call.key, call.value))
        query = rotate(call.module, call.query, *own)
        near, far = (query @ rotate(call.module, key, *tables).mT * call.scale for tables in (own, first))
        seen = (same & causal) | before if layer_number(call.module) in layers else same & causal
        return torch.where(same, near, far).masked_fill(~seen, float("-inf")).softmax(-1) @ value

    return _logits_under(site, attend, tokens)


@pytest.mark.parametrize("more", ["", ",k=100"])
def test_the_factor_of_a_scaled_model_is_in_its_memory_too(more: str) -> None:
    made, tokens = scaled(), ids(3, 2 * LOCAL)
    assert made.model.rotary_emb.attention_scaling > 1.1
    wanted = first_by_rotation(made, tokens, (1, 2))
    ls.apply(made, SPEC + more)
    torch.testing.assert_close(in_pieces(made, tokens, [11, 5]), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(crossed(made, tokens, 1), wanted, rtol=1e-6, atol=1e-6)


def test_positions_none() -> None:
    made, tokens = model(), ids(1, 30)
    wanted = plain(made, tokens, (1, 2), none=True)
    ls.apply(made, SPEC + ",positions=none")
    torch.testing.assert_close(in_pieces(made, tokens, [20, 10]), wanted, rtol=1e-10, atol=1e-10)


def test_faiss_finds_the_same() -> None:
    pytest.importorskip("faiss")
    made, tokens = model(dtype=torch.float32), ids(2, 60)
    ls.apply(made, SPEC + ",k=5")
    wanted = in_pieces(made, tokens, [50, 4, 6])
    ls.apply(made, SPEC + ",k=5,search=faiss")
    torch.testing.assert_close(in_pieces(made, tokens, [50, 4, 6]), wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(in_pieces(made, tokens, [60]), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("more", ["", ",k=3", ",offload=true"])
def test_a_padded_row_is_the_row_alone(more: str) -> None:
    made = model()
    ls.apply(made, SPEC + more)
    rows = [ids(1, n, seed=n) for n in (33, 29, 20)]
    tokens, mask = torch.zeros(3, 33, dtype=torch.long), torch.zeros(3, 33, dtype=torch.long)
    for number, row in enumerate(rows):
        tokens[number, 33 - row.shape[1] :], mask[number, 33 - row.shape[1] :] = row[0], 1
    for sizes in ([33], [3, 20, 1, 9]):
        together = in_pieces(made, tokens, sizes, mask)
        for number, row in enumerate(rows):
            alone = in_pieces(made, row, [row.shape[1]])
            torch.testing.assert_close(together[number : number + 1, 33 - row.shape[1] :], alone)


def test_short_inputs_are_the_model_and_remove_gives_it_back() -> None:
    made, tokens = model(), ids(2, LOCAL)
    before = made(tokens).logits
    ls.apply(made, SPEC)
    torch.testing.assert_close(made(tokens).logits, before)
    ls.remove(made)
    assert torch.equal(made(tokens).logits, before)


def test_generate_over_contexts_beams_and_turns() -> None:
    made = model()
    ls.apply(made, SPEC)
    tokens, mask = ids(2, 21), torch.ones(2, 21, dtype=torch.long)
    mask[1, :6] = 0
    said = made.generate(
        tokens, attention_mask=mask, max_new_tokens=14, do_sample=False, return_dict_in_generate=True, eos_token_id=None
    )
    whole = said.sequences
    for row, pad in ((0, 0), (1, 6)):
        with torch.no_grad():
            logits = made(whole[row : row + 1, pad:], use_cache=False).logits
        assert logits[0, 20 - pad : -1].argmax(-1).tolist() == whole[row, 21:].tolist()
    again = torch.cat((whole, ids(2, 9, seed=5)), dim=1)
    longer = torch.cat((mask, torch.ones(2, 23, dtype=torch.long)), dim=1)
    settings = {"attention_mask": longer, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    turn = made.generate(again, past_key_values=said.past_key_values, **settings)
    assert torch.equal(turn, made.generate(again, **settings))
    beams = {"num_beams": 3, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(made.generate(tokens, **beams), made.generate(tokens, **beams, use_cache=False))


@pytest.mark.parametrize("more", ["", ",k=5", ",k=5,search=faiss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pieces_under_autocast_and_across_its_end(dtype: torch.dtype, more: str) -> None:
    """Angles are float32 there, and so are the keys that a cache takes in, beside values of 16 bits."""
    if "faiss" in more:
        pytest.importorskip("faiss")
    made, tokens = model(dtype=torch.float32), ids(2, 40)
    ls.apply(made, SPEC + more)
    whole = made(tokens, use_cache=False).logits

    def piece(part: slice, cache: Any) -> Any:
        with torch.no_grad():
            return made(tokens[:, part], use_cache=True, **({} if cache is None else {CACHE: cache}))

    with torch.autocast("cpu", dtype=dtype):
        read = piece(slice(0, 25), None)
        parts, cache = [read.logits], cache_of(read)
        parts += [piece(slice(at, at + 1), cache).logits for at in range(25, 33)]
    parts.append(piece(slice(33, 40), cache).logits)
    got = torch.cat([part.float() for part in parts], dim=1)
    assert (got - whole).norm() / whole.norm() < 0.05


def test_what_grows_is_the_memory_of_its_layers() -> None:
    made = model()
    ls.apply(made, SPEC)
    cache = DynamicCache()
    with torch.no_grad():
        made(ids(1, 99), past_key_values=cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == [99 % LOCAL] * 4
    assert [layer.store.length if layer.store else 0 for layer in cache.layers] == [0, 96, 96, 0]


# A document that is read once


def test_a_memory_is_read_once_and_asked_often(tmp_path: Path) -> None:
    made, document = model(), ids(1, 43)
    ls.apply(made, SPEC)
    held = Memory.of(made, document)
    held.save(tmp_path / "book.safetensors")
    kept = Memory.load(tmp_path / "book.safetensors", made)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    for seed, memory in ((3, held), (4, kept), (3, held), (3, kept)):
        question = ids(2, 7, seed=seed)
        whole = torch.cat((document.expand(2, -1), question), dim=1)
        wanted = made.generate(whole, attention_mask=torch.ones_like(whole), **settings)
        got = made.generate(**memory.inputs(question), **settings)
        assert torch.equal(got, wanted)
    assert held.nbytes == kept.nbytes > 0


def test_a_memory_of_another_model_or_setting_is_refused(tmp_path: Path) -> None:
    made = model()
    ls.apply(made, SPEC)
    path = tmp_path / "book.safetensors"
    Memory.of(made, ids(1, 20)).save(path)
    with pytest.raises(LongspanError, match="other settings"):
        Memory.load(path, ls.apply(made, f"focused:local={LOCAL},layers=2"))
    ls.apply(made, SPEC)
    made.model.layers[0].self_attn.q_proj.weight.data *= 1.01
    with pytest.raises(LongspanError, match="another model"):
        Memory.load(path, made)
    path.write_bytes(b"no tensors")
    with pytest.raises(LongspanError, match="cannot be read"):
        Memory.load(path, made)
    ls.remove(made)
    with pytest.raises(NotSupported, match="no memory"):
        Memory.of(made, ids(1, 20))


def test_another_process_reads_it(tmp_path: Path) -> None:
    made = model(dtype=torch.float32)
    made.save_pretrained(tmp_path / "model")
    ls.apply(made, SPEC)
    Memory.of(made, ids(1, 43)).save(tmp_path / "book.safetensors")
    code = (
        "import sys, torch, longspan as ls\n"
        "from transformers import AutoModelForCausalLM\n"
        "from longspan.memory.document import Memory\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        f"ls.apply(model, '{SPEC}')\n"
        "memory = Memory.load(sys.argv[2], model)\n"
        "given = memory.inputs(torch.tensor([[5, 6, 7]]))\n"
        "said = model.generate(**given, max_new_tokens=8, do_sample=False, eos_token_id=None)\n"
        "print(said[0, -8:].tolist())\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model"), str(tmp_path / "book.safetensors")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1]
    whole = torch.cat((ids(1, 43), torch.tensor([[5, 6, 7]])), dim=1)
    wanted = made.generate(
        whole, attention_mask=torch.ones_like(whole), max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    assert told == str(wanted[0, -8:].tolist())


# Crossbatch


def crossed(made: Any, tokens: Tensor, d: int, padding: Tensor | None = None) -> Tensor:
    ls.apply(made, f"{SPEC},d={d}")
    made.train()
    return made(tokens, use_cache=False, attention_mask=padding).logits


def test_one_context_is_the_memory_of_two() -> None:
    made, tokens = model(), ids(3, 2 * LOCAL)
    wanted = plain(made, tokens, (1, 2))
    torch.testing.assert_close(crossed(made, tokens, 1), wanted, rtol=1e-10, atol=1e-10)


def test_training_is_crossbatch_with_the_models_own_defaults_too() -> None:
    """A Trainer that is not ours leaves use_cache to the configuration, where it is on."""
    made, tokens = model(), ids(3, 2 * LOCAL)
    wanted = crossed(made, tokens, 3)
    output = made(tokens)
    assert output.past_key_values is None
    torch.testing.assert_close(output.logits, wanted)
    with pytest.raises(NotSupported, match=f"leave {CACHE} out"):
        made(tokens, past_key_values=DynamicCache())
    with torch.no_grad():  # as generate does between two steps of a training
        made(tokens, past_key_values=DynamicCache())


def test_gradients_reach_the_negatives_and_no_other_row() -> None:
    made = model()
    for d, reached in ((1, {0}), (2, {0, 1}), (3, {0, 1, 2})):
        ls.apply(made, f"{SPEC},d={d}")
        made.train()
        inputs = made.get_input_embeddings()(ids(4, 2 * LOCAL)).detach().requires_grad_()
        made(inputs_embeds=inputs, use_cache=False).logits[0, LOCAL:].square().sum().backward()
        moved = {row for row in range(4) if inputs.grad[row].abs().sum() > 0}
        assert moved == reached
        assert not inputs.grad[1:, LOCAL:].any()  # only earlier contexts


def test_crossbatch_by_its_formula() -> None:
    """The attention of one layer: own context at its places, d earlier contexts at place 0."""

    g = torch.Generator().manual_seed(0)
    q = torch.randn(3, 4, 5, 16, dtype=torch.float64, generator=g)
    k, v, far_k, far_v = (torch.randn(3, 2, 5, 16, dtype=torch.float64, generator=g) for _ in range(4))
    real = torch.ones(3, 5, dtype=torch.bool)
    for padded in (False, True):
        if padded:
            real[1, 3:] = False
        got = crossbatch.attend(
            q, k, v, crossbatch.Others(far_k, far_v, 2, real if padded else None), real if padded else None, 0.25
        )
        for row in range(3):
            other = (row + 1) % 3
            keys = torch.cat((far_k[row], far_k[other], k[row]), dim=1).repeat_interleave(2, dim=0)
            values = torch.cat((far_v[row], far_v[other], v[row]), dim=1).repeat_interleave(2, dim=0)
            seen = torch.cat((real[row], real[other], real[row]))[None] & torch.ones(5, 15).tril(10).bool()
            wanted = (q[row] @ keys.mT * 0.25).masked_fill(~seen, float("-inf")).softmax(-1) @ values
            torch.testing.assert_close(got[row], wanted)


def test_padding_at_the_end_changes_nothing() -> None:
    made, tokens = model(), ids(3, 2 * LOCAL)
    mask = torch.ones_like(tokens)
    mask[1, 5:], mask[2, 13:] = 0, 0
    first = crossed(made, tokens, 3, mask)
    other = torch.where(mask.bool(), tokens, 7)
    second = crossed(made, other, 3, mask)
    torch.testing.assert_close(first[mask.bool()], second[mask.bool()])


# Settings and refusals


def test_default_layers_are_the_papers() -> None:
    facts = facts_of(model(layers=4))
    chosen = {n: Focused().resolve(replace(facts, layers=n), None).layers for n in (1, 2, 12, 26, 32)}
    assert chosen == {1: "0", 2: "1", 12: "3/6/9", 26: "6/12/18", 32: "8/16/24"}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("focused:layers=6,12", "key=value"),
        ("focused:layers=a/b", "numbers"),
        ("focused:late=8", "both"),
        ("focused:search=faiss", "without k"),
        ("focused:local=0", "at least 1"),
        ("focused + streaming", "cannot be combined"),
    ],
)
def test_wrong_settings(spec: str, said: str) -> None:
    with pytest.raises(LongspanError, match=said):
        parse(spec)


def test_refusals() -> None:
    made = model()
    for spec, said in (("focused:layers=9", "no layer 9"), ("focused:local=1k", "use local=128")):
        with pytest.raises(SpecError, match=said):
            ls.apply(made, spec)
    ls.apply(made, SPEC)
    with pytest.raises(NotSupported, match="positions jump"):
        made(ids(1, 8), position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]))
    mask = torch.ones(1, 8, dtype=torch.long)
    mask[0, 4] = 0
    with pytest.raises(NotSupported, match="between its tokens"):
        made(ids(1, 8), attention_mask=mask)
    mask[0, 4:] = 0
    with pytest.raises(NotSupported, match="padding_side"):
        made(ids(1, 8), attention_mask=mask, past_key_values=DynamicCache())
    with pytest.raises(NotSupported, match="meets as many documents"):
        crossed(made, ids(2, 2 * LOCAL), 3)


def test_a_forward_that_runs_again_is_at_its_own_step() -> None:
    """The number of contexts grows between two forwards whose backward passes come later."""
    made = ls.apply(model(), f"{SPEC},d=1,late=2,after=1").train()
    reader = reader_of(made)

    def loss(step: int) -> Tensor:
        reader.step = step
        return made(ids(2, 24, seed=step), labels=ids(2, 24, seed=step)).loss

    assert_checkpoints_change_no_gradient(made, partial(loss, 0), partial(loss, 1))
    reader.step = 0
    with torch.no_grad():
        one, two = loss(0), made(ids(2, 24, seed=0), labels=ids(2, 24, seed=0)).loss
        reader.step = 1
        assert one == two != made(ids(2, 24, seed=0), labels=ids(2, 24, seed=0)).loss
