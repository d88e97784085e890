"""A quantization on screen: lines in a pipe, a bar on a terminal, the card as a table."""

import io
from pathlib import Path

import pytest

from salalocal.quant.quantizer import StepProgress
from salalocal.session.quantizing import QuantizedModel
from salalocal.terminal.console import make_terminal
from salalocal.terminal.quantize_view import QuantizeView, card_json, card_lines

GIB = 2**30


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def progress(step: int, **changes: object) -> StepProgress:
    values: dict[str, object] = {
        "step": step,
        "num_steps": 6,
        "name": f"layer {step - 2}",
        "error": 0.1 + step / 1000,
        "elapsed_s": 2.0 * step,
        "left_s": 2.0 * (6 - step),
        "peak_bytes": 3 * GIB,
        "is_resumed": False,
    }
    return StepProgress(**values | changes)  # type: ignore[arg-type]


def test_a_pipe_gets_a_line_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    err, clock = io.StringIO(), 0.0
    monkeypatch.setattr("salalocal.terminal.live_bar.time.monotonic", lambda: clock)
    view = QuantizeView(make_terminal(err=err, out=io.StringIO()))
    view.show(progress(1, name="embedding", error=None, left_s=None))
    for step in range(2, 7):
        clock += 3.0
        view.show(progress(step))
    assert err.getvalue().splitlines() == [
        "quantizing: 3 of 6 steps, layer 1, error 0.1030, 6.0 s left, peak memory 3.0 GiB",
        "quantizing: 5 of 6 steps, layer 3, error 0.1050, 2.0 s left, peak memory 3.0 GiB",
        "quantized in 12 s, peak memory 3.0 GiB",
    ]


def test_where_an_earlier_run_stopped_is_told_once() -> None:
    err = io.StringIO()
    view = QuantizeView(make_terminal(err=err, out=io.StringIO()))
    for step in range(1, 7):
        view.show(progress(step, is_resumed=step <= 3, peak_bytes=0))
    assert err.getvalue() == "going on: 3 of 6 steps were done before\nquantized in 12 s\n"


def test_memory_of_a_card_is_shown_beside_that_of_the_host() -> None:
    err = io.StringIO()
    view = QuantizeView(make_terminal(err=err, out=io.StringIO()))
    view.show(progress(6, device_peak_bytes=9 * GIB))
    assert err.getvalue() == "quantized in 12 s, peak memory 3.0 GiB, on the card 9.0 GiB\n"


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
    view = QuantizeView(make_terminal(err=Tty(), out=io.StringIO()))
    assert calls == []
    view.show(progress(2))
    view.show(progress(2))
    assert calls == ["off"]
    view.close()
    view.close()
    assert calls == ["off", "on"]


def test_quiet_shows_nothing() -> None:
    err = io.StringIO()
    view = QuantizeView(make_terminal(is_quiet=True, err=err, out=io.StringIO()))
    for step in range(1, 7):
        view.show(progress(step, is_resumed=step < 3))
    view.close()
    assert err.getvalue() == ""


@pytest.mark.parametrize("width", [40, 80])
def test_a_terminal_gets_a_bar_that_fits_and_goes_away(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    err = Tty()
    view = QuantizeView(make_terminal(err=err, out=io.StringIO()))
    view.show(progress(1, error=None, left_s=None, name="embedding"))
    view.show(progress(4))
    view.close()
    drawn = err.getvalue()
    assert "layer 2, error 0.1040" in drawn and "4/6" in drawn
    rows = [part for line in drawn.split("\n") for part in line.split("\r")]
    assert all(len(part.split("\x1b")[0]) <= width for part in rows)


def model(has_outputs: bool) -> QuantizedModel:
    outputs = (0.03, 0.05) if has_outputs else (None, None)
    errors = {
        "model.layers.0.mlp.up_proj.weight": {"weights": 0.1, "outputs": outputs[0]},
        "model.layers.1.mlp.up_proj.weight": {"weights": 0.2, "outputs": outputs[1]},
        "model.layers.1.self_attn.o_gate.weight": {"weights": 0.12, "outputs": outputs[0]},
    }
    identity = {"options": {"method": "gptq", "bits": 4, "group_size": 128}}
    sizes = {"source_bytes": 18 * GIB, "result_bytes": 5 * GIB}
    return QuantizedModel(Path("/models/my copy"), {"identity": identity, **sizes, "relative_errors": errors})


def test_the_card_has_a_line_for_each_kind_of_matrix() -> None:
    assert list(card_lines(model(has_outputs=False))) == [
        "gptq, 4 bits, groups of 128",
        "18.0 GiB -> 5.0 GiB",
        "",
        "relative error  weights: mean   worst",
        "up_proj                0.1500  0.2000",
        "o_gate                 0.1200  0.1200",
        "all                    0.1400  0.2000",
        "",
        "salalocal chat --model '/models/my copy'",
    ]
    assert "up_proj                0.1500  0.2000        0.0400  0.0500" in card_lines(model(has_outputs=True))


def test_what_was_lost_on_text_stands_below_the_errors() -> None:
    made = model(has_outputs=False)
    quality = {"perplexity_original": 10.0, "perplexity_quantized": 10.5, "kl_mean_nats": 0.1, "kl_p99_nats": 0.9}
    made.card["quality"] = quality | {"top1_agreement": 0.9, "num_tokens": 4095}
    assert list(card_lines(made))[-5:] == [
        "perplexity      10.000 -> 10.500 (+5.00 %)",
        "KL divergence   0.1000 nats a token, 99th percentile 0.900",
        "top-1 agreement 90.0 % of 4,095 tokens",
        "",
        "salalocal chat --model '/models/my copy'",
    ]


def test_one_scale_a_row_is_said_in_words() -> None:
    made = model(has_outputs=False)
    made.card["identity"]["options"]["group_size"] = -1
    assert next(card_lines(made)) == "gptq, 4 bits, one scale a row"


def test_the_card_as_plain_data_names_the_folder() -> None:
    made = model(has_outputs=True)
    assert card_json(made) == {"folder": "/models/my copy", **made.card}
