"""An algorithm store that lists the images of the sandbox."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from prefect_biomed.sandbox.vantage6._http import USER, Answer, Call, Routes

PREFIX = "/store/api"
routes = Routes()


@routes.add("GET", "/version")
def get_version(call: Call) -> Answer:
    return {"version": "4.15.2" if call.generation == 4 else "5.0.3"}


@routes.add("GET", "/algorithm", USER, (4, 5))
def list_algorithms(call: Call) -> Answer:
    server = call.server
    wanted = call.arg("image")
    found: list[dict[str, Any]] = []
    for number, (name, image) in enumerate(server.images.items(), start=1):
        if wanted is not None and wanted.split("@")[0] != name:
            continue
        found.append(
            {
                "id": number,
                "name": name.rpartition("/")[2],
                "image": name,
                "digest": server.digest(name),
                "status": "approved",
                "vantage6_version": get_version(call)["version"],
                "partitioning": "horizontal",
                "functions": [
                    {
                        "id": place,
                        "name": method,
                        **_kind(call.generation, algorithm.action),
                        "databases": [],
                        "arguments": [],
                    }
                    for place, (method, algorithm) in enumerate(image.algorithms.items(), start=1)
                ],
            }
        )
    return JSONResponse({"data": found, "links": {}}, headers={"total-count": str(len(found))})


def _kind(generation: int, action: str) -> dict[str, str]:
    if generation == 5:
        return {"step_type": action}
    return {"type": "central" if action == "central_compute" else "federated"}
