"""The evaluator against ranx, naive loops and known answers."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from mmllmrec.data.interactions import DataError, IdMap, Interactions
from mmllmrec.evaluation import metrics
from mmllmrec.evaluation.floors import Popularity, Random
from mmllmrec.evaluation.metrics import METRICS, compute
from mmllmrec.evaluation.protocols import harmonic, validation_score
from mmllmrec.evaluation.ranking import _top, rank
from tests.planted import Table

U, ITEMS = 37, 101


def events(density, seed, users=U, items=ITEMS):
    rng = np.random.default_rng(seed)
    cells = rng.choice(users * items, int(density * users * items), replace=False)
    return Interactions(cells // items, cells % items, None, IdMap(range(users)), IdMap(range(items)))


@pytest.fixture(scope="module")
def scores():
    return np.random.default_rng(0).permutation(U * ITEMS).reshape(U, ITEMS).astype(np.float32)


def naive(scores, positives, seen, k, candidates=None):
    """user -> list of hits in ranked order, number of positives; ties are not expected."""
    found = {}
    for u in range(len(scores)):
        mine = {int(i) for i in positives.csr[u].indices if candidates is None or candidates[i]}
        masked = set(seen[u].indices) if seen is not None else set()
        if mine:
            left = [i for i in range(scores.shape[1]) if i not in masked and (candidates is None or candidates[i])]
            ranked = sorted(left, key=lambda i, u=u: -scores[u, i])[:k]
            found[u] = ([i in mine for i in ranked], len(mine))
    return found


@pytest.mark.parametrize("block", [5, 2048])
@pytest.mark.parametrize("limited", [False, True])
def test_ranking_is_the_naive_loop(scores, block, limited):
    positives, seen = events(0.05, 1), events(0.2, 2).csr
    candidates = np.random.default_rng(3).random(ITEMS) < 0.3 if limited else None
    ours = rank(Table(scores), positives, seen=seen, k=10, candidates=candidates, block=block)
    theirs = naive(scores, positives, seen, 10, candidates)
    assert ours.users.tolist() == sorted(theirs)
    for row, user in enumerate(ours.users):
        hits, count = theirs[user]
        assert ours.hits[row].tolist()[: len(hits)] == hits and not ours.hits[row, len(hits) :].any()
        assert ours.positives[row] == count


@pytest.mark.slow
def test_metrics_agree_with_ranx(scores):
    import ranx  # slow to import: it compiles

    positives = events(0.05, 4)
    ours = rank(Table(scores), positives, seen=None, k=50)
    users = ours.users.tolist()
    qrels = ranx.Qrels({str(u): {str(i): 1 for i in positives.csr[u].indices} for u in users})
    run = ranx.Run({str(u): {str(i): float(scores[u, i]) for i in range(ITEMS)} for u in users})
    names = {"recall": "recall", "precision": "precision", "ndcg": "ndcg", "hit": "hit_rate", "mrr": "mrr"}
    for k in (5, 10, 20, 50):
        for ours_name, theirs in names.items():
            value = ranx.evaluate(qrels, run, f"{theirs}@{k}", make_comparable=True)
            assert ours.per_user(f"{ours_name}@{k}").mean() == pytest.approx(value, abs=1e-6), (ours_name, k)
        # ranx divides by |positives| where ours divides by min(|positives|, K)
        count = ours.positives.numpy()
        rescaled = ours.per_user(f"map@{k}") * np.minimum(count, k) / count
        assert rescaled.mean() == pytest.approx(ranx.evaluate(qrels, run, f"map@{k}"), abs=1e-6)


def test_known_answers():
    hits, count = torch.tensor([[False, True, False, True]]), torch.tensor([3])
    expected = {
        "recall@4": 2 / 3,
        "precision@4": 2 / 4,
        "hit@1": 0.0,
        "mrr@4": 1 / 2,
        "map@4": (1 / 2 + 2 / 4) / 3,
        "map@2": (1 / 2) / 2,
        "ndcg@4": (1 / np.log2(3) + 1 / np.log2(5)) / (1 + 1 / np.log2(3) + 1 / 2),
        "ndcg@2": (1 / np.log2(3)) / (1 + 1 / np.log2(3)),
    }
    for name, value in expected.items():
        assert compute(name, hits, count).item() == pytest.approx(value, abs=1e-12), name
    with pytest.raises(ValueError, match="ndcg@20"):
        compute("ndcg", hits, count)


def test_perfect_scores_give_one():
    positives = events(0.1, 5)
    best = rank(Table(positives.csr.toarray()), positives, seen=None, k=50)
    for name in set(METRICS) - {"precision"}:  # ten positives cannot fill fifty places
        np.testing.assert_allclose(best.per_user(f"{name}@50"), 1.0, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(best.per_user("ndcg@5"), 1.0, atol=1e-12)


def test_constant_scores_and_shuffled_labels_are_random():
    positives = events(0.1, 6, users=997, items=53)
    constant = rank(Table(np.zeros((997, 53))), positives, seen=None, k=10)
    assert constant.per_user("recall@10").mean() == pytest.approx(10 / 53, abs=0.02)
    shuffled = rank(Table(np.random.default_rng(0).random((997, 53))), positives, seen=None, k=10)
    assert shuffled.per_user("recall@10").mean() == pytest.approx(10 / 53, abs=0.02)
    floor = rank(Random(positives, seed=1), positives, seen=None, k=10)
    assert floor.per_user("recall@10").mean() == pytest.approx(10 / 53, abs=0.02)


def test_ties_follow_one_seeded_permutation():
    positives = events(0.3, 7)
    coarse = np.random.default_rng(1).integers(0, 3, (U, ITEMS))
    a, b = (rank(Table(coarse), positives, seen=None, k=20, seed=s).items for s in (0, 0))
    assert (a == b).all()
    assert (a != rank(Table(coarse), positives, seen=None, k=20, seed=1).items).any()
    constant = rank(Table(np.zeros((U, ITEMS))), positives, seen=None, k=20).items
    place = np.empty(ITEMS, int)
    place[rank(Table(np.zeros((U, ITEMS))), positives, seen=None, k=ITEMS).items[0]] = np.arange(ITEMS)
    assert (constant == constant[0]).all()
    for row, user in enumerate(np.unique(positives.users)):
        assert a[row].tolist() == sorted(range(ITEMS), key=lambda i, u=user: (-coarse[u, i], place[i]))[:20]


@pytest.mark.parametrize(("columns", "k"), [(1003, 20), (1003, 62), (1003, 63), (37, 20), (37, 37), (5, 1), (1, 1)])
def test_the_best_columns_are_those_of_a_full_stable_sort(columns, k):
    rng = np.random.default_rng(columns + k)
    blocks = [rng.normal(size=(7, columns)), rng.integers(0, 4, (7, columns)), np.zeros((7, columns))]
    blocks.append(np.where(rng.random((7, columns)) < 0.01, blocks[0], -np.inf))  # fewer than k left
    for scores in (b.astype(np.float32) for b in blocks):
        value, column = _top(scores, k)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(value, np.take_along_axis(scores, order, axis=1))
        np.testing.assert_array_equal(column[np.isfinite(value)], order[np.isfinite(value)])


def test_no_users_is_an_empty_ranking(scores):
    found = rank(Table(scores), events(0.05, 1), seen=None, k=5, users=np.zeros(0, dtype=int))
    assert found.items.shape == (0, 5) and len(found.per_user("recall@5")) == 0


def test_a_masked_item_never_counts():
    positives = events(0.2, 8)
    everything_seen = positives.csr.copy()
    result = rank(Table(positives.csr.toarray()), positives, seen=everything_seen, k=ITEMS)
    assert not result.hits.any()


def test_embeddings_and_scores_rank_alike():
    rng = np.random.default_rng(2)
    users, items = torch.tensor(rng.normal(size=(U, 5))), torch.tensor(rng.normal(size=(ITEMS, 5)))

    class Embedded:
        def embed(self):
            return users, items

    positives = events(0.1, 9)
    a = rank(Embedded(), positives, seen=None, k=20).items
    b = rank(Table((users @ items.T).numpy()), positives, seen=None, k=20).items
    assert (a == b).mean() > 0.999


def test_nan_scores_name_the_scorer(scores):
    broken = scores.copy()
    broken[3, 3] = np.nan
    with pytest.raises(DataError, match="Table gives NaN"):
        rank(Table(broken), events(0.1, 1), seen=None, k=5)


def test_validation_masks_train_and_popularity_is_the_count():
    train, valid = events(0.3, 10), events(0.05, 11)
    direct = rank(Popularity(train), valid, seen=train.csr, k=20).per_user("recall@20").mean()
    assert validation_score(Popularity(train), train, valid, metric="recall@20") == direct
    assert Popularity(train).score(np.array([0]))[0].tolist() == train.item_counts.tolist()


def test_labels_dealt_to_other_items_give_the_score_of_random():
    """Scores that know everything know nothing of shuffled labels, popularity included."""
    from mmllmrec.data.atelier import atelier

    data = atelier(n_items=211, n_users=997, n_events=20_000, modalities=())
    x = data.interactions
    rng = np.random.default_rng(0)
    order = np.argsort(rng.random((x.n_users, x.n_items)), axis=1)  # each user's labels go to items of its own
    shuffled = Interactions(x.users, order[x.users, x.items], None, x.user_ids, x.item_ids)
    options = {"seen": None, "k": 20}
    ours, chance = (rank(s, shuffled, **options).per_user("ndcg@20") for s in (data.oracle(), Random(x, seed=3)))
    assert rank(data.oracle(), x, **options).per_user("ndcg@20").mean() > 2 * chance.mean()
    assert ours.mean() == pytest.approx(chance.mean(), abs=4 * (ours - chance).std() / np.sqrt(len(ours)))


def test_lists_beyond_accuracy_against_naive_loops():
    rng = np.random.default_rng(4)
    items = np.stack([rng.permutation(13)[:5] for _ in range(7)])
    real = np.ones((7, 5), dtype=bool)
    real[2, 3:], real[4, 1:], real[5] = False, False, False
    counts, vectors = rng.integers(0, 9, 13), rng.normal(size=(13, 3))
    vectors[6] = 0
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    lists = [[int(i) for i, r in zip(*row, strict=True) if r] for row in zip(items, real, strict=True)]
    times = np.array([sum(i in one for one in lists) for i in range(13)])
    assert metrics.coverage(items, real, 13) == (times > 0).sum() / 13
    naive = np.abs(times[:, None] - times[None]).sum() / (2 * 13 * times.sum())  # mean absolute difference
    assert metrics.gini(items, real, 13) == pytest.approx(naive)
    assert metrics.gini(np.zeros((7, 1), int), np.ones((7, 1), bool), 13) == pytest.approx(12 / 13)
    assert metrics.gini(np.arange(13)[:, None], np.ones((13, 1), bool), 13) == pytest.approx(0)
    bits = [np.mean([-np.log2(max(counts[i], 1) / 61) for i in one]) if one else 0.0 for one in lists]
    np.testing.assert_allclose(metrics.novelty(items, real, counts, 61), bits)
    apart = [
        np.mean([1 - vectors[a] @ vectors[b] for a in one for b in one if a != b]) if len(one) > 1 else 0.0
        for one in lists
    ]
    np.testing.assert_allclose(metrics.diversity(items, real, vectors), apart, atol=1e-6)
    np.testing.assert_allclose(metrics.diversity(items, real, sp.csr_matrix(vectors)), apart, atol=1e-6)


def test_harmonic_mean():
    assert harmonic(0.4, 0.0) == 0.0
    assert harmonic(0.4, 0.4) == pytest.approx(0.4)
