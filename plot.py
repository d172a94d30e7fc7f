"""
Draw the log of train_gpt2.py as a picture: the loss and, if it was measured, the accuracy on HellaSwag.

    python plot.py                            # log/log.txt, drawn in log/log.png
    python plot.py runs/a runs/b              # several runs (their folders, or their log files), drawn in runs.png
    python plot.py --tokens_per_step=524288   # over the tokens trained on, instead of the steps
    python plot.py --help                     # every setting

The loss is in nats per token: -ln(the probability that the model gave to the token that came). The training loss of a
single step is noisy, because it is measured on that step's few tokens alone. In a run of 100 steps or more it is drawn
faintly, and through it a moving average over a fiftieth of the run.

A run with HellaSwag's accuracy, or with --tokens_per_step=524288, is taken for one of the recipe on FineWeb-Edu. Then
published runs are drawn beside it (without --no_reference), and a line says how its validation loss compares to theirs.
A run that is still training can be drawn, too.
"""

import math
import os
import re
import textwrap
from pathlib import Path

from fineweb import Parser, UserError, expand_home, replace_file, run_main

HERE = Path(__file__).resolve().parent

# ----------------------------------------------------------------------------------------------------------------------
# What others measured

RECIPE_TOKENS_PER_STEP = 524288
# OpenAI's weights and GPT-3: the loss on the validation shard of FineWeb-Edu is from the lecture, GPT-2's accuracy from
# hellaswag.py, GPT-3's from Brown et al. 2020, table H.1.
GPT2_LOSS = 3.29
HELLASWAG = {"GPT-2 124M": 0.2955, "GPT-3 124M": 0.337}

# The lecture's own script, unchanged (commit 6104ab1), on FineWeb-Edu, as published by rahulmeena/build-nanogpt: an
# evaluation every 250 steps, 2,500 steps a row, and one after 19,072.
LECTURE_STEPS = [*range(0, 19001, 250), 19072]
LECTURE_LOSSES = """
10.9516 6.1729 5.3026 4.5882 4.1353 3.9475 3.8081 3.7200 3.6628 3.6047
3.5707 3.5337 3.5010 3.4833 3.4571 3.4319 3.4113 3.3997 3.3856 3.3694
3.3542 3.3384 3.3403 3.3214 3.3114 3.2954 3.2847 3.2784 3.2723 3.2622
3.2529 3.2479 3.2429 3.2359 3.2265 3.2213 3.2143 3.2096 3.2048 3.1959
3.1938 3.1869 3.1779 3.1750 3.1727 3.1661 3.1601 3.1557 3.1521 3.1460
3.1438 3.1386 3.1349 3.1309 3.1275 3.1239 3.1211 3.1184 3.1162 3.1138
3.1087 3.1055 3.1039 3.0998 3.0998 3.0987 3.0952 3.0926 3.0901 3.0884
3.0867 3.0868 3.0854 3.0845 3.0836 3.0822 3.0758 3.0750
"""
LECTURE_HELLASWAG = """
0.2482 0.2448 0.2416 0.2461 0.2550 0.2561 0.2573 0.2590 0.2607 0.2620
0.2631 0.2657 0.2662 0.2682 0.2722 0.2700 0.2740 0.2716 0.2755 0.2750
0.2752 0.2790 0.2790 0.2809 0.2796 0.2816 0.2796 0.2812 0.2806 0.2814
0.2845 0.2815 0.2825 0.2835 0.2834 0.2848 0.2844 0.2865 0.2892 0.2866
0.2882 0.2910 0.2885 0.2874 0.2873 0.2921 0.2897 0.2920 0.2921 0.2926
0.2938 0.2907 0.2952 0.2950 0.2935 0.2963 0.2999 0.2941 0.2972 0.2986
0.2964 0.2995 0.2982 0.2989 0.3004 0.2989 0.3016 0.2995 0.3003 0.3006
0.2989 0.2996 0.3002 0.2985 0.3001 0.2998 0.3032 0.3033
"""
LECTURE = {
    "val": dict(zip(LECTURE_STEPS, map(float, LECTURE_LOSSES.split()), strict=True)),
    "hella": dict(zip(LECTURE_STEPS, map(float, LECTURE_HELLASWAG.split()), strict=True)),
}
# Other runs of the recipe. The losses are from garg-aayush/building-from-scratch, allenporter/nano-gpt (its own
# validation data; where it started several times, the lowest and the highest) and, at the end, hitkumar/llms. The
# accuracy is garg-aayush's.
OTHERS = {
    "val": {
        250: (6.167, 6.099, 6.106),
        500: (5.313, 5.283, 5.315),
        750: (4.653, 4.663),
        1000: (4.168, 4.189, 4.203),
        2500: (3.577, 3.547),
        5000: (3.352, 3.326),
        10000: (3.185, 3.172),
        15000: (3.101, 3.088),
        19072: (3.066, 3.054, 3.0829),
    },
    "hella": {
        250: (0.2437,),
        500: (0.2348,),
        750: (0.2441,),
        1000: (0.2560,),
        2500: (0.2634,),
        5000: (0.2756,),
        10000: (0.2906,),
        15000: (0.3035,),
        19072: (0.3066,),
    },
}


def is_recipe(with_hella, tokens_per_step):
    """Whether published runs can be compared: the flag says so or, without it, HellaSwag, which means FineWeb-Edu."""
    return tokens_per_step == RECIPE_TOKENS_PER_STEP or (with_hella and tokens_per_step is None)


def published_range(step):
    """Where published runs are after this many steps: (lowest loss, highest loss, whose these are), or None."""
    if step == 19073:
        # The lecture's script evaluates before its last step, this one after it.
        step = 19072
    # An untrained model's loss says nothing about training.
    if step == 0 or step not in LECTURE["val"]:
        return None
    loss = LECTURE["val"][step]
    if step in OTHERS["val"]:
        losses = [loss, *OTHERS["val"][step]]
        return round(min(losses), 3), round(max(losses), 3), "the published runs'"
    # Only the lecture's run was evaluated here. Where the others were, they differ from it by up to 0.07 at 1,000 steps
    # and by less than 0.03 from 2,500 on. In between, the difference is taken to be 0.05.
    tolerance = 0.05 if step < 2500 else 0.03
    return round(loss - tolerance, 3), round(loss + tolerance, 3), f"the published run's {loss:.3f} +- {tolerance}:"


def compare(values):
    """One line on where the newest comparable validation loss is relative to published runs; None if there is none."""
    steps = [step for step in values["val"] if published_range(step)]
    if not steps:
        return None
    step = max(steps)
    loss = values["val"][step]
    low, high, whose = published_range(step)
    place = "within"
    if loss > high:
        place = f"{loss - high:.4f} above"
    if loss < low:
        place = f"{low - loss:.4f} below"
    return f"validation loss {loss:.4f} after {step} steps: {place} {whose} {low:.3f} to {high:.3f}"


# ----------------------------------------------------------------------------------------------------------------------
# The log


def read_log(path):
    """The values in a log: {"train": {step: loss}, "val": {step: loss}, "hella": {step: accuracy}}.

    A line that is not as train_gpt2.py writes it, to the last decimal, is left out: the last one may be only half there
    while a run is writing it. Raises UserError where there is no log, or no value in it.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there: train first, or name the folder of another run") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    values = {"train": {}, "val": {}, "hella": {}}
    for line in lines:
        if match := re.fullmatch(r"(\d{1,12}) (train \d{1,9}\.\d{6}|val \d{1,9}\.\d{4}|hella \d{1,9}\.\d{4})", line):
            kind, value = match[2].split()
            values[kind][int(match[1])] = float(value)
    if not any(values.values()):
        raise UserError(f"{path} has no values in it (yet): a line of a log reads like '250 val 6.1604'")
    return values


def name_runs(paths):
    """A distinct name for each log: its folder's, after as many of the folders above as that takes. A file that is not
    called log.txt counts with its own name."""
    paths = [Path(os.path.abspath(path)) for path in paths]
    places = [path.parent.parts if path.name == "log.txt" else path.parts for path in paths]
    names, depth = [], 0
    while len(set(names)) < len(set(places)):
        depth += 1
        names = [Path(*place[-depth:]).as_posix() for place in places]
    return names


def last_step(values):
    return max(max(curve) for curve in values.values() if curve)


def summarize(name, values, folder):
    """One line on a run: how far it is, its best values, and the checkpoint in its folder that has the best loss."""
    line = f"{name}: last step {last_step(values)}"
    if val := values["val"]:
        step = min(val, key=val.get)
        line += f", lowest validation loss {val[step]:.4f} at step {step}"
        checkpoint = folder / f"model_{step:05d}.pt"
        if checkpoint.is_file():
            line += f" ({checkpoint})"
    if hella := values["hella"]:
        step = max(hella, key=hella.get)
        line += f", highest HellaSwag accuracy {hella[step]:.4f} at step {step}"
    return line


# ----------------------------------------------------------------------------------------------------------------------
# The picture


def smooth(curve):
    """The centered moving average of {step: value}, over about a fiftieth of the steps."""
    values = list(curve.values())
    reach = len(values) // 100
    averages = {}
    for i, step in enumerate(curve):
        # The first losses fall fast. There, an average that is not centered would be far off: it is over fewer steps.
        left = min(reach, i)
        window = values[i - left : i + left + 1]
        averages[step] = sum(window) / len(window)
    return averages


def until(last, curve):
    """The part of {step: value} up to the step `last`."""
    return {step: value for step, value in curve.items() if step <= last}


def x_axis(last, tokens_per_step):
    """The unit of the x axis and how many of it a step is."""
    if not tokens_per_step:
        return "steps", 1
    if last * tokens_per_step < 1e9:
        return "tokens (millions)", tokens_per_step / 1e6
    return "tokens (billions)", tokens_per_step / 1e9


def loss_limits(runs, last, others):
    """The y axis of the losses, (bottom, top), or None if there are none. others: more losses that it must include.

    The first steps fall from 10.9 to about 5. In a long run that cliff, a few pixels wide, would leave a strip at the
    bottom for everything else. So what follows the first twentieth has to fit, except for the highest hundredth of the
    training losses: a spike may leave at the top. The rest is shown, too, if that takes less than twice the height.
    """
    losses = list(others)
    late = list(others)
    for values in runs.values():
        train = [loss for step, loss in values["train"].items() if step >= last / 20]
        late += sorted(train)[: math.ceil(0.99 * len(train))]
        late += [loss for step, loss in values["val"].items() if step >= last / 20]
        losses += [*values["train"].values(), *values["val"].values()]
    if not losses:
        return None
    bottom = min(losses)
    top = max(late, default=bottom)
    if max(losses) - bottom < 2 * (top - bottom) or top == bottom:
        top = max(losses)
    margin = 0.04 * (top - bottom) or 0.5
    return bottom - margin, top + margin


def first_loss(runs):
    """The highest loss that a run begins with, or 0 if there are no losses."""
    curves = [values[kind] for values in runs.values() for kind in ("train", "val")]
    return max((next(iter(curve.values())) for curve in curves if curve), default=0)


def draw_curve(ax, curve, scale, **style):
    """Draw {step: value}, with points where few were measured (one alone makes no line). Returns the list of lines."""
    if not curve:
        return []
    marker = "o" if len(curve) < 25 else None
    xs = [step * scale for step in curve]
    return ax.plot(xs, list(curve.values()), marker=marker, markersize=3.5, **style)


def draw_level(ax, value, text, place):
    """A dashed line across the panel, with its name above or below it at the left, where no curve is that low."""
    ax.axhline(value, color="0.45", linewidth=1, linestyle="--", zorder=1)
    ax.annotate(
        f"{text} ({value})",
        xy=(0.01, value),
        xycoords=ax.get_yaxis_transform(),
        xytext=(0, 2 if place == "above" else -3),
        textcoords="offset points",
        va="bottom" if place == "above" else "top",
        fontsize=9,
        color="0.35",
    )


def draw_published(ax, kind, last, scale):
    """The published runs, in gray behind the run. Returns what the legend shows, [(lines, label)]."""
    style = {"color": "0.5", "zorder": 2}
    line = draw_curve(ax, until(last, LECTURE[kind]), scale, linewidth=1.5, **style)
    points = [(step, value) for step, values in until(last, OTHERS[kind]).items() for value in values]
    xs = [step * scale for step, _ in points]
    ys = [value for _, value in points]
    dots = ax.plot(xs, ys, linestyle="none", marker="o", markersize=5, markerfacecolor="white", **style)
    return [(line, "published run of the lecture's script"), (dots, "other published runs")]


def draw_legend(figure, entries):
    """A legend above the panels, for [(lines, label)]. The figure grows by its height."""
    from matplotlib.legend_handler import HandlerTuple

    # Even a name of wide letters fits into the figure, with so many characters a line.
    characters = round(8 * figure.get_figwidth())
    # A dollar sign would start a formula.
    labels = [textwrap.fill(label, characters).replace("$", r"\$") for _, label in entries]
    handles = [tuple(lines) for lines, _ in entries]
    for rows in range(1, len(entries) + 1):
        legend = figure.legend(
            handles,
            labels,
            ncols=math.ceil(len(entries) / rows),
            loc="outside upper center",
            fontsize=9,
            frameon=False,
            handler_map={tuple: HandlerTuple(ndivide=None)},  # the lines of several runs side by side
        )
        size = legend.get_window_extent()
        if size.width <= figure.bbox.width or rows == len(entries):
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + size.height / figure.dpi)


def draw_runs(axes, runs, scale):
    """The curves of the runs, each run in its color. Returns what the legend shows, [(lines, label)]."""
    from matplotlib.patches import Patch

    entries = []
    train_lines = []
    val_lines = []
    train_label = "training"
    for i, (name, values) in enumerate(runs.items()):
        color = f"C{i}"
        if len(runs) > 1:
            entries.append(([Patch(color=color)], name))
        train = values["train"]
        if len(train) >= 100:
            draw_curve(axes[0], train, scale, color=color, linewidth=0.6, alpha=0.2)
            train = smooth(train)
            train_label = "training, smoothed"
        train_lines += draw_curve(axes[0], train, scale, color=color, linewidth=1.2, alpha=0.5)
        val_lines += draw_curve(axes[0], values["val"], scale, color=color, linewidth=1.8, zorder=3)
        draw_curve(axes[-1], values["hella"], scale, color=color, linewidth=1.8, zorder=3)
    if train_lines:
        entries.append((train_lines, train_label))
    if val_lines:
        entries.append((val_lines, "validation"))
    return entries


def draw(runs, tokens_per_step=None, with_reference=True):
    """A picture of runs, {name: what read_log gives}, as a matplotlib Figure: the loss and, if any run has measured it,
    HellaSwag's accuracy beside it. Raises UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure  # not pyplot, which looks for a screen and keeps every figure
    except ImportError as error:
        raise UserError("plotting needs matplotlib: pip install matplotlib") from error

    last = max(last_step(values) for values in runs.values())
    unit, scale = x_axis(last, tokens_per_step)
    with_hella = any(values["hella"] for values in runs.values())
    with_published = with_reference and is_recipe(with_hella, tokens_per_step) and last >= min(OTHERS["val"])

    # Made for a README, where it is 900 pixels wide, or 600; drawn twice as large for screens that show more.
    figure = Figure(figsize=(9 if with_hella else 6, 3.6), dpi=200, layout="constrained")
    figure.get_layout_engine().set(wspace=0.05)
    axes = figure.subplots(1, 2 if with_hella else 1, squeeze=False)[0]
    for ax, title in zip(axes, ("loss (nats per token)", "HellaSwag accuracy"), strict=False):
        ax.set_ylabel(title)
        ax.set_xlabel(unit)
        end = last * scale or 1
        ax.set_xlim(-0.015 * end, 1.015 * end)
        ax.locator_params(axis="x", nbins=5, integer=not tokens_per_step)
        ax.xaxis.set_major_formatter("{x:,.10g}")
        ax.grid(color="0.92")
        ax.spines[["top", "right"]].set_visible(False)

    entries = draw_runs(axes, runs, scale)
    other_losses = []
    if with_hella and with_reference:
        # Such a run is on FineWeb-Edu. On any other text, GPT-2's loss is another.
        draw_level(axes[0], GPT2_LOSS, "GPT-2 124M", "below")
        other_losses += [GPT2_LOSS, GPT2_LOSS - 0.25]  # room for the name
        for name, accuracy in HELLASWAG.items():
            draw_level(axes[1], accuracy, name, "above")
        axes[1].margins(y=0.08)  # room for the upper one's name
    if with_published:
        entries += draw_published(axes[0], "val", last, scale)
        for step, losses in until(last, OTHERS["val"]).items():
            if step >= last / 20:
                other_losses += losses
        if with_hella:
            draw_published(axes[1], "hella", last, scale)

    limits = loss_limits(runs, last, other_losses)
    if limits:
        axes[0].set_ylim(limits)
        if first_loss(runs) > limits[1]:
            note = f"\N{UPWARDS ARROW} starts at {first_loss(runs):.2f}"
            axes[0].set_title(note, loc="left", fontsize=9, color="0.35")
    if entries:
        draw_legend(figure, entries)
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def parse_flags(argv):
    # Named as short as possible, because the output names files in it.
    own_log = "log" if Path.cwd() == HERE else str(HERE / "log")
    parser = Parser(prog="plot.py", description="Draw the logs of train_gpt2.py as a picture.")
    parser.add_argument(
        "logs",
        nargs="*",
        type=expand_home,
        default=[own_log],
        help="log files, or folders that have a log.txt [log]",
    )
    parser.add_argument(
        "--out",
        type=expand_home,
        metavar="FILE",
        help="the picture, a PNG file [of one log: beside it, of the same name; of several: runs.png]",
    )
    parser.add_argument(
        "--tokens_per_step",
        type=int,
        metavar="N",
        help="tokens per step: draws over tokens [over steps]",
    )
    parser.add_argument(
        "--no_reference",
        action="store_true",
        help="draw the runs alone, without published ones, GPT-2 and GPT-3",
    )
    options = parser.parse_args(argv)
    if options.out and not options.out.lower().endswith(".png"):
        parser.error("--out takes the name of a PNG file, such as log.png")
    if options.tokens_per_step is not None and not 1 <= options.tokens_per_step <= 2**32:
        parser.error("--tokens_per_step takes a number of tokens, such as 524288")
    return options


def find_logs(names):
    """The log files that are meant, each once, and as the user named them."""
    paths = {}
    for name in names:
        path = Path(name)
        if path.is_dir():
            path = path / "log.txt"
        paths.setdefault(os.path.abspath(path), path)
    return list(paths.values())


def main(argv=None):
    options = parse_flags(argv)
    paths = find_logs(options.logs)
    names = name_runs(paths)
    runs = {name: read_log(path) for name, path in zip(names, paths, strict=True)}
    figure = draw(runs, options.tokens_per_step, not options.no_reference)

    out = paths[0].with_suffix(".png") if len(paths) == 1 else Path("runs.png")
    if options.out:
        out = Path(options.out)
    if out.resolve() in [path.resolve() for path in paths]:
        raise UserError(f"{out} is the log itself: name another --out")
    try:
        replace_file(out, lambda temporary: figure.savefig(temporary, format="png"))
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): name another with --out") from error

    for path, (name, values) in zip(paths, runs.items(), strict=True):
        print(summarize(name, values, path.parent))
        if options.no_reference or not is_recipe(values["hella"], options.tokens_per_step):
            continue
        if comparison := compare(values):
            print(f"{name}: {comparison}")
    print(f"picture: {out}")


if __name__ == "__main__":
    run_main(main, interrupted="no picture was written")
