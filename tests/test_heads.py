"""Whitening, heads and what they hear: known answers, absence, and the exclusive or that only an early path can say."""

import numpy as np
import pytest
import torch

from mmllmrec.data.atelier import atelier
from mmllmrec.data.interactions import DataError
from mmllmrec.encoders.backbone import JOINT, PAD, READ, word_means, worded
from mmllmrec.encoders.heads import EARLY, SHRINK, Heads, Whiten
from mmllmrec.models import Unified
from mmllmrec.models.unified import PRESETS
from mmllmrec.seed import seed_everything

AXES = torch.tensor([[9.0, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0.1, 0], [0, 0, 0, 0]])


@pytest.fixture(scope="module")
def world():
    return atelier(n_items=31, n_users=17, n_events=200, size=8)


@pytest.fixture(scope="module")
def model(world):
    seed_everything(0)
    return Unified.from_preset("nano", data=world.interactions, catalog=world.catalog)


def covariance(x):
    return (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)


def test_whitening_is_fitted_once_and_does_not_train():
    rows = torch.randn(997, 4, generator=torch.Generator().manual_seed(0)) @ AXES + 7
    one = Whiten([4])
    one.fit(rows, shrink=1e-9)
    torch.testing.assert_close(covariance(one(rows)), torch.diag(torch.tensor([1.0, 1, 1, 0])), atol=1e-2, rtol=0)
    torch.testing.assert_close(one(rows).mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    assert not list(one.parameters()) and {"mean", "matrix"} <= one.state_dict().keys()


def test_whitening_shrinks_small_axes_drops_the_smallest_and_keeps_parts_apart():
    rng = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.randn(997, 4, generator=rng) @ AXES, 5 * torch.randn(997, 3, generator=rng)], dim=1)
    one = Whiten([4, 3], keep=2)
    one.fit(rows)
    assert one(rows).shape == (997, 4) == (997, one.width)
    variance = torch.linalg.eigvalsh(covariance(rows[:, :4])).flip(0)[:2]
    shrunk = variance / (variance + SHRINK * rows[:, :4].var(0, correction=0).mean())
    got = covariance(one(rows))
    torch.testing.assert_close(got[:2, :2], torch.diag(shrunk), atol=1e-4, rtol=0)
    torch.testing.assert_close(got[:2, 2:], (one(rows)[:, :2].T @ one(rows)[:, 2:]) / 997, atol=1e-4, rtol=0)
    other = rows.clone()
    other[:, 4:] = 0
    assert torch.equal(one(other)[:, :2], one(rows)[:, :2])  # a part hears nothing of another


def states(n, present):
    rows = {m: torch.randn(n, 3) * present[m][:, None] for m in present}
    return {m: r.requires_grad_() for m, r in rows.items()}


def test_what_is_absent_is_zero_and_what_is_not_read_early_has_no_say_there():
    seed_everything(0)
    present = {"a": torch.tensor([1, 1, 0, 0]).bool(), "b": torch.tensor([1, 0, 1, 0]).bool()}
    heads = Heads({"a": 3, "b": 3}, 5, paths=(EARLY, "a", "b"), fusion="concat", early=("a",))
    given = states(4, present)
    found = heads(given, present)
    assert list(found.vectors) == [EARLY, "a", "b"]
    assert found.present[EARLY].tolist() == present["a"].tolist()
    for path, here in found.present.items():
        assert torch.equal(found.vectors[path].abs().sum(1) > 0, here), path
    assert torch.equal(found.fused.abs().sum(1) > 0, torch.tensor([1, 1, 1, 0]).bool())
    found.vectors[EARLY].square().sum().backward()
    assert given["b"].grad is None and given["a"].grad[:2].abs().sum() > 0
    assert not given["a"].grad[2:].any()
    for wrong in ({"paths": ("a", "c")}, {"paths": ()}, {"paths": ("a",), "fusion": "vote"}):
        with pytest.raises(DataError, match=next(iter(wrong)) if "fusion" not in wrong else "fusion='vote'"):
            Heads({"a": 3}, 5, **({"paths": ("a",), "fusion": "mean"} | wrong))


@pytest.mark.parametrize(("paths", "finds"), [((EARLY,), True), ((EARLY, "a", "b"), True), (("a", "b"), False)])
def test_only_an_early_path_says_an_exclusive_or(paths, finds):
    seed_everything(3)
    a, b = (torch.randn(401, 3) for _ in range(2))
    target = torch.sign(a[:, 0] * b[:, 0])
    everyone = {m: torch.ones(401, dtype=torch.bool) for m in "ab"}
    heads, out = Heads({"a": 3, "b": 3}, 8, paths=paths, fusion="mean"), torch.nn.Linear(8, 1)
    optimiser = torch.optim.Adam([*heads.parameters(), *out.parameters()], lr=0.02)
    for _ in range(250):
        loss = (out(heads({"a": a, "b": b}, everyone).fused)[:, 0] - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert (float(loss) < 0.35) if finds else (float(loss) > 0.7)


def test_a_bag_of_words_does_not_end_with_the_row(model):
    fields = [{"title": "red lamp", "text": "a lamp . " * 40}, {"title": "", "text": ""}, {"title": "vase", "text": ""}]

    def means(fields):
        return word_means(model._language, worded(model._language, model.prompt, fields))

    got = means(fields)
    table = model.backbone.language.get_input_embeddings().weight.detach()
    for row, item in zip(got, fields, strict=True):
        _, _, after = model.prompt.render(**item).partition("<image>")
        ids = model._language.tokenizer(after, add_special_tokens=False)["input_ids"] if any(item.values()) else []
        want = table[ids].mean(0) if ids else torch.zeros(table.shape[1])
        torch.testing.assert_close(row, want, atol=1e-5, rtol=0)
    assert not torch.allclose(got[0], means([{**fields[0], "text": "a"}])[0])


def test_joint_states_are_the_read_out_and_the_mean_of_the_items_own_tokens(model):
    items = model.items.take(torch.arange(7))
    h = torch.randn(*items.tokens.shape, 96)
    mask = items.tokens != PAD
    got = model.backbone._read_out(h, items.tokens, mask)
    for i, row in enumerate(items.tokens.tolist()):
        own = [n for n, t in enumerate(row) if t not in (PAD, READ)]
        want = torch.cat([h[i, row.index(READ)], h[i, own].mean(0)])
        torch.testing.assert_close(got[i], want, atol=1e-5, rtol=0)


def test_a_two_stage_twin_reads_what_the_untrained_towers_say(world, model):
    table = model.tower_features()
    assert table.modalities == ("image", "patches", "text", "joint", "tokens", "audio", "sensor")
    with torch.no_grad():
        found = model.backbone.states(model.items)
        rows, here = found[JOINT]
        white = model.backbone.whiten[JOINT](rows)
    column = table.modalities.index("joint")
    assert np.array_equal(table.presence[:, column], here.numpy())
    warm = model.item_present[here]
    width = table.widths["joint"]
    one, other = white[warm][:, : min(48, width)], torch.tensor(table.tables["joint"])[here][warm]
    k = min(one.shape[1], other.shape[1], 12)  # the solvers agree where variances are apart, up to sign
    for n in range(k):
        assert abs(float(torch.corrcoef(torch.stack([one[:, n], other[:, n]]))[0, 1])) > 0.98, n
    twin = model.twin(dim=16)
    assert twin.features.hash == table.hash and twin.config["dim"] == 16
    assert twin.heads.early == ("image", "patches", "text", "joint", "tokens") and twin.config["early"]
    # what another catalogue lacks is lacking there, and what towers say of both at once is read again
    blind = twin.with_catalog(world.catalog.without("image")).features
    here = world.catalog.present("image")
    assert not blind.tables["patches"].any() and np.array_equal(blind.tables["text"], table.tables["text"])
    changed = np.abs(blind.tables["joint"] - table.tables["joint"]).max(axis=1) > 1e-3
    assert changed[here & world.catalog.present("text")].all() and not changed[~here].any()
    np.testing.assert_allclose(twin.with_catalog(world.catalog).frozen, twin.frozen, atol=1e-4)
    deeper = Unified.from_preset(
        PRESETS["nano"], data=world.interactions, catalog=world.catalog, trainer="cached", whiten=False
    ).tower_features()
    assert "context" in deeper.modalities and "context" not in table.modalities


def test_factors_by_what_shows_them(world):
    shown = world.perceptible()
    assert list(shown) == [*world.catalog.modalities, "cross"]
    rows, here = shown["text"]
    assert np.array_equal(here, world.catalog.present("text"))
    assert np.array_equal(rows[:, :6].argmax(1), world.table["material"]) and (rows.sum(1) == 4).all()
    cross, both = shown["cross"]
    want = np.where(world.table["backdrop"] == world.table["maker"], 1, -1)
    assert np.array_equal(cross[:, 0], want)
    assert np.array_equal(both, world.catalog.present("image") & here)
