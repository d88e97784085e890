"""salalocal: a local runtime for very long contexts. The public names, each loaded when it is first used.

`import salalocal` is quick: torch is imported by `load` and whatever needs a model, not before.
"""

import importlib
from typing import TYPE_CHECKING, Any

from salalocal.errors import (
    BackendError,
    BusyError,
    CheckpointError,
    ContextError,
    HubError,
    MemoryBudgetError,
    NumericError,
    PackError,
    RequestError,
    SalaLocalError,
    SettingsError,
    StateError,
)

if TYPE_CHECKING:
    from salalocal.engine.sampling_params import SamplingParams
    from salalocal.prompt.pack import PromptPack
    from salalocal.prompt.sources import read_sources
    from salalocal.session.events import Event, Finish, ReadProgress, TextDelta, ThinkingDelta, Usage
    from salalocal.session.runtime import Runtime, load
    from salalocal.session.session import Session, Turn

__version__ = "0.1.0"

_HOMES = {
    "salalocal.engine.sampling_params": ("SamplingParams",),
    "salalocal.prompt.pack": ("PromptPack",),
    "salalocal.prompt.sources": ("read_sources",),
    "salalocal.session.events": ("Event", "Finish", "ReadProgress", "TextDelta", "ThinkingDelta", "Usage"),
    "salalocal.session.runtime": ("Runtime", "load"),
    "salalocal.session.session": ("Session", "Turn"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BackendError",
    "BusyError",
    "CheckpointError",
    "ContextError",
    "Event",
    "Finish",
    "HubError",
    "MemoryBudgetError",
    "NumericError",
    "PackError",
    "PromptPack",
    "ReadProgress",
    "RequestError",
    "Runtime",
    "SalaLocalError",
    "SamplingParams",
    "Session",
    "SettingsError",
    "StateError",
    "TextDelta",
    "ThinkingDelta",
    "Turn",
    "Usage",
    "__version__",
    "load",
    "read_sources",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'salalocal' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
