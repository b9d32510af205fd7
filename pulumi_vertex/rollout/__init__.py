"""`Rollout`.

inputs.py has its inputs and outputs, wanted.py and endpoint.py what is wanted and what is observed, plan.py what is
done next; runner.py does it, and undoes it after a failure; resource.py is what the engine calls.
"""

from .inputs import Deployed, Rollout
from .resource import RolloutType

__all__ = ["Deployed", "Rollout", "RolloutType"]
