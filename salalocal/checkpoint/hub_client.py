"""Talking to a Hugging Face hub: a URL goes in, a checked reply comes out; for the pull.

What a hub sends is held to bounds: replies that are kept have a largest size and are never decompressed, redirects are
counted, a token goes to the hub's own host alone, and a connection that brings nothing is given up. Endpoint, token
and cache are those of huggingface_hub; its own transfers check a file's size, not its sha256, and begin again from
byte 0 after a kill, so files are read here.
"""

import http.client
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from urllib.parse import quote, urljoin, urlsplit

from salalocal.checkpoint.strict_json import one_line
from salalocal.errors import HubError

PIECE_BYTES = 2**20

_REDIRECTS = (301, 302, 303, 307, 308)
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # the same request may succeed later
_DRIP_BYTES = 1024  # less than this in the time of a stall is a stall
_PROGRESS_BYTES = 2**16  # a try that brought as much was not in vain


@dataclass(frozen=True)
class HubLimits:
    """How much is taken from a hub, and how long it is waited for. Units: seconds, bytes.

    `tries` are those in a row that bring nothing; the pause after one doubles from `pause_s` up to `max_pause_s`.
    """

    stall_s: float = 30.0
    tries: int = 6
    pause_s: float = 1.0
    max_pause_s: float = 60.0
    max_json_bytes: int = 32 * 2**20
    max_redirects: int = 10


class PassingFailureError(Exception):
    """A request failed in a way that may pass; `retry_after_s` is what the hub asks for."""

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after_s = retry_after_s


class StoppedError(Exception):
    """The user stopped the work while it waited."""


class Patience:
    """Counts tries in a row that brought nothing, and waits between them; `on_wait` hears why."""

    def __init__(
        self, limits: HubLimits, what: str, on_wait: Callable[[str], None], stop: threading.Event | None = None
    ) -> None:
        self._limits = limits
        self._what = what
        self._on_wait = on_wait
        self._stop = stop or threading.Event()
        self._failed = 0

    def brought(self, num_bytes: int) -> None:
        """A try brought so many bytes before it ended."""
        if num_bytes >= _PROGRESS_BYTES:
            self._failed = 0

    def pause(self, failure: PassingFailureError) -> None:
        """Wait until it is time for another try. Raises: HubError if there were enough; StoppedError."""
        self._failed += 1
        if self._failed >= self._limits.tries:
            raise HubError(
                f"{self._what}: {failure.reason}, {self._failed} times in a row",
                "the same command goes on from here; check the network, or try later",
            ) from failure
        wanted_s = max(self._limits.pause_s * 2 ** (self._failed - 1), failure.retry_after_s)
        pause_s = min(wanted_s, self._limits.max_pause_s)
        self._on_wait(f"{failure.reason}; again in {pause_s:.0f} s")
        if self._stop.wait(pause_s):
            raise StoppedError


class Reply:
    """An answer whose body has not been read; a context manager that closes it.

    `linked_etag` is what the hub itself said of the file, before it sent the client to where the bytes are.
    """

    def __init__(self, response: http.client.HTTPResponse, linked_etag: str, stall_s: float) -> None:
        self._response = response
        self._stall_s = stall_s
        self.status = response.status
        self.headers: Message = response.headers
        self.linked_etag = linked_etag

    def __enter__(self) -> "Reply":
        return self

    def __exit__(self, *_: object) -> None:
        self._response.close()

    @property
    def content_bytes(self) -> int | None:
        """The length of the body that the headers announce, if they do."""
        text = self.headers.get("Content-Length", "")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None

    def pieces(self) -> Iterator[bytes]:
        """The body, piece by piece as it comes. Raises: PassingFailureError for a connection that breaks or stalls."""
        since_s, num_bytes = time.monotonic(), 0
        while True:
            try:
                piece = self._response.read1(PIECE_BYTES)
            except TimeoutError as error:
                raise PassingFailureError(f"no byte for {self._stall_s:.0f} s") from error
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise PassingFailureError(f"the connection broke ({_reason(error)})") from error
            if not piece:
                return
            yield piece
            num_bytes += len(piece)
            now_s = time.monotonic()
            if now_s - since_s > self._stall_s:
                if num_bytes < _DRIP_BYTES:
                    raise PassingFailureError(f"{num_bytes} bytes in {now_s - since_s:.0f} s")
                since_s, num_bytes = now_s, 0


class HubClient:
    """Requests to one hub. `on_wait` hears why a small request is tried again."""

    def __init__(self, endpoint: str, token: str | None = None, limits: HubLimits | None = None) -> None:
        self.on_wait: Callable[[str], None] = lambda reason: None
        self.endpoint = endpoint.rstrip("/")
        self.limits = limits or HubLimits()
        self._token = token
        self._is_secure = urlsplit(self.endpoint).scheme == "https"
        self._opener = urllib.request.build_opener(
            _AsItIs, urllib.request.HTTPSHandler(context=ssl.create_default_context())
        )

    @classmethod
    def of_this_machine(cls, limits: HubLimits | None = None) -> "HubClient":
        """The hub, with the token if the user is logged in, as huggingface_hub is set up here. Raises: HubError."""
        from huggingface_hub import constants, get_token

        if constants.HF_HUB_OFFLINE:
            raise HubError("HF_HUB_OFFLINE is set: the hub is not asked", "unset HF_HUB_OFFLINE, or use --offline")
        token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
        return cls(constants.ENDPOINT, token, limits)

    def revision_url(self, hub_id: str, revision: str) -> str:
        """Where the list of a revision's files is."""
        return f"{self.endpoint}/api/models/{hub_id}/revision/{quote(revision, safe='')}?blobs=true"

    def file_url(self, hub_id: str, commit: str, name: str) -> str:
        """Where a file is."""
        return f"{self.endpoint}/{hub_id}/resolve/{commit}/{quote(name)}"

    def open(self, url: str, what: str, headers: dict[str, str] | None = None) -> Reply:
        """Send one request and follow redirects. A reply of any kind of success comes back, and 416.

        `what` begins the line of an error: the model, or a file of it.

        Raises: HubError for a refusal; PassingFailureError for one that may pass.
        """
        linked_etag = ""
        for _ in range(self.limits.max_redirects + 1):
            response = self._request(url, headers or {})
            if self._is_hub(url):
                linked = response.headers.get("X-Linked-Etag") or response.headers.get("ETag") or ""
                linked_etag = linked_etag or linked.removeprefix("W/").strip('"')
            if response.status not in _REDIRECTS:
                self._check_status(response, what)
                return Reply(response, linked_etag, self.limits.stall_s)
            response.close()
            url = self._target(url, response.headers.get("Location") or "")
        raise HubError(f"{what}: more than {self.limits.max_redirects} redirects", _NOT_A_HUB)

    def get(self, url: str, what: str, max_bytes: int | None = None) -> bytes:
        """Read a small reply whole. Raises: HubError if it fails in the end or is larger than allowed."""
        limit = self.limits.max_json_bytes if max_bytes is None else max_bytes
        patience = Patience(self.limits, what, self.on_wait)
        while True:
            data = bytearray()
            try:
                with self.open(url, what) as reply:
                    for piece in reply.pieces():
                        data += piece
                        if len(data) > limit:
                            raise HubError(f"{what}: more than {limit:,} bytes", _NOT_A_HUB)
                    if reply.content_bytes in (None, len(data)):
                        return bytes(data)
                    raise PassingFailureError(f"the connection broke after {len(data):,} bytes")
            except PassingFailureError as failure:
                patience.brought(len(data))
                patience.pause(failure)

    def _request(self, url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        sent = {"User-Agent": "salalocal", "Accept-Encoding": "identity", **headers}
        if self._token and self._is_hub(url):
            sent["Authorization"] = f"Bearer {self._token}"
        try:
            response = self._opener.open(urllib.request.Request(url, headers=sent), timeout=self.limits.stall_s)
        except ssl.SSLCertVerificationError as error:
            raise self._untrusted(url, error) from error
        except OSError as error:
            cause = getattr(error, "reason", error)
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise self._untrusted(url, cause) from error
            raise PassingFailureError(f"{one_line(_host(url))} cannot be reached ({_reason(cause)})") from error
        except http.client.HTTPException as error:
            raise PassingFailureError(f"{one_line(_host(url))} sent no HTTP reply ({_reason(error)})") from error
        except ValueError as error:  # an address that cannot be one
            raise HubError(f"{one_line(url)}: {one_line(error)}", "check HF_ENDPOINT") from error
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            response.close()
            raise HubError(f"{one_line(_host(url))} sent a compressed reply, which was not asked for", _NOT_A_HUB)
        return response  # type: ignore[no-any-return]

    def _untrusted(self, url: str, error: ssl.SSLCertVerificationError) -> HubError:
        return HubError(
            f"{one_line(_host(url))}: its certificate cannot be trusted ({one_line(error.verify_message)})",
            "check the clock and the proxy; SSL_CERT_FILE names further certificates",
        )

    def _check_status(self, response: http.client.HTTPResponse, what: str) -> None:
        status = response.status
        if status in (200, 206, 416):
            return
        response.close()
        if status in _PASSING:
            wait = response.headers.get("Retry-After", "").strip()
            wait_s = float(wait) if wait.isascii() and wait.isdigit() and len(wait) < 6 else 0.0
            raise PassingFailureError(f"the hub answers {status}", wait_s)
        message, hint = _refusal(status, response.headers.get("X-Error-Code", ""))
        raise HubError(f"{what}: {message}", hint)

    def _is_hub(self, url: str) -> bool:
        return _origin(url) == _origin(self.endpoint)

    def _target(self, url: str, location: str) -> str:
        """Where a redirect leads. Raises: HubError for a place that a hub would not send to."""
        try:
            target = urljoin(url, location)
            parts = urlsplit(target)
            is_sound = bool(parts.hostname) and parts.username is None and parts.port != 0
        except ValueError:
            is_sound, target, parts = False, location, urlsplit("")
        is_downgrade = parts.scheme == "http" and self._is_secure
        if not location or not is_sound or parts.scheme not in ("http", "https") or is_downgrade:
            raise HubError(f"{one_line(_host(url))} redirects to '{one_line(location)}', which is refused", _NOT_A_HUB)
        return target


_NOT_A_HUB = "is HF_ENDPOINT right? it should be https://huggingface.co or a mirror of it"


class _AsItIs(urllib.request.HTTPErrorProcessor):
    """Gives every reply back as it is: neither followed nor raised."""

    def http_response(
        self, request: urllib.request.Request, response: http.client.HTTPResponse
    ) -> http.client.HTTPResponse:
        return response

    https_response = http_response


def _refusal(status: int, code: str) -> tuple[str, str]:
    """What a refusal means, and what to do."""
    if code == "GatedRepo":
        return "access to it must be asked for", "accept its terms on its page, then: hf auth login"
    if code == "RevisionNotFound":
        return "it has no such revision", "name a branch, a tag or a commit of it with --revision"
    if code == "EntryNotFound":
        return "the hub lists it and does not have it", "try later, or another --revision"
    if code == "RepoNotFound" or status in (401, 404):
        return "no such model on the hub, or a private one", "check its name; for a private one: hf auth login"
    if status == 403:
        return "the hub forbids it (403)", "hf auth login, with a token that may read this model"
    return f"the hub answers {status}", _NOT_A_HUB


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _host(url: str) -> str:
    return urlsplit(url).hostname or url


def _reason(error: object) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return one_line(text, 60)
