"""An evaluation as one SVG: divergence against memory, along the text, and at far positions. Needs no library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from turboquant_kv.evaluation.evaluate import Evaluation

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 360, 300, 62, 34, 46, 14  # of a panel and its margins
LEGEND_WIDTH = 130
COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8f5db7", "#e08e0b", "#4a4a4a", "#00a0a0", "#b5651d", "#c2185b", "#607d3b")
_SMALLEST = 1e-5  # smaller ones, as of positions that see exact tokens alone, are drawn there


@dataclass(frozen=True)
class _Series:
    name: str
    colour: str
    is_rival: bool
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class _Panel:
    """One diagram with a logarithmic vertical axis. x_ticks: where, and what is written there."""

    title: str
    x_label: str
    x_ticks: tuple[tuple[float, str], ...]
    series: tuple[_Series, ...]

    def draw(self, left: int) -> list[str]:
        """Lines of SVG."""
        xs = [x for x, _ in self.x_ticks] + [x for s in self.series for x, _ in s.points]
        ys = [y for s in self.series for _, y in s.points]
        x_low, x_high = min(xs), max(xs)
        x_high += x_high == x_low
        decades = range(math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys))) + 1)

        def x_at(x: float) -> float:
            return left + LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

        def y_at(y: float) -> float:
            share = (math.log10(y) - decades[0]) / max(1, decades[-1] - decades[0])
            return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

        right, bottom = left + WIDTH - RIGHT, HEIGHT - BOTTOM
        out = [_text(left + LEFT, TOP - 14, self.title, "start", "bold")]
        for decade in decades:
            y = y_at(10.0**decade)
            out.append(f'<path d="M{left + LEFT} {y:.1f}H{right}" stroke="#ddd"/>')
            out.append(_text(left + LEFT - 6, y + 4, f"{10.0**decade:g}", "end"))
        for x, label in self.x_ticks:
            out.append(f'<path d="M{x_at(x):.1f} {bottom}v4" stroke="#555"/>')
            out.append(_text(x_at(x), bottom + 17, label, "middle"))
        out.append(_text((left + LEFT + right) / 2, HEIGHT - 8, self.x_label, "middle"))
        for series in self.series:
            places = [(x_at(x), y_at(y)) for x, y in series.points]
            dash = ' stroke-dasharray="4 3"' if series.is_rival else ""
            path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
            out.append(f'<path d="{path}" fill="none" stroke="{series.colour}"{dash}/>')
            out += [_mark(x, y, series) for x, y in places]
        return out


def svg(evaluation: Evaluation) -> str:
    """The drawing as text. Offsets have a panel where there is more than one."""
    panels = [_memory(evaluation), _along(evaluation)]
    if len(evaluation.plan.offsets) > 1:
        panels.append(_far(evaluation))
    width = len(panels) * WIDTH + LEGEND_WIDTH
    height = max(HEIGHT, TOP + 18 * len(evaluation.results))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for i, panel in enumerate(panels):
        lines += panel.draw(i * WIDTH)
    for i, result in enumerate(evaluation.results):
        x, y = len(panels) * WIDTH + 10, TOP + 18 * i
        lines.append(_mark(x, y - 4, _Series(result.name, _colour(i), result.kind == "rival", ())))
        lines.append(_text(x + 12, y, result.name, "start"))
    return "\n".join([*lines, "</svg>"]) + "\n"


def _memory(evaluation: Evaluation) -> _Panel:
    num_tokens, offset = evaluation.byte_lengths[-1], evaluation.plan.offsets[0]
    series = _series(evaluation, [[(r.ratio(num_tokens), r.figures(offset).kl_mean.mean)] for r in evaluation.results])
    most = math.ceil(max(x for s in series for x, _ in s.points))
    ticks = tuple((float(x), f"{x}") for x in range(1, most + 1))
    return _Panel("Mean KL against memory", f"times smaller than float16 at {num_tokens:,} tokens", ticks, series)


def _along(evaluation: Evaluation) -> _Panel:
    bins = [r.by_position(evaluation.plan.offsets[0]) for r in evaluation.results]
    series = _series(evaluation, [[(float(math.log2(end)), kl) for _, end, kl in of_result] for of_result in bins])
    ticks = tuple((math.log2(end), f"{end}") for _, end, _ in bins[0])
    return _Panel("Mean KL along the text", "up to token", ticks, series)


def _far(evaluation: Evaluation) -> _Panel:
    offsets = sorted(evaluation.plan.offsets)
    points = [[(float(i), r.figures(o).kl_mean.mean) for i, o in enumerate(offsets)] for r in evaluation.results]
    ticks = tuple((float(i), f"{o:,}") for i, o in enumerate(offsets))
    return _Panel("Mean KL far from the beginning", "position of the first token", ticks, _series(evaluation, points))


def _series(evaluation: Evaluation, points: Sequence[Sequence[tuple[float, float]]]) -> tuple[_Series, ...]:
    return tuple(
        _Series(r.name, _colour(i), r.kind == "rival", tuple((x, max(y, _SMALLEST)) for x, y in of_result))
        for i, (r, of_result) in enumerate(zip(evaluation.results, points, strict=True))
    )


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _mark(x: float, y: float, series: _Series) -> str:
    """A dot of a format, a square of a rival, with its name on hovering."""
    title = f"<title>{escape(series.name)}</title>"
    if series.is_rival:
        return f'<rect x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7" fill="{series.colour}">{title}</rect>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{series.colour}">{title}</circle>'


def _text(x: float, y: float, text: str, anchor: str, weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'
