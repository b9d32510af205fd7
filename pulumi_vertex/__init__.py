"""Model versions and rollouts on Vertex AI as Pulumi resources.

    import pulumi_vertex as vertex

`ModelVersion` is one version of a model in the Model Registry, `ReleasedImage` its image in a repository of one's own,
`Rollout` what is deployed on an endpoint and how the traffic is shared, `Provider` how Vertex AI is reached. README.md
shows them in a program.
"""

from .access import Provider
from .model_version import ModelVersion, Probe
from .released_image import ReleasedImage
from .rollout import Deployed, Rollout

__all__ = ["Deployed", "ModelVersion", "Probe", "Provider", "ReleasedImage", "Rollout"]
