"""A document read once and asked often: the same logits and answers as reading again, through files, for every kind of cache."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import longspan as ls
import tiny
from longspan.generation import generate_text
from longspan.hf.compat import CACHE
from longspan.lm import LongspanConfig
from longspan.memory import gist, landmark
from longspan.memory.gist.method import joined, method_on
from longspan.memory.rmt import RMT, around
from longspan.reading.documents import document_ids
from longspan.util.errors import LongspanError, NotSupported, SpecError

SIZES: dict[str, Any] = {**tiny.SIZES, "max_position_embeddings": 256}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=9),
    "gemma3": Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 4, "head_dim": 8, "query_pre_attn_scalar": 8},
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "gpt2": GPT2Config(
        vocab_size=270, n_embd=32, n_layer=3, n_head=4, n_positions=128, eos_token_id=None, bos_token_id=0
    ),
    "ours": LongspanConfig(position="rope", **SIZES),
    "ours, window": LongspanConfig(position="rope", attention="window:size=8", **SIZES),
    "ours, linear": LongspanConfig(position="nope", attention="linear", **SIZES),
}
KINDS: dict[str, tuple[str, str]] = {
    "plain": ("llama", "none"),
    "sliding": ("mistral", "none"),
    "hybrid": ("gemma3", "none"),
    "learned positions": ("gpt2", "none"),
    "ours": ("ours", "none"),
    "ours, window": ("ours, window", "none"),
    "ours, linear": ("ours, linear", "none"),
    "scaled": ("llama", "yarn:factor=2"),
    "scaled streaming": ("llama", "ntk:factor=2 + streaming:sinks=2,window=12"),
    "streaming": ("llama", "streaming:sinks=2,window=12"),
    "streaming, wide": ("llama", "streaming:sinks=2,window=100"),
    "focused": ("llama", "focused:local=8,layers=1"),
    "focused, offload": ("llama", "focused:local=8,layers=1,offload=true"),
    "landmark": ("llama", "landmark:block=4,retrieve=2,local=8"),
    "landmark, offload": ("llama", "landmark:block=4,retrieve=2,local=8,offload=true"),
    "gist": ("llama", "gist:tokens=3"),
    "rmt": ("llama", "rmt:tokens=2,segment=8"),
    "rmt, whole segments": ("llama", "rmt:tokens=2,segment=15"),
}
TEXT = "It was the best of times, it was the worst."
SETTINGS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def model_of(kind: str = "plain", **more: Any) -> PreTrainedModel:
    family, method = KINDS[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]), **more)
    for name, weight in model.named_parameters():  # so that tokens matter to one another
        if weight.ndim == 2 and "wpe" not in name:
            torch.nn.init.normal_(weight, std=1.2 * weight.shape[-1] ** -0.5)
    if method.startswith("rmt"):
        settings = ls.methods()["rmt"]
        assert settings is RMT
        return around(model, RMT(2, int(method.rpartition("=")[2]))).eval()
    return ls.apply(model.eval(), method, tokenizer=tiny.tokenizer())


def question(text: str = " Who?") -> Tensor:
    return torch.tensor([tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]])


def read_again(model: PreTrainedModel, text: str) -> Tensor:
    """Ids of the document and a question, as they are read in one go."""
    tokenizer = tiny.tokenizer()
    if model.config.to_dict().get("gist_token_id") is not None and "gist" in str(getattr(model.config, "longspan", "")):
        return torch.tensor([joined(model, tokenizer, TEXT, text)])
    return torch.cat((torch.tensor([tokenizer(TEXT)["input_ids"]]), question(text)), dim=1)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_answers_are_those_of_reading_again(kind: str, tmp_path: Path) -> None:
    """From the memory and from its file, each asked twice; with a second question in between; with two rows and beams."""
    model, tokenizer = model_of(kind), tiny.tokenizer()
    book = ls.Memory.read(model, tokenizer, TEXT)
    book.save(tmp_path / "book.memory")
    again = ls.Memory.load(tmp_path / "book.memory", model)
    assert (again.tokens, again.method, again.nbytes) == (book.tokens, book.method, book.nbytes)
    assert again.tokens == len(tokenizer(TEXT)["input_ids"]) and again.nbytes > 0
    for memory, text in (
        (book, " Who?"),
        (again, " Who?"),
        (book, " And when?"),
        (again, " And when?"),
        (book, " Who?"),
    ):
        whole, new = read_again(model, text), question(text)
        given = memory.inputs(new)
        logits = model(new, attention_mask=given["attention_mask"], past_key_values=given[CACHE]).logits
        torch.testing.assert_close(logits, model(whole, use_cache=False).logits[:, -new.shape[1] :], **CLOSE)
        said = model.generate(**memory.inputs(new), **SETTINGS)[:, -8:]
        assert torch.equal(said, model.generate(whole, attention_mask=torch.ones_like(whole), **SETTINGS)[:, -8:])
        assert memory.ask(model, tokenizer, text, **SETTINGS) == tokenizer.decode(said[0], skip_special_tokens=True)
    rows = model.generate(**again.inputs(question().repeat(2, 1)), **SETTINGS)[:, -8:]
    assert torch.equal(rows[0], rows[1])
    assert len(model.generate(**again.inputs(question(), beams=2), num_beams=2, **SETTINGS)) == 1


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "hybrid", "streaming", "focused", "landmark", "gist", "rmt"])
def test_sixteen_bits_go_through_a_file_unchanged(kind: str, tmp_path: Path) -> None:
    model, tokenizer = model_of(kind).bfloat16(), tiny.tokenizer()
    book = ls.Memory.read(model, tokenizer, TEXT)
    book.save(tmp_path / "book.memory")
    again = ls.Memory.load(tmp_path / "book.memory", model)
    logits = [model(question(), past_key_values=m.inputs(question())[CACHE]).logits for m in (book, again)]
    assert torch.equal(*logits)
    wide = ls.Memory.load(tmp_path / "book.memory", copy.deepcopy(model).float())
    assert {x.dtype for x in wide.layers[0].__dict__.values() if isinstance(x, Tensor) and x.is_floating_point()} <= {
        torch.float32
    }


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_goes_from_one_dtype_to_another(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """With every tensor in the dtype that the model itself would keep it in: states stay wide."""
    wide, tokenizer = model_of(kind), tiny.tokenizer()
    narrow = copy.deepcopy(wide).to(dtype)
    for writer, reader in ((wide, narrow), (narrow, wide)):
        ls.Memory.read(writer, tokenizer, TEXT).save(tmp_path / "book.memory")
        again = ls.Memory.load(tmp_path / "book.memory", reader)
        assert len(again.ask(reader, tokenizer, " Who?", **SETTINGS)) > 0
        again.save(tmp_path / "again.memory")
        ls.Memory.read(reader, tokenizer, TEXT).save(tmp_path / "own.memory")
        assert dtypes_in(tmp_path / "again.memory") == dtypes_in(tmp_path / "own.memory")


def dtypes_in(path: Path) -> dict[str, torch.dtype]:
    with safe_open(str(path), "pt") as file:
        return {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118


@torch.no_grad()
def test_pieces_give_what_one_forward_gives() -> None:
    """Tokens of one forward, and what is told of progress."""
    for kind in ("plain", "hybrid", "streaming", "focused", "landmark", "rmt"):
        model, told = model_of(kind), []
        ids = torch.tensor(tiny.tokenizer()(TEXT)["input_ids"])
        parts = ls.Memory.read(model, None, ids, at_once=16, on_tokens=told.append)
        assert told == [16, 32, len(ids)]
        whole = ls.Memory.read(model, None, ids)
        logits = [model(question(), past_key_values=m.inputs(question())[CACHE]).logits for m in (parts, whole)]
        torch.testing.assert_close(*logits, **CLOSE)


def test_reading_leaves_training_modes_as_they_were() -> None:
    model = model_of("streaming").train()
    model.model.layers[1].eval()
    ls.Memory.read(model, tiny.tokenizer(), TEXT)
    assert model.training and not model.model.layers[1].training


# Refusals


def of_two_documents(path: Path) -> None:
    model = model_of("landmark")
    landmark.save(landmark.read(model, tiny.tokenizer(), [TEXT, TEXT[::-1]]), path, model)


def cut_short(path: Path) -> None:
    ls.Memory.read(model_of(), tiny.tokenizer(), TEXT).save(path)
    path.write_bytes(path.read_bytes()[:-100])


def no_memory(path: Path) -> None:
    save_file({"x": torch.ones(1)}, str(path))


def of_a_trained_model(path: Path) -> None:
    model = model_of()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight *= 1.01
    ls.Memory.read(model, tiny.tokenizer(), TEXT).save(path)


def of_other_frequencies(path: Path) -> None:
    model = model_of()
    model.config.rope_parameters["rope_theta"] = 5e4
    ls.Memory.read(model, tiny.tokenizer(), TEXT).save(path)


def under(kind: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        ls.Memory.read(model_of(kind), tiny.tokenizer(), TEXT).save(path)

    return write


@pytest.mark.parametrize(
    ("write", "kind", "said"),
    [
        (cut_short, "plain", "cannot be read as a memory.*cut short"),
        (no_memory, "plain", "holds no memory"),
        (of_a_trained_model, "plain", "of another model"),
        (of_other_frequencies, "plain", "of another model"),
        (under("streaming"), "plain", "was read under streaming:sinks=2,window=12, and the model has none on it"),
        (under("plain"), "streaming", "was read under none, and the model has streaming:sinks=2,window=12 on it"),
        (under("focused"), "landmark", "was read under focused:"),
        (under("streaming"), "streaming, wide", "other settings"),
        (under("scaled"), "plain", "of another model|other settings"),
        (of_two_documents, "landmark", "holds 2 documents; load them with longspan.memory.landmark.load"),
    ],
)
def test_a_file_of_something_else_is_refused(
    write: Callable[[Path], None], kind: str, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "book.memory"
    write(path)
    with pytest.raises(LongspanError, match=said):
        ls.Memory.load(path, model_of(kind))


def test_what_cannot_be_read_is_refused_before_it_is() -> None:
    tokenizer, seen = tiny.tokenizer(), []
    torch.manual_seed(0)
    linear = AutoModelForCausalLM.from_config(
        Lfm2Config(**SIZES, layer_types=["conv", "full_attention", "conv"], conv_L_cache=3)
    )
    linear.get_input_embeddings().register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
    with pytest.raises(NotSupported, match=r"cannot be kept as a memory|does not return a KV cache"):
        ls.Memory.read(linear, tokenizer, TEXT)
    assert max(seen) == 1
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    with pytest.raises(NotSupported, match="has an encoder"):
        ls.Memory.read(T5ForConditionalGeneration(T5Config(vocab_size=270, **sizes)), tokenizer, TEXT)
    sunk = AutoModelForCausalLM.from_config(LongspanConfig(position="rope", sink="learned", **SIZES))
    with pytest.raises(NotSupported, match="does not return a KV cache of the tokens"):
        ls.Memory.read(sunk, tokenizer, TEXT)
    model = model_of()
    for wrong, said in (("", "at least one token"), (torch.ones(2, 3, dtype=torch.long), "one document")):
        if isinstance(wrong, str):
            wrong = torch.zeros(0, dtype=torch.long)
        with pytest.raises(SpecError, match=said):
            ls.Memory.read(model, tokenizer, wrong)
    book = ls.Memory.read(model, tokenizer, TEXT)
    with pytest.raises(SpecError, match="question is empty"):
        book.inputs(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(NotSupported, match="is a control"):
        ls.Memory.read(ls.apply(model, "gist:mode=negative", tokenizer=tokenizer), tokenizer, TEXT)
    with pytest.raises(LongspanError, match="no longer has none on it"):
        book.save("never.memory")


@torch.no_grad()
def test_a_memory_is_of_the_model_as_it_was(tmp_path: Path) -> None:
    """It is neither asked nor saved with another one, or with this one trained since."""
    model, tokenizer = model_of(), tiny.tokenizer()
    book, other = ls.Memory.read(model, tokenizer, TEXT), copy.deepcopy(model)
    assert book.ask(other, tokenizer, " Who?", **SETTINGS) == book.ask(model, tokenizer, " Who?", **SETTINGS)
    other.model.layers[0].self_attn.q_proj.weight *= 1.01
    with pytest.raises(LongspanError, match="of another model"):
        book.ask(other, tokenizer, " Who?", **SETTINGS)
    with pytest.raises(LongspanError, match="of another model"):
        generate_text(other, tokenizer, "Who?", memory=book)
    model.model.layers[0].self_attn.q_proj.weight *= 1.01
    with pytest.raises(LongspanError, match="trained further"):
        book.save(tmp_path / "book.memory")
    with pytest.raises(LongspanError, match="read under none, and the model has yarn:factor=2 on it"):
        book.ask(ls.apply(model, "yarn:factor=2"), tokenizer, " Who?", **SETTINGS)


@torch.no_grad()
def test_a_row_that_was_trained_alone_makes_another_model(tmp_path: Path) -> None:
    """Of a large vocabulary, most of whose rows the fingerprint does not look at."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**SIZES, "vocab_size": 5000, "hidden_size": 32}))
    ls.apply(model.eval(), "gist:tokens=3", tokenizer=tiny.tokenizer())
    ls.Memory.read(model, tiny.tokenizer(), TEXT).save(tmp_path / "book.memory")
    model.get_input_embeddings().weight[method_on(model).id, 1:] *= 1.5
    with pytest.raises(LongspanError, match="of another model"):
        ls.Memory.load(tmp_path / "book.memory", model)


@torch.no_grad()
def test_a_question_ends_the_message_that_a_document_began() -> None:
    model, tokenizer = model_of(), tiny.tokenizer()
    ids = document_ids(model, tokenizer, TEXT, chat=True)
    book = ls.Memory.read(model, None, torch.tensor(ids), chat=True)
    answer = generate_text(model, tokenizer, "Who?", memory=book, max_new_tokens=8)
    whole = torch.tensor([[*ids, *book.question_ids(tokenizer, "Who?")]])
    assert book.ask(model, tokenizer, "Who?", **SETTINGS) == answer.text
    assert tokenizer.decode(whole[0]).endswith("Who?</s>\n<|assistant|>")
    said = model.generate(whole, attention_mask=torch.ones_like(whole), **SETTINGS)[0, whole.shape[1] :]
    assert tokenizer.decode(said, skip_special_tokens=True) == answer.text


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "sliding", "streaming", "focused", "landmark", "gist"])
def test_beams_are_named_in_both_calls(kind: str) -> None:
    """`ask` names them by itself."""
    model, tokenizer = model_of(kind), tiny.tokenizer()
    book = ls.Memory.read(model, tokenizer, TEXT)
    with pytest.raises(NotSupported, match="a cache of 1 rows does not go with 3 rows of input"):
        model.generate(**book.inputs(question()), num_beams=3, **SETTINGS)
    said = model.generate(**book.inputs(question(), beams=3), num_beams=3, **SETTINGS)[0, -8:]
    assert book.ask(model, tokenizer, " Who?", num_beams=3, **SETTINGS) == tokenizer.decode(
        said, skip_special_tokens=True
    )


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ("", "the document is empty"),
        ([5, 6], "not list"),
        (torch.tensor([5.0, 6.0]), "not torch.float32"),
        (torch.tensor([5, 999]), "ids from 5 to 999, and the model's are from 0 to 269"),
        (torch.tensor([-1, 5]), "ids from -1 to 5"),
    ],
)
def test_a_document_that_is_none_is_refused(document: Any, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        ls.Memory.read(model_of(), tiny.tokenizer(), document)


def test_counts_below_one_are_refused() -> None:
    model, tokenizer = model_of(), tiny.tokenizer()
    with pytest.raises(SpecError, match="at_once must be at least 1 token, not 0"):
        ls.Memory.read(model, tokenizer, TEXT, at_once=0)
    with pytest.raises(SpecError, match="beams must be at least 1, not 0"):
        ls.Memory.read(model, tokenizer, TEXT).inputs(question(), beams=0)


# Files of earlier versions


def rewritten(path: Path, metadata: dict[str, str], names: dict[str, str], left_out: tuple[str, ...] = ()) -> None:
    """The file with an earlier version's metadata and names of tensors."""
    with safe_open(str(path), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name not in left_out}  # noqa: SIM118
    for old, new in names.items():
        tensors = {name.removesuffix(old) + new if name.endswith(old) else name: x for name, x in tensors.items()}
    save_file(tensors, str(path), metadata=metadata)


def digest_of_vectors(model: PreTrainedModel, name: str, id: int, *, sorts: bool) -> str:
    vectors = sorted(((n, p) for n, p in model.named_parameters() if p.ndim == 1), key=lambda one: one[0])
    named = [(name, model.get_input_embeddings().weight[id]), *vectors]
    total = hashlib.sha256()
    for key, vector in sorted(named, key=lambda one: one[0]) if sorts else named:
        total.update(f"{key} {tuple(vector.shape)}\n".encode())
        total.update(vector.detach().bfloat16().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@torch.no_grad()
def test_a_file_of_focused_from_before(tmp_path: Path) -> None:
    model, path = model_of("focused"), tmp_path / "book.safetensors"
    book = ls.Memory.read(model, tiny.tokenizer(), TEXT)
    book.save(path)
    with safe_open(str(path), "pt") as file:
        weights = file.metadata()["model"]
    settings = "local=8,layers=1,k=None,positions=first"
    rewritten(path, {"longspan": "focused memory", "settings": settings, "model": weights}, {})
    again = ls.Memory.load(path, model)
    assert (again.tokens, again.nbytes) == (book.tokens, book.nbytes)
    assert again.ask(model, tiny.tokenizer(), " Who?", **SETTINGS) == book.ask(
        model, tiny.tokenizer(), " Who?", **SETTINGS
    )
    with pytest.raises(LongspanError, match="other settings"):
        ls.Memory.load(path, ls.apply(model, "focused:local=8,layers=2"))


@torch.no_grad()
def test_a_file_of_landmark_from_before(tmp_path: Path) -> None:
    model, tokenizer, path = model_of("landmark"), tiny.tokenizer(), tmp_path / "book.safetensors"
    id = landmark.method.reader_on(model).method.id
    landmark.save(landmark.read(model, tokenizer, TEXT), path, model)
    spec = f"landmark:block=4,retrieve=2,local=8,id={id}"
    made_by = digest_of_vectors(model, "landmark", id, sorts=False)
    rewritten(
        path, {"longspan": "landmark memory", "method": spec, "model": made_by}, {"key": "keys", "value": "values"}
    )
    expected = ls.Memory.read(model, tokenizer, TEXT).ask(model, tokenizer, " Who?", **SETTINGS)
    assert ls.Memory.load(path, model).ask(model, tokenizer, " Who?", **SETTINGS) == expected
    given = landmark.load(path, model).inputs(model, tokenizer, " Who?")
    assert tokenizer.decode(model.generate(**given, **SETTINGS)[0, -8:], skip_special_tokens=True) == expected
    model.model.norm.weight.add_(1)
    with pytest.raises(LongspanError, match="another model"):
        landmark.load(path, model)


@torch.no_grad()
def test_a_file_of_gist_from_before(tmp_path: Path) -> None:
    model, tokenizer, path = model_of("gist"), tiny.tokenizer(), tmp_path / "book.safetensors"
    gist.save(gist.compress(model, tokenizer, TEXT), path, model)
    method = method_on(model)
    made_by = digest_of_vectors(model, "gist", method.id, sorts=True)
    rewritten(path, {"longspan": "gist tokens", "method": method.spec, "model": made_by}, {})
    expected = ls.Memory.read(model, tokenizer, TEXT).ask(model, tokenizer, " Who?", **SETTINGS)
    assert ls.Memory.load(path, model).ask(model, tokenizer, " Who?", **SETTINGS) == expected
    assert len(gist.load(path, model)) == 1
    model.model.norm.weight.add_(1)
    with pytest.raises(LongspanError, match="another model"):
        gist.load(path, model)


def test_the_metadata_says_what_reads_a_file(tmp_path: Path) -> None:
    model = model_of("scaled streaming")
    ls.Memory.read(model, tiny.tokenizer(), TEXT).save(tmp_path / "book.memory")
    with safe_open(str(tmp_path / "book.memory"), "pt") as file:
        told, names = file.metadata(), set(file.keys())
    assert told["longspan"] == "memory" and told["version"] == ls.__version__ and told["kind"] == "streaming"
    assert told["method"] == "ntk:factor=2 + streaming:sinks=2,window=12" and told["dtype"] == "float32"
    assert int(told["tokens"]) == len(tiny.tokenizer()(TEXT)["input_ids"])
    assert [layer["kind"] for layer in json.loads(told["layers"])] == ["rolling"] * 3
    assert names == {"ids", *(f"{n}.{part}" for n in range(3) for part in ("key", "value", "sink_key"))}
