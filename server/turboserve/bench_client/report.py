"""What was measured, as a table for people and as an object for JSON. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from turboserve.bench_client.asking import Outcome
from turboserve.bench_client.figures import METRICS, Counts, count, ratios
from turboserve.bench_client.session import Plan, Server

LETTERS = "AB"
FEW_ANSWERS = 100  # below as many, a 99th percentile is the largest value or next to it


def table(plan: Plan, servers: Sequence[Server]) -> Iterator[str]:
    """Lines: what was asked, a row per figure (with ratios of two servers), then what a reader has to know."""
    yield headline(plan)
    yield from (f"{LETTERS[i]}: {server.name}, {server.probe.target.model}" for i, server in enumerate(servers))
    yield ""
    heads = [*LETTERS[: len(servers)], *(["A / B"] if len(servers) == 2 else [])]
    width = max(len(metric.label) + len(metric.unit) + 2 for metric in METRICS)
    yield _row("", heads, width)
    found = [server.medians for server in servers]
    both = ratios(found[0], found[1]) if len(found) == 2 else {}
    for metric in METRICS:
        if any(metric.key in one for one in found):
            cells = [shown(one[metric.key] * metric.scale) if metric.key in one else "-" for one in found]
            if len(found) == 2:
                cells.append(f"{both[metric.key]:.2f}" + _spread(servers, metric.key) if metric.key in both else "-")
            yield _row(f"{metric.label}, {metric.unit}", cells, width)
    for i, server in enumerate(servers):
        yield ""
        yield from (f"{LETTERS[i]}: {note}" for note in notes(plan, server))


def _row(label: str, cells: Sequence[str], width: int) -> str:
    """Figures in columns, ratios with their spread in a wider one."""
    return label.ljust(width) + "".join(f"{cell:>12}" for cell in cells[:2]) + "".join(f"{c:>20}" for c in cells[2:])


def headline(plan: Plan) -> str:
    """The mix and the pace in one line."""
    mix, pace = plan.mix, plan.pace
    asked = f"{pace.streams} streams" if pace.rate is None else f"{pace.rate:g} requests/s arriving at random"
    limits = [f"{pace.num_requests} requests"] if pace.num_requests is not None else []
    limits += [f"{pace.duration_s:g} s"] if pace.duration_s is not None else []
    prefix = f" ({mix.shared_prefix} of them shared)" if mix.shared_prefix else ""
    top_p = "" if mix.top_p is None else f", top_p {mix.top_p:g}"
    median = f", {plan.rounds} rounds (medians)" if plan.rounds > 1 else ""
    return (
        f"{asked}, {' or '.join(limits)}{median}: prompts of {mix.prompt_tokens} tokens{prefix}, answers of up to "
        f"{mix.answer_tokens}, temperature {mix.temperature:g}{top_p}, seed {mix.seed}"
    )


def shown(value: float) -> str:
    """Four digits that count, and no more than whole numbers need."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{1 if abs(value) >= 100 else 2}f}"


def _spread(servers: Sequence[Server], key: str) -> str:
    """The smallest and the largest ratio of one round."""
    pairs = zip(servers[0].rounds, servers[1].rounds, strict=True)
    each = [one for a, b in pairs if (one := ratios(a.figures, b.figures).get(key)) is not None]
    return f" ({min(each):.2f}-{max(each):.2f})" if len(each) > 1 else ""


def notes(plan: Plan, server: Server) -> Iterator[str]:
    """What a reader of the figures has to know: failures first, then how what came differs from what was asked."""
    counts = server.counts
    yield from _failures("", counts)
    if server.warm_up:
        yield from _failures("warm-up: ", count(server.warm_up))
    yield _answers(counts)
    if counts.asked_prompt_tokens:
        off = counts.prompt_tokens / counts.asked_prompt_tokens - 1
        yield (
            f"prompts: {counts.shortest_prompt} to {counts.longest_prompt} tokens by the server's count, {off:+.1%} of "
            f"what was asked; {counts.cached_tokens / counts.prompt_tokens:.0%} were found in its caches"
        )
    kv = [(one.kv_start, one.kv_peak) for one in server.rounds if one.kv_start and one.kv_peak]
    if kv:
        held = kv[0][0].num_bytes / (1 << 20)
        yield f"KV memory: format {kv[0][1].kv_format}; idle conversations count, {held:.1f} MiB were held at the start"
    if missed := sum(one.kv_missed for one in server.rounds):
        yield f"KV memory: {missed} samples got no answer; the peak is of the others"
    yield from server.probe.notes


def _failures(where: str, counts: Counts) -> Iterator[str]:
    if not counts.failed:
        yield f"{where}{counts.requests} requests, none failed"
        return
    yield f"{where}{counts.requests} requests, {counts.failed} FAILED; the figures are of the others"
    for kind, number in counts.errors.items():
        yield f"  {number} x {kind}: {counts.examples[kind]}"


def _answers(counts: Counts) -> str:
    text = f"answers: {counts.answer_tokens:,} tokens in {counts.chunks:,} pieces of text"
    if counts.without_usage:
        text += f"; {counts.without_usage} came without usage, their pieces are counted as tokens"
    if counts.ended_early:
        text += f"; {counts.ended_early} ended early"
    if counts.empty:
        text += f"; {counts.empty} were empty and have no time to first token"
    if 0 < counts.requests - counts.failed < FEW_ANSWERS:
        text += f"; p99 of so few ({counts.requests - counts.failed}) is about the largest"
    return text


def as_json(plan: Plan, servers: Sequence[Server]) -> dict[str, Any]:
    """Everything, down to each request's times; seconds, bytes, tokens. Figures that cannot be said are absent."""
    report: dict[str, Any] = {"plan": asdict(plan), "servers": [_server(server) for server in servers]}
    if len(servers) == 2:
        report["ratios"] = ratios(servers[0].medians, servers[1].medians)
    return report


def _server(server: Server) -> dict[str, Any]:
    return {
        "url": server.name,
        "model": server.probe.target.model,
        "tokens_per_word": server.probe.scale.per_word,
        "prompt_overhead_tokens": server.probe.scale.overhead,
        "fields_left_out": list(server.probe.left_out),
        "notes": server.probe.notes,
        "medians": server.medians,
        "counts": _counts(server.counts),
        "warm_up": _counts(count(server.warm_up)),
        "rounds": [
            {
                "figures": one.figures,
                "counts": _counts(count(one.outcomes)),
                "kv_start": one.kv_start and asdict(one.kv_start),
                "kv_peak": one.kv_peak and asdict(one.kv_peak),
                "kv_missed": one.kv_missed,
                "requests": [_request(outcome) for outcome in one.outcomes],
            }
            for one in server.rounds
        ],
    }


def _counts(counts: Counts) -> dict[str, Any]:
    return {"failed": counts.failed, **asdict(counts)}


def _request(outcome: Outcome) -> dict[str, Any]:
    """`chunk_s` rounded to the microsecond: a clock says no more."""
    return {**asdict(outcome), "chunk_s": [round(at, 6) for at in outcome.chunk_s]}
