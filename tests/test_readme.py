"""What the README says is there, is there."""

import re
import shlex

import pytest
from conftest import ROOT

import fineweb
import train_gpt2

README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_map_names_places_that_exist():
    names = re.findall(
        r"`([\w.]+)`",
        "".join(line.split("|")[2] for line in section("From the lecture to the code").splitlines()[2:] if "|" in line),
    )
    assert len(names) > 20
    for name in names:
        if name.endswith(".py"):
            assert (ROOT / name).exists()
            continue
        place = train_gpt2
        for part in name.split("."):
            place = getattr(place, part)


def test_the_table_of_settings_is_complete():
    names = re.findall(r"`(\w+)`", section("Settings").split("|---|---|")[1].split("\n\n")[0])
    assert sorted(names) == sorted(vars(train_gpt2.Settings()))


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()] + re.findall(
        r"`((?:python|torchrun)[^`]*\.py[^`]*)`", README
    )


@pytest.mark.parametrize("command", commands())
def test_every_command_parses(command):
    words = shlex.split(command)
    for name, parse in [
        ("train_gpt2.py", train_gpt2.parse_flags),
        ("fineweb.py", fineweb.parse_flags),
        ("hellaswag.py", None),
    ]:
        place = [i for i, word in enumerate(words) if word.endswith(name)]
        if place and parse and "--help" not in words:
            parse(words[place[0] + 1 :])
        if place:
            return
    assert "pytest" in command
