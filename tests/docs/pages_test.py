"""What the documents name exists: files, commands, targets, configs."""

import ast
import importlib
import importlib.util
import pathlib
import re

import pytest

from docs.hooks import diagrams

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
MOST_LINES_OF_THE_README = 180
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)


def text_of(page):
    """Returns the text of a page, without the old names in the changelog."""
    text = page.read_text()
    if page.name == "CHANGELOG.md":
        # Tables have the name before in the first column, and the name now.
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.M)
    return text


each_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: str(page.relative_to(ROOT))
)


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= MOST_LINES_OF_THE_README
    # The first screen says how to install the optimizer.
    assert any("pip install" in line for line in lines[:10])


def anchors_of(page):
    """Returns the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in headings
    }


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors_of(path), target


@each_page
def test_modules_exist(page):
    modules = re.findall(r"python[\d.]* -m ([\w.]+\w)", text_of(page))
    for module in modules:
        assert importlib.util.find_spec(module.removesuffix(".NAME")), module


@each_page
def test_targets_of_make_exist(page):
    commands = r"(?:^    |`)make ([a-z][\w-]*)"
    for target in re.findall(commands, text_of(page), re.M):
        assert target in TARGETS, target


@each_page
def test_named_files_exist(page):
    folders = "benchmarks|docs|examples|horovod_recipes|keras_lars|tests"
    names = re.findall(
        rf"[`\s]((?:{folders})/[\w/.-]*\w)(?=[`\s,;)])", text_of(page)
    )
    for name in names:
        written_on_a_gpu = name.rpartition(".")[0].endswith("_gpu")
        assert written_on_a_gpu or (ROOT / name).exists(), name


@each_page
def test_configs_exist(page):
    for name in re.findall(r"--config=(\w+(?::\w+)?)", text_of(page)):
        family, _, variant = name.partition(":")
        recipe = importlib.import_module(f"horovod_recipes.configs.{family}")
        recipe.get_config(*([variant] if variant else []))


@each_page
def test_python_compiles(page):
    """Examples with prompts run as doctests instead."""
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        if ">>>" not in block:
            compile(block, str(page), "exec")


@pytest.mark.parametrize("name", diagrams.FIGURES)
def test_figures_are_drawn(name):
    """`python docs/hooks/diagrams.py` draws them again."""
    drawn = (ROOT / "docs/images" / name).read_text()
    assert drawn == diagrams.FIGURES[name]()


def test_files_in_the_step_exist():
    for _, names, _ in diagrams.STEP:
        name = names.split(",")[0]
        found = [ROOT / name, ROOT / "horovod_recipes" / name]
        assert any(path.exists() for path in found), name


# Parts of the errors that docs/clusters.md shows.
ERRORS = (
    " is lost: nothing has been heard of it for ",
    " hangs: no progress ",
    "another rank stopped; see what that rank printed",
)


def strings_of_the_package():
    """Yields the constant parts of all strings in horovod_recipes."""
    for path in (ROOT / "horovod_recipes").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_shown_errors_are_those_of_the_code():
    page = re.sub(r"\s+", " ", (ROOT / "docs/clusters.md").read_text())
    strings = list(strings_of_the_package())
    for error in ERRORS:
        assert error in page, error
        assert any(error in string for string in strings), error
