"""Compiled modules of our CUDA kernels: their text and name as MLX makes them, and the files that MLX finds."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from tests.turboquant_kv import small_models
from tests.turboquant_kv.stand_in_nvrtc import stand_in

from turboquant_kv.backends.gpu.backend import GpuBackend
from turboquant_kv.backends.gpu.device import HOPPER
from turboquant_kv.backends.gpu.flash import FlashKernels
from turboquant_kv.backends.gpu.launch import DecodeKernels
from turboquant_kv.backends.gpu.module_files import Awaited, keeping, module_of, stored_kernels
from turboquant_kv.backends.gpu.nvrtc import (
    CompilationError,
    Module,
    ModuleFiles,
    Nvrtc,
    compile_in_processes,
    path_in,
    remove_damaged,
)
from turboquant_kv.backends.gpu.page_kernels import PageKernels
from turboquant_kv.cache.calibration import calibrate
from turboquant_kv.cache.probe import probe_layers
from turboquant_kv.cache.rehearsal import assumed_cases, modules_for
from turboquant_kv.cache.runtime import KVRuntime
from turboquant_kv.cache.trial import judge
from turboquant_kv.codec.format import KVFormat

TEXT: dict[str, Any] = {
    "name": "sum",
    "input_names": ["a", "b"],
    "output_names": ["out"],
    "header": "// header\n",
    "source": "out[0] = a[a_strides[0]] + b[0];",
}
# As mlx/backend/cuda/custom_kernel.cpp of MLX 0.32 puts it together.
SOURCE = """
#include "mlx/backend/cuda/device/utils.cuh"

#include <cooperative_groups.h>

// header
namespace mlx::core::cu {

namespace cg = cooperative_groups;

__global__ void custom_kernel_sum(
    const __half* a,
    const __grid_constant__ Strides a_strides,
    const int32_t* b,
    float* out) {
out[0] = a[a_strides[0]] + b[0];
}

} // namespace mlx::core::cu
"""
HASH = 0x22EDF72FB6A46FA1  # std::hash of SOURCE, by g++ on x86-64


def module(**changed: Any) -> Module:
    inputs = [mx.zeros((2, 2), mx.float16), mx.array(3, dtype=mx.int32)]
    return module_of(**{**TEXT, "inputs": inputs, "output_dtypes": [mx.float32], **changed})


def test_a_module_has_the_text_and_the_name_that_mlx_gives_it() -> None:
    made = module()
    assert made.source == SOURCE
    assert made.kernel == "mlx::core::cu::custom_kernel_sum"
    assert made.name == f"custom_kernel_sum_{HASH:x}"


def test_a_scalar_has_no_strides_and_a_type_without_a_name_no_module() -> None:
    made = module(inputs=[mx.array(1.0), mx.array(3)])
    assert "a_strides," not in made.source
    with pytest.raises(KeyError):
        module(inputs=[mx.zeros(2, mx.complex64), mx.array(3)])


def test_long_names_become_folders_as_mlx_has_them(tmp_path: Path) -> None:
    assert path_in(tmp_path, "a" * 245) == tmp_path / f"{'a' * 245}.ptx"
    assert path_in(tmp_path, "a" * 245 + "b" * 245 + "c") == tmp_path / ("a" * 245) / ("b" * 245) / "c.ptx"


class Compiler:
    """Notes what it compiles, and what lay in a folder then."""

    def __init__(self, error: Exception | None = None) -> None:
        self.compiled: list[str] = []
        self._error = error

    def __call__(self, module: Module) -> tuple[bytes, str]:
        self.compiled.append(module.name)
        if self._error is not None:
            raise self._error
        return b"\x7fELF", f"mangled_{module.name}"


def test_files_are_what_mlx_reads_in_all_folders_and_made_once(tmp_path: Path) -> None:
    folders, compiler = [tmp_path / "a", tmp_path / "b" / "c"], Compiler()
    files, made = ModuleFiles(folders, compiler), module()
    assert files.make(made)
    for folder in folders:
        path = path_in(folder, made.name)
        assert path.read_bytes() == b"\x7fELF"
        assert path.with_suffix(".txt").read_text() == f"{made.kernel}\tmangled_{made.name}\n"
        assert path.with_suffix(".cu").read_text() == SOURCE
        assert len([*folder.iterdir()]) == 3
    assert not files.make(made)
    assert compiler.compiled == [made.name]


def test_a_text_that_does_not_compile_leaves_no_file(tmp_path: Path) -> None:
    files = ModuleFiles([tmp_path], Compiler(CompilationError("no such name")))
    with pytest.raises(CompilationError):
        files.make(module())
    assert not [*tmp_path.iterdir()]


def elf(num_bytes: int, says: int) -> bytes:
    """An ELF file of some bytes whose section headers end at `says`."""
    head = bytearray(num_bytes)
    head[:4] = b"\x7fELF"
    struct.pack_into("<QQ", head, 0x20, 64, says - 2 * 64)
    struct.pack_into("<HHHH", head, 0x36, 56, 1, 64, 2)
    return bytes(head)


def test_half_written_modules_are_removed_and_whole_ones_and_young_ones_are_not(tmp_path: Path) -> None:
    folder = tmp_path / "long"
    folder.mkdir()
    codes = {"whole": elf(400, 400), "text": b".version 8", "torn": elf(399, 400), "short": b"\x7fELF", "empty": b""}
    codes |= {"unnamed": elf(400, 400), "unsourced": elf(400, 400), "young": b""}
    for name, code in codes.items():
        (folder / f"{name}.ptx").write_bytes(code)
        (folder / f"{name}.txt").write_text("kernel\tmangled\n")
        (folder / f"{name}.cu").write_text("source")
        for path in folder.glob(f"{name}.*"):
            os.utime(path, (1000.0, 1000.0) if name != "young" else (1990.0, 1990.0))
    (folder / "unnamed.txt").unlink()
    (folder / "unsourced.cu").write_bytes(b"")
    removed = remove_damaged(tmp_path, 2000.0)
    assert sorted(removed) == [f"{name}.ptx" for name in ("empty", "short", "torn", "unnamed", "unsourced")]
    assert sorted(path.name for path in folder.glob("*.ptx")) == ["text.ptx", "whole.ptx", "young.ptx"]
    assert {path.stem for path in folder.iterdir()} == {"text", "whole", "young"}
    assert not remove_damaged(tmp_path, 2000.0)


class Factory:
    """Of kernels that note their launches."""

    def __init__(self) -> None:
        self.launched = 0

    def __call__(self, **text: Any) -> Any:
        def launch(**given: Any) -> str:
            self.launched += 1
            return "launched"

        return launch


@pytest.mark.parametrize("error", [None, CompilationError("no"), OSError("full"), KeyError("type"), ValueError("odd")])
def test_a_kernel_is_taken_before_its_first_launch_and_launched_whatever_comes_of_it(error: Exception | None) -> None:
    taken: list[tuple[str, int]] = []
    factory = Factory()

    def take(module: Module) -> None:
        taken.append((module.name, factory.launched))
        if error is not None:
            raise error

    kernel = keeping(factory, take)(**TEXT)
    assert not taken
    given = {"inputs": [mx.zeros((2, 2), mx.float16), mx.array(3, dtype=mx.int32)], "output_dtypes": [mx.float32]}
    assert [kernel(**given) for _ in range(3)] == ["launched"] * 3
    assert taken == [(module().name, 0)]


def test_without_a_folder_or_a_compiler_mlx_does_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLX_PTX_CACHE_DIR", raising=False)
    factory = Factory()
    assert stored_kernels(factory) is factory
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path))  # and no device
    assert stored_kernels(factory) is factory
    with pytest.raises(CompilationError, match="cannot be loaded"):
        Nvrtc((9, 0), tmp_path / "libnvrtc.so", [])


def test_modules_of_another_process_are_awaited_until_it_has_ended(tmp_path: Path) -> None:
    ended, path = tmp_path / "ended", tmp_path / "module.ptx"
    began_s = time.monotonic()
    Awaited(ended, 0.2).wait(path)
    assert time.monotonic() - began_s >= 0.2
    path.touch()
    Awaited(ended, 600.0).wait(path)
    path.unlink()
    ended.touch()
    Awaited(ended, 600.0).wait(path)


def test_processes_without_a_compiler_leave_modules_missing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Nowhere(Nvrtc):
        def __init__(self) -> None:
            self.capability, self.library, self.includes = (9, 0), tmp_path / "libnvrtc.so", ()

    assert compile_in_processes([module()] * 3, Nowhere(), [tmp_path], 2, 60.0) == 0
    assert "cannot be loaded" in capfd.readouterr().err
    assert not [*tmp_path.glob("*.ptx")]


@pytest.fixture(scope="module")
def nvrtc(tmp_path_factory: pytest.TempPathFactory) -> Nvrtc:
    return stand_in(tmp_path_factory.mktemp("nvrtc"))


def test_the_compiler_gets_text_header_and_options_as_mlx_gives_them(nvrtc: Nvrtc) -> None:
    made = module()
    code, kernel = nvrtc(made)
    lines = code.decode().split("\n")
    assert lines[0] == f"{made.name}.cu:" and lines[1] == "mlx/backend/cuda/device/utils.cuh"
    assert made.source.strip() in code.decode()
    told = [line for line in lines if line.startswith("--")]
    assert told == [
        "--device-as-default-execution-space",
        "--gpu-architecture=sm_90a",
        "--include-path=/include",
        "--include-path=/more",
    ]
    assert kernel == f"lowered {made.kernel}"
    older = Nvrtc((8, 6), nvrtc.library, [])
    assert b"--gpu-architecture=sm_86\n" in older(made)[0]


def test_what_the_compiler_says_of_a_text_is_told(nvrtc: Nvrtc) -> None:
    with pytest.raises(CompilationError, match=r"x.cu\(1\): error: #error as written"):
        nvrtc(module(source="#error"))


def test_processes_compile_a_share_each_into_all_folders(
    nvrtc: Nvrtc, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    modules = [module(name=f"sum{i}") for i in range(5)]
    broken = module(name="broken", source="#error")
    folders = [tmp_path / "a", tmp_path / "b"]
    assert compile_in_processes([broken, *modules], nvrtc, folders, 2, 60.0) == 5
    for folder in folders:
        assert {path.stem for path in folder.glob("*.ptx")} == {one.name for one in modules}
        assert path_in(folder, modules[4].name).read_bytes() == nvrtc(modules[4])[0]
    assert broken.name in capfd.readouterr().err


def test_a_process_that_takes_too_long_is_ended(nvrtc: Nvrtc, tmp_path: Path) -> None:
    began_s = time.monotonic()
    assert compile_in_processes([module(source="#hang")], nvrtc, [tmp_path], 1, 0.5) == 0
    assert 0.5 <= time.monotonic() - began_s < 60.0


@pytest.mark.parametrize("fmt", ["4t/3t", "4/4", "8/4"])
def test_the_list_has_all_kernels_that_a_trial_by_measured_means_launches(fmt: str) -> None:
    model, wanted = small_models.dense(), KVFormat.parse(fmt)
    model.set_dtype(mx.float16)
    layers = probe_layers(model)
    listed = modules_for(assumed_cases(model, wanted, layers), HOPPER)
    names = [one.name for one in listed]
    assert len(set(names)) == len(names)
    calibration = calibrate(model, [i * i % small_models.VOCAB for i in range(300)])
    runtime = KVRuntime(model, wanted, calibration=calibration, backend="cpu-numpy", layers=layers)
    launched: set[str] = set()
    silent = keeping(_silent, lambda module: launched.add(module.name))
    backend = GpuBackend(
        "cuda",
        DecodeKernels("cuda", silent, device=HOPPER),
        PageKernels("cuda", silent),
        FlashKernels("cuda", silent, HOPPER),
    )
    for case in runtime.cases:
        judge(case, backend, is_rehearsal=True)
    assert launched and launched <= set(names)
    assert any("prefill_hopper" in name for name in launched), "of 64 dims, Hopper has a kernel of its own"


def test_the_list_goes_on_with_steps_of_a_few_tokens() -> None:
    model, fmt = small_models.dense(), KVFormat.parse("4t/3t")
    model.set_dtype(mx.float16)
    cases = assumed_cases(model, fmt, probe_layers(model))
    first, more = modules_for(cases, HOPPER), modules_for(cases, HOPPER, range(2, 9))
    assert more[: len(first)] == first
    added = more[len(first) :]  # three tokens are a trial's; short means have kernels, and so do long ones
    assert len(added) == 2 * 6 and all("decode" in one.name for one in added)


def _silent(**text: Any) -> Any:
    def launch(*, output_shapes: Any, output_dtypes: Any, **_: Any) -> Any:
        return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]

    return launch
