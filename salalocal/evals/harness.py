"""The model `salalocal` for EleutherAI's lm-evaluation-harness, which brings tasks of its own.

    pip install -e '.[harness]'
    python -m salalocal.evals.harness --model salalocal --model_args model=builtin --tasks lambada_openai

Arguments are those of `lm_eval`, `--device` among them; `--model_args` takes `model`, `dtype`, `math` and `kv_cache`.
Requests run one after the other, and nothing is truncated. Needs the package lm-eval, so nothing else imports this
file.
"""

from collections.abc import Sequence
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from salalocal.checkpoint.hub import find_model
from salalocal.evals.likelihood import Likelihood
from salalocal.session.runtime import LoadOptions, open_runtime

_MAX_TOKENS = 256  # of an answer, where a task names no number


@register_model("salalocal")
class SalaHarness(LM):  # type: ignore[misc]
    """A salalocal model as the harness wants one. Raises: as `open_runtime`."""

    def __init__(
        self,
        model: str = "builtin",
        device: str | None = None,
        dtype: str | None = None,
        math: str | None = None,
        kv_cache: str | None = None,
        **_ignored: Any,
    ) -> None:
        super().__init__()
        options = LoadOptions(device, dtype, math=math, kv_cache=kv_cache)
        self._runtime = open_runtime(find_model(model), model, options)
        self._likelihood = Likelihood(self._runtime)

    def loglikelihood(self, requests: Sequence[Any], **_ignored: Any) -> list[tuple[float, bool]]:
        """The log-likelihood of continuations, and whether they are greedy; equal contexts are read once."""
        encoded = [self._likelihood.encode(*request.args) for request in requests]
        results: list[tuple[float, bool]] = [(0.0, True)] * len(encoded)
        for index in sorted(range(len(encoded)), key=lambda i: encoded[i][0]):
            if encoded[index][1]:
                results[index] = self._likelihood.of_continuation(*encoded[index])
            self.cache_hook.add_partial("loglikelihood", requests[index].args, results[index])
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], **_ignored: Any) -> list[float]:
        """The log-likelihood of whole texts."""
        return [self._likelihood.of_text(request.args[0]) for request in requests]

    def generate_until(self, requests: Sequence[Any], **_ignored: Any) -> list[str]:
        """Completions up to a stop text."""
        return [self._complete(*request.args) for request in requests]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Refuses: a text cannot hold control tokens here, so a chat in one text would be none."""
        raise NotImplementedError("use salalocal without --apply_chat_template")

    def _complete(self, context: str, settings: dict[str, Any]) -> str:
        until = settings.get("until") or []
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        max_tokens = next((settings[name] for name in names if settings.get(name)), _MAX_TOKENS)
        temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0
        return self._likelihood.complete(context, [until] if isinstance(until, str) else until, max_tokens, temperature)


if __name__ == "__main__":
    cli_evaluate()
