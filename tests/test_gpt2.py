"""GPT-2: the network against a forward pass written by hand, weights in and out, its graph and predicted
parameters, Table 6's metrics, runs of --modality text."""
import json
import math

import pytest
import torch

import common
import data
import tal
from common import GPT2, GPT2Config, export_gpt2, load_gpt2
from conftest import (CPU, MERGES, assert_same_run, finish, gpt2_files, kill_when, log_of, reached, refuses,
                      saved, snapshot)

SMALL = GPT2Config(vocab=50, context=12, width=16, depth=2, heads=4, num_classes=3)


def random_weights(net, seed=0):
    """Biases and norms away from 0 and 1, so that each of them matters."""
    with torch.no_grad():
        for p in net.parameters():
            generator = torch.Generator().manual_seed(seed + p.numel())
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (p.ndim == 1) * 0.1)
    return net


def published(net):
    """State under the names and in the layout of the published file: matrices (in, out), masks as buffers."""
    state, c = {}, net.config
    for name, p in net.state_dict().items():
        is_conv1d = name.split(".")[-2] in ("c_attn", "c_proj", "c_fc") and p.ndim == 2
        state[name] = p.T.contiguous() if is_conv1d else p
    for i in range(c.depth):
        state[f"h.{i}.attn.bias"] = torch.ones(1, 1, c.context, c.context)
    return state


def by_hand(net, ids):
    """Radford et al. 2019, one text and one head at a time, from the published layout: features (T, D)."""
    w, c, T = published(net), net.config, len(ids)

    def norm(x, name):
        z = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return z * w[name + ".weight"] + w[name + ".bias"]

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))
    x = torch.stack([w["wte.weight"][i] + w["wpe.weight"][t] for t, i in enumerate(ids)])
    for layer in range(c.depth):
        h, size = f"h.{layer}.", c.width // c.heads
        qkv = norm(x, h + "ln_1") @ w[h + "attn.c_attn.weight"] + w[h + "attn.c_attn.bias"]
        q, k, v = qkv.split(c.width, 1)
        heads = []
        for a in range(c.heads):
            part = slice(a * size, (a + 1) * size)
            rows = []
            for t in range(T):
                attention = torch.softmax(q[t, part] @ k[:t + 1, part].T / math.sqrt(size), 0)
                rows.append(attention @ v[:t + 1, part])
            heads.append(torch.stack(rows))
        x = x + torch.cat(heads, 1) @ w[h + "attn.c_proj.weight"] + w[h + "attn.c_proj.bias"]
        z = gelu(norm(x, h + "ln_2") @ w[h + "mlp.c_fc.weight"] + w[h + "mlp.c_fc.bias"])
        x = x + z @ w[h + "mlp.c_proj.weight"] + w[h + "mlp.c_proj.bias"]
    return norm(x, "ln_f")


TEXTS = [[3, 7, 7, 1, 20], [5], [9, 8, 2, 3, 4, 6, 30, 11, 12, 13, 14, 48]]


def padded(texts, eos=49):
    T = max(map(len, texts))
    return torch.tensor([t + [eos] * (T - len(t)) for t in texts])


def test_classifier_reads_the_last_token_that_is_no_padding():
    net = random_weights(GPT2(SMALL))
    logits = net(padded(TEXTS))
    for row, ids in zip(logits, TEXTS):
        torch.testing.assert_close(row, net.score.weight @ by_hand(net, ids)[-1], atol=1e-5, rtol=1e-5)


def test_language_model_is_tied_to_the_token_table():
    net = random_weights(GPT2(GPT2Config(50, 12, 16, 2, 4)))
    logits = net(torch.tensor([TEXTS[0]]))[0]
    torch.testing.assert_close(logits, by_hand(net, TEXTS[0]) @ net.wte.weight.T, atol=1e-4, rtol=1e-5)
    assert "score.weight" not in net.state_dict() and "lm_head.weight" not in net.state_dict()


def test_what_stands_behind_the_text_does_not_matter():
    net = random_weights(GPT2(SMALL))
    ids = padded(TEXTS)
    torch.testing.assert_close(net(ids)[:2], net(ids[:2, :6]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("depth, count", [
    (12, 124_439_808), (3, 60_648_960), (6, 81_912_576), (9, 103_176_192)])
def test_published_sizes(depth, count):
    with torch.device("meta"):
        net = GPT2(GPT2Config(depth=depth))
    assert sum(p.numel() for p in net.parameters()) == count


def test_language_loss_against_a_loop():
    net = random_weights(GPT2(GPT2Config(50, 12, 16, 2, 4)))
    ids = padded(TEXTS)
    log_p = net(ids).log_softmax(-1)
    terms = []
    for row, text in enumerate(TEXTS):
        for t, wanted in enumerate((text + [49])[1:12]):
            terms.append(-log_p[row, t, wanted])
    torch.testing.assert_close(tal.language_loss(ids, net(ids)), torch.stack(terms).mean())


# Weights in and out

QUIET = dict(say=lambda line: None)


@pytest.mark.parametrize("prefix, suffix", [("", ".bin"), ("transformer.", ".bin"), ("", ".safetensors")])
def test_published_files_load(prefix, suffix, tmp_path):
    net = random_weights(GPT2(GPT2Config(50, 12, 64, 2, 1)))
    state = {prefix + n: t.contiguous() for n, t in published(net).items()}
    path = saved(tmp_path / f"gpt2{suffix}", state)
    loaded, report = load_gpt2(path, **QUIET)
    assert loaded.config == net.config and report["head"] == "none"
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), net.state_dict().values()))
    classifier, report = load_gpt2(path, num_classes=3, **QUIET)
    assert report["head"] == "replaced" and classifier.score.weight.shape == (3, 64)


def test_heads_are_told_by_config_json(tmp_path):
    net = GPT2(GPT2Config(50, 12, 64, 2, 4))
    path = saved(tmp_path / "pytorch_model.bin", published(net))
    (tmp_path / "config.json").write_text(json.dumps({"n_head": 4}))
    assert load_gpt2(path, **QUIET)[0].config.heads == 4


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_exported_and_loaded_again(suffix, tmp_path):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed")
    net = random_weights(GPT2(SMALL))
    export_gpt2(net, tmp_path / f"net{suffix}", {"task": "x"})
    loaded, report = load_gpt2(tmp_path / f"net{suffix}", num_classes=3, **QUIET)
    assert report["head"] == "kept" and loaded.config == net.config
    torch.testing.assert_close(loaded(padded(TEXTS)), net(padded(TEXTS)))
    (card,) = tmp_path.glob("*.json")
    card = json.loads(card.read_text())
    assert card["n_head"] == 4 and card["task"] == "x" and "num_labels=3" in card["build"]


@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("wpe.weight"), "is no GPT-2"), (lambda s: s.pop("h.1.ln_2.bias"), "lacks h.1.ln_2.bias"),
    (lambda s: s.update({"lm_head.weight": torch.zeros(50, 64)}), "not its token table"),
    (lambda s: s.update({"ln_f.weight": torch.full((64,), math.nan)}), "not finite")])
def test_bad_files(change, words, tmp_path):
    state = published(GPT2(GPT2Config(50, 12, 64, 2, 1)))
    change(state)
    with refuses(words):
        load_gpt2(saved(tmp_path / "bad.bin", state))


def test_impossible_sizes():
    for sizes in (dict(width=10, heads=3), dict(depth=0), dict(vocab=0)):
        with pytest.raises(common.InputError):
            GPT2Config(**sizes)


def test_same_as_transformers(tmp_path):
    """Both of Hugging Face's GPT-2 classes on the same random weights."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    about = dict(vocab_size=50, n_positions=12, n_embd=16, n_layer=2, n_head=4, pad_token_id=49)
    net = random_weights(GPT2(SMALL))
    export_gpt2(net, tmp_path / "net.bin")
    config = transformers.GPT2Config(**about, num_labels=3)
    theirs = transformers.GPT2ForSequenceClassification(config).eval()
    theirs.load_state_dict(torch.load(tmp_path / "net.bin", weights_only=True), strict=True)
    torch.testing.assert_close(theirs(padded(TEXTS)).logits, net(padded(TEXTS)), atol=1e-4, rtol=1e-4)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**about)).eval()
    torch.save(theirs.state_dict(), tmp_path / "lm.bin")
    (tmp_path / "lm.bin.json").write_text('{"heads": 4}')
    ours, ids = load_gpt2(tmp_path / "lm.bin", **QUIET)[0], torch.tensor([TEXTS[2]])
    torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-4, rtol=1e-4)


# Graph and predicted parameters

def test_graph_of_one_block():
    net = GPT2(GPT2Config(50, 12, 16, 1, 4, 3))
    graph = tal.encode_graph(net)
    block = ["ln", "bias", "conv", "bias", "msa", "conv", "bias", "sum",
             "ln", "bias", "conv", "bias", "conv", "bias", "sum"]
    ops = [tal.OPS[o] for o in graph.ops]
    assert ops == ["input", "pos_enc", "pos_enc", "sum", *block, "ln", "bias", "conv"]
    assert [n for n in graph.names if n] == [n for n, _ in net.named_parameters()]
    assert graph.inputs[1] == [0] and graph.inputs[2] == [] and graph.inputs[3] == [1, 2]
    assert graph.inputs[11] == [3, 10] and graph.inputs[18] == [11, 17] and graph.inputs[21] == [20]
    assert graph.shapes[8] == (4,) and graph.joins == {11, 18} and graph.heads == [21]


def small_hypernet(tokens=5000, channels=64):
    torch.manual_seed(0)
    return tal.Hypernet(tal.HypernetConfig(
        width=32, layers=2, heads=4, max_distance=12, rank=8, mlp=(16, 16), channels=channels, kernels=4,
        classes=10, tokens=tokens))


def test_every_token_has_rows_of_its_own():
    """D20, no tiling: with more tokens than channels in the basis, no two rows of the table agree."""
    net = GPT2(GPT2Config(5000, 12, 16, 2, 4, 3))
    weights = small_hypernet().predict(tal.encode_graph(net))
    assert {n: w.shape for n, w in weights.items()} == {n: p.shape for n, p in net.named_parameters()}
    table = weights["wte.weight"]
    assert len(table.round(decimals=4).unique(dim=0)) == 5000
    assert abs(table.detach().pow(2).mean().item() - 1) < 1e-3              # looked up, not multiplied: rms 1


def test_a_language_model_has_no_head_of_its_own():
    """Its last matrix is the token table, which is tied: no other matrix is taken for rows of classes."""
    net = GPT2(GPT2Config(50, 12, 16, 2, 4))
    graph = tal.encode_graph(net)
    assert graph.heads == [] and graph.num_classes == 0
    weights = small_hypernet().predict(graph)
    assert {n: w.shape for n, w in weights.items()} == {n: p.shape for n, p in net.named_parameters()}


def test_more_tokens_than_known():
    with refuses("knows 40 tokens"):
        small_hypernet(tokens=40).predict(tal.encode_graph(GPT2(SMALL)))


@pytest.mark.parametrize("dataset, low, high", [("GPTs-1K", 3, 9), ("drawn-GPTs", 2, 6)])
def test_architectures(dataset, low, high):
    shape = dict(vocab=257, context=64, num_classes=2)
    configs = tal.architectures(dataset, shape)
    assert configs == tal.architectures(dataset, shape) and len(configs) == 1000
    assert (min(c.depth for c in configs), max(c.depth for c in configs)) == (low, high)
    if dataset == "GPTs-1K":                # LoGAH's ranges: deep ones are narrow; 50M parameters at most
        widths = {d: {c.width for c in configs if c.depth == d} for d in range(3, 10)}
        assert (min(widths[3]), max(widths[3])) == (176, 256)
        assert (min(widths[4]), max(widths[5])) == (128, 176)
        assert min(widths[7]) >= 72 and max(widths[9]) <= 176 and {c.heads for c in configs} == {8}


# Table 6's metrics

def test_f1_and_matthews_by_hand():
    y = torch.tensor([1, 1, 1, 0, 0, 0, 0, 1])
    predicted = torch.tensor([1, 0, 1, 1, 0, 0, 0, 1])
    tp, fp, fn, tn = 3, 1, 1, 3
    assert tal.f1(predicted, y) == pytest.approx(100 * 2 * tp / (2 * tp + fp + fn))
    phi = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert tal.matthews(predicted, y) == pytest.approx(100 * phi)
    assert tal.matthews(torch.ones(8, dtype=torch.int64), y) == 0
    assert tal.f1(torch.zeros(8, dtype=torch.int64), y) == 0
    assert tal.matthews(1 - y, y) == pytest.approx(-100)


# Runs of --modality text

TEXT = ("--modality text --context 32 --hypernet tiny --ancestry-size 16x1x2 --batch-size 100 "
        "--ancestry-epochs 0.01 --tune-epochs 0.04 --tune-tasks sentiment,paraphrases --split val "
        "--save-every 1 --device cpu").split()


@pytest.fixture(scope="module")
def tuned_text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    tal.main([*TEXT, "--stage", "tune", "--output", str(folder)])
    return folder


def test_text_from_nothing(tuned_text):
    """Ancestry, one training on the tasks (no pretraining), and Table 6: four depths, the majority class."""
    assert {p.name for p in tuned_text.glob("*.pt")} == {"ancestry.pt", "tune.pt"}
    table = json.loads((tuned_text / "untrained-tune-val.json").read_text())
    assert list(table) == ["3-GPT2", "6-GPT2", "9-GPT2*", "12-GPT2*", "majority"]
    majority = table["majority"]
    assert list(majority) == ["sentiment", "paraphrases", "paraphrases F1", "average"]
    y = torch.tensor([label for *_, label in data.written("paraphrases")["val"]])
    share = float(y.double().mean())                   # always "paraphrase": precision is the share, recall 1
    assert majority["paraphrases"] == pytest.approx(100 * share)
    assert majority["paraphrases F1"] == pytest.approx(100 * 2 * share / (1 + share))
    assert majority["average"] == pytest.approx((majority["sentiment"] + 100 * share) / 2)


def test_text_losses_by_hand(tuned_text, monkeypatch):
    """One step's Eq. (6) from its parts: predicted parameters, the ancestry's features, the predicted M."""
    monkeypatch.setattr(tal, "PREDPARAM", 0)
    model = tal.load(tuned_text)
    task = data.load_texts(["sentiment"], context=32)["sentiment"]
    ids, y = task.batch("train", 0, 10)
    config = tal.architectures("drawn-GPTs", tal.input_shape(model.trained))[0]
    I, objective = model.embedding("sentiment"), tal.Objective(model.ancestry, 0.9)
    loss, cls, aux = tal.tal_step(model.hypernet, config, task, ids, y, I, objective, CPU)
    net = tal.customize(model.hypernet, config, I, 2)
    M = model.hypernet.predict(tal.encode_graph(net), I, 2, 16)["M"]
    p = (net.encode(ids) @ M.T).softmax(-1)
    kl = (p * (p / model.ancestry.encoder.encode(ids).softmax(-1)).log()).sum(-1).mean()
    ce = -net(ids).log_softmax(-1)[torch.arange(10), y].mean()
    expected = torch.stack([0.9 * kl + 0.1 * ce, ce, kl])
    torch.testing.assert_close(torch.stack([loss, cls, aux]), expected, atol=1e-5, rtol=1e-5)


def test_text_killed_and_in_two_processes(tuned_text, tmp_path):
    """Killed in the ancestry, whose loss is that of text alone: bitwise the run that was never stopped. Two
    processes: the same losses."""
    shared = [*TEXT, "--stage", "train", "--data", "sentiment", "--train-images", "200"]
    parts = tmp_path / "parts"
    kill_when(lambda: reached(parts, "ancestry", 2), [*shared, "--output", parts], tmp_path / "out")
    finish([*shared, "--output", parts], tmp_path / "out")
    for stage in ("ancestry", "tune"):
        assert_same_run(parts, tuned_text, stage)
    two = [*shared, "--ancestry", tuned_text / "ancestry.pt", "--output", tmp_path / "two"]
    finish(two, tmp_path / "out", processes=2)
    (train,) = [path.stem for path in parts.glob("train-*.pt")]
    for stage in ("tune", train):
        for a, b in zip(log_of(parts, stage), log_of(tmp_path / "two", stage), strict=True):
            for key in a.keys() & {"loss", "loss_aux"}:
                assert a[key] == pytest.approx(b[key], abs=1e-4)


def test_text_customize_and_train(tuned_text, tmp_path, capsys):
    tal.main([*TEXT, "--stage", "customize", "--data", "sentiment", "--output", str(tuned_text),
              "--depth", "5", "--size", "40x5", "--export", str(tmp_path / "net.bin")])
    net = load_gpt2(tmp_path / "net.bin", num_classes=2)[0]
    assert net.config == GPT2Config(257, 32, 40, 5, 5, 2)
    (card,) = tmp_path.glob("net*.json")
    task = data.load_texts(["sentiment"], context=32)["sentiment"]
    untrained = json.loads(card.read_text())["untrained"]
    assert common.accuracy(net, task, "val", "cpu") == pytest.approx(untrained)
    same = tal.load(tuned_text).customize(GPT2Config(257, 32, 40, 5, 5), images="sentiment")
    assert torch.allclose(same.score.weight, net.score.weight, atol=1e-6)
    tal.main([*TEXT, "--stage", "train", "--method", "random", "--data", "sentiment", "--train-images", "400",
              "--output", str(tmp_path / "run")])
    assert log_of(tmp_path / "run", "train")[-1]["trained"] > 0 and "sentiment" in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [
    ("--tokens {out}/nowhere", "vocab.json|tokenizers"), ("--method ghn3", "--modality text has"),
    ("--stage plot", "not for --modality"), ("--tune-tasks digits", "digits"), ("--context 16", "context 32"),
    ("--stage evaluate --data mrpc", "mrpc"), ("--ancestry {image}", "was not trained on text"),
    ("--stage customize --data sentiment --format timm --export {out}/a.bin", "transformers"),
    ("--stage customize --data sentiment --export {out}/a.txt", ".safetensors")])
def test_bad_text_runs(flags, words, tuned_text, tuned, tmp_path):
    before = snapshot(tuned_text)
    flags = flags.format(out=tmp_path, image=tuned / "ancestry.pt").split()
    with refuses(words):
        tal.main([*TEXT, "--stage", "tune", "--output", str(tuned_text), "--data-dir", str(tmp_path), *flags])
    assert snapshot(tuned_text) == before


def test_images_do_not_start_from_text(tuned_text):
    with refuses("--modality text, not image"):
        tal.main(["--stage", "evaluate", "--output", str(tuned_text), "--device", "cpu"])


def test_published_gpt2_is_an_ancestry(tmp_path):
    """A published file with the vocabulary it was trained with: what --preset paper asks for, small."""
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    folder = gpt2_files(tmp_path / "gpt2", MERGES)
    published_net = random_weights(GPT2(GPT2Config(267, 128, 64, 1, 1)))
    file = saved(tmp_path / "gpt2" / "pytorch_model.bin", published(published_net))
    flags = [*TEXT, "--stage", "tune", "--ancestry", str(file), "--output", str(tmp_path / "run")]
    tal.main([*flags, "--tokens", str(folder)])
    model = tal.load(tmp_path / "run")
    assert model.hypernet.config.tokens == 267 and model.ancestry.width == 64
    task = data.load_texts(["sentiment"], context=32, tokens=str(folder))["sentiment"]
    with torch.no_grad():
        mean = published_net.encode(task.normalise(task.examples("train", 2000)[0])).mean(0)
    expected = 8 * mean / mean.norm()                        # D4
    torch.testing.assert_close(model.embedding("sentiment"), expected, atol=1e-4, rtol=1e-4)
    with refuses("knows 267 tokens, the data has 257"):
        tal.main(flags)
    with refuses("texts of 128"):
        tal.main([*flags, "--tokens", str(folder), "--context", "200"])
