"""What the user has set, and where: flags go in, Settings come out, for cli.

The order is flag > environment > settings.toml > default.

Every value knows its origin, so that a face can say why it does what it does.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import platformdirs

from salalocal.errors import RequestError, SettingsError

APPLICATION = "salalocal"
DEFAULT_ORIGIN = "default"

_TOKEN_UNITS = {"": 1, "k": 1024, "m": 1024**2}
_BYTE_UNITS = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}


def parse_tokens(text: str) -> int:
    """A number of tokens: `65536`, `64k`, `256K`, `1m` (k = 1024, m = 1024 x 1024).

    Raises: RequestError.
    """
    return _parse_amount(text, _TOKEN_UNITS, r"", "a number of tokens such as 65536, 64k or 1m")


def parse_bytes(text: str) -> int:
    """An amount of memory: `16g`, `512MiB`, `17179869184` (k, m, g, t = powers of 1024).

    Raises: RequestError.
    """
    return _parse_amount(text, _BYTE_UNITS, r"(?:i?b)?", "an amount of memory such as 16g or 512m")


def _parse_amount(text: str, units: Mapping[str, int], suffix: str, wanted: str) -> int:
    match = re.fullmatch(rf"([0-9]{{1,15}}(?:\.[0-9]{{1,6}})?)\s*([a-z]?){suffix}", text.strip().lower())
    amount = int(float(match[1]) * units[match[2]]) if match and match[2] in units else 0
    if amount < 1:
        raise RequestError(f"{text!r} is not {wanted}", "write a number with k, m or g behind it, without spaces")
    return amount


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a text that is not empty")
    return value


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError("a whole number")
    try:
        return int(value)
    except ValueError:
        raise ValueError("a whole number") from None


def _real(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("a number")
    try:
        return float(value)
    except ValueError:
        raise ValueError("a number") from None


def _switch(value: object) -> bool:
    if isinstance(value, bool):
        return value
    known = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if str(value).lower() not in known:
        raise ValueError("true or false")
    return known[str(value).lower()]


def _context(value: object) -> int | None:
    return None if value == "auto" else _tokens(value)


def _tokens(value: object) -> int:
    try:
        return parse_tokens(str(value))
    except RequestError:
        raise ValueError("a number of tokens such as 65536, 64k or 1m") from None


@dataclass(frozen=True)
class Settings:
    """The effective settings of one run; `origins` says where each value came from.

    A value of None means that the room concerned chooses (device, dtype, chunk_size, math, kv_cache, kv_place, guess,
    max_tokens, ctx).
    """

    model: str = "builtin"
    device: str | None = None
    dtype: str | None = None
    ctx: int | None = None
    chunk_size: int | None = None
    math: str | None = None
    kv_cache: str | None = None
    kv_place: str | None = None
    guess: bool | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = None
    seed: int | None = None
    system: str | None = None
    origins: Mapping[str, str] = field(default_factory=dict)

    def origin(self, name: str) -> str:
        """Where the value of `name` came from: a flag, an environment variable, the settings file or `default`."""
        return self.origins.get(name, DEFAULT_ORIGIN)


READERS: dict[str, Callable[[object], Any]] = {
    "model": _text,
    "device": _text,
    "dtype": _text,
    "ctx": _context,
    "chunk_size": _tokens,
    "math": _text,
    "kv_cache": _text,
    "kv_place": _text,
    "guess": _switch,
    "temperature": _real,
    "top_p": _real,
    "top_k": _whole,
    "min_p": _real,
    "max_tokens": _tokens,
    "seed": _whole,
    "system": _text,
}


def load_settings(flags: Mapping[str, object], environ: Mapping[str, str] | None = None) -> Settings:
    """The settings of this run: flags (None = not given) over environment over settings.toml over defaults.

    Raises: SettingsError names the variable or the key of the file and what was due; RequestError names the flag.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    path = settings_path(environ)
    for name, value in _read_file(path, is_required="SALALOCAL_CONFIG" in environ).items():
        values[name] = _read(name, value, SettingsError, f"{name} in {path}")
        origins[name] = str(path)
    for name in READERS:
        variable = f"SALALOCAL_{name.upper()}"
        if environ.get(variable):
            values[name] = _read(name, environ[variable], SettingsError, f"the environment variable {variable}")
            origins[name] = variable
    for name, value in flags.items():
        if value is not None:
            flag = "--" + name.replace("_", "-")
            values[name] = _read(name, value, RequestError, flag)
            origins[name] = flag
    return Settings(**values, origins=origins)


def _read(name: str, value: object, error: type[RequestError] | type[SettingsError], where: str) -> Any:
    try:
        return READERS[name](value)
    except ValueError as due:
        raise error(f"{where} is {str(value)[:60]!r}, not {due}", "correct it or leave it out") from None


def _read_file(path: Path, is_required: bool) -> dict[str, object]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        if is_required:
            raise SettingsError(f"no settings file at {path}", "correct or unset SALALOCAL_CONFIG") from None
        return {}
    except OSError as error:
        raise SettingsError(f"cannot read the settings file {path}: {error.strerror}", f"chmod u+r {path}") from None
    try:
        table = tomllib.loads(content.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(
            f"{path} is not TOML: {str(error)[:120]}", "write lines such as: temperature = 0.7"
        ) from None
    for key in table:
        if key not in READERS:
            close = difflib.get_close_matches(key, READERS, 1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(READERS)}"
            raise SettingsError(f"unknown setting {key[:60]!r} in {path}", hint)
    return table


def settings_path(environ: Mapping[str, str]) -> Path:
    """The settings file: SALALOCAL_CONFIG, else settings.toml in the user's configuration folder."""
    if environ.get("SALALOCAL_CONFIG"):
        return Path(environ["SALALOCAL_CONFIG"])
    return platformdirs.user_config_path(APPLICATION, appauthor=False) / "settings.toml"


def state_folder() -> Path:
    """Where histories and logs live (not created here)."""
    return platformdirs.user_state_path(APPLICATION, appauthor=False)


def models_folder() -> Path:
    """Where quantized models go unless told otherwise (not created here)."""
    return platformdirs.user_data_path(APPLICATION, appauthor=False) / "models"


def is_debugging(environ: Mapping[str, str] | None = None) -> bool:
    """True if SALALOCAL_DEBUG asks for tracebacks."""
    environ = os.environ if environ is None else environ
    return environ.get("SALALOCAL_DEBUG", "") not in ("", "0")
