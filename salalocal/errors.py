"""Every error that salalocal raises on purpose; for all rooms.

SalaLocalError
|- RequestError      usage: a flag, a field or a call that makes no sense          exit 2
|- SettingsError     an environment variable or settings file that cannot be used  exit 2
|- MemoryBudgetError does not fit in memory                                         exit 3
|- PackError         bad, damaged or too large input files                          exit 4
|- ContextError      more tokens than the context holds                             exit 4
|- CheckpointError   a model folder that is damaged, incomplete or unsupported      exit 4
|- StateError        a saved state of another model, or damaged                     exit 4
|- HubError          a model that is not here and could not be fetched              exit 5
|- BackendError      device, driver or kernel limits                                exit 6
|- NumericError      NaN or Inf where numbers were due                              exit 7
`- BusyError         locked by another process                                      exit 8
"""


class SalaLocalError(Exception):
    """An error with an answer: `message` says what, where and why; `hint` says what to do."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class RequestError(SalaLocalError):
    """A flag, a field or a call that makes no sense."""

    exit_code = 2


class SettingsError(SalaLocalError):
    """An environment variable or a settings file that cannot be used."""

    exit_code = 2


class MemoryBudgetError(SalaLocalError):
    """The request does not fit in memory."""

    exit_code = 3


class PackError(SalaLocalError):
    """Input files that are bad, damaged or too large."""

    exit_code = 4


class ContextError(SalaLocalError):
    """More tokens than the context holds."""

    exit_code = 4


class CheckpointError(SalaLocalError):
    """A model folder that is damaged, incomplete or not supported."""

    exit_code = 4


class StateError(SalaLocalError):
    """A saved state that belongs to another model or is damaged."""

    exit_code = 4


class HubError(SalaLocalError):
    """A model that is not on this machine and could not be fetched."""

    exit_code = 5


class BackendError(SalaLocalError):
    """A device, a driver or a kernel cannot do what was asked."""

    exit_code = 6


class NumericError(SalaLocalError):
    """NaN or infinity where numbers were due."""

    exit_code = 7


class BusyError(SalaLocalError):
    """Locked by another process."""

    exit_code = 8
