"""One of several processes of an upload: order, progress and report travel as lines of JSON."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from prefect_biomed.clients.boss.client import BossClient
from prefect_biomed.clients.boss.config import IngestConfig
from prefect_biomed.clients.boss.models import UploadSettings
from prefect_biomed.clients.boss.storage import StorageOptions
from prefect_biomed.clients.boss.uploader import Uploader
from prefect_biomed.clients.errors import BiomedError, is_transient


def main() -> int:
    """Work until the queue is empty or standard input ends.

    Returns:
        0; errors go back as a line.
    """
    order = json.loads(sys.stdin.readline())
    stop = threading.Event()
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a plugin prints must not end up among our lines

    def wait_for_end() -> None:
        while os.read(0, 65536):  # not through sys.stdin, whose lock would outlive us
            pass
        stop.set()

    threading.Thread(target=wait_for_end, daemon=True).start()

    def tell(**line: Any) -> None:
        print(json.dumps(line), file=channel, flush=True)

    client = BossClient.from_arguments(order["client"])
    storage = StorageOptions(**order["storage"]) if order["storage"] else None
    try:
        uploader = Uploader(
            client,
            IngestConfig.load(order["config"]).with_storage(storage),
            order["job_id"],
            UploadSettings.model_validate(order["settings"]),
            ledger_folder=Path(order["ledger_folder"]) if order["ledger_folder"] else None,
            on_progress=lambda progress: tell(progress=progress),
            stop=stop,
            is_owner=False,
            retries_kept=order["retries_kept"],
        )
        try:
            tell(report=uploader.run().model_dump(mode="json"))
        finally:
            uploader.close()
    except BiomedError as error:
        tell(error=f"{type(error).__name__}: {error}", transient=is_transient(error))
    finally:
        client.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
