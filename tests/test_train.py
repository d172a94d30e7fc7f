"""The training loop: what it computes, that it can be interrupted, and what it says when something is wrong."""

import errno
import functools
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SIGNALS, TINY, files_in, names_in, read_log, run_script, write_shards
from filelock import FileLock
from torch import nn
from torch._dynamo.utils import counters

import fineweb
import train_gpt2
from fineweb import UserError
from train_gpt2 import GPT, GPTConfig, Settings, complete_settings, merge_settings, save_pretrained


def losses(folder, kind="train"):
    return [(step, value) for step, name, value in read_log(folder) if name == kind]


# ----------------------------------------------------------------------------------------------------------------------
# What a step computes


def gradient_of_first_step(log_dir):
    """After one step without clipping, Adam's first moment is a tenth of the gradient."""
    checkpoint = torch.load(log_dir / "model_00001.pt", weights_only=True)
    return [10 * state["exp_avg"] for state in checkpoint["optimizer"]["state"].values()]


def reference_gradient(shards, rows):
    """The gradient of the same step in plain PyTorch: one batch, no accumulation, no loader."""
    torch.manual_seed(1337)
    model = GPT(GPTConfig(block_size=16, vocab_size=50304, n_layer=2, n_head=2, n_embd=32))
    stream = np.concatenate([np.load(path) for path in sorted(shards.glob("*_train_*"))]).astype(np.int64)
    stream = torch.from_numpy(stream)
    model(stream[: rows * 16].view(rows, 16), stream[1 : rows * 16 + 1].view(rows, 16))[1].backward()
    matrices = [p.grad for p in model.parameters() if p.dim() >= 2]
    return matrices + [p.grad for p in model.parameters() if p.dim() < 2]


@pytest.mark.parametrize(("micro_batch", "nproc"), [(8, None), (4, None), (2, None), (4, 2), (2, 2), (1, 2)])
def test_gradient_is_the_same_in_any_number_of_parts(tmp_path, shards, micro_batch, nproc):
    flags = [*TINY, f"--data={shards}", f"--log_dir={tmp_path}", "--max_steps=1", "--grad_clip=0", "--eval_interval=0"]
    if nproc:
        run = run_script(*flags, f"--micro_batch_size={micro_batch}", nproc=nproc)
        assert run.returncode == 0, run.stderr
    else:
        train_gpt2.main([*flags, f"--micro_batch_size={micro_batch}"])
    gradient, expected = gradient_of_first_step(tmp_path), reference_gradient(shards, rows=8)
    assert len(gradient) == len(expected) == 28
    for a, b in zip(gradient, expected, strict=True):
        assert ((a - b).norm() / b.norm()).item() < 1e-5


def test_clipping_cuts_the_whole_gradient(train, tmp_path):
    out = train("--max_steps=1", "--grad_clip=0.01")
    norm = torch.cat([g.flatten() for g in gradient_of_first_step(tmp_path / "log")]).norm().item()
    assert norm == pytest.approx(0.01, rel=1e-3)
    assert float(out.split("| norm ")[1].split()[0]) > 0.1  # printed is the norm before clipping


def test_two_processes_train_like_one(tmp_path, shards):
    flags = [*TINY, f"--data={shards}"]
    train_gpt2.main([*flags, f"--log_dir={tmp_path / 'one'}"])
    run = run_script(*flags, f"--log_dir={tmp_path / 'two'}", nproc=2)
    assert run.returncode == 0, run.stderr
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert [entry[:2] for entry in one] == [entry[:2] for entry in two]
    for a, b in zip(one, two, strict=True):
        assert float(a[2]) == pytest.approx(float(b[2]), abs=2e-4)
    for start in ("device: ", "model: ", "step     0 ", "validation loss", "sample 0: "):  # from rank 0 only
        count = sum(line.startswith(start) for line in run.stdout.splitlines())
        assert count == (4 if start in ("validation loss", "sample 0: ") else 1), start


THREADS = """
import os, sys
sys.path.insert(0, {root!r})
import train_gpt2


class Run(train_gpt2.Run):
    def finish(self, *args):  # comes right after destroy_process_group()
        threads = [open(f"/proc/self/task/{{task}}/comm").read() for task in os.listdir("/proc/self/task")]
        if "gloo" in "".join(threads):
            sys.exit(f"left: {{threads}}")
        super().finish(*args)


train_gpt2.Run = Run
sys.argv[0] = "train_gpt2.py"
train_gpt2.main()
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="lists its threads as Linux does")
def test_no_thread_of_the_process_group_is_left(tmp_path, shards):
    # A thread that lets go of a tensor while Python exits aborts it ("terminate called without an active exception").
    (tmp_path / "threads.py").write_text(THREADS.format(root=str(ROOT)), encoding="utf-8")
    flags = [*TINY, "--max_steps=2", f"--data={shards}", f"--log_dir={tmp_path / 'log'}"]
    run = run_script(*flags, nproc=2, root=tmp_path, script="threads.py")
    assert run.returncode == 0, run.stderr


# Rank 1 has other flags than rank 0, or other shards in a folder of the same name, as on another node.
UNEQUAL = """
import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import fineweb, train_gpt2
sys.argv[0] = "train_gpt2.py"
flags, other_flags, other_data = {flags!r}, {other_flags!r}, {other_data!r}
if os.environ["RANK"] == "1":
    flags = flags + other_flags
    open_tokens = fineweb.open_tokens
    if other_data:
        fineweb.open_tokens = lambda path, split: open_tokens(Path(other_data) / path.name, split)
fineweb.run_main(lambda: train_gpt2.main(flags))
"""


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("max_steps", r"max_steps is 6\b.* 7 on rank 1"),
        ("shard", r"tiny_train_000001\.npy is 37\b.* 38 on rank 1"),
    ],
)
def test_ranks_that_differ_end_in_one_line_before_the_first_step(tmp_path, shards, other, message):
    shutil.copytree(shards, tmp_path / "other")
    if other == "shard":
        np.save(tmp_path / "other" / "tiny_train_000001.npy", np.ones(38, dtype=np.uint16))
    script = tmp_path / "unequal.py"
    text = UNEQUAL.format(
        root=str(ROOT),
        flags=[*TINY, f"--data={shards}", f"--log_dir={tmp_path / 'log'}"],
        other_flags=["--max_steps=7"] if other == "max_steps" else [],
        other_data=str(tmp_path / "other") if other == "shard" else "",
    )
    script.write_text(text, encoding="utf-8")
    run = run_script(nproc=2, script=script)
    assert run.returncode == 1
    errors = [line for line in run.stderr.splitlines() if line.startswith("train_gpt2.py: ")]
    assert len(errors) == 1
    assert re.search(message, errors[0])
    assert 'train_gpt2.py", line' not in run.stderr  # torchrun prints a traceback, but this script does not
    assert not re.search("^(step +0|validation loss)", run.stdout, re.MULTILINE)
    assert not (tmp_path / "log").exists()


def test_ranks_may_have_the_same_data_in_different_places(tmp_path, shards):
    """As on two machines with a copy each, in folders of different names."""
    shutil.copytree(shards, tmp_path / "other")
    script = tmp_path / "unequal.py"
    flags = [*TINY, "--max_steps=2"]
    text = UNEQUAL.format(
        root=str(ROOT),
        flags=[*flags, f"--data={shards}", f"--log_dir={tmp_path / 'log'}"],
        other_flags=[f"--data={tmp_path / 'other'}"],
        other_data="",
    )
    script.write_text(text, encoding="utf-8")
    run = run_script(nproc=2, script=script)
    assert run.returncode == 0, run.stderr
    run = run_script(*flags, f"--data={shards}", f"--log_dir={tmp_path / 'same'}", nproc=2)
    assert run.returncode == 0, run.stderr
    assert read_log(tmp_path / "log") == read_log(tmp_path / "same")


def test_evaluation_and_samples_leave_training_unchanged(train, tmp_path):
    train(f"--log_dir={tmp_path / 'on'}", "--eval_interval=1", "--dtype=bfloat16")
    train(f"--log_dir={tmp_path / 'off'}", "--eval_interval=0", "--dtype=bfloat16")
    on, off = [torch.load(tmp_path / name / "model_00006.pt", weights_only=True) for name in ("on", "off")]
    assert losses(tmp_path / "on") == losses(tmp_path / "off")
    assert all(torch.equal(on["model"][name], off["model"][name]) for name in on["model"])
    assert torch.equal(on["rng"], off["rng"])
    assert len(losses(tmp_path / "on", "val")) == 7
    assert losses(tmp_path / "off", "val") == []


@pytest.mark.parametrize("val_tokens", [1, 100, 10_000])
def test_validation_loss_is_the_mean_over_tokens(train, shards, tmp_path, val_tokens):
    """Equal for any micro-batch, and equal to the plain mean of windows of T, the last one shorter."""
    tokens = torch.from_numpy(np.load(next(shards.glob("*_val_*"))).astype(np.int64))
    torch.manual_seed(1337)
    model = GPT(GPTConfig(block_size=16, vocab_size=50304, n_layer=2, n_head=2, n_embd=32))
    count, total = min(val_tokens, len(tokens) - 1), 0.0
    for start in range(0, count, 16):
        window = tokens[start : min(start + 16, count) + 1]
        total += model(window[None, :-1], window[None, 1:])[1].item() * (len(window) - 1)
    for micro_batch in (1, 2, 8):
        train("--max_steps=1", f"--val_tokens={val_tokens}", f"--micro_batch_size={micro_batch}")
        assert float(losses(tmp_path / "log", "val")[0][1]) == pytest.approx(total / count, abs=1e-4)


def test_compiled_run_equals_eager_and_is_compiled_twice(train, tmp_path, monkeypatch):
    """Once to evaluate without gradients, once to train, however often they alternate."""
    # It compiles a function of its own, too.
    monkeypatch.setattr(train_gpt2, "can_compile", lambda wanted, device: wanted is True)
    train(f"--log_dir={tmp_path / 'eager'}", "--dtype=bfloat16")
    torch._dynamo.reset()
    counters.clear()
    out = train(f"--log_dir={tmp_path / 'compiled'}", "--dtype=bfloat16", "--compile")
    assert ", compiled\n" in out
    assert out.count("sample 1: ") == out.count("validation loss: ") == 4
    assert counters["stats"]["unique_graphs"] == 2
    for a, b in zip(read_log(tmp_path / "eager"), read_log(tmp_path / "compiled"), strict=True):
        assert a[:2] == b[:2]
        assert float(a[2]) == pytest.approx(float(b[2]), abs=0.02)
    checkpoint = torch.load(tmp_path / "compiled" / "model_00006.pt", weights_only=True)
    assert all(name.startswith(("transformer.", "lm_head.")) for name in checkpoint["model"])


SPLITS = """
import sys
sys.path.insert(0, {root!r})
import fineweb, train_gpt2
from torch._dynamo.backends.distributed import DDPOptimizer
compile_fn = DDPOptimizer.compile_fn
def record(self, graph, example_inputs):
    compiled = compile_fn(self, graph, example_inputs)
    fineweb.print0(f"DDPOptimizer: {{len(self.buckets)}} buckets")
    return compiled
DDPOptimizer.compile_fn = record
sys.argv[0] = "train_gpt2.py"
fineweb.run_main(train_gpt2.main)
"""


def test_compiled_processes_train_like_an_eager_one(train, tmp_path, shards):
    """Within DDP, torch.compile cuts the model where DDP's buckets end, so that the first gradients are already
    averaged while others are computed. This model needs two buckets: 1 MB for the last layers, then up to 25."""
    train(f"--log_dir={tmp_path / 'eager'}")
    script = tmp_path / "splits.py"
    script.write_text(SPLITS.format(root=str(ROOT)), encoding="utf-8")
    flags = [*TINY, f"--data={shards}", f"--log_dir={tmp_path / 'compiled'}", "--compile=True"]
    run = run_script(*flags, nproc=2, script=script)
    assert run.returncode == 0, run.stderr
    assert "device: 2 x cpu, float32, compiled" in run.stdout
    assert re.findall("DDPOptimizer: (.*)", run.stdout) == ["2 buckets"] * 2  # to evaluate, and to train
    for a, b in zip(read_log(tmp_path / "eager"), read_log(tmp_path / "compiled"), strict=True):
        assert a[:2] == b[:2]
        assert float(a[2]) == pytest.approx(float(b[2]), abs=1e-3)


def test_without_a_compiler_the_run_is_eager_with_one_warning(train, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    out = train("--compile=True", "--max_steps=1")
    assert out.count("warning: torch.compile does not work here") == 1
    assert "(RuntimeError: no compiler)" in out
    assert ", eager (not compiled)\n" in out


def test_a_gpu_without_kernels_is_not_taken_for_a_missing_compiler(train, monkeypatch, capsys):
    def unsupported(*args, **kwargs):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch, "ones", unsupported)
    with pytest.raises(UserError, match="this build of torch does not support this GPU"):
        train("--compile=True")
    assert "torch.compile does not work" not in capsys.readouterr().out


def test_float16_scales_the_gradients(train, tmp_path):
    train(f"--log_dir={tmp_path / 'full'}")
    train(f"--log_dir={tmp_path / 'half'}", "--dtype=float16")
    checkpoint = torch.load(tmp_path / "half" / "model_00006.pt", weights_only=True)
    assert checkpoint["scaler"]["scale"] >= 1.0
    for a, b in zip(losses(tmp_path / "full"), losses(tmp_path / "half"), strict=True):
        assert float(a[1]) == pytest.approx(float(b[1]), abs=0.05)


def test_a_float16_step_that_overflows_leaves_the_weights_as_they_were(train, tmp_path, monkeypatch):
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**127)  # in float32, too, the scaled loss is inf
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    out = train("--dtype=float16", "--max_steps=1")
    assert re.search(r"^step +0 \| loss 10\..* norm (inf|nan) ", out, re.MULTILINE)
    checkpoint = torch.load(tmp_path / "log" / "model_00001.pt", weights_only=True)
    torch.manual_seed(1337)
    untrained = GPT(GPTConfig(block_size=16, vocab_size=50304, n_layer=2, n_head=2, n_embd=32)).state_dict()
    assert all(torch.equal(tensor, untrained[name]) for name, tensor in checkpoint["model"].items())
    assert not any(tensor.any() for state in checkpoint["optimizer"]["state"].values() for tensor in state.values())
    assert checkpoint["scaler"]["scale"] == 2.0**126


# ----------------------------------------------------------------------------------------------------------------------
# Using a model


def test_prompt_from_standard_input_continues(train, tmp_path, shards):
    train("--max_steps=2")
    weights = f"--init_from={tmp_path / 'log' / 'model_00002.pt'}"
    flags = [weights, f"--data={shards}", "--max_steps=0", "--eval_interval=1", "--num_samples=2"]
    text = "Wer reitet so sp\u00e4t?\n\n" + "word " * 100  # longer than the context, of 16 tokens
    given = run_script(*TINY, *flags, f"--prompt={text}")
    read = run_script(*TINY, *flags, "--prompt=-", stdin=text + "\n")
    assert read.returncode == 0, read.stderr
    assert read.stdout == given.stdout
    assert f"sample 1: {text}" in read.stdout


def test_a_sample_ends_at_the_end_of_text(train, monkeypatch):
    new = torch.tensor([[50256, 11], [11, 50256], [11, 13], [50256, 50256]])
    monkeypatch.setattr(GPT, "generate", lambda self, idx, *_: torch.cat((idx, new), dim=1))
    out = train("--max_steps=0", "--num_samples=4", "--max_new_tokens=2", "--prompt=A")
    samples = [line for line in out.splitlines() if line.startswith("sample")]
    assert samples == ["sample 0: A", "sample 1: A,", "sample 2: A,.", "sample 3: A"]


def test_export_writes_weights_and_nothing_else(train, tmp_path):
    train("--max_steps=2")
    before = files_in(tmp_path / "log")
    for flags in (["--resume"], [f"--init_from={tmp_path / 'log' / 'model_00002.pt'}"]):
        train(*flags, f"--export={tmp_path / 'folder'}")
        model = GPT.from_pretrained(tmp_path / "folder")
        weights = train_gpt2.load_checkpoint(tmp_path / "log" / "model_00002.pt")["model"]
        assert torch.equal(model.lm_head.weight, weights["lm_head.weight"][:50257])
        shutil.rmtree(tmp_path / "folder")
    assert files_in(tmp_path / "log") == before
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model-00001-of-00002.safetensors").write_text("another model's")
    (tmp_path / "file").write_text("")
    for flags in (
        ["--resume", f"--export={tmp_path / 'folder'}"],
        ["--resume", f"--export={tmp_path / 'file'}"],
        ["--resume", "--export="],
        [f"--export={tmp_path / 'new'}"],  # without weights
    ):
        message = "--export needs weights" if "--resume" not in flags else "--export=.* must name a new folder"
        with pytest.raises(UserError, match=message) as error:
            train(*flags)
        assert error.value.status == 2
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="file/folder cannot be written"):
        train("--resume", f"--export={tmp_path / 'file' / 'folder'}")


def test_of_two_processes_one_exports_and_samples(train, tmp_path):
    train("--max_steps=2")
    weights = f"--init_from={tmp_path / 'log' / 'model_00002.pt'}"
    run = run_script(weights, f"--export={tmp_path / 'folder'}", nproc=2)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("exported: ") == 1
    run = run_script(weights, "--max_steps=0", "--prompt=Hi", "--num_samples=1", "--device=cpu", nproc=2)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("sample 0: Hi") == 1


# ----------------------------------------------------------------------------------------------------------------------
# Interruption


@pytest.mark.parametrize("stop", [2, 4])
def test_resumed_run_equals_one_that_never_stopped(train, tmp_path, stop):
    """The shards of the stream end within steps 1 to 2, so both cross an end."""
    train(f"--log_dir={tmp_path / 'whole'}")
    train(f"--log_dir={tmp_path / 'parts'}")
    for step in range(stop + 1, 7):  # as if killed after `stop` steps were saved, and one more was logged
        (tmp_path / "parts" / f"model_{step:05d}.pt").unlink(missing_ok=True)
    log = tmp_path / "parts" / "log.txt"
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if int(line.split()[0]) <= stop]
    log.write_text("".join(kept) + f"{stop + 1} trai", encoding="utf-8")  # and a line was being written
    out = train(f"--log_dir={tmp_path / 'parts'}", "--resume")
    assert f"model_{stop:05d}.pt" in out
    assert log.read_bytes() == (tmp_path / "whole" / "log.txt").read_bytes()
    whole, parts = [torch.load(tmp_path / name / "model_00006.pt", weights_only=True) for name in ("whole", "parts")]
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])
    states = zip(whole["optimizer"]["state"].values(), parts["optimizer"]["state"].values(), strict=True)
    assert all(torch.equal(a[key], b[key]) for a, b in states for key in a)


def test_a_shuffled_run_resumes_exactly(train, tmp_path, shards):
    """Over the end of an epoch, of 21 windows, within the third step; then with two processes."""
    train("--shuffle", f"--log_dir={tmp_path / 'whole'}")
    train("--shuffle", "--max_steps=2")
    train("--resume", "--max_steps=6")  # the checkpoint says shuffle
    whole, log = ((tmp_path / name / "log.txt").read_bytes() for name in ("whole", "log"))
    assert whole == log
    train(f"--log_dir={tmp_path / 'plain'}")
    assert losses(tmp_path / "plain") != losses(tmp_path / "whole")
    for change in ("--shuffle=False", "--seed=5", "--block_size=8"):
        with pytest.raises(UserError, match=r"shuffle is .*, but \[1337, 16\] in the checkpoint"):
            train("--resume", "--max_steps=8", change)
    flags = [*TINY, "--shuffle", f"--data={shards}", f"--log_dir={tmp_path / 'two'}"]
    run = run_script(*flags, nproc=2)
    assert run.returncode == 0, run.stderr
    for (_, a), (_, b) in zip(losses(tmp_path / "two"), losses(tmp_path / "whole"), strict=True):
        assert float(a) == pytest.approx(float(b), abs=1e-3)


def test_resume_takes_the_settings_from_the_checkpoint(train, tmp_path, shards, capsys):
    train(f"--log_dir={tmp_path / 'whole'}")
    train("--max_steps=6")
    (tmp_path / "log" / "model_00006.pt").unlink()
    train_gpt2.main([f"--log_dir={tmp_path / 'log'}", "--resume"])  # no other flag
    assert (tmp_path / "log" / "log.txt").read_bytes() == (tmp_path / "whole" / "log.txt").read_bytes()
    capsys.readouterr()
    train_gpt2.main([f"--log_dir={tmp_path / 'log'}", "--resume=True", "--max_steps=8"])
    assert [step for step, _ in losses(tmp_path / "log")] == list(range(8))


def record_batches(monkeypatch):
    tokens = []
    original = train_gpt2.DataLoaderLite.next_batch

    def next_batch(loader, *args):
        x, y = original(loader, *args)
        tokens.append(x.flatten())
        return x, y

    monkeypatch.setattr(train_gpt2.DataLoaderLite, "next_batch", next_batch)
    return tokens


def test_resume_with_another_micro_batch_reads_the_same_tokens(train, tmp_path, monkeypatch):
    train("--eval_interval=0")
    (tmp_path / "log" / "model_00006.pt").unlink()
    shutil.copytree(tmp_path / "log", tmp_path / "copy")
    tokens = record_batches(monkeypatch)
    train("--eval_interval=0", "--resume")
    same = torch.cat(tokens)[: 2 * 128]  # the next batch is read ahead
    tokens.clear()
    train("--eval_interval=0", "--resume", "--micro_batch_size=8", f"--log_dir={tmp_path / 'copy'}")
    assert torch.equal(torch.cat(tokens)[: 2 * 128], same)
    for a, b in zip(losses(tmp_path / "log"), losses(tmp_path / "copy"), strict=True):
        assert float(a[1]) == pytest.approx(float(b[1]), abs=1e-4)


def test_resume_applies_flags_and_changes_the_precision(train, tmp_path):
    train("--max_steps=2", "--weight_decay=0.1")
    train("--resume", "--max_steps=4", "--weight_decay=0.3", "--dtype=float16")
    checkpoint = torch.load(tmp_path / "log" / "model_00004.pt", weights_only=True)
    assert [group["weight_decay"] for group in checkpoint["optimizer"]["param_groups"]] == [0.3, 0.0]
    assert checkpoint["scaler"]["scale"] >= 1.0
    train("--resume", "--max_steps=6", "--dtype=bfloat16")
    assert [step for step, _ in losses(tmp_path / "log")] == list(range(6))


def test_a_folder_that_was_moved_resumes_where_it_is(train, tmp_path):
    train("--max_steps=2")
    (tmp_path / "log").rename(tmp_path / "moved")
    train_gpt2.main([f"--log_dir={tmp_path / 'moved'}", "--resume", "--max_steps=4"])
    assert [step for step, _ in losses(tmp_path / "moved")] == list(range(4))
    assert not (tmp_path / "log").exists()


def test_a_run_with_relative_paths_resumes_from_elsewhere(train, tmp_path, shards, monkeypatch):
    monkeypatch.chdir(shards.parent)
    train(f"--data={shards.name}", "--max_steps=2")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "log").rename(tmp_path / "elsewhere" / "log")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fineweb, "HERE", tmp_path / "elsewhere")  # the project with its log folder, moved
    train_gpt2.main(["--resume", "--max_steps=4"])
    assert [step for step, _ in losses(tmp_path / "elsewhere" / "log")] == list(range(4))
    assert not (tmp_path / "log").exists()


def test_a_fitted_micro_batch_is_not_remembered(tmp_path, shards):
    """Two processes had 4 sequences each, so 8 did not fit; one process that resumes has 8."""
    flags = [*[flag for flag in TINY if "micro_batch" not in flag], f"--data={shards}", f"--log_dir={tmp_path}"]
    run = run_script(*flags, "--max_steps=2", nproc=2)
    assert "\nstep: 128 tokens = 2 processes x 1 micro-steps x 4 sequences (B) x 16 tokens (T)\n" in run.stdout
    run = run_script(f"--log_dir={tmp_path}", "--resume", "--max_steps=3")
    assert "\nstep: 128 tokens = 1 process x 1 micro-steps x 8 sequences (B) x 16 tokens (T)\n" in run.stdout
    assert "\nresumed: 2 of 3 steps are done\n" in run.stdout


def test_going_on_after_the_last_step_keeps_its_evaluation(train, tmp_path):
    """It was made because the run ended there: the longer run does not make it again."""
    train("--max_steps=3", "--eval_interval=2")
    ended = read_log(tmp_path / "log")
    assert (3, "val") in [entry[:2] for entry in ended]
    train("--resume", "--max_steps=5")
    assert read_log(tmp_path / "log")[: len(ended)] == ended
    assert [entry[:2] for entry in read_log(tmp_path / "log")[len(ended) :]] == [
        *[(3, "train"), (4, "val"), (4, "train"), (5, "val")]
    ]


def test_resume_where_the_data_has_moved_names_the_flag(train, tmp_path, shards):
    data = tmp_path / "data"
    shutil.copytree(shards, data)
    train(f"--data={data}", "--max_steps=2")
    data.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=f"the data of this run, {data}, does not exist: name its place with --data"):
        train_gpt2.main(["--resume", f"--log_dir={tmp_path / 'log'}", "--max_steps=3"])
    train_gpt2.main(["--resume", f"--log_dir={tmp_path / 'log'}", "--max_steps=3", f"--data={tmp_path / 'moved'}"])


def test_the_start_says_how_many_validation_tokens_count(train):
    assert "\nvalidation: the first 200 of 251 tokens\n" in train("--max_steps=1")


def test_resume_on_two_processes(train, tmp_path, shards):
    train(f"--log_dir={tmp_path / 'whole'}")
    train()
    (tmp_path / "log" / "model_00006.pt").unlink()
    run = run_script(f"--log_dir={tmp_path / 'log'}", "--resume", nproc=2)
    assert run.returncode == 0, run.stderr
    for a, b in zip(read_log(tmp_path / "whole"), read_log(tmp_path / "log"), strict=True):
        assert a[:2] == b[:2]
        assert float(a[2]) == pytest.approx(float(b[2]), abs=2e-4)


def test_resume_with_nothing_to_resume_starts_from_scratch(train, tmp_path):
    out = train("--resume", "--max_steps=2")
    assert f"no checkpoint in {tmp_path / 'log'}: starting from scratch" in out
    assert "resumed: " not in out
    assert "this run is finished: a larger --max_steps than 2 continues it" in train("--resume", "--max_steps=2")
    assert [step for step, _ in losses(tmp_path / "log")] == [0, 1]
    assert "resumed: 2 of 3 steps are done" in train("--resume", "--max_steps=3")


def test_a_new_run_moves_the_earlier_one_aside(train, tmp_path):
    train("--max_steps=2")
    first = (tmp_path / "log" / "log.txt").read_bytes()
    for n in (1, 2):
        out = train("--max_steps=2", f"--seed={n}")
        assert f"earlier_{n}" in out
    shutil.copytree(tmp_path / "log" / "earlier_1", tmp_path / "log" / "kept")
    shutil.rmtree(tmp_path / "log" / "earlier_1")  # as the message allows
    assert "earlier_1" in train("--max_steps=2", "--seed=3")
    (tmp_path / "log" / "earlier_1").rename(tmp_path / "log" / "earlier_3")
    (tmp_path / "log" / "kept").rename(tmp_path / "log" / "earlier_1")
    assert (tmp_path / "log" / "earlier_1" / "log.txt").read_bytes() == first
    assert (tmp_path / "log" / "earlier_2" / "model_00002.pt").exists()
    assert len(losses(tmp_path / "log")) == 2


def test_a_new_run_does_not_move_the_weights_it_starts_from(train, tmp_path):
    train("--max_steps=2")
    before = names_in(tmp_path / "log")
    with pytest.raises(UserError, match="name another one for the new run"):
        train(f"--init_from={tmp_path / 'log' / 'model_00002.pt'}")
    assert names_in(tmp_path / "log") == before


def test_keep_checkpoints(train, tmp_path):
    train("--checkpoint_interval=1", "--keep_checkpoints=2")
    assert names_in(tmp_path / "log") == ["log.txt", "model_00005.pt", "model_00006.pt"]


def test_keep_checkpoints_counts_from_the_newest_good_one(train, tmp_path, monkeypatch):
    forward, calls = GPT.forward, []

    def poisoned(self, idx, targets=None):
        calls.append(1)
        logits, loss = forward(self, idx, targets)
        return logits, loss * float("nan") if len(calls) > 4 else loss  # from the second step on

    train()
    (tmp_path / "log" / "model_00006.pt").write_bytes(b"damaged")
    (tmp_path / "log" / "model_00004.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"step 3: loss nan, norm nan: lower --max_lr.*model_00003\.pt"):
        monkeypatch.setattr(GPT, "forward", poisoned)
        train("--resume", "--checkpoint_interval=1", "--keep_checkpoints=1", "--eval_interval=0")
    assert sorted(path.name for path in (tmp_path / "log").glob("*.pt")) == [
        f"model_{step:05d}.pt" for step in (3, 4, 6)
    ]
    assert train_gpt2.load_checkpoint(tmp_path / "log" / "model_00003.pt")["step"] == 3


def test_evaluation_comes_last_and_the_log_is_complete(train, tmp_path):
    train("--max_steps=5", "--checkpoint_interval=0")
    expected = [(step, kind) for step in range(5) for kind in (["val", "train"] if step % 2 == 0 else ["train"])]
    assert [(step, kind) for step, kind, _ in read_log(tmp_path / "log")] == [*expected, (5, "val")]
    assert names_in(tmp_path / "log") == ["log.txt", "model_00005.pt"]


# ----------------------------------------------------------------------------------------------------------------------
# Starting from weights


def test_max_steps_0_evaluates_and_samples_and_writes_nothing(train, tmp_path):
    train("--max_steps=2")
    before = [(path, path.stat().st_mtime_ns) for path in files_in(tmp_path / "log")]
    checkpoint = tmp_path / "log" / "model_00002.pt"
    out = train(f"--init_from={checkpoint}", "--max_steps=0", "--num_samples=3")
    assert f"validation loss: {losses(tmp_path / 'log', 'val')[-1][1]}" in out
    assert [line[:37] for line in out.splitlines() if line.startswith("sample ")] == [
        f"sample {i}: Hello, I'm a language model" for i in range(3)
    ]
    assert [(path, path.stat().st_mtime_ns) for path in files_in(tmp_path / "log")] == before


def test_with_a_prompt_and_no_steps_it_only_samples(train, tmp_path, monkeypatch):
    train("--max_steps=2")
    before = [(path, path.stat().st_mtime_ns) for path in files_in(tmp_path / "log")]
    monkeypatch.setattr(fineweb, "open_tokens", None)  # no data is opened
    monkeypatch.setattr(train_gpt2, "DataLoaderLite", None)
    monkeypatch.setattr(train_gpt2.hellaswag, "load_examples", None)
    common = ["--max_steps=0", "--prompt=Once upon a time", "--num_samples=3", "--hellaswag=official", "--data=nowhere"]
    for weights in (f"--init_from={tmp_path / 'log' / 'model_00002.pt'}", "--resume"):
        lines = train(weights, *common).splitlines()
        assert lines[0] == f"loading {tmp_path / 'log' / 'model_00002.pt'}"
        assert lines[1].startswith("sample 0: Once upon a time")
        assert sum(line.startswith("sample") for line in lines) == 3
        assert not any(word in "\n".join(lines) for word in ("train", "loss", "device", "Ctrl-C"))
    assert [(path, path.stat().st_mtime_ns) for path in files_in(tmp_path / "log")] == before


def test_sampling_alone_is_in_the_precision_of_the_run(train, monkeypatch):
    train("--max_steps=2")
    seen = []
    monkeypatch.setattr(nn.Linear, "forward", watch(nn.Linear.forward, seen))
    for dtype in (torch.bfloat16, torch.float32):
        seen.clear()
        train("--resume", "--max_steps=0", "--prompt=A", f"--dtype={str(dtype)[6:]}")
        assert (torch.bfloat16 in seen) == (dtype == torch.bfloat16)
        assert torch.float32 in seen  # the head's scores, always


def watch(forward, seen):
    def watched(self, x):
        out = forward(self, x)
        seen.append(out.dtype)
        return out

    return watched


@pytest.mark.parametrize(("name", "prompt"), [("input.txt", "ROMEO:\n"), ("own.txt", "\n"), ("copy/input.txt", "\n")])
def test_the_prompt_suits_the_text(tmp_path, monkeypatch, name, prompt):
    for path in (tmp_path / "input.txt", tmp_path / "own.txt", tmp_path / "copy" / "input.txt"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("A text. " * 100, encoding="utf-8")
    monkeypatch.setattr(fineweb, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    for data in (name, str(tmp_path / name)):
        settings = merge_settings({"data": data})
        assert (settings.prompt, settings.shuffle) == (prompt, True)
    assert merge_settings({"data": name, "prompt": "x", "shuffle": False}).prompt == "x"
    shards = merge_settings({"data": str(tmp_path)})
    assert (shards.prompt, shards.shuffle) == ("Hello, I'm a language model,", False)


def test_a_run_says_when_it_samples_and_how_to_sample_again(train, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = train("--prompt=O Romeo", "--max_steps=2", "--temperature=0.5", "--top_k=9", "--seed=7")
    assert "\nsamples before the first step:\nsample 0: O Romeo" in out
    assert "\nsamples after 2 steps:\nsample 0: O Romeo" in out
    command = out.splitlines()[-1].removeprefix("to sample from it: ")
    program, script, *flags = shlex.split(command)
    assert (program, Path(script)) == ("python", ROOT / "train_gpt2.py")
    own = ["--device=cpu", "--dtype=float32", "--num_samples=2", "--max_new_tokens=4"]
    own += ["--temperature=0.5", "--top_k=9", "--seed=7", "--prompt=O Romeo"]
    assert flags == ["--init_from=log/model_00002.pt", "--max_steps=0", *own]
    train_gpt2.main(flags)
    again = capsys.readouterr().out.splitlines()[1:]
    assert len(again) == 2
    assert out.split("samples after 2 steps:\n")[1].splitlines()[:2] == again


@pytest.mark.parametrize("prompt", ["ROMEO:\n", "\n", "It's $5\\ or `no`", "a \"b\"\n'c'\\n"])
def test_the_command_for_samples_has_the_very_prompt(tmp_path, monkeypatch, prompt):
    monkeypatch.chdir(tmp_path)
    command = train_gpt2.sampling_command(ROOT / "model_1.pt", replace(Settings(), prompt=prompt))
    words = command.replace("python ", "printf '%s|' ", 1)
    out = subprocess.run(["bash", "-c", words], capture_output=True, text=True, check=True, encoding="utf-8").stdout
    assert out.split("|")[1:] == [f"--init_from={ROOT / 'model_1.pt'}", "--max_steps=0", f"--prompt={prompt}", ""]
    long = train_gpt2.sampling_command("x.pt", replace(Settings(), prompt="A" * 1000, num_samples=0))
    assert "num_samples" not in long  # the run drew none
    assert long.endswith(" --prompt=- < FILE")


def test_training_starts_from_weights_only(train, tmp_path):
    train("--max_steps=2")
    train(f"--init_from={tmp_path / 'log' / 'model_00002.pt'}", f"--log_dir={tmp_path / 'second'}", "--max_steps=1")
    assert losses(tmp_path / "second", "val")[0] == (0, losses(tmp_path / "log", "val")[-1][1])
    model = GPT(GPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=8))
    save_pretrained(model, tmp_path / "folder")
    shape = [flag for flag in TINY if not flag.startswith("--n_")]
    data = [f"--data={tmp_path}", f"--log_dir={tmp_path / 'third'}"]
    write_shards(tmp_path, "train", [300])
    write_shards(tmp_path, "val", [300])
    train_gpt2.main([*shape, *data, f"--init_from={tmp_path / 'folder'}", "--max_steps=2"])
    checkpoint = torch.load(tmp_path / "third" / "model_00002.pt", weights_only=True)
    assert checkpoint["config"] == {"block_size": 16, "vocab_size": 50257, "n_layer": 1, "n_head": 2, "n_embd": 8}


def test_gpt2_comes_from_the_hub_cache(tmp_path, shards):
    """The real hub client, offline, on a cache laid out as it lays it out."""
    repo = tmp_path / "hub" / "models--openai-community--gpt2"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("607a30d783dfa663caf39e06633721c8d4cfcd7e")
    model = GPT(GPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=8))
    save_pretrained(model, repo / "snapshots" / "607a30d783dfa663caf39e06633721c8d4cfcd7e")
    flags = ["--init_from=gpt2", "--max_steps=0", f"--data={shards}", "--device=cpu", "--total_batch_size=16"]
    run = run_script(*flags, env={"HF_HOME": str(tmp_path)})
    assert run.returncode == 0, run.stderr
    assert "n_layer=1, n_head=2, n_embd=8" in run.stdout
    run = run_script(*flags, env={"HF_HOME": str(tmp_path / "empty")}, nproc=2)
    assert run.returncode == 1
    assert "train_gpt2.py: gpt2 cannot be loaded" in run.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Settings


def test_every_setting_is_a_flag_with_its_default_in_the_help():
    run = run_script("--help")
    assert run.returncode == 0
    for name, value in vars(Settings()).items():
        assert f"--{name}" in run.stdout
        assert value in (None, "") or f"[{value}]" in " ".join(run.stdout.split())


def test_the_recipe_is_the_default():
    recipe = vars(complete_settings(merge_settings({"data": "edu_fineweb10B", "log_dir": "log"}), 8))
    expected = {
        "model": "gpt2",
        "block_size": 1024,
        "vocab_size": 50304,
        "total_batch_size": 2**19,
        "micro_batch_size": 64,
        "max_lr": 6e-4,
        "min_lr": 0.1 * 6e-4,
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "max_steps": 19073,
        "warmup_steps": 715,
        "weight_decay": 0.1,
        "grad_clip": 1.0,
        "seed": 1337,
        "eval_interval": 250,
        "val_tokens": 20 * 2**19,
        "checkpoint_interval": 5000,
        "keep_checkpoints": 0,
        "data": "edu_fineweb10B",
        "log_dir": "log",
        "init_from": "scratch",
        "resume": False,
        "device": "auto",
        "dtype": "auto",
        "compile": "auto",
    }
    assert {name: recipe[name] for name in expected} == expected


def test_absent_default_data_means_input_txt_and_flags_still_override(tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb, "HERE", tmp_path)
    (tmp_path / "input.txt").write_text("words", encoding="utf-8")
    settings = merge_settings({"max_steps": 7})
    assert settings.data == str(tmp_path / "input.txt")
    assert (settings.max_steps, settings.total_batch_size, settings.model) == (7, 1024, "gpt2")
    (tmp_path / "edu_fineweb10B" / ".download").mkdir(parents=True)  # nothing could be downloaded
    assert merge_settings({}).data == str(tmp_path / "input.txt")
    (tmp_path / "edu_fineweb10B" / "edufineweb_val_000000.npy").touch()
    settings = merge_settings({"max_steps": 7})
    assert settings.data == str(tmp_path / "edu_fineweb10B")
    assert (settings.max_steps, settings.total_batch_size) == (7, 2**19)


def test_the_micro_batch_is_the_largest_that_divides_the_sequences_of_a_process():
    recipe = merge_settings({"data": str(ROOT / "tests")})
    assert (recipe.micro_batch_size, recipe.min_lr) == (None, None)
    for world_size, expected in {1: 64, 2: 64, 4: 64, 8: 64, 16: 32, 32: 16}.items():
        assert complete_settings(recipe, world_size).micro_batch_size == expected
    for given, expected in {1: 1, 3: 2, 5: 4, 48: 32, 64: 64, 100: 64, 300: 256, 1000: 512, 2**32: 512}.items():
        settings = merge_settings({"data": str(ROOT / "tests"), "micro_batch_size": given})
        assert complete_settings(settings, 1).micro_batch_size == expected  # of 512 sequences


@pytest.mark.parametrize(("given", "used"), [(3, 2), (100, 8)])
def test_a_micro_batch_that_does_not_divide_the_step_is_lowered_and_the_step_is_the_same(train, tmp_path, given, used):
    out = train(f"--micro_batch_size={given}", "--max_steps=1", f"--log_dir={tmp_path / 'given'}")
    size = f"{used} sequences (B) (not {given}: a process has 8 in a step) x 16 tokens (T)"
    assert f"step: 128 tokens = 1 process x {8 // used} micro-steps x {size}\n" in out
    assert "a process has" not in train(f"--micro_batch_size={used}", "--max_steps=1")
    assert (tmp_path / "given" / "log.txt").read_bytes() == (tmp_path / "log" / "log.txt").read_bytes()


@pytest.mark.parametrize(("flags", "expected"), [([], 0.1), (["--min_lr=0.02"], 0.02)])
def test_the_final_learning_rate_follows_a_new_peak_on_resume(train, tmp_path, flags, expected):
    """Unless a flag set it, then or now."""
    train("--max_steps=2", *flags)
    checkpoint = train_gpt2.newest_checkpoint(tmp_path / "log")
    assert complete_settings(merge_settings({"max_lr": 1.0}, checkpoint), 1).min_lr == expected
    assert complete_settings(merge_settings({"max_lr": 1.0, "min_lr": 0.5}, checkpoint), 1).min_lr == 0.5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--total_batch_size=1000"], "whole sequences for each process: use --total_batch_size=992"),
        (["--total_batch_size=10"], "whole sequences for each process: use --total_batch_size=16"),
        (["--micro_batch_size=0"], "--micro_batch_size=0"),
        (["--max_lr=nan"], "--max_lr=nan"),
        (["--vocab_size=50000"], "--vocab_size=50000"),
        (["--n_head=3"], "n_embd 32 is not a multiple of n_head 3"),
        (["--model=gpt3"], "argument --model: invalid choice: 'gpt3'.*gpt2.*gpt2-medium"),
        (["--dtype=int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--device=gpu"], "--device=gpu is not available"),
        (["--device=meta"], "--device=meta is not available"),
        (["--init_from=gpt5"], "gpt5 cannot be loaded; it must be scratch, one of gpt2, "),
        (["--init_from=distilgpt2"], "hf download distilgpt2 --local-dir=FOLDER makes one"),
        (["--data=nowhere"], "--data=.*nowhere must be a text file, or a folder that has .*_train_NNNNNN.npy"),
        (["--log_dir=/dev/null/log"], "--log_dir=/dev/null/log cannot be written"),
        (["--n_embd=1000000000", "--n_head=1"], "out of (GPU )?memory|too large"),
        (["--total_batch_size=4294967295"], "use --total_batch_size=4294967280"),
        (["--seed=18446744073709551616"], "--seed=18446744073709551616 is not allowed"),
    ],
)
def test_wrong_setting_is_refused_in_one_line(train, flags, message):
    with pytest.raises(UserError, match=message) as error:
        train(*flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--max_step=5", "unrecognized arguments: --max_step=5"),
        ("--out_dir=x", "unrecognized arguments: --out_dir=x (did you mean --log_dir?)"),
        ("--max-steps=5", "unrecognized arguments: --max-steps=5 (did you mean --max_steps or "),
        ("--zzz", "unrecognized arguments: --zzz (--help lists the flags)"),
        ("stray", "unrecognized arguments: stray"),
        ("--max_steps=many", "argument --max_steps: invalid int value: 'many'"),
        ("--resume=maybe", "argument --resume: invalid choice: 'maybe'"),
    ],
)
def test_wrong_flag_is_refused_in_one_line(flag, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        train_gpt2.main([flag])
    assert error.value.status == 2
    assert "\n" not in str(error.value)


def test_the_script_itself_ends_in_one_line_without_traceback(tmp_path):
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "x_train_000000.npy", np.zeros(10, dtype=np.uint16))
    for flags, status, message in [
        (["--lr=1"], 2, "train_gpt2.py: unrecognized arguments: --lr=1"),
        (["--n_layer=0"], 2, "train_gpt2.py: --n_layer=0 is not allowed"),
        ([*TINY, f"--data={tmp_path / 'data'}", f"--log_dir={tmp_path}"], 1, "train_gpt2.py: "),
    ]:
        run = run_script(*flags)
        assert run.returncode == status
        assert len(run.stderr.splitlines()) == 1
        assert run.stderr.startswith(message)
    assert "a folder that has *_val_NNNNNN.npy" in run.stderr
    run = run_script("--lr=1", nproc=2)
    assert run.returncode == 1  # torchrun's own
    assert run.stderr.count("unrecognized arguments: --lr=1") == 1  # rank 0 reports it for all


# ----------------------------------------------------------------------------------------------------------------------
# Faults


def test_a_damaged_checkpoint_is_not_called_the_last_one(train, tmp_path, monkeypatch):
    train()
    (tmp_path / "log" / "model_00006.pt").write_bytes(b"")
    monkeypatch.setattr(GPT, "forward", lambda model, idx, targets: (None, model.lm_head.weight.sum() * float("nan")))
    with pytest.raises(UserError, match=r"step 4: loss nan.*Last checkpoint: .*model_00004\.pt"):
        train("--resume", "--eval_interval=0")


def test_a_run_that_is_all_warm_up_says_so(train):
    note = "all steps are warm-up (--warmup_steps=9): the learning rate only rises"
    assert note in train("--warmup_steps=9", "--max_steps=2")
    assert "warm-up" not in train("--warmup_steps=1", "--max_steps=2")


def test_damaged_checkpoint_is_passed_over_for_the_previous_one(train, tmp_path):
    train(f"--log_dir={tmp_path / 'whole'}")
    train()
    path = tmp_path / "log" / "model_00006.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    out = train("--resume")
    assert f"warning: {path}" in out
    assert "model_00004.pt" in out
    assert (tmp_path / "log" / "log.txt").read_bytes() == (tmp_path / "whole" / "log.txt").read_bytes()
    for path in (tmp_path / "log").glob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint in .* can be read"):
        train("--resume")


class Evil:
    """Unpickling it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("save", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj))])
def test_checkpoint_with_a_pickled_object_is_refused(train, tmp_path, save):
    train("--max_steps=2")
    path = tmp_path / "log" / "model_00002.pt"
    checkpoint = torch.load(path, weights_only=True)
    save({**checkpoint, "extra": Evil(tmp_path / "owned")}, path)
    for flags in (["--resume"], [f"--init_from={path}", "--max_steps=0"]):
        with pytest.raises(UserError) as error:
            train(*flags)
        assert "\n" not in str(error.value)
    assert "pickled objects are refused" in str(error.value)
    assert not (tmp_path / "owned").exists()
    torch.load(path, weights_only=False) if save is torch.save else pickle.loads(path.read_bytes())
    assert (tmp_path / "owned").exists()  # unpickling it does write the file


def damage(key, value):
    def change(checkpoint):
        *parents, last = key.split(".")
        for parent in parents:
            checkpoint = checkpoint[int(parent) if parent.isdigit() else parent]
        checkpoint[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        *[damage("step", value) for value in ("4", None)],
        *[damage("settings", value) for value in ({"maximum_steps": 5}, [])],
        *[damage("config.n_layer", value) for value in ("2", -1, 3)],
        *[damage("optimizer", value) for value in (None, {}, {"state": {}, "param_groups": []})],
        *[damage("optimizer.state.0.exp_avg", value) for value in (torch.zeros(3), None, 5)],  # a segmentation fault
        # copy_ would take these two, and repeat them in every row
        *[damage("optimizer.state.0.exp_avg", torch.zeros(n)) for n in (1, 32)],
        damage("optimizer.state.27.exp_avg_sq", torch.zeros(33)),
        damage("optimizer.state.0.exp_avg", torch.zeros(50304, 32).to_sparse()),
        damage("optimizer.state.0.step", torch.zeros(3)),
        *[damage("rng", value) for value in (None, torch.zeros(3), "x")],
        *[damage("model", value) for value in (None, [], {1: 2}, {"transformer.wte.weight": torch.zeros(2, 2)})],
    ],
)
def test_checkpoint_with_wrong_content_ends_in_one_line(train, tmp_path, capsys, change):
    train("--max_steps=2")
    path = tmp_path / "log" / "model_00002.pt"
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)
    with pytest.raises(UserError) as error:
        train("--resume")
    assert "\n" not in str(error.value)
    assert "| loss " not in capsys.readouterr().out  # before the first step


def test_an_optimizer_tensor_that_is_stored_as_a_single_number_is_copied(train, tmp_path):
    """As it is, it would let AdamW write past its end."""
    train("--max_steps=2", "--grad_clip=0")
    path = tmp_path / "log" / "model_00002.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["optimizer"]["state"][0]["exp_avg"] = torch.ones(1).expand(50304, 32)
    torch.save(checkpoint, path)
    train("--resume", "--max_steps=3", "--keep_checkpoints=2")
    restored = torch.load(tmp_path / "log" / "model_00003.pt", weights_only=True)["optimizer"]["state"][0]["exp_avg"]
    assert restored.is_contiguous()
    assert restored.shape == (50304, 32)
    assert 0.8 < restored.mean() < 1  # 0.9 of it, and a tenth of the gradient


@pytest.mark.parametrize("evaluates", [0, 1])
def test_weights_that_are_not_finite_are_not_saved(train, tmp_path, monkeypatch, evaluates):
    adamw_step = torch.optim.AdamW.step

    def step(optimizer, *args, **kwargs):
        adamw_step(optimizer, *args, **kwargs)
        with torch.no_grad():
            optimizer.param_groups[0]["params"][-1][0, 0] = math.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(UserError, match=r"step 1: .* lower --max_lr.*Last checkpoint: none"):
        train("--checkpoint_interval=1", f"--eval_interval={evaluates}")
    assert names_in(tmp_path / "log") == ["log.txt"]


# The keys of a checkpoint of this script, with a valid config
GOOD = {
    "step": 0,
    "config": {"block_size": 8, "vocab_size": 50257, "n_layer": 1, "n_head": 1, "n_embd": 4},
    "settings": {},
    "data": {},
    "model": {},
    "optimizer": {},
    "scaler": {},
    "rng": torch.zeros(1),
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, r"model\.pt is not a checkpoint of this script: it has no step; it has the keys$"),
        ([1], r"model\.pt is not a checkpoint, but a list"),
        ({"model": 1, "epoch": 2}, r"model\.pt is not a checkpoint of this script: .* it has the keys model, epoch"),
        ({**GOOD, "config": {"a": 1}}, r"model\.pt cannot be loaded: block_size is None"),
        ({**GOOD, "model": {}}, r"the weights of .*model\.pt do not fit its config"),
        ({**GOOD, "model": {"transformer.wte.weight": 1}}, r"model\.pt has something else than weights in it"),
        ({**GOOD, "settings": {"steps": 3}}, "not a checkpoint of this script: it has the setting steps=3"),
        ({**GOOD, "settings": {"max_steps": "3"}}, "it has the setting max_steps=3"),
        ({**GOOD, "settings": {"max_steps": -3}}, "--max_steps=-3 is not allowed"),
        # as the lecture's, and as nanoGPT's
        ({"model": {}, "config": GPTConfig()}, "model.pt cannot be read as a checkpoint"),
        ({"model": {}, "model_args": {"n_layer": 1}}, r"model\.pt cannot be loaded: block_size is None"),
        ({"model": 5, "model_args": {"n_layer": 1}}, "it has the keys model, model_args"),
    ],
)
def test_foreign_checkpoint_is_refused(train, tmp_path, content, message):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(UserError, match=message) as error:
        train(f"--init_from={tmp_path / 'model.pt'}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--n_layer=3", "have n_layer 2, not 3"),
        ("--model=gpt2", "have n_layer 2, not 12"),
        ("--block_size=32", "have block_size 16, not 32"),
        ("--total_batch_size=256", "total_batch_size is 256.* but 128 in the checkpoint"),
        ("--max_steps=1", "the checkpoint .* has 2 steps, more than --max_steps=1"),
    ],
)
def test_resume_with_other_settings_than_the_checkpoint_is_refused(train, tmp_path, flag, message):
    train("--max_steps=2")
    before = [(path, path.read_bytes()) for path in files_in(tmp_path / "log")]
    with pytest.raises(UserError, match=message) as error:
        train_gpt2.main([f"--log_dir={tmp_path / 'log'}", "--resume", flag])
    assert "\n" not in str(error.value)
    assert [(path, path.read_bytes()) for path in files_in(tmp_path / "log")] == before


def test_more_processes_than_gpus_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert train_gpt2.pick_device("auto", 1, 4) == torch.device("cuda:1")
    with pytest.raises(UserError, match="cuda:2 is not available, only cuda:0, cuda:1, cpu: change .*--nproc_per_node"):
        train_gpt2.pick_device("auto", 2, 4)
    with pytest.raises(UserError, match="cuda:5 is not available"):
        train_gpt2.pick_device("cuda:5", 0, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the driver counts GPUs, but torch cannot use them
    assert train_gpt2.pick_device("auto").type in ("cpu", "mps")


def test_out_of_gpu_memory_names_the_next_smaller_micro_batch(train, monkeypatch):
    def forward(self, idx, targets=None):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.14 GiB.")

    monkeypatch.setattr(GPT, "forward", forward)
    remedies = {8: "--micro_batch_size=4", 2: "--micro_batch_size=1", 1: "a smaller --block_size"}
    for micro_batch, remedy in remedies.items():
        with pytest.raises(UserError, match=f"out of memory: use {remedy}"):
            train(f"--micro_batch_size={micro_batch}")


@pytest.mark.parametrize("dtype", ["float32", "float16"])  # in float16, an infinite norm alone would not stop it
def test_loss_that_is_not_finite_stops_before_the_step(train, tmp_path, monkeypatch, dtype):
    forward, calls = GPT.forward, []

    def poisoned(self, idx, targets=None):
        logits, loss = forward(self, idx, targets)
        calls.append(1)
        return logits, loss * float("nan") if len(calls) == 4 * 3 + 2 else loss  # in step 3, of 4 micro-steps

    monkeypatch.setattr(GPT, "forward", poisoned)
    with pytest.raises(UserError, match=r"step 3: loss nan.*Last checkpoint: .*model_00002\.pt") as error:
        train("--eval_interval=0", f"--dtype={dtype}")
    assert "\n" not in str(error.value)
    assert [step for step, _ in losses(tmp_path / "log")] == [0, 1, 2]
    assert names_in(tmp_path / "log") == ["log.txt", "model_00002.pt"]


@pytest.mark.parametrize(("failing", "kept"), [([4], [2, 6]), ([6], [2, 4]), ([4, 6], [2])])
def test_a_checkpoint_that_cannot_be_written_does_not_stop_training(train, tmp_path, monkeypatch, failing, kept):
    train(f"--log_dir={tmp_path / 'whole'}")
    real_save = torch.save

    def save(checkpoint, path):
        if checkpoint["step"] in failing:
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        real_save(checkpoint, path)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(UserError, match="the last checkpoint .*could not") if 6 in failing else nullcontext():
        train("--keep_checkpoints=2")
    names = ["log.txt", *(f"model_{step:05d}.pt" for step in kept)]
    assert names_in(tmp_path / "log") == names
    monkeypatch.undo()
    train("--resume", "--keep_checkpoints=2")
    assert (tmp_path / "log" / "log.txt").read_bytes() == (tmp_path / "whole" / "log.txt").read_bytes()


def in_step(monkeypatch, number, action):
    """Call action() in the middle of a step, after its gradient; number counts the steps of this process from 0."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def clip_grad_norm(*args, **kwargs):
        calls.append(1)
        if len(calls) == number + 1:
            action()
        return clip(*args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_grad_norm)


def test_a_log_that_cannot_be_written_warns_once_and_training_continues(train, tmp_path, monkeypatch, capsys):
    train(f"--log_dir={tmp_path / 'whole'}")
    open_log = train_gpt2.Run.open_log

    def open_full_log(*args):
        log = open_log(*args)
        in_step(monkeypatch, 3, lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), log.fileno()))
        return log

    with monkeypatch.context() as patch, pytest.raises(UserError, match="log line could not be written") as error:
        patch.setattr(train_gpt2.Run, "open_log", open_full_log)
        train()
    assert error.value.status == 1
    out = capsys.readouterr().out
    assert out.count("warning") == 1
    assert f"warning: {tmp_path / 'log' / 'log.txt'} could not be written (No space left on device)" in out
    assert out.count("validation loss: ") == 4
    last = [torch.load(tmp_path / name / "model_00006.pt", weights_only=True)["model"] for name in ("log", "whole")]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])
    assert read_log(tmp_path / "log") == [entry for entry in read_log(tmp_path / "whole") if entry[0] < 3]


def stop_in_step(number, signals, monkeypatch):
    """Send signals to this process in the middle of a step."""
    in_step(monkeypatch, number, lambda: [signal.raise_signal(each) for each in signals])


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("step", [0, 2, 3, 5])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(train, tmp_path, monkeypatch, number, step):
    train(f"--log_dir={tmp_path / 'whole'}")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        stop_in_step(step, [number], patch)
        train()
    assert end.value.code == 128 + number
    assert train_gpt2.newest_checkpoint(tmp_path / "log")["step"] == step + 1
    train("--resume")
    assert (tmp_path / "log" / "log.txt").read_bytes() == (tmp_path / "whole" / "log.txt").read_bytes()


def test_a_checkpoint_makes_a_folder_that_was_removed_under_the_run(train, tmp_path, monkeypatch):
    in_step(monkeypatch, 1, lambda: shutil.rmtree(tmp_path / "log"))
    out = train("--checkpoint_interval=3")
    assert "could not be written" not in out
    assert names_in(tmp_path / "log") == ["model_00003.pt", "model_00006.pt"]
    assert train_gpt2.load_checkpoint(tmp_path / "log" / "model_00006.pt")["step"] == 6


def test_a_world_without_ranks_is_refused(train, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="start with torchrun, or unset WORLD_SIZE"):
        train()


def test_a_second_interrupt_leaves_at_once(train, tmp_path, monkeypatch):
    stop_in_step(3, [signal.SIGINT, signal.SIGINT], monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train()
    assert names_in(tmp_path / "log") == ["log.txt", "model_00002.pt"]


def test_a_folder_that_another_run_writes_to_is_refused(train, tmp_path):
    train("--max_steps=2")
    before = [(path, path.read_bytes()) for path in files_in(tmp_path / "log")]
    with FileLock(tmp_path / "log" / ".lock"):
        for flags in ([], ["--resume"]):
            with pytest.raises(UserError, match="another run is writing to"):
                train(*flags)
        train(f"--init_from={tmp_path / 'log' / 'model_00002.pt'}", "--max_steps=0")  # writes nothing
    assert [(path, path.read_bytes()) for path in files_in(tmp_path / "log")] == before
    train("--resume")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_drive_without_locks_warns_and_trains(train, tmp_path, monkeypatch, number):
    def acquire(lock, timeout):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(FileLock, "acquire", acquire)
    out = train("--max_steps=2")
    assert f"warning: {tmp_path / 'log'} cannot be locked ({os.strerror(number)}): start no other run there" in out
    assert names_in(tmp_path / "log") == ["log.txt", "model_00002.pt"]


def test_a_prompt_from_a_closed_standard_input_is_refused(train, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="--prompt=- reads standard input, but that is closed"):
        train("--max_steps=0", "--prompt=-")


def test_a_tilde_after_the_equals_sign_is_the_home_folder(train, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # on Windows
    train("--max_steps=2", "--log_dir=~/runs")
    assert names_in(tmp_path / "runs") == ["log.txt", "model_00002.pt"]
    assert "sample 0: ~" in train("--init_from=~/runs/model_00002.pt", "--max_steps=0", "--prompt=~")  # no path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: np.save(folder / "tiny_train_000001.npy", np.ones(38, dtype=np.uint16)),
            "tiny_train_000001.npy is 38.* but 37 in the checkpoint",
        ),
        (
            lambda folder: (folder / "tiny_train_000001.npy").unlink(),
            "tiny_train_000001.npy is None.* but 37 in the checkpoint",
        ),
        (
            lambda folder: write_shards(folder, "train", [200, 37, 111, 5]),
            "tiny_train_000003.npy is 5.* but None in the checkpoint",
        ),
        (lambda folder: write_shards(folder, "val", [250]), "tiny_val_000000.npy is 250.* but 251 in the checkpoint"),
    ],
)
def test_resuming_over_other_data_is_refused(train, tmp_path, shards, change, message):
    data = f"--data={shutil.copytree(shards, tmp_path / 'data')}"
    train(data, "--max_steps=2")
    change(tmp_path / "data")
    before = [(path, path.read_bytes()) for path in files_in(tmp_path / "log")]
    with pytest.raises(UserError, match=message):
        train("--resume", data)
    assert [(path, path.read_bytes()) for path in files_in(tmp_path / "log")] == before
    train("--resume", f"--data={shards}")  # the same data in another folder will do


def test_every_flipped_bit_of_a_checkpoint_is_noticed_or_harmless(train, tmp_path):
    train("--max_steps=2", "--n_embd=2", "--n_layer=1")
    path = tmp_path / "log" / "model_00002.pt"
    good, content = torch.load(path, weights_only=True), path.read_bytes()
    rng, noticed = np.random.default_rng(0), 0
    for place in rng.integers(0, len(content), 60):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            checkpoint = train_gpt2.load_checkpoint(path)
        except UserError:
            noticed += 1
            continue
        assert all(torch.equal(checkpoint["model"][name], tensor) for name, tensor in good["model"].items())
        assert checkpoint["settings"] == good["settings"]
    assert noticed > 30


def test_float16_does_not_skip_steps_forever(train, monkeypatch):
    """Each skipped step halves the scaler's factor, 65,536 at first. Below 1, the factor is not the reason any more."""
    clip = torch.nn.utils.clip_grad_norm_

    def overflow(parameters, max_norm):
        return clip(parameters, max_norm) * math.inf

    def unscale(scaler, optimizer):
        state = scaler._per_optimizer_states[id(optimizer)]
        state["found_inf_per_device"] = {torch.device("cpu"): torch.tensor(1.0)}
        state["stage"] = torch.amp.grad_scaler.OptState.UNSCALED

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflow)
    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", unscale)
    with pytest.raises(UserError, match="step 17: loss .* norm inf"):
        train("--dtype=float16", "--max_steps=30", "--eval_interval=0", "--checkpoint_interval=0")


def test_no_path_needs_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = merge_settings({})
    assert settings.log_dir == str(ROOT / "log")
    assert settings.data in (str(ROOT / "input.txt"), str(ROOT / "edu_fineweb10B"))


def test_starting_a_run_removes_only_its_own_unfinished_files(train, tmp_path):
    (tmp_path / "log").mkdir()
    for name in ("notes.tmp", "model_00002.pt.tmp"):
        (tmp_path / "log" / name).write_text("text", encoding="utf-8")
    train("--max_steps=1", "--eval_interval=0")
    assert names_in(tmp_path / "log") == ["log.txt", "model_00001.pt", "notes.tmp"]


def test_the_learning_rate_follows_the_model():
    """With --init_from, too. A flag, and the settings for a text file, override it."""
    for name, max_lr in {"gpt2": 6e-4, "gpt2-medium": 3e-4, "gpt2-large": 2.5e-4, "gpt2-xl": 2e-4}.items():
        data = {"data": str(ROOT / "tests")}
        assert merge_settings({"model": name, **data}).max_lr == max_lr
        shape = {key: value for key, value in train_gpt2.MODELS[name].items() if key != "max_lr"}
        config = GPTConfig(**shape)  # of weights, whatever their name
        assert merge_settings({"init_from": "my_weights", **data}, config=config).max_lr == max_lr
        assert merge_settings({"model": name, "max_lr": 1e-5, **data}).max_lr == 1e-5
        assert merge_settings({"model": name, "data": str(ROOT / "input.txt")}).max_lr == max_lr / 2


def test_a_rank_without_a_world_is_ignored(train, tmp_path, monkeypatch):
    """Some batch systems set RANK: the one process there is still saves and logs."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert "checkpoint: " in train("--max_steps=1", "--eval_interval=0")
    assert names_in(tmp_path / "log") == ["log.txt", "model_00001.pt"]
    monkeypatch.setattr("time.sleep", None)  # rank 3 of a world would wait before it reports an error
    with pytest.raises(SystemExit):
        fineweb.run_main(lambda: train("--max_steps=x"))


def test_a_copy_of_a_checkpoint_with_a_name_of_its_own_is_left_alone(train, tmp_path):
    train("--max_steps=4")
    shutil.copy(tmp_path / "log" / "model_00002.pt", tmp_path / "log" / "model_00002_good.pt")
    assert [path.name for path in train_gpt2.list_checkpoints(tmp_path / "log")] == ["model_00002.pt", "model_00004.pt"]
    assert "model_00004.pt" in train("--resume", "--keep_checkpoints=1").splitlines()[0]
    assert names_in(tmp_path / "log") == ["log.txt", "model_00002_good.pt", "model_00006.pt"]
