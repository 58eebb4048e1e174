"""From the runs of reproduce.sh to numbers: results/TABLE.csv, with one line per row, column and seed.

Each number comes from a log.jsonl or JSON file of a run: most as rows.csv says, others by a function here.
A table of which no run is there keeps its file. tables.py calls this, and makes the pages.

Contents: names - reading runs - numbers by rows.csv - numbers that are calculated - writing them
"""
import csv
import fnmatch
import json
import re
import statistics
from pathlib import Path

# --------------------------------------------------------------------------------------------------
# Names
# --------------------------------------------------------------------------------------------------

# A drawn task; of the dataset for which it stands the papers' name, that in data.py, and its classes.
STANDS_FOR = """
    base              ImageNet    imagenet                 1000
    aircraft          Airc.       decathlon/aircraft       100
    objects           C100        decathlon/cifar100       100
    pedestrian        DPed        decathlon/daimlerpedcls  2
    textures          DTD         decathlon/dtd            47
    signs             GTSRB       decathlon/gtsrb          43
    glyphs            OGlt        decathlon/omniglot       1623
    digits            SVHN        decathlon/svhn           10
    motion            UCF         decathlon/ucf101         101
    flowers           Flwr        decathlon/vgg-flowers    102
    clothing          F-MNIST     fashion-mnist            10
    faces             FER2013     fer2013                  7
    lesions           HAM10000    ham10000                 7
    paraphrases       MRPC        mrpc                     2
    paraphrases F1    MRPC F1     mrpc F1                  2
    acceptability     CoLA        cola                     2
    entailment        RTE         rte                      2
    sentiment         IMDB        imdb                     2
    kinds             CIFAR10     cifar10                  10
    variety           CIFAR100    cifar100                 100
    tail              Food-101    food101                  101
    -                 Cars        cars                     196
    -                 Flowers     flowers102-trainval      102
    -                 iNat-2019   inaturalist2019          1010
"""
PAPERS_NAME, DRAWN_NAME, CLASSES = {}, {}, {}
for line in STANDS_FOR.strip().splitlines():
    drawn, paper, real, classes = re.split(r"\s{2,}", line.strip())
    name = real if drawn == "-" else drawn          # by which the tables know it in both modes
    PAPERS_NAME[name], DRAWN_NAME[real], CLASSES[name] = paper, name, int(classes)
CLASSES["wide"] = CLASSES["base"]

NINE = ["aircraft", "objects", "pedestrian", "textures", "signs", "glyphs", "digits", "motion", "flowers"]
UNSEEN = ["clothing", "faces", "lesions"]
TEXT = ["paraphrases", "paraphrases F1", "acceptability", "entailment", "sentiment"]
SETS = {"nine": NINE, "unseen": UNSEEN, "text": TEXT}

METHODS = {"ghn3": "GHN-3", "logah": "LoGAH", "tal": "TAL", "tal+": "TAL+"}         # who a run is of
ABLATIONS = {"no-task-info": "TAL (w/o T.I.)", "no-ancestry": "TAL (w/o ans-net)", "tal": "TAL"}
INFORMED = {"tal-informed": "TAL (informed)"}        # its ancestry knows the nine tasks (D15)
WHO = {**METHODS, **ABLATIONS, **INFORMED, "random": "RandInit", "selection": "selection",
       "finetune": "fine-tuning"}
STARTS = {"prefine": "Pre-Fine", "scratch": "From Scratch", "heur": "Heur-Learngene",
          "auto": "Auto-Learngene", "peg": "PEG", "tleg": "TLEG", "weight-selection": "weight selection",
          "adaptive": "Adapt-Learngene", "all": "all learngenes"}
SIZE_OF_WIDTH = {"32": "Tiny", "48": "Small", "64": "Base", "96": "Base",
                 "192": "Tiny", "384": "Small", "768": "Base"}

# --------------------------------------------------------------------------------------------------
# Reading runs
# --------------------------------------------------------------------------------------------------

def log_lines(path):
    """The records of a log.jsonl; a line that a killed run has torn is left out."""
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def json_lines(path):
    """The same of figure3.json, and of untrained-STAGE-SPLIT.json: {size: {task: accuracy}}."""
    content = json.loads(path.read_text())
    if path.stem == "figure3":
        yield {"stage": "figure3", **content}
        return
    stage, split = path.stem.rsplit("-", 1)
    for size, row in content.items():
        for task, accuracy in row.items():
            # "*" marks a size never trained on
            yield {"stage": stage, "split": split, "size": size.rstrip("*"), "task": task,
                   "accuracy": accuracy}


def is_reported(record):
    """Numbers are those of test; of the Decathlon's own files, as the paper's, those of val."""
    split = "val" if str(record.get("task")).startswith("decathlon/") else "test"
    return record.get("split", split) == split


def read_runs(out):
    """All records. A command that was run again logs again, and its last word counts."""
    latest = {}
    for pattern in ("log.jsonl", "untrained-*.json", "figure3.json"):
        for path in sorted(out.rglob(pattern)):
            folder = str(path.parent.relative_to(out))
            for line in log_lines(path) if pattern == "log.jsonl" else json_lines(path):
                if not is_reported(line):
                    continue
                record = named(line, folder)
                same = ("stage", "task", "size", "images", "method", "draw", "learngene", "search")
                latest[folder, *(str(record.get(name)) for name in same)] = record
    return list(latest.values())


def named(record, folder):
    """The record, with what the tables call its run (the folder without the seed), method, task and so on."""
    seed = re.search(r"-s(\d+)(/|$)", folder)
    record["run"] = re.sub(r"-s\d+(?=/|$)", "", folder)
    record["seed"] = int(seed[1]) if seed else 0
    record["who"] = WHO.get(record["run"].split("/")[0])
    record["start"] = STARTS.get(record.get("method"))
    record["task"] = DRAWN_NAME.get(record.get("task"), record.get("task"))
    if "texts_per_s" in record:
        record["images"], record["images_per_s"] = record["texts"], record["texts_per_s"]
    if "network" in record:
        layers, width = record["network"].split("x")
        record["size"] = f"{layers}-{SIZE_OF_WIDTH.get(width, width)}"
    if record["stage"] == "train" and "depths" in record:
        record["layers"] = layers_here_and_there(record["depths"][0], record["size"])
        record["width"] = record["size"].removeprefix("drawn-").title()
    return record


def layers_here_and_there(layers, size):
    """Of drawn networks in brackets those of the paper's: its ancestry has 12 layers, the drawn one 6."""
    if size.startswith("drawn"):
        return f"{layers} ({layers + 3}) layers"
    return f"{layers} layers"


def matches(name, patterns):
    """Whether a name is among "a|b", in which * stands for anything, and a key of SETS for a set of tasks."""
    for pattern in patterns.split("|"):
        if name in SETS.get(pattern, []) or fnmatch.fnmatchcase(str(name), pattern):
            return True
    return False


def select(records, runs, stage, **fields):
    """Records of a stage whose fields match patterns, in the order of the runs' patterns."""
    found = []
    for run in runs.split("|"):
        for record in records:
            if record["stage"] == stage and matches(record["run"], run):
                if all(matches(record.get(name), patterns) for name, patterns in fields.items()):
                    found.append(record)
    return found


# --------------------------------------------------------------------------------------------------
# Numbers (row, column, seed, value) by rows.csv
# --------------------------------------------------------------------------------------------------

def by_rows_csv(records, table):
    with open(Path(__file__).with_name("rows.csv"), newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["table"] == table]
    for line in lines:
        fields = {name: line[name] for name in ("task", "size", "method")}
        for r in select(records, line["runs"], line["stage"], **fields):
            yield line["row"].format(**r), line["column"].format(**r), r["seed"], r[line["value"]]


# --------------------------------------------------------------------------------------------------
# Numbers that are calculated
# --------------------------------------------------------------------------------------------------

def minutes_of(records, runs):
    """{seed: minutes of training} of hypernetworks: the images of both stages at the 90th percentile of their
    images/s, which other work on the machine disturbs least."""
    minutes = {}
    for stage in ("pretrain", "tune"):
        logged = [r for r in select(records, runs, stage) if "images_per_s" in r]
        for seed in sorted({r["seed"] for r in logged}):
            mine = [r for r in logged if r["seed"] == seed]
            rates = sorted(r["images_per_s"] for r in mine)
            seconds = max(r["images"] for r in mine) / rates[int(0.9 * (len(rates) - 1))]
            minutes[seed] = minutes.get(seed, 0) + seconds / 60
    return minutes


def training_time(records):
    for run, method in METHODS.items():
        for seed, minutes in minutes_of(records, run).items():
            yield "minutes", method, seed, minutes


def text_training_time(records):
    """Of one TAL, and of the LoGAHs of all four tasks together."""
    for seed, minutes in minutes_of(records, "text-tal").items():
        yield "minutes, TAL", "all", seed, minutes
    runs = sorted({r["run"] for r in select(records, "text-logah-*", "tune")})
    each = [minutes_of(records, run) for run in runs]
    for seed in each[0] if len(each) == 4 else []:
        if all(seed in minutes for minutes in each):
            yield "minutes, LoGAH", "all", seed, sum(minutes[seed] for minutes in each)


def unseen_tasks(records):
    """Two trainings of each task, told apart by their images. Other sizes belong to alternatives."""
    found = select(records, "random/unseen-*|logah|tal", "train", task="unseen", size="3-*|6-*")
    longest = {}
    for r in found:
        longest[r["task"]] = max(longest.get(r["task"], 0), int(r["images"]))
    for r in found:
        length = "long" if int(r["images"]) == longest[r["task"]] else "short"
        yield f"{r['size']}, {r['task']}, {length}", r["who"], r["seed"], r["trained"]


def task_graphs(records):
    for r in select(records, "tal", "figure3"):
        for space, value in r["silhouette"].items():
            yield f"silhouette, {space}", "all", r["seed"], value
        yield "share between tasks", "all", r["seed"], r["between"]
        for task, points in zip(r["tasks"], r["xy"]):
            for network, (x, y) in zip(r["networks"], points):
                yield f"{task}, {network}", "x", r["seed"], x
                yield f"{task}, {network}", "y", r["seed"], y


def six_tasks(records):
    """Of a task that was trained on twice, the shorter training is called few."""
    found = select(records, "table1-*", "train")
    longest = {}
    for r in found:
        key = r["task"], r["width"]
        longest[key] = max(longest.get(key, 0), r["images"])
    for r in found:
        few = " few" if r["images"] < longest[r["task"], r["width"]] else ""
        yield f"{r['width']}{few}, {r['start']}", r["task"], r["seed"], r["accuracy"]


def fewest_learngenes(records):
    """What each number of learngenes gives, and the fewest that keep 95 % of what all of them give."""
    runs = select(records, "table4-*", "train")
    for whole in select(runs, "table4-*-all", "train"):
        task, seed, size = whole["task"], whole["seed"], whole["width"]
        fewer = []
        for r in runs:
            if (r["task"], r["seed"], r["width"]) == (task, seed, size) and r is not whole:
                fewer.append(r)
                row = f"{r['genes']} learngene{'s' if r['genes'] > 1 else ''}"
                yield f"{size}, {row}", task, seed, r["accuracy"]
        yield f"{size}, All", task, seed, whole["accuracy"]
        enough = [r for r in [*fewer, whole] if r["accuracy"] >= 0.95 * whole["accuracy"]]
        fewest = min(enough, key=lambda r: len(r["learngenes"]))
        yield f"{size}, Num", task, seed, len(fewest["learngenes"])
        yield f"{size}, Ours", task, seed, fewest["accuracy"]
        for kind in ("stored", "nominal", "deployed"):
            yield f"{size}, parameters {kind}", task, seed, fewest[kind]


def curves(records):
    for run, network in (("figure3", "ViT"), ("figure3-swin", "Swin")):
        for r in select(records, run, "train"):
            for look, accuracy in enumerate(r["curve"], 1):
                images = r["images"] * look / len(r["curve"])
                yield f"{network}, {r['start']}", f"{images:.0f}", r["seed"], accuracy


def selections(records):
    """Random ones, also such that hold learngene 1, those of TALS, all ten learngenes and none."""
    rows = {"random": "draw", "random1": "1 and draw", "adaptive": "TALS", "all": "all ten",
            "scratch": "From Scratch"}
    for r in select(records, "figure4-*", "train"):
        row = rows[r["method"]]
        if row.endswith("draw"):
            row += f" {r['draw'] + 1}"
        yield f"{r['width']}, {row}", r["task"], r["seed"], r["accuracy"]


def reward_ranks(records):
    """Spearman's correlation of reward and accuracy after training, over the selections of Fig. 4."""
    selections = {}
    for r in select(records, "figure4-*", "train"):
        if r.get("rewards"):
            same = selections.setdefault((r["width"], r["task"], r["seed"]), {})
            same[tuple(r["learngenes"])] = r            # two draws may be one selection
    for (width, task, seed), found in selections.items():
        accuracies = [r["accuracy"] for r in found.values()]
        for head in ("means", "ridge"):
            rewards = [r["rewards"][head] for r in found.values()]
            if len(set(rewards)) > 2 and len(set(accuracies)) > 2:
                yield f"{width}, rank by {head}", task, seed, rank_correlation(rewards, accuracies)


def rank_correlation(a, b):
    return statistics.correlation(ranks(a), ranks(b))


def ranks(values):
    """The place of each value in their order; equals share the mean of their places."""
    order = sorted(values)
    return [order.index(value) + (order.count(value) - 1) / 2 for value in values]


def pools(records):
    """Forgetting, and learngenes alone: row n of a "table" has the accuracies of learngene n on all datasets,
    the last row those of an untrained network."""
    for r in select(records, "*", "alone"):
        learned = [own for own in select(records, r["run"], "pool") if own["seed"] == r["seed"]]
        *learngenes, untrained = r["table"]
        means = [statistics.mean(row) for row in learngenes]
        best = [accuracies.index(max(accuracies)) for accuracies in zip(*learngenes)]
        values = {"kept": sum(own["kept"] for own in learned),
                  "compared": sum(own["earlier"] for own in learned),
                  "own dataset": statistics.mean(own["val"] for own in learned),
                  "alone, least": min(means),
                  "alone, most": max(means),
                  "untrained": statistics.mean(untrained),
                  "own is best": sum(n == dataset for dataset, n in enumerate(best)),
                  "datasets": len(best)}
        if r["run"].startswith("literal"):
            values |= {f"learngene {n} alone": mean for n, mean in enumerate(means, 1)}
        for column, value in values.items():
            yield f"pool {r['run']}", column, r["seed"], value


def domains(records):
    """Whether held-out classes rank the learngene of their own domain first."""
    own_learngene = {"signs": "2", "textures": "3", "clothing": "4"}
    for r in select(records, "domains", "select"):
        best = max(r["singles"], key=r["singles"].get)
        hit = best == own_learngene[r["task"].split(":")[0]]
        yield f"domains, {r['task']}", "own learngene first", r["seed"], int(hit)


# --------------------------------------------------------------------------------------------------
# Writing them
# --------------------------------------------------------------------------------------------------

TABLES = ["tal-1", "tal-2", "tal-3", "tal-4", "tal-5", "tal-6", "tal-7", "tal-8", "tal-9", "tal-fig3",
          "alternatives", "al-1", "al-2", "al-3", "al-4", "al-fig3", "al-fig4", "al-pool"]
CALCULATED = {"tal-4": [training_time], "tal-5": [unseen_tasks], "tal-6": [text_training_time],
              "tal-fig3": [task_graphs], "al-1": [six_tasks], "al-4": [fewest_learngenes],
              "al-fig3": [curves], "al-fig4": [selections, reward_ranks], "al-pool": [pools, domains]}


def codes(out):
    """The hashes of the states of the code of which run.txt has cells."""
    found, path, latest = [], out / "run.txt", "before states had names"
    for line in path.read_text().splitlines() if path.exists() else []:
        head = re.match(r"# code (\w+),", line)
        if head:
            latest = head[1]
        elif not line.startswith("#") and latest not in found:
            found.append(latest)
    return found


def collect(out, results):
    """Writes results/TABLE.csv of every table that has a run, and the runs' machine and minutes."""
    records = read_runs(out)
    for table in TABLES:
        numbers = list(by_rows_csv(records, table))
        for calculate in CALCULATED.get(table, []):
            numbers += calculate(records)
        if table == "alternatives" and all(row.endswith(", 0") for row, *_ in numbers):
            continue                            # of other tables' runs, none of its own
        if numbers:
            write_csv(results / f"{table}.csv", table, numbers)
    if (out / "run.txt").exists():
        (results / "run.txt").write_text((out / "run.txt").read_text())


def write_csv(path, table, numbers):
    """Several numbers of one row, column and seed are averaged."""
    cells = {}
    for row, column, seed, value in numbers:
        cells.setdefault((row, column, seed), []).append(value)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["table", "row", "column", "seed", "value"])
        for (row, column, seed), values in cells.items():
            writer.writerow([table, row, column, seed, f"{statistics.mean(values):.6g}"])
