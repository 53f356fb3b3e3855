"""What the bill of materials says of licences, and what an audit that nobody answered says."""

from __future__ import annotations

import json

from harness.supply_chain import reciprocal, told


def component(*licences: dict[str, object]) -> dict[str, object]:
    return {"name": "some", "version": "1.0", "licenses": list(licences)}


def test_a_package_under_a_reciprocal_licence_alone_is_named() -> None:
    assert reciprocal([component({"expression": "GPL-3.0-only"})]) == ["some 1.0: GPL-3.0-only"]
    assert reciprocal([component({"license": {"id": "AGPL-3.0-or-later"}})])


def test_a_package_that_leaves_a_choice_is_not() -> None:
    choice = component({"license": {"id": "GPL-2.0-or-later"}}, {"license": {"name": "Artistic License"}})
    assert not reciprocal([choice, component({"expression": "GPL-2.0 OR MIT"}), component({"expression": "MIT"})])


def test_an_audit_without_an_answer_is_not_one_without_a_finding() -> None:
    assert told(1, "", "ConnectionError: no route\n") == "NOT AUDITED: ConnectionError: no route"
    assert told(2, "{}", "") == "NOT AUDITED: exit status 2"
    unknown = json.dumps({"dependencies": [{"name": name, "skip_reason": "not found"} for name in ("a", "b")]})
    assert told(0, unknown, "") == "NOT AUDITED\nnothing is known of a, b"


def test_vulnerabilities_and_what_was_passed_over_are_named() -> None:
    output = json.dumps(
        {
            "dependencies": [
                {"name": "old", "version": "1.0", "vulns": [{"id": "PYSEC-1"}]},
                {"name": "new", "version": "2.0", "vulns": []},
                {"name": "own", "skip_reason": "not found"},
            ]
        }
    )
    assert (
        told(1, output, "") == "2 packages audited, known vulnerabilities: 1\nold 1.0: PYSEC-1\nnothing is known of own"
    )
