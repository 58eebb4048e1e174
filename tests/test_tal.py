"""tal.py against the paper, in the order of tal.py: every equation by an oracle of its own, graphs by hand,
decoders by explicit sums; then runs end to end, stopped runs, and bad input by what is left behind."""
import copy
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace

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
from conftest import (CPU, ENV, PATIENCE, ROOT, TINY, assert_same_run, dying_script, exit_codes, finish,
                      kill_when, killed_in, log_of, picture, reached, refuses, same_state, snapshot, start,
                      weights_of)
from tal import OPS, HypernetConfig, ParameterBatch, Role, encode_graph

SHAPE = {"image_size": 32, "patch_size": 8, "pooling": "token"}


def small_vit(depth=2, width=32, heads=4, classes=10, pooling="token"):
    return ViTConfig(32, 8, width, depth, heads, classes, pooling)


def small_hypernet(decoder="low-rank", task_dim=8, rank=4, scale="rms", classes=1000):
    torch.manual_seed(0)
    return tal.Hypernet(HypernetConfig(
        width=32, layers=2, heads=4, max_distance=6, rank=rank, mlp=(32, 48), channels=64, kernels=8,
        classes=classes, scale=scale, decoder=decoder, task_dim=task_dim))


def with_task_weights(hypernet):
    torch.manual_seed(1)
    for layer in hypernet.learngene.layers:
        nn.init.normal_(layer.W_gamma, std=0.3)
        nn.init.normal_(layer.W_beta, std=0.3)
    return hypernet


def graph_of(**sizes):
    return encode_graph(tal.skeleton(small_vit(**sizes)))


def small_task(name="t", classes=2, images=None, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)):
    """A task of bytes that are all the same, unless images (N, 3, S, S) are given."""
    if images is None:
        images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    labels = torch.zeros(len(images), dtype=torch.long)
    return data.Task(name, [str(k) for k in range(classes)], mean, std, {"train": images}, {"train": labels})


def bytes_of(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


# ------------------------------------------------------------------------------------------------------------
# Architectures
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dataset, depths, widths, first, digest", [
    ("ViTs-1K", (3, 9), (128, 512), [(4, 384, 3), (5, 256, 8), (9, 224, 8)], "2a1f7df6e6360916"),
    ("ViTs+-1K", (3, 12), (192, 768), [(5, 768, 3), (7, 256, 8), (10, 640, 8)], "13d983c3b1e878eb"),
    ("drawn", (2, 6), (32, 56), [(3, 32, 4), (3, 32, 4), (4, 56, 7)], "a661f5149a8b8986"),
    ("drawn+", (2, 8), (32, 96), [(3, 40, 5), (4, 40, 5), (6, 88, 11)], "c6d68123629212fe")])
def test_architecture_datasets(dataset, depths, widths, first, digest):
    """A thousand each, within the released ranges up to both ends, the same on every machine."""
    random.seed(3)
    configs = tal.architectures(dataset, SHAPE)
    sizes = [(c.depth, c.width, c.heads) for c in configs]
    assert len(sizes) == 1000 and sizes[:3] == first
    assert hashlib.sha256(repr(sizes).encode()).hexdigest()[:16] == digest
    assert (min(d for d, _, _ in sizes), max(d for d, _, _ in sizes)) == depths
    assert (min(w for _, w, _ in sizes), max(w for _, w, _ in sizes)) == widths
    assert all(w % h == 0 for _, w, h in sizes)
    assert all((c.image_size, c.patch_size, c.pooling) == (32, 8, "token") for c in configs)
    if dataset == "ViTs-1K":                                 # wide only where shallow, so that none is large
        assert all(w <= (512 if d == 3 else 384 if d <= 5 else 256) and w % 32 == 0 for d, w, _ in sizes)
    if dataset == "ViTs+-1K":
        assert all(w % 64 == 0 for _, w, _ in sizes)


def test_vits_1k_have_at_most_ten_million_parameters():
    """At 32 px, patches of 4, 10 classes: 12 D^2 + 13 D per layer, the rest by hand; one is also counted."""
    def count(c):
        D, tokens = c.width, (c.image_size // c.patch_size) ** 2 + 1
        blocks = c.depth * (12 * D * D + 13 * D)
        return blocks + 3 * c.patch_size ** 2 * D + D + D + tokens * D + 2 * D + 10 * D + 10

    def configs(dataset):
        shape = {"image_size": 32, "patch_size": 4, "num_classes": 10}
        return tal.architectures(dataset, shape)
    small, plus = configs("ViTs-1K"), configs("ViTs+-1K")
    assert 9e6 < max(map(count, small)) <= 10e6
    assert sum(p.numel() for p in tal.skeleton(small[0]).parameters()) == count(small[0])
    assert sum(map(count, plus)) / 1000 == pytest.approx(24e6, rel=0.1) and max(map(count, plus)) > 80e6


# ------------------------------------------------------------------------------------------------------------
# The computational graph
# ------------------------------------------------------------------------------------------------------------

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
    """input 0 -> fc1.weight 1 -> fc1.bias 2 -> sum 3 -> fc2.weight 4 -> fc2.bias 5; shortcut 0 -> 3."""
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
    assert (graph.heads, graph.num_classes, graph.joins) == ([4], 3, {3})
    assert [node for node in range(6) if graph.counts_classes(node)] == [4, 5]


def test_rows_of_the_distance_table_by_hand():
    """The toy with paths told apart up to 2: 0 no path; 1, 2, 3 for 0, 1, 2 edges on; 4, 5 for 1, 2 back."""
    index = encode_graph(Toy()).distance_index(2).tolist()
    assert index[0] == [1, 2, 3, 2, 3, 3] and index[5] == [5, 5, 5, 5, 4, 1]             # 3 edges count as 2

    class Two(nn.Module):                                 # an unconnected source: no path in either direction
        def __init__(self):
            super().__init__()
            self.scale, self.fc = nn.Parameter(torch.ones(1, 4)), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(x + self.scale)
    graph = encode_graph(Two())
    assert ops_of(graph)[:3] == ["input", "pos_enc", "sum"] and sorted(graph.edges)[:2] == [(0, 2), (1, 2)]
    assert graph.distance_index(2)[0, 1] == 0 and graph.distance_index(2)[1, 0] == 0


def test_parameters_that_functions_read():
    """F.linear with parameters of the module itself; a module used twice has its nodes once."""
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.W, self.bias = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(self.fc(F.linear(x, self.W, self.bias)))
    graph = encode_graph(Functional())
    assert ops_of(graph) == ["input", "conv", "bias", "conv", "bias"]
    assert graph.names == [None, "W", "bias", "fc.weight", "fc.bias"]
    assert sorted(graph.edges) == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_unused_parameter_is_one_sentence():
    class Unused(Toy):
        def __init__(self):
            super().__init__()
            self.never = nn.Linear(2, 2)
    with refuses("Unused has no use for never.weight"):
        encode_graph(Unused())


def test_shortest_paths_equal_floyd_warshall():
    rng = random.Random(0)
    for count in (1, 2, 5, 12, 20):
        for density in (0.1, 0.3, 0.8):
            edges = [(i, j) for j in range(count) for i in range(j) if rng.random() < density]
            rng.shuffle(edges)
            far = 10 ** 6
            best = [[far] * count for _ in range(count)]
            for i in range(count):
                for j in range(count):
                    if i == j or (i, j) in edges:
                        best[i][j] = int(i != j)
            for k in range(count):
                for i in range(count):
                    for j in range(count):
                        best[i][j] = min(best[i][j], best[i][k] + best[k][j])
            expected = [[-1 if d == far else d for d in row] for row in best]
            assert tal.shortest_paths(count, edges).tolist() == expected


BLOCK = ["ln", "bias", "conv", "bias", "msa", "conv", "bias", "sum",
         "ln", "bias", "conv", "bias", "conv", "bias", "sum"]


def test_nodes_of_a_vit():
    """norm1, qkv, attention, proj, shortcut; norm2, fc1, fc2, shortcut."""
    graph = graph_of()
    stem = ["input", "conv", "bias", "pos_enc", "concat", "pos_enc", "sum"]
    assert ops_of(graph) == [*stem, *BLOCK, *BLOCK, "ln", "bias", "conv", "bias"]
    assert graph.names[3] == "cls_token" and graph.names[5] == "pos_embed"
    block = [name and name.removeprefix("blocks.0.") for name in graph.names[7:22]]
    assert block == ["norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", None,
                     "attn.proj.weight", "attn.proj.bias", None, "norm2.weight", "norm2.bias",
                     "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias", None]
    edges = set(graph.edges)
    assert {(6, 7), (6, 14), (14, 15), (14, 21)} <= edges                                # both shortcuts
    assert all((i, i + 1) in edges for i in range(6, 36))
    assert ops_of(graph_of(depth=1, pooling="avg")) == [
        "input", "conv", "bias", "pos_enc", "sum", *BLOCK, "glob_avg", "ln", "bias", "conv", "bias"]


TORCHVISION = {                       # name -> (how to build it small, heads of its attention nodes in order)
    "vit": (lambda: torchvision.models.VisionTransformer(32, 16, 3, 12, 192, 768), [12] * 3),
    "swin_t": (torchvision.models.swin_t, [3, 3, 6, 6, 12, 12, 12, 12, 12, 12, 24, 24]),
    "resnet50": (torchvision.models.resnet50, []),
    "convnext_tiny": (torchvision.models.convnext_tiny, []),
    "ours": (lambda: ViT(small_vit(pooling="avg", depth=3)), [4] * 3),
    "ours, token": (lambda: ViT(small_vit(pooling="token", depth=3)), [4] * 3),
}


@pytest.fixture(scope="module")
def nets():
    """{name: (network, graph)}."""
    torch.manual_seed(0)
    built = {name: make().eval() for name, (make, _) in TORCHVISION.items()}
    return {name: (net, encode_graph(net)) for name, net in built.items()}


def check_graph(net, graph):
    """Every parameter is one node in its shape; edges go forward; all but sources comes from the input."""
    params = dict(net.named_parameters())
    assert Counter(n for n in graph.names if n) == Counter(params.keys())
    assert all(graph.shapes[i] == tuple(params[n].shape) for i, n in enumerate(graph.names) if n)
    assert all(i < j for i, j in graph.edges) and len(set(graph.edges)) == len(graph.edges)
    ops = ops_of(graph)
    for j in range(len(graph)):
        assert graph.distance[0, j] >= 0 or (not graph.inputs[j] and ops[j] == "pos_enc"), graph.names[j]


@pytest.mark.parametrize("name", TORCHVISION)
def test_graphs_of_torchvision(name, nets):
    net, graph = nets[name]
    check_graph(net, graph)
    assert (graph.distance[:, -1] >= 0).all()
    attention = [i for i, op in enumerate(ops_of(graph)) if op == "msa"]
    assert [graph.shapes[i] for i in attention] == [(h,) for h in TORCHVISION[name][1]]
    (head,) = graph.heads
    assert graph.names[head] in ("head.weight", "heads.head.weight", "fc.weight", "classifier.2.weight")
    assert graph.num_classes == (10 if name.startswith("ours") else 1000)


def test_residual_sums_and_kinds_of_torchvision(nets):
    """resnet50: 16 blocks; swin_t: 24 shortcuts; convnext: 18 blocks, each with one depthwise convolution."""
    count = {name: Counter(ops_of(graph)) for name, (_, graph) in nets.items()}
    found = {op: count["resnet50"][op] for op in ("sum", "bn", "conv", "max_pool", "glob_avg")}
    assert found == {"sum": 16, "bn": 53, "conv": 54, "max_pool": 1, "glob_avg": 1}
    assert count["swin_t"]["sum"] == 24
    assert count["convnext_tiny"]["sum"] == 18 and count["convnext_tiny"]["sep_conv"] == 18
    assert count["vit"]["sum"] == 7                                                     # 6, and the positions


def test_graph_of_torchvisions_vit_is_ours(nets):
    """Written by others, with other names and nn.MultiheadAttention: the same graph."""
    ours = encode_graph(tal.skeleton(ViTConfig(32, 16, 192, 3, 12)))
    theirs = nets["vit"][1]
    assert ops_of(ours) == ops_of(theirs) and ours.shapes == theirs.shapes
    assert sorted(ours.edges) == sorted(theirs.edges) and torch.equal(ours.distance, theirs.distance)
    learngene = small_hypernet().learngene
    assert torch.equal(learngene(ours), learngene(theirs))


class Sequence(nn.Module):
    """Tokens (B, T) through one kind of layer to a head; `out` picks what the layer's output is."""
    def __init__(self, layer, out=lambda x: x):
        super().__init__()
        self.table, self.layer, self.head, self.out = nn.Embedding(8, 6), layer, nn.Linear(6, 3), out

    def forward(self, ids):
        return self.head(self.out(self.layer(self.table(ids))).mean(1))


class Tied(nn.Module):
    """The head is the token table, and one block has three names."""
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(8, 6), nn.Linear(6, 8, bias=False)
        self.head.weight = self.table.weight
        self.first = self.second = self.third = nn.Linear(6, 6)

    def forward(self, ids):
        x = self.table(ids)
        return self.head(self.third(self.second(torch.relu(self.first(x)))))


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 5)

    def forward(self, x):
        x = torch.relu(self.body(x))
        return self.a(x), self.b(x)


IDS = torch.randint(0, 8, (2, 5))
NETS = {                                     # name -> (network, input, names of its heads)
    "tied": (Tied(), IDS, []),
    "two heads": (TwoHeads(), torch.randn(2, 6), ["a.weight", "b.weight"]),
    "conv1d": (nn.Sequential(nn.Conv1d(3, 6, 3), nn.PReLU(), nn.Conv1d(6, 4, 1), nn.AdaptiveAvgPool1d(1)),
               torch.randn(2, 3, 9), ["2.weight"]),
    "conv3d": (nn.Sequential(nn.Conv3d(3, 6, (2, 3, 3)), nn.BatchNorm3d(6), nn.PReLU(6), nn.Conv3d(6, 4, 1)),
               torch.randn(2, 3, 4, 5, 5), ["3.weight"]),
    "convolution as head": (nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1)),
                            torch.randn(2, 3, 6, 6), []),
    "LSTM": (Sequence(nn.LSTM(6, 6, batch_first=True), lambda x: x[0]), IDS, ["head.weight"]),
    "GRU": (Sequence(nn.GRU(6, 3, 2, bidirectional=True, batch_first=True), lambda x: x[0]), IDS,
            ["head.weight"]),
    "RMSNorm": (Sequence(nn.RMSNorm(6)), IDS, ["head.weight"]),
}


@pytest.mark.parametrize("decoder", ["low-rank", "tiled"])
@pytest.mark.parametrize("name", NETS)
def test_any_network(name, decoder):
    """Every parameter has one node, is predicted in its shape, and the network runs."""
    net, x, heads = NETS[name]
    graph = encode_graph(net)
    check_graph(net, graph)
    assert [graph.names[head] for head in graph.heads] == heads
    torch.manual_seed(0)
    hypernet = tal.Hypernet(replace(tal.HYPERNETS["tiny"], tokens=8, decoder=decoder))
    model = tal.TAL(hypernet, None, {}, {}, tal.settings(["--hypernet", "tiny"]))
    out = model(net)(x)
    for part in out if isinstance(out, tuple) else (out,):
        assert part.isfinite().all() and part.std() > 0
    if name == "tied":
        assert net.head.weight is net.table.weight and len(graph) == 4


class Forked(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else -self.fc(x)


@pytest.mark.parametrize("net, words", [
    (Forked(), "torch.fx cannot trace Forked"),
    (Sequence(nn.TransformerEncoderLayer(6, 2, 8)), "TransformerEncoderLayer, which has no place"),
    (nn.Sequential(nn.Bilinear(4, 4, 2)), "Bilinear, which has no place|cannot trace")])
def test_networks_that_are_refused(net, words):
    with refuses(words):
        encode_graph(net)


FAMILIES = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s maxvit_t mnasnet0_5 mobilenet_v2 "
    "mobilenet_v3_small regnet_y_400mf resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_0 swin_v2_t vgg11_bn "
    "wide_resnet50_2 deeplabv3_resnet50 fcn_resnet50 lraspp_mobilenet_v3_large r3d_18 mc3_18 r2plus1d_18 s3d "
    "mvit_v1_b mvit_v2_s swin3d_t").split()
MODULES = (torchvision.models, torchvision.models.segmentation, torchvision.models.video)
EVERY = [name for module in MODULES for name in torchvision.models.list_models(module=module)]


def without_storage(name, monkeypatch):
    """One of torchvision's networks on the meta device, without what it has for training alone."""
    blocks = torchvision.models.regnet.BlockParams
    count_blocks = blocks.from_init_params                   # it computes with tensors that need storage

    def on_the_cpu(*args, **kwargs):
        with torch.device("cpu"):
            return count_blocks(*args, **kwargs)
    monkeypatch.setattr(blocks, "from_init_params", on_the_cpu)
    more = {}
    if name.startswith(("deeplab", "fcn", "lraspp")):
        more = {"weights_backbone": None}
    elif name in ("googlenet", "inception_v3"):
        more = {"aux_logits": False, "init_weights": False}
    with torch.device("meta"):
        return torchvision.models.get_model(name, weights=None, **more).eval()


def check_predicted_shapes(net):
    with torch.device("meta"):
        hypernet = tal.Hypernet(replace(tal.HYPERNETS["tiny"], channels=2048, kernels=16, classes=1000))
    weights = hypernet.predict(encode_graph(net).to("meta"))
    assert {n: w.shape for n, w in weights.items()} == {n: p.shape for n, p in net.named_parameters()}


@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_of_torchvision(name, monkeypatch):
    """One of each family of classifiers, segmentation and video networks, without storage."""
    check_predicted_shapes(without_storage(name, monkeypatch))


@pytest.mark.full_size
@pytest.mark.parametrize("name", EVERY)
def test_every_network_of_torchvision(name, monkeypatch):
    check_predicted_shapes(without_storage(name, monkeypatch))


def test_size_features_interpolate_on_a_log_scale():
    """1, 2 and 4 sit on anchors 0, 1, 2; 3 lies between: log2(3) = 1.585; 0 is nothing; 10^6 is the end."""
    rows = tal.interpolated_size([1, 2, 3, 0, 10 ** 6])
    assert rows[0, 0] == 1 and rows[1, 1] == 1 and rows[4, 15] == 1
    assert rows[2, 1].item() == pytest.approx(0.415, abs=1e-3)
    assert rows[2, 2].item() == pytest.approx(0.585, abs=1e-3)
    assert rows.sum(1).tolist() == pytest.approx([1, 1, 1, 0, 1])


def test_class_count_is_hidden_from_the_learngene():
    """D10: the graphs of a network with 10 and with 100 classes look the same."""
    learngene = small_hypernet().learngene
    assert torch.equal(learngene(graph_of(classes=10)), learngene(graph_of(classes=100)))


# ------------------------------------------------------------------------------------------------------------
# Eqs. (2), (3): (gamma, beta) = (W^gamma, W^beta) I;  f_tau = gamma x f + beta
# ------------------------------------------------------------------------------------------------------------

def test_eq2_by_hand():
    W_gamma = torch.tensor([[1., 2.], [3., 4.], [0., -1.]])
    W_beta = torch.tensor([[0., 1.], [1., 0.], [2., 2.]])
    gamma, beta = tal.task_hypernet(torch.tensor([10., 1.]), W_gamma, W_beta)
    assert gamma.tolist() == [12, 34, -1] and beta.tolist() == [1, 10, 22]


def test_eq3_by_hand():
    """Two nodes, three features: the same gamma and beta for both nodes."""
    f = torch.tensor([[1., 2., 3.], [4., 5., 6.]])
    out = tal.task_specific_layer(f, torch.tensor([2., 0., -1.]), torch.tensor([.5, 1., 0.]))
    assert out.tolist() == [[2.5, 1, -3], [8.5, 1, -6]]


def test_graph_layer_is_torchs_pre_norm_transformer_layer():
    """Without task: nn.TransformerEncoderLayer with an additive mask per head. With task: the same layer
    after gamma and beta have been folded into its first norm: (1 + gamma) (w z + b) + beta (D1, D2)."""
    torch.manual_seed(0)
    V, width, heads, t = 7, 16, 4, 5
    layer = tal.GraphLayer(width, heads, t)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    theirs = nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0, activation="gelu", batch_first=True, norm_first=True)
    theirs.load_state_dict({
        "self_attn.in_proj_weight": layer.qkv.weight, "self_attn.in_proj_bias": torch.zeros(3 * width),
        "self_attn.out_proj.weight": layer.proj.weight, "self_attn.out_proj.bias": layer.proj.bias,
        "linear1.weight": layer.ff[0].weight, "linear1.bias": layer.ff[0].bias,
        "linear2.weight": layer.ff[2].weight, "linear2.bias": layer.ff[2].bias,
        "norm1.weight": layer.norm1.weight, "norm1.bias": layer.norm1.bias,
        "norm2.weight": layer.norm2.weight, "norm2.bias": layer.norm2.bias})
    h, bias, I = torch.randn(V, width), torch.randn(heads, V, V), torch.randn(t)
    torch.testing.assert_close(layer(h, bias, None), theirs(h[None], src_mask=bias)[0], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        gamma, beta = layer.W_gamma @ I, layer.W_beta @ I
        theirs.norm1.bias.copy_((1 + gamma) * layer.norm1.bias + beta)
        theirs.norm1.weight.copy_((1 + gamma) * layer.norm1.weight)
    torch.testing.assert_close(layer(h, bias, I), theirs(h[None], src_mask=bias)[0], atol=1e-5, rtol=1e-5)


def test_task_embedding_changes_nothing_at_first_and_everything_later():
    """W^gamma = W^beta = 0 at the start of tuning, so tuning begins with the pretrained network."""
    graph, hypernet = graph_of(), small_hypernet()
    I, J = torch.randn(8), torch.randn(8)
    plain, first = hypernet.predict(graph), hypernet.predict(graph, I)
    assert all(torch.equal(plain[n], first[n]) for n in plain)
    with_task_weights(hypernet)
    a, b = hypernet.predict(graph, I), hypernet.predict(graph, J)
    assert [n for n in a if torch.equal(a[n], b[n]) or torch.equal(a[n], plain[n])] == []


def test_number_of_heads_changes_the_prediction():
    """D12: nothing but the attention nodes tells 4 heads of 8 channels from 2 of 16."""
    hypernet = small_hypernet()
    four, two = graph_of(heads=4), graph_of(heads=2)
    assert ops_of(four) == ops_of(two)
    assert [s for s in four.shapes if len(s) != 1] == [s for s in two.shapes if len(s) != 1]
    a, b = hypernet.predict(four), hypernet.predict(two)
    assert all(not torch.equal(a[n], b[n]) for n in a if n.endswith("qkv.weight"))


# ------------------------------------------------------------------------------------------------------------
# Decoders and predict
# ------------------------------------------------------------------------------------------------------------

def test_low_rank_decoder_by_explicit_sums():
    """W[o, i, y, x] = sum_k A[o + y channels, k] B[i + x channels, k] / sqrt(r), summed one by one, times
    sqrt(2 / fan-in); of a bias tanh(0.2 w)."""
    torch.manual_seed(0)
    r, channels = 3, 8
    decoder = tal.LowRankDecoder(HypernetConfig(
        width=16, rank=r, channels=channels, kernels=2, classes=6, mlp=(12, 10), scale="fan-in")).double()
    h = torch.randn(4, 16, dtype=torch.float64)
    roles = [Role((5, 7), "conv", is_head=True), Role((4, 7), "conv"), Role((12, 4), "conv", parts=3),
             Role((4, 3, 2, 2), "conv"), Role((4,), "bias")]
    nodes = [0, 1, 2, 3, 1]
    batches = [ParameterBatch(role, ["a"], torch.tensor([node])) for role, node in zip(roles, nodes)]
    head_w, plain_w, qkv_w, kernel_w, vector_w = (w[0] for w in decoder(h, batches, 1))
    row_basis, col_basis = decoder.row_basis.tolist(), decoder.col_basis.tolist()

    def entry(node, row, column):
        code = decoder.code(decoder.mlp(h[node])).view(2, r, r).tolist()
        A = [sum(row_basis[row][i] * code[0][i][k] for i in range(r)) for k in range(r)]
        B = [sum(col_basis[column][i] * code[1][i][k] for i in range(r)) for k in range(r)]
        fan_in = math.prod(roles[node].shape[1:])
        return sum(a * b for a, b in zip(A, B)) / math.sqrt(r) * math.sqrt(2 / fan_in)

    for o, i in itertools.product(range(4), range(7)):
        assert plain_w[o, i].item() == pytest.approx(entry(1, o, i), rel=1e-9)
    for o in range(5):                                       # D6: classes lie behind channels x kernels
        assert head_w[o, 2].item() == pytest.approx(entry(0, channels * 2 + o, 2), rel=1e-9)
    for part, o in itertools.product(range(3), range(4)):    # D7: at 0, channels, 2 channels (16: around)
        row = (part * channels + o) % (channels * 2)
        assert qkv_w[part * 4 + o, 1].item() == pytest.approx(entry(2, row, 1), rel=1e-9)
    for o, i, y, x in itertools.product(range(4), range(3), range(2), range(2)):
        expected = entry(3, o + y * channels, i + x * channels)
        assert kernel_w[o, i, y, x].item() == pytest.approx(expected, rel=1e-9)
    code = decoder.vector_code(decoder.mlp(h[1])).tolist()
    for o in range(4):
        basis = decoder.vector_basis[o].tolist()
        w = sum(c * b for c, b in zip(code, basis))
        assert vector_w[o].item() == pytest.approx(math.tanh(0.2 * w))


@pytest.mark.parametrize("name, width", [("drawn", 48), ("paper", 384)])
def test_the_shorter_product_is_that_of_a_and_b(name, width):
    """W = A B^T, scaled afterwards, and all its gradients, under the paper's rule and D8's."""
    torch.manual_seed(0)
    roles = [Role((3 * width, width), "conv", parts=3), Role((width, 4 * width), "conv", ends_branch=True),
             Role((width, 3, 8, 8), "conv"), Role((1, 16, width), "pos_enc"),
             Role((10, width), "conv", is_head=True)]
    batches = [ParameterBatch(role, ["W"], torch.tensor([0, 1])) for role in roles]
    for rule in ("fan-in", "rms"):
        decoder = tal.LowRankDecoder(replace(tal.HYPERNETS[name], scale=rule, mlp=(8, 16))).double()
        h = torch.randn(2, decoder.config.width, dtype=torch.float64)
        r, plain = decoder.config.rank, []
        C = decoder.code(decoder.mlp(h)).view(2, 2, r, r)
        for role in roles:
            A = decoder.row_basis[decoder.basis_rows(role)] @ C[:, 0] / r ** 0.5
            B = decoder.col_basis[decoder.basis_columns(role)] @ C[:, 1]
            plain.append(tal.scaled(A @ B.transpose(1, 2), role, rule, branches=8))
        shorter = decoder(h, batches, 8)
        weights = list(decoder.parameters())
        for W, V in zip(shorter, plain):
            if W.ndim == 5:                                  # (n, out, in, kh, kw) -> (n, out * kh, in * kw)
                W = W.transpose(2, 3).reshape(V.shape)
            torch.testing.assert_close(W, V)
            probe = torch.randn_like(V)
            both = [torch.autograd.grad((X * probe).sum(), weights, retain_graph=True, allow_unused=True)
                    for X in (W, V)]
            torch.testing.assert_close(*both)


def test_predicted_matrices_have_rank_r():
    weights = small_hypernet(rank=4).predict(graph_of(width=48))
    for name in ("blocks.0.attn.proj.weight", "blocks.1.mlp.fc1.weight", "head.weight"):
        assert torch.linalg.matrix_rank(weights[name].double(), rtol=1e-5).item() == 4, name


def test_queries_keys_and_values_sit_at_fixed_places():
    """From the same code, q, k and v of width 32 are the first rows and columns of those of width 48 (D7);
    likewise the class rows of 5 and 9 classes (D6), and the tiled decoder's corners."""
    torch.manual_seed(0)
    h = torch.randn(1, 32)

    def decoded(decoder, *roles):
        batches = [ParameterBatch(role, ["W"], torch.tensor([0])) for role in roles]
        decoded = [w[0] for w in decoder(h, batches, 1)]
        return [w * math.prod(role.shape[1:]) ** 0.5 for w, role in zip(decoded, roles)]     # unscaled
    low_rank, tiled = small_hypernet(scale="fan-in").decoder, small_hypernet("tiled", scale="fan-in").decoder
    narrow, wide, five, nine = decoded(
        low_rank, Role((96, 32), "conv", parts=3), Role((144, 48), "conv", parts=3),
        Role((5, 32), "conv", is_head=True), Role((9, 48), "conv", is_head=True))
    for part in range(3):
        torch.testing.assert_close(narrow[part * 32:part * 32 + 32], wide[part * 48:part * 48 + 32, :32])
    assert not torch.equal(narrow[:32], narrow[32:64])
    torch.testing.assert_close(five, nine[:5, :32])
    small, large = decoded(tiled, Role((40, 32), "conv"), Role((96, 64), "conv"))
    torch.testing.assert_close(small[..., 0], large[:40, :32, 0])
    torch.testing.assert_close(large[:32, :32], large[32:64, 32:])                     # tiles of 32, repeated
    parts = {batch.role.parts for batch in graph_of().batches() if "attn.qkv.weight" in batch.names[0]}
    assert parts == {3}


def test_rows_that_no_training_architecture_reads_are_quiet():
    """D19: with width 32 trained, predictions for width 32 stay bit for bit; the value channels that width 48
    has beyond it become ten times smaller beside the others. (Its query channels share rows with the trained
    MLP's hidden units.)"""
    hypernet = small_hypernet()
    narrow, wide = graph_of(width=32), graph_of(width=48)

    def loudness():
        values = hypernet.predict(wide)["blocks.0.attn.qkv.weight"][96:, :32]
        return (values[32:].norm() / values[:32].norm()).item()
    before, loud = hypernet.predict(narrow), loudness()
    roles = [batch.role for batch in narrow.batches(hypernet.config.classes)]
    hypernet.decoder.quiet_untrained_rows(roles)
    after = hypernet.predict(narrow)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert loudness() == pytest.approx(loud / 10, rel=1e-3)


def test_scales_by_hand():
    """The released rules: norms 2 sigmoid(w / 2), biases tanh(0.2 w), matrices sqrt(2 / fan-in)."""
    w = torch.tensor([[-3.0, 0.0, 2.0]])
    norms = [2 / (1 + math.exp(-v / 2)) for v in (-3, 0, 2)]
    assert tal.scaled(w, Role((3,), "ln"), "rms", 1)[0].tolist() == pytest.approx(norms)
    biases = [math.tanh(0.2 * v) for v in (-3, 0, 2)]
    assert tal.scaled(w, Role((3,), "bias"), "rms", 1)[0].tolist() == pytest.approx(biases)
    assert torch.equal(tal.scaled(w, Role((1, 1, 3), "pos_enc"), "rms", 1), 0.2 * w)
    W = tal.scaled(torch.ones(1, 4, 2, 3, 3), Role((4, 2, 3, 3), "conv"), "fan-in", 1)
    assert W.unique().item() == pytest.approx(1 / 3)                                      # sqrt(2 / 18)


def test_root_mean_square_is_that_of_the_fan_in(nets):
    """"rms": sqrt(1 / fan-in), and 6 / sums of it where the output goes into one of over six shortcuts."""
    def into_sums(graph):
        return {name for batch in graph.batches() if batch.role.ends_branch for name in batch.names}
    for name in ("ours", "swin_t", "resnet50"):
        _, graph = nets[name]
        weights = small_hypernet().predict(graph)
        matrices = {n: w for n, w in weights.items() if w.ndim in (2, 4) and "relative" not in n}
        assert len(matrices) > 10
        for n, w in matrices.items():
            factor = min(1, 6 / len(graph.joins)) if n in into_sums(graph) else 1
            expected = factor * (1 / w[0].numel()) ** 0.5
            assert w.pow(2).mean().sqrt().item() == pytest.approx(expected, rel=1e-3), n
    ours = nets["ours, token"][1]                           # 3 blocks: 6 shortcuts and the position embedding
    assert len(ours.joins) == 6
    assert into_sums(ours) == {f"blocks.{i}.{m}.weight" for i in range(3) for m in ("attn.proj", "mlp.fc2")}


@pytest.mark.parametrize("decoder", ["low-rank", "tiled"])
@pytest.mark.parametrize("scale", ["rms", "fan-in"])
@pytest.mark.parametrize("name", TORCHVISION)
def test_predict_fills_every_parameter(name, decoder, scale, nets):
    net, graph = nets[name]
    with torch.no_grad():
        weights = small_hypernet(decoder, scale=scale).predict(graph)
        params = dict(net.named_parameters())
        assert weights.keys() == params.keys()
        for n, p in params.items():
            assert weights[n].shape == p.shape and weights[n].isfinite().all(), n
        if scale == "rms":
            size = 32 if name.startswith(("ours", "vit")) else 64
            state = {**dict(net.named_buffers()), **weights}
            logits = functional_call(net, state, (torch.randn(1, 3, size, size),), strict=True)
            assert logits.isfinite().all() and logits.std() > 0
        net.load_state_dict({**net.state_dict(), **weights}, strict=True)


@pytest.mark.parametrize("decoder", ["low-rank", "tiled"])
def test_any_number_of_classes_up_to_the_maximum(decoder):
    hypernet, graph = small_hypernet(decoder, classes=1000), graph_of()
    usual = hypernet.predict(graph)
    assert usual["head.weight"].shape == (10, 32)
    for classes in (1, 2, 1000):
        weights = hypernet.predict(graph, num_classes=classes)
        assert weights["head.weight"].shape == (classes, 32) and weights["head.bias"].shape == (classes,)
        assert all(torch.equal(weights[n], usual[n]) for n in usual if not n.startswith("head."))
        rows = weights["head.weight"]
        assert classes == 1 or not torch.equal(rows[0], rows[-1])                     # classes differ at once
    with refuses("at most 1000 classes, the task has 1001"):
        hypernet.predict(graph, num_classes=1001)


def test_the_matrix_M_is_predicted_like_any_other():
    hypernet, graph = small_hypernet(), graph_of()
    weights = hypernet.predict(graph, features=20)
    assert weights.pop("M").shape == (20, 32)                                            # transposed: (d', d)
    torch.testing.assert_close(weights, hypernet.predict(graph))         # rounding: one more row in a product


def test_optimiser_groups_hold_every_parameter_once():
    hypernet = small_hypernet()
    groups = hypernet.optimizer_groups(1e-3, 1e-2, 0.1)
    held = Counter(id(p) for group in groups for p in group["params"])
    assert held == Counter(id(p) for p in hypernet.parameters())
    name_of = {id(p): name for name, p in hypernet.named_parameters()}
    slow, fast = ({name_of[id(p)] for p in group["params"]} for group in groups)
    assert (groups[0]["lr"], groups[1]["lr"]) == (1e-3, 1e-2)
    assert {"decoder.row_basis", "decoder.vector_basis", "learngene.op.weight", "learngene.size"} <= fast
    assert {"decoder.code.weight", "learngene.layers.0.qkv.weight", "learngene.layers.0.W_gamma"} <= slow


# ------------------------------------------------------------------------------------------------------------
# Eq. (1): 1 / (N M) sum_j sum_a L(f_a(x_j; H_D(f_a^G)), y_j)
# ------------------------------------------------------------------------------------------------------------

def test_eq1_is_the_mean_over_architectures_and_images():
    """Three networks, five images: one loss at a time, in plain Python."""
    torch.manual_seed(0)
    x, y = torch.randn(5, 4), [2, 0, 1, 1, 2]
    nets = [nn.Linear(4, 3) for _ in range(3)]
    total = 0.0
    for net in nets:
        for image, label in zip(x, y):
            exponentials = [math.exp(s) for s in net(image).tolist()]
            total += -math.log(exponentials[label] / sum(exponentials))
    ours = tal.meta_batch_loss(tal.loss_cls(torch.tensor(y), net(x)) for net in nets)
    assert ours.item() == pytest.approx(total / (3 * 5), rel=1e-6)


# ------------------------------------------------------------------------------------------------------------
# Eq. (4): KL(softmax(E_train M) || softmax(E_anc))
# ------------------------------------------------------------------------------------------------------------

def test_eq4_equals_torch_distributions():
    torch.manual_seed(0)
    E_train, M, E_anc = (torch.randn(*s, dtype=torch.float64) for s in ((6, 4), (4, 9), (6, 9)))
    categorical = torch.distributions.Categorical
    for T in (1.0, 3.0):
        p, q = categorical(logits=E_train @ M / T), categorical(logits=E_anc / T)
        expected = torch.distributions.kl_divergence(p, q).mean()
        assert tal.loss_aux(E_train, E_anc, M, T).item() == pytest.approx(expected.item(), rel=1e-12)


def test_eq4_by_hand_and_its_direction():
    """p = (1/2, 1/2), q = (1/4, 3/4): KL(p||q) = ln 2 / 2 + ln(2/3) / 2 = 0.1438; the other way 0.1308."""
    train, anc = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    forwards = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    backwards = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert tal.loss_aux(train, anc, torch.eye(2)).item() == pytest.approx(forwards, rel=1e-6)
    assert tal.loss_aux(anc, train, torch.eye(2)).item() == pytest.approx(backwards, rel=1e-6)


def test_eq4_is_never_negative_and_zero_for_equal_distributions():
    torch.manual_seed(0)
    for scale in (1e-3, 1, 30):
        assert tal.loss_aux(torch.randn(8, 5) * scale, torch.randn(8, 5) * scale, torch.eye(5)).item() > 0
    E = torch.randn(8, 5)
    assert tal.loss_aux(E, E + 7, torch.eye(5)).item() == pytest.approx(0, abs=1e-6)  # + 7: nothing
    assert math.isfinite(tal.loss_aux(E * 1e4, -E * 1e4, torch.eye(5)).item())


# ------------------------------------------------------------------------------------------------------------
# Eqs. (5), (6)
# ------------------------------------------------------------------------------------------------------------

def test_eq5_by_hand():
    """Predicted (0.7, 0.2, 0.1) and (0.1, 0.1, 0.8)."""
    logits = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]).log()
    hard = (-math.log(0.7) - math.log(0.1)) / 2
    assert tal.loss_cls(torch.tensor([0, 1]), logits).item() == pytest.approx(hard, rel=1e-6)
    soft = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]])                            # TAL+'s targets
    by_hand = -(0.5 * math.log(0.7) + 0.5 * math.log(0.2) + 0.25 * math.log(0.1) + 0.75 * math.log(0.8)) / 2
    assert tal.loss_cls(soft, logits).item() == pytest.approx(by_hand, rel=1e-6)


def test_soft_labels_by_hand():
    """D9: half the label, half the ancestry's softmax."""
    logits = torch.tensor([[0.7, 0.2, 0.1]]).log()
    assert tal.soft_labels(torch.tensor([1]), logits)[0].tolist() == pytest.approx([0.35, 0.6, 0.05])


def test_eq6_by_hand():
    assert tal.tal_loss(3.0, 5.0, 0.2) == pytest.approx(0.2 * 3 + 0.8 * 5)               # 4.6
    assert tal.tal_loss(3.0, 5.0, 0.0) == 5 and tal.tal_loss(3.0, 5.0, 1.0) == 3


def step_of(method, ancestry, I):
    """What tal_step gives for a small network, and what went in."""
    args = tal.settings(["--method", method, "--alpha", "0.3", "--temperature", "2"])
    objective = tal.objective_of(args, ancestry, args.alpha)
    hypernet = with_task_weights(small_hypernet(task_dim=16))
    config, task = small_vit(pooling="avg"), small_task("digits", 5)
    x, y = bytes_of(4, 3, 32, 32), torch.tensor([0, 4, 2, 2])
    losses = tal.tal_step(hypernet, config, task, x, y, I, objective, CPU)
    return losses, (hypernet, config, task, x, y, objective)


@pytest.mark.parametrize("method", ["tal", "tal+", "logah"])
def test_one_step_is_eqs_4_to_6_plus_the_norms(method):
    """tal_step against a real network that is given the predicted weights and runs by itself."""
    torch.manual_seed(0)
    ancestry, I = tal.Ancestry(ViTConfig(32, 8, 16, 1, 2), {"digits": 5}).eval(), torch.randn(16)
    (loss, cls, aux), (hypernet, config, task, x, y, objective) = step_of(method, ancestry, I)
    with torch.no_grad():
        net = tal.customize(hypernet, config, I, 5)
        M = hypernet.predict(encode_graph(net), I, None, 16)["M"]                        # (d', d)
        images = task.normalise(x)
        p = torch.softmax(net(images), -1)
        target = F.one_hot(y, 5).float()
        if method == "tal+":                                                             # D9
            target = (target + torch.softmax(ancestry.heads["digits"](ancestry.encode(images)), -1)) / 2
        cls_expected = -(target * p.log()).sum() / 4
        P = torch.softmax(torch.einsum("bd,ed->be", net.encode(images), M) / 2, -1)
        Q = torch.softmax(ancestry.encode(images) / 2, -1)
        aux_expected = (P * (P / Q).log()).sum() / 4
        norms = sum(math.sqrt((w ** 2).sum()) for w in net.parameters())
    if method == "logah":                                                         # no ancestry: alpha is zero
        assert aux == 0 and objective.alpha == 0 and objective.ancestry is None
        aux_expected = 0.0
    total = objective.alpha * aux_expected + (1 - objective.alpha) * cls_expected + 3e-5 * norms
    assert cls.item() == pytest.approx(float(cls_expected), rel=1e-4)
    assert aux.item() == pytest.approx(float(aux_expected), rel=1e-4)
    assert loss.item() == pytest.approx(float(total), rel=1e-4)


@pytest.mark.parametrize("alpha, soft, classes, runs", [
    (0.3, False, 5, 1), (0.0, False, 5, 0), (0.0, True, 5, 1), (0.0, True, 4, 0), (0.3, True, 4, 1)])
def test_the_ancestry_runs_only_where_it_is_read(alpha, soft, classes, runs):
    """By Eq. (4), or by TAL+'s soft labels, which it has for the five classes of digits."""
    ancestry = tal.Ancestry(ViTConfig(32, 8, 16, 1, 2), {"digits": 5}).eval()
    calls = []
    ancestry.encoder.register_forward_hook(lambda *call: calls.append(1))
    loss, _, _ = tal.tal_step(
        small_hypernet(task_dim=16), small_vit(), small_task("digits", classes), bytes_of(4, 3, 32, 32),
        torch.tensor([0, 1, 2, 3]), torch.randn(16), tal.Objective(ancestry, alpha, 1.0, soft), CPU)
    assert len(calls) == runs and loss.isfinite()


@pytest.mark.parametrize("decoder", ["low-rank", "tiled"])
@pytest.mark.parametrize("task_info", [False, True])
def test_gradients_reach_every_parameter_that_is_used(decoder, task_info):
    """Pretraining: all but the task hypernet. Tuning with I: that one too."""
    hypernet = small_hypernet(decoder, task_dim=16)
    ancestry = tal.Ancestry(ViTConfig(32, 8, 16, 1, 2), {"t": 5})
    torch.manual_seed(2)
    loss, _, _ = tal.tal_step(
        hypernet, small_vit(), small_task(classes=5), bytes_of(4, 3, 32, 32), torch.tensor([0, 1, 2, 4]),
        torch.randn(16) if task_info else None, tal.Objective(ancestry, 0.5), CPU)
    loss.backward()
    for name, p in hypernet.named_parameters():
        if "W_gamma" in name or "W_beta" in name:
            assert (p.grad is not None) == task_info, name
        if p.grad is not None or not ("W_gamma" in name or "W_beta" in name):
            assert p.grad.isfinite().all() and p.grad.abs().sum() > 0, name
    assert all(p.grad is None for p in ancestry.parameters())                       # the ancestry only guides


# ------------------------------------------------------------------------------------------------------------
# Eq. (7): 1 / (T M) sum_tau sum_a sum_j w_tau L;  Sec. 5.1: tasks drawn with probability w_tau
# ------------------------------------------------------------------------------------------------------------

def test_eq7_by_a_triple_loop():
    torch.manual_seed(0)
    T, M, N = 3, 2, 4
    L, w = torch.rand(T, M, N, dtype=torch.float64), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    total = 0.0
    for tau in range(T):
        for a in range(M):
            for j in range(N):
                total += w[tau].item() * L[tau, a, j].item() / N        # per task the mean over its images
    task_losses = [tal.meta_batch_loss(L[tau, a].mean() for a in range(M)) for tau in range(T)]
    ours = tal.multi_task_loss(task_losses, w)
    assert ours.item() == pytest.approx(total / (T * M), rel=1e-12)


def test_eq7_is_what_the_loop_minimises():
    """Each task's loss with the probability to draw it: sum_tau w_tau L_tau, T times Eq. (7)."""
    L, w = torch.tensor([0.3, 2.0, 0.7], dtype=torch.float64), tal.sampling_weights([100, 25, 400])
    expected = sum(w[t].item() * tal.multi_task_loss([L[t]]).item() for t in range(3))
    assert expected == pytest.approx(3 * tal.multi_task_loss(L.unbind(), w).item(), rel=1e-12)


DECATHLON = [3334, 40000, 23520, 1880, 31367, 17853, 47217, 7585, 1020]      # aircraft, cifar100, daimler ...
NINE = [.0524, .1816, .1392, .0394, .1608, .1213, .1973, .0791, .0290]
TEN = [.0261, .0904, .0693, .0196, .0801, .0604, .0983, .0394, .0144, .5019]
GLUE = [.1677, .2561, .1382, .4379]


def test_sampling_weights_of_the_decathlon():
    assert tal.sampling_weights(DECATHLON).tolist() == pytest.approx(NINE, abs=6e-5)
    imagenet = 1_232_167
    assert tal.sampling_weights([*DECATHLON, imagenet]).tolist() == pytest.approx(TEN, abs=6e-5)
    assert tal.sampling_weights([3668, 8551, 2490, 25000]).tolist() == pytest.approx(GLUE, abs=6e-5)
    assert tal.sampling_weights([10, 30], temperature=1).tolist() == pytest.approx([0.25, 0.75])     # by size
    assert tal.sampling_weights([10, 30], temperature=1e9).tolist() == pytest.approx([0.5, 0.5])     # uniform
    assert tal.sampling_weights([7]).tolist() == [1]


def test_task_schedule():
    weights, steps = tal.sampling_weights([100, 25, 400]), 4000
    random.seed(1)
    first = tal.task_schedule(weights, steps, seed=5)
    random.seed(2)
    assert tal.task_schedule(weights, steps, seed=5) == first                            # of the seed alone
    assert tal.task_schedule(weights, 10, seed=5) == first[:10]                          # whatever the length
    assert tal.task_schedule(weights, steps, seed=6) != first
    seen = Counter()
    for task, visit in first:                              # the n-th time that a task comes up, it is given n
        assert visit == seen[task]
        seen[task] += 1
    for task, w in enumerate(weights.tolist()):              # within 4 standard deviations; the seed is fixed
        assert abs(seen[task] - steps * w) < 4 * math.sqrt(steps * w * (1 - w))


def test_task_embedding_is_the_mean_feature_at_norm_sqrt_t():
    """D4: 600 images (more than one part of 500), one at a time."""
    torch.manual_seed(0)
    ancestry = tal.Ancestry(ViTConfig(8, 4, 16, 1, 2), {"a": 2}).eval()
    for p in ancestry.parameters():
        nn.init.normal_(p, std=0.2)
    task = small_task("a", images=bytes_of(600, 3, 8, 8))
    for limit, count in ((2000, 600), (7, 7)):
        mean = torch.zeros(16, dtype=torch.float64)
        for image in task.examples("train")[0][:count]:
            mean += ancestry(image[None], task)[0].detach().double() / count
        embedding = tal.task_embedding(ancestry, task, "cpu", limit)
        assert embedding.norm().item() == pytest.approx(4, rel=1e-5)
        torch.testing.assert_close(embedding.double(), mean * 4 / mean.norm(), atol=1e-5, rtol=1e-4)


def test_published_ancestries_see_bytes_in_their_own_normalisation():
    own = tal.Ancestry(ViTConfig(32, 8, 16, 1, 2), {})
    theirs = tal.Ancestry(ViTConfig(32, 8, 16, 1, 2), {}, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    task = small_task(mean=(0.9, 0.9, 0.9), std=(0.1, 0.1, 0.1))
    white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    assert own.normalise(white, task)[0, :, 0, 0].tolist() == pytest.approx([1, 1, 1], abs=1e-4)
    expected = [0.9 / 0.4, 0.8 / 0.5, 0.7 / 0.6]
    assert theirs.normalise(white, task)[0, :, 0, 0].tolist() == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------------
# Customize, and the door for Python
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("pooling", ["token", "avg"])
def test_customize_is_a_network_with_the_predicted_parameters(pooling):
    hypernet, I = with_task_weights(small_hypernet()), torch.randn(8)
    config = small_vit(pooling=pooling, depth=3, width=40, heads=5)
    net = tal.customize(hypernet, config, I, 7)
    assert isinstance(net, ViT) and net.config.num_classes == 7
    assert all(p.requires_grad for p in net.parameters())
    x = torch.randn(3, 3, 32, 32)
    skeleton = tal.skeleton(config)
    expected = functional_call(skeleton, hypernet.predict(encode_graph(skeleton), I, 7), (x,), strict=True)
    torch.testing.assert_close(net(x), expected, atol=1e-6, rtol=1e-5)
    assert net(x).shape == (3, 7) and net(x).std() > 0


def test_a_customized_network_saves_copies_and_trains_like_any_other(tmp_path):
    """Its parameters are parts of larger tensors, which shows in no file, no copy and no step."""
    net = tal.customize(with_task_weights(small_hypernet()), small_vit(depth=3), torch.randn(8), 5)
    size = sum(4 * p.numel() for p in net.parameters())
    torch.save(net.state_dict(), tmp_path / "net.pt")
    assert size < (tmp_path / "net.pt").stat().st_size < size + 40_000                   # names and headers
    loaded = torch.load(tmp_path / "net.pt", weights_only=True)
    own = ViT(net.config)
    own.load_state_dict(loaded)
    other = copy.deepcopy(net)
    x = torch.randn(2, 3, 32, 32)
    for trained in (own, other):
        optimizer = torch.optim.AdamW(trained.parameters(), 1e-2, fused=True)
        trained(x).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), other.parameters()))
    assert not torch.equal(own.head.weight, net.head.weight)
    assert all(torch.equal(p, loaded[name]) for name, p in net.named_parameters())    # only the copy


def folder_of_images(root, names=("cat", "dog", "eel"), each=4):
    rng = np.random.default_rng(0)
    for k, name in enumerate(names):
        for i in range(each):
            picture(root / name / f"{i}.png", tuple(rng.integers(0, 256 // (k + 1), 3).tolist()))
    return root


def test_a_trained_tal_from_python(tuned, tmp_path, capsys):
    """A directory or a file; any network is filled in place; whatever it was trained with is told."""
    model = tal.load(tuned)
    assert model.trained.tune_tasks == "pedestrian,digits"
    assert set(model.embeddings) == {"pedestrian", "digits"}
    with pytest.raises(AttributeError):
        model.trained.seed = 1
    net = torchvision.models.resnet18(num_classes=10)
    assert model(net, task="digits") is net
    expected = model.hypernet.predict(encode_graph(net), model.embeddings["digits"])
    assert all(torch.equal(p, expected[n]) for n, p in net.named_parameters())
    without = model(torchvision.models.resnet18(num_classes=10))                         # no task information
    assert not torch.equal(without.fc.weight, net.fc.weight)
    file = tal.load(tuned / "tune.pt")
    assert all(torch.equal(a, b) for a, b in zip(model.hypernet.parameters(), file.hypernet.parameters()))
    pretrained = tal.load(tuned / "pretrain.pt")
    assert pretrained.embeddings == {} and pretrained.embedding("digits") is None
    with refuses("no finished TAL"):
        tal.load(tmp_path)
    with refuses("no finished TAL"):
        tal.load(tuned / "ancestry.pt")


def test_customize_from_python(tuned, drawn, tmp_path):
    """By the name of a tuned task, a folder, or a data.Task; I of new images is made on the spot."""
    model = tal.load(tuned)
    config = ViTConfig(32, 16, 40, 2, 5, pooling="avg")
    assert model.customize(config, images="digits").head.out_features == 10
    assert model.customize(config).head.out_features == 1000 and model.embedding(None) is None
    folder = folder_of_images(tmp_path / "mine")
    vit = model.customize(config, images=folder)
    assert vit.head.out_features == 3 and vit.config.num_classes == 3
    task = data.load(str(folder), image_size=32)
    I = tal.task_embedding(model.ancestry, task, "cpu")
    assert torch.equal(model.embedding(task), I) and torch.equal(model.embedding(str(folder)), I)
    expected = tal.customize(model.hypernet, config, I, 3)
    assert all(torch.equal(a, b) for a, b in zip(vit.parameters(), expected.parameters()))


def test_a_tuned_task_is_known_by_its_content(tuned, drawn):
    """Another task under the name of a tuned one gets an embedding of its own."""
    model = tal.load(tuned)
    digits = data.load("digits", str(drawn))
    clothing = data.load("clothing", str(drawn))
    impostor = replace(clothing, name="digits")
    assert model.knows(digits) and torch.equal(model.embedding(digits), model.embeddings["digits"])
    assert not model.knows(impostor)
    assert torch.equal(model.embedding(impostor), tal.task_embedding(model.ancestry, clothing, "cpu"))


def test_a_larger_head_is_kept_and_that_is_said(tuned, capsys):
    model = tal.load(tuned)
    net = torchvision.models.resnet18(num_classes=1000)
    before = net.fc.weight.clone(), net.conv1.weight.clone()
    model(net, task="digits")
    assert torch.equal(net.fc.weight, before[0]) and not torch.equal(net.conv1.weight, before[1])
    assert "at most 128 classes; that of 1000 is kept" in capsys.readouterr().out


def test_without_its_ancestry_a_tal_knows_its_own_tasks(tuned, tmp_path):
    shutil.copy(tuned / "tune.pt", tmp_path)
    model = tal.load(tmp_path)
    assert model.ancestry is None and model.embedding("digits") is not None
    with refuses("needs the ancestry"):
        model.embedding(small_task("new", images=bytes_of(4, 3, 32, 32)))
    model = tal.load(tmp_path, ancestry=tuned / "ancestry.pt")
    assert model.embedding(small_task("new", images=bytes_of(4, 3, 32, 32))).shape == (16,)


# ------------------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------------------

def test_paper_preset_is_section_5_1():
    args = tal.settings(["--preset", "paper"])
    assert (args.pretrain_epochs, args.tune_epochs, args.lr, args.weight_decay) == (75, 100, 3e-4, 1e-2)
    assert (args.task_temperature, args.archs, args.ancestry_size) == (2, "ViTs-1K", "768x12x12")
    assert tal.PREDPARAM == 3e-5 and args.image_size == 224
    assert tal.settings(["--preset", "paper", "--method", "tal+"]).archs == "ViTs+-1K"
    assert tal.settings(["--method", "tal+"]).archs == "drawn+"


def test_the_drawn_ancestry_is_broad_and_knows_none_of_the_tuned_tasks(tuned, tmp_path):
    """D15, D17, D21; the tasks can be named, and must be where one is to be trained."""
    args = tal.settings([])
    assert args.ancestry_tasks == "base,wide" and not {"base", "wide"} & set(args.tune_tasks.split(","))
    assert (args.alpha, args.tune_alpha) == (0.5, 0)
    text = tal.settings(["--modality", "text"])
    assert text.ancestry_tasks == text.tune_tasks and len(text.ancestry_tasks.split(",")) == 4
    assert tal.settings(["--preset", "paper"]).ancestry_tasks == ""
    assert list(tal.load(tuned).ancestry.heads) == ["base", "pedestrian", "digits"]
    for stage in ("ancestry", "pretrain"):
        with refuses("--ancestry FILE, or say --ancestry-epochs and --ancestry-tasks to train one"):
            run_tal(tmp_path, tmp_path / "run", "--stage", stage, "--ancestry-tasks", "")
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("flags, task_info, alpha", [
    ("", True, 0.5), ("--method tal+", True, 0.5), ("--without task-info", False, 0.5),
    ("--without ancestry", True, 0.0), ("--method logah", False, 0.0), ("--method ghn3", False, 0.0)])
def test_what_methods_and_ablations_switch_off(flags, task_info, alpha):
    args = tal.settings(flags.split())
    assert (tal.uses_task_info(args), args.alpha) == (task_info, alpha)
    hypernet = tal.build_hypernet(args, 64)
    assert any("W_gamma" in n for n, _ in hypernet.named_parameters()) == task_info
    assert isinstance(hypernet.decoder, tal.TiledDecoder) == ("ghn3" in flags)


def test_sizes_of_tables_1_and_2():
    table = tal.table_sizes(tal.settings(["--preset", "paper"]))
    assert list(table) == [f"{d}-{s}" for s in ("Tiny", "Small", "Base") for d in (3, 6, 12)]
    sizes = [(table[n].width, table[n].heads, table[n].depth) for n in ("3-Tiny", "6-Small", "12-Base")]
    assert sizes == [(192, 3, 3), (384, 6, 6), (768, 12, 12)]
    own = tal.asked_architecture(tal.settings(["--size", "40x5", "--depth", "7"]))
    assert (own.width, own.heads, own.depth) == (40, 5, 7)


def test_no_more_flags_than_these():
    args = tal.settings([])
    assert len(vars(args)) == sum(map(len, args.headings.values())) + 1 <= 54


# ------------------------------------------------------------------------------------------------------------
# Runs: the stages, end to end
# ------------------------------------------------------------------------------------------------------------

def run_tal(drawn, output, *flags):
    tal.main([*TINY, "--data-dir", str(drawn), "--output", str(output), *map(str, flags)])


@pytest.fixture
def no_table(monkeypatch):
    """Stages end before their table of untrained networks."""
    monkeypatch.setattr(tal, "evaluate", lambda *how: None)


def steps_of(folder, stage):
    return [r["step"] for r in log_of(folder, stage) if "step" in r]


# steps: pretrain 0.03 x 24,000 / 200 = 4, tune 0.08 x 10,000 / 200 = 4
MAKES = {
    "ancestry": ["ancestry.pt"],
    "pretrain": ["ancestry.pt", "pretrain.pt", "untrained-pretrain-val.json"],
    "evaluate": ["ancestry.pt", "pretrain.pt", "tune.pt", "untrained-evaluate-val.json"],
    "train": ["ancestry.pt", "pretrain.pt", "tune.pt", "train-digits-3x48-3.pt"],
    "plot": ["ancestry.pt", "pretrain.pt", "tune.pt", "figure3.json"],
}


@pytest.mark.parametrize("stage", MAKES)
def test_every_stage_runs_from_nothing(stage, drawn, tmp_path, capsys):
    run_tal(drawn, tmp_path, "--stage", stage, "--data", "digits" if stage == "train" else "")
    assert {*MAKES[stage], "config.json", "log.jsonl"} <= set(os.listdir(tmp_path))
    assert not [f for f in os.listdir(tmp_path) if f.endswith(".tmp")]
    assert json.loads((tmp_path / "config.json").read_text())["stage"] == stage
    assert "preset drawn" in capsys.readouterr().out
    for name in ("pretrain", "tune"):
        assert f"{name}.pt" not in MAKES[stage] or steps_of(tmp_path, name) == [1, 2, 3, 4]
    assert all(math.isfinite(r["loss"]) for r in log_of(tmp_path, "tune"))
    if stage in ("pretrain", "evaluate"):
        table = json.loads((tmp_path / f"untrained-{stage}-val.json").read_text())
        sizes = [f"{depth}-{size}" for size in ("Tiny", "Small", "Base") for depth in (3, 6, 12)]
        assert [name.rstrip("*") for name in table] == sizes
        for row in table.values():
            percents = [v for k, v in row.items() if k != "average"]
            assert len(percents) == (1 if stage == "pretrain" else 2)
            assert row["average"] == pytest.approx(sum(percents) / len(percents))
    if stage == "train":
        result = log_of(tmp_path, "train")[-1]
        assert result["task"] == "digits" and result["images"] == 600
        assert 0 <= result["untrained"] <= 100 and 0 <= result["trained"] <= 100
    if stage == "plot":
        figure = json.loads((tmp_path / "figure3.json").read_text())
        assert figure["tasks"] == ["pedestrian", "digits"] and np.array(figure["xy"]).shape == (2, 10, 2)
        assert 0 <= figure["between"] <= 1


@pytest.mark.parametrize("method", ["tal+", "logah", "ghn3", "random"])
def test_every_method_trains(method, drawn, tuned, tmp_path):
    run_tal(drawn, tmp_path, "--stage", "train", "--method", method, "--data", "pedestrian,clothing",
            "--ancestry", tuned / "ancestry.pt")
    results = {r["task"]: r for r in log_of(tmp_path, "train")}
    assert set(results) == {"pedestrian", "clothing"} and all(r["method"] == method for r in results.values())
    assert (tmp_path / "tune.pt").exists() == (method != "random")
    if method != "random":
        assert all((r["loss_aux"] > 0) == (method == "tal+") for r in log_of(tmp_path, "pretrain"))
        assert bool(tal.load(tmp_path).embeddings) == (method == "tal+")


@pytest.mark.parametrize("flags, check", [
    ("--without task-info", lambda run: run["W"] == 0 and run["aux"] > 0 and not run["embeddings"]),
    ("--without ancestry", lambda run: run["W"] > 0 and run["aux"] == 0 and len(run["embeddings"]) == 2),
    ("--tune-tasks pedestrian --tune-epochs 0.2", lambda run: set(run["embeddings"]) == {"pedestrian"}),
    ("--meta-batch 2 --pooling token --recipe none --amp bf16 --seed 3 --batch-size 40 "
     "--pretrain-epochs 0.006 --tune-epochs 0.016", lambda run: run["aux"] > 0)])
def test_ablations_and_options_run(flags, check, drawn, tuned, tmp_path, no_table):
    run_tal(drawn, tmp_path, "--stage", "tune", "--ancestry", tuned / "ancestry.pt", *flags.split())
    saved, log = torch.load(tmp_path / "tune.pt", weights_only=True), log_of(tmp_path, "tune")
    assert all(math.isfinite(r["loss"]) for r in log) and log[-1]["skipped"] == 0
    assert check({
        "W": sum("W_gamma" in n for n in saved["model"]), "embeddings": saved["extra"]["embeddings"],
        "aux": log_of(tmp_path, "pretrain")[-1]["loss_aux"]})


def test_the_log_of_a_hypernetwork(tuned):
    """loss = alpha aux + (1 - alpha) cls + the norms, alpha 0.5 and, while tuning, 0; the drawn task's loss
    beside it; every tenth of the run (of four steps: each) the accuracy of an untrained network per task."""
    for stage, alpha in (("pretrain", 0.5), ("tune", 0.0)):
        for r in log_of(tuned, stage):
            rest = r["loss"] - alpha * r["loss_aux"] - (1 - alpha) * r["loss_cls"]
            assert 0 < rest < 0.05, r                        # 3e-5 times the sum of the norms
            (task,) = [name for name in r if name.startswith("loss ")]
            assert r[task] == pytest.approx(r["loss"])
            vals = {name for name in r if name.startswith("val ")}
            assert vals == ({"val base"} if stage == "pretrain" else {"val pedestrian", "val digits"})
            assert all(0 <= r[name] <= 100 for name in vals)


def test_the_curve_in_the_log_is_the_accuracy_of_the_network_so_far(tuned, drawn):
    """The last line's value is that of the weights before the last update; here of those after it."""
    model = tal.load(tuned)
    with_task_weights(model.hypernet)
    (task,) = data.load_many(["digits"], str(drawn), 32).values()
    config = tal.asked_architecture(model.trained)
    state = torch.get_rng_state()
    value = tal.val_accuracies(model.hypernet, config, [task], model.embeddings, "cpu")["val digits"]
    assert torch.equal(torch.get_rng_state(), state)
    net = model.customize(config, "digits")
    assert value.item() == pytest.approx(common.accuracy(net, task, "val", "cpu", limit=500))


class Course:
    """The steps of a run of both stages, three architectures each; their losses are known numbers.

    calls: {stage: [(loss, configuration, task's name, images, I)]}; first: {stage: its first weights}
    """
    def __init__(self, drawn, ancestry, folder, *flags):
        self.calls, self.first, self.folder = {}, {}, folder
        train_hypernet = tal.train_hypernet

        def training(run, stage, args, hypernet, *rest):
            self.calls[stage] = []
            self.first[stage] = copy.deepcopy(hypernet.state_dict())
            train_hypernet(run, stage, args, hypernet, *rest)

        def known(hypernet, config, task, x, y, I, objective, machine):
            calls = self.calls[list(self.calls)[-1]]
            value = torch.tensor(math.sin(7.0 * len(calls)) + 2)
            calls.append((value.item(), config, task.name, x, I))
            return value + 0 * sum(p.sum() for p in hypernet.parameters()), value * 2, value * 3
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tal, "train_hypernet", training)
            patch.setattr(tal, "tal_step", known)
            patch.setattr(tal, "evaluate", lambda *how: None)
            run_tal(drawn, folder, "--stage", "tune", "--ancestry", ancestry, "--meta-batch", "3",
                    "--tune-epochs", "0.2", "--recipe", "none", *flags)

    def steps(self, stage):
        calls = self.calls[stage]
        return [calls[i:i + 3] for i in range(0, len(calls), 3)]

    def order(self, stage, number):
        """Of every step, what its calls had in this place: 1 architectures, 2 tasks."""
        return [tuple(call[number] for call in step) for step in self.steps(stage)]


@pytest.fixture(scope="module")
def course(drawn, tuned, tmp_path_factory):
    return Course(drawn, tuned / "ancestry.pt", tmp_path_factory.mktemp("course"))


def test_the_loop_is_eq_1_within_eq_7(course):
    """The logged loss is the mean over the architectures; all see the same images of one task; a task that
    comes again shows other images."""
    steps, log = course.steps("tune"), log_of(course.folder, "tune")
    assert len(steps) == len(log) == 10                      # 0.2 x 10,000 / 200
    for step, r in zip(steps, log):
        assert r["loss"] == pytest.approx(sum(v for v, *_ in step) / 3, rel=1e-5)
        assert (r["loss_cls"], r["loss_aux"]) == pytest.approx((2 * r["loss"], 3 * r["loss"]), rel=1e-5)
        assert len({c for _, c, *_ in step}) > 1 and len({(t, x.sum().item()) for _, _, t, x, _ in step}) == 1
    assert {step[0][2] for step in steps} == {"pedestrian", "digits"}
    assert len({step[0][3].sum().item() for step in steps}) == 10
    assert len(set(course.order("tune", 1))) > 5


def test_every_step_has_its_own_task_embedding(course, tuned, drawn):
    """None while pretraining; then that of the step's task, which the checkpoint keeps."""
    assert all(I is None for *_, I in course.calls["pretrain"])
    ancestry, kept = tal.load(tuned).ancestry, tal.load(course.folder).embeddings
    tasks = data.load_many(["pedestrian", "digits"], str(drawn), 32)
    expected = {name: tal.task_embedding(ancestry, task, "cpu") for name, task in tasks.items()}
    assert not torch.allclose(expected["pedestrian"], expected["digits"], atol=0.1)
    same_state(kept, expected)
    for _, _, name, _, I in course.calls["tune"]:
        assert torch.equal(I, expected[name]), name


def test_tuning_goes_on_from_the_pretraining(course, drawn, tuned, tmp_path, monkeypatch):
    """Where both are done at once, and where pretrain.pt is there."""
    pretrained = torch.load(course.folder / "pretrain.pt", weights_only=True)["model"]
    same_state(course.first["tune"], pretrained)
    fresh = course.first["pretrain"]
    assert any(not torch.equal(pretrained[name], fresh[name]) for name in fresh)
    run = shutil.copytree(tuned, tmp_path / "run")
    (run / "tune.pt").unlink()

    def begin(run, stage, args, hypernet, *rest):
        same_state(hypernet.state_dict(), weights_of(tuned, "pretrain"))
        raise KeyboardInterrupt(stage)
    monkeypatch.setattr(tal, "train_hypernet", begin)
    with pytest.raises(KeyboardInterrupt, match="tune"):
        run_tal(drawn, run, "--stage", "evaluate")


def test_another_seed_is_another_course(course, drawn, tuned, tmp_path):
    """Other architectures, tasks and images in another order; the same seed has the same ones."""
    ancestry = tuned / "ancestry.pt"
    same = Course(drawn, ancestry, tmp_path / "a")
    other = Course(drawn, ancestry, tmp_path / "b", "--seed", "1")
    for stage in ("pretrain", "tune"):
        assert same.order(stage, 1) == course.order(stage, 1) != other.order(stage, 1)
        images = [[step[0][3] for step in each.steps(stage)] for each in (course, same, other)]
        for first, second, third in zip(*images):
            assert torch.equal(first, second) and not torch.equal(first, third)
    assert same.order("tune", 2) == course.order("tune", 2) != other.order("tune", 2)
    assert course.order("pretrain", 1) != course.order("tune", 1)[:4]                    # of the stage, too


def test_same_seed_same_run_and_another_seed_another(drawn, tuned, tmp_path, no_table):
    shared = "--stage", "tune", "--ancestry", tuned / "ancestry.pt"
    run_tal(drawn, tmp_path / "a", *shared)
    run_tal(drawn, tmp_path / "b", *shared, "--seed", "1")
    assert_same_run(tmp_path / "a", tuned, "tune")
    assert [r["loss"] for r in log_of(tmp_path / "b", "tune")] != [r["loss"] for r in log_of(tuned, "tune")]


def task_of_two(name, each=5):
    """Dark images to train on; val and test are white, and what is class 0 in val is class 1 in test."""
    white = torch.full((each, 3, 32, 32), 255, dtype=torch.uint8)
    torch.manual_seed(0)
    images = {"train": bytes_of(8, 3, 32, 32) // 2, "val": white, "test": white}
    labels = {split: torch.full((len(x),), int(split == "test")) for split, x in images.items()}
    labels["train"][::2] = 1
    return data.Task(name, ["a", "b"], (0.5,) * 3, (0.5,) * 3, images, labels, f"content of {name}")


@pytest.fixture
def of_two(monkeypatch):
    """All tasks are such ones."""
    monkeypatch.setattr(data, "load_tasks", lambda names, *how: {name: task_of_two(name) for name in names})


SHORT = ("--ancestry-tasks base --batch-size 4 --ancestry-epochs 1 --pretrain-epochs 1 --tune-epochs 1 "
         "--train-epochs 2").split()


def test_everything_learns_from_training_images(of_two, tmp_path, monkeypatch):
    """Ancestry, both stages of the hypernetwork, further training: no network is shown a white image while
    there are gradients."""
    seen, tokens = [], ViT.tokens

    def noting(net, x):
        if torch.is_grad_enabled():
            seen.append(x.max().item())
        return tokens(net, x)
    monkeypatch.setattr(ViT, "tokens", noting)
    run_tal(tmp_path, tmp_path / "run", *SHORT, "--stage", "train", "--data", "clothing")
    assert len(seen) == 2 + 2 + 4 + 4                        # steps of 4 of 8 images; while tuning, of 16
    assert max(seen) < 0.1 < task_of_two("t").normalise(torch.tensor([[[[255]]] * 3])).max()


def test_what_is_reported_is_of_the_split_that_was_asked_for(of_two, tmp_path):
    """Classes are exchanged between val and test, so what is right in one is wrong in the other."""
    for split in ("val", "test"):
        run = tmp_path / split
        run_tal(tmp_path, run, *SHORT, "--stage", "train", "--data", "digits", "--split", split)
        run_tal(tmp_path, run, *SHORT, "--stage", "evaluate", "--data", "clothing", "--split", split)
        model, task = tal.load(run, quiet=False), task_of_two("clothing")
        table = json.loads((run / f"untrained-evaluate-{split}.json").read_text())
        for (name, row), config in zip(table.items(), tal.table_sizes(model.trained).values()):
            net = model.customize(config, task)
            percent = common.accuracy(net, task, split, "cpu")
            assert row == {"clothing": percent, "average": percent}, name
        result, digits = log_of(run, "train")[-1], task_of_two("digits")
        config = tal.asked_architecture(model.trained)
        net = model.customize(config, digits)
        assert result["split"] == split and result["untrained"] == common.accuracy(net, digits, split, "cpu")
        (file,) = run.glob("train-digits-*.pt")
        net.load_state_dict(torch.load(file, weights_only=True)["model"])
        assert result["trained"] == common.accuracy(net, digits, split, "cpu")


def test_images_as_many_as_tuning_shows_of_the_task(monkeypatch):
    """Sec. 5.1 by hand: 100 and 400 images, sqrt(1/5) : sqrt(4/5) = 1 : 2, 6 epochs of 500 images, batches of
    10: 100 and 200 steps."""
    counts = {"pedestrian": 100, "digits": 400}

    def load_tasks(names, *how):
        return {n: replace(small_task(n), labels={"train": torch.zeros(counts[n])}) for n in names}
    monkeypatch.setattr(data, "load_tasks", load_tasks)
    flags = "--tune-tasks pedestrian,digits --tune-epochs 6 --batch-size 10 --train-images tune"
    args = tal.settings(flags.split())
    tasks = load_tasks(counts)
    assert [tal.training_steps(task, args, CPU) for task in tasks.values()] == [100, 200]
    assert tal.training_steps(tasks["digits"], args.replace(task_temperature=1.0), CPU) == 240
    assert tal.training_steps(tasks["digits"], args.replace(train_images="401"), CPU) == 41
    assert tal.training_steps(tasks["digits"], args.replace(train_images="", train_epochs=0.5), CPU) == 20
    with refuses("t is not among the tuned tasks; give a number"):
        tal.training_steps(small_task("t"), args, CPU)


def test_the_head_of_an_unseen_task_starts_at_random(tuned, drawn):
    """All else is predicted, with the task's own embedding; a tuned task's head, too."""
    model = tal.load(tuned, quiet=False)
    with_task_weights(model.hypernet)
    args, config = model.trained, tal.asked_architecture(model.trained)
    for name, task in data.load_many(["digits", "clothing"], str(drawn), 32).items():
        net = tal.initial_network(args, config, task, model, "cpu")
        torch.manual_seed(args.seed)
        fresh = ViT(replace(config, num_classes=task.num_classes))
        expected = dict(tal.customize(model.hypernet, config, model.embedding(task), 10).named_parameters())
        if name == "clothing":
            expected |= {f"head.{n}": p for n, p in fresh.head.named_parameters()}
        for n, p in net.named_parameters():
            torch.testing.assert_close(p, expected[n], atol=1e-6, rtol=1e-5)
        assert torch.equal(net.head.weight, fresh.head.weight) == (name == "clothing")


def test_quiet_rows_where_that_is_asked_for(tuned, drawn, tmp_path, monkeypatch):
    """D19: of a TAL for widths up to 56; where networks of such widths read, nothing changes."""
    loud, quiet = tal.load(tuned, quiet=False), tal.load(tuned)
    same_state(loud.hypernet.state_dict(), weights_of(tuned, "tune"))
    before, after = loud.hypernet.decoder, quiet.hypernet.decoder
    for name in ("row_basis", "col_basis", "vector_basis"):  # 4 x 56 hidden units of 256 channels
        old, new = getattr(before, name), getattr(after, name)
        assert torch.equal(new[:224], old[:224]) and torch.equal(new[224:256], old[224:256] * 0.1), name
    a, b = (model.hypernet.predict(graph_of(width=56, heads=7)) for model in (loud, quiet))
    same_state(a, b)
    asked = []
    monkeypatch.setattr(tal.LowRankDecoder, "quiet_untrained_rows", lambda self, roles: asked.append(1))
    run = shutil.copytree(tuned, tmp_path / "run")
    machine = common.Run(run, {}, CPU)
    shared = [*TINY, "--data-dir", str(drawn), "--output", str(run), "--stage"]
    for flags, times in (("evaluate", 0), ("evaluate --quiet", 1), ("train", 0), ("tune", 0),
                         ("tune --quiet", 1), ("customize", 1)):
        args = tal.settings([*shared, *flags.split()])
        tal.obtain(machine, args, "tune")
        assert len(asked) == times, flags
        asked.clear()


def test_evaluate_twice_says_the_same(drawn, tuned, tmp_path):
    """A finished run is read, not trained again."""
    run = shutil.copytree(tuned, tmp_path / "run")
    run_tal(drawn, run, "--stage", "evaluate")
    first = json.loads((run / "untrained-evaluate-val.json").read_text())
    assert first == json.loads((tuned / "untrained-tune-val.json").read_text())
    assert (run / "tune.pt").read_bytes() == (tuned / "tune.pt").read_bytes()


def test_evaluate_gives_every_task_its_embedding(drawn, tuned, tmp_path, monkeypatch):
    """Tuned ones that of the tuning; unseen ones, as in train and customize, that of their images."""
    run = shutil.copytree(tuned, tmp_path / "run")
    given, customize, model = [], tal.customize, tal.load(tuned)

    def noting(hypernet, config, I, classes):
        given.append(I)
        return customize(hypernet, config, I, classes)
    monkeypatch.setattr(tal, "customize", noting)
    config = small_vit(pooling="avg", width=40, heads=5)
    monkeypatch.setattr(tal, "table_sizes", lambda args: {"own": config})
    run_tal(drawn, run, "--stage", "evaluate", "--data", "pedestrian,digits,clothing")
    clothing = tal.task_embedding(model.ancestry, data.load("clothing", str(drawn)), "cpu")
    assert len(given) == 3
    for I, expected in zip(given, (*model.embeddings.values(), clothing)):
        torch.testing.assert_close(I, expected, atol=1e-6, rtol=0)


def test_other_data_under_the_same_name_is_loud_and_a_result_stands_once(tmp_path, capsys):
    """The images of two classes change places: the checkpoint is of other data. A result stands once."""
    folder = folder_of_images(tmp_path / "mine", ("cat", "dog"))
    argv = [*TINY, "--stage", "train", "--method", "random", "--data", str(folder), "--train-epochs", "50",
            "--output", str(tmp_path / "run")]
    tal.main(argv)
    log = (tmp_path / "run" / "log.jsonl").read_text()
    tal.main(argv)
    assert (tmp_path / "run" / "log.jsonl").read_text() == log
    (folder / "cat").rename(folder / "x")
    (folder / "dog").rename(folder / "cat")
    (folder / "x").rename(folder / "dog")
    with refuses("other data than .*mine"):
        tal.main(argv)


def test_an_ancestry_without_the_classes_of_a_task_teaches_by_hard_labels_and_says_so(
        drawn, tuned, tmp_path, capsys):
    run_tal(drawn, tmp_path, "--stage", "pretrain", "--method", "tal+", "--base-task", "clothing",
            "--pretrain-epochs", "0.1", "--ancestry", tuned / "ancestry.pt")
    assert "no head for the classes of clothing: hard labels" in capsys.readouterr().out


def test_the_base_task_keeps_its_predicted_head(tuned, drawn, tmp_path):
    """Table 1: trained on from the pretraining, the base task starts where the untrained network of `--stage
    pretrain` stands; another task starts from a random head."""
    run = shutil.copytree(tuned, tmp_path / "run")
    run_tal(drawn, run, "--stage", "pretrain")
    table = json.loads((run / "untrained-pretrain-val.json").read_text())
    run_tal(drawn, run, "--stage", "train", "--source", "pretrain", "--data", "base,digits",
            "--size", "drawn-tiny", "--depth", "3", "--train-images", "200")
    base, digits = log_of(run, "train")
    (expected,) = [row["base"] for size, row in table.items() if size.startswith("3-Tiny")]
    assert base["untrained"] == pytest.approx(expected) and digits["task"] == "digits"


def test_customize_writes_the_network(drawn, tuned, tmp_path, capsys):
    """For a task of the tuning, whose embedding is known, and for a folder of images. What the TAL in use was
    trained with is said, as it is not the preset's."""
    run = shutil.copytree(tuned, tmp_path / "run")
    before = snapshot(run)
    run_tal(drawn, run, "--stage", "customize", "--data", "digits", "--depth", "5", "--size", "40x5",
            "--train-epochs", "0", "--export", tmp_path / "new" / "net.pt")
    said = capsys.readouterr().out
    assert "10 classes" in said and "--tune-epochs 0.08" in said.split("this TAL was trained with")[1]
    net = ViT(ViTConfig(32, 16, 40, 5, 5, 10, pooling="avg"))
    net.load_state_dict(torch.load(tmp_path / "new" / "net.pt", weights_only=True), strict=True)
    model = tal.load(tuned)
    expected = model.hypernet.predict(encode_graph(net), model.embeddings["digits"], 10)
    assert all(torch.allclose(p, expected[n], atol=1e-6) for n, p in net.named_parameters())
    folder = folder_of_images(tmp_path / "mine")
    run_tal(drawn, run, "--stage", "customize", "--data", folder, "--train-epochs", "0",
            "--export", tmp_path / "mine.pt")
    assert torch.load(tmp_path / "mine.pt", weights_only=True)["head.weight"].shape == (3, 48)
    assert snapshot(run) == before


def test_customize_from_nothing_and_again(drawn, tmp_path):
    """The first call makes TAL in --output, the second finds it there."""
    for name in ("first.pt", "second.pt"):
        run_tal(drawn, tmp_path / "run", "--stage", "customize", "--data", "digits",
                "--export", tmp_path / name)
    first, second = (torch.load(tmp_path / n, weights_only=True) for n in ("first.pt", "second.pt"))
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_finetune_takes_all_but_the_head_and_selection_evenly_spaced_weights():
    def vit(width, depth):
        return ViT(ViTConfig(32, 8, width, depth, 2, 2, "avg"))
    ancestry = tal.Ancestry(ViTConfig(32, 8, 32, 3, 2, 7, "avg"), {})
    state = ancestry.encoder.state_dict()
    def encoder(net):
        return {name: p for name, p in net.state_dict().items() if "head" not in name}
    same, smaller, other = vit(32, 3), vit(16, 2), vit(16, 2)
    head = same.head.weight.clone()
    tal.initialise_from_ancestry(same, ancestry, small_task(), "finetune")
    same_state(encoder(same), state)
    assert torch.equal(same.head.weight, head)
    tal.initialise_from_ancestry(smaller, ancestry, small_task(), "selection")
    assert torch.equal(smaller.blocks[1].mlp.fc1.weight, state["blocks.1.mlp.fc1.weight"][::2, ::2])
    common.weight_selection(other, state)
    same_state(encoder(smaller), encoder(other))
    with refuses("--size 32x2 --depth 3"):
        tal.initialise_from_ancestry(smaller, ancestry, small_task(), "finetune")
    with refuses("--image-size 32 --patch 8 --pooling avg"):
        token = ViT(ViTConfig(32, 8, 16, 2, 2, 2, "token"))
        tal.initialise_from_ancestry(token, ancestry, small_task(), "selection")
    with refuses("3 layers"):
        tal.initialise_from_ancestry(vit(16, 4), ancestry, small_task(), "selection")
    with refuses("--stage train"):
        tal.settings(["--method", "finetune", "--stage", "evaluate"])


def test_inherited_networks_see_images_as_the_ancestry_did():
    """A published ancestry knows its own normalisation; the network gets the task's and does the same."""
    ancestry = tal.Ancestry(ViTConfig(32, 8, 32, 2, 4, 7, "avg"), {}, (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)).eval()
    net, pixels = ViT(ViTConfig(32, 8, 32, 2, 4, 2, "avg")).eval(), bytes_of(4, 3, 32, 32)
    task = small_task(mean=(0.1, 0.2, 0.3), std=(0.9, 0.8, 0.7))
    tal.initialise_from_ancestry(net, ancestry, task, "finetune")
    with torch.no_grad():
        ours, theirs = net.encode(task.normalise(pixels)), ancestry(pixels, task)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_silhouette_by_hand():
    """Clusters {0, 2} and {10, 14} on a line: (12 - 2) / 12, (10 - 2) / 10, (9 - 4) / 9, (13 - 4) / 13."""
    points = torch.tensor([[[0., 0], [2, 0]], [[10, 0], [14, 0]]])
    assert tal.silhouette_score(points) == pytest.approx((10 / 12 + 8 / 10 + 5 / 9 + 9 / 13) / 4)
    assert tal.silhouette_score(points[:, :, :1]) == pytest.approx(tal.silhouette_score(points))
    twice = torch.tensor([[[0.], [1]], [[0], [1]]])                                   # the same cluster twice
    assert tal.silhouette_score(twice) == pytest.approx(-0.5)


def test_plots_are_drawn(drawn, tuned, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    run = shutil.copytree(tuned, tmp_path / "run")
    run_tal(drawn, run, "--stage", "plot")
    assert (run / "figure3.png").stat().st_size > 1000 and (run / "curve.png").stat().st_size > 1000


# ------------------------------------------------------------------------------------------------------------
# Runs: killed, and in two processes
# ------------------------------------------------------------------------------------------------------------

def test_killed_runs_end_as_if_never_stopped(drawn, tuned, tmp_path):
    """SIGKILL while pretraining, in the first step of the tuning, while a checkpoint is being written, and at
    any moment in the second epoch of a task; with other numbers of workers. Bitwise the same weights, the
    same log. 3 and 20 steps; 7.5 are an epoch of digits."""
    shared = [*TINY, "--stage", "tune", "--data-dir", drawn, "--ancestry", tuned / "ancestry.pt", "--data",
              "pedestrian", "--batch-size", "800", "--pretrain-epochs", "0.1", "--tune-epochs", "1.6"]
    finish([*shared, "--output", tmp_path / "whole"], tmp_path / "out")
    folder = tmp_path / "parts"

    def argv(workers):
        return [*shared, "--output", folder, "--workers", workers]
    for stage, step in (("pretrain", 2), ("tune", 0), ("tune", -1)):
        killed_in(stage, step, argv(1), tmp_path / "out")
    kill_when(lambda: reached(folder, "tune", 13), argv(2), tmp_path / "out")
    finish(argv(3), tmp_path / "out")
    for stage, steps in (("pretrain", 3), ("tune", 20)):
        assert_same_run(folder, tmp_path / "whole", stage)
        assert steps_of(folder, stage)[-1] == steps
    assert sum("loss digits" in r for r in log_of(folder, "tune")[:13]) > 7
    name = "untrained-tune-val.json"
    assert (folder / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_two_processes_have_the_loss_curve_of_one(drawn, tuned, tmp_path):
    """The same global batch and architectures, by torchrun: within 1e-5."""
    shared = [*TINY, "--stage", "train", "--data-dir", drawn, "--ancestry", tuned / "ancestry.pt",
              "--data", "pedestrian", "--tune-epochs", "0.1"]
    finish([*shared, "--output", tmp_path / "one"], tmp_path / "out")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = [*torchrun, str(ROOT / "tal.py"), *map(str, shared), "--output", str(tmp_path / "two")]
    done = subprocess.run(argv, capture_output=True, text=True, env=ENV, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    (train,) = [path.stem for path in (tmp_path / "one").glob("train-*.pt")]
    for stage in ("pretrain", "tune", train):
        one, two = log_of(tmp_path / "one", stage), log_of(tmp_path / "two", stage)
        assert [r["step"] for r in one] == [r["step"] for r in two] and len(one) >= 2
        for a, b in zip(one, two):
            assert a.keys() == b.keys()
            for key in a.keys() & {"loss", "loss_cls", "loss_aux", "lr", "images"}:
                assert a[key] == pytest.approx(b[key], abs=1e-5), (stage, a, b)


def test_a_dying_process_ends_the_others(drawn, tuned, tmp_path):
    """Process 1 kills itself in step 2 while process 0 waits for its gradients: an error, not a hang."""
    script, first = dying_script(tmp_path, "tal", "pretrain", 2, rank=1)
    argv = [first, *TINY, "--stage", "pretrain", "--data-dir", drawn, "--ancestry", tuned / "ancestry.pt",
            "--output", tmp_path / "run"]
    survivor, dead = exit_codes(start(argv, tmp_path / "out", script=script, processes=2))
    assert dead == -signal.SIGKILL and survivor not in (0, None)


# ------------------------------------------------------------------------------------------------------------
# Bad input
# ------------------------------------------------------------------------------------------------------------

# given to a directory that holds a finished TAL run
BAD_FLAGS = [
    ("--stage fly", "--stage"), ("--size huge", "WIDTHxHEADS"), ("--ancestry-size 64", "WIDTHxDEPTHxHEADS"),
    ("--archs ViTs", "--archs"), ("--train-images 0", "--train-images"), ("--task-temperature 0", "divide"),
    ("--meta-batch 2000", "1000"), ("--stage train --data digits --size 50x6", "6 heads do not divide"),
    ("--stage pretrain --patch 7", "patches of 7 px do not tile"), ("--archs GPTs-1K", "--modality"),
    ("--stage train --data /no/such/folder", "/no/such/folder"),
    ("--stage pretrain --data digits", "leave out --data"),
    ("--stage evaluate --data dgits", "did you mean digits"), ("--ancestry /no/file.pt", "/no/file.pt"),
    ("--stage customize --data digits", "--export FILE"),
    ("--stage customize --data digits --export {out}", "export"),
    ("--stage customize --data digits --export {out}/net.onnx", "net.onnx"),
    ("--stage customize --data digits,pedestrian --export {out}/net.pt", "one task"),
    ("--stage customize --data digits --format transformers --export {out}/net.pt", "--modality text"),
    ("--stage evaluate --method logah", "--method tal"), ("--stage evaluate --patch 8", "--patch 16"),
    ("--stage tune --seed 5", "seed 0"), ("--stage tune --tune-epochs 3", "steps"),
    ("--stage pretrain --hypernet drawn", "hypernet"),
    ("--stage ancestry --ancestry-size 32x1x8", "ancestry"),
    ("--stage tune --tune-tasks textures,digits", "tune"),   # as many images, other tasks
]


@pytest.mark.parametrize("flags, words", BAD_FLAGS, ids=[flags for flags, _ in BAD_FLAGS])
def test_bad_input_is_one_sentence_and_overwrites_nothing(flags, words, drawn, tuned, tmp_path):
    out = shutil.copytree(tuned, tmp_path / "run")
    before = snapshot(tmp_path)
    with refuses(words):
        run_tal(drawn, out, *flags.format(out=out).split())
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["tune", "pretrain", "ancestry"])
def test_truncated_checkpoints(name, drawn, tuned, tmp_path):
    run = shutil.copytree(tuned, tmp_path / "run")
    path = run / f"{name}.pt"
    path.write_bytes(path.read_bytes()[:3000])
    if name == "pretrain":
        (run / "tune.pt").unlink()
    before = snapshot(run)
    with refuses(f"{name}.pt"):
        run_tal(drawn, run, "--stage", "evaluate")
    assert snapshot(run) == before


def test_batch_must_divide_among_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with refuses("--batch-size 64 does not divide among 3 processes"):
        tal.settings(["--batch-size", "64"])
