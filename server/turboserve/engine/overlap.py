"""Whether decode steps overlap: the next one is enqueued before the last one's tokens are read. Decided once.

It pays where computing is queued behind the host. What computes while the graph is built would only deliver each token
a step late; and caches that cannot be cut back could not undo the step that an ended answer was not meant to take.
"""

from __future__ import annotations

from dataclasses import dataclass

CHOICES = ("auto", "on", "off")
EAGER_BACKENDS = ("cpu-native", "cpu-numpy")


@dataclass(frozen=True, slots=True)
class Overlap:
    """The decision, and what it was made from."""

    is_on: bool
    reason: str

    def __str__(self) -> str:
        return f"{'on' if self.is_on else 'off'} ({self.reason})"


def choose_overlap(wanted: str, *, can_cut: bool, backend_name: str, on_cpu: bool) -> Overlap:
    """wanted: auto, on or off (settings.overlap). can_cut: whether all layers' caches can be cut back by a token."""
    if wanted == "off":
        return Overlap(False, "as set")
    if not can_cut:
        return Overlap(False, "this model's caches cannot be cut back by a token")
    if wanted == "on":
        return Overlap(True, "as set")
    if backend_name in EAGER_BACKENDS:
        return Overlap(False, f"{backend_name} computes while a step is prepared")
    if on_cpu:
        return Overlap(False, "on a CPU, preparing a step takes time from computing the last one")
    return Overlap(True, "the device computes while the next step is prepared")
