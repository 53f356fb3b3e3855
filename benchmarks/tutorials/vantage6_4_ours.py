"""The same with prefect-biomed."""

import config

from prefect_biomed.blocks import Vantage6Credentials
from prefect_biomed.flows.vantage6 import federated_analysis
from prefect_biomed.tasks.vantage6 import list_resources

credentials = Vantage6Credentials(
    url=f"{config.server_url}:{config.server_port}{config.server_api}",
    username=config.username,
    password=config.password,
    private_key_path=config.organization_key,
)
print(list_resources(credentials, "collaboration", fields=["id", "name"]))
print(list_resources(credentials, "organization", {"collaboration": 2}, fields=["id", "name"]))
print(list_resources(credentials, "node", {"collaboration": 2}, fields=["name", "status"]))

averages = federated_analysis(
    credentials,
    collaboration="encrypted",
    organizations=["north", "south"],
    image="tutorial/average:1.0",
    method="partial_average",
    arguments={"column": "age"},
    databases="default",
)
print(averages.results)
