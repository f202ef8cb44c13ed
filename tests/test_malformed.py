"""Requests that cannot be carried out: each ends with exit code 2 and a message that a person can act on, no traceback.

`{model}` in an argument is the folder of a tiny model, `{bad}` a folder of broken things, `{empty}` an empty folder.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tiny
from longspan.cli.main import run

GENERATE = ["generate", "{model}", "--prompt", "hello"]
COMPARE = ["compare", "{model}", "--out", "{empty}/run"]

SPECS = """
yarn:
yarn:factor
yarn:factor=
yarn:=4
yarn:factor=four
yarn:factor=nan
yarn:factor=inf
yarn:factor=-inf
yarn:factor=0
yarn:factor=-4
yarn:factor=0.5
yarn:factor=1e9
yarn:factor=1e400
yarn:factor=4,factor=4
yarn:factor=4;ramp=code
yarn:factor==4
yarn:factor=4=5
yarn:faktor=4
yarn:Factor=4
yarn:factor=0x10
yarn:factor=４x
yarn:factor=[4]
yarn:factor={"a":1}
yarn:factor=None4
yarn:factor=true
yarn:ramp=curve,factor=2
yarn:factor=2,slow=64
yarn:factor=2,fast=-1
yarn:factor=2,slow=nan
yarn:factor=4 yarn
yarn factor=4
YARN:factor=4
jarn
jarn:factor=4
ya rn:factor=4
yarn=4
:factor=4
+
+ yarn:factor=4
yarn:factor=4 +
yarn:factor=4 + + streaming
yarn:factor=4 + yarn:factor=2
yarn:factor=4 + ntk:factor=4
streaming + streaming
streaming + self-extend:group=2
dynamic-ntk + yarn:factor=2
dynamic-ntk + streaming
none:factor=2
none:
ntk:factor=-1
ntk:factor=0
ntk:factor=1e30
ntk:factor=2:factor=3
pi:factor=many
pi:factor=0.99
pi:window=4k
llama3:factor=-2
llama3:factor=nan
longrope
longrope:factors=
longrope:factors=/nowhere/at/all.json
longrope:factors={bad}
longrope:factors={bad}/garbage.json
longrope:factors={bad}/list.json
longrope:factors={bad}/words.json
longrope:factors={bad}/nan.json
longrope:factors={bad}/zeros.json
longrope:factors={bad}/empty.json
longrope:factors={bad}/number.json
longrope:factors={bad}/object.json
longrope:factors={bad}/binary
streaming:sinks=-1
streaming:sinks=1.5
streaming:sinks=100000000000
streaming:window=0
streaming:window=-1
streaming:window=1.5
streaming:window=1e400
streaming:window=99999999999999999999
streaming:window=4kb
streaming:window=k
streaming:window=4 k k
streaming:windows=4
streaming:sinks=4,window=
streaming:sinks=4,,window=x
streaming:window=1_000
self-extend:group=0
self-extend:group=-2
self-extend:group=1.5
self-extend:window=0
self-extend:window=4m
self-extend:group=2,window=128
self-extend:group=two
rerope:window=0
rerope:window=128
rerope:factor=2
leaky-rerope:factor=0.5
leaky-rerope:factor=nan
leaky-rerope:window=4m,factor=2
window:size=0
window:size=1.5
bca:size=7
bca:size=0
logn:window=1
logn + streaming
window + bca
dynamic-ntk:factor=0
dynamic-ntk:factor=nan
dynamic-ntk:step=0
dynamic-ntk:step=-512
dynamic-ntk:step=0.1
dynamic-ntk:step=1e12
\u202eyarn:factor=4
ｙａｒｎ:factor=4
🦙
yarn:factor=🦙
""".strip("\n").split("\n")

LENGTHS = ["", " ", "0", "-1", "-4k", "k", "m", "4kk", "4 096 1", "1.5", "0.1k", "nan", "inf", "-inf", "1e400", "1_000"]
LENGTHS += ["0x10", "four", "4k,8k", "8k-16k", "99999999999999999999", "4g", "½", "None", "true", "1e-3", "--5"]

TASKS = """
ppl:
ppl + passkey
ppl:window=-1
ppl:window=0
ppl:protocol=own
ppl:stride=4
ppl:colour=red
ppl:text=
ppl:text=/nowhere/at/all.txt
ppl:text={bad}/binary
ppl:text={bad}/binary.txt
ppl:text={bad}/empty.txt
ppl:text={empty}
passkey:protocol=own
passkey:depth
passkey:=
passkey:nothing=1
perplexity
:
pass key
🦙
""".strip("\n").split("\n")

# What a model's folder, or a path in its place, may have wrong. The names are folders or files under {bad}.
MODELS = """
/nowhere/at/all
{empty}
{bad}/empty.txt
{bad}/binary
{bad}/config-missing
{bad}/config-empty
{bad}/config-garbage
{bad}/config-binary
{bad}/config-list
{bad}/config-number
{bad}/config-null
{bad}/config-is-a-folder
{bad}/config-no-type
{bad}/config-type-unknown
{bad}/config-type-number
{bad}/config-bert-encoder
{bad}/config-heads-words
{bad}/config-heads-zero
{bad}/config-hidden-negative
{bad}/config-layers-none
{bad}/config-vocab-text
{bad}/config-window-text
{bad}/config-window-negative
{bad}/config-rope-word
{bad}/config-rope-unknown
{bad}/config-remote-code
{bad}/weights-missing
{bad}/weights-empty
{bad}/weights-truncated
{bad}/weights-header-cut
{bad}/weights-header-huge
{bad}/weights-garbage
{bad}/weights-other-shape
{bad}/weights-some-missing
{bad}/weights-pickle
{bad}/weights-index-garbage
{bad}/weights-index-points-nowhere
{bad}/weights-not-numbers
{bad}/weights-fewer-tokens
{bad}/saved-jarn
{bad}/saved-number
{bad}/saved-streaming-twice
{bad}/tokenizer-missing
{bad}/tokenizer-garbage
{bad}/tokenizer-empty
{bad}/tokenizer-truncated
{bad}/empty.gguf
{bad}/short.gguf
{bad}/garbage.gguf
{bad}/version.gguf
{bad}/truncated.gguf
{bad}/folder.gguf
/nowhere.gguf
no-such-model
smollm2
SmolLM2-135M
owner/no-such-model-of-longspan
owner/two/three
http://localhost/model
../..
.
/
""".strip("\n").split("\n")

RUNS = """
/nowhere/at/all
{empty}
{model}
{bad}/binary
{bad}/run-garbage
{bad}/run-empty
{bad}/run-list
{bad}/run-no-cells
{bad}/run-is-a-folder
{bad}/run-wrong-types
""".strip("\n").split("\n")

INCLUDES = """
/nowhere/at/all.py
{empty}
{bad}/binary
{bad}/binary.py
{bad}/empty.py
{bad}/syntax.py
{bad}/raises.py
{bad}/imports.py
{bad}/none.py
{bad}/same-name.py
{bad}/empty.txt
""".strip("\n").split("\n")

OPTIONS: list[list[str]] = [
    ["--nonsense"],
    ["nonsense"],
    ["methods", "nonsense"],
    ["methods", ""],
    ["methods", "yarn", "ntk"],
    ["methods", "--wrong"],
    ["tasks", "nonsense"],
    ["tasks", "🦙"],
    ["models", "nonsense"],
    ["generate"],
    ["generate", "{model}"],
    ["generate", "{model}", "--prompt"],
    ["generate", "{model}", "--prompt", ""],
    ["generate", "{model}", "--prompt", " \n\t "],
    ["generate", "{model}", "--file", "/nowhere/at/all"],
    ["generate", "{model}", "--file", "{bad}"],
    ["generate", "{model}", "--file", "{bad}/binary"],
    ["generate", "{model}", "--file", "{bad}/empty.txt"],
    ["generate", "{model}", "--file", "/proc/self/mem"],
    ["generate", "{model}", "--file", "x" * 5000],
    ["generate", "{model}", "--file", "-"],
    ["generate", "{model}", "--prompt", "\udcff"],
    ["chat", "{model}", "--system", "\udcff"],
    [*GENERATE, "--max-new-tokens", "0"],
    [*GENERATE, "--max-new-tokens", "-5"],
    [*GENERATE, "--max-new-tokens", "ten"],
    [*GENERATE, "--max-new-tokens", "1.5"],
    [*GENERATE, "--max-new-tokens", "99999999999999999999"],
    [*GENERATE, "--temperature", "-1"],
    [*GENERATE, "--temperature", "nan"],
    [*GENERATE, "--temperature", "inf"],
    [*GENERATE, "--temperature", "hot"],
    [*GENERATE, "--temperature", "1", "--top-p", "0"],
    [*GENERATE, "--temperature", "1", "--top-p", "1.1"],
    [*GENERATE, "--temperature", "1", "--top-p", "nan"],
    [*GENERATE, "--top-p", "0.5"],
    [*GENERATE, "--seed", "1"],
    [*GENERATE, "--temperature", "1", "--seed", "-1"],
    [*GENERATE, "--temperature", "1", "--seed", "99999999999999999999"],
    [*GENERATE, "--dtype", "float7"],
    [*GENERATE, "--dtype", ""],
    [*GENERATE, "--dtype", "int8"],
    [*GENERATE, "--device", "toaster"],
    [*GENERATE, "--device", "cuda:99"],
    [*GENERATE, "--device", ""],
    [*GENERATE, "--device", "cpu:x"],
    [*GENERATE, "-m"],
    [*GENERATE, "extra"],
    ["chat"],
    ["chat", "{model}", "-m", "yarn"],
    ["chat", "{model}", "-m", "self-extend"],
    ["chat", "{model}", "-m", "jarn"],
    ["chat", "{model}", "--max-new-tokens", "0"],
    ["chat", "{bad}/weights-not-numbers"],
    ["generate", "{bad}/weights-not-numbers", "--prompt", "hello", "--temperature", "1"],
    ["chat", "{bad}/template-missing", "--system", "be brief"],
    ["chat", "{bad}/template-garbage"],
    ["compare"],
    [*COMPARE, "--samples", "0"],
    [*COMPARE, "--samples", "-1"],
    [*COMPARE, "--samples", "many"],
    [*COMPARE, "--samples", "1.5"],
    [*COMPARE, "--seed", "x"],
    [*COMPARE, "--seed", "-1"],
    [*COMPARE, "--timeout", "0"],
    [*COMPARE, "--timeout", "-1"],
    [*COMPARE, "--timeout", "nan"],
    [*COMPARE, "--dtype", "float7"],
    [*COMPARE, "--device", "toaster"],
    ["compare", "{model}", "-l", "128", "-m", "none", "--out", "{bad}/binary"],
    ["compare", "{model}", "-l", "128", "-m", "none", "--out", "{bad}/binary/run"],
    ["compare", "{model}", "-l", "128", "-m", "none", "--out", "{model}"],
    ["compare", "{model}", "-l", "128", "-m", "none", "--out", "/proc/nothing/run"],
    ["compare", "{model}", "-l", "128", "-m", "none", "--out", ""],
    ["report"],
    ["report", "{empty}", "--html"],
    ["apply"],
    ["apply", "{model}"],
    ["apply", "{model}", "yarn:factor=2"],
    ["apply", "{model}", "jarn", "--out", "{empty}/saved"],
    ["apply", "{model}", "yarn", "--out", "{empty}/saved"],
    ["apply", "{model}", "yarn:factor=2", "--out", "{bad}"],
    ["apply", "{model}", "yarn:factor=2", "--out", "{model}"],
    ["apply", "{model}", "yarn:factor=2", "--out", "{bad}/binary"],
    ["apply", "{model}", "yarn:factor=2", "--out", "/proc/nothing/saved"],
    ["apply", "{model}", "streaming", "--out", "{empty}/saved"],
    ["apply", "{model}", "self-extend:group=2", "--out", "{empty}/saved"],
    ["apply", "{model}", "yarn:factor=2 + streaming", "--out", "{empty}/saved"],
    ["apply", "{model}", "yarn", "--length", "-4k", "--out", "{empty}/saved"],
    ["apply", "{model}", "yarn", "--length", "long", "--out", "{empty}/saved"],
    ["apply", "/nowhere/at/all", "yarn:factor=2", "--out", "{empty}/saved"],
    ["plan"],
    ["plan", "{model}"],
    ["plan", "/nowhere/at/all", "--length", "4k"],
    ["bench", "nonsense"],
    ["bench", "decode"],
    ["bench", "decode", "{model}", "--tokens", "0"],
    ["bench", "decode", "{model}", "--tokens", "x"],
    ["bench", "decode", "{model}", "-m", "yarn:factor=2"],
    ["bench", "prefill", "{model}"],
    ["bench", "prefill", "{model}", "--length", "0"],
    ["bench", "prefill", "{model}", "--length", "1k", "--chunk", "0"],
    ["bench", "prefill", "{model}", "--length", "1k", "--chunk", "x"],
    ["bench", "prefill", "{model}", "--length", "1k", "--repeats", "0"],
]

CASES: list[list[str]] = [
    *OPTIONS,
    *([*GENERATE, "-m", spec] for spec in SPECS),
    *([*COMPARE, "-m", "none", "-l", length] for length in LENGTHS),
    *(["plan", "{model}", "--length", length] for length in LENGTHS),
    *([*COMPARE, "-m", "none", "-l", "128", "-t", task] for task in TASKS),
    *(["generate", model, "--prompt", "hello"] for model in MODELS),
    *(["report", folder] for folder in RUNS),
    *(["methods", "--include", file] for file in INCLUDES),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("malformed")
    model = tiny.folder(root / "model")
    (root / "bad").mkdir()
    (root / "empty").mkdir()
    break_files(root / "bad")
    break_models(root / "bad", model)
    break_runs(root / "bad")
    return {"model": model, "bad": root / "bad", "empty": root / "empty"}


def break_files(bad: Path) -> None:
    noise = bytes(range(256)) * 40
    texts = {
        "garbage.json": "{not json",
        "list.json": "[1, 2",
        "words.json": json.dumps(["a"] * 8),
        "nan.json": "[NaN, 1, 1, 1, 1, 1, 1, 1]",
        "zeros.json": json.dumps([0] * 8),
        "empty.json": "",
        "number.json": "4",
        "object.json": "{}",
        "empty.txt": "",
        "empty.py": "",
        "syntax.py": "def broken(:\n",
        "raises.py": "import longspan\n1 / 0\n",
        "imports.py": "import no_such_module_of_longspan\n",
        "none.py": "x = 1\n",
        "same-name.py": "from longspan.core.method import Method\nclass Mine(Method):\n    name = 'yarn'\n",
    }
    for name, text in texts.items():
        (bad / name).write_text(text)
    for name in ("binary", "binary.py", "binary.txt", "garbage.gguf"):
        (bad / name).write_bytes(noise)
    (bad / "empty.gguf").write_bytes(b"")
    (bad / "short.gguf").write_bytes(b"GGUF")
    (bad / "version.gguf").write_bytes(b"GGUF" + (99).to_bytes(4, "little") + bytes(16))
    header = b"GGUF" + (3).to_bytes(4, "little") + (10).to_bytes(8, "little") + (10).to_bytes(8, "little")
    (bad / "truncated.gguf").write_bytes(header + bytes(10))
    (bad / "folder.gguf").mkdir()


def break_models(bad: Path, model: Path) -> None:
    """Copies of a whole model, each with one thing broken."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(model, bad / name))

    break_configurations(copy)
    break_weights(bad, model, copy)
    break_tokenizers(model, copy)


def change_config(folder: Path, **changes: object) -> None:
    """Other values in the configuration of a model's folder."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def break_configurations(copy: Callable[[str], Path]) -> None:
    """Configurations that are no JSON, or say what cannot be."""
    for name, content in {"empty": b"", "garbage": b"{no", "binary": b"\xff\xfe\x00", "list": b"[]"}.items():
        (copy(f"config-{name}") / "config.json").write_bytes(content)
    for name, content in {"number": b"4", "null": b"null", "no-type": b"{}"}.items():
        (copy(f"config-{name}") / "config.json").write_bytes(content)
    (copy("config-missing") / "config.json").unlink()
    folder = copy("config-is-a-folder") / "config.json"
    folder.unlink()
    folder.mkdir()
    change_config(copy("config-type-unknown"), model_type="lama", architectures=["Lama"])
    change_config(copy("config-type-number"), model_type=4)
    change_config(copy("config-bert-encoder"), model_type="vit", architectures=["ViTModel"])
    change_config(copy("config-heads-words"), num_attention_heads="four")
    change_config(copy("config-heads-zero"), num_attention_heads=0)
    change_config(copy("config-hidden-negative"), hidden_size=-64)
    change_config(copy("config-layers-none"), num_hidden_layers=None)
    change_config(copy("config-vocab-text"), vocab_size="many")
    change_config(copy("config-window-text"), max_position_embeddings="long")
    change_config(copy("config-window-negative"), max_position_embeddings=-1)
    change_config(copy("config-rope-word"), rope_parameters="yarn")
    change_config(copy("config-rope-unknown"), rope_parameters={"rope_type": "spiral", "rope_theta": 10000.0})
    for name, method in {"jarn": "jarn", "number": 4, "streaming-twice": "streaming + streaming"}.items():
        change_config(copy(f"saved-{name}"), longspan={"method": method})
    change_config(
        copy("config-remote-code"),
        model_type="mine",
        auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.M"},
    )


def break_weights(bad: Path, model: Path, copy: Callable[[str], Path]) -> None:
    """Files of weights that are cut, garbage, missing, or in another format."""
    weights = (model / "model.safetensors").read_bytes()
    for name, content in {
        "empty": b"",
        "truncated": weights[: len(weights) // 2],
        "header-cut": weights[:40],
        "header-huge": (2**40).to_bytes(8, "little") + weights[8:],
        "garbage": bytes(range(256)) * 40,
    }.items():
        (copy(f"weights-{name}") / "model.safetensors").write_bytes(content)
    (copy("weights-missing") / "model.safetensors").unlink()
    break_tensors(model, copy)
    change_config(bad / "weights-fewer-tokens", vocab_size=50)
    (copy("weights-pickle") / "model.safetensors").rename(bad / "weights-pickle" / "pytorch_model.bin")
    for name, content in {
        "index-garbage": b"{no",
        "index-points-nowhere": b'{"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}',
    }.items():
        folder = copy(f"weights-{name}")
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_bytes(content)


def break_tokenizers(model: Path, copy: Callable[[str], Path]) -> None:
    """Tokenizers and chat templates that are cut, garbage or missing."""
    tokenizer = (model / "tokenizer.json").read_bytes()
    for name, content in {"garbage": b"{no", "empty": b"", "truncated": tokenizer[:300]}.items():
        (copy(f"tokenizer-{name}") / "tokenizer.json").write_bytes(content)
    for path in copy("tokenizer-missing").glob("*token*"):
        path.unlink()
    (copy("template-missing") / "chat_template.jinja").unlink()
    (copy("template-garbage") / "chat_template.jinja").write_text("{% for %}{{")


def break_tensors(model: Path, copy: Callable[[str], Path]) -> None:
    """Whole files of weights that do not belong to their configuration, or to anything."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    words = ("model.embed_tokens.weight", "lm_head.weight")
    for name, changed in {
        "other-shape": {**tensors, "lm_head.weight": tensors["lm_head.weight"][:10].clone()},
        "some-missing": {k: v for k, v in tensors.items() if "mlp" not in k},
        "not-numbers": {k: v * float("nan") for k, v in tensors.items()},
        "fewer-tokens": {k: v[:50].clone() if k in words else v for k, v in tensors.items()},
    }.items():
        save_file(changed, copy(f"weights-{name}") / "model.safetensors", {"format": "pt"})


def break_runs(bad: Path) -> None:
    contents = {"garbage": "{no", "empty": "", "list": "[]", "no-cells": "{}", "wrong-types": json.dumps({"cells": 4})}
    for name, content in contents.items():
        (bad / f"run-{name}").mkdir()
        (bad / f"run-{name}" / "run.json").write_text(content)
    (bad / "run-is-a-folder" / "run.json").mkdir(parents=True)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch, places: dict[str, Path]) -> Iterator[None]:
    """No hub, a cache of our own, an empty standard input, and the environment as it was."""
    monkeypatch.setenv("LONGSPAN_CACHE", str(places["bad"].parent / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def filled(arguments: list[str], places: dict[str, Path]) -> list[str]:
    for name, path in places.items():
        arguments = [a.replace(f"{{{name}}}", str(path)) for a in arguments]
    return arguments


def check(code: int, out: str, err: str) -> None:
    assert code == 2, (code, err)
    assert "Traceback" not in out + err
    message = err.partition("error: ")[2]
    usage = "─ Error ─" in err
    assert usage or message.strip(), err
    if not usage:
        assert "error: " in [line[:7] for line in err.splitlines()], err
        assert len(message) < 1200, "too long to read"


def test_there_are_at_least_200_of_them() -> None:
    assert len({tuple(case) for case in CASES}) >= 200


@pytest.mark.parametrize("arguments", CASES, ids=[" ".join(case)[:80] or "empty" for case in CASES])
def test_is_refused_with_a_clear_message(
    arguments: list[str], places: dict[str, Path], settled: None, capfd: pytest.CaptureFixture[str]
) -> None:
    code = run(filled(arguments, places))
    check(code, *capfd.readouterr())


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "{bad}/weights-truncated", "--prompt", "hello"],
        ["methods", b"\xff\xfe"],
        ["--nonsense"],
    ],
)
def test_and_so_by_the_command_itself(arguments: list[str], places: dict[str, Path]) -> None:
    texts = filled([a if isinstance(a, str) else os.fsdecode(a) for a in arguments], places)
    command = [sys.executable, "-c", "from longspan.cli.main import main; main()", *texts]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120)
    check(done.returncode, done.stdout, done.stderr)
