"""Forty-six ways in which a hub misbehaves: each heals or is refused in a line, and nothing wrong ever counts."""

import copy
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub, Fault, Request
from pull_cases import REPOSITORY, SHARD, TOKEN, assert_nothing_counts, assert_pulled, pull

from salalocal.errors import SalaLocalError


def flipped(body: bytes) -> bytes:
    return body[:-1] + bytes([body[-1] ^ 1])


HEALED: dict[str, list[Fault]] = {
    "truncated": [Fault(cut_after=70_000)],
    "truncated twice at once": [Fault(cut_after=0), Fault(cut_after=10)],
    "truncated three times": [Fault(cut_after=n) for n in [70_000] * 3],
    "wrong bytes once": [Fault(body=flipped)],
    "wrong bytes after a cut": [Fault(cut_after=70_000), Fault(body=flipped)],
    "500 then right": [Fault(status=500)],
    "503 twice": [Fault(status=503, times=2)],
    "429 with Retry-After": [Fault(status=429, headers={"Retry-After": "1"})],
    "429 with a Retry-After of nonsense": [Fault(status=429, headers={"Retry-After": "next\tweek"})],
    "stall": [Fault(stall_after=50_000)],
    "stall before the first byte": [Fault(stall_after=0)],
    "Range ignored": [Fault(cut_after=70_000), Fault(ignores_range=True)],
    "Range answered with another range": [Fault(cut_after=70_000), Fault(content_range="bytes 5-9/10")],
    "Range answered with nonsense": [Fault(cut_after=70_000), Fault(content_range="bytes */*")],
    "another etag in the middle": [Fault(cut_after=70_000), Fault(etag="f" * 64)],
    "a length that is too long": [Fault(headers={"Content-Length": "99999999"})],
    "a length that is negative": [Fault(headers={"Content-Length": "-5"})],
    "a length that is no number": [Fault(headers={"Content-Length": "many"})],
}  # fmt: skip


@pytest.mark.parametrize("name", HEALED)
def test_what_a_hub_does_wrong_once_is_healed(name: str, hub: FakeHub) -> None:
    hub.faults[SHARD] = copy.deepcopy(HEALED[name])
    pull(hub)
    assert_pulled(hub)


@pytest.mark.parametrize("content_range", ["bytes 5-9/10", "bytes */*", "bytes 70000-70001/999999999", ""])
def test_a_file_begins_again_where_a_range_is_not_the_one_asked_for(content_range: str, hub: FakeHub) -> None:
    hub.faults[SHARD] = [Fault(cut_after=70_000), Fault(content_range=content_range)]
    pull(hub)
    assert [request.headers.get("Range") for request in hub.bodies(SHARD)] == [None, "bytes=70000-", None]


def test_a_file_begins_again_where_the_hub_names_another_one(hub: FakeHub) -> None:
    hub.faults[SHARD] = [Fault(cut_after=70_000), Fault(etag="f" * 64)]
    pull(hub)
    assert [request.headers.get("Range") for request in hub.bodies(SHARD)] == [None, "bytes=70000-", None]


def test_bytes_of_another_file_behind_the_same_name_are_not_joined(hub: FakeHub) -> None:
    """The server's own tag changes between two tries: it sends the whole file, and the whole file is taken."""
    hub.faults[SHARD] = [Fault(cut_after=70_000, headers={"ETag": '"an older one"'})]
    pull(hub)
    assert_pulled(hub)
    _, second = hub.bodies(SHARD)
    assert second.headers["If-Range"] == '"an older one"' and second.status == 200


def scripted(path_end: str, reply: tuple[int, dict[str, str], bytes]) -> Callable[[FakeHub], None]:
    def prepare(hub: FakeHub) -> None:
        hub.scripts.append(lambda request: reply if request.path.endswith(path_end) else None)

    return prepare


def faulty(fault: Callable[[], Fault]) -> Callable[[FakeHub], None]:
    def prepare(hub: FakeHub) -> None:
        hub.faults[SHARD] = [fault()]

    return prepare


def listed(change: Callable[[dict[str, Any]], Any]) -> Callable[[FakeHub], None]:
    def prepare(hub: FakeHub) -> None:
        hub.listing = change

    return prepare


def with_entry(**entry: Any) -> Callable[[FakeHub], None]:
    return listed(lambda reply: {**reply, "siblings": [*reply["siblings"], entry]})


def without_hash(reply: dict[str, Any]) -> dict[str, Any]:
    return {
        **reply,
        "siblings": [{k: v for k, v in e.items() if k not in ("lfs", "blobId")} for e in reply["siblings"]],
    }


def loop(hub: FakeHub) -> None:
    def script(request: Request) -> tuple[int, dict[str, str], bytes] | None:
        if "model-0000" not in request.path:
            return None
        return 302, {"Location": f"{hub.url}{request.path}x"}, b""

    hub.scripts.append(script)


DEEP = b'{"sha":' + b"[" * 50_000 + b"]" * 50_000 + b"}"
ZIPPED = zlib.compress(b"{" + b" " * 50_000_000 + b"}")
REFUSED: dict[str, tuple[Callable[[FakeHub], None], str]] = {
    "wrong bytes always": (faulty(lambda: Fault(times=9, body=flipped)), "its hash differs"),
    "500 always": (faulty(lambda: Fault(times=99, status=500)), "answers 500, 3 times in a row"),
    "stall always": (faulty(lambda: Fault(times=99, stall_after=0)), "no byte for 0 s, 3 times"),
    "another etag always": (faulty(lambda: Fault(times=99, etag="e" * 64)), "its hash differs"),
    "redirects without end": (loop, "more than 10 redirects"),
    "a redirect to a file": (scripted(SHARD, (302, {"Location": "file:///etc/passwd"}, b"")), "is refused"),
    "a redirect to nowhere": (scripted(SHARD, (302, {}, b"")), "is refused"),
    "a redirect with a password": (scripted(SHARD, (302, {"Location": "http://u:p@localhost/"}, b"")), "is refused"),
    "a redirect to no address": (scripted(SHARD, (302, {"Location": "http://[::1"}, b"")), "is refused"),
    "a list of 2 MiB": (scripted("/main", (200, {}, b"{" + b" " * 2**21 + b"}")), "more than 1,048,576 bytes"),
    "a list that unpacks to 50 MB": (scripted("/main", (200, {"Content-Encoding": "deflate"}, ZIPPED)), "compressed"),
    "a list that is too deep": (scripted("/main", (200, {}, DEEP)), "nested deeper"),
    "a list that is cut": (scripted("/main", (200, {"Content-Length": "900"}, b'{"sha":')), "times in a row"),
    "a list that is no JSON": (scripted("/main", (200, {}, b"<html>log in</html>")), "bad JSON"),
    "a list that is no object": (scripted("/main", (200, {}, b"[]")), "should be an object"),
    "no commit": (listed(lambda reply: {**reply, "sha": "../../../etc"}), "names no commit"),
    "no files": (listed(lambda reply: {**reply, "siblings": []}), "no config.json"),
    "siblings of numbers": (listed(lambda reply: {**reply, "siblings": [1]}), "a file without a name"),
    "no hashes": (listed(without_hash), "gives no hash"),
    "a hash that is a path": (with_entry(rfilename="NOTICE", size=3, blobId="../" * 13 + "x"), "gives no hash"),
    "a size of 2^70": (with_entry(rfilename="NOTICE", size=2**70, blobId="0" * 40), "the limit is"),
    "a negative size": (with_entry(rfilename="NOTICE", size=-1, blobId="0" * 40), "the limit is"),
    "a name twice": (with_entry(rfilename="config.json", size=1, blobId="0" * 40), "twice"),
    "no model of that name": (scripted("/main", (401, {"X-Error-Code": "RepoNotFound"}, b"")), "no such model"),
    "gated": (lambda hub: hub.gated.add(REPOSITORY), "must be asked for"),
    "forbidden": (scripted("/main", (403, {}, b"")), "forbids"),
    "an answer of 299": (scripted("/main", (299, {}, b"{}")), "answers 299"),
    "no such revision": (scripted("/main", (404, {"X-Error-Code": "RevisionNotFound"}, b"")), "no such revision"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_hub_does_wrong_always_is_refused_in_a_line(name: str, hub: FakeHub, hub_cache: Path) -> None:
    prepare, said = REFUSED[name]
    prepare(hub)
    started_s = time.monotonic()
    with pytest.raises(SalaLocalError) as caught:
        pull(hub)
    error = caught.value
    assert said in error.message and error.exit_code in (4, 5) and error.hint
    assert "\n" not in error.message and len(error.message) <= 300 and "\x1b" not in error.message
    assert TOKEN not in error.message + error.hint
    assert time.monotonic() - started_s < 10
    assert_nothing_counts(hub_cache)
