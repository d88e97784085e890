"""What doctor says of a machine with, without and with half a card, and that it changes nothing."""

import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import catalog_cases
import fake_hub
import pytest
import torch

from salalocal.checkpoint.hub_client import HubClient
from salalocal.device import DeviceMemory
from salalocal.errors import HubError
from salalocal.session import doctor
from salalocal.session.doctor import NOTE, OK, PROBLEM, Finding, examine, worst_code
from salalocal.session.plan import RELEASED_MODEL

SMI = """#!{python}
import sys
if "--query-gpu" in sys.argv[1]:
    print("NVIDIA GeForce RTX 4070, {driver}, 12282, 900")
else:
    print("123, /usr/bin/\\x1b[2Jgame, 800")
"""


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog_cases.use_empty_places(tmp_path, monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def install_driver(tmp_path: Path, driver: str = "580.65.06") -> None:
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(SMI.format(python=sys.executable, driver=driver))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def install_card(monkeypatch: pytest.MonkeyPatch, major: int = 8, free_bytes: int = 11 * 2**30) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    properties = SimpleNamespace(name="NVIDIA GeForce RTX 4070", major=major, minor=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(doctor, "device_memory", lambda where: DeviceMemory(12 * 2**30, free_bytes))
    monkeypatch.setattr(doctor, "with_usual_model", lambda settings, tell: settings)


def findings() -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(is_offline=True)}


def test_a_machine_without_a_card_is_no_problem(tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    found = findings()
    assert found["card"].status == NOTE and "CPU" in found["card"].text and "driver" in str(found["card"].fix)
    assert found["packages"].status == OK and f"torch {torch.__version__}" in found["packages"].text
    assert found["memory"].status in (OK, NOTE) and "GiB free" in found["memory"].text
    assert found["hub cache"].status in (OK, NOTE) and found["settings"].status == OK
    assert found["model"].text == "chat takes builtin: no larger model is here"
    assert found["model"].fix == f"to get it: salalocal pull {RELEASED_MODEL}"
    assert worst_code(list(found.values())) == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_a_card_and_its_other_users_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_driver(tmp_path)
    install_card(monkeypatch)
    found = findings()
    card = found["card 0"]
    assert card.status == OK and "compute capability 8.9, 11.0 of 12.0 GiB free" in card.text
    assert "driver 580.65.06" in card.text
    assert "pid 123, 800 MiB" in found["card users"].text and found["card users"].status == NOTE


@pytest.mark.parametrize(
    ("major", "free_bytes", "status", "said"),
    [(7, 11 * 2**30, PROBLEM, "too old"), (9, 2**30, NOTE, "too little for the 9B model")],
)
def test_a_card_that_will_not_do_is_told(
    major: int, free_bytes: int, status: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_card(monkeypatch, major, free_bytes)
    found = findings()
    assert found["card 0"].status == status and said in found["card 0"].text and found["card 0"].fix
    assert worst_code(list(found.values())) == (6 if status == PROBLEM else 0)


@pytest.mark.parametrize(
    ("built_for", "driver", "hidden", "said", "fix"),
    [
        (None, "580.65.06", None, "CPU build", "pip install"),
        ("13.0", "535.10", None, "driver is too old for CUDA 13.0", "580 or newer"),
        ("13.0", "580.65.06", "-1", "PyTorch cannot use it", "unset CUDA_VISIBLE_DEVICES"),
        ("13.0", "580.65.06", None, "PyTorch cannot use it", "install the driver again"),
    ],
)
def test_a_card_that_pytorch_cannot_use_has_a_reason_and_a_fix(
    built_for: str | None,
    driver: str,
    hidden: str | None,
    said: str,
    fix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install_driver(tmp_path, driver)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    found = findings()
    card = found["card"]
    assert card.status == PROBLEM and said in card.text and fix in str(card.fix)
    assert worst_code(list(found.values())) == 6


def test_a_driver_that_hangs_or_fails_is_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_driver(tmp_path)
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert doctor.card_use() == [] and findings()["card"].status == NOTE
    (tmp_path / "bin" / "nvidia-smi").write_text(f"#!{sys.executable}\nimport time\ntime.sleep(9)\n")
    monkeypatch.setattr(doctor, "_SMI_S", 0.2)
    assert doctor.card_use() == []


def test_packages_that_are_missing_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.metadata.version

    def version(name: str) -> str:
        if name in ("triton", "bitsandbytes"):
            raise doctor.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    found = findings()
    assert found["triton"].status == PROBLEM and found["triton"].fix == "pip install triton"
    assert found["bitsandbytes"].status == NOTE


def test_a_disk_that_is_too_small_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=5 * 10**9))
    found = findings()
    assert "5.0 GB free; the 9B model and its 4-bit copy take 26" in found["hub cache"].text
    assert "HF_HOME" in str(found["hub cache"].fix)


def test_settings_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "config" / "salalocal"
    folder.mkdir(parents=True)
    (folder / "settings.toml").write_text("temperatur = 1\n")
    found = findings()
    assert found["settings"].status == PROBLEM and "temperature" in str(found["settings"].fix)
    assert worst_code(list(found.values())) == 2


def test_the_hub_is_asked_for_the_released_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    catalog_cases.write_model(tmp_path / "hub" / RELEASED_MODEL, seed)
    monkeypatch.setenv("HF_TOKEN", "hf_a_secret")
    with fake_hub.running(tmp_path / "hub") as hub:
        monkeypatch.setattr(HubClient, "of_this_machine", lambda limits: HubClient(hub.url, None, limits))
        found = {finding.name: finding for finding in examine()}
    assert found["hub"].status == OK and f"has {RELEASED_MODEL}" in found["hub"].text
    assert "logged in" in found["hub"].text and "hf_a_secret" not in str(found)
    found = {finding.name: finding for finding in examine()}  # nobody listens there any more
    assert found["hub"].status == PROBLEM and "cannot be reached" in found["hub"].text
    assert worst_code(list(found.values())) == 5


def test_offline_by_the_environment_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = {finding.name: finding for finding in examine()}
    assert found["hub"].status == NOTE and found["hub"].fix == "unset HF_HUB_OFFLINE"
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        HubClient.of_this_machine()
