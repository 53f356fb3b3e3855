"""What is deployed: `prefect.yaml`, the set-up of blocks, the automations, and containers."""
