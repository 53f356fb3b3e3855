"""The event channel of a node to a real vantage6 server: Socket.IO 5 by HTTP long polling.

Engine.IO packets in a body are separated by the record separator; `0` opens, `1` closes, `2` is a
ping to be answered with `3`, `4` a message. In a message of Socket.IO `40` connects to a namespace,
`41` disconnects, `42` is an event.
"""

import contextlib
import json
import threading
from typing import Any

import httpx

from prefect_biomed.sandbox.vantage6.nodes import OnEvent

_NAMESPACE = "/tasks"
_SEPARATOR = "\x1e"
_PING_SECONDS = 20.0


class PollingChannel:
    """One connection; implements `Channel` of the sandbox's nodes.

    Args:
        root: of the server: scheme, host and port.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._http: httpx.Client | None = None
        self._query: dict[str, str] = {}
        self._on_event: OnEvent = lambda event, payload: None
        self._info: dict[str, Any] = {}
        self._closing = threading.Event()
        self._connected = threading.Event()
        self._threads: list[threading.Thread] = []

    def open(self, token: str, info: dict[str, Any], on_event: OnEvent) -> None:
        """Connect, report the node's configuration and pass on events until `close`."""
        self._info, self._on_event = info, on_event
        self._closing.clear()
        self._connected.clear()
        self._http = httpx.Client(
            base_url=self._root,
            headers={"Authorization": f"Bearer {token}"},
            # A poll is answered at the latest with the next ping, 25 s later.
            timeout=httpx.Timeout(10, read=60),
        )
        self._query = {"EIO": "4", "transport": "polling"}
        opened = self._http.get("/socket.io/", params=self._query).raise_for_status().text
        self._query["sid"] = json.loads(opened.split(_SEPARATOR)[0][1:])["sid"]
        self._send(f"40{_NAMESPACE},")
        for work in (self._listen, self._keep_alive):
            thread = threading.Thread(target=work, name="vantage6-events", daemon=True)
            self._threads.append(thread)
            thread.start()
        if not self._connected.wait(20):
            raise TimeoutError(f"{self._root} did not accept the events of a node")
        self.emit("node_info_update", self._flat(info))

    @staticmethod
    def _flat(info: dict[str, Any]) -> dict[str, Any]:
        """Put what is about databases on the top level, where v3 wants it; the others take it too."""
        flat: dict[str, Any] = {}
        for key, value in info.items():
            flat |= value if isinstance(value, dict) else {key: value}
        return flat

    def emit(self, event: str, payload: dict[str, Any]) -> None:
        """Send an event."""
        self._send(f"42{_NAMESPACE},{json.dumps([event, payload])}")

    def close(self) -> None:
        """Disconnect."""
        self._closing.set()
        with contextlib.suppress(httpx.HTTPError):
            self._send(f"41{_NAMESPACE},{_SEPARATOR}1")
        for thread in self._threads:
            thread.join(timeout=10)
        self._threads.clear()
        if self._http is not None:
            self._http.close()
            self._http = None

    def _send(self, packets: str) -> None:
        assert self._http is not None
        self._http.post("/socket.io/", params=self._query, content=packets)

    def _listen(self) -> None:
        assert self._http is not None
        while not self._closing.is_set():
            try:
                answer = self._http.get("/socket.io/", params=self._query)
            except httpx.HTTPError:
                return
            if answer.status_code != 200:
                return
            for packet in answer.text.split(_SEPARATOR):
                self._receive(packet)

    def _receive(self, packet: str) -> None:
        if packet == "2":
            with contextlib.suppress(httpx.HTTPError):
                self._send("3")
        elif packet.startswith(f"40{_NAMESPACE}"):
            self._connected.set()
        elif packet.startswith(f"42{_NAMESPACE},"):
            event, *arguments = json.loads(packet.partition(",")[2])
            payload = arguments[0] if arguments else {}
            # v3 sends bare numbers and texts.
            self._on_event(event, payload if isinstance(payload, dict) else {"id": payload})

    def _keep_alive(self) -> None:
        while not self._closing.wait(_PING_SECONDS):
            with contextlib.suppress(httpx.HTTPError):
                self._send(f'42{_NAMESPACE},["ping"]')
