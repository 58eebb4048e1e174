"""The real datasets of data.py, from tiny copies laid out as the real ones are: labels, splits, traps, broken files."""
import csv
import gzip
import json
import os
import pickle
import struct
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

import data
from common import accuracy
from conftest import coco, decathlon, folders, picture, refuses, shade


def classes_seen(task, split):
    """The class of each image of a split by its colour: what labels[split] should be."""
    x = torch.stack([task.images[split][k] for k in range(len(task.labels[split]))])        # a tensor or ImageFiles
    return ((x[:, 0].float().mean((1, 2)) - 10) / 20).round().long()


def right_labels(task):
    for split in data.SPLITS:
        assert torch.equal(classes_seen(task, split), task.labels[split]), split


def counts(task):
    return [len(task.labels[split]) for split in data.SPLITS]


def load(name, folder, **how):
    return data.load(str(name), str(folder), **{"image_size": 16, "workers": 1, **how})


# ------------------------------------------------------------------------------------------------------------
# 2. Augmentation
# ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def both(tmp_path):
    """(in memory, in files) of the same folder: 25 images of random pixels in two classes."""
    rng = np.random.default_rng(0)
    for k in range(25):
        folder = tmp_path / "set" / "ab"[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + k, 30, 3), dtype=np.uint8)).save(folder / f"{k}.png")
    root = str(tmp_path / "set")
    task, files = load(root, tmp_path), load(root, tmp_path, memory=0)
    assert type(task) is data.Task and isinstance(files, data.FileTask)
    assert task.fingerprint == files.fingerprint and (task.mean, task.std) == (files.mean, files.std)
    return task, files


@pytest.mark.parametrize("recipe", ["decathlon", "deit"])
def test_recipes_are_pure_functions(both, recipe):
    """Of seed and step: not of workers, of what came before, of `world`, or of torch's own random state."""
    task, files = both
    expected = [files.batch("train", step, 8, seed=1, recipe=recipe)[0] for step in range(3)]
    files.workers = 0
    torch.manual_seed(7)
    state = torch.get_rng_state()
    for step in (2, 0):
        x = files.batch("train", step, 8, seed=1, recipe=recipe)[0]
        assert torch.equal(x, expected[step]) and x.shape == (8, 3, 16, 16)
    assert torch.equal(files.to("cpu").batch("train", 1, 8, seed=1, recipe=recipe, rank=1, world=2)[0], expected[1][1::2])
    assert not torch.equal(files.batch("train", 2, 8, seed=2, recipe=recipe)[0], expected[2])
    x = task.batch("train", 1, 8, seed=1, recipe=recipe)[0]
    assert torch.equal(task.batch("train", 1, 8, seed=1, recipe=recipe, rank=1, world=2)[0], x[1::2])
    assert not torch.equal(x, task.batch("train", 1, 8, seed=1)[0]) and torch.equal(torch.get_rng_state(), state)


def test_digits_are_not_mirrored():
    image = torch.arange(256, dtype=torch.uint8).repeat(3, 16, 1)[:, :, 100:164]     # brighter to the right
    for name, mirrored in (("decathlon/svhn", False), ("decathlon/dtd", True)):
        rising = [data.augmentation("decathlon", 16, name)(image).float() for _ in range(20)]
        assert any(x[:, :, 0].mean() > x[:, :, -1].mean() for x in rising) == mirrored


def test_erasing():
    torch.manual_seed(0)
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    share = [(data.erase(image) != 0).float().mean().item() for _ in range(400)]
    assert 60 < sum(s > 0 for s in share) < 140 and max(share) < 1 / 3 and (image == 0).all()


def test_mixed():
    x, y = torch.randn(8, 3, 16, 16), torch.arange(8) % 3
    first, target = data.mixed(x, y, 3, 0, 0)
    assert target.shape == (8, 3) and torch.allclose(target.sum(1), torch.ones(8))
    again = data.mixed(x, y, 3, 0, 0)
    assert torch.equal(first, again[0]) and torch.equal(target, again[1])
    assert not torch.equal(first, data.mixed(x, y, 3, 0, 1)[0])


# ------------------------------------------------------------------------------------------------------------
# 5. Images decoded as they are needed
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("workers", [0, 2])
def test_files_give_the_same_batches(both, workers):
    task, files = both
    files.workers = workers
    state = torch.get_rng_state()
    for step in (0, 1, 2, 3, 9, 4):                         # 20 images: the third batch runs over the end of an epoch
        for how in (dict(), dict(recipe="shift", rank=1, world=2)):
            for a, b in zip(task.batch("train", step, 8, seed=5, **how), files.batch("train", step, 8, seed=5, **how)):
                assert torch.equal(a, b)
    x, y = files.examples("val", 4)
    assert len(x) == 4 and torch.equal(torch.cat(list(x.split(3))), task.examples("val", 4)[0])
    brightest = lambda x: x.flatten(1).float()              # any function of the images will do
    assert accuracy(brightest, files, "train", "cpu") == accuracy(brightest, task, "train", "cpu")
    assert torch.equal(y, task.labels["val"][:4]) and torch.equal(torch.get_rng_state(), state)


def test_unreadable_images_are_skipped(tmp_path, capsys):
    """The next image of the class takes its place; it is said once by measure, once by batch."""
    folders(tmp_path, ("train", "val"), ("a", "b"), each=10)
    train = data.find(str(tmp_path), ".").files["train"]    # one whose neighbour is of the other class
    bad = Path(next(path for (path, label), (_, other) in zip(train, train[1:]) if label != other))
    bad.write_bytes(bad.read_bytes()[:200])
    task = load(tmp_path, tmp_path)
    said = capsys.readouterr().out
    assert "skipped 1 of 40" in said and str(bad) in said
    assert counts(task) == [19, 20, 20]
    right_labels(task)
    files = load(tmp_path, tmp_path, memory=0)
    for step in range(4):
        x, y = files.batch("train", step, 10)
        assert torch.equal(((x[:, 0].float().mean((1, 2)) - 10) / 20).round().long(), y)
    assert capsys.readouterr().out.count("skipped 1 of 20") == 2
    files.workers = 0
    other = next(path for path, _ in train if path != str(bad))
    Path(other).write_bytes(b"not an image")
    with refuses("cannot read 2 of 20 images"):
        for step in range(2):
            files.to("cpu").batch("train", step, 10)


# ------------------------------------------------------------------------------------------------------------
# 6. Real datasets
# ------------------------------------------------------------------------------------------------------------

# Visual Decathlon

def bare(file):
    return file.removeprefix("data/")


@pytest.mark.parametrize("root, below, given", [("decathlon-1.0", "", "."), ("decathlon-1.0", "", "decathlon-1.0"),
                                                ("decathlon-1.0", "", "decathlon-1.0/data"), (".", "", ".")])
def test_decathlon_from_any_root(tmp_path, capsys, root, below, given):
    decathlon(tmp_path / root)
    task = load("decathlon/gtsrb", tmp_path / given)
    assert task.class_names == ["Sign1", "Sign10", "Sign2"] and counts(task) == [4, 3, 3]
    right_labels(task)                                      # by position in categories, though class 0 has no training image
    assert task.mean == (0.3392, 0.3118, 0.3205) and task.name == "decathlon/gtsrb"
    said = capsys.readouterr().out
    assert "4 train images where the whole set has 31,367" in said and "no test images with labels" in said


def test_decathlon_flattened(tmp_path):
    decathlon(tmp_path, respell=bare)
    right_labels(load("decathlon/gtsrb", tmp_path))


def test_decathlon_imagenet_renamed(tmp_path):
    decathlon(tmp_path, "imagenet12", respell=lambda file: bare(file).replace("imagenet12", "imagenet"))
    right_labels(load("decathlon/imagenet12", tmp_path))


def test_decathlon_with_test_labels(tmp_path):
    decathlon(tmp_path, test=True)
    task = load("decathlon/gtsrb", tmp_path)
    assert counts(task) == [4, 3, 2]
    right_labels(task)


def test_decathlon_bad(tmp_path, capsys):
    with refuses("annotations/dtd_train.json.*dtd.tar"):
        load("decathlon/dtd", tmp_path)
    decathlon(tmp_path)
    os.remove(tmp_path / "data/gtsrb/train/0002/000000.jpg")
    with refuses("1 of 7 listed images are missing.*000000.jpg.*--check"):
        load("decathlon/gtsrb", tmp_path)
    coco(tmp_path / "annotations/gtsrb_val.json", "gtsrb", "val", [0], ["a", "b", "c"])
    with refuses("different categories"):
        load("decathlon/gtsrb", tmp_path)
    os.rename(tmp_path / "annotations/gtsrb_val.json", tmp_path / "val")
    with refuses("neither val nor test"):
        load("decathlon/gtsrb", tmp_path)
    (tmp_path / "annotations/gtsrb_val.json").write_text("{}")
    with refuses("gtsrb_val.json.*COCO"):
        load("decathlon/gtsrb", tmp_path)


@pytest.mark.parametrize("content, words", [
    ({"categories": [], "images": [], "annotations": []}, "lists no images with annotations"),
    ([], "COCO"), ({"categories": 3}, "COCO"), ({"categories": [3], "images": []}, "COCO"), ("[" * 100_000, "COCO"),
    ({"categories": [{"id": 1, "name": "a"}], "images": [], "annotations": [{"image_id": 1, "category_id": 2}]}, "COCO"),
    ({"categories": [{"id": [1], "name": "a"}], "images": []}, "COCO"), ("\xff", "COCO")])
def test_annotations_of_any_shape(tmp_path, content, words):
    path = tmp_path / "annotations" / "gtsrb_train.json"
    path.parent.mkdir()
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="latin-1")
    with refuses(f"gtsrb_train.json.*{words}"):
        load("decathlon/gtsrb", tmp_path)


def test_official_numbers():
    """The totals that the challenge's pages give, and no name that a drawn task has."""
    rows = [row for domain, row in data.DOMAINS.items() if domain != "imagenet12"]
    assert len(rows) == 9 and sum(row[1] for row in rows) == 173_776
    assert sum(row[1] for row in data.DOMAINS.values()) == 1_405_943
    assert data.DOMAINS["imagenet12"][1] + data.DOMAINS["imagenet12"][2] == data.REAL["imagenet"].official["train"]
    assert not set(data.REAL) & set(data.DRAWN)


# Folders by class: ImageNet, Cars, FER2013

WNIDS = ("n01440764", "n01443537", "n01484850")


def test_imagenet(tmp_path):
    folders(tmp_path, ("train", "val"), WNIDS, ending="JPEG")
    for given in (tmp_path, tmp_path.parent):
        tmp_path.rename(tmp_path.parent / "imagenet") if given is not tmp_path else None
        task = load("imagenet", given)
        assert task.class_names == list(WNIDS) and counts(task) == [6, 6, 6]
        right_labels(task)
    assert (task.mean, task.std) == data.IMAGENET and task.images["val"].data_ptr() == task.images["test"].data_ptr()


def test_a_named_folder_goes_first(tmp_path):
    """data_dir/train may belong to another dataset."""
    folders(tmp_path, ("train", "val"), ("cats", "dogs"))
    folders(tmp_path / "imagenet", ("train", "val"), WNIDS)
    assert load("imagenet", tmp_path).num_classes == 3


def test_imagenet_flat_val(tmp_path, capsys):
    folders(tmp_path, ("train",), WNIDS)
    picture(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG", (9, 9, 9))
    with refuses("is flat"):
        load("imagenet", tmp_path)
    with refuses("no train in.*a folder per class"):
        load("imagenet", tmp_path / "elsewhere")


def test_imagenet_flat_test(tmp_path, capsys):
    """The official test images have no labels."""
    folders(tmp_path, ("train", "val"), WNIDS)
    picture(tmp_path / "test" / "ILSVRC2012_test_00000001.JPEG", (9, 9, 9))
    assert counts(load("imagenet", tmp_path)) == [6, 6, 6]


def test_a_part_of_the_classes(tmp_path):
    folders(tmp_path, ("train", "val"), WNIDS)
    found = data.find_all("imagenet", str(tmp_path))
    task = data.load_real("part", "imagenet", found, [2, 0], image_size=16, workers=1, memory=1)
    assert task.class_names == [WNIDS[2], WNIDS[0]] and counts(task) == [4, 4, 4]
    assert torch.equal(classes_seen(task, "train"), torch.tensor([2, 0])[task.labels["train"]])
    whole = data.load_real("whole", "imagenet", found, None, image_size=16, workers=1, memory=1)
    assert whole.fingerprint != task.fingerprint


@pytest.mark.parametrize("memory", [12, 0])
def test_parts_of_real_datasets(tmp_path, monkeypatch, memory):
    """Only the files of these classes are opened, in memory or not; the lists are read once; imagenet's mean stays."""
    names, opened, finds = [f"n{k:08d}" for k in range(6)], [], []
    folders(tmp_path, ("train", "val"), names)
    open_image, find = data.open_image, data.find
    monkeypatch.setattr(data, "open_image", lambda path, size: opened.append(os.fsdecode(path)) or open_image(path, size))
    monkeypatch.setattr(data, "find", lambda *a: finds.append(a) or find(*a))
    parts = [f"imagenet/3#{k}" for k in (1, 2, 3)]
    tasks = data.load_many([*parts, "imagenet:4-5"], str(tmp_path), 16, workers=1, memory=memory)
    assert list(tasks) == [*parts, "imagenet:4-5"] == [t.name for t in tasks.values()] and len(finds) == 1
    for name, classes in zip(tasks, [*data.class_subsets(6, 3), [4, 5]]):
        task = tasks[name]
        assert task.class_names == [names[k] for k in classes] and counts(task) == [4, 4, 4]
        assert task.mean == data.IMAGENET[0]
        opened.clear()
        part = data.load(name, str(tmp_path), 16, workers=1, memory=memory)
        part.workers = 0
        part.batch("train", 0, 4)
        assert opened and {path.split(os.sep)[-2] for path in opened} <= set(part.class_names)
        assert torch.equal(classes_seen(task, "train"), torch.tensor(classes)[task.labels["train"]])


def test_parts_of_domains_with_a_slash(tmp_path, capsys):
    decathlon(tmp_path, classes=("1", "2", "3", "4"))
    for name in ("decathlon/gtsrb:0-1", "decathlon/gtsrb/2#2"):
        assert load(name, tmp_path).num_classes == 2 and load(name, tmp_path).mean == (0.3392, 0.3118, 0.3205)
    assert data.augmentation("decathlon", 16, "decathlon/gtsrb/2#2").transforms[2].__class__.__name__ == "CenterCrop"
    with refuses("0 to 3"):
        load("decathlon/gtsrb:3-4", tmp_path)
    with refuses("1 to 2 subsets"):
        load("decathlon/gtsrb/9#1", tmp_path)


def test_cars_in_class_folders(tmp_path, capsys):
    folders(tmp_path / "stanford_cars", ("train", "test"), ("Acura RL Sedan 2012", "Audi A5 Coupe 2012"))
    task = load("cars", tmp_path)
    assert counts(task) == [4, 4, 4]
    right_labels(task)


@pytest.mark.parametrize("name, marker", [("cars", "stanford_cars/devkit/cars_meta.mat"),
                                          ("flowers102", "flowers-102/setid.mat")])
def test_matlab_files_without_scipy(tmp_path, capsys, monkeypatch, name, marker):
    picture(str(tmp_path / marker) + ".jpg", (0, 0, 0))
    (tmp_path / marker).write_bytes(b"")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    monkeypatch.setattr(datasets.Flowers102, "_check_integrity", lambda self: True)
    with refuses("pip install scipy"):
        load(name, tmp_path)


@pytest.mark.optional
@pytest.mark.parametrize("nested", [False, True])
def test_cars(tmp_path, nested):
    savemat = pytest.importorskip("scipy.io").savemat
    root, names = tmp_path / "stanford_cars", np.array(["Acura RL", "Audi A5", "BMW M3"], object)
    os.makedirs(root / "devkit")
    savemat(root / "devkit/cars_meta.mat", {"class_names": names})
    for split, labels, path in (("train", [1, 3, 2, 2], "devkit/cars_train_annos.mat"),
                                ("test", [2, 1], "cars_test_annos_withlabels.mat")):
        columns = [(name, "O") for name in ("bbox_x1", "class", "fname")]
        rows = np.array([(1, label, f"{k:05d}.jpg") for k, label in enumerate(labels)], columns)
        savemat(root / path, {"annotations": rows})
        for k, label in enumerate(labels):
            picture(root / f"cars_{split}" / (f"cars_{split}" if nested else "") / f"{k:05d}.jpg", shade(label - 1))
    task = load("cars", tmp_path)
    assert task.class_names == list(names) and counts(task) == [4, 2, 2]
    right_labels(task)


@pytest.mark.optional
def test_flowers(tmp_path, monkeypatch):
    savemat = pytest.importorskip("scipy.io").savemat
    without_sums = {key: (file, None) for key, (file, _) in datasets.Flowers102._file_dict.items()}
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", without_sums)
    root, labels = tmp_path / "flowers-102", [3, 1, 2, 3, 1, 2, 2]
    for k, label in enumerate(labels, 1):
        picture(root / "jpg" / f"image_{k:05d}.jpg", shade(label - 1))
    savemat(root / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
    savemat(root / "setid.mat", {"trnid": [[1, 2]], "valid": [[3, 4]], "tstid": [[5, 6, 7]]})
    task = load("flowers102", tmp_path)
    assert counts(task) == [2, 2, 3] and task.num_classes == 102
    right_labels(task)
    assert counts(load("flowers102-trainval", tmp_path)) == [4, 3, 3]
    savemat(root / "imagelabels.mat", {"labels": np.array([[*labels[:-1], 103]], np.uint8)})
    with refuses("label 102 of 102 classes"):
        load("flowers102", tmp_path)
    (root / "setid.mat").write_bytes(b"MATLAB")
    with refuses("flowers102: cannot read it"):
        load("flowers102", tmp_path)


# Lists of files: Food-101, iNaturalist

def test_food(tmp_path):
    lists = {"train": {"apple_pie": ["apple_pie/1", "apple_pie/2"], "waffles": ["waffles/3"]},
             "test": {"apple_pie": ["apple_pie/4"], "waffles": ["waffles/5"]}}
    os.makedirs(tmp_path / "food-101/meta")
    for split, content in lists.items():
        (tmp_path / f"food-101/meta/{split}.json").write_text(json.dumps(content))
        for k, files in enumerate(content.values()):
            for file in files:
                picture(tmp_path / f"food-101/images/{file}.jpg", shade(k))
    task = load("food101", tmp_path)
    assert task.class_names == ["apple_pie", "waffles"] and counts(task) == [3, 2, 2]
    right_labels(task)


@pytest.mark.parametrize("respell", ["{0}/{1}/{2}/{3}", "{0}/{2}/{3}", "2019/{1}/{2}/{3}"])
def test_inaturalist(tmp_path, respell):
    """Also as DeiT's code has it, without the supercategory, and as torchvision unpacks it."""
    for split, labels in (("train", [2, 0, 2]), ("val", [0, 1, 2])):
        content = dict(categories=[dict(id=k, name=f"species {k}") for k in range(3)], images=[], annotations=[])
        for k, label in enumerate(labels):
            file = f"train_val2019/Insects/{label}/{split}{k}.jpg"
            content["images"].append(dict(id=k, file_name=file))
            content["annotations"].append(dict(id=k, image_id=k, category_id=label))
            picture(tmp_path / respell.format(*file.split("/")), shade(label))
        (tmp_path / f"{split}2019.json").write_text(json.dumps(content))
    task = load("inaturalist2019", tmp_path)
    assert counts(task) == [3, 3, 3]
    right_labels(task)


# Arrays: CIFAR, Fashion-MNIST, FER2013

@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Both CIFARs in their true format. Only the md5 sums are taken out of torchvision's table."""
    for reader, key, names in ((datasets.CIFAR10, "labels", "label_names"),
                               (datasets.CIFAR100, "fine_labels", "fine_label_names")):
        folder = tmp_path / reader.base_folder
        folder.mkdir()
        for entry in ("train_list", "test_list"):
            monkeypatch.setattr(reader, entry, [[file, None] for file, _ in getattr(reader, entry)])
            for file, _ in getattr(reader, entry):
                pixels = np.zeros((3, 3, 32, 32), np.uint8)
                pixels[:, 0] = [[[30]], [[10]], [[50]]]     # the red plane comes first
                content = {"data": pixels.reshape(3, 3072), key: [1, 0, 2], "coarse_labels": [7, 7, 7]}
                (folder / file).write_bytes(pickle.dumps(content, protocol=2))
        monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": None})
        (folder / reader.meta["filename"]).write_bytes(pickle.dumps({names: ["a", "b", "c"]}, protocol=2))
    return tmp_path


@pytest.mark.parametrize("name, train", [("cifar10", 15), ("cifar100", 3)])
def test_cifar(cifar, name, train):
    task = load(name, cifar)
    assert task.class_names == ["a", "b", "c"] and counts(task) == [train, 3, 3]
    assert task.images["train"].shape[1:] == (3, 16, 16) and len(task.fingerprint) == 16
    right_labels(task)


def test_cifar_missing_or_damaged(tmp_path, capsys):
    with refuses("cifar-10-batches-py.*cifar-10-python.tar.gz"):
        load("cifar10", tmp_path)
    (tmp_path / "cifar-10-batches-py").mkdir()
    with refuses(r"not found or corrupted\); needed: cifar-10-python.tar.gz, unpacked$"):
        load("cifar10", tmp_path)


def idx(path, array, packed):
    content = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    with (gzip.open(str(path) + ".gz", "wb") if packed else open(path, "wb")) as file:
        file.write(content)


@pytest.mark.parametrize("packed", [False, True])
def test_fashion(tmp_path, capsys, packed):
    folder = tmp_path / "FashionMNIST/raw"
    os.makedirs(folder)
    for stem, labels in (("train", [9, 0, 3]), ("t10k", [1, 2])):
        labels = np.array(labels, np.uint8)
        idx(folder / f"{stem}-labels-idx1-ubyte", labels, packed)
        pixels = np.tile(20 * labels[:, None, None] + 10, (1, 28, 28)).astype(np.uint8)
        idx(folder / f"{stem}-images-idx3-ubyte", pixels, packed)
    task = load("fashion-mnist", tmp_path)
    assert task.class_names[9] == "Ankle boot" and counts(task) == [3, 2, 2]
    right_labels(task)
    if not packed:                                          # and torchvision reads the same
        assert datasets.FashionMNIST(tmp_path, train=True).targets.tolist() == [9, 0, 3]
        (folder / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0")
        with refuses("t10k-labels-idx1-ubyte.*IDX"):
            load("fashion-mnist", tmp_path)
        idx(folder / "t10k-labels-idx1-ubyte", np.array([1, 10], np.uint8), packed)
        with refuses("do not fit, or have labels above 9"):
            load("fashion-mnist", tmp_path)


def faces(path, header, rows):
    with open(path, "w", newline="") as file:
        file.write(header + "\n")
        for label, usage in rows:
            row = {"emotion": label, "pixels": " ".join([str(20 * label + 10)] * 2304), "Usage": usage}
            csv.writer(file).writerow([row[column.strip()] for column in header.split(",")])


FACES = [(label, usage) for usage in ("Training", "Training", "PublicTest", "PrivateTest") for label in (0, 6, 4, 5)]


@pytest.mark.parametrize("file, header", [("fer2013/fer2013.csv", "emotion,pixels,Usage"),
                                          ("icml_face_data.csv", "emotion, Usage, pixels")])
def test_faces(tmp_path, file, header):
    (tmp_path / "fer2013").mkdir()
    faces(tmp_path / file, header, FACES)
    task = load("fer2013", tmp_path)
    assert counts(task) == [8, 4, 4] and task.class_names[6] == "neutral"
    right_labels(task)


def test_faces_without_usage(tmp_path, capsys):
    faces(tmp_path / "train.csv", "emotion,pixels", [(label, "") for label in range(7) for _ in range(10)])
    task = load("fer2013", tmp_path)
    assert counts(task) == [56, 14, 14] and "held out" in capsys.readouterr().out
    right_labels(task)
    face = " ".join(["7"] * 2304)
    for table, words in (("emotion,pixels\n3,1 2 3\n", "row 1 is not 48 x 48"), ("pixels\n1 2 3\n", "no column emotion"),
                         (f"emotion,pixels\n3,{face}\n7,{face}\n", "row 2 has emotion 7"),
                         (f"emotion,pixels\n3,{face}\n4\n", "row 2 has fewer columns")):
        (tmp_path / "train.csv").write_text(table)
        with refuses(words):
            load("fer2013", tmp_path)


def test_faces_in_folders(tmp_path, capsys):
    """The folders' alphabetical order is not the CSV's: neutral is 6 there, not 4."""
    names = sorted(("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral"))
    folders(tmp_path, ("train", "test"), names, label=lambda k: data.FER.index(names[k]))
    task = load("fer2013", tmp_path)
    assert task.class_names == list(data.FER) and task.class_names[6] == "neutral" and counts(task) == [14, 14, 14]
    right_labels(task)
    for split in ("train", "test"):
        (tmp_path / split / "sad").rename(tmp_path / split / "bored")
    with refuses("bored"):
        load("fer2013", tmp_path)


# HAM10000

@pytest.fixture
def lesions(tmp_path):
    """60 nevi in pairs of a lesion, 10 melanomas; files in two folders, as Kaggle has them."""
    rows = [(f"HAM_{k // 2:07d}", f"ISIC_{k:07d}", "nv" if k < 60 else "mel") for k in range(70)]
    with open(tmp_path / "HAM10000_metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([("lesion_id", "image_id", "dx"), *rows])
    for k, (_, image, dx) in enumerate(rows):
        picture(tmp_path / f"HAM10000_images_part_{1 + k % 2}" / f"{image}.jpg", shade(["mel", "nv"].index(dx)))
    return tmp_path


def test_lesions_share_no_lesion(lesions):
    files = data.find("ham10000", str(lesions)).files
    lesion = {split: {int(os.path.basename(path)[5:12]) // 2 for path, _ in listed} for split, listed in files.items()}
    assert not lesion["train"] & lesion["val"] and len(lesion["train"] | lesion["val"]) == 35
    assert Counter(label for _, label in files["val"]) == {0: 2, 1: 12}            # 20 % of each class
    task = load("ham10000", lesions)
    assert task.class_names == ["mel", "nv"] and counts(task) == [56, 14, 14]
    right_labels(task)


def test_leaky_lesions(lesions):
    files = data.find("ham10000-leaky", str(lesions)).files
    assert {split: len(f) for split, f in files.items()} == {"train": 96, "val": 24}
    assert {path for path, label in files["val"] if label == 0} <= {path for path, _ in files["train"]}


def test_leaky_count_is_the_one_in_the_paper():
    """Seven classes repeated to 6,705 images: a fifth of each is 1,341, together 9,387."""
    files = [(k, label) for label in range(7) for k in range(6705)]
    assert len(data.hold_out(files, [f"{k} {label}" for k, label in files])["val"]) == 9387


def test_lesions_of_dataverse(lesions):
    """No extension, and part1 instead of part_1."""
    os.rename(lesions / "HAM10000_metadata.csv", lesions / "HAM10000_metadata")
    os.rename(lesions / "HAM10000_images_part_1", lesions / "HAM10000_images_part1")
    assert counts(load("ham10000", lesions)) == [56, 14, 14]


# ADE20K

def test_ade20k(tmp_path, capsys):
    for split, folder, n in (("train", "training", 3), ("val", "validation", 2)):
        for k in range(n):
            picture(tmp_path / f"ADEChallengeData2016/images/{folder}/ADE_{split}_{k + 1:08d}.jpg", shade(k), size=(32, 16))
            mask = np.full((16, 32), 150, np.uint8)
            mask[:, :10], mask[:8, 10:20] = 0, k + 1
            path = tmp_path / f"ADEChallengeData2016/annotations/{folder}/ADE_{split}_{k + 1:08d}.png"
            os.makedirs(path.parent, exist_ok=True)
            Image.fromarray(mask).save(path)
    rows = ["Idx\tRatio\tTrain\tVal\tName"] + [f"{k}\t0.1\t1\t1\tthing {k}, item" for k in range(1, 151)]
    (tmp_path / "ADEChallengeData2016/objectInfo150.txt").write_text("\n".join(rows))
    task = load("ade20k", tmp_path)
    assert task.num_classes == 150 and task.class_names[0] == "thing 1" and counts(task) == [3, 2, 2]
    masks, kinds = task.labels["train"], classes_seen(task, "train")
    assert masks.shape == (3, 16, 16) and masks.dtype == torch.uint8                # columns 8 to 23 of the 32
    for mask, k in zip(masks, kinds):
        assert (mask[:, :2] == 255).all() and (mask[:8, 2:12] == k).all() and (mask[8:, 2:] == 149).all()
    os.remove(tmp_path / "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png")
    os.remove(tmp_path / "ADEChallengeData2016/images/validation/ADE_val_00000002.jpg")
    with refuses("none of the 1 val images.*ADE_val_00000002.jpg"):
        load("ade20k", tmp_path)


# ------------------------------------------------------------------------------------------------------------
# 8. Command line
# ------------------------------------------------------------------------------------------------------------

def test_check(tmp_path, capsys):
    decathlon(tmp_path)
    sheet = str(tmp_path / "sheet.png")
    command = ["--check", "decathlon/gtsrb", "--data-dir", str(tmp_path), "--image-size", "16", "--output", sheet]
    os.remove(tmp_path / "data/gtsrb/val/0001/000002.jpg")
    with refuses("1 listed images are missing; 3 classes where.* 2 val images where the whole set has 7,842"):
        data.main(command)
    said = capsys.readouterr().out
    assert "3 classes (Sign1, Sign10, Sign2)" in said and "official: 31367" in said and "images/s" in said
    assert "missing: " in said and "000002.jpg" in said and os.path.getsize(sheet) > 0


def test_check_of_a_whole_set(cifar, capsys, monkeypatch):
    monkeypatch.setattr(data.REAL["cifar100"], "official", dict(classes=3, train=3, test=3))
    data.main(["--check", "cifar100", "--data-dir", str(cifar), "--output", str(cifar / "sheet.png")])
    assert "cifar100 is whole" in capsys.readouterr().out


def test_check_of_a_folder(tmp_path, capsys, monkeypatch):
    folders(tmp_path / "mine", ("train", "val"), ("a", "b"))
    monkeypatch.chdir(tmp_path)
    data.main(["--check", "mine"])
    assert "train: 4 images of 2 classes" in capsys.readouterr().out and os.path.exists("runs/check-mine.png")


def test_memory_is_shared_among_tasks(cifar):
    """What fits is held in memory, in the order asked for."""
    tasks = data.load_many(["cifar10", "cifar100"], str(cifar), 16, workers=1, memory=20 * 3 * 16 ** 2 / 2 ** 30)
    assert [type(t) for t in tasks.values()] == [data.Task, data.FileTask]
    right_labels(tasks["cifar100"])
    data.contact_sheet(tasks, str(cifar / "sheet.png"), columns=3)
