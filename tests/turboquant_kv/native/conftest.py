"""Lets `make sanitize` test its own build of the kernels, loaded here before anything asks for the installed one."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

NAME = "turboquant_kv.native._kernels"

if folder := os.environ.get("TURBOQUANT_TEST_KERNELS"):
    # By path and not by a search path: an editable installation's import hook answers before any of those.
    (path,) = Path(folder).glob("_kernels.*.so")
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None and NAME not in sys.modules
    sys.modules[NAME] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
