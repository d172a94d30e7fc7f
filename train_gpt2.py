"""
Train GPT-2 (124M) from scratch, as in Andrej Karpathy's lecture "Let's reproduce GPT-2 (124M)".

    python train_gpt2.py                                      # one GPU, or the CPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py    # the whole run, on a machine with eight GPUs
    python train_gpt2.py --help                               # all settings

A language model reads a text and predicts how it continues. It reads tokens: pieces of text such as " language", each
of which has a number, its id. To predict the next token well, on ten billion tokens of web pages, it has to learn
spelling, grammar, and a good deal about the world. This is the model, a Transformer (Radford et al. 2019, "GPT-2"). B
is the number of texts computed at once, T the number of tokens in each, C the length of the vector of a token:

    idx       (B, T)           token ids, whole numbers below 50,257
     |                         wte gives every token its vector, C = 768 numbers (channels),
     |                         wpe gives every position one, and the two are added
    x         (B, T, C)
     |                         12 blocks turn each token's vector, step by step, into one that guesses the next token:
     |                           attention: a token gathers information from the tokens before it
     |                           MLP: a token works on what it has gathered
    x         (B, T, C)
     |                         lm_head compares each guess with the vectors of all tokens
    logits    (B, T, 50304)    at every position, a score for each token as the next one (47 are padding, section 8)

What is learned is the model's parameters, or weights:

    wte, also used as lm_head   50,304 x 768     38.6 million
    wpe                          1,024 x 768      0.8 million
    12 blocks                                    85.1 million: 7.1 in each, 2.4 for attention and 4.7 for the MLP
                                                124.5 million

What that costs, in multiplications and additions per token:

    6 * 124.5 million          each weight: 2 forward; backward, 2 for its own gradient, 2 for that of its input
    12 blocks * 12 * T * C     attention (section 1): 2 products, each 2 * T * C forward, 4 * T * C backward (unmasked)
    0.86 billion (GFLOP)       in all; 451 trillion in a step of half a million tokens, 8.6e18 in 19,073 steps

In the lecture, an A100 GPU at first takes 1000 ms to train on 16,384 tokens. One trick after another, all told below,
cuts that: TF32 to 333, bfloat16 to 300, torch.compile to 130, FlashAttention to 96, padding to 93, fused AdamW to 90.
That is 157 trillion operations a second, half of the most that this GPU can do.

The file imports its two neighbors: fineweb.py (tokenizer, files of tokens) and hellaswag.py (an evaluation). Read it
from top to bottom. Part I is the lesson (tests/experiments.md: what each part of it is worth), Part II is housekeeping.

    Part I    1 the model, 2 OpenAI's weights, 3 sampling, 4 optimizer and learning rate, 5 data, 6 evaluation,
              7 processes, devices, precision, 8 settings, 9 the training loop
    Part II   10 the command line, 11 weights in and out, 12 a run on disk, 13 the machine, 14 main
"""

import ctypes
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import zipfile
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import fineweb
import hellaswag

GPT2_VOCAB_SIZE = 50257  # 256 bytes, 50,000 common pieces of text, and <|endoftext|>, which stands between two texts

# ======================================================================================================================
# Part I: the lesson
# ----------------------------------------------------------------------------------------------------------------------
# 1. The model
# The names are those of OpenAI and Hugging Face: wte and wpe are the learned vectors (embeddings) of tokens and
# positions, h is the list of blocks, ln_... are layer norms, c_... linear layers.


@dataclass
class GPTConfig:
    block_size: int = 1024  # the context: the longest text that the model can look at, in tokens
    vocab_size: int = GPT2_VOCAB_SIZE  # number of token ids; training pads it to 50,304 for speed (section 8)
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads in each
    n_embd: int = 768  # channels: C in the comments


class CausalSelfAttention(nn.Module):
    """How tokens exchange information (Vaswani et al. 2017, section 3.2): (B, T, C) -> (B, T, C).

    Every token makes three vectors: a query (what am I looking for?), a key (what do I have?) and a value (what do I
    pass on?). Its output is a weighted average of the values of itself and of the tokens before it ("causal": not of
    later ones, which it must predict). The better its query matches a token's key, the more weight its value gets.

    One average can look for one thing only. So several heads do this side by side, each with short queries, keys and
    values of its own (768 / 12 = 64 numbers): one can look for a verb's subject, another at the previous word."""

    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0, "the heads share the channels equally"
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # makes queries, keys and values, for all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)  # mixes the outputs of the heads

    def forward(self, x):
        B, T, C = x.size()
        head_size = C // self.n_head
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        # Cut them into heads. Matrix products use the last two dimensions, so the heads move next to B.
        q = q.view(B, T, self.n_head, head_size).transpose(1, 2)  # (B, n_head, T, head_size)
        k = k.view(B, T, self.n_head, head_size).transpose(1, 2)  # (B, n_head, T, head_size)
        v = v.view(B, T, self.n_head, head_size).transpose(1, 2)  # (B, n_head, T, head_size)
        # Written out, attention is four lines:
        #     scores = q @ k.transpose(-2, -1) / math.sqrt(head_size)  # (B, n_head, T, T): dot products; large: a match
        #     scores = scores.masked_fill(is_later, -math.inf)         # is_later (T, T): True for later tokens
        #     att = F.softmax(scores, dim=-1)                          # (B, n_head, T, T): each row sums to 1
        #     y = att @ v                                              # (B, n_head, T, head_size): the averages
        # softmax turns a row of scores into weights: exp(score), 0 for -inf, divided by the sum over the row. Why the
        # square root? The dot product of two vectors of 64 random numbers (of mean 0, standard deviation 1) has a
        # standard deviation of sqrt(64) = 8; divided by that, of 1. With scores 8 times further apart, one token would
        # often get most of the weight, and the others hardly any gradient. (Not yet at first: the weights are small.)
        # FlashAttention (Dao et al. 2022), or a program like it, needs no (T, T) matrix in the GPU's main memory.
        # It computes scores tile by tile in small, fast memory on the chip, sums exp(score) times value, and divides by
        # the sum of exp(score) at the end. The backward pass computes the scores again: more work, but less time than
        # moving the matrix (lecture: 130 to 96 ms).
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # all four lines: (B, n_head, T, head_size)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.c_proj(y)


class MLP(nn.Module):
    """A multilayer perceptron: how a token works on what it has gathered, by itself. (B, T, C) -> (B, T, C).

    c_fc compares the token's vector with 4C learned patterns, GELU drops those that do not match, and c_proj adds a
    learned vector for each of the others, larger for a better match. (Without GELU, which is not linear, the two linear
    layers could do no more than one.) Four times wider is the choice of the first Transformer (Vaswani et al. 2017,
    section 3.3) and of most since. That makes 8 C*C weights, against 4 C*C in attention: two thirds of the block."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        # GELU (Hendrycks & Gimpel 2016) lets large numbers pass and makes negative ones about 0, like ReLU, but without
        # ReLU's corner: numbers just below 0 still get a gradient. "tanh" is the approximation that OpenAI used.
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = self.c_fc(x)  # (B, T, 4C)
        x = self.gelu(x)
        x = self.c_proj(x)  # (B, T, C)
        return x


class Block(nn.Module):
    """Attention, then an MLP: (B, T, C) -> (B, T, C).

    x, the residual stream, is like a notebook that is handed from block to block: attention and MLP read it, and add
    what they find to it. A sum passes gradients on unchanged, so even the first block learns what it should do better.

    They read it through a layer norm (Ba et al. 2016). That shifts and scales the C numbers of each token to mean 0 and
    standard deviation 1, then gives each channel a learned scale and shift. So attention and MLP can rely on the size
    of their input, whatever the size of the sum. The sum itself is normalized only at the end (GPT-2,
    section 2.3). The first Transformer normalized it in every block, so gradients did not pass back unchanged."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))  # without "x +", a small model learns only how frequent letters are
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """The whole model: embeddings, blocks, and a score for every token of the vocabulary as the next one."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.Module()  # everything but lm_head, as Hugging Face groups it
        self.transformer.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.transformer.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.transformer.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.transformer.ln_f = nn.LayerNorm(config.n_embd)  # f: final, before lm_head
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # Weight tying (Press & Wolf 2017): wte and lm_head are one and the same matrix. The score of a token is the dot
        # product of its vector with the output at a position. So what wte learns about a token, such as that " big" is
        # like " large", serves its score, too, and the other way round. It also saves 38.6 of 163 million parameters.
        self.transformer.wte.weight = self.lm_head.weight

        self.apply(self._init_weights)
        # The residual stream adds up 2 * n_layer outputs. A sum of n independent random numbers is about sqrt(n) times
        # as large as one of them. So both c_proj, which write to the stream, start with weights smaller by this factor.
        # Then, before training, the stream is no larger in a deep model than in a shallow one (GPT-2, section 2.3).
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

    def _init_weights(self, module):
        # Small random numbers: no score stands out, so the first guess is about uniform.
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def hidden(self, idx):
        """The vectors after the last block and ln_f, which lm_head turns into scores: (B, T) int64 -> (B, T, C)."""
        T = idx.size(1)
        assert T <= self.config.block_size, f"{T} tokens do not fit into a context of {self.config.block_size}"
        pos = torch.arange(T, device=idx.device)  # (T,)
        tok_emb = self.transformer.wte(idx)  # (B, T, C)
        # An average has no order: "dog bites man" or "man bites dog"? So each vector also says where its token is.
        pos_emb = self.transformer.wpe(pos)  # (T, C), added to every text of the batch
        x = tok_emb + pos_emb  # tests/experiments.md: without pos_emb, the loss of a small model is 2.24, not 2.09
        for block in self.transformer.h:
            x = block(x)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """Score the next token at every position or, if the targets are given, compute the loss.

        idx: (B, T) int64 token ids, T <= block_size.
        targets: (B, T) int64, the token that follows each one of idx; positions with -1 do not count.
        Returns (logits, None) or (None, loss). logits: (B, T, vocab_size). loss: the mean cross entropy (see below)."""
        x = self.hidden(idx)  # (B, T, C)
        if targets is None:
            return self.lm_head(x), None
        # Logits are scores. softmax would turn the ones at a position into probabilities of the next token. The loss,
        # called cross entropy, is -ln(probability of the token that really came next): 0 if the model was certain of
        # it, larger the less likely the model thought it. A natural logarithm measures it in nats. It is averaged over
        # all B*T positions, and because no position sees the tokens after it, one forward pass is B*T exercises at
        # once. exp(loss), the perplexity, is the number of equally likely tokens that would be as hard to guess: 50,304
        # for a uniform guess (a loss of 10.8; random weights guess a bit worse, up to 11), 22 after training (3.07).
        if x.device.type == "cpu":
            return None, loss_in_chunks(self.lm_head, x, targets)  # as below, in parts: faster (section 13)
        logits = self.lm_head(x)  # (B, T, vocab_size): 6.6 GB in bfloat16 for 64 x 1024 tokens
        logits = logits.float()  # the loss in float32: bfloat16 (section 7) has nothing between 3 and 3 + 1/64
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return None, loss  # no logits: as long as a caller held them, they would take up memory

    # ------------------------------------------------------------------------------------------------------------------
    # 2. OpenAI's weights
    # With OpenAI's weights, a correct model writes good English. If it does not, the code above has a mistake.

    @classmethod
    def from_pretrained(cls, name_or_folder):
        """The model with the weights of gpt2, gpt2-medium, gpt2-large or gpt2-xl, downloaded from the Hugging Face hub,
        or of a folder saved by their library, transformers. Raises UserError if they are not found, or not GPT-2's."""
        config, tensors = read_pretrained(name_or_folder)  # {name: tensor}; section 11
        model = cls(config)
        for name, tensor in tensors.items():
            if name.endswith(HF_TRANSPOSED):  # the linear layers of the blocks (section 11)
                tensors[name] = tensor.t()  # OpenAI stored them as (in, out), nn.Linear has (out, in)
        copy_weights(model, tensors, name_or_folder)  # every name and every shape must match
        return model

    # ------------------------------------------------------------------------------------------------------------------
    # 3. Sampling

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=50, generator=None):
        """Continue each text by max_new_tokens: (B, T) int64 -> (B, T + max_new_tokens).

        One token is predicted and appended to the text, then the next, and so on. Always taking the likeliest makes
        dull texts that soon repeat themselves. So the token is drawn at random, with the model's probabilities.

        temperature: below 1, likely tokens become likelier still; above 1, less so; 0 always takes the likeliest.
        top_k: draw from the k likeliest only (Fan et al. 2018, section 5.4); 0 or None: from all. Thousands of unlikely
            tokens are each drawn very rarely, but together quite often, and a single one can spoil a text.
        generator: for repeatable texts, a torch.Generator on the device of idx."""
        for _ in range(max_new_tokens):
            # All tokens are computed again each time. Caching keys and values would be faster, but takes more code.
            context = idx[:, -self.config.block_size :]  # as much as the model can look at
            x = self.hidden(context)[:, -1]  # (B, C): only the last position predicts something new
            with torch.autocast(x.device.type, enabled=False):  # float32: in bfloat16 (section 7), scores tie
                logits = self.lm_head(x.float())[:, :GPT2_VOCAB_SIZE]  # (B, 50257): the rest is padding (section 8)
            logits = logits / max(temperature, 1e-10)  # near 0, the largest logit gets all the probability
            k = min(top_k or GPT2_VOCAB_SIZE, logits.size(1))
            topk_logits, topk_ids = torch.topk(logits, k)  # (B, k) each
            probs = F.softmax(topk_logits, dim=-1)  # (B, k)
            choice = torch.multinomial(probs, num_samples=1, generator=generator)  # (B, 1), from 0 to k - 1
            idx_next = topk_ids.gather(1, choice)  # (B, 1): which token that is
            idx = torch.cat((idx, idx_next), dim=1)
        return idx

    # ------------------------------------------------------------------------------------------------------------------
    # 4. Optimizer, learning rate

    def configure_optimizers(self, weight_decay, learning_rate):
        """AdamW (Kingma & Ba 2015, Loshchilov & Hutter 2019), betas (0.9, 0.95) and eps from GPT-3 (Brown et al. 2020).

        For every weight w, with its gradient g, AdamW keeps two running averages. lr is the learning rate:

            m = 0.9 * m + 0.1 * g              the average gradient; that of a single step is noisy
            v = 0.95 * v + 0.05 * g * g        the average of its square: how large gradients of this weight are
            w = w - lr * weight_decay * w
            w = w - lr * m / (sqrt(v) + eps)   moves w by about lr, however large g is; less if g keeps changing sign

        (m and v start at 0, and are scaled up at first to make up for that. eps prevents 0 / 0.) Weight decay shrinks
        matrices a little in every step. A weight stays large only if the gradient keeps asking for it, so the model
        does not come to rely on a few large ones. Biases and layer norms are left out: they are few."""
        decay = [p for p in self.parameters() if p.dim() >= 2]
        no_decay = [p for p in self.parameters() if p.dim() < 2]
        groups = [
            {"params": decay, "weight_decay": weight_decay},
            {"params": no_decay, "weight_decay": 0.0},
        ]
        # A kernel is a program that a GPU runs on all numbers of a tensor at once. Written as above, AdamW starts more
        # than a thousand for the 148 tensors here, and each reads and writes memory. PyTorch's default does one
        # operation for many tensors at once; fused, one kernel does all operations (lecture: 93 to 90 ms).
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)


def get_lr(step, max_steps, warmup_steps, max_lr, min_lr):
    """The learning rate of a step: linear warm-up to max_lr, then half a cosine wave to min_lr (GPT-3, appendix B).

    Warm-up: at first, AdamW's averages rest on few batches, and large steps could lead the model astray. The way down:
    large steps make progress fast, but jump around the goal; small ones reach it. A cosine gives much time to both."""
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    decay_ratio = min(1.0, (step - warmup_steps) / (max_steps - warmup_steps))  # from 0 to 1
    coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))  # from 1 to 0
    return min_lr + coeff * (max_lr - min_lr)


# ----------------------------------------------------------------------------------------------------------------------
# 5. Data
# fineweb.py has turned web pages into tokens: one long row of numbers, with <|endoftext|> before each page. It is cut
# into files of 100 million numbers, called shards. The first is for validation, the others are for training.


class DataLoaderLite:
    """Batches of one split, "train" or "val", from a folder of shards or a text file.

    The shards, end to end, are one stream that starts again after its last token. A batch (section 9: micro-batch) is B
    windows of T tokens, which may cross pages. Shakespeare's input.txt begins 5962 22307 25 198 8421 356 5120 597 2252:
    "First", " Citizen", ":", a new line, "Before", " we", " proceed", " any", " further". So B = 2, T = 4 makes

        x = [[5962, 22307,   25, 198],      y = [[22307,  25, 198, 8421],
             [8421,   356, 5120, 597]]           [356,  5120, 597, 2252]]

    y is the answer: y[b, t] is the token that follows x[b, t]. The next batch starts at 2252, here only an answer.
    Several processes (section 7) share the batches: of 8, the one with rank 3 takes batches 3, 11, 19 and so on. Where
    a process reads next follows from its rank, the number of processes and the step. So a resumed run finds its place
    in the data by the step, even on another number of GPUs. (torch's DataLoader is for data that take long to load.)

    shuffle: take the windows in random order, a new one in every epoch (one pass over the data). For shards, off by
    default, to compare losses with the lecture's published run. For a text file, on: in order, the loss would rise and
    fall with the text, in input.txt from one play to the next."""

    def __init__(self, B, T, process_rank, num_processes, split, data_root, shuffle=False, seed=1337):
        self.B, self.T = B, T
        self.process_rank, self.num_processes = process_rank, num_processes
        self.split, self.shuffle, self.seed = split, shuffle, seed
        self.batch_index = 0  # how many batches this process has had; set it to jump
        self.shards = fineweb.find_shards(data_root, split)
        self.shard_lengths = [len(fineweb.open_tokens(path, split)) for path in self.shards]
        self.shard_starts = np.cumsum([0, *self.shard_lengths])  # where in the stream each shard starts
        self.num_tokens = sum(self.shard_lengths)
        if self.num_tokens < 2:
            raise fineweb.UserError(f"{data_root} has only {self.num_tokens} {split} tokens: add more text")

    def read(self, start, n):
        """n tokens of the stream, from token number start on, whatever shards they lie in: (n,) int64."""
        pieces = []
        while n > 0:
            start = start % self.num_tokens  # after the last token comes the first one
            i = np.searchsorted(self.shard_starts, start, side="right") - 1  # the shard that has this token
            first = start - self.shard_starts[i]
            piece = fineweb.read_tokens(self.shards[i], self.split, first, n, self.shard_lengths[i])
            pieces.append(piece)  # fewer than n at the end of the shard
            start += len(piece)
            n -= len(piece)
        return torch.from_numpy(np.concatenate(pieces).astype(np.int64))

    def next_batch(self, device="cpu"):
        """Inputs x and targets y, (B, T) int64 each, on the device."""
        B, T = self.B, self.T
        first = (self.batch_index * self.num_processes + self.process_rank) * B  # the number of the first window
        self.batch_index += 1
        if self.shuffle:
            starts = [self.shuffled_window(i) * T for i in range(first, first + B)]
            tokens = torch.stack([self.read(start, T + 1) for start in starts])  # (B, T + 1)
        else:
            tokens = self.read(first * T, B * T + 1)  # (B * T + 1,)
        if torch.device(device).type == "cuda":
            tokens = tokens.pin_memory()  # it stays in its place, so the GPU can copy it while the CPU continues
        tokens = tokens.to(device, non_blocking=tokens.is_pinned())
        if self.shuffle:
            return tokens[:, :-1], tokens[:, 1:]
        return tokens[:-1].view(B, T), tokens[1:].view(B, T)

    def shuffled_window(self, i):
        num_windows = max(1, (self.num_tokens - 1) // self.T)  # whole ones: each comes once in an epoch
        order = shuffled_order(num_windows, self.seed, epoch=i // num_windows)
        return int(order[i % num_windows])


@lru_cache(maxsize=1)  # ten billion tokens are ten million windows: shuffle them once in an epoch, not for every batch
def shuffled_order(num_windows, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(num_windows)


# ----------------------------------------------------------------------------------------------------------------------
# 6. Evaluation
# The training loss is that of one step: noisy, and too low for texts seen before. Three things say more: the loss
# on texts kept out of training; samples, texts that the model writes itself; and HellaSwag (hellaswag.py), 10,042 texts
# about everyday life with four possible endings: the model chooses the one whose tokens have the lowest mean loss. How
# often that is right can be compared with other models: guessing gets 0.25, OpenAI's GPT-2 (124M) 0.2955.


@torch.no_grad()  # model.eval() is not needed: there is no dropout
def evaluate(model, loader, val_tokens, device, autocast):
    """The validation loss: the mean over the first val_tokens tokens of the validation data, in nats.

    They are always the same tokens, so that losses can be compared. The processes share the batches, and each batch
    counts by its number of tokens. So batch size and number of GPUs make no difference but rounding."""
    val_tokens = min(val_tokens, loader.num_tokens - 1)  # the last token's target would be the first one again
    batch_tokens = loader.B * loader.T
    val_loss = torch.zeros((), device=device)
    loader.batch_index = 0
    for start in range(loader.process_rank * batch_tokens, val_tokens, loader.num_processes * batch_tokens):
        x, y = loader.next_batch(device)  # (B, T) each, from token number start on
        n = min(batch_tokens, val_tokens - start)  # how many targets of this batch count
        y = y.clone()  # it shares memory with x
        y.view(-1)[n:] = -1  # the loss ignores these (a smaller batch would have to be compiled: section 9)
        with autocast:  # in lower precision: section 7
            _, loss = model(x, y)  # the mean over n targets
        val_loss += loss * n / val_tokens
    if loader.num_processes > 1:
        dist.all_reduce(val_loss, op=dist.ReduceOp.SUM)  # now every process has the sum over all
    return val_loss.item()


def print_samples(model, settings):
    """Print num_samples continuations of the prompt, each up to an <|endoftext|>."""
    encoding = fineweb.gpt2_encoding()
    prompt = encoding.encode(settings.prompt, allowed_special="all") or [encoding.eot_token]  # empty: a new document
    device = model.lm_head.weight.device
    idx = torch.tensor([prompt] * settings.num_samples, device=device)  # (num_samples, T)
    generator = torch.Generator(device=device).manual_seed(settings.seed)  # leaves the training's random state alone
    with hellaswag.attention_for_varying_lengths():  # texts grow: avoid kernels that are slow at new lengths
        idx = model.generate(idx, settings.max_new_tokens, settings.temperature, settings.top_k, generator)
    for i, row in enumerate(idx[:, len(prompt) :].tolist()):
        text = encoding.decode(row).split("<|endoftext|>")[0]
        fineweb.print0(f"sample {i}: {settings.prompt}{text}")


# ----------------------------------------------------------------------------------------------------------------------
# 7. Processes, devices, precision
# torchrun starts copies of this script, processes, one for each GPU. The world size is their number. The rank
# counts them from 0, the local rank counts those of one machine: on two machines with eight GPUs each, the process for
# the very last GPU has rank 15 and local rank 7. DistributedDataParallel (DDP) first copies rank 0's weights to all.
# Each process computes the gradient for its tokens, DDP averages the gradients, and so all take the same step.


def get_ranks():
    """(rank, local_rank, world_size), as torchrun has set them; (0, 0, 1) without it."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 0, 1
    return int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])


def pick_device(name, local_rank=0, world_size=1):
    """The torch.device of this process. auto: a GPU (cuda), else Apple's (mps), else the CPU. Raises UserError."""
    devices = []
    if torch.cuda.is_available():
        devices += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available() and world_size == 1:  # DDP does not support it
        devices += ["mps"]
    devices += ["cpu"]
    if name == "auto":
        name = devices[0]
    if name == "cuda" or (name.startswith("cuda:") and world_size > 1):
        name = f"cuda:{local_rank}"  # each process has its own
    if name not in devices:
        problem = f"--device={name} is not available, only {', '.join(devices)}"
        raise fineweb.UserError(f"{problem}: change it or --nproc_per_node")
    return torch.device(name)


def pick_dtype(name, device):
    """The precision of matrix products, nearly all of the arithmetic. Fewer bits multiply faster. Raises UserError.

    A number has a sign, an exponent (how large or small it is) and a fraction (its digits). Bits of the last two:

        float32     8 + 23
        TF32        8 + 10   a GPU can round float32 to this just before it multiplies, if we let it
        bfloat16    8 + 7    2 to 3 digits, enough for products; the range of float32, so that no gradient gets lost
        float16     5 + 10   below 0.00000003 a number becomes 0, as many gradients would; above 65,504, infinite

    So with float16, a gradient scaler multiplies the loss, and thereby all gradients, by a large factor, and divides
    the gradients by it before the step. If one is infinite, it skips the step and halves the factor for a while."""
    if device.type == "mps" and name in ("bfloat16", "float16"):
        raise fineweb.UserError(f"--dtype={name} does not train reliably on MPS: use float32")
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        # The first GPU with bfloat16, the A100, is an (8, 0). (torch.cuda.is_bf16_supported() counts emulation, too.)
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    units = torch.cpu.get_capabilities() if device.type == "cpu" else {}  # {"avx512_bf16": True, ...}
    has_bfloat16 = any(present and "bf16" in unit for unit, present in units.items())
    return torch.bfloat16 if has_bfloat16 else torch.float32


# ----------------------------------------------------------------------------------------------------------------------
# 8. Settings
# Each is a flag, too: --max_steps=50. The defaults are the recipe for GPT-2 (124M) on ten billion tokens: 19,073 steps
# of 2^19 tokens each. (The more tokens in a step, the less noisy its gradient.) GPT-2's paper gives little of it, so
# batch size, learning rate and warm-up (715 steps, 375 million tokens) are those of GPT-3's model of this size (Brown
# et al. 2020, table 2.1 and appendix B). Which value counts? The first of: the flag's; on resume, the saved run's;
# with a text file, one that suits it (the end of --help lists them); the default or, if that is None, what [ ] says.


def setting(default, help, choices=(), minimum=0):  # a field, and what --help and the checks need to know of it
    return field(default=default, metadata={"help": help, "choices": choices, "minimum": minimum})


@dataclass(frozen=True)
class Settings:
    # Data
    data: str = setting("edu_fineweb10B", "shards, or a text (<|endoftext|> in it separates documents)")
    log_dir: str = setting("log", "folder for log.txt and checkpoints; the default is beside this file")
    init_from: str = setting("scratch", "scratch, gpt2 to gpt2-xl, a folder or a checkpoint")
    export: str = setting("", "write the weights to this folder, for transformers")
    resume: bool = setting(False, "continue from the newest checkpoint", (True, False))
    # Model
    model: str = setting("gpt2", "size, if new", ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"))
    n_layer: int = setting(None, "number of blocks [that of model]", minimum=1)
    n_head: int = setting(None, "attention heads [that of model]", minimum=1)
    n_embd: int = setting(None, "channels [that of model]", minimum=1)
    block_size: int = setting(1024, "context and sequence length T, in tokens", minimum=1)
    # GPUs load and multiply numbers in groups of 8, 16 and more. 50257 is odd, which takes slower kernels. So it is
    # padded to 50304 = 393 * 128 (lecture: 96 to 93 ms). The model soon learns that the extra ids never occur.
    vocab_size: int = setting(50304, "tokens and padding", minimum=GPT2_VOCAB_SIZE)
    # Optimization
    total_batch_size: int = setting(524288, "tokens in a step, over all processes", minimum=1)
    micro_batch_size: int = setting(None, "sequences B in a micro-batch [at most 64]", minimum=1)
    max_steps: int = setting(19073, "steps; 0: only evaluate or, with --prompt, sample")
    warmup_steps: int = setting(715, "steps of linear warm-up")
    max_lr: float = setting(None, "peak learning rate [that of model; gpt2: 6e-4]")
    min_lr: float = setting(None, "final learning rate [a tenth of max_lr]")
    weight_decay: float = setting(0.1, "weight decay of matrices")
    grad_clip: float = setting(1.0, "largest norm of the gradient; 0: no clipping")
    seed: int = setting(1337, "seed of initial weights, shuffling and samples")
    shuffle: bool = setting(False, "take windows in random order; on for a text file", (True, False))
    # Evaluation
    eval_interval: int = setting(250, "steps between evaluations; 0: never")
    val_tokens: int = setting(10485760, "validation tokens in an evaluation", minimum=1)
    hellaswag: str = setting("official", "official, off, or a JSON-lines file")
    checkpoint_interval: int = setting(5000, "steps between checkpoints; 0: only at the end")
    keep_checkpoints: int = setting(0, "newest checkpoints to keep; 0: all")
    prompt: str = setting(None, "what samples continue; -: stdin [suits the data]")
    num_samples: int = setting(4, "samples in an evaluation")
    max_new_tokens: int = setting(32, "length of a sample without its prompt")
    temperature: float = setting(1.0, "sampling temperature; 0: take the likeliest token")
    top_k: int = setting(50, "sample from the k likeliest tokens; 0: from all")
    # System
    device: str = setting("auto", "auto, cuda, mps or cpu")
    dtype: str = setting("auto", "auto, bfloat16, float16 or float32", ("auto", "bfloat16", "float16", "float32"))
    compile: str = setting("auto", "auto (on CUDA), True or False", ("auto", True, False))


# ----------------------------------------------------------------------------------------------------------------------
# 9. The training loop


def train(raw_model, settings, device, run, checkpoint=None):
    """Train raw_model, the GPT that main has made (max_steps=0: evaluate). run (section 12): log, checkpoints, signals.
    What else is not defined above is in Part II, too: due (is it time?), check_... (stop if it is wrong), and so on."""
    rank, _, world_size = get_ranks()
    ddp = world_size > 1
    master_process = rank == 0  # this one prints, logs and saves
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where products stay in float32 (lecture: 1000 to 333 ms)
    if ddp:
        connect_processes(device)
        check_ranks_agree(shared_settings(settings))

    # Precision. Within autocast, matrix products are in dtype; weights, optimizer state and layer norms stay in float32
    # (lecture: only 333 to 300 ms; until torch.compile, most time goes to moving numbers to memory and back).
    dtype = pick_dtype(settings.dtype, device)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # for other dtypes, it does nothing

    raw_model.to(device)
    optimizer = raw_model.configure_optimizers(settings.weight_decay, settings.max_lr)
    # model is raw_model wrapped by compiler and DDP: the weights are the same. raw_model makes samples, and is saved.
    # torch.compile joins operations into one kernel, so that numbers move to memory and back once, not for each one
    # (lecture: 300 to 130 ms). fullgraph: all in one piece, or an error. dynamic=False: compile each new shape.
    compiled = can_compile(settings.compile, device)
    model = torch.compile(raw_model, dynamic=False, fullgraph=True) if compiled else raw_model
    if ddp:
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)  # no copy of gradients

    # A step's tokens do not fit into memory at once. So a process takes micro-batches of B * T and adds up gradients.
    B, T = settings.micro_batch_size, settings.block_size
    grad_accum_steps = settings.total_batch_size // (B * T * world_size)  # no remainder: section 10 chose B so
    train_loader = DataLoaderLite(B, T, rank, world_size, "train", settings.data, settings.shuffle, settings.seed)
    val_loader = DataLoaderLite(B, T, rank, world_size, "val", settings.data)
    examples = hellaswag.load_or_warn(settings.hellaswag, raw_model.config.block_size)

    # Section 12: continue from the checkpoint, if there is one, over the same data; open the log; listen to Ctrl-C
    start_step = run.start(settings, checkpoint, optimizer, scaler, train_loader, val_loader, examples)
    train_loader.batch_index = start_step * grad_accum_steps
    print_start(settings, run, raw_model, train_loader, val_loader, device, dtype, compiled, start_step)

    stopped_by = 0  # or the number of a signal (2 for Ctrl-C) that one process got: then all of them stop
    x, y = train_loader.next_batch(device)  # (B, T) each
    for step in range(start_step, settings.max_steps + 1):
        # One pass more than there are steps: the last one only evaluates and saves the final model.
        last_step = step == settings.max_steps
        evaluate_now = due(step, settings.eval_interval, last_step) and stopped_by == 0
        save_now = last_step or stopped_by > 0 or due(step, settings.checkpoint_interval, last_step)
        if evaluate_now or save_now:
            check_weights(raw_model, step, run)  # they must be finite numbers

        # Once in a while (every eval_interval steps, and at the end): the validation loss
        if evaluate_now:
            val_loss = evaluate(model, val_loader, settings.val_tokens, device, autocast)
            run.report(f"{step} val {val_loss:.4f}", f"validation loss: {val_loss:.4f}")

        # Once in a while: HellaSwag, on raw_model, because model would be compiled for every length of a text
        if evaluate_now and examples:
            with autocast:
                losses = hellaswag.ending_losses(raw_model, examples, device, rank, world_size)  # (len(examples), 4)
            num_correct, _ = hellaswag.count_correct(losses, examples)
            accuracy = f"{num_correct / len(examples):.4f}"
            run.report(f"{step} hella {accuracy}", f"HellaSwag accuracy: {num_correct}/{len(examples)}={accuracy}")

        # Once in a while: samples
        if evaluate_now and master_process and settings.num_samples > 0:
            fineweb.print0(f"samples after {step} steps:" if step > 0 else "samples before the first step:")
            with autocast:
                print_samples(raw_model, settings)

        # Once in a while, and before leaving: a checkpoint
        if save_now and step > start_step and master_process:
            run.save(step, raw_model, optimizer, scaler)
        if last_step or stopped_by > 0:
            break

        # The gradient of the whole step, one micro-batch after another
        t0 = time.perf_counter()
        optimizer.zero_grad()
        loss_accum = torch.zeros((), device=device)
        for micro_step in range(grad_accum_steps):
            if ddp:
                # backward() makes DDP average the gradients of all ranks: only needed once, with the last micro-batch.
                # DDP looks at this flag in the forward pass. (no_sync() sets the same flag.)
                model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
            with autocast:
                _, loss = model(x, y)
            x, y = train_loader.next_batch(device)  # the GPU computes; meanwhile, the CPU reads the next batch
            loss = loss / grad_accum_steps  # backward() adds up gradients: this makes the sum a mean
            loss_accum += loss.detach()
            scaler.scale(loss).backward()

        # Clipping: AdamW's averages would keep a huge gradient, of unusual texts, for many steps. So if the norm (the
        # length of all gradients as one vector) is above a limit, all are scaled down to it.
        scaler.unscale_(optimizer)  # float16: first divide by the factor
        norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), settings.grad_clip or math.inf)  # inf: no limit

        # The mean loss over all ranks. If one rank got a signal to stop, all stop, or they would wait for it.
        stop_signal = torch.full((), run.stop_signal, device=device)  # 0: none
        if ddp:
            dist.all_reduce(loss_accum, op=dist.ReduceOp.SUM)
            loss_accum /= world_size
            dist.all_reduce(stop_signal, op=dist.ReduceOp.MAX)
        # So far, the CPU has only told the GPU what to do. item() waits for it (lecture: torch.cuda.synchronize()).
        train_loss, norm, stopped_by = loss_accum.item(), norm.item(), stop_signal.item()
        check_loss(step, train_loss, norm, scaler, run)  # it must be a finite number

        # The step
        lr = get_lr(step, settings.max_steps, settings.warmup_steps, settings.max_lr, settings.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.step(optimizer)  # optimizer.step(), unless a float16 gradient has overflowed
        scaler.update()

        # The CPU does not wait for scaler.step(): on a GPU, the rest of it falls into the next step or evaluation.
        dt = time.perf_counter() - t0
        tok_s, minutes = settings.total_batch_size / dt, dt * (settings.max_steps - step - 1) / 60
        message = f"step {step:5d} | loss {train_loss:.6f} | lr {lr:.4e} | norm {norm:.4f} | dt {1000 * dt:.2f}ms"
        run.report(f"{step} train {train_loss:.6f}", f"{message} | tok/s {tok_s:.0f} | left {minutes:.1f}min")

    if ddp:
        dist.barrier()  # the others wait while the master process saves
        del model  # DDP uses the process group, so it goes first
        dist.destroy_process_group()
    run.finish(step, stopped_by)


# ======================================================================================================================
# Part II: housekeeping
# ----------------------------------------------------------------------------------------------------------------------
# 10. The command line

# The four sizes of GPT-2, each with the peak learning rate of GPT-3's model of about that size.
MODELS = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "max_lr": 6e-4},  # 124M parameters
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "max_lr": 3e-4},  # 355M
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280, "max_lr": 2.5e-4},  # 774M
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600, "max_lr": 2e-4},  # 1558M
}
# For a text file: these suit a megabyte of text and two CPU cores. In order, 60 steps would see only the first fifth of
# input.txt, and end within one play.
TEXT_FILE_SETTINGS = {
    "block_size": 128,
    "total_batch_size": 1024,
    "micro_batch_size": 8,
    "max_steps": 60,
    "warmup_steps": 10,
    "eval_interval": 20,
    "val_tokens": 2048,
    "shuffle": True,
    "hellaswag": "off",
    "prompt": "\n",
}
PATHS = ("data", "log_dir", "init_from", "export", "hellaswag")  # in these flags, ~ is the home folder
BOOLEANS = {"True": True, "False": False}


def parse_flags(argv):
    """The flags that were given: {name: value}. Raises UserError for a wrong one."""
    for_text = ", ".join(f"{name}={value!r}" for name, value in TEXT_FILE_SETTINGS.items())
    epilog = f"With a text file, the defaults are {for_text}, and half of the model's max_lr."
    parser = fineweb.Parser(prog="train_gpt2.py", allow_abbrev=False, epilog=epilog)
    for f in fields(Settings):
        choices = f.metadata["choices"]
        options = {"type": f.type, "choices": choices or None, "metavar": f.name.upper()}
        if f.name in PATHS:
            options["type"] = fineweb.expand_home
        if True in choices:  # --resume is short for --resume=True
            options |= {"type": lambda text: BOOLEANS.get(text, text), "nargs": "?", "const": True}
        default = f" [{f.default}]" if f.default not in (None, "") else ""
        parser.add_argument(f"--{f.name}", help=f.metadata["help"] + default, **options)
    given = vars(parser.parse_args(argv))
    flags = {name: value for name, value in given.items() if value is not None}
    check_ranges(flags)
    return flags


def check_ranges(values):
    for f in fields(Settings):
        value, minimum = values.get(f.name), f.metadata["minimum"]
        is_number = isinstance(value, (int, float))
        if is_number and not minimum <= value <= 2**32:  # nan is refused, too
            problem = f"--{f.name}={value} is not allowed"
            raise fineweb.UserError(f"{problem}: it must be from {minimum} to 2**32", status=2)


def merge_settings(flags, checkpoint=None, config=None):
    """The settings of a run: each line below overrides those above it. What is still None, complete_settings chooses.

    flags: those that were given. checkpoint: the one to resume. config: the GPTConfig of weights that were loaded."""
    values = {f.name: f.default for f in fields(Settings)}
    if checkpoint:
        values |= checkpoint["settings"]
    else:
        shards = fineweb.HERE / "edu_fineweb10B"
        values["data"] = str(shards if any(shards.glob("[!.]*")) else fineweb.HERE / "input.txt")
        values["data"] = flags.get("data", values["data"])
        values["prompt"] = "Hello, I'm a language model,"
        values |= MODELS["gpt2"] | size_of(config)
        values |= MODELS.get(flags.get("init_from", "").removeprefix(OPENAI), {})
        values |= MODELS.get(flags.get("model"), {})
        if os.path.isfile(values["data"]):
            values |= TEXT_FILE_SETTINGS
            values["max_lr"] /= 2  # the gradient of so few tokens is noisy
        if Path(values["data"]).resolve() == fineweb.HERE / "input.txt":
            values["prompt"] = "ROMEO:\n"
    values["log_dir"] = str(fineweb.HERE / "log")  # not the checkpoint's: the folder may have been moved
    values |= flags
    if config:
        check_shape(flags, config)
        longest = config.block_size  # the texts of a batch may be shorter
        values |= {**asdict(config), "block_size": min(values["block_size"], longest)}
    return Settings(**values)


def size_of(config):
    """The one of MODELS that has the shape of a GPTConfig; {} if there is none."""
    for size in MODELS.values():
        shape = {name: size[name] for name in ("n_layer", "n_head", "n_embd")}
        if config and shape.items() <= asdict(config).items():
            return size
    return {}


def check_shape(flags, config):
    """Raise UserError if the flags ask for another shape than the weights have."""
    wanted = MODELS.get(flags.get("model"), {}) | flags
    for name, size in asdict(config).items():
        value = wanted.get(name, size)
        is_shorter = name == "block_size" and value < size
        if value != size and not is_shorter:
            problem = f"the weights have {name} {size}, not {value}"
            raise fineweb.UserError(f"{problem}: leave out --{name} or --model")


def complete_settings(settings, world_size):
    """Choose what depends on other settings and the number of processes. Raises UserError if no step is possible."""
    tokens = settings.block_size * world_size  # one sequence for each process
    num_sequences = settings.total_batch_size // tokens  # that each process has in a step
    if num_sequences * tokens != settings.total_batch_size:
        remedy = f"use --total_batch_size={max(1, num_sequences) * tokens}"
        raise fineweb.UserError(f"a step must be whole sequences for each process: {remedy}")
    most = min(settings.micro_batch_size or 64, num_sequences)
    micro_batch_size = next(n for n in range(most, 0, -1) if num_sequences % n == 0)
    min_lr = 0.1 * settings.max_lr if settings.min_lr is None else settings.min_lr
    source = settings.hellaswag if settings.eval_interval > 0 else "off"
    return replace(settings, micro_batch_size=micro_batch_size, min_lr=min_lr, hellaswag=source)


# ----------------------------------------------------------------------------------------------------------------------
# 11. Weights in and out
# safetensors and torch.load(weights_only=True) read tensors and plain types only, so that no file can run code.

# What the config of transformers says of a GPT-2, beside its shape
HF_CONFIG = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}
HF_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored as (in, out), like OpenAI's
OPENAI = "openai-community/"  # where the hub has OpenAI's weights
TIED = ("transformer.wte.weight", "lm_head.weight")  # two names of one matrix
MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks, which some files hold beside the weights


def load_model(source):
    """The one door for weights. Raises UserError if they cannot be used.

    source: gpt2, gpt2-medium, gpt2-large or gpt2-xl; a folder that transformers saved; the path of a checkpoint of this
    script, of the lecture's or of nanoGPT; or what load_checkpoint has read."""
    if isinstance(source, dict) or os.path.isfile(source):
        checkpoint = source if isinstance(source, dict) else load_checkpoint(source)
        name = "the checkpoint" if isinstance(source, dict) else source
        model = GPT(make_config(checkpoint["config"], name))
        copy_weights(model, checkpoint["model"], name)
    else:
        model = GPT.from_pretrained(source)
    if model.config.vocab_size < GPT2_VOCAB_SIZE:
        problem = f"{source} has {model.config.vocab_size} tokens, not GPT-2's {GPT2_VOCAB_SIZE}"
        raise fineweb.UserError(f"{problem}: the tokenizer does not fit, use another model")
    return model


def make_config(values, source):
    """A GPTConfig from what a file or the settings say. Raises UserError if they do not make sense."""
    values = {f.name: values.get(f.name) for f in fields(GPTConfig)}
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            problem = f"{name} is {value!r}, not a whole number above 0"
            raise fineweb.UserError(f"{source} cannot be loaded: {problem}")
    config = GPTConfig(**values)
    if config.n_embd % config.n_head != 0:
        problem = f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}"
        raise fineweb.UserError(f"{problem}: change one of them")
    return config


def copy_weights(model, tensors, source):
    """Copy {name: tensor} into the model. Raises UserError if a name or a shape does not match."""
    if None in shapes_in(tensors).values():
        raise fineweb.UserError(f"{source} has something else than weights in it: use another one")
    tied = [tensors[name] for name in TIED if name in tensors]
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise fineweb.UserError(f"{source} has weights that are not finite: use another one")
    if len(tied) == 2 and not torch.equal(*tied):
        raise fineweb.UserError(f"{source} cannot be loaded: GPT-2 has wte and lm_head in common")
    if tied:  # a file may have only one of the two
        tensors = {**tensors, **dict.fromkeys(TIED, tied[0])}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        if str(source).removeprefix(OPENAI) in MODELS:
            raise  # OpenAI's files are right, so section 1 has a mistake
        problem = f"the weights of {source} do not fit its config"
        raise fineweb.UserError(f"{problem}: {str(error)[:300]}") from error


def read_pretrained(name_or_folder):
    """(GPTConfig, {name: tensor}) for from_pretrained, with the names of section 1. Raises UserError."""
    from huggingface_hub import snapshot_download
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder, name = Path(name_or_folder), str(name_or_folder).removeprefix(OPENAI)
    if name in MODELS:
        files = ["config.json", "model.safetensors"]
        with fineweb.downloads_reported_as(f"{name} cannot be loaded"):
            folder = Path(snapshot_download(OPENAI + name, allow_patterns=files))
    elif not os.path.isdir(folder):
        raise fineweb.UserError(explain_missing(name))
    elif os.path.exists(folder / "adapter_config.json"):
        remedy = "merge it (merge_and_unload) and save the whole model"
        raise fineweb.UserError(f"{folder} cannot be loaded, it is a LoRA adapter: {remedy}")
    elif list_checkpoints(folder):
        remedy = f"name a checkpoint in it, {list_checkpoints(folder)[-1]}"
        raise fineweb.UserError(f"{folder} cannot be loaded: {remedy}")

    with fineweb.reported_as(f"{folder} cannot be loaded", SafetensorError):
        config = read_json(folder / "config.json")
        for key, value in HF_CONFIG.items():
            if config.get(key, value) != value:
                raise ValueError(f"config.json has {key} {config[key]}, not {value}")
        stored = {}
        for path in find_safetensors(folder):
            stored |= load_file(path)
    tensors = {}
    for key, tensor in stored.items():
        if key != "lm_head.weight":
            key = "transformer." + key.removeprefix("transformer.")  # OpenAI's own files lack it
        if not key.endswith(MASKS):
            tensors[key] = tensor
    return make_config({**config, "block_size": config.get("n_positions")}, folder), tensors


def explain_missing(name):
    """A message about weights that are not there."""
    path = Path(name)
    if path.suffix != ".pt":
        kinds = f"scratch, one of {', '.join(MODELS)}, a checkpoint, or a folder of weights"
        remedy = f"hf download {name} --local-dir=FOLDER makes one, if the hub has it"
        return f"{name} cannot be loaded; it must be {kinds} ({remedy})"
    folder = path.parent
    if not folder.is_dir():
        return f"{name} does not exist, nor does {folder}: name another checkpoint"
    place = "the current folder" if folder == Path() else folder
    names = ", ".join(sorted(file.name for file in folder.glob("*.pt")))
    earlier = ", ".join(sorted(str(run) for run in folder.glob("earlier_*")))
    places = f", earlier runs are in {earlier}" if earlier else ""
    return f"{name} does not exist; {place} has {names or 'no checkpoint'}{places}"


def find_safetensors(folder):
    """As transformers chooses: model.safetensors or, for a large model, the parts that an index names."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if not index.exists():
        raise ValueError("it has no model.safetensors (pickled .bin is not read)")
    parts = read_json(index).get("weight_map")
    names = list(parts.values()) if type(parts) is dict else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{index.name} names no files")
    return sorted({folder / name for name in names})


def read_json(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    if type(content) is not dict:
        raise ValueError(f"{path.name} is not a JSON object")
    return content


def save_pretrained(model, folder):
    """Write a folder for transformers, and for all who read its format: config, tokenizer, weights in float32.
    Raises UserError if it cannot be written."""
    from safetensors.torch import save

    config = asdict(model.config)
    block_size, num_rows = config.pop("block_size"), config["vocab_size"]
    if num_rows > GPT2_VOCAB_SIZE and num_rows % 64 == 0:
        num_rows = GPT2_VOCAB_SIZE  # the rest is padding; other sizes have tokens that somebody has added
    config |= HF_CONFIG
    config |= {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": num_rows,
        "tie_word_embeddings": True,
        "n_positions": block_size,
        "n_ctx": block_size,  # another name for it, which llama.cpp reads
        "bos_token_id": fineweb.END_OF_TEXT,
        "eos_token_id": fineweb.END_OF_TEXT,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }

    tensors = {}
    for name, p in model.named_parameters():
        tensor = p.detach().float().cpu()
        if name == "transformer.wte.weight":
            tensor = tensor[:num_rows]
        if name.endswith(HF_TRANSPOSED):
            tensor = tensor.t()
        tensors[name.removeprefix("transformer.")] = tensor.contiguous()  # the names in OpenAI's files
    weights = save(tensors, metadata={"format": "pt"})  # save_file() makes a file that only its owner can read

    with fineweb.reported_as(f"{folder} cannot be written"):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(config, indent=1).encode()
        fineweb.save_tokenizer(folder, block_size)
        fineweb.replace_file(folder / "config.json", lambda path: path.write_bytes(text))
        fineweb.replace_file(folder / "model.safetensors", lambda path: path.write_bytes(weights))


# What a checkpoint of this script holds (Run.save writes it)
CHECKPOINT_TYPES = {
    "step": int,
    "config": dict,
    "settings": dict,
    "data": dict,  # the fingerprint
    "model": dict,
    "optimizer": dict,
    "scaler": dict,
    "rng": torch.Tensor,
}


def load_checkpoint(path):
    """Read a checkpoint into CPU memory; of the lecture's and nanoGPT's, {"config", "model"}. Raises UserError."""
    fineweb.print0(f"loading {path}")
    problem = f"{path} cannot be read as a checkpoint (pickled objects are refused)"
    with fineweb.reported_as(problem, RuntimeError):
        with zipfile.ZipFile(path) as file:
            if file.testzip() is not None:  # torch.load does not look at checksums
                raise ValueError("wrong checksum: it is damaged")
        # The lecture's script saves its config as an object of this class, and "__main__" was its module.
        with torch.serialization.safe_globals([(GPTConfig, "__main__.GPTConfig")]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(checkpoint, dict):
        raise fineweb.UserError(f"{path} is not a checkpoint, but a {type(checkpoint).__name__}")
    weights, config, args = (checkpoint.get(key) for key in ("model", "config", "model_args"))
    if isinstance(config, GPTConfig) and isinstance(weights, dict):
        return {"config": asdict(config), "model": convert_weights(weights)}
    if isinstance(args, dict) and isinstance(weights, dict):
        note = "nanoGPT computes GELU exactly, this script its approximation"
        fineweb.print0(f"note: {note}: losses differ a little")
        return {"config": args, "model": convert_weights(weights)}

    problem = f"{path} is not a checkpoint of this script"
    for key, kind in CHECKPOINT_TYPES.items():
        if not isinstance(checkpoint.get(key), kind):
            keys = ", ".join(map(str, checkpoint))
            raise fineweb.UserError(f"{problem}: it has no {key}; it has the keys {keys}")
    types = {f.name: (f.type, bool, type(f.default)) for f in fields(Settings)}  # bool: --compile=True
    for name, value in checkpoint["settings"].items():
        if not isinstance(value, types.get(name, ())):
            raise fineweb.UserError(f"{problem}: it has the setting {name}={value}")
    check_ranges(checkpoint["settings"])
    return checkpoint


def convert_weights(weights):
    """The lecture's or nanoGPT's weights with our names: theirs may have a prefix, and biases may be missing."""
    tensors = {}
    for name, tensor in weights.items():
        name = str(name).removeprefix("_orig_mod.")  # of a compiled model
        if not name.endswith(MASKS):
            tensors[name] = tensor
    for name, shape in shapes_in(tensors).items():
        has_bias = name.endswith(".weight") and (".h." in name or ".ln_f." in name)
        if has_bias and shape:
            bias = name.removesuffix("weight") + "bias"
            tensors.setdefault(bias, torch.zeros(shape[:1]))  # no bias is a bias of zeros
    return tensors


def shapes_in(state):
    """The shapes of the tensors in nested dicts; None for what is not an ordinary tensor."""
    if isinstance(state, dict):
        return {key: shapes_in(value) for key, value in state.items()}
    is_tensor = isinstance(state, torch.Tensor) and state.layout == torch.strided
    return tuple(state.shape) if is_tensor else None


def restore(checkpoint, optimizer, scaler, settings, fingerprint):
    """Restore all but the weights, then let go of the checkpoint. Returns the number of steps that are done.
    Raises UserError if it does not fit this run."""
    remedy = "they must be the same (a new run can start from its weights, with --init_from)"
    check_same(fingerprint, checkpoint["data"], "in the checkpoint", remedy)
    problem = "the checkpoint cannot be resumed"
    step, rng = checkpoint["step"], checkpoint["rng"]
    if not 0 <= step <= settings.max_steps:
        limit = f"--max_steps={settings.max_steps} (to evaluate it, use --init_from)"
        raise fineweb.UserError(f"{problem}: it has {step} steps, more than {limit}")
    params = [p for group in optimizer.param_groups for p in group["params"]]
    expected = {}
    for i, p in enumerate(params):
        expected[i] = {"step": (), "exp_avg": tuple(p.shape), "exp_avg_sq": tuple(p.shape)}
    states = checkpoint["optimizer"].get("state")
    if shapes_in(states) != expected or shapes_in(rng) != shapes_in(torch.get_rng_state()):
        raise fineweb.UserError(f"{problem}: its optimizer's state, or its rng, has wrong shapes")
    for i, p in enumerate(params):
        # AdamW needs contiguous tensors of its own, in the layout of the weights.
        optimizer.state[p] = {"step": p.new_tensor(states[i]["step"].item())}
        for name in ("exp_avg", "exp_avg_sq"):
            optimizer.state[p][name] = torch.empty_like(p).copy_(states[i][name])
    if checkpoint["scaler"].keys() == scaler.state_dict().keys():  # it is empty for other dtypes than float16
        scaler.load_state_dict(checkpoint["scaler"])
    with fineweb.reported_as(problem, RuntimeError, TypeError):
        torch.set_rng_state(rng)
    checkpoint.clear()
    return step


# ----------------------------------------------------------------------------------------------------------------------
# 12. A run on disk


def list_checkpoints(folder):
    """The checkpoints in a folder, oldest first: model_05000.pt was saved after 5000 steps."""
    paths = [path for path in Path(folder).glob("model_*.pt") if path.stem[6:].isdecimal()]
    return sorted(paths, key=lambda path: int(path.stem[6:]))


def newest_checkpoint(folder):
    """The newest checkpoint that can be read, or None if there is none."""
    paths = list_checkpoints(folder)
    for path in reversed(paths):
        try:
            checkpoint = load_checkpoint(path)
        except fineweb.UserError as error:
            fineweb.print0(f"warning: {error}; trying the previous one")
            continue
        if "optimizer" not in checkpoint:
            remedy = f"it holds weights only: use --init_from={path}"
            raise fineweb.UserError(f"{path} cannot be resumed, {remedy}")
        return checkpoint
    if paths:
        remedy = "leave out --resume to start from scratch"
        raise fineweb.UserError(f"no checkpoint in {folder} can be read: {remedy}")
    fineweb.print0(f"no checkpoint in {folder}: starting from scratch")
    return None


def make_fingerprint(settings, train_loader, val_loader):
    """What fixes the order of the tokens. It must be the same on all ranks and on resume."""
    order = [settings.seed, settings.block_size] if settings.shuffle else None
    fingerprint = {"total_batch_size": settings.total_batch_size, "shuffle": order}
    for loader in (train_loader, val_loader):
        for path, length in zip(loader.shards, loader.shard_lengths, strict=True):
            fingerprint[f"{loader.split} {path.name}"] = length
    return fingerprint


def check_same(values, expected, place, remedy="they must be the same"):
    """Raise UserError unless two dicts are equal. place: where the expected values are."""
    for name in sorted(values.keys() | expected.keys()):
        value, other = values.get(name), expected.get(name)
        if value != other:
            problem = f"{name} is {value}, but {other} {place}"
            raise fineweb.UserError(f"{problem}: {remedy}")


def shared_settings(settings):
    """What must be the same on all ranks. Other machines may have other paths, and only rank 0 needs the prompt."""
    own = (*PATHS, "prompt")
    return {name: value for name, value in asdict(settings).items() if name not in own}


def check_ranks_agree(values):
    """Raise UserError unless the values are the same on all ranks."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, values)
    for rank, theirs in enumerate(everyone):
        check_same(everyone[0], theirs, f"on rank {rank}")


class Run:
    """A run on disk: its folder with log.txt and checkpoints, and the signals that ask it to stop.

    If something cannot be written, it warns, and training continues; finish() then ends with an error."""

    def __init__(self, settings):
        self.settings = settings  # as merge_settings made them: what is None will be chosen again on resume
        self.folder = Path(settings.log_dir)
        self.lock = ExitStack()  # while the run writes to its folder, no other one does
        self.log = None  # the file log.txt: only the master process has it, and only if it trains
        self.newest = "none"  # the newest checkpoint, for messages
        self.fingerprint = {}  # what must be the same on resume
        self.last_save_failed = False
        self.stop_signal = 0  # the number of the signal that asked to stop
        self.handlers = {}  # what handled signals before

    def start(self, settings, checkpoint, optimizer, scaler, train_loader, val_loader, examples):
        """Restore the checkpoint, if there is one. Then, if the run trains, lock the folder, open the log, and listen
        to signals. Returns the number of steps that are done. Raises UserError, before anything is written."""
        self.fingerprint = make_fingerprint(settings, train_loader, val_loader)
        start_step = 0
        if checkpoint:
            start_step = restore(checkpoint, optimizer, scaler, settings, self.fingerprint)
        if train_loader.num_processes > 1:
            start = {"start_step": start_step, "HellaSwag": len(examples)}
            check_ranks_agree({**self.fingerprint, **start})
        if settings.max_steps == 0:
            return start_step
        if train_loader.process_rank == 0:
            with fineweb.reported_as(f"--log_dir={self.folder} cannot be written"):
                self.lock.enter_context(fineweb.folder_locked(self.folder, "log_dir"))
                self.log = self.open_log(start_step)  # once: on a network drive, this takes milliseconds
        if start_step > 0:
            self.newest = self.path_of(start_step)
        for name in {"SIGTERM", "SIGINT", "SIGHUP"} & set(dir(signal)):  # Windows has no SIGHUP
            number = getattr(signal, name)
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP, of a closed terminal
                self.handlers[number] = signal.signal(number, self.on_signal)
        fineweb.print0("Ctrl-C: finish the step, save a checkpoint and exit. Twice: exit at once")
        return start_step

    def open_log(self, start_step):
        path = self.folder / "log.txt"
        if start_step == 0:
            self.move_earlier_run()
        elif path.exists():
            # Keep what will not come again. The last line may be incomplete.
            text = path.read_text(encoding="utf-8", errors="replace")
            lines = re.findall(r"^((\d{1,12}) (\w+) .+\n)", text, re.MULTILINE)
            is_last = start_step == self.settings.max_steps
            evaluates = due(start_step, self.settings.eval_interval, is_last)  # then these lines come again
            kept = []
            for line, step, kind in lines:
                end = start_step if kind == "train" or evaluates else start_step + 1
                if int(step) < end:
                    kept.append(line)
            content = "".join(kept).encode()
            fineweb.replace_file(path, lambda temporary: temporary.write_bytes(content))
        return open(path, "ab", buffering=0)

    def move_earlier_run(self):
        """Make room for a new run."""
        files = [*list_checkpoints(self.folder), *self.folder.glob("log.txt")]
        if not files:
            return
        source = self.settings.init_from
        if Path(source).resolve() in [path.resolve() for path in files]:
            problem = f"--init_from={source} is in --log_dir"
            raise fineweb.UserError(f"{problem}: name another one for the new run")
        numbers = range(1, sys.maxsize)
        earlier = next(path for n in numbers if not (path := self.folder / f"earlier_{n}").exists())
        earlier.mkdir()
        for path in files:
            path.rename(earlier / path.name)
        place = f"the earlier run in {self.folder} is now in {earlier}"
        fineweb.print0(f"{place} (delete it if you do not need it)")

    def on_signal(self, number, frame):
        if self.stop_signal == 0 and self.log is not None:
            with suppress(OSError):  # not print(): it may be what was interrupted
                os.write(1, f"{signal.Signals(number).name}: stopping after this step\n".encode())
        self.stop_signal = self.stop_signal or number
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the next Ctrl-C ends the run at once

    def report(self, line, message):
        """Print a message, and append a line such as "250 val 6.1604" to the log."""
        fineweb.print0(message)
        if self.log is None or self.log.closed:
            return
        try:
            self.log.write(f"{line}\n".encode())
        except OSError as error:
            self.log.close()
            problem = f"{self.log.name} could not be written ({error.strerror})"
            fineweb.print0(f"warning: {problem}; training continues")

    def path_of(self, step):
        return self.folder / f"model_{step:05d}.pt"

    def save(self, step, model, optimizer, scaler):
        """Write log_dir/model_NNNNN.pt, and remove what keep_checkpoints does not keep."""
        path = self.path_of(step)
        settings = asdict(self.settings)
        for name in ("data", "hellaswag"):
            if os.path.exists(settings[name]):
                settings[name] = os.path.abspath(settings[name])  # to resume from any folder
        checkpoint = {
            "step": step,
            "config": asdict(model.config),
            "settings": settings,
            "data": self.fingerprint,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "rng": torch.get_rng_state(),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            fineweb.replace_file(path, lambda temporary: torch.save(checkpoint, temporary))
        except (OSError, RuntimeError) as error:
            self.last_save_failed = True
            problem = f"{path} could not be written ({fineweb.reason_of(error)})"
            fineweb.print0(f"warning: {problem}; training continues")
            return
        fineweb.print0(f"checkpoint: {path}")
        self.last_save_failed, self.newest = False, path
        paths = list_checkpoints(self.folder)
        good = paths[: paths.index(path) + 1]  # later ones are damaged: the run would have resumed from them
        keep = self.settings.keep_checkpoints or len(good)
        for unneeded in (*good[:-keep], *self.folder.glob("model_*.pt.tmp")):  # .tmp: of a run that was killed
            with suppress(OSError):
                unneeded.unlink()

    def remedy(self):
        return f"lower --max_lr. Last checkpoint: {self.newest}"

    def finish(self, step, stopped_by):
        """The end: an error if something could not be written, the signal's exit status if one came."""
        if self.last_save_failed or (self.log is not None and self.log.closed):
            problem = f"the last checkpoint or log line could not be written to {self.folder}"
            raise fineweb.UserError(f"{problem}: see the warning")
        if stopped_by > 0:
            name = signal.Signals(stopped_by).name
            fineweb.print0(f"{name}: stopped after {step} steps")
            fineweb.print0(f"to continue: {resuming_command(self.folder)}")
            sys.exit(128 + stopped_by)
        if self.newest != "none":
            fineweb.print0(f"to sample from it: {sampling_command(self.newest, self.settings)}")

    def close(self):
        """Let go of everything, however the run ended: in Jupyter, the process lives on."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.log is not None:
            self.log.close()
        self.lock.close()


def resuming_command(log_dir):
    """What to type to continue a run."""
    _, _, world_size = get_ranks()
    program = "python"
    if world_size > 1:
        program = f"torchrun --standalone --nproc_per_node={world_size}"
    if os.environ.get("LOCAL_WORLD_SIZE", "1") != str(world_size):
        program = "torchrun ..."  # several nodes: its flags are not known here
    flags = ["--resume"]
    if log_dir != fineweb.HERE / "log":
        flags.append(f"--log_dir={short_path(log_dir)}")
    return f"{program} {shlex.join([short_path(__file__), *flags])}"


def sampling_command(checkpoint, settings):
    """What to type for samples as in the run."""
    flags = [f"--init_from={short_path(checkpoint)}", "--max_steps=0"]
    names = ("device", "dtype", "num_samples", "max_new_tokens", "temperature", "top_k", "seed")
    for name in names:
        value = getattr(settings, name)
        if value != getattr(Settings, name) and (name, value) != ("num_samples", 0):
            flags.append(f"--{name}={value}")
    prompt = shlex.quote(settings.prompt)
    if "\n" in prompt:  # $'...' is how bash and zsh write a new line
        escaped = settings.prompt.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
        prompt = f"$'{escaped}'"
    if len(prompt) > 100:
        prompt = "- < FILE"
    return f"python {shlex.join([short_path(__file__), *flags])} --prompt={prompt}"


def short_path(path):
    """The path as seen from the current folder, if it lies in there."""
    path, current = Path(path).resolve(), Path.cwd()
    return (path.relative_to(current) if path.is_relative_to(current) else path).as_posix()


def due(step, interval, last_step):
    """Whether it is time for something that happens every so many steps (0: never), and after the last one."""
    return interval > 0 and (last_step or step % interval == 0)


def check_weights(model, step, run):
    if not all(p.isfinite().all() for p in model.parameters()):
        raise fineweb.UserError(f"step {step}: the weights are not finite: {run.remedy()}")


def check_loss(step, loss, norm, scaler, run):
    """In float16, the norm may overflow: the scaler then skips the step and halves its factor. Below 1, give up."""
    norm_is_good = math.isfinite(norm) or (scaler.is_enabled() and scaler.get_scale() >= 1)
    if not math.isfinite(loss) or not norm_is_good:
        raise fineweb.UserError(f"step {step}: loss {loss}, norm {norm}: {run.remedy()}")


# ----------------------------------------------------------------------------------------------------------------------
# 13. The machine


def print_start(settings, run, model, train_loader, val_loader, device, dtype, compiled, start_step):
    B, T, world_size = train_loader.B, train_loader.T, train_loader.num_processes
    num_sequences = settings.total_batch_size // (T * world_size)  # of each process, in a step
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    precision = str(dtype).removeprefix("torch.")
    mode = "compiled" if compiled else "eager (not compiled)"
    num_params = sum(p.numel() for p in model.parameters())
    num_train, num_val = train_loader.num_tokens, val_loader.num_tokens
    num_used = min(settings.val_tokens, num_val)
    wanted = run.settings.micro_batch_size or B
    lowered = f" (not {wanted}: a process has {num_sequences} in a step)" if wanted != B else ""
    processes = f"{world_size} process" if world_size == 1 else f"{world_size} processes"
    step = f"{settings.total_batch_size:,} tokens = {processes} x {num_sequences // B} micro-steps"
    fineweb.print0(f"device: {world_size} x {gpu}, {precision}, {mode}")
    fineweb.print0(f"model: {num_params:,} parameters, {model.config}")
    fineweb.print0(f"data: {num_train:,} tokens, from {settings.data}")
    fineweb.print0(f"validation: the first {num_used:,} of {num_val:,} tokens")
    fineweb.print0(f"step: {step} x {B} sequences (B){lowered} x {T} tokens (T)")
    if 0 < settings.max_steps <= settings.warmup_steps:
        reason = f"--warmup_steps={settings.warmup_steps}"
        fineweb.print0(f"all steps are warm-up ({reason}): the learning rate only rises")
    if start_step > 0:
        fineweb.print0(f"resumed: {start_step} of {settings.max_steps} steps are done")
    if 0 < start_step == settings.max_steps:
        fineweb.print0(f"this run is finished: a larger --max_steps than {start_step} continues it")


def connect_processes(device):
    """Let the processes find each other. NCCL sends tensors from GPU to GPU, gloo from CPU to CPU."""
    # DDP and torch.compile load this module, and it keeps the process group that it finds. Loaded now, it finds none:
    # a group that is kept has threads that outlive destroy_process_group() and, rarely, abort Python as it exits.
    import torch.distributed.nn  # noqa: F401

    timeout = timedelta(minutes=30)  # the others wait while rank 0 writes a checkpoint, and drives can be slow
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device, timeout=timeout)
    else:
        dist.init_process_group("gloo", timeout=timeout)


def keep_freed_memory():
    """Let the C library keep freed memory. By default it returns large blocks to the system, which zeroes each page
    before handing it out again: a step on the CPU took 1.06 times as long. The numbers are mallopt(3)'s."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX: take no block directly from the system
        ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


def can_compile(wanted, device):
    """Whether to use torch.compile. It needs a C++ compiler for the CPU, Triton and a C compiler for a GPU."""
    if wanted is False or (wanted == "auto" and device.type != "cuda"):
        return False
    x = torch.ones(8, device=device, requires_grad=True)  # fails on a GPU that torch does not support: see main()
    try:
        torch.compile(lambda x: (x * 2.0).sum())(x).backward()
    except (RuntimeError, ImportError, OSError) as error:
        reason = f"{type(error).__name__}: {fineweb.reason_of(error)[:100]}"
        fineweb.print0(f"warning: torch.compile does not work here ({reason})")
        fineweb.print0("running without it: slower (on Linux, it needs gcc and python3-dev)")
        return False
    return True


def loss_in_chunks(lm_head, x, targets, chunk_size=512):
    """The mean cross entropy, as in GPT.forward, of x (B, T, C) and targets (B, T), for 512 positions at a time: on a
    CPU, this saves a sixth of the time of a step."""
    x, targets = x.flatten(0, 1), targets.flatten()  # (B * T, C), (B * T,)
    loss_sum = 0.0
    for x_chunk, y_chunk in zip(x.split(chunk_size), targets.split(chunk_size), strict=True):
        logits = lm_head(x_chunk).float()  # (chunk_size, vocab_size)
        loss_sum += F.cross_entropy(logits, y_chunk, ignore_index=-1, reduction="sum")
    return loss_sum / (targets != -1).sum()


@contextmanager
def memory_errors_explained(remedy):
    """Turn running out of memory into a UserError with a remedy."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError on a GPU; the CPU has no type of its own
        if "no kernel image" in str(error):
            problem = "this build of torch does not support this GPU: see its requirements"
            raise fineweb.UserError(problem) from error
        if not re.search("out of memory|can't allocate memory", str(error)):
            raise
        raise fineweb.UserError(f"out of memory: use {remedy}") from error


# ----------------------------------------------------------------------------------------------------------------------
# 14. main


def main(argv=None):
    flags = parse_flags(argv)
    missing = {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    if os.environ.get("WORLD_SIZE", "1") != "1" and missing:
        problem = f"WORLD_SIZE is set, but not {', '.join(sorted(missing))}"
        raise fineweb.UserError(f"{problem}: start with torchrun, or unset WORLD_SIZE")
    rank, local_rank, world_size = get_ranks()
    if flags.get("prompt") == "-" and rank == 0:  # the other processes would read parts of it
        if sys.stdin is None:
            problem = "--prompt=- reads standard input, but that is closed"
            raise fineweb.UserError(f"{problem}: use --prompt=TEXT, or --prompt=- < FILE")
        text = sys.stdin.buffer.read().decode("utf-8", errors="replace")
        flags["prompt"] = text.removesuffix("\n")

    # Weights come first: their shape is among the settings
    log_dir = flags.get("log_dir", fineweb.HERE / "log")
    checkpoint = newest_checkpoint(log_dir) if flags.get("resume") else None
    source = checkpoint or flags.get("init_from", "scratch")
    exports = "export" in flags
    if exports and rank != 0:
        return  # one process is enough
    if exports and source == "scratch":
        raise fineweb.UserError("--export needs weights: add --init_from or --resume", status=2)
    if exports and (flags["export"] == "" or os.path.exists(flags["export"])):
        problem = f"--export={flags['export']} must name a new folder"
        raise fineweb.UserError(f"{problem}: choose another, or delete it", status=2)
    model = None if source == "scratch" else load_model(source)
    asked = merge_settings(flags, checkpoint, model.config if model else None)
    if exports:
        save_pretrained(model, asked.export)
        fineweb.print0(f"exported: {asked.export}")
        return

    only_samples = "prompt" in flags and asked.max_steps == 0 and asked.num_samples > 0
    if only_samples and rank != 0:
        return
    if checkpoint and not only_samples and not os.path.exists(asked.data):
        problem = f"the data of this run, {asked.data}, does not exist"
        raise fineweb.UserError(f"{problem}: name its place with --data")
    settings = asked if only_samples else complete_settings(asked, world_size)
    smaller = (settings.micro_batch_size or 1) // 2
    remedy = f"--micro_batch_size={smaller}" if smaller else "a smaller --block_size or --model"
    remedy = "--num_samples=1, or a shorter prompt" if only_samples else remedy
    device = pick_device(settings.device, local_rank, world_size)
    if device.type == "cpu":
        keep_freed_memory()
    with memory_errors_explained(remedy):
        torch.manual_seed(settings.seed)  # all ranks start from the same weights
        if model is None:
            model = GPT(make_config(asdict(settings), "the model"))
        if only_samples:
            if source == "scratch":
                fineweb.print0("warning: an untrained model: --init_from or --resume loads weights")
            dtype = pick_dtype(settings.dtype, device)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                print_samples(model.to(device), settings)
            return
        if os.path.isfile(settings.data) and not checkpoint:
            text = f"{settings.data} is a text file"
            if "data" not in flags:
                text = "no edu_fineweb10B/ (python fineweb.py makes it): input.txt is used"
            fineweb.print0(f"{text}, with settings for a small one (see the end of --help)")
        with closing(Run(asked)) as run:
            train(model, settings, device, run, checkpoint)


if __name__ == "__main__":
    fineweb.run_main(main, interrupted="--resume continues from the last checkpoint")
