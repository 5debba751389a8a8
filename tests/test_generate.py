"""Generation with a local model: what is written, held to a schema, kept, and taken up again."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from mmllmrec.data.interactions import DataError
from mmllmrec.features import adapters
from mmllmrec.features.prompts import Prompt, load_prompt
from mmllmrec.features.towers import load_causal
from mmllmrec.language.generate import Generator, identity
from mmllmrec.language.schema import Grammar, allowed, spelling
from mmllmrec.shipped import shipped
from mmllmrec.training.causal import answer_loss
from tests.towers import random_causal

NANO = shipped("adapters/nano-base") / "language"
SAY = Prompt("say", 1, {"title": "text"}, "An item called {{ title }}.")
TITLES = ["Calm walnut vase", "Proud brass lamp of a long and winding road", "Bowl", "Tall clay clock, made by hand"]
ROWS = [{"title": t} for t in TITLES]
PROFILE = [{"title": t, "text": "", "seen": "", "evidence": []} for t in TITLES]


@pytest.fixture(scope="module")
def nano():
    return Generator.load("nano")


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    return str(random_causal(tmp_path_factory.mktemp("model") / "random"))


def test_a_batch_says_what_each_row_says_alone(nano):
    together = nano.generate(SAY, ROWS, max_tokens=12, progress=False)
    assert together == [nano.generate(SAY, [r], max_tokens=12, progress=False)[0] for r in ROWS]
    assert together == nano.generate(SAY, ROWS, max_tokens=12, batch_tokens=1, progress=False)
    ids = nano.ids(SAY.render(**ROWS[0]))
    with torch.no_grad():
        for _ in range(12):  # greedy, by hand
            ids.append(int(nano.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert together[0].text == nano.tokenizer.decode(ids[-12:]).strip() and together[0].tokens_out == 12


def test_likelihoods_are_the_models(nano):
    answers = [" lamp", " walnut vase, made by hand", " a"]
    found = nano.likelihoods(SAY, ROWS, answers, progress=False)
    for n, row in enumerate(ROWS):
        for a, answer in enumerate(answers):
            start, end = nano.ids(SAY.render(**row)), nano.tokenizer(answer, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                steps = torch.log_softmax(nano.model(input_ids=torch.tensor([start + end])).logits[0], dim=-1)
            expected = sum(float(steps[len(start) + k - 1, t]) for k, t in enumerate(end))
            assert float(found[n, a]) == pytest.approx(expected, abs=1e-4)
    single = nano.likelihoods(SAY, ROWS, [" lamp", " a"], progress=False)  # read off one pass
    torch.testing.assert_close(single, found[:, [0, 2]], atol=1e-4, rtol=1e-4)
    with pytest.raises(DataError, match="each with a token"):
        nano.likelihoods(SAY, ROWS, [""], progress=False)


@pytest.mark.parametrize("answers", [[" yes", " no"], [" a walnut vase", " no"]])
@pytest.mark.parametrize("tokens", [1, 200, 8192])
def test_what_rows_share_is_read_once(nano, monkeypatch, answers, tokens):
    ask = Prompt("ask", 1, {"history": "texts", "title": "text"}, "{{ history | join(' ') }} then {{ title }} taken?")
    rows = [{"history": TITLES[: 1 + h] * (1 + 2 * h), "title": t} for h in range(4) for t in TITLES]
    rows.append(rows[0])
    counted = []
    whole = Generator._read
    monkeypatch.setattr(
        Generator, "_read", lambda self, group, *rest: counted.append(group) or whole(self, group, *rest)
    )
    found = nano.likelihoods(ask, rows, answers, batch_tokens=tokens, progress=False)
    shared = [(size, len(some)) for group in counted for size, some in group if size]
    assert tokens == 1 or (shared and max(n for _, n in shared) > 3)
    monkeypatch.setattr("mmllmrec.data.sampling.SHARED", 10**6)  # every row by itself
    torch.testing.assert_close(found, nano.likelihoods(ask, rows, answers, progress=False), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("output", [None, {"type": "array", "items": {"type": "string"}, "maxItems": 3}])
def test_what_rows_share_is_read_once_before_writing_too(nano, monkeypatch, output):
    source = "{{ history | join(' ') }} and then {{ title }}"
    ask = Prompt("ask", 1, {"history": "texts", "title": "text"}, source, output=output)
    rows = [{"history": TITLES[: 2 + h] * (1 + 2 * h), "title": t} for h in range(4) for t in TITLES]
    counted = []
    whole = Generator._write
    monkeypatch.setattr(
        Generator, "_write", lambda self, group, *rest: counted.append(group) or whole(self, group, *rest)
    )
    found = nano.generate(ask, rows, max_tokens=20, batch_tokens=300, progress=False)
    shared = [len(some) for group in counted for size, some in group if size]
    assert shared and max(shared) > 3 and len({one.text for one in found}) > 3
    monkeypatch.setattr("mmllmrec.data.sampling.SHARED", 10**6)  # every row by itself
    assert found == nano.generate(ask, rows, max_tokens=20, batch_tokens=300, progress=False)


def test_what_a_model_should_learn_to_write_is_what_it_is_held_to(nano):
    prompt = load_prompt("item_profile")
    text = '{"attributes":["walnut","made by hand"],"audience":"for weddings","summary":"a walnut vase"}'
    matcher = Grammar(nano, prompt.output).start()
    for token in [*spelling(nano.tokenizer)(text), nano.tokenizer.eos_token_id]:
        assert allowed(matcher)[token]
        matcher.consume_token(token)
    plain = nano.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert not allowed(Grammar(nano, prompt.output).start())[plain[0]]  # it begins with a space
    assert spelling(nano.tokenizer)(" yes") == nano.tokenizer(" yes", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("tokens", [1, 3, 40, 400])
def test_any_model_writes_json_of_the_schema(untrained, tokens):
    model = Generator.load(untrained, context=600)
    found = model.generate(load_prompt("item_profile"), PROFILE, max_tokens=tokens, progress=False)
    for one in found:
        assert set(one.value) == {"attributes", "audience", "summary"} and json.loads(one.text) == one.value
        assert len(one.value["attributes"]) <= 6 and len(one.value["summary"]) <= 160
    assert any(one.cut for one in found) or tokens == 400
    options = {"sample": True, "temperature": 3.0, "max_tokens": tokens, "progress": False}
    words = Prompt("w", 1, {"title": "text"}, "{{ title }}", output={"enum": ["Yes", "not at all", 7]})
    assert {o.value for o in model.generate(words, ROWS, seed=1, **options)} <= {"Yes", "not at all", 7}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "format": "email"},
        {"type": "object", "properties": {"p": {"type": "string", "pattern": "^[0-9]+ EUR$"}}, "required": ["p"]},
        {"type": "string", "pattern": "^a*b$"},
    ],
)
@pytest.mark.parametrize("tokens", [1, 2, 6])
def test_an_answer_that_was_cut_comes_to_an_end(untrained, schema, tokens):
    model = Generator.load(untrained)
    held = Prompt("held", 1, {"title": "text"}, "{{ title }}", output=schema)
    for one in model.generate(held, ROWS, max_tokens=tokens, progress=False):
        assert json.loads(one.text) == one.value


def test_marks_of_the_tokenizer_in_a_text_are_words(nano):
    for mark in ("<eos>", "<bos>", "<pad>"):
        ids = nano.ids(SAY.render(title=f'Lamp" {mark} x'))
        assert not set(ids) & {0, 1, 2, 3} and "eos" in nano.tokenizer.decode(nano.ids("<eos>"))


def test_tokens_that_a_model_was_given_besides_are_words_in_a_text(untrained, tmp_path):
    shutil.copytree(untrained, tmp_path / "thinks")
    tokenizer = AutoTokenizer.from_pretrained(untrained)
    tokenizer.add_tokens(["<think>", "   "])  # as some models have them: not called special
    tokenizer.save_pretrained(tmp_path / "thinks")
    plain, thinks = Generator.load(untrained), Generator.load(tmp_path / "thinks")
    mark = thinks.tokenizer.convert_tokens_to_ids("<think>")
    assert mark not in thinks.ids("a <think> b") and mark in thinks.tokenizer("a <think> b")["input_ids"]
    assert thinks.ids("a b") == plain.ids("a b")
    assert thinks.hash != plain.hash == Generator.load(untrained).hash  # the weights are the same, answers may not be


def test_what_ends_an_answer_is_of_a_models_identity(untrained, tmp_path):
    shutil.copytree(untrained, tmp_path / "ends")
    path = tmp_path / "ends" / "generation_config.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(settings | {"eos_token_id": [3, 9]}))
    other = Generator.load(tmp_path / "ends")
    assert 9 in other.ends and other.hash != Generator.load(untrained).hash
    other.generate(SAY, ROWS, max_tokens=2, progress=False)
    assert identity(other.model, other.tokenizer) == other.hash  # whatever was asked in between


SIZES = {"vocab_size": 720, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "bos_token_id": 2}
FAMILIES = {
    "mistral": SIZES | {"intermediate_size": 40, "num_key_value_heads": 1, "sliding_window": 8},
    "gemma2": SIZES
    | {"intermediate_size": 40, "num_key_value_heads": 1, "head_dim": 12, "sliding_window": 8}
    | {"final_logit_softcapping": 3.0},
    "gemma3_text": SIZES | {"intermediate_size": 40, "num_key_value_heads": 1, "head_dim": 12, "sliding_window": 8},
    "granite": SIZES | {"intermediate_size": 40, "num_key_value_heads": 1, "logits_scaling": 7.0},
    "cohere": SIZES | {"intermediate_size": 40, "num_key_value_heads": 1, "logit_scale": 0.3},
    "qwen2": SIZES | {"intermediate_size": 40, "num_key_value_heads": 1},
    "gpt2": {"vocab_size": 720, "n_embd": 24, "n_layer": 2, "n_head": 2, "bos_token_id": 2, "n_positions": 512},
    "gpt_neox": SIZES | {"intermediate_size": 40},
    "opt": SIZES | {"ffn_dim": 40, "word_embed_proj_dim": 24, "max_position_embeddings": 512},
    "bloom": {"vocab_size": 720, "hidden_size": 24, "n_layer": 2, "n_head": 2, "bos_token_id": 2},
    "mamba": {"vocab_size": 720, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 4, "bos_token_id": 2},
}


@pytest.fixture(params=FAMILIES)
def family(request, nano):
    """A model of random weights, large enough that every part of it is felt, of another family than the shipped."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[request.param](eos_token_id=3, pad_token_id=0, **FAMILIES[request.param])
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    return replace(nano, model=model, name=request.param, hash=request.param)


def test_any_family_reads_as_its_model_does(family):
    """What rows begin with alike, what a window hides, and what a model does to its logits."""
    ask = Prompt("ask", 1, {"history": "texts", "title": "text"}, "{{ history | join(' ') }} then {{ title }} taken?")
    rows = [{"history": TITLES[:3], "title": t} for t in TITLES]
    answers = [" yes", " a vase"]
    found = family.likelihoods(ask, rows, answers, progress=False)
    expected = torch.zeros_like(found)
    for n, row in enumerate(rows):
        for a, answer in enumerate(answers):
            start, end = family.ids(ask.render(**row)), family.said(answer)
            with torch.no_grad():
                steps = torch.log_softmax(family.model(input_ids=torch.tensor([start + end])).logits[0].float(), dim=-1)
            expected[n, a] = sum(steps[len(start) + k - 1, t] for k, t in enumerate(end))
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
    together = family.generate(ask, rows, max_tokens=6, progress=False)
    assert [o.text for o in together] == [family.generate(ask, [x], max_tokens=6, progress=False)[0].text for x in rows]
    pairs = [(family.ids(ask.render(**row)), family.said(answers[1])) for row in rows]
    loss = -float(expected[:, 1].sum()) / sum(len(end) for _, end in pairs)
    assert answer_loss(family.model, pairs) == pytest.approx(loss, rel=1e-3)
    if family.name == "mamba":  # PEFT knows of no LoRA for it
        with pytest.raises(DataError, match=r"Mamba"):
            adapters.attach(family.model, rank=2, kind="language")
        with pytest.raises(DataError, match=r"mamba keeps a state"):
            family.permutations(ask, rows, ["ab"] * len(rows))
    else:
        adapted = adapters.attach(family.model, rank=2, kind="language")
        assert sum(p.requires_grad for p in adapted.parameters()) >= 2 * 2 * 4  # of each layer its projections


def test_a_schemas_order_is_the_answers(untrained, tmp_path):
    model, found = Generator.load(untrained), []
    for names in (["why", "answer"], ["answer", "why"]):
        schema = {"type": "object", "properties": {n: {"type": "string", "maxLength": 3} for n in names}}
        schema |= {"required": names, "additionalProperties": False}
        held = Prompt("held", 1, {"title": "text"}, "{{ title }}", output=schema)
        found.append(model.generate(held, ROWS[:1], max_tokens=30, folder=tmp_path, progress=False)[0])
    assert [list(one.value) for one in found] == [["why", "answer"], ["answer", "why"]]


def test_sampling_is_seeded(untrained):
    model = Generator.load(untrained)

    def said(seed, **more):
        return [o.text for o in model.generate(SAY, ROWS, max_tokens=9, seed=seed, progress=False, **more)]

    assert said(0, sample=True) == said(0, sample=True) != said(1, sample=True)
    assert said(0, sample=True, top_p=1e-6) == said(0)  # the likeliest alone is greedy
    assert said(0, sample=True, temperature=1e-6) == said(0)
    texts = said(0, sample=True)
    for order in ([3, 1], [2], [1, 0, 3, 2]):  # whatever is asked beside it
        some = model.generate(SAY, [ROWS[n] for n in order], max_tokens=9, sample=True, batch_tokens=30, progress=False)
        assert [o.text for o in some] == [texts[n] for n in order]
    rows = [{"title": f"{n}"} for n in range(400)]
    first = model.generate(SAY, rows, max_tokens=1, sample=True, top_p=0.5, progress=False)
    ids = torch.tensor([model.ids(SAY.render(**row)) for row in rows if len(row["title"]) == 2])
    with torch.no_grad():
        mass = model.model(ids).logits[:, -1].softmax(dim=-1)
    likely = (mass.mean(dim=0)).argsort(descending=True)[:360]  # of 720, near to uniform
    assert 0.3 < np.mean([o.text in {model.tokenizer.decode([t]).strip() for t in likely} for o in first]) <= 1
    with pytest.raises(DataError, match="temperature=0"):
        said(0, sample=True, temperature=0)


def test_answers_are_kept_and_a_run_that_was_killed_goes_on(untrained, tmp_path, monkeypatch):
    model = Generator.load(untrained)
    options = {"max_tokens": 9, "sample": True, "batch_tokens": 60, "progress": False}
    whole = model.generate(SAY, ROWS, **options)
    write, calls = Generator._write, []

    def killed(self, rows, *rest):
        calls.append(len(rows))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(self, rows, *rest)

    monkeypatch.setattr(Generator, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        model.generate(SAY, ROWS, folder=tmp_path, **options)
    (file,) = tmp_path.glob("*.jsonl")
    kept = file.read_bytes()
    assert kept.count(b"\n") == calls[0]
    assert model.generate(SAY, ROWS, folder=tmp_path, **options) == whole
    assert sum(calls) - calls[1] == len(ROWS)  # no answer was written twice
    count = len(calls)
    assert model.generate(SAY, [*ROWS, ROWS[0]], folder=tmp_path, **options) == [*whole, whole[0]]
    assert len(calls) == count
    assert model.generate(SAY, ROWS, folder=tmp_path, **{**options, "seed": 1}) != whole

    complete = file.read_bytes()
    file.write_bytes(complete[: len(complete) // 2])  # the last line of a half is no line
    assert model.generate(SAY, ROWS, folder=tmp_path, **options) == whole and len(calls) > count

    def told(lines):  # but for the time it took
        return sorted(
            json.dumps({k: v for k, v in json.loads(x).items() if k != "seconds"}) for x in lines.splitlines()
        )

    assert told(file.read_bytes()) == told(complete)
    file.write_bytes(b"no json\n" + complete)
    with pytest.raises(DataError, match=r"jsonl, line 1: no answer"):
        model.generate(SAY, ROWS, folder=tmp_path, **options)


def test_an_adapter_is_merged_and_known_by_its_hash(untrained, tmp_path):
    base = Generator.load(untrained)
    module, _ = load_causal(untrained)
    adapted = adapters.attach(module, rank=2, kind="language")
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    adapters.save(adapted, tmp_path / "lora", card={})
    tuned = Generator.load(untrained, adapter=tmp_path / "lora")
    ids = torch.tensor([[5, 6, 7, 11, 13]])
    with torch.no_grad():
        torch.testing.assert_close(tuned.model(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-3)
    assert tuned.hash != base.hash and np.isfinite(tuned.likelihoods(SAY, ROWS, [" a"], progress=False)).all()
    with pytest.raises(DataError, match="holds no adapter"):
        Generator.load(untrained, adapter=tmp_path)


def test_what_cannot_be_loaded_or_held_says_why(untrained, tmp_path):
    shutil.copytree(untrained, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).unlink()
    with pytest.raises(DataError, match=r"bare.*cannot be loaded"):
        Generator.load(str(tmp_path / "bare"))
    BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=720)
    ).save_pretrained(tmp_path / "bert")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NANO / name, tmp_path / "bert")
    with pytest.raises(DataError, match=r"bert.*they would be random"):
        Generator.load(str(tmp_path / "bert"))
    model = Generator.load(untrained)
    with pytest.raises(DataError, match=r"row 1 .* has \d+ tokens, and 9 to write: random holds 512"):
        model.generate(SAY, [ROWS[0], {"title": "x" * 100_000}], max_tokens=9, progress=False)
    wrong = Prompt("w", 1, {}, "x", output={"type": "string", "pattern": "("})
    with pytest.raises(DataError, match="cannot be held"):
        model.generate(wrong, [{}], progress=False)


def test_a_chat_model_is_asked_in_its_format(untrained):
    model = Generator.load(untrained)
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    model.tokenizer.chat_template = template + "{% if add_generation_prompt %}[reply]{% endif %}"
    said = model.tokenizer.decode(model.ids("hello"))
    assert said.replace(" ", "") == "[user]hello[reply]"
