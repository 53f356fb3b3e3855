"""Every parser of what servers say, and of files of ours: it ends in its result or in an error of the package.

A few inputs for each in the default suite; `make fuzz` tries many and prints how many.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import importlib
import io
import json
import pkgutil
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import BaseModel

from prefect_biomed import clients
from prefect_biomed.analysis.experiment import Experiment, RunRecord
from prefect_biomed.clients import archives, rest
from prefect_biomed.clients.boss import _keys, cutouts, decoding
from prefect_biomed.clients.boss import client as boss_client
from prefect_biomed.clients.boss.config import IngestConfig
from prefect_biomed.clients.errors import BiomedError
from prefect_biomed.clients.once import Intent, IntentFolder
from prefect_biomed.clients.vantage6 import arguments, authentication, encryption, payloads, rounds
from prefect_biomed.clients.vantage6 import client as vantage6_client
from prefect_biomed.clients.vantage6.models import Record
from prefect_biomed.clients.vip import errors as vip_errors
from prefect_biomed.clients.vip import session_record

TRIED: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def count() -> Iterator[None]:
    yield
    print("\n" + "\n".join(f"{name:40} {number:8} inputs" for name, number in sorted(TRIED.items())))
    print(f"{len(TRIED)} parsers, {sum(TRIED.values())} inputs")


# -- inputs ------------------------------------------------------------------------------------------------------------

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**63, -(2**63) - 1, 10**400, -1, 0])
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        ["\x00", "\ud800", "../../etc", "0000-99-99T00:00", "1e999", "NaN", "9" * 5000, "\x1b[2J\n", "&&&&"]
    )
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


class Deep(bytes):
    """Lists in lists, too deep for any parser."""

    def __repr__(self) -> str:
        return "deep"


DEEP = Deep(b"[" * 100_000 + b"]" * 100_000)


def models_below(package: Any) -> list[type[BaseModel]]:
    names = [one.name for one in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    modules = [importlib.import_module(name) for name in names if "._process" not in name]
    found = {
        one
        for module in modules
        for one in vars(module).values()
        if isinstance(one, type) and issubclass(one, BaseModel) and one.__module__.startswith("prefect_biomed.clients")
    }
    return sorted(found, key=lambda one: f"{one.__module__}.{one.__qualname__}")


MODELS = models_below(clients)
ANSWERS = [one for one in MODELS if issubclass(one, rest.Answered) or one.__module__.endswith(".models")]
RECORDS = [one for one in MODELS if issubclass(one, Record) and one is not Record]


def shaped_like(model: type[BaseModel]) -> st.SearchStrategy[Any]:
    """Objects with the fields of a model, some of them, and values of any kind."""
    names = {field.alias or name for name, field in model.model_fields.items()} | set(model.model_fields)
    for field in model.model_fields.values():
        names |= {str(one) for one in getattr(field.validation_alias, "choices", ())}
    return st.dictionaries(st.sampled_from(sorted(names) or ["x"]), JSON, max_size=len(names)) | JSON


def damaged(*valid: bytes) -> st.SearchStrategy[bytes]:
    """Valid files cut, flipped, with bytes put in; and bytes of any kind."""

    @st.composite
    def broken(draw: st.DrawFn) -> bytes:
        content = bytearray(draw(st.sampled_from(valid)))
        for _ in range(draw(st.integers(0, 3))):
            at = draw(st.integers(0, max(len(content) - 1, 0)))
            match draw(st.sampled_from(["cut", "flip", "put", "drop"])):
                case "cut":
                    del content[at:]
                case "flip" if content:
                    content[at] = draw(st.integers(0, 255))
                case "put":
                    content[at:at] = draw(st.binary(max_size=8))
                case "drop":
                    del content[at : at + draw(st.integers(1, 20))]
        return bytes(content)

    return broken() | st.binary(max_size=200) | st.just(DEEP)


def as_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


def token_of(claims: Any) -> str:
    return f"e30.{base64.urlsafe_b64encode(as_bytes(claims)).decode().rstrip('=')}.s"


# -- parsers -----------------------------------------------------------------------------------------------------------

Parser = Callable[[Any], object]


def _response() -> requests.Response:
    response = requests.Response()
    response.status_code, response.url = 200, "https://h/x"
    return response


def read_answer(case: tuple[type[BaseModel], Any]) -> object:
    model, value = case
    found = rest.read_body(model, json.dumps(value, allow_nan=True), _response())
    return found.job("h") if hasattr(found, "job") and callable(found.job) else found


def read_record(case: tuple[type[Record], Any]) -> object:
    kind, value = case
    return vantage6_client.Vantage6Client._entry(SimpleNamespace(url="https://h"), kind, value)  # type: ignore[arg-type]


def refusal_of(kind: type[rest.RestClient]) -> Parser:
    return lambda value: kind._refusal(object.__new__(kind), 400, value)


def in_file(read: Callable[[Path], object], name: str = "file") -> Parser:
    def parse(content: bytes) -> object:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name)
            path.write_bytes(content)
            return read(path)

    return parse


def unpacked(path: Path) -> object:
    return archives.unpack(path, path.parent / "out") if archives.is_archive(path) else None


def picture(content: bytes) -> object:
    return decoding.opened(content, "x.png", None, frozenset(), 10_000)


@functools.cache
def _key() -> encryption.PrivateKey:
    return encryption.PrivateKey.generate(2048)


def decrypted(content: bytes) -> object:
    return _key().decrypt(content.decode("latin-1"))


def recognised(content: bytes) -> object:
    return [payloads.recognise(major, content, complete=True, run_id=1) for major in (3, 4, 5)]


def position_of(text: Any) -> object:
    for parse in (_keys.parse_tile, _keys.parse_chunk, _keys.parse_cuboid):
        with contextlib.suppress(_keys.PoisonMessage):
            parse(text, "1&2&3", 0)


def _key_of(*fields: int | str) -> str:
    base = "&".join(map(str, fields))
    return f"{hashlib.md5(base.encode(errors='surrogatepass'), usedforsecurity=False).hexdigest()}&{base}"


def numpy_of(header: str) -> bytes:
    text = header.encode("latin-1", errors="replace")
    return gzipped(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)


def experiment_of(path: Path) -> object:
    return Experiment(path.parent).records()


def rounds_of(path: Path) -> object:
    return rounds.Checkpoints(path.parent, {}, {})._kept()


def intents_of(path: Path) -> object:
    return IntentFolder(path.parent).read("token")


def _archives() -> tuple[bytes, bytes, bytes]:
    packed, tarred = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a/b.txt", b"x" * 100)
        archive.writestr("../c.txt", b"x")
    with tarfile.open(fileobj=tarred, mode="w") as tar:
        member = tarfile.TarInfo("a.txt")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    return packed.getvalue(), tarred.getvalue(), zlib.compress(tarred.getvalue())


def _pictures() -> tuple[bytes, ...]:
    made = []
    for kind in ("PNG", "TIFF", "BMP", "JPEG", "GIF"):
        file = io.BytesIO()
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(file, kind)
        made.append(file.getvalue())
    return tuple(made)


def _numpy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros((1, 2, 2), np.uint8))
    return file.getvalue()


def gzipped(content: bytes) -> bytes:
    packing = zlib.compressobj(wbits=31)
    return packing.compress(content) + packing.flush()


SESSION = as_bytes({"session_name": "s", "pipeline_id": "A/1", "workflows": {}, "vip_ldir": "/v"})
INTENT = Intent(token="token").model_dump_json().encode()
ROUND = b'{"number": 1, "task_id": 2, "organizations": [], "missing": [], "metrics": {}, "seconds": 1}'
PEM = b"-----BEGIN RSA PRIVATE KEY-----\nAA==\n-----END RSA PRIVATE KEY-----"
RUN = b'{"version": 1, "series": "s", "pipeline": "A/1", "repetition": 1}'

PARSERS: dict[str, tuple[Parser, st.SearchStrategy[Any]]] = {
    "answers of all platforms": (
        read_answer,
        st.sampled_from(ANSWERS).flatmap(lambda model: st.tuples(st.just(model), shaped_like(model))),
    ),
    "records of vantage6": (
        read_record,
        st.sampled_from(RECORDS).flatmap(lambda model: st.tuples(st.just(model), shaped_like(model))),
    ),
    "errors of VIP": (lambda value: vip_errors.read_refusal(400, value), JSON),
    "errors of vantage6": (refusal_of(vantage6_client.Vantage6Client), JSON),
    "errors of the Boss": (refusal_of(boss_client.BossClient), JSON),
    "claims of tokens": (
        authentication.claims_of,
        st.text(max_size=50) | JSON.map(token_of) | shaped_like(authentication.Claims).map(token_of),
    ),
    "life of tokens": (
        lambda token: authentication.Tokens.from_jwt(token, None).is_due,
        shaped_like(authentication.Claims).map(token_of),
    ),
    "results as they travel": (recognised, damaged(b'{"a": 1}', b"\x80\x04\x95", b"PAR1", b"a,b\n1,2\n")),
    "results in JSON": (lambda text: payloads.decode_json(text, run_id=1), damaged(b'{"a": [1, NaN, "x"]}')),
    "encrypted results": (decrypted, damaged(b"YQ==$YQ==$YQ==", b"x$y", base64.b64encode(bytes(256)) + b"$YQ==$YQ==")),
    "keys of tiles and chunks": (
        position_of,
        JSON | st.lists(st.sampled_from([1, 2, 3, 0, -1, 2**70, "x", "\ud800"])).map(lambda fields: _key_of(*fields)),
    ),
    "cutouts": (
        lambda packed: cutouts.unpack(packed, (1, 2, 2)),
        damaged(gzipped(_numpy()))
        | damaged(_numpy()).map(gzipped)
        | st.sampled_from(["-" * 60_000 + "1", "(" * 5000, "{'descr': '|u1', 'shape': (1e308, 1e308)}"]).map(numpy_of),
    ),
    "pictures": (picture, damaged(*_pictures())),
    "archives": (in_file(unpacked), damaged(*_archives())),
    "session files": (
        lambda text: session_record.parse(text, "x"),
        damaged(SESSION) | shaped_like(session_record.SessionRecord).map(as_bytes),
    ),
    "intents": (in_file(intents_of, "token.json"), damaged(INTENT) | shaped_like(Intent).map(as_bytes)),
    "rounds": (in_file(rounds_of, "rounds.jsonl"), damaged(ROUND)),
    "states of rounds": (in_file(rounds._read), damaged(b'{"a": [1, 2]}')),
    "lines of experiments": (
        in_file(experiment_of, "experiment.jsonl"),
        damaged(RUN) | shaped_like(RunRecord).map(as_bytes),
    ),
    "ingest configurations": (
        in_file(IngestConfig.load),
        damaged(b'{"schema": {}, "client": {}}') | shaped_like(IngestConfig).map(as_bytes),
    ),
    "arguments files": (in_file(arguments._json_of), damaged(b'{"a": 1}')),
    "private keys": (encryption.PrivateKey.from_pem, damaged(PEM)),
}


@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_ends_in_its_result_or_in_an_error_of_ours(name: str) -> None:
    parse, inputs = PARSERS[name]

    @settings(suppress_health_check=list(HealthCheck), deadline=None)
    @given(inputs)
    def tried(value: Any) -> None:
        TRIED[name] += 1
        with contextlib.suppress(BiomedError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parse(value)

    tried()


def test_a_parser_that_lets_another_error_out_is_found() -> None:
    """The control."""

    @settings(suppress_health_check=list(HealthCheck), deadline=None, report_multiple_bugs=False)
    @given(damaged(b'{"a": 1}'))
    def tried(value: bytes) -> None:
        with contextlib.suppress(BiomedError):
            json.loads(value)

    with pytest.raises((ValueError, RecursionError)):
        tried()
