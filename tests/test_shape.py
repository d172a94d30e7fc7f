"""In train_gpt2.py, the lesson comes first: nothing of it stands in the housekeeping, nor the other way round."""

import ast
import itertools
import re

from conftest import ROOT

LESSON = {
    *("GPTConfig", "CausalSelfAttention", "MLP", "Block", "GPT", "get_lr", "DataLoaderLite", "shuffled_order"),
    *("evaluate", "print_samples", "get_ranks", "pick_device", "pick_dtype", "setting", "Settings", "train"),
}
SOURCE = (ROOT / "train_gpt2.py").read_text(encoding="utf-8")
LINES = SOURCE.splitlines()


def line_of(heading):
    """The number of the only line that is this heading."""
    (number,) = [number for number, line in enumerate(LINES, start=1) if line == heading]
    return number


def parts():
    """The lines where the two parts begin."""
    return line_of("# Part I: the lesson"), line_of("# Part II: housekeeping")


def definitions():
    """[(name, line)] of what train_gpt2.py defines at its top level, in order."""
    found = []
    for node in ast.parse(SOURCE).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.append((node.name, node.lineno))
        for target in node.targets if isinstance(node, ast.Assign) else []:
            found += [(name.id, node.lineno) for name in ast.walk(target) if isinstance(name, ast.Name)]
    return found


def test_the_sections_are_in_order():
    """A heading such as "# 5. Data" stands below a rule."""
    part_1, part_2 = parts()
    numbers = {1: [], 2: []}
    for number, (above, line) in enumerate(itertools.pairwise(LINES), start=2):
        match = re.match(r" *# (\d+)\. ", line)
        if match and re.fullmatch(r" *# -+", above):
            assert number > part_1
            numbers[1 if number < part_2 else 2].append(int(match[1]))
    assert numbers == {1: list(range(1, 10)), 2: list(range(10, 15))}


def test_the_lesson_stands_before_the_housekeeping_and_ends_with_the_training_loop():
    part_1, part_2 = parts()
    assert [name for name, line in definitions() if line < part_1] == ["GPT2_VOCAB_SIZE"]
    lesson = [name for name, line in definitions() if part_1 < line < part_2]
    assert set(lesson) == LESSON
    assert lesson[-1] == "train"
    assert not {name for name, line in definitions() if line > part_2} & LESSON
