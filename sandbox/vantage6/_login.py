"""Routes about the server itself and, before v5, about logging in."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse, Response

from prefect_biomed.sandbox.vantage6._http import NODE, USER, Answer, Call, Routes
from prefect_biomed.sandbox.vantage6._refusals import Refusal

routes = Routes()
VERSIONS = {3: "3.11.1", 4: "4.15.2", 5: "5.0.3"}


@routes.add("GET", "/version")
def get_version(call: Call) -> Answer:
    return {"version": VERSIONS[call.generation]}


@routes.add("GET", "/health")
def get_health(call: Call) -> Answer:
    return {"api": True, "database": True} if call.generation == 5 else {"database": True}


@routes.add("POST", "/token/user", generations=(3, 4))
def log_in(call: Call) -> Answer:
    data = call.body(call.server.schemas["login"])
    user = call.server.check_login(data.get("username"), data.get("password"))
    if call.server.switches.two_factor:
        if user.otp_secret is None:
            return call.server.enrol(user)
        code = data.get("mfa_code")
        if not code:
            return {"msg": "Please include your two-factor authentication code"}
        if not call.server.second_factor_right(user, str(code)):
            raise Refusal(401, "Your two-factor authentication code is incorrect!")
    return _granted(call.server.grant(user))


@routes.add("POST", "/token/node", generations=(3, 4))
def log_node_in(call: Call) -> Answer:
    key = call.body(call.server.schemas["node login"]).get("api_key")
    if not key:
        raise Refusal(400, "api_key missing in JSON body")
    found = call.registry.nodes.where(api_key=key)
    if not found:
        raise Refusal(401, "Api key is not recognized!")
    return _granted(call.server.grant(found[0]))


def _granted(tokens: dict[str, Any]) -> Response:
    return JSONResponse(tokens, headers={"jwt-token": tokens["access_token"]})


@routes.add("POST", "/token/refresh", generations=(3, 4))
def refresh(call: Call) -> Answer:
    return call.server.grant(call.server.refreshing(call.request))


@routes.add("POST", "/token/user/validate", USER, (4,))
def validate_user(call: Call) -> Answer:
    user = call.caller.user
    assert user is not None
    return {
        "msg": "Token is valid",
        "user_id": user.id,
        "username": user.username,
        "email": user.email,
        "organization_id": user.organization.id,
    }


@routes.add("POST", "/token/node/validate", NODE, (4,))
def validate_node(call: Call) -> Answer:
    node = call.caller.node
    assert node is not None
    return {
        "msg": "Token is valid",
        "node_id": node.id,
        "name": node.name,
        "organization_id": node.organization.id,
    }
