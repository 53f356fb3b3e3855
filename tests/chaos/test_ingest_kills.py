"""One kill for each policy; `make chaos-ingest-kills` makes more of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos.ingest_kills import POLICIES, kill_once, laboratory

OTHERS = [pytest.param(policy, marks=pytest.mark.slow) for policy in POLICIES if policy != "skip"]


@pytest.mark.parametrize("policy", ["skip", *OTHERS])
def test_the_report_of_a_killed_ingest_names_what_the_volume_shows(policy: str, tmp_path: Path) -> None:
    sandbox, lab = laboratory(tmp_path)
    try:
        outcome = kill_once(lab, policy, 0)
    finally:
        lab.client.close()
        sandbox.stop()
    assert outcome.killed_after is not None
    assert outcome.wrong == ()
