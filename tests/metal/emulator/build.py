"""From a kernel's text to a loaded library, through g++.

Owns the C++ around the rewritten kernel, the compiler's flags, and the cache of libraries (by content, in the temporary
folder or in METAL_EMULATOR_CACHE). Leaves out what the text says (`signature`) and running it (`launch`).
"""

import ctypes
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.metal.emulator.counting import Operations, instrument, total
from tests.metal.emulator.errors import MetalCompileError
from tests.metal.emulator.rewrite import rewrite
from tests.metal.emulator.signature import KernelText, template_arguments

SHIM = Path(__file__).parent / "shim"
# Headers that a kernel may include; their contents are in the shim.
METAL_HEADERS = (
    "metal_stdlib",
    "metal_math",
    "metal_simdgroup",
    "metal_simdgroup_matrix",
    "metal_atomic",
    "metal_common",
    "metal_integer",
    "metal_limits",
    "metal_relational",
    "metal_compute",
    "metal_type_traits",
    "metal_numeric",
)
_COMMON = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fsigned-char"]
_KERNEL = [
    *_COMMON,
    "-O1",  # at -Og some reads of halves are not watched
    "-g1",
    "-w",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-ftrivial-auto-var-init=pattern",
    "-fno-stack-protector",
    "-fmax-errors=5",
]
_COUNTED = [
    "-O3",
    "-fno-tree-vectorize",
    # Short loops of constant length are unrolled as a GPU's compiler does, however much they hold.
    "--param=max-completely-peel-times=64",
    "--param=max-completely-peeled-insns=20000",
    "--param=max-peel-branches=1000",
    "-mfma",
    "-ffp-contract=fast",
    "-fsanitize-coverage=trace-pc",
    "-DEMU_COUNT=1",
]
_UNROLL = re.compile(r"^\s*#pragma unroll(?:[ (]*(\d+)\)?)?\s*$", re.MULTILINE)
# Its calls are answered by shim/memory.cpp; no sanitizer library is linked.
_WATCHED = [
    "-fsanitize=thread",
    "-fsanitize=bounds,shift-exponent,integer-divide-by-zero,alignment",
    "-fno-sanitize-recover=all",
]


@dataclass(frozen=True)
class Options:
    """`watched`: check every memory access. `count_ops`: count arithmetic; excludes watching."""

    watched: bool = True
    count_ops: bool = False


def cpp_text(kernel: KernelText, folder: Path) -> str:
    """The kernel, preprocessed and rewritten, with an entry that the runtime can call."""
    text = rewrite(kernel.name, expanded_text(kernel, folder))
    return f'#include "metal_shim.h"\n{text}\n{_entry(kernel)}'


@functools.lru_cache(maxsize=4)  # g++ and clang are given the same text, one right after the other
def expanded_text(kernel: KernelText, folder: Path) -> str:
    """Header, signature and body after the preprocessor, with line marks, without attributes in brackets."""
    signature = kernel.full_source()[len(kernel.header) :]
    signature = signature[: signature.index(") {\n") + 4]
    signature = re.sub(r"\[\[(?:kernel|buffer\(\d+\)|\w+)\]\]", "", signature)
    metal = (
        f'#line 1 "header"\n{kernel.header}\n#line 1 "signature"\n{signature}#line 1 "source"\n{kernel.source}\n'
        f'#line 1 "signature"\n}}\n'
    )
    return _preprocess(kernel.name, metal, folder)


def _preprocess(name: str, text: str, folder: Path) -> str:
    """Expands macros first, because a kernel may write `threadgroup` and the like through macros of its own."""
    headers = folder / "headers"
    headers.mkdir(exist_ok=True)
    for header in METAL_HEADERS:
        (headers / header).touch()
    defined = ["-D__METAL_VERSION__=320", "-D__METAL__=1", "-D__METAL_MACOS__=1", "-D__HAVE_BFLOAT__=1"]
    command = ["g++", "-E", "-undef", "-nostdinc", "-std=c++20", "-x", "c++", "-I", str(headers), *defined, "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MetalCompileError(name, done.stderr.strip())
    return done.stdout


def _entry(kernel: KernelText) -> str:
    given = []
    for index, parameter in enumerate(kernel.parameters()):
        kind = re.sub(r"\b(?:device|constant)\b ?", "", parameter.rsplit(" ", 1)[0])
        reference = kind.endswith("&")
        given.append(f"{'*' if reference else ''}({kind.rstrip('&*')}*)buffers[{index}]")
    given += [f"emu_{name}(*place)" for name in kernel.attributes()]
    instance = kernel.function_name() + (template_arguments(kernel.template) if kernel.template else "")
    return (
        '#line 1 "entry"\nextern "C" EMU_HIDDEN void emu_kernel(void** buffers, const emu_place* place) {\n'
        f"    {instance}({', '.join(given)});\n}}\n"
    )


@functools.cache
def cache_folder() -> Path:
    chosen = os.environ.get("METAL_EMULATOR_CACHE")
    folder = Path(chosen) if chosen else Path(tempfile.gettempdir()) / f"metal-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def content_key(kernel: KernelText, *what: object) -> str:
    """Names what is made from a kernel's text, this emulator and `what` else, before any of it is made again."""
    return hashlib.sha256(repr((kernel, what, _tool_key())).encode()).hexdigest()[:24]


@functools.cache
def _tool_key() -> str:
    """Whatever else a library depends on: the emulator's own text, the compiler, the processor's instruction sets."""
    if shutil.which("g++") is None:
        raise FileNotFoundError("the Metal emulator needs g++")
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    own = [path.read_text() for path in sorted(SHIM.parent.rglob("*")) if path.suffix in (".py", ".h", ".cpp")]
    return repr((version, own, _machine_flags()))


@functools.cache
def _machine_flags() -> tuple[str, ...]:
    """float16 conversions in hardware, where there are any: without them they dominate the time."""
    cpuinfo = Path("/proc/cpuinfo")
    has_f16c = cpuinfo.exists() and re.search(r"\bf16c\b", cpuinfo.read_text()) is not None
    return ("-mf16c",) if has_f16c else ()


@functools.cache
def load(kernel: KernelText, options: Options) -> ctypes.CDLL:
    """The library for a kernel, from the cache or compiled now; raises MetalCompileError."""
    library = library_path(kernel, options)
    if not library.exists():
        _compile(kernel, options, library)
    return ctypes.CDLL(str(library))


@functools.cache
def library_path(kernel: KernelText, options: Options) -> Path:
    return cache_folder() / f"{content_key(kernel, options)}.so"


def _compile(kernel: KernelText, options: Options, library: Path) -> None:
    text = cpp_text(kernel, cache_folder())
    if options.count_ops:
        text = _UNROLL.sub(lambda found: f"#pragma GCC unroll {found[1] or 256}", text)
    runtime = _runtime_objects()
    made = library.with_suffix(f".{os.getpid()}.o")
    source = made.with_suffix(".cpp")
    source.write_text(text)
    extra = _COUNTED if options.count_ops else _WATCHED if options.watched else []
    assembly = made.with_suffix(".s") if options.count_ops else made
    what = "-S" if options.count_ops else "-c"
    command = ["g++", *_KERNEL, *_machine_flags(), *extra, "-I", str(SHIM), what, str(source), "-o", str(assembly)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MetalCompileError(kernel.name, done.stderr.strip())
    if options.count_ops:
        text, costs = instrument(assembly.read_text())
        assembly.write_text(text)
        library.with_suffix(".json").write_text(json.dumps(costs))
        subprocess.run(["g++", "-c", str(assembly), "-o", str(made)], check=True)
    # Written under another name and renamed, so that two test processes cannot meet half a library.
    half_made = made.with_suffix(".so")
    subprocess.run(["g++", "-shared", str(made), *runtime, "-o", str(half_made)], check=True, capture_output=True)
    half_made.rename(library)
    for used_up in {source, assembly, made}:
        used_up.unlink()


@functools.cache
def _runtime_objects() -> tuple[str, ...]:
    key = hashlib.sha256(_tool_key().encode()).hexdigest()[:16]
    made = []
    for source in sorted(SHIM.glob("*.cpp")):
        target = cache_folder() / f"{source.stem}-{key}.o"
        if not target.exists():
            half_made = target.with_suffix(f".{os.getpid()}")
            command = ["g++", *_COMMON, "-O2", "-Wall", "-I", str(SHIM), "-c", str(source), "-o", str(half_made)]
            subprocess.run(command, check=True)
            half_made.rename(target)
        made.append(str(target))
    return tuple(made)


def operations(library: Path, loaded: ctypes.CDLL) -> Operations:
    """What the launches so far cost; the counters start again from nothing."""
    costs = [Operations(*cost) for cost in json.loads(library.with_suffix(".json").read_text())]
    counters = (ctypes.c_uint64 * len(costs)).in_dll(loaded, "emu_block_counts")
    passes = list(counters)
    ctypes.memset(counters, 0, ctypes.sizeof(counters))
    return total(passes, costs)


def source_place(library: Path, offset: int) -> str:
    """Where in the kernel's text an instruction comes from, such as "source:12"; "" if the tool cannot say."""
    if not offset or shutil.which("addr2line") is None:
        return ""
    command = ["addr2line", "-i", "-e", str(library), hex(offset - 1)]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    places = [line.rsplit("/", 1)[-1] for line in lines]
    return next((place for place in places if place.startswith(("source:", "header:"))), places[0] if places else "")
