"""Fine-tuning from a config: what it refuses, and a run end to end in one process, in two, and gone on with."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from PIL import Image

import mmllmrec as mm
from mmllmrec.data.interactions import DataError
from mmllmrec.models import Unified
from mmllmrec.runcard import RunCard
from mmllmrec.training import finetune
from tests.towers import tiny_preset

HERE = Path(__file__).parent
CLI = ["-m", "mmllmrec.cli", "finetune"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A shop of 13 users and 19 items, the tiny towers, and a config that puts them together."""
    place = tmp_path_factory.mktemp("shop")
    rng = np.random.default_rng(0)
    (place / "images").mkdir()
    events = [(f"u{u}", f"i{i}") for u in range(13) for i in rng.choice(19, 7, replace=False)]
    pd.DataFrame(events, columns=["user_id", "item_id"]).to_csv(place / "interactions.csv", index=False)
    words = [f"{('red', 'blue', 'green')[i % 3]} {('lamp', 'vase', 'bowl')[i // 3 % 3]}" for i in range(19)]
    items = pd.DataFrame({"item_id": [f"i{i}" for i in range(19)], "title": words, "text": words})
    items["image"] = [f"{i}.png" if i % 4 else "" for i in range(19)]
    items.to_csv(place / "items.csv", index=False)
    for i in range(19):
        if i % 4:
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / "images" / f"{i}.png")
    tiny_preset(place)
    asked = {
        "data": {"name": "folder", "path": str(place)},
        "split": {"kind": "random_per_user", "options": {"seed": 1}},
        "model": {"vision": str(place / "clip"), "language": str(place / "language"), "rank": 3, "tokens": 16},
        "fit": {"epochs": 2, "item_batch": 6, "eval_every": 1},
        "seed": 4,
    }
    asked["model"] |= {"soft": 2, "dim": 16, "id_dropout": 0.0, "history_cut": 0.0}
    (place / "config.json").write_text(json.dumps(asked))
    return place / "config.json"


def call(*command):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=HERE.parent)
    return done


def test_the_default_config_is_whole_and_known(tmp_path):
    done = call(*CLI, "--init", tmp_path / "mine.json")
    assert done.returncode == 0, done.stderr
    assert finetune.read(tmp_path / "mine.json") == finetune.default()
    assert finetune.check({})["fit"] == Unified.fit_defaults
    again = call(*CLI, "--init", tmp_path / "mine.json")
    assert again.returncode == 2 and "is there already" in again.stderr


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"modle": {}}, r"modle: unknown key; a config takes \['data', 'fit', 'model', 'seed', 'split'\]"),
        ({"data": {"nam": "atelier"}}, "data.nam: unknown key"),
        ({"split": {"kind": "cold"}}, "unknown split 'cold'"),
        ({"split": {"kind": "temporal", "options": {"shuffle": 1}}}, "split.options.shuffle: unknown key"),
        ({"model": {"preset": "giant"}}, "unknown preset 'giant'"),
        ({"model": {"rnak": 8}}, "model.rnak: unknown key; model takes .*'rank'"),
        ({"fit": {"learning_rate": 1}}, "fit.learning_rate: unknown key; fit takes .*'lr'"),
        ({"fit": {"folder": "x"}}, "fit.folder: unknown key"),
        ({"seed": "zero"}, "seed='zero': a whole number"),
        ({"fit": []}, "fit: a JSON object"),
        ([], "a config is a JSON object"),
    ],
)
def test_what_a_config_cannot_hold_is_named(tmp_path, given, says):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(given))
    with pytest.raises(DataError, match=rf"config\.json: {says}|{says}"):
        finetune.read(path)


def test_a_broken_file_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json is not JSON"):
        finetune.read(tmp_path / "config.json")
    with pytest.raises(DataError, match="write one with `mmllmrec finetune --init"):
        finetune.read(tmp_path / "none.json")


@pytest.mark.parametrize("name", finetune.LAUNCHERS)
def test_shipped_launcher_configs_are_accelerates_own(name):
    found = load_config_from_file(str(finetune.launcher(name)))
    precision = {"cpu2": "no", "bf16": "bf16", "fsdp": "bf16"}[name]
    assert found.mixed_precision == precision and found.use_cpu == (name == "cpu2")
    assert (found.fsdp_config or {}).get("fsdp_version") == (2 if name == "fsdp" else None)
    known = {action.dest for action in launch_command_parser()._actions}
    assert set(found.fsdp_config or {}) <= known
    with pytest.raises(DataError, match="unknown launcher config"):
        finetune.launcher("tpu")


@pytest.mark.slow
def test_accelerate_launch_with_the_shipped_config_starts_two_processes(config, tmp_path):
    path = finetune.launcher("cpu2")
    done = call("-m", "accelerate.commands.launch", "--config_file", path, *CLI, config, "--folder", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert RunCard.load(tmp_path / "two" / "card.json").settings["processes"] == 2


def test_help_says_how_to_launch():
    told = call(*CLI, "--help").stdout
    assert "accelerate launch" in told and "--launcher" in told and "fsdp" in told


@pytest.mark.slow
def test_one_process_two_processes_and_one_gone_on(config, tmp_path):
    one = call(*CLI, config, "--folder", tmp_path / "one")
    assert one.returncode == 0, one.stderr
    two = call(*TORCHRUN, *CLI, config, "--folder", tmp_path / "two")
    assert two.returncode == 0, two.stderr
    assert one.stdout.count("run card:") == two.stdout.count("run card:") == 1  # only one process prints
    a, b = (RunCard.load(tmp_path / n / "card.json") for n in ("one", "two"))
    assert (a.settings["processes"], b.settings["processes"]) == (1, 2)
    assert a.metrics["ndcg@20"] == pytest.approx(b.metrics["ndcg@20"], abs=1e-3)
    mean, low, high = a.metrics["Unified | all | ndcg@20"][:3]
    assert low < mean < high and a.metrics["ndcg@20"] == pytest.approx(mean, abs=1e-3)
    assert a.settings["command"].startswith("mmllmrec finetune") and a.test_opened == 0
    whole = finetune.read(config)
    data = mm.load_dataset("folder", whole["data"]["path"])
    model = Unified.from_pretrained(tmp_path / "two" / "model", catalog=data.catalog)
    assert model.preset.rank == 3 and model.config["dim"] == 16
    for tower in ("vision", "language"):
        assert (tmp_path / "two" / "model" / "adapters" / tower / "adapter_model.safetensors").is_file()
    # cut off after the last checkpoint, before the model was written: it goes on and trains nothing again
    shutil.rmtree(tmp_path / "one" / "model")
    (tmp_path / "one" / "card.json").unlink()
    again = call(*CLI, config, "--folder", tmp_path / "one")
    assert again.returncode == 0, again.stderr
    c = RunCard.load(tmp_path / "one" / "card.json")
    assert c.model["weights"] == a.model["weights"] and (tmp_path / "one" / "model" / "model.safetensors").is_file()
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**json.loads(config.read_text()), "seed": 9}))
    refused = call(*CLI, other, "--folder", tmp_path / "one")
    assert refused.returncode == 2 and "holds a run of another config" in refused.stderr
