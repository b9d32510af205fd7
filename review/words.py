"""The sentences and tables of a review that Markdown and HTML share."""

from __future__ import annotations

import re

from .cost import HOURS_PER_MONTH, Cost
from .dangers import Finding, Rule, kind
from .events import PolicyFinding
from .prices import COMPUTE, PREDICTION
from .summary import Job, Review, Run, Usage
from .traffic import Serving

Table = tuple[list[str], list[list[str]]]  # the heads of the columns, and the rows
DONE = {
    "delete": "deleted",
    "replace": "replaced",
    "create": "created",
    "update": "changed",
    "same": "protection changed",
}
UNKNOWN_PRICES = {
    "fee": "“At least”, because the price of {} on Vertex AI in {} is not known here: the sums have Compute Engine's, "
    "which is lower.",
    "price": "The price of {} in {} is not known here, and in no sum.",
    "spot": "Spot prices change from day to day: {} in {} is in no sum.",
}
DRIFTED = "The endpoint is not as Pulumi's state has it, so these are from the endpoint itself"
SERVICES = {COMPUTE: "Compute Engine", PREDICTION: "Vertex AI"}


def traffic_table(found: Review) -> Table:
    """Each release before and after. A cell has `now → after` where the two differ."""
    before = {s.release: s for s in found.traffic.before}
    after = {s.release: s for s in found.traffic.after}
    rows = []
    for name in dict.fromkeys((*before, *after)):
        old, new = before.get(name), after.get(name)
        rows.append(
            [
                name,
                _arrow(*(_version(s) if s else None for s in (old, new))),
                _arrow(*(_image(s) if s else None for s in (old, new))),
                _arrow(*(str(s.machines) if s else None for s in (old, new))),
                _percent(old),
                _percent(new),
            ]
        )
    return ["release", "version", "image", "machines", "traffic now", "after"], rows


def steps_title(found: Review) -> str:
    """What the list of steps is."""
    if found.traffic.logged:
        return f"Steps of the rollout. {DRIFTED}"
    if found.traffic.replaced:
        return "What is deployed goes with the old endpoint. Steps of the rollout on the new one"
    return "Steps of the rollout"


def traffic_stays(found: Review) -> str:
    """One sentence on traffic and machines that a change leaves alone, or empty where it does not."""
    if found.traffic.before != found.traffic.after or found.traffic.steps:
        return ""
    if not found.traffic.after:
        return "Nothing is deployed, before and after."
    serving = ", ".join(f"{s.release} has {_percent(s)} of the traffic on {s.machines}" for s in found.traffic.after)
    return f"Traffic and machines stay as they are: {serving}."


def cost_table(found: Review) -> Table:
    now, after = found.cost_before, found.cost_after
    return (
        ["USD", "now", "after"],
        [
            ["an hour", _amount(now, 1), _amount(after, 1)],
            [f"a month of {HOURS_PER_MONTH} hours", _amount(now, HOURS_PER_MONTH), _amount(after, HOURS_PER_MONTH)],
        ],
    )


def cost_stays(found: Review) -> str:
    """One sentence on a cost that does not change, or empty."""
    now, after = found.cost_before, found.cost_after
    if (now.least, now.most, now.unknown) != (after.least, after.most, after.unknown):
        return ""
    return (
        f"The machines cost {_amount(after, 1)} USD an hour, {_amount(after, HOURS_PER_MONTH)} USD a month, as before."
    )


def cost_bound(found: Review) -> list[str]:
    """Why a sum is only a lower bound, in sentences."""
    remarks = []
    unknown = tuple(dict.fromkeys((*found.cost_before.unknown, *found.cost_after.unknown)))
    for why, sentence in UNKNOWN_PRICES.items():
        if named := list(dict.fromkeys(f"`{plain(one.machine)}`" for one in unknown if one.why == why)):
            regions = " and ".join(dict.fromkeys(one.region for one in unknown if one.why == why))
            remarks.append(sentence.format(" and ".join(named), regions))
    return remarks


def cost_remarks(found: Review) -> list[str]:
    """What is in no sum, and where the prices are from."""
    remarks = []
    if found.usage:
        remarks.append(f"Paid by use, and in no sum: {'; '.join(map(_usage, found.usage))}.")
    remarks += map(_job, found.jobs)
    remarks += map(_run, found.runs)
    sources = dict.fromkeys(
        f"{SERVICES.get(price.service, price.service)} on {price.day}"
        for price in (*found.cost_before.sources, *found.cost_after.sources)
    )
    if sources:
        remarks.append(f"List prices without discounts: {', '.join(sources)} (review/prices.csv).")
    if found.limit is not None:
        remarks.append(f"The stack's limit is {found.limit:,.0f} USD a month.")
    return remarks


def resource_table(found: Review) -> Table:
    rows = []
    for one in found.resources:
        paths = [d.path for d in one.differences] if one.operation in ("update", "replace", "same") else []
        data = one.holds or "no" if one.operation in ("delete", "replace") else ""
        rows.append([DONE[one.operation], f"{one.kind} `{plain(one.name)}`", _few(paths), data])
    heads = ["", "resource", "properties", "holds data"]
    kept = [i for i, head in enumerate(heads) if not head or any(row[i] for row in rows)]
    return [heads[i] for i in kept], [[row[i] for i in kept] for row in rows]


def by_rule(found: list[Finding]) -> list[tuple[Rule, list[str]]]:
    """The findings of each rule, in the order of the rules."""
    rules = dict.fromkeys(finding.rule for finding in found)
    return [(rule, [finding.text for finding in found if finding.rule == rule]) for rule in rules]


def policy_line(policy: PolicyFinding) -> str:
    on = f" on `{plain(policy.resource)}`" if policy.resource else ""
    return f"{policy.level} `{plain(policy.policy)}`{on}: {one_line(policy.text)}"


def plain(text: str) -> str:
    """A text that may stand between backticks."""
    return one_line(text).replace("`", "'")


def errors(found: Review) -> list[str]:
    """The errors of the preview, with names in the place of URNs."""
    urn = r'"urn:pulumi:[^"]*?([^$":]+:[^$":]+:[^$":]+)::([^":]+)"'
    return [re.sub(urn, lambda m: f"{kind(m[1])} `{m[2]}`", message.text) for message in found.errors]


def remedy(found: Review) -> str:
    """What this program needs where Pulumi refuses a change, or empty."""
    if any("marked for protection" in m.text and ":AiEndpoint::" in m.text for m in found.errors):
        return (
            "`replaceEndpoint: true`, deployed before this change, lets the endpoint be replaced: see docs/deploy.md."
        )
    return ""


def one_line(text: str) -> str:
    return " ".join(text.split())


def cut(text: str, longest: int) -> str:
    """At most so many characters of a text, and how many are left out."""
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text) - longest} more characters)"


def _arrow(old: str | None, new: str | None) -> str:
    if old == new or old is None or new is None:
        return str(new or old)
    return f"{old} → {new}"


def _version(serving: Serving) -> str:
    return serving.version_number or "new"


def _image(serving: Serving) -> str:
    digest = serving.image.removeprefix("sha256:")
    return f"`{plain(digest[:12])}`" if digest else "built by the deployment"


def _percent(serving: Serving | None) -> str:
    if serving is None:
        return "–"
    return "unknown" if serving.traffic is None else f"{serving.traffic} %"


def _amount(cost: Cost, hours: int) -> str:
    """An amount in USD; `at least` where a part of it is unknown."""

    def one(usd: float) -> str:
        return f"{usd * hours:,.0f}" if hours > 1 else f"{usd:,.2f}"

    least, most = one(cost.least), one(cost.most)
    if not cost.exact and not cost.most:
        return "unknown"
    return ("" if cost.exact else "at least ") + (least if least == most else f"{least} to {most}")


def _usage(usage: Usage) -> str:
    if usage.price is None or usage.price.usd is None:
        return f"{usage.what} (price unknown)"
    unit = usage.price.unit if usage.price.unit.startswith("a ") else f"a {usage.price.unit}"
    return f"{usage.what} ({usage.price.usd:.2f} USD {unit}{usage.free})"


def _job(job: Job) -> str:
    costs = "an unknown price" if job.hour is None else f"{job.hour:,.2f} USD"
    return (
        f"The {job.kind} `{plain(job.name)}` runs once on {job.machines}: {costs} an hour, and how long it takes is "
        f"not known, at most {job.most_hours:g} hours."
    )


def _run(run: Run) -> str:
    unknown = "the machines of its steps, whose price is not known"
    if not run.times:
        return f"The {run.kind} `{plain(run.name)}` runs once and costs {unknown}."
    words = run.times[0].lower() + run.times[1:]
    if run.paused:
        return f"The {run.kind} `{plain(run.name)}` is paused; resumed, it would start a run {words}."
    return f"The {run.kind} `{plain(run.name)}` starts a run {words}. Each run costs {unknown}."


def _few(paths: list[str]) -> str:
    shown = [f"`{plain(path)}`" for path in paths[:4]]
    return ", ".join(shown) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
