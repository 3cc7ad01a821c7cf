"""Which rank this process is, and where rank 0 can be reached, as the launcher's environment says. No MLX in here."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from turboserve.errors import StartupError

RANK = "MLX_RANK"
_OPEN_MPI = "OMPI_COMM_WORLD_RANK"


@dataclass(frozen=True, slots=True)
class Place:
    """A process among those that serve one model together."""

    rank: int
    first_host: str  # where rank 0 listens for the others

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which owns HTTP, scheduling and sampling."""
        return self.rank == 0


def place_in(environment: Mapping[str, str]) -> Place:
    """From what `mlx.launch` or mpirun sets. Raises StartupError."""
    rank = environment.get(RANK, environment.get(_OPEN_MPI, ""))
    if not rank.isdecimal():
        raise StartupError(
            "--distributed is for processes that mlx.launch starts: "
            "mlx.launch --hostfile hosts.json -- turboserve serve MODEL --distributed"
        )
    return Place(int(rank), _first_host(environment))


def _first_host(environment: Mapping[str, str]) -> str:
    if host := environment.get("NCCL_HOST_IP"):
        return host
    if coordinator := environment.get("MLX_JACCL_COORDINATOR"):
        return coordinator.rpartition(":")[0]
    if hostfile := environment.get("MLX_HOSTFILE"):
        try:
            addresses = json.loads(Path(hostfile).read_text(encoding="utf-8"))
            return str(addresses[0][0]).rpartition(":")[0]
        except (OSError, ValueError, LookupError, TypeError) as exc:
            raise StartupError(
                f"MLX_HOSTFILE={hostfile} names no address of rank 0 ({type(exc).__name__}): "
                "start the ranks with mlx.launch."
            ) from exc
    return socket.gethostname()
