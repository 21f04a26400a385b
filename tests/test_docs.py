"""The documentation: every page has its place, and leads somewhere."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest
import yaml

from scripts.build_docs import PAGES

ROOT = Path(__file__).parent.parent
MARKDOWN = [
    *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "bench" / "NOTES.md",
    ROOT / "mlsae" / "builtin" / "model" / "README.md",
]  # fmt: skip
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)]*)?\)")


def pages(nav):
    """The paths in the navigation of mkdocs.yml, which nests."""
    for entry in nav:
        for target in entry.values():
            yield from pages(target) if isinstance(target, list) else [target]


def test_every_page_of_the_docs_is_in_the_navigation():
    """A new page of docs/ needs a line under `nav` in mkdocs.yml."""
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]  # the last key
    listed = list(pages(yaml.safe_load(nav)))
    assert len(listed) == len(set(listed))
    docs = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md")}
    assert docs <= set(listed), f"not in the nav of mkdocs.yml: {docs - set(listed)}"
    copied = {p.relative_to(ROOT).as_posix() for pattern in PAGES for p in ROOT.glob(pattern)}
    assert set(listed) <= copied


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_page_links_to_is_there(page):
    copied = {p for pattern in PAGES for p in ROOT.glob(pattern)}
    for link in LINK.findall(page.read_text()):
        if re.match(r"https?:|mailto:", link):
            continue
        target = (page.parent / link).resolve()
        assert target.exists(), link
        if page in copied:
            assert target in copied, f"{link}: the site lacks it; add it to PAGES"


NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))


def cells(notebook):
    """The text of each code cell, and the commands in it, which begin with "!"."""
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], f"{notebook.name} is kept without outputs"
            lines = "".join(cell["source"]).splitlines()
            commands = [line.strip()[1:] for line in lines if line.strip().startswith("!")]
            blanked = [re.sub(r"^(\s*)[!%].*", r"\1pass", line) for line in lines]
            yield "\n".join(blanked), commands


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_notebook_imports_and_asks_for_exists(notebook):
    """They are run apart: `python -m scripts.run_notebooks`."""
    for text, commands in cells(notebook):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    if not hasattr(module, alias.name):  # then it is a module of that package
                        importlib.import_module(f"{node.module}.{alias.name}")
        for command in commands:
            program, *arguments = command.split(" -m ")[1].split()
            module = importlib.import_module(program)
            if program == "mlsae.train":
                module.parse(arguments)


def test_every_notebook_is_run_by_the_script():
    script = (ROOT / "scripts" / "run_notebooks.py").read_text()
    (order,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(script).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "ORDER"
    )
    assert sorted(order) == [notebook.stem for notebook in NOTEBOOKS]
