"""The client side of Headcount: the Python client and the `headcount` command."""

from headcount.client import Client
from headcount.counters import Answer, CountError
from serving.contract import Person

__all__ = ["Answer", "Client", "CountError", "Person"]
