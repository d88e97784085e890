"""Models, findings and settings as lines and as plain data; for `ls`, `show`, `doctor`, `config`."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from salalocal.prompt.visible import visible_name
from salalocal.session.catalog import ModelEntry
from salalocal.session.plan import short_tokens
from salalocal.settings import Settings
from salalocal.terminal.tables import size

_ROUND_TO = 1024


def model_lines(entries: Sequence[ModelEntry], width: int) -> Iterator[str]:
    """A table of models; two lines for each on a narrow terminal."""
    rows = [(_name(entry), size(entry.num_bytes), _weights(entry), _context(entry)) for entry in entries]
    widths = [max(map(len, column)) for column in zip(("model", "size", "weights", "fits here"), *rows, strict=True)]
    if sum(widths) + 2 * len(widths) > width:
        for entry, (name, *figures) in zip(entries, rows, strict=True):
            yield name
            yield "  " + ", ".join(figure for figure in figures if figure != "-") + f", {entry.place}"
    else:
        for row in (("model", "size", "weights", "fits here"), *rows):
            yield f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]:>{widths[3]}}"
    for entry in entries:
        if entry.problem is not None:
            yield f"{_name(entry)}: {entry.problem}"


def model_json(entry: ModelEntry) -> dict[str, Any]:
    """An entry as plain data."""
    return {
        "model": entry.name,
        "place": entry.place,
        "folder": str(entry.folder.path),
        "bytes": entry.num_bytes,
        "weights": entry.weights,
        "method": entry.method,
        "weight_bytes": entry.weight_bytes,
        "parameters": None if entry.config is None else entry.config.num_parameters,
        "longest_context_tokens": entry.longest_tokens,
        "problem": entry.problem,
    }


def removal_line(entry: ModelEntry) -> str:
    """What is lost with a model."""
    return f"{_name(entry)}, {size(entry.num_bytes)} ({entry.place})"


def _name(entry: ModelEntry) -> str:
    return visible_name(entry.name)


def _weights(entry: ModelEntry) -> str:
    if entry.weights is None:
        return "-"
    return entry.weights if entry.method in (None, entry.weights) else f"{entry.weights} {entry.method}"


def _context(entry: ModelEntry) -> str:
    return "-" if entry.longest_tokens is None else context_text(entry.longest_tokens)


def context_text(num_tokens: int) -> str:
    """A context rounded down, in the units of --ctx: 181k, 1.7m; `nothing` if not even the weights fit."""
    if num_tokens >= 2**20:
        return f"{num_tokens // (2**20 // 10) / 10:.1f}m"
    return short_tokens(num_tokens // _ROUND_TO * _ROUND_TO) if num_tokens >= _ROUND_TO else "nothing"


def config_lines(settings: Settings, places: Mapping[str, Path], names: Sequence[str], width: int) -> Iterator[str]:
    """Every setting with its value and origin, then the folders."""
    longest = max(map(len, names))
    values = {name: _value(getattr(settings, name)) for name in names}
    value_width = min(28, max(map(len, values.values())))
    for name, value in values.items():
        line = f"{name:<{longest}}  {value:<{value_width}}  {settings.origin(name)}"
        yield line if len(line) <= width else f"{name:<{longest}}  {value}"
        if len(line) > width:
            yield f"{'':<{longest}}    {settings.origin(name)}"
    yield ""
    for name, path in places.items():
        yield f"{name}: {path}"


def config_json(settings: Settings, places: Mapping[str, Path], names: Sequence[str]) -> dict[str, Any]:
    """The same as plain data."""
    values = {name: {"value": getattr(settings, name), "origin": settings.origin(name)} for name in names}
    return {"settings": values, "places": {name: str(path) for name, path in places.items()}}


def _value(value: object) -> str:
    return "-" if value is None else str(value)


def places(environ: Mapping[str, str] = os.environ) -> dict[str, Path]:
    """The folders and files that salalocal reads and writes."""
    from salalocal.checkpoint.hub_cache import cache_folder
    from salalocal.settings import models_folder, settings_path, state_folder

    return {
        "settings file": settings_path(environ),
        "models made here": models_folder(),
        "hub cache": cache_folder(),
        "history and logs": state_folder(),
    }
