"""The table, the JSON and the picture of two servers whose figures are known."""

from __future__ import annotations

import io
import json
import re
from xml.etree import ElementTree

import pytest

from turboserve.bench_client import plot, report
from turboserve.bench_client.asking import Outcome, Target
from turboserve.bench_client.figures import figures
from turboserve.bench_client.kv_watch import KVSample
from turboserve.bench_client.load import Round
from turboserve.bench_client.mix import Mix, Pace, Span, TokenScale
from turboserve.bench_client.probe import Probe
from turboserve.bench_client.progress import Progress
from turboserve.bench_client.session import Measured, Plan, Server

PLAN = Plan(Mix(Span(10, 20), shared_prefix=4, seed=7), Pace(2, num_requests=4), rounds=3)
SVG = "{http://www.w3.org/2000/svg}"


def server(port: int, factor: float, error: str = "") -> Server:
    """Three rounds of two answers of three tokens, 1, 2 and 3 times as slow, times `factor`."""
    found = Server(Probe(Target(f"http://127.0.0.1:{port}/v1", "<m&m>"), TokenScale(), notes=["it is odd"]))
    for slow in (1.0, 3.0, 2.0):
        step = slow * factor
        outcomes = [
            Outcome(i, i, 0.0, 10, 3, 3 * step, [step, 2 * step, 3 * step], 11, 1, 3, "length") for i in range(2)
        ]
        if error:
            outcomes.append(Outcome(2, 0, 0.0, 10, 3, step, [], error=error, detail="no <luck>"))
        sample = KVSample(1 << 20, 3 << 20, 1024, "4/3")
        found.rounds.append(Measured(outcomes, figures(outcomes, True, sample), sample, sample))
    return found


def test_the_table_of_two_servers() -> None:
    lines = list(report.table(PLAN, [server(1, 0.5), server(2, 1.0)]))
    text = "\n".join(lines)
    assert lines[0].startswith("2 streams, 4 requests, 3 rounds (medians): prompts of 10-20 tokens (4 of them shared)")
    rows = {match[1]: match[2].split() for line in lines if (match := re.match(r"(\S.*?, \S+) {2,}(\S.*)$", line))}
    assert rows["time to first token, p50, ms"] == ["1,000", "2,000", "0.50", "(0.50-0.50)"]
    assert rows["tokens/s of all, over everything, 1/s"] == ["2.00", "1.00", "2.00", "(2.00-2.00)"]
    assert rows["KV memory, peak, MiB"][:3] == ["1.00", "1.00", "1.00"]
    assert "B: 6 requests, none failed" in text and "A: it is odd" in text
    assert "11 to 11 tokens by the server's count, +10.0%" in text and "9% were found in its caches" in text


def test_failures_stand_in_the_table_of_one_server() -> None:
    text = "\n".join(report.table(PLAN, [server(1, 1.0, "HTTP 503")]))
    assert "A: 9 requests, 3 FAILED" in text and "3 x HTTP 503: no <luck>" in text and "A / B" not in text


def test_the_json_has_everything_and_is_finite() -> None:
    found = json.loads(json.dumps(report.as_json(PLAN, [server(1, 0.5, "timeout"), server(2, 1.0)]), allow_nan=False))
    assert found["plan"]["mix"]["seed"] == 7 and found["ratios"]["ttft_p50_s"] == 0.5
    first, second = found["servers"]
    assert first["counts"]["errors"] == {"timeout": 3} and first["counts"]["failed"] == 3
    assert second["medians"]["ttft_p50_s"] == 2.0 and second["counts"]["failed"] == 0
    assert [one["figures"]["ttft_p50_s"] for one in second["rounds"]] == [1.0, 3.0, 2.0]
    assert second["rounds"][1]["requests"][0]["chunk_s"] == [3.0, 6.0, 9.0]


def test_the_picture_is_xml_with_curves_inside_their_frames() -> None:
    root = ElementTree.fromstring(plot.svg("a < b", [server(1, 0.5), server(2, 1.0)]))
    curves = [line.attrib["points"].split() for line in root.iter(f"{SVG}polyline")]
    assert len(curves) == 2 + 2 + 2 * 3, "two distributions for each server, and a curve for each round"
    for curve in curves:
        for x, y in (map(float, point.split(",")) for point in curve):
            assert -0.1 <= x <= plot.WIDTH + 0.1 and -0.1 <= y <= plot.HEIGHT + 0.1
    for curve in curves[:4]:
        heights = [float(point.split(",")[1]) for point in curve]
        assert heights == sorted(heights, reverse=True) and heights[-1] == 0, "shares grow to all"
    words = [text.text for text in root.iter(f"{SVG}text")]
    assert "a < b" in words and any("<m&m>" in (word or "") for word in words)


@pytest.mark.parametrize("error", ["", "timeout"])
def test_a_picture_of_nothing(error: str) -> None:
    empty = Server(Probe(Target("u", "m"), TokenScale()))
    if error:
        empty.rounds.append(Measured([Outcome(0, 0, 0.0, error=error)], {}, None, None))
    assert not list(ElementTree.fromstring(plot.svg("t", [empty])).iter(f"{SVG}polyline"))


def test_pieces_are_counted_by_the_second() -> None:
    assert plot.per_second([Outcome(0, 0, 0.0, chunk_s=[0.1, 0.9, 2.5])]) == [2, 0, 1]
    assert plot.per_second([]) == []


def test_progress_names_failures() -> None:
    current = Round(outcomes=[Outcome(0, 0, 0.0, chunk_s=[1.0]), Outcome(1, 0, 0.0, error="timeout")], num_ended=1)
    line = Progress(Pace(num_requests=5), io.StringIO()).line("u round 1/1", current)
    assert line.startswith("u round 1/1: 1/5 answered, 1 running, 1 FAILED, ")
