"""Prefect tasks: one remote effect each."""
