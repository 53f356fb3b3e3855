"""Archives from a server: what is good is unpacked, what is not leaves nothing behind."""

import errno
import io
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from prefect_biomed.clients.archives import ArchiveLimits, is_archive, unpack
from prefect_biomed.clients.errors import UnsafeContent


def tar_with(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def member(name: str, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def left_behind(folder: Path, *expected: str) -> list[str]:
    return sorted({path.name for path in folder.iterdir()} - set(expected))


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_tar_replaces_itself_by_a_folder_of_its_name(tmp_path: Path, mode: str) -> None:
    archive = tar_with(tmp_path / "out.dat", (member("a/b.txt"), b"hello"), (member("c"), b""), mode=mode)
    assert is_archive(archive)
    files = unpack(archive, archive)
    assert [path.relative_to(archive).as_posix() for path in files] == ["a/b.txt", "c"]
    assert (archive / "a/b.txt").read_bytes() == b"hello"
    assert left_behind(tmp_path, "out.dat") == []


def test_zip_is_unpacked_beside_and_kept(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("d/e.txt", "hi")
    files = unpack(tmp_path / "x.zip", tmp_path / "x")
    assert [path.read_text() for path in files] == ["hi"]
    assert (tmp_path / "x.zip").is_file()


def test_compressed_volume_is_no_archive(tmp_path: Path) -> None:
    import gzip

    (tmp_path / "v.nii.gz").write_bytes(gzip.compress(bytes(5000)))
    (tmp_path / "plain.txt").write_text("x" * 1000)
    (tmp_path / "named.tgz").write_text("not a tar")
    assert not any(is_archive(path) for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    "bad",
    [
        member("../x"),
        member("/etc/x"),
        member("a/../../x"),
        member("link", type=tarfile.SYMTYPE, linkname="/etc"),
        member("link", type=tarfile.SYMTYPE, linkname="../.."),
        member("hard", type=tarfile.LNKTYPE, linkname="../x"),
        member("fifo", type=tarfile.FIFOTYPE),
        member("device", type=tarfile.CHRTYPE),
    ],
    ids=lambda info: f"{info.name}->{info.linkname}",
)
def test_hostile_tar_members_are_refused(tmp_path: Path, bad: tarfile.TarInfo) -> None:
    archive = tar_with(tmp_path / "bad.tgz", (member("good.txt"), b"1"), (bad, b""))
    with pytest.raises(UnsafeContent, match=r"bad\.tgz was not unpacked"):
        unpack(archive, archive)
    assert archive.is_file()
    assert left_behind(tmp_path, "bad.tgz") == []


def test_write_through_a_link_inside_the_archive_is_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "in").mkdir()
    archive = tar_with(
        tmp_path / "in/bad.tar",
        (member("d", type=tarfile.SYMTYPE, linkname=str(outside)), b""),
        (member("d/x"), b"1"),
        mode="w",
    )
    with pytest.raises(UnsafeContent):
        unpack(archive, tmp_path / "in/out")
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "/x", "..\\x", "a/../../x"])
def test_hostile_zip_members_are_refused(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr(name, "x")
    with pytest.raises(UnsafeContent):
        unpack(tmp_path / "bad.zip", tmp_path / "out")
    assert left_behind(tmp_path, "bad.zip") == []


def test_zip_link_is_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(UnsafeContent, match="link"):
        unpack(tmp_path / "bad.zip", tmp_path / "out")


def test_too_many_members_are_refused(tmp_path: Path) -> None:
    tar = tar_with(tmp_path / "many.tar", *((member(f"f{i}"), b"") for i in range(50)), mode="w")
    with pytest.raises(UnsafeContent, match="more than 49 members"):
        unpack(tar, tmp_path / "out", ArchiveLimits(max_members=49))
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        for i in range(50):
            archive.writestr(f"f{i}", "")
    with pytest.raises(UnsafeContent, match="more than 49 members"):
        unpack(tmp_path / "many.zip", tmp_path / "out", ArchiveLimits(max_members=49))
    assert left_behind(tmp_path, "many.tar", "many.zip") == []


def test_bombs_are_refused(tmp_path: Path) -> None:
    tar = tar_with(tmp_path / "bomb.tgz", (member("zeros"), bytes(3_000_000)))
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(3_000_000))
    for path in (tar, tmp_path / "bomb.zip"):
        assert path.stat().st_size < 10_000
        with pytest.raises(UnsafeContent, match="unpacks to more"):
            unpack(path, tmp_path / "out", ArchiveLimits(max_bytes=2_000_000))


def test_header_that_claims_gigabytes_is_not_read_into_memory(tmp_path: Path) -> None:
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 3 * 1024**3
    (tmp_path / "pax.tar").write_bytes(header.tobuf(tarfile.USTAR_FORMAT) + bytes(1024))
    assert is_archive(tmp_path / "pax.tar")
    with pytest.raises(UnsafeContent, match="header larger"):
        unpack(tmp_path / "pax.tar", tmp_path / "out")


def test_truncated_archive_is_refused_whole(tmp_path: Path) -> None:
    archive = tar_with(tmp_path / "cut.tgz", (member("a"), b"1" * 100), (member("b"), bytes(range(256)) * 4000))
    archive.write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(UnsafeContent, match="damaged"):
        unpack(archive, archive)
    assert archive.is_file()
    assert left_behind(tmp_path, "cut.tgz") == []


def test_zip64_member_count_is_read(tmp_path: Path) -> None:
    path = tmp_path / "claims.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "")
    raw = path.read_bytes()
    end = raw.rindex(b"PK\x05\x06")
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 10**6, 10**6, 47, 31)
    path.write_bytes(raw[:end] + record + raw[end:])
    with pytest.raises(UnsafeContent, match="members"):
        unpack(path, tmp_path / "out")


def zip_with(*names: str) -> bytearray:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, b"" if name.endswith("/") else b"x")
    return bytearray(content.getvalue())


def flagged(local_offset: int, central_offset: int, value: int) -> bytes:
    """A zip whose one member has another byte in both of its headers."""
    content = zip_with("scan.dcm")
    content[local_offset] = content[content.find(b"PK\x01\x02") + central_offset] = value
    return bytes(content)


def plain_tar(*names: str) -> bytearray:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in names:
            info = member(name, size=0 if name.endswith("/") else 1)
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
            archive.addfile(info, io.BytesIO(b"x"))
    return bytearray(content.getvalue())


def broken_inside() -> bytes:
    """A tar of three files; the header of the second cannot be read."""
    content = plain_tar("a", "b", "c")
    content[2 * tarfile.BLOCKSIZE + 10] ^= 0xFF
    return bytes(content)


def link_to_nothing() -> bytes:
    """A tar of a hard link to a member that it does not have."""
    link = tarfile.TarInfo("link")
    link.type, link.linkname = tarfile.LNKTYPE, "nowhere"
    return link.tobuf() + bytes(2 * tarfile.BLOCKSIZE)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (flagged(6, 8, 1), "protected by a password"),
        (flagged(8, 10, 99), "unknown method"),
        (zip_with("a" * 300), "more than 255 bytes"),
        (zip_with("ü" * 128), "more than 255 bytes"),
        (zip_with("a", "a/b"), "a folder and a file of one name"),
        (zip_with("a/b", "a"), "a folder and a file of one name"),
        (zip_with("a", "a/"), "a folder and a file of one name"),
        (zip_with("a/" * 200 + "f"), "lies in more than 100 folders"),
        (plain_tar("a", "a/b"), "a folder and a file of one name"),
        (plain_tar("a/b/c", "a/b"), "a folder and a file of one name"),
        (plain_tar("a/" * 1500 + "f"), "lies in more than 100 folders"),
        (plain_tar("a" * 300), "more than 255 bytes"),
        (broken_inside(), "it is damaged"),
        (bytes(plain_tar("a", "b"))[: 2 * tarfile.BLOCKSIZE + 100], "it is damaged"),
        (link_to_nothing(), "it is damaged"),
        (zip_with("q").replace(b"q", b"\0"), "it is damaged"),
    ],
    ids=[
        "zip with a password",
        "zip of an unknown method",
        "zip name too long",
        "zip name too long in bytes",
        "zip file then folder",
        "zip folder then file",
        "zip file then empty folder",
        "zip too deep",
        "tar file then folder",
        "tar folder then file",
        "tar too deep",
        "tar name too long",
        "tar broken inside",
        "tar cut off",
        "tar hard link to nothing",
        "zip member without a name",
    ],
)
def test_archive_that_cannot_be_unpacked_whole_stays_as_it_is(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "result"
    path.write_bytes(content)
    assert is_archive(path)
    for folder in (path, tmp_path / "beside"):
        with pytest.raises(UnsafeContent, match=reason):
            unpack(path, folder)
        assert path.read_bytes() == content
        assert left_behind(tmp_path, "result") == []


def test_members_that_share_folders_and_replace_each_other_are_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "result"
    path.write_bytes(plain_tar("./", "./a/", "./a/b", "a/c", "a/b", "d/e/f"))
    assert [file.relative_to(path).as_posix() for file in unpack(path, path)] == ["a/b", "a/c", "d/e/f"]


def test_full_disk_is_no_fault_of_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tar_with(tmp_path / "result", (member("a"), b"x"))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "extract", full)
    with pytest.raises(OSError, match="No space left"):
        unpack(path, path)
    assert left_behind(tmp_path, "result") == []
