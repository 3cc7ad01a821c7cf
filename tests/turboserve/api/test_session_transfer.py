"""Exports and imports over HTTP: streamed, bounded, refused before they are taken, and clear about why."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import httpx
import numpy as np
import pytest
from tests.turboserve.api.conftest import Service, connect_client, error_of, running
from tests.turboserve.api.scripted import WAIT_S

from turboserve.api.transfers import MAX_TRANSFERS, MAX_TRANSFERS_OF_ONE, SESSION_TYPE, Transfers
from turboserve.cache.disk.session_file import FIRST_BYTES, SessionFile, head_bytes
from turboserve.errors import OverloadedError

TYPE = {"Content-Type": SESSION_TYPE}


@pytest.fixture(autouse=True)
def forget(service: Service) -> Iterator[None]:
    yield
    service.engine.clear()
    service.engine.imported.clear()


@pytest.fixture
def file(client: httpx.Client, service: Service) -> bytes:
    """An exported session of 2 MB, more than the largest body of other routes."""
    service.engine.add("", "mine")
    data = client.get("/v1/sessions/mine/export").content
    service.engine.clear()
    assert len(data) > 10 * service.settings.max_body_bytes
    return data


def refused(reply: httpx.Response) -> tuple[int, object, object]:
    error = error_of(reply)
    return reply.status_code, error["code"], error["param"]


def test_an_export_tells_its_length_and_type(client: httpx.Client, service: Service) -> None:
    service.engine.add("", "mine")
    reply = client.get("/v1/sessions/mine/export")
    assert reply.status_code == 200 and reply.headers["content-type"] == SESSION_TYPE
    assert int(reply.headers["content-length"]) == len(reply.content)
    assert reply.headers["content-disposition"] == 'attachment; filename="mine.session"'


def test_what_comes_in_is_what_went_out(client: httpx.Client, service: Service, file: bytes) -> None:
    reply = client.post("/v1/sessions/import", content=file, headers=TYPE)
    assert reply.status_code == 200 and reply.json()["id"] == "mine"
    assert client.post("/v1/sessions/import?id=other", content=file, headers=TYPE).json()["id"] == "other"
    (command, other) = service.engine.imported
    assert (command.session_id, command.tenant, other.session_id) == ("mine", "", "other")
    assert np.array_equal(command.tokens, np.arange(3000))
    assert command.arrays[0].shape == (3000, 700) and command.arrays[0].sum() == other.arrays[0].sum() > 0


def test_an_imported_session_is_its_importers(file: bytes) -> None:
    with running(api_keys=("one", "two")) as service:
        with connect_client(service, Authorization="Bearer two") as client:
            assert client.post("/v1/sessions/import", content=file, headers=TYPE).status_code == 200
        with connect_client(service, Authorization="Bearer one") as client:
            assert client.get("/v1/sessions/mine/export").status_code == 404
        assert (
            httpx.post(f"{service.url}/v1/sessions/import", content=file, headers=TYPE, timeout=WAIT_S).status_code
            == 401
        )


def test_a_session_that_is_not_there_or_cannot_be_read_is_404(client: httpx.Client, service: Service) -> None:
    service.engine.add("", "gone")
    for name in ("none", "gone", "a b", "é"):
        assert refused(client.get(f"/v1/sessions/{name}/export"))[:2] == (404, "session_not_found")
    assert service.drain.num_running == 0


@pytest.mark.parametrize("media_type", [None, "application/json", "text/plain", "application/octet-stream"])
def test_only_its_own_media_type_is_taken(client: httpx.Client, file: bytes, media_type: str | None) -> None:
    headers = {} if media_type is None else {"Content-Type": media_type}
    reply = client.post("/v1/sessions/import", content=file[:9000], headers=headers)
    assert refused(reply) == (415, "unsupported_media_type", None)


def test_torn_and_altered_files_are_refused(client: httpx.Client, service: Service, file: bytes) -> None:
    middle = len(file) // 2
    altered = file[:middle] + bytes([file[middle] ^ 1]) + file[middle + 1 :]
    for content in (b"", b"{}", file[:3], file[:2000], file[:middle], file[:-1], file + b"x", altered, bytes(5000)):
        reply = client.post("/v1/sessions/import", content=content, headers=TYPE)
        assert refused(reply) == (400, "session_not_importable", "file"), content[:10]
    assert not service.engine.imported


@pytest.mark.parametrize("name", ["", "a b", "../x", "é", "a" * 129])
def test_names_are_checked(client: httpx.Client, file: bytes, name: str) -> None:
    reply = client.post("/v1/sessions/import", params={"id": name}, content=file, headers=TYPE)
    assert refused(reply) == (400, "invalid_request", "id")


def test_unknown_parameters_are_refused(client: httpx.Client, file: bytes) -> None:
    assert client.post("/v1/sessions/import?name=x", content=file, headers=TYPE).status_code == 400


def test_what_is_too_large_is_refused_by_its_head(file: bytes) -> None:
    with running(max_import_bytes=1 << 20) as service, connect_client(service) as client:
        declared = client.post("/v1/sessions/import", content=file, headers=TYPE)
        told = client.post("/v1/sessions/import", content=iter([file]), headers=TYPE)  # chunked: no length
        for reply in (declared, told):
            assert refused(reply) == (413, "request_too_large", None)
            assert "max_import_bytes" in str(error_of(reply)["message"])
        assert not service.engine.imported


def head_of(file: bytes) -> bytes:
    return file[: head_bytes(file[:FIRST_BYTES])]


def test_a_session_that_will_not_be_taken_is_refused_before_its_contents_come(service: Service, file: bytes) -> None:
    service.engine.add("", "mine")
    with service.connect() as sock:
        sock.sendall(_request(service, len(file)) + head_of(file))
        assert b"409" in sock.recv(4096).partition(b"\r\n")[0]


def _request(service: Service, num_bytes: int) -> bytes:
    lines = [
        "POST /v1/sessions/import HTTP/1.1",
        f"Host: 127.0.0.1:{service.port}",
        f"Content-Type: {SESSION_TYPE}",
        f"Content-Length: {num_bytes}",
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def test_so_many_transfers_run_at_once_and_those_who_leave_make_room(service: Service, file: bytes) -> None:
    half_way: list[socket.socket] = []
    with connect_client(service) as client:
        for _ in range(MAX_TRANSFERS_OF_ONE):
            half_way.append(service.connect())
            half_way[-1].sendall(_request(service, len(file)) + head_of(file))
        until(lambda: client.get("/v1/sessions/x/export").status_code == 503)
        reply = client.post("/v1/sessions/import", content=file, headers=TYPE)
        assert refused(reply)[:2] == (503, "server_overloaded")
        for sock in half_way:
            sock.close()
        until(lambda: client.get("/v1/sessions/x/export").status_code == 404)
    assert not service.engine.imported


def test_an_export_that_nobody_reads_any_more_ends(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its pieces are made no further, nothing is warned of, and its place is free."""
    made: list[int] = []
    slices = SessionFile.slices

    def counted(file: SessionFile) -> Iterator[memoryview]:
        for piece in slices(file):
            made.append(len(piece))
            yield piece

    monkeypatch.setattr(SessionFile, "slices", counted)
    service.engine.add("", "mine")
    with connect_client(service) as client:
        num_bytes = len(client.get("/v1/sessions/mine/export").content)
        assert sum(made) == num_bytes
        made.clear()
        leaving = [service.connect(receive_buffer_bytes=4096) for _ in range(MAX_TRANSFERS_OF_ONE)]
        for sock in leaving:
            lines = ["GET /v1/sessions/mine/export HTTP/1.1", f"Host: 127.0.0.1:{service.port}", "", ""]
            sock.sendall("\r\n".join(lines).encode())
            assert sock.recv(12) == b"HTTP/1.1 200"
        assert client.get("/v1/sessions/mine/export").status_code == 503
        caplog.clear()
        for sock in leaving:
            sock.close()
        until(lambda: client.get("/v1/sessions/x/export").status_code == 404)
        assert sum(made) < len(leaving) * num_bytes
        made.clear()
        assert len(client.get("/v1/sessions/mine/export").content) == num_bytes == sum(made)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_one_callers_transfers_leave_room_for_others() -> None:
    transfers = Transfers()
    with ExitStack() as under_way:
        for _ in range(MAX_TRANSFERS_OF_ONE):
            under_way.enter_context(transfers.one("a"))
        with pytest.raises(OverloadedError), transfers.one("a"):
            pass
        for i in range(MAX_TRANSFERS - MAX_TRANSFERS_OF_ONE):
            under_way.enter_context(transfers.one(f"b{i}"))
        with pytest.raises(OverloadedError), transfers.one("c"):
            pass
    with transfers.one("a"), transfers.one("a"):
        pass


def until(holds: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_import_that_goes_on_arriving_has_more_time_than_other_bodies(service: Service, file: bytes) -> None:
    """The deadline holds for each MiB of it; one that stands still is cut off."""
    with running(request_timeout_s=3.0) as patient, patient.connect() as sock:
        sock.sendall(_request(patient, len(file)))
        steps = [file[start : start + (1 << 20)] for start in range(0, len(file), 1 << 20)]
        for step in steps:
            sock.sendall(step)
            if step is not steps[-1]:
                time.sleep(1.6)  # all of them are longer than one deadline, and each leaves room for a busy machine
        assert len(steps) > 2
        assert b"200" in sock.recv(4096).partition(b"\r\n")[0]
    with service.connect() as sock:
        sock.sendall(_request(service, len(file)) + head_of(file))
        assert b"408" in sock.recv(4096).partition(b"\r\n")[0]


def test_a_full_disk_is_told_and_costs_nothing(
    client: httpx.Client, file: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    reply = client.post("/v1/sessions/import", content=file, headers=TYPE)
    assert refused(reply)[:2] == (503, "server_overloaded") and "No space left" in str(error_of(reply)["message"])
