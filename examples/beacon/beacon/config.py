"""Constants, and the reader of settings.toml."""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path

# How a lamp behaves when the tower does not answer.
MAX_RETRIES = 5
RETRY_DELAY_SECONDS = 1.5
BACKOFF_FACTOR = 2
CONNECT_TIMEOUT = 30

# When a lamp is called dim or dark, in missed pulses.
DIM_AFTER = 3
DARK_AFTER = 10

PULSE_INTERVAL = 15
PULSE_MAGIC = "BCN1"
MAX_PULSE_BYTES = 2048
SIGNATURE_ALGORITHM = "blake2b"
CLOCK_SKEW_LIMIT = 90

DEFAULT_PORT = 7400
DEFAULT_SETTINGS_PATH = "/etc/beacon/settings.toml"
USER_AGENT = "beacon-lamp/2.7"


class SettingsError(ValueError):
    """A key of settings.toml is unknown or has a value of the wrong kind."""


@dataclass(frozen=True)
class TowerSettings:
    """The [tower] table."""

    bind_address: str = "0.0.0.0"
    listen_port: int = DEFAULT_PORT
    worker_count: int = 4
    accept_unsigned: bool = False


@dataclass(frozen=True)
class JournalSettings:
    """The [journal] table."""

    directory: str = "/var/lib/beacon/journal"
    keep_days: int = 45
    segment_megabytes: int = 16
    compression: str = "zstd"


@dataclass(frozen=True)
class BellSettings:
    """The [bell] table."""

    channel: str = ""
    quiet_hours: str = ""
    repeat_minutes: int = 20
    webhook: str = ""


@dataclass(frozen=True)
class Settings:
    """Everything that settings.toml may say."""

    tower: TowerSettings = field(default_factory=TowerSettings)
    journal: JournalSettings = field(default_factory=JournalSettings)
    bell: BellSettings = field(default_factory=BellSettings)


TABLES = {"tower": TowerSettings, "journal": JournalSettings, "bell": BellSettings}


def read_settings(path=DEFAULT_SETTINGS_PATH):
    """Read a settings file; a missing file gives the defaults."""
    file = Path(path)
    if not file.exists():
        return Settings()
    tables = tomllib.loads(file.read_text(encoding="utf-8"))
    unknown = sorted(set(tables) - set(TABLES))
    if unknown:
        raise SettingsError(f"unknown tables: {', '.join(unknown)}")
    return Settings(**{name: make_table(name, values) for name, values in tables.items()})


def make_table(name, values):
    """Turn one table of the file into its dataclass."""
    kind = TABLES[name]
    known = set(kind.__dataclass_fields__)
    for key in values:
        if key not in known:
            raise SettingsError(f"unknown key {key} in [{name}]")
    return kind(**values)


def retry_delays(count=MAX_RETRIES):
    """Seconds to wait before each new try."""
    return [RETRY_DELAY_SECONDS * BACKOFF_FACTOR**number for number in range(count)]
