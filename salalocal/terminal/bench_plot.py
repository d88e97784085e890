"""A benchmark as a picture: first token and decoding against the context; a report comes in, a Picture goes out."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from salalocal.bench.report import BenchReport
from salalocal.session.plan import short_tokens
from salalocal.terminal.bench_view import duration_s, rate
from salalocal.terminal.picture import Picture

_WIDTH, _HEIGHT = 960, 420
_LEFT, _TOP, _BOTTOM, _GAP = 60, 84, 48, 76
_GRID, _AXIS, _WORDS = "#e5e7eb", "#9ca3af", "#4b5563"
_COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2")
_MAX_LABELS = 8
_MIN_LABEL_DISTANCE = 34.0

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Series:
    """One line of both panels: tokens of context with seconds, and with tokens a second."""

    name: str
    first_token_s: Points
    decode_tokens_per_s: Points
    is_projection: bool = False


@dataclass(frozen=True)
class _Panel:
    """A panel and its scales."""

    picture: Picture
    is_more_better: bool
    left: float
    width: float
    x: Callable[[float], float]
    y: Callable[[float], float]


def plot_bench(report: BenchReport) -> Picture:
    """Two panels side by side: seconds to the first token, both axes logarithmic; tokens drawn a second."""
    picture = Picture(_WIDTH, _HEIGHT)
    series = list(_series(report))
    depths = sorted({tokens for one in series for tokens, _ in one.first_token_s})
    width = (_WIDTH - _LEFT - _GAP - 24) / 2
    machine = report.machine.gpu_info or report.machine.cpu_info
    picture.text(_LEFT - 36, 24, f"salalocal bench on {machine}", 15)
    _legend(picture, series)
    if depths:
        seconds = [value for one in series for _, value in one.first_token_s]
        rates = [value for one in series for _, value in one.decode_tokens_per_s]
        first = _log_panel(picture, _LEFT, width, depths, seconds)
        second = _linear_panel(picture, _LEFT + width + _GAP, width, depths, rates)
        for number, one in enumerate(series):
            _draw(first, one.first_token_s, number, one, duration_s)
            _draw(second, one.decode_tokens_per_s, number, one, lambda value: f"{rate(value)} tok/s")
        _draw_failures(first, report, depths)
    return picture


def _series(report: BenchReport) -> Iterator[Series]:
    for result in report.results:
        yield Series(
            result.facts.description,
            [(depth.num_tokens, depth.first_token_s) for depth in result.depths],
            [(depth.num_tokens, 1 / depth.token_s) for depth in result.depths],
        )
    projections = report.projections
    for card, subject in dict.fromkeys((one.card, one.subject) for one in projections):
        rows = [one for one in projections if (one.card, one.subject) == (card, subject)]
        yield Series(
            f"{subject} on {card}: projection, not measured",
            [(row.num_tokens, row.first_token_s) for row in rows],
            [(row.num_tokens, row.decode_tokens_per_s) for row in rows],
            is_projection=True,
        )


def _legend(picture: Picture, series: Sequence[Series]) -> None:
    for number, one in enumerate(series[: len(_COLOURS)]):
        x, y = _LEFT - 36 + number % 2 * _WIDTH / 2, 46 + number // 2 * 16
        picture.line([(x, y - 4), (x + 24, y - 4)], _COLOURS[number], 2.5, is_dashed=one.is_projection)
        picture.text(x + 30, y, one.name, 11, fill=_WORDS)


def _log_panel(picture: Picture, left: float, width: float, depths: Sequence[int], values: Sequence[float]) -> _Panel:
    low, high = math.log10(min(values)) - 0.3, math.log10(max(values)) + 0.15
    panel = _Panel(
        picture,
        False,
        left,
        width,
        _x_scale(left, width, depths),
        lambda value: _y_of((math.log10(value) - low) / (high - low)),
    )
    _frame(panel, "first token", depths)
    ticks = [base * 10.0**power for power in range(-4, 7) for base in (1, 2, 5)]
    inside = [tick for tick in ticks if low <= math.log10(tick) <= high]
    for tick in inside[:: max(1, len(inside) // 7)]:
        _tick(panel, tick, f"{tick:g} s")
    return panel


def _linear_panel(
    picture: Picture, left: float, width: float, depths: Sequence[int], values: Sequence[float]
) -> _Panel:
    high = max(values) * 1.1
    panel = _Panel(picture, True, left, width, _x_scale(left, width, depths), lambda value: _y_of(value / high))
    _frame(panel, "decoding, tokens a second", depths)
    step = next(base * 10.0**power for power in range(-4, 9) for base in (1, 2, 5) if high / (base * 10.0**power) <= 6)
    for number in range(int(high / step) + 1):
        _tick(panel, number * step, f"{number * step:g}")
    return panel


def _x_scale(left: float, width: float, depths: Sequence[int]) -> Callable[[float], float]:
    low, high = math.log2(depths[0]) - 0.3, math.log2(depths[-1]) + 0.3
    return lambda tokens: left + width * (math.log2(tokens) - low) / (high - low)


def _y_of(share: float) -> float:
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP - 24)


def _frame(panel: _Panel, title: str, depths: Sequence[int]) -> None:
    picture, floor = panel.picture, float(_HEIGHT - _BOTTOM)
    picture.text(panel.left, _TOP + 12, title, 12, fill=_WORDS)
    picture.line([(panel.left, floor), (panel.left + panel.width, floor)], _AXIS, 1)
    last_x = -math.inf
    for tokens in depths:
        x = panel.x(tokens)
        picture.line([(x, floor), (x, floor + 4)], _AXIS, 1)
        if x - last_x >= _MIN_LABEL_DISTANCE:
            picture.text(x, floor + 18, short_tokens(tokens), 11, "middle", _WORDS)
            last_x = x
    picture.text(panel.left + panel.width / 2, floor + 36, "tokens of context", 11, "middle", _WORDS)


def _tick(panel: _Panel, value: float, label: str) -> None:
    y = panel.y(value)
    panel.picture.line([(panel.left, y), (panel.left + panel.width, y)], _GRID, 1)
    panel.picture.text(panel.left - 6, y + 4, label, 10, "end", _WORDS)


def _draw(panel: _Panel, points: Points, number: int, series: Series, shown: Callable[[float], str]) -> None:
    colour = _COLOURS[number % len(_COLOURS)]
    places = [(panel.x(tokens), panel.y(value)) for tokens, value in points]
    if len(places) > 1:
        panel.picture.line(places, colour, 2.5, is_dashed=series.is_projection)
    for (x, y), (tokens, value) in zip(places, points, strict=True):
        panel.picture.dot(x, y, 3.5, colour, f"{series.name}, {short_tokens(tokens)}: {shown(value)}")
        if not series.is_projection and len(points) <= _MAX_LABELS:
            is_above = (number == 0) == panel.is_more_better  # the first line is the better one as a rule
            label = shown(value).removesuffix(" tok/s")
            panel.picture.text(x, y - 9 if is_above else y + 18, label, 10, "middle", colour)


def _draw_failures(panel: _Panel, report: BenchReport, depths: Sequence[int]) -> None:
    """Where a subject ran out of memory, at the depth that it did not reach."""
    for number, result in enumerate(report.results):
        for failure in result.failures[:1]:
            if depths[0] <= failure.num_tokens <= depths[-1]:
                x, colour = panel.x(failure.num_tokens), _COLOURS[number % len(_COLOURS)]
                panel.picture.line([(x, _TOP + 24), (x, _HEIGHT - _BOTTOM)], colour, 1, is_dashed=True)
                panel.picture.text(
                    x - 4, _HEIGHT - _BOTTOM - 8, f"{result.facts.name}: out of memory", 10, "end", colour
                )
