"""Events handed on to PyG, and its LightGCN layer beside ours."""

import numpy as np
import pytest
import torch

from mmllmrec.data.interactions import DataError, IdMap, Interactions
from mmllmrec.encoders.graph import LightGraph
from mmllmrec.features.table import FeatureTable

torch_geometric = pytest.importorskip("torch_geometric")
U, N, D = 7, 11, 3


@pytest.fixture
def train():
    cells = np.random.default_rng(0).choice(U * N, size=29, replace=False)
    ids = IdMap(range(U), what="user id"), IdMap(range(N), what="item id")
    return Interactions(cells // N, cells % N, np.arange(29), *ids)


def test_edges_times_and_features_are_those_of_the_events(train):
    table = FeatureTable({"image": np.ones((N, 4)), "text": np.ones((N, 2))}, np.arange(2 * N).reshape(N, 2) % 3 > 0)
    data = train.to_pyg(features=table)
    data.validate()
    edges = data["user", "takes", "item"]
    assert edges.edge_index.tolist() == [train.users.tolist(), train.items.tolist()]
    assert edges.time.tolist() == train.times.tolist()
    assert torch.equal(data["item", "taken by", "user"].edge_index, edges.edge_index.flip(0))
    assert data["item"].x.shape == (N, 6) and torch.equal(data["item"].presence, torch.tensor(table.presence))
    with pytest.raises(DataError, match="features have 5 rows"):
        train.to_pyg(features=FeatureTable({"image": np.ones((5, 4))}, np.ones((5, 1), bool)))


def test_pyg_propagates_as_we_do(train):
    edge = torch.from_numpy(np.stack([train.users, train.items + U]))
    layer = torch_geometric.nn.LGConv()
    x = torch.randn(U + N, D)
    both = torch.cat([edge, edge.flip(0)], dim=1)
    naive = (x + layer(x, both) + layer(layer(x, both), both)) / 3
    torch.testing.assert_close(torch.cat(LightGraph(train, layers=2)(x[:U], x[U:])), naive)
