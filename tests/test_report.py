"""evaluate() and its Report: seal, rows, intervals, tests, files."""

from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from mmllmrec.bench.run import Named
from mmllmrec.data import splits
from mmllmrec.data.atelier import atelier
from mmllmrec.data.interactions import DataError
from mmllmrec.evaluation.curves import k_shot, missing_content
from mmllmrec.evaluation.floors import ContentKNN, Popularity
from mmllmrec.evaluation.ranking import rank
from mmllmrec.evaluation.report import evaluate
from mmllmrec.evaluation.significance import holm, paired_bootstrap
from mmllmrec.models import EASE
from mmllmrec.runcard import RunCard
from mmllmrec.training.fit import fit
from tests.planted import Table


@pytest.fixture(scope="module")
def split():
    return splits.cold_items(atelier(n_items=211, n_users=101, n_events=3000, modalities=()), seed=0)


@pytest.fixture(scope="module")
def report(split):
    return evaluate(fit(EASE(split.train, reg=50.0), split), split)


def test_valid_leaves_test_sealed_and_test_is_counted(split, report):
    assert (split.test_opened, report.card.test_opened) == (0, 0)
    other = splits.cold_items(split.data, seed=1)
    assert [evaluate(EASE(other.train), other, on="test").card.test_opened for _ in range(2)] == [1, 2]


def test_rows_and_floors_are_always_there(report):
    assert report.names == ["EASE", "Random", "Popularity", "Oracle"]
    assert report.rows == ["all", "warm", "cold", "cold only"]
    table = report.table()
    assert table.loc["Oracle", "all, of oracle"] == "100%" and table.loc["EASE", "loss"] == "-"
    assert report.mean("EASE", "warm") > 2 * report.mean("Random", "warm")
    assert report.mean("EASE", "harmonic mean") <= 2 * report.mean("EASE", "cold")


def test_cold_alone_is_easier_than_cold_among_all(report):
    assert report.mean("Oracle", "cold only") > report.mean("Oracle", "cold")


def test_saved_values_are_the_users(report, tmp_path):
    path = report.save(tmp_path / "report")
    assert RunCard.load(path).metrics["EASE | all | ndcg@20"][0] == report.mean("EASE")
    values = load_file(tmp_path / "report" / "users.safetensors")
    np.testing.assert_array_equal(values["EASE/warm/recall@10"], report.per_user("EASE", "warm", "recall@10"))
    assert "Popularity" in (tmp_path / "report" / "table.txt").read_text() and str(path) in str(report)


def test_plot_has_a_panel_a_row(report):
    assert [a.get_title() for a in report.plot().axes] == report.rows


def test_what_the_lists_are_like_is_told(report):
    table = report.beyond(20)
    assert list(table.columns) == ["coverage", "gini", "novelty", "diversity"]
    assert table.loc["Popularity", "gini"] > table.loc["Random", "gini"]
    assert table.loc["Popularity", "coverage"] < 0.5 < table.loc["Random", "coverage"]
    assert table.loc["Popularity", "novelty"] < table.loc["Random", "novelty"]
    assert report.card.metrics["EASE | all | coverage@20"] == [table.loc["EASE", "coverage"]]


def test_rows_hold_their_own_positives_among_one_ranking(split, report):
    """Rows that share candidates share a ranking; each must equal a ranking of its own."""
    warm = split.warm_items
    part = {"warm": warm, "cold": ~warm}
    for row, mask in part.items():
        alone = rank(EASE(split.train, reg=50.0), split.valid.select(mask[split.valid.items]), seen=split.train.csr)
        np.testing.assert_array_equal(alone.per_user("ndcg@20"), report.per_user("EASE", row))


def test_controls_are_rows_of_the_same_model_reading_something_else():
    split = splits.cold_items(atelier(n_items=211, n_users=211, n_events=6000, missing=0.0), seed=0)
    floor = ContentKNN(split.train, catalog=split.catalog)
    floor.name = "knn"
    report = evaluate(floor, split, controls=["without text", "shuffled image", "random sensor"], floors=False)
    assert report.names[:4] == ["knn", "knn, without text", "knn, shuffled image", "knn, random sensor"]
    assert report.mean("knn, without text", "cold only") < report.mean("knn", "cold only")
    # it is a control by what was done to it, not by what it is called, and bears the name of its row
    named = Named("Content, nearest", SimpleNamespace(model=floor, card=RunCard("fit", "knn")))
    report = evaluate(named, split, controls=["without text"], floors=False)
    assert report.names[:2] == ["Content, nearest", "Content, nearest, without text"]
    shown = report._repr_html_()
    assert shown.count("color:#888") == 2  # the control and the oracle
    assert len(evaluate(floor, split, controls=True, floors=False).names) == 1 + 4 * 4 + 1  # and the oracle
    with pytest.raises(DataError, match=r"control 'loud audio': write one of .*'without image'"):
        evaluate(floor, split, controls=["loud audio"])
    with pytest.raises(DataError, match="EASE reads no content"):
        evaluate(EASE(split.train), split, controls=True)


def test_k_shot_holds_everything_fixed_but_the_history():
    split = splits.cold_users(atelier(n_items=211, n_users=211, n_events=6000, modalities=()), seed=0)
    seen = []

    class Watch(EASE):
        def with_history(self, history):
            seen.append(history)
            return super().with_history(history)

    curve = k_shot([Watch(split.train, reg=50.0), Popularity(split.train)], split, ks=(0, 1, 4))
    extra = [len(h) - len(split.train) for h in seen]
    users = np.flatnonzero(split.cold_users & (split.valid.user_counts > 4))
    assert extra == [len(users), 4 * len(users)]
    assert set(seen[0].users[-len(users) :]) == set(users)
    means = curve.frame.set_index(["system", "k"])["mean"]
    assert means["Watch", 0] < means["Watch", 4] and means["Popularity", 0] == means["Popularity", 4]
    assert curve.frame["users"].nunique() == 1
    revealed = seen[1].csr - split.train.csr
    hidden = split.valid.csr - split.valid.csr.multiply(revealed)
    assert hidden[users].sum() == split.valid.user_counts[users].sum() - 4 * len(users)
    knows = Table(split.valid.csr.toarray())
    assert k_shot([knows], split, ks=(4,)).frame["mean"][0] == pytest.approx(1)  # what is revealed is no target
    with pytest.raises(DataError, match="no cold item of cold_users has more than 4 events in valid"):
        k_shot([Popularity(split.train)], split, of="items", ks=(0, 4))


def test_masks_are_those_of_the_protocol():
    """A scorer that puts validation positives first: masked at test, but under the MMRec family's protocol."""
    split = splits.random_per_user(atelier(n_items=211, n_users=101, n_events=3000, modalities=()), seed=0)
    knows = Table(split.valid.csr.toarray() + 2 * split.train.csr.toarray() + split._test.csr.toarray() / 2)
    options = {"on": "test", "floors": False}
    best, worse = (evaluate(knows, split, mask=m, **options).mean("Table") for m in ("train+valid", "train"))
    assert best == pytest.approx(1) and worse < 0.8
    first = evaluate(knows, split, floors=False)
    assert first.mean("Table") == pytest.approx(1)  # train masked, validation to be found


def test_k_shot_of_items_reveals_the_same_number_of_each(tmp_path):
    split = splits.cold_items(atelier(n_items=211, n_users=211, n_events=6000, modalities=()), seed=0)
    curve = k_shot([split.data.oracle(), Popularity(split.train)], split, of="items", ks=(0, 2), on="test")
    assert split.test_opened == 1 and curve.card.test_opened == 1
    means = curve.frame.set_index(["system", "k"])["mean"]
    assert means["Oracle", 0] > 2 * means["Popularity", 0]
    assert "known of a cold item, test of cold_items" in str(curve)
    assert curve.plot().axes[0].get_xlabel().endswith("cold item")
    assert RunCard.load(curve.save(tmp_path / "curve")).settings["of"] == "items"


def test_two_of_a_name_are_refused(split):
    with pytest.raises(DataError, match="two systems are called 'Popularity'"):
        evaluate(Popularity(split.train), split)
    with pytest.raises(DataError, match="neither a fitted run nor a scorer"):
        evaluate("EASE", split)


def test_paired_bootstrap_is_calibrated_and_finds_a_difference():
    rng = np.random.default_rng(0)
    null = [paired_bootstrap(x := rng.normal(size=83), x + rng.normal(size=83), resamples=400)[2] for _ in range(300)]
    assert 0.02 < np.mean(np.array(null) < 0.05) < 0.10
    a = rng.normal(size=211)
    low, high, p = paired_bootstrap(a + 0.3 + 0.1 * rng.normal(size=211), a)
    assert 0.25 < low < 0.3 < high < 0.35 and p < 0.002
    with pytest.raises(ValueError, match="same ones"):
        paired_bootstrap(a, a[:3])


def test_holm_by_hand():
    np.testing.assert_allclose(holm(np.array([0.04, 0.001, 0.02])), [0.04, 0.003, 0.04])


def test_content_goes_missing_for_all_alike_and_is_not_missed_by_who_reads_none(tmp_path):
    split = splits.cold_items(atelier(n_items=211, n_users=211, n_events=6000, size=8, missing=0.0), seed=0)
    floor = ContentKNN(split.train, catalog=split.catalog)
    curve = missing_content([floor, Popularity(split.train)], split, shares=(0, 0.5, 1.0), row="cold only", on="test")
    means = curve.frame.set_index(["system", "missing"])["mean"]
    whole = evaluate(floor, split, on="test", floors=False)
    assert means["ContentKNN", 0] == pytest.approx(whole.mean("ContentKNN", "cold only"))
    less = evaluate(floor.with_catalog(split.catalog.thinned(0.5, seed=0)), split, on="test", floors=False)
    assert means["ContentKNN", 0.5] == pytest.approx(less.mean("ContentKNN", "cold only"))
    assert (
        means["ContentKNN", 1.0] < means["ContentKNN", 0.5] < means["ContentKNN", 0]
        and means["Popularity"].nunique() == 1
    )
    assert curve.frame.groupby("system")["adapts"].first().to_dict() == {"ContentKNN": True, "Popularity": False}
    assert curve.plot().axes[0].get_xlabel() == "share of items that lose a modality"
    assert RunCard.load(curve.save(tmp_path / "curve")).settings["row"] == "cold only"
    for wrong, message in (
        ({"of": "words"}, "of='words'"),
        ({"shares": (2,)}, "shares="),
        ({"row": "cool"}, "row='cool'"),
    ):
        with pytest.raises(DataError, match=message):
            missing_content([floor], split, **wrong)


def test_rows_of_cold_items_are_of_users_that_training_knows():
    split = splits.cold_both(atelier(n_items=211, n_users=211, n_events=6000, modalities=()), users=0.3, seed=0)
    oracle, warm, known = Table(split.data.utilities(np.arange(211))), split.warm_items, ~split.cold_users
    report = evaluate(oracle, split, on="test", floors=False)
    test = split._test
    for row, chosen in (
        ("warm", warm[test.items] & known[test.users]),
        ("cold", ~warm[test.items] & known[test.users]),
        ("cold users", ~known[test.users]),
        ("all", np.ones(len(test), dtype=bool)),
    ):
        assert set(report.users[row]) == set(test.users[chosen])
        alone = rank(oracle, test.select(chosen), seen=split.train.csr + split.valid.csr)
        np.testing.assert_array_equal(alone.per_user("ndcg@20"), report.per_user("Table", row))
    # and a curve has one thing new at a time
    seen = []

    class Watch(EASE):
        def with_history(self, history):
            seen.append(history)
            return super().with_history(history)

    for of in ("users", "items"):
        k_shot([Watch(split.train, reg=50.0)], split, of=of, ks=(0, 2), on="test")
    for history, of in zip(seen, ("users", "items"), strict=True):
        new = (history.csr - split.train.csr).tocoo()
        cold_user, cold_item = ~known[new.coords[0]], ~warm[new.coords[1]]
        assert (cold_user == (of == "users")).all() and (cold_item == (of == "items")).all() and len(new.data)
