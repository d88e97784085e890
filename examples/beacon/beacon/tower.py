"""The server: takes pulses, knows who is alive, rings the bell."""

import socketserver
import time
from dataclasses import dataclass

from beacon.bell import Bell
from beacon.config import DARK_AFTER, DIM_AFTER, MAX_PULSE_BYTES, PULSE_INTERVAL
from beacon.journal import Journal
from beacon.pulse import PulseError, decode_pulse

SWEEP_SECONDS = 5
MAX_LAMPS = 4096


@dataclass
class LampRecord:
    """What the tower remembers of one lamp."""

    name: str
    last_seen: float
    load_average: float = 0.0
    has_rung: bool = False

    def missed_pulses(self, now):
        """How many pulses are overdue."""
        return int((now - self.last_seen) // PULSE_INTERVAL)

    def status(self, now):
        """One of bright, dim and dark."""
        missed = self.missed_pulses(now)
        if missed >= DARK_AFTER:
            return "dark"
        return "dim" if missed >= DIM_AFTER else "bright"


class TowerFull(RuntimeError):
    """More lamps than MAX_LAMPS have reported."""


class Tower:
    """All lamps, the journal and the bell."""

    def __init__(self, settings, key, clock=time.time):
        self.settings = settings
        self.key = key
        self.clock = clock
        self.lamps = {}
        self.journal = Journal(settings.journal)
        self.bell = Bell(settings.bell)

    def take(self, message):
        """Read one message and remember its lamp."""
        pulse = decode_pulse(message, self.key, self.clock())
        if pulse.lamp_name not in self.lamps and len(self.lamps) >= MAX_LAMPS:
            raise TowerFull(f"{MAX_LAMPS} lamps are known already")
        self.lamps[pulse.lamp_name] = LampRecord(pulse.lamp_name, self.clock(), pulse.load_average)
        self.journal.append(pulse)

    def sweep(self):
        """Ring once for every lamp that has gone dark."""
        now = self.clock()
        for record in self.lamps.values():
            if record.status(now) == "dark" and not record.has_rung:
                self.bell.ring(f"{record.name} is dark")
                record.has_rung = True

    def count_by_status(self):
        """Numbers of bright, dim and dark lamps."""
        counts = {"bright": 0, "dim": 0, "dark": 0}
        now = self.clock()
        for record in self.lamps.values():
            counts[record.status(now)] += 1
        return counts


class PulseHandler(socketserver.StreamRequestHandler):
    """One connection with one pulse."""

    def handle(self):
        """Give the message to the tower; a bad one is dropped."""
        try:
            self.server.tower.take(self.rfile.read(MAX_PULSE_BYTES + 1))
        except PulseError as error:
            self.server.journal_rejected(self.client_address[0], str(error))
