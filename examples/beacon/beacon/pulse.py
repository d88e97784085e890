"""The message that a lamp sends to the tower."""

import hashlib
import hmac
import json
import time
from dataclasses import asdict, dataclass

from beacon.config import CLOCK_SKEW_LIMIT, MAX_PULSE_BYTES, PULSE_MAGIC

SEPARATOR = b"\n"
DIGEST_SIZE = 24


class PulseError(ValueError):
    """A message is damaged, too long, too old or signed with another key."""


@dataclass(frozen=True)
class Pulse:
    """What a lamp says about its machine."""

    lamp_name: str
    sent_at: float
    load_average: float
    free_memory: int
    uptime_seconds: int


def encode_pulse(pulse, key):
    """Bytes of a signed pulse."""
    body = json.dumps(asdict(pulse), sort_keys=True).encode()
    message = SEPARATOR.join([PULSE_MAGIC.encode(), sign_body(body, key), body])
    if len(message) > MAX_PULSE_BYTES:
        raise PulseError(f"the pulse has {len(message)} bytes, at most {MAX_PULSE_BYTES} are allowed")
    return message


def decode_pulse(message, key, now=None):
    """The pulse in a message whose signature and age are right."""
    magic, separator, rest = message.partition(SEPARATOR)
    if magic != PULSE_MAGIC.encode() or not separator:
        raise PulseError("this is not a pulse")
    signature, separator, body = rest.partition(SEPARATOR)
    if not hmac.compare_digest(signature, sign_body(body, key)):
        raise PulseError("the signature does not fit")
    pulse = Pulse(**json.loads(body))
    age = abs((time.time() if now is None else now) - pulse.sent_at)
    if age > CLOCK_SKEW_LIMIT:
        raise PulseError(f"the pulse is {age:.0f} s old")
    return pulse


def sign_body(body, key):
    """Hexadecimal signature of a message body."""
    return hashlib.blake2b(body, key=key, digest_size=DIGEST_SIZE).hexdigest().encode()


def is_fresh(pulse, now, interval=15):
    """Whether a pulse came within the last interval."""
    return now - pulse.sent_at <= interval
