"""Which backend `auto` takes on a CPU, and what it says when the kernels are missing."""

from __future__ import annotations

import logging
import sys
from types import ModuleType

import pytest

from turboquant_kv.backends import choice as backends
from turboquant_kv.backends.choice import choose_backend
from turboquant_kv.backends.native import backend as native
from turboquant_kv.codec.format import UnsupportedFormatError


def test_auto_takes_the_native_kernels() -> None:
    assert choose_backend().name.startswith("cpu-native/")


def test_missing_kernels_are_reported_once_and_by_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "load_kernels", lambda: (None, "no such module"))
    backends._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        names = [choose_backend().name for _ in range(3)]
    assert names == ["cpu-numpy (native kernels missing)"] * 3
    (record,) = caplog.records
    assert "no such module" in record.getMessage()
    assert choose_backend("cpu-numpy").name == "cpu-numpy"
    with pytest.raises(UnsupportedFormatError, match="no such module"):
        choose_backend("cpu-native")


def test_kernels_of_older_sources_count_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a checkout that was updated and not installed again."""
    older = ModuleType("_kernels")
    older.Store = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "turboquant_kv.native._kernels", older)
    module, reason = native.load_kernels.__wrapped__()
    assert module is None and "LinearWeights" in reason and "install again" in reason


def test_kernels_for_another_cpu_alone_count_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a folder built for one machine is looked at by an older one."""
    foreign = ModuleType("_kernels")
    foreign.Store = foreign.LinearWeights = foreign.DecoderBlock = foreign.DecoderModel = object  # type: ignore[attr-defined]
    foreign.set_blas = print  # type: ignore[attr-defined]
    foreign.isa_levels = list  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "turboquant_kv.native._kernels", foreign)
    module, reason = native.load_kernels.__wrapped__()
    assert module is None and "another CPU" in reason and "install again" in reason
