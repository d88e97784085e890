"""Beacon: lamps send pulses, a tower listens, a bell rings."""

__version__ = "2.7.1"
