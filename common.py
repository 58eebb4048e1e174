"""What both papers share: the networks, and the plumbing of a run.

  1 Networks    ViT under timm's parameter names, GPT-2 under the published ones, tables of sizes
  2 Measuring   predictions and accuracy on a split of a task
  3 Training    one optimiser over many steps: schedule, gradients, log, checkpoint, resume
  4 Run         an output directory: config.json, log.jsonl, checkpoints
  5 Machine     device, mixed precision, torchrun
  6 Flags       one row per flag: name, type, defaults, help with the value's source
  7 Weights     published ViTs and GPT-2s in, ours out

Nothing here has an equation number of either paper, and nothing here knows a dataset. No trainer calls back
into a method: a training loop stands in the method's file and reads

    job = start_training(run, args, "stage", net, groups, steps, identity)   # picks up its own checkpoint
    for step in job.steps():                                                 # progress bar
        x, y = task.batch("train", step, args.batch_size)                    # depends on the step alone
        loss = ...
        job.update(loss, loss_cls=...)                                       # backward, AdamW, log, save
"""
import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import functools
import hashlib
import json
import math
import os
import platform
import re
import sys
import time
import zipfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm


class InputError(ValueError):
    """Bad input: one sentence that says what to do."""


def unknown(what, name, known):
    """The InputError for a name that is not among the known ones; it says the nearest of them."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose among {', '.join(known)}"
    return InputError(f"unknown {what} {name!r}; {hint}")


# ------------------------------------------------------------------------------------------------------------
# 1. Networks: vision transformer
# ------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Architecture of a ViT, sizes in pixels; pooling: "token" (class token) or "avg" (mean of patches)."""
    image_size: int = 224
    patch_size: int = 16
    width: int = 192
    depth: int = 12
    heads: int = 3
    num_classes: int = 1000
    pooling: str = "token"
    mlp_ratio: int = 4

    def __post_init__(self):
        check_sizes("ViT", vars(self))
        if self.image_size % self.patch_size:
            raise InputError(f"patches of {self.patch_size} px do not tile an image of {self.image_size} px; "
                             "choose a divisor")
        if self.pooling not in ("token", "avg"):
            raise InputError(f"pooling is 'token' or 'avg', not {self.pooling!r}")


def check_sizes(what, sizes, may_be_zero=()):
    """One sentence unless the whole numbers of a configuration make sense together."""
    for name, n in sizes.items():
        least = 0 if name in may_be_zero else 1
        if isinstance(n, int) and n < least:
            raise InputError(f"a {what} needs {name.replace('_', ' ')} of at least {least}, got {n}")
    if sizes["width"] % sizes["heads"]:
        raise InputError(f"{sizes['heads']} heads do not divide a width of {sizes['width']}; "
                         "choose a multiple of the number of heads")


# name -> (width, heads) of a 12-layer DeiT (Touvron et al. 2021, Table 1); TAL's L-Tiny is the same width at
# depth L. The second row is the drawn data's: the same three roles, at widths that two CPU cores can train.
VIT_SIZES = {
    "tiny": (192, 3), "small": (384, 6), "base": (768, 12),
    "drawn-tiny": (32, 4), "drawn-small": (48, 6), "drawn-base": (96, 12),
}


def width_and_heads(size, sizes=VIT_SIZES):
    """(width, heads) of a named size, or of one written as WIDTHxHEADS: "384x6"."""
    if size in sizes:
        return sizes[size]
    if not re.fullmatch(r"\d+x\d+", size):
        raise unknown("size", size, [*sizes, "WIDTHxHEADS"])
    width, heads = size.split("x")
    return int(width), int(heads)


def vit_config(size, depth=12, **overrides):
    """Configuration of a size: vit_config("small", 6, num_classes=102) is a 6-Small."""
    width, heads = width_and_heads(size)
    return ViTConfig(**{"width": width, "heads": heads, "depth": depth, **overrides})


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, width):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)

    def forward(self, x):                                           # (B, 3, H, W)
        return self.proj(x).flatten(2).transpose(1, 2)              # (B, T, D)


def split_heads(qkv, heads):
    """The queries, keys and values in (B, T, 3 D): three tensors (B, heads, T, D / heads)."""
    B, T, threefold = qkv.shape
    qkv = qkv.reshape(B, T, 3, heads, threefold // (3 * heads))
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):                                           # (B, T, D)
        q, k, v = split_heads(self.qkv(x), self.num_heads)
        mixed = F.scaled_dot_product_attention(q, k, v)             # (B, heads, T, D / heads)
        return self.proj(mixed.transpose(1, 2).reshape(x.shape))


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width, heads, mlp_ratio=4):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, mlp_ratio * width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021) under timm's parameter names.

    forward(x): images (B, 3, H, W) -> logits (B, num_classes).
    tokens(x): after the blocks -> (B, T, width), with the class token, if there is one, in front.
    encode(x): the same up to the head -> features (B, width): the class token, or the mean of the patches,
    after the last LayerNorm, which timm calls `norm` in the first case and `fc_norm` in the second.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.width
        tokens = (config.image_size // config.patch_size) ** 2
        self.patch_embed = PatchEmbed(config.patch_size, width)
        if config.pooling == "token":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
            tokens += 1
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        blocks = [Block(width, config.heads, config.mlp_ratio) for _ in range(config.depth)]
        self.blocks = nn.Sequential(*blocks)
        norm = nn.LayerNorm(width, eps=1e-6)
        if config.pooling == "token":
            self.norm, self.fc_norm = norm, nn.Identity()
        else:
            self.norm, self.fc_norm = nn.Identity(), norm
        self.head = nn.Linear(width, config.num_classes)
        self.init_weights()

    def init_weights(self):
        """DeiT's: truncated normal of std 0.02 for weights and embeddings, zero biases, unit norms."""
        for name, p in self.named_parameters():
            if p.ndim > 1:
                nn.init.trunc_normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def tokens(self, x):
        x = self.patch_embed(x)
        if self.config.pooling == "token":
            cls = self.cls_token.expand(x.shape[0], -1, -1)
            x = torch.cat([cls, x], 1)                              # (B, 1 + T, D)
        return self.blocks(x + self.pos_embed)

    def encode(self, x):
        x = self.norm(self.tokens(x))
        pooled = x[:, 0] if self.config.pooling == "token" else x.mean(1)
        return self.fc_norm(pooled)                                 # (B, D)

    def forward(self, x):
        return self.head(self.encode(x))


# ------------------------------------------------------------------------------------------------------------
# Networks: GPT-2
# ------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """Architecture of a GPT-2, by default the published "gpt2"; the last token ends a text, and pads it.

    num_classes: of a classifier that reads the last token of a text; 0 is a language model, whose head is the
    token table.
    """
    vocab: int = 50257
    context: int = 1024
    width: int = 768
    depth: int = 12
    heads: int = 12
    num_classes: int = 0

    def __post_init__(self):
        check_sizes("GPT-2", vars(self), may_be_zero=["num_classes"])


# name -> (width, heads) (Radford et al. 2019, Table 2); the published depths are 12, 24, 36 and 48.
GPT2_SIZES = {
    "gpt2": (768, 12), "gpt2-medium": (1024, 16), "gpt2-large": (1280, 20), "gpt2-xl": (1600, 25),
    "drawn-gpt2": (48, 6),
}


class CausalAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.num_heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x):                                           # (B, T, D)
        q, k, v = split_heads(self.c_attn(x), self.num_heads)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(mixed.transpose(1, 2).reshape(x.shape))


class GPT2Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.act = nn.GELU("tanh")
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.c_proj(self.act(self.c_fc(x)))


class GPT2Block(nn.Module):
    """Pre-norm transformer block in which every token sees those before it."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-5)
        self.attn = CausalAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = GPT2Mlp(width)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """GPT-2 (Radford et al. 2019) under the published parameter names; matrices are (out, in).

    forward(ids): token ids (B, T), padded at the right -> logits (B, num_classes), or (B, T, vocab) of a
    language model.
    tokens(ids): after the blocks -> (B, T, width).
    encode(ids): the last token of every text, padding aside, after the last LayerNorm -> features (B, width).
    No token sees those behind it, so the padding needs no mask.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        blocks = [GPT2Block(config.width, config.heads) for _ in range(config.depth)]
        self.h = nn.Sequential(*blocks)
        self.ln_f = nn.LayerNorm(config.width, eps=1e-5)
        if config.num_classes:
            self.score = nn.Linear(config.width, config.num_classes, bias=False)
        self.init_weights()

    def init_weights(self):
        """GPT-2's: normal of std 0.02, less by sqrt(2 depth) where a residual branch ends; zero biases."""
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / (2 * self.config.depth) ** 0.5)
            elif p.ndim > 1:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @property
    def head(self):
        return self.score

    def tokens(self, ids):
        x = self.wte(ids)                                           # (B, T, D)
        return self.h(x + self.wpe.weight[:ids.shape[1]])

    def last(self, x, ids):
        """Of x = tokens(ids), each text's last token before the padding, after the last LayerNorm: (B, D)."""
        padding = self.config.vocab - 1
        place = torch.arange(ids.shape[1], device=ids.device)
        last = (place * (ids != padding)).argmax(1)                 # (B,)
        text = torch.arange(ids.shape[0], device=ids.device)
        return self.ln_f(x[text, last])

    def encode(self, ids):
        return self.last(self.tokens(ids), ids)

    def language(self, x):
        """Of x = tokens(ids), the logits of every next token: (B, T, vocab)."""
        return F.linear(self.ln_f(x), self.wte.weight)

    def forward(self, ids):
        if self.config.num_classes:
            return self.score(self.encode(ids))
        return self.language(self.tokens(ids))


def network(config):
    """The ViT or GPT-2 of a configuration, freshly initialised."""
    return GPT2(config) if isinstance(config, GPT2Config) else ViT(config)


# ------------------------------------------------------------------------------------------------------------
# 2. Measuring
# ------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def predictions(forward, task, split, device, limit=None, batch_size=500):
    """(predicted, true) classes, int64 (N,) each, of a split of a task or of its first `limit` examples.

    forward: the task's normalised images (B, 3, H, W), or token ids (B, T) -> logits (B, classes).
    """
    x, y = task.examples(split, limit)
    predicted = []
    for part in x.split(batch_size):
        logits = forward(task.normalise(part.to(device)))
        predicted.append(logits.argmax(-1))
    return torch.cat(predicted), y.to(device)


def accuracy(forward, task, split, device, limit=None, batch_size=500):
    """Top-1 accuracy in percent; arguments as for `predictions`."""
    predicted, y = predictions(forward, task, split, device, limit, batch_size)
    return 100 * int((predicted == y).sum()) / len(y)


# ------------------------------------------------------------------------------------------------------------
# 3. Training
# ------------------------------------------------------------------------------------------------------------

LOG_EVERY = 50                # steps between log lines
MAX_BAD_STEPS = 20            # non-finite steps in a row after which a run stops; counted at every log line
NO_DECAY = ("pos_embed", "cls_token", "cls_emb", "relative_position_bias_table")


def parameter_groups(net, lr, weight_decay):
    """Two AdamW groups, as DeiT's and Swin's: matrices decay; biases, norms, position embeddings do not."""
    decayed, free = [], []
    for name, p in net.named_parameters():
        if not p.requires_grad:
            continue
        is_matrix = p.ndim > 1 and name.split(".")[-1] not in NO_DECAY
        (decayed if is_matrix else free).append(p)
    return [
        {"params": decayed, "lr": lr, "weight_decay": weight_decay},
        {"params": free, "lr": lr, "weight_decay": 0.0},
    ]


def cosine_lr(step, steps, warmup):
    """Factor on the learning rate: linear warm-up over `warmup` steps, then a cosine from 1 to 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def fit(net, task, steps, batch_size, lr, weight_decay, recipe):
    """A short training without log or checkpoint (AdamW, warm-up, cosine) on a task's training images."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=weight_decay)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine_lr(step, steps, warmup=steps // 20)
        x, y = task.batch("train", step, batch_size, recipe=recipe)
        loss = F.cross_entropy(net(task.normalise(x)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def start_training(run, args, stage, net, groups, steps, identity, extra=None):
    """The Training of a loop whose flags are `args`; identity and extra as below."""
    unit = "texts" if getattr(args, "modality", "image") == "text" else "images"
    return Training(
        run, stage, net, groups, steps,
        warmup=round(args.warmup * steps), clip=args.clip, identity=identity, extra=extra,
        batch_size=args.batch_size, save_every=args.save_every, unit=unit, accumulate=args.accumulate)


class Training:
    """The bookkeeping of one training stage; the loop itself stands where the method stands.

    net: the module whose state is checkpointed; groups: AdamW parameter groups, each with its own peak "lr".
    steps, warmup: in optimiser steps; clip: gradient norm, 0 or None for no clipping.
    identity: what a checkpoint must agree on to be resumed (method, seed, sizes ...): a dict of plain values.
    extra: plain values stored beside the weights.
    batch_size: examples per step over all processes, for log and progress bar alone; unit: what they are. A
    line of the log comes every LOG_EVERY steps, or `save_every` if that is less. A finished stage yields no
    steps. accumulate: parts in which `parts` gives a batch.
    """

    def __init__(self, run, stage, net, groups, steps, warmup=0, clip=None, identity=None, extra=None,
                 batch_size=1, save_every=250, unit="images", accumulate=1):
        self.run, self.stage, self.net = run, stage, net
        self.total, self.warmup, self.clip = steps, warmup, clip
        self.identity, self.extra = identity or {}, extra or {}
        self.batch_size, self.unit, self.accumulate = batch_size, unit, accumulate
        self.log_every = min(LOG_EVERY, save_every)
        self.save_every = save_every // self.log_every * self.log_every
        self.peaks = [group["lr"] for group in groups]
        self.params = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        # The scaler also serves without float16: it is what skips a step with non-finite gradients without
        # asking the device for a number. Without float16 its scale stays 1.
        machine = run.machine
        self.half = machine.amp is torch.float16
        scale = 2.0 ** 16 if self.half else 1.0
        self.scaler = torch.amp.GradScaler(machine.device.type, init_scale=scale, growth_interval=100)
        self.step = 0
        self.skipped = torch.zeros((), device=machine.device)       # bad steps, of which nothing finite came
        self.bad_in_a_row = 0
        self.share, self.first, self.last = 1.0, True, True         # of the batch: this part's
        self.values = {}                                            # of what is logged, over this batch
        self.sums, self.counts = {}, {}                             # of what is logged, since the last line
        if run[stage].exists():
            self.resume()
        if self.step < self.total:
            run.start(stage, self.step)
        self.line = (self.step, time.perf_counter())                # when the last line was written

    def resume(self):
        path = self.run[self.stage]
        saved = load_checkpoint(path, stage=self.stage, steps=self.total, **self.identity)
        load_weights(self.net, saved["model"], path)
        self.step = saved["step"]
        if not 0 <= self.step <= self.total:
            raise InputError(f"{path} says step {self.step} of {self.total}, so it is damaged; remove it")
        if self.step < self.total:
            load_weights(self.optimizer, saved["optimizer"], path)
            load_weights(self.scaler, saved["scaler"], path)
            self.skipped += saved["skipped"]
            self.run.print(f"{self.stage}: resuming at step {self.step} of {self.total} from {path}")

    def steps(self):
        examples = {"initial": self.step * self.batch_size, "total": self.total * self.batch_size}
        hidden = self.run.machine.rank > 0 or self.step >= self.total
        how = {"unit": f" {self.unit}", "unit_scale": True, "mininterval": 1.0, "disable": hidden}
        with tqdm(desc=self.stage, **examples, **how) as bar:
            while self.step < self.total:
                before = self.step
                yield before
                assert self.step == before + 1, "the loop must call update() once per step"
                bar.update(self.batch_size)
                last = self.step == self.total
                if last or self.step % self.log_every == 0:
                    bar.set_postfix(self.flush(), refresh=False)
                if last or self.step % self.save_every == 0:
                    self.save()
        if self.run.machine.world > 1:
            dist.barrier()                      # nobody looks for the checkpoint before rank 0 has written it

    def parts(self, x, y):
        """The examples (x, y) of a batch in --accumulate parts, for networks whose activations of the whole
        batch do not fit a GPU. update() after each adds its gradient, after the last it makes the step.

        A part counts by its share of what cross_entropy takes a mean over: examples, or pixels whose label is
        not -100. The gradient is then the whole batch's, but for the order of the sum.
        """
        pieces = list(zip(x.chunk(self.accumulate), y.chunk(self.accumulate)))
        for number, (x_part, y_part) in enumerate(pieces, 1):
            self.share = len(x_part) / len(x)
            if y.ndim > 2:
                self.share = (y_part != -100).sum() / (y != -100).sum()
            self.first, self.last = number == 1, number == len(pieces)
            yield x_part, y_part

    def update(self, loss, **values):
        """One optimiser step on `loss`, of `parts` only after the last; `values`, numbers or 0-dim tensors,
        are logged.

        Does not wait for the device.
        """
        if self.first:
            self.optimizer.zero_grad(set_to_none=True)
            self.values = {}
        self.scaler.scale(self.share * loss).backward()
        for name, value in {"loss": loss, **values}.items():
            value = value.detach().float() if torch.is_tensor(value) else value
            self.values[name] = self.values.get(name, 0) + self.share * value
        if not self.last:
            return
        factor = cosine_lr(self.step, self.total, self.warmup)
        for group, peak in zip(self.optimizer.param_groups, self.peaks):
            group["lr"] = peak * factor
        if self.run.machine.world > 1:
            average_gradients(self.params, self.run.machine.world)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.params if p.grad is not None])
        if self.clip:
            nn.utils.clip_grads_with_norm_(self.params, self.clip, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update(None if self.half else 1.0)
        self.step += 1
        self.count(torch.isfinite(self.values["loss"]) & torch.isfinite(norm), self.values)

    @torch.no_grad()
    def count(self, finite, values):
        """Adds values to the sums of the next log line, unless the step was bad."""
        for name, value in values.items():
            value = torch.where(finite, value, 0.0)
            self.sums[name] = self.sums.get(name, 0) + value
            self.counts[name] = self.counts.get(name, 0) + finite
        self.skipped = self.skipped + ~finite
        self.bad_in_a_row = (self.bad_in_a_row + 1) * ~finite

    def means(self):
        """{name: mean since the last line, over good steps and processes}; no good step, no name."""
        values = torch.stack([self.sums[name] / self.counts[name] for name in self.sums])
        if self.run.machine.world > 1:
            dist.all_reduce(values)
            values /= self.run.machine.world
        named = zip(self.sums, values.tolist())
        return {name: mean for name, mean in named if math.isfinite(mean)}

    def flush(self):
        """Writes one log line: means and speed since the last. Here alone the loop waits for the device."""
        self.check_good()
        means = self.means()
        self.sums, self.counts = {}, {}
        step, then = self.line
        self.line = (self.step, time.perf_counter())
        speed = (self.step - step) * self.batch_size / (time.perf_counter() - then)
        self.run.log(self.stage, **{
            "step": self.step,
            self.unit: self.step * self.batch_size,
            "lr": self.optimizer.param_groups[0]["lr"],
            **means,
            "skipped": int(self.skipped),
            f"{self.unit}_per_s": round(speed, 1),
        })
        return {name: f"{mean:.3f}" for name, mean in means.items()}

    def check_good(self):
        """One sentence after too many bad steps in a row; at the end of a stage one is too many.

        But for float16, which loses a step now and then, when its scale has grown too far.
        """
        bad, limit = int(self.bad_in_a_row), MAX_BAD_STEPS
        if self.step == self.total:
            limit = 2 if self.half else 1
            if int(self.skipped) == self.total:                     # not one good step
                limit = 0
        if bad < limit:
            return
        path = self.run[self.stage]
        rescue = f"the last good checkpoint is {path}" if path.exists() else "there is no checkpoint yet"
        raise InputError(f"{self.stage}: the loss was not finite in the last {bad} of {self.step} steps; "
                         f"{rescue}; lower the learning rate, or say --amp none")

    def save(self):
        if self.run.machine.rank == 0:
            done = self.step == self.total
            save_checkpoint(
                self.run[self.stage], stage=self.stage, step=self.step, steps=self.total, **self.identity,
                extra=self.extra, config=self.run.config, model=self.net.state_dict(),
                optimizer=None if done else self.optimizer.state_dict(),
                scaler=self.scaler.state_dict(), skipped=int(self.skipped))


def average_gradients(params, world):
    """Mean over processes of all gradients, as one message.

    What has no gradient here (the head of another task) has none in any process, and is left out, as it is in
    a single process.
    """
    grads = [p.grad for p in params if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(flat)
    means = (flat / world).split([g.numel() for g in grads])
    for g, mean in zip(grads, means):
        g.copy_(mean.view_as(g))


# ------------------------------------------------------------------------------------------------------------
# 4. Run: config.json, log.jsonl, checkpoints
# ------------------------------------------------------------------------------------------------------------

class Run:
    """An output directory; run["tune"] is the path of its checkpoint tune.pt. Only rank 0 writes.

    config: the settings, a dict of plain values. From its first write to its end a run owns the directory.
    """

    def __init__(self, output, config, machine):
        self.dir, self.config, self.machine = Path(output), config, machine
        self.lock = None
        check_writable(self.dir)

    def __getitem__(self, name):
        return self.dir / f"{name}.pt"

    def own(self):
        """Before the first write: locks the directory, removes what a killed process left half-written."""
        if self.lock is None:
            with writing(self.dir):
                self.dir.mkdir(parents=True, exist_ok=True)
            self.lock = locked(self.dir)
            remove_leftovers(self.dir)
            self.write_log(self.records())

    def start(self, stage, step):
        """Called by a stage once all is in order: config.json, and a log that says nothing beyond `step`."""
        if self.machine.rank > 0:
            return
        self.own()
        config = {**self.config, "torch": str(torch.__version__)}
        write_text(self.dir / "config.json", json.dumps(config, indent=1, default=str) + "\n")
        kept = []
        for record in self.records():
            beyond = step == 0 or record.get("step", 0) > step      # of a killed run
            if record["stage"] != stage or not beyond:
                kept.append(record)
        self.write_log(kept)

    def records(self):
        """The log's lines as dicts; one that a kill or a full disk tore is left out."""
        path = self.dir / "log.jsonl"
        records = []
        for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
        return [r for r in records if isinstance(r, dict) and "stage" in r]

    def write_log(self, records):
        text = "".join(json.dumps(record) + "\n" for record in records)
        write_text(self.dir / "log.jsonl", text)

    def log(self, stage, **values):
        """One JSON line."""
        if self.machine.rank == 0:
            self.own()
            line = json.dumps({"stage": stage, **values}) + "\n"
            with writing(self.dir / "log.jsonl"), open(self.dir / "log.jsonl", "a") as file:
                file.write(line)

    def result(self, stage, key, **values):
        """The one line of a stage with these entries, {name: value}: that of an earlier start is replaced."""
        if self.machine.rank > 0:
            return
        self.own()
        record = json.loads(json.dumps({"stage": stage, **key, **values}))
        same = {name: record[name] for name in ("stage", *key)}
        records = self.records()
        for place, old in enumerate(records):
            if same.items() <= old.items():
                records[place] = record
                break
        else:
            records.append(record)
        self.write_log(records)

    def values(self, stage, key):
        """What was logged of a stage under `key`, in order."""
        return [r[key] for r in self.records() if r["stage"] == stage and key in r]

    def print(self, *words):
        if self.machine.rank == 0:
            tqdm.write(" ".join(map(str, words)))


def check_writable(folder):
    """One sentence unless this is a directory that can be written to, or can be made."""
    place = Path(folder)
    with writing(place):
        while not place.exists():
            place = place.parent
    if not place.is_dir():
        raise InputError(f"--output {folder}: {place} is a file; name a directory")
    if not os.access(place, os.W_OK):
        raise InputError(f"--output {folder}: {place} cannot be written to; name another directory")


@contextlib.contextmanager
def writing(path, passed=()):
    """Turns what may go wrong when a file is written, a full disk above all, into one sentence.

    passed: kinds of errors that stay as they are.
    """
    try:
        yield
    except passed:
        raise
    except (OSError, RuntimeError) as error:                        # torch.save: RuntimeError on a full disk
        reason = getattr(error, "strerror", None) or "the disk may be full"
        raise InputError(f"{path} cannot be written: {reason}; make room, or name another place") from error


def locked(folder):
    """An open file whose lock keeps other processes out of a directory until this one dies or closes it.

    Also on file systems that several machines share, as far as these have locks; where there are none, that
    is printed. lockf, as its lock does not pass to forked processes, which might outlive this one.
    """
    import fcntl
    file = open(folder / ".lock", "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise InputError(f"another process is writing to {folder}; "
                         "wait for it, or choose another --output") from None
    except OSError as error:
        print(f"{folder} cannot be locked ({error.strerror}): let no two processes write to it", flush=True)
    return file


def remove_leftovers(folder):
    """Removes temporary files of write_atomically whose process, of this machine, is dead."""
    for path in Path(folder).glob(f".*.{platform.node()}.*.tmp"):
        with contextlib.suppress(PermissionError, ValueError):      # alive and another user's; no number
            try:
                os.kill(int(path.name.split(".")[-2]), 0)
            except ProcessLookupError:
                path.unlink(missing_ok=True)


def write_atomically(path, write, exclusive=False):
    """Calls write(temporary path), then renames it to `path`: a reader never sees half a file.

    exclusive: a file that is there stays, and FileExistsError is raised.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            if not exclusive:
                os.replace(temporary, path)
        if exclusive:
            with writing(path, passed=FileExistsError):
                os.link(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path, text):
    write_atomically(path, lambda temporary: temporary.write_text(text))


def file_name(name):
    """A task's name as a file's: "decathlon/svhn" -> "decathlon_svhn-58bb61b4"; so x/y and x_y differ."""
    plain = re.sub(r"[^\w#+,=.-]", "_", name).lstrip(".")[:80]
    if plain == name:
        return name
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()
    return f"{plain}-{digest[:8]}"


CHECKPOINT_FORMAT = 2
# {entry: type} of what Training writes.
TRAINED = {
    "stage": str, "step": int, "steps": int, "model": dict, "extra": dict, "config": dict,
    "optimizer": (dict, type(None)), "scaler": dict, "skipped": int,
}


def save_checkpoint(path, exclusive=False, **content):
    content = {"format": CHECKPOINT_FORMAT, **content}
    write_atomically(path, lambda temporary: torch.save(content, temporary), exclusive)


def load_checkpoint(path, entries=TRAINED, **expected):
    """A checkpoint as a dict on the CPU, whole and with these entries: {name: type}.

    `expected` entries (stage="tune", ...) must match what it says of itself.
    """
    content = read_checkpoint(Path(path))
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        raise InputError(f"{path} is not a checkpoint of this code (format {CHECKPOINT_FORMAT}); "
                         "give another file or remove it")
    for key, kind in entries.items():
        if not isinstance(content.get(key, ...), kind):
            raise InputError(f"{path} has no {key}, or one of another kind, so it is not as it was written; "
                             "give another file or remove it")
    for key, needed in expected.items():
        found = content.get(key)
        if repr(found) == repr(needed):                             # repr, as what is found may be anything
            continue
        said = f"holds {key.replace('_', ' ')} {found!r}, but {needed!r} is needed here"
        if key == "content":
            said = f"was trained on other data than {expected.get('task', 'the task')} holds now"
        raise InputError(f"{path} {said}; choose another --output or remove it")
    return content


def read_checkpoint(path):
    """What torch.load finds in a file, once the checksums of its zip agree: torch looks at none."""
    if not path.exists():
        raise InputError(f"no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise zipfile.BadZipFile
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:      # many kinds for a truncated, damaged or foreign file
        raise InputError(f"{path} is not a readable checkpoint (truncated, damaged, or not written by this "
                         f"code): {type(error).__name__}") from error


def load_weights(module, weights, path):
    """load_state_dict, whose complaint is one sentence here."""
    try:
        module.load_state_dict(weights)
    except Exception as error:      # RuntimeError where names or shapes differ, other kinds in a damaged file
        lines = str(error).splitlines() or [type(error).__name__]
        reason = lines[min(1, len(lines) - 1)].strip()              # the second line names a tensor
        raise InputError(f"the weights in {path} do not fit this model ({reason}); "
                         "give the flags it was trained with or choose another --output") from error


# ------------------------------------------------------------------------------------------------------------
# 5. Machine: device, mixed precision, torchrun
# ------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Machine:
    device: torch.device
    amp: torch.dtype | None           # of autocast; None computes in float32 (on a GPU, TF32 matrix products)
    rank: int = 0
    world: int = 1

    def autocast(self):
        if self.amp is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.amp)


def setup_machine(device="auto", amp="auto", seed=0, threads=0, return_memory=False):
    """Seeds, picks device and precision, joins torchrun's process group (nccl on GPUs, else gloo).

    return_memory: leave the allocator as it is, see `keep_freed_memory`.
    """
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = find_device(device, world)
    is_gpu = device.type == "cuda"
    if is_gpu:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    elif not return_memory:
        keep_freed_memory()
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if is_gpu else "gloo", timeout=timedelta(minutes=30))
    if amp == "auto":
        amp = "bf16" if is_gpu else "none"
    dtype = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    return Machine(device, dtype, rank, world)


def keep_freed_memory():
    """Lets this process keep the memory that it frees, for the next tensors; returns whether it could.

    By default, the C library of Linux gives every large block back to the system at once, and gets it anew
    with each of its pages zeroed, which takes longer than computing what goes there. Peak memory stays the
    same.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt             # glibc alone has it
    except (AttributeError, OSError, TypeError):
        return False
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4               # of malloc.h
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def find_device(name, world=1):
    """The device that --device names; under torchrun every process takes the GPU of its local rank."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not re.fullmatch(r"cuda(:\d+)?", name):
        raise InputError(f"--device is auto, cpu, cuda or cuda:N, not {name!r}")
    if world > 1:
        if name != "cuda":
            raise InputError("under torchrun say --device cuda: every process takes a GPU of its own")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    index = torch.device(name).index or 0
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= found:
        raise InputError(f"--device cuda: torch finds {found} GPUs here, number {index} was asked for; "
                         "use --device cpu")
    return torch.device("cuda", index)


@contextlib.contextmanager
def rank_zero_first(machine):
    """Rank 0 runs the block first (it draws and caches data), the others when it is done."""
    if machine.world > 1 and machine.rank > 0:
        dist.barrier()
    yield
    if machine.world > 1 and machine.rank == 0:
        dist.barrier()


# ------------------------------------------------------------------------------------------------------------
# 6. Flags
# ------------------------------------------------------------------------------------------------------------

LARGEST = 2 ** 31 - 1
PRESETS = ["drawn", "paper"]


def bounded(number, least, most):
    if not least <= number <= most:                                 # and so not NaN
        raise argparse.ArgumentTypeError(f"{number} is not a number from {least} to {most}")
    return number


def whole(text):
    return bounded(int(text), 0, LARGEST)


def positive(text):
    return bounded(int(text), 1, LARGEST)


def amount(text):
    return bounded(float(text), 0, sys.float_info.max)


def share(text):
    return bounded(float(text), 0, 1)


# {heading: rows}; a row is (name, type or list of choices, default, help); a default is one value, or (drawn,
# paper). The headings mean something: what stands under "run" changes no number of a checkpoint, "budget" the
# number of steps alone; all else is part of a checkpoint's identity.
SHARED = {
    "run": [
        ("--data", str, "", "tasks, comma-separated: drawn ones, real datasets, folders of images"),
        ("--output", str, "runs/default", "directory of the run"),
        ("--export", str, "", "file to write a network to: .pt, .pth or .safetensors"),
        ("--format", ["timm", "torchvision"], "timm", "whose VisionTransformer loads that file"),
        ("--data-dir", str, "data", "where real datasets lie, and drawn data is cached"),
        ("--split", ["val", "test"], "test", "split that is reported; settings were chosen on val"),
        ("--device", str, "auto", "cpu, cuda, cuda:1 ..."),
        ("--threads", whole, (1, 0), "CPU threads, 0 for all; drawn networks gain nothing from a second one"),
        ("--return-memory", bool, False, "to the system once freed, on Linux; keeping it is faster"),
        ("--workers", positive, 2, "threads that draw, processes that read folders"),
        ("--accumulate", positive, 1, "parts of a batch, one after another, where memory is short"),
        ("--save-every", positive, (250, 300), "steps between checkpoints"),
    ],
    "data": [
        ("--image-size", positive, (32, 224), "pixels"),
        ("--recipe", ["none", "shift", "decathlon", "deit"], ("shift", "deit"),
         "how training images are varied. shift: moved; decathlon: crops, flips, colours, noise; "
         "deit: crops, RandAugment, erasing, MixUp, CutMix, smoothing"),
    ],
    "network": [
        ("--size", str, ("drawn-small", "small"), f"width and heads: {', '.join(VIT_SIZES)}, or as 384x6"),
        ("--depth", positive, (3, 12), "layers"),
        ("--patch", positive, (8, 16), "pixels"),
        ("--pooling", ["token", "avg"], ("avg", "token"), "class token, or mean of the patches"),
    ],
    "training": [
        ("--seed", whole, 0, "seed of the run; the data have their own, fixed"),
        ("--batch-size", positive, (64, 512), "examples per step, over all processes"),
        ("--lr", amount, (2e-3, 1e-3), "peak learning rate; warm-up, then cosine"),
        ("--weight-decay", amount, 0.05, "AdamW"),
        ("--warmup", share, 0.05, "share of the steps that warm up"),
        ("--clip", amount, (1.0, 0.0), "gradient norm, 0 for no clipping"),
        ("--amp", ["auto", "none", "bf16", "fp16"], "auto",
         "mixed precision; auto: bf16 on a GPU, none on a CPU"),
    ],
    "further training": [
        ("--train-lr", amount, (2e-3, 1e-3), "peak learning rate of networks that are trained on"),
    ],
    "budget": [
        ("--train-epochs", amount, (5.0, 100.0), "epochs of further training"),
        ("--train-images", whole, 0, "images of further training, instead of epochs"),
    ],
}


class Settings:
    """The values of all flags, read-only; vars(args) is a dict, args.replace(seed=1) a changed copy.

    headings: {heading: names of its flags}; defaults: {name: the preset's value} of all flags.
    """
    __slots__ = ("__dict__", "headings", "defaults")                # what vars() is not to show has a slot

    def __init__(self, values, headings=None, defaults=None):
        object.__setattr__(self, "headings", headings or {})
        object.__setattr__(self, "defaults", defaults or {})
        self.__dict__.update(values)

    def __setattr__(self, name, value):
        raise AttributeError(f"settings are read-only; take settings.replace({name}=...)")

    def replace(self, **values):
        return Settings({**vars(self), **values}, self.headings, self.defaults)

    def changed(self):
        """{name: value} of the flags that differ from the preset's defaults."""
        return {name: value for name, value in vars(self).items() if value != self.defaults.get(name, value)}


def identity(args, *headings):
    """{name: value} of the flags under these headings: what a checkpoint must agree on to be resumed."""
    names = [name for heading in headings for name in args.headings[heading]]
    return {name: getattr(args, name) for name in names}


class Parser(argparse.ArgumentParser):
    """argparse with help of 100 columns; a bad flag is an InputError."""

    def __init__(self, **more):
        layout = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=22, width=100)
        super().__init__(formatter_class=layout, allow_abbrev=False, **more)

    def error(self, message):
        raise InputError(f"{message} (-h lists the flags)")


def add_flag(group, name, kind, default, text):
    """A row as a flag; its help ends with its default or defaults. What is not given is None."""
    shown = " | ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    if shown and kind is not bool:
        text += f" [{shown}]"
    text = text.replace("%", "%%")
    if kind is bool:
        group.add_argument(name, action="store_true", default=None, help=text)
    elif isinstance(kind, list):
        group.add_argument(name, choices=kind, metavar="NAME", help=f"{' | '.join(kind)}: {text}")
    else:
        metavar = {whole: "N", positive: "N", amount: "X", share: "X"}.get(kind, "TEXT")
        group.add_argument(name, type=kind, metavar=metavar, help=text)


def parse_flags(description, own, defaults, argv=None):
    """Settings from a command line (by default the process's own).

    own: {heading: rows} of the script, beside or instead of those in SHARED; defaults: {flag: default} where
    the script's differs. --preset picks among the defaults, and a flag that is given wins.
    """
    parser = Parser(description=description, usage="%(prog)s [--preset drawn|paper] [--FLAG VALUE ...]")
    add_flag(parser, "--preset", PRESETS, PRESETS[0], "which of two defaults")
    taken = [name for rows in own.values() for name, *_ in rows]
    table, headings = {}, {}
    for heading in [*SHARED, *own]:
        if heading in headings:
            continue
        group, headings[heading] = parser.add_argument_group(heading), []
        shared = [row for row in SHARED.get(heading, []) if row[0] not in taken]
        for name, kind, default, text in own.get(heading, []) + shared:
            default = defaults.get(name, default)
            add_flag(group, name, kind, default, text)
            key = name.removeprefix("--").replace("-", "_")
            headings[heading].append(key)
            table[key] = default
    given = vars(parser.parse_args(argv))
    preset = given["preset"] or PRESETS[0]
    for key, default in table.items():
        if isinstance(default, tuple):
            table[key] = default[PRESETS.index(preset)]
    values = {key: default if given[key] is None else given[key] for key, default in table.items()}
    return Settings({"preset": preset, **values}, headings, table)


def announce(run, args):
    """Opens a script's output: what differs from the preset's defaults, and where all settings stand."""
    words = [f"preset {args.preset}"]
    for name, value in args.changed().items():
        shown = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        words.append(f"--{name.replace('_', '-')} {shown}")
    run.print(*words)
    run.print(f"  all settings: {run.dir / 'config.json'}")


def script(main):
    """Runs a script's main: bad input is one sentence and exit code 2, Ctrl-C one and 130."""
    sys.stdout.reconfigure(errors="backslashreplace")               # names of files may be in any script
    try:
        main()
    except InputError as error:
        sentence, code = f"error: {error}", 2
    except KeyboardInterrupt:
        sentence, code = "stopped; start the same command again to go on", 130
    else:
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    print(sentence, file=sys.stderr, flush=True)
    sys.exit(code)


# ------------------------------------------------------------------------------------------------------------
# 7. Weights: files
# ------------------------------------------------------------------------------------------------------------

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))           # mean and std of pixels, where white is 1
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# Under these keys training scripts put weights; the first that is there is taken.
WRAPPERS = ("model", "state_dict", "model_ema", "state_dict_ema", "ema", "teacher", "net", "module")


def safetensors_package():
    try:
        import safetensors.torch
    except ImportError:
        raise InputError("files in .safetensors need a package: pip install safetensors") from None
    return safetensors.torch


def read_weights(path):
    """(weights, about) of a file: {name: tensor} on the CPU, and what is said of them.

    .safetensors, or whatever torch.load reads without running anything (.pt, .pth, .bin). Training
    checkpoints are unwrapped, and names lose what DDP, AveragedModel and torch.compile put before them.
    about: "wrapped", the key that was unwrapped; "own", a checkpoint of this code; "said", all that is said
    by it, by its card and by a hub's JSON files; and "heads", "mean" and "std", as far as that tells them.
    """
    path = Path(path)
    content = read_content(path)
    about = {"wrapped": None, "own": type(content.get("format")) is int}
    about["said"] = flattened(content.get("extra")) | said_beside(path)
    for key in WRAPPERS * 2:                                        # twice, as one may stand in another
        if isinstance(content.get(key), dict):
            content, about["wrapped"] = content[key], key
    weights = {}
    for name, tensor in content.items():
        if not torch.is_tensor(tensor) or name == "n_averaged":     # a count of AveragedModel's
            continue
        name = re.sub(r"^((module|_orig_mod)\.)+", "", str(name))
        weights[name] = tensor
        if tensor.layout != torch.strided or tensor.is_complex():
            raise InputError(f"{path}: {name} is sparse or complex; save plain floating-point weights")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f"{path}: {name} has values that are not finite; take an earlier checkpoint")
    if not weights:
        raise InputError(f"{path} holds no weights by name; save a state_dict")
    return weights, about | told(about["said"], path)


def read_content(path):
    """The dict in a file, as it is stored."""
    if re.search(r"-\d+-of-\d+$", path.stem) or path.is_dir() and any(path.glob("*.index.json")):
        raise InputError(f"{path}: these weights are in several files (sharded); save them in one: "
                         "model.save_pretrained(FOLDER, max_shard_size='99GB')")
    if not path.is_file():
        raise InputError(f"there is no file of weights at {path}")
    try:
        if path.suffix == ".safetensors":
            return safetensors_package().load_file(path)
        # the flags in training checkpoints of DeiT and torchvision are a Namespace, which runs nothing
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:      # many kinds, as in read_checkpoint
        raise InputError(f"{path} is not a readable file of weights (truncated, foreign, or with code in "
                         f"it): {type(error).__name__}") from error
    return content if isinstance(content, dict) else {}


def card_of(path):
    """The JSON file that says what the weights in a file are: net.pt has net.pt.json."""
    return Path(path).with_name(f"{Path(path).name}.json")


def said_beside(path):
    """What the JSON files beside a file of weights say: its card, and those of a hub's folder."""
    places = [card_of(path)]
    if path.stem in ("model", "pytorch_model"):
        places += [path.parent / "config.json", path.parent / "preprocessor_config.json"]
    said = {}
    for place in places:
        found = flattened(read_json(place)) if place.is_file() else {}
        if "preset" not in found:                                   # the settings of a run of this code
            said |= found
    return said


def read_json(path):
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON; mend or remove it") from error


def flattened(said):
    """What a card, a checkpoint's "extra" or a hub's JSON file says, one level of nesting undone."""
    flat = dict(said) if isinstance(said, dict) else {}
    for part in ("pretrained_cfg", "model_args", "architecture", "config"):
        if isinstance(flat.get(part), dict):
            flat |= flat[part]
    return flat


def told(said, path):
    """{"heads", "mean", "std"}, as far as they are said under our names, timm's or Hugging Face's."""
    found = {}
    if said.get("do_normalize") is False:
        found = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    for name in ("heads", "num_heads", "num_attention_heads", "n_head"):
        if said.get(name) is not None and "heads" not in found:
            found["heads"] = said[name]
            if type(said[name]) is not int or said[name] < 1:
                raise InputError(f"what is said of {path} has {name} {said[name]!r}; that is a whole number")
    for name in ("mean", "std", "image_mean", "image_std"):
        key = name.removeprefix("image_")
        if said.get(name) is not None and key not in found:
            found[key] = three_channels(name, said[name], path)
    return found


def three_channels(name, value, path):
    """Mean or std of pixels where white is 1; one number stands for three."""
    channels = [value] * 3 if type(value) in (int, float) else value
    good = isinstance(channels, (list, tuple)) and len(channels) == 3
    good = good and all(type(number) in (int, float) and 0 <= number <= 1 for number in channels)
    if not good or (name.endswith("std") and 0 in channels):
        raise InputError(f"what is said of {path} has {name} {value!r}; mean and std are 3 finite numbers "
                         "each, mean from 0 to 1 and std above 0, white being 1")
    return tuple(channels)


def check_said(said, needed, path):
    """One sentence where a configuration says what a network does not do; needed: {name: right values}."""
    for name, values in needed.items():
        if said.get(name) is not None and said[name] not in values:
            raise InputError(f"what is said of {path} has {name} {said[name]!r}, but these networks know "
                             f"{' or '.join(map(str, values))}")


def check_fits(state, net, path, optional=()):
    """One sentence unless `state` has just the tensors of `net`, in their shapes; a prefix is optional."""
    shapes = {}
    for name, tensor in net.state_dict().items():
        if "relative_position_index" not in name:                   # a constant that torchvision computes
            shapes[name] = tensor.shape
    troubles = {
        "lacks": [name for name in shapes if name not in state and not name.startswith(optional)],
        "also has": [name for name in state if name not in shapes],
        "has another shape of": [name for name in state if shapes.get(name) != state[name].shape],
        "has whole numbers in": [name for name in state if not state[name].is_floating_point()],
    }
    for trouble, names in troubles.items():
        if names:
            rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{path} does not fit this {type(net).__name__}: it {trouble} {names[0]}{rest}")


# ------------------------------------------------------------------------------------------------------------
# Weights: ViTs in
# ------------------------------------------------------------------------------------------------------------

# The tensors of a ViT in three dialects: timm's and DeiT's (ours), torchvision's, Hugging Face's; # is a
# block's number. Names differ, numbers do not: q, k, v are the thirds of qkv, in this order; Hugging Face's
# three are joined first.
DIALECTS = ("timm", "torchvision", "Hugging Face")
PATCHES = ("patch_embed.proj.", "conv_proj.", "embeddings.patch_embeddings.projection.")
NAMES = [
    PATCHES,
    ("cls_token", "class_token", "embeddings.cls_token"),
    ("pos_embed", "encoder.pos_embedding", "embeddings.position_embeddings"),
    ("norm.", "encoder.ln.", "layernorm."),
    ("head.", "heads.head.", "classifier."),
]
BLOCK_NAMES = [
    ("norm1.", "ln_1.", "layernorm_before."),
    ("norm2.", "ln_2.", "layernorm_after."),
    ("attn.qkv.", "self_attention.in_proj_", "attention.attention.qkv."),
    ("attn.proj.", "self_attention.out_proj.", "attention.output.dense."),
    ("mlp.fc1.", "mlp.0.", "intermediate.dense."),
    ("mlp.fc2.", "mlp.3.", "output.dense."),
]
NAMES += [
    (f"blocks.#.{ours}", f"encoder.layers.encoder_layer_#.{theirs}", f"encoder.layer.#.{face}")
    for ours, theirs, face in BLOCK_NAMES]
# Other spellings of a dialect, put right first.
SPELLINGS = {
    "timm": [],
    "torchvision": [                                                # before 0.13, and its published files
        ("mlp.linear_1", "mlp.0"), ("mlp.linear_2", "mlp.3"),
    ],
    "Hugging Face": [                                               # transformers 5 in memory
        (r"^layers\.", "encoder.layer."), (r"\.o_proj", ".output.dense"),
        (r"\.q_proj", ".attention.query"), (r"\.k_proj", ".attention.key"), (r"\.v_proj", ".attention.value"),
        (r"mlp\.fc1", "intermediate.dense"), (r"mlp\.fc2", "output.dense"),
    ],
}
# What stands behind the encoder may be left unused; any other tensor would change the features.
SPARE = re.compile(r"heads?\.(?!pre_logits)|pooler\.|(embeddings\.)?mask_token$|decoder")


def respelled(weights, dialect):
    """{name: tensor} in the one spelling of a dialect that NAMES has, with q, k and v joined."""
    for old, new in SPELLINGS[dialect]:
        weights = {re.sub(old, new, name): tensor for name, tensor in weights.items()}
    for name in list(weights):
        if ".attention.attention.query." in name:
            parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
            found = [weights[part] for part in parts if part in weights]
            if found[0].ndim and len({tensor.shape for tensor in found}) == 1:
                weights[name.replace(".query.", ".qkv.")] = torch.cat(found)
                weights = {name: tensor for name, tensor in weights.items() if name not in parts}
    return weights


def renamed(weights, old, new):
    """Names of one dialect in those of another; what is in no row of NAMES keeps its name."""
    rules = []
    for row in NAMES:
        pattern = re.escape(row[DIALECTS.index(old)]).replace(r"\#", r"(\d+)")
        replacement = row[DIALECTS.index(new)].replace("#", r"\1")
        rules.append((re.compile(pattern), replacement))
    result = {}
    for name, tensor in respelled(weights, old).items():
        for pattern, replacement in rules:
            if pattern.match(name):
                name = pattern.sub(replacement, name, count=1)
                break
        result[name] = tensor
    return result


def dialect_of(weights, path):
    """(dialect, prefix) of the one ViT among weights; a prefix is "vit.", "encoder.", mostly nothing."""
    found = []
    for dialect, patches in zip(DIALECTS, PATCHES):
        for name in weights:
            if name.endswith(patches + "weight"):
                found.append((dialect, name.removesuffix(patches + "weight")))
    if len(found) != 1:
        raise InputError(f"{path} holds {len(found) or 'no'} ViTs under names of {', '.join(DIALECTS)}; "
                         "give a file with one")
    return found[0]


def row_count(state, name):
    """Of a matrix that may be missing, or be none."""
    return len(state[name]) if name in state and state[name].ndim else 0


def heads_of_width(width, path):
    """The number of heads is a guess, as shapes do not tell: 64 to a head, as in all but ViT-H."""
    if width % 64:
        raise InputError(f"{path}: width {width} does not tell the number of heads; "
                         f"say \"heads\" in {card_of(path)}")
    return 16 if width == 1280 else width // 64


def grid_of(state, path):
    """Rows of the square grid of patches, by the position embeddings."""
    patch = state.get("patch_embed.proj.weight", torch.empty(0))
    pos = state.get("pos_embed", torch.empty(0))
    fc1 = state.get("blocks.0.mlp.fc1.weight", torch.empty(0))
    if patch.ndim == 4 and patch.shape[1] == 3 and len(patch) and pos.ndim == 3 and fc1.ndim == 2:
        patches = pos.shape[1] - ("cls_token" in state)
        grid = math.isqrt(max(0, patches))
        if grid and grid ** 2 == patches:
            return grid
    raise InputError(f"{path} is no plain ViT: that has patches of RGB images, position embeddings of a "
                     "square grid and at most a class token (none for distillation), and MLPs")


def vit_state(weights, heads=None, path="the file"):
    """(state, config, report) of a ViT in any dialect: float32 tensors, our names, ViTConfig by the shapes.

    heads: by default by the width. Without a head, config says 1 class.
    report: "source", the dialect; "unexpected", what stands behind the encoder and was left out: poolers,
    heads of other kinds. Anything else that does not fit is one sentence.

    LayerNorm adds 1e-6 to the variance here, in timm and in torchvision, but 1e-12 in Hugging Face's: 1e-4 in
    its logits.
    """
    dialect, prefix = dialect_of(weights, path)
    state = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    state = renamed(state, dialect, "timm")
    grid = grid_of(state, path)
    width, _, patch_size, _ = state["patch_embed.proj.weight"].shape
    config = ViTConfig(
        image_size=grid * patch_size, patch_size=patch_size, width=width,
        depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        heads=heads or heads_of_width(width, path),
        num_classes=row_count(state, "head.weight") or 1,
        pooling="token" if "cls_token" in state else "avg",
        mlp_ratio=len(state["blocks.0.mlp.fc1.weight"]) // width)
    spare = [n for n in state if SPARE.match(n) and n not in ("head.weight", "head.bias")]
    state = {name: tensor for name, tensor in state.items() if name not in spare}
    with torch.device("meta"):
        check_fits(state, ViT(config), path, "head.")
    state = {name: tensor.float() for name, tensor in state.items()}
    return state, config, {"source": dialect, "unexpected": spare}


def resized_pos_embed(pos_embed, grid, prefix, mode="bicubic"):
    """Position embeddings (1, prefix + n n, D) for another grid -> (1, prefix + rows columns, D).

    grid: its rows, or (rows, columns). Bicubic with antialiasing as in timm; DeiT and Hugging Face do without
    it, torchvision aligns corners; Segmenter: bilinear. The first `prefix`, those of class tokens, have no
    place on the grid and stay.
    """
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    n = math.isqrt(pos_embed.shape[1] - prefix)
    if (rows, columns) == (n, n):
        return pos_embed
    patches = pos_embed[:, prefix:].reshape(1, n, n, -1).permute(0, 3, 1, 2)        # (1, D, n, n)
    patches = F.interpolate(patches, (rows, columns), mode=mode, antialias=True)
    patches = patches.flatten(2).transpose(1, 2)                                    # (1, rows columns, D)
    return torch.cat([pos_embed[:, :prefix], patches], 1)


def vit_says(config):
    """{name: right values} of what a configuration may say of a ViT beside its weights."""
    size = config.image_size
    return {
        "hidden_act": ["gelu"], "act_layer": ["gelu"], "layer_norm_eps": [1e-6, 1e-12],
        "do_rescale": [True], "rescale_factor": [1 / 255], "image_size": [size, [size, size]],
        "patch_size": [config.patch_size], "hidden_size": [config.width], "num_hidden_layers": [config.depth],
        "intermediate_size": [config.mlp_ratio * config.width],
        "pooling": [config.pooling], "global_pool": [config.pooling],
    }


def guesses(config, said, heads_known, dialect):
    """What shapes do not tell of a ViT, and nobody has said."""
    guessed = [] if heads_known else [f"{config.heads} heads"]
    if "image_size" not in said:
        guessed.append("a square grid")
    if dialect == "timm" and config.pooling == "token" and not {"pooling", "global_pool"} & said.keys():
        guessed.append("token pooling")
    return guessed


def normalisation_of(path, about, report, classes):
    """(mean, std, why) of the images that weights were trained on; None, None for a checkpoint of this code,
    where each task has its own. What is neither told nor to be seen in the names is a guess, as why says."""
    if "mean" in about and "std" in about:
        return about["mean"], about["std"], "as told with the weights"
    if about["own"]:
        return None, None, "a checkpoint of this code: each task's own"
    if report["source"] == "torchvision":
        return *IMAGENET, "ImageNet's, as all of torchvision"
    (mean, std), whose = HALF, "most ViTs' of Google and timm"
    if classes in (21841, 21843):
        whose = "ViTs' of ImageNet-21k"
    if "deit" in Path(path).name or (report["source"], about["wrapped"]) == ("timm", "model"):
        (mean, std), whose = IMAGENET, "DeiT's"
    return mean, std, f'a guess: as {whose}; else say "mean" and "std" in {card_of(path)}'


def load_pretrained(path, num_classes=None, image_size=None, heads=None, net=None, say=print):
    """(net, report): a ViT from a file of timm, DeiT, torchvision, Hugging Face or this code, or net filled.

    num_classes, image_size: the file's by default; position embeddings are resized, and a head of other
    classes is left fresh. net, a ViT or torchvision's Swin, decides both by itself; it is untouched unless
    everything fits. report: "source", "loaded" (number of tensors), "missing", "unexpected" (names), "head"
    ("kept" or "replaced"), "mean", "std", "normalisation" (why these). say prints it, and what was guessed.
    """
    weights, about = read_weights(path)
    guess = []
    if net is None or isinstance(net, ViT):
        known = heads or about.get("heads") or (net.config.heads if net else None)
        state, config, report = vit_state(weights, known, path)
        if not about["own"]:
            check_said(about["said"], vit_says(config), path)
        if net is None:
            wanted = {"num_classes": num_classes, "image_size": image_size}
            wanted = {name: value for name, value in wanted.items() if value}
            net = ViT(dataclasses.replace(config, **wanted))
        check_same_architecture(config, net.config, path)
        grid = net.config.image_size // net.config.patch_size
        state["pos_embed"] = resized_pos_embed(state["pos_embed"], grid, int(config.pooling == "token"))
        guess = guesses(config, about["said"], known, report["source"])
    else:
        state = respelled(weights, "torchvision")
        state = {name: tensor for name, tensor in state.items() if "relative_position_index" not in name}
        report = {"source": "torchvision", "unexpected": []}
    classes = row_count(state, "head.weight")
    fill(net, state, report, path)
    mean, std, why = normalisation_of(path, about, report, classes)
    report |= {"mean": mean, "std": std, "normalisation": why}
    say(f"{path}: {report['loaded']} tensors under names of {report['source']}; head {report['head']} "
        f"({len(net.head.weight)} classes); not used: {', '.join(report['unexpected']) or 'none'}")
    if guess:
        say(f"  guesses: {', '.join(guess)}; else say "
            f"\"heads\", \"pooling\", \"image_size\" in {card_of(path)}")
    say(f"  normalisation: mean {mean}, std {std} ({why})")
    return net, report


def check_same_architecture(theirs, ours, path):
    for key in ("patch_size", "width", "depth", "heads", "pooling", "mlp_ratio"):
        found, needed = getattr(theirs, key), getattr(ours, key)
        if found != needed:
            what = key.replace("_", " ")
            raise InputError(f"{path} holds a ViT of {what} {found}, but {needed} is needed here")


def fill(net, state, report, path):
    """Loads a state into a net, the head where it has as many classes; the report gets what was done."""
    kept = row_count(state, "head.weight") == len(net.head.weight) and "head.bias" in state
    if not kept:
        report["unexpected"] += [name for name in state if name.startswith("head.")]
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    check_fits(state, net, path, () if kept else "head.")
    net.load_state_dict(state, strict=False)
    report["loaded"] = len(state)
    report["missing"] = [] if kept else ["head.weight", "head.bias"]
    report["head"] = "kept" if kept else "replaced"


def renormalised(state, source, target):
    """A ViT's state for images normalised by `target`, (mean, std), where it knows `source`.

    What lies between the two is affine per channel and goes into the patch embedding, which has no padding.
    """
    source_mean, source_std = (torch.tensor(values).view(3, 1, 1) for values in source)
    target_mean, target_std = (torch.tensor(values).view(3, 1, 1) for values in target)
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    shift = (weight * ((target_mean - source_mean) / source_std)).sum((1, 2, 3))
    return {
        **state,
        "patch_embed.proj.weight": weight * (target_std / source_std),
        "patch_embed.proj.bias": bias + shift,
    }


def weight_selection(net, state):
    """Weight selection (Xu et al. 2024): of a larger network's first layers, evenly spaced elements."""
    selected = {}
    for name, p in net.state_dict().items():
        if name.startswith("head."):
            continue
        large = state[name]
        for dim, (small, size) in enumerate(zip(p.shape, large.shape)):
            step = size // small if size % small == 0 else (size - 1) / max(1, small - 1)
            places = (torch.arange(small, device=large.device) * step).round().long()
            large = large.index_select(dim, places)
        selected[name] = large
    net.load_state_dict(selected, strict=False)


# ------------------------------------------------------------------------------------------------------------
# Weights: GPT-2 in
# ------------------------------------------------------------------------------------------------------------

CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")             # (in, out) in published files
MASKS = re.compile(r"\.attn\.(masked_)?bias$")                      # old files hold them as buffers


def gpt2_says(config):
    """{name: right values} of what a configuration may say of a GPT-2 beside its weights."""
    return {
        "activation_function": ["gelu_new", "gelu_pytorch_tanh"], "layer_norm_epsilon": [1e-5],
        "scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False],
        "add_cross_attention": [False], "tie_word_embeddings": [True],
        "vocab_size": [config.vocab], "n_positions": [config.context], "n_embd": [config.width],
        "n_inner": [4 * config.width], "n_layer": [config.depth],
    }


def gpt2_state(weights, path):
    """A GPT-2's tensors under our names, matrices as (out, in)."""
    state = {}
    for name, tensor in weights.items():
        if not MASKS.search(name):
            state[name.removeprefix("transformer.")] = tensor
    wte = state.get("wte.weight", torch.empty(0))
    wpe = state.get("wpe.weight", torch.empty(0))
    first = state.get("h.0.attn.c_attn.weight", torch.empty(0))
    if not wte.ndim == wpe.ndim == first.ndim == 2 or 3 * wte.shape[1] not in first.shape:
        raise InputError(f"{path} is no GPT-2: that has wte.weight, wpe.weight and h.0.attn.c_attn.weight; "
                         "give gpt2's pytorch_model.bin or model.safetensors")
    if not torch.equal(state.get("lm_head.weight", wte).float(), wte.float()):
        raise InputError(f"{path} has an lm_head that is not its token table; this GPT-2 ties the two")
    if first.shape[0] == wte.shape[1]:                              # Conv1D: (in, out)
        for name in state:
            if CONV1D.search(name):
                state[name] = state[name].T.contiguous()
    return state


def load_gpt2(path, num_classes=0, say=print):
    """(net, report): a GPT-2 from a published file (pytorch_model.bin, model.safetensors) or export_gpt2's.

    num_classes: 0 for the language model; a classifier keeps the file's `score` where that has as many, and
    gets a fresh one else.
    report: "loaded" (number of tensors), "unexpected" (names), "head" ("none", "kept" or "replaced").
    """
    weights, about = read_weights(path)
    state = gpt2_state(weights, path)
    vocab, width = state["wte.weight"].shape
    depth = len({name.split(".")[1] for name in state if name.startswith("h.")})
    heads = about.get("heads") or heads_of_width(width, path)
    net = GPT2(GPT2Config(vocab, len(state["wpe.weight"]), width, depth, heads, num_classes))
    if not about["own"]:
        check_said(about["said"], gpt2_says(net.config), path)
    head = "none"
    if num_classes:
        head = "kept" if row_count(state, "score.weight") == num_classes else "replaced"
    spare = [name for name in ("lm_head.weight", "score.weight") if name in state]
    if head == "kept":
        spare.remove("score.weight")
    state = {name: tensor for name, tensor in state.items() if name not in spare}
    check_fits(state, net, path, ("score.",) if head == "replaced" else ())
    net.load_state_dict(state, strict=False)
    guess = "" if about.get("heads") else f" (a guess; else say \"heads\" in {card_of(path)})"
    say(f"{path}: GPT-2 of {depth} layers, width {width}, {heads} heads{guess}, {vocab:,} tokens; "
        f"head {head}; not used: {', '.join(spare) or 'none'}")
    return net, {"loaded": len(state), "unexpected": spare, "head": head}


# ------------------------------------------------------------------------------------------------------------
# Weights: out
# ------------------------------------------------------------------------------------------------------------

FORMATS = ("timm", "torchvision", "transformers")
ENDINGS = (".pt", ".pth", ".bin", ".safetensors")


def check_export(path, format, pooling=None):
    """One sentence unless a network can be written to `path` for `format`; to be asked before the work."""
    if format not in FORMATS:
        raise unknown("--format", format, FORMATS)
    if Path(path).is_dir() or Path(path).suffix not in ENDINGS:
        raise InputError(f"the file to write (--export) ends in {', '.join(ENDINGS)}, not {path}")
    if format == "torchvision" and pooling == "avg":
        raise InputError("torchvision's ViT takes no mean over patches: give the network a class token, "
                         "or say --format timm")
    if Path(path).suffix == ".safetensors":
        safetensors_package()
    card = card_of(path)
    if card.exists() and "build" not in flattened(read_json(card)):
        raise InputError(f"{card}, where the card of {path} goes, is a file of something else; "
                         "choose another --export")


def write_with_card(path, state, card):
    """Tensors as float32 in .pt, .pth, .bin or .safetensors, and the card beside them; only finite ones."""
    state = {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise InputError(f"the weights are not finite; nothing was written to {path}")
    if Path(path).suffix == ".safetensors":
        content = safetensors_package().save(state, metadata={"format": "pt"})
        write_atomically(path, lambda temporary: temporary.write_bytes(content))
    else:
        write_atomically(path, lambda temporary: torch.save(state, temporary))
    write_text(card_of(path), json.dumps(card, indent=1, default=str) + "\n")


def export_weights(state, config, path, format="timm", card=None):
    """A ViT's state for timm or torchvision, as .pt, .pth or .safetensors, and its card beside it.

    The card holds the architecture, the call whose module loads the file strictly, and what the caller's
    `card` says (task, method, "mean", "std" ...).
    """
    check_export(path, format, config.pooling)
    with torch.device("meta"):
        check_fits(state, ViT(config), "the network to export")
    architecture = dataclasses.asdict(config)
    written = {"architecture": architecture, "format": format, "build": vit_call(config, format)}
    write_with_card(path, renamed(state, "timm", format), written | (card or {}))


def vit_call(c, format):
    """The call that builds the module of timm or torchvision."""
    if format == "timm":
        return ("timm.models.vision_transformer.VisionTransformer("
                f"img_size={c.image_size}, patch_size={c.patch_size}, embed_dim={c.width}, depth={c.depth}, "
                f"num_heads={c.heads}, mlp_ratio={c.mlp_ratio}, num_classes={c.num_classes}, "
                f"global_pool={c.pooling!r}, class_token={c.pooling == 'token'})")
    return ("torchvision.models.VisionTransformer("
            f"image_size={c.image_size}, patch_size={c.patch_size}, num_layers={c.depth}, "
            f"num_heads={c.heads}, hidden_dim={c.width}, mlp_dim={c.mlp_ratio * c.width}, "
            f"num_classes={c.num_classes})")


def export_gpt2(net, path, card=None):
    """A GPT-2 for transformers, as .bin, .pt or .safetensors, and its card.

    The card holds config.json's entries, the call whose module loads the file, and the caller's `card`.
    """
    check_export(path, "transformers")
    c, end, state = net.config, net.config.vocab - 1, {}
    for name, tensor in net.state_dict().items():
        tensor = tensor.T if CONV1D.search(name) else tensor
        state[name if name.startswith("score.") else f"transformer.{name}"] = tensor
    sizes = {
        "vocab_size": c.vocab, "n_positions": c.context, "n_embd": c.width, "n_layer": c.depth,
        "n_head": c.heads, "num_labels": c.num_classes, "pad_token_id": end,
    }
    arguments = ", ".join(f"{name}={value}" for name, value in sizes.items())
    build = f"transformers.GPT2ForSequenceClassification(transformers.GPT2Config({arguments}))"
    written = {"model_type": "gpt2", **sizes, "bos_token_id": end, "eos_token_id": end, "build": build}
    write_with_card(path, state, written | (card or {}))


if __name__ == "__main__":
    print(__doc__)
