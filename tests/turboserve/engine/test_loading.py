"""Loading models: the embedded one, broken folders, the hub's refusals, expanded weights."""

from __future__ import annotations

import errno
import json
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from huggingface_hub import errors as hub
from mlx_lm.models import qwen2
from tests.turboquant_kv import odd_models
from tests.turboserve.engine.fakes import make_parts, random_model

from turboquant_kv.backends.mlx_ops.backend import MlxBackend
from turboquant_kv.cache import runtime
from turboquant_kv.cache.backend_choice import Chosen
from turboquant_kv.cache.protocol import AttendingCache
from turboquant_kv.cache.trial import Case, Timing, Verdict
from turboquant_kv.codec.format import KVFormat
from turboserve.cache.sizes import peak_bytes
from turboserve.engine import adapters, loading, weights
from turboserve.engine.distributed.ranks import ALONE
from turboserve.engine.loading import build_parts, load, max_context
from turboserve.engine.memory_plan import memory_plan
from turboserve.engine.model_config import read_config
from turboserve.engine.model_folder import EMBEDDED_DIR, EMBEDDED_MODEL_ID, model_id_for, resolve_folder
from turboserve.engine.snapshot import take_snapshot
from turboserve.errors import StartupError
from turboserve.machine_memory import MemoryInfo, detect_memory
from turboserve.messages import KernelTrial
from turboserve.settings import Settings
from turboserve.weight_sizes import model_bytes

PLENTY = MemoryInfo(1 << 40, 1 << 40)


def quiet(line: str) -> None:
    """Progress that nobody reads."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder with everything but usable weights."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED_DIR / name, tmp_path / name)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"nothing": mx.zeros(1)})
    return tmp_path


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def startup_error(model: str | Path) -> str:
    with pytest.raises(StartupError) as caught:
        load(Settings(model=str(model)), quiet, PLENTY)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_embedded_model_loads_as_stored_on_a_cpu(tmp_path: Path) -> None:
    lines: list[str] = []
    parts = build_parts(Settings(cache_dir=tmp_path, kv_budget="64MiB"), lines.append)
    loaded = parts.loaded
    assert loaded.model_id == EMBEDDED_MODEL_ID and loaded.max_context == 16384 and 8185 in loaded.eos_ids
    if mx.default_device() == mx.cpu:
        assert loaded.dtype == "float32" and any("multiplied as stored: 57 of 8-bit" in line for line in lines)
        assert model_bytes(EMBEDDED_DIR) * 0.95 < loaded.weights_bytes < model_bytes(EMBEDDED_DIR) * 1.05
    assert parts.memory.budget_bytes == 64 << 20 and parts.runtime.layers_compressed == 8
    assert any("compressed as 4t/3t" in line for line in lines)
    foretold, found = (_tokens(lines, pattern) for pattern in (r"about ([\d,]+) tokens as 4t/3t", r"holds +([\d,]+) "))
    assert abs(foretold - found) <= 0.01 * found, "what is told before loading is what it is"
    assert next(i for i, line in enumerate(lines) if "will fit" in line) < lines.index(f"loading {EMBEDDED_MODEL_ID}")


def _tokens(lines: list[str], pattern: str) -> int:
    match = re.search(pattern, "\n".join(lines))
    assert match is not None, lines
    return int(match[1].replace(",", ""))


def test_a_trial_of_gpu_kernels_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a start-up line, in the statistics' details and, with its figures, to the metrics page."""
    verdict = Verdict("gpu-metal", "mlx-ops", "slower", error=1e-3, timings=(Timing(1024, 2e-4, 1e-4),))
    folders = []

    def chosen(name: str, cases: list[Case], folder: Path) -> Chosen:
        # kinds of layers differ by whether their keys are balanced
        assert name == "auto" and {c.num_q_heads for c in cases} == {4} and sum(c.num_layers for c in cases) == 8
        folders.append(folder)
        return Chosen(MlxBackend(), verdict)

    monkeypatch.setattr(runtime, "choose", chosen)
    lines: list[str] = []
    parts = build_parts(Settings(cache_dir=tmp_path, kv_budget="64MiB"), lines.append)
    assert folders == [tmp_path]
    (line,) = [line for line in lines if "KV kernels" in line]
    assert "mlx-ops instead of gpu-metal: it is slower here" in line and "200 us against 100 at 1,024 tokens" in line
    stats = take_snapshot(parts, num_running=0, num_waiting=0, scratch_bytes=0, now_s=0.0, more_details={})
    assert stats.kv_backend == "mlx-ops" and stats.details["kv_kernels"] in line
    assert stats.kernel_trial == KernelTrial(
        "gpu-metal", "mlx-ops", "slower", {("gpu-metal", 1024): 2e-4, ("mlx-ops", 1024): 1e-4}
    )


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_id_for("") == EMBEDDED_MODEL_ID
    assert model_id_for("owner/name") == "owner/name"
    assert model_id_for("./some/where/my-model/") == "my-model"
    assert model_id_for("owner/name", "mine") == "mine"
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert model_id_for("owner/name") == "name"  # a folder wins over the hub


def test_missing_and_incomplete_folders_are_named(tmp_path: Path) -> None:
    assert "no folder" in startup_error(tmp_path / "absent")
    assert "no folder" in startup_error("a/b/c/d")
    assert "config.json" in startup_error(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "model*.safetensors" in startup_error(tmp_path)
    assert "is a file" in startup_error(tmp_path / "config.json")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": 3}', "\xff"])
def test_a_broken_config_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in startup_error(folder)


def test_a_models_own_code_is_never_run(folder: Path) -> None:
    edit_config(folder, model_file="evil.py")
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    assert "never run" in startup_error(folder)


def test_an_unsupported_type_is_named(folder: Path) -> None:
    edit_config(folder, model_type="not_a_real_type")
    assert "not_a_real_type" in startup_error(folder)


def test_weights_that_do_not_match_are_reported(folder: Path) -> None:
    assert "cannot be loaded" in startup_error(folder)
    (folder / "model.safetensors").write_bytes(b"garbage")
    assert "damaged" in startup_error(folder)


def test_too_little_memory_is_reported(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="memory"):
        load(Settings(), quiet, MemoryInfo(1 << 20, 1 << 20))


class FullDisk(OSError):
    """As the system tells it."""

    errno = errno.ENOSPC


def hub_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "said the hub\nin two lines")
    return error


@pytest.mark.parametrize(
    ("kind", "cure"),
    [
        (hub.GatedRepoError, "HF_TOKEN"),
        (hub.RepositoryNotFoundError, "check the spelling"),
        (hub.LocalEntryNotFoundError, "internet"),
        (hub.OfflineModeIsEnabled, "internet"),
        (ConnectionError, "internet"),
        (FullDisk, "turboserve rm"),
    ],
)
def test_the_hubs_refusals_name_the_cure(monkeypatch: pytest.MonkeyPatch, kind: type[Exception], cure: str) -> None:
    def refuse(*args: object, **options: object) -> str:
        assert "*.py" not in options["allow_patterns"]  # type: ignore[operator]
        raise hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    message = startup_error("owner/name")
    assert cure in message and "owner/name" in message


def test_a_downloaded_model_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(EMBEDDED_DIR))
    assert resolve_folder("owner/name") == EMBEDDED_DIR
    assert read_config(EMBEDDED_DIR)["model_type"] == "qwen2"


@pytest.mark.parametrize("kv_format", ["4/4", "auto"])
def test_a_model_that_cannot_be_compressed_is_one_plain_line(
    kv_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it does and what to do, each once."""

    def refusal(model: Any) -> str:
        loaded = make_parts(model).loaded
        with pytest.raises(StartupError) as caught:
            loading._serve_formats(Settings(kv_format=kv_format, cache_dir=tmp_path), loaded, quiet)
        message = str(caught.value)
        assert message.endswith(". Use --kv-format f16.") and message.count("f16") == 1, message
        assert not [word for word in ("Error", "latent", "<", "\n", "object") if word in message], message
        return message

    assert "asks its KV cache for keys_and_values" in refusal(odd_models.reusing())
    model, whole = random_model(1), qwen2.Attention.__call__

    def attends_to_others(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> Any:
        return whole(self, x, mask, cache) + (x if isinstance(cache, AttendingCache) else 0)

    with monkeypatch.context() as patch:
        patch.setattr(qwen2.Attention, "__call__", attends_to_others)
        assert "does not attend over" in refusal(model)


@pytest.mark.parametrize("module", [loading, adapters])
def test_what_an_error_says_fits_into_a_sentence(module: Any) -> None:
    assert module._one_line(ValueError("It is in use:\n  choose another.")) == "It is in use: choose another"
    assert module._one_line(ValueError("no end. " + "x" * 999)).startswith("no end. xx")
    assert module._one_line(ValueError(".")) == module._one_line(ValueError()) == "ValueError"


def test_a_store_in_use_is_refused_in_one_sentence(tmp_path: Path) -> None:
    loaded = load(Settings(), quiet, PLENTY)
    settings = Settings(cache_dir=tmp_path / "cache", kv_store_dir=tmp_path / "store")
    formats = loading._serve_formats(settings, loaded, quiet)
    store = loading._open_store(settings, loaded, formats, quiet, ALONE)
    assert store is not None
    try:
        with pytest.raises(StartupError, match=r"in use by process \d+: .* --kv-store-dir") as caught:
            loading._open_store(settings, loaded, formats, quiet, ALONE)
        assert ".:" not in str(caught.value)
    finally:
        store.close()


def test_context_limits() -> None:
    assert max_context({"max_position_embeddings": 1000}, 0) == 1000
    assert max_context({"max_position_embeddings": 1000}, 600) == 600
    assert max_context({"max_position_embeddings": 1000}, 6000) == 1000
    assert max_context({"text_config": {"max_position_embeddings": 70}}, 0) == 70
    assert max_context({}, 9000) == 9000


def test_expanding_quantised_weights_keeps_what_they_mean() -> None:
    model = random_model(3)
    nn.quantize(model, group_size=64, bits=8)  # type: ignore[attr-defined]  # its stubs leave it out
    tokens = mx.array([[1, 2, 3, 4]])
    before = np.array(model(tokens))
    expected_bytes = weights.expanded_bytes(model)
    expanded = weights.expand(model)
    # Same numbers, summed in another order: float32 rounding only.
    assert np.allclose(np.array(expanded(tokens)), before, atol=1e-3 * np.abs(before).max())
    assert weights.parameter_bytes(expanded) == expected_bytes
    assert weights.activation_dtype(expanded) == "float32"


def test_when_weights_are_expanded() -> None:
    assert weights.should_expand("auto", on_cpu=True, needed_bytes=60, available_bytes=100)
    assert not weights.should_expand("auto", on_cpu=True, needed_bytes=61, available_bytes=100)
    assert not weights.should_expand("auto", on_cpu=False, needed_bytes=1, available_bytes=100)
    assert weights.should_expand("always", on_cpu=False, needed_bytes=1000, available_bytes=1)
    assert not weights.should_expand("never", on_cpu=True, needed_bytes=1, available_bytes=100)


def test_fingerprints_tell_one_flipped_bit(folder: Path) -> None:
    before = weights.fingerprint(folder, "float32")
    assert before == weights.fingerprint(folder, "float32") != weights.fingerprint(folder, "bfloat16")
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert weights.fingerprint(folder, "float32") != before


def test_the_memory_plan_adds_up(model: Any) -> None:
    fmt = KVFormat(page_tokens=16, sink_tokens=16, centred=False)
    parts = make_parts(model, fmt=fmt)
    budget = 10 << 20
    text = "\n".join(memory_plan(parts.loaded, parts.runtime, budget))
    raw_tokens = int(budget / parts.runtime.token_raw_bytes)
    tokens = int(text.split("holds")[1].split()[0].replace(",", ""))
    assert "10 MiB" in text and f"{raw_tokens:,} uncompressed" in text
    assert peak_bytes(parts.runtime, tokens) <= budget < peak_bytes(parts.runtime, tokens + 1)
    assert "uncompressed" in memory_plan(parts.loaded, make_parts(model).runtime, budget)[-1]
    assert detect_memory().total_bytes > 0


def test_end_tokens_come_from_all_files(tmp_path: Path) -> None:
    """mlx-lm lets one file replace the other's."""
    folder = shutil.copytree(EMBEDDED_DIR, tmp_path / "model")
    edit_config(folder, eos_token_id=[11, 12])
    (folder / "generation_config.json").write_text('{"eos_token_id": 13}')
    assert load(Settings(model=str(folder)), quiet, PLENTY).eos_ids == {8185, 11, 12, 13}
