"""NVIDIA's run-time compiler, and the files in which MLX looks for compiled modules. Imports nothing but Python's own.

Run as a program it compiles modules that it is told on its standard input (`compile_in_processes` asks for that): NVRTC
compiles one at a time in a process, and a process without MLX starts in no time and takes no device memory.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

FOLDER_VARIABLE = "MLX_PTX_CACHE_DIR"  # MLX's own setting
UNFINISHED_S = 60.0  # a module that is not whole after so long is one whose writer was ended
MAX_NAME_CHARS = 245  # of a file's name, to MLX; longer ones become folders
UTILS = "mlx/backend/cuda/device/utils.cuh"
# All that our kernels take from MLX's header: how strides are handed over. Its own brings in much of C++'s library,
# and compiling one of our kernels with it takes 1.4 times as long.
_STUB = b"""#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda/std/cstdint>
namespace mlx::core::cu {
template <typename T> struct TqTen { T values[10]; __device__ T operator[](int i) const { return values[i]; } };
using Shape = TqTen<int32_t>;
using Strides = TqTen<int64_t>;
}
"""


class Module(NamedTuple):
    """What MLX compiles for one kernel: the file's name without its end, the kernel's full name, and the text."""

    name: str
    kernel: str
    source: str


class Compiler(Protocol):
    """Compiles a module."""

    def __call__(self, module: Module) -> tuple[bytes, str]:
        """The device's code, and the kernel's name in it. Raises CompilationError."""
        ...


class CompilationError(RuntimeError):
    """A text that does not compile, or a compiler that cannot be used."""


def path_in(folder: Path, name: str) -> Path:
    """Where MLX looks for a module's code."""
    parts = [name[i : i + MAX_NAME_CHARS] for i in range(0, len(name), MAX_NAME_CHARS)]
    return folder.joinpath(*parts[:-1], f"{parts[-1]}.ptx")


class ModuleFiles:
    """Compiled modules in one folder, or the same in several."""

    def __init__(self, folders: Sequence[Path], compiler: Compiler) -> None:
        self.folders, self._compiler = tuple(folders), compiler

    def make(self, module: Module) -> bool:
        """Compile it unless it is in the first folder; whether it was. Raises CompilationError or OSError."""
        if path_in(self.folders[0], module.name).exists():
            return False
        code, kernel = self._compiler(module)
        for folder in self.folders:
            path = path_in(folder, module.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            # MLX reads what it finds at once: each file whole, and last the one that it looks for
            write_whole(path.with_suffix(".cu"), module.source.encode())
            write_whole(path.with_suffix(".txt"), f"{module.kernel}\t{kernel}\n".encode())
            write_whole(path, code)
        return True


def remove_damaged(folder: Path, now_s: float) -> list[str]:
    """Remove modules that a process left half written when it was ended: MLX would fail over one at every start.

    Names of those that were removed. now_s: by the clock of files; what is younger may be being written now.
    """
    removed = []
    for path in sorted(folder.rglob("*.ptx")):
        with suppress(OSError):  # another process's, meanwhile gone
            if now_s - path.stat().st_mtime > UNFINISHED_S and not _is_whole(path):
                for suffix in (".ptx", ".txt", ".cu"):
                    path.with_suffix(suffix).unlink(missing_ok=True)
                removed.append(path.name)
    return removed


def _is_whole(path: Path) -> bool:
    """Whether a module's code has the length that it says, and its other files are there. Raises OSError."""
    names, source = path.with_suffix(".txt"), path.with_suffix(".cu")
    if not (names.exists() and source.exists() and source.stat().st_size):  # the source is written last
        return False
    with path.open("rb") as file:
        head = file.read(64)
    if not head.startswith(b"\x7fELF"):
        return bool(head)  # a text
    if len(head) < 64:
        return False
    programs, sections = struct.unpack_from("<QQ", head, 0x20)
    program_bytes, num_programs, section_bytes, num_sections = struct.unpack_from("<HHHH", head, 0x36)
    ends = programs + program_bytes * num_programs, sections + section_bytes * num_sections
    return path.stat().st_size >= int(max(ends))


def write_whole(path: Path, data: bytes) -> None:
    """A file that nobody sees half written. Raises OSError."""
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=".part-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(part, path)
    except OSError:
        with suppress(OSError):
            os.unlink(part)
        raise


class Nvrtc:
    """NVIDIA's run-time compiler, with the options that MLX gives it."""

    def __init__(self, capability: tuple[int, int], library: Path, includes: Sequence[Path]) -> None:
        """includes: folders of headers. Raises CompilationError."""
        self.capability, self.library, self.includes = capability, library, tuple(includes)
        try:
            self._library = ctypes.CDLL(str(library))
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        except (OSError, AttributeError) as exc:
            raise CompilationError(f"NVRTC cannot be loaded: {exc}") from exc
        suffix = "a" if capability[0] >= 9 else ""
        options = [
            "--device-as-default-execution-space",
            f"--gpu-architecture=sm_{capability[0]}{capability[1]}{suffix}",
        ]
        options += [f"--include-path={path}" for path in includes]
        self._options = [option.encode() for option in options]

    def __call__(self, module: Module) -> tuple[bytes, str]:
        program = ctypes.c_void_p()
        headers, names = (ctypes.c_char_p * 1)(_STUB), (ctypes.c_char_p * 1)(UTILS.encode())
        source, file = module.source.encode(), f"{module.name}.cu".encode()
        self._check("nvrtcCreateProgram", ctypes.byref(program), source, file, 1, headers, names)
        try:
            self._check("nvrtcAddNameExpression", program, module.kernel.encode())
            count = len(self._options)
            options = (ctypes.c_char_p * count)(*self._options)
            if self._library.nvrtcCompileProgram(program, count, options):
                said = self._bytes(program, "ProgramLog").decode(errors="replace")
                raise CompilationError(" ".join(said.split())[:500] or "NVRTC does not say why")
            lowered = ctypes.c_char_p()
            self._check("nvrtcGetLoweredName", program, module.kernel.encode(), ctypes.byref(lowered))
            return self._bytes(program, "CUBIN"), (lowered.value or b"").decode()
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _bytes(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def _check(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._library, name)(*arguments):
            said = self._library.nvrtcGetErrorString(code)
            raise CompilationError(f"{name}: {said.decode() if said else code}")


def loaded_library() -> Path:
    """NVRTC as this process has it loaded. Raises CompilationError."""
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            if found := re.search(r"\s(/\S*/libnvrtc\.so[.\d]*)$", line):
                return Path(found[1])
    raise CompilationError("MLX has loaded no NVRTC")


def compile_in_processes(
    modules: Sequence[Module], compiler: Nvrtc, folders: Sequence[Path], num_processes: int, limit_s: float
) -> int:
    """Compile modules into all of the folders, each in one of the processes; how many there are afterwards.

    What a process does not get done, for whatever reason, is missing. Processes end with this one.
    """
    shares = [share for i in range(num_processes) if (share := modules[i::num_processes])]
    told = {
        "capability": compiler.capability,
        "library": str(compiler.library),
        "includes": [str(path) for path in compiler.includes],
        "folders": [str(path) for path in folders],
    }
    processes = []
    for share in shares:
        process = subprocess.Popen(
            [sys.executable, "-P", "-S", __file__], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        processes.append(process)
        assert process.stdin is not None
        with suppress(OSError):  # it has ended: what it was to do is missing
            process.stdin.write(json.dumps({**told, "modules": share}) + "\n")
            process.stdin.flush()
    end_s = time.monotonic() + limit_s
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end_s - time.monotonic()))
        process.kill()
        process.wait()
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.close()
    return sum(path_in(folders[0], module.name).exists() for module in modules)


def read_line() -> bytes:
    """Of the standard input, and nothing beyond it."""
    parts = [b""]
    while not parts[-1].endswith(b"\n"):
        part = os.read(0, 1 << 16)
        if not part:
            break
        parts.append(part)
    return b"".join(parts)


def end_with_parent() -> None:
    """End this process as soon as nobody holds the other end of its standard input, however that one ended."""

    def watch() -> None:
        while os.read(0, 1024):
            continue
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _main() -> None:
    told: dict[str, Any] = json.loads(read_line())
    end_with_parent()
    compiler = Nvrtc(tuple(told["capability"]), Path(told["library"]), [Path(path) for path in told["includes"]])
    files = ModuleFiles([Path(path) for path in told["folders"]], compiler)
    for module in told["modules"]:
        try:
            files.make(Module(*module))
        except (CompilationError, OSError) as exc:  # the others may do
            sys.stderr.write(f"{module[0]}: {exc}\n")


if __name__ == "__main__":
    _main()
