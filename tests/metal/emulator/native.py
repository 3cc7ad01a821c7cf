"""The structs of shim/runtime.h as ctypes sees them. Owns their layout, which must match field by field."""

import ctypes
from collections.abc import Sequence

import numpy as np

_SPACE_DEVICE, _SPACE_CONSTANT = 0, 2


class Buffer(ctypes.Structure):
    """One buffer of a launch; the array must outlive it, which `keep` sees to."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("num_bytes", ctypes.c_uint64),
        ("space", ctypes.c_int32),
        ("writable", ctypes.c_int32),
        ("initialised", ctypes.c_int32),
        ("atomic", ctypes.c_int32),
    )

    keep: np.ndarray

    @classmethod
    def reading(cls, name: str, array: np.ndarray, constant: bool) -> "Buffer":
        space = _SPACE_CONSTANT if constant else _SPACE_DEVICE
        made = cls(array.ctypes.data, name.encode(), array.nbytes, space, 0, 1, 0)
        made.keep = array
        return made

    @classmethod
    def writing(cls, name: str, array: np.ndarray, initialised: bool) -> "Buffer":
        made = cls(array.ctypes.data, name.encode(), array.nbytes, _SPACE_DEVICE, 1, int(initialised), 0)
        made.keep = array
        return made


class Launch(ctypes.Structure):
    """What emu_run reads."""

    _fields_ = (
        ("buffers", ctypes.POINTER(Buffer)),
        ("num_buffers", ctypes.c_uint32),
        ("grid", ctypes.c_uint32 * 3),
        ("group", ctypes.c_uint32 * 3),
        ("stack_bytes", ctypes.c_uint32),
        ("seconds", ctypes.c_uint32),
        ("reverse", ctypes.c_uint32),
    )

    keep: Sequence[Buffer]

    @classmethod
    def of(
        cls, buffers: Sequence[Buffer], grid: Sequence[int], threadgroup: Sequence[int], stack_bytes: int
    ) -> "Launch":
        """MLX dispatches threadgroups no larger than the grid."""
        group = [min(g, t) for g, t in zip(grid, threadgroup, strict=True)]
        made = cls((Buffer * len(buffers))(*buffers), len(buffers), tuple(grid), tuple(group), stack_bytes)
        made.keep = buffers
        return made


class Counts(ctypes.Structure):
    """Indices of the arrays: device, threadgroup, constant."""

    _fields_ = (
        ("reads", ctypes.c_uint64 * 3),
        ("read_bytes", ctypes.c_uint64 * 3),
        ("writes", ctypes.c_uint64 * 3),
        ("write_bytes", ctypes.c_uint64 * 3),
        *(
            (name, ctypes.c_uint64)
            for name in (
                "unique_read_bytes",
                "atomics",
                "simd_ops",
                "matrix_ops",
                "barriers",
                "threadgroup_bytes",
                "local_bytes",
            )
        ),
    )


class Result(ctypes.Structure):
    """What emu_run writes."""

    _fields_ = (
        ("counts", Counts),
        ("code_offset", ctypes.c_uint64),
        ("kind", ctypes.c_char * 64),
        ("message", ctypes.c_char * 960),
    )
