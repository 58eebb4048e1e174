"""adaptive_learngene.py against the paper, in the order of the file: every equation by an oracle of its own, the pool by
damaging it, the selector by enumerating all selections, baselines by hand, runs by stopping them, and bad input by what
is left behind."""
import dataclasses
import io
import itertools
import json
import math
import os
import re
import shutil
import tokenize
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.func import functional_call

import adaptive_learngene as al
import common
import data
from common import ViT, ViTConfig
from conftest import CPU, ROOT, assert_same_run, finish, killed_in, log_of, refuses, snapshot

# Drawn tasks cut short, and networks of two layers with four patches: a whole run takes a second.
SIZES = {"digits": (120, 60, 60), "kinds": (80, 40, 40), "pedestrian": (60, 30, 30), "scenes": (12, 4, 4)}
SMALL = (
    "--size drawn-tiny --ancestry-depth 2 --patch 16 --batch-size 20 --stream digits/3 --ancestry-epochs 1 "
    "--train-epochs 0.5 --select-steps 20 --split val --save-every 1 --scene-size 48 --crop 32 "
    "--device cpu").split()
STREAM = [f"digits/3#{n}" for n in (1, 2, 3)]
CONFIG = al.AncestryConfig("drawn-tiny", 32, 16)


@pytest.fixture(scope="module", autouse=True)
def short_tasks():
    with pytest.MonkeyPatch.context() as patch:
        for name, sizes in SIZES.items():
            patch.setitem(data.SPECS, name, data.SPECS[name]._replace(sizes=sizes))
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One cache of the shortened tasks."""
    folder = tmp_path_factory.mktemp("data")
    data.load_many(list(SIZES), str(folder), 32)
    return folder


def flags(cache, output, *more):
    words = [word for text in more for word in str(text).split()]
    return [*SMALL, "--data-dir", str(cache), "--output", str(output), *words]


@pytest.fixture(scope="module")
def made(cache, tmp_path_factory):
    """A run directory whose pool/ has the three learngenes of --stream; and what the pool was after each."""
    folder, states = tmp_path_factory.mktemp("made"), []
    for name in STREAM:
        al.main(flags(cache, folder, "--data", name))
        states.append(snapshot(folder / "pool"))
    al.main(flags(cache, folder))                            # all three at once: known, passed over
    assert snapshot(folder / "pool") == states[-1]
    return folder, states


@pytest.fixture(scope="module")
def other(cache, tmp_path_factory):
    """The pool of another seed, two learngenes."""
    folder = tmp_path_factory.mktemp("other")
    al.main(flags(cache, folder, "--data", ",".join(STREAM[:2]), "--seed 1"))
    return folder / "pool"


def task_of(cache, name, size=32):
    return data.load(name, str(cache), size)


def records_of(pool):
    return [torch.load(file, weights_only=True) for file in sorted(Path(pool).glob("learngene-*.pt"))]


def copy_of(made, tmp_path, learngenes=3):
    """A run directory with a copy of the first few learngenes and nothing else."""
    (tmp_path / "run" / "pool").mkdir(parents=True)
    for n in range(1, learngenes + 1):
        shutil.copy(made[0] / "pool" / f"learngene-{n:02d}.pt", tmp_path / "run" / "pool")
    return tmp_path / "run"


def run_in(folder):
    return common.Run(folder, {}, CPU)


def small_vit(depth=2, classes=10, pooling="avg", width=32):
    return ViT(ViTConfig(32, 16, width, depth, 4, classes, pooling=pooling))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def hand_vit(records, G, depth=2, classes=None):
    """A ViT composed of the files alone, sum by sum, as float64; Chebyshev polynomials from numpy."""
    net = small_vit(depth, classes or 2).double()
    state = {name: p.double() for name, p in records[len(G) - 1]["stem"].items()}
    for l in range(depth):
        T = np.polynomial.chebyshev.chebvander(l / depth, len(G) - 1).reshape(-1)
        for name in dict(net.blocks[0].named_parameters()):
            total = float(name in ("norm1.weight", "norm2.weight"))
            for n in range(len(G)):
                total = total + G[n] * T[n] * records[n]["gene"][f"0.{name}"].double()
            state[f"blocks.{l}.{name}"] = total
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert set(missing) == {"head.weight", "head.bias"} and not unexpected
    return net.eval()


def write_images(folder, classes, count, seed=0):
    rng = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = torch.from_numpy(rng.integers(0, 256, (3, 40, 36), dtype=np.uint8))
            torchvision.transforms.functional.to_pil_image(pixels).save(folder / name / f"{i}.png")


def noise_task(counts, name="noise", size=8, seed=0):
    """A task with so many training images per class, all of them noise."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    labels = {"train": y, "val": np.array([0, 1]), "test": np.array([0, 1])}
    images = {s: rng.integers(0, 256, (len(l), 3, size, size), dtype=np.uint8) for s, l in labels.items()}
    return data.make_task(name, [f"c{i}" for i in range(len(counts))], images, labels)


def lit_task(classes=3, count=12, name="lit"):
    """Every class has its own brightness: any network tells them apart."""
    rng = np.random.default_rng(0)
    labels = {"train": np.repeat(np.arange(classes), count), "val": np.arange(classes), "test": np.arange(classes)}
    images = {}
    for split, y in labels.items():
        light = 20 + 90 * y[:, None, None, None] + rng.integers(0, 20, (len(y), 3, 32, 32))
        images[split] = light.astype(np.uint8)
    return data.make_task(name, [f"c{i}" for i in range(classes)], images, labels)


# ----------------------------------------------------------------------------------------------------------
# The Structure of the Ancestry Model: a(l, n)
# ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("basis, first, columns", [
    ("chebyshev", 0, np.polynomial.chebyshev.chebvander), ("printed", 1, np.polynomial.chebyshev.chebvander),
    ("legendre", 0, np.polynomial.legendre.legvander), ("monomial", 0, np.polynomial.polynomial.polyvander)])
def test_coefficients_are_numpys_polynomials(basis, first, columns):
    """Degrees n - 1 + first at (l - 1) / L; none exceeds 1, so no layer gets more of a learngene than there is."""
    for L, N in itertools.product((1, 2, 6, 12), (1, 2, 3, 10)):
        theirs = columns(np.arange(L) / L, N)[:, first:][:, :N]
        a = al.coefficients(L, N, basis)
        assert a.shape == (L, N) and a.dtype == torch.float32 and a.abs().max() <= 1
        np.testing.assert_allclose(a.numpy(), theirs, atol=1e-6)


def test_the_worked_example_of_2024():
    """L = 12: a(2, 3) = 2 (1/12) T_2(1/12) - T_1(1/12) = T_3(1/12) as printed; here the same number is a(2, 4)."""
    x = 1 / 12
    T_2 = 2 * x * x - 1
    T_3 = 2 * x * T_2 - x
    assert T_3 == pytest.approx(4 * x ** 3 - 3 * x)
    assert al.coefficients(12, 3, "printed")[1, 2].item() == pytest.approx(T_3, rel=1e-6)
    assert al.coefficients(12, 4)[1, 3].item() == pytest.approx(T_3, rel=1e-6)
    assert al.coefficients(12, 3)[1, 2].item() == pytest.approx(T_2, rel=1e-6)


def test_both_conventions_in_the_first_layer_and_the_first_columns():
    """Learngene 1 is the same in every layer and 1, 2 are TLEG's B + (l - 1) / L A; as printed, layer 1 gets none of 1."""
    assert al.coefficients(6, 2).tolist() == [[1, pytest.approx(l / 6)] for l in range(6)]
    assert al.coefficients(12, 10)[0].tolist() == [1, 0, -1, 0, 1, 0, -1, 0, 1, 0]
    assert al.coefficients(12, 10, "printed")[0].tolist() == [0, -1, 0, 1, 0, -1, 0, 1, 0, -1]


# Eqs. (1), (2), (3), (8)

def loops(theta, a, G):
    """sum_n G_n a(l, n) theta_n, number by number."""
    N, P = theta.shape
    Theta = torch.zeros(len(a), P)
    for l, p, n in itertools.product(range(len(a)), range(P), range(N)):
        Theta[l, p] += float(G[n]) * float(a[l, n]) * float(theta[n, p])
    return Theta


@pytest.mark.parametrize("N, G", [
    (1, None), (2, None), (5, None),                                        # Eqs. (1), (2), (3)
    (5, (1, 0, 1, 1, 0)), (5, (0, 0, 0, 0, 1)), (3, (0, 0, 0))])             # Eq. (8)
def test_eqs_1_2_3_and_8_by_plain_loops(N, G):
    torch.manual_seed(0)
    theta, a = torch.randn(N, 2, 4), al.coefficients(4, N)
    Theta = al.compose(theta, a, None if G is None else torch.tensor(G))
    assert Theta.shape == (4, 2, 4)
    expected = loops(theta.flatten(1), a, G or (1,) * N)
    torch.testing.assert_close(Theta.flatten(1), expected, atol=1e-5, rtol=1e-5)


def test_eq_2_by_hand():
    """Two layers, so x = 0 and 1/2: Theta_1 = theta_1, Theta_2 = theta_1 + theta_2 / 2."""
    theta = torch.tensor([[1., 10.], [4., -2.]])
    assert al.compose(theta, al.coefficients(2, 2)).tolist() == [[1, 10], [3, 9]]
    assert al.compose(theta, al.coefficients(2, 2), torch.tensor([0., 1.])).tolist() == [[0, 0], [2, -1]]


def test_the_gradient_of_a_learngene_is_the_sum_over_layers():
    """d f / d theta_n = G_n sum_l a(l, n) d f / d Theta_l, for a function of Theta whose gradient is known."""
    torch.manual_seed(0)
    theta, a, c = torch.randn(3, 5, requires_grad=True), al.coefficients(4, 3), torch.randn(4, 5)
    G = torch.tensor([1., 0., 1.])
    Theta = al.compose(theta, a, G)
    (c * Theta ** 2).sum().backward()
    for n in range(3):
        expected = sum(G[n] * a[l, n] * 2 * c[l] * Theta[l].detach() for l in range(4))
        torch.testing.assert_close(theta.grad[n], expected, atol=1e-5, rtol=1e-5)


def random_genes(net, count):
    """Learngenes for a network, all numbers at random."""
    shapes = al.learngene_shapes(net)
    return [{name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(count)]


@pytest.mark.parametrize("init", ["zero", "block"])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_every_parameter_of_a_filled_vit_is_the_hand_sum(depth, init):
    """Any depth, learngenes 1 and 3 of three: names, not positions; gains have their 1 but under block. The stem is copied."""
    torch.manual_seed(0)
    genes = random_genes(small_vit(), 3)
    net, donor = small_vit(depth), small_vit()
    nn.init.normal_(donor.fc_norm.weight)
    head = net.head.weight.clone()
    al.fill(net, al.stacked(genes), al.stem_of(donor), (1, 0, 1), dataclasses.replace(CONFIG, init=init))
    for l, block in enumerate(net.blocks):
        x = l / depth
        for name, p in block.named_parameters():
            gain = 1.0 if init != "block" and name in ("norm1.weight", "norm2.weight") else 0.0
            expected = gain + genes[0][f"0.{name}"] + (2 * x * x - 1) * genes[2][f"0.{name}"]
            torch.testing.assert_close(p, expected, atol=1e-5, rtol=1e-5)
    names = "pos_embed patch_embed.proj.weight patch_embed.proj.bias fc_norm.weight fc_norm.bias"
    assert " ".join(al.stem_of(net)) == names and same(al.stem_of(net), al.stem_of(donor))
    assert torch.equal(net.head.weight, head)


def numel(shapes, kind):
    return sum(shape.numel() for name, shape in shapes.items() if name.startswith(f"{kind}."))


def test_layers_of_swin_tiny():
    """Four stages, four kinds of blocks: 2, 2, 6 and 2; W-MSA and SW-MSA share, the index of positions is no parameter."""
    config = al.AncestryConfig("swin_t", 224)
    with torch.device("meta"):
        net, ours = torchvision.models.swin_t(), al.backbone(config, (2, 2, 6, 2), 1000)
    layers, shapes = al.layers_of(net), al.learngene_shapes(net)
    assert [len(layers[f"{kind}.norm1.weight"]) for kind in range(4)] == [2, 2, 6, 2]
    assert [numel(shapes, kind) for kind in range(4)] == [112_347, 445_878, 1_776_492, 7_091_928]
    assert layers["2.norm1.weight"] == [f"features.5.{i}.norm1.weight" for i in range(6)]
    assert "0.attn.relative_position_bias_table" in shapes and "0.attn.relative_position_index" not in shapes
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in net.named_parameters()}
    blocks = sum(count * numel(shapes, kind) for kind, count in enumerate((2, 2, 6, 2)))
    stem = sum(p.numel() for p in al.stem_of(net).values())
    assert stem + blocks + net.head.weight.numel() + 1000 == 28_288_354


def test_layers_of_torchvisions_vit():
    """EncoderBlock holds an MLPBlock: only the outer one is a block."""
    with torch.device("meta"):
        net = torchvision.models.vit_b_16()
    layers = al.layers_of(net)
    assert layers["0.ln_1.weight"] == [f"encoder.layers.encoder_layer_{i}.ln_1.weight" for i in range(12)]
    assert numel(al.learngene_shapes(net), 0) == 7_087_872
    ours = al.layers_of(small_vit(3))
    assert ours["0.mlp.fc1.weight"] == [f"blocks.{l}.mlp.fc1.weight" for l in range(3)]


@pytest.mark.parametrize("depths", [(2, 6), (1, 3)])
def test_a_filled_swin_is_the_hand_sum_within_each_stage(depths):
    """Every stage counts its own layers: x = (l - 1) / L_s."""
    torch.manual_seed(0)
    config = al.AncestryConfig("drawn-swin", 32)
    net = al.backbone(config, depths, 5)
    before = {n: b.clone() for n, b in net.named_buffers()}
    genes = random_genes(net, 2)
    al.fill(net, al.stacked(genes), al.stem_of(net), (1, 1), config)
    for kind, stage in enumerate((net.features[1], net.features[3])):
        assert len(stage) == depths[kind]
        for l, block in enumerate(stage):
            for name, p in block.named_parameters():
                gain = 1.0 if name in ("norm1.weight", "norm2.weight") else 0.0
                first, second = (gene[f"{kind}.{name}"] for gene in genes)
                torch.testing.assert_close(p, gain + first + l / depths[kind] * second, atol=1e-6, rtol=1e-5)
    assert all(torch.equal(b, before[n]) for n, b in net.named_buffers())
    assert net(torch.randn(2, 3, 32, 32)).isfinite().all()


def test_a_module_of_tensors_has_just_their_names():
    tensors = {"0.attn.qkv.weight": torch.ones(3, 2), "0.norm.bias": torch.zeros(2), "1.norm.bias": torch.ones(1), "pos": torch.ones(1)}
    module = al.as_module(tensors)
    assert same(dict(module.named_parameters()), tensors) and same(al.tensors_of(module), tensors)
    module.load_state_dict({name: tensor + 1 for name, tensor in tensors.items()})
    assert al.tensors_of(module)["0.norm.bias"].tolist() == [1, 1]


# ----------------------------------------------------------------------------------------------------------
# Training of Learngenes
# ----------------------------------------------------------------------------------------------------------

def fresh(shapes, init, count):
    """So many new learngenes, one on top of the other."""
    genes = []
    for _ in range(count):
        genes.append(al.new_learngene(shapes, init, genes[-1] if genes else None))
    return genes


@pytest.mark.parametrize("init", al.INITS)
def test_layer_norms_of_fresh_learngenes(init):
    """Gains of 1 for every selection; under block the sum of the coefficients, which swings."""
    theta = al.stacked(fresh(al.learngene_shapes(small_vit()), init, 4))
    T = np.polynomial.chebyshev.chebvander(np.arange(6) / 6, 3)
    for G in ((1, 1, 1, 1), (1, 0, 0, 0), (0, 1, 0, 1), (0, 0, 1, 0)):
        net = al.fill(small_vit(6), theta, {}, G, dataclasses.replace(CONFIG, init=init))
        for l, block in enumerate(net.blocks):
            gain = float(T[l] @ np.array(G)) if init == "block" else 1
            for norm in (block.norm1, block.norm2):
                assert norm.weight.tolist() == pytest.approx([gain] * 32, abs=1e-6) and not norm.bias.any()
            assert not block.attn.qkv.bias.any() and not block.mlp.fc1.bias.any()


def test_gains_are_those_of_layer_norms_whatever_their_names():
    """The blocks of any network: a fresh learngene has gains of 1."""
    net = torchvision.models.VisionTransformer(32, 16, 2, 4, 32, 64, num_classes=5)
    theta = al.stacked([al.new_learngene(al.learngene_shapes(net), "zero")])
    al.fill(net, theta, {}, (1,), CONFIG)
    assert all((module.weight == 1).all() for module in net.modules() if isinstance(module, nn.LayerNorm))


@pytest.mark.parametrize("init, later", [("zero", 0.0), ("random", 0.02), ("previous", 0.02), ("block", 0.02)])
def test_matrices_of_fresh_learngenes(init, later):
    """The first is drawn as any block, whatever `init`; a copy is one of the last, and in memory of its own."""
    torch.manual_seed(0)
    first, second, third = fresh(al.learngene_shapes(small_vit(width=64)), init, 3)
    for gene, std in ((first, 0.02), (second, later), (third, later)):
        for p in gene.values():
            if p.ndim > 1:
                assert p.std().item() == pytest.approx(std, rel=0.05) and abs(p.mean().item()) <= std / 20
    assert same(first, second) == (init == "previous") and first["0.attn.qkv.weight"] is not second["0.attn.qkv.weight"]
    second["0.attn.qkv.weight"].add_(1)
    assert not torch.equal(al.new_learngene(al.learngene_shapes(small_vit(width=64)), "previous", second)["0.attn.qkv.weight"],
                           first["0.attn.qkv.weight"])


def test_gene_masks():
    """All learngenes in part of the steps, each with chance `keep` in the others; of seed and number alone."""
    torch.manual_seed(1)
    masks = al.gene_masks(20000, 5, 0.4, 0, 6, keep=0.3)
    state = torch.get_rng_state()
    assert torch.equal(al.gene_masks(20000, 5, 0.4, 0, 6, keep=0.3), masks) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(al.gene_masks(20000, 5, 0.4, 0, 7, keep=0.3), masks)
    assert not torch.equal(al.gene_masks(20000, 5, 0.4, 1, 6, keep=0.3), masks)
    assert masks.shape == (20000, 5) and set(masks.unique().tolist()) == {0, 1}
    near = lambda value, p: abs(value - p) < 5 * math.sqrt(p * (1 - p) / 20000)
    assert near(masks.all(1).float().mean().item(), 0.6 + 0.4 * 0.3 ** 5)
    assert near((masks.sum(1) == 0).float().mean().item(), 0.4 * 0.7 ** 5)
    assert all(near(column, 0.6 + 0.4 * 0.3) for column in masks.mean(0).tolist())
    counts = torch.bincount(masks.sum(1).int(), minlength=6).tolist()                     # they sit out independently
    assert all(near(counts[k] / 20000, 0.4 * math.comb(5, k) * 0.3 ** k * 0.7 ** (5 - k)) for k in range(1, 5))
    assert al.gene_masks(50, 3, 0, 0, 2).all() and not al.gene_masks(50, 3, 1, 0, 2, keep=0).any()
    assert al.gene_masks(50, 0, 0.4, 0, 1).all(1).all()                                   # the first has no older ones


def test_eq_4_by_hand():
    """Predicted (0.7, 0.2, 0.1) and (0.1, 0.1, 0.8); as classes, as one-hot rows, as probabilities (TLEG's soft labels)."""
    y_hat = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]).log() + torch.tensor([[3.0], [-2.0]])     # constants do not matter
    by_hand = -(math.log(0.7) + math.log(0.1)) / 2
    assert al.loss_ce(torch.tensor([0, 1]), y_hat).item() == pytest.approx(by_hand, rel=1e-6)
    assert al.loss_ce(torch.tensor([[1., 0, 0], [0, 1, 0]]), y_hat).item() == pytest.approx(by_hand, rel=1e-6)
    soft = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]])
    by_hand = -(0.5 * math.log(0.7) + 0.5 * math.log(0.2) + 0.25 * math.log(0.1) + 0.75 * math.log(0.8)) / 2
    assert al.loss_ce(soft, y_hat).item() == pytest.approx(by_hand, rel=1e-6)


def test_eq_4_leaves_out_ignored_pixels():
    """Segmentation: logits (B, C, S, S), masks (B, S, S) with -100 where there is no label; the mean is over labelled pixels."""
    torch.manual_seed(0)
    y_hat, y = torch.randn(2, 3, 2, 2), torch.tensor([[[0, -100], [2, 1]], [[-100, -100], [1, 0]]])
    labelled = [(b, i, j) for b, i, j in itertools.product(range(2), repeat=3) if y[b, i, j] >= 0]
    losses = [-y_hat[b, :, i, j].log_softmax(0)[y[b, i, j]].item() for b, i, j in labelled]
    assert al.loss_ce(y, y_hat).item() == pytest.approx(sum(losses) / 5, rel=1e-5)


@pytest.mark.parametrize("more", ["", "--gene-dropout 0.5 --later-lr 0.5"])
def test_the_training_of_a_learngene_written_out(more, cache, made, tmp_path):
    """Learngene 3 on top of two frozen ones, eight steps: every Theta_l as a sum of three terms, learngene, stem and head
    under plain AdamW, clipping, cosine. With gene-dropout, older learngenes sit out in some steps."""
    folder = copy_of(made, tmp_path, 2)
    task, old = task_of(cache, STREAM[2]), records_of(folder / "pool")
    al.main(flags(cache, folder, "--data", STREAM[2], "--ancestry-epochs 4 --lr 5e-3", more))
    steps, lr = math.ceil(4 * len(task.labels["train"]) / 20), 2.5e-3 if more else 5e-3
    masks = al.gene_masks(steps, 2, 0.5 if more else 0.0, 0, 3)
    assert steps == 8 and 0 < masks.all(1).sum() <= steps and bool(masks.all()) != bool(more)
    torch.manual_seed(3)                                     # seed 0, learngene 3
    net = small_vit(2, 1)
    net.head = nn.Identity()
    gene = {n: torch.zeros(shape, requires_grad=True) for n, shape in al.learngene_shapes(net).items()}
    head = al.new_head(32, 3)
    stem = {n: p.clone().requires_grad_() for n, p in old[1]["stem"].items()}
    trained = [*gene.values(), *stem.values(), *head.parameters()]
    free = [p for p in trained if p.ndim == 1 or p is stem["pos_embed"]]
    matrices = [p for p in trained if all(p is not other for other in free)]
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=0.05), dict(params=free, weight_decay=0.0)], lr=lr)
    for step in range(steps):
        weights = dict(stem)
        for l in range(2):
            a = (1, l / 2, 2 * (l / 2) ** 2 - 1)
            for name, p in gene.items():
                parts = [masks[step, n] * a[n] * old[n]["gene"][name] for n in range(2)]
                weights[f"blocks.{l}.{name[2:]}"] = float("norm" in name and "weight" in name) + parts[0] + parts[1] + a[2] * p
        x, y = task.batch("train", step, 20, 0, "shift")
        y_hat = head(functional_call(net, weights, (task.normalise(x),)))
        loss = -y_hat.log_softmax(1)[range(20), y].sum() / 20
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * common.cosine_lr(step, steps, round(0.05 * steps))
        optimizer.step()
    record = records_of(folder / "pool")[2]
    for part, here in (("gene", gene), ("stem", stem), ("head", dict(head.named_parameters()))):
        assert record[part].keys() == here.keys()
        for name, p in here.items():
            torch.testing.assert_close(record[part][name], p.detach(), atol=5e-5, rtol=1e-3)


def test_only_the_new_learngene_its_head_and_the_stem_are_trained(made):
    """Files of older learngenes, their stems with them, are the same bytes; what trains is in the training's checkpoints."""
    folder, states = made
    for before, after in zip(states, states[1:]):
        assert len(after) == len(before) + 1 and before.items() <= after.items()
    records = records_of(folder / "pool")
    assert [len(r["head"]["bias"]) for r in records] == [4, 3, 3]
    for n in (1, 2, 3):
        trained = torch.load(folder / f"ancestry-{n:02d}.pt", weights_only=True)["model"]
        assert {k.split(".")[0] for k in trained} == {"genes", "head", "stem"}
        assert {k.split(".")[1] for k in trained if k.startswith("genes")} == {str(n)}
    assert [r["number"] for r in records] == [1, 2, 3] and [r["dataset"] for r in records] == STREAM
    assert [r["parent"] for r in records] == ["", records[0]["hash"], records[1]["hash"]]


def test_a_shared_stem_trains_on(cache, made, tmp_path):
    """Every file has a stem of its own, descendants get the last one, and older learngenes theirs."""
    folder = copy_of(made, tmp_path)
    stems = [record["stem"] for record in records_of(folder / "pool")]
    for before, after in zip(stems, stems[1:]):
        assert before.keys() == after.keys() and not any(torch.equal(before[n], after[n]) for n in before)
    pool = al.open_pool(folder / "pool")
    assert same(al.stem_of(pool.descendant(2, [1])), stems[2])
    assert same(al.stem_of(pool.fill(small_vit(), (1,))), stems[0])                        # as it was after learngene 1
    al.main(flags(cache, folder, "--data pedestrian --ancestry-epochs 0"))                 # starts where it was
    assert same(records_of(folder / "pool")[3]["stem"], stems[2])


def test_a_frozen_stem_is_the_first_datasets(cache, tmp_path):
    """--stem frozen: it is in the first file alone, and all networks have it."""
    al.main(flags(cache, tmp_path, "--data", ",".join(STREAM[:2]), "--stem frozen"))
    first, second = records_of(tmp_path / "pool")
    assert first["stem"] and not second["stem"]
    model = torch.load(tmp_path / "ancestry-02.pt", weights_only=True)["model"]
    assert {k.split(".")[0] for k in model} == {"genes", "head"}
    assert same(al.stem_of(al.open_pool(tmp_path / "pool").descendant(2, [2])), first["stem"])


def test_a_new_learngene_starts_as_the_network_was(cache, tmp_path):
    """No training: dataset 2's network is dataset 1's, and yet the new learngene has a gradient."""
    al.main(flags(cache, tmp_path, "--data", ",".join(STREAM[:2]), "--ancestry-epochs 0"))
    pool = al.open_pool(tmp_path / "pool")
    assert not any(p.any() for p in pool.records[1]["gene"].values())
    task = task_of(cache, "kinds")
    x = task.normalise(task.examples("val")[0])
    one, two = (pool.fill(small_vit().eval(), (1,) * n) for n in (1, 2))
    assert torch.equal(one.encode(x), two.encode(x))
    two.head = nn.Identity()
    gene = al.new_learngene(al.learngene_shapes(two), "zero", previous=pool.records[0]["gene"])
    model = al.ComposedNetwork(two, pool.config, 2, {2: gene}, nn.Identity(), pool.theta(1))
    everyone, all_ones = model.weights(), model.weights(torch.ones(1))
    assert all(torch.equal(everyone[name], all_ones[name]) for name in everyone)
    (model(x) * torch.randn(32)).sum().backward()
    gradients = {name: p.grad for name, p in model.genes["2"].named_parameters()}
    assert gradients["0.mlp.fc2.weight"].norm() > 0 and gradients["0.attn.qkv.weight"].norm() > 0


def test_a_learngene_may_start_from_the_one_before(cache, tmp_path):
    """--init previous, no training: learngene 3 is learngene 2, and so on down to the first."""
    al.main(flags(cache, tmp_path, "--init previous --ancestry-epochs 0"))
    first, second, third = records_of(tmp_path / "pool")
    assert same(first["gene"], second["gene"]) and same(first["gene"], third["gene"]) and first["gene"]["0.attn.qkv.weight"].any()


def test_mixed_precision_composes_in_float32(monkeypatch):
    """1 + 1/256 is not a bfloat16 number: under autocast, a gain of it must not become 1."""
    net, used = small_vit(), []
    gene, net.head = al.new_learngene(al.learngene_shapes(net), "zero"), nn.Identity()
    gene["0.norm1.weight"].fill_(1 / 256)
    monkeypatch.setattr(al, "functional_call", lambda net, weights, x: used.append(weights) or functional_call(net, weights, x))
    model = al.ComposedNetwork(net, CONFIG, 1, {1: gene}, nn.Identity())
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 3, 32, 32))
    assert all(p.dtype == torch.float32 for p in used[0].values())
    assert (used[0]["blocks.1.norm1.weight"] == 1 + 1 / 256).all()


def test_mixup_and_cutmix_belong_to_deits_recipe(cache, tmp_path):
    """--recipe deit: one step on a mixed batch with its mixed, smoothed labels, written out."""
    task = task_of(cache, "kinds")
    al.main(flags(cache, tmp_path, "--stage train --data kinds --method scratch --recipe deit --train-images 20 --clip 0 --warmup 0 --seed 3"))
    (file,) = tmp_path.glob("train-*.pt")
    torch.manual_seed(3)
    net = small_vit()
    x, y = task.batch("train", 0, 20, 3, "deit")
    x, y = data.mixed(task.normalise(x), y, 10, 3, 0)
    assert y.shape == (20, 10) and y.max() < 1
    (-(y * net(x).log_softmax(1)).sum() / 20).backward()
    groups = common.parameter_groups(net, 2e-3, 0.05)
    torch.optim.AdamW(groups, lr=2e-3, fused=True).step()
    for name, p in torch.load(file, weights_only=True)["model"].items():
        torch.testing.assert_close(p, net.state_dict()[name], atol=1e-6, rtol=1e-5)


def test_batches_follow_the_seed(cache, tmp_path, monkeypatch):
    """Every batch of a training is that of its seed, so that three seeds are three runs."""
    asked, batch = [], data.Task.batch
    monkeypatch.setattr(data.Task, "batch", lambda self, *how: asked.append(how[:4]) or batch(self, *how))
    for seed in (0, 5):
        al.main(flags(cache, tmp_path / str(seed), f"--stage train --data kinds --method scratch --seed {seed}"))
    assert asked == [("train", step, 20, seed) for seed in (0, 5) for step in (0, 1)]


# ----------------------------------------------------------------------------------------------------------
# The pool on disk
# ----------------------------------------------------------------------------------------------------------

def test_files_say_what_they_are(cache, made):
    record = records_of(made[0] / "pool")[1]
    assert record["class_names"] == [data.SPECS["digits"].class_names[k] for k in data.class_subsets(10, 3)[1]]
    assert record["counts"] == {"train": 36, "val": 18, "test": 18} and record["depths"] == [2] and record["seed"] == 0
    assert record["content"] == task_of(cache, STREAM[1]).fingerprint
    assert record["config"] == {
        "size": "drawn-tiny", "image_size": 32, "patch": 16, "pooling": "avg", "basis": "chebyshev", "init": "zero",
        "stem": "shared"}


def test_logits_of_earlier_datasets_are_bit_identical(cache, made):
    """Read again from disk after all three datasets: the hash that was written when each was learned. The same network by
    plain sums has these logits and the recorded accuracy; and one more learngene would change them."""
    pool = al.open_pool(made[0] / "pool")
    for n, record in enumerate(pool.records, 1):
        task = task_of(cache, record["dataset"])
        logits = pool.logits(n, task)
        assert al.sha256(logits) == record["logits"]
        net = hand_vit(pool.records, (1,) * n, classes=task.num_classes)
        net.head.load_state_dict(record["head"])
        x, y = task.examples("val")
        with torch.no_grad():
            by_hand = net(task.normalise(x).double()).float()
        torch.testing.assert_close(logits, by_hand, atol=1e-4, rtol=1e-4)
        assert record["val"] == pytest.approx(100 * (logits.argmax(1) == y).sum().item() / len(y))
        if n < 3:
            more = pool.fill(small_vit(2, task.num_classes).eval(), (1,) * 3)
            more.head.load_state_dict(record["head"])
            assert al.sha256(al.in_parts(more, task, x)) != record["logits"]
    said = [(r["learngene"], r["kept"], r["earlier"]) for r in log_of(made[0], "pool")]
    assert said == [(1, 0, 0), (2, 0, 0), (3, 0, 0)]         # each run had one dataset at hand


def test_a_run_over_all_datasets_reports_what_was_kept(cache, made, tmp_path, capsys):
    """Ten datasets in one run, or one run after another: the same pool. Earlier logits are counted, all are kept."""
    al.main(flags(cache, tmp_path))
    assert [r["hash"] for r in records_of(tmp_path / "pool")] == [r["hash"] for r in records_of(made[0] / "pool")]
    assert [(r["kept"], r["earlier"]) for r in log_of(tmp_path, "pool")] == [(0, 0), (1, 1), (2, 2)]
    (alone,) = log_of(tmp_path, "alone")
    assert alone["datasets"] == STREAM and np.array(alone["table"]).shape == (4, 3)       # and of no learngene
    said = capsys.readouterr().out
    assert "logits of 2 of 2 earlier datasets" in said and "0 of" not in said


def rewrite(file, change):
    """Loads, changes and saves a learngene's file as somebody with torch would."""
    record = torch.load(file, weights_only=True)
    change(record)
    torch.save(record, file)


def bump(part, name):
    def change(record):
        record[part][name].view(-1)[3] += 1e-6
    return change


def lacking(part, name):
    """Without one tensor, and with a hash that fits."""
    def change(record):
        del record[part][name]
        record["hash"] = al.content_hash(record)
    return change


def changed(number, change):
    return lambda pool, _: rewrite(pool / f"learngene-{number:02d}.pt", change)


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "one number of a learngene": (changed(2, bump("gene", "0.mlp.fc1.weight")), "learngene-02.pt was changed"),
    "one number of the stem": (changed(1, bump("stem", "pos_embed")), "learngene-01.pt was changed"),
    "one number of a head": (changed(3, bump("head", "weight")), "learngene-03.pt was changed"),
    "its accuracy": (changed(3, lambda r: r.update(val=99.0)), "learngene-03.pt was changed"),
    "its config": (changed(1, lambda r: r["config"].update(basis="printed")), "learngene-01.pt was changed"),
    "its hash": (changed(1, lambda r: r.update(hash="0" * 64)), "learngene-01.pt was changed"),
    "no hash": (changed(1, lambda r: r.pop("hash")), "learngene-01.pt has no hash"),
    "a list for a name": (changed(2, lambda r: r.update(dataset=["x"])), "learngene-02.pt has no dataset"),
    "a learngene without a tensor": (changed(2, lacking("gene", "0.mlp.fc1.weight")), "learngene-02.pt: its gene has no 0.mlp.fc1.weight"),
    "a stem without a tensor": (changed(1, lacking("stem", "pos_embed")), "learngene-01.pt: its stem has no pos_embed"),
    "a head without a tensor": (changed(3, lacking("head", "bias")), "learngene-03.pt: its head has no bias"),
    "a file of another pool in place 2": (lambda pool, other: shutil.copy(other / "learngene-02.pt", pool), "another lineage"),
    "a file of another pool in place 1": (lambda pool, other: shutil.copy(other / "learngene-01.pt", pool), "another lineage"),
    "another place": (lambda pool, _: shutil.copy(pool / "learngene-01.pt", pool / "learngene-04.pt"), "another lineage"),
    "a hole": (lambda pool, _: (pool / "learngene-02.pt").unlink(), "learngene-03.pt where learngene-02.pt should be"),
    "no first": (lambda pool, _: (pool / "learngene-01.pt").unlink(), "learngene-02.pt where learngene-01.pt should be"),
    "half a file": (lambda pool, _: cut(pool / "learngene-03.pt", 5000), "learngene-03.pt is not a readable checkpoint"),
    "an empty file": (lambda pool, _: cut(pool / "learngene-01.pt", 0), "learngene-01.pt is not a readable checkpoint"),
    "a flipped bit": (lambda pool, _: flip(pool / "learngene-02.pt", 30000), "learngene-02.pt is not a readable checkpoint"),
    "a checkpoint of a training": (lambda pool, _: shutil.copy(pool.parent / "ancestry-02.pt", pool / "learngene-04.pt"),
                                   "learngene-04.pt"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_pool_is_refused_and_left_alone(damage, cache, made, other, tmp_path):
    """For reading, for learning on, and from Python: one sentence that names the file, and no byte changes."""
    folder = copy_of(made, tmp_path)
    shutil.copy(made[0] / "ancestry-02.pt", folder)
    act, words = DAMAGES[damage]
    act(folder / "pool", other)
    before = snapshot(tmp_path)
    for more in ("--stage select --data kinds", "--data pedestrian"):
        with refuses(words):
            al.main(flags(cache, folder, more))
    with refuses(words):
        al.open_pool(folder / "pool")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("more, words", [
    ("--size drawn-small", "size drawn-tiny, asked for drawn-small"), ("--patch 8", "patch 16, asked for 8"),
    ("--image-size 48", "image_size 32, asked for 48"), ("--pooling token", "pooling avg, asked for token"),
    ("--basis printed", "basis chebyshev, asked for printed"), ("--init block", "init zero, asked for block"),
    ("--stem frozen", "stem shared, asked for frozen"), ("--size drawn-swin", "size drawn-tiny, asked for drawn-swin")])
def test_a_pool_of_another_kind_is_refused(more, words, cache, made):
    before = snapshot(made[0])
    with refuses(words):
        al.main(flags(cache, made[0], more, "--data pedestrian"))
    assert snapshot(made[0]) == before


@pytest.mark.parametrize("where", ["link", "save"])
def test_a_crash_while_sealing_leaves_the_old_pool(where, cache, made, tmp_path, monkeypatch):
    """The disk fails in the middle of learngene-02.pt, or just before it gets its name. Started again, the run ends with
    the very learngene that an undisturbed one has."""
    folder = copy_of(made, tmp_path, 1)
    before = snapshot(folder / "pool")
    real = {"link": os.link, "save": torch.save}[where]

    def failing(*arguments):
        target = Path(arguments[-1])
        if target.parent.name == "pool":
            if where == "save":
                target.write_bytes(b"half")
            raise OSError("no space left on device")
        return real(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(*((os, "link") if where == "link" else (torch, "save")), failing)
        with refuses("learngene-02.pt cannot be written"):
            al.main(flags(cache, folder, "--data", STREAM[1]))
    assert snapshot(folder / "pool") == before and len(al.open_pool(folder / "pool")) == 1
    al.main(flags(cache, folder, "--data", STREAM[1]))
    assert records_of(folder / "pool")[1]["hash"] == records_of(made[0] / "pool")[1]["hash"]


def test_two_runs_on_one_pool(cache, made, tmp_path, monkeypatch):
    """While one run trains its learngene 2, another writes its own: the loser says so, and nothing of either is lost.
    Started again, it learns its dataset as learngene 3."""
    folder = copy_of(made, tmp_path, 1)
    pool = f"--pool {folder / 'pool'}"
    save = common.save_checkpoint

    def late(path, *more, **content):
        if path.name == "learngene-02.pt" and content["dataset"] == STREAM[1]:
            with monkeypatch.context() as patch:
                patch.setattr(common, "save_checkpoint", save)
                al.main(flags(cache, tmp_path / "first", pool, "--data pedestrian"))
        save(path, *more, **content)
    with monkeypatch.context() as patch:
        patch.setattr(common, "save_checkpoint", late)
        with refuses("another run has written .*learngene-02.pt meanwhile.*again"):
            al.main(flags(cache, tmp_path / "second", pool, "--data", STREAM[1]))
    assert [r["dataset"] for r in records_of(folder / "pool")] == [STREAM[0], "pedestrian"]
    assert (tmp_path / "second" / "ancestry-02.pt").exists()
    al.main(flags(cache, tmp_path / "second", pool, "--data", STREAM[1]))
    assert [r["dataset"] for r in records_of(folder / "pool")] == [STREAM[0], "pedestrian", STREAM[1]]


def test_a_half_trained_learngene_of_another_pool_is_refused(cache, made, other, tmp_path):
    """The checkpoint of learngene 2, beside a pool whose learngene 1 is not the one it was trained on."""
    (tmp_path / "pool").mkdir()
    shutil.copy(other / "learngene-01.pt", tmp_path / "pool")
    shutil.copy(made[0] / "ancestry-02.pt", tmp_path)
    before = snapshot(tmp_path)
    with refuses("ancestry-02.pt holds parent"):
        al.main(flags(cache, tmp_path, "--data", STREAM[1]))
    assert snapshot(tmp_path) == before


def test_a_folder_of_images_is_one_more_learngene(cache, made, tmp_path, capsys):
    """Appended at the end, older files untouched. The same folder is passed over, under any name and in any place; with a
    class more, an image more, or other images it is refused."""
    folder, images = copy_of(made, tmp_path, 2), tmp_path / "mine"
    write_images(images, ("ant", "bee", "cow"), 5)
    before = snapshot(folder / "pool")
    al.main(flags(cache, folder, "--data", images))
    after = snapshot(folder / "pool")
    assert before.items() < after.items() and len(after) == 3
    record = records_of(folder / "pool")[2]
    assert (record["dataset"], record["class_names"], record["counts"]["train"]) == (str(images), ["ant", "bee", "cow"], 12)
    shutil.copytree(images, tmp_path / "copy")
    for name in (f"{images}/", f"{images.parent}/./mine", tmp_path / "copy"):
        al.main(flags(cache, folder, "--data", name))
        assert snapshot(folder / "pool") == after
    write_images(images, ("dog",), 5)
    with refuses("from 12 training images to 16 or.*another name"):
        al.main(flags(cache, folder, "--data", images))
    shutil.rmtree(images / "dog")
    write_images(images, ("cow",), 10)
    with refuses("from 12 training images to 16 or.*another name"):
        al.main(flags(cache, folder, "--data", images))
    shutil.rmtree(images)
    write_images(images, ("ant", "bee", "cow"), 5, seed=1)
    with refuses("mine has changed .* learngene 3.*another name"):
        al.main(flags(cache, folder, "--data", images))
    assert snapshot(folder / "pool") == after


def test_theta_has_a_row_per_learngene(made):
    records = records_of(made[0] / "pool")
    for count in (1, 2, 3):
        theta = al.open_pool(made[0] / "pool").theta(count)
        assert theta.keys() == records[0]["gene"].keys()
        assert all(torch.equal(theta[name][n], records[n]["gene"][name]) for name in theta for n in range(count))


def test_a_pool_of_more_than_a_hundred(made, tmp_path):
    """Files are read in the order of their numbers: 99, 100, 101."""
    record, parent = records_of(made[0] / "pool")[0], ""
    for n in range(1, 102):
        record.update(number=n, parent=parent)
        parent = record["hash"] = al.content_hash(record)
        common.save_checkpoint(tmp_path / f"learngene-{n:02d}.pt", **record)
    assert len(al.open_pool(tmp_path)) == 101


def test_a_pool_in_the_run_directory_itself(cache, tmp_path, monkeypatch):
    """The training's checkpoints beside it do not matter, also when it is stopped between the two."""
    argv = flags(cache, tmp_path / "run", "--pool", tmp_path / "run", "--data", STREAM[0])
    with monkeypatch.context() as patch:
        patch.setattr(al.Pool, "logits", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            al.main(argv)
    al.main(argv)
    assert len(al.open_pool(tmp_path / "run")) == 1


# ----------------------------------------------------------------------------------------------------------
# Learngene Selection: Eqs. (5), (6), (7)
# ----------------------------------------------------------------------------------------------------------

def test_eq_5_by_hand():
    """p = 0.5, 0.8, 0.1: (0.25 ln 0.5 + 0.04 ln 0.8 + 0.81 ln 0.1) / 3 - 0.01 x 2 = -0.7024."""
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.1, 0.2, 0.7]]).log()
    y, G = torch.tensor([0, 1, 0]), torch.tensor([1., 0., 1.])
    by_hand = (0.25 * math.log(0.5) + 0.04 * math.log(0.8) + 0.81 * math.log(0.1)) / 3 - 0.01 * 2
    assert by_hand == pytest.approx(-0.7024, abs=1e-4)
    assert al.reward(logits, y, G).item() == pytest.approx(by_hand, rel=1e-5)
    plain = (math.log(0.5) + math.log(0.8) + math.log(0.1)) / 3
    assert al.reward(logits, y, G, gamma=0, lam=0).item() == pytest.approx(plain, rel=1e-5)


def test_eq_5_is_minus_torchvisions_focal_loss():
    """Two classes with logits (0, z): the softmax of class 1 is a sigmoid, and Eq. (5) without penalty minus the focal loss."""
    torch.manual_seed(0)
    z, y = torch.randn(50) * 3, torch.randint(2, (50,))
    for gamma in (1.0, 2.0, 3.5):
        focal = torchvision.ops.sigmoid_focal_loss(z, y.float(), alpha=-1, gamma=gamma, reduction="mean")
        ours = al.reward(torch.stack([torch.zeros(50), z], 1), y, torch.zeros(3), gamma)
        assert ours.item() == pytest.approx(-focal.item(), rel=1e-5)


def test_eq_5_stays_finite_and_never_positive():
    """Confidently right: 0; confidently wrong: the plain log, however far; every learngene costs lambda."""
    sure = torch.tensor([[1e4, 0.0]])
    assert al.reward(sure, torch.tensor([0]), torch.zeros(4)).item() == 0
    assert al.reward(sure, torch.tensor([1]), torch.zeros(4)).item() == pytest.approx(-1e4)
    assert al.reward(sure, torch.tensor([0]), torch.ones(4), lam=0.3).item() == pytest.approx(-1.2)
    z = torch.linspace(-20, 20, 401)
    values = [al.reward(torch.tensor([[v, 0.0]]), torch.tensor([0]), torch.zeros(1)).item() for v in z.tolist()]
    assert all(a <= b <= 0 for a, b in zip(values, values[1:]))


def every_selection(N):
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=N)), dtype=torch.float64)


def plain_pi(phi, G):
    """pi_phi(G) as a product of sigmoids, one factor at a time."""
    return math.prod(1 / (1 + math.exp(-f)) if g else 1 - 1 / (1 + math.exp(-f)) for f, g in zip(phi, G))


def test_log_policy_is_the_product_of_sigmoids():
    phi, G = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64), every_selection(3)
    probabilities = al.log_policy(phi, G).exp().tolist()
    assert probabilities == [pytest.approx(plain_pi(phi.tolist(), g)) for g in G.tolist()]
    assert sum(probabilities) == pytest.approx(1)
    entropy = -sum(p * math.log(p) for p in probabilities)                                 # of all eight selections
    assert al.entropy_of(phi).item() == pytest.approx(entropy)
    assert al.entropy_of(torch.tensor([800.0, -800.0])).item() == 0


def test_eqs_6_and_7_exactly_by_all_selections():
    """With 3 learngenes there are 8 selections: sum_G pi(G) times policy_loss's gradient is minus the gradient of
    J = sum_G pi(G) r(G), here by central differences in plain Python; whatever the baseline b."""
    phi, r = [0.4, -0.7, 1.1], [0.0, -1.0, 0.5, 2.0, -0.3, 0.8, -2.0, 0.1]
    G = every_selection(3)
    J = lambda phi: sum(plain_pi(phi, g) * reward for g, reward in zip(G.tolist(), r))
    exact = []
    for n in range(3):
        more, less = ([f + h * (i == n) for i, f in enumerate(phi)] for h in (1e-5, -1e-5))
        exact.append((J(more) - J(less)) / 2e-5)
    r = torch.tensor(r, dtype=torch.float64)
    for b in (0.0, -3.0, 17.5, J(phi)):
        gradient = torch.zeros(3, dtype=torch.float64)
        for g, reward in zip(G, r):
            leaf = torch.tensor(phi, dtype=torch.float64, requires_grad=True)
            al.policy_loss(al.log_policy(leaf, g[None]), reward[None], b).backward()
            gradient -= plain_pi(phi, g.tolist()) * leaf.grad
        assert gradient.tolist() == pytest.approx(exact, abs=1e-8)
    drawn = [0, 3, 3, 7]                                     # Eq. (6): the mean over a sample
    assert al.expected_reward(r[drawn]).item() == pytest.approx((0.0 + 2.0 + 2.0 + 0.1) / 4)


@pytest.mark.parametrize("k", [0, 2])
def test_eq_7_on_average_over_samples(k):
    """20,000 sampled selections: their mean gradient is the exact one, up to noise."""
    N, phi = 4, torch.tensor([1.5, 0.6, 1.2, 2.0], dtype=torch.float64)               # the empty selection weighs 0.2 %
    G = every_selection(N)
    G = G[G.sum(1) == k] if k else G[1:]
    single = torch.tensor([1.0, -2.0, 0.5, 0.3], dtype=torch.float64)
    value = lambda G: G @ single + 2 * G[:, 0] * G[:, 1]
    leaf = phi.clone().requires_grad_()
    (al.log_policy(leaf, G, k).softmax(0) * value(G)).sum().backward()                   # normalised over what can be drawn
    drawn = al.sample_policy(phi, 20000, k, data.generator(0)).double()
    sampled = phi.clone().requires_grad_()
    al.policy_loss(al.log_policy(sampled, drawn, k), value(drawn), b=0.7).backward()
    assert (-sampled.grad).tolist() == pytest.approx(leaf.grad.tolist(), abs=0.04)
    halved = phi.clone().requires_grad_()
    al.policy_loss(al.log_policy(halved, drawn, k), value(drawn), b=0.7, scale=2.0).backward()
    torch.testing.assert_close(halved.grad, sampled.grad / 2)


@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_log_policy_of_a_given_size_by_brute_force(k):
    """pi(G | |G| = k): products of sigmoids of all subsets of that size, divided by their sum; shifts of phi change nothing."""
    phi = [0.3, -1.2, 2.0, 0.0, 5.5]
    subsets = [[float(i in chosen) for i in range(5)] for chosen in itertools.combinations(range(5), k)]
    plain = [plain_pi(phi, g) for g in subsets]
    for shift in (0.0, 300.0, -40.0):
        moved = torch.tensor(phi, dtype=torch.float64) + shift
        ours = al.log_policy(moved, torch.tensor(subsets, dtype=torch.float64), k).exp()
        assert ours.tolist() == pytest.approx([p / sum(plain) for p in plain], rel=1e-6)
        assert ours.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("k", [0, 1, 3, 4])
def test_frequencies_of_sampled_selections(k):
    """Within 5 standard deviations for every subset; never the empty one, whose share goes to the most likely learngene."""
    phi, n = [0.5, -1.0, 1.5, -2.0], 20000
    subsets = [g for g in itertools.product((0, 1), repeat=4) if sum(g) == k or not k]
    weights = {g: plain_pi(phi, g) for g in subsets}
    if not k:
        weights[0, 0, 1, 0] += weights.pop((0, 0, 0, 0))
    total = sum(weights.values())
    drawn = al.sample_policy(torch.tensor(phi, dtype=torch.float64), n, k, data.generator(3))
    seen = Counter(map(tuple, drawn.int().tolist()))
    assert set(seen) <= set(weights)
    for g, w in weights.items():
        p = w / total
        assert abs(seen[g] - n * p) <= 5 * math.sqrt(n * p * (1 - p)), g


def test_sampling_survives_a_certain_policy():
    """phi of +-60: no selection of 3 is likely by itself, and the empty one is all there is."""
    phi = torch.tensor([60.0, -60.0, -60.0, -60.0], dtype=torch.float64)
    G = al.sample_policy(phi, 50, 3, data.generator(0))
    assert G.shape == (50, 4) and G.sum(1).tolist() == [3] * 50 and G[:, 0].all()
    nothing = al.sample_policy(torch.tensor([-50.0, -40.0, -60.0]), 5, 0, data.generator(0))
    assert nothing.tolist() == [[0, 1, 0]] * 5


# The search, on a synthetic reward

def landscape(seed, N=10):
    """A reward with pairs that help or hurt each other and a price per learngene: {subset: reward}."""
    rng = np.random.default_rng(seed)
    single, pair = rng.normal(0, 0.15, N), np.triu(rng.normal(0, 0.08, (N, N)), 1)
    return lambda G: float(np.array(G) @ single + np.array(G) @ pair @ np.array(G) - 0.01 * sum(G))


def rewards_of(value, N=10, path=None):
    calls = []

    def score(G):
        assert G.dtype == torch.float32 and G.shape == (N,)
        calls.append(tuple(G.int().tolist()))
        return value(G.tolist()), 50.0
    return al.Rewards(score, N, path), calls


@pytest.mark.parametrize("genes", [0, 4])
def test_reinforce_finds_what_exhaustive_finds(genes):
    """Five landscapes of 1,023 (or 210) subsets, default steps and samples: within 0.02 of the best, 4 times or more."""
    gaps, visited = [], []
    for seed in range(5):
        value = landscape(seed)
        subsets = [G for G in itertools.product((0, 1), repeat=10) if (sum(G) == genes if genes else any(G))]
        best = max(value(G) for G in subsets)
        everything, _ = rewards_of(value)
        al.exhaustive(everything, genes)
        assert set(everything.seen) == set(subsets)
        assert everything.seen[everything.best(genes)][0] == pytest.approx(best)
        rewards, calls = rewards_of(value)
        pi = al.reinforce(rewards, genes, 200, data.generator(seed))
        assert pi.shape == (10,) and ((0 <= pi) & (pi <= 1)).all()
        assert all(sum(G) == genes if genes else any(G) for G in calls)
        gaps.append(best - rewards.seen[rewards.best(genes)][0])
        visited.append(len(calls))
    assert all(gap > -1e-9 for gap in gaps) and sum(gap <= 0.02 for gap in gaps) >= 4, gaps
    assert genes or max(visited) < 1023 * 0.8                # not by looking at everything


def test_reinforce_moves_its_baseline_after_use(monkeypatch):
    """b: first the mean of the first rewards, then 0.9 b + 0.1 mean(r), each used one step later (Eq. (7))."""
    used, seen, loss = [], [], al.policy_loss

    def spy(log_pi, r, b, scale=1.0):
        used.append(float(b))
        seen.append(float(r.mean()))
        return loss(log_pi, r, b, scale)
    monkeypatch.setattr(al, "policy_loss", spy)
    al.reinforce(rewards_of(landscape(0))[0], 0, 6, data.generator(0))
    b = seen[0]
    for step in range(6):
        assert used[step] == pytest.approx(b)
        b = 0.9 * b + 0.1 * seen[step]


def test_the_policy_learns_to_be_sure():
    """One learngene decides everything: its probability goes up, the others', who cost 0.3 each, go down."""
    rewards, _ = rewards_of(lambda G: 2 * G[3] - 0.3 * sum(G), 6)
    pi = al.reinforce(rewards, 0, 200, data.generator(0))
    assert pi[3] > 0.95 and all(pi[n] < 0.2 for n in range(6) if n != 3)
    assert rewards.best() == (0, 0, 0, 1, 0, 0)


def test_entropy_keeps_the_policy_unsure():
    """The same reward under a large weight of the entropy: the policy stays where it starts, at one half."""
    rewards, _ = rewards_of(lambda G: 2 * G[3] - 0.3 * sum(G), 6)
    pi = al.reinforce(rewards, 0, 60, data.generator(0), entropy=100.0)
    assert ((pi - 0.5).abs() < 0.1).all()


def test_rewards_are_computed_once():
    value = lambda G: G[0] + 0.1 * G[1] - 0.25 * G[2]
    rewards, calls = rewards_of(value, 3)
    rows = torch.tensor([[1., 0, 1], [0, 1, 0], [1, 0, 1], [0, 1, 0]])
    assert rewards(rows).tolist() == pytest.approx([0.75, 0.1, 0.75, 0.1])
    assert rewards(rows[:1]).tolist() == pytest.approx([0.75])
    assert calls == [(1, 0, 1), (0, 1, 0)] and rewards(rows).dtype == torch.float64
    rewards(torch.tensor([[1., 1, 1]]))
    assert rewards.best() == (1, 1, 1) and rewards.best(1) == (0, 1, 0) and rewards.best(2) == (1, 0, 1)


def test_rewards_survive_a_restart(tmp_path):
    """What a killed search had computed is read, but for torn lines, wherever these are; and only what was asked is seen."""
    path = tmp_path / "rewards.jsonl"
    rewards, _ = rewards_of(lambda G: G[0] - 0.25 * G[2], 3, path)
    rewards(torch.tensor([[1., 0, 1], [0, 1, 0], [1, 1, 1]]))
    text = path.read_text()
    path.write_text("[0, 1" + "\n" + text[:-7])
    again, calls = rewards_of(lambda G: G[0] - 0.25 * G[2], 3, path)
    rows = torch.tensor([[1., 0, 1], [0, 1, 0]])
    assert again(rows).tolist() == [0.75, 0] and not calls and set(again.seen) == {(1, 0, 1), (0, 1, 0)}
    assert again(torch.ones(1, 3)).tolist() == [0.75] and calls == [(1, 1, 1)]
    third, calls = rewards_of(lambda G: 0, 3, path)
    assert third(torch.ones(1, 3)).tolist() == [0.75] and not calls


def test_among_equals_the_first():
    rewards, _ = rewards_of(lambda G: 1.0, 3)
    rewards(torch.tensor([[1., 1, 0], [0, 1, 0], [1, 0, 0]]))
    assert rewards.best() == (0, 1, 0)


# What stands in for p_y(x), and the reward set

def features(B=24, D=6, C=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(B) % C
    f = torch.randn(B, D, generator=generator) + torch.eye(C, D)[y] * 1.5 + 3
    return f, y[torch.randperm(B, generator=generator)]


def test_class_means_leave_the_image_itself_out():
    """For every image the class means are computed anew without it, one cosine at a time; the centre is that of all images."""
    f, y = features()
    centred = (f - f.mean(0)).double()
    unit = [v / v.norm() for v in centred]
    logits = al.class_mean_logits(f, y, 4)
    for i, c in itertools.product(range(len(f)), range(4)):
        mean = sum(unit[j] for j in range(len(f)) if y[j] == c and j != i)
        assert logits[i, c].item() == pytest.approx(10 * float(unit[i] @ mean / mean.norm()), abs=1e-4), (i, c)


def test_class_means_with_two_images_per_class_and_an_absent_class():
    """Images at (1, 0), (0, -1) and (0, 1), (-1, 0): each is compared to the other of its class, not to itself."""
    f, y = torch.tensor([[1., 0.], [0., 1.], [-1., 0.], [0., -1.]]), torch.tensor([0, 1, 1, 0])
    logits = al.class_mean_logits(f, y, 3)
    # image 0 beside (0, -1) of its own class, the sum (-1, 1) of class 1, and nothing of class 2
    assert logits[0].tolist() == pytest.approx([0, -10 / 2 ** 0.5, 0], abs=1e-5)
    assert al.class_mean_logits(f, y, 3, temperature=1.0)[1].tolist() == pytest.approx([-1 / 2 ** 0.5, 0, 0], abs=1e-5)
    f = torch.tensor([[2., 1.], [2., -1.], [-2., 1.], [-2., -1.]])
    logits = al.class_mean_logits(f, torch.tensor([0, 0, 1, 1]), 2)
    own, away = 10 * (4 - 1) / 5, -10 * 2 / 5 ** 0.5
    assert logits.tolist() == [pytest.approx([own, away], rel=1e-5)] * 2 + [pytest.approx([away, own], rel=1e-5)] * 2


def test_class_means_of_pure_noise_are_at_chance():
    """Without leaving the image out, 40 images of 64 noise features and 20 classes would look learnable."""
    generator, hits = torch.Generator().manual_seed(0), 0
    for _ in range(50):
        f, y = torch.randn(40, 64, generator=generator), torch.arange(40) % 20
        hits += (al.class_mean_logits(f, y, 20).argmax(1) == y).sum().item()
        means = torch.stack([f[y == c].mean(0) for c in range(20)])
        assert ((f @ means.T).argmax(1) == y).float().mean() > 0.5
    assert hits / 2000 < 0.08                                # chance 0.05, minus what leaving out costs


def test_ridge_is_refitted_without_each_image():
    """Brute force: features and targets centred with all images, the ridge fixed from all; one solve per image left out."""
    f, y = features()
    X, Y = (f - f.mean(0)).double(), F.one_hot(y, 4).double()
    Y = Y - Y.mean(0)
    ridge = 0.1 * float(torch.linalg.eigvalsh(X.T @ X).mean())
    logits = al.ridge_logits(f, y, 4)
    for i in range(len(f)):
        rest = [j for j in range(len(f)) if j != i]
        W = np.linalg.solve((X[rest].T @ X[rest] + ridge * torch.eye(6)).numpy(), (X[rest].T @ Y[rest]).numpy())
        assert logits[i].tolist() == pytest.approx((10 * X[i].numpy() @ W).tolist(), abs=1e-4)


def test_reward_rows():
    """A tenth of every class, at least two images; of the seed alone; in the order of the task."""
    task = noise_task([100, 30, 9, 2])
    rows = al.reward_rows(task, 0.1, seed=5)
    assert torch.bincount(task.labels["train"][rows]).tolist() == [10, 3, 2, 2]
    assert rows.tolist() == sorted(set(rows.tolist()))
    torch.manual_seed(99)
    assert torch.equal(al.reward_rows(task, 0.1, seed=5), rows) and not torch.equal(al.reward_rows(task, 0.1, seed=6), rows)
    assert al.reward_rows(task, 1.0, seed=5).tolist() == list(range(141)) and len(al.reward_rows(task, 0.0, seed=5)) == 8
    with refuses("'c1' of noise has 1 training image"):
        al.reward_rows(noise_task([5, 1, 4]), 0.1, 0)


def test_patch_labels_by_hand():
    """Four patches of 2 x 2: three of class 1; half labelled, all 2; one labelled of four: ignored; a tie, which the lower
    class wins. As one patch: 3, 4 and 4 pixels of the classes, 11 of 16 labelled."""
    masks = torch.tensor([[[1, 1, 255, 2],
                           [1, 0, 255, 2],
                           [255, 255, 0, 2],
                           [255, 1, 2, 0]]], dtype=torch.uint8)
    assert al.patch_labels(masks, 2, 3).tolist() == [[1, 2, data.IGNORED, 0]]
    assert al.patch_labels(masks, 4, 3).tolist() == [[1]]


def test_rewards_of_a_task_from_the_files_alone(cache, made):
    """Three subsets at depth 3: a float64 network of plain sums, its features, class means, Eq. (5) image by image."""
    task, records = task_of(cache, "kinds"), records_of(made[0] / "pool")
    logits, y = al.image_logits(al.open_pool(made[0] / "pool"), task, [3], al.TALS(reward_share=0.3, seed=4))
    rows = al.reward_rows(task, 0.3, 4)
    assert torch.equal(y, task.labels["train"][rows])
    for G in ((1, 0, 0), (0, 1, 1), (1, 1, 1)):
        with torch.no_grad():
            x = task.normalise(task.images["train"][rows])
            f = hand_vit(records, G, depth=3).encode(x.double())
        p = al.class_mean_logits(f.float(), y, 10).double().softmax(1)[range(len(y)), y].tolist()
        by_hand = sum((1 - q) ** 2 * math.log(q) for q in p) / len(p) - 0.01 * sum(G)
        G = torch.tensor(G, dtype=torch.float32)
        assert al.reward(logits(G), y, G).item() == pytest.approx(by_hand, abs=2e-3)


def test_the_trained_reward_head_never_sees_the_reward_set(cache, made, monkeypatch):
    """It trains on the other 90 % and is asked about the 10 %."""
    seen, fit = [], common.fit

    def spy(net, task, steps, *more):
        seen.append((task, steps, *more))
        return fit(net, task, 1, *more)
    monkeypatch.setattr(common, "fit", spy)
    task = task_of(cache, "kinds")
    pool = al.open_pool(made[0] / "pool")
    G = al.select(pool, task, reward_head="trained", search="exhaustive", genes=2, batch_size=20, train_lr=0.1, recipe="none")
    assert sum(G) == 2 and len(seen) == 3 + 3                # the pairs, then one by one
    rows = al.reward_rows(task, 0.1, 0)
    assert all(len(rest.labels["train"]) == 80 - len(rows) for rest, *_ in seen)
    kept = torch.cat([task.images["train"][i][None] for i in range(80) if i not in rows.tolist()])
    rest, *how = seen[0]
    assert torch.equal(rest.images["train"], kept) and rest.mean == task.mean
    assert how == [math.ceil(al.REWARD_IMAGES / 20), 20, 0.1, 0.05, "none"]
    with refuses("--reward-share"):
        al.select(pool, task, reward_head="trained", reward_share=1.0)


def test_patches_of_scenes_are_examples(cache, made):
    """A segmentation task: features of single patches against the commonest class in each; by hand for one subset. Class 5
    fills one patch alone and is left out."""
    task, records, rng = task_of(cache, "scenes"), records_of(made[0] / "pool"), np.random.default_rng(0)
    masks = np.kron(rng.integers(0, 3, (12, 2, 2)), np.ones((16, 16))).astype(np.uint8)
    masks[rng.random(masks.shape) < rng.choice([0.1, 0.1, 0.9], (12, 1, 1))] = data.IGNORED
    rows = torch.randperm(12, generator=data.generator(0, 7))[:6]
    masks[rows[0], :16, :16] = 5
    task = dataclasses.replace(task, labels={**task.labels, "train": torch.from_numpy(masks)})
    logits, labels = al.patch_logits(al.open_pool(made[0] / "pool"), task, [2], al.TALS(reward_share=0.5))
    net, f, y = hand_vit(records, (1, 0, 1)), [], []
    for i in rows.tolist():
        tokens = net.fc_norm(net.tokens(task.normalise(task.images["train"][i:i + 1]).double()))[0]
        for patch in range(4):
            r, c = 16 * (patch // 2), 16 * (patch % 2)
            counts = Counter(task.labels["train"][i, r:r + 16, c:c + 16].flatten().tolist())
            labelled = sum(n for label, n in counts.items() if label < 9)
            f.append(tokens[patch].detach())
            y.append(max(range(9), key=lambda k: counts[k]) if 2 * labelled >= 256 else 255)
    usable = [i for i in range(24) if y[i] < 9 and Counter(y)[y[i]] > 1]
    f, y = torch.stack([f[i] for i in usable]).float(), torch.tensor([y[i] for i in usable])
    assert set(y.tolist()) == {0, 1, 2} and 9 <= len(y) < 23 and torch.equal(labels, y)
    G = torch.tensor([1., 0., 1.])
    expected = al.reward(al.class_mean_logits(f, y, 9), y, G).item()
    assert al.reward(logits(G), y, G).item() == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("genes", [0, 2])
def test_tals_looks_at_half_first_and_at_the_best_again(genes, cache, made, monkeypatch):
    """The policy learns on half of the reward set; of what it saw, the best 16 are looked at on all of it, and the best of
    these is taken, though half of the images say another. An exhaustive search looks at all images at once."""
    pool, task, shares, asked = al.open_pool(made[0] / "pool"), task_of(cache, "kinds"), [], []
    pool.records *= 2                                        # six learngenes
    first, second = landscape(0, 6), landscape(1, 6)

    def scored(pool, task, depths, tals):
        shares.append(tals.reward_share)
        value = first if tals.reward_share < 0.3 else second

        def score(G):
            asked.append((tals.reward_share, tuple(G.int().tolist())))
            return value(G.tolist()), 0.0
        return score, torch.tensor([0, 1])
    monkeypatch.setattr(al, "scored", scored)
    G, seen = al.search_selection(pool, task, [2], al.TALS(reward_share=0.4, genes=genes, select_steps=40))
    looked = [subset for share, subset in asked if share == 0.2]
    again = [subset for share, subset in asked if share == 0.4]
    ranked = sorted(looked, key=first, reverse=True)[:16]
    singles = [tuple(row) for row in torch.eye(6).int().tolist()]
    assert sorted(shares) == [0.2, 0.4] and seen["visited"] == len(looked) == len(set(looked))
    assert set(again) == {*ranked, *singles}
    assert G == max(ranked, key=second) != max(looked, key=first) and seen["reward"] == second(G)
    shares.clear()
    G, seen = al.search_selection(pool, task, [2], al.TALS(reward_share=0.4, genes=genes, search="exhaustive"))
    everything = [G for G in itertools.product((0, 1), repeat=6) if (sum(G) == genes if genes else any(G))]
    assert shares == [0.4] and G == max(everything, key=second) and seen["visited"] == len(everything)


def selected(cache, made, folder, task, *more):
    args = al.settings(flags(cache, folder, "--stage select --data kinds", *more))
    return al.selected(run_in(folder), args, al.open_pool(made[0] / "pool"), task, [3])


@pytest.mark.parametrize("search", ["reinforce", "exhaustive"])
def test_select_says_and_logs_what_it_saw(search, cache, made, tmp_path, capsys):
    G = selected(cache, made, tmp_path, lit_task(), "--search", search, "--reward-share 0.5")
    (record,) = log_of(tmp_path, "select")
    assert record["learngenes"] == al.learngenes_of(G) and len(G) == 3
    assert set(record["singles"]) == {"1", "2", "3"} and record["search"] == search and record["depths"] == [3]
    assert (record["policy"] is None) == (search != "reinforce")
    said = capsys.readouterr().out
    assert f"lit: learngenes {record['learngenes']} of 3" in said and "warning" not in said
    assert record["accuracy"] > 90 and record["chance"] == pytest.approx(100 / 3) and record["examples"] == 18


def test_rewards_of_other_images_are_not_reused(cache, made, tmp_path):
    """The same search again computes nothing anew; with other images of the same name and number it does."""
    for seed in (0, 0, 1):
        before = set(tmp_path.glob("rewards-*.jsonl"))
        selected(cache, made, tmp_path, noise_task([12, 12], size=32, seed=seed), "--search exhaustive")
        new = set(tmp_path.glob("rewards-*.jsonl")) - before
        assert len(new) == (0 if seed == 0 and before else 1)


def test_a_reward_at_chance_is_a_warning(cache, made, tmp_path, capsys):
    """Noise with random labels: the search ends, and says that its result means nothing."""
    selected(cache, made, tmp_path, noise_task([40, 40], size=32), "--reward-share 0.5")
    assert "warning: on 40 examples, that is within two standard errors of chance" in capsys.readouterr().out


def test_tasks_have_selections_of_their_own(cache, made, tmp_path):
    """Two tasks in one command: two searches, and each descendant has its own task's learngenes."""
    al.main(flags(cache, tmp_path, "--stage train --data kinds,pedestrian --search exhaustive --pool", made[0] / "pool"))
    pool, searched = al.open_pool(made[0] / "pool"), log_of(tmp_path, "select")
    assert [r["task"] for r in searched] == ["kinds", "pedestrian"]
    for record, trained in zip(searched, log_of(tmp_path, "train")):
        G = al.select(pool, task_of(cache, record["task"]), search="exhaustive")
        assert trained["learngenes"] == record["learngenes"] == al.learngenes_of(G)
    assert len({record["reward"] for record in searched}) == 2


# From Python

def test_the_door_for_python(cache, made, tmp_path, monkeypatch):
    """open_pool needs no flags; select takes a task, a name or a folder; G and numbers are each other's inverse."""
    pool = al.open_pool(made[0] / "pool")
    assert pool.config == CONFIG and len(pool) == 3
    G = al.select(pool, "kinds", data_dir=str(cache), select_steps=5)
    assert G == al.select(pool, task_of(cache, "kinds"), depth=2, select_steps=5) and set(G) <= {0, 1} and len(G) == 3
    write_images(tmp_path / "mine", ("ant", "bee"), 5)
    assert sum(al.select(pool, str(tmp_path / "mine"), genes=2, select_steps=5)) == 2
    net = pool.descendant(depth=4, learngenes=al.learngenes_of(G), num_classes=7)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 7) and len(net.blocks) == 4
    assert al.selection_of(al.learngenes_of((1, 0, 1)), 3) == (1, 0, 1) and al.selection_of(None, 2) == (1, 1)
    assert pool.descendant(1, num_classes=0)(torch.randn(2, 3, 32, 32)).shape == (2, 32)


@pytest.mark.parametrize("call, words", [
    (lambda pool: pool.descendant(0, [1]), "--depth of drawn-tiny"), (lambda pool: pool.descendant((2, 2)), "--depth"),
    (lambda pool: pool.descendant(2, [4]), "from 1 to 3"), (lambda pool: pool.descendant(2, [0]), "from 1 to 3"),
    (lambda pool: pool.descendant(2, []), "at least one"), (lambda pool: al.select(pool, "kindz"), "kindz"),
    (lambda pool: al.select(pool, lit_task(), genes=4), "has 3 learngenes"),
    (lambda pool: al.select(pool, lit_task(), reward_head="ncm"), "reward_head"),
    (lambda pool: al.open_pool("nowhere"), "no learngenes in nowhere"), (lambda pool: al.open_pool(__file__), "is a file")])
def test_bad_calls_are_input_errors(call, words, made):
    with refuses(words):
        call(al.open_pool(made[0] / "pool"))


# ----------------------------------------------------------------------------------------------------------
# Initialization of descendant models
# ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("depth", [1, 2, 7])
def test_descendants_are_shallower_or_deeper(depth, cache, made):
    """Learngenes of two-layer networks in one of any depth: the coefficients are those of the new depth."""
    task = task_of(cache, "kinds")
    x = task.normalise(task.examples("val")[0])
    net = al.open_pool(made[0] / "pool").descendant(depth, [2, 3]).eval()
    by_hand = hand_vit(records_of(made[0] / "pool"), (0, 1, 1), depth)
    with torch.no_grad():
        torch.testing.assert_close(net.encode(x).double(), by_hand.encode(x.double()), atol=1e-4, rtol=1e-4)


def test_constrained_training_keeps_eq_8(cache, made, tmp_path, monkeypatch):
    """Learngenes 1 and 3 of three, four layers: in every step each layer is 1 (gains) + theta_1 + T_2(x) theta_3; only the
    two learngenes and the head train, the stem stays the pool's, and so does the pool."""
    before, used, wanted = snapshot(made[0] / "pool"), [], []

    def spy(net, weights, x):
        used.append([{n: p.detach().clone() for n, p in part.items()} for part in (weights, al.stem_of(net))])
        wanted.extend(p.requires_grad for p in net.parameters())
        return functional_call(net, weights, x)
    monkeypatch.setattr(al, "functional_call", spy)
    args = al.settings(flags(cache, tmp_path, "--stage train --data kinds --constrained --train-epochs 1 --train-lr 1e-2"))
    pool, records = al.open_pool(made[0] / "pool"), records_of(made[0] / "pool")
    al.train_descendant(run_in(tmp_path), args, pool, task_of(cache, "kinds"), [4], "adaptive", (1, 0, 1), 0)
    (file,) = tmp_path.glob("train-*.pt")
    trained = torch.load(file, weights_only=True)["model"]
    assert {n.split(".")[0] for n in trained} == {"genes", "head"}
    assert {n.split(".")[1] for n in trained if n.startswith("genes")} == {"1", "3"}
    after = [{n.split(".", 2)[2]: p for n, p in trained.items() if n.startswith(f"genes.{n_}.")} for n_ in (1, 3)]
    for weights, genes in ((used[0][0], [records[0]["gene"], records[2]["gene"]]), (used[-1][0], after)):
        for l in range(4):
            for name in genes[0]:
                gain = float(name in ("0.norm1.weight", "0.norm2.weight"))
                expected = gain + genes[0][name] + (2 * (l / 4) ** 2 - 1) * genes[1][name]
                torch.testing.assert_close(weights[f"blocks.{l}.{name[2:]}"], expected, atol=1e-6, rtol=1e-5)
    assert (after[0]["0.mlp.fc1.weight"] - records[0]["gene"]["0.mlp.fc1.weight"]).abs().max() > 1e-3
    assert (after[1]["0.mlp.fc1.weight"] - records[2]["gene"]["0.mlp.fc1.weight"]).abs().max() > 1e-3
    assert all(same(stem, records[2]["stem"]) for _, stem in used) and not any(wanted)
    assert snapshot(made[0] / "pool") == before and same(pool.records[0]["gene"], records[0]["gene"])
    (result,) = log_of(tmp_path, "train")
    gene = sum(p.numel() for p in records[0]["gene"].values())
    assert result["constrained"] and result["learngenes"] == [1, 3] and result["trainable"] == 2 * gene + 33 * 10


def test_both_trainings_start_at_the_same_network(cache, made):
    """Eq. (8) as initialisation only, or kept: the same logits before the first step."""
    pool, task = al.open_pool(made[0] / "pool"), task_of(cache, "kinds")
    torch.manual_seed(0)
    free = pool.descendant(3, [2, 3], 10)
    torch.manual_seed(0)
    kept = al.constrained(pool.descendant(3, [2, 3], 10), pool, (0, 1, 1))
    x = task.normalise(task.examples("val")[0])
    with torch.no_grad():
        torch.testing.assert_close(kept(x), free(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size, block, stem, norm, head", [
    ("tiny", 444_864, 185_664, 384, 193_000), ("small", 1_774_464, 371_328, 768, 385_000),
    ("base", 7_087_872, 742_656, 1_536, 769_000)])
def test_parameter_counts_of_table_4(size, block, stem, norm, head):
    with torch.device("meta"):
        net = ViT(common.vit_config(size, 12))
    deployed = 12 * block + stem + norm + head
    for k, constrained in ((3, True), (1, True), (10, False)):
        assert al.parameter_counts(net, k, 10, constrained) == {
            "stored": k * block + stem + norm + head, "trainable": k * block + head if constrained else deployed,
            "deployed": deployed, "nominal": deployed * k // 10}


def test_what_the_paper_calls_6_6_and_8_6_million():
    """3/10 of 22 M and 1/10 of 86 M, whatever is stored: 5.7 M (and a head) and 7.8 M."""
    with torch.device("meta"):
        small, base = (al.parameter_counts(ViT(common.vit_config(size, 12)), k, 10, True) for size, k in (("small", 3), ("base", 1)))
    assert (small["nominal"] // 10 ** 5, base["nominal"] // 10 ** 5) == (66, 86)
    assert (small["stored"] - 385_000, base["stored"] - 769_000) == (5_695_488, 7_832_064)


# ----------------------------------------------------------------------------------------------------------
# Baselines
# ----------------------------------------------------------------------------------------------------------

def random_state(depth, width=32, heads=4, seed=0):
    """An ancestor with all parameters at random."""
    torch.manual_seed(seed)
    net = ViT(ViTConfig(32, 16, width, depth, heads, 10, pooling="avg"))
    return {n: torch.randn_like(p) for n, p in net.named_parameters()}


def initialised(method, depth, state, monkeypatch, *more):
    monkeypatch.setattr(al, "pretrained", lambda *_: SimpleNamespace(state_dict=lambda: state))
    args = al.settings([*SMALL, "--ancestry-depth", "4", *more])
    return al.initialise(run_in("nowhere"), args, method, None, [depth], 7, None, None)[0]


def block_of(state, l):
    return {n.split(".", 2)[2]: p for n, p in state.items() if n.startswith(f"blocks.{l}.")}


@pytest.mark.parametrize("method, depth, kept", [
    ("heur", 6, {3: 1, 4: 2, 5: 3}), ("heur", 4, {1: 1, 2: 2, 3: 3}), ("heur", 2, {0: 2, 1: 3}),     # the last three, on top
    ("auto", 6, {0: 1, 1: 3}), ("auto", 4, {0: 1, 1: 3}), ("auto", 1, {0: 1}),                        # the chosen, below
    ("prefine", 4, {0: 0, 1: 1, 2: 2, 3: 3}), ("prefine", 2, {0: 0, 1: 1}), ("scratch", 3, {})])
def test_what_is_kept_of_the_ancestor(method, depth, kept, monkeypatch):
    """The rest is random, and the same as without any ancestor; so is the head. The stem is the ancestor's."""
    state = random_state(4)
    monkeypatch.setattr(al, "auto_layers", lambda *_: [1, 3])
    net, scratch = (initialised(m, depth, state, monkeypatch).state_dict() for m in (method, "scratch"))
    for l in range(depth):
        expected = block_of(state, kept[l]) if l in kept else block_of(scratch, l)
        assert same(block_of(net, l), expected), l
    assert torch.equal(net["head.weight"], scratch["head.weight"]) and net["head.weight"].shape == (7, 32)
    for name in ("pos_embed", "patch_embed.proj.weight", "fc_norm.weight"):
        assert torch.equal(net[name], (scratch if method == "scratch" else state)[name])
    drawn = [block_of(scratch, l)["mlp.fc1.weight"] for l in range(depth)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))        # random blocks are not one block


def test_tleg_is_b_plus_a_share_of_a(cache, tmp_path):
    """Trained on two layers, used at five: theta_l = theta_B + (l - 1) / 5 theta_A; the stem copied, the head fresh."""
    al.main(flags(cache, tmp_path, "--stage pretrain --method tleg"))
    saved = torch.load(tmp_path / "tleg-drawn-tiny.pt", weights_only=True)["model"]
    args = al.settings(flags(cache, tmp_path))
    net, scratch = (al.initialise(run_in(tmp_path), args, method, None, [5], 7, None, None)[0] for method in ("tleg", "scratch"))
    for l, block in enumerate(net.blocks):
        for name, p in block.named_parameters():
            theta_B, theta_A = (saved[f"genes.{k}.0.{name}"] for k in (1, 2))
            torch.testing.assert_close(p.detach(), theta_B + l / 5 * theta_A, atol=1e-6, rtol=1e-5)
    assert torch.equal(net.pos_embed, saved["stem.pos_embed"])
    assert torch.equal(net.patch_embed.proj.weight, saved["stem.patch_embed.proj.weight"])
    assert torch.equal(net.head.weight, scratch.head.weight)


def test_tleg_learns_from_soft_labels(cache, tmp_path, monkeypatch):
    """What Eq. (4) compares with are the teacher's probabilities for just these images, for half of the ancestor's epochs."""
    al.main(flags(cache, tmp_path, "--stage pretrain"))
    teacher = small_vit()
    teacher.load_state_dict(torch.load(tmp_path / "pretrain-drawn-tiny.pt", weights_only=True)["model"])
    labels, loss = [], al.loss_ce
    monkeypatch.setattr(al, "loss_ce", lambda y, y_hat: labels.append(y) or loss(y, y_hat))
    al.main(flags(cache, tmp_path, "--stage pretrain --method tleg"))
    task = task_of(cache, "digits")
    assert len(labels) == 3                                  # of six that the ancestor trains
    for step, y in enumerate(labels):
        x, _ = task.batch("train", step, 20, 0, "shift")
        torch.testing.assert_close(y, teacher(task.normalise(x)).softmax(1))


def test_tleg_starts_without_gains_in_a(cache, tmp_path):
    """Its authors': theta_B is a block with gains 1, theta_A matrices alone; biases 0 in both."""
    args = al.settings(flags(cache, tmp_path, "--ancestry-epochs 0"))
    theta, *_ = al.tleg(run_in(tmp_path), args)
    for name, both in theta.items():
        for p, gain in zip(both, (1, 0)):
            if p.ndim > 1:
                assert p.std().item() == pytest.approx(0.02, rel=0.1)
            else:
                assert (p == (gain if name in ("0.norm1.weight", "0.norm2.weight") else 0)).all(), name


def test_weight_selection_takes_queries_from_queries(monkeypatch):
    """48 -> 32: the first three of four layers, each tensor evenly spaced from end to end; q, k and v rows stay apart."""
    state = random_state(4, width=48, heads=6)
    for l in range(4):
        state[f"blocks.{l}.attn.qkv.bias"] = torch.arange(144.)
    net = initialised("weight-selection", 3, state, monkeypatch)
    rows = net.blocks[2].attn.qkv.bias.tolist()
    assert rows[0] == 0 and rows[-1] == 143 and rows == sorted(set(rows))
    assert all(48 * part <= row < 48 * (part + 1) for part in range(3) for row in rows[32 * part:32 * part + 32])
    assert {b - a for a, b in zip(rows, rows[1:])} == {1, 2}
    picked = [round(i * 47 / 31) for i in range(32)]
    torch.testing.assert_close(net.fc_norm.weight.detach(), state["fc_norm.weight"][picked])
    hidden = [round(i * 191 / 127) for i in range(128)]
    torch.testing.assert_close(net.blocks[1].mlp.fc1.weight.detach(), state["blocks.1.mlp.fc1.weight"][hidden][:, picked])
    torch.testing.assert_close(net.pos_embed.detach(), state["pos_embed"][:, :, picked])


def expansion(state, seed=0, depth=4):
    net = small_vit(depth, 10)
    net.load_state_dict(state)
    net.head = nn.Identity()
    return al.Expansion(net, al.new_head(32, 10), data.generator(seed))


def test_heads_and_feed_forwards_of_peg_are_convex_mixtures():
    """An ancestor whose head i marks every fourth number (and layer l likewise) lets the mixture be read off: positive,
    adding up to one, another for every layer. Two learngene heads (2/3 of 4) serve heads 1, 2 and 3, 4; two feed-forwards
    (1/2 of 4) the lower and upper layers. Of the seed alone; all else is the ancestor's."""
    state = random_state(4)
    for l in range(4):
        weight = torch.zeros(3, 4, 8, 32)
        for i in range(4):
            weight[:, i, :, i::4] = 1
        state[f"blocks.{l}.attn.qkv.weight"] = weight.view(96, 32)
        for name in ("mlp.fc1.weight", "mlp.fc2.bias"):
            state[f"blocks.{l}.{name}"] = torch.zeros_like(state[f"blocks.{l}.{name}"])
            state[f"blocks.{l}.{name}"][..., l::4] = 1
    start = {name: p.detach() for name, p in expansion(state).weights().items()}
    mixtures = []
    for l in range(4):
        p = start[f"blocks.{l}.attn.qkv.weight"].view(3, 4, 8, 8, 4)               # q/k/v, head, row, repetition, ancestor's head
        mixture = p[0, :, 0, 0]
        assert (p == mixture[None, :, None, None]).all() and (mixture > 0).all()
        assert mixture.sum(1).tolist() == pytest.approx([1] * 4)
        assert torch.equal(mixture[0], mixture[1]) and torch.equal(mixture[2], mixture[3])
        assert not torch.equal(mixture[0], mixture[2])
        mixtures.append(mixture)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(mixtures, 2))
    rows = torch.stack([start[f"blocks.{l}.mlp.fc1.weight"][0, :4] for l in range(4)])
    assert rows.sum(1).tolist() == pytest.approx([1] * 4) and (rows > 0).all()
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[2], rows[3]) and (rows[0] != rows[2]).any()
    for l in range(4):
        assert torch.equal(start[f"blocks.{l}.mlp.fc2.bias"].view(8, 4), rows[l].expand(8, 4))
    copied = [n for n in state if "qkv" not in n and "mlp" not in n and not n.startswith("head")]
    assert len(copied) == 4 * 6 + 5 and all(torch.equal(start[name], state[name]) for name in copied)
    assert same(expansion(state).weights(), start)
    other = expansion(state, seed=1).weights()
    assert not torch.equal(other["blocks.0.attn.qkv.weight"], start["blocks.0.attn.qkv.weight"])
    assert not torch.equal(other["blocks.0.mlp.fc1.weight"], start["blocks.0.mlp.fc1.weight"])


def test_peg_of_equal_heads_and_layers_is_the_ancestor():
    state = random_state(4)
    for l in range(4):
        for end, shape in (("weight", (3, 1, 8, 32)), ("bias", (3, 1, 8))):
            name = f"blocks.{l}.attn.qkv.{end}"
            state[name] = state[name].view(3, 4, *shape[2:])[:, :1].expand(3, 4, *shape[2:]).reshape(state[name].shape)
        for name in ("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"):
            state[f"blocks.{l}.{name}"] = state[f"blocks.0.{name}"]
    for name, p in expansion(state).weights().items():
        torch.testing.assert_close(p.detach(), state[name], atol=1e-5, rtol=1e-4)


def test_the_mapping_of_peg_by_loops():
    """Random numbers in both mappings: every number of a head, or of a layer, is the hidden layer's of its place."""
    torch.manual_seed(0)
    net = expansion(random_state(4))
    for p in net.parameters():
        nn.init.normal_(p)
    genes, weights = dict(net.genes.named_parameters()), net.weights()

    def mapped(module, column):
        first, _, second = module
        hidden = (first.weight @ column + first.bias).clamp(min=0)
        return second.weight @ hidden + second.bias
    assert genes["attn.qkv.weight"].shape == (4, 2, 3, 8 * 32) and genes["mlp.fc1.weight"].shape == (2, 128, 32)
    for l, part, row, column in ((0, 0, 0, 0), (1, 2, 5, 7), (3, 1, 7, 31)):
        heads = mapped(net.map_heads, genes["attn.qkv.weight"][l, :, part, 32 * row + column])
        found = weights[f"blocks.{l}.attn.qkv.weight"].view(3, 4, 8, 32)[part, :, row, column]
        torch.testing.assert_close(found, heads)
    for row, column in ((0, 0), (127, 31), (64, 3)):
        layers = mapped(net.map_layers, genes["mlp.fc1.weight"][:, row, column])
        found = torch.stack([weights[f"blocks.{l}.mlp.fc1.weight"][row, column] for l in range(4)])
        torch.testing.assert_close(found, layers)
    x = torch.randn(3, 3, 32, 32)
    plain = small_vit(4)
    plain.load_state_dict({**weights, **{f"head.{n}": p for n, p in net.head.state_dict().items()}})
    torch.testing.assert_close(net(x), plain(x), atol=1e-5, rtol=1e-4)


def test_peg_trains_its_learngenes_and_its_mapping(cache, tmp_path):
    """--stage pretrain --method peg: half of the ancestor's steps move all of it; a deeper descendant has, in each layer,
    what the nearest has become."""
    al.main(flags(cache, tmp_path, "--stage pretrain --method peg"))
    start = torch.load(tmp_path / "pretrain-drawn-tiny.pt", weights_only=True)["model"]
    saved = torch.load(tmp_path / "peg-drawn-tiny.pt", weights_only=True)
    assert saved["steps"] == 3
    net = small_vit(2)
    net.load_state_dict(start)
    net.head = nn.Identity()
    net = al.Expansion(net, al.new_head(32, 10), data.generator(0, 13))
    assert not any(torch.equal(p, saved["model"][name]) for name, p in net.named_parameters())
    net.load_state_dict(saved["model"])
    weights = net.weights()
    args = al.settings(flags(cache, tmp_path))
    made, scratch = (al.initialise(run_in(tmp_path), args, method, None, [5], 7, None, None)[0] for method in ("peg", "scratch"))
    for l, nearest in enumerate((0, 0, 0, 1, 1)):
        for name, p in made.blocks[l].named_parameters():
            assert torch.equal(p, weights[f"blocks.{nearest}.{name}"])
    assert torch.equal(made.pos_embed, weights["pos_embed"]) and torch.equal(made.head.weight, scratch.head.weight)


@pytest.mark.parametrize("seed", [0, 1])
def test_pegs_mixture_is_of_the_seed(seed, cache, tmp_path, ancestor):
    """One ancestor, no further training: PEG's network is the mixture that its seed draws."""
    args = al.settings(flags(cache, tmp_path, "--ancestry-epochs 0 --seed", seed, "--output", tmp_path))
    net = small_vit(2)
    net.load_state_dict(torch.load(ancestor / "pretrain-drawn-tiny.pt", weights_only=True)["model"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(al, "ancestor", lambda *_: net)
        found = al.peg(run_in(tmp_path), args)
    net.head = nn.Identity()
    expected = al.Expansion(net, nn.Identity(), data.generator(seed, 13)).weights()
    assert same(found, expected)


def test_linear_cka_is_that_of_gram_matrices():
    """<K, L> / (|K| |L|) of centred Gram matrices; 1 for turned and scaled features, small for unrelated ones."""
    torch.manual_seed(0)
    f, g = torch.randn(50, 6) + 2, torch.randn(50, 4)
    H = torch.eye(50) - 1 / 50
    K, L = H @ f @ f.T @ H, H @ g @ g.T @ H
    assert al.similarity(f, g) == pytest.approx(float((K * L).sum() / (K.norm() * L.norm())), rel=1e-4)
    turned = 3 * f @ torch.linalg.qr(torch.randn(6, 6))[0] + 1
    assert al.similarity(f, turned) == pytest.approx(1, abs=1e-4) and al.similarity(f, g) < 0.4


def test_auto_keeps_the_layers_like_a_pseudo_descendants(cache, tmp_path, monkeypatch):
    """The pseudo descendant has half the layers and half the steps. Of four layers, the two that are most like one of its
    layers are kept, in their order, whatever they are like on average."""
    al.main(flags(cache, tmp_path, "--stage pretrain --method auto --ancestry-depth 4"))
    saved = torch.load(tmp_path / "auto-drawn-tiny.pt", weights_only=True)
    assert saved["steps"] == 3 and sum(name.endswith("qkv.weight") for name in saved["model"]) == 2
    args = al.settings(flags(cache, tmp_path, "--ancestry-depth 4"))
    like = [(0.5, 0.5), (0.0, 0.8), (0.6, 0.6), (0.9, 0.0)]
    monkeypatch.setattr(al, "similarity", lambda f, g: like[f][g])
    seen = iter([range(2), range(4)])                        # the pseudo descendant's layers, then the ancestor's
    monkeypatch.setattr(al, "tokens_of_layers", lambda net, x: next(seen))
    assert al.auto_layers(run_in(tmp_path), args) == [1, 3]


def test_tokens_of_layers():
    torch.manual_seed(0)
    net, x = small_vit(3), torch.randn(5, 3, 32, 32)
    seen = al.tokens_of_layers(net, x)
    tokens = net.patch_embed(x) + net.pos_embed
    for block, found in zip(net.blocks, seen):
        tokens = block(tokens)
        torch.testing.assert_close(found, tokens.flatten(0, 1))
    assert len(seen) == 3 and len(al.tokens_of_layers(net, x)) == 3


class Ten:
    """Stands for a pool of ten."""
    path = "ten"

    def __len__(self):
        return 10


def test_random_draws_have_the_asked_size_and_differ(monkeypatch):
    """Five of ten learngenes by --genes, else as many as TALS takes; of seed, task and draw alone."""
    task = noise_task([4, 4])

    def drawn(*more):
        args = al.settings([*SMALL, "--method", "random,adaptive,all,heur", *more])
        return [G for _, G, _ in al.selections(None, args, Ten(), task, [2])]
    monkeypatch.setattr(al, "selected", lambda *_: (1, 1, 0, 0, 0, 0, 0, 1, 0, 0))
    *draws, adaptive, everyone, heur = drawn("--genes", "5")
    assert all(len(G) == 10 and sum(G) == 5 for G in draws) and len(set(draws)) == len(draws) == 5
    assert drawn("--genes", "5")[:5] == draws and drawn("--genes", "5", "--seed", "1")[:5] != draws
    assert len({G[0] for G in draws}) == 2                   # with learngene 1 or without it
    with_first = drawn("--genes", "5", "--method", "random1")
    assert all(sum(G) == 5 and G[0] == 1 for G in with_first) and len(set(with_first)) == 5
    assert drawn("--genes", "1", "--method", "random1") == [(1,) + (0,) * 9] * 5
    assert [sum(G) for G in drawn()[:5]] == [3] * 5
    assert (adaptive, everyone, heur) == ((1, 1, 0, 0, 0, 0, 0, 1, 0, 0), (1,) * 10, None)


@pytest.fixture(scope="module")
def ancestor(cache, tmp_path_factory):
    """A directory with pretrain-drawn-tiny.pt of two layers."""
    folder = tmp_path_factory.mktemp("ancestor")
    al.main(flags(cache, folder, "--stage pretrain"))
    return folder


@pytest.mark.parametrize("other", ["--ancestry-depth 6", "--patch 8", "--pooling token", "--image-size 48"])
def test_an_ancestor_of_another_kind_is_one_sentence(other, cache, ancestor, tmp_path):
    """Before anything is trained, and not by keeping whatever happens to fit."""
    with refuses("pretrain-drawn-tiny.pt do not fit"):
        al.main(flags(cache, tmp_path, "--stage train --data kinds --method heur --depth 2 --ancestors", ancestor, other))
    assert not tmp_path.joinpath("log.jsonl").exists()


# ----------------------------------------------------------------------------------------------------------
# Image Segmentation Task
# ----------------------------------------------------------------------------------------------------------

def test_mean_iou_by_hand():
    """Rows are true classes: 2 / (3 + 3 - 2), 3 / (4 + 4 - 3), 4 / (5 + 5 - 4). A class that is nowhere does not count."""
    confusion = torch.tensor([[2, 1, 0], [0, 3, 1], [1, 0, 4]])
    assert al.mean_iou(confusion) == pytest.approx(100 * (2 / 4 + 3 / 5 + 4 / 6) / 3)
    padded = F.pad(confusion, (0, 1, 0, 1))
    assert al.mean_iou(padded) == pytest.approx(al.mean_iou(confusion))
    padded[3, 0] = 2                                         # in the truth but never found: 0
    assert al.mean_iou(padded) == pytest.approx(100 * (2 / 6 + 3 / 5 + 4 / 6 + 0) / 4)


def test_evaluation_counts_pixels_over_the_whole_split():
    """20 images (more than one part), a network that reads a pixel's class off its brightness, some pixels painted wrong
    and some without label: intersections and unions by sets of pixels."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, (20, 8, 8)).astype(np.uint8)
    painted = np.where(rng.random(truth.shape) < 0.3, rng.integers(0, 3, truth.shape), truth)
    truth[rng.random(truth.shape) < 0.2] = data.IGNORED
    images = np.repeat((painted * 100)[:, None], 3, 1).astype(np.uint8)
    task = data.make_task("s", ["a", "b", "c"], dict.fromkeys(data.SPLITS, images), dict.fromkeys(data.SPLITS, truth))
    levels = torch.tensor([0, 100, 200], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 1, 1)
    level = task.normalise(levels)[:, 0].view(1, 3, 1, 1)
    net = lambda x: -(x[:, :1] - level) ** 2
    ious = []
    for c in range(3):
        real, found = ({tuple(i) for i in np.argwhere((m == c) & (truth != 255))} for m in (truth, painted))
        ious.append(len(real & found) / len(real | found))
    assert al.evaluate_segmentation(net, task, "val", 8, 8) == pytest.approx(100 * sum(ious) / 3)
    assert al.evaluate_segmentation(net, task, "val", 4, 3) == pytest.approx(100 * sum(ious) / 3)


@pytest.mark.parametrize("size, window, stride", [(32, 32, 32), (48, 32, 16), (50, 16, 16), (50, 16, 7), (33, 32, 32)])
def test_sliding_windows_reproduce_the_image(size, window, stride):
    """A network that returns its input: every pixel comes back, the far edges too, whatever the overlap."""
    x, seen = torch.randn(2, 3, size, size), []

    def net(part):
        assert part.shape == (2, 3, window, window)
        seen.append(part)
        return part
    torch.testing.assert_close(al.sliding_logits(net, x, window, stride), x, atol=1e-6, rtol=1e-5)
    assert len(seen) == math.ceil((size - window) / stride + 1) ** 2
    assert torch.equal(seen[0], x[..., :window, :window]) and torch.equal(seen[-1], x[..., -window:, -window:])


def test_overlaps_are_averaged():
    """3 x 3 pixels, windows of 2 that say 1, 2, 3, 4 in turn."""
    says = itertools.count(1)
    out = al.sliding_logits(lambda part: torch.full((1, 1, 2, 2), float(next(says))), torch.zeros(1, 3, 3, 3), 2, 1)
    assert out[0, 0].tolist() == [[1, 1.5, 2], [2, 2.5, 3], [3, 3.5, 4]]


@pytest.mark.parametrize("pooling", ["token", "avg"])
@pytest.mark.parametrize("size", [32, 64])
def test_segmenter_against_its_parts(pooling, size):
    """Shapes; cosines in [-1, 1] before the last norm; and the whole forward pass written out, one scalar product at a time."""
    torch.manual_seed(0)
    encoder = small_vit(pooling=pooling)
    for p in encoder.parameters():
        nn.init.normal_(p, std=0.2)
    net, grid, seen = al.Segmenter(encoder, 5, size).eval(), size // 16, []
    net.mask_norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        out = net(x)
        assert out.shape == (2, 5, size, size) and seen[0].shape == (2, grid ** 2, 5) and seen[0].abs().max() <= 1 + 1e-6
        tokens = encoder.fc_norm(encoder.norm(encoder.tokens(x)))
        assert tokens.shape[1] == grid ** 2 + (pooling == "token")
        tokens = tokens[:, pooling == "token":]
        both = torch.cat([net.proj_in(tokens), net.cls_emb.repeat(2, 1, 1)], 1)
        for block in net.blocks:
            both = block(both)
        both = net.norm(both)
        scores = torch.zeros(2, 5, grid, grid)
        for b, t in itertools.product(range(2), range(grid ** 2)):
            patch = net.proj_patch.weight @ both[b, t]
            row = []
            for c in range(5):
                name = net.proj_classes.weight @ both[b, grid ** 2 + c]
                row.append(patch @ name / patch.norm() / name.norm())
            torch.testing.assert_close(seen[0][b, t], torch.stack(row), atol=1e-5, rtol=1e-4)
            scores[b, :, t // grid, t % grid] = net.mask_norm(torch.stack(row))
        torch.testing.assert_close(out, F.interpolate(scores, (size, size), mode="bilinear"), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(al.sliding_logits(net, x, size, size // 2), out)        # one window is the network
    assert len(net.blocks) == 2 and net.blocks[0].attn.num_heads == 4


@pytest.mark.parametrize("pooling", ["token", "avg"])
def test_the_position_embedding_is_resized(pooling):
    """2 x 2 positions to 4 x 4 by hand: rows (1, 0), (3/4, 1/4), (1/4, 3/4), (0, 1) of both axes; the class token's stays."""
    encoder = small_vit(pooling=pooling)
    nn.init.normal_(encoder.pos_embed)
    old = encoder.pos_embed.detach().clone()[0]
    new = al.Segmenter(encoder, 5, 64).encoder.pos_embed.detach()[0]
    first = int(pooling == "token")
    M = torch.tensor([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    expected = torch.einsum("ip,jq,pqd->ijd", M, M, old[first:].view(2, 2, 32)).reshape(16, 32)
    torch.testing.assert_close(new[first:], expected, atol=1e-6, rtol=1e-5)
    assert new.shape == (16 + first, 32) and torch.equal(new[:first], old[:first])


def test_decoders_are_alike_and_encoders_the_methods(cache, made, tmp_path, monkeypatch):
    """--stage segment: every method's Segmenter before training, then a score of each."""
    built, Segmenter = [], al.Segmenter

    def spy(encoder, *more):
        state = {n: p.clone() for n, p in encoder.state_dict().items()}
        net = Segmenter(encoder, *more)
        decoder = {n: p.clone() for n, p in net.state_dict().items() if not n.startswith("encoder.")}
        built.append((state, decoder))
        return net
    monkeypatch.setattr(al, "Segmenter", spy)
    al.main(flags(cache, tmp_path, "--stage segment --data scenes --method all,scratch,heur --depth 3 --train-epochs 2",
                  "--pool", made[0] / "pool"))
    (every, decoder), (scratch, second), (heur, third) = built
    assert same(decoder, second) and same(decoder, third)
    by_hand = hand_vit(records_of(made[0] / "pool"), (1, 1, 1), 3).blocks[2].mlp.fc1.weight.detach()
    torch.testing.assert_close(every["blocks.2.mlp.fc1.weight"].double(), by_hand, atol=1e-5, rtol=1e-5)
    ancestor = torch.load(tmp_path / "pretrain-drawn-tiny.pt", weights_only=True)["model"]
    assert torch.equal(heur["blocks.2.mlp.fc1.weight"], ancestor["blocks.1.mlp.fc1.weight"])
    assert torch.equal(heur["blocks.0.mlp.fc1.weight"], scratch["blocks.0.mlp.fc1.weight"])
    scores = log_of(tmp_path, "segment")
    assert [r["method"] for r in scores] == ["all", "scratch", "heur"] and all(0 <= r["miou"] <= 100 for r in scores)


def test_a_segmentation_of_another_pool_is_refused(cache, made, other, tmp_path):
    """As --stage train does it: the same directory, learngenes 1 and 2 of another pool."""
    pool = copy_of(made, tmp_path, 2) / "pool"
    argv = flags(cache, tmp_path / "out", "--stage segment --data scenes --method all --train-epochs 1")
    al.main([*argv, "--pool", str(pool)])
    with refuses("holds start"):
        al.main([*argv, "--pool", str(other)])


# ----------------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------------

def test_paper_preset_is_the_experimental_setup():
    args = al.settings(["--preset", "paper", "--stage", "select", "--data", "kinds"])
    tals = al.picked(al.TALS, args)
    assert (args.ancestry_epochs, args.train_epochs, tals.lam, tals.reward_share) == (300, 500, 0.01, 0.1)
    assert al.picked(al.AncestryConfig, args) == al.AncestryConfig("small", 224, 16, "token")
    assert args.ancestry_depth == 12 and args.stream == "imagenet/10"


def test_defaults_of_the_drawn_preset_are_those_of_python():
    args = al.settings(["--stage", "select", "--data", "kinds"])
    assert al.picked(al.TALS, args) == al.TALS() and al.picked(al.AncestryConfig, args) == al.AncestryConfig()


def test_streams(tmp_path, monkeypatch):
    names = lambda stream: al.stream_names(al.settings(["--stream", stream]))
    assert names("wide/3,digits") == ["wide/3#1", "wide/3#2", "wide/3#3", "digits"]
    assert names("signs:0-5,kinds") == ["signs:0-5", "kinds"]
    origin = lambda stream: al.stream_origin(al.settings(["--stream", stream]))
    assert (origin("wide/3"), origin("signs:0-5"), origin("kinds")) == (["wide"], ["signs:0-5"], ["kinds"])
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "birds" / "2", ("wren", "kite"), 1)                            # a folder of that name comes first
    assert names("birds/2") == ["birds/2"] == origin("birds/2")


def test_settings_are_read_only():
    args = al.settings([])
    with pytest.raises(AttributeError):
        args.lr = 1.0


def test_at_most_fifty_flags(capsys):
    with pytest.raises(SystemExit):
        al.settings(["-h"])
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("  --")]) <= 50 and max(map(len, lines)) <= 100


def test_batch_must_divide_among_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with refuses("--batch-size 64 .* 3 processes"):
        al.settings(["--batch-size", "64"])


# given to a directory with a pool, an ancestor and a descendant
BAD_FLAGS = [
    ("--stage train", "needs a task"), ("--stage fly", "--stage"), ("--stage select --data kindz", "kindz.*kinds"),
    ("--data digits/3#4", "numbered from 1 to 3"), ("--stream digits/0", "K is at least 1"), ("--stream digitz/3", "digitz"),
    ("--data /no/such/folder", "/no/such/folder"), ("--stage train --data kinds --depth 0", "--depth"),
    ("--stage train --data kinds --depth 2,2", "--depth of drawn-tiny takes one number"),
    ("--stage train --data kinds --depth six", "--depth"), ("--size drawn-swin --depth 3", "as in 2,6"),
    ("--stage train --data kinds --method adaptive,peek", "--method.*peek"), ("--seed 18446744073709551616", "--seed"),
    ("--stage select --data kinds --pool {tmp}/file", "is a file"), ("--pool {tmp}/file --data pedestrian", "is a file"),
    ("--stage select --data kinds --pool {tmp}/nothing", "no learngenes in.*--stage ancestry"),
    ("--stage select --data kinds --genes 4", "has 3 learngenes"), ("--stage select --data {tmp}/lonely", "class 'eel' of"),
    ("--stage train --data kinds --method random --genes 5", "3 learngenes"),
    ("--stage segment --data kinds", "has no masks"), ("--stage train --data scenes --method scratch", "class for every pixel"),
    ("--data scenes", "class for every pixel"), ("--stage segment --data scenes --crop 40", "--crop 40"),
    ("--stage segment --data scenes --crop 64", "--crop 64"), ("--stage segment --data scenes --size drawn-swin", "written for ViT"),
    ("--stage train --data kinds --method heur --ancestors {tmp}/nothing", "no finished pretrain-drawn-tiny.pt"),
    ("--stage train --data kinds --method heur --stream digits,kinds", "--stream digits,kinds has several"),
    ("--stage train --data kinds --method tleg --size drawn-swin", "written for ViT"),
    ("--stage train --data kinds --method weight-selection --size drawn-base", "larger than drawn-base"),
    ("--stage train --data kinds --method all --seed 3", "seed 0"), ("--stage train --data kinds --method all --train-lr 0.3", "lr"),
    ("--stage train --data kinds --method prefine --depth 3", "cannot make 3 layers"),
    ("--stage train --data kinds --method scratch,weight-selection --depth 3", "cannot make 3 layers"),
    ("--stage select --data kinds --reward-head mlp", "--reward-head"), ("--gene-dropout 1.5", "--gene-dropout"),
    ("--stage select --data scenes --reward-head trained", "say means"), ("--lam inf", "--lam"), ("--device cuda", "--device cuda"),
    ("--output {tmp}/file", "is a file"), ("--stage train --data kinds,pedestrian --export {tmp}/net.pt", "one task"),
    ("--stage train --data kinds --export {tmp}/net.doc", "net.doc"),
]


@pytest.fixture(scope="module")
def finished(cache, made, tmp_path_factory):
    """A copy of the run with an ancestor and one trained descendant in it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(made[0], folder)
    al.main(flags(cache, folder, "--stage train --data kinds --method all,heur"))
    return folder


@pytest.mark.parametrize("bad, words", BAD_FLAGS, ids=[f for f, _ in BAD_FLAGS])
def test_bad_input_is_one_sentence_and_overwrites_nothing(bad, words, cache, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "file").write_text("mine")
    for split, count in (("train", 1), ("val", 2)):
        for name in ("cow", "eel"):
            write_images(tmp_path / "lonely" / split, (name,), count if name == "eel" else 4)
    before = snapshot(tmp_path)
    with refuses(words):
        al.main(flags(cache, tmp_path / "run", *bad.format(tmp=tmp_path).split()))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("argv", [
    "--stage train --data kinds,digitz", "--data digits/3#1,digitz", "--stream digits/3,digitz", "--stage train --data kinds --method all,alll"])
def test_names_are_looked_up_before_any_work(argv, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load_tasks", lambda *_, **__: pytest.fail("loads before it looks"))
    with refuses("digitz.*digits|alll.*all"):
        al.main(flags(cache, tmp_path, argv))


# ----------------------------------------------------------------------------------------------------------
# Stages: as a user
# ----------------------------------------------------------------------------------------------------------

def test_the_commands_of_the_docstring(cache, tmp_path, capsys):
    """All four, in their order and in one directory, with tiny settings in front."""
    commands = re.findall(r"^    python adaptive_learngene.py(.*?)(?:#.*)?$", al.__doc__, re.M)
    assert len(commands) == 4
    write_images(tmp_path / "mine", ("ant", "bee"), 6)
    for command in commands:
        argv = command.replace("DIR", str(tmp_path / "mine")).replace("TASK", "kinds").split()
        al.main([*flags(cache, tmp_path / "run"), *argv])
    said = capsys.readouterr().out
    assert [r["dataset"] for r in records_of(tmp_path / "run" / "pool")] == [*STREAM, str(tmp_path / "mine")]
    assert "4 learngenes in" in said and re.search(r"kinds: learngenes \[.*\] of 4", said)
    assert re.search(r"kinds, drawn-tiny x 6, adaptive \[.*\]: \d+\.\d\d % after 40 images \(val\)", said)
    (result,) = log_of(tmp_path / "run", "train")
    assert result["depths"] == [6] and result["images"] == 40 and len(result["curve"]) == 2 and result["learngenes"]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["stage"] == "train"
    assert not [f for f in (tmp_path / "run").rglob("*.tmp")]


def test_every_method_under_one_schedule(cache, made, tmp_path):
    """All columns of Tables 1 and 2 and of Fig. 4, then once more: finished networks are read, not trained again, and
    the log stays as it is."""
    argv = flags(cache, tmp_path, "--stage train --data kinds --method", ",".join(al.METHODS), "--pool", made[0] / "pool")
    al.main(argv)
    results, log = log_of(tmp_path, "train"), (tmp_path / "log.jsonl").read_text()
    assert [r["method"] for r in results] == [m for m in al.METHODS for _ in range(5 if m in al.RANDOM else 1)]
    assert len({(r["images"], r["lr"], r["deployed"], tuple(r["depths"])) for r in results}) == 1
    assert all(0 <= r["accuracy"] <= 100 and len(r["curve"]) == 2 for r in results)
    assert all((r["learngenes"] is not None) == (r["method"] in al.OURS) for r in results)
    assert [r["draw"] for r in results if r["method"] == "random"] == [0, 1, 2, 3, 4]
    assert all((r["rewards"] is not None) == (r["method"] in ("adaptive", *al.RANDOM)) for r in results)
    networks = {f.name: f.read_bytes() for f in tmp_path.glob("*.pt")}
    assert {f"{stage}.pt" for stage in ("pretrain-drawn-tiny", "pretrain-drawn-small", "tleg-drawn-tiny", "peg-drawn-tiny", "auto-drawn-tiny")} < set(networks)
    al.main(argv)
    assert (tmp_path / "log.jsonl").read_text() == log
    assert {f.name: f.read_bytes() for f in tmp_path.glob("*.pt")} == networks


def test_training_logs_the_reward_of_what_it_trained(cache, made, tmp_path):
    """By class means, by ridge, and by the head of --reward-head: what a selection was worth before it was trained."""
    argv = ["--stage train --data kinds --method random --genes 2 --train-images 20 --reward-share 0.3 --pool", made[0] / "pool"]
    al.main(flags(cache, tmp_path, *argv))
    pool, task = al.open_pool(made[0] / "pool"), task_of(cache, "kinds")
    rows = al.reward_rows(task, 0.3, 0)
    x, y = task.normalise(task.images["train"][rows]), task.labels["train"][rows]
    for record in log_of(tmp_path, "train"):
        G = al.selection_of(record["learngenes"], 3)
        f = pool.fill(small_vit().eval(), G).encode(x).detach()
        means, ridge = (al.reward(head(f, y, 10), y, torch.tensor(G)).item() for head in (al.class_mean_logits, al.ridge_logits))
        assert record["rewards"] == {"means": pytest.approx(means, abs=1e-4), "ridge": pytest.approx(ridge, abs=1e-4)}
    al.main(flags(cache, tmp_path / "trained", *argv, "--reward-head trained"))
    assert list(log_of(tmp_path / "trained", "train")[0]["rewards"]) == ["means", "ridge", "trained"]


def test_the_curve_is_of_val_and_the_result_of_the_split(cache, tmp_path, monkeypatch):
    """--split test reports test, val val; the curve of Fig. 3 is measured on 500 images of val in both."""
    asked, accuracy = [], al.accuracy

    def spy(forward, task, split, device, limit=None):
        asked.append((split, limit))
        return accuracy(forward, task, split, device, limit)
    monkeypatch.setattr(al, "accuracy", spy)
    for split in ("val", "test"):
        asked.clear()
        al.main(flags(cache, tmp_path / split, "--stage train --data kinds --method scratch --split", split))
        assert asked == [("val", 500), ("val", 500), (split, None)]
        (result,) = log_of(tmp_path / split, "train")
        assert result["split"] == split


def test_ancestors_come_from_elsewhere(cache, tmp_path, ancestor):
    """--ancestors: made once, used by runs elsewhere, whatever their seed."""
    al.main(flags(cache, tmp_path, "--stage train --data kinds --method heur --seed 2 --ancestors", ancestor))
    assert not (tmp_path / "pretrain-drawn-tiny.pt").exists() and len(log_of(tmp_path, "train")) == 1


def test_an_ancestor_of_other_data_is_refused(cache, tmp_path):
    """In a run's own directory: what --stream was when the ancestor was trained, and now; and other ancestors elsewhere."""
    argv = flags(cache, tmp_path / "run", "--stage train --data pedestrian --method heur")
    al.main(argv)
    with refuses("pretrain-drawn-tiny.pt (holds|was trained on other)"):
        al.main([*argv, "--stream", "kinds/2"])
    al.main(flags(cache, tmp_path / "other", "--stage pretrain --seed 1"))
    with refuses("train-pedestrian-heur.* holds start"):
        al.main([*argv, "--ancestors", str(tmp_path / "other")])


@pytest.mark.parametrize("options", [
    "--init block --basis printed --pooling token", "--init previous --stem frozen --recipe none --clip 0",
    "--size drawn-swin --depth 1,2", "--gene-dropout 1 --init random", "--amp bf16"])
def test_options_run(options, cache, tmp_path):
    """Two datasets, then a descendant of either training."""
    al.main(flags(cache, tmp_path, "--data", ",".join(STREAM[:2]), options))
    for more in ("", "--constrained"):
        al.main(flags(cache, tmp_path, "--stage train --data kinds --genes 2", options, more))
    assert [r["kept"] for r in log_of(tmp_path, "pool")] == [0, 1]
    assert all(math.isfinite(r["loss"]) for r in log_of(tmp_path, "ancestry-02"))
    assert [r["constrained"] for r in log_of(tmp_path, "train")] == [False, True]


def test_export_makes_learngenes_where_there_are_none(cache, tmp_path, capsys):
    """The first command of a user with images: a pool, a descendant, its file and its card; then the pool is used again."""
    write_images(tmp_path / "mine", ("ant", "bee"), 6)
    argv = ["--stage train --data", tmp_path / "mine", "--method all --depth 3 --export", tmp_path / "net.pt"]
    al.main(flags(cache, tmp_path / "run", *argv))
    assert "made there now" in capsys.readouterr().out and len(records_of(tmp_path / "run" / "pool")) == 3
    card = json.loads((tmp_path / "net.pt.json").read_text())
    pool, task = al.open_pool(tmp_path / "run" / "pool"), data.load(str(tmp_path / "mine"))
    assert (card["class_names"], card["start"], card["content"]) == (["ant", "bee"], pool.hash, task.fingerprint)
    before = snapshot(tmp_path / "run" / "pool")
    al.main(flags(cache, tmp_path / "run", *argv))
    assert "made there now" not in capsys.readouterr().out and snapshot(tmp_path / "run" / "pool") == before


def test_another_folder_of_the_same_name_is_another_task(cache, tmp_path):
    """Images swapped between the classes: the finished network is not reported as one of these."""
    write_images(tmp_path / "mine", ("ant", "bee"), 6)
    argv = flags(cache, tmp_path / "run", "--stage train --method scratch --data", tmp_path / "mine")
    al.main(argv)
    (tmp_path / "mine" / "ant").rename(tmp_path / "mine" / "cat")
    (tmp_path / "mine" / "bee").rename(tmp_path / "mine" / "ant")
    (tmp_path / "mine" / "cat").rename(tmp_path / "mine" / "bee")
    before = snapshot(tmp_path)
    with refuses("other data than .*mine holds now.*--output"):
        al.main(argv)
    assert snapshot(tmp_path) == before


# Stopped, killed, and in two processes

def without_speed(folder):
    """All lines of a log, but for their speed."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "images_per_s"} for record in records]


@pytest.mark.parametrize("call", [1, 3, 4, 6, 10])
def test_a_log_is_that_of_an_undisturbed_run_wherever_it_was_stopped(call, cache, tmp_path, monkeypatch):
    """Stopped just before the call-th of eleven results is written, and started again: the same lines in the same order."""
    commands = ["", "--stage train --data kinds,pedestrian --method adaptive,scratch", "--stage segment --data scenes --method all --train-images 20"]
    result, calls = common.Run.result, itertools.count()

    def stopping(self, stage, key, **values):
        if next(calls) == call:
            raise KeyboardInterrupt
        result(self, stage, key, **values)
    for words in commands:
        al.main(flags(cache, tmp_path / "whole", words))
    monkeypatch.setattr(common.Run, "result", stopping)
    for words in commands:
        try:
            al.main(flags(cache, tmp_path / "parts", words))
        except KeyboardInterrupt:
            al.main(flags(cache, tmp_path / "parts", words))
    whole = without_speed(tmp_path / "whole")
    assert without_speed(tmp_path / "parts") == whole
    stages = [r["stage"] for r in whole if r["stage"] in ("pool", "alone", "select", "train", "segment")]
    assert stages == ["pool"] * 3 + ["alone"] + ["select", "train", "train"] * 2 + ["segment"]


# Shortened tasks do not reach other processes, so these learn folders of images; what need not be another process is not.

SCRIPT = ROOT / "adaptive_learngene.py"


@pytest.fixture
def commands(tmp_path):
    """(ancestry, train): flags of two learngenes, and of descendants, for a run in a folder."""
    for number, name in enumerate(("one", "two", "three")):
        write_images(tmp_path / name, ("ant", "bee", "cow"), 12, seed=number)
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))

    def build(folder, methods):
        often = "--ancestry-epochs 8 --train-epochs 8 --save-every 4 --workers 1"
        return (flags("data", tmp_path / folder, often, f"--data {one},{two}"),
                flags("data", tmp_path / folder, often, f"--stage train --data {three} {methods}"))
    return build


def test_killed_runs_end_as_if_never_stopped(commands, tmp_path):
    """SIGKILL in the middle of learngene 2, while its file gets its name, and in the training of a descendant, each time
    between two checkpoints: bitwise the same networks, the same pool, the same log."""
    log, parts, whole = tmp_path / "out", tmp_path / "parts", tmp_path / "whole"
    for argv in commands("whole", "--method all --constrained"):
        al.main(argv)
    learn, train = commands("parts", "--method all --constrained")
    (stage,) = [f.stem for f in whole.glob("train-*.pt")]
    killed_in("ancestry-02", 7, learn, log, "adaptive_learngene")
    assert len(records_of(parts / "pool")) == 1 and log_of(parts, "ancestry-02")[-1]["step"] == 4
    killed_in("learngene-02", -1, learn, log, "adaptive_learngene")
    assert len(records_of(parts / "pool")) == 1
    al.main(learn)
    killed_in(stage, 7, train, log, "adaptive_learngene")
    al.main(train)
    for name in ("ancestry-01", "ancestry-02", stage):
        assert_same_run(parts, whole, name)
    assert without_speed(parts) == without_speed(whole)
    hashes = [[r["hash"] for r in records_of(folder / "pool")] for folder in (parts, whole)]
    assert hashes[0] == hashes[1] and not list(tmp_path.rglob("*.tmp"))


def test_two_processes_learn_what_one_does(commands, tmp_path):
    """torchrun: the same global batch, so the same losses (1e-5), the same learngenes up to rounding, the same selection."""
    for argv in commands("one-process", "--method adaptive,scratch"):
        al.main(argv)
    for argv in commands("two-processes", "--method adaptive,scratch"):
        finish(argv, tmp_path / "out", script=SCRIPT, processes=2)
    first, second = tmp_path / "one-process", tmp_path / "two-processes"
    stages = ["ancestry-01", "ancestry-02", *(f.stem for f in first.glob("train-*.pt"))]
    assert len(stages) == 4
    for stage in stages:
        one, two = ([r for r in log_of(folder, stage) if "loss" in r] for folder in (first, second))
        assert len(one) == len(two) >= 3
        for a, b in zip(one, two):
            assert (a["loss"], a["lr"], a["images"]) == pytest.approx((b["loss"], b["lr"], b["images"]), abs=1e-5), stage
    for a, b in zip(records_of(first / "pool"), records_of(second / "pool")):
        assert all((a["gene"][n] - b["gene"][n]).abs().max() < 1e-4 for n in a["gene"]) and a["dataset"] == b["dataset"]
    one, two = ([r["learngenes"] for r in log_of(folder, "train")] for folder in (first, second))
    assert one == two and one[0] and one[1] is None
    assert [r["kept"] for r in log_of(second, "pool")] == [0, 1]                          # and written by one process only


# ----------------------------------------------------------------------------------------------------------
# The equations in the file
# ----------------------------------------------------------------------------------------------------------

def test_every_equation_has_its_line_of_code():
    """A comment "Eq. (n)" behind code, not in a text; and no line that a page beside the paper does not hold."""
    source = (ROOT / "adaptive_learngene.py").read_text()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [t for t in tokens if t.type == tokenize.COMMENT and t.line.split("#")[0].strip()]
    assert {int(n) for t in comments for n in re.findall(r"Eq\. \((\d)\)", t.string)} == set(range(1, 9))
    assert max(map(len, source.splitlines())) <= 100
