"""What `bench train` measures, and on what; `bench eval` and it leave a card."""

import numpy as np
import pandas as pd
import pytest
import torch

from mmllmrec.data.interactions import DataError
from mmllmrec.evaluation.speed import speed as evaluator_speed
from mmllmrec.runcard import RunCard, peak_memory_mb
from mmllmrec.training import speed as bench

SMALL = {"users": 307, "items": 211, "events": 1511, "widths": (37, 13)}


def test_planted_has_the_sizes_asked_for_and_says_the_taste_in_its_features():
    split = bench.planted(**SMALL)
    held = split.open_test()
    assert (len(split.train), len(split.valid), len(held)) == (1511, 307, 307)
    assert split.train.user_counts.min() >= 3 and set(split.valid.user_counts) == set(held.user_counts) == {1}
    # by chance a tenth of the items has a tenth of the events
    counts = np.sort(split.train.item_counts)[::-1]
    assert counts[:21].sum() > 0.25 * counts.sum()
    # a user's training items look more like that user's test item than like another's
    table = split.catalog.features["visual"]
    mean = np.asarray(split.train.csr @ table) / split.train.user_counts[:, None]
    rows = table[held.items[np.argsort(held.users)]]
    near = np.corrcoef(mean, rows)[:307, 307:]
    assert np.diag(near).mean() > near.mean() + 0.1
    assert bench.planted(**SMALL).hash == split.hash != bench.planted(**SMALL, seed=1).hash


def test_planted_refuses_what_cannot_be_dealt():
    with pytest.raises(DataError, match="events=100: 307 users need three each, 921"):
        bench.planted(users=307, items=211, events=100)
    with pytest.raises(DataError, match="items=5: the most active user takes"):
        bench.planted(users=307, items=5, events=1511)


def test_each_epoch_but_the_first_and_the_last_is_timed(monkeypatch):
    """A clock that the stand-in for fit moves: 100 to warm up, then 1, 2, 9, and 50 with the validation."""

    class Run:
        history = pd.DataFrame({"seconds": np.cumsum([100.0, 1, 2, 9, 50]), "bpr": [0.7, 0.6, 0.5, 0.4, 0.3]})

    asked = {}
    monkeypatch.setattr(bench, "fit", lambda model, split, **options: asked.update(options) or Run)
    found = bench.measure(system="BPR", size=SMALL, repeats=3)
    assert found["epochs"] == [1, 2, 9] and found[bench.EPOCH] == 2 and found[bench.SAMPLES] == round(1511 / 2)
    assert asked["epochs"] == asked["eval_every"] == 5


def test_each_system_is_measured_apart_and_the_card_holds_the_table(tmp_path):
    ballast = torch.ones(3 * 2**27)  # 1.5 GiB here must not show in the measured processes
    assert peak_memory_mb() > 1.5 * 2**10
    table = bench.speed(**SMALL, systems=["VBPR", "EASE"], repeats=1, threads=1, folder=tmp_path).set_index("system")
    del ballast
    assert table.loc["VBPR", bench.SAMPLES] == pytest.approx(1511 / table.loc["VBPR", bench.EPOCH], rel=0.2)
    assert table.loc["EASE"].isna().tolist() == [False, True, True, False]
    assert (table[bench.BUILD] > 0).all() and (table[bench.PEAK] < 1.5 * 2**10).all()
    card = RunCard.load(tmp_path / "card.json")
    assert card.settings["threads"] == card.metrics["EASE"]["threads"] == 1
    assert card.kind == "bench" and card.peak_memory_mb == table[bench.PEAK].max()
    assert {c: card.metrics["VBPR"][c] for c in table} == table.loc["VBPR"].to_dict()
    first, last = card.metrics["VBPR"]["losses"]
    assert last < first
    assert "VBPR" in (tmp_path / "table.txt").read_text()


def test_wrong_arguments_and_a_process_that_fails():
    with pytest.raises(DataError, match="unknown system 'SVD'; systems are"):
        bench.speed(systems=["SVD"])
    with pytest.raises(DataError, match="repeats=0"):
        bench.speed(repeats=0)
    with pytest.raises(DataError, match="threads=0"):
        bench.speed(threads=0)
    with pytest.raises(RuntimeError, match="BPR: its process ended with code 1"):
        bench.speed(users=307, items=211, events=100, systems=["BPR"])


def test_eval_leaves_a_card(tmp_path):
    table = evaluator_speed(users=53, items=71, events=211, dim=5, k=7, repeats=1, folder=tmp_path).set_index("what")
    card = RunCard.load(tmp_path / "card.json")
    assert card.kind == "bench" and card.settings["k"] == 7
    assert card.metrics == table.to_dict("index")
