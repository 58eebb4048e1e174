"""data.py: the drawings are the same bytes everywhere, batches are pure functions, bad folders get one sentence."""
import hashlib
import os

import numpy as np
import pytest
import torch
from PIL import Image

import data

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
    for other in (("val", 0, 0), ("train", 1, 0), ("train", 0, 1)):
        drawn = data.draw_chunk(name, other[0], other[1], 32, other[2])
        assert (drawn != first[:len(drawn)]).any(axis=(1, 2, 3)).all()
    large, first = data.draw_chunk(name, "train", 0, 64, 0)[:, :3].astype(float), first[:, :3]
    assert large.shape == (len(first), 3, 64, 64)
    halved = large.reshape(len(first), 3, 32, 2, 32, 2).mean(axis=(3, 5))
    assert abs(halved - first).mean() < 12
    assert data.draw_chunk(name, "test", 0, 37, 0).shape[1:] == (3 + data.SPECS[name].masks, 37, 37)


def test_constants():
    assert data.DRAWN[0] == data.BASE and data.DRAWN[13] == data.WIDE and data.DRAWN[14:17] == data.NEAR
    assert len(data.DECATHLON) == 9 and data.UNSEEN == ("clothing", "faces", "lesions")
    assert {n: len(data.SPECS[n].class_names) for n in (data.BASE, "glyphs", data.WIDE)} == {"base": 32, "glyphs": 100, "wide": 80}
    assert [len(data.SPECS[n].class_names) for n in data.NEAR] == [10, 32, 24]
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


def test_splits_share_no_image(small, tmp_path):
    for task in data.load_many(["digits", "lesions"], tmp_path).values():
        seen = [hashlib.sha256(image.numpy().tobytes()).digest() for split in data.SPLITS for image in task.images[split]]
        assert len(seen) == len(set(seen)) == 270 + 130 + 140


def test_workers_and_cache_do_not_matter(small, tmp_path):
    one = data.load("digits", tmp_path / "one", workers=1)
    three = data.load("digits", tmp_path / "three", workers=3)
    again = data.load("digits", tmp_path / "three")
    for other in (three, again):
        assert all(torch.equal(one.images[s], other.images[s]) for s in data.SPLITS)
        assert (one.mean, one.std) == (other.mean, other.std)


def test_chunks_make_up_the_split(task):
    """The split is its chunks in order, whatever order they were drawn in."""
    chunks = [data.draw_chunk("digits", "train", c, 32, 0) for c in (2, 0, 1)]
    assert np.array_equal(task.images["train"].numpy(), np.concatenate([chunks[1], chunks[2], chunks[0]]))


@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_damaged_cache_is_redrawn(small, tmp_path, damage):
    before = data.load("digits", tmp_path)
    path = data.cache_path("digits", "train", tmp_path, 32, 0)
    whole = open(path, "rb").read()
    with open(path, "wb") as file:
        file.write(whole[:len(whole) // 2] if damage is None else damage)
    after = data.load("digits", tmp_path)
    assert torch.equal(before.images["train"], after.images["train"])
    assert open(path, "rb").read() == whole and not [f for f in os.listdir(os.path.dirname(path)) if f.endswith(".tmp")]


def test_mean_and_std(task):
    x, y = task.examples("train")
    assert x.shape == (270, 3, 32, 32) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert x.mean(dim=(0, 2, 3)).abs().max() < 2e-3 and (x.std(dim=(0, 2, 3)) - 1).abs().max() < 2e-3
    x, y = task.examples("val", 7)
    assert len(x) == len(y) == 7 and torch.equal(y, task.labels["val"][:7])


def test_batch_is_a_pure_function(task):
    expected = [task.batch("train", step, 32, seed=3, augment=True) for step in range(20)]
    for step in (19, 0, 7, 8, 9):                           # 270 images: step 8 runs over the end of an epoch
        x, y = task.batch("train", step, 32, seed=3, augment=True)
        assert torch.equal(x, expected[step][0]) and torch.equal(y, expected[step][1])
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
    x, y = task.batch("train", 5, 32, augment=True)
    for rank in (0, 1):
        part = task.batch("train", 5, 32, augment=True, rank=rank, world=2)
        assert torch.equal(part[0], x[rank::2]) and torch.equal(part[1], y[rank::2])


def test_shift_repeats_edges():
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    moved = data.shifted(images, torch.tensor([[1, 0], [0, -2]]))
    assert torch.equal(moved[0], images[0][:, [1, 2, 3, 3]])
    assert torch.equal(moved[1], images[1][:, :, [0, 0, 0, 1]])


# Parts of a task


def test_class_subsets(capsys):
    for classes, parts in ((80, 10), (32, 5), (7, 3), (10, 1)):
        subsets = data.class_subsets(classes, parts)
        assert len(subsets) == parts and sorted(sum(subsets, [])) == list(range(classes))
        assert max(map(len, subsets)) - min(map(len, subsets)) <= 1
        assert parts == 1 or subsets != data.class_subsets(classes, parts, 1)
    assert data.class_subsets(80, 10)[2] == [4, 23, 27, 43, 44, 47, 75, 78]      # the third is the third for ever
    for parts in (0, 6):
        with pytest.raises(SystemExit):
            data.class_subsets(10, parts)
        assert "1 to 5 subsets" in capsys.readouterr().err


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
    tasks = data.load_many(names, tmp_path)
    assert list(tasks) == names == [task.name for task in tasks.values()] and read == ["digits", "lesions"]
    assert tasks[names[0]].class_names == ["2", "3", "4"] and tasks["lesions:0-1"].num_classes == 2
    assert sorted(sum((tasks[n].class_names for n in names[1:4]), [])) == [str(k) for k in range(10)]
    assert [tasks[n].class_names for n in names[1:4]] == [[str(k) for k in s] for s in data.class_subsets(10, 3)]
    assert sum(len(tasks[n].labels["train"]) for n in names[1:4]) == 270
    assert torch.equal(tasks[names[0]].images["val"], data.load(names[0], tmp_path).images["val"])


@pytest.mark.parametrize("name, words", [
    ("digits:3-3", "0 to 9"), ("digits:4-2", "0 to 9"), ("digits:5-10", "0 to 9"), ("digits/3#0", "1 to 3"),
    ("digits/3#4", "1 to 3"), ("digits/6#1", "1 to 5"), ("digits/0#1", "1 to 5"),
    *((name, "signs:0-15") for name in ("digits:", "digits:1", "digits:-1-3", "digits/3", "digits/3#x", ":0-3",
                                        "nothing:0-3", "digits/3#1:0-1"))])
def test_notation_errors(small, tmp_path, capsys, name, words):
    with pytest.raises(SystemExit) as stop:
        data.load(name, tmp_path)
    message = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and words in message and message.startswith("error: ") and "\n" not in message


def test_parts_of_folders(folder, monkeypatch):
    write_images(folder / "mice", 5)
    assert data.load(f"{folder}:1-2", image_size=16).class_names == ["dogs", "mice"]
    for name in ("a", "b"):
        write_images(folder / "digits" / "3#1" / name, 2)
    monkeypatch.chdir(folder)
    assert data.load("digits/3#1", image_size=16).class_names == ["a", "b"]      # it exists, so it is a folder


# Scenes and their masks


@pytest.fixture
def scenes(monkeypatch, tmp_path):
    monkeypatch.setitem(data.SPECS, "scenes", data.SPECS["scenes"]._replace(sizes=(130, 20, 20)))
    return data.load("scenes", tmp_path, image_size=24)


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
    images, masks = drawn[:, :3], drawn[:, 3]
    seen = (images[:, None] == np.rint(paints * 100)[None, ..., 0, 0][..., None, None]).all(2).argmax(1)
    sure = masks != data.IGNORED
    assert np.array_equal(seen[sure], masks[sure]) and 0.005 < (~sure).mean() < 0.06
    assert all(len(np.unique(m)) >= 3 for m in masks) and set(np.unique(masks)) == {*range(9), data.IGNORED}
    step = masks[:, :, 1:] != masks[:, :, :-1]              # hardly a class touches another without a rim between them
    bare = step & sure[:, :, 1:] & sure[:, :, :-1]
    assert bare.sum() < 0.2 * step.sum()


def test_scenes_in_memory(scenes, tmp_path):
    assert scenes.num_classes == 9 and scenes.class_names[-1] == "background"
    assert scenes.images["train"].shape == (130, 3, 24, 24) and scenes.images["train"].is_contiguous()
    for split in data.SPLITS:
        assert scenes.labels[split].dtype == torch.uint8 and scenes.labels[split].shape == scenes.images[split][:, 0].shape
    x, y = scenes.batch("train", 2, 50)
    rows = torch.cat([data.permutation(130, 0, 0)[100:], data.permutation(130, 1, 0)[:20]])
    assert y.dtype == torch.int64 and torch.equal(y, scenes.labels["train"][rows].long())
    assert torch.equal(x, scenes.normalise(scenes.images["train"][rows]))
    assert scenes.examples("val", 3)[1].dtype == torch.int64
    images, masks = data.cache_files("scenes", "train", tmp_path, 24, 0)
    with open(masks, "wb") as file:
        file.write(b"nonsense")
    for _ in range(2):                                      # drawn again, then read
        again = data.load("scenes", tmp_path, image_size=24)
        assert all(torch.equal(again.images[s], scenes.images[s]) for s in data.SPLITS)
        assert all(torch.equal(again.labels[s], scenes.labels[s]) for s in data.SPLITS)


@pytest.mark.parametrize("augment", [False, True])
def test_image_and_mask_are_cut_alike(scenes, augment):
    """Where each crop came from is looked up by brute force in its image; the mask must be from there."""
    x, y = scenes.batch("train", 1, 24, augment=augment, crop=9)
    places = []
    for a, b, row in zip(x, y, data.permutation(130, 0, 0)[24:]):
        image, mask = scenes.normalise(scenes.images["train"][row]), scenes.labels["train"][row]
        for top, left, flip in ((i, j, f) for i in range(16) for j in range(16) for f in (False, True)):
            cut = lambda t: (t.flip(-1) if flip else t)
            if torch.equal(cut(image[:, top:top + 9, left:left + 9]), a):
                assert torch.equal(cut(mask[top:top + 9, left:left + 9]).long(), b)
                places.append((top, left, flip))
    assert len(places) == 24 and len({p[:2] for p in places}) > 12
    assert {flip for _, _, flip in places} == ({False, True} if augment else {False})


@pytest.mark.parametrize("crop", [None, 11])
def test_crops_are_a_pure_function(scenes, crop):
    x, y = scenes.batch("train", 7, 16, seed=2, augment=True, crop=crop)
    assert x.shape == (16, 3, crop or 24, crop or 24) and y.shape == (16, crop or 24, crop or 24)
    scenes.batch("train", 8, 16, seed=2, augment=True, crop=crop)
    for rank in (0, 1):
        part = scenes.batch("train", 7, 16, seed=2, augment=True, rank=rank, world=2, crop=crop)
        assert torch.equal(part[0], x[rank::2]) and torch.equal(part[1], y[rank::2])


def test_scenes_are_not_classified(scenes, task, tmp_path, capsys, monkeypatch):
    calls = (lambda: scenes.batch("train", 0, 4, crop=25), lambda: task.batch("train", 0, 4, crop=9),
             lambda: data.difficulty(scenes), lambda: data.load("scenes:0-3", tmp_path, image_size=24))
    for call in calls:
        with pytest.raises(SystemExit):
            call()
        assert capsys.readouterr().err.startswith("error: ")
    data.contact_sheet({"scenes": data.load("scenes", tmp_path), "digits": task}, str(tmp_path / "sheet.png"), columns=25)
    assert Image.open(tmp_path / "sheet.png").size == (25 * 66 + 2, 2 * 66 + 2)
    names = []
    monkeypatch.setattr(data, "load_many", lambda wanted, *rest: names.append(tuple(wanted)) or {})
    data.main(["--difficulty"])
    assert names == [tuple(n for n in data.DRAWN if n != data.SCENES)]


# Folders of images


def write_images(folder, count, seed=0, mode="RGB", size=(40, 50)):
    os.makedirs(folder)
    rng = np.random.default_rng(seed)
    for k in range(count):
        shape = size[::-1] + ((3,) if mode == "RGB" else ())
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(os.path.join(folder, f"{k}.png"))


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "cats", 10)
    write_images(tmp_path / "dogs", 5, mode="L", size=(90, 33))
    return tmp_path


def fails(capsys, root):
    with pytest.raises(SystemExit) as stop:
        data.load(str(root), image_size=16)
    message = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and message.startswith("error: ") and "\n" not in message
    return message


def test_folder_without_splits(folder, capsys):
    task = data.load(str(folder), image_size=16)
    assert task.class_names == ["cats", "dogs"] and task.images["train"].shape == (12, 3, 16, 16)
    assert torch.bincount(task.labels["val"]).tolist() == [2, 1]       # 20 % of each class
    assert torch.equal(task.images["test"], task.images["val"])
    assert "held out" in capsys.readouterr().out
    again = data.load(str(folder), image_size=16)
    assert torch.equal(task.images["train"], again.images["train"])
    grey = task.images["train"][task.labels["train"] == 1]
    assert torch.equal(grey[:, 0], grey[:, 1])


def test_folder_with_splits(tmp_path):
    for k, split in enumerate(data.SPLITS):
        write_images(tmp_path / split / "a", 3 + k, seed=k)
        write_images(tmp_path / split / "b", 2, seed=k + 10)
    task = data.load(str(tmp_path), image_size=24)
    assert [len(task.labels[s]) for s in data.SPLITS] == [5, 6, 7] and task.images["test"].shape[2:] == (24, 24)


def test_missing_folder(capsys, tmp_path):
    message = fails(capsys, tmp_path / "nothing")
    assert "pedestrian" in message and "sub-folder" in message


def test_no_classes(capsys, tmp_path):
    assert "0 class folders" in fails(capsys, tmp_path)


def test_one_class(capsys, tmp_path):
    write_images(tmp_path / "cats", 3)
    assert "1 class folder" in fails(capsys, tmp_path)


def test_class_without_images(capsys, folder):
    os.makedirs(folder / "empty")
    assert "empty has no images" in fails(capsys, folder)


def test_class_of_one_image(capsys, folder):
    write_images(folder / "lone", 1)
    assert "lone" in fails(capsys, folder)


def test_different_classes(capsys, tmp_path):
    for split, names in (("train", "ab"), ("val", "ac")):
        for name in names:
            write_images(tmp_path / split / name, 2)
    assert "b, c" in fails(capsys, tmp_path)


def test_unreadable_image(capsys, folder):
    (folder / "cats" / "3.png").write_bytes(b"not an image")
    assert os.path.join("cats", "3.png") in fails(capsys, folder)
