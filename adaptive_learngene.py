"""Adaptive-Learngene (Lin et al., AAAI 2026): an expandable ViT learns one new component, a learngene, per new dataset,
with all older ones frozen; a policy picks the few learngenes that suit a task; descendants of any depth are composed of them.

    python adaptive_learngene.py --stage ancestry                  # ten datasets, one after another -> a pool of ten learngenes
    python adaptive_learngene.py --stage ancestry --data DIR       # later: one more dataset -> one more learngene
    python adaptive_learngene.py --stage select --data TASK        # which learngenes suit this task
    python adaptive_learngene.py --stage train --data TASK --depth 6

The paper's claims that this file measures: Tables 1-4, Figs. 3 and 4. There is no released code; A1, A2, ... mark decisions
where the paper is silent, and README lists them.

    paper               here                  meaning
    L, l                L, l                  layers of a network; l counts from 1
    N, n                N, n                  learngenes in the pool; n counts from 1
    theta_n^lg          theta[n - 1]  (P,)    learngene n: one block of every shape, flattened
    a(l, n)             a         (L, N)      coefficients: polynomial of degree n - 1 at (l - 1) / L
    Theta_l             Theta     (L, P)      parameters of all blocks
    G                   G         (N,)        0 or 1 per learngene
    p_y(x; theta_G)     softmax(logits)       of the reward head, since a new task has no trained one
    phi, pi_phi         phi       (N,)        logits of the selection policy
    b                   b                     moving average of rewards
"""
import argparse
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from tqdm import tqdm

import data
from common import (VIT_SIZES, Block, Run, Training, ViT, accuracy, amount, check_export, export_weights, fail,
                    load_checkpoint, load_pretrained, load_weights, parameter_groups, parse_flags, positive,
                    rank_zero_first, read_weights, renormalised, resized_pos_embed, save_checkpoint, setup_machine, share, vit_config,
                    vit_state, weight_selection, whole, write_atomically, yes_no)


# ----------------------------------------------------------------------------------------------------------------------
# The Structure of the Ancestry Model
# ----------------------------------------------------------------------------------------------------------------------

def coefficients(L, N, basis="chebyshev", first_order=0):
    """a(l, n), (L, N): the polynomial of degree n - 1 + first_order at x_l = (l - 1) / L (Lin et al. 2024c).

    first_order 0 (A1): learngene 1 is the same in all layers, as Eq. (1) says "used across all layers", and learngenes
    1 and 2 are TLEG. first_order 1 is the formula as printed in 2024, a(l, n) = T_n(x_l): layer 1 gets nothing of learngene 1.
    """
    x = torch.arange(L, dtype=torch.float64) / L
    P = [torch.ones_like(x), x]
    for k in range(1, N + first_order):
        P.append({"chebyshev": 2 * x * P[k] - P[k - 1],
                  "legendre": ((2 * k + 1) * x * P[k] - k * P[k - 1]) / (k + 1),
                  "monomial": x * P[k]}[basis])
    return torch.stack(P[first_order:N + first_order], 1).float()


def compose(theta, a, G=None, base=None):
    """Theta_l = sum_n G_n a(l, n) theta_n for all layers at once: Eq. (8); Eqs. (1)-(3) with G = 1. (N, P), (L, N) -> (L, P)

    base (P,) or (L, P) is added: what every network has without any learngene (A3), or the sum over frozen learngenes.
    """
    a = a if G is None else a * G
    return a @ theta if base is None else torch.addmm(base, a, theta)        # Eq. (8); with G = 1: Eq. (1), Eq. (2), Eq. (3)


@dataclass
class Group:
    """Blocks of one shape, in the order of the network: they share a learngene, l counts among them (A13). DeiT has one group,
    Swin one per stage."""
    blocks: list                                     # their names
    shapes: dict                                     # {parameter of a block: shape}

    def parameters(self, Theta):
        """(L, P) -> {parameter of the network: tensor}"""
        parts = Theta.split([shape.numel() for shape in self.shapes.values()], 1)
        return {f"{block}.{name}": row.view(shape) for (name, shape), part in zip(self.shapes.items(), parts)
                for block, row in zip(self.blocks, part.unbind(0))}


def block_groups(net):
    """The repeated blocks of any network, by shape: modules whose class is called ...Block (ours, timm's, torchvision's)."""
    groups, inside = {}, "\0"
    for name, module in net.named_modules():
        if type(module).__name__.endswith("Block") and not name.startswith(inside):
            inside = name + "."
            shapes = {n: p.shape for n, p in module.named_parameters()}
            groups.setdefault(tuple(shapes.items()), Group([], shapes)).blocks.append(name)
    return list(groups.values())


def stem_of(net):
    """{name: parameter} of all that is neither block nor head: embeddings, last norm, Swin's patch merging."""
    blocks = tuple(f"{block}." for group in block_groups(net) for block in group.blocks)
    return {n: p for n, p in net.named_parameters() if not n.startswith(blocks) and not n.startswith("head.")}


SWIN_SIZES = {"swin_t": (96, (2, 2, 6, 2), 7), "drawn-swin": (24, (2, 6), 4)}        # width, depths, window; heads of 32 or 8 channels


def depths_of(args):
    """Layers per stage: one number for ViT, several for Swin. The default is the size's own."""
    own = SWIN_SIZES[args.size][1] if args.size in SWIN_SIZES else (args.ancestry_depth,)
    depths = tuple(args.depth) or own
    if len(depths) != len(own):
        fail(f"--depth of {args.size} takes {len(own)} number{'s' if len(own) > 1 else ''}, as in {','.join(map(str, own))}")
    return depths


def backbone(args, depths, num_classes):
    """An untrained ViT, or torchvision's Swin; num_classes 0: features instead of logits."""
    if args.size in SWIN_SIZES:
        from torchvision.models.swin_transformer import SwinTransformer
        width, own, window = SWIN_SIZES[args.size]
        heads = [width * 2 ** i // (32 if args.size == "swin_t" else 8) for i in range(len(own))]
        net = SwinTransformer([4, 4], width, list(depths), heads, [window, window], stochastic_depth_prob=0.0,
                              num_classes=max(1, num_classes))
    else:
        net = ViT(vit_config(args.size, depths[0], image_size=args.image_size, patch_size=args.patch, pool=args.pool,
                             num_classes=max(1, num_classes)))
    net.width = net.head.in_features
    if not num_classes:
        net.head = nn.Identity()
    return net


def new_learngene(net, init, scale=1.0, first=True):
    """One block of every shape, freshly initialised: nn.ModuleList with a block per group. The choices for init (A3):

    delta: LayerNorm gains are 1 + sum_n a(l, n) delta_n with delta_n = 0 at first (the 1 is compose's base), matrices are
           drawn as in any ViT, times scale. Every subset of learngenes then has gains near 1.
    block: the paper's words, a full block with gains of its own; the gains of a sum swing with the coefficients.
    zero:  all zero, the network starts as it was; without learngene 1 it stays dead.
    """
    gene = nn.ModuleList(copy.deepcopy(net.get_submodule(group.blocks[0])) for group in block_groups(net))
    with torch.no_grad():
        for name, p in gene.named_parameters():
            if p.ndim > 1:
                nn.init.trunc_normal_(p, std=0.02)
                p *= 1.0 if first else 0.0 if init == "zero" else scale
            elif init == "delta" or init == "zero" and not first or not is_gain(name, p.shape):
                p.zero_()
            else:
                p.fill_(1)
    return gene.requires_grad_(True)


def is_gain(name, shape):
    return len(shape) == 1 and name.endswith("weight")                               # matrices have two dimensions, the rest are biases


def gain_offset(groups, init):
    """What every composed block has without any learngene, per group (P,): LayerNorm gains of 1 under init "delta", else 0."""
    return [torch.cat([torch.full((shape.numel(),), float(init == "delta" and is_gain(name, shape)))
                       for name, shape in group.shapes.items()]) for group in groups]


def flat(block):
    return torch.cat([p.reshape(-1) for p in block.parameters()])                    # (P,)


# ----------------------------------------------------------------------------------------------------------------------
# The learngene pool, on disk: append-only, one file per learngene, each naming the hash of the one before
# ----------------------------------------------------------------------------------------------------------------------

def content_hash(record):
    """SHA-256 of a learngene's tensors and of what its file says about them."""
    digest = hashlib.sha256(json.dumps({k: v for k, v in record.items() if k not in ("gene", "stem", "head", "hash", "format")},
                                       sort_keys=True).encode())
    for part in ("gene", "stem", "head"):
        for name, tensor in record[part].items():
            digest.update(f"{part} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


class Pool:
    """The learngenes of a directory. Files: learngene-01.pt, ...: {gene, stem, head: {name: tensor}, settings, dataset,
    class_names, counts, number, depths, seed, val, logits (hash), parent (hash), hash}. Any bad file ends the program.
    """
    def __init__(self, path, settings, device):
        self.path, self.settings, self.device, self.records = Path(path), settings, device, []
        if self.path.exists() and not self.path.is_dir():
            fail(f"the pool {path} is a file; name a directory")
        found = sorted(self.path.glob("learngene-*.pt"), key=lambda file: (len(file.name), file.name))
        for number, file in enumerate(found, 1):
            if file != self.file(number):
                fail(f"the pool {path} has {file.name} where {self.file(number).name} should be; restore the missing file")
            self.check(load_checkpoint(file, stage="learngene"), file)

    def file(self, number):
        return self.path / f"learngene-{number:02d}.pt"

    def check(self, record, file):
        if record.get("hash") != content_hash(record):
            fail(f"{file} was changed after it was written (its hash does not fit); restore it from a copy")
        if record["settings"] != self.settings:
            odd = {k: (v, self.settings.get(k)) for k, v in record["settings"].items() if v != self.settings.get(k)}
            fail(f"{file} holds a learngene of another kind: " + ", ".join(f"{k} {a}, asked for {b}" for k, (a, b) in odd.items())
                 + "; give the flags it was trained with or another --pool")
        if record["number"] != len(self) + 1 or record["parent"] != self.hash:
            fail(f"{file} belongs to another lineage: it was not learned on top of the {len(self)} learngenes before it; "
                 "learngenes of different pools cannot be mixed")
        self.records.append(record)

    def add(self, **record):
        """The next learngene, in memory; `seal` writes it."""
        self.records.append({"stage": "learngene", "number": len(self) + 1, "settings": self.settings, "parent": self.hash, **record})

    def seal(self, write=True, **results):
        """Writes the last learngene. A crash leaves the old pool, or the new one; nothing written is ever changed."""
        self.records[-1] |= results
        self.records[-1]["hash"] = content_hash(self.records[-1])
        if write:
            save_checkpoint(self.file(len(self)), **self.records[-1])

    @property
    def hash(self):
        return self.records[-1]["hash"] if self.records else ""

    def __len__(self):
        return len(self.records)

    @functools.lru_cache(maxsize=2)
    def theta(self, count):
        """The first `count` learngenes, per group (N, P)."""
        rows = [[] for _ in range(1 + max(int(k.split(".")[0]) for k in self.records[0]["gene"]))]
        for record in self.records[:count]:
            parts = [[] for _ in rows]
            for name, tensor in record["gene"].items():
                parts[int(name.split(".")[0])].append(tensor.reshape(-1))
            for row, part in zip(rows, parts):
                row.append(torch.cat(part))
        return [torch.stack(row).to(self.device) for row in rows]

    def stem(self, count=None):
        """The stem as it was after `count` learngenes: under --stem shared the last one trained, else the first's."""
        return [r["stem"] for r in self.records[:count] if r["stem"]][-1]


def group_coefficients(groups, N, settings, device="cpu"):
    return [coefficients(len(group.blocks), N, settings["basis"], settings["first_order"]).to(device) for group in groups]


@torch.no_grad()
def fill(net, theta, stem, G, settings):
    """Eq. (8): composes the blocks of `net`, of any depth, of the learngenes theta [(N, P)] that G (N,) selects; copies the stem."""
    groups, device = block_groups(net), theta[0].device
    weights = {n: p.to(device) for n, p in stem.items()}
    a, G = group_coefficients(groups, len(G), settings, device), torch.as_tensor(G, dtype=torch.float32, device=device)
    for group, genes, a, base in zip(groups, theta, a, gain_offset(groups, settings["init"])):
        weights |= group.parameters(compose(genes, a, G, base.to(device)))
    net.load_state_dict(weights, strict=False)       # the head is not among them
    return net


def fill_from(pool, net, G, count=None):
    """`fill` with the first `count` learngenes of a pool (default all), and the stem as it was then."""
    return fill(net, pool.theta(count or len(pool)), pool.stem(count), G, pool.settings)


# ----------------------------------------------------------------------------------------------------------------------
# Training of Learngenes
# ----------------------------------------------------------------------------------------------------------------------

def loss_ce(y, y_hat):
    """Eq. (4): -1/N sum_i sum_c y_ic log(softmax(y_hat)_ic). y: classes (B,) or probabilities (B, C); y_hat: logits (B, C)."""
    return F.cross_entropy(y_hat, y)                                                 # Eq. (4)


def fit(run, args, machine, stage, module, forward, task, images, lr, identity=None, target=None, val=None, **cut):
    """The training loop of everything here: `module` holds what trains, forward(x, step) gives logits.

    target(x, y) replaces the labels; val() -> number is logged --looks times along the way; cut: crop=C of
    data.Task.batch. Resumes by itself, as every stage does.
    """
    steps = math.ceil(images / args.batch_size)
    keys = ("seed", "batch_size", "weight_decay", "warmup", "clip", "augment", "recipe", "amp")
    job = Training(run, stage, module, parameter_groups(module, lr, args.weight_decay), steps, warmup=round(args.warmup * steps),
                   clip=args.clip or None, identity={**{k: getattr(args, k) for k in keys}, "lr": lr, **(identity or {})},
                   batch_size=args.batch_size, log_every=args.log_every, save_every=args.save_every)
    looks = {math.ceil(steps * k / args.looks) for k in range(1, args.looks + 1)} if val and args.looks else ()
    for step in job.steps():
        x, y = task.batch("train", step, args.batch_size, args.seed, args.augment and args.recipe, machine.rank, machine.world, **cut)
        if args.augment and args.recipe == "deit" and not task.segmentation:
            x, y = data.mixed(x, y, task.num_classes, args.seed, step)
        with machine.autocast():
            y, y_hat = target(x, y) if target else y, forward(x, step)
        job.update(loss_ce(y, y_hat.float()))
        if job.step in looks:
            run.log(stage, step=job.step, images=job.step * args.batch_size, val=val())
    return module


def gene_masks(steps, old, args, number):
    """Which of the `old` learngenes take part in each step, (steps, old): all, or in a share of the steps (--gene-dropout)
    a random few. Only so do later learngenes learn to stand alone (A4). Fixed by seed and number."""
    random = torch.rand(steps, old + 1, generator=data.generator(args.seed, number))
    return ((random[:, :1] >= args.gene_dropout) | (random[:, 1:] < args.gene_keep)).float()


def composed_forward(net, groups, genes, head, a, base):
    """forward(x, step) of a network composed in every step: per group, base(step) + sum_n a(l, n) theta_n over the learngenes
    that train. The ancestry model has one such and a frozen sum as base: Eqs. (1)-(3)."""
    def weights(step):
        with torch.autocast(a[0].device.type, enabled=False):                        # sums of weights in full precision
            Theta = [compose(torch.stack([flat(gene[g]) for gene in genes]), a[g], base=b) for g, b in enumerate(base(step))]
        return {n: p for group, part in zip(groups, Theta) for n, p in group.parameters(part).items()}

    def forward(x, step):
        return head(functional_call(net, weights(step), (x,)))
    forward.weights = weights                                                        # of the blocks, for whoever writes them
    return forward


def learn(run, args, machine, pool, task):
    """One new dataset: learngene n, its head and, with n = 1 or --stem shared, the stem train; everything older is frozen (A2)."""
    n, depths = len(pool) + 1, depths_of(args)
    torch.manual_seed(args.seed * 1000 + n)
    net = backbone(args, depths, 0)
    groups, gene, head = block_groups(net), new_learngene(net, args.init, args.init_scale, n == 1), new_head(net.width, task.num_classes)
    module = nn.ModuleDict({"gene": gene, "head": head})
    net.requires_grad_(False)
    if n > 1:
        net.load_state_dict(pool.stem(), strict=False)
    if n == 1 or args.stem == "shared":
        module["stem"] = nn.ParameterDict({name.replace(".", "/"): p.requires_grad_(True) for name, p in stem_of(net).items()})
    net.to(machine.device), module.to(machine.device)
    images = args.ancestry_epochs * len(task.labels["train"])
    a = group_coefficients(groups, n, pool.settings, machine.device)
    bases = [base.to(machine.device).expand(len(a), -1) for a, base in zip(a, gain_offset(groups, args.init))]
    theta = pool.theta(n - 1) if n > 1 else [base[:0] for base in bases]
    everything = [compose(t, a[:, :-1], base=base) for t, a, base in zip(theta, a, bases)]       # the frozen part, summed once
    masks = gene_masks(math.ceil(images / args.batch_size), n - 1, args, n)
    complete, masks = masks.all(1).tolist(), masks.to(machine.device)

    def frozen(step):
        if complete[step]:
            return everything
        return [compose(t, a[:, :-1], masks[step], base) for t, a, base in zip(theta, a, bases)]

    forward = composed_forward(net, groups, [gene], head, [a[:, -1:] for a in a], frozen)
    fit(run, args, machine, f"ancestry-{n:02d}", module, forward, task, images, args.lr,
        identity={"dataset": task.name, "classes": task.num_classes, "parent": pool.hash, "depths": list(depths),
                  "gene_dropout": args.gene_dropout, "gene_keep": args.gene_keep, "init_scale": args.init_scale, **pool.settings})
    cpu = lambda named: {k.replace("/", "."): p.detach().cpu().clone() for k, p in named}
    pool.add(gene=cpu(gene.named_parameters()), head=cpu(head.named_parameters()),
             stem=cpu(module["stem"].items()) if "stem" in module else {}, dataset=task.name, class_names=task.class_names,
             counts={split: len(y) for split, y in task.labels.items()}, depths=list(depths), seed=args.seed)
    logits = own_logits(args, pool, n, task)
    pool.seal(machine.rank == 0, logits=logits_hash(logits), val=percent(logits, task.labels["val"]))


def new_head(width, num_classes):
    head = nn.Linear(width, num_classes)
    nn.init.trunc_normal_(head.weight, std=0.02), nn.init.zeros_(head.bias)
    return head


def numbers(G):
    """Which learngenes a selection holds, counted from 1; None for no selection."""
    return G and [n for n, g in enumerate(G, 1) if g]


def percent(logits, y):
    return 100 * float((logits.argmax(-1) == y).float().mean())


@torch.no_grad()
def in_parts(function, x, size=500):
    return torch.cat([function(part) for part in x.split(size)])


def own_logits(args, pool, n, task):
    """Logits (images, classes) of dataset n's val images as they were when it was learned: learngenes 1 to n and its head."""
    record = pool.records[n - 1]
    net = backbone(args, record["depths"], task.num_classes).to(pool.device).eval()
    fill_from(pool, net, torch.ones(n), n).head.load_state_dict(record["head"])
    return in_parts(net, task.examples("val")[0])


def logits_hash(logits):
    return hashlib.sha256(logits.cpu().contiguous().numpy().tobytes()).hexdigest()


def report_learned(run, args, machine, pool, tasks):
    """After a dataset: what was learned, and whether every earlier dataset's logits are what they were, bit for bit."""
    known = [(n, r) for n, r in enumerate(pool.records, 1) if r["dataset"] in tasks]
    kept = sum(logits_hash(own_logits(args, pool, n, tasks[r["dataset"]])) == r["logits"] for n, r in known[:-1])
    n, record = known[-1]
    run.print(f"learngene {n} ({record['dataset']}): {record['val']:.1f} % on val, chance {100 / len(record['class_names']):.1f}; "
              f"logits of {kept} of the {len(known) - 1} earlier datasets at hand are unchanged, bit for bit")
    run.log("pool", learngene=n, dataset=record["dataset"], val=record["val"], kept=kept, earlier=len(known) - 1)


def alone(run, args, machine, pool, tasks):
    """Class-mean accuracy (leave one out, val images) of every learngene on its own, on every dataset; and of no learngene at all,
    an untrained network. Eq. (8) may select any subset, so each should be alive."""
    names, N = [r["dataset"] for r in pool.records if r["dataset"] in tasks], len(pool)
    nets = [fill_from(pool, backbone(args, pool.records[0]["depths"], 0).to(pool.device).eval(), row) for row in torch.eye(N)]
    torch.manual_seed(args.seed)
    nets.append(backbone(args, pool.records[0]["depths"], 0).to(pool.device).eval())
    columns = []
    for name in names:
        x, y = tasks[name].examples("val")
        with torch.no_grad():
            features = [[net(part) for net in nets] for part in x.split(500)]        # every image is decoded once, for all nets
        columns.append([percent(ncm_logits(torch.cat(f), y, tasks[name].num_classes), y) for f in zip(*features)])
    table = list(zip(*columns))
    run.print("each learngene alone, class-mean accuracy on val, % (rows: learngenes, then an untrained network; columns: datasets)")
    for n, row in enumerate(table, 1):
        run.print(f"{n if n <= N else 'none':>5}" + "".join(f"{v:7.1f}" for v in row) + f"   mean {sum(row) / len(row):.1f}")
    run.log("alone", datasets=names, table=table)


# ----------------------------------------------------------------------------------------------------------------------
# Learngene Selection: the Task-Adaptive Learngene Selector (TALS)
# ----------------------------------------------------------------------------------------------------------------------

def reward(logits, y, G, gamma=2.0, lam=0.01):
    """Eq. (5), averaged over the reward set: (1 - p_y)^gamma log(p_y) - lambda |G|_1. (B, C), (B,), (N,) -> ()"""
    log_p = -F.cross_entropy(logits, y, reduction="none")                            # log p_{y_i}(x_i; theta_G)
    return ((1 - log_p.exp()) ** gamma * log_p).mean() - lam * G.sum()               # Eq. (5)


def expected_reward(r):
    """Eq. (6): J(phi) = E[r(G)], as the mean over sampled selections. r (S,)"""
    return r.mean()                                                                  # Eq. (6)


def policy_loss(log_pi, r, b, scale=1.0):
    """A number whose gradient by phi is minus Eq. (7): E[grad log pi_phi(G) (r(G) - b)]. log_pi (S,), r (S,)"""
    return -(log_pi * (r - b) / scale).mean()                                        # Eq. (7)


def log_policy(phi, G, k=0):
    """log pi_phi(G) of selections G (S, N): independent with P(G_n = 1) = sigmoid(phi_n); given |G| = k if k > 0 (A8). -> (S,)"""
    if not k:
        return -F.binary_cross_entropy_with_logits(phi.expand_as(G), G, reduction="none").sum(-1)
    top = phi.detach().max()
    sums = torch.ones(1, dtype=phi.dtype)                                            # elementary symmetric polynomials of exp(phi)
    for weight in (phi - top).exp():
        sums = F.pad(sums, (0, 1)) + weight * F.pad(sums, (1, 0))
    return G @ phi - sums[k].log() - k * top


def sample_policy(phi, samples, k, generator):
    """Selections (samples, N) from the policy. The empty one, a network without weights, becomes the most likely learngene."""
    phi = phi.detach()
    if not k:
        G = torch.bernoulli(phi.sigmoid().expand(samples, -1), generator=generator)
        G[G.sum(1) == 0, phi.argmax()] = 1
        return G
    low, high = -phi.max() - 20, -phi.min() + 20     # a shift of phi changes nothing given |G| = k: the one that makes k likely
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if (phi + middle).sigmoid().sum() > k else (middle, high)
    found = phi.new_empty(0, len(phi))
    while len(found) < samples:
        G = torch.bernoulli((phi + middle).sigmoid().expand(32 * samples, -1), generator=generator)
        found = torch.cat([found, G[G.sum(1) == k]])
    return found[:samples]


class Rewards:
    """r(G) for rows of G, each subset computed once: score(G) -> (reward, accuracy). N: learngenes in the pool.

    path: a file that keeps what was computed, for a search that is killed and started again. asked: the subsets of this search.
    """
    def __init__(self, score, N, path=None):
        self.score, self.N, self.seen, self.asked, self.path = score, N, {}, set(), path
        if path and path.exists():
            *lines, torn = path.read_text().split("\n")                              # what follows the last line end was cut off by a kill
            self.seen = {tuple(key): values for key, *values in map(json.loads, lines)}
            if torn:
                write_atomically(path, lambda p: p.write_text("".join(line + "\n" for line in lines)))

    def __call__(self, G):
        keys = [tuple(row) for row in torch.as_tensor(G).int().tolist()]
        for key in keys:
            if key not in self.seen:
                self.seen[key] = self.score(torch.tensor(key, dtype=torch.float32))
                if self.path:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    with open(self.path, "a") as file:
                        file.write(json.dumps([key, *self.seen[key]]) + "\n")
        self.asked.update(keys)
        return torch.tensor([self.seen[key][0] for key in keys], dtype=torch.float64)

    def best(self, k=0):
        """The best selection that this search looked at, of size k if k > 0; among equals the first in the order of the subsets."""
        return max((key for key in sorted(self.asked) if not k or sum(key) == k), key=lambda key: self.seen[key][0])


def reinforce(rewards, args, generator, title=None):
    """REINFORCE over selections; returns the final selection probabilities (N,). The best subset seen is in `rewards`.

    title: of the progress bar, None for no bar.
    """
    phi = torch.zeros(rewards.N, dtype=torch.float64, requires_grad=True)
    optimizer, b = torch.optim.Adam([phi], args.select_lr), None
    bar = tqdm(range(args.select_steps), title, unit="step", disable=title is None, mininterval=1.0)
    for step in bar:
        G = sample_policy(phi, args.select_samples, args.genes, generator)
        r = rewards(G)
        b = expected_reward(r) if b is None else b
        spread = r.std().clamp(min=1e-6) if args.select_samples > 1 else 1.0        # A7: advantages in units of their spread
        loss = policy_loss(log_policy(phi, G.double(), args.genes), r, b, spread)
        pi = phi.sigmoid()
        entropy = -(pi * pi.log() + (1 - pi) * (1 - pi).log()).nan_to_num().sum()
        optimizer.zero_grad()
        (loss - args.entropy * (1 - step / args.select_steps) * entropy).backward()
        optimizer.step()
        b = args.baseline_decay * b + (1 - args.baseline_decay) * expected_reward(r)        # moved after use: unbiased
        bar.set_postfix(b=f"{float(b):.3f}", subsets=len(rewards.asked), refresh=False)
    return phi.detach().sigmoid()


def exhaustive(rewards, args):
    """Every subset (of size --genes)."""
    sizes = [args.genes] if args.genes else range(1, rewards.N + 1)
    for size in sizes:
        for chosen in itertools.combinations(range(rewards.N), size):
            G = torch.zeros(1, rewards.N)
            G[0, list(chosen)] = 1
            rewards(G)


def greedy(rewards, args):
    """Adds the learngene that helps most, while one helps (or until there are --genes)."""
    G, best = torch.zeros(rewards.N), -math.inf
    while G.sum() < (args.genes or rewards.N):
        candidates = torch.stack([G.index_fill(0, n, 1) for n in (G == 0).nonzero()[:, 0]])
        r = rewards(candidates)
        if r.max() <= best and not args.genes:
            break
        G, best = candidates[r.argmax()], r.max()


# The paper takes p_y(x) from "the model initialized with the selected learngenes", which has no head for a new task (A6).

def ncm_logits(f, y, C, temperature=10.0):
    """Leave-one-out class means: cosine of each centred feature to the means of the classes, its own image left out of its
    own class, times 10. f (B, D), y (B,) with at least two images per class -> logits (B, C)"""
    f = F.normalize(f - f.mean(0), dim=-1)
    sums = f.new_zeros(C, f.shape[1]).index_add_(0, y, f)
    logits = f @ F.normalize(sums, dim=-1).T
    own = (f * F.normalize(sums[y] - f, dim=-1)).sum(-1, keepdim=True)
    return temperature * logits.scatter(1, y[:, None], own)


def ridge_logits(f, y, C, temperature=10.0, kappa=0.1):
    """Leave-one-out ridge regression onto one-hot labels, in closed form, times 10. kappa: in units of the mean eigenvalue."""
    f, Y = (f - f.mean(0)).double(), F.one_hot(y, C).double()
    Y = Y - Y.mean(0)
    A = f.T @ f
    H = f @ torch.linalg.solve(A + kappa * A.trace() / len(A) * torch.eye(len(A), dtype=A.dtype, device=A.device), f.T)
    h = H.diagonal()[:, None]
    return (temperature * (H @ Y - h * Y) / (1 - h)).float()                         # prediction without the image itself


def reward_rows(task, share, seed):
    """Rows of the training images that TALS looks at: `share` of every class, at least two images of it."""
    y, rows = task.labels["train"], []
    for c in range(task.num_classes):
        mine = (y == c).nonzero()[:, 0].cpu()
        if len(mine) < 2:
            fail(f"class {task.class_names[c]!r} of {task.name} has {len(mine)} training image; TALS needs at least 2 of every class")
        rows.append(mine[torch.randperm(len(mine), generator=data.generator(seed, c, 7))[:max(2, round(share * len(mine)))]])
    return torch.cat(rows).sort().values


def patch_labels(masks, patch, C):
    """The class that fills most of each patch, (B, S, S) -> (B, T); data.IGNORED where less than half is labelled."""
    B, S, _ = masks.shape
    pixels = masks.long().view(B, S // patch, patch, S // patch, patch).transpose(2, 3).reshape(B, -1, patch * patch)
    counts = F.one_hot(pixels.clamp(max=C), C + 1)[..., :C].sum(2)                   # (B, T, C)
    return torch.where(counts.sum(-1) * 2 >= patch * patch, counts.argmax(-1), data.IGNORED)


def make_rewards(run, args, machine, pool, task, depths):
    """(Rewards of a task, number of examples, share of the commonest class in percent). The examples of a segmentation task are
    patches, their class is the commonest of the patch (A11)."""
    y, C, segmentation = task.labels["train"], task.num_classes, task.segmentation
    if segmentation and args.reward_head == "trained":
        fail("--reward-head trained serves classification; for segmentation say ncm or ridge")
    rows = (reward_rows(task, args.reward_share, args.seed) if not segmentation else
            torch.randperm(len(y), generator=data.generator(args.seed, 7))[:math.ceil(args.reward_share * len(y))]).to(machine.device)
    rest = torch.ones_like(y if not segmentation else y[:, 0, 0], dtype=torch.bool).index_fill_(0, rows, False)
    x, y = task.pixels("train", rows), y[rows]       # bytes: what is looked at of a large dataset fits memory as such
    if args.reward_head == "trained" and not rest.any():
        fail("--reward-head trained needs training images that TALS does not look at; lower --reward-share")
    net, drawn_at = backbone(args, depths, 0).to(machine.device).eval(), x.shape[-1]
    if segmentation:
        side = args.image_size
        x, y = x[..., :side, :side], patch_labels(y[:, :side, :side], args.patch, C).flatten()
        usable = (y < C) & (torch.bincount(y, minlength=data.IGNORED + 1)[y] > 1)
        y = y[usable]

    def closed_form(G):
        fill_from(pool, net, G)
        features = net if not segmentation else lambda x: patch_features(net, x).flatten(0, 1)
        f = in_parts(lambda part: features(task.normalise(part)), x)
        return {"ncm": ncm_logits, "ridge": ridge_logits}[args.reward_head](f[usable] if segmentation else f, y, C)

    def short_training(G):                           # on the training images that are not looked at
        torch.manual_seed(args.seed)
        net = fill_from(pool, backbone(args, depths, C).to(machine.device), G)
        steps = math.ceil(args.reward_images / args.batch_size)
        data.fit(net, task.only(rest.nonzero()[:, 0]), steps, args.batch_size, args.train_lr, args.weight_decay, args.augment and args.recipe)
        return in_parts(lambda part: net(task.normalise(part)), x)

    def score(G):
        logits = (short_training if args.reward_head == "trained" else closed_form)(G)
        return float(reward(logits, y, G, args.gamma, args.lam)), percent(logits, y)

    about = [pool.hash, task.name, C, len(rest), drawn_at, task.mean, task.std, depths, str(machine.device)] + [getattr(args, k) for k in (
        "reward_share", "reward_head", "seed", "gamma", "lam", "reward_images", "train_lr", "batch_size", "augment", "recipe", "image_size")]
    file = run.dir / f"rewards-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}.jsonl"
    return Rewards(score, len(pool), file if machine.rank == 0 else None), len(y), 100 * float(torch.bincount(y).max()) / len(y)


def patch_features(net, x):
    """Patch tokens after the last LayerNorm, (B, T, D), without class token."""
    return net.fc_norm(net.norm(net.tokens(x)))[:, -(x.shape[-1] // net.config.patch_size) ** 2:]


def select(run, args, machine, pool, task, depths):
    """TALS: the learngenes that suit a task, as a selection G (N,) of 0 and 1; prints what it saw."""
    N = len(pool)
    if args.genes > N:
        fail(f"--genes {args.genes}: the pool {pool.path} has {N} learngenes")
    rewards, count, chance = make_rewards(run, args, machine, pool, task, depths)
    pi = None
    if args.search == "reinforce":
        pi = reinforce(rewards, args, data.generator(args.seed, 11), f"select {task.name}" if machine.rank == 0 else None).tolist()
    else:
        {"exhaustive": exhaustive, "greedy": greedy}[args.search](rewards, args)
    G, visited = rewards.best(args.genes), len(rewards.asked)
    r, percent_right = rewards.seen[G]
    singles = dict(zip(range(1, N + 1), rewards(torch.eye(N)).tolist()))
    chosen = numbers(G)
    run.print(f"{task.name}: learngenes {chosen} of {N} (" + ", ".join(pool.records[n - 1]["dataset"] for n in chosen) + f"), reward {r:.4f}, "
              f"accuracy of the reward head {percent_right:.1f} %, chance {chance:.1f} %; {visited} subsets looked at")
    run.print("one by one, best first: " + ", ".join(f"{n} {singles[n]:.3f}" for n in sorted(singles, key=lambda n: -singles[n])))
    if percent_right < chance + 200 * math.sqrt(chance / 100 * (1 - chance / 100) / count):          # two standard errors
        run.print(f"warning: that accuracy is no better than chance, so the reward says nothing about {task.name}; "
                  "--reward-head trained asks a short training instead")
    run.log("select", task=task.name, learngenes=chosen, reward=r, accuracy=percent_right, chance=chance, visited=visited, policy=pi,
            singles=singles, depths=list(depths), search=args.search, head=args.reward_head, genes=args.genes, seed=args.seed)
    return G


# ----------------------------------------------------------------------------------------------------------------------
# Initialization of descendant models: Eq. (8) is `fill`; here the baselines of Tables 1 and 2, and the counting of Table 4
# ----------------------------------------------------------------------------------------------------------------------

OURS = ["adaptive", "all", "random"]
METHODS = [*OURS, "scratch", "prefine", "heur", "auto", "peg", "tleg", "weight-selection"]
TLEG_SETTINGS = {"basis": "chebyshev", "first_order": 0, "init": "block"}
LARGER = {"drawn-tiny": "drawn-small", "drawn-small": "drawn-base", "tiny": "small", "small": "base"}


def source_checkpoint(run, args, stage):
    """(path, state) of a network of --stage pretrain; the state is None if it is still to be made."""
    path = Run(args.source, {}, run.machine)[stage] if args.source else run[stage]
    saved = load_checkpoint(path, stage=stage) if path.exists() else {"step": 0, "steps": 1}
    if saved["step"] < saved["steps"] and args.source:
        fail(f"no finished {path.name} in --source {args.source}; make it there by --stage pretrain --output {args.source}")
    return path, saved["model"] if saved["step"] == saved["steps"] else None


def pretrained(run, args, machine, size):
    """A plain ViT trained on all classes of --pretrain-data at once, as many images as the whole stream shows: the ancestor of
    Pre-Fine, Heur, Auto, PEG and weight selection, and TLEG's teacher."""
    stage = f"pretrain-{size}"
    path, state = source_checkpoint(run, args, stage)
    task = None if state else load_tasks([args.pretrain_data], args, machine)[args.pretrain_data]
    torch.manual_seed(args.seed)
    net = backbone(argparse.Namespace(**{**vars(args), "size": size}), (args.ancestry_depth,), len(state["head.bias"]) if state else task.num_classes)
    net.to(machine.device)
    if state:
        load_weights(net, state, path)
    else:
        fit(run, args, machine, stage, net, lambda x, step: net(x), task, args.pretrain_epochs * len(task.labels["train"]), args.lr)
        run.print(f"{stage}: {accuracy(net.eval(), task, 'val', machine.device):.1f} % on val")
    return net.eval().requires_grad_(False)


def ancestor(run, args, machine, size, task):
    """That network, or the one of this size among the published ones of --pretrained, made to take images as `task` normalises them."""
    if not args.pretrained:
        return pretrained(run, args, machine, size)
    files = {vit_state(read_weights(file)[0], 1, file)[1].width: file for file in args.pretrained.split(",")}
    width = VIT_SIZES[size][0]
    if width not in files:
        fail(f"a network of width {width} ({size}) is needed, but --pretrained names files of width {', '.join(map(str, files))}")
    net = backbone(argparse.Namespace(**{**vars(args), "size": size}), (args.ancestry_depth,), task.num_classes)
    net, report = load_pretrained(files[width], net=net, say=run.print)
    if report["mean"] is not None:
        net.load_state_dict(renormalised(net.state_dict(), (report["mean"], report["std"]), (task.mean, task.std)))
    return net.to(machine.device).eval().requires_grad_(False)


def tleg(run, args, machine):
    """TLEG (Xia et al. 2024): theta_l = theta_B + (l - 1) / L theta_A, both trained at once under the pretrained network's soft
    labels. It is `compose` with two learngenes. Returns (theta [(2, P)], stem)."""
    stage = f"tleg-{args.size}"
    path, state = source_checkpoint(run, args, stage)
    torch.manual_seed(args.seed)
    net = backbone(args, (args.ancestry_depth,), 0)
    groups = block_groups(net)
    genes = nn.ModuleList([new_learngene(net, "block"), new_learngene(net, "delta")])       # its authors': theta_A starts without gains
    task = None if state else load_tasks([args.pretrain_data], args, machine)[args.pretrain_data]
    head = new_head(net.width, len(state["head.bias"]) if state else task.num_classes)
    module = nn.ModuleDict({"genes": genes, "head": head, "stem": nn.ParameterDict({n.replace(".", "/"): p for n, p in stem_of(net).items()})})
    net.to(machine.device), module.to(machine.device)
    if state:
        load_weights(module, state, path)
    else:
        teacher = ancestor(run, args, machine, args.size, task)
        base = [base.to(machine.device) for base in gain_offset(groups, "block")]
        forward = composed_forward(net, groups, genes, head, group_coefficients(groups, 2, TLEG_SETTINGS, machine.device), lambda step: base)
        fit(run, args, machine, stage, module, forward, task, args.tleg_epochs * len(task.labels["train"]), args.lr,
            target=lambda x, y: teacher(x).float().softmax(-1))
    theta = [torch.stack([flat(gene[g]) for gene in genes]).detach() for g in range(len(groups))]
    return theta, {n.replace("/", "."): p.detach() for n, p in module["stem"].items()}


def inherit(net, state, take):
    """Copies stem and, for {layer of net: layer of the ancestor} in `take`, blocks of an ancestor's state into `net`."""
    new = {n: state[n] for n in stem_of(net)}
    for own, other in take.items():
        new |= {n.replace(f"blocks.{other}.", f"blocks.{own}.", 1): p for n, p in state.items() if n.startswith(f"blocks.{other}.")}
    net.load_state_dict(new, strict=False)
    return net


def peg(net, state, generator):
    """PEG-style (Wang et al. 2024a): a learngene of 2/3 of the heads and half of the feed-forward layers, each a random convex
    mixture, p = softmax(gauss), of the ancestor's; expanded by repetition to the heads and layers of `net`. The non-linear
    mapping that PEG then trains is left at this start (A10)."""
    L, heads, D = len(net.blocks), net.blocks[0].attn.num_heads, net.width
    L_a = 1 + max(int(n.split(".")[1]) for n in state if n.startswith("blocks."))
    mixture = lambda rows, columns: torch.randn(rows, columns, generator=generator).softmax(1).to(state["head.bias"].device)
    nearest = lambda small, large: torch.arange(large) * small // large
    inherit(net, state, {l: l * L_a // L for l in range(L)})                         # norms and projections: the nearest layer's
    new = {}
    for l in range(L):
        p = mixture(max(1, heads * 2 // 3), heads)[nearest(max(1, heads * 2 // 3), heads)]          # (heads, heads of the ancestor)
        for end in ("weight", "bias"):
            name = f"attn.qkv.{end}"
            per_head = state[f"blocks.{l * L_a // L}.{name}"].reshape(3, heads, -1)
            new[f"blocks.{l}.{name}"] = torch.einsum("ij,qjd->qid", p, per_head).reshape(3 * D, -1).squeeze(-1)
    p = mixture(max(1, L_a // 2), L_a)[nearest(max(1, L_a // 2), L)]                 # (L, L_a)
    for name in ("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"):
        mixed = torch.tensordot(p, torch.stack([state[f"blocks.{l}.{name}"] for l in range(L_a)]), 1)
        new |= {f"blocks.{l}.{name}": mixed[l] for l in range(L)}
    net.load_state_dict(new, strict=False)


def initialise(method, run, args, machine, pool, depths, num_classes, G, task=None):
    """A network of the asked depth with a fresh head, its other parameters as the method says. G: selection, for ours; task:
    whose normalisation it will see, which matters to --pretrained alone."""
    torch.manual_seed(args.seed)                     # the same head, and the same random blocks, for all methods
    net = backbone(args, depths, num_classes).to(machine.device)
    if method in OURS:
        return fill_from(pool, net, G)
    if method == "scratch":
        return net
    if args.size in SWIN_SIZES:
        fail(f"--method {method} is written for ViT; for {args.size} choose among adaptive, all, random and scratch")
    L, L_a = depths[0], args.ancestry_depth
    if method == "tleg":
        return fill(net, *tleg(run, args, machine), torch.ones(2), TLEG_SETTINGS)
    if method == "weight-selection":
        if args.size not in LARGER:
            fail(f"weight selection needs a network larger than {args.size}; there is none, choose a smaller --size")
        weight_selection(net, ancestor(run, args, machine, LARGER[args.size], task).state_dict())
        return net
    state = ancestor(run, args, machine, args.size, task).state_dict()
    kept = min(L, {"prefine": L, "heur": 3, "auto": L_a // 2, "peg": 0}[method])     # Heur: last 3 blocks; Auto: first 6 of 12
    inherit(net, state, {L - 1 - i: L_a - 1 - i for i in range(kept)} if method == "heur" else {i: i for i in range(kept)})
    if method == "peg":
        peg(net, state, data.generator(args.seed, 13))
    return net


def parameter_counts(net, k, N, constrained=False):
    """What Table 4 counts, of a descendant from k of N learngenes: `stored` (k learngenes, stem and head), `trainable`,
    `deployed` (what runs: it depends on the depth alone), and the paper's `nominal` k / N of the deployed (A12)."""
    groups, sizes = block_groups(net), {n: p.numel() for n, p in net.named_parameters()}
    gene = sum(shape.numel() for group in groups for shape in group.shapes.values())
    stem, head = sum(p.numel() for p in stem_of(net).values()), sum(s for n, s in sizes.items() if n.startswith("head."))
    deployed = sum(sizes.values())
    return {"stored": k * gene + stem + head, "trainable": k * gene + head if constrained else deployed, "deployed": deployed,
            "nominal": deployed * k // N}


# ----------------------------------------------------------------------------------------------------------------------
# Experiment: image classification
# ----------------------------------------------------------------------------------------------------------------------

def selection(method, draw, run, args, machine, pool, task, depths, cache):
    """G (N,) of our own methods: TALS's, all learngenes, or a random draw of as many as TALS selects. None for baselines."""
    if method not in OURS:
        return None
    N = len(pool)
    if args.genes > N:
        fail(f"--genes {args.genes}: the pool {pool.path} has {N} learngenes")
    if method == "all":
        return (1,) * N
    if method == "random" and args.genes:
        k = args.genes
    else:
        if task.name not in cache:
            cache[task.name] = select(run, args, machine, pool, task, depths)
        if method == "adaptive":
            return cache[task.name]
        k = sum(cache[task.name])
    chosen = random.Random(f"{args.seed} {task.name} {draw}").sample(range(N), k)
    return tuple(int(n in chosen) for n in range(N))


def train(run, args, machine):
    """Descendants and baselines under one schedule and budget: Tables 1, 2 and 4, Figs. 3 and 4."""
    depths, cache, tasks = depths_of(args), {}, load_tasks(args.tasks, args, machine).values()
    for task in tasks:
        if task.segmentation:
            fail(f"{task.name} has masks, not classes; --stage segment trains on it")
    if args.export and set(args.methods) & set(OURS) and not len(open_pool(args, machine)):
        run.print(f"there are no learngenes in {args.pool_dir}, so they are made there now, once, of {args.stream}: some "
                  f"{args.ancestry_epochs:g} epochs per dataset")
        ancestry(run, argparse.Namespace(**{**vars(args), "tasks": [], "depth": []}), machine)
    pool = open_pool(args, machine, needed=True) if set(args.methods) & set(OURS) else None
    for task in tasks:
        for method in args.methods:
            for draw in range(args.draws if method == "random" else 1):
                G = selection(method, draw, run, args, machine, pool, task, depths, cache)
                train_one(run, args, machine, pool, task, depths, method, G, draw)


def constrained_module(args, machine, pool, depths, net, G):
    """(module, forward) of training under Eq. (8): only the selected learngenes and the head train, coefficients stay (A9)."""
    chosen = [n for n, g in enumerate(G) if g]
    head, net.head = net.head, nn.Identity()
    groups, bases = block_groups(net), gain_offset(block_groups(net), pool.settings["init"])
    genes = nn.ModuleList(new_learngene(net, "block") for _ in chosen).to(machine.device)
    for gene, n in zip(genes, chosen):
        gene.load_state_dict({k: p.to(machine.device) for k, p in pool.records[n]["gene"].items()}, strict=False)
    a = [a[:, chosen] for a in group_coefficients(groups, len(pool), pool.settings, machine.device)]
    bases = [base.to(machine.device) for base in bases]
    net.requires_grad_(False)
    return nn.ModuleDict({"genes": genes, "head": head}), composed_forward(net, groups, genes, head, a, lambda step: bases)


def train_one(run, args, machine, pool, task, depths, method, G, draw):
    net = initialise(method, run, args, machine, pool, depths, task.num_classes, G, task)
    counts = parameter_counts(net, sum(G) if G else 0, len(pool) if G else 1, args.constrained and bool(G))
    module, forward = constrained_module(args, machine, pool, depths, net, G) if args.constrained and G else (net, lambda x, step: net(x))
    images = args.train_images or args.train_epochs * len(task.labels["train"])
    label = "-".join([method + (str(draw + 1) if method == "random" else "")] + (["constrained"] if args.constrained and G else []))
    learngenes = numbers(G)
    chosen = "" if G is None else "-" + "".join(map(str, G))
    stage = f"train-{task.name.strip('/').replace('/', '_')}-{label}{chosen}-{args.size}-{'.'.join(map(str, depths))}-{images:g}"
    score = lambda split, limit=None: accuracy(lambda x: forward(x, 0), task, split, machine.device, limit)
    fit(run, args, machine, stage, module, forward, task, images, args.train_lr,
        identity={"learngenes": learngenes, "pool": pool.hash if G else ""}, val=lambda: score("val", 500))
    result = score(args.split)
    if args.export and machine.rank == 0:
        state = net.state_dict()
        if args.constrained and G:
            state |= {**forward.weights(0), **{f"head.{n}": p for n, p in module["head"].state_dict().items()}}
        export_weights(state, dataclasses.replace(net.config, num_classes=task.num_classes), args.export, args.format, {
            "task": task.name, "method": method, "learngenes": learngenes, "pool": pool.hash if G else None, "seed": args.seed,
            "mean": task.mean, "std": task.std, "class_names": task.class_names, "images": images, "chance": 100 / task.num_classes,
            "accuracy": result, "split": args.split})
        run.print(f"wrote {args.export} for {args.format}, and what it is to {Path(args.export).with_suffix('.json')}")
    run.print(f"{task.name}, {args.size} x {'.'.join(map(str, depths))}, {label}{f' {learngenes}' if G else ''}: {result:.2f} % after "
              f"{images:g} images ({args.split})")
    run.log("train", task=task.name, size=args.size, depths=list(depths), method=method, draw=draw, constrained=args.constrained,
            learngenes=learngenes, genes=args.genes, images=images, seed=args.seed, lr=args.train_lr, split=args.split, accuracy=result,
            curve=run.values(stage, "val"), **counts)


# ----------------------------------------------------------------------------------------------------------------------
# Experiment: image segmentation (Segmenter, Strudel et al. 2021)
# ----------------------------------------------------------------------------------------------------------------------

class Segmenter(nn.Module):
    """A ViT encoder and the mask transformer: two blocks over [patches; classes], masks as scalar products of the two.

    forward(x): images (B, 3, S, S) -> logits (B, C, S, S). The position embedding is resized to S x S.
    """
    def __init__(self, encoder, num_classes, size, layers=2):
        super().__init__()
        D, c = encoder.config.width, encoder.config
        self.grid, prefix = size // c.patch_size, int(c.pool == "token")
        encoder.pos_embed = nn.Parameter(resized_pos_embed(encoder.pos_embed.detach(), self.grid, prefix, mode="bilinear"))
        encoder.head, self.encoder, self.patch = nn.Identity(), encoder, c.patch_size
        self.proj_in = nn.Linear(D, D)
        self.cls_emb = nn.Parameter(torch.zeros(1, num_classes, D))
        self.blocks = nn.Sequential(*(Block(D, c.heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(D)
        self.proj_patch, self.proj_classes = (nn.Linear(D, D, bias=False) for _ in range(2))
        self.mask_norm = nn.LayerNorm(num_classes)
        for name, p in self.named_parameters():
            if not name.startswith("encoder.") and p.ndim > 1:
                nn.init.trunc_normal_(p, std=D ** -0.5 if "proj_" in name and "proj_in" not in name else 0.02)
        nn.init.zeros_(self.proj_in.bias)

    def forward(self, x):
        B, T, C = len(x), self.grid ** 2, self.cls_emb.shape[1]
        tokens = patch_features(self.encoder, x)                                     # (B, T, D)
        both = self.norm(self.blocks(torch.cat([self.proj_in(tokens), self.cls_emb.expand(B, -1, -1)], 1)))
        patches, classes = both.split([T, C], 1)
        masks = F.normalize(self.proj_patch(patches), dim=-1) @ F.normalize(self.proj_classes(classes), dim=-1).transpose(1, 2)
        masks = self.mask_norm(masks).transpose(1, 2).reshape(B, C, self.grid, self.grid)
        return F.interpolate(masks.float(), scale_factor=self.patch, mode="bilinear")


@torch.no_grad()
def sliding_logits(net, x, window, stride):
    """Logits (B, C, S, S) of images larger than the network's: windows every `stride` pixels and at the far edges, overlaps averaged."""
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
    """Mean over classes of intersection / union, in percent, over all pixels of a split. confusion[true, predicted] (C, C)"""
    hit = confusion.diagonal().double()
    return 100 * float((hit / (confusion.sum(0) + confusion.sum(1) - hit)).nanmean())


def evaluate_segmentation(net, task, split, window, stride):
    C, total = task.num_classes, 0
    for k in range(0, len(task.labels[split]), 16):
        x, y = task.normalise(task.images[split][k:k + 16]), task.labels[split][k:k + 16]
        predicted, y = sliding_logits(net, x, window, stride).argmax(1)[y != data.IGNORED], y[y != data.IGNORED].long()
        total = total + torch.bincount(y * C + predicted, minlength=C * C).view(C, C)
    return mean_iou(total)


def segment(run, args, machine):
    """Table 3: encoders initialised by every method, decoders at random, all trained alike."""
    depths, cache = depths_of(args), {}
    pool = open_pool(args, machine, needed=True) if set(args.methods) & set(OURS) else None
    for task in load_tasks(args.tasks, args, machine).values():
        if not task.segmentation:
            fail(f"{task.name} has no masks; --stage segment takes segmentation tasks: scenes, ade20k")
        for method in args.methods:
            G = selection(method, 0, run, args, machine, pool, task, depths, cache)
            encoder = initialise(method, run, args, machine, pool, depths, 1, G, task)
            torch.manual_seed(args.seed)
            net = Segmenter(encoder.cpu(), task.num_classes, args.crop).to(machine.device)
            images = args.train_images or args.train_epochs * len(task.labels["train"])
            learngenes = numbers(G)
            fit(run, args, machine, f"segment-{task.name}-{method}-{args.size}-{depths[0]}-{images:g}", net, lambda x, step: net(x), task, images,
                args.train_lr, identity={"learngenes": learngenes, "pool": pool.hash if G else "", "crop": args.crop},
                target=lambda x, y: y.masked_fill(y == data.IGNORED, -100), crop=args.crop)          # -100: cross_entropy's mark
            score = evaluate_segmentation(net.eval(), task, args.split, args.crop, args.stride)
            run.print(f"{task.name}, {args.size} x {depths[0]}, {method}: mIoU {score:.2f} after {images:g} images ({args.split})")
            run.log("segment", task=task.name, size=args.size, depths=list(depths), method=method, learngenes=learngenes, images=images,
                    seed=args.seed, split=args.split, miou=score)


# ----------------------------------------------------------------------------------------------------------------------
# Experimental Setup: every setting, with its source
# ----------------------------------------------------------------------------------------------------------------------

STAGES = ["ancestry", "pretrain", "select", "train", "segment"]
PRESETS = ["drawn", "paper"]
OPEN = "paper silent"
DEIT = "paper silent; DeiT"


def layers(text):
    """One number of layers, or one per stage: 6, or 2,2,6,2."""
    return [positive(n) for n in text.split(",")]


FLAGS = [   # name, type, (drawn, paper), help and source
    ("--stage", STAGES, "ancestry", "what to do; pretrain: the baselines' ancestor, and what --method weight-selection,tleg need besides"),
    ("--data", str, "", "ancestry: datasets to learn now; select, train, segment: tasks, comma-separated: drawn, real, folders of images"),
    ("--stream", str, ("wide/10", "imagenet/10"), "the ancestry's datasets in order; NAME/K: K disjoint subsets of its classes (paper: 10)"),
    ("--data-dir", str, "data", "where real datasets lie, and drawn data is cached"),
    ("--output", str, "runs/adaptive", "directory of the run"),
    ("--export", str, "", "train: file to write the trained network to, .pt, .pth or .safetensors; learngenes are made when missing"),
    ("--format", ["timm", "torchvision"], "timm", "whose VisionTransformer loads that file"),
    ("--pool", str, "", "directory of the learngenes (default: pool/ in --output)"),
    ("--source", str, "", "directory of the baselines' ancestors (default: --output, made when missing)"),
    ("--pretrained", str, "", "published ViTs (timm, DeiT, torchvision, Hugging Face) for the baselines' ancestors; comma-separated files"),
    ("--method", str, "adaptive", f"train, segment: comma-separated from {', '.join(METHODS)}"),
    ("--seed", whole, 0, "seed of the run; the data have their own, fixed"),
    ("--device", str, "auto", "cpu, cuda, cuda:1 ..."),
    ("--threads", whole, (1, 0), "CPU threads, 0 for all; the drawn networks are too small to gain from a second one"),
    ("--amp", ["auto", "none", "bf16", "fp16"], "auto", "mixed precision; auto: bf16 on a GPU, none on a CPU"),
    ("--size", [*VIT_SIZES, *SWIN_SIZES], ("drawn-small", "small"), "width and heads of pool and descendants"),
    ("--depth", layers, [], "layers of the descendant, any number (Swin: one per stage, as 2,2,6,2, of the ancestry, too); default: the ancestry's"),
    ("--ancestry-depth", positive, (6, 12), "layers of the ancestry model (DeiT)"),
    ("--image-size", positive, (32, 224), "pixels"),
    ("--patch", positive, (8, 16), "pixels"),
    ("--pool-type", ["token", "avg"], ("avg", "token"), "class token (DeiT), or mean of the patches"),
    ("--batch-size", positive, (64, 1024), f"images per step, over all processes; {DEIT}: 1024"),
    ("--ancestry-epochs", amount, (10.0, 300.0), "epochs per dataset (Training Settings)"),
    ("--pretrain-epochs", amount, (10.0, 300.0), "epochs of the baselines' ancestor over --pretrain-data: as many images as the stream shows"),
    ("--tleg-epochs", amount, (5.0, 150.0), "TLEG's own (Xia et al. 2024)"),
    ("--train-epochs", amount, (10.0, 500.0), "Training Settings: 500; 50 on ImageNet-1K, 100 on iNat-2019 and in the ablations; 50 on ADE20K"),
    ("--train-images", whole, 0, "images to train on, instead of epochs"),
    ("--pretrain-data", str, ("wide", "imagenet"), "all of the stream's classes at once, for the baselines"),
    ("--lr", amount, (2e-3, 1e-3), f"peak rate of learngenes and of the baselines' ancestor; {DEIT}: 5e-4 x batch / 512"),
    ("--train-lr", amount, (2e-3, 1e-3), f"peak rate of descendants and all baselines; {DEIT}, likewise"),
    ("--weight-decay", amount, 0.05, DEIT),
    ("--warmup", share, (0.05, 0.0167), f"share of the steps that warm up; {DEIT}: 5 of 300 epochs"),
    ("--clip", amount, (1.0, 0.0), f"gradient norm, 0 for none; {DEIT}: none"),
    ("--augment", yes_no, True, "yes or no: training images are varied at random"),
    ("--recipe", ["shift", "deit"], ("shift", "deit"), f"how they are varied; {DEIT}: crops, RandAugment, erasing, MixUp, CutMix, smoothing"),
    ("--basis", ["chebyshev", "legendre", "monomial"], "chebyshev", "polynomials of a(l, n); Lin et al. 2024c compare them"),
    ("--first-order", whole, 0, "degree of a(l, 1): 0, or 1 as printed by Lin et al. 2024c"),
    ("--init", ["delta", "block", "zero"], "delta", f"how a new learngene starts; {OPEN}"),
    ("--init-scale", amount, 1.0, f"size of the matrices of a new learngene after the first, in units of 0.02; {OPEN}"),
    ("--gene-dropout", share, 0.7, f"share of steps in which only a few older learngenes take part; {OPEN}, 0 is the literal reading"),
    ("--gene-keep", share, 0.1, f"chance of each older learngene to take part in such a step; {OPEN}"),
    ("--stem", ["frozen", "shared"], "frozen", f"after dataset 1 the stem is frozen, or trained on, every learngene then keeping its own; {OPEN}"),
    ("--gamma", amount, 2.0, "of Eq. (5) (Training Settings)"),
    ("--lam", amount, 0.01, "lambda of Eq. (5) (Training Settings)"),
    ("--reward-share", share, 0.1, "share of the training images that TALS looks at (Training Settings)"),
    ("--reward-head", ["ncm", "ridge", "trained"], "ncm", f"p_y(x) of a task without a head: class means, ridge regression, short training; {OPEN}"),
    ("--reward-images", positive, 4000, "images of that short training"),
    ("--search", ["reinforce", "exhaustive", "greedy"], "reinforce", "how selections are found; the other two check the first"),
    ("--genes", whole, 0, "number of learngenes to select (Fig. 4: 5), 0 to leave it to the reward"),
    ("--select-steps", positive, 200, f"REINFORCE steps; {OPEN}"),
    ("--select-samples", positive, 16, f"selections per step; {OPEN}"),
    ("--select-lr", amount, 0.05, f"Adam; {OPEN}"),
    ("--baseline-decay", share, 0.9, f"of the moving average b, Eq. (7); {OPEN}"),
    ("--entropy", amount, 0.01, f"weight of the policy's entropy, falling to 0; {OPEN}"),
    ("--constrained", bool, False, "train: keep Eq. (8) while training, only the selected learngenes and the head train"),
    ("--draws", positive, 5, "random selections of --method random (Fig. 4)"),
    ("--looks", whole, 12, "how often the accuracy on val is logged during further training (Fig. 3)"),
    ("--scene-size", positive, (96, 512), "pixels of segmentation images"),
    ("--crop", positive, (64, 512), "window that the segmentation network sees (Segmenter: 512)"),
    ("--stride", positive, (32, 512), "step of the sliding window (Segmenter: 512)"),
    ("--split", ["val", "test"], "test", "split that train and segment report; settings were chosen on val"),
    ("--workers", positive, 2, "threads that draw, processes that read folders"),
    ("--save-every", positive, 500, "steps between checkpoints, a multiple of --log-every"),
    ("--log-every", positive, 50, "steps between log lines"),
]


def settings(argv=None):
    args = parse_flags(__doc__.strip(), FLAGS, PRESETS, argv)
    args.pool_dir, args.pool = args.pool or os.path.join(args.output, "pool"), args.pool_type
    args.tasks, args.methods = [t for t in args.data.split(",") if t], args.method.split(",")
    unknown = sorted(set(args.methods) - set(METHODS))
    if unknown:
        fail(f"--method {unknown[0]}: choose among {', '.join(METHODS)}")
    if args.first_order > 1:
        fail(f"--first-order is 0 or 1, not {args.first_order}")
    if args.stage in ("select", "train", "segment") and not args.tasks:
        fail(f"--stage {args.stage} needs a task: --data NAME, or --data FOLDER with one sub-folder of images per class")
    if args.size in SWIN_SIZES and args.stage in ("pretrain", "segment"):
        fail(f"--stage {args.stage} is written for ViT, not for {args.size}")
    if args.stage == "segment" and (args.crop % args.patch or args.crop > args.scene_size):
        fail(f"--crop {args.crop} must be a multiple of --patch {args.patch} and at most --scene-size {args.scene_size}")
    if args.stage == "segment" and args.stride > args.crop:
        fail(f"--stride {args.stride} leaves pixels between windows of --crop {args.crop}; choose at most {args.crop}")
    if args.batch_size % int(os.environ.get("WORLD_SIZE", 1)):
        fail(f"--batch-size {args.batch_size} does not divide among {os.environ['WORLD_SIZE']} processes")
    depths = depths_of(args)
    short = [m for m in args.methods if m in ("prefine", "weight-selection") and depths[0] > args.ancestry_depth]
    if short:
        fail(f"--method {short[0]} cannot make {depths[0]} layers of an ancestor with {args.ancestry_depth}; lower --depth or raise --ancestry-depth")
    if args.stage == "ancestry" and args.depth and args.size not in SWIN_SIZES:
        fail("--depth is for descendants; the ancestry takes --ancestry-depth")
    if args.export:
        networks = len(args.tasks) * len(args.methods) * (args.draws if "random" in args.methods else 1)
        if args.stage != "train" or args.size in SWIN_SIZES or networks != 1:
            fail("--export is for --stage train with one task, one --method (random: --draws 1), and ViTs")
        check_export(args.export, args.format, args.pool)
    if args.pretrained and args.stage == "pretrain" and "tleg" not in args.methods:
        fail("--stage pretrain trains the baselines' ancestor; with --pretrained there is nothing to train")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Stages
# ----------------------------------------------------------------------------------------------------------------------

def load_tasks(names, args, machine):
    scenes = [name for name in names if name in (data.SCENES, "ade20k")]
    memory = 0 if args.augment and args.recipe != "shift" else data.MEMORY          # recipes are work for processes of their own
    with rank_zero_first(machine):
        tasks = {name: task for part, size in ((scenes, args.scene_size), ([n for n in names if n not in scenes], args.image_size))
                 for name, task in data.load_many(part, args.data_dir, size, workers=args.workers, memory=memory).items()}
    return {name: tasks[name].to(machine.device) for name in names}


def open_pool(args, machine, needed=False):
    kind = {k: getattr(args, k) for k in ("size", "image_size", "patch", "pool", "basis", "first_order", "init", "stem")}
    pool = Pool(args.pool_dir, kind, machine.device)
    if needed and not len(pool):
        fail(f"no learngenes in {args.pool_dir}; make them by --stage ancestry, or name another --pool")
    return pool


def stream(text):
    """Dataset names of --stream: NAME/K stands for its K class subsets NAME/K#1 ... NAME/K#K."""
    names = []
    for name in text.split(","):
        base, slash, parts = name.rpartition("/")
        names += [f"{name}#{i}" for i in range(1, int(parts) + 1)] if slash and parts.isdigit() and not os.path.isdir(name) else [name]
    return names


def ancestry(run, args, machine):
    """Learns one dataset after another; those that the pool knows already are passed over."""
    pool, names = open_pool(args, machine), args.tasks or stream(args.stream)
    tasks = load_tasks(names, args, machine)
    for name in names:
        if tasks[name].segmentation:
            fail(f"{name} has masks, not classes; a learngene is learned on classes")
        known = next((r for r in pool.records if r["dataset"] == name), None)
        counts = {split: len(y) for split, y in tasks[name].labels.items()}
        if known and (known["class_names"], known["counts"]) != (tasks[name].class_names, counts):
            fail(f"{name} was learned as learngene {known['number']} with {len(known['class_names'])} classes and {known['counts']['train']} "
                 f"training images, and now has {tasks[name].num_classes} and {counts['train']}; a changed dataset needs another name")
        if not known:
            learn(run, args, machine, pool, tasks[name])
            report_learned(run, args, machine, pool, tasks)
    alone(run, args, machine, pool, tasks)
    own = [r["val"] for r in pool.records]
    run.print(f"{len(pool)} learngenes in {pool.path}; on their own datasets {sum(own) / len(own):.1f} % on val on average")


def main(argv=None):
    args = settings(argv)
    machine = setup_machine(args.device, args.amp, args.seed, args.threads)
    run = Run(args.output, vars(args), machine)
    run.print(f"preset {args.preset}: " + ", ".join(f"{k} {v}" for k, v in vars(args).items() if k not in ("preset", "tasks", "methods")))
    if args.stage == "ancestry":
        ancestry(run, args, machine)
    elif args.stage == "pretrain":
        for size in [args.size] + [LARGER[args.size]] * ("weight-selection" in args.methods and args.size in LARGER):
            if not args.pretrained:
                pretrained(run, args, machine, size)
        if "tleg" in args.methods:
            tleg(run, args, machine)
    elif args.stage == "select":
        pool, depths = open_pool(args, machine, needed=True), depths_of(args)
        for task in load_tasks(args.tasks, args, machine).values():
            select(run, args, machine, pool, task, depths)
    else:
        {"train": train, "segment": segment}[args.stage](run, args, machine)


if __name__ == "__main__":
    main()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
