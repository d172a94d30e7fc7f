"""Shared by the tests: a folder of small shards, the flags of a tiny model, and ways to run the script."""

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach the network
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="gpt2-tests-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A shell may ignore Ctrl-C for what it starts in the background, and nohup ignores SIGHUP. So would every process that
# a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

TINY = [
    *("--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=16"),
    *("--total_batch_size=128", "--micro_batch_size=2", "--warmup_steps=2", "--max_steps=6", "--max_lr=1e-2"),
    *("--eval_interval=2", "--val_tokens=200", "--num_samples=2", "--max_new_tokens=4", "--checkpoint_interval=2"),
    *("--device=cpu", "--dtype=float32", "--hellaswag=off"),
]


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: real processes and faults; runs with -m slow alone")


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("slow")])
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


def write_shards(folder, split, lengths, seed=0):
    """Shards of random tokens; returns them end to end."""
    rng = np.random.default_rng([seed, len(split)])
    folder.mkdir(parents=True, exist_ok=True)
    shards = [rng.integers(0, 50257, n).astype(np.uint16) for n in lengths]
    for i, tokens in enumerate(shards):
        np.save(folder / f"tiny_{split}_{i:06d}.npy", tokens)
    return np.concatenate(shards)


def write_bin(path, tokens):
    """A shard as llm.c writes it."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens).astype("<u2").tobytes())


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A folder whose training stream has three shards and ends within the third step of TINY."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, "train", [200, 37, 111])
    write_shards(folder, "val", [251])
    return folder


SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


@pytest.fixture
def train(tmp_path, shards, capsys):
    """train(*flags) runs the tiny model in this process, in tmp_path/log; returns what it printed."""
    import train_gpt2

    def run(*flags):
        defaults = [f"--data={shards}", f"--log_dir={tmp_path / 'log'}"]
        train_gpt2.main([*TINY, *defaults, *flags])
        return capsys.readouterr().out

    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def files_in(folder):
    """The files in a folder, sorted: without the hidden .lock."""
    return sorted(path for path in Path(folder).iterdir() if not path.name.startswith("."))


def names_in(folder):
    return [path.name for path in files_in(folder)]


def read_log(folder):
    """log.txt as a list of (step, kind, value), the value as it was written."""
    lines = (Path(folder) / "log.txt").read_text(encoding="utf-8").splitlines()
    return [(int(step), kind, value) for step, kind, value in (line.split() for line in lines)]


def run_script(*flags, nproc=None, env=None, root=ROOT, stdin=None, script="train_gpt2.py"):
    """A script in a process of its own, or in nproc of them under torchrun."""
    start = [sys.executable]
    if nproc:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    command = [*start, str(root / script), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    options = {"capture_output": True, "text": True, "encoding": "utf-8", "timeout": 300, "input": stdin}
    return subprocess.run(command, check=False, env=environment, **options)


def edit_json(path, **changes):
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")
