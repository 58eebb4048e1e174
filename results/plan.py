"""What the papers' runs take: GPU memory, hours, data and disk, of the commands that reproduce.sh lists.

    bash reproduce.sh paper --check                              # all of it, as a table
    python results/plan.py --accumulate GPUS --command "..."     # the flag with which a command fits this GPU

Arithmetic: a training step takes three times the multiplications of a forward pass, and keeps what the
backward pass needs of every layer. Rates are measured, in about a minute, by training steps of DeiT-Tiny,
-Small and -Base on the GPU at hand. Evaluation and the decoding of images are left out.

Contents: networks - the work of a command - memory - hours - data and files - the report
"""
import argparse
import functools
import itertools
import math
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import adaptive_learngene as al  # noqa: E402
import common  # noqa: E402
import data  # noqa: E402
import tal  # noqa: E402

GIB = 2 ** 30
SUBSETS = 400                   # that a search by REINFORCE looks at; 250 to 564 were seen

# ----------------------------------------------------------------------------------------------------------
# Networks
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A transformer by what decides its cost. outputs: numbers that the loss sees, per example."""
    depth: int
    width: int
    tokens: int
    outputs: int = 1000
    table: int = 0              # rows of a token table

    def parameters(self):
        blocks = self.depth * (12 * self.width + 13) * self.width
        return blocks + (self.tokens + self.table + 3 * 16 ** 2) * self.width

    def flops(self):
        """Of a forward pass of one example: a multiplication and an addition are two."""
        layer = self.tokens * self.width * (24 * self.width + 4 * self.tokens)
        return self.depth * layer + 2 * 3 * 16 ** 2 * self.tokens * self.width

    def kept(self):
        """Bytes of one example that a forward pass under bfloat16 keeps for the backward pass.

        Per layer, token and channel: the inputs of both norms in float32 (8); in bfloat16 the norms' outputs
        (4), queries, keys and values (6), the output of the attention (2), and the hidden layer before and
        after its GELU (16). Per token the patch (2 x 768) and the input of the last norm. The loss keeps its
        probabilities in float32.
        """
        layers = 36 * self.depth * self.tokens * self.width
        return layers + self.tokens * (2 * 768 + 4 * self.width) + 4 * self.outputs


def patches(args):
    """Tokens of an image: its patches, and the class token."""
    return (args.image_size // args.patch) ** 2 + (args.pooling == "token")


def vit(args, size, depth):
    return Network(depth, common.width_and_heads(size)[0], patches(args))


def segmenter(encoder, grid, patch, classes=150):
    """Two more blocks, over patches and classes (here in all layers, so it is a little too much)."""
    return Network(encoder.depth + 2, encoder.width, grid ** 2 + classes, classes * (grid * patch) ** 2)


# Swin-T has four times the channels and a sixteenth of the tokens of a ViT's at its last stage; its cost is
# that of DeiT-Small within a tenth (4.5 against 4.6 GFLOP), and 1.5 times the activations.
def descendant(args, depth=None):
    if args.size in al.SWIN_SIZES:
        return Network(18, 384, patches(args))
    return vit(args, args.size, depth or (args.depth or [args.ancestry_depth])[0])


# ----------------------------------------------------------------------------------------------------------
# The work of a command
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """A training: `images` of `net` under a frozen `teacher`, `fixed` bytes beside net's weights and Adam."""
    what: str
    net: Network
    images: float
    batch: int
    teacher: Network | None = None
    fixed: int = 0
    looks: float = 0            # images of forward passes of net alone, of the search of TALS

    def flops(self):
        frozen = self.teacher.flops() if self.teacher else 0
        return self.images * (3 * self.net.flops() + frozen) + self.looks * self.net.flops()


def flags_of(command):
    """The settings of a command, without a look at its files."""
    words = command.split()
    program, argv = [(words[k], words[k + 1:]) for k in (0, 1) if words[k].endswith(".py")][0]
    if program == "adaptive_learngene.py":
        return program, common.parse_flags("", al.FLAGS, al.DEFAULTS, argv)
    args = common.parse_flags("", tal.FLAGS, tal.DEFAULTS, argv)
    if args.modality == "text":
        args = common.parse_flags("", tal.FLAGS, tal.DEFAULTS | tal.TEXT_DEFAULTS, argv)
    return program, args


def train_count(name):
    """Training examples of a real task, officially; of ham10000 four fifths, of NAME/K#I a K-th part."""
    part = re.fullmatch(r"(.+)/(\d+)#\d+", name)
    if part:
        return train_count(part[1]) / int(part[2])
    official = (data.TEXTS | data.REAL)[name].official
    return official.get("train", 0.8 * official.get("all", 0))


def images_of(args, name):
    if args.train_images and args.train_images != "tune":
        return int(args.train_images)
    return args.train_epochs * train_count(name)


def work_of(command, made):
    """[Work] of a command. made: the stages that commands before it left, {(folder, stage)}; it grows."""
    if command.startswith("cp "):
        made.add((command.split()[-1], "pretrain"))
        return []
    program, args = flags_of(command)
    works = list(learngenes(args, made) if program == "adaptive_learngene.py" else hypernetworks(args, made))
    return [work for work in works if work.images or work.looks]


def new(made, args, stage):
    """Whether a stage of the folder --output has still to be made; from now on it is."""
    missing = (args.output, stage) not in made
    made.add((args.output, stage))
    return missing


def hypernetworks(args, made):
    """Of tal.py. The largest architecture that a hypernetwork trains on decides the memory."""
    text = args.modality == "text"
    tokens, table = (args.context, 50257) if text else (patches(args), 0)
    teacher = Network(12, 768, tokens, table=table)
    if args.method in tal.PREDICTED:
        dataset = "ViTs+-1K" if args.method == "tal+" else args.archs
        shape = {"image_size": 224, "patch_size": 16, "pooling": "token", "num_classes": 1000}
        if text:
            shape = {"vocab": table, "context": args.context, "num_classes": 2}
        archs = [Network(c.depth, c.width, tokens, table=table) for c in tal.architectures(dataset, shape)]
        mean = mean_of(archs)
        teaches = args.method in ("tal", "tal+") and args.without != "ancestry"
        how = {"batch": args.batch_size, "fixed": hypernetwork_bytes(mean)}
        soft = args.method == "tal+" and teaches
        if args.pretrain_epochs and new(made, args, "pretrain"):
            under = teacher if teaches and args.alpha or soft else None
            images = args.pretrain_epochs * train_count(args.base_task)
            yield Work("pretrain", mean, images, teacher=under, **how)
        source = args.source if args.stage == "train" else args.stage
        if source != "pretrain" and new(made, args, "tune"):
            counts = sum(train_count(name) for name in args.tune_tasks.split(","))
            under = teacher if teaches and args.tune_alpha or soft else None
            yield Work("tune", mean, args.tune_epochs * counts, teacher=under, **how)
    if args.stage == "train":
        size = common.width_and_heads(args.size, {**common.VIT_SIZES, **common.GPT2_SIZES})
        net = Network(args.depth, size[0], tokens, table=table)
        for name in args.data.split(","):
            yield Work(f"train {name}", net, images_of(args, name), args.batch_size)


@dataclass(frozen=True)
class Architectures(Network):
    """The networks of an architecture dataset: the memory of the largest, the mean of all their flops."""
    mean: float = 0.0

    def flops(self):
        return self.mean


def mean_of(nets):
    mean = sum(net.flops() for net in nets) / len(nets)
    return Architectures(**vars(max(nets, key=Network.kept)), mean=mean)


def hypernetwork_bytes(net):
    """Of the paper's hypernetwork with its Adam, and of the predicted parameters: in float32 themselves,
    their gradients, and what the decoder keeps of them twice (product and scaled)."""
    return 16 * hypernetwork_parameters(net.table) + 16 * net.parameters()


@functools.lru_cache
def hypernetwork_parameters(tokens):
    with torch.device("meta"):
        hypernet = tal.Hypernet(replace(tal.HYPERNETS["paper"], task_dim=768, tokens=tokens))
    return sum(p.numel() for p in hypernet.parameters())


def learngenes(args, made):
    """Of adaptive_learngene.py."""
    how = {"batch": args.batch_size}
    if args.stage == "ancestry":
        for name in itertools.chain(*map(data.parts_of, al.names(args.stream))):
            yield Work(f"learn {name}", descendant(args), args.ancestry_epochs * train_count(name), **how)
        return
    if args.stage == "pretrain":
        yield from ancestors(args, made, how)
        return
    segments = args.stage == "segment"
    net = descendant(args)
    if segments:
        net = segmenter(net, args.crop // args.patch, args.patch)
    for name in al.names(args.data):
        for method in al.names(args.method):
            times = al.DRAWS if method == "random" else 1
            looks = args.reward_share * train_count(name) * SUBSETS if method == "adaptive" else 0
            yield Work(f"{method} {name}", net, times * images_of(args, name), looks=looks, **how)


def ancestors(args, made, how):
    """Plain networks on the whole stream, and what baselines train beside them, for half as long."""
    count, depth = train_count(args.stream.split("/")[0]), args.ancestry_depth
    sizes = [args.size, al.LARGER[args.size]] if "weight-selection" in args.method else [args.size]
    for size in sizes:
        if new(made, args, f"pretrain-{size}"):
            yield Work(f"pretrain {size}", vit(args, size, depth), args.ancestry_epochs * count, **how)
    own, half = vit(args, args.size, depth), vit(args, args.size, depth // 2)
    for method, net, teacher in (("tleg", own, own), ("peg", own, None), ("auto", half, None)):
        if method in al.names(args.method) and new(made, args, f"{method}-{args.size}"):
            yield Work(method, net, args.ancestry_epochs / 2 * count, teacher=teacher, **how)


# ----------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------

RESERVE = 2.0                   # GiB: CUDA itself, its libraries, and fragments


def gibibytes(work, parts=1, gpus=1):
    """GPU memory of a training step: weights, gradients and Adam (16 bytes a parameter), and a part's
    activations, with logits and their gradient beside what is kept; of a teacher its weights and one layer of
    activations."""
    examples = math.ceil(work.batch / gpus / parts)
    total = 16 * work.net.parameters() + work.fixed + examples * (work.net.kept() + 8 * work.net.outputs)
    if work.teacher:
        total += 4 * work.teacher.parameters() + examples * work.teacher.kept() / work.teacher.depth
    return total / GIB + RESERVE


def parts_for(work, memory, gpus=1):
    """The smallest power of two of --accumulate with which a step fits a GPU of `memory` GiB, or None."""
    parts = 1
    while gibibytes(work, parts, gpus) > memory:
        if parts * gpus >= work.batch:
            return None
        parts *= 2
    return parts


# ----------------------------------------------------------------------------------------------------------
# Hours
# ----------------------------------------------------------------------------------------------------------

def measured_rates(device, seconds=20):
    """{width: (images/s, FLOP/s)} of training steps of DeiT-Tiny, -Small and -Base, each for some seconds."""
    rates = {}
    for size in ("tiny", "small", "base"):
        config = common.vit_config(size)
        net, x = common.ViT(config).to(device), torch.randn(128, 3, 224, 224, device=device)
        y = torch.zeros(128, dtype=torch.int64, device=device)
        optimizer = torch.optim.AdamW(net.parameters(), fused=True)
        done, start = -3, 0.0                               # three steps to get warm
        while done < 3 or time.perf_counter() - start < seconds:
            if done == 0:
                torch.cuda.synchronize(device)
                start = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            torch.cuda.synchronize(device)
            done += 1
        rate = 128 * done / (time.perf_counter() - start)
        rates[config.width] = rate, 3 * rate * Network(12, config.width, 197).flops()
    return rates


def hours(work, rates):
    """At the rate of the measured network that is nearest in width."""
    width = min(rates, key=lambda width: abs(math.log(width / work.net.width)))
    return work.flops() / rates[width][1] / 3600


def assumed_rates():
    """1,000 images/s of DeiT-Small, and as many multiplications of the others: where there is no GPU."""
    flops = 3000 * Network(12, 384, 197).flops()
    return {width: (flops / 3 / Network(12, width, 197).flops(), flops) for width in (192, 384, 768)}


# ----------------------------------------------------------------------------------------------------------
# Data and files
# ----------------------------------------------------------------------------------------------------------

def tasks_of(commands):
    """The real datasets that commands name, each once."""
    names = []
    for command in commands:
        if command.startswith("cp "):
            continue
        program, args = flags_of(command)
        asked = args.data.split(",")
        if program == "adaptive_learngene.py":
            asked += [args.stream.split("/")[0]] if args.stage in ("ancestry", "pretrain") else []
        elif args.method in tal.PREDICTED:
            asked += [args.base_task, *args.tune_tasks.split(",")]
        names += [name for name in asked if name]
    return list(dict.fromkeys(names))


def found_of(name, data_dir):
    """(a word, the task, a sentence)."""
    try:
        if name in data.TEXTS:
            splits = data.read_texts(name, data_dir)
            found = data.Found(data.TEXTS[name].class_names, splits, data.TEXTS[name].official)
        else:
            found = data.find(name, data_dir)
    except common.InputError as error:
        return "MISSING", name, str(error).removeprefix(f"{name}: ")
    counts = ", ".join(f"{len(rows):,} {split}" for split, rows in found.files.items())
    trouble = data.differences(found)
    if getattr(found, "missing", None):
        trouble.append(f"{len(found.missing):,} listed images are missing, such as {found.missing[0]}")
    return "differs" if trouble else "whole", name, "; ".join([counts, *trouble])


def file_line(name, path):
    return f"{'found' if Path(path).is_file() else 'MISSING':8} {name}: {path}"


# ----------------------------------------------------------------------------------------------------------
# The report
# ----------------------------------------------------------------------------------------------------------

def planned(lines, gpus=1):
    """[(part, name, [Work])] of lines PART, STATE, NAME, COMMAND; what is done costs nothing."""
    made, cells = set(), []
    for part, state, name, command in lines:
        works = work_of(command, made)
        cells.append((part, name, [] if state == "done" else works))
    return cells


def table(cells, rates, memory):
    """One line per part of reproduce.sh; what several parts share counts for the first that lists it."""
    yield f"{'part':10} cells  GPU-hours  GiB, whole batch  fits {memory:.0f} GiB"
    total = 0.0
    for part in dict.fromkeys(part for part, _, _ in cells):
        works = [work for p, _, cell in cells if p == part for work in cell]
        spent = sum(hours(work, rates) for work in works)
        total += spent
        most = max((gibibytes(work) for work in works), default=0)
        parts = [parts_for(work, memory) for work in works]
        fits = "no" if None in parts else f"--accumulate {max(parts, default=1)}"
        names = {name for p, name, _ in cells if p == part}
        yield f"{part:10} {len(names):5} {spent:10,.1f} {most:17.1f}  {fits}"
    yield f"{'together':10} {len({name for _, name, _ in cells}):5} {total:10,.1f}"


def each_cell(cells, rates, memory):
    """One line per command that trains: NAME, GPU-hours, GiB of the whole batch, --accumulate."""
    for _, name, works in cells:
        if works:
            most = max(works, key=gibibytes)
            spent = sum(hours(work, rates) for work in works)
            yield f"{name}\t{spent:.2f}\t{gibibytes(most):.1f}\t{parts_for(most, memory) or 'does not fit'}"


def report(args, lines):
    commands = [command for *_, command in lines]
    print(f"Data in {args.data_dir} (python data.py --check NAME says more of one):")
    for name in tasks_of(commands):
        print("{:8} {}: {}".format(*found_of(name, args.data_dir)))
    print("\nFiles:")
    print(file_line("ancestry", args.ancestry))
    for file in ("model.safetensors", "vocab.json", "merges.txt"):
        print(file_line("GPT-2", os.path.join(args.gpt2, file)))
    here = Path(args.output).resolve()
    while not here.exists():
        here = here.parent
    cells = planned(lines)
    taken = sum(4 * work.net.parameters() for _, _, works in cells for work in works) / GIB
    free = shutil.disk_usage(here).free / GIB
    print(f"\nDisk: {free:,.0f} GiB free; what is still to do leaves about {taken:,.0f}")
    memory, rates = 80.0, assumed_rates()
    if torch.cuda.is_available():
        device = torch.device("cuda")
        memory = torch.cuda.get_device_properties(0).total_memory / GIB
        name, count = torch.cuda.get_device_name(), torch.cuda.device_count()
        print(f"GPUs: {count} x {name}, {memory:.0f} GiB; measuring for a minute ...")
        rates = measured_rates(device)
        measured = ", ".join(f"{rate:,.0f} of width {width}" for width, (rate, _) in rates.items())
        print(f"training images/s here: {measured}")
    else:
        print("GPUs: none here, so nothing is measured: hours are for 1,000 images/s of DeiT-Small, memory "
              "is 80 GiB")
    print()
    for line in table(cells, rates, memory):
        print(line)
    where = Path(args.output) / "cells.tsv"
    where.parent.mkdir(parents=True, exist_ok=True)
    head = "cell\tGPU-hours\tGiB, whole batch\t--accumulate"
    where.write_text("\n".join([head, *each_cell(cells, rates, memory), ""]))
    print(f"\nEvery cell: {where}. Cells that are done are counted as nothing.")


def accumulate(command, gpus):
    """The flag --accumulate N that a command needs on this machine's GPU, or ""."""
    if not torch.cuda.is_available():
        return ""
    memory = torch.cuda.get_device_properties(0).total_memory / GIB
    needed = [parts_for(work, memory, gpus) for work in work_of(command, set())]
    if None in needed:
        raise common.InputError(f"one example of a step does not fit a GPU of {memory:.0f} GiB: {command}")
    return f"--accumulate {max(needed)}" if max(needed, default=1) > 1 else ""


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\nContents")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accumulate", type=int, metavar="GPUS",
                        help="print the flag for --command on so many GPUs")
    parser.add_argument("--command", default="")
    for name in ("data-dir", "ancestry", "gpt2", "output"):
        parser.add_argument(f"--{name}", default="")
    args = parser.parse_args(argv)
    if args.accumulate:
        print(accumulate(args.command, args.accumulate))
    else:
        report(args, [line.rstrip("\n").split("\t") for line in sys.stdin])


if __name__ == "__main__":
    common.script(main)
