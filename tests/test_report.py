"""evaluate() and its Report: seal, rows, intervals, tests, files."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from mmllmrec.data import splits
from mmllmrec.data.atelier import atelier
from mmllmrec.data.interactions import DataError
from mmllmrec.evaluation.floors import Popularity
from mmllmrec.evaluation.report import evaluate
from mmllmrec.evaluation.significance import holm, paired_bootstrap
from mmllmrec.models import EASE
from mmllmrec.runcard import RunCard
from mmllmrec.training.fit import fit


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
