"""The command line from outside: what it prints, what it writes, and how it ends; and the names of `import longspan`."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import longspan as ls
import tiny
from longspan.cli import printing
from longspan.cli.compare import default_folder
from longspan.cli.main import run
from longspan.core import method
from longspan.generation import generate_text
from longspan.meter import Meter
from longspan.plugins import include, load_user_file
from longspan.tasks import base
from longspan.tasks.base import parse_task

GUIDE = Path(__file__).parent.parent / "docs" / "adding-a-method.md"


class Done(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """Runs the command line with the given arguments and standard input."""
    before = dict(os.environ)

    def call(*arguments: object, stdin: str = "") -> Done:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        return Done(run([str(a) for a in arguments]), *capfd.readouterr())

    yield call
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The files of the guide to adding a method, by name; what they register is gone after the test."""
    method.catalogue()  # fills the registry before it is copied
    monkeypatch.setattr(method.Method, "registry", dict(method.Method.registry))
    base.task_catalogue()
    monkeypatch.setattr(base.Task, "registry", dict(base.Task.registry))
    monkeypatch.setenv("LONGSPAN_INCLUDE", "")
    found = re.findall(r"<!-- example: (\S+) -->\n```python\n(.*?)```", GUIDE.read_text(), re.S)
    for name, code in found:
        (tmp_path / name).write_text(code)
    return {name: tmp_path / name for name, _ in found}


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


class TestStart:
    def test_help_needs_neither_torch_nor_transformers(self) -> None:
        done = python(
            "import sys; from longspan.cli.main import run; code = run(['--help']) or run(['compare', '--help']); "
            "print({'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules), file=sys.stderr); sys.exit(code)"
        )
        assert (done.returncode, done.stderr.strip()) == (0, "set()")

    def test_a_report_needs_neither_torch_nor_transformers(self) -> None:
        done = python("import sys, longspan.compare.report.pages; print({'torch', 'transformers'} & set(sys.modules))")
        assert done.stdout.strip() == "set()"

    def test_help_names_what_there_is(self, command: Command) -> None:
        text = command("--help").out
        for name in (
            "methods",
            "tasks",
            "models",
            "compare",
            "report",
            "apply",
            "read",
            "generate",
            "chat",
            "plan",
            "bench",
            "train",
        ):
            assert f" {name} " in text
            assert command(name, "--help").code == 0

    def test_version(self, command: Command) -> None:
        assert command("--version").out == f"longspan {ls.__version__}\n"

    def test_a_reader_that_stops_reading_is_no_error(self) -> None:
        read, write = os.pipe()
        os.close(read)
        code = "from longspan.cli.main import run; run(['--help'])"
        done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, timeout=120)
        os.close(write)
        assert done.stderr == b""


class TestEnds:
    @pytest.fixture
    def catalogue(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
        """Makes the command `methods` raise."""

        def fail(error: BaseException) -> None:
            def raise_it() -> None:
                raise error

            monkeypatch.setattr(sys.modules["longspan.core.method"], "catalogue", raise_it)

        return fail

    @pytest.mark.parametrize(
        ("error", "says"),
        [
            (ls.SpecError("no such thing"), "error: no such thing"),
            (ls.NotSupported("it cannot"), "error: it cannot"),
            (PermissionError(13, "Permission denied", "/root/x"), "error: Permission denied: /root/x"),
            (OSError(28, "No space left on device", "/full"), "error: No space left on device: /full"),
            (MemoryError(), "error: out of memory"),
            (
                torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"),
                "error: out of memory: CUDA out of memory. Tried;",
            ),
        ],
    )
    def test_what_a_user_can_mend_is_one_line(
        self, command: Command, catalogue: Callable, error: Exception, says: str
    ) -> None:
        catalogue(error)
        done = command("methods")
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith(says)
        assert done.err.count("\n") == 1

    def test_interrupted(self, command: Command, catalogue: Callable) -> None:
        catalogue(KeyboardInterrupt())
        done = command("methods")
        assert (done.code, done.err.strip()) == (130, "interrupted")

    @pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), RuntimeError("another")])
    def test_a_bug_keeps_its_traceback(self, command: Command, catalogue: Callable, error: Exception) -> None:
        catalogue(error)
        with pytest.raises(type(error)):
            command("methods")


class TestPublicNames:
    def test_each_can_be_had(self) -> None:
        for name in ls.__all__:
            assert getattr(ls, name) is not None

    def test_methods_by_the_names_of_their_classes(self) -> None:
        assert ls.YaRN(factor=4).spec == "yarn:factor=4"
        assert ls.StreamingLLM(sinks=4, window=1020).sinks == 4
        assert {cls.__name__ for cls in ls.methods().values()} <= set(dir(ls))

    def test_others_do_not_exist(self) -> None:
        with pytest.raises(AttributeError, match="nonsense"):
            _ = ls.nonsense

    def test_a_submodule_does_not_hide_the_function_of_its_name(self) -> None:
        done = python(
            "import types, longspan.apply, longspan as ls\n"
            "from longspan import apply\n"
            "assert isinstance(apply, types.FunctionType) and ls.apply is longspan.apply is apply\n"
            "import longspan.compare.running.worker, sys\n"
            "assert 'longspan.training' not in sys.modules, 'a comparison trains nothing, and its imports take seconds'\n"
        )
        assert done.stderr == ""

    def test_importing_it_imports_nothing_else(self) -> None:
        done = python("import sys, longspan; print({'torch', 'transformers'} & set(sys.modules))")
        assert done.stdout.strip() == "set()"


class TestEncodings:
    @pytest.fixture
    def printed(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
        """What a command prints where standard output has another encoding."""

        def call(encoding: str, *arguments: object) -> str:
            raw = io.BytesIO()
            monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, write_through=True))
            assert run([str(a) for a in arguments]) == 0
            return raw.getvalue().decode(
                "utf-8" if encoding == "ascii" else encoding
            )  # click takes ASCII for a mistake

        return call

    @pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
    def test_what_it_has_no_sign_for_is_a_question_mark(self, printed: Callable, encoding: str) -> None:
        assert "time n²" in printed(encoding, "methods", "yarn")
        table = printed(encoding, "methods")
        assert ("time n²" if encoding == "latin-1" else "time n?") in table
        assert "alibi" in table and "|" in table  # a table without its usual lines

    def test_json_loses_nothing(self, printed: Callable) -> None:
        made = [json.loads(printed(encoding, "methods", "yarn", "--json")) for encoding in ("ascii", "utf-8")]
        assert made[0] == made[1] and made[0]["cost"] == "time n², cache n"

    def test_what_is_written_to_it_is_read_as_utf8(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        heard: list[str] = []
        monkeypatch.setattr("longspan.generation.Chat.say", lambda self, text, on_text: heard.append(text))
        for encoding in ("ascii", "utf-8"):
            lines = io.BytesIO("\ufeffGrüße\nnoch\n".encode())
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(lines, encoding=encoding))
            assert run(["chat", str(model)]) == 0
        assert heard == ["Grüße", "noch"] * 2


class TestCatalogues:
    @pytest.mark.parametrize(("kind", "name"), [("methods", "yarn"), ("tasks", "ppl")])
    def test_list_and_entry(self, command: Command, kind: str, name: str) -> None:
        assert name in command(kind).out
        everything = json.loads(command(kind, "--json").out)
        entry = json.loads(command(kind, name, "--json").out)
        assert everything[name] == entry
        assert {"title", "settings", "about"} <= entry.keys()
        assert entry["title"] in command(kind, name).out

    def test_a_narrow_terminal_has_fewer_columns_and_nothing_cut(
        self, command: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wide = command("methods").out
        monkeypatch.setattr(printing, "console", lambda: Console(width=60))
        narrow = command("methods").out
        assert "arXiv" in wide and "no room" not in wide
        assert all(name in narrow for name in ("transformer-xl", "ntk-by-parts"))
        assert "…" not in narrow and "arXiv" not in narrow
        assert "no room for cost, exportable, paper: longspan methods NAME" in narrow

    def test_a_method_by_its_papers_name(self, command: Command) -> None:
        done = command("methods", "Reformer")
        assert (done.code, done.err) == (0, "Reformer is lsh here\n")
        assert done.out == command("methods", "lsh").out and "also  reformer, lsh-attention" in done.out
        assert json.loads(command("methods", "favor+", "--json").out)["name"] == "performer"
        assert "no method 'lm-infinite'; the nearest here is streaming (" in command("methods", "lm-infinite").err

    def test_settings_and_partners(self, command: Command) -> None:
        entry = json.loads(command("methods", "streaming", "--json").out)
        assert {"name": "sinks", "type": "int", "default": 4} in entry["settings"]
        assert "yarn" in entry["combines_with"]
        assert "self-extend" not in entry["combines_with"]


class TestGenerate:
    def test_prints_the_answer(self, command: Command, model: Path) -> None:
        done = command("generate", model, "--prompt", "hello", "--max-new-tokens", 8)
        expected = generate_text(tiny.model(), tiny.tokenizer(), "hello", max_new_tokens=8)
        assert (done.code, done.out) == (0, expected.text + "\n")

    def test_json(self, command: Command, model: Path) -> None:
        done = command("generate", model, "--prompt", "hello", "--max-new-tokens", 8, "--json")
        made = json.loads(done.out)
        assert len(made["tokens"]) == 8
        assert made["stop"] == "length"

    def test_a_method_takes_its_settings_from_the_length(self, command: Command, model: Path) -> None:
        done = command("generate", model, "-m", "yarn", "--prompt", "x" * 300, "--max-new-tokens", 4, "--json")
        assert (done.code, done.err) == (0, "")
        assert json.loads(done.out)["prompt_tokens"] == 305

    def test_past_the_reach_it_warns_and_answers(self, command: Command, model: Path) -> None:
        done = command("generate", model, "--prompt", "x" * 300, "--max-new-tokens", 4, "--json")
        assert done.code == 0
        assert done.err.startswith("warning: 309 tokens are more than the 128")

    def test_a_file_stands_before_the_question(self, command: Command, model: Path, tmp_path: Path) -> None:
        (tmp_path / "text.txt").write_text("a text")
        both = command("generate", model, "--file", tmp_path / "text.txt", "--prompt", "Why?", "--max-new-tokens", 4)
        joined = command("generate", model, "--prompt", "a text\n\nWhy?", "--max-new-tokens", 4)
        stdin = command("generate", model, "--file", "-", "--max-new-tokens", 4, stdin="a text\n\nWhy?")
        assert both.out == joined.out == stdin.out

    def test_plain_leaves_the_template_out(self, command: Command, model: Path) -> None:
        arguments = ("generate", model, "--prompt", "hello", "--max-new-tokens", 4, "--json")
        templated, plain = (json.loads(command(*arguments, *more).out) for more in ((), ("--plain",)))
        assert (templated["prompt_tokens"], plain["prompt_tokens"]) == (10, 6)


class TestRead:
    @pytest.mark.parametrize("plain", [False, True])
    @pytest.mark.parametrize("method", ["none", "streaming:sinks=4,window=40", "focused:local=32", "yarn"])
    def test_asked_later_it_answers_as_if_it_read_again(
        self, command: Command, model: Path, tmp_path: Path, method: str, plain: bool
    ) -> None:
        (tmp_path / "text.md").write_text("A text of some length, which is read once. " * 2)
        out, more = tmp_path / "new" / "text.memory", ["--plain"] * plain
        done = command("read", model, tmp_path / "text.md", "--out", out, "-m", method, "--json", *more)
        told = json.loads(done.out)
        assert (done.code, done.err) == (0, "") and told["file_bytes"] == out.stat().st_size > told["cache_bytes"] > 0
        for question in ("Why?", "And when?", "Why?"):
            asked = ("generate", model, "--prompt", question, "--max-new-tokens", 6)
            answer = command(*asked, "--memory", out)
            assert (answer.code, answer.err) == (0, "")
            again = command(*asked, "-m", told["method"], "--file", tmp_path / "text.md", *more)
            assert answer.out == again.out

    def test_standard_input_and_a_line_for_people(self, command: Command, model: Path, tmp_path: Path) -> None:
        done = command("read", model, "-", "--out", tmp_path / "a.memory", stdin="a text")
        assert done.code == 0 and done.out.startswith(f"{tmp_path / 'a.memory'}: 10 tokens read with none in ")

    def test_refusals(self, command: Command, model: Path, tmp_path: Path) -> None:
        (tmp_path / "empty.txt").write_text(" \n")
        done = command("read", model, tmp_path / "empty.txt", "--out", tmp_path / "a.memory")
        assert (done.code, done.err) == (2, "error: the document is empty\n") and not (tmp_path / "a.memory").exists()
        command("read", model, "-", "--out", tmp_path / "a.memory", stdin="a text")
        asked = ("generate", model, "--memory", tmp_path / "a.memory")
        assert "no prompt" in command(*asked).err
        assert "leave --file out" in command(*asked, "--file", tmp_path / "empty.txt").err
        done = command(*asked, "--prompt", "Why?", "-m", "streaming:window=40")
        assert done.code == 2 and "was read under none, and the model has streaming:window=40 on it" in done.err
        done = command("generate", model, "--memory", tmp_path / "empty.txt", "--prompt", "Why?")
        assert done.code == 2 and "empty.txt cannot be read as a memory" in done.err

    def test_the_built_in_model(self, command: Command, tmp_path: Path) -> None:
        text = "It was night. The boats lay still in the harbour, and no one was on the quay."
        out = tmp_path / "night.memory"
        done = command("read", "longspan-7m", "-", "--out", out, "--device", "cpu", stdin=text)
        assert done.code == 0
        asked = ("generate", "longspan-7m", "--device", "cpu", "--max-new-tokens", 8, "--prompt", "And then")
        (tmp_path / "night.txt").write_text(text)
        assert command(*asked, "--memory", out).out == command(*asked, "--file", tmp_path / "night.txt").out


class TestChat:
    def test_talks_until_it_is_told_to_stop(self, command: Command, model: Path) -> None:
        lines = ["hello", "/stats", "", "again", "/reset", "/stats", "/what", "/exit", "never said"]
        done = command("chat", model, "--max-new-tokens", 4, stdin="\n".join(lines))
        assert done.code == 0
        assert "streaming:sinks=4,window=124" in done.err
        assert "13 tokens seen in 1 turns" in done.err
        assert "0 tokens seen in 0 turns" in done.err
        assert "no command /what" in done.err

    def test_without_a_template_it_goes_on_with_the_text_and_says_so(
        self, command: Command, model: Path, tmp_path: Path
    ) -> None:
        folder = shutil.copytree(model, tmp_path / "plain")
        (folder / "chat_template.jinja").unlink()
        done = command("chat", folder, "--max-new-tokens", 4, stdin="hello")
        assert done.code == 0 and "no chat template: it goes on with the text that you write" in done.err
        made = generate_text(tiny.model(), tiny.tokenizer(), "hello", max_new_tokens=4, chat=False)
        assert done.out == made.text + "\n"
        assert "no chat template" not in command("chat", model, "--max-new-tokens", 4, stdin="hello").err

    def test_the_models_that_come_along_chat(self, command: Command) -> None:
        done = command(
            "chat", "longspan-7m", "--max-new-tokens", 8, "--device", "cpu", stdin="It was night.\nAnd then\n/stats"
        )
        assert done.code == 0 and len(done.out) > 20
        assert "streaming:sinks=4,window=508" in done.err and "in 2 turns" in done.err

    def test_ends_with_its_input(self, command: Command, model: Path) -> None:
        assert command("chat", model, "--max-new-tokens", 4, stdin="hello").code == 0


class TestInclude:
    def test_the_guides_examples_are_methods_and_a_task(self, command: Command, examples: dict[str, Path]) -> None:
        task = examples.pop("first_word.py")
        assert sorted(examples) == ["cutoff.py", "rootdecay.py", "sharpen.py", "strided.py"]
        found = {}
        for name, path in examples.items():
            found[name] = json.loads(command("methods", Path(name).stem, "--include", path, "--json").out)
            assert found[name]["paper"] == "this page"
        assert found["cutoff.py"]["settings"][1] == {"name": "turns", "type": "float", "default": 8.0}
        assert found["rootdecay.py"]["about"] == ""  # its class says nothing
        assert json.loads(command("tasks", "first-word", "--include", task, "--json").out)["metric"] == "share right"

    def test_they_do_what_they_say(self, examples: dict[str, Path]) -> None:
        include(examples.values())
        assert os.environ["LONGSPAN_INCLUDE"] == os.pathsep.join(map(str, examples.values()))
        model, ids = tiny.model(), torch.arange(200)[None]
        with torch.no_grad():
            before = model(ids).logits
            for spec in ("cutoff:factor=4", "sharpen", "cutoff:factor=2 + self-extend:group=2", "strided:recent=9"):
                with ls.applied(model, spec):
                    assert not torch.allclose(model(ids).logits, before, atol=1e-5)
                    assert torch.allclose(model(ids[:, :1]).logits, before[:, :1], atol=1e-4)
            assert torch.equal(model(ids).logits, before)

    def test_the_guides_task_knows_the_right_answer(self, examples: dict[str, Path]) -> None:
        include([examples["first_word.py"]])
        tokenizer = tiny.tokenizer()
        task = parse_task("first-word")
        first, second = task.samples(tokenizer, 100, 2, 0)
        text = tokenizer.decode([*first.tokens, *first.meta["answer"]])
        assert len(first.tokens) + len(first.meta["answer"]) == 100
        assert text.partition("The first word is ")[2].startswith(text.rpartition("was ")[2])
        assert first.tokens != second.tokens
        assert task.run(tiny.model(), tokenizer, first, Meter(torch.device("cpu"))).score in (0.0, 1.0)

    def test_a_file_is_run_once(self, examples: dict[str, Path]) -> None:
        assert load_user_file(examples["cutoff.py"]) is load_user_file(examples["cutoff.py"])


class TestCompare:
    def test_measures_reports_and_resumes(self, command: Command, model: Path, tmp_path: Path) -> None:
        arguments = ["compare", model, "-m", "none", "-m", "yarn", "-t", "ppl", "-l", 200, "--samples", 2]
        out = tmp_path / "run"
        first = command(*arguments, "--out", out)
        assert first.code == 0, first.err
        assert "yarn" in first.out
        assert f"page: {out / 'report.html'}" in first.out.replace("\n", "")
        assert "<html" in (out / "report.html").read_text()
        again = command(*arguments, "--out", out, "--json")
        assert "4 of them finished" in again.err
        rows = json.loads(again.out)["rows"]
        assert {(r["method"], r["length"]) for r in rows} == {
            (m, n) for m in ("none", "yarn:factor=1.75") for n in (128, 200)
        }

    @pytest.mark.parametrize(
        ("model", "begins"),
        [("runs/pose/model", "pose-model-"), ("smollm2-135m", "smollm2-135m-"), ("model", "model-")],
    )
    def test_the_folder_that_is_chosen_tells_models_apart(self, model: str, begins: str) -> None:
        assert default_folder(model).name.startswith(begins)

    def test_a_users_method_reaches_the_workers(
        self, command: Command, model: Path, tmp_path: Path, examples: dict[str, Path]
    ) -> None:
        done = command(
            *["compare", model, "--include", examples["cutoff.py"], "-m", "cutoff:factor=2", "-t", "ppl", "-l", 128],
            *["--samples", 1, "--out", tmp_path / "run", "--json"],
        )
        assert done.code == 0, done.err
        assert {r["method"]: r["status"] for r in json.loads(done.out)["rows"]} == {
            "none": "ok",
            "cutoff:factor=2": "ok",
        }

    def test_report_writes_the_page_where_it_is_told(self, command: Command, model: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        command("compare", model, "-m", "none", "-t", "ppl", "-l", 128, "--samples", 1, "--out", run)
        page = tmp_path / "elsewhere.html"
        assert command("report", run, "--html", page).code == 0
        assert page.exists()
        assert "none" in command("report", run).out
        assert json.loads(command("report", run, "--json").out)["native_length"] == 128


class TestApply:
    def test_saves_a_model_that_plain_transformers_loads(self, command: Command, model: Path, tmp_path: Path) -> None:
        done = command("apply", model, "yarn", "--length", 500, "--out", tmp_path / "long")
        assert (done.code, done.err) == (0, "")
        assert "it reads 512 tokens" in done.out
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "long")
        ids = torch.arange(200)[None]
        with torch.no_grad(), ls.applied(tiny.model(), "yarn:factor=4") as applied:
            assert torch.allclose(loaded(ids).logits, applied(ids).logits, atol=1e-5)

    def test_overwrites_only_when_told_to(self, command: Command, model: Path, tmp_path: Path) -> None:
        arguments = ("apply", model, "ntk:factor=2", "--out", tmp_path / "long", "--json")
        assert json.loads(command(*arguments).out)["method"] == "ntk:factor=2"
        assert command(*arguments).code == 2
        assert command(*arguments, "--overwrite").code == 0

    def test_what_it_was_saved_with_is_used(self, command: Command, model: Path, tmp_path: Path) -> None:
        command("apply", model, "yarn:factor=4", "--out", tmp_path / "long")
        done = command("generate", tmp_path / "long", "--prompt", "x" * 300, "--max-new-tokens", 4, "--json")
        assert (done.code, done.err) == (0, "")


class TestPlan:
    def test_says_what_a_length_needs(self, command: Command, model: Path) -> None:
        done = command("plan", model, "--length", "4k")
        assert (done.code, done.err) == (0, "")
        assert "4,096 tokens in" in done.out
        made = json.loads(command("plan", model, "-l", 512, "-m", "yarn", "--json").out)
        assert (made["method"], made["length"]) == ("yarn:factor=4", 512)


class TestBench:
    def test_figures_as_table_and_file(self, command: Command, model: Path, tmp_path: Path) -> None:
        method = ("-m", "streaming:sinks=4,window=28")
        done = command("bench", "decode", model, *method, "--tokens", 8, "--out", tmp_path / "new" / "decode.json")
        assert done.code == 0
        assert "stock generate, dynamic cache" in done.out
        assert json.loads((tmp_path / "new" / "decode.json").read_text())["settings"]["tokens"] == 8
        done = command("bench", "prefill", model, *method, "-l", 200, "--chunk", 64, "--repeats", 1, "--json")
        assert json.loads(done.out)["settings"]["length"] == 200
