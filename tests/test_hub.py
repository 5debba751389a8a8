"""Pushing to the hub, against a folder that stands for it."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from mmllmrec.data.atelier import atelier
from mmllmrec.data.interactions import DataError
from mmllmrec.features import adapters
from mmllmrec.models import BPR, Recommender, Unified
from mmllmrec.runcard import RunCard
from mmllmrec.seed import seed_everything
from tests.towers import tiny_preset, tiny_world


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in place of the hub: ``create_repo`` makes a folder in it, ``upload_folder`` copies; returns folder and
    what was asked."""
    asked = []

    def create_repo(self, repo_id, *, private, exist_ok):
        asked.append({"repo_id": repo_id, "private": private, "exist_ok": exist_ok, "token": self.token})
        (tmp_path / "hub" / repo_id).mkdir(parents=True, exist_ok=True)
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, tmp_path / "hub" / repo_id, dirs_exist_ok=True)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    return tmp_path / "hub", asked


@pytest.fixture(scope="module")
def unified(tmp_path_factory):
    train, catalog = tiny_world()
    seed_everything(5)
    return Unified.from_preset(tiny_preset(tmp_path_factory.mktemp("towers")), data=train, catalog=catalog, dim=16)


def card_of(model):
    return RunCard(
        kind="fit",
        name=model.name,
        seed=3,
        data="tiny",
        split={"name": "random_per_user", "hash": "abcd", "train": 30, "valid": 4, "users": 7},
        model={"class": type(model).__name__, **model.provenance()},
        settings={"command": "mmllmrec finetune config.json"},
        metrics={"ndcg@20": 0.25, "Unified | all | ndcg@20": [0.25, 0.2, 0.3]},
    )


def test_a_model_goes_up_with_its_card_and_comes_back(unified, hub):
    place, asked = hub
    assert unified.push_to_hub("me/mine", card=card_of(unified), token="t") == "https://hub/me/mine"
    assert asked == [{"repo_id": "me/mine", "private": True, "exist_ok": True, "token": "t"}]
    folder = place / "me" / "mine"
    again = Recommender.from_pretrained(folder, catalog=unified.catalog)
    assert (again.score([0, 1]) == unified.score([0, 1])).all()
    about = json.loads((folder / "card.json").read_text())
    assert about["split"]["hash"] == "abcd" and about["model"]["prompt"]["hash"] == unified.prompt.hash
    assert about["model"]["base"] == unified.base_hash and about["metrics"]["Unified | all | ndcg@20"] == [
        0.25,
        0.2,
        0.3,
    ]
    assert [b["rank"] for b in about["base"]] == [3, 3] and about["command"] == "mmllmrec finetune config.json"
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "mmllmrec" and "lora" in card.data.tags
    assert card.data.base_model is None  # a folder is no name on the hub
    assert "| Unified, all, ndcg@20 | 0.2500 | 0.2000 to 0.3000 |" in card.text and "abcd" in card.text
    assert str(folder) not in card.text and "/tmp" not in card.text


def test_a_towers_adapter_goes_up_without_events_or_ids(unified, hub):
    place, _ = hub
    adapters.push(unified.backbone.language, "me/words", card=card_of(unified), private=False)
    names = {p.name for p in (place / "me" / "words").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "card.json", "README.md"}
    adapters.load(unified.backbone.language, place / "me" / "words")


def test_base_and_revision_of_a_hub_model_are_named(unified, hub, monkeypatch):
    config = unified.backbone.language.peft_config["default"]
    monkeypatch.setattr(config, "base_model_name_or_path", "Qwen/Qwen2.5-0.5B")
    monkeypatch.setattr(config, "revision", "060db6499f32faf8b98477b0a26969ef7d8b9987")
    adapters.push(unified.backbone.language, "me/words", card=card_of(unified))
    card = ModelCard.load(hub[0] / "me" / "words" / "README.md")
    assert card.data.base_model in ("Qwen/Qwen2.5-0.5B", ["Qwen/Qwen2.5-0.5B"]) and "060db649" in card.text


def test_a_classical_model_goes_up_too(hub):
    train, _ = tiny_world()
    model = BPR(train, dim=5)
    model.push_to_hub("me/bpr", card=card_of(model))
    assert "lora" not in ModelCard.load(hub[0] / "me" / "bpr" / "README.md").data.tags
    with pytest.raises(DataError, match="give owner/name"):
        model.push_to_hub("bpr", card=card_of(model))


@pytest.mark.parametrize("name", ["atelier-q1", "atelier-q2", "atelier-q3", "atelier-q4"])
def test_the_adapters_behind_the_tables_fit_their_base(name):
    folder = Path(__file__).parent.parent / "adapters" / name
    world = atelier(n_items=31, n_users=17, n_events=200, size=8)
    trainer = "end_to_end" if name == "atelier-q1" else "cached"
    model = Unified.from_preset("nano", data=world.interactions, catalog=world.catalog, trainer=trainer)
    card = json.loads((folder / "card.json").read_text())
    about = model.provenance()
    assert (card["model"]["base"], card["model"]["prompt"]) == (about["base"], about["prompt"])
    assert card["split"]["hash"] and card["command"].startswith(f"mmllmrec bench {name[-2:]}")
    for tower in ("vision", "language"):
        part = getattr(model.backbone, tower)
        adapters.load(part, folder / tower)
        assert any(p.abs().max() > 0 for n, p in part.named_parameters() if "lora_B" in n)
        config = json.loads((folder / tower / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "nano"
    report = RunCard.load(Path(__file__).parent.parent / f"notebooks/cards/{name[-2:]}/seed0/report/card.json")
    shown = card["metrics"]["Unified | cold | ndcg@20"]
    assert (
        shown == report.metrics["Unified | cold | ndcg@20"] and f"{shown[0]:.4f}" in (folder / "README.md").read_text()
    )
