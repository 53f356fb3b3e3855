"""The emulated server: log-ins, seed, nodes, and how it is served."""

from __future__ import annotations

import hashlib
import hmac
import json
import random
import secrets
import struct
import time
from base64 import b32decode, b32encode
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import quote, urlencode

import httpx
from fastapi import FastAPI
from pydantic import Field
from starlette.requests import Request

from prefect_biomed.sandbox._core import Platform, Switches
from prefect_biomed.sandbox.vantage6 import (
    _keycloak,
    _login,
    _people,
    _places,
    _sessions,
    _store,
    _work,
)
from prefect_biomed.sandbox.vantage6._bodies import schemas
from prefect_biomed.sandbox.vantage6._cohorts import split
from prefect_biomed.sandbox.vantage6._encryption import KeyPair
from prefect_biomed.sandbox.vantage6._http import build
from prefect_biomed.sandbox.vantage6._keycloak import PUBLIC_CLIENT, Realm, new_uuid
from prefect_biomed.sandbox.vantage6._permissions import Caller, seed_rules
from prefect_biomed.sandbox.vantage6._records import (
    Authenticatable,
    Collaboration,
    Node,
    Organization,
    Registry,
    Run,
    Study,
    User,
    now,
)
from prefect_biomed.sandbox.vantage6._refusals import Refusal, ServerFlaw, TokenRefusal
from prefect_biomed.sandbox.vantage6._tokens import check_epoch, secret_key, session_claims, sign, verify
from prefect_biomed.sandbox.vantage6._views import View
from prefect_biomed.sandbox.vantage6.algorithms import Algorithm, Image, clinical
from prefect_biomed.sandbox.vantage6.nodes import ComputeNode, NodeSettings, OnEvent

PASSWORD = "Sandbox-1!"
REALM = "vantage6"
_NODE_SECONDS = 6 * 3600.0
_FAILURES_ALLOWED = 5
_BLOCKED_FOR = timedelta(minutes=15)
_HOSPITALS = ("north", "south", "west")


class Vantage6Switches(Switches):
    """What can be changed about the emulated vantage6.

    Attributes:
        generation: 3, 4 or 5: which server is emulated. Fixed once it runs.
        organizations: how many hospitals there are; further ones than the three named ones get
            numbers. Fixed once it runs.
        key_bits: size of the organizations' RSA keys. Fixed once it runs.
        access_seconds: life of the access tokens given out from now on; by default six hours, and
            five minutes in v5.
        refresh_seconds: life of the refresh tokens given out from now on; by default 48 hours, and
            half an hour in v5.
        two_factor: whether users need a second factor (v3, v4).
        signing_key: another number invalidates all tokens of v3 and v4, as a restart of a server
            with a random key does; nodes log in again, algorithms that hold a token crash when they use it.
        token_generation: raising it makes all access tokens given out so far expire at once, those of nodes
            too; refresh tokens go on.
        blob_store: whether inputs and results go to the blob store (v4, v5). Change it only while
            nothing runs.
        offline: names of nodes to take offline; those not named come online.
        startup_seconds: by node name, how long its containers take to start.
        direct_access: whether Keycloak takes passwords from clients (v5).
        device_interval: seconds between two polls for a device code (v5).
        stuck_dataframes: whether a dataframe is never ready again after a preprocessing step, even when that went
            well, and its last task cannot be deleted (v5, vantage6 #2233).
        failed_is_ready: whether sessions and dataframes count as ready whose last step has failed (v5, vantage6
            #2170).
        failures_stay_open: whether runs that fail get no end, so that their node computes them again when it starts
            (vantage6 #2371).
    """

    generation: Literal[3, 4, 5] = Field(default=4, frozen=True)
    organizations: int = Field(default=3, ge=3, le=99, frozen=True)
    key_bits: int = Field(default=4096, ge=2048, le=8192, frozen=True)
    access_seconds: float | None = Field(default=None, gt=0)
    refresh_seconds: float | None = Field(default=None, gt=0)
    two_factor: bool = False
    signing_key: int = 0
    token_generation: int = Field(default=0, ge=0)
    blob_store: bool = False
    offline: list[str] = Field(default_factory=list)
    startup_seconds: dict[str, float] = Field(default_factory=dict)
    direct_access: bool = True
    device_interval: int = Field(default=5, ge=0)
    stuck_dataframes: bool = False
    failed_is_ready: bool = False
    failures_stay_open: bool = False

    def __setattr__(self, name: str, value: Any) -> None:
        """Tell the platform of changes."""
        super().__setattr__(name, value)
        changed = getattr(self, "_changed", None)
        if changed is not None and not name.startswith("_"):
            changed()

    _changed: Any = None


class Vantage6Sandbox(Platform):
    """A vantage6 server of generation 3, 4 or 5, with nodes that compute.

    It is seeded with a root organization and three hospitals (`north`, `south`, `west`), which take
    part in a plain and in an encrypted collaboration with one node each. The nodes hold two public
    clinical data sets as CSV files and offer the algorithms of `algorithms.CLINICAL`. `ready()`
    lists everything a client needs.

    Attributes:
        registry: the tables.
        nodes: the nodes by name; `start()` and `stop()` of one take it online and offline.
        keys: the key pair of each organization, by name.
        cohorts: the CSV file of each database label, by organization.
        images: the algorithms the nodes have, by image name.
        mails: what was sent to users by mail: (username, token), newest last.
        realm: the Keycloak realm of v5.
        blobs: folder of the blob store; None while it is off.
        down: whether nodes cannot reach the server.
    """

    name: ClassVar[str] = "vantage6"
    switches_type: ClassVar[type[Switches]] = Vantage6Switches
    switches: Vantage6Switches

    def __init__(self, *, seed: int = 0, directory: Path, **switches: Any) -> None:
        super().__init__(seed=seed, directory=directory, **switches)
        generation = self.switches.generation
        self.generation = generation
        self.prefix = "/hq" if generation == 5 else "/api"
        self.registry = Registry(generation)
        self.view = View(self.registry, self.prefix)
        self.schemas = schemas(generation)
        self._random = random.Random(f"vantage6 {seed}")
        self.realm = Realm(REALM, self._access_seconds, self._refresh_seconds, self._random)
        self.images: dict[str, Image] = {}
        self.mails: list[tuple[str, str]] = []
        self.nodes: dict[str, ComputeNode] = {}
        self.down = False
        self._service_secret = ""
        self.add_image(clinical)
        self._seed()
        app = FastAPI(openapi_url=None)
        groups = [_login.routes, _people.routes, _places.routes, _work.routes]
        if generation == 5:
            groups.append(_sessions.routes)
        self._internal = build(self, app, self.prefix, groups)
        if generation > 3:
            build(self, app, _store.PREFIX, [_store.routes])
        if generation == 5:
            build(self, app, "", [_keycloak.routes])
        self.app = app
        self._apply()
        self.switches._changed = self._apply

    # -- switches ----------------------------------------------------------------------------------

    def _access_seconds(self) -> float:
        return self.switches.access_seconds or (300.0 if self.generation == 5 else 6 * 3600.0)

    def _refresh_seconds(self) -> float:
        return self.switches.refresh_seconds or (1800.0 if self.generation == 5 else 48 * 3600.0)

    def _apply(self) -> None:
        self.realm.direct_access = self.switches.direct_access
        self.realm.device_interval = self.switches.device_interval
        self.realm.token_generation = self.switches.token_generation
        self.registry.stuck_dataframes = self.switches.stuck_dataframes
        self.registry.failed_is_ready = self.switches.failed_is_ready
        if self.switches.blob_store:
            (self.directory / "blobs").mkdir(exist_ok=True)
        if not self.url or self.down:
            return
        for name, node in self.nodes.items():
            node.settings.startup_seconds = self.switches.startup_seconds.get(name, 0.0)
            if name in self.switches.offline:
                node.stop()
            else:
                node.start()

    @property
    def blobs(self) -> Path | None:
        """Where blobs are kept; None while there is no blob store."""
        return self.directory / "blobs" if self.switches.blob_store else None

    # -- life --------------------------------------------------------------------------------------

    def start(self, url: str) -> None:
        """Take the nodes online."""
        super().start(url)
        self.realm.url = url
        self._apply()

    def stop(self) -> None:
        """Stop the nodes."""
        self.url = ""
        for node in self.nodes.values():
            node.close()

    @contextmanager
    def frozen(self) -> Iterator[dict[str, Any]]:
        """Give the tables, the accounts of the realm and the mails; keys, cohorts and dataframes are in the folder."""
        with self.registry.lock:
            yield {
                "tables": self.registry.tables,
                "random": self._random,
                "realm": self.realm.kept(),
                "mails": self.mails,
                "computing": [node for node in self.registry.nodes if node.name in self.nodes],
                "service_secret": self._service_secret,
            }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from the state of an earlier process; nodes take up what is open once they are online."""
        self.registry.restore(state["tables"])
        self.realm.restore(state["realm"])
        self._random, self.mails = state["random"], state["mails"]
        self._service_secret = state["service_secret"]
        for node in self.registry.nodes:
            node.status = None if node.status is None else "offline"
        for stale in self.nodes.values():
            stale.close()
        self.nodes = {node.name: self._compute_node(node) for node in state["computing"]}

    def went_down(self) -> None:
        """Cut the nodes off; what they compute goes on."""
        self.down = True
        with self.registry.lock:
            for node in self.registry.nodes:
                node.status = None if node.status is None else "offline"

    def came_back(self) -> None:
        """Have the nodes that were online connect again, as they do by themselves."""
        self.down = False
        for node in self.nodes.values():
            node.reconnect()
        self._apply()

    def ready(self) -> dict[str, Any]:
        """Return URL, users, organizations, collaborations, nodes, image and, for v5, Keycloak."""
        registry = self.registry
        facts: dict[str, Any] = {
            "url": f"{self.url}{self.prefix}",
            "generation": self.generation,
            "version": _login.VERSIONS[self.generation],
            "users": {
                user.username: {
                    "id": user.id,
                    "password": PASSWORD,
                    "organization": user.organization.name,
                    "roles": [role.name for role in user.roles],
                }
                for user in registry.users
                if not user.is_service_account
            },
            "organizations": {
                str(organization.name): {
                    "id": organization.id,
                    "private_key": str(self._key_file(str(organization.name))),
                }
                for organization in registry.organizations
                if organization.name in self.keys
            },
            "collaborations": {
                collaboration.name: {"id": collaboration.id, "encrypted": collaboration.encrypted}
                for collaboration in registry.collaborations
            },
            "nodes": {node.name: {"id": node.id, "api_key": node.api_key} for node in registry.nodes},
            "images": {name: sorted(image.algorithms) for name, image in self.images.items()},
            "databases": sorted({label for files in self.cohorts.values() for label in files}),
            "tables": {
                name: {label: str(path) for label, path in files.items()} for name, files in self.cohorts.items()
            },
        }
        if self.generation > 3:
            facts["store_url"] = f"{self.url}{_store.PREFIX}"
        if self.generation == 5:
            facts["auth_url"] = self.url
            facts["realm"] = REALM
            facts["client"] = PUBLIC_CLIENT
            facts["service_account"] = {
                "username": "north-robot",
                "client_id": "north-robot-user-client",
                "client_secret": self._service_secret,
            }
        return facts

    # -- what is there at the start ------------------------------------------------------------------

    def _seed(self) -> None:
        registry = self.registry
        seed_rules(registry)
        roles = {role.name: role for role in registry.roles}
        count = self.switches.organizations
        names = [*_HOSPITALS, *(f"hospital-{n}" for n in range(4, count + 1))]
        root = registry.organizations.add(Organization(name="root"))
        hospitals = [self._add_organization(name) for name in names]
        north, south, west = hospitals[:3]
        self.keys = self._make_keys(names)
        for organization in hospitals:
            organization.public_key = self.keys[str(organization.name)].public
        self._add_user("root", root, roles["Root"])
        for organization in (north, south, west):
            self._add_user(f"{organization.name}-researcher", organization, roles["Researcher"])
        self._add_user("north-admin", north, roles["Collaboration Admin"])
        self._add_user("north-viewer", north, roles["Viewer"])
        if self.generation == 5:
            robot = self._add_user("north-robot", north, roles["Researcher"], service=True)
            assert robot.is_service_account
        self._add_user("south-steward", south, roles["Organization Admin"])
        self.cohorts = split(self.directory / "cohorts", names)
        for encrypted in (False, True):
            kind = "encrypted" if encrypted else "plain"
            collaboration = registry.collaborations.add(
                Collaboration(name=kind, encrypted=encrypted, organizations=list(hospitals))
            )
            for organization in hospitals:
                node = Node(
                    name=f"{organization.name}-{kind}",
                    collaboration=collaboration,
                    organization=organization,
                    status=None,
                )
                self.register_node(node)
                self.nodes[node.name] = self._compute_node(node)
        if self.generation > 3:
            registry.studies.add(
                Study(
                    name="north-and-south",
                    collaboration=registry.collaborations.where(name="plain")[0],
                    organizations=[north, south],
                )
            )

    def _add_organization(self, name: str) -> Organization:
        return self.registry.organizations.add(
            Organization(
                name=name,
                domain=f"{name}.example",
                address1="Street 1",
                address2="",
                zipcode="1000AA",
                country="NL",
            )
        )

    def _uuid(self) -> str:
        """Return an API key: the same ones for the same seed."""
        return new_uuid(self._random)

    def _make_keys(self, names: Sequence[str]) -> dict[str, KeyPair]:
        bits = self.switches.key_bits
        if all(self._key_file(name).exists() for name in names):
            return {name: KeyPair.from_pem(self._key_file(name).read_bytes()) for name in names}
        with ThreadPoolExecutor(max_workers=4) as pool:
            # Beyond the three that people use, one pair for all: making 25 takes a while.
            made = list(pool.map(lambda _: KeyPair.generate(bits), range(min(4, len(names)))))
        keys = {name: made[min(place, 3)] for place, name in enumerate(names)}
        for name, pair in keys.items():
            path = self._key_file(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            path.write_bytes(pair.pem)
        return keys

    def _key_file(self, organization: str) -> Path:
        return self.directory / "keys" / f"{organization}.pem"

    def _add_user(self, username: str, organization: Organization, role: Any, *, service: bool = False) -> User:
        user = User(
            organization=organization,
            username=username,
            password=PASSWORD,
            firstname=username,
            lastname="Sandbox",
            email=f"{username}@{organization.name}.example",
            roles=[role],
            is_service_account=service,
        )
        if self.generation == 5 and service:
            client = self.realm.add_client(f"{username}-user-client", "user")
            user.keycloak_id, user.keycloak_client_id = client.subject, client.id
            self._service_secret = client.secret
        elif self.generation == 5:
            user.keycloak_id = self.realm.add_user(username, PASSWORD).subject
        return self.registry.users.add(user)

    def add_image(self, image: Image | str, algorithms: Mapping[str, Any] | None = None) -> Image:
        """Give the nodes a further image.

        Args:
            image: ready made, or the name of one to make of `algorithms`.
            algorithms: functions by method name. A function takes a `Job` and keyword arguments;
                names that begin with `central` may start subtasks.

        Returns:
            The image.
        """
        if isinstance(image, str):
            image = Image.of(image, algorithms or {})
        self.images[image.name] = image
        return image

    # -- nodes -------------------------------------------------------------------------------------

    def register_node(self, node: Node) -> None:
        """Give a new node its key, and in v5 its account."""
        if self.generation == 5:
            client = self.realm.add_client(f"{node.name}-node-client", "node")
            node.keycloak_id, node.keycloak_client_id = client.subject, client.id
            node.api_key = client.secret
        else:
            node.api_key = self._uuid()
        self.registry.nodes.add(node)

    def new_api_key(self, node: Node) -> str:
        """Replace the key of a node."""
        if self.generation == 5:
            return self.realm.new_secret(node.keycloak_client_id)
        return self._uuid()

    def remove_node(self, node: Node) -> None:
        """Remove a node; what computes for it stops."""
        self.registry.nodes.remove(node)
        self.realm.remove(node.keycloak_id)
        self.registry.unlisten(node)

    def _compute_node(self, node: Node) -> ComputeNode:
        name = str(node.organization.name)
        http = httpx.Client(transport=_Internal(self), base_url=f"http://sandbox{self.prefix}", timeout=60)
        settings = NodeSettings(
            api_key=node.api_key,
            databases=self.cohorts[name],
            images=self.images,
            keys=self.keys[name],
            client_id=f"{node.name}-node-client",
            token_url=f"http://sandbox/realms/{REALM}/protocol/openid-connect/token",
        )
        folder = self.directory / "sessions" / node.name
        return ComputeNode(self.generation, http, _InternalChannel(self), settings, folder, poll_seconds=5.0)

    # -- who is calling ------------------------------------------------------------------------------

    def authenticate(self, request: Request, kinds: Sequence[str]) -> Caller:
        """Return who sent a request.

        Raises:
            Refusal: the token is missing, malformed, expired or of the wrong type.
            ServerFlaw: its owner is of a kind this route is not for.
        """
        header = request.headers.get("authorization")
        if self.generation == 5:
            return self._authenticate_5(header, kinds)
        claims = verify(_bearer(header), self._key())
        if claims.get("type") != "access":
            raise TokenRefusal(422, "Only non-refresh tokens are allowed")
        check_epoch(claims, self.switches.token_generation)
        return self._caller(claims["client_type"], claims["sub"], kinds)

    def _authenticate_5(self, header: str | None, kinds: Sequence[str]) -> Caller:
        try:
            claims = self.realm.read(_bearer(header))
            kind = claims["vantage6_client_type"]
            found: list[Any] = [
                *self.registry.users.where(keycloak_id=claims["sub"]),
                *self.registry.nodes.where(keycloak_id=claims["sub"]),
            ]
            return self._caller(kind, found[0].id if found else 0, kinds)
        except (Refusal, ServerFlaw):
            if "container" not in kinds:
                raise
        # Where containers are welcome, whatever is wrong ends as an error of the server: no token, an
        # old one, a broken one.
        try:
            claims = verify(_bearer(header), self._key())["sub"]
        except (Refusal, KeyError) as error:
            raise ServerFlaw from error
        return self._caller("container", claims, kinds)

    def _caller(self, kind: str, subject: Any, kinds: Sequence[str]) -> Caller:
        if kind not in kinds:
            raise ServerFlaw
        registry = self.registry
        if kind == "container":
            return Caller(registry, kind, claims=subject)
        if kind == "user":
            user = registry.users.get(subject)
            if user is None:
                raise ServerFlaw
            user.last_seen = now()
            return Caller(registry, kind, user=user)
        node = registry.nodes.get(subject)
        if node is None:
            raise ServerFlaw
        node.last_seen = now()
        return Caller(registry, kind, node=node)

    def _key(self) -> Any:
        return secret_key(self.seed, self.switches.signing_key)

    def grant(self, member: Authenticatable) -> dict[str, Any]:
        """Return the answer to a successful log-in (v3, v4)."""
        user = isinstance(member, User)
        kind = "user" if user else "node"
        roles = [role.name for role in member.roles] if isinstance(member, User) else []

        def token(seconds: float, *, refresh: bool) -> str:
            claims = session_claims(member.id, kind, roles, seconds, refresh=refresh)
            return sign({**claims, "epoch": self.switches.token_generation}, self._key())

        # A short life is to try clients with; nodes go on as they are.
        access = self._access_seconds() if user else _NODE_SECONDS
        return {
            "access_token": token(access, refresh=False),
            "refresh_token": token(self._refresh_seconds(), refresh=True),
            "refresh_url": f"{self.prefix}/token/refresh",
            f"{kind}_url": f"{self.prefix}/{kind}/{member.id}",
        }

    def refreshing(self, request: Request) -> Authenticatable:
        """Return the owner of the refresh token of a request."""
        claims = verify(_bearer(request.headers.get("authorization")), self._key())
        if claims.get("type") != "refresh":
            raise TokenRefusal(422, "Only refresh tokens are allowed")
        member = self.registry.users.get(claims["sub"]) or self.registry.nodes.get(claims["sub"])
        if member is None:
            raise ServerFlaw
        return member

    def container_token(self, claims: dict[str, Any]) -> str:
        """Return a token for an algorithm; it never expires."""
        if self.generation == 5:
            return sign({"sub": claims}, self._key())
        whole = session_claims(0, "container", [], 0.0, refresh=False)
        del whole["exp"]
        return sign({**whole, "sub": claims}, self._key())

    def check_login(self, username: str | None, password: str | None) -> User:
        """Return the user with this password.

        Raises:
            Refusal: 401, in the same words for a wrong password, an unknown user and one that is
                blocked after five failures.
        """
        found = self.registry.users.where(username=username)
        if found:
            user = found[0]
            recent = user.last_failed_login and now() - user.last_failed_login < _BLOCKED_FOR
            blocked = user.failed_logins >= _FAILURES_ALLOWED and recent
            if not blocked and hmac.compare_digest(user.password, password or ""):
                user.failed_logins = 0
                return user
            if not blocked:
                user.failed_logins = user.failed_logins % _FAILURES_ALLOWED + 1
                user.last_failed_login = now()
        raise Refusal(401, "Failed to login")

    def enrol(self, user: User) -> dict[str, str]:
        """Give a user a new second factor, which the next log-in then needs."""
        user.otp_secret = b32encode(secrets.token_bytes(20)).decode()
        label = quote(f"vantage6 (sandbox):{user.username}")
        query = urlencode({"secret": user.otp_secret, "issuer": "vantage6 (sandbox)"}, quote_via=quote)
        return {
            "qr_uri": f"otpauth://totp/{label}?{query}",
            "otp_secret": user.otp_secret,
            "msg": (
                "Two-factor authentication is obligatory on this server. Please visualize the QR "
                "code to set up authentication."
            ),
        }

    def second_factor_right(self, user: User, code: str) -> bool:
        """Return whether this is the user's code now, half a minute ago or in half a minute."""
        assert user.otp_secret is not None
        step = int(time.time()) // 30
        return code in {one_time_code(user.otp_secret, step + late) for late in (-1, 0, 1)}

    def reset_token(self, user: User) -> str:
        """Return the token that a mail for a forgotten password carries."""
        claims = session_claims(0, "container", [], 3600.0, refresh=False)
        return sign({**claims, "sub": {"id": str(user.id)}}, self._key())

    def user_of_reset_token(self, token: str) -> User:
        """Return whose mail carried this token."""
        try:
            user = self.registry.users.get(verify(token, self._key())["sub"]["id"])
        except (Refusal, KeyError, TypeError) as error:
            raise Refusal(400, "Invalid recovery token!") from error
        if user is None:
            raise Refusal(400, "Invalid recovery token!")
        return user

    def mail(self, user: User, token: str) -> None:
        """Send a mail; it ends up in `mails`."""
        self.mails.append((user.username, token))

    # -- the algorithm store that belongs to the sandbox -----------------------------------------------

    def knows_store(self, url: str) -> bool:
        """Return whether an algorithm store answers at this URL: only the sandbox's own does."""
        return url in (f"{self.url}{_store.PREFIX}", self.url)

    def digest(self, image: str) -> str | None:
        """Return the digest under which the store knows an image."""
        if image not in self.images:
            return None
        known = json.dumps([image, sorted(self.images[image].algorithms)])
        return f"sha256:{hashlib.sha256(known.encode()).hexdigest()}"

    def action(self, image: str, method: str) -> str | None:
        """Return the kind of step that a method is, as the store knows it."""
        algorithm: Algorithm | None = self.images[image.partition("@")[0]].algorithms.get(method)
        return algorithm.action if algorithm else None

    # -- events ------------------------------------------------------------------------------------

    def run_changed(self, run: Run) -> None:
        """Wake the nodes when a run ended that others may wait for (v5)."""
        if self.generation != 5 or not run.finished:
            return
        for task in self.registry.dependents_of(run.task):
            self.registry.emit(
                "new_task_update",
                {"id": task.id, "parent_id": None, "collaboration_id": task.collaboration.id},
            )

    def clean_up(self, task_id: int) -> None:
        """Empty the results of a task, as a server does with old ones."""
        with self.registry.lock:
            for run in self.registry.runs:
                if run.task.id == task_id and run.status == "completed":
                    run.result, run.cleanup_at = "", now()


def one_time_code(secret: str, step: int) -> str:
    """Return the six digits of a TOTP secret (base32) in a step of 30 seconds."""
    digest = hmac.new(b32decode(secret), struct.pack(">Q", step), hashlib.sha1).digest()
    place = digest[-1] & 15
    number = struct.unpack(">I", digest[place : place + 4])[0] & 0x7FFFFFFF
    return f"{number % 1_000_000:06d}"


def _bearer(header: str | None) -> str:
    if header is None:
        raise TokenRefusal(401, "Missing Authorization Header")
    kind, _, token = header.partition(" ")
    expected = "Expected 'Authorization: Bearer <JWT>'"
    if kind != "Bearer":
        raise TokenRefusal(401, f"Missing 'Bearer' type in 'Authorization' header. {expected}")
    if not token or " " in token:
        raise TokenRefusal(422, f"Bad Authorization header. {expected}")
    return token


class _Internal(httpx.BaseTransport):
    """Takes a node's requests straight to the routes: not in the journal, untouched by faults."""

    def __init__(self, platform: Vantage6Sandbox) -> None:
        self._platform = platform

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if self._platform.down:
            raise httpx.ConnectError("the server is down", request=request)
        return self._platform._internal(request)


class _InternalChannel:
    """The event channel of a node inside the sandbox."""

    def __init__(self, platform: Vantage6Sandbox) -> None:
        self._platform = platform
        self._node: Node | None = None

    def open(self, token: str, info: dict[str, Any], on_event: OnEvent) -> None:
        platform, registry = self._platform, self._platform.registry
        if platform.generation == 5:
            node = registry.nodes.where(keycloak_id=platform.realm.read(token)["sub"])[0]
        else:
            node = registry.nodes.where(id=verify(token, platform._key())["sub"])[0]
        with registry.lock:
            self._node = node
            node.status = "online"
            node.config = _configuration(info, flag=platform.generation == 5)
            registry.listen(node, on_event)

    def emit(self, event: str, payload: dict[str, Any]) -> None:
        # Before 4.11 a log arrives with the result.
        if event != "algorithm_log" or self._platform.generation == 3 or self._platform.down:
            return
        registry = self._platform.registry
        with registry.lock:
            run = registry.runs.get(payload["run_id"])
            if run is not None and run.finished_at is None:
                run.log = (run.log or "") + payload["log"]

    def close(self) -> None:
        registry = self._platform.registry
        with registry.lock:
            if self._node is not None:
                self._node.status = "offline"
                self._node.config = []
                registry.unlisten(self._node)


def _configuration(info: dict[str, Any], *, flag: bool) -> list[tuple[str, str]]:
    """Return what a node reports, one entry per value, as the server's table has it."""
    if not info:
        return []
    allowed = info["allowed_algorithms"]
    entries = [("encryption", str(info["encryption"]) if flag else str(int(info["encryption"])))]
    entries += [("allowed_algorithms", v) for v in ([allowed] if isinstance(allowed, str) else allowed)]
    entries += [("database_labels", label) for label in info["database_labels"]]
    entries += list(info["database_types"].items())
    if not flag:
        entries += [(key, column) for key, columns in info["database_columns"].items() for column in columns]
    return entries
