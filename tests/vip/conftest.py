"""Accounts and sessions on the VIP sandbox."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from prefect_biomed.clients.vip import InputValue, VipClient, VipSession
from prefect_biomed.sandbox import Sandbox

Connect = Callable[..., VipClient]
NewSession = Callable[..., VipSession]


@pytest.fixture
def connect(vip: Sandbox) -> Iterator[Connect]:
    """Make a client of an account: by the name of a user, or by a key."""
    clients: list[VipClient] = []

    def connect(who: str = "alice", **settings: Any) -> VipClient:
        facts = vip.ready()["vip"]
        key = facts["users"][who]["api_key"] if who in facts["users"] else who
        clients.append(VipClient(facts["url"], key, **settings))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


@pytest.fixture
def client(connect: Connect) -> VipClient:
    """The client of the main user."""
    return connect()


@pytest.fixture
def new_session(tmp_path: Path, client: VipClient) -> NewSession:
    """Make a session with files of its own; nothing is sent."""

    def new_session(
        pipeline_id: str | None = None,
        settings: Mapping[str, InputValue] | None = None,
        *,
        name: str = "session",
        files: Mapping[str, bytes] | None = None,
        input_dir: Path | None = None,
        **more: Any,
    ) -> VipSession:
        if files is not None:
            input_dir = tmp_path / name / "in"
            for path, content in files.items():
                (input_dir / path).parent.mkdir(parents=True, exist_ok=True)
                (input_dir / path).write_bytes(content)
        home = "/vip/Home/API" if client.profile.name == "vip" else "/alice"
        return VipSession(
            session_name=name,
            pipeline_id=pipeline_id,
            input_settings=dict(settings or {}),
            input_dir=input_dir,
            output_dir=tmp_path / name / "out",
            vip_input_dir=f"{home}/{name}/INPUTS",
            vip_output_dir=f"{home}/{name}/OUTPUTS",
            **{"token": "t0k3n", **more},
        )

    return new_session
