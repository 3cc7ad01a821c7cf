"""What MLX computes on."""

from __future__ import annotations

import mlx.core as mx


def on_cpu() -> bool:
    """Whether the model computes on a CPU."""
    return bool(mx.default_device() == mx.Device(mx.cpu))


def own_memory_bytes() -> int:
    """Of a GPU that has memory of its own; 0 where it shares the host's, and on a CPU."""
    return 0 if on_cpu() or not mx.cuda.is_available() else gpu_memory_bytes()


def gpu_memory_bytes() -> int:
    """Of the GPU, its own or the host's; 0 where nobody says."""
    info = mx.device_info()
    return int(info.get("total_memory") or info.get("memory_size") or 0)
