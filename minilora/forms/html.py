"""A page of HTML that needs nothing else: no script, no other file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de;
  --fail: #b3123a; --odd: #8a4b00; --pass: #1a6b32; --z1: #6482ad; --z2: #b07a10; --z3: #c9520f;
  --z4: #b3123a; --box: #f6f8fa }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --ink: #e6e9ed; --soft: #a3adb8;
  --line: #3b434d; --fail: #ff8fa3; --odd: #ffc46b; --pass: #8fd6a2; --z1: #5f82b3; --z2: #b98a1d;
  --z3: #f08a4b; --z4: #ff6f8b; --box: #1d2228 } }
* { box-sizing: border-box }
body { background: var(--page); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif;
  margin: 0 auto; max-width: 70rem; padding: 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem }
h2 { font-size: 1.25rem; margin: 1.5rem 0 .5rem } h3, h4, h5 { font-size: 1rem; margin: 0 }
h3, h4 { display: inline } h5 { margin: .75rem 0 .25rem }
section p { margin: .3rem 0 }
a { color: inherit } a:focus-visible, summary:focus-visible, [tabindex]:focus-visible {
  outline: 3px solid var(--odd); outline-offset: 2px }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; width: 100% }
caption { color: var(--soft); font-size: .85rem; padding: .25rem 0; text-align: left }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .4rem; text-align: left;
  vertical-align: baseline }
thead th { color: var(--soft); font-weight: 600; min-width: 3.6rem }
tbody th { font: .92em ui-monospace, monospace; min-width: 7rem }
ul { margin: 0; padding-left: 1.2rem }
td { overflow-wrap: normal; position: relative } td .no { white-space: nowrap }
.marks { font-family: ui-monospace, monospace; letter-spacing: .15em; white-space: nowrap }
.fail, .error { color: var(--fail); font-weight: 700 } .loose, .known { color: var(--odd) }
.pass { color: var(--pass) } .skip, .absent, .soft { color: var(--soft) }
details { border-top: 1px solid var(--line) } details details { margin-left: .5rem }
summary { cursor: pointer; padding: .45rem 0 } .level > summary { font-size: 1.1rem }
.found { background: var(--box); border-left: 4px solid var(--line); margin: .5rem 0;
  padding: .5rem .75rem } .found.fail, .found.error { border-color: var(--fail); color: inherit;
  font-weight: inherit } .found.loose, .found.known { border-color: var(--odd); color: inherit }
.found p { margin: .2rem 0; padding-left: calc(var(--in, 0) * .5rem) }
code, .run { font-family: ui-monospace, monospace; font-size: .85em }
.run { border: 1px solid var(--line); display: block; padding: .3rem .5rem; user-select: all }
figure { margin: .5rem 0 } svg { display: block; max-width: 100%; height: auto }
figcaption { font-size: .9rem } .frame { fill: none; stroke: var(--line) }
.z1 { fill: var(--z1) } .z2 { fill: var(--z2) } .z3 { fill: var(--z3) } .z4 { fill: var(--z4) }
.mark { fill: none; stroke: var(--ink); stroke-width: 2 }
.hidden { clip-path: inset(50%); height: 1px; overflow: hidden; position: absolute; width: 1px;
  white-space: nowrap }
@media (max-width: 40rem) { body { padding: .6rem } table { font-size: .78rem }
  th, td { padding: .25rem .15rem } thead th { font-size: .72rem }
  tbody th { min-width: 5.5rem } .level > summary { font-size: 1rem }
  .found { padding: .4rem .5rem } h1 { font-size: 1.3rem } }
"""
"""The style of every page."""


def open_page(title: str, style: str = "") -> Iterator[str]:
    """The beginning of a page, with more style than `STYLE`, up to its first heading."""
    yield "<!doctype html>"
    yield '<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{escape(title)}</title>"
    yield f"<style>{STYLE}{style}</style></head><body>"


def open_table(caption: str, kind: str = "") -> str:
    """A table that scrolls sideways, with the keyboard too; ``kind`` is its class."""
    name = escape(caption)
    table = f'<table class="{kind}">' if kind else "<table>"
    return (
        f'<div class="wide" role="region" aria-label="{name}" tabindex="0">{table}'
        f"<caption>{name}</caption>"
    )


def table_head(names: Sequence[str]) -> str:
    """A row of headings."""
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    return f"<thead><tr>{cells}</tr></thead>"
