"""fineweb.py, with `datasets` reading small files: the same bytes however it is run, interrupted and resumed."""

import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import ROOT, TINY, run_script, write_bin
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
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "index.json"}


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
    assert [path.name for path in tmp_path.iterdir()] == ["index.json"]


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
    (tmp_path / "out" / "index.json").write_text(json.dumps({**index, "blocks": 4}), encoding="utf-8")
    with pytest.raises(UserError, match="the data set has changed"):
        fineweb.main([f"--dataset={hub[0]}", f"--shard_size={SIZE}", f"--out={tmp_path / 'out'}", "--num_proc=1"])


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


@pytest.mark.parametrize(
    "flags", [["--shard_size=0"], ["--num_proc=-1"], ["--shuffle=1", "--streaming"], ["--shards=5"], ["--max_tokens=x"]]
)
def test_wrong_flag_is_refused_in_one_line(flags):
    with pytest.raises(UserError) as error:
        fineweb.main(flags)
    assert error.value.status == 2
    assert "\n" not in str(error.value)


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


class Hub(BaseHTTPRequestHandler):
    """The part of the Hugging Face hub that serves the files of a data set, from the folder `root`."""

    def do_HEAD(self):
        prefix = f"/datasets/{fineweb.PRETOKENIZED}/resolve/main/"
        path = self.server.root / self.path.removeprefix(prefix)
        if not (self.path.startswith(prefix) and path.is_file()):
            self.send_error(404)
            return None
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return content

    def do_GET(self):
        content = self.do_HEAD()
        if content is not None:
            self.server.served.append(Path(self.path).name)
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def shard_hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.root, server.served = tmp_path / "hub", []
    server.root.mkdir()
    for i in range(4):
        name = f"finewebedu_{'train' if i else 'val'}_{i:06d}.bin"
        write_bin(server.root / name, np.random.default_rng(i).integers(0, 50257, 1000 + i))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


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
        assert (out / name).read_bytes() == (shard_hub.root / name).read_bytes()
    loader = train_gpt2.DataLoaderLite(2, 8, 0, 1, "train", out)
    assert list(loader.contents.values()) == [1001, 1002, 1003]
    assert train_gpt2.DataLoaderLite(2, 8, 0, 1, "val", out).num_tokens == 1000


@pytest.mark.parametrize("damage", ["short", "token", "magic"])
def test_a_damaged_pretokenized_shard_does_not_count(shard_hub, tmp_path, damage):
    name, out = "finewebedu_train_000001.bin", tmp_path / "shards"
    good = (shard_hub.root / name).read_bytes()
    bad = {"short": good[:-2], "token": good[:-2] + b"\xff\xff", "magic": b"\0" + good[1:]}
    (shard_hub.root / name).write_bytes(bad[damage])
    run = fetch(shard_hub, out, 1)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith(f"fineweb.py: {name} could not be downloaded")
    assert "Traceback" not in run.stderr
    assert sorted(path.name for path in out.glob("*.bin")) == ["finewebedu_val_000000.bin"]
    (shard_hub.root / name).write_bytes(good)
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
