"""One SVG of a measurement: how first tokens and gaps are distributed, and the throughput over time. Pure text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from turboserve.bench_client.asking import Outcome
from turboserve.bench_client.figures import gaps
from turboserve.bench_client.session import Server

WIDTH, HEIGHT, LEFT, TOP, GAP = 340, 220, 60, 60, 70
COLOURS = ("#1f6fb2", "#c8501e")
MAX_POINTS = 400  # of a curve; more only make the file larger
SHORTEST_MS = 0.01  # pieces of text that came together; a logarithmic axis has no zero
Points = list[tuple[float, float]]


def svg(title: str, servers: Sequence[Server]) -> str:
    """The picture; rounds are laid over each other."""
    panels = [
        _distribution("time to first token, ms", [_ttfts(server.outcomes) for server in servers]),
        _distribution("inter-token latency, ms", [_itls(server.outcomes) for server in servers]),
        _throughput([[one.outcomes for one in server.rounds] for server in servers]),
    ]
    total_width, total_height = LEFT + len(panels) * (WIDTH + GAP), TOP + HEIGHT + 50
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total_width}" height="{total_height}" '
        f'viewBox="0 0 {total_width} {total_height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{total_width}" height="{total_height}" fill="white"/>',
        f'<text x="{LEFT}" y="20">{escape(title)}</text>',
    ]
    for i, server in enumerate(servers):
        name = escape(f"{server.name} {server.probe.target.model}")
        lines.append(f'<text x="{LEFT + i * 560}" y="40" fill="{COLOURS[i]}">{name}</text>')
    for i, panel in enumerate(panels):
        lines.append(f'<g transform="translate({LEFT + i * (WIDTH + GAP)} {TOP})">{panel}</g>')
    return "\n".join([*lines, "</svg>\n"])


def _ttfts(outcomes: Sequence[Outcome]) -> list[float]:
    return [1e3 * (o.chunk_s[0] - o.sent_s) for o in outcomes if o.chunk_s and not o.error]


def _itls(outcomes: Sequence[Outcome]) -> list[float]:
    return [1e3 * gap for o in outcomes if not o.error for gap in gaps(o)]


def _distribution(label: str, groups: Sequence[list[float]]) -> str:
    """Share of values below x, on a logarithmic axis."""
    groups = [sorted(max(value, SHORTEST_MS) for value in values) for values in groups]
    everything = [value for values in groups for value in values]
    if not everything:
        return _frame(label, [], [])
    low, high = min(everything), max(everything) * 1.001

    def x(value: float) -> float:
        return WIDTH * math.log(value / low) / math.log(high / low)

    ticks = [(x(value), f"{value:g}") for value in _decades(low, high)]
    curves = [_line([(x(value), share) for value, share in _shares(values)], i) for i, values in enumerate(groups)]
    return _frame(label, ticks, [(share, f"{share:.0%}") for share in (0, 0.25, 0.5, 0.75, 1)]) + "".join(curves)


def _shares(values: Sequence[float]) -> Points:
    picked = range(0, len(values), max(1, len(values) // MAX_POINTS))
    points = [(values[i], (i + 1) / len(values)) for i in picked]
    return [*points, (values[-1], 1.0)] if values else []


def _decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each power of ten in the range; only powers where it is wide."""
    steps = (1, 2, 5) if high / low < 1000 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]


def _throughput(groups: Sequence[Sequence[Sequence[Outcome]]]) -> str:
    """Pieces of text in each second since a round's start, all streams together, one curve a round."""
    curves = [(i, per_second(outcomes)) for i, rounds in enumerate(groups) for outcomes in rounds]
    highest = max((rate for _, curve in curves for rate in curve), default=0.0) or 1.0
    longest = max((len(curve) for _, curve in curves), default=0) or 1
    ticks = [(WIDTH * i / 4, f"{longest * i / 4:g}") for i in range(5)]
    lines = [
        _line([(WIDTH * (at + 0.5) / longest, rate / highest) for at, rate in enumerate(curve)], i)
        for i, curve in curves
    ]
    frame = _frame("seconds; pieces of text/s of all", ticks, [(i / 4, f"{highest * i / 4:.0f}") for i in range(5)])
    return frame + "".join(lines)


def per_second(outcomes: Sequence[Outcome]) -> list[float]:
    """How many pieces of text came in each second, those of failed requests too: they came."""
    times = [at for outcome in outcomes for at in outcome.chunk_s]
    counts = [0.0] * (int(max(times)) + 1 if times else 0)
    for at in times:
        counts[int(at)] += 1
    return counts


def _frame(label: str, x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]]) -> str:
    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#888"/>']
    text: Callable[[float, float, str, str], str] = lambda x, y, anchor, words: (  # noqa: E731
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
    )
    for at, words in x_ticks:
        parts.append(f'<path d="M{at:.1f} 0V{HEIGHT}" stroke="#ddd"/>' + text(at, HEIGHT + 16, "middle", words))
    for share, words in y_ticks:
        y = HEIGHT * (1 - share)
        parts.append(f'<path d="M0 {y:.1f}H{WIDTH}" stroke="#ddd"/>' + text(-6, y + 4, "end", words))
    return "".join([*parts, text(WIDTH / 2, HEIGHT + 36, "middle", label)])


def _line(points: Points, number: int) -> str:
    """Points with x in pixels and y as a share of the height."""
    path = " ".join(f"{x:.1f},{HEIGHT * (1 - share):.1f}" for x, share in points)
    return f'<polyline points="{path}" fill="none" stroke="{COLOURS[number]}" stroke-width="1.5"/>' if path else ""
