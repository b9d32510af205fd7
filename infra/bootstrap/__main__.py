"""The state bucket, the key of its secrets, and access without keys for the workflows of one repository.

Two accounts: the previewer reads what a preview needs and can write nothing, not even a lock, because Pulumi's own
backends lock a stack for updates only. The deployer has the roles of docs/deploy.md. A job becomes the one or the other
by its branch and its environment.
"""

from typing import Final

import pulumi
import pulumi_gcp as gcp

from infra.apis import APIS, KMS, enable, project_number
from infra.bootstrap import settings as bootstrap

DAY: Final = 86400
USED: Final = {"storage.googleapis.com", "iam.googleapis.com"}
# The workflows exchange their tokens at the first, and impersonate the accounts through the second.
FEDERATION: Final = ("sts.googleapis.com", "iamcredentials.googleapis.com")
POOL: Final = "headcount"

#: Roles in the project with which a preview, a refresh and the search for drift read everything that the program makes.
PREVIEWER: Final = (
    "roles/browser",  # the project's number
    "roles/serviceusage.serviceUsageViewer",
    "roles/storage.bucketViewer",  # settings of buckets, and none of their objects
    "roles/artifactregistry.reader",
    "roles/iam.serviceAccountViewer",
    "roles/iam.securityReviewer",  # who is granted what
    "roles/aiplatform.viewer",
    "roles/logging.viewer",  # the audit log, for who changed something last
)
#: As docs/deploy.md has them for people.
DEPLOYER: Final = (
    "roles/serviceusage.serviceUsageAdmin",
    "roles/storage.admin",
    "roles/artifactregistry.admin",
    "roles/iam.serviceAccountAdmin",
    "roles/iam.serviceAccountUser",
    "roles/aiplatform.user",
)

config = bootstrap.read(pulumi.runtime.config.get_config_env(), pulumi.get_stack())
token = gcp.organizations.get_client_config_output().access_token
number: pulumi.Output[str] = token.apply(lambda known: project_number(config.project, known))
where = (config.project, config.region)
usable = {
    api.service: pulumi.ResourceOptions(depends_on=enable(api, where, token, number))
    for api in (*(api for api in APIS if api.service in USED), KMS)
}
for service in FEDERATION:
    gcp.projects.Service(service.partition(".")[0], service=service, disable_on_destroy=False)
labels = {"project": "headcount", "part": "bootstrap"}


def kept(service: str) -> pulumi.ResourceOptions:
    """Options of a resource without which the state of all stacks is lost."""
    return pulumi.ResourceOptions.merge(usable[service], pulumi.ResourceOptions(protect=True))


# No retention policy, because that would refuse the overwriting of the state. Overwritten and deleted files stay as old
# versions instead, and a deleted bucket can be restored for 30 days.
state = gcp.storage.Bucket(
    "state",
    name=f"{config.project}-headcount-state",
    location=config.region.upper(),
    uniform_bucket_level_access=True,
    public_access_prevention="enforced",
    versioning={"enabled": True},
    soft_delete_policy={"retention_duration_seconds": 30 * DAY},
    lifecycle_rules=[
        {
            "action": {"type": "Delete"},
            "condition": {"num_newer_versions": 50, "days_since_noncurrent_time": 90, "with_state": "ARCHIVED"},
        }
    ],
    labels=labels,
    opts=kept("storage.googleapis.com"),
)
ring = gcp.kms.KeyRing("pulumi", name="headcount", location=config.region, opts=kept(KMS.service))
key = gcp.kms.CryptoKey(
    "state",
    name="state",
    key_ring=ring.id,
    purpose="ENCRYPT_DECRYPT",
    rotation_period=f"{90 * DAY}s",  # older versions go on decrypting
    labels=labels,
    opts=kept(KMS.service),
)

iam = usable["iam.googleapis.com"]
pool = gcp.iam.WorkloadIdentityPool(
    "repository", workload_identity_pool_id=POOL, display_name="Headcount's workflows", opts=iam
)
forge = bootstrap.FORGES[config.forge]
provider = gcp.iam.WorkloadIdentityPoolProvider(
    config.forge,
    workload_identity_pool_id=pool.workload_identity_pool_id,
    workload_identity_pool_provider_id=config.forge,
    display_name=forge.title,
    description=f"Jobs of {config.repository}",
    attribute_mapping=bootstrap.attributes(config),
    attribute_condition=bootstrap.condition(config),
    oidc={"issuer_uri": forge.issuer},
)


def account(name: str, access: str, title: str, roles: tuple[str, ...]) -> gcp.serviceaccount.Account:
    """A service account with roles in the project, for the jobs whose tokens have this `access`."""
    made = gcp.serviceaccount.Account(name, account_id=f"headcount-{name}", display_name=title, opts=iam)
    for role in roles:
        gcp.projects.IAMMember(
            f"{name}-{role.removeprefix('roles/')}", project=config.project, role=role, member=made.member
        )
    gcp.serviceaccount.IAMMember(
        f"{name}-by-workflows",
        service_account_id=made.name,
        role="roles/iam.workloadIdentityUser",
        member=pulumi.Output.concat("principalSet://iam.googleapis.com/", pool.name, f"/attribute.access/{access}"),
    )
    return made


previewer = account("previewer", "preview", "Previews headcount, writes nothing", PREVIEWER)
deployer = account("deployer", "deploy", "Deploys headcount", (*DEPLOYER, *config.deployer_roles))
gcp.storage.BucketIAMMember(
    "previewer-reads-state", bucket=state.name, role="roles/storage.objectViewer", member=previewer.member
)
for name, member, role in (
    ("previewer-decrypts", previewer.member, "roles/cloudkms.cryptoKeyDecrypter"),
    # `pulumi stack init` encrypts the stack's data key.
    ("deployer-encrypts", deployer.member, "roles/cloudkms.cryptoKeyEncrypterDecrypter"),
):
    gcp.kms.CryptoKeyIAMMember(name, crypto_key_id=key.id, role=role, member=member)

pulumi.export("backend", state.url)
pulumi.export("secretsProvider", pulumi.Output.concat("gcpkms://", key.id))
#: What the workflows read, as commands of the forge's command line.
pulumi.export(
    "variables",
    pulumi.Output.all(previewer.email, deployer.email, provider.name, state.url).apply(
        lambda known: bootstrap.commands(config, *known)
    ),
)
