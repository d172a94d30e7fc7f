"""fineweb.py, with small files: the same bytes however it is run, interrupted and resumed."""

import contextlib
import errno
import hashlib
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pytest
from conftest import ROOT, TINY, edit_json, files_in, names_in, run_script, write_bin
from pyarrow import parquet

import fineweb
import train_gpt2
from fineweb import UserError, gpt2_encoding

SIZE = 10_000  # tokens in a shard


def make_documents(count, seed=0):
    rng = random.Random(seed)
    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    documents = []
    for _ in range(count):
        start, length = rng.randrange(len(text) - 2000), rng.choice([1, 20, 200, 2000])
        documents.append(text[start : start + length])
    documents[3] = "An <|endoftext|> inside is text. Café 東京 \U0001f600 \x00 \r\n"
    documents[5], documents[7] = "", None
    return documents


def write_hub_layout(folder, documents, files=3):
    """As HuggingFaceFW/fineweb-edu is laid out, with small row groups."""
    (folder / "sample" / "10BT").mkdir(parents=True)
    header = (
        "---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n---\n"
    )
    (folder / "README.md").write_text(header, encoding="utf-8")
    for i in range(files):
        part = documents[len(documents) * i // files : len(documents) * (i + 1) // files]
        table = pa.table({"text": pa.array(part, pa.string()), "id": [f"<urn:{i}:{j}>" for j in range(len(part))]})
        parquet.write_table(table, folder / "sample" / "10BT" / f"{i:03d}_00000.parquet", row_group_size=100)


def plain_tokens(documents):
    """An independent tokenization, a document at a time."""
    encoding, tokens = gpt2_encoding(), []
    for document in documents:
        if document:
            tokens += [encoding.eot_token, *encoding.encode_ordinary(document)]
    return np.array(tokens, dtype=np.uint16)


def read_shards(folder):
    """The folder's tokens end to end; checks names, sizes and types on the way."""
    paths = sorted(folder.glob("*.npy"), key=lambda path: path.stem[-6:])
    assert [path.name[:-11] for path in paths] == ["edufineweb_val"] + ["edufineweb_train"] * (len(paths) - 1)
    assert [int(path.stem[-6:]) for path in paths] == list(range(len(paths)))  # none is missing
    shards = [np.load(path, allow_pickle=False) for path in paths]
    assert all(shard.dtype == np.uint16 and shard.ndim == 1 for shard in shards)
    assert all(len(shard) == SIZE for shard in shards[:-1])
    assert 0 < len(shards[-1]) <= SIZE
    return np.concatenate(shards)


def read_bytes(folder):
    return {path.name: path.read_bytes() for path in files_in(folder) if path.name != "index.json"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "fineweb-edu"
    documents = make_documents(2500)
    write_hub_layout(folder, documents)
    return folder, documents


@pytest.fixture(scope="module")
def reference(hub, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference")
    fineweb.main([f"--dataset={hub[0]}", f"--out={out}", f"--shard_size={SIZE}", "--num_proc=1"])
    return out


def test_shards_are_the_documents_tokens(hub, reference):
    expected = plain_tokens(hub[1])
    assert np.array_equal(read_shards(reference), expected)
    index = json.loads((reference / "index.json").read_text(encoding="utf-8"))
    assert index["complete"]
    assert (index["documents"], index["skipped"], index["tokens"]) == (2498, 2, len(expected))
    assert sum(shard["tokens"] for shard in index["shards"]) == len(expected)
    assert len(read_bytes(reference)) == len(index["shards"]) == -(-len(expected) // SIZE)


@pytest.mark.parametrize("flags", [["--num_proc=2"], ["--num_proc=3", "--streaming"], ["--num_proc=1", "--streaming"]])
def test_shards_are_the_same_however_they_are_made(hub, reference, tmp_path, flags):
    fineweb.main([f"--dataset={hub[0]}", f"--out={tmp_path}", f"--shard_size={SIZE}", *flags])
    assert read_bytes(tmp_path) == read_bytes(reference)


def start(hub, out, *flags, limit=None):
    command = [sys.executable, str(ROOT / "fineweb.py"), f"--dataset={hub[0]}", f"--out={out}", f"--shard_size={SIZE}"]
    limits = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    return subprocess.Popen([*command, *flags], start_new_session=True, preexec_fn=limits, **pipes)  # noqa: PLW1509


@pytest.mark.parametrize("flags", [[], ["--pretokenized=1"]])
def test_a_folder_that_another_process_writes_to_is_refused(hub, tmp_path, flags):
    with fineweb.folder_locked(tmp_path, "out"):
        process = start(hub, tmp_path, *flags)
        assert process.communicate() == ("", f"fineweb.py: another run is writing to {tmp_path}: use another --out\n")
    assert process.returncode == 1
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("flags", [["--num_proc=2"], ["--num_proc=1", "--streaming"]])
def test_killed_at_random_moments_it_resumes_to_the_same_bytes(hub, reference, tmp_path, flags):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng, kills, total = random.Random(seed), 0, len(list(reference.glob("*.npy")))
    while kills < 3:
        process = start(hub, tmp_path, *flags)
        wanted = len(list(tmp_path.glob("*.npy"))) + rng.randrange(total // 4)
        while len(list(tmp_path.glob("*.npy"))) <= wanted and process.poll() is None:
            time.sleep(0.001)  # until some more shards are there
        process.kill()
        process.communicate()  # returns when the workers, which share the pipes, have ended too
        kills += 1
    process = start(hub, tmp_path, *flags)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "2,498 documents (2 empty or not text, skipped)" in out
    assert read_bytes(tmp_path) == read_bytes(reference)


def wait_for_a_shard(process, folder):
    while not list(folder.glob("*.npy")) and process.poll() is None:
        time.sleep(0.001)


@pytest.mark.parametrize("again", [False, True])
def test_interrupted_it_says_so_in_one_line(hub, reference, tmp_path, again):
    process = start(hub, tmp_path, "--num_proc=2")
    wait_for_a_shard(process, tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    while again and process.poll() is None:  # at any moment of its exit, too
        time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "fineweb.py: interrupted: run the same command again to continue"
    assert "Traceback" not in err
    done = {name: content for name, content in read_bytes(tmp_path).items() if name.endswith(".npy")}
    assert done.items() <= read_bytes(reference).items()


def test_a_killed_worker_ends_it_in_one_line(hub, tmp_path):
    process = start(hub, tmp_path, "--num_proc=1", "--streaming")  # 27 blocks
    wait_for_a_shard(process, tmp_path)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    commands = {int(child): Path(f"/proc/{child}/cmdline").read_text(encoding="utf-8") for child in children}
    (worker,) = [child for child, command in commands.items() if "spawn_main" in command]
    os.kill(worker, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.splitlines()[-1].startswith("fineweb.py: a worker was killed (out of memory?): ")
    assert "Traceback" not in err


def test_no_disk_space_leaves_finished_shards(hub, reference, tmp_path):
    process = start(hub, tmp_path, "--num_proc=1", "--streaming", limit=SIZE)  # a shard needs twice that
    _, err = process.communicate()
    assert process.returncode == 1
    assert "cannot be written (File too large)" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert names_in(tmp_path) == ["index.json"]


def test_finished_folder_is_left_as_it_is(hub, reference, capsys):
    before = {path: path.stat().st_mtime_ns for path in reference.iterdir()}
    fineweb.main([f"--dataset={hub[0]}", f"--out={reference}", f"--shard_size={SIZE}"])
    assert {path: path.stat().st_mtime_ns for path in reference.iterdir()} == before


def test_max_tokens_and_shuffle(hub, tmp_path):
    fineweb.main([f"--dataset={hub[0]}", f"--out={tmp_path / 'a'}", f"--shard_size={SIZE}", "--max_tokens=12345"])
    assert np.array_equal(read_shards(tmp_path / "a"), plain_tokens(hub[1])[:12345])
    fineweb.main([f"--dataset={hub[0]}", f"--out={tmp_path / 'b'}", f"--shard_size={SIZE}", "--shuffle=7"])
    order = np.random.default_rng(7).permutation(len(hub[1]))
    assert np.array_equal(read_shards(tmp_path / "b"), plain_tokens([hub[1][i] for i in order]))


def write_jsonl(path, documents):
    path.write_text("".join(json.dumps({"words": text}) + "\n" for text in documents), encoding="utf-8")


def write_texts(folder, documents):
    folder.mkdir()
    for i, text in enumerate(documents):
        (folder / f"{i:03d}.txt").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_own_files(tmp_path, streaming):
    documents = [text for text in make_documents(60) if text and "\r" not in text and text.strip()]
    write_jsonl(tmp_path / "a.jsonl", documents)
    write_texts(tmp_path / "texts", documents)
    parquet.write_table(pa.table({"text": documents}), tmp_path / "a.parquet")
    for dataset, flags in [("a.jsonl", ["--text_column=words"]), ("texts", []), ("a.parquet", [])]:
        out = tmp_path / f"out_{dataset}"
        flags = [*flags, *streaming, "--num_proc=1", f"--shard_size={SIZE}"]
        fineweb.main([f"--dataset={tmp_path / dataset}", f"--out={out}", *flags])
        assert np.array_equal(read_shards(out), plain_tokens(documents))


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text_column=body"], r"cannot be loaded: .*'body'.* in the dataset: \['text', 'id'\]"),
        (["--name=sample-99BT"], "cannot be loaded: .*sample-99BT"),
        (["--split=test"], "cannot be loaded: .*test"),
        (["--dataset=nobody/nothing"], "nobody/nothing cannot be loaded"),
        (["--dataset=EMPTY"], "has no .jsonl, .json, .parquet or .txt file"),
        (["--dataset=DAMAGED"], "cannot be (loaded|read): "),
    ],
)
def test_bad_data_set_is_refused_in_one_line(hub, tmp_path, flags, message, streaming):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    source = next(hub[0].glob("sample/10BT/*.parquet"))
    (tmp_path / "damaged" / "a.parquet").write_bytes(source.read_bytes()[:-3000])
    flags = [
        flag.replace("EMPTY", str(tmp_path / "empty")).replace("DAMAGED", str(tmp_path / "damaged")) for flag in flags
    ]
    with pytest.raises(UserError, match=message) as error:
        fineweb.main([f"--dataset={hub[0]}", f"--out={tmp_path / 'out'}", *flags, *streaming, "--num_proc=1"])
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("*.npy*"))


def test_other_settings_or_foreign_shards_are_not_mixed_in(hub, reference, tmp_path):
    before = read_bytes(reference)
    for flags, message in [
        (["--shard_size=20000"], f"--shard_size={SIZE}, not 20000: name another --out"),
        ([f"--shard_size={SIZE}", "--max_tokens=100"], "--max_tokens=None, not 100"),
        ([f"--shard_size={SIZE}", "--shuffle=1"], "--shuffle=None, not 1"),
    ]:
        with pytest.raises(UserError, match=message):
            fineweb.main([f"--dataset={hub[0]}", f"--out={reference}", *flags])
    assert read_bytes(reference) == before
    np.save(tmp_path / "someone_train_000000.npy", np.zeros(5, dtype=np.uint16))
    with pytest.raises(UserError, match=r"index\.json cannot be read \(name another --out\): .*No such file"):
        fineweb.main([f"--dataset={hub[0]}", f"--out={tmp_path}"])


def test_verify_names_the_changed_shards(reference, tmp_path, capsys):
    fineweb.main([f"--out={reference}", "--verify"])
    assert "43 shards, 427,371 tokens, complete: True" in capsys.readouterr().out
    for path in reference.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    changed = tmp_path / "edufineweb_train_000003.npy"
    content = bytearray(changed.read_bytes())
    content[-7] ^= 4
    changed.write_bytes(content)
    (tmp_path / "edufineweb_train_000005.npy").unlink()
    with pytest.raises(UserError, match=r"edufineweb_train_000003\.npy, edufineweb_train_000005\.npy"):
        fineweb.main([f"--out={tmp_path}", "--verify"])
    with pytest.raises(UserError, match=r"index\.json cannot be read .*No such file"):
        fineweb.main([f"--out={tmp_path / 'nowhere'}", "--verify"])


def test_a_lost_shard_and_a_foreign_index_are_named(hub, reference, tmp_path):
    shutil.copytree(reference, tmp_path / "out")
    (tmp_path / "out" / "edufineweb_train_000005.npy").unlink()
    settings = json.loads((reference / "index.json").read_text(encoding="utf-8"))["settings"]
    flags = [f"--dataset={hub[0]}", f"--shard_size={settings['shard_size']}", f"--out={tmp_path / 'out'}"]
    with pytest.raises(UserError, match=r"missing or changed shards: edufineweb_train_000005\.npy: copy"):
        fineweb.main(flags)
    for content in ("[]", "{}", "5", "null"):
        (tmp_path / "out" / "index.json").write_text(content, encoding="utf-8")
        for flag in ([], ["--verify"]):
            with pytest.raises(UserError, match=r"index\.json cannot be read"):
                fineweb.main([*flags, *flag])


def test_changed_data_is_not_mixed_in(hub, tmp_path):
    process = start(hub, tmp_path / "out", "--num_proc=1")
    wait_for_a_shard(process, tmp_path / "out")
    process.kill()
    process.communicate()
    index = json.loads((tmp_path / "out" / "index.json").read_text(encoding="utf-8"))
    name, (size, changed_at) = list(index["files"].items())[1]
    edit_json(tmp_path / "out" / "index.json", files={**index["files"], name: [size, changed_at - 1]})
    with pytest.raises(UserError, match="the data set has changed .*001_00000.parquet"):
        fineweb.main([f"--dataset={hub[0]}", f"--shard_size={SIZE}", f"--out={tmp_path / 'out'}", "--num_proc=1"])


CHANGES = {
    "001.txt": lambda path: path.write_text("TWO"),
    "002.txt": lambda path: path.write_text("three"),
    "000.txt": lambda path: path.unlink(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_data_is_refused_when_it_is_complete_too(tmp_path, name):
    flags = [f"--dataset={tmp_path / 'texts'}", f"--out={tmp_path / 'out'}", "--num_proc=1"]
    write_texts(tmp_path / "texts", ["one", "two"])
    fineweb.main(flags)
    fineweb.main(flags)
    before = read_bytes(tmp_path / "out")
    CHANGES[name](tmp_path / "texts" / name)
    with pytest.raises(UserError, match=rf"the data set has changed since .*{name}.*: name another --out"):
        fineweb.main(flags)
    shutil.rmtree(tmp_path / "texts")  # the shards are complete: the documents may go
    fineweb.main(flags)
    assert read_bytes(tmp_path / "out") == before


def test_an_index_of_the_version_before_counts_if_it_is_complete(hub, reference, tmp_path, capsys):
    shutil.copytree(reference, tmp_path / "out")
    path = tmp_path / "out" / "index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    del index["files"]
    index["settings"] |= {"pretokenized": None, "streaming": False}
    path.write_text(json.dumps({**index, "blocks": 3}), encoding="utf-8")
    flags = [f"--dataset={hub[0]}", f"--out={tmp_path / 'out'}", f"--shard_size={SIZE}"]
    for flag in ([], ["--verify"]):
        fineweb.main([*flags, *flag])
        assert "43 shards, 427,371 tokens, complete: True" in capsys.readouterr().out
    edit_json(path, complete=False)
    with pytest.raises(UserError, match="earlier version of this script: name another --out"):
        fineweb.main(flags)


def test_an_error_is_one_line_and_can_be_sent_between_processes():
    error = pickle.loads(pickle.dumps(UserError("two\n  lines", status=2)))
    assert (str(error), error.status) == ("two lines", 2)
    assert UserError("").status == 1


def test_documents_without_text_are_no_data(tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n{"text": null}\n', encoding="utf-8")
    with pytest.raises(UserError, match="no text in the column text: choose another --text_column"):
        fineweb.main([f"--dataset={tmp_path / 'empty.jsonl'}", f"--out={tmp_path / 'out'}", "--num_proc=1"])
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(UserError, match="cannot be loaded: .*JSON") as error:
        fineweb.main([f"--dataset={tmp_path / 'broken.jsonl'}", f"--out={tmp_path / 'other'}", "--num_proc=1"])
    assert "An error occurred while" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# What people bring


def run_fineweb(dataset, out, *flags):
    fineweb.main([f"--dataset={dataset}", f"--out={out}", "--num_proc=1", f"--shard_size={SIZE}", *flags])
    return read_shards(out)


def lines_of(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("flags", [[], ["--streaming"], ["--shuffle=3"]])
@pytest.mark.parametrize("kind", ["columns", "types", "parquet"])
def test_only_the_text_column_counts(tmp_path, kind, flags):
    documents = make_documents(20, seed=1)
    folder = tmp_path / "data"
    folder.mkdir()
    others = {
        "columns": [{}, {"source": {"url": "u", "n": 1}}],
        "types": [{"meta": None}, {"meta": {"k": [1, 2]}}],
        "parquet": [{"meta": 1}, {"meta": "x", "more": [1]}],
    }
    for name, other, part in zip("ab", others[kind], (documents[:10], documents[10:])):
        rows = [{"text": text, **other} for text in part]
        if kind == "parquet":
            parquet.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
        else:
            (folder / f"{name}.jsonl").write_bytes(lines_of(rows))
    order = np.random.default_rng(3).permutation(20) if flags == ["--shuffle=3"] else range(20)
    assert np.array_equal(run_fineweb(folder, tmp_path / "out", *flags), plain_tokens([documents[i] for i in order]))


def write_compressed(path, codec, content):
    """As several tools write large files: in two parts."""
    half = len(content) // 2
    compress = pa.Codec(codec).compress
    path.write_bytes(compress(content[:half], asbytes=True) + compress(content[half:], asbytes=True))


FORMS = {
    "readme": ("data", lambda p, c: ((p / "README.md").write_text("# my texts\n"), (p / "a.jsonl").write_bytes(c))),
    "hidden": ("data", lambda p, c: ((p / "._a.jsonl").write_bytes(bytes(99)), (p / "a.jsonl").write_bytes(c))),
    "sub-folder": ("data", lambda p, c: ((p / "x" / "y").mkdir(parents=True), (p / "x/y/a.jsonl").write_bytes(c))),
    "hidden folder": (
        "data",
        lambda p, c: ((p / ".x").mkdir(), (p / ".x/b.txt").touch(), (p / "a.json").write_bytes(c)),
    ),
    "brackets": ("data/b[1]", lambda p, c: (p.mkdir(), (p / "a.jsonl").write_bytes(c))),
    "ndjson": ("data/a.ndjson", lambda p, c: p.write_bytes(c)),
    "upper case": ("data/A.JSONL", lambda p, c: p.write_bytes(c)),
    "gz": ("data/a.jsonl.gz", lambda p, c: write_compressed(p, "gzip", c)),
    "zst": ("data/a.jsonl.zst", lambda p, c: write_compressed(p, "zstd", c)),
    "mark": ("data/a.jsonl", lambda p, c: p.write_bytes(b"\xef\xbb\xbf" + c)),
    "blank lines": ("data/a.jsonl", lambda p, c: p.write_bytes(c.replace(b"\n", b"\r\n \n\n"))),
    "no last newline": ("data/a.jsonl", lambda p, c: p.write_bytes(c[:-1])),
    "list": ("data/a.json", lambda p, c: p.write_bytes(b"\n[\n" + c[:-1].replace(b"\n", b",\n") + b"]\n")),
    "list with a mark": (
        "data/a.json",
        lambda p, c: p.write_bytes(b"\xef\xbb\xbf[" + c[:-1].replace(b"\n", b",") + b"]"),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_documents_in_another_form(tmp_path, form):
    documents = make_documents(20, seed=2)
    name, write = FORMS[form]
    (tmp_path / "data").mkdir()
    write(tmp_path / name, lines_of({"text": text} for text in documents))
    assert np.array_equal(run_fineweb(tmp_path / name, tmp_path / "out"), plain_tokens(documents))


@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize("flags", [[], ["--shuffle=3"]])
def test_a_folder_of_save_to_disk(tmp_path, splits, flags):
    import datasets

    documents = make_documents(20, seed=3)
    rows = datasets.Dataset.from_dict({"n": range(20), "text": documents})
    (datasets.DatasetDict({"train": rows}) if splits else rows).save_to_disk(tmp_path / "data")
    order = np.random.default_rng(3).permutation(20) if flags else range(20)
    tokens = run_fineweb(tmp_path / "data", tmp_path / "out", *flags)
    assert np.array_equal(tokens, plain_tokens([documents[i] for i in order]))


def test_a_copy_of_a_data_set_on_the_hub_has_names_and_splits(hub, tmp_path):
    """Its README.md says which files are what, and the others are not read."""
    shutil.copytree(hub[0], tmp_path / "hub")
    parquet.write_table(pa.table({"text": ["not this one"]}), tmp_path / "hub" / "test.parquet")
    assert np.array_equal(run_fineweb(tmp_path / "hub", tmp_path / "a"), plain_tokens(hub[1]))
    tokens = run_fineweb(tmp_path / "hub", tmp_path / "b", "--name=sample-10BT")
    assert np.array_equal(tokens, plain_tokens(hub[1]))


def test_shuffle_reads_a_changed_file_again(tmp_path):
    for i, text in enumerate(("one", "three")):
        (tmp_path / "a.jsonl").write_bytes(lines_of([{"text": text}]))
        assert np.array_equal(run_fineweb(tmp_path / "a.jsonl", tmp_path / str(i), "--shuffle=1"), plain_tokens([text]))


@pytest.mark.parametrize("rows", [1, 999, 1000, 2500])
def test_large_row_groups_are_cut(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(fineweb, "BLOCK_ROWS", rows)
    texts = [None if i % 7 == 0 else f"text {i}" for i in range(2500)]
    parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=2000)
    blocks = list(fineweb.find_blocks([str(tmp_path / "a.parquet")], "text"))
    assert len(blocks) == -(-2000 // rows) - (-500 // rows)
    step = 1 if rows > 1 else 50  # each is a read of its own
    for number in range(0, len(blocks), step):
        read, arguments = blocks[number]
        _, _, group, start = arguments
        first = 2000 * group + start
        assert read(*arguments) == texts[first : min(first + rows, 2000 + 500 * group)]


def test_blocks_of_lines_and_texts_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb, "BLOCK_BYTES", 2000)
    documents = make_documents(50, seed=4)
    (tmp_path / "a.jsonl").write_bytes(lines_of({"text": text} for text in documents))
    blocks = list(fineweb.find_blocks([str(tmp_path / "a.jsonl")], "text"))
    assert len(blocks) > 5
    assert [text for read, arguments in blocks for text in read(*arguments)] == documents
    documents = [text for text in documents if text and "\r" not in text]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(documents), encoding="utf-8")
    blocks = list(fineweb.find_blocks([str(tmp_path / "a.txt")], "text"))
    assert len(blocks) > 5
    assert [text for read, arguments in blocks for text in read(*arguments)] == documents


def test_the_marker_in_a_text_file_separates_documents(tmp_path):
    text = "One story.\n<|endoftext|>\nAnother one.\n<|endoftext|>\nThe end."
    (tmp_path / "stories.txt").write_text(text, encoding="utf-8-sig")
    tokens = gpt2_encoding().encode(text, allowed_special="all")
    assert run_fineweb(tmp_path / "stories.txt", tmp_path / "out").tolist() == [50256, *tokens]
    both = [fineweb.open_tokens(tmp_path / "stories.txt", split).tolist() for split in ("train", "val")]
    assert both[0] + both[1] == tokens
    (tmp_path / "page.jsonl").write_bytes(lines_of([{"text": text}]))
    assert run_fineweb(tmp_path / "page.jsonl", tmp_path / "other").tolist().count(50256) == 1


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    rows = [{"text": "a lone one \ud83d here"}, {"text": "plain \ud83d\ude00"}]
    (tmp_path / "a.jsonl").write_bytes(lines_of(rows))
    expected = plain_tokens(["a lone one \ufffd here", "plain \U0001f600"])
    assert np.array_equal(run_fineweb(tmp_path / "a.jsonl", tmp_path / "out"), expected)
    tokens = run_fineweb(tmp_path / "a.jsonl", tmp_path / "other", "--shuffle=0")
    assert sorted(tokens.tolist()) == sorted(expected.tolist())


@pytest.mark.parametrize("flags", [[], ["--shuffle=1"]])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n' * 200_000 + b'{"text": "cut\n', r"a\.jsonl .*line 200001 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n5\n', r"a\.jsonl .*line 2 is not a JSON object"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "\xff"}\n', r"a\.jsonl .*line 3 is not JSON \('utf-8'"),
        ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl .*--text_column 'text'.*\['body'\]"),
        ("a.json", b'[\n{"text": "x"},\n{"text" 5}\n]', r"a\.json .*line 3 is not JSON"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl .*line 1 is not JSON"),
        ("a.jsonl", b"", "a.jsonl (is empty: it has no documents|.*no data)"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00", r"a\.jsonl\.gz cannot be read"),
        ("a.txt", b"caf\xe9", r"a\.txt cannot be read: it is not UTF-8 .*save it as UTF-8"),
        ("a.txt", b"", "a.txt (is empty: it has no documents|.*no data)"),
        ("a.parquet", b"PAR1", r"a\.parquet cannot be read"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, message, flags):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        run_fineweb(tmp_path / name, tmp_path / "out", *flags)
    assert str(error.value).count("cannot be") <= 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset=nowhere/a.jsonl"], "nowhere/a.jsonl cannot be loaded: it does not exist"),
        (["--dataset=TEXTS", "--name=x"], "files of your own have no --name"),
        (["--dataset=TEXTS", "--split=test"], "files of your own have .*only the split train"),
        (["--dataset=MIXED"], r"several kinds of files \(JSON, text\): name one"),
    ],
)
def test_own_files_that_cannot_be_meant(tmp_path, flags, message):
    write_texts(tmp_path / "texts", ["a"])
    write_texts(tmp_path / "mixed", ["a"])
    (tmp_path / "mixed" / "a.json").touch()
    flags = [flag.replace("TEXTS", f"{tmp_path}/texts").replace("MIXED", f"{tmp_path}/mixed") for flag in flags]
    with pytest.raises(UserError, match=message):
        fineweb.main([*flags, f"--out={tmp_path / 'out'}"])


def test_shards_may_lie_beside_the_documents(tmp_path):
    documents = ["one", "two"]
    (tmp_path / "a.json").write_bytes(lines_of({"text": text} for text in documents))
    for _ in range(2):
        assert np.array_equal(run_fineweb(tmp_path, tmp_path), plain_tokens(documents))


@pytest.mark.parametrize("run", [" " * 1_200_000, "\n" * 1_200_000, "\u3000\n" * 600_000])
def test_a_million_blanks(tmp_path, run):
    (tmp_path / "a.jsonl").write_bytes(lines_of([{"text": f"start{run}end"}, {"text": f"start{run}"}]))
    tokens = run_fineweb(tmp_path / "a.jsonl", tmp_path / "out", "--max_tokens=2000")
    assert tokens[:2].tolist() == [50256, *gpt2_encoding().encode("start")]


# ----------------------------------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize(
    "flags", [["--shard_size=0"], ["--num_proc=-1"], ["--shuffle=1", "--streaming"], ["--shards=5"], ["--max_tokens=x"]]
)
def test_wrong_flag_is_refused_in_one_line(flags):
    with pytest.raises(UserError) as error:
        fineweb.main(flags)
    assert error.value.status == 2
    assert "\n" not in str(error.value)


def test_a_home_folder_after_an_equals_sign(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = fineweb.parse_flags(["--out=~/shards", "--dataset=~/a.txt"])
    assert (options.out, options.dataset) == (tmp_path / "shards", str(tmp_path / "a.txt"))
    assert fineweb.expand_home("a~b") == "a~b"


def test_the_name_is_for_the_default_data_set_alone():
    assert fineweb.parse_flags([]).name == "sample-10BT"
    assert fineweb.parse_flags(["--dataset=a/b"]).name is None
    assert fineweb.parse_flags(["--name=x"]).name == "x"


def test_windows_waits_for_61_processes_at_most(monkeypatch):
    assert fineweb.parse_flags(["--num_proc=100"]).num_proc == 100
    monkeypatch.setattr(sys, "platform", "win32")
    assert fineweb.parse_flags(["--num_proc=100"]).num_proc == 61


def test_help_says_what_separates_documents_and_how_much_disk_is_needed(capsys):
    with pytest.raises(SystemExit):
        fineweb.parse_flags(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "<|endoftext|> separates documents" in text
    assert "50 GB" in text


def test_prepared_folder_trains_and_so_do_llm_c_shards(reference, tmp_path):
    flags = [*TINY, "--max_steps=2"]
    train_gpt2.main([*flags, f"--data={reference}", f"--log_dir={tmp_path / 'npy'}"])
    (tmp_path / "bin").mkdir()
    for path in reference.glob("*.npy"):
        write_bin(tmp_path / "bin" / f"{path.stem}.bin", np.load(path))
    train_gpt2.main([*flags, f"--data={tmp_path / 'bin'}", f"--log_dir={tmp_path / 'log'}"])
    assert Path(tmp_path / "npy" / "log.txt").read_bytes() == Path(tmp_path / "log" / "log.txt").read_bytes()


# ----------------------------------------------------------------------------------------------------------------------
# Shards from the hub


COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """The part of the Hugging Face hub that serves the files of data sets: root has a folder for each of them."""

    def do_HEAD(self):
        self.answer(with_content=False)

    def do_GET(self):
        self.answer(with_content=True)

    def answer(self, with_content):
        self.server.requests.append((self.command, self.path))
        path = unquote(urlsplit(self.path).path)
        match = re.fullmatch(r"/(api/)?datasets/([^/]+/[^/]+)/?(resolve|revision|tree)?/?([^/]*)/?(.*)", path)
        if match is None or not (self.server.root / match[2]).is_dir():
            self.send_missing("RepoNotFound")
            return
        folder, kind, name = self.server.root / match[2], match[3], match[5]
        if kind == "resolve" and (folder / name).is_file():
            self.send_file(folder / name, with_content)
        elif kind == "tree" and (folder / name).is_dir():
            self.send_json([self.entry(file, folder) for file in sorted((folder / name).iterdir())])
        elif match[1] and kind in (None, "revision"):
            self.send_json({"id": match[2], "sha": COMMIT, "private": False, "tags": [], "siblings": []})
        else:
            self.send_missing("EntryNotFound")

    def send_missing(self, what):
        self.send_response(404)
        self.send_header("X-Error-Code", what)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def entry(self, file, folder):
        path = file.relative_to(folder).as_posix()
        if file.is_dir():
            return {"type": "directory", "path": path, "oid": COMMIT}
        return {"type": "file", "path": path, "oid": COMMIT, "size": file.stat().st_size}

    def send_json(self, value):
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def send_file(self, path, with_content):
        content = path.read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        start, _, end = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = content[int(start) : int(end or len(content)) + 1]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("Content-Range", f"bytes {start}-{int(start) + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if with_content:
            self.server.served.append(path.name)
            self.wfile.write(part)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub_server(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.root, server.served, server.requests = tmp_path / "hub", [], []
    server.root.mkdir()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def shard_hub(hub_server):
    folder = hub_server.root / fineweb.PRETOKENIZED
    folder.mkdir(parents=True)
    for i in range(4):
        name = f"finewebedu_{'train' if i else 'val'}_{i:06d}.bin"
        write_bin(folder / name, np.random.default_rng(i).integers(0, 50257, 1000 + i))
    hub_server.folder = folder
    return hub_server


def fetch(hub, out, count, port=None):
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{port or hub.server_port}", "HF_HUB_OFFLINE": "0"}
    return run_script(f"--pretokenized={count}", f"--out={out}", script="fineweb.py", env=environment)


def test_pretokenized_shards_are_fetched_once_and_train(shard_hub, tmp_path):
    out = tmp_path / "shards"
    run = fetch(shard_hub, out, 2)
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith(f"{out}: the validation shard and 2 training shards\n")
    first = ["finewebedu_train_000001.bin", "finewebedu_train_000002.bin", "finewebedu_val_000000.bin"]
    assert sorted(path.name for path in out.glob("*.bin")) == sorted(shard_hub.served) == first
    assert fetch(shard_hub, out, 3).returncode == 0
    assert shard_hub.served[3:] == ["finewebedu_train_000003.bin"]
    for name in shard_hub.served:
        assert (out / name).read_bytes() == (shard_hub.folder / name).read_bytes()
    loader = train_gpt2.DataLoaderLite(2, 8, 0, 1, "train", out)
    assert loader.shard_lengths == [1001, 1002, 1003]
    assert train_gpt2.DataLoaderLite(2, 8, 0, 1, "val", out).num_tokens == 1000


@pytest.mark.parametrize("damage", ["short", "token", "magic"])
def test_a_damaged_pretokenized_shard_does_not_count(shard_hub, tmp_path, damage):
    name, out = "finewebedu_train_000001.bin", tmp_path / "shards"
    good = (shard_hub.folder / name).read_bytes()
    bad = {"short": good[:-2], "token": good[:-2] + b"\xff\xff", "magic": b"\0" + good[1:]}
    (shard_hub.folder / name).write_bytes(bad[damage])
    run = fetch(shard_hub, out, 1)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith(f"fineweb.py: {name} could not be downloaded")
    assert "Traceback" not in run.stderr
    assert sorted(path.name for path in out.glob("*.bin")) == ["finewebedu_val_000000.bin"]
    (shard_hub.folder / name).write_bytes(good)
    assert fetch(shard_hub, out, 1).returncode == 0
    assert (out / name).read_bytes() == good
    assert shard_hub.served.count("finewebedu_val_000000.bin") == 1


def test_pretokenized_shards_that_cannot_be_had_end_in_one_line(shard_hub, tmp_path):
    for count, port, reason in [(4, None, "000004.bin"), (1, 9, "val_000000.bin")]:  # a closed port
        run = fetch(shard_hub, tmp_path / str(count), count, port)
        assert run.returncode == 1
        assert run.stderr.splitlines()[-1].startswith(
            f"fineweb.py: finewebedu_{'train_' if count == 4 else ''}{reason}"
        )
        assert "Traceback" not in run.stderr


def test_kinds_of_shards_are_not_mixed(shard_hub, tmp_path):
    (tmp_path / "edufineweb_val_000000.npy").touch()
    run = fetch(shard_hub, tmp_path, 1)
    assert run.returncode == 1
    assert "name another --out" in run.stderr
    write_bin(tmp_path / "bin_val_000000.bin", [1, 2])
    (tmp_path / "edufineweb_val_000000.npy").unlink()
    with pytest.raises(UserError, match="name another --out"):
        fineweb.main([f"--out={tmp_path}", f"--dataset={ROOT / 'input.txt'}"])
    for flags in (["--pretokenized=0"], ["--max_tokens=0"], ["--pretokenized=-1"]):
        with pytest.raises(UserError, match="must be at least 1"):
            fineweb.main(flags)


# ----------------------------------------------------------------------------------------------------------------------
# A data set from the hub, and a published run


def run_from_hub(server, out, *flags, **env):
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", **env}
    flags = [f"--out={out}", f"--shard_size={SIZE}", "--num_proc=1", *flags]
    return run_script(*flags, script="fineweb.py", env=environment)


@pytest.fixture
def fineweb_hub(hub, hub_server):
    """FineWeb-Edu, with the documents of `hub`."""
    shutil.copytree(hub[0], hub_server.root / fineweb.DATASET)
    return hub_server


PARQUET = [f"{i:03d}_00000.parquet" for i in range(3)]


def test_the_default_data_set_is_downloaded_once_and_read_in_place(fineweb_hub, reference, tmp_path):
    cache = {"HF_HOME": str(tmp_path / "cache")}
    run = run_from_hub(fineweb_hub, tmp_path / "a", **cache)
    assert run.returncode == 0, run.stderr
    assert read_bytes(tmp_path / "a") == read_bytes(reference)
    assert run.stdout.endswith(f"0 of 43 shards equal those of {fineweb.PUBLISHED}\n")
    assert not list((tmp_path / "cache").rglob("*.arrow"))  # no copy
    assert [name for name in fineweb_hub.served if name != "README.md"] == PARQUET
    assert run_from_hub(fineweb_hub, tmp_path / "b", **cache).returncode == 0
    assert [name for name in fineweb_hub.served if name != "README.md"] == PARQUET
    fineweb_hub.requests.clear()  # what is complete needs no network
    assert run_from_hub(fineweb_hub, tmp_path / "b", **cache).returncode == 0
    assert not [path for _, path in fineweb_hub.requests if "fineweb-edu" in path]


def test_what_began_with_one_commit_of_the_data_set_continues_with_it(fineweb_hub, reference, tmp_path):
    shutil.copytree(reference, tmp_path / "out")
    path = tmp_path / "out" / "index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    index["settings"] |= {"dataset": fineweb.DATASET, "name": "sample-10BT"}
    files = dict.fromkeys(f"hf://datasets/{fineweb.DATASET}@{'1' * 40}/sample/10BT/{name}" for name in PARQUET)
    for shard in index["shards"][1:]:
        (tmp_path / "out" / shard["name"]).unlink()
    shards = index["shards"][:1]
    start = {"complete": False, "tokens": SIZE, "documents": 0, "skipped": 0, "resume": resume_after_a_shard(reference)}
    path.write_text(json.dumps({**index, **start, "shards": shards, "files": files}), encoding="utf-8")
    run = run_from_hub(fineweb_hub, tmp_path / "out", HF_HOME=str(tmp_path / "cache"))
    assert run.returncode == 0, run.stderr
    assert read_bytes(tmp_path / "out") == read_bytes(reference)
    downloads = [path for command, path in fineweb_hub.requests if command == "GET" and path.endswith(".parquet")]
    assert len(downloads) == 3
    assert all("1" * 40 in path for path in downloads)


def resume_after_a_shard(reference):
    """Where the second shard of the reference begins: [block, token within it]; blocks are of 100 documents."""
    dataset = json.loads((reference / "index.json").read_text(encoding="utf-8"))["settings"]["dataset"]
    files = [str(path) for path in sorted(Path(dataset).glob("sample/10BT/*.parquet"))]
    count = 0
    for i, (read, arguments) in enumerate(fineweb.find_blocks(files, "text")):
        tokens, _ = fineweb.tokenize_documents(read(*arguments))
        if count + len(tokens) > SIZE:
            return [i, SIZE - count]
        count += len(tokens)
    return None


def test_streaming_keeps_nothing(fineweb_hub, reference, tmp_path):
    run = run_from_hub(fineweb_hub, tmp_path / "out", "--streaming", HF_HOME=str(tmp_path / "cache"))
    assert run.returncode == 0, run.stderr
    assert read_bytes(tmp_path / "out") == read_bytes(reference)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".parquet", ".arrow")]


@pytest.mark.parametrize(
    ("flags", "env", "message"),
    [
        ([], {"HF_HOME": "/dev/null/x"}, "/dev/null/x cannot be written .*: set HF_HOME to a folder"),
        (["--shuffle=1"], {"HF_HOME": "/dev/null/x"}, "/dev/null/x cannot be written .*: set HF_HOME to a folder"),
        (["--split=test"], {}, "no split test, only train"),
        (["--name=sample-99BT"], {}, "sample-99BT.* not found"),
        (["--dataset=nobody/nothing"], {}, "nobody/nothing cannot be loaded: .*doesn't exist on the Hub"),
        ([], {"HF_ENDPOINT": "http://127.0.0.1:9"}, "fineweb-edu cannot be loaded: "),
    ],
)
def test_what_the_hub_does_not_give_ends_in_one_line(fineweb_hub, tmp_path, flags, env, message):
    run = run_from_hub(fineweb_hub, tmp_path / "out", *flags, **{"HF_HOME": str(tmp_path / "cache"), **env})
    assert run.returncode == 1
    assert re.search(rf"^fineweb\.py: .*{message}", run.stderr.splitlines()[-1])
    assert "Traceback" not in run.stderr


def test_shards_are_compared_with_those_of_a_published_run(reference, tmp_path, monkeypatch, capsys):
    digests = fineweb.PUBLISHED_SHARDS.split()
    assert len(set(digests)) == 100
    assert all(re.fullmatch(r"[0-9a-f]{8}", digest) for digest in digests)
    shutil.copytree(reference, tmp_path / "npy")
    index = json.loads((reference / "index.json").read_text(encoding="utf-8"))
    names = [shard["name"] for shard in index["shards"]]
    digests = [hashlib.sha256((reference / name).read_bytes()).hexdigest()[:8] for name in names]
    (tmp_path / "bin").mkdir()
    for i, name in enumerate(names):
        write_bin(tmp_path / "bin" / f"finewebedu_{'train' if i else 'val'}_{i:06d}.bin", np.load(reference / name))
    (tmp_path / "bin" / "finewebedu_train_000002.bin").unlink()  # others keep their numbers
    swapped = [*digests[:5], digests[6], digests[5], *digests[7:]]  # the order counts
    for published, all_equal, some_equal in [(digests, 43, 42), (swapped, 41, 40)]:
        monkeypatch.setattr(fineweb, "PUBLISHED_SHARDS", " ".join(published))
        edit_json(tmp_path / "npy" / "index.json", settings={**index["settings"], "dataset": fineweb.DATASET})
        fineweb.main([f"--out={tmp_path / 'npy'}", "--verify"])
        assert f"{all_equal} of 43 shards equal those of rahulmeena/build-nanogpt" in capsys.readouterr().out
        fineweb.main([f"--out={tmp_path / 'bin'}", "--verify"])
        assert f"{some_equal} of 42 shards equal those of rahulmeena/build-nanogpt" in capsys.readouterr().out
    fineweb.main([f"--out={reference}", "--verify"])
    assert "equal" not in capsys.readouterr().out  # of other data


# ----------------------------------------------------------------------------------------------------------------------
# What all the scripts share


def test_an_error_of_a_library_becomes_its_first_sentence():
    class Wrapped(Exception):
        pass

    torch_says = (
        "Weights only load failed. This file can still be loaded, to do so you have two options, \x1b[1mdo those steps "
        "only if you trust the source\x1b[0m. \n\t(1) change `weights_only` to False.\n\tWeightsUnpickler error: "
        "Unsupported global: GLOBAL __main__.GPTConfig was not an allowed global by default. Please use "
        "`torch.serialization.add_safe_globals([GPTConfig])`."
    )
    hub_says = "404 Client Error. (Request ID: Root=1)\n\nRepository Not Found for url: http://x/y.\nPlease check"
    cause = ValueError("the cause")
    wrapped = Wrapped("An error occurred while generating the dataset")
    wrapped.__cause__ = cause
    for error, reason in [
        (ValueError(torch_says), "Unsupported global: GLOBAL __main__.GPTConfig was not an allowed global by default"),
        (OSError(hub_says), "Repository Not Found for url: http://x/y."),
        (OSError(2, "No such file", "a.b/c.npy"), "[Errno 2] No such file: 'a.b/c.npy'"),
        (ValueError("\x1b[31mred\x1b[0m\nmore"), "red"),
        (EOFError(), "EOFError"),
        (wrapped, "the cause"),
    ]:
        assert fineweb.reason_of(error) == reason


def test_a_real_message_of_torch_keeps_its_reason_alone(tmp_path):
    import torch

    torch.save({"path": Path("x")}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"^it is bad: Unsupported (global|operand)") as error:  # noqa: SIM117
        with fineweb.reported_as("it is bad"):
            torch.load(tmp_path / "a.pt", weights_only=True)
    assert "weights_only" not in str(error.value)
    assert "safe_globals" not in str(error.value)


def test_files_and_networks_are_reported_and_mistakes_in_the_program_are_not():
    class Special(Exception):
        pass

    for error in (OSError("x"), EOFError("x"), UnicodeDecodeError("utf-8", b"x", 0, 1, "x"), pa.ArrowInvalid("x")):
        with pytest.raises(UserError, match="^it is bad: "), fineweb.reported_as("it is bad"):
            raise error
    for error in (AttributeError("x"), NameError("x"), TypeError("x"), KeyError("x"), Special("x")):
        with pytest.raises(type(error)), fineweb.reported_as("it is bad"):
            raise error
    with pytest.raises(UserError, match="^it is bad: x$"), fineweb.reported_as("it is bad", Special):
        raise Special("x")
    with pytest.raises(UserError, match="^as it was$"), fineweb.reported_as("it is bad"):
        raise UserError("as it was")


@pytest.mark.parametrize("stdout", [None, io.StringIO()])
def test_a_main_runs_where_stdout_is_not_a_terminal(monkeypatch, stdout):
    monkeypatch.setattr(sys, "stdout", stdout)
    ran = []
    fineweb.run_main(lambda: ran.append(1))
    assert ran == [1]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_drive_that_cannot_sync_a_folder_is_good_enough(monkeypatch, tmp_path, number):
    fsync = os.fsync

    def fsync_of_files(descriptor):
        if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir():
            raise OSError(number, "as on some network drives")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_of_files)
    with pytest.raises(OSError, match="network") if number == errno.EIO else contextlib.nullcontext():
        fineweb.replace_file(tmp_path / "a", lambda path: path.write_text("x", encoding="utf-8"))
    assert (tmp_path / "a").read_text(encoding="utf-8") == "x"


# ----------------------------------------------------------------------------------------------------------------------
# Shards and text files, as they are read


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("names", "data", "split", "message"),
    [
        (
            ["a.jsonl"],
            "a.jsonl",
            "train",
            "has documents, .*python fineweb.py --dataset=DATA --out=a_shards.*--data=a_s",
        ),
        (["a.JSON.gz"], "a.JSON.gz", "val", "has documents, .*--out=a_shards"),
        (["x/a.parquet"], "x", "train", "has documents, .*--out=x_shards"),
        (["x/y/a.ndjson"], "x", "train", "has documents, .*--out=x_shards"),
        (["x/a.txt"], "x", "train", "has documents, .*--out=x_shards"),
        (["x/train.bin", "x/val.bin"], "x", "train", r"train\.bin cannot be used: .*nanoGPT's.*np\.save.*train_000000"),
        (["x/train.bin", "x/val.bin"], "x", "val", r"val\.bin cannot be used: .*nanoGPT's.*np\.save.*val_000000"),
        (["train.bin"], "train.bin", "train", r"train\.bin cannot be used: .*nanoGPT's.*np\.save"),
        (["x/e_val_000000.npy"], "x", "train", "validation shard alone: .*smaller --shard_size"),
        (
            ["x/e_train_000000.npy"],
            "x",
            "val",
            r"must be a text file, or a folder that has \*_val_NNNNNN.npy, but it has e",
        ),
        (["x/a", "x/b", "x/c", "x/d"], "x", "val", "but it has a, b, c, ...$"),
        (["x/.hidden"], "x", "val", "but it has nothing$"),
        (["x/index.json"], "x", "val", "but it has index.json$"),
        ([], "x", "val", "must be a text file, or a folder that has .*, but it does not exist$"),
        (
            ["e_val_000000.npy"],
            "e_val_000000.npy",
            "val",
            "must be a text file, or a folder .*, not a single .npy file$",
        ),
    ],
)
def test_where_there_are_no_shards_it_says_what_there_is(tmp_path, names, data, split, message):
    for name in names:
        put(tmp_path / name, b"\1\0\2\0" * 600)
    with pytest.raises(UserError, match=message.replace("DATA", str(tmp_path / data))) as error:
        fineweb.find_shards(str(tmp_path / data), split)
    assert "\n" not in str(error.value)


def test_the_line_that_converts_makes_a_shard(tmp_path):
    tokens = np.arange(1000, dtype=np.uint16)
    put(tmp_path / "train.bin", tokens.tobytes())
    with pytest.raises(UserError) as error:
        fineweb.find_shards(tmp_path, "train")
    _, _, command = str(error.value).partition(": python ")
    subprocess.run(f"{sys.executable} {command}", shell=True, check=True)
    (path,) = fineweb.find_shards(tmp_path, "train")
    assert np.array_equal(fineweb.open_tokens(path, "train"), tokens)
    (tmp_path / path.name).unlink()
    (tmp_path / "train.bin").rename(tmp_path / "x_train_000000.bin")  # where the name is that of a shard
    (path,) = fineweb.find_shards(tmp_path, "train")
    with pytest.raises(UserError, match=r"x_train_000000\.bin cannot be used as train data: .*np\.save"):
        fineweb.open_tokens(path, "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        ("Z\xfcrich".encode("latin-1"), "it is not UTF-8 .*: save it as UTF-8"),
        ("text".encode("utf-16"), "it is not UTF-8 .*: save it as UTF-8"),
    ],
)
def test_a_text_file_that_cannot_be_used_says_why(tmp_path, content, message):
    put(tmp_path / "a.txt", content)
    with pytest.raises(UserError, match=rf"a\.txt cannot be used as val data: {message}"):
        fineweb.open_tokens(tmp_path / "a.txt", "val")


def test_no_damage_to_a_header_goes_unnoticed(tmp_path):
    """Any byte of it changed: another kind of error from numpy each time, or an array of another shape."""
    path, tokens = tmp_path / "x_train_000000.npy", np.arange(50, dtype=np.uint16)
    np.save(path, tokens)
    good = path.read_bytes()
    for i in range(80):
        for value in (0, 1, 32, 39, 40, 48, 49, 50, 91, 98, 123, 125, 255):
            path.write_bytes(good[:i] + bytes([value]) + good[i + 1 :])
            with contextlib.suppress(UserError):
                assert np.array_equal(fineweb.open_tokens(path, "train"), tokens)


def test_without_assertions_it_refuses_the_same(tmp_path):
    np.save(tmp_path / "x_train_000000.npy", np.zeros(5))
    put(tmp_path / "x_train_000001.bin", bytes(2000))
    np.save(tmp_path / "x_train_000002.npy", np.array([[]], dtype=object), allow_pickle=True)
    code = "import sys, pathlib, fineweb; fineweb.open_tokens(pathlib.Path(sys.argv[1]), 'train')"
    for path in tmp_path.iterdir():
        run = subprocess.run(
            [sys.executable, "-O", "-c", code, path], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert f"UserError: {path} cannot be used as train data: " in run.stderr


def test_a_first_try_that_failed_does_not_stand_in_the_way(tmp_path):
    path, out = tmp_path / "texts.jsonl", tmp_path / "out"
    flags = [f"--dataset={path}", f"--out={out}", "--num_proc=1"]
    path.write_text('{"text": "one"}\n{"text": two\n', encoding="utf-8")
    with pytest.raises(UserError, match="line 2 is not JSON"):
        fineweb.main(flags)
    path.write_text('{"text": "one"}\n{"text": "two"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="no --text_column 'txt'"):
        fineweb.main([*flags, "--text_column=txt"])
    fineweb.main(flags)
    assert np.load(out / "edufineweb_val_000000.npy").tolist() == plain_tokens(["one", "two"]).tolist()
