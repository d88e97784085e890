"""The agent: measures the machine and sends pulses."""

import os
import random
import socket
import time
from pathlib import Path

from beacon.config import CONNECT_TIMEOUT, PULSE_INTERVAL, USER_AGENT, retry_delays
from beacon.pulse import Pulse, encode_pulse

JITTER_SHARE = 0.2
MEMORY_FILE = "/proc/meminfo"
UPTIME_FILE = "/proc/uptime"
EXIT_UNREACHABLE = 69


class TowerUnreachable(ConnectionError):
    """The tower did not answer after all retries."""


class Lamp:
    """Sends a pulse every few seconds until it is stopped."""

    def __init__(self, tower_host, tower_port, key, name=None, sleep=time.sleep):
        self.address = (tower_host, tower_port)
        self.key = key
        self.name = name or socket.gethostname()
        self.sleep = sleep
        self.is_running = True

    def run(self):
        """Send pulses for ever, with a little jitter so that lamps do not march in step."""
        while self.is_running:
            self.send(self.measure())
            self.sleep(PULSE_INTERVAL * (1 + random.uniform(-JITTER_SHARE, JITTER_SHARE)))

    def measure(self):
        """A pulse that describes the machine now."""
        return Pulse(self.name, time.time(), os.getloadavg()[0], free_memory_bytes(), uptime_seconds())

    def send(self, pulse):
        """Send one pulse, trying again after growing delays."""
        message = encode_pulse(pulse, self.key)
        for delay in [0, *retry_delays()]:
            self.sleep(delay)
            try:
                with socket.create_connection(self.address, timeout=CONNECT_TIMEOUT) as connection:
                    connection.sendall(message)
                return
            except OSError:
                continue
        raise TowerUnreachable(f"{self.address[0]}:{self.address[1]} did not answer")

    def describe(self):
        """The user agent of this lamp."""
        return f"{USER_AGENT} ({self.name})"


def free_memory_bytes(path=MEMORY_FILE):
    """Free memory of the machine."""
    for line in Path(path).read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def uptime_seconds(path=UPTIME_FILE):
    """Seconds since the machine started."""
    return int(float(Path(path).read_text().split()[0]))
