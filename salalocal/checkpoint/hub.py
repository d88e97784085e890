"""Where a model is: a name or a path comes in, a local folder and the variant in it go out; for `load`, `plan` and
every command with a model.

`NAME:VARIANT` means one form of a model that comes in several, such as `builtin:bf16`; see `checkpoint.folder`.

`ORG/NAME@REVISION` means a branch, a tag or a commit of a model of the hub; without it, `main`.

Nothing is downloaded here. The only paths built are the package's own `builtin`, the folder that the user typed, and
what `hub_cache` makes of an id that has passed a strict pattern.
"""

import re
from pathlib import Path

from salalocal.checkpoint.folder import ModelFolder, is_variant_name
from salalocal.checkpoint.hub_cache import DEFAULT_REVISION, CachedRepository, is_hub_id, is_revision
from salalocal.checkpoint.names import CONFIG_FILE
from salalocal.checkpoint.strict_json import one_line
from salalocal.errors import HubError
from salalocal.settings import models_folder

BUILTIN = "builtin"

__all__ = ["BUILTIN", "find_model", "is_builtin", "is_hub_id", "split_revision"]


def find_model(name_or_path: str | Path, offline: bool = False) -> ModelFolder:
    """The local folder of a model: `builtin`, a folder, the name of a model made here, or a hub id that is in the local
    Hugging Face cache; each with `:VARIANT` behind it for one of its variants.

    A folder wins over a hub id of the same spelling. `offline` says that a download is not wanted, for the hint.

    Raises: HubError if there is no such folder, id, cached copy or variant.
    """
    name, _, variant = str(name_or_path).rpartition(":")
    if isinstance(name_or_path, Path) or not name or not is_variant_name(variant) or _as_folder(name_or_path):
        return ModelFolder(_find_folder(name_or_path, offline))
    found = ModelFolder(_find_folder(name, offline), variant)
    if variant not in found.variants:
        known = ", ".join(f"{one_line(name)}{suffix}" for suffix in ("", *(f":{known}" for known in found.variants)))
        raise HubError(f"model '{one_line(name_or_path)}': there is no variant {variant}", f"choose from {known}")
    return found


def is_builtin(name_or_path: str | Path) -> bool:
    """Whether a name means the package's own model, in whichever variant."""
    return str(name_or_path).partition(":")[0] == BUILTIN


def _find_folder(name_or_path: str | Path, offline: bool) -> Path:
    if name_or_path == BUILTIN:
        return _builtin_folder()
    folder = _as_folder(name_or_path)
    if folder is not None:
        if not (folder / CONFIG_FILE).is_file():
            raise HubError(
                f"{one_line(folder, 160)}: no model folder, {CONFIG_FILE} is missing",
                "name a model folder, a hub id such as openbmb/MiniCPM-SALA, or builtin",
            )
        return folder
    name = str(name_or_path)
    if not isinstance(name_or_path, Path) and is_kept_name(name) and (models_folder() / name / CONFIG_FILE).is_file():
        return models_folder() / name
    hub_id, revision = split_revision(name)
    if isinstance(name_or_path, Path) or not is_hub_id(hub_id) or not is_revision(revision):
        raise HubError(
            f"model '{one_line(name)}': no such folder, and not a hub id",
            "name a model folder, a hub id such as openbmb/MiniCPM-SALA, or builtin",
        )
    return _cached_folder(hub_id, revision, offline)


def is_kept_name(name: str) -> bool:
    """Whether a text can name a folder among the models made here: one plain name."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9@._-]{0,200}", name) is not None and ".." not in name


def split_revision(name: str) -> tuple[str, str]:
    """`ORG/NAME@REVISION` in its two parts; `main` where there is no revision."""
    hub_id, at, revision = name.partition("@")
    return hub_id, revision if at else DEFAULT_REVISION


def _as_folder(name_or_path: str | Path) -> Path | None:
    try:
        folder = Path(name_or_path).expanduser()
        return folder if str(name_or_path) and folder.is_dir() else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL inside, ~ of an unknown user
        return None


def _builtin_folder() -> Path:
    folder = Path(__file__).resolve().parents[1] / BUILTIN
    if not (folder / CONFIG_FILE).is_file():
        raise HubError(
            "model 'builtin': this installation has no embedded model", "reinstall salalocal, or name a model"
        )
    return folder


def _cached_folder(hub_id: str, revision: str, offline: bool) -> Path:
    from huggingface_hub import constants

    folder = CachedRepository.of(hub_id).model_folder(revision)
    if folder is not None:
        return folder
    name = hub_id if revision == DEFAULT_REVISION else f"{hub_id}@{revision}"
    command = f"salalocal pull {hub_id}" + ("" if revision == DEFAULT_REVISION else f" --revision {revision}")
    is_offline = offline or constants.HF_HUB_OFFLINE
    raise HubError(
        f"model {name!r}: not in the local Hugging Face cache",
        f"when online, fetch it once with: {command}" if is_offline else f"fetch it with: {command}",
    )
