"""A rollback: traffic back to the version that served before.

The plan is pure. The runner edits the stack's file, deploys it, and asks the endpoint; if that fails, it restores the
file and deploys it again. A journal beside the checkout's own state lets a repeated command finish an interrupted one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from headcount import releases, stacks
from headcount.history import MODEL_VERSION, ROLLOUT, Period, Version
from headcount.releases import Releases
from headcount.stacks import StackError

MESSAGE: Final = "headcount rollback to "  # of the update in Pulumi's history
UNDONE: Final = "headcount rollback undone"
_IMAGE: Final = "vertex:index:ReleasedImage"


@dataclass(frozen=True)
class Plan:
    """What a rollback does. to: the version that gets all traffic; release: its name in the stack's file.

    redeploys: it is no longer deployed. after: the releases of the file. before: traffic of each release now.
    """

    stack: str
    to: Version
    release: str
    redeploys: bool
    before: Mapping[str, int]
    after: Releases

    def __str__(self) -> str:
        what = f"image {self.to.digest[:19]}" + (f", model {self.to.model}" if self.to.model else "")
        lines = [f"Stack {self.stack} goes back to {self.to.version} ({what}):"]
        lines += [
            f"    {name}: {self.before.get(name, 0)} % of the traffic becomes {release['traffic']} %"
            for name, release in self.after.items()
        ]
        lines.append(
            "It is no longer deployed: a new release of the same image is deployed first, which takes about 20 minutes "
            "on Vertex AI."
            if self.redeploys
            else "It is still deployed, so that only traffic moves."
        )
        lines.append("Then the endpoint is asked; if that fails, the traffic moves back.")
        return "\n".join(lines)


def plan(stack: str, found: Sequence[Period], current: Releases) -> Plan:
    """The way back. found: the stack's history. current: the releases of its file. Raises StackError."""
    now = found[-1].versions if found else ()
    before = {version.release: version.traffic for version in now}
    if not any(before.values()):
        raise StackError(
            f"Stack {stack} serves nothing, so that there is nothing to roll back. If it is paused: `headcount release "
            f"-s {stack} resume`, then `pulumi up -s {stack}`."
        )
    to = _unfinished(found[-1], current) or previous(found)
    if to is None:
        raise StackError(
            f"No other version served on stack {stack} before, as far as its history goes: `headcount history {stack}` "
            f"shows it. To serve another image: `headcount release -s {stack} canary NAME 100 --image sha256:…`."
        )
    if here := next((version for version in now if version.key == to.key), None):
        if here.release not in current:
            raise StackError(
                f"{here.version} is still deployed, but the stack's file has no release {here.release}: restore the "
                "file, or deploy it, and repeat."
            )
        return Plan(stack, here, here.release, False, before, releases.promote(current, here.release))
    if not to.digest:
        raise StackError(f"{to.version} served before, but the digest of its image is not known any more.")
    name = next((name for name, release in current.items() if _key(release) == to.key), "") or _free(current)
    after = releases.canary(current, name, to.digest, 100, {}, to.model)
    return Plan(stack, to, name, True, before, after)


def previous(found: Sequence[Period]) -> Version | None:
    """The version that led before the newest of those that serve now got traffic; None where there is none."""
    now = _serving(found[-1])
    for period in reversed(found[:-1]):
        if period.leader and not now <= _serving(period):
            return period.leader
    return None


def _serving(period: Period) -> set[tuple[str, str]]:
    return {version.key for version in period.versions if version.traffic}


def _unfinished(now: Period, current: Releases) -> Version | None:
    """The version that a rollback gave the traffic to, if the stack's file does not have that rollback.

    That is so where the rollback ran in another checkout, and its change of the file was not committed.
    """
    shares = {name: release["traffic"] for name, release in current.items() if release["traffic"]}
    deployed = {version.release: version.traffic for version in now.versions if version.traffic}
    return now.leader if now.update.message.startswith(MESSAGE) and shares != deployed else None


def _key(release: Mapping[str, Any]) -> tuple[str, str]:
    return str(release["image"]), str(release.get("model") or "")


def _free(current: Releases) -> str:
    names = ["previous", *(f"previous-{number}" for number in range(2, len(current) + 3))]
    return next(name for name in names if name not in current)


@dataclass(frozen=True)
class Steps:
    """The steps of a preview: those of the rollback, as URNs, and the others, in words."""

    own: tuple[str, ...]
    others: tuple[str, ...]


def steps_of(preview: Mapping[str, Any], release: str, redeploys: bool) -> Steps:
    """Which steps a rollback is made of. Raises StackError where the rollout would be replaced."""
    own, others = [], []
    for step in preview.get("steps") or []:
        urn, op = str(step["urn"]), str(step["op"])
        if op in ("same", "read", "refresh"):
            continue
        type_, name = urn.split("::")[2].rpartition("$")[2], urn.rpartition("::")[2]
        if type_ == ROLLOUT and op != "update":
            raise StackError(f"The rollout would be {op}d, and not only its traffic moved: look at `pulumi preview`.")
        if type_ == ROLLOUT or (redeploys and type_ in (_IMAGE, MODEL_VERSION) and name == release):
            own.append(urn)
        else:
            others.append(f"{op} {type_.rpartition(':')[2]} {name}")
    return Steps(tuple(dict.fromkeys(own)), tuple(others))


# --- the runner ---------------------------------------------------------------------------------------------

Check = Callable[[str, Version], str]  # (release, version) → what is wrong with the endpoint's answers, or ""


@dataclass
class Rollback:
    """A rollback that is under way. before, after: texts of the stack's file. back: it failed and moves back."""

    stack: str
    release: str
    redeploys: bool
    version: Version
    before: str
    after: str
    back: bool = False

    @classmethod
    def of(cls, plan: Plan) -> Rollback:
        """The rollback of a plan, which is now in the stack's file."""
        file = releases.stack_file(plan.stack)
        before = file.read_text()
        releases.change(plan.stack, lambda _: plan.after)
        after = file.read_text()
        file.write_text(before)
        return cls(plan.stack, plan.release, plan.redeploys, plan.to, before, after)

    @classmethod
    def interrupted(cls, stack: str) -> Rollback | None:
        """The rollback that was interrupted in this checkout. Raises StackError if the stack's file changed since."""
        journal = _journal(stack)
        if not journal.exists():
            return None
        kept = json.loads(journal.read_text())
        found = cls(**{**kept, "version": Version(**kept["version"])})
        if releases.stack_file(stack).read_text() not in (found.before, found.after):
            raise StackError(
                f"A rollback was interrupted, and Pulumi.{stack}.yaml was changed since then. Delete {journal} to "
                "forget the rollback, and repeat."
            )
        return found

    def run(self, check: Check, say: Callable[[str], None]) -> bool:
        """Moves traffic, asks the endpoint, and moves back if that fails. Returns whether it holds.

        Raises StackError where the move back fails too; the journal stays, and a repeated rollback goes on there.
        """
        if not self.back:
            self._keep()
            problem = self._deploy(self.after, f"{MESSAGE}{self.version.version}", say)
            problem = problem or check(self.release, self.version)
            if not problem:
                _journal(self.stack).unlink()
                return True
            say(f"The rollback failed: {problem}\nThe traffic moves back.")
            self.back = True
        self._keep()
        if problem := self._deploy(self.before, UNDONE, say):
            raise StackError(f"The move back failed, too: {problem}\nRepeat `headcount rollback {self.stack}`.")
        _journal(self.stack).unlink()
        return False

    def _keep(self) -> None:
        journal = _journal(self.stack)
        journal.parent.mkdir(parents=True, exist_ok=True)
        content = {**vars(self), "version": vars(self.version)}
        draft = journal.with_suffix(".new")
        draft.write_text(json.dumps(content))
        draft.replace(journal)

    def _deploy(self, text: str, message: str, say: Callable[[str], None]) -> str:
        """Writes the stack's file and deploys the rollback's part of it. Returns what went wrong, or ""."""
        releases.stack_file(self.stack).write_text(text)
        try:
            steps = steps_of(stacks.digest(self.stack, "preview"), self.release, self.redeploys)
        except StackError as error:
            return str(error)
        if steps.others:
            say("These changes are not part of it, and stay undeployed:")
            for other in steps.others:
                say(f"    {other}")
        if not steps.own:
            return ""
        targets = [option for urn in steps.own for option in ("--target", urn)] if steps.others else []
        status = stacks.run(self.stack, "up", "--yes", "--skip-preview", "--message", message, *targets)
        return f"`pulumi up` ended with status {status}." if status else ""


def _journal(stack: str) -> Path:
    return stacks.home() / f"rollback-{stack}.json"
