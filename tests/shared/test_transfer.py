"""Transfers: names stay in their folder, files appear whole, the pool is bounded."""

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace

import pytest

from prefect_biomed.clients.errors import (
    AuthenticationError,
    NetworkError,
    PermissionDeniedError,
    TransferFailed,
    UnexpectedResponse,
    UnsafeContent,
    is_transient,
)
from prefect_biomed.clients.files import atomic_write, digest, safe_join
from prefect_biomed.clients.transfer import transfer_all

# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "./",
        "/",
        "/etc/passwd",
        "//etc/passwd",
        "..",
        "../x",
        "a/../../x",
        "a/..",
        "a/../b",
        "x\x00y",
        "\x00",
        "n" * 256,
        "é" * 128,
        "a/" + "n" * 256 + "/b",
        "half\ud800pair",
    ],
)
def test_hostile_names_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(UnsafeContent, match="Refused"):
        safe_join(folder, name)
    assert list(tmp_path.rglob("*")) == [folder]


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("NUL", "_NUL"),
        ("out/con.txt", "out/_con.txt"),
        ("com1.tar.gz", "_com1.tar.gz"),
        ("lpt\u00b9", "_lpt\u00b9"),
        ("aux .x", "_aux .x"),
        ("dot.", "dot._"),
        ("console", "console"),
        ("a:b?", "a-b-"),
    ],
)
def test_names_that_windows_takes_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stored: str
) -> None:
    monkeypatch.setattr("prefect_biomed.clients.files.sys", SimpleNamespace(platform="win32"))
    assert safe_join(tmp_path, name) == tmp_path / stored


@pytest.mark.parametrize(
    "name", ["a", "a/b.txt", "./a", "a//b", "...", "..a", "a b", "~", "$HOME", "n" * 255, "é" * 127]
)
def test_names_that_stay_are_joined(tmp_path: Path, name: str) -> None:
    path = safe_join(tmp_path, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    assert tmp_path in path.parents
    assert "x" in {found.read_text() for found in tmp_path.rglob("*") if found.is_file()}


def test_link_that_leads_out_is_refused(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    folder.mkdir()
    (folder / "link").symlink_to(outside)
    (folder / "inner").symlink_to(folder)
    with pytest.raises(UnsafeContent):
        safe_join(folder, "link/x")
    assert safe_join(folder, "inner/x").parent.resolve() == folder.resolve()


def test_folder_may_itself_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert safe_join(tmp_path / "link", "x").parent == tmp_path / "link"


# -- files that appear whole -------------------------------------------------------------------------------------------


def test_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with atomic_write(path) as file:
        file.write(b"1")
        assert not path.exists()
    assert path.read_bytes() == b"1"
    assert [found.name for found in path.parent.iterdir()] == ["file"]


def test_failure_keeps_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_permissions_follow_the_umask_or_are_given(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        for name, mode in (("default", None), ("private", 0o600)):
            with atomic_write(tmp_path / name, mode=mode) as file:
                assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == (0o640 if mode is None else 0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "default").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600


def test_long_names_have_room_for_the_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    with atomic_write(path) as file:
        file.write(b"1")
    assert path.read_bytes() == b"1"


def test_kill_while_writing_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from prefect_biomed.clients.files import atomic_write\n"
        f"with atomic_write(Path({str(path)!r})) as file:\n"
        "    file.write(b'half'); file.flush(); print('writing', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"writing\n"
        child.send_signal(signal.SIGKILL)
    assert path.read_bytes() == b"old"


def test_digest(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert digest(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# -- the pool ----------------------------------------------------------------------------------------------------------


class Work:
    """Counts how much of it goes on at once."""

    def __init__(self, seconds: float = 0.01) -> None:
        self.lock = threading.Lock()
        self.seconds = seconds
        self.running = self.peak = 0
        self.begun: list[int] = []

    def __call__(self, item: int) -> int:
        with self.lock:
            self.running += 1
            self.peak = max(self.peak, self.running)
            self.begun.append(item)
        time.sleep(self.seconds)
        with self.lock:
            self.running -= 1
        return item * item


@pytest.mark.parametrize("parallelism", [1, 3, 8])
def test_never_more_at_once_than_asked_for(parallelism: int) -> None:
    work = Work()
    outcomes = transfer_all(range(40), work, name=str, subject="Test", parallelism=parallelism)
    assert outcomes == [item * item for item in range(40)]
    assert work.peak == parallelism


def test_nothing_to_do() -> None:
    assert transfer_all([], Work(), name=str, subject="Test", parallelism=4) == []


def test_one_failure_does_not_stop_the_others() -> None:
    done: list[int] = []
    threads: set[int] = set()

    def transfer(item: int) -> int:
        if item % 5 == 0:
            raise NetworkError(f"item {item} broke")
        return item

    def note(item: int, outcome: int) -> None:
        assert item == outcome
        done.append(item)
        threads.add(threading.get_ident())

    with pytest.raises(TransferFailed, match=r"Upload: 4 of 20 files failed") as caught:
        transfer_all(
            range(20), transfer, name=lambda item: f"file{item}", subject="Upload", parallelism=4, on_done=note
        )
    assert sorted(done) == [item for item in range(20) if item % 5]
    assert set(caught.value.failures) == {"file0", "file5", "file10", "file15"}
    assert "file5: item 5 broke" in str(caught.value)
    assert threads == {threading.get_ident()}


@pytest.mark.parametrize(("last", "transient"), [(NetworkError("gone"), True), (UnexpectedResponse("no"), False)])
def test_failures_can_be_tried_again_when_each_of_them_can(last: Exception, transient: bool) -> None:
    def transfer(item: int) -> None:
        raise last if item == 2 else NetworkError("gone")

    with pytest.raises(TransferFailed) as caught:
        transfer_all(range(3), transfer, name=str, subject="Test", parallelism=2)
    assert is_transient(caught.value) is transient


def test_long_lists_of_failures_are_cut_in_the_text_only() -> None:
    def transfer(item: int) -> None:
        raise NetworkError("gone")

    with pytest.raises(TransferFailed, match="and 80 more") as caught:
        transfer_all(range(100), transfer, name=str, subject="Test", parallelism=8)
    assert len(caught.value.failures) == 100


@pytest.mark.parametrize("error", [AuthenticationError("bad key"), PermissionDeniedError("no"), ZeroDivisionError()])
def test_refused_credentials_and_mistakes_end_it_at_once(error: Exception) -> None:
    work = Work()

    def transfer(item: int) -> int:
        if item == 2:
            raise error
        return work(item)

    with pytest.raises(type(error)) as caught:
        transfer_all(range(1000), transfer, name=str, subject="Test", parallelism=4)
    assert caught.value is error
    # At most those that ran already, and those begun while they were cancelled.
    assert len(work.begun) < 20
    assert work.running == 0


def test_transfers_run_in_the_context_of_the_caller() -> None:
    """By it Prefect knows to which run a line in a log belongs."""
    run: ContextVar[str] = ContextVar("run", default="none")
    token = run.set("this one")
    try:
        seen = transfer_all(range(20), lambda _: run.get(), name=str, subject="Test", parallelism=4)
    finally:
        run.reset(token)
    assert seen == ["this one"] * 20
