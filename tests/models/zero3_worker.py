"""One rank of the ZeRO-3 tests: `python zero3_worker.py RANK WORLD FOLDER OUT LORA`; started by test_zero3.py.

It loads the checkpoint sharded, writes what each rank holds, trains some steps and writes the full model of rank 0.
"""

import json
import os
import sys
from pathlib import Path

rank, world, folder, out, lora = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5]
os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world)}

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from dtrpo_ray.config.train import LoraConfig, TrainConfig  # noqa: E402
from dtrpo_ray.models.lora import BaseReference, add_adapters, merge_adapters, save_adapter  # noqa: E402
from dtrpo_ray.models.registry import load_model, save_model  # noqa: E402
from dtrpo_ray.train.backend import DeepSpeedBackend, Zero3Sharding  # noqa: E402

torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=world)
device = torch.device("cpu")
adapters = LoraConfig(rank=4) if lora == "lora" else None
config = TrainConfig(zero_stage=3, lr=1e-2, global_batch=world, lora=adapters, lr_schedule="constant", warmup_ratio=0)
model = load_model(folder, sharding=Zero3Sharding(config, device))
held = sum(p.ds_tensor.numel() for p in model.parameters())
whole = sum(p.ds_numel for p in model.parameters())
if adapters:
    add_adapters(model, adapters, seed=0)
backend = DeepSpeedBackend(model, config, 4, device)
ids = torch.arange(16)[None] % 80
where = torch.arange(4)
inputs = (ids, torch.arange(16)[None], torch.ones(1, 1, 16, 16, dtype=torch.bool), where * 0, where, where + 1)
with torch.no_grad():
    first = backend.policy(*inputs)
losses, reference = [], []
for _ in range(4):
    logp = backend.policy(*inputs)
    if adapters:
        with torch.no_grad():
            reference.append(BaseReference(backend.policy, model)(*inputs).tolist())
    loss = -logp.mean() / world
    backend.backward(loss)
    backend.step()
    losses.append(float(loss))
(out / "checkpoint").mkdir(exist_ok=True)
backend.save(out / "checkpoint", 4)
trained = backend.policy(*inputs).tolist()
again = backend.load(out / "checkpoint")
resumed = backend.policy(*inputs).tolist()
record = {"held": held, "whole": whole, "first": first.tolist(), "losses": losses, "reference": reference}
record |= {"trained": trained, "resumed": resumed, "step": again}
(out / f"rank-{rank}.json").write_text(json.dumps(record))
full = backend.full_model()
if rank == 0:
    if adapters:
        save_adapter(full, adapters, str(folder), out)
        merge_adapters(full)
    save_model(full, out)
dist.barrier()
