"""TAL, Task-Aware Learngene (Xu et al., ICML 2025): one hypernetwork that predicts the initial
parameters of ViTs and GPT-2s of any size for any task. It is trained under a pretrained "ancestry"
model, then tuned on many tasks at once.

    python tal.py --stage pretrain      # ancestry and hypernetwork from nothing: minutes, two cores
    python tal.py --stage tune          # tuned on nine tasks; accuracy of untrained networks
    python tal.py --stage customize --data my_images/ --depth 6 --export vit.pt
    python tal.py --modality text       # the same for GPT-2s and four tasks of text

    model = tal.load("runs/tal")                                      # from Python
    net = model(torchvision.models.resnet18(num_classes=10), task="digits")
    vit = model.customize(ViTConfig(32, 8, width=384, depth=6, heads=6), images="my_images/")

The claims that this file measures: Tables 1, 2, 6 (untrained), 3, 5 (trained on), 7, 8, 9
(ablations), Fig. 3. D1, D2, ... mark decisions where paper and released code differ or are
silent; docs/decisions.md lists them.

    paper            here                 meaning
    f^G = (V, E)     Graph                computational graph; V nodes
    H_D(f^G; theta)  Hypernet.predict     graph (and task) -> parameters of the network
    I_tau            I           (t,)     task embedding
    gamma, beta      gamma, beta (h,)     Eqs. (2)-(3); the gamma of Sec. 5.1 is PREDPARAM
    W^gamma, W^beta  W_gamma ... (h, t)   the task hypernet h
    E_train, E_anc   (B, d), (B, d')      features before the head: of the network, of the ancestry
    M                M           (d, d')  predicted with the network; the M of Eqs. (1) and (7) is
                                          --meta-batch
    w_tau, T         sampling_weights     Sec. 5.1's temperature is --task-temperature; Eq. (7)'s T
                                          counts tasks

Contents: the method
    Model architecture datasets           sample_architecture, architectures
    Background: computational graph       encode_graph, Graph
    Structure: the learngene (encoder)    Eqs. (2), (3), GraphLayer, Learngene
    Structure: the decoders               LowRankDecoder, TiledDecoder, Hypernet
    Train on a large dataset              Eqs. (1), (4), (5), (6), Ancestry, tal_step
    Tuning under multi-task setting       Eq. (7), task_embedding, train_hypernet
    Customize models                      customize, TAL, load
Then: settings, training of what the stages need, stages, Tables, Fig. 3.
"""
import copy
import functools
import hashlib
import json
import math
import os
import random
import re
from argparse import ArgumentTypeError
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.func import functional_call

import common
import data
from common import (
    GPT2_SIZES, VIT_SIZES, GPT2Config, InputError, Run, Settings, ViTConfig, accuracy, amount,
    file_name, identity, load_checkpoint, network, parameter_groups, positive, predictions, share,
    start_training)

# --------------------------------------------------------------------------------------------------
# 4. Model architecture datasets (described last in Sec. 4; first here, as all that follows reads
#    architectures)
# --------------------------------------------------------------------------------------------------

ARCHITECTURE_DATASETS = ["ViTs-1K", "ViTs+-1K", "GPTs-1K", "drawn", "drawn+", "drawn-GPTs"]
# Widths of LoGAH's generators (D25): up to this depth, from, to. Wide where shallow: none is large.
VITS_1K = ((3, 384, 512), (5, 256, 384), (9, 128, 256))              # at most 10M parameters
GPTS_1K = ((3, 176, 256), (5, 128, 176), (9, 72, 176))


def sample_architecture(dataset, rng):
    """(depth, width, heads) of one random network of an architecture dataset.

    Ranges: the generators released with LoGAH (ViTs-1K, GPTs-1K) and TAL (ViTs+-1K: wider, deeper,
    more large networks); the drawn ones are their small counterparts, with heads of 8 channels.
    """
    if dataset == "ViTs-1K":
        depth = rng.randint(3, 9)
        width = sample_width(VITS_1K, depth, 32, rng)
        heads = rng.choice(head_counts(width))
    elif dataset == "ViTs+-1K":
        depth = rng.randint(3, 12)
        width = rng.randrange(192, 769, 64)
        heads = rng.choice(head_counts(width))
    elif dataset == "GPTs-1K":
        depth = rng.randint(3, 9)
        width = sample_width(GPTS_1K, depth, 8, rng)
        heads = 8
    elif dataset in ("drawn", "drawn-GPTs"):
        depth = rng.choice((2, 3, 3, 4, 4, 6))
        width = rng.randrange(32, 57, 8)
        heads = width // 8
    elif dataset == "drawn+":
        depth = rng.choice((2, 3, 4, 6, 8))
        width = rng.randrange(32, 97, 8)
        heads = width // 8
    else:
        raise common.unknown("architecture dataset", dataset, ARCHITECTURE_DATASETS)
    return depth, width, heads


def sample_width(ranges, depth, step, rng):
    for deepest, narrowest, widest in ranges:
        if depth <= deepest:
            return rng.randrange(narrowest, widest + 1, step)


def head_counts(width):
    """The numbers of heads that the released generators choose among."""
    if width % 12 == 0:
        return 3, 6, 12
    if width % 6 == 0:
        return 3, 6
    if width % 3 == 0:
        return (3,)
    return 4, 8


def architectures(dataset, shape, count=1000, seed=1):
    """The configurations of an architecture dataset, the same on every machine.

    shape: what all of them share, see `configuration`.
    """
    rng = random.Random(seed)
    configs = []
    for _ in range(count):
        depth, width, heads = sample_architecture(dataset, rng)
        configs.append(configuration(shape, width, depth, heads))
    return configs


def configuration(shape, width, depth, heads):
    """shape: {image_size, patch_size, pooling} of ViTs, {vocab, context, num_classes} of GPT-2s."""
    kind = GPT2Config if "vocab" in shape else ViTConfig
    return kind(**shape, width=width, depth=depth, heads=heads)


@functools.lru_cache(maxsize=None)
def skeleton(config):
    """The network of a configuration without storage: parameters on the meta device."""
    with torch.device("meta"):
        return network(config)


# --------------------------------------------------------------------------------------------------
# 3. Background: the computational graph
# --------------------------------------------------------------------------------------------------

# The vocabulary of GHN-2 and GHN-3, in the released order. A Linear counts as conv; activations
# and reshapes have no node.
OPS = (
    "max_pool", "avg_pool", "sep_conv", "dil_conv", "conv", "msa", "cse", "sum", "concat", "input",
    "bias", "bn", "ln", "pos_enc", "glob_avg")
PARAMETRIC = ("conv", "sep_conv", "dil_conv", "ln", "bn", "pos_enc")   # nodes of their parameters
CONVOLUTIONS = ("conv", "sep_conv", "dil_conv")
MODULE_OPS = (
    (nn.Linear, "conv"),
    (nn.modules.rnn.RNNBase, "conv"),
    (nn.modules.rnn.RNNCellBase, "conv"),
    (nn.MultiheadAttention, "msa"),
    (nn.LayerNorm, "ln"),
    (nn.GroupNorm, "ln"),
    (nn.RMSNorm, "ln"),
    (nn.modules.batchnorm._NormBase, "bn"),
    (nn.Embedding, "pos_enc"),
    (nn.EmbeddingBag, "pos_enc"),
    (nn.PReLU, "bias"),                      # small slopes: it starts near a ReLU
    (nn.modules.pooling._MaxPoolNd, "max_pool"),
    (nn.modules.pooling._AvgPoolNd, "avg_pool"),
    (nn.modules.pooling._AdaptiveAvgPoolNd, "glob_avg"),
)
CALL_OPS = {
    "add": "sum", "iadd": "sum", "add_": "sum", "cat": "concat", "concat": "concat",
    "linear": "conv", "conv1d": "conv", "conv2d": "conv", "conv3d": "conv",
    "layer_norm": "ln", "group_norm": "ln", "batch_norm": "bn",
    "softmax": "msa", "scaled_dot_product_attention": "msa", "shifted_window_attention": "msa",
    "max_pool2d": "max_pool", "avg_pool2d": "avg_pool",
    "adaptive_avg_pool2d": "glob_avg", "mean": "glob_avg",
}
NO_VALUE = ("getattr", "size", "dim", "ne")   # a size, or where the padding is: nothing that flows
SIZE_ANCHORS = 16             # sizes 1, 2, 4, ... 32768
DEPTH_ANCHORS = 16            # relative depth 0, 1/15, ... 1
MAX_DEGREE = 8


def encode_graph(net):
    """Graph f^G of any module that torch.fx can trace; nothing is computed.

    Every parameter becomes a node: a module's weight, then its bias, chained in this order. What is
    outside the vocabulary (activations, reshapes, dropout) is contracted. A parameter that the
    forward pass reads directly (class token, position embedding, layer scale) is a source node,
    "pos_enc". A parameter of several names, or a module used twice, has one node.
    """
    builder = GraphBuilder(net)
    for node in trace(net).nodes:
        builder.visit(node)
    for name in builder.parameters:
        if name not in builder.node_of:
            raise InputError(
                f"the forward pass of {type(net).__name__} has no use for {name}; remove it")
    return Graph(builder.ops, builder.names, builder.shapes, builder.edges, builder.outputs)


def trace(net):
    try:
        return fx.Tracer().trace(net)
    except Exception as error:               # of many kinds: what a forward pass does to a proxy
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"torch.fx cannot trace {type(net).__name__} ({reason[0]}); it needs a forward pass "
            "whose course does not depend on its input") from error


class GraphBuilder:
    """Collects the nodes and edges of f^G, one node of a torch.fx trace after another.

    node_of: parameter name -> its node
    ends: node of the trace -> the nodes of f^G from which its value comes
    reused: nodes of the trace whose value comes from a matrix that has its node elsewhere
    """
    def __init__(self, net):
        self.modules = dict(net.named_modules(remove_duplicate=False))
        self.parameters = dict(net.named_parameters())
        first = {id(p): name for name, p in self.parameters.items()}
        self.first_name = {}
        for name, p in net.named_parameters(remove_duplicate=False):
            self.first_name[name] = first[id(p)]             # tied parameters have one name
        self.ops, self.names, self.shapes = ["input"], [None], [()]
        self.edges = []
        self.outputs = []
        self.node_of = {}
        self.ends = {}
        self.reused = set()

    def visit(self, node):
        sources = []
        for source in node.all_input_nodes:
            sources.extend(self.ends.get(source, []))
        if node.op == "placeholder":
            is_first = not self.ends
            self.ends[node] = [0] if is_first else []
        elif node.op == "get_attr":
            self.ends[node] = self.visit_attribute(node)
        elif node.op == "call_module":
            self.ends[node] = self.visit_module(node, sources)
        elif node.op == "output":
            for source in node.all_input_nodes:
                if source not in self.reused:                # a tied head is no head of its own
                    self.outputs.extend(self.ends[source])
        else:
            self.ends[node] = self.visit_call(node, sources)
        if self.ends.get(node) == sources and not self.reused.isdisjoint(node.all_input_nodes):
            self.reused.add(node)

    def visit_attribute(self, node):
        """A parameter that is read directly; one that a function owns waits for its call."""
        name = self.first_name.get(node.target)
        if name is None or all(owns_parameters(user) for user in node.users):
            return []
        if name not in self.node_of:
            self.add("pos_enc", name, self.parameters[name].shape, [])
        return [self.node_of[name]]

    def visit_module(self, node, sources):
        module = self.modules[node.target]
        owned = []
        for name, _ in module.named_parameters():
            owned.append(self.first_name[f"{node.target}.{name}"])
        op = module_op(module)
        if op is None and owned:
            raise InputError(
                f"{node.target} is a {type(module).__name__}, which has no place in the graphs of "
                "this hypernetwork; build it of linear, convolutional and normalising layers")
        if op in CONVOLUTIONS and all(name in self.node_of for name in owned):
            self.reused.add(node)
        return self.add_operation(op, owned, sources, self.attention_heads(node))

    def visit_call(self, node, sources):
        if call_name(node) in NO_VALUE:
            return []
        op = CALL_OPS.get(call_name(node))
        if op == "sum" and len(node.all_input_nodes) < 2:    # a constant is added: no branches join
            op = None
        owned = []
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source.target in self.first_name:
                owned.append(self.first_name[source.target])
        if op in CONVOLUTIONS and all(name in self.node_of for name in owned):
            self.reused.add(node)
        return self.add_operation(op, owned, sources, self.attention_heads(node))

    def attention_heads(self, node):
        """(heads,) of the innermost module around a node that has heads. D12: the released graphs
        do not tell their number."""
        stack = node.meta.get("nn_module_stack") or {}
        for path in reversed(list(stack)):
            heads = getattr(self.modules.get(path), "num_heads", None)
            if heads is not None:
                return (heads,)
        return ()

    def add_operation(self, op, owned, sources, heads):
        """Nodes of an operation and of the parameters it owns; returns the nodes it ends in."""
        if op is None:
            return sources
        if op in (*PARAMETRIC, "bias"):
            return self.add_parameters(op, owned, sources)
        # Attention has a node of its own, after its input and before its output projection.
        last = [name for name in owned if "out_proj" in name or ".proj." in name]
        first = [name for name in owned if name not in last]
        sources = self.add_parameters("conv", first, sources)
        shape = heads if op == "msa" else ()
        sources = [self.add(op, None, shape, sources)]
        return self.add_parameters("conv", last, sources)

    def add_parameters(self, op, owned, sources):
        for name in owned:
            if name not in self.node_of:
                parameter = self.parameters[name]
                kind = parameter_op(op, name, parameter.ndim)
                sources = [self.add(kind, name, parameter.shape, sources)]
        return sources

    def add(self, op, name, shape, sources):
        node = len(self.ops)
        self.ops.append(op)
        self.names.append(name)
        self.shapes.append(tuple(shape))
        for source in sorted(set(sources)):
            self.edges.append((source, node))
        if name:
            self.node_of[name] = node
        return node


def call_name(node):
    return node.target if isinstance(node.target, str) else node.target.__name__


def owns_parameters(node):
    """Whether a node of the trace is a function that reads weights, as F.linear does."""
    if node.op != "call_function":
        return False
    return CALL_OPS.get(call_name(node)) in (*PARAMETRIC, "msa")


def module_op(module):
    for kind, op in MODULE_OPS:
        if isinstance(module, kind):
            return op
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.groups > 1:
            return "sep_conv"
        return "dil_conv" if max(module.dilation) > 1 else "conv"
    return None


def parameter_op(op, name, ndim):
    """The operation that the node of a parameter stands for, op being its module's."""
    last = name.split(".")[-1]
    if last.endswith("bias") or last.startswith("bias"):     # "bias", "in_proj_bias", "bias_ih_l0"
        return "bias"
    if ndim > 1 or op in ("ln", "bn", "bias"):
        return op
    return "pos_enc"


class Graph:
    """f^G = (V, E): a node is an operation or a parameter of one; edges follow the forward pass.

    ops: (V,) index into OPS            shapes: of parameters; (heads,) of attention; else ()
    names: parameter name or None       edges: list of (from, to)
    distance: (V, V) length of the shortest directed path, -1 where there is none: the "virtual
    edges" of GHN-2
    """
    def __init__(self, ops, names, shapes, edges, outputs):
        self.names = names
        self.shapes = shapes
        self.edges = edges
        self.op_names = ops
        self.ops = torch.tensor([OPS.index(op) for op in ops])
        self.inputs = [[] for _ in ops]
        self.readers = [[] for _ in ops]
        for source, target in edges:
            self.inputs[target].append(source)
            self.readers[source].append(target)
        self.joins = self.residual_sums()
        self.heads = self.class_heads(outputs)
        self.num_classes = max([self.shapes[head][0] for head in self.heads], default=0)
        self.distance = shortest_paths(len(ops), edges)
        self.features = self.node_features()

    def __len__(self):
        return len(self.names)

    def residual_sums(self):
        """The sums in which residual branches end; adding a position embedding is none."""
        joins = set()
        for node, op in enumerate(self.op_names):
            embedded = any(self.op_names[i] == "pos_enc" for i in self.inputs[node])
            if op == "sum" and not embedded:
                joins.add(node)
        return joins

    def class_heads(self, outputs):
        """The matrices whose rows are classes: what the output comes from. None in an encoder."""
        heads = set()
        for node in outputs:
            heads.update(self.heads_behind(node))
        return sorted(heads)

    def heads_behind(self, node):
        shape = self.shapes[node]
        op = self.op_names[node]
        if op in CONVOLUTIONS:
            is_matrix = len(shape) > 1 and math.prod(shape[2:]) == 1
            return [node] if is_matrix else []
        if op in PARAMETRIC or op in ("input", "concat"):
            return []
        behind = [self.heads_behind(i) for i in self.inputs[node]]
        return sum(behind, []) if all(behind) else []        # a residual sum is no sum of heads

    def counts_classes(self, node):
        """Whether the first dimension of a parameter counts classes: a head's matrix or bias."""
        if self.op_names[node] == "bias":
            node = self.inputs[node][0] if self.inputs[node] else node
        return node in self.heads

    def node_features(self):
        """What the embeddings read: sizes (V, 4, SIZE_ANCHORS), degrees (V,) in and out, depth
        (V, DEPTH_ANCHORS)."""
        sizes = torch.zeros(len(self), 4)
        for node, shape in enumerate(self.shapes):
            shape = folded(shape)
            sizes[node, :len(shape)] = torch.tensor(shape, dtype=torch.float32)
            # D10: a class count belongs to the task, not to the architecture. Shown here, it would
            # tell a network without task information which task it serves; the released code
            # shows it, in bins of 16.
            if self.names[node] and self.counts_classes(node):
                sizes[node, 0] = 0
        size = torch.stack([interpolated_size(s) for s in sizes.T], 1)
        adjacent = self.distance == 1
        degree_in = adjacent.sum(0).clamp(max=MAX_DEGREE)
        degree_out = adjacent.sum(1).clamp(max=MAX_DEGREE)
        # D11: relative depth. An absolute one (released code) leaves networks deeper than the
        # trained ones with untrained rows.
        depth = self.distance[0].clamp(min=0).float()
        depth = depth / depth.max() * (DEPTH_ANCHORS - 1)
        return size, degree_in, degree_out, interpolated(depth, DEPTH_ANCHORS)

    @functools.lru_cache(maxsize=None)
    def distance_index(self, limit):
        """(V, V) row of the distance table: 0 no path, 1 + d a path of d edges from i to j,
        1 + limit + d one from j to i."""
        forward = self.distance.clamp(max=limit)
        backward = forward.T
        index = torch.where(backward > 0, 1 + limit + backward, 0)
        return torch.where(forward >= 0, 1 + forward, index)

    @functools.lru_cache(maxsize=None)
    def batches(self, num_classes=None, features=None):
        """The parameters as ParameterBatches: those of one role are decoded together.

        num_classes: rows of the class heads (default: the network's own). With `features`, the
        matrix M of Eq. (4) is one more parameter, (features, d): it stands where the classifier
        stands, so it is decoded from the node whose output the classifier reads.
        """
        nodes_of = {}
        for node, name in enumerate(self.names):
            if name:
                role = self.role(node, num_classes)
                nodes_of.setdefault(role, []).append(node)
        batches = []
        for role, nodes in nodes_of.items():
            names = [self.names[node] for node in nodes]
            batches.append(ParameterBatch(role, names, self.index(nodes)))
        if features:
            (head,) = self.heads
            role = Role(shape=(features, self.shapes[head][1]), kind="M")
            nodes = self.inputs[head][:1]
            batches.append(ParameterBatch(role, ["M"], self.index(nodes)))
        return tuple(batches)

    def index(self, nodes):
        return torch.tensor(nodes, device=self.ops.device)

    def role(self, node, num_classes):
        shape = self.shapes[node]
        kind = self.op_names[node]
        if kind == "pos_enc" and self.inputs[node]:
            kind = "token"                                   # a table where the input is looked up
        weight = shape
        if kind == "bias" and self.inputs[node]:
            weight = self.shapes[self.inputs[node][0]]
        is_head = self.counts_classes(node)
        if is_head and num_classes:
            shape = (num_classes, *shape[1:])
        is_qkv = len(weight) == 2 and weight[0] == 3 * weight[1] and not is_head
        return Role(
            shape, kind, is_head,
            parts=3 if is_qkv else 1,
            ends_branch=len(shape) > 1 and self.reader_after_bias(node) in self.joins)

    def reader_after_bias(self, node):
        reader = self.first_reader(node)
        if self.op_names[reader] == "bias":
            reader = self.first_reader(reader)
        return reader

    def first_reader(self, node):
        return self.readers[node][0] if self.readers[node] else node

    def to(self, device):
        """The same graph with its tensors on `device`."""
        moved = copy.copy(self)
        moved.ops = self.ops.to(device)
        moved.distance = self.distance.to(device)
        moved.features = tuple(f.to(device) for f in self.features)
        return moved


def folded(shape):
    """A shape of at most four numbers: time and height of a video's kernel count as one."""
    if len(shape) <= 4:
        return shape
    return shape[0], shape[1], math.prod(shape[2:-1]), shape[-1]


def interpolated(x, anchors):
    """Weights of a linear interpolation of positions x (N,) in [0, anchors - 1] between whole
    numbers: (N, anchors)."""
    distance = (x[:, None] - torch.arange(anchors)).abs()
    return (1 - distance).clamp(min=0)


def interpolated_size(sizes):
    """The same for sizes, on a log2 scale; size 0 (nothing there) gives zeros."""
    sizes = torch.as_tensor(sizes, dtype=torch.float32)
    position = sizes.clamp(min=1).log2().clamp(max=SIZE_ANCHORS - 1)
    return interpolated(position, SIZE_ANCHORS) * (sizes > 0)[:, None]


def shortest_paths(count, edges):
    """(V, V) lengths of shortest directed paths, -1 where there is none.

    Nodes are numbered topologically, so one sweep over the edges is enough.
    """
    far = count + 1
    distance = np.full((count, count), far)
    np.fill_diagonal(distance, 0)
    for source, target in sorted(edges, key=lambda edge: edge[1]):
        through = distance[:, source] + 1
        distance[:, target] = np.minimum(distance[:, target], through)
    distance[distance >= far] = -1
    return torch.from_numpy(distance)


# --------------------------------------------------------------------------------------------------
# 4. TAL model structure and components: the learngene (encoder)
# --------------------------------------------------------------------------------------------------

def task_hypernet(I, W_gamma, W_beta):
    """Eq. (2): (gamma, beta) = (W^gamma, W^beta) I_tau. I (..., t); W (h, t) -> two (..., h)."""
    gamma = F.linear(I, W_gamma)
    beta = F.linear(I, W_beta)
    return gamma, beta                                               # Eq. (2)


def task_specific_layer(f, gamma, beta):
    """Eq. (3): f_tau^G = gamma x f^G + beta. f (V, h), gamma and beta (h,), of all nodes alike."""
    return gamma * f + beta                                          # Eq. (3)


class GraphLayer(nn.Module):
    """Graphormer layer (pre-norm) whose attention input passes the task-specific layer.

    D2: where in the layer the task-specific layer sits, the paper leaves to Fig. 2(d); the released
    code modulates the normalised input of the attention, and so do we.
    """
    def __init__(self, width, heads, task_dim):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.ff = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        if task_dim:              # zero: training starts from the network without task information
            self.W_gamma = nn.Parameter(torch.zeros(width, task_dim))
            self.W_beta = nn.Parameter(torch.zeros(width, task_dim))

    def forward(self, h, bias, I):                   # (V, width), (heads, V, V), (t,) or None
        z = self.norm1(h)
        if I is not None:
            gamma, beta = task_hypernet(I, self.W_gamma, self.W_beta)
            # D1: gamma is counted from 1, as in the released code
            z = task_specific_layer(z, 1 + gamma, beta)
        h = h + self.proj(self.attention(z, bias))
        return h + self.ff(self.norm2(h))

    def attention(self, z, bias):
        qkv = self.qkv(z).view(len(z), 3, self.heads, -1)
        q, k, v = qkv.permute(1, 2, 0, 3)            # each (heads, V, width / heads)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return mixed.transpose(0, 1).reshape(z.shape)


class Learngene(nn.Module):
    """The encoder: graph (and task embedding) -> features of its nodes (V, width): f_tau^G."""
    def __init__(self, width, layers, heads, max_distance, task_dim):
        super().__init__()
        self.max_distance = max_distance
        self.op = nn.Embedding(len(OPS), width)
        # of (out, in, kernel height, kernel width), concatenated
        self.size = nn.Parameter(torch.randn(4, SIZE_ANCHORS, width // 4) * 0.2)
        self.degree_in = nn.Embedding(MAX_DEGREE + 1, width)
        self.degree_out = nn.Embedding(MAX_DEGREE + 1, width)
        self.depth = nn.Parameter(torch.randn(DEPTH_ANCHORS, width) * 0.2)
        # one additive bias per head for: no path; paths to a node, 0 ... max_distance long; paths
        # from it, 1 ... max_distance long
        self.distance = nn.Embedding(2 * max_distance + 2, heads)
        self.layers = nn.ModuleList(GraphLayer(width, heads, task_dim) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for table in (self.degree_in, self.degree_out, self.distance):
            nn.init.normal_(table.weight, std=0.2)

    def forward(self, graph, I=None):
        h = self.embed(graph)
        index = graph.distance_index(self.max_distance)
        bias = self.distance.weight.T.index_select(1, index.flatten())
        bias = bias.view(-1, *index.shape)           # (heads, V, V)
        for layer in self.layers:
            h = layer(h, bias, I)
        return self.norm(h)                          # (V, width)

    def embed(self, graph):
        """h^(1) = Embed(h^(0)): (V, width)."""
        size, degree_in, degree_out, depth = graph.features
        sizes = torch.einsum("vfs,fsc->vfc", size, self.size)
        h = self.op(graph.ops) + sizes.flatten(1)
        return h + self.degree_in(degree_in) + self.degree_out(degree_out) + depth @ self.depth


# --------------------------------------------------------------------------------------------------
# 4. TAL model structure and components: the decoders
# --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Role:
    """What a decoder needs to know of a parameter besides its node's features."""
    shape: tuple
    kind: str                     # operation of the node, "token" or "M": decides the scale
    is_head: bool = False         # the first dimension counts classes
    parts: int = 1                # 3 where queries, keys and values are stacked
    ends_branch: bool = False     # the output ends a residual branch

    @property
    def core(self):
        """The shape that is decoded: (n,), (rows, columns) or (out, in, kernel h, kernel w)."""
        if self.kind in CONVOLUTIONS and len(self.shape) == 3:       # of a sequence
            return self.shape[0], self.shape[1], 1, self.shape[2]
        if len(self.shape) in (1, 2) or len(self.shape) > 3:
            return folded(self.shape)
        sizes = tuple(n for n in self.shape if n > 1)        # embeddings: (1, T, D), (C, 1, 1)
        return sizes or (1,)


@dataclass(eq=False)
class ParameterBatch:
    """Parameters of one role, decoded together."""
    role: Role
    names: list
    nodes: torch.Tensor           # (n,) of the graph


class BasisIndex:
    """Rows of a basis that several parameters read, looked up in one go: table[...] -> parts."""
    def __init__(self, parts, device):
        self.rows = torch.cat([torch.arange(0), *parts]).to(device)
        self.sizes = [len(part) for part in parts]

    def __call__(self, basis):
        return basis[self.rows].split(self.sizes)


@dataclass(frozen=True)
class HypernetConfig:
    """Sizes of a hypernetwork; the first nine stand in the table HYPERNETS."""
    width: int = 64               # of the learngene's node features
    layers: int = 3
    heads: int = 8
    max_distance: int = 12        # longest path that its attention tells apart
    rank: int = 64                # r of the low-rank decoder
    mlp: tuple = (128, 256)       # hidden sizes of the decoder's MLP
    channels: int = 256           # channels with basis rows of their own
    kernels: int = 8              # kernel positions, likewise
    classes: int = 128            # rows of the class head
    scale: str = "rms"            # of predicted matrices, see `scaled`
    decoder: str = "low-rank"     # or "tiled"
    task_dim: int = 0             # t of Eq. (2); 0: no task information
    tokens: int = 0               # of a vocabulary


HYPERNETS = {
    "drawn": HypernetConfig(),
    # The paper is silent; sizes of the authors' code. Omniglot has 1,623 classes.
    "paper": HypernetConfig(
        width=128, layers=5, heads=16, max_distance=50, rank=90, mlp=(512, 1024), channels=2048,
        kernels=16, classes=2048, scale="fan-in"),
    "tiny": HypernetConfig(width=32, layers=1, heads=4, rank=4, mlp=(32, 48)),         # for tests
}


class LowRankDecoder(nn.Module):
    """LoGAH's decoder: W = A B^T with A (out * kh, r) and B (in * kw, r).

    Each is a learned basis of r columns times a code of r x r numbers, which an MLP makes from the
    node's features. D16: a vector (bias, norm) has rank one: r numbers are enough.
    """
    def __init__(self, config):
        super().__init__()
        self.config = config
        rank = config.rank
        first, second = config.mlp
        self.mlp = nn.Sequential(
            nn.Linear(config.width, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU())
        self.code = nn.Linear(second, 2 * rank * rank)
        self.vector_code = nn.Linear(second, rank)
        # D5: separate bases for rows and columns. With a single one, row and column spaces of
        # neighbouring layers align, and attention starts saturated.
        # D6: classes are not channels: the head's rows have a part of the basis of their own,
        # behind the channels'.
        # D20: nor are tokens; every token of the vocabulary has a row of its own, behind the
        # classes'. In the released code the token table repeats itself every 2,048 tokens.
        self.size = config.channels * config.kernels
        rows = self.size + config.classes
        self.row_basis = nn.Parameter(torch.randn(rows + config.tokens, rank))
        self.col_basis = nn.Parameter(torch.randn(self.size, rank))
        self.vector_basis = nn.Parameter(torch.randn(rows, rank))
        # Principled start (Chang et al. 2020): codes of standard deviation 1 / sqrt(r), so that
        # A and B start near 1.
        nn.init.normal_(self.code.bias, std=rank ** -0.5)
        nn.init.zeros_(self.vector_code.bias)

    def forward(self, h, batches, branches):
        """Node features (V, width) -> per batch of parameters a tensor (n, *core), scaled.

        branches: how many residual branches the network has, see `rms_scaled`.
        """
        plan = self.plan(tuple(batches))
        z = self.mlp(h)
        decoded = {}
        codes = self.code(z[plan.nodes]).view(-1, 2, self.config.rank, self.config.rank)
        codes = codes.split([len(batch.nodes) for batch in plan.matrices])
        row_bases = plan.rows(self.row_basis)
        col_bases = plan.columns(self.col_basis)
        for batch, code, rows, columns in zip(plan.matrices, codes, row_bases, col_bases):
            decoded[batch] = self.matrix(batch.role, code, rows, columns, branches)
        codes = self.vector_code(z)
        for batch, rows in zip(plan.vectors, plan.vector_rows(self.vector_basis)):
            vector = codes[batch.nodes] @ rows.T                     # (n, out)
            decoded[batch] = scaled(vector, batch.role, self.config.scale, branches)
        return [decoded[batch] for batch in batches]

    def matrix(self, role, code, rows, columns, branches):
        """code (n, 2, r, r), rows (out * kh, r), columns (in * kw, r) -> (n, *core), scaled."""
        # A = rows C_0 / sqrt(r) and B = columns C_1, where all n parameters share rows and columns:
        # W = A B^T = rows K columns^T with K = C_0 C_1^T / sqrt(r), which is one product less.
        K = code[:, 0] @ code[:, 1].transpose(1, 2) * self.config.rank ** -0.5       # (n, r, r)
        scale = constant_scale(role, self.config.scale)
        if scale is not None:
            K = K * scale                                            # of fewer numbers than W has
        if len(rows) < len(columns):
            W = (rows @ K) @ columns.T                               # (n, out * kh, in * kw)
        else:
            W = rows @ (K @ columns.T)
        if scale is None:
            W = rms_scaled(W, role, branches)
        if len(role.core) == 2:
            return W
        out, inputs, kh, kw = role.core
        return W.view(-1, out, kh, inputs, kw).transpose(2, 3)       # (n, out, in, kh, kw)

    @functools.lru_cache(maxsize=None)
    def plan(self, batches):
        """What of the bases the parameters of a graph read: once per graph."""
        matrices, rows, columns = [], [], []
        vectors, vector_rows = [], []
        for batch in batches:
            if len(batch.role.core) == 1:
                vectors.append(batch)
                vector_rows.append(self.basis_rows(batch.role))
            else:
                matrices.append(batch)
                rows.append(self.basis_rows(batch.role))
                columns.append(self.basis_columns(batch.role))
        device = self.row_basis.device
        return DecodingPlan(
            matrices, vectors,
            BasisIndex(rows, device), BasisIndex(columns, device), BasisIndex(vector_rows, device),
            nodes=torch.cat([batch.nodes for batch in matrices]))

    def basis_rows(self, role):
        """(out * kh,) the rows of row_basis, or of vector_basis, that a parameter reads."""
        config = self.config
        out = role.core[0]
        if role.is_head:
            check_classes(out, config.classes)
            return self.size + torch.arange(out)
        if role.kind == "token":
            if out > config.tokens:
                raise InputError(
                    f"the hypernetwork knows {config.tokens} tokens, this vocabulary has {out}; "
                    "give the --tokens it was trained with")
            return self.size + config.classes + torch.arange(out)
        # D7: queries, keys and values start at fixed rows, whatever the width. What is larger than
        # the basis repeats it.
        kh = role.core[2] if len(role.core) == 4 else 1
        starts = torch.arange(role.parts) * config.channels
        rows = starts[:, None] + torch.arange(out // role.parts)
        rows = rows.flatten()[:, None] + torch.arange(kh) * config.channels
        return rows.flatten() % self.size

    def basis_columns(self, role):
        """(in * kw,) the rows of col_basis that a matrix reads."""
        kw = role.core[3] if len(role.core) == 4 else 1
        columns = torch.arange(role.core[1])
        columns = columns[:, None] + torch.arange(kw) * self.config.channels
        return columns.flatten() % self.size

    @torch.no_grad()
    def quiet_untrained_rows(self, roles):
        """D19: scales by 0.1 the basis rows that none of the roles reads, given those of all
        training architectures.

        A network wider than any of them then starts as the widest trained one with quiet channels
        beside it, which further training can wake, and not with channels of full-size noise.
        """
        rows, columns, vector_rows = [], [], []
        for role in roles:
            if len(role.core) == 1:
                vector_rows.append(self.basis_rows(role))
            else:
                rows.append(self.basis_rows(role))
                columns.append(self.basis_columns(role))
        quieten(self.row_basis, rows)
        quieten(self.col_basis, columns)
        quieten(self.vector_basis, vector_rows)


def quieten(basis, trained):
    untrained = torch.ones(len(basis), dtype=torch.bool)
    untrained[torch.cat(trained)] = False
    basis[untrained.to(basis.device)] *= 0.1


def check_classes(count, most):
    if count > most:
        raise InputError(
            f"the hypernetwork decodes at most {most} classes, the task has {count}; train a "
            "larger one (--hypernet)")


@dataclass
class DecodingPlan:
    matrices: list                # batches of parameters
    vectors: list
    rows: BasisIndex              # of the matrices, in row_basis
    columns: BasisIndex           # likewise, in col_basis
    vector_rows: BasisIndex       # of the vectors, in vector_basis
    nodes: torch.Tensor           # of the matrices


class TiledDecoder(nn.Module):
    """GHN-3's decoder: an MLP makes one tile (t, t) per kernel position, repeated up to the shape
    of the parameter."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        tile = self.tile = config.width
        self.fc = nn.Linear(tile, 4 * tile * config.kernels ** 2)
        self.conv = nn.Sequential(
            nn.ReLU(), nn.Linear(4 * tile, 8 * tile), nn.ReLU(), nn.Linear(8 * tile, tile * tile))
        self.class_layer = nn.Linear(tile, config.classes)           # the head's rows

    def forward(self, h, batches, branches):
        """As LowRankDecoder.forward."""
        tiles = {}
        for kernel in {batch.role.core[2:] for batch in batches}:
            same = [batch for batch in batches if batch.role.core[2:] == kernel]
            nodes = torch.cat([batch.nodes for batch in same])
            made = self.tiles(h[nodes], kernel or (1, 1))
            tiles.update(zip(same, made.split([len(batch.nodes) for batch in same])))
        decoded = []
        for batch in batches:
            W = self.repeated(tiles[batch], batch.role)
            decoded.append(scaled(W, batch.role, self.config.scale, branches))
        return decoded

    def tiles(self, h, kernel):
        """(n, width), (kh, kw) -> (n, kh * kw, t, t)."""
        positions = self.kernel_positions(kernel).to(h.device)
        size = self.config.kernels ** 2
        weight = self.fc.weight.view(size, -1, self.tile)[positions]
        bias = self.fc.bias.view(size, -1)[positions]
        z = torch.einsum("nc,poc->npo", h, weight) + bias
        return self.conv(z).view(-1, len(positions), self.tile, self.tile)

    def kernel_positions(self, kernel):
        """(kh * kw,) places in the middle of the largest kernel; what is larger repeats it."""
        largest = self.config.kernels
        y, x = [(torch.arange(n) + (largest - n) // 2) % largest for n in kernel]
        return (y[:, None] * largest + x).flatten()

    def repeated(self, tile, role):
        """(n, kh * kw, t, t) -> (n, out), or (n, out, in, kh * kw)."""
        out = role.core[0]
        if role.is_head:
            check_classes(out, self.config.classes)
            tile = self.class_layer(tile.relu().transpose(2, 3)).transpose(2, 3)
        down = math.ceil(out / tile.shape[2])
        if len(role.core) == 1:
            vector = tile[:, 0].mean(-1)
            return vector.repeat(1, down)[:, :out]
        inputs = role.core[1]
        across = math.ceil(inputs / self.tile)
        W = tile.repeat(1, 1, down, across)[..., :out, :inputs]
        return W.permute(0, 2, 3, 1)


def scaled(W, role, rule, branches):
    """Scales decoded tensors W (n, ...) to what a network expects at its start.

    The released code's rules: matrices times sqrt(2 / fan-in), norm weights 2 sigmoid(w / 2),
    biases tanh(0.2 w). D8: rule "rms" has another rule for matrices, see `rms_scaled`.
    """
    if role.kind in ("ln", "bn"):
        return 2 * torch.sigmoid(W / 2)
    if role.kind == "bias":
        return torch.tanh(0.2 * W)
    scale = constant_scale(role, rule)
    return rms_scaled(W, role, branches) if scale is None else W * scale


def constant_scale(role, rule):
    """The factor of matrices that does not depend on them; None if it does (D8: "rms").

    D8: position embeddings and class tokens start at 0.2 of what is decoded; at full size they
    drown the patches and delay all learning.
    """
    if role.kind == "pos_enc":
        return 0.2
    return (2 / fan_in(role)) ** 0.5 if rule == "fan-in" else None


def fan_in(role):
    return 1 if role.kind == "token" else math.prod(role.shape[1:])    # a table is looked up


def rms_scaled(W, role, branches):
    """D8: sets the root mean square of a matrix to sqrt(1 / fan-in), and divides the last matrix
    of a residual branch by the number of branches beyond 6, so that a deeper network takes smaller
    steps."""
    scale = (1 / fan_in(role)) ** 0.5
    if role.ends_branch:
        scale = scale * (6 / max(6, branches))
    mean_square = W.pow(2).mean(tuple(range(1, W.ndim)), keepdim=True)
    return W * (scale * torch.rsqrt(mean_square + 1e-8))


class Hypernet(nn.Module):
    """H_D(.; theta): learngene and decoder. `predict` is the whole method at use."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.learngene = Learngene(
            config.width, config.layers, config.heads, config.max_distance, config.task_dim)
        is_tiled = config.decoder == "tiled"
        self.decoder = TiledDecoder(config) if is_tiled else LowRankDecoder(config)

    def predict(self, graph, I=None, num_classes=None, features=None, heads=True):
        """w_pred = H_D(f^G; theta): {parameter name: tensor} for every parameter of the graph.

        I: task embedding (t,), or None without task information.
        num_classes: rows of the class head (default: the network's own).
        features: width d' of the ancestry's features; adds "M", the (d', d) matrix of Eq. (4),
        transposed.
        heads: whether to predict those, too.
        """
        batches = graph.batches(num_classes, features)
        if not heads:
            batches = tuple(batch for batch in batches if not batch.role.is_head)
        h = self.learngene(graph, I)                                 # (V, width)
        weights = {}
        for batch, W in zip(batches, self.decoder(h, batches, len(graph.joins))):
            W = W.reshape(-1, *batch.role.shape)
            weights.update(zip(batch.names, W.unbind(0)))
        return weights

    def optimizer_groups(self, lr, lr_basis, weight_decay):
        """AdamW groups: what the node features are multiplied with at both ends (bases and
        embeddings) may learn at a rate of its own."""
        bases, others = [], []
        for name, p in self.named_parameters():
            (bases if is_basis(name) else others).append(p)
        return [
            {"params": others, "lr": lr, "weight_decay": weight_decay},
            {"params": bases, "lr": lr_basis, "weight_decay": weight_decay},
        ]


def is_basis(name):
    embeddings = ("op", "size", "degree", "depth", "distance")
    return "basis" in name or name.startswith(tuple(f"learngene.{e}" for e in embeddings))


# --------------------------------------------------------------------------------------------------
# 4. Train TAL model on a large dataset
# --------------------------------------------------------------------------------------------------

PREDPARAM = 3e-5     # Sec. 5.1: gamma, the weight of the norms of predicted parameters in the loss


def meta_batch_loss(losses):
    """Eq. (1): mean over the m architectures of a meta-batch; each is a mean over n images."""
    return torch.stack(list(losses)).mean()                          # Eq. (1)


def loss_aux(E_train, E_anc, M, temperature=1.0):
    """Eq. (4): KL(softmax(E_train M) || softmax(E_anc)), mean over the batch.

    E_train (B, d), M (d, d'), E_anc (B, d'). D3: the released code has the two sides exchanged,
    temperature 3, and divides by batch size times classes.
    """
    log_p = F.log_softmax(E_train @ M / temperature, -1)
    log_q = F.log_softmax(E_anc / temperature, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()            # Eq. (4)


def loss_cls(y, logits):
    """Eq. (5): CE(y_c, f_train(x)). y (B,), or (B, C) probabilities (TAL+); logits (B, C).

    D24: the released code smooths the labels by 0.1.
    """
    return F.cross_entropy(logits, y)                                # Eq. (5)


def tal_loss(aux, cls, alpha):
    """Eq. (6): L = alpha L_aux + (1 - alpha) L_cls."""
    return alpha * aux + (1 - alpha) * cls                           # Eq. (6)


class TrainingModel(nn.Module):
    """f_train with both outputs of one pass: logits (B, C), the encoder's features E (B, d)."""
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        E = self.net.encode(x)
        return self.net.head(E), E


class Ancestry(nn.Module):
    """The ancestry model: one encoder, ViT or GPT-2, with a head per task it was trained on.

    A published one comes with the mean and std by which its images were normalised, and is shown
    every image that way, at the size it knows; others see each task's own normalisation.
    """
    def __init__(self, config, classes, mean=None, std=None):
        super().__init__()
        self.encoder = network(config)
        if isinstance(config, ViTConfig):
            self.encoder.head = nn.Identity()
        heads = {task: nn.Linear(config.width, count) for task, count in classes.items()}
        self.heads = nn.ModuleDict(heads)
        self.register_buffer("mean", as_buffer(mean), persistent=False)
        self.register_buffer("std", as_buffer(std), persistent=False)

    @property
    def width(self):
        return self.encoder.config.width                             # d' of Eq. (4), t of Eq. (2)

    def forward(self, x, task):
        """uint8 images (B, 3, H, W) or token ids (B, T) of a data.Task -> E_anc (B, d')."""
        return self.encode(self.normalise(x, task))

    def normalise(self, x, task):
        if self.mean is None:
            return task.normalise(x)
        return (x / 255 - self.mean) / self.std

    def encode(self, x):
        """Normalised images or token ids -> (B, d')."""
        if x.ndim == 2:
            return self.encoder.encode(x)
        size = self.encoder.config.image_size
        if x.shape[-1] != size:
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
        return self.encoder(x)

    def knows(self, task):
        """Whether there is a head for exactly the classes of a task."""
        if task.name not in self.heads:
            return False
        return self.heads[task.name].out_features == task.num_classes


def as_buffer(channels):
    return None if channels is None else torch.tensor(channels).view(3, 1, 1)


def soft_labels(y, logits):
    """D9: half label, half the ancestry's softmax. y (B,), logits (B, C) -> (B, C)."""
    soft = logits.softmax(-1)
    return (soft + F.one_hot(y, logits.shape[1])) / 2


@functools.lru_cache(maxsize=None)
def encoded(config, device):
    """The training model of an architecture, without storage, and its graph."""
    net = skeleton(config)
    return TrainingModel(net), encode_graph(net).to(device)


@dataclass(frozen=True)
class Objective:
    """What Eq. (6) is made of."""
    ancestry: Ancestry | None     # the teacher
    alpha: float = 0.0            # weight of Eq. (4)
    temperature: float = 1.0      # of its softmax
    soft: bool = False            # TAL+: the ancestry's logits as soft labels


def tal_step(hypernet, config, task, x, y, I, objective, machine):
    """One architecture on one batch -> three float32 numbers: the loss of Eq. (6) with the
    regularisation of predicted parameters, Eq. (5) and Eq. (4) (0 without ancestry).

    x: uint8 images (B, 3, H, W) or token ids (B, T); y (B,); I (t,) or None.
    """
    ancestry, alpha = objective.ancestry, objective.alpha
    net, graph = encoded(config, machine.device)
    weights = hypernet.predict(graph, I, task.num_classes, ancestry.width if alpha else None)
    M = weights.pop("M").T if alpha else None
    norms = torch.stack(torch._foreach_norm(list(weights.values()))).sum()
    weights = {f"net.{name}": w for name, w in weights.items()}
    with machine.autocast():
        logits, E_train = functional_call(net, weights, (task.normalise(x),), strict=True)
        soft = objective.soft and ancestry.knows(task)
        with torch.no_grad():
            E_anc = ancestry(x, task) if alpha or soft else None
            if soft:
                y = soft_labels(y, ancestry.heads[task.name](E_anc))
    cls = loss_cls(y, logits.float())
    aux = torch.zeros_like(cls)
    if alpha:
        aux = loss_aux(E_train.float(), E_anc.float(), M, objective.temperature)
    loss = tal_loss(aux, cls, alpha) + PREDPARAM * norms
    return loss, cls, aux


# --------------------------------------------------------------------------------------------------
# 4. Tuning TAL model under multi-task setting
# --------------------------------------------------------------------------------------------------

@torch.no_grad()
def task_embedding(ancestry, task, device, limit=2000):
    """I_tau: mean ancestry feature (t,) of the first `limit` training images of a task.

    Their classes are mixed. D4: brought to norm sqrt(t). The released embeddings have norms between
    6 and 23, and an unseen task's falls outside.
    """
    x, _ = task.examples("train", limit)
    sums = [ancestry(part.to(device), task).sum(0) for part in x.split(500)]
    mean = torch.stack(sums).sum(0) / len(x)
    return mean * (len(mean) ** 0.5 / mean.norm())


def sampling_weights(counts, temperature=2.0):
    """Sec. 5.1: w_tau = p_tau^(1/T), normalised; p_tau is task tau's share of all images."""
    p = torch.tensor(counts, dtype=torch.float64)
    w = (p / p.sum()) ** (1 / temperature)
    return w / w.sum()


def multi_task_loss(losses, w=None):
    """Eq. (7): 1 / (T M) sum_tau sum_a w_tau L. losses: T values, each Eq. (1)'s mean over the M
    architectures; w (T,).

    In training, tasks are drawn with probability w_tau (Sec. 5.1), so the losses of the drawn ones
    count equally.
    """
    losses = torch.stack(list(losses))
    weighted = losses if w is None else w * losses
    return weighted.mean()                                           # Eq. (7)


def task_schedule(weights, steps, seed):
    """Per step, (task, how often it came before): fixed by the seed, so that a run can resume
    anywhere."""
    rng = random.Random(f"{seed} tasks")
    visits = [0] * len(weights)
    schedule = []
    for _ in range(steps):
        (task,) = rng.choices(range(len(weights)), weights.tolist())
        schedule.append((task, visits[task]))
        visits[task] += 1
    return schedule


def train_hypernet(run, stage, args, hypernet, tasks, embeddings, objective, epochs):
    """The training loop of both stages. One task: Eq. (1). Many: Eq. (7), w_tau being the
    probability to draw the task.

    Step k draws its task, architectures and images from (seed, k) alone. tasks: a list;
    embeddings: {name: I}, or {}.
    """
    machine = run.machine
    archs = architectures(args.archs, input_shape(args))
    counts = [len(task.labels["train"]) for task in tasks]
    steps = math.ceil(epochs * sum(counts) / args.batch_size)
    schedule = task_schedule(sampling_weights(counts, args.task_temperature), steps, args.seed)
    job = start_training(
        run, args, stage, hypernet,
        hypernet.optimizer_groups(args.lr, args.lr_basis, args.weight_decay), steps,
        hypernet_identity(args, stage, objective.ancestry, tasks),
        extra={"hypernet": asdict(hypernet.config), "embeddings": embeddings,
               "tasks": described(tasks)})
    unknown = [task.name for task in tasks if objective.soft and not objective.ancestry.knows(task)]
    if unknown:
        run.print(f"the ancestry has no head for the classes of {', '.join(unknown)}: hard labels")
    for step in job.steps():
        drawn, visit = schedule[step]
        task = tasks[drawn]
        I = embeddings.get(task.name)
        x, y = task.batch(
            "train", visit, args.batch_size, args.seed, args.recipe, machine.rank, machine.world)
        rng = random.Random(f"{args.seed} {stage} {step} 0")         # 0: all processes draw alike
        configs = rng.sample(archs, args.meta_batch)
        measured = {}
        if (step + 1) * 10 // steps > step * 10 // steps:            # another tenth of the run
            config = asked_architecture(args)
            measured = val_accuracies(hypernet, config, tasks, embeddings, machine.device)
        for x, y in job.parts(x, y):
            losses, losses_cls, losses_aux = [], [], []
            for config in configs:
                loss, cls, aux = tal_step(hypernet, config, task, x, y, I, objective, machine)
                losses.append(loss)
                losses_cls.append(cls)
                losses_aux.append(aux)
            task_loss = meta_batch_loss(losses)                      # Eq. (1)
            loss = multi_task_loss([task_loss])                      # Eq. (7): one task per step
            logged = {"loss_cls": meta_batch_loss(losses_cls), f"loss {task.name}": loss}
            logged["loss_aux"] = meta_batch_loss(losses_aux)
            job.update(loss, **logged, **measured)


def described(tasks):
    """{name: (number of classes, fingerprint of the content)}: what a TAL was trained on."""
    return {task.name: (task.num_classes, task.fingerprint) for task in tasks}


@torch.no_grad()
def val_accuracies(hypernet, config, tasks, embeddings, device, limit=500):
    """{"val TASK": percent, a tensor} of an untrained network: the curve in the log."""
    net = skeleton(config)
    _, graph = encoded(config, device)
    values = {}
    for task in tasks:
        weights = hypernet.predict(graph, embeddings.get(task.name), task.num_classes)
        forward = functools.partial(functional_call, net, weights)
        percent = accuracy(forward, task, "val", device, limit)
        values[f"val {task.name}"] = torch.tensor(percent, device=device)
    return values


# --------------------------------------------------------------------------------------------------
# 4. Customize models across different tasks
# --------------------------------------------------------------------------------------------------

@torch.no_grad()
def customize(hypernet, config, I, num_classes):
    """A network of any size for a task, ready to use or to train on: its parameters are predicted,
    none is random.

    config: ViTConfig or GPT2Config, whose num_classes is ignored; I: task embedding (t,) or None.
    """
    _, graph = encoded(config, next(hypernet.parameters()).device)
    with torch.device("meta"):                       # no storage: what is predicted becomes it
        net = network(replace(config, num_classes=num_classes))
    net.load_state_dict(hypernet.predict(graph, I, num_classes), assign=True)
    return net


class TAL:
    """A trained TAL at use.

    hypernet: its untrained basis rows are quieted, in place, if `quiet` says so (D19)
    ancestry: or None, where nothing asks for it (LoGAH, GHN-3) or its file is gone
    embeddings: {name of a tuned task: I (t,)}
    tasks: {name of a trained task: (number of its classes, fingerprint of its content)}
    trained: the Settings that it was trained with
    """
    def __init__(self, hypernet, ancestry, embeddings, tasks, trained, quiet=True):
        self.hypernet = hypernet.requires_grad_(False)
        self.ancestry = ancestry
        self.embeddings = embeddings
        self.tasks = tasks
        self.trained = trained
        self.device = next(hypernet.parameters()).device
        if quiet and isinstance(hypernet.decoder, LowRankDecoder):
            hypernet.decoder.quiet_untrained_rows(self.trained_roles())

    def trained_roles(self):
        """The roles of all parameters of all architectures that it was trained on."""
        archs = architectures(self.trained.archs, input_shape(self.trained))
        for config in {replace(config, depth=1) for config in archs}:
            _, graph = encoded(config, self.device)
            for batch in graph.batches(self.hypernet.config.classes):
                yield batch.role

    @torch.no_grad()
    def __call__(self, net, task=None):
        """Fills any module that torch.fx can trace with predicted parameters, and returns it.

        task: see `embedding`. A head of more classes than the hypernetwork decodes keeps its own
        parameters, and that is printed.
        """
        graph = encode_graph(net).to(self.device)
        most = self.hypernet.config.classes
        fits = graph.num_classes <= most
        weights = self.hypernet.predict(graph, self.embedding(task), heads=fits)
        for name, p in net.named_parameters():
            if name in weights:
                p.copy_(weights[name])
        if not fits:
            print(f"this TAL predicts heads of at most {most} classes; that of {graph.num_classes} "
                  "is kept as it is")
        return net

    def customize(self, config, images=None):
        """A ViT or GPT-2 of a configuration, with predicted parameters.

        images: a task, as for `embedding`, whose classes count; else config.num_classes do.
        """
        task = self.find_task(images)
        if isinstance(task, data.Task):
            config = replace(config, num_classes=task.num_classes)
        elif task is not None:
            config = replace(config, num_classes=self.tasks[task][0])
        if config.num_classes > self.hypernet.config.classes:
            return self(network(config).to(self.device), task)
        return customize(self.hypernet, config, self.embedding(task), config.num_classes)

    def embedding(self, task):
        """I (t,) of a task, or None where it plays no part.

        task: the name of a tuned task, a data.Task, whatever data.load finds (a folder of images,
        a drawn or a real dataset), or None.
        """
        task = self.find_task(task)
        if task is None or not self.embeddings:              # LoGAH, GHN-3, or not tuned yet
            return None
        if not isinstance(task, data.Task):
            return self.embeddings[task]
        if self.knows(task):
            return self.embeddings[task.name]
        if self.ancestry is None:
            raise InputError("a new task needs the ancestry of this TAL, whose file is gone; give "
                             "tal.load(..., ancestry=FILE)")
        return task_embedding(self.ancestry, task, self.device)

    def knows(self, task):
        """Whether it was trained on a data.Task of this name and content."""
        return task.name in self.tasks and self.tasks[task.name][1] == task.fingerprint

    def find_task(self, task):
        """The name of a task that it was trained on, else a data.Task; None for None."""
        if task is None or isinstance(task, data.Task) or task in self.tasks:
            return task
        name, trained = str(task), self.trained
        if trained.modality == "text":
            return data.load_texts([name], trained.data_dir, trained.context, trained.tokens)[name]
        return data.load(name, trained.data_dir, trained.image_size)


def load(path, device="cpu", ancestry=None, quiet=True):
    """A trained TAL from a run's directory (tune.pt if that is finished, else pretrain.pt), or from
    such a file. Nothing in it is executed.

    ancestry: its file, where that is neither where it was in training nor beside the TAL.
    quiet: whether networks wider than any that it was trained on start quietly (D19).
    """
    path = Path(path)
    files = [path / "tune.pt", path / "pretrain.pt"] if path.is_dir() else [path]
    for file in files:
        saved = finished(file)
        if saved and saved["stage"] in ("pretrain", "tune"):
            break
    else:
        raise InputError(f"there is no finished TAL in {path}; make one by --stage tune --output")
    trained, extra = Settings(saved["config"]), saved["extra"]
    hypernet = Hypernet(HypernetConfig(**extra["hypernet"]))
    common.load_weights(hypernet, saved["model"], file)
    embeddings = {name: I.to(device) for name, I in extra["embeddings"].items()}
    teacher = None
    for place in (ancestry, trained.ancestry, file.parent / "ancestry.pt"):
        if embeddings and teacher is None and place and (place == ancestry or Path(place).exists()):
            teacher = read_ancestry(place, input_shape(trained)).to(device)
    return TAL(hypernet.to(device), teacher, embeddings, extra["tasks"], trained, quiet)


def finished(path, **expected):
    """The checkpoint of a finished stage as a dict, or None; see common.load_checkpoint."""
    if not path.exists():
        return None
    saved = load_checkpoint(path, **expected)
    return saved if saved["step"] == saved["steps"] else None


# ==================================================================================================
# HERE THE METHOD ENDS. What follows makes a program of it: settings, the ancestry of the drawn
# data, stages, tables and figures.
# ==================================================================================================

# --------------------------------------------------------------------------------------------------
# 5.1 Experimental setup: every setting, with its source
# --------------------------------------------------------------------------------------------------

STAGES = ["ancestry", "pretrain", "tune", "evaluate", "train", "customize", "plot"]
PREDICTED = ["tal", "tal+", "logah", "ghn3"]
METHODS = [*PREDICTED, "random", "selection", "finetune"]
SIZES = {**VIT_SIZES, **GPT2_SIZES}
REAL_TASKS = [f"decathlon/{domain}" for domain in data.DOMAINS if domain != "imagenet12"]
CODE = "paper silent; authors' code"


def like(pattern, example):
    """The type of a flag whose text matches a pattern."""
    def check(text):
        if not re.fullmatch(pattern, text):
            raise ArgumentTypeError(f"{text} is not like {example}")
        return text
    return check


NAMED_SIZE = like("|".join(SIZES) + r"|\d+x\d+", f"{', '.join(SIZES)}, or WIDTHxHEADS as 48x6")
THREE_SIZES = like(r"\d+x\d+x\d+", "WIDTHxDEPTHxHEADS, as 64x4x8")
IMAGE_COUNT = like(r"tune|[1-9]\d*", "tune, or a number of at least 1")

# {heading: rows}; a row is (name, type, default or (drawn, paper), help and source). What both
# scripts have stands in common.SHARED; there, too, what a heading means for a checkpoint.
FLAGS = {
    "run": [
        ("--stage", STAGES, "pretrain", "what to do; a stage makes the stages it needs first"),
        ("--format", ["timm", "torchvision", "transformers"], "timm",
         "whose ViT (transformers: GPT-2, for text) loads the file that customize writes"),
        ("--ancestry", str, "", "checkpoint of this code, or a published ViT or GPT-2 (default: "
         "ancestry.pt in --output, made when missing)"),
        ("--tokens", str, "", "folder with GPT-2's vocab.json and merges.txt; else bytes"),
    ],
    "data": [
        ("--modality", ["image", "text"], "image",
         "ViTs for images, or GPT-2s for text (Table 6), where other defaults differ, too"),
        ("--context", positive, (64, 1024), "tokens of a text at most; GPT-2: 1,024"),
        ("--recipe", ["none", "shift", "decathlon"], ("shift", "decathlon"),
         f"how training images are varied; {CODE}: crops, flips, colours, noise"),
    ],
    "training": [
        ("--lr", amount, 3e-4, "peak learning rate, cosine (Sec. 5.1)"),
        ("--lr-basis", amount, (3e-3, 3e-4),
         "the same for decoder bases and graph embeddings; paper: one rate"),
        ("--task-temperature", amount, 2.0, "T of the task sampling (Sec. 5.1)"),
    ],
    "method": [
        ("--method", METHODS, "tal",
         "tal+: wider architectures, soft labels; logah, ghn3: baselines; for train alone: random, "
         "and of the ancestry selection (spaced weights, Xu et al. 2024) or finetune (all but "
         "the head, in its own size)"),
        ("--hypernet", list(HYPERNETS), ("drawn", "paper"), f"its sizes; {CODE}"),
        ("--without", ["nothing", "task-info", "ancestry"], "nothing",
         "ablations of Table 8: w/o T.I.; w/o ans-net (no Eq. (4), the task embeddings stay)"),
        ("--archs", ARCHITECTURE_DATASETS, ("drawn", "ViTs-1K"),
         "architecture dataset; tal+ takes the + one (Sec. 4)"),
        ("--base-task", str, (data.BASE, "imagenet"), "task to pretrain on (Sec. 5.1)"),
        ("--meta-batch", positive, 1, f"architectures per step, m of Eq. (1); {CODE}: 1"),
        # D13: not given in the paper; 0.5 was chosen on val
        ("--alpha", share, (0.5, 0.2), f"weight of L_aux, Eq. (6); {CODE}: 0.2"),
        ("--temperature", amount, 1.0, "of the softmax of Eq. (4); paper: none, authors' code: 3"),
    ],
    "tuning": [
        ("--tune-tasks", str, (",".join(data.DECATHLON), ",".join(REAL_TASKS)),
         "tasks to tune on (Sec. 5.1); a single one is TAL-st of Table 7"),
        # D17: Eq. (7)'s L is the cross-entropy alone
        ("--tune-alpha", share, 0.0,
         "alpha while tuning; Eq. (7): \"typically the cross-entropy\", authors' code: 0"),
    ],
    "ancestry": [
        # D15: broad, and without the tasks that TAL is tuned on
        ("--ancestry-tasks", str, (f"{data.BASE},{data.WIDE}", ""),
         "tasks of one that is trained here; the paper's knows ImageNet"),
        ("--ancestry-size", THREE_SIZES, ("64x4x8", "768x12x12"),
         "WIDTHxDEPTHxHEADS of one that is trained here; paper: ViT-Base"),
        ("--ancestry-lr", amount, (2e-3, 1e-3), "peak learning rate"),
    ],
    "customize": [
        ("--size", NAMED_SIZE, ("drawn-small", "small"),
         "of the network for train and customize: a name, or WIDTHxHEADS"),
        ("--depth", positive, (3, 12), "its layers"),
        ("--train-lr", amount, (2e-3, 1e-3), "peak learning rate of further training"),
        ("--quiet", bool, False,
         "a network wider than any that TAL was trained on starts with quiet channels (D19); "
         "customize: always"),
        ("--source", ["tune", "pretrain"], "tune",
         "hypernetwork that train predicts from; LoGAH in Table 5: pretrain"),
    ],
    "budget": [
        ("--ancestry-epochs", amount, (5.0, 0.0), "the paper takes a pretrained ViT-Base"),
        ("--pretrain-epochs", amount, (4.0, 75.0), "Sec. 5.1"),
        ("--tune-epochs", amount, (6.0, 100.0), "Sec. 5.1"),
        ("--train-epochs", amount, (5.0, 100.0), "Tables 3 and 5; customize: 0"),
        ("--train-images", IMAGE_COUNT, "",
         "images per task for train, instead of epochs; tune: as many as tuning shows of the task"),
    ],
}

DEFAULTS = {                                                 # that differ from the shared ones
    "--output": "runs/tal",
    "--weight-decay": 1e-2,                                  # Sec. 5.1
    "--warmup": (0.03, 0.05),                                # authors' code: 5 of 75 epochs
    "--clip": (1.0, 5.0),                                    # authors' code: 5
}

TEXT_DEFAULTS = {
    "--stage": "tune",
    "--format": "transformers",
    "--output": "runs/tal-text",
    "--batch-size": (64, 32),                                # paper silent
    "--ancestry-epochs": (8.0, 0.0),
    "--pretrain-epochs": 0.0,                                # D22: Sec. 5.2 tells of one training
    "--tune-epochs": (6.0, 100.0),                           # Sec. 5.2; LoGAH there: 250, drawn 15
    "--ancestry-tasks": (",".join(data.GRAMMAR), ""),        # D21
    "--tune-alpha": (0.9, 0.0),                              # D21: chosen on val
    "--base-task": "",
    "--tune-tasks": (",".join(data.GRAMMAR), "mrpc,cola,rte,imdb"),
    "--archs": ("drawn-GPTs", "GPTs-1K"),
    "--size": ("drawn-gpt2", "gpt2"),
}


def settings(argv=None):
    """The Settings of a command line (by default the process's own), checked."""
    args = common.parse_flags(__doc__, FLAGS, DEFAULTS, argv)
    defaults = DEFAULTS | TEXT_DEFAULTS if args.modality == "text" else dict(DEFAULTS)
    if args.stage == "customize":
        defaults |= {"--train-epochs": 0.0, "--quiet": True}
    args = common.parse_flags(__doc__, FLAGS, defaults, argv)
    check_settings(args)
    if args.method not in ("tal", "tal+") or args.without == "ancestry":
        args = args.replace(alpha=0.0, tune_alpha=0.0)
    if args.method == "tal+":
        wider = {"drawn": "drawn+", "ViTs-1K": "ViTs+-1K"}
        args = args.replace(archs=wider.get(args.archs, args.archs))
    return args


def check_settings(args):
    """One sentence where flags do not go together."""
    is_text = args.modality == "text"
    if is_text and args.stage in ("pretrain", "plot") or is_text != ("GPTs" in args.archs):
        raise InputError(f"--stage {args.stage} with --archs {args.archs} is not for --modality "
                         f"{args.modality}; choose another")
    if is_text and (args.method not in ("tal", "logah", "random") or args.source == "pretrain"):
        raise InputError("--modality text has the methods tal, logah and random, and --source tune")
    if args.method not in PREDICTED and args.stage != "train":
        raise InputError(f"--method {args.method} is for --stage train; the other stages predict "
                         "parameters")
    if args.data and args.stage in ("ancestry", "pretrain"):
        raise InputError(f"--stage {args.stage} has tasks of its own; leave out --data")
    if args.meta_batch > 1000:
        raise InputError("--meta-batch: at most 1000, as many as a dataset has architectures")
    if not args.task_temperature or not args.temperature:
        raise InputError("--task-temperature and --temperature divide; say numbers above 0")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % processes:
        raise InputError(f"--batch-size {args.batch_size} does not divide among {processes} "
                         f"processes; say a multiple of {processes}")
    if args.ancestry and not Path(args.ancestry).is_file():
        raise InputError(f"--ancestry: there is no file {args.ancestry}")
    asked_architecture(args)                                 # says what is wrong with its sizes


def names_before_work(args):
    """The settings with all tasks looked up, --data by the names that tasks are called by."""
    def check(names):
        return data.check_names(names, args.data_dir, args.modality)
    args = args.replace(data=",".join(check(split(args.data))))
    wanted = args.source if args.stage == "train" else args.stage
    path = Path(args.output) / ("pretrain.pt" if wanted == "pretrain" else "tune.pt")
    if args.method in PREDICTED and args.stage != "ancestry" and not path.exists():
        if args.pretrain_epochs:
            check([args.base_task])
        if wanted != "pretrain":
            check(split(args.tune_tasks))
    return args


def split(names):
    return names.split(",") if names else []


def uses_task_info(args):
    return args.method in ("tal", "tal+") and args.without != "task-info"


def input_shape(args):
    """What all networks of a run share: the shape of their input and how they pool."""
    if args.modality == "text":
        return {"vocab": vocabulary(args.tokens), "context": args.context, "num_classes": 2}
    return {"image_size": args.image_size, "patch_size": args.patch, "pooling": args.pooling}


@functools.cache
def vocabulary(folder):
    return data.Tokenizer(folder).size


def sized(args, size, depth):
    """The configuration of a size, a name or WIDTHxHEADS."""
    width, heads = SIZES[size] if size in SIZES else map(int, size.split("x"))
    return configuration(input_shape(args), width, depth, heads)


def asked_architecture(args):
    return sized(args, args.size, args.depth)


def build_hypernet(args, ancestry_width=0):
    """The hypernetwork of a method. LoGAH and GHN-3 are TAL without task information and without
    ancestry; GHN-3 also has its own decoder (D18)."""
    return Hypernet(replace(
        HYPERNETS[args.hypernet],
        decoder="tiled" if args.method == "ghn3" else "low-rank",
        task_dim=ancestry_width if uses_task_info(args) else 0,
        tokens=input_shape(args).get("vocab", 0)))


def hypernet_identity(args, stage, teacher, tasks):
    """What a checkpoint of the hypernetwork must agree on to be resumed."""
    headings = ["data", "network", "training", "method"]
    if stage == "tune":
        headings.append("tuning")
    return {
        **identity(args, *headings),
        **content(tasks),
        "teacher": fingerprint(teacher) if teacher else None,
    }


def content(tasks):
    """What an identity holds of its tasks."""
    return {"task": ", ".join(task.name for task in tasks),
            "content": {task.name: task.fingerprint for task in tasks}}


def fingerprint(module):
    """A digest of a module's weights, 16 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------
# The ancestry: published, or trained on the drawn data
# --------------------------------------------------------------------------------------------------

def obtain_ancestry(run, args):
    """The ancestry, frozen: --ancestry, else the run's own, trained first where there is none."""
    path, shape = run["ancestry"], input_shape(args)
    asked = {"ancestry_size": args.ancestry_size, "ancestry_tasks": args.ancestry_tasks}
    if args.ancestry:
        ancestry = read_ancestry(args.ancestry, shape, run.print)
    elif args.stage != "ancestry" and finished(path, **asked):
        ancestry = read_ancestry(path, shape, run.print)
    elif args.ancestry_epochs and args.ancestry_tasks:
        ancestry = train_ancestry(run, args)
    else:
        raise InputError("there is no ancestry; give one by --ancestry FILE, or say "
                         "--ancestry-epochs and --ancestry-tasks to train one")
    return ancestry.to(run.machine.device).eval().requires_grad_(False)


def read_ancestry(path, shape, say=print):
    """The ancestry in a checkpoint of this code, or a published network. shape: see input_shape."""
    is_text = "vocab" in shape
    if not common.read_weights(path)[1]["own"]:
        return published_ancestry(path, shape, say)
    saved = finished(Path(path), stage="ancestry")
    if not saved:
        raise InputError(f"the ancestry in {path} is not finished; go on with its own command")
    config, classes = saved["extra"]["config"], saved["extra"]["classes"]
    if is_text != ("vocab" in config):
        wanted = "text" if is_text else "images"
        raise InputError(f"the ancestry in {path} was not trained on {wanted}; give another")
    ancestry = Ancestry(GPT2Config(**config) if is_text else ViTConfig(**config), classes)
    check_tokens(path, ancestry.encoder.config, shape)
    common.load_weights(ancestry, saved["model"], path)
    return ancestry


def published_ancestry(path, shape, say):
    """A GPT-2, or a ViT of any source that load_pretrained knows.

    The head of a ViT gives TAL+ soft labels for the task imagenet, as published heads of 1,000
    classes are in the order of ImageNet's folders.
    """
    if "vocab" in shape:
        net, _ = common.load_gpt2(path, say=say)
        check_tokens(path, net.config, shape)
        ancestry = Ancestry(net.config, {})
    else:
        net, report = common.load_pretrained(path, image_size=shape["image_size"], say=say)
        classes = {"imagenet": net.config.num_classes} if report["head"] == "kept" else {}
        ancestry = Ancestry(net.config, classes, report["mean"], report["std"])
        for head in ancestry.heads.values():
            head.load_state_dict(net.head.state_dict())
        net.head = nn.Identity()
    ancestry.encoder.load_state_dict(net.state_dict())
    return ancestry


def check_tokens(path, config, shape):
    if "vocab" in shape and config.vocab != shape["vocab"]:
        raise InputError(f"{path} knows {config.vocab} tokens, the data has {shape['vocab']}; say "
                         "--tokens FOLDER with its vocab.json and merges.txt")
    if "vocab" in shape and config.context < shape["context"]:
        raise InputError(f"{path} reads texts of {config.context} tokens, not {shape['context']}; "
                         "say a smaller --context")


def train_ancestry(run, args):
    """The ancestry of the drawn data (D15): one encoder, a head per task, one task per step as
    while tuning. For text it is a language model besides (D21)."""
    machine, is_text = run.machine, args.modality == "text"
    tasks = list(data.load_tasks(split(args.ancestry_tasks), args, machine).values())
    classes = {task.name: task.num_classes for task in tasks}
    width, depth, heads = map(int, args.ancestry_size.split("x"))
    config = configuration(input_shape(args), width, depth, heads)
    if is_text:
        config = replace(config, num_classes=0)
    torch.manual_seed(args.seed)
    ancestry = Ancestry(config, classes).to(machine.device)
    counts = [len(task.labels["train"]) for task in tasks]
    steps = math.ceil(args.ancestry_epochs * sum(counts) / args.batch_size)
    schedule = task_schedule(sampling_weights(counts, args.task_temperature), steps, args.seed)
    job = start_training(
        run, args, "ancestry", ancestry,
        parameter_groups(ancestry, args.ancestry_lr, args.weight_decay), steps,
        {**identity(args, "data", "network", "training", "ancestry"), **content(tasks)},
        extra={"config": asdict(config), "classes": classes})
    for step in job.steps():
        drawn, visit = schedule[step]
        task = tasks[drawn]
        x, y = task.batch(
            "train", visit, args.batch_size, args.seed, args.recipe, machine.rank, machine.world)
        for x, y in job.parts(x, y):
            with machine.autocast():
                logits, following = ancestry_outputs(ancestry, task, task.normalise(x))
            loss = cls = loss_cls(y, logits.float())
            if is_text:                                      # D21: half next tokens, half classes
                loss = (cls + language_loss(x, following.float())) / 2
            job.update(loss, loss_cls=cls)
    accuracies = []
    for task in tasks:
        percent = accuracy(
            lambda x: ancestry_outputs(ancestry, task, x)[0], task, "val", machine.device)
        accuracies.append(f"{task.name} {percent:.1f}")
    run.print(f"ancestry, accuracy on val: {', '.join(accuracies)}")
    return ancestry


def ancestry_outputs(ancestry, task, x):
    """Logits (B, C) of a task; for text also those of every next token (B, T, vocab), else None."""
    head = ancestry.heads[task.name]
    if x.ndim > 2:
        return head(ancestry.encode(x)), None
    tokens = ancestry.encoder.tokens(x)                      # (B, T, d')
    E = ancestry.encoder.last(tokens, x)
    following = ancestry.encoder.language(tokens)
    return head(E), following


def language_loss(ids, logits):
    """Mean cross-entropy of every next token; ids (B, T) padded at the right, logits (B, T, vocab).

    Of the padding, which is the token that ends a text, the first counts.
    """
    padding = logits.shape[-1] - 1
    is_behind = ids[:, :-1] == padding
    wanted = ids[:, 1:].masked_fill(is_behind, -100)         # -100: no loss
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted.flatten())


# --------------------------------------------------------------------------------------------------
# The TAL of a run
# --------------------------------------------------------------------------------------------------

def obtain(run, args, stage):
    """The TAL of a run after "pretrain" or "tune".

    Later stages take a finished one as it is, of any length, sizes and architectures; else it is
    made now, as far as that is still to do.
    """
    if args.stage not in ("pretrain", "tune") and finished(run[stage]):
        model = load(run[stage], run.machine.device, args.ancestry, args.quiet)
        check_trained(model.trained, args)
        tell_trained(run, model.trained)
        return model
    ancestry = None
    if args.alpha or args.tune_alpha or uses_task_info(args):
        ancestry = obtain_ancestry(run, args)
    make = pretrain if stage == "pretrain" else tune
    hypernet, tasks, embeddings = make(run, args, ancestry)
    return TAL(hypernet, ancestry, embeddings, described(tasks), args, args.quiet)


def pretrain(run, args, ancestry):
    """Trains on the base task, or takes up a finished training for the stages that go on from it
    -> hypernetwork, tasks, embeddings (none yet)."""
    tasks = list(data.load_tasks([args.base_task], args, run.machine).values())
    hypernet = new_hypernet(run, args, ancestry)
    objective = objective_of(args, ancestry, args.alpha)
    if args.stage != "pretrain":                             # of any length, but of these settings
        same = hypernet_identity(args, "pretrain", objective.ancestry, tasks)
        saved = finished(run["pretrain"], stage="pretrain", **same)
        if saved:
            common.load_weights(hypernet, saved["model"], run["pretrain"])
            return hypernet, tasks, {}
    train_hypernet(
        run, "pretrain", args, hypernet, tasks, {}, objective, args.pretrain_epochs)
    return hypernet, tasks, {}


def tune(run, args, ancestry):
    """Goes on from the pretraining on many tasks -> hypernetwork, tasks, embeddings."""
    if args.pretrain_epochs:
        hypernet, _, _ = pretrain(run, args, ancestry)
    else:                                                    # D22
        hypernet = new_hypernet(run, args, ancestry)
    tasks = list(data.load_tasks(split(args.tune_tasks), args, run.machine).values())
    embeddings = {}
    if uses_task_info(args):
        for task in tasks:
            embeddings[task.name] = task_embedding(ancestry, task, run.machine.device)
    objective = objective_of(args, ancestry, args.tune_alpha)
    # D14: all of the hypernetwork goes on learning
    train_hypernet(run, "tune", args, hypernet, tasks, embeddings, objective, args.tune_epochs)
    return hypernet, tasks, embeddings


def new_hypernet(run, args, ancestry):
    torch.manual_seed(args.seed)
    return build_hypernet(args, ancestry.width if ancestry else 0).to(run.machine.device)


def objective_of(args, ancestry, alpha):
    """The ancestry teaches only where the loss asks for it."""
    soft = args.method == "tal+" and args.without != "ancestry"
    return Objective(ancestry if alpha or soft else None, alpha, args.temperature, soft)


def check_trained(trained, args):
    """One sentence where a finished TAL is not what the flags ask for."""
    names = ["modality", "method", "without"]
    if args.modality == "text":
        names += ["context", "tokens"]
    elif args.stage in ("evaluate", "plot"):
        names += ["image_size", "patch", "pooling"]
    for name in names:
        old, flag = getattr(trained, name), f"--{name.replace('_', '-')}"
        if old != getattr(args, name):
            raise InputError(f"the TAL in {args.output} was trained with {flag} {old}, not "
                             f"{getattr(args, name)}; say {flag} {old}, or choose another --output")


def tell_trained(run, trained):
    """Says what a finished TAL was trained with, where that is not its preset's."""
    usual = settings(["--preset", trained.preset, "--modality", trained.modality])
    headings = ("data", "network", "training", "method", "tuning", "budget")
    changed = []
    for name, value in identity(usual, *headings).items():
        if getattr(trained, name) != value and not name.startswith("train_"):
            changed.append(f"--{name.replace('_', '-')} {getattr(trained, name)}")
    if changed:
        run.print(f"this TAL was trained with {' '.join(changed)}")


# --------------------------------------------------------------------------------------------------
# Untrained networks: Tables 1, 2 and 6
# --------------------------------------------------------------------------------------------------

def table_sizes(args, depths=(3, 6, 12)):
    """{name: configuration} of the evaluated sizes, or of their drawn counterparts.

    Tables 1 and 2: {3, 6, 12}-Tiny, -Small, -Base; Table 6: {3, 6, 9, 12}-GPT2.
    """
    drawn = "drawn-" if args.preset == "drawn" else ""
    if args.modality == "text":
        return {f"{depth}-GPT2": sized(args, f"{drawn}gpt2", depth) for depth in (3, 6, 9, 12)}
    sizes = {}
    for size in ("tiny", "small", "base"):
        for depth in depths:
            sizes[f"{depth}-{size.title()}"] = sized(args, f"{drawn}{size}", depth)
    return sizes


def f1(predicted, y):
    """F1 of class 1 in percent; 0 where it is never predicted rightly."""
    right = int(((predicted == 1) & (y == 1)).sum())
    both = int((predicted == 1).sum()) + int((y == 1).sum())
    return 200 * right / max(1, both)


def matthews(predicted, y):
    """Matthews correlation of two classes in percent, from -100 to 100; 0 for a constant one."""
    p, t = predicted.double(), y.double()
    covariance = ((p - p.mean()) * (t - t.mean())).mean()
    variances = p.var(correction=0) * t.var(correction=0)
    return float(100 * covariance / variances.sqrt()) if variances > 0 else 0.0


def scores(task, predicted, y):
    """{column of the table: percent}: accuracy; with F1 for paraphrases, Matthews correlation for
    acceptability (Table 6)."""
    metric = getattr(task, "metric", "accuracy")
    if metric == "Matthews":
        return {task.name: matthews(predicted, y)}
    columns = {task.name: 100 * int((predicted == y).sum()) / len(y)}
    if metric == "accuracy/F1":
        columns[f"{task.name} F1"] = f1(predicted, y)
    return columns


def score(net, task, split, device):
    return scores(task, *predictions(net, task, split, device))[task.name]


def untrained_table(model, tasks, configs, split):
    """{network: {task: percent}} of networks with predicted parameters; * marks sizes that were
    never trained on."""
    archs = architectures(model.trained.archs, input_shape(model.trained))
    trained = {(config.width, config.depth) for config in archs}
    embeddings = {task.name: model.embedding(task) for task in tasks}
    table = {}
    for name, config in configs.items():
        mark = "" if (config.width, config.depth) in trained else "*"
        row = table[name + mark] = {}
        for task in tasks:
            net = customize(model.hypernet, config, embeddings[task.name], task.num_classes)
            row |= scores(task, *predictions(net, task, split, model.device))
    return table


def majority_row(tasks, split):
    """What a network gets that always says the most frequent class."""
    row = {}
    for task in tasks:
        y = task.labels[split]
        most_frequent = int(task.labels["train"].bincount().argmax())
        row |= scores(task, torch.full_like(y, most_frequent), y)
    return row


def evaluate(run, args, model, names):
    """Accuracy of untrained networks (Tables 1, 2, 6), printed and kept in a JSON file."""
    tasks = list(data.load_tasks(names, args, run.machine).values())
    table = untrained_table(model, tasks, table_sizes(args), args.split)
    if args.modality == "text":
        table["majority"] = majority_row(tasks, args.split)
    for row in table.values():
        row["average"] = sum(row[task.name] for task in tasks) / len(tasks)
    run.print(f"untrained accuracy in percent, {args.split} split, method {args.method}, seed "
              f"{args.seed} (* a size never trained on)")
    width = max(10, *(len(column) + 1 for column in row))
    run.print(" " * 10 + "".join(f"{column:>{width}}" for column in row))
    for name, row in table.items():
        run.print(f"{name:10}" + "".join(f"{percent:{width}.2f}" for percent in row.values()))
    save_json(run, f"untrained-{args.stage}-{args.split}.json", table)


def save_json(run, name, values):
    if run.machine.rank == 0:
        run.own()
        common.write_text(run.dir / name, json.dumps(values, indent=1))


# --------------------------------------------------------------------------------------------------
# Further training: Tables 1, 3 and 5
# --------------------------------------------------------------------------------------------------

def train(run, args):
    """Trains networks on: from predicted parameters (Table 5's tasks are unseen), from random ones,
    or from the ancestry's."""
    device, source = run.machine.device, None
    config = asked_architecture(args)
    name = f"{config.depth}x{config.width}"
    if args.method in PREDICTED:
        source = obtain(run, args, args.source)
    elif args.method != "random":
        source = obtain_ancestry(run, args)
    tasks = data.load_tasks(split(args.data) or data.DECATHLON, args, run.machine)
    for task in tasks.values():
        net = initial_network(args, config, task, source, device)
        steps = training_steps(task, args, run.machine)
        before = score(net, task, args.split, device)
        stage = f"train-{file_name(task.name)}-{name}-{steps}"
        train_on(run, args, stage, net, task, steps, source)
        after = score(net, task, args.split, device)
        images = steps * args.batch_size
        if args.train_images:
            images = args.train_images if args.train_images == "tune" else int(args.train_images)
        run.print(f"{name} on {task.name}, {args.method}: {before:.2f} untrained, {after:.2f} "
                  f"after {images} images ({args.split})")
        cell = {"task": task.name, "network": name, "method": args.method, "seed": args.seed,
                "images": images, "lr": args.train_lr, "split": args.split}
        run.result("train", cell, untrained=before, trained=after)


def initial_network(args, config, task, source, device):
    """A network for a task, from a TAL, from an ancestry, or of random parameters."""
    torch.manual_seed(args.seed)
    net = network(replace(config, num_classes=task.num_classes)).to(device)
    if isinstance(source, TAL):
        head = copy.deepcopy(net.head.state_dict())
        source(net, task)
        if not source.knows(task):                           # unseen: the head starts at random
            net.head.load_state_dict(head)
    elif isinstance(source, Ancestry):
        initialise_from_ancestry(net, source, task, args.method)
    return net


def initialise_from_ancestry(net, ancestry, task, method):
    """What a user does who has the ancestry but no TAL, in place: fine-tunes it where the sizes
    match, all but the head, or trains a selection of its weights where it is larger."""
    own, large = net.config, ancestry.encoder.config
    shapes = [(c.image_size, c.patch_size, c.pooling) for c in (own, large)]
    if shapes[0] != shapes[1]:
        raise InputError(f"--method {method} takes images as the ancestry does: --image-size "
                         f"{large.image_size} --patch {large.patch_size} --pooling {large.pooling}")
    if method == "finetune" and replace(own, num_classes=large.num_classes) != large:
        raise InputError(f"--method finetune takes the ancestry's own size: --size "
                         f"{large.width}x{large.heads} --depth {large.depth}")
    if own.depth > large.depth or own.width > large.width:
        raise InputError(f"--method selection takes at most the ancestry's {large.depth} layers of "
                         f"width {large.width}; say a smaller --size or --depth")
    state = ancestry.encoder.state_dict()
    if ancestry.mean is not None:
        known = ancestry.mean.flatten().tolist(), ancestry.std.flatten().tolist()
        state = common.renormalised(state, known, (task.mean, task.std))
    if method == "finetune":
        net.load_state_dict(state, strict=False)
    else:
        common.weight_selection(net, state)


def training_steps(task, args, machine):
    """Steps of further training: from --train-epochs, or from --train-images."""
    images = args.train_epochs * len(task.labels["train"])
    if args.train_images == "tune":
        names = split(args.tune_tasks)
        if task.name not in names:
            raise InputError(f"--train-images tune: {task.name} is not among the tuned tasks; give "
                             "a number")
        tasks = data.load_tasks(names, args, machine)
        counts = [len(tasks[name].labels["train"]) for name in names]
        weights = sampling_weights(counts, args.task_temperature).tolist()
        images = args.tune_epochs * sum(counts) * weights[names.index(task.name)]
    elif args.train_images:
        images = int(args.train_images)
    return math.ceil(images / args.batch_size)


def train_on(run, args, stage, net, task, steps, source):
    """Trains a network on a task, in place. source: the TAL or Ancestry it came from, or None."""
    machine = run.machine
    start = getattr(source, "hypernet", source)
    job = start_training(
        run, args, stage, net, parameter_groups(net, args.train_lr, args.weight_decay), steps,
        {**identity(args, "data", "network", "training", "customize"), **content([task]),
         "method": args.method, "start": fingerprint(start) if start else None})
    for step in job.steps():
        x, y = task.batch(
            "train", step, args.batch_size, args.seed, args.recipe, machine.rank, machine.world)
        for x, y in job.parts(x, y):
            with machine.autocast():
                logits = net(task.normalise(x))
            job.update(loss_cls(y, logits.float()))


# --------------------------------------------------------------------------------------------------
# Stage customize: a network to take away
# --------------------------------------------------------------------------------------------------

def customize_stage(run, args):
    """Writes an initialised network of any size for a task or a folder of images, and its card."""
    config = asked_architecture(args)
    (task,) = data.load_tasks(split(args.data), args, run.machine).values()
    model = obtain(run, args, "tune") if run["tune"].exists() else make_small(run, args)
    torch.manual_seed(args.seed)                             # of a head that is not predicted
    net = model.customize(config, task)
    chance = 100 / task.num_classes
    about = {
        "task": task.name, "content": task.fingerprint, "class_names": task.class_names,
        "method": args.method, "seed": args.seed,
        "hypernet": hashlib.sha256(run["tune"].read_bytes()).hexdigest(),
        "chance": chance, "untrained": accuracy(net, task, "val", model.device),
        "epochs": args.train_epochs,
    }
    if task.mean:                                            # of images
        about |= {"mean": task.mean, "std": task.std}
    count = sum(p.numel() for p in net.parameters())
    held_out = len(task.labels["val"])
    run.print(f"{args.depth} layers, width {config.width}, {count:,} parameters, "
              f"{task.num_classes} classes: {about['untrained']:.2f} % untrained on {held_out} val "
              f"examples, chance {chance:.2f} %")
    if args.train_epochs:
        steps = math.ceil(args.train_epochs * len(task.labels["train"]) / args.batch_size)
        stage = f"customize-{file_name(task.name)}-{config.depth}x{config.width}"
        train_on(run, args, stage, net, task, steps, model)
        about["trained"] = accuracy(net, task, "val", model.device)
        run.print(f"{about['trained']:.2f} % after {args.train_epochs:g} epochs")
    if run.machine.rank == 0 and args.modality == "text":
        common.export_gpt2(net, args.export, about)
    elif run.machine.rank == 0:
        common.export_weights(net.state_dict(), net.config, args.export, args.format, about)
    run.print(f"wrote {args.export} for {args.format}, and beside it what it is")


def check_customize(args):
    """One sentence where customize could not write what it is asked for."""
    if not args.export:
        raise InputError("--stage customize writes a file; say --export FILE")
    if (args.modality == "text") != (args.format == "transformers"):
        raise InputError("--format transformers is for --modality text, the others are for image")
    common.check_export(args.export, args.format, args.pooling)
    if len(split(args.data)) != 1:
        raise InputError("--stage customize takes one task: --data NAME, or --data FOLDER with one "
                         "sub-folder of images per class")


def make_small(run, args):
    """The TAL that customize needs where there is none, at a size that a CPU can train."""
    if args.preset != "drawn":
        raise InputError(f"there is no tuned TAL in {args.output}; make one by the same flags and "
                         "--stage tune, or a small one by --preset drawn")
    small = args if args.image_size <= 64 else args.replace(image_size=32, patch=8)
    run.print(f"there is no tuned TAL in {args.output}, so one is made there now, once, for drawn "
              f"{args.modality}s: an ancestry, training on {len(split(args.tune_tasks))} tasks; "
              "some ten minutes on a CPU. Real data want one tuned under --preset paper")
    return obtain(Run(args.output, vars(small), run.machine), small, "tune")


# --------------------------------------------------------------------------------------------------
# Fig. 3, and the course of the training
# --------------------------------------------------------------------------------------------------

def silhouette_score(points):
    """Mean silhouette of clusters (K, n, d): (b - a) / max(a, b).

    a: a point's mean distance to the others of its cluster; b: the least mean distance to another
    cluster. 1: far apart, 0: no clusters.
    """
    K, n, _ = points.shape
    flat = points.flatten(0, 1)
    own = torch.arange(K).repeat_interleave(n)
    distance = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    to_cluster = distance.view(K * n, K, n).sum(-1)
    a = to_cluster[torch.arange(K * n), own] / (n - 1)
    b = (to_cluster / n).scatter(1, own[:, None], math.inf).amin(1)
    return float(((b - a) / torch.maximum(a, b)).mean())


@torch.no_grad()
def task_specific_graphs(model, configs):
    """f_tau^G averaged over its nodes: (tasks, networks, width)."""
    points = []
    for I in model.embeddings.values():
        for config in configs:
            _, graph = encoded(config, model.device)
            points.append(model.hypernet.learngene(graph, I).mean(0))
    return torch.stack(points).view(len(model.embeddings), len(configs), -1).cpu()


def plot(run, args):
    """Fig. 3: the task-specific graphs in their first two principal components; and the accuracy of
    an untrained network over the training."""
    if not uses_task_info(args):
        raise InputError("Fig. 3 shows task-specific graphs, which take task information")
    model = obtain(run, args, "tune")
    sizes = table_sizes(args, depths=range(3, 13))
    sizes = {name: config for name, config in sizes.items() if name.endswith("Small")}
    points = task_specific_graphs(model, sizes.values())
    points = points - points.mean((0, 1))
    axes = torch.linalg.svd(points.flatten(0, 1), full_matrices=False).Vh[:2]
    xy = points @ axes.T                                     # (tasks, networks, 2)
    within = (xy - xy.mean(1, keepdim=True)).pow(2).sum() / xy.pow(2).sum()
    silhouette = {"plane": silhouette_score(xy), "full": silhouette_score(points)}
    run.print(f"Fig. 3: {100 * (1 - within):.1f} % of the variance in the plane lies between "
              f"tasks; silhouette {silhouette['plane']:.2f}, in all {points.shape[-1]} dimensions "
              f"{silhouette['full']:.2f}")
    save_json(run, "figure3.json", {
        "tasks": list(model.embeddings), "networks": list(sizes), "xy": xy.tolist(),
        "between": float(1 - within), "silhouette": silhouette})
    if run.machine.rank == 0:
        draw(run, list(model.embeddings), xy, [6 * config.depth for config in sizes.values()])


def draw(run, tasks, xy, areas):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        run.print("wrote figure3.json; for the pictures, pip install matplotlib")
        return
    figure = Figure()
    axes = figure.subplots()
    for task, points in zip(tasks, xy):
        axes.scatter(points[:, 0], points[:, 1], areas, label=task, alpha=0.7)
    axes.set_title("Task-specific graphs; larger points are deeper networks")
    axes.legend(fontsize=7)
    figure.savefig(run.dir / "figure3.png", dpi=150)
    figure = Figure()
    axes = figure.subplots()
    for first, stage in ((1, "pretrain"), (11, "tune")):
        for task in tasks:
            values = run.values(stage, f"val {task}")
            axes.plot(range(first, first + len(values)), values, label=task)
    axes.set_xlabel("tenths of the tuning, after ten of the pretraining")
    axes.set_ylabel("accuracy of an untrained network on val")
    axes.legend(fontsize=7)
    figure.savefig(run.dir / "curve.png", dpi=150)
    run.print(f"wrote figure3.json, figure3.png and curve.png to {run.dir}")


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

def main(argv=None):
    args = settings(argv)
    if args.stage == "customize":
        check_customize(args)
    args = names_before_work(args)
    machine = common.setup_machine(
        args.device, args.amp, args.seed, args.threads, args.return_memory)
    run = Run(args.output, vars(args), machine)
    common.announce(run, args)
    if args.stage == "ancestry":
        obtain_ancestry(run, args)
    elif args.stage == "pretrain":
        evaluate(run, args, obtain(run, args, "pretrain"), [args.base_task])
    elif args.stage in ("tune", "evaluate"):
        model = obtain(run, args, "tune")
        evaluate(run, args, model, split(args.data) or split(args.tune_tasks))
    elif args.stage == "train":
        train(run, args)
    elif args.stage == "customize":
        customize_stage(run, args)
    else:
        plot(run, args)


if __name__ == "__main__":
    common.script(main)
