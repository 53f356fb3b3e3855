"""The Virtual Imaging Platform: REST client, session file, inputs and transfers."""
