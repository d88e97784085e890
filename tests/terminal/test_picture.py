"""Pictures: an SVG that any XML reader takes, a PNG that shows what was drawn, and refusals that say what to do."""

import errno
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from salalocal.errors import RequestError, StateError
from salalocal.terminal.picture import Picture, check_picture

SVG = "{http://www.w3.org/2000/svg}"


def drawn() -> Picture:
    picture = Picture(120, 60)
    picture.rect(10, 10, 20, 30, "#ff0000", title='a < b & "c"')
    picture.line([(40, 10), (40, 50)], "#00ff00", 4)
    picture.line([(50, 5), (110, 5)], "#0000ff", 2, is_dashed=True)
    picture.dot(80, 30, 6, "#123456")
    picture.text(60, 55, "x < y \x1b[2J", 10, "middle")
    return picture


def test_svg_is_xml_and_holds_every_shape() -> None:
    root = ElementTree.fromstring(drawn().svg())
    kinds = [child.tag.removeprefix(SVG) for child in root]
    assert kinds == ["rect", "rect", "polyline", "polyline", "circle", "text"]
    assert root[1][0].text == 'a < b & "c"'
    assert root[5].text is not None and root[5].text.startswith("x < y ") and "\x1b" not in root[5].text
    assert root[3].get("stroke-dasharray") and not root[2].get("stroke-dasharray")
    assert (root.get("width"), root.get("viewBox")) == ("120", "0 0 120 60")


def test_png_shows_the_same(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image")
    drawn().save(tmp_path / "plot.PNG")
    image = image_module.open(tmp_path / "plot.PNG").convert("RGB")
    assert image.size == (240, 120)
    assert image.getpixel((40, 50)) == (255, 0, 0)
    assert image.getpixel((80, 60)) == (0, 255, 0)
    assert image.getpixel((160, 60)) == (0x12, 0x34, 0x56)
    assert image.getpixel((230, 60)) == (255, 255, 255)
    row = [image.getpixel((x, 10)) for x in range(102, 218)]
    assert (0, 0, 255) in row and (255, 255, 255) in row
    words = image.crop((60, 90, 180, 120))
    assert min(words.convert("L").tobytes()) < 100


def test_svg_needs_no_pillow_and_png_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "PIL"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "PIL", None)
    drawn().save(tmp_path / "plot.svg")
    ElementTree.parse(tmp_path / "plot.svg")
    with pytest.raises(RequestError, match="Pillow") as caught:
        drawn().save(tmp_path / "plot.png")
    assert "pip install Pillow" in caught.value.hint
    assert not (tmp_path / "plot.png").exists()


@pytest.mark.parametrize("name", ["plot.pdf", "plot", "missing/plot.svg"])
def test_other_places_are_refused_before_work(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError):
        check_picture(tmp_path / name)
    with pytest.raises(RequestError):
        drawn().save(tmp_path / name)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "plot.svg").mkdir()
    with pytest.raises(RequestError, match=r"plot\.svg: cannot write"):
        drawn().save(tmp_path / "plot.svg")


def test_a_full_disk_is_no_mistake_in_the_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, write: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("salalocal.terminal.picture.replace_file", full)
    with pytest.raises(StateError, match=r"plot\.svg: cannot write: No space left") as caught:
        drawn().save(tmp_path / "plot.svg")
    assert caught.value.exit_code == 4 and "make room" in caught.value.hint
