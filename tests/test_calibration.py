"""How much room new items get: the price is paid and no more, by the same rule for every system."""

import numpy as np
import pytest
import torch

from mmllmrec.bench.run import SOFTMAX
from mmllmrec.data import splits
from mmllmrec.data.atelier import atelier
from mmllmrec.data.interactions import DataError
from mmllmrec.evaluation.calibration import cold_room, known_score, lifted, priced
from mmllmrec.evaluation.protocols import rankings, validation_score
from mmllmrec.evaluation.ranking import Frozen
from mmllmrec.models import VBPR, LightGCN, Recommender
from mmllmrec.seed import seed_everything
from mmllmrec.training.fit import fit


@pytest.fixture(scope="module")
def split():
    return splits.cold_items(atelier(n_items=211, n_users=151, n_events=4000, size=8), seed=0)


@pytest.fixture(scope="module")
def scorer(split):
    """Embeddings that know the validation events, noisily, so that known and new items are both found at times."""
    rng = np.random.default_rng(0)
    users = np.eye(split.data.interactions.n_users, dtype=np.float32)
    items = split.valid.csr.toarray().T + rng.normal(scale=0.6, size=(211, len(users)))
    return Frozen("noisy", torch.from_numpy(users), torch.from_numpy(items.astype(np.float32)))


def known(split, scorer, offset):
    """``known_score`` as the row of a table has it."""
    new = torch.from_numpy(~split.warm_items)
    one = Frozen("lifted", *lifted(scorer.users, scorer.items, new, offset))
    found = rankings(one, split, split.valid, seen=split.train.csr, k=20, seed=0)
    return found["warm"].per_user("ndcg@20").mean()


@pytest.mark.parametrize("cost", [0.05, 0.3])
def test_the_price_is_paid_and_no_more(split, scorer, cost):
    offset = cold_room(scorer, split, cost=cost)
    least = (1 - cost) * known(split, scorer, -100.0)  # new items left out
    assert known(split, scorer, offset) >= least > known(split, scorer, offset + 0.02)
    assert known_score(scorer, split) == pytest.approx(known(split, scorer, 0.0))


def test_a_lower_floor_gives_more_room_and_a_higher_one_none(split, scorer):
    plain = cold_room(scorer, split, cost=0.1)
    floor = 0.8 * known(split, scorer, -100.0)
    room = cold_room(scorer, split, cost=0.1, floor=floor)
    assert room > plain and known(split, scorer, room) >= floor > known(split, scorer, room + 0.02)
    assert cold_room(scorer, split, cost=0.1, floor=0.99) == plain


def test_a_scorer_at_a_price_has_the_room_that_it_buys(split, scorer):
    cheap, dear = (priced(scorer, split, cost=cost) for cost in (0.05, 0.3))
    new = ~split.warm_items
    for at, cost in ((cheap, 0.05), (dear, 0.3)):
        more = (at.users[:5] @ at.items.T - scorer.users[:5] @ scorer.items.T).numpy()
        np.testing.assert_allclose(more[:, ~new], 0.0, atol=1e-5)
        np.testing.assert_allclose(more[:, new], cold_room(scorer, split, cost=cost), atol=1e-4)
    cold = [rankings(at, split, split.valid, seen=split.train.csr, k=20, seed=0)["cold"] for at in (cheap, dear)]
    less, more = (float(one.per_user("ndcg@20").mean()) for one in cold)
    assert less < more
    assert priced(scorer, splits.random_per_user(split.data, seed=0), cost=0.1) is None


def test_where_there_is_nothing_to_weigh(split, scorer):
    random = splits.random_per_user(split.data, seed=0)
    assert cold_room(scorer, random, cost=0.1) is None
    for cost in (0.0, 1.0, -0.1):
        with pytest.raises(DataError, match="cold_cost"):
            cold_room(scorer, split, cost=cost)


def test_fit_leaves_the_model_there_and_saves_it(split, tmp_path):
    settings = {**SOFTMAX, "epochs": 3, "progress": False}
    made = {}
    for cost in (None, 0.1):
        seed_everything(0)
        made[cost] = fit(VBPR(split.train, catalog=split.catalog, loss="softmax"), split, cold_cost=cost, **settings)
    plain, moved = made[None].model, made[0.1].model
    assert float(plain.cold_offset) == 0.0
    assert float(moved.cold_offset) == pytest.approx(cold_room(plain, split, cost=0.1), abs=1e-5)
    assert made[0.1].best_score == validation_score(moved, split.train, split.valid)
    difference = moved.score(np.arange(4)) - plain.score(np.arange(4))
    new = torch.from_numpy(~split.warm_items)
    torch.testing.assert_close(difference, (new * moved.cold_offset).expand(4, -1), atol=1e-4, rtol=1e-4)
    loaded = Recommender.from_pretrained(moved.save_pretrained(tmp_path / "m"), catalog=split.catalog)
    torch.testing.assert_close(loaded.score(np.arange(4)), moved.score(np.arange(4)))
    ids = fit(LightGCN(split.train, loss="softmax"), split, cold_cost=0.1, **settings).model
    assert float(ids.cold_offset) == 0.0  # it has nothing to say of new items
