"""One 4/3 server for most end-to-end tests; what each needs of it is independent of the others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.server import Server, running_server


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, so that only the first server calibrates."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def server(cache_dir: Path) -> Iterator[Server]:
    with running_server(cache_dir, "--kv-format", "4/3", "--prefill-chunk-tokens", "128") as running:
        yield running
