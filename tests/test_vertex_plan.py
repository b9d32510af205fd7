"""The rollout's plan: the next steps, as a function of the wanted and the observed state."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulumi_vertex.rollout.plan import (
    Deploy,
    Drain,
    MoveTraffic,
    Observed,
    Resize,
    Size,
    Spec,
    Step,
    StrangersError,
    Undeploy,
    Wanted,
    deployed_id,
    plan,
)

ENDPOINT = "projects/p/locations/l/endpoints/1"
OLD, NEW = Spec("people@1", "n1-standard-2"), Spec("people@2", "n1-standard-2")


def release(name: str, spec: Spec, traffic: int | None, size: Size | None = None) -> Wanted:
    return Wanted(name, spec, size or Size(), traffic)


def there(spec: Spec, traffic: int = 0, **more: object) -> Observed:
    return Observed(deployed_id(ENDPOINT, spec), spec, Size(), traffic, **more)  # type: ignore[arg-type]


def lines(releases: list[Wanted], observed: list[Observed], drain: int = 0) -> list[str]:
    return [str(step) for step in plan({r.name: r for r in releases}, observed, ENDPOINT, drain)]


def test_a_new_version_is_deployed_before_traffic_moves_and_the_old_one_leaves_last() -> None:
    assert lines([release("main", NEW, 100)], [there(OLD, 100)], drain=30) == [
        "deploy main: people@2 on n1-standard-2, 1 replica, no traffic",
        "move traffic: main (people@2) 100 % (was people@1 100 %)",
        "drain people@1 for 30 s",
        "undeploy people@1",
    ]


def test_nothing_is_to_do_when_everything_is_as_wanted() -> None:
    assert lines([release("main", OLD, 90), release("next", NEW, 10)], [there(OLD, 90), there(NEW, 10)]) == []


def test_a_canary_that_is_promoted_and_renamed_is_not_deployed_again() -> None:
    assert lines([release("stable", NEW, 100)], [there(OLD, 90), there(NEW, 10)]) == [
        "move traffic: stable (people@2) 100 % (was people@1 90 %, people@2 10 %)",
        "undeploy people@1",
    ]


def test_a_plan_with_an_unknown_version_says_so() -> None:
    assert lines([release("main", Spec(None, "n1-standard-2"), None)], []) == [
        "deploy main: a version that is not known yet on n1-standard-2, 1 replica",
        "move traffic: main ? %",
    ]


def test_replicas_grow_before_the_traffic_moves_and_shrink_after() -> None:
    observed = [
        replace(there(OLD, 100), size=Size(2, 2)),
        there(NEW, 0),
    ]
    wanted = [release("old", OLD, 10, Size(1, 1)), release("new", NEW, 90, Size(2, 4))]
    assert lines(wanted, observed) == [
        "resize new: 1 replica becomes 2 to 4 replicas",
        "move traffic: old (people@1) 10 %, new (people@2) 90 % (was people@1 100 %)",
        "resize old: 2 replicas becomes 1 replica",
    ]


def test_what_a_failed_deployment_left_behind_is_deployed_anew() -> None:
    wanted = [release("main", NEW, 100)]
    dead = there(NEW, 0, available=False)
    assert lines(wanted, [there(OLD, 100), dead])[:2] == [
        "undeploy people@2, it is not available",
        "deploy main: people@2 on n1-standard-2, 1 replica, no traffic",
    ]
    # The first on an endpoint has got all traffic, although nobody answers: that is not "served".
    assert lines(wanted, [there(NEW, 100, available=False)], drain=30) == [
        "deploy main: people@2 on n1-standard-2, 1 replica, no traffic",
        "move traffic: main (people@2) 100 % (was people@2 100 %)",
        "undeploy people@2",
    ]


def test_a_model_that_may_only_be_restarting_is_left_alone_while_others_answer() -> None:
    observed = [there(OLD, 90), there(NEW, 10, available=False)]
    assert lines([release("main", OLD, 90), release("next", NEW, 10)], observed) == []
    # But it gets no more traffic as it is.
    assert lines([release("next", NEW, 100)], observed)[0] == (
        "deploy next: people@2 on n1-standard-2, 1 replica, no traffic"
    )


def test_a_model_scales_to_zero_only_while_it_is_alone_on_its_endpoint() -> None:
    idle = Size(0, 2, idle=(300, 600))
    assert lines([release("main", NEW, 100, idle)], []) == [
        "deploy main: people@2 on n1-standard-2, 0 to 2 replicas, none while idle",
        "move traffic: main (people@2) 100 %",
    ]
    observed = [replace(there(OLD, 100), size=idle)]
    assert lines([release("main", NEW, 100, idle)], observed, drain=30) == [
        "resize people@1: 0 to 2 replicas, none while idle becomes 1 to 2 replicas",
        "deploy main: people@2 on n1-standard-2, 1 to 2 replicas, no traffic",
        "move traffic: main (people@2) 100 % (was people@1 100 %)",
        "drain people@1 for 30 s",
        "undeploy people@1",
        "resize main: 1 to 2 replicas becomes 0 to 2 replicas, none while idle",
    ]
    later = Size(0, 2, idle=(300, 900))
    assert lines([release("main", OLD, 100, later)], observed) == [
        "resize main: scales to zero after 900 s without a request, 300 s after it came up"
    ]


def test_default_targets_are_no_difference_and_requests_have_none() -> None:
    def planned(declared: dict[str, int], found: dict[str, int]) -> list[str]:
        size, observed = (Size(targets=tuple(sorted(t.items()))) for t in (declared, found))
        return lines([release("main", OLD, 100, size)], [replace(there(OLD, 100), size=observed)])

    assert planned({}, {"cpu": 60}) == planned({"cpu": 60}, {}) == planned({}, {"cpu": 60, "accelerator": 60}) == []
    assert planned({"requests": 60}, {}) == ["resize main: autoscaling aims at requests 60 requests a minute"]
    assert planned({}, {"requests": 60}) == ["resize main: autoscaling aims at the default"]
    assert planned({"cpu": 70}, {"cpu": 60}) == ["resize main: autoscaling aims at cpu 70 %"]


def test_an_empty_rollout_lets_the_one_with_traffic_leave_last() -> None:
    assert lines([], [there(OLD, 90), there(NEW, 10)])[0].startswith("move traffic: people@1 100 %")
    assert lines([], [there(OLD, 0), there(NEW, 100)], drain=30) == ["undeploy people@1", "undeploy people@2"]


def test_deployed_models_of_somebody_else_are_not_touched() -> None:
    with pytest.raises(StrangersError):
        lines([release("main", NEW, 100)], [there(OLD, 100, ours=False)])


def test_an_adopted_deployed_model_of_the_same_spec_keeps_its_own_id() -> None:
    adopted = Observed("77", OLD, Size(), 100)
    assert lines([release("main", OLD, 100)], [adopted]) == []


def test_a_run_killed_after_the_traffic_moved_still_drains() -> None:
    observed = [there(NEW, 100), there(OLD, 0, drained=False)]
    assert lines([release("main", NEW, 100)], observed, drain=30) == [
        "drain people@1 for 30 s",
        "undeploy people@1",
    ]


SPECS = [Spec(f"people@{n}", machine) for n in (1, 2, 3) for machine in ("n1-standard-2", "n1-standard-4")]
SIZES = st.builds(lambda least, more: Size(least, least + more), st.integers(1, 3), st.integers(0, 2))
IDLE = Size(0, 2, idle=(300, 600))


@given(st.sampled_from(SPECS), st.integers(0, 4))
def test_an_id_has_at_most_ten_digits_and_no_leading_zero(spec: Spec, attempt: int) -> None:
    id_ = deployed_id(ENDPOINT, spec, attempt)
    assert id_.isdecimal()
    assert len(id_) <= 10
    assert id_[0] != "0"
    assert id_ == deployed_id(ENDPOINT, replace(spec), attempt)


def split(parts: list[int]) -> list[int]:
    """Percentages that sum to 100, from any positive or zero weights."""
    total = sum(parts) or 1
    shares = [part * 100 // total for part in parts]
    shares[0] += 100 - sum(shares)
    return shares


@st.composite
def wanted_sets(draw: st.DrawFn) -> dict[str, Wanted]:
    specs = draw(st.lists(st.sampled_from(SPECS), unique=True, max_size=3))
    if not specs:
        return {}
    weights = draw(st.lists(st.integers(0, 9), min_size=len(specs), max_size=len(specs)))
    if len(specs) == 1 and draw(st.booleans()):
        return {"r0": Wanted("r0", specs[0], IDLE, 100)}
    return {
        f"r{n}": Wanted(f"r{n}", spec, draw(SIZES), share)
        for n, (spec, share) in enumerate(zip(specs, split(weights), strict=True))
    }


@st.composite
def endpoints(draw: st.DrawFn) -> list[Observed]:
    specs = draw(st.lists(st.sampled_from(SPECS), unique=True, max_size=4))
    shares = split(draw(st.lists(st.integers(0, 9), min_size=len(specs), max_size=len(specs)))) if specs else []
    if len(specs) == 1 and draw(st.booleans()):
        return [Observed("7", specs[0], IDLE, 100, drained=False)]
    return [
        Observed(
            draw(st.sampled_from([deployed_id(ENDPOINT, spec), str(n)])),
            spec,
            draw(SIZES),
            share,
            available=draw(st.booleans()),
            drained=share == 0 and draw(st.booleans()),
        )
        for n, (spec, share) in enumerate(zip(specs, shares, strict=True))
    ]


def done(step: Step, observed: list[Observed], *, first_gets_all: bool) -> list[Observed]:
    """The endpoint after one step; fails if Vertex AI would refuse it or a caller would notice."""
    by_id = {d.id: d for d in observed}
    if isinstance(step, Deploy):
        id_ = next(i for n in range(9) if (i := deployed_id(ENDPOINT, step.wanted.spec, n)) not in by_id)
        assert step.alone == (not observed)
        size = step.wanted.size
        assert size.min_replicas or not observed  # scale to zero only alone
        assert all(d.size.min_replicas for d in observed)
        traffic = 100 if first_gets_all and not observed else 0
        return [*observed, Observed(id_, step.wanted.spec, size, traffic, drained=not traffic)]
    if isinstance(step, Resize):
        assert by_id[str(step.id)].size == step.old
        assert step.new.min_replicas or len(observed) == 1
        return [replace(d, size=step.new) if d.id == step.id else d for d in observed]
    if isinstance(step, MoveTraffic):
        shares = {str(share.id): share.traffic or 0 for share in step.new}
        assert sum(shares.values()) == 100
        helpless = not any(d.traffic and d.available for d in observed)
        for served, share in shares.items():
            assert served in by_id
            assert by_id[served].available or share <= by_id[served].traffic or helpless
        return [replace(d, traffic=shares.get(d.id, 0), drained=d.drained and not d.traffic) for d in observed]
    if isinstance(step, Drain):
        assert not any(by_id[id_].traffic for id_ in step.ids)
        return [replace(d, drained=True) if d.id in step.ids else d for d in observed]
    assert isinstance(step, Undeploy)
    assert not by_id[step.id].traffic or len(observed) == 1
    return [d for d in observed if d.id != step.id]


def shape(step: Step) -> tuple[object, ...]:
    """What a step does, without its words: a plan may come to call a deployed model by a shorter name."""
    if isinstance(step, Deploy):
        return Deploy, step.wanted.spec
    if isinstance(step, Resize):
        return Resize, step.name, step.new
    if isinstance(step, Undeploy):
        return Undeploy, step.id
    if isinstance(step, Drain):
        return Drain, step.ids
    return MoveTraffic, sorted((share.name.split(" ")[0], share.traffic) for share in step.new)


@given(wanted_sets(), endpoints(), st.sampled_from([0, 30]), st.booleans())
def test_every_plan_ends_as_wanted_and_goes_on_from_any_step(
    wanted: dict[str, Wanted], observed: list[Observed], drain: int, first_gets_all: bool
) -> None:
    steps = plan(wanted, observed, ENDPOINT, drain)
    count = 0
    while steps:
        count += 1
        assert count < 50
        if wanted and drain and isinstance(steps[0], Undeploy):
            assert all(d.drained or not d.available for d in observed if d.id == steps[0].id)
        observed = done(steps[0], observed, first_gets_all=first_gets_all)
        rest = plan(wanted, observed, ENDPOINT, drain)
        expected = [shape(step) for step in steps[1:]]
        if isinstance(steps[0], Deploy) and steps[0].alone and first_gets_all:
            # Vertex AI has moved the traffic by itself.
            assert [s for s in map(shape, rest) if s[0] is not MoveTraffic] == [
                s for s in expected if s[0] is not MoveTraffic
            ]
        else:
            assert list(map(shape, rest)) == expected
        steps = rest
    assert sorted((d.spec.model or "", d.spec.machine_type, str(d.size), d.traffic) for d in observed) == sorted(
        (w.spec.model or "", w.spec.machine_type, str(w.size), w.traffic or 0) for w in wanted.values()
    )
