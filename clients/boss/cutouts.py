"""Blocks of pixels as the Boss's cutout service sends them."""

from __future__ import annotations

import ast
import math
import zlib
from typing import NamedTuple

from prefect_biomed.clients.errors import UnexpectedResponse

__all__ = ["Cutout", "unpack"]

_UNREADABLE = (ArithmeticError, LookupError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError)
_MAX_CUTOUT_BYTES = 512 * 1024 * 1024


class Cutout(NamedTuple):
    """A block of pixels read back.

    Attributes:
        shape: (z, y, x).
        datatype: dtype of the values, little endian.
        content: The values in C order.
    """

    shape: tuple[int, int, int]
    datatype: str
    content: bytes


def unpack(packed: bytes, shape: tuple[int, int, int]) -> Cutout:
    """Read a gzipped NumPy file without NumPy. The format is that of `numpy.lib.format`, version 1.

    Args:
        packed: The answer of the cutout service.
        shape: (z, y, x) that was asked for.

    Returns:
        The block.

    Raises:
        UnexpectedResponse: It is no such block.
    """
    try:
        content = zlib.decompressobj(wbits=31).decompress(packed, _MAX_CUTOUT_BYTES)
        if content[:6] != b"\x93NUMPY":
            raise ValueError("no NumPy file")
        length, start = (int.from_bytes(content[8:10], "little"), 10)
        if content[6] > 1:
            length, start = (int.from_bytes(content[8:12], "little"), 12)
        header = ast.literal_eval(content[start : start + length].decode("latin-1"))
        descr, values = str(header["descr"]), content[start + length :]
        size = int(descr[2:])
        fits = math.prod(header["shape"]) == math.prod(shape) and math.prod(shape) * size == len(values)
        if descr[0] not in "<|" or descr[1] != "u" or header["fortran_order"] or not fits:
            raise ValueError(f"{descr} of shape {header['shape']}")
    except (*_UNREADABLE, zlib.error) as error:
        raise UnexpectedResponse(f"The Boss's cutout cannot be read ({type(error).__name__}: {error}).") from None
    return Cutout(shape, f"uint{8 * size}", values)
