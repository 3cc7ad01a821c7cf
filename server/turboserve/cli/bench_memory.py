"""`turboserve bench memory`: what one conversation's cache takes in each KV format, measured on a model as it grows.

The model reads a text through each format's caches; bytes are sums of the arrays they hold. Owns the measuring and the
table; imports MLX only when a run begins.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turboquant_kv.codec.format_name import PLAIN_FORMAT, UnsupportedFormatError, parse_format_name
from turboserve.cli.backend import load_backend
from turboserve.cli.config import UsageError
from turboserve.cli.figures import amount, uncompressed_in
from turboserve.cli.progress import Bars
from turboserve.errors import KVFormatError, StartupError
from turboserve.settings import Settings

if TYPE_CHECKING:
    from turboserve.engine.loaded_model import LoadedModel
    from turboserve.engine.served_formats import ServedFormats

CHUNK_TOKENS = 256
MIN_LENGTH = 256  # shorter conversations hold hardly a compressed page


@dataclass(frozen=True, slots=True)
class Row:
    """A format at one length. raw_bytes: the same tokens uncompressed, in the model's dtype, as `ratio` is beside."""

    kv_format: str
    num_tokens: int
    total_bytes: int
    compressed_bytes: int
    exact_bytes: int
    raw_bytes: int
    token_bytes: float  # of one more token
    tokens_per_gib: int

    @property
    def ratio(self) -> float:
        return self.raw_bytes / self.total_bytes


def parse_wanted(formats: str, lengths: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Formats and lengths as the options spell them, the lengths rising. Raises UsageError."""
    from turboserve.cli.bench_kernels import parse_lengths

    try:
        names = tuple(dict.fromkeys(parse_format_name(part) for part in formats.split(",")))
    except UnsupportedFormatError as exc:
        raise UsageError(f"--formats {formats}: {exc}") from exc
    try:
        tokens = tuple(sorted(set(parse_lengths(lengths.split(",")))))
    except StartupError as exc:
        raise UsageError(f"--lengths: {exc}") from exc
    if tokens[0] < MIN_LENGTH:
        raise UsageError(f"--lengths {lengths}: expected {MIN_LENGTH} tokens or more")
    return names, tokens


def run(settings: Settings, formats: tuple[str, ...], lengths: tuple[int, ...], json_file: Path | None) -> None:
    """Measure and print. Raises UsageError for a context too short or a file's folder, StartupError for the model."""
    if json_file is not None and not json_file.resolve().parent.is_dir():
        raise UsageError(f"--json {json_file}: there is no folder {json_file.parent}")
    load_backend()
    from turboserve.engine.loading import load
    from turboserve.machine_memory import detect_memory

    bars = Bars(sys.stderr)
    loaded = load(settings, bars, detect_memory())
    if lengths[-1] > loaded.max_context:
        raise UsageError(f"--lengths {lengths[-1]}: this model has a context of {loaded.max_context} tokens")
    rows = list(measure(loaded, settings, formats, lengths, bars))
    print("\n".join(table(loaded, rows)))
    if json_file is not None:
        try:
            json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
        except OSError as exc:
            raise StartupError(f"--json {json_file}: {exc.strerror or exc}") from exc


def measure(
    loaded: LoadedModel, settings: Settings, formats: tuple[str, ...], lengths: tuple[int, ...], bars: Bars
) -> Iterator[Row]:
    """A row per format and length. Raises StartupError for a format that the model cannot have."""
    from turboquant_kv.cache.calibration import calibration_for
    from turboserve.engine.served_formats import ServedFormats

    def calibrate() -> Any:
        with bars.step("measuring key and value means"):
            cache_dir = settings.cache_dir.expanduser()
            return calibration_for(loaded.model, loaded.tokenizer, cache_dir, loaded.weights_fingerprint)

    served = ServedFormats(loaded.model, None, calibrate)
    token_ids = _token_ids(loaded, lengths[-1])
    for name in formats:
        with bars.step(f"reading {lengths[-1]:,} tokens as {name}"):
            yield from _measure_one(loaded, served, name, token_ids, lengths)


def _measure_one(
    loaded: LoadedModel, served: ServedFormats, name: str, token_ids: list[int], lengths: tuple[int, ...]
) -> Iterator[Row]:
    import mlx.core as mx

    try:
        runtime = served.runtime(name)
    except KVFormatError as exc:
        raise StartupError(f"{exc.message}: leave {name} out of --formats") from exc
    caches, num_read = runtime.make_cache(), 0
    try:
        for length in lengths:
            while num_read < length:
                chunk = token_ids[num_read : min(length, num_read + CHUNK_TOKENS)]
                mx.eval(loaded.model(mx.array(chunk)[None], cache=caches)[:, -1])
                runtime.evaluate(caches)
                num_read += len(chunk)
            held = runtime.measure(caches)
            yield Row(
                *(name, length, held.total, held.compressed, held.exact, held.raw_equivalent),
                *(runtime.token_bytes, int((1 << 30) / runtime.token_bytes)),
            )
    finally:
        runtime.release(caches)
        served.trim(1 << 62)


def _token_ids(loaded: LoadedModel, num_tokens: int) -> list[int]:
    """Of a held-out text, from its beginning again where it is too short."""
    from turboserve.engine.loading import held_out_text

    ids = [int(i) for i in loaded.tokenizer.encode(held_out_text(), add_special_tokens=False)]
    return (ids * (1 + num_tokens // len(ids)))[:num_tokens]


def table(loaded: LoadedModel, rows: list[Row]) -> list[str]:
    """Lines: each format's bytes at each length, and what one more token takes."""
    lengths = sorted({row.num_tokens for row in rows})
    head = f"{'format':<8}" + "".join(f"{f'{n:,} tokens':>22}" for n in lengths) + f"{'B/token':>10}{'tokens/GiB':>14}"
    beside = uncompressed_in([loaded.dtype])
    lines = [f"{loaded.model_id}: bytes held, and how many times smaller that is than {beside} (raw)", head]
    for name in dict.fromkeys(row.kv_format for row in rows):
        own = [row for row in rows if row.kv_format == name]
        cells = "".join(f"{amount(row.total_bytes):>14} {f'{row.ratio:.2f}x':>7}" for row in own)
        lines.append(f"{name:<8}{cells}{own[-1].token_bytes:>10,.0f}{own[-1].tokens_per_gib:>14,}")
    if PLAIN_FORMAT not in {row.kv_format for row in rows}:
        raw = "".join(f"{amount(row.raw_bytes):>14} {'':>7}" for row in rows[: len(lengths)])
        lines.append(f"{'raw':<8}{raw}")
    return lines
