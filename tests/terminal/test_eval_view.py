"""An evaluation on screen: lines in a pipe, a bar on a terminal, the figures in three lines."""

import io

import pytest

from salalocal.evals.comparison import EvalProgress
from salalocal.terminal.console import make_terminal
from salalocal.terminal.eval_view import EvalView, divergence_lines


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def progress(num_tokens: int, elapsed_s: float) -> EvalProgress:
    return EvalProgress("original" if num_tokens <= 500 else "quantized", num_tokens, 1000, elapsed_s)


def test_a_pipe_gets_a_line_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    err, clock = io.StringIO(), 0.0
    monkeypatch.setattr("salalocal.terminal.live_bar.time.monotonic", lambda: clock)
    view = EvalView(make_terminal(err=err, out=io.StringIO()))
    for step in range(1, 11):
        clock += 3.0
        view.show(progress(100 * step, 3.0 * step))
    assert err.getvalue().splitlines() == [
        "evaluating: original model, 30%, 33 tok/s, 21 s left",
        "evaluating: original model, 50%, 33 tok/s, 15 s left",
        "evaluating: quantized model, 70%, 33 tok/s, 9.0 s left",
        "evaluating: quantized model, 90%, 33 tok/s, 3.0 s left",
        "evaluated in 30 s, 33 tok/s",
    ]


def test_keys_are_not_echoed_under_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """An echoed ^C would begin a new line, and the bar could not be taken away."""
    calls: list[str] = []

    class Echo:
        def __init__(self) -> None:
            calls.append("off")

        def restore(self) -> None:
            calls.append("on")

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("salalocal.terminal.live_bar.EchoSwitch", Echo)
    view = EvalView(make_terminal(err=Tty(), out=io.StringIO()))
    assert calls == []
    view.show(progress(100, 1.0))
    view.show(progress(100, 1.0))
    assert calls == ["off"]
    view.close()
    view.close()
    assert calls == ["off", "on"]


def test_quiet_shows_nothing() -> None:
    err = io.StringIO()
    view = EvalView(make_terminal(is_quiet=True, err=err, out=io.StringIO()))
    for step in range(1, 11):
        view.show(progress(100 * step, 3.0 * step))
    view.close()
    assert err.getvalue() == ""


@pytest.mark.parametrize(("width", "share"), [(40, "60%"), (80, "600/1,000")])
def test_a_terminal_gets_a_bar_that_fits_and_goes_away(monkeypatch: pytest.MonkeyPatch, width: int, share: str) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    err = Tty()
    view = EvalView(make_terminal(err=err, out=io.StringIO()))
    view.show(progress(100, 1.0))
    view.show(progress(600, 6.0))
    view.close()
    drawn = err.getvalue()
    assert "quantized model, 60%, 100 tok/s" in drawn and share in drawn
    rows = [part for line in drawn.split("\n") for part in line.split("\r")]
    assert all(len(part.split("\x1b")[0]) <= width for part in rows)


def test_figures_in_three_lines() -> None:
    figures = {
        "perplexity_original": 10.0,
        "perplexity_quantized": 10.25,
        "kl_mean_nats": 0.03061,
        "kl_p99_nats": 0.4127,
        "top1_agreement": 0.9104,
        "num_tokens": 32_000,
    }
    assert list(divergence_lines(figures)) == [
        "perplexity      10.000 -> 10.250 (+2.50 %)",
        "KL divergence   0.0306 nats a token, 99th percentile 0.413",
        "top-1 agreement 91.0 % of 32,000 tokens",
    ]
