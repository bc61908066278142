"""Every public name has its place in the docs, every equation its proof, and no figure is typed."""

import ast
import importlib.util
import json
import re
from dataclasses import replace
from fnmatch import fnmatchcase as fnmatch
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from minilora.cli.commands import NAMES
from minilora.findings import FINDINGS, LIBRARIES
from minilora.findings.finding import Finding
from minilora.findings.reproduce import SCRIPTS, script
from minilora.findings.versions import is_in_range
from minilora.verify.checks.registry import CHECKS
from minilora.verify.peers import PEERS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
GENERATED = ("_build", "api", "downloads", "findings")
PAGES = [
    path for path in sorted(DOCS.rglob("*.md")) if path.relative_to(DOCS).parts[0] not in GENERATED
]
MODULES = re.findall(r"^(spec/[a-z_]+)$", (DOCS / "index.md").read_text(), re.M)
"""The modules whose equations have a page written by hand, in the reading order."""


def loaded(path):
    """A module of the documentation, which no package holds."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATE = loaded(DOCS / "extensions" / "generated.py")


@cache
def public_names(source):
    """What a module offers: its __all__, or the names that it defines without an underscore."""
    names = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    if "__all__" in names:
        return set(ast.literal_eval(names["__all__"].value))
    return {name for name in names if not name.startswith("_")}


def source(module):
    """The module's source, or that of all modules of a package."""
    package = ROOT / "minilora" / module
    files = sorted(package.glob("*.py")) if package.is_dir() else [package.with_suffix(".py")]
    return "\n".join(path.read_text() for path in files)


def described(page):
    """The names that a page has an entry for: a heading, included code, or a word in code type."""
    return (
        set(re.findall(r"^#+ (\w+)$", page, re.M))
        | set(re.findall(r"^:pyobject: (\w+)$", page, re.M))
        | set(re.findall(r"`(\w+)`", page))
    )


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_described(module):
    names = public_names(source(module))
    assert names
    assert names - described((DOCS / f"{module}.md").read_text()) == set()


def test_a_name_without_an_entry_is_seen():
    names = public_names("LIMIT = 3\ndef shown(): ...\ndef absent(): ...\ndef _private(): ...")
    page = "## shown\n\n```{literalinclude} m.py\n:pyobject: shown\n```\nUp to `LIMIT`."
    assert names - described(page) == {"absent"}
    assert public_names("__all__ = ['one']\ndef other(): ...") == {"one"}


def sections(page):
    """{heading: its text}, of the headings that are one name."""
    parts = re.split(r"^##+ (.+)$", page, flags=re.M)
    return {
        name: text for name, text in zip(parts[1::2], parts[2::2], strict=True) if " " not in name
    }


def states_an_equation(function):
    """Whether the first line of the docstring does: `y = …`, `p ← …`."""
    first = (ast.get_docstring(function) or "").partition("\n")[0]
    return bool(re.match(r"\S{1,3}( \S{1,2})? [=←] ", first))


def lacking(name, page):
    """What the section of an equation lacks: its number, its code, its executed proof."""
    section = sections(page).get(name, "")
    wanted = {
        "equation": f":label: eq-{name}\n",
        "code": f":pyobject: {name}\n",
        "proof": r"```\{code-cell\}\n[^`]*?(assert|prove)",
    }
    wanted |= {what: re.escape(wanted[what]) for what in ("equation", "code")}
    return [what for what, pattern in wanted.items() if not re.search(pattern, section)]


EQUATIONS = [
    (module, node.name)
    for module in MODULES
    for node in ast.parse(source(module)).body
    if isinstance(node, ast.FunctionDef) and node.name in public_names(source(module))
    if states_an_equation(node)
]


@pytest.mark.parametrize(("module", "name"), EQUATIONS)
def test_every_equation_stands_beside_its_code_and_its_proof(module, name):
    assert lacking(name, (DOCS / f"{module}.md").read_text()) == []


def test_a_section_without_its_proof_is_seen():
    page = (DOCS / "spec/ops.md").read_text()
    assert ("spec/ops", "linear") in EQUATIONS
    assert lacking("linear", page) == []
    for what, cut in {
        "equation": ":label: eq-linear\n",
        "code": ":pyobject: linear\n",
        "proof": "prove(lambda x: linear(x, W, b), x=x)",
    }.items():
        assert lacking("linear", page.replace(cut, "")) == [what]


def test_every_module_of_the_specification_is_in_the_reading_order():
    spec = ROOT / "minilora" / "spec"
    paths = [*spec.glob("[a-z]*.py"), *(path.parent for path in spec.glob("*/__init__.py"))]
    modules = {f"spec/{path.stem}" for path in paths}
    assert set(MODULES) == modules


@pytest.mark.slow
def test_every_other_module_has_a_page_of_its_docstrings():
    documented = {Path(page).stem for page in GENERATE.api()}
    for path in sorted((ROOT / "minilora").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if name.count(".") and ".spec" not in name and GENERATE.offers(path):
            assert (name in documented) == GENERATE.is_documented(name)


def incomplete(finding):
    """What a finding lacks: what is right, its cause, what finds it, where it was seen."""
    wanted = {
        "title": finding.title and not finding.title.endswith("."),
        "right": finding.right != "",
        "verify": bool(finding.checks) != bool(finding.not_asked),
        "cause": finding.cause and not finding.cause.endswith("."),
        "fix": finding.fix and not finding.fix.endswith(".") and "\n" not in finding.fix,
        "reason": not finding.not_asked.endswith("."),
        "id": re.fullmatch(r"[a-z.-]+\.[a-z0-9-]+", finding.id) and finding.library in LIBRARIES,
        "release": finding.source if "." not in finding.seen else in_its_range(finding),
    }
    return [what for what, there in wanted.items() if not there]


def in_its_range(finding):
    return is_in_range(finding.seen, finding.versions)


@pytest.mark.parametrize("finding", FINDINGS.values(), ids=FINDINGS)
def test_a_finding_says_what_is_right_what_finds_it_and_where_it_was_seen(finding):
    assert incomplete(finding) == []


WHOLE = Finding(
    *("peft.one", "A title", "silent", "This", "0.21.2"),
    not_asked="it is new",
    cause="so",
    fix="otherwise",
)


@pytest.mark.parametrize(
    ("change", "lacks"),
    [
        ({}, []),
        ({"title": "A title."}, ["title"]),
        ({"right": ""}, ["right"]),
        ({"cause": ""}, ["cause"]),
        ({"fix": ""}, ["fix"]),
        ({"not_asked": ""}, ["verify"]),
        ({"found_by": ("peft", "linear.forward")}, ["verify"]),
        ({"not_asked": "", "found_by": ("peft", "linear.forward")}, []),
        ({"id": "petf.one"}, ["id"]),
        ({"versions": "<0.21"}, ["release"]),
    ],
)
def test_an_incomplete_finding_is_seen(change, lacks):
    assert incomplete(replace(WHOLE, **change)) == lacks


def not_known(id, peer, checks):
    """Those of the checks that do not exist, or that the peer does not declare as known for it."""
    said = rf"\b{re.escape(id)}\b(?![.-])"
    declared = [
        name.partition(":")[0]
        for name, entry in PEERS[peer].known.items()
        if re.search(said, entry.get("link", ""))
    ]
    exist = {check.id for check in CHECKS}
    return [c for c in checks if c not in exist or not any(fnmatch(c, name) for name in declared)]


FOUND = {it.id: (it.peer, it.checks) for it in FINDINGS.values() if it.peer}


@pytest.mark.parametrize("id", FOUND)
def test_the_checks_that_find_something_are_known_to_deviate(id):
    assert not_known(id, *FOUND[id]) == []


def test_a_check_that_is_not_known_to_deviate_is_seen():
    id, checks = "peft.unknown-adapter", ["lifecycle.unknown", "linear.forward", "lifecycle.none"]
    assert not_known(id, "peft", checks) == ["linear.forward", "lifecycle.none"]
    assert not_known("peft.max-norm", "peft", ["lifecycle.unknown"]) == ["lifecycle.unknown"]


@pytest.mark.slow
def test_the_table_has_a_line_for_each_finding():
    table = GENERATE.findings()[GENERATE.FOUND_BY]
    assert table.count("\n| ") == 4 + len(LIBRARIES) + len(FINDINGS)
    assert table.startswith(
        f"{len(FINDINGS)} findings, of which `minilora verify` finds {len(FOUND)} "
    )
    for peer, checks in FOUND.values():
        assert f"`{peer}`: `{checks[0]}`" in table
    assert f"{{include}} {GENERATE.FOUND_BY}" in (DOCS / "findings.md").read_text()


@pytest.mark.slow
def test_every_finding_is_on_the_page_of_its_library():
    pages = GENERATE.findings()
    del pages[GENERATE.FOUND_BY]
    for library in LIBRARIES.values():
        page = pages[f"findings/{library.name}.md"]
        titles = re.findall("^## (.*)$", page, re.M)
        assert titles == [finding.title for finding in library.findings]
        assert all(finding.library == library.name for finding in library.findings)
    listed = re.findall(r"^(findings/[\w.-]+)$", (DOCS / "findings.md").read_text(), re.M)
    assert {f"{name}.md" for name in listed} == pages.keys()


TESTED = re.findall(
    r'^@pytest.mark.finding\("(.*)"\)$', (ROOT / "tests/peers/test_findings.py").read_text(), re.M
)
SHOWN = [".".join(p.relative_to(SCRIPTS).with_suffix("").parts) for p in SCRIPTS.rglob("*.py")]
READ = [finding.id for finding in FINDINGS.values() if finding.source]


def test_every_finding_has_a_script_or_a_source_and_every_test_its_script():
    assert sorted([*SHOWN, *READ]) == sorted(FINDINGS)
    assert {*TESTED} <= {*SHOWN}


def test_what_has_a_script_has_it_on_its_page():
    pages = "".join(GENERATE.findings().values())
    assert all(pages.count(script(id)) == 1 for id in SHOWN)
    assert not any(script(id) for id in READ)


def test_a_notebook_has_the_cells_of_its_page_and_no_output():
    (name,) = GENERATE.NOTEBOOKS
    page = (DOCS / f"{name}.md").read_text()
    cells = json.loads(GENERATE.notebook(page))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) == page.count("```{code-cell}") > 0
    assert not any(cell["outputs"] for cell in code)
    for cell in code:
        ast.parse(cell["source"])


MARKUP = loaded(DOCS / "extensions" / "markup.py")


def test_equations_that_share_a_line_get_lines_of_their_own():
    assert MARKUP.one_below_another("a = b") == "a = b"
    expected = "\\begin{gathered}\na, \\\\\nb\n\\end{gathered}"
    assert MARKUP.one_below_another(r"a, \qquad b") == expected
    gathered = r"\begin{gathered} a, \qquad b \end{gathered}"
    assert MARKUP.one_below_another(gathered) == expected
    cases = r"\begin{cases} a & \qquad b \end{cases}"
    assert MARKUP.one_below_another(cases) == cases


def test_a_docstring_means_in_the_reference_what_it_says_in_the_source():
    lines = ["W* and a_ of ``x|y``, see `scale`.", "", "Shapes: x (n,)", "Errors: ValueError."]
    assert MARKUP.as_rst(lines) == [
        "W\\* and a\\_ of \\ ``x|y``\\ , see \\ ``scale``\\ .",
        "",
        "**Shapes:** x (n,)",
        "",
        "**Errors:** ValueError.",
        "",
    ]
    assert MARKUP.as_rst(["- one", "  more", "- two"]) == ["- one more", "- two", ""]
    assert MARKUP.as_rst(["    code"]) == ["::", "", "        code", ""]


def test_the_help_of_every_command_is_shown():
    page = GENERATE.options()
    assert re.findall(r"^## ([\w-]+)$", page, re.M) == [*NAMES]
    assert (
        page.count("usage: minilora") == 1 + len(NAMES) + page.count("### audit ") > len(NAMES) + 1
    )


def prose(page):
    """A page without its code, mathematics and headings."""
    page = re.sub(r"^```.*?^```$|\A---\n.*?^---$", "", page, flags=re.M | re.S)
    return re.sub(r"^#.*$|`[^`]*`|\$[^$]*\$", "", page, flags=re.M)


MEASURED = re.compile(
    r"\d(\.\d+)?e[-+]?\d|\d+\.\d+"
    r"|\d+ ?(%|×|x\b|times|digits|[kMG]i?B|[mµn]?s\b|seconds|minutes|lines)"
)


@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES], ids=lambda path: path.stem)
def test_no_figure_is_typed_by_hand(path):
    """A figure that a run prints cannot drift; Python's own version is a demand and no figure."""
    text = prose(path.read_text()).replace("Python 3.11", "")
    assert MEASURED.search(text) is None


@pytest.mark.parametrize(
    "text",
    ["right to 1e-15", "4.2 at most", "twice: 3× faster", "12 ms a step", "20 MB", "in 108 lines"],
)
def test_a_typed_figure_is_seen(text):
    assert MEASURED.search(prose(f"# 1.0\n\n`2.5` $3.5$\n```\n4.5\n```\n{text}"))
    assert not MEASURED.search(prose("# 1.0\n\n`2.5` $3.5$\n```\n4.5\n```\nexit status 0, 8 heads"))


TOLERANCE = re.compile(r"<=? *\d*\.?\d+e-\d|\b[ar]tol\b|allclose|isclose|approx")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_no_cell_has_a_tolerance_of_its_own(path):
    cells = re.findall(r"^```\{code-cell\}\n(.*?)^```$", path.read_text(), re.M | re.S)
    assert not any(TOLERANCE.search(cell) for cell in cells)


@pytest.mark.parametrize(
    "cell", ["assert error < 1e-6", "np.allclose(a, b)", "assert_close(a, b, rtol=loose)"]
)
def test_a_tolerance_in_a_cell_is_seen(cell):
    assert TOLERANCE.search(cell)


@pytest.fixture(scope="module")
def prove():
    """The function that the pages run."""
    return loaded(DOCS / "proof.py").prove


def product(x, w, off=0.0, forgets=False):
    def back(dy):
        dw = (1 + off) * (x * dy)
        return (w * dy,) if forgets else (w * dy, dw)

    return x * w, back


def test_the_pages_proof_passes_what_is_right(prove):
    prove(product, x=np.linspace(1, 2, 5), w=np.linspace(3, 4, 5))


def cancelling(wrong):
    """y = W x whose dx is 0 but for rounding, for the dy that the proof draws; or a wrong one."""
    dy = np.random.default_rng(1).standard_normal((5, 1))
    W = np.random.default_rng(0).standard_normal((5, 3))
    W[-1] = -(dy[:-1] * W[:-1]).sum(0) / dy[-1]

    def f(x):
        return W @ x, lambda dy: (wrong * W.T[:, ::-1]) @ dy[::-1]

    return f


def test_the_pages_proof_measures_a_gradient_that_cancels_by_its_terms(prove):
    """In another order of the terms all of what is left is rounding."""
    x = np.ones((3, 1))
    prove(cancelling(np.ones(5)), x=x)
    with pytest.raises(AssertionError, match="dx is not the derivative"):
        prove(cancelling(1 + 1e-12 * np.arange(5)), x=x)


@pytest.mark.parametrize("wrong", [{"off": 1e-12}, {"off": -2.0}, {"forgets": True}])
def test_the_pages_proof_refuses_what_is_wrong(prove, wrong):
    with pytest.raises(AssertionError):
        prove(lambda x, w: product(x, w, **wrong), x=np.linspace(1, 2, 5), w=np.linspace(3, 4, 5))
