"""Speed of TAL and Adaptive-Learngene on this machine, as markdown tables.

Figures are medians over --repeats calls after a warm-up. The works of a row take turns, so that whatever else
runs on the machine slows them alike: compare within a run, not between runs. On one CPU thread a second is a
second of CPU time, which equals the clock's on an idle machine. Peak is the memory of the process (on a GPU:
what torch allocated) during the warm-up call, including all that this script holds.
"""
import argparse
import contextlib
import dataclasses
import gc
import importlib
import os
import resource
import statistics
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")         # read when torch is imported; --threads decides
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

import adaptive_learngene as al
import data
import tal
from common import Run, Training, ViT, parameter_groups, setup_machine, vit_config, width_and_heads

TABLES = ["predict", "step", "drawn", "adaptive", "load"]


# ------------------------------------------------------------------------------------------------------------
# Clock and tables
# ------------------------------------------------------------------------------------------------------------

def seconds(work, device):
    """Of one call; on one CPU thread, of CPU time."""
    is_gpu = device.type == "cuda"
    clock = time.process_time if not is_gpu and torch.get_num_threads() == 1 else time.perf_counter
    gc.collect()                                      # the released graphs are cycles that hold activations
    if is_gpu:
        torch.cuda.synchronize(device)
    start = clock()
    work()
    if is_gpu:
        torch.cuda.synchronize(device)
    return clock() - start


def peak_of_warm_up(work, device):
    """GiB in use during the first call."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(3):
            seconds(work, device)
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    with contextlib.suppress(OSError):                # only Linux resets; elsewhere the peak only grows
        Path("/proc/self/clear_refs").write_text("5")
    seconds(work, device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


def measured(works, repeats, device):
    """{name: function without arguments} -> {name: (median seconds, peak GiB)}. The functions take turns."""
    peaks = {name: peak_of_warm_up(work, device) for name, work in works.items()}
    times = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    return {name: (statistics.median(times[name]), peaks[name]) for name in works}


def medians(works, repeats, device):
    return {name: median for name, (median, _) in measured(works, repeats, device).items()}


def cell(value):
    if isinstance(value, str):
        return value
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def print_table(title, columns, rows):
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(map(cell, row))} |", flush=True)


def precision_of(machine):
    return str(machine.amp or torch.float32).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------------------
# The works
# ------------------------------------------------------------------------------------------------------------

def product_gflop(config, rank, features=0):
    """Of W = A B^T in the low-rank decoder: every matrix of a network, and M."""
    matrices = [p.numel() for p in tal.skeleton(config).parameters() if p.ndim > 1]
    return 2 * rank * (sum(matrices) + features * config.width) / 1e9


def trainer(machine, net, groups, clip, losses):
    """A whole training step: losses() -> (loss, cls, aux), then backward, clipping and AdamW."""
    with tempfile.TemporaryDirectory() as folder:     # update() writes nothing
        job = Training(Run(folder, {}, machine), "bench", net, groups, steps=10 ** 6, clip=clip)

    def step():
        loss, cls, aux = losses()
        job.update(loss, loss_cls=cls, loss_aux=aux)
    return step


class Batch:
    """Random images as a task gives them."""

    def __init__(self, n, config, device):
        shape = (n, 3, config.image_size, config.image_size)
        self.name, self.num_classes = "bench", config.num_classes
        self.x = torch.randint(256, shape, dtype=torch.uint8, device=device)
        self.y = torch.randint(config.num_classes, (n,), device=device)

    def normalise(self, x):
        return (x / 255 - 0.5) / 0.25


def tal_trainer(args, machine, hypernet, ancestry, config, batch, I):
    groups = hypernet.optimizer_groups(args.lr, args.lr_basis, args.weight_decay)
    objective = tal.Objective(ancestry, args.alpha if ancestry else 0.0, args.temperature)

    def losses():
        return tal.tal_step(hypernet, config, batch, batch.x, batch.y, I, objective, machine)
    return trainer(machine, hypernet, groups, args.clip, losses)


def alone(args, machine, config, batch):
    """(forward and backward, whole training step) of the same network with parameters of its own."""
    net = ViT(config).to(machine.device)

    def losses():
        with machine.autocast():
            logits = net(batch.normalise(batch.x))
        return [tal.loss_cls(batch.y, logits.float())] * 3

    def forward_backward():
        net.zero_grad()
        losses()[0].backward()
    groups = parameter_groups(net, args.lr, args.weight_decay)
    return forward_backward, trainer(machine, net, groups, args.clip, losses)


def ancestry_size(args):
    """(width, depth, heads)"""
    return [int(number) for number in args.ancestry_size.split("x")]


def frozen_ancestry(args, machine):
    """(ancestry with random parameters, its forward pass)"""
    width, depth, heads = ancestry_size(args)
    config = tal.configuration(tal.input_shape(args), width, depth, heads)
    ancestry = tal.Ancestry(config, {}).to(machine.device).eval().requires_grad_(False)

    def forward(batch):
        with torch.no_grad(), machine.autocast():
            ancestry(batch.x, batch)
    return ancestry, forward


# ------------------------------------------------------------------------------------------------------------
# The released code
# ------------------------------------------------------------------------------------------------------------

class Released:
    """The released code through its own Graph, GHN3.forward and Trainer.update, in float32 on the CPU.

    What keeps it from starting is stepped around: packages whose __init__ imports a missing module, a
    scheduler argument that torch dropped, a 16 GiB decoder that a base class builds for nothing, sizes
    written into the trainer. Stage 0 pretrains under the ancestry, stage 1 tunes with a task embedding.
    """

    def __init__(self, folder, args):
        self.args, self.stages = args, []
        self.embedding = torch.randn(ancestry_size(args)[0])
        sys.path += [f"{folder}/{part}" for part in ("TAL/TAL", "ppuda", "site")]
        nothing = type("Nothing", (torch.nn.Identity,), {})
        importlib.import_module("ppuda.ghn.nn").ConvDecoder = nothing
        sizes = tal.HYPERNETS[args.hypernet]
        config = {
            "max_shape": (2048, 2048, 16, 16), "num_classes": 1000, "lora_r": sizes.rank,
            "max_ck_lora": 2048 * 16, "weight_norm": True, "ve": True, "layernorm": True, "hid": sizes.width,
            "layers": sizes.layers, "heads": sizes.heads,
        }
        self.add_stage(folder, "ghn3", "trainer_teacher", config)
        self.add_stage(folder, "ghn3_MTL", "trainer", config | {"task_embedding_dim": len(self.embedding)})

    def add_stage(self, folder, package, file, config):
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [f"{folder}/TAL/TAL/{package}"]
        trainer, nn, graph = (importlib.import_module(f"{package}.{name}") for name in (file, "nn", "graph"))
        trainer.StepLR = lambda *_, **__: None
        self.stages.append((trainer, graph, nn.GHN3(**config), trainer._vision_transformer))

    def sizes(self, config):
        return {"num_layers": config.depth, "num_heads": config.heads, "hidden_dim": config.width,
                "mlp_dim": 4 * config.width}

    def net(self, config, stage=1):
        net = self.stages[stage][3](
            patch_size=config.patch_size, image_size=config.image_size, weights=None, progress=False,
            num_classes=config.num_classes, **self.sizes(config))
        net.expected_input_sz = config.image_size                   # of the forward pass that Graph traces
        return net

    def graph(self, net, stage=1):
        graph = self.stages[stage][1]
        return graph.Graph(net, ve_cutoff=250, dense=True, list_all_nodes=True, verbose=False)

    def prediction(self, config):
        net, (_, graph, hypernet, _) = self.net(config), self.stages[1]
        graphs = graph.GraphBatch([self.graph(net)], dense=True)
        hypernet.eval()
        return torch.no_grad()(lambda: hypernet(net, self.embedding, graphs))

    def trainer(self, config, batch, with_ancestry):
        stage = 0 if with_ancestry else 1
        module, graph_module, hypernet, _ = self.stages[stage]
        module._vision_transformer = lambda **_: self.net(config, stage)    # a random one per step
        teacher, more = torch.nn.Identity(), (config.num_classes, self.embedding, "bench")
        if with_ancestry:
            teacher, more = importlib.import_module("timm").create_model("vit_base_patch16_224"), ()
        job = module.Trainer(
            hypernet, teacher, "adamw", {"lr": self.args.lr, "weight_decay": 1e-2}, "step", 10 ** 6,
            device="cpu", label_smoothing=0.1, predparam_wd=3e-5, scheduler_args={})
        graph = self.graph(self.net(config, stage), stage)
        graph.net_args = self.sizes(config)
        graphs = graph_module.GraphBatch([graph], dense=True)
        x = batch.normalise(batch.x)
        return lambda: job.update(x, batch.y, *more, graphs=graphs)


def beside(times, released):
    """Two cells more where the released code was measured."""
    if not released:
        return []
    return [times["released"][0], times["released"][0] / times["ours"][0]]


# ------------------------------------------------------------------------------------------------------------
# TAL's tables
# ------------------------------------------------------------------------------------------------------------

def prediction_rows(args, machine, hypernet, released, rate, repeats):
    rank = hypernet.config.rank
    for name in ("tiny", "small", "base"):
        config = vit_config(name, 12)
        graph = tal.encoded(config, machine.device)[1]
        I = torch.randn(hypernet.config.task_dim, device=machine.device)
        works = {"ours": torch.no_grad()(lambda: hypernet.predict(graph, I))}
        if released:
            works["released"] = released.prediction(config)
        times = measured(works, repeats, machine.device)
        gflop, (median, peak) = product_gflop(config, rank), times["ours"]
        yield (f"12-{name.title()}", median, gflop, gflop / rate, median * rate / gflop, peak,
               *beside(times, released))


def encoding_rows(machine, released, repeats):
    config = vit_config("base", 12)
    works = {"ours": lambda: tal.encode_graph(tal.skeleton(config)).to(machine.device)}
    if released:
        net = released.net(config)
        works["released"] = lambda: released.graph(net)
    times = measured(works, repeats, machine.device)
    yield "12-Base", *times["ours"], *beside(times, released)


def step_row(args, machine, hypernet, released, rate, repeats, config, n, with_ancestry):
    batch = Batch(n, config, machine.device)
    ancestry, forward = frozen_ancestry(args, machine) if with_ancestry else (None, None)
    task_dim = hypernet.config.task_dim
    I = None if with_ancestry else torch.randn(task_dim, device=machine.device)
    works = {"ours": tal_trainer(args, machine, hypernet, ancestry, config, batch, I),
             "student": alone(args, machine, config, batch)[0]}
    if with_ancestry:
        works["ancestry"] = lambda: forward(batch)
    if released:
        works["released"] = released.trainer(config, batch, with_ancestry)
    times = measured(works, repeats, machine.device)
    step, student = times["ours"][0], times["student"][0]
    teacher = times["ancestry"][0] if with_ancestry else 0.0
    features = task_dim if with_ancestry else 0
    products = 3 * product_gflop(config, hypernet.config.rank, features) / rate     # and back to A and to B
    limit = student + teacher
    name = (f"{config.depth} x {config.width}, {config.image_size} px, patch {config.patch_size}, batch {n}, "
            f"{config.num_classes} classes, {'ViT-Base' if with_ancestry else 'no'} ancestry")
    return (name, step, student, teacher, step / limit, products, step / (limit + products), times["ours"][1],
            *beside(times, released))


def step_rows(args, machine, hypernet, released, rate, repeats, n):
    small = vit_config("small", 12)
    tiny = vit_config("tiny", 6, image_size=32, patch_size=4, num_classes=100)
    how = args, machine, hypernet, released, rate, repeats
    yield step_row(*how, small, n or 8, True)
    yield step_row(*how, tiny, n or 64, False)


def drawn_rows(machine, repeats, count):
    args = tal.settings([])
    ancestry, forward = frozen_ancestry(args, machine)
    hypernet = tal.build_hypernet(args, ancestry.width).to(machine.device)
    I = torch.randn(ancestry.width, device=machine.device)
    sums = dict.fromkeys(("with ancestry", "no ancestry", "alone", "ancestry"), 0.0)
    for config in tal.architectures(args.archs, tal.input_shape(args), count):
        config = dataclasses.replace(config, num_classes=32)
        batch = Batch(args.batch_size, config, machine.device)
        works = {"with ancestry": tal_trainer(args, machine, hypernet, ancestry, config, batch, I),
                 "no ancestry": tal_trainer(args, machine, hypernet, None, config, batch, I),
                 "alone": alone(args, machine, config, batch)[1], "ancestry": lambda: forward(batch)}
        for name, median in medians(works, repeats, machine.device).items():
            sums[name] += median / (args.batch_size * count)
    floors = {"no ancestry": sums["alone"], "with ancestry": sums["alone"] + sums["ancestry"]}
    for stage, floor in floors.items():
        ours = sums[stage]
        yield stage, 1 / ours, 1 / sums["alone"], sums["alone"] / ours, 1 / floor, floor / ours


def tal_tables(flags, machines, wanted):
    args, device = tal.settings(["--preset", "paper"]), machines[0].device
    with contextlib.redirect_stdout(None):
        released = Released(flags.peer, args) if flags.peer else None
    hypernet = tal.build_hypernet(args, ancestry_size(args)[0]).to(device)
    # the decoder computes in float32 whatever --amp says (TF32 on a GPU)
    a, b = torch.randn(2, 2048, 2048, device=device)
    rate = 2 * 2048 ** 3 / medians({"product": lambda: a @ b}, 9, device)["product"] / 1e9
    parameters = sum(p.numel() for p in hypernet.parameters())
    print(f"A float32 product of 2048 x 2048 runs at {rate:.0f} GFLOP/s; the hypernetwork of --preset paper "
          f"has {parameters:,} parameters.")
    more = ["peak, GiB"] + ["released, s", "released / ours"] * bool(released)
    if "predict" in wanted:
        print_table(
            "Predict every parameter, graph given (224 px, patch 16, 1000 classes, no gradients)",
            ["network", "s", "A B, GFLOP", "A B alone, s", "s / A B alone", *more],
            prediction_rows(args, machines[0], hypernet, released, rate, flags.repeats))
        print_table("Encode the graph, network given", ["network", "s", *more],
                    encoding_rows(machines[0], released, flags.repeats))
    for machine in machines:
        how = f"networks in {precision_of(machine)}"
        n = flags.batch_size or (512 if device.type == "cuda" else 0)
        if "step" in wanted:
            print_table(
                f"Training step of the hypernetwork, AdamW included ({how})",
                ["network", "s", "student alone, forward + backward", "ancestry alone, forward", "s / alone",
                 "3 A B alone, s", "s / (alone + 3 A B)", *more],
                step_rows(args, machine, hypernet, released, rate, flags.repeats, n))
        if "drawn" in wanted:
            print_table(
                f"Drawn preset: images/s of whole training steps over {flags.archs} architectures ({how})",
                ["stage", "with the hypernetwork", "the same networks alone", "ratio",
                 "alone + the ancestry's forward", "ratio"],
                drawn_rows(machine, flags.repeats, flags.archs))


# ------------------------------------------------------------------------------------------------------------
# Adaptive-Learngene's tables
# ------------------------------------------------------------------------------------------------------------

class Learngenes:
    """Ten random learngenes of a shape, and what trains on them: whole steps, AdamW included."""

    def __init__(self, args, machine, size, image_size, patch, depth, n, classes):
        self.args, self.machine, self.depth, self.classes = args, machine, depth, classes
        self.config = al.AncestryConfig(size=size, image_size=image_size, patch=patch, pooling="token")
        self.pool = al.Pool("no such pool", self.config, machine.device, new=True)
        net = self.network()
        for k in range(10):
            gene = al.new_learngene(al.learngene_shapes(net), "random")
            stem = {} if k else al.tensors_of(al.as_module(al.stem_of(net)))
            self.pool.records.append({"gene": gene, "stem": stem})
        self.batch = Batch(n, net.config, machine.device)

    def network(self, classes=None):
        classes = self.classes if classes is None else classes
        return al.backbone(self.config, (self.depth,), classes).to(self.machine.device)

    def trainer(self, net, forward):
        batch, args = self.batch, self.args

        def losses():
            with self.machine.autocast():
                logits = forward(batch.normalise(batch.x))
            return [al.loss_ce(batch.y, logits.float())] * 3
        groups = parameter_groups(net, args.lr, args.weight_decay)
        return trainer(self.machine, net, groups, args.clip, losses)

    def plain(self):
        net = self.network()
        return self.trainer(net, net)

    def ancestry(self, all_take_part):
        """The last learngene on top of nine others, which are frozen; every second may sit out."""
        net, device = self.network(0), self.machine.device
        gene = al.new_learngene(al.learngene_shapes(net), "random")
        head = al.new_head(net.width, self.classes)
        model = al.ComposedNetwork(net, self.config, 10, {10: gene}, head, self.pool.theta(9)).to(device)
        G = None
        if not all_take_part:
            G = torch.ones(9, device=device)
            G[::2] = 0
        return self.trainer(model, lambda x: model(x, G))

    def constrained(self, k):
        G = (1,) * k + (0,) * (10 - k)
        model = al.constrained(self.pool.fill(self.network(), G), self.pool, G)
        return self.trainer(model, model)


def composed_rows(machine, repeats, n, small_only):
    """(rows of the ancestry's table, rows of the constrained training's)"""
    args = al.settings([])
    shapes = [(args.size, args.image_size, args.patch, args.ancestry_depth, args.batch_size, 8)]
    if not small_only:
        shapes += [("tiny", 224, 16, 12, n or 8, 100), ("small", 224, 16, 12, n or 8, 100)]
    first, second = [], []
    for size, image_size, patch, depth, batch, classes in shapes:
        genes = Learngenes(args, machine, size, image_size, patch, depth, batch, classes)
        works = {"plain": genes.plain(), "all": genes.ancestry(True), "some": genes.ancestry(False)}
        works |= {k: genes.constrained(k) for k in (1, 3, 10)}
        times = medians(works, repeats, machine.device)
        plain = times["plain"]
        name = f"{depth} x {width_and_heads(size)[0]}, {image_size} px, patch {patch}, batch {batch}"
        first.append((name, 1e3 * plain, times["all"] / plain, times["some"] / plain))
        second.append((name, 1e3 * plain, *(times[k] / plain for k in (1, 3, 10))))
    return first, second


def composing_rows(machine, repeats):
    """DeiT-Base from ten learngenes, beside copies of as many bytes."""
    device = machine.device
    genes = Learngenes(al.settings([]), machine, "base", 32, 16, 12, 1, 10)
    net, theta = genes.network(), genes.pool.theta(10)
    a, G = al.coefficients(12, 10).to(device), torch.ones(10, device=device)
    block = sum(tensor[0].numel() for tensor in theta.values())
    moved = 4 * block * (10 + 12)                     # reads ten learngenes, writes twelve blocks
    source, target = torch.randn(2, moved // 8, device=device)      # a copy reads one, writes the other
    works = {
        "`compose`, Eq. (8)": lambda: [al.compose(tensor, a, G) for tensor in theta.values()],
        "`fill`: and into the network": lambda: genes.pool.fill(net, (1,) * 10),
        "`copy_` into memory in use": lambda: target.copy_(source),
        "`clone` into new memory": lambda: source.clone()}
    times = medians(works, repeats, device)
    for name, median in times.items():
        yield name, 1e3 * median, moved / 1e9 / median, median / times["`copy_` into memory in use"]


def adaptive_tables(flags, machine):
    how = f"networks in {precision_of(machine)}, medians of {flags.repeats}"
    first, second = composed_rows(machine, flags.repeats, flags.batch_size, flags.drawn_only)
    print_table(
        f"Training step of learngene 10 over that of a plain ViT of the same shape, AdamW included ({how})",
        ["shape", "plain, ms", "all take part / plain", "every second sits out / plain"], first)
    print_table(
        f"Training step of a descendant under Eq. (8) from k learngenes, over a plain ViT's ({how})",
        ["shape", "plain, ms", "k = 1 / plain", "k = 3 / plain", "k = 10 / plain"], second)
    print_table("Composing DeiT-Base, 12 layers, from 10 learngenes (float32; 10 blocks read, 12 written)",
                ["work", "ms", "GB/s", "time / copy_"], composing_rows(machine, flags.repeats))


# ------------------------------------------------------------------------------------------------------------
# Loading, and the program
# ------------------------------------------------------------------------------------------------------------

def photographs(folder, count):
    """JPEGs of 500 x 375 pixels, as most of ImageNet's are; their mean size in MB."""
    rng, sizes = np.random.default_rng(0), []
    for k in range(count):
        path = Path(folder, "train", "ab"[k % 2], f"{k}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (47, 63, 3), np.uint8)
        Image.fromarray(pixels).resize((500, 375), Image.BICUBIC).save(path, quality=90)
        sizes.append(path.stat().st_size / 1e6)
    return statistics.mean(sizes)


def loading_rows(batch_size=32, batches=8):
    """To batches at 224 px: images/s by the wall clock, as processes decode."""
    with tempfile.TemporaryDirectory() as folder:
        megabytes = photographs(folder, 2 * batch_size)
        for recipe in ("none", "decathlon", "deit"):
            rates = []
            for workers in (0, 1, 2):
                with contextlib.redirect_stdout(None):
                    task = data.load(folder, image_size=224, memory=0)
                task.workers = workers
                task.batch("train", 0, batch_size, recipe=recipe)
                start = time.perf_counter()
                for step in range(1, 1 + batches):
                    task.batch("train", step, batch_size, recipe=recipe)
                rates.append(batches * batch_size / (time.perf_counter() - start))
            yield recipe, *(f"{rate:.0f}" for rate in rates), f"{max(rates) * megabytes:.1f}"


def parsed():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tables", default=",".join(TABLES), help=f"which to print [{','.join(TABLES)}]")
    add("--repeats", type=int, default=5, help="timed calls per figure [5]")
    add("--threads", type=int, default=1, help="threads of torch on the CPU [1]")
    add("--device", default="cpu", help="cpu or cuda [cpu]")
    add("--amp", default="", help="precisions of the networks: none, bf16, fp16 [none; on cuda bf16,fp16]")
    add("--batch-size", type=int, default=0, help="of training steps [8 and 64; on cuda 512, the paper's]")
    add("--drawn-only", action="store_true", help="adaptive: leave DeiT-Tiny and DeiT-Small out")
    add("--return-memory", action="store_true", help="leave the C library's allocator as it is")
    add("--archs", type=int, default=12, help="architectures of the drawn table [12]")
    add("--peer", default="", metavar="DIR",
        help="measure the released code beside ours (CPU): a folder with checkouts TAL and ppuda, and site "
             "with what they import: pip install --target site transformers joblib psutil; --no-deps timm")
    flags = parser.parse_args()
    if flags.peer and flags.device != "cpu":
        parser.error("--peer measures on the CPU only")
    return flags


def main():
    flags = parsed()
    torch.set_num_threads(flags.threads)
    warnings.simplefilter("ignore")
    is_gpu = flags.device.startswith("cuda")
    precisions = flags.amp or ("bf16,fp16" if is_gpu else "none")
    machines = []
    for amp in precisions.split(","):
        machines.append(setup_machine(flags.device, amp, return_memory=flags.return_memory))
    name = torch.cuda.get_device_name(machines[0].device) if is_gpu else f"CPU, {flags.threads} thread(s)"
    print(f"torch {torch.__version__}, {name}, medians of {flags.repeats}.")
    wanted = flags.tables.split(",")
    if {"predict", "step", "drawn"} & set(wanted):
        tal_tables(flags, machines, wanted)
    if "adaptive" in wanted:
        for machine in machines:
            adaptive_tables(flags, machine)
    if "load" in wanted:
        columns = ["recipe", "in this process", "1 worker", "2 workers", "MB/s at best"]
        print_table("Decoding JPEGs of 500 x 375 to 224 px: images/s", columns, loading_rows())


if __name__ == "__main__":
    main()
