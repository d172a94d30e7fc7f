"""
Reproduce GPT-2 (124M) in one file: the model, the data, the training loop.

    python train_gpt2.py                                      # one process, on a GPU or on the CPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py    # the reproduction, on the eight GPUs of one machine
    python train_gpt2.py --help                               # every setting

The file is made to be read from top to bottom. What a section uses has been explained before it:

     1. The model                        8. The hardware: device, precision, processes
     2. OpenAI's weights, in and out     9. Checkpoints
     3. Sampling                        10. The log
     4. The optimizer                   11. Evaluation
     5. The data                        12. The gradient of an update
     6. The learning rate               13. The training loop
     7. The settings

"Lecture" is Andrej Karpathy's "Let's reproduce GPT-2 (124M)", which this file follows. Its chapter on speed is a
ladder, in milliseconds for 16 x 1024 tokens on one A100: float32 1000, TF32 333, bf16 300, compile 130, flash attention
96, padded vocabulary 93, fused AdamW 90. Each step is explained where it is used.

On a first reading, skip the flags in 7, all of 9 but its last function, and 10: they are housekeeping.

Two papers say nearly all of what is to be reproduced. GPT-2 (Radford et al. 2019) has the model and GPT-3 (Brown et
al. 2020) the training settings, which the first one leaves out. Shapes in comments: B sequences in a batch, T tokens
in a sequence, C = n_embd numbers for a token.
"""

import argparse
import bisect
import ctypes
import difflib
import functools
import itertools
import json
import math
import os
import pickle
import re
import signal
import statistics
import sys
import time
import zipfile
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from torch.nn.attention import SDPBackend
from torch.nn.parallel import DistributedDataParallel as DDP

import hellaswag

# UserError: a mistake that the user can mend; FlagError: one in the flags. run_script: runs main and shows them in one
# line. gpt2_encoding: the tokenizer. vocabulary_files: its files. replace_file: writes a file whole or not at all.
# reason_of: an error in one line.
from fineweb import (
    FlagError,
    OneLineParser,
    UserError,
    gpt2_encoding,
    reason_of,
    replace_file,
    run_script,
    vocabulary_files,
)

HERE = Path(__file__).resolve().parent
GPT2_VOCAB_SIZE = 50257  # 256 bytes, 50,000 merges, <|endoftext|>
MODELS = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},  # 124M parameters
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},  # 355M
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},  # 774M
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},  # 1558M
}


# ----------------------------------------------------------------------------------------------------------------------
# 1. The model
#
# A stack of identical blocks. In each, attention lets every token gather from itself and the tokens before it, then an
# MLP lets every token think over what it gathered. The names of the parts are OpenAI's, and so those of every published
# copy of the weights: wte and wpe embed the token and its position, h holds the blocks, ln_* are the norms, c_* linear
# layers, c_proj the one back to C.


@dataclass
class GPTConfig:
    block_size: int = 1024  # the longest context, in tokens
    # 50,257 is odd. Training pads it (Settings.vocab_size) to 50,304 = 128 x 393, so that the largest matrix fills the
    # GPU's tiles (lecture: 96 to 93 ms). The 47 extra ids are never a target, and the network learns never to predict
    # them.
    vocab_size: int = GPT2_VOCAB_SIZE
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768


class LayerNorm(nn.Module):
    """Bring each token's C numbers to mean 0 and variance 1, then scale and shift them: (B, T, C) -> (B, T, C).

    This is nn.LayerNorm, with scale and shift as operations of their own (torch.compile fuses them again). On the CPU,
    nn.LayerNorm's kernel adds up the gradients of weight and bias in an order that depends on the number of threads.
    Written like this the sums are the same for every number, so that the default run on the CPU is the same to the last
    bit on one process and on two with half of the threads each (section 8).
    """

    def __init__(self, n_embd):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd))

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape) * self.weight + self.bias


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which no token sees a later one: (B, T, C) -> (B, T, C). Vaswani et al. 2017, 3.2."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head != 0:
            raise UserError(f"n_embd {config.n_embd} does not divide into n_head {config.n_head} heads: change either")
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value of all heads, in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head = config.n_head

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)  # each (B, T, C)
        # Heads move beside the batch: as far as the products below know, they are B * n_head separate sequences.
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, n_head, T, head_size)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if x.device.type == "cpu":  # its kernel is faster with each head's numbers in one piece (5 % of an update)
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        # softmax(q k^T / sqrt(head_size)) v, with later tokens masked out. Done step by step, the T x T matrix of each
        # head goes through GPU memory for the scores, the scale, the mask and the softmax. Instead PyTorch picks a
        # fused kernel, FlashAttention (Dao et al. 2022) or one of the same idea; the start-up message says which. It
        # works in tiles that fit on the chip, never writes the matrix to memory, and computes it again in the backward
        # pass. More arithmetic, far less traffic (lecture: 130 to 96 ms an update).
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, n_head, T, head_size)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.c_proj(y)


class MLP(nn.Module):
    """Two linear layers with a GELU between, for each token by itself: (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        # GPT-2 was trained with the tanh approximation of GELU, so its weights want exactly that one.
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    """Attention, then MLP, each adding its result to x, the residual stream: (B, T, C) -> (B, T, C).

    The norms stand inside the branches (pre-norm, GPT-2 section 2.3). The residual stream itself runs from the
    embedding to the last norm with nothing but additions on it, so the gradient has a direct path to every block.
    """

    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """GPT-2. `model(idx)[0]` is the logits, a score for every token of the vocabulary to be the next one;
    `model(idx, targets)[1]` is the loss."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                "ln_f": LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # One matrix embeds a token and scores it as the next one (Press & Wolf 2017): tokens that mean the same should
        # be near each other in both places, and it saves 38.6M parameters, nearly a third of this model.
        self.transformer.wte.weight = self.lm_head.weight

        self.apply(self._init_weights)  # on every module in here
        # Every block adds two branches to the residual stream. The sum of 2 * n_layer independent terms has a standard
        # deviation sqrt(2 * n_layer) times that of one, so the last layer of each branch starts that much smaller
        # (GPT-2 section 2.3).
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

    def _init_weights(self, module):
        # 0.02 as in OpenAI's code. It has 0.01 for the positions, but transformers and the lecture use 0.02 there too.
        # The usual choice, 1/sqrt(n_embd), would be 0.036 at this size and 0.025 at the largest.
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def hidden(self, idx):
        """What the head reads the next token from: (B, T) int64 -> (B, T, C)."""
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit the context of {self.config.block_size}")
        positions = torch.arange(T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C) + (T, C)
        for block in self.transformer.h:
            x = block(x)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """Predict the token that follows each token.

        idx: (B, T) int64, T <= block_size. targets: the same shape, idx moved on by one token; -1 counts for nothing.
        Returns (logits, None) without targets, logits (B, T, vocab_size); and (None, loss) with them, the loss being
        the mean cross entropy in nats. Training gets no logits: they are the largest tensor by far (6.6 GB in bf16 for
        64 x 1024 tokens), and whoever held them would keep them in memory through the backward pass.
        """
        x = self.hidden(idx)  # (B, T, C)
        if targets is None:
            return self.lm_head(x), None  # (B, T, vocab_size)
        x, targets = x.flatten(0, 1), targets.flatten()  # (B * T, C), (B * T,)
        # The logits of all tokens at once, their softmax and its gradient are gigabytes of fresh memory. A CPU is
        # faster with 512 tokens at a time (16.2 to 13.3 seconds for an update of 4,096 tokens), a GPU with all of them.
        size = 512 if x.device.type == "cpu" else len(x)
        losses = [
            F.cross_entropy(self.lm_head(part), answers, ignore_index=-1, reduction="sum")
            for part, answers in zip(x.split(size), targets.split(size), strict=True)
        ]
        return None, torch.stack(losses).sum() / (targets != -1).sum()

    # ------------------------------------------------------------------------------------------------------------------
    # 2. OpenAI's weights, in and out
    #
    # Reading them is the test of the model above: most mistakes turn its text into noise, small ones raise the loss.

    # OpenAI's code keeps these matrices as (in, out), nn.Linear as (out, in). Published files have OpenAI's layout.
    TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

    @classmethod
    def from_pretrained(cls, name_or_folder):
        """Read GPT-2 weights: one of OpenAI's four by name, from the hub, or a folder that transformers saved.

        The folder holds config.json and *.safetensors, with or without `transformer.` before the tensors' names.
        Raises UserError where the weights cannot be had, or are not those of a GPT-2 that this class computes.
        """
        folder = Path(name_or_folder)
        if name_or_folder in MODELS:
            from huggingface_hub import snapshot_download  # takes a second, so only where it is needed

            files = ["config.json", "model.safetensors"]
            try:
                folder = Path(snapshot_download(f"openai-community/{name_or_folder}", allow_patterns=files))
            except Exception as error:  # the network has dozens of kinds
                message = f"{name_or_folder} could not be fetched from the Hugging Face hub ({type(error).__name__})"
                raise UserError(f"{message}: check the network, or name a folder that holds it") from error
        sizes = {  # our names for them, and OpenAI's
            "block_size": "n_positions",
            "vocab_size": "vocab_size",
            "n_layer": "n_layer",
            "n_head": "n_head",
            "n_embd": "n_embd",
        }
        try:
            saved = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
            for key in sizes.values():
                if type(saved.get(key)) is not int or saved[key] < 1:
                    raise ValueError(f"config.json has {key} {saved.get(key)}, not a whole number")
            tensors = {}
            for file in sorted(folder.glob("*.safetensors")):  # large models come in several files
                tensors.update(load_file(file))
        except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
            raise UserError(f"{folder} is not a folder of GPT-2 weights: {error}") from error
        if not tensors:
            raise UserError(f"{folder} has no .safetensors file (pickled .bin weights are never read): save it as such")

        expected = {
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "tie_word_embeddings": True,
            "n_inner": 4 * saved["n_embd"] if saved.get("n_inner") else None,
        }
        for key, value in expected.items():
            if saved.get(key, value) != value:
                raise UserError(f"{folder}/config.json has {key} {saved[key]}: only {value} is supported")
        model = cls(GPTConfig(**{ours: saved[theirs] for ours, theirs in sizes.items()}))
        for name, parameter in model.named_parameters():  # the tied head comes once, as wte
            short_name = name.removeprefix("transformer.")
            tensor = tensors.get(name, tensors.get(short_name))
            if tensor is None:
                raise UserError(f"{folder}: the tensor {short_name} is missing")
            target = parameter.detach()  # the same memory, without autograd
            target = target.t() if name.endswith(cls.TRANSPOSED) else target
            if tensor.shape != target.shape:
                shapes = f"{list(tensor.shape)}, not {list(target.shape)}"
                raise UserError(f"{folder}: the tensor {short_name} has the shape {shapes}")
            target.copy_(tensor)
        return model

    def save_pretrained(self, folder):
        """Write what transformers, lm-evaluation-harness and llama.cpp's converter read: the weights, in float32, with
        their configuration, and the tokenizer's files.

        The rows that only pad the vocabulary stay behind: 50,257 are written. Raises OSError where the folder cannot be
        written, UserError where the tokenizer's files are missing.
        """
        vocab_json, merges = vocabulary_files()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        vocab_size = min(self.config.vocab_size, GPT2_VOCAB_SIZE)
        tensors = {}
        for name, parameter in self.named_parameters():
            tensor = parameter.detach().float().cpu()
            if name == "transformer.wte.weight":
                tensor = tensor[:vocab_size]
            tensors[name] = (tensor.t() if name.endswith(self.TRANSPOSED) else tensor).contiguous()
        end_of_text = {"bos_token_id": GPT2_VOCAB_SIZE - 1, "eos_token_id": GPT2_VOCAB_SIZE - 1}
        config = {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_positions": self.config.block_size,
            "n_ctx": self.config.block_size,
            "vocab_size": vocab_size,
            "n_layer": self.config.n_layer,
            "n_head": self.config.n_head,
            "n_embd": self.config.n_embd,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            **end_of_text,
        }
        tokenizer = {
            "tokenizer_class": "GPT2Tokenizer",
            "model_max_length": self.config.block_size,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
        }
        files = {
            "config.json": json.dumps(config, indent=2).encode(),
            "generation_config.json": json.dumps(end_of_text, indent=2).encode(),
            "tokenizer_config.json": json.dumps(tokenizer, indent=2).encode(),
            "vocab.json": vocab_json.read_bytes(),
            "merges.txt": merges.read_bytes(),
            "model.safetensors": save(tensors, metadata={"format": "pt"}),
        }
        for name, content in files.items():
            replace_file(folder / name, lambda path, content=content: path.write_bytes(content))

    # ------------------------------------------------------------------------------------------------------------------
    # 3. Sampling
    #
    # Predict the next token, draw it, append it, and again: nothing more is needed to write text. Each token computes
    # its whole context anew (no key/value cache), which is slow and simple. Without dropout there is no model.eval() to
    # call.

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=50, generator=None):
        """Continue each row of idx: (B, T) int64 -> (B, T + max_new_tokens).

        temperature: below 1 sharpens the distribution, above 1 flattens it, 0 always takes the likeliest token.
        top_k: draw among this many likeliest tokens, all of them with None or 0 (Fan et al. 2018, section 5.4).
        generator: a torch.Generator on idx's device, to draw the same tokens again and to leave the global one alone.
        """
        if temperature == 0:
            temperature, top_k = 1.0, 1
        for _ in range(max_new_tokens):
            context = idx[:, -self.config.block_size :]
            x = self.hidden(context)[:, -1]  # (B, C): only the last token's successor is in question
            logits = self.lm_head(x).float()  # (B, vocab_size)
            # Ids that only pad the vocabulary stand for no text: the tokenizer could not decode one.
            logits[:, GPT2_VOCAB_SIZE:] = -math.inf
            logits, ids = torch.topk(logits, min(top_k or logits.size(1), logits.size(1)))  # both (B, k)
            # Less the largest first: a tiny temperature would divide them to infinity.
            probs = F.softmax((logits - logits[:, :1]) / temperature, dim=1)
            choice = torch.multinomial(probs, num_samples=1, generator=generator)  # (B, 1)
            idx = torch.cat((idx, ids.gather(1, choice)), dim=1)
        return idx

    # ------------------------------------------------------------------------------------------------------------------
    # 4. The optimizer

    def configure_optimizers(self, weight_decay, learning_rate, device_type):
        """AdamW (Loshchilov & Hutter 2019) with GPT-3's numbers: betas 0.9 and 0.95, eps 1e-8 (appendix B).

        Adam keeps two running averages for each weight, of its gradient and of the gradient's square, and steps by the
        first over the root of the second: by about the learning rate, whatever the gradient's scale. The W is for
        weight decay: it shrinks the weight directly, without passing through those averages. It keeps matrices and
        embeddings from relying on a few large weights; biases and norms, one-dimensional, are left alone.
        """
        decay = [p for p in self.parameters() if p.dim() >= 2]
        no_decay = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
        # Fused: one pass over weights, gradients and averages, instead of one for each operation of the formula
        # (lecture: 93 to 90 ms an update).
        fused = device_type in ("cuda", "cpu", "mps")
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=fused)


# ----------------------------------------------------------------------------------------------------------------------
# 5. The data
#
# Training data is one long row of token ids, cut into files of 100M tokens (shards). fineweb.py makes them.
#
# An update learns from half a million tokens, too many for a GPU at once. So each of num_processes processes (one for
# each GPU) takes grad_accum_steps micro-steps, with a micro-batch of B sequences of T tokens in each: an update is
# B * T * num_processes * grad_accum_steps tokens. Sections 8 and 12 say how the gradients come together.

SHARD_NAME = r"[^.].*_{split}(_\d+)?\.(npy|bin)"  # edufineweb_train_000001.npy; llm.c: tiny_shakespeare_val.bin


def open_shard(path):
    """Check a shard's header and size: (path, bytes before the first token, number of tokens).

    .npy: one-dimensional uint16. .bin (llm.c): 256 little-endian int32, the first three being 20240520, the version 1
    and the number of tokens; then the tokens as uint16.
    """
    try:
        if path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
            if tokens.dtype != np.dtype("<u2") or tokens.ndim != 1:
                raise ValueError(f"it holds {tokens.dtype} {tokens.shape}, not one row of uint16")
            offset, num_tokens = tokens.offset, len(tokens)
        else:
            header = np.fromfile(path, dtype="<i4", count=256)
            if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
                raise ValueError("it has no llm.c header of version 1")
            offset, num_tokens = header.nbytes, int(header[2])
            if path.stat().st_size != offset + 2 * num_tokens:
                raise ValueError(f"its header promises {num_tokens} tokens, its size is {path.stat().st_size} bytes")
        if num_tokens == 0:
            raise ValueError("it is empty")
    except Exception as error:  # what numpy raises for a damaged header is of many kinds
        raise UserError(f"the shard {path} cannot be used: {error}") from error
    return path, offset, num_tokens


def read_shard(shard, start, count):
    """Tokens start to start + count of a shard, fewer at its end: uint16."""
    path, offset, num_tokens = shard
    count = min(count, num_tokens - start)
    try:
        tokens = np.fromfile(path, dtype="<u2", count=count, offset=offset + 2 * start)
    except OSError as error:
        raise UserError(f"the shard {path} cannot be read: {error}") from error
    if len(tokens) < count:
        raise UserError(f"the shard {path} has become shorter since the start: put the whole file back, then --resume")
    if tokens.max() >= GPT2_VOCAB_SIZE:
        bad = start + int(tokens.argmax())
        raise UserError(f"the shard {path} holds {tokens.max()} at token {bad}, GPT-2's largest id is 50256: remake it")
    return tokens


@functools.cache  # the two splits share one tokenization
def tokenize_file(path):
    """A text file's tokens: uint16."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig: without the mark that Windows puts in front
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a UTF-8 text file: {error}") from error
    return np.array(gpt2_encoding().encode_ordinary(text), dtype=np.uint16)


class DataLoaderLite:
    """Batches of a split ("train" or "val"), out of a folder of shards or a text file (last tenth: "val").

    All the shards, end to end and over again, are one endless stream. Micro-step k of process r takes the B * T tokens
    that begin at (k * num_processes + r) * B * T, and one more for the last target. So no token is dropped where a
    shard ends, no process runs ahead, and where a run stands follows from the number of its updates alone: it can be
    interrupted and go on with other GPUs and another micro-batch, and nothing is read twice or skipped.
    """

    def __init__(self, B, T, process_rank, num_processes, split, data_root):
        self.B, self.T = B, T
        self.process_rank, self.num_processes = process_rank, num_processes
        self.micro_step = 0
        data_root = Path(data_root)
        if data_root.is_file():
            tokens = tokenize_file(data_root)
            first_val = len(tokens) * 9 // 10
            self.text = tokens[:first_val] if split == "train" else tokens[first_val:]
            names, lengths = [data_root.name], [len(self.text)]
        else:
            self.text = None
            try:
                paths = sorted(data_root.iterdir())
            except OSError as error:
                raise UserError(f"--data={data_root} is neither a folder of shards nor a text file") from error
            pattern = re.compile(SHARD_NAME.format(split=split))
            self.shards = [open_shard(path) for path in paths if pattern.fullmatch(path.name)]
            if not self.shards:
                raise UserError(f"{data_root} has no {split} shard (NAME_{split}_000000.npy or .bin): make it anew")
            names, lengths = [path.name for path, _, _ in self.shards], [num_tokens for _, _, num_tokens in self.shards]
        self.contents = [[name, length] for name, length in zip(names, lengths, strict=True)]
        self.ends = np.cumsum(lengths).tolist()  # where in the stream each shard ends
        self.num_tokens = self.ends[-1]
        if self.num_tokens < 2:
            raise UserError(f"{data_root} has {self.num_tokens} {split} tokens: more text is needed")

    def read(self, position, count):
        """count tokens of the endless stream from position on: (count,) int64."""
        pieces = []
        while count > 0:
            position %= self.num_tokens
            i = bisect.bisect_right(self.ends, position)  # the shard that holds this position
            start = position - (self.ends[i - 1] if i > 0 else 0)
            if self.text is not None:
                piece = self.text[start : start + count]
            else:
                piece = read_shard(self.shards[i], start, count)
            pieces.append(piece)
            position += len(piece)
            count -= len(piece)
        return np.concatenate(pieces).astype(np.int64)

    def set_position(self, micro_step):
        """Go to a micro-step, counted from the first of the run: update * grad_accum_steps."""
        self.micro_step = micro_step

    def next_batch(self):
        """Inputs x and targets y, both (B, T) int64: y[b, t] is the token that follows x[b, t] in the data."""
        B, T = self.B, self.T
        position = (self.micro_step * self.num_processes + self.process_rank) * B * T
        tokens = torch.from_numpy(self.read(position, B * T + 1))
        self.micro_step += 1
        return tokens[:-1].view(B, T), tokens[1:].view(B, T)


# ----------------------------------------------------------------------------------------------------------------------
# 6. The learning rate
#
# In the first updates Adam's averages rest on few gradients, so the rate starts small and warms up. Later, when what is
# left to learn is fine, it falls along half a cosine to a tenth.


def get_lr(step, max_steps, warmup_steps, max_lr, min_lr):
    """The learning rate of an update, counted from 0 (GPT-3, appendix B)."""
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    if step >= max_steps:
        return min_lr
    progress = (step - warmup_steps) / (max_steps - warmup_steps)  # 0 to 1
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * progress)) * (max_lr - min_lr)


def gpt3_max_lr(num_params):
    """GPT-3's peak learning rate for a model of this size (table 2.1): the larger the model, the smaller the steps."""
    for limit, max_lr in ((240e6, 6e-4), (550e6, 3e-4), (1000e6, 2.5e-4)):  # 125M, 350M, 760M and their neighbours
        if num_params < limit:
            return max_lr
    return 2e-4  # 1.3B


# ----------------------------------------------------------------------------------------------------------------------
# 7. The settings
#
# Each is a field here and a flag of the same name on the command line. The defaults are the reproduction, from GPT-3's
# table 2.1 and appendix B: half a million tokens an update (2^19, a number that divides well), 19,073 updates, 10
# billion tokens, the first 715 of them to warm up (GPT-3's 375 million tokens), decay 0.1, clipping at 1.


def setting(default, group, help):
    return field(default=default, metadata={"group": group, "help": help})


@dataclass
class Settings:
    data: str = setting("edu_fineweb10B", "data", "folder of token shards, or a text file (its last tenth validates)")
    log_dir: str = setting("log", "data", "folder for log.txt and the checkpoints")
    init_from: str = setting("scratch", "data", "scratch, gpt2 to gpt2-xl, a folder of weights, or a checkpoint")
    export: str = setting("", "data", "only write init_from's or resume's weights here, as transformers reads them")
    resume: bool = setting(False, "data", "go on from the newest checkpoint in log_dir, with its settings")
    model: str = setting("gpt2", "model", "shape: gpt2, gpt2-medium, gpt2-large or gpt2-xl")
    n_layer: int | None = setting(None, "model", "blocks, instead of the shape's")
    n_head: int | None = setting(None, "model", "attention heads, instead of the shape's")
    n_embd: int | None = setting(None, "model", "width, instead of the shape's")
    block_size: int = setting(1024, "model", "context and sequence length T, tokens")
    vocab_size: int = setting(50304, "model", "rows of the token embedding: GPT-2's 50257 tokens and padding")
    total_batch_size: int = setting(524288, "optimisation", "tokens in an update, on all processes together")
    micro_batch_size: int = setting(
        64, "optimisation", "sequences a process computes at once (the default shrinks to a divisor)"
    )
    max_steps: int = setting(19073, "optimisation", "updates; 0 only evaluates and samples")
    warmup_steps: int = setting(715, "optimisation", "updates in which the learning rate rises")
    max_lr: float | None = setting(None, "optimisation", "peak learning rate [GPT-3's for the size: 6e-4 for gpt2]")
    min_lr: float | None = setting(None, "optimisation", "last learning rate [a tenth of max_lr]")
    weight_decay: float = setting(0.1, "optimisation", "weight decay of matrices and embeddings")
    grad_clip: float = setting(1.0, "optimisation", "largest gradient norm; 0 does not clip")
    seed: int = setting(1337, "optimisation", "seed of the initial weights and of the samples")
    eval_interval: int = setting(250, "evaluation", "updates between evaluations; 0 never evaluates")
    val_tokens: int = setting(10485760, "evaluation", "validation tokens in an evaluation")
    hellaswag: str = setting("official", "evaluation", "official, off, or a local JSON-lines file")
    checkpoint_interval: int = setting(5000, "evaluation", "updates between checkpoints; 0 saves at the end only")
    keep_checkpoints: int = setting(0, "evaluation", "newest checkpoints to keep; 0 keeps all")
    prompt: str = setting("Hello, I'm a language model,", "evaluation", "text that the samples continue; - reads stdin")
    num_samples: int = setting(4, "evaluation", "samples printed at each evaluation")
    max_new_tokens: int = setting(32, "evaluation", "most tokens in a sample after the prompt")
    temperature: float = setting(1.0, "evaluation", "of sampling; 0 always takes the likeliest token")
    top_k: int = setting(50, "evaluation", "draw among this many likeliest tokens; 0 among all")
    device: str = setting("auto", "system", "auto, cuda, mps or cpu")
    dtype: str = setting("auto", "system", "of the forward pass: auto, bfloat16, float16 or float32")
    compile: str = setting("auto", "system", "torch.compile: auto (on CUDA), True or False")


# What a text file of about a megabyte wants instead, small enough for two CPU cores. The learning rate is half of
# GPT-3's: the gradient of 1,024 tokens is noisy, and at 6e-4 the loss jumps.
TEXT_FILE_SETTINGS = {
    "block_size": 128,
    "total_batch_size": 1024,
    "micro_batch_size": 4,
    "max_steps": 60,
    "warmup_steps": 10,
    "max_lr": 3e-4,
    "eval_interval": 20,
    "val_tokens": 2048,
    "hellaswag": "off",
    "prompt": "ROMEO:\n",
}


def parse_bool(text):
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError("expected True or False")
    return text == "True"


def parse_flags(argv):
    """The settings that the command line gives, and no others: {name: value}. Raises FlagError on a wrong flag."""
    parser = OneLineParser(
        prog="train_gpt2.py",
        usage="python train_gpt2.py [--name=value ...]   or   torchrun ... train_gpt2.py [--name=value ...]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    groups = {}
    convert = {bool: parse_bool, int: int, int | None: int, float: float, float | None: float, str: str}
    for f in fields(Settings):
        name = f.metadata["group"]
        groups[name] = groups.get(name) or parser.add_argument_group(name)
        options = {"type": convert[f.type], "metavar": f.name.upper()}
        if f.type is bool or f.name == "compile":  # --resume reads as --resume=True
            options |= {"nargs": "?", "const": convert[f.type]("True")}
        default = "" if f.default in (None, "") else f" [{f.default}]"
        groups[name].add_argument(f"--{f.name}", help=f.metadata["help"].replace("%", "%%") + default, **options)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        close = difflib.get_close_matches(unknown[0].split("=")[0], [f"--{f.name}" for f in fields(Settings)], 1, 0.75)
        parser.error(f"unknown argument {unknown[0]}" + (f", did you mean {close[0]}?" if close else ""))
    return vars(given)


def make_settings(given, saved=None):
    """The given flags, over the resumed checkpoint's settings or, in a new run, over defaults that suit the data."""
    if saved is None:
        fineweb, shakespeare = HERE / "edu_fineweb10B", HERE / "input.txt"
        data = given.get("data", str(fineweb if fineweb.exists() else shakespeare))
        saved = {"data": data, "log_dir": str(HERE / "log")} | (TEXT_FILE_SETTINGS if os.path.isfile(data) else {})
    settings = Settings(**(saved | {"export": ""} | given))
    if given.get("export") == "":
        raise FlagError("--export needs the name of a folder")
    if os.path.exists(settings.data):
        settings.data = os.path.abspath(settings.data)  # a run may be resumed from another folder

    at_least_1 = ["n_layer", "n_head", "n_embd", "block_size", "total_batch_size", "micro_batch_size", "val_tokens"]
    for f in fields(Settings):
        value, least = getattr(settings, f.name), 1 if f.name in at_least_1 else 0
        most = 2**32 if f.type in (int, int | None) else 1e38
        if isinstance(value, (int, float)) and not least <= value <= most:
            raise FlagError(f"--{f.name}={value} is not allowed: it must be from {least} to {most}")
    choices = {"model": list(MODELS), "dtype": ["auto", "bfloat16", "float16", "float32"]}
    choices["compile"] = ["auto", "True", "False"]
    for name, names in choices.items():
        if getattr(settings, name) not in names:
            raise FlagError(f"--{name}={getattr(settings, name)} is unknown: choose among {', '.join(names)}")
    if settings.vocab_size < GPT2_VOCAB_SIZE:
        raise FlagError(f"--vocab_size={settings.vocab_size} is too small: GPT-2's tokens are {GPT2_VOCAB_SIZE}")
    return settings


def fit_micro_batch(settings, world_size, exact):
    """The micro-batch: settings.micro_batch_size, or where `exact` is False the largest below it that divides.

    An update's sequences must divide evenly into processes, and a process's share into micro-batches.
    Raises UserError with the nearest sizes that work.
    """
    T, total, size = settings.block_size, settings.total_batch_size, settings.micro_batch_size
    fits = total // (T * world_size)
    if total != fits * T * world_size:
        nearest = " and ".join(str(n * T * world_size) for n in (fits, fits + 1) if n > 0)
        problem = f"--total_batch_size={total} is not a multiple of block_size x processes = {T} x {world_size}"
        raise UserError(f"{problem}: nearest that work: {nearest}")
    divisors = [n for n in range(1, math.isqrt(fits) + 1) if fits % n == 0]
    divisors = sorted({*divisors, *(fits // n for n in divisors)})
    largest_fit = max(n for n in divisors if n <= size)
    if exact and largest_fit != size:
        nearest = " and ".join(str(n) for n in [largest_fit, *[n for n in divisors if n > size][:1]])
        problem = f"--micro_batch_size={size} does not divide the {fits} sequences of a process"
        raise UserError(f"{problem}: nearest that work: {nearest}")
    return largest_fit


# ----------------------------------------------------------------------------------------------------------------------
# 8. The hardware: device, precision, processes
#
# torchrun starts one process for each GPU and tells it through environment variables who it is: its rank among all
# processes (world_size of them), and its local rank among those of its machine, which is the number of its GPU. All
# hold the same weights, each computes the gradient of its own share of the batch, DistributedDataParallel (DDP)
# averages the gradients, and all make the same update.
#
# Each computes in the precision that its hardware is fast in. Autocast picks it operation by operation, in the forward
# pass and the loss: matrix products in bf16, with half the bits to move and twice the peak rate (the lecture gained
# only 333 to 300 ms from it: memory traffic was the limit, until compilation and flash attention took that away);
# softmax, norms and the loss, where rounding would add up, in float32. The weights and the optimizer's state stay in
# float32. On GPUs without bf16 it is float16, in which small gradients would become zero. So a gradient scaler
# multiplies the loss by a large factor, divides the gradients by it before the step, and skips the update if one
# overflowed. With the other formats it does nothing.


def place_among_processes():
    """(rank, local rank, world size), which torchrun gives in environment variables; (0, 0, 1) without it."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return 0, 0, 1
    if "RANK" not in os.environ or "LOCAL_RANK" not in os.environ:
        raise UserError("WORLD_SIZE is set, RANK and LOCAL_RANK are not: start with torchrun, or unset WORLD_SIZE")
    return int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), world_size


def pick_device(name, local_rank, world_size):
    """The device of this process. Raises UserError where there is none of that kind, or too few."""
    if name == "auto":
        mps = torch.backends.mps.is_available() and world_size == 1  # gloo, DDP's carrier there, knows no MPS
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device={name} is unknown: choose cuda, mps or cpu") from error
    if device.type not in ("cuda", "mps", "cpu"):
        raise UserError(f"--device={name} is not supported: choose cuda, mps or cpu")
    if device.type == "mps" and (world_size > 1 or not torch.backends.mps.is_available()):
        raise UserError("--device=mps needs an Apple GPU and a single process: leave torchrun out, or use --device=cpu")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device=cuda finds no GPU: install a CUDA build of torch, or use --device=cpu")
        gpus = torch.cuda.device_count()
        if world_size > 1 and local_rank >= gpus:
            raise UserError(f"process {local_rank} has no GPU, this machine has {gpus}: use --nproc_per_node={gpus}")
        if world_size > 1 or device.index is None:
            device = torch.device("cuda", local_rank)
        if device.index >= gpus:
            raise UserError(f"--device={name} is not there: this machine has {gpus} GPUs, counted from 0")
    return device


def pick_dtype(name, device):
    """The number format of the forward pass.

    float32 has 8 bits of exponent and 23 of fraction; bfloat16 keeps the exponent and cuts the fraction to 7, so it
    needs half the memory and covers the same range. float16 has 5 and 10: what falls below its range becomes zero,
    which is why gradients then need a scaler. Where neither is fast, float32.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":  # torch.cuda.is_bf16_supported() also counts GPUs that only emulate it
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # MPS, and torch before 2.12
        return torch.float32
    features = torch.cpu.get_capabilities()  # avx512_bf16 and amx_bf16 among them
    return torch.bfloat16 if any(present for name, present in features.items() if "bf16" in name) else torch.float32


def peak_flops(device, dtype):
    """What the device's matrix units can do in dense bf16 or float16, in FLOP/s; None where that is not known here."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    if "A100" in name:
        return 312e12
    peaks = {"H100 80GB HBM3": 989e12, "H200": 989e12, "RTX 3090": 71e12, "RTX 4090": 165e12, "RTX 5090": 209e12}
    # Whole names only: an H100 PCIe, and the Ti, D and laptop kinds of an RTX, are other chips.
    return next((flops for key, flops in peaks.items() if name.endswith(key)), None)


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def attention_kernel(config, device, dtype):
    """Which of PyTorch's kernels scaled_dot_product_attention takes here: "flash attention", ..., "math"."""
    q = torch.empty(1, config.n_head, config.block_size, config.n_embd // config.n_head, device=device, dtype=dtype)
    try:
        kernel = SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True)).name
    except (AttributeError, RuntimeError, ValueError):  # not a public function: a later torch may not have it
        return "attention"
    return kernel.lower().replace("_", " ")


def peak_memory(device):
    """The most memory this process has held, in bytes: the GPU's on CUDA, else its own; None where nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # Linux and macOS only
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def keep_freed_memory():
    """On the CPU, let the C library keep the memory of freed tensors for the next ones.

    By default it goes back to the system, which hands it out again filled with zeros, page by page. Kept, an update of
    124M parameters with 1,024 tokens takes 2.9 instead of 4.4 seconds (two cores). Source: glibc, mallopt(3).
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block comes straight from the system
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def why_not_compile(device):
    """The kind of error that torch.compile ends in on this machine, or None where it works."""
    try:
        x = torch.ones(8, device=device, requires_grad=True)
        torch.compile(lambda x: (x * 2.0).sum())(x).backward()
    except (RuntimeError, ImportError, OSError) as error:  # no compiler, no Triton, no header, no driver
        return type(error).__name__
    return None


def say(text):
    """Print a line at once. A display that fails is given up and does not end the run in the middle of an update. A
    pipe whose reader has gone counts as a terminal that closes: the run is asked to stop (section 13)."""
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            signal.raise_signal(getattr(signal, "SIGHUP", signal.SIGTERM))  # Windows has no SIGHUP


# ----------------------------------------------------------------------------------------------------------------------
# 9. Checkpoints
#
# A checkpoint holds all that the next update depends on, the data files' names and lengths, and the first process's
# random states, for whoever adds dropout. Tensors and plain types only, so that opening one cannot run code.

CHECKPOINT_NAME = re.compile(r"model_(\d{5,})\.pt")  # model_05000.pt: after 5000 updates


def list_checkpoints(log_dir):
    """The checkpoints in a folder, oldest first."""
    paths = Path(log_dir).glob("model_*.pt")
    paths = [path for path in paths if CHECKPOINT_NAME.fullmatch(path.name) and path.is_file()]
    return sorted(paths, key=lambda path: int(CHECKPOINT_NAME.fullmatch(path.name)[1]))


def stop_training(settings, problem):
    """Raise the UserError for numbers that have gone wrong."""
    saved = [str(path) for path in list_checkpoints(settings.log_dir)] or ["none"]
    raise UserError(f"{problem}. Last checkpoint: {saved[-1]}. Try a smaller --max_lr, or --dtype=float32")


def save_checkpoint(log_dir, step, model, optimizer, scaler, settings, data):
    """Write log_dir/model_NNNNN.pt, NNNNN being the updates done; then remove what keep_checkpoints no longer keeps.

    data: {split: DataLoaderLite.contents}. Returns whether it could be written. Where not, older ones stay.
    """
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        stop_training(settings, f"step {step}: weights that are not finite numbers: stopped before saving them")
    checkpoint = {
        "model": model.state_dict(),
        "config": asdict(model.config),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "step": step,
        "settings": asdict(settings),
        "data": data,
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    path = Path(log_dir) / f"model_{step:05d}.pt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have tidied up
        replace_file(path, lambda temporary: torch.save(checkpoint, temporary))
    except (OSError, RuntimeError) as error:
        say(f"warning: {path} could not be written ({reason_of(error)}): training goes on, older ones stay")
        return False
    if settings.keep_checkpoints:  # newer ones than this can be there: damaged, so that the run resumed before them
        paths = list_checkpoints(log_dir)
        for old in paths[: paths.index(path) + 1][: -settings.keep_checkpoints]:
            with suppress(OSError):
                old.unlink()
    say(f"checkpoint: {path}")
    return True


def load_checkpoint(path):
    """Read a checkpoint onto the CPU. Raises UserError where it is damaged or not one of ours."""
    try:
        with zipfile.ZipFile(path) as archive:  # a checkpoint is one, with checksums, which torch does not look at
            if archive.testzip() is not None:
                raise ValueError("checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("model", "config", "optimizer", "scaler", "step", "settings", "data", "rng", "cuda_rng"):
            checkpoint[key]  # a missing one is a KeyError
        if type(checkpoint["step"]) is not int or checkpoint["step"] < 0:
            raise TypeError("step")
        for values in (GPTConfig(**checkpoint["config"]), Settings(**checkpoint["settings"])):
            for f in fields(values):
                if not isinstance(getattr(values, f.name), f.type):
                    raise TypeError(f.name)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} holds pickled Python objects, which are refused, or is damaged") from error
    except Exception as error:  # a damaged file ends in errors of many kinds
        raise UserError(f"{path} is damaged, or no checkpoint of this script ({type(error).__name__})") from error
    return checkpoint


def newest_checkpoint(log_dir, print0):
    """The newest checkpoint that can be read, or None where there is none at all. Damaged ones are named and passed
    over; UserError where every one of them is."""
    paths = list_checkpoints(log_dir)
    for path in reversed(paths):
        try:
            checkpoint = load_checkpoint(path)
            if checkpoint["step"] != int(CHECKPOINT_NAME.fullmatch(path.name)[1]):
                raise UserError(f"{path} holds {checkpoint['step']} updates, which is not what its name says")
            print0(f"resume: {path}")
            return checkpoint
        except UserError as error:
            print0(f"warning: {error}: trying the one before")
    if paths:
        raise UserError(f"no checkpoint in {log_dir} can be read: to start anew, leave --resume out")
    return None


def check_data(was, now):
    """Raise UserError where the data of a resumed run is not what it was. Both: {split: DataLoaderLite.contents}."""
    for split in was.keys() & now.keys():
        for i, (old, new) in enumerate(itertools.zip_longest(was[split], now[split])):
            if old != new:
                old, new = (f"{file[0]} with {file[1]} tokens" if file else "none" for file in (old, new))
                problem = f"the data has changed since the checkpoint: {split} file {i + 1} was {old}, now it is {new}"
                raise UserError(f"{problem}: put it back, or train its weights on with --init_from")


def restore(checkpoint, optimizer, scaler, settings, data):
    """Put back what the checkpoint holds beside the weights. Raises UserError where that does not fit this run."""
    if checkpoint["settings"]["total_batch_size"] != settings.total_batch_size:
        raise UserError("--total_batch_size cannot change within a run: the place in the data follows from it")
    step = checkpoint["step"]
    if step > settings.max_steps:
        raise UserError(f"the checkpoint has {step} updates: --max_steps={settings.max_steps} would go back")
    try:
        check_data(checkpoint["data"], data)
        # The averages come from the checkpoint, weight decay and the like from the settings, which a flag may change.
        averages = checkpoint["optimizer"]["state"]
        for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            for name, shape in (("exp_avg", p.shape), ("exp_avg_sq", p.shape), ("step", ())):
                average = averages[i][name]  # AdamW would believe any shape, and write past its end
                if (average.shape, average.dtype, average.layout) != (shape, torch.float32, torch.strided):
                    raise ValueError(f"{name}: {average.shape}, {average.dtype}")
        optimizer.load_state_dict({"state": averages, "param_groups": optimizer.state_dict()["param_groups"]})
        if checkpoint["scaler"] and scaler.is_enabled():  # it is empty where the run was not in float16
            scaler.load_state_dict(checkpoint["scaler"])
        torch.set_rng_state(checkpoint["rng"])
        if checkpoint["cuda_rng"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(checkpoint["cuda_rng"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        problem = f"the checkpoint of step {step} is damaged beside its weights ({type(error).__name__})"
        raise UserError(f"{problem}: remove it, then --resume takes the one before") from error


def build_model(settings, given, checkpoint):
    """The GPT that --init_from or the resumed checkpoint asks for, on the CPU.

    Raises UserError where flags ask for another shape than the weights have.
    """
    shape_flags = {name: given[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size") if name in given}
    if "model" in given:
        shape_flags = MODELS[given["model"]] | shape_flags
    if checkpoint is None and settings.init_from == "scratch":
        shape = MODELS[settings.model] | {"vocab_size": settings.vocab_size, "block_size": settings.block_size}
        own = {name: getattr(settings, name) for name in ("n_layer", "n_head", "n_embd")}
        return GPT(GPTConfig(**(shape | {name: value for name, value in own.items() if value is not None})))

    source = "the checkpoint" if checkpoint else settings.init_from
    if checkpoint is None and os.path.isfile(settings.init_from):
        checkpoint = load_checkpoint(settings.init_from)
    if checkpoint is not None:
        try:
            model = GPT(GPTConfig(**checkpoint["config"]))
            model.load_state_dict(checkpoint["model"])
        except (RuntimeError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise UserError(f"{source}'s weights do not have the shape that it says: use another one") from error
    elif settings.init_from in MODELS or os.path.isdir(settings.init_from):
        model = GPT.from_pretrained(settings.init_from)
    else:
        raise UserError(f"{settings.init_from} is not there: name a file, a folder, or one of {', '.join(MODELS)}")
    if model.config.vocab_size < GPT2_VOCAB_SIZE:
        raise UserError(
            f"{source} has {model.config.vocab_size} tokens, GPT-2's tokenizer {GPT2_VOCAB_SIZE}: use another"
        )
    for name, value in shape_flags.items():
        if value != getattr(model.config, name):
            raise UserError(f"{source} has {name} {getattr(model.config, name)}, not {value}: leave that flag out")
    if settings.block_size > model.config.block_size:
        if "block_size" in given:
            raise UserError(f"{source} has block_size {model.config.block_size}: --block_size can only be smaller")
        settings.block_size = model.config.block_size
    return model


# ----------------------------------------------------------------------------------------------------------------------
# 10. The log
#
# log/log.txt, one line a value: "250 val 6.1604". The number is that of the updates done when it was measured.


class Log:
    """log.txt in a folder. What cannot be written, on a full disk say, waits for the next line."""

    def __init__(self, log_dir):
        self.path = Path(log_dir) / "log.txt"
        self.size = self.path.stat().st_size if self.path.exists() else 0
        self.waiting = b""
        self.failed = False

    def write(self, line):
        self.waiting += line.encode() + b"\n"
        self.flush()

    def flush(self):
        """Write what waits. Returns whether nothing is left."""
        if not self.waiting:
            return True
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have tidied up
            with open(self.path, "ab") as file:
                if self.failed and file.tell() > self.size:
                    file.truncate(self.size)  # the last attempt wrote half a line
                file.write(self.waiting)
                self.size = file.tell()
        except OSError as error:
            if not self.failed:  # once is enough
                say(f"warning: {self.path} could not be written ({error.strerror}): its lines wait")
            self.failed = True
            return False
        self.waiting, self.failed = b"", False
        return True


def trim_log(path, step):
    """Keep what was logged before `step`: the resumed run writes the rest again, so no line is doubled or missing."""
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        steps = [re.match(r"(\d{1,12}) (train|val|hella) \d", line) for line in lines]
        kept = [line + "\n" for line, match in zip(lines, steps, strict=True) if match and int(match[1]) < step]
        replace_file(path, lambda temporary: temporary.write_text("".join(kept), encoding="utf-8"))


def set_aside_earlier_run(settings):
    """Move a log and checkpoints that are in log_dir already to log_dir/earlier_N: nothing is overwritten."""
    log_dir = Path(settings.log_dir)
    files = list_checkpoints(log_dir) + [path for path in [log_dir / "log.txt"] if path.exists()]
    if Path(settings.init_from).resolve() in [path.resolve() for path in files]:
        raise UserError(f"--init_from={settings.init_from} is an earlier run's: name another --log_dir for this one")
    if files:
        folder = next(path for n in itertools.count(1) if not (path := log_dir / f"earlier_{n}").exists())
        folder.mkdir()
        for path in files:
            path.rename(folder / path.name)
        say(f"an earlier run was in {log_dir}: moved to {folder} (delete it when you no longer need it)")


@contextmanager
def locked(log_dir):
    """Make log_dir, and refuse it to every other run until this one ends, however it does."""
    folder = None
    try:
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        import fcntl  # not on Windows

        folder = os.open(log_dir, os.O_RDONLY)
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another run writes to {log_dir}: wait for it, end it, or name another --log_dir") from error
    except (ImportError, OSError) as error:
        if not os.path.isdir(log_dir):  # else only the lock is missing: some network folders know none
            raise UserError(f"--log_dir={log_dir} cannot be written: {error}") from error
    try:
        yield
    finally:
        if folder is not None:
            os.close(folder)


def prepare_log_dir(settings, start_step):
    """Make log_dir ready for a new run, or for one that goes on after start_step updates. Returns its Log."""
    log_dir = Path(settings.log_dir)
    try:
        for unfinished in [*log_dir.glob("model_*.pt.tmp"), *log_dir.glob("log.txt.tmp")]:  # of a run that was killed
            unfinished.unlink()
        if start_step > 0:
            trim_log(log_dir / "log.txt", start_step)
        else:
            set_aside_earlier_run(settings)
        return Log(log_dir)
    except OSError as error:
        raise UserError(f"--log_dir={log_dir} cannot be written: {error}") from error


# ----------------------------------------------------------------------------------------------------------------------
# 11. Evaluation
#
# The validation loss, and HellaSwag: which of four endings goes on from a context? The model's answer is the ending
# with the lowest mean loss (acc_norm); hellaswag.py has the details. Always on the plain module. The compiled one would
# be compiled again: once for evaluating without gradients, and for every length that a sample has on its way. Sampling
# draws from a generator of its own, so training goes on bit for bit as if nothing had happened.


@torch.no_grad()
def evaluate(model, loader, val_tokens, device, autocast):
    """The mean loss over the first val_tokens tokens of the validation stream (over all, where there are fewer).

    Processes take turns at the batches. Every token counts once, so the result depends neither on the micro-batch nor
    on the number of processes (but for rounding).
    """
    val_tokens = min(val_tokens, loader.num_tokens - 1)  # the last token has no successor
    batch_tokens = loader.B * loader.T
    val_loss = torch.zeros((), device=device)
    loader.set_position(0)
    for start in range(0, val_tokens, batch_tokens * loader.num_processes):
        x, y = loader.next_batch()  # (B, T) each
        count = min(val_tokens - (start + loader.process_rank * batch_tokens), batch_tokens)
        if count <= 0:
            break  # the last round of batches is not a full one
        y = y.clone()  # x lies in the same memory, one token behind
        y.view(-1)[count:] = -1  # past the end: counts for nothing
        with autocast:
            _, loss = model(x.to(device), y.to(device))
        val_loss += loss.float() * (count / val_tokens)
    if loader.num_processes > 1:
        dist.all_reduce(val_loss, op=dist.ReduceOp.SUM)
    return val_loss.item()


def load_hellaswag(source, rank, world_size, device, print0):
    """The tokenized examples, for all processes, on the CPU. Rank 0 alone fetches them, and sends them to the others.

    None where the official file cannot be fetched: training goes on without. UserError where a local one is bad.
    """
    rows = None
    if rank == 0:
        try:
            rows = hellaswag.tokenize(hellaswag.load_examples(source))
        except UserError as error:
            if source != "official":
                raise
            print0(f"warning: {error}. Training goes on without HellaSwag (--hellaswag=off)")
    if world_size > 1:
        sizes = torch.tensor([len(values) for values in rows] if rows else [0, 0, 0, 0], device=device)
        dist.broadcast(sizes, src=0)
        if sizes[0] == 0:
            return None
        tensors = [torch.zeros(size, dtype=torch.int64, device=device) for size in sizes.tolist()]
        for i, tensor in enumerate(tensors):
            if rank == 0:
                tensor.copy_(rows[i])
            dist.broadcast(tensor, src=0)
        rows = hellaswag.Rows(*(tensor.cpu() for tensor in tensors))
    return rows


def evaluate_hellaswag(model, rows, rank, world_size, device, autocast):
    """The number of examples, of all in rows, that the model gets right (acc_norm)."""
    with autocast:
        sums = hellaswag.ending_losses(model, rows, device, rank, world_size)  # (M, 4)
    if world_size > 1:
        dist.all_reduce(sums, op=dist.ReduceOp.SUM)
    correct, _ = hellaswag.count_correct(sums, rows, model.config.block_size)
    return correct


def print_samples(model, encoding, settings, device, autocast):
    """Print num_samples continuations of the prompt, each to its <|endoftext|>: the same ones for the same weights and
    seed. Of a prompt that is longer than the context, the model sees the end."""
    prompt = encoding.encode_ordinary(settings.prompt)
    start = prompt or [encoding.eot_token]  # which stands before each document
    idx = torch.tensor([start] * settings.num_samples, device=device)  # (num_samples, T)
    generator = torch.Generator(device=device).manual_seed(settings.seed)
    with autocast:
        idx = model.generate(idx, settings.max_new_tokens, settings.temperature, settings.top_k, generator)
    for i, row in enumerate(idx[:, len(start) :].tolist()):
        end = row.index(encoding.eot_token) if encoding.eot_token in row else len(row)
        say(f"sample {i}: {encoding.decode(prompt + row[:end])}")


# ----------------------------------------------------------------------------------------------------------------------
# 12. The gradient of an update
#
# Here the micro-batches of section 5 come together. The loss of an update is a mean, so its gradient can be made in
# parts: micro-batch after micro-batch on each process, adding up, then the mean over the processes.


def accumulate_gradients(model, loader, grad_accum_steps, device, autocast, scaler):
    """Add the gradient of one update to the parameters' .grad; returns this process's mean loss, on the device.

    model: the one that trains, perhaps compiled and wrapped in DDP. The gradient is the same for every division of the
    update's tokens into processes and micro-batches, but for rounding.
    """
    ddp = loader.num_processes > 1
    loss_accum = torch.zeros((), device=device)
    for micro_step in range(grad_accum_steps):
        x, y = loader.next_batch()  # (B, T) each
        if device.type == "cuda":
            # Pinned memory is never swapped out, so the GPU fetches it by itself and the CPU need not wait.
            x, y = x.pin_memory(), y.pin_memory()
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        # DDP averages the gradients over the processes during a backward pass. Only the last one needs that. DDP
        # prepares for it in the forward pass, so no_sync has to cover both.
        last_micro_step = micro_step == grad_accum_steps - 1
        with model.no_sync() if ddp and not last_micro_step else nullcontext():
            with autocast:
                _, loss = model(x, y)
            loss = loss / grad_accum_steps  # gradients add up, and a mean is wanted
            scaler.scale(loss).backward()
        loss_accum += loss.detach()  # not loss.item(), which would wait for the GPU
    return loss_accum


# ----------------------------------------------------------------------------------------------------------------------
# 13. The training loop


def catch_signals(is_master):
    """From now on, SIGTERM, SIGINT (Ctrl-C) and SIGHUP do no more than enter the list that this returns. A second
    SIGINT ends the process at once."""
    caught = []

    def catch(number, frame):
        if is_master and not caught:
            with suppress(OSError):  # print may be in the middle of a line, and a closed terminal takes no more
                os.write(2, b"\nstopping after this update, with a checkpoint (Ctrl-C once more: at once, without)\n")
        caught.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGTERM, catch)
    signal.signal(signal.SIGINT, catch)
    # SIGHUP, of a terminal that closes, is not on Windows, and nohup wants it ignored.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, catch)
    return caught


def train(settings, given, checkpoint):
    """Train, or with max_steps 0 only evaluate. given: the flags. checkpoint: the one to resume from, or None."""
    rank, local_rank, world_size = place_among_processes()
    ddp = world_size > 1
    is_master = rank == 0  # prints, logs and saves

    def print0(text):
        if is_master:
            say(text)

    # The hardware.
    device = pick_device(settings.device, local_rank, world_size)
    torch.manual_seed(settings.seed)
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # TF32: float32 matrix products round their factors to 10 bits of fraction and still add up in float32. Three
        # times as fast (lecture: 1000 to 333 ms an update).
        torch.set_float32_matmul_precision("high")
    if ddp:
        # NCCL carries tensors between GPUs, gloo between CPUs. The timeout is long: all wait while one downloads.
        backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, device_id=device_id, timeout=timedelta(hours=1))

    # The precision (section 8).
    dtype = pick_dtype(settings.dtype, device)
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # The model. The first process of a machine may have to download it; the others then find it in the cache.
    if ddp and local_rank != 0:
        dist.barrier()
    raw_model = build_model(settings, given, checkpoint).to(device)
    if ddp and local_rank == 0:
        dist.barrier()
    model = raw_model
    mode = "eager (--compile compiles)"
    if settings.compile == "True" or (settings.compile == "auto" and device.type == "cuda"):
        error = why_not_compile(device)
        mode = f"eager ({error})" if error else "compiled"
        if error:
            print0(f"warning: torch.compile does not work here ({error}), running eager: slower, with the same results")
    if mode == "compiled":
        # The compiler sees the whole network and fuses neighbouring operations into one kernel, which saves their trips
        # to memory (lecture: 300 to 130 ms).
        model = torch.compile(raw_model)
    if ddp:  # gradients travel in large buffers, the buckets; with this flag .grad lies in them, one copy less
        model = DDP(model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)

    # The data.
    B, T = fit_micro_batch(settings, world_size, exact="micro_batch_size" in given), settings.block_size
    grad_accum_steps = settings.total_batch_size // (B * T * world_size)
    train_loader = DataLoaderLite(B, T, rank, world_size, "train", settings.data)
    val_loader = DataLoaderLite(B, T, rank, world_size, "val", settings.data) if settings.eval_interval else None
    contents = {"train": train_loader.contents} | ({"val": val_loader.contents} if val_loader else {})
    encoding, hella_rows = gpt2_encoding(), None
    if settings.eval_interval and settings.hellaswag != "off":
        hella_rows = load_hellaswag(settings.hellaswag, rank, world_size, device, print0)

    # The optimizer.
    num_params = sum(p.numel() for p in raw_model.parameters())
    max_lr = gpt3_max_lr(num_params) if settings.max_lr is None else settings.max_lr
    min_lr = 0.1 * max_lr if settings.min_lr is None else settings.min_lr
    optimizer = raw_model.configure_optimizers(settings.weight_decay, max_lr, device.type)

    # Where the run stands.
    start_step = 0
    if checkpoint is not None:
        restore(checkpoint, optimizer, scaler, settings, contents)
        start_step = checkpoint["step"]
        checkpoint.clear()  # 1.5 GB (for 124M parameters), now in the model and the optimizer
    if ddp:
        steps = torch.tensor([start_step, -start_step], device=device)
        dist.all_reduce(steps, op=dist.ReduceOp.MAX)  # the largest, and minus the smallest
        if steps[0] != -steps[1]:
            raise UserError("the processes found different checkpoints: --log_dir must be a folder that all share")
    train_loader.set_position(start_step * grad_accum_steps)
    log = prepare_log_dir(settings, start_step) if is_master and settings.max_steps > 0 else None

    # What is about to happen.
    c = raw_model.config
    epochs = settings.max_steps * settings.total_batch_size / train_loader.num_tokens
    precision = str(dtype).removeprefix("torch.")
    print0(f"device: {world_size} x {device_name(device)}, {precision}, {attention_kernel(c, device, dtype)}, {mode}")
    print0(f"model: {num_params:,} parameters: {c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide, context {T}")
    for split, loader in (("training", train_loader), ("validation", val_loader)):
        if loader:
            print0(f"{split} data: {loader.num_tokens:,} tokens, files: {len(loader.contents)}, from {settings.data}")
    parts = f"{B} x {T} (micro-batch) x {grad_accum_steps} (micro-steps) x {world_size} (processes)"
    print0(f"update: {settings.total_batch_size:,} tokens: {parts}")
    if log:
        print0(f"run: {settings.max_steps:,} updates, {epochs:.2f} epochs, results in {settings.log_dir}")

    # What share of the hardware's arithmetic is used (MFU). A token costs 6 FLOPs for each weight but the positions: a
    # multiplication and an addition, once forward and twice backward; and 12 for each layer, channel and token of
    # context in attention's two products (PaLM, Chowdhery et al. 2022, appendix B).
    flops_per_token = 6 * (num_params - c.block_size * c.n_embd) + 12 * c.n_layer * c.n_embd * T
    peak = peak_flops(device, dtype)

    # Asked to stop, all processes finish the update, save and leave. That torchrun has gone counts as being asked.
    caught = catch_signals(is_master) if settings.max_steps > 0 else []
    interrupted, parent, saved = 0, os.getppid(), True
    step_seconds, train_loss, val_loss = [], math.nan, math.nan
    for step in range(start_step, settings.max_steps + 1):
        last_step = step == settings.max_steps

        # Evaluate.
        if settings.eval_interval and (step % settings.eval_interval == 0 or last_step) and not interrupted:
            val_loss = evaluate(raw_model, val_loader, settings.val_tokens, device, autocast)
            if not math.isfinite(val_loss):
                stop_training(settings, f"step {step}: validation loss {val_loss}")
            print0(f"validation loss: {val_loss:.4f}")
            if log:
                log.write(f"{step} val {val_loss:.4f}")
            if hella_rows:
                correct = evaluate_hellaswag(raw_model, hella_rows, rank, world_size, device, autocast)
                total = len(hella_rows.labels)
                print0(f"HellaSwag accuracy: {correct}/{total}={correct / total:.4f}")
                if log:
                    log.write(f"{step} hella {correct / total:.4f}")
            if is_master and settings.num_samples:
                print_samples(raw_model, encoding, settings, device, autocast)

        # Save.
        at_interval = settings.checkpoint_interval and step % settings.checkpoint_interval == 0
        if is_master and step > start_step and (at_interval or last_step or interrupted):
            saved = save_checkpoint(settings.log_dir, step, raw_model, optimizer, scaler, settings, contents)
        if last_step or interrupted:
            break

        # Gradient, clipped to a norm of at most grad_clip: one odd batch must not move the weights far.
        t0 = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss_accum = accumulate_gradients(model, train_loader, grad_accum_steps, device, autocast, scaler)
        scaler.unscale_(optimizer)  # so that the norm is that of the true gradient
        norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), settings.grad_clip or math.inf)

        # The processes agree on the mean loss, and on whether to stop.
        asked = bool(caught) or (ddp and os.getppid() != parent)
        shared = torch.stack((loss_accum / world_size, torch.tensor(float(asked), device=device)))
        if ddp:
            dist.all_reduce(shared, op=dist.ReduceOp.SUM)  # gloo, the CPU's backend, has no mean

        # Step. Until here the CPU only queued work for the GPU. Now, once an update, it waits for the result: before
        # the optimizer's step, so that a loss that is not a number never reaches the weights.
        train_loss, any_asked, norm = torch.stack((*shared, norm)).tolist()
        if any_asked:
            interrupted = caught[0] if caught else signal.SIGTERM
        # In float16 a gradient may overflow: the scaler then skips the update and halves its factor. Once that is below
        # 1, it is no longer the factor's fault.
        may_overflow = scaler.is_enabled() and scaler.get_scale() >= 1
        if not math.isfinite(train_loss) or not (math.isfinite(norm) or may_overflow):
            stop_training(settings, f"step {step}: loss {train_loss}, gradient norm {norm}: stopped before the update")
        lr = get_lr(step, settings.max_steps, settings.warmup_steps, max_lr, min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.step(optimizer)
        scaler.update()

        # Log. On a GPU the optimizer's work is still queued here, and counts in the next step's time. The first step
        # includes the compilation, so the averages leave it out.
        step_seconds.append(time.perf_counter() - t0)
        tokens_per_second = settings.total_batch_size / step_seconds[-1]
        mfu = f"mfu {100 * flops_per_token * tokens_per_second / (peak * world_size):.1f}% | " if peak else ""
        recent = step_seconds[max(1, len(step_seconds) - 100) :] or step_seconds
        left = (settings.max_steps - step - 1) * statistics.fmean(recent)
        print0(
            f"step {step:5d} | loss {train_loss:.6f} | lr {lr:.4e} | norm {norm:.4f} | "
            f"dt {1000 * step_seconds[-1]:.2f}ms | tok/s {tokens_per_second:.0f} | "
            f"{mfu}left {timedelta(seconds=round(left))}"
        )
        if log:
            log.write(f"{step} train {train_loss:.6f}")

    # Sum up.
    if step_seconds:
        median = statistics.median(step_seconds[1:] or step_seconds)
        memory = peak_memory(device)
        print0(
            f"done: {len(step_seconds)} updates | median dt {1000 * median:.2f}ms | "
            f"tok/s {settings.total_batch_size / median:.0f} | "
            f"{f'peak memory {memory / 1e9:.2f} GB | ' if memory else ''}"
            f"train loss {train_loss:.4f}{f' | val loss {val_loss:.4f}' if settings.eval_interval else ''}"
        )
    if ddp:
        dist.barrier()  # while the first process saves, nobody hangs up on it
        dist.destroy_process_group()
    if not saved:
        raise UserError(
            f"the last checkpoint could not be written to {settings.log_dir}: see the warning, then --resume"
        )
    if log and not log.flush():
        raise UserError(f"the last lines of {log.path} could not be written: see the warning, the checkpoint is there")
    if interrupted:
        print0(f"{signal.Signals(interrupted).name}: stopped after {step} updates, --resume goes on")
        sys.exit(128 + interrupted)


def export(settings, given, checkpoint):
    """What --export asks for."""
    if checkpoint is None and settings.init_from == "scratch":
        raise FlagError("--export writes the weights that --init_from or --resume names: give one of them")
    if os.path.isdir(settings.export) and os.listdir(settings.export):
        raise UserError(f"--export={settings.export} holds files already: name a new folder, or empty it")
    model = build_model(settings, given, checkpoint)
    try:
        model.save_pretrained(settings.export)
    except OSError as error:
        raise UserError(f"--export={settings.export} cannot be written: {error}") from error
    print(f"exported: {settings.export}")


def run(given, rank, world_size):
    """One run, with the flags that were given."""
    print0 = print if rank == 0 else lambda text: None
    log_dir = given.get("log_dir", str(HERE / "log"))
    checkpoint = newest_checkpoint(log_dir, print0) if given.get("resume") else None
    saved = checkpoint["settings"] | {"log_dir": log_dir} if checkpoint else None
    settings = make_settings(given, saved)
    if settings.export:
        if rank == 0:
            export(settings, given, checkpoint)
        return
    if settings.prompt == "-" and rank == 0:
        try:
            settings.prompt = sys.stdin.buffer.read().decode("utf-8", errors="replace").removesuffix("\n")
        except (AttributeError, OSError) as error:
            raise UserError("--prompt=- reads standard input, which is closed: pipe a text into it") from error
    if saved is None and "data" not in given and settings.data == str(HERE / "input.txt"):
        print0("edu_fineweb10B is not there (python fineweb.py makes it): training on input.txt, with settings to suit")
    try:
        train(settings, given, checkpoint)
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU and MPS have no kind of their own
        if not re.search("out of memory|can't allocate memory", str(error)):
            raise
        remedy = "use a smaller --block_size or model"
        size = fit_micro_batch(settings, world_size, exact=False)  # what it was
        if size > 1:
            settings.micro_batch_size = size - 1
            remedy = f"use --micro_batch_size={fit_micro_batch(settings, world_size, exact=False)}"
        where = "" if "can't allocate memory" in str(error) else "GPU "
        raise UserError(f"out of {where}memory: {remedy}") from error


def main(argv=None):
    given = parse_flags(argv)
    rank, _, world_size = place_among_processes()
    writes = rank == 0 and given.get("max_steps") != 0 and not given.get("export")
    with locked(given.get("log_dir", str(HERE / "log"))) if writes else nullcontext():
        run(given, rank, world_size)


if __name__ == "__main__":
    run_script(main, "train_gpt2.py", interrupted="--resume goes on from the last checkpoint")
