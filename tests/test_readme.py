"""What the README shows is true: its Python example runs, its commands exist, its tree names what is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_python_example_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    match = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert match is not None
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    exec(match[1], names)
    out = capsys.readouterr().out
    assert out.startswith("Exception):\n    pass\n") and out.endswith("MAX_RETRIES = 5")
    logits, ids = names["logits"], names["ids"]
    assert tuple(logits.shape) == (len(ids), names["runtime"].config.vocab_size)  # type: ignore[attr-defined, arg-type]


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for marker in ("demo", "test"):
        match = re.search(rf"<!-- ci: {marker} -->\n```sh\nmake (\w+)\n```", README)
        assert match is not None
        assert re.search(rf"^{match[1]}:", makefile, re.MULTILINE)


def test_every_link_and_every_folder_of_the_tree_exists() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
    tree = re.search(r"```\nsalalocal/\n(.*?)```", README, re.DOTALL)
    assert tree is not None
    for line in tree[1].splitlines():
        name = line.split()[0]
        assert (ROOT / "salalocal" / name if line.startswith("  ") else ROOT / name).exists(), name
