"""The names of a stack's resources."""

import hashlib
import re
from typing import Final

PROJECT: Final = "headcount"


class Names:
    """Names that Google accepts, for every allowed project, region and stack; other stacks, other names."""

    def __init__(self, project: str, region: str, stack: str) -> None:
        #: Bucket, global: https://cloud.google.com/storage/docs/buckets#naming
        self.bucket = f"{project}-{PROJECT}-{_slug(stack, 22)}"
        #: Bucket of models. Its prefix is as long as that of the other bucket.
        self.model_bucket = f"{project}-hc-models-{_slug(stack, 22)}"
        #: Docker repository, at most 63: https://cloud.google.com/artifact-registry/docs/repositories/create-repos
        self.repository = f"{PROJECT}-{_slug(stack, 50)}"
        #: Service account, 6 to 30: https://cloud.google.com/iam/docs/service-accounts-create
        self.service_account = f"{PROJECT}-{_slug(stack, 20)}"
        #: Custom role, letters, digits, dots and underscores: https://cloud.google.com/iam/docs/creating-custom-roles
        self.predictor_role = f"{PROJECT}_predictor_{_slug(stack, 30).replace('-', '_')}"
        #: The same kinds of names for training.
        self.training_account = f"hc-training-{_slug(stack, 18)}"
        self.training_role = f"{PROJECT}_training_{_slug(stack, 30).replace('-', '_')}"
        #: The same kinds of names for the pipeline, and the model whose versions it registers.
        self.pipeline_account = f"hc-pipeline-{_slug(stack, 18)}"
        self.pipeline_role = f"{PROJECT}_pipeline_{_slug(stack, 30).replace('-', '_')}"
        self.pipeline_model = f"{PROJECT}-pipeline-{_slug(stack, 40)}"
        #: Model, at most 63 of a-z, 0-9, - and _: REST reference of models.upload
        self.model = f"{PROJECT}-{_slug(stack, 50)}"
        #: Endpoint: digits without a leading zero, at most 10 for the google provider and 9 for Vertex AI's
        # REST reference. Derived from the stack's name, so that it can be found again without the state.
        number = int.from_bytes(hashlib.sha256(f"{project}/{region}/{stack}".encode()).digest()[:8])
        self.endpoint = str(10**8 + number % (9 * 10**8))
        #: https://cloud.google.com/resource-manager/docs/labels-overview#requirements
        self.labels = {"project": PROJECT, "stack": _slug(stack, 63)}


def _slug(text: str, limit: int) -> str:
    """`text` in small letters, digits and single hyphens; with its hash where that would lose something."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    allowed = not re.search("g[o0]{2}g", plain)  # no bucket may be named after Google
    if plain == text and len(plain) <= limit and allowed:
        return plain
    mark = hashlib.sha256(text.encode()).hexdigest()[:8]
    kept = plain[: limit - 9].strip("-") if allowed else ""
    return f"{kept}-{mark}" if kept else mark
