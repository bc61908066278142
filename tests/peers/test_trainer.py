"""The Trainer of transformers as a peer: it holds, and is caught where it is made wrong."""

from __future__ import annotations

import pytest
from extras import optional

from minilora.verify import engine
from minilora.verify.checks.registry import CHECKS
from minilora.verify.peers import PEERS

ASKED = ("train.labels", "train.gradient-accumulation")


def statuses(*names):
    optional("peft")
    checks = [check for check in CHECKS if check.id in names]
    report = engine.run(checks, PEERS["trainer"].load(), dtypes=["float32"])
    return [result.status for result in report.results]


@pytest.mark.slow
def test_it_holds():
    assert statuses(*ASKED) == ["pass", "pass"]
    assert statuses("train.classifier", "train.weight-decay") == ["known", "known"]


@pytest.mark.slow
def test_a_loss_of_another_factor_is_caught(monkeypatch):
    trainer = optional("transformers").Trainer
    of_theirs = trainer.compute_loss
    monkeypatch.setattr(trainer, "compute_loss", lambda *a, **k: 2 * of_theirs(*a, **k))
    assert statuses(*ASKED) == ["fail", "fail"]
