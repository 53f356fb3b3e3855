"""A Keycloak realm: who may log in to a v5 server, and the tokens it gives out.

Password, refresh, client credentials and device code; and of the administration as much as a
server needs to add and remove accounts.
"""

from __future__ import annotations

import base64
import html
import json
import random
import secrets
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from joserfc.jwk import OctKey, RSAKey
from starlette.responses import HTMLResponse, Response

from prefect_biomed.sandbox.vantage6._http import Answer, Call, Routes
from prefect_biomed.sandbox.vantage6._refusals import Refusal
from prefect_biomed.sandbox.vantage6._tokens import Claims, check_epoch, sign, verify

PUBLIC_CLIENT = "public_client"
_DEVICE_SECONDS = 600
_DEVICE_INTERVAL = 5

routes = Routes()


@dataclass
class RealmUser:
    """A person who may log in."""

    username: str
    subject: str
    password: str = field(repr=False)
    temporary: bool = False


@dataclass
class RealmClient:
    """A client with a service account: a node, or a user that is a program."""

    name: str
    id: str
    subject: str
    kind: str
    secret: str = field(repr=False)


@dataclass
class _Device:
    user_code: str
    expires: float
    interval: int
    asked: float = 0.0
    user: RealmUser | None = None
    denied: bool = False


def new_uuid(source: random.Random) -> str:
    """Return a UUID of version 4 from a source of numbers."""
    return str(uuid.UUID(int=source.getrandbits(128), version=4))


class Realm:
    """The accounts and keys of one realm.

    Args:
        name: of the realm.
        access_seconds: gives the life of an access token.
        refresh_seconds: gives the life of a refresh token.
        source: of ids and secrets; unpredictable ones when not given.

    Attributes:
        direct_access: whether the public client may send passwords (Keycloak's direct access
            grants); the official installation does not allow it.
        device_interval: seconds between two polls for a device code.
        token_generation: access tokens given out while it was lower have expired.
        url: where it is served, known once it is.
    """

    def __init__(
        self,
        name: str,
        access_seconds: Callable[[], float],
        refresh_seconds: Callable[[], float],
        source: random.Random | None = None,
    ) -> None:
        self.name = name
        self.direct_access = True
        self.device_interval = _DEVICE_INTERVAL
        self.token_generation = 0
        self.url = ""
        self._access_seconds = access_seconds
        self._refresh_seconds = refresh_seconds
        self._source = source or random.SystemRandom()
        self._users: dict[str, RealmUser] = {}
        self._clients: dict[str, RealmClient] = {}
        self._devices: dict[str, _Device] = {}
        private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        pem = private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        self._take_keys(pem, secrets.token_bytes(32))

    def _take_keys(self, private: bytes, refresh: bytes) -> None:
        self._secrets = (private, refresh)
        self._key = RSAKey.import_key(private)
        self._refresh_key = OctKey.import_key(refresh)
        self._der = (
            serialization.load_pem_private_key(private, password=None)
            .public_key()
            .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        )

    def kept(self) -> dict[str, Any]:
        """Return what a new process needs to go on with the same accounts and keys."""
        return {
            "users": self._users,
            "clients": self._clients,
            "devices": self._devices,
            "source": self._source,
            "secrets": self._secrets,
        }

    def restore(self, kept: dict[str, Any]) -> None:
        """Go on from what `kept` gave."""
        self._users, self._clients, self._devices = kept["users"], kept["clients"], kept["devices"]
        self._source = kept["source"]
        self._take_keys(*kept["secrets"])

    # -- accounts ----------------------------------------------------------------------------------

    def add_user(self, username: str, password: str, *, temporary: bool = False) -> RealmUser:
        """Add a person; a temporary password must be changed in a browser before it is any use."""
        if any(user.username == username for user in self._users.values()):
            raise Refusal(409, "User exists with same username")
        user = RealmUser(username, new_uuid(self._source), password, temporary)
        self._users[user.subject] = user
        return user

    def add_client(self, name: str, kind: str) -> RealmClient:
        """Add a client with a service account whose tokens say `kind`: user or node."""
        if any(client.name == name for client in self._clients.values()):
            raise Refusal(409, f"Client {name} already exists")
        client = RealmClient(name, new_uuid(self._source), new_uuid(self._source), kind, self._secret())
        self._clients[client.id] = client
        return client

    def _secret(self) -> str:
        return base64.urlsafe_b64encode(self._source.randbytes(24)).decode()

    def settle(self, username: str) -> None:
        """Make a temporary password lasting, as a person's first log-in in a browser does.

        Raises:
            KeyError: no such user.
        """
        self._named(username).temporary = False

    def _named(self, username: str) -> RealmUser:
        for user in self._users.values():
            if user.username == username:
                return user
        raise KeyError(username)

    def remove(self, subject: str | None) -> None:
        """Remove the account behind a subject, if there is one."""
        self._users.pop(subject or "", None)
        for client in [c for c in self._clients.values() if c.subject == subject]:
            del self._clients[client.id]

    def new_secret(self, client_id: str | None) -> str:
        """Replace the secret of a client."""
        client = self._clients[client_id or ""]
        client.secret = self._secret()
        return client.secret

    def approve(self, user_code: str, username: str) -> None:
        """Log a device in, as a person does in a browser.

        Raises:
            KeyError: no such code or user.
        """
        device = self._device(user_code)
        device.user = self._named(username)

    def deny(self, user_code: str) -> None:
        """Refuse a device.

        Raises:
            KeyError: no such code.
        """
        self._device(user_code).denied = True

    def _device(self, user_code: str) -> _Device:
        for device in self._devices.values():
            if device.user_code == user_code:
                return device
        raise KeyError(user_code)

    # -- tokens ------------------------------------------------------------------------------------

    def read(self, token: str) -> Claims:
        """Return the claims of an access token; ten seconds of lateness are forgiven.

        Raises:
            Refusal: 422 or 401, as the server answers.
        """
        # The leeway would hide that a token of two seconds has expired.
        leeway = 10.0 if self._access_seconds() >= 60 else 0.0
        claims = verify(token, self._key, leeway)
        check_epoch(claims, self.token_generation)
        return claims

    def grant(self, form: dict[str, str]) -> tuple[dict[str, Any], int]:
        """Answer a request to the token endpoint."""
        kind = form.get("grant_type", "")
        if kind == "client_credentials":
            return self._by_secret(form)
        if form.get("client_id") != PUBLIC_CLIENT:
            return _oauth("invalid_client", "Invalid client or Invalid client credentials", 401)
        if kind == "password":
            return self._by_password(form)
        if kind == "refresh_token":
            return self._by_refresh(form)
        if kind == "urn:ietf:params:oauth:grant-type:device_code":
            return self._by_device(form)
        return _oauth("unsupported_grant_type", "Unsupported grant_type")

    def _by_secret(self, form: dict[str, str]) -> tuple[dict[str, Any], int]:
        for client in self._clients.values():
            if client.name == form.get("client_id") and client.secret == form.get("client_secret"):
                access = self._access(client.subject, client.kind, client.name, client.name)
                return {
                    "access_token": access,
                    "expires_in": int(self._access_seconds()),
                    "refresh_expires_in": 0,
                    "token_type": "Bearer",
                    "not-before-policy": 0,
                    "scope": "profile email",
                }, 200
        return _oauth("unauthorized_client", "Invalid client or Invalid client credentials", 401)

    def _by_password(self, form: dict[str, str]) -> tuple[dict[str, Any], int]:
        if not self.direct_access:
            return _oauth("unauthorized_client", "Client not allowed for direct access grants")
        for user in self._users.values():
            if user.username == form.get("username") and user.password == form.get("password"):
                if user.temporary:
                    return _oauth("invalid_grant", "Account is not fully set up")
                return self._session(user), 200
        return _oauth("invalid_grant", "Invalid user credentials", 401)

    def _by_refresh(self, form: dict[str, str]) -> tuple[dict[str, Any], int]:
        try:
            claims = verify(form.get("refresh_token", ""), self._refresh_key)
        except Refusal as refusal:
            # An expired one and one that is none are told apart.
            expired = refusal.status == 401
            return _oauth("invalid_grant", "Token is not active" if expired else "Invalid refresh token")
        user = self._users.get(claims["sub"])
        if user is None:
            return _oauth("invalid_grant", "User not found or disabled")
        return self._session(user), 200

    def _by_device(self, form: dict[str, str]) -> tuple[dict[str, Any], int]:
        device = self._devices.get(form.get("device_code", ""))
        if device is None:
            return _oauth("invalid_grant", "Device code not valid")
        now = time.time()
        if now > device.expires:
            return _oauth("expired_token", "Device code is expired")
        if device.denied:
            return _oauth("access_denied", "The end user denied the authorization request")
        if device.user is None:
            early, device.asked = now - device.asked < device.interval, now
            if early:
                device.interval += 5
                return _oauth("slow_down", "Slow down")
            return _oauth("authorization_pending", "The authorization request is still pending")
        del self._devices[form["device_code"]]
        return self._session(device.user), 200

    def start_device(self, form: dict[str, str]) -> tuple[dict[str, Any], int]:
        """Begin a log-in in a browser elsewhere."""
        if form.get("client_id") != PUBLIC_CLIENT:
            return _oauth("invalid_client", "Invalid client or Invalid client credentials", 401)
        code = secrets.token_urlsafe(32)
        letters = "BCDFGHJKLMNPQRSTVWXZ"
        user_code = "-".join("".join(secrets.choice(letters) for _ in range(4)) for _ in range(2))
        self._devices[code] = _Device(user_code, time.time() + _DEVICE_SECONDS, self.device_interval)
        page = f"{self.url}/realms/{self.name}/device"
        return {
            "device_code": code,
            "user_code": user_code,
            "verification_uri": page,
            "verification_uri_complete": f"{page}?user_code={user_code}",
            "expires_in": _DEVICE_SECONDS,
            "interval": self.device_interval,
        }, 200

    def _session(self, user: RealmUser) -> dict[str, Any]:
        lives = self._refresh_seconds()
        refresh = {
            "sub": user.subject,
            "typ": "Refresh",
            "jti": str(uuid.uuid4()),
            "exp": time.time() + lives,
        }
        return {
            "access_token": self._access(user.subject, "user", PUBLIC_CLIENT, user.username),
            "expires_in": int(self._access_seconds()),
            "refresh_expires_in": int(lives),
            "refresh_token": sign(refresh, self._refresh_key),
            "token_type": "Bearer",
            "not-before-policy": 0,
            "session_state": str(uuid.uuid4()),
            "scope": "openid profile email",
        }

    def _access(self, subject: str, kind: str, client: str, username: str) -> str:
        start = time.time()
        claims = {
            "exp": start + self._access_seconds(),
            "iat": int(start),
            "jti": str(uuid.uuid4()),
            "iss": f"{self.url}/realms/{self.name}",
            "sub": subject,
            "typ": "Bearer",
            "azp": client,
            "preferred_username": username,
            "vantage6_client_type": kind,
            "epoch": self.token_generation,
        }
        return sign(claims, self._key, key_id="sandbox")

    def describe(self) -> dict[str, Any]:
        """Return what the realm says about itself."""
        root = f"{self.url}/realms/{self.name}"
        return {
            "realm": self.name,
            "public_key": base64.b64encode(self._der).decode(),
            "token-service": f"{root}/protocol/openid-connect",
            "account-service": f"{root}/account",
            "tokens-not-before": 0,
        }

    def configuration(self) -> dict[str, Any]:
        """Return the OpenID configuration."""
        root = f"{self.url}/realms/{self.name}"
        protocol = f"{root}/protocol/openid-connect"
        return {
            "issuer": root,
            "authorization_endpoint": f"{protocol}/auth",
            "token_endpoint": f"{protocol}/token",
            "introspection_endpoint": f"{protocol}/token/introspect",
            "userinfo_endpoint": f"{protocol}/userinfo",
            "end_session_endpoint": f"{protocol}/logout",
            "jwks_uri": f"{protocol}/certs",
            "device_authorization_endpoint": f"{protocol}/auth/device",
            "grant_types_supported": [
                "authorization_code",
                "client_credentials",
                "password",
                "refresh_token",
                "urn:ietf:params:oauth:grant-type:device_code",
            ],
        }

    def certificates(self) -> dict[str, Any]:
        """Return the public key as a JSON web key."""
        public = self._key.as_dict(private=False)
        return {"keys": [{**public, "kid": "sandbox", "alg": "RS256", "use": "sig"}]}

    # -- administration ----------------------------------------------------------------------------

    def user_named(self, username: str | None) -> list[dict[str, Any]]:
        """Return the users with this name, those behind clients included."""
        found = [{"id": u.subject, "username": u.username, "enabled": True} for u in self._users.values()]
        found += [
            {"id": c.subject, "username": f"service-account-{c.name}", "enabled": True} for c in self._clients.values()
        ]
        return [entry for entry in found if username in (None, entry["username"])]

    def client(self, identifier: str) -> RealmClient:
        """Return a client by its internal id.

        Raises:
            Refusal: 404, there is none.
        """
        if identifier not in self._clients:
            raise Refusal(404, "Could not find client")
        return self._clients[identifier]

    @property
    def clients(self) -> list[RealmClient]:
        """All clients with service accounts."""
        return list(self._clients.values())


def _oauth(error: str, description: str, status: int = 400) -> tuple[dict[str, Any], int]:
    return {"error": error, "error_description": description}, status


def _realm(call: Call) -> Realm:
    realm: Realm = call.server.realm
    if call.request.path_params["realm"] != realm.name:
        raise Refusal(404, "Realm does not exist")
    return realm


def _form(call: Call) -> dict[str, str]:
    form = dict(parse_qsl(call.content.decode()))
    scheme, _, encoded = call.request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        client, _, secret = base64.b64decode(encoded).decode().partition(":")
        form = {"client_id": client, "client_secret": secret, **form}
    return form


@routes.add("GET", "/realms/{realm}")
def get_realm(call: Call) -> Answer:
    return _realm(call).describe()


@routes.add("GET", "/realms/{realm}/.well-known/openid-configuration")
def get_configuration(call: Call) -> Answer:
    return _realm(call).configuration()


@routes.add("GET", "/realms/{realm}/protocol/openid-connect/certs")
def get_certificates(call: Call) -> Answer:
    return _realm(call).certificates()


@routes.add("POST", "/realms/{realm}/protocol/openid-connect/token")
def get_token(call: Call) -> Answer:
    return _realm(call).grant(_form(call))


@routes.add("POST", "/realms/{realm}/protocol/openid-connect/auth/device")
def get_device_code(call: Call) -> Answer:
    return _realm(call).start_device(_form(call))


@routes.add("GET", "/realms/{realm}/device")
def show_device_page(call: Call) -> Answer:
    code = html.escape(call.arg("user_code") or "")
    return HTMLResponse(
        "<!doctype html><title>Log in</title><form method=post>"
        f"<label>Code <input name=user_code value='{code}'></label>"
        "<label>User <input name=username></label>"
        "<label>Password <input name=password type=password></label>"
        "<button>Log in</button></form>"
    )


@routes.add("POST", "/realms/{realm}/device")
def approve_device(call: Call) -> Answer:
    realm, form = _realm(call), _form(call)
    _, status = realm.grant({**form, "grant_type": "password", "client_id": PUBLIC_CLIENT})
    if status != 200:
        return HTMLResponse("<!doctype html><p>Invalid username or password.", 401)
    try:
        realm.approve(form.get("user_code", ""), form["username"])
    except KeyError:
        return HTMLResponse("<!doctype html><p>Invalid code.", 400)
    return HTMLResponse("<!doctype html><p>Device Login Successful.")


# -- administration, as python-keycloak asks for it ------------------------------------------------------


def _created(call: Call, identifier: str) -> Response:
    return Response(status_code=201, headers={"Location": f"{call.request.url.path}/{identifier}"})


@routes.add("GET", "/admin/realms/{realm}/users")
def find_users(call: Call) -> Answer:
    first = int(call.arg("first") or 0)
    return _realm(call).user_named(call.arg("username"))[first:]


@routes.add("POST", "/admin/realms/{realm}/users")
def add_user(call: Call) -> Answer:
    body = json.loads(call.content)
    (credential,) = body.get("credentials") or [{"value": ""}]
    user = _realm(call).add_user(body["username"], credential["value"], temporary=bool(credential.get("temporary")))
    return _created(call, user.subject)


@routes.add("GET", "/admin/realms/{realm}/users/{subject}")
def get_user(call: Call) -> Answer:
    subject = call.request.path_params["subject"]
    for entry in _realm(call).user_named(None):
        if entry["id"] == subject:
            return entry
    raise Refusal(404, "User not found")


@routes.add("PUT", "/admin/realms/{realm}/users/{subject}")
def change_user(call: Call) -> Answer:
    # Attributes, which nothing here reads.
    return Response(status_code=204)


@routes.add("PUT", "/admin/realms/{realm}/users/{subject}/reset-password")
def reset_password(call: Call) -> Answer:
    body = json.loads(call.content)
    user = _realm(call)._users[call.request.path_params["subject"]]
    user.password, user.temporary = body["value"], bool(body.get("temporary"))
    return Response(status_code=204)


@routes.add("DELETE", "/admin/realms/{realm}/users/{subject}")
def delete_user(call: Call) -> Answer:
    _realm(call).remove(call.request.path_params["subject"])
    return Response(status_code=204)


@routes.add("GET", "/admin/realms/{realm}/clients")
def find_clients(call: Call) -> Answer:
    wanted = call.arg("clientId")
    return [{"id": c.id, "clientId": c.name} for c in _realm(call).clients if wanted in (None, c.name)]


@routes.add("POST", "/admin/realms/{realm}/clients")
def add_client(call: Call) -> Answer:
    body = json.loads(call.content)
    kinds = [
        mapper["config"]["claim.value"]
        for mapper in body.get("protocolMappers", [])
        if mapper["config"].get("claim.name") == "vantage6_client_type"
    ]
    client = _realm(call).add_client(body["clientId"], kinds[0] if kinds else "user")
    return _created(call, client.id)


@routes.add("GET", "/admin/realms/{realm}/clients/{client}/client-secret")
def get_client_secret(call: Call) -> Answer:
    return {"type": "secret", "value": _realm(call).client(call.request.path_params["client"]).secret}


@routes.add("POST", "/admin/realms/{realm}/clients/{client}/client-secret")
def new_client_secret(call: Call) -> Answer:
    client = _realm(call).client(call.request.path_params["client"])
    return {"type": "secret", "value": _realm(call).new_secret(client.id)}


@routes.add("DELETE", "/admin/realms/{realm}/clients/{client}")
def delete_client(call: Call) -> Answer:
    _realm(call).remove(_realm(call).client(call.request.path_params["client"]).subject)
    return Response(status_code=204)
