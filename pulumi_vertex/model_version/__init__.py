"""`ModelVersion`: inputs.py has its inputs and outputs, resource.py what the provider does with them."""

from .container_spec import Probe
from .inputs import ModelVersion
from .resource import ModelVersionType

__all__ = ["ModelVersion", "ModelVersionType", "Probe"]
