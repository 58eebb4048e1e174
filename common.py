"""What both papers share: the network blocks, and the plumbing of a run.

  Blocks     ViT with timm's parameter names (weights of timm and DeiT fit as they are), and the table of sizes.
  Flags      one table row per flag: name, type, a value per preset, help with the value's source.
  Machine    device, mixed precision, torchrun.
  Run        an output directory: config.json, log.jsonl, checkpoints.
  Training   one optimiser over many steps: schedule, gradients, log, checkpoint, resume.

Nothing here has an equation number of either paper, and nothing here knows a dataset. There is no trainer class that
calls back into a method: a training loop stands in the method's file and reads

    job = Training(run, "stage", net, groups, steps=...)      # picks up its own checkpoint
    for step in job.steps():                                  # progress bar
        x, y = task.batch("train", step, batch_size)          # a pure function of (seed, step): no loader state
        loss = ...
        job.update(loss, loss_cls=...)                        # backward, clip, AdamW, log, checkpoint
"""
import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

CHECKPOINT_FORMAT = 1
MAX_BAD_STEPS = 20            # consecutive non-finite steps after which a run stops; looked at with every log line


def fail(message):
    """Bad input: one sentence that says what to do, exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


# ----------------------------------------------------------------------------------------------------------------------
# Vision transformer
# ----------------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Architecture of a ViT. Sizes in pixels; `pool` is "token" (class token, as ViT and DeiT) or "avg" (mean of patches)."""
    image_size: int = 224
    patch_size: int = 16
    width: int = 192
    depth: int = 12
    heads: int = 3
    num_classes: int = 1000
    pool: str = "token"
    mlp_ratio: int = 4

    def __post_init__(self):
        for name in ("image_size", "patch_size", "width", "depth", "heads", "num_classes", "mlp_ratio"):
            if getattr(self, name) < 1:
                fail(f"a ViT needs {name.replace('_', ' ')} of at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            fail(f"{self.heads} heads do not divide a width of {self.width}; choose a multiple of the number of heads")
        if self.image_size % self.patch_size:
            fail(f"patches of {self.patch_size} px do not tile an image of {self.image_size} px; choose a divisor")
        if self.pool not in ("token", "avg"):
            fail(f"pool is 'token' or 'avg', not {self.pool!r}")


# name -> (width, heads) of a 12-layer DeiT (Touvron et al. 2021, Table 1); TAL's L-Tiny is the same width at depth L.
# The second half are the drawn data's counterparts: the same three roles, at widths that two CPU cores can train.
VIT_SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12),
             "drawn-tiny": (32, 4), "drawn-small": (48, 6), "drawn-base": (64, 8)}


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):                                                            # (B, T, D)
        B, T, D = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)                                  # (B, heads, T, D/heads)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))


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


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, width):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)

    def forward(self, x):                                                            # (B, 3, H, W)
        return self.proj(x).flatten(2).transpose(1, 2)                               # (B, T, D)


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021) under timm's parameter names.

    forward(x): images (B, 3, H, W) -> logits (B, num_classes).
    tokens(x): after the blocks -> (B, tokens, width).
    encode(x): the same up to the head -> features (B, width): the class token, or the mean of the patches, after the
    last LayerNorm, which timm calls `norm` in the first case and `fc_norm` in the second.
    """
    def __init__(self, config):
        super().__init__()
        self.config = config
        tokens = (config.image_size // config.patch_size) ** 2
        self.patch_embed = PatchEmbed(config.patch_size, config.width)
        if config.pool == "token":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
            tokens += 1
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, config.width))
        self.blocks = nn.Sequential(*(Block(config.width, config.heads, config.mlp_ratio) for _ in range(config.depth)))
        norm = nn.LayerNorm(config.width, eps=1e-6)
        self.norm, self.fc_norm = (norm, nn.Identity()) if config.pool == "token" else (nn.Identity(), norm)
        self.head = nn.Linear(config.width, config.num_classes)
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
        if self.config.pool == "token":
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)         # (B, 1 + T, D)
        return self.blocks(x + self.pos_embed)

    def encode(self, x):
        x = self.norm(self.tokens(x))
        return self.fc_norm(x[:, 0] if self.config.pool == "token" else x.mean(1))   # (B, D)

    def forward(self, x):
        return self.head(self.encode(x))


def vit_config(size, depth=12, **overrides):
    """Configuration of a named size: vit_config("small", 6, num_classes=102) is a 6-Small."""
    if size not in VIT_SIZES:
        fail(f"unknown size {size!r}; choose one of {', '.join(VIT_SIZES)}")
    width, heads = VIT_SIZES[size]
    return ViTConfig(**{"width": width, "heads": heads, "depth": depth, **overrides})


def vit(size, depth=12, **overrides):
    return ViT(vit_config(size, depth, **overrides))


@torch.no_grad()
def accuracy(forward, task, split, device, limit=None, batch_size=500):
    """Top-1 accuracy in percent of `forward` (images -> logits) on a split of a data.Task, or on its first `limit` images."""
    x, y = task.examples(split, limit)
    correct = [(forward(a.to(device)).argmax(-1) == b.to(device)).sum() for a, b in zip(x.split(batch_size), y.split(batch_size))]
    return 100 * int(torch.stack(correct).sum()) / len(y)


def parameter_groups(net, lr, weight_decay):
    """Two AdamW groups: matrices decay; biases, norms, embeddings of positions and classes do not (DeiT's, Swin's rule)."""
    free = ("pos_embed", "cls_token", "cls_emb", "relative_position_bias_table")
    decayed = {n for n, p in net.named_parameters() if p.ndim > 1 and n.split(".")[-1] not in free}
    split = [[p for n, p in net.named_parameters() if p.requires_grad and (n in decayed) == d] for d in (True, False)]
    return [dict(params=split[0], lr=lr, weight_decay=weight_decay), dict(params=split[1], lr=lr, weight_decay=0.0)]


# ----------------------------------------------------------------------------------------------------------------------
# Flags
# ----------------------------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (-h lists the flags)")


def whole(text):
    """A whole number of at least 0."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError("a whole number of at least 0")
    return int(text)


def positive(text):
    """A whole number of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return int(text)


def amount(text):
    """A finite number of at least 0."""
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError("a finite number of at least 0")
    return float(text)


def share(text):
    """A number from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError("a number from 0 to 1")
    return float(text)


def yes_no(text):
    if text.lower() not in ("yes", "no"):
        raise argparse.ArgumentTypeError("yes or no")
    return text.lower() == "yes"


def parse_flags(description, rows, presets, argv=None):
    """Command line from a table of rows (name, type or choices, values, help).

    `values` is one default, or a tuple with one per preset, in the order of `presets`; --preset picks among them and a
    flag given on the command line wins. Types: int, float, str, a list of choices, or bool (given = true).
    """
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--preset", choices=presets, default=presets[0], help="which column of defaults")
    for name, kind, values, text in rows:
        shown = " | ".join(map(str, values)) if isinstance(values, tuple) else str(values)
        names = [name] + {"--data-dir": ["--data-path"], "--output": ["--output-dir"], "--workers": ["--num-workers"]}.get(name, [])
        how = (dict(action="store_true", default=None) if kind is bool else
               dict(choices=kind) if isinstance(kind, list) else dict(type=kind))
        parser.add_argument(*names, **how, help=f"{text} [{shown}]".replace("%", "%%"))
    args = parser.parse_args(argv)
    for name, _, values, _ in rows:
        key = name.lstrip("-").replace("-", "_")
        if getattr(args, key) is None:
            setattr(args, key, values[presets.index(args.preset)] if isinstance(values, tuple) else values)
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Machine: device, mixed precision, torchrun
# ----------------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Machine:
    device: torch.device
    amp: torch.dtype | None           # dtype of autocast; None computes in float32 (TF32 matrix products on a GPU)
    rank: int = 0
    world: int = 1

    def autocast(self):
        return torch.autocast(self.device.type, self.amp) if self.amp else contextlib.nullcontext()


def setup_machine(device="auto", amp="auto", seed=0, threads=0):
    """Seeds, picks device and precision, joins torchrun's process group when there is one (nccl on GPUs, else gloo)."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or index and not index.isdigit():
        fail(f"--device is auto, cpu, cuda or cuda:N, not {device!r}")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if kind == "cuda" and world > 1:
        if index:
            fail("under torchrun say --device cuda: every process takes a GPU of its own")
        index = os.environ["LOCAL_RANK"]
    if kind == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= found:
            fail(f"--device cuda: torch finds {found} GPUs here, number {index or 0} was asked for; use --device cpu")
        torch.cuda.set_device(int(index or 0))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(minutes=30))
    device = torch.device(kind, int(index or 0)) if kind == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    dtypes = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16,
              "auto": torch.bfloat16 if device.type == "cuda" else None}
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    return Machine(device, dtypes[amp], rank, world)


@contextlib.contextmanager
def rank_zero_first(machine):
    """Rank 0 runs the block first (it draws and caches data), the others when it is done."""
    if machine.world > 1 and machine.rank > 0:
        dist.barrier()
    yield
    if machine.world > 1 and machine.rank == 0:
        dist.barrier()


def average_gradients(params, world):
    """Mean over processes of all gradients, as one message. What has no gradient here (the head of another task) has none
    in any process, and is left out as it is in a single one."""
    grads = [p.grad for p in params if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(flat)
    for g, mean in zip(grads, (flat / world).split([g.numel() for g in grads])):
        g.copy_(mean.view_as(g))


def cosine_lr(step, steps, warmup, final=0.0):
    """Factor on the learning rate: linear warm-up over `warmup` steps, then a cosine from 1 to `final` at `steps`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


# ----------------------------------------------------------------------------------------------------------------------
# Run: config.json, log.jsonl, checkpoints
# ----------------------------------------------------------------------------------------------------------------------

def write_atomically(path, write):
    """Calls write(temporary path), then renames it to `path`: a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, **content):
    write_atomically(path, lambda p: torch.save({"format": CHECKPOINT_FORMAT, **content}, p))


def load_checkpoint(path, **expected):
    """A checkpoint as a dict on the CPU; `expected` entries (stage="tune", ...) must match what it says of itself."""
    if not Path(path).exists():
        fail(f"no checkpoint at {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:      # torch.load raises many kinds for a truncated or foreign file, all mean the same here
        fail(f"{path} is not a readable checkpoint (truncated, or not written by this code): {type(error).__name__}")
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        fail(f"{path} is not a checkpoint of this code (format {CHECKPOINT_FORMAT}); give another file or remove it")
    for key, value in expected.items():
        if content.get(key) != value:
            fail(f"{path} holds {key} {content.get(key)!r}, but {value!r} is needed here; choose another --output or remove it")
    return content


def load_weights(module, weights, path):
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        lines = str(error).splitlines()
        fail(f"the weights in {path} do not fit this model ({lines[min(1, len(lines) - 1)].strip()}); "
             "give the flags it was trained with or choose another --output")


class Run:
    """An output directory. Only rank 0 writes."""
    def __init__(self, output, config, machine):
        self.dir, self.config, self.machine = Path(output), config, machine
        if self.dir.exists() and not self.dir.is_dir():
            fail(f"--output {output} is a file; name a directory")

    def start(self, stage, step):
        """Called by a stage once all is found in order: config.json, and a log that says nothing beyond `step`."""
        if self.machine.rank == 0:
            text = json.dumps({**self.config, "torch": str(torch.__version__)}, indent=1, default=str)
            write_atomically(self.dir / "config.json", lambda p: p.write_text(text + "\n"))
            self.rewind_log(stage, step)

    def __getitem__(self, name):
        return self.dir / f"{name}.pt"

    def rewind_log(self, stage, step):
        """Drops what a killed run logged of this stage beyond its last checkpoint, and a half-written last line."""
        path = self.dir / "log.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record["stage"] != stage or record.get("step", 0) <= step and step > 0:
                kept.append(line + "\n")
        write_atomically(path, lambda p: p.write_text("".join(kept)))

    def log(self, stage, **values):
        """One JSON line."""
        if self.machine.rank == 0:
            self.dir.mkdir(parents=True, exist_ok=True)
            with open(self.dir / "log.jsonl", "a") as f:
                f.write(json.dumps({"stage": stage, **values}) + "\n")

    def values(self, stage, key):
        """What was logged of a stage under `key`, in order."""
        path = self.dir / "log.jsonl"
        records = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
        return [r[key] for r in records if r["stage"] == stage and key in r]

    def print(self, *words):
        if self.machine.rank == 0:
            tqdm.write(" ".join(map(str, words)))


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------

class Training:
    """The bookkeeping of one training stage; the loop itself stands where the method stands (see the top of this file).

    net: the module whose state is checkpointed; groups: AdamW parameter groups, each with its own peak "lr".
    steps, warmup: in optimiser steps; clip: gradient norm, None for no clipping; batch_size: images per step over all
    processes, for log and progress bar only. What is logged are means over finite steps, and over processes.
    identity: what a checkpoint must agree on to be resumed (method, seed, sizes ...): a dict of plain values.
    extra: plain values stored beside the weights. A finished stage yields no steps.
    """
    def __init__(self, run, stage, net, groups, steps, warmup=0, clip=None, identity=None, extra=None, batch_size=1,
                 log_every=50, save_every=250):
        self.run, self.stage, self.net, self.total, self.warmup, self.clip = run, stage, net, steps, warmup, clip
        self.identity, self.extra, self.batch_size = identity or {}, extra or {}, batch_size
        self.log_every, self.save_every = log_every, max(1, save_every // log_every) * log_every
        machine = run.machine
        self.peaks = [g["lr"] for g in groups]
        self.params = [p for g in groups for p in g["params"]]
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        # The scaler also serves without float16: it is what skips a step with non-finite gradients without asking the
        # device for a number. Without float16 its scale stays 1.
        self.half = machine.amp is torch.float16
        self.scaler = torch.amp.GradScaler(machine.device.type, init_scale=2.0 ** 16 if self.half else 1.0, growth_interval=100)
        self.step = 0
        self.sums, self.good, self.skipped, self.bad_in_a_row = {}, 0, torch.zeros((), device=machine.device), 0
        if run[stage].exists():
            saved = load_checkpoint(run[stage], stage=stage, steps=steps, **self.identity)
            load_weights(net, saved["model"], run[stage])
            self.step = saved["step"]
            if self.step < self.total:
                self.optimizer.load_state_dict(saved["optimizer"])
                self.scaler.load_state_dict(saved["scaler"])
                self.skipped += saved["skipped"]
                run.print(f"{stage}: resuming at step {self.step} of {steps} from {run[stage]}")
        if self.step < self.total:
            run.start(stage, self.step)
        self.started = time.perf_counter()
        self.first = self.step

    def steps(self):
        with tqdm(total=self.total * self.batch_size, initial=self.step * self.batch_size, desc=self.stage, unit="img",
                  unit_scale=True, disable=self.run.machine.rank > 0 or self.step >= self.total, mininterval=1.0) as bar:
            while self.step < self.total:
                before = self.step
                yield before
                assert self.step == before + 1, "the loop must call update() once per step"
                bar.update(self.batch_size)
                if self.step % self.log_every == 0 or self.step == self.total:
                    bar.set_postfix(self.flush(), refresh=False)
                if self.step % self.save_every == 0 or self.step == self.total:
                    self.save()
        if self.run.machine.world > 1:           # nobody looks for the checkpoint before rank 0 has written it
            dist.barrier()

    def update(self, loss, **values):
        """One optimiser step on `loss`; `values` are 0-dim tensors to log. Does not wait for the device."""
        factor = cosine_lr(self.step, self.total, self.warmup)
        for group, peak in zip(self.optimizer.param_groups, self.peaks):
            group["lr"] = peak * factor
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.run.machine.world > 1:
            average_gradients(self.params, self.run.machine.world)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.params if p.grad is not None])
        if self.clip:
            nn.utils.clip_grads_with_norm_(self.params, self.clip, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update(None if self.half else 1.0)
        self.step += 1
        with torch.no_grad():
            finite = torch.isfinite(loss) & torch.isfinite(norm)
            for name, value in {"loss": loss, **values}.items():
                self.sums[name] = self.sums.get(name, 0) + torch.where(finite, value.detach().float(), 0)
            self.good = self.good + finite
            self.skipped = self.skipped + ~finite
            self.bad_in_a_row = (self.bad_in_a_row + 1) * ~finite

    def flush(self):
        """Writes the means since the last call as one log line; the only place where the loop waits for the device."""
        machine = self.run.machine
        if int(self.bad_in_a_row) >= MAX_BAD_STEPS:
            path = self.run[self.stage]
            fail(f"{self.stage}: the loss was not finite in the last {int(self.bad_in_a_row)} steps; "
                 f"{f'the last good checkpoint is {path}' if path.exists() else 'there is no checkpoint yet'}; "
                 "lower --lr, or say --amp none")
        values = torch.stack([v / self.good.clamp(min=1) for v in self.sums.values()])
        if machine.world > 1:
            dist.all_reduce(values)
            values /= machine.world
        means = dict(zip(self.sums, values.tolist()))
        lr = self.optimizer.param_groups[0]["lr"]
        speed = (self.step - self.first) * self.batch_size / (time.perf_counter() - self.started)
        self.run.log(self.stage, step=self.step, images=self.step * self.batch_size, lr=lr, **means,
                     skipped=int(self.skipped), images_per_s=round(speed, 1))
        self.sums, self.good = {}, 0
        return {k: f"{v:.3f}" for k, v in means.items()}

    def save(self):
        if self.run.machine.rank == 0:
            done = self.step == self.total
            save_checkpoint(self.run[self.stage], stage=self.stage, step=self.step, steps=self.total, **self.identity,
                            extra=self.extra, config=self.run.config, model=self.net.state_dict(),
                            optimizer=None if done else self.optimizer.state_dict(),
                            scaler=self.scaler.state_dict(), skipped=int(self.skipped))
