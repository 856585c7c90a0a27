"""The comparison as a whole, tiny: it goes on where it stopped, writes its report, and refuses what cannot be."""

import dataclasses
import html.parser
import json

import pytest

from bothways.compare import core, modes, pictures, report, run, stats
from bothways.compare.core import Experiment, Measurement, Pilot, Result, Size, Table
from bothways.config import ObjectiveConfig
from bothways.errors import InputError

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def arms(tiny_recipe):
    model = dataclasses.replace(tiny_recipe.model, n_layers=1, scan_layers=False, dropout_residual=0.0)
    causal = dataclasses.replace(tiny_recipe, model=model)
    hybrid = dataclasses.replace(causal, objective=ObjectiveConfig(kind="hybrid"))
    return {"causal": causal, "masked": run.masked_only(hybrid)}


@pytest.fixture
def smallest(monkeypatch):
    size = Size("least", 1, 3, 3, 4, 2, 1, (1e-3,), toy_width=0)
    monkeypatch.setitem(core.SIZES, "least", size)
    monkeypatch.setattr(modes, "CASES", ((2, 2), (2, 4)))


def test_a_comparison_that_is_stopped_goes_on_where_it_was(arms, smallest, tmp_path, monkeypatch):
    trained, measured = [], []
    train, fill = core.train, modes.filled

    def stopping(recipe, home):
        trained.append(recipe.name)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(recipe, home)

    monkeypatch.setattr(core, "train", stopping)
    monkeypatch.setattr(modes, "filled", lambda *a: measured.append(a[1:]) or fill(*a))
    with pytest.raises(KeyboardInterrupt):
        run.compare(["modes"], "least", arms, tmp_path / "x", "")
    ((_, result),) = run.compare(["modes"], "least", arms, tmp_path / "x", "")
    names = [f"modes-{arm}-{seed}" for arm in arms for seed in (0,)]
    assert trained == [*names, names[-1]]  # what was done is not done again
    assert len(measured) == len(set(measured)) == 5  # (2 letters in 1 and 2, 4 letters in 1, 2 and 4 readings)
    ((_, again),) = run.compare(["modes"], "least", arms, tmp_path / "x", "")
    assert again == result
    assert len(trained) == 3
    found = json.loads((tmp_path / "x" / "report.json").read_text())
    (experiment,) = found["experiments"]
    assert experiment["command"].startswith("bothways compare modes")
    for figure in experiment["figures"]:
        assert figure["value"]["low"] <= figure["value"]["value"] <= figure["value"]["high"]
        assert figure["rule"]
    with pytest.raises(InputError, match="another size"):
        run.compare(["modes"], "smoke", arms, tmp_path / "x", "")


def test_all_but_model_and_objective_is_the_same_for_all_arms(arms):
    other = dataclasses.replace(
        arms["masked"],
        train=dataclasses.replace(arms["masked"].train, batch_size=16),
        data=dataclasses.replace(arms["masked"].data, vocab_size=330),
        model=dataclasses.replace(arms["masked"].model, context_length=12),
    )
    got = run.controlled(arms | {"masked": other})
    differ = {d.split(":")[0] for d in got["causal"].differences(got["masked"])}
    assert differ == {"objective.kind", "objective.causal_share"}


def test_names_that_are_not_there(arms, tmp_path):
    with pytest.raises(InputError, match="no experiment 'mode'"):
        run.compare(["mode"], "smoke", arms, tmp_path, "")
    with pytest.raises(InputError, match="no size"):
        run.compare([], "huge", arms, tmp_path, "")
    for name in run.NAMES:
        found = run.experiment(name)
        assert found.name == name
        assert found.claim
        assert found.known


def test_arms_that_cannot_be_compared_are_refused_before_anything_is_trained(arms, smallest, tmp_path, monkeypatch):
    monkeypatch.setattr(core, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(InputError, match="shares compares with a hybrid model, and there is none: give --hybrid"):
        run.compare(["modes", "shares"], "least", arms, tmp_path, "")
    dial = dataclasses.replace(arms["causal"], name="a_dial", objective=ObjectiveConfig(kind="diffusion"))
    for arm, wanted in (("causal", "causal"), ("masked", "masked or hybrid"), ("hybrid", "hybrid")):
        with pytest.raises(
            InputError, match=f"--{arm} a_dial has objective.kind=diffusion; the {arm} model .* has {wanted}$"
        ):
            run.compare([], "least", arms | {arm: dial}, tmp_path, "")
    assert not list(tmp_path.iterdir())


def test_all_experiments_means_those_that_can_be(arms, smallest, tmp_path, monkeypatch, capfd):
    made = []
    monkeypatch.setattr(run, "NAMES", ("modes", "shares"))
    monkeypatch.setattr(core.ExperimentRunner, "part", lambda self, name, measure: made.append(name) or "kept")
    monkeypatch.setattr(run.Result, "from_json", lambda values: values)
    monkeypatch.setattr(run.report, "write", lambda *_: ("", ""))
    run.compare([], "least", arms, tmp_path, "")
    assert "result-modes" in made
    assert "result-shares" not in made
    assert "shares is left out: shares compares with a hybrid model" in capfd.readouterr().err


class Page(html.parser.HTMLParser):
    """Checks that tags nest, and collects ids, links and text."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids, self.links, self.text, self.outside = [], [], [], "", []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids += [given["id"]] if "id" in given and tag == "section" else []
        self.links += [given["href"]] if tag == "a" else []
        self.outside += [v for k, v in attrs if k in ("src", "href") and v and "://" in v]
        if tag not in ("meta", "path", "use", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("path", "use"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_by_itself(tmp_path):
    estimate = stats.Estimate(0.5, 0.4, 0.6, 20)
    picture = pictures.curves({"a <b>": [(1, estimate), (2, estimate)]}, "x", "y", a_guess=0.3)
    bars = pictures.bars({"one two": {"a": estimate, "b": estimate}, "three": {"a": estimate}}, "y")
    figures = [Measurement("rate <x>", estimate, "a rule", expected=0.55, baseline=0.1)]
    tables = [Table("a title", ("a", "b"), [["1 & 2", "3"]])]
    found = [
        (
            Experiment(
                n,
                f"title {n}",
                "claim",
                "method",
                "known",
                lambda lab: None,
                (Pilot(0.1, "bits"), Pilot(0.1, "points", tuned=True)) if n == "a" else (),
            ),
            Result(v, "found", "sure", figures, tables, [(picture, "one"), (bars, "two")], "+0.5 more"),
        )
        for n, v in (("a", stats.HOLDS), ("b", stats.FAILS), ("c", stats.OPEN))
    ]
    about = {"size": "s", "options": " --size s", "seeds": 2, "tunings": 8, "scale": "little.", "made": ["commit abc"]}
    about |= {"arms": {"causal": "a GPT"}}
    path, _ = report.write(tmp_path, found, about)
    page = Page(path.read_text())
    assert page.ids == ["a", "b", "c"]
    assert page.links == ["#a", "#b", "#c"]
    assert not page.outside
    assert "Of 3 claims 1 hold here, 1 do not, and 1 is not decided" in page.text
    assert "bothways compare b --size s" in page.text
    assert "Measured with commit abc." in page.text
    # t(0.975, 1) = 12.71 and t(0.8, 1) = 1.376, times 0.1 / sqrt(2)
    assert page.text.count("Before it ran: 2 seeds find a difference of 0.996 bits four times out of five") == 1
    assert page.text.count("8 fine-tunings find a difference of 0.115 points") == 1  # (2.365 + 0.896) 0.1 / sqrt(8)
    assert "another draw of seeds and of test items together" in page.text
    assert page.text.count("+0.5 more. found") == 6  # in the summary and in the section
    assert "rate <x>" in page.text
    assert "a rule" in page.text
    assert pictures.INK not in path.read_text()
    assert "currentColor" in path.read_text()
    assert "prefers-color-scheme" in path.read_text()
