"""The unified model's plumbing on tiny random towers: what trains, what changes what, what is absent, what is saved."""

import copy
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mmllmrec.data.atelier import atelier
from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import DataError, IdMap
from mmllmrec.data.sampling import Batch
from mmllmrec.encoders.backbone import PAD, READ, SOFT, Backbone, place
from mmllmrec.encoders.heads import unit
from mmllmrec.features.prompts import load_prompt
from mmllmrec.features.store import Store
from mmllmrec.features.towers import layers_of, load_vision, weights_hash
from mmllmrec.models import Recommender, Unified
from mmllmrec.seed import seed_everything
from tests.towers import sensing_world, tiny_preset, tiny_world


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    return tiny_preset(tmp_path_factory.mktemp("towers"))


@pytest.fixture
def model(preset):
    train, catalog = tiny_world()
    seed_everything(5)
    return Unified.from_preset(preset, data=train, catalog=catalog, dim=16)


def lora(model, part="lora_"):
    return {n: p for n, p in model.named_parameters() if part in n}


def wake(model):
    """B = 0 at the start, where A can change nothing: give it values."""
    with torch.no_grad():
        for p in lora(model, "lora_B").values():
            p.normal_(std=0.3)
        model.history_tower.out.weight.normal_(std=0.3)


def everything(model):
    return Batch(torch.tensor(model.train_data.users), torch.tensor(model.train_data.items))


def part(model):
    """Every other event: the rest is the users' history."""
    return Batch(torch.tensor(model.train_data.users[::2]), torch.tensor(model.train_data.items[::2]))


def dead_after_a_step(model):
    """Trainable parameters that no term reaches; over some draws of ID dropout, and of what a history keeps."""
    model.train()
    model.id_dropout = 0.5
    for _ in range(4):
        sum(model.loss(part(model)).values()).backward()
    return [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.abs().sum() > 0]


def test_exactly_the_intended_parameters_train(model):
    towers = ("backbone.vision.", "backbone.language.")
    for name, p in model.named_parameters():
        assert p.requires_grad == (not name.startswith(towers) or "lora_" in name), name
    # two vision blocks with three adapted weights each, two language layers with seven each; A and B
    assert len(lora(model)) == 2 * (2 * 3 + 2 * 7)


def test_the_loss_reaches_every_trainable_parameter(model):
    wake(model)
    assert dead_after_a_step(model) == []


def test_every_lora_factor_perturbed_changes_the_output(model):
    wake(model)
    before = model.embed()[1]
    for name, p in lora(model).items():
        kept = p.detach().clone()
        with torch.no_grad():
            p.add_(0.5 * torch.randn(p.shape))
        assert (model.embed()[1] - before).abs().max() > 1e-6, name
        with torch.no_grad():
            p.copy_(kept)


def test_merged_equals_unmerged(model):
    wake(model)
    apart = model.embed()[1]
    merged = copy.deepcopy(model)
    merged.backbone.vision = merged.backbone.vision.merge_and_unload()
    merged.backbone.language = merged.backbone.language.merge_and_unload()
    assert not lora(merged)
    torch.testing.assert_close(merged.embed()[1], apart, atol=1e-5, rtol=0)


def test_training_leaves_the_base_alone(model, preset):
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    start = model.embed()[1]
    for _ in range(3):
        optimiser.zero_grad()
        model.train()
        sum(model.loss(everything(model)).values()).backward()
        optimiser.step()
    assert (model.embed()[1] - start).abs().max() > 1e-3
    base = model.backbone.vision.unload()
    assert weights_hash(base) == load_vision(preset.vision).hash == model._vision.hash


def test_saved_and_loaded_again_gives_the_same_scores(model, tmp_path):
    wake(model)
    users = np.arange(model.n_users)
    folder = model.save_pretrained(tmp_path / "mine")
    assert (folder / "adapters" / "vision" / "adapter_config.json").is_file()
    for again in (Recommender, Unified):
        loaded = again.from_pretrained(folder, catalog=model.catalog)
        torch.testing.assert_close(loaded.score(users), model.score(users), atol=0, rtol=0)
    with pytest.raises(DataError, match="pass catalog="):
        Recommender.from_pretrained(folder)
    (folder / "adapters" / "language" / "adapter_model.safetensors").unlink()
    with pytest.raises(DataError, match=r"adapter_model\.safetensors is missing"):
        Recommender.from_pretrained(folder, catalog=model.catalog)


def test_a_cold_item_has_no_id_and_an_absent_picture_no_influence(model):
    model.eval()
    with torch.no_grad():
        model.item_ids.weight[5].fill_(50.0)
        model.bias[5] = 50.0  # item 5 is cold
    before = model.embed()[1]
    content = unit(model.content(torch.arange(model.n_items)).fused)
    torch.testing.assert_close(before[5, :-1], content[5], atol=1e-5, rtol=0)
    assert before[5, -1] == model.absent_bias + model.cold_offset
    model.items.raw["image"][2] = 200  # item 2 has no picture
    torch.testing.assert_close(model.embed()[1][2], before[2], atol=1e-6, rtol=0)
    weights = model.content(torch.tensor([2, 4, 6])).weights
    assert weights[0, 1] == 0 and weights[1, 2] == 0 and (weights[2] == 0).all()


def test_token_rows_hold_what_is_present(model):
    rows = model.items.tokens
    assert [(r == SOFT).sum().item() for r in rows[[0, 2, 6]]] == [2, 0, 0]
    for row in rows:
        valid = row[row != PAD]
        assert valid[-1] == READ and (valid == READ).sum() == 1
    assert model.items.words.any(1).tolist() == [n not in (4, 6) for n in range(model.n_items)]


def test_one_by_one_equals_the_batch(model):
    model.eval()
    every = model.content(torch.arange(model.n_items)).fused
    for i in range(model.n_items):
        torch.testing.assert_close(model.content(torch.tensor([i])).fused[0], every[i], atol=1e-5, rtol=1e-4)


def test_knocked_out_content_changes_only_what_read_it(model):
    whole = model.embed()[1]
    blind = model.with_catalog(model.catalog.without("image")).embed()[1]
    moved = (whole - blind).abs().max(1).values > 1e-6
    assert moved.tolist() == [n not in (2, 6) for n in range(model.n_items)]
    torch.testing.assert_close(model.embed()[1], whole, atol=0, rtol=0)
    still = model.settled().with_catalog(model.catalog.without("image"))
    torch.testing.assert_close(still.embed()[1], blind, atol=0, rtol=0)


def test_a_user_without_events_likes_what_is_popular(model):
    torch.testing.assert_close(model.score(np.array([3]))[0], model.embed()[1][:, -1], atol=0, rtol=0)


@pytest.mark.parametrize("by_item", [False, True])
def test_the_loss_is_the_naive_one(model, by_item):
    model.eval()
    model.id_dropout, model.mix = 0.0, 0.0  # with mix=0 a user whom training knows is its ID
    with torch.no_grad():
        model.bias.normal_()
        model.user_ids.weight.normal_()
    batch = everything(model)
    batch.by_item = by_item
    train, size = model.train_data, len(batch)
    users, items = model.embed()
    values = []
    for u, i in zip(batch.users.tolist(), batch.items.tolist(), strict=True):
        total = 0.0
        for j in sorted(set(batch.items.tolist())):
            if j != i and train.csr[u, j]:
                continue
            share = train.item_counts[j] / len(train)
            chance = 1.0 if by_item else 1 - (1 - share) ** size  # blocks of items are a uniform sample
            total += np.exp(float(users[u] @ items[j])) / chance
            if j == i:
                own = np.exp(float(users[u] @ items[i])) / chance
        values.append(-np.log(own / total))
    assert float(model.loss(batch)["softmax"].detach()) == pytest.approx(np.mean(values), abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "bert"])
def test_layers_in_two_parts_are_the_whole_model(family):
    import transformers as hf

    seed_everything(3)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes |= {"vocab_size": 13} | ({} if family == "bert" else {"num_key_value_heads": 2})
    kind, config = {
        "llama": (hf.LlamaModel, hf.LlamaConfig),
        "qwen2": (hf.Qwen2Model, hf.Qwen2Config),
        "bert": (hf.BertModel, hf.BertConfig),
    }[family]
    extra = {"add_pooling_layer": False} if family == "bert" else {}
    whole = kind(config(**sizes), **extra).eval()
    mask = torch.arange(7) < torch.tensor([7, 5, 2])[:, None]
    x = whole.get_input_embeddings()(torch.randint(0, 13, (3, 7)))
    expected = whole(inputs_embeds=x, attention_mask=mask.long()).last_hidden_state
    for first in (1, 2):
        below = layers_of(whole, 0, first)(inputs_embeds=x, attention_mask=mask.long()).last_hidden_state
        above = layers_of(whole, first)(inputs_embeds=below, attention_mask=mask.long()).last_hidden_state
        torch.testing.assert_close(above[mask], expected[mask], atol=1e-6, rtol=0)
        assert (below[mask] - expected[mask]).abs().max() > 1e-3
    with pytest.raises(DataError, match="enter inside a Linear"):
        layers_of(torch.nn.Linear(2, 2), 1)


def test_what_is_kept_of_frozen_layers_changes_nothing(preset):
    train, catalog = tiny_world()
    seed_everything(5)
    model = Unified.from_preset(replace(preset, enter=1), data=train, catalog=catalog, dim=16)
    wake(model)
    model.eval()
    assert {n.split("layers.")[1][0] for n in lora(model) if "language" in n} == {"1"}
    kept = model.embed()[1]
    assert model.items.states is not None
    model.items.states = None  # computed anew for each batch
    torch.testing.assert_close(model.embed()[1], kept, atol=1e-6, rtol=0)
    with pytest.raises(DataError, match="language tower has 2 layers; give 0 to 1"):
        Unified.from_preset(replace(preset, enter=2), data=train, catalog=catalog)


@pytest.mark.parametrize("look", [1, 2])
def test_the_cached_trainer_starts_where_the_other_does(preset, look):
    train, catalog = tiny_world()
    made = {}
    for trainer in ("end_to_end", "cached"):
        seed_everything(5)
        made[trainer] = Unified.from_preset(
            replace(preset, cached=(look, 1)), data=train, catalog=catalog, dim=16, trainer=trainer
        )
    cached = made["cached"]
    # frozen layers are run once: what the vision tower says in its upper layers goes on exactly from what is kept
    pooled, patches = cached.backbone.look(cached.items.raw["image"], cached.items.seen)
    expected = made["end_to_end"].backbone.look(cached.items.raw["image"])
    torch.testing.assert_close(pooled, expected[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(patches, expected[1], atol=1e-6, rtol=0)
    assert {n.split("resblocks.")[1][0] for n in lora(cached) if "vision" in n} == ({"1"} if look == 1 else set())
    with pytest.raises(DataError, match="trainer='both'"):
        Unified.from_preset(preset, data=train, catalog=catalog, trainer="both")


def test_items_are_read_once_for_as_long_as_nothing_moves(preset, monkeypatch):
    train, catalog = tiny_world()
    seed_everything(5)
    model = Unified.from_preset(preset, data=train, catalog=catalog, dim=16)
    wake(model)
    read = []
    whole = Unified.content
    monkeypatch.setattr(Unified, "content", lambda self, index: read.append(len(index)) or whole(self, index))

    def reads(one):
        read.clear()
        items = one.embed()[1]
        return sum(read), items

    every, before = reads(model)
    assert every == len(catalog) and reads(model)[0] == 0 and torch.equal(reads(model)[1], before)
    blind = model.with_catalog(catalog.without("image"))
    assert reads(blind)[0] == every and reads(blind)[0] == 0 and reads(model)[0] == 0
    optimiser = torch.optim.AdamW(model.parameter_groups(1e-2), fused=True)
    for moving in (list(model.parameters()), [p for n, p in model.named_parameters() if "lora_B" in n]):
        model.train()
        optimiser.zero_grad()
        sum(model.loss(everything(model)).values()).backward()
        for p in model.parameters():
            p.grad = p.grad if any(p is q for q in moving) else None
        optimiser.step()
        count, after = reads(model)
        assert count == every and not torch.equal(after, before)
        before = after
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict({k: v + 0.01 if v.is_floating_point() else v for k, v in weights.items()})
    assert reads(model)[0] == every


def test_sound_and_sensors_come_through_the_same_door(preset):
    train, catalog = sensing_world()
    seed_everything(5)
    model = Unified.from_preset(preset, data=train, catalog=catalog, dim=16)
    wake(model)
    assert model.modalities == ("image", "text", "audio", "sensor", "taste")
    assert model.paths == ("early", "image", "text", "audio", "sensor", "taste")
    # a soft token each, of the items that have it
    for number, m in enumerate(("audio", "sensor", "taste"), start=1):
        counts = (model.items.tokens == place(number)).sum(1)
        assert counts.tolist() == catalog.present(m).astype(int).tolist()
    whole = model.embed()[1]
    for m in ("audio", "sensor", "taste"):
        moved = (whole - model.with_catalog(catalog.without(m)).embed()[1]).abs().amax(1) > 1e-6
        assert moved.tolist() == catalog.present(m).tolist(), m
    # attention to the one token of a table of features is the same whatever is asked: rounding decides
    alone = {f"backbone.resamplers.taste.attend.{q}_proj_weight" for q in "qk"}
    assert set(dead_after_a_step(model)) <= alone


def test_new_items_are_read_as_old_ones_without_an_event(preset):
    """A model that meets two items after training scores as one that was built with them, weights put in by hand."""
    train, catalog = sensing_world()
    late = Catalog(catalog.dataset.select([0, 3]), IdMap(["i0", "i3"]), features={"taste": np.ones((2, 6))})
    rows = late.dataset.remove_columns("item_id").add_column("item_id", ["n0", "n1"])
    late = Catalog(rows, IdMap(["n0", "n1"]), features={"taste": catalog.features["taste"][[0, 3]]})
    seed_everything(5)
    model = Unified.from_preset(preset, data=train, catalog=catalog, dim=16)
    wake(model)
    with torch.no_grad():
        model.bias.normal_()
        model.absent_bias.fill_(0.3)
    grown = model.add_items(late)
    assert grown.train_data.item_ids.ids[-2:] == ["n0", "n1"] and model.n_items == 11
    users = np.arange(7)
    torch.testing.assert_close(grown.score(users)[:, :11], model.score(users), atol=1e-5, rtol=0)
    q = grown.embed()[1]
    content = unit(model.content(torch.tensor([0, 3])).fused)
    torch.testing.assert_close(q[11:, :-1], content, atol=1e-5, rtol=0)
    torch.testing.assert_close(q[11:, -1], torch.full((2,), 0.3 + model.cold_offset))
    with pytest.raises(DataError, match="'i0' appears twice"):
        model.add_items(catalog)


@pytest.mark.parametrize("paths", [("early",), ("image", "text"), ("text",)])
def test_paths_that_are_left_out_have_no_say(preset, paths):
    train, catalog = tiny_world()
    model = Unified.from_preset(preset, data=train, catalog=catalog, dim=16, paths=paths, fusion="concat")
    content = model.content(torch.arange(model.n_items))
    assert tuple(content.vectors) == paths
    whole = model.embed()[1]
    blind = (whole - model.with_catalog(catalog.without("image")).embed()[1]).abs().amax(1) > 1e-6
    reads = paths != ("text",)
    assert blind.tolist() == [reads and n not in (2, 6) for n in range(model.n_items)]
    with pytest.raises(DataError, match="choose among"):
        Unified.from_preset(preset, data=train, catalog=catalog, paths=("smell",))


def test_the_run_card_names_towers_prompt_and_content(model):
    about = model.provenance()
    assert about["prompt"] == {"id": "item", "version": 1, "hash": load_prompt("item").hash}
    assert about["base"] == model.base_hash and about["catalog"] == model.catalog.hash


@pytest.mark.slow
def test_minilm_is_a_real_language_model_and_trains_in_every_layer():
    train, catalog = tiny_world()
    seed_everything(5)
    model = Unified.from_preset("minilm", data=train, catalog=catalog, dim=16, trainer="cached")
    language, tokenizer = model._language.model.get_base_model(), model._language.tokenizer
    said = ["a space war among the stars", "battles of starships far from earth", "a recipe for onion soup"]
    batch = tokenizer(said, padding=True, return_tensors="pt")
    with torch.no_grad():
        h = language(**batch).last_hidden_state * batch["attention_mask"][..., None]
    means = torch.nn.functional.normalize(h.sum(1), dim=-1)
    assert means[0] @ means[1] > 0.3 + means[0] @ means[2]
    model.train()
    sum(model.loss(everything(model)).values()).backward()
    reached = {n.split("layer.")[1][0] for n, p in lora(model).items() if "language" in n and p.grad is not None}
    assert reached == set("012345")
    assert model.backbone.resampler.queries.grad.abs().sum() > 0
    assert model.fit_defaults["stages"] == {"lora": 0.9} and model.fit_defaults["eval_every"] == 20


def test_each_group_has_its_own_learning_rate_and_keeps_it_when_saved(preset, tmp_path):
    train, catalog = tiny_world()
    model = Unified.from_preset(preset, data=train, catalog=catalog, dim=16, lr_ids=3.0, lr_lora=0.25)
    folder = model.save_pretrained(tmp_path / "mine")
    for one in (model, Unified.from_pretrained(folder, catalog=catalog)):
        groups = {g["name"]: g for g in one.parameter_groups(0.1)}
        assert {n: g["lr"] for n, g in groups.items()} == pytest.approx({"ids": 0.3, "heads": 0.1, "lora": 0.025})
        joins = [*one.backbone.resampler.parameters(), one.backbone.read]
        assert {id(p) for p in groups["lora"]["params"]} == {id(p) for p in (*lora(one).values(), *joins)}
        assert {id(p) for p in groups["ids"]["params"]} == {
            id(p) for p in (one.bias, one.user_ids.weight, one.item_ids.weight)
        }
    for wrong in ({"lr_ids": -1.0}, {"lr_lora": float("nan")}):
        with pytest.raises(DataError, match=rf"{next(iter(wrong))}=.*a multiple of fit's lr"):
            Unified.from_preset(preset, data=train, catalog=catalog, **wrong)


@pytest.fixture
def ran(monkeypatch):
    """How many rows the frozen layers of either tower were run on, since it was last emptied."""
    rows = {"below": 0, "seen": 0}
    for name in rows:
        whole = getattr(Backbone, name)

        def spy(self, x, name=name, whole=whole):
            rows[name] += len(x)
            return whole(self, x)

        monkeypatch.setattr(Backbone, name, spy)
    return rows


def changed(catalog, column, item, value):
    rows = catalog.dataset[column][:]
    rows[item] = value
    table = catalog.dataset.to_dict() | {column: rows}
    return Catalog(type(catalog.dataset).from_dict(table, features=catalog.dataset.features), catalog.item_ids)


def test_with_a_store_only_what_is_new_is_read_and_nothing_changes(preset, tmp_path, ran):
    train, catalog = tiny_world()
    frozen = replace(preset, enter=1, look=1)

    def build(catalog=catalog, preset=frozen, store=tmp_path / "store", **options):
        ran.update(below=0, seen=0)
        seed_everything(5)
        return Unified.from_preset(preset, data=train, catalog=catalog, dim=16, store=store, **options)

    def assert_like_without(made, catalog=catalog, **options):
        without = build(catalog, store=None, **options)
        torch.testing.assert_close(made.embed()[1], without.embed()[1], atol=1e-6, rtol=0)
        for one in (made, without):
            torch.manual_seed(0)
            one.train().zero_grad()
            sum(one.loss(part(one)).values()).backward()
        for (name, p), q in zip(made.named_parameters(), without.parameters(), strict=True):
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-5, msg=name)

    first = build()
    distinct = len({tuple(r.tolist()) for r in first.items.tokens})
    assert ran == {"below": distinct, "seen": 9}  # two items have no picture
    assert_like_without(first)
    second = build()
    assert ran == {"below": 0, "seen": 0}
    assert_like_without(second)
    build(preset=replace(frozen, rank=2))  # adapters lie above
    assert ran == {"below": 0, "seen": 0}

    said = changed(catalog, "text", 3, "green lamp of red vase .")
    made = build(said)
    assert ran == {"below": 1, "seen": 0}
    assert_like_without(made, said)
    shown = changed(catalog, "image", 3, catalog.dataset["image"][8])
    assert build(shown).catalog is shown and ran == {"below": 0, "seen": 0}  # item 8's picture is known
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (9, 99, 199)).save(buffer, "PNG")
    shown = changed(catalog, "image", 3, {"bytes": buffer.getvalue(), "path": None})
    made = build(shown)
    assert ran == {"below": 0, "seen": 1}
    assert_like_without(made, shown)

    (tmp_path / "other.jinja").write_text(
        "---\nid: other\nversion: 1\ninputs: [title, text]\n---\nred item <image> {{ title }} {{ text }}"
    )
    build(prompt=str(tmp_path / "other.jinja"))
    assert ran["seen"] == 0 and ran["below"] >= distinct - 1
    build(preset=replace(frozen, look=2))
    assert ran == {"below": 0, "seen": 9}


def test_a_store_is_no_part_of_a_saved_model_and_goes_on_with_a_trained_one(preset, tmp_path, ran):
    train, catalog = tiny_world()
    seed_everything(5)
    frozen = replace(preset, enter=1, look=1)
    model = Unified.from_preset(frozen, data=train, catalog=catalog, dim=16, store=Store(tmp_path / "store"))
    wake(model)
    folder = model.save_pretrained(tmp_path / "mine")
    assert "store" not in (folder / "config.json").read_text()
    ran.update(below=0, seen=0)
    said = changed(catalog, "text", 3, "green lamp of red vase .")
    other = model.with_catalog(said)
    assert ran == {"below": 1, "seen": 0}
    loaded = Unified.from_pretrained(folder, catalog=said)
    torch.testing.assert_close(other.embed()[1], loaded.embed()[1], atol=1e-6, rtol=0)
    assert set(Store(tmp_path / "store").info()["name"]) == {"language:below:1", "clip:below:1"}


def test_random_towers_are_drawn_at_building_and_nothing_of_the_pretrained_ones_is_left():
    data = atelier(n_items=31, n_users=17, n_events=200, size=8)

    def towers(seed, **options):
        seed_everything(seed)
        model = Unified.from_preset("nano", data=data.interactions, catalog=data.catalog, **options)
        adapted = ("lora_", "bias", "ln_", "norm", "layernorm")
        return model, {
            n: p.detach().clone()
            for n, p in model.backbone.named_parameters()
            if n.startswith(("vision.", "language.")) and not any(a in n for a in adapted)
        }

    (pretrained, whole), (one, a), (same, b), (other, c) = (
        towers(0),
        *(towers(s, random_weights=True) for s in (0, 0, 1)),
    )
    assert a.keys() == whole.keys()
    for name, p in a.items():
        assert torch.equal(p, b[name]) and not torch.equal(p, c[name]) and not torch.equal(p, whole[name]), name
        assert 0.05 < float(p.std() / whole[name].std()) < 20, name
    assert one.base_hash == same.base_hash and len({m.base_hash for m in (pretrained, one, other)}) == 3
    assert not torch.equal(one.backbone.read, pretrained.backbone.read)
    assert torch.isfinite(one.all_content()).all() and one.config["random_weights"]


def test_a_sensors_channels_can_be_missing_at_scoring_time():
    data = atelier(n_items=31, n_users=17, n_events=200, size=8, missing=0.0)
    seed_everything(0)
    model = Unified.from_preset("nano", data=data.interactions, catalog=data.catalog, modalities=("text", "sensor"))
    with model.evaluating():
        whole = model.all_content()
        part, none, absent = (
            model.with_catalog(c).all_content()
            for c in (
                data.catalog.without_channels("sensor", 0.5, seed=0),
                data.catalog.without_channels("sensor", 1.0, seed=0),
                data.catalog.without("sensor"),
            )
        )
    assert all(torch.isfinite(x).all() for x in (part, none, absent))
    assert not torch.allclose(part, whole) and not torch.allclose(none, part)


def test_while_the_towers_wait_their_states_are_computed_once(model, monkeypatch):
    """With the same content; anew when an adapter was written to, or another catalogue is read."""
    wake(model)
    model.train()
    index = torch.tensor([3, 0, 7, 5])
    moving = model.content(index).fused.detach()
    assert model.stood is None
    for p in model._moving:
        p.requires_grad_(False)
    calls, towers = [], model.backbone.towers
    monkeypatch.setattr(model.backbone, "towers", lambda items: calls.append(len(items)) or towers(items))
    still = model.content(index).fused
    torch.testing.assert_close(still, moving, atol=1e-5, rtol=1e-4)
    assert still.requires_grad and calls == [model.n_items]  # heads train on it
    model.content(index.flip(0))
    assert calls == [model.n_items]
    with torch.no_grad():
        next(iter(lora(model, "lora_B").values())).add_(1.0)
    changed = model.content(index).fused
    assert len(calls) == 2 and (changed - still).abs().max() > 1e-3
    model.with_catalog(model.catalog.without("text")).train().content(index)
    assert len(calls) == 3

    # a measurement between two steps reads what is known, and nothing that is not so any more
    model.requires_grad_(True)
    with model.evaluating():
        torch.testing.assert_close(model.content(index).fused, changed, atol=1e-5, rtol=1e-4)
        assert len(calls) == 3
        with torch.no_grad():
            next(iter(lora(model, "lora_B").values())).add_(-1.0)
        torch.testing.assert_close(model.content(index).fused, still, atol=1e-5, rtol=1e-4)


def test_what_waiting_towers_said_is_forgotten_when_their_adapters_join(model):
    """A fused optimiser does not count what it writes, so a measurement after its step must not go by it."""
    wake(model)
    model.train()
    for p in model._moving:
        p.requires_grad_(False)
    sum(model.loss(everything(model)).values())
    assert model.stood is not None
    for p in model._moving:
        p.requires_grad_(True)
    adapters = list(lora(model).values())
    optimiser = torch.optim.AdamW(adapters, lr=0.1, fused=True)
    sum(model.loss(everything(model)).values()).backward()
    written = model._written
    optimiser.step()
    assert model._written == written and model.stood is None
    with model.evaluating():
        after = model.all_content()
        model.stood = model.read_last = None
        torch.testing.assert_close(model.all_content(), after)


def test_what_waiting_towers_say_is_nothing_of_encoders_that_train(preset):
    train, catalog = sensing_world()
    seed_everything(5)
    model = Unified.from_preset(preset, data=train, catalog=catalog, dim=16)
    with torch.no_grad():
        before = model.backbone.towers(model.items)
        for p in (*model.backbone.senses.parameters(), *model.backbone.resamplers.parameters()):
            p.add_(0.5)
        after = model.backbone.towers(model.items)
        whole = model.backbone.states(model.items)
    assert set(before) == {"image", "text", "joint"}
    assert all(torch.equal(before[k][0], after[k][0]) for k in before)
    assert not torch.equal(whole["joint"][0], after["joint"][0])  # senses are read where they may be


def test_the_cached_trainer_waits_by_default(preset):
    train, catalog = tiny_world()
    model = Unified.from_preset(replace(preset, cached=(1, 1)), data=train, catalog=catalog, dim=16, trainer="cached")
    assert model.fit_defaults["stages"] == {"lora": 0.75} and "stages" not in Unified.fit_defaults
