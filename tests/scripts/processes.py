"""Train in however many processes there are and write the losses; started alone or by torchrun."""

import json
import os
import sys

from accelerate import PartialState

from mmllmrec.models import BPR
from mmllmrec.seed import seed_everything
from mmllmrec.training.fit import fit

sys.path.insert(0, os.getcwd())
from tests.planted import groups

split = groups()
seed_everything(0)
run = fit(BPR(split.train, dim=8, reg=0.0), split, epochs=3, batch_size=64, lr=0.01, progress=False)
if PartialState().is_main_process:
    result = {
        "processes": PartialState().num_processes,
        "loss": run.history["bpr"].tolist(),
        "score": run.best_score,
    }
    with open(sys.argv[1], "w") as file:
        json.dump(result, file)
