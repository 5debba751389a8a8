"""The loop: it learns, stops at the best, repeats exactly, and goes on after SIGKILL to the same end."""

import json
import math
import platform
import resource
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
from mmllmrec.training.pages import kept_pages
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


def test_a_finished_run_that_is_read_keeps_the_card_of_where_it_was_trained(split, tmp_path):
    first = quick(split, folder=tmp_path)
    path = tmp_path / "card.json"
    path.write_text(path.read_text().replace('"device": "', '"device": "elsewhere, '))
    told = path.read_text()
    again = quick(split, folder=tmp_path)
    assert again.card.device.startswith("elsewhere, ") and path.read_text() == told
    assert again.best_score == first.best_score and again.seconds == first.seconds


def test_patience_waits_for_the_first_epochs(split):
    asked = {"epochs": 12, "patience": 2, "lr": 1e-9}  # nothing gets better after the first
    assert len(quick(split, **asked).history) == 3 and len(quick(split, **asked, min_epochs=7).history) == 9


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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left as they are")
def test_large_tensors_keep_their_pages_while_a_model_trains_and_give_them_back():
    def faults(times, size=1 << 24):  # 64 MiB each
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(times):
            torch.ones(size)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1])

    before = resident()
    with kept_pages():
        faults(16)  # blocks find their places
        assert faults(4) < 100 < resident() - before  # of 16 thousand pages each
    assert resident() - before < (1 << 14) / 2


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


def staged(split, **options):
    """BPR whose items are a group of their own, under a penalty on what is clipped and with decay."""
    model = bpr(split)
    model.parameter_groups = lambda lr: [
        {"params": [model.users.weight], "lr": lr, "name": "users"},
        {"params": [model.items.weight], "lr": 2 * lr, "name": "items"},
    ]
    asked = {"epochs": 4, "batch_size": 64, "lr": 0.05, "schedule": "cosine", "weight_decay": 0.1, "clip": 0.1}
    return fit(model, split, progress=False, **asked | options)


class Cut(Exception):
    pass


@pytest.fixture
def steps(monkeypatch):
    """What every optimiser step found: the rate of each group, whether it had gradients, whether it had moments."""
    seen, step = [], torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        seen.append(
            [(g["lr"], g["params"][0].grad is not None, bool(self.state[g["params"][0]])) for g in self.param_groups]
        )
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    return seen


def test_a_staged_group_starts_when_its_share_is_over(split, steps):
    start = bpr(split).items.weight.detach().clone()
    at = []
    run = staged(split, stages={"items": 0.5}, on_epoch=lambda row: at.append(len(steps)))
    half = len(steps) // 2
    rates = np.array([[group[0] for group in step] for step in steps])
    assert (rates[:half, 1] == 0).all() and (rates[:, 0] > 0).all()
    np.testing.assert_allclose(rates[half:, 1], 2 * rates[half:, 0])  # on with the schedule where it stands
    assert [group[1] for group in (step[1] for step in steps)] == [n >= half for n in range(len(steps))]
    assert not any(step[1][2] for step in steps[: half + 1]) and all(step[1][2] for step in steps[half + 1 :])
    assert run.card.settings["stages"] == {"items": 0.5} and at[1] == half
    kept = staged(split, stages={"items": 0.5}, on_epoch=lambda row: row["epoch"] == 1).model
    assert torch.equal(kept.items.weight, start) and not torch.equal(kept.users.weight, bpr(split).users.weight)
    assert not torch.equal(run.model.items.weight, start) or run.best_epoch < 2
    assert all(p.requires_grad for p in run.model.parameters())


def test_without_the_backward_of_what_waits_the_steps_are_the_same(split, monkeypatch):
    loop = sys.modules[fit.__module__]
    spared, kept = staged(split, stages={"items": 0.5}), loop.without_gradients
    monkeypatch.setattr(loop, "without_gradients", lambda parameters: kept(()))
    dropped = staged(split, stages={"items": 0.5})
    assert dropped.card.model["weights"] == spared.card.model["weights"]
    assert staged(split).card.model["weights"] != spared.card.model["weights"]


def test_a_staged_run_goes_on_to_the_same_end(split, tmp_path):
    """Cut off while the group still waits, and again when it has trained for an epoch."""
    whole = staged(split, stages={"items": 0.5})

    def cut_after(epoch):
        def look(row):
            if row["epoch"] == epoch + 1:
                raise Cut

        return look

    for epoch in (0, 2):
        with pytest.raises(Cut):
            staged(split, stages={"items": 0.5}, folder=tmp_path, on_epoch=cut_after(epoch))
    with pytest.raises(DataError, match="other stages"):
        staged(split, folder=tmp_path)
    again = staged(split, stages={"items": 0.5}, folder=tmp_path)
    assert again.card.model["weights"] == whole.card.model["weights"]
    assert again.history.drop(columns="seconds").equals(whole.history.drop(columns="seconds"))


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ({"lora": 0.5}, r"no parameter group 'lora'; its groups are \['users', 'items'\]"),
        ({"items": 1.0}, r"stages\['items'\]=1.0: a share"),
        ({"items": -0.1}, "a share of the epochs"),
        ({"items": "half"}, "a share of the epochs"),
        ({"items": 0.5, "users": 0.1}, "nothing would train at first"),
    ],
)
def test_stages_that_cannot_be(split, stages, says):
    with pytest.raises(DataError, match=says):
        staged(split, stages=stages)
    with pytest.raises(DataError, match="EASE has no parameter group"):
        fit(EASE(split.train), split, stages={"all": 0.5})
