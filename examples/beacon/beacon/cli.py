"""The beacon command."""

import argparse
import sys
from pathlib import Path

from beacon.config import DEFAULT_PORT, DEFAULT_SETTINGS_PATH, read_settings
from beacon.lamp import EXIT_UNREACHABLE, Lamp, TowerUnreachable

KEY_VARIABLE = "BEACON_KEY_FILE"
KEY_BYTES = 32


def build_parser():
    """The command line of lamps and towers."""
    parser = argparse.ArgumentParser(prog="beacon")
    commands = parser.add_subparsers(dest="command", required=True)
    lamp = commands.add_parser("lamp", help="send pulses from this machine")
    lamp.add_argument("--tower", default=f"localhost:{DEFAULT_PORT}")
    lamp.add_argument("--key-file", type=Path, required=True)
    tower = commands.add_parser("tower", help="listen to lamps")
    tower.add_argument("--config", type=Path, default=Path(DEFAULT_SETTINGS_PATH))
    return parser


def read_key(path):
    """The shared key from a file of exactly KEY_BYTES bytes."""
    key = Path(path).read_bytes()
    if len(key) != KEY_BYTES:
        raise SystemExit(f"the key file must hold {KEY_BYTES} bytes, it holds {len(key)}")
    return key


def main(arguments=None):
    """Run one command; returns the exit code."""
    options = build_parser().parse_args(arguments)
    if options.command == "tower":
        sys.stdout.write(f"{read_settings(options.config)}\n")
        return 0
    host, _, port = options.tower.partition(":")
    try:
        Lamp(host, int(port or DEFAULT_PORT), read_key(options.key_file)).run()
    except TowerUnreachable as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_UNREACHABLE
    return 0
