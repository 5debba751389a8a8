"""ContentKNN and the descriptors it reads."""

import numpy as np
import torch

from mmllmrec.data import splits
from mmllmrec.data.atelier import atelier
from mmllmrec.data.descriptors import describe
from mmllmrec.evaluation.floors import ContentKNN
from mmllmrec.evaluation.ranking import rank


def world():
    return atelier(n_items=211, n_users=101, n_events=3000, missing=0.3)


def test_absent_rows_are_zero_and_fits_look_at_fit_on_alone():
    data = world()
    fit_on = np.arange(211) % 2 == 0
    tables = describe(data.catalog, fit_on=fit_on)
    assert set(tables) == {"image", "text", "audio", "sensor"}
    for name, (table, present) in tables.items():
        assert np.isfinite(table).all() and not table[~present].any() and table[present].any(1).all(), name
    shuffled = describe(data.catalog.shuffled("text", seed=0), fit_on=fit_on)
    assert {m: t.shape for m, (t, _) in shuffled.items()} == {m: t.shape for m, (t, _) in tables.items()}
    everything = describe(data.catalog)["text"][0]
    assert np.abs(everything - tables["text"][0]).max() > 0.01


def test_content_finds_cold_items_and_nothing_is_found_without_it():
    split = splits.cold_items(world(), fraction=0.3, seed=0)
    cold = split._test.select(~split.warm_items[split._test.items])
    options = {"seen": split.train.csr, "k": 20, "candidates": ~split.warm_items}
    floor = ContentKNN(split.train, catalog=split.catalog)
    chance = 20 / (~split.warm_items).sum()
    assert rank(floor, cold, **options).per_user("recall@20").mean() > 1.15 * chance
    blind = split.catalog
    for modality in ("image", "text", "audio", "sensor"):
        blind = blind.without(modality)
    assert not floor.with_catalog(blind).score(np.arange(5)).any()


def test_the_score_is_the_naive_one():
    split = splits.cold_items(world(), seed=0)
    floor = ContentKNN(split.train, catalog=split.catalog)
    user, item = 3, 17
    own = split.train.csr[user].indices
    values = []
    for view, present in floor.views:
        if present[item]:
            profile = view[own].sum(0)
            values.append(profile @ view[item] / max(np.linalg.norm(profile), 1e-12))
    expected = float(np.mean(values)) if values else 0.0
    torch.testing.assert_close(float(floor.score(np.array([user]))[0, item]), expected, atol=1e-5, rtol=1e-4)
