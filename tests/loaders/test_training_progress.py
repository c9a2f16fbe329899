"""How far a run is, by the states of its loader."""

import pytest

from loaders.training import Span


def state(step, epoch, samples):
    return {"step": step, "epoch": epoch, "samples": samples}


def test_a_run_of_epochs_counts_samples_and_ends_with_its_last_epoch():
    span = Span(100, epochs=2)
    assert [span.share(state(9, 0, samples)) for samples in (0, 50, 200)] == [0, 0.25, 1]
    assert not span.is_over(state(9, 1, 199))
    assert span.is_over(state(9, 2, 150))  # some were left out


def test_a_run_of_steps_counts_steps():
    span = Span(100, steps=8)
    assert [span.share(state(step, 5, 7)) for step in (0, 2, 8)] == [0, 0.25, 1]
    assert [span.is_over(state(step, 5, 7)) for step in (7, 8, 9)] == [False, True, True]


@pytest.mark.parametrize(
    ("before", "after", "passed"),
    [(0, 1, False), (4, 5, True), (5, 6, False), (3, 7, True), (19, 20, True), (20, 21, True)],
)
def test_multiples_and_the_end_are_passed_once(before, after, passed):
    assert Span(100, steps=21).passes(5, state(before, 0, 0), state(after, 0, 0)) is passed
