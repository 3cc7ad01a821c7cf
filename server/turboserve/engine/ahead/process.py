"""A process that compiles its share, as `python -m turboserve.engine.ahead.process`: its job comes on standard input,
one line, which stays open as long as the server lives. Tells on standard output what became of each unit, as JSON.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from turboquant_kv.backends.gpu.nvrtc import end_with_parent, read_line
from turboserve.engine.ahead.shares import Job

CACHE_BYTES = 64 << 20  # of freed device memory that this process keeps for itself
AWAIT_S = 60.0  # for our kernels, which another process has compiled, before this one compiles them

log = logging.getLogger(__name__)


def main() -> NoReturn:
    job = Job.from_json(read_line())
    end_with_parent()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    from turboquant_kv import blas
    from turboserve.descriptors import limits_kept

    blas.interpose()  # before MLX, as in the server; some of the work is a CPU's
    with limits_kept():
        import mlx_lm.utils  # noqa: F401  would lower the limit of open files
    import mlx.core as mx

    from turboquant_kv.backends.gpu.module_files import await_modules
    from turboserve.engine.ahead.modules import Publisher
    from turboserve.engine.ahead.work import Work

    mx.set_cache_limit(CACHE_BYTES)
    if "kernels" not in job.units:
        await_modules(Path(job.ended), AWAIT_S)
    publisher = Publisher(Path(job.own), [Path(folder) for folder in job.others])
    num_modules = num_failed = 0

    def publish() -> None:
        nonlocal num_modules
        num_modules += publisher.publish()

    work = Work(job, publish)
    for unit in job.units:
        began_s, before, note, error = time.monotonic(), num_modules, "", ""
        try:
            note = work.do(unit)
        except Exception as exc:  # the server compiles it itself, then
            log.debug("%s", unit, exc_info=True)
            error, num_failed = f"{type(exc).__name__}: {' '.join(str(exc).split())}"[:300], num_failed + 1
        told: dict[str, Any] = {
            "unit": unit,
            "seconds": round(time.monotonic() - began_s, 2),
            "modules": num_modules - before,
        }
        told |= {"note": note, "error": error}
        sys.stdout.write(f"{json.dumps(told)}\n")
        sys.stdout.flush()
        mx.clear_cache()
    os._exit(1 if num_failed else 0)  # MLX's threads and the device's context need no farewell


if __name__ == "__main__":
    main()
