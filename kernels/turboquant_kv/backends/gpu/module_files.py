"""CUDA kernels of this package kept as compiled files where MLX looks for modules.

MLX looks into its folder (MLX_PTX_CACHE_DIR) for every module before it compiles one, but of custom kernels it keeps
none, so each start would compile them again, one after the other. Here a kernel's module is written before its first
launch asks for it: the text that MLX would compile, by the same compiler (NVRTC, which MLX has loaded), under the name
that MLX gives it. That name and text are MLX's own business: where they are other ones in some version, MLX finds no
file and compiles as ever. Whatever goes wrong here has that end too.

Owns text and name of a module, and when it is made. How it is compiled and written is nvrtc.py's.
"""

from __future__ import annotations

import ctypes
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx

from turboquant_kv.backends.gpu.nvrtc import (
    FOLDER_VARIABLE,
    UTILS,
    CompilationError,
    Module,
    ModuleFiles,
    Nvrtc,
    loaded_library,
    path_in,
)

log = logging.getLogger(__name__)

LOOK_S = 0.05  # how often a process looks for modules that another one compiles

_INCLUDES = f'\n#include "{UTILS}"\n\n#include <cooperative_groups.h>\n\n'
_TYPES = {
    **{mx.float32: "float", mx.float16: "__half", mx.bfloat16: "__nv_bfloat16", mx.bool_: "bool"},
    **{mx.int8: "int8_t", mx.int16: "int16_t", mx.int32: "int32_t", mx.int64: "int64_t"},
    **{mx.uint8: "uint8_t", mx.uint16: "uint16_t", mx.uint32: "uint32_t", mx.uint64: "uint64_t"},
}
_HASH_SEED = 0xC70F6907  # of std::hash in GNU's library


def module_of(
    name: str,
    input_names: Sequence[str],
    inputs: Sequence[mx.array],
    output_names: Sequence[str],
    output_dtypes: Sequence[mx.Dtype],
    header: str,
    source: str,
) -> Module:
    """The module of a kernel that mx.fast.cuda_kernel is given, for such inputs. Raises KeyError for other types."""
    function = f"custom_kernel_{name}"
    parameters: list[str] = []
    for given, array in zip(input_names, inputs, strict=True):
        parameters.append(f"const {_TYPES[array.dtype]}* {given}")
        if array.ndim:  # MLX hands over what the body names
            kinds = (("shape", "Shape"), ("strides", "Strides"), ("ndim", "int"))
            parameters += [
                f"const __grid_constant__ {kind} {given}_{what}" for what, kind in kinds if f"{given}_{what}" in source
            ]
    parameters += [f"{_TYPES[dtype]}* {given}" for given, dtype in zip(output_names, output_dtypes, strict=True)]
    listed = ",\n".join(f"    {one}" for one in parameters)
    text = (
        f"{_INCLUDES}{header}namespace mlx::core::cu {{\n\nnamespace cg = cooperative_groups;\n\n"
        f"__global__ void {function}(\n{listed}) {{\n{source}\n}}\n\n}} // namespace mlx::core::cu\n"
    )
    return Module(f"{function}_{_hash(text):x}", f"mlx::core::cu::{function}", text)


def _hash(text: str) -> int:
    """std::hash of a string in GNU's library, with which MLX is linked."""
    data = text.encode()
    return int(_hash_function()(data, len(data), _HASH_SEED))


@cache
def _hash_function() -> Callable[[bytes, int, int], int]:
    library = ctypes.CDLL("libstdc++.so.6")
    function = library._ZSt11_Hash_bytesPKvmm
    function.restype, function.argtypes = ctypes.c_size_t, [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t]
    found: Callable[[bytes, int, int], int] = function
    return found


def keeping(factory: Callable[..., Any], take: Callable[[Module], object]) -> Callable[..., Any]:
    """Kernels of a factory like mx.fast.cuda_kernel, each handed to `take` as a module before its first launch.

    What `take` raises is logged: the kernel is then compiled by MLX.
    """

    def made(**text: Any) -> Any:
        kernel = factory(**text)
        is_new = True

        def launch(**given: Any) -> Any:
            nonlocal is_new
            if is_new:  # a kernel has one name, and so one module, per types of its inputs
                is_new = False
                _take(take, text, given)
            return kernel(**given)

        return launch

    return made


def _take(take: Callable[[Module], object], text: dict[str, Any], given: dict[str, Any]) -> None:
    names = {key: text[key] for key in ("name", "input_names", "output_names", "header", "source")}
    try:
        take(module_of(**names, inputs=given["inputs"], output_dtypes=given["output_dtypes"]))
    except Exception as exc:  # another version of MLX or of the compiler, a full disk: MLX compiles it itself
        log.info("%s is compiled by MLX and not kept: %s", text["name"], exc)


def stored_kernels(factory: Callable[..., Any]) -> Callable[..., Any]:
    """The factory of CUDA kernels with their modules kept in MLX's folder, where one is set and there is a compiler."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return factory
    try:
        info = mx.device_info()
        compiler = mlx_compiler((int(info["compute_capability_major"]), int(info["compute_capability_minor"])))
    except (KeyError, CompilationError, OSError) as exc:
        log.info("compiled kernels of this package are not kept: %s", exc)
        return factory
    files = ModuleFiles([Path(folder)], compiler)

    def take(module: Module) -> None:
        if _awaited is not None:
            _awaited.wait(path_in(Path(folder), module.name))
        files.make(module)

    return keeping(factory, take)


class Awaited:
    """Modules that another process compiles, until a file says that it has ended."""

    def __init__(self, ended: Path, most_s: float) -> None:
        self._ended, self._end_s = ended, time.monotonic() + most_s

    def wait(self, path: Path) -> None:
        """Until the module is there, or will not come."""
        while not (path.exists() or self._ended.exists()) and time.monotonic() < self._end_s:
            time.sleep(LOOK_S)


_awaited: Awaited | None = None


def await_modules(ended: Path, most_s: float) -> None:
    """Compile no kernel in this process while another one is at it: see Awaited."""
    global _awaited
    _awaited = Awaited(ended, most_s)


def mlx_compiler(capability: tuple[int, int]) -> Nvrtc:
    """As MLX uses it. Raises CompilationError where there is none."""
    return Nvrtc(capability, loaded_library(), list(_includes()))


def _includes() -> Iterator[Path]:
    """Folders in which MLX's compiler looks for headers: its own, and the CUDA runtime's."""
    package = Path(metadata.distribution("mlx").locate_file("mlx")).resolve()  # type: ignore[arg-type]
    site = package.parent
    runtime = [site / "nvidia" / name / "include" for name in ("cuda_runtime", "cu13")]
    toolkit = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    own = [package / "include", package / "include" / "cccl"]
    yield from (path for path in own if path.is_dir())
    yield from [path for path in (*runtime, Path(toolkit) / "include") if path.is_dir()][:1]
