"""
The losses that train_gpt2.py must reproduce: sixty float32 steps of a small GPT-2, trained by a plain PyTorch loop
around transformers' model that shares no code with train_gpt2.py. Weights and tokens come from formulas, so nothing
is random.

    python tests/golden.py    # writes tests/golden_losses.json again
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

GOLDEN = Path(__file__).resolve().parent / "golden_losses.json"
STEPS, WARMUP, MAX_LR, WEIGHT_DECAY = 60, 10, 3e-3, 0.1
BATCH, T = 16, 32  # sequences in a step, tokens in a sequence


def make_tokens(count):
    """Squares modulo a prime, spread over the vocabulary: regular enough to learn from."""
    j = np.arange(count, dtype=np.int64)
    return (j * j % 509 * 97 % 50257).astype(np.uint16)


def make_model():
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=T, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = GPT2LMHeadModel(config)
    for i, (name, p) in enumerate(model.named_parameters()):
        wave = torch.sin(12.9898 * torch.arange(p.numel(), dtype=torch.float64) + 78.233 * i)
        center = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
        p.data.copy_((center + 0.03 * wave).view(p.shape))
    return model


def learning_rate(step):
    if step < WARMUP:
        return MAX_LR * (step + 1) / WARMUP
    cosine = math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))
    return MAX_LR * (0.1 + 0.9 * (1 + cosine) / 2)


def train():
    """The loss of each step, before it is taken."""
    model = make_model().train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    tokens = torch.from_numpy(make_tokens(STEPS * BATCH * T + 1).astype(np.int64))
    losses = []
    for step in range(STEPS):
        batch = tokens[step * BATCH * T : (step + 1) * BATCH * T + 1]
        logits = model(batch[:-1].view(BATCH, T)).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps([round(loss, 7) for loss in train()], indent=1) + "\n", encoding="utf-8")
