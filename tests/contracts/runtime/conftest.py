"""Small policies that act through a fast runtime, and a batch for each."""

import pytest

from fast_path import FLOWS, PHASED, small


@pytest.fixture(params=PHASED)
def phased(request, family_row):
    """A small policy whose family has phases, and a batch."""
    return small(family_row(request.param))


@pytest.fixture(params=FLOWS)
def flowing(request, family_row):
    """The same, of a family whose phases are of LeRobot's common loop."""
    return small(family_row(request.param))


@pytest.fixture
def pi0(family_row):
    """One of them, where one is enough."""
    return small(family_row("pi0"))
