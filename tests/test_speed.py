"""What `bench train` measures, and on what; `bench eval` and it leave a card."""

import numpy as np
import pandas as pd
import pytest
import torch

from mmllmrec import models
from mmllmrec.data import splits
from mmllmrec.data.interactions import DataError
from mmllmrec.encoders.item_graph import weighted_sum
from mmllmrec.evaluation.speed import speed as evaluator_speed
from mmllmrec.runcard import RunCard, peak_memory_mb
from mmllmrec.training import floor, growth, throughput
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
        history = pd.DataFrame({"epoch": range(5), "bpr": [0.7, 0.6, 0.5, 0.4, 0.3]})

    asked, now = {}, [0.0]

    def fit(model, split, **options):
        asked.update(options)
        for seconds in (100.0, 1, 2, 9, 50):
            now[0] += seconds
            options["on_epoch"]({})
        return Run

    monkeypatch.setattr(bench, "fit", fit)
    monkeypatch.setattr(bench, "rates", lambda **asked: (1e9, 1e9))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    found = bench.measure(system="BPR", size=SMALL, repeats=3)
    assert found["epochs"] == [1, 2, 9] and found[bench.EPOCH] == 2 and found[bench.SAMPLES] == round(1511 / 2)
    assert asked["epochs"] == asked["eval_every"] == 5


def test_each_system_is_measured_apart_and_the_card_holds_the_table(tmp_path):
    ballast = torch.ones(3 * 2**27)  # 1.5 GiB here must not show in the measured processes
    assert peak_memory_mb() > 1.5 * 2**10
    table = bench.speed(**SMALL, systems=["VBPR", "EASE"], repeats=1, threads=1, folder=tmp_path).set_index("system")
    del ballast
    assert table.loc["VBPR", bench.SAMPLES] == pytest.approx(1511 / table.loc["VBPR", bench.EPOCH], rel=0.2)
    assert table.columns[table.loc["EASE"].isna()].tolist() == [bench.EPOCH, bench.FLOOR, bench.SAMPLES]
    assert (table[bench.BUILD] > 0).all() and (table[bench.PEAK] < 1.5 * 2**10).all()
    card = RunCard.load(tmp_path / "card.json")
    assert card.settings["threads"] == card.metrics["EASE"]["threads"] == 1
    assert card.kind == "bench" and card.peak_memory_mb == table[bench.PEAK].max()
    assert {c: card.metrics["VBPR"][c] for c in table} == table.loc["VBPR"].to_dict()
    first, last = card.metrics["VBPR"]["losses"]
    assert last < first
    assert "VBPR" in (tmp_path / "table.txt").read_text()


def test_the_floor_counts_products_and_adam_by_hand():
    """LightGCN: two sparse products a layer and step, forward and backward; BPR: none; both: Adam over all IDs."""
    split = bench.planted(**SMALL)
    steps, adam = 2, 28 * (307 + 211) * 64
    product = 2 * 1511 * (4 + 4 + 4 * 64) + (307 + 211) * 4 * 64
    for name, products in (("BPR", 0), ("LightGCN", 2 * 2)):
        model = models.classes()[name](split.train)
        found = floor.floor(model, split, batch_size=1024, flops=1e9, bandwidth=2e9)
        assert found == pytest.approx(steps * (adam + products * product) / 2e9), name
    x, y = torch.ones(3, 5, requires_grad=True), torch.ones(5, 7, requires_grad=True)
    with floor.Count() as count:
        (x @ y).sum().backward()
    assert count.flops == 3 * 2 * 3 * 5 * 7
    near, weights = torch.zeros(5, 2, dtype=torch.long), torch.ones(5, 2)
    with floor.Count() as count:  # the backward of a learned graph is a transposed CSR, sparse too
        weighted_sum(near, weights, torch.ones(5, 4, requires_grad=True)).sum().backward()
    assert count.flops == 0 and count.bytes == 2 * (10 * (8 + 4 + 4 * 4) + 5 * 4 * 4)
    flops, bandwidth = floor.rates(repeats=1)
    assert flops > 1e8 and bandwidth > 1e8


def test_seconds_to_the_best_are_epochs_at_an_epochs_seconds(monkeypatch):
    scores = [0.1, 0.5, 0.99, 0.8, 1.0, *[0.9] * bench.PATIENCE]

    class Run:
        history = pd.DataFrame({"ndcg@20": scores})

    monkeypatch.setattr(bench, "fit", lambda model, split, **options: Run)
    asked = bench._to_best(None, None, 2.0, 1.0)
    assert (asked[bench.BEST], asked[bench.TO_BEST], asked["cut"]) == (1.0, 6.0, None)
    Run.history = Run.history[:-1]
    assert bench._to_best(None, None, 2.0, 1.0)["cut"] == "cut"


def test_a_system_is_trained_to_its_best():
    found = bench.measure(system="BPR", size=SMALL, repeats=1, minutes=0.02)
    assert found[bench.TO_BEST] == pytest.approx(found["epochs to it"] * found[bench.EPOCH], abs=0.01)
    assert found[bench.BEST] > 0 and found["cut"] in (None, "cut")  # as fast as the machine is


def test_a_peer_stands_beside_ours_by_its_own_clock(tmp_path):
    peer = tmp_path / "peer.csv"
    rows = "BPR,,2T,2.0,4.0\nLightGCN,1,1C,3.0,5.0\nLightGCN,2,2T,9.0,9.0\n"
    peer.write_text("system,layers,clock,train_seconds_per_epoch,evaluation_pair_seconds\n" + rows)
    systems = ["BPR", "LightGCN, 1 layer", "ItemKNN"]
    table = bench.speed(**SMALL, systems=systems, repeats=1, peer=peer, folder=tmp_path / "card").set_index("system")
    card = RunCard.load(tmp_path / "card" / "card.json")
    assert [card.metrics[s]["threads"] for s in systems[:2]] == [2, 1]
    scale = table.loc[bench.ANCHOR, bench.BUILD] / bench.ANCHOR_PEER
    for system, (epoch, pair) in {"BPR": (2.0, 4.0), "LightGCN, 1 layer": (3.0, 5.0)}.items():
        assert table.loc[system, bench.FASTER] == pytest.approx(
            epoch * scale / table.loc[system, bench.EPOCH], rel=0.02
        )
        assert table.loc[system, bench.RANKS] == pytest.approx(pair * scale / table.loc[system, bench.PAIR], rel=0.02)
    assert table[bench.FASTER].isna()[["ItemKNN", bench.ANCHOR]].all()


def test_growth_is_measured_per_event_and_beside_the_smallest(tmp_path):
    data = growth.grown(events=10_000)
    parts = data.parts
    train = splits.given(data).train
    assert len(train) == 10_000 and train.user_counts.min() >= 3 and (parts == splits.VALID).sum() == 1250
    counts = np.sort(train.item_counts)[::-1]
    assert counts[: len(counts) // 10].sum() > 0.25 * counts.sum()
    table = growth.growth(events=(10_000, 20_000), systems=["BPR"], epochs=1, threads=1, folder=tmp_path)
    assert table[growth.FLAT].tolist()[0] == table[growth.FLAT_BYTES].tolist()[0] == 1
    rate = table[growth.EPOCH] / table["events"] * 1e6
    np.testing.assert_allclose(table[growth.PER_EVENT], rate, rtol=0.1)
    card = RunCard.load(tmp_path / "card.json")
    assert [m["batch"] for m in card.metrics.values()] == [173, 345] and "BPR" in (tmp_path / "table.txt").read_text()
    with pytest.raises(DataError, match="unknown system 'SVD'"):
        growth.growth(systems=["SVD"])
    with pytest.raises(DataError, match="sizes of 10,000 or more"):
        growth.growth(events=[10])


def test_every_system_is_timed(monkeypatch):
    for system in bench.SYSTEMS:
        found = bench.measure(system=system, size=SMALL, repeats=1)
        assert found[bench.PAIR] > 0 and (found[bench.EPOCH] is None or found[bench.EPOCH] > 0), system


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


@pytest.mark.parametrize("training", [False, True])
def test_flops_of_attention_are_counted_by_hand(training):
    """A transformer layer in evaluation mode too, whose fused form and whose attention the counter passes over."""
    b, length, d, heads, wide = 3, 7, 8, 2, 20
    layer = torch.nn.TransformerEncoderLayer(d, heads, wide, 0.0, batch_first=True).train(training)
    x = torch.randn(b, length, d)

    def forward():
        with torch.set_grad_enabled(training):
            return layer(x)

    projections = b * length * (4 * d * d + 2 * d * wide)
    attention = 2 * b * heads * length * length * (d // heads)
    assert throughput.flops(forward) == 2 * (projections + attention)
    if training:  # of the input's own projection there is no gradient for x
        both = throughput.flops(lambda: forward().sum().backward())
        assert both == 2 * 3 * (projections + attention) - 2 * b * length * 3 * d * d
    convolution = torch.nn.Conv2d(3, 5, 4, 4, bias=False)
    assert throughput.flops(lambda: convolution(torch.ones(2, 3, 8, 8))) == 2 * 2 * 4 * 5 * 3 * 16


WORLD = {"n_items": 83, "n_users": 61, "n_events": 701}


def test_the_backbone_is_measured_beside_its_floor(tmp_path):
    before = torch.get_num_threads()
    table = throughput.throughput(
        item_batch=23,
        world=WORLD,
        backbones=["nano, end to end", "nano, cached"],
        repeats=1,
        threads=2,
        folder=tmp_path,
    )
    assert torch.get_num_threads() == before
    rows = table.set_index(["backbone", "work"])
    np.testing.assert_allclose(rows[throughput.ITEMS], 23 / rows[throughput.SECONDS], rtol=0.05)
    floor = rows[throughput.FLOPS] * 23 / 1e3 / rows[throughput.RATE]
    np.testing.assert_allclose(rows[throughput.FLOOR], rows[throughput.SECONDS] / floor, rtol=0.05)
    count = rows[throughput.FLOPS]
    for name in ("nano, end to end", "nano, cached"):
        assert 2 * count[name, "encode"] < count[name, "train"] < 4 * count[name, "encode"] + 5
    assert count["nano, cached"].sum() < 0.7 * count["nano, end to end"].sum()
    # the patches' widths alone: 16 patches and a class token through 4 layers of 12 W^2, W = 96
    assert count["nano, end to end", "encode"] > 2 * 17 * 4 * 12 * 96**2 / 1e6
    card = RunCard.load(tmp_path / "card.json")
    assert card.kind == "bench" and card.settings["threads"] == 2 and len(card.metrics) == 4
    assert "nano, cached" in (tmp_path / "table.txt").read_text()


def test_a_backbone_that_cannot_be_measured():
    with pytest.raises(DataError, match="unknown backbone 'giant'; backbones are"):
        throughput.throughput(backbones=["giant"])
    with pytest.raises(DataError, match="threads=0"):
        throughput.throughput(threads=0)
    with pytest.raises(DataError, match="item_batch=99: two or more, and no more than the"):
        throughput.throughput(item_batch=99, world=WORLD)
