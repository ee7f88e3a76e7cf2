"""Gives the site a page for each file outside of docs/ that a page links to.

On GitHub a page links to `../horovod_recipes/configs/demo.py`. The site has no
such file, so this hook of MkDocs adds a page with its text, and links to that.
A link to a file that does not exist ends the build.
"""

import os
import pathlib
import re

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from mkdocs.structure.files import InclusionLevel

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
# Group 2 is the target of a Markdown link, without its anchor.
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".slurm": "bash", ".sh": "bash"}


def on_files(files, config):
    """Adds the pages of linked files, and of files that those link to."""
    waiting = [
        ROOT / "docs" / file.src_uri for file in files.documentation_pages()
    ]
    added = set()
    while waiting:
        page = waiting.pop()
        for path in linked_files(page):
            if path in added or path.is_relative_to(DOCS):
                continue
            added.add(path)
            files.append(
                File.generated(
                    config,
                    source_uri(path),
                    content=text_of(path),
                    inclusion=InclusionLevel.NOT_IN_NAV,
                )
            )
            if path.suffix == ".md":
                waiting.append(path)
    return files


def on_page_markdown(markdown, page, config, files):
    """Returns the text of a page with its links as they are in the site."""
    here = real_path(page.file.src_uri)
    if here.suffix != ".md":
        return markdown

    def in_site(match):
        before, target, after = match.groups()
        if not is_relative(target):
            return match[0]
        path = (here.parent / target).resolve()
        if path.is_relative_to(DOCS):
            uri = path.relative_to(DOCS).as_posix()
        else:
            uri = source_uri(path)
        start = pathlib.PurePosixPath(page.file.src_uri).parent
        return before + os.path.relpath(uri, start) + after

    return LINK.sub(in_site, markdown)


def linked_files(page):
    """Yields the path of each file or folder that a page links to."""
    for _, target, _ in LINK.findall(page.read_text()):
        if is_relative(target):
            path = (page.parent / target).resolve()
            if not path.exists():
                raise PluginError(f"{page} links to {target}, which is missing")
            yield path


def is_relative(target):
    return "://" not in target and not target.startswith(("mailto:", "/"))


def source_uri(path):
    """Returns where the site has the page of a file outside of docs/."""
    return f"source/{path.relative_to(ROOT).as_posix()}".removesuffix(".md") + (
        ".md"
    )


def real_path(uri):
    """Returns the file that a page of the site shows."""
    path = DOCS / uri
    if path.exists():
        return path
    inside = uri.removeprefix("source/")
    without = ROOT / inside.removesuffix(".md")
    return without if without.exists() else ROOT / inside


def text_of(path):
    """Returns the Markdown of the page of a file or folder."""
    if path.suffix == ".md":
        return path.read_text()
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        found = sorted(
            file.name
            for file in path.iterdir()
            if file.is_file() and not file.name.startswith(".")
        )
        body = "\n".join(f"- `{name}/{file}`" for file in found)
    else:
        language = LANGUAGES.get(path.suffix, "text")
        body = f"````{language}\n{path.read_text().rstrip()}\n````"
    return f"# {name}\n\n{body}\n"
