"""The picture shows what the log says, and mistakes end in one line."""

import itertools
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
    """The curves of a panel, without what it is compared with: {(kind, color): (x, y)}."""
    kinds = {None: "measured", 0.5: "training", 0.2: "raw"}
    found = {}
    for line in ax.get_lines():
        color = line.get_color()
        if line.get_linestyle() == "-" and color.startswith("C"):
            found[kinds[line.get_alpha()], color] = (list(line.get_xdata()), list(line.get_ydata()))
    return found


def levels(ax):
    """The dashed lines of a panel, as (height, the words on it)."""
    heights = [line.get_ydata()[0] for line in ax.get_lines() if line.get_linestyle() == "--"]
    return list(zip(heights, [text.get_text() for text in ax.texts], strict=True))


def legend(figure):
    return [text.get_text() for box in figure.legends for text in box.get_texts()]


def panels(*arguments, **options):
    return plot.draw(*arguments, **options).axes


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
    assert ax.get_xlim()[0] < 0 and ax.get_xlim()[1] > 3


def test_one_run_in_two_panels():
    figure = plot.draw({"log": VALUES})
    loss, hella = figure.axes
    assert curves(loss) == {
        ("training", "C0"): ([0, 1, 2], [10.954321, 9.5, 8.25]),
        ("measured", "C0"): ([0, 2, 3], [10.95, 8.1234, 7.9]),
    }
    assert curves(hella) == {("measured", "C0"): ([0, 2, 3], [0.2463, 0.2501, 0.248])}
    assert legend(figure) == ["training", "validation"]
    assert levels(loss) == [(3.29, "GPT-2 124M (3.29)")]
    assert levels(hella) == [(0.2955, "GPT-2 124M (0.2955)"), (0.337, "GPT-3 124M (0.337)")]
    assert loss.get_xlabel() == hella.get_xlabel() == "steps"
    assert loss.get_ylabel() == "loss (nats per token)"
    assert hella.get_ylabel() == "HellaSwag accuracy"
    for ax in (loss, hella):
        assert_all_is_in_view(ax)


def test_a_run_better_than_what_it_is_compared_with():
    for ax in panels({"log": {"train": {0: 2.5}, "val": {0: 2.6, 3: 2.4}, "hella": {0: 0.4, 3: 0.5}}}):
        assert_all_is_in_view(ax)


def test_a_run_without_hellaswag_is_one_panel_without_gpt2():
    (loss,) = panels({"log": NO_HELLA})
    assert [kind for kind, _ in curves(loss)] == ["training", "measured"]
    assert levels(loss) == []


def test_the_curves_lie_above_each_other_and_each_run_has_its_color():
    loss, hella = panels({"a": long_run(300, {0: 0.25}), "b": long_run(300, {0: 0.25})})
    for color in ("C0", "C1"):
        raw, train, val = [line for line in loss.get_lines() if line.get_color() == color]
        assert raw.get_alpha() < train.get_alpha() < 1 and val.get_alpha() is None
        assert raw.get_linewidth() < train.get_linewidth() < val.get_linewidth()
        assert raw.get_zorder() <= train.get_zorder() < val.get_zorder()
        assert ("measured", color) in curves(hella)


def test_several_runs_are_named_in_the_legend():
    other = {**VALUES, "val": {0: 10.9, 2: 5.0}}
    figure = plot.draw({"a": VALUES, "_$x^$": other, "c": NO_HELLA})
    # A dollar is a dollar, not the start of a formula.
    assert legend(figure) == ["a", r"_\$x^\$", "c", "training", "validation"]
    loss, hella = figure.axes
    assert curves(loss)["measured", "C1"] == ([0, 2], [10.9, 5.0])
    assert [color for _, color in curves(hella)] == ["C0", "C1"]


LONG = "a_very_long_name_" * 12


@pytest.mark.parametrize(
    "names", [["log"], ["a", "b"], ["a", LONG], [LONG, LONG + "b"], [f"run {i}" for i in range(12)]]
)
@pytest.mark.parametrize("values", [VALUES, NO_HELLA])
def test_the_legend_covers_no_panel(names, values):
    """It is above them, whole, and they keep their size."""
    heights = []
    for which in (["log"], names):
        figure = plot.draw(dict.fromkeys(which, values))
        figure.draw_without_rendering()
        (box,) = [box.get_window_extent() for box in figure.legends]
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
        for ax in figure.axes:
            assert ax.get_tightbbox().y1 <= box.y0
        heights.append(figure.axes[0].get_window_extent().height)
    assert heights[1] == pytest.approx(heights[0], rel=0.03)
    assert "".join(legend(figure)).replace("\n", "").startswith(names[0] if len(names) > 1 else "training")


def test_the_training_loss_is_smoothed_over_a_fiftieth_of_the_run():
    steps = range(1000)
    noisy = {step: 4 - step / 1000 + (-1) ** step for step in steps}
    (loss,) = panels({"log": {"train": noisy, "val": {}, "hella": {}}})
    assert curves(loss)["raw", "C0"] == (list(steps), list(noisy.values()))
    xs, averages = curves(loss)["training", "C0"]
    assert xs == list(steps)
    assert averages[500] == pytest.approx(sum(noisy[step] for step in range(490, 511)) / 21)
    assert averages[3] == pytest.approx(sum(noisy[step] for step in range(7)) / 7)  # still centered
    assert averages[0] == noisy[0]
    assert averages[999] == pytest.approx(sum(noisy[step] for step in range(989, 1000)) / 11)
    assert max(abs(averages[step] - (4 - step / 1000)) for step in range(20, 1000)) < 0.12


def test_few_losses_are_not_smoothed():
    run = long_run(60)
    figure = plot.draw({"log": run})
    assert list(curves(figure.axes[0])) == [("training", "C0"), ("measured", "C0")]
    assert curves(figure.axes[0])["training", "C0"][1] == list(run["train"].values())
    assert legend(figure) == ["training", "validation"]
    assert legend(plot.draw({"log": long_run(100)})) == ["training, smoothed", "validation"]


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
    for ax in panels({"log": VALUES}, tokens_per_step):
        assert ax.get_xlabel() == label
        for (kind, _), (x, _) in curves(ax).items():
            steps = [0, 1, 2] if kind == "training" else [0, 2, 3]
            assert x == pytest.approx([step * tokens_per_step / unit for step in steps])


def note(ax):
    return ax.get_title(loc="left")


def test_a_long_run_is_not_flattened_by_its_first_losses():
    """Nor by a spike. What is cut off at the top is said there; a short run is shown whole."""
    for steps, hella in [(5000, None), (5000, {0: 0.25}), (19073, None)]:
        ax = panels({"log": long_run(steps, hella)})[0]
        bottom, top = ax.get_ylim()
        assert 2.5 < bottom < 3.05 and 3.2 < top < 8.5
        assert note(ax) == "\N{UPWARDS ARROW} starts at 10.95"
    for steps in (60, 400):
        ax = panels({"log": long_run(steps)})[0]
        bottom, top = ax.get_ylim()
        assert 2.5 < bottom < 3.01 and 10.95 < top < 12
        assert note(ax) == ""
    with_a_short_one = panels({"long": long_run(5000), "short": long_run(60)})[0].get_ylim()
    assert with_a_short_one == panels({"long": long_run(5000)})[0].get_ylim()


def test_no_late_validation_loss_is_cut_off():
    run = long_run(5000)
    run["val"] = {0: 10.95, 200: 7.0, 4000: 5.5, 5000: 3.01}
    bottom, top = panels({"log": run})[0].get_ylim()
    assert bottom < 3.01 and 5.5 < top < 6


@pytest.mark.parametrize("with_reference", [True, False])
def test_hellaswag_alone_is_a_picture_too(with_reference):
    loss, hella = panels({"log": {"train": {}, "val": {}, "hella": {0: 0.25}}}, with_reference=with_reference)
    assert curves(loss) == {} and curves(hella) == {("measured", "C0"): ([0], [0.25])}
    assert len(levels(loss)) == with_reference


@pytest.mark.parametrize("text", ["0 val 10.9500\n", "0 train 10.954321\n", "0 hella 0.2500\n", "7 val 3.2900\n"])
def test_one_value_is_a_picture_too(tmp_path, text):
    """As a point: a line of one point would show nothing."""
    plot.main([str(write_log(tmp_path, text))])
    assert (tmp_path / "log.png").exists()
    axes = panels({"log": plot.read_log(tmp_path / "log.txt")})
    (line,) = [line for ax in axes for line in ax.get_lines() if line.get_linestyle() == "-"]
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


def gray_lines(ax):
    lines = [line for line in ax.get_lines() if line.get_linestyle() == "-" and not line.get_color().startswith("C")]
    return [list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in lines]


PUBLISHED = ["published run of the lecture's script", "other published runs"]


def test_published_runs_are_drawn_beside_a_run_of_the_recipe():
    figure = plot.draw({"log": recipe_run(600, 5.2)})
    loss, hella = figure.axes
    assert gray_lines(loss) == [[(0, 10.9516), (250, 6.1729), (500, 5.3026)]]
    assert gray_lines(hella) == [[(0, 0.2482), (250, 0.2448), (500, 0.2416)]]
    assert dots(loss) == [(250, 6.099), (250, 6.106), (250, 6.167), (500, 5.283), (500, 5.313), (500, 5.315)]
    assert dots(hella) == [(250, 0.2437), (500, 0.2348)]
    assert legend(figure)[-2:] == PUBLISHED
    for ax in figure.axes:
        order = {line.get_color()[0]: line.get_zorder() for line in ax.get_lines() if line.get_alpha() is None}
        assert order["0"] < order["C"]  # the run is in front

    # HellaSwag is off, and a flag says that it is the recipe.
    (loss,) = panels({"log": {**recipe_run(600, 5.2), "hella": {}}}, tokens_per_step=524288)
    assert [y for _, y in dots(loss)] == [6.099, 6.106, 6.167, 5.283, 5.313, 5.315]
    assert [y for _, y in gray_lines(loss)[0]] == [10.9516, 6.1729, 5.3026]


def test_the_whole_published_run():
    loss, hella = panels({"log": recipe_run(19073, 3.07)}, tokens_per_step=524288)
    end = pytest.approx(19072 * 524288 / 1e9)
    for ax, last, count in [(loss, 3.0750, 22), (hella, 0.3033, 9)]:
        (line,) = gray_lines(ax)
        assert len(line) == 78 and line[-1] == (end, last)
        assert len(dots(ax)) == count
    assert dots(loss)[-1] == (end, 3.0829)
    assert gray_lines(panels({"log": recipe_run(18999, 3.07)})[0])[0][-1] == (18750, 3.0822)


def test_late_dots_are_in_view():
    """Those of the first twentieth, where the losses fall steeply, need not be."""
    run = {**recipe_run(19073, 3.07), "val": {0: 10.95, 5000: 3.3, 19073: 3.07}}
    loss = panels({"log": run})[0]
    assert 4.203 < loss.get_ylim()[1] < 4.6


SHORT = dict.fromkeys((0, 100), 5.0)


@pytest.mark.parametrize(
    ("values", "tokens_per_step", "with_reference"),
    [
        (recipe_run(600, 5.2), None, False),
        (recipe_run(600, 5.2), 1024, True),  # another batch
        ({**recipe_run(600, 5.2), "hella": {}}, None, True),  # other data
        ({"train": {}, "val": SHORT, "hella": SHORT}, None, True),  # none that early
    ],
)
def test_published_runs_are_not_drawn_beside_any_other_run(values, tokens_per_step, with_reference):
    figure = plot.draw({"log": values}, tokens_per_step, with_reference)
    for ax in figure.axes:
        assert dots(ax) == [] and gray_lines(ax) == []
        assert with_reference or levels(ax) == []
    assert legend(figure) == ["validation"]


@pytest.mark.parametrize(
    ("last", "loss", "verdict"),
    [
        (250, 6.12, "after 250 steps: within the published runs' 6.099 to 6.173"),
        (250, 6.173, "after 250 steps: within the published runs' 6.099 to 6.173"),
        (500, 5.2, "after 500 steps: 0.0830 below the published runs' 5.283 to 5.315"),
        (1000, 4.5, "after 1000 steps: 0.2970 above the published runs' 4.135 to 4.203"),
        (1500, 3.85, "after 1500 steps: within the published run's 3.808 +- 0.05: 3.758 to 3.858"),
        (3000, 3.55, "after 3000 steps: 0.0190 above the published run's 3.501 +- 0.03: 3.471 to 3.531"),
        (19073, 3.06, "after 19073 steps: within the published runs' 3.054 to 3.083"),
        (19072, 3.26, "after 19072 steps: 0.1770 above the published runs' 3.054 to 3.083"),
        (60, 6.5, None),
        (100, 5.6, None),
    ],
)
def test_says_where_the_last_validation_loss_is(last, loss, verdict):
    line = plot.compare(recipe_run(last, loss))
    assert line == (f"validation loss {loss:.4f} {verdict}" if verdict else None)


def test_only_a_run_of_the_recipe_is_compared(tmp_path, capsys):
    text = "0 val 10.9500\n250 val 6.1200\n"
    log = str(write_log(tmp_path, text + "250 hella 0.2500\n"))
    verdict = "validation loss 6.1200 after 250 steps: within the published runs' 6.099 to 6.173"

    def published_lines(*flags):
        plot.main([log, *flags])
        return [line for line in capsys.readouterr().out.splitlines() if "published" in line]

    assert published_lines() == [f"{tmp_path.name}: {verdict}"]
    assert published_lines("--no_reference") == []
    assert published_lines("--tokens_per_step=1024") == []
    write_log(tmp_path, text)  # another text: it has no HellaSwag
    assert published_lines() == []
    assert published_lines("--tokens_per_step=524288") == [f"{tmp_path.name}: {verdict}"]  # unless one says what it is


def test_compares_the_newest_loss_that_can_be_compared():
    values = recipe_run(730, 4.7)
    assert (
        plot.compare(values)
        == "validation loss 5.0000 after 500 steps: 0.2830 below the published runs' 5.283 to 5.315"
    )
    values["val"].pop(500)
    assert "after 250 steps" in plot.compare(values)
    assert plot.compare({"val": {0: 10.95, 60: 6.5}}) is None
    assert plot.compare({"val": {}}) is None


def test_every_published_evaluation_can_be_compared_and_agrees_with_the_others():
    for step, loss in plot.LECTURE["val"].items():
        if step > 0:
            low, high, _ = plot.published_range(step)
            assert low - 0.0005 <= loss <= high + 0.0005
            assert high - low <= 0.11
    losses = list(plot.LECTURE["val"].values())
    rises = [after - before for before, after in itertools.pairwise(losses)]
    assert max(rises) < 0.01  # a wrong digit would show
    assert sum(losses) == pytest.approx(268.3462)
    assert sum(plot.LECTURE["hella"].values()) == pytest.approx(22.1304)


def test_the_published_losses_are_the_readmes():
    rows = [line.strip("| ").split(" | ") for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()]
    (steps,) = [[int(step) for step in row[1:]] for row in rows if row[0] == "steps"]
    for title, kind in [("validation loss, ", "val"), ("HellaSwag, ", "hella")]:
        published = [[float(value) for value in row[1:]] for row in rows if row[0].startswith(title)]
        assert published
        for row in published:
            for step, value in zip(steps, row, strict=True):
                known = [plot.LECTURE[kind][step], *plot.OTHERS[kind][step]]
                assert min(abs(value - other) for other in known) < 0.0006


def png_size(path):
    """(width, height) of a PNG file, whose first chunk says them."""
    start = path.read_bytes()[:24]
    assert start.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", start[16:])


def test_one_run_is_drawn_beside_its_log(tmp_path, monkeypatch, capsys):
    write_log(tmp_path / "runs" / "a")
    monkeypatch.chdir(tmp_path)
    plot.main([os.path.join("runs", "a"), os.path.join("runs", "a", "log.txt")])  # twice the same
    width, height = png_size(Path("runs/a/log.png"))
    assert width == 1800 and 720 < height < 850
    assert sorted(os.listdir("runs/a")) == ["log.png", "log.txt"]
    assert os.listdir() == ["runs"]
    assert capsys.readouterr().out.splitlines() == [
        "a: last step 3, lowest validation loss 7.9000 at step 3, highest HellaSwag accuracy 0.2501 at step 2",
        f"picture: {Path('runs/a/log.png')}",
    ]


def test_several_runs_are_drawn_in_the_current_folder(tmp_path, monkeypatch, capsys):
    write_log(tmp_path / "a")
    write_log(tmp_path / "b", "0 val 10.9500\n40 val 6.0000\n20 train 6.500000\n")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    plot.main([str(tmp_path / "a"), str(tmp_path / "b" / "log.txt")])
    assert os.listdir() == ["runs.png"]
    assert os.listdir(tmp_path / "a") == os.listdir(tmp_path / "b") == ["log.txt"]
    assert capsys.readouterr().out.splitlines() == [
        "a: last step 3, lowest validation loss 7.9000 at step 3, highest HellaSwag accuracy 0.2501 at step 2",
        "b: last step 40, lowest validation loss 6.0000 at step 40",
        "picture: runs.png",
    ]
    plot.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out=ab.png"])
    assert sorted(os.listdir()) == ["ab.png", "runs.png"]


def test_names_the_checkpoint_with_the_lowest_validation_loss(tmp_path, monkeypatch, capsys):
    write_log(tmp_path / "log", "0 val 10.9500\n520 val 5.8000\n650 val 5.8200\n")
    monkeypatch.chdir(tmp_path)

    def summary(name):
        plot.main([name])
        return capsys.readouterr().out.splitlines()[0]

    (tmp_path / "log" / "model_00650.pt").touch()
    without = "log: last step 650, lowest validation loss 5.8000 at step 520"
    assert summary("log") == without
    (tmp_path / "log" / "model_00520.pt").touch()
    for name in ("log", os.path.join("log", "log.txt")):
        assert summary(name) == f"{without} ({Path('log/model_00520.pt')})"
    assert summary(str(tmp_path / "log")) == f"{without} ({tmp_path / 'log' / 'model_00520.pt'})"
    monkeypatch.setattr(plot, "HERE", Path.cwd())
    plot.main([])
    assert f"({Path('log/model_00520.pt')})" in capsys.readouterr().out


def test_the_defaults_and_out(tmp_path, monkeypatch):
    write_log(tmp_path / "log", LOG.replace("hella", "other"))
    monkeypatch.setattr(plot, "HERE", tmp_path)
    plot.main([])
    width, height = png_size(tmp_path / "log" / "log.png")
    assert width == 1200 and 720 < height < 850
    plot.main([f"--out={tmp_path / 'mine.PNG'}", "--tokens_per_step=524288"])
    assert png_size(tmp_path / "mine.PNG") == (width, height)
    assert (tmp_path / "mine.PNG").read_bytes() != (tmp_path / "log" / "log.png").read_bytes()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    plot.main(["~/log", "--out=~/home.png"])
    assert (tmp_path / "home.png").exists()


def test_the_log_is_never_overwritten(tmp_path):
    log = tmp_path / "log.png"
    log.write_text(LOG, encoding="utf-8")
    with pytest.raises(UserError, match="is the log itself"):
        plot.main([str(log)])
    assert log.read_text(encoding="utf-8") == LOG


def test_bad_input_is_a_user_error(tmp_path):
    log = str(write_log(tmp_path))
    with pytest.raises(UserError, match="no values"):
        plot.main([str(write_log(tmp_path / "empty", ""))])
    with pytest.raises(UserError, match="none is not there: train first"):
        plot.main([log, str(tmp_path / "none")])
    with pytest.raises(UserError, match="cannot be read"):
        plot.read_log(tmp_path)  # a folder
    with pytest.raises(UserError, match="cannot be written"):
        plot.main([log, f"--out={tmp_path / 'none' / 'log.png'}"])
    for flags in (["--out=log.svg"], ["--tokens_per_step=0"], ["--tokens_per_step=x"], ["--color=red"]):
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
