"""Tokens: those that v3 and v4 servers sign themselves, those of a realm, those of containers."""

from __future__ import annotations

import base64
import hashlib
import json
import time
import uuid
from typing import Any

from joserfc import jws
from joserfc.errors import JoseError
from joserfc.jwk import OctKey, RSAKey

from prefect_biomed.sandbox.vantage6._refusals import TokenRefusal

Claims = dict[str, Any]


def sign(claims: Claims, key: OctKey | RSAKey, key_id: str | None = None) -> str:
    """Return a compact token: HS256 with a symmetric key, RS256 with an RSA key.

    `sub` may be a number or an object, which libraries that check claims refuse to write.
    """
    algorithm = "HS256" if isinstance(key, OctKey) else "RS256"
    header = {"alg": algorithm, "typ": "JWT"} | ({"kid": key_id} if key_id else {})
    return jws.serialize_compact(header, json.dumps(claims).encode(), key, algorithms=[algorithm])


def verify(token: str, key: OctKey | RSAKey, leeway_seconds: float = 0.0) -> Claims:
    """Return the claims of a token that is signed with this key and has not expired.

    Raises:
        TokenRefusal: 422 when it is malformed or signed otherwise, 401 when it has expired, in the
            words of the servers.
    """
    if token.count(".") != 2:
        raise TokenRefusal(422, "Not enough segments")
    if _object(token.split(".")[0]) is None:
        raise TokenRefusal(422, "Invalid header padding")
    algorithm = "HS256" if isinstance(key, OctKey) else "RS256"
    try:
        signed = jws.deserialize_compact(token, key, algorithms=[algorithm])
    except (JoseError, ValueError) as error:
        raise TokenRefusal(422, "Signature verification failed") from error
    claims: Claims = json.loads(signed.payload)
    if "exp" in claims and claims["exp"] + leeway_seconds < time.time():
        raise TokenRefusal(401, "Token has expired", "Signature has expired")
    return claims


def check_epoch(claims: Claims, epoch: int) -> None:
    """Take a token of an earlier epoch for an expired one; those of containers have no epoch and never expire.

    Raises:
        TokenRefusal: 401, as for a token that is too old.
    """
    if claims.get("epoch", epoch) < epoch:
        raise TokenRefusal(401, "Token has expired", "Signature has expired")


def _object(part: str) -> dict[str, Any] | None:
    try:
        found = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def secret_key(seed: int, number: int) -> OctKey:
    """Return the signing key of a server; another `number` is a server that was restarted."""
    return OctKey.import_key(hashlib.sha256(f"vantage6 sandbox {seed} {number}".encode()).digest())


def session_claims(subject: int, kind: str, roles: list[str], seconds: float, *, refresh: bool) -> Claims:
    """Return what a v3 or v4 server writes into the token of a user or node."""
    start = int(time.time())
    return {
        "fresh": False,
        "iat": start,
        "jti": str(uuid.uuid4()),
        "type": "refresh" if refresh else "access",
        "sub": subject,
        "nbf": start,
        "csrf": str(uuid.uuid4()),
        # Whole seconds would make a life below one second impossible to try.
        "exp": time.time() + seconds,
        "client_type": kind,
        "roles": roles,
    }
