"""Weights in and out: logits against torchvision, timm and Hugging Face, what is said of them, bad files."""
import argparse
import json
import math
import os
import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from common import (GPT2, GPT2Config, HALF, IMAGENET, ViT, ViTConfig, export_gpt2, export_weights, load_gpt2,
                    load_pretrained, read_weights, renormalised, resized_pos_embed, save_checkpoint,
                    vit_state, weight_selection)
from conftest import (SMALL, Foreign, hugging_face, random_weights, refuses, same_state, saved, snapshot,
                      torchvision_vit)

SAFETENSORS = pytest.param(".safetensors", marks=pytest.mark.optional)


def quiet(line):
    pass


@torch.no_grad()
def same_logits(a, b, size=32, atol=1e-5):
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    expected = b(x)
    assert expected.std() > 0.1                              # a difference would show
    torch.testing.assert_close(a(x), expected, atol=atol, rtol=0)


def said_of(path, **how):
    """The lines that are printed about a file."""
    lines = []
    load_pretrained(path, say=lines.append, **how)
    return lines


# ------------------------------------------------------------------------------------------------------------
# In: torchvision
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix", [".pth", SAFETENSORS])
def test_logits_equal_torchvisions(suffix, tmp_path):
    theirs = torchvision_vit()
    path = saved(tmp_path / f"a{suffix}", theirs.state_dict())
    net, report = load_pretrained(path, heads=4, say=quiet)
    assert net.config == SMALL
    same_logits(net, theirs)
    assert report == {"source": "torchvision", "loaded": 44, "missing": [], "unexpected": [], "head": "kept",
                      "mean": IMAGENET[0], "std": IMAGENET[1], "normalisation": report["normalisation"]}


def older_names(state):
    """Those of torchvision's published files, which torchvision renames while it loads them."""
    older = {n.replace("mlp.0.", "mlp.linear_1."): t for n, t in state.items()}
    return {n.replace("mlp.3.", "mlp.linear_2."): t for n, t in older.items()}


def test_older_names_of_torchvision(tmp_path):
    older = older_names(torchvision_vit().state_dict())
    assert "encoder.layers.encoder_layer_0.mlp.linear_1.weight" in older
    again = torchvision_vit()
    again.load_state_dict(dict(older), strict=True)          # torchvision itself is the oracle
    net, _ = load_pretrained(saved(tmp_path / "a.pth", older), heads=4, say=quiet)
    same_logits(net, again)


def test_vit_b_16():
    torch.manual_seed(0)
    theirs = torchvision.models.VisionTransformer(64, 16, 2, 12, 768, 3072).eval()   # of two layers
    for p in theirs.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.02)
    state, config, _ = vit_state(theirs.state_dict())
    assert config == ViTConfig(64, 16, 768, 2, 12, 1000)     # 12 heads from the width
    ours = ViT(config).eval()
    ours.load_state_dict(state, strict=True)
    same_logits(ours, theirs, 64)


def test_swin_t(tmp_path):
    """torchvision's own class: its file, one with the older names of an MLP, and one for other classes."""
    theirs = random_weights(torchvision.models.swin_t(num_classes=5))
    for content in (theirs.state_dict(), older_names(theirs.state_dict())):
        path = saved(tmp_path / "swin_t.pth", content)
        net, report = load_pretrained(path, net=torchvision.models.swin_t(num_classes=5).eval(), say=quiet)
        same_logits(net, theirs, 64)
        assert (report["source"], report["head"], report["mean"]) == ("torchvision", "kept", IMAGENET[0])
    net = torchvision.models.swin_t(num_classes=3).eval()
    fresh = net.head.weight.clone()
    report = load_pretrained(tmp_path / "swin_t.pth", net=net, say=quiet)[1]
    assert report["head"] == "replaced" and torch.equal(net.head.weight, fresh)
    net.head = theirs.head
    same_logits(net, theirs, 64)


# ------------------------------------------------------------------------------------------------------------
# In: timm, DeiT, Hugging Face, this code
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prefix", ["vit.", ""])
def test_hugging_face_names(prefix, tmp_path):
    ours = random_weights(ViT(SMALL))
    path = saved(tmp_path / "a.bin", hugging_face(ours.state_dict(), prefix))
    net, report = load_pretrained(path, heads=4, say=quiet)
    same_state(net.state_dict(), ours.state_dict())
    assert report["source"] == "Hugging Face" and (report["mean"], report["std"]) == HALF
    assert "a guess" in report["normalisation"]


def test_hugging_face_encoder_without_a_head(tmp_path):
    ours = random_weights(ViT(SMALL))
    state = {n: t for n, t in hugging_face(ours.state_dict(), "").items() if "classifier" not in n}
    state |= {"pooler.dense.weight": torch.ones(64, 64), "pooler.dense.bias": torch.ones(64)}
    net, report = load_pretrained(saved(tmp_path / "a.bin", state), num_classes=7, heads=4, say=quiet)
    assert report["head"] == "replaced" and report["loaded"] == 42
    assert report["unexpected"] == ["pooler.dense.weight", "pooler.dense.bias"]
    assert report["missing"] == ["head.weight", "head.bias"]
    net.head = ours.head
    same_logits(net, ours)


@pytest.mark.parametrize("wraps", [
    ("model",), ("state_dict",), ("model_ema",), ("ema",), ("net",), ("module",), ("teacher",),
    ("ema", "module"), ("teacher", "model")])
def test_wrapped_as_training_scripts_do(wraps, tmp_path):
    """DeiT's {"model": ...} with its flags, timm's {"state_dict": ...}; names of DDP and torch.compile."""
    ours = random_weights(ViT(SMALL))
    content = {f"module._orig_mod.{n}": t for n, t in ours.state_dict().items()}
    for key in reversed(wraps):
        content = {key: content}
    content |= {"epoch": 3, "args": argparse.Namespace(lr=0.1)}
    net, report = load_pretrained(saved(tmp_path / "a.pth", content), heads=4, say=quiet)
    same_state(net.state_dict(), ours.state_dict())
    assert report["mean"] == (IMAGENET if wraps[-1] == "model" else HALF)[0]
    assert "a guess" in report["normalisation"]


def test_an_averaged_model(tmp_path):
    """torch's own wrapper counts in a tensor beside the weights."""
    ours = random_weights(ViT(SMALL))
    averaged = torch.optim.swa_utils.AveragedModel(ours).state_dict()
    assert "n_averaged" in averaged
    net, _ = load_pretrained(saved(tmp_path / "a.pth", averaged), heads=4, say=quiet)
    same_state(net.state_dict(), ours.state_dict())


@pytest.mark.parametrize("names", ["timm", "Hugging Face"])
def test_a_distillation_token_is_refused(names, tmp_path):
    """The class token attends to it, so without it the features would be others."""
    state = ViT(SMALL).state_dict()
    state["pos_embed"] = torch.ones(1, 18, 64)
    token = {"dist_token": torch.ones(1, 1, 64)}
    if names == "Hugging Face":
        state = hugging_face(state)
        token = {"vit.embeddings.distillation_token": torch.ones(1, 1, 64)}
    with refuses("no plain ViT: .*none for distillation"):
        load_pretrained(saved(tmp_path / "a.pth", state | token), heads=4)


@pytest.mark.parametrize("pooling", ["token", "avg"])
def test_own_checkpoints(pooling, tmp_path):
    """What Training writes, heads and all; and an encoder with heads beside it, as TAL's ancestry is."""
    config = ViTConfig(32, 8, 32, 2, 4, 7, pooling=pooling)
    ours = random_weights(ViT(config))
    save_checkpoint(tmp_path / "a.pt", stage="train", extra={"config": vars(config)}, model=ours.state_dict())
    net, report = load_pretrained(tmp_path / "a.pt", say=quiet)
    assert net.config == config
    assert report["mean"] is report["std"] is None and "each task's own" in report["normalisation"]
    same_logits(net, ours)
    state = {f"encoder.{n}": t for n, t in ours.state_dict().items() if "head" not in n}
    state["heads.birds.weight"] = torch.ones(2, 32)
    extra = {"config": vars(config), "mean": [0.1, 0.2, 0.3], "std": [0.1, 0.2, 1]}
    save_checkpoint(tmp_path / "b.pt", extra=extra, model=state)
    net, report = load_pretrained(tmp_path / "b.pt", num_classes=7, say=quiet)
    assert report["unexpected"] == ["heads.birds.weight"]
    assert (report["mean"], report["std"]) == ((0.1, 0.2, 0.3), (0.1, 0.2, 1))
    net.head = ours.head
    same_logits(net, ours)


def test_half_precision_becomes_float32():
    ours = random_weights(ViT(SMALL)).bfloat16()
    same_state(vit_state(ours.state_dict(), 4)[0], ours.float().state_dict())


@pytest.mark.parametrize("classes, head", [(7, "kept"), (None, "kept"), (3, "replaced")])
def test_head_by_class_count(classes, head, tmp_path):
    ours = random_weights(ViT(SMALL))
    torch.manual_seed(3)
    path = saved(tmp_path / "a.pth", ours.state_dict())
    net, report = load_pretrained(path, num_classes=classes, heads=4, say=quiet)
    assert report["head"] == head and net.config.num_classes == (classes or 7)
    x = torch.ones(1, 3, 32, 32)
    assert torch.equal(net.encode(x), ours.encode(x))
    if head == "kept":
        assert torch.equal(net.head.weight, ours.head.weight)
    else:
        assert report["unexpected"] == report["missing"] == ["head.weight", "head.bias"]
        assert net.head.weight.abs().max() < 0.1             # the fresh one: DeiT's initialisation


def test_into_a_net_that_is_there(tmp_path):
    ours = random_weights(ViT(SMALL))
    net = ViT(ViTConfig(64, 8, 64, 3, 4, 5))
    same, report = load_pretrained(saved(tmp_path / "a.pth", ours.state_dict()), net=net, say=quiet)
    assert same is net and report["head"] == "replaced"
    assert torch.equal(net.pos_embed, resized_pos_embed(ours.pos_embed, 8, 1))
    assert torch.equal(net.cls_token, ours.cls_token)


def test_heads_of_published_sizes():
    """Width / 64, but 80 per head in ViT-H."""
    for width, heads in ((192, 3), (384, 6), (768, 12), (1024, 16), (1280, 16)):
        with torch.device("meta"):
            assert vit_state(ViT(ViTConfig(32, 16, width, 1, heads)).state_dict())[1].heads == heads


# ------------------------------------------------------------------------------------------------------------
# In: what is said of weights
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, classes, expected, why", [
    ("deit_tiny.pth", 7, IMAGENET, "a guess: as DeiT's"),
    ("a.pth", 21843, HALF, "a guess: as ViTs' of ImageNet-21k"),
    ("a.pth", 7, HALF, "a guess: as most ViTs'")])
def test_normalisation_by_names(name, classes, expected, why, tmp_path):
    state = ViT(ViTConfig(32, 8, 64, 1, 1, classes)).state_dict()
    report = load_pretrained(saved(tmp_path / name, state), say=quiet)[1]
    assert (report["mean"], report["std"]) == expected
    assert why in report["normalisation"] and f"{name}.json" in report["normalisation"]


OURS = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


@pytest.mark.parametrize("weights, beside, content", [
    ("a.pth", "a.pth.json", {**OURS, "architecture": {"heads": 4}}),
    ("model.pth", "config.json", {"architecture": "vit", "pretrained_cfg": OURS}),
    ("pytorch_model.bin", "preprocessor_config.json",
     {"image_mean": OURS["mean"], "image_std": OURS["std"]})])
def test_normalisation_told_beside_the_file(weights, beside, content, tmp_path):
    """Our card; timm's and Hugging Face's JSON, under the names that their hub gives them."""
    (tmp_path / beside).write_text(json.dumps(content))
    other = "config.json" if weights == "a.pth" else "a.pth.json"
    (tmp_path / other).write_text('{"heads": 9, "mean": 0}')                         # of another model
    path = saved(tmp_path / weights, ViT(ViTConfig(32, 8, 64, 1, 4)).state_dict())
    report = load_pretrained(path, heads=4, say=quiet)[1]
    assert (report["mean"], report["std"]) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert report["normalisation"] == "as told with the weights"


@pytest.mark.parametrize("said, mean, std", [
    ({"image_mean": 0.5, "image_std": 0.25}, (0.5,) * 3, (0.25,) * 3),               # one number for three
    ({"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, (0.0,) * 3, (1.0,) * 3)])
def test_normalisation_of_hugging_faces_processors(said, mean, std, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    path = saved(tmp_path / "model.bin", hugging_face(ViT(SMALL).state_dict()))
    report = load_pretrained(path, heads=4, say=quiet)[1]
    assert (report["mean"], report["std"]) == (mean, std)


@pytest.mark.parametrize("card", [
    {"mean": [0.1]}, {"std": [1, 0, 1]}, {"mean": "abc"}, {"mean": [0, 0, math.nan]}, {"mean": [True] * 3},
    {"mean": [123.7, 116.3, 103.5], "std": [58.4, 57.1, 57.4]}])
def test_a_normalisation_that_makes_no_sense(card, tmp_path):
    (tmp_path / "a.pth.json").write_text(json.dumps(card))
    with refuses("a.pth has .* 3 finite numbers each, mean from 0 to 1"):
        load_pretrained(saved(tmp_path / "a.pth", ViT(SMALL).state_dict()))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\\xff"])
def test_a_broken_card(text, tmp_path):
    (tmp_path / "a.pth.json").write_bytes(text.encode("latin-1"))
    with refuses("a.pth.json is not readable JSON; mend or remove it"):
        load_pretrained(saved(tmp_path / "a.pth", ViT(SMALL).state_dict()))


@pytest.mark.parametrize("config, words", [
    ({"hidden_act": "gelu"}, None), ({"hidden_act": "relu"}, "hidden_act 'relu'"),
    ({"layer_norm_eps": 1e-12}, None), ({"layer_norm_eps": 1e-5}, "layer_norm_eps 1e-05"),
    ({"image_size": 32, "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 256}, None),
    ({"image_size": [16, 64]}, r"image_size \[16, 64\]"), ({"num_hidden_layers": 12}, "num_hidden_layers 12"),
    ({"hidden_size": 128}, "hidden_size 128"), ({"do_rescale": False}, "do_rescale False"),
    ({"model_args": {"act_layer": "quick_gelu"}}, "act_layer 'quick_gelu'"),
    ({"pooling": "avg"}, "pooling 'avg'"), ({"num_attention_heads": 4.5}, "num_attention_heads 4.5"),
    ({"heads": "4"}, "heads '4'"), ({"heads": 0}, "heads 0")])
def test_a_configuration_of_another_network(config, words, tmp_path):
    """What it says and this ViT does not do is not passed over."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = saved(tmp_path / "model.bin", hugging_face(ViT(SMALL).state_dict()))
    if words is None:
        load_pretrained(path, heads=4, say=quiet)
    else:
        with refuses(f"what is said of .*model.bin has {words}"):
            load_pretrained(path)


def test_a_runs_own_settings_say_nothing_of_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"preset": "drawn", "pooling": "avg", "image_size": 64}))
    load_pretrained(saved(tmp_path / "model.pt", ViT(SMALL).state_dict()), heads=4, say=quiet)


def test_what_shapes_do_not_tell_is_said_to_be_a_guess(tmp_path):
    path = saved(tmp_path / "a.pth", ViT(SMALL).state_dict())
    loaded, guess, normalisation = said_of(path)
    assert "guesses: 1 heads, a square grid, token pooling; else say" in guess and "a.pth.json" in guess
    assert "a guess" in normalisation
    assert "guesses: a square grid, token pooling;" in said_of(path, heads=4)[1]
    card = {"heads": 4, "pooling": "token", "image_size": 32, **OURS}
    (tmp_path / "a.pth.json").write_text(json.dumps(card))
    assert len(said_of(path)) == 2


# ------------------------------------------------------------------------------------------------------------
# In: position embeddings, normalisation, weight selection
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prefix, grid", [(1, 7), (0, 2), (1, (3, 5)), (2, 6)])
def test_position_embeddings_are_interpolated_channel_by_channel(prefix, grid):
    torch.manual_seed(0)
    pos = torch.randn(1, prefix + 16, 3)
    size = (grid, grid) if isinstance(grid, int) else grid
    out = resized_pos_embed(pos, grid, prefix)
    assert torch.equal(out[:, :prefix], pos[:, :prefix])
    for d in range(3):
        image = pos[0, prefix:, d].view(1, 1, 4, 4)          # patch r, c of the grid is row 4 r + c
        expected = F.interpolate(image, size, mode="bicubic", antialias=True, align_corners=False)
        torch.testing.assert_close(out[0, prefix:, d], expected.flatten(), atol=1e-6, rtol=0)


def test_position_embeddings_of_the_same_grid_are_untouched():
    pos = torch.randn(1, 17, 8)
    assert resized_pos_embed(pos, 4, 1) is pos


def test_a_constant_and_a_direction_survive_resizing():
    """What is the same at all patches stays so; what grows from left to right still does."""
    ramp = torch.arange(4.0).repeat(4)
    pos = torch.stack([torch.full((16,), 5.0), ramp], -1)[None]
    out = resized_pos_embed(pos, 8, 0)[0].view(8, 8, 2)
    torch.testing.assert_close(out[..., 0], torch.full((8, 8), 5.0))
    assert (out[:, 1:, 1] > out[:, :-1, 1]).all() and torch.allclose(out[0, :, 1], out[7, :, 1])


@pytest.mark.optional
@pytest.mark.parametrize("grid", [7, (3, 5)])
def test_position_embeddings_as_timm_resizes_them(grid):
    timm = pytest.importorskip("timm", reason="timm is not installed; torch's interpolation stands above")
    pos = torch.randn(1, 17, 8)
    size = [grid, grid] if isinstance(grid, int) else list(grid)
    theirs = timm.layers.resample_abs_pos_embed(pos, size, num_prefix_tokens=1)
    torch.testing.assert_close(resized_pos_embed(pos, grid, 1), theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [16, 64])
def test_another_image_size(size, tmp_path):
    path = saved(tmp_path / "a.pth", random_weights(ViT(SMALL)).state_dict())
    net, _ = load_pretrained(path, image_size=size, heads=4, say=quiet)
    assert net.config.image_size == size and net.pos_embed.shape == (1, (size // 8) ** 2 + 1, 64)
    assert net(torch.randn(1, 3, size, size)).shape == (1, 7)


def test_renormalised_networks_see_the_same_images():
    net, again = random_weights(ViT(SMALL)), ViT(SMALL).eval()
    again.load_state_dict(renormalised(net.state_dict(), HALF, IMAGENET))
    pixels = torch.rand(3, 3, 32, 32)
    (m, s), (M, S) = ([torch.tensor(t).view(3, 1, 1) for t in pair] for pair in (HALF, IMAGENET))
    with torch.no_grad():
        torch.testing.assert_close(again((pixels - M) / S), net((pixels - m) / s), atol=1e-4, rtol=0)


def test_weight_selection_takes_evenly_spaced_elements():
    """8 of 64 rows: every eighth; the third layer of three stays behind; the head stays as it is."""
    large, small = ViT(ViTConfig(32, 8, 64, 3, 4, 7)), ViT(ViTConfig(32, 8, 8, 2, 4, 7))
    head = small.head.weight.clone()
    weight_selection(small, large.state_dict())
    for layer in range(2):
        theirs = large.blocks[layer].mlp.fc1.weight
        assert torch.equal(small.blocks[layer].mlp.fc1.weight, theirs[::8, ::8])
    assert torch.equal(small.pos_embed, large.pos_embed[..., ::8]) and torch.equal(small.head.weight, head)


# ------------------------------------------------------------------------------------------------------------
# Out, and in again
# ------------------------------------------------------------------------------------------------------------

CARD = {"task": "birds", "class_names": ["a", "b"], "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1)}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", SAFETENSORS])
@pytest.mark.parametrize("format, pooling", [("timm", "token"), ("timm", "avg"), ("torchvision", "token")])
def test_round_trip(format, pooling, suffix, tmp_path):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    config = ViTConfig(32, 8, 32, 2, 4, 7, pooling=pooling)
    ours = random_weights(ViT(config))
    path = tmp_path / "out" / f"a{suffix}"
    export_weights(ours.state_dict(), config, path, format, CARD)
    assert sorted(os.listdir(path.parent)) == [f"a{suffix}", f"a{suffix}.json"]
    card = json.loads((path.parent / f"a{suffix}.json").read_text())
    assert ViTConfig(**card["architecture"]) == config and card["format"] == format
    assert {key: card[key] for key in CARD} == {**CARD, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}
    if format == "timm":
        same_state(read_weights(path)[0], ours.state_dict())
    net, report = load_pretrained(path, say=quiet)           # the 4 heads are known from the card
    assert net.config == config
    assert (report["source"], report["head"], report["unexpected"]) == (format, "kept", [])
    assert (report["mean"], report["std"]) == (CARD["mean"], CARD["std"])
    same_state(net.state_dict(), ours.state_dict())


def test_every_file_has_a_card_of_its_own(tmp_path):
    """net.pt and net.pth of other heads; a run's config.json beside config.pt; a card that is no card."""
    state = random_weights(ViT(SMALL)).state_dict()
    (tmp_path / "config.json").write_text("{}")
    export_weights(state, SMALL, tmp_path / "config.pt")
    assert (tmp_path / "config.json").read_text() == "{}"
    two = ViTConfig(32, 8, 64, 3, 2, 7)
    export_weights(state, SMALL, tmp_path / "net.pt")
    export_weights(state, two, tmp_path / "net.pth")
    nets = [load_pretrained(tmp_path / name, say=quiet)[0] for name in ("net.pt", "net.pth")]
    assert [net.config for net in nets] == [SMALL, two]
    export_weights(state, two, tmp_path / "net.pt")          # over its own earlier card
    (tmp_path / "other.pt.json").write_text('{"mean": 0.5}')
    before = snapshot(tmp_path)
    with refuses("other.pt.json, where the card of .* is a file of something else; choose another --export"):
        export_weights(state, SMALL, tmp_path / "other.pt")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("suffix", [".pt", SAFETENSORS])
def test_torchvision_loads_ours_strictly(suffix, tmp_path):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    ours = random_weights(ViT(SMALL))
    path = tmp_path / f"a{suffix}"
    export_weights(ours.state_dict(), SMALL, path, "torchvision")
    theirs = eval(json.loads((tmp_path / f"a{suffix}.json").read_text())["build"]).eval()
    theirs.load_state_dict(read_weights(path)[0], strict=True)
    same_logits(theirs, ours)


def test_half_precision_goes_out_as_float32(tmp_path):
    ours = random_weights(ViT(SMALL)).bfloat16()
    export_weights(ours.state_dict(), SMALL, tmp_path / "a.pt")
    same_state(torch.load(tmp_path / "a.pt", weights_only=True), ours.float().state_dict())


@pytest.mark.optional
@pytest.mark.parametrize("pooling", ["token", "avg"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_timm_loads_ours_strictly(pooling, suffix, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed; torchvision's oracle stands above")
    config = ViTConfig(32, 8, 64, 3, 4, 7, pooling=pooling)
    ours = random_weights(ViT(config))
    path = tmp_path / f"a{suffix}"
    export_weights(ours.state_dict(), config, path, "timm")
    theirs = eval(json.loads((tmp_path / f"a{suffix}.json").read_text())["build"], {"timm": timm}).eval()
    theirs.load_state_dict(read_weights(path)[0], strict=True)
    same_logits(theirs, ours)
    state = random_weights(theirs).state_dict()
    net, _ = load_pretrained(saved(tmp_path / "theirs.pth", state), heads=4, say=quiet)
    same_logits(net, theirs)


@pytest.mark.optional
@pytest.mark.parametrize("way", ["save_pretrained", "state_dict"])
def test_logits_equal_hugging_faces(way, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed; names: above")
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256, image_size=32,
        patch_size=8, num_labels=7, layer_norm_eps=1e-6)
    theirs = random_weights(transformers.ViTForImageClassification(config))
    if way == "save_pretrained":                             # the heads stand in config.json
        theirs.save_pretrained(tmp_path)
        net, _ = load_pretrained(tmp_path / "model.safetensors", say=quiet)
    else:
        net, _ = load_pretrained(saved(tmp_path / "a.pt", theirs.state_dict()), heads=4, say=quiet)
    same_logits(net, lambda x: theirs(x).logits)


@pytest.mark.optional
def test_sharded_weights_of_hugging_face_are_called_that(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed; names: below")
    config = transformers.ViTConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=1)
    theirs = transformers.ViTModel(config)
    theirs.save_pretrained(tmp_path, max_shard_size="200KB")
    for path in (tmp_path, min(tmp_path.glob("*.safetensors"))):
        with refuses("sharded"):
            read_weights(path)


def test_sharded_weights_by_their_names(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    for path in (tmp_path, tmp_path / "model-00001-of-00002.safetensors", tmp_path / "a-1-of-2.bin"):
        with refuses("weights are in several files .sharded.; save them in one"):
            read_weights(path)


def test_safetensors_without_the_package(tmp_path, monkeypatch):
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.safetensors").write_bytes(b"")
    with refuses("need a package: pip install safetensors"):
        read_weights(tmp_path / "a.safetensors")
    with refuses("need a package: pip install safetensors"):
        export_weights(ViT(SMALL).state_dict(), SMALL, tmp_path / "b.safetensors")
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.optional
@pytest.mark.parametrize("content", [b"", b"\x05\0\0", b"\xff" * 50, b"\x02" + 7 * b"\0" + b"[]"])
def test_bad_safetensors(content, tmp_path):
    pytest.importorskip("safetensors")
    (tmp_path / "a.safetensors").write_bytes(content)
    with refuses("a.safetensors is not a readable file of weights"):
        read_weights(tmp_path / "a.safetensors")


# ------------------------------------------------------------------------------------------------------------
# Bad files
# ------------------------------------------------------------------------------------------------------------

def changed(path, drop=(), **more):
    state = ViT(SMALL).state_dict() | {n.replace("__", "."): t for n, t in more.items()}
    torch.save({n: t for n, t in state.items() if n not in drop}, path)


def cut(path):
    changed(path)
    path.write_bytes(path.read_bytes()[:3000])


def without(path, words, state):
    torch.save({n: t for n, t in state.items() if words not in n}, path)


def two(path):
    state = ViT(SMALL).state_dict()
    torch.save({f"{whose}.{n}": t for whose in ("student", "other") for n, t in state.items()}, path)


def odd_query(path):
    state = hugging_face(ViT(SMALL).state_dict())
    state["vit.encoder.layer.0.attention.attention.query.weight"] = torch.ones(64, 32)
    torch.save(state, path)


BIAS = "blocks__1__norm1__bias"
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
    "a ResNet": (lambda path: saved(path, torchvision.models.resnet18().state_dict()), "holds no ViTs"),
    "Swin": (lambda path: saved(path, torchvision.models.swin_t().state_dict()), "holds no ViTs"),
    "two": (two, "holds 2 ViTs"),
    "NaN": (lambda path: changed(path, **{BIAS: torch.full((64,), math.nan)}),
            "blocks.1.norm1.bias has values that are not finite"),
    "whole numbers": (lambda path: changed(path, **{BIAS: torch.ones(64, dtype=torch.int64)}),
                      "whole numbers in blocks.1.norm1.bias"),
    "complex": (lambda path: changed(path, **{BIAS: torch.ones(64, dtype=torch.cfloat)}), "sparse or"),
    "sparse": (lambda path: changed(path, **{BIAS: torch.ones(64).to_sparse()}), "sparse or complex"),
    "a block missing": (lambda path: changed(path, ["blocks.1.norm1.bias"]), "lacks blocks.1.norm1.bias"),
    "no blocks": (lambda path: without(path, "blocks", ViT(SMALL).state_dict()), "no plain ViT"),
    "no position embeddings": (lambda path: changed(path, ["pos_embed"]), "no plain ViT"),
    "not a square": (lambda path: changed(path, pos_embed=torch.ones(1, 16, 64)), "no plain ViT"),
    "grey images": (lambda path: changed(path, patch_embed__proj__weight=torch.ones(64, 1, 8, 8)),
                    "no plain ViT"),
    "layer scale": (lambda path: changed(path, blocks__0__ls1__gamma=torch.ones(64)),
                    "also has blocks.0.ls1.gamma"),
    "a layer before the head": (lambda path: changed(path, pre_logits__fc__weight=torch.ones(64, 64)),
                                "also has pre_logits.fc.weight"),
    "the same in torchvision": (
        lambda path: saved(path, torchvision_vit(representation_size=64).state_dict()),
        "also has heads.pre_logits"),
    "mean of patches beside a class token": (
        lambda path: changed(path, ["norm.weight", "norm.bias"], fc_norm__weight=torch.ones(64),
                             fc_norm__bias=torch.ones(64)), "lacks norm.weight"),
    "another width": (lambda path: changed(path, norm__weight=torch.ones(32)), "shape of norm.weight"),
    "a scalar for a head": (lambda path: changed(path, head__weight=torch.tensor(1.0)), "head.weight"),
    "no width": (lambda path: changed(path, patch_embed__proj__weight=torch.ones(0, 3, 8, 8)),
                 "no plain ViT"),
    "q, k, v of other shapes": (odd_query, "lacks blocks.0.attn.qkv.weight"),
    "half of q, k, v": (lambda path: without(path, "key", hugging_face(ViT(SMALL).state_dict())),
                        "another shape of blocks.0.attn.qkv.weight"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, words = BAD_FILES[kind]
    make(tmp_path / "a.pth")
    before = snapshot(tmp_path)
    with refuses(f"a.pth.*{words}|{words}.*a.pth"):
        load_pretrained(tmp_path / "a.pth", heads=4)
    assert snapshot(tmp_path) == before                      # and nothing ran


@pytest.mark.parametrize("config, words", [
    (ViTConfig(32, 8, 128, 3, 4, 7), "width 64, but 128"), (ViTConfig(32, 8, 64, 2, 4, 7), "depth 3, but 2"),
    (ViTConfig(32, 16, 64, 3, 4, 7), "patch size 8, but 16"),
    (ViTConfig(32, 8, 64, 3, 4, 7, "avg"), "pooling token, but avg"),
    (ViTConfig(32, 8, 64, 3, 4, 7, mlp_ratio=2), "mlp ratio 4, but 2")])
def test_a_net_of_another_architecture_is_left_alone(config, words, tmp_path):
    changed(tmp_path / "a.pth")
    net = ViT(config)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    with refuses(words):
        load_pretrained(tmp_path / "a.pth", net=net)
    same_state(net.state_dict(), before)


def test_a_swin_of_another_width_is_left_alone(tmp_path):
    saved(tmp_path / "a.pth", torchvision.models.swin_t().state_dict())
    net = torchvision.models.SwinTransformer([4, 4], 48, [2, 2, 6, 2], [3, 6, 12, 24], [7, 7])
    before = net.features[0][0].weight.clone()
    with refuses("does not fit this SwinTransformer"):
        load_pretrained(tmp_path / "a.pth", net=net)
    assert torch.equal(net.features[0][0].weight, before)


def test_unknown_heads(tmp_path):
    saved(tmp_path / "a.pth", ViT(ViTConfig(32, 8, 48, 1, 6)).state_dict())
    with refuses("width 48 does not tell the number of heads; say .heads. in .*a.pth.json"):
        load_pretrained(tmp_path / "a.pth")


@pytest.mark.parametrize("name, format, change, words", [
    ("a.pt", "onnx", {}, "unknown --format 'onnx'"), ("a.onnx", "timm", {}, "a.onnx"),
    ("a.json", "timm", {}, "a.json"), ("a.pt", "torchvision", {"pooling": "avg"}, "--format timm"),
    ("a.pt", "timm", {"depth": 2}, "also has blocks.2"),
    ("a.pt", "timm", {"num_classes": 3}, "another shape of head.weight"),
    ("a.pt", "timm", {"depth": 4}, "lacks blocks.3")])
def test_exports_that_cannot_be(name, format, change, words, tmp_path):
    (tmp_path / name).write_text("old")
    before, state = snapshot(tmp_path), ViT(SMALL).state_dict()
    with refuses(words):
        export_weights(state, ViTConfig(**{**vars(SMALL), **change}), tmp_path / name, format)
    state["norm.bias"][3] = math.inf
    with refuses("not finite"):
        export_weights(state, SMALL, tmp_path / "a.pt")
    assert snapshot(tmp_path) == before


# ------------------------------------------------------------------------------------------------------------
# GPT-2: what is said of it (its logits: test_gpt2.py)
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config, words", [
    ({"activation_function": "gelu_new", "n_embd": 64, "n_layer": 2}, None),
    ({"activation_function": "relu"}, "activation_function 'relu'"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon 1e-06"), ({"n_layer": 12}, "n_layer 12"),
    ({"n_inner": None}, None), ({"tie_word_embeddings": False}, "tie_word_embeddings False")])
def test_a_configuration_of_another_gpt2(config, words, tmp_path):
    net = random_weights(GPT2(GPT2Config(50, 16, 64, 2, 4)))
    export_gpt2(net, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    if words is None:
        same_state(load_gpt2(tmp_path / "pytorch_model.bin", say=quiet)[0].state_dict(), net.state_dict())
    else:
        with refuses(f"pytorch_model.bin has {words}"):
            load_gpt2(tmp_path / "pytorch_model.bin")


def test_heads_of_a_gpt2_are_said_to_be_a_guess(tmp_path):
    net = random_weights(GPT2(GPT2Config(50, 16, 64, 2, 4)))
    said = []
    export_gpt2(net, tmp_path / "a.bin")
    load_gpt2(tmp_path / "a.bin", say=said.append)
    (tmp_path / "a.bin.json").unlink()
    load_gpt2(tmp_path / "a.bin", say=said.append)
    assert "4 heads," in said[0] and "1 heads (a guess; else say \"heads\" in" in said[1]
