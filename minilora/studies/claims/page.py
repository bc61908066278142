"""A study as one HTML page that needs nothing else: the verdicts, their figures and pictures."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from statistics import fmean

from minilora import __version__
from minilora.studies.claims import (
    FULL,
    HOLDS,
    NOT,
    PARTS,
    WHEN,
    Course,
    Found,
    Look,
    Side,
    Verdict,
    case_words,
    notes,
)
from minilora.verify.report.html import STYLE

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

WIDTH, HEIGHT, LEFT, BELOW = 360, 230, 54, 40
"""A picture's size, and the room for its axes' labels."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """Points joined in order; ``style`` numbers its colour and dashes; ``marks`` are seeds' own."""

    label: str
    points: Sequence[Point]
    style: int
    thin: bool = False
    marks: Sequence[Point] = ()


@dataclass(frozen=True)
class Axis:
    """An axis: its words, whether it is logarithmic, its ticks if they are known."""

    words: str
    log: bool = False
    ticks: Sequence[float] = ()

    def place(self, value: float) -> float:
        """Where the value lies, before it is scaled."""
        return math.log10(max(value, 1e-6)) if self.log else value

    def marks(self, low: float, high: float) -> list[float]:
        """Ticks between two places: those given, powers of ten, or a few round numbers."""
        if self.ticks:
            return list(self.ticks)
        if self.log:
            powers = range(math.floor(low), math.ceil(high) + 1)
            return [10.0**k for k in powers if low - 1e-9 <= k <= high + 1e-9]
        raw = (high - low or 1.0) / 3  # so that three lie within at least
        unit = 10.0 ** math.floor(math.log10(raw))
        step = unit * max(f for f in (1, 2, 5) if f == 1 or f * unit <= raw)
        return [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def chart(title: str, lines: Sequence[Line], x: Axis, y: Axis) -> str:
    """Lines as an inline SVG with its title below; points that are no numbers are left out.

    Errors: ValueError without a point.
    """
    points = [p for line in lines for p in (*line.points, *line.marks) if all(map(_finite, p))]
    if not points:
        raise ValueError(f"{title}: nothing to draw")
    ends = []
    for axis, values in ((x, [p[0] for p in points]), (y, [p[1] for p in points])):
        places = [axis.place(v) for v in (*values, *axis.ticks)]
        low, high = min(places), max(places)
        spare = 0.04 * (high - low) or 0.5
        ends.append((low - spare, high + spare))
    (x0, x1), (y0, y1) = ends

    def at(point: Point) -> str:
        across = LEFT + (x.place(point[0]) - x0) / (x1 - x0) * (WIDTH - LEFT - 8)
        down = 8 + (y1 - y.place(point[1])) / (y1 - y0) * (HEIGHT - BELOW - 8)
        return f"{across:.1f} {down:.1f}"

    drawn = [
        f'<path class="axis" fill="none" d="M{LEFT} 8V{HEIGHT - BELOW}H{WIDTH - 8}"/>',
        f'<text x="{(WIDTH + LEFT) // 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escape(x.words)}</text>",
        f'<text transform="translate(11 {(HEIGHT - BELOW) // 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(y.words)}</text>',
    ]
    for value in x.marks(x0, x1):
        across, _ = at((value, _back(y, y0))).split()
        drawn.append(
            f'<text x="{across}" y="{HEIGHT - BELOW + 14}" text-anchor="middle">{value:g}</text>'
        )
    for value in y.marks(y0, y1):
        _, down = at((_back(x, x0), value)).split()
        drawn.append(f'<path class="axis" d="M{LEFT} {down}h-4"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{down}" dy="4" text-anchor="end">{value:.4g}</text>')
    for line in lines:
        kept = [at(p) for p in line.points if all(map(_finite, p))]
        thin = " thin" if line.thin else ""
        if len(kept) > 1:
            drawn.append(f'<path class="s s{line.style}{thin}" d="M{"L".join(kept)}"/>')
        dots = kept if not line.marks else [at(p) for p in line.marks if all(map(_finite, p))]
        for dot in dots:
            across, down = dot.split()
            radius = 1.5 if line.thin else 2.5
            drawn.append(f'<circle class="f{line.style}" cx="{across}" cy="{down}" r="{radius}"/>')
    picture = "".join(drawn)
    return (
        f'<figure><svg role="img" aria-label="{escape(title)}" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f"{picture}</svg><figcaption>{escape(title)}</figcaption></figure>"
    )


def _finite(value: float) -> bool:
    return math.isfinite(value)


def _back(axis: Axis, place: float) -> float:
    return float(10**place) if axis.log else place


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


def html(found: Found, judged: Sequence[Verdict]) -> str:
    """The whole page."""
    return "\n".join(_page(found, judged)) + "\n"


def _page(found: Found, judged: Sequence[Verdict]) -> Iterator[str]:
    yield "<!doctype html>"
    yield '<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield "<title>What LoRA is said to bring, measured</title>"
    yield f"<style>{STYLE}{_OWN_STYLE}</style></head><body>"
    yield "<header><h1>What LoRA is said to bring, measured</h1>"
    yield f"<p>By minilora {escape(__version__)}, on {', '.join(_models(found))}, against full "
    yield "fine-tuning. A verdict follows from a criterion that was stated before.</p>"
    yield "</header><main>"
    yield from _verdicts(judged)
    yield '<h2 id="learning">Learning and forgetting</h2>'
    yield "<p>Each reference model goes from a task that it knows to one that contradicts it; "
    yield "losses are what they exceed the tasks' entropies by. A real model goes from what it "
    yield "knows to a text; what it forgets is how far it diverges from the base. All in nats a "
    yield "label; lines are means.</p>"
    for model in found.models:
        yield from _learning(found, model)
    yield '<h2 id="costs">What it costs</h2>'
    yield from _costs(found)
    yield '<h2 id="how">How it was measured</h2><ul>'
    yield from (f"<li>{escape(note)}</li>" for note in notes(found))
    yield "</ul></main></body></html>"


def _models(found: Found) -> list[str]:
    return list(dict.fromkeys(cost.model for cost in found.costs))


def _verdicts(judged: Sequence[Verdict]) -> Iterator[str]:
    yield '<h2 id="verdicts">Verdicts</h2><table class="claims"><thead><tr>'
    yield '<th scope="col">claim</th><th scope="col">verdict</th></tr></thead><tbody>'
    for verdict in judged:
        key, says = escape(verdict.claim.key), escape(verdict.claim.says)
        yield f'<tr><th scope="row"><a href="#{key}">{says}</a></th>'
        yield f"<td>{_said(verdict)}</td></tr>"
    yield "</tbody></table>"
    for verdict in judged:
        claim = verdict.claim
        yield f'<details id="{escape(claim.key)}"><summary><h3>{escape(claim.says)}</h3> '
        yield f"{_said(verdict, short=True)}</summary>"
        yield f"<p>It holds if {escape(claim.criterion)}.</p><ul>"
        for case in verdict.cases:
            yield f"<li>{escape(case_words(claim, case))}</li>"
        yield f'</ul><p class="soft">{escape(claim.source)}</p></details>'


def _said(verdict: Verdict, short: bool = False) -> str:
    kind, sign = {HOLDS: ("yes", "✓"), WHEN: ("some", "≈")}.get(verdict.word, ("no-claim", "✗"))
    if verdict.word == NOT and not verdict.named(False):
        kind, sign = "some", "?"
    rest = "" if short else escape(verdict.said.removeprefix(verdict.word))
    return f'<span class="{kind}">{sign} {verdict.word}</span>{rest}'


def _key(sides: Sequence[Side]) -> str:
    keys = [
        f'<span><svg aria-hidden="true" viewBox="0 0 34 8"><path class="s s{i}" d="M1 4H33"/>'
        f"</svg> {escape(side.name)}</span>"
        for i, side in enumerate(sides)
    ]
    return f'<p class="key">{"".join(keys)}</p>'


def _learning(found: Found, model: str) -> Iterator[str]:
    sides, study = found.sides(model), found.models[model]
    steps = Axis("steps + 1", log=True, ticks=[step + 1 for step in study.looks])
    first, second, less = (
        (
            "first task: divergence",
            "second task: loss less the base's",
            "second task: how far its loss fell",
        )
        if study.length
        else (
            "first task: loss over entropy",
            "second task: loss over entropy",
            "second task: entropy less loss",
        )
    )
    if study.length:
        found = replace(found, courses=tuple(map(from_base, found.courses)))
    best = [(side, i, found.best(model, side)) for i, side in enumerate(sides)]
    begin = max(run.looks[0].second for _, _, runs in best for run in runs)
    rates = sorted({lr for side in sides for lr in study.rates_of(side)})
    yield f"<h3>{escape(model)}</h3>{_key(sides)}"
    yield '<div class="grid">'

    def along(of: Callable[[Look], float]) -> list[Line]:
        return [
            Line(
                side.name,
                means(runs, lambda look: (look.step + 1, of(look))),
                i,
                marks=[(look.step + 1, of(look)) for run in runs for look in run.looks],
            )
            for side, i, runs in best
        ]

    yield chart(
        "Learned: the second task along the path, at each side's best rate",
        along(lambda look: look.second), steps, Axis(second),
    )  # fmt: skip
    yield chart(
        "Forgotten: the first task along the path, at each side's best rate",
        along(lambda look: look.first), steps, Axis(first),
    )  # fmt: skip
    yield chart(
        "Forgotten against learned along the path, faint at other rates than the best; "
        "right is learned",
        [
            Line(
                side.name,
                means(found.at(model, side, lr), lambda look: (-look.second, look.first)),
                i,
                thin=lr != found.rate(model, side),
            )
            for i, side in enumerate(sides)
            for lr in study.rates_of(side)
            if all(map(learns, found.at(model, side, lr)))
        ],
        Axis(less), Axis(first),
    )  # fmt: skip
    yield chart(
        "The second task at the end against the learning rate: how each side was tuned; "
        "what ends above the base is drawn at the base",
        [
            Line(
                side.name,
                [(lr, _end(found.tuning(model, side, lr), begin)) for lr in study.rates_of(side)],
                i,
            )
            for i, side in enumerate(sides)
        ],
        Axis("learning rate", log=True, ticks=rates), Axis(second),
    )  # fmt: skip
    ranks = [(i, side) for i, side in enumerate(sides) if side.rank and not side.attention]
    full = _end(found.best(model, FULL))
    yield chart(
        "The second task at the end against the rank, at its best rate; the level line is full",
        [
            Line("full", [(side.rank, full) for _, side in ranks], 0),
            Line(
                "LoRA",
                [(side.rank, _end(found.best(model, side))) for _, side in ranks],
                9,  # no side's own
                marks=[
                    (side.rank, run.looks[-1].second)
                    for _, side in ranks
                    for run in found.best(model, side)
                ],
            ),
        ],
        Axis("rank", log=True, ticks=study.ranks), Axis(second),
    )  # fmt: skip
    yield "</div>"


def learns(course: Course) -> bool:
    """Whether the second task's loss ends below where it began; not if the run diverged."""
    return not course.why and course.looks[-1].second < course.looks[0].second


def _end(courses: Sequence[Course], most: float = math.inf) -> float:
    """The mean loss of the second task at the end, or none where a run diverged."""
    if any(course.why for course in courses):
        return math.nan
    return min(most, fmean(course.looks[-1].second for course in courses))


def _costs(found: Found) -> Iterator[str]:
    heads = ("", "parameters trained", "FLOPs a step", "ms a step", *PARTS, "disk")
    yield '<div class="wide" role="region" aria-label="Costs" tabindex="0"><table>'
    yield "<caption>FLOPs are counted; times are medians of rounds, in turn."
    yield "</caption><thead><tr>"
    yield "".join(f'<th scope="col">{head}</th>' for head in heads) + "</tr></thead><tbody>"
    for cost in found.costs:
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
    for model in _models(found):
        yield _bars(found, model)
    yield "</div>"


def scaled(value: float, unit: str = "") -> str:
    """The value with the prefix that keeps it short: 1500 bytes are 1.5 kB."""
    for power, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= power:
            return f"{value / power:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}".strip()


def _bars(found: Found, model: str) -> str:
    costs = [cost for cost in found.costs if cost.model == model]
    greatest = max(sum(cost.memory.values()) for cost in costs)
    drawn, high = [], 34
    for i, cost in enumerate(costs):
        across, down = 0.0, high * i
        whole = sum(cost.memory.values())
        drawn.append(
            f'<text x="0" y="{down + 12}">{escape(cost.side.name)}: {scaled(whole, "B")}</text>'
        )
        for k, part in enumerate(PARTS):
            wide = WIDTH * cost.memory[part] / greatest
            drawn.append(
                f'<rect class="f{k + 1}" x="{across:.1f}" y="{down + 16}" width="{wide:.1f}" '
                'height="12"/>'
            )
            across += wide
    title = f"Memory of a step, {model}"
    return (
        f'<figure><svg role="img" aria-label="{escape(title)}" '
        f'viewBox="0 0 {WIDTH} {high * len(costs)}">{"".join(drawn)}</svg>'
        f"<figcaption>{escape(title)}</figcaption></figure>"
    )
