"""Encryption of vantage6 against the vectors that its own library wrote."""

import base64
import contextlib
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

from prefect_biomed.clients.vantage6.encryption import PrivateKey, PublicKey, decode_base64, decode_base64_stream
from prefect_biomed.clients.vantage6.errors import DecryptionFailed, InvalidKey

VECTORS = Path(__file__).parents[1] / "vectors" / "vantage6"
KEYS: dict[str, Any] = json.loads((VECTORS / "keys.json").read_text())["keys"]
ENCRYPTION: dict[str, Any] = json.loads((VECTORS / "encryption.json").read_text())

# Content that is no JSON: the library takes it for base64 and decodes it once too often, or gives up.
LIBRARY_IS_WRONG = {"plain text, not base64", "plain text that is base64", "binary, no utf-8", "10 kB"}


@cache
def rsa_key(name: str) -> rsa.RSAPrivateKey:
    numbers = {part: int(str(value), 0) for part, value in KEYS[name]["private_numbers"].items()}
    public = rsa.RSAPublicNumbers(numbers.pop("e"), numbers.pop("n"))
    return rsa.RSAPrivateNumbers(public_numbers=public, **numbers).private_key()


def private_key(name: str) -> PrivateKey:
    return PrivateKey(rsa_key(name))


def vector_id(vector: dict[str, Any]) -> str:
    return str(vector["name"])


def in_chunks(content: bytes, size: int) -> list[bytes]:
    return [content[at : at + size] for at in range(0, len(content), size)]


every_vector = pytest.mark.parametrize("vector", ENCRYPTION["vectors"], ids=vector_id)
every_blob = pytest.mark.parametrize(
    "vector", [vector for vector in ENCRYPTION["vectors"] if "ciphertext_blob_base64" in vector], ids=vector_id
)


def test_all_vectors_are_here() -> None:
    assert len(ENCRYPTION["vectors"]) == 10
    assert len(ENCRYPTION["must_fail"]) == 4


@every_vector
def test_string_form_is_read(vector: dict[str, Any]) -> None:
    plaintext = private_key(vector["key"]).decrypt(vector["ciphertext_str"])
    assert plaintext == base64.b64decode(vector["plaintext_base64"])
    if vector["name"] not in LIBRARY_IS_WRONG:
        assert plaintext == base64.b64decode(vector["library_decrypt_str"]["ok_base64"])


@every_vector
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_string_form_is_read_in_chunks(vector: dict[str, Any], size: int) -> None:
    text = vector["ciphertext_str"].encode()
    plaintext = b"".join(private_key(vector["key"]).decrypt_text_stream(in_chunks(text, size)))
    assert plaintext == base64.b64decode(vector["plaintext_base64"])


@every_blob
def test_blob_form_is_read(vector: dict[str, Any]) -> None:
    blob = base64.b64decode(vector["ciphertext_blob_base64"])
    assert private_key(vector["key"]).decrypt_blob(blob) == base64.b64decode(vector["plaintext_base64"])


@every_blob
@pytest.mark.parametrize("size", [1, 13, 4096])
def test_stream_form_is_read(vector: dict[str, Any], size: int) -> None:
    stream = base64.b64decode(vector["ciphertext_stream_base64"])
    plaintext = b"".join(private_key(vector["key"]).decrypt_stream(in_chunks(stream, size)))
    assert plaintext == base64.b64decode(vector["plaintext_base64"])


@every_blob
def test_what_we_write_is_what_the_library_writes(vector: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    key, iv = base64.b64decode(vector["shared_key_base64"]), base64.b64decode(vector["iv_base64"])
    monkeypatch.setattr(os, "urandom", {32: key, 16: iv}.__getitem__)
    plaintext = base64.b64decode(vector["plaintext_base64"])
    owner = private_key(vector["key"])

    written = owner.public_key.encrypt(plaintext)
    blob = owner.public_key.encrypt_blob(plaintext)
    stream = b"".join(owner.public_key.encrypt_stream(in_chunks(plaintext, 5)))

    # The first part differs from run to run, because PKCS#1 v1.5 pads with random bytes.
    assert written.split("$")[1:] == vector["ciphertext_str"].split("$")[1:]
    for ours, theirs in [(blob, "ciphertext_blob_base64"), (stream, "ciphertext_stream_base64")]:
        assert ours.split(b"$", 1)[1] == base64.b64decode(vector[theirs]).split(b"$", 1)[1]
    assert owner.decrypt(written) == owner.decrypt_blob(blob) == owner.decrypt_blob(stream) == plaintext


@pytest.mark.parametrize("vector", ENCRYPTION["must_fail"], ids=vector_id)
def test_what_must_fail_fails(vector: dict[str, Any]) -> None:
    with pytest.raises(DecryptionFailed):
        private_key(vector["key"]).decrypt(vector["ciphertext_str"])
    with pytest.raises(DecryptionFailed):
        private_key(vector["key"]).decrypt_blob(vector["ciphertext_str"].encode())


def test_every_message_gets_its_own_key() -> None:
    key = private_key("org_b_2048").public_key
    first, second = key.encrypt(b"same"), key.encrypt(b"same")
    assert not set(first.split("$")) & set(second.split("$"))


def test_plain_form() -> None:
    plain = ENCRYPTION["dummy"]
    assert decode_base64(plain["encrypt_str"]) == b'{"a": 1}'
    assert b"".join(decode_base64_stream(in_chunks(plain["encrypt_stream_joined"].encode(), 3))) == b"abcdefghij"


@pytest.mark.parametrize("text", ["a", "abc", "%%%%", "aGVsbG8=x", "é€"])
def test_what_is_no_base64_is_refused(text: str) -> None:
    with pytest.raises(DecryptionFailed):
        decode_base64(text)


def test_a_message_cut_short_is_refused() -> None:
    vector = ENCRYPTION["vectors"][8]
    with pytest.raises(DecryptionFailed):
        private_key(vector["key"]).decrypt(vector["ciphertext_str"][:-1])


@pytest.mark.parametrize("name", sorted(KEYS))
def test_public_keys_are_written_as_the_library_writes_them(name: str) -> None:
    key = private_key(name)
    assert key.public_key.text == KEYS[name]["public_key_str"]
    assert key.matches(KEYS[name]["public_key_str"])
    assert PublicKey.from_text(KEYS[name]["public_key_str"]) == key.public_key
    others = [other for other in KEYS if other != name]
    assert not any(key.matches(KEYS[other]["public_key_str"]) for other in others)
    assert len({PublicKey.from_text(KEYS[other]["public_key_str"]).fingerprint for other in KEYS}) == len(KEYS)


def test_a_key_with_other_line_ends_is_the_same_key() -> None:
    pem = base64.b64decode(KEYS["org_b_2048"]["public_key_str"]).replace(b"\n", b"\r\n")
    assert private_key("org_b_2048").matches(base64.b64encode(pem).decode())


@pytest.mark.parametrize("form", [PrivateFormat.TraditionalOpenSSL, PrivateFormat.PKCS8])
def test_private_keys_are_read(form: PrivateFormat, tmp_path: Path) -> None:
    pem = rsa_key("org_b_2048").private_bytes(Encoding.PEM, form, NoEncryption())
    path = tmp_path / "privkey_b.pem"
    path.write_bytes(pem)
    for key in [PrivateKey.from_pem(pem), PrivateKey.from_pem(pem.decode()), PrivateKey.from_file(path)]:
        assert key.matches(KEYS["org_b_2048"]["public_key_str"])
        assert key.pem.startswith(b"-----BEGIN RSA PRIVATE KEY-----")


@pytest.mark.parametrize("line_end", [" ", "\\n", "\r\n"])
def test_a_private_key_from_a_form_is_read(line_end: str) -> None:
    pem = private_key("org_b_2048").pem.decode().replace("\n", line_end)
    assert PrivateKey.from_pem(pem).matches(KEYS["org_b_2048"]["public_key_str"])


def test_bad_private_keys_are_refused_without_quoting_them(tmp_path: Path) -> None:
    locked = rsa_key("org_b_2048").private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"canary"))
    with pytest.raises(InvalidKey, match="passphrase"):
        PrivateKey.from_pem(locked)
    (tmp_path / "bad.pem").write_text("canary-of-a-key")
    for read in (
        lambda: PrivateKey.from_pem("canary-of-a-key"),
        lambda: PrivateKey.from_file(tmp_path / "bad.pem"),
        lambda: PrivateKey.from_file(tmp_path / "missing.pem"),
        lambda: PublicKey.from_text("canary-of-a-key"),
        lambda: PublicKey.from_text(""),
    ):
        with pytest.raises(InvalidKey) as refused:
            read()
        assert "canary-of-a-key" not in str(refused.value)


def test_no_key_material_in_repr() -> None:
    key = private_key("org_b_2048")
    assert repr(key) == f"PrivateKey(public={key.public_key.fingerprint})"
    assert "BEGIN" not in repr(vars(key)["_key"]) + repr(key.public_key)


def test_two_organizations_side_by_side() -> None:
    b, c = private_key("org_b_2048"), private_key("org_c_2048")
    for_b, for_c = b.public_key.encrypt(b"for b"), c.public_key.encrypt(b"for c")
    assert (b.decrypt(for_b), c.decrypt(for_c)) == (b"for b", b"for c")
    for key, message in [(b, for_c), (c, for_b)]:
        # One in some two hundred wrong keys opens to 32 random bytes; the content is then random too.
        with contextlib.suppress(DecryptionFailed):
            assert key.decrypt(message) not in (b"for b", b"for c")


def test_new_keys_have_4096_bits_and_survive_the_file() -> None:
    key = PrivateKey.generate()
    again = PrivateKey.from_pem(key.pem)
    assert again.public_key == key.public_key
    assert again.decrypt(key.public_key.encrypt(b"x")) == b"x"
    assert len(base64.b64decode(key.public_key.encrypt(b"").split("$")[0])) == 512
