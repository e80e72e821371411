"""Object stores that answer 503 for ever, or accept and never answer: a sentence, and the next start goes on."""

from __future__ import annotations

import http.client
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from apache_beam.io.filesystems import FileSystems

from maskbeam.pipeline.exits import UsageError
from maskbeam.pipeline.options import parse_label
from maskbeam.transforms.files import outage
from maskbeam.transforms.files.outage import Outage, StoreUnavailable
from maskbeam.transforms.files.s3 import _s3_client
from maskbeam.transforms.labels.layout import committed_chunks
from maskbeam.transforms.load_model import ModelConfig
from tests.conftest import EVENT_SECONDS, label, read_labels, write_photos
from tests.fakes import Clock, FakeSam
from tests.transforms.files.test_object_store import ObjectStore, fetch, gs_server, s3_server  # noqa: F401  # fixtures

pytestmark = pytest.mark.processes


class Proxy(ThreadingHTTPServer):
    """Stands before a store's server, and fails when told to."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int) -> None:
        super().__init__(("localhost", 0), _Handler)
        self.behind = port
        self.failing = ""  # "503": answers so; "silence": accepts and never answers
        self.over = threading.Event()


class _Handler(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.failing == "silence":
            self.server.over.wait(EVENT_SECONDS)
        if self.server.failing:
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        connection = http.client.HTTPConnection("localhost", self.server.behind)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        data = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = handle_request  # noqa: N815

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Seconds instead of minutes."""
    monkeypatch.setattr(outage, "LIMIT_SECONDS", 3.0)
    monkeypatch.setattr(outage, "READ_SECONDS", 1.0)
    monkeypatch.setattr(outage, "_QUIET_SECONDS", 0.0)
    yield
    outage.S3_OUTAGE.answered()
    outage.GS_OUTAGE.answered()
    _s3_client.cache_clear()  # it has these limits


@pytest.fixture(params=["s3", "gs"])
def store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: None
) -> Iterator[tuple[ObjectStore, Proxy]]:
    """An empty place in a store behind a proxy."""
    found: ObjectStore = request.getfixturevalue(f"{request.param}_server")
    if request.param == "s3":
        proxy = Proxy(int(found.flags[0].rpartition(":")[2]))
        url = f"--s3_endpoint_url=http://localhost:{proxy.server_port}"
        found = replace(found, flags=(url, *found.flags[1:]))
    else:
        proxy = Proxy(int(os.environ["STORAGE_EMULATOR_HOST"].rpartition(":")[2]))
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{proxy.server_port}")
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    found = replace(found, uri=f"{found.uri}/{tmp_path.name}")
    parse_label(["--input", "x", "--output", "y", *found.flags])  # tells the file systems the flags
    yield found, proxy
    proxy.over.set()
    proxy.shutdown()
    proxy.server_close()


class Interrupted(FakeSam):
    """A model during one of whose images something happens. Set on the class: what loads it is pickled."""

    at = 0
    happens: Callable[[], None]

    def embed(self, *arguments: Any) -> Any:
        Interrupted.at -= 1
        if Interrupted.at == 0:
            Interrupted.happens()
        return super().embed(*arguments)


def load_interrupted(config: ModelConfig) -> Interrupted:
    return Interrupted()


def during_image(number: int, happens: Callable[[], None]) -> Callable[[ModelConfig], Any]:
    Interrupted.at, Interrupted.happens = number, happens
    return load_interrupted


@pytest.mark.parametrize("failing", ["503", "silence"])
@pytest.mark.parametrize("remote", ["input", "output"])
def test_a_store_that_fails_for_ever_ends_the_run_and_the_next_start_goes_on(
    remote: str, failing: str, store: tuple[ObjectStore, Proxy], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, proxy = store
    photos = write_photos(tmp_path / "photos", 24)
    assert label("--input", photos, "--output", tmp_path / "undisturbed", "--chunk_size", "2") == 0
    data, output = str(photos), str(tmp_path / "labels")
    if remote == "input":
        data = place.put_tree("photos", photos)
    else:
        output = f"{place.uri}/labels"
    capsys.readouterr()

    def fail() -> None:
        proxy.failing = failing

    assert place.label(data, output, "--chunk_size", "2", load=during_image(8, fail)) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.count("maskbeam: ") == 1, said
    assert "waiting for " in said and "run the same command to go on" in said
    proxy.failing = ""
    proxy.over.set()
    outage.S3_OUTAGE.answered()
    outage.GS_OUTAGE.answered()
    assert 1 <= sum(map(len, committed_chunks(output).values())) < 12
    assert place.label(data, output, "--chunk_size", "2") == 0
    if remote == "output":
        output = str(fetch(output, tmp_path / "fetched"))
    labels, undisturbed = read_labels(Path(output)), read_labels(tmp_path / "undisturbed")
    assert labels.annotations == undisturbed.annotations
    assert [row["status"] for row in labels.images] == [row["status"] for row in undisturbed.images]


def test_a_store_that_fails_from_the_start_is_a_usage_error(store: tuple[ObjectStore, Proxy], tmp_path: Path) -> None:
    place, proxy = store
    proxy.failing = "503"
    with pytest.raises(UsageError, match=r"503|has given no answer for"):
        place.label(f"{place.uri}/photos/*.png", str(tmp_path / "labels"))


def test_an_outage_that_passes_is_waited_out(store: tuple[ObjectStore, Proxy], tmp_path: Path) -> None:
    place, proxy = store
    data = place.put_tree("photos", write_photos(tmp_path / "photos", 24))

    def fail_for_a_moment() -> None:
        proxy.failing = "503"
        threading.Timer(0.5, setattr, (proxy, "failing", "")).start()

    outage.LIMIT_SECONDS = EVENT_SECONDS
    assert place.label(data, str(tmp_path / "labels"), load=during_image(1, fail_for_a_moment)) == 0
    assert {row["status"] for row in read_labels(tmp_path / "labels").images} <= {"labeled", "empty"}


# The clockwork.


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(outage, "time", clock)
    return clock


def test_a_line_says_what_is_waited_for_now_and_then(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    found = Outage("s3://")
    for clock.now in (0, 4, 6, 20, 35, 37, 99):
        found.failed("status 503")
    assert capsys.readouterr().err.splitlines() == [
        f"waiting for s3://, {seconds} s so far, 100 s at most (status 503)" for seconds in (6, 37, 99)
    ]


def test_the_store_is_given_up_after_the_limit_and_asked_again_later(clock: Clock) -> None:
    found = Outage("s3://")
    for clock.now in (0, 50, 99):
        found.failed("status 503")
        found.check()
    clock.now = 101
    with pytest.raises(StoreUnavailable, match=r"^s3:// has given no answer for 101 s \(ReadTimeoutError\)"):
        found.failed("ReadTimeoutError")
    clock.now = 105
    with pytest.raises(StoreUnavailable):
        found.check()
    clock.now = 112
    found.check()
    found.answered()
    found.failed("status 503")
    assert found.lasts


def test_an_answer_or_a_long_pause_ends_an_outage(clock: Clock) -> None:
    found = Outage("s3://")
    found.failed("status 503")
    clock.now = 90
    found.answered()
    assert not found.lasts
    clock.now = 110
    found.failed("status 503")
    clock.now = 500
    found.failed("status 503")
    found.check()


@pytest.mark.parametrize(("status", "fault"), [(200, False), (404, False), (403, False), (429, True), (503, True)])
def test_which_answers_are_faults_of_the_store(status: int, fault: bool) -> None:
    assert outage.is_fault(status) == fault


def test_other_file_systems_are_never_out(tmp_path: Path) -> None:
    assert not outage.is_out(str(tmp_path)) and FileSystems.get_scheme(str(tmp_path)) is None
