"""Faults, for real: processes that are killed, disks that are full, files that are damaged, servers that do not answer.

    pytest -m slow tests/test_faults.py

Where a fault comes at a random moment, FAULT_SEED=N in the environment repeats it; a failing test prints its seed.
However it was disturbed, a run that is resumed must end with the log of one that was left alone, byte for byte.
"""

import functools
import json
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, names_in, read_log

import train_gpt2

pytestmark = pytest.mark.slow

STEPS, SAVES = 200, 20  # steps, and steps between checkpoints
FLAGS = [
    *TINY,
    *("--n_layer=1", "--n_embd=4", "--block_size=4", "--total_batch_size=8", "--micro_batch_size=1"),
    *(f"--max_steps={STEPS}", f"--checkpoint_interval={SAVES}", "--eval_interval=50", "--val_tokens=50"),
    *("--num_samples=1", "--max_new_tokens=2"),
]
# A run that nobody reads from stops when its output fills the pipe (4 KiB) and the reader's buffer (8 KiB): it is never
# more than this many steps ahead of the line that was read last.
AHEAD = 130
SEED = int(os.environ.get("FAULT_SEED") or random.SystemRandom().randrange(2**32))


@pytest.fixture
def rng(request):
    """The random numbers of one test, whatever ran before it."""
    print(f"FAULT_SEED={SEED}")
    return random.Random(f"{SEED} {request.node.name}")


# ----------------------------------------------------------------------------------------------------------------------
# Processes


def processes_of(mark):
    """The processes that a launch() started, and those that they started: {pid: environment}. Zombies have none."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            content = (folder / "environ").read_bytes().decode(errors="replace")
            if f"FAULT_MARK={mark}\0" in content:
                found[int(folder.name)] = dict(entry.partition("=")[::2] for entry in content.split("\0") if entry)
    return found


def kill(mark):
    """Kill all processes of a launch(), until none is left: one may just be starting another."""
    while pids := processes_of(mark):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def end(process):
    process.watchdog.cancel()
    kill(process.mark)
    process.wait()
    process.stdout.close()


def start(folder, *flags, script=None, torchrun=None, env=None, limit=100):
    """Start the script, or a wrapper of it, with its output in a small pipe. torchrun: the flags of that.

    After `limit` seconds it is killed, so that whoever reads its output reads an end.
    """
    mark = f"{folder.name}-{random.SystemRandom().randrange(2**64)}"
    command = [sys.executable, str(script or ROOT / "train_gpt2.py"), *flags]
    if torchrun is not None:
        command[1:1] = ["-m", "torch.distributed.run", *torchrun]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FAULT_MARK": mark, **(env or {})}
    errors = folder / f"{mark}.stderr"
    with open(errors, "w", encoding="utf-8") as file:
        options = {"stdout": subprocess.PIPE, "stderr": file, "text": True, "encoding": "utf-8", "pipesize": 4096}
        process = subprocess.Popen(command, env=environment, **options)
    process.mark, process.errors = mark, errors
    process.watchdog = threading.Timer(limit, kill, [mark])
    process.watchdog.start()
    return process


@pytest.fixture
def launch(tmp_path, shards):
    """launch(*flags) starts the tiny run in tmp_path/log; with the test, all that it started ends."""
    running = []

    def begin(*flags, **options):
        defaults = [*FLAGS, f"--data={shards}", f"--log_dir={tmp_path / 'log'}"]
        running.append(start(tmp_path, *defaults, *flags, **options))
        return running[-1]

    yield begin
    for process in running:
        end(process)


def read_until(process, pattern):
    """Read the output up to the first line that matches."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return "".join(lines)
    raise AssertionError(f"no {pattern} in the output:\n{''.join(lines)}{process.errors.read_text()}")


def finish(process):
    """Wait until every process that could write to the output has gone: (exit status, rest of the output, stderr)."""
    out = process.stdout.read()
    return process.wait(), out, process.errors.read_text(encoding="utf-8")


def strike(process, rng, number):
    """Send the signal some milliseconds after a random step."""
    step = rng.randint(SAVES + 1, STEPS - AHEAD)
    read_until(process, rf"^step +{step} ")
    time.sleep(0.03 * rng.random())  # to strike between two lines, too
    process.send_signal(number)
    print(f"{number.name} after step {step}")


def wrapper(folder, text):
    """A script that changes something, then is train_gpt2.py."""
    path = folder / f"wrapper_{len(list(folder.glob('wrapper_*')))}.py"
    lines = [
        "import os, resource, signal, sys",
        f"sys.path.insert(0, {str(ROOT)!r})",
        "import torch, fineweb, hellaswag, train_gpt2",
        "sys.argv[0] = 'train_gpt2.py'  # the name in error messages",
        "def before(call, module, name, fault):",
        "    function, calls = getattr(module, name), []",
        "    def changed(*args, **kwargs):",
        "        calls.append(1)",
        "        if len(calls) == call:",
        "            fault(*args)",
        "        return function(*args, **kwargs)",
        "    setattr(module, name, changed)",
        *text.splitlines(),
        "if __name__ == '__main__':",
        "    fineweb.run_main(train_gpt2.main, interrupted='')",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, shards):
    """undisturbed(), undisturbed(2): the log folder of a whole run, on one process or two. Each is computed once."""

    @functools.cache
    def whole(nproc=None, steps=STEPS):
        folder = tmp_path_factory.mktemp("undisturbed")
        torchrun = ["--standalone", f"--nproc_per_node={nproc}"] if nproc else None
        flags = [*FLAGS, f"--max_steps={steps}", f"--data={shards}", f"--log_dir={folder / 'log'}"]
        process = start(folder, *flags, torchrun=torchrun)
        try:
            status, _, errors = finish(process)
        finally:
            end(process)
        assert status == 0, errors
        assert [step for step, kind, _ in read_log(folder / "log") if kind == "train"] == list(range(steps))
        return folder / "log"

    return whole


def assert_unharmed(folder, whole):
    """The same log, thus each step once; the last checkpoint; and nothing half-written."""
    assert (folder / "log.txt").read_bytes() == (whole / "log.txt").read_bytes()
    last = [train_gpt2.load_checkpoint(train_gpt2.list_checkpoints(place)[-1]) for place in (folder, whole)]
    assert last[0]["step"] == last[1]["step"]
    assert all(torch.equal(last[0]["model"][name], tensor) for name, tensor in last[1]["model"].items())
    assert list(folder.glob("*.tmp")) == []


def assert_resumes(launch, folder, whole, *flags, **options):
    status, out, errors = finish(launch("--resume", *flags, **options))
    assert status == 0, errors
    assert_unharmed(folder, whole)
    return out


def last_step(folder):
    return max(step for step, kind, _ in read_log(folder) if kind == "train")


def newest(folder):
    """The number of steps in the newest checkpoint."""
    return train_gpt2.load_checkpoint(train_gpt2.list_checkpoints(folder)[-1])["step"]


TWO = ("--standalone", "--nproc_per_node=2")
# torchrun keeps one key-value store for all restarts of its workers. What a killed group has left in it (in torch 2.13,
# the addresses of gloo and NCCL) can mislead a new one. With this, each new group has a store of its own.
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
HEARTBEAT = "keep_alive_interval=1,keep_alive_max_attempt=3"  # torchrun's, in seconds: by default it notices after 15


# ----------------------------------------------------------------------------------------------------------------------
# Killed


def test_killed_while_it_writes_a_checkpoint(launch, tmp_path, undisturbed, rng):
    """The half-written file has a temporary name, and the next run removes it."""
    fault = f"""
def die(checkpoint, path):
    with open(path, "wb") as file:
        file.write(bytes({rng.randrange(10**6)}))
    os.kill(os.getpid(), signal.SIGKILL)
before({rng.randint(2, 5)}, torch, "save", die)
"""
    status, _, _ = finish(launch(script=wrapper(tmp_path, fault)))
    assert status == -signal.SIGKILL
    assert len(list((tmp_path / "log").glob("*.tmp"))) == 1
    # It saves at the end only: another save of the same step would overwrite the half-written file.
    assert_resumes(launch, tmp_path / "log", undisturbed(), "--checkpoint_interval=0")


def test_a_killed_rank_brings_the_group_back(launch, tmp_path, undisturbed, rng):
    whole = undisturbed(2)
    process = launch("--resume", torchrun=[*TWO, "--max-restarts=3"], env=OWN_STORE)
    read_until(process, rf"^step +{rng.randint(SAVES + 1, STEPS - AHEAD)} ")
    ranks = {env.get("RANK"): pid for pid, env in processes_of(process.mark).items()}
    os.kill(ranks[rng.choice("01")], signal.SIGKILL)
    status, out, errors = finish(process)
    assert status == 0, errors
    assert out.count("loading ") == 1
    assert_unharmed(tmp_path / "log", whole)


# ----------------------------------------------------------------------------------------------------------------------
# Asked to stop


def resume_all(launch, folders, whole):
    """Resume several runs at once, because it is the start that takes long. Returns their outputs."""
    runs = [launch("--resume", f"--log_dir={folder}") for folder in folders]
    outputs = []
    for folder, process in zip(folders, runs, strict=True):
        status, out, errors = finish(process)
        assert status == 0, errors
        assert_unharmed(folder, whole)
        outputs.append(out)
    return outputs


def test_a_signal_while_it_trains(launch, tmp_path, undisturbed, rng):
    folders = {number: tmp_path / number.name for number in (signal.SIGTERM, signal.SIGINT)}
    runs = {number: launch(f"--log_dir={folder}") for number, folder in folders.items()}
    for number, process in runs.items():
        strike(process, rng, number)
        status, out, errors = finish(process)
        assert status == 128 + number
        assert errors == ""
        steps = last_step(folders[number]) + 1
        assert f"\n{number.name}: stopped after {steps} steps\n" in out
        assert re.search(rf"\nto continue: python \S*train_gpt2.py --resume --log_dir={folders[number]}\n$", out)
        assert newest(folders[number]) == steps
    resume_all(launch, list(folders.values()), undisturbed())


def test_a_display_that_fails(launch, tmp_path, undisturbed, rng):
    """A reader that goes away, or a full disk behind `>`, only costs the output."""
    process = launch()
    step = rng.randint(SAVES + 1, STEPS - AHEAD)
    read_until(process, rf"^step +{step} ")
    process.stdout.close()
    status = process.wait()
    assert (status, process.errors.read_text(encoding="utf-8")) == (0, "")
    assert_unharmed(tmp_path / "log", undisturbed())
    script = wrapper(tmp_path, "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)")
    status, _, errors = finish(launch(f"--log_dir={tmp_path / 'full'}", script=script))
    assert (status, errors) == (0, "")
    assert_unharmed(tmp_path / "full", undisturbed())


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no terminals that hang up")
def test_a_terminal_that_closes(launch, tmp_path, undisturbed, rng):
    """SIGHUP stops the run after its step, although its output goes nowhere any more."""
    process = launch()
    read_until(process, rf"^step +{rng.randint(SAVES + 1, STEPS - AHEAD)} ")
    process.send_signal(signal.SIGHUP)
    process.stdout.close()
    assert process.wait() == 128 + signal.SIGHUP, process.errors.read_text(encoding="utf-8")
    assert newest(tmp_path / "log") == last_step(tmp_path / "log") + 1
    assert_resumes(launch, tmp_path / "log", undisturbed())


def write_hellaswag(path, count):
    endings = ["the first one ends here.", "the second one.", "the third.", "and a fourth one, longer than the others."]
    examples = [{"ctx": f"Story number {i} begins, and", "endings": endings, "label": i % 4} for i in range(count)]
    path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")


def test_a_signal_in_another_phase(launch, tmp_path, undisturbed):
    """It comes as the second call of a function begins: that phase is completed, and one more step."""
    write_hellaswag(tmp_path / "examples.jsonl", 100)
    phases = {"evaluate": ("train_gpt2", 51), "ending_losses": ("hellaswag", 51), "save": ("torch", 2 * SAVES + 1)}
    runs = {}
    for name, (module, _) in phases.items():
        fault = f"before(2, {module}, {name!r}, lambda *args: os.kill(os.getpid(), signal.SIGTERM))"
        flags = [f"--hellaswag={tmp_path / 'examples.jsonl'}"] if module == "hellaswag" else []
        runs[name] = launch(f"--log_dir={tmp_path / name}", *flags, script=wrapper(tmp_path, fault))
    for name, process in runs.items():
        status, out, errors = finish(process)
        steps = phases[name][1]
        assert status == 143, errors
        assert "Traceback" not in errors
        assert f"SIGTERM: stopped after {steps} steps" in out
        assert out.count(f"model_{steps:05d}.pt") == 1
        assert newest(tmp_path / name) == steps
    log = tmp_path / "ending_losses" / "log.txt"
    lines = log.read_text().splitlines(keepends=True)
    assert [line.split()[0] for line in lines if " hella " in line] == ["0", "50"]
    log.write_text("".join(line for line in lines if " hella " not in line))  # to compare with a run without
    resume_all(launch, [tmp_path / name for name in phases], undisturbed())


def test_sigterm_to_torchrun(launch, tmp_path, undisturbed, rng):
    whole = undisturbed(2)
    process = launch(torchrun=TWO)
    strike(process, rng, signal.SIGTERM)
    status, out, _ = finish(process)
    assert status != 0
    steps = last_step(tmp_path / "log") + 1
    assert out.count(f"stopped after {steps} steps") == 1
    assert out.count(f"checkpoint: {tmp_path / 'log' / f'model_{steps:05d}.pt'}") == 1
    assert newest(tmp_path / "log") == steps
    assert_resumes(launch, tmp_path / "log", whole, torchrun=TWO)


# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_a_full_disk(launch, tmp_path, undisturbed):
    """From the third save on, no file can grow beyond a million bytes: a checkpoint has 2.4 million, the log few."""
    fault = 'before(3, torch, "save", lambda *args: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)))'
    status, out, errors = finish(launch(script=wrapper(tmp_path, fault)))
    folder = tmp_path / "log"
    assert status == 1
    assert len(errors.splitlines()) == 1
    assert errors.startswith("train_gpt2.py: the last checkpoint ")
    assert str(folder) in errors
    assert out.count(" could not be written (") == STEPS // SAVES - 2
    assert names_in(folder) == ["log.txt", "model_00020.pt", "model_00040.pt"]
    assert (folder / "log.txt").read_bytes() == (undisturbed() / "log.txt").read_bytes()
    assert f"loading {folder / 'model_00040.pt'}" in assert_resumes(launch, folder, undisturbed())


def flip_bit(path, rng):
    """Flip a bit inside a tensor. Tensors are stored in the zip file without compression, under data/."""
    with zipfile.ZipFile(path) as archive:
        entry = max((entry for entry in archive.infolist() if "/data/" in entry.filename), key=lambda e: e.file_size)
    with open(path, "rb+") as file:
        place = entry.header_offset + 200 + rng.randrange(entry.file_size - 400)  # past the name and its padding
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << rng.randrange(8)]))


def test_truncated_and_flipped_checkpoints(launch, tmp_path, undisturbed, rng):
    folder = shutil.copytree(undisturbed(), tmp_path / "log")
    cut, flipped, good = [folder / f"model_{step:05d}.pt" for step in (STEPS, STEPS - SAVES, STEPS - 2 * SAVES)]
    os.truncate(cut, rng.randrange(cut.stat().st_size))
    flip_bit(flipped, rng)
    torch.load(flipped, weights_only=True)  # torch does not notice
    out = assert_resumes(launch, folder, undisturbed())
    for path in (cut, flipped):
        assert out.count(f"warning: {path}") == 1
    assert f"loading {good}\n" in out


def test_a_log_cut_in_the_middle_of_a_line(launch, tmp_path, undisturbed, rng):
    folder = shutil.copytree(undisturbed(), tmp_path / "log")
    saved = rng.randrange(SAVES, STEPS, SAVES)
    for step in range(saved + SAVES, STEPS + 1, SAVES):
        (folder / f"model_{step:05d}.pt").unlink()
    content = (folder / "log.txt").read_bytes()
    os.truncate(folder / "log.txt", rng.randrange(content.index(b"\n%d train" % saved) + 2, len(content)))
    assert f"model_{saved:05d}.pt" in assert_resumes(launch, folder, undisturbed())


def test_a_shard_cut_short_under_a_running_job(launch, tmp_path, shards, undisturbed, rng):
    """The training stream has 348 tokens, so each shard is read within 44 steps."""
    data = shutil.copytree(shards, tmp_path / "data")
    shard = rng.choice(sorted(data.glob("*_train_*")))
    process = launch(f"--data={data}")
    read_until(process, rf"^step +{rng.randint(SAVES + 1, STEPS - AHEAD - 44)} ")
    content = shard.read_bytes()
    os.truncate(shard, len(content) - 2 * rng.randint(1, 30))
    status, _, errors = finish(process)
    assert status == 1
    assert len(errors.splitlines()) == 1
    assert errors.startswith(f"train_gpt2.py: {shard} ")
    shard.write_bytes(content)
    status, _, errors = finish(launch("--resume", f"--data={data}"))
    assert status == 0, errors
    assert_unharmed(tmp_path / "log", undisturbed())


def test_two_runs_on_one_folder(launch, tmp_path, undisturbed, rng):
    first = launch()
    strike(first, rng, signal.SIGSTOP)  # it stops, so that it is still there when the others end
    for process in [launch(), launch("--resume")]:
        status, out, errors = finish(process)
        assert status == 1
        assert not re.search("^(validation loss|step|checkpoint)", out, re.MULTILINE)
        assert len(errors.splitlines()) == 1
        assert errors.startswith(f"train_gpt2.py: another run is writing to {tmp_path / 'log'}: ")
    first.send_signal(signal.SIGCONT)
    status, _, errors = finish(first)
    assert status == 0, errors
    assert_unharmed(tmp_path / "log", undisturbed())


# ----------------------------------------------------------------------------------------------------------------------
# The network


class Broken(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(500)

    def log_message(self, *args):
        pass


@pytest.fixture
def ports():
    """Of three servers: one accepts and never answers, one answers with an error, one is not there."""
    silent = socket.create_server(("127.0.0.1", 0))
    broken = HTTPServer(("127.0.0.1", 0), Broken)
    thread = threading.Thread(target=broken.serve_forever)
    thread.start()
    with socket.create_server(("127.0.0.1", 0)) as absent:
        port = absent.getsockname()[1]
    yield silent.getsockname()[1], broken.server_port, port
    broken.shutdown()
    thread.join()
    broken.server_close()
    silent.close()


def test_hellaswag_that_cannot_be_downloaded(launch, tmp_path, undisturbed, ports):
    reasons = ["timed out", "HTTP Error 500", "Connection refused"]
    runs = []
    for port, reason in zip(ports, reasons, strict=True):
        place = tmp_path / str(port)
        change = f"""
hellaswag.OFFICIAL, hellaswag.TIMEOUT = "http://127.0.0.1:{port}/", 1
fineweb.HERE = train_gpt2.Path({str(place)!r})
"""
        place.mkdir()
        flags = ["--hellaswag=official", f"--log_dir={place / 'log'}"]
        runs.append((launch(*flags, script=wrapper(tmp_path, change)), place, reason))
    for process, place, reason in runs:
        status, out, errors = finish(process)
        assert (status, errors) == (0, "")
        warnings = [line for line in out.splitlines() if line.startswith("warning")]
        assert len(warnings) == 1
        assert reason in warnings[0]
        assert list((place / "hellaswag").glob("*.jsonl*")) == []
        assert_unharmed(place / "log", undisturbed())


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def worker(node):
    """(rank, process id) of the one worker that a node's agent has started, or None."""
    found = [(int(env["RANK"]), pid) for pid, env in processes_of(node.mark).items() if "RANK" in env]
    return found[0] if found else None


def poll(condition, seconds=60):
    """Wait until the condition is true; returns its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, condition
        time.sleep(0.05)
    return value


def accepts(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_a_node_that_dies_and_comes_back(launch, tmp_path, undisturbed, rng):
    """Two machines, as far as torchrun knows. All of the second is killed, then started again."""
    whole, port = undisturbed(2), free_port()
    torchrun = ["--nnodes=2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv_backend=c10d", "--rdzv_id=faults"]
    torchrun += [f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1", f"--rdzv_conf={HEARTBEAT}"]
    first = launch("--resume", torchrun=torchrun, env=OWN_STORE)
    poll(lambda: accepts(port))  # so that the first one hosts the rendezvous
    second = launch("--resume", torchrun=torchrun, env=OWN_STORE)
    ranks = [poll(lambda node=node: worker(node))[0] for node in (first, second)]
    assert sorted(ranks) == [0, 1]
    read_until((first, second)[ranks.index(0)], rf"^step +{rng.randint(SAVES + 1, STEPS - AHEAD)} ")
    end(second)
    second = launch("--resume", torchrun=torchrun, env=OWN_STORE)
    with ThreadPoolExecutor() as pool:  # both have to be read, whichever prints
        results = list(pool.map(finish, (first, second)))
    assert [status for status, _, _ in results] == [0, 0], results
    assert "loading " in results[0][1] + results[1][1]
    assert_unharmed(tmp_path / "log", whole)


# ----------------------------------------------------------------------------------------------------------------------
# Load


def resources(pid):
    """Resident memory in kB, threads, open files."""
    status = Path(f"/proc/{pid}/status").read_text()
    memory = int(re.search(r"VmRSS:\s+(\d+) kB", status)[1])
    return memory, len(os.listdir(f"/proc/{pid}/task")), len(os.listdir(f"/proc/{pid}/fd"))


@pytest.fixture(scope="module")
def long_run(tmp_path_factory, shards):
    """20,000 steps, starting now: a Future of (resources after 2,000, resources after 19,800, exit status)."""
    folder = tmp_path_factory.mktemp("long")
    flags = ["--n_head=1", "--n_embd=2", "--total_batch_size=4", "--max_steps=20000", "--eval_interval=1000"]
    flags += ["--checkpoint_interval=5000", "--keep_checkpoints=1", f"--data={shards}", f"--log_dir={folder / 'log'}"]
    process = start(folder, *FLAGS, *flags, limit=500)

    def observe():
        read_until(process, r"^step +2000 ")
        early = resources(process.pid)
        read_until(process, r"^step 19800 ")
        return early, resources(process.pid), finish(process)[0]

    with ThreadPoolExecutor() as pool:
        yield pool.submit(observe)
        end(process)


def test_twenty_kills_in_a_row(launch, tmp_path, undisturbed, rng, long_run):
    """SIGKILL or SIGTERM, each a few steps after a checkpoint, each followed by --resume.

    The long run uses the other core meanwhile. The chain needs about 200 steps; the others are for a slow machine, on
    which the run is further ahead of its reader.
    """
    steps = "--max_steps=600"
    for _ in range(20):
        process = launch("--resume", steps, "--checkpoint_interval=2", "--keep_checkpoints=2")
        number = rng.choice([signal.SIGKILL, signal.SIGTERM])
        read_until(process, "^checkpoint: ")
        for _ in range(rng.randint(0, 6)):
            process.stdout.readline()
        time.sleep(0.01 * rng.random())  # to strike between two lines, too
        process.send_signal(number)
        status, _, errors = finish(process)
        assert status == (-number if number == signal.SIGKILL else 128 + number), errors
    assert_resumes(launch, tmp_path / "log", undisturbed(steps=600), steps)


def test_twenty_thousand_steps_leak_nothing(long_run):
    (memory, threads, files), (last_memory, last_threads, last_files), status = long_run.result(timeout=500)
    print(f"{memory} and {last_memory} kB, {threads} and {last_threads} threads, {files} and {last_files} files")
    assert status == 0
    assert last_memory < 1.02 * memory
    assert last_threads <= threads
    assert last_files <= files + 2  # the log and a shard are open for a moment


# ----------------------------------------------------------------------------------------------------------------------
# Security


class Evil:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_malicious_files_are_refused(launch, tmp_path, shards, undisturbed):
    """Each would write a file of its own if it were unpickled, as the end of the test shows."""
    good = torch.load(undisturbed() / f"model_{SAVES:05d}.pt", weights_only=True)
    names = ["zip", "raw", "weights", "shard"]
    marks = {name: tmp_path / f"owned_{name}" for name in names}
    folders = {name: tmp_path / name for name in names}
    for name in ("zip", "raw"):
        folders[name].mkdir()

    zipped, raw = folders["zip"] / "model_00020.pt", folders["raw"] / "model.pt"
    torch.save({**good, "extra": Evil(marks["zip"])}, zipped)
    raw.write_bytes(pickle.dumps({**good, "extra": Evil(marks["raw"])}))
    model = train_gpt2.GPT(train_gpt2.GPTConfig(block_size=4, n_layer=1, n_head=1, n_embd=4))
    train_gpt2.save_pretrained(model, folders["weights"])
    (folders["weights"] / "model.safetensors").unlink()
    weights = folders["weights"] / "pytorch_model.bin"
    torch.save({"transformer.wte.weight": Evil(marks["weights"])}, weights)
    shutil.copytree(shards, folders["shard"])
    shard = folders["shard"] / "tiny_train_000001.npy"
    np.save(shard, np.array([Evil(marks["shard"])] * 37, dtype=object), allow_pickle=True)

    flags = {
        "zip": ["--resume", f"--log_dir={folders['zip']}"],
        "raw": [f"--init_from={raw}"],
        "weights": [f"--init_from={folders['weights']}"],
        "shard": [f"--data={folders['shard']}"],
    }
    processes = {name: launch(f"--log_dir={tmp_path / 'log' / name}", *flags[name]) for name in names}
    for name, process in processes.items():
        status, out, errors = finish(process)
        assert status == 1, name
        assert len(errors.splitlines()) == 1, errors
        assert errors.startswith("train_gpt2.py: ")
        assert str(folders[name]) in errors
        assert "step " not in out
        assert not marks[name].exists()

    torch.load(zipped, weights_only=False)
    torch.load(weights, weights_only=False)
    np.load(shard, allow_pickle=True)
    pickle.loads(raw.read_bytes())
    assert all(mark.exists() for mark in marks.values())


def test_the_sources_run_nothing_from_a_file():
    """No shell, and nothing unpickled from a file."""
    for path in ROOT.glob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert not re.search(r"shell\s*=\s*True|os\.system|os\.popen", source), path
        assert not re.search(r"weights_only\s*=\s*False|allow_pickle\s*=\s*True|pickle\.load\(", source), path
