"""Every distinct command of `reproduce.sh paper`, end to end on tiny copies of the real datasets: networks of
a few channels under the papers' names, a step or two of each training, then the pages."""
import csv
import gzip
import json
import os
import pickle
import re
import struct
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

import adaptive_learngene as al
import common
import data
import tal
from conftest import ROOT, decathlon, folders, gpt2_files, picture, shade

sys.path.insert(0, str(ROOT / "results"))
import collect  # noqa: E402
import tables  # noqa: E402

pytestmark = [pytest.mark.full_size, pytest.mark.optional]


def numbered(prefix, count):
    return [f"{prefix}{k:02d}" for k in range(count)]


def arrays(root, monkeypatch):
    """CIFAR-10 and -100, Fashion-MNIST, FER2013."""
    for reader, key, names in ((datasets.CIFAR10, "labels", "label_names"),
                               (datasets.CIFAR100, "fine_labels", "fine_label_names")):
        folder = root / reader.base_folder
        folder.mkdir()
        for entry in ("train_list", "test_list"):
            monkeypatch.setattr(reader, entry, [[file, None] for file, _ in getattr(reader, entry)])
            for file, _ in getattr(reader, entry):
                pixels = np.random.default_rng(0).integers(0, 255, (20, 3072), dtype=np.uint8)
                content = {"data": pixels, key: [k % 2 for k in range(20)], "coarse_labels": [7] * 20}
                (folder / file).write_bytes(pickle.dumps(content, protocol=2))
        monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": None})
        (folder / reader.meta["filename"]).write_bytes(pickle.dumps({names: ["a", "b"]}, protocol=2))
    fashion = root / "FashionMNIST/raw"
    os.makedirs(fashion)
    for stem in ("train", "t10k"):
        for kind, shape in (("labels-idx1", (20,)), ("images-idx3", (20, 28, 28))):
            most = 10 if kind == "labels-idx1" else 256
            array = np.random.default_rng(0).integers(0, most, shape, dtype=np.uint8)
            head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *shape)
            with gzip.open(fashion / f"{stem}-{kind}-ubyte.gz", "wb") as file:
                file.write(head + array.tobytes())
    with open(root / "fer2013.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["emotion", "pixels", "Usage"])
        for usage in ("Training", "PublicTest", "PrivateTest"):
            writer.writerows([[k % 7, " ".join([str(10 * k)] * 2304), usage] for k in range(14)])


def lists(root, monkeypatch):
    """Food-101, iNaturalist, Flowers-102, HAM10000, ADE20K."""
    savemat = pytest.importorskip("scipy.io").savemat
    os.makedirs(root / "food-101/meta")
    for split in ("train", "test"):
        content = {name: [f"{name}/{split}{k}" for k in range(4)] for name in ("pie", "waffles")}
        (root / f"food-101/meta/{split}.json").write_text(json.dumps(content))
        for k, file in enumerate(file for files in content.values() for file in files):
            picture(root / f"food-101/images/{file}.jpg", shade(k))
    for split in ("train", "val"):
        categories = [dict(id=k, name=f"species {k}") for k in range(2)]
        content = dict(categories=categories, images=[], annotations=[])
        for k in range(6):
            file = f"train_val2019/Birds/{k % 2}/{split}{k}.jpg"
            content["images"].append(dict(id=k, file_name=file))
            content["annotations"].append(dict(id=k, image_id=k, category_id=k % 2))
            picture(root / file, shade(k))
        (root / f"{split}2019.json").write_text(json.dumps(content))
    without_sums = {key: (file, None) for key, (file, _) in datasets.Flowers102._file_dict.items()}
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", without_sums)
    for k in range(1, 307):                                 # three of each of the 102 classes
        picture(root / "flowers-102/jpg" / f"image_{k:05d}.jpg", shade(k % 3))
    labels = np.array([[1 + k % 102 for k in range(306)]], np.uint8)
    savemat(root / "flowers-102/imagelabels.mat", {"labels": labels})
    ids = np.arange(1, 307)
    splits = {"trnid": [ids[:102]], "valid": [ids[102:204]], "tstid": [ids[204:]]}
    savemat(root / "flowers-102/setid.mat", splits)
    with open(root / "HAM10000_metadata.csv", "w", newline="") as file:
        rows = [(f"HAM_{k:07d}", f"ISIC_{k:07d}", ("nv", "mel")[k % 2]) for k in range(20)]
        csv.writer(file).writerows([("lesion_id", "image_id", "dx"), *rows])
    for _, image, _ in rows:
        picture(root / "HAM10000_images_part_1" / f"{image}.jpg", shade(int(image[-1])))
    ade = root / "ADEChallengeData2016"
    for folder in ("training", "validation"):
        os.makedirs(ade / "annotations" / folder)
        for k in range(4):
            picture(ade / f"images/{folder}/ADE_{k:08d}.jpg", shade(k), size=(64, 64))
            mask = np.full((64, 64), 1, np.uint8)               # 0 is unlabelled
            mask[:20], mask[:, 40:] = 0, 2
            Image.fromarray(mask).save(ade / f"annotations/{folder}/ADE_{k:08d}.png")
    rows = ["Idx\tRatio\tTrain\tVal\tName"] + [f"{k}\t0.1\t1\t1\tthing {k}" for k in range(1, 151)]
    (ade / "objectInfo150.txt").write_text("\n".join(rows))


def texts(root):
    """MRPC, CoLA, RTE, IMDB, and GPT-2's files."""
    layouts = {"MRPC": "{y}\t1\t2\tone {k}\ttwo {k}", "CoLA": "src\t{y}\t\tone {k}",
               "RTE": "{k}\tone {k}\ttwo\t{word}"}
    heads = {"MRPC": ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"], "CoLA": [],
             "RTE": ["index\tsentence1\tsentence2\tlabel"]}
    for name, layout in layouts.items():
        os.makedirs(root / "glue" / name)
        for file in ("train.tsv", "dev.tsv"):
            words = ("entailment", "not_entailment")
            lines = [layout.format(k=f"{file[0]}{k}", y=k % 2, word=words[k % 2]) for k in range(20)]
            (root / "glue" / name / file).write_text("\n".join(heads[name] + lines) + "\n")
    for split in ("train", "test"):
        for kind in ("neg", "pos"):
            os.makedirs(root / "aclImdb" / split / kind)
            for k in range(10):
                (root / "aclImdb" / split / kind / f"{k}_1.txt").write_text(f"{split} {kind} {k}")
    gpt2_files(root / "gpt2")


@pytest.fixture
def paper(tmp_path, monkeypatch):
    """A folder with all datasets, a ViT "of the size of ViT-Base" and a GPT-2; networks of a few channels."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "datasets"
    root.mkdir()
    for domain in data.DOMAINS:
        if domain != "imagenet12":
            decathlon(root / "decathlon-1.0", domain, classes=("a", "b", "c"))
    folders(root / "imagenet", ("train", "val"), numbered("n", 20), each=3)
    folders(root / "stanford_cars", ("train", "test"), ("one", "two"), each=3)
    arrays(root, monkeypatch)
    lists(root, monkeypatch)
    texts(root)
    for name, size in (("tiny", (12, 3)), ("small", (24, 6)), ("base", (48, 12)), ("gpt2", (24, 6))):
        sizes = common.GPT2_SIZES if name == "gpt2" else common.VIT_SIZES
        monkeypatch.setitem(sizes, name, size)
        monkeypatch.setitem(tal.SIZES, name, size)
    monkeypatch.setattr(collect, "SIZE_OF_WIDTH", {"12": "Tiny", "24": "Small", "48": "Base"})
    monkeypatch.setitem(al.SWIN_SIZES, "swin_t", (8, (2, 2, 6, 2), 7, 4))
    small = replace(tal.HYPERNETS["tiny"], scale="fan-in", channels=256)
    monkeypatch.setitem(tal.HYPERNETS, "paper", small)
    monkeypatch.setattr(tal, "sample_architecture", lambda dataset, rng: (rng.randint(3, 4), 24, 3))
    vit = common.ViT(common.ViTConfig(image_size=32, patch_size=16, width=48, heads=12, num_classes=20))
    torch.save(vit.state_dict(), tmp_path / "vit_base.pt")
    (tmp_path / "vit_base.pt.json").write_text('{"heads": 12}')
    tokens = len(json.loads((root / "gpt2/vocab.json").read_text()))
    gpt2 = common.GPT2(common.GPT2Config(vocab=tokens, context=16, width=24, depth=2, heads=6, num_classes=0))
    common.export_gpt2(gpt2, str(root / "gpt2/model.safetensors"))
    return tmp_path


# One step or two of everything, on images of 32 px.
SHORT = {"tal.py": "--pretrain-epochs 0.01 --tune-epochs 0.01", "adaptive_learngene.py":
         "--ancestry-epochs 0.01 --select-steps 2 --scene-size 64 --crop 32 --reward-share 0.5"}
SMALL = ("--image-size 32 --batch-size 4 --train-images 4 --device cpu --amp none --workers 1 "
         "--save-every 1000")


# Numbers and names in which cells may differ and still be the same command.
ALIKE = r"(?<=--depth )\d+|(?<=--genes )\d+|-\d+(?=-s0)|st-[a-z0-9-]+(?=-s0)|decathlon/[a-z0-9-]+"


def listed(parts=()):
    """[(folder, command)] of the cells of paper mode."""
    command = ["bash", str(ROOT / "reproduce.sh"), "--dry-run", "paper", *parts]
    where = {"DATA": "datasets", "ANCESTRY": "vit_base.pt"}
    said = subprocess.run(command, check=True, text=True, capture_output=True, env={**os.environ, **where})
    lines = [line.split(None, 4) for line in said.stdout.splitlines() if " min  " in line]
    return [(folder, command) for _, _, _, folder, command in lines]


def distinct(cells):
    """Cells that differ in more than the names of tasks and the number of layers; and what these need."""
    found, kept = set(), []
    for folder, command in cells:
        kind = re.sub(ALIKE, "N", command)
        if kind not in found:
            found.add(kind)
            kept.append((folder, command))
    return kept


def test_a_step_of_every_distinct_command(paper, capsys):
    """To the pages: each of its tables has numbers."""
    pytest.importorskip("safetensors")
    cells = distinct(listed())
    programs = {"tal.py": tal, "adaptive_learngene.py": al}
    for folder, command in cells:
        words = command.split()
        if words[0] == "cp":
            os.makedirs(paper / words[2], exist_ok=True)
            subprocess.run(words, check=True)
            continue
        argv = [*words[2:], *SMALL.split(), *SHORT[words[1]].split()]
        if "text" in words:
            argv += ["--context", "16", "--pretrain-epochs", "0", "--tune-epochs", "0.1"]
        programs[words[1]].main(argv)
    results = paper / "runs/paper/results"
    results.mkdir()
    collect.collect(paper / "runs/paper", results)
    tables.write(results)
    made = {path.stem for path in results.glob("*.csv")}
    assert made >= set(collect.TABLES) - {"alternatives"}
    counts = Counter(command.split()[1] for _, command in cells)
    assert counts["tal.py"] > 20 and counts["adaptive_learngene.py"] > 20
