"""What only a GPU can show. Skips itself without one.

    pytest -q -s tests/test_cuda.py     # about three minutes on one GPU; prints a table for tests/README.md

Times are medians of one process on one GPU, of steps after the first ones. Nothing fails for being slow.
"""

import functools
import gc
import statistics
import time

import pytest
import torch
from benchmark import WithTargets, timed, train_step
from conftest import ROOT, TINY, names_in, read_log, run_script

import hellaswag
import train_gpt2
from train_gpt2 import GPT, DataLoaderLite, GPTConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
B, T = 64, 1024
rows = []  # of the table


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    name = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    print(f"\n\n{name}\n\n| | |\n|---|---|\n" + "\n".join(f"| {what} | {value} |" for what, value in rows))


def losses(folder, kind):
    return [float(value) for _, name, value in read_log(folder) if name == kind]


@pytest.mark.parametrize(
    "flags", [["--dtype=float32"], ["--dtype=bfloat16"], ["--dtype=float16"], ["--dtype=bfloat16", "--compile=False"]]
)
def test_a_run_matches_the_cpu_and_resumes(train, tmp_path, flags):
    if "--dtype=bfloat16" in flags and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("no bfloat16 on this GPU")
    train(f"--log_dir={tmp_path / 'cpu'}", "--max_steps=20")
    gpu = [f"--log_dir={tmp_path / 'gpu'}", "--device=cuda", *flags]
    out = train(*gpu, "--max_steps=20")
    assert (", eager (not compiled)\n" if "--compile=False" in flags else ", compiled\n") in out
    assert out.count("sample 0: ") == 11
    tolerance = 0.01 if "--dtype=float32" in flags else 0.03  # TF32 rounds the inputs of matmuls
    for kind in ("train", "val"):
        assert losses(tmp_path / "gpu", kind) == pytest.approx(losses(tmp_path / "cpu", kind), abs=tolerance)
    before = losses(tmp_path / "gpu", "train")
    for name in names_in(tmp_path / "gpu"):
        if name > "model_00010.pt":
            (tmp_path / "gpu" / name).unlink()
    train(*gpu, "--max_steps=20", "--resume")
    assert losses(tmp_path / "gpu", "train") == pytest.approx(before, abs=1e-3)


def test_speed_and_memory_beside_transformers():
    """124M parameters, 64 x 1024 tokens, both compiled, in one process: ours, theirs, ours again."""
    from transformers import GPT2Config, GPT2LMHeadModel

    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs a GPU with 60 GB")
    device = torch.device("cuda")
    torch.set_float32_matmul_precision("high")
    dtype = train_gpt2.pick_dtype("auto", device)
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    results = []
    for name in ("ours", "transformers", "ours"):
        torch._dynamo.reset()
        gc.collect()  # the model before is part of cycles
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(1337)
        if name == "ours":
            model = GPT(GPTConfig(vocab_size=50304)).to(device)
        else:
            config = GPT2Config(attn_implementation="sdpa", **no_dropout)
            model = WithTargets(GPT2LMHeadModel(config)).to(device)
        step = functools.partial(
            train_step,
            torch.compile(model, dynamic=False),
            list(model.parameters()),
            GPT.configure_optimizers(model, 0.1, 6e-4),
            DataLoaderLite(B, T, 0, 1, "train", ROOT / "input.txt"),
            device,
            torch.autocast("cuda", dtype=dtype),
        )

        def step_and_wait(step=step):
            step()
            torch.cuda.synchronize()

        start = time.perf_counter()
        assert 10.5 < step() < 11.3
        first = time.perf_counter() - start
        timed(step_and_wait, 5)
        seconds = timed(step_and_wait, 20)
        results.append((name, B * T / seconds))
        rows.append((f"{name}: tokens/s, compiled, {str(dtype)[6:]}, {B} x {T}", f"{B * T / seconds:,.0f}"))
        rows.append((f"{name}: first step, with compilation", f"{first:.0f} s"))
        rows.append((f"{name}: peak memory", f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB"))
        del model, step, step_and_wait
    ours = statistics.mean(speed for name, speed in results if name == "ours")
    rows.append(("ours, times transformers", f"{ours / dict(results)['transformers']:.2f}"))


def test_hellaswag_and_samples():
    """Hundreds of lengths: with cuDNN's attention, each one would take 0.4 s more the first time."""
    device, dtype = torch.device("cuda"), train_gpt2.pick_dtype("auto", torch.device("cuda"))
    model = GPT(GPTConfig(vocab_size=50304)).to(device)
    text = (ROOT / "input.txt").read_text(encoding="utf-8").split()
    examples = [
        {
            "ctx": " ".join(text[i : i + 10 + i % 90]),
            "endings": [" ".join(text[j : j + 3 + j % 20]) for j in range(i, i + 4)],
            "label": 0,
        }
        for i in range(0, 2000, 2)
    ]
    examples = hellaswag.tokenize_examples(examples, 1024)
    with torch.autocast("cuda", dtype=dtype):
        start = time.perf_counter()
        on_gpu = hellaswag.ending_losses(model, examples, device).cpu()
        rows.append((f"HellaSwag, {len(examples)} examples", f"{time.perf_counter() - start:.1f} s"))
    on_cpu = hellaswag.ending_losses(model.cpu(), examples[:20], torch.device("cpu"))
    assert torch.allclose(on_gpu[:20], on_cpu, rtol=0.02)
    model.to(device)
    idx = torch.full((4, 8), 50256, device=device)
    generator = torch.Generator(device=device).manual_seed(1)
    start = time.perf_counter()
    with torch.autocast("cuda", dtype=dtype), hellaswag.attention_for_varying_lengths():
        idx = model.generate(idx, 100, generator=generator)
    assert idx.shape == (4, 108)
    assert idx.max() < 50257
    rows.append(("4 samples of 100 tokens", f"{time.perf_counter() - start:.1f} s"))


def test_the_loss_is_computed_in_float32(monkeypatch):
    """In eager mode: CUDA's autocast would leave it in the dtype of the logits."""
    cross_entropy, given = torch.nn.functional.cross_entropy, []

    def record(logits, *args, **kwargs):
        given.append(logits.dtype)
        return cross_entropy(logits, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", record)
    device = torch.device("cuda")
    model = GPT(GPTConfig(block_size=16, vocab_size=50304, n_layer=1, n_head=2, n_embd=32)).to(device)
    x, y = DataLoaderLite(2, 16, 0, 1, "train", ROOT / "input.txt").next_batch(device)
    autocast = torch.autocast("cuda", dtype=torch.bfloat16)
    with autocast:
        assert model(x)[0].dtype == torch.bfloat16
        assert model(x, y)[1].dtype == torch.float32
    train_gpt2.evaluate(model, DataLoaderLite(2, 16, 0, 1, "val", ROOT / "input.txt"), 100, device, autocast)
    assert set(given) == {torch.float32}
    assert len(given) > 3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("compile", ["True", "False"])
def test_two_gpus_train_like_one(tmp_path, shards, compile):
    flags = [*TINY, f"--data={shards}", "--device=cuda", f"--compile={compile}"]
    for name, nproc in (("one", None), ("two", 2)):
        run = run_script(*flags, f"--log_dir={tmp_path / name}", nproc=nproc)
        assert run.returncode == 0, run.stderr
    assert losses(tmp_path / "two", "train") == pytest.approx(losses(tmp_path / "one", "train"), abs=1e-3)
    assert losses(tmp_path / "two", "val") == pytest.approx(losses(tmp_path / "one", "val"), abs=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_recipes_speed_on_all_gpus(tmp_path):
    """The step of the reproduction's own command, without evaluation."""
    n = 2 ** (torch.cuda.device_count().bit_length() - 1)
    flags = [f"--data={ROOT / 'input.txt'}", "--block_size=1024", "--total_batch_size=524288", "--micro_batch_size=32"]
    flags += ["--max_steps=20", "--eval_interval=0", "--checkpoint_interval=0", f"--log_dir={tmp_path}"]
    run = run_script(*flags, nproc=n)
    assert run.returncode == 0, run.stderr
    speeds = [float(line.split("tok/s ")[1].split()[0]) for line in run.stdout.splitlines() if "tok/s" in line]
    rows.append((f"{n} GPUs: tokens/s of the recipe's step, micro-batch 32", f"{statistics.median(speeds[5:]):,.0f}"))
