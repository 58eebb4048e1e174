"""Pages and claims of results/, from the numbers that the runs of reproduce.sh left.

    python results/tables.py runs/drawn   # reads the runs: results/TABLE.csv, and all that follows from these
    python results/tables.py              # from the TABLE.csv alone: pages, claims, figures, README

Written by hand are only
    paper.csv           what the papers print
    paper_claims.csv    what they claim, and which of our numbers decide it
    rows.csv            which runs fill which rows (collect.py reads it)
    pages/*.md          the text of the pages, in which {{NAME}} stands for a table
The figures (figures.py) want matplotlib: pip install matplotlib.

Contents: numbers - tables - the pool - pages - claims - files
"""
import argparse
import collections
import csv
import fnmatch
import itertools
import math
import re
import statistics
from pathlib import Path

import figures
from collect import (ABLATIONS, CLASSES, INFORMED, METHODS, NINE, PAPERS_NAME, STARTS, TABLES, TEXT, UNSEEN,
                     codes, collect)

RESULTS = Path(__file__).resolve().parent
README = RESULTS.parent / "README.md"
DRAWN_WIDTHS = {"Tiny": 32, "Small": 48, "Base": 96}                    # channels of the drawn networks
WIDTHS = {"Tiny": 192, "Small": 384, "Base": 768}
SIZES = [f"{depth}-{size}" for size in WIDTHS for depth in (3, 6, 12)]

# --------------------------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------------------------

def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class Table(dict):
    """{(row, column): {seed: value}} of one .csv, and the paper's own numbers; empty if there is no file."""

    def __init__(self, results, name):
        path = results / f"{name}.csv"
        self.name, self.real = name, is_real(results)
        self.unmeasured = set()             # (row, column) that no run is meant to fill
        for line in read_csv(path) if path.exists() else []:
            cell = self.setdefault((line["row"], line["column"]), {})
            cell[int(line["seed"])] = float(line["value"])
        self.paper = {}
        for line in read_csv(RESULTS / "paper.csv"):
            if line["table"] == name:
                self.paper[line["row"], line["column"]] = float(line["value"])

    def rows(self):
        return list(dict.fromkeys(row for row, _ in self))

    def columns(self, row=None):
        return list(dict.fromkeys(c for r, c in self if row in (None, r)))

    def cell(self, row, column):
        return self.get((row, column), {})

    def mean(self, rows, columns):
        """{seed: mean over rows and columns}, of the seeds that have all of them."""
        cells = [self.cell(row, column) for row in rows for column in columns]
        seeds = sorted(set.intersection(*map(set, cells))) if cells else []
        return {seed: statistics.mean(cell[seed] for cell in cells) for seed in seeds}

    def papers(self, row, column):
        """The paper's number or None; a drawn task has the name there of the dataset that it stands for, and
        "3 (6) layers" are 6 there; in Table 5 the drawn 3-Small stands for 3-Tiny."""
        row = ", ".join(PAPERS_NAME.get(part, part) for part in row.split(", "))
        row = re.sub(r"\d+ \((\d+)\) layers", r"\1 layers", row)
        if self.name == "tal-5" and not self.real:
            row = row.replace("3-Small", "3-Tiny")
        return self.paper.get((row, PAPERS_NAME.get(column, column)))

    def shown(self, name):
        """What a page calls a task: on real data as the paper does."""
        return PAPERS_NAME.get(name, name) if self.real else name

    def usual_seeds(self):
        """The seeds that most of the table's cells have."""
        counts = collections.Counter(tuple(sorted(cell)) for cell in self.values())
        return counts.most_common(1)[0][0] if counts else ()

    def marked(self, row, column, digits=1):
        """Mean and deviation of a cell, with its seeds in square brackets where these are not the usual."""
        if (row, column) in self.unmeasured:
            return "not measured"
        cell = self.cell(row, column)
        seeds = tuple(sorted(cell))
        mark = f" [{', '.join(map(str, seeds))}]" if cell and seeds != self.usual_seeds() else ""
        return spread(cell, digits) + mark


def is_real(results):
    """Whether a folder of results is of the papers' data."""
    return results.parent.name == "paper"


def spread(values, digits=1):
    """Mean ± standard deviation of {seed: value}."""
    values = list(values.values())
    if not values:
        return "-"
    mean = f"{statistics.mean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):,.{digits}f}"


def in_brackets(papers, form="g"):
    return "" if papers is None else f" ({papers:{form}})"


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------

def markdown(head, rows):
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, *rows]]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines)


def pairs(first, second):
    """Names of rows: "3-Tiny, TAL" and so on."""
    return [f"{a}, {b}" for a in first for b in second]


def printed(table, rows=None, columns=None, mean=False, stands_for=False, corner="drawn data", digits=1):
    """The table as the paper prints it, the paper's own numbers in brackets.

    The parts of a row's name are columns of their own. mean: one more; stands_for: drawn tasks' columns
    name the real datasets, too."""
    rows, columns = rows or table.rows(), columns or table.columns()
    parts = 1 + max((row.count(", ") for row in rows), default=0)
    lines = []
    for row in rows:
        names = row.split(", ")
        cells = names + [""] * (parts - len(names))
        for column in columns:
            cells.append(table.marked(row, column, digits) + in_brackets(table.papers(row, column)))
        if mean:
            papers = papers_mean(table, row, columns)
            cells.append(spread(table.mean([row], columns)) + in_brackets(papers, ".1f"))
        lines.append([table.shown(cell) for cell in cells])
    heads = [table.shown(column) for column in columns]
    if stands_for and not table.real:
        heads = [f"{column} ({PAPERS_NAME[column]})" for column in columns]
    return markdown([corner, *[""] * (parts - 1), *heads, *["mean"] * mean], lines)


def papers_mean(table, row, columns):
    """The paper's own mean of a row, or that of its numbers if there is one for every column."""
    if table.papers(row, "mean") is not None:
        return table.papers(row, "mean")
    papers = [table.papers(row, column) for column in columns]
    return statistics.mean(papers) if papers and None not in papers else None


def seeds_note(table):
    """What stands below a table whose cells have different seeds."""
    if len({tuple(sorted(cell)) for cell in table.values()}) < 2:
        return ""
    usual = ", ".join(map(str, table.usual_seeds()))
    return f"\n\nSeeds {usual}; a cell of other seeds names them in square brackets."


def with_notes(parts, t):
    """The parts of a page, each table that `printed` made with its note on seeds."""
    noted = ("tal-1", "tal-2", "tal-3", "tal-5", "tal-6", "tal-7", "tal-8", "tal-9", "al-1", "al-2", "al-3",
             "al-4")
    return {name: part + seeds_note(t[name]) if name in noted else part for name, part in parts.items()}


def training_time(table):
    logah, papers_logah = table.cell("minutes", "LoGAH"), table.papers("hours", "LoGAH")
    minutes, ratios = ["minutes (paper: hours)"], ["relative to LoGAH"]
    for method in METHODS.values():
        own, papers = table.cell("minutes", method), table.papers("hours", method)
        ratio = {seed: value / logah[seed] for seed, value in own.items() if seed in logah}
        minutes.append(spread(own) + in_brackets(papers))
        ratios.append(spread(ratio, 2) + in_brackets(papers / papers_logah, ".2f"))
    return markdown(["drawn data", *METHODS.values()], [minutes, ratios])


def fewest_learngenes(table):
    counts = ["All", "Num", "Ours", "1 learngene", *(f"{n} learngenes" for n in range(2, 10))]
    lines = []
    for row in pairs(("Small", "Base"), counts):
        if row not in table.rows():
            continue
        cells = row.split(", ")
        for task in table.columns():
            own = table.cell(row, task)
            text = table.marked(row, task)
            if row.endswith("Num"):
                text = ", ".join(f"{number:g}" for number in own.values()) or "-"
            cells.append(text + in_brackets(table.papers(row, task)))
        lines.append(cells)
    return markdown(["drawn data", "Num: per seed", *map(table.shown, table.columns())], lines)


def parameters_of_fewest(table):
    by_task = []
    for size in ("Small", "Base"):
        for task in table.columns():
            counts = []
            for kind in ("stored", "nominal", "deployed"):
                counts.append(f"{kind} {spread(table.cell(f'{size}, parameters {kind}', task), 0)}")
            if f"{size}, All" in table.rows():
                by_task.append(f"{size}, {table.shown(task)}: {', '.join(counts)}")
    return "; ".join(by_task)


def reach(curves, row):
    """{seed: share of the run after which this start has what scratch ends with; 0: never}."""
    images = sorted(int(column) for column in curves.columns(row))
    if not images:
        return {}
    scratch = row.split(", ")[0] + ", From Scratch"
    shares = {}
    for seed, goal in curves.cell(scratch, str(images[-1])).items():
        reached = [n for n in images if curves.cell(row, str(n)).get(seed, -1) >= goal]
        shares[seed] = (images.index(reached[0]) + 1) / len(images) if reached else 0
    return shares


def convergence(curves):
    lines = []
    for row in curves.rows():
        last = max(curves.columns(row), key=int)
        shares = [f"{share:.2f}" if share else "never" for share in reach(curves, row).values()]
        lines.append([row, f"{int(last):,}", ", ".join(shares), spread(curves.cell(row, last))])
    share = "share of the run until scratch's last accuracy, per seed"
    return markdown(["drawn data", "images", share, "accuracy at the end (val)"], lines)


def random_draws(table):
    lines = []
    for size in dict.fromkeys(row.split(", ")[0] for row in table.rows()):
        draws = [row for row in table.rows() if row.startswith(f"{size}, draw")]
        holding = [row for row in table.rows() if row.startswith(f"{size}, 1 and draw")]
        for task in table.columns():
            tals, mean = table.cell(f"{size}, TALS", task), table.mean(draws, [task])
            deviation = {s: statistics.stdev(table.cell(draw, task)[s] for draw in draws) for s in mean}
            gaps = ", ".join(f"{tals[seed] - mean[seed]:+.1f}" for seed in tals if seed in mean)
            cells = [size, table.shown(task), spread(tals), spread(mean), spread(deviation), gaps]
            cells.append(spread(table.mean(holding, [task])))
            for row in ("all ten", "From Scratch"):
                cells.append(spread(table.cell(f"{size}, {row}", task)))
            lines.append(cells)
    heads = ["TALS", "mean of draws", "deviation between draws", "TALS - mean, per seed",
             "mean of draws that hold learngene 1", "all ten", "from scratch"]
    return markdown(["drawn data", "", *heads], lines)


def reward_ranks(table):
    """Spearman's correlation between reward and accuracy, by reward head."""
    rows = [row for row in table.rows() if "rank by" in row]
    lines = []
    for row in rows:
        lines.append([row, *(spread(table.cell(row, task), 2) for task in table.columns(row))])
    return markdown(["", *map(table.shown, table.columns(rows[0]))], lines) if rows else ""


def order_of_starts(row):
    """Rows of alternatives by network, images, start; "tune" stands for some 30,000 images."""
    network, start, images = row.split(", ")
    return network, 30000 if images == "tune" else int(images), start


def means_of_starts(table, rows):
    three = ["aircraft", "textures", "digits"]
    lines = [[row, *(spread(table.mean([row], tasks)) for tasks in (NINE, three, UNSEEN))] for row in rows]
    heads = ["mean of nine tasks", "aircraft, textures, digits", "mean of three unseen"]
    return markdown(["drawn data: network, start, images", *heads], lines)


# --------------------------------------------------------------------------------------------------
# The pool: checks that no table of the paper shows, each where it was run
# --------------------------------------------------------------------------------------------------

def pool_tables(pool, table1):
    """The part of adaptive.md on the pool."""
    parts = [each_pool(pool), literal_starts(pool), search(pool), domains(pool), one_learngene(pool, table1)]
    return "\n\n".join(part for part in parts if part)


def each_pool(pool):
    lines = []
    for row in pool.rows():
        if row.startswith("pool"):
            own, least, most, untrained = [spread(pool.cell(row, column)) for column in (
                "own dataset", "alone, least", "alone, most", "untrained")]
            kept, compared, first, datasets = [f"{sum(pool.cell(row, column).values()):.0f}" for column in (
                "kept", "compared", "own is best", "datasets")]
            lines.append([row.removeprefix("pool "), own, f"{kept} of {compared}", least, most, untrained,
                          f"{first} of {datasets}"])
    heads = ["pool", "own dataset, %", "earlier logits unchanged", "alone, class means, %: least", "most",
             "untrained network", "datasets whose own learngene is the best alone"]
    return markdown(heads, lines)


def literal_starts(pool):
    columns = ["learngene 1 alone", "learngene 2 alone", "learngene 3 alone", "untrained"]
    lines = []
    for row in pool.rows():
        if row.startswith("pool literal"):
            means = [spread(pool.cell(row, column)) for column in columns]
            lines.append([row.removeprefix("pool literal-"), *means])
    if lines:
        return ("Learngenes that learned without gene-dropout, each alone, by start (A3):\n\n"
                + markdown(["start", "1", "2", "3", "untrained network"], lines))


def search(pool):
    found, best = pool.cell("search, reinforce", "reward"), pool.cell("search, exhaustive", "reward")
    gaps = [best[seed] - found[seed] for seed in found if seed in best]
    visited = pool.cell("search, reinforce", "visited").values()
    if gaps:
        return (f"REINFORCE against the exhaustive search, {len(gaps)} seeds: the optimum in "
                f"{sum(gap < 1e-6 for gap in gaps)}, within .02 in {sum(gap <= .02 for gap in gaps)}, "
                f"at most {max(gaps):.3f} below; {min(visited):.0f} to {max(visited):.0f} of 1,023 subsets "
                "looked at.")


def domains(pool):
    hits = []
    for row in pool.rows():
        hits += pool.cell(row, "own learngene first").values()
    if hits:
        return ("A stream of domains: held-out classes rank the learngene of their own domain first "
                f"in {sum(hits):.0f} of {len(hits)} cases.")


def one_learngene(pool, table1):
    """Single learngenes, chosen in three ways, and training under Eq. (8)."""
    rows = [row for row in pool.rows() if row.startswith("one learngene") or row == "constrained"]
    if not rows:
        return ""
    tasks = [task for task in PAPERS_NAME if task in pool.columns(rows[0])]
    ours = [spread(table1.cell("Small, Adapt-Learngene", task)) for task in tasks]
    lines = [["Table 1's descendants", *ours]]
    for row in rows:
        lines.append([row] + [spread(pool.cell(row, task)) for task in tasks])
    return markdown(["drawn data, Small", *map(pool.shown, tasks)], lines)


# --------------------------------------------------------------------------------------------------
# Pages: the tables that go into the text of pages/*.md
# --------------------------------------------------------------------------------------------------

def parameters(depth, width, classes, patch, grid, class_token):
    """Of a ViT with grid x grid patches; a class token has a position as well."""
    embedding = 3 * patch ** 2 + 1 + grid ** 2 + 2 * class_token
    return depth * (12 * width + 13) * width + (embedding + 2) * width + (width + 1) * classes


def sizes(real):
    counts = []
    for name in SIZES:
        depth, size = name.split("-")
        if real:
            count = parameters(int(depth), WIDTHS[size], 1000, patch=16, grid=14, class_token=1)
        else:
            count = parameters(int(depth), DRAWN_WIDTHS[size], 24, patch=8, grid=4, class_token=0)
        counts.append(f"{name} {count:,}")
    return ", ".join(counts)


def linear_models():
    """{task: (chance, accuracy of a linear model on pixels)} of results/difficulty.md, on drawn data."""
    found = {}
    for line in (RESULTS / "difficulty.md").read_text().splitlines()[2:]:
        task, *_, chance, linear, _ = [cell.strip() for cell in line.strip("| ").split("|")]
        found[task] = float(chance), float(linear)
    return found


def with_linear_model(page, parts, columns, mean=True):
    """A table's Markdown with a last row: the linear model, which has one run, on each task of `columns`."""
    known = linear_models()
    if not columns or not all(task in known for task in columns):
        return page
    values = [known[task][1] for task in columns]
    cells = ["linear model on pixels", *[""] * (parts - 1), *(f"{value:.1f}" for value in values)]
    if mean:
        cells.append(f"{statistics.mean(values):.1f}")
    return f"{page}\n| {' | '.join(cells)} |"


def machine(results):
    """What run.txt says: each start with machine, commit and versions, and the minutes of all cells."""
    path = results / "run.txt"
    if not path.exists():
        return ""
    lines = path.read_text().splitlines()
    minutes = sum(float(line.split()[0]) for line in lines if not line.startswith("#"))
    starts = [f"- {line[2:]}" for line in lines if line.startswith("#") and not line.startswith("# end")]
    total = f"Runs ({minutes:.0f} minutes of one core together; each cell's are in [run.txt](run.txt)):"
    return "\n".join([total, "", *starts])


def tal_page(t):
    nine = {"columns": NINE, "mean": True, "stands_for": True}
    methods, ablations, twelve = METHODS.values(), ABLATIONS.values(), ["12-Tiny", "12-Small"]
    table1 = pairs(twelve, ["untrained", "trained"]) + ["12-Base, untrained"]
    text, text_methods = t["tal-6"], ["LoGAH as long", "LoGAH", "TAL"]
    gpt2 = ["3-GPT2", "6-GPT2", "9-GPT2", "12-GPT2"]
    for method in text_methods:
        for column in TEXT:
            text[f"mean, {method}", column] = text.mean(pairs(gpt2, [method]), [column])
    table6 = pairs([*gpt2, "mean"], text_methods) + ["majority", "trained from random"]
    text.unmeasured.add(("trained from random", "paraphrases F1"))          # training logs accuracies alone
    unseen_sizes = ["3-Tiny", "6-Small"] if t["tal-5"].real else ["3-Small"]
    table5 = pairs(unseen_sizes, pairs(UNSEEN, ["short", "long"]))
    fig3 = ["silhouette, plane", "silhouette, full", "share between tasks"]
    informed = [] if t["tal-2"].real else list(INFORMED.values())
    table2 = printed(t["tal-2"], pairs(SIZES, [*methods, *informed]), **nine)
    table3 = printed(t["tal-3"], pairs(twelve, ["RandInit", *methods]), **nine)
    if not t["tal-2"].real:
        table2 = with_linear_model(table2 + trained_directly(t["alternatives"]), 2, NINE)
        table3 = with_linear_model(table3, 2, NINE)
    return {
        "sizes": sizes(t["tal-2"].real),
        "tal-1": printed(t["tal-1"], table1, methods),
        "tal-2": table2,
        "tal-3": table3,
        "tal-4": training_time(t["tal-4"]),
        "tal-5": printed(t["tal-5"], table5, ["RandInit", "LoGAH", "TAL"]),
        "tal-6": printed(text, table6, TEXT, stands_for=True),
        "minutes, LoGAH": spread(text.cell("minutes, LoGAH", "all")),
        "minutes, TAL": spread(text.cell("minutes, TAL", "all")),
        "tal-7": printed(t["tal-7"], pairs(twelve, ["TAL-st", "TAL"]), **nine),
        "tal-8": printed(t["tal-8"], [*ablations, *informed], ["mean"]),
        "tal-9": printed(t["tal-9"], pairs(SIZES[:6], ablations), **nine),
        "tal-fig3": printed(t["tal-fig3"], fig3, ["all"], corner="drawn data, nine tasks", digits=2),
    }


def trained_directly(table):
    """A row for Table 2: 3-Small of random parameters, trained on as many images as tuning showed."""
    row = "3-Small, random, tune"
    if row not in table.rows():
        return ""
    cells = ["3-Small", "from scratch", *(spread(table.cell(row, task)) for task in NINE)]
    return f"\n| {' | '.join(cells)} | {spread(table.mean([row], NINE))} |"


AL_SIZES = ["Tiny few", "Tiny", "Small few", "Small", "Base"]      # few: after few images


def adaptive_page(t):
    table1 = [row for row in pairs(AL_SIZES, STARTS.values()) if row in t["al-1"].rows()]
    table3 = [start for start in STARTS.values() if start in t["al-3"].rows()]
    page1 = printed(t["al-1"], table1, mean=True)
    if not t["al-1"].real:
        page1 = with_linear_model(page1, 2, t["al-1"].columns())
    page4 = fewest_learngenes(t["al-4"])
    if not t["al-4"].real:
        page4 = with_linear_model(page4, 2, t["al-4"].columns(), mean=False)
    return {
        "al-1": page1,
        "al-2": printed(t["al-2"], columns=["FromScratch", "PEG", "TLEG", "Ours"]),
        "al-3": printed(t["al-3"], table3, ["mIoU"]),
        "al-4": page4,
        "parameters": parameters_of_fewest(t["al-4"]),
        "picture of al-fig3": "![Fig. 3](al-fig3.png)" if t["al-fig3"] else "",
        "al-fig3": convergence(t["al-fig3"]),
        "al-fig4": random_draws(t["al-fig4"]),
        "ranks": reward_ranks(t["al-fig4"]),
        "al-pool": pool_tables(t["al-pool"], t["al-1"]),
    }


def alternatives_page(t):
    table = t["alternatives"]
    rows = sorted(table.rows(), key=order_of_starts)
    tasks = [task for task in NINE + UNSEEN if task in table.columns()]
    return {"means": means_of_starts(table, rows), "tasks": printed(table, rows, tasks)}


def filled(page, parts, real=False):
    """The text of pages/PAGE, with the parts in their places; an empty one leaves no empty lines.

    {{drawn: ...}} and {{paper: ...}} are for drawn data and for the papers' data alone."""
    text = (RESULTS / "pages" / page).read_text()
    mine, others = ("paper", "drawn") if real else ("drawn", "paper")
    text = re.sub(rf"\{{\{{{others}: .*?\}}\}}", "", text, flags=re.DOTALL)
    text = re.sub(rf"\{{\{{{mine}: (.*?)\}}\}}", r"\1", text, flags=re.DOTALL)
    for name, part in parts.items():
        mark = "{{" + name + "}}"
        if part.startswith("|") and part.count("\n") == 1:                      # a head without rows
            part = "Not run."
        if not part:
            text = text.replace(mark + "\n\n", "")
        text = text.replace(mark, part)
    return text


def not_run(text):
    """A last section: which rows of a page's tables have cells that were not run."""
    missing, table = {}, ""
    for line in text.splitlines():
        if line.startswith("## "):
            table = line.removeprefix("## ").split(":")[0]
        elif re.search(r"\| - (\(|\|)", line):
            row = " ".join(line.split(" | ")[:2]).split(" - ")[0].removeprefix("| ").strip()
            missing.setdefault(table, []).append(row)
    if not missing:
        return ""
    lines = [f"- {table}: {'; '.join(rows)}" for table, rows in missing.items()]
    return "\n".join(["", "## Not run", "", *lines, ""])


# --------------------------------------------------------------------------------------------------
# Claims
# --------------------------------------------------------------------------------------------------

# 97.5 % points of Student's t, by n - 1
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def interval(values):
    """(mean, low, high) of a 95 % t-interval; low and high are None below three values."""
    mean = statistics.mean(values)
    if len(values) < 3:
        return mean, None, None
    half = T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def p_value(values, bar=0.0):
    """Of Student's two-sided t-test of a mean against the bar; None below three values."""
    if len(values) < 3:
        return None
    spread, gap, n = statistics.stdev(values), statistics.mean(values) - bar, len(values) - 1
    if not spread:
        return 0.0 if gap else 1.0
    t = abs(gap) * math.sqrt(n + 1) / spread
    # With t = sqrt(n) tan(a) the density becomes cos(a)^(n - 1), which Simpson's rule integrates from 0.
    steps, end = 1000, math.atan(t / math.sqrt(n))
    heights = [math.cos(end * k / steps) ** (n - 1) for k in range(steps + 1)]
    inner = heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])
    scale = math.gamma((n + 1) / 2) / (math.sqrt(math.pi) * math.gamma(n / 2))
    return max(0.0, 1 - 2 * scale * inner * end / steps / 3)


def p_value_of_all(parts, bar):
    """Of "each part is above the bar": the largest of theirs. Of "not each", if some are below: the smallest
    of these, times the number of parts. None where a part has less than three values."""
    p_values = [p_value(part, bar) for part in parts]
    if None in p_values:
        return None
    below = [p for p, part in zip(p_values, parts) if statistics.mean(part) <= bar]
    return min(1.0, len(parts) * min(below)) if below else max(p_values)


def holm(p_values):
    """Holm's corrected p-values of a list, in its order: each times the number of those not smaller."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, k in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p_values[k]))
        corrected[k] = least
    return corrected


def word_of(above, p):
    """A verdict: above or below the bar, if p is small."""
    if p is None or p >= 0.05:
        return "cannot be told here"
    return "holds" if above else "does not hold"


def verdict(values, bar=0.0):
    """As pages/claims.md explains."""
    if not values:
        return "not run"
    return word_of(statistics.mean(values) > bar, p_value(values, bar))


def named(text, known):
    """The names that a field of paper_claims.csv stands for: "a|b" are two; * is anything."""
    names = []
    for pattern in text.split("|"):
        names += fnmatch.filter(known, pattern) if "*" in pattern else [pattern]
    return names


def compared(a, b, unit):
    """The effect in a claim's unit: a is ours, b what it is compared with."""
    if unit == "silhouette":
        return a
    if unit == "% saved":
        return 100 * (1 - a / b)
    if unit == "points above 95 %":
        return a - 0.95 * b
    if unit == "times":                         # as fast, as a logarithm: of shares of a run, or 0, never
        return math.log(b / (a or 1.1))
    return a - b


def effects_of(claim, table):
    """{seed: effect} of a line of paper_claims.csv."""
    other_rows = claim["other rows"] or claim["rows"]
    other_columns = claim["other columns"] or claim["columns"]
    if claim["unit"] == "times":
        ours, theirs = reach(table, claim["rows"]), reach(table, other_rows)
    else:
        ours = table.mean(named(claim["rows"], table.rows()), named(claim["columns"], table.columns()))
        theirs = table.mean(named(other_rows, table.rows()), named(other_columns, table.columns()))
    return {seed: compared(ours[seed], theirs[seed], claim["unit"]) for seed in ours if seed in theirs}


def each(claim, table):
    """A claim "on every task" or "at every depth" as one claim per column, or per pair of rows."""
    if claim["per"] == "column":
        return [{**claim, "columns": column} for column in named(claim["columns"], table.columns())]
    if claim["per"] == "row":
        return [{**claim, "rows": row} for row in named(claim["rows"], table.rows())]
    return [claim]


WORKS = 0.05            # of the way from chance to 100 %: a baseline that is less above chance does not work


def chance_of(task, real):
    return 100 / CLASSES[task] if real else linear_models()[task][0]


def baseline_works(claim, table):
    """Whether what a claim compares with is clearly above chance, on average of its columns."""
    if not claim["baseline"]:
        return True
    columns = named(claim["other columns"] or claim["columns"], table.columns())
    rows = named(claim["other rows"] or claim["rows"], table.rows())
    values = list(table.mean(rows, columns).values())
    if not values:
        return True
    tasks = []                                              # named by the cells, or by the claim
    for row, column in itertools.product(rows, columns):
        named_here = [part for part in [column, *row.split(", ")] if part in CLASSES]
        tasks += named_here or [claim["baseline"]]
    chance = statistics.mean(chance_of(task, table.real) for task in tasks)
    return statistics.mean(values) > chance + WORKS * (100 - chance)


def shown(value, unit):
    if value is None:
        return ""
    if unit == "silhouette":
        return f"{value:.2f}"
    return f"{math.exp(value):.1f}" if unit == "times" else f"{value:+.1f}"


def judge(claim, table):
    """The claim with its effect, low, high, seeds, p and verdict, as they are shown; p is None where nothing
    is tested."""
    unit = claim["unit"]
    if unit == "count":                         # exact: all of them, or the claim does not hold
        hits = sum(sum(table.cell(row, claim["columns"]).values()) for row in table.rows())
        cases = sum(sum(table.cell(row, claim["other columns"]).values()) for row in table.rows())
        word = "not run" if not cases else "holds" if hits == cases else "does not hold"
        effect = f"{hits:.0f} of {cases:.0f}" if cases else "-"
        return {**claim, "effect": effect, "low": "", "high": "", "seeds": "", "p": None, "verdict": word}
    values = list(effects_of(claim, table).values())
    bar = math.log(float(claim["bar"])) if unit == "times" else float(claim["bar"])
    effect, low, high = [shown(value, unit) for value in interval(values)] if values else ["-", "", ""]
    judged = {**claim, "effect": effect, "low": low, "high": high, "seeds": str(len(values))}
    if not baseline_works(claim, table):
        return {**judged, "p": None, "verdict": "baseline does not work here"}
    above, p = bool(values) and statistics.mean(values) > bar, p_value(values, bar)
    parts = [list(effects_of(part, table).values()) for part in each(claim, table)]
    if claim["per"] and parts and all(parts):
        better = [part for part in parts if statistics.mean(part) > bar]
        judged["effect"] = f"above in {len(better)} of {len(parts)}, on average {effect}"
        above, p = len(better) == len(parts), p_value_of_all(parts, bar)
    return {**judged, "p": p, "above": above, "verdict": word_of(above, p) if values else "not run"}


def corrected(claims):
    """Adds to each claim what its verdict is after Holm's correction among the tested claims of its paper."""
    for paper in dict.fromkeys(claim["paper"] for claim in claims):
        tested = [claim for claim in claims if claim["paper"] == paper and claim["p"] is not None]
        for claim, p in zip(tested, holm([claim["p"] for claim in tested])):
            claim["corrected"] = word_of(claim["above"], p)
    for claim in claims:
        claim.setdefault("corrected", claim["verdict"])


def bold(word):
    return f"**{word}**" if word in ("holds", "does not hold") else word


def claim_table(head, claims, wording):
    lines = []
    for claim in claims:
        paper = "TAL" if claim["paper"] == "TAL" else "AL"
        effect = claim["effect"]
        if claim["unit"] != "count" and effect != "-":
            effect += f" {claim['unit']}"
        if claim["low"]:
            effect += f" [{claim['low']}, {claim['high']}]"
        same = claim["corrected"] == claim["verdict"]
        words = [bold(claim["verdict"]), "same" if same else "open"]
        lines.append([claim[wording], f"{paper}, {claim['where']}", effect, *words])
    return markdown(head, lines)


def outcome(claims):
    """The first page's lists: what holds, what does not and why, what cannot be told."""
    alone = "by its own interval, not after Holm's correction"
    heads = {("holds", "holds"): "Holds",
             ("holds", "cannot be told here"): f"Holds {alone}",
             ("does not hold", "does not hold"): "Does not hold",
             ("does not hold", "cannot be told here"): f"Does not hold {alone}",
             ("cannot be told here",) * 2: "Cannot be told here",
             ("baseline does not work here",) * 2: "The baseline does not work here",
             ("not run",) * 2: "Not run"}
    parts = []
    for words, head in heads.items():
        mine = [claim for claim in claims if (claim["verdict"], claim["corrected"]) == words]
        lines = []
        for claim in mine:
            paper = "TAL" if claim["paper"] == "TAL" else "AL"
            why = f": {claim['why']}" if claim["why"] and words[0] == "does not hold" else ""
            lines.append(f"- {claim['claim']} ({paper}, {claim['where']}){why}")
        if lines:
            parts.append("\n".join([f"**{head}** ({len(lines)}):", "", *lines]))
    return "\n\n".join(parts)


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------

def write(results, readme=None):
    """Everything that follows from the .csv files. Pages say whose data they are about."""
    t, real = {name: Table(results, name) for name in TABLES}, is_real(results)
    claims = read_csv(RESULTS / "paper_claims.csv")
    if real and not t["alternatives"]:          # reproduce.sh leaves them out there, unless they are named
        claims = [claim for claim in claims if claim["table"] != "alternatives"]
    claims = [judge(claim, t[claim["table"]]) for claim in claims]
    corrected(claims)
    head = ["claim of the paper", "where", "here: effect [95 %]", "verdict", "Holm"]
    runs = {"runs": machine(results)}
    tal = filled("tal.md", with_notes(tal_page(t), t) | runs, real)
    adaptive = filled("adaptive.md", with_notes(adaptive_page(t), t) | runs, real)
    judged = {"claims": claim_table(head, claims, "claim"), "outcome": outcome(claims)}
    pages = {"tal.md": tal + not_run(tal),
             "adaptive.md": adaptive + not_run(adaptive),
             "claims.md": filled("claims.md", judged, real)}
    if t["alternatives"]:
        pages["alternatives.md"] = filled("alternatives.md", alternatives_page(t), real)
    for name, text in pages.items():
        (results / name).write_text(text.replace("drawn data", "the papers' data") if real else text)
    with open(results / "claims.csv", "w", newline="") as file:
        columns = ["paper", "where", "claim", "unit", "effect", "low", "high", "seeds", "verdict",
                   "corrected"]
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(claims)
    if readme:
        headlines = [claim for claim in claims if claim["headline"]]
        head = ["claim", "paper", "effect here [95 %]", "verdict", "Holm"]
        table = claim_table(head, headlines, "headline")
        marked = re.compile("(<!-- claims -->\n).*(<!-- /claims -->)", re.DOTALL)
        readme.write_text(marked.sub(lambda found: found[1] + table + "\n" + found[2], readme.read_text()))


def main(argv=None):
    """The results of drawn data are results/; those of a smoke test or the papers' data lie with the runs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\nContents")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", type=Path, help="a folder that reproduce.sh wrote, as runs/drawn")
    parser.add_argument("--mixed", action="store_true", help="also runs of several states of the code")
    args = parser.parse_args(argv)
    runs = args.runs
    if runs and not runs.is_dir():
        parser.exit(2, f"error: there is no folder {runs}; bash reproduce.sh makes runs/drawn\n")
    results, readme = RESULTS, README
    if runs and runs.name != "drawn":
        results, readme = runs / "results", None
    results.mkdir(exist_ok=True)
    if runs and len(codes(runs)) > 1 and not args.mixed:
        parser.exit(2, f"error: {runs}/run.txt tells of cells of {len(codes(runs))} states of the code "
                       f"({', '.join(codes(runs))}); start again in an empty folder, or say --mixed "
                       "(reproduce.sh: MIXED=1)\n")
    if runs:
        collect(runs, results)
    write(results, readme)
    figures.draw({name: Table(results, name) for name in TABLES}, results)
    print((results / "claims.md").read_text())


if __name__ == "__main__":
    main()
