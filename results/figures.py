"""The figures of results/, from the tables of tables.py. They want matplotlib: pip install matplotlib.

Contents: parts of a figure - the figures - drawing them
"""
import itertools
import math
import statistics

from collect import NINE, UNSEEN

COLOURS = {"TAL": "#c0392b", "TAL+": "#e67e22", "TAL (w/o ans-net)": "#8e44ad", "TAL (w/o T.I.)": "#2980b9",
           "LoGAH": "#27ae60", "GHN-3": "#7f8c8d", "random": "#2c3e50", "selection": "#16a085",
           "Adapt-Learngene": "#c0392b", "From Scratch": "#2c3e50", "Pre-Fine": "#2980b9",
           "TALS": "#c0392b", "all ten": "#8e44ad"}


# --------------------------------------------------------------------------------------------------
# Parts of a figure
# --------------------------------------------------------------------------------------------------

def panel(axis, title, x, y=""):
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def curve(axis, name, points):
    """Points {x: {seed: value}}: the mean of the seeds as a line, all of them as a shade."""
    colour, x = COLOURS[name], list(points)
    means = [statistics.mean(values.values()) for values in points.values()]
    lowest = [min(values.values()) for values in points.values()]
    highest = [max(values.values()) for values in points.values()]
    axis.plot(x, means, color=colour, linewidth=2, marker="o", markersize=4, label=name)
    axis.fill_between(x, lowest, highest, color=colour, alpha=0.15, linewidth=0)


def name_curves(axis):
    """The curves' names at their right ends, moved apart where they would overlap."""
    low, high = axis.get_ylim()
    last = -math.inf
    for line in sorted(axis.lines, key=lambda line: line.get_ydata()[-1]):
        last = max(line.get_ydata()[-1], last + 0.055 * (high - low))
        axis.annotate(line.get_label(), (line.get_xdata()[-1], last), xytext=(6, 0), fontsize=8,
                      textcoords="offset points", verticalalignment="center", color=line.get_color())


# --------------------------------------------------------------------------------------------------
# The figures: each draws the tables t, where they were run
# --------------------------------------------------------------------------------------------------

def tal_sizes(t, subplots):
    """Untrained networks of three widths and depths."""
    figure, axes = subplots(1, 3, figsize=(11, 3.6), sharey=True)
    for axis, size in zip(axes, ("Tiny", "Small", "Base")):
        for method in ("TAL", "TAL+", "TAL (w/o ans-net)", "TAL (w/o T.I.)", "LoGAH", "GHN-3"):
            table = t["tal-9"] if "w/o" in method else t["tal-2"]
            points = {depth: table.mean([f"{depth}-{size}, {method}"], NINE) for depth in (3, 6, 12)}
            if all(points.values()):
                curve(axis, method, points)
        panel(axis, size, "layers", "accuracy of untrained networks, %" if size == "Tiny" else "")
        axis.set_xticks((3, 6, 12))
        axis.set_xlim(2.5, 17)
        name_curves(axis)
    return figure


def alternatives(t, subplots):
    """Accuracy by images of further training."""
    figure, axes = subplots(1, 2, figsize=(10, 3.8))
    images = {"0": 300, "1000": 1000, "4000": 4000, "tune": 32000, "40000": 40000}      # where they stand
    for axis, tasks, title in ((axes[0], NINE, "nine tasks"), (axes[1], UNSEEN, "three tasks new to all")):
        for start in ("TAL", "LoGAH", "selection", "random"):
            points = {x: t["alternatives"].mean([f"3-Small, {start}, {n}"], tasks) for n, x in images.items()}
            points = {x: values for x, values in points.items() if values}
            if points:
                curve(axis, start, points)
        panel(axis, f"3-Small, mean of {title}", "images of each task (leftmost: none)", "accuracy, %")
        axis.set_xscale("log")
        axis.set_xlim(250, 200000)
        name_curves(axis)
    return figure


def tal_fig3(t, subplots):
    """Task-specific graphs in the plane, of the first seed."""
    table = t["tal-fig3"]
    seed = min(min(values) for values in table.values())
    figure, axis = subplots(figsize=(6.2, 5))
    for number, task in enumerate(NINE):
        rows = [row for row in table.rows() if row.startswith(f"{task}, ")]
        x = [table[row, "x"][seed] for row in rows]
        y = [table[row, "y"][seed] for row in rows]
        layers = [int(row.split(", ")[1].split("-")[0]) for row in rows]
        if rows:
            colour = f"C{number}"
            axis.scatter(x, y, s=[6 * n for n in layers], color=colour, alpha=0.65, linewidths=0)
            axis.annotate(table.shown(task), (x[-1], y[-1]), xytext=(6, 4), textcoords="offset points",
                          color=colour)
    score = table[("silhouette, plane", "all")][seed]
    panel(axis, f"Graphs of 3 to 12 layers for nine tasks, silhouette {score:.2f}",
          "first component (larger points: more layers)", "second component")
    return figure


def al_fig3(t, subplots):
    """Accuracy while training."""
    table = t["al-fig3"]
    figure, axes = subplots(1, 2, figsize=(10, 3.8))
    for axis, network in zip(axes, ("ViT", "Swin")):
        for row in [row for row in table.rows() if row.startswith(network)]:
            images = sorted(int(column) for column in table.columns(row))
            curve(axis, row.split(", ")[1], {n: table[row, str(n)] for n in images})
            axis.set_xlim(0, 1.3 * images[-1])
        panel(axis, f"{network}: {table.shown('variety')}", "training images", "accuracy on val, %")
        name_curves(axis)
    return figure


def al_fig4(t, subplots):
    """TALS among random draws, by size, task and seed."""
    table = t["al-fig4"]
    sizes = dict.fromkeys(row.split(", ")[0] for row in table.rows())
    panels = list(itertools.product(sizes, table.columns()))
    figure, axes = subplots(1, len(panels), figsize=(3.6 * len(panels), 3.6), squeeze=False)
    for axis, (size, task) in zip(axes[0], panels):
        seeds = sorted(table[f"{size}, draw 1", task])
        for draw in [row for row in table.rows() if row.startswith(f"{size}, draw")]:
            accuracies = [table[draw, task][seed] for seed in seeds]
            label = "random draws" if draw.endswith("draw 1") else None
            axis.scatter(seeds, accuracies, s=18, color="#7f8c8d", label=label)
        for name, marker in (("TALS", "D"), ("all ten", "_"), ("From Scratch", "x")):
            cell = table.cell(f"{size}, {name}", task)
            axis.scatter(list(cell), list(cell.values()), color=COLOURS[name], marker=marker, label=name)
        panel(axis, f"{size}: {table.shown(task)}", "seed (pool)", "accuracy, %")
        axis.set_xticks(seeds)
        axis.set_ylim(bottom=0)
    axes[0][-1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


# --------------------------------------------------------------------------------------------------
# Drawing them
# --------------------------------------------------------------------------------------------------

def draw(t, results):
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no figures: pip install matplotlib")
        return
    made = {"tal-sizes": tal_sizes, "alternatives": alternatives, "tal-fig3": tal_fig3, "al-fig3": al_fig3,
            "al-fig4": al_fig4}
    for name, make in made.items():
        if t[name.replace("tal-sizes", "tal-2")]:
            figure = make(t, plt.subplots)
            figure.tight_layout()
            figure.savefig(results / f"{name}.png", dpi=140, metadata={"Software": None})
            plt.close(figure)
