"""tune(): the published setting first, a better one found, a budget kept, and a search that survives SIGKILL."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmllmrec as mm
from mmllmrec.data.interactions import DataError
from mmllmrec.models import BPR, EASE
from mmllmrec.runcard import RunCard
from tests.planted import groups

HERE = Path(__file__).parent
FIT = {"epochs": 4, "batch_size": 256, "lr": 1e-4}


@pytest.fixture(scope="module")
def split():
    return groups()


def build(split, dim=8, reg=0.0):
    return BPR(split.train, dim=dim, reg=reg)


def quick(split, **options):
    asked = {"space": {"fit.lr": (1e-4, 0.3, "log")}, "settings": FIT, "trials": 4, "progress": False} | options
    return mm.tune(asked.pop("build", build), split, **asked)


def test_the_published_setting_goes_first_and_a_better_one_is_found(split, tmp_path):
    tuned = quick(split, space={"fit.lr": (1e-4, 0.3, "log"), "dim": [4, 8]}, trials=6, folder=tmp_path)
    first = tuned.table.iloc[0]
    assert (first["fit.lr"], first["dim"]) == (1e-4, 8)
    assert len(tuned.table) == 6 and set(tuned.table["state"]) <= {"complete", "pruned"}
    assert tuned.score == tuned.table["score"].max() > first["score"] + 0.05
    assert split.test_opened == 0
    card = RunCard.load(tmp_path / "card.json")
    assert card.settings["table"] == tuned.table.to_dict("records")
    assert card.settings["trials run"] == 6 and card.metrics["ndcg@20"] == tuned.score
    assert tuned.settings == {**FIT, "lr": tuned.best["fit.lr"]} and tuned.options == {"dim": tuned.best["dim"]}
    mm.seed_everything(0)
    again = mm.fit(build(split, **tuned.options), split, **tuned.settings, progress=False)
    assert again.best_score == tuned.score  # the best trial can be made again from what is returned
    assert not list(tmp_path.glob("trial-*"))  # a finished trial leaves no weights


def test_the_best_trial_can_be_kept_and_is_the_fit_of_its_settings(split, tmp_path, monkeypatch):
    tuned = quick(split, folder=tmp_path, keep_best=True)
    assert [p.name for p in tmp_path.glob("trial-*")] == [tuned.kept.name]
    mm.seed_everything(0)
    model = build(split)
    epochs = []
    read = mm.fit(model, split, **tuned.settings, folder=tuned.kept, on_epoch=epochs.append, progress=False)
    assert not epochs and read.best_score == tuned.score  # read, not trained
    mm.seed_everything(0)
    again = mm.fit(build(split), split, **tuned.settings, progress=False)
    assert torch.equal(again.model.users.weight, model.users.weight)
    # one that time cut off goes on to where it would have ended
    cut = quick(split, settings={**FIT, "epochs": 60}, minutes=0.0001, folder=tmp_path / "cut", keep_best=True)
    assert cut.table["ended"].iloc[0] == "out of time" and len(cut.table) == 1
    models = [build(split), build(split)]
    for folder, model in zip((cut.kept, None), models, strict=True):
        mm.seed_everything(0)
        model.load_state_dict(build(split).state_dict())
        mm.fit(model, split, **cut.settings, folder=folder, on_epoch=epochs.append, progress=False)
    assert torch.equal(models[0].users.weight, models[1].users.weight) and 60 < len(epochs) < 120


def test_one_seed_one_search(split):
    a, b, c = quick(split), quick(split), quick(split, seed=1)
    assert a.table["fit.lr"].tolist() == b.table["fit.lr"].tolist() != c.table["fit.lr"].tolist()
    assert a.table["score"].tolist() == b.table["score"].tolist()


def test_hopeless_trials_end_early(split):
    tuned = quick(split, settings={**FIT, "epochs": 12, "lr": 0.1}, space={"fit.lr": [0.1, 1e-7, 0.08, 0.09]}, trials=8)
    pruned = tuned.table[tuned.table["state"] == "pruned"]
    assert len(pruned) and (pruned["epochs"] < 12).all() and (pruned["ended"] == "pruned").all()
    assert (tuned.table.loc[tuned.table["state"] == "complete", "epochs"] == 12).all()
    whole = quick(split, settings={**FIT, "lr": 0.1}, space={"fit.lr": [0.1, 1e-7]}, prune=False)
    assert set(whole.table["state"]) == {"complete"}


def test_minutes_bound_the_search(split):
    tuned = quick(split, settings={**FIT, "epochs": 500}, minutes=0.01, trials=50)
    assert len(tuned.table) < 50 and tuned.table["seconds"].sum() < 5
    assert tuned.table["ended"].iloc[-1] == "out of time" and tuned.score > 0
    assert tuned.card.settings["minutes"] == 0.01


def test_a_setting_that_diverges_is_a_failed_trial(split):
    class Explosive(BPR):
        def loss(self, batch):
            return {"bpr": super().loss(batch)["bpr"] * (float("inf") if self.config["dim"] == 4 else 1.0)}

    def make(split, dim=8):
        return Explosive(split.train, dim=dim, reg=0.0)

    tuned = quick(split, build=make, space={"dim": [4, 8]}, trials=5)
    lost = tuned.table[tuned.table["state"] == "fail"]
    assert len(lost) and lost["ended"].str.contains("bpr is not finite").all() and tuned.best == {"dim": 8}
    with pytest.raises(DataError, match="none of 1 trials could be trained: loss term bpr is not finite"):
        quick(split, build=make, space={"dim": [4]}, start={"dim": 4}, trials=2)  # there is one setting


def test_a_space_of_choices_is_tried_setting_by_setting(split):
    def make(split, reg=5.0, dropout=0.0):
        return EASE(split.train, reg=reg, dropout=dropout)

    space = {"reg": [5.0, 50.0, 500.0], "dropout": [0.0, 0.25]}
    tuned = mm.tune(make, split, space=space, trials=5, progress=False)
    tried = list(zip(tuned.table["reg"], tuned.table["dropout"], strict=True))
    assert tried[0] == (5.0, 0.0) and len(set(tried)) == len(tried) == 5
    assert len(mm.tune(make, split, space=space, trials=99, progress=False).table) == 6


def test_a_closed_form_is_tuned_too(split):
    tuned = mm.tune(lambda s, reg=1e-3: EASE(s.train, reg=reg), split, space={"reg": (1e-3, 1e3, "log")}, trials=3)
    assert len(tuned.table) == 3 and tuned.score >= tuned.table["score"][0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"space": {}}, "space is empty"),
        ({"space": {"fit.rate": (0.1, 1.0)}}, r"fit has no 'fit.rate' to tune; it has .*fit\.lr"),
        ({"space": {"fit.seed": (0, 5)}}, "fit has no 'fit.seed' to tune"),
        ({"space": {"width": [4]}}, r"build takes no 'width'; it takes \['dim', 'reg'\]"),
        ({"space": {"dim": []}}, "a list holds choices"),
        ({"space": {"dim": [object()]}}, "plain values"),
        ({"space": {"dim": (8, 4)}}, "low below high"),
        ({"space": {"dim": (0, 4, "log")}}, "begins above 0"),
        ({"space": {"dim": (1, 4, "linear")}}, "use \\[a, b, ...\\]"),
        ({"space": {"dim": (32, 64)}}, "published dim=8 lies outside"),
        ({"space": {"dim": [4, 8]}, "start": {"reg": 0.1}}, "'reg' is not in space"),
        ({"settings": {"speed": 3}}, "fit takes no 'speed' here"),
        ({"trials": 0}, "at least one trial"),
        ({"build": lambda split, dim: None, "space": {"dim": [4]}}, "pass start="),
    ],
)
def test_what_cannot_be_searched_is_said(split, options, says):
    with pytest.raises(DataError, match=says):
        quick(split, **options)


def test_a_folder_of_another_search_is_refused(split, tmp_path):
    quick(split, folder=tmp_path, trials=2)
    with pytest.raises(DataError, match="holds another search"):
        quick(split, folder=tmp_path, trials=2, seed=1)
    assert len(quick(split, folder=tmp_path, trials=3).table) == 3  # a larger budget goes on
    assert len(quick(split, folder=tmp_path, trials=2, seed=1, resume=False).table) == 2


@pytest.mark.slow
def test_killed_and_resumed_it_ends_the_same(tmp_path):
    def call(folder, kill):
        command = [sys.executable, str(HERE / "scripts" / "tuned.py"), str(tmp_path / folder), str(kill)]
        return subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, timeout=300)

    whole = call("whole", 0)
    assert whole.returncode == 0, whole.stderr
    journal = tmp_path / "cut" / "journal.jsonl"
    assert call("cut", 9).returncode == -signal.SIGKILL  # in the first trial
    with open(journal, "ab") as file:
        file.write(b'{"op_code": 4, "worker')  # as if it had died while it wrote
    assert call("cut", 25).returncode == -signal.SIGKILL  # in a later one
    again = call("cut", 0)
    assert again.returncode == 0, again.stderr
    assert again.stdout == whole.stdout
    assert all(json.loads(line) for line in journal.read_text().splitlines())
    assert call("cut", 1).stdout == whole.stdout  # complete: it is read, nothing is trained


def test_a_list_of_starts_is_tried_in_order_before_anything_else(split):
    starts = [{"dim": d, "fit.lr": 1e-4} for d in (2, 8, 4)]
    tuned = quick(split, space={"dim": [2, 4, 8], "fit.lr": (1e-5, 1e-4)}, start=starts, trials=4)
    assert tuned.table["dim"].tolist()[:3] == [2, 8, 4] and len(tuned.table) == 4
    assert (tuned.table["state"][:3] == "complete").all()
    with pytest.raises(DataError, match="a list of settings of the same names"):
        quick(split, space={"dim": [2, 4, 8]}, start=[{"dim": 2}, {}])
