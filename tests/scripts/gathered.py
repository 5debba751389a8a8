"""Train a tiny unified model in however many processes there are; writes losses and weights. Arguments: the folder that
holds the towers, blocks or events, chunk (0: none), where to write, and "sharded" for FSDP2, "resumed" to be cut off
after an epoch and go on, "staged" for adapters that start in mid-epoch."""

import json
import os
import sys
from pathlib import Path

from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import save_file

from mmllmrec.data import splits
from mmllmrec.data.dataset import RecDataset
from mmllmrec.models import Unified
from mmllmrec.models.unified import Preset
from mmllmrec.seed import seed_everything
from mmllmrec.training import checkpoint
from mmllmrec.training.fit import fit

sys.path.insert(0, os.getcwd())
from tests.towers import tiny_world

towers, kind, chunk, out, *how = sys.argv[1:]


class Steady(Unified):
    def parameter_groups(self, lr):
        # Adam divides by the gradient's size, so its first steps magnify rounding where a gradient is nearly zero
        return [{**group, "lr": lr, "eps": 1e-3} for group in super().parameter_groups(lr)]


def shard():
    """FSDP2 as the launcher's config asks for it; Accelerate itself shards on accelerators alone."""
    Accelerator(cpu=True)
    wrap = {"transformer_cls_names_to_wrap": ["ResidualAttentionBlock", "LlamaDecoderLayer"]}
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **wrap)
    if AcceleratorState().mixed_precision != "no":
        plugin.set_mixed_precision(AcceleratorState().mixed_precision)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}


if "sharded" in how:
    shard()
events, catalog = tiny_world(users=13, items=19)
split = splits.random_per_user(RecDataset("tiny", events, catalog), seed=0)
preset = Preset(vision=f"{towers}/clip", language=f"{towers}/language", rank=3, tokens=16, soft=2)
seen = set()


drawn_apart = {"id_dropout": 0.0, "history_cut": 0.0}  # in each process


def run(**options):
    seed_everything(5)
    model = Steady.from_preset(preset, data=split.train, catalog=catalog, dim=16, **drawn_apart, graph_layers=1)
    model.graph.register_forward_hook(lambda module, given, out: seen.add(str(out[0].dtype)))
    options |= {"stages": {"lora": 0.25}} if "staged" in how else {}
    size = {"item_batch": 5} if kind == "blocks" else {"batch_size": 6}
    return fit(model, split, lr=0.01, clip=1.0, epochs=2, chunk=int(chunk) or None, progress=False, **size, **options)


class Cut(Exception):
    pass


if "resumed" in how:
    save, moments = checkpoint.save, checkpoint.moments

    def then_die(folder, **kept):
        save(folder, **kept)
        raise Cut

    def die_unless_main(optimiser):
        found = moments(optimiser)
        if not PartialState().is_main_process:
            raise Cut
        return found

    checkpoint.save, checkpoint.moments = then_die, die_unless_main
    try:
        run(folder=f"{out}-run")
    except Cut:
        pass
    finally:
        checkpoint.save, checkpoint.moments = save, moments
    PartialState().wait_for_everyone()
done = run(folder=f"{out}-run" if "resumed" in how else None)
if PartialState().is_main_process:
    Path(out).mkdir(parents=True)
    save_file(checkpoint.trained(done.model), f"{out}/weights.safetensors")
    told = {"processes": PartialState().num_processes, "loss": done.history["softmax"].tolist(), "graph": sorted(seen)}
    told |= {"precision": AcceleratorState().mixed_precision, "type": AcceleratorState().distributed_type.value}
    Path(out, "told.json").write_text(json.dumps(told))
