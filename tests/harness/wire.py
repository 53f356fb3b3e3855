"""Requests past the clients, to see what a platform itself says."""

from __future__ import annotations

import json
from typing import Any

import requests

from prefect_biomed.clients.http import HttpSession


def exchange(http: HttpSession, method: str, path: str, **request: Any) -> tuple[requests.Response, Any]:
    """Send a request as it is, past the client; returns the answer and its decoded body, None for an empty one."""
    response, text = http.text(method, path, **request)
    return response, json.loads(text) if text.strip() else None
