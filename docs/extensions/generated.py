"""The pages that are made when the documentation is built, from the code and from the tests.

``findings/LIBRARY.md`` comes from the docstrings in ``tests/peers/test_findings.py``, and so does
``findings/found-by.txt``, the table that the page of the findings includes; ``api/`` has a page for
each module, and ``downloads/`` the pages that are offered as notebooks. Git ignores them.
"""

import ast
import json
import re
import shutil
from pathlib import Path

DOCS = Path(__file__).parent.parent
ROOT = DOCS.parent
FINDINGS = ROOT / "tests" / "peers" / "test_findings.py"
LIBRARIES = {
    "transformers": "transformers",
    "peft": "PEFT",
    "loralib": "loralib",
    "bitsandbytes": "bitsandbytes",
    "lycoris": "LyCORIS",
    "mlx_lm": "mlx-lm",
    "jax": "JAX",
    "keras": "Keras",
    "flax": "Flax NNX",
}
"""The libraries by the second word of a test's name, and what they are called."""

FOUND = re.compile(r"Found by `verify ([\w-]+)`: (`[\w.-]+`(?:, `[\w.-]+`)*)\.")
NOT_ASKED = re.compile(r"Not asked by `verify`: (.+)\.")
"""What a finding says of ``minilora verify PEER``: the checks that show it, or why none does."""

FOUND_BY = "findings/found-by.txt"

TABLE = """`minilora verify` finds {found} of {total} by itself. It does not ask for the others.

| Library | Finding | Found by | Or why not |
| --- | --- | --- | --- |
{rows}
"""

PACKAGES = ("io", "training", "verify", "studies", "cli", "testing")
"""Those whose modules get a page each; `spec` has pages written by hand."""

BESIDE = {"verify": ("pytest_plugin.py",)}

WITH_LIBRARIES = ("verify.peers.implementations", "verify.properties.libraries")
"""What imports libraries that the documentation does not install."""

MODULE = """# {title}

```{{eval-rst}}
.. automodule:: {name}
   :members:
   :ignore-module-all:
   :member-order: bysource
```
"""

PACKAGE = """# minilora.{package}

{said}

{rows}

```{{toctree}}
:hidden:
:maxdepth: 1

{entries}
```
"""

NOTEBOOKS = ("lora-in-ten-minutes",)


def slug(title):
    """The anchor that MyST gives a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def paragraphs(docstring):
    """A docstring's paragraphs, each in one line, but those that are code or a list."""
    parts = re.split(r"\n\n+", docstring.strip())
    return [p if p.startswith(("```", "- ")) else " ".join(p.split("\n")) for p in parts]


def source_of(node, lines):
    """A function's source without its docstring and decorators."""
    first = node.body[1] if ast.get_docstring(node) else node.body[0]
    before, after = (
        lines[node.lineno - 1 : node.body[0].lineno - 1],
        lines[first.lineno - 1 : node.end_lineno],
    )
    return "\n".join([*before, *after])


def helpers_of(test, helpers):
    """The helper functions and constants that a test uses, those that these use among them."""
    used, left = [], [test]
    while left:
        names = {node.id for node in ast.walk(left.pop()) if isinstance(node, ast.Name)}
        new = [name for name in helpers if name in names and name not in used]
        used += new
        left += [helpers[name] for name in new]
    return [name for name in helpers if name in used]


def finding(test, code, anchors):
    """A section of Markdown for one finding; ``anchors`` say on which page a title is."""
    title, *rest, seen = paragraphs(ast.get_docstring(test))
    cut = next((i for i, p in enumerate(rest) if p.startswith("**Consequence.**")), len(rest))
    text = "\n\n".join([*rest[:cut], "@code", *rest[cut:], f"*{seen}*"])
    text = re.sub(r"\]\(#([^)]+)\)", lambda m: f"]({anchors[m[1]]}.md#{m[1]})", text)
    text = re.sub(r"\]\((?!https?:|\w+\.md#)([^)]+)\)", r"](../\1)", text)
    shown = (
        "```{raw} html\n<details><summary>Reproduction</summary>\n```\n\n"
        f"```python\n{code}\n```\n\n"
        "```{raw} html\n</details>\n```"
    )
    return f"## {title.removesuffix('.')}\n\n{text.replace('@code', shown)}\n"


def title_of(test):
    return paragraphs(ast.get_docstring(test))[0].removesuffix(".")


def library_of(test):
    return LIBRARIES.get(test.name.split("_")[1]) or LIBRARIES["_".join(test.name.split("_")[1:3])]


def is_fixture(function):
    return any("fixture" in ast.unparse(decorator) for decorator in function.decorator_list)


def tests_and_helpers(tree):
    """The tests of the findings, and {name: function or constant} that they may use."""
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    tests = [node for node in functions if node.name.startswith("test_")]
    helpers = {n.targets[0].id: n for n in tree.body if isinstance(n, ast.Assign)}
    helpers |= {n.name: n for n in functions if n not in tests and not is_fixture(n)}
    return tests, helpers


def reproduction(test, helpers, source):
    """The test's source, after that of its helpers."""
    lines = source.splitlines()
    parts = [
        source_of(helpers[name], lines)
        if isinstance(helpers[name], ast.FunctionDef)
        else ast.get_source_segment(source, helpers[name])
        for name in helpers_of(test, helpers)
    ]
    return "\n\n\n".join([*parts, source_of(test, lines)])


def said_of_verify(docstring):
    """What a finding's docstring says of `minilora verify`: the matches of FOUND and NOT_ASKED."""
    matches = [
        pattern.fullmatch(paragraph)
        for paragraph in paragraphs(docstring)
        for pattern in (FOUND, NOT_ASKED)
    ]
    return [match for match in matches if match]


def checks_of(found):
    """The peer and its checks, of a match of FOUND."""
    return found[1], re.findall(r"`([^`]+)`", found[2])


def row(library, title, said):
    """A finding's line in the table."""
    link = f"[{title}](findings/{slug(library)}.md#{slug(title)})"
    by, why = ("", said[1]) if said.re is NOT_ASKED else (f"`{said[1]}`: {said[2]}", "")
    return f"| {library} | {link} | {by} | {why} |"


def found_by(tests):
    """The table of which check finds what."""
    said = {test: said_of_verify(ast.get_docstring(test))[0] for test in tests}
    in_order = sorted(tests, key=lambda test: [*LIBRARIES.values()].index(library_of(test)))
    rows = [row(library_of(test), title_of(test), said[test]) for test in in_order]
    found = sum(match.re is FOUND for match in said.values())
    return TABLE.format(found=found, total=len(tests), rows="\n".join(rows))


def findings():
    """{page: text}: the findings of each library, in the order of the tests, and the table."""
    source = FINDINGS.read_text()
    tests, helpers = tests_and_helpers(ast.parse(source))
    anchors = {slug(title_of(test)): slug(library_of(test)) for test in tests}
    texts = {title: [] for title in LIBRARIES.values()}
    for test in tests:
        code = reproduction(test, helpers, source)
        texts[library_of(test)].append(finding(test, code, anchors))
    return {FOUND_BY: found_by(tests)} | {
        f"findings/{slug(title)}.md": (
            f"# {title}\n\n{len(parts)} findings. [What a finding is](../findings.md).\n\n"
            + "".join(f"{part}\n" for part in parts)
        )
        for title, parts in texts.items()
    }


def summary(path):
    """The first sentence of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    return paragraphs(docstring)[0] if docstring else ""


def offers(path):
    """Whether a module defines anything that is public."""
    tree = ast.parse(path.read_text())
    named = (ast.FunctionDef, ast.ClassDef)
    return any(isinstance(node, named) and not node.name.startswith("_") for node in tree.body)


def escaped(text):
    """A docstring's sentence as Markdown: code stays code, all other signs stand for themselves."""
    text = re.sub(r":\w+:`([^`]*)`", r"`\1`", text).replace("``", "`")
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([*_<>|$\[\]~#])", r"\\\1", part)
        for part in parts
    )


def is_documented(name):
    """Whether a module gets a page: it is public, no test, and can be imported by the build."""
    inner = name.removeprefix("minilora.")
    hidden = any(re.match("_[^_]|test_", part) for part in name.split("."))
    return not hidden and not inner.startswith(WITH_LIBRARIES)


def modules_of(package):
    """The files of a package, and those at the top that belong to it."""
    base = ROOT / "minilora" / package
    files = sorted(base.rglob("*.py")) if base.is_dir() else [base.with_suffix(".py")]
    return [*files, *(ROOT / "minilora" / name for name in BESIDE.get(package, ()))]


def api():
    """{page: text}: a list of each package's modules, and a page for each module."""
    pages = {}
    for package in PACKAGES:
        rows, entries = [], []
        for path in modules_of(package):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(part for part in parts if part != "__init__")
            if not is_documented(name) or not offers(path):
                continue
            pages[f"api/{package}/{name}.md"] = MODULE.format(
                title=name.removeprefix("minilora."), name=name
            )
            rows.append(f"- [`{name}`]({package}/{name}.md): {escaped(summary(path))}")
            entries.append(f"{package}/{name}")
        said = escaped(summary(modules_of(package)[0]))
        pages[f"api/{package}.md"] = PACKAGE.format(
            package=package, said=said, rows="\n".join(rows), entries="\n".join(entries)
        )
    return pages


def notebook(page):
    """A page in MyST as a notebook: its prose as Markdown, its cells as code, and no output."""
    text = re.sub(r"\A---\n.*?\n---\n", "", page, flags=re.S)
    cells = []
    for part in re.split(r"(^```\{code-cell\}.*?^```$)", text, flags=re.M | re.S):
        if part.startswith("```{code-cell}"):
            code = re.sub(r"\A.*?\n(:tags:.*\n+)?", "", part).removesuffix("```").strip()
            cells.append(
                {"cell_type": "code", "execution_count": None, "outputs": [], "source": code}
            )
        elif said := as_markdown(part):
            cells.append({"cell_type": "markdown", "source": said})
    for number, cell in enumerate(cells):
        cell |= {"id": f"cell-{number}", "metadata": {}}
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return json.dumps(
        {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}, indent=1
    )


def as_markdown(text):
    """MyST's directives as what any notebook shows: equations as $$, the rest left out."""
    text = re.sub(r"```\{math\}\n(?::label:.*\n)?(.*?)```", r"$$\n\1$$", text, flags=re.S)
    text = re.sub(r"^(`{3,})\{.*?^\1$", "", text, flags=re.M | re.S)
    text = re.sub(r"\{download\}`([^`<]*)<[^`]*>`", r"\1", text)
    text = re.sub(r"(?<!!)\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def write():
    """Write all pages; leave those that have not changed, so that Sphinx does not read them."""
    pages = findings() | api()
    for name in NOTEBOOKS:
        pages[f"downloads/{name}.ipynb"] = notebook((DOCS / f"{name}.md").read_text())
    for folder in ("findings", "api", "downloads"):
        for path in sorted((DOCS / folder).rglob("*.*")):
            if path.is_file() and path.relative_to(DOCS).as_posix() not in pages:
                path.unlink()
    for name, text in pages.items():
        path = DOCS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)


def remove():
    for folder in ("findings", "api", "downloads"):
        shutil.rmtree(DOCS / folder, ignore_errors=True)
