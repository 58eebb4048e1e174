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

import data
import tal
from common import IMAGENET, ViT, ViTConfig, load_pretrained, read_weights
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


@pytest.mark.parametrize("flags, words", [("--format onnx", "--format"), ("--format torchvision", "--pool token"),
                                          ("--output {out}/a.onnx", "--output"), ("--data /no/such", "/no/such")])
def test_customize_bad_input(flags, words, drawn, tuned, tmp_path, capsys):
    root = images(tmp_path / "mine", 2)
    refuses(capsys, lambda: tal.main([*TINY, "--stage", "customize", "--data", str(root), "--data-dir", str(drawn), "--tal-dir", str(tuned),
                                      "--output", str(tmp_path / "a.pt"), *flags.format(out=tmp_path).split()]), words)
    assert os.listdir(tmp_path) == ["mine"]


def test_scenes_are_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(data.SPECS, "scenes", data.SPECS["scenes"]._replace(sizes=(4, 4, 4)))
    refuses(capsys, lambda: tal.main([*TINY, "--stage", "customize", "--data", "scenes", "--data-dir", str(tmp_path), "--tal-dir", str(tmp_path),
                                      "--output", str(tmp_path / "a.pt")]), "scenes has a class for every pixel")


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
