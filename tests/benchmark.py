"""
Measure speed and memory, and compare them with the usual alternatives. Rounds are interleaved, times are medians.

    python tests/benchmark.py train                # a training step, from plain to fast, beside other implementations
    python tests/benchmark.py memory               # how much memory a GPU needs for each micro-batch size
    python tests/benchmark.py losses               # are the losses of 20 steps those of transformers' model?
    python tests/benchmark.py loop                 # the share of a run that evaluation, samples and checkpoints take
    python tests/benchmark.py loader               # the share of a step that loading the data takes
    python tests/benchmark.py sample               # tokens per second of GPT.generate
    python tests/benchmark.py tokenize             # fineweb.py and a plain loop
    python tests/benchmark.py hellaswag            # hellaswag.py and one example at a time

--json FILE saves the figures, `train --plot FILE` draws them. `train --help` lists the options of train. Quote ratios:
they vary less than times do.
"""

import argparse
import ast
import contextlib
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tiktoken_ext.openai_public import r50k_pat_str
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fineweb
import hellaswag
from train_gpt2 import (
    GPT,
    MODELS,
    DataLoaderLite,
    GPTConfig,
    Run,
    evaluate,
    keep_freed_memory,
    memory_errors_explained,
    merge_settings,
    pick_device,
    pick_dtype,
    print_samples,
    save_pretrained,
)


def machine():
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux only
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"


def print_table(title, rows):
    """rows: [(label, number, unit)]."""
    print(f"\n{title}")
    print(machine())
    for label, number, unit in rows:
        print(f"  {label:52s} {number:14,.2f} {unit}")


def run_in_process(function, **options):
    """Call a function of IN_PROCESS in a process of its own, and return what it returns. If it fails, print the last
    line of its error, and return None."""
    command = [sys.executable, __file__, function.__name__, json.dumps(options)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, encoding="utf-8")
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        print(lines[-1], file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


# ----------------------------------------------------------------------------------------------------------------------
# The device, and a step on it


def open_device(name):
    """The torch.device of this name, as train() sets it up."""
    device = pick_device(name)
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def synchronize(device):
    """Wait until the device has done all its work. The CPU works at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device):
    """The most memory that this process has used, in bytes: on CUDA the GPU's, otherwise its own; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # Linux and macOS only
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_flops(device):
    """FLOP/s of the device's matrix units in dense bfloat16 according to its maker, or None if it is not listed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if "A100" in name:
        return 312e12
    peaks = {"H100 80GB HBM3": 989e12, "H200": 989e12, "RTX 3090": 71e12, "RTX 4090": 165e12, "RTX 5090": 209e12}
    # Whole names only: an H100 PCIe, and the Ti, D and laptop versions of an RTX, are other chips.
    return next((flops for key, flops in peaks.items() if name.endswith(key)), None)


def make_autocast(device, dtype):
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def train_step(model, params, optimizer, loader, device, autocast, grad_accum_steps=1):
    """A step of train(). Returns its loss. params: a list of the parameters of model."""
    optimizer.zero_grad(set_to_none=True)
    loss_accum = torch.zeros((), device=device)
    for _ in range(grad_accum_steps):
        x, y = loader.next_batch(device)
        with autocast:
            _, loss = model(x, y)
        loss = loss / grad_accum_steps
        loss_accum += loss.detach()
        loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
    train_loss, _ = loss_accum.item(), norm.item()
    optimizer.step()
    return train_loss


# ----------------------------------------------------------------------------------------------------------------------
# train
#
# Every contender runs in a process of its own, so that its peak memory is its own. All take turns in each round, so
# that a slow minute of the machine affects them alike.

# What each rung of a ladder adds to the one above it. The last one is the step of train_gpt2.py (on the CPU, that of
# --compile, and the one above it that of the default).
LADDERS = {
    "cpu": {
        "float32": {},
        "bf16": {"dtype": "bfloat16"},
        "freed memory kept": {"keep": True},
        "fused AdamW": {"fused": True},
        "loss for 512 tokens at a time": {"whole_loss": False},
        "torch.compile": {"compile": True},
    },
    "cuda": {
        "float32": {},
        "TF32": {"tf32": True},
        "bf16": {"dtype": "bfloat16"},
        "torch.compile": {"compile": True},
        "FlashAttention": {"attention": SDPBackend.FLASH_ATTENTION},
        "attention of PyTorch's choice": {"attention": None},  # on an H100, cuDNN's
        "vocabulary 50304": {"vocab_size": 50304},
        "fused AdamW": {"fused": True},
    },
    "mps": {
        "float32": {},
        "fused AdamW": {"fused": True},
    },
}
TRANSFORMERS = {
    "transformers eager": {"build": "transformers", "compile": False},
    "transformers compiled": {"build": "transformers", "compile": True},
}
LECTURE = {"lecture eager": {"build": "lecture", "compile": False}}
T = 1024


def contenders(device_type, lecture):
    """{name: what it switches on}, from the top of the picture to its bottom. lecture: whether it takes part."""
    cuda, cpu = device_type == "cuda", device_type == "cpu"
    switches = {
        "build": "ours",
        "dtype": "float32",
        "compile": False,
        "fused": False,
        "keep": False,
        "whole_loss": cpu,
        "tf32": False,
        "vocab_size": 50257 if cuda else 50304,
        "attention": SDPBackend.MATH if cuda else None,
    }
    found = {**TRANSFORMERS}
    if lecture:
        found |= LECTURE
    for name, measure in LADDERS[device_type].items():
        switches = switches | measure
        found[name] = switches
    return found


def pick_contenders(device_type, lecture, only):
    """The names of contenders. only: those that were asked for, with commas between; None for all. Raises UserError."""
    names = list(contenders(device_type, lecture))
    asked = only.split(",") if only else names
    for name in asked:
        if name not in names:
            problem = f"--only has {name!r}, which is no contender"
            raise fineweb.UserError(f"{problem}: use some of {', '.join(names)}", status=2)
    return [name for name in names if name in asked]


class Peer(torch.nn.Module):
    """transformers' GPT2LMHeadModel with the interface of GPT, (None, loss), used as its documentation says: the labels
    are the inputs, and it shifts them itself (so that the last token of a row has none)."""

    def __init__(self, config):
        super().__init__()
        from transformers import GPT2LMHeadModel

        self.model = GPT2LMHeadModel._from_config(config, attn_implementation="sdpa")

    def forward(self, idx, targets):
        return None, self.model(input_ids=idx, labels=idx, use_cache=False).loss


LECTURE_CLASSES = ("CausalSelfAttention", "MLP", "Block", "GPTConfig", "GPT")


def load_lecture(path):
    """A module with the classes of the lecture's script. The script trains as soon as it is imported: so nothing of it
    runs but its imports and the classes of its model. Raises UserError."""
    with fineweb.reported_as(f"--lecture={path} cannot be used", SyntaxError, ImportError):
        tree = ast.parse(Path(path).read_text(encoding="utf-8"), str(path))
        kept = [node for node in tree.body if is_needed(node)]
        missing = set(LECTURE_CLASSES) - {getattr(node, "name", "") for node in kept}
        if missing:
            raise ValueError(f"it has no class {', '.join(sorted(missing))}, so it is another script")
        module = types.ModuleType("lecture")
        module.master_process = False  # a global of the script: its configure_optimizers prints if it is true
        code = compile(ast.Module(kept, type_ignores=[]), str(path), "exec")
        exec(code, vars(module))  # noqa: S102
    return module


def is_needed(node):
    """Whether a statement of the lecture's script is one of those that load_lecture executes."""
    if isinstance(node, ast.ClassDef):
        return node.name in LECTURE_CLASSES
    if isinstance(node, ast.ImportFrom):
        return node.module != "hellaswag"  # it would be the one of this project
    return isinstance(node, ast.Import)


gpt_forward = GPT.forward


def whole_loss(self, idx, targets):
    """GPT.forward with all logits at once."""
    logits, _ = gpt_forward(self, idx)
    return None, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def peer_config():
    from transformers import GPT2Config

    return GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def build_transformers(device):
    """(model, optimizer, autocast), ready to train, as the other build_... return them."""
    torch.set_float32_matmul_precision("high")
    model = Peer(peer_config()).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)
    return model, optimizer, make_autocast(device, torch.bfloat16)


def build_lecture(device, path):
    """With the values that the lecture's script uses."""
    torch.set_float32_matmul_precision("high")
    lecture = load_lecture(path)
    model = lecture.GPT(lecture.GPTConfig(vocab_size=50304)).to(device)
    device_type = "cuda" if device.type == "cuda" else "cpu"  # the script knows no other
    optimizer = model.configure_optimizers(weight_decay=0.1, learning_rate=6e-4, device_type=device_type)
    return model, optimizer, make_autocast(device, torch.bfloat16)


def build_ours(device, switches):
    if switches["tf32"]:
        torch.set_float32_matmul_precision("high")
    if switches["keep"]:
        keep_freed_memory()
    if switches["whole_loss"]:
        GPT.forward = whole_loss
    model = GPT(GPTConfig(vocab_size=switches["vocab_size"])).to(device)
    optimizer = model.configure_optimizers(0.1, 6e-4)
    for group in optimizer.param_groups:
        # None is PyTorch's default: on a GPU, one operation for many tensors. False would take them one by one.
        group["fused"] = True if switches["fused"] else None
    return model, optimizer, make_autocast(device, getattr(torch, switches["dtype"]))


def run_contender(name, device, lecture, micro_batch_size, warmup, steps):
    """The seconds of each step of this contender, its peak memory and its number of parameters."""
    device = pick_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    switches = contenders(device.type, lecture)[name]
    torch.manual_seed(0)
    if switches["build"] == "transformers":
        model, optimizer, autocast = build_transformers(device)
    elif switches["build"] == "lecture":
        model, optimizer, autocast = build_lecture(device, lecture)
    else:
        model, optimizer, autocast = build_ours(device, switches)
    params = list(model.parameters())
    trained = model
    if switches["compile"] and switches["build"] == "ours":
        trained = torch.compile(model, dynamic=False, fullgraph=True)
    elif switches["compile"]:
        trained = torch.compile(model)
    backend = switches.get("attention")
    loader = DataLoaderLite(micro_batch_size, T, 0, 1, "train", ROOT / "input.txt")
    seconds = []
    for _ in range(warmup + steps):
        start = time.perf_counter()
        with sdpa_kernel(backend) if backend else contextlib.nullcontext():
            train_step(trained, params, optimizer, loader, device, autocast)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    num_params = sum(p.numel() for p in params)
    return {"seconds": seconds[warmup:], "memory": peak_memory(device), "params": num_params}


def benchmark_train(options):
    device = pick_device(options.device)
    names = pick_contenders(device.type, options.lecture, options.only)
    if options.lecture:
        load_lecture(options.lecture)  # a wrong file shows before the first measurement, not after it
    settings = {
        "device": options.device,
        "lecture": options.lecture,
        "micro_batch_size": options.micro_batch_size,
        "warmup": options.warmup,
        "steps": options.steps,
    }
    seconds = {name: [] for name in names}
    memory, params = {}, {}
    for _ in range(options.rounds):
        for name in names:
            result = run_in_process(run_contender, name=name, **settings)
            if result is None:
                print(f"{name}: did not run", file=sys.stderr)
                continue
            seconds[name] += result["seconds"]
            memory[name] = max(result["memory"] or 0, memory.get(name, 0))
            params[name] = result["params"]
            print(f"{name}: {statistics.median(result['seconds']):.3f} s", file=sys.stderr)

    peak = peak_flops(device)
    tokens = options.micro_batch_size * T
    labels = label_contenders(names, device.type)
    figures = {"micro_batch_size": options.micro_batch_size, "contenders": {}}
    rows = []
    peer_medians = [statistics.median(seconds[name]) for name in TRANSFORMERS if seconds.get(name)]
    fastest_peer = min(peer_medians, default=None)
    for name in names:
        if not seconds[name]:
            rows.append((labels[name], math.nan, "tokens/s  did not run"))
            continue
        median = statistics.median(seconds[name])
        rate = tokens / median
        mfu = (6 * (params[name] - T * 768) + 12 * 12 * 768 * T) * rate / peak if peak else None
        ratio = fastest_peer / median if fastest_peer else None
        figures["contenders"][name] = {
            "tokens_per_second": rate,
            "lowest_tokens_per_second": tokens / max(seconds[name]),
            "highest_tokens_per_second": tokens / min(seconds[name]),
            "ms_per_step": 1000 * median,
            "mfu": mfu,
            "memory_gb": memory[name] / 1e9,
            "times_the_faster_peer": ratio,
            "steps_timed": len(seconds[name]),
        }
        note = f"tokens/s {1000 * median:9.1f} ms {memory[name] / 1e9:6.2f} GB"
        note += f" {100 * mfu:5.1f} % MFU" if mfu else ""
        note += f" {ratio:5.2f} x" if ratio else ""
        rows.append((labels[name], rate, note))
    print_table(f"train: 124M, {options.micro_batch_size} x {T} tokens per step, {device.type}", rows)
    if options.plot and figures["contenders"]:
        figure = draw_ladder(figures, device.type)
        with fineweb.reported_as(f"--plot={options.plot} cannot be written"):
            fineweb.replace_file(Path(options.plot), lambda path: figure.savefig(path, format="png"))
    return figures


def label_contenders(names, device_type):
    """{name: label}, the rungs of the ladder as measures that are added one after another. A label names all that a
    contender has and the one above it has not, so it is right if --only leaves some out."""
    ladder = list(LADDERS[device_type])
    labels = {}
    named = 0  # how many rungs the labels so far have named
    for name in names:
        if name not in ladder:
            labels[name] = name
            continue
        end = ladder.index(name) + 1
        if named > 0:
            labels[name] = f"+ {', '.join(ladder[named:end])}"
        else:
            start = 1 if end > 1 else 0  # float32 is what the others start from
            labels[name] = f"this script: {', '.join(ladder[start:end])}"
        named = end
    return labels


def draw_ladder(figures, device_type):
    """A matplotlib Figure: a bar for the median of each contender, and a thin line from its slowest to its fastest
    step."""
    from matplotlib.figure import Figure

    results = figures["contenders"]
    labels = label_contenders(list(results), device_type)
    rates = [result["tokens_per_second"] for result in results.values()]
    lowest = [result["lowest_tokens_per_second"] for result in results.values()]
    highest = [result["highest_tokens_per_second"] for result in results.values()]
    colors = ["C0" if name in LADDERS[device_type] else "0.7" for name in results]

    figure = Figure(figsize=(9, 0.42 * len(results) + 1.0), dpi=200, layout="constrained")
    ax = figure.subplots()
    ax.barh(list(labels.values()), rates, color=colors)
    ax.hlines(range(len(rates)), lowest, highest, color="black", linewidth=0.8)
    for i, rate in enumerate(rates):
        ax.annotate(f"{rate:,.0f}", (highest[i], i), (4, 0), textcoords="offset points", va="center")
    ax.invert_yaxis()  # the first one on top
    size = f"124M parameters, {figures['micro_batch_size']} x {T} tokens per step, {device_type}"
    ax.set_xlabel(f"tokens per second (thin line: slowest to fastest step)\n{size}")
    ax.margins(x=0.1)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


class WithTargets(torch.nn.Module):
    """transformers' model with the same targets as GPT."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, idx, targets):
        logits = self.model(input_ids=idx, use_cache=False).logits
        return None, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def benchmark_losses(options):
    """The same weights, batches and settings: some steps of both, in bfloat16."""
    from transformers import GPT2LMHeadModel

    device = open_device(options.device)
    torch.manual_seed(0)
    ours = GPT(GPTConfig(vocab_size=50257))
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(ours, folder)
        no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        theirs = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="sdpa", **no_dropout)
    autocast, losses = make_autocast(device, torch.bfloat16), {}
    for name, model in (("ours", ours), ("peer", WithTargets(theirs))):
        model = model.to(device).train()
        params = list(model.parameters())
        if name == "ours":
            optimizer = model.configure_optimizers(0.1, 3e-4)
        else:
            groups = [
                {"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1},
                {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
            ]
            optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95))
        loader = DataLoaderLite(options.micro_batch_size, T, 0, 1, "train", ROOT / "input.txt")
        losses[name] = []
        for _ in range(options.steps):
            losses[name].append(train_step(model, params, optimizer, loader, device, autocast))
            print(f"{name} {len(losses[name])}: {losses[name][-1]:.4f}", file=sys.stderr)
    difference = max(abs(a - b) for a, b in zip(losses["ours"], losses["peer"], strict=True))
    rows = [("largest difference", difference, ""), ("last loss, ours", losses["ours"][-1], "")]
    rows.append(("last loss, transformers", losses["peer"][-1], ""))
    print_table(f"losses: {options.steps} steps from the same weights", rows)
    return {**losses, "largest_difference": difference}


# ----------------------------------------------------------------------------------------------------------------------
# memory
#
# The peaks of PyTorch's own allocator: allocated is what tensors take at once, reserved is what the allocator has asked
# the GPU for, which includes gaps between tensors. Each measurement is a process of its own, because the allocator
# keeps what it once had.

MICRO_BATCH_SIZES = (4, 8, 16, 32, 64, 96, 128)
CARDS = (8, 12, 16, 24, 40, 48, 80)  # sizes of GPU memory, in GB
CONTEXT_GB = 1.0  # about what CUDA and its libraries take beside the allocator's memory


def measure_memory(size, micro_batch_size, compile, device):
    """The peak memory of steps as train() takes them, in GB (1e9 bytes). size: a key of MODELS."""
    device = open_device(device)
    torch.set_float32_matmul_precision("high")
    shape = {name: MODELS[size][name] for name in ("n_layer", "n_head", "n_embd")}
    model = GPT(GPTConfig(vocab_size=50304, **shape))
    params = list(model.parameters())
    loader = DataLoaderLite(micro_batch_size, T, 0, 1, "train", ROOT / "input.txt")
    autocast = make_autocast(device, pick_dtype("auto", device))
    with memory_errors_explained("a larger GPU"):
        model.to(device)
        optimizer = model.configure_optimizers(0.1, 6e-4)
        trained = torch.compile(model, dynamic=False, fullgraph=True) if compile else model
        for _ in range(2):
            # AdamW's averages exist from the end of the first step on, and gradients from the end of a step's first
            # micro-step on: so the second micro-step of the second step is the first one that has them all.
            train_step(trained, params, optimizer, loader, device, autocast, grad_accum_steps=2)
    return {
        "allocated_gb": torch.cuda.max_memory_allocated(device) / 1e9,
        "reserved_gb": torch.cuda.max_memory_reserved(device) / 1e9,
    }


def largest_that_fits(peaks, card_gb):
    """The largest micro-batch size for a card, or None. peaks: {micro-batch size: what measure_memory returns}.

    It is a power of two, as others do not divide the recipe's step. It fits if the reserved memory and CONTEXT_GB are
    no more than the card's size."""
    fitting = []
    for micro_batch_size, peak in peaks.items():
        is_power_of_two = micro_batch_size & (micro_batch_size - 1) == 0
        if is_power_of_two and peak["reserved_gb"] + CONTEXT_GB <= card_gb:
            fitting.append(micro_batch_size)
    return max(fitting, default=None)


def benchmark_memory(options):
    device = pick_device(options.device)
    if device.type != "cuda":
        problem = f"memory measures GPUs with CUDA, not {device.type}"
        raise fineweb.UserError(f"{problem}: run it on a machine with one")
    modes = {"eager": False, "compiled": True}
    if options.compile != "both":
        modes = {mode: compile for mode, compile in modes.items() if str(compile) == options.compile}
    peaks = {mode: {} for mode in modes}
    for mode, compile in modes.items():
        for micro_batch_size in options.micro_batch_sizes:
            peak = run_in_process(
                measure_memory,
                size=options.model,
                micro_batch_size=micro_batch_size,
                compile=compile,
                device=options.device,
            )
            print(f"{mode}, {micro_batch_size}: {describe_peak(peak)}", file=sys.stderr)
            if peak is not None:
                peaks[mode][micro_batch_size] = peak

    print(f"\nmemory: {options.model}, T={T}, peak of a training step in GB (1e9 bytes): allocated, reserved")
    print(machine())
    print_columns("micro-batch", modes)
    for micro_batch_size in options.micro_batch_sizes:
        cells = [describe_peak(peaks[mode].get(micro_batch_size)) for mode in modes]
        print_columns(micro_batch_size, cells)

    largest = {mode: {card: largest_that_fits(peaks[mode], card) for card in CARDS} for mode in modes}
    rule = f"reserved + {CONTEXT_GB} GB for CUDA and its libraries <= the card's size"
    print(f"\nthe largest power of two of them that fits: {rule}")
    print_columns("card", modes)
    for card in CARDS:
        print_columns(f"{card} GB", [largest[mode][card] or "none" for mode in modes])
    return {"model": options.model, "peaks": peaks, "largest_micro_batch_size": largest}


def describe_peak(peak):
    return f"{peak['allocated_gb']:.1f}  {peak['reserved_gb']:6.1f}" if peak else "did not run"


def print_columns(label, cells):
    print(f"  {label!s:>12s}" + "".join(f"{cell!s:>20s}" for cell in cells))


# ----------------------------------------------------------------------------------------------------------------------
# loop, loader, sample


def timed(function, rounds):
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def hellaswag_in_training(model, tokenized, device, autocast):
    with autocast:
        hellaswag.count_correct(hellaswag.ending_losses(model, tokenized, device), tokenized)


def samples_in_training(model, settings, autocast):
    with autocast:
        print_samples(model, settings)


def benchmark_loop(options):
    """Measure the parts of the recipe's run, and compute the share of it that is not training: between two evaluations
    there are 250 steps of 524,288 tokens."""
    device = open_device(options.device)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50304)).to(device)
    params = list(model.parameters())
    optimizer = model.configure_optimizers(0.1, 6e-4)
    trained = torch.compile(model, dynamic=False, fullgraph=True) if device.type == "cuda" else model
    autocast = make_autocast(device, pick_dtype("auto", device))
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    loader = DataLoaderLite(options.micro_batch_size, T, 0, 1, "train", ROOT / "input.txt")
    val_loader = DataLoaderLite(options.micro_batch_size, T, 0, 1, "val", ROOT / "input.txt")
    examples = hellaswag.load_examples(options.data)
    examples = examples[:: max(1, len(examples) // options.examples)]
    tokenized = hellaswag.tokenize_examples(examples, T)
    recipe = merge_settings({"data": "edu_fineweb10B"})
    tokens = options.micro_batch_size * T  # in a micro-batch, be it of training or of validation
    val_tokens = min(4 * tokens, val_loader.num_tokens - 1)

    def checkpoint():
        with tempfile.TemporaryDirectory() as folder:
            run = Run(replace(recipe, log_dir=folder))
            run.save(0, model, optimizer, scaler)
            if run.last_save_failed:
                raise fineweb.UserError(f"no checkpoint could be written to {folder}: set TMPDIR to another folder")

    parts = {
        "steps": lambda: train_step(trained, params, optimizer, loader, device, autocast),
        "validation": lambda: evaluate(trained, val_loader, val_tokens, device, autocast),
        "hellaswag": lambda: hellaswag_in_training(model, tokenized, device, autocast),
        "samples": lambda: samples_in_training(model, recipe, autocast),
        "checkpoint": checkpoint,
    }
    for _ in range(options.warmup):
        parts["steps"]()
    seconds = {name: [] for name in parts}
    for i in range(options.rounds + 1):
        for name, part in parts.items():
            synchronize(device)
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                part()
            synchronize(device)
            if i > 0:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    interval = recipe.eval_interval
    # A batch takes the same time if only some of its targets count: so batches are counted, not tokens.
    val_batches = math.ceil(recipe.val_tokens / tokens) / math.ceil(val_tokens / tokens)
    cost = {  # from one evaluation to the next
        "steps": medians["steps"] * interval * recipe.total_batch_size / tokens,
        "validation": medians["validation"] * val_batches,
        "hellaswag": medians["hellaswag"] * 10042 / len(examples),
        "samples": medians["samples"],
        "checkpoint": medians["checkpoint"] * interval / recipe.checkpoint_interval,
    }
    total = sum(cost.values())
    rows = [(f"{name}: {value:,.1f} s", 100 * value / total, "% of the run") for name, value in cost.items()]
    rows.append(("all but the steps", 100 * (1 - cost["steps"] / total), "% of the run"))
    print_table(f"loop: 250 steps of the recipe and what comes with them, {device.type}, computed from parts", rows)
    return {"seconds": cost, "share_that_is_not_steps": 1 - cost["steps"] / total}


def benchmark_loader(options):
    loader = DataLoaderLite(options.micro_batch_size, T, 0, 1, "train", ROOT / "input.txt")
    with tempfile.TemporaryDirectory() as folder:
        tokens = np.random.default_rng(0).integers(0, 50257, 10_000_000).astype(np.uint16)
        np.save(Path(folder) / "x_train_000001.npy", tokens)
        shards = DataLoaderLite(options.micro_batch_size, T, 0, 1, "train", folder)
        batch = {"text": timed(loader.next_batch, 200), "shards": timed(shards.next_batch, 200)}
    figures = {f"{name}_ms": 1000 * seconds for name, seconds in batch.items()}
    tokens_per_second = options.micro_batch_size * T / batch["shards"]
    figures["shards_tokens_per_second"] = tokens_per_second
    figures["share_of_a_step_at_450k_tokens_per_second"] = 450_000 / tokens_per_second
    rows = [(f"a batch from {name}", 1000 * seconds, "ms") for name, seconds in batch.items()]
    rows.append(("tokens per second from shards", tokens_per_second, ""))
    rows.append(("share of a step on a GPU with 450,000 tokens/s", 45_000_000 / tokens_per_second, "%"))
    print_table(f"loader: {options.micro_batch_size} x {T} tokens", rows)
    return figures


def benchmark_sample(options):
    device = open_device(options.device)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50304)).to(device)
    idx = torch.zeros(4, 8, dtype=torch.int64, device=device)
    dtype = pick_dtype("auto", device)
    autocast = make_autocast(device, dtype)

    def generate():
        with autocast, hellaswag.attention_for_varying_lengths():
            model.generate(idx, 32).tolist()

    generate()
    seconds = timed(generate, options.rounds)
    rows = [("4 samples of 32 tokens", seconds, "s"), ("tokens per second", 4 * 32 / seconds, "")]
    print_table(f"sample: 124M, {device.type}, {dtype}", rows)
    return {"seconds": seconds, "tokens_per_second": 4 * 32 / seconds}


# ----------------------------------------------------------------------------------------------------------------------
# tokenize


def web_documents(count):
    """Texts of web length, about a thousand tokens each."""
    text, rng = (ROOT / "input.txt").read_text(encoding="utf-8"), random.Random(0)
    for _ in range(count):
        length = min(100_000, max(200, int(rng.lognormvariate(7.8, 0.8))))
        start = rng.randrange(len(text) - length)
        yield text[start : start + length]


def write_documents(folder, count):
    """Parquet in the layout of FineWeb-Edu's sample."""
    import pyarrow as pa
    from pyarrow import parquet

    (folder / "sample" / "10BT").mkdir(parents=True)
    header = (
        "---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n---\n"
    )
    (folder / "README.md").write_text(header, encoding="utf-8")
    documents = pa.table({"text": list(web_documents(count))})
    parquet.write_table(documents, folder / "sample" / "10BT" / "000.parquet", row_group_size=1000)


@functools.cache
def plain_encoding():
    """The encoding with tiktoken's own pattern."""
    ranks = fineweb.gpt2_encoding()._mergeable_ranks
    return tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )


def plain_tokenize(document):
    encoding = plain_encoding()
    return np.array([encoding.eot_token, *encoding.encode_ordinary(document["text"])], dtype=np.uint16)


def plain_loop(dataset, out):
    """The lecture's script on two cores: one worker, documents pickled to it in chunks of 16."""
    from datasets import load_dataset

    documents = load_dataset(dataset, name="sample-10BT", split="train")
    shard = np.empty(100_000_000, dtype=np.uint16)
    filled = number = 0
    with multiprocessing.Pool(1) as pool:
        for tokens in pool.imap(plain_tokenize, documents, chunksize=16):
            while len(tokens) > len(shard) - filled:
                room = len(shard) - filled
                shard[filled:] = tokens[:room]
                np.save(Path(out) / f"plain_{number:06d}.npy", shard)
                tokens, filled, number = tokens[room:], 0, number + 1
            shard[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
    np.save(Path(out) / f"plain_{number:06d}.npy", shard[:filled])


def encode_for(seconds, queue):
    """Tokens per second of encode_to_numpy alone, on the same kind of documents, in memory."""
    encoding, documents = fineweb.gpt2_encoding(), itertools.cycle(list(web_documents(5000)))
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for document in itertools.islice(documents, 100):
            count += len(encoding.encode_to_numpy(document, disallowed_special=()))
    queue.put(count / (time.perf_counter() - start))


def raw_rate(processes, seconds=5.0):
    queue = multiprocessing.Queue()
    workers = [multiprocessing.Process(target=encode_for, args=(seconds, queue)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    total = sum(queue.get() for _ in workers)
    for worker in workers:
        worker.join()
    return total


def benchmark_tokenize(options):
    seconds = {"plain": [], "ours": [], "ours, half": []}
    raw, tokens = [], {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        os.environ["HF_HOME"] = str(folder / "cache")
        write_documents(folder / "whole", options.documents)
        write_documents(folder / "half", options.documents // 2)
        paths = {"dataset": str(folder / "whole"), "out": str(folder)}
        plain = [sys.executable, __file__, plain_loop.__name__, json.dumps(paths)]
        ours = [sys.executable, str(ROOT / "fineweb.py"), f"--num_proc={os.cpu_count()}"]
        for i in range(options.rounds + 1):  # the first one fills the data set's cache
            commands = {
                "plain": plain,
                "ours": [*ours, f"--dataset={folder / 'whole'}", f"--out={folder / f'whole_{i}'}"],
                "ours, half": [*ours, f"--dataset={folder / 'half'}", f"--out={folder / f'half_{i}'}"],
            }
            for name, command in commands.items():
                start = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True)
                if i > 0:
                    seconds[name].append(time.perf_counter() - start)
            raw.append(raw_rate(os.cpu_count()))
        for name in ("whole", "half"):
            index = json.loads((folder / f"{name}_0" / "index.json").read_text(encoding="utf-8"))
            tokens[name] = index["tokens"]
        plain_shards = sorted(folder.glob("plain_*.npy"))
        our_shards = sorted((folder / "whole_0").glob("*.npy"), key=lambda path: path.name[-10:])
        same = [path.read_bytes() for path in plain_shards] == [path.read_bytes() for path in our_shards]
    assert same, "the two make different tokens"
    median = {name: statistics.median(values) for name, values in seconds.items()}
    running = (tokens["whole"] - tokens["half"]) / (median["ours"] - median["ours, half"])
    figures = {
        "tokens": tokens["whole"],
        "plain_tokens_per_second": tokens["whole"] / median["plain"],
        "ours_tokens_per_second": tokens["whole"] / median["ours"],
        "ratio": median["plain"] / median["ours"],
        "running_tokens_per_second": running,
        "encode_to_numpy_tokens_per_second": statistics.median(raw),
        "running_share": running / statistics.median(raw),
    }
    rows = [
        ("plain loop, one worker, encode_ordinary", figures["plain_tokens_per_second"], "tokens/s"),
        (f"fineweb.py, {os.cpu_count()} workers, start to end", figures["ours_tokens_per_second"], "tokens/s"),
        ("ratio", figures["ratio"], ""),
        ("fineweb.py once running", running, "tokens/s"),
        (
            f"encode_to_numpy alone, {os.cpu_count()} processes",
            figures["encode_to_numpy_tokens_per_second"],
            "tokens/s",
        ),
        ("share of it", 100 * figures["running_share"], "%"),
    ]
    print_table(f"tokenize: {tokens['whole']:,} tokens in {options.documents:,} documents", rows)
    return figures


# ----------------------------------------------------------------------------------------------------------------------
# hellaswag


@torch.no_grad()
def one_at_a_time(model, tokenized, device):
    """The lecture's evaluation: the four rows of an example in one batch. Returns the summed losses, (M, 4)."""
    sums = []
    for _, rows in tokenized:
        longest = max(len(tokens) for tokens, _ in rows)
        idx = torch.zeros(4, longest, dtype=torch.int64)
        mask = torch.zeros(4, longest)
        for i, (tokens, n) in enumerate(rows):
            idx[i, : len(tokens)] = tokens
            mask[i, len(tokens) - n : len(tokens)] = 1
        idx, mask = idx.to(device), mask.to(device)
        logits = model(idx)[0][:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1).float(), idx[:, 1:].flatten(), reduction="none")
        sums.append((losses.view(4, -1) * mask[:, 1:]).sum(1))
        sums[-1].argmin().item()  # it looks at each prediction
    return torch.stack(sums)


def benchmark_hellaswag(options):
    device = open_device(options.device)
    examples = hellaswag.load_examples(options.data)
    examples = examples[
        :: max(1, len(examples) // options.examples)
    ]  # the first ones are short, so take some from everywhere
    tokenized = hellaswag.tokenize_examples(examples, T)
    torch.manual_seed(0)
    shape = {"n_layer": options.n_layer, "n_head": options.n_embd // 64, "n_embd": options.n_embd}
    model = GPT(GPTConfig(vocab_size=50304, **shape)).to(device)
    seconds, sums = {"plain": [], "ours": []}, {}
    for i in range(options.rounds + 1):
        for name, run in (("plain", one_at_a_time), ("ours", hellaswag.ending_losses)):
            start = time.perf_counter()
            sums[name] = run(model, tokenized, device).cpu()
            if i > 0:
                seconds[name].append(time.perf_counter() - start)
    counts = torch.tensor([[n for _, n in rows] for _, rows in tokenized])
    differ = sum(
        int((a.argmin(1) != b.argmin(1)).sum())
        for a, b in ((sums["plain"], sums["ours"]), (sums["plain"] / counts, sums["ours"] / counts))
    )
    rates = {name: len(examples) / statistics.median(values) for name, values in seconds.items()}
    figures = {"examples": len(examples), **shape, "plain": rates["plain"], "ours": rates["ours"]}
    figures |= {"ratio": rates["ours"] / rates["plain"], "predictions_that_differ": differ}
    size = f"{shape['n_layer']} layers, {shape['n_embd']} wide"
    title = f"hellaswag: {len(examples)} examples, {size}, float32, {device.type}"
    rows = [
        ("one example at a time", rates["plain"], "examples/s"),
        ("hellaswag.py", rates["ours"], "examples/s"),
        ("ratio", figures["ratio"], ""),
        ("predictions that differ", differ, ""),
    ]
    print_table(title, rows)
    return figures


def make_parser():
    parser = fineweb.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="command", required=True)
    commands = {name: subparsers.add_parser(name) for name in BENCHMARKS}
    for name in ("train", "losses", "loop", "loader"):
        commands[name].add_argument("--micro_batch_size", type=int, default=4, help="sequences of 1024 tokens [4]")
    for name in ("train", "loop"):
        commands[name].add_argument("--warmup", type=int, default=4, help="steps that are not timed [4]")
    commands["train"].add_argument("--steps", type=int, default=3, help="steps timed in a round [3]")
    commands["train"].add_argument("--only", help="names of contenders, with commas between [all]")
    commands["train"].add_argument(
        "--lecture",
        metavar="FILE",
        help="measure the lecture's model, too: FILE is train_gpt2.py of https://github.com/karpathy/build-nanogpt "
        "(only its imports and the classes of its model are executed)",
    )
    commands["train"].add_argument("--plot", metavar="FILE", help="draw the ladder to this PNG file")
    commands["losses"].add_argument("--steps", type=int, default=20, help="steps of both models [20]")
    commands["memory"].add_argument("--model", choices=MODELS, default="gpt2", help="size [gpt2]")
    commands["memory"].add_argument(
        "--micro_batch_sizes",
        type=int,
        nargs="+",
        metavar="B",
        default=MICRO_BATCH_SIZES,
        help="sequences of 1024 tokens, with spaces between [4 8 16 32 64 96 128]",
    )
    commands["memory"].add_argument(
        "--compile",
        choices=("both", "True", "False"),
        default="both",
        help="with torch.compile, without it, or both [both]",
    )
    commands["tokenize"].add_argument("--documents", type=int, default=200_000, help="of about 1,000 tokens [200000]")
    for name in ("hellaswag", "loop"):
        commands[name].add_argument("--data", default="official", help="a local JSON-lines file")
        commands[name].add_argument("--examples", type=int, default=300, help="how many of them, at most [300]")
    commands["hellaswag"].add_argument("--n_layer", type=int, default=4, help="blocks of the model [4]")
    commands["hellaswag"].add_argument("--n_embd", type=int, default=128, help="its channels [128]")
    for name in ("train", "losses", "memory", "loop", "sample", "hellaswag"):
        commands[name].add_argument("--device", default="auto", help="auto, cuda, mps or cpu [auto]")
    for name in ("train", "loop", "sample", "tokenize", "hellaswag"):
        commands[name].add_argument("--rounds", type=int, default=3, help="how often each is measured [3]")
    for command in commands.values():
        command.add_argument("--json", metavar="FILE", help="write the figures to this file")
    return parser


BENCHMARKS = {
    "train": benchmark_train,
    "memory": benchmark_memory,
    "losses": benchmark_losses,
    "loop": benchmark_loop,
    "loader": benchmark_loader,
    "sample": benchmark_sample,
    "tokenize": benchmark_tokenize,
    "hellaswag": benchmark_hellaswag,
}
# What runs in a process of its own: its options are one argument, in JSON.
IN_PROCESS = {function.__name__: function for function in (run_contender, measure_memory, plain_loop)}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in IN_PROCESS:
        print(json.dumps(IN_PROCESS[argv[0]](**json.loads(argv[1]))))
        return
    options = make_parser().parse_args(argv)
    figures = BENCHMARKS[options.command](options)
    if options.json:
        text = json.dumps({**figures, "machine": machine()}, indent=1) + "\n"
        with fineweb.reported_as(f"--json={options.json} cannot be written"):
            fineweb.replace_file(Path(options.json), lambda path: path.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    fineweb.run_main(main, interrupted="no figures were kept")
