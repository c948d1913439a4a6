"""Pages link to files of the repository where they lie; this brings the linked files into the site.

A file outside the pages is at ``repository/PATH`` in the site, and links from and to it are rewritten. Markdown files
become pages, with what they link to in their turn. A link to what is not there stays as it is: the build fails.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)")  # the path in [text](path#anchor)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every file of the repository that the navigation has or a page links to."""
    pages = Path(config.docs_dir)
    todo = [pages / file.src_uri for file in files.documentation_pages()]
    todo += [ROOT / uri.removeprefix("repository/") for uri in _uris(config.nav) if uri.startswith("repository/")]
    seen: set[Path] = set()
    while todo:
        path = todo.pop()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        if not path.is_relative_to(pages):
            files.append(File.generated(config, _uri(path, pages), abs_src_path=str(path)))
        if path.suffix == ".md":
            todo += [
                Path(posixpath.normpath(path.parent / link)) for link in LINK.findall(path.read_text(encoding="utf-8"))
            ]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links by path in the repository become links by path in the site."""
    pages, folder = Path(config.docs_dir), posixpath.dirname(page.file.src_uri)

    def rewritten(link: re.Match[str]) -> str:
        target = Path(posixpath.normpath(Path(str(page.file.abs_src_path)).parent / link[1]))
        return posixpath.relpath(_uri(target, pages), folder or ".") if target.is_file() else link[1]

    return LINK.sub(rewritten, markdown)


def _uri(path: Path, pages: Path) -> str:
    """Where a file is in the site."""
    if path.is_relative_to(pages):
        return path.relative_to(pages).as_posix()
    return f"repository/{path.relative_to(ROOT).as_posix()}"


def _uris(nav: object) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, (list, dict)):
        for entry in nav if isinstance(nav, list) else nav.values():
            yield from _uris(entry)
