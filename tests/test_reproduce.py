"""The recipe lists and runs the right commands, results follow from runs and from .csv files, and a committed
number is found again."""
import argparse
import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import adaptive_learngene
import common
import data
import tal
from conftest import ROOT, log_of

sys.path.insert(0, str(ROOT / "results"))
import collect  # noqa: E402
import figures  # noqa: E402
import plan  # noqa: E402
import tables  # noqa: E402

PAPER = {"DATA": "datasets", "ANCESTRY": "vit_base.safetensors"}


# --------------------------------------------------------------------------------------------------
# The recipe
# --------------------------------------------------------------------------------------------------

# A tal.py that only notes how it was called.
STUB = """
import os, pathlib, sys, time
with open("order.txt", "a") as file:
    print(*sys.argv[1:], file=file)
if pathlib.Path("slow").exists():
    pathlib.Path("slow").write_text(str(os.getpid()))
    time.sleep(60)
sys.exit(pathlib.Path("broken").exists() and "evaluate" in sys.argv)
"""
NO_TORCH = """
__version__ = "0"
class cuda:
    is_available = lambda: False
"""


@pytest.fixture
def recipe(tmp_path):
    """reproduce.sh(*words) in a folder of its own, with programs that only note how they were called."""
    shutil.copy(ROOT / "reproduce.sh", tmp_path)
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "results" / "machine.py", tmp_path / "results")
    (tmp_path / "results" / "tables.py").touch()
    (tmp_path / "results" / "torch.py").write_text(NO_TORCH)
    (tmp_path / "torch.py").write_text(NO_TORCH)
    (tmp_path / "tal.py").write_text(STUB)
    clean = {k: v for k, v in os.environ.items() if k not in ("SEEDS", "ONCE", "SMOKE", "JOBS")}
    clean["VIRTUAL_ENV"] = str(tmp_path)
    clean["PATH"] = f"{Path(sys.executable).parent}:{clean['PATH']}"

    def run(*words, start=False, **more):
        command = ["bash", str(tmp_path / "reproduce.sh"), *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        if start:
            return subprocess.Popen(command, env={**clean, **more}, **pipes)
        return subprocess.run(command, env={**clean, **more}, timeout=120, **pipes)
    return run


def cells(result):
    """[(state, name, command)] of a dry run."""
    found = []
    for line in result.stdout.splitlines():
        if " min  " in line:
            _, _, state, name, command = line.split(None, 4)
            found.append((state, name, command))
    return found


def listed(result):
    return [name for _, name, _ in cells(result)]


def test_help_and_unknown_words(recipe):
    for flag in ("-h", "--help"):
        head = recipe(flag).stdout
        assert head.startswith("Every table and figure")
        assert "Parts: tal-1 ..." in head and "set -e" not in head
    unknown = recipe("tal-10")
    assert unknown.stderr == "error: there is no part tal-10; bash reproduce.sh --help lists them\n"
    without_data = recipe("--dry-run", "paper")
    with_a_blank = recipe("--dry-run", "paper", **{**PAPER, "DATA": "/my data"})
    for result in (unknown, without_data, with_a_blank):
        assert result.returncode == 2 and re.fullmatch("error: .*\n", result.stderr)


def test_dry_run_lists_cells_and_runs_none(recipe, tmp_path):
    """Three seeds of TAL and LoGAH, one of the others; al-4 needs pools."""
    two = recipe("--dry-run", "tal-2")
    three_seeds = [f"{run}-s{seed}" for run in ("ancestry", "logah", "tal") for seed in range(3)]
    once = ["ancestry-informed-s0", "tal-informed-s0", "ghn3-s0", "tal+-s0"]
    assert sorted(listed(two)) == sorted([*once, *three_seeds])
    assert re.match(r"13 cells, \d+ minutes", two.stdout.splitlines()[-1])
    assert len(listed(recipe("--dry-run", "tal-2", ONCE="0 1 2"))) == 21
    four = set(listed(recipe("--dry-run", "al-4", SEEDS="1")))
    assert four == {"small-s1", "table4-small-all-s1", *(f"table4-small-{genes}-s1" for genes in (1, 3, 6, 8))}
    assert not (tmp_path / "runs").exists()


def test_work_that_two_tables_share_is_one_cell(recipe):
    once = cells(recipe("--dry-run", "tal-2", SEEDS="0"))
    more = cells(recipe("--dry-run", "tal-2", "tal-4", "tal-fig3", SEEDS="0"))
    assert more[:-1] == once and more[-1][1] == "tal-s0" and "--stage plot" in more[-1][2]
    everything = cells(recipe("--dry-run"))
    assert len(set(everything)) == len(everything)


def minutes_planned(result):
    return int(result.stdout.splitlines()[-1].split("about ")[1].split()[0])


def test_two_sittings_are_planned_below_140_minutes_each(recipe):
    """Minutes are estimates for two cores of the machine that made the committed results."""
    tables_of_tal = ["alternatives", "tal-fig3", *(f"tal-{n}" for n in range(1, 10))]
    assert minutes_planned(recipe("--dry-run", *tables_of_tal)) <= 140
    assert minutes_planned(recipe("--dry-run", "al-1", "al-2", "al-3", "al-4", "al-fig3", "al-fig4")) <= 140


def test_headline_has_three_seeds_of_every_cell_of_its_claims(recipe):
    names = listed(recipe("--dry-run", "headline"))
    for run in ("tal", "logah", "no-task-info", "no-ancestry", "table1-small", "table4-small-all"):
        assert {f"{run}-s{seed}" for seed in range(3)} <= set(names)


def test_paper_mode_leaves_out_what_it_tabulates_nothing_of(recipe):
    assert "finetune-s0" not in listed(recipe("--dry-run", "paper", **PAPER))
    assert "finetune-s0" in listed(recipe("--dry-run", "paper", "alternatives", **PAPER))
    names = recipe("paper", "--list", **PAPER).stdout.split()
    assert names == list(dict.fromkeys(listed(recipe("--dry-run", "paper", **PAPER))))


@pytest.mark.parametrize("words, more", [
    ([], {}), (["al-pool"], {}), ([], {"SMOKE": "1"}), (["paper"], PAPER), (["paper", "al-pool"], PAPER)])
def test_every_command_passes_its_own_parser(recipe, tmp_path, monkeypatch, words, more):
    """Names, sizes, methods and what does not go together, without running and without real datasets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "locate", lambda name, *where: None)
    monkeypatch.setattr(tal, "vocabulary", lambda folder: 50257)
    programs = {"tal.py": tal, "adaptive_learngene.py": adaptive_learngene}
    for _, _, command in cells(recipe("--dry-run", *words, **more)):
        python, program, *argv = command.split()
        if python != "python":                                          # cp, in Table 7
            continue
        for flag, file in zip(argv, argv[1:]):
            if flag == "--ancestry":                                    # of another command, or published
                Path(file).parent.mkdir(parents=True, exist_ok=True)
                Path(file).touch()
        args = programs[program].settings(argv)
        assert args.preset == ("paper" if "paper" in words else "drawn") and args.output.startswith("runs/")


def test_commands_wait_for_what_they_need_and_are_run_once(recipe, tmp_path):
    assert recipe("tal-fig3", SEEDS="0").returncode == 0
    order = (tmp_path / "order.txt").read_text().splitlines()
    assert [line.split("--stage ")[1].split()[0] for line in order] == ["ancestry", "evaluate", "plot"]
    first, *ran, last = (tmp_path / "runs" / "drawn" / "run.txt").read_text().splitlines()
    assert re.match(r"# code [0-9a-f]{12}, commit unknown, clean, .*no GPU, .*, 2 at a time, start 20", first)
    assert re.fullmatch(r"# end 20.*", last)
    assert [line.split()[1] for line in ran] == ["ancestry-s0", "tal-s0", "tal-s0"]
    assert recipe("tal-fig3", SEEDS="0").returncode == 0
    assert (tmp_path / "order.txt").read_text().splitlines() == order
    assert len((tmp_path / "runs" / "drawn" / "run.txt").read_text().splitlines()) == 5     # no new start
    assert {state for state, _, _ in cells(recipe("--dry-run", "tal-fig3", SEEDS="0"))} == {"done"}


def test_after_a_failure_what_needs_it_is_left_out(recipe, tmp_path):
    (tmp_path / "broken").touch()
    result = recipe("tal-7", SEEDS="0")
    assert result.returncode == 1
    assert result.stderr == "error: tal-s0 failed, see runs/drawn/tal-s0/errors.txt\n"
    assert "st-" not in result.stdout
    (tmp_path / "broken").unlink()
    (tmp_path / "runs" / "drawn" / "tal-s0" / "pretrain.pt").touch()       # what the real one writes
    assert recipe("tal-7", SEEDS="0").returncode == 0
    assert (tmp_path / "runs" / "drawn" / "st-flowers-s0" / "pretrain.pt").exists()


def test_a_stopped_recipe_leaves_nothing_running(recipe, tmp_path):
    """Stopped, it stops what it started; the command is not taken for done."""
    (tmp_path / "slow").touch()
    script = recipe("tal-fig3", SEEDS="0", start=True)
    while not (tmp_path / "slow").read_text():
        assert script.poll() is None
        time.sleep(0.05)
    script.terminate()
    assert script.wait() == 130
    with pytest.raises(ProcessLookupError):
        for _ in range(600):                                            # it is told, and goes
            os.kill(int((tmp_path / "slow").read_text()), 0)
            time.sleep(0.05)
    assert "done" not in recipe("--dry-run", "tal-fig3", SEEDS="0").stdout


def test_a_cell_alone_waits_for_what_it_needs(recipe, tmp_path):
    """Two processes, as two jobs of an array: the second cell's command comes after the first's."""
    later = recipe("--cell", "tal-s0", "tal-fig3", SEEDS="0", WAIT="0.2", start=True)
    time.sleep(1)
    assert later.poll() is None and not (tmp_path / "order.txt").exists()
    assert recipe("--cell", "ancestry-s0", "tal-fig3", SEEDS="0").returncode == 0
    assert later.wait(timeout=60) == 0
    order = (tmp_path / "order.txt").read_text().splitlines()
    assert [line.split("--stage ")[1].split()[0] for line in order] == ["ancestry", "evaluate", "plot"]
    unknown = recipe("--cell", "tal-s7", "tal-fig3", SEEDS="0")
    assert unknown.returncode == 2 and "there is no cell tal-s7" in unknown.stderr


def test_a_cell_alone_ends_when_what_it_needs_failed(recipe, tmp_path):
    (tmp_path / "runs/drawn/ancestry-s0").mkdir(parents=True)
    (tmp_path / "runs/drawn/ancestry-s0/failed").touch()
    assert recipe("--cell", "tal-s0", "tal-fig3", SEEDS="0", WAIT="0.2").returncode == 1
    assert not (tmp_path / "order.txt").exists()


@pytest.fixture
def four_gpus(recipe, tmp_path):
    """reproduce.sh paper(*words) on a machine that says it has four GPUs; programs note which they see."""
    (tmp_path / "tal.py").write_text(
        "import os, sys\nwith open('seen.txt', 'a') as file:\n"
        "    gpus, started = os.environ['CUDA_VISIBLE_DEVICES'], os.environ.get('STARTED', 'alone')\n"
        "    print(gpus, started, *sys.argv[-2:], file=file)\n")
    (tmp_path / "results/plan.py").write_text("print('--accumulate 2')")
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "nvidia-smi").write_text("#!/bin/sh\nprintf 'GPU\\nGPU\\nGPU\\nGPU\\n'\n")
    (bin / "torchrun").write_text("#!/bin/sh\nexport STARTED=$3\nshift 3\nexec python $@\n")
    for program in bin.iterdir():
        program.chmod(0o755)
    path = f"{bin}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return lambda *words, **more: recipe("paper", *words, PATH=path, **PAPER, **more)


def test_one_cell_on_every_gpu(four_gpus, tmp_path):
    """Six cells, each on a GPU of its own, its batch in as many parts as fit; two wait for a free one."""
    assert four_gpus("tal-2", "tal-8").returncode == 0
    seen = [line.split() for line in (tmp_path / "seen.txt").read_text().splitlines()]
    assert len(seen) == 6 and {line[0] for line in seen} == set("0123")
    assert all(line[1:] == ["alone", "--accumulate", "2"] for line in seen)
    done = (tmp_path / "runs/paper/tal-s0/done").read_text()
    assert "--accumulate" not in done                                   # so that another GPU goes on with it


def test_paper_mode_without_a_gpu(recipe, tmp_path):
    (tmp_path / "results/plan.py").touch()
    result = recipe("paper", "tal-2", **PAPER)
    assert result.returncode == 0, result.stderr
    assert len((tmp_path / "order.txt").read_text().splitlines()) == 4


def test_cells_under_torchrun(four_gpus, tmp_path):
    """On each of two pairs of GPUs; more than there are is refused."""
    assert four_gpus("tal-2", GPUS="2").returncode == 0
    seen = [line.split() for line in (tmp_path / "seen.txt").read_text().splitlines()]
    assert {line[0] for line in seen} == {"0,1", "2,3"} and all(line[1] == "2" for line in seen)
    refused = four_gpus("tal-2", GPUS="3", CUDA_VISIBLE_DEVICES="5,6")
    assert refused.returncode == 2 and refused.stderr == "error: GPUS=3, but there are 2\n"


# --------------------------------------------------------------------------------------------------
# What the papers' runs take
# --------------------------------------------------------------------------------------------------

def kept_bytes(net, x, y):
    """What autograd keeps of a step under bfloat16, parameters left out: each piece of memory once."""
    parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes(), tensor          # held: no address comes twice
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(x)
        torch.nn.functional.cross_entropy(logits.float(), y)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("size, depth", [("tiny", 2), ("tiny", 4), ("small", 2)])
def test_memory_of_an_image_is_what_autograd_keeps(size, depth):
    config = common.vit_config(size, depth)
    net, x, y = common.ViT(config), torch.randn(3, 3, 224, 224), torch.zeros(3, dtype=torch.int64)
    per_image = (kept_bytes(net, x, y) - kept_bytes(net, x[:1], y[:1])) / 2
    assert plan.Network(depth, config.width, 197).kept() == pytest.approx(per_image, rel=0.02)


def test_memory_of_a_scene_is_not_less_than_autograd_keeps():
    net = adaptive_learngene.Segmenter(common.ViT(common.vit_config("tiny", 3)), 150, size=128)
    x, y = torch.randn(3, 3, 128, 128), torch.zeros(3, 128, 128, dtype=torch.int64)
    per_image = (kept_bytes(net, x, y) - kept_bytes(net, x[:1], y[:1])) / 2
    assert per_image < plan.segmenter(plan.Network(3, 192, 65), 8, 16).kept() < 1.3 * per_image


def test_multiplications_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode
    net, counted = common.ViT(common.vit_config("tiny", 4)), torch.nn.attention.SDPBackend.MATH
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.nn.attention.sdpa_kernel(counted):
        net(torch.randn(2, 3, 224, 224))
    ours = 2 * plan.Network(4, 192, 197).flops()
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)    # the head is left out


def test_work_and_parts_by_hand():
    """DeiT-Small, 100 epochs of 50,000 images in batches of 1,024; an image keeps 36 x 12 x 197 x 384 bytes."""
    command = ("python adaptive_learngene.py --preset paper --stage train --data cifar10 "
               "--method scratch,random --train-epochs 100 --genes 5")
    first, second = plan.work_of(command, set())
    assert first.images == 5e6 and second.images == 5 * 5e6 and first.batch == 1024
    whole = plan.gibibytes(first)
    assert whole == pytest.approx(2 + (16 * 21.6e6 + 1024 * 33.5e6) / 2 ** 30, rel=0.03)
    assert [plan.parts_for(first, memory) for memory in (80, 24, 12, 1)] == [1, 2, 4, None]
    assert plan.parts_for(first, 24, gpus=2) == 1
    rates = plan.assumed_rates()
    assert plan.hours(first, rates) == pytest.approx(5e6 / 1000 / 3600, rel=1e-6)


def test_every_cell_of_paper_mode_fits_a_gpu(recipe):
    """80 GiB with the paper's batch, 24 GiB in parts; each training is counted once."""
    lines = [("part", *cell) for cell in cells(recipe("--dry-run", "paper", **PAPER))]
    works = [work for _, _, some in plan.planned(lines) for work in some]
    assert len(works) > 150 and all(plan.parts_for(work, 80) == 1 for work in works)
    assert all(plan.parts_for(work, 24) for work in works)
    again = plan.planned([("part", "done", name, command) for _, _, name, command in lines])
    assert not any(some for _, _, some in again)


def test_check_says_what_is_missing(recipe, tmp_path, capsys, monkeypatch):
    """Without data and without a GPU; reproduce.sh pipes its cells into the report."""
    (tmp_path / "results" / "plan.py").write_text("import sys\nprint(sys.argv)\nprint(sys.stdin.read())")
    flags, *lines = recipe("--check", "tal-2", "al-3").stdout.splitlines()
    assert "'--data-dir', 'data', '--ancestry', 'vit_base.safetensors', '--gpt2', 'data/gpt2'" in flags
    where = argparse.Namespace(data_dir=str(tmp_path), ancestry="vit_base.safetensors", gpt2="gpt2",
                               output=str(tmp_path / "runs"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan.report(where, [line.split("\t") for line in lines if line])
    said = capsys.readouterr().out.splitlines()
    missing = [line.split(":")[0].split()[1] for line in said if line.startswith("MISSING")]
    assert {"imagenet", "decathlon/svhn", "ade20k", "ancestry", "GPT-2"} <= set(missing)
    assert "cifar10" not in missing and any("none here" in line for line in said)
    rows = [line.split() for line in said if line.startswith(("tal-2", "al-3"))]
    hours = {row[0]: float(row[2].replace(",", "")) for row in rows}
    assert hours["tal-2"] > 50 and 1 < hours["al-3"]
    listed_there = (tmp_path / "runs/cells.tsv").read_text().splitlines()
    assert listed_there[0].startswith("cell\t") and any(line.startswith("table3-s0\t") for line in listed_there)


# --------------------------------------------------------------------------------------------------
# From runs to numbers
# --------------------------------------------------------------------------------------------------

def write_log(folder, *records, torn=""):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "log.jsonl").write_text("".join(lines) + torn)


def numbers(out, table):
    return list(collect.by_rows_csv(collect.read_runs(out), table))


def test_patterns():
    assert collect.matches("tal+", "ghn3|tal+") and not collect.matches("tal+", "ghn3|tal")
    assert collect.matches("12-Tiny", "12-*") and not collect.matches("3-Tiny", "12-*|6-*")
    assert collect.matches("signs", "nine") and not collect.matches("clothing", "nine")


def test_the_last_word_of_a_run_counts_and_a_torn_line_does_not(tmp_path):
    trained = {"stage": "train", "task": "signs", "network": "12x48", "method": "tal", "images": 2000}
    again = [{**trained, "trained": 40}, {**trained, "trained": 50}]
    write_log(tmp_path / "tal-s1", *again, torn='{"stage": "tr')
    assert numbers(tmp_path, "tal-3") == [("12-Small, TAL", "signs", 1, 50)]


def test_runs_on_the_papers_data_fill_the_same_rows(tmp_path):
    """Decathlon's gtsrb those of signs, MRPC those of paraphrases."""
    trained = {"stage": "train", "task": "decathlon/gtsrb", "network": "12x192", "images": 512, "trained": 90}
    write_log(tmp_path / "logah-s0", trained)
    assert numbers(tmp_path, "tal-3") == [("12-Tiny, LoGAH", "signs", 0, 90)]
    untrained = {"st-gtsrb-s0": {"12-Tiny*": {"decathlon/gtsrb": 7, "average": 7}},
                 "text-logah-mrpc-s0": {"3-GPT2": {"mrpc": 60, "mrpc F1": 70}, "majority": {"mrpc": 66}}}
    for run, table in untrained.items():
        (tmp_path / run).mkdir()
        split = "test" if "text" in run else "val"
        (tmp_path / run / f"untrained-evaluate-{split}.json").write_text(json.dumps(table))
    wrong = {"12-Tiny": {"decathlon/gtsrb": 1}}                         # the paper's numbers are those of val
    (tmp_path / "st-gtsrb-s0" / "untrained-evaluate-test.json").write_text(json.dumps(wrong))
    assert numbers(tmp_path, "tal-7") == [("12-Tiny, TAL-st", "signs", 0, 7)]
    assert numbers(tmp_path, "tal-6") == [("3-GPT2, LoGAH", "paraphrases", 0, 60),
                                          ("3-GPT2, LoGAH", "paraphrases F1", 0, 70)]


def test_minutes_by_hand(tmp_path):
    """60,000 images of both stages at 1,000 a second: two minutes; of texts likewise."""
    logged = [{"stage": stage, "images": images, "images_per_s": 1000} for stage in ("pretrain", "tune")
              for images in (30000, 60000)]
    write_log(tmp_path / "tal-s0", *logged)
    write_log(tmp_path / "text-tal-s0", {"stage": "tune", "texts": 6000, "texts_per_s": 100})
    records = collect.read_runs(tmp_path)
    assert collect.minutes_of(records, "tal") == {0: 2} and collect.minutes_of(records, "text-tal") == {0: 1}


def test_the_fewest_learngenes_that_keep_95_percent(tmp_path):
    counts = {"stored": 3, "nominal": 2, "deployed": 9}
    found = {"stage": "train", "task": "kinds", "size": "drawn-small", "depths": [6], **counts}
    select = {"stage": "select", "task": "kinds", "depths": [6], "reward": 0.1}         # logged in between
    whole = {**found, "method": "all", "accuracy": 80, "genes": 0, "learngenes": list(range(1, 11))}
    write_log(tmp_path / "table4-small-all-s0", whole)
    write_log(tmp_path / "table1-small-s0", {**whole, "accuracy": 20})  # of another table
    for genes, accuracy in ((1, 75), (2, 76), (3, 79)):                 # 76 is 95 % of 80
        record = {**found, "method": "adaptive", "accuracy": accuracy, "genes": genes}
        write_log(tmp_path / f"table4-small-{genes}-s0", select, {**record, "learngenes": list(range(genes))})

    def rows():
        return {row: value for row, *_, value in collect.fewest_learngenes(collect.read_runs(tmp_path))}
    assert rows()["Small, Num"] == 2 and rows()["Small, Ours"] == 76 and rows()["Small, All"] == 80
    assert rows()["Small, 1 learngene"] == 75 and rows()["Small, 3 learngenes"] == 79
    assert rows()["Small, parameters nominal"] == 2
    for genes in (2, 3):
        shutil.rmtree(tmp_path / f"table4-small-{genes}-s0")
    assert rows()["Small, Num"] == 10 and rows()["Small, Ours"] == 80


# --------------------------------------------------------------------------------------------------
# Tables and claims
# --------------------------------------------------------------------------------------------------

def test_interval_and_verdict_by_hand():
    """1, 2, 3: mean 2, deviation 1, half width 4.303 / sqrt(3) = 2.484."""
    assert tables.interval([1, 2, 3]) == pytest.approx((2, 2 - 2.4844, 2 + 2.4844), abs=1e-3)
    assert tables.interval([1, 2]) == (1.5, None, None)
    assert tables.p_value([1, 2]) is None and tables.p_value([5, 5, 5]) == 0
    assert tables.verdict([1, 2, 3]) == "cannot be told here"           # -0.48 to 4.48
    assert tables.verdict([10, 11, 12]) == tables.verdict([1, 2, 3], bar=-1) == "holds"
    assert tables.verdict([10, 11, 12], bar=14) == "does not hold"      # all of 8.52 to 13.48 lies below
    assert tables.verdict([100, 100]) == "cannot be told here" and tables.verdict([]) == "not run"


def test_p_values_and_holm_by_other_means():
    """A t-test of scipy's, and the verdict that the interval gives; Holm's own example of four p-values."""
    assert tables.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    for n in range(3, 11):
        values = [math.sin(5 * k + n) + 0.4 for k in range(n)]
        _, low, high = tables.interval(values)
        for bar, p in ((low, 0.05), (high, 0.05)):                      # at the ends of the 95 % interval
            assert tables.p_value(values, bar) == pytest.approx(p, abs=1e-4)
        assert tables.p_value(values, low - 0.1) < 0.05 < tables.p_value(values, low + 0.1)


def a_claim(**fields):
    return {"paper": "TAL", "rows": "a", "columns": "*", "other rows": "b", "other columns": "",
            "unit": "points", "bar": "0", "per": "", "baseline": "", **fields}


def test_a_claim_on_every_task_needs_every_task(tmp_path):
    """Better by 10 on one task and by 10, 10.1, 10.2 or by -1, 0, 1 or by -10 on the other."""
    table = tables.Table(tmp_path, "tal-2")
    for other, word in (([20, 20.1, 20.2], "holds"), ([9, 10, 11], "cannot be told here"),
                        ([0, 0.1, 0.2], "does not hold")):
        table.update({("a", "signs"): {0: 20, 1: 20.1, 2: 20.2}, ("b", "signs"): dict.fromkeys(range(3), 10),
                      ("a", "glyphs"): dict(enumerate(other)), ("b", "glyphs"): dict.fromkeys(range(3), 10)})
        judged = tables.judge(a_claim(per="column"), table)
        assert judged["verdict"] == word


def test_no_verdict_against_a_baseline_at_chance(tmp_path):
    """Chance on signs is 100 / 32; a baseline has to be 5 % of the rest above it: 7.97."""
    table = tables.Table(tmp_path, "tal-2")
    claim = a_claim(baseline="yes")
    table["a", "signs"] = {0: 50, 1: 51, 2: 52}
    for baseline, word in ((7.9, "baseline does not work here"), (8.1, "holds")):
        table["b", "signs"] = dict.fromkeys(range(3), baseline)
        assert tables.judge(claim, table)["verdict"] == word
    assert tables.judge({**claim, "baseline": ""}, table)["verdict"] == "holds"


def test_cells_of_other_seeds_are_marked(tmp_path):
    table = tables.Table(tmp_path, "tal-8")
    table.update({("a", "x"): {0: 1, 1: 3}, ("b", "x"): {0: 1, 1: 3}, ("c", "x"): {1: 5}})
    *_, a, b, c = tables.printed(table).splitlines()
    assert (a, b, c) == ("| a | 2.0 ± 1.4 |", "| b | 2.0 ± 1.4 |", "| c | 5.0 [1] |")
    assert "Seeds 0, 1;" in tables.seeds_note(table)


def test_two_states_of_the_code_are_not_mixed(tmp_path, capsys):
    """A start that ran no cell does not count."""
    out = tmp_path / "smoke"
    out.mkdir()
    lines = "# code aaaaaaaaaaaa, commit 1\n0.1 tal-s0 python\n# end\n# code cccccccccccc, commit 1\n# end\n"
    (out / "run.txt").write_text(lines)
    assert collect.codes(out) == ["aaaaaaaaaaaa"]
    tables.main([str(out)])
    (out / "run.txt").write_text(lines + "# code bbbbbbbbbbbb, commit 2\n0.1 tal-s1 python\n")
    with pytest.raises(SystemExit):
        tables.main([str(out)])
    assert re.fullmatch("error: .* 2 states of the code .a{12}, b{12}.;.*MIXED=1.\n", capsys.readouterr().err)
    tables.main([str(out), "--mixed"])


def test_effects_by_hand(tmp_path):
    """Paired by seed, over the seeds that both sides have."""
    table = tables.Table(tmp_path, "tal-2")
    table.update({("3-Tiny, TAL", "signs"): {0: 50, 1: 40}, ("6-Tiny, TAL", "signs"): {0: 30, 1: 20, 2: 10},
                  ("3-Tiny, LoGAH", "signs"): {0: 20, 1: 15}, ("6-Tiny, LoGAH", "signs"): {0: 20, 2: 5}})
    claim = {"rows": "*-Tiny, TAL", "columns": "signs", "other rows": "3-Tiny, LoGAH|6-Tiny, LoGAH",
             "other columns": "", "unit": "points"}
    assert tables.effects_of(claim, table) == {0: 20}
    assert tables.compared(60, 100, "% saved") == 40
    assert tables.compared(96, 100, "points above 95 %") == 1
    assert tables.shown(tables.compared(0.1, 0.75, "times"), "times") == "7.5"
    assert tables.compared(0, 1, "times") < 0                           # never: later than the end


def test_the_papers_numbers_are_whole():
    """Every row of a table has all of its columns, but for TLEG, of which the paper has four of six."""
    columns = {}
    for line in tables.read_csv(ROOT / "results" / "paper.csv"):
        columns.setdefault(line["table"], {}).setdefault(line["row"], []).append(line["column"])
    assert len(columns) == 13
    for rows in columns.values():
        first, *others = rows.values()
        assert all(row == first or "TLEG" in name and row == first[:4] for name, row in rows.items())
    counts = {name: (len(rows), len(rows[next(iter(rows))])) for name, rows in columns.items()}
    assert counts["al-2"] == (13, 4) and counts["al-4"] == (6, 4) and counts["al-1"] == (14, 7)
    assert counts["tal-2"] == (27, 9) and counts["tal-5"] == (12, 3) and counts["tal-9"] == (12, 9)
    table = tables.Table(ROOT / "results", "al-1")
    assert table.papers("Small, Adapt-Learngene", "kinds") == 97.88
    assert table.papers("Tiny, TLEG", "cars") is None
    table = tables.Table(ROOT / "results", "tal-9")
    assert tables.Table(ROOT / "results", "tal-2").papers("12-Base, TAL+", "flowers") == 55.69
    own = [table.papers("6-Small, TAL (w/o T.I.)", task) for task in collect.NINE]
    assert sum(own) / 9 == pytest.approx(48.69, abs=0.005)              # its AVG


def test_ten_headlines_of_both_outcomes():
    with open(ROOT / "results" / "claims.csv", newline="") as file:
        verdicts = {line["claim"]: line["verdict"] for line in csv.DictReader(file)}
    lines = tables.read_csv(ROOT / "results" / "paper_claims.csv")
    headlines = [verdicts[line["claim"]] for line in lines if line["headline"]]
    assert len(headlines) == 10 and {"holds", "does not hold"} <= set(headlines)


def fake_runs(out):
    """Two seeds of TAL and LoGAH, each with one accuracy for all sizes and tasks."""
    for name, accuracy in (("tal-s0", 60.), ("tal-s1", 62.), ("logah-s0", 20.), ("logah-s1", 18.)):
        rate = 1000. if name.startswith("tal") else 2000.
        write_log(out / name, *({"stage": stage, "step": 50, "images": 60000, "images_per_s": rate}
                                for stage in ("pretrain", "tune")))
        row = {task: accuracy for task in collect.NINE}
        table = {size + "*" * ("Base" in size): row for size in tables.SIZES}
        (out / name / "untrained-evaluate-test.json").write_text(json.dumps(table))
    return out


def test_tables_from_runs_and_again(tmp_path):
    out, results, readme = fake_runs(tmp_path / "runs"), tmp_path / "results", tmp_path / "README.md"
    results.mkdir()
    readme.write_text("before\n<!-- claims -->\nstale\n<!-- /claims -->\nafter\n")
    collect.collect(out, results)
    tables.write(results, readme)
    lines = (results / "tal-2.csv").read_text().splitlines()
    assert lines[:2] == ["table,row,column,seed,value", 'tal-2,"3-Tiny, LoGAH",aircraft,0,20']
    page = (results / "tal.md").read_text()
    assert "| 6-Small | TAL | 61.0 ± 1.4 (17.85) | 61.0 ± 1.4 (49.88) |" in page
    assert "| 3-Tiny | GHN-3 | - (3.12) |" in page
    assert "- Table 2: 3-Tiny GHN-3;" in page.split("## Not run")[1]
    assert "hours) | - (58.81) | 1.0 ± 0.0 (46.55) | 2.0 ± 0.0 (36.19) | - (70.53) |" in page
    claims = (results / "claims.md").read_text()
    assert "beat LoGAH's | TAL, Table 2 | +42.0 points | cannot be told here | same |" in claims  # 40, 44
    assert "stay the same, bit for bit | AL, Method | - | not run | same |" in claims
    text = readme.read_text()
    assert text.startswith("before\n<!-- claims -->\n| claim")
    assert text.endswith("|\n<!-- /claims -->\nafter\n")
    assert "stale" not in text and text.count("\n") == 3 + 2 + 10 + 1
    tables.write(results, readme)
    assert readme.read_text() == text
    shutil.rmtree(out / "logah-s1")             # a table of which runs are left follows these
    collect.collect(out, results)
    assert tables.Table(results, "tal-2").mean(["6-Small, LoGAH"], collect.NINE) == {0: 20}


def test_committed_pages_follow_from_the_committed_numbers(tmp_path):
    for path in [*(ROOT / "results").glob("*.csv"), ROOT / "results" / "run.txt"]:
        shutil.copy(path, tmp_path)
    readme = Path(shutil.copy(ROOT / "README.md", tmp_path))
    (tmp_path / "claims.csv").unlink()
    tables.write(tmp_path, readme)
    for name in ("tal.md", "adaptive.md", "alternatives.md", "claims.md", "claims.csv"):
        committed = (ROOT / "results" / name).read_text()
        assert (tmp_path / name).read_text() == committed, f"results/tables.py makes another {name}"
    assert readme.read_text() == (ROOT / "README.md").read_text(), "results/tables.py makes another README"


def test_figures_are_drawn_from_the_committed_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    figures.draw({name: tables.Table(ROOT / "results", name) for name in collect.TABLES}, tmp_path)
    drawn = {path.name for path in tmp_path.glob("*.png")}
    committed = {path.name for path in (ROOT / "results").glob("*.png")}
    assert drawn == committed - {"contact_sheet.png"} and {"tal-sizes.png", "al-fig4.png"} <= drawn


def test_the_table_builder_says_what_is_wrong(capsys):
    with pytest.raises(SystemExit) as stopped:
        tables.main(["nowhere"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said == "error: there is no folder nowhere; bash reproduce.sh makes runs/drawn\n"


def test_a_committed_number_is_found_again(drawn, tmp_path):
    """The cheapest cell: random parameters, 4,000 images of clothing, seed 0 (Table 5).

    On the machine of the committed run the accuracy is the same to the last digit; other processors add up in
    another order, for which 2 points, 20 of 1,000 images, are allowed."""
    tal.main(["--stage", "train", "--method", "random", "--seed", "0", "--data", "clothing",
              "--train-images", "4000", "--device", "cpu", "--data-dir", str(drawn),
              "--output", str(tmp_path)])
    (record,) = log_of(tmp_path, "train")
    committed = tables.Table(ROOT / "results", "tal-5").cell("3-Small, clothing, short", "RandInit")
    assert record["trained"] == pytest.approx(committed[0], abs=2)
