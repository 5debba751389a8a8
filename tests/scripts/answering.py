"""Tune a small causal model in however many processes there are and write the losses; alone or by torchrun."""

import json
import sys

import numpy as np
from accelerate import PartialState

from mmllmrec.features import adapters
from mmllmrec.language.generate import Generator
from mmllmrec.seed import seed_everything
from mmllmrec.training.causal import fit_causal

rng = np.random.default_rng(0)
starts = [rng.integers(4, 200, 12).tolist() for _ in range(8)]  # prompts that begin alike
rows = [(starts[n // 4] + rng.integers(4, 200, 4).tolist(), rng.integers(4, 200, 3).tolist()) for n in range(32)]
seed_everything(0)
model = adapters.attach(Generator.load("nano").model, rank=4, kind="language")
run = fit_causal(model, rows, valid=rows[:6], epochs=3, batch_tokens=180, lr=5e-3, progress=False)
if PartialState().is_main_process:
    weights = sum(float(p.detach().double().abs().sum()) for p in model.parameters() if p.requires_grad)
    result = {
        "processes": PartialState().num_processes,
        "loss": run.history["loss"].tolist(),
        "valid": run.history["valid loss"].tolist(),
        "weights": weights,
    }
    with open(sys.argv[1], "w") as file:
        json.dump(result, file)
