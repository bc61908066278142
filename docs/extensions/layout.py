"""How the pages look: equations beside their code, and docstrings as reStructuredText."""

import re

from docutils import nodes
from markup import as_rst, one_below_another

WIDE = ("spec/", "lora-in-ten-minutes")
"""Pages on which an equation stands beside its code where the window is wide enough."""


def is_code(node):
    """A function that is shown, and not a cell that is run."""
    return isinstance(node, nodes.literal_block) or "literal-block-wrapper" in node.get(
        "classes", ()
    )


def is_cell(node):
    return "cell" in node.get("classes", ())


def box(name, children):
    container = nodes.container(classes=[name])
    container += children
    return container


def beside(section):
    """Put what leads up to a function, its equation among it, beside the function's code."""
    children, start = list(section.children), 0
    result = []
    while start < len(children):
        rest = children[start:]
        code = next((i for i, node in enumerate(rest) if is_code(node)), None)
        math = next((i for i, node in enumerate(rest) if isinstance(node, nodes.math_block)), None)
        if code is None or math is None or math > code:
            end = 1 if code is None or math is None else code + 1
            result += rest[:end]
            start += end
            continue
        first = 0
        while isinstance(rest[first], (nodes.title, nodes.target)):
            first += 1
        # What stands before the last cell or section before the equation is none of its text.
        for i in range(math):
            if is_cell(rest[i]) or isinstance(rest[i], (nodes.section, nodes.table)):
                first = i + 1
        after = code + 1
        proof = rest[after : after + 1] if after < len(rest) and is_cell(rest[after]) else []
        parts = [box("equation-text", rest[first:code]), box("equation-code", [rest[code]])]
        parts += [box("equation-proof", proof)] if proof else []
        result += [*rest[:first], box("equation", parts)]
        start += after + len(proof)
    section.children = []
    section += result


def contents(doctree):
    """A line with a link to each section, in place of the sidebar that the code takes."""
    (page,) = [node for node in doctree.children if isinstance(node, nodes.section)][:1]
    sections = [node for node in page.children if isinstance(node, nodes.section)]
    row = nodes.paragraph(classes=["page-contents"])
    for section in sections:
        title = section.next_node(nodes.title)
        link = nodes.reference("", title.astext(), internal=True, refid=section["ids"][0])
        row += [link, nodes.Text(" ")]
    if len(sections) > 2:
        first = next(n for n in page if not isinstance(n, nodes.title | nodes.paragraph))
        page.insert(page.index(first), row)


def one_document(app, doctree):
    """Let each node name its page as its document, which is kept with it.

    Those that a directive has parsed name another one, with all that Sphinx knows of all pages.
    """
    for node in doctree.findall():
        node.document = doctree


def arrange(app, doctree):
    if not app.env.docname.startswith(WIDE):
        return
    if app.env.docname.startswith("spec/"):
        contents(doctree)
    for math in doctree.findall(nodes.math_block):
        tex = one_below_another(math.astext())
        math.rawsource = tex
        math[:] = [nodes.Text(tex)]
    for section in list(doctree.findall(nodes.section)):
        beside(section)


def without_sidebar(app, pagename, templatename, context, doctree):
    """Furo's table of contents gives its place to the code."""
    if pagename.startswith("spec/"):
        context["meta"] = (context.get("meta") or {}) | {"hide-toc": "true"}


def nearby_pages(app, pagename, templatename, context, doctree):
    """Open the sidebar at this page alone: hundreds of links on every page take long to make."""
    if whole := context.get("toctree"):
        context["toctree"] = lambda **options: whole(**options | {"collapse": True})


def scrolls(app, pagename, templatename, context, doctree):
    """What is printed and wider than the page can be scrolled with the keyboard, too."""
    if "body" in context:
        context["body"] = context["body"].replace("<pre>", '<pre tabindex="0">')


def docstring(app, what, name, obj, options, lines):
    lines[:] = as_rst(list(lines))


def signature(app, what, name, obj, options, signature, returned):
    """Default factories as ``...``, with which Sphinx can read the signature and link its types."""
    if signature and "<factory>" in signature:
        signature = re.sub(r"~?(?:\w+\.)+(\w+)", r"\1", signature).replace("<factory>", "...")
    return signature, returned


def setup(app):
    app.connect("doctree-read", one_document)
    app.connect("doctree-read", arrange)
    app.connect("html-page-context", without_sidebar, priority=400)
    app.connect("html-page-context", nearby_pages, priority=400)
    app.connect("html-page-context", scrolls)
    app.connect("autodoc-process-docstring", docstring)
    app.connect("autodoc-process-signature", signature)
    return {"parallel_read_safe": True}
