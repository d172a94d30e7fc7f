"""HellaSwag: the fast evaluation predicts what a plain one-example-at-a-time loop predicts."""

import functools
import hashlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import ROOT, TINY, read_log, run_script
from torch.nn import functional as F

import fineweb
import hellaswag
import train_gpt2
from fineweb import UserError, gpt2_encoding
from train_gpt2 import GPT, GPTConfig, save_pretrained

CPU = torch.device("cpu")


def make_examples(count, seed=0):
    """Made-up examples of very different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "and",
        "then",
        "it",
        "went",
        "home",
        "because",
        "rain",
        "fell",
        "upon",
        "roofs",
        "of",
        "slate",
    ]

    def sentence(low, high):
        return " ".join(words[number(0, len(words))] for _ in range(number(low, high)))

    return [
        {"ctx": sentence(1, 60).capitalize(), "endings": [sentence(1, 20) for _ in range(4)], "label": number(0, 4)}
        for _ in range(count)
    ]


def write_examples(path, examples):
    path.write_text("".join(json.dumps({"ind": i, **e}) + "\n" for i, e in enumerate(examples)), encoding="utf-8")
    return path


def make_model(seed=0, block_size=128):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=50304, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)  # so that its predictions differ
    return model


@torch.no_grad()
def plain_losses(model, examples):
    """The summed loss of each ending, one row at a time: (M, 4); and the endings' lengths."""
    encoding = gpt2_encoding()
    sums, counts = [], []
    for example in examples:
        context = encoding.encode(example["ctx"])
        for text in example["endings"]:
            ending = encoding.encode(" " + text)
            row = torch.tensor([context + ending])
            losses = F.cross_entropy(model(row[:, :-1])[0][0], row[0, 1:], reduction="none")
            sums.append(losses[-len(ending) :].sum())
            counts.append(len(ending))
    return torch.stack(sums).view(-1, 4), torch.tensor(counts).view(-1, 4)


def test_losses_of_a_case_worked_by_hand():
    """A model whose logits are all 0 finds every token equally unlikely."""
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    example = {"ctx": "A man", "endings": ["sits down", "runs", "eats a pie.", "is"], "label": 3}
    examples = hellaswag.tokenize_examples([example], 128)
    ((label, rows),) = examples
    assert label == 3
    assert [n for _, n in rows] == [2, 1, 4, 1]
    assert [len(tokens) for tokens, _ in rows] == [4, 3, 6, 3]
    assert rows[0][0].tolist() == gpt2_encoding().encode("A man sits down")
    losses = hellaswag.ending_losses(model, examples, CPU)
    assert losses[0].tolist() == pytest.approx([n * math.log(50304) for n in (2, 1, 4, 1)])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_one_example_at_a_time(seed):
    made, model = make_examples(60, seed), make_model(seed)
    examples = hellaswag.tokenize_examples(made, 128)
    expected, counts = plain_losses(model, made)
    labels = torch.tensor([example["label"] for example in made])
    assert [[n for _, n in rows] for _, rows in examples] == counts.tolist()
    for batch_size in (1, 3, 32, 1000):  # batch size and order change nothing
        losses = hellaswag.ending_losses(model, examples, CPU, batch_size=batch_size)
        assert torch.allclose(losses, expected, rtol=1e-5, atol=1e-4)
        by_mean = ((expected / counts).argmin(1) == labels).sum()
        by_sum = (expected.argmin(1) == labels).sum()
        assert hellaswag.count_correct(losses, examples) == (by_mean, by_sum)


def test_any_number_of_processes_shares_the_work():
    model = make_model()
    examples = hellaswag.tokenize_examples(make_examples(7), 128)
    whole = hellaswag.ending_losses(model, examples, CPU, batch_size=3)
    for world_size in (1, 2, 5, 40):  # more than there are batches, too
        parts = [hellaswag.ending_losses(model, examples, CPU, rank, world_size, 3) for rank in range(world_size)]
        assert torch.equal(sum(parts), whole)


def test_rows_longer_than_the_context_keep_their_end():
    made, model = make_examples(20), make_model(block_size=12)
    losses = hellaswag.ending_losses(model, hellaswag.tokenize_examples(made, 12), CPU, batch_size=5)
    encoding = gpt2_encoding()
    for example, found in zip(made, losses, strict=True):
        for text, loss in zip(example["endings"], found, strict=True):
            ending = encoding.encode(" " + text)
            row = torch.tensor([(encoding.encode(example["ctx"]) + ending)[-13:]])
            expected = F.cross_entropy(model(row[:, :-1])[0][0], row[0, 1:], reduction="none")
            assert loss.item() == pytest.approx(expected[-len(ending) :].sum().item(), rel=1e-4)


@pytest.mark.parametrize("nproc", [None, 2])
def test_in_training_on_any_number_of_processes(tmp_path, shards, nproc):
    data = write_examples(tmp_path / "hella.jsonl", make_examples(30))
    flags = [*TINY, f"--data={shards}", f"--log_dir={tmp_path / 'log'}", f"--hellaswag={data}", "--max_steps=2"]
    run = run_script(*flags, nproc=nproc)
    assert run.returncode == 0, run.stderr
    examples = hellaswag.tokenize_examples(make_examples(30), 16)
    for step, where in ((0, None), (2, tmp_path / "log" / "model_00002.pt")):
        torch.manual_seed(1337)
        model = GPT(GPTConfig(block_size=16, vocab_size=50304, n_layer=2, n_head=2, n_embd=32))
        if where:
            model.load_state_dict(train_gpt2.load_checkpoint(where)["model"])
        correct, _ = hellaswag.count_correct(hellaswag.ending_losses(model, examples, CPU), examples)
        assert (step, "hella", f"{correct / 30:.4f}") in read_log(tmp_path / "log")
        assert f"HellaSwag accuracy: {correct}/30={correct / 30:.4f}" in run.stdout
    assert [entry[:2] for entry in read_log(tmp_path / "log")] == [
        *[(0, "val"), (0, "hella"), (0, "train"), (1, "train"), (2, "val"), (2, "hella")]
    ]


def test_training_is_unchanged_and_resumes_with_it(train, tmp_path):
    data = write_examples(tmp_path / "hella.jsonl", make_examples(10))
    train(f"--log_dir={tmp_path / 'off'}")
    train(f"--hellaswag={data}")
    whole = (tmp_path / "log" / "log.txt").read_bytes()
    losses = [entry for entry in read_log(tmp_path / "log") if entry[1] != "hella"]
    assert losses == read_log(tmp_path / "off")
    (tmp_path / "log" / "model_00006.pt").unlink()
    train_gpt2.main([f"--log_dir={tmp_path / 'log'}", "--resume"])
    assert (tmp_path / "log" / "log.txt").read_bytes() == whole


@pytest.mark.parametrize("nproc", [None, 2])
def test_unreachable_official_file_does_not_stop_training(tmp_path, shards, nproc):
    for name in ("train_gpt2.py", "fineweb.py", "hellaswag.py"):  # where the file was not downloaded before
        shutil.copy(ROOT / name, tmp_path)
    flags = [*TINY, f"--data={shards}", f"--log_dir={tmp_path / 'log'}", "--hellaswag=official", "--max_steps=1"]
    run = run_script(*flags, nproc=nproc, root=tmp_path, env={"https_proxy": "http://127.0.0.1:9"})  # a closed port
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Training continues without HellaSwag") == 1
    assert "hella" not in {kind for _, kind, _ in read_log(tmp_path / "log")}
    assert not list(tmp_path.glob("hellaswag/*.jsonl*"))


@pytest.fixture
def official(tmp_path, monkeypatch):
    """A server with a made-up official file in tmp_path, which is what gets downloaded to tmp_path/project."""
    write_examples(tmp_path / "hellaswag_val.jsonl", make_examples(5))
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *args: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    content = (tmp_path / "hellaswag_val.jsonl").read_bytes()
    monkeypatch.setattr(hellaswag, "OFFICIAL", f"http://127.0.0.1:{server.server_port}/hellaswag_val.jsonl")
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(fineweb, "HERE", tmp_path / "project")
    (tmp_path / "project").mkdir()
    timeout = socket.getdefaulttimeout()
    yield server
    socket.setdefaulttimeout(timeout)
    server.shutdown()
    server.server_close()
    thread.join()


def downloaded(project):
    return [path.name for path in (project / "hellaswag").iterdir() if path.suffix != ".lock"]


def test_official_file_is_downloaded_once(tmp_path, monkeypatch, official):
    examples = make_examples(5)
    assert hellaswag.load_examples("official") == examples
    official.shutdown()
    official.server_close()
    assert hellaswag.load_examples("official", limit=2) == examples[:2]
    assert downloaded(tmp_path / "project") == ["hellaswag_val.jsonl"]
    monkeypatch.setattr(fineweb, "HERE", tmp_path / "other")
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="could not be downloaded"):
        hellaswag.load_examples("official")
    assert downloaded(tmp_path / "other") == []


def test_a_file_that_is_there_needs_no_lock(tmp_path, monkeypatch):
    """The folder of the code may be read-only."""
    monkeypatch.setattr(fineweb, "HERE", tmp_path)
    (tmp_path / "hellaswag").mkdir()
    write_examples(tmp_path / "hellaswag" / "hellaswag_val.jsonl", make_examples(5))
    monkeypatch.setattr(hellaswag, "FileLock", None)
    assert hellaswag.load_examples("official") == make_examples(5)
    assert downloaded(tmp_path) == ["hellaswag_val.jsonl"]


def test_a_local_file_needs_no_home_folder(tmp_path):
    data = write_examples(tmp_path / "hella.jsonl", make_examples(5))
    code = f"import hellaswag; print(len(hellaswag.load_examples({str(data)!r})))"
    nowhere = {"HOME": "/dev/null/home", "HF_HOME": "/dev/null/home/cache"}
    environment = {**os.environ, **nowhere, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.stdout == "5\n", run.stderr


@pytest.mark.parametrize("damage", ["another file", "cut off"])
def test_official_file_with_another_hash_is_refused_and_not_kept(tmp_path, monkeypatch, official, damage):
    path = tmp_path / "hellaswag_val.jsonl"
    if damage == "another file":
        write_examples(path, make_examples(5, seed=1))
    else:
        content = path.read_bytes()
        path.write_bytes(content[: content.rindex(b"\n", 0, -1) + 1])  # what is left is whole lines
    with pytest.raises(UserError, match="could not be downloaded") as error:
        hellaswag.load_examples("official")
    assert "\n" not in str(error.value)
    assert downloaded(tmp_path / "project") == []
    write_examples(path, make_examples(5))
    assert hellaswag.load_examples("official") == make_examples(5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be used"),
        ("", "cannot be used: it is empty"),
        ("not json\n", "cannot be used"),
        ('{"ctx": "A"}\n', "cannot be used"),
        ('{"ctx": "A", "endings": ["a", "b", "c"], "label": 1}\n', "cannot be used"),
        ('{"ctx": "A", "endings": ["a", "b", "c", "d"], "label": 7}\n', "label from 0 to 3"),
        ('{"ctx": "A", "endings": ["a", "b", "c", "d"], "label": 1.5}\n', "label from 0 to 3"),
        ('{"ctx": "A", "endings": "abcd", "label": 1}\n', "cannot be used"),
        ('{"ctx": "A", "endings": [1, 2, 3, 4], "label": 1}\n', "cannot be used"),
        ('{"ctx": "A", "endings": ["a", "", "c", "d"], "label": 1}\n', "cannot be used"),
        ('{"ctx": null, "endings": ["a", "b", "c", "d"], "label": 1}\n', "cannot be used"),
    ],
)
def test_bad_local_file_is_refused_in_one_line(train, tmp_path, content, message):
    if content is not None:
        (tmp_path / "hella.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        train(f"--hellaswag={tmp_path / 'hella.jsonl'}", "--max_steps=1")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("limit", ["0", "-5"])
def test_a_limit_below_one_is_refused(limit):
    with pytest.raises(UserError, match="--limit must be at least 1") as error:
        hellaswag.main([f"--limit={limit}"])
    assert error.value.status == 2


def test_command_line(tmp_path, capsys):
    model, examples = make_model(), make_examples(12)
    save_pretrained(model, tmp_path / "model")
    data = write_examples(tmp_path / "hella.jsonl", examples)
    hellaswag.main(["-m", str(tmp_path / "model"), "-d", "cpu", f"--data={data}", "--limit=9", "--show=2"])
    out = capsys.readouterr().out
    small = GPT.from_pretrained(tmp_path / "model")
    losses, counts = plain_losses(small, examples[:9])
    labels = torch.tensor([example["label"] for example in examples[:9]])
    acc, acc_norm = [(values.argmin(1) == labels).float().mean().item() for values in (losses, losses / counts)]
    assert f"acc {acc:.4f}, acc_norm {acc_norm:.4f}, N = 9, completion style" in out
    assert out.count("Context: ") == 2
    assert f"(loss {(losses / counts)[1, 2].item():.4f}) {examples[1]['endings'][2]}" in out
