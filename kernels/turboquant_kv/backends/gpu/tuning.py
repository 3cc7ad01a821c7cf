"""How a decode kernel is cut into warps, tiles and blocks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a decode kernel is cut; measured figures are in docs/performance.md."""

    warps: int = 4
    tile: int = 32  # tokens a warp takes at once (mma)
    stages: int = 2  # of those, how many lie in its ring (mma)
    pitch: int = 128  # bytes between entries of the table of pairs; 256 saves an instruction an entry (mma)
    bulk: bool = False  # tiles are copied by Hopper's copy engine (mma)
    blocks: int = 528  # thread blocks that run at the same time
    resident: int = 1  # blocks that share a processor (mma)
    fused: bool = True  # the last block of a row group merges, instead of a second launch (mma)

    @property
    def threads(self) -> int:
        return 32 * self.warps


PORTABLE = Tuning()
# Metal does not tell how many cores there are, 8 to 40 in Macs; about four such blocks fit the registers of one.
SIMD = Tuning(blocks=128)
