"""Tasks of images and of text, and their batches.

A method asks for tasks by name (`load`, `load_many`, `load_texts`; a script: `load_tasks`) and for batches:

    task = data.load("signs")                           # a drawn task, a real dataset or a folder of images
    x, y = task.batch("train", step, batch_size=64)     # a pure function: uint8 (B, 3, S, S), int64 (B,)
    logits = net(task.normalise(x))                     # images are bytes until they enter a network

The drawn tasks need no download: appendix A draws them, results/difficulty.md lists them. docs/datasets.md
lists the real datasets, where they come from and how to unpack them.

    1. A task in memory and its batches     Task
    2. Augmentation                         the papers' recipes, MixUp and CutMix
    3. Loading by name                      load_tasks, load_many, load; parts of a task such as signs:0-15
    4. Folders of images                    one sub-folder per class
    5. Images decoded as they are needed    FileTask, for what does not fit memory
    6. Real datasets                        Visual Decathlon, ImageNet, CIFAR, ... from their own files
    7. Text                                 GPT-2's tokens, TextTask, GLUE and IMDB
    8. Command line                         contact sheet, difficulty, what is there of a real dataset
    Appendix A. Drawn images                18 tasks that stand in for real ones
    Appendix B. Drawn texts                 four tasks of short sentences

    python data.py                              draw all tasks, write results/contact_sheet.png
    python data.py --difficulty                 how hard they are for a linear model and for a small ViT
    python data.py --check NAME --data-dir DIR  what there is of a real dataset or a folder, what is missing
"""
import collections
import contextlib
import copy
import csv
import functools
import glob
import gzip
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import (IMAGENET, InputError, Parser, ViT, ViTConfig, accuracy, file_name, fit, positive,
                    rank_zero_first, script, unknown, whole, write_atomically, writing)

SPLITS = ("train", "val", "test")
RECIPES = ("none", "shift", "decathlon", "deit")
IGNORED = 255                       # the class of pixels that no loss and no score should count
MEMORY = 12                         # GiB that the images of a run may take; others stay in their files


# ----------------------------------------------------------------------------------------------------------
# 1. A task in memory and its batches
# ----------------------------------------------------------------------------------------------------------

@dataclass
class Task:
    """A classification task in memory, as bytes.

    images: {split: uint8 (N, 3, S, S)}; labels: {split: int64 (N,)}. A segmentation task has masks for
    labels, {split: uint8 (N, S, S)}: a class or IGNORED for every pixel. mean and std are those of the
    training images per channel, where white is 1. fingerprint: 16 hex digits that change when the data does.
    """
    name: str
    class_names: list
    mean: tuple
    std: tuple
    images: dict
    labels: dict
    fingerprint: str = ""

    def __post_init__(self):
        device = self.labels["train"].device
        self.scale = torch.tensor([1 / (255 * s) for s in self.std], device=device).view(3, 1, 1)
        self.shift = torch.tensor([-m / s for m, s in zip(self.mean, self.std)], device=device).view(3, 1, 1)

    @property
    def num_classes(self):
        return len(self.class_names)

    @property
    def segmentation(self):
        return self.labels["train"].ndim == 3

    def normalise(self, images):
        """float32 (x / 255 - mean) / std of uint8 images (B, 3, S, S): what a network of this task takes."""
        scale = self.scale.to(images.device)
        shift = self.shift.to(images.device)
        return images.float().mul_(scale).add_(shift)

    def batch(self, split, step, batch_size, seed=0, recipe="none", rank=0, world=1, crop=None):
        """Batch number `step` of an endless stream: x uint8 (B, 3, S, S), y int64 (B,), of masks (B, S, S).

        A pure function of its arguments: the stream is one permutation of the split after another, so there
        is no loader to save, and any step can be looked at again. Rank r of `world` gets rows r, r + world,
        ... of the batch; chance is drawn for the whole batch, so no image depends on `world`.

        recipe: "none"; "shift" moves each image by up to 1/16 of its size, edges repeated; "decathlon" and
        "deit" are the papers' (see `augmentation`). Images with masks are cut to crop x crop pixels at a
        random place (default: whole), and every recipe but "none" mirrors half of them left to right.
        """
        if recipe not in RECIPES:
            raise InputError(f"recipe is one of {', '.join(RECIPES)}, not {recipe!r}")
        rows = rows_of(len(self.labels[split]), step, batch_size, seed, rank, world)
        rows = to_device(rows, self.labels[split].device)
        chance = generator(seed, step, 1)
        if self.segmentation:
            return self.crops(split, rows, batch_size, chance, recipe, slice(rank, None, world), crop)
        if crop:
            raise InputError(f"{self.name}: crop={crop} is for tasks with a class for every pixel")
        per_image = "none" if recipe == "shift" else recipe
        images = self.fetch(split, rows, step, batch_size, seed, per_image, rank, world)
        if recipe == "shift":
            margin = images.shape[-1] // 16
            shifts = torch.randint(-margin, margin + 1, (batch_size, 2), generator=chance)
            images = shifted(images, to_device(shifts[rank::world], images.device))
        return images, self.labels[split][rows]

    def crops(self, split, rows, batch_size, chance, recipe, mine, crop):
        """These images and their masks, cut out alike; `mine` is this rank's share of a batch."""
        size = self.images[split].shape[-1]
        crop = crop or size
        if crop > size:
            raise InputError(f"{self.name}: crop={crop} needs images of at least as many pixels, not {size}")
        corners = torch.randint(size - crop + 1, (batch_size, 2), generator=chance)
        mirrored = torch.zeros(batch_size, 1, dtype=torch.int64)
        if recipe != "none":
            mirrored = torch.randint(2, (batch_size, 1), generator=chance)
        places = to_device(torch.cat([corners, mirrored], 1)[mine], rows.device)
        images, masks = cropped(self.images[split][rows], self.labels[split][rows], places, crop)
        return images, masks.long()

    def fetch(self, split, rows, step, batch_size, seed, recipe, rank, world):
        """The images of a batch, uint8 (B, 3, S, S), after a recipe drawn per image.

        One image after the other, in this process: long trainings leave it to FileTask's workers (memory=0).
        """
        images = self.images[split][rows]
        if recipe == "none":
            return images
        transform = augmentation(recipe, images.shape[-1], self.name)
        out = []
        for image, stream in zip(images.cpu(), chance_of(len(rows), seed, step, rank, world)):
            with seeded(*stream):
                out.append(transform(image))
        return to_device(torch.stack(out), images.device)

    def pixels(self, split, rows):
        """The images of these rows, uint8 (B, 3, S, S)."""
        return self.images[split][rows]

    def examples(self, split, limit=None):
        """The first `limit` examples of a split (default: all) in their order: x uint8 (N, 3, S, S), y."""
        return self.images[split][:limit], self.labels[split][:limit].long()

    def only(self, rows):
        """The task with these training images, and no other split."""
        images, labels = self.images["train"][rows], self.labels["train"][rows]
        return replace(self, images={"train": images}, labels={"train": labels})

    def to(self, device):
        """The same task with its tensors on a device."""
        images = {split: x.to(device) for split, x in self.images.items()}
        labels = {split: y.to(device) for split, y in self.labels.items()}
        return replace(self, images=images, labels=labels)


def make_task(name, class_names, images, labels, fingerprint=""):
    """A Task from {split: uint8 array} and {split: labels}, with mean and std of the training images."""
    images = {split: torch.as_tensor(x).contiguous() for split, x in images.items()}
    labels = {split: torch.as_tensor(y) for split, y in labels.items()}
    mean, std = norm_of(name, images["train"])
    fingerprint = fingerprint or digest(*class_names, *images.values(), *labels.values())
    return Task(name, list(class_names), mean, std, images, labels, fingerprint)


def norm_of(name, images):
    """Mean and std by which to normalise a task's training images."""
    mean, std = mean_and_std(images)
    if max(std) < 0.01:
        raise InputError(f"{name}: all training images are of one colour, {mean}; look at them")
    return mean, std


def mean_and_std(images):
    """Mean and standard deviation per channel of uint8 (N, 3, S, S), from exact counts of the 256 levels."""
    counts = [torch.bincount(images[:, channel].flatten(), minlength=256) for channel in range(3)]
    counts = torch.stack(counts).double()
    levels = torch.arange(256, dtype=torch.float64) / 255
    total = counts.sum(1)
    mean = (counts * levels).sum(1) / total
    variance = (counts * levels ** 2).sum(1) / total - mean ** 2
    std = variance.clamp(min=1e-6).sqrt()
    return tuple(round(float(m), 4) for m in mean), tuple(round(float(s), 4) for s in std)


def digest(*parts):
    """16 hex digits of texts, numbers and tensors in a row."""
    total = hashlib.blake2b(digest_size=8)
    for part in parts:
        total.update(np.ascontiguousarray(part) if torch.is_tensor(part) else as_bytes(f"{part}\n"))
    return total.hexdigest()


def as_bytes(text):
    """UTF-8; a file's name may hold bytes that are none, which Python keeps as surrogates."""
    return str(text).encode("utf-8", "surrogateescape")


# Which rows a batch has, and the chance in it

def generator(*numbers):
    """A torch.Generator whose stream is fixed by the numbers."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


@functools.lru_cache(32)
def permutation(n, epoch, seed):
    """The order of n images in an epoch."""
    return torch.randperm(n, generator=generator(seed, epoch))


def rows_of(n, step, batch_size, seed, rank=0, world=1):
    """This rank's rows of batch `step`: of one permutation of n after another, every world-th."""
    first = step * batch_size
    last = first + batch_size
    parts = []
    for epoch in range(first // n, (last - 1) // n + 1):
        start = max(first - epoch * n, 0)
        parts.append(permutation(n, epoch, seed)[start:last - epoch * n])
    return torch.cat(parts)[rank::world]


def chance_of(count, seed, step, rank, world):
    """The numbers that fix the random stream of each of this rank's `count` images of a batch."""
    return [(seed, step, 2, rank + k * world) for k in range(count)]


@contextlib.contextmanager
def seeded(*numbers):
    """Within, torch's random stream, from which torchvision draws, is fixed; afterwards it goes on."""
    state = torch.get_rng_state()
    torch.set_rng_state(generator(*numbers).get_state())    # manual_seed would reach GPUs as well
    try:
        yield
    finally:
        torch.set_rng_state(state)


# Whole batches moved and cut, on any device

def to_device(tensor, device):
    """tensor.to(device) that does not make the host wait for a GPU, as copying from ordinary memory would."""
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def shifted(images, shifts):
    """images (B, 3, S, S) moved by shifts (B, 2), rows and columns of pixels; edges are repeated."""
    size = images.shape[-1]
    at = torch.arange(size, device=images.device)
    y = (at + shifts[:, 0:1]).clamp_(0, size - 1)
    x = (at + shifts[:, 1:2]).clamp_(0, size - 1)
    return gathered(images, y, x)


def cropped(images, masks, places, crop):
    """Images (B, 3, C, C) and masks (B, C, C), cut out at places (B, 3): top, left, mirrored or not."""
    top, left, mirrored = places.split(1, dim=1)
    at = torch.arange(crop, device=images.device)
    y = top + at
    x = left + torch.where(mirrored > 0, crop - 1 - at, at)
    both = gathered(torch.cat([images, masks[:, None]], 1), y, x)
    return both[:, :3], both[:, 3]


def gathered(images, y, x):
    """Rows y (B, h) and columns x (B, w) of images (B, c, S, S): (B, c, h, w), in one gather."""
    batch, channels, size, _ = images.shape
    index = y[:, :, None] * size + x[:, None, :]
    index = index.view(batch, 1, -1).expand(batch, channels, -1)
    pixels = images.view(batch, channels, -1).gather(2, index)
    return pixels.view(batch, channels, y.shape[1], x.shape[1])


# ----------------------------------------------------------------------------------------------------------
# 2. Augmentation: the papers' recipes
# ----------------------------------------------------------------------------------------------------------
# Tasks whose images are not mirrored: a mirrored 2 is no 2.
UPRIGHT = ("signs", "glyphs", "digits", "decathlon/gtsrb", "decathlon/omniglot", "decathlon/svhn")


@functools.lru_cache
def augmentation(recipe, size, name):
    """A paper's augmentation of a task's images, uint8 (3, H, W) -> uint8 (3, size, size), drawn per image.

    "decathlon", as in TAL's public code: a random crop of the image resized to its shorter side, mirroring,
    colours, noise; digits, letters and signs get noise only. "deit": random resized crop, mirroring,
    RandAugment of magnitude 9 of 10, random erasing. Missing beside DeiT's own: the jitter of the magnitude
    (mstd 0.5) and repeated augmentation; MixUp and CutMix take whole batches, see `mixed`.
    """
    from torchvision.transforms import InterpolationMode as Mode, v2
    upright = origin_of(name) in UPRIGHT
    mirror = [] if upright else [v2.RandomHorizontalFlip()]
    if recipe == "deit":
        fill = [round(255 * m) for m in IMAGENET[0]]
        crop = v2.RandomResizedCrop(size, interpolation=Mode.BICUBIC, antialias=True)
        operations = v2.RandAugment(2, 9, num_magnitude_bins=11, interpolation=Mode.BILINEAR, fill=fill)
        return v2.Compose([crop, *mirror, operations, v2.Lambda(erase)])
    planes = v2.Lambda(torch.Tensor.contiguous)     # noise takes 8 times as long for pixel after pixel
    if upright:
        steps = [v2.CenterCrop(size)]
        noise = v2.GaussianNoise(sigma=0.05)
    else:
        steps = [v2.RandomCrop(size), *mirror, v2.ColorJitter(0.4, 0.4, 0.4, 0.1)]
        noise = v2.GaussianNoise(sigma=0.08)
    return v2.Compose([v2.Resize(size, antialias=True), planes, *steps, planes, noise])


def erase(image, chance=0.25):
    """Random erasing of a uint8 image, by noise of mean 0 and deviation 1 once normalised as ImageNet is."""
    from torchvision.transforms import RandomErasing
    if torch.rand(()) >= chance:
        return image
    top, left, height, width, noise = RandomErasing.get_params(image, (0.02, 1 / 3), (0.3, 3.3))
    if noise is image:                                      # no rectangle of that shape fitted
        return image
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in IMAGENET)
    image = image.clone()
    image[:, top:top + height, left:left + width] = ((noise * std + mean) * 255).clamp(0, 255).byte()
    return image


def mixed(x, y, num_classes, seed, step, mixup=0.8, cutmix=1.0, smoothing=0.1):
    """MixUp or CutMix, as likely, between neighbours of a batch: float x (B, 3, S, S) and labels y (B,).

    Returns x and smoothed probabilities (B, classes).
    """
    from torchvision.transforms import v2
    blend = v2.MixUp(alpha=mixup, num_classes=num_classes)
    patch = v2.CutMix(alpha=cutmix, num_classes=num_classes)
    with seeded(seed, step, 3):
        x, y = v2.RandomChoice([blend, patch])(x, y)
    return x, (1 - smoothing) * y + smoothing / num_classes


# ----------------------------------------------------------------------------------------------------------
# 3. Loading by name
# ----------------------------------------------------------------------------------------------------------
PART = re.compile(r"(.+)(?::(\d+)-(\d+)|/(\d+)#(\d+))")     # a part of a task: NAME:A-B or NAME/K#I


def load_tasks(names, args, machine, segmentation=False):
    """{name: Task on the machine's device}, as a script's flags ask for them.

    segmentation: whether tasks with a class for every pixel are welcome; they may have a size of their own,
    --scene-size. Recipes other than "shift" are work for FileTask's processes.
    """
    names = list(names)
    scenes = [name for name in names if name in (SCENES, "ade20k")]
    others = [name for name in names if name not in scenes]
    with rank_zero_first(machine):                          # it draws what the other processes then read
        if getattr(args, "modality", "image") == "text":
            tasks = load_texts(names, args.data_dir, args.context, args.tokens)
        else:
            memory = MEMORY if args.recipe in ("none", "shift") else 0
            tasks = load_many(others, args.data_dir, args.image_size, workers=args.workers, memory=memory)
            size = getattr(args, "scene_size", args.image_size)
            tasks |= load_many(scenes, args.data_dir, size, workers=args.workers, memory=memory)
    for name, task in tasks.items():
        if task.segmentation and not segmentation:
            raise InputError(f"{name} has a class for every pixel, but these networks give one to an image")
    return {name: tasks[name].to(machine.device) for name in names}


def load(name, data_dir="data", image_size=32, seed=0, workers=2, memory=MEMORY):
    """A drawn task by name, a real dataset of REAL by name, or the task in a folder of images.

    signs:0-15 is the first 16 classes of signs, wide/10#3 the third of the ten subsets into which the classes
    of wide are dealt. Drawn tasks are kept in data_dir/drawn; real datasets are read from data_dir. Images
    that need more than `memory` GiB stay in their files (FileTask). Bad input raises InputError.
    """
    return load_many([name], data_dir, image_size, seed, workers, memory)[name]


def load_many(names, data_dir="data", image_size=32, seed=0, workers=2, memory=MEMORY):
    """{name: Task} of several names, see `load`: missing drawings are made in one pool, and of a real dataset
    only the files of the classes asked for are read."""
    called = dict(zip(names, check_names(names, data_dir)))
    origins = list(dict.fromkeys(origin_of(name) for name in called.values()))
    drawn = load_drawn([origin for origin in origins if origin in SPECS], data_dir, image_size, seed, workers)
    found = {origin: find_all(origin, data_dir) for origin in origins if origin not in SPECS}
    tasks = {}
    for asked, name in called.items():
        origin = origin_of(name)
        whole = drawn.get(origin) or found[origin]
        classes = None if name == origin else classes_of(name, len(whole.class_names))
        if origin in found:
            left = memory - sum(gibibytes(task) for task in tasks.values())
            tasks[asked] = load_real(name, origin, whole, classes, image_size, workers, left)
        else:
            tasks[asked] = whole if classes is None else subset(whole, classes, name)
    return tasks


def gibibytes(task):
    """GiB of a task's images in memory; splits may share them."""
    tensors = {id(t): t for t in task.images.values() if torch.is_tensor(t)}
    return sum(t.numel() for t in tensors.values()) / 2 ** 30


# Names: checked before any work, so that a misspelt one costs nothing

def check_names(names, data_dir="data", modality="image"):
    """The names by which tasks are called (photos/ is photos), where all of them are known and there."""
    names = list(names)
    if modality == "image":
        return [checked(name, data_dir) for name in names]
    for name in names:
        if name not in GRAMMAR and name not in TEXTS:
            raise unknown("text task", name, [*GRAMMAR, *TEXTS])
        if name in TEXTS:
            locate(name, TEXTS[name], data_dir)
    return names


def checked(name, data_dir):
    """The name of a task, of a folder its shortest path; InputError if it is unknown or means two things."""
    origin, known = origin_of(name), {**SPECS, **REAL}
    if origin != name and origin_of(origin) == origin:      # no part of a part
        whole = checked(origin, data_dir)
        if origin in SPECS:
            classes_of(name, len(SPECS[origin].class_names))
        return whole + name[len(origin):]
    if name in REAL:
        base = locate(name, REAL[name], data_dir)
        if not os.path.isdir(name) or os.path.realpath(base).startswith(os.path.realpath(name)):
            return name                                     # no folder, or the dataset's own
    if os.path.isdir(name):
        part = PART.fullmatch(name)
        if name in known or (part and (part[1] in known or os.path.isdir(part[1]))):
            raise InputError(f"{name} is a task and also a folder: write ./{name} for the folder, or start "
                             "elsewhere for the task")
        path = os.path.normpath(name)
        return os.path.join(".", path) if path in known else path
    if name not in known:
        others = ["a folder with one sub-folder of images per class", "a part as in signs:0-15 or wide/10#3"]
        raise unknown("task or folder", name, [*known, *others])
    return name


# Parts of a task

def origin_of(name):
    """The task of which `name` is a part, or the name itself; a folder of that very name is a folder."""
    part = None if os.path.isdir(name) else PART.fullmatch(name)
    return part[1] if part else name


def classes_of(name, num_classes):
    """The classes of a part: those from A to B of NAME:A-B, the I-th of the K subsets of NAME/K#I."""
    _, *numbers = PART.fullmatch(name).groups()
    first, last, parts, number = (int(digits or -1) for digits in numbers)
    if first >= 0:
        if not first < last < num_classes:
            raise InputError(f"{name}: A-B needs A below B, and there are the classes 0 to {num_classes - 1}")
        return range(first, last + 1)
    subsets = class_subsets(num_classes, parts)
    if not 1 <= number <= parts:
        raise InputError(f"{name}: the {parts} subsets are numbered from 1 to {parts}")
    return subsets[number - 1]


def class_subsets(num_classes, parts, seed=0):
    """All classes dealt out at random to `parts` disjoint lists, whose lengths differ by at most one."""
    if not 1 <= parts <= num_classes // 2:
        most = num_classes // 2
        raise InputError(f"{num_classes} classes make 1 to {most} subsets of two or more, not {parts}")
    order = np.random.default_rng(seed).permutation(num_classes)
    return [sorted(part.tolist()) for part in np.array_split(order, parts)]


def parts_of(name):
    """The names that NAME/K stands for, NAME/K#1 to NAME/K#K; any other name stands for itself."""
    match = re.fullmatch(r"(.+)/(\d+)", name)
    if not match or os.path.isdir(name):
        return [name]
    parts = int(match[2])
    if parts < 1:
        raise InputError(f"{name}: NAME/K stands for K subsets of the classes, and K is at least 1")
    return [f"{name}#{number}" for number in range(1, parts + 1)]


def subset(task, classes, name):
    """A Task of these classes alone, labelled 0, 1, ... in the order given; its images keep their order.

    mean and std stay those of the whole task: a model that sees several subsets sees one normalisation.
    """
    if task.segmentation:
        raise InputError(f"{name}: {task.name} has a class for every pixel, so no subset of images by class")
    classes = list(classes)
    new_label = torch.full((task.num_classes,), -1, device=task.labels["train"].device)
    new_label[classes] = torch.arange(len(classes), device=new_label.device)
    images, labels = {}, {}
    for split, old in task.labels.items():
        new = new_label[old]
        images[split] = task.images[split][new >= 0]
        labels[split] = new[new >= 0]
    class_names = [task.class_names[k] for k in classes]
    return Task(name, class_names, task.mean, task.std, images, labels, digest(task.fingerprint, *classes))


# ----------------------------------------------------------------------------------------------------------
# 4. Folders of images
# ----------------------------------------------------------------------------------------------------------
HELD_OUT = 0.2                      # of every class, where there is no val
BAD_SHARE = 0.001                   # of a task's images may be missing or unreadable (or one unreadable)
MAX_PIXELS = 2 ** 27                # of an image in its file, or resized
SAMPLED = 2000                      # files whose bytes are in a fingerprint, if there are more of them
IMAGE_TYPES = (".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif")
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")      # whatever a file is called
JUNK = re.compile(r"\..*|__MACOSX|@eaDir|Thumbs\.db|desktop\.ini", re.IGNORECASE)

SPLIT_FOLDERS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
                 "test": "test", "testing": "test"}
LIKE_A_SPLIT = re.compile(r"(train|training|val|valid|validation|dev|eval|test|testing)(?![a-z])")


@dataclass
class Found:
    """What a reader makes of a dataset's files."""
    class_names: list
    files: dict                                     # {split: [(path or array, label or path of a mask)]}
    official: dict = field(default_factory=dict)    # counts of the whole set, where they are known
    listed: bool = False                            # the paths come from a list and may be missing on disk
    missing: list = field(default_factory=list)     # those that are
    same: dict = field(default_factory=dict)        # {split without images of its own: whose images it has}

    @property
    def masks(self):
        return isinstance(self.files["train"][0][1], str)


def read_folder(root):
    """Found of class folders at the top of `root`, or inside its folders of splits, as train/ and test/."""
    splits = split_folders(root)
    found = read_splits(splits or {"train": root})
    train = found.files["train"]
    top = splits.get("train", root)
    if "val" not in found.files:
        print(f"{printable(root)}: no val folder, so {HELD_OUT:.0%} of each class is held out as val")
        for label, count in collections.Counter(label for _, label in train).items():
            if count == 1:
                raise InputError(f"class {found.class_names[label]} in {top} has one image; it takes 2")
        found.files |= hold_out(train, [os.path.relpath(path, top) for path, _ in train])
    if "test" not in found.files:
        print(f"{printable(root)}: no test folder, so test is the same as val")
        found.same["test"] = "val"
    # In the order of their names' hashes, any first n are a fair sample.
    found.files["train"].sort(key=lambda file: hashed(os.path.relpath(file[0], root)))
    return found


def split_folders(root):
    """{split: folder} of a folder that has train/, val/ and test/ or the like; {} where it holds classes.

    A folder of that name which holds images and no folders is a class, unless there is a train/ with folders.
    """
    names = sub_folders(root)
    with_folders = [name for name in names if sub_folders(os.path.join(root, name))]
    has_train = "train" in [SPLIT_FOLDERS.get(name.lower()) for name in with_folders]
    splits = {}
    for name in names if has_train else with_folders:
        split = SPLIT_FOLDERS.get(name.lower())
        if split in splits:
            raise InputError(f"{root} has more than one folder of {split} images, such as {name}; leave one")
        if split:
            splits[split] = os.path.join(root, name)
        elif LIKE_A_SPLIT.match(name.lower()):
            raise InputError(f"is {os.path.join(root, name)} a split? Call it train, val or test, or move it")
        elif has_train:
            print(f"{printable(root)}: {printable(name)}/ is not used, as it is no split such as train/")
    if splits and not has_train:
        raise InputError(f"{root} has folders of {' and '.join(sorted(splits))} images, but no train/")
    return {split: splits[split] for split in SPLITS if split in splits}


def read_splits(folders):
    """Found of {split: folder with one sub-folder of images per class}, the same classes in all of them."""
    files = {}
    for split, folder in folders.items():
        names, files[split] = list_folder(folder)
        if split == "train":
            classes = names
        elif names != classes:
            odd = sorted(set(names) ^ set(classes))
            raise InputError(f"only one of {folders['train']} and {folder} has class {', '.join(odd[:5])}")
    return Found(classes, files)


def list_folder(root):
    """(class names, [(path, label)]) of a folder with one sub-folder of images per class."""
    classes = sub_folders(root)
    if len(classes) < 2:
        raise InputError(f"{root} has {len(classes)} class folders; it needs at least 2, each of one class")
    files, ignored = [], []
    for label, name in enumerate(classes):
        folder = os.path.join(root, name)
        paths = sorted(files_below(folder, set()))
        images = [path for path in paths if path.lower().endswith(IMAGE_TYPES)]
        if not images:
            raise InputError(f"class folder {folder} has no images ({' '.join(IMAGE_TYPES)})")
        files += [(path, label) for path in images]
        ignored += sorted({*paths}.difference(images))
    if ignored:
        print(f"{printable(root)}: {len(ignored):,} files are no images, such as {printable(ignored[0])}")
    return [printable(name) for name in classes], files


def sub_folders(root):
    """Names of the folders in a folder, in alphabetical order; links to folders count, junk does not."""
    return sorted(entry.name for entry in listing(root) if entry.is_dir())


def files_below(folder, seen):
    """Paths of all files in a folder and those in it, each of which is entered once whatever links say."""
    real = os.path.realpath(folder)
    if real in seen:
        return []
    seen.add(real)
    paths = []
    for entry in listing(folder):
        paths += files_below(entry.path, seen) if entry.is_dir() else [entry.path]
    return paths


def listing(folder):
    """The entries of a folder that are not junk, such as .ipynb_checkpoints and __MACOSX."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not JUNK.fullmatch(entry.name)]
    except OSError as error:
        raise InputError(f"cannot list the folder {folder} ({error.strerror})")


def printable(path):
    """A path as text that any terminal takes, also where its bytes are no UTF-8."""
    return as_bytes(path).decode("utf-8", "replace")


def hashed(text):
    return hashlib.sha256(as_bytes(text)).digest()


def hold_out(files, groups):
    """files as train and val that share no group.

    Of every class, the groups whose names hash lowest are val, up to a fifth of the class.
    """
    size = collections.Counter(groups)
    label_of = {group: label for group, (_, label) in zip(groups, files)}
    count = collections.Counter(label for _, label in files)
    wanted = {label: max(1, round(HELD_OUT * n)) for label, n in count.items()}
    held_out = set()
    for group in sorted(size, key=hashed):
        label = label_of[group]
        if wanted[label] > 0:
            held_out.add(group)
            wanted[label] -= size[group]
    split = {"train": [], "val": []}
    for file, group in zip(files, groups):
        split["val" if group in held_out else "train"].append(file)
    return split


def fingerprint_of(found):
    """16 hex digits of a Found: of its class names, of every file's split, label, relative path and size, and
    of the bytes of all files, or of SAMPLED ones among more."""
    digits = hashlib.blake2b(as_bytes("\n".join(map(str, found.class_names))), digest_size=8)
    files = []
    for split, some in found.files.items():
        for source, label in some:
            if isinstance(source, np.ndarray):
                digits.update(as_bytes(f"{split} {label}\n"))
                digits.update(np.ascontiguousarray(source))
            elif isinstance(label, str):                    # a mask
                files += [(source, f"{split} image"), (label, f"{split} mask")]
            else:
                files.append((source, f"{split} {label}"))
    files.sort()
    top = len(os.path.dirname(os.path.commonprefix([path for path, _ in files[:1] + files[-1:]])))
    sampled = {path for path, _ in files[::math.ceil(len(files) / SAMPLED) or 1]}
    for path, what in files:
        try:
            size = os.path.getsize(path)
        except OSError:                                     # a broken link; reading it will say so
            size = 0
        digits.update(as_bytes(f"{path[top:]} {what} {size}\n"))
        if path in sampled and os.path.isfile(path):
            with open(path, "rb") as file:
                digits.update(file.read())
    return digits.hexdigest()


# Reading images

def open_image(path, size):
    """uint8 (3, H, W) of an image file; ValueError or OSError where that cannot be had.

    16 bits are scaled to 8, what is transparent lies over white. size: of the shorter side to come.
    """
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor
    if not os.path.isfile(path):                            # reading a pipe would never end
        raise OSError("no file")
    with Image.open(path, formats=FORMATS) as image:        # a closed list: other decoders run other programs
        short, long = sorted(image.size)
        if max(short * long, size * size * long / short) > MAX_PIXELS:
            raise ValueError(f"{image.width:,} x {image.height:,} pixels are too many")
        if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
            raise ValueError("32 bits per pixel; save it with 8 or 16")
        if image.mode.startswith("I"):
            levels = np.asarray(image).astype(np.int64)
            image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return pil_to_tensor(image.convert("RGB"))


def open_mask(path, shape, num_classes):
    """uint8 (1, H, W) of the mask of an image (3, H, W): its file has 0 for "none", and k for class k - 1."""
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor
    with Image.open(path, formats=FORMATS) as image:
        if image.mode not in ("L", "P"):
            raise ValueError(f"a mask needs 8 bits per pixel and no colours, not PIL's mode {image.mode}")
        if image.size != (shape[2], shape[1]):
            raise ValueError("the mask is not of its image's size")
        mask = pil_to_tensor(image) - 1                     # bytes wrap around: 0 - 1 = 255 = IGNORED
    labels = mask[mask != IGNORED]
    if labels.numel() and labels.max() >= num_classes:
        raise ValueError(f"the mask holds {labels.max() + 1}, and there are {num_classes} classes")
    return mask


def centre(size, name="", mask=False):
    """The transform without chance: shorter side to size, centre cut out, uint8 (C, H, W) -> (C, size, size).

    Of ImageNet's images a margin of 1/8 is cut off, as in DeiT.
    """
    from torchvision.transforms import InterpolationMode as Mode, v2
    if name.startswith("imagenet"):                         # and its parts
        resize = v2.Resize(round(size / 0.875), Mode.BICUBIC, antialias=True)
    else:
        resize = v2.Resize(size, Mode.NEAREST if mask else Mode.BILINEAR, antialias=True)
    return v2.Compose([resize, v2.CenterCrop(size)])


class ImageFiles(torch.utils.data.Dataset):
    """Images [(path or array, label)] of a task, uint8 (3, size, size): shorter side resized, centre cut out.

    Where labels are paths of masks, the mask is a fourth channel.
    """

    def __init__(self, files, size, name, num_classes):
        sources, labels = zip(*files)
        # One block: counting references to a million strings would copy them into every worker process.
        self.sources = np.array([os.fsencode(s) for s in sources] if isinstance(sources[0], str) else sources)
        self.labels = np.array(labels)
        self.size, self.name, self.num_classes = size, name, num_classes
        self.centre, self.centre_mask = centre(size, name), centre(size, name, mask=True)

    def __len__(self):
        return len(self.sources)

    @property
    def shape(self):
        return len(self), 3, self.size, self.size

    def only(self, rows):
        """The same of these rows alone."""
        other = copy.copy(self)
        other.sources, other.labels = self.sources[rows], self.labels[rows]
        return other

    def __getitem__(self, row):
        """The image without chance, or a sentence on why its file cannot be read."""
        return self.read(row, self.centre)

    def read(self, row, transform):
        """The image after a transform, or a sentence on why its file cannot be read."""
        source, label = self.sources[row], self.labels[row]
        if isinstance(source, np.ndarray):                  # (H, W) or (3, H, W)
            return transform(torch.from_numpy(source.copy()).expand(3, -1, -1))
        try:
            image = open_image(source, self.size)
            mask = open_mask(label, image.shape, self.num_classes) if isinstance(label, str) else None
        except Exception as error:                          # decoders of damaged files raise anything
            return f"{printable(os.fsdecode(source))} ({' '.join(str(error).split())[:100]})"
        image = transform(image)
        return image if mask is None else torch.cat([image, self.centre_mask(mask)])

    def __getitems__(self, keys):
        """A batch for keys (row, recipe, random stream): uint8 (B, 3, size, size), {row: why unreadable}.

        In place of an unreadable image stands the next of its class, so that its label stays true.
        """
        images, unreadable = torch.zeros(len(keys), *self.shape[1:], dtype=torch.uint8), {}
        for out, (row, recipe, stream) in zip(images, keys):
            transform = self.centre if recipe == "none" else augmentation(recipe, self.size, self.name)
            with seeded(*stream) if recipe != "none" else contextlib.nullcontext():
                for candidate in self.rows_of_class(row):
                    image = self.read(candidate, transform)
                    if torch.is_tensor(image):
                        out.copy_(image)
                        break
                    unreadable[candidate] = image
        return images, unreadable

    def rows_of_class(self, row):
        """A row, then all others of its class in turn."""
        yield row
        same = np.flatnonzero(self.labels == self.labels[row])
        yield from np.roll(same, -np.searchsorted(same, row))[1:].tolist()


def report_unreadable(name, unreadable, labels, class_names):
    """Name the images that cannot be read. They are skipped, unless they are many, or all of a class.

    unreadable: {split: {row: sentence}}; labels: {split: labels of all rows, or paths of masks}
    """
    sentences = sorted({sentence for rows in unreadable.values() for sentence in rows.values()})
    if not sentences:
        return
    which = ", ".join(sentences[:20]) + (", ..." if len(sentences) > 20 else "")
    total = sum(map(len, labels.values()))
    if len(sentences) > max(1, BAD_SHARE * total):
        raise InputError(f"{name}: cannot read {len(sentences)} of {total:,} images, too many: {which}")
    for split, rows in unreadable.items():
        lost = collections.Counter(labels[split][list(rows)].tolist())
        for label, count in lost.items():
            if count == int((labels[split] == label).sum()) and not isinstance(label, str):
                raise InputError(f"{name}: cannot read any {split} image of {class_names[label]}: {which}")
    print(f"{name}: skipped {len(sentences)} of {total:,} images, which cannot be read: {which}", flush=True)


def read_images(files, size, workers, name, num_classes):
    """The readable ones of files [(source, label)]: images uint8 (N, 3, size, size), labels (N,) or masks.

    Also {row: why it cannot be read} of the others.
    """
    dataset = ImageFiles(files, size, name, num_classes)
    masks = isinstance(files[0][1], str)
    workers = workers if len(files) > 500 else 0            # starting them would take longer than reading
    reader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers)
    images = torch.empty(len(files), 3 + masks, size, size, dtype=torch.uint8)
    kept, unreadable = [], {}
    for row, image in enumerate(tqdm(reader, "reading images", leave=False, disable=None)):
        if torch.is_tensor(image):
            images[len(kept)] = image
            kept.append(row)
        else:
            unreadable[row] = image
    images = images[:len(kept)]
    labels = images[:, 3] if masks else torch.from_numpy(dataset.labels[kept])
    return images[:, :3], labels, unreadable


# ----------------------------------------------------------------------------------------------------------
# 5. Images decoded as they are needed
# ----------------------------------------------------------------------------------------------------------

class FileTask(Task):
    """A Task whose images {split: ImageFiles} stay in their files.

    Processes decode the next batches while a net computes, each image once per epoch. batch() gives what
    Task.batch gives, whatever the number of workers, at any step; they read ahead as long as steps are asked
    for in turn, and start anew at any other. Recipes see whole images, where a Task has only their centres.
    """

    def __init__(self, name, class_names, mean, std, images, fingerprint="", workers=2):
        labels = {split: torch.from_numpy(files.labels) for split, files in images.items()}
        super().__init__(name, class_names, mean, std, images, labels, fingerprint)
        self.workers = workers
        self.start_anew("cpu")

    def start_anew(self, device):
        self.device = torch.device(device)
        self.ahead = {}                                     # {split: (what is asked for, next step, batches)}
        self.unreadable = {split: {} for split in self.images}

    def to(self, device):
        other = copy.copy(self)
        other.labels = {split: y.to(device) for split, y in self.labels.items()}
        other.__post_init__()                               # mean and std on the device
        other.start_anew(device)
        return other

    def only(self, rows):
        other = self.to(self.device)
        other.images = {"train": self.images["train"].only(rows.cpu().numpy())}
        other.labels = {"train": self.labels["train"][rows]}
        other.start_anew(self.device)
        return other

    def fetch(self, split, rows, step, batch_size, seed, recipe, rank, world):
        """As Task.fetch, from the workers."""
        asked = batch_size, seed, recipe, rank, world
        if self.ahead.get(split, ())[:2] != (asked, step):
            keys = keys_from(step, len(self.labels[split]), *asked)
            self.ahead[split] = asked, step, decoded(self.images[split], keys, self.workers, self.device)
        batches = self.ahead[split][2]
        self.ahead[split] = asked, step + 1, batches
        return self.take(split, *next(batches))

    def in_order(self, split, rows, size):
        """These images in batches of `size`."""
        workers = self.workers if len(rows) > 500 else 0
        keys = ([(row, "none", ()) for row in rows[k:k + size]] for k in range(0, len(rows), size))
        for read in decoded(self.images[split], keys, workers, self.device):
            yield self.take(split, *read)

    def take(self, split, images, unreadable):
        """A batch on the device; unreadable images are reported when first met."""
        known = self.unreadable[split]
        if not known.keys() >= unreadable.keys():
            known.update(unreadable)
            report_unreadable(self.name, {split: known}, {split: self.labels[split].cpu()}, self.class_names)
        return images.to(self.device, non_blocking=True)

    def pixels(self, split, rows):
        return torch.cat(list(self.in_order(split, rows.tolist(), 100)))

    def examples(self, split, limit=None):
        """As Task.examples, but x only has a length and split(n), which gives batches as they are decoded."""
        y = self.labels[split][:limit]
        return Examples(self, split, len(y)), y


class Examples:
    """The first `count` images of a split of a FileTask."""

    def __init__(self, task, name, count):
        self.task, self.name, self.count = task, name, count

    def __len__(self):
        return self.count

    def split(self, size):
        return self.task.in_order(self.name, range(self.count), size)


# These two know nothing of the task that holds them: processes in a reference cycle take 5 s each to die.

def keys_from(step, count, batch_size, seed, recipe, rank, world):
    """What the batches from `step` on are made of: row, recipe and random stream of each image."""
    for at in itertools.count(step):
        rows = rows_of(count, at, batch_size, seed, rank, world).tolist()
        streams = chance_of(len(rows), seed, at, rank, world)
        yield [(row, recipe, stream) for row, stream in zip(rows, streams)]


def decoded(dataset, keys, workers, device):
    """(uint8 batch, {row: why it cannot be read}) for lists of keys; see ImageFiles.__getitems__."""
    yield from torch.utils.data.DataLoader(
        dataset, batch_sampler=keys, num_workers=workers, collate_fn=tuple, pin_memory=device.type == "cuda",
        generator=torch.Generator())                        # not the stream from which training draws


# ----------------------------------------------------------------------------------------------------------
# 6. Real datasets: where the files lie, which label is whose, how many there should be
# ----------------------------------------------------------------------------------------------------------
MASKS_MEMORY = 32                   # GiB that images with masks may take: they are cropped in memory only


def find_all(name, data_dir):
    """As `find`, with all splits; says what differs from the whole set, stops if too much is missing."""
    found = find(name, data_dir)
    total = sum(map(len, found.files.values())) + len(found.missing)
    if len(found.missing) > BAD_SHARE * total:
        raise InputError(f"{name}: {len(found.missing):,} of {total:,} listed images are missing, such as "
                         f"{found.missing[0]}; python data.py --check {name} --data-dir {data_dir} says more")
    for sentence in differences(found):
        print(f"{name}: {sentence}")
    for split, other in (("val", "test"), ("test", "val")):
        if split not in found.files and split not in found.same:
            print(f"{name}: no {split} images with labels, so {split} is the same as {other}")
            found.same[split] = other
    return found


def find(name, data_dir):
    """Found of a real dataset or a folder of images: files that are there, in a fixed mixed order."""
    if name not in REAL:
        return read_folder(name)
    source = REAL[name]
    found = source.read(name, locate(name, source, data_dir))
    if len(found.files) == 1:
        raise InputError(f"{name}: neither val nor test images have labels; needed: {source.needed}")
    found.official = found.official or source.official
    for split, files in found.files.items():
        there = []
        for file in files:
            gone = absent(file) if found.listed else []
            found.missing += gone[:1]
            if not gone:
                there.append(file)
        if not there:
            example = f", such as {found.missing[-1]}" if found.missing else ""
            raise InputError(f"{name}: none of the {len(files):,} {split} images is there{example}")
        order = np.random.default_rng(0).permutation(len(there))           # any first n are a fair sample
        found.files[split] = [there[k] for k in order]
    return found


def absent(file):
    """The paths of a listed image and its mask that do not exist."""
    return [path for path in file if isinstance(path, str) and not os.path.isfile(path)]


def differences(found, what="images"):
    """Sentences on what is not as the whole dataset has it."""
    counts = {split: len(files) for split, files in found.files.items()}
    counts |= {"classes": len(found.class_names), "all": sum(counts.values())}
    sentences = []
    for key, official in found.official.items():
        if counts.get(key, 0) != official:
            things = key if key == "classes" else f"{key} {what}"
            sentences.append(f"{counts.get(key, 0):,} {things} where the whole set has {official:,}")
    return sentences


def load_real(name, origin, found, classes, image_size, workers, memory):
    """The Task `name` of what was found of `origin`, a dataset or folder; if large, a FileTask.

    classes: keep only the images of these, labelled in the order given; None: all.
    """
    if classes is not None and found.masks:
        raise InputError(f"{name}: {origin} has a class for every pixel, so no subset of images by class")
    fingerprint, norm = fingerprint_of(found), NORMS.get(origin)
    names, files = found.class_names, found.files
    if classes is not None:
        norm = norm or measure(found, image_size, workers, origin)     # of all classes, as in `subset`
        fingerprint = digest(fingerprint, *classes)
        names = [names[k] for k in classes]
        new = {label: k for k, label in enumerate(classes)}
        for split, some in files.items():
            files = files | {split: [(source, new[label]) for source, label in some if label in new]}
    need = sum(map(len, files.values())) * image_size ** 2 * (4 if found.masks else 3) / 2 ** 30
    if found.masks and need > MASKS_MEMORY:
        raise InputError(f"{name}: {need:.1f} GiB, more than {MASKS_MEMORY}; give a smaller --image-size")
    if need > memory and not found.masks:
        print(f"{name}: {need:.1f} GiB, more than {max(memory, 0):.1f}: {workers} processes read on demand")
        norm = norm or measure(found, image_size, workers, origin)
        images = {split: ImageFiles(some, image_size, name, len(names)) for split, some in files.items()}
        images |= {split: images[other] for split, other in found.same.items()}
        return FileTask(name, names, *norm, images, fingerprint, workers)
    images, labels = read_all(files, image_size, workers, origin, names)
    images |= {split: images[other] for split, other in found.same.items()}
    labels |= {split: labels[other] for split, other in found.same.items()}
    if norm:
        return Task(name, names, *norm, images, labels, fingerprint)
    return make_task(name, names, images, labels, fingerprint)


def read_all(files, image_size, workers, name, class_names):
    """{split: images} and {split: labels or masks} of {split: files}, without what cannot be read."""
    images, labels, unreadable, before = {}, {}, {}, {}
    for split, some in files.items():
        read = read_images(some, image_size, workers, name, len(class_names))
        images[split], labels[split], unreadable[split] = read
        before[split] = np.array([label for _, label in some])
    report_unreadable(name, unreadable, before, class_names)
    return images, labels


def measure(found, image_size, workers, name, limit=2000):
    """Mean and std of the first `limit` training images."""
    some = {"train": found.files["train"][:limit]}
    images, _ = read_all(some, image_size, workers, name, found.class_names)
    return norm_of(name, images["train"])


# Finding a dataset's files

@dataclass
class Source:
    """A real dataset: its reader, where it lies, what the whole set has, what to unpack."""
    read: callable                  # (name, folder) -> Found
    places: list                    # folders in data_dir that may hold it, besides data_dir itself
    marks: list                     # paths in its folder; one of them is there
    official: dict                  # {split, "classes" or "all": count}
    needed: str


def locate(name, source, data_dir):
    """The first of a dataset's places, or data_dir itself, that holds one of its marks."""
    for place, mark in itertools.product([*source.places, ""], source.marks):
        if os.path.exists(os.path.join(data_dir, place, mark)):
            return os.path.normpath(os.path.join(data_dir, place))
    where = data_dir + (f" or its folders {', '.join(source.places)}" if source.places else "")
    raise InputError(f"{name}: there is no {' or '.join(source.marks)} in {where}; needed: {source.needed}")


def first_file(base, names):
    """The path of the first of these files that is in `base`, or None."""
    for name in names:
        path = os.path.join(base, name)
        if os.path.exists(path):
            return path
    return None


def resolve(files, candidates):
    """files [(name, label)] as paths; candidates(name): the paths that a name may stand for.

    The first of them that exists for one of fifty names is taken for all.
    """
    some = [candidates(name) for name, _ in files[::len(files) // 50 + 1]]
    there = [any(os.path.exists(path) for path in paths) for paths in zip(*some)]
    right = there.index(True) if True in there else 0
    return [(os.path.normpath(candidates(name)[right]), label) for name, label in files]


# Lists of images in COCO's format: Visual Decathlon, iNaturalist

def read_coco(paths, candidates):
    """Found of {split: COCO-style JSON file}, all with the same categories: a label is a place in that list.

    candidates(file name): the paths where an image may be. A file without annotations is no split.
    """
    files, classes = {}, None
    for split, path in paths.items():
        if not os.path.exists(path):
            continue
        try:
            names, listed = read_annotations(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{path} is not in COCO's format ({type(error).__name__}: {error})")
        if names != (classes or names):
            raise InputError(f"{paths['train']} and {path} list different categories, hence other labels")
        classes = names
        if listed:
            files[split] = resolve(listed, candidates)
    if "train" not in files:
        raise InputError(f"{paths['train']} lists no images with annotations")
    return Found(classes, files, listed=True)


def read_annotations(path):
    """(class names, [(file name, label)]) of a COCO-style JSON file."""
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    place = {category["id"]: k for k, category in enumerate(content["categories"])}
    label = {a["image_id"]: place[a["category_id"]] for a in content.get("annotations") or []}
    images = [image for image in content["images"] if image["id"] in label]
    listed = [(str(image["file_name"]), label[image["id"]]) for image in images]
    return [str(category["name"]) for category in content["categories"]], listed


def read_decathlon(name, base):
    """The devkit's annotations/DOMAIN_{train,val}.json, with DOMAIN/ or data/DOMAIN/ beside or around them.

    The devkit's test list is stripped of labels; Rebuffi et al. published them since, as
    annotations/DOMAIN_test.json. TAL's tables are fractions of the val counts: val is what to compare with.
    """
    domain = name.split("/")[1]
    tops = (base, os.path.dirname(base), os.path.join(base, "data"))

    def candidates(file):                                   # data/imagenet12/train/0001/000001.jpg
        bare = file.removeprefix("data/")
        renamed = bare.replace("imagenet12/", "imagenet/", 1)           # as in copies made for TAL's code
        return [os.path.join(top, spelt) for spelt in (file, bare, renamed) for top in tops]

    paths = {split: os.path.join(base, "annotations", f"{domain}_{split}.json") for split in SPLITS}
    return read_coco(paths, candidates)


def read_inaturalist(name, base):
    def candidates(file):                                   # train_val2019/Insects/43/x.jpg
        top, _, *rest = file.split("/")
        as_in_deit = os.path.join(base, top, *rest)         # without the supercategory
        as_in_torchvision = os.path.join(base, "2019", *file.split("/")[1:])
        return [os.path.join(base, file), as_in_deit, as_in_torchvision]

    paths = {split: os.path.join(base, f"{split}2019.json") for split in ("train", "val")}
    return read_coco(paths, candidates)


# Class folders: ImageNet

def read_imagenet(name, base):
    """train/ and val/; the official test/ has no labels."""
    folders = {split: os.path.join(base, split) for split in ("train", "val")}
    if os.path.isdir(folders["val"]) and not sub_folders(folders["val"]):
        raise InputError(f"{folders['val']} is flat; the usual valprep.sh gives each class a folder")
    return read_splits({split: folder for split, folder in folders.items() if os.path.isdir(folder)})


# Through torchvision's own readers: CIFAR, Food-101, Cars, Flowers, Fashion-MNIST

def by_torchvision(name, base, reader, splits, **how):
    """{split: dataset} of a class of torchvision.datasets; splits: {ours: its own}."""
    from torchvision import datasets
    try:
        return {split: getattr(datasets, reader)(base, own, **how) for split, own in splits.items()}
    except Exception as error:                              # pickles and MATLAB files may raise anything
        if "scipy" in str(error):
            raise InputError(f"{name} lists its images in MATLAB files, which scipy reads: pip install scipy")
        reason = str(error).split(". You can use download")[0].split("\n")[0]
        raise InputError(f"{name}: cannot read it in {base} ({reason}); needed: {REAL[name].needed}")


def read_cifar(name, base):
    """Pickles, whose md5 sums torchvision checks."""
    sets = by_torchvision(name, base, name.upper(), {"train": True, "test": False})
    files = {}
    for split, some in sets.items():
        images = np.ascontiguousarray(some.data.transpose(0, 3, 1, 2))
        files[split] = list(zip(images, some.targets))
    return Found(list(sets["train"].classes), files)


def listed_by_torchvision(name, base, reader, splits):
    """Found of a torchvision dataset of image files, without opening them."""
    sets = by_torchvision(name, base, reader, splits, loader=str)          # an "image" is then its path
    files = {}
    for split, some in sets.items():
        files[split] = [some[k] for k in range(len(some))]
        for path, label in files[split]:
            if not 0 <= label < len(some.classes):
                raise InputError(f"{name}: {path} has label {label} of {len(some.classes)} classes")
        files[split] = resolve([(path, int(label)) for path, label in files[split]], nested)
    return Found(list(sets["train"].classes), files, listed=True)


def nested(path):
    """cars_train/x.jpg may be cars_train/cars_train/x.jpg."""
    folder, file = os.path.split(path)
    return [path, os.path.join(folder, os.path.basename(folder), file)]


def read_food(name, base):
    return listed_by_torchvision(name, base, "Food101", {"train": "train", "test": "test"})


def read_cars(name, base):
    """Many copies were sorted into class folders instead, or have each folder in another of its name."""
    folder = os.path.join(base, "stanford_cars")
    if os.path.exists(os.path.join(folder, "devkit")):
        return listed_by_torchvision(name, base, "StanfordCars", {"train": "train", "test": "test"})
    return read_splits({split: os.path.join(folder, split) for split in ("train", "test")})


def read_flowers(name, base):
    """-trainval joins train and val, the 2,040 images on which DeiT's transfer results train."""
    found = listed_by_torchvision(name, base, "Flowers102", {split: split for split in SPLITS})
    if name.endswith("-trainval"):
        found.files["train"] = found.files["train"] + found.files.pop("val")
    return found


def read_fashion(name, base):
    from torchvision.datasets import FashionMNIST
    files = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        images = read_idx(os.path.join(base, f"{stem}-images-idx3-ubyte"))
        labels = read_idx(os.path.join(base, f"{stem}-labels-idx1-ubyte"))
        if images.ndim != 3 or len(images) != len(labels) or labels.max() > 9:
            raise InputError(f"{name}: the {stem} files in {base} do not fit, or have labels above 9")
        files[split] = list(zip(images, labels.tolist()))
    return Found(FashionMNIST.classes, files)


def read_idx(path):
    """The uint8 array in an IDX file, packed (.gz) or not; torchvision's reader takes only the latter."""
    from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor
    try:
        if os.path.exists(path):
            return read_sn3_pascalvincent_tensor(path).numpy()
        with gzip.open(path + ".gz") as packed, tempfile.NamedTemporaryFile() as plain:
            shutil.copyfileobj(packed, plain)
            plain.flush()
            return read_sn3_pascalvincent_tensor(plain.name).numpy()
    except Exception as error:                              # torchvision asserts, indexes and reshapes
        raise InputError(f"{path} is not a file in the IDX format, as Fashion-MNIST has them ({error})")


# Tables: FER2013, HAM10000

def read_table(path, *columns):
    """The rows of a CSV file (tabs will do) as dictionaries; names may follow the commas after a space."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            separator = "\t" if "\t" in file.readline() else ","
            file.seek(0)
            rows = list(csv.DictReader(file, skipinitialspace=True, delimiter=separator))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"cannot read the table {path}: {error}")
    absent = [column for column in columns if not rows or column not in rows[0]]
    if absent:
        raise InputError(f"{path} has no column {', '.join(absent)}, or no rows")
    for number, row in enumerate(rows, 1):
        if any(row[column] is None for column in columns):
            raise InputError(f"{path}: row {number} has fewer columns than its first line")
    return rows


FER = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")      # in the order of FER2013's CSV
FER_TABLES = ["fer2013.csv", "icml_face_data.csv", "train.csv"]


def read_faces(name, base):
    """A CSV with all splits, or train.csv (a fifth held out), or class folders in train/ and test/.

    Labels are numbered as in the CSV whatever the source; folders by alphabet would have neutral before sad.
    """
    table = first_file(base, FER_TABLES)
    if table is None:
        return faces_in_folders(name, base)
    rows = read_table(table, "emotion", "pixels")
    files = [face(f"{table}: row {number}", row) for number, row in enumerate(rows, 1)]
    if "Usage" not in rows[0]:
        print(f"{table} has no column Usage, so {HELD_OUT:.0%} of each class is held out as val")
        return Found(FER, hold_out(files, range(len(files))), official=dict(classes=7, all=28709))
    splits = {}
    for split, usage in (("train", "Training"), ("val", "PublicTest"), ("test", "PrivateTest")):
        splits[split] = [file for file, row in zip(files, rows) if row["Usage"] == usage]
    return Found(FER, splits)


def face(where, row):
    """(uint8 (48, 48), label) of a row of a table."""
    try:
        pixels, label = np.array(row["pixels"].split(), np.uint8).reshape(48, 48), int(row["emotion"])
    except (ValueError, OverflowError) as error:
        raise InputError(f"{where} is not 48 x 48 pixels and a label ({error})")
    if not 0 <= label < len(FER):
        raise InputError(f"{where} has emotion {label}, and they are numbered from 0 to 6")
    return pixels, label


def faces_in_folders(name, base):
    found = read_splits({split: os.path.join(base, split) for split in ("train", "test")})
    short, folders = [emotion[:3] for emotion in FER], [folder[:3].lower() for folder in found.class_names]
    if sorted(folders) != sorted(short):
        raise InputError(f"{name}: {base} should have {', '.join(FER)}, not {', '.join(found.class_names)}")
    number = [short.index(folder) for folder in folders]
    files = {split: [(path, number[label]) for path, label in some] for split, some in found.files.items()}
    return Found(FER, files, official=dict(classes=7, train=28709, test=7178))     # Public- and PrivateTest


HAM_TABLES = ["HAM10000_metadata.csv", "HAM10000_metadata", "HAM10000_metadata.tab"]


def read_lesions(name, base):
    """There is no official split: a fifth of each class's lesions is val, with all images of these lesions.

    -leaky is no measure of anything: every class is repeated to the size of the largest before a fifth of the
    copies is held out, so that val shows training images. That leaves 9,387 of 46,935 copies. TAL's
    accuracies can be fractions of 9,387 and not of any count below 5,860, hence the guess that they come from
    such a split.
    """
    rows = read_table(first_file(base, HAM_TABLES), "lesion_id", "image_id", "dx")
    classes = sorted({row["dx"] for row in rows})
    path_of = lesion_paths(base)
    files = []
    for row in rows:
        file = row["image_id"] + ".jpg"
        files.append((path_of.get(file, os.path.join(base, file)), classes.index(row["dx"])))
    if not name.endswith("-leaky"):
        return Found(classes, hold_out(files, [row["lesion_id"] for row in rows]), listed=True)
    copies, names = repeated(files, len(classes))
    return Found(classes, hold_out(copies, names), listed=True)


def lesion_paths(base):
    """{file name: path} of the images in `base` and in its folders of images, however those are called."""
    paths = []
    for entry in sorted(listing(base), key=lambda entry: entry.name):
        if entry.is_dir() and entry.name.lower().startswith(("ham10000", "images")):
            paths += sorted(files_below(entry.path, set()))
    paths += [entry.path for entry in listing(base) if entry.is_file()]
    return {os.path.basename(path): path for path in paths}


def repeated(files, num_classes):
    """files with every class repeated to the size of the largest, and a name for each copy."""
    of_class = [[file for file in files if file[1] == label] for label in range(num_classes)]
    largest = max(map(len, of_class))
    copies, names = [], []
    for some in of_class:
        for number, file in zip(range(largest), itertools.cycle(some)):
            copies.append(file)
            names.append(f"{os.path.basename(file[0])} {number}")
    return copies, names


# Masks: ADE20K

def read_ade20k(name, base):
    """Scene parsing with 150 classes: the label of an image is the path of its mask."""
    files = {}
    for split, folder in (("train", "training"), ("val", "validation")):
        images = os.path.join(base, "images", folder)
        masks = os.path.join(base, "annotations", folder)
        names = sorted(entry.name for entry in listing(masks)) if os.path.isdir(masks) else []
        stems = [file.removesuffix(".png") for file in names if file.endswith(".png")]
        if not stems:
            raise InputError(f"{name}: {masks} holds no masks (.png); needed: {REAL[name].needed}")
        files[split] = [(os.path.join(images, s + ".jpg"), os.path.join(masks, s + ".png")) for s in stems]
    rows = read_table(os.path.join(base, "objectInfo150.txt"), "Idx", "Name")
    return Found([row["Name"].split(",")[0] for row in rows], files, listed=True)


# The list of real datasets

DOMAINS = {                         # Visual Decathlon: classes, train, val, test, and mean and std of R, G, B
    "aircraft": (100, 3334, 3333, 3333, (0.4798, 0.5107, 0.5344), (0.2107, 0.2051, 0.2373)),
    "cifar100": (100, 40000, 10000, 10000, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "daimlerpedcls": (2, 23520, 5880, 19600, (0.4820,) * 3, (0.2361,) * 3),
    "dtd": (47, 1880, 1880, 1880, (0.5270, 0.4703, 0.4240), (0.2523, 0.2409, 0.2499)),
    "gtsrb": (43, 31367, 7842, 12630, (0.3392, 0.3118, 0.3205), (0.2756, 0.2658, 0.2709)),
    "imagenet12": (1000, 1232167, 49000, 48238, *IMAGENET),
    "omniglot": (1623, 17853, 6492, 8115, (0.0810,) * 3, (0.2705,) * 3),
    "svhn": (10, 47217, 26040, 26032, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "ucf101": (101, 7585, 1952, 3783, (0.4995, 0.4988, 0.4998), (0.1090, 0.1081, 0.1068)),
    "vgg-flowers": (102, 1020, 1020, 6149, (0.4341, 0.3831, 0.2971), (0.2851, 0.2384, 0.2640)),
}


def decathlon(domain):
    classes, train, val, test, *_ = DOMAINS[domain]
    tar = f"within its data/ the {domain}.tar of decathlon-1.0-data.tar.gz"
    if domain == "imagenet12":
        tar = "beside it decathlon-1.0-data-imagenet.tar"
    return Source(
        read_decathlon, ["decathlon-1.0", "decathlon", ".."], [f"annotations/{domain}_train.json"],
        dict(classes=classes, train=train, val=val, test=test),
        f"decathlon-1.0-devkit.tar.gz, and {tar}")


REAL = {f"decathlon/{domain}": decathlon(domain) for domain in DOMAINS} | {
    "imagenet": Source(
        read_imagenet, ["imagenet", "ImageNet", "ILSVRC2012", "ILSVRC/Data/CLS-LOC"], ["train"],
        dict(classes=1000, train=1281167, val=50000), "train/ and val/ with a folder per class"),
    "cifar10": Source(
        read_cifar, ["cifar10"], ["cifar-10-batches-py"],
        dict(classes=10, train=50000, test=10000), "cifar-10-python.tar.gz, unpacked"),
    "cifar100": Source(
        read_cifar, ["cifar100"], ["cifar-100-python"],
        dict(classes=100, train=50000, test=10000), "cifar-100-python.tar.gz, unpacked"),
    "food101": Source(
        read_food, ["food101"], ["food-101/meta/train.json"],
        dict(classes=101, train=75750, test=25250), "food-101.tar.gz, unpacked"),
    "cars": Source(
        read_cars, ["cars"], ["stanford_cars/devkit", "stanford_cars/train"],
        dict(classes=196, train=8144, test=8041),
        "stanford_cars/ with cars_train/, cars_test/, devkit/ and cars_test_annos_withlabels.mat, or with "
        "train/ and test/ that hold a folder per class"),
    "flowers102": Source(
        read_flowers, ["flowers102"], ["flowers-102/setid.mat"],
        dict(classes=102, train=1020, val=1020, test=6149),
        "flowers-102/ with jpg/, imagelabels.mat and setid.mat"),
    "flowers102-trainval": Source(
        read_flowers, ["flowers102"], ["flowers-102/setid.mat"],
        dict(classes=102, train=2040, test=6149), "the files of flowers102"),
    "inaturalist2019": Source(
        read_inaturalist, ["inaturalist2019", "iNaturalist2019", "inat2019"], ["train2019.json"],
        dict(classes=1010, train=265213, val=3030), "train2019.json, val2019.json and train_val2019/"),
    "fashion-mnist": Source(
        read_fashion, ["FashionMNIST/raw", "fashion-mnist", "fashion-mnist/data/fashion"],
        ["train-images-idx3-ubyte", "train-images-idx3-ubyte.gz"],
        dict(classes=10, train=60000, test=10000), "the four ...-ubyte or ...-ubyte.gz files"),
    "fer2013": Source(
        read_faces, ["fer2013", "FER2013", "fer2013/fer2013"], [*FER_TABLES, "train"],
        dict(classes=7, train=28709, val=3589, test=3589),
        "fer2013.csv, icml_face_data.csv or train.csv, or train/ and test/ with a folder per expression"),
    "ham10000": Source(
        read_lesions, ["ham10000", "HAM10000"], HAM_TABLES,
        dict(classes=7, all=10015), "HAM10000_metadata.csv and the two folders of images"),
    "ham10000-leaky": Source(
        read_lesions, ["ham10000", "HAM10000"], HAM_TABLES,
        dict(classes=7, all=46935, val=9387), "the files of ham10000"),
    "ade20k": Source(
        read_ade20k, ["ADEChallengeData2016", "ade20k/ADEChallengeData2016", "ade20k"],
        ["annotations/training"],
        dict(classes=150, train=20210, val=2000), "ADEChallengeData2016.zip, unpacked"),
}

# Mean and std by which images are normalised: the challenge's, or ImageNet's as in DeiT; else measured.
NORMS = {f"decathlon/{domain}": row[4:] for domain, row in DOMAINS.items()}
for dataset in ("imagenet", "cifar10", "cifar100", "food101", "cars", "flowers102", "flowers102-trainval",
                "inaturalist2019", "ade20k"):
    NORMS[dataset] = IMAGENET


# ----------------------------------------------------------------------------------------------------------
# 7. Text: GPT-2's tokens, tasks of texts, GLUE's MRPC, CoLA and RTE, and IMDB
# ----------------------------------------------------------------------------------------------------------
END = "<|endoftext|>"               # GPT-2's only special token, the last id; it also pads
VAL_SHARE = 0.1                     # of the training texts: neither GLUE nor IMDB has a split for choosing


class Tokenizer:
    """GPT-2's byte-level BPE from its two files in `folder`; without a folder bytes, ids 0 to 255.

    The last id, eos, is END. A text that spells END out is encoded as ordinary characters: no text holds eos.
    """

    def __init__(self, folder=None):
        self.bpe = read_bpe(folder) if folder else None
        self.size = self.bpe.get_vocab_size() if folder else 257
        self.eos = self.size - 1

    def encode(self, text):
        return self.encode_all([text])[0]

    def encode_all(self, texts):
        """The ids of each text."""
        if self.bpe is None:
            return [list(text.encode()) for text in texts]
        return [encoding.ids for encoding in self.bpe.encode_batch(texts)]

    def decode(self, ids):
        ids = [int(k) for k in ids]
        if self.bpe is not None:
            return self.bpe.decode(ids)
        return b"".join(END.encode() if k == 256 else bytes([k]) for k in ids).decode(errors="replace")


def read_bpe(folder):
    """The ByteLevelBPETokenizer of GPT-2's vocab.json and merges.txt, or of the same under openai's names."""
    try:
        from tokenizers import ByteLevelBPETokenizer
        from tokenizers.pre_tokenizers import ByteLevel
    except ImportError:
        raise InputError("GPT-2's tokens are read with the package tokenizers: pip install tokenizers")
    needed = "; needed: vocab.json and merges.txt of openai's gpt2 on Hugging Face"
    texts = []
    for names in (["vocab.json", "encoder.json"], ["merges.txt", "vocab.bpe"]):
        path = first_file(folder, names)
        if path is None:
            raise InputError(f"there is no {' or '.join(names)} in {folder}{needed}")
        texts.append(read_text(path))
    try:
        vocab, lines = dict(json.loads(texts[0])), texts[1].split("\n")
        if lines[0].startswith("#version"):                 # "# #" is a merge
            lines = lines[1:]
        merges = [tuple(line.split(" ")) for line in lines if line]
        expected = {*ByteLevel.alphabet(), *(left + right for left, right in merges), END}
        if vocab.keys() != expected:
            raise ValueError(f"{sorted(vocab.keys() ^ expected)[0]!r} is in one of the two files only")
        if sorted(vocab.values()) != list(range(len(vocab))) or vocab[END] != len(vocab) - 1:
            raise ValueError(f"the ids are not the numbers from 0 with {END} last")
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"the tokens in {folder} are not GPT-2's ({error}){needed}")
    return ByteLevelBPETokenizer(vocab, merges)


def read_text(path):
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} ({error})")


@dataclass
class TextTask(Task):
    """Texts as token ids: images {split: int32 (N, T)}, padded at the right with eos; mean and std are ().

    metric: "accuracy", "accuracy/F1" or "Matthews". lengths {split: int64 (N,)}, in tokens, stay on the CPU.
    """
    metric: str = "accuracy"
    eos: int = 256

    def __post_init__(self):
        self.lengths = {split: (ids != self.eos).sum(1).cpu() for split, ids in self.images.items()}

    def normalise(self, images):
        return images

    def batch(self, split, step, batch_size, seed=0, recipe="none", rank=0, world=1, crop=None):
        """As Task.batch: ids int64 (B, T), where T is the longest of these B texts, and y int64 (B,).

        Texts are neither augmented nor cut.
        """
        rows = rows_of(len(self.lengths[split]), step, batch_size, seed, rank, world)
        longest = int(self.lengths[split][rows].max())      # the host knows it, and need not wait for a GPU
        rows = to_device(rows, self.labels[split].device)
        return self.images[split][rows, :longest].long(), self.labels[split][rows]

    def examples(self, split, limit=None):
        """The first `limit` texts of a split in their fixed order (default: all): int64 (N, T), y."""
        longest = int(self.lengths[split][:limit].max())
        return self.images[split][:limit, :longest].long(), self.labels[split][:limit]


def text_task(name, class_names, metric, splits, tokenizer, context):
    """The TextTask of {split: [(text, second text or None, label)]}.

    A newline joins a pair; texts are cut to `context` tokens and padded to the longest that is left.
    """
    ids = {split: tokenised(name, split, rows, tokenizer) for split, rows in splits.items()}
    lengths = [len(text) for texts in ids.values() for text in texts]
    width = min(context, max(lengths))
    cut = sum(length > context for length in lengths)
    if cut:
        print(f"{name}: {cut:,} of {len(lengths):,} texts have more than {context:,} tokens and are cut")
    images, labels = {}, {}
    for split, rows in splits.items():
        images[split] = torch.full((len(rows), width), tokenizer.eos, dtype=torch.int32)
        for row, text in zip(images[split], ids[split]):
            row[:len(text)] = torch.from_numpy(text[:width])
        labels[split] = torch.tensor([label for _, _, label in rows])
    fingerprint = digest(*class_names, *images.values(), *labels.values())
    return TextTask(name, list(class_names), (), (), images, labels, fingerprint, metric, tokenizer.eos)


def tokenised(name, split, rows, tokenizer):
    """The ids of each text, or pair of texts, of a split: int32 arrays."""
    texts = []
    for text, second, _ in rows:
        if not text or second == "":
            raise InputError(f"{name}: text {len(texts)} of {split} is empty")
        texts.append(text if second is None else f"{text}\n{second}")
    ids = []
    for k in range(0, len(texts), 1000):                    # what a tokenizer returns is larger than arrays
        ids += [np.array(some, np.int32) for some in tokenizer.encode_all(texts[k:k + 1000])]
    return ids


# Loading texts by name

def load_texts(names, data_dir="data", context=1024, tokens=""):
    """{name: TextTask} of drawn tasks (GRAMMAR) and real ones (TEXTS, in data_dir).

    tokens: a folder with GPT-2's vocab.json and merges.txt; "": a token is a byte. Texts keep their first
    `context` tokens.
    """
    check_names(names, data_dir, "text")
    tokenizer = Tokenizer(tokens)
    tasks = {}
    for name in names:
        if name in GRAMMAR:
            about, splits = GRAMMAR[name], written(name)
        else:
            about, splits = TEXTS[name], read_texts(name, data_dir)
            for sentence in differences(Found(about.class_names, splits, about.official), "texts"):
                print(f"{name}: {sentence}")
        tasks[name] = text_task(name, about.class_names, about.metric, splits, tokenizer, context)
    return tasks


def read_texts(name, data_dir):
    """{split: [(text, second text or None, label)]} of a real dataset.

    Texts go in the order of their hashes, as files may be sorted by class: any first n are a fair sample. The
    first tenth of the training texts is val.
    """
    source = TEXTS[name]
    base = locate(name, source, data_dir)
    splits = {}
    for split, rows in source.read(name, base).items():
        splits[split] = sorted(rows, key=lambda row: hashed(f"{name}\n{row[0]}\n{row[1]}"))
    train, test = splits["train"], splits["test"]
    if len(train) < 2 or not test:
        raise InputError(f"{name}: {len(train)} training and {len(test)} test texts; it takes 2 and 1")
    val = max(1, round(VAL_SHARE * len(train)))
    return {"train": train[val:], "val": train[:val], "test": test}


# GLUE and IMDB

class Table(NamedTuple):
    """One of GLUE's tables, in tab-separated columns in which a quote is only a quote."""
    header: list                    # its first line, if it has one
    columns: int
    label: int                      # column of the label
    texts: tuple                    # columns of the sentences
    words: tuple                    # labels as they stand there, in the order of the classes


GLUE = {
    "mrpc": Table(["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], 5, 0, (3, 4), ("0", "1")),
    "cola": Table([], 4, 1, (3,), ("0", "1")),
    "rte": Table(["index", "sentence1", "sentence2", "label"], 4, 3, (1, 2),
                 ("entailment", "not_entailment")),
}


def read_tsv(name, path):
    """[(columns, (sentence, second sentence or None, label))] of one of GLUE's tables."""
    table = GLUE[name]
    lines = read_text(path).split("\n")
    if table.header and lines[0].split("\t") != table.header:
        raise InputError(f"{path}, line 1: should be {', '.join(table.header)}, separated by tabs")
    rows = []
    for number, line in enumerate(lines, 1):
        where, columns = f"{path}, line {number}", line.split("\t")
        if not line or columns == table.header:
            continue
        if len(columns) != table.columns:
            raise InputError(f"{where}: {len(columns)} columns between tabs; {name} has {table.columns}")
        word, texts = columns[table.label], [columns[k].strip() for k in table.texts]
        if word not in table.words:
            raise InputError(f"{where}: the label {word!r} is none of {', '.join(table.words)}")
        if not all(texts):
            raise InputError(f"{where}: an empty sentence")
        second = texts[1] if len(texts) > 1 else None
        rows.append((columns, (texts[0], second, table.words.index(word))))
    return rows


def read_glue(name, base):
    """GLUE's test has no labels, so "test" is its dev."""
    if name == "mrpc" and not os.path.exists(os.path.join(base, "train.tsv")):
        return read_raw_mrpc(name, base)
    splits = {}
    for split, file in (("train", "train.tsv"), ("test", "dev.tsv")):
        splits[split] = [row for _, row in read_tsv(name, os.path.join(base, file))]
    return splits


def read_raw_mrpc(name, base):
    """MRPC as Microsoft's own two tables: dev are the pairs that dev_ids lists.

    The second table (GLUE's test, here with labels) is left alone, so that both forms give one task.
    """
    listed = first_file(base, ["dev_ids.tsv", "mrpc_dev_ids.tsv"])
    if listed is None:
        raise InputError(f"{name}: {base} lacks dev_ids.tsv (or mrpc_dev_ids.tsv), the pairs of GLUE's dev")
    dev = {tuple(line.split()) for line in read_text(listed).splitlines()}
    splits = {"train": [], "test": []}
    for columns, row in read_tsv(name, os.path.join(base, "msr_paraphrase_train.txt")):
        splits["test" if (columns[1], columns[2]) in dev else "train"].append(row)
    return splits


def read_imdb(name, base):
    """A review per file, in folders neg and pos; train/unsup has no labels."""
    splits = {"train": [], "test": []}
    for split, (label, kind) in itertools.product(splits, enumerate(("neg", "pos"))):
        folder = os.path.join(base, split, kind)
        paths = sorted(glob.glob(os.path.join(glob.escape(folder), "*.txt")))
        if not paths:
            raise InputError(f"{name}: no reviews (.txt) in {folder}; needed: {TEXTS[name].needed}")
        for path in paths:
            text = read_text(path).replace("<br />", "\n").strip()
            if not text:
                raise InputError(f"{path}: an empty review")
            splits[split].append((text, None, label))
    return splits


@dataclass
class TextSource(Source):
    """As Source, where test is what GLUE calls dev, and val a tenth of its train."""
    class_names: list
    metric: str


def glue_places(folder):
    return [top + name for top in ("glue/", "GLUE/", "glue_data/", "") for name in (folder, folder.lower())]


TEXTS = {
    "mrpc": TextSource(
        read_glue, glue_places("MRPC"), ["train.tsv", "msr_paraphrase_train.txt"],
        dict(train=3301, val=367, test=408),
        "MRPC/ with train.tsv and dev.tsv, or with msr_paraphrase_train.txt and dev_ids.tsv",
        ["not a paraphrase", "paraphrase"], "accuracy/F1"),
    "cola": TextSource(
        read_glue, glue_places("CoLA"), ["train.tsv"], dict(train=7696, val=855, test=1043),
        "CoLA.zip, unpacked", ["unacceptable", "acceptable"], "Matthews"),
    "rte": TextSource(
        read_glue, glue_places("RTE"), ["train.tsv"], dict(train=2241, val=249, test=277),
        "RTE.zip, unpacked", ["entailment", "not entailment"], "accuracy"),
    "imdb": TextSource(
        read_imdb, ["aclImdb", "imdb/aclImdb", "imdb", "IMDB"], ["train/pos"],
        dict(train=22500, val=2500, test=25000),
        "aclImdb_v1.tar.gz, unpacked", ["negative", "positive"], "accuracy"),
}


# ----------------------------------------------------------------------------------------------------------
# 8. Command line
# ----------------------------------------------------------------------------------------------------------

def contact_sheet(tasks, path, columns=20, zoom=2):
    """One row per task: an image of each of `columns` classes of val; of scenes the first ones."""
    rows = []
    for task in tasks.values():
        images = task.images["val"]
        if task.segmentation:
            chosen = [k % len(images) for k in range(columns)]
        else:
            chosen = one_of_each(task, columns)
        rows += [images[k] for k in chosen]
    sheet = F.interpolate(torch.stack(rows).float() / 255, scale_factor=zoom, mode="nearest")
    save_grid(sheet, path, columns)


def one_of_each(task, columns):
    """Rows of val, an image of each of `columns` classes; if there are fewer, the next image of a class."""
    labels = task.labels["val"]
    classes = min(columns, task.num_classes)
    stride = task.num_classes // classes                    # k % stride: not the same fill all along
    order = [k % classes * task.num_classes // classes + k % stride for k in range(columns)]
    images_of = {label: itertools.cycle((labels == label).nonzero()[:, 0].tolist()) for label in order}
    return [next(images_of[label]) for label in order]


def save_grid(images, path, columns):
    from torchvision.utils import make_grid, save_image
    with writing(path):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        save_image(make_grid(images, nrow=columns, padding=2, pad_value=1), path)


def difficulty(task):
    """Test accuracy (%) of a linear model on pixels, and of a ViT of width 48, depth 3, patches of 1/4."""
    if task.segmentation:
        raise InputError(f"{task.name} has a class for every pixel, so it has no --difficulty")
    torch.manual_seed(0)
    size = task.images["train"].shape[-1]
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * size * size, task.num_classes))
    config = ViTConfig(size, size // 4, width=48, depth=3, heads=6, num_classes=task.num_classes,
                       pooling="avg")
    steps = max(1250, len(task.labels["train"]) // 16)      # at least 80,000 images and at least four epochs
    fit(linear, task, steps=1500, batch_size=256, lr=1e-3, weight_decay=0.1, recipe="none")
    vit = fit(ViT(config), task, steps, batch_size=64, lr=2e-3, weight_decay=0.05, recipe="shift")
    return accuracy(linear, task, "test", "cpu"), accuracy(vit, task, "test", "cpu")


def print_difficulty(tasks):
    """The table of results/difficulty.md."""
    print("| task | stands in for | classes | train / val / test | chance | linear on pixels | ViT 48x3 |")
    print("|---|---|---|---|---|---|---|")
    for task in tasks.values():
        stands_for = SPECS[task.name].stands_for if task.name in SPECS else ""
        sizes = " / ".join(f"{len(task.labels[split]):,}" for split in SPLITS)
        chance = 100 / task.num_classes
        linear, vit = difficulty(task)
        print(f"| {task.name} | {stands_for} | {task.num_classes} | {sizes} "
              f"| {chance:.1f} | {linear:.1f} | {vit:.1f} |", flush=True)


def check(name, data_dir, image_size, workers, output, limit=2000):
    """Print what there is of a dataset, write a contact sheet; InputError on what is missing."""
    name = check_names([name], data_dir)[0]
    if origin_of(name) in SPECS or name != origin_of(name):
        raise InputError(f"--check looks at a real dataset or a folder of images, not at {name}")
    found = find(name, data_dir)
    some = ", ".join(found.class_names[:6]) + (", ..." if len(found.class_names) > 6 else "")
    print(f"{name}: {len(found.class_names):,} classes ({some})")
    for split, files in found.files.items():
        what = "with masks" if found.masks else f"of {len({label for _, label in files}):,} classes"
        print(f"  {split}: {len(files):,} images {what}; official: {found.official.get(split, '-')}")
    start = time.perf_counter()
    first = {split: files[:limit] for split, files in found.files.items()}
    images, _ = read_all(first, image_size, workers, name, found.class_names)
    count, seconds = sum(map(len, first.values())), time.perf_counter() - start
    print(f"  {count:,} images decoded to {image_size} pixels: {count / seconds:,.0f} images/s")
    mean, std = norm_of(name, images["train"])
    print(f"  mean of train {mean}, std {std}; used: {NORMS.get(name, 'these')}")
    save_grid(torch.cat([some[:40] for some in images.values()]).float() / 255, output, 20)
    print(f"  {output}: the first images of {' and of '.join(images)}")
    for path in found.missing[:20]:
        print(f"  missing: {path}")
    trouble = [f"{len(found.missing):,} listed images are missing"] if found.missing else []
    report_whole(name, trouble + differences(found), known=found.official)


def report_whole(name, trouble, known=True):
    if trouble:
        raise InputError(f"{name} is not whole: {'; '.join(trouble)}")
    print(f"{name} is whole: its counts are the official ones" if known else f"{name} has no official counts")


def check_texts(name, data_dir, tokens):
    """As `check`, for texts."""
    source, tokenizer, splits = TEXTS[name], Tokenizer(tokens), read_texts(name, data_dir)
    print(f"{name}: {len(source.class_names)} classes ({', '.join(source.class_names)}), by {source.metric}")
    for split, rows in splits.items():
        counts = np.bincount([label for _, _, label in rows])
        longest = max(map(len, tokenised(name, split, rows, tokenizer)))
        print(f"  {split}: {len(rows):,} texts, {counts.max():,} of them ({counts.max() / len(rows):.1%}) "
              f"{source.class_names[counts.argmax()]}; the longest has {longest:,} tokens; "
              f"official: {source.official[split]:,}")
    first, second, label = splits["train"][0]
    print(f"  the first training text, {source.class_names[label]}: {first[:200]!r} {(second or '')[:200]!r}")
    report_whole(name, differences(Found(source.class_names, splits, source.official), "texts"))


def main(argv=None):
    args = parse(argv)
    if args.check in TEXTS:
        check_texts(args.check, args.data_dir, args.tokens)
    elif args.check:
        check(args.check, args.data_dir, args.image_size, args.workers, args.output)
    else:
        names = args.tasks.split(",") if args.tasks else DRAWN
        if args.difficulty and not args.tasks:
            names = [name for name in DRAWN if not SPECS[name].masks]
        tasks = load_many(names, args.data_dir, args.image_size, args.seed, args.workers)
        if args.difficulty:
            print_difficulty(tasks)
        else:
            contact_sheet(tasks, args.output)
            print(f"{args.output}: one row per task: {', '.join(tasks)}")


def parse(argv):
    parser = Parser(description="Draw the mini visual decathlon and show it, or look at a dataset.")
    add = parser.add_argument
    add("--check", metavar="NAME", help="say what there is of a real dataset or a folder of images")
    add("--difficulty", action="store_true", help="print how hard each task is instead (minutes)")
    add("--tasks", help="comma-separated drawn tasks or folders; all drawn ones (--difficulty: but scenes)")
    add("--output", help="where the contact sheet goes [results/contact_sheet.png; runs/ with --check]")
    add("--data-dir", default="data", help="folder of the real datasets and of the cache (drawn/ inside it)")
    add("--image-size", type=positive, default=32, help="side of the drawn images in pixels")
    add("--seed", type=whole, default=0, help="seed of the drawn images")
    add("--workers", type=positive, default=2, help="threads that draw, processes that read folders")
    add("--tokens", default="", help="--check of texts: folder of GPT-2's vocab.json and merges.txt [bytes]")
    args = parser.parse_args(argv)
    if not args.output:
        sheet = f"runs/check-{file_name(os.path.normpath(args.check))}.png" if args.check else None
        args.output = sheet or "results/contact_sheet.png"
    if not args.output.endswith((".png", ".jpg")):
        raise InputError(f"--output {args.output} must end in .png or .jpg")
    return args


# ----------------------------------------------------------------------------------------------------------
# Appendix A. Drawn images
# ----------------------------------------------------------------------------------------------------------
# Same seed, same bytes, on every machine. Per-pixel work is float32 with + - * / sqrt abs floor min max and
# comparisons only, which IEEE 754 fixes to the last bit; no matrix product or sum whose order a library may
# choose. sin and cos are taken of a few numbers per image and rounded at once, before the libraries' last
# bits can show. Every chunk of images has a random stream of its own, [seed, task, split, chunk], so neither
# the number of workers nor the order of work matters; the order in which a function draws its random numbers
# does. Coordinates run over [-1, 1] whatever the image size: 64 x 64 shows the same scenes as 32 x 32, drawn
# finer. What a class looks like does not depend on the seed.
#
# A number per image has shape (n, 1, 1), a field of numbers per pixel (n, S, S), a colour (n, 3, 1, 1); y
# points down.

DRAWN_VERSION = 2                   # part of the cache's file names: raise it when any drawing changes
CHUNK = 125                         # images drawn at a time from one random stream; they fit a core's cache
f4 = np.float32


class Pose(NamedTuple):
    """A frame in each image: local coordinates u and v (n, S, S), width of a pixel in them (n, 1, 1)."""
    u: np.ndarray
    v: np.ndarray
    edge: np.ndarray


def exact(values):
    """Round float64 values of sin, cos and the like, so that every library agrees on the float32."""
    return (np.round(np.asarray(values, np.float64) * 2 ** 20) / 2 ** 20).astype(f4)


class Canvas:
    """n images being drawn: pixels (n, 3, S, S) in [0, 1], coordinates x and y, a random stream."""

    def __init__(self, n, size, rng):
        axis = (np.arange(size, dtype=f4) + 0.5) * f4(2 / size) - 1
        self.n, self.size, self.rng = n, size, rng
        self.pixel = f4(2 / size)
        self.x = axis[None, None, :]
        self.y = axis[None, :, None]
        self.pixels = np.zeros((n, 3, size, size), f4)

    def uniform(self, low, high, *shape):
        return self.rng.random((self.n, *(shape or (1, 1))), dtype=f4) * f4(high - low) + f4(low)

    def coin(self, p=0.5):
        return self.rng.random((self.n, 1, 1), dtype=f4) < f4(p)

    def pick(self, k):
        return self.rng.integers(k, size=self.n)

    def pose(self, shift, turn, scale):
        """A frame at a random place (up to shift), angle (up to turn radians) and scale (low, high)."""
        angle, scale = self.uniform(-turn, turn), self.uniform(*scale)
        x, y = self.uniform(-shift, shift), self.uniform(-shift, shift)
        return self.frame(x, y, angle, scale)

    def frame(self, x, y, angle, scale):
        angle = angle.astype(np.float64)
        c = exact(np.cos(angle)) / scale
        s = exact(np.sin(angle)) / scale
        x, y = self.x - x, self.y - y
        return Pose(c * x + s * y, c * y - s * x, self.pixel / scale)

    def paint(self, mask, colour):
        """Lay a colour (n, 3, 1, 1) over the images where mask (n, S, S), 0 to 1, says."""
        self.pixels += (colour - self.pixels) * mask[:, None]

    def noise(self, cells):
        """Smooth random field (n, S, S) in [0, 1]: random values on a grid of cells x cells, interpolated."""
        grid = self.rng.random((self.n, cells + 1, cells + 1), dtype=f4)
        place = (self.x[0, 0] + 1) * f4(cells / 2)
        cell = place.astype(np.int64)
        t = place - cell.astype(f4)
        t = t * t * (3 - 2 * t)
        rows = grid.take(cell, 1) * (1 - t)[:, None] + grid.take(cell + 1, 1) * t[:, None]
        return rows.take(cell, 2) * (1 - t) + rows.take(cell + 1, 2) * t

    def background(self, first, second, cells=3):
        """Fill with a smooth random mixture of two colours."""
        self.pixels = first + (second - first) * self.noise(cells)[:, None]

    def finish(self, grain=0.03, light=0.15):
        """Uneven light, pixel noise and bytes. The noise comes last: nothing else depends on the size."""
        across, down = self.uniform(-light, light), self.uniform(-light, light)
        self.pixels *= (1 + across * self.x + down * self.y)[:, None]
        noise = self.rng.random((self.n, 1, self.size, self.size), dtype=f4)
        self.pixels += (noise - 0.5) * f4(2 * grain)
        return np.floor(np.clip(self.pixels, 0, 1) * 255 + 0.5).astype(np.uint8, order="C")


def cover(distance, edge):
    """How much of a pixel lies inside a shape, from the signed distance to its edge (negative inside)."""
    return np.clip(0.5 - distance / edge, 0, 1)


def hsv(hue, saturation, value):
    """Colours (n, 3, 1, 1) from hue (turns), saturation and value, each (n, 1, 1) or a number."""
    hue, saturation, value = (np.asarray(t, f4).reshape(-1, 1, 1) for t in (hue, saturation, value))
    k = np.stack([hue * 6 + f4(n) for n in (5, 3, 1)], 1)
    k = k - 6 * np.floor(k / 6)
    return value[:, None] * (1 - saturation[:, None] * np.clip(np.minimum(k, 4 - k), 0, 1))


def grey(value):
    return hsv(0, 0, value)


def contrast(c, gap=0.35, bright=0.7):
    """Brightness of figure and ground, at least gap apart; the figure is the brighter with chance `bright`.

    That the sign varies is what a linear model on pixels fails on, while the eye hardly notices.
    """
    dark = c.uniform(0.12, 0.9 - gap)
    light = dark + gap + (f4(0.95 - gap) - dark) * c.uniform(0, 1)
    flip = c.coin(bright)
    return either(flip, light, dark), either(flip, dark, light)


def either(condition, yes, no):
    """np.where in float32."""
    return np.where(condition, yes, no).astype(f4)


def per_image(values):
    """(n,) as (n, 1, 1)."""
    return values[:, None, None]


def by_kind(functions, kinds, *arrays):
    """Row i of the result is functions[kinds[i]] of row i of the arrays: one call per kind, not per image."""
    out = np.empty(arrays[0].shape, f4)
    for kind in np.unique(kinds):
        rows = np.flatnonzero(kinds == kind)
        out[rows] = functions[kind](*[array[rows] for array in arrays])
    return out


def wave(t):
    """A smooth wave of period 1 between -1 and 1, made of + and * (sin is not the same on every machine)."""
    t = abs(t - np.floor(t) - 0.5) * 4 - 1
    return t * (1.5 - 0.5 * t * t)


# Shapes: signed distances (or close to it) for coordinates u, v; about 1 across from the centre

def length(u, v):
    return np.sqrt(u * u + v * v)


def union(*distances):
    return np.minimum.reduce(distances)


def box(u, v, left, right, top, bottom):
    return np.maximum(np.maximum(left - u, u - right), np.maximum(top - v, v - bottom))


def polygon(u, v, corners, radius, start=0.0):
    """A regular polygon; start turns its first side, in fractions of a turn (0 is to the right)."""
    angles = 2 * np.pi * (start + np.arange(corners) / corners)
    sides = [u * c + v * s for c, s in zip(exact(np.cos(angles)), exact(np.sin(angles)))]
    return np.maximum.reduce(sides) - radius


def tapered(u, v, top_width, bottom_width, top, bottom):
    """A shape symmetric in u whose half width goes from top_width to bottom_width."""
    slope = (bottom_width - top_width) / (bottom - top)
    side = abs(u) - (top_width + slope * (v - top))
    return np.maximum(side, np.maximum(top - v, v - bottom))


def star(u, v, points=5, outer=0.95, sharp=0.38):
    """A star as the union of kites: for every point, the two sides that meet in it."""
    spokes = 2 * np.pi * (np.arange(points) / points - 0.25)
    kites = []
    for c, s in zip(exact(np.cos(spokes)), exact(np.sin(spokes))):
        along = u * c + v * s
        across = abs(v * c - u * s)
        kites.append(np.maximum(sharp * (along - outer) + across * 0.92, -along - 0.1))
    return union(*kites)


def heart(u, v):
    u, v = abs(u), v + 0.12
    lobes = length(u - 0.4, v + 0.28) - 0.46
    return np.minimum(lobes, np.maximum((u + v) * 0.707 - 0.6, -v - 0.28 + 0.1 * u))


SHAPES = {
    "disc": lambda u, v: length(u, v) - 0.78,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) - 0.68,
    "triangle": lambda u, v: polygon(u, v - 0.15, 3, 0.5, 0.25),
    "star": star,
    "ring": lambda u, v: abs(length(u, v) - 0.6) - 0.24,
    "cross": lambda u, v: np.maximum(np.minimum(abs(u), abs(v)) - 0.26, np.maximum(abs(u), abs(v)) - 0.85),
    "heart": heart,
    "moon": lambda u, v: np.maximum(length(u, v) - 0.85, 0.68 - length(u - 0.42, v)),
    "hourglass": lambda u, v: np.maximum((abs(u) - abs(v)) * 0.8 - 0.08, abs(v) - 0.75),
    "arrow": lambda u, v: union(box(u, v, -0.8, 0.1, -0.24, 0.24),
                                np.maximum(abs(v) * 0.75 + u * 0.66 - 0.55, -0.05 - u)),
}
NEW_SHAPES = {                      # of the near tasks: none of them is in base, objects or wide
    "drop": lambda u, v: union(length(u, v - 0.25) - 0.55,
                               np.maximum(abs(u) * 0.889 - (v + 0.95) * 0.458, v)),
    "half disc": lambda u, v: np.maximum(length(u, v - 0.4) - 0.88, v - 0.4),
    "kite": lambda u, v: np.maximum(abs(u) * 0.764 - (v + 0.25) * 0.646 - 0.42,
                                    abs(u) * 0.909 + (v + 0.25) * 0.417 - 0.5),
    "tee": lambda u, v: union(box(u, v, -0.8, 0.8, -0.8, -0.3), box(u, v, -0.25, 0.25, -0.8, 0.85)),
    "bucket": lambda u, v: tapered(u, v, 0.82, 0.42, -0.65, 0.65),
    "arch": lambda u, v: np.maximum(union(length(u, v + 0.1) - 0.78, box(u, v, -0.78, 0.78, -0.1, 0.8)),
                                    -union(length(u, v + 0.1) - 0.36, box(u, v, -0.36, 0.36, -0.1, 1.0))),
    "stairs": lambda u, v: union(box(u, v, -0.8, 0.8, 0.27, 0.8),
                                 box(u, v, -0.8, 0.27, -0.27, 0.8),
                                 box(u, v, -0.8, -0.27, -0.8, 0.8)),
    "dumbbell": lambda u, v: union(length(abs(u) - 0.55, v) - 0.38, box(u, v, -0.55, 0.55, -0.17, 0.17)),
}
MORE_SHAPES = {                     # of wide alone: families of similar shapes, as ImageNet has kinds of dogs
    "pentagon": lambda u, v: polygon(u, v, 5, 0.64, 0.05),
    "hexagon": lambda u, v: polygon(u, v, 6, 0.66),
    "octagon": lambda u, v: polygon(u, v, 8, 0.7),
    "bar": lambda u, v: box(u, v, -0.85, 0.85, -0.4, 0.4),
    "pillar": lambda u, v: box(u, v, -0.4, 0.4, -0.85, 0.85),
    "diamond": lambda u, v: (abs(u) + abs(v)) * 0.707 - 0.6,
    "oval": lambda u, v: (length(u * 1.1, v * 1.9) - 0.95) * 0.6,
    "egg": lambda u, v: (length(u * 1.9, v * 1.1) - 0.95) * 0.6,
    "star of four": lambda u, v: star(u, v, 4, 0.95, 0.3),
    "star of six": lambda u, v: star(u, v, 6, 0.92, 0.5),
    "star of seven": lambda u, v: star(u, v, 7, 0.92, 0.55),
    "thin ring": lambda u, v: abs(length(u, v) - 0.66) - 0.13,
    "frame": lambda u, v: abs(np.maximum(abs(u), abs(v)) - 0.56) - 0.16,
    "open triangle": lambda u, v: abs(polygon(u, v - 0.15, 3, 0.38, 0.25)) - 0.13,
    "funnel": lambda u, v: polygon(u, -v - 0.15, 3, 0.5, 0.25),
    "wedge": lambda u, v: np.maximum((u - v) * 0.707, np.maximum(-u - 0.65, v - 0.65)),
    "thin cross": lambda u, v: np.maximum(np.minimum(abs(u), abs(v)) - 0.14,
                                          np.maximum(abs(u), abs(v)) - 0.85),
    "saltire": lambda u, v: SHAPES["cross"]((u + v) * 0.707, (u - v) * 0.707),
    "moon to the left": lambda u, v: SHAPES["moon"](-u, v),
    "moon upwards": lambda u, v: SHAPES["moon"](v, u),
    "arrow to the left": lambda u, v: SHAPES["arrow"](-u, v),
    "arrow upwards": lambda u, v: SHAPES["arrow"](-v, u),
    "arrow downwards": lambda u, v: SHAPES["arrow"](v, u),
    "bow tie": lambda u, v: SHAPES["hourglass"](v, u),
    "spade": lambda u, v: heart(u, -v),
    "ell": lambda u, v: union(box(u, v, -0.6, -0.1, -0.85, 0.85), box(u, v, -0.6, 0.65, 0.35, 0.85)),
    "cup": lambda u, v: union(box(abs(u), v, 0.3, 0.75, -0.75, 0.75), box(u, v, -0.6, 0.6, 0.3, 0.75)),
    "zed": lambda u, v: union(box(u, v, -0.8, 0.25, -0.7, -0.25),
                              box(u, v, -0.25, 0.25, -0.7, 0.7),
                              box(u, v, -0.25, 0.8, 0.25, 0.7)),
    "cee": lambda u, v: np.maximum(abs(length(u, v) - 0.58) - 0.24, -box(u, v, 0.0, 1.2, -0.28, 0.28)),
    "clover": lambda u, v: length(abs(u) - 0.4, abs(v) - 0.4) - 0.42,
}
ALL_SHAPES = [*SHAPES.values(), *NEW_SHAPES.values(), *MORE_SHAPES.values()]
SHAPE_NAMES = [*SHAPES, *NEW_SHAPES, *MORE_SHAPES]


# Strokes are written as points, column then row, each from 0 to 8 and joined by lines; "/" lifts the pen.

def strokes(*drawings):
    """Line segments (drawing, segment, (x0, y0, x1, y1)) with coordinates in [-1, 1], padded by repeats."""
    tables = []
    for drawing in drawings:
        segments = []
        for line in drawing.split("/"):
            points = [((int(p[0]) - 4) / 4, (int(p[1]) - 4) / 4) for p in line.split()]
            segments += [start + end for start, end in zip(points, points[1:])]
        tables.append(segments)
    longest = max(map(len, tables))
    return np.array([table + [table[-1]] * (longest - len(table)) for table in tables], f4)


def ink(u, v, segments):
    """Distance (n, S, S) to the nearest of each image's segments (n, m, 4)."""
    nearest = None
    for k in range(segments.shape[1]):
        x, y, x1, y1 = (per_image(segments[:, k, i]) for i in range(4))
        dx, dy = x1 - x, y1 - y
        px, py = u - x, v - y
        t = np.clip((px * dx + py * dy) / (dx * dx + dy * dy + 1e-6), 0, 1)
        px, py = px - t * dx, py - t * dy
        square_of_distance = px * px + py * py
        nearest = square_of_distance if nearest is None else np.minimum(nearest, square_of_distance)
    return np.sqrt(nearest)


# base, wide, kinds, variety, tail: filled shapes. A class is (shape, fill, palette).
FILLS = ("plain", "striped", "checked", "dotted")
PALETTES = ("warm", "cool")
BASE_CLASSES = [(s, t, p) for s in (0, 3, 4, 5) for t in range(4) for p in (0, 1)]
WIDE_CLASSES = [(s, t, p) for s in (*range(10), *range(18, 48)) for t in range(4) for p in (0, 1)]
KINDS_CLASSES = [(s, 0, p) for s in range(10, 15) for p in (0, 1)]
VARIETY_CLASSES = [(s, t, p) for s in range(10, 18) for t in (0, 2) for p in (0, 1)]
TAIL_CLASSES = [(s, t, p) for s in range(12, 18) for t in (1, 3) for p in (0, 1)]


def tail_pattern():
    """Training labels of tail: from 373 images of a class down to 21, every stretch a fair sample."""
    places = []
    for label in range(24):
        rank = 7 * label % 24                               # not shape by shape: 7 and 24 are coprime
        count = round(373 * 18 ** (-rank / 23))
        places += [((k + 0.5) / count, label) for k in range(count)]
    return [label for _, label in sorted(places)]


def draw_things(c, labels, classes, bright, strong):
    shape, fill, palette = (per_image(t) for t in np.array(classes)[labels].T)
    near, far = contrast(c, 0.4, bright)
    hue = either(palette == 0, c.uniform(-0.06, 0.16), c.uniform(0.44, 0.72))
    ground = c.uniform(0, 1)
    c.background(hsv(ground, c.uniform(0.1, 0.6), far), hsv(ground, 0.4, far * 0.85))
    pose = c.pose(0.08, 0.18, (0.8, 0.95))
    paint_thing(c, pose, shape[:, 0, 0], fill, hue, strong, near, far)
    return c.finish()


def paint_thing(c, p, shape, fill, hue, strong, near, far):
    """Paint a filled shape of brightness near on a ground of brightness far; returns its cover of pixels."""
    inside = cover(by_kind(ALL_SHAPES, shape, p.u, p.v), p.edge)
    c.paint(inside, hsv(hue, c.uniform(*strong), near))
    second = hsv(hue + c.uniform(-0.05, 0.05), 0.5, either(near > far, near * 0.35, near + 0.5))
    u, v = p.u + c.uniform(0, 0.08), p.v + c.uniform(0, 0.08)
    c.paint(inside * fill_pattern(u, v, fill, p.edge), second)
    return inside


def fill_pattern(u, v, fill, edge):
    """The mask of a fill's second colour; fill indexes FILLS."""
    across, down = wave(u * 2.2), wave(v * 2.2)
    patterns = [-9, down, across * down * 2]
    dotted = across + down - 0.6
    value = np.select([fill == 0, fill == 1, fill == 2], patterns, dotted).astype(f4)
    return cover(-value / 9, edge)


def things(classes, bright=0.7, strong=(0.45, 0.85)):
    """(how to draw, class names) of a task of filled shapes."""
    draw = functools.partial(draw_things, classes=classes, bright=bright, strong=strong)
    return draw, [f"{PALETTES[p]} {FILLS[t]} {SHAPE_NAMES[s]}" for s, t, p in classes]


# scenes: a class for every pixel
SCENE_SHAPES = 8                    # the first of SHAPES; the class after them is the background


def draw_scenes(c, labels):
    """3 to 5 things painted over one another; their classes per pixel are channel 3. `labels` are not used.

    A thing's edge is soft: where it covers a pixel neither nearly nor hardly at all, the class is IGNORED.
    """
    far, ground = c.uniform(0.35, 0.6), c.uniform(0, 1)
    count = 3 + per_image(c.pick(3))
    c.background(hsv(ground, c.uniform(0.1, 0.6), far), hsv(ground, 0.4, far * 0.85))
    mask = np.full((c.n, c.size, c.size), SCENE_SHAPES, np.uint8)
    for k in range(5):
        shape, fill, palette = c.pick(SCENE_SHAPES), per_image(c.pick(4)), c.coin()
        near = far + either(c.coin(), c.uniform(0.3, 0.4), c.uniform(-0.3, -0.25))
        hue = either(palette, c.uniform(-0.06, 0.16), c.uniform(0.44, 0.72))
        x = either(k < count, c.uniform(-0.75, 0.75), 9)    # 9: out of sight
        y = c.uniform(-0.75, 0.75)
        pose = c.frame(x, y, c.uniform(-0.18, 0.18), c.uniform(0.34, 0.42))
        inside = paint_thing(c, pose, shape, fill, hue, (0.45, 0.85), near, far)
        mask = np.where(inside > 0.1, IGNORED, mask)
        mask = np.where(inside >= 0.9, per_image(shape), mask)
    return np.concatenate([c.finish(), mask[:, None].astype(np.uint8)], 1)


# aircraft, seen from above. Wings: nose, tail, slope of the front, slope of the back, span.
WINGS = {"straight": (0.24, -0.12, 0.05, 0.0, 0.9), "swept": (0.34, -0.0, 0.75, 0.6, 0.85),
         "delta": (0.45, -0.6, 1.35, 0.0, 0.75), "forward": (-0.1, -0.45, -0.5, -0.45, 0.8)}
ENGINES = ("glider", "twin")
TAILS = ("small tail", "large tail", "canard")
AIRCRAFT = [f"{wing}-wing {engine}, {tail}" for wing in WINGS for engine in ENGINES for tail in TAILS]


def wing(u, v, nose, tail, front_slope, back_slope, span):
    front = u - (nose - front_slope * v)
    back = (tail - back_slope * v) - u
    return np.maximum(np.maximum(front, back) * 0.8, v - span)


def aircraft(p, labels):
    """Distance to an aircraft, its nose along u."""
    u, v = p.u, abs(p.v)
    sizes = np.array(list(WINGS.values()), f4)[labels // 6]
    nose, tail, front, back, span = (per_image(t) for t in sizes.T)
    twin = per_image((labels // 3) % 2)
    kind = per_image(labels % 3)
    taper = either(u > 0, u - 0.55, -0.6 - u)
    body = np.maximum(v - 0.11 + np.clip(taper, 0, 1) * 0.3, abs(u) - 0.95)
    main = wing(u, v, nose, tail, front, back, span)
    place = either(kind == 2, 0.6, -0.72)
    rear = wing(u - place, v, 0.13, -0.11, 0.35, 0.2, either(kind == 1, 0.5, 0.32))
    y = span * 0.5
    middle = (nose + tail) / 2 - (front + back) / 2 * y + 0.12
    engine = box(u, v, middle - 0.12, middle + 0.3, y - 0.1, y + 0.1)
    return union(body, main, rear, either(twin == 1, engine, 9))


def draw_aircraft(c, labels):
    near, far = contrast(c, 0.3)
    hue = c.uniform(0, 1)
    c.background(hsv(hue, c.uniform(0.2, 0.6), far), hsv(hue + c.uniform(-0.1, 0.1), 0.4, far * 0.85))
    angle, scale = c.uniform(-1.88, -1.26), c.uniform(0.87, 0.97)
    x, y = c.uniform(-0.05, 0.05), c.uniform(-0.05, 0.05)
    p = c.frame(x + c.uniform(-0.15, 0.15), y + 0.14, angle, scale)
    c.paint(cover(aircraft(p, labels), p.edge + 0.08) * c.uniform(0, 0.3), 0)          # its shadow
    p = c.frame(x, y, angle, scale)
    c.paint(cover(aircraft(p, labels), p.edge), hsv(c.uniform(0, 1), c.uniform(0, 0.4), near))
    c.paint(cover(length((p.u - 0.62) * 0.6, p.v) - 0.06, p.edge), hsv(0.58, 0.5, far * 0.6))
    return c.finish()


# objects: a pair of shapes
OBJECT_SHAPES = (0, 2, 3, 4, 5, 7)
OBJECTS = [f"{SHAPE_NAMES[a]} and {SHAPE_NAMES[b]}" for a in OBJECT_SHAPES for b in OBJECT_SHAPES]


def draw_objects(c, labels):
    """Class = (shape on the left, shape on the right)."""
    near, far = contrast(c, 0.45)
    ground = c.uniform(0, 1)
    c.background(hsv(ground, 0.35, far), hsv(ground, 0.4, far * 0.9))
    for side, kind in ((-0.47, labels // 6), (0.47, labels % 6)):
        x, y = c.uniform(-0.04, 0.04) + side, c.uniform(-0.08, 0.08)
        p = c.frame(x, y, c.uniform(-0.12, 0.12), c.uniform(0.5, 0.55))
        distance = by_kind(ALL_SHAPES, np.array(OBJECT_SHAPES)[kind], p.u, p.v)
        c.paint(cover(distance, p.edge), hsv(c.uniform(0, 1), c.uniform(0.2, 0.6), near))
    return c.finish()


# pedestrian: a walker or a post

def limbs(c, *segments):
    """Segments (n, m, 4) from ends (x0, y0, x1, y1) that are numbers or columns (n, 1, 1)."""
    rows = []
    for ends in segments:
        rows.append(np.stack([np.broadcast_to(np.ravel(end), c.n) for end in ends], 1))
    return np.stack(rows, 1).astype(f4)


def draw_pedestrian(c, labels):
    """Grey. Class 1 is a walker; class 0 a lamp post or bare tree of as many strokes and the same dot."""
    near, far = contrast(c, 0.35)
    c.background(grey(far), grey(far * 0.7), 4)
    wall = cover(abs(c.x - c.uniform(-1, 1)) - c.uniform(0.03, 0.15), c.pixel)
    c.paint(wall, grey(c.uniform(0.1, 0.9)))
    p = c.pose(0.12, 0.08, (0.78, 0.97))
    lean, spread = c.uniform(-0.06, 0.06), c.uniform(-0.1, 0.1)
    stride, swing = c.uniform(-0.35, 0.35), c.uniform(-0.3, 0.3)
    trunk = (lean, -0.45, 0, 0.15)
    legs = (0, 0.15, stride, 0.9), (0, 0.15, spread - stride, 0.9)
    arms = (lean, -0.4, lean + swing + 0.15, 0.1), (lean, -0.4, lean - swing - 0.15, 0.1)
    walker = limbs(c, trunk, *legs, *arms)
    fork, high = c.uniform(-0.5, 0.5), c.uniform(-0.5, 0.4)
    post = (0, -0.9, 0, 0.9), (0, 0.5, 0, 0.9)
    branches = (0, high, fork, high - 0.3), (0, high, -fork, high - 0.3), (0, high + 0.25, fork * 0.7, high)
    tree = limbs(c, *post, *branches)
    yes = per_image(labels == 1)
    body = ink(p.u, p.v, np.where(yes, walker, tree)) - either(yes, 0.11, 0.09)
    head_x = either(yes, lean, fork)
    head_y = either(yes, -0.73, c.uniform(-0.8, 0.2))
    head = length(p.u - head_x, p.v - head_y) - 0.17
    c.paint(cover(np.minimum(body, head), p.edge), grey(near))
    return c.finish(0.05)


# textures: heights in about [-1, 1] of coordinates with period 1 and a random field r for the irregular ones
TEXTURES = {
    "striped": lambda u, v, r: wave(u),
    "banded": lambda u, v, r: wave(u) + 0.9,
    "checked": lambda u, v, r: wave(u) * wave(v) * 2,
    "dotted": lambda u, v, r: wave(u) + wave(v) - 0.7,
    "gridded": lambda u, v, r: np.maximum(wave(u), wave(v)) - 0.55,
    "zigzagged": lambda u, v, r: wave(v + abs(u - np.floor(u) - 0.5)),
    "wavy": lambda u, v, r: wave(v + wave(u * 0.5) * 0.45),
    "bricked": lambda u, v, r: np.maximum(wave(v), wave(u * 0.5 + np.floor(v + 0.5) * 0.5)) - 0.6,
    "honeycombed": lambda u, v, r: -0.15 - wave(u) * wave(v * 0.5 + 0.25) - wave(v * 0.5) * wave(u + 0.25),
    "concentric": lambda u, v, r: wave(length(u, v)),
    "rayed": lambda u, v, r: wave(3 * u / (abs(u) + abs(v) + 0.05)) * either(v > 0, 1, -1),
    "blotched": lambda u, v, r: (r - 0.5) * 5,
    "marbled": lambda u, v, r: wave(v * 0.5 + r * 2.5),
    "veined": lambda u, v, r: 0.5 - abs(r - 0.5) * 9,
    "woven": lambda u, v, r: either(wave(u * 0.5) * wave(v * 0.5) > 0, wave(u * 2), wave(v * 2)),
    "crosshatched": lambda u, v, r: np.maximum(wave(u + v), wave(u - v)) - 0.4,
    "scaly": lambda u, v, r: wave(length(u - np.floor(u) - 0.5, v - np.floor(v)) * 1.2),
    "dashed": lambda u, v, r: np.minimum(wave(v), wave(u * 0.5 + np.floor(v + 0.5) * 0.37) + 0.2),
    "ringed": lambda u, v, r: 0.45 - abs(length(wave(u * 0.5), wave(v * 0.5)) - 0.55) * 4,
    "frayed": lambda u, v, r: wave(u + r * 1.2) + (r - 0.5) * 2,
}


def draw_textures(c, labels):
    near, far = contrast(c, 0.3)
    hue = c.uniform(0, 1)
    c.background(hsv(hue, c.uniform(0.1, 0.7), far), hsv(hue, 0.4, far * 0.9))
    p = c.pose(1.0, 0.35, (0.3, 0.42))
    height = by_kind(list(TEXTURES.values()), labels, p.u, p.v, c.noise(7))
    c.paint(cover(-height / 5, p.edge), hsv(hue + c.uniform(-0.3, 0.3), c.uniform(0.1, 0.8), near))
    return c.finish()


# signs: a symbol on a plate
PLATES = {
    "triangle": lambda u, v: polygon(u, v - 0.2, 3, 0.52, 0.25),
    "disc": lambda u, v: length(u, v) - 0.88,
    "diamond": lambda u, v: (abs(u) + abs(v)) * 0.707 - 0.7,
    "shield": lambda u, v: np.maximum(box(u, v, -0.76, 0.76, -0.8, 0.9), (abs(u) + v) * 0.707 - 0.72),
}
SYMBOLS = {"arrow": "48 40/04 40 84", "bar": "04 84", "bend": "18 14 74/50 84 58", "cross": "08 80/00 88",
           "post": "40 45/48 48", "chevron": "10 64 18", "fork": "48 44 00/44 80", "bumps": "07 23 47 63 87"}
SIGNS = [f"{plate} with {symbol}" for plate in PLATES for symbol in SYMBOLS]
SYMBOL_STROKES = strokes(*SYMBOLS.values())
SIGN_HUES = np.array([0.99, 0.6, 0.13, 0.38], f4)           # red, blue, yellow, green, whatever the class


def draw_signs(c, labels):
    ground = c.uniform(0, 1)
    c.background(hsv(ground, 0.4, c.uniform(0.15, 0.9)), hsv(ground + 0.3, 0.3, c.uniform(0.15, 0.9)))
    p = c.pose(0.06, 0.1, (0.85, 0.98))
    plate = by_kind(list(PLATES.values()), labels // 8, p.u, p.v)
    hue = per_image(SIGN_HUES[c.pick(4)]) + c.uniform(-0.03, 0.03)
    bright, strong, pale = c.uniform(0.6, 1), c.uniform(0.65, 0.95), c.uniform(0, 0.12)
    inverted = c.coin()[:, None]
    colour = hsv(hue, strong, bright * 0.85)
    white = hsv(0.12, pale, bright)
    black = grey(0.15 * bright)
    c.paint(cover(plate, p.edge), either(inverted, white, colour))                     # the rim
    c.paint(cover(plate + 0.13, p.edge), either(inverted, colour, white))
    u = p.u / 0.38
    v = (p.v - per_image(either(labels // 8 == 0, 0.2, 0))) / 0.38                     # lower on a triangle
    symbol = ink(u, v, SYMBOL_STROKES[labels % 8]) - c.uniform(0.2, 0.3)
    c.paint(cover(symbol, p.edge / 0.38), either(inverted, white, black))
    return c.finish()


# glyphs: characters of a script that nobody writes

def glyph_strokes(count=100, candidates=1500):
    """Stroke characters (count, 7, 4): of many random ones, each next is the most unlike those before."""
    rng = np.random.default_rng(7)
    found = []
    for _ in range(candidates):
        segments = []
        for lines in (3, 3, 1)[:rng.integers(2, 4)]:        # strokes that visit random points of a 3 x 3 grid
            place = rng.permutation(9)[:lines + 1]
            grid = np.stack([place % 3, place // 3], 1) * 0.8 - 0.8
            points = grid + rng.random((lines + 1, 2)) * 0.3 - 0.15
            segments += list(np.concatenate([points[:-1], points[1:]], 1))
        found.append(segments + [segments[-1]] * (7 - len(segments)))
    found = np.array(found, f4)
    c = Canvas(candidates, 10, rng)
    looks = np.minimum(ink(c.x / 0.9, c.y / 0.9, found), 0.6).reshape(candidates, -1)
    chosen = [0]
    distance = np.full(candidates, 9.0)
    while len(chosen) < count:
        distance = np.minimum(distance, abs(looks - looks[chosen[-1]]).max(axis=1))
        chosen.append(int(distance.argmax()))
    return found[chosen]


GLYPHS = glyph_strokes()


def draw_glyphs(c, labels):
    near, far = contrast(c, 0.5)
    tint = c.uniform(0, 1)
    c.background(hsv(tint, 0.1, far), hsv(tint, 0.1, far * 0.92))
    p = c.pose(0.06, 0.08, (0.8, 0.9))
    slant = c.uniform(-0.1, 0.1)
    segments = GLYPHS[labels] + c.uniform(-0.05, 0.05, 7, 4)
    distance = ink(p.u + slant * p.v, p.v, segments) - c.uniform(0.09, 0.13)
    c.paint(cover(distance, p.edge), hsv(tint + 0.5 * c.coin(), 0.1, near))
    return c.finish()


DIGITS = strokes("30 50 62 66 58 38 26 22 30", "31 40 48/38 58", "22 30 50 62 63 28 68",
                 "21 30 50 62 53 44 55 66 58 38 27", "58 50 25 65", "60 30 23 44 54 65 66 58 38 27",
                 "60 40 23 26 38 58 66 65 54 34 25", "20 60 38", "40 62 44 22 40/44 66 58 38 26 44",
                 "63 54 34 23 22 30 50 62 64 56 38")


def draw_digits(c, labels):
    """The digit in the middle, parts of other digits to its left and right."""
    near, far = contrast(c, 0.3)
    ground = c.uniform(0, 1)
    c.background(hsv(ground, 0.5, far), hsv(ground + 0.1, 0.4, far * 0.85))
    p = c.pose(0.08, 0.12, (0.68, 0.85))
    gap = c.uniform(1.3, 1.55)
    colour = hsv(c.uniform(0, 1), c.uniform(0, 0.7), near)
    thickness = c.uniform(0.12, 0.18)
    distance = ink(p.u, p.v, DIGITS[labels] + c.uniform(-0.05, 0.05, DIGITS.shape[1], 4))
    for side in (-gap, gap):
        other = ink(p.u + side, p.v, DIGITS[c.pick(10)])
        distance = either(c.coin(0.75), np.minimum(distance, other), distance)
    c.paint(cover(distance - thickness, p.edge), colour)
    return c.finish()


# motion: a moving body leaves a trace on grey, faint where it was early and strong where it is late
PATHS = {"across": "04 84", "down": "40 48", "rising": "17 71", "falling": "11 77", "hop": "07 24 42 64 87",
         "dip": "01 24 46 64 81", "circle": "40 71 84 77 48 17 04 11 30", "zigzag": "02 26 42 66 82",
         "stairs": "08 05 35 32 62 60", "hook": "11 17 77 74", "loop": "07 45 72 50 22 45 87",
         "spiral": "44 64 66 36 22 40 72 85"}
MOTIONS = [f"{name} {direction}" for name in PATHS for direction in ("forward", "backward")]


def path_points(count=16):
    """Points (path, count, 2) at equal steps along each path."""
    points = []
    for path in PATHS.values():
        segments = strokes(path)[0].astype(np.float64)
        corners = np.concatenate([segments[:1, :2], segments[:, 2:]])
        steps = np.sqrt(((segments[:, 2:] - segments[:, :2]) ** 2).sum(1))
        far = np.concatenate([[0], np.cumsum(steps)])
        at = np.linspace(0, far[-1], count)
        points.append(np.stack([np.interp(at, far, corners[:, i]) for i in range(2)], 1))
    return exact(points)


PATH_POINTS = path_points()


def draw_motion(c, labels):
    c.background(hsv(c.uniform(0, 1), 0.06, 0.55), grey(c.uniform(0.4, 0.5)), 4)
    p = c.pose(0.12, 0.15, (0.65, 0.85))
    points = PATH_POINTS[labels // 2] + c.uniform(-0.05, 0.05, 1, 2)
    radius, count = c.uniform(0.22, 0.32), points.shape[1]
    track = np.zeros((c.n, c.size, c.size), f4)
    for k in range(count):
        age = per_image(either(labels % 2 == 0, k, count - 1 - k)) / (count - 1)
        dx, dy = p.u - per_image(points[:, k, 0]), p.v - per_image(points[:, k, 1])
        near = np.maximum(1 - (dx * dx + dy * dy) / (radius * radius), 0)
        track = np.maximum(track, near * (0.12 + 0.88 * age))
    for _ in range(2):                                      # other bodies that move on the spot
        distance = length(c.x - c.uniform(-1, 1), c.y - c.uniform(-1, 1))
        track += np.maximum(1 - distance * 6, 0) * c.uniform(-0.8, 0.8)
    c.pixels += (track * c.uniform(0.35, 0.45) * either(c.coin(0.65), 1, -1))[:, None]
    return c.finish(0.04, 0.1)


# flowers: petals around a heart
PETALS = {3: 0.36, 4: 0.33, 5: 0.27, 8: 0.16}               # number of petals: their width
FORMS = ("round", "pointed", "notched")
HEARTS = ("small", "large")
FLOWERS = [f"{n} {form} petals, {h} heart" for n in PETALS for form in FORMS for h in HEARTS]


def petals(u, v, n, form):
    """Distance to a ring of n petals of one of the FORMS."""
    wide = PETALS[n]
    angles = 2 * np.pi * np.arange(n) / n
    ring_of_petals = []
    for c, s in zip(exact(np.cos(angles)), exact(np.sin(angles))):
        a, b = u * c + v * s, abs(v * c - u * s)
        if form == "round":
            petal = (length((a - 0.52) * (wide / 0.42), b) - wide) * 1.2
        elif form == "pointed":
            petal = (b - (wide * 1.05) * (1 - abs(a - 0.45) / 0.53)) * 0.8
        else:
            lobes = length(a - 0.62, b - (wide * 0.6)) - (wide * 0.62)
            petal = np.minimum(lobes, np.maximum(b - a * (wide * 1.2), a - 0.6))
        ring_of_petals.append(petal)
    return union(*ring_of_petals)


PETAL_SHAPES = [functools.partial(petals, n=n, form=form) for n in PETALS for form in FORMS]


def draw_flowers(c, labels):
    near, far = contrast(c, 0.35)
    ground = c.uniform(0.1, 0.6)
    c.background(hsv(ground, c.uniform(0.1, 0.5), far), hsv(ground + 0.05, 0.5, far * 0.75), 5)
    hue = c.uniform(0, 1)
    p = c.pose(0.08, 0.5, (0.88, 1.0))
    distance = by_kind(PETAL_SHAPES, labels // 2, p.u, p.v)
    c.paint(cover(distance, p.edge), hsv(hue, c.uniform(0.15, 0.6), near))
    inner = hsv(hue + c.uniform(-0.1, 0.1), c.uniform(0.2, 0.7), np.minimum(near * 1.2, 1))
    c.paint(cover(distance + 0.12, p.edge + 0.2) * 0.5, inner)
    radius = per_image(either(labels % 2 == 0, 0.14, 0.32)) * c.uniform(0.9, 1.1)
    heart_colour = hsv(c.uniform(0.08, 0.17), 0.8, either(near > far, near * 0.6, 0.9))
    c.paint(cover(length(p.u, p.v) - radius, p.edge), heart_colour)
    return c.finish()


def sleeves(u, v, reach, drop):
    """Two sleeves from the shoulders outwards, reach wide, drop long."""
    slope = abs(v + 0.72 - (abs(u) - 0.35) * drop) - 0.2
    return np.maximum(np.maximum(slope, abs(u) - reach), 0.2 - abs(u))


def opening(u, v, top, gap, slope):
    """Negative outside a slit from height top down: np.maximum(shape, opening) cuts it out."""
    return np.minimum(gap + slope * (v - top) - abs(u), v - top)


CLOTHES = {
    "t-shirt": lambda u, v: union(tapered(u, v, 0.42, 0.42, -0.85, 0.75), sleeves(u, v, 0.8, 0.45)),
    "trousers": lambda u, v: np.maximum(tapered(u, v, 0.36, 0.5, -0.9, 0.9),
                                        opening(u, v, -0.35, 0.04, 0.12)),
    "pullover": lambda u, v: union(tapered(u, v, 0.42, 0.42, -0.8, 0.7), sleeves(u, v, 0.88, 2.2)),
    "dress": lambda u, v: union(tapered(u, v, 0.3, 0.2, -0.9, -0.1), tapered(u, v, 0.2, 0.62, -0.1, 0.9)),
    "coat": lambda u, v: union(np.maximum(tapered(u, v, 0.4, 0.52, -0.9, 0.92),
                                          opening(u, v, -0.3, 0.05, 0.05)),
                               sleeves(u, v, 0.85, 2.2)),
    "sandal": lambda u, v: union(box(u, v, -0.9, 0.9, 0.42, 0.58),
                                 np.maximum(abs(u - 0.1) - 0.6,
                                            abs(abs(v - 0.1) - 0.6 * abs(u - 0.1)) - 0.09)),
    "shirt": lambda u, v: np.maximum(union(tapered(u, v, 0.42, 0.42, -0.85, 0.75), sleeves(u, v, 0.88, 1.6)),
                                     opening(u, -v, 0.35, 0.0, 0.4)),
    "sneaker": lambda u, v: union(box(u, v, -0.9, 0.9, 0.25, 0.55),
                                  np.maximum(box(u, v, -0.9, 0.5, -0.25, 0.4), u * 0.6 - v - 0.1)),
    "bag": lambda u, v: union(tapered(u, v, 0.7, 0.8, -0.15, 0.75),
                              np.maximum(abs(length(u * 0.9, v + 0.15) - 0.5) - 0.09, v)),
    "boot": lambda u, v: union(box(u, v, -0.6, 0.05, -0.9, 0.8),
                               np.maximum(box(u, v, -0.6, 0.75, 0.3, 0.8), u * 0.5 - v + 0.2)),
}


def draw_clothing(c, labels):
    near, far = contrast(c, 0.3)
    c.background(hsv(0.6, 0.08, far), hsv(0.1, 0.1, far * 0.8))
    p = c.pose(0.1, 0.2, (0.72, 0.95))
    u = either(c.coin(), p.u, -p.u) * c.uniform(0.9, 1.15)
    inside = cover(by_kind(list(CLOTHES.values()), labels, u, p.v), p.edge)
    hue = c.uniform(0, 1)
    c.paint(inside, hsv(hue, c.uniform(0, 0.5), near))
    weave = fill_pattern(p.u + c.uniform(0, 1), p.v, per_image(c.pick(4)), p.edge)
    c.paint(inside * weave * c.uniform(0, 0.5), hsv(hue, 0.3, far))
    return c.finish()


EXPRESSIONS = {     # mouth: curve (smile > 0), opening, width; brow: height, tilt (frown > 0); eyes: opening
    "neutral": (0.0, 0.02, 0.3, 0.0, 0.0, 0.1),
    "happy": (0.7, 0.08, 0.38, 0.03, 0.0, 0.08),
    "sad": (-0.6, 0.02, 0.28, 0.0, -0.45, 0.08),
    "angry": (-0.35, 0.06, 0.3, -0.1, 0.55, 0.09),
    "surprised": (0.0, 0.22, 0.16, 0.12, 0.0, 0.17),
    "afraid": (-0.2, 0.12, 0.36, 0.1, -0.4, 0.15),
    "disgusted": (-0.6, 0.1, 0.2, -0.08, 0.3, 0.04),
}


def draw_faces(c, labels):
    near, far = contrast(c, 0.25)
    c.background(grey(far), grey(far * 0.7))
    p = c.pose(0.07, 0.15, (0.85, 1.02))
    u, v, across = p.u, p.v, abs(p.u)
    means = np.array(list(EXPRESSIONS.values()), f4)[labels].T
    features = [per_image(mean) * c.uniform(0.8, 1.25) + c.uniform(-0.01, 0.01) for mean in means]
    curve, gape, width, height, tilt, eye = features
    dark = grey(either(near > c.uniform(0.4, 0.6), near * 0.25, near + 0.5))           # ink or chalk
    hair = length(u, v + 0.08) - 0.85
    c.paint(cover(hair, p.edge), grey(c.uniform(0.05, 0.9)))
    skin = length(u * 1.15, v - 0.1) - 0.8
    c.paint(cover(skin, p.edge), grey(near))
    white = cover(length((across - 0.32) * 0.7, v + 0.08) - np.maximum(eye, 0.03), p.edge)
    c.paint(white, grey(either(near > 0.5, near * 1.3, near * 0.6)))
    pupil = length(across - 0.32, v + 0.08) - 0.09
    c.paint(white * cover(pupil, p.edge), dark)
    brow = np.maximum(abs(v + 0.36 + height - tilt * (0.32 - across)) - 0.055, abs(across - 0.33) - 0.2)
    c.paint(cover(brow, p.edge), dark)
    nose = np.maximum(across - 0.05 - (v - 0.1) * 0.2, abs(v - 0.12) - 0.12)
    c.paint(cover(nose, p.edge) * 0.4, dark)
    bend = v - 0.48 - curve * (width * width * 0.5 - u * u) * 2
    lips = (gape + 0.05) * np.maximum(1 - u * u / (width * width) * 0.6, 0)
    c.paint(cover(np.maximum(abs(bend) - lips, across - width), p.edge), dark)
    return c.finish()


LESIONS = ("nevus", "melanoma", "keratosis", "carcinoma", "scaly patch", "vascular", "fibroma")
LESION_PATTERN = (0, 1, 2, 3, 0, 4, 5, 0, 6, 2, 0, 1, 0, 3, 0, 2, 1, 0, 4, 0)      # mostly nevi, as HAM10000
ROUGHNESS = np.array([0.05, 0.75, 0.25, 0.1, 0.5, 0.1, 0.1], f4)


def draw_lesions(c, labels):
    """Class = build (even, patchy, speckled, ringed ...), never colour alone: skin, light and tint vary."""
    tone = c.uniform(0.4, 0.95)
    c.background(hsv(c.uniform(0.03, 0.08), c.uniform(0.25, 0.5), tone), hsv(0.04, 0.4, tone * 0.9))
    kind = per_image(labels)
    p = c.pose(0.08, 3.1, (0.8, 1.0))
    ragged, fine = c.noise(5) - 0.5, c.noise(8) - 0.5
    d = length(p.u * c.uniform(1, 1.35), p.v) - c.uniform(0.55, 0.72) + ROUGHNESS[kind] * ragged
    tint = hsv(c.uniform(-0.02, 0.08), c.uniform(0.4, 0.75), tone * c.uniform(0.35, 0.65))
    inside = cover(d, p.edge + either(kind == 4, 0.35, 0.06))
    c.paint(inside * either(kind == 3, 0.35, 0.9), tint)
    soft = p.edge + 0.06
    details = {
        1: cover(0.02 - ragged * 0.8 - fine, p.edge),
        2: cover(0.13 - abs(fine), soft),
        3: cover(abs(d + 0.1) - 0.07, p.edge),
        4: cover(0.12 - fine, soft),
        5: cover(abs(wave(p.u * 2 + fine)) - 0.35, soft),
        6: cover(d + 0.3, soft),
    }
    detail = np.select([kind == k for k in details], list(details.values()), 0)
    dark = tint * 0.45
    pale = hsv(0.05, 0.15, np.minimum(tone * 1.1, 1))
    light = ((kind == 4) | (kind == 2) | (kind == 6)) ^ c.coin(0.35)
    c.paint(inside * detail, either(light[:, None], pale, dark))
    for _ in range(2):                                      # hairs across the picture
        bend = c.x * c.uniform(-1, 1) + c.uniform(-0.8, 0.8) + c.x * c.x * c.uniform(-0.4, 0.4)
        hair = cover(abs(c.y - bend) - 0.02, c.pixel)
        c.paint(hair * either(c.coin(0.35), 0.6, 0), dark)
    return c.finish()


# The list of drawn tasks

class Drawing(NamedTuple):
    """A drawn task."""
    stands_for: str
    draw: callable                  # (Canvas, labels (n,)) -> uint8 (n, 3, S, S), with masks (n, 4, S, S)
    class_names: list
    sizes: tuple                    # number of train, val and test images
    train_labels: tuple = None      # repeated over the training images; default: all classes in turn
    masks: bool = False


SPECS = {
    "base": Drawing("ImageNet", *things(BASE_CLASSES), (24000, 1000, 2000)),
    "aircraft": Drawing("FGVC-Aircraft", draw_aircraft, AIRCRAFT, (5000, 500, 1000)),
    "objects": Drawing("CIFAR-100", draw_objects, OBJECTS, (8000, 500, 1000)),
    "pedestrian": Drawing("Daimler pedestrians", draw_pedestrian, ["street", "pedestrian"],
                          (4000, 500, 1000)),
    "textures": Drawing("Describable Textures", draw_textures, list(TEXTURES), (4000, 500, 1000)),
    "signs": Drawing("German Traffic Signs", draw_signs, SIGNS, (6000, 500, 1000)),
    "glyphs": Drawing("Omniglot", draw_glyphs, [f"glyph {k}" for k in range(100)], (8000, 500, 1000)),
    "digits": Drawing("SVHN", draw_digits, [str(k) for k in range(10)], (6000, 500, 1000)),
    "motion": Drawing("dynamic images of UCF101", draw_motion, MOTIONS, (4000, 500, 1000)),
    "flowers": Drawing("Flowers102", draw_flowers, FLOWERS, (4000, 500, 1000)),
    "clothing": Drawing("Fashion-MNIST (unseen)", draw_clothing, list(CLOTHES), (4000, 500, 1000)),
    "faces": Drawing("FER2013 (unseen)", draw_faces, list(EXPRESSIONS), (4000, 500, 1000)),
    "lesions": Drawing("HAM10000 (unseen; train skewed)", draw_lesions, list(LESIONS), (6000, 500, 1000),
                       LESION_PATTERN),
    "wide": Drawing("a broad base, streamed in subsets", *things(WIDE_CLASSES), (80000, 4000, 8000)),
    # Pale: plain things in strong colours give themselves away to a linear model (97 %), dark or bright.
    "kinds": Drawing("CIFAR-10 (near: new shapes)", *things(KINDS_CLASSES, 0.5, (0.15, 0.4)),
                     (2000, 500, 1000)),
    "variety": Drawing("CIFAR-100 (near)", *things(VARIETY_CLASSES), (4000, 500, 1000)),
    "tail": Drawing("iNaturalist (near; train skewed)", *things(TAIL_CLASSES), (3000, 500, 1000),
                    tail_pattern()),
    "scenes": Drawing("ADE20K (a class for every pixel)", draw_scenes,
                      [*SHAPE_NAMES[:SCENE_SHAPES], "background"], (800, 100, 200), masks=True),
}                                   # only ever add at the end: a task's place is part of its random stream
BASE, WIDE, SCENES = "base", "wide", "scenes"
DRAWN = tuple(SPECS)
DECATHLON = DRAWN[1:10]             # base and these stand in for the Visual Decathlon (Rebuffi et al., 2017)
UNSEEN = DRAWN[10:13]
NEAR = DRAWN[14:17]


# Drawing tasks once

def load_drawn(names, data_dir, image_size, seed, workers):
    """{name: Task} of drawn tasks."""
    images = draw_missing(names, data_dir, image_size, seed, workers)
    tasks = {}
    for name in names:
        splits = {split: images[name, split][:, :3] for split in SPLITS}
        labels = {split: drawn_labels(name, split) for split in SPLITS}
        if SPECS[name].masks:
            labels = {split: images[name, split][:, 3].copy() for split in SPLITS}
        fingerprint = digest("drawn", name, DRAWN_VERSION, seed, image_size, *SPECS[name].sizes)
        tasks[name] = make_task(name, SPECS[name].class_names, splits, labels, fingerprint)
    return tasks


def draw_missing(names, data_dir, image_size, seed, workers):
    """{(name, split): images} from the cache; what is missing is drawn, chunks of all tasks in one pool."""
    images, chunks = {}, []
    for name, split in itertools.product(names, SPLITS):
        images[name, split] = read_cache(name, split, data_dir, image_size, seed)
        if images[name, split] is None:
            count = math.ceil(len(drawn_labels(name, split)) / CHUNK)
            chunks += [(name, split, k) for k in range(count)]
    parts = collections.defaultdict(list)
    with ThreadPoolExecutor(workers) as pool:               # threads will do: numpy lets go of Python's lock
        drawn = pool.map(lambda chunk: draw_chunk(*chunk, image_size, seed), chunks)
        progress = tqdm(zip(chunks, drawn), "drawing", len(chunks), leave=False, disable=None)
        for (name, split, _), part in progress:
            parts[name, split].append(part)
    for key, some in parts.items():
        images[key] = np.concatenate(some)
        try:
            write_cache(cache_path(*key, data_dir, image_size, seed), images[key])
        except (InputError, OSError) as error:              # a full or read-only disk
            print(f"{key[0]}: drawn anew every time, as {error}")
    return images


def draw_chunk(name, split, chunk, image_size, seed):
    """Images CHUNK * chunk and following of a split, uint8 (n, 3, S, S), masks as a fourth channel.

    They depend on nothing but the arguments.
    """
    labels = drawn_labels(name, split)[chunk * CHUNK:(chunk + 1) * CHUNK]
    rng = np.random.default_rng([seed, DRAWN.index(name), SPLITS.index(split), chunk])
    return SPECS[name].draw(Canvas(len(labels), image_size, rng), labels)


def drawn_labels(name, split):
    """Labels (N,) of a split: all classes in turn, or the task's own pattern in its training images.

    Of a task with masks only their number counts.
    """
    spec = SPECS[name]
    own = spec.train_labels if split == "train" else None
    return np.resize(np.array(own or range(len(spec.class_names)), np.int64), spec.sizes[SPLITS.index(split)])


def cache_path(name, split, data_dir, image_size, seed):
    return os.path.join(data_dir, "drawn", f"{name}-{split}-{image_size}px-seed{seed}-v{DRAWN_VERSION}.npz")


def read_cache(name, split, data_dir, image_size, seed):
    """What was drawn before, or None where there is nothing or the zip's checksum does not fit."""
    try:
        with np.load(cache_path(name, split, data_dir, image_size, seed)) as file:
            images = file["images"]
    except Exception:                                       # a damaged file may make numpy raise anything
        return None
    expected = (len(drawn_labels(name, split)), 3 + SPECS[name].masks, image_size, image_size)
    return images if images.shape == expected and images.dtype == np.uint8 else None


def write_cache(path, images):
    def write(temporary):
        with open(temporary, "wb") as file:                 # by its name alone numpy would add an ending
            np.savez(file, images=images)
    write_atomically(path, write)


# ----------------------------------------------------------------------------------------------------------
# Appendix B. Drawn texts: a grammar of short sentences, in which a token can be a byte
# ----------------------------------------------------------------------------------------------------------
# Each writer gives one example, (text, second text or None, label); its docstring says what makes the class.
# As with images, the order in which it draws its random numbers is part of what it writes.

PEOPLE = ("tom", "ann", "bob", "eve", "jim", "meg", "sam", "zoe", "ben", "amy", "dan", "ida")
BEASTS = ("cat", "dog", "pig", "hen", "fox", "cow", "owl", "ant", "bee", "ram", "ape", "rat", "elk", "cub",
          "pup", "bat", "hog", "jay")
SYNONYMS = (("saw", "met"), ("hit", "beat"), ("fed", "kept"))
TIMES = ("", " now", " today", " soon", " later", " here", " often", " once")
LOOKS = ("", "", "old ", "big ", "red ", "sad ")
ARTICLES = (("a", "the"), ("", "the"))                      # of one, of several
ACTIONS = ("see", "like", "fear", "bite", "hear", "chase")
DEEDS = ("ran", "sat", "hid", "ate", "fell", "won", "left", "came", "woke", "sang", "slid", "swam")
AMOUNTS = ("all", "most", "many", "some", "few", "no")
THINGS = ("film", "plot", "cast", "song", "end", "pace", "hero", "joke")
PRAISE = ("fun", "fine", "great", "sharp", "warm", "superb")
BLAME = ("dull", "bad", "weak", "flat", "cold", "awful")


def write_paraphrases(rng):
    """Two sentences that say the same, mostly in other words; else the verbs differ, or who did it."""
    a, b = rng.sample(PEOPLE, 2)
    verb = rng.randrange(3)
    same = rng.random() < 0.68                              # MRPC's share
    first, second, when = rng.choice(SYNONYMS[verb]), rng.choice(SYNONYMS[verb]), rng.choice(TIMES)
    c, d = a, b
    if not same and rng.random() < 0.2:
        c, d = b, a
    elif not same:
        second = rng.choice(SYNONYMS[(verb + rng.randrange(1, 3)) % 3])
    return f"{a} {first} {b}", f"{c} {second} {d}{when}", int(same)


def write_acceptability(rng):
    """Verb and subject, article and noun agree and all words are in place; or one of these is wrong."""
    wrong = None
    if rng.random() >= 0.7:                                 # CoLA's share
        wrong = rng.choice(("verb", "article", "order"))
    many_subjects = rng.random() < 0.5 or wrong == "article"
    many_objects = rng.random() < 0.5 or wrong == "article"
    subject = [rng.choice(ARTICLES[many_subjects]), rng.choice(LOOKS).strip(),
               rng.choice(BEASTS) + "s" * many_subjects]
    target = [rng.choice(ARTICLES[many_objects]), rng.choice(BEASTS) + "s" * many_objects]
    if wrong == "article":
        rng.choice((subject, target))[0] = "a"
    verb = rng.choice(ACTIONS)
    if many_subjects == (wrong == "verb"):
        verb += "s"
    words = [word for word in (*subject, verb, *target) if word]
    if wrong == "order":
        k = rng.randrange(len(words) - 1)
        words[k], words[k + 1] = words[k + 1], words[k]
    return " ".join(words), None, int(wrong is None)


def write_entailment(rng):
    """Whether the second sentence follows from the first, which is about more of the same beasts, or none."""
    true = rng.random() < 0.5
    pairs = [(p, h) for p in AMOUNTS for h in AMOUNTS if follows(p, h) == true]
    premise, hypothesis = rng.choice(pairs)
    beasts, look = rng.choice(BEASTS) + "s", rng.choice(LOOKS)
    deed = done = rng.choice(DEEDS)
    if not true and rng.random() < 0.15:
        hypothesis = premise
        done = rng.choice([other for other in DEEDS if other != deed])
    return f"{premise} {look}{beasts} {deed}", f"{hypothesis} {beasts} {done}", int(not true)


def follows(premise, hypothesis):
    """Whether what holds of one of AMOUNTS holds of the other: of most, so of many; of no, so of few."""
    if premise == hypothesis or (premise, hypothesis) == ("no", "few"):
        return True
    if "few" in (premise, hypothesis) or "no" in (premise, hypothesis):
        return False
    return AMOUNTS.index(premise) < AMOUNTS.index(hypothesis)


def write_sentiment(rng):
    """One or two judgements; "not" turns one round, and after "but" the second counts."""
    good = rng.random() < 0.5
    form = rng.randrange(3)
    one = judgement(rng, good)
    both = f"{judgement(rng, good)} and {judgement(rng, good)}"
    turned = f"{judgement(rng, not good)} but {judgement(rng, good)}"
    return (one, both, turned)[form], None, int(good)


def judgement(rng, good):
    turned = rng.random() < 0.3
    thing = rng.choice(THINGS)
    word = rng.choice(PRAISE if good != turned else BLAME)
    return f"{thing} {rng.choice(('is', 'was'))} {'not ' if turned else ''}{word}"


@dataclass
class Grammar:
    """A drawn text task."""
    class_names: tuple
    metric: str
    write: callable                 # random.Random -> (text, second text or None, label)
    train: int                      # number of training texts


GRAMMAR = {                         # small counterparts of MRPC, CoLA, RTE and IMDB
    "paraphrases": Grammar(("no paraphrase", "paraphrase"), "accuracy/F1", write_paraphrases, 6000),
    "acceptability": Grammar(("unacceptable", "acceptable"), "Matthews", write_acceptability, 8000),
    "entailment": Grammar(("entailment", "no entailment"), "accuracy", write_entailment, 4000),
    "sentiment": Grammar(("negative", "positive"), "accuracy", write_sentiment, 8000),
}


@functools.cache
def written(name):
    """{split: [(text, second text or None, label)]} of a drawn text task, no text twice."""
    task = GRAMMAR[name]
    rng = random.Random(name)
    examples = {}
    while len(examples) < 3000 + task.train:
        text, second, label = task.write(rng)
        examples[text, second] = text, second, label
    examples = list(examples.values())
    rng.shuffle(examples)               # as texts get scarce, so do classes that have few: splits share that
    return {"test": examples[:2000], "val": examples[2000:3000], "train": examples[3000:]}


if __name__ == "__main__":
    script(main)
