"""vantage6 on loopback: the server of generation 3, 4 or 5, and nodes that compute on CSV files."""

from prefect_biomed.sandbox.vantage6._platform import Vantage6Sandbox, Vantage6Switches
from prefect_biomed.sandbox.vantage6.algorithms import CLINICAL, Algorithm, Image, Job

__all__ = ["CLINICAL", "Algorithm", "Image", "Job", "Vantage6Sandbox", "Vantage6Switches"]
