"""What both papers share: the network blocks, and the plumbing of a run.

  Blocks     ViT with timm's parameter names (weights of timm and DeiT fit as they are), GPT-2 with the published ones, and
             the tables of sizes.
  Flags      one table row per flag: name, type, a value per preset, help with the value's source.
  Machine    device, mixed precision, torchrun.
  Run        an output directory: config.json, log.jsonl, checkpoints.
  Weights    pretrained ViTs of timm, DeiT, torchvision and Hugging Face in, ours out to timm and torchvision; GPT-2 likewise.
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
import re
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
        check_sizes("ViT", vars(self))
        if self.image_size % self.patch_size:
            fail(f"patches of {self.patch_size} px do not tile an image of {self.image_size} px; choose a divisor")
        if self.pool not in ("token", "avg"):
            fail(f"pool is 'token' or 'avg', not {self.pool!r}")


# name -> (width, heads) of a 12-layer DeiT (Touvron et al. 2021, Table 1); TAL's L-Tiny is the same width at depth L.
# The second half are the drawn data's counterparts: the same three roles, at widths that two CPU cores can train.
VIT_SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12),
             "drawn-tiny": (32, 4), "drawn-small": (48, 6), "drawn-base": (64, 8)}
# Likewise of GPT-2 (Radford et al. 2019, Table 2); the published depths are 12, 24, 36 and 48.
GPT2_SIZES = {"gpt2": (768, 12), "gpt2-medium": (1024, 16), "gpt2-large": (1280, 20), "gpt2-xl": (1600, 25), "drawn-gpt2": (48, 6)}


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


# ----------------------------------------------------------------------------------------------------------------------
# GPT-2
# ----------------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """Architecture of a GPT-2 (the defaults are the published "gpt2"). The last token of the vocabulary ends a text and pads it.

    num_classes: of a classifier that reads the last token of a text; 0 is a language model, whose head is the token table.
    """
    vocab: int = 50257
    context: int = 1024
    width: int = 768
    depth: int = 12
    heads: int = 12
    num_classes: int = 0

    def __post_init__(self):
        check_sizes("GPT-2", vars(self), optional=("num_classes",))


class CausalAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.num_heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x):                                                            # (B, T, D)
        B, T, D = x.shape
        q, k, v = self.c_attn(x).reshape(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)                  # (B, heads, T, D/heads)
        return self.c_proj(x.transpose(1, 2).reshape(B, T, D))


class GPT2Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.act = nn.GELU("tanh")
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.c_proj(self.act(self.c_fc(x)))


class GPT2Block(nn.Module):
    """Pre-norm transformer block, every token seeing those before it."""
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
    """GPT-2 (Radford et al. 2019) under the published parameter names; matrices are (out, in), as nn.Linear has them.

    forward(ids): token ids (B, T), padded at the right -> logits (B, num_classes), or (B, T, vocab) of a language model.
    tokens(ids): after the blocks -> (B, T, width).
    encode(ids): the last non-padding token of every text after the last LayerNorm -> features (B, width). No token sees
    those behind it, so the padding needs no mask.
    """
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.h = nn.Sequential(*(GPT2Block(config.width, config.heads) for _ in range(config.depth)))
        self.ln_f = nn.LayerNorm(config.width, eps=1e-5)
        if config.num_classes:
            self.score = nn.Linear(config.width, config.num_classes, bias=False)
        self.init_weights()

    def init_weights(self):
        """GPT-2's: normal of std 0.02, less by sqrt(2 depth) where a residual branch ends; zero biases, unit norms."""
        for name, p in self.named_parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02 / (2 * self.config.depth) ** 0.5 if name.endswith("c_proj.weight") else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @property
    def head(self):
        return self.score

    def tokens(self, ids):
        return self.h(self.wte(ids) + self.wpe.weight[:ids.shape[1]])                # (B, T, D)

    def last(self, x, ids):
        """Of tokens(ids), the last that is no padding, after the last LayerNorm: (B, D)."""
        place = (torch.arange(ids.shape[1], device=ids.device) * (ids != self.config.vocab - 1)).argmax(1)
        return self.ln_f(x[torch.arange(ids.shape[0], device=ids.device), place])

    def encode(self, ids):
        return self.last(self.tokens(ids), ids)

    def language(self, x):
        """Of tokens(ids), the logits of every next token: (B, T, vocab)."""
        return F.linear(self.ln_f(x), self.wte.weight)

    def forward(self, ids):
        return self.score(self.encode(ids)) if self.config.num_classes else self.language(self.tokens(ids))


def network(config):
    """The ViT or GPT-2 of a configuration, freshly initialised."""
    return (GPT2 if isinstance(config, GPT2Config) else ViT)(config)


def check_sizes(what, sizes, optional=()):
    """One sentence unless all whole numbers of a configuration make sense together."""
    for name, n in sizes.items():
        if isinstance(n, int) and n < (name not in optional):
            fail(f"a {what} needs {name.replace('_', ' ')} of at least 1, got {n}")
    if sizes["width"] % sizes["heads"]:
        fail(f"{sizes['heads']} heads do not divide a width of {sizes['width']}; choose a multiple of the number of heads")


@torch.no_grad()
def predictions(forward, task, split, device, limit=None, batch_size=500):
    """(predicted, true) classes, int64 (N,) each, of a split of a data.Task or of its first `limit` examples; forward: x -> logits."""
    x, y = task.examples(split, limit)
    return torch.cat([forward(part.to(device)).argmax(-1) for part in x.split(batch_size)]), y.to(device)


def accuracy(forward, task, split, device, limit=None, batch_size=500):
    """Top-1 accuracy in percent."""
    predicted, y = predictions(forward, task, split, device, limit, batch_size)
    return 100 * int((predicted == y).sum()) / len(y)


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
# Weights from elsewhere, and for elsewhere
# ----------------------------------------------------------------------------------------------------------------------

# The tensors of a ViT in three dialects: timm's and DeiT's (ours), torchvision's, Hugging Face's. # is the block's number.
# Names differ, numbers do not: q, k, v are the thirds of qkv, in this order; Hugging Face's three are joined first.
DIALECTS = ("timm", "torchvision", "Hugging Face")
NAMES = [("cls_token", "class_token", "embeddings.cls_token"),
         ("pos_embed", "encoder.pos_embedding", "embeddings.position_embeddings"),
         ("patch_embed.proj.", "conv_proj.", "embeddings.patch_embeddings.projection."),
         ("norm.", "encoder.ln.", "layernorm."),
         ("head.", "heads.head.", "classifier."),
         *((f"blocks.#.{a}.", f"encoder.layers.encoder_layer_#.{b}", f"encoder.layer.#.{c}.") for a, b, c in [
             ("norm1", "ln_1.", "layernorm_before"), ("norm2", "ln_2.", "layernorm_after"),
             ("attn.qkv", "self_attention.in_proj_", "attention.attention.qkv"),
             ("attn.proj", "self_attention.out_proj.", "attention.output.dense"),
             ("mlp.fc1", "mlp.0.", "intermediate.dense"), ("mlp.fc2", "mlp.3.", "output.dense")])]
# Other spellings of a dialect: torchvision before 0.13, and its published files; transformers 5 in memory (it writes the
# names above) and its DeiT, which has two heads.
SPELLINGS = ((), (("mlp.linear_1", "mlp.0"), ("mlp.linear_2", "mlp.3")), (
    (r"^layers\.", "encoder.layer."), (r"\.q_proj", ".attention.query"), (r"\.k_proj", ".attention.key"),
    (r"\.v_proj", ".attention.value"), (r"\.o_proj", ".output.dense"), ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"),
    ("^cls_classifier", "classifier"), ("^distillation_classifier", "head_dist"), ("^embeddings.distillation_token", "dist_token")))
# What may be left unused, as it stands beside or behind the encoder. Any other tensor would change the features.
SPARE = re.compile(r"dist_token$|head_dist\.|heads?\.|pre_logits\.|pooler\.|(embeddings\.)?mask_token$|decoder")
IMAGENET, HALF = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,) * 3, (0.5,) * 3)        # mean and std; white is 1
SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
               "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """{name: tensor} of a safetensors file: 8 bytes, little end first, with the length of a header; the header in JSON,
    {name: {"dtype", "shape", "data_offsets": [begin, end]}}; the numbers, without gaps. Raises when it is not that."""
    weights, at = {}, 0
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        size = os.path.getsize(path) - 8 - length                                    # of the numbers, in bytes
        header = json.loads(f.read(length)) if size >= 0 else {}
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            (begin, end), shape, dtype = entry["data_offsets"], entry["shape"], SAFETENSORS[entry["dtype"]]
            if begin != at or end > size or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} is not where the header says")
            data, at = bytearray(f.read(end - begin)), end
            weights[name] = torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)
    if at != size:
        raise ValueError("more numbers than the header names, or fewer")
    return weights


def write_safetensors(path, weights):
    """The inverse. Wide types come first and the header is padded, so that every tensor starts at a multiple of its item size."""
    header, at, kinds = {"__metadata__": {"format": "pt"}}, 0, {dtype: kind for kind, dtype in SAFETENSORS.items()}
    weights = sorted(weights.items(), key=lambda item: -item[1].dtype.itemsize)
    for name, t in weights:
        header[name] = {"dtype": kinds[t.dtype], "shape": list(t.shape), "data_offsets": [at, at := at + t.nbytes]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    numbers = (t.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes() for _, t in weights)
    write_atomically(path, lambda p: p.write_bytes(b"".join([len(text).to_bytes(8, "little"), text, *numbers])))


def told(said, path):
    """{"heads", "mean", "std"}, as far as a dict has them: "extra" of our checkpoints, our card, a hub's JSON files."""
    parts = [said] + [said.get(key) for key in ("pretrained_cfg", "architecture", "config")] if isinstance(said, dict) else []
    both = {key: value for part in parts if isinstance(part, dict) for key, value in part.items()}
    found = {key: next((both[name] for name in (key, *others) if name in both), None)
             for key, *others in (("heads", "num_attention_heads", "n_head"), ("mean", "image_mean"), ("std", "image_std"))}
    for key, value in found.items():
        numbers = [value] if key == "heads" else value if isinstance(value, (list, tuple)) and len(value) == 3 else [None]
        if value is not None and not all(type(a) in (int, float) and math.isfinite(a) and (a > 0 or key == "mean") for a in numbers):
            fail(f"what is said of {path} has {key} {value!r}; mean and std are 3 finite numbers each, std and heads above 0")
    return {key: value for key, value in found.items() if value is not None}


def read_weights(path):
    """(weights, about) of a file: {name: tensor} on the CPU, and what is said of them. Any trouble is one sentence.

    .safetensors, or whatever torch.load reads without running anything (.pt, .pth, .bin). Training checkpoints are
    unwrapped, and names lose what DDP and torch.compile put before them. about: "wrapped", the key that was unwrapped;
    "own", a checkpoint of this code; and what is told() by it, by NAME.json beside it, and by a hub's JSON files.
    """
    path = Path(path)
    if not path.is_file():
        fail(f"there is no file of weights at {path}")
    try:                        # the flags in training checkpoints of DeiT and torchvision are a Namespace, which runs nothing
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = (read_safetensors(path) if path.suffix == ".safetensors" else
                       torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # many kinds, as in load_checkpoint
        fail(f"{path} is not a readable file of weights (truncated, foreign, or with code in it): {type(error).__name__}")
    content = content if isinstance(content, dict) else {}
    wrapped = next((key for key in ("model", "state_dict", "model_ema") if isinstance(content.get(key), dict)), None)
    about = {"wrapped": wrapped, "own": content.get("format") == CHECKPOINT_FORMAT, **told(content.get("extra"), path)}
    for name in [f"{path.stem}.json"] + ["config.json", "preprocessor_config.json"] * (path.stem in ("model", "pytorch_model")):
        with contextlib.suppress(OSError, ValueError):
            about |= told(json.loads((path.parent / name).read_text()), path)
    weights = {re.sub(r"^((module|_orig_mod)\.)+", "", str(n)): t for n, t in content.get(wrapped, content).items() if torch.is_tensor(t)}
    if not weights:
        fail(f"{path} holds no weights by name; save a state_dict")
    for name, t in weights.items():
        if t.is_floating_point() and not t.isfinite().all():
            fail(f"{path}: {name} has values that are not finite; take an earlier checkpoint")
    return weights, about


def renamed(weights, old, new):
    """Names of one column of NAMES in those of another; what is in no row keeps its name. Other spellings are put right first."""
    rows = [(re.compile(re.escape(row[old]).replace(r"\#", r"(\d+)")), row[new].replace("#", r"\1")) for row in NAMES]
    spell = lambda name: next((old.sub(new, name, count=1) for old, new in rows if old.match(name)), name)
    return {spell(name): t for name, t in respelled(weights, old).items()}


def respelled(weights, dialect):
    for old, new in SPELLINGS[dialect]:
        weights = {re.sub(old, new, name): t for name, t in weights.items()}
    for name in [n for n in weights if ".attention.attention.query." in n]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        weights[name.replace(".query.", ".qkv.")] = torch.cat([weights.pop(part) for part in parts if part in weights])
    return weights


def check_fits(state, net, path, optional=()):
    """One sentence unless `state` has the tensors of `net` (but for the prefix `optional`) in their shapes, and no others."""
    shapes = {n: p.shape for n, p in net.state_dict().items() if "relative_position_index" not in n}
    for trouble, names in (("lacks", [n for n in shapes if n not in state and not n.startswith(optional)]),
                           ("also has", [n for n in state if n not in shapes]),
                           ("has another shape of", [n for n in state if n in shapes and state[n].shape != shapes[n]])):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            fail(f"{path} does not fit this {type(net).__name__}: it {trouble} {names[0]}{more}")


def vit_state(weights, heads=None, path="the file"):
    """(state, config, report) of a ViT in any dialect: float32 tensors under our names, ViTConfig by their shapes.

    heads: shapes do not tell; by default width / 64, as all published ViTs but ViT-H. Without a head, config says 1 class.
    report: "source", the dialect; "unexpected", what was left out: DeiT's distillation token and its head (the logits are
    then those of the class token alone), heads of other kinds. Anything else that does not fit is one sentence.

    LayerNorm adds 1e-6 to the variance here, in timm and in torchvision, but 1e-12 in Hugging Face's: 1e-4 in its logits.
    """
    ends = [name + "weight" for name in NAMES[2]]
    found = [(dialect, name) for name in weights for dialect, end in enumerate(ends) if name.endswith(end)]
    if len(found) != 1:
        fail(f"{path} holds {len(found) or 'no'} ViTs under names of {', '.join(DIALECTS)}; give a file with one")
    dialect, name = found[0]
    prefix = name.removesuffix(ends[dialect])                                        # "vit.", "encoder.", mostly nothing
    state = renamed({name.removeprefix(prefix): t for name, t in weights.items()}, dialect, 0)
    patch, pos, fc1 = (state.get(n, torch.empty(0)) for n in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"))
    tokens = ("cls_token" in state) + ("dist_token" in state)
    grid = math.isqrt(max(0, pos.shape[1] - tokens)) if pos.ndim == 3 else 0
    if patch.ndim != 4 or patch.shape[1] != 3 or not grid or grid ** 2 + tokens != pos.shape[1] or fc1.ndim != 2:
        fail(f"{path} is no plain ViT: that has patches of RGB images, position embeddings of a square grid, and MLPs")
    if "dist_token" in state:
        state["pos_embed"] = torch.cat([pos[:, :1], pos[:, 2:]], 1)                  # class, distillation, patches
    head = {"head.weight", "head.bias"}
    if not head <= state.keys() or any("pre_logits" in n for n in state):            # no head on the features themselves
        state, head = {re.sub(r"^head\.", "heads.", n): t for n, t in state.items()}, set()
    width, size = len(patch), patch.shape[2]
    if not heads and width % 64:
        fail(f"{path}: width {width} does not tell the number of heads; say \"heads\" in {Path(path).with_suffix('.json')}")
    depth = len({n.split(".")[1] for n in state if n.startswith("blocks.")})
    config = ViTConfig(grid * size, size, width, depth, heads or {1280: 16}.get(width, width // 64),
                       len(state["head.weight"]) if head else 1, "token" if "cls_token" in state else "avg", len(fc1) // width)
    spare = [n for n in state if SPARE.match(n) and n not in head]
    state = {n: t.float() for n, t in state.items() if n not in spare}
    with torch.device("meta"):
        check_fits(state, ViT(config), path, "head.")
    return state, config, {"source": DIALECTS[dialect], "unexpected": spare}


def resized_pos_embed(pos_embed, grid, prefix, mode="bicubic"):
    """Position embeddings (1, prefix + n n, D) for another grid, g or (rows, columns) -> (1, prefix + rows columns, D).

    Bicubic with antialiasing as in timm; DeiT and Hugging Face do without it, torchvision aligns corners; Segmenter: bilinear. The
    first `prefix`, those of class tokens, have no place on the grid and stay.
    """
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    n = math.isqrt(pos_embed.shape[1] - prefix)
    if (rows, columns) == (n, n):
        return pos_embed
    patches = pos_embed[:, prefix:].reshape(1, n, n, -1).permute(0, 3, 1, 2)         # (1, D, n, n)
    patches = F.interpolate(patches, (rows, columns), mode=mode, antialias=True)
    return torch.cat([pos_embed[:, :prefix], patches.flatten(2).transpose(1, 2)], 1)


def renormalised(state, source, target):
    """A ViT's state for images normalised by `target`, (mean, std), where it knows `source`: what lies between is affine per
    channel and goes into the patch embedding, which has no padding."""
    (m, s), (M, S) = ([torch.tensor(t).view(3, 1, 1) for t in pair] for pair in (source, target))
    W, b = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    return {**state, "patch_embed.proj.weight": W * (S / s), "patch_embed.proj.bias": b + (W * ((M - m) / s)).sum((1, 2, 3))}


def weight_selection(net, state):
    """Weight selection (Xu et al. 2024): the first L layers of a larger network, of every tensor evenly spaced elements."""
    new = {}
    for name, p in net.state_dict().items():
        if not name.startswith("head."):
            large = state[name]
            for dim, (small, size) in enumerate(zip(p.shape, large.shape)):
                step = size // small if size % small == 0 else (size - 1) / max(1, small - 1)
                large = large.index_select(dim, (torch.arange(small, device=large.device) * step).round().long())
            new[name] = large
    net.load_state_dict(new, strict=False)


def normalisation_of(path, about, report, classes):
    """(mean, std, why) of the images that weights were trained on; mean and std are None for a checkpoint of this code,
    where each task has its own. What is neither told nor to be seen in the names is a guess, and `why` says so."""
    if "mean" in about and "std" in about:
        return tuple(about["mean"]), tuple(about["std"]), "as told with the weights"
    if about["own"]:
        return None, None, "a checkpoint of this code: each task's own"
    if report["source"] == "torchvision":
        return *IMAGENET, "ImageNet's, as all of torchvision"
    if "dist_token" in report["unexpected"] or "deit" in Path(path).name or (report["source"], about["wrapped"]) == ("timm", "model"):
        return *IMAGENET, "ImageNet's, as DeiT"
    return *HALF, ("as ViTs of ImageNet-21k" if classes in (21841, 21843) else "assumed, as most ViTs of Google and timm; else say "
                   f'"mean" and "std" in {Path(path).with_suffix(".json")}')


def load_pretrained(path, num_classes=None, image_size=None, heads=None, net=None, say=print):
    """(net, report): a ViT from a file of timm, DeiT, torchvision, Hugging Face or this code, or `net` filled from it.

    num_classes, image_size: the file's by default; position embeddings are resized, and a head of other classes is left
    fresh. net, a ViT or torchvision's Swin, decides both by itself; it is untouched unless everything fits.
    report: "source", "loaded" (number of tensors), "missing", "unexpected" (names), "head" ("kept" or "replaced"), "mean",
    "std", "normalisation" (why these). say prints it in two lines.
    """
    weights, about = read_weights(path)
    if net is None or isinstance(net, ViT):
        state, config, report = vit_state(weights, heads or about.get("heads") or net and net.config.heads, path)
        net = net or ViT(dataclasses.replace(config, num_classes=num_classes or config.num_classes, image_size=image_size or config.image_size))
        for key in ("patch_size", "width", "depth", "heads", "pool", "mlp_ratio"):
            theirs, ours = getattr(config, key), getattr(net.config, key)
            if theirs != ours:
                fail(f"{path} holds a ViT of {key.replace('_', ' ')} {theirs}, but {ours} is needed here")
        grid = net.config.image_size // net.config.patch_size
        state["pos_embed"] = resized_pos_embed(state["pos_embed"], grid, int(config.pool == "token"))
    else:                       # the index of relative positions is a constant that torchvision computes
        state = {n: t for n, t in respelled(weights, 1).items() if "relative_position_index" not in n}
        report = {"source": "torchvision", "unexpected": []}
    classes = len(state.get("head.weight", ()))
    kept = classes == len(net.head.weight) and "head.bias" in state
    if not kept:
        report["unexpected"] += [n for n in state if n.startswith("head.")]
        state = {n: t for n, t in state.items() if not n.startswith("head.")}
    check_fits(state, net, path, () if kept else "head.")
    net.load_state_dict(state, strict=False)
    mean, std, why = normalisation_of(path, about, report, classes)
    report |= {"loaded": len(state), "missing": [] if kept else ["head.weight", "head.bias"],
               "head": "kept" if kept else "replaced", "mean": mean, "std": std, "normalisation": why}
    say(f"{path}: {len(state)} tensors under names of {report['source']}; head {report['head']} "
        f"({len(net.head.weight)} classes); not used: {', '.join(report['unexpected']) or 'none'}")
    say(f"  normalisation: mean {mean}, std {std} ({why})")
    return net, report


CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")       # GPT-2's published files hold these as (in, out)


def load_gpt2(path, num_classes=0, say=print):
    """(net, report): a GPT-2 from a published file (pytorch_model.bin, model.safetensors) or one that export_gpt2 wrote.

    num_classes: 0 for the language model; a classifier keeps the file's `score` where that has as many, and gets a fresh one else.
    report: "loaded" (number of tensors), "unexpected" (names), "head" ("none", "kept" or "replaced").
    """
    weights, about = read_weights(path)
    state = {name.removeprefix("transformer."): t.float() for name, t in weights.items()
             if not re.search(r"\.attn\.(masked_)?bias$", name)}                     # masks, which old files hold as buffers
    wte, wpe, first = (state.get(name, torch.empty(0)) for name in ("wte.weight", "wpe.weight", "h.0.attn.c_attn.weight"))
    if wte.ndim != 2 or wpe.ndim != 2 or first.ndim != 2 or 3 * wte.shape[1] not in first.shape:
        fail(f"{path} is no GPT-2: that has wte.weight, wpe.weight and h.0.attn.c_attn.weight; give gpt2's pytorch_model.bin or model.safetensors")
    width = wte.shape[1]
    if first.shape[0] == width:                                                       # Conv1D: (in, out)
        state = {name: t.T.contiguous() if CONV1D.search(name) else t for name, t in state.items()}
    if not about.get("heads") and width % 64:
        fail(f"{path}: width {width} does not tell the number of heads; say \"heads\" in {Path(path).with_suffix('.json')}")
    depth = len({name.split(".")[1] for name in state if name.startswith("h.")})
    config = GPT2Config(len(wte), len(wpe), width, depth, about.get("heads") or width // 64, num_classes)
    net, report = GPT2(config), {"head": "none", "unexpected": ["lm_head.weight"] * ("lm_head.weight" in state)}
    if num_classes:
        kept = len(state.get("score.weight", ())) == num_classes
        report["head"] = "kept" if kept else "replaced"
    if report["head"] != "kept":
        report["unexpected"] += ["score.weight"] * ("score.weight" in state)
    if not torch.equal(state.get("lm_head.weight", wte), wte):
        fail(f"{path} has an lm_head that is not its token table; this GPT-2 ties the two")
    state = {name: t for name, t in state.items() if name not in report["unexpected"]}
    check_fits(state, net, path, ("score.",) if report["head"] == "replaced" else ())
    net.load_state_dict(state, strict=False)
    report["loaded"] = len(state)
    say(f"{path}: GPT-2 of {depth} layers, width {width}, {config.heads} heads, {len(wte):,} tokens; head {report['head']}; not used: "
        f"{', '.join(report['unexpected']) or 'none'}")
    return net, report


def check_export(path, format, pool=None):
    """One sentence unless a network can be written to `path` for `format`; to be asked before the work."""
    if format == "transformers":
        if Path(path).is_dir() or Path(path).suffix not in (".bin", ".pt", ".safetensors"):
            fail(f"the file to write (--output) ends in .bin, .pt or .safetensors, not {path}")
    elif format not in DIALECTS[:2] or Path(path).is_dir() or Path(path).suffix not in (".pt", ".pth", ".safetensors"):
        fail(f"the file to write (--output or --export) ends in .pt, .pth or .safetensors and --format is timm or torchvision, not {path} "
             f"and {format}")
    if format == "torchvision" and pool == "avg":
        fail("torchvision's ViT takes no mean over patches: give the network a class token, or say --format timm")


def write_with_card(path, state, card):
    """Tensors as .pt, .pth, .bin or .safetensors, and a JSON file of the same name beside them; nothing if one is not finite."""
    if not all(t.isfinite().all() for t in state.values()):
        fail(f"the weights are not finite; nothing was written to {path}")
    if path.suffix == ".safetensors":
        write_safetensors(path, state)
    else:
        write_atomically(path, lambda p: torch.save(state, p))
    write_atomically(path.with_suffix(".json"), lambda p: p.write_text(json.dumps(card, indent=1, default=str) + "\n"))


def export_weights(state, config, path, format="timm", card=None):
    """A ViT's state for timm or torchvision, as .pt, .pth or .safetensors, and its card, a JSON file of the same name: the
    architecture, the call whose module loads it strictly, and the caller's `card` (task, method, "mean", "std" ...)."""
    path, c = Path(path), config
    check_export(path, format, c.pool)
    with torch.device("meta"):
        check_fits(state, ViT(c), "the network to export")
    build = (f"timm.models.vision_transformer.VisionTransformer(img_size={c.image_size}, patch_size={c.patch_size}, "
             f"embed_dim={c.width}, depth={c.depth}, num_heads={c.heads}, mlp_ratio={c.mlp_ratio}, num_classes={c.num_classes}, "
             f"global_pool={c.pool!r}, class_token={c.pool == 'token'})" if format == "timm" else
             f"torchvision.models.VisionTransformer(image_size={c.image_size}, patch_size={c.patch_size}, num_layers={c.depth}, "
             f"num_heads={c.heads}, hidden_dim={c.width}, mlp_dim={c.mlp_ratio * c.width}, num_classes={c.num_classes})")
    card = {"architecture": dataclasses.asdict(c), "format": format, "build": build, **(card or {})}
    state = renamed({n: t.detach().float().cpu().contiguous() for n, t in state.items()}, 0, DIALECTS.index(format))
    write_with_card(path, state, card)


def export_gpt2(net, path, card=None):
    """A GPT-2 under transformers' names and layout, as .bin, .pt or .safetensors, and its card: config.json's entries, the class
    whose load_state_dict takes the file, and the caller's `card`."""
    path, c = Path(path), net.config
    check_export(path, "transformers")
    state = {("" if name.startswith("score.") else "transformer.") + name: (t.T if CONV1D.search(name) else t).detach().float().cpu().contiguous()
             for name, t in net.state_dict().items()}
    card = {"model_type": "gpt2", "vocab_size": c.vocab, "n_positions": c.context, "n_embd": c.width, "n_layer": c.depth, "n_head": c.heads,
            "bos_token_id": c.vocab - 1, "eos_token_id": c.vocab - 1, "pad_token_id": c.vocab - 1,
            "num_labels": c.num_classes,
            "build": "transformers.GPT2ForSequenceClassification(transformers.GPT2Config(vocab_size={vocab_size}, n_positions={n_positions}, n_embd={n_embd}, "
            "n_layer={n_layer}, n_head={n_head}, num_labels={num_labels}, pad_token_id={pad_token_id}))", **(card or {})}
    write_with_card(path, state, {**card, "build": card["build"].format(**card)})


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
