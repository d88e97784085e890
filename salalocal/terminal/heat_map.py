"""A needle grid as a picture: a report goes in, a heat map of depth over length comes out; for `eval needle --plot`."""

from typing import TYPE_CHECKING

from salalocal.session.plan import short_tokens
from salalocal.terminal.picture import Picture

if TYPE_CHECKING:
    from salalocal.evals.questionnaire import Report

_CELL_WIDTH, _CELL_HEIGHT = 56, 24
_LEFT, _TOP, _RIGHT, _BOTTOM = 64, 56, 24, 60
_LOW, _HIGH = (178, 24, 43), (33, 102, 172)  # red to blue over near-white, which the colour-blind tell apart
_MIDDLE = (247, 247, 247)


def heat_map(report: "Report") -> Picture:
    """Lengths from left to right, depths from top to bottom; a cell says its share in percent and by its colour."""
    lengths = sorted({record["length"] for record in report.records})
    depths = sorted({record["depth"] for record in report.records})
    width = _LEFT + _CELL_WIDTH * len(lengths) + _RIGHT
    height = _TOP + _CELL_HEIGHT * len(depths) + _BOTTOM
    picture = Picture(max(width, 360), height)
    total = report.total
    low, high = total.interval
    model = str(report.identity["model"])
    picture.text(12, 22, f"needle: {model[-40:]}", 14)
    picture.text(
        12,
        40,
        f"{total.right} of {total.asked} right, {100 * total.share:.1f} % ({100 * low:.1f} to {100 * high:.1f} %)",
        11,
    )
    shares = report.shares("length", "depth")
    for row, depth in enumerate(depths):
        y = float(_TOP + _CELL_HEIGHT * row)
        picture.text(_LEFT - 6, y + 16, f"{depth:g} %", 11, "end")
        for column, length in enumerate(lengths):
            share = shares.get((length, depth))
            if share is None:
                continue
            x = float(_LEFT + _CELL_WIDTH * column)
            said = f"{length:,} tokens, depth {depth:g} %: {share.right} of {share.asked}"
            picture.rect(x, y, _CELL_WIDTH - 1, _CELL_HEIGHT - 1, _colour(share.share), said)
            ink = "#ffffff" if abs(share.share - 0.5) > 0.35 else "#222222"
            picture.text(x + _CELL_WIDTH / 2, y + 16, f"{100 * share.share:.0f}", 11, "middle", ink)
    bottom = _TOP + _CELL_HEIGHT * len(depths)
    for column, length in enumerate(lengths):
        x = _LEFT + _CELL_WIDTH * (column + 0.5)
        picture.text(x, bottom + 16, short_tokens(length), 11, "middle")
    picture.text(_LEFT, bottom + 38, "context in tokens; depth: share of the documents before the needle", 10)
    return picture


def _colour(share: float) -> str:
    """Red for 0, near-white for one half, blue for 1."""
    end, weight = (_LOW, 1 - 2 * share) if share < 0.5 else (_HIGH, 2 * share - 1)
    mixed = (round(middle + (far - middle) * weight) for middle, far in zip(_MIDDLE, end, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)
