"""Device names and memory figures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from salalocal import device as device_module
from salalocal.device import DeviceMemory, device_memory, peak_memory_bytes, pick_device
from salalocal.errors import BackendError, RequestError


def test_the_best_device_is_cuda_where_there_is_one() -> None:
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("auto") == pick_device()
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    "name", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:\u0661", "cuda:0:1", "cuda:99999", "mps", "CPU"]
)
def test_a_name_of_another_form_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match="is not known"):
        pick_device(name)


def test_a_missing_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="'cuda': no CUDA device") as caught:
        pick_device("cuda")
    assert "--device cpu" in caught.value.hint
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with pytest.raises(BackendError, match="there are 2 CUDA devices"):
        pick_device("cuda:2")
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert pick_device("cuda:1") == pick_device("cuda") == torch.device("cuda", 1)
    assert current == [1, 1]  # kernels launch on the current card


def test_memory_figures_of_this_machine_make_sense() -> None:
    memory = device_memory(torch.device("cpu"))
    assert 2**28 < memory.free_bytes <= memory.total_bytes < 2**50


def fake_cgroup(folder: Path, limit: str, current: int, file_bytes: int) -> None:
    (folder / "memory.max").write_text(limit + "\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 5\nactive_file {file_bytes}\ninactive_file 10\n")


def test_a_container_s_limit_counts_and_file_pages_in_it_are_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module, "_CGROUPS", ((tmp_path, "", "memory.max", "memory.current", ""),))
    monkeypatch.setattr(device_module, "_OWN_GROUPS", tmp_path / "none")
    monkeypatch.setattr(device_module, "_machine_memory", lambda: DeviceMemory(1000, 800))
    assert device_memory(torch.device("cpu")) == DeviceMemory(1000, 800)  # no such group
    fake_cgroup(tmp_path, "max", 500, 100)
    assert device_memory(torch.device("cpu")) == DeviceMemory(1000, 800)
    fake_cgroup(tmp_path, "600", 300, 90)
    assert device_memory(torch.device("cpu")) == DeviceMemory(600, 400)
    fake_cgroup(tmp_path, "600", 900, 0)
    assert device_memory(torch.device("cpu")) == DeviceMemory(600, 0)


@pytest.mark.parametrize(("line", "controller"), [("0::/jobs/one", ""), ("9:cpu,memory:/jobs/one", "memory")])
def test_the_limit_of_a_group_within_others_counts(
    line: str, controller: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text(f"12:pids:/elsewhere\n{line}\n1:name=systemd:/other\n")
    monkeypatch.setattr(device_module, "_OWN_GROUPS", own)
    monkeypatch.setattr(device_module, "_CGROUPS", ((root, controller, "memory.max", "memory.current", ""),))
    monkeypatch.setattr(device_module, "_machine_memory", lambda: DeviceMemory(1000, 800))
    (root / "jobs" / "one").mkdir(parents=True)
    (root / "elsewhere").mkdir()
    fake_cgroup(root / "elsewhere", "20", 10, 0)
    fake_cgroup(root / "jobs" / "one", "600", 300, 90)
    assert device_memory(torch.device("cpu")) == DeviceMemory(600, 400)
    fake_cgroup(root / "jobs", "700", 650, 0)  # others in the group above use more
    assert device_memory(torch.device("cpu")) == DeviceMemory(700, 60)
    own.write_text("0::/../outside\n9:memory:/../outside\n")
    assert device_memory(torch.device("cpu")) == DeviceMemory(1000, 800)


def test_the_peak_grows_with_what_a_process_takes() -> None:
    code = (
        "import torch; from salalocal.device import peak_memory_bytes; cpu = torch.device('cpu');"
        "before = peak_memory_bytes(cpu); torch.zeros(50_000_000); print(peak_memory_bytes(cpu) - before)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert 150_000_000 < int(done.stdout) < 300_000_000
    assert peak_memory_bytes(torch.device("cpu")) > 2**25


def test_a_process_that_is_held_to_less_of_a_card_sees_less(monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5)
    for fraction, expected in ((1.0, DeviceMemory(80, 70)), (0.5, DeviceMemory(40, 35)), (0.05, DeviceMemory(4, 0))):
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device, share=fraction: share)
        assert device_memory(card) == expected
