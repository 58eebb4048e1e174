"""tal.py against the paper: every equation by an oracle of its own, graphs by hand, decoders by explicit sums, runs by
stopping them, and bad input by what is left behind."""
import ast
import hashlib
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
import time
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

import common
import data
import tal
from common import ViT, ViTConfig
from conftest import TINY
from tal import OPS, Group, Hypernet, encode_graph
from test_common import assert_same_run, log_of, refuses, snapshot

ROOT = Path(__file__).resolve().parent.parent
CPU = common.Machine(torch.device("cpu"), None)


def small_vit(depth=2, width=32, heads=4, classes=10, pool="token"):
    return ViTConfig(32, 8, width, depth, heads, classes, pool=pool)


def small_hypernet(decoder="low-rank", task_dim=8, rank=4, norm="rms", classes=1000, seed=0):
    torch.manual_seed(seed)
    return Hypernet(32, 2, 4, 6, task_dim, decoder, rank, 64, 8, classes, [32, 48], norm)


# ----------------------------------------------------------------------------------------------------------------------
# Eq. (1): 1 / (N M) sum_j sum_a L(f_a(x_j; H_D(f_a^G)), y_j)
# ----------------------------------------------------------------------------------------------------------------------

def test_eq1_is_the_mean_over_architectures_and_images():
    """Three networks, five images: one loss at a time, in plain Python."""
    torch.manual_seed(0)
    x, y = torch.randn(5, 4), [2, 0, 1, 1, 2]
    nets = [nn.Linear(4, 3) for _ in range(3)]
    total = 0.0
    for net in nets:
        for image, label in zip(x, y):
            scores = [math.exp(s) for s in net(image).tolist()]
            total += -math.log(scores[label] / sum(scores))
    ours = tal.meta_batch_loss(tal.loss_cls(torch.tensor(y), net(x)) for net in nets)
    assert ours.item() == pytest.approx(total / (3 * 5), rel=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Eqs. (2), (3): (gamma, beta) = (W^gamma, W^beta) I;  f_tau = gamma x f + beta
# ----------------------------------------------------------------------------------------------------------------------

def test_eq2_by_hand():
    W_gamma, W_beta = torch.tensor([[1., 2.], [3., 4.], [0., -1.]]), torch.tensor([[0., 1.], [1., 0.], [2., 2.]])
    gamma, beta = tal.task_hypernet(torch.tensor([10., 1.]), W_gamma, W_beta)
    assert gamma.tolist() == [12, 34, -1] and beta.tolist() == [1, 10, 22]


def test_eq3_by_hand():
    """Two nodes, three features: the same gamma and beta for both nodes."""
    f = torch.tensor([[1., 2., 3.], [4., 5., 6.]])
    out = tal.task_specific_layer(f, torch.tensor([2., 0., -1.]), torch.tensor([.5, 1., 0.]))
    assert out.tolist() == [[2.5, 1, -3], [8.5, 1, -6]]


def test_graph_layer_is_torchs_pre_norm_transformer_layer():
    """Without task: nn.TransformerEncoderLayer with an additive mask per head. With task: the same layer after gamma and
    beta have been folded into its first norm: (1 + gamma) (w z + b) + beta (D1, D2)."""
    torch.manual_seed(0)
    V, hid, heads, t = 7, 16, 4, 5
    layer = tal.GraphLayer(hid, heads, t)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    theirs = nn.TransformerEncoderLayer(hid, heads, 4 * hid, dropout=0, activation="gelu", batch_first=True, norm_first=True)
    theirs.load_state_dict({
        "self_attn.in_proj_weight": layer.qkv.weight, "self_attn.in_proj_bias": torch.zeros(3 * hid),
        "self_attn.out_proj.weight": layer.proj.weight, "self_attn.out_proj.bias": layer.proj.bias,
        "linear1.weight": layer.ff[0].weight, "linear1.bias": layer.ff[0].bias, "linear2.weight": layer.ff[2].weight,
        "linear2.bias": layer.ff[2].bias, "norm1.weight": layer.norm1.weight, "norm1.bias": layer.norm1.bias,
        "norm2.weight": layer.norm2.weight, "norm2.bias": layer.norm2.bias})
    h, bias, I = torch.randn(V, hid), torch.randn(heads, V, V), torch.randn(t)
    torch.testing.assert_close(layer(h, bias, None), theirs(h[None], src_mask=bias)[0], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        gamma, beta = layer.W_gamma @ I, layer.W_beta @ I
        theirs.norm1.bias.copy_((1 + gamma) * layer.norm1.bias + beta)
        theirs.norm1.weight.copy_((1 + gamma) * layer.norm1.weight)
    torch.testing.assert_close(layer(h, bias, I), theirs(h[None], src_mask=bias)[0], atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Eq. (4): KL(softmax(E_train M) || softmax(E_anc))
# ----------------------------------------------------------------------------------------------------------------------

def test_eq4_equals_torch_distributions():
    torch.manual_seed(0)
    E_train, M, E_anc = (torch.randn(*s, dtype=torch.float64) for s in ((6, 4), (4, 9), (6, 9)))
    categorical = torch.distributions.Categorical
    for T in (1.0, 3.0):
        expected = torch.distributions.kl_divergence(categorical(logits=E_train @ M / T), categorical(logits=E_anc / T)).mean()
        assert tal.loss_aux(E_train, E_anc, M, T).item() == pytest.approx(expected.item(), rel=1e-12)


def test_eq4_by_hand_and_its_direction():
    """p = (1/2, 1/2), q = (1/4, 3/4): KL(p||q) = ln 2 / 2 + ln(2/3) / 2 = 0.1438; the other way round 0.1308."""
    train, anc = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert tal.loss_aux(train, anc, torch.eye(2)).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)
    assert tal.loss_aux(anc, train, torch.eye(2)).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), rel=1e-6)


def test_eq4_is_never_negative_and_zero_for_equal_distributions():
    torch.manual_seed(0)
    for scale in (1e-3, 1, 30):
        assert tal.loss_aux(torch.randn(8, 5) * scale, torch.randn(8, 5) * scale, torch.eye(5)).item() > 0
    E = torch.randn(8, 5)
    assert tal.loss_aux(E, E + 7, torch.eye(5)).item() == pytest.approx(0, abs=1e-6)      # softmax forgets a constant
    assert math.isfinite(tal.loss_aux(E * 1e4, -E * 1e4, torch.eye(5)).item())


# ----------------------------------------------------------------------------------------------------------------------
# Eqs. (5), (6)
# ----------------------------------------------------------------------------------------------------------------------

def test_eq5_by_hand():
    """Predicted (0.7, 0.2, 0.1) and (0.1, 0.1, 0.8)."""
    logits = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]).log()
    assert tal.loss_cls(torch.tensor([0, 1]), logits).item() == pytest.approx((-math.log(0.7) - math.log(0.1)) / 2, rel=1e-6)
    soft = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]])                             # TAL+'s targets
    by_hand = -(0.5 * math.log(0.7) + 0.5 * math.log(0.2) + 0.25 * math.log(0.1) + 0.75 * math.log(0.8)) / 2
    assert tal.loss_cls(soft, logits).item() == pytest.approx(by_hand, rel=1e-6)
    one_hot = F.one_hot(torch.tensor([0, 1]), 3).float()
    torch.testing.assert_close(tal.loss_cls(one_hot, logits), tal.loss_cls(torch.tensor([0, 1]), logits))


def test_eq6_by_hand():
    assert tal.tal_loss(3.0, 5.0, 0.2) == pytest.approx(0.2 * 3 + 0.8 * 5)                # 4.6
    assert tal.tal_loss(3.0, 5.0, 0.0) == 5 and tal.tal_loss(3.0, 5.0, 1.0) == 3


@pytest.mark.parametrize("method", ["tal", "tal+", "logah"])
def test_one_step_is_eqs_4_to_6_plus_the_norms(method):
    """tal_step against a real network that is given the predicted weights and runs by itself."""
    torch.manual_seed(0)
    args = tal.settings(["--method", method, "--ancestry-width", "16", "--alpha", "0.3", "--temperature", "2", "--predparam", "1e-3"])
    config, classes = small_vit(pool="avg"), 5
    ancestry = tal.Ancestry(ViTConfig(32, 8, 16, 1, 2), {"digits": classes}).eval()
    hypernet = small_hypernet(task_dim=16)
    for layer in hypernet.learngene.layers:
        nn.init.normal_(layer.W_gamma), nn.init.normal_(layer.W_beta)
    x, y, I = torch.randn(4, 3, 32, 32), torch.tensor([0, 4, 2, 2]), torch.randn(16)
    task = SimpleNamespace(name="digits", num_classes=classes)
    with torch.no_grad():
        loss, cls, aux = tal.tal_step(hypernet, ancestry, config, task, x, y, I, args, CPU)
        net = tal.customize(hypernet, config, I, classes)
        M = hypernet.predict(encode_graph(net), I, None, 16)["M"]                        # (d', d)
        p = torch.softmax(net(x), -1)
        target = F.one_hot(y, classes).float()
        if method == "tal+":                                                              # D8
            target = (target + torch.softmax(ancestry.heads["digits"](ancestry(x)), -1)) / 2
        cls_expected = -(target * p.log()).sum() / 4
        P, Q = (torch.softmax(e / 2, -1) for e in (torch.einsum("bd,ed->be", net.encode(x), M), ancestry(x)))
        aux_expected = (P * (P / Q).log()).sum() / 4
        norms = sum(math.sqrt((w ** 2).sum()) for w in net.parameters())
    if method == "logah":                                                                 # no ancestry: alpha is zero
        assert aux == 0 and args.alpha == 0 and not args.task_info
        aux_expected = 0.0
    assert cls.item() == pytest.approx(float(cls_expected), rel=1e-4)
    assert aux.item() == pytest.approx(float(aux_expected), rel=1e-4)
    assert loss.item() == pytest.approx(float(args.alpha * aux_expected + (1 - args.alpha) * cls_expected + 1e-3 * norms), rel=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Eq. (7): 1 / (T M) sum_tau sum_a sum_j w_tau L;  Sec. 5.1: tasks drawn with probability w_tau
# ----------------------------------------------------------------------------------------------------------------------

def test_eq7_by_a_triple_loop():
    torch.manual_seed(0)
    T, M, N = 3, 2, 4
    L, w = torch.rand(T, M, N, dtype=torch.float64), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    total = 0.0
    for tau in range(T):
        for a in range(M):
            for j in range(N):
                total += w[tau].item() * L[tau, a, j].item() / N        # per task the mean over its images
    ours = tal.multi_task_loss([tal.meta_batch_loss(L[tau, a].mean() for a in range(M)) for tau in range(T)], w)
    assert ours.item() == pytest.approx(total / (T * M), rel=1e-12)


@pytest.mark.parametrize("tasks_per_step", [1, 2])
def test_eq7_is_what_the_loop_minimises(tasks_per_step):
    """All T^k draws, each with its probability: the expected loss of a step is sum_tau w_tau L_tau, T times Eq. (7)."""
    L, w = torch.tensor([0.3, 2.0, 0.7], dtype=torch.float64), tal.sampling_weights([100, 25, 400])
    expected = 0.0
    for draw in itertools.product(range(3), repeat=tasks_per_step):
        expected += math.prod(w[t].item() for t in draw) * tal.multi_task_loss([L[t] for t in draw]).item()
    assert expected == pytest.approx(sum(w[t].item() * L[t].item() for t in range(3)), rel=1e-12)
    assert expected == pytest.approx(3 * tal.multi_task_loss(L.unbind(), w).item(), rel=1e-12)


DECATHLON = dict(aircraft=3334, cifar100=40000, daimler=23520, dtd=1880, gtsrb=31367, omniglot=17853, svhn=47217, ucf101=7585, flowers=1020)
NINE = [.0524, .1816, .1392, .0394, .1608, .1213, .1973, .0791, .0290]
TEN = [.0261, .0904, .0693, .0196, .0801, .0604, .0983, .0394, .0144, .5019]


def test_sampling_weights_of_the_decathlon():
    counts = list(DECATHLON.values())
    assert tal.sampling_weights(counts).tolist() == pytest.approx(NINE, abs=6e-5)
    assert tal.sampling_weights([*counts, 1_232_167]).tolist() == pytest.approx(TEN, abs=6e-5)           # with ImageNet
    assert tal.sampling_weights([3668, 8551, 2490, 25000]).tolist() == pytest.approx([.1677, .2561, .1382, .4379], abs=6e-5)
    assert tal.sampling_weights([10, 30], temperature=1).tolist() == pytest.approx([0.25, 0.75])         # T = 1: by size
    assert tal.sampling_weights([10, 30], temperature=1e9).tolist() == pytest.approx([0.5, 0.5])         # T large: uniform
    assert tal.sampling_weights([7]).tolist() == [1]


@pytest.mark.parametrize("tasks_per_step", [1, 3])
def test_task_schedule(tasks_per_step):
    weights, steps = tal.sampling_weights([100, 25, 400]), 4000
    random.seed(1)
    first = tal.task_schedule(weights, steps, tasks_per_step, seed=5)
    random.seed(2), torch.manual_seed(2)
    assert tal.task_schedule(weights, steps, tasks_per_step, seed=5) == first            # of the seed alone
    assert tal.task_schedule(weights, 10, tasks_per_step, seed=5) == first[:10]          # whatever the length
    assert tal.task_schedule(weights, steps, tasks_per_step, seed=6) != first
    seen = Counter()
    for drawn in first:                                      # the n-th time that a task comes up, it is given n
        assert len(drawn) == tasks_per_step
        for task, visit in drawn:
            assert visit == seen[task]
            seen[task] += 1
    n = steps * tasks_per_step                               # frequencies within 4 standard deviations; the seed is fixed
    for task, w in enumerate(weights.tolist()):
        assert abs(seen[task] - n * w) < 4 * math.sqrt(n * w * (1 - w))


def test_task_embedding_is_the_mean_feature_at_norm_sqrt_t():
    """600 images (more than one part of 500), one at a time; D4."""
    torch.manual_seed(0)
    ancestry = tal.Ancestry(ViTConfig(8, 4, 16, 1, 2), {"a": 2}).eval()
    for p in ancestry.parameters():
        nn.init.normal_(p, std=0.2)
    images = {s: np.random.default_rng(0).integers(0, 256, (n, 3, 8, 8), dtype=np.uint8) for s, n in (("train", 600), ("val", 2), ("test", 2))}
    task = data.make_task("a", ["x", "y"], images, {s: torch.zeros(len(i), dtype=torch.long) for s, i in images.items()})
    for limit, count in ((2000, 600), (7, 7)):
        mean = torch.zeros(16, dtype=torch.float64)
        for image in task.examples("train")[0][:count]:
            mean += ancestry(image[None])[0].detach().double() / count
        embedding = tal.task_embedding(ancestry, task, CPU, limit)
        assert embedding.norm().item() == pytest.approx(4, rel=1e-5)
        torch.testing.assert_close(embedding.double(), mean * 4 / mean.norm(), atol=1e-5, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Architectures
# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dataset, depths, widths, first, digest", [
    ("ViTs-1K", (3, 9), (128, 512), [(4, 384, 3), (5, 256, 8), (9, 224, 8)], "2a1f7df6e6360916"),
    ("ViTs+-1K", (3, 12), (192, 768), [(5, 768, 3), (7, 256, 8), (10, 640, 8)], "13d983c3b1e878eb"),
    ("drawn", (2, 6), (32, 56), [(3, 32, 4), (3, 32, 4), (4, 56, 7)], "a661f5149a8b8986"),
    ("drawn+", (2, 8), (32, 72), [(3, 64, 8), (2, 48, 6), (2, 56, 7)], "d1d855b8dc6d1cec")])
def test_architecture_datasets(dataset, depths, widths, first, digest):
    """A thousand each, within the released ranges up to both ends, and the same ones on every machine and in every year."""
    random.seed(3)
    configs = tal.architectures(dataset, dict(image_size=32, patch_size=8))
    sizes = [(c.depth, c.width, c.heads) for c in configs]
    assert len(sizes) == 1000 and sizes[:3] == first
    assert hashlib.sha256(repr(sizes).encode()).hexdigest()[:16] == digest
    assert (min(d for d, _, _ in sizes), max(d for d, _, _ in sizes)) == depths
    assert (min(w for _, w, _ in sizes), max(w for _, w, _ in sizes)) == widths
    assert all(w % h == 0 for _, w, h in sizes)
    assert all((c.image_size, c.patch_size, c.pool) == (32, 8, "token") for c in configs)
    if dataset == "ViTs-1K":                                 # wide only where shallow, so that none is large
        assert all(w <= (512 if d == 3 else 384 if d <= 5 else 256) and w % 32 == 0 for d, w, _ in sizes)
    if dataset == "ViTs+-1K":
        assert all(w % 64 == 0 for _, w, _ in sizes)


def test_vits_1k_have_at_most_ten_million_parameters():
    """At 32 px and 10 classes (patches of 4): 12 D^2 + 13 D per layer, the rest by hand; one of them also counted."""
    def count(c):
        D, tokens = c.width, (c.image_size // c.patch_size) ** 2 + 1
        return c.depth * (12 * D * D + 13 * D) + 3 * c.patch_size ** 2 * D + D + D + tokens * D + 2 * D + 10 * D + 10
    configs = [ViTConfig(32, 4, c.width, c.depth, c.heads, 10) for c in tal.architectures("ViTs-1K", dict(image_size=32, patch_size=4))]
    assert 9e6 < max(map(count, configs)) <= 10e6
    assert sum(p.numel() for p in tal.skeleton(configs[0]).parameters()) == count(configs[0])
    plus = [ViTConfig(32, 4, c.width, c.depth, c.heads, 10) for c in tal.architectures("ViTs+-1K", dict(image_size=32, patch_size=4))]
    assert sum(map(count, plus)) / 1000 == pytest.approx(24e6, rel=0.1) and max(map(count, plus)) > 80e6


# ----------------------------------------------------------------------------------------------------------------------
# The computational graph
# ----------------------------------------------------------------------------------------------------------------------

class Toy(nn.Module):
    """x -> fc1 -> + x -> relu -> fc2."""
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc2(torch.relu(x + self.fc1(x)))


def ops_of(graph):
    return [OPS[i] for i in graph.ops]


def test_graph_of_a_toy_by_hand():
    """input 0 -> fc1.weight 1 -> fc1.bias 2 -> sum 3 -> fc2.weight 4 -> fc2.bias 5, and the shortcut 0 -> 3."""
    graph = encode_graph(Toy())
    assert ops_of(graph) == ["input", "conv", "bias", "sum", "conv", "bias"]
    assert graph.names == [None, "fc1.weight", "fc1.bias", None, "fc2.weight", "fc2.bias"]
    assert graph.shapes == [(), (4, 4), (4,), (), (3, 4), (3,)]
    assert sorted(graph.edges) == [(0, 1), (0, 3), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert graph.distance.tolist() == [[0, 1, 2, 1, 2, 3],
                                       [-1, 0, 1, 2, 3, 4],
                                       [-1, -1, 0, 1, 2, 3],
                                       [-1, -1, -1, 0, 1, 2],
                                       [-1, -1, -1, -1, 0, 1],
                                       [-1, -1, -1, -1, -1, 0]]
    assert (graph.head, graph.head_bias, graph.num_classes, graph.sums) == (4, 5, 3, 1)


def test_rows_of_the_distance_table_by_hand():
    """The toy with paths told apart up to 2: 0 no path; 1, 2, 3 for 0, 1, 2 edges on; 4, 5 for 1, 2 edges back."""
    index = encode_graph(Toy()).distance_index(2).tolist()
    assert index[0] == [1, 2, 3, 2, 3, 3] and index[5] == [5, 5, 5, 5, 4, 1]             # 3 edges count as 2
    class Two(nn.Module):                                    # an unconnected source: no path in either direction
        def __init__(self):
            super().__init__()
            self.scale, self.fc = nn.Parameter(torch.ones(1, 4)), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(x + self.scale)
    graph = encode_graph(Two())
    assert ops_of(graph)[:3] == ["input", "pos_enc", "sum"] and sorted(graph.edges)[:2] == [(0, 2), (1, 2)]
    assert graph.distance_index(2)[0, 1] == 0 and graph.distance_index(2)[1, 0] == 0


def test_parameters_that_functions_read():
    """F.linear and F.layer_norm with parameters of the module itself; a module used twice has its nodes once."""
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.W, self.bias, self.fc = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4)), nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(self.fc(F.linear(x, self.W, self.bias)))
    graph = encode_graph(Functional())
    assert ops_of(graph) == ["input", "conv", "bias", "conv", "bias"]
    assert graph.names == [None, "W", "bias", "fc.weight", "fc.bias"]
    assert sorted(graph.edges) == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_unused_parameter_is_one_sentence(capsys):
    class Unused(Toy):
        def __init__(self):
            super().__init__()
            self.never = nn.Linear(2, 2)
    refuses(capsys, lambda: encode_graph(Unused()), "Unused", "never.weight")


def test_shortest_paths_equal_floyd_warshall():
    rng = random.Random(0)
    for count in (1, 2, 5, 12, 20):
        for density in (0.1, 0.3, 0.8):
            edges = [(i, j) for j in range(count) for i in range(j) if rng.random() < density]
            rng.shuffle(edges)
            far = 10 ** 6
            best = [[0 if i == j else 1 if (i, j) in edges else far for j in range(count)] for i in range(count)]
            for k in range(count):
                for i in range(count):
                    for j in range(count):
                        best[i][j] = min(best[i][j], best[i][k] + best[k][j])
            assert tal.shortest_paths(count, edges).tolist() == [[-1 if d == far else d for d in row] for row in best]


BLOCK = ["ln", "bias", "conv", "bias", "msa", "conv", "bias", "sum", "ln", "bias", "conv", "bias", "conv", "bias", "sum"]


def test_nodes_of_a_vit():
    """norm1, qkv, attention, proj, shortcut; norm2, fc1, fc2, shortcut."""
    graph = encode_graph(tal.skeleton(small_vit(depth=2, pool="token")))
    assert ops_of(graph) == ["input", "conv", "bias", "pos_enc", "concat", "pos_enc", "sum", *BLOCK, *BLOCK, "ln", "bias", "conv", "bias"]
    assert graph.names[3] == "cls_token" and graph.names[5] == "pos_embed"
    block = graph.names[7:22]
    assert block == ["blocks.0.norm1.weight", "blocks.0.norm1.bias", "blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias", None,
                     "blocks.0.attn.proj.weight", "blocks.0.attn.proj.bias", None, "blocks.0.norm2.weight", "blocks.0.norm2.bias",
                     "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc1.bias", "blocks.0.mlp.fc2.weight", "blocks.0.mlp.fc2.bias", None]
    edges = set(graph.edges)
    assert (6, 7) in edges and (6, 14) in edges and (14, 15) in edges and (14, 21) in edges      # both shortcuts
    assert all((i, i + 1) in edges for i in range(6, 36) if i not in (4,))
    assert ops_of(encode_graph(tal.skeleton(small_vit(depth=1, pool="avg")))) == [
        "input", "conv", "bias", "pos_enc", "sum", *BLOCK, "glob_avg", "ln", "bias", "conv", "bias"]


TORCHVISION = {                          # name -> (how to build it small, heads of its attention nodes in order)
    "vit_b_16": (lambda: torchvision.models.vit_b_16(image_size=32), [12] * 12),
    "swin_t": (torchvision.models.swin_t, [3, 3, 6, 6, 12, 12, 12, 12, 12, 12, 24, 24]),
    "resnet50": (torchvision.models.resnet50, []),
    "convnext_tiny": (torchvision.models.convnext_tiny, []),
    "ours": (lambda: ViT(small_vit(pool="avg", depth=3)), [4] * 3),
    "ours, token": (lambda: ViT(small_vit(pool="token", depth=3)), [4] * 3),
}


@pytest.fixture(scope="module")
def nets():
    """{name: (network, graph)}."""
    torch.manual_seed(0)
    built = {name: make().eval() for name, (make, _) in TORCHVISION.items()}
    return {name: (net, encode_graph(net)) for name, net in built.items()}


@pytest.mark.parametrize("name", TORCHVISION)
def test_graphs_of_torchvision(name, nets):
    net, graph = nets[name]
    params = dict(net.named_parameters())
    assert Counter(n for n in graph.names if n) == Counter(params.keys())                # every parameter, once
    assert all(graph.shapes[i] == tuple(params[n].shape) for i, n in enumerate(graph.names) if n)
    assert all(i < j for i, j in graph.edges) and len(set(graph.edges)) == len(graph.edges)
    targets, sources = {j for _, j in graph.edges}, {i for i, _ in graph.edges}
    for j in range(len(graph)):
        assert graph.distance[0, j] >= 0 or (j not in targets and ops_of(graph)[j] == "pos_enc"), graph.names[j]
        assert j == len(graph) - 1 or j in sources, graph.names[j]                       # and reaches on to the output
    assert (graph.distance[:, -1] >= 0).all()
    attention = [i for i, op in enumerate(ops_of(graph)) if op == "msa"]
    assert [graph.shapes[i] for i in attention] == [(h,) for h in TORCHVISION[name][1]]
    assert graph.names[graph.head] in ("head.weight", "heads.head.weight", "fc.weight", "classifier.2.weight")
    assert graph.num_classes == (10 if name.startswith("ours") else 1000)


def test_residual_sums_and_kinds_of_torchvision(nets):
    """resnet50: 16 blocks; swin_t: 24 shortcuts; convnext: 18 blocks, each with one depthwise convolution."""
    count = {name: Counter(ops_of(graph)) for name, (_, graph) in nets.items()}
    assert count["resnet50"]["sum"] == 16 and count["resnet50"]["bn"] == 53 and count["resnet50"]["conv"] == 54
    assert count["resnet50"]["max_pool"] == 1 and count["resnet50"]["glob_avg"] == 1
    assert count["swin_t"]["sum"] == 24 and count["convnext_tiny"]["sum"] == 18 and count["convnext_tiny"]["sep_conv"] == 18
    assert count["vit_b_16"]["sum"] == 25                                                # 24, and the position embedding


def test_graph_of_torchvisions_vit_is_ours(nets):
    """Written by others, with other names and nn.MultiheadAttention: the same graph."""
    ours = encode_graph(tal.skeleton(ViTConfig(32, 16, 768, 12, 12)))
    theirs = nets["vit_b_16"][1]
    assert ops_of(ours) == ops_of(theirs) and ours.shapes == theirs.shapes and sorted(ours.edges) == sorted(theirs.edges)
    assert torch.equal(ours.distance, theirs.distance)
    hypernet = small_hypernet(classes=10)
    a, b = (hypernet.learngene(g) for g in (ours, theirs))
    assert torch.equal(a, b)


def test_size_features_interpolate_on_a_log_scale():
    """1, 2 and 4 sit on anchors 0, 1, 2; 3 lies between them: log2(3) = 1.585; 0 is nothing; 10^6 stays at the end."""
    rows = tal.hat_size([1, 2, 3, 0, 10 ** 6])
    assert rows[0, 0] == 1 and rows[1, 1] == 1 and rows[4, 15] == 1
    assert rows[2, 1].item() == pytest.approx(0.415, abs=1e-3) and rows[2, 2].item() == pytest.approx(0.585, abs=1e-3)
    assert rows.sum(1).tolist() == pytest.approx([1, 1, 1, 0, 1])


def test_class_count_is_hidden_from_the_learngene():
    """The graphs of a network with 10 and with 100 classes look the same."""
    hypernet = small_hypernet()
    a, b = (hypernet.learngene(encode_graph(tal.skeleton(small_vit(classes=c)))) for c in (10, 100))
    assert torch.equal(a, b)


# ----------------------------------------------------------------------------------------------------------------------
# predict
# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("decoder", ["low-rank", "tiled"])
@pytest.mark.parametrize("norm", ["rms", "fan-in"])
@pytest.mark.parametrize("name", TORCHVISION)
def test_predict_fills_every_parameter(name, decoder, norm, nets):
    net, graph = nets[name]
    with torch.no_grad():
        weights = small_hypernet(decoder, norm=norm).predict(graph)
        params = dict(net.named_parameters())
        assert weights.keys() == params.keys()
        for n, p in params.items():
            assert weights[n].shape == p.shape and weights[n].isfinite().all(), n
        if norm == "rms":
            image = torch.randn(1, 3, *((32, 32) if name.startswith(("ours", "vit")) else (64, 64)))
            logits = functional_call(net, {**dict(net.named_buffers()), **weights}, (image,), strict=True)
            assert logits.isfinite().all() and logits.std() > 0
        net.load_state_dict({**net.state_dict(), **weights}, strict=True)


@pytest.mark.parametrize("decoder", ["low-rank", "tiled"])
def test_any_number_of_classes_up_to_the_maximum(decoder, capsys):
    hypernet, graph = small_hypernet(decoder, classes=1000), encode_graph(tal.skeleton(small_vit()))
    usual = hypernet.predict(graph)
    assert usual["head.weight"].shape == (10, 32)
    for classes in (1, 2, 1000):
        weights = hypernet.predict(graph, num_classes=classes)
        assert weights["head.weight"].shape == (classes, 32) and weights["head.bias"].shape == (classes,)
        assert all(torch.equal(weights[n], usual[n]) for n in usual if not n.startswith("head."))
        rows = weights["head.weight"]
        assert classes == 1 or not torch.equal(rows[0], rows[-1])                        # classes differ from the start
    refuses(capsys, lambda: hypernet.predict(graph, num_classes=1001), "1000", "1001", "--max-classes")


def test_low_rank_decoder_by_explicit_sums():
    """W[o, i, y, x] = sum_k A[o + y channels, k] B[i + x channels, k] / sqrt(r), A and B summed element by element."""
    torch.manual_seed(0)
    r, channels = 3, 8
    decoder = tal.LowRankDecoder(16, r, channels, 2, 6, [12, 10]).double()
    h = torch.randn(4, 16, dtype=torch.float64)
    head, plain, qkv, kernel = (Group(["a"], torch.tensor([node]), shape, "conv", is_head, parts, False) for node, shape, is_head, parts in
                                ((0, (5, 7), True, 1), (1, (4, 7), False, 1), (2, (12, 4), False, 3), (3, (4, 3, 2, 2), False, 1)))
    vector = Group(["b"], torch.tensor([1]), (4,), "bias", False, 1, False)
    head_w, plain_w, qkv_w, vector_w, kernel_w = (w[0] for w in decoder(h, [head, plain, qkv, vector, kernel]))
    rb, cb = decoder.row_basis.tolist(), decoder.col_basis.tolist()

    def entry(node, row, col):
        C = decoder.code(decoder.mlp(h[node])).tolist()
        C = [[C[s * r * r + i * r:s * r * r + i * r + r] for i in range(r)] for s in (0, 1)]
        A = [sum(rb[row][i] * C[0][i][k] for i in range(r)) for k in range(r)]
        B = [sum(cb[col][i] * C[1][i][k] for i in range(r)) for k in range(r)]
        return sum(a * b for a, b in zip(A, B)) / math.sqrt(r)

    for o in range(4):
        for i in range(7):
            assert plain_w[o, i].item() == pytest.approx(entry(1, o, i), rel=1e-9)
    for o in range(5):                                       # classes have rows of their own, behind channels x kernels
        assert head_w[o, 2].item() == pytest.approx(entry(0, channels * 2 + o, 2), rel=1e-9)
    for part in range(3):                                    # queries, keys, values start at 0, channels, 2 channels (16: around)
        for o in range(4):
            assert qkv_w[part * 4 + o, 1].item() == pytest.approx(entry(2, (part * channels + o) % (channels * 2), 1), rel=1e-9)
    for o, i, y, x in itertools.product(range(4), range(3), range(2), range(2)):
        assert kernel_w[o, i, y, x].item() == pytest.approx(entry(3, o + y * channels, i + x * channels), rel=1e-9)
    code = decoder.vector_code(decoder.mlp(h[1]))
    assert vector_w.tolist() == pytest.approx([sum(code[k].item() * decoder.vector_basis[o, k].item() for k in range(r)) for o in range(4)])


def test_predicted_matrices_have_rank_r():
    weights = small_hypernet(rank=4).predict(encode_graph(tal.skeleton(small_vit(width=48))))
    for name in ("blocks.0.attn.proj.weight", "blocks.1.mlp.fc1.weight", "blocks.1.mlp.fc2.weight", "head.weight"):
        assert torch.linalg.matrix_rank(weights[name].double(), rtol=1e-5).item() == 4, name


def test_queries_keys_and_values_sit_at_fixed_places():
    """From the same code, q, k and v of width 32 are the first rows and columns of those of width 48 (D7); likewise the
    class rows of 5 and 9 classes (D6), and the tiled decoder's corners."""
    torch.manual_seed(0)
    h = torch.randn(1, 32)
    decoder = small_hypernet().decoder
    group = lambda shape, head=False, parts=1: Group(["W"], torch.tensor([0]), shape, "conv", head, parts, False)
    narrow, wide, five, nine = (w[0] for w in decoder(h, [group((96, 32), parts=3), group((144, 48), parts=3),
                                                          group((5, 32), True), group((9, 48), True)]))
    for part in range(3):
        torch.testing.assert_close(narrow[part * 32:part * 32 + 32], wide[part * 48:part * 48 + 32, :32])
    assert not torch.equal(narrow[:32], narrow[32:64])
    torch.testing.assert_close(five, nine[:5, :32])
    tiled = small_hypernet("tiled").decoder
    small, large = (w[0] for w in tiled(h, [group((40, 32)), group((96, 64))]))
    torch.testing.assert_close(small, large[:40, :32])
    torch.testing.assert_close(large[:32, :32], large[32:64, 32:])                       # tiles of 32, repeated
    assert set(g.parts for g in encode_graph(tal.skeleton(small_vit())).groups() if "attn.qkv.weight" in g.names[0]) == {3}


def test_rows_that_no_training_architecture_reads_are_quiet():
    """D19: with width 32 trained, predictions for width 32 stay bit for bit; the value channels that width 48 has beyond
    it become ten times smaller beside the others. (Its query channels share rows with the trained MLP's hidden units.)"""
    hypernet = small_hypernet()
    narrow, wide = (encode_graph(tal.skeleton(small_vit(width=w))) for w in (32, 48))
    values = lambda: hypernet.predict(wide)["blocks.0.attn.qkv.weight"][96:, :32]
    ratio = lambda v: (v[32:].norm() / v[:32].norm()).item()
    before, loud = hypernet.predict(narrow), values()
    hypernet.decoder.quiet_untrained_rows(narrow.groups(hypernet.decoder.classes))
    after = hypernet.predict(narrow)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert ratio(values()) == pytest.approx(ratio(loud) / 10, rel=1e-3)


def test_root_mean_square_is_that_of_the_fan_in(nets):
    """"rms": sqrt(1 / fan-in), and 6 / sums of it where the output goes into one of more than six shortcuts."""
    for name in ("ours", "swin_t", "resnet50"):
        net, graph = nets[name]
        weights = small_hypernet().predict(graph)
        into_sum = {n for g in graph.groups() if g.residual for n in g.names}
        matrices = {n: w for n, w in weights.items() if len(w.shape) in (2, 4) and "relative" not in n}
        assert len(matrices) > 10
        for n, w in matrices.items():
            fan_in = w[0].numel()
            assert w.pow(2).mean().sqrt().item() == pytest.approx(
                (1 / fan_in) ** 0.5 * (min(1, 6 / graph.sums) if n in into_sum else 1), rel=1e-3), n
    ours = nets["ours, token"][1]                            # 3 blocks: 6 shortcuts and the position embedding
    assert ours.sums == 6 and {n for g in ours.groups() if g.residual for n in g.names} == {
        f"blocks.{i}.{m}.weight" for i in range(3) for m in ("attn.proj", "mlp.fc2")}


def test_normalisation_by_hand():
    """The released rules: norms 2 sigmoid(w / 2), biases tanh(0.2 w), embeddings untouched, matrices sqrt(2 / fan-in)."""
    group = lambda kind, shape: Group(["a"], torch.tensor([0]), shape, kind, False, 1, False)
    w = torch.tensor([[-3.0, 0.0, 2.0]])
    assert tal.normalise(w, group("ln", (3,)), "rms", 1)[0].tolist() == pytest.approx([2 / (1 + math.exp(-v / 2)) for v in (-3, 0, 2)])
    assert tal.normalise(w, group("bias", (3,)), "rms", 1)[0].tolist() == pytest.approx([math.tanh(0.2 * v) for v in (-3, 0, 2)])
    assert torch.equal(tal.normalise(w, group("pos_enc", (1, 1, 3)), "rms", 1), 0.2 * w)
    W = torch.ones(1, 4, 2, 3, 3)
    assert tal.normalise(W, group("conv", (4, 2, 3, 3)), "fan-in", 1).unique().item() == pytest.approx(1 / 3)       # sqrt(2 / 18)


def with_task_weights(hypernet):
    torch.manual_seed(1)
    for layer in hypernet.learngene.layers:
        nn.init.normal_(layer.W_gamma, std=0.3), nn.init.normal_(layer.W_beta, std=0.3)
    return hypernet


def test_task_embedding_changes_nothing_at_first_and_everything_later():
    """W^gamma = W^beta = 0 at the start of tuning, so tuning begins with the pretrained network."""
    graph, hypernet = encode_graph(tal.skeleton(small_vit())), small_hypernet()
    I, J = torch.randn(8), torch.randn(8)
    plain, first = hypernet.predict(graph), hypernet.predict(graph, I)
    assert all(torch.equal(plain[n], first[n]) for n in plain)
    with_task_weights(hypernet)
    a, b = hypernet.predict(graph, I), hypernet.predict(graph, J)
    assert [n for n in a if torch.equal(a[n], b[n]) or torch.equal(a[n], plain[n])] == []


def test_number_of_heads_changes_the_prediction():
    """Nothing but the attention nodes tells 4 heads of 8 channels from 2 of 16."""
    hypernet = small_hypernet()
    four, two = (encode_graph(tal.skeleton(small_vit(heads=h))) for h in (4, 2))
    assert ops_of(four) == ops_of(two) and [s for s in four.shapes if len(s) != 1] == [s for s in two.shapes if len(s) != 1]
    a, b = hypernet.predict(four), hypernet.predict(two)
    assert all(not torch.equal(a[n], b[n]) for n in a if n.endswith("qkv.weight"))


def test_the_matrix_M_is_predicted_like_any_other():
    hypernet, graph = small_hypernet(), encode_graph(tal.skeleton(small_vit()))
    weights = hypernet.predict(graph, features=20)
    assert weights.pop("M").shape == (20, 32)                                            # transposed: (d', d)
    without = hypernet.predict(graph)
    torch.testing.assert_close(weights, without)                                         # rounding: one more row in a product


@pytest.mark.parametrize("decoder", ["low-rank", "tiled"])
@pytest.mark.parametrize("task_info", [False, True])
def test_gradients_reach_every_parameter_that_is_used(decoder, task_info):
    """Pretraining: all but the task hypernet. Tuning with I: that one too."""
    args = tal.settings(["--ancestry-width", "16"])
    hypernet, ancestry = small_hypernet(decoder, task_dim=16), tal.Ancestry(ViTConfig(32, 8, 16, 1, 2), {"t": 5})
    torch.manual_seed(2)
    loss, _, _ = tal.tal_step(hypernet, ancestry, small_vit(), SimpleNamespace(name="t", num_classes=5), torch.randn(4, 3, 32, 32),
                              torch.tensor([0, 1, 2, 4]), torch.randn(16) if task_info else None, args, CPU)
    loss.backward()
    for name, p in hypernet.named_parameters():
        if "W_gamma" in name or "W_beta" in name:
            assert (p.grad is not None) == task_info, name
        if p.grad is not None or not ("W_gamma" in name or "W_beta" in name):
            assert p.grad.isfinite().all() and p.grad.abs().sum() > 0, name
    assert all(p.grad is None for p in ancestry.parameters())                            # the ancestry only guides


def test_optimiser_groups_hold_every_parameter_once():
    hypernet = small_hypernet()
    groups = hypernet.groups(1e-3, 1e-2, 0.1)
    held = Counter(id(p) for g in groups for p in g["params"])
    assert held == Counter(id(p) for p in hypernet.parameters())
    slow, fast = ({n for n, p in hypernet.named_parameters() if any(p is q for q in g["params"])} for g in groups)
    assert (groups[0]["lr"], groups[1]["lr"]) == (1e-3, 1e-2)
    assert {"decoder.row_basis", "decoder.col_basis", "decoder.vector_basis", "learngene.op.weight", "learngene.size"} <= fast
    assert {"decoder.code.weight", "learngene.layers.0.qkv.weight", "learngene.layers.0.W_gamma"} <= slow


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_customize_is_a_network_with_the_predicted_parameters(pool):
    hypernet, config, I = with_task_weights(small_hypernet()), small_vit(pool=pool, depth=3, width=40, heads=5), torch.randn(8)
    net = tal.customize(hypernet, config, I, 7)
    assert isinstance(net, ViT) and net.config.num_classes == 7 and all(p.requires_grad for p in net.parameters())
    x = torch.randn(3, 3, 32, 32)
    skeleton = tal.skeleton(config)
    expected = functional_call(skeleton, hypernet.predict(encode_graph(skeleton), I, 7), (x,), strict=True)
    torch.testing.assert_close(net(x), expected, atol=1e-6, rtol=1e-5)
    assert net(x).shape == (3, 7) and net(x).std() > 0


# ----------------------------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------------------------

def test_paper_preset_is_section_5_1():
    args = tal.settings(["--preset", "paper"])
    assert (args.pretrain_epochs, args.tune_epochs, args.lr, args.weight_decay, args.predparam) == (75, 100, 3e-4, 1e-2, 3e-5)
    assert (args.task_temperature, args.archs, args.ancestry_width, args.ancestry_depth, args.image_size) == (2, "ViTs-1K", 768, 12, 224)
    assert tal.settings(["--preset", "paper", "--method", "tal+"]).archs == "ViTs+-1K"
    assert tal.settings(["--method", "tal+"]).archs == "drawn+"


@pytest.mark.parametrize("argv, task_info, alpha", [
    ([], True, 0.5), (["--method", "tal+"], True, 0.5), (["--no-task-info"], False, 0.5), (["--no-ancestry"], True, 0.0),
    (["--method", "logah"], False, 0.0), (["--method", "ghn3"], False, 0.0)])
def test_what_methods_and_ablations_switch_off(argv, task_info, alpha):
    args = tal.settings(argv)
    assert (args.task_info, args.alpha) == (task_info, alpha)
    hypernet = tal.build_hypernet(args)
    assert any("W_gamma" in n for n, _ in hypernet.named_parameters()) == task_info
    assert isinstance(hypernet.decoder, tal.TiledDecoder) == ("ghn3" in argv)


def test_sizes_of_tables_1_and_2():
    table = tal.sizes(tal.settings(["--preset", "paper"]))
    assert list(table) == [f"{d}-{s}" for s in ("Tiny", "Small", "Base") for d in (3, 6, 12)]
    assert [(table[n].width, table[n].heads, table[n].depth) for n in ("3-Tiny", "6-Small", "12-Base")] == [(192, 3, 3), (384, 6, 6), (768, 12, 12)]


# ----------------------------------------------------------------------------------------------------------------------
# Runs: the stages, end to end
# ----------------------------------------------------------------------------------------------------------------------

def steps_of(folder, stage):
    return [r["step"] for r in log_of(folder, stage) if "step" in r]


# steps: ancestry 0.005 x 73,000 / 200 (fixed by the data), pretrain 0.03 x 24,000 / 200 = 4, tune 0.08 x 10,000 / 200 = 4
@pytest.mark.parametrize("stage, makes", [
    ("ancestry", ["ancestry.pt"]),
    ("pretrain", ["ancestry.pt", "pretrain.pt", "untrained-pretrain-val.json"]),
    ("tune", ["ancestry.pt", "pretrain.pt", "tune.pt", "untrained-tune-val.json"]),
    ("evaluate", ["ancestry.pt", "pretrain.pt", "tune.pt", "untrained-evaluate-val.json"]),
    ("train", ["ancestry.pt", "pretrain.pt", "tune.pt", "train-digits-3x48-3.pt"]),
    ("plot", ["ancestry.pt", "pretrain.pt", "tune.pt", "figure3.json"])])
def test_every_stage_runs_from_nothing(stage, makes, drawn, tmp_path, capsys):
    tal.main([*TINY, "--stage", stage, "--data-dir", str(drawn), "--output", str(tmp_path), "--data", "digits" if stage == "train" else ""])
    assert {*makes, "config.json", "log.jsonl"} <= set(os.listdir(tmp_path))
    assert not [f for f in os.listdir(tmp_path) if f.endswith(".tmp")]
    assert json.loads((tmp_path / "config.json").read_text())["stage"] == stage
    assert "preset drawn" in capsys.readouterr().out                                     # all settings at the start
    for name in ("pretrain", "tune"):
        assert f"{name}.pt" not in makes or steps_of(tmp_path, name) == [1, 2, 3, 4]
    assert all(math.isfinite(r["loss"]) for r in log_of(tmp_path, "tune"))
    if stage in ("pretrain", "tune", "evaluate"):
        table = json.loads((tmp_path / f"untrained-{stage}-val.json").read_text())
        assert [n.rstrip("*") for n in table] == [f"{d}-{s}" for s in ("Tiny", "Small", "Base") for d in (3, 6, 12)]
        for row in table.values():
            scores = [v for k, v in row.items() if k != "average"]
            assert len(scores) == (1 if stage == "pretrain" else 2) and row["average"] == pytest.approx(sum(scores) / len(scores))
    if stage == "train":
        result = [r for r in log_of(tmp_path, "train")][-1]
        assert result["task"] == "digits" and 0 <= result["untrained"] <= 100 and 0 <= result["trained"] <= 100
    if stage == "plot":
        figure = json.loads((tmp_path / "figure3.json").read_text())
        assert figure["tasks"] == ["pedestrian", "digits"] and np.array(figure["xy"]).shape == (2, 10, 2) and 0 <= figure["between"] <= 1


@pytest.mark.parametrize("method", ["tal", "tal+", "logah", "ghn3", "random"])
def test_every_method_trains(method, drawn, tuned, tmp_path):
    tal.main([*TINY, "--stage", "train", "--method", method, "--data", "pedestrian,clothing", "--data-dir", str(drawn),
              "--output", str(tmp_path), "--ancestry", str(tuned / "ancestry.pt")])
    results = {r["task"]: r for r in log_of(tmp_path, "train")}
    assert set(results) == {"pedestrian", "clothing"} and all(r["method"] == method for r in results.values())
    assert (tmp_path / "tune.pt").exists() == (method != "random")
    if method != "random":
        assert all((r["loss_aux"] > 0) == method.startswith("tal") for r in log_of(tmp_path, "pretrain"))
        assert bool(torch.load(tmp_path / "tune.pt", weights_only=True)["extra"]["embeddings"]) == method.startswith("tal")


@pytest.mark.parametrize("flags, check", [
    ("--no-task-info", lambda run: run["W"] == 0 and run["aux"] > 0 and not run["embeddings"]),
    ("--no-ancestry", lambda run: run["W"] > 0 and run["aux"] == 0 and set(run["embeddings"]) == {"pedestrian", "digits"}),
    ("--tune-tasks pedestrian --tune-epochs 0.2", lambda run: set(run["embeddings"]) == {"pedestrian"}),
    ("--tune-alpha 0.2", lambda run: run["tune aux"] > 0),
    ("--meta-batch 2 --tasks-per-step 2 --pool token --augment no", lambda run: run["images"] == 400),
    ("--normalise fan-in --amp bf16 --seed 3 --arch-per-process", lambda run: run["aux"] > 0)])
def test_ablations_and_options_run(flags, check, drawn, tuned, tmp_path):
    tal.main([*TINY, "--stage", "tune", "--data-dir", str(drawn), "--output", str(tmp_path), "--ancestry", str(tuned / "ancestry.pt"),
              *flags.split()])
    saved, log = torch.load(tmp_path / "tune.pt", weights_only=True), log_of(tmp_path, "tune")
    assert all(math.isfinite(r["loss"]) for r in log) and log[-1]["skipped"] == 0
    assert check({"W": sum("W_gamma" in n for n in saved["model"]), "embeddings": saved["extra"]["embeddings"],
                  "aux": log_of(tmp_path, "pretrain")[-1]["loss_aux"], "tune aux": log[-1]["loss_aux"], "images": log[0]["images"]})


def test_logged_loss_is_eq_6(tuned):
    """loss = alpha aux + (1 - alpha) cls + the norms, alpha 0.5 in both stages of the drawn preset."""
    for stage, alpha in (("pretrain", 0.5), ("tune", 0.5)):
        for r in log_of(tuned, stage):
            rest = r["loss"] - alpha * r["loss_aux"] - (1 - alpha) * r["loss_cls"]
            assert 0 < rest < 0.05, r                        # 3e-5 times the sum of the norms


def test_the_loop_is_eq_1_within_eq_7(drawn, tuned, tmp_path, monkeypatch):
    """Two tasks and three architectures per step, the losses replaced by known ones: the logged loss is the mean of all
    six; both tasks see the same architectures; a task drawn twice in one step sees other images the second time."""
    calls = []

    def known(hypernet, ancestry, config, task, x, y, I, args, machine):
        value = torch.tensor(math.sin(7.0 * len(calls)) + 2)
        calls.append((value.item(), config, task.name, x.sum().item()))
        return value + 0 * sum(p.sum() for p in hypernet.parameters()), value * 2, value * 3
    monkeypatch.setattr(tal, "tal_step", known)
    tal.main([*TINY, "--stage", "tune", "--data-dir", str(drawn), "--output", str(tmp_path), "--ancestry", str(tuned / "ancestry.pt"),
              "--tasks-per-step", "2", "--meta-batch", "3", "--tune-epochs", "0.4"])
    pretrained = len(log_of(tmp_path, "pretrain"))           # one task there, but as many draws per step
    rows = [calls[i:i + 6] for i in range(pretrained * 6, len(calls), 6)]
    log = log_of(tmp_path, "tune")
    assert len(rows) == len(log) == 10                       # 0.4 x 10,000 / (2 x 200)
    for row, r in zip(rows, log):
        assert r["loss"] == pytest.approx(sum(v for v, *_ in row) / 6, rel=1e-5)
        assert (r["loss_cls"], r["loss_aux"]) == pytest.approx((2 * r["loss"], 3 * r["loss"]), rel=1e-5)
        assert [c for _, c, *_ in row[:3]] == [c for _, c, *_ in row[3:]]
        assert len({t for *_, t, _ in row[:3]}) == 1 and len({x for *_, x in row[:3]}) == 1
        assert row[0][3] != row[3][3]
    assert any(row[0][2] == row[3][2] for row in rows) and {t for row in rows for *_, t, _ in row} == {"pedestrian", "digits"}
    assert len({tuple(c for _, c, *_ in row) for row in rows}) > 5


def test_same_seed_same_run_and_another_seed_another(drawn, tuned, tmp_path):
    shared = [*TINY, "--stage", "tune", "--data-dir", str(drawn), "--ancestry", str(tuned / "ancestry.pt")]
    tal.main([*shared, "--output", str(tmp_path / "a")])
    tal.main([*shared, "--output", str(tmp_path / "b"), "--seed", "1"])
    assert_same_run(tmp_path / "a", tuned, "tune")
    assert [r["loss"] for r in log_of(tmp_path / "b", "tune")] != [r["loss"] for r in log_of(tuned, "tune")]


def test_evaluate_twice_says_the_same(drawn, tuned, tmp_path):
    """A finished run is read, not trained again."""
    shutil.copytree(tuned, tmp_path / "run")
    shared = [*TINY, "--stage", "evaluate", "--data-dir", str(drawn), "--output", str(tmp_path / "run")]
    tal.main(shared)
    first = json.loads((tmp_path / "run" / "untrained-evaluate-val.json").read_text())
    assert first == json.loads((tuned / "untrained-tune-val.json").read_text())
    assert (tmp_path / "run" / "tune.pt").read_bytes() == (tuned / "tune.pt").read_bytes()
    tal.main([*shared, "--split", "test", "--data", "digits"])
    assert set(json.loads((tmp_path / "run" / "untrained-evaluate-test.json").read_text())["3-Tiny"]) == {"digits", "average"}


def test_evaluate_gives_unseen_tasks_their_embedding(drawn, tuned, tmp_path, monkeypatch):
    """As train and customize do: I of the clothing images, not a prediction without task information."""
    shutil.copytree(tuned, tmp_path / "run")
    given, customize = [], tal.customize
    monkeypatch.setattr(tal, "customize", lambda hypernet, config, I, classes: given.append(I) or customize(hypernet, config, I, classes))
    tal.main([*TINY, "--stage", "evaluate", "--data-dir", str(drawn), "--output", str(tmp_path / "run"), "--data", "clothing"])
    assert len(given) == 9 and all(I is not None and I.norm().item() == pytest.approx(4, rel=1e-4) for I in given)


def test_customize_writes_the_network(drawn, tuned, tmp_path, capsys):
    """For a task of the tuning, and for a folder of images, whose embedding is made on the spot."""
    before = snapshot(tuned)
    tal.main([*TINY, "--stage", "customize", "--data", "digits", "--data-dir", str(drawn), "--tal-dir", str(tuned), "--depth", "5",
              "--width", "40", "--heads", "5", "--output", str(tmp_path / "new" / "net.pt")])
    assert "10 classes" in capsys.readouterr().out
    net = ViT(ViTConfig(32, 16, 40, 5, 5, 10, pool="avg"))
    net.load_state_dict(torch.load(tmp_path / "new" / "net.pt", weights_only=True), strict=True)
    saved = torch.load(tuned / "tune.pt", weights_only=True)
    hypernet = tal.build_hypernet(SimpleNamespace(**saved["config"]))
    hypernet.load_state_dict(saved["model"])
    expected = hypernet.predict(encode_graph(net), saved["extra"]["embeddings"]["digits"], 10)
    assert all(torch.allclose(p, expected[n], atol=1e-6) for n, p in net.named_parameters())

    rng = np.random.default_rng(0)
    for label, name in enumerate(("cat", "dog", "eel")):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for i in range(4):
            pixels = torch.from_numpy(rng.integers(0, 256, (3, 40, 50), dtype=np.uint8)) // (label + 1)
            torchvision.transforms.functional.to_pil_image(pixels).save(tmp_path / "mine" / name / f"{i}.png")
    tal.main([*TINY, "--stage", "customize", "--data", str(tmp_path / "mine"), "--data-dir", str(drawn), "--tal-dir", str(tuned),
              "--output", str(tmp_path / "mine.pt")])
    assert torch.load(tmp_path / "mine.pt", weights_only=True)["head.weight"].shape == (3, 48)
    assert snapshot(tuned) == before


def test_customize_from_nothing_and_again(drawn, tmp_path):
    """The first call makes TAL in --tal-dir, the second finds it there."""
    for name in ("first.pt", "second.pt"):
        tal.main([*TINY, "--stage", "customize", "--data", "digits", "--data-dir", str(drawn), "--tal-dir", str(tmp_path / "run"),
                  "--output", str(tmp_path / name)])
    first, second = (torch.load(tmp_path / n, weights_only=True) for n in ("first.pt", "second.pt"))
    assert all(torch.equal(first[n], second[n]) for n in first)


# ----------------------------------------------------------------------------------------------------------------------
# Runs: killed, and in two processes
# ----------------------------------------------------------------------------------------------------------------------

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(argv, log, script=None, processes=1):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    with open(log, "a") as out:
        return subprocess.Popen([sys.executable, *torchrun, str(script or ROOT / "tal.py"), *map(str, argv)], stdout=out, stderr=out, env=ENV)


def finish(argv, log, **how):
    process = start(argv, log, **how)
    try:
        assert process.wait(timeout=240) == 0, Path(log).read_text()[-3000:]
    finally:
        process.kill()


def reached(folder, stage, step):
    path = Path(folder) / "log.jsonl"
    if not path.exists():
        return False
    lines = [line for line in path.read_text().split("\n")[:-1] if f'"stage": "{stage}"' in line]
    return any(json.loads(line)["step"] >= step for line in lines)


def kill_when(now, argv, log):
    """Starts a run and kills it as soon as now() is true."""
    process = start(argv, log)
    try:
        while not now():
            assert process.poll() is None, Path(log).read_text()[-3000:]
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_killed_runs_end_as_if_never_stopped(drawn, tuned, tmp_path):
    """SIGKILL while pretraining, before and after checkpoints of the tuning, in the second epoch of a task, and while a
    checkpoint is being written; with another number of workers every time. Bitwise the same weights, the same log."""
    shared = [*TINY, "--stage", "tune", "--data-dir", drawn, "--ancestry", tuned / "ancestry.pt", "--data", "pedestrian", "--pretrain-epochs", "0.1",
              "--tune-epochs", "1.2", "--save-every", "10", "--log-every", "5"]            # 12 and 60 steps; 20 steps = an epoch of pedestrian
    finish([*shared, "--output", tmp_path / "whole"], tmp_path / "out")
    folder = tmp_path / "parts"
    kills = [lambda: reached(folder, "pretrain", 5), lambda: reached(folder, "tune", 5), lambda: reached(folder, "tune", 25),
             lambda: list(folder.glob(".tune.pt.*.tmp")) or reached(folder, "tune", 45)]
    for workers, now in enumerate(kills, 1):
        kill_when(now, [*shared, "--output", folder, "--workers", workers], tmp_path / "out")
    finish([*shared, "--output", folder], tmp_path / "out")
    for stage, steps in (("pretrain", 12), ("tune", 60)):
        assert_same_run(folder, tmp_path / "whole", stage)
        assert steps_of(folder, stage)[-1] == steps
    assert json.loads((folder / "untrained-tune-val.json").read_text()) == json.loads((tmp_path / "whole" / "untrained-tune-val.json").read_text())


def test_two_processes_have_the_loss_curve_of_one(drawn, tuned, tmp_path):
    """The same global batch and architectures: within 1e-5."""
    shared = [*TINY, "--stage", "tune", "--data-dir", drawn, "--ancestry", tuned / "ancestry.pt", "--data", "pedestrian", "--tune-epochs", "0.2"]
    finish([*shared, "--output", tmp_path / "one"], tmp_path / "out")
    finish([*shared, "--output", tmp_path / "two"], tmp_path / "out", processes=2)
    for stage in ("pretrain", "tune"):
        one, two = log_of(tmp_path / "one", stage), log_of(tmp_path / "two", stage)
        assert [r["step"] for r in one] == [r["step"] for r in two] and len(one) >= 4
        for a, b in zip(one, two):
            for key in ("loss", "loss_cls", "loss_aux", "lr", "images"):
                assert a[key] == pytest.approx(b[key], abs=1e-5), (stage, a, b)


DYING = """
import os, signal, sys
sys.path.insert(0, {root!r})
import common, tal
update = common.Training.update

def dying(self, *loss, **values):
    if self.step == 0:                          # before the first exchange of gradients, which waits for both
        with open(os.path.join({folder!r}, os.environ["RANK"]), "w") as file:
            file.write(str(os.getpid()))
    if self.step == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return update(self, *loss, **values)

common.Training.update = dying
tal.main(sys.argv[1:])
"""


def test_a_dying_process_ends_the_others(drawn, tuned, tmp_path):
    """Process 1 kills itself in step 2 while process 0 waits for its gradients: an error, not a hang."""
    (tmp_path / "pids").mkdir()
    (tmp_path / "dying.py").write_text(DYING.format(root=str(ROOT), folder=str(tmp_path / "pids")))
    process = start([*TINY, "--stage", "pretrain", "--data-dir", drawn, "--ancestry", tuned / "ancestry.pt", "--output", tmp_path / "run"],
                    tmp_path / "out", script=tmp_path / "dying.py", processes=2)
    try:
        code = process.wait(timeout=120)                     # starting included; a hang would last 30 minutes
    finally:
        process.kill()
    assert code != 0
    assert sorted(os.listdir(tmp_path / "pids")) == ["0", "1"], (tmp_path / "out").read_text()[-3000:]
    for rank in "01":
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pids" / rank).read_text()), 0)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input
# ----------------------------------------------------------------------------------------------------------------------

# given to a directory that holds a finished TAL run
BAD_FLAGS = [
    ("--stage fly", "--stage"), ("--method dino", "--method"), ("--frobnicate 3", "--frobnicate"), ("--preset huge", "--preset"),
    ("--epochs many", "--epochs"), ("--augment perhaps", "yes or no"), ("--archs ViTs", "--archs"), ("--mlp a,b", "--mlp"),
    ("--device cuda", "--device cuda"), ("--device tpu", "--device"), ("--batch-size 0", "--batch-size"),
    ("--stage customize --data digits --width 50 --heads 6 --output {out}/new.pt", "6 heads do not divide"),
    ("--stage train --data digits --width 50 --heads 6", "6 heads do not divide"),
    ("--stage pretrain --patch 7", "patches of 7 px do not tile"),
    ("--stage train --data /no/such/folder", "/no/such/folder"), ("--stage evaluate --data dgits", "dgits"),
    ("--stage tune --tune-tasks digits,peds", "peds"), ("--stage tune --ancestry /no/such/file.pt", "/no/such/file.pt"),
    ("--stage customize --data digits --output {out}", "--output"), ("--stage customize --data digits --output {out}/net.bin", "--output"),
    ("--stage customize --data digits,pedestrian --output {out}/net.pt", "one task"), ("--stage customize --output {out}/net.pt", "one task"),
    ("--stage evaluate --method logah", "method 'tal'"), ("--stage tune --seed 5", "seed 0"), ("--stage tune --tune-epochs 3", "steps"),
    ("--stage pretrain --hid 64", "hid 32"), ("--stage ancestry --ancestry-width 32", "ancestry.pt"),
    ("--stage tune --tune-tasks textures,digits", "tune"),   # as many images, other tasks: not this directory's hypernetwork
]


@pytest.mark.parametrize("flags, words", BAD_FLAGS, ids=[f for f, _ in BAD_FLAGS])
def test_bad_input_is_one_sentence_and_overwrites_nothing(flags, words, drawn, tuned, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "run"
    shutil.copytree(tuned, out)
    before = snapshot(tmp_path)
    where = [] if "--output" in flags else ["--output", str(out)]
    refuses(capsys, lambda: tal.main([*TINY, "--data-dir", str(drawn), "--tal-dir", str(out), *where, *flags.format(out=out).split()]), words)
    after = snapshot(tmp_path)
    assert [n for n in before.keys() | after.keys() if before.get(n) != after.get(n)] == []


# sizes that cannot be, given to a fresh directory
BAD_SIZES = [("--hid 30", "hid"), ("--hyper-heads 5", "hyper"), ("--mlp 3", "mlp"), ("--meta-batch 2000", "meta"), ("--meta-batch 0", "meta"),
             ("--max-classes 5", "--max-classes"), ("--ancestry-width 32", "ancestry"), ("--pretrain-epochs -1", "epochs"),
             ("--image-size 0", "image-size"), ("--rank 0", "rank")]


@pytest.mark.parametrize("flags, words", BAD_SIZES, ids=[f for f, _ in BAD_SIZES])
def test_impossible_sizes_are_one_sentence(flags, words, drawn, tuned, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        tal.main([*TINY, "--stage", "pretrain", "--data-dir", str(drawn), "--output", str(tmp_path), "--ancestry", str(tuned / "ancestry.pt"),
                  *flags.split()])
    sentences = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]              # beside the progress bar
    assert stop.value.code == 2 and len(sentences) == 1 and words in sentences[0]
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("name", ["tune", "pretrain", "ancestry"])
def test_truncated_checkpoints(name, drawn, tuned, tmp_path, capsys):
    shutil.copytree(tuned, tmp_path / "run")
    path = tmp_path / "run" / f"{name}.pt"
    path.write_bytes(path.read_bytes()[:3000])
    if name == "pretrain":
        (tmp_path / "run" / "tune.pt").unlink()
    before = {k: v for k, v in snapshot(tmp_path).items() if not k.endswith("config.json")}
    refuses(capsys, lambda: tal.main([*TINY, "--stage", "evaluate", "--data-dir", str(drawn), "--output", str(tmp_path / "run")]), f"{name}.pt")
    assert {k: v for k, v in snapshot(tmp_path).items() if not k.endswith("config.json")} == before


def test_batch_must_divide_among_processes(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    refuses(capsys, lambda: tal.settings(["--batch-size", "64"]), "--batch-size 64", "3 processes")


# ----------------------------------------------------------------------------------------------------------------------
# README
# ----------------------------------------------------------------------------------------------------------------------

def test_readme_maps_every_equation_to_a_tagged_function():
    """Rows "| Eq. (4) | `loss_aux` | tal.py |": the function is in the file, and a line in it ends in "# Eq. (4)"."""
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if re.match(r"\|\s*Eqs?\. \(", line)]
    found = set()
    for row in rows:
        equation, function, file = (cell.strip() for cell in row.strip("|").split("|")[:3])
        source = (ROOT / file.strip("`")).read_text()
        functions = {n.name: "\n".join(source.splitlines()[n.lineno - 1:n.end_lineno])
                     for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)}
        names = re.findall(r"`([\w.]+)`", function)
        assert names, row
        for name in names:
            assert name.split(".")[-1] in functions, row
        for number in re.findall(r"\((\d+)\)", equation):
            assert any(re.search(rf"#.*Eq\. \({number}\)", functions[name.split(".")[-1]]) for name in names), row
            found.add((file.strip("`"), int(number)))
    assert found == {("tal.py", n) for n in range(1, 8)} | {("adaptive_learngene.py", n) for n in range(1, 9)}
