"""Line charts and bars as inline SVG, coloured by the page's style classes."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, BELOW = 360, 230, 54, 40
"""A picture's size, and the room for its axes' labels."""

BAR = 34
"""The height of a bar with its label."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """Points joined in order; ``style`` numbers its colour and dashes; ``marks``: each seed's."""

    label: str
    points: Sequence[Point]
    style: int
    thin: bool = False
    marks: Sequence[Point] = ()


@dataclass(frozen=True)
class Axis:
    """An axis: its label, whether it is logarithmic, its ticks if they are known."""

    label: str
    log: bool = False
    ticks: Sequence[float] = ()

    def place(self, value: float) -> float:
        """The value's position before it is scaled to the picture."""
        return math.log10(max(value, 1e-6)) if self.log else value

    def marks(self, low: float, high: float) -> list[float]:
        """Ticks between two positions: those given, powers of ten, or a few round numbers."""
        if self.ticks:
            return list(self.ticks)
        if self.log:
            powers = range(math.floor(low), math.ceil(high) + 1)
            return [10.0**k for k in powers if low - 1e-9 <= k <= high + 1e-9]
        raw = (high - low or 1.0) / 3  # so that three lie within at least
        unit = 10.0 ** math.floor(math.log10(raw))
        step = unit * max(f for f in (1, 2, 5) if f == 1 or f * unit <= raw)
        return [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]

    def range_of(self, values: Sequence[float]) -> tuple[float, float]:
        """The least and the greatest position of values and ticks, with a margin."""
        places = [self.place(value) for value in (*values, *self.ticks)]
        low, high = min(places), max(places)
        margin = 0.04 * (high - low) or 0.5
        return low - margin, high + margin


@dataclass(frozen=True)
class _Frame:
    """Where values lie in the picture: two axes and the range of each."""

    x: Axis
    y: Axis
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def across(self, value: float) -> str:
        low, high = self.x_range
        return f"{LEFT + (self.x.place(value) - low) / (high - low) * (WIDTH - LEFT - 8):.1f}"

    def down(self, value: float) -> str:
        low, high = self.y_range
        return f"{8 + (high - self.y.place(value)) / (high - low) * (HEIGHT - BELOW - 8):.1f}"

    def at(self, point: Point) -> str:
        return f"{self.across(point[0])} {self.down(point[1])}"


def chart(title: str, lines: Sequence[Line], x: Axis, y: Axis) -> str:
    """Lines as an inline SVG with its title below; points that are not finite are left out.

    Errors: ValueError without a finite point.
    """
    points = [p for line in lines for p in _finite([*line.points, *line.marks])]
    if not points:
        raise ValueError(f"{title}: no finite point to draw")
    frame = _Frame(x, y, x.range_of([p[0] for p in points]), y.range_of([p[1] for p in points]))
    drawn = [*_axes(frame), *(part for line in lines for part in _line(frame, line))]
    return figure(title, "".join(drawn), HEIGHT)


def figure(title: str, drawn: str, height: int) -> str:
    """The drawn elements as a figure with its title below."""
    return (
        f'<figure><svg role="img" aria-label="{escape(title)}" viewBox="0 0 {WIDTH} {height}">'
        f"{drawn}</svg><figcaption>{escape(title)}</figcaption></figure>"
    )


def _finite(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if all(map(math.isfinite, point))]


def _axes(frame: _Frame) -> Iterator[str]:
    middle = (HEIGHT - BELOW) // 2
    yield f'<path class="axis" fill="none" d="M{LEFT} 8V{HEIGHT - BELOW}H{WIDTH - 8}"/>'
    yield f'<text x="{(WIDTH + LEFT) // 2}" y="{HEIGHT - 6}" text-anchor="middle">'
    yield f"{escape(frame.x.label)}</text>"
    yield f'<text transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">'
    yield f"{escape(frame.y.label)}</text>"
    for value in frame.x.marks(*frame.x_range):
        across = frame.across(value)
        yield f'<text x="{across}" y="{HEIGHT - BELOW + 14}" text-anchor="middle">{value:g}</text>'
    for value in frame.y.marks(*frame.y_range):
        down = frame.down(value)
        yield f'<path class="axis" d="M{LEFT} {down}h-4"/>'
        yield f'<text x="{LEFT - 6}" y="{down}" dy="4" text-anchor="end">{value:.4g}</text>'


def _line(frame: _Frame, line: Line) -> Iterator[str]:
    points = _finite(line.points)
    thin = " thin" if line.thin else ""
    if len(points) > 1:
        path = "L".join(map(frame.at, points))
        yield f'<path class="s s{line.style}{thin}" d="M{path}"/>'
    radius = 1.5 if line.thin else 2.5
    for x, y in _finite(line.marks) if line.marks else points:
        yield f'<circle class="f{line.style}" cx="{frame.across(x)}" cy="{frame.down(y)}" '
        yield f'r="{radius}"/>'


def bars(title: str, rows: Sequence[tuple[str, Sequence[float]]]) -> str:
    """A labelled bar for each row, its parts side by side in the styles 1, 2, ..."""
    greatest = max(sum(parts) for _, parts in rows)
    drawn = []
    for i, (label, parts) in enumerate(rows):
        across, down = 0.0, BAR * i
        drawn.append(f'<text x="0" y="{down + 12}">{escape(label)}</text>')
        for style, part in enumerate(parts, 1):
            width = WIDTH * part / greatest
            drawn.append(
                f'<rect class="f{style}" x="{across:.1f}" y="{down + 16}" width="{width:.1f}" '
                'height="12"/>'
            )
            across += width
    return figure(title, "".join(drawn), BAR * len(rows))
