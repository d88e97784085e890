"""A drawing of rectangles, lines and words: figures go in, an SVG or PNG file comes out; for plots and heat maps.

The SVG is written here. A PNG is painted by Pillow, which the extra `plot` installs.
Units: pixels from the upper left corner; a text stands on its y.
"""

import errno
import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.sax.saxutils import escape, quoteattr

from salalocal.durable import replace_file
from salalocal.errors import RequestError, StateError
from salalocal.prompt.visible import visible

Point = tuple[float, float]
Anchor = Literal["start", "middle", "end"]

_BACKGROUND = "#ffffff"
_INK = "#222222"
_OVERSAMPLING = 3  # a PNG is painted so many times larger and scaled down, which smooths its edges
_PIXELS = 2  # of a PNG for one of the drawing's
_DASH = (6.0, 4.0)
_FONTS = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
_PILLOW_ANCHORS: dict[Anchor, str] = {"start": "ls", "middle": "ms", "end": "rs"}
_ENDINGS = (".svg", ".png")


@dataclass(frozen=True)
class _Shape:
    """One thing drawn, in both languages."""

    svg: str
    paint: Callable[[Any, float], None]


class Picture:
    """A drawing on a white ground; later shapes cover earlier ones."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._shapes: list[_Shape] = []

    def rect(self, x: float, y: float, width: float, height: float, fill: str, title: str = "") -> None:
        """A filled rectangle; a viewer of the SVG shows its title under the pointer."""
        inner = f"<title>{_plain(title)}</title>" if title else ""
        svg = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}">{inner}</rect>'

        def paint(draw: Any, zoom: float) -> None:
            draw.rectangle([x * zoom, y * zoom, (x + width) * zoom - 1, (y + height) * zoom - 1], fill=fill)

        self._shapes.append(_Shape(svg, paint))

    def line(self, points: Sequence[Point], stroke: str, width: float = 1.5, is_dashed: bool = False) -> None:
        """A line through points."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        dash = f' stroke-dasharray="{_DASH[0]:g} {_DASH[1]:g}"' if is_dashed else ""
        svg = f'<polyline points="{path}" fill="none" stroke="{stroke}" stroke-width="{width:g}"{dash}/>'
        pieces = list(_dashes(points)) if is_dashed else [tuple(points)]

        def paint(draw: Any, zoom: float) -> None:
            for piece in pieces:
                scaled = [(x * zoom, y * zoom) for x, y in piece]
                draw.line(scaled, fill=stroke, width=max(1, round(width * zoom)), joint="curve")

        self._shapes.append(_Shape(svg, paint))

    def dot(self, x: float, y: float, radius: float, fill: str, title: str = "") -> None:
        """A filled circle around a point."""
        inner = f"<title>{_plain(title)}</title>" if title else ""
        svg = f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{fill}">{inner}</circle>'

        def paint(draw: Any, zoom: float) -> None:
            box = [(x - radius) * zoom, (y - radius) * zoom, (x + radius) * zoom, (y + radius) * zoom]
            draw.ellipse(box, fill=fill)

        self._shapes.append(_Shape(svg, paint))

    def text(self, x: float, y: float, text: str, size: float = 12, anchor: Anchor = "start", fill: str = _INK) -> None:
        """A line of words that begins, has its middle, or ends at x."""
        shown = visible(text)
        style = f'font-size="{size:g}" text-anchor="{anchor}" fill="{fill}"'
        svg = f'<text x="{x:g}" y="{y:g}" {style}>{escape(shown)}</text>'

        def paint(draw: Any, zoom: float) -> None:
            from PIL import ImageFont

            font = ImageFont.load_default(size * zoom)
            draw.text((x * zoom, y * zoom), shown, fill=fill, font=font, anchor=_PILLOW_ANCHORS[anchor])

        self._shapes.append(_Shape(svg, paint))

    def svg(self) -> str:
        """The drawing as an SVG document."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" '
            f'viewBox="0 0 {self.width} {self.height}" font-family={quoteattr(_FONTS)}>'
        )
        ground = f'<rect width="{self.width}" height="{self.height}" fill="{_BACKGROUND}"/>'
        return "\n".join([head, ground, *(shape.svg for shape in self._shapes), "</svg>\n"])

    def save(self, path: Path) -> None:
        """Write the drawing in the format that the name ends in.

        Raises: RequestError as `check_picture`, or if the file cannot be written; StateError if there is no room.
        """
        check_picture(path)
        data = self._png() if path.suffix.lower() == ".png" else self.svg().encode()
        try:
            replace_file(path, lambda file: file.write(data))
        except OSError as error:
            message = f"{path}: cannot write: {error.strerror or error}"
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise StateError(message, "make room, or name a file elsewhere") from error
            raise RequestError(message, "name another file") from error

    def _png(self) -> bytes:
        from PIL import Image, ImageDraw

        zoom = _PIXELS * _OVERSAMPLING
        image = Image.new("RGB", (self.width * zoom, self.height * zoom), _BACKGROUND)
        draw = ImageDraw.Draw(image)
        for shape in self._shapes:
            shape.paint(draw, zoom)
        image = image.resize((self.width * _PIXELS, self.height * _PIXELS), Image.Resampling.BOX)
        stream = io.BytesIO()
        image.save(stream, "png", optimize=True)
        return stream.getvalue()


def check_picture(path: Path) -> None:
    """Whether a picture can be written there, to be asked before long work.

    Raises: RequestError for an ending that is not known, a folder that is not there, or a PNG without Pillow.
    """
    if path.suffix.lower() not in _ENDINGS:
        raise RequestError(f"{path}: pictures are written as {' or '.join(_ENDINGS)}", f"for example {path.stem}.svg")
    if not path.parent.is_dir():
        raise RequestError(f"{path}: there is no folder {path.parent}", f"mkdir -p {path.parent}")
    if path.suffix.lower() == ".png":
        try:
            import PIL.ImageFont  # noqa: F401
        except ImportError:
            raise RequestError(
                f"{path}: PNG needs Pillow, which is not installed", "pip install Pillow, or name a .svg"
            ) from None


def _dashes(points: Sequence[Point]) -> list[tuple[Point, Point]]:
    """The strokes of a dashed line, where one dash may turn a corner as two."""
    strokes: list[tuple[Point, Point]] = []
    is_stroke, left = True, _DASH[0]
    for (x, y), (end_x, end_y) in itertools.pairwise(points):
        length = ((end_x - x) ** 2 + (end_y - y) ** 2) ** 0.5
        done = 0.0
        while done < length:
            step = min(left, length - done)
            ends = [done / length, (done + step) / length]
            if is_stroke:
                first, last = ((x + (end_x - x) * share, y + (end_y - y) * share) for share in ends)
                strokes.append((first, last))
            done, left = done + step, left - step
            if left <= 0:
                is_stroke = not is_stroke
                left = _DASH[0] if is_stroke else _DASH[1]
    return strokes


def _plain(text: str) -> str:
    return escape(visible(text))
