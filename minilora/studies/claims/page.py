"""A study as one HTML page that needs nothing else: the verdicts, their figures and pictures."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from statistics import fmean

from minilora import __version__
from minilora.forms.html import open_page
from minilora.studies.claims.charts import Axis, Line, Point, bars, chart
from minilora.studies.claims.costs import PARTS
from minilora.studies.claims.results import Results
from minilora.studies.claims.study import FULL, Course, Look, Side
from minilora.studies.claims.verdicts import HOLDS, NOT, UNDECIDED, WHEN, Verdict, case_words, notes

_OWN_STYLE = """
:root { --s0: #1b1f24; --s1: #0b6bcb; --s2: #b04a00; --s3: #1a7f37; --s4: #8250df }
@media (prefers-color-scheme: dark) { :root { --s0: #e6e9ed; --s1: #6cb2ff; --s2: #ffa25c;
  --s3: #6fd38a; --s4: #c9a6ff } }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem),
  1fr)) }
figure { max-width: 30rem } svg { width: 100% }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif }
svg .axis { stroke: var(--line); stroke-width: 1 }
.s { fill: none; stroke-width: 2 } .thin { stroke-width: 1; opacity: .45 }
.s0 { stroke: var(--s0) } .s1 { stroke: var(--s1); stroke-dasharray: 7 3 }
.s2 { stroke: var(--s2); stroke-dasharray: 2 3 }
.s3 { stroke: var(--s3); stroke-dasharray: 9 3 2 3 }
.s4 { stroke: var(--s4); stroke-dasharray: 4 4 }
.f0 { fill: var(--s0) } .f1 { fill: var(--s1) } .f2 { fill: var(--s2) } .f3 { fill: var(--s3) }
.f4 { fill: var(--s4) } .s9 { stroke: var(--soft) } .f9 { fill: var(--soft) }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .9rem; margin: .5rem 0 }
.key svg { display: inline; vertical-align: middle; width: 34px }
.yes { color: var(--pass); font-weight: 700 } .some { color: var(--odd); font-weight: 700 }
.no-claim { color: var(--fail); font-weight: 700 } .claims tbody th { font: inherit;
  font-weight: 600 }
"""


def means(courses: Sequence[Course], of: Callable[[Look], Point]) -> list[Point]:
    """The means of each look over the seeds; a run that diverged ends the line."""
    columns = zip(*(course.looks for course in courses), strict=False)
    return [
        (fmean(x for x, _ in points), fmean(y for _, y in points))
        for points in ([of(look) for look in looks] for looks in columns)
    ]


def from_base(course: Course) -> Course:
    """The run with the second task's loss less the base's: each seed has a text of its own."""
    begin = course.looks[0].second
    looks = tuple(replace(look, second=look.second - begin) for look in course.looks)
    return replace(course, looks=looks)


def html(results: Results, judged: Sequence[Verdict]) -> str:
    """The whole page."""
    return "\n".join(_page(results, judged)) + "\n"


def _page(results: Results, judged: Sequence[Verdict]) -> Iterator[str]:
    yield from open_page("What LoRA is said to bring, measured", _OWN_STYLE)
    yield "<header><h1>What LoRA is said to bring, measured</h1>"
    yield f"<p>By minilora {escape(__version__)}, on {', '.join(_models(results))}, against full "
    yield "fine-tuning. A verdict follows from a criterion that was stated before.</p>"
    yield "</header><main>"
    yield from _verdicts(judged)
    yield '<h2 id="learning">Learning and forgetting</h2>'
    yield "<p>Each reference model goes from a task that it knows to one that contradicts it; "
    yield "losses are what they exceed the tasks' entropies by. A real model goes from what it "
    yield "knows to a text; what it forgets is how far it diverges from the base. All in nats a "
    yield "label; lines are means.</p>"
    for model in results.models:
        yield from _learning(results, model)
    yield '<h2 id="costs">What it costs</h2>'
    yield from _costs(results)
    yield '<h2 id="how">How it was measured</h2><ul>'
    yield from (f"<li>{escape(note)}</li>" for note in notes(results))
    yield "</ul></main></body></html>"


def _models(results: Results) -> list[str]:
    return list(dict.fromkeys(cost.model for cost in results.costs))


def _verdicts(judged: Sequence[Verdict]) -> Iterator[str]:
    yield '<h2 id="verdicts">Verdicts</h2><table class="claims"><thead><tr>'
    yield '<th scope="col">claim</th><th scope="col">verdict</th></tr></thead><tbody>'
    for verdict in judged:
        key, says = escape(verdict.claim.key), escape(verdict.claim.says)
        yield f'<tr><th scope="row"><a href="#{key}">{says}</a></th>'
        yield f"<td>{_word(verdict)}</td></tr>"
    yield "</tbody></table>"
    for verdict in judged:
        claim = verdict.claim
        yield f'<details id="{escape(claim.key)}"><summary><h3>{escape(claim.says)}</h3> '
        yield f"{_word(verdict, short=True)}</summary>"
        yield f"<p>It holds if {escape(claim.criterion)}.</p><ul>"
        for case in verdict.cases:
            yield f"<li>{escape(case_words(claim, case))}</li>"
        yield f'</ul><p class="soft">{escape(claim.source)}</p></details>'


_SIGNS = {
    HOLDS: ("yes", "✓"),
    WHEN: ("some", "≈"),
    NOT: ("no-claim", "✗"),
    UNDECIDED: ("some", "?"),
}


def _word(verdict: Verdict, short: bool = False) -> str:
    """The verdict with its sign, and unless ``short`` the cases in which the claim holds."""
    kind, sign = _SIGNS[verdict.word]
    rest = "" if short else escape(verdict.sentence.removeprefix(verdict.word))
    return f'<span class="{kind}">{sign} {verdict.word}</span>{rest}'


def _key(sides: Sequence[Side]) -> str:
    keys = [
        f'<span><svg aria-hidden="true" viewBox="0 0 34 8"><path class="s s{i}" d="M1 4H33"/>'
        f"</svg> {escape(side.name)}</span>"
        for i, side in enumerate(sides)
    ]
    return f'<p class="key">{"".join(keys)}</p>'


def _learning(results: Results, model: str) -> Iterator[str]:
    sides, study = results.sides(model), results.models[model]
    if study.length:
        results = replace(results, courses=tuple(map(from_base, results.courses)))
    words = _REAL if study.length else _REFERENCE
    yield f"<h3>{escape(model)}</h3>{_key(sides)}"
    yield '<div class="grid">'
    yield _along(results, model, "Learned: the second", words.second, lambda look: look.second)
    yield _along(results, model, "Forgotten: the first", words.first, lambda look: look.first)
    yield _forgotten_against_learned(results, model, words)
    yield _against_rate(results, model, words)
    yield _against_rank(results, model, words)
    yield "</div>"


@dataclass(frozen=True)
class _Axes:
    """The labels of the axes: both tasks' losses, and how much the second task's fell."""

    first: str
    second: str
    fall: str


_REAL = _Axes(
    "first task: divergence",
    "second task: loss less the base's",
    "second task: how far its loss fell",
)
_REFERENCE = _Axes(
    "first task: loss over entropy",
    "second task: loss over entropy",
    "second task: entropy less loss",
)


def _along(
    results: Results, model: str, what: str, label: str, loss: Callable[[Look], float]
) -> str:
    """A task's loss against the steps."""
    lines = []
    for i, side in enumerate(results.sides(model)):
        courses = results.best(model, side)
        points = means(courses, lambda look: (look.step + 1, loss(look)))
        marks = [(look.step + 1, loss(look)) for run in courses for look in run.looks]
        lines.append(Line(side.name, points, i, marks=marks))
    steps = Axis("steps + 1", log=True, ticks=[s + 1 for s in results.models[model].looks])
    title = f"{what} task along the path, at each side's best rate"
    return chart(title, lines, steps, Axis(label))


def _forgotten_against_learned(results: Results, model: str, words: _Axes) -> str:
    lines = [
        Line(
            side.name,
            means(results.at(model, side, lr), lambda look: (-look.second, look.first)),
            i,
            thin=lr != results.rate(model, side),
        )
        for i, side in enumerate(results.sides(model))
        for lr in results.models[model].rates_of(side)
        if all(map(learns, results.at(model, side, lr)))
    ]
    title = (
        "Forgotten against learned along the path, faint at other rates than the best; "
        "right is learned"
    )
    return chart(title, lines, Axis(words.fall), Axis(words.first))


def _against_rate(results: Results, model: str, words: _Axes) -> str:
    sides, study = results.sides(model), results.models[model]
    base = max(run.looks[0].second for side in sides for run in results.best(model, side))
    lines = [
        Line(
            side.name,
            [(lr, _end(results.tuning(model, side, lr), base)) for lr in study.rates_of(side)],
            i,
        )
        for i, side in enumerate(sides)
    ]
    rates = sorted({lr for side in sides for lr in study.rates_of(side)})
    title = (
        "The second task at the end against the learning rate: how each side was tuned; "
        "what ends above the base is drawn at the base"
    )
    return chart(title, lines, Axis("learning rate", log=True, ticks=rates), Axis(words.second))


def _against_rank(results: Results, model: str, words: _Axes) -> str:
    ranks = [side for side in results.sides(model) if side.rank and not side.attention]
    full = _end(results.best(model, FULL))
    lora = Line(
        "LoRA",
        [(side.rank, _end(results.best(model, side))) for side in ranks],
        9,  # a style that no side has
        marks=[
            (side.rank, run.looks[-1].second) for side in ranks for run in results.best(model, side)
        ],
    )
    lines = [Line("full", [(side.rank, full) for side in ranks], 0), lora]
    title = "The second task at the end against the rank, at its best rate; the level line is full"
    axis = Axis("rank", log=True, ticks=results.models[model].ranks)
    return chart(title, lines, axis, Axis(words.second))


def learns(course: Course) -> bool:
    """Whether the second task's loss ends below where it began; not if the run diverged."""
    return not course.why and course.looks[-1].second < course.looks[0].second


def _end(courses: Sequence[Course], most: float = math.inf) -> float:
    """The mean loss of the second task at the end, or none where a run diverged."""
    if any(course.why for course in courses):
        return math.nan
    return min(most, fmean(course.looks[-1].second for course in courses))


def _costs(results: Results) -> Iterator[str]:
    heads = ("", "parameters trained", "FLOPs a step", "ms a step", *PARTS, "disk")
    yield '<div class="wide" role="region" aria-label="Costs" tabindex="0"><table>'
    yield "<caption>FLOPs are counted; times are medians of rounds, in turn."
    yield "</caption><thead><tr>"
    yield "".join(f'<th scope="col">{head}</th>' for head in heads) + "</tr></thead><tbody>"
    for cost in results.costs:
        median = sorted(cost.seconds)[len(cost.seconds) // 2]
        cells = [
            f"{cost.trained:,} ({cost.trained / cost.whole:.3g})",
            scaled(cost.flops),
            f"{1e3 * median:.4g}",
            *(scaled(cost.memory[part], "B") for part in PARTS),
            scaled(cost.disk, "B"),
        ]
        yield f'<tr><th scope="row">{escape(cost.model)}, {escape(cost.side.name)}</th>'
        yield "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    yield "</tbody></table></div>"
    yield "<p>Memory by part, of a step. Weights, gradients and the optimizer's two means are the "
    yield "sizes of their arrays; activations are traced, what is held between the forward and the "
    yield "backward.</p>"
    keys = "".join(
        f'<span><svg aria-hidden="true" viewBox="0 0 34 8"><rect class="f{i + 1}" width="34" '
        f'height="8"/></svg> {part}</span>'
        for i, part in enumerate(PARTS)
    )
    yield f'<p class="key">{keys}</p><div class="grid">'
    for model in _models(results):
        costs = [cost for cost in results.costs if cost.model == model]
        rows = [
            (
                f"{cost.side.name}: {scaled(sum(cost.memory.values()), 'B')}",
                [cost.memory[part] for part in PARTS],
            )
            for cost in costs
        ]
        yield bars(f"Memory of a step, {model}", rows)
    yield "</div>"


def scaled(value: float, unit: str = "") -> str:
    """The value with the prefix that keeps it short: 1500 bytes are 1.5 kB."""
    for power, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= power:
            return f"{value / power:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}".strip()
