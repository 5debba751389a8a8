"""Train with checkpoints every 5 steps; with a third argument above 0, die by SIGKILL at that step of the process."""

import os
import signal
import sys

import torch
from torch import nn

from mmllmrec.models import BPR
from mmllmrec.seed import seed_everything
from mmllmrec.training.fit import fit

sys.path.insert(0, os.getcwd())
from tests.planted import groups

name, folder, kill = sys.argv[1], sys.argv[2], int(sys.argv[3])
calls = 0


class Dropped(BPR):
    """Draws random numbers in its loss, so that their state matters, and dies when told to."""

    def loss(self, batch):
        global calls
        calls += 1
        if calls == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "BPR":
            return super().loss(batch)
        keep = nn.functional.dropout(torch.ones(len(batch)), 0.5)
        u, i, j = self.users(batch.users), self.items(batch.items), self.items(batch.negatives)
        return {"bpr": (keep * nn.functional.softplus((u * (j[:, 0] - i)).sum(-1))).mean()}


split = groups()
seed_everything(3)
run = fit(
    Dropped(split.train, dim=8, reg=0.0),
    split,
    epochs=4,
    batch_size=64,
    lr=0.05,
    schedule="cosine",
    warmup=0.1,
    seed=3,
    folder=folder,
    checkpoint_every=5,
    progress=False,
)
print("weights", run.card.model["weights"], "score", run.best_score, run.history.drop(columns="seconds").to_json())
