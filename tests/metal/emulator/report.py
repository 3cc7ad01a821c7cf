"""What one launch did: counts for the roofline model and the limits it came close to.

Owns the Report only. Counts are of the whole launch; a caller divides by its KV elements.
"""

from dataclasses import dataclass

from tests.metal.emulator.counting import Operations

MAX_THREADGROUP_BYTES = 32768
MAX_THREADS = 1024
# Apple's GPUs give a thread at most 128 registers of 32 bits; the estimate below is compared with it, never enforced.
MAX_REGISTERS = 128


@dataclass(frozen=True)
class Report:
    """Counts of one launch.

    Bytes are summed over threads, as issued: a byte read by two threads counts twice. `device_*_bytes_unique` counts
    each byte of a buffer once. `operations` is None unless the launch ran with `count_ops=True`; `counting` tells what
    they are. `simd_ops` and `matrix_ops` count once per simdgroup, `barriers` once per threadgroup.
    """

    kernel: str
    num_threads: int
    num_threadgroups: int
    threads_per_threadgroup: int
    threadgroup_bytes: int
    registers_estimate: int
    device_read_bytes: int
    device_write_bytes: int
    device_read_bytes_unique: int
    device_reads: int
    device_writes: int
    constant_read_bytes: int
    threadgroup_read_bytes: int
    threadgroup_write_bytes: int
    threadgroup_reads: int
    threadgroup_writes: int
    atomics: int
    simd_ops: int
    matrix_ops: int
    barriers: int
    operations: Operations | None
    warnings: tuple[str, ...]
