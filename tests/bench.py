"""Speed of TAL and Adaptive-Learngene on this machine, as markdown tables: `python tests/bench.py`, `... --tables adaptive`.

Figures are medians over --repeats calls after a warm-up. The works of a row take turns, so that whatever else runs on
the machine slows them alike: compare within a run, not between runs. On one CPU thread a second is a second of CPU time,
which equals the clock's on an idle machine. Peak is the memory of the process (on a GPU: what torch allocated) during the
warm-up call, including all that this script holds.
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

os.environ.setdefault("OMP_NUM_THREADS", "1")         # read when torch is imported; --threads has the last word
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

import adaptive_learngene as al
import data
import tal
from common import VIT_SIZES, Run, Training, ViT, ViTConfig, parameter_groups, setup_machine


def clock(works, repeats, device):
    """{name: function without arguments} -> {name: (median seconds, peak GiB)}. The functions take turns."""
    cuda = device.type == "cuda"
    now = time.process_time if not cuda and torch.get_num_threads() == 1 else time.perf_counter

    def seconds(work):
        gc.collect()                                                 # the released graphs are cycles that hold activations
        if cuda:
            torch.cuda.synchronize(device)
        start = now()
        work()
        if cuda:
            torch.cuda.synchronize(device)
        return now() - start

    peaks, times = {}, {name: [] for name in works}
    for name, work in works.items():
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with contextlib.suppress(OSError):                       # only Linux resets; elsewhere the peak only grows
                Path("/proc/self/clear_refs").write_text("5")
        for _ in range(3 if cuda else 1):
            seconds(work)
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        peaks[name] = (torch.cuda.max_memory_allocated(device) if cuda else rss) / 2 ** 30
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(seconds(work))
    return {name: (statistics.median(t), peaks[name]) for name, t in times.items()}


def table(title, columns, rows):
    print(f"\n{title}\n\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(c if isinstance(c, str) else f"{c:.0f}" if c >= 100 else f"{c:.3g}" for c in row) + " |", flush=True)


def beside(times, peer):
    return [times["released"][0], times["released"][0] / times["ours"][0]] if peer else []


# ------------------------------------------------------ The works ------------------------------------------------------


def size(depth, name, **more):
    return ViTConfig(depth=depth, width=VIT_SIZES[name][0], heads=VIT_SIZES[name][1], **more)


def product_gflop(config, rank, features=0):
    """Multiplications and additions of W = A B^T in the low-rank decoder: every matrix of a network, and M."""
    return 2 * rank * (sum(p.numel() for p in tal.skeleton(config).parameters() if p.ndim > 1) + features * config.width) / 1e9


def trainer(machine, net, groups, clip, losses):
    """A whole training step: losses() -> (loss, cls, aux), then backward, clipping and AdamW as common.Training does them."""
    with tempfile.TemporaryDirectory() as folder:                    # update() writes nothing
        job = Training(Run(folder, {}, machine), "bench", net, groups, steps=10 ** 6, clip=clip)

    def step():
        loss, cls, aux = losses()
        job.update(loss, loss_cls=cls, loss_aux=aux)
    return step


def tal_trainer(args, machine, hypernet, ancestry, config, x, y, I):
    task = types.SimpleNamespace(name="bench", num_classes=config.num_classes)
    return trainer(machine, hypernet, hypernet.groups(args.lr, args.lr_basis, args.weight_decay), args.clip,
                   lambda: tal.tal_step(hypernet, ancestry, config, task, x, y, I, args, machine))


def alone(args, machine, config, x, y):
    """(forward and backward, whole training step) of the same network with parameters of its own."""
    net = ViT(config).to(machine.device)

    def losses():
        with machine.autocast():
            logits = net(x)
        return [tal.loss_cls(y, logits.float())] * 3

    def forward_backward():
        net.zero_grad()
        losses()[0].backward()
    return forward_backward, trainer(machine, net, parameter_groups(net, args.lr, args.weight_decay), args.clip, losses)


def frozen_ancestry(args, machine):
    """(ancestry with random parameters, its forward pass)"""
    config = ViTConfig(args.image_size, args.patch, args.ancestry_width, args.ancestry_depth, args.ancestry_heads, pool=args.pool)
    ancestry = tal.Ancestry(config, {}).to(machine.device).eval().requires_grad_(False)

    def forward(x):
        with torch.no_grad(), machine.autocast():
            ancestry(x)
    return ancestry, forward


def batch(n, config, device):
    x = torch.randn(n, 3, config.image_size, config.image_size, device=device)
    return x, torch.randint(config.num_classes, (n,), device=device)


class Peer:
    """The released code through its own Graph, GHN3.forward and Trainer.update, in float32 on the CPU.

    What keeps it from starting is stepped around: packages whose __init__ imports a missing module, a scheduler argument
    that torch dropped, a 16 GiB decoder that a base class builds for nothing, sizes written into the trainer.
    """
    def __init__(self, folder, args):
        self.args, self.embedding, self.stages = args, torch.randn(args.ancestry_width), []
        sys.path += [f"{folder}/{part}" for part in ("TAL/TAL", "ppuda", "site")]
        importlib.import_module("ppuda.ghn.nn").ConvDecoder = type("Nothing", (torch.nn.Identity,), {})
        config = dict(max_shape=(2048, 2048, 16, 16), num_classes=1000, lora_r=args.rank, max_ck_lora=2048 * 16, weight_norm=True,
                      ve=True, layernorm=True, hid=args.hid, layers=args.layers, heads=args.hyper_heads)
        tune = {"task_embedding_dim": args.ancestry_width}
        for name, file, more in (("ghn3", "trainer_teacher", {}), ("ghn3_MTL", "trainer", tune)):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [f"{folder}/TAL/TAL/{name}"]
            trainer, nn, graph = (importlib.import_module(f"{name}.{module}") for module in (file, "nn", "graph"))
            trainer.StepLR = lambda *_, **__: None
            self.stages.append((trainer, graph, nn.GHN3(**config, **more), trainer._vision_transformer))

    def net(self, config, stage=1):
        net = self.stages[stage][3](patch_size=config.patch_size, image_size=config.image_size, weights=None, progress=False,
                                    num_classes=config.num_classes, **self.sizes(config))
        net.expected_input_sz = config.image_size                                  # of the forward pass that Graph traces
        return net

    def sizes(self, config):
        return dict(num_layers=config.depth, num_heads=config.heads, hidden_dim=config.width, mlp_dim=4 * config.width)

    def graph(self, net, stage=1):
        return self.stages[stage][1].Graph(net, ve_cutoff=250, dense=True, list_all_nodes=True, verbose=False)

    def predict(self, config):
        net, (_, graph, hypernet, _) = self.net(config), self.stages[1]
        graphs = graph.GraphBatch([self.graph(net)], dense=True)
        return torch.no_grad()(lambda: hypernet.eval()(net, self.embedding, graphs))

    def trainer(self, config, x, y, with_ancestry):
        stage = 0 if with_ancestry else 1
        module, graph_module, hypernet, _ = self.stages[stage]
        module._vision_transformer = lambda **_: self.net(config, stage)           # a random network at every step, as released
        teacher = importlib.import_module("timm").create_model("vit_base_patch16_224") if with_ancestry else torch.nn.Identity()
        job = module.Trainer(hypernet, teacher, "adamw", dict(lr=self.args.lr, weight_decay=1e-2), "step", 10 ** 6, device="cpu",
                             label_smoothing=0.1, predparam_wd=3e-5, scheduler_args={})
        graph = self.graph(self.net(config, stage), stage)
        graph.net_args = self.sizes(config)
        graphs = graph_module.GraphBatch([graph], dense=True)
        return lambda: job.update(x, y, *(() if with_ancestry else (config.num_classes, self.embedding, "bench")), graphs=graphs)


# ------------------------------------------------------ The tables -----------------------------------------------------

def predictions(args, machine, hypernet, peer, rate, repeats):
    for name in ("tiny", "small", "base"):
        config = size(12, name)
        graph, I = tal.encoded(config, machine.device)[1], torch.randn(args.ancestry_width, device=machine.device)
        works = {"ours": torch.no_grad()(lambda: hypernet.predict(graph, I))}
        times = clock(works | ({"released": peer.predict(config)} if peer else {}), repeats, machine.device)
        gflop, (seconds, peak) = product_gflop(config, args.rank), times["ours"]
        yield f"12-{name.title()}", seconds, gflop, gflop / rate, seconds * rate / gflop, peak, *beside(times, peer)


def encodings(args, machine, peer, repeats):
    config = size(12, "base")
    works = {"ours": lambda: tal.encode_graph(tal.skeleton(config)).to(machine.device)}
    if peer:
        net = peer.net(config)
        works["released"] = lambda: peer.graph(net)
    times = clock(works, repeats, machine.device)
    yield "12-Base", *times["ours"], *beside(times, peer)


def steps(args, machine, hypernet, peer, rate, repeats, n):
    cases = [(size(12, "small"), n or 8, True), (size(6, "tiny", image_size=32, patch_size=4, num_classes=100), n or 64, False)]
    for config, n, with_ancestry in cases:
        x, y = batch(n, config, machine.device)
        ancestry, forward = frozen_ancestry(args, machine) if with_ancestry else (None, None)
        I = None if with_ancestry else torch.randn(args.ancestry_width, device=machine.device)
        works = {"ours": tal_trainer(args, machine, hypernet, ancestry, config, x, y, I),
                 "student": alone(args, machine, config, x, y)[0]}
        if with_ancestry:
            works["ancestry"] = lambda: forward(x)
        if peer:
            works["released"] = peer.trainer(config, x, y, with_ancestry)
        times = clock(works, repeats, machine.device)
        works = ancestry = forward = None                            # freed before the next row's peak is taken
        step, student, teacher = (times.get(k, (0.0,))[0] for k in ("ours", "student", "ancestry"))
        products = 3 * product_gflop(config, args.rank, args.ancestry_width * with_ancestry) / rate    # and backward to A and to B
        name = f"{config.depth}-{'Small' if with_ancestry else 'Tiny'}, {config.image_size} px, patch {config.patch_size}, batch {n}"
        yield (f"{name}, {config.num_classes} classes, {'ViT-Base' if with_ancestry else 'no'} ancestry", step, student, teacher,
               step / (student + teacher), products, step / (student + teacher + products), times["ours"][1], *beside(times, peer))


def drawn(machine, repeats, count):
    args = tal.settings([])
    hypernet = tal.build_hypernet(args).to(machine.device)
    ancestry, forward = frozen_ancestry(args, machine)
    sums, I = {}, torch.randn(args.ancestry_width, device=machine.device)
    for config in tal.architectures(args.archs, tal.input_shape(args), count):
        config = dataclasses.replace(config, num_classes=32)
        x, y = batch(args.batch_size, config, machine.device)
        works = {"with ancestry": tal_trainer(args, machine, hypernet, ancestry, config, x, y, I),
                 "no ancestry": tal_trainer(args, machine, hypernet, None, config, x, y, I),
                 "alone": alone(args, machine, config, x, y)[1], "ancestry": lambda: forward(x)}
        for name, (seconds, _) in clock(works, repeats, machine.device).items():
            sums[name] = sums.get(name, 0) + seconds / (args.batch_size * count)
    floor = {"no ancestry": sums["alone"], "with ancestry": sums["alone"] + sums["ancestry"]}
    for stage in floor:
        yield stage, 1 / sums[stage], 1 / sums["alone"], sums["alone"] / sums[stage], 1 / floor[stage], floor[stage] / sums[stage]


# ------------------------------------------------- Adaptive-Learngene --------------------------------------------------


class Learngenes:
    """Ten random learngenes of a shape, and what trains on them: whole steps, AdamW included, on one batch."""
    def __init__(self, machine, config, n, classes, count=10):
        self.machine, self.config, self.depths = machine, dataclasses.replace(config, num_classes=classes), (config.depth,)
        device = machine.device
        self.args = al.settings(["--image-size", str(config.image_size), "--patch", str(config.patch_size)])
        self.x, self.y = batch(n, self.config, device)
        self.pool = al.Pool("nowhere", {"basis": "chebyshev", "first_order": 0, "init": "delta"}, device)
        net = ViT(self.config)
        for k in range(count):
            gene = al.new_learngene(net, "delta", first=k == 0)
            self.pool.add(gene={name: p.detach() for name, p in gene.named_parameters()}, head={},
                          stem={} if k else {name: p.detach() for name, p in al.stem_of(net).items()})
            self.pool.seal(write=False)

    def trainer(self, module, forward):
        def losses():
            with self.machine.autocast():
                y_hat = forward(self.x, 0)
            return [al.loss_ce(self.y, y_hat.float())] * 3
        args = self.args
        return trainer(self.machine, module, al.parameter_groups(module, args.lr, args.weight_decay), args.clip, losses)

    def plain(self):
        net = ViT(self.config).to(self.machine.device)
        return self.trainer(net, lambda x, step: net(x))

    def ancestry(self, all_take_part):
        """The last learngene on top of the others, frozen: summed once if all take part, else composed anew in every step."""
        N, device, net = len(self.pool), self.machine.device, ViT(self.config)
        net.load_state_dict(self.pool.stem(), strict=False)
        net, net.head = net.to(device).requires_grad_(False), torch.nn.Identity()
        groups, gene = al.block_groups(net), al.new_learngene(net, "delta", first=False).to(device)
        head = al.new_head(self.config.width, self.config.num_classes).to(device)
        (a,), (theta,) = al.group_coefficients(groups, N, self.pool.settings, device), self.pool.theta(N - 1)
        base = al.gain_offset(groups, "delta")[0].to(device)
        mask, everything = (torch.arange(N - 1, device=device) % 2).float(), al.compose(theta, a[:, :-1], base=base)
        frozen = (lambda step: [everything]) if all_take_part else lambda step: [al.compose(theta, a[:, :-1], mask, base)]
        return self.trainer(torch.nn.ModuleDict({"gene": gene, "head": head}),
                            al.composed_forward(net, groups, [gene], head, [a[:, -1:]], frozen))

    def constrained(self, k):
        net = al.fill_from(self.pool, ViT(self.config).to(self.machine.device), G := (1,) * k + (0,) * (len(self.pool) - k))
        return self.trainer(*al.constrained_module(self.args, self.machine, self.pool, self.depths, net, G))


def composed_steps(machine, repeats, n, small_only):
    """(rows of the ancestry's table, rows of the constrained training's)"""
    drawn = al.settings([])
    shapes = [("drawn", ViTConfig(drawn.image_size, drawn.patch, *VIT_SIZES[drawn.size][:1], drawn.ancestry_depth,
                                  VIT_SIZES[drawn.size][1], pool=drawn.pool), drawn.batch_size, 8)]
    shapes += [] if small_only else [(f"DeiT-{name.title()}", size(12, name), n or 8, 100) for name in ("tiny", "small")]
    first, second = [], []
    for name, config, n, classes in shapes:
        genes = Learngenes(machine, config, n, classes)
        works = {"plain": genes.plain(), "all": genes.ancestry(True), "some": genes.ancestry(False)}
        works |= {k: genes.constrained(k) for k in (1, 3, 10)}
        times = {work: s for work, (s, _) in clock(works, repeats, machine.device).items()}
        name += f": {config.depth} x {config.width}, {config.image_size} px, patch {config.patch_size}, batch {n}"
        plain = times["plain"]
        mean = (1 - drawn.gene_dropout) * times["all"] + drawn.gene_dropout * times["some"]
        first.append((name, 1e3 * plain, 1e3 * times["all"], times["all"] / plain, 1e3 * times["some"], times["some"] / plain,
                      mean / plain))
        second.append((name, 1e3 * plain, *(times[k] / plain for k in (1, 3, 10))))
    return first, second


def composing(machine, repeats):
    """DeiT-Base from ten learngenes, beside copies of as many bytes."""
    config, device = size(12, "base"), machine.device
    genes = Learngenes(machine, dataclasses.replace(config, image_size=32), 1, 10)
    net, (theta,) = ViT(genes.config).to(device), genes.pool.theta(10)
    a, G = al.coefficients(12, 10).to(device), torch.ones(10, device=device)
    moved = 4 * (theta.numel() + 12 * theta.shape[1])                # reads ten learngenes, writes twelve blocks
    source, target = torch.randn(2, moved // 8, device=device)       # a copy reads one half and writes the other
    works = {"`compose`, Eq. (8)": lambda: al.compose(theta, a, G),
             "`fill`: and into the network": lambda: al.fill_from(genes.pool, net, G),
             "`copy_` into memory in use": lambda: target.copy_(source), "`clone` into new memory": lambda: source.clone()}
    times = {name: s for name, (s, _) in clock(works, repeats, device).items()}
    copy = times["`copy_` into memory in use"]
    for name, seconds in times.items():
        yield name, 1e3 * seconds, moved / 1e9, moved / 1e9 / seconds, seconds / copy


def adaptive(flags, machine):
    first, second = composed_steps(machine, flags.repeats, flags.batch_size, flags.drawn_only)
    how = f"networks in {machine.amp or torch.float32}, medians of {flags.repeats}".replace("torch.", "")
    table(f"Adaptive-Learngene: training step of learngene 10 over a step of a plain ViT of the same shape, AdamW included ({how})",
          ["shape", "plain, ms", "older learngenes summed once, ms", "/ plain", "some sit out: composed anew, ms", "/ plain",
           "at the default --gene-dropout, / plain"], first)
    table(f"Training step of a descendant under Eq. (8) from k learngenes, over a plain ViT's ({how})",
          ["shape", "plain, ms", "k = 1 / plain", "k = 3 / plain", "k = 10 / plain"], second)
    table("Composing DeiT-Base, 12 layers, from 10 learngenes (float32; bytes: 10 blocks read, 12 written)",
          ["work", "ms", "GB", "GB/s", "time / copy_"], composing(machine, flags.repeats))


# ------------------------------------------------------ The program ---------------------------------------------------


def loading(batch_size=32, batches=8):
    """JPEGs of 500 x 375 pixels, as most of ImageNet's are, to batches at 224 px: wall clock, as processes decode."""
    rng, files = np.random.default_rng(0), 2 * batch_size
    with tempfile.TemporaryDirectory() as folder:
        for k in range(files):
            path = Path(folder, "train", "ab"[k % 2], f"{k}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (47, 63, 3), np.uint8)).resize((500, 375), Image.BICUBIC).save(path, quality=90)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.jpg")) / files / 1e6
        for augment in (False, "decathlon", "deit"):
            rates = []
            for workers in (0, 1, 2):
                with contextlib.redirect_stdout(None):
                    task = data.load(folder, image_size=224, memory=0)
                task.workers = workers
                task.batch("train", 0, batch_size, augment=augment)
                start = time.perf_counter()
                for step in range(1, 1 + batches):
                    task.batch("train", step, batch_size, augment=augment)
                rates.append(batches * batch_size / (time.perf_counter() - start))
            yield augment or "no augmentation", *(f"{rate:.0f}" for rate in rates), f"{max(rates) * size:.1f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU [1]")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls per figure [5]")
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument("--amp", default="", help="precisions of the networks: none, bf16, fp16 [none; on cuda bf16,fp16]")
    parser.add_argument("--batch-size", type=int, default=0, help="of the training steps [8 and 64; on cuda 512, the paper's]")
    parser.add_argument("--tables", default="predict,step,drawn,adaptive,load", help="which to print [predict,step,drawn,adaptive,load]")
    parser.add_argument("--drawn-only", action="store_true", help="adaptive: leave DeiT-Tiny and DeiT-Small out")
    parser.add_argument("--archs", type=int, default=12, help="architectures of the drawn table [12]")
    parser.add_argument("--peer", default="", help="measure the released code beside ours (CPU): a folder with checkouts TAL and ppuda, "
                        "and site with what they import: pip install --target site transformers joblib psutil; --no-deps timm")
    flags = parser.parse_args()
    cuda = flags.device.startswith("cuda")
    if cuda and flags.peer:
        parser.error("--peer measures on the CPU only")
    torch.set_num_threads(flags.threads)
    machines = [setup_machine(flags.device, amp) for amp in (flags.amp or ("bf16,fp16" if cuda else "none")).split(",")]
    device, args = machines[0].device, tal.settings(["--preset", "paper"])
    warnings.simplefilter("ignore")
    if not {"predict", "step", "drawn"} & set(flags.tables.split(",")):
        print(f"torch {torch.__version__}, {torch.cuda.get_device_name(device) if cuda else f'CPU, {flags.threads} thread(s)'}")
    else:
        tal_tables(flags, args, machines, device, cuda)
    for machine in machines if "adaptive" in flags.tables else ():
        adaptive(flags, machine)
    if "load" in flags.tables:
        table("Decoding JPEGs of 500 x 375 to 224 px: images/s", ["recipe", "in this process", "1 worker", "2 workers", "MB/s at best"], loading())


def tal_tables(flags, args, machines, device, cuda):
    with contextlib.redirect_stdout(None):
        peer = Peer(flags.peer, args) if flags.peer else None
    hypernet = tal.build_hypernet(args).to(device)
    a, b = torch.randn(2, 2048, 2048, device=device)              # the decoder computes in float32 whatever --amp (TF32 on a GPU)
    rate = 2 * 2048 ** 3 / clock({"product": lambda: a @ b}, 9, device)["product"][0] / 1e9
    counts = [sum(p.numel() for p in net.parameters()) for net in (hypernet, *(peer.stages[1][2:3] if peer else ()))]
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name(device) if cuda else f'CPU, {flags.threads} thread(s)'}, medians of "
          f"{flags.repeats}; a float32 product of 2048 x 2048 runs at {rate:.0f} GFLOP/s. Hypernetwork of --preset paper: "
          + ", released: ".join(f"{n:,}" for n in counts) + " parameters.")
    more = ["peak, GiB"] + ["released, s", "released / ours"] * bool(peer)
    if "predict" in flags.tables:
        table("Predict every parameter, graph given (224 px, patch 16, 1000 classes, a task embedding, no gradients, float32)",
              ["network", "s", "A B, GFLOP", "A B alone, s", "s / A B alone", *more],
              predictions(args, machines[0], hypernet, peer, rate, flags.repeats))
        table("Encode the graph, network given", ["network", "s", *more], encodings(args, machines[0], peer, flags.repeats))
    for machine in machines:
        how = f"networks in {machine.amp or torch.float32}".replace("torch.", "")
        if "step" in flags.tables:
            table(f"Training step of the hypernetwork, AdamW included ({how})",
                  ["network", "s", "student alone, forward + backward", "ancestry alone, forward", "s / alone", "3 A B alone, s",
                   "s / (alone + 3 A B)", *more],
                  steps(args, machine, hypernet, peer, rate, flags.repeats, flags.batch_size or (512 if cuda else 0)))
        if "drawn" in flags.tables:
            table(f"Drawn preset: images/s of whole training steps over {flags.archs} architectures, 32 classes, images given ({how})",
                  ["stage", "with the hypernetwork", "the same networks alone", "ratio", "alone + the ancestry's forward", "ratio"],
                  drawn(machine, flags.repeats, flags.archs))


if __name__ == "__main__":
    main()
