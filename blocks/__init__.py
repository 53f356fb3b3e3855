"""Credentials blocks, one for each platform."""

from prefect_biomed.blocks.vip import VipCredentials

__all__ = ["VipCredentials"]
