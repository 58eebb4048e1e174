"""Adaptive-Learngene (Lin et al., AAAI 2026): an expandable ViT learns one new component, a
learngene, per new dataset, with all older ones frozen; a policy picks the few learngenes that suit
a task; descendants of any depth are composed of them.

    python adaptive_learngene.py --stage ancestry               # ten datasets, a learngene of each
    python adaptive_learngene.py --stage ancestry --data DIR    # later: one dataset, learngene more
    python adaptive_learngene.py --stage select --data TASK     # which learngenes suit this task
    python adaptive_learngene.py --stage train --data TASK --depth 6

From Python: pool = open_pool("runs/adaptive/pool"); G = select(pool, task);
net = pool.descendant(depth=4, learngenes=[1, 2, 5], num_classes=10).

The method    The Structure of the Ancestry Model    coefficients, compose, ComposedNetwork
              Training of Learngenes                 new_learngene, loss_ce, optimise, learn, Pool
              Learngene Selection (TALS)             reward, policy_loss, reinforce, select
              Initialization of descendant models    fill, parameter_counts
              Baselines                              initialise
              Image Classification, Segmentation     train_descendant, Segmenter
The program   Settings, Stages                       FLAGS, main

It measures the claims of Tables 1-4 and Figs. 3 and 4. There is no released code; A1, A2, ... mark
decisions where the paper is silent, and docs/decisions.md lists them.

    paper             here                  meaning
    L, l              L, l                  layers of a network; l counts from 1
    N, n              N, n                  learngenes in the pool; n counts from 1
    theta_n^lg        gene                  learngene n, one block: {parameter's name: tensor}
                      theta[name] (N, ...)  that parameter of N learngenes
    a(l, n)           a (L, N)              polynomial of degree n - 1 at (l - 1) / L
    Theta_l           Theta (L, ...)        that parameter in all layers
    G                 G (N,)                0 or 1 per learngene
    p_y(x; theta_G)   softmax(logits)       of the reward head: a new task has no trained one
    phi, pi_phi       phi (N,)              logits of the selection policy
    b                 b                     moving average of rewards
"""
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from tqdm import tqdm

import common
import data
from common import (
    VIT_SIZES, Block, InputError, Run, ViT, accuracy, amount, file_name, load_checkpoint,
    load_weights, parameter_groups, positive, resized_pos_embed, share, start_training, vit_config,
    weight_selection, whole)


# --------------------------------------------------------------------------------------------------
# The Structure of the Ancestry Model
# --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class AncestryConfig:
    """What an ancestry model and its descendants share; they differ in depth and head alone."""
    size: str = "drawn-small"      # width and heads, a name of VIT_SIZES or SWIN_SIZES
    image_size: int = 32           # pixels
    patch: int = 8                 # pixels
    pooling: str = "avg"           # mean of the patches, or class "token" as in DeiT
    basis: str = "chebyshev"       # polynomials of a(l, n) (A1)
    init: str = "zero"             # how a learngene starts (A3)
    stem: str = "shared"           # trained with every dataset, or "frozen" after the first (A2)


def coefficients(L, N, basis="chebyshev"):
    """a(l, n), (L, N): the polynomial of degree n - 1 at x_l = (l - 1) / L (Lin et al. 2024c; A1).

    So learngene 1 is the same in all layers, as Eq. (1) says "used across all layers", and
    learngenes 1 and 2 are TLEG. Basis "printed" is the formula as printed in 2024, Chebyshev's
    T_n(x_l): layer 1 then gets nothing of learngene 1.
    """
    first = 1 if basis == "printed" else 0
    x = torch.arange(L, dtype=torch.float64) / L
    P = [torch.ones_like(x), x]
    for k in range(1, N + first):
        if basis == "legendre":
            P.append(((2 * k + 1) * x * P[k] - k * P[k - 1]) / (k + 1))
        elif basis == "monomial":
            P.append(x * P[k])
        else:
            P.append(2 * x * P[k] - P[k - 1])
    return torch.stack(P[first:N + first], 1).float()


def compose(theta, a, G=None):
    """Theta_l = sum_n G_n a(l, n) theta_n of one parameter, for all layers l at once.

    theta (N, ...), of N learngenes; a (L, N); G (N,), None for all ones -> Theta (L, ...)
    """
    if G is not None:
        a = a * G                                  # Eq. (8)
    Theta = a @ theta.flatten(1)                   # Eq. (1), Eq. (2), Eq. (3)
    return Theta.view(len(a), *theta.shape[1:])


SWIN_SIZES = {      # width, layers per stage, window, channels per head
    "swin_t": (96, (2, 2, 6, 2), 7, 32),
    "drawn-swin": (24, (2, 6), 4, 8),
}


def backbone(config, depths, num_classes):
    """An untrained ViT, or torchvision's Swin; num_classes 0: it gives features, not logits."""
    if config.size in SWIN_SIZES:
        from torchvision.models.swin_transformer import SwinTransformer
        width, own_depths, window, channels = SWIN_SIZES[config.size]
        heads = [width * 2 ** stage // channels for stage in range(len(own_depths))]
        net = SwinTransformer([4, 4], width, list(depths), heads, [window, window],
                              stochastic_depth_prob=0.0, num_classes=max(1, num_classes))
    else:
        net = ViT(vit_config(config.size, depths[0], image_size=config.image_size,
                             patch_size=config.patch, pooling=config.pooling,
                             num_classes=max(1, num_classes)))
    net.width = net.head.in_features
    if num_classes == 0:
        net.head = nn.Identity()
    return net


def layers_of(net):
    """{parameter of a learngene: its names in the layers of `net`, from the first to the last}.

    Blocks (modules whose class is called ...Block: ours, timm's, torchvision's) of the same shapes
    share a learngene, and l counts among them (A13). DeiT has one kind of block, Swin one per
    stage; its number stands in front: "0.mlp.fc1.weight" -> ["blocks.0.mlp.fc1.weight", ...].
    """
    kinds = {}                                     # shapes of a block -> all blocks of these
    inside = None
    for name, module in net.named_modules():
        nested = inside is not None and name.startswith(inside)
        if type(module).__name__.endswith("Block") and not nested:
            inside = name + "."
            shapes = tuple((n, p.shape) for n, p in module.named_parameters())
            kinds.setdefault(shapes, []).append(name)
    layers = {}
    for kind, (shapes, blocks) in enumerate(kinds.items()):
        for parameter, _ in shapes:
            layers[f"{kind}.{parameter}"] = [f"{block}.{parameter}" for block in blocks]
    return layers


def learngene_shapes(net):
    """{name: shape} of a learngene of `net`: one block of every kind."""
    return {name: net.get_parameter(names[0]).shape for name, names in layers_of(net).items()}


def stem_of(net):
    """{name: parameter} of all that is neither block nor head: embeddings, last norm ..."""
    in_blocks = set(itertools.chain(*layers_of(net).values()))
    named = [(n, p) for n, p in net.named_parameters() if not n.startswith("head.")]
    return {name: p for name, p in named if name not in in_blocks}


def is_gain(name, shape):
    """Whether a parameter is a LayerNorm's gain; other weights have more than one dimension."""
    return len(shape) == 1 and name.endswith("weight")


def offset(name, shape, init):
    """What a composed parameter is without any learngene: 1 for gains unless block (A3), else 0."""
    return 1.0 if init != "block" and is_gain(name, shape) else 0.0


class ComposedNetwork(nn.Module):
    """A network whose blocks are composed of learngenes in every forward pass: the ancestry model.

    Also TLEG, and a descendant that keeps Eq. (8). net: a backbone without head. genes: those that
    train, {n: learngene}, of N in all. frozen: {name: (N', ...)}, learngenes 1 to N'. Parameters
    are what trains: learngenes, head and, with train_stem, the stem.
    """

    def __init__(self, net, config, N, genes, head, frozen=None, train_stem=False):
        super().__init__()
        self.genes = nn.ModuleDict({str(n): as_module(gene) for n, gene in genes.items()})
        self.head, self.stem = head, as_module(stem_of(net) if train_stem else {})
        self.net = (net.requires_grad_(False),)    # a tuple hides it from parameters()
        self.layers, self.frozen = layers_of(net), frozen
        self.columns = [n - 1 for n in genes]      # of a, of those that train
        self.a, self.offset, device = {}, {}, next(net.parameters()).device
        for name, shape in learngene_shapes(net).items():
            self.a[name] = coefficients(len(self.layers[name]), N, config.basis).to(device)
            self.offset[name] = offset(name, shape, config.init)
        self.base = {name: self.frozen_part(name) for name in self.layers}     # summed once

    def theta(self):
        """{name: (N, ...)} of the learngenes that train."""
        return stacked([dict(gene.named_parameters()) for gene in self.genes.values()])

    def frozen_part(self, name, G=None):
        """Of Theta (L, ...): the offset and the frozen learngenes, of which G (N',) take part."""
        if not self.frozen:
            return self.offset[name]
        theta = self.frozen[name]
        return self.offset[name] + compose(theta, self.a[name][:, :len(theta)], G)

    def weights(self, G=None):
        """{parameter of the network: tensor}. G (N',): the frozen learngenes that take part; None
        for all."""
        weights = dict(self.stem.named_parameters())
        for name, theta in self.theta().items():
            base = self.base[name] if G is None else self.frozen_part(name, G)
            Theta = base + compose(theta, self.a[name][:, self.columns])
            weights.update(zip(self.layers[name], Theta))
        return weights

    def forward(self, x, G=None):
        with torch.autocast(x.device.type, enabled=False):         # sums in full precision
            weights = self.weights(G)
        return self.head(functional_call(self.net[0], weights, (x,)))


# A learngene is {name: tensor} wherever it goes; while it trains, a module has these names.

def as_module(tensors):
    """A module that holds {name: tensor} as parameters, under just these names."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, nn.Parameter(tensor))
    return root


def tensors_of(module):
    """{name: tensor} of a module's parameters, copied to the CPU."""
    return {name: p.detach().cpu().clone() for name, p in module.named_parameters()}


def shapes_of(tensors):
    return {name: tensor.shape for name, tensor in tensors.items()}


def stacked(genes):
    """{name: (N, ...)} of N learngenes."""
    return {name: torch.stack([gene[name] for gene in genes]) for name in genes[0]}


# --------------------------------------------------------------------------------------------------
# Training of Learngenes
# --------------------------------------------------------------------------------------------------

def new_learngene(shapes, init, previous=None):
    """{name: tensor} of a fresh learngene, one block of every kind. previous: the one before it.

    The first, without a previous one, is drawn as any ViT's block. The choices for later ones (A3):

    zero:     all zero, so the network starts as it was.
    random:   matrices as in any ViT.
    previous: a copy of the previous one.
    block:    the first's start, gains of its own with it; their sum over n swings with a(l, n).

    But for block, LayerNorm's gains are 1 + sum_n a(l, n) delta_n, and a learngene has the delta_n.
    """
    if previous is not None and init == "previous":
        return {name: tensor.clone() for name, tensor in previous.items()}
    gene = {name: torch.zeros(shape) for name, shape in shapes.items()}
    if previous is not None and init == "zero":
        return gene
    for name, tensor in gene.items():
        if tensor.ndim > 1:
            nn.init.trunc_normal_(tensor, std=0.02)
        elif init == "block" and is_gain(name, tensor.shape):
            nn.init.ones_(tensor)
    return gene


def new_head(width, num_classes):
    head = nn.Linear(width, num_classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def gene_masks(steps, old, dropout, seed, number, keep=0.1):
    """Which of the `old` learngenes take part in each step: (steps, old) of 0 and 1.

    All of them, or in a share `dropout` of the steps each with chance `keep`: a new learngene then
    learns to stand alone, and not to build on older ones (A4). Fixed by seed and its number.
    """
    chance = torch.rand(steps, old + 1, generator=data.generator(seed, number))
    everyone = chance[:, :1] >= dropout
    return (everyone | (chance[:, 1:] < keep)).float()


def loss_ce(y, y_hat):
    """Eq. (4): -1/N sum_i sum_c y_ic log(softmax(y_hat)_ic).

    y: classes (B,) or probabilities (B, C); y_hat: logits (B, C).
    """
    return F.cross_entropy(y_hat, y)               # Eq. (4)


def optimise(run, args, stage, net, task, images, lr, identity, forward=None, teacher=None,
             measure=None):
    """The training loop of everything here: trains `net`, by the logits that it gives for images.

    images: how many, over all steps. forward(x, step): takes the place of net(x). teacher: its soft
    labels take that of the task's. measure(): a number to log twelve times on the way (Fig. 3).
    """
    machine, steps = run.machine, math.ceil(images / args.batch_size)
    points = {math.ceil(steps * k / 12) for k in range(1, 13)}
    crop = args.crop if task.segmentation else None
    identity |= common.identity(args, "data", "training")
    identity |= {"lr": lr, "task": task.name, "content": task.fingerprint}
    groups = parameter_groups(net, lr, args.weight_decay)
    job = start_training(run, args, stage, net, groups, steps, identity)
    for step in job.steps():
        x, y = task.batch("train", step, args.batch_size, args.seed, args.recipe, machine.rank,
                          machine.world, crop)
        x = task.normalise(x)
        if task.segmentation:
            y = y.masked_fill(y == data.IGNORED, -100)     # cross_entropy's word for it
        elif args.recipe == "deit":
            x, y = data.mixed(x, y, task.num_classes, args.seed, step)
        for x, y in job.parts(x, y):
            with machine.autocast():
                if teacher is not None:
                    y = teacher(x).float().softmax(-1)
                y_hat = forward(x, step) if forward else net(x)
            job.update(loss_ce(y, y_hat.float()))
        if measure is not None and job.step in points:
            run.log(stage, step=job.step, images=job.step * args.batch_size, val=measure())


def learn(run, args, pool, task):
    """One new dataset: learngene n, its head and the stem train (A2). The pool gets one file more.

    Older learngenes are frozen; so is the stem after n = 1 under --stem frozen.
    """
    config, device = pool.config, run.machine.device
    n, depths = len(pool) + 1, depths_of(args)
    torch.manual_seed(args.seed * 1000 + n)
    net = backbone(config, depths, 0)
    previous = pool.records[-1]["gene"] if n > 1 else None
    gene = new_learngene(learngene_shapes(net), config.init, previous)
    head = new_head(net.width, task.num_classes)
    frozen = {}
    if n > 1:
        net.load_state_dict(pool.stem(n - 1), strict=False)
        frozen = pool.theta(n - 1)
    train_stem = n == 1 or config.stem == "shared"
    net = net.to(device)
    model = ComposedNetwork(net, config, n, {n: gene}, head, frozen, train_stem).to(device)

    images = args.ancestry_epochs * len(task.labels["train"])
    steps = math.ceil(images / args.batch_size)
    masks = gene_masks(steps, n - 1, args.gene_dropout, args.seed, n)
    everyone, masks = masks.all(1).tolist(), masks.to(device)
    identity = common.identity(args, "learngenes") | asdict(config)
    identity |= {"depths": depths, "parent": pool.hash}
    lr = args.lr if n == 1 else args.lr * args.later_lr
    optimise(run, args, f"ancestry-{n:02d}", model, task, images, lr, identity,
             forward=lambda x, step: model(x, None if everyone[step] else masks[step]))
    learned = {"gene": tensors_of(model.genes[str(n)]), "head": tensors_of(head),
               "stem": tensors_of(model.stem), "depths": depths, "seed": args.seed}
    pool.append(learned, task, write=run.machine.rank == 0)


# The learngene pool: a directory, append-only, one file per learngene, each naming the one before.

RECORD = {      # entries of a file; gene, stem and head: {name: tensor}; the last three: SHA-256
    "stage": str, "number": int, "config": dict, "depths": list, "seed": int, "gene": dict,
    "stem": dict, "head": dict, "dataset": str, "content": str, "class_names": list,
    "counts": dict, "val": float, "logits": str, "parent": str, "hash": str}


class Pool:
    """The learngenes of a directory, learngene-01.pt, ..., in the order in which they were learned.

    config: what they must be; None: as the first one says. new: there may be none yet. What does
    not fit is an InputError.
    """

    def __init__(self, path, config=None, device="cpu", new=False):
        self.path, self.config, self.device = Path(path), config, torch.device(device)
        self.records = []
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"the pool {path} is a file; name a directory")
        files = self.path.glob("learngene-*.pt")
        files = sorted(files, key=lambda file: (len(file.name), file.name))
        for n, file in enumerate(files, 1):
            if file != self.file(n):
                raise InputError(f"the pool {path} has {file.name} where {self.file(n).name} "
                                 "should be; restore the missing file")
            self.check(load_checkpoint(file, RECORD, stage="learngene"), file)
        if not new and not self.records:
            raise InputError(f"no learngenes in {path}; make them by --stage ancestry, "
                             "or name another --pool")

    def __len__(self):
        return len(self.records)

    def file(self, n):
        return self.path / f"learngene-{n:02d}.pt"

    @property
    def hash(self):
        """Of the last learngene, and so of all."""
        return self.records[-1]["hash"] if self.records else ""

    def check(self, record, file):
        """Takes a file's record, once all is found in order."""
        if record["hash"] != content_hash(record):
            raise InputError(f"{file} was changed after it was written (its hash does not fit); "
                             "restore it from a copy")
        if self.config is None:
            self.config = AncestryConfig(**record["config"])
        for key, asked in asdict(self.config).items():
            if record["config"].get(key) != asked:
                raise InputError(
                    f"{file} holds a learngene of another kind: {key} {record['config'].get(key)}, "
                    f"asked for {asked}; give the flags it was trained with or another --pool")
        if record["number"] != len(self) + 1 or record["parent"] != self.hash:
            raise InputError(
                f"{file} belongs to another lineage: it was not learned on top of the {len(self)} "
                "learngenes before it; learngenes of different pools cannot be mixed")
        with torch.device("meta"):
            net = backbone(self.config, record["depths"], len(record["class_names"]))
        needed = {"gene": learngene_shapes(net), "head": shapes_of(net.head.state_dict())}
        if record["stem"] or record["number"] == 1:
            needed["stem"] = shapes_of(stem_of(net))
        for part, shapes in needed.items():
            for name, _ in shapes.items() ^ shapes_of(record[part]).items():
                raise InputError(f"{file}: its {part} has no {name}, or not in the shape of these "
                                 "networks; restore it from a copy")
        self.records.append(record)

    def append(self, record, task, write=True):
        """Adds a learngene of `task`, measures it, and writes its file.

        A crash leaves the old pool, or the new one; nothing written is ever changed.
        """
        counts = {split: len(y) for split, y in task.labels.items()}
        record |= {
            "stage": "learngene", "number": len(self) + 1, "config": asdict(self.config),
            "dataset": task.name, "content": task.fingerprint, "class_names": task.class_names,
            "counts": counts, "parent": self.hash}
        self.records.append(record)
        logits = self.logits(len(self), task)
        record["val"], record["logits"] = percent(logits, task.labels["val"]), sha256(logits)
        record["hash"] = content_hash(record)
        file = self.file(len(self))
        try:
            if write:
                common.save_checkpoint(file, exclusive=True, **record)
                common.remove_leftovers(self.path)
        except FileExistsError:
            raise InputError(f"another run has written {file} meanwhile, which stays; start the "
                             "same command again: this dataset is learned on top of it") from None

    @functools.lru_cache(2)
    def theta(self, N):
        """{name: (N, ...)} of the first N learngenes."""
        theta = stacked([record["gene"] for record in self.records[:N]])
        return {name: tensor.to(self.device) for name, tensor in theta.items()}

    def stem(self, N):
        """The stem after N learngenes: the last one trained; under --stem frozen the first's."""
        return [record["stem"] for record in self.records[:N] if record["stem"]][-1]

    def logits(self, n, task):
        """Logits of dataset n's val images as they were when it was learned: (images, classes).

        That is, of learngenes 1 to n under the head of the last.
        """
        record = self.records[n - 1]
        net = backbone(self.config, record["depths"], task.num_classes).to(self.device).eval()
        self.fill(net, (1,) * n)
        net.head.load_state_dict(record["head"])
        return in_parts(net, task, task.examples("val")[0])

    def descendant(self, depth, learngenes=None, num_classes=1000):
        """A network of any depth: blocks composed by Eq. (8), the pool's stem, a fresh head.

        depth: layers; of a Swin per stage, as (2, 6). learngenes: their numbers, None for all.
        num_classes 0: it gives features. Raises InputError for a learngene or depth that cannot be.
        """
        depths = checked_depths(self.config, depth)
        net = backbone(self.config, depths, num_classes).to(self.device)
        return self.fill(net, selection_of(learngenes, len(self)))

    def fill(self, net, G):
        """Eq. (8) with the first len(G) learngenes, and the stem of that time; returns `net`."""
        return fill(net, self.theta(len(G)), self.stem(len(G)), G, self.config)


def open_pool(path, device="cpu"):
    """The pool of a directory, with the settings that its files name."""
    return Pool(path, device=device)


def content_hash(record):
    """SHA-256 of a learngene's tensors and of what its file says about them."""
    parts = ("gene", "stem", "head")
    said = {k: v for k, v in record.items() if k not in (*parts, "hash", "format")}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for part in parts:
        for name, tensor in record[part].items():
            digest.update(f"{part} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def sha256(*tensors):
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def percent(logits, y):
    """Top-1 accuracy."""
    return 100 * float((logits.argmax(-1) == y).float().mean())


@torch.inference_mode()
def in_parts(function, task, images, size=500):
    """function(normalised images), `size` images at a time."""
    return torch.cat([function(task.normalise(part)) for part in images.split(size)])


# --------------------------------------------------------------------------------------------------
# Learngene Selection: the Task-Adaptive Learngene Selector (TALS)
# --------------------------------------------------------------------------------------------------

def reward(logits, y, G, gamma=2.0, lam=0.01):
    """Eq. (5), averaged over the reward set: (1 - p_y)^gamma log(p_y) - lambda |G|_1.

    logits (B, C), y (B,), G (N,) -> (). gamma and lambda: Training Settings.
    """
    log_p = -F.cross_entropy(logits, y, reduction="none")          # log p_{y_i}(x_i; theta_G)
    hard = (1 - log_p.exp()) ** gamma
    return (hard * log_p).mean() - lam * G.sum()   # Eq. (5)


def expected_reward(r):
    """Eq. (6): J(phi) = E[r(G)], as the mean over sampled selections, r (S,)."""
    return r.mean()                                # Eq. (6)


def policy_loss(log_pi, r, b, scale=1.0):
    """A number whose gradient by phi is minus Eq. (7): E[grad log pi_phi(G) (r(G) - b)].

    log_pi, r (S,): of sampled selections. scale divides the advantage r - b (A7).
    """
    return -(log_pi * (r - b) / scale).mean()      # Eq. (7)


def log_policy(phi, G, k=0):
    """log pi_phi(G) of G (S, N): independent, with P(G_n = 1) = sigmoid(phi_n) -> (S,)

    k > 0: given |G| = k (A8), by the k-th elementary symmetric polynomial of exp(phi).
    """
    if k == 0:
        log_p = -F.binary_cross_entropy_with_logits(phi.expand_as(G), G, reduction="none")
        return log_p.sum(-1)
    top = phi.detach().max()
    polynomials = torch.ones(1, dtype=phi.dtype)   # of degree 0, 1, ...
    for weight in (phi - top).exp():
        polynomials = F.pad(polynomials, (0, 1)) + weight * F.pad(polynomials, (1, 0))
    return G @ phi - polynomials[k].log() - k * top


def sample_policy(phi, samples, k, generator):
    """Selections (samples, N) from the policy.

    The empty one, a network without weights, becomes the most likely learngene alone.
    """
    phi = phi.detach()
    if k == 0:
        G = torch.bernoulli(phi.sigmoid().expand(samples, -1), generator=generator)
        G[G.sum(1) == 0, phi.argmax()] = 1
        return G
    likely = (phi + shift_to_size(phi, k)).sigmoid()
    found = phi.new_empty(0, len(phi))
    while len(found) < samples:
        G = torch.bernoulli(likely.expand(32 * samples, -1), generator=generator)
        found = torch.cat([found, G[G.sum(1) == k]])
    return found[:samples]


def shift_to_size(phi, k):
    """What added to phi makes k learngenes likely; given |G| = k, it changes nothing."""
    low, high = -phi.max() - 20, -phi.min() + 20
    for _ in range(50):
        middle = (low + high) / 2
        if (phi + middle).sigmoid().sum() > k:
            high = middle
        else:
            low = middle
    return middle


def entropy_of(phi):
    """Entropy of the policy, in nats."""
    pi = phi.sigmoid()
    return -(pi * pi.log() + (1 - pi) * (1 - pi).log()).nan_to_num().sum()


class Rewards:
    """r(G) for rows of G, each subset computed once by score(G) -> (reward, accuracy).

    path: a file that keeps what was computed, for a search that is killed and started again.
    """

    def __init__(self, score, N, path=None):
        self.score, self.N, self.path = score, N, path
        self.seen, self.kept = {}, {}              # by this search; in the file
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        for line in lines:
            with contextlib.suppress(ValueError, TypeError):       # a line that a kill has torn
                *G, r, right = json.loads(line)
                self.kept[tuple(G)] = (r, right)

    def __call__(self, G):
        subsets = [tuple(row) for row in torch.as_tensor(G).int().tolist()]
        for subset in subsets:
            if subset not in self.kept:
                self.kept[subset] = self.score(torch.tensor(subset, dtype=torch.float32))
                self.keep(subset)
            self.seen[subset] = self.kept[subset]
        return torch.tensor([self.seen[subset][0] for subset in subsets], dtype=torch.float64)

    def keep(self, subset):
        if self.path is not None:
            line = json.dumps([*subset, *self.kept[subset]])
            with common.writing(self.path), open(self.path, "a") as file:
                file.write(f"\n{line}\n")        # on a line of its own, whatever was torn before

    def ranked(self, k=0):
        """Selections seen, of size k if k > 0, from the best on; equals in their own order."""
        subsets = [subset for subset in sorted(self.seen) if k in (0, sum(subset))]
        return sorted(subsets, key=lambda subset: -self.seen[subset][0])

    def best(self, k=0):
        return self.ranked(k)[0]


def reinforce(rewards, k, steps, generator, samples=8, lr=0.05, decay=0.9, entropy=0.01,
              title=None):
    """REINFORCE over selections, of size k if k > 0; returns the final probabilities (N,).

    The best subset seen is in `rewards`. samples: selections per step; lr: Adam's; decay: of the
    moving average b; entropy: weight of the policy's entropy, falling to 0 (A7). title: of a
    progress bar, None for none.
    """
    phi = torch.zeros(rewards.N, dtype=torch.float64, requires_grad=True)
    optimizer, b = torch.optim.Adam([phi], lr), None
    bar = tqdm(range(steps), title, unit=" steps", disable=title is None, mininterval=1.0)
    for step in bar:
        G = sample_policy(phi, samples, k, generator)
        r = rewards(G)
        J = expected_reward(r)
        b = J if b is None else b
        spread = r.std().clamp(min=1e-6) if samples > 1 else 1.0   # A7: the advantage's unit
        loss = policy_loss(log_policy(phi, G.double(), k), r, b, spread)
        bonus = entropy * (1 - step / steps) * entropy_of(phi)
        optimizer.zero_grad()
        (loss - bonus).backward()
        optimizer.step()
        b = decay * b + (1 - decay) * J            # moved after use, so that Eq. (7) is unbiased
        bar.set_postfix(b=f"{float(b):.3f}", subsets=len(rewards.seen), refresh=False)
    return phi.detach().sigmoid()


def exhaustive(rewards, k):
    """Looks at every subset, of size k if k > 0."""
    for size in [k] if k else range(1, rewards.N + 1):
        for chosen in itertools.combinations(range(rewards.N), size):
            G = torch.zeros(1, rewards.N)
            G[0, list(chosen)] = 1
            rewards(G)


# The paper takes p_y(x) from "the model initialized with the selected learngenes", which has no
# head for a new task. A closed form on its features takes that place, or a short training (A6).

def class_mean_logits(f, y, C, temperature=10.0):
    """Cosine of each centred feature to the mean of each class, times 10 -> logits (B, C)

    An image is left out of the mean of its own class. f (B, D); y (B,), at least twice each class.
    """
    f = F.normalize(f - f.mean(0), dim=-1)
    sums = f.new_zeros(C, f.shape[1]).index_add_(0, y, f)
    logits = f @ F.normalize(sums, dim=-1).T
    others = F.normalize(sums[y] - f, dim=-1)
    own = (f * others).sum(-1, keepdim=True)
    return temperature * logits.scatter(1, y[:, None], own)


def ridge_logits(f, y, C, temperature=10.0, kappa=0.1):
    """Ridge regression onto one-hot labels, refitted in closed form without each image, times 10.

    kappa: the ridge, in units of the mean eigenvalue. f (B, D), y (B,) -> logits (B, C)
    """
    f, Y = (f - f.mean(0)).double(), F.one_hot(y, C).double()
    Y = Y - Y.mean(0)
    A = f.T @ f
    A += kappa * A.trace() / len(A) * torch.eye(len(A), dtype=A.dtype, device=A.device)
    h = (f * torch.linalg.solve(A, f.T).T).sum(1, keepdim=True)    # the hat matrix's diagonal
    fitted = f @ torch.linalg.solve(A, f.T @ Y)
    return (temperature * (fitted - h * Y) / (1 - h)).float()


CLOSED_FORMS = {"means": class_mean_logits, "ridge": ridge_logits}


def reward_rows(task, share, seed):
    """Training images that TALS looks at: `share` of every class, at least two images of it."""
    y, rows = task.labels["train"], []
    for c in range(task.num_classes):
        mine = (y == c).nonzero()[:, 0].cpu()
        if len(mine) < 2:
            raise InputError(f"class {task.class_names[c]!r} of {task.name} has {len(mine)} "
                             "training image; TALS needs at least 2 of every class")
        order = torch.randperm(len(mine), generator=data.generator(seed, c, 7))
        rows.append(mine[order[:max(2, round(share * len(mine)))]])
    return torch.cat(rows).sort().values.to(y.device)


def patch_labels(masks, patch, C):
    """The commonest class of each patch, (B, S, S) -> (B, T); IGNORED if under half is labelled."""
    B, S, _ = masks.shape
    rows = S // patch
    pixels = masks.long().view(B, rows, patch, rows, patch).transpose(2, 3)
    pixels = pixels.reshape(B, rows * rows, patch * patch)
    counts = F.one_hot(pixels.clamp(max=C), C + 1)[..., :C].sum(2)             # (B, T, C)
    labelled = counts.sum(-1) * 2 >= patch * patch
    return torch.where(labelled, counts.argmax(-1), data.IGNORED)


def patch_features(net, x):
    """Patch tokens after the last LayerNorm, (B, T, D), without class token."""
    patches = (x.shape[-1] // net.config.patch_size) ** 2
    return net.fc_norm(net.norm(net.tokens(x)))[:, -patches:]


REWARD_HEADS, SEARCHES = [*CLOSED_FORMS, "trained"], ["reinforce", "exhaustive"]


@dataclass(frozen=True)
class TALS:
    """Settings of the selector."""
    reward_share: float = 0.1      # of the training images are looked at (Training Settings)
    reward_head: str = "means"     # class means, "ridge", or a short training: "trained" (A6)
    lam: float = 0.01              # lambda of Eq. (5) (Training Settings)
    search: str = "reinforce"      # or "exhaustive", which checks it
    genes: int = 0                 # how many learngenes; 0: as many as the reward likes (A8)
    select_steps: int = 200        # of REINFORCE (A7)
    seed: int = 0
    batch_size: int = 64           # of the short training, like the three below
    train_lr: float = 2e-3
    weight_decay: float = 0.05
    recipe: str = "shift"

    def __post_init__(self):
        for name, known in (("reward_head", REWARD_HEADS), ("search", SEARCHES)):
            if getattr(self, name) not in known:
                raise common.unknown(name, getattr(self, name), known)


REWARD_IMAGES = 2500        # of the short training


def image_logits(pool, task, depths, tals):
    """(logits, y): logits(G) (B, C) of the training images that TALS looks at, and y (B,)."""
    rows = reward_rows(task, tals.reward_share, tals.seed)
    x, y = task.pixels("train", rows), task.labels["train"][rows]
    net = backbone(pool.config, depths, 0).to(pool.device).eval()

    def logits(G):
        pool.fill(net, G)
        return CLOSED_FORMS[tals.reward_head](in_parts(net, task, x), y, task.num_classes)
    return logits, y


def trained_logits(pool, task, depths, tals):
    """The same by a head from a short training, on the images that TALS does not look at."""
    rows = reward_rows(task, tals.reward_share, tals.seed)
    x, y = task.pixels("train", rows), task.labels["train"][rows]
    others = torch.ones_like(task.labels["train"], dtype=torch.bool).index_fill(0, rows, False)
    if not others.any():
        raise InputError("--reward-head trained needs training images that TALS does not look at; "
                         "lower --reward-share")
    others, steps = task.only(others.nonzero()[:, 0]), math.ceil(REWARD_IMAGES / tals.batch_size)

    def logits(G):
        torch.manual_seed(tals.seed)
        net = backbone(pool.config, depths, task.num_classes).to(pool.device)
        pool.fill(net, G)
        common.fit(net, others, steps, tals.batch_size, tals.train_lr, tals.weight_decay,
                   tals.recipe)
        return in_parts(net, task, x)
    return logits, y


def patch_logits(pool, task, depths, tals):
    """The same for segmentation, of patches, each of its commonest class (A11)."""
    side, masks = pool.config.image_size, task.labels["train"]
    order = torch.randperm(len(masks), generator=data.generator(tals.seed, 7))
    rows = order[:math.ceil(tals.reward_share * len(masks))].to(masks.device)
    x = task.pixels("train", rows)[..., :side, :side]
    y = patch_labels(masks[rows][:, :side, :side], pool.config.patch, task.num_classes).flatten()
    several = torch.bincount(y, minlength=data.IGNORED + 1)[y] > 1             # to leave one out
    usable = (y < task.num_classes) & several
    if not usable.any():
        raise InputError(f"of the {len(rows)} images of {task.name} that TALS looks at, no two "
                         "patches are of one class; raise --reward-share")
    y = y[usable]
    net = backbone(pool.config, depths, 0).to(pool.device).eval()

    def logits(G):
        pool.fill(net, G)
        f = in_parts(lambda images: patch_features(net, images).flatten(0, 1), task, x)
        return CLOSED_FORMS[tals.reward_head](f[usable], y, task.num_classes)
    return logits, y


def scored(pool, task, depths, tals):
    """(score, y): score(G) -> (reward, accuracy of the reward head); y: labels of what it sees."""
    if tals.reward_head == "trained" and task.segmentation:
        raise InputError("--reward-head trained is for classification; else say means or ridge")
    logits_for = patch_logits if task.segmentation else image_logits
    if tals.reward_head == "trained":
        logits_for = trained_logits
    logits, y = logits_for(pool, task, depths, tals)

    def score(G):
        z = logits(G)
        return float(reward(z, y, G, lam=tals.lam)), percent(z, y)
    return score, y


FIRST_LOOK = 0.5        # of the reward set, while the policy learns (A7)
FINALISTS = 16          # selections that are then looked at on all of it


def search_selection(pool, task, depths, tals, path=None, title=None):
    """(G, what the search saw: a dict of plain values). path: of Rewards; title: of a bar."""
    N, k, policy = len(pool), tals.genes, None
    check_genes(k, pool)
    score, y = scored(pool, task, depths, tals)
    rewards = Rewards(score, N, path)
    if tals.search == "exhaustive":
        exhaustive(rewards, k)
        visited = len(rewards.seen)
    else:
        first = rewards
        if tals.reward_head != "trained":
            few = dataclasses.replace(tals, reward_share=FIRST_LOOK * tals.reward_share)
            path = path and path.with_name(f"first-{path.name}")
            first = Rewards(scored(pool, task, depths, few)[0], N, path)
        generator = data.generator(tals.seed, 11)
        policy = reinforce(first, k, tals.select_steps, generator, title=title).tolist()
        rewards(torch.tensor(first.ranked(k)[:FINALISTS]))
        visited = len(first.seen)
    G = rewards.best(k)
    r, accuracy = rewards.seen[G]
    return G, {
        "learngenes": learngenes_of(G), "reward": r, "accuracy": accuracy, "examples": len(y),
        "chance": 100 * float(torch.bincount(y).max()) / len(y), "visited": visited,
        "policy": policy, "singles": dict(enumerate(rewards(torch.eye(N)).tolist(), 1))}


def rewards_by_head(pool, task, depths, tals, G):
    """{reward head: r(G)} of one selection: by the closed forms, and by the head of `tals`."""
    found, G = {}, torch.tensor(G, dtype=torch.float32)
    for head in dict.fromkeys([*CLOSED_FORMS, tals.reward_head]):
        score, _ = scored(pool, task, depths, dataclasses.replace(tals, reward_head=head))
        found[head], _ = score(G)
    return found


def select(pool, task, depth=None, data_dir="data", **settings):
    """G (N,), 0 or 1 per learngene: those that suit a task. settings: fields of TALS, by name.

    task: a data.Task, or the name of a task or folder for data.load. depth: of the descendant;
    None: the ancestry's. Raises InputError for what cannot be.
    """
    if not isinstance(task, data.Task):
        task = data.load(task, data_dir, pool.config.image_size)
    depths = checked_depths(pool.config, depth or pool.records[0]["depths"])
    G, _ = search_selection(pool, task.to(pool.device), depths, TALS(**settings))
    return G


def check_genes(k, pool):
    if k > len(pool):
        raise InputError(f"--genes {k}: the pool {pool.path} has {len(pool)} learngenes")


def learngenes_of(G):
    """Which learngenes a selection holds, counted from 1: [1, 3] of (1, 0, 1). None of None."""
    return None if G is None else [n for n, selected in enumerate(G, 1) if selected]


def selection_of(learngenes, N):
    """G (N,) of the numbers of learngenes, all of them for None: (1, 0, 1) of [1, 3]."""
    numbers = range(1, N + 1)
    chosen = set(numbers if learngenes is None else learngenes)
    if not chosen or not chosen.issubset(numbers):
        raise InputError(f"learngenes are numbers from 1 to {N}, at least one, not {learngenes}")
    return tuple(int(n in chosen) for n in numbers)


# --------------------------------------------------------------------------------------------------
# Initialization of descendant models
# --------------------------------------------------------------------------------------------------

@torch.no_grad()
def fill(net, theta, stem, G, config):
    """Eq. (8): composes the blocks of `net`, of any depth, of the learngenes that G (N,) selects.

    theta: {name: (N, ...)}; stem: {name: tensor}, copied. The head stays as it is. Returns `net`.
    """
    weights = dict(stem)
    for name, layers in layers_of(net).items():
        a = coefficients(len(layers), len(G), config.basis).to(theta[name])
        selected = torch.as_tensor(G).to(a)
        Theta = compose(theta[name], a, selected)
        Theta += offset(name, theta[name].shape[1:], config.init)
        weights.update(zip(layers, Theta))
    net.load_state_dict(weights, strict=False)
    return net


def constrained(net, pool, G):
    """A descendant that keeps Eq. (8): only the selected learngenes and the head train (A9)."""
    genes = {}
    for n in learngenes_of(G):
        gene = pool.records[n - 1]["gene"]
        genes[n] = {name: tensor.clone() for name, tensor in gene.items()}
    head, net.head = net.head, nn.Identity()
    return ComposedNetwork(net, pool.config, len(pool), genes, head).to(pool.device)


def checked_depths(config, depth):
    """Layers per stage as a list: one number for a ViT, several for Swin."""
    depths = [depth] if isinstance(depth, int) else list(depth)
    own = SWIN_SIZES[config.size][1] if config.size in SWIN_SIZES else (6,)
    if len(depths) != len(own) or min(depths) < 1:
        raise InputError(f"--depth of {config.size} takes one number of layers per stage, as in "
                         f"{','.join(map(str, own))}")
    return depths


def parameter_counts(net, k, N, constrained=False):
    """What Table 4 counts, of a descendant from k of N learngenes (A12).

    stored: k learngenes, stem and head; trainable; deployed: what runs, which depends on the depth
    alone; nominal: the paper's k / N of that.
    """
    gene = sum(shape.numel() for shape in learngene_shapes(net).values())
    stem = sum(p.numel() for p in stem_of(net).values())
    head = sum(p.numel() for p in net.head.parameters())
    deployed = sum(p.numel() for p in net.parameters())
    trainable = k * gene + head if constrained else deployed
    return {"stored": k * gene + stem + head, "trainable": trainable, "deployed": deployed,
            "nominal": deployed * k // N}


# --------------------------------------------------------------------------------------------------
# Baselines
# --------------------------------------------------------------------------------------------------

RANDOM = ["random", "random1"]      # any learngenes; learngene 1 and any others
OURS = ["adaptive", "all", *RANDOM]
DRAWS = 5                           # of either (Fig. 4)
METHODS = OURS + ["scratch", "prefine", "heur", "auto", "peg", "tleg", "weight-selection"]
LARGER = {      # whose weights weight selection takes
    "drawn-tiny": "drawn-small", "drawn-small": "drawn-base", "tiny": "small", "small": "base"}


def initialise(run, args, method, pool, depths, num_classes, G, task):
    """(net, start): a network with a fresh head, its other parameters as the method says.

    start: the hash of what they were made of. G: the selection, for ours. task: whose normalisation
    it will see, which matters to published ancestors.
    """
    config = picked(AncestryConfig, args)
    torch.manual_seed(args.seed)        # the same head, and the same random blocks, for all methods
    net = backbone(config, depths, num_classes).to(run.machine.device)
    if method in OURS:
        return pool.fill(net, G), pool.hash
    if method == "scratch":
        return net, None
    if method == "tleg":
        theta, stem, G, config = tleg(run, args)
        return fill(net, theta, stem, G, config), sha256(*theta.values(), *stem.values())
    if method == "peg":
        state = peg(run, args)
    else:
        size = LARGER[args.size] if method == "weight-selection" else args.size
        state = ancestor(run, args, size, task).state_dict()
    if method == "weight-selection":
        weight_selection(net, state)
    else:
        copy_layers(net, state, inherited(run, args, method, depths[0]))
    return net, sha256(*state.values())


def inherited(run, args, method, L):
    """{layer of a descendant: layer of the ancestor} of what is copied; the rest stays random."""
    L_ancestor = args.ancestry_depth
    if method == "heur":                # the last three blocks, on top
        return {L - k: L_ancestor - k for k in range(1, min(3, L, L_ancestor) + 1)}
    if method == "auto":                # the chosen ones, below
        return dict(enumerate(auto_layers(run, args)[:L]))
    if method == "peg":                 # the nearest
        return {l: l * L_ancestor // L for l in range(L)}
    return {l: l for l in range(L)}     # prefine: all


def copy_layers(net, state, layers):
    """Copies the stem and, for {layer of net: layer of the ancestor}, blocks of an ancestor."""
    copied = {name: state[name] for name in stem_of(net)}
    for own, theirs in layers.items():
        for name, _ in net.blocks[own].named_parameters():
            copied[f"blocks.{own}.{name}"] = state[f"blocks.{theirs}.{name}"]
    net.load_state_dict(copied, strict=False)


def ancestor(run, args, size, task):
    """The baselines' ancestor of a size: of --stage pretrain, or a published one of --ancestors.

    The latter is made to take images as `task` normalises them.
    """
    if not published(args):
        return pretrained(run, args, size)
    widths = {}
    for file in published(args):
        _, file_config, _ = common.vit_state(common.read_weights(file)[0], 1, file)
        widths[file_config.width] = file
    width, _ = VIT_SIZES[size]
    if width not in widths:
        raise InputError(f"a network of width {width} ({size}) is needed, but --ancestors names "
                         f"files of width {', '.join(map(str, widths))}")
    config = dataclasses.replace(picked(AncestryConfig, args), size=size)
    net = backbone(config, [args.ancestry_depth], task.num_classes)
    net, report = common.load_pretrained(widths[width], net=net, say=run.print)
    if report["mean"] is not None:
        source = (report["mean"], report["std"])
        net.load_state_dict(common.renormalised(net.state_dict(), source, (task.mean, task.std)))
    return net.to(run.machine.device).eval().requires_grad_(False)


def published(args):
    """The files of --ancestors; none when that names a directory."""
    suffixes = (".pt", ".pth", ".bin", ".safetensors")
    return args.ancestors.split(",") if args.ancestors.endswith(suffixes) else []


def from_stream(run, args, stage, build, share=0.5, distilled=False):
    """build(number of classes), trained on all classes of the stream at once.

    share: of the epochs of an ancestor; half is what TLEG's authors took. distilled: under the
    ancestor's soft labels. A directory --ancestors has it ready.
    """
    state = made_elsewhere(args, stage)
    torch.manual_seed(args.seed)
    if state:
        net = build(len(state["head.bias"]))
        load_weights(net, state, f"{args.ancestors}/{stage}.pt")
        return net.eval()
    task = whole_stream(run, args)
    net = build(task.num_classes)
    teacher = ancestor(run, args, args.size, task) if distilled else None
    images = share * args.ancestry_epochs * len(task.labels["train"])
    identity = {name: getattr(args, name) for name in ("patch", "pooling", "ancestry_depth")}
    optimise(run, args, stage, net, task, images, args.lr, identity, teacher=teacher)
    own = accuracy(net.eval(), task, "val", run.machine.device)
    run.print(f"{stage}: {own:.1f} % on val of {task.name}")
    return net


@functools.lru_cache(4)
def pretrained(run, args, size):
    """A plain ViT that has seen as many images as the learngenes together.

    It is the ancestor of Pre-Fine, Heur, Auto, PEG and weight selection, and TLEG's teacher.
    """
    config = dataclasses.replace(picked(AncestryConfig, args), size=size)

    def build(num_classes):
        return backbone(config, [args.ancestry_depth], num_classes).to(run.machine.device)
    return from_stream(run, args, f"pretrain-{size}", build, share=1.0).requires_grad_(False)


@functools.lru_cache(4)
def tleg(run, args):
    """TLEG (Xia et al. 2024): `compose` with two full blocks, theta_B + (l - 1) / L theta_A.

    They train at once under the ancestor's soft labels. Returns what `fill` takes: theta
    {name: (2, ...)}, stem, G, config.
    """
    config = dataclasses.replace(picked(AncestryConfig, args), basis="chebyshev", init="block")

    def build(num_classes):
        net = backbone(config, [args.ancestry_depth], 0).to(run.machine.device)
        theta_B = new_learngene(learngene_shapes(net), "block")
        theta_A = new_learngene(learngene_shapes(net), "random")   # its authors': without gains
        head = new_head(net.width, num_classes)
        model = ComposedNetwork(net, config, 2, {1: theta_B, 2: theta_A}, head, train_stem=True)
        return model.to(run.machine.device)
    net = from_stream(run, args, f"tleg-{args.size}", build, distilled=True)
    theta = {name: tensor.detach() for name, tensor in net.theta().items()}
    return theta, dict(net.stem.named_parameters()), (1, 1), config


class Expansion(nn.Module):
    """PEG (Wang et al. 2024a): a ViT whose heads and feed-forwards are expanded from learngenes.

    Learngenes start as random convex mixtures of an ancestor's parts: 2/3 of the heads of each
    layer, half of the feed-forwards. A non-linear mapping along the axis of heads, or of layers,
    makes all of them again. Both are trained, with all other parameters (A10).
    net: the ancestor without its head; head: that of the training.
    """
    HEADS = ("attn.qkv.weight", "attn.qkv.bias")
    FEED_FORWARDS = ("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias")

    def __init__(self, net, head, generator):
        super().__init__()
        L, H = len(net.blocks), net.blocks[0].attn.num_heads
        heads, layers = max(1, 2 * H // 3), max(1, L // 2)
        self.map_heads, self.map_layers = mapping(heads, H), mapping(layers, L)
        p_heads = torch.randn(L, heads, H, generator=generator).softmax(2)
        p_layers = torch.randn(layers, L, generator=generator).softmax(1)
        rest, genes = tensors_of(net), {}
        for name in self.HEADS:
            theirs = torch.stack([rest.pop(f"blocks.{l}.{name}") for l in range(L)])
            theirs = theirs.view(L, 3, H, -1)      # of queries, keys and values: numbers per head
            genes[name] = torch.einsum("lih,lqhn->liqn", p_heads, theirs)
        for name in self.FEED_FORWARDS:
            theirs = torch.stack([rest.pop(f"blocks.{l}.{name}") for l in range(L)])
            genes[name] = torch.tensordot(p_layers, theirs, 1)
        self.genes, self.rest, self.head = as_module(genes), as_module(rest), head
        self.net = (net.requires_grad_(False),)

    def weights(self):
        """{parameter of the network: tensor}"""
        weights, genes = dict(self.rest.named_parameters()), dict(self.genes.named_parameters())
        for name in self.HEADS:
            Theta = along(1, self.map_heads, genes[name]).transpose(1, 2)      # (L, 3, H, n)
            for l, theta in enumerate(Theta):
                own = f"blocks.{l}.{name}"
                weights[own] = theta.reshape(self.net[0].get_parameter(own).shape)
        for name in self.FEED_FORWARDS:
            for l, theta in enumerate(along(0, self.map_layers, genes[name])):
                weights[f"blocks.{l}.{name}"] = theta
        return weights

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):         # sums in full precision
            weights = self.weights()
        return self.head(functional_call(self.net[0], weights, (x,)))


def mapping(few, many):
    """`few` numbers -> `many`, by a hidden layer. At first it repeats them: relu(x) - relu(-x)."""
    first, second = nn.Linear(few, 2 * many), nn.Linear(2 * many, many)
    repeat = F.one_hot(torch.arange(many) * few // many, few).float()
    with torch.no_grad():
        first.weight.copy_(torch.cat([repeat, -repeat]))
        second.weight.copy_(torch.cat([torch.eye(many), -torch.eye(many)], 1))
        first.bias.zero_()
        second.bias.zero_()
    return nn.Sequential(first, nn.ReLU(), second)


def along(axis, module, tensor):
    """module(...) over one axis of a tensor."""
    return module(tensor.movedim(axis, -1)).movedim(-1, axis)


@functools.lru_cache(4)
def peg(run, args):
    """{name: tensor} of PEG's network, as deep as the ancestor."""
    stage, device = f"peg-{args.size}", run.machine.device

    def build(num_classes):
        net = backbone(picked(AncestryConfig, args), [args.ancestry_depth], 0)
        head = new_head(net.width, num_classes)
        if not made_elsewhere(args, stage):
            source = ancestor(run, args, args.size, whole_stream(run, args))
            net.load_state_dict(source.state_dict(), strict=False)
        return Expansion(net.to(device), head, data.generator(args.seed, 13)).to(device)
    net = from_stream(run, args, stage, build)
    return {name: tensor.detach() for name, tensor in net.weights().items()}


@functools.lru_cache(4)
def auto_layers(run, args):
    """Auto-Learngene (Wang et al. 2023): the half of the ancestor's layers that descendants share.

    A pseudo descendant of half the depth learns the stream by itself. Kept are the layers of the
    ancestor whose tokens are most like those of one of its layers (A10).
    """
    config, half = picked(AncestryConfig, args), max(1, args.ancestry_depth // 2)

    def build(num_classes):
        return backbone(config, [half], num_classes).to(run.machine.device)
    pseudo = from_stream(run, args, f"auto-{args.size}", build)
    task = whole_stream(run, args)
    x = next(iter(task.examples("val", 500)[0].split(500)))        # decoded, if they are files
    x = task.normalise(x)
    theirs = tokens_of_layers(pseudo, x)
    scores = []
    for tokens in tokens_of_layers(ancestor(run, args, args.size, task), x):
        scores.append(max(similarity(tokens, other) for other in theirs))
    best = sorted(range(len(scores)), key=lambda l: -scores[l])[:half]
    return sorted(best)


@torch.no_grad()
def tokens_of_layers(net, x):
    """The tokens after each block of a ViT, [(B T, D)]."""
    seen = []
    hooks = [block.register_forward_hook(
        lambda module, inputs, tokens: seen.append(tokens.flatten(0, 1))) for block in net.blocks]
    net(x)
    for hook in hooks:
        hook.remove()
    return seen


def similarity(f, g):
    """Linear CKA (Kornblith et al. 2019) of two features of n examples, (n, D) and (n, E)."""
    f, g = f - f.mean(0), g - g.mean(0)
    return float((f.T @ g).norm() ** 2 / ((f.T @ f).norm() * (g.T @ g).norm()))


def made_elsewhere(args, stage):
    """The state of a network that --stage pretrain trained in --ancestors; None: make it here."""
    if not args.ancestors or published(args):
        return None
    path = Path(args.ancestors) / f"{stage}.pt"
    saved = load_checkpoint(path, stage=stage) if path.exists() else {"step": 0, "steps": 1}
    if saved["step"] < saved["steps"]:
        method = stage.partition("-")[0]
        more = "" if method == "pretrain" else f" --method {method}"
        raise InputError(f"no finished {path.name} in --ancestors {args.ancestors}; make it there "
                         f"by --stage pretrain{more} --output {args.ancestors}")
    return saved["model"]


@functools.lru_cache(1)
def whole_stream(run, args):
    """The dataset whose classes --stream deals out."""
    name, = stream_origin(args)
    return data.load_tasks([name], args, run.machine)[name]


# --------------------------------------------------------------------------------------------------
# Image Classification Task
# --------------------------------------------------------------------------------------------------

def train_descendant(run, args, pool, task, depths, method, G, draw):
    """Trains and measures a descendant or baseline: Tables 1, 2 and 4, Figs. 3 and 4."""
    device, keeps = run.machine.device, args.constrained and G is not None
    net, start = initialise(run, args, method, pool, depths, task.num_classes, G, task)
    k, N = (sum(G), len(pool)) if G else (0, 1)
    counts = parameter_counts(net, k, N, keeps)
    trained = constrained(net, pool, G) if keeps else net
    about = description(args, task, depths, method, G, draw, start)
    stage = further_training(run, args, trained, task, about, measure=lambda: accuracy(
        trained, task, "val", device, limit=500))
    result = accuracy(trained, task, args.split, device)
    if args.export and run.machine.rank == 0:
        export(run, args, net, trained, task, {**about, "accuracy": result})
    print_result(run, about, f"{result:.2f} %")
    rewards = None
    if method in ("adaptive", *RANDOM):     # does the reward know which selections train well?
        rewards = rewards_by_head(pool, task, depths, picked(TALS, args), G)
    curve = run.values(stage, "val")
    run.result("train", about, accuracy=result, curve=curve, rewards=rewards, **counts)


def description(args, task, depths, method, G, draw, start):
    """What a further training is of: the key of its line in the log."""
    label = f"{method}-{draw + 1}" if method in RANDOM else method
    if args.constrained and G is not None:
        label += "-constrained"
    return {
        "task": task.name, "content": task.fingerprint, "size": args.size, "depths": depths,
        "method": method, "draw": draw, "label": label, "learngenes": learngenes_of(G),
        "genes": args.genes, "start": start, "pool": start if method in OURS else None,
        "seed": args.seed, "lr": args.train_lr,
        "images": args.train_images or args.train_epochs * len(task.labels["train"]),
        "split": args.split, **common.identity(args, "descendants")}


def further_training(run, args, net, task, about, measure=None):
    """Trains `net` on a task; returns the name of its checkpoint."""
    chosen = "+".join(map(str, about["learngenes"] or []))
    layers = ".".join(map(str, about["depths"]))
    parts = [args.stage, file_name(task.name), about["label"], chosen, args.size, layers,
             f"{about['images']:g}"]
    stage = "-".join(part for part in parts if part)
    identity = {key: about[key] for key in ("learngenes", "start")}
    identity |= common.identity(args, "descendants")
    optimise(run, args, stage, net, task, about["images"], args.train_lr, identity, measure=measure)
    return stage


def print_result(run, about, result):
    layers = ".".join(map(str, about["depths"]))
    chosen = f" {about['learngenes']}" if about["learngenes"] else ""
    run.print(f"{about['task']}, {about['size']} x {layers}, {about['label']}{chosen}: {result} "
              f"after {about['images']:g} images ({about['split']})")


def export(run, args, net, trained, task, card):
    """Writes a trained descendant for timm or torchvision, and beside it what it is."""
    state = net.state_dict()
    if trained is not net:              # it keeps Eq. (8) and has blocks only while it runs
        state |= trained.weights()
        state |= {f"head.{name}": p for name, p in trained.head.state_dict().items()}
    config = dataclasses.replace(net.config, num_classes=task.num_classes)
    common.export_weights(state, config, args.export, args.format, {
        **card, "mean": task.mean, "std": task.std, "class_names": task.class_names,
        "chance": 100 / task.num_classes})
    run.print(f"wrote {args.export} for {args.format}, and what it is to "
              f"{common.card_of(args.export)}")


# --------------------------------------------------------------------------------------------------
# Image Segmentation Task (Segmenter, Strudel et al. 2021)
# --------------------------------------------------------------------------------------------------

class Segmenter(nn.Module):
    """A ViT encoder and the mask transformer: two blocks over [patches; classes].

    forward(x): images (B, 3, S, S) -> logits (B, C, S, S). Positions are resized to S x S.
    """

    def __init__(self, encoder, num_classes, size, layers=2):
        super().__init__()
        config, D = encoder.config, encoder.config.width
        self.patch, self.grid = config.patch_size, size // config.patch_size
        prefix = int(config.pooling == "token")
        encoder.pos_embed = nn.Parameter(resized_pos_embed(
            encoder.pos_embed.detach(), self.grid, prefix, mode="bilinear"))
        encoder.head = nn.Identity()
        self.encoder = encoder
        self.proj_in = nn.Linear(D, D)
        self.cls_emb = nn.Parameter(torch.zeros(1, num_classes, D))
        self.blocks = nn.Sequential(*(Block(D, config.heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(D)
        self.proj_patch = nn.Linear(D, D, bias=False)
        self.proj_classes = nn.Linear(D, D, bias=False)
        self.mask_norm = nn.LayerNorm(num_classes)
        for name, p in self.named_parameters():
            if p.ndim > 1 and not name.startswith("encoder."):
                last = name.startswith(("proj_patch", "proj_classes"))
                nn.init.trunc_normal_(p, std=D ** -0.5 if last else 0.02)
        nn.init.zeros_(self.proj_in.bias)

    def forward(self, x):
        B, T, C = len(x), self.grid ** 2, self.cls_emb.shape[1]
        tokens = self.proj_in(patch_features(self.encoder, x))                 # (B, T, D)
        classes = self.cls_emb.expand(B, -1, -1)                               # (B, C, D)
        both = self.norm(self.blocks(torch.cat([tokens, classes], 1)))
        patches, classes = both.split([T, C], 1)
        patches = F.normalize(self.proj_patch(patches), dim=-1)
        classes = F.normalize(self.proj_classes(classes), dim=-1)
        masks = self.mask_norm(patches @ classes.transpose(1, 2))              # (B, T, C)
        masks = masks.transpose(1, 2).reshape(B, C, self.grid, self.grid)
        return F.interpolate(masks.float(), scale_factor=self.patch, mode="bilinear")


@torch.no_grad()
def sliding_logits(net, x, window, stride):
    """Logits (B, C, S, S) of images larger than the network's, averaged where windows overlap.

    Windows stand every `stride` pixels and at the far edges.
    """
    S = x.shape[-1]
    starts = [*range(0, S - window, stride), S - window]
    total, times = 0, x.new_zeros(S, S)
    for i in starts:
        for j in starts:
            part = net(x[..., i:i + window, j:j + window])
            total = total + F.pad(part, (j, S - window - j, i, S - window - i))
            times[i:i + window, j:j + window] += 1
    return total / times


def mean_iou(confusion):
    """Mean over classes of intersection / union, in percent. confusion[true, predicted] (C, C)"""
    hit = confusion.diagonal().double()
    union = confusion.sum(0) + confusion.sum(1) - hit
    return 100 * float((hit / union).nanmean())


def evaluate_segmentation(net, task, split, window, stride):
    """Mean IoU over all labelled pixels of a split."""
    C, confusion = task.num_classes, 0
    for images, y in zip(task.images[split].split(16), task.labels[split].split(16)):
        logits = sliding_logits(net, task.normalise(images), window, stride)
        labelled = y != data.IGNORED
        predicted, true = logits.argmax(1)[labelled], y[labelled].long()
        pairs = torch.bincount(true * C + predicted, minlength=C * C)
        confusion = confusion + pairs.view(C, C)
    return mean_iou(confusion)


def train_segmenter(run, args, pool, task, depths, method, G, draw):
    """Table 3: an encoder initialised by a method and a random decoder, trained together."""
    encoder, start = initialise(run, args, method, pool, depths, 1, G, task)
    torch.manual_seed(args.seed)
    net = Segmenter(encoder.cpu(), task.num_classes, args.crop).to(run.machine.device)
    about = description(args, task, depths, method, G, draw, start)
    further_training(run, args, net, task, about)
    miou = evaluate_segmentation(net.eval(), task, args.split, args.crop, args.crop // 2)
    print_result(run, about, f"mIoU {miou:.2f}")
    run.result("segment", about, miou=miou)


# ==================================================================================================
# Here the method ends. What follows is the program: its settings, and its stages one by one
# ==================================================================================================

# --------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------

def names(text):
    return [name for name in text.split(",") if name]


def layers(text):
    """Layers per stage: 6, or 2,2,6,2 of a Swin."""
    return [positive(n) for n in text.split(",")]


STAGES = ["ancestry", "pretrain", "select", "train", "segment"]
INITS = ["zero", "random", "previous", "block"]
SILENT = "the paper is silent"

# Rows: name, type, default or (drawn, paper), meaning and source. Shared flags are in common.py.
FLAGS = {
    "run": [
        ("--stage", STAGES, "ancestry", "what to do; pretrain: ancestors of baselines"),
        ("--stream", str, ("wide/10", "imagenet/10"),
         "datasets of the ancestry in their order; NAME/K: K disjoint subsets of its classes"),
        ("--pool", str, "", "directory of the learngenes; by default pool/ in --output"),
        ("--ancestors", str, "",
         "where the ancestors of baselines are: the directory of a --stage pretrain, or files of "
         "published ViTs; by default --output, where they are made when missing"),
        ("--method", str, "adaptive", f"comma-separated of {', '.join(METHODS)}"),
    ],
    "network": [
        ("--size", [*VIT_SIZES, *SWIN_SIZES], ("drawn-small", "small"), "width and heads"),
        ("--depth", layers, "", "of descendants, of a Swin as 2,2,6,2; by default the ancestry's"),
        ("--ancestry-depth", positive, (6, 12), "layers of the ancestry model (DeiT: 12)"),
    ],
    "learngenes": [
        ("--basis", ["chebyshev", "legendre", "monomial", "printed"], "chebyshev",
         "polynomials of a(l, n), as Lin et al. 2024c compare them; printed: their T_n"),
        ("--init", INITS, "zero",
         f"how learngenes after the first start; zero: the network as it was; {SILENT}"),
        ("--later-lr", amount, 1.0, f"their peak learning rate, times --lr; {SILENT}"),
        ("--stem", ["shared", "frozen"], "shared",
         f"trained with every dataset, or with the first alone; {SILENT}"),
        ("--gene-dropout", share, 0.0,
         "share of steps in which few older learngenes take part; 0 is the paper's text"),
    ],
    "selection": [
        ("--reward-share", share, 0.1, "of the training images are looked at (Training Settings)"),
        ("--reward-head", REWARD_HEADS, "means",
         f"p_y(x) of a task without head: class means, ridge, or a short training; {SILENT}"),
        ("--lam", amount, 0.01, "lambda of Eq. (5) (Training Settings)"),
        ("--search", SEARCHES, "reinforce", "the second checks the first"),
        ("--genes", whole, 0, "learngenes to select (Fig. 4: 5), 0: as many as the reward likes"),
        ("--select-steps", positive, 200, f"of REINFORCE; {SILENT}"),
    ],
    "descendants": [
        ("--constrained", bool, False, "keep Eq. (8): only selected learngenes and the head train"),
        ("--scene-size", positive, (96, 512), "pixels of segmentation images"),
        ("--crop", positive, (64, 512), "window of the segmentation network (Segmenter: 512)"),
    ],
    "budget": [
        ("--ancestry-epochs", amount, (10.0, 300.0),
         "of every dataset (Training Settings; drawn: A5), and of the ancestor of baselines"),
    ],
}
DEFAULTS = {        # of shared flags; AdamW and its rates are DeiT's, the paper is silent (A14)
    "--output": "runs/adaptive",
    "--save-every": 500,
    "--batch-size": (64, 1024),
    "--warmup": (0.05, 0.0167),         # DeiT: 5 of 300 epochs
    "--train-epochs": (10.0, 500.0),    # 50 on ImageNet-1K, ADE20K; 100 on iNat-2019, in ablations
}


def settings(argv=None):
    args = common.parse_flags(__doc__.strip(), FLAGS, DEFAULTS, argv)
    check_settings(args)
    return args.replace(data=",".join(data.check_names(names(args.data), args.data_dir)))


def picked(kind, args):
    """A dataclass of settings, from the flags that are called like its fields."""
    return kind(**{field.name: getattr(args, field.name) for field in dataclasses.fields(kind)})


def depths_of(args):
    """Layers per stage that are asked for; by default the ancestry's, of a Swin its own."""
    own = SWIN_SIZES[args.size][1] if args.size in SWIN_SIZES else args.ancestry_depth
    return checked_depths(picked(AncestryConfig, args), args.depth or own)


def stream_names(args):
    """The datasets of --stream: NAME/K stands for its class subsets NAME/K#1 ... NAME/K#K."""
    parts = [data.parts_of(name) for name in names(args.stream)]
    return data.check_names(itertools.chain(*parts), args.data_dir)


def stream_origin(args):
    """The one dataset whose classes --stream deals out, as [name]."""
    if "," in args.stream:
        raise InputError(f"the ancestor of baselines is trained on one dataset, but --stream "
                         f"{args.stream} has several")
    several = len(data.parts_of(args.stream)) > 1
    origin = args.stream.rpartition("/")[0] if several else args.stream
    return data.check_names([origin], args.data_dir)


def check_settings(args):
    """InputError for flags that do not go together, before anything is loaded."""
    depths = depths_of(args)
    if args.stage in ("select", "train", "segment") and not args.data:
        raise InputError(f"--stage {args.stage} needs a task: --data NAME, or --data FOLDER with "
                         "one sub-folder of images per class")
    if args.size in SWIN_SIZES and args.stage in ("pretrain", "segment"):
        raise InputError(f"--stage {args.stage} is written for ViT, not for {args.size}")
    if args.stage == "segment" and (args.crop % args.patch or args.crop > args.scene_size):
        raise InputError(f"--crop {args.crop} must be a multiple of --patch {args.patch} and at "
                         f"most --scene-size {args.scene_size}")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % world:
        raise InputError(f"--batch-size {args.batch_size} does not divide among {world} processes")
    for method in names(args.method):
        check_method(args, method, depths[0])
    if args.stage == "ancestry" and not args.data:
        stream_names(args)
    if args.export:
        one = "," not in args.data + args.method and args.method not in RANDOM
        if args.stage != "train" or args.size in SWIN_SIZES or not one:
            raise InputError("--export is for --stage train with one task, one --method (not "
                             "random or random1), and ViTs")
        common.check_export(args.export, args.format, args.pooling)


def check_method(args, method, depth):
    if method not in METHODS:
        raise common.unknown("--method", method, METHODS)
    if method in [*OURS, "scratch"]:
        return
    if args.size in SWIN_SIZES:
        raise InputError(f"--method {method} is written for ViT; for {args.size} choose among "
                         f"{', '.join(OURS)} and scratch")
    if method == "weight-selection" and args.size not in LARGER:
        raise InputError(f"weight selection needs a network larger than {args.size}; there is "
                         "none, choose a smaller --size")
    if method in ("prefine", "weight-selection") and depth > args.ancestry_depth:
        raise InputError(f"--method {method} cannot make {depth} layers of an ancestor with "
                         f"{args.ancestry_depth}; lower --depth or raise --ancestry-depth")
    if not args.ancestors or method == "auto":
        stream_origin(args)


# --------------------------------------------------------------------------------------------------
# Stages
# --------------------------------------------------------------------------------------------------

def pool_of(run, args, new=False):
    """The pool that the stage's methods need, None when they need none. new: it may be empty."""
    if args.stage in ("train", "segment") and not set(names(args.method)) & set(OURS):
        return None
    path = args.pool or os.path.join(args.output, "pool")
    return Pool(path, picked(AncestryConfig, args), run.machine.device, new)


def ancestry(run, args):
    """Learns one dataset after another; those that the pool knows already are passed over."""
    pool = pool_of(run, args, new=True)
    tasks = data.load_tasks(names(args.data) or stream_names(args), args, run.machine)
    reported = run.values("pool", "learngene")
    for task in tasks.values():
        n = number_of(pool, task)
        if n is None:
            learn(run, args, pool, task)
            n = len(pool)
        if n not in reported and run[f"ancestry-{n:02d}"].exists():
            report_learned(run, pool, tasks.values(), n)
    report_alone(run, args, pool, tasks.values())
    own = [record["val"] for record in pool.records]
    run.print(f"{len(pool)} learngenes in {pool.path}; on their own datasets "
              f"{sum(own) / len(own):.1f} % on val on average")


def number_of(pool, task):
    """Which learngene has learned a dataset, by content; None: none yet."""
    for record in pool.records:
        if record["content"] == task.fingerprint:
            return record["number"]
        if record["dataset"] == task.name:
            raise InputError(
                f"{task.name} has changed since it was learned as learngene {record['number']}, "
                f"from {record['counts']['train']} training images to {len(task.labels['train'])} "
                "or to others; a changed dataset needs another name")
    return None


def report_learned(run, pool, tasks, n):
    """What was learned, and of how many earlier datasets the logits are what they were."""
    tasks, record = {task.fingerprint: task for task in tasks}, pool.records[n - 1]
    same = []
    for earlier in pool.records[:n - 1]:
        if earlier["content"] in tasks:
            logits = pool.logits(earlier["number"], tasks[earlier["content"]])
            same.append(sha256(logits) == earlier["logits"])
    said = f"learngene {n} ({record['dataset']}): {record['val']:.1f} % on val, chance "
    said += f"{100 / len(record['class_names']):.1f}"
    if same:
        said += f"; logits of {sum(same)} of {len(same)} earlier datasets unchanged, bit for bit"
    run.print(said)
    key = {"learngene": n, "dataset": record["dataset"]}
    run.result("pool", key, val=record["val"], kept=sum(same), earlier=len(same))


def report_alone(run, args, pool, tasks):
    """Class-mean accuracy on val of every learngene alone, and of an untrained network.

    Eq. (8) may select any subset, so each learngene should be alive.
    """
    tasks = {task.fingerprint: task for task in tasks}
    tasks = [tasks[r["content"]] for r in pool.records if r["content"] in tasks]
    depths, N = pool.records[0]["depths"], len(pool)
    nets = [pool.descendant(depths, [n], 0).eval() for n in range(1, N + 1)]
    torch.manual_seed(args.seed)
    nets.append(backbone(pool.config, depths, 0).to(pool.device).eval())
    columns = []
    for task in tasks:
        x, y = task.examples("val")
        f = in_parts(lambda part: torch.stack([net(part) for net in nets], 1), task, x)
        logits = [class_mean_logits(part, y, task.num_classes) for part in f.unbind(1)]
        columns.append([percent(z, y) for z in logits])
    table = list(zip(*columns))
    run.print("each learngene alone, class-mean accuracy on val, % (rows: learngenes, then an "
              "untrained network; columns: datasets)")
    for name, row in zip([*range(1, N + 1), "none"], table):
        values = "".join(f"{value:7.1f}" for value in row)
        run.print(f"{name:>5}{values}   mean {sum(row) / len(row):.1f}")
    run.result("alone", {"pool": pool.hash, "datasets": [task.name for task in tasks]}, table=table)


def pretrain(run, args):
    """The networks that the baselines of --method need."""
    if not published(args):
        pretrained(run, args, args.size)
        if "weight-selection" in names(args.method):
            pretrained(run, args, LARGER[args.size])
    for method, train_it in (("tleg", tleg), ("peg", peg), ("auto", auto_layers)):
        if method in names(args.method):
            train_it(run, args)


def selected(run, args, pool, task, depths):
    """TALS for a task: prints and logs what it saw, returns G."""
    path = title = None
    tals = picked(TALS, args)
    if run.machine.rank == 0:
        title, path = f"select {task.name}", rewards_file(run, pool, task, depths, tals)
    G, seen = search_selection(pool, task, depths, tals, path, title)
    datasets = ", ".join(pool.records[n - 1]["dataset"] for n in seen["learngenes"])
    run.print(f"{task.name}: learngenes {seen['learngenes']} of {len(pool)} ({datasets}), reward "
              f"{seen['reward']:.4f}, accuracy of the reward head {seen['accuracy']:.1f} %, "
              f"chance {seen['chance']:.1f} %; {seen['visited']} subsets looked at")
    ranked = sorted(seen["singles"].items(), key=lambda single: -single[1])
    run.print("one by one, best first: " + ", ".join(f"{n} {r:.3f}" for n, r in ranked))
    p = seen["chance"] / 100
    if seen["accuracy"] < 100 * (p + 2 * math.sqrt(p * (1 - p) / seen["examples"])):
        run.print(f"warning: on {seen['examples']} examples, that is within two standard errors "
                  f"of chance, so the reward says nothing about {task.name}; --reward-head trained "
                  "asks a short training instead")
    key = {
        "task": task.name, "content": task.fingerprint, "pool": pool.hash, "depths": depths,
        "seed": args.seed, **common.identity(args, "selection")}
    run.result("select", key, **seen)
    return G


def rewards_file(run, pool, task, depths, tals):
    """Where the rewards of a search are kept: a file for all that they depend on."""
    run.own()
    about = [pool.hash, task.fingerprint, depths, str(pool.device), asdict(tals)]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return run.dir / f"rewards-{digest[:16]}.jsonl"


def select_stage(run, args):
    pool, depths = pool_of(run, args), depths_of(args)
    tasks = data.load_tasks(names(args.data), args, run.machine, segmentation=True)
    for task in tasks.values():
        selected(run, args, pool, task, depths)


def selections(run, args, pool, task, depths):
    """Yields (method, G, draw) of all networks of a task that --method asks for."""
    found = None
    if pool is not None:
        check_genes(args.genes, pool)
    for method in names(args.method):
        if found is None and (method == "adaptive" or method in RANDOM and not args.genes):
            found = selected(run, args, pool, task, depths)
        if method == "adaptive":
            yield method, found, 0
        elif method == "all":
            yield method, selection_of(None, len(pool)), 0
        elif method in RANDOM:          # as many as TALS selects
            k = args.genes or sum(found)
            held = [1] if method == "random1" else []
            for draw in range(DRAWS):
                chance = Random(f"{args.seed} {task.name} {draw}")
                others = range(1 + len(held), len(pool) + 1)
                chosen = held + chance.sample(others, k - len(held))
                yield method, selection_of(chosen, len(pool)), draw
        else:
            yield method, None, 0


def train(run, args):
    """Descendants and baselines under one schedule and budget."""
    tasks = data.load_tasks(names(args.data), args, run.machine)
    pool, depths = pool_of(run, args, new=bool(args.export)), depths_of(args)
    if pool is not None and len(pool) == 0:
        run.print(f"there are no learngenes in {pool.path}, so they are made there now, once, of "
                  f"{args.stream}: {args.ancestry_epochs:g} epochs per dataset")
        ancestry(run, args.replace(data="", depth=""))
        pool = pool_of(run, args)
    for task in tasks.values():
        for method, G, draw in selections(run, args, pool, task, depths):
            train_descendant(run, args, pool, task, depths, method, G, draw)


def segment(run, args):
    """Encoders initialised by every method, decoders at random, all trained alike."""
    pool, depths = pool_of(run, args), depths_of(args)
    tasks = data.load_tasks(names(args.data), args, run.machine, segmentation=True)
    for task in tasks.values():
        if not task.segmentation:
            raise InputError(f"{task.name} has no masks; --stage segment takes tasks that have: "
                             "scenes, ade20k")
        for method, G, draw in selections(run, args, pool, task, depths):
            train_segmenter(run, args, pool, task, depths, method, G, draw)


def main(argv=None):
    args = settings(argv)
    machine = common.setup_machine(
        args.device, args.amp, args.seed, args.threads, args.return_memory)
    run = Run(args.output, vars(args), machine)
    common.announce(run, args)
    stages = [ancestry, pretrain, select_stage, train, segment]
    stages[STAGES.index(args.stage)](run, args)


if __name__ == "__main__":
    common.script(main)
