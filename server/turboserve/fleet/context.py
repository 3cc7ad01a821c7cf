"""What the router's routes share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from turboserve.api.drain import Drain
from turboserve.fleet.fleet import Fleet
from turboserve.fleet.owners import Owners
from turboserve.fleet.plan import Catalogue
from turboserve.telemetry import Telemetry


@dataclass(frozen=True, slots=True)
class FleetContext:
    """The models and what surrounds them, for one application."""

    fleet: Fleet
    catalogue: Catalogue
    drain: Drain
    telemetry: Telemetry
    max_body_bytes: int
    send_timeout_s: float
    keepalive_interval_s: float
    owners: Owners = field(default_factory=Owners)


async def fleet_context(request: Request) -> FleetContext:
    """The context of the application that got this request."""
    context: FleetContext = request.app.state.context
    return context


RouterContext = Annotated[FleetContext, Depends(fleet_context)]
