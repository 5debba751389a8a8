"""The loop: it learns, stops at the best, repeats exactly, and goes on after SIGKILL to the same end."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mmllmrec.data.interactions import DataError
from mmllmrec.data.sampling import blocks_of, item_blocks
from mmllmrec.models import BPR, EASE, LightGCN
from mmllmrec.seed import seed_everything
from mmllmrec.training.fit import fit
from tests.planted import groups

HERE = Path(__file__).parent


@pytest.fixture
def split():
    return groups()


def bpr(split, seed=0):
    seed_everything(seed)
    return BPR(split.train, dim=8, reg=0.0)


def quick(split, **options):
    return fit(bpr(split), split, **({"epochs": 6, "batch_size": 64, "lr": 0.05, "progress": False} | options))


def test_it_learns_the_planted_groups_and_never_opens_test(split):
    run = quick(split, epochs=15)
    assert run.history["bpr"].iloc[0] > 0.6 > 0.4 > run.history["bpr"].iloc[-1]
    assert run.best_score > 3 * run.history["ndcg@20"].iloc[0] or run.best_score > 0.5
    assert split.test_opened == 0


def test_the_best_epoch_is_kept(split):
    from mmllmrec.evaluation.protocols import validation_score

    run = quick(split, epochs=40, patience=3, lr=0.2)
    assert len(run.history) < 40
    assert run.best_score == run.history["ndcg@20"].max() == run.history["ndcg@20"][run.best_epoch]
    assert validation_score(run.model, split.train, split.valid) == run.best_score


def test_one_seed_one_result(split):
    a, b, c = quick(split), quick(split), quick(split, seed=1)
    assert a.card.model["weights"] == b.card.model["weights"] != c.card.model["weights"]


def test_groups_have_their_own_learning_rates_and_frozen_parameters_stay(split):
    model = bpr(split)
    model.items.weight.requires_grad_(False)
    frozen, moving = model.items.weight.clone(), model.users.weight.clone()
    model.parameter_groups = lambda lr: [{"params": [model.users.weight], "lr": 0.0, "name": "users"}]
    fit(model, split, epochs=1, batch_size=64, progress=False)
    assert torch.equal(model.items.weight, frozen) and torch.equal(model.users.weight, moving)


def test_clipping_bounds_the_step(split):
    seen = []

    class Watched(BPR):
        def loss(self, batch):
            return {"big": 1e4 * super().loss(batch)["bpr"]}

    seed_everything(0)
    model = Watched(split.train, dim=8, reg=0.0)
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        seen.append(math.sqrt(sum(float(p.grad.square().sum()) for g in self.param_groups for p in g["params"])))
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spy)
        fit(model, split, epochs=1, batch_size=64, clip=0.5, progress=False)
    assert seen and max(seen) <= 0.5 + 1e-4


def test_a_loss_that_is_not_finite_is_named(split):
    class Broken(BPR):
        def loss(self, batch):
            return {"fine": self.users.weight.sum(), "broken": self.items.weight.sum() * math.nan}

    with pytest.raises(DataError, match="loss term broken is not finite in epoch 0"):
        fit(Broken(split.train, dim=8), split, epochs=1, progress=False)


def test_a_closed_form_is_measured(split):
    run = fit(EASE(split.train, reg=10.0), split)
    assert run.best_score > 0.3 and run.card.trainable_parameters == 0


def test_a_graph_model_checkpoints(split, tmp_path):
    seed_everything(0)
    run = fit(LightGCN(split.train, dim=8), split, epochs=2, lr=0.05, folder=tmp_path, progress=False)
    assert json.loads((tmp_path / "card.json").read_text())["metrics"]["ndcg@20"] == run.best_score


def test_blocks_hold_all_events_of_their_items_once(split):
    train = split.train
    blocks = list(item_blocks(train, size=13, rng=np.random.default_rng(0)))
    assert len(blocks) == blocks_of(train, 13) == round((train.item_counts > 0).sum() / 13)
    pairs = [set((b.users * train.n_items + b.items).tolist()) for b in blocks]
    every = set((train.users * train.n_items + train.items).tolist())
    assert sum(map(len, pairs)) == len(train) and set.union(*pairs) == every
    owners = [set(b.items.tolist()) for b in blocks]
    assert sum(map(len, owners)) == len(set.union(*owners)) and all(b.by_item for b in blocks)
    with pytest.raises(DataError, match="item_batch=13: two items or more"):
        fit(BPR(train, dim=5), split, item_batch=13)


def test_a_checkpoint_of_other_settings_is_refused(split, tmp_path):
    quick(split, epochs=2, folder=tmp_path)
    with pytest.raises(DataError, match="other lr: pass another folder, or resume=False"):
        quick(split, epochs=2, folder=tmp_path, lr=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BPR", "Dropped"])
def test_killed_in_mid_epoch_and_resumed_it_ends_the_same(tmp_path, name):
    script = str(HERE / "scripts" / "killed.py")

    def call(folder, kill):
        return subprocess.run(
            [sys.executable, script, name, str(tmp_path / folder), str(kill)],
            capture_output=True,
            text=True,
            cwd=HERE.parent,
        )

    whole = call("whole", 0)
    assert whole.returncode == 0, whole.stderr
    cut = call("cut", 17)
    assert cut.returncode == -signal.SIGKILL and (tmp_path / "cut" / "checkpoint").is_dir()
    again = call("cut", 0)
    assert again.returncode == 0, again.stderr
    assert again.stdout == whole.stdout and "weights" in again.stdout


@pytest.mark.slow
def test_two_processes_reach_the_loss_of_one(tmp_path):
    script = str(HERE / "scripts" / "processes.py")
    one = subprocess.run(
        [sys.executable, script, str(tmp_path / "one.json")], capture_output=True, text=True, cwd=HERE.parent
    )
    assert one.returncode == 0, one.stderr
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = subprocess.run(
        [*torchrun, script, str(tmp_path / "two.json")],
        capture_output=True,
        text=True,
        cwd=HERE.parent,
    )
    assert two.returncode == 0, two.stderr
    a, b = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "two"))
    assert (a["processes"], b["processes"]) == (1, 2)
    assert a["score"] == pytest.approx(b["score"], abs=1e-3)
    assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
