"""The adapter for lm-evaluation-harness, where that is installed: requests in its form, results in its form."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_model

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from lm_eval.api.registry import get_model

from salalocal.evals.harness import SalaHarness
from salalocal.evals.likelihood import Likelihood


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


def test_the_harness_gets_what_the_model_says(tmp_path: Path, seed: int) -> None:
    folder = tiny_model.write_tiny_model(tmp_path / "model", seed)
    assert get_model("salalocal") is SalaHarness
    harness = SalaHarness.create_from_arg_string(f"model={folder},device=cpu", {"batch_size": 1})
    likelihood = Likelihood(harness._runtime)
    pairs = [("the value", " of data"), ("a file", " in"), ("the value", " of self"), ("the value", "")]
    found = harness.loglikelihood(requests(*pairs))
    for pair, (nats, is_greedy) in zip(pairs[:3], found, strict=False):
        assert (nats, is_greedy) == pytest.approx(likelihood.of_continuation(*likelihood.encode(*pair)), rel=1e-4)
    assert len(found) == 4
    assert harness.loglikelihood_rolling(requests(("the value of data",))) == [likelihood.of_text("the value of data")]
    whole, cut = harness.generate_until(
        requests(("the value", {"max_gen_toks": 9}), ("the value", {"until": "x", "max_gen_toks": 3}))
    )
    assert whole and len(cut) < len(whole)
    with pytest.raises(NotImplementedError):
        harness.apply_chat_template([])
