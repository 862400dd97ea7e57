"""A training script of nanoGPT's shape, and the eight lines that let trainctl watch and steer it.

The script is its own master: it has its own data iterator, counts its own iterations, has no scheduler object and
writes the learning rate into the optimizer at every step. Every line that trainctl needs ends in `# trainctl`; without
them the script is what it was before.

    python examples/nanogpt_style.py --max-iters 500
    trainctl run examples/nanogpt_style.py --max-iters 500
    trainctl run --nproc-per-node 2 examples/nanogpt_style.py --max-iters 500
"""

import argparse
import math
import os
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.distributed import destroy_process_group, init_process_group
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from trainctl.trainer import Run  # trainctl

parser = argparse.ArgumentParser()
parser.add_argument("--max-iters", type=int, default=500)
max_iters = parser.parse_args().max_iters

# ---- the job: alone, or one rank of several under torchrun
ddp = int(os.environ.get("WORLD_SIZE", "1")) > 1
device = (
    torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")
)
rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
if device.type == "cuda":
    torch.cuda.set_device(device)
if ddp:
    init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
master_process = rank == 0

# ---- settings
block_size, batch_size, gradient_accumulation_steps = 64, 4, 2
n_layer, n_head, n_embd, dropout = 4, 4, 64, 0.1
learning_rate, min_lr, warmup_iters, grad_clip = 2e-3, 2e-4, 20, 1.0
eval_interval, eval_iters, log_interval = 100, 8, 10
tokens_per_iter = gradient_accumulation_steps * world_size * batch_size * block_size
torch.manual_seed(1337)


# ---- data: bytes of the standard library's modules, drawn at random but by position, so that it can be taken up again
class Batches:
    def __init__(self, split):
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        files = files[::10] if split == "val" else [file for number, file in enumerate(files) if number % 10]
        self.text = np.frombuffer(b"".join(file.read_bytes() for file in files), dtype=np.uint8)
        self.position = 0

    def __iter__(self):
        return self

    def __next__(self):
        draw = np.random.default_rng((1337, self.position, rank))
        starts = draw.integers(len(self.text) - block_size - 1, size=batch_size)
        self.position += 1
        chunk = torch.from_numpy(self.text[starts[:, None] + np.arange(block_size + 1)].astype(np.int64)).to(device)
        return chunk[:, :-1], chunk[:, 1:]

    def seek(self, step):
        """Go to where `step` begins; like a file's seek, it returns where that is."""
        self.position = step * gradient_accumulation_steps
        return step


data = Batches("train")


# ---- model
class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(256, n_embd)
        self.wpe = nn.Embedding(block_size, n_embd)
        layer = nn.TransformerEncoderLayer(
            n_embd, n_head, 4 * n_embd, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.h = nn.TransformerEncoder(layer, n_layer, norm=nn.LayerNorm(n_embd), enable_nested_tensor=False)
        self.lm_head = nn.Linear(n_embd, 256, bias=False)

    def forward(self, idx, targets):
        mask = nn.Transformer.generate_square_subsequent_mask(idx.shape[1], device=idx.device)
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        logits = self.lm_head(self.h(x, mask=mask, is_causal=True))
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


model = raw_model = GPT().to(device)
if ddp:
    model = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
torch.manual_seed(1337 + rank)  # dropout differs between the ranks


@torch.no_grad()
def estimate_loss():
    raw_model.eval()
    held_out = Batches("val")
    loss = sum(raw_model(*next(held_out)).item() for _ in range(eval_iters)) / eval_iters
    raw_model.train()
    return loss


def get_lr(it):
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    decay_ratio = min(1.0, (it - warmup_iters) / max(1, max_iters - warmup_iters))
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * decay_ratio)) * (learning_rate - min_lr)


# ---- training
iter_num = 0
t0 = time.time()
run = Run.attach("nanogpt", model=model, optimizer=optimizer, total_steps=max_iters, on_rollback=data.seek)  # trainctl
while True:
    iter_num = data.seek(run.step)  # trainctl
    if iter_num >= max_iters:
        break
    if run.stopping:  # trainctl
        break  # trainctl
    lr = get_lr(iter_num)
    for param_group in optimizer.param_groups:
        param_group["lr"] = lr

    if iter_num % eval_interval == 0 and master_process:
        print(f"iter {iter_num}: val loss {estimate_loss():.4f}")

    for micro_step in range(gradient_accumulation_steps):
        X, Y = next(data)
        if ddp:
            model.require_backward_grad_sync = micro_step == gradient_accumulation_steps - 1
        loss = model(X, Y) / gradient_accumulation_steps
        loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    if iter_num % log_interval == 0 and master_process:
        lossf = loss.item() * gradient_accumulation_steps
        print(f"iter {iter_num}: loss {lossf:.4f}, time {(time.time() - t0) * 1000:.0f} ms")
        t0 = time.time()
    iter_num += 1
    run.log(loss=loss * gradient_accumulation_steps, grad_norm=norm)  # trainctl
    run.step_done(tokens=tokens_per_iter)  # trainctl

run.close()  # trainctl
if ddp:
    destroy_process_group()
