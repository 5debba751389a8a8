"""What every recommender keeps. A new one joins by one line in MODELS."""

import inspect
import json
from collections.abc import Callable

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from mmllmrec import models
from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import DataError, IdMap, Interactions
from mmllmrec.data.sampling import Batch, epoch
from mmllmrec.models.base import Recommender
from mmllmrec.models.composed import Encoder, Fusion

U, N = 7, 11
USERS = np.arange(U)
PICTURED = {"item_id": datasets.Value("string"), "image": datasets.Image(decode=False)}


def a_stage() -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of users and items as a first stage gives them."""
    return torch.randn(U, 4), torch.randn(N, 4)


# name -> (training events, catalogue) -> a small model, built after a seed
MODELS: dict[str, Callable[[Interactions, Catalog], Recommender]] = {
    "BPR": lambda train, catalog: models.BPR(train, dim=5),
    "LightGCN": lambda train, catalog: models.LightGCN(train, dim=5, layers=2, reg=1e-2),
    "VBPR": lambda train, catalog: models.VBPR(train, catalog=catalog, dim=5, feature_dim=3),
    "VBPR with biases": lambda train, catalog: models.VBPR(train, catalog=catalog, dim=5, feature_dim=3, bias=True),
    "BPR, softmax": lambda train, catalog: models.BPR(train, dim=5, loss="softmax"),
    "LightGCN, softmax": lambda train, catalog: models.LightGCN(train, dim=5, layers=2, loss="softmax"),
    "VBPR, softmax": lambda train, catalog: models.VBPR(train, catalog=catalog, dim=5, feature_dim=3, loss="softmax"),
    "AlphaRec": lambda train, catalog: models.AlphaRec(train, catalog=catalog, dim=5, hidden=7, feature_dim=3),
    "AlphaRec, bpr": lambda train, catalog: models.AlphaRec(
        train, catalog=catalog, dim=5, hidden=7, feature_dim=3, loss="bpr"
    ),
    "LightGCNContent": lambda train, catalog: models.LightGCNContent(
        train, catalog=catalog, dim=5, feature_dim=3, id_dropout=0.0, reg=1e-2
    ),
    "LightGCNContent, softmax": lambda train, catalog: models.LightGCNContent(
        train, catalog=catalog, dim=5, feature_dim=3, loss="softmax"
    ),
    "CLCRec": lambda train, catalog: models.CLCRec(train, catalog=catalog, dim=5, hidden=7, feature_dim=3),
    "DropoutNet": lambda train, catalog: models.DropoutNet(
        train, catalog=catalog, latents=a_stage(), dim=5, hidden=9, dropout=0.0, feature_dim=3
    ),
    "DropoutNet, softmax": lambda train, catalog: models.DropoutNet(
        train, catalog=catalog, latents=a_stage(), dim=5, hidden=9, feature_dim=3, loss="softmax"
    ),
    "ALDI": lambda train, catalog: models.ALDI(
        train, catalog=catalog, latents=a_stage(), dim=5, hidden=9, feature_dim=3
    ),
    "ALDI, softmax": lambda train, catalog: models.ALDI(
        train, catalog=catalog, latents=a_stage(), dim=5, hidden=9, feature_dim=3, loss="softmax"
    ),
    "TwoStage": lambda train, catalog: models.TwoStage(train, catalog=catalog, dim=8, feature_dim=3, id_dropout=0.5),
    "TwoStage, frozen histories": lambda train, catalog: models.TwoStage(
        train, catalog=catalog, dim=8, feature_dim=3, id_dropout=0.5, history="mean"
    ),
    "SimGCL": lambda train, catalog: models.SimGCL(train, dim=5),
    "SimGCL, softmax": lambda train, catalog: models.SimGCL(train, dim=5, loss="softmax"),
    "LayerGCN": lambda train, catalog: models.LayerGCN(train, dim=5, layers=3, reg=1e-2),
    "LayerGCN, softmax": lambda train, catalog: models.LayerGCN(train, dim=5, layers=2, loss="softmax"),
    "SelfCF": lambda train, catalog: models.SelfCF(train, dim=5),
    "SelfCF, history": lambda train, catalog: models.SelfCF(train, dim=5, target="history"),
    "SelfCF, edges": lambda train, catalog: models.SelfCF(train, dim=5, target="edges"),
    "FREEDOM": lambda train, catalog: models.FREEDOM(train, catalog=catalog, dim=5, neighbours=3, feature_dim=3),
    "FREEDOM, softmax": lambda train, catalog: models.FREEDOM(
        train,
        catalog=catalog,
        dim=5,
        neighbours=3,
        shares=(0.1, 0.9)[: len(catalog.modalities)],
        feature_dim=3,
        loss="softmax",
    ),
    "BM3": lambda train, catalog: models.BM3(train, catalog=catalog, dim=5, feature_dim=3),
    "MGCN": lambda train, catalog: models.MGCN(train, catalog=catalog, dim=5, neighbours=3, feature_dim=3),
    "MGCN, softmax": lambda train, catalog: models.MGCN(
        train, catalog=catalog, dim=5, neighbours=3, feature_dim=3, loss="softmax"
    ),
    "LGMRec": lambda train, catalog: models.LGMRec(train, catalog=catalog, dim=5, feature_dim=3),
    "LGMRec, softmax": lambda train, catalog: models.LGMRec(
        train, catalog=catalog, dim=5, hyperedges=3, hyper_layers=2, feature_dim=3, loss="softmax"
    ),
    "MMGCN": lambda train, catalog: models.MMGCN(train, catalog=catalog, dim=5, layers=2, hidden=2, feature_dim=3),
    "MMGCN, add": lambda train, catalog: models.MMGCN(
        train, catalog=catalog, dim=5, layers=2, combine="add", feature_dim=3, loss="softmax"
    ),
    "PGL": lambda train, catalog: models.PGL(train, catalog=catalog, dim=5, neighbours=3, feature_dim=3),
    "PGL, global": lambda train, catalog: models.PGL(
        train, catalog=catalog, dim=5, neighbours=3, subgraph="global", rank=8, feature_dim=3, loss="softmax"
    ),
    "LATTICE": lambda train, catalog: models.LATTICE(
        train, catalog=catalog, dim=5, neighbours=3, keep=0.5, feature_dim=3
    ),
    "LATTICE, softmax": lambda train, catalog: models.LATTICE(
        train, catalog=catalog, dim=5, neighbours=3, keep=0.5, item_layers=2, feature_dim=3, loss="softmax"
    ),
    "MICRO": lambda train, catalog: models.MICRO(train, catalog=catalog, dim=5, neighbours=3, keep=0.5, feature_dim=3),
    "SLMRec": lambda train, catalog: models.SLMRec(train, catalog=catalog, dim=5, feature_dim=3),
    "SLMRec, bpr": lambda train, catalog: models.SLMRec(train, catalog=catalog, dim=5, feature_dim=3, loss="bpr"),
    "DualGNN": lambda train, catalog: models.DualGNN(
        train, catalog=catalog, dim=5, hidden=7, companions=3, feature_dim=3
    ),
    "DRAGON": lambda train, catalog: models.DRAGON(
        train, catalog=catalog, dim=5, hidden=7, companions=3, neighbours=3, feature_dim=3
    ),
    "DRAGON, softmax": lambda train, catalog: models.DRAGON(
        train, catalog=catalog, dim=5, hidden=7, companions=3, neighbours=3, feature_dim=3, loss="softmax"
    ),
    "MENTOR": lambda train, catalog: models.MENTOR(
        train, catalog=catalog, dim=5, hidden=7, neighbours=3, feature_dim=3, dropout=0.3
    ),
    "MENTOR, its code": lambda train, catalog: models.MENTOR(
        train, catalog=catalog, dim=5, hidden=7, neighbours=3, feature_dim=3, train_mask=False, loss="softmax"
    ),
    "COHESION": lambda train, catalog: models.COHESION(
        train, catalog=catalog, dim=5, hidden=7, neighbours=3, companions=3, feature_dim=3
    ),
    "COHESION, softmax": lambda train, catalog: models.COHESION(
        train, catalog=catalog, dim=5, hidden=7, neighbours=3, prune=0.3, feature_dim=3, loss="softmax"
    ),
    "GRCN": lambda train, catalog: models.GRCN(train, catalog=catalog, dim=5, feature_dim=3),
    "GRCN, softmax": lambda train, catalog: models.GRCN(
        train, catalog=catalog, dim=5, routing=0, prune_edges=False, feature_dim=3, loss="softmax"
    ),
    "SMORE": lambda train, catalog: models.SMORE(train, catalog=catalog, dim=6, neighbours=3, feature_dim=3),
    "SMORE, softmax": lambda train, catalog: models.SMORE(
        train, catalog=catalog, dim=6, neighbours=3, dropout=0.1, feature_dim=3, loss="softmax"
    ),
    "AlignRec": lambda train, catalog: models.AlignRec(train, catalog=catalog, dim=5, neighbours=3, feature_dim=3),
    "DAMRS": lambda train, catalog: models.DAMRS(train, catalog=catalog, dim=5, neighbours=3, feature_dim=3),
    "DAMRS, softmax": lambda train, catalog: models.DAMRS(
        train, catalog=catalog, dim=5, neighbours=3, feature_dim=3, loss="softmax"
    ),
    "IALS": lambda train, catalog: models.IALS(train, dim=5, iterations=3),
    "ImplicitBPR": lambda train, catalog: models.ImplicitBPR(train, dim=5, iterations=5),
    "EDLAE": lambda train, catalog: models.EASE(train, reg=5.0, dropout=0.3),
    "DiffMM": lambda train, catalog: models.DiffMM(train, catalog=catalog, dim=5, hidden=7, top=2, feature_dim=3),
    "LLMRec": lambda train, catalog: models.LLMRec(train, catalog=catalog, dim=5, pruned=0.0, feature_dim=3),
    "LLMRec, written": lambda train, catalog: models.LLMRec(
        train,
        catalog=catalog,
        profiles=np.random.default_rng(2).normal(size=(U, 4)).astype(np.float32),
        pairs=np.random.default_rng(3).integers(-1, N - 1, (U, 2)),
        dim=5,
        pruned=0.0,
        feature_dim=3,
    ),
    "MMSSL": lambda train, catalog: models.MMSSL(train, catalog=catalog, dim=6, heads=2, top=3, feature_dim=3),
    "MMSSL, softmax": lambda train, catalog: models.MMSSL(
        train, catalog=catalog, dim=6, heads=2, top=3, adversarial_weight=0.0, feature_dim=3, loss="softmax"
    ),
    "Composed": lambda train, catalog: models.Composed(
        train, catalog=catalog, encoder=Encoder("item graph", neighbours=3), dim=5, feature_dim=3
    ),
    "Composed, late": lambda train, catalog: models.Composed(
        train, catalog=catalog, fusion=Fusion("late", "attentive"), extras={"noise": 0.1}, dim=5, feature_dim=3
    ),
    "Composed, late item graph": lambda train, catalog: models.Composed(
        train,
        catalog=catalog,
        encoder=Encoder("item graph", neighbours=3),
        fusion=Fusion("late", "gate"),
        loss="softmax",
        dim=5,
        feature_dim=3,
    ),
    "Composed, learned item graph": lambda train, catalog: models.Composed(
        train, catalog=catalog, encoder=Encoder("learned item graph", neighbours=3), dim=5, feature_dim=3
    ),
    "DVBPR": lambda train, catalog: models.DVBPR(train, catalog=catalog, dim=5, size=32, width=4),
    "DVBPR, softmax": lambda train, catalog: models.DVBPR(
        train, catalog=catalog, dim=5, size=32, width=4, loss="softmax"
    ),
    "ItemKNN": lambda train, catalog: models.ItemKNN(train, k=3),
    "EASE": lambda train, catalog: models.EASE(train, reg=5.0),
}


@pytest.fixture(scope="module")
def train() -> Interactions:
    """Seven users and eleven items; the last user and the last item have no event."""
    cells = np.random.default_rng(0).choice((U - 1) * (N - 1), size=31, replace=False)
    ids = IdMap([f"u{u}" for u in range(U)], what="user id"), IdMap([f"i{i}" for i in range(N)], what="item id")
    return Interactions(cells // (N - 1), cells % (N - 1), None, *ids)


@pytest.fixture(params=list(MODELS))
def kind(request) -> str:
    return request.param


@pytest.fixture
def catalog(kind, train) -> Catalog:
    """Features of two modalities; pictures in place of one for who looks at pictures."""
    rng = np.random.default_rng(1)
    features = {"image": rng.normal(size=(N, 13)), "text": rng.normal(size=(N, 17)) + 1}
    absent = {"image": np.arange(N) == 2, "text": np.isin(np.arange(N), (2, 3))}  # item 2 has no content at all
    columns = {"item_id": train.item_ids.ids}
    if kind.startswith("DVBPR"):
        pixels = rng.integers(0, 256, (N, 32, 32, 3), dtype=np.uint8)
        pictures = [None if gone else Image.fromarray(p) for p, gone in zip(pixels, absent["image"], strict=True)]
        rows = datasets.Dataset.from_dict({**columns, "image": pictures}, datasets.Features(PICTURED))
        return Catalog(rows, train.item_ids, features={"text": features["text"]}, absent=absent)
    return Catalog(datasets.Dataset.from_dict(columns), train.item_ids, features=features, absent=absent)


@pytest.fixture
def model(kind, train, catalog) -> Recommender:
    torch.manual_seed(0)
    return MODELS[kind](train, catalog)


def a_batch(model: Recommender, train: Interactions, size: int = 13) -> Batch:
    return next(epoch(train, batch_size=size, negatives=model.negatives, rng=np.random.default_rng(0)))


def trained(model: Recommender, train: Interactions) -> Recommender:
    """A few steps away from the start, so that nothing passes by being symmetric or zero."""
    if model.trainable:
        optimiser = torch.optim.Adam(model.parameter_groups(0.05))
        model.begin_epoch(np.random.default_rng(0))
        for batch in epoch(train, batch_size=13, negatives=model.negatives, rng=np.random.default_rng(0)):
            optimiser.zero_grad()
            sum(model.loss(batch).values()).backward()
            optimiser.step()
    return model


def test_a_batch_scores_like_one_by_one(model, train):
    scores = trained(model, train).score(USERS)
    assert scores.shape == (U, N)
    for user in USERS:
        torch.testing.assert_close(model.score(USERS[user : user + 1])[0], scores[user])


def test_permuting_users_permutes_rows(model, train):
    scores = trained(model, train).score(USERS)
    order = np.random.default_rng(3).permutation(U)
    torch.testing.assert_close(model.score(order), scores[order])
    torch.testing.assert_close(model.score(torch.from_numpy(order)), scores[order])  # tensors do as well


def test_scores_repeat_exactly(model, train):
    trained(model, train)
    assert torch.equal(model.score(USERS), model.score(USERS))


def test_all_scores_are_finite_for_cold_users_and_cold_items_too(model, train):
    assert train.user_counts[U - 1] == 0 and train.item_counts[N - 1] == 0
    assert torch.isfinite(trained(model, train).score(USERS)).all()


def test_embed_is_fresh_in_eval_mode_and_restores_the_mode(model, train):
    if not model.trainable:
        if hasattr(model, "embed"):  # factors that a library computed
            users, items = model.embed()
            torch.testing.assert_close(users @ items.T, model.score(USERS))
        return
    for mode in (True, False):
        model.train(mode)
        users, items = model.embed()
        assert model.training is mode and not users.requires_grad and not items.requires_grad
        assert len(users) == U and len(items) == N and users.shape[1] == items.shape[1]
    before = users @ items.T
    torch.testing.assert_close(before, model.score(USERS))
    trained(model, train)
    users, items = model.embed()
    assert (users @ items.T - before).abs().max() > 1e-3  # of this step, not of an earlier one


def test_every_term_has_a_gradient_and_every_parameter_gets_one(model, train):
    if not model.trainable:
        assert not list(model.parameters())
        with pytest.raises(TypeError, match="closed form"):
            model.loss(Batch(torch.zeros(1).long(), torch.zeros(1).long()))
        return
    trained(model, train)
    reached = set()
    for name, term in model.loss(a_batch(model, train)).items():
        assert term.shape == () and torch.isfinite(term), name
        model.zero_grad()
        term.backward(retain_graph=True)
        mine = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert mine, f"{name} reaches no parameter"
        reached |= mine
    assert reached == {n for n, p in model.named_parameters() if p.requires_grad}
    grouped = [p for group in model.parameter_groups(1e-3) for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(grouped) == len({id(p) for p in grouped})


def test_one_event_is_a_batch(model, train):
    if model.trainable:
        terms = model.loss(a_batch(model, train, size=1))
        assert all(torch.isfinite(t) and t.shape == () for t in terms.values())
        sum(terms.values()).backward()
    assert model.score(USERS[:1]).shape == (1, N)


def test_several_negatives_are_averaged(model, train):
    if model.negatives == 0 or isinstance(model, models.DAMRS):  # a pair's weight there depends on all negatives
        return
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0  # drawn for a batch's distinct items, which are others in each
    three = next(epoch(train, batch_size=13, negatives=3, rng=np.random.default_rng(0)))
    ones = [Batch(three.users, three.items, three.negatives[:, k : k + 1]) for k in range(3)]

    def ranked(batch: Batch) -> torch.Tensor:
        torch.manual_seed(1)  # what a model draws while it trains
        return model.loss(batch)[model.loss_name]

    torch.testing.assert_close(ranked(three), torch.stack([ranked(batch) for batch in ones]).mean())


def test_no_raw_feature_table_is_trainable(model, catalog):
    widths = {table.shape for table in catalog.features.values()}
    assert not [n for n, p in model.named_parameters() if p.requires_grad and tuple(p.shape) in widths]
    assert not [n for n, p in model.named_parameters() if "content" in n or "features" in n]


def test_saved_and_loaded_scores_are_the_same(model, train, catalog, tmp_path):
    scores = trained(model, train).score(USERS)
    folder = model.save_pretrained(tmp_path / "model")
    for loaded in (
        Recommender.from_pretrained(folder, catalog=catalog),
        type(model).from_pretrained(folder, catalog=catalog),
    ):
        assert type(loaded) is type(model) and loaded.config == model.config
        assert loaded.modalities == model.modalities and loaded.train_data.hash == train.hash
        assert torch.equal(loaded.score(USERS), scores)
    model.save_pretrained(folder)  # an older folder is replaced
    assert torch.equal(Recommender.from_pretrained(folder, catalog=catalog).score(USERS), scores)
    assert {f.suffix for f in folder.iterdir()} <= {".json", ".safetensors"}


def test_a_broken_folder_is_named(model, catalog, tmp_path):
    folder = model.save_pretrained(tmp_path / "model")

    def load() -> Recommender:
        return Recommender.from_pretrained(folder, catalog=catalog)

    for name in ("config.json", "ids.json", "events.safetensors", "model.safetensors"):
        whole = (folder / name).read_bytes()
        for broken in (None, b"", b"\xff\x00nonsense", b"[]"):
            if broken is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(broken)
            with pytest.raises(DataError, match=name):
                load()
        (folder / name).write_bytes(whole)
    about = json.loads((folder / "config.json").read_text())
    for change in ({"class": "Nobody"}, {"config": {"unknown": 1}}, {"config": None}):
        (folder / "config.json").write_text(json.dumps(about | change))
        with pytest.raises(DataError, match=r"config\.json"):
            load()
    (folder / "config.json").write_text(json.dumps({"class": about["class"]}))
    with pytest.raises(DataError, match=r"config\.json"):
        load()
    with pytest.raises(DataError, match="is missing"):
        Recommender.from_pretrained(tmp_path / "nowhere")


def test_another_class_and_other_items_are_refused(model, train, catalog, tmp_path):
    folder = model.save_pretrained(tmp_path / "model")
    other = models.EASE if not isinstance(model, models.EASE) else models.BPR
    with pytest.raises(DataError, match=f"{type(model).__name__}.from_pretrained"):
        other.from_pretrained(folder, catalog=catalog)
    names = IdMap([f"other{i}" for i in range(N)], what="item id")
    with pytest.raises(DataError, match="item ids"):
        Recommender.from_pretrained(folder, catalog=Catalog(datasets.Dataset.from_dict({"item_id": names.ids}), names))
    if model.modalities:
        with pytest.raises(DataError, match="catalog="):
            Recommender.from_pretrained(folder)


def bare(catalog: Catalog, *modalities: str) -> Catalog:
    for modality in modalities:
        catalog = catalog.without(modality)
    return catalog


def test_the_same_catalogue_changes_nothing(model, train, catalog):
    if model.modalities:
        trained(model, train)
        torch.testing.assert_close(model.with_catalog(catalog).score(USERS), model.score(USERS))


def test_a_catalogue_that_lacks_a_modality_is_scored(model, train, catalog):
    if not model.modalities:
        return
    trained(model, train)
    for gone in (["image"], ["text"], ["image", "text"]):
        assert torch.isfinite(model.with_catalog(bare(catalog, *gone)).score(USERS)).all()


def test_a_new_item_that_shows_nothing_is_a_zero_vector(model, train, catalog):
    """A learned constant would be a score that it has from no one."""
    if not model.modalities or isinstance(model, models.TwoStage):  # that one learns what absent content means
        return
    items = trained(model, train).with_catalog(bare(catalog, "image", "text")).embed()[1]
    assert (items[N - 1] == 0).all()


def test_what_is_read_moves_with_the_catalogue(model, train, catalog):
    if not model.modalities or not model.supports_cold_items:
        return
    trained(model, train)
    before = model.score(USERS)
    other = model.with_catalog(catalog.shuffled("text", seed=1).shuffled("image", seed=1))
    after = other.score(USERS)
    assert ((after - before).abs().mean() / before.abs().mean() > 1e-3) and torch.equal(model.score(USERS), before)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_one_modality_is_enough(kind, modality, train, catalog, tmp_path):
    if kind.startswith("DVBPR"):
        return  # it reads pictures alone as it is
    alone = Catalog(
        catalog.dataset,
        train.item_ids,
        features={modality: catalog.features[modality]},
        absent={modality: ~catalog.present(modality)},
    )
    torch.manual_seed(0)
    model = MODELS[kind](train, alone)
    if not model.modalities:
        return
    assert model.modalities == (modality,)
    scores = trained(model, train).score(USERS)
    assert torch.isfinite(scores).all()
    loaded = Recommender.from_pretrained(model.save_pretrained(tmp_path / "model"), catalog=alone)
    assert torch.equal(loaded.score(USERS), scores)


def test_who_says_so_knows_new_items_by_what_they_show(model, train, catalog):
    if model.modalities:
        trained(model, train)
        other = model.with_catalog(catalog.shuffled("text", seed=1).shuffled("image", seed=1))
        moved = (other.embed()[1][N - 1] != model.embed()[1][N - 1]).any()
        assert bool(moved) is model.supports_cold_items


def test_with_another_catalogue_nothing_is_left_of_the_first(model, train, catalog, tmp_path):
    """What is made of features, such as a graph of alike items, is what a model built on the other catalogue has."""
    if not model.modalities:
        return
    trained(model, train)
    dealt = catalog.shuffled("text", seed=1).shuffled("image", seed=1)
    for n, given in enumerate((dealt, catalog.randomised("image", seed=1), bare(catalog, "image"))):
        other = model.with_catalog(given)
        built = Recommender.from_pretrained(other.save_pretrained(tmp_path / str(n)), catalog=given)
        assert torch.equal(built.score(USERS), other.score(USERS))


def test_half_precision_trains(model, train):
    if model.trainable:
        model.begin_epoch(np.random.default_rng(0))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total = sum(model.loss(a_batch(model, train)).values())
        total.backward()
        assert torch.isfinite(total)


TRAINS_FEATURES = [
    name for name, model in models.classes().items() if "trained_features" in inspect.signature(model).parameters
]


def test_systems_that_train_their_features_are_found():
    assert {"FREEDOM", "MICRO", "SMORE", "BM3"} <= set(TRAINS_FEATURES)


@pytest.mark.parametrize("kind", TRAINS_FEATURES)
def test_trained_features_are_saved_and_are_no_catalogues(kind, train, catalog, tmp_path):
    torch.manual_seed(0)
    model = getattr(models, kind)(train, catalog=catalog, dim=6, feature_dim=3, trained_features=True)
    before = [table.detach().clone() for table in model.tables]
    scores = trained(model, train).score(USERS)
    assert all((table - old).abs().max() > 1e-3 for table, old in zip(model.tables, before, strict=True))
    folder = model.save_pretrained(tmp_path / "model")
    for given in (catalog, catalog.shuffled("text", seed=1)):
        assert torch.equal(Recommender.from_pretrained(folder, catalog=given).score(USERS), scores)
    with pytest.raises(DataError, match="has trained its items' features"):
        model.with_catalog(catalog)
