"""Lets clang judge a kernel's types and address spaces, which g++ does not know. Needs the libclang package.

Owns the call of clang's parser. Metal's compiler is a clang, so this also catches where g++ is laxer. Runs nothing.
"""

from functools import cache
from importlib.metadata import version

from clang import cindex
from tests.metal.emulator.build import SHIM, cache_folder, content_key, expanded_text
from tests.metal.emulator.errors import MetalCompileError
from tests.metal.emulator.rewrite import rewrite
from tests.metal.emulator.signature import KernelText, template_arguments

_ARGUMENTS = [
    "-std=c++17", "-x", "c++", "--target=x86_64-linux-gnu", "-nostdinc", "-fsyntax-only", "-w", "-ferror-limit=5",
    "-fsigned-char", "-I", str(SHIM),
]  # fmt: skip


@cache
def check_types(kernel: KernelText) -> None:
    """Raises MetalCompileError with clang's errors, such as a threadgroup pointer given for a device one.

    What clang took once is remembered beside the libraries.
    """
    accepted = cache_folder() / f"{content_key(kernel, version('libclang'))}.accepted"
    if accepted.exists():
        return
    text = '#include "clang_shim.h"\n' + rewrite(kernel.name, expanded_text(kernel, cache_folder()), keep_spaces=True)
    if kernel.template:
        instance = kernel.function_name() + template_arguments(kernel.template)
        text += f'\n#line 1 "entry"\ntemplate decltype({instance}) {instance};\n'
    unit = cindex.Index.create().parse("kernel.cpp", args=_ARGUMENTS, unsaved_files=[("kernel.cpp", text)])
    errors = [one for one in unit.diagnostics if one.severity >= cindex.Diagnostic.Error]
    if errors:
        raise MetalCompileError(kernel.name, "\n".join(one.format() for one in errors))
    accepted.touch()
