"""`Rollout`.

inputs.py has its inputs and outputs, wanted.py and endpoint.py the wanted and the observed state, plan.py the next
steps. runner.py carries them out with the bodies of requests.py, and undoes them after a failure. resource.py is called
by the engine.
"""

from .inputs import Deployed, Rollout
from .resource import RolloutType

__all__ = ["Deployed", "Rollout", "RolloutType"]
