"""What a launch under the emulator can raise.

MetalError
├── MetalCompileError     the text is no valid kernel
├── MetalLimitError       the launch asks for more than any Apple GPU gives
└── MetalExecutionError   a thread did something that is undefined on the GPU
"""


class MetalError(Exception):
    """Any failure of a kernel under the emulator; `kernel` is the name given to `metal_kernel`."""

    def __init__(self, kernel: str, message: str) -> None:
        super().__init__(f"{kernel}: {message}")
        self.kernel = kernel


class MetalCompileError(MetalError):
    """The compiler's message, with line numbers of `header` or `source`."""


class MetalLimitError(MetalError):
    """Too much threadgroup memory or too many threads."""


class MetalExecutionError(MetalError):
    """`kind` is a name from the package's docstring."""

    def __init__(self, kernel: str, kind: str, message: str) -> None:
        super().__init__(kernel, f"{kind}: {message}")
        self.kind = kind
