"""Feature tables: what fits see, what absent rows stay, and that another catalogue follows the same maps."""

import datasets
import numpy as np
import pytest
import scipy.linalg

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import DataError, IdMap
from mmllmrec.features.table import FeatureTable

N = 29


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(N, 7)) @ rng.normal(size=(7, 7)) + 5
    text = rng.normal(size=(N, 41)) * 3 - 1  # more columns than items
    presence = rng.random((N, 2)) < 0.8
    return FeatureTable({"image": image, "text": text}, presence)


@pytest.fixture
def fit_on():
    return np.arange(N) % 3 > 0


def test_standardise_is_per_column_over_present_train_rows(table, fit_on):
    done = table.standardise(fit_on)
    for column, m in enumerate(table.modalities):
        here = table.presence[:, column]
        rows = table.tables[m][here & fit_on]
        expected = (table.tables[m] - rows.mean(0)) / rows.std(0)
        np.testing.assert_allclose(done.tables[m][here], expected[here], atol=1e-4)
        assert (done.tables[m][~here] == 0).all() and (~here).any()


@pytest.mark.parametrize("dim", [4, 100])
def test_whitened_rows_have_unit_covariance(table, fit_on, dim):
    done = table.whiten(fit_on, dim)
    for column, m in enumerate(table.modalities):
        here = table.presence[:, column]
        rows = done.tables[m][here & fit_on]
        # n rows less their mean have rank n - 1 at most
        assert rows.shape[1] == min(dim, table.widths[m], len(rows) - 1)
        np.testing.assert_allclose(rows.mean(0), 0, atol=1e-4)
        np.testing.assert_allclose(rows.T @ rows / len(rows), np.eye(rows.shape[1]), atol=1e-3)
        assert (done.tables[m][~here] == 0).all()


def test_whitening_keeps_the_directions_of_most_variance(table, fit_on):
    rows = table.tables["image"][table.presence[:, 0] & fit_on].astype(float)
    u, _, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    ours = table.whiten(fit_on, 3).tables["image"][table.presence[:, 0] & fit_on]
    expected = u[:, :3] * np.sqrt(len(rows))
    np.testing.assert_allclose(np.abs(ours), np.abs(expected), atol=1e-3)


def test_whitening_outlives_a_solver_that_gives_up(table, fit_on, monkeypatch):
    before, real = table.whiten(fit_on, 3).tables["image"], scipy.linalg.eigh

    def gives_up(matrix, **options):
        if options:
            raise scipy.linalg.LinAlgError("Internal Error.")
        return real(matrix)

    monkeypatch.setattr(scipy.linalg, "eigh", gives_up)
    np.testing.assert_allclose(table.whiten(fit_on, 3).tables["image"], before, atol=1e-5)


@pytest.mark.parametrize("method", ["standardise", "whiten"])
def test_fits_do_not_look_at_held_out_or_absent_rows(table, fit_on, method):
    fit = (lambda t: t.standardise(fit_on)) if method == "standardise" else (lambda t: t.whiten(fit_on, 3))
    spoiled = {m: t.copy() for m, t in table.tables.items()}
    for column, m in enumerate(table.modalities):
        spoiled[m][~fit_on] = 77.0
        spoiled[m][~table.presence[:, column]] = np.nan
    done, other = fit(table), fit(FeatureTable(spoiled, table.presence))
    for m in table.modalities:
        np.testing.assert_array_equal(done.tables[m][fit_on], other.tables[m][fit_on])


def test_like_repeats_the_maps_without_fitting(table, fit_on):
    done = table.standardise(fit_on).whiten(fit_on, 3)
    rng = np.random.default_rng(1)
    other = FeatureTable({m: t[rng.permutation(N)] for m, t in table.tables.items()}, np.ones((N, 2), bool))
    again = table.like(done)
    for m in table.modalities:
        np.testing.assert_allclose(again.tables[m], done.tables[m], atol=1e-4)
    alone = other.like(done).tables["image"]
    half = FeatureTable(
        {m: np.concatenate([t[:5], t[:5] * 9]) for m, t in other.tables.items()}, np.ones((10, 2), bool)
    )
    np.testing.assert_allclose(half.like(done).tables["image"][:5], alone[:5], atol=1e-5)


def test_a_constant_column_becomes_zero(fit_on):
    flat = FeatureTable({"image": np.full((N, 2), 3.7)}, np.ones((N, 1), bool))
    assert (flat.standardise(fit_on).tables["image"] == 0).all()
    assert np.abs(flat.whiten(fit_on, 2).tables["image"]).max() < 1e-6


def test_arrays_round_trip(table, fit_on):
    done = table.whiten(fit_on, 3)
    back = FeatureTable.from_arrays(done.arrays(), modalities=done.modalities)
    np.testing.assert_array_equal(back.concatenated(), done.concatenated())
    np.testing.assert_array_equal(table.like(back).concatenated(), table.like(done).concatenated())


def test_from_catalog_reads_shipped_features_and_their_presence():
    ids = IdMap(range(5), what="item id")
    image, absent = np.arange(10.0).reshape(5, 2), np.array([0, 1, 0, 0, 0], bool)
    rows = datasets.Dataset.from_dict({"item_id": ids.ids})
    table = FeatureTable.from_catalog(Catalog(rows, ids, features={"image": image}, absent={"image": absent}))
    assert table.modalities == ("image",) and table.presence[:, 0].tolist() == [True, False, True, True, True]
    np.testing.assert_array_equal(table.tables["image"], np.where(absent[:, None], 0, image))
    with pytest.raises(DataError, match="no modality"):
        FeatureTable.from_catalog(Catalog(rows, ids))


def test_bad_input_is_named(table):
    broken = table.tables["image"].copy()
    row = int(np.flatnonzero(table.presence[:, 0])[2])
    broken[row, 0] = np.inf
    with pytest.raises(DataError, match=f"'image', row {row}"):
        FeatureTable({"image": broken}, table.presence[:, :1])
    with pytest.raises(DataError, match="shape"):
        FeatureTable({"image": broken[:-1]}, table.presence[:, :1])
    with pytest.raises(DataError, match="nothing to fit"):
        table.whiten(np.zeros(N, bool), 2)
    with pytest.raises(DataError, match="mask of the train items"):
        table.whiten(np.arange(N), 2)
    with pytest.raises(DataError, match="columns"):
        FeatureTable({"image": np.ones((N, 3)), "text": table.tables["text"]}, table.presence).like(
            table.whiten(np.ones(N, bool), 2)
        )


def test_save_and_load_and_a_file_that_is_another_tables(table, fit_on, tmp_path):
    done = table.whiten(fit_on, 3)
    found = FeatureTable.load(done.save(tmp_path / "a"))
    assert found.hash == done.hash and found.modalities == done.modalities
    np.testing.assert_array_equal(table.like(found).tables["text"], table.like(done).tables["text"])
    table.save(tmp_path / "b")
    (tmp_path / "a" / "features.json").write_bytes((tmp_path / "b" / "features.json").read_bytes())
    with pytest.raises(DataError, match="is not the file"):
        FeatureTable.load(tmp_path / "a")
    with pytest.raises(DataError, match="holds no feature table"):
        FeatureTable.load(tmp_path / "c")


def test_inter_files_come_back_with_what_is_absent(table, tmp_path):
    from mmllmrec.data.sources import inter_files

    paths = table.as_inter_files(tmp_path)
    assert {p.name for p in paths.values()} == {"image_feat.npy", "text_feat.npy"}
    (tmp_path / "events.inter").write_text("userID\titemID\tx_label\n0\t0\t0\n1\t2\t1\n")
    catalog = inter_files.read(tmp_path).catalog
    for column, m in enumerate(table.modalities):
        raw = np.load(paths[m])  # as any other toolkit reads it
        assert raw.dtype == np.float32 and raw.shape == table.tables[m].shape
        np.testing.assert_array_equal(raw, table.tables[m])
        assert (catalog.present(f"{m}_feat") == table.presence[:, column]).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "events.inter",
        "image_feat.npy",
        "presence.json",
        "text_feat.npy",
    ]
    (tmp_path / "presence.json").write_text('{"absent": {"image_feat": [999]}}')
    with pytest.raises(DataError, match=r"presence\.json"):
        inter_files.read(tmp_path)
    with pytest.raises(DataError, match="smell"):
        table.as_inter_files(tmp_path, modalities=["image", "smell"])
    assert list(table.as_inter_files(tmp_path / "one", modalities=["text"])) == ["text"]
