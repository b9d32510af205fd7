"""People counted on Vertex AI: a foundation, an image, predictions from it, and what trains models."""

import os
import signal

import pulumi

from infra import settings
from infra.foundation import Foundation
from infra.image import SERVING, Image
from infra.pipelines import Pipelines
from infra.prediction import MAX_REQUEST_BYTES, Prediction
from infra.training import Training

if __name__ == "__main__":
    # The engine interrupts the program when a resource has failed. A traceback would hide its message.
    signal.signal(signal.SIGINT, lambda *_: os._exit(1))

config = settings.load()

foundation = Foundation(config)
image = Image(config, foundation, SERVING, gpu=bool(config.accelerator)) if config.builds else None
training = Training(config, foundation) if config.training else None
prediction = Prediction(config, foundation, image, training)
pipelines = Pipelines(config, config.pipeline, foundation, training, prediction) if config.pipeline else None

pulumi.export("endpoint", prediction.endpoint.id)
pulumi.export("url", prediction.url)
pulumi.export("maxRequestBytes", MAX_REQUEST_BYTES[config.dedicated])
pulumi.export("images", prediction.images)
pulumi.export("models", {name: version.id for name, version in prediction.versions.items()})
pulumi.export("bucket", foundation.bucket.url)
pulumi.export("modelBucket", foundation.model_bucket.url)
if training:
    pulumi.export("trained", training.models)
    pulumi.export("tensorboard", training.tensorboard.id)
if pipelines:
    pulumi.export("pipelineTemplate", pipelines.template)
    pulumi.export("pipelineModel", pipelines.model)
    pulumi.export("pipelineRoot", pipelines.root)
    pulumi.export("pipelineAccount", pipelines.account)
    pulumi.export("pipelineParameters", pipelines.parameters)
pulumi.export("repository", foundation.repository.registry_uri)
pulumi.export("vertexAgent", foundation.agent.email)
lines = prediction.how_to_use()
for name, value in lines.items():
    pulumi.export(name, value)
if not pulumi.runtime.is_dry_run():
    # `pulumi up` cuts outputs off after 150 characters, and a line that is cut off cannot be pasted.
    begin, *names = ("Predict with", "predict") if "predict" in lines else ("Count people with", "count", "curl")
    paste = [lines[name] for name in names] if config.releases and not config.paused else []
    pulumi.Output.all(prediction.rollout.id, *paste).apply(
        lambda known: pulumi.log.info(
            "\n    ".join([begin, *known[1:]] if paste else []) + f"\n{prediction.machines()}"
        )
    )
