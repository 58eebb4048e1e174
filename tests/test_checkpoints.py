"""Weights in and out: logits against torchvision, timm and Hugging Face, names and bytes written out by hand, bad files."""
import argparse
import json
import math
import os
import struct

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import common
from common import (HALF, IMAGENET, ViT, ViTConfig, export_weights, load_pretrained, read_safetensors, read_weights, resized_pos_embed,
                    save_checkpoint, vit_state, write_safetensors)
from test_common import Foreign, refuses, snapshot

SMALL = ViTConfig(32, 8, 64, 3, 4, 7)                        # 16 patches of 8 px, 4 heads: more than the width / 64 that is the default
quiet = dict(say=lambda line: None)


def random_weights(net):
    """No zero may hide a tensor that was not loaded."""
    torch.manual_seed(0)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return net.eval()


def torchvision_vit(config=SMALL, **more):
    return random_weights(torchvision.models.VisionTransformer(
        image_size=config.image_size, patch_size=config.patch_size, num_layers=config.depth, num_heads=config.heads,
        hidden_dim=config.width, mlp_dim=config.mlp_ratio * config.width, num_classes=config.num_classes, **more))


def saved(path, content):
    (write_safetensors if path.suffix == ".safetensors" else lambda p, c: torch.save(c, p))(path, content)
    return path


@torch.no_grad()
def same_logits(a, b, size=32, atol=1e-5):
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    expected = b(x)
    assert expected.std() > 0.1                              # a difference would show
    torch.testing.assert_close(a(x), expected, atol=atol, rtol=0)


def same_state(a, b):
    assert a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in b)


def hugging_face(state, prefix="vit."):
    """Our names -> Hugging Face's, one line per tensor of a block."""
    out = {}
    for name, t in state.items():
        if name.startswith("head."):
            out[name.replace("head", "classifier")] = t
        elif name.startswith("blocks."):
            _, i, rest = name.split(".", 2)
            layer, end = f"{prefix}encoder.layer.{i}.", rest.split(".")[-1]
            if rest.startswith("attn.qkv"):
                for part, rows in zip(("query", "key", "value"), t.tensor_split(3)):
                    out[f"{layer}attention.attention.{part}.{end}"] = rows
            else:
                out[layer + {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
                             "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}[rest.removesuffix(f".{end}")] + f".{end}"] = t
        else:
            out[prefix + {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
                          "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
                          "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
                          "norm.weight": "layernorm.weight", "norm.bias": "layernorm.bias"}[name]] = t
    assert len(out) == len(state) + 4 * sum("qkv.weight" in n for n in state)
    return out


# ----------------------------------------------------------------------------------------------------------------------
# In: torchvision
# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_logits_equal_torchvisions(suffix, tmp_path):
    theirs = torchvision_vit()
    net, report = load_pretrained(saved(tmp_path / f"a{suffix}", theirs.state_dict()), heads=4, **quiet)
    assert net.config == SMALL
    same_logits(net, theirs)
    assert report == {"source": "torchvision", "loaded": 44, "missing": [], "unexpected": [], "head": "kept",
                      "mean": IMAGENET[0], "std": IMAGENET[1], "normalisation": report["normalisation"]}


def test_older_names_of_torchvision(tmp_path):
    """Its published files say mlp.linear_1 and mlp.linear_2; torchvision renames them while loading, which is the oracle."""
    theirs = torchvision_vit()
    older = {n.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): t for n, t in theirs.state_dict().items()}
    assert "encoder.layers.encoder_layer_0.mlp.linear_1.weight" in older
    again = torchvision_vit()
    again.load_state_dict(dict(older), strict=True)
    net, _ = load_pretrained(saved(tmp_path / "a.pth", older), heads=4, **quiet)
    same_logits(net, again)


def test_vit_b_16():
    torch.manual_seed(0)
    theirs = torchvision.models.vit_b_16(image_size=64).eval()                       # its own weights: random, but for what is zero
    for p in theirs.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.02)
    state, config, _ = vit_state(theirs.state_dict())
    assert config == ViTConfig(64, 16, 768, 12, 12, 1000)    # 12 heads from the width
    ours = ViT(config).eval()
    ours.load_state_dict(state, strict=True)
    same_logits(ours, theirs, 64)


def test_swin_t(tmp_path):
    """torchvision's own class: its file, one with the older names of an MLP, and one for other classes."""
    theirs = random_weights(torchvision.models.swin_t(num_classes=5))
    state = theirs.state_dict()
    older = {n.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): t for n, t in state.items()}
    assert older.keys() != state.keys()
    for content in (state, older):
        net, report = load_pretrained(saved(tmp_path / "swin_t.pth", content), net=torchvision.models.swin_t(num_classes=5).eval(), **quiet)
        same_logits(net, theirs, 64)
        assert (report["source"], report["head"], report["mean"]) == ("torchvision", "kept", IMAGENET[0])
    net = torchvision.models.swin_t(num_classes=3).eval()
    fresh = net.head.weight.clone()
    report = load_pretrained(tmp_path / "swin_t.pth", net=net, **quiet)[1]
    assert report["head"] == "replaced" and torch.equal(net.head.weight, fresh)
    net.head = theirs.head
    same_logits(net, theirs, 64)


# ----------------------------------------------------------------------------------------------------------------------
# In: timm, DeiT, Hugging Face, this code
# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prefix", ["vit.", ""])
def test_hugging_face_names(prefix, tmp_path):
    ours = random_weights(ViT(SMALL))
    net, report = load_pretrained(saved(tmp_path / "a.safetensors", hugging_face(ours.state_dict(), prefix)), heads=4, **quiet)
    same_state(net.state_dict(), ours.state_dict())
    same_logits(net, ours)
    assert report["source"] == "Hugging Face" and (report["mean"], report["std"]) == HALF and "assumed" in report["normalisation"]


def test_hugging_face_encoder_without_a_head(tmp_path):
    ours = random_weights(ViT(SMALL))
    state = {n: t for n, t in hugging_face(ours.state_dict(), "").items() if "classifier" not in n}
    state |= {"pooler.dense.weight": torch.ones(64, 64), "pooler.dense.bias": torch.ones(64)}
    net, report = load_pretrained(saved(tmp_path / "a.bin", state), num_classes=7, heads=4, **quiet)
    assert report["head"] == "replaced" and report["unexpected"] == ["pooler.dense.weight", "pooler.dense.bias"]
    assert report["missing"] == ["head.weight", "head.bias"] and report["loaded"] == 42
    net.head = ours.head
    same_logits(net, ours)


@pytest.mark.parametrize("wrap", ["model", "state_dict", "model_ema"])
def test_wrapped_as_training_scripts_do(wrap, tmp_path):
    """DeiT's {"model": ...} with its flags, timm's {"state_dict": ...}; names as DDP and torch.compile leave them."""
    ours = random_weights(ViT(SMALL))
    content = {wrap: {f"module._orig_mod.{n}": t for n, t in ours.state_dict().items()}, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    net, report = load_pretrained(saved(tmp_path / "a.pth", content), heads=4, **quiet)
    same_state(net.state_dict(), ours.state_dict())
    assert (report["mean"], report["std"]) == (IMAGENET if wrap == "model" else HALF)


def test_distilled_deit(tmp_path):
    """[class, distillation, patches]: the second token goes, and with it its position and its head."""
    ours = random_weights(ViT(SMALL))
    state = ours.state_dict()
    pos = state["pos_embed"]
    theirs = {"dist_token": torch.ones(1, 1, 64), "pos_embed": torch.cat([pos[:, :1], torch.full((1, 1, 64), 9.0), pos[:, 1:]], 1),
              "head_dist.weight": torch.ones(7, 64), "head_dist.bias": torch.ones(7)}
    content = {"model": state | theirs}
    said = []
    net, report = load_pretrained(saved(tmp_path / "a.pth", content), heads=4, say=said.append)
    same_state(net.state_dict(), state)
    assert report["unexpected"] == ["dist_token", "head_dist.weight", "head_dist.bias"] and report["mean"] == IMAGENET[0]
    assert len(said) == 2 and "not used: dist_token, head_dist.weight" in said[0] and "0.485" in said[1]


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_own_checkpoints(pool, tmp_path):
    """What Training writes, heads and all; and an encoder with heads beside it, as TAL's ancestry is."""
    config = ViTConfig(32, 8, 32, 2, 4, 7, pool=pool)
    ours = random_weights(ViT(config))
    save_checkpoint(tmp_path / "a.pt", stage="train", extra={"config": vars(config)}, model=ours.state_dict())
    net, report = load_pretrained(tmp_path / "a.pt", **quiet)
    assert net.config == config and report["mean"] is report["std"] is None and "own" in report["normalisation"]
    same_logits(net, ours)
    state = {f"encoder.{n}": t for n, t in ours.state_dict().items() if "head" not in n} | {"heads.birds.weight": torch.ones(2, 32)}
    save_checkpoint(tmp_path / "b.pt", extra={"config": vars(config), "mean": [0.1, 0.2, 0.3], "std": [1, 2, 3]}, model=state)
    net, report = load_pretrained(tmp_path / "b.pt", num_classes=7, **quiet)
    assert report["unexpected"] == ["heads.birds.weight"] and (report["mean"], report["std"]) == ((0.1, 0.2, 0.3), (1, 2, 3))
    net.head = ours.head
    same_logits(net, ours)


def test_half_precision_becomes_float32():
    ours = random_weights(ViT(SMALL)).bfloat16()
    same_state(vit_state(ours.state_dict(), 4)[0], ours.float().state_dict())


@pytest.mark.parametrize("classes, head", [(7, "kept"), (None, "kept"), (3, "replaced")])
def test_head_by_class_count(classes, head, tmp_path):
    ours = random_weights(ViT(SMALL))
    torch.manual_seed(3)
    net, report = load_pretrained(saved(tmp_path / "a.pth", ours.state_dict()), num_classes=classes, heads=4, **quiet)
    assert report["head"] == head and net.config.num_classes == (classes or 7)
    assert torch.equal(net.encode(torch.ones(1, 3, 32, 32)), ours.encode(torch.ones(1, 3, 32, 32)))
    if head == "kept":
        assert torch.equal(net.head.weight, ours.head.weight)
    else:
        assert report["unexpected"] == ["head.weight", "head.bias"] and report["missing"] == ["head.weight", "head.bias"]
        assert net.head.weight.abs().max() < 0.1             # the fresh one: DeiT's initialisation


def test_pre_logits_leave_no_head(tmp_path):
    """A head behind a further layer is not a head on the features."""
    state = random_weights(ViT(SMALL)).state_dict() | {"pre_logits.fc.weight": torch.ones(64, 64), "pre_logits.fc.bias": torch.ones(64)}
    assert load_pretrained(saved(tmp_path / "a.pth", state), num_classes=7, heads=4, **quiet)[1]["head"] == "replaced"
    theirs = torchvision_vit(representation_size=64)
    assert load_pretrained(saved(tmp_path / "a.pth", theirs.state_dict()), 7, heads=4, **quiet)[1]["head"] == "replaced"


def test_into_a_net_that_is_there(tmp_path):
    ours = random_weights(ViT(SMALL))
    net = ViT(ViTConfig(64, 8, 64, 3, 4, 5))
    same, report = load_pretrained(saved(tmp_path / "a.pth", ours.state_dict()), net=net, **quiet)
    assert same is net and report["head"] == "replaced"
    assert torch.equal(net.pos_embed, resized_pos_embed(ours.pos_embed, 8, 1)) and torch.equal(net.cls_token, ours.cls_token)


def test_heads_of_published_sizes():
    """Width / 64, but 80 per head in ViT-H."""
    for width, heads in ((192, 3), (384, 6), (768, 12), (1024, 16), (1280, 16)):
        with torch.device("meta"):
            assert vit_state(ViT(ViTConfig(32, 16, width, 1, heads)).state_dict())[1].heads == heads


# ----------------------------------------------------------------------------------------------------------------------
# Normalisation
# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, classes, expected, why", [
    ("deit_tiny.pth", 7, IMAGENET, "DeiT"), ("a.pth", 21843, HALF, "ImageNet-21k"), ("a.pth", 7, HALF, "assumed")])
def test_normalisation_by_names(name, classes, expected, why, tmp_path):
    state = ViT(ViTConfig(32, 8, 64, 1, 1, classes)).state_dict()
    report = load_pretrained(saved(tmp_path / name, state), **quiet)[1]
    assert (report["mean"], report["std"]) == expected and why in report["normalisation"]


@pytest.mark.parametrize("weights, beside, content", [
    ("a.pth", "a.json", {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "architecture": {"heads": 4}}),
    ("model.safetensors", "config.json", {"architecture": "vit", "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}),
    ("pytorch_model.bin", "preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]})])
def test_normalisation_told_beside_the_file(weights, beside, content, tmp_path):
    """Our card; timm's and Hugging Face's JSON, under the names that their hub gives them."""
    (tmp_path / beside).write_text(json.dumps(content))
    other = "config.json" if weights == "a.pth" else "a.json"
    (tmp_path / other).write_text('{"heads": 9, "mean": 0}')                         # of another model: not looked at
    report = load_pretrained(saved(tmp_path / weights, ViT(ViTConfig(32, 8, 64, 1, 4)).state_dict()), heads=4, **quiet)[1]
    assert (report["mean"], report["std"], report["normalisation"]) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "as told with the weights")


@pytest.mark.parametrize("card", [{"mean": [0.1], "std": [1, 1, 1]}, {"mean": [0, 0, 0], "std": [1, 0, 1]}, {"mean": "abc", "std": [1, 1, 1]},
                                  {"heads": "4"}, {"mean": [0, 0, math.nan], "std": [1, 1, 1]}])
def test_card_that_makes_no_sense(card, tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps(card))
    refuses(capsys, lambda: load_pretrained(saved(tmp_path / "a.pth", ViT(SMALL).state_dict())), "a.pth", "3 finite numbers")


# ----------------------------------------------------------------------------------------------------------------------
# Position embeddings
# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prefix, grid", [(1, 7), (0, 2), (1, (3, 5)), (2, 6)])
def test_position_embeddings_are_interpolated_channel_by_channel(prefix, grid):
    torch.manual_seed(0)
    pos = torch.randn(1, prefix + 16, 3)
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    out = resized_pos_embed(pos, grid, prefix)
    assert torch.equal(out[:, :prefix], pos[:, :prefix])
    for d in range(3):
        image = pos[0, prefix:, d].view(1, 1, 4, 4)          # patch r, c of the grid is row 4 r + c
        expected = F.interpolate(image, size=(rows, columns), mode="bicubic", antialias=True, align_corners=False)
        torch.testing.assert_close(out[0, prefix:, d], expected.flatten(), atol=1e-6, rtol=0)


def test_position_embeddings_of_the_same_grid_are_untouched():
    pos = torch.randn(1, 17, 8)
    assert resized_pos_embed(pos, 4, 1) is pos


def test_a_constant_and_a_direction_survive_resizing():
    """What is the same at all patches stays so; what grows from left to right still does, and rows do not become columns."""
    ramp = torch.arange(4.0).repeat(4)
    pos = torch.stack([torch.full((16,), 5.0), ramp], -1)[None]
    out = resized_pos_embed(pos, 8, 0)[0].view(8, 8, 2)
    torch.testing.assert_close(out[..., 0], torch.full((8, 8), 5.0))
    assert (out[:, 1:, 1] > out[:, :-1, 1]).all() and torch.allclose(out[0, :, 1], out[7, :, 1])


@pytest.mark.parametrize("size", [16, 64])
def test_another_image_size(size, tmp_path):
    ours = random_weights(ViT(SMALL))
    net, _ = load_pretrained(saved(tmp_path / "a.pth", ours.state_dict()), image_size=size, heads=4, **quiet)
    assert net.config.image_size == size and net.pos_embed.shape == (1, (size // 8) ** 2 + 1, 64)
    assert net(torch.randn(1, 3, size, size)).shape == (1, 7)


# ----------------------------------------------------------------------------------------------------------------------
# Out, and in again
# ----------------------------------------------------------------------------------------------------------------------

CARD = {"task": "birds", "method": "tal", "hypernet": "0123abcd", "class_names": ["a", "b"],
        "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1)}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("format, pool", [("timm", "token"), ("timm", "avg"), ("torchvision", "token")])
def test_round_trip(format, pool, suffix, tmp_path):
    config = ViTConfig(32, 8, 32, 2, 4, 7, pool=pool)
    ours = random_weights(ViT(config))
    path = tmp_path / "out" / f"a{suffix}"
    export_weights(ours.state_dict(), config, path, format, CARD)
    assert sorted(os.listdir(path.parent)) == ["a.json", f"a{suffix}"]
    card = json.loads((path.parent / "a.json").read_text())
    assert ViTConfig(**card["architecture"]) == config and card["format"] == format
    assert {key: card[key] for key in CARD} == {**CARD, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}
    if format == "timm":
        same_state(read_weights(path)[0], ours.state_dict())
    net, report = load_pretrained(path, **quiet)             # the 4 heads are known from the card
    assert net.config == config and (report["source"], report["head"], report["unexpected"]) == (format, "kept", [])
    assert (report["mean"], report["std"]) == (CARD["mean"], CARD["std"])
    same_state(net.state_dict(), ours.state_dict())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_torchvision_loads_ours_strictly(suffix, tmp_path):
    ours = random_weights(ViT(SMALL))
    export_weights(ours.state_dict(), SMALL, tmp_path / f"a{suffix}", "torchvision")
    theirs = eval(json.loads((tmp_path / "a.json").read_text())["build"]).eval()
    state = read_safetensors(tmp_path / "a.safetensors") if suffix == ".safetensors" else torch.load(tmp_path / "a.pt", weights_only=True)
    theirs.load_state_dict(state, strict=True)
    same_logits(theirs, ours)


def test_half_precision_goes_out_as_float32(tmp_path):
    ours = random_weights(ViT(SMALL)).bfloat16()
    export_weights(ours.state_dict(), SMALL, tmp_path / "a.safetensors")
    same_state(read_safetensors(tmp_path / "a.safetensors"), ours.float().state_dict())


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_timm_loads_ours_strictly(pool, suffix, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed; names and logits are those of torchvision's oracle above")
    config = ViTConfig(32, 8, 64, 3, 4, 7, pool=pool)
    ours = random_weights(ViT(config))
    export_weights(ours.state_dict(), config, tmp_path / f"a{suffix}", "timm")
    theirs = eval(json.loads((tmp_path / "a.json").read_text())["build"], {"timm": timm}).eval()
    theirs.load_state_dict(read_weights(tmp_path / f"a{suffix}")[0], strict=True)
    same_logits(theirs, ours)
    (tmp_path / "a.json").unlink()
    state = random_weights(theirs).state_dict()
    net, _ = load_pretrained(saved(tmp_path / "theirs.pth", state), heads=4, **quiet)
    same_logits(net, theirs)


@pytest.mark.parametrize("grid", [7, (3, 5)])
def test_position_embeddings_as_timm_resizes_them(grid):
    timm = pytest.importorskip("timm", reason="timm is not installed; torch's interpolation is the oracle above")
    pos = torch.randn(1, 17, 8)
    theirs = timm.layers.resample_abs_pos_embed(pos, [grid, grid] if isinstance(grid, int) else list(grid), num_prefix_tokens=1)
    torch.testing.assert_close(resized_pos_embed(pos, grid, 1), theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("way", ["save_pretrained", "state_dict"])
def test_logits_equal_hugging_faces(way, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed; its names are written out above")
    theirs = random_weights(transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256, image_size=32, patch_size=8, num_labels=7,
        layer_norm_eps=1e-6)))
    if way == "save_pretrained":                             # the heads stand in config.json
        theirs.save_pretrained(tmp_path)
        net, _ = load_pretrained(tmp_path / "model.safetensors", **quiet)
    else:
        net, _ = load_pretrained(saved(tmp_path / "a.pt", theirs.state_dict()), heads=4, **quiet)
    same_logits(net, lambda x: theirs(x).logits)


def test_distilled_deit_of_hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed; DeiT's own names are tested above")
    theirs = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=256, image_size=32, patch_size=8, num_labels=7))
    theirs.save_pretrained(tmp_path)
    net, report = load_pretrained(tmp_path / "model.safetensors", **quiet)
    assert report["unexpected"] == ["dist_token", "head_dist.bias", "head_dist.weight"] and report["mean"] == IMAGENET[0]
    assert torch.equal(net.head.weight, theirs.state_dict()["cls_classifier.weight"])


# ----------------------------------------------------------------------------------------------------------------------
# safetensors
# ----------------------------------------------------------------------------------------------------------------------

def raw_file(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_safetensors_by_hand(tmp_path):
    """A header of odd length, a scalar, two bytes, a bfloat16: 1.0 is 0x3f80 in the upper half of a float32."""
    header = {"__metadata__": {"made": "by hand"},
              "b": {"dtype": "F32", "shape": [2, 1], "data_offsets": [2, 10]},
              "a": {"dtype": "BF16", "shape": [], "data_offsets": [0, 2]},
              "none": {"dtype": "F32", "shape": [0, 3], "data_offsets": [10, 10]},
              "c": {"dtype": "U8", "shape": [2], "data_offsets": [10, 12]}}
    path = raw_file(tmp_path / "a.safetensors", header, bytes([0x80, 0x3f]) + struct.pack("<2f", 1.5, -2.0) + bytes([7, 255]))
    weights = read_safetensors(path)
    expected = {"a": torch.tensor(1.0, dtype=torch.bfloat16), "b": torch.tensor([[1.5], [-2.0]]), "none": torch.empty(0, 3),
                "c": torch.tensor([7, 255], dtype=torch.uint8)}
    same_state(weights, expected)


def every_type():
    torch.manual_seed(0)
    weights = {kind: (torch.randn(3, 5) * 50).to(dtype) for kind, dtype in common.SAFETENSORS.items()}
    return weights | {"scalar": torch.tensor(2.0), "turned": torch.randn(4, 3).T, "none": torch.empty(0, 2)}


def test_what_is_written_is_valid(tmp_path):
    """Header padded to 8 bytes, spans without gaps, each tensor at a multiple of its item size, and all of it back."""
    weights = every_type()
    write_safetensors(tmp_path / "a.safetensors", weights)
    content = (tmp_path / "a.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8:8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"} and header.keys() == weights.keys()
    at = 0
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        assert begin == at and begin % weights[name].dtype.itemsize == 0 and entry["shape"] == list(weights[name].shape)
        at = end
    assert len(content) == 8 + length + at
    begin, _ = header["turned"]["data_offsets"]
    assert struct.unpack_from("<f", content, 8 + length + begin + 4)[0] == weights["turned"][0, 1]               # rows first
    same_state(read_safetensors(tmp_path / "a.safetensors"), weights)


def test_the_safetensors_package_agrees(tmp_path):
    package = pytest.importorskip("safetensors.torch", reason="safetensors is not installed; the bytes are tested above")
    weights = {n: t.contiguous() for n, t in every_type().items()}
    write_safetensors(tmp_path / "ours.safetensors", weights)
    package.save_file(weights, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    same_state(package.load_file(tmp_path / "ours.safetensors"), weights)
    same_state(read_safetensors(tmp_path / "theirs.safetensors"), weights)


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD_SAFETENSORS = {
    "empty": b"",
    "short": b"\x05\0\0",
    "header cut off": struct.pack("<Q", 100) + b'{"a": 1}',
    "huge header": b"\xff" * 50,
    "not JSON": (b"hello", b""),
    "a list": ([], b""),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, b"\0" * 4),
    "unknown type": ({"a": {**ONE, "dtype": "F8_E4M3"}}, b"\0" * 8),
    "data cut off": ({"a": ONE}, b"\0" * 7),
    "data left over": ({"a": ONE}, b"\0" * 9),
    "shape too large": ({"a": {**ONE, "shape": [3]}}, b"\0" * 8),
    "gap": ({"a": {**ONE, "data_offsets": [4, 12]}}, b"\0" * 12),
    "overlap": ({"a": ONE, "b": {**ONE, "data_offsets": [4, 12]}}, b"\0" * 12),
    "negative shape": ({"a": {**ONE, "shape": [-1, -2]}}, b"\0" * 8),
    "backwards": ({"a": {**ONE, "data_offsets": [0, -8]}}, b"\0" * 8),
    "beyond any memory": ({"a": {**ONE, "shape": [1 << 50], "data_offsets": [0, 1 << 52]}}, b"\0" * 8)}


@pytest.mark.parametrize("kind", BAD_SAFETENSORS)
def test_bad_safetensors(kind, tmp_path, capsys):
    path, content = tmp_path / "a.safetensors", BAD_SAFETENSORS[kind]
    path.write_bytes(content) if isinstance(content, bytes) else raw_file(path, *content)
    refuses(capsys, lambda: read_weights(path), "a.safetensors is not a readable file of weights")


# ----------------------------------------------------------------------------------------------------------------------
# Bad files
# ----------------------------------------------------------------------------------------------------------------------

def changed(path, drop=(), **more):
    state = ViT(SMALL).state_dict() | {n.replace("__", "."): t for n, t in more.items()}
    torch.save({n: t for n, t in state.items() if n not in drop}, path)


def cut(path):
    changed(path)
    path.write_bytes(path.read_bytes()[:3000])


BAD_FILES = {
    "missing": (lambda path: None, "no file of weights"),
    "a folder": (lambda path: path.mkdir(), "no file of weights"),
    "empty": (lambda path: path.write_bytes(b""), "not a readable file of weights"),
    "truncated": (cut, "not a readable file of weights"),
    "text": (lambda path: path.write_text("hello\n" * 100), "not a readable file of weights"),
    "code in a pickle": (lambda path: torch.save({"model": {}, "args": Foreign()}, path), "with code in it"),
    "a tensor": (lambda path: torch.save(torch.ones(2), path), "no weights by name"),
    "no tensors": (lambda path: torch.save({"model": {"epoch": 3}}, path), "no weights by name"),
    "tensors by number": (lambda path: torch.save({0: torch.ones(2)}, path), "holds no ViTs"),
    "a ResNet": (lambda path: torch.save(torchvision.models.resnet18().state_dict(), path), "holds no ViTs"),
    "Swin": (lambda path: torch.save(torchvision.models.swin_t().state_dict(), path), "holds no ViTs"),
    "two": (lambda path: torch.save({f"{a}.{n}": t for a in ("student", "teacher") for n, t in ViT(SMALL).state_dict().items()}, path),
            "holds 2 ViTs"),
    "NaN": (lambda path: changed(path, blocks__1__norm1__bias=torch.full((64,), math.nan)),
            "blocks.1.norm1.bias has values that are not finite"),
    "a block missing": (lambda path: changed(path, ["blocks.1.norm1.bias"]), "lacks blocks.1.norm1.bias"),
    "no blocks": (lambda path: torch.save({n: t for n, t in ViT(SMALL).state_dict().items() if "blocks" not in n}, path), "no plain ViT"),
    "no position embeddings": (lambda path: changed(path, ["pos_embed"]), "no plain ViT"),
    "not a square": (lambda path: changed(path, pos_embed=torch.ones(1, 16, 64)), "no plain ViT"),
    "grey images": (lambda path: changed(path, patch_embed__proj__weight=torch.ones(64, 1, 8, 8)), "no plain ViT"),
    "layer scale": (lambda path: changed(path, blocks__0__ls1__gamma=torch.ones(64), blocks__0__ls2__gamma=torch.ones(64)),
                    "also has blocks.0.ls1.gamma and 1 more"),
    "mean of patches beside a class token": (lambda path: changed(path, ["norm.weight", "norm.bias"], fc_norm__weight=torch.ones(64),
                                                                  fc_norm__bias=torch.ones(64)), "lacks norm.weight"),
    "another width": (lambda path: changed(path, norm__weight=torch.ones(32)), "another shape of norm.weight"),
    "half of q, k, v": (lambda path: torch.save({n: t for n, t in hugging_face(ViT(SMALL).state_dict()).items() if "key" not in n}, path),
                        "another shape of blocks.0.attn.qkv.weight"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, words = BAD_FILES[kind]
    make(tmp_path / "a.pth")
    before = snapshot(tmp_path)
    refuses(capsys, lambda: load_pretrained(tmp_path / "a.pth", heads=4), words, "a.pth")
    assert snapshot(tmp_path) == before                      # and nothing ran


@pytest.mark.parametrize("config, words", [
    (ViTConfig(32, 8, 128, 3, 4, 7), "width 64, but 128"), (ViTConfig(32, 8, 64, 2, 4, 7), "depth 3, but 2"),
    (ViTConfig(32, 16, 64, 3, 4, 7), "patch size 8, but 16"), (ViTConfig(32, 8, 64, 3, 4, 7, "avg"), "pool token, but avg"),
    (ViTConfig(32, 8, 64, 3, 4, 7, mlp_ratio=2), "mlp ratio 4, but 2")])
def test_a_net_of_another_architecture_is_left_alone(config, words, tmp_path, capsys):
    changed(tmp_path / "a.pth")
    net = ViT(config)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    refuses(capsys, lambda: load_pretrained(tmp_path / "a.pth", net=net), words, "a.pth")
    same_state(net.state_dict(), before)


def test_a_swin_of_another_width_is_left_alone(tmp_path, capsys):
    torch.save(torchvision.models.swin_t().state_dict(), tmp_path / "a.pth")
    net = torchvision.models.swin_b()
    before = net.features[0][0].weight.clone()
    refuses(capsys, lambda: load_pretrained(tmp_path / "a.pth", net=net), "does not fit this SwinTransformer")
    assert torch.equal(net.features[0][0].weight, before)


def test_unknown_heads(tmp_path, capsys):
    torch.save(ViT(ViTConfig(32, 8, 48, 1, 6)).state_dict(), tmp_path / "a.pth")
    refuses(capsys, lambda: load_pretrained(tmp_path / "a.pth"), "width 48", "a.json")


@pytest.mark.parametrize("name, format, change, words", [
    ("a.pt", "onnx", {}, "timm or torchvision"), ("a.onnx", "timm", {}, "a.onnx"), ("a.json", "timm", {}, "a.json"),
    ("a.pt", "torchvision", {"pool": "avg"}, "--format timm"), ("a.pt", "timm", {"depth": 2}, "also has blocks.2"),
    ("a.pt", "timm", {"num_classes": 3}, "another shape of head.weight"), ("a.pt", "timm", {"depth": 4}, "lacks blocks.3")])
def test_exports_that_cannot_be(name, format, change, words, tmp_path, capsys):
    (tmp_path / name).write_text("old")
    before, state = snapshot(tmp_path), ViT(SMALL).state_dict()
    refuses(capsys, lambda: export_weights(state, ViTConfig(**{**vars(SMALL), **change}), tmp_path / name, format), words)
    state["norm.bias"][3] = math.inf
    refuses(capsys, lambda: export_weights(state, SMALL, tmp_path / "a.pt"), "not finite")
    assert snapshot(tmp_path) == before
