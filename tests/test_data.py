"""data.py: batches are pure functions, names and folders are what they seem, drawings are the same bytes everywhere."""
import hashlib
import os
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
from conftest import CPU, refuses

# The first images of each training split, seed 0, at 32 and at 48 pixels. A change here is a change of the drawings:
# raise data.DRAWN_VERSION along with it. A difference on some machine means its arithmetic is not the others'.
DIGESTS = {
    "base": "df7a7b8b904424bd", "aircraft": "98ed2dd4ba306d0b", "objects": "5a7653a73bcf1bb8",
    "pedestrian": "d1bd1cf61732ba3d", "textures": "a8a14420607949df", "signs": "945245dec87b9dac",
    "glyphs": "8dec8bd4dcbb2941", "digits": "ba868234d337d960", "motion": "c1539cab2a7d8b40",
    "flowers": "6669bb9cb9c6ddd2", "clothing": "5ea35b67d14701de", "faces": "2e2faa8e5b2fe840",
    "lesions": "7a4347b88e481bee", "wide": "f547188d31b94cde",
    "kinds": "b6cff0f32ab98508", "variety": "080be4239342b239", "tail": "7a0d661564738467",
    "scenes": "a2626038f28a01d0",
}


@pytest.fixture
def small(monkeypatch):
    """Two short tasks, so that loading them takes no time."""
    for name in ("digits", "lesions"):
        monkeypatch.setitem(data.SPECS, name, data.SPECS[name]._replace(sizes=(270, 130, 140)))


@pytest.fixture
def task(small, tmp_path):
    return data.load("digits", tmp_path)


@pytest.fixture
def scenes(monkeypatch, tmp_path):
    monkeypatch.setitem(data.SPECS, "scenes", data.SPECS["scenes"]._replace(sizes=(130, 20, 20)))
    return data.load("scenes", tmp_path, image_size=24)


# ------------------------------------------------------------------------------------------------------------
# 1. A task in memory and its batches
# ------------------------------------------------------------------------------------------------------------

def test_mean_and_std(task):
    x, y = task.examples("train")
    assert x.shape == (270, 3, 32, 32) and x.dtype == torch.uint8 and y.dtype == torch.int64
    x = task.normalise(x)
    assert x.dtype == torch.float32
    assert x.mean(dim=(0, 2, 3)).abs().max() < 2e-3 and (x.std(dim=(0, 2, 3)) - 1).abs().max() < 2e-3
    x, y = task.examples("val", 7)
    assert len(x) == len(y) == 7 and torch.equal(y, task.labels["val"][:7])


def test_normalise_by_hand():
    one = {"train": torch.zeros(1, 3, 1, 1, dtype=torch.uint8)}
    task = data.Task("one", ["a"], (0.5, 0.5, 0.2), (0.25, 0.5, 0.4), one, {"train": torch.zeros(1)})
    x = task.normalise(torch.tensor([255, 0, 51], dtype=torch.uint8).view(1, 3, 1, 1))
    assert torch.allclose(x.flatten(), torch.tensor([2.0, -1.0, 0.0]), atol=1e-6)


def test_batch_is_a_pure_function(task):
    expected = [task.batch("train", step, 32, seed=3, recipe="shift") for step in range(20)]
    for step in (19, 0, 7, 8, 9):                           # 270 images: step 8 runs over the end of an epoch
        x, y = task.batch("train", step, 32, seed=3, recipe="shift")
        assert x.dtype == torch.uint8 and torch.equal(x, expected[step][0]) and torch.equal(y, expected[step][1])
    assert not torch.equal(task.batch("train", 0, 32, seed=4)[0], task.batch("train", 0, 32, seed=3)[0])


def test_an_epoch_visits_every_image_once(task):
    batches = torch.cat([task.batch("train", step, 45)[0] for step in range(12)]).flatten(1)     # two epochs of 270
    every = {row.numpy().tobytes() for row in task.examples("train")[0].flatten(1)}
    for epoch in batches.split(270):
        assert {row.numpy().tobytes() for row in epoch} == every
    assert not torch.equal(batches[:270], batches[270:])
    x, _ = task.batch("val", 0, 300)                        # larger than the split: more than one epoch in a batch
    assert len(x) == 300


def test_ranks_share_the_batch(task):
    x, y = task.batch("train", 5, 32, recipe="shift")
    for rank in (0, 1):
        part = task.batch("train", 5, 32, recipe="shift", rank=rank, world=2)
        assert torch.equal(part[0], x[rank::2]) and torch.equal(part[1], y[rank::2])


def test_shift_repeats_edges():
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    moved = data.shifted(images, torch.tensor([[1, 0], [0, -2]]))
    assert torch.equal(moved[0], images[0][:, [1, 2, 3, 3]])
    assert torch.equal(moved[1], images[1][:, :, [0, 0, 0, 1]])


@pytest.mark.parametrize("recipe", ["none", "shift"])
def test_image_and_mask_are_cut_alike(scenes, recipe):
    """Where each crop came from is looked up by brute force in its image; the mask must be from there."""
    x, y = scenes.batch("train", 1, 24, recipe=recipe, crop=9)
    places = []
    for a, b, row in zip(x, y, data.permutation(130, 0, 0)[24:]):
        image, mask = scenes.images["train"][row], scenes.labels["train"][row]
        for top, left, flip in ((i, j, f) for i in range(16) for j in range(16) for f in (False, True)):
            cut = lambda t: (t.flip(-1) if flip else t)
            if torch.equal(cut(image[:, top:top + 9, left:left + 9]), a):
                assert torch.equal(cut(mask[top:top + 9, left:left + 9]).long(), b)
                places.append((top, left, flip))
    assert len(places) == 24 and len({p[:2] for p in places}) > 12
    assert {flip for _, _, flip in places} == ({False} if recipe == "none" else {False, True})


@pytest.mark.parametrize("crop", [None, 11])
def test_crops_are_a_pure_function(scenes, crop):
    x, y = scenes.batch("train", 7, 16, seed=2, recipe="shift", crop=crop)
    assert x.shape == (16, 3, crop or 24, crop or 24) and y.shape == (16, crop or 24, crop or 24)
    scenes.batch("train", 8, 16, seed=2, recipe="shift", crop=crop)
    for rank in (0, 1):
        part = scenes.batch("train", 7, 16, seed=2, recipe="shift", rank=rank, world=2, crop=crop)
        assert torch.equal(part[0], x[rank::2]) and torch.equal(part[1], y[rank::2])


def test_scenes_in_memory(scenes):
    assert scenes.num_classes == 9 and scenes.class_names[-1] == "background"
    assert scenes.images["train"].shape == (130, 3, 24, 24) and scenes.images["train"].is_contiguous()
    for split in data.SPLITS:
        assert scenes.labels[split].dtype == torch.uint8
        assert scenes.labels[split].shape == scenes.images[split][:, 0].shape
    x, y = scenes.batch("train", 2, 50)
    rows = torch.cat([data.permutation(130, 0, 0)[100:], data.permutation(130, 1, 0)[:20]])
    assert y.dtype == torch.int64 and torch.equal(y, scenes.labels["train"][rows].long())
    assert torch.equal(x, scenes.images["train"][rows])
    assert scenes.examples("val", 3)[1].dtype == torch.int64


def test_bad_batches(scenes, task):
    with refuses("crop=25 needs images of at least as many pixels, not 24"):
        scenes.batch("train", 0, 4, crop=25)
    with refuses("crop=9 is for tasks with a class for every pixel"):
        task.batch("train", 0, 4, crop=9)
    with refuses("one of none, shift, decathlon, deit, not 'more'"):
        task.batch("train", 0, 4, recipe="more")


def test_images_of_one_colour_are_refused():
    images = {"train": np.full((4, 3, 8, 8), 255, np.uint8)}
    with refuses("white: all training images are of one colour"):
        data.make_task("white", ["a"], images, {"train": np.zeros(4, np.int64)})


def test_fingerprints(task, tmp_path):
    """They follow what a task holds: its seed, its size, its classes, its bytes."""
    names = ["digits", "digits:0-4", "digits/2#1", "digits/2#2", "lesions"]
    tasks = [*data.load_many(names, tmp_path).values(), data.load("digits", tmp_path, seed=1),
             data.load("digits", tmp_path, image_size=16)]
    assert len({t.fingerprint for t in tasks}) == len(tasks) and tasks[0].fingerprint == task.fingerprint
    assert len(task.fingerprint) == 16 and task.to("cpu").fingerprint == task.fingerprint
    images, labels = {"train": np.arange(96, dtype=np.uint8).reshape(2, 3, 4, 4)}, {"train": np.array([0, 1])}
    first = data.make_task("x", ["a", "b"], images, labels).fingerprint
    assert data.make_task("y", ["a", "b"], images, labels).fingerprint == first
    assert data.make_task("x", ["b", "a"], images, labels).fingerprint != first
    images["train"][0, 0, 0, 0] += 1
    assert data.make_task("x", ["a", "b"], images, labels).fingerprint != first


# ------------------------------------------------------------------------------------------------------------
# 3. Loading by name, parts of a task
# ------------------------------------------------------------------------------------------------------------

def test_class_subsets():
    for classes, parts in ((80, 10), (32, 5), (7, 3), (10, 1)):
        subsets = data.class_subsets(classes, parts)
        assert len(subsets) == parts and sorted(sum(subsets, [])) == list(range(classes))
        assert max(map(len, subsets)) - min(map(len, subsets)) <= 1
        assert parts == 1 or subsets != data.class_subsets(classes, parts, 1)
    assert data.class_subsets(80, 10)[2] == [4, 23, 27, 43, 44, 47, 75, 78]      # the third is the third for ever
    for parts in (0, 6):
        with refuses("1 to 5 subsets"):
            data.class_subsets(10, parts)


def test_subset(task):
    part = data.subset(task, [7, 2, 5], "three")
    assert (part.name, part.class_names, part.mean, part.std) == ("three", ["7", "2", "5"], task.mean, task.std)
    for split in data.SPLITS:
        pairs = zip(task.images[split], task.labels[split].tolist())
        kept = [(image, [7, 2, 5].index(y)) for image, y in pairs if y in (7, 2, 5)]
        assert torch.equal(part.images[split], torch.stack([image for image, _ in kept]))
        assert part.labels[split].tolist() == [y for _, y in kept]


def test_notation(small, tmp_path, monkeypatch):
    read = []
    draw_missing = data.draw_missing
    monkeypatch.setattr(data, "draw_missing", lambda names, *rest: read.extend(names) or draw_missing(names, *rest))
    names = ["digits:2-4", *(f"digits/3#{k}" for k in (1, 2, 3)), "lesions:0-1"]
    assert data.parts_of("digits/3") == names[1:4] and data.parts_of("digits") == ["digits"]
    tasks = data.load_many(names, tmp_path)
    assert list(tasks) == names == [task.name for task in tasks.values()] and read == ["digits", "lesions"]
    assert tasks[names[0]].class_names == ["2", "3", "4"] and tasks["lesions:0-1"].num_classes == 2
    assert sorted(sum((tasks[n].class_names for n in names[1:4]), [])) == [str(k) for k in range(10)]
    assert [tasks[n].class_names for n in names[1:4]] == [[str(k) for k in s] for s in data.class_subsets(10, 3)]
    assert sum(len(tasks[n].labels["train"]) for n in names[1:4]) == 270
    assert torch.equal(tasks[names[0]].images["val"], data.load(names[0], tmp_path).images["val"])


@pytest.mark.parametrize("name, words", [
    ("digits:3-3", "0 to 9"), ("digits:4-2", "0 to 9"), ("digits:5-10", "0 to 9"), ("digits/3#0", "1 to 3"),
    ("digits/3#4", "1 to 3"), ("digits/6#1", "1 to 5"), ("digits/0#1", "1 to 5"), ("sings", "did you mean signs"),
    ("texture/3#1", "did you mean textures"), ("decathlon/gtsrd", "did you mean decathlon/gtsrb"),
    ("qqqq", "pedestrian, .* cifar100, .* one sub-folder of images per class, .* signs:0-15"),
    ("qqqq:0-3", "pedestrian"), ("imagenet", "no train in nothing"),
    *((name, "unknown task or folder") for name in ("digits:", "digits:1", "digits:-1-3", "digits/3", "digits/3#x",
                                                    "digits/3#1:0-1"))])
def test_names_are_checked_before_any_work(monkeypatch, name, words):
    monkeypatch.setattr(data, "draw_missing", lambda *args: pytest.fail("something was drawn"))
    for call in (data.load_many, data.check_names):
        with refuses(words):
            call(["digits", name], "nothing")


def test_stream_of_no_parts():
    with refuses("wide/0: .* K is at least 1"):
        data.parts_of("wide/0")


def test_a_name_that_means_two_things(tmp_path, monkeypatch):
    for name in ("flowers", "mine", "digits/3#1", "imagenet", "elsewhere/imagenet/train"):
        images(tmp_path / name / "a"), images(tmp_path / name / "b")
    monkeypatch.chdir(tmp_path)
    for name in ("flowers", "digits/3#1", "imagenet"):
        with refuses(f"{name} is a task and also a folder: write ./{name}"):
            data.check_names([name], "elsewhere")
    assert data.check_names(["./flowers", "mine/", "./mine"]) == ["./flowers", "mine", "mine"]
    os.rename("elsewhere/imagenet/train", "imagenet/train")
    assert data.check_names(["imagenet"], ".") == data.check_names(["imagenet"], "imagenet") == ["imagenet"]
    assert data.check_names(["mine/:0-1", "signs"]) == ["mine:0-1", "signs"]
    task = data.load_many(["./flowers", "mine/"], image_size=16)
    assert [t.name for t in task.values()] == ["./flowers", "mine"] and list(task) == ["./flowers", "mine/"]


def test_load_tasks(small, scenes, tmp_path):
    """What a script's flags ask for: scenes in a size of their own, recipes as work for processes."""
    args = SimpleNamespace(data_dir=str(tmp_path), image_size=32, scene_size=24, workers=1, recipe="shift")
    tasks = data.load_tasks(["scenes", "digits"], args, CPU, segmentation=True)
    assert list(tasks) == ["scenes", "digits"]
    assert [t.images["val"].shape[-1] for t in tasks.values()] == [24, 32]
    with refuses("scenes has a class for every pixel"):
        data.load_tasks(["scenes"], args, CPU)
    images(tmp_path / "set" / "a"), images(tmp_path / "set" / "b")
    args.recipe = "decathlon"
    assert isinstance(data.load_tasks([str(tmp_path / "set")], args, CPU)[str(tmp_path / "set")], data.FileTask)
    args = SimpleNamespace(data_dir=str(tmp_path), modality="text", context=20, tokens="")
    assert isinstance(data.load_tasks(["sentiment"], args, CPU)["sentiment"], data.TextTask)


# ------------------------------------------------------------------------------------------------------------
# 4. Folders of images
# ------------------------------------------------------------------------------------------------------------

def images(folder, count=4, seed=0, mode="RGB", size=(40, 50)):
    """Images of random pixels in a folder."""
    os.makedirs(folder)
    rng = np.random.default_rng(seed)
    for k in range(count):
        shape = size[::-1] + ((3,) if mode == "RGB" else ())
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(os.path.join(folder, f"{k}.png"))


@pytest.fixture
def folder(tmp_path):
    images(tmp_path / "cats", 10)
    images(tmp_path / "dogs", 5, mode="L", size=(90, 33))
    return tmp_path


def load(root, **how):
    return data.load(str(root), **{"image_size": 16, "workers": 1, **how})


def test_folder_without_splits(folder, capsys):
    task = load(folder)
    assert task.class_names == ["cats", "dogs"] and task.images["train"].shape == (12, 3, 16, 16)
    assert torch.bincount(task.labels["val"]).tolist() == [2, 1]       # 20 % of each class
    assert torch.equal(task.images["test"], task.images["val"])
    assert "held out" in capsys.readouterr().out
    again = load(folder)
    assert torch.equal(task.images["train"], again.images["train"])
    grey = task.images["train"][task.labels["train"] == 1]
    assert torch.equal(grey[:, 0], grey[:, 1])


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "Validation", "Testing"), ("Train", "valid", "TEST")])
def test_folder_with_splits(tmp_path, names):
    for k, split in enumerate(names):
        images(tmp_path / split / "a", 3 + k, seed=k)
        images(tmp_path / split / "b", 2, seed=k + 10)
    task = load(tmp_path, image_size=24)
    assert task.class_names == ["a", "b"]
    assert [len(task.labels[s]) for s in data.SPLITS] == [5, 6, 7] and task.images["test"].shape[2:] == (24, 24)


def test_folders_that_look_like_splits(tmp_path, capsys):
    def tree(name, *folders):
        for folder in folders:
            images(tmp_path / name / folder, 2)
        return tmp_path / name

    with refuses("has folders of test and val images, but no train/"):
        load(tree("one", "val/a", "val/b", "test/a", "test/b"))
    with refuses("test_images a split"):
        load(tree("two", "train_images/a", "train_images/b", "test_images/a", "test_images/b"))
    with refuses("more than one folder of val images, such as valid"):
        load(tree("three", "train/a", "train/b", "val/a", "val/b", "valid/a", "valid/b"))
    with refuses("test-set a split"):
        load(tree("four", "train/a", "train/b", "test-set/a", "test-set/b"))
    (tmp_path / "five" / "val").mkdir(parents=True)
    with refuses("val has 0 class folders"):
        load(tree("five", "train/a", "train/b"))
    load(tree("six", "train/a", "train/b", "more/a"))
    assert "more/ is not used" in capsys.readouterr().out
    assert load(tree("seven", "bus", "train", "trainers")).class_names == ["bus", "train", "trainers"]


def test_links_and_junk(folder, capsys):
    """Folders that are linked belong to a class, loops end, and what systems leave behind is no class."""
    images(folder.parent / "more", 5, seed=3)
    os.symlink(folder.parent / "more", folder / "dogs" / "linked")
    os.symlink(folder / "dogs", folder / "dogs" / "loop")
    for junk in (".ipynb_checkpoints", "__MACOSX"):
        images(folder / junk, 2)
        images(folder / "cats" / junk, 2)
    (folder / "cats" / "._1.png").write_bytes(b"Mac")
    (folder / "cats" / "notes.txt").write_text("a note")
    found = data.read_folder(str(folder))
    count = torch.bincount(torch.tensor([label for files in found.files.values() for _, label in files]))
    assert found.class_names == ["cats", "dogs"] and count.tolist() == [10, 10]
    said = capsys.readouterr().out
    assert "1 files are no images" in said and "notes.txt" in said


def test_names_that_are_no_text(folder, capsys):
    images(folder / os.fsdecode(b"m\xff"), 3)
    os.rename(folder / "cats" / "1.png", folder / "cats" / os.fsdecode(b"\xfe.png"))
    task = load(folder)
    assert task.class_names == ["cats", "dogs", "m\ufffd"] and len(task.fingerprint) == 16


@pytest.mark.parametrize("words, spoil", [
    ("0 class folders", lambda root: os.rename(root, str(root) + ".") or os.makedirs(root)),
    ("empty has no images", lambda root: os.makedirs(root / "empty")),
    ("class lone .* one image", lambda root: images(root / "lone", 1)),
])
def test_bad_folders(folder, words, spoil):
    spoil(folder)
    with refuses(words):
        load(folder)


def test_one_class(tmp_path):
    images(tmp_path / "cats", 3)
    with refuses("1 class folder"):
        load(tmp_path)


def test_different_classes(tmp_path):
    for split, names in (("train", "ab"), ("val", "ac")):
        for name in names:
            images(tmp_path / split / name, 2)
    with refuses("only one of .* has class b, c"):
        load(tmp_path)


def test_fingerprint_of_a_folder(folder, tmp_path_factory):
    """Of content alone: the place and times of files do not matter; names, labels and bytes do."""
    def fingerprint(root):
        return data.fingerprint_of(data.read_folder(str(root)))

    first = fingerprint(folder)
    moved = tmp_path_factory.mktemp("elsewhere") / "set"
    os.rename(folder, moved)
    for file in moved.rglob("*.png"):
        os.utime(file, (1, 1))
    assert fingerprint(moved) == first
    a, b = moved / "cats" / "1.png", moved / "dogs" / "1.png"
    before = a.read_bytes()
    a.write_bytes(before[:-20] + bytes(20))                 # the same size
    assert fingerprint(moved) != first
    a.write_bytes(before)
    assert fingerprint(moved) == first
    a.rename(moved / "x"), b.rename(a), (moved / "x").rename(b)                        # S1: images change places
    assert fingerprint(moved) != first
    a.rename(moved / "x"), b.rename(a), (moved / "x").rename(b)
    (moved / "cats").rename(moved / "felines")
    assert fingerprint(moved) != first


def test_fingerprint_of_many_files(folder, monkeypatch):
    """Of more files than SAMPLED the bytes of some are read, the sizes of all."""
    monkeypatch.setattr(data, "SAMPLED", 4)
    read = []
    monkeypatch.setattr(data, "open", lambda path, mode: read.append(path) or open(path, mode), raising=False)
    first = data.fingerprint_of(data.read_folder(str(folder)))
    assert len(read) == 4
    file = folder / "dogs" / "4.png"
    file.write_bytes(file.read_bytes() + b"\0")
    assert data.fingerprint_of(data.read_folder(str(folder))) != first


# Pixels

def opened(image, path, size=16, **how):
    image.save(path, **how)
    return data.open_image(str(path), size)


def test_images_of_more_than_8_bits(tmp_path):
    """S3: 16 bits are scaled, not clipped."""
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = torch.from_numpy(grey).expand(3, -1, -1)
    for ending in ("png", "tif"):
        wide = Image.fromarray(grey.astype(np.uint16) * 257)
        assert torch.equal(opened(wide, tmp_path / f"wide.{ending}"), expected)
    (tmp_path / "wide.pgm").write_bytes(b"P5 16 16 65535\n" + (grey.astype(">u2") * 257).tobytes())
    assert torch.equal(data.open_image(str(tmp_path / "wide.pgm"), 16), expected)
    for kind in (np.int32, np.float32):
        with pytest.raises(ValueError, match="32 bits per pixel"):
            opened(Image.fromarray(grey.astype(kind)), tmp_path / "deep.tif")


def test_transparency_lies_over_white(tmp_path):
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 0))
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([255, 0, 0, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    for k, x in enumerate((opened(rgba, tmp_path / "a.png"), opened(palette, tmp_path / "b.png", transparency=1))):
        assert x[:, 0].tolist() == [[255, 255], [0, 255], [0, 255]], k


def test_a_closed_list_of_formats(tmp_path):
    """T2: what a file is called does not decide which decoder runs."""
    (tmp_path / "evil.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    with pytest.raises(OSError, match="cannot identify"):
        data.open_image(str(tmp_path / "evil.jpg"), 16)
    gif = opened(Image.new("RGB", (4, 4), (0, 0, 0)), tmp_path / "a.gif")
    assert gif.shape == (3, 4, 4)


def png_header(width, height):
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT" + bytes(4)


@pytest.mark.parametrize("size, target", [((30000, 30000), 16), ((1, 60000), 2048)])
def test_images_too_large_are_not_decoded(tmp_path, size, target):
    """T1: neither a bomb nor a thread that would grow on being resized."""
    (tmp_path / "bomb.png").write_bytes(png_header(*size))
    with pytest.raises(Exception, match="too many|exceeds limit"):
        data.open_image(str(tmp_path / "bomb.png"), target)
    read = data.ImageFiles([(str(tmp_path / "bomb.png"), 0)], target, "", 2)[0]
    assert "bomb.png (" in read


def test_masks_are_checked(tmp_path):
    """T4: 8 bits without colours, of the image's size, with classes that there are."""
    def mask(value, mode="L", size=(4, 2)):
        Image.new(mode, size, value).save(tmp_path / "mask.png")
        return data.open_mask(str(tmp_path / "mask.png"), (3, 2, 4), num_classes=150)

    assert mask(0).unique().tolist() == [data.IGNORED] and mask(150).unique().tolist() == [149]
    for how, words in (((151,), "holds 151, and there are 150"), (((1, 2, 3), "RGB"), "no colours"),
                       ((1, "I;16"), "8 bits"), ((1, "L", (2, 4)), "not of its image's size")):
        with pytest.raises(ValueError, match=words):
            mask(*how)


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(b"not an image"), os.mkfifo,
                                   lambda path: path.symlink_to("nothing")])
def test_one_unreadable_image_is_skipped(folder, capsys, spoil):
    """It is named with the reason; two of 15 are too many."""
    (folder / "cats" / "3.png").unlink()
    spoil(folder / "cats" / "3.png")
    task = load(folder)
    assert sum(len(y) for y in (task.labels["train"], task.labels["val"])) == 14
    assert "skipped 1 of 15 images" in capsys.readouterr().out
    (folder / "dogs" / "0.png").write_bytes(b"nor this")
    with refuses(r"cannot read 2 of 15 images, too many.*cats.3.png \((cannot identify|no file).*dogs.0.png"):
        load(folder)


def test_unreadable_images_leave_no_class_empty(tmp_path):
    for split in ("train", "val"):
        images(tmp_path / split / "a", 3)
        images(tmp_path / split / "b", 1)
    (tmp_path / "val" / "b" / "0.png").write_bytes(b"not an image")
    with refuses("cannot read any val image of b"):
        load(tmp_path)
    with refuses("cannot read any val image of b"):
        list(load(tmp_path, memory=0).examples("val")[0].split(3))


# ------------------------------------------------------------------------------------------------------------
# 8. Command line
# ------------------------------------------------------------------------------------------------------------

def test_scenes_are_not_classified(scenes, task, tmp_path, monkeypatch):
    with refuses("no --difficulty"):
        data.difficulty(scenes)
    with refuses("no subset of images by class"):
        data.load("scenes:0-3", tmp_path, image_size=24)
    data.contact_sheet({"scenes": data.load("scenes", tmp_path), "digits": task}, str(tmp_path / "sheet.png"), columns=25)
    assert Image.open(tmp_path / "sheet.png").size == (25 * 66 + 2, 2 * 66 + 2)
    names = []
    monkeypatch.setattr(data, "load_many", lambda wanted, *rest: names.append(tuple(wanted)) or {})
    data.main(["--difficulty"])
    assert names == [tuple(n for n in data.DRAWN if n != data.SCENES)]


def test_difficulty_is_a_row_per_task(task, capsys, monkeypatch):
    monkeypatch.setattr(data, "difficulty", lambda task: (12.34, 56.78))
    data.print_difficulty({"digits": task})
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "| task | stands in for | classes | train / val / test | chance | linear on pixels | ViT 48x3 |"
    assert rows[2] == "| digits | SVHN | 10 | 270 / 130 / 140 | 10.0 | 12.3 | 56.8 |"


# ------------------------------------------------------------------------------------------------------------
# Appendix A. Drawn images
# ------------------------------------------------------------------------------------------------------------

def digest(name):
    chunks = [data.draw_chunk(name, "train", 0, size, 0)[:16] for size in (32, 48)]
    return hashlib.sha256(b"".join(chunk.tobytes() for chunk in chunks)).hexdigest()[:16]


@pytest.mark.parametrize("name", data.DRAWN)
def test_same_seed_same_bytes(name):
    assert digest(name) == DIGESTS[name]


@pytest.mark.parametrize("name", data.DRAWN)
def test_drawing(name):
    """Streams differ between splits, chunks and seeds; a larger drawing shows the same scene."""
    first = data.draw_chunk(name, "train", 0, 32, 0)
    for split, chunk, seed in (("val", 0, 0), ("train", 1, 0), ("train", 0, 1)):
        drawn = data.draw_chunk(name, split, chunk, 32, seed)
        assert (drawn != first[:len(drawn)]).any(axis=(1, 2, 3)).all()
    large, first = data.draw_chunk(name, "train", 0, 64, 0)[:, :3].astype(float), first[:, :3]
    assert large.shape == (len(first), 3, 64, 64)
    halved = large.reshape(len(first), 3, 32, 2, 32, 2).mean(axis=(3, 5))
    assert abs(halved - first).mean() < 12
    assert data.draw_chunk(name, "test", 0, 37, 0).shape[1:] == (3 + data.SPECS[name].masks, 37, 37)


def test_constants():
    assert data.DRAWN[0] == data.BASE and data.DRAWN[13] == data.WIDE and data.DRAWN[14:17] == data.NEAR
    assert len(data.DECATHLON) == 9 and data.UNSEEN == ("clothing", "faces", "lesions")
    classes = {name: len(spec.class_names) for name, spec in data.SPECS.items()}
    assert [classes[name] for name in (data.BASE, "glyphs", data.WIDE, *data.NEAR)] == [32, 100, 320, 10, 32, 24]
    for spec in data.SPECS.values():
        assert len(set(spec.class_names)) == len(spec.class_names)


@pytest.mark.parametrize("name", data.DRAWN)
def test_labels_are_balanced(name):
    for split in data.SPLITS:
        counts = np.bincount(data.drawn_labels(name, split), minlength=len(data.SPECS[name].class_names))
        assert counts.sum() == data.SPECS[name].sizes[data.SPLITS.index(split)]
        if name == "lesions" and split == "train":
            assert counts.argmax() == 0 and counts.min() >= 200        # skewed on purpose, as HAM10000 is
        elif name == "tail" and split == "train":
            assert 17 < counts.max() / counts.min() < 21 and counts.min() >= 20
        else:
            assert counts.max() - counts.min() <= 1


def test_masks_are_what_is_painted(monkeypatch):
    """With flat paints, one for each class, neither light nor grain, the image itself says what the mask must be."""
    paints = np.array([[0.25 * (k % 3 + 1), 0.3 * (k // 3), 0.5] for k in range(9)], np.float32)[:, :, None, None]

    def paint_thing(c, p, shape, *rest):
        inside = data.cover(data.by_kind(data.ALL_SHAPES, shape, p.u, p.v), p.edge)
        c.paint((inside > 0.5).astype(np.float32), paints[shape])
        return inside
    monkeypatch.setattr(data, "paint_thing", paint_thing)
    monkeypatch.setattr(data.Canvas, "background", lambda c, *rest: c.pixels.__iadd__(paints[8]))
    monkeypatch.setattr(data.Canvas, "finish", lambda c: np.rint(c.pixels * 100).astype(np.uint8))
    drawn = data.draw_chunk("scenes", "train", 0, 96, 0)
    pixels, masks = drawn[:, :3], drawn[:, 3]
    seen = (pixels[:, None] == np.rint(paints * 100)[None, ..., 0, 0][..., None, None]).all(2).argmax(1)
    sure = masks != data.IGNORED
    assert np.array_equal(seen[sure], masks[sure]) and 0.005 < (~sure).mean() < 0.06
    assert all(len(np.unique(m)) >= 3 for m in masks) and set(np.unique(masks)) == {*range(9), data.IGNORED}
    step = masks[:, :, 1:] != masks[:, :, :-1]              # hardly a class touches another without a rim between them
    bare = step & sure[:, :, 1:] & sure[:, :, :-1]
    assert bare.sum() < 0.2 * step.sum()


def test_splits_share_no_image(small, tmp_path):
    for task in data.load_many(["digits", "lesions"], tmp_path).values():
        every = [image.numpy().tobytes() for split in data.SPLITS for image in task.images[split]]
        assert len(set(every)) == len(every) == 270 + 130 + 140


def test_workers_and_cache_do_not_matter(small, tmp_path):
    one = data.load("digits", tmp_path / "one", workers=1)
    three = data.load("digits", tmp_path / "three", workers=3)
    again = data.load("digits", tmp_path / "three")
    for other in (three, again):
        assert all(torch.equal(one.images[s], other.images[s]) for s in data.SPLITS)
        assert (one.mean, one.std) == (other.mean, other.std)


def test_a_cache_that_cannot_be_written(small, tmp_path, capsys):
    (tmp_path / "drawn").write_text("a file where the folder should be")
    assert len(data.load("digits", tmp_path).labels["val"]) == 130
    assert "drawn anew every time" in capsys.readouterr().out
    with refuses("sheet.png cannot be written"):
        data.save_grid(torch.zeros(1, 3, 4, 4), str(tmp_path / "drawn" / "x" / "sheet.png"), 1)


def test_chunks_make_up_the_split(task):
    """The split is its chunks in order, whatever order they were drawn in."""
    chunks = [data.draw_chunk("digits", "train", c, 32, 0) for c in (2, 0, 1)]
    assert np.array_equal(task.images["train"].numpy(), np.concatenate([chunks[1], chunks[2], chunks[0]]))


@pytest.mark.parametrize("name", ["digits", "scenes"])
def test_damaged_cache_is_redrawn(small, scenes, tmp_path, name):
    """Cut short, overwritten, or with one bit flipped anywhere in the images (S10)."""
    before = data.load(name, tmp_path, 24)
    path = data.cache_path(name, "train", tmp_path, 24, 0)
    whole = open(path, "rb").read()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    for damaged in (b"", b"nonsense", whole[:len(whole) // 2], bytes(flipped)):
        with open(path, "wb") as file:
            file.write(damaged)
        after = data.load(name, tmp_path, 24)
        assert torch.equal(before.images["train"], after.images["train"])
        assert torch.equal(before.labels["train"], after.labels["train"])
        assert not [file for file in os.listdir(os.path.dirname(path)) if file.endswith(".tmp")]
