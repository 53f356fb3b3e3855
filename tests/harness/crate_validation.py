"""Validate a crate against the Provenance Run Crate profile with roc-validator, and print its issues as JSON.

Runs in the validator's own environment. Contexts are answered with what the rocrate library ships, so that no network
is needed; of its terms one has moved since RO-Crate 1.1, which the profile is written for.
"""

from __future__ import annotations

import io
import json
import sys
from email.message import Message
from importlib.resources import files
from typing import Any
from urllib.response import addinfourl

import rdflib.parser
from requests import Response
from rocrate_validator import models, services
from rocrate_validator.utils.http import HttpRequester

document = json.loads((files("rocrate") / "data" / "ro-crate.jsonld").read_text())
document["@context"]["ComputationalWorkflow"] = "https://bioschemas.org/ComputationalWorkflow"
CONTEXT = json.dumps(document).encode()


def answered(address: str, **_: Any) -> Response:
    """Answer a request of the validator."""
    response = Response()
    response.status_code, response.url, response.raw = 200, address, io.BytesIO(CONTEXT)
    response.headers["Content-Type"] = "application/ld+json"
    return response


def opened(request: Any) -> addinfourl:
    """Answer a request of rdflib."""
    headers = Message()
    headers["Content-Type"] = "application/ld+json"
    return addinfourl(io.BytesIO(CONTEXT), headers, request.full_url, 200)


HttpRequester().get = answered
rdflib.parser._urlopen = opened
result = services.validate(
    services.ValidationSettings(
        rocrate_uri=sys.argv[1],
        profile_identifier="provenance-run-crate-0.5",
        requirement_severity=models.Severity.RECOMMENDED,
    )
)
print("ISSUES", json.dumps([[issue.severity.name, issue.check.identifier] for issue in result.get_issues()]))
