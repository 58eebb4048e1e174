"""common.py: the ViT against three other computations of it, and the plumbing of a run against what may happen to it."""
import json
import math
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import common
from common import (MAX_BAD_STEPS, Run, Training, ViT, ViTConfig, cosine_lr, load_checkpoint, load_weights, parameter_groups,
                    save_checkpoint, setup_machine, vit, write_atomically)

ROOT = Path(__file__).resolve().parent.parent
CPU = common.Machine(torch.device("cpu"), None)


def snapshot(folder):
    """{file: bytes} of everything below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def refuses(capsys, call, *words):
    """The call ends with exit code 2 and one line on stderr that holds the words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    for word in words:
        assert word in lines[0], lines[0]


# ----------------------------------------------------------------------------------------------------------------------
# ViT
# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, count", [("tiny", 5_717_416), ("small", 22_050_664), ("base", 86_567_656)])
def test_parameter_counts_are_those_of_deit(size, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in vit(size).parameters()) == count


def test_one_block_of_deit_small_by_hand():
    """Two LayerNorms 2 x 2D, qkv D x 3D + 3D, proj D^2 + D, MLP 2 x 4 D^2 + 4D + D; D = 384: 1,774,464."""
    with torch.device("meta"):
        block = vit("small").blocks[0]
    D = 384
    assert sum(p.numel() for p in block.parameters()) == 2 * 2 * D + 3 * D * D + 3 * D + D * D + D + 8 * D * D + 5 * D == 1_774_464


def from_torchvision(state, depth):
    """torchvision's names -> timm's, by hand."""
    names = {"cls_token": "class_token", "patch_embed.proj": "conv_proj", "pos_embed": "encoder.pos_embedding",
             "norm": "encoder.ln", "head": "heads.head"}
    for i in range(depth):
        theirs = f"encoder.layers.encoder_layer_{i}"
        names |= {f"blocks.{i}.norm1": f"{theirs}.ln_1", f"blocks.{i}.norm2": f"{theirs}.ln_2",
                  f"blocks.{i}.attn.qkv": f"{theirs}.self_attention.in_proj", f"blocks.{i}.attn.proj": f"{theirs}.self_attention.out_proj",
                  f"blocks.{i}.mlp.fc1": f"{theirs}.mlp.0", f"blocks.{i}.mlp.fc2": f"{theirs}.mlp.3"}
    mine = {}
    for ours, theirs in names.items():
        for end in ("", ".weight", ".bias", "_weight", "_bias"):
            if theirs + end in state:
                mine[ours + end.replace("_", ".")] = state[theirs + end]
    assert len(mine) == len(state)
    return mine


def test_logits_equal_torchvisions():
    torch.manual_seed(0)
    theirs = torchvision.models.VisionTransformer(image_size=32, patch_size=8, num_layers=3, num_heads=4, hidden_dim=32, mlp_dim=128,
                                                  num_classes=7).eval()
    for p in theirs.parameters():                            # its head starts at zero; no parameter may hide behind that
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
    assert sum(p.numel() for p in theirs.parameters()) == 86_567_656


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_names_and_logits_equal_timms(pool):
    timm = pytest.importorskip("timm", reason="timm is not installed; torchvision's ViT is the oracle above")
    torch.manual_seed(0)
    theirs = timm.models.vision_transformer.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=7,
                                                              global_pool=pool).eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.1)
    config = ViTConfig(32, 8, 32, 2, 4, 7, pool=pool)
    ours = ViT(config)
    state = theirs.state_dict()
    if pool == "avg" and "cls_token" in state:               # timm keeps the class token among the tokens, ours does not
        theirs = timm.models.vision_transformer.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4,
                                                                  num_classes=7, global_pool=pool, class_token=False).eval()
        state = theirs.state_dict()
    ours.load_state_dict(state, strict=True)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=0)


def test_average_pool_by_hand():
    """Every sum of a 1-layer ViT written out: patches by slicing, attention one head and one token at a time."""
    torch.manual_seed(0)
    net = ViT(ViTConfig(8, 4, 8, 1, 2, 3, pool="avg")).double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    P = dict(net.named_parameters())
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)

    def norm(t, name):
        return (t - t.mean()) / torch.sqrt(t.var(unbiased=False) + 1e-6) * P[f"{name}.weight"] + P[f"{name}.bias"]

    def linear(t, name):
        return P[f"{name}.weight"] @ t + P[f"{name}.bias"]

    patches = [x[0, :, r:r + 4, c:c + 4] for r in (0, 4) for c in (0, 4)]
    tokens = [torch.stack([(k * p).sum() for k in P["patch_embed.proj.weight"]]) + P["patch_embed.proj.bias"] for p in patches]
    tokens = [t + P["pos_embed"][0, i] for i, t in enumerate(tokens)]
    qkv = [linear(norm(t, "blocks.0.norm1"), "blocks.0.attn.qkv") for t in tokens]
    mixed = []
    for i in range(4):
        heads = []
        for h in range(2):
            q, k, v = (lambda j, part: qkv[j][part * 8 + h * 4:part * 8 + h * 4 + 4]), 1, 2
            weights = torch.stack([torch.exp(q(i, 0) @ q(j, k) / math.sqrt(4)) for j in range(4)])
            heads.append(sum(w * q(j, v) for j, w in enumerate(weights / weights.sum())))
        mixed.append(tokens[i] + linear(torch.cat(heads), "blocks.0.attn.proj"))
    gelu = lambda t: t * 0.5 * (1 + torch.erf(t / math.sqrt(2)))
    out = [t + linear(gelu(linear(norm(t, "blocks.0.norm2"), "blocks.0.mlp.fc1")), "blocks.0.mlp.fc2") for t in mixed]
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
    (dict(depth=0), "depth of at least 1"), (dict(num_classes=-1), "num classes of at least 1"), (dict(pool="max"), "pool")])
def test_impossible_sizes(sizes, words, capsys):
    refuses(capsys, lambda: ViTConfig(**sizes), words)


def test_parameter_groups_follow_deit():
    """Decay for the patch projection, four matrices per block and the head; none for the rest."""
    net = vit("drawn-tiny", 2, image_size=32, patch_size=8, num_classes=5)
    name = {id(p): n for n, p in net.named_parameters()}
    decayed, free = ({name[id(p)] for p in g["params"]} for g in parameter_groups(net, 1e-3, 0.1))
    assert decayed == {"patch_embed.proj.weight", "head.weight"} | {
        f"blocks.{i}.{m}.weight" for i in (0, 1) for m in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert {"pos_embed", "cls_token", "norm.weight", "head.bias", "blocks.1.attn.qkv.bias"} <= free
    assert len(decayed) + len(free) == len(name)
    assert [g["weight_decay"] for g in parameter_groups(net, 1e-3, 0.1)] == [0.1, 0.0]


def test_parameter_groups_leave_frozen_parameters_out():
    net = vit("drawn-tiny", 1, image_size=32, patch_size=8, num_classes=5)
    net.head.requires_grad_(False)
    listed = {id(p) for g in parameter_groups(net, 1e-3, 0.1) for p in g["params"]}
    assert id(net.head.weight) not in listed and id(net.head.bias) not in listed and id(net.pos_embed) in listed


def test_accuracy_counts_in_parts():
    """7 images in parts of 3; two of seven right."""
    class Fixed:
        def examples(self, split, limit=None):
            return torch.eye(7)[:limit], torch.tensor([0, 1, 0, 0, 0, 0, 0])[:limit]
    assert common.accuracy(lambda x: x, Fixed(), "test", "cpu", batch_size=3) == pytest.approx(100 * 2 / 7)
    assert common.accuracy(lambda x: x, Fixed(), "test", "cpu", limit=2) == 100


# ----------------------------------------------------------------------------------------------------------------------
# Schedule
# ----------------------------------------------------------------------------------------------------------------------

def test_cosine_at_its_corners():
    at = lambda step, **k: cosine_lr(step, **{**dict(steps=104, warmup=4), **k})
    assert [at(s) for s in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])     # rises in equal steps, none is zero
    assert at(54) == pytest.approx(0.5)                                              # half-way down
    assert at(4 + 25) == pytest.approx(0.5 + math.sqrt(0.5) / 2)                     # cos(45 degrees)
    assert at(104) == pytest.approx(0) and at(1000) == pytest.approx(0)
    assert at(54, final=0.2) == pytest.approx(0.6) and at(104, final=0.2) == pytest.approx(0.2)
    assert cosine_lr(0, steps=10, warmup=0) == 1
    assert cosine_lr(5, steps=5, warmup=5) == pytest.approx(1)                       # nothing after the warm-up


def test_cosine_is_what_torch_calls_cosine_annealing():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=0.1)
    for step in range(40):
        assert cosine_lr(step, 40, 0, final=0.1) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


# ----------------------------------------------------------------------------------------------------------------------
# Flags
# ----------------------------------------------------------------------------------------------------------------------

ROWS = [("--lr", float, (1.0, 2.0), "per preset"), ("--size", ["a", "b"], "a", "a choice"), ("--data-dir", str, "data", "50 % of it"),
        ("--quick", bool, False, "a switch"), ("--augment", common.yes_no, True, "yes or no")]


def test_presets_and_flags():
    parse = lambda *argv: common.parse_flags("d", ROWS, ["one", "two"], list(argv))
    assert (parse().lr, parse("--preset", "two").lr) == (1.0, 2.0)
    assert parse("--preset", "two", "--lr", "3").lr == 3.0                           # a flag beats the preset
    assert parse("--preset", "two", "--lr", "0").lr == 0.0                           # also when it is zero
    assert parse("--augment", "no").augment is False and parse("--quick").quick is True and parse().quick is False
    assert parse("--data-path", "x").data_dir == "x"                                 # the name DeiT has for it


@pytest.mark.parametrize("argv, words", [(["--unknown", "1"], "--unknown"), (["--size", "c"], "--size"), (["--lr", "fast"], "--lr"),
                                         (["--augment", "maybe"], "yes or no"), (["--preset", "three"], "--preset"),
                                         (["--siz", "a"], "--siz"), (["--lr"], "--lr")])
def test_bad_flags(argv, words, capsys):
    refuses(capsys, lambda: common.parse_flags("d", ROWS, ["one", "two"], argv), words)


def test_help_lists_every_flag_with_both_presets(capsys):
    with pytest.raises(SystemExit) as stop:
        common.parse_flags("d", ROWS, ["one", "two"], ["-h"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "per preset [1.0 | 2.0]" in text and "50 % of it [data]" in text


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------

def test_checkpoint_round_trip(tmp_path):
    save_checkpoint(tmp_path / "new" / "a.pt", stage="tune", method="tal", step=3, model={"w": torch.arange(3.0)})
    saved = load_checkpoint(tmp_path / "new" / "a.pt", stage="tune", method="tal")
    assert saved["step"] == 3 and torch.equal(saved["model"]["w"], torch.arange(3.0))
    assert os.listdir(tmp_path / "new") == ["a.pt"]


def truncated(path):
    save_checkpoint(path, stage="tune", method="tal", model={"w": torch.randn(1000)})
    path.write_bytes(path.read_bytes()[:2000])


class Foreign:
    """Unpickling this object would write a file: nothing in a checkpoint may run."""
    def __reduce__(self):
        return os.system, ("touch ran-from-a-pickle",)


BAD_CHECKPOINTS = {
    "missing": (lambda path: None, "no checkpoint"),
    "empty": (lambda path: path.write_bytes(b""), "not a readable checkpoint"),
    "truncated": (truncated, "not a readable checkpoint"),
    "text": (lambda path: path.write_text("hello\n" * 100), "not a readable checkpoint"),
    "a folder": (lambda path: path.mkdir(), "not a readable checkpoint"),
    "foreign pickle": (lambda path: path.write_bytes(pickle.dumps(Foreign(), protocol=2)), "not a readable checkpoint"),
    "foreign objects": (lambda path: torch.save({"format": 1, "args": Foreign()}, path), "not a readable checkpoint"),
    "plain state_dict": (lambda path: torch.save(nn.Linear(2, 2).state_dict(), path), "not a checkpoint of this code"),
    "a tensor": (lambda path: torch.save(torch.ones(2), path), "not a checkpoint of this code"),
    "other format": (lambda path: torch.save({"format": 999, "stage": "tune", "method": "tal"}, path), "not a checkpoint of this code"),
    "other stage": (lambda path: save_checkpoint(path, stage="pretrain", method="tal"), "stage 'pretrain'"),
    "other method": (lambda path: save_checkpoint(path, stage="tune", method="logah"), "method 'logah'"),
}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_bad_checkpoints(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, words = BAD_CHECKPOINTS[kind]
    make(tmp_path / "a.pt")
    before = snapshot(tmp_path)
    refuses(capsys, lambda: load_checkpoint(tmp_path / "a.pt", stage="tune", method="tal"), words, "a.pt")
    assert snapshot(tmp_path) == before


def test_weights_that_do_not_fit(capsys):
    refuses(capsys, lambda: load_weights(nn.Linear(2, 3), nn.Linear(2, 4).state_dict(), "x.pt"), "x.pt", "size mismatch")
    refuses(capsys, lambda: load_weights(nn.Linear(2, 3), {"weight": torch.ones(3, 2)}, "x.pt"), "x.pt", "bias")


def test_write_atomically_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def half(p):
        p.write_text("ne")
        raise OSError("disk full")
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, half)
    assert snapshot(tmp_path) == {"a.txt": b"old"}                                   # and no temporary file stays
    write_atomically(path, lambda p: p.write_text("new"))
    assert snapshot(tmp_path) == {"a.txt": b"new"}


# ----------------------------------------------------------------------------------------------------------------------
# Log
# ----------------------------------------------------------------------------------------------------------------------

def test_rewind_log(tmp_path):
    run = Run(tmp_path, {"seed": 1}, CPU)
    assert not os.listdir(tmp_path)                                                  # nothing is written before all is in order
    run.start("tune", 5)                                                             # no log yet: nothing to rewind
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1
    for stage, step in (("pretrain", 5), ("pretrain", 10), ("tune", 5), ("tune", 10), ("tune", 15)):
        run.log(stage, step=step, loss=0.5)
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"stage": "tune", "step": 20, "lo')                                 # killed here
    run.rewind_log("tune", 10)
    run.log("tune", step=15, loss=0.25)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in records] == [("pretrain", 5), ("pretrain", 10), ("tune", 5), ("tune", 10), ("tune", 15)]
    assert records[-1]["loss"] == 0.25
    run.rewind_log("tune", 0)                                                        # from the start: nothing of it stays
    assert [json.loads(line)["stage"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == ["pretrain"] * 2


def test_only_rank_zero_writes(tmp_path):
    run = Run(tmp_path, {"seed": 1}, common.Machine(torch.device("cpu"), None, rank=1, world=2))
    run.log("tune", step=1)
    run.start("tune", 0)
    assert not os.listdir(tmp_path)


def test_no_gpu_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refuses(capsys, lambda: setup_machine("cuda"), "--device cuda", "--device cpu")
    assert setup_machine("auto").device.type == "cpu" and setup_machine("auto").amp is None


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------

STEPS = 23                      # neither a multiple of log_every nor of save_every


def train_tiny(folder, stop_at=None, poison=(), steps=STEPS, kill=False, **changes):
    """A loop as the methods write it: regression by two layers, the batch of step k made from k. `stop_at`: an
    exception (or SIGKILL) between the forward pass and the update of that step. `poison`: steps whose loss is NaN."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    job = Training(Run(folder, {}, CPU), "tiny", net, parameter_groups(net, 1e-2, 0.1), steps,
                   **{**dict(warmup=3, clip=1.0, batch_size=16, log_every=2, save_every=4, identity={"seed": 0}), **changes})
    for step in job.steps():
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        loss = (net(x)[:, 0] - x.sum(1)).pow(2).mean() * (float("nan") if step in poison else 1)
        if step == stop_at:
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt
        job.update(loss, error=loss.sqrt())
    return net, job


def log_of(folder, stage="tiny"):
    """The lines of a stage without its speed."""
    records = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "images_per_s"} for r in records if r["stage"] == stage]


def weights_of(folder, stage="tiny"):
    return torch.load(Path(folder) / f"{stage}.pt", weights_only=True)["model"]


def assert_same_run(folder, reference, stage="tiny"):
    """Bitwise the same weights and the same log."""
    ours, theirs = weights_of(folder, stage), weights_of(reference, stage)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in theirs)
    assert log_of(folder, stage) == log_of(reference, stage)


def test_the_bookkeeping_is_adamw_with_clipping_and_cosine(tmp_path):
    """The same 23 steps written out without Training, scaler and groups."""
    net, _ = train_tiny(tmp_path)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW([{"params": [plain[0].weight, plain[2].weight], "weight_decay": 0.1},
                                   {"params": [plain[0].bias, plain[2].bias], "weight_decay": 0.0}], fused=False)
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * cosine_lr(step, STEPS, 3)
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        loss = (plain(x)[:, 0] - x.sum(1)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    for ours, theirs in zip(net.parameters(), plain.parameters()):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    log = log_of(tmp_path)
    assert [r["step"] for r in log] == [*range(2, 23, 2), 23]                        # every second step, and the last
    assert [r["images"] for r in log] == [16 * r["step"] for r in log]
    means = [sum(losses[i:i + 2]) / len(losses[i:i + 2]) for i in range(0, 23, 2)]   # means since the line before
    assert [r["loss"] for r in log] == pytest.approx(means, rel=1e-4)


@pytest.mark.parametrize("stops", [(0,), (3,), (4,), (5,), (22,), (1, 4, 4, 9, 17)])
def test_interrupted_and_started_again(stops, tmp_path):
    train_tiny(tmp_path / "whole")
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            train_tiny(tmp_path / "parts", stop_at=stop)
    train_tiny(tmp_path / "parts")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_killed_and_started_again(tmp_path):
    """SIGKILL leaves no chance to clean up: processes that kill themselves in steps 2, 7 and 18 of the same run."""
    train_tiny(tmp_path / "whole")
    code = "import sys; from test_common import train_tiny; train_tiny(sys.argv[1], stop_at=int(sys.argv[2]), kill=True)"
    for stop in (2, 7, 18):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "parts"), str(stop)], capture_output=True,
                              env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"})
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    train_tiny(tmp_path / "parts")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_interruption_among_skipped_steps(tmp_path):
    """What was skipped before the interruption is still counted after it."""
    poison = {2, 3, 9}
    train_tiny(tmp_path / "whole", poison=poison)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path / "parts", poison=poison, stop_at=11)
    train_tiny(tmp_path / "parts", poison=poison)
    assert log_of(tmp_path / "whole")[-1]["skipped"] == 3
    assert str(log_of(tmp_path / "parts")) == str(log_of(tmp_path / "whole"))
    ours, theirs = weights_of(tmp_path / "parts"), weights_of(tmp_path / "whole")
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_finished_stage_yields_no_steps(tmp_path):
    net, _ = train_tiny(tmp_path)
    before = snapshot(tmp_path)
    again, job = train_tiny(tmp_path, stop_at=0)             # would raise in its first step
    assert job.step == STEPS and all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters()))
    assert snapshot(tmp_path) == before


def test_a_loop_that_forgets_update_is_told(tmp_path):
    net = nn.Linear(1, 1)
    job = Training(Run(tmp_path, {}, CPU), "tiny", net, parameter_groups(net, 1e-2, 0.1), 3)
    with pytest.raises(AssertionError, match="update"):
        for step in job.steps():
            pass


@pytest.mark.parametrize("changes, words", [(dict(identity={"seed": 1}), "seed 0"), (dict(steps=24), "steps 23")])
def test_checkpoint_of_another_run_is_not_resumed(changes, words, tmp_path, capsys):
    train_tiny(tmp_path)
    before = snapshot(tmp_path)
    refuses(capsys, lambda: train_tiny(tmp_path, **changes), words)
    assert snapshot(tmp_path) == before


def test_nan_loss_is_skipped_and_counted(tmp_path):
    """The step changes neither weights nor momenta: with constant lr and data, skipping 2 of 5 steps equals 3 steps."""
    def train(folder, poison, steps):
        torch.manual_seed(0)
        net = nn.Linear(3, 1)
        job = Training(Run(folder, {}, CPU), "tiny", net, parameter_groups(net, 1e-2, 0.0), 1000, log_every=1)
        weights = []
        for step in job.steps():
            loss = (net(torch.ones(2, 3)) - 1).pow(2).mean() * (float("nan") if step in poison else 1)
            job.update(loss)
            weights.append([p.detach().clone() for p in net.parameters()])
            if len(weights) == steps:
                job.flush()
                return weights
    with_nan, without = train(tmp_path / "a", {1, 2}, 5), train(tmp_path / "b", set(), 3)
    assert all(torch.equal(a, b) for a, b in zip(with_nan[0], with_nan[2]))
    assert not any(torch.equal(a, b) for a, b in zip(with_nan[2], with_nan[3]))
    for a, b in zip(with_nan[4], without[2]):                # the cosine over 1000 steps is flat here
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert [r["skipped"] for r in log_of(tmp_path / "a")] == [0, 1, 2, 2, 2]


def test_log_stays_json_and_means_leave_bad_steps_out(tmp_path):
    """Steps 4 and 5 are a whole log line without a finite loss, step 8 half of one. NaN is not JSON (RFC 8259)."""
    train_tiny(tmp_path, poison={4, 5, 8})
    lines = (tmp_path / "log.jsonl").read_text().splitlines()

    def not_json(constant):
        raise AssertionError(f"{constant} is not JSON")
    records = [json.loads(line, parse_constant=not_json) for line in lines]
    assert [r["skipped"] for r in records][1:5] == [0, 2, 2, 3]
    assert math.isfinite(records[4]["loss"])


def test_too_many_bad_steps_stop_the_run(tmp_path, capsys):
    poison = set(range(8, 100))
    with pytest.raises(SystemExit) as stop:
        train_tiny(tmp_path, poison=poison, steps=100)
    sentences = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]      # beside the progress bar
    assert stop.value.code == 2 and len(sentences) == 1 and "not finite" in sentences[0] and "tiny.pt" in sentences[0]
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path / "until8", steps=100, stop_at=8)
    good = weights_of(tmp_path / "until8")                   # the checkpoint of step 8, before the first bad step
    left = weights_of(tmp_path)
    assert all(torch.equal(left[n], good[n]) for n in good)
    steps = [r["step"] for r in log_of(tmp_path)]
    assert max(steps) < 8 + MAX_BAD_STEPS + 2                # it stopped at the first line after the 20th bad step


def test_fewer_bad_steps_in_a_row_do_not_stop_the_run(tmp_path):
    _, job = train_tiny(tmp_path, poison=set(range(2, 2 + MAX_BAD_STEPS - 1)) | {22}, steps=25)
    assert job.step == 25 and int(job.skipped) == MAX_BAD_STEPS


def test_many_skipped_steps_leave_later_steps_as_they_are(tmp_path):
    """Two of three steps are bad, 200 in all, never 20 in a row; the good ones still train."""
    net, job = train_tiny(tmp_path, poison={s for s in range(300) if s % 3}, steps=300, warmup=0)
    assert int(job.skipped) == 200
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(parameter_groups(plain, 1e-2, 0.1))
    for step in range(0, 300, 3):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * cosine_lr(step, 300, 0)
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (plain(x)[:, 0] - x.sum(1)).pow(2).mean().backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    for ours, theirs in zip(net.parameters(), plain.parameters()):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_average_gradients_is_the_mean_and_leaves_unused_parameters_alone(monkeypatch):
    """Two processes by hand: the other one holds gradient (3, 3); no process used the second parameter."""
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    a.grad = torch.tensor([1.0, 2.0])
    monkeypatch.setattr(common.dist, "all_reduce", lambda flat: flat.add_(torch.tensor([3.0, 3.0])))
    common.average_gradients([a, b], 2)
    assert a.grad.tolist() == [2.0, 2.5] and b.grad is None
