"""The text half of data.py: GPT-2's tokens against hand-worked merges, tasks of texts and their batches."""
import json
import os
import random
import unicodedata

import pytest
import torch

import data
from test_common import refuses

# Vectors of the released vocabulary, which is not part of the repository: GPT2_FILES=folder checks them.
KNOWN = {
    "Hello world": [15496, 995], "Hello, my dog is cute": [15496, 11, 616, 3290, 318, 13779],
    " the quick brown fox": [262, 2068, 7586, 21831], "I've been to 3 cities.\n": [40, 1053, 587, 284, 513, 4736, 13, 198],
    "naïve café 你好 😀": [2616, 38776, 40304, 220, 19526, 254, 25001, 121, 30325, 222],
}
WHITE = [*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000]
# Letters, numbers (², ½, Ⅳ and Ⅻ are numbers, not digits), marks, separators that are no white space, astral characters.
ODD = "aZéßж字あ𝒳𐍈07٣²½Ⅳ𝟘.,!?-_'’\"()\u0301\u0308\u200b\u200d\ufeff\x1c\x1f\x00😀🇫    '''" + "".join(map(chr, WHITE))


def random_text(rng, longest=30):
    point = lambda: rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000), rng.randrange(128)])
    pieces = [lambda: rng.choice(ODD), lambda: chr(point()), lambda: rng.choice(["'s", "'ll", "'re", "'LL", "don't", "  ", data.END])]
    return "".join(rng.choice(pieces[:1] * 3 + pieces)() for _ in range(rng.randrange(longest)))


def split_by_hand(text):
    """GPT-2's pretokens, one character at a time."""
    def kind(c):
        return "white" if ord(c) in WHITE else {"L": "letter", "N": "number"}.get(unicodedata.category(c)[0], "other")

    words, start = [], 0
    while start < len(text):
        end = next((start + len(c) for c in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d") if text.startswith(c, start)), start)
        if end == start:
            end = first = start + (text[start] == " " and start + 1 < len(text) and kind(text[start + 1]) != "white")
            while end < len(text) and kind(text[end]) == kind(text[first]):
                end += 1
            if kind(text[first]) == "white" and end < len(text) and end - start > 1:
                end -= 1                                    # the last blank goes to what follows
        words.append(text[start:end])
        start = end
    return words


def gpt2_files(folder, merges, names=("vocab.json", "merges.txt"), **changes):
    """GPT-2's two files with these merges, as "a b"; `changes` of the vocabulary: token -> id or None."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [*data.byte_symbols().values(), *(m.replace(" ", "") for m in merges), data.END]
    vocab = {t: k for t, k in ({t: k for k, t in enumerate(tokens)} | changes).items() if k is not None}
    (folder / names[0]).write_text(json.dumps(vocab), encoding="utf-8")
    (folder / names[1]).write_text("#version: 0.2\n" + "".join(m + "\n" for m in merges), encoding="utf-8")
    return str(folder)


MERGES = ["l o", "lo w", "e r", "Ġ low", "a a", "aa a", "b c", "a b", "# #", "Ã ©"]


@pytest.fixture
def tiny(tmp_path):
    return data.Tokenizer(gpt2_files(tmp_path / "tiny", MERGES))


def pieces(tokenizer, text):
    return [tokenizer.bytes[k].decode("utf-8", "replace") for k in tokenizer.encode(text)]


# Tokens


def test_pretokens_of_known_sentences():
    split = data.pretokens().findall
    assert split("I've been to 3 cities.\n") == ["I", "'ve", " been", " to", " 3", " cities", ".", "\n"]
    assert split("naïve café 你好 😀") == ["naïve", " café", " 你好", " 😀"]
    assert split("We'LL  go\n\n now... ½x") == ["We", "'", "LL", " ", " go", "\n\n", " now", "...", " ½", "x"]
    assert split("a \x1c b\u200b") == ["a", " \x1c", " b", "\u200b"]       # Python's \s has \x1c, Unicode's White_Space has not


def test_pretokens_by_hand():
    rng = random.Random(0)
    for text in [*KNOWN, "", " ", "'", "' s", *(random_text(rng) for _ in range(4000))]:
        words = data.pretokens().findall(text)
        assert words == split_by_hand(text) and "".join(words) == text, ascii(text)


def test_byte_symbols():
    symbols = data.byte_symbols()
    assert [symbols[b] for b in (32, 10, 0, 173, 65, 255)] == ["Ġ", "Ċ", "Ā", "Ń", "A", "ÿ"]
    order = list(symbols)                                   # GPT-2's ids
    assert (order.index(32), order.index(10), order[0], order[187], order[255]) == (220, 198, 33, 255, 173)
    assert len(set(symbols.values())) == 256


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


def test_other_names_of_the_files(tmp_path, tiny):
    other = data.Tokenizer(gpt2_files(tmp_path / "openai", MERGES, ("encoder.json", "vocab.bpe")))
    assert other.encode("lower é") == tiny.encode("lower é") and other.key == tiny.key


@pytest.mark.skipif("GPT2_FILES" not in os.environ, reason="GPT2_FILES names no folder with GPT-2's vocab.json and merges.txt")
def test_released_vocabulary():
    tokenizer = data.Tokenizer(os.environ["GPT2_FILES"])
    assert (tokenizer.size, tokenizer.eos) == (50257, 50256)
    for text, ids in KNOWN.items():
        assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text


def test_round_trip(tiny):
    rng = random.Random(1)
    for tokenizer in (data.Tokenizer(), tiny):
        for text in ["", data.END, *KNOWN, *(random_text(rng) for _ in range(500))]:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text and tokenizer.eos not in ids and all(0 <= k < tokenizer.eos for k in ids)
        assert tokenizer.decode([tokenizer.eos]) == data.END
        assert tokenizer.decode(tokenizer.encode("é")[:1] + tokenizer.encode("x")) in ("\ufffdx", "éx")


def test_bytes():
    tokenizer = data.Tokenizer()
    assert (tokenizer.size, tokenizer.eos) == (257, 256) and tokenizer.encode("aé") == [97, 195, 169]


def test_bad_tokenizer_files(tmp_path, capsys):
    def bad(*words, merges=MERGES, spoil=lambda folder: None, **changes):
        gpt2_files(tmp_path / "bad", merges, **changes)
        spoil(tmp_path / "bad")
        refuses(capsys, lambda: data.Tokenizer(str(tmp_path / "bad")), *words, "gpt2 on Hugging Face")

    bad("no vocab.json or encoder.json", spoil=lambda folder: (folder / "vocab.json").unlink())
    bad("no merges.txt or vocab.bpe", spoil=lambda folder: (folder / "merges.txt").unlink())
    bad("cannot read", "vocab.json", spoil=lambda folder: (folder / "vocab.json").write_text("{"))
    bad("cannot read", "vocab.json", spoil=lambda folder: (folder / "vocab.json").write_text("[1, 2]"))
    bad("cannot read", "merges.txt", spoil=lambda folder: (folder / "merges.txt").write_bytes(b"\xff\xfe"))
    bad("268 tokens", "10 merges", extra=267)
    bad("no token 'low'", low=None)
    bad("no token '<|endoftext|>'", **{data.END: None})
    bad("with <|endoftext|> last", **{data.END: 0, "!": 266})
    bad("not the numbers from 0", low=700)
    bad("not the numbers from 0", low="257")
    bad("not two tokens, '你 好'", spoil=lambda folder: (folder / "merges.txt").write_text("你 好\n", encoding="utf-8"))
    bad("not two tokens, 'l o w'", spoil=lambda folder: (folder / "merges.txt").write_text("l o w\n"))


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
    assert capsys.readouterr().out == f"toy: {cut} of 26 texts are longer than 15 tokens and keep their first 15\n"
    whole = data.text_task("toy", ["a", "b", "c"], "accuracy", SPLITS, data.Tokenizer(), 1024)
    assert capsys.readouterr().out == "" and whole.images["test"].shape == (1, 19)      # the longest training text: 15 + 1 + 3


def test_batch_is_a_function_of_its_arguments(task):
    x, y = task.batch("train", 3, 8, seed=1)
    task.batch("train", 0, 5)
    again = task.batch("train", 3, 8, seed=1, augment=True)
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


def test_empty_text_in_a_task(capsys):
    for row in (("", None, 0), ("a", "", 0)):
        refuses(capsys, lambda: data.text_task("toy", ["a"], "accuracy", {"train": [("a", None, 0), row]}, data.Tokenizer(), 9),
                "toy: text 1 of train is empty")
