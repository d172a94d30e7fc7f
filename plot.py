"""
Draw the log of train_gpt2.py as a picture: the loss and, if it was measured, the accuracy on HellaSwag.

    python plot.py                              # log/log.txt, drawn in log/log.png
    python plot.py runs/a runs/b --out=ab.png   # several runs in one picture: their folders, or their log files
    python plot.py --tokens_per_step=524288     # over the tokens trained on, instead of the steps
    python plot.py --help                       # every setting

A run with HellaSwag's accuracy, or with --tokens_per_step=524288, is taken for one of the recipe on FineWeb-Edu. Then
published runs are drawn beside it (without --no_reference), and a line says how its last validation loss compares.
A run that is still training can be drawn, too. Needs matplotlib, which training does not: pip install matplotlib
"""

import os
import re
from pathlib import Path

from fineweb import Parser, UserError, replace_file, run_main

HERE = Path(__file__).resolve().parent

# OpenAI's weights and GPT-3: the loss on the validation shard of FineWeb-Edu is from the lecture, GPT-2's accuracy from
# hellaswag.py, GPT-3's from Brown et al. 2020, table H.1.
GPT2_LOSS = 3.29
HELLASWAG = {"GPT-2 124M": 0.2955, "GPT-3 124M": 0.337}
# Published runs of this recipe, {steps: (lowest, highest validation loss, HellaSwag accuracy)}. The losses are from
# garg-aayush/building-from-scratch, allenporter/nano-gpt (up to four starts) and, at the end, hitkumar/llms. The
# accuracy is garg-aayush's.
PUBLISHED = {
    250: (6.099, 6.167, 0.2437),
    500: (5.283, 5.315, 0.2348),
    750: (4.653, 4.663, 0.2441),
    1000: (4.168, 4.203, 0.2560),
    2500: (3.547, 3.577, 0.2634),
    5000: (3.326, 3.352, 0.2756),
    10000: (3.172, 3.185, 0.2906),
    15000: (3.088, 3.101, 0.3035),
    19072: (3.054, 3.083, 0.3066),
}
RECIPE_TOKENS_PER_STEP = 524288


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
    places = [path.parent.parts if path.name == "log.txt" else path.parts for path in paths]
    names, depth = [], 0
    while len(set(names)) < len(set(places)):
        depth += 1
        names = [Path(*place[-depth:]).as_posix() for place in places]
    return names


def last_step(values):
    return max(max(curve) for curve in values.values() if curve)


def summarize(name, values):
    """One line on a run: how far it is, and its best values."""
    line = f"{name}: last step {last_step(values)}"
    if val := values["val"]:
        step = min(val, key=val.get)
        line += f", lowest validation loss {val[step]:.4f} at step {step}"
    if hella := values["hella"]:
        step = max(hella, key=hella.get)
        line += f", highest HellaSwag accuracy {hella[step]:.4f} at step {step}"
    return line


def compare(values):
    """One line on where the last validation loss is relative to published runs, or None if none was measured there."""
    step = max(values["val"], default=0)
    # Published runs are evaluated before the last step, ours are after it.
    bands = [(low, high) for published, (low, high, _) in PUBLISHED.items() if step in (published, published + 1)]
    if not bands:
        return None
    loss, ((low, high),) = values["val"][step], bands
    place = "within"
    if not low <= loss <= high:
        place = f"{loss - high:.4f} above" if loss > high else f"{low - loss:.4f} below"
    return f"validation loss {loss:.4f} after {step} steps: {place} the published runs' {low} to {high}"


def loss_limits(runs, last, reference):
    """The y axis of the losses, (bottom, top).

    The first steps fall from 10.9 to about 5. In a long run that cliff, a few pixels wide, would leave a strip at the
    bottom for everything else. So in a run of 500 steps or more, only what follows the first twentieth has to fit, and
    of that the highest hundredth need not: a spike may leave at the top.
    """
    start, share = (last / 20, 0.99) if last >= 500 else (0, 1)
    curves = [values[kind] for values in runs.values() for kind in ("train", "val")]
    losses = sorted(loss for curve in curves for step, loss in curve.items() if step >= start) or reference
    top = max([losses[int(share * (len(losses) - 1))]] + reference)
    bottom = min([losses[0]] + reference)
    margin = 0.04 * (top - bottom) or 0.5
    return bottom - margin, top + margin


def is_recipe(with_hella, tokens_per_step):
    """Whether published runs can be compared: the flag says so or, without it, HellaSwag, which means FineWeb-Edu."""
    return tokens_per_step == RECIPE_TOKENS_PER_STEP or (with_hella and tokens_per_step is None)


def draw(runs, tokens_per_step=None, with_reference=True):
    """A picture of runs, {name: what read_log gives}, as a matplotlib Figure: the loss and, if any run has measured it,
    HellaSwag's accuracy beside it. Raises UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure  # not pyplot, which looks for a screen and keeps every figure
    except ImportError as error:
        raise UserError("plotting needs matplotlib: pip install matplotlib") from error

    last = max(last_step(values) for values in runs.values())
    scale, unit = 1, "steps"
    if tokens_per_step:
        size, word = (1e9, "billions") if last * tokens_per_step >= 1e9 else (1e6, "millions")
        scale, unit = tokens_per_step / size, f"tokens ({word})"

    def curve(ax, values, **style):
        if values:
            marker = "o" if len(values) < 25 else None  # show where the few were measured; one alone makes no line
            ax.plot([step * scale for step in values], values.values(), marker=marker, markersize=3, **style)

    def reference(ax, value, text, x, ha):
        ax.axhline(value, color="0.45", linewidth=1, linestyle="--", zorder=1)
        across = {"xycoords": ax.get_yaxis_transform(), "textcoords": "offset points", "fontsize": 9, "color": "0.35"}
        ax.annotate(f"{text} ({value})", (x, value), (0, 2), ha=ha, **across)

    # Made for a README, where it is 900 pixels wide, or 600; drawn twice as large for screens that show more.
    with_hella = any(values["hella"] for values in runs.values())
    figure = Figure(figsize=(9, 3.8) if with_hella else (6, 3.8), dpi=200, layout="constrained")
    axes = figure.subplots(1, 2 if with_hella else 1, squeeze=False)[0]
    for i, (name, values) in enumerate(runs.items()):
        name = name.replace("$", r"\$")  # else it is the start of a formula
        of_run = f", {name}" if len(runs) > 1 else ""
        curve(axes[0], values["train"], color=f"C{i}", linewidth=0.9, alpha=0.35, label=f"training{of_run}")
        curve(axes[0], values["val"], color=f"C{i}", linewidth=1.8, zorder=3, label=f"validation{of_run}")
        curve(axes[-1], values["hella"], color=f"C{i}", linewidth=1.8, zorder=3, label=name)
    if with_reference and is_recipe(with_hella, tokens_per_step):
        style = {"color": "0.65", "marker": "o", "markersize": 6, "linestyle": "none", "zorder": 2}  # behind the run
        published = {step * scale: values for step, values in PUBLISHED.items() if step <= last}
        columns_of_axes = (slice(2), slice(2, 3))  # two losses for each step, one accuracy
        for ax, columns in zip(axes, columns_of_axes, strict=False):
            dots = [(x, value) for x, values in published.items() for value in values[columns]]
            if dots:
                ax.plot(*zip(*dots, strict=True), label="published runs", **style)

    for ax, title, corner in zip(axes, ("Loss", "HellaSwag accuracy"), ("upper right", "best"), strict=False):
        ax.set_title(title)
        ax.set_xlabel(unit)
        ax.set_xlim(0, 1.02 * last * scale or 1)
        ax.locator_params(axis="x", nbins=5, integer=not tokens_per_step)
        ax.xaxis.set_major_formatter("{x:,.10g}")
        ax.grid(color="0.92")
        ax.spines[["top", "right"]].set_visible(False)
        if (curves := ax.get_lines()) and (len(runs) > 1 or len(curves) > 1 or title == "Loss"):
            legend = ax.legend(curves, [line.get_label() for line in curves], loc=corner)
            for line in legend.get_lines():
                line.set_linewidth(1.8)

    axes[0].set_ylim(loss_limits(runs, last, [GPT2_LOSS] if with_hella and with_reference else []))
    if with_hella and with_reference:  # a run on FineWeb-Edu, then: on any other text, GPT-2's loss is another
        reference(axes[0], GPT2_LOSS, "GPT-2 124M", x=0.99, ha="right")  # above the curve's end
        for name, accuracy in HELLASWAG.items():
            reference(axes[1], accuracy, name, x=0.01, ha="left")
        axes[1].margins(y=0.08)  # room for the upper one's name
    return figure


def parse_flags(argv):
    parser = Parser(prog="plot.py", description="Draw the logs of train_gpt2.py as a picture.")
    add = parser.add_argument
    add("logs", nargs="*", default=[str(HERE / "log")], help="log files, or folders that have a log.txt [log]")
    add("--out", metavar="FILE", help="the picture, a PNG file [beside the first log, of the same name]")
    add("--tokens_per_step", type=int, metavar="N", help="tokens per step: draws over tokens [over steps]")
    add("--no_reference", action="store_true", help="draw the runs alone, without published ones, GPT-2 and GPT-3")
    options = parser.parse_args(argv)
    if options.out and not options.out.lower().endswith(".png"):
        parser.error("--out takes the name of a PNG file, such as log.png")
    if options.tokens_per_step is not None and not 1 <= options.tokens_per_step <= 2**32:
        parser.error("--tokens_per_step takes a number of tokens, such as 524288")
    return options


def main(argv=None):
    options = parse_flags(argv)
    paths = [Path(os.path.abspath(log)) for log in options.logs]
    paths = [path / "log.txt" if os.path.isdir(path) else path for path in paths]
    runs = {name: read_log(path) for name, path in zip(name_runs(paths), paths, strict=True)}
    figure = draw(runs, options.tokens_per_step, not options.no_reference)
    out = Path(options.out) if options.out else paths[0].with_suffix(".png")
    if out.resolve() in [path.resolve() for path in paths]:
        raise UserError(f"{out} is the log itself: name another --out")
    try:
        replace_file(out, lambda temporary: figure.savefig(temporary, format="png"))
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): name another with --out") from error
    for name, values in runs.items():
        print(summarize(name, values))
        comparison = compare(values) if is_recipe(values["hella"], options.tokens_per_step) else None
        if comparison and not options.no_reference:
            print(f"{name}: {comparison}")
    print(f"picture: {out}")


if __name__ == "__main__":
    run_main(main, interrupted="no picture was written")
