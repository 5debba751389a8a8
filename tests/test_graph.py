"""Propagation against dense NumPy and dense autograd."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from mmllmrec.data.interactions import DataError, IdMap, Interactions
from mmllmrec.encoders.graph import LightGraph, Propagation, normalised_adjacency

U, N, D = 7, 11, 3


@pytest.fixture
def train():
    rng = np.random.default_rng(0)
    cells = rng.choice((U - 1) * (N - 1), size=29, replace=False)  # the last user and the last item have no event
    ids = IdMap(range(U), what="user id"), IdMap(range(N), what="item id")
    return Interactions(cells // (N - 1), cells % (N - 1), None, *ids)


def dense(train):
    a = np.zeros((U + N, U + N))
    for user, item in zip(train.users, train.items, strict=True):
        a[user, U + item] = a[U + item, user] = 1
    degree = a.sum(1)
    for row in range(U + N):
        for column in range(U + N):
            if a[row, column]:
                a[row, column] /= np.sqrt(degree[row] * degree[column])
    return a


def test_adjacency_is_the_normalised_one(train):
    np.testing.assert_allclose(normalised_adjacency(train).toarray(), dense(train), atol=1e-7)


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_light_graph_is_the_mean_of_the_layers_in_value_and_gradient(train, layers):
    torch.manual_seed(0)
    users, items = torch.randn(U, D, requires_grad=True), torch.randn(N, D, requires_grad=True)
    a = torch.tensor(dense(train), dtype=torch.float32)
    x = torch.cat([users, items])
    naive = sum(torch.linalg.matrix_power(a, k) @ x for k in range(layers + 1)) / (layers + 1)
    ours = torch.cat(LightGraph(train, layers=layers)(users, items))
    torch.testing.assert_close(ours, naive, atol=1e-6, rtol=1e-5)
    weight = torch.randn(U + N, D)
    mine = torch.autograd.grad((ours**2 * weight).sum(), (users, items))
    theirs = torch.autograd.grad((naive**2 * weight).sum(), (users, items))
    for m, t in zip(mine, theirs, strict=True):
        torch.testing.assert_close(m, t, atol=1e-6, rtol=1e-5)


def test_gradient_by_finite_differences(train):
    graph = Propagation(normalised_adjacency(train)).double()
    x = torch.randn(U + N, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: graph(v) ** 2, x)


def test_a_node_without_events_keeps_its_own_share(train):
    users, items = torch.ones(U, D), torch.ones(N, D)
    out_users, out_items = LightGraph(train, layers=2)(users, items)
    torch.testing.assert_close(out_users[-1], torch.full((D,), 1 / 3))
    torch.testing.assert_close(out_items[-1], torch.full((D,), 1 / 3))


def test_propagation_is_float32_under_autocast(train):
    graph = LightGraph(train, layers=2)
    x = torch.randn(U, D, requires_grad=True), torch.randn(N, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        users, _ = graph(*x)
        users.sum().backward()
    assert users.dtype == torch.float32
    torch.testing.assert_close(users, graph(*x)[0])


def test_the_graph_is_not_saved_and_has_no_parameters(train):
    graph = LightGraph(train, layers=2)
    assert not graph.state_dict() and not list(graph.parameters())
    assert not any(b.is_sparse or b.layout == torch.sparse_csr for b in graph.buffers())


def test_another_matrix_is_multiplied_and_its_transpose_is_the_backward():
    matrix = sp.random(5, 3, density=0.6, random_state=0, dtype=np.float32)
    graph, x = Propagation(matrix), torch.randn(3, D, requires_grad=True)
    naive = torch.tensor(matrix.toarray()) @ x
    torch.testing.assert_close(graph(x), naive)
    weight = torch.randn(5, D)
    mine, theirs = (torch.autograd.grad((y**2 * weight).sum(), x)[0] for y in (graph(x), naive))
    torch.testing.assert_close(mine, theirs)
    square = Propagation(sp.csr_matrix(np.triu(np.ones((3, 3)))))
    assert not square.symmetric and Propagation(sp.identity(3)).symmetric
    with pytest.raises(DataError, match="symmetric"):
        Propagation(matrix, symmetric=True)


def test_events_left_out_count_in_no_degree(train):
    keep = np.arange(len(train)) % 3 > 0
    less = Interactions(train.users[keep], train.items[keep], None, train.user_ids, train.item_ids)
    for which in (keep, np.flatnonzero(keep)):
        np.testing.assert_allclose(normalised_adjacency(train, keep=which).toarray(), dense(less), atol=1e-7)
