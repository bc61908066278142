"""The workers of an executor ask a part of the checks: the report is the same, come what may."""

import pickle
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from minilora.verify import elsewhere
from minilora.verify.checks.registry import CHECKS
from minilora.verify.elsewhere import Elsewhere
from minilora.verify.engine import run
from minilora.verify.implementation.minilora_impl import Minilora
from minilora.verify.jobs import Setup

OPTIONS = {"levels": ["linear"], "profile": "quick", "dtypes": ["float64"]}


@contextmanager
def opened():
    yield Minilora()


@contextmanager
def closed():
    raise OSError("no such target on this machine")
    yield


def setup(open_target=opened):
    return Setup(open_target, {}, None, 30.0)


def summary(report):
    return [(r.check, r.dtype, r.status, r.cases, r.worst) for r in report.results]


@pytest.fixture(scope="module")
def alone():
    return summary(run(CHECKS, Minilora(), **OPTIONS))


class Counting(ThreadPoolExecutor):
    submitted = 0

    def submit(self, *arguments):
        self.submitted += 1
        return super().submit(*arguments)


class Lost(Executor):
    """Its workers are lost: some futures fail, some are cancelled."""

    submitted = 0

    def submit(self, *arguments):
        self.submitted += 1
        future = Future()
        if self.submitted % 2:
            future.set_exception(ConnectionError("the worker was killed"))
        else:
            future.cancel()
        return future


@pytest.mark.parametrize("ahead", [1, 64])
def test_workers_ask_a_part_and_the_report_is_the_same(ahead, alone):
    with Counting(1) as pool:
        report = run(CHECKS, Minilora(), **OPTIONS, helpers=Elsewhere(setup(), pool, ahead))
        assert pool.submitted
    assert summary(report) == alone


def test_what_lost_workers_had_is_asked_here(alone):
    lost = Lost()
    assert summary(run(CHECKS, Minilora(), **OPTIONS, helpers=Elsewhere(setup(), lost))) == alone
    assert lost.submitted


def test_a_target_that_a_worker_cannot_open_is_asked_here(alone):
    elsewhere._asker.cache_clear()
    with ThreadPoolExecutor(1) as pool:
        helpers = Elsewhere(setup(closed), pool)
        assert summary(run(CHECKS, Minilora(), **OPTIONS, helpers=helpers)) == alone


def test_a_worker_opens_the_target_once():
    elsewhere._asker.cache_clear()
    made = pickle.dumps(setup())
    assert elsewhere._asker(made) is elsewhere._asker(pickle.dumps(setup()))


def test_a_shut_executor_leaves_all_to_this_process(alone):
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    assert summary(run(CHECKS, Minilora(), **OPTIONS, helpers=Elsewhere(setup(), pool))) == alone
