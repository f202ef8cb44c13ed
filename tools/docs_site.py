"""Collects the documentation site for mkdocs (`make docs`): pages of the repository, and one for each module of the package.

The Markdown files are written for the repository: README.md at its root, docs/ beside it. On the site README.md is the home page
and docs/ the root, so links are worked out in the repository and written anew. What a link names there must exist: a page or a
picture becomes part of the site, another file's name stays as text without a link. The modules are found by walking src/, so a
file that is moved needs no change here.
"""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "longspan"
PROJECT = {
    "README.md": "index.md",
    "reproductions/README.md": "reproductions.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
"""Pages of the site that lie outside docs/, by their path in the repository."""
GUIDES = ("positions", "attention", "memory", "training", "adding-a-method", "own-method")
"""Pages of docs/ that come first, in this order; the others follow by name."""
PICTURES = {".png", ".svg", ".jpg"}
HIDDEN = ("texts", "weights", "templates")
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!\w+:|//|#)([^)\s]+)\)")
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.M | re.S)
_log = logging.getLogger("mkdocs.plugins.site")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Writes the navigation: home, guides, the project, and the modules as the tree that they are."""
    guides = sorted((p.stem for p in (ROOT / "docs").glob("*.md")), key=lambda n: (_rank(n), n))
    project = [page for path, page in PROJECT.items() if path != "README.md" and (ROOT / path).is_file()]
    config.nav = [
        {"Home": "index.md"},
        {"Guides": [f"{name}.md" for name in guides]},
        {"Project": project},
        {"API": _branch(PACKAGE)},
    ]
    config.watch.extend(str(ROOT / part) for part in ("src", *PROJECT))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what does not lie in docs/."""
    for path, page in PROJECT.items():
        if (ROOT / path).is_file():
            files.append(File.generated(config, page, content=(ROOT / path).read_text(encoding="utf-8")))
    for name in _modules():
        files.append(File.generated(config, _page_of(name), content=f"# {name}\n\n::: {name}\n"))
    for picture in _pictures(files):
        if files.get_file_from_path(picture) is None:
            files.append(File.generated(config, picture, abs_src_path=str(ROOT / picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with its links as the site needs them."""
    if page.file.src_uri.startswith("api/"):
        return markdown
    source = _in_repository(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        sign, label, target = match.groups()
        path, hash_, anchor = target.partition("#")
        full = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not (ROOT / full).exists():
            _log.warning("%s links to %s, which does not exist", source, target)
            return label
        place = _on_site(full)
        if files.get_file_from_path(place) is None:
            return label
        return (
            f"{sign}[{label}]({posixpath.relpath(place, posixpath.dirname(page.file.src_uri) or '.')}{hash_}{anchor})"
        )

    return _outside_fences(markdown, lambda text: _LINK.sub(rewritten, text))


def _outside_fences(markdown: str, change: Any) -> str:
    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence.group()]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])


def _rank(guide: str) -> int:
    return GUIDES.index(guide) if guide in GUIDES else len(GUIDES)


def _in_repository(page: str) -> str:
    return next((path for path, name in PROJECT.items() if name == page), f"docs/{page}")


def _on_site(path: str) -> str:
    """Where a file or folder of the repository would be on the site."""
    if (ROOT / path).is_dir():
        path = posixpath.join(path, "README.md")
    return PROJECT.get(path, path.removeprefix("docs/"))


def _pictures(files: Files) -> Iterator[str]:
    """Pictures outside docs/ that pages show."""
    for file in list(files.documentation_pages()):
        if not file.src_uri.startswith("api/"):
            folder = posixpath.dirname(_in_repository(file.src_uri))
            for _, _, target in _LINK.findall(file.content_string):
                path = posixpath.normpath(posixpath.join(folder, target))
                if Path(path).suffix in PICTURES and not path.startswith("docs/") and (ROOT / path).is_file():
                    yield path


def _modules() -> Iterator[str]:
    """Names of all modules of the package that do not begin with an underscore."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(part.startswith("_") for part in parts):
            yield ".".join(parts)


def _page_of(module: str) -> str:
    path = module.replace(".", "/")
    return f"api/{path}/index.md" if (PACKAGE.parent / path).is_dir() else f"api/{path}.md"


def _branch(folder: Path) -> list[Any]:
    """A package in the navigation: its own page, its modules, its packages."""
    name = ".".join(folder.relative_to(PACKAGE.parent).parts)
    entries: list[Any] = [_page_of(name)]
    for path in sorted(folder.iterdir(), key=lambda p: (p.is_dir(), p.name)):
        if path.name.startswith("_") or path.name in HIDDEN:
            continue
        if path.suffix == ".py":
            entries.append({path.stem: _page_of(f"{name}.{path.stem}")})
        elif (path / "__init__.py").is_file():
            entries.append({path.name: _branch(path)})
    return entries
