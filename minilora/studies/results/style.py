"""How the page of results looks, and the script that sorts its table."""

STYLE = """
body:has(.results) { max-width: 92rem }
.results > p { max-width: 46rem }
.results .wide { overflow-x: auto; margin: .5rem 0 1rem }
.results table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  font-size: .8rem }
.results caption { color: var(--soft); font-size: .8rem; padding: .25rem 0; text-align: left }
.results th, .results td { border: 0; border-bottom: 1px solid var(--line);
  padding: .35rem .3rem; text-align: left; vertical-align: top; background: none }
.results thead th { color: var(--soft); font-size: .72rem; font-weight: 600;
  min-width: 0; vertical-align: bottom; white-space: nowrap }
.results tbody th { font-family: inherit; font-size: .82rem; font-weight: 600; min-width: 7rem;
  overflow-wrap: normal }
.results tbody th, .results thead th:first-child { background: var(--page); left: 0;
  position: sticky; z-index: 1 }
.results tbody th .soft { display: block; font-weight: 400; font-size: .72rem }
.results td { color: var(--ink); font-weight: 400; min-width: 3.1rem }
.results td a { white-space: nowrap }
.results td a, .results th a { color: inherit; text-decoration: none }
.results td a:hover, .results th a:hover { text-decoration: underline }
.results a:focus-visible, .results summary:focus-visible, .results [tabindex]:focus-visible,
.results button:focus-visible { outline: 3px solid var(--odd); outline-offset: 1px }
.results .of, .results .soft { color: var(--soft) }
.results .off { display: block; font-size: .72rem; line-height: 1.2 }
.results .off.known, .results .off.loose { color: var(--odd) }
.results .off.fail, .results .off.error { color: var(--fail); font-weight: 600 }
.results td.skip { color: var(--soft) }
.results .bar { display: flex; gap: 1px; height: .3rem; margin: .15rem 0; min-width: 2.4rem }
.results .bar i { background: var(--line); border-radius: 1px; flex-basis: 0; min-width: 2px }
.results .bar .pass { background: var(--pass) } .results .bar .known { background: var(--z2) }
.results .bar .loose { background: var(--z3) }
.results .bar .fail, .results .bar .error { background: var(--fail) }
.results button { background: none; border: 0; color: inherit; cursor: pointer; font: inherit;
  margin: 0; min-height: 1.5rem; padding: .25rem 0; position: relative; text-align: left }
.results button:hover { text-decoration: underline }
.results button::after { bottom: 100%; left: 0; line-height: .8; position: absolute }
.results [aria-sort=ascending] button::after { content: "\\2191" }
.results [aria-sort=descending] button::after { content: "\\2193" }
.results .keys { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none;
  margin: .5rem 0; padding: 0; font-size: .85rem }
.results .keys li { margin: 0 }
.results .key { display: inline-block; font-weight: 700; text-align: center; width: 1.2em }
.results .key.pass, .results td.pass > span:first-child { color: var(--pass) }
.results .key.known, .results .marks-table .known { color: var(--odd) }
.results .key.fail, .results .key.error, .results .marks-table .fail, .results .marks-table .error {
  color: var(--fail); font-weight: 700 }
.results .marks-table { width: auto } .results .marks-table td { min-width: 0; text-align: center }
.results .marks-table td a { display: inline-block; min-width: 1.5rem }
.results .marks-table tbody th { font: .78rem ui-monospace, monospace; min-width: 9rem }
.results .marks-table thead th + th { text-align: center }
.results .time th:first-child { width: 8rem }
.results h3 { display: block; margin: 1.25rem 0 .4rem }
.results h4 { display: block; margin: .9rem 0 .2rem; font-size: .95rem }
.results details { border-top: 0; margin: .2rem 0 }
.results summary { color: var(--ink); cursor: pointer; padding: .2rem 0 }
.results .run-of { border-top: 1px solid var(--line); margin: 0 }
.results .run-of > summary { padding: .45rem 0 }
.results .run-of > summary h3 { display: inline; font-size: 1rem; margin: 0 }
.results .change { margin-left: .5rem; overflow-wrap: anywhere }
.results .found { background: var(--box); border-left: 4px solid var(--z2); color: inherit;
  font-weight: 400; margin: .5rem 0; overflow-wrap: anywhere; padding: .5rem .75rem }
.results .found.fail, .results .found.error { border-color: var(--fail) }
.results .found p { margin: .2rem 0; padding: 0 }
.results .found .fail, .results .found .error { color: var(--fail); font-weight: 700 }
.results .found .known, .results .found .loose { color: var(--odd); font-weight: 700 }
.results .run { border: 1px solid var(--line); display: block; font-size: .8em;
  overflow-wrap: anywhere; padding: .3rem .5rem; user-select: all; white-space: normal }
.results .hidden { clip-path: inset(50%); height: 1px; overflow: hidden; position: absolute;
  width: 1px; white-space: nowrap }
.results td { position: relative }
.results [id] { scroll-margin-top: 1rem }
@media (max-width: 40rem) {
  .results .grid, .results .grid tbody { display: block }
  .results .grid caption { display: block }
  .results .grid thead tr { display: flex; flex-wrap: wrap; gap: 0 .75rem }
  .results .grid thead th { border: 0; padding: .1rem 0; position: static }
  .results .grid tbody tr { border-bottom: 1px solid var(--line); display: grid;
    gap: .15rem .6rem; grid-template-columns: repeat(auto-fill, minmax(5.2rem, 1fr));
    padding: .5rem 0 }
  .results .grid tbody th { border: 0; grid-column: 1 / -1; padding: 0; position: static }
  .results .grid tbody th .soft { display: inline }
  .results .grid td { border: 0; padding: .1rem 0 }
  .results .grid td.skip { display: none }
  .results .grid td::before { color: var(--soft); content: attr(data-level); display: block;
    font-size: .7rem }
  .results .time tbody th, .results .marks-table tbody th { min-width: 5.5rem; font-size: .74rem }
}
"""
"""The style of the page; its colours are those of `minilora.forms.html`."""

SCRIPT = """
for (const table of document.querySelectorAll(".results .grid")) {
  const rows = [...table.tBodies[0].rows];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up === 1 ? "ascending" : "descending");
      const value = (row) => row.cells[column].dataset.v;
      const name = (row) => row.cells[0].dataset.v;
      const order = (a, b) => (column ? value(a) - value(b) : name(a).localeCompare(name(b)));
      rows.sort((a, b) => up * order(a, b) || name(a).localeCompare(name(b)));
      table.tBodies[0].append(...rows);
    });
  });
}
const show = () => {
  const at = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!at || !at.closest(".results")) return;
  for (let each = at; each; each = each.parentElement) {
    if (each.tagName === "DETAILS") each.open = true;
  }
  at.scrollIntoView();
};
addEventListener("hashchange", show);
show();
"""
"""Sorts a table by the column whose head is pressed, and opens what an address leads to."""
