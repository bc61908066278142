"""The pages that are made when the documentation is built, from the code and from the tests.

``findings/LIBRARY.md`` comes from ``minilora/findings`` and its scripts, and so do
``findings/found-by.txt``, the table that the page of the findings includes, and
``downloads/LIBRARY-issues.md``, its findings as issues. ``api/`` has a page for each module, and
``api/commands.md`` the help of each command. ``downloads/`` has the pages that are offered as
notebooks and the table of recorded results. Git ignores them.
"""

import ast
import io
import json
import os
import re
import shutil
from contextlib import redirect_stdout, suppress
from pathlib import Path

from minilora.cli import commands
from minilora.cli.commands import audits
from minilora.cli.main import main
from minilora.findings import LIBRARIES
from minilora.findings.finding import OUTCOMES, SEVERITIES
from minilora.findings.issue import issues, place
from minilora.findings.reproduce import printed, script
from minilora.studies.results.page import fragment
from minilora.studies.results.style import STYLE
from minilora.studies.results.summary import read_summaries

DOCS = Path(__file__).parent.parent
ROOT = DOCS.parent
FOUND_BY = "findings/found-by.txt"
ISSUES = "downloads/{}-issues.md"
RESULTS = "downloads/results.html"

TABLE = """{total} findings, of which `minilora verify` finds {found} by itself.

| Library | Findings | Silent | Open | With a script | Found by `verify` | Told by `audit adapter` |
| --- | --- | --- | --- | --- | --- | --- |
{libraries}

| Library | Finding | Severity | Status | Found by | Or why not |
| --- | --- | --- | --- | --- | --- |
{rows}
"""

PACKAGES = (
    *("io", "training", "verify", "audit", "findings", "forms", "studies", "cli", "testing"),
)
"""Those whose modules get a page each; `spec` has pages written by hand."""

BESIDE = {"verify": ("pytest_plugin.py",)}

WITH_LIBRARIES = (
    "findings.scripts",
    "verify.peers.implementations",
    "verify.properties.libraries",
)
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

COMMANDS = """# Commands and options

The `--help` of each command. [How to verify](../how-to-verify.md) and
[Fine-tune a model](../fine-tuning.md) use them.

"""

NOTEBOOKS = ("lora-in-ten-minutes",)


def slug(title):
    """The anchor that MyST gives a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def paragraphs(docstring):
    """A docstring's paragraphs, each in one line, but those that are code or a list."""
    parts = re.split(r"\n\n+", docstring.strip())
    return [p if p.startswith(("```", "- ")) else " ".join(p.split("\n")) for p in parts]


def in_one_line(text):
    """Markdown with each paragraph in one line."""
    return "\n\n".join(paragraphs(text)) if text else ""


def about(it, library):
    """What the page says below a finding's text: what finds it, its severity and its releases."""
    found = f"Found by `verify {it.peer}`: {code_list(it.checks)}."
    also = "".join(f" and {name} {release}" for name, release in it.also.items())
    since = f"{it.since} to " if it.since else ""
    lines = [
        found if it.peer else f"Not asked by `verify`: {it.not_asked}.",
        f"*`{it.id}`: {it.severity} ({SEVERITIES[it.severity]}), {it.status}. Seen in "
        f"{library.distribution or library.title} {since}{it.seen}{also}.*",
    ]
    if it.stored:
        effect = f"{OUTCOMES[it.stored.outcome]}: {escaped(it.stored.effect)}"
        lines.insert(1, f"`minilora audit adapter` tells it of an adapter: {effect}.")
    lines.insert(0, f"**Cause.** {escaped(it.cause)}.{place(it, library)}")
    if it.fix:
        lines.insert(1, f"**Proposed fix.** {escaped(it.fix)}.")
    return "\n\n".join([*lines, *([f"Source: {it.source}."] if it.source else [])])


def code_list(names):
    return ", ".join(f"`{name}`" for name in names)


def shown(it):
    """A finding's script and what it prints, or where it was read."""
    text = script(it.id)
    if not text:
        return "Read in the source, not run here."
    said = printed().get(it.id)
    with_ = said and ", ".join(f"{name} {number}" for name, number in said.releases.items())
    output = (
        f"It prints with {with_}:\n\n```text\n{said.text}```" if said else "It was not run here."
    )
    summary = "A script without minilora, and what it prints"
    return (
        f"<details>\n<summary>{summary}</summary>\n\n```python\n{text}```\n\n{output}\n\n</details>"
    )


def finding(it, library, anchors):
    """A section of Markdown for one finding; ``anchors`` say on which page a title is."""
    text = "\n\n".join(
        part
        for part in (
            in_one_line(it.does),
            f"**Right.** {in_one_line(it.right)}",
            shown(it),
            f"**Consequence.** {in_one_line(it.consequence)}" if it.consequence else "",
            about(it, library),
        )
        if part
    )
    text = re.sub(r"\]\(#([^)]+)\)", lambda m: f"]({anchors[m[1]]}.md#{m[1]})", text)
    text = re.sub(r"\]\((?!https?:|[\w-]+\.md#)([^)]+)\)", r"](../\1)", text)
    return f"## {it.title}\n\n{text}\n"


def row(it, library):
    """A finding's line in the table."""
    link = f"[{it.title}](findings/{library.name}.md#{slug(it.title)})"
    by = f"`{it.peer}`: {code_list(it.checks)}" if it.peer else ""
    return f"| {library.title} | {link} | {it.severity} | {it.status} | {by} | {it.not_asked} |"


def found_by():
    """The table of all findings, and of which check finds what."""
    all_of = [(it, library) for library in LIBRARIES.values() for it in library.findings]
    rows = [row(it, library) for it, library in all_of]
    found = sum(bool(it.peer) for it, _ in all_of)
    counts = [counted(library) for library in LIBRARIES.values()]
    return TABLE.format(
        found=found, total=len(rows), rows="\n".join(rows), libraries="\n".join(counts)
    )


def counted(library):
    """A library's line in the table of libraries."""
    of = library.findings
    counts = [
        len(of),
        sum(it.severity == "silent" for it in of),
        sum(not it.fixed_in for it in of),
        sum(bool(script(it.id)) for it in of),
        sum(bool(it.peer) for it in of),
        sum(it.stored is not None for it in of),
    ]
    numbers = " | ".join(str(count) for count in counts)
    return f"| [{library.title}](findings/{library.name}.md) | {numbers} |"


def findings():
    """{page: text}: the findings of each library, and the table of all."""
    anchors = {slug(it.title): lib.name for lib in LIBRARIES.values() for it in lib.findings}
    return {FOUND_BY: found_by()} | {
        f"findings/{library.name}.md": (
            f"# {library.title}\n\n{len(library.findings)} findings. "
            "[What a finding is](../findings.md). All of them as issues, in one file: "
            f"{{download}}`{library.name}-issues.md <../{ISSUES.format(library.name)}>`.\n\n"
            + "".join(f"{finding(it, library, anchors)}\n" for it in library.findings)
        )
        for library in LIBRARIES.values()
    }


def results():
    """The recorded results as HTML, with links to the pages of findings."""
    at = {
        it.id: f"findings/{library.name}.html#{slug(it.title)}"
        for library in LIBRARIES.values()
        for it in library.findings
    }
    recorded = read_summaries(DOCS / "results")
    return f"<style>{STYLE}</style>\n{fragment(recorded, lambda id: at.get(id, ''))}\n"


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


def help_of(*command):
    """What ``minilora COMMAND --help`` prints, as wide as a page."""
    os.environ["COLUMNS"] = "90"
    with redirect_stdout(io.StringIO()) as said, suppress(SystemExit):
        main([*command, "--help"])
    return f"```text\n{said.getvalue()}```\n"


def options():
    """The page of all commands and audits."""
    parts = [help_of()]
    for name in commands.NAMES:
        parts.append(f"## {name}\n\n{help_of(name)}")
        if name == "audit":
            parts += [f"### audit {audit}\n\n{help_of(name, audit)}" for audit in audits.NAMES]
    return COMMANDS + "\n".join(parts)


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
    pages = findings() | api() | {"api/commands.md": options()}
    pages |= {ISSUES.format(library.name): issues(library) for library in LIBRARIES.values()}
    pages[RESULTS] = results()
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
