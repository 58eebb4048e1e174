"""Tables, claims and figures of results/, from what the runs of reproduce.sh wrote.

    python results/tables.py runs/drawn     # reads the runs, writes results/TABLE.csv, then all that follows from these
    python results/tables.py                # the same from the committed .csv files alone: .md, .png, claims, README

Every number comes from a log.jsonl or JSON file of a run, but the papers' own, which stand in PAPER with their tables. A .csv has one line
per table, row, column and seed. A table of which no run is there keeps its .csv. The figures want matplotlib: pip install matplotlib.
"""
import csv
import json
import math
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NINE = {"aircraft": "Airc.", "objects": "C100", "pedestrian": "DPed", "textures": "DTD", "signs": "GTSRB", "glyphs": "OGlt", "digits": "SVHN",
        "motion": "UCF", "flowers": "Flwr"}                                            # drawn task: the one it stands for
UNSEEN = {"clothing": "F-MNIST", "faces": "FER2013", "lesions": "HAM10000"}
TEXT = {"paraphrases": "MRPC", "paraphrases F1": "MRPC F1", "acceptability": "CoLA", "entailment": "RTE", "sentiment": "IMDB"}
REAL = {"imagenet": "base", "fashion-mnist": "clothing", "fer2013": "faces", "ham10000": "lesions", **dict(zip((
    f"decathlon/{d}" for d in ("aircraft", "cifar100", "daimlerpedcls", "dtd", "gtsrb", "omniglot", "svhn", "ucf101", "vgg-flowers")), NINE))}    # its rows
METHODS = {"ghn3": "GHN-3", "logah": "LoGAH", "tal": "TAL", "tal+": "TAL+"}
SIZES = [f"{depth}-{size}" for size in ("Tiny", "Small", "Base") for depth in (3, 6, 12)]
DEPTHS = ["3 (6) layers", "6 (9) layers", "9 (12) layers"]
WIDTHS = {"Tiny": 32, "Small": 48, "Base": 64}                                         # of the drawn networks, patch 8, 32 px
TWELVE = {"12x32": "12-Tiny", "12x48": "12-Small", "12x192": "12-Tiny", "12x384": "12-Small"}       # drawn, and the paper's
STARTS = {"prefine": "Pre-Fine", "scratch": "From Scratch", "heur": "Heur-Learngene", "auto": "Auto-Learngene", "peg": "PEG", "tleg": "TLEG",
          "adaptive": "Adapt-Learngene", "weight-selection": "weight selection", "all": "all learngenes"}

# What the papers print, on their own data: table, row, then the columns of that table.
PAPER = {
    "tal-1": ("GHN-3 LoGAH TAL TAL+", """12-Tiny, untrained 34.45 22.79 26.20 31.31; 12-Tiny, trained 48.93 62.53 63.03 60.04;
        12-Small, untrained 31.03 16.78 23.28 39.22; 12-Small, trained 53.47 65.41 66.61 65.63; 12-Base, untrained 0.10 0.10 0.10 38.72"""),
    "tal-2": (" ".join(NINE), """
        3-Tiny, GHN-3 3.12 34.06 85.41 6.38 87.77 0.06 10.00 2.25 7.06; 3-Tiny, LoGAH 2.58 29.16 78.83 8.30 92.12 0.26 17.32 3.94 6.96;
        3-Tiny, TAL 6.69 39.53 79.83 22.55 94.86 28.37 83.31 28.33 33.82; 3-Tiny, TAL+ 2.04 50.80 88.88 29.26 98.87 0.11 87.37 35.76 50.00;
        6-Tiny, GHN-3 3.24 35.19 87.72 6.86 89.12 0.06 10.00 3.43 10.88; 6-Tiny, LoGAH 3.21 46.33 81.19 9.20 96.82 0.31 20.82 5.02 8.33;
        6-Tiny, TAL 17.43 48.95 85.87 28.30 99.25 48.98 89.85 38.63 45.69; 6-Tiny, TAL+ 1.98 51.01 88.06 28.62 98.89 0.18 87.27 35.71 49.71;
        12-Tiny, GHN-3 3.15 31.12 85.63 6.86 85.02 0.06 10.00 3.07 9.90; 12-Tiny, LoGAH 3.15 33.80 79.86 9.41 96.52 0.18 20.56 5.53 9.12;
        12-Tiny, TAL 16.71 44.72 84.76 28.03 99.15 28.11 88.87 39.81 45.00; 12-Tiny, TAL+ 2.07 50.99 88.21 29.41 98.94 0.14 87.30 35.81 49.80;
        3-Small, GHN-3 2.91 35.75 86.77 6.70 87.68 0.06 10.00 2.61 10.39; 3-Small, LoGAH 3.15 44.95 80.66 9.36 96.35 0.28 19.91 5.33 8.73;
        3-Small, TAL 17.16 47.25 83.78 27.23 98.93 47.75 87.83 38.32 44.31; 3-Small, TAL+ 1.95 56.05 94.20 33.14 99.57 0.03 91.24 47.23 55.78;
        6-Small, GHN-3 3.12 35.30 86.80 7.34 90.05 0.06 10.00 2.36 12.75; 6-Small, LoGAH 3.18 45.93 80.60 9.95 96.97 0.26 21.04 5.38 8.63;
        6-Small, TAL 17.85 49.88 83.91 28.67 99.30 50.29 89.82 40.83 46.47; 6-Small, TAL+ 1.98 56.08 94.42 32.98 99.62 0.09 91.31 48.16 56.57;
        12-Small, GHN-3 2.64 5.55 84.30 7.23 84.39 0.06 10.00 1.74 9.51; 12-Small, LoGAH 2.64 35.77 80.39 8.24 96.81 0.18 20.66 4.30 6.57;
        12-Small, TAL 17.16 45.63 82.16 27.87 99.18 39.66 88.55 40.98 45.10; 12-Small, TAL+ 1.86 56.04 94.66 33.14 99.58 0.14 91.30 48.21 56.57;
        3-Base, TAL+ 2.22 55.99 94.10 32.93 99.41 0.09 90.99 4.39 56.08; 6-Base, TAL+ 1.80 56.02 94.00 33.03 99.41 0.11 91.05 47.18 56.08;
        12-Base, TAL+ 2.31 56.06 94.39 32.93 99.41 0.11 90.97 47.59 55.69"""),
    "tal-3": (" ".join(NINE), """
        12-Tiny, RandInit 7.80 58.64 98.74 23.09 99.58 24.12 86.38 24.03 35.10; 12-Tiny, GHN-3 4.80 55.88 98.20 20.11 97.53 9.77 83.08 24.80 32.45;
        12-Tiny, LoGAH 5.61 58.93 97.47 20.32 99.23 29.22 86.13 35.81 35.78; 12-Tiny, TAL 19.17 59.80 98.88 29.73 99.60 57.50 90.31 46.47 48.33;
        12-Tiny, TAL+ 7.23 58.90 99.46 33.09 99.78 24.01 90.94 49.28 58.04;
        12-Small, RandInit 8.01 60.17 98.44 25.05 98.89 15.70 85.57 23.31 35.00; 12-Small, GHN-3 5.22 57.35 98.32 15.21 97.36 20.98 80.21 22.34 34.51;
        12-Small, LoGAH 7.20 59.98 97.45 20.21 98.95 24.55 85.10 33.86 34.51; 12-Small, TAL 18.69 60.49 98.89 31.01 99.77 57.01 92.02 47.75 49.71;
        12-Small, TAL+ 8.61 60.77 99.51 34.36 99.79 23.04 91.72 52.77 59.02"""),
    "tal-4": ("GHN-3 LoGAH TAL TAL+", "hours 58.81 46.55 36.19 70.53"),
    "tal-5": ("RandInit LoGAH TAL", """clothing, short 82.71 87.56 88.86; clothing, long 89.41 91.08 90.99; faces, short 29.20 42.57 47.06;
        faces, long 59.91 60.60 61.41; lesions, short 83.09 87.56 86.59; lesions, long 97.46 97.71 97.71"""),     # its 3-Tiny
    "tal-6": ("paraphrases paraphrases_F1 acceptability entailment sentiment", """
        3-GPT2, LoGAH 55.88 68.75 0.70 47.65 52.06; 3-GPT2, TAL 62.99 76.70 2.89 46.21 63.21; 6-GPT2, LoGAH 59.07 72.12 1.23 46.21 53.58;
        6-GPT2, TAL 61.52 73.70 3.32 47.29 62.76; 9-GPT2, LoGAH 60.78 74.19 1.23 48.01 57.76; 9-GPT2, TAL 58.09 68.97 1.75 48.78 62.09;
        12-GPT2, LoGAH 56.13 68.98 0.10 48.01 58.07; 12-GPT2, TAL 52.70 60.53 3.05 49.82 61.49;
        mean, LoGAH 57.96 71.01 0.82 47.47 55.37; mean, TAL 58.83 69.98 2.75 48.02 62.39"""),
    "tal-7": (" ".join(NINE), """
        12-Tiny, TAL-st 1.95 5.99 90.00 6.65 82.08 0.03 27.22 13.78 10.20; 12-Tiny, TAL 19.8 54.89 98.61 30.21 99.57 63.57 90.38 48.1 47.84;
        12-Small, TAL-st 2.79 8.66 89.56 8.67 99.29 0.09 21.84 21.84 7.84; 12-Small, TAL 17.16 45.63 82.16 27.87 99.18 39.66 88.55 40.98 45.10"""),
    "tal-8": ("mean", "TAL (w/o T.I.) 40.71; TAL (w/o ans-net) 46.80; TAL 53.37"),
    "tal-9": (" ".join(NINE), """
        3-Tiny, TAL (w/o T.I.) 4.05 17.61 72.65 11.12 65.9 1.76 35.77 2.25 9.61; 3-Tiny, TAL (w/o ans-net) 3.39 49.92 92.74 20.80 99.39 0.18 90.2 11.37 50.69;
        6-Tiny, TAL (w/o T.I.) 12.18 40.62 72.89 23.30 99.20 52.57 88.77 2.87 34.22; 6-Tiny, TAL (w/o ans-net) 3.27 49.86 92.38 20.05 99.35 0.17 90.34 12.09 51.18;
        12-Tiny, TAL (w/o T.I.) 10.23 36.09 65.83 17.13 96.00 31.28 83.92 3.02 25.10; 12-Tiny, TAL (w/o ans-net) 2.88 49.45 93.01 21.22 99.31 0.15 90.43 12.19 51.08;
        3-Small, TAL (w/o T.I.) 12.54 40.65 80.24 20.69 98.99 49.85 85.99 4.35 36.86; 3-Small, TAL (w/o ans-net) 2.88 50.76 92.76 21.97 99.35 0.09 90.51 11.53 52.35;
        6-Small, TAL (w/o T.I.) 13.68 42.43 77.19 22.61 99.30 52.65 89.28 3.28 37.75; 6-Small, TAL (w/o ans-net) 3.12 50.91 93.10 22.29 99.29 0.14 90.57 12.81 52.25;
        12-Small, TAL (w/o T.I.) 11.73 37.67 60.17 16.97 55.30 23.35 76.45 2.97 29.22; 12-Small, TAL (w/o ans-net) 2.88 50.86 93.52 21.76 99.34 0.12 90.64 12.19 52.16"""),
    "al-1": ("mean", """Tiny, Pre-Fine 79.89; Tiny, From Scratch 65.10; Tiny, Heur-Learngene 70.88; Tiny, Auto-Learngene 75.91; Tiny, PEG 79.66;
        Tiny, Adapt-Learngene 80.47; Small, Pre-Fine 86.04; Small, From Scratch 72.63; Small, Heur-Learngene 77.65; Small, Auto-Learngene 80.87;
        Small, PEG 84.91; Small, Adapt-Learngene 85.78"""),                             # means of its six columns; it has no TLEG on two of them
    "al-2": ("FromScratch PEG TLEG Ours", "3 (6) layers 64.91 64.94 69.5 70.21; 6 (9) layers 67.02 69.49 73.2 74.22; 9 (12) layers 68.56 70.24 75.1 75.92"),   # its Small
    "al-3": ("mIoU", "Pre-Fine 47.08; Heur-Learngene 40.12; PEG 48.30; Adapt-Learngene 55.63"),
    "al-4": ("CIFAR10 CIFAR100 Food-101", "Small, All 95.79 82.59 87.42; Small, Num 3 4 3; Small, Ours 94.19 79.49 85.44"),
}


def paper(table):
    """{(row, column): the paper's number} of a table."""
    columns, rows = PAPER.get(table, ("", ""))
    columns, found = [c.replace("_", " ") for c in columns.split()], {}
    for row in filter(None, map(str.strip, rows.split(";"))):
        words = row.split()
        found |= {(" ".join(words[:-len(columns)]), c): float(v) for c, v in zip(columns, words[-len(columns):])}
    return found


# ----------------------------------------------------------------------------------------------------------------------
# From the runs to lines (row, column, seed, value), one function per table
# ----------------------------------------------------------------------------------------------------------------------

def records(out, pattern, stage):
    """What the runs of a pattern logged for a stage; a command that was run again logs again, and its last word counts."""
    found = {}
    for path in sorted(out.glob(f"{pattern}/log.jsonl")):
        for r in map(json.loads, path.read_text().splitlines()):
            if r["stage"] == stage:
                r["task"] = REAL.get(r.get("task"), r.get("task"))
                found[tuple(str(r.get(k)) for k in ("task", "network", "images", "method", "seed", "size", "draw", "learngene", "search")), path] = r | {"run": path.parent.name}
    return list(found.values())


def seed_of(path):
    return int(re.search(r"-s(\d+)(/|$)", str(path))[1])


def untrained(out, folder, stage="evaluate"):
    """[(seed, {size: {task: accuracy}})]: networks of predicted parameters."""
    paths = sorted(out.glob(f"{folder}-s[0-9]*/untrained-{stage}-test.json"))
    named = lambda row: {REAL.get(task, task): accuracy for task, accuracy in row.items()}
    return [(seed_of(p.parent), {size.rstrip("*"): named(row) for size, row in json.loads(p.read_text()).items()}) for p in paths]


def tal_1(out):
    for method, name in METHODS.items():
        for seed, table in untrained(out, method, "pretrain"):
            yield from ((f"{size}, untrained", name, seed, table[size]["base"]) for size in ("12-Tiny", "12-Small", "12-Base"))
        for r in records(out, f"{method}-s[0-9]*", "train"):
            size = TWELVE.get(r["network"])
            if r["task"] == "base" and size:
                yield f"{size}, trained", name, r["seed"], r["trained"]


def tal_2(out, methods=METHODS, sizes=SIZES):
    for method, name in methods.items():
        for seed, table in untrained(out, method):
            for size in sizes:
                yield from ((f"{size}, {name}", task, seed, table[size][task]) for task in NINE)


def tal_3(out):
    for method, name in {"random": "RandInit", **METHODS}.items():
        for r in records(out, f"{method}-s[0-9]*" + ("/trained" if method == "random" else ""), "train"):
            size = TWELVE.get(r["network"])
            if r["task"] in NINE and size:
                yield f"{size}, {name}", r["task"], r["seed"], r["trained"]


def minutes_of(out, pattern):
    """{seed: minutes of training} of hypernetworks: images of both stages, each at the 90th percentile of its logged images/s, which other
    work on the machine disturbs least."""
    found = {}
    for path in sorted(out.glob(f"{pattern}/log.jsonl")):
        stages = {}
        for r in map(json.loads, path.read_text().splitlines()):
            if r["stage"] in ("pretrain", "tune") and "images_per_s" in r:
                stages.setdefault(r["stage"], []).append((r["images"], r["images_per_s"]))
        rate = lambda logged: sorted(s for _, s in logged)[int(0.9 * (len(logged) - 1))]
        if stages:
            found[seed_of(path.parent)] = sum(max(n for n, _ in logged) / rate(logged) for logged in stages.values()) / 60
    return found


def tal_4(out):
    for method, name in METHODS.items():
        yield from (("minutes", name, seed, value) for seed, value in minutes_of(out, f"{method}-s[0-9]*").items())


def tal_5(out):
    starts = {"random-s[0-9]*/unseen-*": "RandInit", "logah-s[0-9]*": "LoGAH", "tal-s[0-9]*": "TAL"}
    for pattern, name in starts.items():
        trained = [r for r in records(out, pattern, "train") if r["task"] in UNSEEN and r["network"] in ("3x48", "3x192")]
        for r in trained:
            most = max(int(other["images"]) for other in trained if other["task"] == r["task"])
            yield f"{r['task']}, {'long' if int(r['images']) == most else 'short'}", name, r["seed"], r["trained"]


def tal_6(out):
    tasks = [t for t in TEXT if " " not in t]
    for seed, table in untrained(out, "text-tal"):
        yield from ((f"{size}, TAL", column, seed, row[column]) for size, row in table.items() if size != "majority" for column in TEXT if column in row)
        yield from (("majority", column, seed, table["majority"][column]) for column in TEXT if column in table.get("majority", {}))
    for folder, name in (("text-logah", "LoGAH"), ("text-logah-equal", "LoGAH as long")):
        for task in tasks:
            for seed, table in untrained(out, f"{folder}-{task}"):
                yield from ((f"{size}, {name}", c, seed, row[c]) for size, row in table.items() if size != "majority" for c in TEXT if c.startswith(task) and c in row)
    for r in records(out, "text-random-s[0-9]*", "train"):
        yield "trained from random", r["task"], r["seed"], r["trained"]
    yield from (("minutes, TAL", "all", seed, value) for seed, value in minutes_of(out, "text-tal-s[0-9]*").items())
    each = [minutes_of(out, f"text-logah-{task}-s[0-9]*") for task in tasks]
    yield from (("minutes, LoGAH", "all", seed, sum(m[seed] for m in each)) for seed in sorted(set.intersection(*map(set, each))))


def tal_7(out):
    sizes = ("12-Tiny", "12-Small")
    for task in NINE:
        for seed, table in untrained(out, f"st-{task}"):
            yield from ((f"{size}, TAL-st", task, seed, table[size][task]) for size in sizes)
    yield from tal_2(out, {"tal": "TAL"}, sizes)


def tal_9(out):
    return tal_2(out, {"no-task-info": "TAL (w/o T.I.)", "no-ancestry": "TAL (w/o ans-net)", "tal": "TAL"}, SIZES[:6])


def tal_8(out):
    """The means of Table 9, over sizes and tasks."""
    values = {}
    for row, task, seed, value in tal_9(out):
        values.setdefault((row.split(", ")[1], seed), []).append(value)
    return [(row, "mean", seed, statistics.mean(v)) for (row, seed), v in values.items()]


def tal_fig3(out):
    for path in sorted(out.glob("tal-s[0-9]*/figure3.json")):
        seed, figure = seed_of(path.parent), json.loads(path.read_text())
        yield from ((f"silhouette, {space}", "all", seed, value) for space, value in figure.get("silhouette", {}).items())
        yield "share between tasks", "all", seed, figure["between"]
        for task, points in zip(figure["tasks"], figure["xy"]):
            for net, xy in zip(figure["networks"], points):
                yield from ((f"{task}, {net}", axis, seed, value) for axis, value in zip("xy", xy))


def al_1(out):
    for size in ("tiny", "small"):
        for r in records(out, f"table1-{size}-s[0-9]*", "train"):
            yield f"{size.title()}, {STARTS[r['method']]}", r["task"], r["seed"], r["accuracy"]


def al_2(out):
    """Rows by layers here and, in brackets, in the paper's Small: its ancestry has 12 layers, the drawn one 6."""
    names = {"scratch": "FromScratch", "adaptive": "Ours"}
    for r in records(out, "table2-*-s[0-9]*", "train"):
        here, small = r["depths"][0], "" if r["size"].endswith("small") else f"{r['size'].title()}, "
        row = f"{here} ({here + 3}) layers" if r["size"].startswith("drawn") else f"{small}{here - 3} ({here}) layers"
        yield row, names.get(r["method"]) or STARTS[r["method"]], r["seed"], r["accuracy"]


def al_3(out):
    for r in records(out, "table3-s[0-9]*", "segment"):
        yield STARTS[r["method"]], "mIoU", r["seed"], r["miou"]


def al_4(out):
    """The fewest learngenes that keep 95 % of what all ten give, as printed; and what each number gives."""
    full = {(r["task"], r["seed"]): r["accuracy"] for r in records(out, "table1-small-s[0-9]*", "train") if r["method"] == "all"}
    few = records(out, "table4-*-s[0-9]*", "train")
    selected = [r for r in records(out, "table1-small-s[0-9]*", "train") if r["method"] == "adaptive"]
    for (task, seed), everything in full.items():
        mine = [r for r in few + selected if (r["task"], r["seed"]) == (task, seed)]
        if not any(r in few for r in mine):
            continue
        yield "Small, All", task, seed, everything
        yield from ((f"{r['genes']} learngene{'s' * (r['genes'] > 1)}", task, seed, r["accuracy"]) for r in mine if r["genes"])
        enough = min((r for r in mine if r["accuracy"] >= 0.95 * everything), key=lambda r: len(r["learngenes"]), default=None)
        if enough:
            yield from (("Small, Num", task, seed, len(enough["learngenes"])), ("Small, Ours", task, seed, enough["accuracy"]))
            yield from ((f"parameters, {kind}", task, seed, enough[kind]) for kind in ("stored", "nominal", "deployed"))


def al_fig3(out):
    for pattern, net in (("figure3-s[0-9]*", "ViT"), ("figure3-swin-s[0-9]*", "Swin")):
        for r in records(out, pattern, "train"):
            for look, accuracy in enumerate(r["curve"], 1):
                yield f"{net}, {STARTS[r['method']]}", f"{r['images'] * look / len(r['curve']):.0f}", r["seed"], accuracy


def al_fig4(out):
    for r in records(out, "table1-random-s[0-9]*", "train"):
        yield f"draw {r['draw'] + 1}", r["task"], r["seed"], r["accuracy"]
    drawn = {r["task"] for r in records(out, "table1-random-s[0-9]*", "train")}
    for r in records(out, "table1-small-s[0-9]*", "train"):
        if r["task"] in drawn and r["method"] in ("adaptive", "all", "scratch"):
            yield {"adaptive": "TALS", "all": "all ten", "scratch": "From Scratch"}[r["method"]], r["task"], r["seed"], r["accuracy"]


def al_pool(out):
    """What no table shows: forgetting, learngenes alone, the search against the optimum, domains, other choices. Seeds are those of the run."""
    for path in sorted(out.glob("*/pool")):
        run, alone, own = path.parent.name, records(out, path.parent.name, "alone"), records(out, path.parent.name, "pool")
        if not alone:
            continue
        name, seed = (run[:-3], seed_of(run)) if re.search(r"-s\d$", run) else (run, 0)
        table = alone[-1]["table"]
        best = sum(max(range(len(table) - 1), key=lambda n: table[n][d]) == d for d in range(len(table[0])))
        values = {"kept": sum(r["kept"] for r in own), "compared": sum(r["earlier"] for r in own), "own dataset": statistics.mean(r["val"] for r in own),
                  "alone, least": min(map(statistics.mean, table[:-1])), "alone, most": max(map(statistics.mean, table[:-1])),
                  "untrained": statistics.mean(table[-1]), "own is best": best, "datasets": len(table[0])}
        if name.startswith("literal"):
            values |= {f"learngene {n + 1} alone": statistics.mean(table[n]) for n in range(len(table) - 1)}
        yield from ((f"pool {name}", column, seed, value) for column, value in values.items())
    for r in records(out, "search-s[0-9]*", "select"):
        yield from ((f"search, {r['search']}", column, r["seed"], r[column]) for column in ("reward", "visited"))
    for r in records(out, "domains-s[0-9]*", "select"):
        first = max(r["singles"], key=r["singles"].get)
        yield f"domains, {r['task']}", "own learngene first", r["seed"], int(first == {"signs": "2", "textures": "3", "clothing": "4"}[r["task"].split(":")[0]])
    one = {"class means": records(out, "table4-1-s[0-9]*", "train"), "training each": [r for r in records(out, "trained-s[0-9]*", "train") if r["method"] == "adaptive"],
           "at random": [r for r in records(out, "trained-s[0-9]*", "train") if r["method"] == "random"]}
    for how, found in one.items():
        for task, seed in sorted({(r["task"], r["seed"]) for r in found}):
            yield f"one learngene, {how}", task, seed, statistics.mean(r["accuracy"] for r in found if (r["task"], r["seed"]) == (task, seed))
    for r in records(out, "constrained-s[0-9]*", "train"):
        yield from (("constrained", r["task"], r["seed"], r["accuracy"]), ("constrained, trainable", r["task"], r["seed"], r["trainable"]))


def alternatives(out):
    """3-Small, and 4-Base where the ancestry's own size is asked for: start and images, accuracy by task."""
    where = {"direct-s[0-9]*": "random", "random-s[0-9]*/*": "random", "tal-s[0-9]*": "TAL", "logah-s[0-9]*": "LoGAH", "selection-s[0-9]*": "selection",
             "finetune-s[0-9]*": "fine-tuning"}
    for seed, table in untrained(out, "tal"):
        yield from (("3-Small, TAL, 0", task, seed, table["3-Small"][task]) for task in NINE)
    for seed, table in untrained(out, "logah"):
        yield from (("3-Small, LoGAH, 0", task, seed, table["3-Small"][task]) for task in NINE)
    for pattern, name in where.items():
        for r in records(out, pattern, "train"):
            size = {"3x48": "3-Small", "4x64": "4-Base"}.get(r["network"])
            if size:
                yield f"{size}, {name}, {r['images']}", r["task"], r["seed"], r["trained"]


TABLES = {"tal-1": tal_1, "tal-2": tal_2, "tal-3": tal_3, "tal-4": tal_4, "tal-5": tal_5, "tal-6": tal_6, "tal-7": tal_7, "tal-8": tal_8, "tal-9": tal_9,
          "tal-fig3": tal_fig3, "al-1": al_1, "al-2": al_2, "al-3": al_3, "al-4": al_4, "al-fig3": al_fig3, "al-fig4": al_fig4, "al-pool": al_pool,
          "alternatives": alternatives}


def collect(out, results):
    """Writes results/TABLE.csv of every table that has a run, and the runs' machine and minutes."""
    for name, table in TABLES.items():
        lines = [(row, column, seed, f"{value:.6g}") for row, column, seed, value in table(Path(out))]
        if lines:
            with open(results / f"{name}.csv", "w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([("table", "row", "column", "seed", "value"), *((name, *line) for line in lines)])
    if (Path(out) / "run.txt").exists():
        (results / "run.txt").write_text((Path(out) / "run.txt").read_text())


class Table(dict):
    """{(row, column): {seed: value}} of one .csv; empty where there is none."""
    def __init__(self, results, name):
        self.name = name
        if (results / f"{name}.csv").exists():
            with open(results / f"{name}.csv", newline="") as file:
                for r in csv.DictReader(file):
                    self.setdefault((r["row"], r["column"]), {})[int(r["seed"])] = float(r["value"])

    def rows(self):
        return list(dict.fromkeys(row for row, _ in self))

    def columns(self, row=None):
        return list(dict.fromkeys(c for r, c in self if row in (None, r)))

    def mean(self, rows, columns):
        """{seed: mean over rows and columns}, of the seeds that have all of them."""
        cells = [self.get((r, c), {}) for r in rows for c in columns]
        seeds = sorted(set.intersection(*map(set, cells))) if cells else []
        return {s: statistics.mean(c[s] for c in cells) for s in seeds}


# ----------------------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------------------

def spread(values, digits=1):
    """Mean ± standard deviation of {seed: value}."""
    values = list(values.values())
    if not values:
        return "-"
    return f"{statistics.mean(values):,.{digits}f}" + (f" ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else "")


def markdown(head, rows):
    return ["", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"] + ["| " + " | ".join(row) + " |" for row in rows]


def printed(table, rows=None, columns=None, names={}, mean=None, label="", digits=1):
    """A table as the paper prints it: ours on drawn data, the paper's own number in brackets. mean: the name of one more column."""
    theirs, rows, columns = paper(table.name), rows or table.rows(), columns or table.columns()
    lines, parts = [], max([row.count(", ") for row in rows], default=0)
    for row in rows:
        cells = [spread(table.get((row, c), {}), digits) + (f" ({theirs[row, c]:g})" if (row, c) in theirs else "") for c in columns]
        if mean:
            their = [theirs[row, c] for c in (*columns, "mean") if (row, c) in theirs]
            cells.append(spread(table.mean([row], columns), digits) + (f" ({statistics.mean(their):.1f})" if their else ""))
        lines.append([*row.split(", "), *[""] * (parts - row.count(", ")), *cells])
    return markdown([f"drawn data{label}", *[""] * parts, *(names.get(c, c) for c in columns), *([mean] if mean else [])], lines)


def parameters(depth, width, classes):
    """Of a drawn ViT: patch 8 of 32 px, mean of the patches."""
    return depth * (12 * width + 13) * width + (3 * 64 + 1 + 16 + 2) * width + (width + 1) * classes


def machine(results):
    """What run.txt says: every start with machine, commit and versions, and the minutes of all cells together."""
    if not (results / "run.txt").exists():
        return []
    lines = (results / "run.txt").read_text().splitlines()
    spent = sum(float(line.split()[0]) for line in lines if not line.startswith("#"))
    starts = [line[2:] for line in lines if line.startswith("#")]
    return ["", f"Runs ({spent:.0f} minutes of one core together; each cell's are in [run.txt](run.txt)):", "", *(f"- {start}" for start in starts)]


def tal_tables(results):
    t = {name: Table(results, name) for name in TABLES if name.startswith("tal")}
    paired = {c: f"{c} ({p})" for c, p in {**NINE, **UNSEEN, **TEXT}.items()}
    by_size = lambda methods, sizes: [f"{size}, {m}" for size in sizes for m in methods]
    lines = ["# TAL", "", "Accuracy in percent on the test split of **drawn data**, mean ± standard deviation between seeds; in brackets the paper's number, on its own",
             "data and scale: only the order compares. A drawn task stands in the column of the real one named beside it. All methods see 96,000 images of the",
             "base task, then 294,000 of the nine tasks. Tiny, Small and Base are 32, 48 and 64 channels wide; training architectures have at most 6 layers and 56",
             "channels (TAL+: 8 and 72).", "", "Parameters with 24 classes: " + ", ".join(
                 f"{size} {parameters(int(size.split('-')[0]), WIDTHS[size.split('-')[1]], 24):,}" for size in SIZES) + ".", *machine(results)]
    lines += ["", "## Table 1: the base task, as pretrained; then trained on for 8,000 images (paper: 75 epochs)"] + printed(t["tal-1"], list(dict.fromkeys(r for r, _ in paper("tal-1"))), list(METHODS.values()))
    lines += ["", "## Table 2: untrained networks on the nine tasks"] + printed(t["tal-2"], by_size(METHODS.values(), SIZES), list(NINE), paired, "mean")
    lines += ["", "## Table 3: trained on, 2,000 images of each task, RandInit 4,000 (paper: 100 and 200 epochs)"]
    lines += printed(t["tal-3"], by_size(["RandInit", *METHODS.values()], ["12-Tiny", "12-Small"]), list(NINE), paired, "mean")
    lines += ["", "## Table 4: training time in minutes of one core (paper: hours)", "", "Images divided by the images/s of the undisturbed tenth of the log: the machine is "
              "shared, so only ratios count, and these roughly. All methods see the same images here; an image costs more under an ancestry (TAL), in larger networks (TAL+)."]
    ratio = lambda values, base: spread({s: v / base[s] for s, v in values.items() if s in base}, 2)
    lines += markdown(["drawn data", *METHODS.values()], [[name, *(f(t["tal-4"].get(("minutes", m), {})) + f" ({g(m)})" for m in METHODS.values())] for name, f, g in (
        ("minutes (paper: hours)", spread, lambda m: paper("tal-4")["hours", m]), ("relative to LoGAH", lambda v: ratio(v, t["tal-4"].get(("minutes", "LoGAH"), {})),
                                                             lambda m: f"{paper('tal-4')['hours', m] / paper('tal-4')['hours', 'LoGAH']:.2f}"))])
    lines += ["", "## Table 5: unseen tasks, 3-Small (paper: 3-Tiny), 4,000 and 40,000 images (paper: 5 and 100 epochs)", "",
              "A fresh head and one learning rate for all. As in the paper, LoGAH has only its pretraining, TAL also its tuning (and, here, an ancestry that knows the nine "
              "tasks)."]
    lines += printed(t["tal-5"], [f"{task}, {length}" for task in UNSEEN for length in ("short", "long")], ["RandInit", "LoGAH", "TAL"])
    lines += ["", "## Table 6: untrained GPT-2 of 3 to 12 layers on four text tasks", "", "One TAL for all four (6 epochs); one LoGAH for each, as long, and 2.5 times as long, as the "
              "paper has it. \"majority\" answers with the commonest class; \"trained from random\" is the 3-layer network after 60,000 texts of a task. Acceptability (CoLA) "
              "is Matthews correlation times 100."]
    text = t["tal-6"]
    for method in ("LoGAH as long", "LoGAH", "TAL"):
        for c in TEXT:
            for seed, value in text.mean([r for r in text.rows() if r.endswith(f"GPT2, {method}")], [c]).items():
                text.setdefault((f"mean, {method}", c), {})[seed] = value
    lines += printed(text, [*(f"{d}-GPT2, {m}" for d in (3, 6, 9, 12) for m in ("LoGAH as long", "LoGAH", "TAL")), "mean, LoGAH as long", "mean, LoGAH", "mean, TAL", "majority",
                            "trained from random"], list(TEXT), paired)
    lines += ["", "Training, minutes of one core: " + ", ".join(f"{m} {spread(text.get((f'minutes, {m}', 'all'), {}))}" for m in ("LoGAH", "TAL")) + " (LoGAH's four together)."]
    lines += ["", "## Table 7: tuned on one task alone (TAL-st, from the same pretraining, 6 epochs of that task) or on all"]
    lines += printed(t["tal-7"], by_size(["TAL-st", "TAL"], ["12-Tiny", "12-Small"]), list(NINE), paired, "mean")
    lines += ["", "## Table 8: without task information, without ancestry; mean of six sizes and nine tasks"]
    lines += printed(t["tal-8"], ["TAL (w/o T.I.)", "TAL (w/o ans-net)", "TAL"], ["mean"])
    lines += ["", "## Table 9: the same, by size and task"]
    lines += printed(t["tal-9"], by_size(["TAL (w/o T.I.)", "TAL (w/o ans-net)", "TAL"], SIZES[:6]), list(NINE), paired, "mean")
    lines += ["", "## Fig. 3: task-specific graphs of ten depths", "", "![Fig. 3](tal-fig3.png)"]
    lines += printed(t["tal-fig3"], ["silhouette, plane", "silhouette, full", "share between tasks"], ["all"], digits=2, label=", nine tasks")
    return lines


def alternative_tables(results):
    t = Table(results, "alternatives")
    three = ("aircraft", "textures", "digits")
    lines = ["# What else the same cost buys", "", "No paper's table. Accuracy in percent, test split of **drawn data**, by start and images of further training of each task; 3-Small, one "
             "learning rate.", "\"tune\" is as many images of a task as TAL's tuning showed of it (28,000 to 40,000); 195,000 what takes TAL's whole pipeline, ancestry and both stages,",
             "shared among its nine tasks: measured on three of them. \"selection\" are evenly spaced weights of the ancestry (Xu et al. 2024), \"fine-tuning\" the ancestry itself",
             "where sizes match (4 layers, 64 channels; a fresh head). Mind that the ancestry has been trained on the nine tasks, and on none of the unseen."]
    key = lambda row: (row.split(", ")[0], {"tune": 30000}.get(row.split(", ")[2]) or int(row.split(", ")[2]), row.split(", ")[1])
    rows = sorted(t.rows(), key=key)
    lines += markdown(["drawn data: network, start, images", "mean of nine tasks", "aircraft, textures, digits", "mean of three unseen"],
                      [[row, spread(t.mean([row], NINE)), spread(t.mean([row], three)), spread(t.mean([row], UNSEEN))] for row in rows])
    lines += ["", "By task:"] + printed(t, rows, [c for c in (*NINE, *UNSEEN) if c in t.columns()])
    return lines + ["", "![images](alternatives.png)"]


def adaptive_tables(results):
    t = {name: Table(results, name) for name in TABLES if name.startswith("al-")}
    order = ["Pre-Fine", "From Scratch", "Heur-Learngene", "Auto-Learngene", "PEG", "TLEG", "weight selection", "Adapt-Learngene", "all learngenes"]
    tasks = t["al-1"].columns()
    lines = ["# Adaptive-Learngene", "", "Accuracy in percent on the test split of **drawn data**, mean ± standard deviation between seeds; in brackets the paper's number, on its own data",
             "and scale: only the order compares. Every seed has a pool of its own: ten class subsets of `wide`, eight classes and 40,000 images seen of each. The ancestor of",
             "the baselines (seed 0, shared) has seen 400,000 images of all 80 classes at once.", *machine(results)]
    lines += ["", "## Table 1: six tasks, 8,000 images each (Tiny: 4,000); the paper's number is the mean of its own six"]
    lines += printed(t["al-1"], [f"{size}, {name}" for size in ("Tiny", "Small") for name in order if (f"{size}, {name}", "kinds") in t["al-1"]], tasks, mean="mean")
    lines += ["", "## Table 2: depths, the wide task, 8,000 images: layers here (in the paper's Small); the ancestry has 6 (12)"]
    lines += printed(t["al-2"], DEPTHS, ["FromScratch", "PEG", "TLEG", "Ours"])
    lines += ["", "## Table 3: segmentation of drawn scenes, mIoU after 4,000 images"]
    lines += printed(t["al-3"], [n for n in order if (n, "mIoU") in t["al-3"]], ["mIoU"])
    lines += ["", "## Table 4: the fewest learngenes that keep 95 % of what all ten give; the paper's CIFAR10, CIFAR100, Food-101 in brackets"]
    few, theirs = t["al-4"], list(dict.fromkeys(c for _, c in paper("al-4")))
    rows = [r for r in ("Small, All", "Small, Num", "Small, Ours", "1 learngene", "2 learngenes", "3 learngenes") if r in few.rows()]
    number = lambda row, c: ", ".join(f"{v:g}" for v in few.get((row, c), {}).values()) if "Num" in row else spread(few.get((row, c), {}))
    lines += markdown(["drawn data", *few.columns()], [[row + (" (per seed)" if "Num" in row else ""), *(number(row, c) + (
        f" ({paper('al-4')[row, theirs[i]]:g})" if (row, theirs[i]) in paper("al-4") else "") for i, c in enumerate(few.columns()))] for row in rows])
    lines += ["", "Parameters of these: " + "; ".join(f"{c}: " + ", ".join(f"{kind} {spread(few.get((f'parameters, {kind}', c), {}), 0)}" for kind in ("stored", "nominal", "deployed"))
                                                     for c in few.columns()) + ". \"nominal\" is the paper's k / N of the whole; what runs is \"deployed\" whatever was selected."]
    lines += ["", "## Fig. 3: convergence", "", "![Fig. 3](al-fig3.png)"]
    curves = t["al-fig3"]
    rows = [[row, f"{max(map(int, curves.columns(row))):,}", ", ".join(f"{r:.2f}" if r else "never" for r in reach(curves, row).values()), spread(curves.get((row, max(curves.columns(row), key=int)), {}))]
            for row in curves.rows()]
    lines += markdown(["drawn data", "images", "share of the run until scratch's last accuracy, per seed", "accuracy at the end (val)"], rows)
    lines += ["", "## Fig. 4: TALS against five random draws of as many learngenes, Small", "", "![Fig. 4](al-fig4.png)"]
    draws, rows = t["al-fig4"], []
    for task in (c for c in draws.columns() if any(r.startswith("draw") for r, k in draws if k == c)):
        names = [r for r in draws.rows() if r.startswith("draw")]
        mean, tals = draws.mean(names, [task]), draws.get(("TALS", task), {})
        deviation = {s: statistics.stdev(draws[n, task][s] for n in names) for s in mean}
        rows.append([task, spread(tals), spread(mean), spread(deviation), ", ".join(f"{tals[s] - mean[s]:+.1f}" for s in tals if s in mean), spread(draws.get(("all ten", task), {})),
                     spread(draws.get(("From Scratch", task), {}))])
    lines += markdown(["drawn data", "TALS", "mean of draws", "deviation between draws", "TALS - mean, per seed", "all ten", "from scratch"], rows)
    return lines + pool_tables(t["al-pool"], t["al-1"])


def pool_tables(pool, one):
    """The checks that no table of the paper shows."""
    get = lambda row, column: pool.get((row, column), {})
    lines = ["", "## The pool (val)"]
    rows = [r for r in pool.rows() if r.startswith("pool")]
    total = lambda row, column: f"{sum(get(row, column).values()):.0f}"
    lines += markdown(["pool", "own dataset, %", "earlier logits unchanged", "alone, class means, %: least", "most", "untrained network", "datasets whose own learngene is the best alone"],
                      [[r.removeprefix("pool "), spread(get(r, "own dataset")), f"{total(r, 'kept')} of {total(r, 'compared')}", spread(get(r, "alone, least")), spread(get(r, "alone, most")),
                        spread(get(r, "untrained")), f"{total(r, 'own is best')} of {total(r, 'datasets')}"] for r in rows])
    literal = [r for r in rows if "literal" in r]
    if literal:
        lines += ["", "Learngenes that learned without gene-dropout, each alone, by start (A3):"]
        lines += markdown(["start", "1", "2", "3", "untrained network"], [[r.removeprefix("pool literal-"), *(spread(get(r, f"learngene {n} alone")) for n in (1, 2, 3)), spread(get(r, "untrained"))] for r in literal])
    found, best = get("search, reinforce", "reward"), get("search, exhaustive", "reward")
    gaps = [best[s] - found[s] for s in sorted(found) if s in best]
    if gaps:
        visited = get("search, reinforce", "visited").values()
        lines += ["", f"REINFORCE against the exhaustive search, {len(gaps)} seeds: the optimum in {sum(g < 1e-6 for g in gaps)}, within .02 in {sum(g <= .02 for g in gaps)}, at most "
                  f"{max(gaps):.3f} below; {min(visited):.0f} to {max(visited):.0f} of 1,023 subsets looked at."]
    domains = [r for r in pool.rows() if r.startswith("domains")]
    if domains:
        hits = [v for r in domains for v in get(r, "own learngene first").values()]
        lines += ["", f"A stream of domains: held-out classes rank the learngene of their own domain first in {sum(hits):.0f} of {len(hits)} cases."]
    tasks = [c for c in ("kinds", "variety", "tail") if any((r, c) in pool for r in pool.rows())]
    rows = [[r, *(spread(get(r, c)) for c in tasks)] for r in pool.rows() if r.startswith("one learngene") or r == "constrained"]
    if rows:
        lines += markdown(["drawn data, Small", *tasks], [["Table 1's descendants", *(spread(one.get(("Small, Adapt-Learngene", c), {})) for c in tasks)], *rows])
    return lines


def reach(curves, row):
    """{seed: share of the run after which this start has what scratch ends with; 0: never}."""
    net, images = row.split(", ")[0], sorted(map(int, curves.columns(row)))
    ends = curves.get((f"{net}, From Scratch", str(images[-1])), {}) if images else {}
    return {seed: next((look for look, n in enumerate(images, 1) if curves[row, str(n)].get(seed, -1) >= last), 0) / len(images) for seed, last in ends.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Claims
# ----------------------------------------------------------------------------------------------------------------------

T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}      # 97.5 % points of Student's t, by n - 1
RULE = ("Effects are paired by seed: mean and 95 % t-interval over the seeds, on drawn data at small scale. **Holds**: the whole interval lies above the bar. **Does not hold**: "
        "all of it lies below. Otherwise, or with fewer than three seeds, it **cannot be told here**. The bar is 0, if not given with the claim; counts are exact, ratios are averaged as logarithms.")


def interval(values):
    """(mean, low, high) of a 95 % t-interval; low and high are None below three values."""
    mean = statistics.mean(values)
    if len(values) < 3:
        return mean, None, None
    half = T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def verdict(values, bar=0.0):
    """By RULE."""
    if not values:
        return "not run"
    _, low, high = interval(values)
    if low is None:
        return "cannot be told here"
    return "holds" if low > bar else "does not hold" if high < bar else "cannot be told here"


def less(a, b):
    """{seed: a - b} of the seeds that both have."""
    return {s: a[s] - b[s] for s in a if s in b}


def claims(results):
    """[(paper, where, claim, unit, bar, {seed: effect})], or for a count (..., "count", None, (kept, of)). Ratios ("times") as logarithms."""
    t = {name: Table(results, name) for name in TABLES}
    sizes, near = SIZES[:6], ("kinds", "variety", "tail")
    rows = lambda method, which: [f"{size}, {method}" for size in which]
    nine = lambda table, method, which: t[table].mean(rows(method, which), NINE)
    one = lambda table, row, column: t[table].get((row, column), {})
    small = lambda method, size="Small": t["al-1"].mean([f"{size}, {method}"], t["al-1"].columns())
    unseen = lambda method, length: t["tal-5"].mean([f"{task}, {length}" for task in UNSEEN], [method])
    text = lambda method, columns: t["tal-6"].mean([f"{d}-GPT2, {method}" for d in (3, 6, 9, 12)], columns)
    spent = lambda table, row, column="all": one(table, row, column)
    saved = lambda mine, theirs, share=1: {s: 100 * (share - mine[s] / theirs[s]) for s in mine if s in theirs}
    both = [c for c in TEXT if " " not in c]
    draws = [r for r in t["al-fig4"].rows() if r.startswith("draw")]
    scratch, ours = reach(t["al-fig3"], "ViT, From Scratch"), reach(t["al-fig3"], "ViT, Adapt-Learngene")
    faster = {s: math.log(scratch[s] / (ours[s] or 1.1)) for s in ours if s in scratch}                # never: later than the end
    few = lambda k: less(t["al-4"].mean([f"{k} learngene{'s' * (k > 1)}"], near), {s: 0.95 * v for s, v in t["al-4"].mean(["Small, All"], near).items()})
    rivals = ("FromScratch", "PEG", "TLEG")
    depths = {r: less(t["al-2"].mean(DEPTHS, ["Ours"]), t["al-2"].mean(DEPTHS, [r])) for r in rivals}
    forgotten = [(c, v) for (row, c), v in t["al-pool"].items() if c in ("kept", "compared")]
    kept, compared = (sum(sum(v.values()) for c, v in forgotten if c == name) for name in ("kept", "compared"))
    made = [
        ("TAL", "Table 2", "untrained networks from TAL beat LoGAH's", "points", 0, less(nine("tal-2", "TAL", sizes), nine("tal-2", "LoGAH", sizes))),
        ("TAL", "Table 2", "untrained networks from TAL beat GHN-3's", "points", 0, less(nine("tal-2", "TAL", sizes), nine("tal-2", "GHN-3", sizes))),
        ("TAL", "Table 2", "TAL+ beats TAL on Tiny and Small", "points", 0, less(nine("tal-2", "TAL+", sizes), nine("tal-2", "TAL", sizes))),
        ("TAL", "Table 2", "only TAL+ reaches Base: there it beats TAL", "points", 0, less(nine("tal-2", "TAL+", SIZES[6:]), nine("tal-2", "TAL", SIZES[6:]))),
        ("TAL", "Table 2", "TAL+ is as good at Base as at Small (bar: -5)", "points", -5, less(nine("tal-2", "TAL+", SIZES[6:]), nine("tal-2", "TAL+", SIZES[3:6]))),
        ("TAL", "Table 1", "on the base task, an untrained 12-Small from TAL+ beats LoGAH's", "points", 0, less(one("tal-1", "12-Small, untrained", "TAL+"), one("tal-1", "12-Small, untrained", "LoGAH"))),
        ("TAL", "Table 1", "trained on the base task, 12-Small ends higher from TAL than from LoGAH", "points", 0, less(one("tal-1", "12-Small, trained", "TAL"), one("tal-1", "12-Small, trained", "LoGAH"))),
        ("TAL", "Table 3", "trained on, 12-Small ends higher from TAL than from LoGAH", "points", 0, less(nine("tal-3", "TAL", ["12-Small"]), nine("tal-3", "LoGAH", ["12-Small"]))),
        ("TAL", "Table 3", "... and than from random parameters trained twice as long", "points", 0, less(nine("tal-3", "TAL", ["12-Small"]), nine("tal-3", "RandInit", ["12-Small"]))),
        ("TAL", "Table 4", "training TAL takes less time than LoGAH (22 %)", "% saved", 0, saved(spent("tal-4", "minutes", "TAL"), spent("tal-4", "minutes", "LoGAH"))),
        ("TAL", "Table 5", "unseen tasks, short training: TAL's start beats LoGAH's", "points", 0, less(unseen("TAL", "short"), unseen("LoGAH", "short"))),
        ("TAL", "Table 5", "unseen tasks, long training: TAL's start beats LoGAH's", "points", 0, less(unseen("TAL", "long"), unseen("LoGAH", "long"))),
        ("TAL", "Table 5", "unseen tasks, long training: TAL's start beats random parameters", "points", 0, less(unseen("TAL", "long"), unseen("RandInit", "long"))),
        ("TAL", "Table 6", "untrained GPT-2: one TAL beats a LoGAH per task, trained 2.5 times as long", "points", 0, less(text("TAL", both), text("LoGAH", both))),
        ("TAL", "Table 6", "... at as many texts of each task", "points", 0, less(text("TAL", both), text("LoGAH as long", both))),
        ("TAL", "Table 6", "... above all on acceptability (CoLA) and sentiment (IMDB)", "points", 0, less(text("TAL", ["acceptability", "sentiment"]), text("LoGAH", ["acceptability", "sentiment"]))),
        ("TAL", "Table 6", "... and takes less than half the training time (bar: half saved)", "% saved", 50, saved(spent("tal-6", "minutes, TAL"), spent("tal-6", "minutes, LoGAH"))),
        ("TAL", "Table 7", "tuning on nine tasks at once beats tuning on each alone", "points", 0, less(nine("tal-7", "TAL", ["12-Tiny", "12-Small"]), nine("tal-7", "TAL-st", ["12-Tiny", "12-Small"]))),
        ("TAL", "Table 8", "without task information TAL loses", "points", 0, less(one("tal-8", "TAL", "mean"), one("tal-8", "TAL (w/o T.I.)", "mean"))),
        ("TAL", "Table 8", "without ancestry TAL loses", "points", 0, less(one("tal-8", "TAL", "mean"), one("tal-8", "TAL (w/o ans-net)", "mean"))),
        ("TAL", "Table 8", "task information is worth more than the ancestry", "points", 0, less(one("tal-8", "TAL (w/o ans-net)", "mean"), one("tal-8", "TAL (w/o T.I.)", "mean"))),
        ("TAL", "Fig. 3", "graphs cluster by task in two dimensions (bar: silhouette 0.5)", "silhouette", 0.5, one("tal-fig3", "silhouette, plane", "all")),
        ("TAL", "Sec. 6", "untrained 3-Small from TAL beats the same, trained from random parameters on as many images of each task", "points", 0,
         less(t["alternatives"].mean(["3-Small, TAL, 0"], NINE), t["alternatives"].mean(["3-Small, random, tune"], NINE))),
        ("Adaptive-Learngene", "Method", "nothing is forgotten: earlier logits stay the same, bit for bit", "count", None, (round(kept), round(compared))),
        ("Adaptive-Learngene", "Table 1", "descendants beat training from scratch", "points", 0, less(small("Adapt-Learngene"), small("From Scratch"))),
        ("Adaptive-Learngene", "Table 1", "descendants match Pre-Fine (bar: -1)", "points", -1, less(small("Adapt-Learngene"), small("Pre-Fine"))),
        *(("Adaptive-Learngene", "Table 1", f"descendants beat {name}{'-style' * (name == 'PEG')}", "points", 0, less(small("Adapt-Learngene"), small(name)))
          for name in ("Heur-Learngene", "Auto-Learngene", "PEG", "TLEG")),
        *(("Adaptive-Learngene", "Table 2", f"at any depth descendants beat {r.replace('FromScratch', 'training from scratch')}", "points", 0, depths[r]) for r in rivals),
        ("Adaptive-Learngene", "Table 3", "segmentation: descendants beat Pre-Fine", "mIoU", 0, less(one("al-3", "Adapt-Learngene", "mIoU"), one("al-3", "Pre-Fine", "mIoU"))),
        ("Adaptive-Learngene", "Table 4", "three learngenes keep 95 % of what all ten give", "points above 95 %", 0, few(3)),
        ("Adaptive-Learngene", "Table 4", "one learngene does", "points above 95 %", 0, few(1)),
        ("Adaptive-Learngene", "Fig. 3", "convergence is faster than from scratch (bar: 1)", "times", 0, faster),
        ("Adaptive-Learngene", "Fig. 3", "... 7.5 times as fast (bar: 7.5)", "times", math.log(7.5), faster),
        ("Adaptive-Learngene", "Fig. 4", "TALS beats random selections of as many learngenes", "points", 0, less(t["al-fig4"].mean(["TALS"], near), t["al-fig4"].mean(draws, near))),
        ("Adaptive-Learngene", "Fig. 4", "... and stays close to all ten learngenes (bar: -1)", "points", -1, less(t["al-fig4"].mean(["TALS"], near), t["al-fig4"].mean(["all ten"], near))),
    ]
    return made


def judged(results):
    """[(paper, where, claim, unit, effect, low, high, seeds, verdict)], strings as they are shown."""
    lines = []
    for source, where, claim, unit, bar, effect in claims(results):
        if unit == "count":
            kept, of = effect
            lines.append((source, where, claim, unit, f"{kept} of {of}" if of else "-", "", "", "", "holds" if kept == of and of else "does not hold" if of else "not run"))
        else:
            values = list(effect.values())
            show = {"silhouette": "{:.2f}".format, "times": lambda x: f"{math.exp(x):.1f}"}.get(unit, "{:+.1f}".format)
            shown = ["" if x is None else show(x) for x in interval(values)] if values else ["-", "", ""]
            lines.append((source, where, claim, unit, *shown, str(len(values)), verdict(values, bar)))
    return lines


def claim_table(results):
    rows = []
    for source, where, claim, unit, effect, low, high, seeds, word in judged(results):
        name = unit if unit != "count" else ""
        rows.append([claim, f"{'AL' if source[0] == 'A' else 'TAL'}, {where}", f"{effect} {name if effect != '-' else ''}".strip() + (f" [{low}, {high}]" if low else ""), f"**{word}**" if word in ("holds", "does not hold") else word])
    return markdown(["claim of the paper", "where", "here: effect [95 %]", "verdict"], rows)[1:] + ["", RULE]


# ----------------------------------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------------------------------

COLOURS = {"TAL": "#c0392b", "TAL+": "#e67e22", "TAL (w/o ans-net)": "#8e44ad", "TAL (w/o T.I.)": "#2980b9", "LoGAH": "#27ae60", "GHN-3": "#7f8c8d", "random": "#2c3e50",
           "selection": "#16a085", "fine-tuning": "#b7950b", "Adapt-Learngene": "#c0392b", "TALS": "#c0392b", "From Scratch": "#2c3e50", "Pre-Fine": "#2980b9", "all ten": "#8e44ad"}


def line(axis, x, cells, name, **style):
    """A line with its spread between seeds, named at its right end."""
    mean = [statistics.mean(c.values()) for c in cells]
    axis.plot(x, mean, color=COLOURS[name], lw=2, marker="o", ms=4, **style)
    axis.fill_between(x, [min(c.values()) for c in cells], [max(c.values()) for c in cells], color=COLOURS[name], alpha=0.15, lw=0)
    return mean[-1]


def label(axis, ends, x):
    """Names at the ends of lines, moved apart where they would overlap."""
    low, high = axis.get_ylim()
    last = -math.inf
    for y, name in sorted((y, name) for name, y in ends.items()):
        last = max(y, last + 0.055 * (high - low))
        axis.annotate(name, (x, last), xytext=(6, 0), textcoords="offset points", va="center", color=COLOURS[name], fontsize=8)


def panel(axis, title, x, y=""):
    axis.set_title(title, fontsize=10, loc="left"), axis.set_xlabel(x, fontsize=9), axis.set_ylabel(y, fontsize=9)
    axis.grid(alpha=0.25, lw=0.6), axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def figures(results):
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no figures: pip install matplotlib")

    def save(figure, name):
        figure.tight_layout()
        figure.savefig(results / name, dpi=140, metadata={"Software": None}), plt.close(figure)

    sizes, ablations = Table(results, "tal-2"), Table(results, "tal-9")
    if sizes:
        figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True)
        for axis, size in zip(axes, WIDTHS):
            ends = {}
            for method in ("TAL", "TAL+", "TAL (w/o ans-net)", "TAL (w/o T.I.)", "LoGAH", "GHN-3"):
                cells = [(ablations if "w/o" in method else sizes).mean([f"{d}-{size}, {method}"], NINE) for d in (3, 6, 12)]
                if all(cells):
                    ends[method] = line(axis, (3, 6, 12), cells, method)
            panel(axis, f"{size}: {parameters(3, WIDTHS[size], 24) / 1e3:.0f}k to {parameters(12, WIDTHS[size], 24) / 1e3:.0f}k parameters", "layers",
                  "accuracy of untrained networks, %" if size == "Tiny" else "")
            axis.set_xticks((3, 6, 12)), axis.set_xlim(2.5, 17)
            label(axis, ends, 12)
        save(figure, "tal-sizes.png")

    other = Table(results, "alternatives")
    if other:
        figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
        for axis, tasks, title in ((axes[0], NINE, "nine tasks"), (axes[1], UNSEEN, "three tasks new to all")):
            ends = {}
            for name in ("TAL", "LoGAH", "selection", "random"):
                at = {32000 if n == "tune" else int(n): other.mean([f"3-Small, {name}, {n}"], tasks) for n in ("0", "1000", "4000", "tune", "40000")}
                at = {n: c for n, c in sorted(at.items()) if c}
                if at:
                    ends[name] = (line(axis, [max(n, 300) for n in at], list(at.values()), name), max(at))
            panel(axis, f"3-Small, mean of {title}", "training images of each task (leftmost: none)", "accuracy, %")
            axis.set_xscale("log"), axis.set_xlim(250, 200000)
            for name, (y, x) in ends.items():
                axis.annotate(name, (x if x else 300, y), xytext=(6, 0), textcoords="offset points", va="center", color=COLOURS[name], fontsize=8)
        save(figure, "alternatives.png")

    graphs = Table(results, "tal-fig3")
    if graphs:
        seed = min(s for c in graphs.values() for s in c)
        figure, axis = plt.subplots(figsize=(6.2, 5))
        for i, task in enumerate(NINE):
            points = [(graphs[row, "x"][seed], graphs[row, "y"][seed], int(row.split(", ")[1].split("-")[0])) for row in graphs.rows() if row.startswith(task + ",")]
            if points:
                colour = plt.get_cmap("tab10")(i)
                axis.scatter(*list(zip(*points))[:2], s=[6 * depth for *_, depth in points], color=colour, alpha=0.65, lw=0)
                axis.annotate(task, max(points, key=lambda p: p[2])[:2], xytext=(6, 4), textcoords="offset points", color=colour, fontsize=9)
        score = graphs.get(("silhouette, plane", "all"), {}).get(seed)
        panel(axis, "Graphs of 3 to 12 layers for nine tasks" + (f", silhouette {score:.2f}" if score is not None else ""), "first component (larger points: more layers)", "second component")
        save(figure, "tal-fig3.png")

    curves = Table(results, "al-fig3")
    if curves:
        figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
        for axis, net in zip(axes, ("ViT", "Swin")):
            ends, last = {}, 0
            for row in [r for r in curves.rows() if r.startswith(net)]:
                x = sorted(map(int, curves.columns(row)))
                ends[row.split(", ")[1]], last = line(axis, x, [curves[row, str(n)] for n in x], row.split(", ")[1]), x[-1]
            panel(axis, f"{net}: variety, 32 classes", "training images", "accuracy on val, %")
            axis.set_xlim(0, 1.3 * (last or 1)), label(axis, ends, last)
        save(figure, "al-fig3.png")

    draws = Table(results, "al-fig4")
    if draws:
        tasks = [c for c in draws.columns() if ("draw 1", c) in draws]
        figure, axes = plt.subplots(1, len(tasks), figsize=(3.6 * len(tasks), 3.6), squeeze=False)
        for axis, task in zip(axes[0], tasks):
            for seed in sorted(draws["draw 1", task]):
                mine = [draws[f"draw {d}", task][seed] for d in range(1, 6) if (f"draw {d}", task) in draws]
                spread_, mean = statistics.stdev(mine), statistics.mean(mine)
                axis.bar(seed, 2 * spread_, bottom=mean - spread_, width=0.6, color="#95a5a6", alpha=0.35, lw=0)
                axis.scatter([seed] * len(mine), mine, s=18, color="#7f8c8d", label="random draw" if seed == 0 else None)
                for name, mark in (("TALS", "D"), ("all ten", "_"), ("From Scratch", "x")):
                    if seed in draws.get((name, task), {}):
                        axis.scatter([seed], [draws[name, task][seed]], color=COLOURS[name], marker=mark, s=45, zorder=3, label=name if seed == 0 else None)
            panel(axis, task, "seed (pool)", "accuracy, %" if task == tasks[0] else "")
            axis.set_xticks(sorted(draws["draw 1", task])), axis.set_ylim(bottom=0)
        axes[0][-1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        save(figure, "al-fig4.png")


def of_data(text, results):
    """Pages say whose data they are about."""
    return text.replace("drawn data", "the papers' data") if results.parent.name == "paper" else text


def with_missing(lines):
    """The lines and, at the end, which of their rows have cells that were not run."""
    missing, title = {}, ""
    for text in lines:
        title = text.removeprefix("## ").split(":")[0] if text.startswith("## ") else title
        if re.search(r"\| - (\(|\|)", text):
            missing.setdefault(title, []).append(" ".join(text.split(" | ")[:2]).split(" - ")[0].removeprefix("| ").strip())
    named = [f"- {table}: {'; '.join(rows)}" for table, rows in missing.items()]
    return "\n".join(lines + (["", "## Not run", "", *named] if named else [])) + "\n"


def write(results, readme=None):
    """Everything that follows from the .csv files."""
    (results / "tal.md").write_text(of_data(with_missing(tal_tables(results)), results))
    (results / "adaptive.md").write_text(of_data(with_missing(adaptive_tables(results)), results))
    (results / "alternatives.md").write_text("\n".join(alternative_tables(results)) + "\n")
    table = of_data("\n".join(claim_table(results)), results)
    (results / "claims.md").write_text("# Which claims hold\n\n" + table + "\n")
    with open(results / "claims.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("paper", "where", "claim", "unit", "effect", "low", "high", "seeds", "verdict"), *judged(results)])
    if readme:
        before, _, rest = readme.read_text().partition("<!-- claims -->")
        _, found, after = rest.partition("<!-- /claims -->")
        if found:
            readme.write_text(before + "<!-- claims -->\n" + table + "\n<!-- /claims -->" + after)


def main(out=None):
    """The results of drawn data are results/; those of other runs, a smoke test or the papers' data, lie with these."""
    results, readme = (ROOT / "results", ROOT / "README.md") if not out or Path(out).name == "drawn" else (Path(out) / "results", None)
    results.mkdir(exist_ok=True)
    if out:
        collect(out, results)
    write(results, readme)
    figures(results)
    print((results / "claims.md").read_text())


if __name__ == "__main__":
    main(*sys.argv[1:])
