"""Candidates encoded among processes and in chunks: the same loss, the same gradients, the same step as all at once."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mmllmrec.data.interactions import DataError
from mmllmrec.data.sampling import Batch
from mmllmrec.encoders.gather import encode_pool, in_chunks
from mmllmrec.models import Unified
from mmllmrec.models.unified import Preset
from mmllmrec.seed import seed_everything
from tests.towers import tiny_preset, tiny_world

HERE = Path(__file__).parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def batch(n=7, items=11):
    return Batch(torch.arange(n), torch.arange(n) * 5 % items)


def test_one_process_encodes_the_pool():
    one = batch()
    assert torch.equal(encode_pool(lambda items: items[:, None].float(), one)[:, 0], one.pool.float())


def test_a_share_for_processes_that_are_not_there_is_refused():
    with pytest.raises(DataError, match="shared among 2 processes: start as many"):
        encode_pool(lambda items: items[:, None].float(), batch().share(0, 2))


def test_shares_divide_the_events_and_keep_the_pool():
    whole = batch(7)
    shares = [whole.share(r, 3) for r in range(3)]
    assert torch.cat([s.items for s in shares]).sort().values.equal(whole.items.sort().values)
    assert all(s.pool is whole.pool and s.whole.shape == (2, 7) for s in shares)
    alone = batch(1).share(2, 3)  # without an event of its own it borrows one, for a mean of none is no number
    assert alone.users.tolist() == [0] and alone.rank == 2


class Encoder(nn.Module):
    """Dropout inside, and a mask of its own: two kinds of random numbers."""

    def __init__(self):
        super().__init__()
        self.table, self.drop = nn.Embedding(23, 8), nn.Dropout(0.5)
        self.mlp = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 5))

    def forward(self, items):
        return self.mlp(self.drop(self.table(items))) * (torch.rand(len(items), 1) > 0.3)


def gradients(encoder, encode, items):
    encoder.zero_grad()
    torch.manual_seed(1)
    value = encode(items)
    (value * torch.linspace(-1, 1, value.numel()).view_as(value)).sum().backward()
    return value.detach(), [p.grad.clone() for p in encoder.parameters()]


def test_chunks_give_value_and_gradient_of_the_whole():
    seed_everything(0)
    encoder, items = Encoder().eval().double(), torch.randperm(23)[:17]
    encode = lambda i: encoder.mlp(encoder.drop(encoder.table(i)))  # noqa: E731
    whole, whole_grads = gradients(encoder, encode, items)
    for size in (1, 4, 17, 40):
        value, grads = gradients(encoder, lambda i, size=size: in_chunks(encode, i, size=size), items)
        torch.testing.assert_close(value, whole, atol=1e-12, rtol=0)
        for a, b in zip(grads, whole_grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    with pytest.raises(DataError, match="chunk=0: encode at least one"):
        in_chunks(encode, items, size=0)


def test_a_chunk_meets_the_same_random_numbers_in_the_backward():
    """Against chunks without checkpoints, which draw once: another draw would give another gradient."""
    seed_everything(0)
    encoder, items = Encoder().train(), torch.randperm(23)[:17]
    plain = gradients(encoder, lambda i: torch.cat([encoder(part) for part in i.split(4)]), items)
    checked = gradients(encoder, lambda i: in_chunks(encoder, i, size=4), items)
    torch.testing.assert_close(checked[0], plain[0], atol=0, rtol=0)
    for a, b in zip(checked[1], plain[1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers")
    tiny_preset(folder)
    return folder


def test_a_unified_model_learns_the_same_in_chunks_and_keeps_less(towers):
    train, catalog = tiny_world(users=13, items=19)
    preset = preset_in(towers)
    seed_everything(5)
    model = Unified.from_preset(preset, data=train, catalog=catalog, dim=16, id_dropout=0.5)
    model.train()
    whole = Batch(torch.tensor(train.users), torch.tensor(train.items))
    found = {}
    for chunk in (None, 3):
        model.zero_grad()
        torch.manual_seed(2)
        kept = 0

        def keep(tensor):
            nonlocal kept
            kept += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = model.loss(replace(whole, chunk=chunk))["softmax"]
        alive = kept  # what the forward leaves for the backward
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found[chunk] = (float(loss.detach()), grads, alive)
    assert found[3][0] == pytest.approx(found[None][0], abs=1e-6)
    assert found[3][1].keys() == found[None][1].keys()
    for name, grad in found[None][1].items():
        torch.testing.assert_close(found[3][1][name], grad, atol=1e-6, rtol=1e-4, msg=name)
    assert found[3][2] < 0.2 * found[None][2]


def preset_in(folder):
    return Preset(vision=f"{folder}/clip", language=f"{folder}/language", rank=3, tokens=16, soft=2)


PEAK = """
import sys, torch
from torch import nn
from mmllmrec.encoders.gather import in_chunks
from mmllmrec.runcard import peak_memory_mb
encoder = nn.Sequential(*(part for _ in range(12) for part in (nn.Linear(256, 256), nn.GELU())))
items = torch.randn(10_000, 256)
in_chunks(encoder, items[:2], size=1).sum().backward()  # what is imported and set up once is not counted
before = peak_memory_mb()
in_chunks(encoder, items, size=int(sys.argv[1])).square().sum().backward()
print(peak_memory_mb() - before)
"""


def test_the_peak_over_forward_and_backward_falls():
    def peak(size):
        done = subprocess.run([sys.executable, "-c", PEAK, str(size)], capture_output=True, text=True, cwd=HERE.parent)
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    whole, chunks = peak(10_000), peak(500)  # 24 activations of 9.8 MiB each, against one chunk's 11.7 MiB
    assert whole > 200 and chunks < 0.5 * whole, (whole, chunks)


def train(towers, out, *, start=(), kind="blocks", chunk=0, how=(), precision="no"):
    """What ``gathered.py`` tells of a training, and the weights it came to."""
    command = [sys.executable, *start, str(HERE / "scripts" / "gathered.py"), str(towers), kind, str(chunk), str(out)]
    env = os.environ | {"ACCELERATE_MIXED_PRECISION": precision}
    done = subprocess.run([*command, *how], capture_output=True, text=True, cwd=HERE.parent, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "told.json").read_text()), load_file(out / "weights.safetensors")


@pytest.fixture(scope="module")
def alone(towers, tmp_path_factory):
    """One process: blocks, events, and blocks with adapters that wait."""
    asked = {"blocks": {}, "events": {"kind": "events"}, "staged": {"how": ("staged",)}}
    return {name: train(towers, tmp_path_factory.mktemp("alone") / name, **o) for name, o in asked.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "chunk", "how"),
    [
        ("events", 0, ()),
        ("blocks", 0, ()),
        ("blocks", 2, ()),
        ("blocks", 0, ("resumed",)),
        ("blocks", 0, ("sharded",)),
        ("blocks", 0, ("sharded", "resumed")),
        ("blocks", 2, ("staged", "resumed")),
        ("blocks", 0, ("staged", "sharded")),
    ],
)
def test_two_processes_take_the_steps_of_one(alone, towers, tmp_path, kind, chunk, how):
    one, a = alone["staged" if "staged" in how else kind]
    two, b = train(towers, tmp_path / "two", start=TORCHRUN, kind=kind, chunk=chunk, how=how)
    assert (one["processes"], two["processes"]) == (1, 2) and (two["type"] == "FSDP") == ("sharded" in how)
    assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, atol=1e-5, rtol=0, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("how", [(), ("sharded",)])
def test_bf16_from_the_launcher_trains_and_the_graph_stays_in_fp32(alone, towers, tmp_path, how):
    whole, _ = alone["blocks"]
    half, _ = train(towers, tmp_path / "half", start=TORCHRUN if how else (), how=how, precision="bf16")
    assert (whole["precision"], half["precision"]) == ("no", "bf16") and half["graph"] == ["torch.float32"]
    assert half["loss"] != whole["loss"] and half["loss"] == pytest.approx(whole["loss"], rel=0.05)


@pytest.mark.slow
def test_adapters_that_wait_come_to_other_weights(alone):
    """So that the agreement above says something."""
    (_, at_once), (_, waited) = alone["blocks"], alone["staged"]
    moved = [n for n in at_once if "lora_B" in n and not torch.allclose(at_once[n], waited[n], atol=1e-4)]
    assert moved and all(bool(waited[n].any()) for n in moved)
