"""End-to-end encryption as nodes do it: RSA for a fresh AES key, AES-CTR for the rest.

Written for the sandbox alone, so that a mistake in the package's own encryption cannot hide here.
"""

from __future__ import annotations

import base64
import os

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

_SEPARATOR = b"$"


class Undecipherable(ValueError):
    """Input that this key does not open."""


class KeyPair:
    """The keys of one organization.

    Args:
        private: the private key.
    """

    def __init__(self, private: rsa.RSAPrivateKey) -> None:
        self._private = private

    @classmethod
    def generate(cls, bits: int) -> KeyPair:
        """Make a new pair."""
        return cls(rsa.generate_private_key(public_exponent=65537, key_size=bits))

    @classmethod
    def from_pem(cls, pem: bytes) -> KeyPair:
        """Read a private key from PEM."""
        key = serialization.load_pem_private_key(pem, password=None)
        if not isinstance(key, rsa.RSAPrivateKey):
            raise ValueError("not an RSA key")
        return cls(key)

    @property
    def pem(self) -> bytes:
        """The private key in the form in which vantage6 keeps it: PEM, PKCS#1, no passphrase."""
        return self._private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )

    @property
    def public(self) -> str:
        """The public key as an organization's record carries it: base64 of the PEM text."""
        pem = self._private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return base64.b64encode(pem).decode()

    def open(self, sealed: bytes, *, blob: bool = False) -> bytes:
        """Decrypt what `seal` or, as a blob, `seal_blob` made.

        Raises:
            Undecipherable: it is for another key, or no such thing at all.
        """
        try:
            wrapped, vector, body = sealed.split(_SEPARATOR, 2)
            key = self._private.decrypt(base64.b64decode(wrapped), padding.PKCS1v15())
            start = base64.b64decode(vector)
            body = body if blob else base64.b64decode(body)
            browser = len(key) == 44
            if browser:
                # The web interface encodes the key once more, and then the text too.
                key = base64.b64decode(key)
        except ValueError as error:
            raise Undecipherable("not encrypted, or for another organization") from error
        if len(key) != 32 or len(start) != 16:
            raise Undecipherable("encrypted for another organization: the key inside has a wrong length")
        opened = Cipher(AES(key), CTR(start)).decryptor().update(body)
        return base64.b64decode(opened) if browser else opened


def seal(plain: bytes, public: str) -> str:
    """Encrypt for the owner of a public key.

    Args:
        plain: any bytes.
        public: base64 of a PEM text.

    Returns:
        Wrapped key, initial counter and ciphertext in base64, joined by dollar signs.
    """
    wrapped, start, body = _seal(plain, public)
    return _SEPARATOR.join(map(base64.b64encode, (wrapped, start, body))).decode()


def seal_blob(plain: bytes, public: str) -> bytes:
    """Encrypt into the form that the blob store holds: the ciphertext as it is."""
    wrapped, start, body = _seal(plain, public)
    return _SEPARATOR.join([base64.b64encode(wrapped), base64.b64encode(start), body])


def _seal(plain: bytes, public: str) -> tuple[bytes, bytes, bytes]:
    owner = serialization.load_pem_public_key(base64.b64decode(public))
    if not isinstance(owner, rsa.RSAPublicKey):
        raise ValueError("not an RSA key")
    key, start = os.urandom(32), os.urandom(16)
    body = Cipher(AES(key), CTR(start)).encryptor().update(plain)
    return owner.encrypt(key, padding.PKCS1v15()), start, body
