"""`Rollout`: the set of deployed models on one endpoint, and their traffic."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from .. import operations
from ..checks import Failures
from ..engine_call import EngineCall
from ..errors import ProblemError
from ..ownership import LABEL, new_claim
from ..resource import ResourceType, State
from ..retries import converge
from ..vertex_api import VertexApi
from ..wire import UNKNOWN, Wire
from .endpoint import Ours, deployed_models, get_endpoint, observe, outputs, refreshed, undrained
from .inputs import DEFINITION, check_together
from .plan import MoveTraffic, Observed, Share, Step, plan
from .runner import Runner, planned
from .wanted import drain_seconds, wanted_of


class RolloutType(ResourceType):
    definition = DEFINITION
    # Each step has a limit of its own (runner.py); these only end a run that makes no progress. A deployment that
    # fails may take nearly two hours, and a deletion has to wait for one that runs.
    seconds: ClassVar = {"create": 6 * 3600.0, "update": 6 * 3600.0, "delete": 4 * 3600.0, "read": 120.0}

    def check_together(self, inputs: Wire) -> Failures:
        return check_together(inputs)

    def warnings(self, state: State, inputs: Wire) -> list[str]:
        if inputs.get("endpoint") == state.inputs.get("endpoint"):
            return []
        return [
            f"The endpoint {state.id} is replaced, which is an outage: nothing answers from its deletion until the "
            "models are deployed on the new one, and the new one has another URL."
        ]

    def preview(self, call: EngineCall, api: VertexApi, inputs: Wire, state: State | None) -> Wire:
        """Logs the plan, one line a step."""
        ours = _ours(call, inputs, state)
        name = inputs["endpoint"]
        endpoint = get_endpoint(call, api, name) if name != UNKNOWN else None
        observed = observe(endpoint or {}, ours, undrained(state.outputs) if state else ())
        wanted = wanted_of(inputs)
        steps = planned(wanted, observed, name, drain_seconds(inputs))
        if steps:
            call.log("\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1)))
        if steps or endpoint is None:
            return {p.wire: UNKNOWN for p in DEFINITION.outputs}
        return outputs(endpoint, ours, wanted)

    def create(self, call: EngineCall, api: VertexApi, inputs: Wire) -> State:
        runner = Runner(call, api, inputs, replace(_ours(call, inputs, None), claim=new_claim()))
        return State(inputs["endpoint"], inputs, runner.run())

    def read(self, call: EngineCall, api: VertexApi, state: State) -> State | None:
        endpoint = get_endpoint(call, api, state.id)
        if endpoint is None:
            return None
        ours = _ours(call, state.inputs, state)
        if not state.inputs:  # an import takes what is there, and whose it is
            ours = replace(ours, adopt=True, claim=endpoint.get("labels", {}).get(LABEL, ""))
        inputs = refreshed(state, endpoint, ours)
        return State(state.id, inputs, outputs(endpoint, ours, wanted_of(inputs)))

    def update(self, call: EngineCall, api: VertexApi, state: State, inputs: Wire) -> Wire:
        return Runner(call, api, inputs, _ours(call, inputs, state), undrained(state.outputs)).run()

    def delete(self, call: EngineCall, api: VertexApi, state: State) -> None:
        """Undeploys everything of this rollout's own that no later create has taken over."""
        ours = Ours.of(call.urn, state.outputs)
        runner = Runner(call, api, {"endpoint": state.id, "models": {}}, ours)

        def step() -> bool:
            operations.wait_for_others(call, api, state.id)
            endpoint = get_endpoint(call, api, state.id) or {}
            kept = {
                d["id"] for d in deployed_models(endpoint) if ours.own(d) and ours.claim_on(d, endpoint) != ours.claim
            }
            observed = observe(endpoint, ours)
            mine = [d for d in observed if d.ours and d.id not in kept]
            steps: list[Step] = plan({}, mine, state.id)
            if not steps:
                if kept:
                    call.log("A later create of this rollout has taken over what is deployed; it is left to that one.")
                elif ours.claim and endpoint.get("labels", {}).get(LABEL) == ours.claim:
                    labels = {key: value for key, value in endpoint["labels"].items() if key != LABEL}
                    api.change("PATCH", state.id, {"labels": labels}, updateMask="labels")
                return True
            if any(d.traffic for d in mine) and len(mine) < len(observed):
                steps.insert(0, leave_traffic_to([d for d in observed if d not in mine]))
            call.say(str(steps[0]))
            runner.do(steps[0])
            return False

        with api.lock(state.id):
            converge(call, step)


def _ours(call: EngineCall, inputs: Wire, state: State | None) -> Ours:
    return Ours.of(call.urn, state.outputs if state else {}, adopt=inputs.get("adopt") is True)


def leave_traffic_to(others: list[Observed]) -> MoveTraffic:
    """All traffic to those who stay, in the proportion that they have."""
    total = sum(d.traffic for d in others)
    if not total:
        raise ProblemError(
            f"The endpoint also has deployed models of somebody else, {', '.join(d.id for d in others)}, and none of "
            "them has traffic to take over. Give them some by hand, or undeploy them."
        )
    shares = {d.id: d.traffic * 100 // total for d in others}
    shares[max(shares, key=lambda id_: shares[id_])] += 100 - sum(shares.values())
    return MoveTraffic((), tuple(Share(str(d.spec.model), d.id, shares[d.id]) for d in others))
