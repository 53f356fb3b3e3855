"""Unpacking archives that a server made, without trusting them."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import shutil
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from prefect_biomed.clients.errors import UnsafeContent

__all__ = ["ArchiveLimits", "is_archive", "sweep", "unpack"]

_OPENERS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.GzipFile,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}
# What the decompressors of the standard library say of content that is not theirs.
_DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    ArithmeticError,
    # A hard link to what is not there, and a member without a name.
    LookupError,
    ValueError,
    struct.error,
)
_ZIP_END = struct.Struct("<4s4H2LH")
_ZIP64_END = struct.Struct("<4sQ2H2L4Q")
_COPY_BYTES = 1024 * 1024
_ENCRYPTED = 0x1
_TEMPORARY = ".unpack-"
_LONGEST_NAME_BYTES = 255
# What the operating system says of a name that no archive for this file system would have.
_OF_NAMES = frozenset(
    {errno.EEXIST, errno.EILSEQ, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR}
)


@dataclass(frozen=True)
class ArchiveLimits:
    """What an archive may hold.

    Attributes:
        max_members: Number of files and folders.
        max_bytes: Sum of the sizes after decompression, headers included.
        max_depth: How deep folders may lie in each other.
    """

    max_members: int = 100_000
    max_bytes: int = 200 * 1024**3
    max_depth: int = 100


class _Bounded(io.RawIOBase):
    """A decompressed stream that refuses to be read beyond a limit, or in one huge piece.

    tarfile reads extended headers whole into memory, whatever size they claim.
    """

    def __init__(self, stream: IO[bytes], limit: int) -> None:
        self._stream = stream
        self._limit = limit
        self.last_read = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._stream.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > _COPY_BYTES:
            raise UnsafeContent("The archive has a header larger than 1 MiB.")
        if self._stream.tell() + size > self._limit:
            raise UnsafeContent(f"The archive unpacks to more than {self._limit} bytes.")
        self.last_read = self._stream.read(size)
        return self.last_read


class _Members:
    """The members met so far, none of which may leave the folder or be in the way of another."""

    def __init__(self, limits: ArchiveLimits) -> None:
        self._limits = limits
        self._count = 0
        self._files: set[PurePosixPath] = set()
        self._folders: set[PurePosixPath] = set()

    def check(self, name: str, *, is_folder: bool) -> None:
        """Refuse a member that cannot be unpacked beside the others.

        Args:
            name: As the archive has it.
            is_folder: Whether it is a folder.

        Raises:
            UnsafeContent: It would leave the folder, is in the way of another, or a limit is exceeded.
        """
        self._count += 1
        if self._count > self._limits.max_members:
            raise UnsafeContent(f"It has more than {self._limits.max_members} members.")
        anywhere = PurePosixPath(name.replace("\\", "/"))
        if anywhere.is_absolute() or ".." in anywhere.parts or "\x00" in name:
            raise UnsafeContent(f"The member {name[:200]!r} would leave the folder.")
        path = PurePosixPath(name)
        if len(path.parts) > self._limits.max_depth:
            raise UnsafeContent(f"The member {name[:200]!r} lies in more than {self._limits.max_depth} folders.")
        if any(len(part.encode(errors="surrogateescape")) > _LONGEST_NAME_BYTES for part in path.parts):
            raise UnsafeContent(f"The member {name[:200]!r} has a name of more than {_LONGEST_NAME_BYTES} bytes.")
        above = set(path.parents) if path.parts else set()
        if self._files & (above | ({path} if is_folder else set())) or (not is_folder and path in self._folders):
            raise UnsafeContent(f"The member {name[:200]!r} is a folder and a file of one name.")
        self._folders |= above | ({path} if is_folder else set())
        if not is_folder:
            self._files.add(path)


def is_archive(path: Path) -> bool:
    """Tell whether a file is a tar (plain, gzip, bzip2 or xz) or a zip, by its content and not by its name.

    Args:
        path: File to look at.

    Returns:
        True for an archive that `unpack` reads. A compressed file that holds no tar, such as `.nii.gz`, is none.
    """
    return zipfile.is_zipfile(path) or _is_tar(path)


def unpack(archive: Path, folder: Path, limits: ArchiveLimits | None = None) -> list[Path]:
    """Unpack an archive into a folder that appears only when everything is in it.

    Args:
        archive: A file for which `is_archive` is true.
        folder: Where its content goes. It may be the archive's own path, which is then replaced; an older folder there
            is replaced too. Running it again after an interruption is safe.
        limits: Bounds on members and bytes.

    Returns:
        The unpacked files.

    Raises:
        UnsafeContent: A member is absolute, has `..`, links out of the folder, is a device, has a name that is too
            long or is that of another one of another kind; or the archive is damaged, protected by a password, packed
            by an unknown method, or exceeds a limit. Nothing is left behind and the archive is kept.
        OSError: The disk does not take it.
    """
    limits = limits or ArchiveLimits()
    temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=folder.parent))
    try:
        try:
            if zipfile.is_zipfile(archive):
                _unpack_zip(archive, temporary, limits)
            else:
                _unpack_tar(archive, temporary, limits)
        except UnsafeContent as error:
            raise UnsafeContent(f"{archive.name} was not unpacked: {error}") from None
        except NotImplementedError as error:  # zipfile, of compression, encryption and versions that it does not know
            raise UnsafeContent(
                f"{archive.name} was not unpacked, it is packed by an unknown method: {error}"
            ) from None
        except (*_DAMAGED, OSError) as error:
            if isinstance(error, OSError) and error.errno not in {None, *_OF_NAMES}:
                raise
            raise UnsafeContent(f"{archive.name} was not unpacked, it is damaged: {error}") from None
        temporary.chmod(0o755)
        if folder.is_dir():
            shutil.rmtree(folder)
        if folder == archive:
            archive.unlink()
        temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sweep(folder: Path) -> None:
    """Remove what processes that were killed while they unpacked have left.

    Args:
        folder: A folder in which no process is unpacking.
    """
    for left in folder.glob(f"{_TEMPORARY}*"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)


def _open_tar(path: Path, limit: int) -> tuple[tarfile.TarFile, _Bounded, IO[bytes]]:
    with path.open("rb") as file:
        magic = file.read(6)
    opener = next((make for start, make in _OPENERS.items() if magic.startswith(start)), lambda path: path.open("rb"))
    stream = opener(path)
    bounded = _Bounded(stream, limit)
    try:
        return tarfile.open(fileobj=bounded, mode="r:"), bounded, stream
    except BaseException:
        stream.close()
        raise


def _is_tar(path: Path) -> bool:
    try:
        archive, _, stream = _open_tar(path, _COPY_BYTES)
    except (*_DAMAGED, OSError):
        return False
    except UnsafeContent:
        return True
    with stream, archive:
        return archive.next() is not None  # a file of zeros passes for an empty tar


def _unpack_tar(path: Path, folder: Path, limits: ArchiveLimits) -> None:
    archive, bounded, stream = _open_tar(path, limits.max_bytes)
    members = _Members(limits)
    with stream, archive:
        for member in archive:
            members.check(member.name, is_folder=member.isdir())
            if not (member.isfile() or member.isdir() or member.islnk() or member.issym()):
                raise UnsafeContent(f"{member.name!r} is neither a file, a folder nor a link.")
            try:
                archive.extract(member, folder, filter="data")
            except tarfile.FilterError as error:
                raise UnsafeContent(str(error)) from None
        # tarfile takes a header that it cannot read for the end.
        if bounded.last_read.strip(b"\x00"):
            raise tarfile.ReadError("a header between its members cannot be read")


def _unpack_zip(path: Path, folder: Path, limits: ArchiveLimits) -> None:
    total = 0
    if _zip_members(path) > limits.max_members:
        raise UnsafeContent(f"It has more than {limits.max_members} members.")
    members = _Members(limits)
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            members.check(member.filename, is_folder=member.is_dir())
            target = folder / PurePosixPath(member.filename)
            if stat.S_ISLNK(member.external_attr >> 16):
                raise UnsafeContent(f"{member.filename!r} is a link inside a zip.")
            if member.flag_bits & _ENCRYPTED:
                raise UnsafeContent(f"{member.filename[:200]!r} is protected by a password.")
            if member.is_dir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, target.open("wb") as sink:
                while piece := source.read(_COPY_BYTES):
                    total += len(piece)
                    if total > limits.max_bytes:
                        raise UnsafeContent(f"The archive unpacks to more than {limits.max_bytes} bytes.")
                    sink.write(piece)


def _zip_members(path: Path) -> int:
    """Read the number of members from the end record, because `zipfile` loads the whole directory into memory."""
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - _ZIP_END.size - 0xFFFF - _ZIP64_END.size - 20))
        tail = file.read()
    start = tail.rfind(b"PK\x05\x06")
    if start < 0 or len(tail) - start < _ZIP_END.size:
        raise UnsafeContent("It has no end record.")
    zip64 = tail.rfind(b"PK\x06\x06", 0, start)
    if zip64 >= 0:
        return int(_ZIP64_END.unpack_from(tail, zip64)[7])
    return int(_ZIP_END.unpack_from(tail, start)[4])
