"""Whether an epoch is over is known at once: not only once the rest of it has been planned."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders.batching import make_batching
from loaders.course import PlainCourse
from loaders.order import OrderSettings
from loaders.plan import Planner
from loaders.state import make_state

PLANS = (
    {},
    {"group_by": "modality_length", "plan_window": 32},
    {"pack_tokens": 60, "plan_window": 32},
    {"group_by": "modality", "max_tokens": 90, "plan_window": 32},
)


def planner(samples, *, measured=None, skip=(), **plan):
    def measure(numbers):
        if measured is not None:
            measured.append(len(numbers))
        return numbers % 50 + 1, (numbers % 3 == 0).astype(np.int64)

    course = PlainCourse(samples, OrderSettings(), {}, lambda _: samples)
    batching = make_batching(rank=1, world_size=2, **{"global_batch_size": 4, **plan})
    return Planner(None, course, batching, measure, seed=0, skip=skip)


def first_state(planner):
    run = {"global_batch_size": 4, "world_size": 2, "drop_last": False}
    parts = planner.course.first_parts()
    return make_state(
        seed=0, lanes=64, settings=planner.batching.settings, parts=parts, fingerprint={}, data={}, run=run
    )


@settings(max_examples=40)
@given(
    st.integers(0, 100),
    st.sampled_from(PLANS),
    st.booleans(),
    st.sampled_from([(), ((1, 5),), ((0, 10_000),)]),
)
def test_an_epoch_is_over_when_no_batch_is_left(samples, plan, drop_last, skip):
    here = planner(samples, skip=skip, drop_last=drop_last, **plan)
    state = first_state(here)
    states = [state, *(after for _, after in here.steps(state) if after["epoch"] == 0)]
    for each in (*states[:-3:8], *states[-3:]):
        assert here.is_over(each) == (here.count(each) == 0)


def test_one_window_is_measured_to_begin():
    for plan in PLANS[1:]:
        measured = []
        here = planner(100_000, measured=measured, **plan)
        assert not here.is_over(first_state(here))
        assert sum(measured) <= 64, plan
