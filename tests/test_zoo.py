"""The literature's systems: what each one's own idea does, where a wrong sign or a lost mask would show."""

import numpy as np
import pytest
import torch

import mmllmrec as mm
from mmllmrec import models
from mmllmrec.data.interactions import DataError
from mmllmrec.data.sampling import epoch
from mmllmrec.seed import seed_everything


@pytest.fixture(scope="module")
def shop():
    data = mm.load_dataset("atelier", scale=0.06)
    return mm.splits.cold_items(data, fraction=0.2, seed=0)


def test_dvbpr_learns_from_pixels_and_a_missing_picture_is_a_zero_vector(shop):
    seed_everything(0)
    model = models.DVBPR(shop.train, catalog=shop.catalog, dim=8, size=32, width=8)
    start = [p.clone() for p in model.look.parameters()]
    batch = next(epoch(shop.train, batch_size=64, negatives=1, rng=np.random.default_rng(0)))
    terms = model.loss(batch)
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.look.parameters())
    assert len(start) == 16
    seen = torch.from_numpy(shop.catalog.present("image"))
    items = model.embed()[1]
    assert (items[~seen] == 0).all() and (items[seen].abs().sum(1) > 0).all() and (~seen).any()
    blind = model.with_catalog(shop.catalog.without("image"))
    assert (blind.embed()[1] == 0).all() and torch.equal(model.embed()[1], items)
    with pytest.raises(DataError, match="image"):
        models.DVBPR(shop.train, catalog=_no_pictures(shop))


def _no_pictures(shop):
    catalog = shop.catalog
    return type(catalog)(catalog.dataset.remove_columns("image"), catalog.item_ids)
