"""The recipe lists and runs the right cells, the results follow from their .csv files, and a committed number is found again."""
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import tal
from common import ViT, ViTConfig, weight_selection
from test_common import log_of, refuses
from test_tal import CPU, ENV

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "results"))
import tables  # noqa: E402


# ----------------------------------------------------------------------------------------------------------------------
# The recipe
# ----------------------------------------------------------------------------------------------------------------------

STUB = """
import os, pathlib, sys, time
with open("order.txt", "a") as file:
    print(*sys.argv[1:], file=file)
if pathlib.Path("slow").exists():
    pathlib.Path("slow").write_text(str(os.getpid()))
    time.sleep(60)
sys.exit(pathlib.Path("broken").exists() and "evaluate" in sys.argv)
"""


@pytest.fixture
def recipe(tmp_path):
    """reproduce.sh(*words) in a folder of its own, with programs that only note how they were called."""
    shutil.copy(ROOT / "reproduce.sh", tmp_path)
    (tmp_path / "torch.py").write_text("__version__ = '0'\nclass cuda:\n    is_available = lambda: False\n")
    (tmp_path / "tal.py").write_text(STUB)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "tables.py").write_text("")
    env = {k: v for k, v in os.environ.items() if k not in ("SEEDS", "ONCE", "SMOKE", "JOBS")}
    env |= {"VIRTUAL_ENV": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}

    def run(*words, start=False, **more):
        how = dict(env={**env, **more}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return (subprocess.Popen if start else subprocess.run)(["bash", str(tmp_path / "reproduce.sh"), *words], **how)
    return run


def listed(result):
    return [line.split()[3] for line in result.stdout.splitlines()[:-1]]


def test_dry_run_lists_cells_and_runs_none(recipe, tmp_path):
    """Three seeds of TAL and LoGAH, one of the others; every word of al-4 is a learngene's pool, its source, or a table's cell."""
    two = recipe("--dry-run", "tal-2")
    assert sorted(listed(two)) == sorted(["ancestry", "ghn3-s0", "tal+-s0", *(f"{m}-s{s}" for m in ("logah", "tal") for s in range(3))])
    assert "9 cells" in two.stdout.splitlines()[-1]
    assert len(listed(recipe("--dry-run", "tal-2", ONCE="0 1 2"))) == 13
    four = set(listed(recipe("--dry-run", "al-4", SEEDS="1")))
    assert four == {"small-s1", "tiny-s1", "source", "table1-small-s1", "table1-tiny-s1", "table4-1-s1", "table4-2-s1", "table4-3-s1"}
    assert not (tmp_path / "runs").exists()


def test_work_that_two_tables_share_is_one_cell(recipe):
    once, twice = (listed(recipe("--dry-run", *parts, SEEDS="0")) for parts in (["tal-2"], ["tal-2", "tal-4", "tal-fig3"]))
    assert twice == once + ["tal-s0"]                                                   # the plot
    everything = recipe("--dry-run")
    lines = [line.split(None, 3)[3] for line in everything.stdout.splitlines()[:-1]]
    assert len(set(lines)) == len(lines)


def test_the_whole_is_planned_below_two_hours(recipe):
    """Minutes are estimates for two cores of the machine that made the committed results."""
    assert int(recipe("--dry-run").stdout.split("about ")[1].split()[0]) <= 120


def test_cells_wait_for_what_they_need_and_are_run_once(recipe, tmp_path):
    assert recipe("tal-fig3", SEEDS="0").returncode == 0
    order = [line.split()[line.split().index("--stage") + 1] for line in (tmp_path / "order.txt").read_text().splitlines()]
    assert order == ["ancestry", "evaluate", "plot"]
    first, *cells = (tmp_path / "runs" / "drawn" / "run.txt").read_text().splitlines()
    assert first.startswith("# ") and "no GPU" in first and [line.split()[1] for line in cells] == ["ancestry", "tal-s0", "tal-s0"]
    assert recipe("tal-fig3", SEEDS="0").returncode == 0
    assert len((tmp_path / "order.txt").read_text().splitlines()) == 3
    assert "done" in recipe("--dry-run", "tal-fig3", SEEDS="0").stdout


def test_after_a_failure_the_cells_that_need_it_are_left_out(recipe, tmp_path):
    (tmp_path / "broken").touch()
    result = recipe("tal-7", SEEDS="0")
    assert result.returncode == 1 and result.stderr.splitlines() == ["error: tal-s0 failed, see runs/drawn/tal-s0/errors.txt"]
    assert "st-" not in result.stdout
    (tmp_path / "broken").unlink()
    (tmp_path / "runs" / "drawn" / "tal-s0" / "pretrain.pt").touch()                    # what the real one writes
    assert recipe("tal-7", SEEDS="0").returncode == 0
    assert (tmp_path / "runs" / "drawn" / "st-flowers-s0" / "pretrain.pt").exists()     # TAL-st goes on from TAL's pretraining


def test_a_stopped_recipe_leaves_nothing_running(recipe, tmp_path):
    """Stopped, it stops what it started; the cell is not taken for done."""
    (tmp_path / "slow").touch()
    script = recipe("tal-fig3", SEEDS="0", start=True)
    while not (tmp_path / "slow").read_text():
        assert script.poll() is None
        time.sleep(0.05)
    script.terminate()
    assert script.wait() == 130
    with pytest.raises(ProcessLookupError):
        for _ in range(600):                                                            # it is told, and goes
            os.kill(int((tmp_path / "slow").read_text()), 0)
            time.sleep(0.05)
    assert "done" not in recipe("--dry-run", "tal-fig3", SEEDS="0").stdout


# ----------------------------------------------------------------------------------------------------------------------
# Tables and claims
# ----------------------------------------------------------------------------------------------------------------------

def test_interval_and_verdict_by_hand():
    """1, 2, 3: mean 2, deviation 1, half width 4.303 / sqrt(3) = 2.484."""
    assert tables.interval([1, 2, 3]) == pytest.approx((2, 2 - 2.4844, 2 + 2.4844), abs=1e-3)
    assert tables.interval([1, 2]) == (1.5, None, None)
    assert tables.verdict([1, 2, 3]) == "cannot be told here"                           # -0.48 to 4.48
    assert tables.verdict([10, 11, 12]) == tables.verdict([1, 2, 3], bar=-1) == "holds"
    assert tables.verdict([10, 11, 12], bar=14) == "does not hold"                      # all of 8.52 to 13.48 lies below
    assert tables.verdict([100, 100]) == "cannot be told here" and tables.verdict([]) == "not run"
    assert tables.less({0: 5, 1: 7, 2: 1}, {1: 3, 2: 4}) == {1: 4, 2: -3}


def test_the_papers_numbers_are_whole():
    for name, (columns, rows) in tables.PAPER.items():
        columns, found = columns.split(), tables.paper(name)
        rows = [row for row in rows.split(";") if row.strip()]
        assert len(found) == len(rows) * len(columns), name
    assert tables.paper("tal-2")["12-Base, TAL+", "flowers"] == 55.69
    assert sum(tables.paper("tal-9")["6-Small, TAL (w/o T.I.)", t] for t in tables.NINE) / 9 == pytest.approx(48.69, abs=0.005)   # its AVG


def fake_runs(out):
    """Two seeds of TAL and LoGAH, each with one accuracy for all sizes and tasks."""
    for name, accuracy in (("tal-s0", 60.), ("tal-s1", 62.), ("logah-s0", 20.), ("logah-s1", 18.)):
        (out / name).mkdir(parents=True)
        row = {task: accuracy for task in tables.NINE}
        (out / name / "untrained-evaluate-test.json").write_text(json.dumps({size + "*" * ("Base" in size): row for size in tables.SIZES}))
        logged = [{"stage": stage, "step": 50, "images": 60000, "images_per_s": 1000. if "tal" in name else 2000.} for stage in ("pretrain", "tune")]
        (out / name / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in logged))
    return out


def test_tables_from_runs_and_again(tmp_path):
    out, results, readme = fake_runs(tmp_path / "runs"), tmp_path / "results", tmp_path / "README.md"
    results.mkdir(), readme.write_text("before\n<!-- claims -->\nstale\n<!-- /claims -->\nafter\n")
    tables.collect(out, results)
    tables.write(results, readme)
    assert (results / "tal-2.csv").read_text().splitlines()[:2] == ["table,row,column,seed,value", 'tal-2,"3-Tiny, LoGAH",aircraft,0,20']
    page = (results / "tal.md").read_text()
    assert "| 6-Small | TAL | 61.0 ± 1.4 (17.85) | 61.0 ± 1.4 (49.88) |" in page and "| 3-Tiny | GHN-3 | - (3.12) |" in page
    assert "| minutes (paper: hours) | - (58.81) | 1.0 ± 0.0 (46.55) | 2.0 ± 0.0 (36.19) | - (70.53) |" in page
    assert "- Table 2: 3-Tiny GHN-3;" in page.split("## Not run")[1]
    text = readme.read_text()
    assert text.startswith("before\n<!-- claims -->\n| claim") and text.endswith("<!-- /claims -->\nafter\n") and "stale" not in text
    assert "| untrained networks from TAL beat LoGAH's | TAL, Table 2 | +42.0 points | cannot be told here |" in text     # 40 and 44, two seeds
    assert "| nothing is forgotten: earlier logits stay the same, bit for bit | AL, Method | - | not run |" in text
    tables.write(results, readme)
    assert readme.read_text() == text
    shutil.rmtree(out / "logah-s1")                     # a table of which runs are left follows these, the others stay
    tables.collect(out, results)
    assert tables.Table(results, "tal-2").mean(["6-Small, LoGAH"], tables.NINE) == {0: 20}


def test_committed_pages_follow_from_the_committed_numbers(tmp_path):
    for path in [*(ROOT / "results").glob("*.csv"), ROOT / "results" / "run.txt"]:
        if path.exists():
            shutil.copy(path, tmp_path)
    readme = Path(shutil.copy(ROOT / "README.md", tmp_path))
    (tmp_path / "claims.csv").unlink()
    tables.write(tmp_path, readme)
    for name in ("tal.md", "adaptive.md", "alternatives.md", "claims.md", "claims.csv"):
        assert (tmp_path / name).read_text() == (ROOT / "results" / name).read_text(), f"python results/tables.py makes another {name}"
    assert readme.read_text() == (ROOT / "README.md").read_text(), "python results/tables.py makes another README"


def test_a_committed_number_is_found_again(tmp_path):
    """The cheapest cell: random parameters, 4,000 images of clothing, seed 0 (Table 5). On the machine of the committed run the accuracy is the
    same to the last digit; other processors add up in another order, for which 2 points, 20 of 1,000 images, are allowed."""
    tal.main(["--method", "random", "--stage", "train", "--seed", "0", "--data", "clothing", "--train-images", "4000", "--device", "cpu",
              "--data-dir", str(tmp_path / "data"), "--output", str(tmp_path / "run")])
    (record,) = log_of(tmp_path / "run", "train")
    assert record["trained"] == pytest.approx(tables.Table(ROOT / "results", "tal-5")["clothing, short", "RandInit"][0], abs=2)


# ----------------------------------------------------------------------------------------------------------------------
# What the recipe asks of tal.py: cheap alternatives, the base task's head, Fig. 3's score
# ----------------------------------------------------------------------------------------------------------------------

def test_silhouette_by_hand():
    """Clusters {0, 2} and {10, 14} on a line: (12 - 2) / 12, (10 - 2) / 10, (9 - 4) / 9, (13 - 4) / 13."""
    points = torch.tensor([[[0., 0], [2, 0]], [[10, 0], [14, 0]]])
    assert tal.silhouette(points) == pytest.approx((10 / 12 + 8 / 10 + 5 / 9 + 9 / 13) / 4)
    assert tal.silhouette(points[:, :, :1]) == pytest.approx(tal.silhouette(points))
    assert tal.silhouette(torch.tensor([[[0.], [1]], [[0], [1]]])) == pytest.approx(-0.5)       # the same cluster twice


def a_task(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)):
    return tal.data.Task("t", ["a", "b"], mean, std, {"train": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)}, {"train": torch.zeros(2, dtype=torch.long)})


def test_finetune_takes_all_but_the_head_and_selection_evenly_spaced_weights(capsys):
    config = ViTConfig(32, 8, 32, 3, 4, 7, pool="avg")
    ancestry = tal.Ancestry(config, {})
    same, smaller, deeper = (ViT(ViTConfig(32, 8, width, depth, 2, 2, pool="avg")) for width, depth in ((32, 3), (16, 2), (16, 4)))
    same = ViT(ViTConfig(32, 8, 32, 3, 4, 2, pool="avg"))
    head, state = same.head.weight.clone(), ancestry.encoder.state_dict()
    tal.inherit(same, ancestry, a_task(), "finetune")
    assert all(torch.equal(p, state[n]) for n, p in same.state_dict().items() if "head" not in n) and torch.equal(same.head.weight, head)
    tal.inherit(smaller, ancestry, a_task(), "selection")
    assert torch.equal(smaller.blocks[1].mlp.fc1.weight, state["blocks.1.mlp.fc1.weight"][::2, ::2])
    other = ViT(ViTConfig(32, 8, 16, 2, 2, 2, pool="avg"))
    weight_selection(other, state)
    assert all(torch.equal(p, other.state_dict()[n]) for n, p in smaller.state_dict().items() if "head" not in n)
    refuses(capsys, lambda: tal.inherit(smaller, ancestry, a_task(), "finetune"), "--width 32", "--depth 3")
    refuses(capsys, lambda: tal.inherit(deeper, ancestry, a_task(), "selection"), "3 layers")
    refuses(capsys, lambda: tal.settings(["--method", "finetune", "--stage", "evaluate"]), "--stage train")


def test_inherited_networks_see_images_as_the_ancestry_did():
    """A published ancestry knows its own normalisation; the inherited one gets the task's and does the same."""
    ancestry = tal.Ancestry(ViTConfig(32, 8, 32, 2, 4, 7, pool="avg"), {}, (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)).eval()
    net, task, pixels = ViT(ViTConfig(32, 8, 32, 2, 4, 2, pool="avg")).eval(), a_task((0.1, 0.2, 0.3), (0.9, 0.8, 0.7)), torch.rand(4, 3, 32, 32)
    tal.inherit(net, ancestry, task, "finetune")
    normal = lambda mean, std: (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(net.encode(normal(task.mean, task.std)), ancestry.encoder.encode(normal((0.4, 0.5, 0.6), (0.2, 0.3, 0.1))), atol=1e-4, rtol=1e-4)


def test_the_base_task_keeps_its_predicted_head(tuned, drawn, tmp_path):
    """Table 1: trained on from the pretraining, the base task starts where the untrained network of `--stage pretrain` stands; another task
    starts from chance."""
    from conftest import TINY
    run = shutil.copytree(tuned, tmp_path / "run")
    (run / "log.jsonl").unlink()
    common = [*TINY, "--data-dir", str(drawn), "--output", str(run)]
    tal.main([*common, "--stage", "pretrain"])
    table = json.loads((run / "untrained-pretrain-val.json").read_text())
    tal.main([*common, "--stage", "train", "--source", "pretrain", "--data", "base,digits", "--size", "drawn-tiny", "--depth", "3", "--train-images", "200"])
    base, digits = log_of(run, "train")
    assert base["untrained"] == pytest.approx(next(row["base"] for size, row in table.items() if size.startswith("3-Tiny")))
    assert digits["task"] == "digits" and math.isfinite(digits["untrained"])
