"""Text to text: equations one below another, and docstrings as reStructuredText."""

import re

GATHERED = re.compile(r"\s*\\begin\{gathered\}(.*)\\end\{gathered\}\s*", re.S)


def one_below_another(tex):
    r"""Equations that share a line, with \\qquad between them, each in a line of its own."""
    match = GATHERED.fullmatch(tex)
    lines, depth = [""], 0
    parts = re.split(r"(\\begin\{\w+\}|\\end\{\w+\}|[{}]|\\qquad)", match[1] if match else tex)
    for part in parts:
        if part == r"\qquad" and depth == 0:
            lines.append("")
            continue
        depth += part == "{" or part.startswith(r"\begin")
        depth -= part == "}" or part.startswith(r"\end")
        lines[-1] += part
    if len(lines) == 1:
        return tex
    body = " \\\\\n".join(line.strip() for line in lines)
    return f"\\begin{{gathered}}\n{body}\n\\end{{gathered}}"


INLINE = re.compile(r"``(.+?)``|:[a-z:]+:`~?([^`]+)`|`([^`<]+?) <([^`>]+)>`_|`([^`]+)`")


def inline(text):
    """A sentence of a docstring: code stays code, all other signs stand for themselves."""
    result, end = "", 0
    for match in INLINE.finditer(text):
        result += plain(text[end : match.start()])
        if match[3]:
            result += f"`{match[3]} <{match[4]}>`__"
        else:
            code = next(part for part in (match[1], match[2], match[5]) if part).strip()
            result += f"\\ ``{code}``\\ "
        end = match.end()
    return result + plain(text[end:])


def plain(text):
    return re.sub(r"([\\*_|`])", r"\\\1", text)


def as_rst(lines):
    """The lines of a docstring as reStructuredText that means what a reader of the source sees."""
    result = []
    for block in re.split(r"\n\s*\n", "\n".join(lines).strip("\n")):
        rows = block.split("\n")
        if rows[0].startswith((" ", ">>>")):
            result += ["::", "", *(f"    {row}" for row in rows), ""]
        elif rows[0].startswith(("- ", "* ")):
            items = re.split(r"^[-*] ", block, flags=re.M)[1:]
            result += [f"- {inline(' '.join(item.split()))}" for item in items] + [""]
        else:
            labelled = re.split(r"^((?:Shapes|Errors|Source|Sources):)", block, flags=re.M)
            result += [inline(" ".join(labelled[0].split())), ""] if labelled[0].strip() else []
            for label, said in zip(labelled[1::2], labelled[2::2], strict=True):
                result += [f"**{label}** {inline(' '.join(said.split()))}", ""]
    return result
