"""All tables, figures and claims of both modes, from fabricated logs of every cell of reproduce.sh: each number
on a page is that of the log it belongs to, no cell is empty, no number is lost."""
import csv
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import adaptive_learngene as al
from conftest import ROOT

sys.path.insert(0, str(ROOT / "results"))
import collect  # noqa: E402
import figures  # noqa: E402
import plan  # noqa: E402
import tables  # noqa: E402

# What a page calls a run, a method and a real dataset; written again here, so that a wrong name is seen.
RUNS = {
    "tal": "TAL", "tal+": "TAL+", "logah": "LoGAH", "ghn3": "GHN-3", "random": "RandInit",
    "no-task-info": "TAL (w/o T.I.)", "no-ancestry": "TAL (w/o ans-net)", "tal-informed": "TAL (informed)",
    "direct": "random", "selection": "selection", "finetune": "fine-tuning"}
METHODS = {
    "adaptive": "Adapt-Learngene", "scratch": "From Scratch", "prefine": "Pre-Fine", "heur": "Heur-Learngene",
    "auto": "Auto-Learngene", "peg": "PEG", "tleg": "TLEG", "weight-selection": "weight selection",
    "all": "all learngenes"}
REAL = {
    "decathlon/aircraft": "Airc.", "decathlon/cifar100": "C100", "decathlon/daimlerpedcls": "DPed",
    "decathlon/dtd": "DTD", "decathlon/gtsrb": "GTSRB", "decathlon/omniglot": "OGlt", "decathlon/svhn": "SVHN",
    "decathlon/ucf101": "UCF", "decathlon/vgg-flowers": "Flwr", "fashion-mnist": "F-MNIST", "fer2013": "FER2013",
    "ham10000": "HAM10000", "mrpc": "MRPC", "mrpc F1": "MRPC F1", "cola": "CoLA", "rte": "RTE", "imdb": "IMDB",
    "cifar10": "CIFAR10", "cifar100": "CIFAR100", "food101": "Food-101", "cars": "Cars",
    "flowers102-trainval": "Flowers", "inaturalist2019": "iNat-2019"}
WIDTHS = {**plan.common.VIT_SIZES, **plan.common.GPT2_SIZES}


class Fabricated:
    """Logs of commands, in which each number is another one; seeds of one run have the same."""

    def __init__(self, out, real):
        self.out, self.real = out, real
        self.numbers, self.origin, self.written = {}, {}, set()

    def number(self, folder, *labels):
        """A number with one digit for what these words describe on a page; noted with the folder's seed."""
        run, _, rest = folder.partition("-s")
        seed = re.search(r"-s(\d+)(/|$)", folder)
        key = re.sub(r"-s\d+(?=/|$)", "", folder), *labels
        value = self.numbers.setdefault(key, round(1.1 + 0.1 * len(self.numbers), 1))
        self.origin[value] = {label for label in labels if label}
        self.written.add((value, int(seed[1]) if seed else 0))
        return value

    def task(self, name):
        return REAL.get(name, name) if self.real else name

    def log(self, folder, **record):
        path = self.out / folder / "log.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            file.write(json.dumps(record) + "\n")

    def command(self, folder, command):
        if command.startswith("cp "):
            return
        program, args = plan.flags_of(command)
        if program == "tal.py":
            self.tal(folder, args)
        else:
            self.adaptive(folder, args)

    def tal(self, folder, args):
        run = re.sub(r"-s\d+(?=/|$)", "", folder)
        who = RUNS.get(run.split("/")[0], "TAL-st" if run.startswith("st-") else "TAL")
        text = args.modality == "text"
        if text and args.method == "logah":
            who = "LoGAH as long" if "equal" in run else "LoGAH"
        if args.stage == "ancestry":
            return
        if args.stage == "plot":
            return self.plot(folder)
        if args.stage in ("evaluate", "pretrain"):
            self.speed(folder, args, who)
            tasks = [args.base_task] if args.stage == "pretrain" else args.tune_tasks.split(",")
            self.untrained(folder, args, who, tasks, text)
        if args.stage == "train":
            sizes = {32: "Tiny", 48: "Small", 96: "Base", 192: "Tiny", 384: "Small", 768: "Base"}
            width = plan.common.width_and_heads(args.size, WIDTHS)[0]
            size = f"{args.depth}-{sizes.get(width, width)}"
            # Every training of the default data is of the nine tasks
            for task in (args.data or args.tune_tasks).split(","):
                images = args.train_images or args.train_epochs * 1000
                images = images if images == "tune" else int(float(images))
                labels = ["trained from random"] if text else [who, size]
                if task not in (args.base_task,):
                    labels.append(self.task(task))
                else:
                    labels.append("trained")
                # after 4,000 images TAL's start is in Table 5 as well as among alternatives
                trained = self.number(folder, *labels, f"images {images}")
                self.origin[trained] -= {f"images {images}"}
                self.log(folder, stage="train", task=task, network=f"{args.depth}x{width}", method=args.method,
                         seed=args.seed, images=images, lr=args.train_lr, split=args.split, untrained=0.0,
                         trained=trained)

    def speed(self, folder, args, who):
        """Both stages together last as many minutes as the number says."""
        unit, stages = ("texts", ["tune"]) if args.modality == "text" else ("images", ["pretrain", "tune"])
        minutes = self.number(folder, "minutes")
        self.origin[minutes] = {who} if unit == "images" else set()
        rate = 60000 * len(stages) / (60 * minutes)
        for stage in stages if not folder.startswith("st-") else []:
            self.log(folder, stage=stage, step=50, **{unit: 60000, f"{unit}_per_s": rate})

    def untrained(self, folder, args, who, tasks, text):
        table = {}
        rows = [f"{depth}-GPT2" for depth in (3, 6, 9, 12)] + ["majority"] if text else tables.SIZES
        for size in rows:
            row = {}
            for task in tasks:
                for column in [task, f"{task} F1"] if task in ("mrpc", "paraphrases") else [task]:
                    labels = [who, size, "untrained" if args.stage == "pretrain" else self.task(column)]
                    if size == "majority":
                        labels = [size, self.task(column)]
                    row[column] = self.number(folder, *labels)
            table[size] = row
        path = self.out / folder / f"untrained-{args.stage}-{args.split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(table))

    def plot(self, folder):
        names = collect.NINE
        content = {"tasks": names, "networks": ["3-Small", "6-Small"], "between": 0.73,
                   "silhouette": {"plane": 0.91, "full": 0.82},
                   "xy": [[[k, 2 * k], [k + 1, k]] for k in range(9)]}
        (self.out / folder / "figure3.json").write_text(json.dumps(content))

    def adaptive(self, folder, args):
        if args.stage == "ancestry":
            learned = range(1, 4)
            for n in learned:
                self.log(folder, stage="pool", learngene=n, dataset=f"part {n}", val=50.0, kept=n - 1,
                         earlier=n - 1)
            alone = [[30.0 + n] * 3 for n in range(4)]
            self.log(folder, stage="alone", pool="hash", datasets=["a"] * 3, table=alone)
        if args.stage in ("train", "segment"):
            for task in al.names(args.data):
                for method in al.names(args.method):
                    for draw in range(al.DRAWS if method.startswith("random") else 1):
                        self.descendant(folder, args, task, method, draw)

    def descendant(self, folder, args, task, method, draw):
        run = folder.split("-")[0]
        depths = [args.depth[0] if args.depth else args.ancestry_depth]
        width = args.size.removeprefix("drawn-").title()
        start = METHODS.get(method)
        layers = f"{depths[0]} layers" if self.real else f"{depths[0]} ({depths[0] + 3}) layers"
        few_learngenes = "learngenes" if args.genes > 1 else "learngene"
        few = " few" if "few" in folder else ""
        named = {"table1": [width + few, start, self.task(task)],
                 "table2": [width, layers, {"scratch": "FromScratch", "adaptive": "Ours"}.get(method, start)],
                 "table3": [start, "mIoU"],
                 "table4": [width, self.task(task), "All" if method == "all" else few_learngenes],
                 "figure4": [width, self.task(task)],
                 "figure3": []}[run]
        value = self.number(folder, *named, method, str(draw), str(args.genes))
        self.origin[value] = set(named)
        learngenes = list(range(1, 1 + (args.genes or (10 if method == "all" else 2))))
        record = {"stage": args.stage, "task": task, "size": args.size, "depths": depths, "method": method,
                  "draw": draw, "genes": args.genes, "split": args.split,
                  "learngenes": learngenes if method in al.OURS else None,
                  "images": int(args.train_images or args.train_epochs * 1000)}
        if args.stage == "segment":
            self.log(folder, **record, miou=value)
        else:
            curve = [value - 12 + look for look in range(1, 13)]
            self.log(folder, **record, accuracy=value, curve=curve, stored=3, nominal=2, deployed=9)


MORE = {"paper": {"DATA": "datasets", "ANCESTRY": "vit.safetensors"}, "drawn": {}}


@pytest.fixture(scope="module", params=["drawn", "paper"])
def whole(request, tmp_path_factory):
    """(mode, what was fabricated, folder of the results)."""
    mode = request.param
    words = ["paper"] if mode == "paper" else []
    clean = {k: v for k, v in os.environ.items() if k not in ("SEEDS", "ONCE", "SMOKE", "JOBS")}
    command = ["bash", str(ROOT / "reproduce.sh"), "--dry-run", *words]
    env = {**clean, **MORE[mode]}
    listed = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    out = tmp_path_factory.mktemp("runs") / mode
    fabricated = Fabricated(out, mode == "paper")
    for line in listed.splitlines():
        if " min  " in line:
            _, _, _, folder, command = line.split(None, 4)
            fabricated.command(folder, command)
    (out / "run.txt").write_text("# code 0123456789ab, commit 1234567, clean, start now\n1.0 tal-s0 python\n")
    results = out / "results"
    results.mkdir()
    collect.collect(out, results)
    tables.write(results)
    return SimpleNamespace(mode=mode, fabricated=fabricated, results=results)


def page_tables(path):
    """[(title, head, row)] of the Markdown tables of a page."""
    found, title, head = [], "", None
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            title = line.strip("# ")
        if not line.startswith("|"):
            head = None
            continue
        cells = [cell.strip() for cell in line.strip("|").split(" |")]
        if head is None:
            head = cells
        elif not line.startswith("|---"):
            found.append((title, head, cells))
    return found


NUMBER = re.compile(r"(-?[\d,]+\.\d)( ± [\d.]+)?( \[[\d, ]+\])?( \([-\d.]+\))?$")
# By functions of collect.py and tables.py that tests know by hand.
COMPUTED = ("Table 4: training", "Table 8", "Fig. 3", "Fig. 4", "The pool")


def test_no_cell_is_empty(whole):
    for page in ("tal.md", "adaptive.md"):
        text = (whole.results / page).read_text()
        assert "## Not run" not in text and "{{" not in text
        for title, head, cells in page_tables(whole.results / page):
            assert len(cells) == len(head), (title, cells)
            assert not [cell for cell in cells if cell == "-" or cell.startswith("- (")], (title, cells)


def test_each_number_of_a_page_is_that_of_its_log(whole):
    """The words that describe it in the log stand in its row, over its column, or in the title."""
    seen = 0
    for page in ("tal.md", "adaptive.md"):
        for title, head, cells in page_tables(whole.results / page):
            if title.startswith(COMPUTED) or "linear model on pixels" in cells:
                continue
            labels = [cell for cell in cells if not NUMBER.match(cell)]
            for column, cell in zip(head, cells):
                number = NUMBER.match(cell)
                if not number or column == "mean" or "mean" in labels or "from scratch" in labels:
                    continue
                if title.startswith("Table 4") and ("Num" in labels or "Ours" in labels):
                    continue
                words = {word for label in labels for word in (label, *label.split(" ", 1))}
                words |= {column, column.split(" (")[0]}
                value = float(number[1].replace(",", ""))
                assert number[2] in (None, " ± 0.0"), (title, cells)
                wanted = whole.fabricated.origin[value]
                assert wanted <= words, (title, cells, column, value, wanted - words)
                seen += 1
    assert seen > 500


def test_means_are_those_of_their_row(whole):
    for page in ("tal.md", "adaptive.md"):
        for title, head, cells in page_tables(whole.results / page):
            if head[-1] == "mean" and not title.startswith(COMPUTED):
                values = [float(NUMBER.match(cell)[1]) for cell in cells if NUMBER.match(cell)]
                assert values[-1] == pytest.approx(sum(values[:-1]) / len(values[:-1]), abs=0.06)


def test_no_number_of_a_log_is_lost(whole):
    """But for sizes that no table has: Base of the ablations, other depths than 12 layers in Tables 1 and 7."""
    kept = set()
    for path in whole.results.glob("*.csv"):
        if path.name != "claims.csv":
            with open(path, newline="") as file:
                kept |= {(round(float(line["value"]), 1), int(line["seed"])) for line in csv.DictReader(file)}
    lost = []
    for value, seed in whole.fabricated.written - kept:
        key = next(key for key, number in whole.fabricated.numbers.items() if number == value)
        lost.append((key, seed))
    for key, seed in lost:
        run, *labels = key
        is_base = any(label.endswith("-Base") for label in labels)
        other = not any(label.startswith("12-") for label in labels)
        expected = run.startswith(("no-", "tal-informed")) and "minutes" in labels
        expected |= run.startswith("no-") and is_base
        expected |= run.startswith("st-") and (other or is_base or "minutes" in labels)
        expected |= "untrained" in labels and other
        expected |= run.startswith("text-") and "minutes" in labels         # summed over LoGAH's tasks
        expected |= run.startswith("text-") and "majority" in labels        # the same for all
        assert expected, (key, seed)


def test_every_claim_is_judged(whole):
    for line in tables.read_csv(whole.results / "claims.csv"):
        assert line["effect"] != "-" and line["verdict"] != "not run" and line["corrected"], line["claim"]
    claims = tables.read_csv(whole.results / "claims.csv")
    everything = tables.read_csv(ROOT / "results" / "paper_claims.csv")
    assert len(claims) == len(everything) - (whole.mode == "paper")


def test_pages_of_the_papers_data_do_not_speak_of_drawn_tasks(whole):
    text = "".join((whole.results / page).read_text() for page in ("tal.md", "adaptive.md", "claims.md"))
    named = re.findall(r"\bdrawn\b|\bsigns\b|\bglyphs\b|8,000 images|\bkinds\b|\bvariety\b", text)
    assert bool(named) == (whole.mode == "drawn"), named
    assert "0123456789ab" in text


def test_figures_are_drawn(whole):
    pytest.importorskip("matplotlib")
    figures.draw({name: tables.Table(whole.results, name) for name in collect.TABLES}, whole.results)
    drawn = {path.stem for path in whole.results.glob("*.png")}
    more = {"alternatives"} if whole.mode == "drawn" else set()
    assert drawn == {"tal-sizes", "tal-fig3", "al-fig3", "al-fig4"} | more
