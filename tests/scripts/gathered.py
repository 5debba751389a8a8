"""Train a tiny unified model in however many processes there are; writes losses and weights. Argument: a folder that
holds the towers, blocks or events, chunk (0: none), where to write."""

import json
import os
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

from mmllmrec.data import splits
from mmllmrec.data.dataset import RecDataset
from mmllmrec.models import Unified
from mmllmrec.models.unified import Preset
from mmllmrec.seed import seed_everything
from mmllmrec.training import checkpoint
from mmllmrec.training.fit import fit

sys.path.insert(0, os.getcwd())
from tests.towers import tiny_world

towers, kind, chunk, out = sys.argv[1:]
events, catalog = tiny_world(users=13, items=19)
split = splits.random_per_user(RecDataset("tiny", events, catalog), seed=0)
preset = Preset(vision=f"{towers}/clip", language=f"{towers}/language", rank=3, tokens=16, soft=2)
seed_everything(5)
model = Unified.from_preset(preset, data=split.train, catalog=catalog, dim=16, id_dropout=0.0)
# Adam divides by the gradient's size, so the first steps would magnify rounding where a gradient is nearly zero
model.parameter_groups = lambda lr: [
    {"params": [p for p in model.parameters() if p.requires_grad], "lr": lr, "name": "all", "eps": 1e-3}
]
seen = set()
model.graph.propagation.register_forward_hook(lambda module, given, out: seen.add(str(out.dtype)))
size = {"item_batch": 5} if kind == "blocks" else {"batch_size": 6}
run = fit(model, split, epochs=2, lr=0.01, clip=1.0, chunk=int(chunk) or None, progress=False, **size)
if PartialState().is_main_process:
    Path(out).mkdir(parents=True)
    save_file(checkpoint.trained(model), f"{out}/weights.safetensors")
    told = {"processes": PartialState().num_processes, "loss": run.history["softmax"].tolist(), "graph": sorted(seen)}
    told |= {"precision": AcceleratorState().mixed_precision}
    Path(out, "told.json").write_text(json.dumps(told))
