"""`CustomJob` and `TuningJob`.

custom_job.py and tuning_job.py have what differs between them, specification.py the inputs that they share, and job.py
what the provider does with both; logs.py reads their log.
"""

from .custom_job import CustomJob, CustomJobType
from .specification import Scheduling
from .tuning_job import Metric, Parameter, TuningJob, TuningJobType

__all__ = ["CustomJob", "CustomJobType", "Metric", "Parameter", "Scheduling", "TuningJob", "TuningJobType"]
