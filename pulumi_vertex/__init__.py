"""Jobs, pipelines, model versions and rollouts on Vertex AI as Pulumi resources.

    import pulumi_vertex as vertex

`CustomJob` runs a container once, `TuningJob` runs it in trials that find the best hyperparameters, `PipelineJob` runs
a compiled pipeline once, and `Schedule` runs it again and again. `ModelVersion` is one version of a model in the Model
Registry, `ReleasedImage` its image in a repository of one's own, `Rollout` what is deployed on an endpoint and how the
traffic is shared, `Provider` how Vertex AI is reached. README.md shows them in a program.
"""

from .access import Provider
from .jobs import CustomJob, Metric, Parameter, Scheduling, TuningJob
from .model_version import ModelVersion, Probe
from .pipelines import PipelineJob, Schedule, Task
from .released_image import ReleasedImage
from .rollout import Deployed, Rollout

__all__ = [
    "CustomJob",
    "Deployed",
    "Metric",
    "ModelVersion",
    "Parameter",
    "PipelineJob",
    "Probe",
    "Provider",
    "ReleasedImage",
    "Rollout",
    "Schedule",
    "Scheduling",
    "Task",
    "TuningJob",
]
