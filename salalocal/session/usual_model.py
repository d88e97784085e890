"""Which model is meant when nobody names one: settings go in, settings with a model and the reason come out; for the
commands.

A model that the user has named, by a flag, the environment or the settings file, stays. Else what a user does one step
after the other decides: nothing yet, a pulled model, a quantized copy of it.
"""

from collections.abc import Callable
from dataclasses import replace

from salalocal.checkpoint.hub import BUILTIN
from salalocal.checkpoint.hub_cache import CachedRepository
from salalocal.engine.budget import plan_memory
from salalocal.errors import SalaLocalError
from salalocal.session.catalog import ModelEntry, find_entry, list_models, made_of, plan_options
from salalocal.session.plan import RELEASED_MODEL
from salalocal.settings import DEFAULT_ORIGIN, Settings

Tell = Callable[[str], None]

_LEAST_TOKENS = 16_384  # a context that a model should hold to be chosen for a chat
_QUANTIZE = "salalocal quantize --bits 4"


def with_usual_model(settings: Settings, tell: Tell) -> Settings:
    """The model to chat with: the newest quantized copy of the released one; that one itself if it is here and fits on
    the card; else the built-in one. What would bring a better one is told.

    Raises: RequestError, BackendError for a device that is not here.
    """
    if settings.origin("model") != DEFAULT_ORIGIN:
        return settings
    copy = newest_copy()
    if copy is not None:
        return _chosen(settings, copy.name, f"the newest quantized copy of {RELEASED_MODEL}")
    original = pulled_original()
    if original is None:
        tell(f"no larger model is here; to get it: salalocal pull {RELEASED_MODEL}")
        return _chosen(settings, BUILTIN, "no other model is here")
    refusal = _why_not(settings, original)
    if refusal is None:
        return _chosen(settings, original.name, "it is here, and fits on the card as it is")
    tell(f"{original.name} is here, but {refusal}; for a copy that is smaller: {_QUANTIZE}")
    return _chosen(settings, BUILTIN, "no quantized model is here")


def with_usual_tokenizer(settings: Settings) -> Settings:
    """The model whose tokenizer counts: the same order, without asking what fits."""
    if settings.origin("model") != DEFAULT_ORIGIN:
        return settings
    found = newest_copy() or pulled_original()
    if found is None:
        return _chosen(settings, BUILTIN, "no other model is here")
    return _chosen(settings, found.name, "it is here")


def with_usual_plan(settings: Settings) -> Settings:
    """The model to plan for: a copy, the original, or the released shape if neither is here."""
    if settings.origin("model") != DEFAULT_ORIGIN:
        return settings
    copy = newest_copy()
    if copy is not None:
        return _chosen(settings, copy.name, f"the newest quantized copy of {RELEASED_MODEL}")
    return _chosen(settings, RELEASED_MODEL, "no MODEL given")


def with_usual_original(settings: Settings, tell: Tell) -> Settings:
    """The model to quantize, or to compare a copy with: the released one if it is here, else the one that the built-in
    4-bit model was made of."""
    if settings.origin("model") != DEFAULT_ORIGIN:
        return settings
    original = pulled_original()
    if original is not None:
        return _chosen(settings, original.name, "no --model given, and it is here")
    tell(f"{RELEASED_MODEL} is not here; to get it: salalocal pull {RELEASED_MODEL}")
    return _chosen(settings, f"{BUILTIN}:bf16", "no --model given")


def newest_copy() -> ModelEntry | None:
    """The quantized copy of the released model that was finished last, None if there is none."""
    copies = [entry for entry in list_models() if made_of(entry, RELEASED_MODEL) and entry.problem is None]
    return max(copies, key=lambda entry: entry.changed_s, default=None)


def pulled_original() -> ModelEntry | None:
    """The released model, if it is in the hub's cache and whole."""
    if CachedRepository.of(RELEASED_MODEL).model_folder() is None:
        return None
    try:
        entry = find_entry(RELEASED_MODEL)
    except SalaLocalError:
        return None
    return entry if entry.problem is None else None


def _why_not(settings: Settings, original: ModelEntry) -> str | None:
    """Why a model that is not quantized is not the one to chat with; None if it is."""
    from salalocal.device import device_memory, pick_device  # here, since it imports torch

    device = pick_device(settings.device)
    if device.type != "cuda":
        return "without a card it would take minutes for a page"
    if original.config is None:
        return "it cannot be read"
    free_bytes = device_memory(device).free_bytes
    needed = plan_memory(original.config, settings.ctx or _LEAST_TOKENS, plan_options(original, is_cuda=True))
    if needed.total_bytes <= free_bytes:
        return None
    return f"it needs {needed.total_bytes / 2**30:.1f} GiB, {free_bytes / 2**30:.1f} GiB of the card are free"


def _chosen(settings: Settings, model: str, reason: str) -> Settings:
    return replace(settings, model=model, origins={**settings.origins, "model": f"{DEFAULT_ORIGIN}: {reason}"})
