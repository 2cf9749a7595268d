"""A few attempts of each trial of the campaign, and its table in the docs."""

import pytest
from campaign import trial
from campaign.parts import PARTS

TRIALS = [one for part in PARTS.values() for one in part.TRIALS if one.few]


@pytest.mark.newest
@pytest.mark.parametrize("one", TRIALS, ids=lambda one: one.name)
def test_nothing_is_lost(one: trial.Trial):
    tally = trial.run(one, range(one.few), seed=0)
    assert not tally.bad
    assert tally.counts.total() == one.few
