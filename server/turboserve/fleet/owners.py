"""Which model has which session, response or running request, as far as the router has seen them pass."""

from __future__ import annotations

from collections import OrderedDict

MAX_REMEMBERED = 50_000  # some 10 MB; what is forgotten is found by asking


class Owners:
    """The latest ids of all callers, each with its model's name."""

    def __init__(self, max_remembered: int = MAX_REMEMBERED) -> None:
        self._names: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._max_remembered = max_remembered

    def remember(self, tenant: str, wanted_id: str, model_name: str) -> None:
        """The id is that model's from now on."""
        self._names[tenant, wanted_id] = model_name
        self._names.move_to_end((tenant, wanted_id))
        if len(self._names) > self._max_remembered:
            self._names.popitem(last=False)

    def find(self, tenant: str, wanted_id: object) -> str | None:
        """The model's name; None when it is not known."""
        return self._names.get((tenant, wanted_id)) if isinstance(wanted_id, str) else None
