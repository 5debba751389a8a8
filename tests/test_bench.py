"""Benches: seeds, resuming, the summary's arithmetic, the peer's column."""

import json

import numpy as np
import pytest

from mmllmrec import bench
from mmllmrec.data.atelier import atelier
from mmllmrec.data.interactions import DataError
from mmllmrec.evaluation.speed import speed
from mmllmrec.runcard import RunCard
from mmllmrec.training import fit as training


@pytest.fixture(scope="module")
def world():
    return atelier(n_items=83, n_users=61, n_events=900, size=8)


def test_quickstart_over_two_seeds_then_nothing_is_run_again(world, tmp_path, monkeypatch):
    folder = tmp_path / "runs"
    asked = {"folder": folder, "data": world, "systems": ("LightGCN", "BPR"), "quick": 2}
    first = bench.quickstart(seeds=1, **asked)
    assert (first.frame["seeds"] == 1).all() and first.frame["std"].isna().all()
    fitted = []
    real = training.fit
    monkeypatch.setattr(training, "fit", lambda model, *a, **k: fitted.append(k["seed"]) or real(model, *a, **k))
    second = bench.quickstart(seeds=2, **asked)
    assert fitted == [1, 1]  # seed 0 was read, not run
    monkeypatch.setattr(training, "fit", None)
    again = bench.quickstart(seeds=2, **asked)
    assert again.frame.equals(second.frame)

    cards = [RunCard.load(folder / f"seed{s}" / "report" / "card.json") for s in (0, 1)]
    assert [c.test_opened for c in cards] == [1, 1]
    assert cards[0].split["hash"] != cards[1].split["hash"]
    key = "BPR | cold | ndcg@20"
    values = np.array([c.metrics[key][0] for c in cards])
    ceiling = np.array([c.metrics["Oracle | cold | ndcg@20"][0] for c in cards])
    row = second.frame.set_index(["system", "row", "metric"]).loc[("BPR", "cold", "ndcg@20")]
    assert row["mean"] == pytest.approx(values.mean()) and row["std"] == pytest.approx(values.std(ddof=1))
    assert row["of oracle"] == pytest.approx((values / ceiling).mean())
    assert json.loads(second.path.read_text())["metrics"][key] == [pytest.approx(values.mean()), row["std"]]
    assert {"Random", "Popularity", "LightGCN", "BPR", "Oracle"} <= set(second.table().index)
    assert str(second.path) in (folder / "table.txt").read_text()
    with pytest.raises(DataError, match="other settings or data"):
        bench.quickstart(seeds=1, **(asked | {"quick": 3}))


def test_a_seed_cut_off_between_two_models_keeps_what_was_fitted(world, tmp_path, monkeypatch):
    asked = {"seeds": 1, "folder": tmp_path, "data": world, "systems": ("LightGCN", "BPR"), "quick": 2}
    real, steps = training.fit, []

    def cut_off(model, *args, **keywords):
        if model.name == "BPR":
            raise KeyboardInterrupt
        return real(model, *args, **keywords)

    monkeypatch.setattr(training, "fit", cut_off)
    with pytest.raises(KeyboardInterrupt):
        bench.quickstart(**asked)
    monkeypatch.setattr(training, "fit", real)
    from mmllmrec.models import LightGCN

    loss = LightGCN.loss
    monkeypatch.setattr(LightGCN, "loss", lambda self, batch: steps.append(1) or loss(self, batch))
    resumed = bench.quickstart(**asked)
    assert not steps  # LightGCN's two epochs were in its checkpoint
    fresh = bench.quickstart(**(asked | {"folder": tmp_path / "fresh"}))
    assert steps and fresh.frame.equals(resumed.frame)


def test_the_peer_stands_beside_the_mean_of_its_same_settings(tmp_path):
    peer = tmp_path / "peer.csv"
    peer.write_text(
        "system,seed,hyper_parameters,test_recall@20,test_ndcg@20\n"
        'BPR,1,"{""reg_weight"": 0.01}",0.9,0.9\n'
        'BPR,1,"{""reg_weight"": 0.1}",0.4,0.2\n'
        'BPR,2,"{""reg_weight"": 0.1}",0.6,0.4\n'
        'LightGCN,1,"{""n_layers"": 2, ""reg_weight"": 0.0001}",0.5,0.5\n'
        'VBPR,1,"{""reg_weight"": 0.1}",0.5,0.5\n'
    )
    metrics = {f"{s} | all | {m}": [0.55, 0.5, 0.6] for s in ("BPR", "LightGCN", "VBPR") for m in bench.METRICS}
    cards = [RunCard("evaluate", "x", seed=s, metrics=metrics) for s in (0, 1)]
    table = bench.beside(bench.summarise("parity", cards, tmp_path), peer).set_index(["system", "metric"])
    assert table.loc[("BPR", "recall@20"), "peer"] == pytest.approx(0.5)
    assert table.loc[("BPR", "recall@20"), "difference"] == pytest.approx(0.1)
    assert table.loc[("BPR", "recall@20"), "peer seeds"] == 2


def test_parity_runs_on_a_folder_of_that_layout(tmp_path):
    rng = np.random.default_rng(0)
    users, items = np.nonzero(rng.random((17, 13)) < 0.5)
    labels = np.arange(len(users)) % 5
    part = np.where(labels == 3, 1, np.where(labels == 4, 2, 0))
    rows = "".join(f"{u}\t{i}\t1\t{p}\n" for u, i, p in zip(users, items, part, strict=True))
    (tmp_path / "x.inter").write_text("userID\titemID\trating\tx_label\n" + rows)
    np.save(tmp_path / "vggish.npy", rng.normal(size=(13, 5)).astype(np.float32))
    with pytest.raises(DataError, match=r"all-MiniLM-L6-v2\.npy is missing"):
        bench.parity(seeds=1, folder=tmp_path / "runs", path=tmp_path, quick=1)
    np.save(tmp_path / "all-MiniLM-L6-v2.npy", rng.normal(size=(13, 3)).astype(np.float32))
    summary, _ = bench.parity(seeds=1, folder=tmp_path / "runs", path=tmp_path, quick=1)
    from mmllmrec.bench.parity import SYSTEMS

    assert set(SYSTEMS) <= set(summary.frame["system"])
    with pytest.raises(DataError, match=r"systems=.*SVD.* have no published figures"):
        bench.parity(systems=["SVD"])
    card = RunCard.load(tmp_path / "runs" / "seed0" / "report" / "card.json")
    assert card.settings["mask"] == "train"


def test_eval_speed_counts_against_its_floor():
    table = speed(users=53, items=71, events=211, dim=5, k=7, repeats=1).set_index("what")
    assert table.loc["matrix product and top-k", "over the floor"] == 1.0
    assert (table["seconds"] > 0).all() and (table["users per second"] > 0).all()


def test_unknown_model_and_no_seed(world):
    from mmllmrec.data import splits

    with pytest.raises(DataError, match=r"unknown model 'nothing'; models are \['ALDI'"):
        bench.model_of("nothing", splits.random_per_user(world))
    with pytest.raises(DataError, match="seeds=0"):
        bench.quickstart(seeds=0, data=world, systems=("BPR",))
