"""End-to-end encryption of vantage6, the same in generations 3, 4 and 5.

A message is encrypted for one organization. A fresh AES-256 key ``K`` and a fresh 16-byte counter
block ``IV`` encrypt the bytes in counter mode; RSA (PKCS#1 v1.5) with the organization's public key
encrypts ``K``. What travels is

* **string form** (task input, task result): ``base64(RSA(K)) $ base64(IV) $ base64(ciphertext)``,
* **blob form** (blob store, 4.13 and later): ``base64(RSA(K))$base64(IV)$`` and then the raw
  ciphertext; the stream form is the blob form in chunks.

In a collaboration without encryption both forms are plain base64.

The format carries no authentication code, so a wrong key or a damaged message can only be told from
the decrypted content. Callers therefore treat content that is not what they asked for (JSON) as
"wrong key or damaged".

Nothing here is kept per process: each :class:`PrivateKey` stands for itself, so two organizations
can be used side by side.
"""

import base64
import binascii
import hashlib
import hmac
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from prefect_biomed.clients.vantage6.errors import DecryptionFailed, InvalidKey

__all__ = ["PrivateKey", "PublicKey", "counter_block", "decode_base64", "decode_base64_stream", "encode_base64_stream"]

_KEY_BYTES = 32
_IV_BYTES = 16
_SEPARATOR = b"$"
# The two base64 headers of an 8192-bit key take less than 1.5 kB.
_HEADER_LIMIT = 4096
_ONE_LINE_PEM = re.compile(rb"(-----BEGIN [A-Z ]+-----)(.*)(-----END [A-Z ]+-----)(?:\\n)?", re.DOTALL)
_DAMAGED = "the private key is another organization's, or the message is damaged"


class PublicKey:
    """The half of an organization's key pair that is needed to write to it.

    Args:
        key: The RSA public key.
    """

    def __init__(self, key: rsa.RSAPublicKey) -> None:
        self._key = key

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read a key as the server gives it in ``organization.public_key``.

        Args:
            text: base64 of the PEM text.

        Raises:
            InvalidKey: The text is empty or no RSA public key.
        """
        if not text.strip():
            raise InvalidKey("The organization has no public key on the server.")
        try:
            key = load_pem_public_key(base64.b64decode(text, validate=True))
        except (ValueError, UnsupportedAlgorithm) as error:
            raise InvalidKey("The text is not the base64 of a PEM public key.") from error
        if not isinstance(key, rsa.RSAPublicKey):
            raise InvalidKey("vantage6 uses RSA keys; this is another kind of key.")
        return cls(key)

    @property
    def text(self) -> str:
        """The key as the server stores it: base64 of the PEM text."""
        pem = self._key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return base64.b64encode(pem).decode("ascii")

    @property
    def fingerprint(self) -> str:
        """``SHA256:`` and the base64 digest of the key, to compare keys by eye."""
        der = self._key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return "SHA256:" + base64.b64encode(hashlib.sha256(der).digest()).decode().rstrip("=")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PublicKey) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"PublicKey({self.fingerprint})"

    def encrypt(self, plaintext: bytes, *, mark: bytes | None = None) -> str:
        """Encrypt bytes in string form, as task inputs are sent.

        Args:
            plaintext: What the organization is to read.
            mark: Sixteen bytes by which the sender knows the message again (`PrivateKey.mark`), for its counter block;
                random ones when None. Each message has a key of its own, so the block need not be random.

        Returns:
            Three base64 parts joined by ``$``.
        """
        return b"".join(self.encrypt_text_stream([plaintext], mark=mark)).decode("ascii")

    def encrypt_text_stream(self, chunks: Iterable[bytes], *, mark: bytes | None = None) -> Iterator[bytes]:
        """Encrypt chunk by chunk in string form; the header comes first.

        Args:
            chunks: The plaintext in any sizes.
            mark: As for `encrypt`.

        Yields:
            The string form in pieces of ASCII, one chunk of plaintext in memory at a time.
        """
        stream = self.encrypt_stream(chunks, mark=mark)
        yield next(stream)
        yield from encode_base64_stream(stream)

    def encrypt_blob(self, plaintext: bytes, *, mark: bytes | None = None) -> bytes:
        """Encrypt bytes in blob form, as the blob store keeps them.

        Args:
            plaintext: What the organization is to read.
            mark: As for `encrypt`.

        Returns:
            Two base64 parts, each followed by ``$``, and the raw ciphertext.
        """
        return b"".join(self.encrypt_stream([plaintext], mark=mark))

    def encrypt_stream(self, chunks: Iterable[bytes], *, mark: bytes | None = None) -> Iterator[bytes]:
        """Encrypt chunk by chunk in blob form; the header comes first.

        Args:
            chunks: The plaintext in any sizes.
            mark: As for `encrypt`.

        Yields:
            The blob form in pieces, one chunk of plaintext in memory at a time.
        """
        header, encryptor = self._start(mark)
        yield header
        for chunk in chunks:
            yield encryptor.update(chunk)
        yield encryptor.finalize()

    def _start(self, mark: bytes | None) -> tuple[bytes, CipherContext]:
        key, iv = os.urandom(_KEY_BYTES), os.urandom(_IV_BYTES) if mark is None else mark
        wrapped = self._key.encrypt(key, padding.PKCS1v15())
        header = _SEPARATOR.join([base64.b64encode(wrapped), base64.b64encode(iv), b""])
        return header, Cipher(algorithms.AES(key), modes.CTR(iv)).encryptor()


class PrivateKey:
    """An organization's private key; reads what was encrypted for the organization.

    The key material appears in no ``repr`` and in no message.

    Args:
        key: The RSA private key.
    """

    def __init__(self, key: rsa.RSAPrivateKey) -> None:
        self._key = key
        self.public_key = PublicKey(key.public_key())

    @classmethod
    def from_pem(cls, pem: str | bytes) -> Self:
        """Read a PEM text without passphrase: PKCS#1 as vantage6 writes it, or PKCS#8.

        Args:
            pem: The PEM text.

        Raises:
            InvalidKey: The text is no unencrypted RSA private key.
        """
        raw = _with_line_ends(pem.encode() if isinstance(pem, str) else pem)
        try:
            key = load_pem_private_key(raw, password=None)
        except TypeError as error:
            raise InvalidKey(
                "The private key is protected by a passphrase, which vantage6 does not use. "
                "Decrypt it first, for example with 'openssl rsa'."
            ) from error
        except (ValueError, UnsupportedAlgorithm):
            # The cause is dropped: it could quote the text, which may be a secret.
            raise InvalidKey("The text is no PEM private key.") from None
        if not isinstance(key, rsa.RSAPrivateKey):
            raise InvalidKey("vantage6 uses RSA keys; this is another kind of private key.")
        return cls(key)

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read a PEM file.

        Args:
            path: The file, usually ``privkey_<organization>.pem``.

        Raises:
            InvalidKey: The file is missing, unreadable or holds no RSA private key.
        """
        try:
            return cls.from_pem(path.expanduser().read_bytes())
        except OSError as error:
            raise InvalidKey(f"The private key file {path} cannot be read: {error.strerror}.") from error
        except InvalidKey as error:
            raise InvalidKey(f"{path}: {error}") from error

    @classmethod
    def generate(cls, bits: int = 4096) -> Self:
        """Make a new key pair.

        Args:
            bits: Length of the modulus; vantage6 itself makes 4096.
        """
        return cls(rsa.generate_private_key(public_exponent=65537, key_size=bits))

    @property
    def pem(self) -> bytes:
        """The key as vantage6 keeps it in a file: PKCS#1 PEM without passphrase. A secret."""
        return self._key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())

    def __repr__(self) -> str:
        return f"PrivateKey(public={self.public_key.fingerprint})"

    def matches(self, public_key: str) -> bool:
        """Tell whether a public key of the server belongs to this private key.

        Args:
            public_key: ``organization.public_key`` as the server gives it.

        Raises:
            InvalidKey: The text is empty or no RSA public key.
        """
        return PublicKey.from_text(public_key) == self.public_key

    def mark(self, content: bytes) -> bytes:
        """Make a keyed digest of what a message says, which tells nothing to those without this key.

        Args:
            content: What is said, and to whom and where, so that no two messages of different sense have one mark.

        Returns:
            Sixteen bytes, for `PublicKey.encrypt`.
        """
        secret = hashlib.sha256(b"prefect-biomed mark\0" + self.pem).digest()
        return hmac.digest(secret, content, "sha256")[:_IV_BYTES]

    def decrypt(self, message: str) -> bytes:
        """Read a message in string form.

        Messages written by the web interface (their key and their content are base64 once more)
        are recognised by their key and read too.

        Args:
            message: Three base64 parts joined by ``$``.

        Returns:
            The plaintext.

        Raises:
            DecryptionFailed: The form is wrong, or the message was encrypted for another key.
        """
        return b"".join(self.decrypt_text_stream([message.encode("ascii", "replace")]))

    def decrypt_blob(self, message: bytes) -> bytes:
        """Read a message in blob form.

        Args:
            message: Two base64 parts, each followed by ``$``, and the raw ciphertext.

        Returns:
            The plaintext.

        Raises:
            DecryptionFailed: The form is wrong, or the message was encrypted for another key.
        """
        return b"".join(self.decrypt_stream([message]))

    def decrypt_stream(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Read a message in blob form chunk by chunk.

        Args:
            chunks: The message in any sizes.

        Yields:
            The plaintext, one chunk in memory at a time.

        Raises:
            DecryptionFailed: The form is wrong, or the message was encrypted for another key.
        """
        return self._read(chunks, body_is_base64=False)

    def decrypt_text_stream(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Read a message in string form chunk by chunk, for results too large for memory.

        Args:
            chunks: The ASCII text in any sizes.

        Yields:
            The plaintext, one chunk in memory at a time.

        Raises:
            DecryptionFailed: The form is wrong, or the message was encrypted for another key.
        """
        return self._read(chunks, body_is_base64=True)

    def _read(self, chunks: Iterable[bytes], *, body_is_base64: bool) -> Iterator[bytes]:
        wrapped, iv, body = _split_header(chunks)
        key, from_web_interface = self._unwrap(wrapped)
        if len(iv) != _IV_BYTES:
            raise DecryptionFailed(f"The message's counter block has {len(iv)} bytes instead of {_IV_BYTES}.")
        decryptor = Cipher(algorithms.AES(key), modes.CTR(iv)).decryptor()
        ciphertext = decode_base64_stream(body) if body_is_base64 else body
        plaintext = (decryptor.update(chunk) for chunk in ciphertext)
        # Undone only when the key was wrapped the same way: content that merely looks like
        # base64 belongs to the algorithm and stays as it is.
        yield from decode_base64_stream(plaintext) if from_web_interface else plaintext

    def _unwrap(self, wrapped: bytes) -> tuple[bytes, bool]:
        try:
            key = self._key.decrypt(wrapped, padding.PKCS1v15())
        except ValueError as error:
            raise DecryptionFailed(f"The message cannot be decrypted: {_DAMAGED}.") from error
        if len(key) == _KEY_BYTES:
            return key, False
        # OpenSSL answers a wrong key with random bytes rather than with an error, so the length
        # is what tells.
        try:
            decoded = base64.b64decode(key, validate=True)
        except binascii.Error:
            decoded = b""
        if len(decoded) == _KEY_BYTES:
            return decoded, True
        raise DecryptionFailed(f"The message cannot be decrypted: {_DAMAGED}.")


def counter_block(message: Iterable[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """Read the counter block of an encrypted message, which needs no key.

    Args:
        message: Either form, in pieces.

    Returns:
        The block, and the whole message again.

    Raises:
        DecryptionFailed: The form is wrong.
    """
    wrapped, iv, body = _split_header(message)

    def whole() -> Iterator[bytes]:
        yield _SEPARATOR.join([base64.b64encode(wrapped), base64.b64encode(iv), b""])
        yield from body

    return iv, whole()


def decode_base64(text: str) -> bytes:
    """Read the plain form used by collaborations without encryption.

    Args:
        text: Standard base64.

    Raises:
        DecryptionFailed: The text is no base64.
    """
    return b"".join(decode_base64_stream([text.encode("ascii", "replace")]))


def encode_base64_stream(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Encode in standard base64 what arrives in chunks of any sizes.

    Args:
        chunks: The bytes.

    Yields:
        The ASCII text in pieces.
    """
    rest = b""
    for chunk in chunks:
        rest += chunk
        whole = len(rest) - len(rest) % 3
        yield base64.b64encode(rest[:whole])
        rest = rest[whole:]
    yield base64.b64encode(rest)


def decode_base64_stream(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Decode standard base64 that arrives in chunks of any sizes.

    Args:
        chunks: The ASCII text.

    Yields:
        The decoded bytes.

    Raises:
        DecryptionFailed: The text is no base64 or was cut short.
    """
    rest = b""
    for chunk in chunks:
        rest += chunk
        whole = len(rest) - len(rest) % 4
        yield _decode(rest[:whole])
        rest = rest[whole:]
    yield _decode(rest)


def _with_line_ends(pem: bytes) -> bytes:
    """Forms with one line turn the line ends of a PEM text into blanks, or into the letters of an escape."""
    parts = _ONE_LINE_PEM.fullmatch(pem.strip())
    if parts is None or b"\n" in pem.strip():
        return pem
    body = parts[2].replace(b"\\n", b" ").split()
    return b"\n".join([parts[1], *body, parts[3], b""])


def _decode(text: bytes) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise DecryptionFailed("The content is no base64, or it was cut short.") from error


def _split_header(chunks: Iterable[bytes]) -> tuple[bytes, bytes, Iterator[bytes]]:
    """Take the two base64 headers off a message."""
    remaining = iter(chunks)
    start = b""
    while start.count(_SEPARATOR) < 2:
        chunk = next(remaining, None)
        if chunk is None or len(start) > _HEADER_LIMIT:
            raise DecryptionFailed("The message is not encrypted: three parts separated by '$' were expected.")
        start += chunk
    wrapped, iv, body = start.split(_SEPARATOR, 2)

    def rest() -> Iterator[bytes]:
        yield body
        yield from remaining

    return _decode(wrapped), _decode(iv), rest()
