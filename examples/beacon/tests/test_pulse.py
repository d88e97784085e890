"""Pulses survive the trip, and damaged ones do not."""

import pytest
from beacon.pulse import Pulse, PulseError, decode_pulse, encode_pulse

TEST_KEY = b"0123456789abcdef0123456789abcdef"
SAMPLE_TIME = 1_700_000_000.0


def sample_pulse(name="attic-pi"):
    return Pulse(name, SAMPLE_TIME, 0.42, 512_000_000, 86_400)


def test_a_pulse_survives_the_trip():
    message = encode_pulse(sample_pulse(), TEST_KEY)
    assert decode_pulse(message, TEST_KEY, now=SAMPLE_TIME + 1) == sample_pulse()


def test_a_changed_byte_is_noticed():
    message = bytearray(encode_pulse(sample_pulse(), TEST_KEY))
    message[-2] ^= 1
    with pytest.raises(PulseError):
        decode_pulse(bytes(message), TEST_KEY, now=SAMPLE_TIME + 1)


def test_an_old_pulse_is_refused():
    message = encode_pulse(sample_pulse(), TEST_KEY)
    with pytest.raises(PulseError):
        decode_pulse(message, TEST_KEY, now=SAMPLE_TIME + 91)
