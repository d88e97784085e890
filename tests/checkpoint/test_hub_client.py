"""Requests to a hub that is slow, far away or not what it says: bounded in bytes, in hops, in tries and in time."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from fake_hub import FakeHub
from pull_cases import LIMITS, REPOSITORY, TOKEN

from salalocal.checkpoint.hub_client import HubClient, HubLimits, PassingFailureError, Patience, StoppedError
from salalocal.errors import HubError


@contextmanager
def dripping(pause_s: float) -> Iterator[str]:
    """A server that sends one byte of a long body after each pause; gives its URL."""
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while not stop.is_set():
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    try:
                        connection.recv(65_536)
                        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 900000\r\n\r\n")
                        while not stop.wait(pause_s):
                            connection.sendall(b" ")
                    except OSError:
                        continue

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        stop.set()
        server.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def test_a_connection_that_drips_is_given_up() -> None:
    with dripping(0.02) as url:
        started_s = time.monotonic()
        with pytest.raises(HubError, match=r"acme: \d+ bytes in 0 s, 3 times in a row"):
            HubClient(url, None, LIMITS).get(url, "acme")
        assert 3 * LIMITS.stall_s <= time.monotonic() - started_s < 10


def test_redirects_are_counted(hub: FakeHub) -> None:
    hub.scripts.append(lambda request: (302, {"Location": f"{hub.url}{request.path}x"}, b""))
    with pytest.raises(HubError, match="acme: more than 10 redirects"):
        HubClient(hub.url, None, LIMITS).open(f"{hub.url}/y", "acme")
    assert len(hub.log) == 11


@pytest.mark.parametrize(
    "location", ["http://example.com/x", "ftp://example.com/x", "//user@example.com/x", "https://[x/", ""]
)
def test_a_hub_over_tls_sends_nobody_to_a_place_without_it(location: str) -> None:
    client = HubClient("https://hub.example", TOKEN)
    with pytest.raises(HubError, match="is refused"):
        client._target("https://hub.example/a", location)


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("/b?c=d", "https://hub.example/b?c=d"),
        ("https://cdn.example/x?sig=1", "https://cdn.example/x?sig=1"),
        ("//cdn.example/x", "https://cdn.example/x"),
    ],
)
def test_a_redirect_may_be_relative_or_to_another_host(location: str, target: str) -> None:
    assert HubClient("https://hub.example", TOKEN)._target("https://hub.example/a", location) == target


def test_a_reply_of_another_host_does_not_name_the_file(hub: FakeHub) -> None:
    with HubClient(hub.url, None, LIMITS).open(f"{hub.cdn_url}/cdn/{REPOSITORY}/README.md", "acme") as reply:
        assert reply.status == 200 and reply.headers["ETag"] and reply.linked_etag == ""


def test_a_hub_that_cannot_be_reached_is_told_while_it_is_tried() -> None:
    told: list[str] = []
    client = HubClient("http://127.0.0.1:9", None, LIMITS)
    client.on_wait = told.append
    with pytest.raises(HubError, match=r"127\.0\.0\.1 cannot be reached \(.*\), 3 times in a row") as caught:
        client.get("http://127.0.0.1:9/x", "acme")
    assert len(told) == 2 and told[0].endswith("again in 0 s") and "same command" in caught.value.hint


def test_pauses_double_and_end() -> None:
    told: list[str] = []
    patience = Patience(HubLimits(tries=6, pause_s=0.001, max_pause_s=0.004), "acme", told.append)
    for _ in range(5):
        patience.pause(PassingFailureError("503"))
    with pytest.raises(HubError, match="acme: 503, 6 times in a row"):
        patience.pause(PassingFailureError("503"))
    assert len(told) == 5


def test_what_the_hub_asks_for_is_waited_but_not_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    stop = threading.Event()
    monkeypatch.setattr(stop, "wait", lambda pause_s: waited.append(pause_s) or False)
    patience = Patience(HubLimits(), "acme", lambda reason: None, stop)
    for asked_s in (0.0, 7.0, 9999.0):
        patience.pause(PassingFailureError("429", asked_s))
    assert waited == [1.0, 7.0, 60.0]
    monkeypatch.setattr(stop, "wait", lambda pause_s: True)
    with pytest.raises(StoppedError):
        patience.pause(PassingFailureError("429"))


def test_a_try_that_brought_something_counts_anew() -> None:
    patience = Patience(HubLimits(tries=2, pause_s=0.0), "acme", lambda reason: None)
    for num_bytes in (2**16, 2**20):
        patience.brought(num_bytes)
        patience.pause(PassingFailureError("cut"))
    patience.brought(100)
    with pytest.raises(HubError, match="2 times"):
        patience.pause(PassingFailureError("cut"))
