"""The README's stories, end to end on tiny copies: published weights, own images, Python, steps of full size.

    1. A pretrained ancestry
    2. Your own images, by tal.py
    3. Your own images, by adaptive_learngene.py; published ancestors
    4. From Python
    5. Full size: a step under the paper preset
"""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import adaptive_learngene as al
import common
import data
import tal
from common import HALF, IMAGENET, ViT, ViTConfig
from conftest import (CPU, ENV, ROOT, TINY, decathlon, folders, hugging_face, images, log_of, random_weights,
                      refuses, saved, torchvision_vit)


# ------------------------------------------------------------------------------------------------------------
# 1. A pretrained ancestry
# ------------------------------------------------------------------------------------------------------------

def test_the_ancestry_sees_images_as_its_source_did():
    """Bytes, normalised as the source of the ancestry has it, not as the task: by hand, for both."""
    pixels = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    labels = torch.zeros(6, dtype=torch.long)
    task = data.Task("t", ["a", "b"], (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), {"train": pixels}, {"train": labels})
    net = random_weights(ViT(ViTConfig(32, 8, 64, 2, 4, 2)))
    ancestry = tal.Ancestry(net.config, {}, *IMAGENET).eval()
    ancestry.encoder.load_state_dict({n: p for n, p in net.state_dict().items() if "head" not in n})
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in IMAGENET)
    with torch.no_grad():
        features = net.encode((pixels / 255 - mean) / std)
        torch.testing.assert_close(ancestry(pixels, task), features, atol=1e-4, rtol=0)
        differently = net.encode(task.normalise(pixels))
        assert (differently - features).abs().max() > 0.05
    embedding = features.mean(0)
    embedding = embedding * 8 / embedding.norm()                                # D4: norm sqrt(64)
    torch.testing.assert_close(tal.task_embedding(ancestry, task, "cpu"), embedding, atol=1e-3, rtol=0)


def in_format(source, config):
    """A random ViT of this architecture under the names of a source."""
    state = random_weights(ViT(config)).state_dict()
    if source == "torchvision":
        return torchvision_vit(config).state_dict()
    return hugging_face(state) if source == "Hugging Face" else state


@pytest.mark.parametrize("source", ["torchvision", "timm", "Hugging Face"])
def test_pretrained_ancestry(source, drawn, tmp_path, capsys):
    """Any of the three, of 48 px there and 32 here: no flag but the file's name."""
    file = saved(tmp_path / "their.pth", in_format(source, ViTConfig(48, 8, 64, 1, 1, 1000)))
    run = tmp_path / "run"
    argv = [*TINY, "--method", "tal+", "--data-dir", str(drawn), "--output", str(run)]
    tal.main([*argv, "--stage", "tune", "--ancestry", str(file)])
    said = capsys.readouterr().out
    assert f"under names of {source}" in said
    assert ("0.485" in said) == (source == "torchvision")
    assert all(record["loss_aux"] > 0 for record in log_of(run, "pretrain"))
    model = tal.load(run)
    assert sorted(model.embeddings) == ["digits", "pedestrian"]
    assert all(I.shape == (64,) for I in model.embeddings.values())
    mine = images(tmp_path / "mine", 3)
    tal.main([*argv, "--stage", "customize", "--data", str(mine), "--export", str(tmp_path / "net.pt")])
    assert model.ancestry.encoder.config.image_size == 32                   # the run remembers its ancestry
    assert list(model.ancestry.heads) == ["imagenet"]


# ------------------------------------------------------------------------------------------------------------
# 2. Your own images, by tal.py
# ------------------------------------------------------------------------------------------------------------

def customize(folder, run, drawn, export, *flags):
    """tal.py --stage customize for a folder of images, with the TAL of a run."""
    tal.main([*TINY, "--stage", "customize", "--data", str(folder), "--data-dir", str(drawn), "--depth", "2",
              "--output", str(run), "--train-epochs", "0", "--export", str(export), *flags])


FOLDERS = {     # what: (how it is made, flags)
    "grey": (dict(classes=3, mode="L"), ""),
    "two classes, 224 px": (dict(classes=2),
                            "--image-size 224 --patch 16 --format torchvision --pooling token"),
    "a thousand classes": (dict(classes=1000, each=2, size=lambda i: (8, 8)), "--train-epochs 0.05"),
    "odd sizes": (dict(classes=2, each=6, size=lambda i: (1 + 7 * i, 90 - 11 * i)),
                  "--image-size 36 --patch 12 --train-epochs 2"),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_customize_for_any_folder(what, drawn, tuned, tmp_path, capsys):
    make, flags = FOLDERS[what]
    folder = images(tmp_path / "my images", **make)
    customize(folder, tuned, drawn, tmp_path / "vit.pt", *flags.split())
    said = capsys.readouterr().out
    card = json.loads((tmp_path / "vit.pt.json").read_text())
    classes = make["classes"]
    assert f"{classes} classes" in said and f"chance {100 / classes:.2f} %" in said
    assert ("is kept as it is" in said) == (classes > 128)
    assert ("after" in said) == ("epochs" in flags) == ("trained" in card)
    assert len(card["class_names"]) == classes and len(card["mean"]) == 3 and len(card["hypernet"]) == 64
    assert 0 <= card["untrained"] <= 100
    net, report = common.load_pretrained(tmp_path / "vit.pt")
    assert net.config == ViTConfig(**card["architecture"]) and net.config.num_classes == classes
    assert (report["head"], report["source"], report["mean"]) == ("kept", card["format"], tuple(card["mean"]))
    size = net.config.image_size
    assert net(torch.randn(2, 3, size, size)).isfinite().all()


def test_training_on_resumes(drawn, tuned, tmp_path):
    folder = images(tmp_path / "mine", 2)
    for name in ("a", "a", "b"):
        customize(folder, tuned, drawn, tmp_path / f"{name}.pt", "--train-epochs", "50")
    a, b = (common.read_weights(tmp_path / f"{name}.pt")[0] for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)


def test_customize_says_what_it_makes(drawn, tmp_path, capsys):
    """Without a TAL, for 224 px: the small one is made at 32 px, and serves the large network."""
    folder, run = images(tmp_path / "mine", 2), tmp_path / "tal"
    for time in ("first", "second"):
        customize(folder, run, drawn, tmp_path / "vit.pt", "--image-size", "224", "--size", "64x4")
        assert ("there is no tuned TAL" in capsys.readouterr().out) == (time == "first")
    assert tal.load(run).trained.image_size == 32
    assert common.read_weights(tmp_path / "vit.pt")[0]["pos_embed"].shape == (1, 14 ** 2, 64)


@pytest.mark.parametrize("flags, words", [
    ("--format onnx", "--format"), ("--format torchvision", "class token"),
    ("--export {out}/a.onnx", r"a\.onnx"), ("--data /no/such", "/no/such"),
    ("--data scenes", "scenes has a class for every pixel")])
def test_customize_bad_input(flags, words, drawn, tuned, tmp_path):
    folder = images(tmp_path / "mine", 2)
    with refuses(words):
        customize(folder, tuned, drawn, tmp_path / "a.pt", *flags.format(out=tmp_path).split())
    assert os.listdir(tmp_path) == ["mine"]


@pytest.mark.parametrize("format, pooling", [("timm", "avg"), ("torchvision", "token")])
def test_the_pages_show_the_call_of_the_card(format, pooling, tmp_path):
    config = ViTConfig(32, 8, 384, 6, 6, 2, pooling)
    common.export_weights(ViT(config).state_dict(), config, tmp_path / "vit.pt", format)
    shown = " ".join((ROOT / "docs/weights.md").read_text().split())
    assert json.loads((tmp_path / "vit.pt.json").read_text())["build"] in shown


# ------------------------------------------------------------------------------------------------------------
# 3. Your own images, by adaptive_learngene.py; published ancestors
# ------------------------------------------------------------------------------------------------------------

SMALL = (
    "--size drawn-tiny --ancestry-depth 2 --patch 16 --batch-size 8 --ancestry-epochs 1 --train-epochs 2 "
    "--select-steps 5 --split val --device cpu").split()


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """A run directory with a learngene for each of two folders of images, and these folders."""
    root = tmp_path_factory.mktemp("pool")
    names = [str(images(root / name, classes, 6)) for name, classes in (("first", 2), ("second", 3))]
    al.main([*SMALL, "--stage", "ancestry", "--data", ",".join(names), "--output", str(root / "run")])
    return root


def test_state_for_another_normalisation():
    net, pixels = random_weights(ViT(ViTConfig(32, 8, 64, 2, 4, 5))), torch.rand(4, 3, 32, 32)
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in IMAGENET)
    with torch.no_grad():
        expected = net((pixels - 0.5) / 0.5)
        net.load_state_dict(common.renormalised(net.state_dict(), HALF, IMAGENET))
        torch.testing.assert_close(net((pixels - mean) / std), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("flags, learngenes", [
    ("--method adaptive", None), ("--method all --constrained --format torchvision", [1, 2]),
    ("--method all --recipe deit", [1, 2])])
def test_descendants_are_written(flags, learngenes, pool, tmp_path):
    """What is written scores what was measured; the card says of what it is made."""
    run = pool / "run"
    if "torchvision" in flags:                                # it needs a class token, and so another pool
        flags += " --pooling token"
        run = tmp_path / "run"
        al.main([*SMALL, "--stage", "ancestry", "--data", f"{pool / 'first'},{pool / 'second'}",
                 "--output", str(run), "--pooling", "token"])
    folder, out = images(tmp_path / "mine", 3, mode="L"), tmp_path / "net.pt"
    al.main([*SMALL, "--stage", "train", "--data", str(folder), "--output", str(run), "--depth", "3",
             "--export", str(out), *flags.split()])
    card = json.loads((tmp_path / "net.pt.json").read_text())
    assert card["class_names"] == sorted(os.listdir(folder))
    assert len(card["pool"]) == 64 and card["images"] == 24
    assert card["learngenes"] and (learngenes is None or card["learngenes"] == learngenes)
    net, report = common.load_pretrained(out)
    assert report["source"] == card["format"] and report["mean"] == tuple(card["mean"])
    assert net.config.depth == 3
    assert common.accuracy(net.eval(), data.load(str(folder)), "val", "cpu") == card["accuracy"]


def test_learngenes_are_made_when_missing(pool, tmp_path, capsys):
    folder = images(tmp_path / "mine", 2)
    argv = [*SMALL, "--stage", "train", "--data", str(folder), "--stream", f"{pool / 'first'}",
            "--output", str(tmp_path / "run")]
    with refuses("no learngenes"):
        al.main(argv)
    al.main([*argv, "--export", str(tmp_path / "net.pt")])
    assert "there are no learngenes in" in capsys.readouterr().out and (tmp_path / "net.pt").exists()


@pytest.mark.parametrize("method", ["prefine", "heur", "auto", "peg", "weight-selection"])
def test_published_ancestors(method, tmp_path, capsys):
    """Files for the size and for the next larger one, each used where it is needed."""
    folder, files = images(tmp_path / "mine", 2), []
    for size in ("drawn-tiny", "drawn-small"):
        net = random_weights(ViT(common.vit_config(size, 2, image_size=32, patch_size=16, num_classes=9)))
        files.append(str(saved(tmp_path / f"{size}.pth", net.state_dict())))
    stream = images(tmp_path / "stream", 2)                  # auto and peg train beside the ancestor
    argv = [*SMALL, "--pooling", "token", "--stage", "train", "--method", method, "--data", str(folder),
            "--stream", str(stream), "--train-images", "8", "--ancestors", ",".join(files),
            "--output", str(tmp_path / "run")]
    al.main([*argv, "--export", str(tmp_path / "net.pt")])
    used = "drawn-small" if method == "weight-selection" else "drawn-tiny"
    assert f"{used}.pth: " in capsys.readouterr().out
    assert json.loads((tmp_path / "net.pt.json").read_text())["pool"] is None
    with refuses(r"a network of width 96 \(drawn-base\)"):
        al.main([*argv, "--size", "drawn-small" if method == "weight-selection" else "drawn-base"])


@pytest.mark.parametrize("head", ["means", "trained"])
def test_rewards_of_tasks_in_files(head, pool, tmp_path, monkeypatch):
    """Too large for memory, TALS sees the same images: the same rewards, whichever head."""
    monkeypatch.setattr(al, "REWARD_IMAGES", 8)
    rewards = []
    for memory in (12, 0):
        monkeypatch.setattr(data, "MEMORY", memory)
        out = tmp_path / f"{memory}"
        al.main([*SMALL, "--stage", "select", "--data", str(pool / "second"), "--output", str(out),
                 "--pool", str(pool / "run/pool"), "--reward-head", head, "--search", "exhaustive"])
        rewards.append(log_of(out, "select")[0]["reward"])
    assert rewards[0] == rewards[1]


@pytest.mark.parametrize("flags, words", [
    ("--stage select --export {out}/a.pt", "--export"), ("--export {out}/a.onnx", r"a\.onnx"),
    ("--export {out}/a.pt --format torchvision", "class token"),
    ("--export {out}/a.pt --method all,scratch", "one --method"),
    ("--method prefine --ancestors /no/such.pth", "/no/such.pth")])
def test_exports_that_cannot_be(flags, words, pool, tmp_path):
    with refuses(words):
        al.main([*SMALL, "--stage", "train", "--data", str(pool / "first"), "--output", str(tmp_path / "run"),
                 *flags.format(out=tmp_path).split()])
    assert not list(tmp_path.glob("*.*"))


# ------------------------------------------------------------------------------------------------------------
# 4. From Python
# ------------------------------------------------------------------------------------------------------------

def test_the_snippet_of_the_readme(drawn, tuned, tmp_path, monkeypatch):
    """The very lines of README.md, with a TAL and a pool that take seconds instead of the drawn preset's."""
    snippet = (ROOT / "README.md").read_text().split("```python")[1].split("```")[0]
    images(tmp_path / "my_images", 2)
    streams = [str(images(tmp_path / f"dataset {n}", 2, each=5 + n)) for n in range(5)]
    al.main([*SMALL, "--stage", "ancestry", "--data", ",".join(streams),
             "--output", str(tmp_path / "runs/adaptive")])
    (tmp_path / "runs/tal").symlink_to(tuned)
    (tmp_path / "data").symlink_to(drawn)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(snippet.replace('"signs"', '"digits"').replace('"tail"', '"clothing"'), names)
    assert names["net"].fc.out_features == 10 and names["vit"].config.depth == 4
    assert len(names["G"]) == 5 and set(map(float, names["G"])) <= {0.0, 1.0}


# ------------------------------------------------------------------------------------------------------------
# 5. Full size
# ------------------------------------------------------------------------------------------------------------

def measured(program, argv):
    """Runs a program in a process of its own: (the lines that it prints, its memory at most, in GiB)."""
    program += "\nimport resource\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20)"
    command = [sys.executable, "-c", program, *argv]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENV, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    *lines, peak = done.stdout.splitlines()
    return lines, float(peak)


STEPS = """
import sys
import tal
tal.evaluate = lambda *a, **k: None
tal.architectures = lambda *a, **k: [tal.ViTConfig(224, 16, 768, 12, 12)] * 1000
tal.main(sys.argv[1:])
"""


@pytest.mark.full_size
def test_paper_preset_takes_steps(tmp_path, capsys):
    """TAL+ under ViT-Base at 224 px, batch 8, for 12-Base, the largest student: a step of pretraining, the
    nine embeddings, a step of tuning. ImageNet and the nine domains have four training images each."""
    folders(tmp_path / "imagenet", ("train", "val"), ("n01440764", "n01443537"))
    for name in tal.REAL_TASKS:
        decathlon(tmp_path / "decathlon-1.0", name.split("/")[1])
    torch.save(ViT(ViTConfig(224, 16, 768, 12, 12, 2)).state_dict(), tmp_path / "vit_base.pth")
    lines, peak = measured(STEPS, [
        "--preset", "paper", "--method", "tal+", "--stage", "tune", "--batch-size", "8", "--device", "cpu",
        "--ancestry", str(tmp_path / "vit_base.pth"), "--data-dir", str(tmp_path),
        "--output", str(tmp_path / "run"), "--pretrain-epochs", "1", "--tune-epochs", "0.2", "--workers", "1",
        "--threads", "1", "--save-every", "1"])
    with capsys.disabled():
        print(f"\n12-Base under ViT-Base, 224 px, batch 8: {peak:.1f} GiB")
    assert peak < 12
    for stage in ("pretrain", "tune"):
        (record,) = log_of(tmp_path / "run", stage)
        assert np.isfinite(record["loss"])
    assert any("4 train images where the whole set has 31,367" in line for line in lines)


TENTH = """
import sys
import adaptive_learngene as al
import common, data
args = al.settings(sys.argv[1:])
machine = common.setup_machine("cpu", "auto", 0, 1)
run = common.Run(args.output, vars(args), machine)
(task,) = data.load_tasks(["imagenet/10#10"], args, machine).values()
pool = al.pool_of(run, args, new=True)
net = al.backbone(pool.config, (12,), 0)
for n in range(1, 10):                                       # nine learngenes, for what they cost
    pool.records.append({
        "gene": al.new_learngene(al.learngene_shapes(net), "zero"),
        "stem": {name: p.detach() for name, p in al.stem_of(net).items()} if n == 1 else {},
        "hash": str(n)})
al.learn(run, args, pool, task)
print(len(pool), task.num_classes, type(task).__name__)
"""


@pytest.mark.full_size
def test_the_tenth_learngene_of_deit_base(tmp_path, capsys):
    """DeiT-Base with ten learngenes at 224 px, batch 8, DeiT's recipe, a subset of two classes: one step."""
    folders(tmp_path / "imagenet", ("train", "val"), [f"n{k:08d}" for k in range(20)], each=4)
    lines, peak = measured(TENTH, [
        "--preset", "paper", "--size", "base", "--stage", "ancestry", "--batch-size", "8",
        "--ancestry-epochs", "1", "--data-dir", str(tmp_path), "--output", str(tmp_path / "run"),
        "--workers", "1", "--threads", "1", "--save-every", "1"])
    with capsys.disabled():
        print(f"\nDeiT-Base with ten learngenes, 224 px, batch 8: {peak:.1f} GiB")
    assert lines[-1] == "10 2 FileTask" and peak < 12
    (record,) = log_of(tmp_path / "run", "ancestry-10")
    assert np.isfinite(record["loss"])
