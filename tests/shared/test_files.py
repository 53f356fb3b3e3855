"""Files on the local disk: what a killed process, a full disk or a planted link does. See also test_transfer."""

import errno
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from prefect_biomed.clients import files
from prefect_biomed.clients.errors import HeldElsewhere, LocalStorageError, is_transient
from prefect_biomed.clients.files import PartialFile, atomic_write, exclusive, on_disk, private


@pytest.fixture(autouse=True)
def unswept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_SWEPT", files._Folders())


def parts(folder: Path) -> list[Path]:
    return list(folder.glob(".*.part"))


def write(path: Path, content: bytes = b"new") -> None:
    with atomic_write(path) as file:
        file.write(content)


def die_while_writing(path: Path) -> None:
    with atomic_write(path) as file:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def hold_while_writing(path: Path, written: "multiprocessing.synchronize.Event", go_on: object) -> None:
    with atomic_write(path) as file:
        file.write(b"slow")
        file.flush()
        written.set()
        go_on.wait(30)  # type: ignore[attr-defined]  # an Event


def test_what_a_killed_process_left_is_removed_at_the_next_write(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=die_while_writing, args=(tmp_path / "a",))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(parts(tmp_path)) == 1
    write(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    written, go_on = context.Event(), context.Event()
    process = context.Process(target=hold_while_writing, args=(tmp_path / "a", written, go_on))
    process.start()
    assert written.wait(60)
    write(tmp_path / "b")
    assert len(parts(tmp_path)) == 1
    go_on.set()
    process.join(60)
    assert process.exitcode == 0
    assert (tmp_path / "a").read_bytes() == b"slow"
    assert not parts(tmp_path)


def test_files_of_others_and_links_are_left_alone(tmp_path: Path) -> None:
    kept = tmp_path / "precious"
    kept.write_text("kept")
    (tmp_path / "mine.part").write_text("kept")
    link = tmp_path / f".{'0' * 32}.part"
    link.symlink_to(kept)
    write(tmp_path / "b")
    assert kept.read_text() == "kept"
    assert (tmp_path / "mine.part").exists()
    assert link.is_symlink()


def test_link_of_the_name_is_replaced_and_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("untouched")
    (tmp_path / "a").symlink_to(elsewhere)
    write(tmp_path / "a")
    assert elsewhere.read_text() == "untouched"
    assert not (tmp_path / "a").is_symlink()


def test_link_in_the_place_of_a_lock_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("untouched")
    (tmp_path / "x.lock").symlink_to(elsewhere)
    with pytest.raises(LocalStorageError), exclusive(tmp_path / "x.lock", seconds=0.1, what="x"):
        pass
    assert elsewhere.read_text() == "untouched"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_disk_that_takes_nothing_is_an_error_that_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fsync(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(LocalStorageError, match=f"{tmp_path}: {os.strerror(number)}. Make room") as caught:
        write(tmp_path / "a")
    assert not is_transient(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_name_too_long_and_file_for_a_folder_are_typed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / ("n" * 300), tmp_path / "file" / "a"):
        with pytest.raises(LocalStorageError):
            write(path)


def test_older_file_stays_when_the_new_one_fails(tmp_path: Path) -> None:
    write(tmp_path / "a", b"old")
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "a") as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert (tmp_path / "a").read_bytes() == b"old"
    assert not parts(tmp_path)


def test_lock_is_kept_from_others_and_ends_with_its_holder(tmp_path: Path) -> None:
    lock = tmp_path / "deep" / "x.lock"
    with (
        exclusive(lock, seconds=1, what="Session 's'"),
        pytest.raises(HeldElsewhere, match="Session 's' is in the hands of another process") as caught,
        exclusive(lock, seconds=0.05, what="Session 's'"),
    ):
        pass
    assert is_transient(caught.value)
    with exclusive(lock, seconds=0.05, what="Session 's'"):
        assert lock.stat().st_mode & 0o077 == 0


def test_other_errors_pass_on_disk(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), on_disk(tmp_path):
        raise ZeroDivisionError


def test_private_file_is_for_its_owner_only_and_one_that_is_there_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    private(path)
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(b"content")
    private(path)
    assert path.read_bytes() == b"content"


def test_private_file_is_not_made_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LocalStorageError, match=tmp_path.name):
        private(tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()


# -- files that come in several tries ----------------------------------------------------------------------------------


def write_part(path: Path, content: bytes, *, append: bool = True) -> None:
    with PartialFile(path).writing(append=append) as file:
        file.write(content)


def test_partial_file_goes_on_where_it_broke_and_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a"
    assert PartialFile(path).size == 0
    write_part(path, b"he")
    with pytest.raises(ZeroDivisionError), PartialFile(path).writing(append=True) as file:
        file.write(b"ll")
        raise ZeroDivisionError
    assert PartialFile(path).size == 4
    assert not path.exists()
    write_part(path, b"o")
    PartialFile(path).complete()
    assert path.read_bytes() == b"hello"
    assert list(path.parent.iterdir()) == [path]


def test_partial_file_can_begin_anew_and_be_thrown_away(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_part(path, b"long ago")
    write_part(path, b"new", append=False)
    assert PartialFile(path).size == 3
    PartialFile(path).discard()
    PartialFile(path).discard()
    assert list(tmp_path.iterdir()) == []


def test_partial_file_outlives_the_sweep_until_nobody_fetches_it(tmp_path: Path) -> None:
    write_part(tmp_path / "a", b"half")
    write(tmp_path / "b")
    assert PartialFile(tmp_path / "a").size == 4
    PartialFile.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "b"]


@pytest.mark.parametrize("plant", [os.symlink, os.link])
def test_partial_file_does_not_follow_a_planted_link(tmp_path: Path, plant: Callable[[Path, Path], None]) -> None:
    path, precious = tmp_path / "out" / "a", tmp_path / "precious"
    write_part(path, b"x")
    (name,) = path.parent.iterdir()
    precious.write_bytes(b"kept")
    for _ in range(2):
        name.unlink()
        plant(precious, name)
        assert PartialFile(path).size == 0
        write_part(path, b"mine")
        PartialFile(path).complete()
        assert (path.read_bytes(), precious.read_bytes()) == (b"mine", b"kept")
        write_part(path, b"x")


def test_partial_file_on_a_full_disk_is_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(LocalStorageError, match=f"{tmp_path}: No space left"):
        write_part(tmp_path / "a", b"x")
