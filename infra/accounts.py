"""The accounts that jobs and pipelines run as."""

from collections.abc import Sequence

import pulumi
import pulumi_gcp as gcp

from infra.foundation import Foundation
from infra.settings import Settings


def job_account(
    name: str,
    account_id: str,
    role_id: str,
    folder: str,
    permissions: Sequence[str],
    settings: Settings,
    foundation: Foundation,
    parent: pulumi.ResourceOptions,
) -> tuple[gcp.serviceaccount.Account, list[pulumi.Resource]]:
    """Makes an account, and returns it with its rights.

    It may read the bucket of models, write objects below `folder` there, and do what `permissions` say in the project.
    """
    bucket = foundation.model_bucket
    iam = pulumi.ResourceOptions.merge(parent, foundation.after("iam.googleapis.com"))
    title = f"Headcount {name}, stack {settings.stack}"[:100]
    account = gcp.serviceaccount.Account(name, account_id=account_id, display_name=title, opts=iam)
    role = gcp.projects.IAMCustomRole(name, role_id=role_id, title=title, permissions=[*permissions], opts=iam)
    below = pulumi.Output.concat("projects/_/buckets/", bucket.name, f"/objects/{folder}/")
    return account, [
        gcp.storage.BucketIAMMember(
            f"{name}-reads-bucket",
            bucket=bucket.name,
            role="roles/storage.objectViewer",
            member=account.member,
            opts=parent,
        ),
        gcp.storage.BucketIAMMember(
            f"{name}-writes-outputs",
            bucket=bucket.name,
            role="roles/storage.objectUser",
            member=account.member,
            condition={"title": "outputs", "expression": below.apply(lambda p: f'resource.name.startsWith("{p}")')},
            opts=parent,
        ),
        gcp.projects.IAMMember(
            f"{name}-reports", project=settings.project, role=role.name, member=account.member, opts=parent
        ),
    ]
