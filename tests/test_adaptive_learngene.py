"""adaptive_learngene.py against the paper: every equation by an oracle of its own, the pool by damaging it, the selector by
enumerating all selections, baselines by hand, runs by stopping them, and bad input by what is left behind."""
import dataclasses
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
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
from test_common import assert_same_run, log_of, refuses, snapshot

ROOT = Path(__file__).resolve().parent.parent
CPU = common.Machine(torch.device("cpu"), None)

# Drawn tasks cut short, and networks of two layers with four patches: a whole run takes a second.
SIZES = {"digits": (120, 60, 60), "kinds": (80, 40, 40), "pedestrian": (60, 30, 30), "scenes": (12, 4, 4)}
TINY = ("--size drawn-tiny --ancestry-depth 2 --patch 16 --batch-size 20 --stream digits/3 --pretrain-data digits "
        "--ancestry-epochs 1 --pretrain-epochs 0.5 --tleg-epochs 0.5 --train-epochs 0.5 --select-steps 20 --draws 2 "
        "--looks 2 --split val --log-every 1 --save-every 1 --gene-dropout 0.5 --gene-keep 0.2 --scene-size 48 --crop 32 "
        "--stride 16 --device cpu").split()


@pytest.fixture(scope="module", autouse=True)
def short_tasks():
    with pytest.MonkeyPatch.context() as patch:
        for name, sizes in SIZES.items():
            patch.setitem(data.SPECS, name, data.SPECS[name]._replace(sizes=sizes))
        yield


def small_vit(depth=2, classes=10, pool="avg", width=32):
    return ViT(ViTConfig(32, 16, width, depth, 4, classes, pool=pool))


# ----------------------------------------------------------------------------------------------------------------------
# a(l, n)
# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("first_order", [0, 1])
@pytest.mark.parametrize("basis, columns", [
    ("chebyshev", np.polynomial.chebyshev.chebvander), ("legendre", np.polynomial.legendre.legvander),
    ("monomial", np.polynomial.polynomial.polyvander)])
def test_coefficients_are_numpys_polynomials(basis, columns, first_order):
    """Degrees n - 1 + first_order at (l - 1) / L; none of them exceeds 1, so no layer gets more of a learngene than there is."""
    for L, N in itertools.product((1, 2, 6, 12), (1, 2, 3, 10)):
        theirs = columns(np.arange(L) / L, N)[:, first_order:][:, :N]
        a = al.coefficients(L, N, basis, first_order)
        assert a.shape == (L, N) and a.dtype == torch.float32 and a.abs().max() <= 1
        np.testing.assert_allclose(a.numpy(), theirs, atol=1e-6)


def test_the_worked_example_of_2024():
    """L = 12: a(2, 3) = 2 (1/12) T_2(1/12) - T_1(1/12) = T_3(1/12) as printed; under first_order 0 the same number is a(2, 4)."""
    x = 1 / 12
    T_2 = 2 * x * x - 1
    T_3 = 2 * x * T_2 - x
    assert T_3 == pytest.approx(4 * x ** 3 - 3 * x)
    assert al.coefficients(12, 3, first_order=1)[1, 2].item() == pytest.approx(T_3, rel=1e-6)
    assert al.coefficients(12, 4, first_order=0)[1, 3].item() == pytest.approx(T_3, rel=1e-6)
    assert al.coefficients(12, 3, first_order=0)[1, 2].item() == pytest.approx(T_2, rel=1e-6)


def test_both_conventions_in_the_first_layer_and_the_first_columns():
    """first_order 0: learngene 1 is the same in every layer and 1, 2 are TLEG's B + (l - 1) / L A. As printed in 2024, layer 1
    gets nothing of learngene 1."""
    tleg = al.coefficients(6, 2).tolist()
    assert tleg == [[1, pytest.approx(l / 6)] for l in range(6)]
    assert al.coefficients(12, 10)[0].tolist() == [1, 0, -1, 0, 1, 0, -1, 0, 1, 0]
    assert al.coefficients(12, 10, first_order=1)[0].tolist() == [0, -1, 0, 1, 0, -1, 0, 1, 0, -1]


# ----------------------------------------------------------------------------------------------------------------------
# Eqs. (1), (2), (3), (8)
# ----------------------------------------------------------------------------------------------------------------------

def loops(theta, a, G=None, base=None):
    """sum_n G_n a(l, n) theta_n, number by number."""
    N, P = theta.shape
    G, base = torch.ones(N) if G is None else G, (torch.zeros(P) if base is None else base).expand(len(a), P)
    return torch.tensor([[sum(float(G[n]) * float(a[l, n]) * float(theta[n, p]) for n in range(N)) + float(base[l, p])
                          for p in range(P)] for l in range(len(a))])


@pytest.mark.parametrize("N, G, base", [
    (1, None, None), (2, None, None), (5, None, None),                                   # Eqs. (1), (2), (3)
    (5, (1, 0, 1, 1, 0), None), (5, (0, 0, 0, 0, 1), None), (3, (0, 0, 0), None),         # Eq. (8)
    (5, (1, 0, 1, 1, 0), "row"), (2, None, "rows")])
def test_eqs_1_2_3_and_8_by_plain_loops(N, G, base):
    torch.manual_seed(0)
    theta, a = torch.randn(N, 7), al.coefficients(4, N)
    G = None if G is None else torch.tensor(G, dtype=torch.float32)
    base = {None: None, "row": torch.randn(7), "rows": torch.randn(4, 7)}[base]
    torch.testing.assert_close(al.compose(theta, a, G, base), loops(theta, a, G, base), atol=1e-5, rtol=1e-5)


def test_eq_2_by_hand():
    """Two layers, so x = 0 and 1/2: Theta_1 = theta_1, Theta_2 = theta_1 + theta_2 / 2."""
    theta = torch.tensor([[1., 10.], [4., -2.]])
    assert al.compose(theta, al.coefficients(2, 2)).tolist() == [[1, 10], [3, 9]]
    assert al.compose(theta, al.coefficients(2, 2), torch.tensor([0., 1.])).tolist() == [[0, 0], [2, -1]]


def test_the_gradient_of_a_learngene_is_the_sum_over_layers():
    """d f / d theta_n = G_n sum_l a(l, n) d f / d Theta_l, for a function of Theta whose gradient is known."""
    torch.manual_seed(0)
    theta, a, G, c = torch.randn(3, 5, requires_grad=True), al.coefficients(4, 3), torch.tensor([1., 0., 1.]), torch.randn(4, 5)
    Theta = al.compose(theta, a, G, torch.ones(5))
    (c * Theta ** 2).sum().backward()
    for n in range(3):
        expected = sum(G[n] * a[l, n] * 2 * c[l] * Theta[l].detach() for l in range(4))
        torch.testing.assert_close(theta.grad[n], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("init", ["delta", "block", "zero"])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_every_parameter_of_a_filled_vit_is_the_hand_sum(depth, init):
    """Any depth, learngenes 1 and 3 of three: names, not positions, and gains have their 1 under delta. The stem is copied."""
    torch.manual_seed(0)
    settings = {"basis": "chebyshev", "first_order": 0, "init": init}
    genes = [al.new_learngene(small_vit(), init, first=n == 0) for n in range(3)]
    for p in itertools.chain(*(gene.parameters() for gene in genes)):
        nn.init.normal_(p)
    net, donor = small_vit(depth), small_vit()
    nn.init.normal_(donor.fc_norm.weight)
    theta = [torch.stack([al.flat(gene[0]) for gene in genes]).detach()]
    head = net.head.weight.clone()
    al.fill(net, theta, dict(al.stem_of(donor)), (1, 0, 1), settings)
    for l, block in enumerate(net.blocks):
        x = l / depth
        for name, p in block.named_parameters():
            first, _, third = (dict(gene[0].named_parameters())[name] for gene in genes)
            gain = 1.0 if init == "delta" and name in ("norm1.weight", "norm2.weight") else 0.0
            torch.testing.assert_close(p, gain + first + (2 * x * x - 1) * third, atol=1e-5, rtol=1e-5)
    assert " ".join(al.stem_of(net)) == "pos_embed patch_embed.proj.weight patch_embed.proj.bias fc_norm.weight fc_norm.bias"
    assert all(torch.equal(p, al.stem_of(donor)[n]) for n, p in al.stem_of(net).items())
    assert torch.equal(net.head.weight, head)


def numel(group):
    return sum(shape.numel() for shape in group.shapes.values())


def test_groups_of_swin_tiny():
    """Four stages, four learngene parts: 2, 2, 6 and 2 blocks; W-MSA and SW-MSA share, the index of positions is no parameter."""
    args = al.settings(["--size", "swin_t", "--image-size", "224"])
    with torch.device("meta"):
        net, ours = torchvision.models.swin_t(), al.backbone(args, (2, 2, 6, 2), 1000)
    groups = al.block_groups(net)
    assert [len(group.blocks) for group in groups] == [2, 2, 6, 2]
    assert [numel(group) for group in groups] == [112_347, 445_878, 1_776_492, 7_091_928]
    assert groups[2].blocks == [f"features.5.{i}" for i in range(6)]
    assert all("attn.relative_position_bias_table" in g.shapes and "attn.relative_position_index" not in g.shapes for g in groups)
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in net.named_parameters()}
    stem = sum(p.numel() for p in al.stem_of(net).values())
    assert stem + sum(len(g.blocks) * numel(g) for g in groups) + net.head.weight.numel() + 1000 == 28_288_354


def test_groups_of_torchvisions_vit():
    """EncoderBlock holds an MLPBlock: only the outer one is a block."""
    with torch.device("meta"):
        (group,) = al.block_groups(torchvision.models.vit_b_16())
    assert group.blocks == [f"encoder.layers.encoder_layer_{i}" for i in range(12)] and numel(group) == 7_087_872
    (group,) = al.block_groups(small_vit(3))
    assert group.blocks == ["blocks.0", "blocks.1", "blocks.2"]


@pytest.mark.parametrize("depths", [(2, 6), (1, 3)])
def test_a_filled_swin_is_the_hand_sum_within_each_stage(depths):
    """Every stage counts its own layers: x = (l - 1) / L_s."""
    torch.manual_seed(0)
    args = al.settings(["--size", "drawn-swin", "--image-size", "32"])
    net, settings = al.backbone(args, depths, 5), {"basis": "chebyshev", "first_order": 0, "init": "delta"}
    before = {n: b.clone() for n, b in net.named_buffers()}
    genes = [al.new_learngene(net, "delta") for _ in range(2)]
    for p in itertools.chain(*(gene.parameters() for gene in genes)):
        nn.init.normal_(p, std=0.1)
    theta = [torch.stack([al.flat(gene[g]) for gene in genes]).detach() for g in range(2)]
    al.fill(net, theta, al.stem_of(net), (1, 1), settings)
    for g, stage in enumerate((net.features[1], net.features[3])):
        assert len(stage) == depths[g]
        for l, block in enumerate(stage):
            for name, p in block.named_parameters():
                first, second = (dict(gene[g].named_parameters())[name] for gene in genes)
                offset = 1.0 if name in ("norm1.weight", "norm2.weight") else 0.0
                torch.testing.assert_close(p, offset + first + l / depths[g] * second, atol=1e-6, rtol=1e-5)
    assert all(torch.equal(b, before[n]) for n, b in net.named_buffers())
    assert net(torch.randn(2, 3, 32, 32)).isfinite().all()


# ----------------------------------------------------------------------------------------------------------------------
# Eq. (4)
# ----------------------------------------------------------------------------------------------------------------------

def test_eq_4_by_hand():
    """Predicted (0.7, 0.2, 0.1) and (0.1, 0.1, 0.8); as classes, as one-hot rows, as probabilities (TLEG's soft labels)."""
    y_hat = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]).log() + torch.tensor([[3.0], [-2.0]])      # constants do not matter
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


# ----------------------------------------------------------------------------------------------------------------------
# Eqs. (5), (6), (7)
# ----------------------------------------------------------------------------------------------------------------------

def test_eq_5_by_hand():
    """p = 0.5, 0.8, 0.1: (0.25 ln 0.5 + 0.04 ln 0.8 + 0.81 ln 0.1) / 3 - 0.01 x 2 = -0.7024."""
    logits, G = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.1, 0.2, 0.7]]).log(), torch.tensor([1., 0., 1.])
    by_hand = (0.25 * math.log(0.5) + 0.04 * math.log(0.8) + 0.81 * math.log(0.1)) / 3 - 0.01 * 2
    assert by_hand == pytest.approx(-0.7024, abs=1e-4)
    y = torch.tensor([0, 1, 0])
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


def test_eqs_6_and_7_exactly_by_all_selections():
    """With 3 learngenes there are 8 selections: sum_G pi(G) times policy_loss's gradient is minus the gradient of
    J = sum_G pi(G) r(G), here by central differences in plain Python; whatever the baseline b."""
    phi, r = [0.4, -0.7, 1.1], [0.0, -1.0, 0.5, 2.0, -0.3, 0.8, -2.0, 0.1]
    G = every_selection(3)
    J = lambda phi: sum(plain_pi(phi, g) * reward for g, reward in zip(G.tolist(), r))
    exact = [(J([f + 1e-5 * (i == n) for i, f in enumerate(phi)]) - J([f - 1e-5 * (i == n) for i, f in enumerate(phi)])) / 2e-5
             for n in range(3)]
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
    value = lambda G: (G @ torch.tensor([1.0, -2.0, 0.5, 0.3], dtype=torch.float64)) + 2 * G[:, 0] * G[:, 1]
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
        ours = al.log_policy(torch.tensor(phi, dtype=torch.float64) + shift, torch.tensor(subsets, dtype=torch.float64), k).exp()
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
    seen = Counter(map(tuple, al.sample_policy(torch.tensor(phi, dtype=torch.float64), n, k, data.generator(3)).int().tolist()))
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


# ----------------------------------------------------------------------------------------------------------------------
# Training of learngenes
# ----------------------------------------------------------------------------------------------------------------------

STREAM = [f"digits/3#{n}" for n in (1, 2, 3)]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """One cache of the shortened tasks."""
    folder = tmp_path_factory.mktemp("data")
    data.load_many(list(SIZES), str(folder), 32)
    return folder


def flags(drawn, output, *more):
    return [*TINY, "--data-dir", str(drawn), "--output", str(output), *(word for text in more for word in str(text).split())]


@pytest.fixture(scope="module")
def made(drawn, tmp_path_factory):
    """A run directory whose pool/ has the three learngenes of --stream; and what the pool was after each of them."""
    folder, states = tmp_path_factory.mktemp("made"), []
    for name in STREAM:
        al.main(flags(drawn, folder, "--data", name))
        states.append(snapshot(folder / "pool"))
    al.main(flags(drawn, folder))                            # all three at once: known, passed over
    assert snapshot(folder / "pool") == states[-1]
    return folder, states


@pytest.fixture(scope="module")
def other(drawn, tmp_path_factory):
    """The pool of another seed, two learngenes."""
    folder = tmp_path_factory.mktemp("other")
    al.main(flags(drawn, folder, "--data", ",".join(STREAM[:2]), "--seed 1"))
    return folder / "pool"


def records_of(pool):
    return [torch.load(file, weights_only=True) for file in sorted(Path(pool).glob("learngene-*.pt"))]


def open_pool(drawn, output, *more):
    return al.open_pool(al.settings(flags(drawn, output, *more)), CPU)


def task_of(drawn, name, size=32):
    return data.load_many([name], str(drawn), size)[name]


def copy_of(made, tmp_path, learngenes=3):
    """A run directory with a copy of the first few learngenes and nothing else."""
    (tmp_path / "run" / "pool").mkdir(parents=True)
    for n in range(1, learngenes + 1):
        shutil.copy(made[0] / "pool" / f"learngene-{n:02d}.pt", tmp_path / "run" / "pool")
    return tmp_path / "run"


def hand_vit(records, G, depth=2, classes=None, learngenes=None):
    """A ViT composed of the files alone, sum by sum, as float64; Chebyshev polynomials from numpy."""
    net = small_vit(depth, classes or 2).double()
    state = {n: p.double() for n, p in records[0]["stem"].items()}
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


def test_only_the_new_learngene_and_its_head_are_trained(made):
    """Files of older learngenes, the stem with them, are the same bytes; what trains is in the checkpoints of the training."""
    folder, states = made
    for before, after in zip(states, states[1:]):
        assert len(after) == len(before) + 1 and before.items() <= after.items()
    records = records_of(folder / "pool")
    assert [bool(r["stem"]) for r in records] == [True, False, False]
    assert [len(r["head"]["bias"]) for r in records] == [4, 3, 3]
    for n in (1, 2, 3):
        trained = {k.split(".")[0] for k in torch.load(folder / f"ancestry-{n:02d}.pt", weights_only=True)["model"]}
        assert trained == ({"gene", "head", "stem"} if n == 1 else {"gene", "head"})
    assert [r["number"] for r in records] == [1, 2, 3] and [r["dataset"] for r in records] == STREAM
    assert [r["parent"] for r in records] == ["", records[0]["hash"], records[1]["hash"]]


def test_a_shared_stem_trains_on(drawn, tmp_path):
    """--stem shared: every file has a stem of its own, descendants get the last one, older learngenes stay as they are."""
    al.main(flags(drawn, tmp_path, "--data", STREAM[0], "--stem shared"))
    before = snapshot(tmp_path / "pool")
    al.main(flags(drawn, tmp_path, "--data", STREAM[1], "--stem shared"))
    assert before.items() <= snapshot(tmp_path / "pool").items()
    first, second = records_of(tmp_path / "pool")
    assert first["stem"].keys() == second["stem"].keys()
    assert not any(torch.equal(first["stem"][n], second["stem"][n]) for n in first["stem"])
    net = al.fill_from(open_pool(drawn, tmp_path, "--stem", "shared"), small_vit(), (1, 0))
    assert all(torch.equal(p, second["stem"][n]) for n, p in al.stem_of(net).items())
    al.main(flags(drawn, tmp_path, "--data", STREAM[2], "--stem shared --ancestry-epochs 0"))              # starts where it was
    assert same(records_of(tmp_path / "pool")[2]["stem"], second["stem"])


def test_a_half_trained_learngene_of_another_pool_is_refused(drawn, made, other, tmp_path, capsys):
    """The checkpoint of learngene 2, beside a pool whose learngene 1 is not the one it was trained on."""
    (tmp_path / "pool").mkdir()
    shutil.copy(other / "learngene-01.pt", tmp_path / "pool"), shutil.copy(made[0] / "ancestry-02.pt", tmp_path)
    before = snapshot(tmp_path)
    refuses(capsys, lambda: al.main(flags(drawn, tmp_path, "--data", STREAM[1])), "ancestry-02.pt holds parent")
    assert snapshot(tmp_path) == before


def test_logits_of_earlier_datasets_are_bit_identical(drawn, made):
    """Read again from disk after all three datasets: the hash that was written when each was learned. The same network by plain
    sums has these logits and the recorded accuracy; and one more learngene would change them."""
    args, pool = al.settings(flags(drawn, made[0])), open_pool(drawn, made[0])
    for n, record in enumerate(pool.records, 1):
        task = task_of(drawn, record["dataset"])
        logits = al.own_logits(args, pool, n, task)
        assert al.logits_hash(logits) == record["logits"]
        net = hand_vit(pool.records, (1,) * n, classes=task.num_classes)
        net.head.load_state_dict(record["head"])
        x, y = task.examples("val")
        with torch.no_grad():
            torch.testing.assert_close(logits, net(x.double()).float(), atol=1e-4, rtol=1e-4)
            assert record["val"] == pytest.approx(100 * (logits.argmax(1) == y).sum().item() / len(y))
            if n < 3:
                more = al.fill_from(pool, small_vit(2, task.num_classes).eval(), (1,) * 3)
                more.head.load_state_dict(record["head"])
                assert al.logits_hash(more(x)) != record["logits"]
    said = [(r["learngene"], r["kept"], r["earlier"]) for r in log_of(made[0], "pool")]
    assert said == [(1, 0, 0), (2, 0, 0), (3, 0, 0)]         # each run had one dataset at hand


def test_a_run_over_all_datasets_reports_what_was_kept(drawn, made, tmp_path):
    """Ten datasets in one run, or one run after another: the same pool. Earlier logits are counted, all are kept."""
    al.main(flags(drawn, tmp_path))
    assert [r["hash"] for r in records_of(tmp_path / "pool")] == [r["hash"] for r in records_of(made[0] / "pool")]
    assert [(r["kept"], r["earlier"]) for r in log_of(tmp_path, "pool")] == [(0, 0), (1, 1), (2, 2)]
    (alone,) = log_of(tmp_path, "alone")
    assert alone["datasets"] == STREAM and np.array(alone["table"]).shape == (4, 3)       # and a network without learngenes


def test_the_training_of_a_learngene_written_out(drawn, made, tmp_path):
    """Learngene 3 on top of two frozen ones, eight steps: every Theta_l as a sum of three terms, plain AdamW, clipping, cosine;
    in some steps older learngenes sit out."""
    folder = copy_of(made, tmp_path, 2)
    argv = flags(drawn, folder, "--data", STREAM[2], "--ancestry-epochs", 4, "--lr", 5e-3)
    args, task, old = al.settings(argv), task_of(drawn, STREAM[2]), records_of(folder / "pool")
    al.main(argv)
    steps = math.ceil(4 * len(task.labels["train"]) / 20)
    masks = al.gene_masks(steps, 2, args, 3)
    assert steps == 8 and 0 < masks.all(1).sum() < steps
    torch.manual_seed(3)                                     # seed 0, learngene 3
    net = small_vit(2, 1)
    net.head = nn.Identity()
    gene, head = al.new_learngene(net, "delta", first=False)[0], al.new_head(32, 3)
    net.load_state_dict(old[0]["stem"], strict=False)
    matrices = [p for p in [*gene.parameters(), *head.parameters()] if p.ndim > 1]
    vectors = [p for p in [*gene.parameters(), *head.parameters()] if p.ndim == 1]
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=0.05), dict(params=vectors, weight_decay=0.0)], lr=5e-3)
    for step in range(steps):
        weights = {}
        for l in range(2):
            a = (1, l / 2, 2 * (l / 2) ** 2 - 1)
            for name, p in gene.named_parameters():
                parts = [masks[step, n] * a[n] * old[n]["gene"][f"0.{name}"] for n in range(2)]
                weights[f"blocks.{l}.{name}"] = float(name in ("norm1.weight", "norm2.weight")) + parts[0] + parts[1] + a[2] * p
        x, y = task.batch("train", step, 20, 0, True)
        y_hat = head(functional_call(net, weights, (x,)))
        loss = -y_hat.log_softmax(1)[range(20), y].sum() / 20
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(matrices + vectors, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * common.cosine_lr(step, steps, round(0.05 * steps))
        optimizer.step()
    record = records_of(folder / "pool")[2]
    for name, p in gene.named_parameters():
        torch.testing.assert_close(record["gene"][f"0.{name}"], p.detach(), atol=2e-5, rtol=1e-3)
    torch.testing.assert_close(record["head"]["weight"], head.weight.detach(), atol=2e-5, rtol=1e-3)


def test_gene_masks():
    """All learngenes in half of the steps, each with chance 1/5 in the others; of seed and number alone."""
    args, other = (al.settings(f"--gene-dropout 0.4 --gene-keep 0.3 --seed {seed}".split()) for seed in (0, 1))
    torch.manual_seed(1)
    masks = al.gene_masks(20000, 5, args, 6)
    state = torch.get_rng_state()
    assert torch.equal(al.gene_masks(20000, 5, args, 6), masks) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(al.gene_masks(20000, 5, args, 7), masks)
    assert not torch.equal(al.gene_masks(20000, 5, other, 6), masks)
    assert masks.shape == (20000, 5) and set(masks.unique().tolist()) == {0, 1}
    near = lambda value, p: abs(value - p) < 5 * math.sqrt(p * (1 - p) / 20000)
    assert near(masks.all(1).float().mean().item(), 0.6 + 0.4 * 0.3 ** 5)
    assert near((masks.sum(1) == 0).float().mean().item(), 0.4 * 0.7 ** 5)
    assert all(near(column, 0.6 + 0.4 * 0.3) for column in masks.mean(0).tolist())
    counts = torch.bincount(masks.sum(1).int(), minlength=6).tolist()                     # learngenes sit out independently
    assert all(near(counts[k] / 20000, 0.4 * math.comb(5, k) * 0.3 ** k * 0.7 ** (5 - k)) for k in range(1, 5))
    assert al.gene_masks(50, 3, al.settings(["--gene-dropout", "0"]), 2).all()
    assert not al.gene_masks(50, 3, al.settings(["--gene-dropout", "1", "--gene-keep", "0"]), 2).any()
    assert al.gene_masks(50, 0, args, 1).all(1).all()                                      # the first learngene has no older ones


@pytest.mark.parametrize("init", ["delta", "block", "zero"])
def test_layer_norms_of_fresh_learngenes(init):
    """delta: gains of 1 for every selection. block: the sum of the coefficients, which swings. zero: learngene 1's alone."""
    settings = {"basis": "chebyshev", "first_order": 0, "init": init}
    genes = [al.new_learngene(small_vit(), init, first=n == 0) for n in range(4)]
    theta = [torch.stack([al.flat(gene[0]) for gene in genes]).detach()]
    T = np.polynomial.chebyshev.chebvander(np.arange(6) / 6, 3)
    for G in ((1, 1, 1, 1), (1, 0, 0, 0), (0, 1, 0, 1), (0, 0, 1, 0)):
        net = al.fill(small_vit(6), theta, {}, G, settings)
        for l, block in enumerate(net.blocks):
            gain = {"delta": 1.0, "block": float(T[l] @ np.array(G)), "zero": float(G[0])}[init]
            for norm in (block.norm1, block.norm2):
                assert norm.weight.tolist() == pytest.approx([gain] * 32, abs=1e-6) and not norm.bias.any()
            assert not block.attn.qkv.bias.any() and not block.mlp.fc1.bias.any()


@pytest.mark.parametrize("init, scale, first, std", [
    ("delta", 1.0, True, 0.02), ("delta", 0.5, True, 0.02), ("delta", 0.5, False, 0.01), ("block", 2.0, False, 0.04),
    ("zero", 1.0, True, 0.02), ("zero", 1.0, False, 0.0)])
def test_matrices_of_fresh_learngenes(init, scale, first, std):
    torch.manual_seed(0)
    gene = al.new_learngene(small_vit(width=64), init, scale, first)
    for name, p in gene.named_parameters():
        assert p.requires_grad
        if p.ndim > 1:
            assert p.std().item() == pytest.approx(std, rel=0.05) and abs(p.mean().item()) <= std / 20


def test_a_zero_learngene_starts_as_the_network_was(drawn, tmp_path):
    """--init zero, no training: dataset 2's network is dataset 1's, and yet the new learngene has a gradient."""
    al.main(flags(drawn, tmp_path, "--data", ",".join(STREAM[:2]), "--init zero --ancestry-epochs 0"))
    records = records_of(tmp_path / "pool")
    assert not any(p.any() for p in records[1]["gene"].values())
    pool, x = open_pool(drawn, tmp_path, "--init", "zero"), task_of(drawn, "kinds").examples("val")[0]
    one, two = (al.fill_from(pool, small_vit().eval(), (1,) * n, n) for n in (1, 2))
    assert torch.equal(one.encode(x), two.encode(x))
    net = two.requires_grad_(False)
    net.head = nn.Identity()
    gene = al.new_learngene(net, "zero", first=False)
    forward = al.composed_forward(net, al.block_groups(net), [gene], lambda f: f, [al.coefficients(2, 2)[:, 1:]],
                                  lambda step: [al.compose(pool.theta(1)[0], al.coefficients(2, 1))])
    (forward(x, 0) * torch.randn(32)).sum().backward()
    assert gene[0].mlp.fc2.weight.grad.norm() > 0 and gene[0].attn.qkv.weight.grad.norm() > 0


# ----------------------------------------------------------------------------------------------------------------------
# The pool on disk
# ----------------------------------------------------------------------------------------------------------------------

def rewrite(file, change):
    """Loads, changes and saves a learngene's file as somebody with torch would."""
    record = torch.load(file, weights_only=True)
    change(record)
    torch.save(record, file)


def test_files_say_what_they_are(made):
    record = records_of(made[0] / "pool")[1]
    assert record["class_names"] == [data.SPECS["digits"].class_names[k] for k in data.class_subsets(10, 3)[1]]
    assert record["counts"] == {"train": 36, "val": 18, "test": 18} and record["depths"] == [2] and record["seed"] == 0
    assert record["settings"] == {"size": "drawn-tiny", "image_size": 32, "patch": 16, "pool": "avg", "basis": "chebyshev",
                                  "first_order": 0, "init": "delta", "stem": "frozen"}


def bump(part, name):
    def change(record):
        record[part][name].view(-1)[3] += 1e-6
    return change


def changed(number, change):
    return lambda pool, _: rewrite(pool / f"learngene-{number:02d}.pt", change)


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])


DAMAGES = {
    "one number of a learngene": (changed(2, bump("gene", "0.mlp.fc1.weight")), "learngene-02.pt was changed"),
    "one number of the stem": (changed(1, bump("stem", "pos_embed")), "learngene-01.pt was changed"),
    "one number of a head": (changed(3, bump("head", "weight")), "learngene-03.pt was changed"),
    "its accuracy": (changed(3, lambda r: r.update(val=99.0)), "learngene-03.pt was changed"),
    "its settings": (changed(1, lambda r: r["settings"].update(basis="legendre")), "learngene-01.pt was changed"),
    "its hash": (changed(1, lambda r: r.update(hash="0" * 64)), "learngene-01.pt was changed"),
    "a file of another pool in place 2": (lambda pool, other: shutil.copy(other / "learngene-02.pt", pool), "another lineage"),
    "a file of another pool in place 1": (lambda pool, other: shutil.copy(other / "learngene-01.pt", pool), "another lineage"),
    "another place": (lambda pool, _: shutil.copy(pool / "learngene-01.pt", pool / "learngene-04.pt"), "another lineage"),
    "a hole": (lambda pool, _: (pool / "learngene-02.pt").unlink(), "learngene-03.pt where learngene-02.pt should be"),
    "no first": (lambda pool, _: (pool / "learngene-01.pt").unlink(), "learngene-02.pt where learngene-01.pt should be"),
    "half a file": (lambda pool, _: cut(pool / "learngene-03.pt", 5000), "learngene-03.pt is not a readable checkpoint"),
    "an empty file": (lambda pool, _: cut(pool / "learngene-01.pt", 0), "learngene-01.pt is not a readable checkpoint"),
    "a checkpoint of a training": (lambda pool, _: shutil.copy(pool.parent / "ancestry-02.pt", pool / "learngene-04.pt"),
                                   "learngene-04.pt holds stage"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_pool_is_refused_and_left_alone(damage, drawn, made, other, tmp_path, capsys):
    """For reading and for learning on: one sentence that names the file, and no byte changes."""
    folder = copy_of(made, tmp_path)
    shutil.copy(made[0] / "ancestry-02.pt", folder)
    act, words = DAMAGES[damage]
    act(folder / "pool", other)
    before = snapshot(tmp_path)
    for more in (("--stage", "select", "--data", "kinds"), ("--data", "pedestrian")):
        refuses(capsys, lambda: al.main(flags(drawn, folder, *more)), words)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("more, words", [
    ("--size drawn-small", "size drawn-tiny, asked for drawn-small"), ("--patch 8", "patch 16, asked for 8"),
    ("--image-size 48", "image_size 32, asked for 48"), ("--pool-type token", "pool avg, asked for token"),
    ("--basis legendre", "basis chebyshev, asked for legendre"), ("--first-order 1", "first_order 0, asked for 1"),
    ("--init block", "init delta, asked for block"), ("--size drawn-swin", "size drawn-tiny, asked for drawn-swin")])
def test_a_pool_of_another_kind_is_refused(more, words, drawn, made, capsys):
    before = snapshot(made[0])
    refuses(capsys, lambda: al.main(flags(drawn, made[0], *more.split(), "--data pedestrian")), words)
    assert snapshot(made[0]) == before


@pytest.mark.parametrize("where", ["rename", "save"])
def test_a_crash_while_sealing_leaves_the_old_pool(where, drawn, made, tmp_path, monkeypatch):
    """The disk fails in the middle of learngene-02.pt, or just before it gets its name. Started again, the run ends with the very
    learngene that an undisturbed one has."""
    folder = copy_of(made, tmp_path, 1)
    before = snapshot(folder / "pool")
    real = {"rename": os.replace, "save": torch.save}[where]

    def failing(*arguments):
        target = Path(arguments[-1])
        if target.parent.name == "pool":
            if where == "save":
                target.write_bytes(b"half")
            raise OSError("no space left on device")
        return real(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(*((common.os, "replace") if where == "rename" else (torch, "save")), failing)
        with pytest.raises(OSError, match="no space left"):
            al.main(flags(drawn, folder, "--data", STREAM[1]))
    assert snapshot(folder / "pool") == before and len(open_pool(drawn, folder)) == 1
    (folder / "pool" / ".learngene-02.pt.999.tmp").write_bytes(b"half")                   # what a power cut would have left
    al.main(flags(drawn, folder, "--data", STREAM[1]))
    assert records_of(folder / "pool")[1]["hash"] == records_of(made[0] / "pool")[1]["hash"]


def write_images(folder, classes, count, seed=0):
    rng = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = torch.from_numpy(rng.integers(0, 256, (3, 40, 36), dtype=np.uint8))
            torchvision.transforms.functional.to_pil_image(pixels).save(folder / name / f"{i}.png")


def test_a_folder_of_images_is_one_more_learngene(drawn, made, tmp_path, capsys):
    """Appended at the end, older files untouched. The same folder is passed over; with a class or an image more it is refused."""
    folder, images = copy_of(made, tmp_path, 2), tmp_path / "mine"
    write_images(images, ("ant", "bee", "cow"), 5)
    before = snapshot(folder / "pool")
    al.main(flags(drawn, folder, "--data", images))
    after = snapshot(folder / "pool")
    assert before.items() < after.items() and len(after) == 3
    record = records_of(folder / "pool")[2]
    assert (record["dataset"], record["class_names"], record["counts"]["train"]) == (str(images), ["ant", "bee", "cow"], 12)
    al.main(flags(drawn, folder, "--data", images))
    assert snapshot(folder / "pool") == after
    write_images(images, ("dog",), 5)
    refuses(capsys, lambda: al.main(flags(drawn, folder, "--data", images)), "3 classes", "now has 4", "another name")
    shutil.rmtree(images / "dog")
    write_images(images, ("cow",), 10)
    refuses(capsys, lambda: al.main(flags(drawn, folder, "--data", images)), "12", "another name")
    assert snapshot(folder / "pool") == after


def tiny_record(n):
    return dict(gene={"0.w": torch.full((2,), float(n))}, stem={}, head={}, dataset=f"d{n}", class_names=["a", "b"], counts={})


def test_theta_has_a_row_per_learngene(tmp_path):
    pool = al.Pool(tmp_path, {"size": "x"}, torch.device("cpu"))
    for n in (1, 2, 3):
        pool.add(**tiny_record(n))
        pool.seal(logits="", val=0.0)
    for again in (pool, al.Pool(tmp_path, {"size": "x"}, torch.device("cpu"))):
        assert again.theta(3)[0].tolist() == [[1, 1], [2, 2], [3, 3]] and again.theta(2)[0].tolist() == [[1, 1], [2, 2]]
        assert len(again) == 3


def test_a_pool_of_more_than_a_hundred(tmp_path):
    pool = al.Pool(tmp_path, {}, torch.device("cpu"))
    for n in range(1, 102):
        pool.add(**tiny_record(n))
        pool.seal(logits="", val=0.0)
    assert len(al.Pool(tmp_path, {}, torch.device("cpu"))) == 101


def test_a_pool_in_the_run_directory_itself(drawn, tmp_path, monkeypatch):
    """Refused before anything is written, or resumable."""
    argv = flags(drawn, tmp_path / "run", "--pool", tmp_path / "run", "--data", STREAM[0])
    with monkeypatch.context() as patch:
        patch.setattr(al, "own_logits", lambda *_: 1 / 0)    # stops after the training, before the pool is written
        try:
            al.main(argv)
        except SystemExit:
            assert not (tmp_path / "run").exists()
            return
        except ZeroDivisionError:
            pass
    al.main(argv)
    assert len(open_pool(drawn, tmp_path / "run", "--pool", tmp_path / "run")) == 1


# ----------------------------------------------------------------------------------------------------------------------
# TALS: the heads that stand in for p_y(x), the reward set, and the search
# ----------------------------------------------------------------------------------------------------------------------

def features(B=24, D=6, C=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(B) % C
    return torch.randn(B, D, generator=generator) + torch.eye(C, D)[y] * 1.5 + 3, y[torch.randperm(B, generator=generator)]


def test_class_means_leave_the_image_itself_out():
    """For every image the class means are computed anew without it, one cosine at a time; the centre is that of all images."""
    f, y = features()
    centred = (f - f.mean(0)).double()
    unit = [v / v.norm() for v in centred]
    for i in range(len(f)):
        for c in range(4):
            mean = sum(unit[j] for j in range(len(f)) if y[j] == c and j != i)
            expected = 10 * float(unit[i] @ mean / mean.norm())
            assert al.ncm_logits(f, y, 4)[i, c].item() == pytest.approx(expected, abs=1e-4), (i, c)


def test_class_means_with_two_images_per_class_and_an_absent_class():
    """Images at (1, 0), (0, -1) and (0, 1), (-1, 0): each is compared to the other of its class, not to itself."""
    f, y = torch.tensor([[1., 0.], [0., 1.], [-1., 0.], [0., -1.]]), torch.tensor([0, 1, 1, 0])
    logits = al.ncm_logits(f, y, 3)
    # image 0 beside (0, -1) of its own class, the sum (-1, 1) of class 1, and nothing of class 2
    assert logits[0].tolist() == pytest.approx([0, -10 / 2 ** 0.5, 0], abs=1e-5)
    assert al.ncm_logits(f, y, 3, temperature=1.0)[1].tolist() == pytest.approx([-1 / 2 ** 0.5, 0, 0], abs=1e-5)
    f = torch.tensor([[2., 1.], [2., -1.], [-2., 1.], [-2., -1.]])
    logits, own, away = al.ncm_logits(f, torch.tensor([0, 0, 1, 1]), 2), 10 * (4 - 1) / 5, -10 * 2 / 5 ** 0.5
    assert logits.tolist() == [pytest.approx([own, away], rel=1e-5)] * 2 + [pytest.approx([away, own], rel=1e-5)] * 2


def test_class_means_of_pure_noise_are_at_chance():
    """Without leaving the image out, 40 images of 64 noise features and 20 classes would look learnable."""
    generator, hits = torch.Generator().manual_seed(0), 0
    for _ in range(50):
        f, y = torch.randn(40, 64, generator=generator), torch.arange(40) % 20
        hits += (al.ncm_logits(f, y, 20).argmax(1) == y).sum().item()
        means = torch.stack([f[y == c].mean(0) for c in range(20)])
        assert ((f @ means.T).argmax(1) == y).float().mean() > 0.5
    assert hits / 2000 < 0.08                                # chance 0.05, minus what leaving out costs


def test_ridge_is_refitted_without_each_image():
    """Brute force: features and targets centred with all images, the ridge fixed from all; then one solve per image left out."""
    f, y = features()
    X, Y = (f - f.mean(0)).double(), F.one_hot(y, 4).double()
    Y = Y - Y.mean(0)
    ridge = 0.1 * float(torch.linalg.eigvalsh(X.T @ X).mean())
    logits = al.ridge_logits(f, y, 4)
    for i in range(len(f)):
        rest = [j for j in range(len(f)) if j != i]
        W = np.linalg.solve((X[rest].T @ X[rest] + ridge * torch.eye(6)).numpy(), (X[rest].T @ Y[rest]).numpy())
        assert logits[i].tolist() == pytest.approx((10 * X[i].numpy() @ W).tolist(), abs=1e-4)


def noise_task(counts, name="noise", size=8, seed=0):
    """A task with so many training images per class, all of them noise."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    labels = {"train": y, "val": np.array([0, 1]), "test": np.array([0, 1])}
    images = {s: rng.integers(0, 256, (len(l), 3, size, size), dtype=np.uint8) for s, l in labels.items()}
    return data.make_task(name, [f"c{i}" for i in range(len(counts))], images, labels)


def test_reward_rows():
    """A tenth of every class, at least two images; of the seed alone; in the order of the task."""
    task = noise_task([100, 30, 9, 2])
    rows = al.reward_rows(task, 0.1, seed=5)
    assert torch.bincount(task.labels["train"][rows]).tolist() == [10, 3, 2, 2]
    assert rows.tolist() == sorted(set(rows.tolist()))
    torch.manual_seed(99)
    assert torch.equal(al.reward_rows(task, 0.1, seed=5), rows) and not torch.equal(al.reward_rows(task, 0.1, seed=6), rows)
    assert al.reward_rows(task, 1.0, seed=5).tolist() == list(range(141)) and len(al.reward_rows(task, 0.0, seed=5)) == 8


def test_one_image_of_a_class_is_refused(capsys):
    refuses(capsys, lambda: al.reward_rows(noise_task([5, 1, 4]), 0.1, 0), "'c1' of noise has 1 training image")


def test_patch_labels_by_hand():
    """Four patches of 2 x 2: three of class 1; half labelled, all 2; one labelled of four: ignored; a tie, which the lower class
    wins. As one patch: 3, 4 and 4 pixels of the classes, 11 of 16 labelled."""
    masks = torch.tensor([[[1, 1, 255, 2],
                           [1, 0, 255, 2],
                           [255, 255, 0, 2],
                           [255, 1, 2, 0]]], dtype=torch.uint8)
    assert al.patch_labels(masks, 2, 3).tolist() == [[1, 2, data.IGNORED, 0]]
    assert al.patch_labels(masks, 4, 3).tolist() == [[1]]

# ---- a synthetic reward table ----

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


def search_args(*more):
    return al.settings(["--stage", "select", "--data", "kinds", *map(str, more)])


@pytest.mark.parametrize("genes", [0, 4])
def test_reinforce_finds_what_exhaustive_finds(genes):
    """Ten landscapes of 1,023 (or 210) subsets, default steps and samples: within 0.02 of the best, 9 times or more."""
    gaps, visited = [], []
    for seed in range(10):
        value = landscape(seed)
        best = max(value(G) for G in itertools.product((0, 1), repeat=10) if (sum(G) == genes if genes else any(G)))
        everything, _ = rewards_of(value)
        al.exhaustive(everything, search_args("--genes", genes))
        assert len(everything.seen) == (math.comb(10, genes) if genes else 1023)
        assert everything.seen[everything.best(genes)][0] == pytest.approx(best)
        rewards, calls = rewards_of(value)
        pi = al.reinforce(rewards, search_args("--genes", genes), data.generator(seed))
        assert pi.shape == (10,) and ((0 <= pi) & (pi <= 1)).all()
        assert all(sum(G) == genes if genes else any(G) for G in calls)
        gaps.append(best - rewards.seen[rewards.best(genes)][0])
        visited.append(len(calls))
    assert all(gap > -1e-9 for gap in gaps) and sum(gap <= 0.02 for gap in gaps) >= 9, gaps
    assert genes or max(visited) < 1023 * 0.8                # not by looking at everything


def test_reinforce_moves_its_baseline_after_use(monkeypatch):
    """b: first the mean of the first rewards, then 0.9 b + 0.1 mean(r), each used one step later (Eq. (7))."""
    used, seen, loss = [], [], al.policy_loss

    def spy(log_pi, r, b, scale=1.0):
        used.append(float(b)), seen.append(float(r.mean()))
        return loss(log_pi, r, b, scale)
    monkeypatch.setattr(al, "policy_loss", spy)
    rewards, _ = rewards_of(landscape(0))
    al.reinforce(rewards, search_args("--select-steps", 6), data.generator(0))
    b = seen[0]
    for step in range(6):
        assert used[step] == pytest.approx(b)
        b = 0.9 * b + 0.1 * seen[step]


def test_the_policy_learns_to_be_sure():
    """One learngene decides everything: its probability goes up, the others', who cost 0.3 each, go down."""
    rewards, _ = rewards_of(lambda G: 2 * G[3] - 0.3 * sum(G), 6)
    pi = al.reinforce(rewards, search_args(), data.generator(0))
    assert pi[3] > 0.95 and all(pi[n] < 0.2 for n in range(6) if n != 3)
    assert rewards.best() == (0, 0, 0, 1, 0, 0)


def test_greedy_by_hand():
    """1 alone is best (0.5); 2 adds 0.3 to it; nothing adds to both. The best pair (3, 4) is out of its sight."""
    table = {(1, 0, 0, 0): 0.5, (0, 1, 0, 0): 0.4, (0, 0, 1, 0): 0.1, (0, 0, 0, 1): 0.0, (1, 1, 0, 0): 0.8, (0, 0, 1, 1): 0.95}
    value = lambda G: table.get(tuple(map(int, G)), 0.2)
    rewards, calls = rewards_of(value, 4)
    al.greedy(rewards, search_args())
    assert len(calls) == 4 + 3 + 2 and rewards.best() == (1, 1, 0, 0)
    rewards, calls = rewards_of(value, 4)
    al.greedy(rewards, search_args("--genes", 3))            # goes on until there are three, helpful or not
    assert len(calls) == 9 and sum(rewards.best(3)) == 3
    al.exhaustive(rewards, search_args("--genes", 2))
    assert rewards.best(2) == (0, 0, 1, 1)
    rewards, calls = rewards_of(lambda G: G[0], 4)           # nothing helps learngene 1, nothing hurts it: it stays alone
    al.greedy(rewards, search_args())
    assert len(calls) == 4 + 3


def test_rewards_are_computed_once_and_survive_a_restart(tmp_path):
    """Repeats cost nothing; a second start reads the file, also when its last line is torn."""
    path = tmp_path / "rewards.jsonl"
    value = lambda G: G[0] + 0.1 * G[1] - 0.25 * G[2]
    rewards, calls = rewards_of(value, 3, path)
    rows = torch.tensor([[1., 0, 1], [0, 1, 0], [1, 0, 1], [0, 1, 0]])
    assert rewards(rows).tolist() == pytest.approx([0.75, 0.1, 0.75, 0.1]) and rewards(rows[:1]).tolist() == pytest.approx([0.75])
    assert calls == [(1, 0, 1), (0, 1, 0)] and rewards(rows).dtype == torch.float64
    rewards(torch.tensor([[1., 1, 1]]))
    text = path.read_text()
    path.write_text(text[:-7])
    again, calls = rewards_of(value, 3, path)
    assert again(rows).tolist() == rewards(rows).tolist() and not calls
    assert again(torch.tensor([[1., 1, 1]])).tolist() == pytest.approx([0.85]) and calls == [(1, 1, 1)]
    assert again.best() == (1, 1, 1) and again.best(1) == (0, 1, 0) and again.best(2) == (1, 0, 1)


def test_a_torn_line_is_torn_once(tmp_path):
    path = tmp_path / "rewards.jsonl"
    path.write_text('[[1, 0], 0.5, 50.0]\n[[0, 1], 0.2')
    rewards_of(lambda G: 0.2, 2, path)[0](torch.tensor([[0., 1.]]))
    again, calls = rewards_of(lambda G: 0.2, 2, path)
    again(torch.eye(2))
    assert not calls


def test_among_equals_the_first(tmp_path):
    rewards, _ = rewards_of(lambda G: 1.0, 3)
    rewards(torch.tensor([[1., 1, 0], [0, 1, 0], [1, 0, 0]]))
    assert rewards.best() == (0, 1, 0)


# ---- on a pool ----

def lit_task(classes=3, count=12, name="lit"):
    """Every class has its own brightness: any network tells them apart."""
    rng = np.random.default_rng(0)
    labels = {"train": np.repeat(np.arange(classes), count), "val": np.arange(classes), "test": np.arange(classes)}
    light = {s: 20 + 90 * y[:, None, None, None] + rng.integers(0, 20, (len(y), 3, 32, 32)) for s, y in labels.items()}
    return data.make_task(name, [f"c{i}" for i in range(classes)], {s: x.astype(np.uint8) for s, x in light.items()}, labels)


def select(drawn, made, folder, task, *more):
    args = al.settings(flags(drawn, folder, "--stage select --data kinds", *more))
    return al.select(common.Run(folder, {}, CPU), args, CPU, open_pool(drawn, made[0]), task, (3,))


@pytest.mark.parametrize("head", ["ncm", "ridge"])
def test_rewards_of_a_task_from_the_files_alone(head, drawn, made, tmp_path):
    """Three subsets at depth 3: a float64 network of plain sums, its features, the head's formula, Eq. (5) image by image."""
    args = al.settings(flags(drawn, tmp_path, "--stage select --data kinds --reward-head", head, "--reward-share 0.3 --seed 4"))
    task, records = task_of(drawn, "kinds"), records_of(made[0] / "pool")
    rewards, count, chance = al.make_rewards(common.Run(tmp_path, {}, CPU), args, CPU, open_pool(drawn, made[0]), task, (3,))
    rows = al.reward_rows(task, 0.3, 4)
    x, y = task.normalise(task.images["train"][rows]), task.labels["train"][rows]
    assert count == len(y) and chance == pytest.approx(100 * max(Counter(y.tolist()).values()) / len(y))
    for G in ((1, 0, 0), (0, 1, 1), (1, 1, 1)):
        with torch.no_grad():
            f = hand_vit(records, G, depth=3).encode(x.double())
        p = getattr(al, f"{head}_logits")(f.float(), y, 10).double().softmax(1)[range(len(y)), y].tolist()
        by_hand = sum((1 - q) ** 2 * math.log(q) for q in p) / len(p) - 0.01 * sum(G)
        assert rewards(torch.tensor([G])).item() == pytest.approx(by_hand, abs=2e-3)
    assert len(rewards.seen) == 3 and len(list(tmp_path.glob("rewards-*.jsonl"))) == 1


def test_the_trained_reward_head_never_sees_the_reward_set(drawn, made, tmp_path, monkeypatch):
    """It trains on the other 90 % and is asked about the 10 %."""
    seen, fit = [], data.fit
    monkeypatch.setattr(data, "fit", lambda net, task, *more: seen.append(task) or fit(net, task, *more))
    task = task_of(drawn, "kinds")
    G = select(drawn, made, tmp_path, task, "--reward-head trained --reward-images 40 --search exhaustive --genes 2")
    assert sum(G) == 2 and len(seen) == 3 + 3                # the pairs, then one by one
    rows = al.reward_rows(task, 0.1, 0)
    assert all(len(rest.labels["train"]) == 80 - len(rows) for rest in seen)
    kept = torch.cat([task.images["train"][i][None] for i in range(80) if i not in rows.tolist()])
    assert torch.equal(seen[0].images["train"], kept) and seen[0].mean == task.mean


@pytest.mark.parametrize("search", ["reinforce", "exhaustive", "greedy"])
def test_select_says_and_logs_what_it_saw(search, drawn, made, tmp_path, capsys):
    G = select(drawn, made, tmp_path, lit_task(), "--search", search, "--reward-share 0.5")
    (record,) = log_of(tmp_path, "select")
    assert record["learngenes"] == [n for n in (1, 2, 3) if G[n - 1]] and len(G) == 3
    assert set(record["singles"]) == {"1", "2", "3"} and record["search"] == search and record["depths"] == [3]
    assert (record["policy"] is None) == (search != "reinforce")
    said = capsys.readouterr().out
    assert f"lit: learngenes {record['learngenes']} of 3" in said and "no better than chance" not in said
    assert record["accuracy"] > 90 and record["chance"] == pytest.approx(100 / 3)


@pytest.mark.parametrize("head", ["ncm", "ridge"])
def test_a_reward_at_chance_is_a_warning(head, drawn, made, tmp_path, capsys):
    """Noise with random labels: the search ends, and says that its result means nothing."""
    select(drawn, made, tmp_path, noise_task([40, 40], size=32), "--reward-head", head, "--reward-share 0.5")
    assert "warning: that accuracy is no better than chance" in capsys.readouterr().out


@pytest.mark.parametrize("genes", [1, 2, 3])
def test_the_asked_number_of_learngenes(genes, drawn, made, tmp_path):
    assert sum(select(drawn, made, tmp_path, lit_task(), "--genes", genes)) == genes


def test_more_learngenes_than_there_are(drawn, made, tmp_path, capsys):
    refuses(capsys, lambda: select(drawn, made, tmp_path, lit_task(), "--genes 4"), "--genes 4", "has 3 learngenes")


def test_a_trained_reward_head_needs_images_to_train_on(drawn, made, tmp_path, capsys):
    refuses(capsys, lambda: select(drawn, made, tmp_path, lit_task(), "--reward-head trained --reward-share 1"), "--reward-share")


def test_rewards_of_a_changed_folder_are_not_reused(drawn, made, tmp_path):
    """The same folder, the same number of images, other images."""
    for seed in (0, 1):
        write_images(tmp_path / "mine", ("ant", "bee"), 5, seed)
        args = al.settings(flags(drawn, tmp_path, "--stage select --data", tmp_path / "mine"))
        task = task_of(drawn, str(tmp_path / "mine"))
        rewards, _, _ = al.make_rewards(common.Run(tmp_path, {}, CPU), args, CPU, open_pool(drawn, made[0]), task, (2,))
        assert not rewards.seen
        rewards(torch.tensor([[1, 0, 0]]))


def test_selecting_twice_costs_nothing(drawn, made, tmp_path, monkeypatch):
    first = select(drawn, made, tmp_path, lit_task(), "--search exhaustive")
    monkeypatch.setattr(al, "fill_from", lambda *_: pytest.fail("computed again"))
    assert select(drawn, made, tmp_path, lit_task(), "--search exhaustive") == first


def test_a_search_returns_what_it_found_itself(drawn, made, tmp_path):
    """greedy alone, and greedy after exhaustive in the same directory: the same subset, as many looked at."""
    table = {(1, 0, 0): 0.5, (0, 1, 0): 0.2, (0, 0, 1): 0.1, (0, 1, 1): 0.9}
    results = []
    for folder, searches in (("a", ["greedy"]), ("b", ["exhaustive", "greedy"])):
        for search in searches:
            rewards, _ = rewards_of(lambda G: table.get(tuple(map(int, G)), 0.0), 3, tmp_path / f"{folder}.jsonl")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(al, "make_rewards", lambda *_: (rewards, 10, 10.0))
                G = select(drawn, made, tmp_path / folder, lit_task(), "--search", search)
        results.append((G, log_of(tmp_path / folder, "select")[-1]["visited"]))
    assert results[0] == results[1]


def test_rewards_of_other_images_are_not_reused(drawn, made, tmp_path):
    """Scenes drawn at 48 and at 32 pixels are not the same images."""
    for size in (48, 32):
        args = al.settings(flags(drawn, tmp_path, "--stage select --data scenes --scene-size", size))
        task = al.load_tasks(["scenes"], args, CPU)["scenes"]
        assert task.images["train"].shape[-1] == size
        rewards, _, _ = al.make_rewards(common.Run(tmp_path, {}, CPU), args, CPU, open_pool(drawn, made[0]), task, (2,))
        assert not rewards.seen
        rewards(torch.tensor([[1, 0, 0]]))


def test_patches_of_scenes_are_examples(drawn, made, tmp_path):
    """A segmentation task: features of single patches against the commonest class in each; by hand for one subset. Class 5 fills
    one patch alone and is left out."""
    task, records, rng = task_of(drawn, "scenes"), records_of(made[0] / "pool"), np.random.default_rng(0)
    masks = np.kron(rng.integers(0, 3, (12, 2, 2)), np.ones((16, 16))).astype(np.uint8)
    masks[rng.random(masks.shape) < rng.choice([0.1, 0.1, 0.9], (12, 1, 1))] = data.IGNORED
    rows = torch.randperm(12, generator=data.generator(0, 7))[:6]
    masks[rows[0], :16, :16] = 5
    task = dataclasses.replace(task, labels={**task.labels, "train": torch.from_numpy(masks)})
    args = al.settings(flags(drawn, tmp_path, "--stage select --data scenes --reward-share 0.5"))
    rewards, count, chance = al.make_rewards(common.Run(tmp_path, {}, CPU), args, CPU, open_pool(drawn, made[0]), task, (2,))
    net, f, y = hand_vit(records, (1, 0, 1)), [], []
    for i in rows.tolist():
        tokens = net.fc_norm(net.tokens(task.normalise(task.images["train"][i:i + 1]).double()))[0]
        for patch in range(4):
            r, c = 16 * (patch // 2), 16 * (patch % 2)
            labels = Counter(task.labels["train"][i, r:r + 16, c:c + 16].flatten().tolist())
            labelled = sum(n for label, n in labels.items() if label < 9)
            f.append(tokens[patch].detach())
            y.append(max(range(9), key=lambda k: labels[k]) if 2 * labelled >= 256 else 255)
    usable = [i for i in range(24) if y[i] < 9 and Counter(y)[y[i]] > 1]
    f, y = torch.stack([f[i] for i in usable]).float(), torch.tensor([y[i] for i in usable])
    assert set(y.tolist()) == {0, 1, 2} and 9 <= len(y) < 23 and count == len(y)
    assert chance == pytest.approx(100 * max(Counter(y.tolist()).values()) / len(y))
    expected = al.reward(al.ncm_logits(f, y, 9), y, torch.tensor([1., 0., 1.])).item()
    assert rewards(torch.tensor([[1, 0, 1]])).item() == pytest.approx(expected, abs=2e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Descendants
# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("depth", [1, 2, 7])
def test_descendants_are_shallower_or_deeper(depth, drawn, made):
    """Learngenes of two-layer networks in one of any depth: the coefficients are those of the new depth."""
    G, x = (0, 1, 1), task_of(drawn, "kinds").examples("val")[0]
    net = al.fill_from(open_pool(drawn, made[0]), small_vit(depth).eval(), G)
    by_hand = hand_vit(records_of(made[0] / "pool"), G, depth)
    with torch.no_grad():
        torch.testing.assert_close(net.encode(x).double(), by_hand.encode(x.double()), atol=1e-4, rtol=1e-4)


def test_a_descendant_of_fewer_learngenes_has_the_stem_of_then(drawn, tmp_path):
    """--stem shared, first learngene alone: the first stem, not the last."""
    al.main(flags(drawn, tmp_path, "--data", ",".join(STREAM[:2]), "--stem shared"))
    pool = open_pool(drawn, tmp_path, "--stem", "shared")
    for count in (1, 2):
        net = al.fill_from(pool, small_vit(), (1,) * count, count)
        assert torch.equal(net.pos_embed, pool.records[count - 1]["stem"]["pos_embed"])


def test_constrained_training_keeps_eq_8(drawn, made, tmp_path, monkeypatch):
    """Learngenes 1 and 3 of three, four layers: in every step each layer is 1 (gains) + theta_1 + T_2(x) theta_3; only the two
    learngenes and the head train, the stem stays the pool's, and so does the pool."""
    before, used, wanted = snapshot(made[0] / "pool"), [], []

    def spy(net, weights, x):
        used.append([{n: p.detach().clone() for n, p in part.items()} for part in (weights, al.stem_of(net))])
        wanted.extend(p.requires_grad for p in net.parameters())
        return functional_call(net, weights, x)
    monkeypatch.setattr(al, "functional_call", spy)
    args = al.settings(flags(drawn, tmp_path, "--stage train --data kinds --constrained --train-epochs 1 --train-lr 1e-2"))
    pool, records = open_pool(drawn, made[0]), records_of(made[0] / "pool")
    al.train_one(common.Run(tmp_path, {}, CPU), args, CPU, pool, task_of(drawn, "kinds"), (4,), "adaptive", (1, 0, 1), 0)
    (file,) = tmp_path.glob("train-*.pt")
    trained = torch.load(file, weights_only=True)["model"]
    assert {n.split(".")[0] for n in trained} == {"genes", "head"}
    assert {n.split(".")[1] for n in trained if n.startswith("genes")} == {"0", "1"}
    after = [{n.split(".", 2)[2]: p for n, p in trained.items() if n.startswith(f"genes.{k}.")} for k in (0, 1)]
    for weights, genes in ((used[0][0], [records[0]["gene"], records[2]["gene"]]), (used[-1][0], after)):
        for l in range(4):
            for name in genes[0]:
                gain = float(name in ("0.norm1.weight", "0.norm2.weight"))
                expected = gain + genes[0][name] + (2 * (l / 4) ** 2 - 1) * genes[1][name]
                torch.testing.assert_close(weights[f"blocks.{l}.{name[2:]}"], expected, atol=1e-6, rtol=1e-5)
    assert (after[0]["0.mlp.fc1.weight"] - records[0]["gene"]["0.mlp.fc1.weight"]).abs().max() > 1e-3
    assert (after[1]["0.mlp.fc1.weight"] - records[2]["gene"]["0.mlp.fc1.weight"]).abs().max() > 1e-3
    assert all(torch.equal(p, records[0]["stem"][n]) for _, stem in used for n, p in stem.items()) and not any(wanted)
    assert snapshot(made[0] / "pool") == before
    (result,) = log_of(tmp_path, "train")
    gene = sum(p.numel() for p in records[0]["gene"].values())
    assert result["constrained"] and result["learngenes"] == [1, 3] and result["trainable"] == 2 * gene + 33 * 10


def test_both_trainings_start_at_the_same_network(drawn, made):
    """Eq. (8) as initialisation only, or kept: the same logits before the first step."""
    args, pool, x = al.settings(flags(drawn, made[0])), open_pool(drawn, made[0]), task_of(drawn, "kinds").examples("val")[0]
    free, kept = (al.initialise("adaptive", None, args, CPU, pool, (3,), 10, (0, 1, 1)) for _ in range(2))
    _, forward = al.constrained_module(args, CPU, pool, (3,), kept, (0, 1, 1))
    with torch.no_grad():
        torch.testing.assert_close(forward(x, 0), free(x), atol=1e-6, rtol=1e-5)


def test_mixed_precision_composes_in_float32(monkeypatch):
    """1 + 1/256 is not a bfloat16 number: under autocast, a gain of it must not become 1."""
    net, used = small_vit(), []
    gene, net.head = al.new_learngene(net, "delta"), nn.Identity()
    nn.init.constant_(gene[0].norm1.weight, 1 / 256)
    monkeypatch.setattr(al, "functional_call", lambda net, weights, x: used.append(weights) or functional_call(net, weights, x))
    base = al.gain_offset(al.block_groups(net), "delta")
    forward = al.composed_forward(net, al.block_groups(net), [gene], nn.Identity(), [torch.ones(2, 1)], lambda step: base)
    with torch.autocast("cpu", torch.bfloat16):
        forward(torch.randn(2, 3, 32, 32), 0)
    assert all(p.dtype == torch.float32 for p in used[0].values())
    assert (used[0]["blocks.1.norm1.weight"] == 1 + 1 / 256).all()


@pytest.mark.parametrize("size, block, stem, norm, head", [
    ("tiny", 444_864, 185_664, 384, 193_000), ("small", 1_774_464, 371_328, 768, 385_000),
    ("base", 7_087_872, 742_656, 1_536, 769_000)])
def test_parameter_counts_of_table_4(size, block, stem, norm, head):
    with torch.device("meta"):
        net = common.vit(size, 12)
    deployed = 12 * block + stem + norm + head
    for k, constrained in ((3, True), (1, True), (10, False)):
        assert al.parameter_counts(net, k, 10, constrained) == {
            "stored": k * block + stem + norm + head, "trainable": k * block + head if constrained else deployed,
            "deployed": deployed, "nominal": deployed * k // 10}


def test_what_the_paper_calls_6_6_and_8_6_million():
    """3/10 of 22 M and 1/10 of 86 M, whatever is stored: 5.7 M (and a head) and 7.8 M."""
    with torch.device("meta"):
        small, base = (al.parameter_counts(common.vit(size, 12), k, 10, True) for size, k in (("small", 3), ("base", 1)))
    assert (small["nominal"] // 10 ** 5, base["nominal"] // 10 ** 5) == (66, 86)
    assert (small["stored"] - 385_000, base["stored"] - 769_000) == (5_695_488, 7_832_064)


# ----------------------------------------------------------------------------------------------------------------------
# Baselines
# ----------------------------------------------------------------------------------------------------------------------

def random_state(depth, width=32, heads=4, seed=0):
    """An ancestor with all parameters at random."""
    torch.manual_seed(seed)
    net = ViT(ViTConfig(32, 16, width, depth, heads, 10, pool="avg"))
    return {n: torch.randn_like(p) for n, p in net.named_parameters()}


def initialised(method, depth, state, monkeypatch, *more):
    monkeypatch.setattr(al, "pretrained", lambda *_: SimpleNamespace(state_dict=lambda: state))
    return al.initialise(method, None, al.settings([*TINY, "--ancestry-depth", "4", *more]), CPU, None, (depth,), 7, None)


def block_of(state, l):
    return {n.split(".", 2)[2]: p for n, p in state.items() if n.startswith(f"blocks.{l}.")}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("method, depth, kept", [
    ("heur", 6, {3: 1, 4: 2, 5: 3}), ("heur", 4, {1: 1, 2: 2, 3: 3}), ("heur", 2, {0: 2, 1: 3}),     # the last three, on top
    ("auto", 6, {0: 0, 1: 1}), ("auto", 4, {0: 0, 1: 1}), ("auto", 1, {0: 0}),                        # the first half, below
    ("prefine", 4, {0: 0, 1: 1, 2: 2, 3: 3}), ("prefine", 2, {0: 0, 1: 1}), ("scratch", 3, {})])
def test_what_is_kept_of_the_ancestor(method, depth, kept, monkeypatch):
    """The rest is random, and the same as without any ancestor; so is the head. The stem is the ancestor's."""
    state = random_state(4)
    net, scratch = (initialised(m, depth, state, monkeypatch).state_dict() for m in (method, "scratch"))
    for l in range(depth):
        expected = block_of(state, kept[l]) if l in kept else block_of(scratch, l)
        assert same(block_of(net, l), expected), l
    assert torch.equal(net["head.weight"], scratch["head.weight"]) and net["head.weight"].shape == (7, 32)
    for name in ("pos_embed", "patch_embed.proj.weight", "fc_norm.weight"):
        assert torch.equal(net[name], (scratch if method == "scratch" else state)[name])
    drawn = [block_of(scratch, l)["mlp.fc1.weight"] for l in range(depth)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))        # random blocks are not one block


def test_tleg_is_b_plus_a_share_of_a(drawn, tmp_path):
    """Trained on two layers, used at five: theta_l = theta_B + (l - 1) / 5 theta_A; the stem copied, the head fresh."""
    al.main(flags(drawn, tmp_path, "--stage pretrain --method tleg"))
    saved = torch.load(tmp_path / "tleg-drawn-tiny.pt", weights_only=True)["model"]
    run, args = common.Run(tmp_path, {}, CPU), al.settings(flags(drawn, tmp_path))
    net = al.initialise("tleg", run, args, CPU, None, (5,), 7, None)
    for l, block in enumerate(net.blocks):
        for name, p in block.named_parameters():
            theta_B, theta_A = (saved[f"genes.{k}.0.{name}"] for k in (0, 1))
            torch.testing.assert_close(p.detach(), theta_B + l / 5 * theta_A, atol=1e-6, rtol=1e-5)
    assert torch.equal(net.pos_embed, saved["stem.pos_embed"])
    assert torch.equal(net.patch_embed.proj.weight, saved["stem.patch_embed/proj/weight"])
    scratch = al.initialise("scratch", run, args, CPU, None, (5,), 7, None)
    assert torch.equal(net.head.weight, scratch.head.weight)


def test_tleg_starts_without_gains_in_a(drawn, tmp_path):
    """Its authors': theta_B is a block with gains 1, theta_A matrices alone; biases 0 in both."""
    args = al.settings(flags(drawn, tmp_path, "--tleg-epochs 0 --pretrain-epochs 0"))
    (theta,), _ = al.tleg(common.Run(tmp_path, {}, CPU), args, CPU)
    (group,) = al.block_groups(small_vit())
    for theta_n, gain in zip(theta, (1, 0)):
        for name, p in zip(group.shapes, theta_n.split([shape.numel() for shape in group.shapes.values()])):
            if p.numel() > 128:
                assert p.std().item() == pytest.approx(0.02, rel=0.1)
            else:
                assert (p == (gain if name in ("norm1.weight", "norm2.weight") else 0)).all(), name


class Few(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.w, self.b, self.head = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape[0] + 1)), nn.Linear(1, 1)


def test_weight_selection_by_hand():
    """(2, 3) of (4, 6): every second row and column; 3 of 4: numbers 0, 1.5 -> 2 and 3. The head is not taken."""
    net, large = Few(2, 3), torch.arange(24.).view(4, 6)
    head = net.head.weight.clone()
    al.weight_selection(net, {"w": large, "b": torch.tensor([10., 11, 12, 13]), "head.weight": torch.tensor([[9.]])})
    assert net.w.tolist() == [[0, 2, 4], [12, 14, 16]] and net.b.tolist() == [10, 12, 13] and torch.equal(net.head.weight, head)


def test_weight_selection_takes_queries_from_queries(monkeypatch):
    """48 -> 32: the first three of four layers, each tensor evenly spaced from end to end; q, k and v rows stay apart."""
    state = random_state(4, width=48, heads=6)
    for l in range(4):
        state[f"blocks.{l}.attn.qkv.bias"] = torch.arange(144.)
    net = initialised("weight-selection", 3, state, monkeypatch)
    rows = net.blocks[2].attn.qkv.bias.tolist()
    assert rows[0] == 0 and rows[-1] == 143 and rows == sorted(set(rows))
    assert all(48 * part <= row < 48 * (part + 1) for part in range(3) for row in rows[32 * part:32 * part + 32])
    gaps = [b - a for a, b in zip(rows, rows[1:])]
    assert set(gaps) == {1, 2}
    picked = [round(i * 47 / 31) for i in range(32)]
    torch.testing.assert_close(net.fc_norm.weight.detach(), state["fc_norm.weight"][picked])
    hidden = [round(i * 191 / 127) for i in range(128)]
    torch.testing.assert_close(net.blocks[1].mlp.fc1.weight.detach(), state["blocks.1.mlp.fc1.weight"][hidden][:, picked])
    torch.testing.assert_close(net.pos_embed.detach(), state["pos_embed"][:, :, picked])


def test_heads_and_feed_forwards_of_peg_are_convex_mixtures(monkeypatch):
    """An ancestor whose head i marks every fourth number (and layer l likewise) lets the mixture be read off: positive, adding
    up to one. Two learngene heads (2/3 of 4) serve heads 1, 2 and 3, 4; two feed-forwards (1/2 of 4) the lower and upper layers."""
    state = random_state(4)
    for l in range(4):
        weight = torch.zeros(3, 4, 8, 32)
        for i in range(4):
            weight[:, i, :, i::4] = 1
        state[f"blocks.{l}.attn.qkv.weight"] = weight.view(96, 32)
        for name in ("mlp.fc1.weight", "mlp.fc2.bias"):
            state[f"blocks.{l}.{name}"] = torch.zeros_like(state[f"blocks.{l}.{name}"])
            state[f"blocks.{l}.{name}"][..., l::4] = 1
    net = initialised("peg", 6, state, monkeypatch)
    for block in net.blocks:
        p = block.attn.qkv.weight.detach().view(3, 4, 8, 8, 4)                     # q/k/v, head, row, repetition, ancestor's head
        mixture = p[0, :, 0, 0]
        assert (p == mixture[None, :, None, None]).all() and (mixture > 0).all()
        assert mixture.sum(1).tolist() == pytest.approx([1] * 4)
        assert torch.equal(mixture[0], mixture[1]) and torch.equal(mixture[2], mixture[3])
        assert not torch.equal(mixture[0], mixture[2])
    layers = torch.stack([block.mlp.fc1.weight.detach()[0, :4] for block in net.blocks])
    assert layers.sum(1).tolist() == pytest.approx([1] * 6) and (layers > 0).all()
    assert (layers[:3] == layers[0]).all() and (layers[3:] == layers[3]).all() and (layers[0] != layers[3]).any()
    for block, row in zip(net.blocks, layers):
        assert torch.equal(block.mlp.fc2.bias.detach().view(8, 4), row.expand(8, 4))
    nearest = [0, 0, 1, 2, 2, 3]                             # norms and projections: of layer l * 4 // 6
    assert all(torch.equal(net.blocks[l].attn.proj.weight, state[f"blocks.{nearest[l]}.attn.proj.weight"]) for l in range(6))
    assert same(initialised("peg", 6, state, monkeypatch).state_dict(), net.state_dict())


def test_peg_of_equal_heads_and_layers_is_the_ancestor(monkeypatch):
    state = random_state(4)
    for l in range(4):
        for end, shape in (("weight", (3, 1, 8, 32)), ("bias", (3, 1, 8))):
            name = f"blocks.{l}.attn.qkv.{end}"
            state[name] = state[name].view(3, 4, *shape[2:])[:, :1].expand(3, 4, *shape[2:]).reshape(state[name].shape)
        for name in ("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"):
            state[f"blocks.{l}.{name}"] = state[f"blocks.0.{name}"]
    net = initialised("peg", 4, state, monkeypatch)
    for name, p in net.named_parameters():
        if not name.startswith("head."):
            torch.testing.assert_close(p.detach(), state[name], atol=1e-5, rtol=1e-4)


def test_random_draws_have_the_asked_size_and_differ():
    args, task = al.settings([*TINY, "--genes", "5"]), noise_task([4, 4])
    draws = [al.selection("random", draw, None, args, CPU, [None] * 10, task, (2,), {}) for draw in range(5)]
    assert all(len(G) == 10 and sum(G) == 5 for G in draws) and len(set(draws)) == 5
    random.seed(7)
    assert al.selection("random", 0, None, args, CPU, [None] * 10, task, (2,), {}) == draws[0]
    other = al.settings([*TINY, "--genes", "5", "--seed", "1"])
    assert [al.selection("random", d, None, other, CPU, [None] * 10, task, (2,), {}) for d in range(5)] != draws
    cache = {"noise": (1, 1, 0, 0, 0, 0, 0, 1, 0, 0)}        # without --genes: as many as TALS took
    plain = al.settings(TINY)
    assert [sum(al.selection("random", d, None, plain, CPU, [None] * 10, task, (2,), cache)) for d in range(3)] == [3, 3, 3]
    assert al.selection("adaptive", 0, None, plain, CPU, [None] * 10, task, (2,), cache) == cache["noise"]
    assert al.selection("all", 0, None, plain, CPU, [None] * 10, task, (2,), cache) == (1,) * 10
    assert al.selection("heur", 0, None, plain, CPU, None, task, (2,), cache) is None


@pytest.mark.parametrize("method, depth, more, words", [
    ("weight-selection", 2, ("--size", "drawn-base"), "larger than drawn-base"),
    ("heur", 2, ("--size", "drawn-swin", "--depth", "2,6"), "written for ViT"),
    ("tleg", 2, ("--size", "drawn-swin", "--depth", "2,6"), "written for ViT")])
def test_impossible_baselines_are_one_sentence(method, depth, more, words, monkeypatch, capsys):
    depths = (2, 6) if "drawn-swin" in more else (depth,)
    args = al.settings([*TINY, "--ancestry-depth", "4", *more])
    monkeypatch.setattr(al, "pretrained", lambda *_: pytest.fail("an ancestor is made before the mistake is seen"))
    refuses(capsys, lambda: al.initialise(method, None, args, CPU, None, depths, 7, None), words)


def test_random_of_more_than_there_are_is_one_sentence(drawn, made, tmp_path, capsys):
    refuses(capsys, lambda: al.main(flags(drawn, tmp_path, "--stage train --data kinds --method random --genes 5",
                                          "--pool", made[0] / "pool")), "--genes 5")


@pytest.fixture(scope="module")
def ancestor(drawn, tmp_path_factory):
    """A directory with pretrain-drawn-tiny.pt of two layers."""
    folder = tmp_path_factory.mktemp("ancestor")
    al.main(flags(drawn, folder, "--stage pretrain"))
    return folder


@pytest.mark.parametrize("other", ["--ancestry-depth 6", "--patch 8", "--pool-type token", "--size drawn-tiny --image-size 48"])
def test_an_ancestor_of_another_kind_is_one_sentence(other, drawn, ancestor, tmp_path, capsys):
    """Before anything is trained, and not by keeping whatever happens to fit."""
    argv = flags(drawn, tmp_path, "--stage train --data kinds --method heur --depth 2 --source", ancestor, other)
    refuses(capsys, lambda: al.main(argv), "pretrain-drawn-tiny.pt do not fit")
    assert not tmp_path.joinpath("log.jsonl").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Segmentation
# ----------------------------------------------------------------------------------------------------------------------

def test_mean_iou_by_hand():
    """Rows are true classes: 2 / (3 + 3 - 2), 3 / (4 + 4 - 3), 4 / (5 + 5 - 4). A class that is nowhere does not count."""
    confusion = torch.tensor([[2, 1, 0], [0, 3, 1], [1, 0, 4]])
    assert al.mean_iou(confusion) == pytest.approx(100 * (2 / 4 + 3 / 5 + 4 / 6) / 3)
    padded = F.pad(confusion, (0, 1, 0, 1))
    assert al.mean_iou(padded) == pytest.approx(al.mean_iou(confusion))
    padded[3, 0] = 2                                         # in the truth but never found: 0
    assert al.mean_iou(padded) == pytest.approx(100 * (2 / 6 + 3 / 5 + 4 / 6 + 0) / 4)


def test_evaluation_counts_pixels_over_the_whole_split():
    """20 images (more than one part), a network that reads a pixel's class off its brightness, some pixels painted wrong and some
    without label: intersections and unions by sets of pixels."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, (20, 8, 8)).astype(np.uint8)
    painted = np.where(rng.random(truth.shape) < 0.3, rng.integers(0, 3, truth.shape), truth)
    truth[rng.random(truth.shape) < 0.2] = data.IGNORED
    images = np.repeat((painted * 100)[:, None], 3, 1).astype(np.uint8)
    task = data.make_task("s", ["a", "b", "c"], dict.fromkeys(data.SPLITS, images), dict.fromkeys(data.SPLITS, truth))
    level = torch.tensor([0., 100, 200]) * task.scale.flatten()[0] + task.shift.flatten()[0]
    net = lambda x: -(x[:, :1] - level.view(1, 3, 1, 1)) ** 2
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


def test_one_window_is_the_network(drawn):
    torch.manual_seed(0)
    net, x = al.Segmenter(small_vit(), 9, 32).eval(), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(al.sliding_logits(net, x, 32, 32), net(x).detach())


def test_windows_must_cover_the_image(capsys):
    argv = "--stage segment --data scenes --scene-size 96 --crop 32 --stride 64 --patch 16".split()
    refuses(capsys, lambda: al.settings(argv), "--stride 64")


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("size", [32, 64])
def test_segmenter_against_its_parts(pool, size):
    """Shapes; cosines in [-1, 1] before the last norm; and the whole forward pass written out, one scalar product at a time."""
    torch.manual_seed(0)
    encoder = small_vit(pool=pool)
    for p in encoder.parameters():
        nn.init.normal_(p, std=0.2)
    net, grid, seen = al.Segmenter(encoder, 5, size).eval(), size // 16, []
    net.mask_norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        out = net(x)
        assert out.shape == (2, 5, size, size) and seen[0].shape == (2, grid ** 2, 5) and seen[0].abs().max() <= 1 + 1e-6
        tokens = encoder.fc_norm(encoder.norm(encoder.tokens(x)))
        assert tokens.shape[1] == grid ** 2 + (pool == "token")
        tokens = tokens[:, pool == "token":]
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
    assert len(net.blocks) == 2 and net.blocks[0].attn.num_heads == 4


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_the_position_embedding_is_resized(pool):
    """2 x 2 positions to 4 x 4 by hand: rows (1, 0), (3/4, 1/4), (1/4, 3/4), (0, 1) of both axes; the class token's stays."""
    encoder = small_vit(pool=pool)
    nn.init.normal_(encoder.pos_embed)
    old = encoder.pos_embed.detach().clone()[0]
    new = al.Segmenter(encoder, 5, 64).encoder.pos_embed.detach()[0]
    first = int(pool == "token")
    M = torch.tensor([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    expected = torch.einsum("ip,jq,pqd->ijd", M, M, old[first:].view(2, 2, 32)).reshape(16, 32)
    torch.testing.assert_close(new[first:], expected, atol=1e-6, rtol=1e-5)
    assert new.shape == (16 + first, 32) and torch.equal(new[:first], old[:first])


def test_decoders_are_alike_and_encoders_the_methods(drawn, made, tmp_path, monkeypatch):
    """--stage segment: every method's Segmenter before training, then a score of each."""
    built, Segmenter = [], al.Segmenter

    def spy(encoder, *more):
        state = {n: p.clone() for n, p in encoder.state_dict().items()}
        net = Segmenter(encoder, *more)
        built.append((state, {n: p.clone() for n, p in net.state_dict().items() if not n.startswith("encoder.")}))
        return net
    monkeypatch.setattr(al, "Segmenter", spy)
    al.main(flags(drawn, tmp_path, "--stage segment --data scenes --method all,scratch,heur --depth 3 --train-epochs 2",
                  "--pool", made[0] / "pool"))
    (all_, decoder), (scratch, second), (heur, third) = built
    assert same(decoder, second) and same(decoder, third)
    by_hand = hand_vit(records_of(made[0] / "pool"), (1, 1, 1), 3).blocks[2].mlp.fc1.weight.detach()
    torch.testing.assert_close(all_["blocks.2.mlp.fc1.weight"].double(), by_hand, atol=1e-5, rtol=1e-5)
    ancestor = torch.load(tmp_path / "pretrain-drawn-tiny.pt", weights_only=True)["model"]
    assert torch.equal(heur["blocks.2.mlp.fc1.weight"], ancestor["blocks.1.mlp.fc1.weight"])
    assert torch.equal(heur["blocks.0.mlp.fc1.weight"], scratch["blocks.0.mlp.fc1.weight"])
    scores = log_of(tmp_path, "segment")
    assert [r["method"] for r in scores] == ["all", "scratch", "heur"] and all(0 <= r["miou"] <= 100 for r in scores)


def test_a_segmentation_of_another_pool_is_refused(drawn, made, other, tmp_path, capsys):
    """As --stage train does it: the same directory, learngenes 1 and 2 of another pool."""
    pool = copy_of(made, tmp_path, 2) / "pool"
    argv = flags(drawn, tmp_path / "out", "--stage segment --data scenes --method all --train-epochs 1")
    al.main([*argv, "--pool", str(pool)])
    refuses(capsys, lambda: al.main([*argv, "--pool", str(other)]), "holds pool")


def test_gains_are_those_of_layer_norms_whatever_their_names():
    """The blocks of any network: under delta, a fresh learngene has gains of 1."""
    net = torchvision.models.VisionTransformer(32, 16, 2, 4, 32, 64, num_classes=5)
    theta = [torch.stack([al.flat(al.new_learngene(net, "delta")[0])]).detach()]
    al.fill(net, theta, {}, (1,), {"basis": "chebyshev", "first_order": 0, "init": "delta"})
    assert all((module.weight == 1).all() for module in net.modules() if isinstance(module, nn.LayerNorm))


# ----------------------------------------------------------------------------------------------------------------------
# Runs: as a user
# ----------------------------------------------------------------------------------------------------------------------

def test_the_commands_of_the_docstring(drawn, tmp_path, capsys):
    """All four, in their order and in one directory, with tiny settings in front."""
    commands = re.findall(r"^    python adaptive_learngene.py(.*?)(?:#.*)?$", al.__doc__, re.M)
    assert len(commands) == 4
    write_images(tmp_path / "mine", ("ant", "bee"), 6)
    for command in commands:
        argv = command.replace("DIR", str(tmp_path / "mine")).replace("TASK", "kinds").split()
        al.main([*flags(drawn, tmp_path / "run"), *argv])
    said = capsys.readouterr().out
    assert [r["dataset"] for r in records_of(tmp_path / "run" / "pool")] == [*STREAM, str(tmp_path / "mine")]
    assert "4 learngenes in" in said and re.search(r"kinds: learngenes \[.*\] of 4", said)
    assert re.search(r"kinds, drawn-tiny x 6, adaptive \[.*\]: \d+\.\d\d % after 40 images \(val\)", said)
    (result,) = log_of(tmp_path / "run", "train")
    assert result["depths"] == [6] and result["images"] == 40 and len(result["curve"]) == 2 and result["learngenes"]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["stage"] == "train"
    assert not [f for f in (tmp_path / "run").rglob("*.tmp")]


def test_every_method_under_one_schedule(drawn, made, tmp_path, capsys):
    """All columns of Tables 1 and 2 and of Fig. 4, then once more: finished networks are read, not trained again."""
    argv = flags(drawn, tmp_path, "--stage train --data kinds --method", ",".join(al.METHODS), "--pool", made[0] / "pool")
    al.main(argv)
    results = log_of(tmp_path, "train")
    assert [r["method"] for r in results] == [m for m in al.METHODS for _ in range(2 if m == "random" else 1)]
    assert len({(r["images"], r["lr"], r["deployed"], tuple(r["depths"])) for r in results}) == 1
    assert all(0 <= r["accuracy"] <= 100 and len(r["curve"]) == 2 for r in results)
    assert all((r["learngenes"] is not None) == (r["method"] in al.OURS) for r in results)
    assert [r["draw"] for r in results if r["method"] == "random"] == [0, 1]
    networks = {f.name: f.read_bytes() for f in tmp_path.glob("*.pt")}
    assert {"pretrain-drawn-tiny.pt", "pretrain-drawn-small.pt", "tleg-drawn-tiny.pt"} < set(networks)
    al.main(argv)
    assert log_of(tmp_path, "train")[len(results):] == results
    assert {f.name: f.read_bytes() for f in tmp_path.glob("*.pt")} == networks


def test_ancestors_come_from_source(drawn, tmp_path, ancestor):
    """--source: made once, used by runs elsewhere; untrained heur then is the ancestor's stem and blocks."""
    al.main(flags(drawn, tmp_path, "--stage train --data kinds --method heur --source", ancestor, "--train-epochs 1"))
    assert not (tmp_path / "pretrain-drawn-tiny.pt").exists() and len(log_of(tmp_path, "train")) == 1


@pytest.mark.parametrize("options", [
    "--init block --first-order 1 --basis legendre --pool-type token",
    "--init zero --stem shared --augment no --clip 0 --basis monomial",
    "--size drawn-swin --depth 1,2", "--gene-dropout 1 --gene-keep 0 --init-scale 0.5",
    "--amp bf16"])
def test_options_run(options, drawn, tmp_path):
    """Two datasets, then a descendant of either training."""
    al.main(flags(drawn, tmp_path, "--data", ",".join(STREAM[:2]), *options.split()))
    for more in ([], ["--constrained"]):
        al.main(flags(drawn, tmp_path, "--stage train --data kinds --genes 2", *options.split(), *more))
    assert [r["kept"] for r in log_of(tmp_path, "pool")] == [0, 1]
    assert all(math.isfinite(r["loss"]) for r in log_of(tmp_path, "ancestry-02"))
    assert [r["constrained"] for r in log_of(tmp_path, "train")] == [False, True]


def test_paper_preset_is_the_experimental_setup():
    args = al.settings(["--preset", "paper"])
    assert (args.ancestry_epochs, args.train_epochs, args.gamma, args.lam, args.reward_share) == (300, 500, 2.0, 0.01, 0.1)
    assert (args.size, args.ancestry_depth, args.image_size, args.patch, args.pool) == ("small", 12, 224, 16, "token")
    assert al.stream(args.stream) == [f"imagenet/10#{n}" for n in range(1, 11)]


def test_streams(tmp_path, monkeypatch):
    assert al.stream("wide/3,digits") == ["wide/3#1", "wide/3#2", "wide/3#3", "digits"]
    assert al.stream("signs:0-5,a/b") == ["signs:0-5", "a/b"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "birds" / "2").mkdir(parents=True)           # a folder of that very name comes first
    assert al.stream("birds/2") == ["birds/2"]


# ----------------------------------------------------------------------------------------------------------------------
# Runs: killed, and in two processes
# ----------------------------------------------------------------------------------------------------------------------

# Argument: JSON of [stage, step, commands]. SIGKILL in that step of that stage; in step -1 of learngene-02: when its file in
# the pool is written, but has not yet got its name.
SCRIPT = """
import json, os, signal, sys
sys.path.insert(0, {root!r})
import torch
import adaptive_learngene, common, data
for name, sizes in {sizes!r}.items():
    data.SPECS[name] = data.SPECS[name]._replace(sizes=sizes)
stage, step, commands = json.loads(sys.argv[1])
update, replace = common.Training.update, os.replace

def dying(self, *loss, **values):
    if (self.stage, self.step) == (stage, step):
        os.kill(os.getpid(), signal.SIGKILL)
    return update(self, *loss, **values)

def dying_replace(source, target):
    if step == -1 and str(target).endswith(os.path.join("pool", stage + ".pt")):
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(source, target)

common.Training.update, os.replace = dying, dying_replace
for argv in commands:
    adaptive_learngene.main(argv)
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def outside(tmp_path, stage, step, *commands, processes=1):
    """Runs commands in a process of their own; returns its exit code."""
    (tmp_path / "script.py").write_text(SCRIPT.format(root=str(ROOT), sizes=SIZES))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    with open(tmp_path / "out", "a") as out:
        process = subprocess.Popen([sys.executable, *torchrun, str(tmp_path / "script.py"), json.dumps([stage, step, commands])],
                                   stdout=out, stderr=out, env=ENV)
        try:
            return process.wait(timeout=600)
        finally:
            process.kill()


def test_killed_runs_end_as_if_never_stopped(drawn, tmp_path):
    """SIGKILL in the middle of learngene 2, while its file gets its name, and in the training of a descendant, each time between
    two checkpoints: bitwise the same networks, the same pool, the same log."""
    often = ["--save-every", "4", "--log-every", "2", "--ancestry-epochs", "8", "--train-epochs", "4"]
    ancestry = lambda folder: flags(drawn, tmp_path / folder, "--data", ",".join(STREAM[:2]), *often)
    train = lambda folder: flags(drawn, tmp_path / folder, "--stage train --data kinds --method all --constrained", *often)
    al.main(ancestry("whole")), al.main(train("whole"))

    assert outside(tmp_path, "ancestry-02", 7, ancestry("parts")) == -signal.SIGKILL
    assert len(records_of(tmp_path / "parts" / "pool")) == 1 and log_of(tmp_path / "parts", "ancestry-02")[-1]["step"] == 6
    assert outside(tmp_path, "learngene-02", -1, ancestry("parts")) == -signal.SIGKILL
    assert len(records_of(tmp_path / "parts" / "pool")) == 1 and log_of(tmp_path / "parts", "ancestry-02")[-1]["step"] == 15
    al.main(ancestry("parts"))
    stage = "train-kinds-all-constrained-11-drawn-tiny-2-320"
    assert outside(tmp_path, stage, 11, train("parts")) == -signal.SIGKILL
    assert log_of(tmp_path / "parts", stage)[-1]["step"] == 10
    al.main(train("parts"))

    for name in ("ancestry-01", "ancestry-02", stage):
        assert_same_run(tmp_path / "parts", tmp_path / "whole", name)
    parts, whole = ([r["hash"] for r in records_of(tmp_path / folder / "pool")] for folder in ("parts", "whole"))
    assert parts == whole
    assert log_of(tmp_path / "parts", "train") == log_of(tmp_path / "whole", "train")


def test_two_processes_learn_what_one_does(drawn, tmp_path):
    """torchrun: the same global batch, so the same losses (1e-5), the same learngenes up to rounding, the same selection."""
    commands = lambda folder: [flags(drawn, tmp_path / folder, "--data", ",".join(STREAM[:2])),
                               flags(drawn, tmp_path / folder, "--stage train --data pedestrian --method adaptive,scratch")]
    for command in commands("one"):
        al.main(command)
    assert outside(tmp_path, "", 0, *commands("two"), processes=2) == 0, (tmp_path / "out").read_text()[-3000:]
    stages = ["ancestry-01", "ancestry-02", *(f.stem for f in (tmp_path / "one").glob("train-*.pt"))]
    assert len(stages) == 4
    for stage in stages:
        one, two = log_of(tmp_path / "one", stage), log_of(tmp_path / "two", stage)
        one, two = ([r for r in log if "loss" in r] for log in (one, two))
        assert len(one) == len(two) >= 2
        for a, b in zip(one, two):
            assert (a["loss"], a["lr"], a["images"]) == pytest.approx((b["loss"], b["lr"], b["images"]), abs=1e-5), (stage, a, b)
    for a, b in zip(records_of(tmp_path / "one" / "pool"), records_of(tmp_path / "two" / "pool")):
        assert all((a["gene"][n] - b["gene"][n]).abs().max() < 1e-4 for n in a["gene"]) and a["dataset"] == b["dataset"]
    one, two = ([r["learngenes"] for r in log_of(tmp_path / folder, "train")] for folder in ("one", "two"))
    assert one == two and one[0] and one[1] is None
    assert [r["kept"] for r in log_of(tmp_path / "two", "pool")] == [0, 1]                # and written by one process only


# ----------------------------------------------------------------------------------------------------------------------
# Bad input
# ----------------------------------------------------------------------------------------------------------------------

# given to a directory with a pool, an ancestor and a descendant
BAD_FLAGS = [
    ("--stage train", "needs a task"), ("--stage select", "needs a task"), ("--stage segment", "needs a task"),
    ("--stage fly", "--stage"), ("--stage select --data kindz", "kindz"), ("--data digits/3#4", "numbered from 1 to 3"),
    ("--data /no/such/folder", "/no/such/folder"), ("--stage train --data kinds --depth 0", "--depth"),
    ("--stage train --data kinds --depth 2,2", "--depth of drawn-tiny takes 1 number"),
    ("--stage train --data kinds --depth six", "--depth"), ("--size drawn-swin --depth 3", "takes 2 numbers"),
    ("--stage train --data kinds --method dino", "--method dino"),
    ("--stage train --data kinds --method adaptive,peek", "--method peek"),
    ("--stage select --data kinds --pool {tmp}/file", "is a file"), ("--pool {tmp}/file --data pedestrian", "is a file"),
    ("--stage select --data kinds --pool {tmp}/nothing", "no learngenes in"),
    ("--stage train --data kinds --pool {tmp}/nothing", "--stage ancestry"),
    ("--stage select --data kinds --size drawn-small", "asked for drawn-small"),
    ("--stage select --data kinds --genes 4", "has 3 learngenes"), ("--stage select --data {tmp}/lonely", "class 'eel' of"),
    ("--first-order 2", "--first-order"), ("--stage segment --data kinds", "has no masks"),
    ("--stage train --data scenes --method scratch", "has masks"),
    ("--stage segment --data scenes --crop 40", "--crop 40"), ("--stage segment --data scenes --crop 64", "--crop 64"),
    ("--stage segment --data scenes --size drawn-swin", "written for ViT"),
    ("--stage train --data kinds --method heur --source {tmp}/nothing", "no finished pretrain-drawn-tiny.pt"),
    ("--stage train --data kinds --method all --seed 3", "seed 0"),
    ("--stage train --data kinds --method all --train-lr 0.3", "lr"),
    ("--stage train --data kinds --method prefine --depth 3", "cannot make 3 layers"), ("--depth 3", "--ancestry-depth"),
    ("--stage train --data kinds --method scratch,weight-selection --depth 3", "cannot make 3 layers"), ("--batch-size 0", "--batch-size"),
    ("--stage select --data kinds --reward-head mlp", "--reward-head"),
    ("--stage select --data scenes --reward-head trained", "ncm or ridge"), ("--gene-keep 1.5", "--gene-keep"),
    ("--gamma inf", "--gamma"), ("--device cuda", "--device cuda"), ("--output {tmp}/file", "is a file"),
]


@pytest.fixture(scope="module")
def finished(drawn, made, tmp_path_factory):
    """A copy of the run with an ancestor and one trained descendant in it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(made[0], folder)
    al.main(flags(drawn, folder, "--stage train --data kinds --method all,heur"))
    return folder


@pytest.mark.parametrize("bad, words", BAD_FLAGS, ids=[f for f, _ in BAD_FLAGS])
def test_bad_input_is_one_sentence_and_overwrites_nothing(bad, words, drawn, finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "file").write_text("mine")
    for split, count in (("train", 1), ("val", 2)):
        for name in ("cow", "eel"):
            write_images(tmp_path / "lonely" / split, (name,), count if name == "eel" else 4)
    before = snapshot(tmp_path)
    with pytest.raises(SystemExit) as stop:
        al.main(flags(drawn, tmp_path / "run", *bad.format(tmp=tmp_path).split()))
    sentences = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]              # beside progress bars
    assert stop.value.code == 2 and len(sentences) == 1 and words in sentences[0], sentences
    after = {n: b for n, b in snapshot(tmp_path).items() if n in before or not n.split("/")[-1].startswith("rewards-")}
    assert after == before


def test_masks_where_classes_are_learned(drawn, tmp_path, capsys):
    refuses(capsys, lambda: al.main(flags(drawn, tmp_path, "--data scenes")), "scenes")


def test_batch_must_divide_among_processes(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    refuses(capsys, lambda: al.settings(["--batch-size", "64"]), "--batch-size 64", "3 processes")


# ----------------------------------------------------------------------------------------------------------------------
# The equations in the file
# ----------------------------------------------------------------------------------------------------------------------

def test_every_equation_has_its_line_of_code():
    """A comment "Eq. (n)" behind code, not in a text."""
    source = (ROOT / "adaptive_learngene.py").read_text()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [t for t in tokens if t.type == tokenize.COMMENT and t.line.split("#")[0].strip()]
    assert {int(n) for t in comments for n in re.findall(r"Eq\. \((\d)\)", t.string)} == set(range(1, 9))
