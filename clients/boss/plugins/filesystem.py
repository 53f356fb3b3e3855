"""File systems by the names of boss-ingest's, for plugins that were written for it."""

from __future__ import annotations

import io
import shutil
import tempfile
from pathlib import Path
from typing import IO, Any

__all__ = ["DynamicFilesystem", "DynamicFilesystemAbsPath"]

_KINDS = ("local", "s3", "s3_copy")


class _Filesystem:
    """The local disk or a bucket.

    Raises:
        ValueError: There is no such kind.
    """

    def __init__(self, filesystem_type: str, parameters: dict[str, Any]) -> None:
        if filesystem_type not in _KINDS:
            raise ValueError(f"filesystem {filesystem_type!r} is none of {', '.join(_KINDS)}")
        self.filesystem_type, self.parameters = filesystem_type, parameters
        self._copies = _Copies(parameters) if filesystem_type != "local" else None


class DynamicFilesystem(_Filesystem):
    """Opens files of the local disk or of a bucket.

    Args:
        filesystem_type: `local`, `s3` (into memory) or `s3_copy` (through a temporary file, which is kept).
        parameters: `bucket` for S3. Keys are found where boto3 finds them, never here.

    Raises:
        ValueError: There is no such kind.
    """

    def get_file(self, path: str) -> IO[bytes]:
        """Open a file.

        Args:
            path: Its path, or its key in the bucket.

        Raises:
            OSError: It cannot be read.
        """
        if self._copies is None:
            return Path(path).open("rb")
        if self.filesystem_type == "s3":
            return io.BytesIO(self._copies.content(path))
        return self._copies.path(path).open("rb")


class DynamicFilesystemAbsPath(_Filesystem):
    """Names files on the local disk; those of a bucket are copied first, once.

    Args:
        filesystem_type: `local` or `s3`.
        parameters: `bucket` for S3, and `temp_dir` for the copies.

    Raises:
        ValueError: There is no such kind.
    """

    def get_file(self, path: str) -> str:
        """Name a file.

        Args:
            path: Its path, or its key in the bucket.
        """
        return path if self._copies is None else str(self._copies.path(path))


class _Copies:
    """Objects of a bucket, copied into a folder that goes with this object."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        import boto3

        self._bucket = boto3.resource("s3").Bucket(parameters["bucket"])
        self._folder = Path(tempfile.mkdtemp(prefix="boss-source-", dir=parameters.get("temp_dir")))
        self._paths: dict[str, Path] = {}

    def content(self, key: str) -> bytes:
        output = io.BytesIO()
        self._bucket.download_fileobj(key, output)
        return output.getvalue()

    def path(self, key: str) -> Path:
        if key not in self._paths:
            target = self._folder / str(len(self._paths))
            self._bucket.download_file(key, str(target))
            self._paths[key] = target
        return self._paths[key]

    def __del__(self) -> None:
        if hasattr(self, "_folder"):
            shutil.rmtree(self._folder, ignore_errors=True)
