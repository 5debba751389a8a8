"""Tune BPR in a folder; with a second argument above 0, die by SIGKILL at that call of the loss."""

import os
import signal
import sys

from mmllmrec.models import BPR
from mmllmrec.training.tune import tune

sys.path.insert(0, os.getcwd())
from tests.planted import groups

folder, kill = sys.argv[1], int(sys.argv[2])
calls = 0


class Mortal(BPR):
    def loss(self, batch):
        global calls
        calls += 1
        if calls == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(batch)


def build(split, dim=8):
    return Mortal(split.train, dim=dim, reg=0.0)


tuned = tune(
    build,
    groups(),
    space={"dim": [4, 8, 16], "fit.lr": (1e-3, 0.3, "log")},
    settings={"epochs": 4, "batch_size": 256, "lr": 0.01},
    trials=5,
    seed=3,
    folder=folder,
    progress=False,
)
print(tuned.best, tuned.score, tuned.table.drop(columns="seconds").to_json())
