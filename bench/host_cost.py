"""CPU time that the host spends on a streamed token: the event loop's, and the engine thread's beside the model's step.

    PYTHONPATH=. python bench/host_cost.py                          the embedded model, 8, 32 and 64 streams
    PYTHONPATH=. python bench/host_cost.py MODEL_FOLDER --json host_cost.json
    PYTHONPATH=. python bench/host_cost.py MODEL_FOLDER --against ../another-checkout --rounds 5

The real server in a process of its own, asked over HTTP by another one. What is counted is the time of each thread on a
CPU, not the clock's, so that neither the model's speed nor other programs are in the figures; clients read in a
process of their own. Each figure is of the time in which all streams run.

    event loop    everything between the engine's `put` and the system's socket, per streamed token and per chunk
    delivery      StepLoop._deliver per token: text, stop strings, counters, the reader's mailbox
    scheduling    a step without its delivery, the model's pass, the draw and handing over to the device, per step

With --against, checkouts are measured in turns in the same run, and the other one's medians are the baseline.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _rows import Row, add_json_option, print_rows, write_rows

ROOT = Path(__file__).resolve().parents[1]
START_TIMEOUT_S = 300.0
RUN_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of CPU time."""

    loop_per_token_s: float
    loop_per_chunk_s: float
    delivery_per_token_s: float
    scheduling_per_step_s: float
    tokens_per_s: float  # by the clock


FIGURES = {
    "loop_per_token_s": "event loop, per token",
    "loop_per_chunk_s": "event loop, per chunk",
    "delivery_per_token_s": "delivery, per token",
    "scheduling_per_step_s": "scheduling, per step",
}


# --- in the measured process


class Meter:
    """Sums the engine thread's CPU time in some of its functions; what is called inside another is counted in both."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}

    def around(self, owner: Any, name: str, label: str) -> None:
        """Count calls of owner.name under `label`."""
        inner: Callable[..., Any] = getattr(owner, name)
        self.seconds.setdefault(label, 0.0)
        self.calls.setdefault(label, 0)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[label] += time.thread_time() - began
                self.calls[label] += 1

        setattr(owner, name, timed)


def serve(args: argparse.Namespace) -> None:
    """The server, the clients' process and the figures: one JSON line on standard output."""
    from turboquant_kv import blas

    blas.interpose()
    import asyncio

    from turboserve.api import http_server
    from turboserve.api.app import create_app
    from turboserve.engine.draws import Flight
    from turboserve.engine.engine import TurboEngine
    from turboserve.engine.loading import build_parts
    from turboserve.engine.passes import OwnPasses
    from turboserve.engine.sampling import BatchSampler
    from turboserve.engine.step_loop import StepLoop
    from turboserve.settings import Settings
    from turboserve.telemetry import Telemetry

    settings = Settings(
        model=args.model,
        port=0,
        kv_format=args.kv_format,
        overlap="on",  # as on a GPU, whose host is what is measured
        max_running=args.streams[0],
        stream_interval_ms=args.interval_ms,
        cache_dir=Path(args.cache_dir),
    )
    telemetry = Telemetry()
    engine = TurboEngine(settings, build_parts, model_id="model", telemetry=telemetry)
    engine.start()
    engine.wait_until_ready(START_TIMEOUT_S)
    meter = Meter()
    meter.around(StepLoop, "step", "step")
    meter.around(StepLoop, "_deliver", "deliver")
    for name in ("logits", "logits_of_drawn"):
        meter.around(OwnPasses, name, "model")
    meter.around(BatchSampler, "sample", "draw")
    meter.around(Flight, "start", "start")
    counted = 0

    def count(num_tokens: int, add: Callable[[int], None] = telemetry.add_generation_tokens) -> None:
        nonlocal counted
        counted += num_tokens
        add(num_tokens)

    telemetry.add_generation_tokens = count  # type: ignore[method-assign]
    app = create_app(engine, settings, telemetry)
    listener = http_server.bind(settings)
    server = http_server.make_server(app, settings)
    loop_time: list[Any] = []

    def run() -> None:
        async def main() -> None:
            loop_time.append(asyncio.get_running_loop())
            await server.serve(sockets=[listener])

        asyncio.run(main())

    thread = threading.Thread(target=run, name="loop", daemon=True)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    thread.start()

    def loop_cpu_s() -> float:
        """The loop thread's CPU time, as it says itself."""
        told: Future[float] = Future()
        loop_time[0].call_soon_threadsafe(lambda: told.set_result(time.thread_time()))
        return told.result(RUN_TIMEOUT_S)

    def seen() -> tuple[float, int, dict[str, float], dict[str, int], float]:
        return loop_cpu_s(), counted, dict(meter.seconds), dict(meter.calls), time.monotonic()

    num = args.streams[0]
    most = num * args.answer_tokens
    address = listener.getsockname()
    clients = subprocess.Popen(
        [
            *(sys.executable, __file__, "--read", f"{address[0]}:{address[1]}"),
            *("--streams", str(num), "--answer-tokens", str(args.answer_tokens)),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    while counted < num * args.answer_tokens // 8:
        time.sleep(0.01)
    before = seen()
    while counted < most - num * args.answer_tokens // 8:
        time.sleep(0.01)
    after = seen()
    chunks_per_token = float(clients.communicate(timeout=RUN_TIMEOUT_S)[0]) / most
    tokens = after[1] - before[1]
    spent = {label: after[2][label] - before[2][label] for label in after[2]}
    steps = after[3]["step"] - before[3]["step"]
    loop_s = after[0] - before[0]
    rest_s = spent["step"] - spent["deliver"] - spent["model"] - spent["draw"] - spent["start"]
    found = Cost(
        loop_s / tokens,
        loop_s / tokens / chunks_per_token,
        spent["deliver"] / tokens,
        rest_s / steps,
        tokens / (after[4] - before[4]),
    )
    sys.stdout.write("\n" + json.dumps(asdict(found)) + "\n")
    sys.stdout.flush()
    os._exit(0)


# --- in the clients' process


def read_streams(args: argparse.Namespace) -> None:
    """Ask for all streams at once, read them to their ends, print how many chunks of text came in all."""
    import selectors
    import socket

    host, _, port = args.read.rpartition(":")
    chooser = selectors.DefaultSelector()
    for i in range(args.streams[0]):
        body = json.dumps(
            {
                "messages": [{"role": "user", "content": f"{i}: tell me a story of a river."}],
                "max_tokens": args.answer_tokens,
                "ignore_eos": True,
                "skip_special_tokens": False,  # a model that has nothing to say says them
                "temperature": 1.0,
                "seed": i,
                "stream": True,
            }
        ).encode()
        link = socket.create_connection((host, int(port)))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {args.read}\r\nContent-Type: application/json\r\n"
        link.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        chooser.register(link, selectors.EVENT_READ, bytearray())
    chunks = 0
    while chooser.get_map():
        for key, _ in chooser.select():
            link = key.fileobj  # type: ignore[assignment]
            part = link.recv(1 << 16)
            key.data.extend(part)
            if part and b"[DONE]" not in key.data[-64:]:
                continue
            chunks += key.data.count(b'"content":') - 1  # the first one has the role alone
            if b"[DONE]" not in key.data:
                raise SystemExit(f"a stream ended early: {bytes(key.data[:2000])!r}")
            chooser.unregister(link)
            link.close()
    print(chunks)


# --- in the parent


def measured(args: argparse.Namespace, checkout: Path, num_streams: int) -> Cost:
    """One run of that checkout's server. Raises SystemExit when it fails."""
    with tempfile.TemporaryDirectory() as cache_dir:
        command = [sys.executable, str(Path(__file__).resolve()), args.model, "--serve", "--cache-dir", cache_dir]
        command += ["--streams", str(num_streams), "--answer-tokens", str(args.answer_tokens)]
        command += ["--kv-format", args.kv_format, "--interval-ms", str(args.interval_ms)]
        path = os.pathsep.join(str(checkout / part) for part in ("kernels", "server", "."))
        with tempfile.TemporaryFile("w+") as errors:
            found = subprocess.run(
                command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=errors, text=True
            )
            errors.seek(0)
            if found.returncode:
                raise SystemExit(f"{checkout}: {errors.read()[-3000:]}")
    return Cost(**json.loads(found.stdout.splitlines()[-1]))


def rows_of(args: argparse.Namespace) -> list[Row]:
    rows = []
    checkouts = [ROOT, *([args.against.resolve()] if args.against else [])]
    for num_streams in args.streams:
        rounds: dict[Path, list[Cost]] = {checkout: [] for checkout in checkouts}
        for i in range(args.rounds):
            for checkout in checkouts if i % 2 == 0 else reversed(checkouts):
                rounds[checkout].append(measured(args, checkout, num_streams))
        new = []
        for figure, name in FIGURES.items():
            ours, *theirs = (statistics.median(getattr(c, figure) * 1e6 for c in rounds[one]) for one in checkouts)
            new.append(Row.plain(f"{num_streams} streams: {name}", ours, "µs", theirs[0] if theirs else None))
        ours, *theirs = (statistics.median(cost.tokens_per_s for cost in rounds[one]) for one in checkouts)
        new.append(Row.plain(f"{num_streams} streams: all tokens/s", ours, "1/s", theirs[0] if theirs else None))
        print_rows(new)
        rows += new
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="", help="a folder; the embedded model without")
    parser.add_argument("--streams", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--answer-tokens", type=int, default=200)
    parser.add_argument("--kv-format", default="f16")
    parser.add_argument("--interval-ms", type=float, default=0.0, help="stream_interval_ms; 0: each token by itself")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout, measured in turns")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--cache-dir", help=argparse.SUPPRESS)
    parser.add_argument("--read", help=argparse.SUPPRESS)
    add_json_option(parser)
    args = parser.parse_args()
    if args.read:
        return read_streams(args)
    if args.serve:
        return serve(args)
    write_rows(args.json, rows_of(args))


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
