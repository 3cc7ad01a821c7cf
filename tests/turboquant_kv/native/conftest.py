"""Lets `make sanitize` put its own build of the kernels in front of the installed one, before they are loaded."""

from __future__ import annotations

import os

from turboquant_kv import native

if folder := os.environ.get("TURBOQUANT_TEST_KERNELS"):
    native.__path__.insert(0, folder)
