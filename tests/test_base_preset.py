"""The ``base`` preset, every line of its way: ViT-B-32 and Qwen2.5 shrunk to nothing, with random weights."""

import json
from dataclasses import replace

import open_clip
import pytest
import torch
from open_clip.factory import _MODEL_CONFIGS
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2Model

from mmllmrec.data.interactions import DataError
from mmllmrec.data.sampling import Batch
from mmllmrec.features.towers import load_language, load_vision
from mmllmrec.models import Recommender, Unified
from mmllmrec.models.unified import PRESETS
from mmllmrec.seed import seed_everything
from tests.towers import WORDS, tiny_world

ARCHITECTURE, TAG = PRESETS["base"].vision.split(":")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """``ViT-B-32-tiny``, known to open_clip, with weights in a file; a shrunken Qwen2 with a tokenizer in a folder."""
    folder = tmp_path_factory.mktemp("base")
    seed_everything(0)
    about = json.loads(json.dumps(open_clip.get_model_config(ARCHITECTURE)))
    about["embed_dim"] = 24
    about["vision_cfg"] |= {
        "layers": 2,
        "width": 128,
        "image_size": 64,
    }  # heads are 64 wide, patches 32, as in the model
    about["text_cfg"] |= {"layers": 1, "width": 16, "heads": 2, "vocab_size": 31, "context_length": 8}
    (folder / "configs").mkdir()
    (folder / "configs" / "ViT-B-32-tiny.json").write_text(json.dumps(about))
    before = dict(_MODEL_CONFIGS)
    open_clip.add_model_config(folder / "configs")
    clip = open_clip.create_model("ViT-B-32-tiny", require_pretrained=False)
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, folder / "vit.safetensors")
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(folder / "qwen")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=len(WORDS), num_key_value_heads=2, max_position_embeddings=256, **sizes)
    Qwen2Model(config).save_pretrained(folder / "qwen")
    yield folder
    _MODEL_CONFIGS.clear()
    _MODEL_CONFIGS.update(before)


@pytest.fixture(scope="module")
def preset(place):
    return replace(PRESETS["base"], vision=f"ViT-B-32-tiny:{place / 'vit.safetensors'}", language=str(place / "qwen"))


def test_the_names_are_of_towers_that_exist():
    """What the network would be asked for: open_clip lists the weights, and the hub id is one."""
    assert (ARCHITECTURE, TAG) in open_clip.list_pretrained()
    assert PRESETS["base"].language.count("/") == 1


def test_towers_are_loaded_with_their_weights(place, preset):
    vision, language = load_vision(preset.vision), load_language(preset.language)
    assert (vision.size, vision.pooled_width, vision.token_width) == (64, 24, 128)
    pooled, patches = vision.model(torch.rand(2, 3, 64, 64))
    assert pooled.shape == (2, 24) and patches.shape == (2, 4, 128)
    assert language.causal and language.width == 32 and language.model.config.model_type == "qwen2"
    with pytest.raises(DataError, match="cannot be loaded"):
        load_vision("ViT-B-32-tiny:no_such_weights")
    with pytest.raises(DataError, match="LoRA needs weights"):
        load_vision("ViT-B-32-tiny")


def test_a_step_is_taken_saved_and_loaded(preset, tmp_path):
    train, catalog = tiny_world()
    seed_everything(5)
    model = Unified.from_preset(preset, data=train, catalog=catalog, dim=16)
    adapted = {n.rpartition(".lora_A")[0].rpartition(".")[2] for n, _ in model.named_parameters() if "lora_A" in n}
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "c_fc"} <= adapted
    every = Batch(torch.tensor(train.users), torch.tensor(train.items))
    moving = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(moving, lr=1e-2)
    before = model.score([0, 1])
    for _ in range(2):  # B is zero at first, so A moves from the second step on
        model.train()
        optimiser.zero_grad()
        loss = sum(model.loss(every).values())
        loss.backward()
        optimiser.step()
    lora = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert torch.isfinite(loss) and all(p.grad is not None and p.grad.abs().sum() > 0 for p in lora.values())
    assert (model.score([0, 1]) - before).abs().max() > 1e-3
    folder = model.save_pretrained(tmp_path / "mine")
    again = Recommender.from_pretrained(folder, catalog=catalog)
    torch.testing.assert_close(again.score([0, 1]), model.score([0, 1]), atol=0, rtol=0)
