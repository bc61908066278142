"""The checks that a finding names fail by themselves, whatever is declared as known."""

from fnmatch import fnmatchcase as fnmatch

import pytest
from releases import changed_since_finding
from test_docs import FOUND
from test_other_peers import loaded

from minilora.verify.checks.registry import CHECKS
from minilora.verify.core.errors import Fault, Skip
from minilora.verify.core.types import Case
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.implementation.minilora_impl import Minilora
from minilora.verify.peers import PEERS

NAMED = {(peer, check): id for id, (peer, checks) in FOUND.items() for check in checks}


def dtypes_of(peer, check):
    """Those in which the peer declares the check as known, where it says so; or float32."""
    names = [name.partition(":") for name in PEERS[peer].known]
    told = [dtype for pattern, _, dtype in names if dtype and fnmatch(check, pattern)]
    return told or ["float32"]


def fails(check, subject, dtype, number):
    """Whether an answer of a case is wrong, or none comes."""
    case = Case(check.id, dtype, number, 0, subject.fixed)
    try:
        return any(c.judge().verdict == "fail" for c in check.run(subject, case))
    except Fault:
        return True
    except Skip:
        return False


@pytest.mark.slow
@pytest.mark.parametrize(("peer", "check"), NAMED)
def test_what_finds_something_fails_by_itself(peer, check):
    library = loaded(peer)
    if changed := changed_since_finding(NAMED[peer, check]):
        pytest.skip("; ".join(changed))
    (it,) = (each for each in CHECKS if each.id == check)
    subject, dtypes = GuardedImplementation(library), dtypes_of(peer, check)
    cases = [(dtype, n) for dtype in dtypes for n in range(it.cases("ci", dtype))]
    assert any(fails(it, subject, dtype, number) for dtype, number in cases)


def test_what_holds_does_not_fail():
    subject = GuardedImplementation(Minilora())
    (it,) = (each for each in CHECKS if each.id == "linear.forward")
    assert not fails(it, subject, "float32", 0)
