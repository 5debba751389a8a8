"""Latent graphs against naive loops, and what blocks and absences do to them."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from mmllmrec.data.interactions import DataError, IdMap, Interactions
from mmllmrec.encoders import item_graph as graphs
from mmllmrec.encoders.views import keep_edges, keep_nodes

N, D, K, U = 13, 5, 3, 7


@pytest.fixture
def rows():
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def train():
    rng = np.random.default_rng(0)
    cells = rng.choice((U - 1) * N, size=37, replace=False)  # the last user has no event
    ids = IdMap(range(U), what="user id"), IdMap(range(N), what="item id")
    return Interactions(cells // N, cells % N, None, *ids)


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("itself", [True, False])
@pytest.mark.parametrize("block", [1, 40, 10_000])
def test_nearest_is_the_sorted_list_of_cosines(rows, itself, block, monkeypatch):
    monkeypatch.setattr(graphs, "BLOCK", block)
    near, how = graphs.nearest(rows, K, itself=itself)
    for n in range(N):
        others = [m for m in range(N) if itself or m != n]
        best = sorted(others, key=lambda m: -cosine(rows[n], rows[m]))[:K]
        assert near[n].tolist() == best
        torch.testing.assert_close(how[n], torch.tensor([cosine(rows[n], rows[m]) for m in best]))


def test_absent_rows_are_nobodys_neighbours(rows):
    present = torch.arange(N) % 4 != 1
    near, how = graphs.nearest(rows, N, present=present, itself=False)
    assert near.shape[1] == int(present.sum()) - 1 and present[near].all()
    assert (how[~present] == 0).all()
    assert all(n not in near[n] for n in range(N) if present[n])
    with pytest.raises(DataError, match="k=0"):
        graphs.nearest(rows, 0)


def test_where_nothing_is_present_there_are_no_neighbours(rows):
    near, how = graphs.nearest(rows, K, present=torch.zeros(N, dtype=torch.bool))
    assert near.shape == how.shape == (N, 1) and (near == 0).all() and (how == 0).all()
    assert graphs.item_graph(rows.numpy(), np.zeros(N, dtype=bool), k=K).nnz == 0


def test_cosines_of_parts_are_means_over_those_that_both_have(rows):
    half = rows.shape[1] // 2
    parts = torch.stack([torch.arange(N) % 3 != 0, torch.arange(N) % 4 != 0], dim=1)
    sides = [torch.nn.functional.normalize(x, dim=1) for x in (rows[:, :half], rows[:, half:])]
    sides = [x * parts[:, c, None] for c, x in enumerate(sides)]
    near, how = graphs.nearest(torch.cat(sides, 1), N, present=parts.any(1), parts=parts)
    for n in range(N):
        for m, value in zip(near[n].tolist(), how[n].tolist(), strict=True):
            both = [c for c in (0, 1) if parts[n, c] and parts[m, c]]
            expected = np.mean([float(sides[c][n] @ sides[c][m]) for c in both]) if both else 0.0
            assert value == pytest.approx(expected, abs=1e-6)
    with_parts = graphs.item_graph(torch.cat(sides, 1).numpy(), parts.numpy(), k=3, weighted=True)
    assert (np.diff(with_parts.indptr)[~parts.any(1).numpy()] == 0).all()


@pytest.mark.parametrize("weighted", [True, False])
def test_item_graph_is_the_normalised_one(rows, weighted):
    present = np.arange(N) != 4
    naive = np.zeros((N, N))
    for n in np.flatnonzero(present):
        best = sorted(np.flatnonzero(present), key=lambda m: -cosine(rows[n], rows[m]))[:K]
        for m in best:
            naive[n, m] = max(cosine(rows[n], rows[m]), 0.0) if weighted else 1.0
    degree = naive.sum(1)
    for n in range(N):
        for m in range(N):
            naive[n, m] = naive[n, m] / np.sqrt(degree[n] * degree[m]) if naive[n, m] else 0.0
    ours = graphs.item_graph(rows.numpy(), present, k=K, weighted=weighted)
    assert sp.issparse(ours)
    np.testing.assert_allclose(ours.toarray(), naive, atol=1e-6)


def test_user_graph_counts_common_training_items(train):
    ours = graphs.user_graph(train, k=2).toarray()
    r = train.csr.toarray() > 0
    for u in range(U):
        common = {v: int((r[u] & r[v]).sum()) for v in range(U) if v != u and (r[u] & r[v]).any()}
        best = sorted(common, key=lambda v: (-common[v], v))[:2]
        assert {v: ours[u, v] for v in np.flatnonzero(ours[u])} == {v: common[v] for v in best}
    assert not ours[-1].any()


def test_weighted_sum_is_its_formula_in_value_and_gradient(rows):
    near, _ = graphs.nearest(rows, K)
    x = rows.double().requires_grad_()
    weights = torch.rand(N, K, dtype=torch.float64, requires_grad=True)
    naive = torch.stack([sum(weights[n, k] * x[near[n, k]] for k in range(K)) for n in range(N)])
    ours = graphs.weighted_sum(near, weights, x)
    torch.testing.assert_close(ours, naive)
    mine, theirs = (torch.autograd.grad((y**3).sum(), (weights, x)) for y in (ours, naive))
    torch.testing.assert_close(mine, theirs)


def test_cosines_have_a_gradient(rows):
    near, how = graphs.nearest(rows, K)
    x = rows.clone().requires_grad_()
    ours = graphs.cosines(x, near)
    torch.testing.assert_close(ours, how)
    assert torch.autograd.grad(ours.sum(), x)[0].abs().sum() > 0


def test_edges_are_dropped_by_degree_or_not(train):
    rng = np.random.default_rng(1)
    kept = keep_edges(train, 0.4, rng=rng)
    assert len(kept) == round(0.4 * len(train)) == len(np.unique(kept))
    often = {False: np.zeros(len(train)), True: np.zeros(len(train))}
    for by_degree, count in often.items():
        for _ in range(2000):
            count[keep_edges(train, 0.2, rng=rng, by_degree=by_degree)] += 1
    weight = 1 / np.sqrt(train.user_counts[train.users] * train.item_counts[train.items])
    size = round(0.2 * len(train))
    naive = np.zeros(len(train))
    for _ in range(2000):
        naive[rng.choice(len(train), size=size, replace=False, p=weight / weight.sum())] += 1
    assert np.abs(often[True] - naive).max() < 200  # 4 standard deviations of a difference are about 100
    assert np.abs(often[False] - 2000 * size / len(train)).max() < 120
    with pytest.raises(DataError, match=r"share=1\.5"):
        keep_edges(train, 1.5, rng=rng)


def test_a_node_that_is_dropped_takes_its_edges(train):
    kept = keep_nodes(train, 0.5, rng=np.random.default_rng(3))
    assert 0 < kept.sum() < len(train)
    gone = ~kept
    # an event that stays shares a node with an event that goes only if the other node of that event went
    for e in np.flatnonzero(gone):
        user_stays = kept[train.users == train.users[e]].any()
        item_stays = kept[train.items == train.items[e]].any()
        assert not (user_stays and item_stays)
