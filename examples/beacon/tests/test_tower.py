"""Lamps go from bright to dim to dark."""

from beacon.tower import LampRecord

START = 1_000.0


def test_a_new_lamp_is_bright():
    assert LampRecord("cellar", START).status(START + 20) == "bright"


def test_three_missed_pulses_make_it_dim():
    assert LampRecord("cellar", START).status(START + 45) == "dim"


def test_ten_missed_pulses_make_it_dark():
    assert LampRecord("cellar", START).status(START + 150) == "dark"
