"""
Does it matter? Leave out one thing that train_gpt2.py does, train, and see what becomes of the loss.

    python tests/experiments.py                      # every experiment with three seeds: an hour on two cores
    python tests/experiments.py --only=post-norm     # one of them, and the script as it is
    python tests/experiments.py --list               # what there is

Each experiment changes a line of train_gpt2.py, or a flag, and nothing else. Each run is a process of its own, two
minutes long, and as many run at once as there are cores. Finished runs are kept in --folder: after an interruption, the
same command continues. It ends with a table in Markdown.

The model is nanoGPT's for a laptop: 4 blocks of 128 channels, a context of 64, and the characters of Shakespeare
instead of GPT-2's tokens. With 50,257 tokens, two minutes are too short: the model has then learned which tokens are
frequent, and which ones follow each other, but its attention does little yet (without the mask, the loss is no higher).
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fineweb

SEEDS = (1337, 1338, 1339)

# The model of all experiments. A step has two micro-steps.
BASE = {
    "shuffle": True,
    "vocab_size": 256,
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "block_size": 64,
    "total_batch_size": 768,
    "micro_batch_size": 6,
    "max_steps": 1000,
    "warmup_steps": 100,
    "max_lr": 1e-3,
    "val_tokens": 49152,
    "num_samples": 0,
    "checkpoint_interval": 0,
    "device": "cpu",
    "dtype": "bfloat16",
    "hellaswag": "off",
}
BASE_EDITS = {"GPT2_VOCAB_SIZE = 50257": "GPT2_VOCAB_SIZE = 256"}  # a token is a byte: nearly always, a character


@dataclass
class Experiment:
    """name: for --only. change: what the table says. edits: {line of train_gpt2.py, or a part of it: what replaces it}.
    flags: those that differ from BASE."""

    name: str
    change: str
    edits: dict
    flags: dict


def experiment(name, change, edits=(), **flags):
    return Experiment(name, change, dict(edits), flags)


EXPERIMENTS = [
    experiment("as-it-is", "nothing: the script as it is"),
    # The model
    experiment(
        "no-residual",
        "no residual stream: each layer replaces what came before",
        {
            "x = x + self.attn(self.ln_1(x))": "x = self.attn(self.ln_1(x))",
            "x = x + self.mlp(self.ln_2(x))": "x = self.mlp(self.ln_2(x))",
        },
    ),
    experiment(
        "post-norm",
        "post-norm: the stream itself is normalized, as in the first Transformer",
        {
            "x = x + self.attn(self.ln_1(x))": "x = self.ln_1(x + self.attn(x))",
            "x = x + self.mlp(self.ln_2(x))": "x = self.ln_2(x + self.mlp(x))",
        },
    ),
    experiment(
        "no-position",
        "no position embedding",
        {"x = tok_emb + pos_emb": "x = tok_emb"},
    ),
    experiment(
        "no-root",
        "attention scores not divided by the square root",
        {"q, k, v, is_causal=True)": "q, k, v, is_causal=True, scale=1.0)"},
    ),
    experiment(
        "no-mask",
        "no causal mask: a token sees the one that it must predict",
        {"q, k, v, is_causal=True)": "q, k, v)"},
    ),
    experiment(
        "relu",
        "ReLU instead of GELU",
        {'nn.GELU(approximate="tanh")': "nn.ReLU()"},
    ),
    experiment("one-head", "one attention head instead of four", n_head=1),
    experiment(
        "untied",
        "a head of its own, not tied to the token embedding",
        {"self.transformer.wte.weight = self.lm_head.weight": "pass"},
    ),
    experiment(
        "plain-init",
        "c_proj starts as large as the other layers",
        {"std=0.02 / math.sqrt(2 * config.n_layer)": "std=0.02"},
    ),
    # The optimizer
    experiment("no-warm-up", "no warm-up", warmup_steps=0),
    experiment("no-clipping", "no clipping of the gradient", grad_clip=0),
    experiment("lr-x3", "three times the learning rate", max_lr=3e-3),
    experiment("lr-third", "a third of the learning rate", max_lr=3.3e-4),
    experiment("no-cosine", "the learning rate stays at its peak", min_lr=1e-3),
    experiment("no-decay", "no weight decay", weight_decay=0),
    experiment(
        "decay-all",
        "weight decay of biases and layer norms, too",
        {'"weight_decay": 0.0}': '"weight_decay": weight_decay}'},
    ),
    # The loop
    experiment(
        "sum",
        "gradients of micro-steps summed, without the division",
        {"loss = loss / grad_accum_steps": "pass"},
    ),
    experiment(
        "sum-no-clipping",
        "the same, and no clipping",
        {"loss = loss / grad_accum_steps": "pass"},
        grad_clip=0,
    ),
    experiment("half-batch", "half the batch, as many steps", total_batch_size=384),
    experiment("in-order", "texts in order, not shuffled", shuffle=False),
    experiment("float32", "float32 instead of bfloat16", dtype="float32"),
]


def edited_source(edits):
    """The text of train_gpt2.py with these edits. Raises ValueError if a line is not there, or more than once."""
    text = (ROOT / "train_gpt2.py").read_text(encoding="utf-8")
    for old, new in {**BASE_EDITS, **edits}.items():
        if text.count(old) != 1:
            raise ValueError(f"train_gpt2.py has {old!r} {text.count(old)} times, not once: change the experiment")
        text = text.replace(old, new)
    return text


def write_characters(folder):
    """Shards of input.txt whose tokens are its bytes. The last tenth validates."""
    text = np.frombuffer((ROOT / "input.txt").read_bytes(), dtype=np.uint8).astype(np.uint16)
    train, val = np.split(text, [len(text) * 9 // 10])
    np.save(folder / "characters_train_000000.npy", train)
    np.save(folder / "characters_val_000000.npy", val)


def make_flags(experiment, seed, folder):
    flags = {**BASE, **experiment.flags, "seed": seed, "data": folder, "log_dir": folder / "log"}
    flags["eval_interval"] = flags["max_steps"]  # before the first step, and after the last
    return [f"--{name}={value}" for name, value in flags.items()]


def run(experiment, seed, results):
    """The figures of one run, {"val": ..., "train": ..., "norm": ..., "dt": ...}, from results if it is there."""
    path = results / f"{experiment.name}_{seed}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_characters(folder)
        script = folder / "train_gpt2.py"
        script.write_text(edited_source(experiment.edits), encoding="utf-8")
        command = [sys.executable, script, *make_flags(experiment, seed, folder)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        process = subprocess.run(
            command, env=environment, capture_output=True, text=True, encoding="utf-8", check=False
        )
    figures = read_figures(process.stdout)
    if "val" not in figures:  # not kept: the next time, it may be another reason or none
        return {"failed": (process.stderr.strip().splitlines() or ["no output"])[-1]}
    content = json.dumps(figures)
    fineweb.replace_file(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))
    return figures


def read_figures(output):
    """What a run has printed: its last validation loss, and of the last fifth of its steps the mean training loss and
    the median norm; the median time of all steps, in milliseconds."""
    steps = re.findall(r"loss (\S+) \| lr \S+ \| norm (\S+) \| dt (\S+)ms", output)
    losses = re.findall(r"^validation loss: (\S+)", output, re.MULTILINE)
    if len(losses) < 2:
        return {}
    train, norm, dt = zip(*[[float(value) for value in step] for step in steps], strict=True)
    last = len(steps) // 5
    return {
        "val": float(losses[-1]),
        "train": statistics.mean(train[-last:]),
        "norm": statistics.median(norm[-last:]),
        "dt": statistics.median(dt),
    }


def table(results):
    """A table in Markdown. results: {Experiment.name: the figures of its runs}."""
    rows = [
        "| what is changed | validation loss | difference (lowest, highest) | training loss | norm | time of a step |",
        "|---|---|---|---|---|---|",
    ]
    base = results["as-it-is"]
    if any("failed" in figures for figures in base):
        return f"the script as it is failed, so there is nothing to compare with: {base}"
    for experiment in EXPERIMENTS:
        runs = results.get(experiment.name, [])
        failed = [figures["failed"] for figures in runs if "failed" in figures]
        if failed:
            rows.append(f"| {experiment.change} | {failed[0]} | | | | |")
        elif runs:
            rows.append(row(experiment.change, runs, base))
    return "\n".join(rows)


def row(change, runs, base):
    """One row. Each run is compared with the one of base that has the same seed."""
    val, train, norm, dt = (statistics.mean(run[key] for run in runs) for key in ("val", "train", "norm", "dt"))
    differences = [run["val"] - plain["val"] for run, plain in zip(runs, base, strict=True)]
    low, high = min(differences), max(differences)
    difference = f"{statistics.mean(differences):+.3f} ({low:+.3f}, {high:+.3f})"
    if runs is base:
        losses = [run["val"] for run in runs]
        difference = f"({min(losses):.3f} to {max(losses):.3f})"
    ratio = dt / statistics.mean(plain["dt"] for plain in base)
    return f"| {change} | {val:.3f} | {difference} | {train:.3f} | {norm:.2f} | {ratio:.2f} |"


def main():
    parser = argparse.ArgumentParser(description="Leave out one thing that train_gpt2.py does, and see what it did.")
    names = [experiment.name for experiment in EXPERIMENTS]
    parser.add_argument("--only", choices=names, nargs="+", metavar="NAME", help="these experiments [all]")
    parser.add_argument("--list", action="store_true", help="print the names, and what they change")
    default = Path(tempfile.gettempdir()) / "gpt2-experiments"
    parser.add_argument("--folder", type=Path, default=default, help="keeps the finished runs [%(default)s]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once, each on one core [%(default)s]")
    options = parser.parse_args()
    if options.list:
        for experiment in EXPERIMENTS:
            print(f"{experiment.name:18s} {experiment.change}")
        return

    wanted = {"as-it-is", *(options.only or names)}
    chosen = [experiment for experiment in EXPERIMENTS if experiment.name in wanted]
    for experiment in chosen:
        edited_source(experiment.edits)  # an edit that does not fit shows before hours of training, not after them
    options.folder.mkdir(parents=True, exist_ok=True)
    jobs = [(experiment, seed) for experiment in chosen for seed in SEEDS]
    results = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = [pool.submit(run, experiment, seed, options.folder) for experiment, seed in jobs]
        try:
            for (experiment, _), future in zip(jobs, tqdm(futures, unit="run"), strict=True):
                results.setdefault(experiment.name, []).append(future.result())
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C, start no more
    print(table(results))


if __name__ == "__main__":
    main()
