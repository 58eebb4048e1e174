"""Tasks of images and of text, and their batches.

A method asks for tasks by name (`load`, `load_many`, `load_texts`, or `load_tasks` for a script) and for batches:

    task = data.load("signs")                        # a drawn task, a real dataset or a folder of images
    x, y = task.batch("train", step, batch_size=64)  # a pure function of its arguments: uint8 (B, 3, S, S), int64 (B,)
    logits = net(task.normalise(x))                  # images are bytes until they enter a network

Contents
    1. A task in memory and its batches     Task
    2. Augmentation                         the papers' recipes, MixUp and CutMix
    3. Loading by name                      load_tasks, load_many, load, and parts of a task such as signs:0-15
    4. Folders of images                    one sub-folder per class
    5. Images decoded as they are needed    FileTask, for what does not fit memory
    6. Real datasets                        Visual Decathlon, ImageNet, CIFAR, ... from their own files
    7. Text                                 GPT-2's tokens, TextTask, GLUE and IMDB
    8. Command line                         contact sheet, difficulty, what is there of a real dataset
    Appendix A. Drawn images                18 tasks that stand in for real ones; nothing to download
    Appendix B. Drawn texts                 four tasks of short sentences

    python data.py                                  draw all tasks, write results/contact_sheet.png
    python data.py --difficulty                     how hard each is: chance, a linear model on pixels, a small ViT
    python data.py --check NAME --data-dir DIR      what was found of a real dataset (see REAL, TEXTS), what is missing
"""
import collections
import contextlib
import copy
import csv
import dataclasses
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
import time
import unicodedata
import zipfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import (IMAGENET, InputError, Parser, ViT, ViTConfig, accuracy, fit, positive, rank_zero_first, script,
                    whole, write_atomically)

SPLITS = ("train", "val", "test")
RECIPES = ("none", "shift", "decathlon", "deit")
IGNORED = 255                       # the class of pixels that no loss and no score should count
MEMORY = 12                         # GiB that the images of a run may take; what does not fit stays in its files


def fail(sentence):
    raise InputError(sentence)


# ----------------------------------------------------------------------------------------------------------
# 1. A task in memory and its batches
# ----------------------------------------------------------------------------------------------------------

@dataclass
class Task:
    """A classification task held in memory as bytes: images {split: uint8 (N, 3, S, S)}, labels {split: int64 (N,)}.

    A segmentation task has masks for labels, {split: uint8 (N, S, S)}: a class or IGNORED for every pixel.
    mean and std are those of the training images, a number per channel, where white is 1.
    """
    name: str
    class_names: list
    mean: tuple
    std: tuple
    images: dict
    labels: dict

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
        """Batch number `step` of an endless stream: x uint8 (B, 3, S, S), y int64 (B,), or (B, S, S) of masks.

        A pure function of its arguments: the stream is one permutation of the split after another, so there is no
        loader to save, and any step can be looked at again. Rank r of `world` gets rows r, r + world, ... of the
        batch; chance is drawn for the whole batch, so what an image looks like does not depend on `world`.

        recipe: "none"; "shift" moves each image by up to 1/16 of its size, edges repeated; "decathlon" and "deit"
        are the papers' (see `augmentation`). Images with masks are cut to crop x crop pixels at a random place
        (whole by default), and every recipe but "none" mirrors half of them left to right.
        """
        check_recipe(recipe)
        rows = rows_of(len(self.labels[split]), step, batch_size, seed, rank, world)
        rows = to_device(rows, self.labels[split].device)
        chance = generator(seed, step, 1)
        if self.segmentation:
            return self.crops(split, rows, batch_size, chance, recipe, slice(rank, None, world), crop)
        if crop:
            raise InputError(f"{self.name}: crop={crop} is for tasks with a class for every pixel")
        if recipe != "shift":
            images = self.fetch(split, rows, step, batch_size, seed, recipe, rank, world)
            return images, self.labels[split][rows]
        images = self.fetch(split, rows, step, batch_size, seed, "none", rank, world)
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

        One image after the other in this process: for a long training, memory=0 leaves recipes to FileTask's workers.
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
        """The first `limit` images of a split in their fixed order (all by default): x uint8 (N, 3, S, S), y."""
        return self.images[split][:limit], self.labels[split][:limit].long()

    def only(self, rows):
        """The task with these training images, and no other split."""
        images = {"train": self.images["train"][rows]}
        labels = {"train": self.labels["train"][rows]}
        return replace(self, images=images, labels=labels)

    def to(self, device):
        """The same task with its tensors on a device."""
        images = {split: x.to(device) for split, x in self.images.items()}
        labels = {split: y.to(device) for split, y in self.labels.items()}
        return replace(self, images=images, labels=labels)


def make_task(name, class_names, images, labels):
    """A Task from {split: uint8 array} and {split: labels}, with mean and std of the training images."""
    images = {split: torch.as_tensor(x).contiguous() for split, x in images.items()}
    labels = {split: torch.as_tensor(y) for split, y in labels.items()}
    mean, std = mean_and_std(images["train"])
    return Task(name, list(class_names), mean, std, images, labels)


def mean_and_std(images):
    """Mean and standard deviation per channel of uint8 (N, 3, S, S), from exact counts of the 256 levels."""
    counts = [torch.bincount(images[:, c].flatten(), minlength=256) for c in range(3)]
    counts = torch.stack(counts).double()
    share = counts / counts.sum(1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = (share * levels).sum(1)
    variance = (share * levels ** 2).sum(1) - mean ** 2
    std = variance.clamp(min=1e-6).sqrt()
    return rounded(mean), rounded(std)


def rounded(values):
    return tuple(round(float(v), 4) for v in values)


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
    """The rows of batch `step` that are this rank's: of one permutation of n after another, every world-th."""
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
    """Within, torch's own random stream, which torchvision draws from, is fixed by the numbers; then it goes on."""
    state = torch.get_rng_state()
    torch.set_rng_state(generator(*numbers).get_state())    # of the CPU alone: manual_seed would reach GPUs as well
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
UPRIGHT = ("signs", "glyphs", "digits", "decathlon/gtsrb", "decathlon/omniglot", "decathlon/svhn")   # a mirrored 2 is no 2


def check_recipe(recipe):
    if recipe not in RECIPES:
        raise InputError(f"recipe is one of {', '.join(RECIPES)}, not {recipe!r}")


@functools.lru_cache
def augmentation(recipe, size, name):
    """A paper's augmentation of the images of a task, uint8 (3, H, W) -> uint8 (3, size, size), drawn per image.

    "decathlon", as in TAL's public code: a random crop of the image resized to its shorter side, mirroring, colours,
    noise; digits, letters and signs get noise only. "deit": random resized crop, mirroring, RandAugment of magnitude
    9 of 10, random erasing. Missing beside DeiT's own: the jitter of the magnitude (mstd 0.5) and repeated
    augmentation; MixUp and CutMix take whole batches, see `mixed`.
    """
    from torchvision.transforms import InterpolationMode as Mode, v2
    part = PART.fullmatch(name)
    upright = (part[1] if part else name) in UPRIGHT
    mirror = [] if upright else [v2.RandomHorizontalFlip()]
    if recipe == "deit":
        fill = [round(255 * m) for m in IMAGENET[0]]
        crop = v2.RandomResizedCrop(size, interpolation=Mode.BICUBIC, antialias=True)
        operations = v2.RandAugment(2, 9, num_magnitude_bins=11, interpolation=Mode.BILINEAR, fill=fill)
        return v2.Compose([crop, *mirror, operations, v2.Lambda(erase)])
    planes = v2.Lambda(torch.Tensor.contiguous)             # noise for images stored pixel by pixel takes 8 times as long
    if upright:
        steps = [v2.CenterCrop(size)]
        noise = v2.GaussianNoise(sigma=0.05)
    else:
        steps = [v2.RandomCrop(size), *mirror, v2.ColorJitter(0.4, 0.4, 0.4, 0.1)]
        noise = v2.GaussianNoise(sigma=0.08)
    return v2.Compose([v2.Resize(size, antialias=True), planes, *steps, planes, noise])


def erase(image, chance=0.25):
    """Random erasing of a uint8 image by noise that has mean 0 and deviation 1 once it is normalised as ImageNet is."""
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
    """{name: Task on the machine's device} as a script's flags ask for; of several processes the first one goes first.

    segmentation: whether tasks with a class for every pixel are welcome.
    """
    names = list(names)
    with rank_zero_first(machine):                          # it draws and keeps what the others then read
        if getattr(args, "modality", "image") == "text":
            tasks = load_texts(names, args.data_dir, args.context, args.tokens)
        else:
            tasks = load_images(names, args)
    for name, task in tasks.items():
        if task.segmentation and not segmentation:
            raise InputError(f"{name} has a class for every pixel, but these networks give one to an image; choose another task")
    return {name: tasks[name].to(machine.device) for name in names}


def load_images(names, args):
    """The tasks of load_tasks; those with masks may have a size of their own."""
    memory = MEMORY if args.recipe in ("none", "shift") else 0      # recipes are work for processes of their own
    scenes = [name for name in names if name in (SCENES, "ade20k")]
    others = [name for name in names if name not in scenes]
    tasks = load_many(others, args.data_dir, args.image_size, workers=args.workers, memory=memory)
    if scenes:
        size = getattr(args, "scene_size", args.image_size)
        tasks |= load_many(scenes, args.data_dir, size, workers=args.workers, memory=memory)
    return tasks

def subset(task, classes, name):
    """A Task of these classes alone, labelled 0, 1, ... in the order given; its images keep their order.

    mean and std stay those of the whole task: the stem of a model that sees several subsets sees one normalisation.
    """
    if task.segmentation:
        fail(f"{name}: {task.name} has a class for every pixel, so it has no subset of images by class")
    label = torch.full((task.num_classes,), -1, device=task.labels["train"].device)
    label[list(classes)] = torch.arange(len(classes), device=label.device)
    labels = {split: label[old] for split, old in task.labels.items()}
    images = {split: task.images[split][new >= 0] for split, new in labels.items()}
    labels = {split: new[new >= 0] for split, new in labels.items()}
    return Task(name, [task.class_names[k] for k in classes], task.mean, task.std, images, labels)


def class_subsets(num_classes, parts, seed=0):
    """All classes dealt out at random to `parts` disjoint lists, whose lengths differ by at most one."""
    if not 1 <= parts <= num_classes // 2:
        fail(f"{num_classes} classes make 1 to {num_classes // 2} subsets of two classes or more, not {parts}")
    return [sorted(part.tolist()) for part in np.array_split(np.random.default_rng(seed).permutation(num_classes), parts)]


def classes_of(name, num_classes, first, last, parts, number):
    """The classes first to last, or number `number` of `parts` class subsets (`first` is then None)."""
    if first is not None:
        if not first < last < num_classes:
            fail(f"{name}: A-B needs A below B, and there are the classes 0 to {num_classes - 1}")
        return range(first, last + 1)
    subsets = class_subsets(num_classes, parts)
    if not 1 <= number <= parts:
        fail(f"{name}: the {parts} subsets are numbered from 1 to {parts}")
    return subsets[number - 1]


def load_many(names, data_dir="data", image_size=32, seed=0, workers=2, memory=MEMORY):
    """{name: Task} of drawn tasks, real datasets, image folders and parts of these; see `load`. Missing drawings are made in
    one pool, and of a real dataset only the files of the classes asked for are read."""
    asked = {name: None if name in SPECS or name in REAL or os.path.isdir(name) else PART.fullmatch(name) for name in names}
    asked = {name: (part[1], [digits and int(digits) for digits in part.groups()[1:]]) if part else (name, None)
             for name, part in asked.items()}
    found = draw_missing(dict.fromkeys(origin for origin, _ in asked.values() if origin in SPECS), data_dir, image_size, seed, workers)
    wholes, tasks = {}, {}
    for name, (origin, part) in asked.items():
        if origin in SPECS and origin not in wholes:
            drawn = {split: found[origin, split] for split in SPLITS}
            labels = {s: d[:, 3].copy() if SPECS[origin].masks else drawn_labels(origin, s) for s, d in drawn.items()}
            wholes[origin] = make_task(origin, SPECS[origin].class_names, {s: d[:, :3] for s, d in drawn.items()}, labels)
        elif origin not in wholes:
            wholes[origin] = find_all(origin, data_dir)
        classes = classes_of(name, len(wholes[origin].class_names), *part) if part else None
        if origin in SPECS:
            tasks[name] = subset(wholes[origin], classes, name) if part else wholes[origin]
        else:
            left = memory - sum(map(gibibytes, tasks.values()))
            tasks[name] = load_real(origin, wholes[origin], image_size, workers, left, classes, name)
    return tasks


def load(name, data_dir="data", image_size=32, seed=0, workers=2, memory=MEMORY):
    """A drawn task by name, a real dataset of REAL by name, or the task in a folder of images (class folders, with or
    without train/ val/ test/).

    signs:0-15 is the first 16 classes of signs, wide/10#3 the third of the ten subsets into which the classes of wide
    are dealt; a folder of that very name comes first. Drawn tasks are kept in data_dir/drawn; real datasets are read
    from data_dir. Images that need more than `memory` GiB stay in their files (FileTask). Bad input ends the program
    with one sentence (exit code 2).
    """
    return load_many([name], data_dir, image_size, seed, workers, memory)[name]


# ---------------------------------------------------------------------------------------------------------------
# Folders of images
# ---------------------------------------------------------------------------------------------------------------
# Found is what a reader makes of a folder: class names and {split: [(path or array, label)]}, a label being a number or the
# path of a mask. `listed`: the paths come from a list and may be missing on disk.
Found = collections.namedtuple("Found", "class_names files official listed missing", defaults=({}, False, ()))
HELD_OUT = 0.2                      # of every class, where there is no val
BAD_SHARE = 0.001                   # of the images of a split may be unreadable or missing
IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def hashed(text):
    return hashlib.sha256(str(text).encode()).digest()


def list_folder(root):
    """(class names, [(path, label)]) of a folder with one sub-folder of images per class."""
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if len(classes) < 2:
        fail(f"{root} has {len(classes)} class folders; it needs at least 2, each holding the images of one class")
    files = []
    for label, name in enumerate(classes):
        paths = [os.path.join(base, f) for base, _, names in os.walk(os.path.join(root, name)) for f in names]
        paths = sorted(path for path in paths if path.lower().endswith(IMAGE_TYPES))
        if not paths:
            fail(f"class folder {os.path.join(root, name)} has no images ({' '.join(IMAGE_TYPES)})")
        files += [(path, label) for path in paths]
    return classes, files


def hold_out(files, groups):
    """files as train and val that share no group: of every class, the groups whose names hash lowest, up to a fifth, are val."""
    size, label_of, val = collections.Counter(groups), dict(zip(groups, (label for _, label in files))), set()
    wanted = {k: max(1, round(HELD_OUT * n)) for k, n in collections.Counter(label for _, label in files).items()}
    for group in sorted(size, key=hashed):
        if wanted[label_of[group]] > 0:
            val.add(group)
            wanted[label_of[group]] -= size[group]
    return {split: [file for file, g in zip(files, groups) if (g in val) == (split == "val")] for split in ("train", "val")}


def read_folder(root, as_is=False):
    """Found of class folders, either at the top or inside train/, val/ and test/ (as_is: the splits that are there)."""
    if not os.path.isdir(root):
        fail(f"no task or folder {root!r}: give one of {', '.join(DRAWN)}, a real dataset ({', '.join(REAL)}), a folder with one "
             "sub-folder of images per class (or train/, val/ and test/ folders that hold these), or a part as in signs:0-15 or wide/10#3")
    top = os.path.join(root, "train") if os.path.isdir(os.path.join(root, "train")) else root
    classes, train = list_folder(top)
    files = {"train": train}
    for split in ("val", "test"):
        folder = os.path.join(root, split)
        if top != root and os.path.isdir(folder):
            names, files[split] = list_folder(folder)
            if names != classes:
                odd = sorted(set(names) ^ set(classes))
                fail(f"{top} and {folder} must have the same class folders; only one of them has {', '.join(odd[:5])}")
    if as_is:
        return Found(classes, files)
    if "val" not in files:
        print(f"{root}: no val folder, so {HELD_OUT:.0%} of each class of the training images is held out as val")
        counts = collections.Counter(label for _, label in train)
        lonely = next((path for path, label in train if counts[label] == 1), None)
        if lonely:
            fail(f"{os.path.dirname(lonely)} holds a single image; without a val/ folder a class needs at least 2")
        files |= hold_out(train, [os.path.relpath(path, top) for path, _ in train])
    if "test" not in files:
        print(f"{root}: no test folder, so test is the same as val")
        files["test"] = files["val"]
    files["train"].sort(key=lambda file: hashed(os.path.relpath(file[0], root)))       # any first n are a fair sample
    return Found(classes, files)


def open_image(source, mask=False):
    """uint8 [3, H, W] of an image file, or of an array [H, W] or [3, H, W]; of a mask [1, H, W], in whose file 0 is "none"."""
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor
    if isinstance(source, np.ndarray):
        return torch.from_numpy(np.array(source)).expand(3, -1, -1)
    with Image.open(source) as image:                       # bytes wrap around: 0 - 1 = 255 = IGNORED
        return pil_to_tensor(image)[:1] - 1 if mask else pil_to_tensor(image.convert("RGB"))


class ImageFiles(torch.utils.data.Dataset):
    """Images [(path or array, label)] as uint8 [3, size, size]: shorter side resized to size, centre cut out.

    files[row] is the path if it is unreadable. Where labels are paths of masks, the mask is a fourth channel.
    """

    def __init__(self, files, size, name=""):
        sources, labels = zip(*files)
        # Paths in one block: counting references to a million strings would copy them into every worker process.
        self.sources = np.array([os.fsencode(s) for s in sources]) if isinstance(sources[0], str) else sources
        self.labels, self.shape, self.name = np.array(labels), (len(files), 3, size, size), name
        self.still, self.still_mask = still(size, name), still(size, name, mask=True)

    def __len__(self):
        return len(self.sources)

    def only(self, rows):
        other = copy.copy(self)
        other.sources = self.sources[rows] if isinstance(self.sources, np.ndarray) else [self.sources[row] for row in rows]
        other.labels, other.shape = self.labels[rows], (len(rows), *self.shape[1:])
        return other

    def __getitem__(self, row, transform=None):
        source, label = self.sources[row], self.labels[row]
        try:
            image = (transform or self.still)(open_image(source))
            return torch.cat([image, self.still_mask(open_image(label, mask=True))]) if isinstance(label, str) else image
        except (OSError, ValueError, SyntaxError):          # what PIL raises for broken files
            return os.fsdecode(source)

    def __getitems__(self, keys):
        """A batch for keys (row, augment, random stream): images [b, 3, size, size], paths of those unreadable.

        In place of an unreadable image stands the next of its class, so that its label stays true (black if none is left).
        """
        images, bad = torch.zeros(len(keys), *self.shape[1:], dtype=torch.uint8), []
        for out, (row, augment, stream) in zip(images, keys):
            same = np.flatnonzero(self.labels == self.labels[row])
            with seeded(*stream) if augment != "none" else contextlib.nullcontext():
                for other in np.roll(same, -np.searchsorted(same, row)):
                    image = self.__getitem__(other, augmentation(augment, self.shape[-1], self.name) if augment != "none" else None)
                    if torch.is_tensor(image):
                        out.copy_(image)
                        break
                    bad.append(image)
        return images, bad


def report_bad(bad, total):
    """Count and list unreadable images; they are skipped, unless they are too many."""
    paths = ", ".join(sorted(bad)[:20]) + (", ..." if len(bad) > 20 else "")
    if len(bad) > BAD_SHARE * total:
        fail(f"cannot read {len(bad)} of {total:,} images (at most 1 in 1,000 is skipped): {paths}")
    if bad:
        print(f"skipped {len(bad)} of {total:,} images, which cannot be read: {paths}", flush=True)


def read_images(files, size, workers, name=""):
    """The readable ones of files [(source, label)]: images uint8 [n, 3, size, size]; labels int64 [n] or masks."""
    dataset, masks = ImageFiles(files, size, name), isinstance(files[0][1], str)
    workers = workers if len(files) > 500 else 0            # starting them would take longer than reading
    reader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers)
    images, kept, bad = torch.empty(len(files), 3 + masks, size, size, dtype=torch.uint8), [], []
    for row, image in enumerate(tqdm(reader, "reading images", leave=False, disable=None)):
        if isinstance(image, str):
            bad.append(image)
        else:
            images[len(kept)] = image
            kept.append(row)
    report_bad(bad, len(files))
    images = images[:len(kept)]
    return images[:, :3], images[:, 3] if masks else torch.from_numpy(dataset.labels[kept])


def still(size, name="", mask=False):
    """The transform without chance: shorter side to size, centre cut out; ImageNet's margin of 1/8 is cut off, as in DeiT."""
    from torchvision.transforms import InterpolationMode as Mode, v2
    if name.startswith("imagenet"):                         # and its parts
        return v2.Compose([v2.Resize(round(size / 0.875), Mode.BICUBIC, antialias=True), v2.CenterCrop(size)])
    return v2.Compose([v2.Resize(size, Mode.NEAREST if mask else Mode.BILINEAR, antialias=True), v2.CenterCrop(size)])


def stream(dataset, keys, workers, pin):
    """(uint8 batch, unreadable paths) for lists of keys; see ImageFiles.__getitems__.

    Knows nothing of the task that holds it: processes that die in a reference cycle take 5 s each to do so.
    """
    yield from torch.utils.data.DataLoader(dataset, batch_sampler=keys, num_workers=workers, collate_fn=tuple, pin_memory=pin,
                                           generator=torch.Generator())    # not the stream from which training draws


class FileTask(Task):
    """A Task whose images {split: ImageFiles} stay in their files: processes decode the next batches while a net computes.

    Each image is decoded once per epoch. batch() gives what Task.batch gives, whatever the number of workers, at any
    step; they read ahead as long as steps are asked for in turn, and start anew at any other. Recipes see whole images,
    where a Task has only their centres.
    """

    def __init__(self, name, class_names, mean, std, files, image_size, workers):
        images = {split: ImageFiles(f, image_size, name) for split, f in files.items()}
        super().__init__(name, class_names, mean, std, images, {s: torch.from_numpy(i.labels) for s, i in images.items()})
        self.workers, self.device, self.streams, self.bad = workers, torch.device("cpu"), {}, {}

    def to(self, device):
        other = copy.copy(self)
        other.device, other.labels = torch.device(device), {split: y.to(device) for split, y in self.labels.items()}
        other.streams, other.bad = {}, {}
        other.__post_init__()
        return other

    def stream(self, split, keys, workers):
        return stream(self.images[split], keys, workers, self.device.type == "cuda")

    def take(self, split, images, bad):
        """The batch on the device; unreadable images are reported when first met."""
        known = self.bad.setdefault(split, set())
        if not known.issuperset(bad):
            known.update(bad)
            report_bad(known, len(self.labels[split]))
        return images.to(self.device, non_blocking=True)

    def fetch(self, split, rows, step, batch_size, seed, recipe, rank, world):
        """As Task.fetch, from the workers."""
        augment = recipe
        asked = split, batch_size, seed, recipe, rank, world
        if self.streams.get(split, ())[:2] != (asked, step):
            batches = ((at, rows_of(n, at, batch_size, seed, rank, world).tolist()) for n in [len(self.labels[split])]
                       for at in itertools.count(step))
            keys = ([(row, augment, (seed, at, 2, rank + k * world)) for k, row in enumerate(rows)] for at, rows in batches)
            self.streams[split] = asked, step, self.stream(split, keys, self.workers)
        ready = self.streams[split][2]
        self.streams[split] = asked, step + 1, ready
        return self.take(split, *next(ready))

    def pixels(self, split, rows):
        keys = ([(row, "none", ()) for row in part.tolist()] for part in rows.cpu().split(100))
        return torch.cat([self.take(split, *read) for read in self.stream(split, keys, self.workers if len(rows) > 500 else 0)])

    def only(self, rows):
        other = self.to(self.device)
        other.images, other.labels = {"train": self.images["train"].only(rows.cpu().numpy())}, {"train": self.labels["train"][rows]}
        return other

    def examples(self, split, limit=None):
        """As Task.examples, but x only has a length and split(n), which gives batches as they are decoded."""
        y = self.labels[split][:limit]
        return Examples(self, split, len(y)), y


class Examples:
    def __init__(self, task, split, count):
        self.task, self.name, self.count = task, split, count

    def __len__(self):
        return self.count

    def split(self, size):
        keys = ([(row, "none", ()) for row in range(k, min(k + size, self.count))] for k in range(0, self.count, size))
        for read in self.task.stream(self.name, keys, self.task.workers if self.count > 500 else 0):
            yield self.task.take(self.name, *read)


def gibibytes(task):
    """GiB of a task's images in memory."""
    tensors = {id(t): t for t in task.images.values() if torch.is_tensor(t)}
    return sum(t.numel() for t in tensors.values()) / 2 ** 30


def measure(files, image_size, workers, name, limit=2000):
    """Mean and std of the first `limit` images."""
    images, labels = read_images(files[:limit], image_size, workers, name)
    task = make_task(name, [], {"train": images}, {"train": labels})
    return task.mean, task.std

# ---------------------------------------------------------------------------------------------------------------
# Real datasets: where the files lie, which label is whose, how many there should be
# ---------------------------------------------------------------------------------------------------------------
Real = collections.namedtuple("Real", "read official get")          # official: counts of a whole set; get: what to unpack
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
NORMS = {f"decathlon/{domain}": row[4:] for domain, row in DOMAINS.items()} | dict.fromkeys(     # the others: as measured
    ("imagenet", "cifar10", "cifar100", "food101", "cars", "flowers102", "flowers102-trainval", "inaturalist2019", "ade20k"),
    IMAGENET)                       # what DeiT normalises every dataset with
UPRIGHT = ("signs", "glyphs", "digits", "decathlon/gtsrb", "decathlon/omniglot", "decathlon/svhn")     # a mirrored 2 is no 2
FER = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")      # in the order of FER2013's CSV
MASKS_MEMORY = 32       # GiB that images may take; masks are cropped along with their images, in memory only


def locate(name, data_dir, marks, *places):
    """The first of data_dir's sub-folders `places`, or data_dir itself, that holds one of the paths `marks`."""
    for place, mark in itertools.product((*places, ""), marks):
        if os.path.exists(os.path.join(data_dir, place, mark)):
            return os.path.normpath(os.path.join(data_dir, place))
    where = data_dir + (f" or its folders {', '.join(places)}" if places else "")
    fail(f"{name}: there is no {' or '.join(marks)} in {where}; needed: {(REAL | TEXTS)[name].get}")


def resolve(files, *spellings):
    """files [(name, label)] with the first spelling (name -> path) under which one of fifty of them exists."""
    some = files[::len(files) // 50 + 1]
    spelling = next((s for s in spellings if any(os.path.exists(s(name)) for name, _ in some)), spellings[0])
    return [(os.path.normpath(spelling(name)), label) for name, label in files]


def read_coco(paths, *spellings):
    """Found of {split: COCO-style JSON file}, all with the same categories: a label is a place in that list. A file without
    annotations is no split."""
    names, files = {}, {}
    for split, path in paths.items():
        if not os.path.exists(path):
            continue
        try:
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
            place = {category["id"]: k for k, category in enumerate(content["categories"])}
            label = {a["image_id"]: place[a["category_id"]] for a in content.get("annotations") or []}
            listed = [(image["file_name"], label[image["id"]]) for image in content["images"] if image["id"] in label]
            names[split] = [str(category["name"]) for category in content["categories"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(f"{path} is not an annotation file in COCO's format ({type(error).__name__}: {error})")
        if names[split] != names["train"]:
            fail(f"{paths['train']} and {path} list different categories, so their labels do not mean the same")
        if listed:
            files[split] = resolve(listed, *spellings)
    return Found(names["train"], files, listed=True)


def read_decathlon(name, data_dir):
    """The devkit's annotations/DOMAIN_{train,val}.json with DOMAIN/... or data/DOMAIN/... beside or around them.

    The devkit's test list is stripped of labels; Rebuffi et al. published them since, as annotations/DOMAIN_test.json.
    TAL's tables are fractions of the val counts: val is what to compare with.
    """
    domain, join = name.split("/")[1], os.path.join
    base = locate(name, data_dir, [f"annotations/{domain}_train.json"], "decathlon-1.0", "decathlon", "..")
    bare = lambda file: file.removeprefix("data/")
    short = lambda file: bare(file).replace("imagenet12/", "imagenet/", 1)          # as in copies made for TAL's code
    paths = {split: join(base, "annotations", f"{domain}_{split}.json") for split in SPLITS}
    return read_coco(paths, *(lambda file, top=top, spelt=spelt: join(top, spelt(file)) for spelt in (str, bare, short)
                              for top in (base, data_dir, join(base, "data"))))


def read_inaturalist(name, data_dir):
    base = locate(name, data_dir, ["train2019.json"], "inaturalist2019", "iNaturalist2019", "inat2019")
    path = lambda *parts: os.path.join(base, *parts)
    return read_coco({"train": path("train2019.json"), "val": path("val2019.json")}, path,
                     lambda file: path(*file.split("/")[:1], *file.split("/")[2:]),           # as DeiT's code has it
                     lambda file: path("2019", *file.split("/")[1:]))                         # torchvision's


def read_imagenet(name, data_dir):
    base = locate(name, data_dir, ["train"], "imagenet", "ImageNet", "ILSVRC2012", "ILSVRC/Data/CLS-LOC")
    val = os.path.join(base, "val")
    if os.path.isdir(val) and not any(entry.is_dir() for entry in os.scandir(val)):
        fail(f"{val} is flat: its images must be moved into one folder per class, named as in train/ (n01440764, ...); the "
             "devkit's ILSVRC2012_validation_ground_truth.txt says which goes where, and the usual valprep.sh does it")
    return read_folder(base, as_is=True)


TRAIN_TEST = {"train": "train", "test": "test"}
TORCHVISION = {                     # torchvision's reader, what marks its folder, what it calls the splits
    "cifar10": ("CIFAR10", "cifar-10-batches-py", {"train": True, "test": False}),
    "cifar100": ("CIFAR100", "cifar-100-python", {"train": True, "test": False}),
    "food101": ("Food101", "food-101/meta/train.json", TRAIN_TEST),
    "cars": ("StanfordCars", "stanford_cars/devkit", TRAIN_TEST),
    "flowers102": ("Flowers102", "flowers-102/setid.mat", {s: s for s in SPLITS}),
}


def read_torchvision(name, data_dir):
    """As torchvision's own reader has it, which checks md5 sums where files are pickles (CIFAR).

    cars: many copies were sorted into class folders instead, or have each folder in another of its name. flowers102-trainval
    joins train and val, the 2,040 images on which DeiT's transfer results train.
    """
    from torchvision import datasets
    short = name.removesuffix("-trainval")
    reader, mark, splits = TORCHVISION[short]
    sorted_cars = ["stanford_cars/train"] if short == "cars" else []
    base = locate(name, data_dir, [mark, *sorted_cars], short)
    if not os.path.exists(os.path.join(base, mark)):
        return read_folder(os.path.join(base, "stanford_cars"), as_is=True)
    if short in ("cars", "flowers102"):
        try:
            import scipy.io                                                            # noqa: F401
        except ImportError:
            fail(f"{name} lists its images in MATLAB files, which are read with scipy: pip install scipy")
    arrays = short.startswith("cifar")
    try:
        sets = {s: getattr(datasets, reader)(base, given, **({} if arrays else {"loader": str})) for s, given in splits.items()}
        files = {split: list(zip(np.ascontiguousarray(s.data.transpose(0, 3, 1, 2)), s.targets)) if arrays else
                 [(path, int(label)) for path, label in (s[i] for i in range(len(s)))] for split, s in sets.items()}
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        fail(f"{name}: torchvision's reader says of {base}: {str(error).splitlines()[0]}; needed: {REAL[name].get}")
    if not arrays:
        nested = lambda path: os.path.join(os.path.dirname(path), *path.split(os.sep)[-2:])
        files = {split: resolve(f, str, nested) for split, f in files.items()}
    if name != short:
        files = {"train": files["train"] + files["val"], "test": files["test"]}
    return Found(list(sets["train"].classes), files, listed=not arrays)


def read_idx(path):
    """The uint8 array in an IDX file, packed or not; torchvision's reader takes only the latter."""
    try:
        with open(path, "rb") if os.path.exists(path) else gzip.open(path + ".gz") as file:
            content = file.read()
        shape = np.frombuffer(content, ">u4", content[3], 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError) as error:
        fail(f"{path} is not a file in the IDX format, as Fashion-MNIST has them ({error})")


def read_fashion(name, data_dir):
    from torchvision.datasets import FashionMNIST
    first = "train-images-idx3-ubyte"
    base = locate(name, data_dir, [first, first + ".gz"], "FashionMNIST/raw", "fashion-mnist", "fashion-mnist/data/fashion")
    part = lambda stem: list(zip(read_idx(os.path.join(base, f"{stem}-images-idx3-ubyte")),
                                 read_idx(os.path.join(base, f"{stem}-labels-idx1-ubyte")).tolist()))
    return Found(FashionMNIST.classes, {"train": part("train"), "test": part("t10k")})


def read_table(path, *columns):
    """The rows of a CSV file (tabs will do) as dictionaries; names may follow the commas after a space."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            separator = "\t" if "\t" in file.readline() else ","
            file.seek(0)
            rows = list(csv.DictReader(file, skipinitialspace=True, delimiter=separator))
    except (OSError, ValueError, csv.Error) as error:
        fail(f"cannot read the table {path}: {error}")
    absent = [c for c in columns if not rows or rows[0].get(c) is None]
    return fail(f"{path} has no column {', '.join(absent)}, or no rows") if absent else rows


def read_faces(name, data_dir):
    """fer2013.csv or icml_face_data.csv (all splits), train.csv (a fifth held out), or class folders in train/ and test/.

    Labels are numbered as in the CSV whatever the source; folders in alphabetical order would have neutral before sad.
    """
    tables = ["fer2013.csv", "icml_face_data.csv", "train.csv"]
    base = locate(name, data_dir, [*tables, "train"], "fer2013", "FER2013", "fer2013/fer2013")
    table = next((path for t in tables if os.path.exists(path := os.path.join(base, t))), None)
    if table is None:
        found = read_folder(base, as_is=True)
        number = [next((k for k, e in enumerate(FER) if e[:3] == c[:3].lower()), None) for c in found.class_names]
        if sorted(number, key=str) != list(range(7)):
            fail(f"{name}: the folders in {base} should be {', '.join(FER)}, not {', '.join(found.class_names)}")
        files = {split: [(path, number[label]) for path, label in f] for split, f in found.files.items()}
        return Found(FER, files, dict(classes=7, train=28709, test=7178))           # PublicTest and PrivateTest in one
    rows = read_table(table, "emotion", "pixels")
    try:
        files = [(np.array(row["pixels"].split(), np.uint8).reshape(48, 48), int(row["emotion"])) for row in rows]
    except (ValueError, OverflowError) as error:
        fail(f"{table} has a row that is not 48 x 48 pixels and a label ({error})")
    if "Usage" not in rows[0]:
        print(f"{table} has no column Usage, so {HELD_OUT:.0%} of each class is held out as val")
        return Found(FER, hold_out(files, range(len(files))), dict(classes=7, all=28709))
    usage = {"train": "Training", "val": "PublicTest", "test": "PrivateTest"}
    return Found(FER, {s: [f for f, r in zip(files, rows) if r["Usage"] == u] for s, u in usage.items()})


def read_lesions(name, data_dir):
    """There is no official split: a fifth of each class's lesions is val, with all images of these lesions.

    -leaky is no measure of anything: every class is repeated to the size of the largest before a fifth of the copies is
    held out, so that val shows training images. That leaves 9,387 of 46,935 copies. TAL's accuracies can be fractions of
    9,387 and not of any count below 5,860, hence the guess that they come from such a split.
    """
    tables = ["HAM10000_metadata.csv", "HAM10000_metadata", "HAM10000_metadata.tab"]
    base = locate(name, data_dir, tables, "ham10000", "HAM10000")
    rows = read_table(next(p for t in tables if os.path.exists(p := os.path.join(base, t))), "lesion_id", "image_id", "dx")
    classes = sorted({row["dx"] for row in rows})
    tops = [e.path for e in os.scandir(base) if e.is_dir() and e.name.lower().startswith(("ham10000", "images"))]
    paths = [os.path.join(folder, f) for top in tops for folder, _, names in os.walk(top) for f in names]
    path = {os.path.splitext(os.path.basename(p))[0]: p for p in [*sorted(paths), *(e.path for e in os.scandir(base))]
            if p.lower().endswith(".jpg")}
    files = [(path.get(r["image_id"], os.path.join(base, r["image_id"] + ".jpg")), classes.index(r["dx"])) for r in rows]
    if not name.endswith("-leaky"):
        return Found(classes, hold_out(files, [row["lesion_id"] for row in rows]), listed=True)
    mine = [[f for f in files if f[1] == k] for k in range(len(classes))]
    copies = [(f, n) for m in mine for n, f in zip(range(max(map(len, mine))), itertools.cycle(m))]
    return Found(classes, hold_out([f for f, _ in copies], [f"{os.path.basename(f[0])} {n}" for f, n in copies]), listed=True)


def read_ade20k(name, data_dir):
    """Scene parsing with 150 classes: the label of an image is the path of its mask."""
    base = locate(name, data_dir, ["annotations/training"], "ADEChallengeData2016", "ade20k/ADEChallengeData2016", "ade20k")
    files = {}
    for split, folder in (("train", "training"), ("val", "validation")):
        masks = os.path.join(base, "annotations", folder)
        stems = sorted(f[:-4] for f in os.listdir(masks) if f.endswith(".png")) if os.path.isdir(masks) else []
        if not stems:
            fail(f"{name}: {masks} holds no masks (.png); needed: {REAL[name].get}")
        files[split] = [(os.path.join(base, "images", folder, s + ".jpg"), os.path.join(masks, s + ".png")) for s in stems]
    rows = read_table(os.path.join(base, "objectInfo150.txt"), "Idx", "Name")
    return Found([row["Name"].split(",")[0] for row in rows], files, listed=True)


def real(read, get, **official):
    return Real(read, official, get)


REAL = {f"decathlon/{domain}": Real(read_decathlon, dict(zip(("classes", *SPLITS), row)), "decathlon-1.0-devkit.tar.gz, and " + (
        f"within its data/ the {domain}.tar of decathlon-1.0-data.tar.gz" if domain != "imagenet12" else
        "beside it decathlon-1.0-data-imagenet.tar")) for domain, row in DOMAINS.items()} | {
    "imagenet": real(read_imagenet, "train/ and val/ with a folder per class", classes=1000, train=1281167, val=50000),
    "cifar10": real(read_torchvision, "cifar-10-python.tar.gz, unpacked", classes=10, train=50000, test=10000),
    "cifar100": real(read_torchvision, "cifar-100-python.tar.gz, unpacked", classes=100, train=50000, test=10000),
    "food101": real(read_torchvision, "food-101.tar.gz, unpacked", classes=101, train=75750, test=25250),
    "cars": real(read_torchvision, "stanford_cars/ with cars_train/, cars_test/, devkit/ and cars_test_annos_withlabels.mat, or with "
                 "train/ and test/ that hold a folder per class", classes=196, train=8144, test=8041),
    "flowers102": real(read_torchvision, "flowers-102/ with jpg/, imagelabels.mat and setid.mat", classes=102, train=1020, val=1020, test=6149),
    "flowers102-trainval": real(read_torchvision, "the files of flowers102", classes=102, train=2040, test=6149),
    "inaturalist2019": real(read_inaturalist, "train2019.json, val2019.json and train_val2019/", classes=1010, train=265213, val=3030),
    "fashion-mnist": real(read_fashion, "the four ...-ubyte or ...-ubyte.gz files", classes=10, train=60000, test=10000),
    "fer2013": real(read_faces, "fer2013.csv, icml_face_data.csv or train.csv, or train/ and test/ with a folder per expression",
                    classes=7, train=28709, val=3589, test=3589),
    "ham10000": real(read_lesions, "HAM10000_metadata.csv and the two folders of images", classes=7, all=10015),
    "ham10000-leaky": real(read_lesions, "the files of ham10000", classes=7, all=46935, val=9387),
    "ade20k": real(read_ade20k, "ADEChallengeData2016.zip, unpacked", classes=150, train=20210, val=2000),
}


def find(name, data_dir):
    """Found of a real dataset or a folder of images: files that are there, in a fixed mixed order, and those missing."""
    found = REAL[name].read(name, data_dir) if name in REAL else read_folder(name)
    if len(found.files) == 1:
        fail(f"{name}: there are training images, but neither val nor test images with labels; needed: {REAL[name].get}")
    if name not in REAL:
        return found._replace(official={})
    files, missing = {}, []
    for split, listed in found.files.items():
        absent = [next((p for p in file if isinstance(p, str) and not os.path.exists(p)), None) if found.listed else None for file in listed]
        missing += filter(None, absent)
        there = [file for file, gone in zip(listed, absent) if not gone]
        if not there:
            fail(f"{name}: none of the {len(listed):,} {split} images is there, such as {missing[-1] if missing else 'any'}")
        files[split] = [there[k] for k in np.random.default_rng(0).permutation(len(there))]     # any first n are a fair sample
    return found._replace(files=files, missing=missing, official=found.official or REAL[name].official)


def differences(found, what="images"):
    """Sentences on what is not as the whole dataset has it."""
    counts = {split: len(f) for split, f in found.files.items()}
    counts |= {"classes": len(found.class_names), "all": sum(counts.values())}
    return [f"{counts.get(key, 0):,} {key if key == 'classes' else f'{key} {what}'} where the whole set has {count:,}"
            for key, count in found.official.items() if counts.get(key, 0) != count]


def find_all(name, data_dir):
    """As find, with every split there is; says what differs from the whole set, and stops where too much is missing."""
    found = find(name, data_dir)
    files, total = dict(found.files), sum(map(len, found.files.values())) + len(found.missing)
    if len(found.missing) > BAD_SHARE * total:
        fail(f"{name}: {len(found.missing):,} of {total:,} listed images are missing, such as {found.missing[0]}; "
             f"python data.py --check {name} --data-dir {data_dir} says more")
    for sentence in differences(found):
        print(f"{name}: {sentence}")
    for split, other in (("val", "test"), ("test", "val")):
        if split not in files:
            print(f"{name}: no {split} images with labels, so {split} is the same as {other}")
            files[split] = files[other]
    return found._replace(files=files)


def load_real(origin, found, image_size, workers, memory, classes=None, name=None):
    """The Task of a real dataset or a folder of images; `classes` keeps only the files of these, renumbered in the order
    given. mean and std are then those of all classes, as in `subset`."""
    name, files, names, norm = name or origin, found.files, list(found.class_names), NORMS.get(origin)
    masks = isinstance(files["train"][0][1], str)
    if classes is not None:
        if masks:
            fail(f"{name}: {origin} has a class for every pixel, so it has no subset of images by class")
        norm = norm or measure(files["train"], image_size, workers, origin)
        place, names = {k: i for i, k in enumerate(classes)}, [names[k] for k in classes]
        lists = {id(f): [(source, place[label]) for source, label in f if label in place] for f in files.values()}
        files = {split: lists[id(f)] for split, f in files.items()}
    lists = {id(f): f for f in files.values()}
    need = sum(map(len, lists.values())) * image_size ** 2 * (4 if masks else 3) / 2 ** 30
    if need > memory and not masks:
        print(f"{name}: {need:.1f} GiB at {image_size} pixels, more than {max(memory, 0):.1f}, so {workers} processes decode "
              "images as they are needed")
        return FileTask(name, names, *(norm or measure(files["train"], image_size, workers, origin)), files, image_size, workers)
    if masks and need > MASKS_MEMORY:
        fail(f"{name} takes {need:.1f} GiB at {image_size} pixels, more than {MASKS_MEMORY}; give a smaller --image-size")
    read = {key: read_images(f, image_size, workers, origin) for key, f in lists.items()}
    images, labels = ({split: read[id(f)][k] for split, f in files.items()} for k in (0, 1))
    return Task(name, names, *norm, images, labels) if norm else make_task(name, names, images, labels)


# ---------------------------------------------------------------------------------------------------------------
# Text: GPT-2's tokens, tasks of texts, GLUE's MRPC, CoLA and RTE, and IMDB
# ---------------------------------------------------------------------------------------------------------------
END = "<|endoftext|>"               # GPT-2's only special token, always the last id; it also pads, for want of another
VAL_SHARE = 0.1                     # of the training texts: neither GLUE nor IMDB has a split for choosing
TEXT_VERSION = 1                    # part of the cache's key: raise it when a reader gives other texts
PARTS = ("ids", "lengths", "labels")


def byte_symbols():
    """{byte: the character that stands for it in GPT-2's files}: itself where it shows, else U+0100 and on; in the order of ids."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return {b: chr(b) for b in shown} | {b: chr(256 + k) for k, b in enumerate(sorted({*range(256)}.difference(shown)))}


@functools.cache
def pretokens():
    r"""GPT-2's 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ for re, which has no \p; built in < 1 s."""
    ranges = {"L": "", "N": ""}                             # letters, numbers
    for kind, points in itertools.groupby(range(0x110000), lambda point: unicodedata.category(chr(point))[0]):
        if kind in ranges:
            points = [*points]
            ranges[kind] += f"\\U{points[0]:08x}-\\U{points[-1]:08x}"
    l, n, s = *ranges.values(), r"\t-\r\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"     # re's \s has \x1c-\x1f too
    return re.compile(f"'s|'t|'re|'ve|'m|'ll|'d| ?[{l}]+| ?[{n}]+| ?[^{s}{l}{n}]+|[{s}]+(?![^{s}])|[{s}]+")


class Tokenizer:
    """GPT-2's byte-level BPE from its two files in `folder`; without a folder bytes, ids 0 to 255. The last id, eos, is END.

    A text that spells END out is encoded as ordinary characters: no text holds the id eos.
    """

    def __init__(self, folder=None):
        self.bytes, self.key = [bytes([k]) for k in range(256)] + [END.encode()], "bytes"
        if folder is not None:
            self.read(folder)
        self.size = len(self.bytes)
        self.eos = self.size - 1
        self.word = functools.lru_cache(2 ** 17)(self.merge)        # nearly all words of a review have come before

    def read(self, folder):
        needed = "; needed: vocab.json and merges.txt of openai's gpt2 on Hugging Face"
        paths, content = [], []
        for names in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
            paths.append(next(filter(os.path.exists, (os.path.join(folder, name) for name in names)), None) or
                         fail(f"there is no {' or '.join(names)} in {folder}{needed}"))
            try:
                with open(paths[-1], encoding="utf-8") as file:
                    content.append(file.read().split("\n") if content else dict(json.load(file)))
            except (OSError, ValueError, TypeError) as error:
                fail(f"cannot read {paths[-1]} ({error}){needed}")
        vocab, lines = content
        merges = [(*line.split(" "),) for line in lines[lines[0].startswith("#version"):] if line]      # "# #" is a merge
        byte = {symbol: b for b, symbol in byte_symbols().items()}
        if odd := next((pair for pair in merges if len(pair) != 2 or not all(pair) or not byte.keys() >= {*"".join(pair)}), None):
            fail(f"{paths[1]} has a line that is not two tokens, {' '.join(odd)!r}{needed}")
        tokens = dict.fromkeys((*byte, *map("".join, merges), END))
        absent = next((token for token in tokens if token not in vocab), None)
        if absent is not None:
            fail(f"{paths[0]} has no token {absent!r}, which {paths[1]} and the 256 bytes call for{needed}")
        if len(vocab) != len(tokens):
            fail(f"{paths[0]} has {len(vocab):,} tokens, not 256 bytes, {len(tokens) - 257:,} merges of {paths[1]} and {END}{needed}")
        if sorted(map(repr, vocab.values())) != sorted(map(repr, range(len(vocab)))) or vocab[END] != len(vocab) - 1:
            fail(f"{paths[0]}: the ids are not the numbers from 0 with {END} last{needed}")
        self.symbols, self.rank, self.ids = byte_symbols(), {pair: k for k, pair in enumerate(merges)}, vocab
        self.bytes = [bytes(map(byte.get, token)) for token in sorted(vocab, key=vocab.get)[:-1]] + [END.encode()]
        self.key = hashed((sorted(vocab.items()), merges)).hex()

    def merge(self, word):
        """The ids of one pretoken: from single bytes on, the adjacent pair of lowest rank is merged wherever it occurs."""
        parts, rank = [self.symbols[b] for b in word.encode()], lambda pair: self.rank.get(pair, math.inf)
        while len(parts) > 1 and (pair := min(zip(parts, parts[1:]), key=rank)) in self.rank:
            merged, k = [], 0
            while k < len(parts):                           # from left to right: a a a is aa a
                two = (*parts[k:k + 2],) == pair
                merged.append("".join(parts[k:k + 1 + two]))
                k += 1 + two
            parts = merged
        return [self.ids[part] for part in parts]

    def encode(self, text):
        if self.key == "bytes":
            return list(text.encode())
        return [token for word in pretokens().findall(text) for token in self.word(word)]

    def decode(self, ids):
        return b"".join(self.bytes[int(k)] for k in ids).decode(errors="replace")


@dataclass
class TextTask(Task):
    """Texts as token ids: images {split: int32 [N, T]}, padded at the right with eos; mean and std are ().

    metric: "accuracy", "accuracy/F1" or "Matthews". lengths {split: int64 [N]}, in tokens, stay on the CPU.
    """
    metric: str = "accuracy"
    eos: int = 256

    def __post_init__(self):
        self.lengths = {split: (ids != self.eos).sum(1).cpu() for split, ids in self.images.items()}

    def normalise(self, images):
        return images.long()

    def batch(self, split, step, batch_size, seed=0, recipe="none", rank=0, world=1, crop=None):
        """As Task.batch: ids int64 [b, t], where t is the longest of these b texts, and y int64 [b]. Nothing is augmented."""
        rows = rows_of(len(self.lengths[split]), step, batch_size, seed, rank, world)
        longest = int(self.lengths[split][rows].max())      # the host knows it, and need not wait for a GPU
        rows = to_device(rows, self.labels[split].device)
        return self.normalise(self.images[split][rows, :longest]), self.labels[split][rows]

    def examples(self, split, limit=None):
        """The first `limit` texts of a split in their fixed order (all by default): ids int64 [n, the longest of them], y."""
        longest = int(self.lengths[split][:limit].max())
        return self.normalise(self.images[split][:limit, :longest]), self.labels[split][:limit]


def tokenised(name, splits, tokenizer):
    """{split: (ids of all texts in a row, lengths [N], labels [N])} of {split: [(text, second text or None, label)]}."""
    kind, tokens = np.min_scalar_type(tokenizer.size), {}
    for split, rows in splits.items():
        parts = []
        for text, second, _ in tqdm(rows, f"{name}: {split}", leave=False, disable=None if len(rows) > 5000 else True):
            if not text or second == "":
                fail(f"{name}: text {len(parts)} of {split} is empty")
            parts.append(np.array(tokenizer.encode(text if second is None else f"{text}\n{second}"), kind))
        tokens[split] = np.concatenate(parts), np.array([len(p) for p in parts]), np.array([label for *_, label in rows])
    return tokens


def from_tokens(name, class_names, metric, tokens, eos, context):
    """The TextTask of what `tokenised` gives: texts are cut to `context` tokens and padded to the longest that is left."""
    every, images = np.concatenate([lengths for _, lengths, _ in tokens.values()]), {}
    if cut := int((every > context).sum()):
        print(f"{name}: {cut:,} of {len(every):,} texts are longer than {context:,} tokens and keep their first {context:,}")
    for split, (ids, lengths, _) in tokens.items():
        width = min(context, int(every.max()))
        place = np.arange(len(ids)) - np.repeat(lengths.cumsum() - lengths, lengths)        # of each token in its text
        rows = np.full((len(lengths), width), eos, np.int32)
        rows[np.arange(width) < lengths[:, None]] = ids[place < width]
        images[split] = torch.from_numpy(rows)
    labels = {split: torch.from_numpy(labels) for split, (*_, labels) in tokens.items()}
    return TextTask(name, list(class_names), (), (), images, labels, metric, eos)


def text_task(name, class_names, metric, splits, tokenizer, context):
    """The TextTask of {split: [(text, second text or None, label)]}; a newline joins the two texts of a pair."""
    return from_tokens(name, class_names, metric, tokenised(name, splits, tokenizer), tokenizer.eos, context)


GLUE = {                            # first line of a table, columns of label and sentences, label words in the order of classes
    "mrpc": (["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], 0, (3, 4), ("0", "1")),
    "cola": (None, 1, (3,), ("0", "1")),
    "rte": (["index", "sentence1", "sentence2", "label"], 3, (1, 2), ("entailment", "not_entailment")),
}


def read_tsv(name, path):
    """[(columns, (sentence, second sentence or None, label))] of one of GLUE's tables, in which a quote is only a quote."""
    header, label_at, texts_at, words = GLUE[name]
    width = max(label_at, *texts_at) + 1
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            lines = [(f"{path}, line {reader.line_num}", columns) for columns in reader if columns]
    except (OSError, ValueError, csv.Error) as error:
        fail(f"{name}: cannot read {path} ({error}); needed: {TEXTS[name].get}")
    if header and (not lines or lines.pop(0)[1] != header):
        fail(f"{path}, line 1: should name the columns of {name}: {', '.join(header)}, separated by tabs")
    for where, columns in lines:
        if len(columns) != width:
            fail(f"{where}: {len(columns)} columns separated by tabs, where {name} has {width}")
        if columns[label_at] not in words:
            fail(f"{where}: the label {columns[label_at]!r} is none of {', '.join(words)}")
        if not all(columns[k].strip() for k in texts_at):
            fail(f"{where}: an empty sentence")
    return [(c, (*([c[k].strip() for k in texts_at] + [None])[:2], words.index(c[label_at]))) for _, c in lines]


def read_glue(name, base):
    """GLUE's test has no labels, so "test" is its dev. MRPC also comes as Microsoft's own two tables: dev are then the pairs
    that dev_ids lists, and the second table (GLUE's test, here with labels) is left alone, so that both forms give one task."""
    path = lambda file: os.path.join(base, file)
    if name != "mrpc" or os.path.exists(path("train.tsv")):
        return {split: [row for _, row in read_tsv(name, path(file))] for split, file in (("train", "train.tsv"), ("test", "dev.tsv"))}
    listed = next(filter(os.path.exists, map(path, ("dev_ids.tsv", "mrpc_dev_ids.tsv"))), None) or fail(
        f"mrpc: {base} lacks dev_ids.tsv (or mrpc_dev_ids.tsv), which says which pairs of msr_paraphrase_train.txt are GLUE's dev")
    with open(listed, encoding="utf-8-sig") as file:
        dev = {(*line.split(),) for line in file}
    rows = read_tsv(name, path("msr_paraphrase_train.txt"))
    return {split: [row for c, row in rows if ((c[1], c[2]) in dev) == (split == "test")] for split in ("train", "test")}


def read_imdb(name, base):
    """A review per file, in folders neg and pos; train/unsup has no labels."""
    parts = {"train": [], "test": []}
    for split, (label, kind) in itertools.product(parts, enumerate(("neg", "pos"))):
        paths = sorted(glob.glob(os.path.join(glob.escape(base), split, kind, "*.txt")))
        for path in paths or fail(f"{name}: no reviews (.txt) in {os.path.join(base, split, kind)}; needed: {TEXTS[name].get}"):
            try:
                with open(path, encoding="utf-8") as file:
                    text = file.read().replace("<br />", "\n").strip()
            except (OSError, ValueError) as error:
                fail(f"{name}: cannot read {path} ({error})")
            parts[split].append((text or fail(f"{path}: an empty review"), None, label))
    return parts


Texts = namedtuple("Texts", "read marks places class_names metric official get")        # official: train, test of the whole set


def glue_places(folder):
    return [top + f for top in ("glue/", "GLUE/", "glue_data/", "") for f in (folder, folder.lower())]


TEXTS = {
    "mrpc": Texts(read_glue, ["train.tsv", "msr_paraphrase_train.txt"], glue_places("MRPC"), ["not a paraphrase", "paraphrase"],
                  "accuracy/F1", (3668, 408), "MRPC/ with train.tsv and dev.tsv, or with msr_paraphrase_train.txt and dev_ids.tsv"),
    "cola": Texts(read_glue, ["train.tsv"], glue_places("CoLA"), ["unacceptable", "acceptable"], "Matthews", (8551, 1043),
                  "CoLA.zip, unpacked"),
    "rte": Texts(read_glue, ["train.tsv"], glue_places("RTE"), ["entailment", "not entailment"], "accuracy", (2490, 277),
                 "RTE.zip, unpacked"),
    "imdb": Texts(read_imdb, ["train/pos"], ["aclImdb", "imdb/aclImdb", "imdb", "IMDB"], ["negative", "positive"], "accuracy",
                  (25000, 25000), "aclImdb_v1.tar.gz, unpacked"),
}


def read_texts(name, data_dir, tokenizer, limit=None):
    """What `tokenised` gives of a real dataset, kept in data_dir/tokens until its files change, and what the whole set has else.

    Texts go in the order of their hashes, for files may be sorted by class: any first n are a fair sample. The first
    tenth of the training texts is val.
    """
    about = TEXTS[name]
    base = locate(name, data_dir, about.marks, *about.places)
    files = [f for pattern in ("*.tsv", "*.txt", "t*/[np]*/*.txt") for f in glob.glob(os.path.join(glob.escape(base), pattern))]
    stamp = sorted((os.path.relpath(f, base), s.st_size, s.st_mtime_ns) for f in files for s in [os.stat(f)])
    path = os.path.join(data_dir, "tokens", f"{name}-{hashed((TEXT_VERSION, tokenizer.key, limit, stamp)).hex()[:16]}.npz")
    try:
        with np.load(path) as kept:
            tokens = {split: tuple(kept[f"{split}-{part}"] for part in PARTS) for split in SPLITS}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):               # nothing there, or damaged
        mixed = lambda rows: sorted(rows, key=lambda row: hashed(f"{name}\n{row[0]}\n{row[1]}"))
        parts = {split: mixed(rows) for split, rows in about.read(name, base).items()}
        train, test, val = parts["train"], parts["test"], max(1, round(VAL_SHARE * len(parts["train"])))
        if len(train) < 2 or not test:
            fail(f"{name}: {len(train)} training and {len(test)} test texts in {base}; it takes 2 and 1; needed: {about.get}")
        tokens = tokenised(name, {"train": train[val:][:limit], "val": train[:val][:limit], "test": test[:limit]}, tokenizer)

        def write(path):
            with open(path, "wb") as file:
                np.savez(file, **{f"{split}-{part}": t for split in SPLITS for part, t in zip(PARTS, tokens[split])})
        try:
            write_atomically(path, write)
        except OSError as error:
            print(f"{name}: the tokens are not kept ({error})")
    val = round(VAL_SHARE * about.official[0])
    official = dict(train=about.official[0] - val, val=val, test=about.official[1]) if limit is None else {}
    return tokens, differences(Found(about.class_names, {s: tokens[s][2] for s in SPLITS}, official), "texts")


def load_texts(names, data_dir="data", context=1024, tokens="", limit=None):
    """{name: TextTask} of drawn tasks (GRAMMAR) and real ones (TEXTS, in data_dir), of at most `limit` texts per split.

    tokens: a folder with GPT-2's vocab.json and merges.txt; "": a token is a byte. Texts keep their first `context` tokens.
    """
    for name in names:
        if name not in GRAMMAR and name not in TEXTS:
            fail(f"no text task {name!r}; there are {', '.join([*GRAMMAR, *TEXTS])}")
    tokenizer, tasks = Tokenizer(tokens or None), {}
    for name in names:
        if name in GRAMMAR:
            splits = {split: written(name)[split][:limit] for split in SPLITS}
            tasks[name] = text_task(name, *GRAMMAR[name][:2], splits, tokenizer, context)
        else:
            read, trouble = read_texts(name, data_dir, tokenizer, limit)
            for sentence in trouble:
                print(f"{name}: {sentence}")
            tasks[name] = from_tokens(name, TEXTS[name].class_names, TEXTS[name].metric, read, tokenizer.eos, context)
    return tasks


def check_texts(name, data_dir, tokens):
    """As `check`, for texts."""
    tokenizer, names = Tokenizer(tokens or None), TEXTS[name].class_names
    read, trouble = read_texts(name, data_dir, tokenizer)
    print(f"{name}: {len(names)} classes ({', '.join(names)}), scored by {TEXTS[name].metric}; "
          f"official: {' / '.join(f'{n:,}' for n in TEXTS[name].official)} (train / test); val is {VAL_SHARE:.0%} of train")
    for split, (_, lengths, labels) in read.items():
        count = np.bincount(labels)
        print(f"  {split}: {len(labels):,} texts, {count.max() / len(labels):.1%} of them {names[count.argmax()]}; "
              f"the longest has {lengths.max():,} tokens")
    ids, lengths, labels = read["train"]
    print(f"  the first training text, {names[labels[0]]}: {tokenizer.decode(ids[:lengths[0]])[:200]!r}")
    if trouble:
        fail(f"{name} is not whole: {'; '.join(trouble)}")
    print(f"{name} is whole: its counts are the official ones")


def check(name, data_dir, image_size, workers, output, limit=2000):
    """Print what is there of a real dataset and what is missing, write a contact sheet; exit code 2 if it is not whole."""
    from torchvision.utils import make_grid, save_image
    found = find(name, data_dir)
    some = [str(c) for c in found.class_names[:6]]
    print(f"{name}: {len(found.class_names):,} classes ({', '.join(some)}{', ...' if len(found.class_names) > 6 else ''})")
    for split, files in found.files.items():
        classes = len({label for _, label in files})
        what = "images with masks" if isinstance(files[0][1], str) else f"images of {classes:,} classes"
        print(f"  {split}: {len(files):,} {what}; official: {found.official.get(split, '-')}")
    start, train = time.perf_counter(), found.files["train"][:limit]
    images, labels = read_images(train, image_size, workers, name)
    seconds, how = time.perf_counter() - start, f"with {workers} workers" if len(train) > 500 else "in this process"
    size = sum(os.path.getsize(source) if isinstance(source, str) else source.nbytes for source, _ in train)
    print(f"  {len(train):,} training images decoded to {image_size} pixels: {len(train) / seconds:,.0f} images/s, "
          f"{size / seconds / 1e6:,.1f} MB/s {how}")
    task = make_task(name, found.class_names, {"train": images}, {"train": labels})
    print(f"  their mean {task.mean}, std {task.std}; used: {NORMS.get(name, 'those of the training images')}")
    held_out = "val" if "val" in found.files else "test"
    shown = [*images[:40], *read_images(found.files[held_out][:limit], image_size, workers, name)[0][:40]]
    os.makedirs(os.path.dirname(output) or ".", exist_ok=True)
    save_image(make_grid(torch.stack(shown).float() / 255, nrow=20, padding=2, pad_value=1), output)
    print(f"  {output}: the first images of train and of {held_out}")
    for path in found.missing[:20]:
        print(f"  missing: {path}")
    trouble = ([f"{len(found.missing):,} listed images are missing"] if found.missing else []) + differences(found)
    if trouble:
        fail(f"{name} is not whole: {'; '.join(trouble)}")
    print(f"{name} is whole: its counts are the official ones" if found.official else f"{name}: no official counts are known")


# ---------------------------------------------------------------------------------------------------------------
# Command line: contact sheet and table of difficulty
# ---------------------------------------------------------------------------------------------------------------
def contact_sheet(tasks, path, columns=20, zoom=2):
    """One row per task, one image of each of `columns` classes, taken from val; the first scenes, without masks."""
    from torchvision.utils import make_grid, save_image
    rows = []
    for task in tasks.values():
        labels = task.labels["val"]
        if task.segmentation:
            rows += itertools.islice(itertools.cycle(task.images["val"]), columns)
            continue
        classes = min(columns, task.num_classes)
        stride = task.num_classes // classes                # k % stride: not the same fill and palette all along
        order = [k % classes * task.num_classes // classes + k % stride for k in range(columns)]
        seen = {k: itertools.cycle((labels == k).nonzero()[:, 0].tolist()) for k in set(order)}
        rows += [task.images["val"][next(seen[k])] for k in order]
    sheet = F.interpolate(torch.stack(rows).float() / 255, scale_factor=zoom, mode="nearest")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    save_image(make_grid(sheet, nrow=columns, padding=2, pad_value=1), path)


def difficulty(task):
    """Test accuracy (%) of a linear model on normalised pixels, and of a ViT of width 48, depth 3, patches of 1/4."""
    if task.segmentation:
        fail(f"--difficulty compares classifiers of images, but {task.name} has a class for every pixel: leave it out")
    torch.manual_seed(0)
    size = task.images["train"].shape[-1]
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * size * size, task.num_classes))
    config = ViTConfig(size, size // 4, width=48, depth=3, heads=6, num_classes=task.num_classes, pooling="avg")
    steps = max(1250, len(task.labels["train"]) // 16)           # at least 80,000 images and at least four epochs
    fit(linear, task, steps=1500, batch_size=256, lr=1e-3, weight_decay=0.1, recipe="none")
    vit = fit(ViT(config), task, steps, batch_size=64, lr=2e-3, weight_decay=0.05, recipe="shift")
    return accuracy(linear, task, "test", "cpu"), accuracy(vit, task, "test", "cpu")


def main(argv=None):
    parser = Parser(description="Draw the mini visual decathlon and show it.")
    parser.add_argument("--output", help="where the contact sheet goes [results/contact_sheet.png; runs/ with --check]")
    parser.add_argument("--check", metavar="NAME", help="say what is there of a real dataset or a folder of images")
    parser.add_argument("--tokens", default="", help="--check of texts: folder with GPT-2's vocab.json and merges.txt [bytes]")
    parser.add_argument("--data-dir", default="data", help="folder of the real datasets and of the cache (drawn/ inside it)")
    parser.add_argument("--image-size", type=positive, default=32, help="side of the drawn images in pixels")
    parser.add_argument("--seed", type=whole, default=0, help="seed of the drawn images")
    parser.add_argument("--workers", type=positive, default=2, help="threads that draw, processes that read folders")
    parser.add_argument("--difficulty", action="store_true", help="print how hard each task is instead (minutes)")
    parser.add_argument("--tasks", help="comma-separated drawn tasks or folders; all drawn ones (--difficulty: but scenes)")
    args = parser.parse_args(argv)
    args.output = args.output or (f"runs/check-{args.check.strip('/').replace('/', '-')}.png" if args.check else
                                  "results/contact_sheet.png")
    if not args.output.endswith((".png", ".jpg")):
        fail(f"--output {args.output} must end in .png or .jpg")
    if args.check in TEXTS:
        return check_texts(args.check, args.data_dir, args.tokens)
    if args.check:
        return check(args.check, args.data_dir, args.image_size, args.workers, args.output)
    names = args.tasks.split(",") if args.tasks else [n for n in DRAWN if not (args.difficulty and SPECS[n].masks)]
    tasks = load_many(names, args.data_dir, args.image_size, args.seed, args.workers)
    if not args.difficulty:
        contact_sheet(tasks, args.output)
        print(f"{args.output}: one row per task: {', '.join(tasks)}")
        return
    print("| task | classes | train / val / test | chance | linear on pixels | ViT 48x3 |\n|---|---|---|---|---|---|")
    for task in tasks.values():
        sizes = " / ".join(f"{len(task.labels[split]):,}" for split in SPLITS)
        numbers = " | ".join(f"{value:.1f}" for value in (100 / task.num_classes, *difficulty(task)))
        print(f"| {task.name} | {task.num_classes} | {sizes} | {numbers} |", flush=True)



import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import IMAGENET, Parser, ViT, ViTConfig, accuracy, cosine_lr, fail, positive, whole, write_atomically

DRAWN_VERSION = 1                   # part of the cache's file names: raise it when any drawing changes
CHUNK = 125                         # images drawn at a time from one random stream; its arrays fit a core's cache
f4 = np.float32


# ---------------------------------------------------------------------------------------------------------------
# Drawing: a canvas of n images, poses, soft edges, colours, noise
# ---------------------------------------------------------------------------------------------------------------
# A number per image has shape [n, 1, 1], a field of numbers per pixel [n, S, S], a colour [n, 3, 1, 1]. y points down.

Pose = namedtuple("Pose", "u v edge")               # local coordinates [n, S, S]; width of one pixel in them [n, 1, 1]


def exact(values):
    """Round float64 values that came from sin, cos and the like, so that every library agrees on the float32."""
    return (np.round(np.asarray(values, np.float64) * 2 ** 20) / 2 ** 20).astype(f4)


class Canvas:
    """n images of size x size being drawn: pixels [n, 3, S, S] in [0, 1], coordinates x and y, a random stream."""

    def __init__(self, n, size, rng):
        axis = (np.arange(size, dtype=f4) + 0.5) * f4(2 / size) - 1
        self.n, self.size, self.rng, self.pixel = n, size, rng, f4(2 / size)
        self.x, self.y = axis[None, None, :], axis[None, :, None]
        self.pixels = np.zeros((n, 3, size, size), f4)

    def uniform(self, low, high, *shape):
        return self.rng.random((self.n, *(shape or (1, 1))), dtype=f4) * f4(high - low) + f4(low)

    def coin(self, p=0.5):
        return self.rng.random((self.n, 1, 1), dtype=f4) < f4(p)

    def pick(self, k):
        return self.rng.integers(k, size=self.n)

    def pose(self, shift, turn, scale):
        """A frame at a random place (up to shift), angle (up to turn radians) and scale (low, high) per image."""
        angle, scale = self.uniform(-turn, turn), self.uniform(*scale)
        return self.frame(self.uniform(-shift, shift), self.uniform(-shift, shift), angle, scale)

    def frame(self, x, y, angle, scale):
        c, s = exact(np.cos(angle.astype(np.float64))) / scale, exact(np.sin(angle.astype(np.float64))) / scale
        x, y = self.x - x, self.y - y
        return Pose(c * x + s * y, c * y - s * x, self.pixel / scale)

    def paint(self, mask, colour):
        """Lay a colour ([n, 3, 1, 1]) over the images where mask ([n, S, S], 0 to 1) says."""
        self.pixels += (colour - self.pixels) * mask[:, None]

    def noise(self, cells):
        """Smooth random field [n, S, S] in [0, 1]: random values on a grid of cells x cells, smoothly interpolated."""
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
        """Uneven light, pixel noise and bytes. The noise is drawn last: nothing else then depends on the size."""
        gx, gy = self.uniform(-light, light), self.uniform(-light, light)
        self.pixels *= (1 + gx * self.x + gy * self.y)[:, None]
        self.pixels += (self.rng.random((self.n, 1, self.size, self.size), dtype=f4) - 0.5) * f4(2 * grain)
        return np.floor(np.clip(self.pixels, 0, 1) * 255 + 0.5).astype(np.uint8, order="C")


def cover(distance, edge):
    """How much of a pixel lies inside a shape, from the signed distance to its edge (negative inside)."""
    return np.clip(0.5 - distance / edge, 0, 1)


def hsv(hue, saturation, value):
    """Colours [n, 3, 1, 1] from hue (turns), saturation and value, each [n, 1, 1] or a number."""
    hue, saturation, value = (np.asarray(t, f4).reshape(-1, 1, 1) for t in (hue, saturation, value))
    k = np.stack([hue * 6 + f4(n) for n in (5, 3, 1)], 1)
    k = k - 6 * np.floor(k / 6)
    return value[:, None] * (1 - saturation[:, None] * np.clip(np.minimum(k, 4 - k), 0, 1))


def contrast(c, gap=0.35, bright=0.7):
    """Brightness of figure and ground, at least gap apart; the figure is the brighter one with chance `bright`.

    That the sign varies is what a linear model on pixels fails on, while the eye hardly notices.
    """
    dark = c.uniform(0.12, 0.9 - gap)
    light = dark + gap + (f4(0.95 - gap) - dark) * c.uniform(0, 1)
    flip = c.coin(bright)
    return either(flip, light, dark), either(flip, dark, light)


def either(condition, yes, no):
    """np.where in float32."""
    return np.where(condition, yes, no).astype(f4)


def by_kind(functions, kinds, *arrays):
    """Row i of the result is functions[kinds[i]] of row i of the arrays: one call per kind, not per image."""
    out = np.empty(arrays[0].shape, f4)
    for kind in np.unique(kinds):
        rows = np.flatnonzero(kinds == kind)
        out[rows] = functions[kind](*[a[rows] for a in arrays])
    return out


def wave(t):
    """A smooth wave of period 1 between -1 and 1, made of + and * (sin is not the same on every machine)."""
    t = abs(t - np.floor(t) - 0.5) * 4 - 1
    return t * (1.5 - 0.5 * t * t)


# ---------------------------------------------------------------------------------------------------------------
# Shapes: signed distances (or close to it) for coordinates u, v; about 1 across from the centre
# ---------------------------------------------------------------------------------------------------------------
def length(u, v):
    return np.sqrt(u * u + v * v)


def box(u, v, left, right, top, bottom):
    return np.maximum(np.maximum(left - u, u - right), np.maximum(top - v, v - bottom))


def polygon(u, v, corners, radius, start=0.0):
    """A regular polygon; start turns its first side, in fractions of a turn (0 is to the right)."""
    angles = 2 * np.pi * (start + np.arange(corners) / corners)
    sides = [u * c + v * s for c, s in zip(exact(np.cos(angles)), exact(np.sin(angles)))]
    return np.maximum.reduce(sides) - radius


def star(u, v, points=5, outer=0.95, sharp=0.38):
    """A star as the union of kites: for every point, the two sides that meet in it."""
    spokes = 2 * np.pi * (np.arange(points) / points - 0.25)
    result = None
    for c, s in zip(exact(np.cos(spokes)), exact(np.sin(spokes))):
        along, across = u * c + v * s, abs(v * c - u * s)
        kite = np.maximum(sharp * (along - outer) + across * 0.92, -along - 0.1)
        result = kite if result is None else np.minimum(result, kite)
    return result


def heart(u, v):
    u, v = abs(u), v + 0.12
    lobes = length(u - 0.4, v + 0.28) - 0.46
    return np.minimum(lobes, np.maximum((u + v) * 0.707 - 0.6, -v - 0.28 + 0.1 * u))


def tapered(u, v, top_width, bottom_width, top, bottom):
    """A shape symmetric in u whose half width goes from top_width to bottom_width."""
    slope = (bottom_width - top_width) / (bottom - top)
    return np.maximum(abs(u) - (top_width + slope * (v - top)), np.maximum(top - v, v - bottom))


SHAPES = {
    "disc": lambda u, v: length(u, v) - 0.78,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) - 0.68,
    "triangle": lambda u, v: polygon(u, v - 0.15, 3, 0.5, 0.25),
    "star": lambda u, v: star(u, v),
    "ring": lambda u, v: abs(length(u, v) - 0.6) - 0.24,
    "cross": lambda u, v: np.maximum(np.minimum(abs(u), abs(v)) - 0.26, np.maximum(abs(u), abs(v)) - 0.85),
    "heart": heart,
    "moon": lambda u, v: np.maximum(length(u, v) - 0.85, 0.68 - length(u - 0.42, v)),
    "hourglass": lambda u, v: np.maximum((abs(u) - abs(v)) * 0.8 - 0.08, abs(v) - 0.75),
    "arrow": lambda u, v: np.minimum(box(u, v, -0.8, 0.1, -0.24, 0.24),
                                     np.maximum(abs(v) * 0.75 + u * 0.66 - 0.55, -0.05 - u)),
}
NEW_SHAPES = {                      # for the near tasks: none of them is in base, objects or wide
    "drop": lambda u, v: union(length(u, v - 0.25) - 0.55, np.maximum(abs(u) * 0.889 - (v + 0.95) * 0.458, v)),
    "half disc": lambda u, v: np.maximum(length(u, v - 0.4) - 0.88, v - 0.4),
    "kite": lambda u, v: np.maximum(abs(u) * 0.764 - (v + 0.25) * 0.646 - 0.42, abs(u) * 0.909 + (v + 0.25) * 0.417 - 0.5),
    "tee": lambda u, v: union(box(u, v, -0.8, 0.8, -0.8, -0.3), box(u, v, -0.25, 0.25, -0.8, 0.85)),
    "bucket": lambda u, v: tapered(u, v, 0.82, 0.42, -0.65, 0.65),
    "arch": lambda u, v: np.maximum(union(length(u, v + 0.1) - 0.78, box(u, v, -0.78, 0.78, -0.1, 0.8)),
                                    -union(length(u, v + 0.1) - 0.36, box(u, v, -0.36, 0.36, -0.1, 1.0))),
    "stairs": lambda u, v: union(box(u, v, -0.8, 0.8, 0.27, 0.8), box(u, v, -0.8, 0.27, -0.27, 0.8),
                                 box(u, v, -0.8, -0.27, -0.8, 0.8)),
    "dumbbell": lambda u, v: union(length(abs(u) - 0.55, v) - 0.38, box(u, v, -0.55, 0.55, -0.17, 0.17)),
}
ALL_SHAPES = [*SHAPES.values(), *NEW_SHAPES.values()]
SHAPE_NAMES = [*SHAPES, *NEW_SHAPES]

# Strokes are written as points, column then row, each from 0 to 8 and joined by lines; "/" lifts the pen.


def strokes(*drawings):
    """Line segments [drawing, segment, (x0, y0, x1, y1)] with coordinates in [-1, 1], padded by repeats."""
    tables = []
    for drawing in drawings:
        segments = []
        for line in drawing.split("/"):
            points = [((int(p[0]) - 4) / 4, (int(p[1]) - 4) / 4) for p in line.split()]
            segments += [a + b for a, b in zip(points, points[1:])]
        tables.append(segments)
    longest = max(map(len, tables))
    return np.array([t + [t[-1]] * (longest - len(t)) for t in tables], f4)


def ink(u, v, segments):
    """Distance [n, S, S] to the nearest of each image's segments [n, m, 4]."""
    nearest = None
    for k in range(segments.shape[1]):
        x, y, x1, y1 = (segments[:, k, i, None, None] for i in range(4))
        dx, dy, px, py = x1 - x, y1 - y, u - x, v - y
        t = np.clip((px * dx + py * dy) / (dx * dx + dy * dy + 1e-6), 0, 1)
        px, py = px - t * dx, py - t * dy
        square = px * px + py * py
        nearest = square if nearest is None else np.minimum(nearest, square)
    return np.sqrt(nearest)


# ---------------------------------------------------------------------------------------------------------------
# The tasks: each function fills a canvas with images of the given classes [n]
# ---------------------------------------------------------------------------------------------------------------
FILLS = ("plain", "striped", "checked", "dotted")
PALETTES = ("warm", "cool")
BASE_CLASSES = [(s, t, p) for s in (0, 3, 4, 5) for t in range(4) for p in (0, 1)]
WIDE_CLASSES = [(s, t, p) for s in range(10) for t in range(4) for p in (0, 1)]
KINDS_CLASSES = [(s, 0, p) for s in range(10, 15) for p in (0, 1)]
VARIETY_CLASSES = [(s, t, p) for s in range(10, 18) for t in (0, 2) for p in (0, 1)]
TAIL_CLASSES = [(s, t, p) for s in range(12, 18) for t in (1, 3) for p in (0, 1)]
# From 373 images down to 21, and not shape by shape: 7 has no factor in common with 24. Every stretch is a fair sample.
TAIL_COUNTS = [round(373 * 18 ** (-(7 * k % 24) / 23)) for k in range(24)]
TAIL_PATTERN = [k for _, k in sorted(((i + 0.5) / n, k) for k, n in enumerate(TAIL_COUNTS) for i in range(n))]


def fill_pattern(u, v, fill, edge):
    """The mask of a fill's second colour; fill indexes FILLS."""
    stripe, other = wave(u * 2.2), wave(v * 2.2)
    value = np.select([fill == 0, fill == 1, fill == 2], [-9, wave(v * 2.2), stripe * other * 2],
                      stripe + other - 0.6).astype(f4)
    return cover(-value / 9, edge)


def draw_things(c, labels, classes, bright, strong):
    shape, fill, palette = np.array(classes)[labels].T[:, :, None, None]
    near, far = contrast(c, 0.4, bright)
    hue = either(palette == 0, c.uniform(-0.06, 0.16), c.uniform(0.44, 0.72))
    ground = c.uniform(0, 1)
    c.background(hsv(ground, c.uniform(0.1, 0.6), far), hsv(ground, 0.4, far * 0.85))
    paint_thing(c, c.pose(0.08, 0.18, (0.8, 0.95)), shape[:, 0, 0], fill, hue, strong, near, far)
    return c.finish()


def paint_thing(c, p, shape, fill, hue, strong, near, far):
    """Paint a filled shape of brightness near on a ground of brightness far; returns how much of each pixel it covers."""
    inside = cover(by_kind(ALL_SHAPES, shape, p.u, p.v), p.edge)
    c.paint(inside, hsv(hue, c.uniform(*strong), near))
    second = hsv(hue + c.uniform(-0.05, 0.05), 0.5, either(near > far, near * 0.35, near + 0.5))
    pattern = fill_pattern(p.u + c.uniform(0, 0.08), p.v + c.uniform(0, 0.08), fill, p.edge)
    c.paint(inside * pattern, second)
    return inside


def things(classes, bright=0.7, strong=(0.45, 0.85)):
    names = [f"{PALETTES[p]} {FILLS[t]} {SHAPE_NAMES[s]}" for s, t, p in classes]
    return (lambda c, labels: draw_things(c, labels, classes, bright, strong)), names


SCENE_SHAPES = 8                    # the first of SHAPES; the class after them is the background


def draw_scenes(c, labels):
    """3 to 5 things painted over one another; their classes per pixel are channel 3. The labels given are not used.

    A thing's edge is soft: where it covers a pixel neither nearly nor hardly at all, the class is IGNORED.
    """
    far, ground, count = c.uniform(0.35, 0.6), c.uniform(0, 1), 3 + c.pick(3)[:, None, None]
    c.background(hsv(ground, c.uniform(0.1, 0.6), far), hsv(ground, 0.4, far * 0.85))
    mask = np.full((c.n, c.size, c.size), SCENE_SHAPES, np.uint8)
    for k in range(5):
        shape, fill, palette = c.pick(SCENE_SHAPES), c.pick(4)[:, None, None], c.coin()
        near = far + either(c.coin(), c.uniform(0.3, 0.4), c.uniform(-0.3, -0.25))
        hue = either(palette, c.uniform(-0.06, 0.16), c.uniform(0.44, 0.72))
        x, y = either(k < count, c.uniform(-0.75, 0.75), 9), c.uniform(-0.75, 0.75)      # 9: out of sight
        p = c.frame(x, y, c.uniform(-0.18, 0.18), c.uniform(0.34, 0.42))
        inside = paint_thing(c, p, shape, fill, hue, (0.45, 0.85), near, far)
        mask = np.where(inside >= 0.9, shape[:, None, None], np.where(inside > 0.1, IGNORED, mask)).astype(np.uint8)
    return np.concatenate([c.finish(), mask[:, None]], 1)


WINGS = {"straight": (0.24, -0.12, 0.05, 0.0, 0.9), "swept": (0.34, -0.0, 0.75, 0.6, 0.85),
         "delta": (0.45, -0.6, 1.35, 0.0, 0.75), "forward": (-0.1, -0.45, -0.5, -0.45, 0.8)}   # nose, tail, slopes, span
ENGINES = ("glider", "twin")
TAILS = ("small tail", "large tail", "canard")
AIRCRAFT = [f"{w}-wing {e}, {t}" for w in WINGS for e in ENGINES for t in TAILS]


def wing(u, v, nose, tail, front_slope, back_slope, span):
    front, back = u - (nose - front_slope * v), (tail - back_slope * v) - u
    return np.maximum(np.maximum(front, back) * 0.8, v - span)


def silhouette(p, labels):
    """Distance to an aircraft seen from above, its nose along u."""
    u, v = p.u, abs(p.v)
    nose, tail, front, back, span = np.array(list(WINGS.values()), f4)[labels // 6].T[:, :, None, None]
    twin, kind = ((labels // 3) % 2)[:, None, None], (labels % 3)[:, None, None]
    taper = either(u > 0, u - 0.55, -0.6 - u)
    body = np.maximum(v - 0.11 + np.clip(taper, 0, 1) * 0.3, abs(u) - 0.95)
    main = wing(u, v, nose, tail, front, back, span)
    place = either(kind == 2, 0.6, -0.72)
    rear = wing(u - place, v, 0.13, -0.11, 0.35, 0.2, either(kind == 1, 0.5, 0.32))
    y = span * 0.5
    middle = (nose + tail) / 2 - (front + back) / 2 * y + 0.12
    pods = either(twin == 1, box(u, v, middle - 0.12, middle + 0.3, y - 0.1, y + 0.1), 9)
    return np.minimum(np.minimum(body, main), np.minimum(rear, pods))


def draw_aircraft(c, labels):
    near, far = contrast(c, 0.3)
    hue = c.uniform(0, 1)
    c.background(hsv(hue, c.uniform(0.2, 0.6), far), hsv(hue + c.uniform(-0.1, 0.1), 0.4, far * 0.85))
    angle, scale, x, y = c.uniform(-1.88, -1.26), c.uniform(0.87, 0.97), c.uniform(-0.05, 0.05), c.uniform(-0.05, 0.05)
    p = c.frame(x + c.uniform(-0.15, 0.15), y + 0.14, angle, scale)
    c.paint(cover(silhouette(p, labels), p.edge + 0.08) * c.uniform(0, 0.3), 0)        # its shadow
    p = c.frame(x, y, angle, scale)
    c.paint(cover(silhouette(p, labels), p.edge), hsv(c.uniform(0, 1), c.uniform(0, 0.4), near))
    c.paint(cover(length((p.u - 0.62) * 0.6, p.v) - 0.06, p.edge), hsv(0.58, 0.5, far * 0.6))
    return c.finish()


OBJECT_SHAPES = (0, 2, 3, 4, 5, 7)
OBJECTS = [f"{SHAPE_NAMES[a]} and {SHAPE_NAMES[b]}" for a in OBJECT_SHAPES for b in OBJECT_SHAPES]


def draw_objects(c, labels):
    """Class = (shape on the left, shape on the right)."""
    near, far = contrast(c, 0.45)
    ground = c.uniform(0, 1)
    c.background(hsv(ground, 0.35, far), hsv(ground, 0.4, far * 0.9))
    functions = list(SHAPES.values())
    for side, kind in ((-0.47, labels // 6), (0.47, labels % 6)):
        x, y = c.uniform(-0.04, 0.04) + side, c.uniform(-0.08, 0.08)
        p = c.frame(x, y, c.uniform(-0.12, 0.12), c.uniform(0.5, 0.55))
        d = by_kind(functions, np.array(OBJECT_SHAPES)[kind], p.u, p.v)
        c.paint(cover(d, p.edge), hsv(c.uniform(0, 1), c.uniform(0.2, 0.6), near))
    return c.finish()


def limbs(c, *segments):
    """Segments [n, m, 4] from ends (x0, y0, x1, y1) that are numbers or columns [n, 1, 1]."""
    return np.stack([np.stack([np.broadcast_to(np.ravel(t), c.n) for t in ends], 1) for ends in segments], 1).astype(f4)


def draw_pedestrian(c, labels):
    """Grey. Class 1 is a walker; class 0 is a lamp post, sign or bare tree of as many strokes and the same dot."""
    near, far = contrast(c, 0.35)
    c.background(hsv(0, 0, far), hsv(0, 0, far * 0.7), 4)
    c.paint(cover(abs(c.x - c.uniform(-1, 1)) - c.uniform(0.03, 0.15), c.pixel), hsv(0, 0, c.uniform(0.1, 0.9)))
    p = c.pose(0.12, 0.08, (0.78, 0.97))
    lean, spread, stride, swing = (c.uniform(-t, t) for t in (0.06, 0.1, 0.35, 0.3))
    walker = limbs(c, (lean, -0.45, 0, 0.15), (0, 0.15, stride, 0.9), (0, 0.15, spread - stride, 0.9),
                   (lean, -0.4, lean + swing + 0.15, 0.1), (lean, -0.4, lean - swing - 0.15, 0.1))
    fork, high = c.uniform(-0.5, 0.5), c.uniform(-0.5, 0.4)
    post = limbs(c, (0, -0.9, 0, 0.9), (0, high, fork, high - 0.3), (0, high, -fork, high - 0.3),
                 (0, high + 0.25, fork * 0.7, high), (0, 0.5, 0, 0.9))
    yes = labels[:, None, None] == 1
    d = ink(p.u, p.v, np.where(yes, walker, post)) - either(yes, 0.11, 0.09)
    head = length(p.u - either(yes, lean, fork), p.v - either(yes, -0.73, c.uniform(-0.8, 0.2))) - 0.17
    c.paint(cover(np.minimum(d, head), p.edge), hsv(0, 0, near))
    return c.finish(0.05)


# Textures are heights in about [-1, 1] of coordinates with period 1 and a random field r for the irregular ones.
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


def draw_signs(c, labels):
    ground = c.uniform(0, 1)
    c.background(hsv(ground, 0.4, c.uniform(0.15, 0.9)), hsv(ground + 0.3, 0.3, c.uniform(0.15, 0.9)))
    p = c.pose(0.06, 0.1, (0.85, 0.98))
    d = by_kind(list(PLATES.values()), labels // 8, p.u, p.v)
    # Red rim on white, white on blue, black on yellow, white on green ... the colours say nothing about the class.
    hue = np.array([0.99, 0.6, 0.13, 0.38], f4)[c.pick(4)][:, None, None] + c.uniform(-0.03, 0.03)
    bright, strong, pale = c.uniform(0.6, 1), c.uniform(0.65, 0.95), c.uniform(0, 0.12)
    inverted = c.coin()
    colour, white = hsv(hue, strong, bright * 0.85), hsv(0.12, pale, bright)
    rim, face = either(inverted[:, None], white, colour), either(inverted[:, None], colour, white)
    c.paint(cover(d, p.edge), rim)
    c.paint(cover(d + 0.13, p.edge), face)
    u, v = p.u / 0.38, (p.v - either(labels // 8 == 0, 0.2, 0)[:, None, None]) / 0.38
    symbol = ink(u, v, SYMBOL_STROKES[labels % 8]) - c.uniform(0.2, 0.3)
    c.paint(cover(symbol, p.edge / 0.38), either(inverted[:, None], white, hsv(0, 0, 0.15 * bright)))
    return c.finish()


def glyph_strokes(count=100, candidates=1500):
    """Stroke characters [count, 7, 4]: of many random ones, each next one is the most unlike those chosen before."""
    rng = np.random.default_rng(7)
    found = np.zeros((candidates, 7, 4), f4)
    for glyph in found:
        segments = []
        for lines in (3, 3, 1)[:rng.integers(2, 4)]:        # strokes that visit random points of a 3 x 3 grid
            place = rng.permutation(9)[:lines + 1]
            points = np.stack([place % 3, place // 3], 1) * 0.8 - 0.8 + rng.random((lines + 1, 2)) * 0.3 - 0.15
            segments += list(np.concatenate([points[:-1], points[1:]], 1))
        glyph[:] = segments + [segments[-1]] * (7 - len(segments))
    c = Canvas(candidates, 10, rng)
    looks = np.minimum(ink(c.x / 0.9, c.y / 0.9, found), 0.6).reshape(candidates, -1)
    chosen, distance = [0], np.full(candidates, 9.0)
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
    d = ink(p.u + slant * p.v, p.v, segments) - c.uniform(0.09, 0.13)
    c.paint(cover(d, p.edge), hsv(tint + 0.5 * c.coin(), 0.1, near))
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
    gap, ink_colour, thick = c.uniform(1.3, 1.55), hsv(c.uniform(0, 1), c.uniform(0, 0.7), near), c.uniform(0.12, 0.18)
    d = ink(p.u, p.v, DIGITS[labels] + c.uniform(-0.05, 0.05, DIGITS.shape[1], 4))
    for side in (-gap, gap):
        other = ink(p.u + side, p.v, DIGITS[c.pick(10)])
        d = either(c.coin(0.75), np.minimum(d, other), d)
    c.paint(cover(d - thick, p.edge), ink_colour)
    return c.finish()


# Paths of a moving body. It leaves a trace on grey, faint where it was early and strong where it is late.
PATHS = {"across": "04 84", "down": "40 48", "rising": "17 71", "falling": "11 77", "hop": "07 24 42 64 87",
         "dip": "01 24 46 64 81", "circle": "40 71 84 77 48 17 04 11 30", "zigzag": "02 26 42 66 82",
         "stairs": "08 05 35 32 62 60", "hook": "11 17 77 74", "loop": "07 45 72 50 22 45 87",
         "spiral": "44 64 66 36 22 40 72 85"}
MOTIONS = [f"{name} {direction}" for name in PATHS for direction in ("forward", "backward")]


def path_points(count=16):
    """Points [path, count, 2] at equal steps along each path."""
    points = []
    for segments in (strokes(path)[0].astype(np.float64) for path in PATHS.values()):
        corners = np.concatenate([segments[:1, :2], segments[:, 2:]])
        far = np.concatenate([[0], np.cumsum(np.sqrt(((segments[:, 2:] - segments[:, :2]) ** 2).sum(1)))])
        at = np.linspace(0, far[-1], count)
        points.append(np.stack([np.interp(at, far, corners[:, i]) for i in range(2)], 1))
    return exact(points)


PATH_POINTS = path_points()


def draw_motion(c, labels):
    c.background(hsv(c.uniform(0, 1), 0.06, 0.55), hsv(0, 0, c.uniform(0.4, 0.5)), 4)
    p = c.pose(0.12, 0.15, (0.65, 0.85))
    points = PATH_POINTS[labels // 2] + c.uniform(-0.05, 0.05, 1, 2)
    radius, count = c.uniform(0.22, 0.32), points.shape[1]
    track = np.zeros((c.n, c.size, c.size), f4)
    for k in range(count):
        age = either(labels % 2 == 0, k, (count - 1 - k))[:, None, None] / (count - 1)
        dx, dy = p.u - points[:, k, 0, None, None], p.v - points[:, k, 1, None, None]
        near = np.maximum(1 - (dx * dx + dy * dy) / (radius * radius), 0)
        track = np.maximum(track, near * (0.12 + 0.88 * age))
    for _ in range(2):                                      # other bodies that move on the spot
        d = length(c.x - c.uniform(-1, 1), c.y - c.uniform(-1, 1))
        track += np.maximum(1 - d * 6, 0) * c.uniform(-0.8, 0.8)
    c.pixels += (track * c.uniform(0.35, 0.45) * either(c.coin(0.65), 1, -1))[:, None]
    return c.finish(0.04, 0.1)


PETALS, FORMS, HEARTS = (3, 4, 5, 8), ("round", "pointed", "notched"), ("small", "large")
FLOWERS = [f"{n} {form} petals, {h} heart" for n in PETALS for form in FORMS for h in HEARTS]


def petals(u, v, n, form):
    """Distance to a ring of n petals; form indexes FORMS."""
    wide = {3: 0.36, 4: 0.33, 5: 0.27, 8: 0.16}[n]
    result, angles = None, 2 * np.pi * np.arange(n) / n
    for c, s in zip(exact(np.cos(angles)), exact(np.sin(angles))):
        a, b = u * c + v * s, abs(v * c - u * s)
        if form == 0:
            d = (length((a - 0.52) * (wide / 0.42), b) - wide) * 1.2
        elif form == 1:
            d = (b - (wide * 1.05) * (1 - abs(a - 0.45) / 0.53)) * 0.8
        else:
            d = np.minimum(length(a - 0.62, b - (wide * 0.6)) - (wide * 0.62), np.maximum(b - a * (wide * 1.2), a - 0.6))
        result = d if result is None else np.minimum(result, d)
    return result


PETAL_SHAPES = [lambda u, v, n=n, form=form: petals(u, v, n, form) for n in PETALS for form in range(3)]


def draw_flowers(c, labels):
    near, far = contrast(c, 0.35)
    ground = c.uniform(0.1, 0.6)
    c.background(hsv(ground, c.uniform(0.1, 0.5), far), hsv(ground + 0.05, 0.5, far * 0.75), 5)
    hue, p = c.uniform(0, 1), c.pose(0.08, 0.5, (0.88, 1.0))
    d = by_kind(PETAL_SHAPES, labels // 2, p.u, p.v)
    c.paint(cover(d, p.edge), hsv(hue, c.uniform(0.15, 0.6), near))
    inner = hsv(hue + c.uniform(-0.1, 0.1), c.uniform(0.2, 0.7), np.minimum(near * 1.2, 1))
    c.paint(cover(d + 0.12, p.edge + 0.2) * 0.5, inner)
    size = either(labels % 2 == 0, 0.14, 0.32)[:, None, None] * c.uniform(0.9, 1.1)
    c.paint(cover(length(p.u, p.v) - size, p.edge), hsv(c.uniform(0.08, 0.17), 0.8, either(near > far, near * 0.6, 0.9)))
    return c.finish()


def union(*distances):
    return np.minimum.reduce(distances)


def sleeves(u, v, reach, drop):
    """Two sleeves from the shoulders outwards, reach wide, drop long."""
    return np.maximum(np.maximum(abs(v + 0.72 - (abs(u) - 0.35) * drop) - 0.2, abs(u) - reach), 0.2 - abs(u))


def opening(u, v, top, gap, slope):
    """Negative outside a slit that begins at height top and widens downwards: np.maximum(shape, opening) cuts it out."""
    return np.minimum(gap + slope * (v - top) - abs(u), v - top)


CLOTHES = {
    "t-shirt": lambda u, v: union(tapered(u, v, 0.42, 0.42, -0.85, 0.75), sleeves(u, v, 0.8, 0.45)),
    "trousers": lambda u, v: np.maximum(tapered(u, v, 0.36, 0.5, -0.9, 0.9), opening(u, v, -0.35, 0.04, 0.12)),
    "pullover": lambda u, v: union(tapered(u, v, 0.42, 0.42, -0.8, 0.7), sleeves(u, v, 0.88, 2.2)),
    "dress": lambda u, v: union(tapered(u, v, 0.3, 0.2, -0.9, -0.1), tapered(u, v, 0.2, 0.62, -0.1, 0.9)),
    "coat": lambda u, v: union(np.maximum(tapered(u, v, 0.4, 0.52, -0.9, 0.92), opening(u, v, -0.3, 0.05, 0.05)),
                               sleeves(u, v, 0.85, 2.2)),
    "sandal": lambda u, v: union(box(u, v, -0.9, 0.9, 0.42, 0.58), np.maximum(abs(u - 0.1) - 0.6,
                                 abs(abs(v - 0.1) - 0.6 * abs(u - 0.1)) - 0.09)),
    "shirt": lambda u, v: np.maximum(union(tapered(u, v, 0.42, 0.42, -0.85, 0.75), sleeves(u, v, 0.88, 1.6)),
                                     opening(u, -v, 0.35, 0.0, 0.4)),
    "sneaker": lambda u, v: union(box(u, v, -0.9, 0.9, 0.25, 0.55), np.maximum(box(u, v, -0.9, 0.5, -0.25, 0.4),
                                                                               u * 0.6 - v - 0.1)),
    "bag": lambda u, v: union(tapered(u, v, 0.7, 0.8, -0.15, 0.75),
                              np.maximum(abs(length(u * 0.9, v + 0.15) - 0.5) - 0.09, v)),
    "boot": lambda u, v: union(box(u, v, -0.6, 0.05, -0.9, 0.8), np.maximum(box(u, v, -0.6, 0.75, 0.3, 0.8),
                                                                            u * 0.5 - v + 0.2)),
}


def draw_clothing(c, labels):
    near, far = contrast(c, 0.3)
    c.background(hsv(0.6, 0.08, far), hsv(0.1, 0.1, far * 0.8))
    p = c.pose(0.1, 0.2, (0.72, 0.95))
    u = either(c.coin(), p.u, -p.u) * c.uniform(0.9, 1.15)
    inside = cover(by_kind(list(CLOTHES.values()), labels, u, p.v), p.edge)
    hue = c.uniform(0, 1)
    c.paint(inside, hsv(hue, c.uniform(0, 0.5), near))
    weave = fill_pattern(p.u + c.uniform(0, 1), p.v, c.rng.integers(4, size=(c.n, 1, 1)), p.edge)
    c.paint(inside * weave * c.uniform(0, 0.5), hsv(hue, 0.3, far))
    return c.finish()


# Expressions: mouth curve (smile > 0), mouth opening, mouth width, brow height, brow tilt (frown > 0), eye opening.
EXPRESSIONS = {
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
    c.background(hsv(0, 0, far), hsv(0, 0, far * 0.7))
    p = c.pose(0.07, 0.15, (0.85, 1.02))
    u, v = p.u, p.v
    means = np.array(list(EXPRESSIONS.values()), f4)[labels].T[:, :, None, None]
    curve, open_, width, height, tilt, eye = (t * c.uniform(0.8, 1.25) + c.uniform(-0.01, 0.01) for t in means)
    skin = hsv(0, 0, near)
    dark = hsv(0, 0, either(near > c.uniform(0.4, 0.6), near * 0.25, near + 0.5))     # ink or chalk
    c.paint(cover(length(u, v + 0.08) - 0.85, p.edge), hsv(0, 0, c.uniform(0.05, 0.9)))
    c.paint(cover(length(u * 1.15, v - 0.1) - 0.8, p.edge), skin)
    a = abs(u)
    white = cover(length((a - 0.32) * 0.7, v + 0.08) - np.maximum(eye, 0.03), p.edge)
    c.paint(white, hsv(0, 0, either(near > 0.5, near * 1.3, near * 0.6)))
    c.paint(white * cover(length(a - 0.32, v + 0.08) - 0.09, p.edge), dark)
    brow = np.maximum(abs(v + 0.36 + height - tilt * (0.32 - a)) - 0.055, abs(a - 0.33) - 0.2)
    c.paint(cover(brow, p.edge), dark)
    c.paint(cover(np.maximum(a - 0.05 - (v - 0.1) * 0.2, abs(v - 0.12) - 0.12), p.edge) * 0.4, dark)
    bend = v - 0.48 - curve * (width * width * 0.5 - u * u) * 2
    mouth = np.maximum(abs(bend) - (open_ + 0.05) * np.maximum(1 - u * u / (width * width) * 0.6, 0), a - width)
    c.paint(cover(mouth, p.edge), dark)
    return c.finish()


LESIONS = ("nevus", "melanoma", "keratosis", "carcinoma", "scaly patch", "vascular", "fibroma")
LESION_PATTERN = (0, 1, 2, 3, 0, 4, 5, 0, 6, 2, 0, 1, 0, 3, 0, 2, 1, 0, 4, 0)      # mostly nevi, as in HAM10000


def draw_lesions(c, labels):
    """Class = build (even, patchy, speckled, ringed, ...), never the colour alone: skin, light and tint vary."""
    tone = c.uniform(0.4, 0.95)
    c.background(hsv(c.uniform(0.03, 0.08), c.uniform(0.25, 0.5), tone), hsv(0.04, 0.4, tone * 0.9))
    kind = labels[:, None, None]
    p = c.pose(0.08, 3.1, (0.8, 1.0))
    ragged, fine = c.noise(5) - 0.5, c.noise(8) - 0.5
    rough = np.array([0.05, 0.75, 0.25, 0.1, 0.5, 0.1, 0.1], f4)[kind]
    d = length(p.u * c.uniform(1, 1.35), p.v) - c.uniform(0.55, 0.72) + rough * ragged
    tint = hsv(c.uniform(-0.02, 0.08), c.uniform(0.4, 0.75), tone * c.uniform(0.35, 0.65))
    inside = cover(d, p.edge + either(kind == 4, 0.35, 0.06))
    c.paint(inside * either(kind == 3, 0.35, 0.9), tint)
    dark, pale = tint * 0.45, hsv(0.05, 0.15, np.minimum(tone * 1.1, 1))
    detail = np.select([kind == 1, kind == 2, kind == 3, kind == 4, kind == 5, kind == 6], [
        cover(0.02 - ragged * 0.8 - fine, p.edge), cover(0.13 - abs(fine), p.edge + 0.06),
        cover(abs(d + 0.1) - 0.07, p.edge), cover(0.12 - fine, p.edge + 0.06),
        cover(abs(wave(p.u * 2 + fine)) - 0.35, p.edge + 0.06), cover(d + 0.3, p.edge + 0.06)], 0)
    light = ((kind == 4) | (kind == 2) | (kind == 6)) ^ c.coin(0.35)
    c.paint(inside * detail, either(light[:, None], pale, dark))
    for _ in range(2):                                      # hairs across the picture
        bend = c.x * c.uniform(-1, 1) + c.uniform(-0.8, 0.8) + c.x * c.x * c.uniform(-0.4, 0.4)
        c.paint(cover(abs(c.y - bend) - 0.02, c.pixel) * either(c.coin(0.35), 0.6, 0), dark)
    return c.finish()


# ---------------------------------------------------------------------------------------------------------------
# The list of drawn tasks, and drawing them once
# ---------------------------------------------------------------------------------------------------------------
Drawing = namedtuple("Drawing", "draw class_names sizes train_labels masks", defaults=(None, False))

SPECS = {
    "base": Drawing(*things(BASE_CLASSES), (24000, 1000, 2000)),
    "aircraft": Drawing(draw_aircraft, AIRCRAFT, (5000, 500, 1000)),
    "objects": Drawing(draw_objects, OBJECTS, (8000, 500, 1000)),
    "pedestrian": Drawing(draw_pedestrian, ["street", "pedestrian"], (4000, 500, 1000)),
    "textures": Drawing(draw_textures, list(TEXTURES), (4000, 500, 1000)),
    "signs": Drawing(draw_signs, SIGNS, (6000, 500, 1000)),
    "glyphs": Drawing(draw_glyphs, [f"glyph {k}" for k in range(100)], (8000, 500, 1000)),
    "digits": Drawing(draw_digits, [str(k) for k in range(10)], (6000, 500, 1000)),
    "motion": Drawing(draw_motion, MOTIONS, (4000, 500, 1000)),
    "flowers": Drawing(draw_flowers, FLOWERS, (4000, 500, 1000)),
    "clothing": Drawing(draw_clothing, list(CLOTHES), (4000, 500, 1000)),
    "faces": Drawing(draw_faces, list(EXPRESSIONS), (4000, 500, 1000)),
    "lesions": Drawing(draw_lesions, list(LESIONS), (6000, 500, 1000), LESION_PATTERN),
    "wide": Drawing(*things(WIDE_CLASSES), (40000, 2000, 4000)),
    # Pale: plain things in strong colours give themselves away to a linear model (97 %), whichever side is the brighter.
    "kinds": Drawing(*things(KINDS_CLASSES, 0.5, (0.15, 0.4)), (2000, 500, 1000)),
    "variety": Drawing(*things(VARIETY_CLASSES), (4000, 500, 1000)),
    "tail": Drawing(*things(TAIL_CLASSES), (3000, 500, 1000), TAIL_PATTERN),
    "scenes": Drawing(draw_scenes, [*SHAPE_NAMES[:SCENE_SHAPES], "background"], (800, 100, 200), masks=True),
}                                   # only ever add at the end: a task's place in the list is part of its random stream
BASE, WIDE = "base", "wide"
DRAWN = tuple(SPECS)
DECATHLON, UNSEEN = DRAWN[1:10], DRAWN[10:13]
NEAR, SCENES = DRAWN[14:17], "scenes"


def drawn_labels(name, split):
    """Labels [N] of a split: all classes in turn, or the task's own pattern in its training images.

    Of a task with masks only their number counts.
    """
    spec = SPECS[name]
    pattern = spec.train_labels if spec.train_labels and split == "train" else range(len(spec.class_names))
    return np.resize(np.array(pattern, np.int64), spec.sizes[SPLITS.index(split)])


def draw_chunk(name, split, chunk, image_size, seed):
    """Images CHUNK * chunk and following of a split, uint8 [n, 3, S, S], masks as a fourth channel.

    They depend on nothing but the arguments.
    """
    labels = drawn_labels(name, split)[chunk * CHUNK:(chunk + 1) * CHUNK]
    rng = np.random.default_rng([seed, DRAWN.index(name), SPLITS.index(split), chunk])
    return SPECS[name].draw(Canvas(len(labels), image_size, rng), labels)


def cache_files(name, *where):
    """Images and, where a task has them, masks: each a file of its own."""
    return [cache_path(part, *where) for part in (name, f"{name}-masks")[:1 + SPECS[name].masks]]


def cache_path(name, split, data_dir, image_size, seed):
    return os.path.join(data_dir, "drawn", f"{name}-{split}-{image_size}px-seed{seed}-v{DRAWN_VERSION}.npy")


def read_cache(name, split, data_dir, image_size, seed):
    """What draw_chunk drew, from the cache, or None where there is nothing or a file is damaged."""
    try:
        files = [np.load(path) for path in cache_files(name, split, data_dir, image_size, seed)]
        images = np.concatenate(files, 1) if len(files) > 1 else files[0]
    except (OSError, ValueError, EOFError):
        return None
    expected = (SPECS[name].sizes[SPLITS.index(split)], 2 + len(files), image_size, image_size)
    return images if images.shape == expected and images.dtype == np.uint8 else None


def draw_missing(names, data_dir, image_size, seed, workers):
    """Draw what is not in the cache, all chunks of all tasks through one pool; returns {(name, split): images}."""
    found = {(n, s): read_cache(n, s, data_dir, image_size, seed) for n in names for s in SPLITS}
    missing = [key for key, images in found.items() if images is None]
    chunks = [(*key, c) for key in missing for c in range(-(-SPECS[key[0]].sizes[SPLITS.index(key[1])] // CHUNK))]
    parts = {key: [] for key in missing}
    with ThreadPoolExecutor(workers) as pool:               # threads will do: numpy lets go of the interpreter lock
        drawn = pool.map(lambda job: draw_chunk(*job, image_size, seed), chunks)
        for (name, split, _), images in tqdm(zip(chunks, drawn), "drawing", len(chunks), leave=False, disable=None):
            parts[name, split].append(images)
    for key in missing:
        found[key] = np.concatenate(parts.pop(key))
        for path, part in zip(cache_files(*key, data_dir, image_size, seed), np.split(found[key], [3], 1)):
            def write(path, part=part):
                with open(path, "wb") as file:
                    np.save(file, part)
            write_atomically(path, write)
    return found


# ---------------------------------------------------------------------------------------------------------------
# Drawn texts: a grammar of short sentences, in which a token can be a byte
# ---------------------------------------------------------------------------------------------------------------
# Each function writes one example, (text, second text or None, label); its docstring says what decides the class.
PEOPLE = ("tom", "ann", "bob", "eve", "jim", "meg", "sam", "zoe", "ben", "amy", "dan", "ida")
BEASTS = ("cat", "dog", "pig", "hen", "fox", "cow", "owl", "ant", "bee", "ram", "ape", "rat", "elk", "cub", "pup", "bat", "hog", "jay")
SYNONYMS = (("saw", "met"), ("hit", "beat"), ("fed", "kept"))
TIMES = ("", " now", " today", " soon", " later", " here", " often", " once")
LOOKS = ("", "", "old ", "big ", "red ", "sad ")
DEEDS = ("ran", "sat", "hid", "ate", "fell", "won", "left", "came", "woke", "sang", "slid", "swam")
AMOUNTS = ("all", "most", "many", "some", "few", "no")
PRAISE, BLAME = ("fun", "fine", "great", "sharp", "warm", "superb"), ("dull", "bad", "weak", "flat", "cold", "awful")


def write_paraphrases(rng):
    """Two sentences that say the same, mostly in other words; else the verbs differ, or who did it to whom."""
    (a, b), verbs, same = rng.sample(PEOPLE, 2), rng.randrange(3), rng.random() < 0.68             # MRPC's share
    first, second, when = rng.choice(SYNONYMS[verbs]), rng.choice(SYNONYMS[verbs]), rng.choice(TIMES)
    c, d = a, b
    if not same and rng.random() < 0.2:
        c, d = b, a
    elif not same:
        second = rng.choice(SYNONYMS[(verbs + rng.randrange(1, 3)) % 3])
    return f"{a} {first} {b}", f"{c} {second} {d}{when}", int(same)


def write_acceptability(rng):
    """A sentence in which verb and subject, article and noun agree and all words are in their places; or one of these is wrong."""
    wrong = None if rng.random() < 0.7 else rng.choice(("verb", "article", "order"))               # CoLA's share
    many, others = (rng.random() < 0.5 or wrong == "article" for _ in range(2))
    article = lambda many: rng.choice(("", "the") if many else ("a", "the"))
    noun = lambda many: rng.choice(BEASTS) + "s" * many
    subject, object = [article(many), rng.choice(LOOKS).strip(), noun(many)], [article(others), noun(others)]
    if wrong == "article":
        rng.choice((subject, object))[0] = "a"
    verb = rng.choice(("see", "like", "fear", "bite", "hear", "chase")) + "s" * (many == (wrong == "verb"))
    words = [word for word in (*subject, verb, *object) if word]
    if wrong == "order":
        k = rng.randrange(len(words) - 1)
        words[k], words[k + 1] = words[k + 1], words[k]
    return " ".join(words), None, int(wrong is None)


def write_entailment(rng):
    """Whether the second sentence follows from the first, which is about more of the same beasts, or about few or none."""
    follows = lambda p, h: p == h or "few" not in (p, h) and "no" not in (p, h) and AMOUNTS.index(p) < AMOUNTS.index(h) or (p, h) == ("no", "few")
    true = rng.random() < 0.5
    pairs = [(p, h) for p in AMOUNTS for h in AMOUNTS if follows(p, h) == true]
    (p, h), beast, look, deed = rng.choice(pairs), rng.choice(BEASTS), rng.choice(LOOKS), rng.choice(DEEDS)
    done = deed
    if not true and rng.random() < 0.15:
        h, done = p, rng.choice([d for d in DEEDS if d != deed])
    return f"{p} {look}{beast}s {deed}", f"{h} {beast}s {done}", int(not true)


def write_sentiment(rng):
    """One or two judgements; "not" turns one round, and after "but" the second counts."""
    good = rng.random() < 0.5

    def judgement(good):
        turned = rng.random() < 0.3
        thing, word = rng.choice(("film", "plot", "cast", "song", "end", "pace", "hero", "joke")), rng.choice(PRAISE if good != turned else BLAME)
        return f"{thing} {rng.choice(('is', 'was'))} {'not ' * turned}{word}"
    form = rng.randrange(3)
    text = (judgement(good), f"{judgement(good)} and {judgement(good)}", f"{judgement(not good)} but {judgement(good)}")[form]
    return text, None, int(good)


GRAMMAR = {     # name -> (class names, metric, writer, training texts): small counterparts of MRPC, CoLA, RTE and IMDB
    "paraphrases": (("no paraphrase", "paraphrase"), "accuracy/F1", write_paraphrases, 6000),
    "acceptability": (("unacceptable", "acceptable"), "Matthews", write_acceptability, 8000),
    "entailment": (("entailment", "no entailment"), "accuracy", write_entailment, 4000),
    "sentiment": (("negative", "positive"), "accuracy", write_sentiment, 8000),
}


@functools.cache
def written(name):
    """{split: [(text, second text or None, label)]} of a drawn text task; 1,000 texts of val, 2,000 of test, and no text twice."""
    write, count = GRAMMAR[name][2:]
    rng, examples = random.Random(name), {}
    while len(examples) < 3000 + count:
        text, second, label = write(rng)
        examples[text, second] = text, second, label
    examples = list(examples.values())
    rng.shuffle(examples)                   # as texts get scarce, so do the classes that have few: all splits share that
    return {"test": examples[:2000], "val": examples[2000:3000], "train": examples[3000:]}


if __name__ == "__main__":
    script(main)
