"""All blocks of the package, for Prefect: its entry point `prefect.collections`."""

from prefect_biomed.blocks.boss import BossCredentials
from prefect_biomed.blocks.storage import StorageCredentials
from prefect_biomed.blocks.vantage6 import Vantage6Credentials
from prefect_biomed.blocks.vip import VipCredentials

__all__ = ["BossCredentials", "StorageCredentials", "Vantage6Credentials", "VipCredentials"]
