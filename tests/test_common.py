"""common.py: the ViT against three other computations of it; a run against what may happen to it."""
import json
import math
import os
import pickle
import platform
import signal
import subprocess
import sys
import types

import pytest
import torch
import torchvision
import torch.nn.functional as F
from torch import nn

import common
from common import (InputError, MAX_BAD_STEPS, Run, Settings, Training, ViT, ViTConfig, cosine_lr, identity,
                    load_checkpoint, load_weights, parameter_groups, parse_flags, save_checkpoint,
                    setup_machine, vit_config, write_atomically)
from conftest import (CPU, Foreign, assert_same_run, exit_codes, fork, log_of, refuses, same_state, snapshot,
                      weights_of)

# ------------------------------------------------------------------------------------------------------------
# Networks
# ------------------------------------------------------------------------------------------------------------


def vit(size, depth=12, **overrides):
    return ViT(vit_config(size, depth, **overrides))


@pytest.mark.parametrize("size, count", [("tiny", 5_717_416), ("small", 22_050_664), ("base", 86_567_656)])
def test_parameter_counts_are_those_of_deit(size, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in vit(size).parameters()) == count


def test_one_block_of_deit_small_by_hand():
    """Two LayerNorms 2 x 2D, qkv D x 3D + 3D, proj D^2 + D, MLP 2 x 4 D^2 + 4D + D; D = 384: 1,774,464."""
    with torch.device("meta"):
        block = vit("small").blocks[0]
    D = 384
    by_hand = 2 * 2 * D + 3 * D * D + 3 * D + D * D + D + 8 * D * D + 5 * D
    assert sum(p.numel() for p in block.parameters()) == by_hand == 1_774_464


def test_sizes_by_name_and_by_number():
    assert vit_config("small", 6) == vit_config("384x6", 6) == ViTConfig(width=384, depth=6, heads=6)
    with refuses("unknown size 'smal'; did you mean small"):
        vit_config("smal")
    with refuses("7 heads do not divide a width of 384"):
        vit_config("384x7")


def from_torchvision(state, depth):
    """torchvision's names -> timm's, by hand."""
    names = {"cls_token": "class_token", "patch_embed.proj": "conv_proj", "norm": "encoder.ln",
             "pos_embed": "encoder.pos_embedding", "head": "heads.head"}
    for i in range(depth):
        theirs = f"encoder.layers.encoder_layer_{i}"
        names |= {
            f"blocks.{i}.norm1": f"{theirs}.ln_1", f"blocks.{i}.norm2": f"{theirs}.ln_2",
            f"blocks.{i}.attn.qkv": f"{theirs}.self_attention.in_proj",
            f"blocks.{i}.attn.proj": f"{theirs}.self_attention.out_proj",
            f"blocks.{i}.mlp.fc1": f"{theirs}.mlp.0", f"blocks.{i}.mlp.fc2": f"{theirs}.mlp.3",
        }
    mine = {}
    for ours, theirs in names.items():
        for end in ("", ".weight", ".bias", "_weight", "_bias"):
            if theirs + end in state:
                mine[ours + end.replace("_", ".")] = state[theirs + end]
    assert len(mine) == len(state)
    return mine


def test_logits_equal_torchvisions():
    torch.manual_seed(0)
    theirs = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=4, hidden_dim=32, mlp_dim=128,
        num_classes=7).eval()
    for p in theirs.parameters():                            # its head starts at zero, which would hide all
        nn.init.normal_(p, std=0.1)
    ours = ViT(ViTConfig(32, 8, 32, 3, 4, 7))
    ours.load_state_dict(from_torchvision(theirs.state_dict(), 3), strict=True)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=0)


def test_vit_base_has_the_shapes_of_vit_b_16():
    with torch.device("meta"):
        ours, theirs = vit("base"), torchvision.models.vit_b_16()
        ours.load_state_dict(from_torchvision(theirs.state_dict(), 12), strict=True)


@pytest.mark.optional
@pytest.mark.parametrize("pooling", ["token", "avg"])
def test_names_and_logits_equal_timms(pooling):
    timm = pytest.importorskip("timm", reason="timm is not installed; torchvision's ViT is the oracle above")
    torch.manual_seed(0)
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=7, global_pool=pooling,
        class_token=pooling == "token").eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.1)
    ours = ViT(ViTConfig(32, 8, 32, 2, 4, 7, pooling=pooling))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=0)


def test_average_pooling_by_hand():
    """Every sum of a 1-layer ViT: patches by slicing, attention one head and one token at a time."""
    torch.manual_seed(0)
    net = ViT(ViTConfig(8, 4, 8, 1, 2, 3, pooling="avg")).double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    P = dict(net.named_parameters())
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)

    def norm(t, name):
        scaled = (t - t.mean()) / torch.sqrt(t.var(unbiased=False) + 1e-6)
        return scaled * P[f"{name}.weight"] + P[f"{name}.bias"]

    def linear(t, name):
        return P[f"{name}.weight"] @ t + P[f"{name}.bias"]

    def gelu(t):
        return t * 0.5 * (1 + torch.erf(t / math.sqrt(2)))

    tokens = []
    for i, (row, column) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        patch = x[0, :, row:row + 4, column:column + 4]
        sums = torch.stack([(kernel * patch).sum() for kernel in P["patch_embed.proj.weight"]])
        tokens.append(sums + P["patch_embed.proj.bias"] + P["pos_embed"][0, i])
    qkv = [linear(norm(t, "blocks.0.norm1"), "blocks.0.attn.qkv") for t in tokens]
    mixed = []
    for i in range(4):
        heads = []
        for h in range(2):
            q, k, v = ([t[part * 8 + h * 4:part * 8 + h * 4 + 4] for t in qkv] for part in range(3))
            weights = torch.stack([torch.exp(q[i] @ k[j] / math.sqrt(4)) for j in range(4)])
            weights = weights / weights.sum()
            heads.append(sum(weights[j] * v[j] for j in range(4)))
        mixed.append(tokens[i] + linear(torch.cat(heads), "blocks.0.attn.proj"))
    out = []
    for t in mixed:
        hidden = gelu(linear(norm(t, "blocks.0.norm2"), "blocks.0.mlp.fc1"))
        out.append(t + linear(hidden, "blocks.0.mlp.fc2"))
    expected = linear(norm(sum(out) / 4, "fc_norm"), "head")
    torch.testing.assert_close(net(x)[0], expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(net.head(net.encode(x))[0], expected, atol=1e-10, rtol=0)


def test_initial_weights_are_deits():
    """Standard deviation 0.02 for matrices and embeddings, zero biases, unit norms."""
    torch.manual_seed(0)
    for name, p in vit("drawn-base", 2, image_size=32, patch_size=4, num_classes=20).named_parameters():
        if p.ndim > 1:
            assert abs(p.mean()) < 0.01 and p.std().item() == pytest.approx(0.02, rel=0.25), name
        else:
            assert (p == (1 if "norm" in name and name.endswith("weight") else 0)).all(), name


@pytest.mark.parametrize("sizes, words", [
    (dict(width=50, heads=6), "6 heads do not divide a width of 50"),
    (dict(image_size=32, patch_size=7), "patches of 7 px do not tile an image of 32 px"),
    (dict(depth=0), "depth of at least 1"), (dict(num_classes=-1), "num classes of at least 1"),
    (dict(pooling="max"), "pooling")])
def test_impossible_sizes(sizes, words):
    with refuses(words):
        ViTConfig(**sizes)


# ------------------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------------------

def test_accuracy_counts_in_parts():
    """7 images in parts of 3; two of seven right, as normalising turns class 0 into 1 in all but two."""
    class Fixed:
        def examples(self, split, limit=None):
            return torch.eye(7)[:limit], torch.tensor([0, 1, 0, 0, 0, 0, 0])[:limit]

        def normalise(self, x):
            return 2 * x
    seen = []

    def forward(x):
        seen.append(x.max().item())
        return x
    assert common.accuracy(forward, Fixed(), "test", "cpu", batch_size=3) == pytest.approx(100 * 2 / 7)
    assert common.accuracy(forward, Fixed(), "test", "cpu", limit=2) == 100
    assert seen == [2.0] * 4                                 # the network sees normalised images


# ------------------------------------------------------------------------------------------------------------
# Training: the optimiser and its schedule
# ------------------------------------------------------------------------------------------------------------

def test_parameter_groups_follow_deit():
    """Decay for the patch projection, four matrices per block and the head; none for the rest."""
    net = vit("drawn-tiny", 2, image_size=32, patch_size=8, num_classes=5)
    name = {id(p): n for n, p in net.named_parameters()}
    groups = parameter_groups(net, 1e-3, 0.1)
    decayed, free = ({name[id(p)] for p in group["params"]} for group in groups)
    matrices = {"patch_embed.proj.weight", "head.weight"}
    for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        matrices |= {f"blocks.0.{part}.weight", f"blocks.1.{part}.weight"}
    assert decayed == matrices
    assert {"pos_embed", "cls_token", "norm.weight", "head.bias", "blocks.1.attn.qkv.bias"} <= free
    assert len(decayed) + len(free) == len(name)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_parameter_groups_leave_frozen_parameters_out():
    net = vit("drawn-tiny", 1, image_size=32, patch_size=8, num_classes=5)
    net.head.requires_grad_(False)
    listed = {id(p) for group in parameter_groups(net, 1e-3, 0.1) for p in group["params"]}
    assert not {id(net.head.weight), id(net.head.bias)} & listed and id(net.pos_embed) in listed


def test_cosine_at_its_corners():
    factors = [cosine_lr(step, steps=104, warmup=4) for step in range(105)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])       # equal steps, none is zero
    assert factors[54] == pytest.approx(0.5)                             # half-way down
    assert factors[4 + 25] == pytest.approx(0.5 + math.sqrt(0.5) / 2)    # cos(45 degrees)
    assert factors[104] == pytest.approx(0) == cosine_lr(1000, steps=104, warmup=4)
    assert cosine_lr(0, steps=10, warmup=0) == 1
    assert cosine_lr(5, steps=5, warmup=5) == pytest.approx(1)           # nothing after the warm-up


def test_cosine_is_what_torch_calls_cosine_annealing():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    for step in range(40):
        assert cosine_lr(step, 40, 0) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


# ------------------------------------------------------------------------------------------------------------
# Training: a whole stage, interrupted and in bad steps
# ------------------------------------------------------------------------------------------------------------

STEPS = 23                      # not a multiple of the steps between log lines, or between checkpoints


@pytest.fixture(autouse=True)
def lines_every_second_step(monkeypatch):
    monkeypatch.setattr(common, "LOG_EVERY", 2)


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def loss_at(net, step):
    """Regression; the batch of a step is made from its number."""
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
    return (net(x)[:, 0] - x.sum(1)).pow(2).mean()


def train_tiny(folder, stop_at=None, kill=False, poison=(), steps=STEPS, **changes):
    """A loop as the methods write it; a value "even" is logged in even steps alone.

    stop_at: an exception (or SIGKILL) between the forward pass and the update of that step; poison: steps
    whose loss is NaN.
    """
    common.LOG_EVERY = 2                                     # also in a process of its own
    net = two_layers()
    how = dict(warmup=3, clip=1.0, batch_size=16, save_every=4, identity={"seed": 0}) | changes
    job = Training(Run(folder, {}, CPU), "tiny", net, parameter_groups(net, 1e-2, 0.1), steps, **how)
    for step in job.steps():
        loss = loss_at(net, step)
        if step in poison:
            loss = loss * math.nan
        if step == stop_at and kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == stop_at:
            raise KeyboardInterrupt
        job.update(loss, error=loss.sqrt(), **({} if step % 2 else {"even": float(step)}))
    return net, job


def plainly_trained(steps, total, warmup):
    """The same steps written out without Training, scaler and groups: (network, losses)."""
    net = two_layers()
    optimizer = torch.optim.AdamW([
        {"params": [net[0].weight, net[2].weight], "weight_decay": 0.1},
        {"params": [net[0].bias, net[2].bias], "weight_decay": 0.0}], fused=False)
    losses = []
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * cosine_lr(step, total, warmup)
        loss = loss_at(net, step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return net, losses


def test_the_bookkeeping_is_adamw_with_clipping_and_cosine(tmp_path):
    net, _ = train_tiny(tmp_path)
    plain, losses = plainly_trained(range(STEPS), STEPS, warmup=3)
    for ours, theirs in zip(net.parameters(), plain.parameters()):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    log = log_of(tmp_path, "tiny")
    assert [r["step"] for r in log] == [*range(2, 23, 2), 23]            # every second, and the last
    assert [r["images"] for r in log] == [16 * r["step"] for r in log]
    means = [sum(losses[i:i + 2]) / len(losses[i:i + 2]) for i in range(0, 23, 2)]
    assert [r["loss"] for r in log] == pytest.approx(means, rel=1e-4)    # since the line before
    assert [r["even"] for r in log] == list(range(0, 23, 2))             # over the steps that have it


def test_speed_is_that_of_the_last_interval(tmp_path, monkeypatch):
    """A clock that moves 8 seconds before every line: 2 x 16 texts in them, 16 before the last."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(common.time, "perf_counter", lambda: clock.now)
    flush = Training.flush

    def slow(job):
        clock.now += 8
        return flush(job)
    monkeypatch.setattr(Training, "flush", slow)
    train_tiny(tmp_path, unit="texts")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["texts_per_s"] for r in lines] == [4.0] * 11 + [2.0]
    assert lines[-1]["texts"] == 23 * 16 and "images" not in lines[-1]


def test_start_training_takes_the_flags(tmp_path):
    args = Settings(dict(warmup=0.1, clip=0.5, batch_size=32, save_every=7, modality="text", accumulate=4))
    net = two_layers()
    run, groups = Run(tmp_path, {}, CPU), parameter_groups(net, 1e-2, 0.1)
    job = common.start_training(run, args, "tiny", net, groups, 50, {})
    assert (job.warmup, job.clip, job.batch_size, job.save_every, job.unit) == (5, 0.5, 32, 6, "texts")
    assert job.accumulate == 4


def classifier(folder, accumulate, y, stop_at=None):
    """Six steps on 10 examples, in parts; y: classes (10,), probabilities (10, 3) or pixels (10, 4, 4)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1))
    job = Training(Run(folder, {}, CPU), "tiny", net, parameter_groups(net, 1e-2, 0.1), 6, clip=0.05,
                   batch_size=10, save_every=2, accumulate=accumulate)
    for step in job.steps():
        images = torch.randn(10, 1, 4, 4, generator=torch.Generator().manual_seed(step))
        for x, part in job.parts(images, y):
            z = net(x)
            loss = F.cross_entropy(z if y.ndim > 2 else z.mean((2, 3)), part)
            if step == stop_at and job.last:
                raise KeyboardInterrupt
            job.update(loss, twice=2 * loss)
    return net, log_of(folder, "tiny")


@pytest.mark.parametrize("kind", ["classes", "soft", "pixels"])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(kind, tmp_path):
    """Three parts of 10 are 4, 4 and 2; labelled pixels are few in the first."""
    y = torch.arange(10) % 3
    if kind == "soft":
        y = torch.rand(10, 3, generator=torch.Generator().manual_seed(1)).softmax(-1)
    if kind == "pixels":
        y = torch.randint(3, (10, 4, 4), generator=torch.Generator().manual_seed(1))
        y[:4, 1:] = -100
    whole, log = classifier(tmp_path / "whole", 1, y)
    parts, its_log = classifier(tmp_path / "parts", 3, y)
    for a, b in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert [r["loss"] for r in its_log] == pytest.approx([r["loss"] for r in log], rel=1e-4)
    assert [r["twice"] for r in its_log] == pytest.approx([r["twice"] for r in log], rel=1e-4)
    with pytest.raises(KeyboardInterrupt):
        classifier(tmp_path / "stopped", 3, y, stop_at=3)
    classifier(tmp_path / "stopped", 3, y)
    assert_same_run(tmp_path / "stopped", tmp_path / "parts", "tiny")


@pytest.mark.parametrize("stops", [(0,), (3,), (4,), (5,), (22,), (1, 4, 4, 9, 17)])
def test_interrupted_and_started_again(stops, tmp_path):
    train_tiny(tmp_path / "whole")
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            train_tiny(tmp_path / "parts", stop_at=stop)
    train_tiny(tmp_path / "parts")
    assert_same_run(tmp_path / "parts", tmp_path / "whole", "tiny")


def test_killed_and_started_again(tmp_path):
    """SIGKILL leaves no chance to clean up: processes that kill themselves in steps 2, 7 and 18 of a run."""
    train_tiny(tmp_path / "whole")
    for stop in (2, 7, 18):
        process = fork(train_tiny, tmp_path / "parts", stop, True, log=tmp_path / "out")
        assert exit_codes([process]) == [-signal.SIGKILL], (tmp_path / "out").read_text()
    train_tiny(tmp_path / "parts")
    assert_same_run(tmp_path / "parts", tmp_path / "whole", "tiny")


def test_interruption_among_skipped_steps(tmp_path):
    """What was skipped before the interruption is still counted after it."""
    poison = {2, 3, 9}
    train_tiny(tmp_path / "whole", poison=poison)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path / "parts", poison=poison, stop_at=11)
    train_tiny(tmp_path / "parts", poison=poison)
    assert log_of(tmp_path / "whole", "tiny")[-1]["skipped"] == 3
    assert_same_run(tmp_path / "parts", tmp_path / "whole", "tiny")


def test_finished_stage_yields_no_steps(tmp_path):
    net, _ = train_tiny(tmp_path)
    before = snapshot(tmp_path)
    again, job = train_tiny(tmp_path, stop_at=0)             # would raise in its first step
    assert job.step == STEPS
    same_state(again.state_dict(), net.state_dict())
    assert snapshot(tmp_path) == before


def test_a_loop_that_forgets_update_is_told(tmp_path):
    net = nn.Linear(1, 1)
    job = Training(Run(tmp_path, {}, CPU), "tiny", net, parameter_groups(net, 1e-2, 0.1), 3)
    with pytest.raises(AssertionError, match="update"):
        for _ in job.steps():
            pass


@pytest.mark.parametrize("changes, words", [
    (dict(identity={"seed": 1}), "seed 0, but 1"), (dict(steps=24), "steps 23, but 24"),
    (dict(identity={"task": "birds", "content": "0123"}), "task None, but 'birds'")])
def test_checkpoint_of_another_run_is_not_resumed(changes, words, tmp_path):
    train_tiny(tmp_path)
    before = snapshot(tmp_path)
    with refuses(words):
        train_tiny(tmp_path, **changes)
    assert snapshot(tmp_path) == before


def test_a_checkpoint_of_other_data_is_not_resumed(tmp_path):
    """The same name, but what it stands for has changed."""
    train_tiny(tmp_path, identity={"task": "birds", "content": "0123"})
    with refuses("trained on other data than birds holds now; choose another --output"):
        train_tiny(tmp_path, identity={"task": "birds", "content": "4567"})


def test_nan_loss_is_skipped_and_counted(tmp_path):
    """A bad step changes neither weights nor momenta: at constant lr, 2 bad of 5 steps equal 3 steps."""
    def train(folder, poison, steps):
        torch.manual_seed(0)
        net = nn.Linear(3, 1)
        run = Run(folder, {}, CPU)
        job = Training(run, "tiny", net, parameter_groups(net, 1e-2, 0.0), 1000, save_every=1)
        weights = []
        for step in job.steps():
            loss = (net(torch.ones(2, 3)) - 1).pow(2).mean()
            job.update(loss * math.nan if step in poison else loss)
            weights.append([p.detach().clone() for p in net.parameters()])
            if len(weights) == steps:
                job.flush()
                return weights
    with_nan, without = train(tmp_path / "a", {1, 2}, 5), train(tmp_path / "b", set(), 3)
    assert all(torch.equal(a, b) for a, b in zip(with_nan[0], with_nan[2]))
    assert not any(torch.equal(a, b) for a, b in zip(with_nan[2], with_nan[3]))
    for a, b in zip(with_nan[4], without[2]):                # the cosine over 1000 steps is flat here
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert [r["skipped"] for r in log_of(tmp_path / "a", "tiny")] == [0, 1, 2, 2, 2]


def test_log_stays_json_and_means_leave_bad_steps_out(tmp_path):
    """Steps 4 and 5 are a whole log line without a finite loss, which has none; step 8 is half of one."""
    def not_json(constant):
        raise AssertionError(f"{constant} is not JSON")      # RFC 8259 knows no NaN
    train_tiny(tmp_path, poison={4, 5, 8})
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=not_json) for line in lines]
    assert [r["skipped"] for r in records][1:5] == [0, 2, 2, 3]
    assert ["loss" in r for r in records][1:5] == [True, False, True, True]
    assert "even" not in records[4] and math.isfinite(records[4]["loss"])


def test_too_many_bad_steps_stop_the_run(tmp_path):
    poison = set(range(8, 100))
    with refuses("not finite in the last 20 of 28 steps; the last good checkpoint is .*tiny.pt"):
        train_tiny(tmp_path, poison=poison, steps=100)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path / "until8", steps=100, stop_at=8)
    same_state(weights_of(tmp_path, "tiny"), weights_of(tmp_path / "until8", "tiny"))
    steps = [r["step"] for r in log_of(tmp_path, "tiny")]
    assert max(steps) < 8 + MAX_BAD_STEPS + 2                # at the first line after the 20th bad step


@pytest.mark.parametrize("poison", [set(range(23)), {22}, {20, 21, 22}])
def test_a_stage_does_not_end_in_bad_steps(poison, tmp_path):
    """Fewer than 20 in a row, but nothing good comes after them."""
    with refuses("tiny: the loss was not finite"):
        train_tiny(tmp_path, poison=poison, save_every=100)
    assert not (tmp_path / "tiny.pt").exists()


def test_fewer_bad_steps_in_a_row_do_not_stop_the_run(tmp_path):
    _, job = train_tiny(tmp_path, poison=set(range(2, 2 + MAX_BAD_STEPS - 1)) | {22}, steps=25)
    assert job.step == 25 and int(job.skipped) == MAX_BAD_STEPS


def test_many_skipped_steps_leave_later_steps_as_they_are(tmp_path):
    """Two of three steps are bad, 199 in all, never 20 in a row; the good ones still train."""
    poison = {step for step in range(298) if step % 3}
    net, job = train_tiny(tmp_path, poison=poison, steps=298, warmup=0)
    assert int(job.skipped) == len(poison) == 198
    plain, _ = plainly_trained(range(0, 298, 3), 298, warmup=0)
    for ours, theirs in zip(net.parameters(), plain.parameters()):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_average_gradients_is_the_mean_and_leaves_unused_parameters_alone(monkeypatch):
    """Two processes by hand: the other one holds gradient (3, 3); no process used the second parameter."""
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    a.grad = torch.tensor([1.0, 2.0])
    monkeypatch.setattr(common.dist, "all_reduce", lambda flat: flat.add_(torch.tensor([3.0, 3.0])))
    common.average_gradients([a, b], 2)
    assert a.grad.tolist() == [2.0, 2.5] and b.grad is None


# ------------------------------------------------------------------------------------------------------------
# Run: the log
# ------------------------------------------------------------------------------------------------------------

def records_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_rewind_log(tmp_path):
    run = Run(tmp_path, {"seed": 1}, CPU)
    assert not os.listdir(tmp_path)                          # nothing is written before all is in order
    run.start("tune", 5)                                     # no log yet: nothing to rewind
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1
    for stage, step in (("pretrain", 5), ("pretrain", 10), ("tune", 5), ("tune", 10), ("tune", 15)):
        run.log(stage, step=step, loss=0.5)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"stage": "tune", "step": 20, "lo')      # killed here
    run = Run(tmp_path, {}, CPU)
    run.start("tune", 10)
    run.log("tune", step=15, loss=0.25)
    found = [(r["stage"], r["step"]) for r in records_of(tmp_path)]
    assert found == [("pretrain", 5), ("pretrain", 10), ("tune", 5), ("tune", 10), ("tune", 15)]
    assert records_of(tmp_path)[-1]["loss"] == 0.25
    run.start("tune", 0)                                     # from the start: nothing of it stays
    assert [r["stage"] for r in records_of(tmp_path)] == ["pretrain"] * 2


@pytest.mark.parametrize("torn", ['{"stage": "a", "ste', "\x00\xff", "[1, 2]", '"stage"', "{}"])
def test_torn_lines_anywhere_are_dropped(torn, tmp_path):
    """A full disk may tear a line in the middle of a log; the next start goes on."""
    good = '{"stage": "a", "step": 1, "val": 0.5}\n'
    (tmp_path / "log.jsonl").write_text(good + torn + "\n" + good, encoding="latin-1")
    run = Run(tmp_path, {}, CPU)
    assert run.values("a", "val") == [0.5, 0.5]
    run.log("a", step=2)
    assert [r["step"] for r in records_of(tmp_path)] == [1, 1, 2]


def test_the_line_of_a_result_is_written_once(tmp_path):
    """After a kill a finished part is reported again: the log is that of an undisturbed run."""
    run = Run(tmp_path, {}, CPU)
    run.result("train", {"task": "birds", "depths": (2, 2)}, accuracy=50.0)
    run.result("train", {"task": "signs", "depths": (2, 2)}, accuracy=60.0)
    run.result("train", {"task": "birds", "depths": (2, 2)}, accuracy=51.0)
    assert [(r["task"], r["accuracy"]) for r in records_of(tmp_path)] == [("birds", 51.0), ("signs", 60.0)]


def test_only_rank_zero_writes(tmp_path):
    run = Run(tmp_path, {"seed": 1}, common.Machine(torch.device("cpu"), None, rank=1, world=2))
    run.log("tune", step=1)
    run.result("tune", {"task": "a"})
    run.start("tune", 0)
    assert not os.listdir(tmp_path)


# ------------------------------------------------------------------------------------------------------------
# Run: its directory
# ------------------------------------------------------------------------------------------------------------

def write_to(folder):
    Run(folder, {}, CPU).log("b", step=1)


def test_a_directory_has_one_owner(tmp_path):
    """A second process is refused while the first runs, and changes nothing; afterwards it may go on."""
    run, out = Run(tmp_path / "run", {}, CPU), tmp_path / "out"
    log = tmp_path / "run" / "log.jsonl"
    run.log("a", step=1)
    before = log.read_bytes()
    assert exit_codes([fork(write_to, tmp_path / "run", log=out)]) == [1]
    assert "another process is writing to" in out.read_text() and log.read_bytes() == before
    run.log("a", step=2)
    run.lock.close()
    assert exit_codes([fork(write_to, tmp_path / "run", log=out)]) == [0]
    assert [r["stage"] for r in records_of(tmp_path / "run")] == ["a", "a", "b"]


def test_temporary_files_of_dead_processes_are_removed(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    node = common.platform.node()
    dead, alive = (tmp_path / f".tune.pt.{node}.{pid}.tmp" for pid in (child.pid, os.getppid()))
    elsewhere = tmp_path / f".tune.pt.{node}-2.{child.pid}.tmp"
    for path in (dead, alive, elsewhere):
        path.write_text("half")
    Run(tmp_path, {}, CPU).log("a", step=1)
    assert not dead.exists() and alive.exists() and elsewhere.exists()


def test_a_place_that_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with refuses("is a file; name a directory"):
            Run(output, {}, CPU)
    with refuses("File name too long"):
        Run(tmp_path / ("x" * 300), {}, CPU)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with refuses("cannot be written to; name another directory"):
        Run(tmp_path / "new", {}, CPU)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_is_one_sentence(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    run = Run(tmp_path, {}, CPU)
    run.lock = True                                          # owned, and the log mended
    with refuses("log.jsonl cannot be written: No space left on device; make room"):
        run.log("a", step=1)


def test_write_atomically_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def half(temporary):
        temporary.write_text("ne")
        raise OSError(28, "No space left on device")
    with refuses("a.txt cannot be written: No space left on device"):
        write_atomically(path, half)
    assert snapshot(tmp_path) == {"a.txt": b"old"}           # and no temporary file stays
    write_atomically(path, lambda temporary: temporary.write_text("new"))
    with pytest.raises(FileExistsError):
        write_atomically(path, lambda temporary: temporary.write_text("newer"), exclusive=True)
    assert snapshot(tmp_path) == {"a.txt": b"new"}
    write_atomically(tmp_path / "b.txt", lambda temporary: temporary.write_text("b"), exclusive=True)
    assert snapshot(tmp_path) == {"a.txt": b"new", "b.txt": b"b"}
    with refuses("c.txt cannot be written"):                 # a file stands where a folder should be
        write_atomically(tmp_path / "a.txt/c.txt", lambda temporary: temporary.write_text("c"))


def test_file_names_keep_tasks_apart():
    names = ["digits", "digits#1", "a/b", "a_b", "/p/q", "p/q", "p/q/", "..", "x" * 300, "x" * 299, "\udcff"]
    files = [common.file_name(name) for name in names]
    assert len({file.lower() for file in files}) == len(names)
    assert files[:2] == ["digits", "digits#1"]
    assert not any("/" in file or file.startswith(".") or len(file) > 100 for file in files)
    for file in files:
        file.encode()


# ------------------------------------------------------------------------------------------------------------
# Run: checkpoints
# ------------------------------------------------------------------------------------------------------------

ENTRIES = {"stage": str, "step": int, "model": dict}


def test_checkpoint_round_trip(tmp_path):
    path = tmp_path / "new" / "a.pt"
    save_checkpoint(path, stage="tune", method="tal", step=3, model={"w": torch.arange(3.0)})
    saved = load_checkpoint(path, ENTRIES, stage="tune", method="tal")
    assert saved["step"] == 3 and torch.equal(saved["model"]["w"], torch.arange(3.0))
    assert os.listdir(tmp_path / "new") == ["a.pt"]


def whole(path, **changes):
    content = dict(stage="tune", method="tal", step=3, model={"w": torch.randn(1000)}) | changes
    save_checkpoint(path, **{key: value for key, value in content.items() if value is not ...})


def truncated(path):
    whole(path)
    path.write_bytes(path.read_bytes()[:2000])


def one_bit(path):
    """In the middle of the weights: the smallest change of the numbers."""
    whole(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


BAD_CHECKPOINTS = {
    "missing": (lambda path: None, "no checkpoint"),
    "empty": (lambda path: path.write_bytes(b""), "not a readable checkpoint"),
    "truncated": (truncated, "not a readable checkpoint"),
    "one bit": (one_bit, "not a readable checkpoint"),
    "text": (lambda path: path.write_text("hello\n" * 100), "not a readable checkpoint"),
    "a folder": (lambda path: path.mkdir(), "not a readable checkpoint"),
    "foreign pickle": (lambda path: path.write_bytes(pickle.dumps(Foreign(), 2)), "not a readable"),
    "foreign objects": (lambda path: torch.save({"args": Foreign()}, path), "not a readable checkpoint"),
    "plain state_dict": (lambda path: torch.save(nn.Linear(2, 2).state_dict(), path), "not a checkpoint"),
    "a tensor": (lambda path: torch.save(torch.ones(2), path), "not a checkpoint of this code"),
    "other format": (lambda path: torch.save({"format": 999, "stage": "tune"}, path), "not a checkpoint"),
    "other stage": (lambda path: whole(path, stage="pretrain"), "stage 'pretrain'"),
    "other method": (lambda path: whole(path, method="logah"), "method 'logah'"),
    "a tensor for a name": (lambda path: whole(path, method=torch.ones(3)), "holds method"),
    "no model": (lambda path: whole(path, model=...), "has no model"),
    "a model of another kind": (lambda path: whole(path, model=torch.ones(3)), "has no model, or one of"),
    "no step": (lambda path: whole(path, step=...), "has no step"),
}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_bad_checkpoints(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, words = BAD_CHECKPOINTS[kind]
    make(tmp_path / "a.pt")
    before = snapshot(tmp_path)
    with refuses(f"a.pt.*{words}|{words}.*a.pt"):
        load_checkpoint(tmp_path / "a.pt", ENTRIES, stage="tune", method="tal")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("changes", [
    {"optimizer": None}, {"optimizer": {"state": {}}}, {"scaler": {}}, {"step": -1}, {"step": 40},
    {"skipped": None}, {"model": {}},
    {"model": {"0.weight": "text"}}, {"model": {"0.weight": torch.ones(8, 4).to_sparse()}}])
def test_a_changed_checkpoint_is_not_resumed(changes, tmp_path):
    """What Training itself wrote, with one entry that is not as it was."""
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path, stop_at=9)
    saved = torch.load(tmp_path / "tiny.pt", weights_only=True)
    if "0.weight" in changes.get("model", {}):
        changes = {"model": saved["model"] | changes["model"]}
    torch.save(saved | changes, tmp_path / "tiny.pt")
    with refuses("tiny.pt"):
        train_tiny(tmp_path)


def test_weights_that_do_not_fit():
    with refuses("x.pt.*size mismatch"):
        load_weights(nn.Linear(2, 3), nn.Linear(2, 4).state_dict(), "x.pt")
    with refuses("x.pt.*bias"):
        load_weights(nn.Linear(2, 3), {"weight": torch.ones(3, 2)}, "x.pt")


# ------------------------------------------------------------------------------------------------------------
# Machine
# ------------------------------------------------------------------------------------------------------------

def test_no_gpu_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with refuses("--device cuda: torch finds 0 GPUs here, number 0 was asked for; use --device cpu"):
        setup_machine("cuda")
    for name in ("tpu", "cuda:x", "cpu:1"):
        with refuses("--device is auto, cpu, cuda or cuda:N"):
            setup_machine(name)
    assert setup_machine("auto").device.type == "cpu" and setup_machine("auto").amp is None
    assert setup_machine("cpu", amp="bf16").amp is torch.bfloat16


def test_freed_memory_is_kept_on_cpus_unless_a_flag_says_no(monkeypatch):
    assert common.keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
    calls = []
    monkeypatch.setattr(common, "keep_freed_memory", lambda: calls.append(1))
    setup_machine("cpu", return_memory=True)
    assert not calls
    setup_machine("cpu")
    assert len(calls) == 1
    monkeypatch.setattr(common, "find_device", lambda name, world: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    setup_machine("cuda")
    assert len(calls) == 1                                          # a GPU has an allocator of its own


def test_another_c_library_keeps_its_allocator(monkeypatch):
    monkeypatch.setattr(common.ctypes, "CDLL", lambda name: object())
    assert common.keep_freed_memory() is False


# ------------------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------------------

OWN = {
    "run": [("--stage", ["one", "two"], "one", "what to do")],
    "network": [("--depth", common.whole, 2, "50 % of it")],             # instead of the shared row
    "method": [("--alpha", common.share, (0.5, 0.2), "of a loss"), ("--quick", bool, False, "a switch")],
}


def parsed(*argv, defaults={"--lr": 0.25}):
    return parse_flags("d", OWN, defaults, list(argv))


def test_presets_and_flags():
    assert (parsed().alpha, parsed("--preset", "paper").alpha) == (0.5, 0.2)
    assert parsed("--preset", "paper", "--alpha", "0.3").alpha == 0.3                # a flag beats the preset
    assert parsed("--preset", "paper", "--alpha", "0").alpha == 0.0                  # also when it is zero
    assert parsed("--quick").quick is True and parsed().quick is False
    assert (parsed().depth, parsed().batch_size, parsed().lr) == (2, 64, 0.25)   # own, shared, own default


def test_settings_are_read_only():
    args = parsed("--seed", "3")
    with pytest.raises(AttributeError, match="read-only"):
        args.seed = 4
    again = args.replace(seed=4, tasks=["a"])
    assert (args.seed, again.seed, again.tasks, vars(again)["seed"]) == (3, 4, ["a"], 4)
    assert args.changed() == {"seed": 3} and again.changed() == {"seed": 4}


def test_identity_follows_from_the_headings():
    args = parsed("--device", "cpu", "--seed", "3")
    assert identity(args, "method") == {"alpha": 0.5, "quick": False}
    found = identity(args, "network", "training", "data")
    assert {"depth", "seed", "recipe", "amp"} <= found.keys()
    assert not {"device", "preset", "train_epochs", "train_lr", "stage"} & found.keys()


@pytest.mark.parametrize("argv, words", [
    (["--unknown", "1"], "--unknown"), (["--stage", "three"], "--stage"), (["--lr", "fast"], "--lr"),
    (["--preset", "big"], "--preset"), (["--stag", "one"], "--stag"), (["--lr"], "--lr"),
    (["--lr", "nan"], "from 0 to"), (["--seed", str(2 ** 64)], "from 0 to 2147483647"),
    (["--seed", "-1"], "from 0"),
    (["--batch-size", "0"], "from 1"), (["--alpha", "1.5"], "from 0 to 1"), (["--depth", "2.5"], "--depth")])
def test_bad_flags(argv, words):
    with refuses(words):
        parsed(*argv)


def test_help_has_groups_and_fits(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as stop:
        parsed("-h")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and max(map(len, text.splitlines())) <= 100
    assert [line for line in text.splitlines() if line.endswith(":") and line[:1].isalpha()] == [
        "options:", "run:", "data:", "network:", "training:", "further training:", "budget:", "method:"]
    words = " ".join(text.split())
    assert "of a loss [0.5 | 0.2]" in words and "50 % of it [2]" in words and "[0.25]" in words


def test_the_first_lines_of_a_run(tmp_path, capsys):
    args = parsed("--seed", "3", "--data", "digits")
    common.announce(Run(tmp_path, vars(args), CPU), args)
    said = capsys.readouterr().out.splitlines()
    assert said == ["preset drawn --data digits --seed 3", f"  all settings: {tmp_path / 'config.json'}"]


@pytest.mark.parametrize("error, code, said", [
    (InputError("say so"), 2, "error: say so\n"),
    (KeyboardInterrupt(), 130, "stopped; start the same command again to go on\n")])
def test_a_script_ends_in_one_sentence(error, code, said, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as stop:
        common.script(main)
    assert stop.value.code == code and capsys.readouterr().err == said


def test_a_script_lets_errors_of_the_code_through():
    with pytest.raises(ZeroDivisionError):
        common.script(lambda: 1 / 0)
