"""
Train GPT-2 (124M) from scratch, after Andrej Karpathy's lecture "Let's reproduce GPT-2 (124M)".

    python train_gpt2.py                                      # one GPU, or the CPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py    # the reproduction: one node with eight GPUs
    python train_gpt2.py --help                               # all settings

Part I is the lesson, from the model to the training loop. Part II is housekeeping: the command line, checkpoints, logs.
The model is GPT-2 (Radford et al. 2019). That paper leaves out most training settings, so those are from GPT-3 (Brown
et al. 2020). In comments, B is the number of sequences in a batch, T the number of tokens in each, and C = n_embd the
length of a token's vector, its channels. The lecture adds one trick after another and clocks a step of 16K tokens on an
A100: float32 1000 ms, TF32 333, bf16 300, torch.compile 130, FlashAttention 96, padded vocabulary 93, fused AdamW 90.
"""

import ctypes
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock
from torch import nn

import fineweb
import hellaswag
from fineweb import HERE, UserError, gpt2_encoding, replace_file, reported_as  # reported_as: errors become UserErrors

GPT2_VOCAB_SIZE = 50257  # tokens are pieces of text: 256 bytes, 50,000 learned merges of them, and <|endoftext|>

# The sizes of GPT-2, with the peak learning rates of GPT-3's models of about these sizes (its table 2.1).
MODELS = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "max_lr": 6e-4},  # 124M parameters
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "max_lr": 3e-4},  # 355M
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280, "max_lr": 2.5e-4},  # 774M
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600, "max_lr": 2e-4},  # 1558M
}

# ======================================================================================================================
# Part I: the lesson
# ----------------------------------------------------------------------------------------------------------------------
# 1. The model
# Parameters have the names of Hugging Face's copy, after OpenAI's: wte and wpe are the embeddings, a learned vector for
# each token and each position, h is the list of blocks, ln_* are layer norms, c_* linear layers.


@dataclass
class GPTConfig:
    block_size: int = 1024  # maximum context length, in tokens
    # 50257 is an ugly number: GPUs compute in tiles of powers of two, and a ragged last tile is slow. Section 8 pads it
    # to 50304 = 393 * 128 (lecture: 96 to 93 ms); the model learns that the 47 extra ids never occur.
    vocab_size: int = GPT2_VOCAB_SIZE
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768


class CausalSelfAttention(nn.Module):
    """Each token emits a query, a key and a value. Each head, on its slice of these, averages the values of the token
    and earlier ones, weighted by how well its query matches their keys (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head != 0:
            raise UserError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}: change one of them")
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value of all heads in one matmul
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head = config.n_head

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        # Turn the heads into a batch dimension: each one attends on its own.
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, n_head, T, head_size)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, n_head, T, head_size)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, n_head, T, head_size)
        # This is softmax(q @ k.T / sqrt(head_size)) @ v. The root keeps the variance of the scores near 1. Later tokens
        # are masked out: a token must not see what it has to predict. Step by step, a (T, T) matrix per head would go
        # to GPU memory and back. FlashAttention (Dao et al. 2022) works in tiles that fit on the chip, with running
        # sums for the softmax, and recomputes them in the backward pass (lecture: 130 to 96 ms).
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, n_head, T, head_size)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side
        return self.c_proj(y)  # mixes the heads


class MLP(nn.Module):
    """Two linear layers with a GELU in between, for each token on its own: (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")  # the approximation that GPT-2 was trained with
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = self.gelu(self.c_fc(x))  # (B, T, 4C)
        return self.c_proj(x)


class Block(nn.Module):
    """Attention (tokens exchange information), then an MLP (each token processes it): (B, T, C) -> (B, T, C).
    Each reads x, the residual stream, through its own layer norm and adds its output to x (GPT-2 section 2.3). Nothing
    else happens to x on its way through the blocks, so gradients flow straight to every block."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """GPT-2: embeddings, a stack of blocks, and lm_head, which scores every token of the vocabulary as the next one."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.Module()  # all but lm_head, as in the transformers library
        self.transformer.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.transformer.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.transformer.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.transformer.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # One matrix both embeds a token and scores it as the next one (weight tying, Press & Wolf 2017): similar tokens
        # should be close in both roles, and tying saves 38.6M parameters, nearly a third of this model.
        self.transformer.wte.weight = self.lm_head.weight
        self.apply(self._init_weights)
        # The residual stream adds up 2 * n_layer outputs. A sum of n independent terms has sqrt(n) times the standard
        # deviation of one, so the layers that make these outputs start smaller by that factor (GPT-2 section 2.3).
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)  # OpenAI's std (but theirs is 0.01 for wpe)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None):
        """Score the next token at every position or, given the targets, return the loss.

        idx: (B, T) int64 token ids, T <= block_size. targets: (B, T), the token after each one in idx; -1 is ignored.
        Returns (logits, None) or (None, loss). logits: (B, T, vocab_size) scores. loss: mean cross entropy in nats."""
        T = idx.size(1)
        assert T <= self.config.block_size, f"{T} tokens do not fit into a context of {self.config.block_size}"
        pos = torch.arange(T, device=idx.device)  # (T,)
        # Apart from its mask, attention ignores the order of tokens, so each position has an embedding, too.
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)  # (B, T, C) + (T, C)
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)  # (B, T, C)
        if targets is None:
            return self.lm_head(x), None  # (B, T, vocab_size)

        # The logits are by far the largest tensor, 6.6 GB in bf16 for 64 x 1024 tokens, 13 in float32. Returning them
        # with the loss would keep them in memory. On the CPU, chunks of 512 tokens save a sixth of the time of a step.
        chunk_size = 512 if x.device.type == "cpu" else targets.numel()
        loss_sum = 0.0
        for chunk, y in zip(x.flatten(0, 1).split(chunk_size), targets.flatten().split(chunk_size), strict=True):
            logits = self.lm_head(chunk)  # (chunk_size, vocab_size)
            # float(): despite autocast (section 9), a GPU would round the log-probabilities to bf16.
            loss_sum += F.cross_entropy(logits.float(), y, ignore_index=-1, reduction="sum")
        return None, loss_sum / (targets != -1).sum()

    # ------------------------------------------------------------------------------------------------------------------
    # 2. OpenAI's weights, in and out
    # Loading them tests the model above: if it has a mistake, --init_from=gpt2 --max_steps=0 usually prints nonsense.

    # What the transformers library calls the fields of GPTConfig, the values that its config must have for a GPT-2, and
    # the weights that it stores as (in, out), like OpenAI, where nn.Linear has (out, in).
    HF_NAMES = {"block_size": "n_positions"} | {name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    HF_VALUES = (("activation_function", "gelu_new"), ("layer_norm_epsilon", 1e-5), ("scale_attn_weights", True))
    HF_VALUES += (("model_type", "gpt2"), ("tie_word_embeddings", True), ("scale_attn_by_inverse_layer_idx", False))
    HF_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")

    @classmethod
    def from_pretrained(cls, name_or_folder):
        """Load gpt2, gpt2-medium, gpt2-large or gpt2-xl from the Hugging Face hub, or a folder saved by transformers.
        Raises UserError if the weights cannot be found, or are not those of a GPT-2."""
        from huggingface_hub import snapshot_download
        from safetensors.torch import load_file

        expected = f"one of {', '.join(MODELS)}, or a folder with config.json and *.safetensors"
        with reported_as(f"{name_or_folder} cannot be loaded; it must be {expected} (pickled .bin is not read)"):
            folder = Path(name_or_folder)
            if name_or_folder in MODELS:
                repo, files = f"openai-community/{name_or_folder}", ["config.json", "model.safetensors"]
                folder = Path(snapshot_download(repo, allow_patterns=files))
            saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            for name, value in cls.HF_VALUES:
                assert saved.get(name, value) == value, f"config.json has {name} {saved[name]}, not {value}"
            model = cls(GPTConfig(**{name: saved[hf_name] for name, hf_name in cls.HF_NAMES.items()}))
            state_dict = {}
            for file in folder.glob("*.safetensors"):  # large models are split into several files
                for name, tensor in load_file(file).items():
                    name = "transformer." + name.removeprefix("transformer.")  # gpt2's own files lack this prefix
                    if name in model.state_dict():  # the files also hold causal masks
                        state_dict[name] = tensor.t() if name.endswith(cls.HF_TRANSPOSED) else tensor
            state_dict["lm_head.weight"] = state_dict["transformer.wte.weight"]
            model.load_state_dict(state_dict)
        return model

    @classmethod
    def from_checkpoint(cls, checkpoint):
        """The model of a checkpoint (section 11). Raises UserError if its weights do not fit its config."""
        with reported_as("the weights in the checkpoint do not fit its config"):
            model = cls(GPTConfig(**checkpoint["config"]))
            model.load_state_dict(checkpoint["model"])
        return model

    def save_pretrained(self, folder):
        """Write a folder for transformers: config, tokenizer, and the weights in float32, without the padding of the
        vocabulary. Raises UserError if it cannot be written."""
        from safetensors.torch import save

        tensors = {}
        for name, p in self.named_parameters():
            tensor = p.detach().float().cpu()
            if name == "transformer.wte.weight":
                tensor = tensor[:GPT2_VOCAB_SIZE]
            tensors[name] = (tensor.t() if name.endswith(self.HF_TRANSPOSED) else tensor).contiguous()
        weights = save(tensors, metadata={"format": "pt"})  # save_file() would make a file that only its owner can read
        config = {hf_name: getattr(self.config, name) for name, hf_name in self.HF_NAMES.items()} | dict(self.HF_VALUES)
        config |= {"architectures": ["GPT2LMHeadModel"], "vocab_size": len(tensors["transformer.wte.weight"])}
        with reported_as(f"{folder} cannot be written"):
            folder = Path(folder)
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(folder / "model.safetensors", lambda path: path.write_bytes(weights))
            replace_file(folder / "config.json", lambda path: path.write_text(json.dumps(config), encoding="utf-8"))
            fineweb.save_tokenizer(folder, self.config.block_size)

    # ------------------------------------------------------------------------------------------------------------------
    # 3. Sampling

    @torch.no_grad()
    @hellaswag.without_cudnn  # cuDNN's FlashAttention needs 0.4 s of setup for every new length
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=50, generator=None):
        """Continue each sequence by max_new_tokens: (B, T) int64 -> (B, T + max_new_tokens).

        temperature: below 1 sharpens the distribution, above 1 flattens it; 0 always takes the most likely token.
        top_k: sample from the k most likely tokens (Fan et al. 2018, section 5.4); 0 or None: from all. generator: for
        repeatable samples, a torch.Generator on the device of idx."""
        for _ in range(max_new_tokens):
            # Each new token reprocesses the whole context. A key/value cache would be faster, but is more code.
            logits, _ = self(idx[:, -self.config.block_size :])  # (B, T, vocab_size)
            # The last position predicts the new token. Padding ids are left out: the tokenizer cannot decode them.
            logits = logits[:, -1, :GPT2_VOCAB_SIZE].float()  # (B, 50257)
            topk_logits, topk_ids = torch.topk(logits, min(top_k or logits.size(1), logits.size(1)))  # (B, k) each
            probs = F.softmax(topk_logits / max(temperature, 1e-10), dim=-1)  # (B, k); 0 would divide by zero
            choice = torch.multinomial(probs, num_samples=1, generator=generator)  # (B, 1)
            idx_next = topk_ids.gather(1, choice)  # (B, 1)
            idx = torch.cat((idx, idx_next), dim=1)
        return idx

    # ------------------------------------------------------------------------------------------------------------------
    # 4. Optimizer, learning rate, batch size

    def configure_optimizers(self, weight_decay, learning_rate):
        """AdamW (Loshchilov & Hutter 2019) with GPT-3's betas and eps (appendix B)."""
        # Weight decay shrinks matrices a little in each step, so that many weights share the work and none grows large.
        # Biases and layer norms (1D) only shift and scale: they are exempt.
        decay = [p for p in self.parameters() if p.dim() >= 2]
        no_decay = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
        # Fused: a kernel does the whole update of many tensors, instead of one per operation (lecture: 93 to 90 ms).
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)


def get_lr(step, max_steps, warmup_steps, max_lr, min_lr):
    """Linear warm-up to max_lr, then decay along a half-cosine to min_lr (GPT-3, appendix B). The warm-up is for Adam,
    whose running averages of the gradients are unreliable in the first steps."""
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    decay_ratio = min(1.0, (step - warmup_steps) / (max_steps - warmup_steps))  # from 0 to 1
    coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))  # from 1 to 0
    return min_lr + coeff * (max_lr - min_lr)


def fit_micro_batch(settings, given, world_size):
    """A step averages the gradients of micro-batches of B sequences (section 9). Returns B: the default, lowered until
    it divides the sequences of each process. Raises UserError if the step, or the B given, does not divide evenly."""
    num_sequences = max(1, settings.total_batch_size // (settings.block_size * world_size))
    total = num_sequences * settings.block_size * world_size  # tokens
    B = max(n for n in range(1, min(settings.micro_batch_size, num_sequences) + 1) if num_sequences % n == 0)
    if settings.total_batch_size != total or ("micro_batch_size" in given and settings.micro_batch_size != B):
        raise UserError(f"a step must be whole micro-batches: use --total_batch_size={total} --micro_batch_size={B}")
    return B


# ----------------------------------------------------------------------------------------------------------------------
# 5. Data
# fineweb.py joins FineWeb-Edu's web pages, <|endoftext|> before each, into one stream, cut into shards of 100M tokens.


def open_tokens(path, split):
    """The tokens of a shard or a text file: (n,) uint16. Raises UserError if the file cannot be used.
    .npy: a one-dimensional uint16 array. .bin (llm.c): 256 int32, of which the first three are 20240520, the version 1
    and the number of tokens; then the tokens as uint16. Text: UTF-8, its last tenth is the validation split."""
    with reported_as(f"{path} cannot be used as {split} data"):
        if path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        elif path.suffix == ".bin":
            tokens = np.memmap(path, dtype="<u2", mode="r", offset=1024)
            assert np.fromfile(path, "<i4", count=3).tolist() == [20240520, 1, len(tokens)], "header and size disagree"
        else:
            tokens = fineweb.tokenize_file(path)[split]  # cached: it tokenizes once
        is_valid = tokens.dtype == np.dtype("<u2") and tokens.ndim == 1 and len(tokens) > 0
        assert is_valid, f"it must hold uint16 of shape (n,), n > 0, not {tokens.dtype} of shape {tokens.shape}"
    return tokens


@lru_cache(maxsize=1)  # 10B tokens are ten million windows: do not shuffle them again for every batch
def shuffled_windows(num_windows, seed, epoch):
    """The order in which an epoch reads the windows: (num_windows,)."""
    return np.random.default_rng([seed, epoch]).permutation(num_windows)


class DataLoaderLite:
    """Batches of one split, "train" or "val", from a folder of shards or a text file.

    The shards form one endless, repeating stream, read in windows of T tokens. Batch k of process r is B windows,
    starting at number (k * num_processes + r) * B. This is computed, not stored: processes cannot drift apart, and a
    resumed run repeats and skips nothing, even on a different number of GPUs. With shuffle, each epoch has a new random
    order: FineWeb-Edu's own order makes waves in the loss (shuffling gained 0.017 for garg-aayush)."""

    def __init__(self, B, T, process_rank, num_processes, split, data_root, shuffle=False, seed=1337):
        self.B, self.T, self.split, self.shuffle, self.seed = B, T, split, shuffle, seed
        self.process_rank, self.num_processes = process_rank, num_processes
        self.batch_index = 0  # k of the next batch, counted from the start of the run; set it to jump
        root = Path(data_root)
        is_text = root.is_file() and root.suffix not in (".npy", ".bin")
        names = rf"[^.].*_{split}(_\d+)?\.(npy|bin)"  # such as edufineweb_train_000001.npy, tiny_shakespeare_train.bin
        self.shards = [root] if is_text else [p for p in sorted(root.glob("*")) if re.fullmatch(names, p.name)]
        if not self.shards:
            raise UserError(f"--data={data_root} must be a text file, or a folder that has *_{split}_NNNNNN.npy")
        self.contents = {f"{split} {path.name}": len(open_tokens(path, split)) for path in self.shards}
        self.starts = np.cumsum([0, *self.contents.values()])  # where each shard starts, and the stream ends
        self.num_tokens = int(self.starts[-1])
        if self.num_tokens < 2:
            raise UserError(f"{data_root} has only {self.num_tokens} {split} tokens: more text is needed")

    def read(self, positions):
        """The tokens at these positions (an int64 array) of the stream: an int64 tensor of the same shape."""
        tokens = np.empty_like(positions)
        shard_numbers = np.searchsorted(self.starts, positions, side="right") - 1  # which shard has each position
        for i in np.unique(shard_numbers):
            in_shard = shard_numbers == i
            with reported_as(f"{self.shards[i]} cannot be used"):
                # Open it for every read: a file truncated during the run is then an exception, not a bus error.
                shard = open_tokens(self.shards[i], self.split)
                assert len(shard) == np.diff(self.starts)[i], "it has changed since the start: restore it, use --resume"
                tokens[in_shard] = shard[positions[in_shard] - self.starts[i]]
                assert tokens[in_shard].max() < GPT2_VOCAB_SIZE, f"it has a token {tokens[in_shard].max()}: recreate it"
        return torch.from_numpy(tokens)

    def next_batch(self, device="cpu"):
        """Inputs x and targets y, (B, T) int64 each, from windows and the token after them: y[b, t] follows x[b, t]."""
        windows = (self.batch_index * self.num_processes + self.process_rank) * self.B + np.arange(self.B)  # (B,)
        self.batch_index += 1
        if self.shuffle:
            n = max(1, (self.num_tokens - 1) // self.T)  # windows in an epoch
            windows = np.array([shuffled_windows(n, self.seed, i // n)[i % n] for i in windows])
        tokens = self.read((windows[:, None] * self.T + np.arange(self.T + 1)) % self.num_tokens)  # (B, T + 1)
        # Pinned memory is never paged out, so the GPU can copy from it by itself while the CPU continues.
        tokens = tokens.pin_memory() if torch.device(device).type == "cuda" else tokens
        tokens = tokens.to(device, non_blocking=tokens.is_pinned())
        return tokens[:, :-1], tokens[:, 1:]


# ----------------------------------------------------------------------------------------------------------------------
# 6. Evaluation


@torch.no_grad()
def evaluate(model, loader, val_tokens, device, autocast):
    """The mean loss over the first val_tokens tokens of the validation data (all of them if there are fewer), in nats.
    Up to rounding, it does not depend on the micro-batch size or the number of GPUs (they share the batches)."""
    val_tokens = min(val_tokens, loader.num_tokens - 1)  # the last token has no target
    batch_tokens = loader.B * loader.T
    val_loss = torch.zeros((), device=device)
    loader.batch_index = 0
    for start in range(loader.process_rank * batch_tokens, val_tokens, loader.num_processes * batch_tokens):
        x, y = loader.next_batch(device)  # (B, T) each
        y = y.clone()  # it shares memory with x
        y.view(-1)[val_tokens - start :] = -1  # no loss past val_tokens; a smaller batch would mean recompiling
        with autocast:
            _, loss = model(x, y)
        val_loss += loss * (y != -1).sum() / val_tokens
    if loader.num_processes > 1:
        dist.all_reduce(val_loss, op=dist.ReduceOp.SUM)
    return val_loss.item()


def load_hellaswag(source, block_size):
    """HellaSwag, tokenized: of four endings of a text, does the true one have the lowest mean loss? Returns [] if the
    official file cannot be downloaded."""
    try:
        examples = hellaswag.load_examples(source) if source != "off" else []
        return hellaswag.tokenize(examples, block_size)
    except UserError as error:
        if source != "official":
            raise
        print0(f"warning: {error}. Training continues without HellaSwag")
        return []


def print_samples(model, settings):
    """Print num_samples continuations of the prompt, each up to its <|endoftext|>."""
    if settings.prompt == "-" and get_ranks()[0] == 0:  # the other processes would read parts of it
        settings.prompt = sys.stdin.buffer.read().decode("utf-8", errors="replace").removesuffix("\n")
    encoding = gpt2_encoding()
    prompt = encoding.encode_ordinary(settings.prompt) or [encoding.eot_token]  # no prompt: start a document
    device = model.lm_head.weight.device
    idx = torch.tensor([prompt] * settings.num_samples, device=device)  # (num_samples, T)
    generator = torch.Generator(device=device).manual_seed(settings.seed)  # leaves the training's random state alone
    idx = model.generate(idx, settings.max_new_tokens, settings.temperature, settings.top_k, generator)
    for i, row in enumerate(idx[:, len(prompt) :].tolist()):
        print0(f"sample {i}: {settings.prompt}{encoding.decode(row).split('<|endoftext|>')[0]}")


# ----------------------------------------------------------------------------------------------------------------------
# 7. Device, precision, processes
# torchrun starts one process per GPU and tells each its rank among all world_size processes, and its local rank on its
# machine: the number of its GPU. All hold the same weights, each computes the gradient of its part of the batch,
# DistributedDataParallel (DDP) averages these gradients, and all take the same step.


def get_ranks():
    """(rank, local_rank, world_size) from torchrun; (0, 0, 1) without it."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 0, 1
    if not {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise UserError("WORLD_SIZE is set, but not RANK and the others: start with torchrun, or unset WORLD_SIZE")
    return tuple(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def print0(text):
    """Print from rank 0 only. If the terminal or pipe is closed, the run continues without output."""
    if get_ranks()[0] == 0:
        try:
            print(text, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def pick_device(name, local_rank=0, world_size=1):
    """The torch.device of this process. Raises UserError if there is no such device."""
    mps = ["mps"] if torch.backends.mps.is_available() and world_size == 1 else []  # DDP does not support Apple's GPUs
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count()) if torch.cuda.is_available()] + mps + ["cpu"]
    name = devices[0] if name == "auto" else name
    if name == "cuda" or (name.startswith("cuda:") and world_size > 1):
        name = f"cuda:{local_rank}"
    if name not in devices:
        raise UserError(f"--device={name} is not available, only {', '.join(devices)}: change it or --nproc_per_node")
    return torch.device(name)


def pick_dtype(name, device):
    """The dtype of matmuls. bfloat16 is float32 with 7 instead of 23 bits of fraction: faster to multiply, with the
    same range. float16 has a smaller range, in which small gradients become 0. The gradient scaler prevents that: it
    multiplies the loss, divides the gradients by the same factor, and skips the step if any of them has overflowed."""
    if device.type == "mps" and name in ("bfloat16", "float16"):
        raise UserError(f"--dtype={name} does not train reliably on MPS: use float32")
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":  # torch.cuda.is_bf16_supported() would also accept GPUs that emulate bfloat16
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16  # A100 and later
    bf16_units = [name for name, present in torch.cpu.get_capabilities().items() if present and "bf16" in name]
    return torch.bfloat16 if device.type == "cpu" and bf16_units else torch.float32


def keep_freed_memory():
    """Let the C library keep freed memory. By default it returns large blocks to the system, which zeroes each page
    before handing it out again: steps on the CPU take 1.3 to 1.5 times as long. Source: mallopt(3)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX: take no block directly from the system
        ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


def can_compile(device):
    """Whether torch.compile works here: it needs a C++ compiler for the CPU, Triton and a C compiler for a GPU."""
    x = torch.ones(8, device=device, requires_grad=True)  # fails on a GPU that torch does not support: see main()
    try:
        torch.compile(lambda x: (x * 2.0).sum())(x).backward()
    except (RuntimeError, ImportError, OSError) as error:
        print0(f"warning: torch.compile does not work here ({type(error).__name__}); running without it: slower")
        return False
    return True


# ----------------------------------------------------------------------------------------------------------------------
# 8. Settings
# Each is also a flag. The defaults reproduce GPT-2 (124M) with 10 billion tokens: 19,073 steps of 2^19 tokens, of which
# 715 (375 million tokens) warm up. Batch size, max_lr and warm-up are GPT-3's for this size (table 2.1, appendix B).


def setting(default, help, choices=None, minimum=0):
    help += "" if default in (None, "") else f" [{default}]"
    return field(default=default, metadata={"help": help, "choices": choices, "minimum": minimum})


@dataclass
class Settings:
    # Data
    data: str = setting("edu_fineweb10B", "folder of token shards, or a text file (the last tenth is for validation)")
    log_dir: str = setting("log", "folder for log.txt and checkpoints")
    init_from: str = setting("scratch", "scratch, gpt2 to gpt2-xl, a folder of weights, or a checkpoint")
    export: str = setting("", "write the weights of init_from or resume to this folder, for transformers")
    resume: bool = setting(False, "continue from the newest checkpoint in log_dir, with its settings", (True, False))
    # Model
    model: str = setting("gpt2", "gpt2, gpt2-medium, gpt2-large or gpt2-xl: sets the next three and max_lr", MODELS)
    n_layer: int = setting(12, "number of blocks", minimum=1)
    n_head: int = setting(12, "attention heads", minimum=1)
    n_embd: int = setting(768, "channels", minimum=1)
    block_size: int = setting(1024, "context and sequence length T, in tokens", minimum=1)
    vocab_size: int = setting(50304, "rows of the token embedding: 50257 tokens and padding", minimum=GPT2_VOCAB_SIZE)
    # Optimization
    total_batch_size: int = setting(524288, "tokens per step, over all processes", minimum=1)
    micro_batch_size: int = setting(64, "sequences B per forward pass; the default is lowered if needed", minimum=1)
    max_steps: int = setting(19073, "optimizer steps; 0 only evaluates init_from or, with --prompt, only samples")
    warmup_steps: int = setting(715, "steps of linear warm-up")
    max_lr: float = setting(6e-4, "peak learning rate; for other models GPT-3's")
    min_lr: float = setting(None, "final learning rate [a tenth of max_lr]")
    weight_decay: float = setting(0.1, "weight decay of 2D parameters")
    grad_clip: float = setting(1.0, "maximum gradient norm; 0: no clipping")
    seed: int = setting(1337, "seed of initial weights, shuffling and samples")
    shuffle: bool = setting(False, "train on windows of block_size tokens in random order", (True, False))
    # Evaluation
    eval_interval: int = setting(250, "steps between evaluations; 0 never evaluates")
    val_tokens: int = setting(10485760, "validation tokens per evaluation", minimum=1)
    hellaswag: str = setting("official", "official, off, or a local JSON-lines file")
    checkpoint_interval: int = setting(5000, "steps between checkpoints; 0 saves at the end only")
    keep_checkpoints: int = setting(0, "how many of the newest checkpoints to keep; 0 keeps all")
    prompt: str = setting("Hello, I'm a language model,", "text that samples continue; - reads stdin")
    num_samples: int = setting(4, "samples per evaluation")
    max_new_tokens: int = setting(32, "maximum length of a sample, in tokens after the prompt")
    temperature: float = setting(1.0, "sampling temperature; 0 takes the most likely token")
    top_k: int = setting(50, "sample from the k most likely tokens; 0: from all")
    # System
    device: str = setting("auto", "auto, cuda, mps or cpu")
    dtype: str = setting("auto", "dtype of matmuls", ("auto", "bfloat16", "float16", "float32"))
    compile: str = setting("auto", "torch.compile: auto (on CUDA), True or False", ("auto", True, False))


# These suit a megabyte of text and two CPU cores. So few tokens give a noisy gradient, so max_lr is halved.
TEXT_FILE_SETTINGS = {"block_size": 128, "total_batch_size": 1024, "micro_batch_size": 4}
TEXT_FILE_SETTINGS |= {"max_steps": 60, "warmup_steps": 10, "max_lr": 3e-4}
TEXT_FILE_SETTINGS |= {"eval_interval": 20, "val_tokens": 2048, "hellaswag": "off", "prompt": "ROMEO:\n"}


# ----------------------------------------------------------------------------------------------------------------------
# 9. The training loop


def train(settings, given, checkpoint):
    """Train, or evaluate if max_steps is 0. given: the flags on the command line. checkpoint: to resume, or None."""
    # Ranks, device, precision
    rank, local_rank, world_size = get_ranks()
    ddp = world_size > 1
    master_process = rank == 0  # this process prints, logs and saves
    device = pick_device(settings.device, local_rank, world_size)
    torch.manual_seed(settings.seed)  # all ranks start from the same weights
    keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # TF32: tensor cores multiply float32 numbers rounded to 10 bits of fraction (lecture: 1000 to 333 ms).
        torch.set_float32_matmul_precision("high")
    if ddp:
        backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, device_id=device_id, timeout=timedelta(minutes=10))
        check_ranks_agree(asdict(settings))
    # Autocast runs matmuls in this dtype. Weights, optimizer state and operations that need precision stay in float32
    # (lecture: 333 to 300 ms; a small gain: memory traffic dominates until torch.compile, and casts add to it).
    dtype = pick_dtype(settings.dtype, device)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # for other dtypes it does nothing

    # Model, torch.compile, DDP. Both wrap raw_model and share its weights. Checkpoints and samples use raw_model.
    raw_model = build_model(settings, given, checkpoint).to(device)  # may lower settings.block_size
    wants_compile = settings.compile is True or (settings.compile == "auto" and device.type == "cuda")
    compiled = wants_compile and can_compile(device)
    # The compiler sees the whole model and fuses neighboring operations into one kernel, which saves round trips to
    # GPU memory (lecture: 300 to 130 ms). Shapes are fixed (dynamic=False), and all code must compile (fullgraph=True).
    model = torch.compile(raw_model, dynamic=False, fullgraph=True) if compiled else raw_model
    if ddp:
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)  # one copy of the gradients

    # Data. If a batch of half a million tokens does not fit into memory, a step accumulates several micro-batches.
    B, T = fit_micro_batch(settings, given, world_size), settings.block_size
    grad_accum_steps = settings.total_batch_size // (B * T * world_size)
    train_loader = DataLoaderLite(B, T, rank, world_size, "train", settings.data, settings.shuffle, settings.seed)
    val_loader = DataLoaderLite(B, T, rank, world_size, "val", settings.data)
    examples = load_hellaswag(settings.hellaswag, raw_model.config.block_size) if settings.eval_interval > 0 else []

    # Optimizer, resume, log. data: what fixes the order of tokens; it must match on all ranks and on resume.
    min_lr = 0.1 * settings.max_lr if settings.min_lr is None else settings.min_lr
    optimizer = raw_model.configure_optimizers(settings.weight_decay, settings.max_lr)
    data = {"total_batch_size": settings.total_batch_size, "shuffle": [settings.seed, T] if settings.shuffle else None}
    data |= train_loader.contents | val_loader.contents
    start_step = restore(checkpoint, optimizer, scaler, settings, data) if checkpoint else 0
    train_loader.batch_index = start_step * grad_accum_steps
    if ddp:
        check_ranks_agree(data | {"step": start_step, "HellaSwag examples": len(examples)})
    log, _lock = open_log(settings, start_step) if master_process and settings.max_steps > 0 else (None, None)

    # Start-up message
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print0(f"device: {world_size} x {name}, {str(dtype)[6:]}, {'compiled' if compiled else 'eager'}")
    print0(f"model: {sum(p.numel() for p in raw_model.parameters()):,} parameters, {raw_model.config}")
    print0(f"data: {train_loader.num_tokens:,} tokens, validation {val_loader.num_tokens:,}, from {settings.data}")
    print0(f"step: {settings.total_batch_size:,} tokens, {B=}, {T=}, {grad_accum_steps=}, {world_size=}, {start_step=}")

    caught = catch_signals() if settings.max_steps > 0 else []  # the list grows when a signal arrives
    stopped_by = 0  # the number of the signal that all ranks have agreed on
    saved = True  # whether the last attempt to write a checkpoint worked
    newest = next(reversed(list_checkpoints(settings.log_dir)), "none")
    x, y = train_loader.next_batch(device)  # (B, T) each
    for step in range(start_step, settings.max_steps + 1):
        # There is one extra pass: after the last step, it only evaluates and saves the final model.
        last_step = step == settings.max_steps
        evaluate_now = settings.eval_interval and (step % settings.eval_interval == 0 or last_step) and not stopped_by
        save_now = settings.checkpoint_interval and step % settings.checkpoint_interval == 0
        save_now = step > start_step and (save_now or last_step or stopped_by)
        if (evaluate_now or save_now) and not all(p.isfinite().all() for p in raw_model.parameters()):
            raise UserError(f"step {step}: the weights are not finite: lower --max_lr. Last checkpoint: {newest}")

        # Once in a while: validation loss
        if evaluate_now:  # at first about ln(50304) = 10.8, a uniform guess. There is no dropout, so no model.eval()
            val_loss = evaluate(model, val_loader, settings.val_tokens, device, autocast)
            report(log, f"{step} val {val_loss:.4f}", f"validation loss: {val_loss:.4f}")

        # Once in a while: HellaSwag, on the uncompiled model, because the compiled one would recompile for every length
        if evaluate_now and examples:
            with autocast:
                losses = hellaswag.ending_losses(raw_model, examples, device, rank, world_size)  # (len(examples), 4)
            num_correct, _ = hellaswag.count_correct(losses, examples)
            accuracy = f"{num_correct / len(examples):.4f}"
            report(log, f"{step} hella {accuracy}", f"HellaSwag accuracy: {num_correct}/{len(examples)}={accuracy}")

        # Once in a while: samples
        if evaluate_now and master_process and settings.num_samples > 0:
            with autocast:
                print_samples(raw_model, settings)

        # Once in a while, and before leaving: a checkpoint
        if save_now and master_process:
            saved, newest = save_checkpoint(step, raw_model, optimizer, scaler, settings, data)
        if last_step or stopped_by:
            break

        # The gradient of the whole batch, one micro-batch at a time
        t0 = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss_accum = torch.zeros((), device=device)
        for micro_step in range(grad_accum_steps):
            if ddp:
                # Average over the ranks only in the last backward pass. DDP reads this flag in the forward pass.
                model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
            with autocast:
                _, loss = model(x, y)
            x, y = train_loader.next_batch(device)  # the CPU reads the next batch while the GPU computes
            # backward() adds to the gradients, which makes a sum over micro-batches. We want the mean.
            loss = loss / grad_accum_steps
            loss_accum += loss.detach()
            scaler.scale(loss).backward()

        # Undo the scaler's factor, then clip the gradient, so that one unusual batch cannot move the weights far
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), settings.grad_clip or math.inf)  # inf: no limit

        # All ranks need the same loss, and have to stop together
        stop = torch.full((), caught[0] if caught else 0, device=device)
        if ddp:
            dist.all_reduce(loss_accum, op=dist.ReduceOp.SUM)
            loss_accum /= world_size
            dist.all_reduce(stop, op=dist.ReduceOp.MAX)
        train_loss, norm, stopped_by = loss_accum.item(), norm.item(), stop.item()  # waits for the GPU
        # In float16, the norm may overflow: the scaler then skips the step and halves its scale. Below 1, give up.
        may_overflow = scaler.is_enabled() and scaler.get_scale() >= 1
        if not math.isfinite(train_loss) or not (math.isfinite(norm) or may_overflow):
            raise UserError(f"step {step}: loss {train_loss}, norm {norm}: lower --max_lr. Last checkpoint: {newest}")

        # Take the step
        lr = get_lr(step, settings.max_steps, settings.warmup_steps, settings.max_lr, min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.step(optimizer)
        scaler.update()

        # Log. On a GPU, the optimizer's work is still queued here, so it counts in the next step's time.
        dt = time.perf_counter() - t0
        text = f"step {step:5d} | loss {train_loss:.6f} | lr {lr:.4e} | norm {norm:.4f} | dt {1000 * dt:.2f}ms | "
        text += f"tok/s {settings.total_batch_size / dt:.0f} | left {dt * (settings.max_steps - step - 1) / 60:.1f}min"
        report(log, f"{step} train {train_loss:.6f}", text)

    if ddp:
        dist.barrier()  # the other ranks wait while the master process saves
        dist.destroy_process_group()
    if not saved or (log and log.closed):
        raise UserError(f"the last checkpoint or log line could not be written to {settings.log_dir}: see the warning")
    if stopped_by:
        print0(f"{signal.Signals(stopped_by).name}: stopped after {step} steps, --resume continues")
        sys.exit(128 + stopped_by)


# ======================================================================================================================
# Part II: housekeeping
# ----------------------------------------------------------------------------------------------------------------------
# 10. The command line, checks of settings


def parse_flags(argv):
    """The flags that were given: {name: value}. Raises UserError for a wrong one."""
    parser = fineweb.Parser(prog="train_gpt2.py", allow_abbrev=False)
    for f in fields(Settings):
        options = {"type": f.type, "choices": f.metadata["choices"], "metavar": f.name.upper()}
        if True in (options["choices"] or ()):  # --resume is short for --resume=True
            options |= {"type": lambda s: {"True": True, "False": False}.get(s, s), "nargs": "?", "const": True}
        parser.add_argument(f"--{f.name}", help=f.metadata["help"], **options)
    return {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}


def make_settings(given, base=None):
    """The flags that were given, on top of base: a checkpoint's settings or, if None, defaults that suit the data."""
    if base is None:
        shards = HERE / "edu_fineweb10B"
        data = given.get("data", str(shards if any(shards.glob("[!.]*")) else HERE / "input.txt"))
        base = {"data": data} | MODELS.get(given.get("model", given.get("init_from")), {})
        base |= TEXT_FILE_SETTINGS if os.path.isfile(data) else {}
    base |= {"log_dir": str(HERE / "log")}  # not the checkpoint's: the folder may have been moved
    settings = Settings(**(base | given))
    for f in fields(settings):
        value, minimum = getattr(settings, f.name), f.metadata["minimum"]
        if isinstance(value, (int, float)) and not minimum <= value <= 2**32:  # this catches nan, too
            raise UserError(f"--{f.name}={value} is not allowed: it must be from {minimum} to 2**32", status=2)
    return settings


def check_same(values, expected, place):
    """Raise UserError unless two dicts are equal. place: where the expected values are."""
    for name in sorted(values.keys() | expected.keys()):
        if values.get(name) != expected.get(name):
            raise UserError(f"{name} is {values.get(name)}, but {expected.get(name)} {place}: they must be the same")


def check_ranks_agree(values):
    """Raise UserError unless the values are the same on all ranks."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, values)
    for rank, theirs in enumerate(everyone):
        check_same(everyone[0], theirs, f"on rank {rank}")


# ----------------------------------------------------------------------------------------------------------------------
# 11. Checkpoints
# They hold tensors and plain types only. torch.load(weights_only=True) reads nothing else: no file can run code.


def list_checkpoints(log_dir):
    """The checkpoints in a folder, oldest first: model_05000.pt was saved after 5000 steps."""
    return sorted([p for p in Path(log_dir).glob("model_*.pt") if p.stem[6:].isdigit()], key=lambda p: int(p.stem[6:]))


def save_checkpoint(step, model, optimizer, scaler, settings, data):
    """Write log_dir/model_NNNNN.pt, and remove what keep_checkpoints does not keep. Returns (success, newest path)."""
    path = Path(settings.log_dir) / f"model_{step:05d}.pt"
    checkpoint = {"step": step, "config": asdict(model.config), "data": data, "rng": torch.get_rng_state()}
    checkpoint |= {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    checkpoint["settings"] = asdict(settings) | {"data": os.path.abspath(settings.data)}  # as seen from any folder
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda temporary: torch.save(checkpoint, temporary))
    except (OSError, RuntimeError) as error:
        print0(f"warning: {path} could not be written ({fineweb.reason_of(error)}); training continues")
        return False, next(reversed(list_checkpoints(settings.log_dir)), "none")
    print0(f"checkpoint: {path}")
    paths = list_checkpoints(settings.log_dir)
    unneeded = paths[: paths.index(path) + 1][: -settings.keep_checkpoints]  # later ones are damaged; [:-0] is empty
    unneeded += path.parent.glob("model_*.pt.tmp")  # of a run that was killed
    for old in unneeded:
        with suppress(OSError):
            old.unlink()
    return True, path


def load_checkpoint(path):
    """Read a checkpoint into CPU memory. Raises UserError if it is damaged, or not a checkpoint of this script."""
    with reported_as(f"{path} is damaged, or not a checkpoint (pickled objects are refused)"):
        print0(f"loading {path}")
        assert zipfile.ZipFile(path).testzip() is None, "wrong checksum"  # torch.load does not look at checksums
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        make_settings({}, checkpoint["settings"])
        return checkpoint


def newest_checkpoint(log_dir):
    """The newest checkpoint that can be read, or None if there is no checkpoint."""
    paths = list_checkpoints(log_dir)
    for path in reversed(paths):
        try:
            return load_checkpoint(path)
        except UserError as error:
            print0(f"warning: {error}; trying the previous one")
    if paths:
        raise UserError(f"no checkpoint in {log_dir} can be read: leave out --resume to start from scratch")


def build_model(settings, given, checkpoint):
    """The model on the CPU: resumed, from init_from or from scratch. Raises UserError if flags contradict its shape."""
    if checkpoint is None and os.path.isfile(settings.init_from):
        checkpoint = load_checkpoint(settings.init_from)
    if checkpoint:
        model = GPT.from_checkpoint(checkpoint)
    elif settings.init_from == "scratch":
        model = GPT(GPTConfig(**{f.name: getattr(settings, f.name) for f in fields(GPTConfig)}))
    else:
        model = GPT.from_pretrained(settings.init_from)
    for name, size in asdict(model.config).items():
        wanted = (MODELS.get(given.get("model"), {}) | given).get(name, size)
        if wanted != size and not (name == "block_size" and wanted < size):
            raise UserError(f"the weights have {name} {size}, not {wanted}: leave out --{name} or --model")
    settings.block_size = min(settings.block_size, model.config.block_size)
    return model


def restore(checkpoint, optimizer, scaler, settings, data):
    """Restore all but the weights. Returns the number of steps done. Raises UserError if it does not fit this run."""
    with reported_as("the checkpoint cannot be resumed"):
        check_same(data, checkpoint["data"], "in the checkpoint")
        step = checkpoint["step"]
        assert 0 <= step <= settings.max_steps, f"it has {step} steps, more than --max_steps={settings.max_steps}"
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for p, saved in zip(params, checkpoint["optimizer"]["state"].values(), strict=True):
            assert saved["exp_avg"].shape == saved["exp_avg_sq"].shape == p.shape, "the optimizer's shapes are wrong"
            optimizer.state[p] = {"step": p.new_tensor(float(saved["step"]))}
            optimizer.state[p] |= {name: torch.empty_like(p).copy_(saved[name]) for name in ("exp_avg", "exp_avg_sq")}
        scaler.load_state_dict(checkpoint["scaler"] or scaler.state_dict())  # empty unless the run was in float16
        torch.set_rng_state(checkpoint["rng"])
        return step


# ----------------------------------------------------------------------------------------------------------------------
# 12. The log folder


def open_log(settings, start_step):
    """Lock log_dir and open log.txt, for a run that starts after start_step steps. Returns (the file, the lock)."""
    path = Path(settings.log_dir) / "log.txt"
    with reported_as(f"--log_dir={settings.log_dir} cannot be written, or another run writes to it"):
        lock = FileLock(path.parent / ".lock", is_singleton=True).acquire(timeout=0)
        files = [file for file in (*list_checkpoints(path.parent), path) if file.exists()]
        if start_step > 0 and path.exists():  # keep the lines from before the checkpoint: the others come again
            lines = re.findall(r"^(\d{1,12}) (.+\n)", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
            kept = "".join(f"{step} {value}" for step, value in lines if int(step) < start_step)
            replace_file(path, lambda temporary: temporary.write_text(kept, encoding="utf-8"))
        elif start_step == 0 and files:
            if Path(settings.init_from).resolve() in [file.resolve() for file in files]:
                raise UserError(f"--init_from={settings.init_from} is in --log_dir: name another one for the new run")
            n = next(n for n in range(1, sys.maxsize) if not (path.parent / f"earlier_{n}").exists())
            earlier = path.parent / f"earlier_{n}"
            for file in files:
                os.renames(file, earlier / file.name)  # makes the folder, too
            print0(f"the earlier run in {path.parent} is now in {earlier} (delete it if you do not need it)")
        return open(path, "ab", buffering=0), lock  # stays open: on a network drive, opening it takes milliseconds


def report(log, line, message):
    """Print a message, and append a line like "250 val 6.1604" to the log. If that fails, training continues."""
    print0(message)
    try:
        if log and not log.closed:
            log.write(f"{line}\n".encode())
    except OSError as error:
        log.close()
        print0(f"warning: {log.name} could not be written ({error.strerror}); training continues")


# ----------------------------------------------------------------------------------------------------------------------
# 13. Signals, main


def catch_signals():
    caught = []  # the numbers of the signals that arrive from now on

    def catch(number, frame):
        caught.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the next Ctrl-C ends the run at once

    for number in (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)):  # Windows has no SIGHUP
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP, the signal of a closed terminal
            signal.signal(number, catch)
    print0("Ctrl-C: finish the step, save a checkpoint and exit. Twice: exit at once")
    return caught


def main(argv=None):
    given = parse_flags(argv)
    checkpoint = newest_checkpoint(given.get("log_dir", HERE / "log")) if given.get("resume") else None
    settings = make_settings(given, checkpoint["settings"] if checkpoint else None)
    if "export" in given:
        if Path(settings.export).exists() or (checkpoint is None and settings.init_from == "scratch"):
            raise UserError("--export needs weights, from --init_from or --resume, and a new folder's name", status=2)
        build_model(settings, given, checkpoint).save_pretrained(settings.export)
        return print0(f"exported: {settings.export}")
    if "prompt" in given and settings.max_steps == 0 and settings.num_samples > 0:
        return print_samples(build_model(settings, given, checkpoint).to(pick_device(settings.device)), settings)
    if settings.data == str(HERE / "input.txt") and "data" not in given and not checkpoint:
        print0("no edu_fineweb10B/ (python fineweb.py makes it): training on input.txt, with settings for it")
    try:
        train(settings, given, checkpoint)
    except RuntimeError as error:  # torch.OutOfMemoryError on a GPU; the CPU has no type of its own
        if "no kernel image" in str(error):
            raise UserError("this build of torch does not support this GPU: see its requirements") from error
        if not re.search("out of memory|can't allocate memory", str(error)):
            raise
        B = fit_micro_batch(settings, given, get_ranks()[2])
        remedy = f"--micro_batch_size={B // 2}" if B > 1 else "a smaller --block_size or --model"
        raise UserError(f"out of memory: use {remedy}") from error


if __name__ == "__main__":
    fineweb.run_main(main, interrupted="--resume continues from the last checkpoint")
