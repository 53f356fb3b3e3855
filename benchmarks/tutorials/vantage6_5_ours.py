"""The same with prefect-biomed."""

import config

from prefect_biomed.blocks import Vantage6Credentials
from prefect_biomed.flows.vantage6 import DataframeSpec, Function, federated_session
from prefect_biomed.tasks.vantage6 import list_resources

credentials = Vantage6Credentials(
    url=config.hq_url,
    auth_url=config.auth_url,
    service_account=config.username,
    client_secret=config.client_secret,
    private_key_path=config.organization_key,
)
print(list_resources(credentials, "collaboration", fields=["id", "name"]))
print(list_resources(credentials, "organization", {"collaboration": 2}, fields=["id", "name"]))

image = "tutorial/average:1.0"
frame = DataframeSpec(name=config.name, extraction=Function(image=image, method="read_csv"))
analysis = {
    "credentials": credentials,
    "collaboration": "encrypted",
    "session_name": config.name,
    "dataframes": [frame],
    "image": image,
    "arguments": {"column": "age"},
}
central = {"central": True, "compute_at": ["north"]}
print(federated_session(**analysis, method="central_average", details=central).value)

partial = {"compute_at": ["north", "south"]}
averages = federated_session(**analysis, method="partial_average", details=partial)
print(averages.results)
