"""The picture shows what the log says, and mistakes end in one line."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import plot
from fineweb import UserError

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # matplotlib's, when it is asked for something odd

LOG = """\
0 val 10.9500
0 hella 0.2463
0 train 10.954321
1 train 9.500000
2 val 8.1234
2 hella 0.2501
2 train 8.250000
3 val 7.9000
3 hella 0.2480
"""
VALUES = {
    "train": {0: 10.954321, 1: 9.5, 2: 8.25},
    "val": {0: 10.95, 2: 8.1234, 3: 7.9},
    "hella": {0: 0.2463, 2: 0.2501, 3: 0.248},
}
NO_HELLA = {**VALUES, "hella": {}}


def write_log(folder, text=LOG):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.txt").write_bytes(text.encode("utf-8"))
    return folder / "log.txt"


def curves(ax):
    """The curves of a panel, without its lines of reference: {label: (x, y)}."""
    lines = [line for line in ax.get_lines() if line.get_linestyle() == "-"]
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}


def references(ax):
    """The dashed lines of a panel, as (height, the words on it)."""
    heights = [line.get_ydata()[0] for line in ax.get_lines() if line.get_linestyle() == "--"]
    return list(zip(heights, [text.get_text() for text in ax.texts], strict=True))


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()] if ax.get_legend() else []


def long_run(steps, hella=None):
    """Losses that fall from 10.95 to about 3, with a spike of one step in the middle."""
    train = {step: 3 + 7.95 / (1 + step / 40) for step in range(steps)}
    train[steps // 2] = 9.0
    return {"train": train, "val": {0: 10.95, steps: 3.01}, "hella": hella or {}}


@pytest.mark.parametrize(
    "text",
    [
        LOG,
        LOG.removesuffix("\n"),
        LOG.replace("\n", "\r\n"),
        LOG + "3 train 7.12345",  # torn lines, as a run that is still writing leaves them
        LOG + "30",
        LOG + "4 val 7.",
        LOG + "4 val 7.123",
        LOG + "4 hella 0.2",
        "hello\n\n4 loss 7.0000\n4 val nan\n-4 val 7.0000\nxx4 val 7.0000\n4 val 7.0000 7\n" + LOG + "\0\ud7ff\n",
    ],
)
def test_reads_whole_lines_and_no_others(tmp_path, text):
    assert plot.read_log(write_log(tmp_path, text)) == VALUES


def test_reads_bytes_that_are_no_text(tmp_path):
    (tmp_path / "log.txt").write_bytes(b"\xff\xfe\x80\n" + LOG.encode() + b"4 val \xc3")
    assert plot.read_log(tmp_path / "log.txt") == VALUES


def assert_all_is_in_view(ax):
    bottom, top = ax.get_ylim()
    assert all(bottom < y < top for line in ax.get_lines() for y in line.get_ydata())
    assert ax.get_xlim()[0] == 0 and ax.get_xlim()[1] > 3


def test_one_run_in_two_panels():
    loss, hella = plot.draw({"log": VALUES}).axes
    assert curves(loss) == {
        "training": ([0, 1, 2], [10.954321, 9.5, 8.25]),
        "validation": ([0, 2, 3], [10.95, 8.1234, 7.9]),
    }
    assert legend(loss) == ["training", "validation"]
    assert list(curves(hella).values()) == [([0, 2, 3], [0.2463, 0.2501, 0.248])]
    assert references(loss) == [(3.29, "GPT-2 124M (3.29)")]
    assert references(hella) == [(0.2955, "GPT-2 124M (0.2955)"), (0.337, "GPT-3 124M (0.337)")]
    assert loss.get_xlabel() == hella.get_xlabel() == "steps"
    for ax in (loss, hella):
        assert_all_is_in_view(ax)


def test_a_run_better_than_what_it_is_compared_with():
    for ax in plot.draw({"log": {"train": {0: 2.5}, "val": {0: 2.6, 3: 2.4}, "hella": {0: 0.4, 3: 0.5}}}).axes:
        assert_all_is_in_view(ax)


def test_a_run_without_hellaswag_is_one_panel_without_gpt2():
    (loss,) = plot.draw({"log": NO_HELLA}).axes
    assert sorted(curves(loss)) == ["training", "validation"]
    assert references(loss) == []


def test_training_is_lighter_than_validation_and_each_run_has_its_colour():
    loss, hella = plot.draw({"a": VALUES, "b": VALUES}).axes
    lines = {line.get_label(): line for line in [*loss.get_lines(), *hella.get_lines()]}
    for name in ("a", "b"):
        train, val = lines[f"training, {name}"], lines[f"validation, {name}"]
        assert train.get_alpha() < 0.5 and val.get_alpha() is None
        assert train.get_linewidth() < val.get_linewidth() and train.get_zorder() < val.get_zorder()
        assert train.get_color() == val.get_color() == lines[name].get_color()
    assert lines["a"].get_color() != lines["b"].get_color()


def test_several_runs_are_named_in_the_legends():
    other = {**VALUES, "val": {0: 10.9, 2: 5.0}}
    loss, hella = plot.draw({"a": VALUES, "_$x^$": other, "c": NO_HELLA}).axes
    names = ["a", r"_\$x^\$", "c"]  # a dollar is a dollar, not the start of a formula
    assert legend(loss) == [f"{kind}, {name}" for name in names for kind in ("training", "validation")]
    assert legend(hella) == names[:2]
    assert curves(loss)[f"validation, {names[1]}"] == ([0, 2], [10.9, 5.0])


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/x/log/log.txt"], ["log"]),
        (["/x/a/log.txt", "/x/b/log.txt"], ["a", "b"]),
        (["/x/a/log/log.txt", "/x/b/log/log.txt"], ["a/log", "b/log"]),
        (["/x/log/log.txt", "/x/log/earlier_1/log.txt"], ["log", "earlier_1"]),
        (["/x/log.txt", "/y/x/log.txt"], ["/x", "y/x"]),
        (["/x/old.txt", "/x/new.txt"], ["old.txt", "new.txt"]),
    ],
)
def test_names_of_runs_differ(paths, names):
    assert plot.name_runs([Path(path) for path in paths]) == names


@pytest.mark.parametrize(
    ("tokens_per_step", "unit", "label"),
    [(10**9, 1e9, "tokens (billions)"), (3 * 10**8, 1e6, "tokens (millions)"), (1, 1e6, "tokens (millions)")],
)
def test_the_axis_in_tokens(tokens_per_step, unit, label):
    for ax in plot.draw({"log": VALUES}, tokens_per_step).axes:
        assert ax.get_xlabel() == label
        for name, (x, _) in curves(ax).items():
            assert x == pytest.approx(
                [s * tokens_per_step / unit for s in ([0, 1, 2] if name == "training" else [0, 2, 3])]
            )


def test_a_long_run_is_not_flattened_by_its_first_losses():
    """Nor by a spike; a short run is shown whole."""
    for steps, hella in [(5000, None), (5000, {0: 0.25}), (501, None)]:
        bottom, top = plot.draw({"log": long_run(steps, hella)}).axes[0].get_ylim()
        assert 2.5 < bottom < 3 and 3.2 < top < 8.5
    bottom, top = plot.draw({"log": long_run(400)}).axes[0].get_ylim()
    assert 2.5 < bottom < 3 and 10.95 < top < 12
    with_a_short_one = plot.draw({"long": long_run(5000), "short": long_run(60)}).axes[0].get_ylim()
    assert with_a_short_one == plot.draw({"long": long_run(5000)}).axes[0].get_ylim()


@pytest.mark.parametrize("text", ["0 val 10.9500\n", "0 train 10.954321\n", "0 hella 0.2500\n", "7 val 3.2900\n"])
def test_one_value_is_a_picture_too(tmp_path, text):
    """As a point: a line of one point would show nothing."""
    plot.main([str(write_log(tmp_path, text))])
    assert (tmp_path / "log.png").exists()
    figure = plot.draw({"log": plot.read_log(tmp_path / "log.txt")})
    (line,) = [line for ax in figure.axes for line in ax.get_lines() if line.get_linestyle() == "-"]
    assert line.get_marker() == "o"


def recipe_run(last, loss):
    """A run of the recipe that was evaluated every 250 steps, and ended with this loss."""
    steps = [*range(0, last, 250), last]
    values = {"train": {}, "val": dict.fromkeys(steps, 5.0), "hella": dict.fromkeys(steps, 0.25)}
    values["val"][last] = loss
    return values


def dots(ax):
    lines = [line for line in ax.get_lines() if line.get_linestyle() == "None"]
    return sorted((x, y) for line in lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True))


def test_published_runs_are_grey_dots_beside_a_run_of_the_recipe():
    figure = plot.draw({"log": recipe_run(600, 5.2)})
    assert dots(figure.axes[0]) == [(250, 6.099), (250, 6.167), (500, 5.283), (500, 5.315)]
    assert dots(figure.axes[1]) == [(250, 0.2437), (500, 0.2348)]
    assert "published runs" in legend(figure.axes[0]) and "published runs" in legend(figure.axes[1])
    figure = plot.draw({"log": recipe_run(19073, 3.07)}, tokens_per_step=524288)
    assert len(dots(figure.axes[0])) == 18 and len(dots(figure.axes[1])) == 9
    assert dots(figure.axes[0])[-1] == pytest.approx((19072 * 524288 / 1e9, 3.083))
    (loss,) = plot.draw({"log": {**recipe_run(600, 5.2), "hella": {}}}, tokens_per_step=524288).axes  # HellaSwag is off
    assert [y for _, y in dots(loss)] == [6.099, 6.167, 5.283, 5.315]
    short = {step: 5.0 for step in (0, 100)}
    for runs, tokens, with_reference in [
        ({"log": recipe_run(600, 5.2)}, None, False),
        ({"log": recipe_run(600, 5.2)}, 1024, True),  # another batch
        ({"log": {**recipe_run(600, 5.2), "hella": {}}}, None, True),  # other data
        ({"log": {"train": {}, "val": short, "hella": short}}, None, True),  # none that early
    ]:
        for ax in plot.draw(runs, tokens, with_reference).axes:
            assert dots(ax) == []
            assert "published runs" not in legend(ax)
            assert with_reference or references(ax) == []


@pytest.mark.parametrize(
    ("last", "loss", "verdict"),
    [
        (250, 6.12, "after 250 steps: within the published runs' 6.099 to 6.167"),
        (500, 5.2, "after 500 steps: 0.0830 below the published runs' 5.283 to 5.315"),
        (1000, 4.5, "after 1000 steps: 0.2970 above the published runs' 4.168 to 4.203"),
        (19073, 3.06, "after 19073 steps: within the published runs' 3.054 to 3.083"),
        (19072, 3.26, "after 19072 steps: 0.1770 above the published runs' 3.054 to 3.083"),
        (60, 6.5, None),
        (400, 5.6, None),
        (3000, 3.5, None),
    ],
)
def test_says_where_the_last_validation_loss_is(tmp_path, capsys, last, loss, verdict):
    text = "".join(f"{step} val {value:.4f}\n" for step, value in recipe_run(last, loss)["val"].items())
    log = str(write_log(tmp_path, text + f"{last} hella 0.2500\n"))
    plot.main([log])
    lines = [line for line in capsys.readouterr().out.splitlines() if "published" in line]
    assert lines == ([f"{tmp_path.name}: validation loss {loss:.4f} {verdict}"] if verdict else [])
    for flags in (["--no_reference"], ["--tokens_per_step=1024"]):
        plot.main([log, *flags])
        assert "published" not in capsys.readouterr().out
    write_log(tmp_path, text)  # another text: it has no HellaSwag
    plot.main([log])
    assert "published" not in capsys.readouterr().out
    plot.main([log, "--tokens_per_step=524288"])  # unless one says that it is the recipe
    lines = [line for line in capsys.readouterr().out.splitlines() if "published" in line]
    assert lines == ([f"{tmp_path.name}: validation loss {loss:.4f} {verdict}"] if verdict else [])


def test_the_reference_is_the_readmes():
    rows = [line.strip("| ").split(" | ") for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()]
    (steps,) = [[int(step) for step in row[1:]] for row in rows if row[0] == "steps"]
    losses = [[float(loss) for loss in row[1:]] for row in rows if row[0].startswith("validation loss, ")]
    (accuracies,) = [[float(value) for value in row[1:]] for row in rows if row[0].startswith("HellaSwag, ")]
    assert list(plot.PUBLISHED) == steps
    assert [accuracy for _, _, accuracy in plot.PUBLISHED.values()] == accuracies
    for (low, high, _), *published in zip(plot.PUBLISHED.values(), *losses, strict=True):
        assert low == min(published)
        assert max(published) <= high < max(published) + 0.02


def png_size(path):
    """(width, height) of a PNG file, whose first chunk says them."""
    start = path.read_bytes()[:24]
    assert start.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", start[16:])


def test_writes_the_picture_beside_the_first_log(tmp_path, capsys):
    write_log(tmp_path / "a")
    write_log(tmp_path / "b", "0 val 10.9500\n40 val 6.0000\n20 train 6.500000\n")
    plot.main([str(tmp_path / "a"), str(tmp_path / "b" / "log.txt"), str(tmp_path / "a" / "log.txt")])
    assert png_size(tmp_path / "a" / "log.png") == (1800, 760)
    assert sorted(os.listdir(tmp_path / "a")) == ["log.png", "log.txt"]
    assert os.listdir(tmp_path / "b") == ["log.txt"]
    assert capsys.readouterr().out.splitlines() == [
        "a: last step 3, lowest validation loss 7.9000 at step 3, highest HellaSwag accuracy 0.2501 at step 2",
        "b: last step 40, lowest validation loss 6.0000 at step 40",
        f"picture: {tmp_path / 'a' / 'log.png'}",
    ]


def test_the_defaults_and_out(tmp_path, monkeypatch):
    write_log(tmp_path / "log", LOG.replace("hella", "other"))
    monkeypatch.setattr(plot, "HERE", tmp_path)
    plot.main([])
    assert png_size(tmp_path / "log" / "log.png") == (1200, 760)
    plot.main([f"--out={tmp_path / 'mine.PNG'}", "--tokens_per_step=524288"])
    assert png_size(tmp_path / "mine.PNG") == (1200, 760)
    assert (tmp_path / "mine.PNG").read_bytes() != (tmp_path / "log" / "log.png").read_bytes()


def test_bad_input_is_a_user_error(tmp_path):
    log = str(write_log(tmp_path))
    with pytest.raises(UserError, match="no values"):
        plot.main([str(write_log(tmp_path / "empty", ""))])
    with pytest.raises(UserError, match="none is not there"):
        plot.main([log, str(tmp_path / "none")])
    with pytest.raises(UserError, match="cannot be read"):
        plot.read_log(tmp_path)  # a folder
    with pytest.raises(UserError, match="cannot be written"):
        plot.main([log, f"--out={tmp_path / 'none' / 'log.png'}"])
    for flags in (["--out=log.svg"], ["--tokens_per_step=0"], ["--tokens_per_step=x"], ["--colour=red"]):
        with pytest.raises(UserError) as error:
            plot.main([log, *flags])
        assert error.value.status == 2
    assert not (tmp_path / "log.png").exists()


def test_without_matplotlib(tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="^plotting needs matplotlib: pip install matplotlib$"):
        plot.main([str(write_log(tmp_path))])


def python(*words):
    options = {"capture_output": True, "text": True, "encoding": "utf-8", "timeout": 100, "cwd": ROOT}
    return subprocess.run([sys.executable, *words], check=False, **options)


def test_a_missing_log_ends_in_one_line(tmp_path):
    run = python("plot.py", str(tmp_path / "none"))
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.splitlines() == [
        f"plot.py: {tmp_path / 'none'} is not there: train first, or name the folder of another run"
    ]


def test_importing_it_imports_no_matplotlib():
    run = python("-c", "import sys, plot; print([name for name in ('matplotlib', 'torch') if name in sys.modules])")
    assert (run.returncode, run.stdout, run.stderr) == (0, "[]\n", "")
