"""TAL, Task-Aware Learngene (Xu et al., ICML 2025): one hypernetwork that predicts the initial parameters of ViTs and
GPT-2s of any size for any task, trained under a pretrained "ancestry" model and tuned on many tasks at once.

    python tal.py --stage pretrain      # data, ancestry and hypernetwork from nothing: minutes on two cores
    python tal.py --stage tune          # ... and tuned on nine tasks; prints the accuracy of untrained networks
    python tal.py --stage customize --data my_images/ --depth 6 --output vit.pt
    python tal.py --modality text       # the same for GPT-2s and four tasks of text

The paper's claims that this file measures: Tables 1, 2, 6 (untrained), 3, 5 (trained on), 7, 8, 9 (ablations), Fig. 3.
D1, D2, ... mark decisions where paper and released code differ or are silent; README lists them.

    paper            here                 meaning
    f^G = (V, E)     Graph                computational graph; V nodes
    H_D(f^G; theta)  Hypernet.predict     graph (and task) -> parameters of the network
    I_tau            I           (t,)     task embedding
    gamma, beta      gamma, beta (h,)     Eqs. (2)-(3); the gamma of Sec. 5.1 is --predparam
    W^gamma, W^beta  W_gamma ... (h, t)   the task hypernet h
    E_train, E_anc   (B, d), (B, d')      features before the head of the trained network and of the ancestry
    M                M           (d, d')  predicted along with the network; the M of Eqs. (1) and (7) is --meta-batch
    w_tau, T         sampling_weights     Sec. 5.1's temperature is --task-temperature; Eq. (7)'s T counts tasks
"""
import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.func import functional_call

import data
from common import (GPT2_SIZES, VIT_SIZES, GPT2Config, Run, Training, ViTConfig, accuracy, amount, check_export, export_gpt2,
                    export_weights, fail, load_checkpoint, load_gpt2, load_pretrained, load_weights, network, parameter_groups, parse_flags,
                    positive, predictions, rank_zero_first, read_weights, renormalised, setup_machine, share, weight_selection, whole,
                    write_atomically, yes_no)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Model architecture datasets (described last in Sec. 4; first here, because all that follows reads architectures)
# ----------------------------------------------------------------------------------------------------------------------

def sample_architecture(dataset, rng):
    """(depth, width, heads) of one random ViT. Ranges: the generators released with LoGAH (ViTs-1K) and TAL (ViTs+-1K)."""
    if dataset == "ViTs-1K":            # at most 10M parameters
        depth = rng.randint(3, 9)
        low, high = (128, 256) if depth > 5 else (256, 384) if depth > 3 else (384, 512)
        width = rng.randrange(low, high + 1, 32)
    elif dataset == "ViTs+-1K":         # wider and deeper, more large models
        depth, width = rng.randint(3, 12), rng.randrange(192, 769, 64)
    elif dataset == "drawn":            # the small counterpart: heads of 8 channels
        depth, width = rng.choice((2, 3, 3, 4, 4, 6)), rng.randrange(32, 57, 8)
        return depth, width, width // 8
    elif dataset == "drawn+":
        depth, width = rng.choice((2, 3, 4, 6, 8)), rng.randrange(32, 73, 8)
        return depth, width, width // 8
    elif dataset == "GPTs-1K":          # LoGAH's generator for GPT-2; 8 heads
        depth = rng.randint(3, 9)
        low, high = (72, 176) if depth > 5 else (128, 176) if depth > 3 else (176, 256)
        return depth, rng.randrange(low, high + 1, 8), 8
    elif dataset == "drawn-GPTs":
        depth, width = rng.choice((2, 3, 3, 4, 4, 6)), rng.randrange(32, 57, 8)
        return depth, width, width // 8
    else:
        fail(f"unknown architecture dataset {dataset!r}")
    heads = (3, 6, 12) if width % 12 == 0 else (3, 6) if width % 6 == 0 else (3,) if width % 3 == 0 else (4, 8)
    return depth, width, rng.choice(heads)


def architectures(dataset, shape, count=1000, seed=1):
    """The `count` architectures of a dataset, as configurations; the same list on every machine. shape: see input_shape."""
    rng = random.Random(seed)
    samples = [sample_architecture(dataset, rng) for _ in range(count)]
    return [configuration(shape, depth=depth, width=width, heads=heads) for depth, width, heads in samples]


def input_shape(args):
    """What all networks of a run share: image_size, patch_size and pool of ViTs, or vocab and context of GPT-2s."""
    if getattr(args, "modality", "image") == "text":
        return dict(vocab=args.vocab, context=args.context, num_classes=2)
    return dict(image_size=args.image_size, patch_size=args.patch, pool=args.pool)


def configuration(shape, **sizes):
    return (GPT2Config if "vocab" in shape else ViTConfig)(**shape, **sizes)


@functools.lru_cache(maxsize=None)
def skeleton(config):
    """The network of a configuration without storage: parameters on the meta device, to be replaced by predicted ones."""
    with torch.device("meta"):
        return network(config)


# ----------------------------------------------------------------------------------------------------------------------
# 3. Background: the computational graph
# ----------------------------------------------------------------------------------------------------------------------

# The vocabulary of GHN-2 and GHN-3, in the released order. A Linear counts as conv; activations and reshapes have no node.
OPS = ("max_pool", "avg_pool", "sep_conv", "dil_conv", "conv", "msa", "cse", "sum", "concat", "input", "bias", "bn", "ln",
       "pos_enc", "glob_avg")
MODULE_OPS = {nn.LayerNorm: "ln", nn.GroupNorm: "ln", nn.MultiheadAttention: "msa", nn.MaxPool2d: "max_pool",
              nn.AvgPool2d: "avg_pool", nn.AdaptiveAvgPool2d: "glob_avg", nn.BatchNorm1d: "bn", nn.BatchNorm2d: "bn",
              nn.Embedding: "pos_enc"}
CALL_OPS = {"add": "sum", "iadd": "sum", "add_": "sum", "cat": "concat", "concat": "concat", "mean": "glob_avg",
            "softmax": "msa", "scaled_dot_product_attention": "msa", "shifted_window_attention": "msa", "layer_norm": "ln",
            "group_norm": "ln", "batch_norm": "bn", "linear": "conv", "conv2d": "conv", "max_pool2d": "max_pool",
            "avg_pool2d": "avg_pool", "adaptive_avg_pool2d": "glob_avg"}
PARAMETRIC = ("conv", "sep_conv", "dil_conv", "ln", "bn", "pos_enc")      # these are their parameters' nodes
SIZE_ANCHORS = 16             # sizes 1, 2, 4, ... 32768
DEPTH_ANCHORS = 16            # relative depth 0, 1/15, ... 1
MAX_DEGREE = 8


def hat(x, anchors):
    """Linear interpolation weights of positions x (N,) in [0, anchors - 1] onto integer anchors: (N, anchors)."""
    return (1 - (x[:, None] - torch.arange(anchors)).abs()).clamp(min=0)


def hat_size(sizes):
    """Interpolation weights of sizes on a log2 scale; size 0 (nothing there) gives zeros."""
    sizes = torch.as_tensor(sizes, dtype=torch.float32)
    return hat(sizes.clamp(min=1).log2().clamp(max=SIZE_ANCHORS - 1), SIZE_ANCHORS) * (sizes > 0)[:, None]


class Graph:
    """f^G = (V, E): nodes are operations, or the parameters that an operation owns; edges follow the forward pass.

    ops: (V,) index into OPS            shapes: of parameters; (heads,) of attention; () of other nodes
    names: parameter name or None       edges: list of (from, to)
    distance: (V, V) length of the shortest directed path, -1 where there is none: the "virtual edges" of GHN-2
    """
    def __init__(self, ops, names, shapes, edges):
        self.names, self.shapes, self.edges = names, shapes, edges
        self.ops = torch.tensor([OPS.index(op) for op in ops])
        self.distance = shortest_paths(len(ops), edges)
        embedded = {j for i, j in edges if ops[i] == "pos_enc"}
        self.joins = {i for i, op in enumerate(ops) if op == "sum" and i not in embedded}    # ends of residual branches
        self.sums = len(self.joins)
        matrices = [i for i, s in enumerate(shapes) if len(s) > 1 and names[i]]
        self.head = matrices[-1]                        # the classifier: last matrix of the forward pass
        self.num_classes = shapes[self.head][0]
        following = [j for i, j in edges if i == self.head and names[j]]
        self.head_bias = following[0] if following else None

    def __len__(self):
        return len(self.names)

    @functools.cached_property
    def features(self):
        """What the embeddings read: shape (V, 4, SIZE_ANCHORS), degrees (V,) twice, depth (V, DEPTH_ANCHORS)."""
        sizes = torch.zeros(len(self), 4)
        for i, shape in enumerate(self.shapes):
            sizes[i, :len(shape)] = torch.tensor(shape, dtype=torch.float32)
        # D10: a class count belongs to the task, not to the architecture. Shown here, it would tell a network without
        # task information which task it serves; the released code shows it, in bins of 16.
        sizes[self.head, 0] = 0
        if self.head_bias is not None:
            sizes[self.head_bias, 0] = 0
        adjacent = self.distance == 1
        # D11: relative depth. An absolute one (released code) leaves deeper networks than the trained with untrained rows.
        depth = self.distance[0].clamp(min=0).float()
        return (torch.stack([hat_size(s) for s in sizes.T], 1), adjacent.sum(0).clamp(max=MAX_DEGREE),
                adjacent.sum(1).clamp(max=MAX_DEGREE), hat(depth / depth.max() * (DEPTH_ANCHORS - 1), DEPTH_ANCHORS))

    @functools.lru_cache(maxsize=None)
    def distance_index(self, limit):
        """(V, V) row of the distance table: 0 no path, 1 + d a path of d edges from i to j, 1 + limit + d one from j to i."""
        forward, backward = self.distance.clamp(max=limit), self.distance.T.clamp(max=limit)
        return torch.where(forward >= 0, 1 + forward, torch.where(backward > 0, 1 + limit + backward, 0))

    @functools.lru_cache(maxsize=None)
    def groups(self, num_classes=None, features=None):
        """Parameters grouped by shape and role, for a head of `num_classes` rows (default: the network's own).

        With `features`, the matrix M of Eq. (4) is one more parameter, (features, d): it stands where the classifier
        stands, so it is decoded from the node whose output the classifier reads.
        """
        before, after = {}, {}
        for i, j in self.edges:
            before.setdefault(j, i), after.setdefault(i, j)
        grouped = {}
        for i, name in enumerate(self.names):
            if name is None:
                continue
            shape, kind, head = self.shapes[i], OPS[self.ops[i]], i in (self.head, self.head_bias)
            if kind == "pos_enc" and i in before:
                kind = "token"                          # a table in which the input is looked up
            if head and num_classes:
                shape = (num_classes, *shape[1:])
            weight = self.shapes[before[i]] if kind == "bias" else shape
            parts = 3 if len(weight) == 2 and weight[0] == 3 * weight[1] and not head else 1
            following = after.get(i, i)
            following = after.get(following, following) if OPS[self.ops[following]] == "bias" else following
            residual = following in self.joins and len(shape) > 1
            grouped.setdefault((shape, kind, head, parts, residual), []).append(i)
        if features:
            grouped[(features, self.shapes[self.head][1]), "M", False, 1, False] = [before[self.head]]
        return tuple(Group([self.names[i] if key[1] != "M" else "M" for i in nodes],
                      torch.tensor(nodes, device=self.ops.device), *key) for key, nodes in grouped.items())

    def to(self, device):
        """The same graph with its tensors on `device`."""
        moved = Graph.__new__(Graph)
        moved.__dict__.update(self.__dict__, ops=self.ops.to(device), distance=self.distance.to(device),
                              features=tuple(f.to(device) for f in self.features))
        return moved


def shortest_paths(count, edges):
    """(V, V) lengths of shortest directed paths, -1 where none; nodes are numbered topologically, so one sweep is enough."""
    far = count + 1
    distance = np.full((count, count), far)
    np.fill_diagonal(distance, 0)
    for source, target in sorted(edges, key=lambda e: e[1]):
        column = distance[:, target]
        column[:] = (distance[:, source] + 1).clip(max=column)
    distance[distance >= far] = -1
    return torch.from_numpy(distance)


def encode_graph(net):
    """Graph of any module that torch.fx can trace; nothing is computed and no autograd graph is walked.

    Every parameter becomes a node: a module's weight, then its bias, chained in this order. Operations outside the
    vocabulary (activations, reshapes, dropout) are contracted. A parameter that the forward pass reads directly
    (class token, position embedding, layer scale) is a source node, "pos_enc".
    """
    ops, names, shapes, edges = ["input"], [None], [()], []
    params = dict(net.named_parameters(remove_duplicate=False))
    modules = dict(net.named_modules())
    made = {}                                  # parameter name -> node
    ends = {}                                  # fx node -> graph nodes that its value comes from

    def add(op, name=None, shape=(), before=()):
        ops.append(op), names.append(name), shapes.append(tuple(shape))
        edges.extend((b, len(ops) - 1) for b in sorted(set(before)))
        if name:
            made[name] = len(ops) - 1
        return [len(ops) - 1]

    def chain(op, owned, before):
        """Nodes of one operation and of the parameters it owns, in the order it uses them; returns its last node."""
        if op not in PARAMETRIC:                       # attention has a node of its own, after its input projections
            after = [n for n in owned if "out_proj" in n or ".proj." in n]
            before = chain("conv", [n for n in owned if n not in after], before)
            before = add(op, None, heads if op == "msa" else (), before)
            owned, op = after, "conv"
        for name in owned:
            if name not in made:
                kind = "bias" if name.endswith("bias") else op if params[name].ndim > 1 or op in ("ln", "bn") else "pos_enc"
                before = add(kind, name, params[name].shape, before)
        return before

    for node in fx.Tracer().trace(net).nodes:
        before = [e for source in node.all_input_nodes for e in ends.get(source, [])]
        owner = next((modules[path] for path in reversed(list(node.meta.get("nn_module_stack") or {}))
                      if hasattr(modules.get(path), "num_heads")), None)
        heads = (owner.num_heads,) if owner is not None else ()               # D12: invisible in the released graphs
        if node.op == "placeholder":
            ends[node] = [0] if not ends else []
        elif node.op == "get_attr":
            direct = node.target in params and not all(user.op == "call_function" and CALL_OPS.get(call_name(user))
                                                       in (*PARAMETRIC, "msa") for user in node.users)
            if direct and node.target not in made:
                add("pos_enc", node.target, params[node.target].shape)
            ends[node] = [made[node.target]] if direct else []
        elif node.op == "call_module":
            module = modules[node.target]
            owned = [f"{node.target}.{n}" for n, _ in module.named_parameters()]
            op = next((o for kind, o in MODULE_OPS.items() if isinstance(module, kind)), None)
            if op is None and owned:
                op = ("sep_conv" if getattr(module, "groups", 1) > 1 else
                      "dil_conv" if getattr(module, "dilation", (1,)) not in ((1,), (1, 1)) else "conv")
            ends[node] = chain(op, owned, before) if op else before
        elif node.op in ("call_function", "call_method"):
            if call_name(node) in ("getattr", "size", "dim", "ne"):       # a size, or where the padding is: no value that flows
                ends[node] = []
                continue
            op = CALL_OPS.get(call_name(node))
            owned = [s.target for s in node.all_input_nodes if s.op == "get_attr" and s.target in params
                     and s.target not in made]
            if op == "sum" and len(node.all_input_nodes) < 2:                      # adding a constant joins no branches
                op = None
            ends[node] = chain(op, owned, before) if op else before
    missing = [n for n in params if n not in made]
    if missing:
        fail(f"the forward pass of {type(net).__name__} does not use parameter {missing[0]}")
    return Graph(ops, names, shapes, edges)


def call_name(node):
    return node.target if isinstance(node.target, str) else node.target.__name__


# ----------------------------------------------------------------------------------------------------------------------
# 4. TAL model structure and components: the learngene (encoder)
# ----------------------------------------------------------------------------------------------------------------------

def task_hypernet(I, W_gamma, W_beta):
    """Eq. (2): (gamma, beta) = (W^gamma, W^beta) I_tau. I (t,) or (..., t); W (h, t) -> two (..., h)."""
    return F.linear(I, W_gamma), F.linear(I, W_beta)                                 # Eq. (2)


def task_specific_layer(f, gamma, beta):
    """Eq. (3): f_tau^G = gamma x f^G + beta. f (V, h), gamma and beta (h,): the same for all nodes."""
    return gamma * f + beta                                                          # Eq. (3)


class GraphLayer(nn.Module):
    """Graphormer layer (pre-norm) whose attention input passes the task-specific layer.

    D2: where in the layer the task-specific layer sits, the paper leaves to Fig. 2(d); the released code modulates the
    normalised input of the attention, and so do we.
    """
    def __init__(self, hid, heads, task_dim):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(hid)
        self.qkv = nn.Linear(hid, 3 * hid, bias=False)
        self.proj = nn.Linear(hid, hid)
        self.norm2 = nn.LayerNorm(hid)
        self.ff = nn.Sequential(nn.Linear(hid, 4 * hid), nn.GELU(), nn.Linear(4 * hid, hid))
        if task_dim:                         # zero: training starts from the network without task information
            self.W_gamma = nn.Parameter(torch.zeros(hid, task_dim))
            self.W_beta = nn.Parameter(torch.zeros(hid, task_dim))

    def forward(self, h, bias, I):                                                   # (V, hid), (heads, V, V), (t,)
        z = self.norm1(h)
        if I is not None:
            gamma, beta = task_hypernet(I, self.W_gamma, self.W_beta)
            z = task_specific_layer(z, 1 + gamma, beta)     # D1: gamma is counted from 1, as in the released code
        q, k, v = self.qkv(z).view(len(z), 3, self.heads, -1).permute(1, 2, 0, 3)    # 3 x (heads, V, hid/heads)
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        h = h + self.proj(z.transpose(0, 1).reshape(h.shape))
        return h + self.ff(self.norm2(h))


class Learngene(nn.Module):
    """The encoder: graph (and task embedding) -> features of its nodes (V, hid), the task-specific graph f_tau^G."""
    def __init__(self, hid, layers, heads, max_distance, task_dim):
        super().__init__()
        self.max_distance = max_distance
        self.op = nn.Embedding(len(OPS), hid)
        self.size = nn.Parameter(torch.randn(4, SIZE_ANCHORS, hid // 4) * 0.2)       # (out, in, kh, kw), concatenated
        self.degree_in = nn.Embedding(MAX_DEGREE + 1, hid)
        self.degree_out = nn.Embedding(MAX_DEGREE + 1, hid)
        self.depth = nn.Parameter(torch.randn(DEPTH_ANCHORS, hid) * 0.2)
        # one additive bias per head for: no path, paths to a node 0..max_distance long, paths from it 1..max_distance long
        self.distance = nn.Embedding(2 * max_distance + 2, heads)
        self.layers = nn.ModuleList(GraphLayer(hid, heads, task_dim) for _ in range(layers))
        self.norm = nn.LayerNorm(hid)
        for table in (self.degree_in, self.degree_out, self.distance):
            nn.init.normal_(table.weight, std=0.2)

    def forward(self, graph, I=None):
        size, degree_in, degree_out, depth = graph.features
        h = self.op(graph.ops) + torch.einsum("vfs,fsc->vfc", size, self.size).flatten(1)   # h^(1) = Embed(h^(0))
        h = h + self.degree_in(degree_in) + self.degree_out(degree_out) + depth @ self.depth
        bias = self.distance(graph.distance_index(self.max_distance)).permute(2, 0, 1)      # (heads, V, V)
        for layer in self.layers:
            h = layer(h, bias, I)
        return self.norm(h)                                                                 # (V, hid)


# ----------------------------------------------------------------------------------------------------------------------
# 4. TAL model structure and components: the decoders
# ----------------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(eq=False)
class Group:
    """Parameters of one shape and one role, decoded together."""
    names: list
    nodes: torch.Tensor       # (n,) of the graph
    shape: tuple              # of each parameter
    kind: str                 # operation of the nodes, or "M": decides the scale of what is decoded
    head: bool                # the first dimension counts classes
    parts: int                # 3 where queries, keys and values are stacked, else 1
    residual: bool            # the output ends a residual branch

    @property
    def core(self):
        """Shape without the dimensions of size 1 of embeddings, (1, T, D) or (C, 1, 1); kernels stay (out, in, kh, kw)."""
        return self.shape if len(self.shape) != 3 else tuple(n for n in self.shape if n > 1)


class LowRankDecoder(nn.Module):
    """LoGAH's decoder: W = A B^T with A (out * kh, r) and B (in * kw, r), each a learned basis of r columns times a code
    of r x r numbers that an MLP makes from the node's features. D16: a vector (bias, norm) has rank one: r numbers do.
    """
    def __init__(self, hid, rank, channels, kernels, classes, mlp, tokens=0):
        super().__init__()
        self.rank, self.channels, self.kernels, self.classes, self.tokens = rank, channels, kernels, classes, tokens
        self.mlp = nn.Sequential(nn.Linear(hid, mlp[0]), nn.ReLU(), nn.Linear(mlp[0], mlp[1]), nn.ReLU())
        self.code = nn.Linear(mlp[1], 2 * rank * rank)
        self.vector_code = nn.Linear(mlp[1], rank)
        # D5: separate bases for rows and columns. With a single one, row and column spaces of neighbouring layers align,
        # and attention starts saturated.
        # D6: classes are not channels: the head's rows have a part of the basis of their own, behind the channels'.
        # D20: nor are tokens; every token of the vocabulary has a row of its own, behind the classes'. In the released code
        # the token table repeats itself every 2,048 tokens.
        self.row_basis = nn.Parameter(torch.randn(channels * kernels + classes + tokens, rank))
        self.col_basis = nn.Parameter(torch.randn(channels * kernels, rank))
        self.vector_basis = nn.Parameter(torch.randn(channels * kernels + classes, rank))
        # Principled start (Chang et al. 2020): codes of standard deviation 1 / sqrt(r), so that A and B start near 1.
        nn.init.normal_(self.code.bias, std=rank ** -0.5)
        nn.init.zeros_(self.vector_code.bias)

    def index(self, group):
        """Rows of the bases that a group reads: (out * kh,), and (in * kw,) or None for a vector."""
        size, channels, (out, *rest) = self.channels * self.kernels, self.channels, group.core
        kh, kw = rest[1:] if len(rest) == 3 else (1, 1)
        if group.head:
            if out > self.classes:
                fail(f"the hypernetwork decodes at most {self.classes} classes, the task has {out}; raise --max-classes")
            return size + torch.arange(out), torch.arange(rest[0]) % size if rest else None
        if group.kind == "token":
            if out > self.tokens:
                fail(f"the hypernetwork knows {self.tokens} tokens, this vocabulary has {out}; give the --tokens it was trained with")
            return size + self.classes + torch.arange(out), torch.arange(rest[0]) % size
        # D7: queries, keys and values start at fixed rows, whatever the width. What is larger than the basis repeats it.
        rows = (torch.arange(group.parts)[:, None] * channels + torch.arange(out // group.parts)).flatten()
        rows = rows[:, None] + torch.arange(kh) * channels
        cols = (torch.arange(rest[0])[:, None] + torch.arange(kw) * channels).flatten() % size if rest else None
        return rows.flatten() % size, cols

    @torch.no_grad()
    def quiet_untrained_rows(self, groups):
        """D19: scales by 0.1 the basis rows that none of the groups reads, given those of all training architectures.

        A network wider than any of them then starts as the widest trained one with quiet channels beside it, which
        further training can wake, and not with channels of full-size noise.
        """
        read = {"row_basis": [], "col_basis": [], "vector_basis": []}
        for group in groups:
            rows, cols = self.index(group)
            read["vector_basis" if cols is None else "row_basis"].append(rows)
            read["col_basis"].extend([] if cols is None else [cols])
        for name, rows in read.items():
            basis = getattr(self, name)
            untrained = torch.ones(len(basis), dtype=torch.bool)
            untrained[torch.cat(rows)] = False
            basis[untrained.to(basis.device)] *= 0.1

    @functools.lru_cache(maxsize=None)
    def plan(self, groups):
        """Per graph, once: matrix and vector groups, and all basis rows they read, in one index per basis."""
        matrices = [g for g in groups if len(g.core) > 1]
        vectors = [g for g in groups if len(g.core) == 1]

        def gather(parts):
            return torch.cat([torch.arange(0), *parts]).to(self.row_basis.device), [len(p) for p in parts]

        index = [self.index(g) for g in matrices]
        return (matrices, vectors, gather([rows for rows, _ in index]), gather([cols for _, cols in index]),
                gather([self.index(g)[0] for g in vectors]), torch.cat([g.nodes for g in matrices]))

    def forward(self, h, groups):
        """Node features (V, hid) -> per group a tensor (n, *shape)."""
        matrices, vectors, rows, cols, vector_rows, nodes = self.plan(tuple(groups))
        z = self.mlp(h)
        codes = self.code(z[nodes]).view(-1, 2, self.rank, self.rank).split([len(g.nodes) for g in matrices])
        row_parts = self.row_basis[rows[0]].split(rows[1])
        col_parts = self.col_basis[cols[0]].split(cols[1])
        out = {}
        for g, C, U, V in zip(matrices, codes, row_parts, col_parts):
            A = (U * self.rank ** -0.5) @ C[:, 0]                                    # (n, out * kh, r)
            B = V @ C[:, 1]                                                          # (n, in * kw, r)
            out[g] = W = A @ B.transpose(1, 2)                                       # (n, out * kh, in * kw)
            if len(g.core) == 4:
                o, i, kh, kw = g.core
                out[g] = W.view(-1, o, kh, i, kw).transpose(2, 3)                    # (n, out, in, kh, kw)
        codes = self.vector_code(z)
        for g, U in zip(vectors, self.vector_basis[vector_rows[0]].split(vector_rows[1])):
            out[g] = codes[g.nodes] @ U.T                                            # (n, out)
        return [out[g] for g in groups]


class TiledDecoder(nn.Module):
    """GHN-3's decoder: an MLP makes one tile (t, t) per kernel position, repeated up to the parameter's shape."""
    def __init__(self, hid, tile, kernel, classes):
        super().__init__()
        self.tile, self.kernel, self.classes = tile, kernel, classes
        self.fc = nn.Linear(hid, 4 * hid * kernel * kernel)
        self.conv = nn.Sequential(nn.ReLU(), nn.Linear(4 * hid, 8 * hid), nn.ReLU(), nn.Linear(8 * hid, tile * tile))
        self.class_layer = nn.Linear(tile, classes)          # the head's rows, from the tile's

    def forward(self, h, groups):
        """Node features (V, hid) -> per group a tensor (n, *shape)."""
        k, t, tiles, out = self.kernel, self.tile, {}, []
        fc_weight, fc_bias = self.fc.weight.view(k * k, -1, h.shape[1]), self.fc.bias.view(k * k, -1)
        for kernel in {g.core[2:] for g in groups}:                      # all nodes of one kernel size together
            same = [g for g in groups if g.core[2:] == kernel]
            ys, xs = ((torch.arange(n, device=h.device) + (k - n) // 2) % k for n in kernel or (1, 1))   # centre, or repeat
            at = (ys[:, None] * k + xs).flatten()
            z = torch.einsum("nc,poc->npo", h[torch.cat([g.nodes for g in same])], fc_weight[at]) + fc_bias[at]
            z = self.conv(z).view(-1, len(at), t, t)                                             # (n, kh * kw, t, t)
            tiles.update(zip(same, z.split([len(g.nodes) for g in same])))
        for g in groups:
            tile, (rows, *rest) = tiles[g], g.core
            if g.head:                                                                           # (n, 1, classes, t)
                if rows > self.classes:
                    fail(f"the hypernetwork decodes at most {self.classes} classes, the task has {rows}; raise --max-classes")
                tile = self.class_layer(tile.relu().transpose(2, 3)).transpose(2, 3)
            if not rest:
                vector = tile[:, 0].mean(-1)
                out.append(vector.repeat(1, math.ceil(rows / vector.shape[1]))[:, :rows])
                continue
            W = tile.repeat(1, 1, math.ceil(rows / tile.shape[2]), math.ceil(rest[0] / t))[..., :rows, :rest[0]]
            out.append(W.permute(0, 2, 3, 1))                                                    # (n, out, in, kh * kw)
        return out


def normalise(W, group, how, sums):
    """Scales decoded tensors (n, *shape) to what a network expects at its start.

    The released code's rules: matrices times sqrt(2 / fan-in), norm weights 2 sigmoid(w / 2), biases tanh(0.2 w).
    D8: "rms" sets the root mean square of a matrix to sqrt(1 / fan-in), and divides the last matrix of a residual branch
    by the number of branches beyond 6, so that a deeper network takes smaller steps. Position embeddings and class
    tokens start at 0.2 of what is decoded; at full size they drown the patches and delay all learning.
    """
    if group.kind in ("ln", "bn"):
        return 2 * torch.sigmoid(W / 2)
    if group.kind == "bias":
        return torch.tanh(0.2 * W)
    if group.kind == "pos_enc":
        return 0.2 * W
    fan_in = 1 if group.kind == "token" else math.prod(group.shape[1:])             # a table is looked up, not multiplied
    if how == "fan-in":
        return W * (2 / fan_in) ** 0.5
    scale = (1 / fan_in) ** 0.5 * (6 / max(6, sums) if group.residual else 1)
    return W * (scale * torch.rsqrt(W.pow(2).mean(tuple(range(1, W.ndim)), keepdim=True) + 1e-8))


class Hypernet(nn.Module):
    """H_D(.; theta): learngene and decoder. `predict` is the whole method at use."""
    def __init__(self, hid, layers, heads, max_distance, task_dim, decoder, rank, channels, kernels, classes, mlp, norm, tokens=0):
        super().__init__()
        self.normalisation = norm
        self.learngene = Learngene(hid, layers, heads, max_distance, task_dim)
        self.decoder = (LowRankDecoder(hid, rank, channels, kernels, classes, mlp, tokens) if decoder == "low-rank" else
                        TiledDecoder(hid, hid, kernels, classes))

    def predict(self, graph, I=None, num_classes=None, features=None):
        """w_pred = H_D(f^G; theta): {parameter name: tensor} for every parameter of the graph.

        I: task embedding (t,), or None without task information. num_classes: rows of the class head (default: the
        network's own). features: width d' of the ancestry's features; adds "M", the (d', d) matrix of Eq. (4), transposed.
        """
        groups = graph.groups(num_classes, features)
        h = self.learngene(graph, I)                                                 # (V, hid)
        weights = {}
        for group, W in zip(groups, self.decoder(h, groups)):
            W = normalise(W.reshape(-1, *group.shape), group, self.normalisation, graph.sums)
            weights.update(zip(group.names, W.unbind(0)))
        return weights

    def groups(self, lr, lr_basis, weight_decay):
        """AdamW groups: what the node features are multiplied with at the two ends (bases and embeddings) may learn at a
        rate of its own."""
        def is_basis(name):
            return "basis" in name or any(f"learngene.{t}" in name for t in ("op", "size", "degree", "depth", "distance"))
        named = list(self.named_parameters())
        return [dict(params=[p for n, p in named if is_basis(n) == b], lr=rate, weight_decay=weight_decay)
                for b, rate in ((False, lr), (True, lr_basis))]


# ----------------------------------------------------------------------------------------------------------------------
# 4. Train TAL model on a large dataset
# ----------------------------------------------------------------------------------------------------------------------

def meta_batch_loss(losses):
    """Eq. (1): mean over the m architectures of a meta-batch; each loss is already the mean over the n images."""
    return torch.stack(list(losses)).mean()                                          # Eq. (1)


def loss_aux(E_train, E_anc, M, temperature=1.0):
    """Eq. (4): KL(softmax(E_train M) || softmax(E_anc)), mean over the batch. E_train (B, d), M (d, d'), E_anc (B, d').

    D3: the released code has the two sides exchanged, temperature 3, and divides by batch size times classes.
    """
    log_p = F.log_softmax(E_train @ M / temperature, -1)
    log_q = F.log_softmax(E_anc / temperature, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()                            # Eq. (4)


def loss_cls(y, logits):
    """Eq. (5): CE(y_c, f_train(x)). logits (B, C); y (B,) classes, or (B, C) probabilities (TAL+'s soft labels)."""
    return F.cross_entropy(logits, y)                                                # Eq. (5)


def tal_loss(aux, cls, alpha):
    """Eq. (6): L = alpha L_aux + (1 - alpha) L_cls."""
    return alpha * aux + (1 - alpha) * cls                                           # Eq. (6)


class TrainingModel(nn.Module):
    """f_train with both of its outputs from one pass: logits (B, C) and the encoder's features E_train (B, d)."""
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        E = self.net.encode(x)
        return self.net.head(E), E


class Ancestry(nn.Module):
    """The ancestry model: one encoder, ViT or GPT-2, with a head per task it was trained on.

    Pretrained ones come with the mean and std by which their images were normalised. They are shown each task's images that
    way, in the size they know, while the student sees the task's own normalisation.
    """
    def __init__(self, config, classes, mean=None, std=None):
        super().__init__()
        self.encoder = network(config)
        if isinstance(config, ViTConfig):
            self.encoder.head = nn.Identity()
        self.heads = nn.ModuleDict({task: nn.Linear(config.width, n) for task, n in classes.items()})
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, values and torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, x, task=None):             # (B, 3, H, W), normalised as data.Task does, or (B, T) -> E_anc (B, d')
        if x.ndim == 2:
            return self.encoder.encode(x)
        if self.mean is not None:
            white_is_1 = (x - task.shift) / (255 * task.scale)
            x = (white_is_1 - self.mean) / self.std
        size = self.encoder.config.image_size
        if x.shape[-1] != size:
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
        return self.encoder(x)


@functools.lru_cache(maxsize=None)
def encoded(config, device):
    """The training model of an architecture, without storage, and its graph."""
    net = skeleton(config)
    return TrainingModel(net), encode_graph(net).to(device)


def tal_step(hypernet, ancestry, config, task, x, y, I, args, machine):
    """One architecture on one batch: x (B, 3, H, W), y (B,), I (t,) or None -> three float32 numbers: the loss of Eq. (6)
    with the regularisation of predicted parameters, Eq. (5) and Eq. (4) (0 without ancestry)."""
    net, graph = encoded(config, machine.device)
    alpha = args.alpha if ancestry is not None else 0.0
    weights = hypernet.predict(graph, I, task.num_classes, args.ancestry_width if alpha else None)
    M = weights.pop("M").T if alpha else None
    norms = torch.stack(torch._foreach_norm(list(weights.values()))).sum()           # predicted-parameter regularisation
    with machine.autocast():
        logits, E_train = functional_call(net, {f"net.{n}": w for n, w in weights.items()}, (x,), strict=True)
        with torch.no_grad():
            E_anc = ancestry(x, task) if ancestry is not None else None
            known = args.method == "tal+" and E_anc is not None and task.name in ancestry.heads
            if known and ancestry.heads[task.name].out_features == task.num_classes:
                soft = ancestry.heads[task.name](E_anc).softmax(-1)                  # D9: half label, half ancestry
                y = (soft + F.one_hot(y, task.num_classes)) / 2
    cls = loss_cls(y, logits.float())
    aux = loss_aux(E_train.float(), E_anc.float(), M, args.temperature) if alpha else torch.zeros_like(cls)
    return tal_loss(aux, cls, alpha) + args.predparam * norms, cls, aux


def build_hypernet(args):
    """The hypernetwork of a method. LoGAH and GHN-3 are TAL without task information and without ancestry; GHN-3 also
    has its own decoder."""
    decoder = "tiled" if args.method == "ghn3" else "low-rank"
    return Hypernet(args.hid, args.layers, args.hyper_heads, args.max_distance, args.ancestry_width if args.task_info else 0,
                    decoder, args.rank, args.max_channels, args.max_kernel, args.max_classes, args.mlp, args.normalise,
                    getattr(args, "vocab", 0))


# ----------------------------------------------------------------------------------------------------------------------
# 4. Tuning TAL model under multi-task setting
# ----------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def task_embedding(ancestry, task, machine, limit=2000):
    """I_tau: mean ancestry feature (t,) of the first `limit` training images of a task; their classes are mixed.

    D4: brought to norm sqrt(t). The released embeddings have norms between 6 and 23, and an unseen task's falls outside.
    """
    x, _ = task.examples("train", limit)
    mean = torch.stack([ancestry(part.to(machine.device), task).sum(0) for part in x.split(500)]).sum(0) / len(x)
    return mean * (len(mean) ** 0.5 / mean.norm())


def sampling_weights(counts, temperature=2.0):
    """Sec. 5.1: w_tau = p_tau^(1/T), normalised, with p_tau the share of task tau in all training images."""
    p = torch.tensor(counts, dtype=torch.float64)
    w = (p / p.sum()) ** (1 / temperature)
    return w / w.sum()


def multi_task_loss(losses, w=None):
    """Eq. (7): 1 / (T M) sum_tau sum_a w_tau L. losses: T values, each Eq. (1)'s mean over the M architectures; w (T,).

    In training, tasks are drawn with probability w_tau (Sec. 5.1), so the losses of the drawn ones count equally.
    """
    losses = torch.stack(list(losses))
    return (losses if w is None else w * losses).mean()                              # Eq. (7)


def task_schedule(weights, steps, tasks_per_step, seed):
    """Per step, a list of (task, how often it was drawn before): fixed by the seed, so that a run can resume anywhere."""
    rng, visits = random.Random(f"{seed} tasks"), [0] * len(weights)
    schedule = []
    for _ in range(steps):
        drawn = rng.choices(range(len(weights)), weights.tolist(), k=tasks_per_step)
        schedule.append([(task, visits[task] + drawn[:i].count(task)) for i, task in enumerate(drawn)])
        for task in drawn:
            visits[task] += 1
    return schedule


def train_hypernet(run, stage, args, machine, hypernet, ancestry, tasks, embeddings, epochs):
    """The training loop of both stages. One task: Eq. (1). Many: Eq. (7), w_tau being the probability to draw the task.

    Step k draws its tasks, architectures and images from (seed, k) alone.
    """
    archs = architectures(args.archs, input_shape(args))
    counts = [len(task.labels["train"]) for task in tasks]
    steps = math.ceil(epochs * sum(counts) / (args.batch_size * args.tasks_per_step))
    schedule = task_schedule(sampling_weights(counts, args.task_temperature), steps, args.tasks_per_step, args.seed)
    # a run does not go on under another teacher
    teacher = ancestry and round(sum(float(p.double().abs().sum()) for p in ancestry.parameters()), 3)
    job = Training(run, stage, hypernet, hypernet.groups(args.lr, args.lr_basis, args.weight_decay), steps,
                   warmup=round(args.warmup * steps), clip=args.clip, identity={**identity(stage, args), "teacher": teacher},
                   extra={"embeddings": embeddings}, batch_size=args.batch_size * args.tasks_per_step,
                   save_every=args.save_every, log_every=args.log_every)
    for step in job.steps():
        rng = random.Random(f"{args.seed} {stage} {step} {machine.rank if args.arch_per_process else 0}")
        configs = rng.sample(archs, args.meta_batch)
        rows = []
        for task, visit in schedule[step]:
            task = tasks[task]
            x, y = task.batch("train", visit, args.batch_size, args.seed, args.augment and args.recipe, machine.rank, machine.world)
            I = embeddings[task.name] if embeddings else None
            rows.append([tal_step(hypernet, ancestry, config, task, x, y, I, args, machine) for config in configs])
        loss, cls, aux = (multi_task_loss(meta_batch_loss(values[i] for values in row) for row in rows) for i in range(3))
        job.update(loss, loss_cls=cls, loss_aux=aux)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Customize models across different tasks
# ----------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def customize(hypernet, config, I, num_classes):
    """A network of any size for a task, ready to use or to train on: its parameters are predicted, none is random.

    config: ViTConfig or GPT2Config, whose num_classes is ignored; I: task embedding (t,) or None. More classes than --max-classes end
    the program (exit code 2).
    """
    net = network(dataclasses.replace(config, num_classes=num_classes)).to(next(hypernet.parameters()).device)
    net.load_state_dict(hypernet.predict(encoded(config, next(hypernet.parameters()).device)[1], I, num_classes))
    return net


# ----------------------------------------------------------------------------------------------------------------------
# 5.1 Experimental setup: every setting, with its source
# ----------------------------------------------------------------------------------------------------------------------

STAGES = ["ancestry", "pretrain", "tune", "evaluate", "train", "customize", "plot"]
PREDICTED = ["tal", "tal+", "logah", "ghn3"]
METHODS = [*PREDICTED, "random", "selection", "finetune"]
PRESETS = ["drawn", "paper"]
CODE = "paper silent; authors' code"
REAL_TASKS = [f"decathlon/{domain}" for domain in data.DOMAINS if domain != "imagenet12"]


def two_sizes(text):
    if len(text.split(",")) != 2:
        raise argparse.ArgumentTypeError("two sizes, as in 128,256")
    return [positive(n) for n in text.split(",")]


def image_count(text):
    return text if text == "tune" else positive(text)


FLAGS = [   # name, type, (drawn, paper), help and source
    ("--modality", ["image", "text"], "image", "ViTs for images, or GPT-2s for text (Table 6); some defaults differ, -h shows those of the modality"),
    ("--stage", STAGES, "pretrain", "what to do; a stage makes the stages it needs first"),
    ("--method", METHODS, "tal", "tal+: wider architectures, soft labels; logah, ghn3: baselines; only for train: random, and from the "
     "ancestry selection (evenly spaced weights, Xu et al. 2024) and finetune (all but the head, in its own size)"),
    ("--data", str, "", "tasks, comma-separated: drawn ones, real datasets, folders of images; evaluate reports, train trains, customize "
     "serves them"),
    ("--data-dir", str, "data", "where real datasets lie, and drawn data is cached"),
    ("--output", str, "runs/tal", "directory of the run; for customize, the file to write: .pt, .pth or .safetensors"),
    ("--format", ["timm", "torchvision", "transformers"], "timm", "whose ViT (for text: transformers, its GPT-2) loads the file that customize writes"),
    ("--seed", whole, 0, "seed of the run; the data have their own, fixed"),
    ("--device", str, "auto", "cpu, cuda, cuda:1 ..."),
    ("--threads", whole, (1, 0), "CPU threads, 0 for all; the drawn networks are too small to gain from a second one"),
    ("--amp", ["auto", "none", "bf16", "fp16"], "auto", "mixed precision of the networks (Sec. 5.1); auto: bf16 on a GPU, none on a CPU"),
    ("--batch-size", positive, (64, 512), f"images per step, over all processes; {CODE}: 512"),
    ("--epochs", amount, 0.0, "epochs of the stage asked for; 0 takes the next four flags; customize: epochs to train on before writing"),
    ("--ancestry-epochs", amount, (5.0, 0.0), "epochs over the ancestry's tasks; the paper takes a pretrained ViT-Base"),
    ("--pretrain-epochs", amount, (4.0, 75.0), "Sec. 5.1"),
    ("--tune-epochs", amount, (6.0, 100.0), "Sec. 5.1"),
    ("--train-epochs", amount, (5.0, 100.0), "Tables 3 and 5"),
    ("--train-images", image_count, "", "images per task for train, instead of epochs; tune: as many as tuning shows of the task"),
    ("--base-task", str, (data.BASE, "imagenet"), "task to pretrain on (Sec. 5.1)"),
    ("--tune-tasks", str, (",".join(data.DECATHLON), ",".join(REAL_TASKS)), "tasks to tune on (Sec. 5.1); a single one is TAL-st of Table 7"),
    ("--lr", amount, (3e-4, 3e-4), "peak learning rate, cosine (Sec. 5.1)"),
    ("--lr-basis", amount, (3e-3, 3e-4), "the same for decoder bases and graph embeddings; paper: one rate"),
    ("--weight-decay", amount, 1e-2, "AdamW (Sec. 5.1)"),
    ("--warmup", share, (0.03, 0.05), f"share of the steps that warm up; {CODE}: 5 of 75 epochs"),
    ("--clip", amount, (1.0, 5.0), f"gradient norm; {CODE}: 5"),
    ("--predparam", amount, 3e-5, "gamma, weight of the norms of predicted parameters (Sec. 5.1)"),
    ("--alpha", share, (0.5, 0.2), f"weight of L_aux, Eq. (6); {CODE}: 0.2"),
    ("--temperature", amount, 1.0, "softmax temperature of Eq. (4); paper: none, authors' code: 3"),
    ("--task-temperature", amount, 2.0, "T of the task sampling (Sec. 5.1)"),
    ("--meta-batch", positive, 1, f"architectures per step, m of Eq. (1); {CODE}: 1"),
    ("--tasks-per-step", positive, 1, f"tasks per step while tuning; {CODE}: 1"),
    ("--arch-per-process", bool, False, "under torchrun, every process draws its own architectures"),
    ("--archs", ["ViTs-1K", "ViTs+-1K", "drawn", "drawn+", "GPTs-1K", "drawn-GPTs"], ("drawn", "ViTs-1K"), "architecture dataset; tal+ takes the + one (Sec. 4)"),
    ("--no-task-info", bool, False, "ablation TAL (w/o T.I.), Table 8"),
    ("--no-ancestry", bool, False, "ablation TAL (w/o ans-net), Table 8: no Eq. (4); the task embeddings stay"),
    ("--tune-alpha", share, (0.5, 0.0), "alpha while tuning; Eq. (7): \"typically the cross-entropy\", authors' code: 0"),
    ("--hid", positive, (64, 128), f"width of the learngene; {CODE}: 128"),
    ("--layers", positive, (3, 5), f"its layers; {CODE}: 5"),
    ("--hyper-heads", positive, (8, 16), f"its attention heads; {CODE}: 16"),
    ("--max-distance", positive, (12, 50), f"longest path that its attention tells apart; {CODE}: 50"),
    ("--rank", positive, (64, 90), f"r of the low-rank decoder; {CODE}: 90"),
    ("--mlp", two_sizes, ([128, 256], [512, 1024]), f"hidden sizes of the decoder's MLP; {CODE}: 4 and 8 times 128"),
    ("--max-channels", positive, (256, 2048), f"channels with basis rows of their own; {CODE}: 2048"),
    ("--max-kernel", positive, (8, 16), f"kernel positions, likewise; {CODE}: 16"),
    ("--max-classes", positive, (128, 2048), "rows of the class head; Omniglot has 1623"),
    ("--normalise", ["fan-in", "rms"], ("rms", "fan-in"), f"scale of predicted matrices; {CODE}: fan-in"),
    ("--context", positive, (64, 1024), "tokens of a text at most; GPT-2: 1,024"),
    ("--tokens", str, "", "folder with GPT-2's vocab.json and merges.txt; without it tokens are bytes"),
    ("--image-size", positive, (32, 224), "pixels"),
    ("--patch", positive, (8, 16), "pixels"),
    ("--pool", ["token", "avg"], ("avg", "token"), "class token (ViT), or mean of the patches"),
    ("--augment", yes_no, True, "yes or no: training images are varied at random"),
    ("--recipe", ["shift", "decathlon"], ("shift", "decathlon"), f"how they are varied; {CODE}: crops, flips, colours, noise"),
    ("--ancestry", str, "", "checkpoint of this code, or pretrained ViT of timm, DeiT, torchvision or Hugging Face (default: ancestry.pt in "
     "--output, made when missing)"),
    ("--source", ["tune", "pretrain"], "tune", "hypernetwork that train predicts from; LoGAH in Table 5: pretrain"),
    ("--tal-dir", str, "runs/tal", "run directory whose TAL customize uses"),
    ("--ancestry-width", positive, (64, 768), "t of Eq. (2), d' of Eq. (4); paper: ViT-Base"),
    ("--ancestry-depth", positive, (4, 12), "paper: ViT-Base"),
    ("--ancestry-heads", positive, (8, 12), "paper: ViT-Base"),
    ("--ancestry-lr", amount, (2e-3, 1e-3), "peak learning rate of the drawn ancestry"),
    ("--size", [*VIT_SIZES, *GPT2_SIZES], ("drawn-small", "small"), "named width and heads, for train and customize"),
    ("--depth", positive, (3, 12), "layers, for train and customize"),
    ("--width", whole, 0, "overrides --size"),
    ("--heads", whole, 0, "overrides --size"),
    ("--split", ["val", "test"], "test", "split that evaluate and train report; settings were chosen on val"),
    ("--train-lr", amount, (2e-3, 1e-3), "peak learning rate of further training"),
    ("--fresh-head", bool, False, "train: replace the predicted head by a random one (always for tasks that --source was not trained on)"),
    ("--workers", positive, 2, "threads that draw, processes that read folders"),
    ("--save-every", positive, (250, 300), f"steps between checkpoints, a multiple of --log-every; {CODE}: 300"),
    ("--log-every", positive, 50, "steps between log lines"),
]

TEXT = {    # the defaults that differ under --modality text, (drawn, paper)
    "--stage": "tune",
    "--format": "transformers",
    "--output": "runs/tal-text",
    "--tal-dir": "runs/tal-text",
    "--batch-size": (64, 32),                   # paper silent
    "--ancestry-epochs": (8.0, 0.0),
    "--pretrain-epochs": (0.0, 0.0),            # Sec. 5.2 tells of one training
    "--tune-epochs": (6.0, 100.0),              # Sec. 5.2; LoGAH there: 250, drawn 15
    "--tune-alpha": (0.9, 0.0),                 # chosen on val; paper: the ancestry gives task information
    "--base-task": "",
    "--tune-tasks": (",".join(data.GRAMMAR), "mrpc,cola,rte,imdb"),
    "--archs": ("drawn-GPTs", "GPTs-1K"),
    "--size": ("drawn-gpt2", "gpt2"),
}


def identity(stage, args):
    """What a checkpoint of the hypernetwork must agree on to be resumed: all that its training depends on."""
    keys = ["method", "seed", "task_info", "alpha", "batch_size", "lr", "lr_basis", "weight_decay", "warmup", "clip", "predparam",
            "temperature", "meta_batch", "arch_per_process", "archs", "base_task", "recipe", "hid", "layers", "hyper_heads", "max_distance",
            "rank", "mlp", "max_channels", "max_kernel", "max_classes", "normalise", "image_size", "patch", "pool", "augment", "ancestry_width", "amp"]
    if stage == "tune":
        keys += ["task_temperature", "tasks_per_step", "tune_tasks"]
    if args.modality == "text":
        keys += ["modality", "vocab", "context"]
    return {k: getattr(args, k) for k in keys}


def settings(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    text = "--modality=text" in argv or ["--modality", "text"] in [argv[i:i + 2] for i in range(len(argv))]
    rows = [(name, kind, TEXT.get(name, values) if text else values, help) for name, kind, values, help in FLAGS]
    args = parse_flags(__doc__.strip(), rows, PRESETS, argv)
    args.vocab = data.Tokenizer(args.tokens or None).size if text else 0
    if args.method == "tal+" and not args.archs.endswith(("+", "+-1K")):
        args.archs = {"drawn": "drawn+", "ViTs-1K": "ViTs+-1K"}[args.archs]
    args.task_info = args.method in ("tal", "tal+") and not args.no_task_info
    if args.method not in ("tal", "tal+") or args.no_ancestry:
        args.alpha = args.tune_alpha = 0.0
    if text and (args.stage in ("pretrain", "plot") or args.method not in ("tal", "logah", "random") or args.source == "pretrain"):
        fail("--modality text has the stages ancestry, tune, evaluate, train and customize, and the methods tal, logah and random")
    if args.method not in PREDICTED and args.stage != "train":
        fail(f"--method {args.method} is for --stage train; the other stages predict parameters")
    if args.epochs:
        if args.stage not in ("ancestry", "pretrain", "tune", "train", "customize") or args.train_images:
            fail("--epochs is for the stages ancestry, pretrain, tune, customize, and train without --train-images; say --tune-epochs or the "
                 "like")
        setattr(args, f"{args.stage}_epochs", args.epochs)
    if args.data and args.stage in ("ancestry", "pretrain"):
        fail(f"--stage {args.stage} has tasks of its own; --data is for tune, evaluate, train and customize")
    args.tasks = args.data.split(",") if args.data else []
    if args.hid % math.lcm(4, args.hyper_heads):
        fail(f"--hid {args.hid} must be a multiple of 4 (parts of the shape embedding) and of --hyper-heads {args.hyper_heads}")
    if args.meta_batch > 1000:
        fail("--meta-batch: a dataset holds 1000 architectures")
    if args.batch_size % int(os.environ.get("WORLD_SIZE", 1)):
        fail(f"--batch-size {args.batch_size} does not divide among {os.environ['WORLD_SIZE']} processes")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Stages
# ----------------------------------------------------------------------------------------------------------------------

def load_tasks(names, args, machine):
    if args.modality == "text":
        with rank_zero_first(machine):
            tasks = data.load_texts(list(names), args.data_dir, args.context, args.tokens)
        return {name: task.to(machine.device) for name, task in tasks.items()}
    memory = 0 if args.augment and args.recipe != "shift" else data.MEMORY          # recipes are work for processes of their own
    with rank_zero_first(machine):
        tasks = data.load_many(list(names), args.data_dir, args.image_size, workers=args.workers, memory=memory)
    for name, task in tasks.items():
        if task.segmentation:
            fail(f"{name} has a class for every pixel, but these networks give one to an image; choose another task")
    return {name: task.to(machine.device) for name, task in tasks.items()}


def train_ancestry(run, args, machine):
    """The ancestry of the drawn data (D15): one encoder, a head per task, one task per step as while tuning.

    For text it is a language model besides (D21): half of its loss is that of every next token.
    """
    text = args.modality == "text"
    tasks = list(load_tasks(data.GRAMMAR if text else [data.BASE, *data.DECATHLON], args, machine).values())
    counts, classes = [len(t.labels["train"]) for t in tasks], {t.name: t.num_classes for t in tasks}
    config = configuration(input_shape(args), width=args.ancestry_width, depth=args.ancestry_depth, heads=args.ancestry_heads)
    config = dataclasses.replace(config, num_classes=0) if text else config
    torch.manual_seed(args.seed)
    ancestry = Ancestry(config, classes).to(machine.device)
    steps = math.ceil(args.ancestry_epochs * sum(counts) / args.batch_size)
    schedule = task_schedule(sampling_weights(counts, args.task_temperature), steps, 1, args.seed)
    keys = ("seed", "batch_size", "ancestry_lr", "image_size", "patch", "pool", "ancestry_width", "ancestry_depth", "ancestry_heads",
            "weight_decay", "warmup", "clip", "augment", "task_temperature", "amp") + ("vocab", "context") * text
    job = Training(run, "ancestry", ancestry, parameter_groups(ancestry, args.ancestry_lr, args.weight_decay), steps,
                   warmup=round(args.warmup * steps), clip=args.clip, identity={k: getattr(args, k) for k in keys},
                   extra={"config": dataclasses.asdict(config), "classes": classes}, batch_size=args.batch_size,
                   save_every=args.save_every, log_every=args.log_every)
    for step in job.steps():
        ((task, visit),) = schedule[step]
        x, y = tasks[task].batch("train", visit, args.batch_size, args.seed, args.augment and args.recipe, machine.rank, machine.world)
        with machine.autocast():
            if text:
                tokens = ancestry.encoder.tokens(x)                                  # (B, T, d')
                E, following = ancestry.encoder.last(tokens, x), ancestry.encoder.language(tokens)
            else:
                E = ancestry(x)
            logits = ancestry.heads[tasks[task].name](E)
        loss = cls = loss_cls(y, logits.float())
        if text:
            loss = (cls + language_loss(x, following.float())) / 2
        job.update(loss, loss_cls=cls)
    scores = {t.name: accuracy(lambda x: ancestry.heads[t.name](ancestry(x)), t, "val", machine.device) for t in tasks}
    run.print("ancestry, accuracy on val: " + ", ".join(f"{n} {a:.1f}" for n, a in scores.items()))
    return ancestry


def language_loss(ids, logits):
    """Mean cross-entropy of every next token; ids (B, T) padded at the right, logits (B, T, vocab). Of the padding, which is the
    token that ends a text, the first counts."""
    wanted = ids[:, 1:]
    padding = logits.shape[-1] - 1
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted.masked_fill(ids[:, :-1] == padding, -100).flatten())


def pretrained_ancestry(path, args, run):
    """A ViT of any of the sources that load_pretrained knows; its width becomes --ancestry-width. Its head gives TAL+ soft labels
    for the task imagenet, as published heads of 1,000 classes are in the order of ImageNet's folders."""
    if args.modality == "text":
        net = load_gpt2(path, say=run.print)[0]
        if (net.config.vocab, net.config.context >= args.context) != (args.vocab, True):
            fail(f"{path} knows {net.config.vocab} tokens and texts of {net.config.context}, the data has {args.vocab} and {args.context}; say "
                 "--tokens FOLDER with its vocab.json and merges.txt, or a smaller --context")
        args.ancestry_width, ancestry = net.config.width, Ancestry(net.config, {})
        ancestry.encoder.load_state_dict(net.state_dict())
        return ancestry
    net, report = load_pretrained(path, image_size=args.image_size, say=run.print)
    args.ancestry_width = net.config.width
    classes = {"imagenet": net.config.num_classes} if report["head"] == "kept" else {}
    ancestry = Ancestry(net.config, classes, report["mean"], report["std"])
    ancestry.encoder.load_state_dict({n: p for n, p in net.state_dict().items() if not n.startswith("head.")})
    for head in ancestry.heads.values():
        head.load_state_dict(net.head.state_dict())
    return ancestry


def get_ancestry(args, run, machine):
    """The ancestry model, frozen: --ancestry, else the run's own, trained first where there is none or half of one."""
    path = Path(args.ancestry) if args.ancestry else run["ancestry"]
    if args.ancestry and not read_weights(path)[1]["own"]:
        return pretrained_ancestry(path, args, run).to(machine.device).eval().requires_grad_(False)
    saved = load_checkpoint(path, stage="ancestry") if args.ancestry or path.exists() else {"step": 0, "steps": 1}
    if saved["step"] < saved["steps"] or args.stage == "ancestry":
        if not args.ancestry_epochs or args.ancestry:
            fail("needs a finished ancestry model: give one by --ancestry FILE, or train one by --ancestry-epochs and no --ancestry")
        ancestry = train_ancestry(run, args, machine)
    else:
        text, config = args.modality == "text", saved["extra"]["config"]
        if text != ("vocab" in config):
            fail(f"the ancestry in {path} was not trained on {args.modality}; give another --ancestry")
        config = (GPT2Config if text else ViTConfig)(**config)
        if text and (config.vocab, config.context, config.width) != (args.vocab, args.context, args.ancestry_width):
            fail(f"the ancestry in {path} has {config.vocab} tokens, context {config.context} and width {config.width}; this run has "
                 f"{args.vocab}, --context {args.context} and --ancestry-width {args.ancestry_width}; say the same")
        size = config.image_size if not text and args.stage != "customize" else args.image_size    # which may ask for another
        if not text and (config.width, size) != (args.ancestry_width, args.image_size):
            fail(f"the ancestry in {path} has width {config.width} for {config.image_size} px; say --ancestry-width {config.width} "
                 f"--image-size {config.image_size}, or give another --ancestry")
        ancestry = Ancestry(config, saved["extra"]["classes"]).to(machine.device)
        load_weights(ancestry, saved["model"], path)
    return ancestry.eval().requires_grad_(False)


def get_hypernet(stage, args, run, machine, to_tune=False):
    """(hypernetwork, ancestry, {task: embedding}) after "pretrain" or "tune", made first as far as that is still to do.

    Later stages take a finished checkpoint as it is, of any length, sizes and architectures; tuning goes on from a
    finished pretraining of any length, but of the same settings.
    """
    if (to_tune or args.stage not in ("pretrain", "tune")) and run[stage].exists():
        text = args.modality == "text"
        expected = dict(method=args.method, task_info=args.task_info, modality="text" if text else None)
        if text or args.stage in ("evaluate", "plot"):
            expected |= {key: getattr(args, key) for key in (("vocab", "context") if text else ("image_size", "patch", "pool"))}
        saved = load_checkpoint(run[stage], stage=stage, **(identity(stage, args) if to_tune else expected))
        if saved["step"] == saved["steps"]:
            hypernet = build_hypernet(argparse.Namespace(**saved["config"])).to(machine.device)
            load_weights(hypernet, saved["model"], run[stage])
            args.archs, args.ancestry_width = saved["config"]["archs"], saved["config"]["ancestry_width"]
            args.trained = input_shape(argparse.Namespace(**saved["config"]))
            if not args.ancestry and not run["ancestry"].exists():
                args.ancestry = saved["config"]["ancestry"]
            embeddings = {n: I.to(machine.device) for n, I in saved["extra"]["embeddings"].items()}
            return hypernet, get_ancestry(args, run, machine) if args.task_info else None, embeddings
    ancestry = get_ancestry(args, run, machine) if args.alpha or args.tune_alpha or args.task_info else None
    if stage == "pretrain":
        torch.manual_seed(args.seed)
        hypernet, alpha, epochs, embeddings = build_hypernet(args).to(machine.device), args.alpha, args.pretrain_epochs, {}
        tasks = load_tasks([args.base_task], args, machine)
    else:
        if args.pretrain_epochs:
            hypernet = get_hypernet("pretrain", args, run, machine, to_tune=True)[0]
        else:                               # for text, Sec. 5.2 tells of one training only, on the tasks
            torch.manual_seed(args.seed)
            hypernet = build_hypernet(args).to(machine.device)
        tasks, alpha, epochs = load_tasks(args.tune_tasks.split(","), args, machine), args.tune_alpha, args.tune_epochs
        embeddings = {n: task_embedding(ancestry, t, machine) for n, t in tasks.items()} if args.task_info else {}
    teacher = ancestry if alpha or args.method == "tal+" and not args.no_ancestry else None
    args = argparse.Namespace(**{**vars(args), "alpha": alpha})
    train_hypernet(run, stage, args, machine, hypernet, teacher, list(tasks.values()), embeddings, epochs)
    return hypernet, ancestry, embeddings


def finished_hypernet(stage, args, run, machine):
    """get_hypernet's three, the hypernetwork made ready, in place, for sizes that it was not trained on (D19)."""
    hypernet, ancestry, embeddings = get_hypernet(stage, args, run, machine)
    if isinstance(hypernet.decoder, LowRankDecoder):
        shapes = {dataclasses.replace(c, depth=1) for c in architectures(args.archs, getattr(args, "trained", None) or input_shape(args))}
        hypernet.decoder.quiet_untrained_rows(group for config in shapes for group in
                                              encoded(config, machine.device)[1].groups(hypernet.decoder.classes))
    return hypernet, ancestry, embeddings


def embedding(task, args, ancestry, embeddings, machine):
    """I_tau of a task: the one it was tuned with, a new one for an unseen task, None without task information."""
    if not args.task_info or not embeddings:
        return None
    return embeddings[task.name] if task.name in embeddings else task_embedding(ancestry, task, machine)


def sizes(args, depths=(3, 6, 12)):
    """{name: configuration} of the evaluated sizes, or the drawn counterparts. Tables 1 and 2: {3, 6, 12}-Tiny, -Small, -Base; Table
    6: {3, 6, 9, 12}-GPT2."""
    drawn = "drawn-" if args.preset == "drawn" else ""
    if args.modality == "text":
        return {f"{depth}-GPT2": sized(args, drawn + "gpt2", depth) for depth in (3, 6, 9, 12)}
    return {f"{depth}-{size.title()}": sized(args, drawn + size, depth) for size in ("tiny", "small", "base") for depth in depths}


def sized(args, size, depth):
    width, heads = {**VIT_SIZES, **GPT2_SIZES}[size]
    return configuration(input_shape(args), depth=depth, width=width, heads=heads)


def asked_architecture(args):
    asked = {name: value for name, value in (("width", args.width), ("heads", args.heads)) if value}
    return dataclasses.replace(sized(args, args.size, args.depth), **asked)


def f1(predicted, y):
    """F1 of class 1 in percent; 0 where it is never predicted rightly."""
    right = int(((predicted == 1) & (y == 1)).sum())
    return 200 * right / max(1, int((predicted == 1).sum()) + int((y == 1).sum()))


def matthews(predicted, y):
    """Matthews correlation of two classes in percent, from -100 to 100; 0 for a constant prediction."""
    p, t = predicted.double(), y.double()
    covariance, variances = ((p - p.mean()) * (t - t.mean())).mean(), p.var(correction=0) * t.var(correction=0)
    return float(100 * covariance / variances.sqrt()) if variances > 0 else 0.0


def scores(task, predicted, y):
    """{column of the table: percent}: accuracy; with F1 for paraphrases, Matthews correlation for acceptability (Table 6)."""
    metric = getattr(task, "metric", "accuracy")
    if metric == "Matthews":
        return {task.name: matthews(predicted, y)}
    right = {task.name: 100 * int((predicted == y).sum()) / len(y)}
    return right | ({f"{task.name} F1": f1(predicted, y)} if metric == "accuracy/F1" else {})


def evaluate(run, args, machine, hypernet, ancestry, embeddings, tasks):
    """Accuracy of untrained networks with predicted parameters (Tables 1 and 2), printed and kept in a JSON file."""
    trained = {(c.width, c.depth) for c in architectures(args.archs, input_shape(args))}
    I = {n: embedding(t, args, ancestry, embeddings, machine) for n, t in tasks.items()}
    table = {}
    for name, config in sizes(args).items():
        name += "" if (config.width, config.depth) in trained else "*"
        table[name] = {}
        for n, t in tasks.items():
            net = customize(hypernet, config, I[n], t.num_classes)
            table[name] |= scores(t, *predictions(net, t, args.split, machine.device))
    if args.modality == "text":             # what a network that always says the most frequent class gets
        table["majority"] = {}
        for t in tasks.values():
            y = t.labels[args.split]
            table["majority"] |= scores(t, torch.full_like(y, int(t.labels["train"].bincount().argmax())), y)
    for row in table.values():
        row["average"] = sum(row[n] for n in tasks) / len(tasks)
    run.print(f"untrained accuracy in percent, {args.split} split, method {args.method}, seed {args.seed} (* a size never trained on)")
    wide = 16 if args.modality == "text" else 10
    run.print(" " * 10 + "".join(f"{c[:wide - 1]:>{wide}}" for c in row))
    for name, row in table.items():
        run.print(f"{name:10}" + "".join(f"{a:{wide}.2f}" for a in row.values()))
    if machine.rank == 0:
        write_atomically(run.dir / f"untrained-{args.stage}-{args.split}.json", lambda p: p.write_text(json.dumps(table, indent=1)))


def training_steps(task, args, machine):
    """Steps of further training: from --train-epochs, or from --train-images."""
    images = args.train_epochs * len(task.labels["train"])
    if args.train_images == "tune":
        counts = {n: len(t.labels["train"]) for n, t in load_tasks(args.tune_tasks.split(","), args, machine).items()}
        shares = dict(zip(counts, sampling_weights(list(counts.values()), args.task_temperature).tolist()))
        if task.name not in shares:
            fail(f"--train-images tune: {task.name} is not among the tuned tasks; give a number")
        images = args.tune_epochs * sum(counts.values()) * shares[task.name]
    elif args.train_images:
        images = args.train_images
    return math.ceil(images / args.batch_size)


def train_on(run, args, machine, stage, net, task, steps, config, **same):
    """Trains a network on a task, in place. A run goes on where its checkpoint stands, if that agrees on `same` and all settings."""
    keys = ("method", "seed", "batch_size", "train_lr", "source", "fresh_head", "task_info", "no_ancestry", "weight_decay", "warmup",
            "clip", "augment", "recipe", "amp")
    job = Training(run, stage, net, parameter_groups(net, args.train_lr, args.weight_decay), steps, warmup=round(args.warmup * steps),
                   clip=args.clip, identity={**{k: getattr(args, k) for k in keys}, **dataclasses.asdict(config), **same},
                   batch_size=args.batch_size, save_every=args.save_every, log_every=args.log_every)
    for step in job.steps():
        x, y = task.batch("train", step, args.batch_size, args.seed, args.augment and args.recipe, machine.rank, machine.world)
        with machine.autocast():
            logits = net(x)
        job.update(loss_cls(y, logits.float()))


def inherit(net, ancestry, task, method):
    """What a user does who has the ancestry but no TAL, in place: fine-tunes it where sizes match, all but the head, or trains
    a selection of its weights where it is larger (Xu et al. 2024)."""
    own, large = net.config, ancestry.encoder.config
    if method == "finetune" and dataclasses.replace(own, num_classes=large.num_classes) != large:
        fail(f"--method finetune takes the ancestry's own size: --width {large.width} --heads {large.heads} --depth {large.depth}")
    if own.depth > large.depth or own.width > large.width:
        fail(f"--method selection takes at most the ancestry's {large.depth} layers of width {large.width}")
    state = ancestry.encoder.state_dict()
    if ancestry.mean is not None:
        state = renormalised(state, (ancestry.mean.flatten().tolist(), ancestry.std.flatten().tolist()), (task.mean, task.std))
    if method == "finetune":
        net.load_state_dict(state, strict=False)
    else:
        weight_selection(net, state)


def train(run, args, machine):
    """Further training from predicted parameters (Tables 1, 3 and 5; Table 5's tasks are unseen), from random ones, or from the
    ancestry's."""
    config = asked_architecture(args)
    name = f"{config.depth}x{config.width}"
    predicted = args.method in PREDICTED
    with_head = args.tune_tasks.split(",") if args.source == "tune" else [args.base_task]     # a head is predicted for these
    if predicted:
        hypernet, ancestry, embeddings = finished_hypernet(args.source, args, run, machine)
    elif args.method != "random":
        ancestry = get_ancestry(args, run, machine)
    for task in load_tasks(args.tasks or data.DECATHLON, args, machine).values():
        torch.manual_seed(args.seed)
        net = network(dataclasses.replace(config, num_classes=task.num_classes)).to(machine.device)
        if predicted:
            head = {n: p for n, p in net.state_dict().items() if n.startswith(("head.", "score."))}
            net = customize(hypernet, config, embedding(task, args, ancestry, embeddings, machine), task.num_classes)
            if args.fresh_head or task.name not in with_head:
                net.load_state_dict(head, strict=False)
        elif args.method != "random":
            inherit(net, ancestry, task, args.method)
        score = lambda: scores(task, *predictions(net, task, args.split, machine.device))[task.name]
        before = score()
        steps = training_steps(task, args, machine)
        train_on(run, args, machine, f"train-{task.name.strip('/').replace('/', '_')}-{name}-{steps}", net, task, steps, config)
        after = score()
        images = args.train_images or steps * args.batch_size
        run.print(f"{name} on {task.name}, {args.method}: {before:.2f} untrained, {after:.2f} after {images} images ({args.split})")
        run.log("train", task=task.name, network=name, method=args.method, seed=args.seed, images=images, lr=args.train_lr,
                split=args.split, untrained=before, trained=after)


def small_settings(args):
    """Settings under which customize makes TAL where there is none: the drawn preset's, at a size that a CPU can train."""
    small = vars(args) if args.preset == "drawn" else {**vars(settings(["--method", args.method])), **{k: getattr(args, k) for k in (
        "stage", "data_dir", "device", "workers", "seed", "amp")}}
    return argparse.Namespace(**{**small, **({"image_size": 32, "patch": 8} if small["image_size"] > 64 else {})})


def customize_stage(args, machine):
    """Writes an initialised network of any size for a task or a folder of images, for timm, torchvision or transformers, and its card."""
    path, text = Path(args.output), args.modality == "text"
    if text != (args.format == "transformers"):
        fail(f"--modality {args.modality} writes for {'transformers' if text else 'timm or torchvision'}; say --format accordingly")
    check_export(path, args.format, args.pool)
    if len(args.tasks) != 1:
        fail("--stage customize takes one task: --data NAME, or --data FOLDER with one sub-folder of images per class")
    config = asked_architecture(args)
    run = Run(args.tal_dir, vars(args), machine)
    (task,) = load_tasks(args.tasks, args, machine).values()
    if not run["tune"].exists():
        if text and args.preset != "drawn":
            fail(f"there is no tuned TAL in {args.tal_dir}; make one by --modality text --preset paper --stage tune --output {args.tal_dir}")
        small = small_settings(args)
        run.print(f"there is no tuned TAL in {args.tal_dir}, so one is made there now, once, for drawn "
                  f"{'text' if text else f'images of {small.image_size} px'}: an ancestry, training on {small.tune_tasks.count(',') + 1} tasks; "
                  f"some ten minutes on a CPU. Networks for {'real text' if text else 'photographs'} want one tuned under --preset paper")
        get_hypernet("tune", small, Run(args.tal_dir, vars(small), machine), machine)
    hypernet, ancestry, embeddings = finished_hypernet("tune", args, run, machine)
    known = min(task.num_classes, hypernet.decoder.classes)
    net = customize(hypernet, config, embedding(task, args, ancestry, embeddings, machine), known)
    if known < task.num_classes:
        run.print(f"this TAL predicts heads of at most {known} classes; for {task.num_classes} the head starts at random")
        torch.manual_seed(args.seed)
        head = network(dataclasses.replace(config, num_classes=task.num_classes)).to(machine.device)
        head.load_state_dict({n: p for n, p in net.state_dict().items() if not n.startswith(("head.", "score."))}, strict=False)
        net = head
    about = {"task": task.name, "method": args.method, "hypernet": hashlib.sha256(run["tune"].read_bytes()).hexdigest(), "seed": args.seed,
             **({} if text else {"mean": task.mean, "std": task.std}), "class_names": task.class_names, "chance": 100 / task.num_classes,
             "untrained": accuracy(net, task, "val", machine.device), "epochs": args.epochs}
    run.print(f"{args.depth} layers, width {config.width}, {sum(p.numel() for p in net.parameters()):,} parameters, {task.num_classes} "
              f"classes: {about['untrained']:.2f} % untrained on val, chance {about['chance']:.2f} %")
    if args.epochs:
        steps, folder = math.ceil(args.epochs * len(task.labels["train"]) / args.batch_size), path.with_suffix("")
        train_on(Run(folder, vars(args), machine), args, machine, "customize", net, task, steps, net.config, of=task.name,
                 hypernet=about["hypernet"])
        about["trained"] = accuracy(net, task, "val", machine.device)
        run.print(f"{about['trained']:.2f} % on val after {args.epochs:g} epochs; log and checkpoint are in {folder}")
    if machine.rank == 0:
        if text:
            export_gpt2(net, path, about)
        else:
            export_weights(net.state_dict(), net.config, path, args.format, about)
    run.print(f"wrote {path} for {args.format}, and what it is to {path.with_suffix('.json')}")


def silhouette(points):
    """Mean silhouette of clusters (K, n, d): (b - a) / max(a, b), a a point's mean distance to the others of its cluster, b the
    least mean distance to another cluster. 1: far apart, 0: no clusters."""
    K, n, _ = points.shape
    flat, own = points.flatten(0, 1), torch.arange(K).repeat_interleave(n)
    far = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").view(K * n, K, n).sum(-1)      # to each cluster
    a = far[torch.arange(K * n), own] / (n - 1)
    b = (far / n).scatter(1, own[:, None], math.inf).amin(1)
    return float(((b - a) / torch.maximum(a, b)).mean())


def plot(run, args, machine):
    """Fig. 3: the learngene's task-specific graphs f_tau^G, averaged over nodes, in their first two principal components."""
    if not args.task_info:
        fail(f"Fig. 3 shows task-specific graphs; {args.method} without task information has none")
    hypernet, _, embeddings = finished_hypernet("tune", args, run, machine)
    nets = sizes(args, depths=range(3, 13))
    nets = {n: c for n, c in nets.items() if n.endswith("Small")}
    with torch.no_grad():
        points = torch.stack([hypernet.learngene(encoded(c, machine.device)[1], I).mean(0)
                              for I in embeddings.values() for c in nets.values()])
    points = (points - points.mean(0)).cpu()
    xy = points @ torch.linalg.svd(points, full_matrices=False).Vh[:2].T                       # (tasks * nets, 2)
    xy, full = (p.view(len(embeddings), len(nets), -1) for p in (xy, points))
    within = (xy - xy.mean(1, keepdim=True)).pow(2).sum() / xy.pow(2).sum()
    score = {"plane": silhouette(xy), "full": silhouette(full)}
    run.print(f"Fig. 3: {100 * (1 - within):.1f} % of the variance in the plane lies between tasks; silhouette {score['plane']:.2f}, in all "
              f"{points.shape[1]} dimensions {score['full']:.2f}")
    if machine.rank:
        return
    figure = {"tasks": list(embeddings), "networks": list(nets), "xy": xy.tolist(), "between": float(1 - within), "silhouette": score}
    write_atomically(run.dir / "figure3.json", lambda p: p.write_text(json.dumps(figure)))
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return run.print("wrote figure3.json; for the picture, pip install matplotlib")
    for name, part in zip(embeddings, xy):
        plt.scatter(part[:, 0], part[:, 1], s=[6 * c.depth for c in nets.values()], label=name, alpha=0.7)
    plt.legend(fontsize=7), plt.title("Task-specific graphs; larger points are deeper networks")
    plt.savefig(run.dir / "figure3.png", dpi=150)
    run.print(f"wrote {run.dir / 'figure3.png'}")


def main(argv=None):
    args = settings(argv)
    machine = setup_machine(args.device, args.amp, args.seed, args.threads)
    if args.stage == "customize":
        return customize_stage(args, machine)
    run = Run(args.output, vars(args), machine)
    run.print(f"preset {args.preset}: " + ", ".join(f"{k} {v}" for k, v in vars(args).items() if k not in ("preset", "tasks")))
    if args.stage == "ancestry":
        get_ancestry(args, run, machine)
    elif args.stage == "pretrain":
        evaluate(run, args, machine, *finished_hypernet("pretrain", args, run, machine), load_tasks([args.base_task], args, machine))
    elif args.stage in ("tune", "evaluate"):
        parts = finished_hypernet("tune", args, run, machine)
        evaluate(run, args, machine, *parts, load_tasks(args.tasks or args.tune_tasks.split(","), args, machine))
    elif args.stage == "train":
        train(run, args, machine)
    elif args.stage == "plot":
        plot(run, args, machine)


if __name__ == "__main__":
    main()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
