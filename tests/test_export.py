"""What is exported must be read by transformers alone, in a process of its own, exactly as the model with its method."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
)

import tiny
from longspan import models
from longspan.export import ExportReport, export
from longspan.util.errors import LongspanError, NotSupported, SpecError

IDS = torch.arange(300)[None] * 37 % 264
SIZES = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "gemma3": Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=16, sliding_window=32),
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "phi3": Phi3Config(**SIZES, num_key_value_heads=2, original_max_position_embeddings=128),
    "olmo2": Olmo2Config(**SIZES, num_key_value_heads=2),
}
# Loads folders with transformers and nothing else, and saves their logits.
READER = """
import sys, torch, transformers
out, *folders = sys.argv[1:]
ids = torch.arange(300)[None] * 37 % 264
made = {}
for folder in folders:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(folder)("text")
    made[folder] = model(ids).logits.detach()
assert not [m for m in sys.modules if m.split(".")[0] == "longspan"]
torch.save(made, out)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("source"))


def _config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def _family(name: str, path: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES[name]).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.mark.slow
def test_a_process_with_transformers_only_reads_it_alike(source: Path, tmp_path: Path) -> None:
    wanted: dict[str, torch.Tensor] = {}
    models_and_specs = [
        (source, s) for s in ("none", "pi:factor=4", "ntk:factor=8", "yarn:factor=4", "llama3:factor=2.5")
    ]
    families = {
        "gemma3": "yarn:factor=4",
        "gpt_neox": "ntk:factor=4",
        "phi3": "yarn:factor=4",
        "olmo2": "ntk-by-parts:factor=4",
    }
    models_and_specs += [(_family(n, tmp_path / n), spec) for n, spec in families.items()]
    for i, (model_name, spec) in enumerate(models_and_specs):
        folder = tmp_path / f"out{i}"
        export(model_name, spec, folder)
        wanted[str(folder)] = models.load(model_name, method=spec, device="cpu")[0](IDS).logits.detach()
        assert "longspan" not in json.dumps(_config(folder))
    subprocess.run([sys.executable, "-c", READER, str(tmp_path / "logits.pt"), *wanted], check=True, cwd=tmp_path)
    read = torch.load(tmp_path / "logits.pt")
    for folder, logits in wanted.items():
        assert torch.allclose(read[folder], logits, atol=1e-6), (folder, _config(Path(folder)))
    assert not torch.allclose(read[str(tmp_path / "out0")], read[str(tmp_path / "out1")], atol=1e-4)


@pytest.mark.parametrize(
    ("spec", "kind", "positions", "reach"),
    [
        ("none", "default", 128, 128),
        ("pi:factor=4", "linear", 128, 512),  # vLLM multiplies it by the factor
        ("ntk:factor=8", "default", 1024, 512),
        ("yarn:factor=4", "yarn", 512, 512),
        ("llama3:factor=4", "llama3", 512, 512),
        ("ntk-by-parts:factor=4", "longrope", 512, 512),
    ],
)
def test_keys_that_each_reader_looks_for(
    source: Path, tmp_path: Path, spec: str, kind: str, positions: int, reach: int
) -> None:
    report = export(source, spec, tmp_path / "out")
    written = _config(tmp_path / "out")
    assert written["rope_parameters"]["rope_type"] == kind
    assert written["max_position_embeddings"] == report.max_position_embeddings == positions
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"]
    # transformers 5 prefers `rope_scaling` where there is one, so the two must say the same
    assert written.get("rope_scaling") == (None if kind == "default" else written["rope_parameters"])
    assert report.reach == reach
    assert report.vllm == f"vllm serve {tmp_path / 'out'} --max-model-len {reach}"
    assert bool(report.notes) == (kind == "linear")


def test_magnitudes_are_there_for_vllm(source: Path, tmp_path: Path) -> None:
    export(source, "yarn:factor=4", tmp_path / "yarn")
    export(source, "yarn:factor=4,ramp=paper", tmp_path / "paper")
    yarn = _config(tmp_path / "yarn")["rope_parameters"]
    paper = _config(tmp_path / "paper")["rope_parameters"]
    assert yarn["attention_factor"] == paper["short_mscale"] == paper["long_mscale"] == pytest.approx(1.1386294)
    # vLLM multiplies attn_factor with the usual magnitude, which is the one that was asked for
    assert "attn_factor" not in yarn
    again = export(tmp_path / "paper", "none", tmp_path / "again")
    assert again.rope_parameters is not None and again.rope_parameters["rope_type"] == "longrope"


def test_an_unusual_magnitude_is_a_factor_for_vllm(tmp_path: Path) -> None:
    parameters = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "attention_factor": 2.0}
    config = LlamaConfig(
        **SIZES, num_key_value_heads=2, rope_parameters=parameters | {"original_max_position_embeddings": 32}
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "in")
    tiny.tokenizer().save_pretrained(tmp_path / "in")
    export(tmp_path / "in", "none", tmp_path / "out")
    assert _config(tmp_path / "out")["rope_parameters"]["attn_factor"] == pytest.approx(2 / 1.1386294)


def test_configurations_that_take_only_longrope(tmp_path: Path) -> None:
    report = export(_family("phi3", tmp_path / "phi3"), "yarn:factor=4", tmp_path / "out")
    assert _config(tmp_path / "out")["rope_parameters"]["rope_type"] == "longrope"
    assert "transformers 5" in report.notes[0]


def test_length_settles_open_settings(source: Path, tmp_path: Path) -> None:
    report = export(source, "yarn", tmp_path / "out", length=500)
    assert report.method == "yarn:factor=4" and report.window == 512
    with pytest.raises(SpecError, match="needs factor"):
        export(source, "yarn", tmp_path / "other")
    with pytest.raises(NotSupported, match=r"yarn:factor=2 .* reads 256 tokens, fewer than the length of 500"):
        export(source, "yarn:factor=2", tmp_path / "other", length=500)
    assert not (tmp_path / "other").exists()


def test_tokenizer_goes_along_unchanged(source: Path, tmp_path: Path) -> None:
    settings = json.loads((source / "tokenizer_config.json").read_text())
    export(source, "yarn:factor=4", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == tiny.TEMPLATE
    assert tokenizer.padding_side == AutoTokenizer.from_pretrained(source).padding_side
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["model_max_length"] >= 512
    assert {**written, "model_max_length": 0, "tokenizer_class": ""} == {
        **settings,
        "model_max_length": 0,
        "tokenizer_class": "",
    }


def test_dtype_is_the_models_own_unless_said(source: Path, tmp_path: Path) -> None:
    tiny.model().bfloat16().save_pretrained(tmp_path / "in")
    tiny.tokenizer().save_pretrained(tmp_path / "in")
    assert export(tmp_path / "in", "none", tmp_path / "a").dtype == "bfloat16"
    assert export(tmp_path / "in", "none", tmp_path / "b", dtype="fp16").dtype == "float16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "b").dtype == torch.float16


def test_report_is_data(source: Path, tmp_path: Path) -> None:
    report = export(source, "ntk:factor=4", tmp_path / "out")
    data = json.loads(json.dumps(report.to_dict()))
    assert data["bytes"] == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    exec(data["python"], space := {})
    assert space["model"].config.max_position_embeddings == 512


@pytest.mark.parametrize(
    ("spec", "reason", "nearest"),
    [
        ("streaming", "it lives in the cache", "export one of llama3, ntk"),
        ("yarn:factor=4 + streaming", "streaming: it lives in the cache", 'export "yarn:factor=4"'),
        ("dynamic-ntk", "cached unrotated", "ntk"),
    ],
)
def test_what_a_checkpoint_cannot_hold(source: Path, tmp_path: Path, spec: str, reason: str, nearest: str) -> None:
    with pytest.raises(NotSupported) as caught:
        export(source, spec, tmp_path / "out")
    assert reason in str(caught.value) and nearest in str(caught.value) and "longspan.load(" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_refusals_come_before_weights(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out, message in [("full", "not empty"), ("file", "is a file")]:
        with pytest.raises(LongspanError, match=message):
            export(source, "none", tmp_path / out)
    with pytest.raises(LongspanError, match="does not hold a model"):
        export(source, "none", tmp_path / "full", overwrite=True)
    for place in (source, source.parent):
        with pytest.raises(LongspanError, match="holds the model to be exported"):
            export(source, "none", place, overwrite=True)
    assert (tmp_path / "full" / "letter.txt").read_text() == "mine"


def test_overwriting_replaces_the_whole_folder(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export(source, "pi:factor=2", out)  # an empty folder is free
    (out / "old.txt").write_text("")
    with pytest.raises(LongspanError, match="not empty"):
        export(source, "yarn:factor=4", out)
    export(source, "yarn:factor=4", out, overwrite=True)
    assert _config(out)["rope_parameters"]["rope_type"] == "yarn" and not (out / "old.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_what_was_there(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    export(source, "pi:factor=2", out)
    before = (out / "config.json").read_text()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("longspan.export.checkpoint.write_json", full)
    with pytest.raises(LongspanError, match="No space left"):
        export(source, "yarn:factor=4", out, overwrite=True)
    assert (out / "config.json").read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.model
def test_built_in_model(tmp_path: Path) -> None:
    report: ExportReport = export("smollm2-135m", "yarn", tmp_path / "out", length=32768, dtype="bf16")
    assert (report.reach, report.dtype) == (32768, "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected, tokenizer = models.load("smollm2-135m", method="yarn:factor=4", dtype="bf16", device="cpu")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert _config(tmp_path / "out")["tie_word_embeddings"] is True
