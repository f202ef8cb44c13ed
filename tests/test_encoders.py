"""BERT and RoBERTa as Longformer and BigBird: alike on what they read before, read by transformers alone, longer after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    CamembertConfig,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    XLMRobertaConfig,
)

import tiny
from longspan.cli.main import run
from longspan.export import export, longer_encoder
from longspan.util.errors import NotSupported, SpecError

SIZES: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**SIZES, max_position_embeddings=24),
    "roberta": RobertaConfig(**SIZES, max_position_embeddings=26),
    "xlm-roberta": XLMRobertaConfig(**SIZES, max_position_embeddings=26),
    "camembert": CamembertConfig(**SIZES, max_position_embeddings=26),
}
SPECS = ["longformer:window=64", "bigbird:block=4,random=1"]
families = pytest.mark.parametrize("family", CONFIGS)
specs = pytest.mark.parametrize("spec", SPECS)


def encoder(family: str, auto: Any = AutoModel) -> PreTrainedModel:
    torch.manual_seed(3)
    model = auto.from_config(CONFIGS[family]).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.2)
    return model


def ids() -> tuple[Tensor, Tensor]:
    text = torch.randint(5, 264, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(text)
    mask[0, 17:] = 0
    return text, mask


@families
@specs
@torch.no_grad()
def test_reads_as_before_within_the_old_window(family: str, spec: str) -> None:
    """Hidden states of every layer, with padding; with a global token too, since its projections are copies."""
    model, (text, mask) = encoder(family), ids()
    text[0, 17:] = model.config.pad_token_id
    made = longer_encoder(model, spec, length=96)
    wanted = model(text, attention_mask=mask, output_hidden_states=True)
    more = {}
    if spec.startswith("longformer"):
        more["global_attention_mask"] = torch.zeros_like(text)
        more["global_attention_mask"][:, 0] = 1
    for given in ({}, more):
        got = made(text, attention_mask=mask, output_hidden_states=True, **given)
        for ours, theirs in zip(got.hidden_states, wanted.hidden_states, strict=True):
            torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.pooler_output, wanted.pooler_output, rtol=1e-4, atol=1e-5)


@families
@specs
@torch.no_grad()
def test_head_for_masked_tokens_comes_along(family: str, spec: str) -> None:
    model, (text, _) = encoder(family, AutoModelForMaskedLM), ids()
    made = longer_encoder(model, spec, length=48)
    torch.testing.assert_close(made(text).logits, model(text).logits, rtol=1e-4, atol=1e-4)


@families
@specs
def test_positions_are_copied_one_after_another(family: str, spec: str) -> None:
    model = encoder(family)
    made = longer_encoder(model, spec, length=60)
    old = model.embeddings.position_embeddings.weight[0 if family == "bert" else model.config.pad_token_id + 1 :]
    new = made.embeddings.position_embeddings.weight
    first = 0 if spec.startswith("bigbird") else made.config.pad_token_id + 1
    assert len(old) == 24
    assert new.shape[0] == first + 60
    assert torch.equal(new[first:], torch.cat((old, old, old[:12])))
    text = torch.randint(5, 264, (1, 60), generator=torch.Generator().manual_seed(1))
    used: list[Tensor] = []
    made.embeddings.position_embeddings.register_forward_hook(lambda m, args, out: used.append(out))
    made(text)
    torch.testing.assert_close(used[0][0, :60], new[first:])


def test_second_projections_are_copies_and_windows_hold() -> None:
    model = encoder("roberta")
    made = longer_encoder(model, "longformer:window=8", length=64)
    for old, new in zip(model.encoder.layer, made.encoder.layer, strict=True):
        for name in ("query", "key", "value"):
            source = getattr(old.attention.self, name)
            for part in (name, f"{name}_global"):
                copy = getattr(new.attention.self, part)
                assert torch.equal(copy.weight, source.weight)
                assert torch.equal(copy.bias, source.bias)
    text = torch.randint(5, 264, (1, 64), generator=torch.Generator().manual_seed(1))
    other = text.clone()
    other[0, 40] = 4
    with torch.no_grad():
        moved = (made(text).last_hidden_state - made(other).last_hidden_state).abs().amax(-1)[0] > 1e-6
    assert moved.nonzero().flatten().tolist() == list(range(32, 49))  # two layers of four tokens on either side


@specs
def test_exported_and_read_by_transformers(spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, (text, _) = encoder("roberta", AutoModelForMaskedLM), ids()
    model.save_pretrained(tmp_path / "old")
    tiny.tokenizer().save_pretrained(tmp_path / "old")
    assert run(["apply", str(tmp_path / "old"), spec, "--length", "96", "--out", str(tmp_path / "new")]) == 0
    said = capsys.readouterr().out
    assert "it reads 96 tokens" in said
    assert "AutoModel.from_pretrained" in said
    assert "vllm" not in said
    made, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        torch.testing.assert_close(made.eval()(text).logits, model(text).logits, rtol=1e-4, atol=1e-4)
        long = torch.randint(5, 264, (1, 96), generator=torch.Generator().manual_seed(1))
        assert AutoModel.from_pretrained(tmp_path / "new")(long).last_hidden_state.shape[1] == 96
    assert AutoTokenizer.from_pretrained(tmp_path / "new")("a text")["input_ids"]
    assert json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())["model_max_length"] >= 96


@pytest.mark.parametrize(("layers", "said"), [(1, "encoder.layer.1."), (3, "lack encoder.layer.2.")])
def test_weights_of_another_depth_are_refused(layers: int, said: str, tmp_path: Path) -> None:
    encoder("roberta").save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    with pytest.raises(NotSupported, match=said):
        export(tmp_path, "longformer:window=8", tmp_path.parent / "new", length=96)


def test_what_is_no_encoder_or_no_setting(tmp_path: Path) -> None:
    bert = encoder("bert")
    gpt = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50))
    with pytest.raises(NotSupported, match="gpt2"):
        longer_encoder(gpt, "longformer")
    with pytest.raises(NotSupported, match="longformer:window=64"):
        longer_encoder(bert, "longformer:window=64,dilated=1,dilation=2")
    with pytest.raises(NotSupported, match="global_attention_mask"):
        longer_encoder(bert, "longformer:globals=1")
    with pytest.raises(NotSupported, match="no such settings"):
        longer_encoder(bert, "bigbird:seed=1")
    with pytest.raises(NotSupported, match="bigbird or longformer"):
        longer_encoder(bert, "yarn:factor=2")
    with pytest.raises(NotSupported, match="bigbird or longformer"):
        export(tmp_path, "longformer + yarn:factor=2", tmp_path / "new")
    with pytest.raises(SpecError, match="shorter"):
        longer_encoder(bert, "longformer", length=8)
    with pytest.raises(SpecError, match="multiple of block=64"):
        longer_encoder(bert, "bigbird", length=100)
    with pytest.raises(SpecError, match="window=8"):
        longer_encoder(bert, "longformer:window=7", length=100)
    classifier = AutoModelForSequenceClassification.from_config(CONFIGS["roberta"])
    with pytest.raises(NotSupported, match="another task"):
        longer_encoder(classifier, "longformer")


def test_a_decoder_is_told_what_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.folder(tmp_path / "llama")
    assert run(["apply", str(folder), "longformer", "--out", str(tmp_path / "new")]) == 2
    assert "streaming" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
