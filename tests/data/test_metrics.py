"""Metrics against figures worked out by hand."""

import math

import pytest

from bothways.data import metrics

GOLD = ["a", "a", "a", "b", "b", "c"]
GOT = ["a", "a", "b", "b", "c", "c"]


def test_accuracy_and_macro_f1():
    assert metrics.compute("accuracy", GOLD, GOT) == pytest.approx(4 / 6)
    assert metrics.compute("macro_f1", GOLD, GOT) == pytest.approx((4 / 5 + 1 / 2 + 2 / 3) / 3)


def test_a_class_that_is_never_guessed_counts_as_nothing():
    assert metrics.compute("macro_f1", ["a", "b"], ["a", "a"]) == pytest.approx((2 / 3 + 0) / 2)


def test_accuracy_of_tags_counts_words():
    assert metrics.compute("accuracy", [["O", "B-x"], ["O"]], [["O", "O"], ["O"]]) == pytest.approx(2 / 3)


def test_matthews():
    gold, got = ["yes"] * 5 + ["no"] * 5, ["yes"] * 4 + ["no"] + ["yes"] * 2 + ["no"] * 3
    tp, fn, fp, tn = 4, 1, 2, 3
    wanted = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert metrics.compute("matthews", gold, got) == pytest.approx(wanted)
    assert metrics.compute("matthews", gold, ["no"] * 10) == 0


@pytest.mark.parametrize(
    ("yes", "no"), [("equivalent", "not_equivalent"), ("duplicate", "not_duplicate"), ("b", "a")], ids=str
)
@pytest.mark.parametrize("first", [True, False], ids=["yes_first", "no_first"])
def test_f1_counts_the_positive_label_whichever_comes_first(yes, no, first):
    gold, got = [yes, yes, yes, no, no], [yes, yes, no, yes, no]
    if not first:
        gold, got = gold[::-1], got[::-1]
    assert metrics.compute("f1", gold, got) == pytest.approx(2 * 2 / (3 + 3))
    swapped = {yes: no, no: yes}
    assert metrics.compute("f1", [swapped[g] for g in gold], [swapped[g] for g in got]) == pytest.approx(1 / 2)


def test_f1_of_guesses_that_are_all_negative():
    assert metrics.compute("f1", ["not_equivalent", "equivalent"], ["not_equivalent"] * 2) == 0
    assert metrics.compute("f1", ["not_equivalent"] * 2, ["not_equivalent"] * 2) == 0


def test_pearson_and_spearman():
    gold, got = [1.0, 2.0, 3.0, 4.0], [1.0, 4.0, 9.0, 16.0]
    assert metrics.compute("spearman", gold, got) == pytest.approx(1)
    assert metrics.compute("pearson", gold, got) == pytest.approx(25 / math.sqrt(5 * 129))
    assert metrics.compute("pearson", gold, [-x for x in gold]) == pytest.approx(-1)
    assert metrics.compute("spearman", [1.0, 2.0, 3.0], [1.0, 3.0, 2.0]) == pytest.approx(0.5)


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_what_does_not_vary_correlates_with_nothing(metric):
    assert metrics.compute(metric, [1.0, 2.0, 3.0], [5.0] * 3) == 0
    assert metrics.compute(metric, [5.0] * 3, [1.0, 2.0, 3.0]) == 0
    assert metrics.compute(metric, [5.0], [1.0]) == 0


@pytest.mark.parametrize(
    ("gold", "got", "exact", "f1"),
    [
        (["the red castle"], "The  Red, castle!", 1, 1),
        (["a crown"], "an crown the", 1, 1),
        (["theatre"], "atre", 0, 0),  # an article is a word, not a part of one
        (["red castle"], "red tower", 0, 1 / 2),
        (["red red castle"], "red", 0, 2 / 4),
        (["king", "the old king"], "old king", 1, 1),
        (["queen", "old king of spain"], "king", 0, 2 / 5),
        ([], "", 1, 1),
        ([], "king", 0, 0),
        (["king"], "", 0, 0),
        (["king"], "the", 0, 0),
    ],
)
def test_answers_by_the_rules_of_squad(gold, got, exact, f1):
    assert metrics.span_scores(gold, got) == (exact, pytest.approx(f1))


def test_spans_are_averaged_over_questions():
    gold, got = [["red castle"], [], ["king"]], ["red tower", "", "queen"]
    assert metrics.compute("exact_match", gold, got) == pytest.approx(1 / 3)
    assert metrics.compute("span_f1", gold, got) == pytest.approx((0.5 + 1 + 0) / 3)


@pytest.mark.parametrize(
    ("gold", "got", "f1"),
    [
        (["B-PER I-PER O B-LOC"], ["B-PER I-PER O B-LOC"], 1),
        (["B-PER I-PER O B-LOC"], ["B-PER O O B-LOC"], 1 / 2),  # a piece of an entity is not the entity
        (["B-PER I-PER"], ["B-LOC I-LOC"], 0),
        (["B-PER B-PER"], ["B-PER I-PER"], 0),  # two entities, or one of two words
        (["B-PER I-LOC"], ["B-PER B-LOC"], 1),  # another kind begins another entity
        (["I-PER O"], ["B-PER O"], 1),  # so does I after O
        (["O B-PER"], ["O B-PER"], 1),  # up to the end of the sentence
        (["B-PER", "I-PER"], ["B-PER", "O"], 2 / 3),  # and not beyond it
        (["B-PER O"], ["O O"], 0),
        (["O O"], ["O O"], 1),
        (["O O"], ["O B-X"], 0),
    ],
)
def test_whole_entities_count(gold, got, f1):
    sentences = [[tags.split() for tags in side] for side in (gold, got)]
    assert metrics.compute("entity_f1", *sentences) == pytest.approx(f1)


def test_entities_are_counted_over_all_sentences():
    gold = [["B-X", "B-X", "B-X"], ["B-X", "O", "O"]]
    got = [["B-X", "B-X", "B-X"], ["O", "B-X", "O"]]
    assert metrics.compute("entity_f1", gold, got) == pytest.approx(3 / 4)


def test_the_interval_of_a_mean_is_that_of_student():
    mean, low, high = metrics.mean_interval([1.0, 2.0, 3.0, 4.0])
    half = 3.182446 * math.sqrt(5 / 3) / 2  # t with 3 degrees of freedom
    assert mean == 2.5
    assert (low, high) == (pytest.approx(2.5 - half, rel=1e-5), pytest.approx(2.5 + half, rel=1e-5))
    assert metrics.mean_interval([0.25]) == (0.25, 0.25, 0.25)


def test_counting_words_beats_guessing():
    train = ["the dog barks", "a dog", "dog and king", "the cat", "a cat sleeps"] * 4
    labels = ["dog", "dog", "dog", "cat", "cat"] * 4
    texts, gold = ["king dog", "the king cat", "unheard cat", "dog"], ["dog", "cat", "cat", "dog"]
    assert metrics.naive_bayes(train, labels, texts) == gold
    assert metrics.compute("accuracy", gold, ["dog"] * 4) == 0.5


def test_texts_without_words_have_no_naive_bayes():
    assert metrics.naive_bayes(["\U0001f621\U0001f44e", "\U0001f600"], ["bad", "good"], ["\U0001f600"]) is None
    assert metrics.naive_bayes(["bad dog", "good \U0001f600"], ["bad", "good"], ["good"]) == ["good"]
