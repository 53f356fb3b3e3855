"""The tutorial of vantage6 4: who is there, and an average at two organizations."""

import config
from vantage6.client import UserClient as Client

client = Client(config.server_url, config.server_port, config.server_api, log_level="warn")
client.authenticate(config.username, config.password)
client.setup_encryption(config.organization_key)

print(client.collaboration.list(fields=["id", "name"]))
print(client.organization.list(collaboration=2, fields=["id", "name"]))
print(client.node.list(collaboration=2, fields=["name", "status"]))

input_ = {"method": "partial_average", "kwargs": {"column": "age"}}
average_task = client.task.create(
    collaboration=2,
    organizations=[2, 3],
    name="name_for_the_task",
    image="tutorial/average:1.0",
    description="",
    input_=input_,
    databases=[{"label": "default"}],
)
print("Waiting for results")
client.wait_for_results(average_task["id"])
averages = client.result.from_task(task_id=average_task["id"])
print(averages)
