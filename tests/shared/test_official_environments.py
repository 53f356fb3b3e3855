"""Looking for the interpreters that official clients and servers need."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import official
from benchmarks.official import MissingInterpreter, official_environment


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with nothing in it, the only one on the path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(official, "CACHE", tmp_path / "environments")
    return folder


def test_a_missing_interpreter_is_an_error_that_names_it(only: Path) -> None:
    with pytest.raises(MissingInterpreter, match=r"python 3\.10 is not on this machine.*uv python install 3\.10"):
        official_environment("some", ["a==1"], "3.10")
    assert not (only.parent / "environments").exists()


def test_the_path_is_looked_at_first(only: Path) -> None:
    python = executable(only / "python3.10", "echo Python 3.10.1")
    assert official._interpreter("3.10") == str(python)


def test_what_stands_in_for_a_version_that_is_not_chosen_is_passed_over(only: Path) -> None:
    executable(only / "python3.10", "echo pyenv: python3.10: command not found >&2; exit 127")
    executable(only / "pyenv", '[ "$1 $2" = "prefix 3.10" ] && echo /versions/3.10.1')
    assert official._interpreter("3.10") == "/versions/3.10.1/bin/python"


def test_uv_is_asked_last(only: Path) -> None:
    executable(only / "pyenv", "exit 1")
    executable(only / "uv", '[ "$1 $2 $3" = "python find 3.13" ] && echo /of/uv/python3.13')
    assert official._interpreter("3.13") == "/of/uv/python3.13"
    with pytest.raises(MissingInterpreter):
        official._interpreter("3.10")


def test_an_environment_holds_what_its_lock_says_and_leaves_one_when_it_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []

    def install(base: str, folder: Path, interpreter: Path, requirements: list[str]) -> None:
        executable(interpreter, "echo a==2; echo b==3")
        asked.append(tuple(requirements))

    monkeypatch.setattr(official, "CACHE", tmp_path / "environments")
    monkeypatch.setattr(official, "LOCKS", tmp_path / "locks")
    monkeypatch.setattr(official, "_install", install)
    free = official_environment("some", ["a>1"])
    (lock,) = (tmp_path / "locks").iterdir()
    assert lock.name.startswith("some-3.") and lock.read_text() == "a==2\nb==3\n"
    locked = official_environment("some", ["a>1"])
    assert official_environment("some", ["a>1"]) == locked != free
    assert asked == [("a>1",), ("a>1", "-c", str(lock))]
    lock.write_text("a==2\nb==4\n")
    assert official_environment("some", ["a>1"]) not in {free, locked}
