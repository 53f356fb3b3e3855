"""The tutorial of vantage6 5: a session with a dataframe, its average over all, and at two organizations."""

import config
from vantage6.client import UserClient as Client

client = Client(hq_url=config.hq_url, auth_url=config.auth_url, log_level="warn")
client.authenticate()
client.setup_encryption(config.organization_key)

print(client.collaboration.list(fields=["id", "name"]))
print(client.organization.list(collaboration=2, fields=["id", "name"]))

session = client.session.create(name=config.name, collaboration=2, scope="own", display=True)
dataframe = client.dataframe.create(
    label="default",
    method="read_csv",
    image="tutorial/average:1.0",
    arguments={},
    session=session["id"],
)
client.wait_for_results(dataframe["last_session_task"]["id"])

average_task = client.task.create(
    collaboration=2,
    organizations=[2],
    name="an-awesome-task",
    image="tutorial/average:1.0",
    description="",
    method="central_average",
    arguments={"column": "age"},
    session=session["id"],
    databases=[{"dataframe_id": dataframe["id"]}],
    action="central_compute",
)
client.wait_for_results(average_task["id"])
print(client.result.from_task(task_id=average_task["id"]))

average_task = client.task.create(
    collaboration=2,
    organizations=[2, 3],
    name="an-awesome-task",
    image="tutorial/average:1.0",
    description="",
    method="partial_average",
    arguments={"column": "age"},
    session=session["id"],
    databases=[{"dataframe_id": dataframe["id"]}],
    action="federated_compute",
)
client.wait_for_results(average_task["id"])
averages = client.result.from_task(task_id=average_task["id"])
print(averages)
