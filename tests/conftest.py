"""What test files share: runs of seconds and what they leave, processes and kills, files from elsewhere."""
import contextlib
import inspect
import json
import multiprocessing
import os
import re
import runpy
import signal
import socket
import sys
import time
import unittest.mock
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import common

ROOT = Path(__file__).resolve().parent.parent
CPU = common.Machine(torch.device("cpu"), None)
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": PATHS}

# Flags of tal.py for a run of seconds.
TINY = (
    "--patch 16 --hypernet tiny --ancestry-size 16x1x8 --tune-tasks pedestrian,digits "
    "--ancestry-tasks base,pedestrian,digits --ancestry-epochs 0.01 --pretrain-epochs 0.03 "
    "--tune-epochs 0.08 --train-epochs 0.1 --batch-size 200 --split val --save-every 1 --device cpu").split()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """A test that skips itself for want of a package is optional, also where it does not say so."""
    for item in items:
        if "importorskip" in inspect.getsource(item.function):
            item.add_marker(pytest.mark.optional)


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """One cache of drawn data for all runs of a session."""
    import data
    folder = tmp_path_factory.mktemp("data")
    data.load_many([data.BASE, "pedestrian", "digits", "clothing"], str(folder), 32)
    return folder


@pytest.fixture(scope="session")
def tuned(drawn, tmp_path_factory):
    """A run directory with ancestry.pt, pretrain.pt and tune.pt."""
    import tal
    folder = tmp_path_factory.mktemp("tuned")
    tal.main([*TINY, "--stage", "tune", "--data-dir", str(drawn), "--output", str(folder)])
    return folder


# ------------------------------------------------------------------------------------------------------------
# Bad input, and what a run leaves
# ------------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def refuses(match):
    """The block ends with an InputError of one line in which the regular expression is found."""
    with pytest.raises(common.InputError, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)


class Foreign:
    """Unpickling this object would write a file: nothing in a file of weights may run."""

    def __reduce__(self):
        return os.system, ("touch ran-from-a-pickle",)


def snapshot(folder):
    """{file: bytes} of everything below a folder."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def log_of(folder, stage):
    """The lines of a stage without its speed."""
    lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        record.pop("images_per_s", None)
        record.pop("texts_per_s", None)
    return [record for record in records if record["stage"] == stage]


def weights_of(folder, stage):
    return torch.load(Path(folder) / f"{stage}.pt", weights_only=True)["model"]


def same_state(a, b):
    """The same names, types and bits."""
    assert a.keys() == b.keys()
    for name in b:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def assert_same_run(folder, reference, stage):
    """Bitwise the same weights and the same log."""
    same_state(weights_of(folder, stage), weights_of(reference, stage))
    assert log_of(folder, stage) == log_of(reference, stage)


# ------------------------------------------------------------------------------------------------------------
# Processes: kills, and several that train together
# ------------------------------------------------------------------------------------------------------------

# New processes are forked from one that has imported torch, which takes seconds, and has never used it.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["conftest", "tal", "adaptive_learngene", "torch._dynamo"])
PATIENCE = 600                                               # seconds; of a hang, where the machine is slow


def fork(function, *args, log, **environment):
    """A function in a process of its own; what it prints is added to the file `log`."""
    process = FORKS.Process(target=called, args=(str(log), environment, function, args))
    with unittest.mock.patch.dict(os.environ, ENV):          # for the process that all are forked from
        process.start()
    return process


def called(log, environment, function, args):
    with open(log, "a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.environ.update(environment)
    function(*args)


def run_script(script, argv):
    sys.argv = [script, *argv]
    runpy.run_path(script, run_name="__main__")


def start(argv, log, script=ROOT / "tal.py", processes=1):
    """The processes of a script: one, or several with what torchrun tells them."""
    argv = [str(word) for word in argv]
    if processes == 1:
        return [fork(run_script, str(script), argv, log=log)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    return [fork(run_script, str(script), argv, log=log, **shared, RANK=str(rank), LOCAL_RANK=str(rank))
            for rank in range(processes)]


def exit_codes(processes):
    """Waits for the end of processes; those that hang are killed."""
    until = time.monotonic() + PATIENCE
    try:
        for process in processes:
            process.join(max(0, until - time.monotonic()))
        return [process.exitcode for process in processes]   # None: it hung
    finally:
        for process in processes:
            process.kill()


def finish(argv, log, code=0, **how):
    """Runs a script to its end, which must have this exit code in every process."""
    codes = exit_codes(start(argv, log, **how))
    assert set(codes) == {code}, (codes, Path(log).read_text()[-3000:])


def reached(folder, stage, step):
    """Whether the log has a whole line of this stage at this step or later."""
    path = Path(folder) / "log.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    records = [json.loads(line) for line in lines]
    return any(r["stage"] == stage and r.get("step", 0) >= step for r in records)


def kill_when(now, argv, log, **how):
    """Starts a run and kills it as soon as now() is true."""
    (process,) = start(argv, log, **how)
    try:
        while not now():
            assert process.exitcode is None, Path(log).read_text()[-3000:]
            time.sleep(0.02)
    finally:
        process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


# A script that kills itself: in the update of one step of one stage, in every process or in that of one rank;
# or when a file of this name is written but has not yet got its name (the step is then -1).
DYING = """
import json, os, signal, sys
import common
module, stage, step, rank = json.loads(sys.argv.pop(1))
update, replace, link = common.Training.update, os.replace, os.link

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def dying_update(self, *loss, **values):
    if (self.stage, self.step) == (stage, step) and rank in (None, self.run.machine.rank):
        die()
    return update(self, *loss, **values)

def dying(rename):
    def renamed(source, target, **more):
        if step == -1 and os.path.basename(target) == stage + ".pt":
            die()
        return rename(source, target, **more)
    return renamed

common.Training.update = dying_update
os.replace, os.link = dying(replace), dying(link)
common.script(__import__(module).main)
"""


def dying_script(folder, module, stage, step, rank=None):
    """(script, its first argument) like `module`.py ("tal"), but one that kills itself; for `finish`."""
    path = Path(folder) / "dying.py"
    path.write_text(DYING)
    return path, json.dumps([module, stage, step, rank])


def killed_in(stage, step, argv, log, module="tal"):
    """Runs a script that kills itself in this step of this stage (step -1: while STAGE.pt is written)."""
    script, first = dying_script(Path(log).parent, module, stage, step)
    finish([first, *argv], log, code=-signal.SIGKILL, script=script)


# ------------------------------------------------------------------------------------------------------------
# Files from elsewhere
# ------------------------------------------------------------------------------------------------------------

SMALL = common.ViTConfig(32, 8, 64, 3, 4, 7)         # 16 patches of 8 px; 4 heads, more than the width tells
MERGES = ["l o", "lo w", "e r", "Ġ low", "a a", "aa a", "b c", "a b", "# #", "Ã ©"]


def random_weights(net):
    """No zero may hide a tensor that was not loaded."""
    torch.manual_seed(0)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return net.eval()


def saved(path, content):
    """A file of weights by its ending."""
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(content, path)
    else:
        torch.save(content, path)
    return path


def torchvision_vit(config=SMALL, **more):
    return random_weights(torchvision.models.VisionTransformer(
        image_size=config.image_size, patch_size=config.patch_size, num_layers=config.depth,
        num_heads=config.heads, hidden_dim=config.width, mlp_dim=config.mlp_ratio * config.width,
        num_classes=config.num_classes, **more))


HUGGING_FACE = {
    "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm", "head": "classifier",
    "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
}


def hugging_face(state, prefix="vit."):
    """Our names -> Hugging Face's, one line per kind of tensor."""
    out = {}
    for name, tensor in state.items():
        block = re.match(r"blocks\.(\d+)\.", name)
        layer = f"{prefix}encoder.layer.{block[1]}." if block else prefix
        rest = name.removeprefix(block[0]) if block else name
        end = rest.split(".")[-1] if rest.endswith(("weight", "bias")) else ""
        end = f".{end}" if end else ""
        kind = rest.removesuffix(end)
        if kind == "attn.qkv":
            for part, rows in zip(("query", "key", "value"), tensor.tensor_split(3)):
                out[f"{layer}attention.attention.{part}{end}"] = rows.clone()
        else:
            out[("" if kind == "head" else layer) + HUGGING_FACE[kind] + end] = tensor
    assert len(out) == len(state) + 4 * sum("qkv.weight" in name for name in state)
    return out


def byte_symbols():
    """The characters that stand for the 256 bytes in GPT-2's files, in the order of their ids."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return [chr(b) for b in shown] + [chr(256 + k) for k in range(len(hidden))]


def gpt2_files(folder, merges=MERGES, names=("vocab.json", "merges.txt"), **changes):
    """GPT-2's two files with these merges, as "a b"; `changes` of the vocabulary: token -> id or None."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [*byte_symbols(), *(m.replace(" ", "") for m in merges), "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)} | changes
    vocab = {token: number for token, number in vocab.items() if number is not None}
    (folder / names[0]).write_text(json.dumps(vocab), encoding="utf-8")
    (folder / names[1]).write_text("#version: 0.2\n" + "".join(m + "\n" for m in merges), encoding="utf-8")
    return str(folder)


def picture(path, colour, size=(20, 16)):
    """An image of one colour, so that its label can be read off the picture, whatever JPEG leaves of it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def shade(k):
    """The colour of class k in these tests."""
    return (20 * k + 10, 0, 0)


def folders(root, splits, names, each=2, ending="jpg", label=lambda k: k):
    """Class folders below split folders, pictures in the shades of their classes."""
    for split in splits:
        for k, name in enumerate(names):
            for i in range(each):
                picture(root / split / name / f"{split}_{name}_{i}.{ending}", shade(label(k)))


def coco(path, domain, split, labels, classes, offset=10 ** 7, labelled=True):
    """An annotation file of the Visual Decathlon; returns its (file name, label) pairs.

    labels: of the images; classes: names in the order of `categories`; ids as in the devkit, from offset + 1.
    """
    images, annotations = [], []
    for k, label in enumerate(labels):
        name = f"data/{domain}/{split}/{label + 1:04d}/{k:06d}.jpg"
        images.append({"id": offset + k, "file_name": name, "width": 20, "height": 16})
        annotations.append({"id": offset + k, "image_id": offset + k, "category_id": offset + label + 1})
    categories = [{"id": offset + k + 1, "name": c, "supercategory": domain} for k, c in enumerate(classes)]
    content = {"info": {}, "images": images, "licenses": [], "categories": categories}
    content["annotations"] = annotations[::-1] if labelled else []
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Path(path).write_text(json.dumps(content))
    return [(image["file_name"], label) for image, label in zip(images, labels)]


def decathlon(root, domain="gtsrb", images="", test=False, respell=str, classes=("Sign1", "Sign10", "Sign2")):
    """The Visual Decathlon's layout below root; class 0 has no training image, as a subset may have it."""
    for split, labels in (("train", [1, 2, 1, 2]), ("val", [2, 1, 0]), ("test", [0, 1])):
        labelled = test or split != "test"
        name = f"{domain}_{split}{'' if labelled else '_stripped'}.json"
        path = root / "annotations" / name
        for file, label in coco(path, domain, split, labels, classes, labelled=labelled):
            picture(root / images / respell(file), shade(label))


def images(root, classes, each=5, size=lambda i: (40, 30), mode="RGB"):
    """Class folders of random pictures, darker with every class."""
    rng = np.random.default_rng(0)
    for k in range(classes):
        folder = root / f"class {k:04d}"
        folder.mkdir(parents=True)
        for i in range(each):
            width, height = size(i)
            shape = (height, width, 3) if mode == "RGB" else (height, width)
            pixels = rng.integers(0, 256 - 200 * k // classes, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return root
