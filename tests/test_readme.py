"""What the README says is there, is there."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import fineweb
import plot
import train_gpt2

README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_map_names_places_that_exist():
    rows = [line for line in section("From the lecture to the code").splitlines() if line.startswith("|")]
    names = re.findall(r"`([\w.]+)`", "".join(row.split("|")[2] for row in rows[2:]))
    assert len(names) > 20
    for name in names:
        if name.endswith(".py"):
            assert (ROOT / name).exists()
            continue
        place = train_gpt2
        for part in name.split("."):
            place = getattr(place, part)


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", README.replace("\\\n", ""), re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines() if not line.startswith("#")]
    return lines + re.findall(r"`((?:python|torchrun)[^`]*\.py[^`]*)`", README)


SCRIPTS = {"train_gpt2.py": train_gpt2, "fineweb.py": fineweb, "plot.py": plot, "hellaswag.py": None}


def script_and_flags(command):
    """The script that a command runs, and its flags; (None, []) where it runs none of ours."""
    words = shlex.split(command.split(" < ")[0])
    for i, word in enumerate(words):
        if Path(word).name in SCRIPTS:
            return Path(word).name, words[i + 1 :]
    return None, []


@pytest.mark.parametrize("command", commands())
def test_every_command_parses(command):
    script, flags = script_and_flags(command)
    if script is None:
        assert re.search("pytest|tests/(benchmark|experiments).py|^python3 -m venv", command)
    elif SCRIPTS[script] and "--help" not in flags:
        SCRIPTS[script].parse_flags(flags)


@pytest.fixture
def one_thread():
    """Tiny steps with several threads take seconds on a busy machine: the threads wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_the_commands_do_what_they_say(tmp_path, monkeypatch, capsys):
    """All of them in the README's order, in one folder, as a reader would; downloads aside, and with a small model."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "input.txt", tmp_path)
    (tmp_path / "scene.txt").write_text("Enter ROMEO.\n", encoding="utf-8")
    (tmp_path / "my_text.txt").write_text("What's in a name? " * 200, encoding="utf-8")
    rose = json.dumps({"text": "A rose by any other name"}) + "\n"
    (tmp_path / "texts.jsonl").write_text(rose * 500, encoding="utf-8")
    small = ["--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=8", "--total_batch_size=32", "--val_tokens=64"]
    ran, downloads = [], ("--init_from=gpt2", "hellaswag.py", "--verify", "--pretokenized")
    for command in dict.fromkeys(commands()):
        script, flags = script_and_flags(command)
        fetches = any(name in command for name in downloads) or command == "python fineweb.py"
        if script is None or fetches or "--help" in flags:
            continue
        if script == "train_gpt2.py":
            flags = [flag for flag in flags if not flag.startswith(("--n_", "--total_batch_size", "--max_new_tokens"))]
            flags += ["--device=cpu", "--num_samples=1", "--max_new_tokens=2"]
            flags += [] if "--log_dir" in command else [f"--log_dir={tmp_path / 'log'}"]
            own = "--init_from" in command or "--resume" in flags
            flags += [] if own else small
            flags += [] if "--max_steps" in command or own else ["--max_steps=60"]
            flags += [] if "--export" in command or "--data" in command or own else [f"--data={ROOT / 'input.txt'}"]
            flags = [flag for flag in flags if "micro_batch" not in flag and not flag.startswith("--device=mps")]
        if script == "plot.py":
            flags = flags or ["log"]
        if script == "fineweb.py":
            flags += ["--shard_size=1000"]
        if " < " in command:
            monkeypatch.setattr("sys.stdin", open(command.split(" < ")[1], encoding="utf-8"))  # noqa: SIM115
        SCRIPTS[script].main(flags)
        ran.append((command, capsys.readouterr().out))
    printed = dict(ran)
    assert len(ran) > 12
    assert "Enter ROMEO." in next(out for command, out in ran if " < scene.txt" in command)
    assert "exported: my_gpt2" in next(out for command, out in ran if "--export" in command)
    assert (tmp_path / "shards" / "edufineweb_val_000000.npy").exists()
    assert printed["python plot.py"].endswith("log.png\n")
