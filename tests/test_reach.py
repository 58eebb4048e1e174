"""Real data, real checkpoints, the user's own images: the stories of the README, end to end, on tiny copies; paper-scale steps."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import adaptive_learngene as al
import data
import tal
from common import HALF, IMAGENET, ViT, ViTConfig, export_weights, load_pretrained, read_weights, renormalised, vit_config
from conftest import TINY
from test_checkpoints import hugging_face, random_weights, saved, torchvision_vit
from test_common import log_of, refuses
from test_datasets import decathlon, folders
from test_tal import CPU, ENV

ROOT = Path(__file__).resolve().parent.parent


def images(root, classes, each=5, size=lambda i: (40, 30), mode="RGB"):
    """Class folders of random pictures, darker with every class."""
    rng = np.random.default_rng(0)
    for k in range(classes):
        (root / f"class {k:04d}").mkdir(parents=True)
        for i in range(each):
            w, h = size(i)
            pixels = rng.integers(0, 256 - 200 * k // classes, (h, w, 3)[:2 + (mode == "RGB")], dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"class {k:04d}" / f"{i}.png")
    return root


# ----------------------------------------------------------------------------------------------------------------------
# A pretrained ancestry
# ----------------------------------------------------------------------------------------------------------------------

def test_the_ancestry_sees_images_as_its_source_did(tmp_path):
    """From a batch normalised for the task to the pixels, and from these to the source's normalisation: by hand, for both."""
    pixels = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    task = data.Task("t", ["a", "b"], (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), {"train": pixels}, {"train": torch.zeros(6, dtype=torch.long)})
    net = random_weights(ViT(ViTConfig(32, 8, 64, 2, 4, 2)))
    ancestry = tal.Ancestry(net.config, {}, *IMAGENET).eval()
    ancestry.encoder.load_state_dict({n: p for n, p in net.state_dict().items() if "head" not in n})
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in IMAGENET)
    with torch.no_grad():
        x, _ = task.examples("train")
        torch.testing.assert_close(ancestry(x, task), net.encode((pixels / 255 - mean) / std), atol=1e-4, rtol=0)
        assert (net.encode(x) - ancestry(x, task)).abs().max() > 0.05            # it would have made a difference
        embedding = net.encode((pixels / 255 - mean) / std).mean(0)
    torch.testing.assert_close(tal.task_embedding(ancestry, task, CPU), embedding * 8 / embedding.norm(), atol=1e-3, rtol=0)
    assert not ancestry.state_dict().keys() & {"mean", "std"}
    assert tal.Ancestry(net.config, {}).eval()(torch.ones(1, 3, 48, 48)).shape == (1, 64)     # another size is brought to its own


@pytest.mark.parametrize("source", ["torchvision", "timm", "Hugging Face"])
def test_pretrained_ancestry(source, drawn, tmp_path, capsys):
    """Any of the three, of 32 px here and 48 there: no flag but the file's name."""
    config = ViTConfig(48, 8, 64, 1, 1, 1000)
    state = random_weights(ViT(config)).state_dict()
    state = {"torchvision": lambda: torchvision_vit(config).state_dict(), "timm": lambda: state, "Hugging Face": lambda: hugging_face(state)}[source]()
    file = saved(tmp_path / "their.safetensors", state)
    tal.main([*TINY, "--stage", "tune", "--method", "tal+", "--data-dir", str(drawn), "--output", str(tmp_path / "run"), "--ancestry", str(file)])
    said = capsys.readouterr().out
    assert f"under names of {source}" in said and ("0.485" in said) == (source == "torchvision")
    assert all(r["loss_aux"] > 0 for r in log_of(tmp_path / "run", "pretrain"))
    embeddings = torch.load(tmp_path / "run/tune.pt", weights_only=True)["extra"]["embeddings"]
    assert {n: tuple(I.shape) for n, I in embeddings.items()} == {"pedestrian": (64,), "digits": (64,)}
    root = images(tmp_path / "mine", 3)                      # the run remembers its ancestry, and its width
    tal.main([*TINY, "--stage", "customize", "--method", "tal+", "--data", str(root), "--tal-dir", str(tmp_path / "run"),
              "--output", str(tmp_path / "net.pt")])
    args = tal.settings([*TINY, "--stage", "tune", "--ancestry", str(file)])
    ancestry = tal.get_ancestry(args, tal.Run(tmp_path, {}, CPU), CPU)
    assert args.ancestry_width == 64 and ancestry.encoder.config.image_size == 32 and list(ancestry.heads) == ["imagenet"]


# ----------------------------------------------------------------------------------------------------------------------
# The user's own images
# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("what, make, flags", [
    ("grey", lambda root: images(root, 3, mode="L"), ""),
    ("two classes, 224 px", lambda root: images(root, 2), "--image-size 224 --patch 16 --format torchvision --pool token"),
    ("a thousand classes", lambda root: images(root, 1000, 2, size=lambda i: (8, 8)), "--epochs 0.05"),
    ("odd sizes", lambda root: images(root, 2, 6, size=lambda i: (1 + 7 * i, 90 - 11 * i)), "--image-size 36 --patch 12 --epochs 2")],
    ids=lambda v: v if isinstance(v, str) else "")
def test_customize_for_any_folder(what, make, flags, drawn, tuned, tmp_path, capsys):
    root, out = make(tmp_path / "my images"), tmp_path / "vit.safetensors"
    tal.main([*TINY, "--stage", "customize", "--data", str(root), "--data-dir", str(drawn), "--tal-dir", str(tuned), "--depth", "2",
              "--output", str(out), *flags.split()])
    said, card = capsys.readouterr().out, json.loads((tmp_path / "vit.json").read_text())
    classes = len(os.listdir(root))
    assert f"{classes} classes" in said and f"chance {100 / classes:.2f} %" in said and len(card["class_names"]) == classes
    assert ("head starts at random" in said) == (classes > 128) and ("after" in said) == ("epochs" in flags) == ("trained" in card)
    assert len(card["mean"]) == 3 and len(card["hypernet"]) == 64 and 0 <= card["untrained"] <= 100
    net, report = load_pretrained(out)
    assert net.config == ViTConfig(**card["architecture"]) and report["head"] == "kept" and net.config.num_classes == classes
    assert report["source"] == card["format"] and report["mean"] == tuple(card["mean"])
    assert net(torch.randn(2, 3, *[net.config.image_size] * 2)).isfinite().all()


def test_training_on_resumes(drawn, tuned, tmp_path, capsys):
    root, argv = images(tmp_path / "mine", 2), [*TINY, "--stage", "customize", "--data-dir", str(drawn), "--tal-dir", str(tuned)]
    for name in ("a", "a", "b"):
        tal.main([*argv, "--data", str(root), "--output", str(tmp_path / f"{name}.pt"), "--epochs", "50"])
    a, b = (read_weights(tmp_path / f"{name}.pt")[0] for name in "ab")
    assert all(torch.equal(a[n], b[n]) for n in b) and [r["step"] for r in log_of(tmp_path / "a", "customize")] == [1, 2]
    refuses(capsys, lambda: tal.main([*argv, "--data", str(root), "--output", str(tmp_path / "a.pt"), "--epochs", "50", "--seed", "1"]), "seed")


def test_customize_says_what_it_makes(drawn, tmp_path, capsys):
    """Without a TAL, for 224 px: the small one is made at 32 px, and serves the large network."""
    root = images(tmp_path / "mine", 2)
    for _ in range(2):
        tal.main([*TINY, "--stage", "customize", "--data", str(root), "--data-dir", str(drawn), "--tal-dir", str(tmp_path / "tal"),
                  "--image-size", "224", "--width", "64", "--heads", "4", "--output", str(tmp_path / "vit.pt")])
        said = capsys.readouterr().out
        assert ("there is no tuned TAL" in said) == (_ == 0)
    assert torch.load(tmp_path / "tal/tune.pt", weights_only=True)["image_size"] == 32
    assert read_weights(tmp_path / "vit.pt")[0]["pos_embed"].shape == (1, 14 ** 2, 64)


@pytest.mark.parametrize("flags, words", [("--format onnx", "--format"), ("--format torchvision", "class token"),
                                          ("--output {out}/a.onnx", "--output"), ("--data /no/such", "/no/such")])
def test_customize_bad_input(flags, words, drawn, tuned, tmp_path, capsys):
    root = images(tmp_path / "mine", 2)
    refuses(capsys, lambda: tal.main([*TINY, "--stage", "customize", "--data", str(root), "--data-dir", str(drawn), "--tal-dir", str(tuned),
                                      "--output", str(tmp_path / "a.pt"), *flags.format(out=tmp_path).split()]), words)
    assert os.listdir(tmp_path) == ["mine"]


@pytest.mark.parametrize("format, pool", [("timm", "avg"), ("torchvision", "token")])
def test_readme_shows_the_call_of_the_card(format, pool, tmp_path):
    config = ViTConfig(32, 8, 384, 6, 6, 2, pool)
    export_weights(ViT(config).state_dict(), config, tmp_path / "vit.pt", format)
    assert json.loads((tmp_path / "vit.json").read_text())["build"] in " ".join((ROOT / "README.md").read_text().split())


def test_small_settings_are_those_of_the_drawn_preset():
    """Whatever size and preset the network is asked for."""
    for flags in ("--preset paper --method tal+ --data-dir d", "--image-size 224 --patch 16 --method tal+ --data-dir d"):
        small = tal.small_settings(tal.settings(["--stage", "customize", *flags.split()]))
        assert vars(small) == {**vars(tal.settings(["--stage", "customize", "--method", "tal+", "--data-dir", "d"]))}


def test_scenes_are_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(data.SPECS, "scenes", data.SPECS["scenes"]._replace(sizes=(4, 4, 4)))
    refuses(capsys, lambda: tal.main([*TINY, "--stage", "customize", "--data", "scenes", "--data-dir", str(tmp_path), "--tal-dir", str(tmp_path),
                                      "--output", str(tmp_path / "a.pt")]), "scenes has a class for every pixel")


# ----------------------------------------------------------------------------------------------------------------------
# Adaptive-Learngene
# ----------------------------------------------------------------------------------------------------------------------

SMALL = ("--size drawn-tiny --ancestry-depth 2 --patch 16 --batch-size 8 --ancestry-epochs 1 --train-epochs 2 --select-steps 5 --looks 0 "
         "--split val --device cpu").split()


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """A run directory with a learngene for each of two folders of images, and a folder of two further classes."""
    root = tmp_path_factory.mktemp("pool")
    names = [str(images(root / name, classes, 6)) for name, classes in (("first", 2), ("second", 3))]
    al.main([*SMALL, "--stage", "ancestry", "--data", ",".join(names), "--output", str(root / "run")])
    return root


def test_state_for_another_normalisation():
    net, pixels = random_weights(ViT(ViTConfig(32, 8, 64, 2, 4, 5))), torch.rand(4, 3, 32, 32)
    a, b = [[torch.tensor(t).view(3, 1, 1) for t in pair] for pair in (HALF, IMAGENET)]
    with torch.no_grad():
        expected = net((pixels - a[0]) / a[1])
        net.load_state_dict(renormalised(net.state_dict(), HALF, IMAGENET))
        torch.testing.assert_close(net((pixels - b[0]) / b[1]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("flags, learngenes", [("--method adaptive", None), ("--method all --constrained --format torchvision", [1, 2]),
                                               ("--method all --recipe deit", [1, 2]), ("--method random --draws 1 --genes 1", None)])
def test_descendants_are_written(flags, learngenes, pool, tmp_path, monkeypatch):
    """What is written scores what was measured; the card says of what it is made. torchvision needs a class token."""
    if "torchvision" in flags:
        flags += f" --pool-type token --pool {tmp_path / 'pool'}"
        al.main([*SMALL, "--stage", "ancestry", "--data", f"{pool / 'first'},{pool / 'second'}", "--output", str(tmp_path / "run"),
                 *flags.split()[-4:]])
    root, out = images(tmp_path / "mine", 3, mode="L"), tmp_path / "net.pt"
    al.main([*SMALL, "--stage", "train", "--data", str(root), "--output", str(pool / "run"), "--depth", "3", "--export", str(out), *flags.split()])
    card = json.loads((tmp_path / "net.json").read_text())
    assert card["class_names"] == sorted(os.listdir(root)) and len(card["pool"]) == 64 and card["images"] == 24
    assert card["learngenes"] and (learngenes is None or card["learngenes"] == learngenes)
    net, report = load_pretrained(out)
    assert (report["source"], report["mean"]) == (card["format"], tuple(card["mean"])) and net.config.depth == 3
    assert tal.accuracy(net.eval(), data.load(str(root)), "val", "cpu") == card["accuracy"]


def test_learngenes_are_made_when_missing(pool, tmp_path, capsys):
    root = images(tmp_path / "mine", 2)
    argv = [*SMALL, "--stage", "train", "--data", str(root), "--stream", f"{pool / 'first'}", "--output", str(tmp_path / "run")]
    refuses(capsys, lambda: al.main(argv), "no learngenes")
    al.main([*argv, "--export", str(tmp_path / "net.safetensors")])
    assert "there are no learngenes in" in capsys.readouterr().out and (tmp_path / "net.safetensors").exists()


@pytest.mark.parametrize("method", ["prefine", "heur", "auto", "peg", "weight-selection"])
def test_published_ancestors(method, tmp_path, capsys):
    """Files for the size and for the next larger one; the patch embedding is changed for the task's normalisation."""
    root, files = images(tmp_path / "mine", 2), []
    for size in ("drawn-tiny", "drawn-small"):
        net = random_weights(ViT(vit_config(size, 2, image_size=32, patch_size=16, num_classes=9)))
        files.append(str(saved(tmp_path / f"{size}.safetensors", net.state_dict())))
    argv = [*SMALL, "--pool-type", "token", "--stage", "train", "--method", method, "--data", str(root), "--train-images", "8",
            "--pretrained", ",".join(files)]
    al.main([*argv, "--output", str(tmp_path / "run"), "--export", str(tmp_path / "net.pt")])
    said = capsys.readouterr().out
    assert "drawn-small.safetensors: " in said if method == "weight-selection" else "drawn-tiny.safetensors: " in said
    assert json.loads((tmp_path / "net.json").read_text())["pool"] is None
    task = data.load(str(root))
    net = al.ancestor(al.Run(tmp_path, {}, CPU), al.settings(argv), CPU, "drawn-tiny", task)
    theirs = read_weights(files[0])[0]
    assert not torch.equal(net.patch_embed.proj.weight, theirs["patch_embed.proj.weight"]) and torch.equal(net.pos_embed, theirs["pos_embed"])
    refuses(capsys, lambda: al.main([*argv, "--size", "drawn-small" if method == "weight-selection" else "drawn-base",
                                     "--output", str(tmp_path / "run")]), "a network of width 64 (drawn-base)")


def test_rewards_of_tasks_in_files(pool, tmp_path, monkeypatch):
    """Too large for memory, TALS sees the same images: the same rewards, whichever head."""
    logs = []
    for memory in (12, 0):
        monkeypatch.setattr(data, "MEMORY", memory)
        for head in ("ncm", "trained"):
            out = tmp_path / f"{head}-{memory}"
            al.main([*SMALL, "--stage", "select", "--data", str(pool / "second"), "--output", str(out), "--pool", str(pool / "run/pool"),
                     "--reward-head", head, "--reward-images", "8", "--search", "exhaustive"])
            logs.append(log_of(out, "select")[0]["reward"])
    assert logs[:2] == logs[2:]


@pytest.mark.parametrize("flags, words", [("--stage select --export {out}/a.pt", "--export"), ("--export {out}/a.onnx", "--export"),
                                          ("--export {out}/a.pt --format torchvision", "class token"), ("--export {out}/a.pt --method all,scratch", "one --method"),
                                          ("--method prefine --pretrained /no/such.pth", "/no/such.pth")])
def test_exports_that_cannot_be(flags, words, pool, tmp_path, capsys):
    refuses(capsys, lambda: al.main([*SMALL, "--stage", "train", "--data", str(pool / "first"), "--output", str(tmp_path / "run"),
                                     *flags.format(out=tmp_path).split()]), words)
    assert not list(tmp_path.glob("*.*"))


# ----------------------------------------------------------------------------------------------------------------------
# Paper scale
# ----------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """ImageNet and the nine domains, four training images each; a ViT-Base for 224 px."""
    root = tmp_path_factory.mktemp("real")
    folders(root / "imagenet", ("train", "val"), ("n01440764", "n01443537"))
    for name in tal.REAL_TASKS:
        decathlon(root / "decathlon-1.0", name.split("/")[1])
    torch.manual_seed(0)
    torch.save(ViT(ViTConfig(224, 16, 768, 12, 12, 2)).state_dict(), root / "vit_base.pth")
    return root


STEP = """
import resource, sys
import tal
tal.evaluate = lambda *a: None
tal.architectures = lambda *a, **k: [tal.ViTConfig(224, 16, 768, 12, 12)] * 1000
tal.main(sys.argv[1:])
print("peak:", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20, "GiB")
"""


def test_paper_preset_takes_steps(real, tmp_path, capsys):
    """TAL+ under ViT-Base at 224 px, batch 8, for 12-Base, the largest student: a step of pretraining, the nine embeddings, a step of tuning.
    No step needs more than 12 GiB."""
    argv = ["--preset", "paper", "--method", "tal+", "--stage", "tune", "--batch-size", "8", "--data-dir", str(real), "--device", "cpu",
            "--ancestry", str(real / "vit_base.pth"), "--output", str(tmp_path / "run"), "--pretrain-epochs", "1", "--tune-epochs", "0.2",
            "--log-every", "1", "--workers", "1", "--threads", "1"]
    done = subprocess.run([sys.executable, "-c", STEP, *argv], capture_output=True, text=True, cwd=ROOT, env=ENV, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    with capsys.disabled():
        print(f"\n12-Base under ViT-Base, 224 px, batch 8: {done.stdout.splitlines()[-1]}")
    assert float(done.stdout.split()[-2]) < 12
    steps = {stage: log_of(tmp_path / "run", stage) for stage in ("pretrain", "tune")}
    assert [len(s) for s in steps.values()] == [1, 1] and all(np.isfinite(r["loss"]) for s in steps.values() for r in s)
    assert "4 train images where the whole set has 31,367" in done.stdout


TENTH = """
import resource, sys
import torch
import adaptive_learngene as al, common
args = al.settings(sys.argv[1:])
machine = common.setup_machine("cpu", "auto", 0, 1)
pool, net = al.open_pool(args, machine), al.backbone(args, (12,), 0)
gene = {n: p.detach() for n, p in al.new_learngene(net, "delta").named_parameters()}
stem = {n: p.detach() for n, p in al.stem_of(net).items()}
for n in range(1, 10):                                       # nine learngenes, for what they cost
    pool.add(gene=gene, head={}, stem=stem if n == 1 else {}, dataset=str(n), class_names=["a", "b"], counts={}, depths=[12], seed=0)
    pool.seal(False, logits="", val=0.0)
(task,) = al.load_tasks(["imagenet/10#10"], args, machine).values()
al.learn(al.Run(args.output, vars(args), machine), args, machine, pool, task)
print(len(pool), task.num_classes, type(task).__name__)
print("peak:", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20, "GiB")
"""


def test_the_tenth_learngene_of_deit_base(tmp_path, capsys):
    """DeiT-Base with ten learngenes at 224 px, batch 8, DeiT's recipe, a subset of an ImageNet of 20 classes: one step."""
    folders(tmp_path / "imagenet", ("train", "val"), [f"n{k:08d}" for k in range(20)], each=4)
    argv = ["--preset", "paper", "--size", "base", "--stage", "ancestry", "--batch-size", "8", "--ancestry-epochs", "1", "--data-dir",
            str(tmp_path), "--output", str(tmp_path / "run"), "--workers", "1", "--threads", "1", "--log-every", "1"]
    done = subprocess.run([sys.executable, "-c", TENTH, *argv], capture_output=True, text=True, cwd=ROOT, env=ENV, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout.splitlines()
    with capsys.disabled():
        print(f"\nDeiT-Base with ten learngenes, 224 px, batch 8: {said[-1]}")
    assert said[-2] == "10 2 FileTask" and float(said[-1].split()[1]) < 12
    (record,) = map(json.loads, (tmp_path / "run/log.jsonl").read_text().splitlines())
    assert np.isfinite(record["loss"])
