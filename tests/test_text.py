"""The text half of data.py: GPT-2's tokens against hand-worked merges, tasks of texts, GLUE and IMDB from tiny copies."""
import json
import os
import random
import re
import shutil
import sys

import pytest
import torch

import data
from conftest import MERGES, gpt2_files, refuses

# Vectors of the released vocabulary, which is not part of the repository: GPT2_FILES=folder checks them.
KNOWN = {
    "Hello world": [15496, 995], "Hello, my dog is cute": [15496, 11, 616, 3290, 318, 13779],
    " the quick brown fox": [262, 2068, 7586, 21831], "I've been to 3 cities.\n": [40, 1053, 587, 284, 513, 4736, 13, 198],
    "naïve café 你好 😀": [2616, 38776, 40304, 220, 19526, 254, 25001, 121, 30325, 222],
}
# Letters, numbers (², ½, Ⅳ and Ⅻ are numbers, not digits), marks, separators, astral characters.
ODD = "aZéßж字あ𝒳𐍈07٣²½Ⅳ𝟘.,!?-_'’\"()\u0301\u0308\u200b\u200d\ufeff\x1c\x1f\x00😀🇫    '''\t\n\x85\xa0\u2028\u3000"


# ------------------------------------------------------------------------------------------------------------
# 7. Text: tokens
# ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def tiny(tmp_path):
    pytest.importorskip("tokenizers")
    return data.Tokenizer(gpt2_files(tmp_path / "tiny"))


def pieces(tokenizer, text):
    return [tokenizer.decode([k]) for k in tokenizer.encode(text)]


@pytest.mark.optional
def test_merges_by_hand(tiny):
    assert (tiny.size, tiny.eos) == (267, 266)
    assert pieces(tiny, "low") == ["low"]                   # l o w, lo w, low
    assert pieces(tiny, "lower low slow") == ["low", "er", " low", " ", "s", "low"]
    assert pieces(tiny, "abc") == ["a", "bc"]               # "b c" has the lower rank, though "a b" comes first in the text
    assert pieces(tiny, "ab") == ["ab"]
    assert pieces(tiny, "aaaa") == ["aa", "aa"]             # all places of a pair at once: not aa a a, aaa a
    assert pieces(tiny, "aaaaa") == ["aa", "aaa"]           # aa aa a, then aa a from the left: aa aaa
    assert pieces(tiny, "aaaab") == ["aa", "aa", "b"]       # "a a" comes before "a b"
    assert pieces(tiny, "é##") == ["é", "##"]               # two bytes, one token; a line "# #" is no comment
    assert tiny.encode("low") == [257] and tiny.encode("!") == [0] and tiny.encode(" ") == [220]


@pytest.mark.optional
def test_other_names_of_the_files(tmp_path, tiny):
    other = data.Tokenizer(gpt2_files(tmp_path / "openai", names=("encoder.json", "vocab.bpe")))
    assert other.encode("lower é") == tiny.encode("lower é")


@pytest.mark.optional
@pytest.mark.skipif("GPT2_FILES" not in os.environ, reason="GPT2_FILES names no folder with GPT-2's vocab.json and merges.txt")
def test_released_vocabulary():
    tokenizer = data.Tokenizer(os.environ["GPT2_FILES"])
    assert (tokenizer.size, tokenizer.eos) == (50257, 50256)
    for text, ids in KNOWN.items():
        assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text


def round_trip(tokenizer):
    """Also of a text that spells END out: eos is in none."""
    rng = random.Random(1)
    texts = ["".join(rng.choices([*ODD, data.END, "'ll", "low", "  "], k=rng.randrange(30))) for _ in range(500)]
    for text in ["", data.END, *KNOWN, *texts]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and all(0 <= k < tokenizer.eos for k in ids)
    assert tokenizer.encode_all(texts[:9]) == [tokenizer.encode(text) for text in texts[:9]]
    assert tokenizer.decode([tokenizer.eos]) == data.END


@pytest.mark.optional
def test_round_trip(tiny):
    round_trip(tiny)


def test_bytes():
    tokenizer = data.Tokenizer()
    round_trip(tokenizer)
    assert (tokenizer.size, tokenizer.eos) == (257, 256) and tokenizer.encode("aé") == [97, 195, 169]
    assert tokenizer.decode([195, 120]) == "\ufffdx"


def test_tokens_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with refuses("pip install tokenizers"):
        data.Tokenizer(gpt2_files(tmp_path))


@pytest.mark.optional
def test_bad_tokenizer_files(tmp_path):
    pytest.importorskip("tokenizers")

    def bad(words, spoil=lambda folder: None, **changes):
        gpt2_files(tmp_path, **changes)
        spoil(tmp_path)
        with refuses(f"{words}.*gpt2 on Hugging Face"):
            data.Tokenizer(str(tmp_path))

    bad("no vocab.json or encoder.json", lambda folder: (folder / "vocab.json").unlink())
    bad("no merges.txt or vocab.bpe", lambda folder: (folder / "merges.txt").unlink())
    bad("are not GPT-2's", lambda folder: (folder / "vocab.json").write_text("{"))
    bad("are not GPT-2's", lambda folder: (folder / "vocab.json").write_text("[1, 2]"))
    bad("are not GPT-2's", lambda folder: (folder / "vocab.json").write_text("[" * 100_000))
    bad("'extra' is in one of the two files only", extra=267)
    bad("'low' is in one of the two files only", low=None)
    bad("'<.endoftext.>' is in one of", **{data.END: None})
    bad("with <.endoftext.> last", **{data.END: 0, "!": 266})
    bad("not the numbers from 0", low=700)
    bad("are not GPT-2's", low="257")
    bad("are not GPT-2's", lambda folder: (folder / "merges.txt").write_text("l o w\n"))
    gpt2_files(tmp_path)
    (tmp_path / "merges.txt").write_bytes(b"\xff\xfe")
    with refuses("cannot read .*merges.txt"):
        data.Tokenizer(str(tmp_path))


# Tasks and batches

SPLITS = {"train": [("abc" * (k % 5 + 1), f"x{k}" if k % 2 else None, k % 3) for k in range(23)],
          "val": [("one", None, 0), ("four", None, 2)], "test": [("a long sentence", None, 1)]}


@pytest.fixture
def task():
    return data.text_task("toy", ["a", "b", "c"], "accuracy", SPLITS, data.Tokenizer(), 16)


def text_of(row):
    """What stands in a row of ids, after a look at its padding."""
    length = int((row != 256).sum())
    assert (row[length:] == 256).all()                      # eos only at the right
    return bytes(row[:length].tolist()).decode()


def texts_of(task, split):
    return [text_of(row) for row in task.images[split]]


def test_text_task(task):
    joined = [text if pair is None else f"{text}\n{pair}" for text, pair, _ in SPLITS["train"]]
    assert [text_of(row) for row in task.images["train"]] == [text[:16] for text in joined]
    assert task.images["train"].dtype == torch.int32 and task.images["val"].shape == (2, 16) and task.num_classes == 3
    assert task.labels["train"].tolist() == [label for *_, label in SPLITS["train"]] and task.labels["train"].dtype == torch.int64
    assert task.lengths["val"].tolist() == [3, 4] and task.lengths["val"].dtype == torch.int64
    assert (task.mean, task.std, task.metric, task.segmentation) == ((), (), "accuracy", False)


def test_long_texts_are_counted(capsys):
    data.text_task("toy", ["a", "b", "c"], "accuracy", SPLITS, data.Tokenizer(), 15)
    cut = sum(len(text) + (1 + len(pair) if pair else 0) > 15 for text, pair, _ in SPLITS["train"])
    assert capsys.readouterr().out == f"toy: {cut} of 26 texts have more than 15 tokens and are cut\n"
    whole = data.text_task("toy", ["a", "b", "c"], "accuracy", SPLITS, data.Tokenizer(), 1024)
    assert capsys.readouterr().out == "" and whole.images["test"].shape == (1, 19)      # the longest training text: 15 + 1 + 3


def test_batch_is_a_function_of_its_arguments(task):
    x, y = task.batch("train", 3, 8, seed=1)
    task.batch("train", 0, 5)
    again = task.batch("train", 3, 8, seed=1, recipe="shift")
    assert torch.equal(x, again[0]) and torch.equal(y, again[1]) and x.dtype == y.dtype == torch.int64
    assert not torch.equal(y, task.batch("train", 3, 8, seed=2)[1]) or not torch.equal(x, task.batch("train", 3, 8, seed=2)[0])
    rows = data.rows_of(23, 3, 8, 1)
    assert x.shape == (8, task.lengths["train"][rows].max()) and torch.equal(y, task.labels["train"][rows])
    assert [text_of(row) for row in x] == [text_of(task.images["train"][row]) for row in rows]


def test_batch_is_as_long_as_its_longest_text(task):
    widths = {task.batch("train", step, 2)[0].shape[1] for step in range(20)}
    assert len(widths) > 2 and max(widths) <= 16
    for step in range(20):
        x, _ = task.batch("train", step, 2)
        assert (x[:, -1] != task.eos).any()


def test_ranks_share_a_batch(task):
    x, y = task.batch("train", 2, 9)
    parts = [task.batch("train", 2, 9, rank=rank, world=3) for rank in range(3)]
    for rank, (ids, labels) in enumerate(parts):
        assert [text_of(row) for row in ids] == [text_of(row) for row in x[rank::3]] and torch.equal(labels, y[rank::3])


def test_examples_only_to(task):
    x, y = task.examples("train", 4)
    assert x.shape == (4, task.lengths["train"][:4].max()) and x.dtype == torch.int64 and y.tolist() == [0, 1, 2, 0]
    assert task.examples("val")[0].shape == (2, 4)
    part = task.to("cpu").only(torch.tensor([4, 7]))
    assert isinstance(part, data.TextTask) and part.eos == task.eos and list(part.images) == ["train"]
    assert part.lengths["train"].tolist() == task.lengths["train"][[4, 7]].tolist() and part.metric == task.metric


def test_empty_text_in_a_task():
    for row in (("", None, 0), ("a", "", 0)):
        with refuses("toy: text 1 of train is empty"):
            data.text_task("toy", ["a"], "accuracy", {"train": [("a", None, 0), row]}, data.Tokenizer(), 9)


def test_fingerprints_of_texts(task):
    assert len(task.fingerprint) == 16
    for other, names in ((dict(SPLITS, val=[("One", None, 0)]), "abc"), (dict(SPLITS, val=[("one", None, 1)]), "abc"), (SPLITS, "abd")):
        assert data.text_task("toy", [*names], "accuracy", other, data.Tokenizer(), 16).fingerprint != task.fingerprint
    assert data.text_task("toy", [*"abc"], "accuracy", SPLITS, data.Tokenizer(), 16).fingerprint == task.fingerprint


# GLUE and IMDB

MRPC = [("1", f"{k}1", f"{k}2", f'"He said {k}.', f"It's {k} ' said \"\" he") if k % 3 else
        ("0", f"{k}1", f"{k}2", f"Ünlike {k}", f"other {k}") for k in range(30)]


def table(path, rows, header=None, bom=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(row) for row in ([header] if header else []) + rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig" if bom else "utf-8")


def mrpc(folder, raw=False):
    header, dev = data.GLUE["mrpc"][0], [row for k, row in enumerate(MRPC) if k % 5 == 0]
    if raw:
        table(folder / "msr_paraphrase_train.txt", MRPC, header, bom=True)
        table(folder / "msr_paraphrase_test.txt", MRPC[:4], header, bom=True)
        table(folder / "dev_ids.tsv", [row[1:3] for row in dev])
    else:
        table(folder / "train.tsv", [row for row in MRPC if row not in dev], header)
        table(folder / "dev.tsv", dev, header)
        table(folder / "test.tsv", [("0", *row[1:]) for row in MRPC[:4]], ["index", *header[1:]])


def cola(folder):
    rows = lambda n: [("gj04", str(k % 2), "*" if k % 2 == 0 else "", f'The "{k} sleeps.') for k in range(n)]
    table(folder / "train.tsv", rows(20))
    table(folder / "dev.tsv", rows(6))


def rte(folder):
    rows = lambda n: [(str(k), f"\"Premise {k}, open.", f"Claim {k}", ("entailment", "not_entailment")[k % 2]) for k in range(n)]
    table(folder / "train.tsv", rows(20), data.GLUE["rte"][0])
    table(folder / "dev.tsv", rows(6), data.GLUE["rte"][0])


def imdb(folder, n=20):
    for split in ("train", "test"):
        for kind, rating in (("pos", 9), ("neg", 2), ("unsup", 0)):
            (folder / split / kind).mkdir(parents=True)
            for k in range(n):
                text = f"{kind} {k}<br /><br />a naïve film"
                (folder / split / kind / f"{k}_{rating}.txt").write_text(text, encoding="utf-8")
    (folder / "imdb.vocab").write_text("film\n")
    (folder / "train" / "urls_pos.txt").write_text("http://example.org\n")


def load(name, folder, **how):
    return data.load_texts([name], str(folder), **how)[name]


def counts(task):
    return [len(task.labels[split]) for split in data.SPLITS]


def same(a, b):
    return all(torch.equal(a.images[s], b.images[s]) and torch.equal(a.labels[s], b.labels[s]) for s in data.SPLITS)


@pytest.mark.parametrize("place", ["glue/MRPC", "MRPC", "glue_data/MRPC", "glue/mrpc", "."])
def test_mrpc(tmp_path, capsys, place):
    mrpc(tmp_path / place)
    task = load("mrpc", tmp_path)
    assert counts(task) == [22, 2, 6] and task.metric == "accuracy/F1"      # a tenth of 24 is val
    known = {f"{a}\n{b}": int(label) for label, _, _, a, b in MRPC}
    seen = {split: texts_of(task, split) for split in data.SPLITS}
    assert all(known[text] == y for split in data.SPLITS for text, y in zip(seen[split], task.labels[split].tolist()))
    assert set(seen["test"]) == {f"{a}\n{b}" for _, _, _, a, b in MRPC[::5]} and len(set(sum(seen.values(), []))) == 30
    assert "22 train texts where the whole set has 3,301" in capsys.readouterr().out


def test_both_forms_of_mrpc_are_one_task(tmp_path):
    mrpc(tmp_path / "a" / "MRPC")
    mrpc(tmp_path / "b" / "MRPC", raw=True)
    mrpc(tmp_path / "c" / "MRPC", raw=True)
    (tmp_path / "c/MRPC/dev_ids.tsv").rename(tmp_path / "c/MRPC/mrpc_dev_ids.tsv")
    a, b, c = (load("mrpc", tmp_path / x) for x in "abc")
    assert same(a, b) and same(a, c)


def test_cola(tmp_path):
    cola(tmp_path / "glue/CoLA")
    task = load("cola", tmp_path)
    assert counts(task) == [18, 2, 6] and task.metric == "Matthews" and task.class_names == ["unacceptable", "acceptable"]
    for text, y in zip(texts_of(task, "train"), task.labels["train"].tolist()):
        assert text == f'The "{text.split()[1][1:]} sleeps.' and int(text.split()[1][1:]) % 2 == y


def test_rte(tmp_path):
    rte(tmp_path / "glue/RTE")
    task = load("rte", tmp_path)
    assert counts(task) == [18, 2, 6] and task.class_names[0] == "entailment" and task.metric == "accuracy"
    for text, y in zip(texts_of(task, "test"), task.labels["test"].tolist()):
        assert text == f"\"Premise {text[-1]}, open.\nClaim {text[-1]}" and int(text[-1]) % 2 == y


def test_imdb(tmp_path):
    imdb(tmp_path / "aclImdb")
    task = load("imdb", tmp_path)
    assert counts(task) == [36, 4, 40] and task.class_names == ["negative", "positive"]
    for split in data.SPLITS:
        for text, y in zip(texts_of(task, split), task.labels[split].tolist()):
            assert text.startswith(("neg", "pos")[y]) and text.endswith("\n\na naïve film")
    for split in ("train", "test"):                         # the files are sorted by class, the task is not
        assert set(task.labels[split][:12].tolist()) == {0, 1}
    assert not set(texts_of(task, "train")) & set(texts_of(task, "val"))


def test_context(tmp_path, capsys):
    imdb(tmp_path / "aclImdb")
    task, whole = load("imdb", tmp_path, context=10), load("imdb", tmp_path)
    said = capsys.readouterr().out
    assert task.images["train"].shape == (36, 10) and torch.equal(task.images["test"], whole.images["test"][:, :10])
    assert "80 of 80 texts have more than 10 tokens" in said and said.count("imdb:") == 7      # and two times three counts


@pytest.mark.optional
def test_bpe_tokens(tmp_path, tiny):
    imdb(tmp_path / "aclImdb", 3)
    task = load("imdb", tmp_path, tokens=str(tmp_path / "tiny"))
    assert task.eos == tiny.eos == 266
    for row, length in zip(task.images["test"], task.lengths["test"]):
        assert tiny.decode(row[:length]).endswith("a naïve film") and (row[length:] == 266).all()


def test_drawn_texts(tmp_path):
    task = load("acceptability", tmp_path / "nothing")
    assert counts(task) == [8000, 1000, 2000] and task.metric == "Matthews"
    assert task.class_names == ["unacceptable", "acceptable"]
    assert texts_of(task, "val") == [text for text, *_ in data.written("acceptability")["val"]]


def test_names_are_checked_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "written", lambda name: pytest.fail("something was written"))
    for name, words in (("sst2", "text task 'sst2'.*sentiment, mrpc, cola, rte, imdb"), ("entailmant", "mean entailment"),
                        ("imdb", "no train/pos")):
        with refuses(words):
            data.load_texts(["entailment", name], str(tmp_path))


@pytest.mark.parametrize("name", data.GRAMMAR)
def test_no_drawn_text_twice(name):
    splits = data.written(name)
    texts = [example[:2] for rows in splits.values() for example in rows]
    assert len(set(texts)) == len(texts) and [len(splits[s]) for s in ("val", "test")] == [1000, 2000]
    shares = [sum(y for *_, y in rows) / len(rows) for rows in splits.values()]
    assert max(shares) - min(shares) < 0.06 and 0.45 < min(shares) < 0.75


def same_meaning(first, second, kinds={"met": "saw", "beat": "hit", "kept": "fed", "took": "led"}):
    said = [[kinds.get(word, word) for word in text.split()[:3]] for text in (first, second)]
    return said[0] == said[1]


def agrees(text, _):
    """A sentence is [a | the] [look] noun verb [a | the] noun, with one beast or several."""
    verbs = "see like fear bite hear chase".split()
    match = re.fullmatch(rf"(a |the |)((?:old |big |red |sad )?)(\w+) ({'|'.join(verbs)})(s?) (a |the |)(\w+)", text)
    if not match or {match[3].rstrip("s"), match[7].rstrip("s")} - set(data.BEASTS):
        return False
    one, other = (not match[k].endswith("s") for k in (3, 7))
    article = lambda a, one: a == "the " or (a == "a ") == one
    return (match[5] == "s") == one and article(match[1], one) and article(match[6], other)


def follows(first, second):
    """In every world of four beasts of which some number has done it."""
    meaning = {"all": range(4, 5), "most": range(3, 5), "many": range(2, 5), "some": range(1, 5), "few": range(0, 2), "no": range(0, 1)}
    (p, *_, done), (h, *_, also) = first.split(), second.split()
    return done == also and all(world in meaning[h] for world in meaning[p])


def praises(text, _):
    last = re.split(" but | and ", text)[-1].split()
    return (last[-1] in data.PRAISE) != ("not" in last)


@pytest.mark.parametrize("name, oracle, flip", [("paraphrases", same_meaning, 0), ("acceptability", agrees, 0), ("entailment", follows, 1),
                                                ("sentiment", praises, 0)])
def test_classes_of_drawn_texts(name, oracle, flip):
    wrong = [example for example in data.written(name)["test"] if oracle(*example[:2]) != (example[2] != flip)]
    assert not wrong


def line(path, number, text):
    lines = path.read_text().splitlines()
    lines[number - 1] = text
    path.write_text("\n".join(lines) + "\n")


def test_bad_glue(tmp_path, capsys):
    def bad(name, *words):
        with refuses(".*".join(map(re.escape, words))):
            load(name, tmp_path)

    for name in ("mrpc", "cola", "rte"):
        bad(name, f"{name}: there is no train.tsv", "in", "unpacked" if name != "mrpc" else "dev_ids.tsv")
    rte(tmp_path / "RTE")
    path = tmp_path / "RTE" / "train.tsv"
    line(path, 4, "2\tno claim\tentailment")
    bad("rte", f"{path}, line 4: 3 columns", "rte has 4")
    line(path, 4, "2\ta\tb\tneutral")
    bad("rte", f"{path}, line 4: the label 'neutral' is none of entailment, not_entailment")
    line(path, 4, "2\ta\t \tentailment")
    bad("rte", f"{path}, line 4: an empty sentence")
    line(path, 1, "0\ta\tb\tentailment")
    bad("rte", f"{path}, line 1", "index, sentence1, sentence2, label")
    path.write_bytes(b"index\tsentence1\tsentence2\tlabel\n0\t\xff\tb\tentailment\n")
    bad("rte", "cannot read", str(path))
    rte(tmp_path / "RTE")
    (tmp_path / "RTE" / "dev.tsv").unlink()
    bad("rte", "cannot read", "dev.tsv")
    table(tmp_path / "RTE" / "dev.tsv", [], data.GLUE["rte"][0])
    bad("rte", "20 training and 0 test texts")
    cola(tmp_path / "CoLA")
    line(tmp_path / "CoLA/dev.tsv", 1, "sentence\tlabel\tmark\ttext")
    bad("cola", f"{tmp_path / 'CoLA/dev.tsv'}, line 1: the label 'label' is none of 0, 1")
    mrpc(tmp_path / "MRPC", raw=True)
    (tmp_path / "MRPC/dev_ids.tsv").unlink()
    bad("mrpc", "lacks dev_ids.tsv (or mrpc_dev_ids.tsv)")
    table(tmp_path / "MRPC/dev_ids.tsv", [("7", "8")])
    bad("mrpc", "30 training and 0 test texts")


def test_bad_imdb(tmp_path, capsys):
    def bad(words):
        with refuses(re.escape(words)):
            load("imdb", tmp_path)

    bad("imdb: there is no train/pos in")
    imdb(tmp_path / "aclImdb", 3)
    path = tmp_path / "aclImdb/test/neg/1_2.txt"
    path.write_text(" <br />\n")
    bad(f"{path}: an empty review")
    path.write_bytes(b"\xff")
    bad(f"cannot read {path}")
    path.unlink()
    path.symlink_to(tmp_path / "nothing")
    bad(f"cannot read {path}")
    shutil.rmtree(path.parent)
    bad(f"no reviews (.txt) in {path.parent}")


# --check

def test_check(tmp_path, monkeypatch, capsys):
    rte(tmp_path / "RTE")
    with refuses("rte is not whole: 18 train texts where the whole set has 2,241; 2 val texts where the whole set has 249; "
                 "6 test texts where the whole set has 277"):
        data.main(["--check", "rte", "--data-dir", str(tmp_path)])
    monkeypatch.setattr(data.TEXTS["rte"], "official", dict(train=18, val=2, test=6))
    capsys.readouterr()
    data.main(["--check", "rte", "--data-dir", str(tmp_path)])
    said = capsys.readouterr().out
    assert "2 classes (entailment, not entailment), by accuracy" in said
    assert "  test: 6 texts, 3 of them (50.0%) entailment; the longest has 25 tokens; official: 6" in said
    assert "the first training text" in said and "'Claim 18'" in said and "rte is whole" in said


def test_official_counts():
    ours = dict(mrpc=(3301, 367, 408), cola=(7696, 855, 1043), rte=(2241, 249, 277), imdb=(22500, 2500, 25000))
    for name, (train, val, test) in ours.items():
        assert data.TEXTS[name].official == dict(train=train, val=val, test=test)
        assert round(data.VAL_SHARE * (train + val)) == val
    assert not {*data.TEXTS, *data.GRAMMAR} & {*data.REAL, *data.SPECS}
