"""How an answer is drawn, as plain numbers; for commands, sessions and the sampler.

No torch here, so that a command can refuse a value before it reads a file.
"""

from dataclasses import dataclass

from salalocal.errors import RequestError

MAX_TOKENS = 2**31 - 1


@dataclass(frozen=True)
class SamplingParams:
    """How an answer is drawn; temperature 0 is greedy. Units: max_tokens in tokens of the answer, at least one.

    Raises: RequestError that names a field that makes no sense.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 1024
    seed: int | None = None
    is_loop_guarded: bool = True

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0, 100)
        _check_number("top_p", self.top_p, 0, 1)
        _check_number("min_p", self.min_p, 0, 1)
        if self.top_p == 0:
            raise RequestError("top_p should be above 0, is 0", "1 turns it off; for greedy decoding use temperature 0")
        _check_whole("top_k", self.top_k, 0, MAX_TOKENS)
        _check_whole("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        if self.seed is not None:
            _check_whole("seed", self.seed, 0, 2**63 - 1)


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RequestError(f"{name} should be a number from {low} to {high}, is {str(value)[:40]!r}")


def _check_whole(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise RequestError(f"{name} should be a whole number from {low} to {high}, is {str(value)[:40]!r}")
