"""The files are short enough to read, and in train_gpt2.py the lesson comes first."""

import ast
import io
import re
import tokenize

import pytest
from conftest import ROOT

SECTIONS = [  # what the heading says, lines, and lines of code
    ("", 50, 30),  # docstring, imports, constants
    ("model", 145, 80),
    ("weights", 70, 50),
    ("sampling", 26, 15),
    ("optimizer", 36, 18),
    ("data", 80, 52),
    ("evaluation", 52, 36),
    ("device", 72, 42),
    ("settings", 62, 54),
    ("training loop", 155, 110),
    ("command line", 46, 38),
    ("checkpoints", 88, 66),
    ("log", 36, 26),
    ("main", 45, 36),
]
LESSON = {
    *("GPT2_VOCAB_SIZE", "MODELS"),
    *("GPTConfig", "CausalSelfAttention", "MLP", "Block", "GPT", "get_lr", "fit_micro_batch"),
    *("open_tokens", "shuffled_windows", "DataLoaderLite"),
    *("evaluate", "load_hellaswag", "print_samples", "get_ranks", "print0", "pick_device"),
    *("pick_dtype", "keep_freed_memory", "can_compile", "setting", "Settings", "TEXT_FILE_SETTINGS", "train"),
}
HOUSEKEEPING = {
    *("parse_flags", "make_settings", "check_same", "check_ranks_agree"),
    *("list_checkpoints", "save_checkpoint", "load_checkpoint", "newest_checkpoint", "build_model", "restore"),
    *("open_log", "report"),
    *("catch_signals", "main"),
}

SOURCE = (ROOT / "train_gpt2.py").read_text(encoding="utf-8")
LINES = SOURCE.splitlines()


def code_lines(source):
    """Numbers of the lines that are not blank, not only a comment, and not in a docstring."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            code.update(range(token.start[0], token.end[0] + 1))
    return code - docstrings


def definitions():
    """[(name, line)] of what train_gpt2.py defines at its top level, in order."""
    found = []
    for node in ast.parse(SOURCE).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.append((node.name, node.lineno))
        for target in node.targets if isinstance(node, ast.Assign) else []:
            found += [(name.id, node.lineno) for name in ast.walk(target) if isinstance(name, ast.Name)]
    return found


def line_of(start):
    """The number of the only line that starts like this."""
    (number,) = [i for i, line in enumerate(LINES, start=1) if line.startswith(start)]
    return number


def test_code_lines_are_counted():
    source = (
        '"""A file."""\n\nx = 1  # one\n# two\ndef f():\n    """Text\n    of two lines."""\n    return """\n\n"""\n'
    )
    assert code_lines(source) == {3, 5, 8, 9, 10}


@pytest.mark.parametrize(
    ("name", "lines", "code"),
    [("train_gpt2.py", 965, 655), ("fineweb.py", 360, 255), ("hellaswag.py", 140, 90)],
)
def test_a_file_is_within_its_budget(name, lines, code):
    source = (ROOT / name).read_text(encoding="utf-8")
    assert len(source.splitlines()) <= lines
    assert len(code_lines(source)) <= code
    assert max(map(len, source.splitlines())) <= 120


def test_the_readme_is_within_its_budget():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 210


def test_the_lesson_is_within_its_budget():
    end = line_of("# Part II: ") - 1  # above it is a rule
    assert end - 1 <= 750
    assert sum(line < end for line in code_lines(SOURCE)) <= 490


def test_train_is_within_its_budget():
    (train,) = [node for node in ast.parse(SOURCE).body if getattr(node, "name", None) == "train"]
    assert train.end_lineno - train.lineno + 1 <= 165


def headings():
    """[(number, title, line)] of the sections: "# 1. The model", under a rule."""
    found = []
    for number, line in enumerate(LINES, start=1):
        match = re.fullmatch(r" *# (\d+)\. (.*)", line)
        if match and re.fullmatch(r" *# -+", LINES[number - 2]):
            found.append((int(match[1]), match[2].lower(), number))
    return found


def test_the_sections_are_in_order():
    assert [n for n, _, _ in headings()] == list(range(1, 14))
    for (_, title, _), (words, _, _) in zip(headings(), SECTIONS[1:], strict=True):
        assert words in title
    assert line_of("# Part I: ") < headings()[0][2]
    assert headings()[8][2] < line_of("# Part II: ") < headings()[9][2]


@pytest.mark.parametrize("n", range(14))
def test_a_section_is_within_its_budget(n):
    """From its rule to the next one. The two headings of the parts, two lines each, belong to no section."""
    starts = [1, *(line - 1 for _, _, line in headings()), len(LINES) + 1]
    parts = {line_of(part) - i for part in ("# Part I: ", "# Part II: ") for i in (0, 1)}
    section = set(range(starts[n], starts[n + 1])) - parts
    _, lines, code = SECTIONS[n]
    assert len(section) <= lines
    assert len(section & code_lines(SOURCE)) <= code


def test_the_lesson_comes_first_and_ends_with_the_training_loop():
    part_2 = line_of("# Part II: ")
    lesson = [name for name, line in definitions() if line < part_2]
    housekeeping = [name for name, line in definitions() if line > part_2]
    assert set(lesson) <= LESSON
    assert set(housekeeping) <= HOUSEKEEPING
    assert lesson[-1] == "train"
    assert not LESSON & HOUSEKEEPING
