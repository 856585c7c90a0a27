"""Mixtures: each corpus has its share in every prefix of the run, keeps its own order, and is prepared with the others."""

import dataclasses
import json
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from bothways.configs import find
from bothways.data import corpora, mixture, mixture_config, pipeline, preparing, schedule, tokens
from bothways.data import tokenizer as tokenizers
from bothways.data.config import DataConfig
from bothways.data.examples import Masking, causal, masked_source
from bothways.data.schedule import Schedule
from bothways.errors import InputError
from bothways.recipes import Recipe
from tests.data.test_pipeline import joined, shares, take
from tests.data.test_prepared import jsonl, texts

LENGTH, SEED = 13, 5


def phases_of(rng: random.Random) -> list[tuple[int, list[Fraction]]]:
    """One to four phases, with weights that are small or large, alike or not, and some of them 0."""
    count, first, found = rng.randint(1, 7), 0, []
    for _ in range(rng.randint(1, 4)):
        largest = rng.choice([1, 5, 40])
        weights = [Fraction(rng.choice([0, 1, largest, rng.randint(1, largest)])) for _ in range(count)]
        found.append((first, weights if any(weights) else [Fraction(1)] * count))
        first += rng.choice([1, 2, rng.randint(1, 50), rng.randint(100, 1500)])
    return found


def phases_that_must_be_foreseen() -> list[tuple[int, list[Fraction]]]:
    """Where the last phase begins, ten rows are due in half: of those, five must have come that are due soon from there on."""
    before = [Fraction(weight) for weight in (885, *[12] * 5, *[11] * 5)]
    return [(0, before), (50, before), (6050, [Fraction(weight) for weight in (0, *[0] * 5, *[1] * 5)])]


@pytest.mark.parametrize("seed", [*range(40), None])
def test_every_prefix_has_each_share_to_within_one_row(seed):
    phases = phases_that_must_be_foreseen() if seed is None else phases_of(random.Random(seed))
    made = Schedule(phases)
    count, most = len(phases[0][1]), phases[-1][0] + 700
    which, number = made(np.arange(most))
    counts = np.eye(count, dtype=int)[which].cumsum(axis=0)
    targets = np.zeros((most, count))
    for first, weights in phases:
        targets[first:] = np.array([float(w / sum(weights)) for w in weights])
    assert np.abs(counts - targets.cumsum(axis=0)).max() < 1 - 1e-9
    np.testing.assert_array_equal(number, counts[np.arange(most), which] - 1)  # each corpus counts its own
    for examples in (1, most // 2, most):
        np.testing.assert_array_equal(made.counts(examples), counts[examples - 1])
    scattered = np.random.default_rng(0).permutation(most)[:50]  # whatever is looked up, alone or beside others
    for found, expected in zip(made(scattered), (which, number), strict=True):
        np.testing.assert_array_equal(found, expected[scattered])


def test_far_into_a_run_a_share_is_looked_up_and_still_right(monkeypatch):
    """Weights that are no fractions of small numbers, rounded to parts of a period; a phase that begins late."""
    monkeypatch.setattr(schedule, "PERIOD", 997)
    late, rng = 10**12 + 7, random.Random(0)
    phases = [[Fraction(rng.random()) for _ in range(5)] for _ in range(2)]
    made = Schedule([(0, phases[0]), (late, phases[1])])
    assert sum(len(segment.which) for segment in made.segments) < 10 * 997
    which, _ = made(late - 3000 + np.arange(6000))
    counts = made.counts(late - 3000) + np.eye(5, dtype=int)[which].cumsum(axis=0)
    for n in range(0, 6000, 37):
        differ = [abs(c - t) for c, t in zip(counts[n].tolist(), made.target(late - 3000 + n + 1), strict=True)]
        assert max(differ) < 1
    for part, weight in zip(schedule.whole_parts(phases[0]), phases[0], strict=True):
        assert abs(part / 997 - weight / sum(phases[0])) < 2 / 997
    assert schedule.whole_parts([Fraction(1), Fraction(10**9)]) == (1, 996)  # small, and not forgotten


# ---- rows --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vocabulary() -> tokenizers.Tokenizer:
    return tokenizers.train(texts(200), "bpe", 311)


@pytest.fixture(scope="module")
def each(vocabulary) -> list[mixture.Source]:
    """Three corpora of different sizes."""
    return [source(vocabulary, count, seed) for seed, count in enumerate((97, 31, 211))]


def source(vocabulary: tokenizers.Tokenizer, count: int, seed: int) -> mixture.Source:
    ids, starts, size = next(tokens.encoded([("", t) for t in texts(count, seed)], vocabulary, False))
    return tokens.Rows(tokens.Tokens(ids, starts, size), LENGTH, vocabulary.pad), causal


def text_of(entries: tuple[str, ...]) -> mixture.Text:
    corpus = corpora.Corpus("c", "f", lambda split: iter(()))
    parts = mixture_config.parse_all(entries)
    return mixture.Text(tuple(parts), tuple(dataclasses.replace(corpus, fingerprint=p.corpus) for p in parts))


def batches(of: mixture.Source, count: int, batch_size: int, position: int = 0, hosts: int = 1) -> list:
    options = {"batch_size": batch_size, "seed": SEED, "position": position}
    parts = [take(pipeline.training_batches(*of, mine=mine, **options), count) for mine in shares(batch_size, hosts)]
    return [joined(of_hosts) for of_hosts in zip(*parts, strict=True)]


MIXTURE = ("a=0.6", "b=0.1,30:0.5", "c=0.3")


def test_rows_are_those_of_each_corpus_in_its_own_order(each):
    rows, example = mixture.source_of(each, text_of(MIXTURE), lambda step: 4 * step)
    found = joined(batches((rows, example), 60, 4))
    which, _ = rows.schedule(np.arange(240))
    assert np.bincount(which[:120]).tolist() == [72, 12, 36]
    assert np.abs(np.bincount(which[120:]) - 120 * np.array([0.6, 0.5, 0.3]) / 1.4).max() < 1
    for i, alone in enumerate(each):
        expected = joined(batches(alone, int((which == i).sum()), 1))
        np.testing.assert_array_equal(found["tokens"][which == i], expected["tokens"])


@pytest.mark.parametrize(("hosts", "batch_size", "position"), [(2, 8, 0), (4, 8, 33), (1, 3, 117), (3, 6, 5)])
def test_any_hosts_and_any_resume_see_the_same_rows(each, hosts, batch_size, position):
    of = mixture.source_of(each, text_of(MIXTURE), lambda step: 4 * step)
    stream, found = joined(batches(of, 200, 1)), joined(batches(of, 9, batch_size, position, hosts))
    for name, values in found.items():
        np.testing.assert_array_equal(values, stream[name][position : position + len(values)], err_msg=name)


def test_what_is_drawn_for_an_example_does_not_depend_on_the_mixture(vocabulary):
    """Masked rows and pairs: of one corpus twice, under two names, each row is what it would be alone."""
    ids, starts, size = next(tokens.encoded([("", t) for t in texts(211)], vocabulary, False))
    held = tokens.Tokens(ids, starts, size)
    for pairs in (False, True):
        options = {"pairs": pairs, "separate": True, "padded": False}
        of = masked_source(held, 23, vocabulary.vocabulary(), Masking(), **options)
        rows, example = mixture.source_of([of, of], text_of(("a=1", "b=2")), lambda step: step)
        found = joined(batches((rows, example), 5, 6))
        indices = rows.order_of(np.arange(30), SEED)[:, 1]
        expected = of[1](of[0][indices], pipeline.ExampleRng(SEED, np.arange(30)))
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_epochs_are_weights_by_rows(each):
    rows, _ = mixture.source_of(each, text_of(("a=0.5x", "b=4x", "c=1x")), lambda step: step)
    sizes = [len(of) for of, _ in each]
    counts = rows.schedule.counts(round(0.5 * sizes[0] + 4 * sizes[1] + sizes[2]))
    assert np.abs(counts - np.array([0.5, 4, 1]) * sizes).max() <= 1.5
    assert "(4.0" in rows.shown(["a", "b", "c"], int(counts.sum()))


def test_figures_of_a_mixture_are_the_mean_by_shares():
    found = mixture.averaged({"a": {"loss": 1.0, "x_low": 0.0}, "b": {"loss": 3.0, "x_low": 0.0}}, [0.75, 0.25])
    assert found == {"loss": 1.5, "loss/a": 1.0, "x_low/a": 0.0, "loss/b": 3.0, "x_low/b": 0.0}
    assert mixture.averaged({"a": {"loss": 1.0, "x_low": 0.0}}, [1.0]) == {"loss": 1.0, "x_low": 0.0}


# ---- text --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cfg(tmp_path) -> DataConfig:
    """Two corpora, whose words have nothing in common."""
    (tmp_path / "web.jsonl").write_bytes(jsonl(texts(300)))
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "b.txt").write_text("\n".join(texts(400, 1)).replace("w", "zz"))
    entries = (f"{tmp_path}/web.jsonl=0.7", f"{tmp_path}/books=0.2,10:0.6")
    return DataConfig(corpus="", mixture=entries, tokenizer="bpe", vocab_size=311, cache=str(tmp_path / "cache"))


def test_one_vocabulary_is_trained_on_a_sample_in_which_each_has_its_share(cfg, monkeypatch):
    monkeypatch.setattr(tokenizers, "TRAINING_BYTES", 6000)
    sampled, train = [], tokenizers.train_on

    def remembered(lines, *rest):
        sampled.extend(lines)
        return train(iter(sampled), *rest)

    monkeypatch.setattr(tokenizers, "train_on", remembered)
    text = mixture.load(cfg)
    assert text.names == ["web", "books"]
    tokenizer = mixture.obtain_tokenizer(cfg, text)
    assert tokenizer.fingerprint == mixture.obtain_tokenizer(cfg, text).fingerprint
    shares = text.shares([1, 1])
    np.testing.assert_allclose(shares, [(7 / 9 + 7 / 13) / 2, (2 / 9 + 6 / 13) / 2])
    assert text.shares([1, 1], last=True) == [7 / 13, 6 / 13]
    books = sum(len(line) for line in sampled if "zz" in line)
    assert abs(books / sum(map(len, sampled)) - shares[1]) < 0.05


def test_a_mixture_of_prepared_and_raw_text_is_the_mixture_of_raw_text(cfg, tmp_path):
    done = preparing.prepare_all(cfg, str(tmp_path / "text"))
    assert [Path(made.to).name for made in done.values()] == ["web", "books"]
    before = [t.ids[:] for t in read(cfg)]
    for moved in (list(done)[:1], list(done)):
        to = mixture_config.moved(cfg.mixture, {corpus: done[corpus].to for corpus in moved})
        there = dataclasses.replace(cfg, mixture=to, cache=f"{cfg.cache}-{len(moved)}")
        assert mixture.load(there).fingerprint == mixture.load(cfg).fingerprint  # so a run may go on with either
        assert not Recipe(data=cfg).differences(Recipe(data=there))
        if len(moved) == 2:  # with one of them raw its vocabulary is the prepared one's
            for a, b in zip(before, read(there), strict=True):
                np.testing.assert_array_equal(a, b.ids[:])
    with pytest.raises(InputError, match="all of data.mixture is prepared already"):
        preparing.prepare_all(there, str(tmp_path / "again"))
    assert Recipe(data=cfg).differences(Recipe(data=dataclasses.replace(cfg, mixture=("a=0.7", "b=0.2"))))


def read(cfg: DataConfig) -> list[tokens.Tokens]:
    text = mixture.load(cfg)
    return text.prepare("train", mixture.obtain_tokenizer(cfg, text), cfg.cache)


def test_one_corpus_is_a_mixture_of_one(cfg, each):
    alone = dataclasses.replace(cfg, mixture=(), corpus=cfg.mixture[0].partition("=")[0])
    of_one = dataclasses.replace(cfg, mixture=cfg.mixture[:1], cache=f"{cfg.cache}-one")
    assert mixture.load(alone).fingerprint == mixture.load(of_one).fingerprint
    np.testing.assert_array_equal(read(alone)[0].ids[:], read(of_one)[0].ids[:])
    assert mixture.source_of(each[:1], text_of(("a=3",)), int) is each[0]


def test_a_corpus_may_have_a_field_of_its_own(cfg, tmp_path):
    (tmp_path / "pg.jsonl").write_text("".join(json.dumps({"book_text": t}) + "\n" for t in texts(100, 3)))
    entry = f"{tmp_path}/pg.jsonl=0.2,4:0.3,book_text"
    text = mixture.load(dataclasses.replace(cfg, mixture=(*cfg.mixture, entry)))
    assert sorted(t for _, t in text.corpora[2].documents("test")) == sorted(texts(100, 3)[19::20])


def test_gpt3_names_sets_of_tfds_and_their_fields(tmp_path):
    parts = mixture_config.parse_all(find("gpt3_175b").data.mixture)
    assert sum(part.at(0) for part in parts) == Fraction("1.01")  # as the paper rounds them (table 2.2)
    with corpora.quiet_tfds() as tfds:
        import tensorflow_datasets.text  # noqa: F401  (registers c4 and wikipedia)

        for part in parts:
            builder = tfds.builder(part.corpus, data_dir=tmp_path, file_format="array_record")
            assert (part.text_field or "text") in builder.info.features


# ---- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        (("web",), "write CORPUS=WEIGHT"),
        (("=0.5",), "write CORPUS=WEIGHT"),
        (("web=",), "the weight '' must be a positive, finite number"),
        (("web=much",), "the weight 'much' must be a positive"),
        (("web=0", "b=1"), "the weight '0' must be a positive.* or 0 from a later step on"),
        (("web=-1",), "the weight '-1' must be"),
        (("web=nan",), "the weight 'nan' must be"),
        (("web=inf",), "the weight 'inf' must be"),
        (("web=1/0",), "the weight '1/0' must be"),
        (("web=1,100:2,50:3",), "the phase from step 50 on is not after the one before it, from step 100"),
        (("web=1,0:2",), "the phase from step 0 on is not after"),
        (("web=1,-5:2",), "'-5:2' is no weight"),
        (("web=1,2",), "'2' is no weight"),
        (("web=1,50:0", "b=10:1,50:0"), "no corpus from step 50 on"),
        (("b=10:1",), "no corpus from step 0 on"),
        (("a=1", "b=2", "a=3"), "has a twice"),
        (("a=1", "b=2x"), "weights and epochs"),
        (("a=1x,5:2",), "weights and epochs"),
    ],
)
def test_what_is_no_mixture_is_said(entries, says):
    problems = DataConfig(corpus="", mixture=entries).problems()
    assert len(problems) == 1
    with pytest.raises(InputError, match=says):
        raise InputError(problems[0])


def test_a_mixture_stands_alone(cfg):
    assert not cfg.problems()
    assert "data.corpus is 'x.txt' beside data.mixture" in dataclasses.replace(cfg, corpus="x.txt").problems()[0]
    assert "data.validation is for one corpus" in dataclasses.replace(cfg, validation="x.txt").problems()[0]
    with pytest.raises(InputError, match="one corpus is read here"):
        corpora.load(cfg)
    with pytest.raises(InputError, match="no corpus 'wbe'"):
        mixture.load(dataclasses.replace(cfg, mixture=(*cfg.mixture, "wbe=1")))


def test_what_is_wrong_with_one_corpus_names_it(cfg, tmp_path):
    (tmp_path / "books" / "b.txt").write_text("z")  # which is held out
    of_char = dataclasses.replace(cfg, tokenizer="char")
    text = mixture.load(of_char)
    with pytest.raises(InputError, match="data.mixture, books: the train split of files is empty"):
        text.prepare("train", mixture.obtain_tokenizer(of_char, text), cfg.cache)
    alone = mixture.load(dataclasses.replace(of_char, mixture=cfg.mixture[1:]))
    with pytest.raises(InputError, match="^the train split of files is empty"):
        alone.prepare("train", mixture.obtain_tokenizer(of_char, text), cfg.cache)


def test_the_same_text_twice_and_different_vocabularies(cfg, tmp_path):
    (tmp_path / "again.jsonl").write_bytes((tmp_path / "web.jsonl").read_bytes())
    with pytest.raises(InputError, match="web.jsonl and .*again.jsonl hold the same text"):
        mixture.load(dataclasses.replace(cfg, mixture=(*cfg.mixture, f"{tmp_path}/again.jsonl=1")))
    made = []
    for entry in cfg.mixture:
        alone = dataclasses.replace(cfg, mixture=(), corpus=entry.rpartition("=")[0])
        made.append(preparing.prepare(alone, f"{tmp_path}/alone{len(made)}").to)
    apart = dataclasses.replace(cfg, mixture=tuple(f"{to}=1" for to in made), cache=f"{cfg.cache}-apart")
    with pytest.raises(InputError, match="alone1 was prepared with another tokenizer"):
        mixture.obtain_tokenizer(apart, mixture.load(apart))
    assert not list(Path(apart.cache).glob("tokens/*"))
