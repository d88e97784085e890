"""Studies on disk: what a kill costs, who may go on, and what is refused."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from salalocal.errors import BusyError, RequestError, StateError
from salalocal.evals.study import RECORDS_FILE, STUDY_FILE, Record, StudyProgress, Task, identity_name, open_study

IDENTITY: Record = {"evaluation": "made", "seed": 1, "lengths": (1, 2)}


def tasks(num_tasks: int, done: list[str], fail_at: str = "") -> list[Task]:
    def task(number: int) -> Task:
        def run(on_tokens: Any) -> Record:
            if str(number) == fail_at:
                raise KeyboardInterrupt
            for _ in range(4):
                on_tokens(10)
            done.append(str(number))
            return {"right": number % 2 == 0, "answer": "a\u2028b\n\udc80"}

        return Task(str(number), f"task {number}", 40, run)

    return [task(number) for number in range(num_tasks)]


def ignore(progress: StudyProgress) -> None:
    pass


def test_a_stopped_study_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt), open_study(tmp_path / "s", IDENTITY) as study:
        study.run(tasks(5, done, fail_at="3"), ignore)
    assert done == ["0", "1", "2"]
    with open_study(tmp_path / "s", IDENTITY) as study:
        assert list(study.records) == done
        records = study.run(tasks(5, done), ignore)
    assert done == ["0", "1", "2", "3", "4"] and [record["key"] for record in records] == done
    assert records[0]["answer"] == "a\u2028b\n\udc80"
    with open_study(tmp_path / "s", IDENTITY) as study:
        assert study.run(tasks(5, done), ignore) == records and len(done) == 5


def test_every_cut_of_the_records_loses_at_most_the_torn_line(tmp_path: Path) -> None:
    with open_study(tmp_path, IDENTITY) as study:
        study.run(tasks(3, []), ignore)
    path = tmp_path / RECORDS_FILE
    data, identity = path.read_bytes(), (tmp_path / STUDY_FILE).read_bytes()
    ends = [end + shift for end, byte in enumerate(data, 1) if byte == 10 for shift in (-1, 0, 1)]
    for length in {*range(0, len(data), 13), *ends} - {len(data) + 1}:
        path.write_bytes(data[:length])
        (tmp_path / STUDY_FILE).write_bytes(identity)
        with open_study(tmp_path, IDENTITY) as study:
            assert len(study.records) == data[:length].count(b"\n")
        whole = data[: data[:length].rfind(b"\n") + 1]
        assert (path.read_bytes() == whole) if whole else not path.exists()


def test_progress_counts_tasks_tokens_and_right_answers(tmp_path: Path) -> None:
    seen: list[StudyProgress] = []
    with open_study(tmp_path, IDENTITY) as study:
        study.run(tasks(2, []), ignore)
        study.run(tasks(4, []), seen.append)
    assert (seen[0].num_done, seen[0].num_tasks, seen[0].num_right, seen[0].label) == (2, 4, 1, "task 2")
    assert [step.num_read for step in seen] == sorted(step.num_read for step in seen) and seen[-1].num_read == 80
    assert seen[1].share == pytest.approx(0.25) and seen[-1].share == 1
    assert (seen[-1].num_done, seen[-1].num_right) == (4, 2)


def test_another_study_is_refused_and_fresh_begins_anew(tmp_path: Path) -> None:
    with open_study(tmp_path, IDENTITY) as study:
        study.run(tasks(2, []), ignore)
    other = {**IDENTITY, "seed": 2}
    with pytest.raises(RequestError, match="differs in seed"), open_study(tmp_path, other):
        pass
    before = (tmp_path / RECORDS_FILE).read_bytes()
    with open_study(tmp_path, other, is_fresh=True) as study:  # nothing is asked: the old one stays as it is
        assert study.records == {}
    assert (tmp_path / RECORDS_FILE).read_bytes() == before
    with open_study(tmp_path, other, is_fresh=True) as study:
        assert len(study.run(tasks(1, []), ignore)) == 1
    with open_study(tmp_path, other) as study:
        assert json.loads((tmp_path / STUDY_FILE).read_text())["seed"] == 2 and list(study.records) == ["0"]


def test_what_ends_without_a_record_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "s"
    with pytest.raises(RequestError), open_study(folder, IDENTITY):
        assert list(folder.iterdir()) == []
        raise RequestError("no such dtype", "")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), open_study(folder, IDENTITY) as study:
        study.run(tasks(1, [], fail_at="0"), ignore)
    assert list(tmp_path.iterdir()) == []
    folder.mkdir(parents=True)  # a folder of the user's stays, and takes any study
    with open_study(folder, IDENTITY):
        pass
    with open_study(folder, {**IDENTITY, "seed": 2}) as study:
        study.run(tasks(1, []), ignore)
    assert sorted(path.name for path in folder.iterdir()) == [RECORDS_FILE, STUDY_FILE]


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / RECORDS_FILE).write_text("precious")
    (tmp_path / "file").write_text("x")
    for place in ("theirs", "file"):
        for is_fresh in (False, True):
            with pytest.raises(RequestError), open_study(tmp_path / place, IDENTITY, is_fresh):
                pass
    assert (tmp_path / "theirs" / RECORDS_FILE).read_text() == "precious"


def test_damage_is_named(tmp_path: Path) -> None:
    for name, content in ((RECORDS_FILE, b"{not json\n"), (RECORDS_FILE, b"[1]\n"), (STUDY_FILE, b"{")):
        folder = tmp_path / content.hex()
        with open_study(folder, IDENTITY) as study:
            study.run(tasks(1, []), ignore)
        (folder / name).write_bytes(content)
        with pytest.raises(StateError, match=name) as raised, open_study(folder, IDENTITY):
            pass
        if "--fresh" in raised.value.hint:  # what a hint says works
            with open_study(folder, IDENTITY, is_fresh=True) as study:
                study.run(tasks(1, []), ignore)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StateError, match="cannot write") as raised, open_study(tmp_path / "file" / "s", IDENTITY):
        pass
    assert "--out" in raised.value.hint

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with open_study(tmp_path / "s", IDENTITY) as study, monkeypatch.context() as patch:
        patch.setattr("salalocal.evals.study.os.fsync", full)
        with pytest.raises(StateError, match="No space left") as raised:
            study.run(tasks(1, []), ignore)
    assert "make room" in raised.value.hint


def test_what_has_no_marks_counts_none_as_right(tmp_path: Path) -> None:
    seen: list[StudyProgress] = []
    made = [Task(str(n), "x", 1, lambda on_tokens: (on_tokens(1), {"nats": 1.0})[1]) for n in range(3)]
    with open_study(tmp_path, IDENTITY) as study:
        study.run(made[:1], ignore)
        study.run(made, seen.append)
    assert {step.num_right for step in seen} == {None}


@pytest.mark.skipif(os.name == "nt", reason="no locks there")
def test_a_second_process_is_told_that_it_is_busy(tmp_path: Path) -> None:
    code = (
        f"from pathlib import Path; from salalocal.evals.study import open_study; open_study(Path({str(tmp_path)!r}), "
    )
    code += "{'evaluation': 'made'}).__enter__()"
    with open_study(tmp_path, IDENTITY):
        with pytest.raises(BusyError), open_study(tmp_path, IDENTITY):
            pass
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode != 0 and b"BusyError" in done.stderr


def test_a_name_depends_on_the_identity_alone() -> None:
    assert identity_name(IDENTITY) == identity_name(dict(reversed(IDENTITY.items())))
    assert identity_name(IDENTITY) != identity_name({**IDENTITY, "seed": 2})
    assert identity_name(IDENTITY).startswith("made-")
