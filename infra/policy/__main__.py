"""The policy pack that Pulumi runs with `--policy-pack infra/policy`: registers the rules with pulumi_policy.

Pulumi starts it once for each preview and update, with the stack's name and settings in the environment.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import pulumi
from pulumi_policy import (
    EnforcementLevel,
    PolicyPack,
    ReportViolation,
    ResourceValidationArgs,
    ResourceValidationPolicy,
)
from pulumi_policy.proxy import UnknownValueError

from infra import settings
from infra.names import PROJECT
from infra.policy.rules import RULES, UNKNOWN, Resource, Rule


def policy(rule: Rule, stack: settings.Settings | None) -> ResourceValidationPolicy:
    """A rule for a stack, whose settings are None where it is another program's."""

    def validate(args: ResourceValidationArgs, report: ReportViolation) -> None:
        resource = Resource(args.resource_type, args.name, plain(args.props), args.opts.protect)
        for message in rule.check(resource, stack):  # type: ignore[arg-type]  # general rules read no settings
            report(message, None)

    stops = rule.everywhere or stack is None or stack.production
    level = EnforcementLevel.MANDATORY if stops else EnforcementLevel.ADVISORY
    return ResourceValidationPolicy(
        name=rule.name, description=rule.description, validate=validate, enforcement_level=level
    )


def plain(value: Any) -> Any:
    """Properties as they are, with UNKNOWN where pulumi_policy raises an error for what a preview cannot know."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return {key: item(value, key) for key in value}
    if isinstance(value, Sequence):
        return [item(value, index) for index in range(len(value))]
    return value


def item(container: Any, key: Any) -> Any:
    try:
        return plain(container[key])
    except UnknownValueError:
        return UNKNOWN


def stack_settings() -> settings.Settings | None:
    """The settings of the stack, None where another program's is checked.

    Wrong settings stop the program with a message of its own, so the general rules are enough then.
    """
    if os.environ.get("PULUMI_PROJECT") != PROJECT:
        return None
    try:
        return settings.read(pulumi.runtime.config.get_config_env(), os.environ["PULUMI_STACK"])
    except pulumi.RunError:
        return None


found = stack_settings()
PolicyPack(PROJECT, [policy(rule, found) for rule in RULES if rule.general or found])
