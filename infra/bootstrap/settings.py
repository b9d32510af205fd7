"""The settings of a bootstrap, and what follows from them for the tokens of the repository's jobs."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import pulumi
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

PROJECT: Final = "headcount-bootstrap"


@dataclass(frozen=True)
class Forge:
    """Where the repository is: who vouches for its jobs, and the claims of their tokens.

    branch: the condition, in CEL, that a job runs for a branch. variables: the command that tells one to the workflows.
    """

    title: str
    issuer: str
    path: str
    id: str
    owner: str
    branch: str
    variables: str


FORGES: Final = {
    # https://docs.github.com/en/actions/reference/security/oidc
    "github": Forge(
        "GitHub",
        "https://token.actions.githubusercontent.com",
        "repository",
        "repository_id",
        "repository_owner_id",
        "assertion.ref == 'refs/heads/{}'",
        "gh variable set {name} --env {environment} --body {value}",
    ),
    # https://docs.gitlab.com/ci/secrets/id_token_authentication/
    "gitlab": Forge(
        "GitLab",
        "https://gitlab.com",
        "project_path",
        "project_id",
        "namespace_id",
        "assertion.ref_type == 'branch' && assertion.ref == '{}'",
        "glab variable set {name} --scope {environment} --value {value}",
    ),
}


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel)

    stack: str
    project: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{4,28}[a-z0-9]$", examples=["my-project"])]
    region: Annotated[str, Field(pattern=r"^[a-z]+-[a-z]+[0-9]{1,2}$", examples=["europe-west4"])]
    forge: Annotated[Literal["github", "gitlab"], Field(examples=["github"])] = "github"
    repository: Annotated[str, Field(pattern=r"^[A-Za-z0-9._/-]+/[A-Za-z0-9._-]+$", examples=["my-team/headcount"])]
    # A name can be given up and registered by somebody else, an id cannot. Both ids are numbers.
    repository_id: Annotated[str, Field(pattern=r"^\d+$", examples=["$(gh api repos/OWNER/NAME --jq .id)"])]
    owner_id: Annotated[str, Field(pattern=r"^\d+$", examples=["$(gh api repos/OWNER/NAME --jq .owner.id)"])]
    branch: Annotated[str, Field(pattern=r"^[A-Za-z0-9._/-]+$", examples=["main"])] = "main"
    environments: Annotated[
        list[Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]], Field(min_length=1, examples=['["prod"]'])
    ]
    #: Roles that the deployer needs for settings of the stack, such as `predictors`.
    deployer_roles: Annotated[
        list[Annotated[str, Field(pattern=r"^roles/[\w.]+$")]], Field(examples=['["roles/iam.roleAdmin"]'])
    ] = []


def read(config: Mapping[str, str], stack: str) -> Settings:
    """The settings from Pulumi's configuration. Raises pulumi.RunError, which says how to repair each mistake."""
    values: dict[str, Any] = {"stack": stack}
    for key, text in config.items():
        namespace, _, name = key.partition(":")
        if namespace == PROJECT or key in ("gcp:project", "gcp:region"):
            values[name] = json.loads(text) if text.startswith("[") else text
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        problems = [_problem(dict(e), stack) for e in error.errors()]
    raise pulumi.RunError("\n".join([f"Stack {stack} cannot be deployed:", *problems]))


def _problem(error: dict[str, Any], stack: str) -> str:
    name = str(error["loc"][0])
    key = f"gcp:{name}" if name in ("project", "region") else f"{PROJECT}:{name}"
    field = next((f for f in Settings.model_fields.values() if f.alias == name), None)
    if field is None:
        return f"  {key} is not a setting.\n    pulumi config rm {key} -s {stack}"
    said = "is missing" if error["type"] == "missing" else f"is {error['input']!r}: {error['msg']}"
    example = str((field.examples or ["…"])[0])
    if example.startswith("["):
        return f"  {key} {said}.\n    in Pulumi.{stack}.yaml:  {key}: {example}"
    example = f'"{example}"' if example.startswith("$(") else shlex.quote(example)
    return f"  {key} {said}.\n    pulumi config set {key} {example} -s {stack}"


def condition(settings: Settings) -> str:
    """The condition, in CEL, that a token has to meet: it is of this repository of this owner."""
    forge = FORGES[settings.forge]
    wanted = {forge.path: settings.repository, forge.id: settings.repository_id, forge.owner: settings.owner_id}
    return " && ".join(f"assertion.{claim} == '{value}'" for claim, value in wanted.items())


def attributes(settings: Settings) -> dict[str, str]:
    """The attributes that a token's claims become, each in CEL.

    `access` is `deploy` for a job of the branch in one of the environments, which starts after the approvals that the
    environment asks for, and `preview` for every other job of the repository.
    """
    names = ", ".join(f"'{name}'" for name in settings.environments)
    branch = FORGES[settings.forge].branch.format(settings.branch)
    deploys = f"{branch} && has(assertion.environment) && assertion.environment in [{names}]"
    return {"google.subject": "assertion.sub", "attribute.access": f"{deploys} ? 'deploy' : 'preview'"}


def commands(settings: Settings, previewer: str, deployer: str, provider: str, backend: str) -> list[str]:
    """The commands that tell the workflows of each environment what was made."""
    return [
        FORGES[settings.forge].variables.format(name=name, environment=environment, value=value)
        for deploying in settings.environments
        for environment, account in ((f"preview-{deploying}", previewer), (deploying, deployer))
        for name, value in (
            ("GCP_WORKLOAD_IDENTITY_PROVIDER", provider),
            ("GCP_SERVICE_ACCOUNT", account),
            ("PULUMI_BACKEND_URL", backend),
        )
    ]
