"""The table of a run: its last row is always shown, and everything that is not a row of the curve."""

from training.curve import lines


def test_the_last_row_and_all_checks_are_shown() -> None:
    rows = [{"step": n, "rate": 0.1, "answer": n / 10, "=where": 0.5} for n in range(40)]
    log = [{"begins_from": "x"}, *rows, {"check": 2048, "text": 2.5}, {"finished": True}]
    shown = list(lines(log, 4))
    assert len(shown) <= 4 + 2 + 4
    assert any(line.split()[0] == "39" and "3.9" in line for line in shown)
    assert "begins_from: x" in shown[1] and "check: 2048 text: 2.5" in shown and "finished: True" in shown
    assert max(map(len, shown)) <= 200
