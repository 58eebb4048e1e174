"""README.md and docs/: their length, and that files, functions, flags, commands and tags they name exist."""
import ast
import re
import shlex

import pytest

import adaptive_learngene
import data
import tal
from conftest import ROOT

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS]
SCRIPTS = {"tal.py": tal, "adaptive_learngene.py": adaptive_learngene, "data.py": data}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def code_blocks(page):
    """The indented lines of a page that follow an empty line, as those of lists do not; a line that ends in
    \\ is joined to the next one."""
    text = page.read_text().replace("\\\n", " ")
    blocks = [block for block in text.split("\n\n") if block.startswith("    ")]
    return [line.strip() for block in blocks for line in block.splitlines()]


def commands(page):
    """[(script, its arguments)] of all command lines of a page, comments left out."""
    found = []
    for line in code_blocks(page):
        words = shlex.split(line, comments=True)
        places = [k for k, word in enumerate(words) if word in SCRIPTS]
        if places:
            found.append((words[places[0]], words[places[0] + 1:]))
    return found


# ------------------------------------------------------------------------------------------------------------
# Form
# ------------------------------------------------------------------------------------------------------------

@pages
def test_lines_fit(page):
    lines = page.read_text().splitlines()
    assert [line for line in lines if len(line) > 110] == []
    assert page != README or len(lines) <= 250


@pages
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)]+)\)", page.read_text())
    local = [target for target in targets if not target.startswith("http")]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_every_page_is_linked():
    linked = re.findall(r"\]\((docs/[^)]+)\)", README.read_text())
    assert set(linked) == {f"docs/{path.name}" for path in (ROOT / "docs").iterdir()}


def test_references_are_whole():
    """Each entry is closed and has an author, a title and a year; README shows the first two."""
    entries = re.split(r"^@", (ROOT / "docs/references.bib").read_text(), flags=re.MULTILINE)[1:]
    for entry in entries:
        assert entry.count("{") == entry.count("}")
        assert all(re.search(rf"\b{field} +=", entry) for field in ("author", "title", "year")), entry
    shown = re.findall(r"^@inproceedings\{(\w+)", README.read_text(), flags=re.MULTILINE)
    assert shown == [entry.split("{")[1].split(",")[0] for entry in entries[:2]]


# ------------------------------------------------------------------------------------------------------------
# The papers beside the code
# ------------------------------------------------------------------------------------------------------------

def function_map(file):
    """[(of the paper, names of functions and classes)] of README's table for this file."""
    table = README.read_text().split(f"| in {file} |")[1].split("\n\n")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines()[2:]]
    return [(row[0].strip(), re.findall(r"`(\w+)`", row[1])) for row in rows]


def functions(file):
    """{name: its lines} of all functions, methods and classes in a file."""
    source = (ROOT / file).read_text()
    named = (ast.FunctionDef, ast.ClassDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, named)]
    return {node.name: source.splitlines()[node.lineno - 1:node.end_lineno] for node in nodes}


@pytest.mark.parametrize("file, count", [("tal.py", 7), ("adaptive_learngene.py", 8)])
def test_every_equation_is_a_tagged_function(file, count):
    """A row "| Eq. (4) | `loss_aux` |": there is this function, and a line of it has the tag "# Eq. (4)"."""
    there, found = functions(file), set()
    for paper, names in function_map(file):
        assert names and all(name in there for name in names), (paper, names)
        lines = [line for name in names for line in there[name]]
        for number in re.findall(r"\((\d+)\)", paper if paper.startswith("Eq") else ""):
            assert any(re.search(rf"#.*Eq\. \({number}\)", line) for line in lines), (paper, names)
            found.add(int(number))
    assert found == set(range(1, count + 1))


def test_every_decision_is_listed_and_tagged():
    """D1, D2, ... and A1, A2, ...: one entry each, and at least one place in the code."""
    listed = re.findall(r"^\*\*([DA]\d+)\.", (ROOT / "docs/decisions.md").read_text(), flags=re.MULTILINE)
    for letter, file in (("D", "tal.py"), ("A", "adaptive_learngene.py")):
        mine = [tag for tag in listed if tag[0] == letter]
        assert mine == [f"{letter}{k}" for k in range(1, len(mine) + 1)]
        code = "".join((ROOT / name).read_text() for name in (file, "common.py", "data.py", "reproduce.sh"))
        assert set(re.findall(rf"\b{letter}\d+\b", code)) == set(mine)


# ------------------------------------------------------------------------------------------------------------
# Commands and flags
# ------------------------------------------------------------------------------------------------------------

@pages
def test_commands_parse(page, tmp_path, monkeypatch):
    """With all their flags; the folders and datasets that they name are not here."""
    monkeypatch.setattr(data, "check_names", lambda names, *where, **more: list(names))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vit_base.safetensors").touch()
    for script, words in commands(page):
        if script != "data.py":
            SCRIPTS[script].settings(words)


def test_readme_has_commands():
    """The test above would pass, too, if it found none."""
    stages = {(script, word) for script, words in commands(README) for word in words}
    for script, stage in (("tal.py", "tune"), ("tal.py", "customize"), ("adaptive_learngene.py", "select")):
        assert (script, stage) in stages
    assert len(commands(ROOT / "docs/full_scale.md")) >= 3


OTHERS = ("--standalone", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint",     # torchrun
          "--array", "--gres", "--wrap")                                                           # sbatch


@pages
def test_flags_exist(page):
    """Every flag that a page names is one of a script's, of reproduce.sh, of torchrun or of sbatch."""
    known = set(OTHERS)
    for line in (ROOT / "reproduce.sh").read_text().splitlines():
        if re.fullmatch(r" +(--[a-z-]+( \| )?)+\).*", line):    # of its case
            known |= set(re.findall(r"--[a-z-]+", line.split(")")[0]))
    for file in (*SCRIPTS, "common.py", "tests/bench.py", "results/tables.py"):
        known |= set(re.findall(r'"(--[a-z-]+)"', (ROOT / file).read_text()))
    named = set(re.findall(r"(?<![\w<!-])--[a-z][a-z-]*", page.read_text()))
    assert named - known == set()
