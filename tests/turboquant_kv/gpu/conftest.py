"""Tests that need a GPU are collected where MLX has one, and nowhere else."""

from __future__ import annotations

import mlx.core as mx

collect_ignore_glob = [] if mx.metal.is_available() or mx.cuda.is_available() else ["test_*.py"]
