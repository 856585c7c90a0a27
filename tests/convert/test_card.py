"""The card of an exported directory, and names on the hub."""

import dataclasses
import json

import bothways
from bothways.convert.card import held_out, model_card
from bothways.recipes import Recipe
from bothways.rundir import TaskInfo


def test_a_card_has_the_last_held_out_figures_the_licence_and_how_to_open(tiny, tmp_path):
    lines = [{"step": 3, "eval_bits_per_byte": 9.0}, {"step": 6, "eval_bits_per_byte": 2.5}, {"step": 7, "loss": 1.0}]
    whole = "\n".join(map(json.dumps, lines))
    (tmp_path / "metrics.jsonl").write_text(whole + '\n{"step": 8, "eval_')  # the last line was cut short
    figures = held_out(tmp_path)
    assert figures == {"step": 6, "eval_bits_per_byte": 2.5}
    assert held_out(tmp_path / "none") == {}
    recipe = Recipe(family="gpt", model=dataclasses.replace(tiny, d_model=22))
    card = model_card(recipe, None, "AutoModelForCausalLM", True, figures, "apache-2.0")
    for part in ("license: apache-2.0\n", "at step 6", "| bits_per_byte | 2.5000 |", "| d_model | 22 |"):
        assert part in card
    assert 'AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)' in card
    task = TaskInfo("x", "classify", ("no", "yes"), 7, ())
    plain = model_card(recipe, task, "AutoModel", False, {}, "")
    assert "| labels | no, yes |" in plain
    for part in ("trust_remote_code", "Held-out", "license:"):
        assert part not in plain


def test_a_name_that_cannot_be_on_the_hub_is_refused_before_anything_is_written(tmp_path, capfd):
    (tmp_path / "run").mkdir()
    for name in ("model", "a/b/c", "/model"):
        assert bothways.main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--push", name]) == 2
        assert f"--push {name} is no name on the hub; give OWNER/NAME" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
