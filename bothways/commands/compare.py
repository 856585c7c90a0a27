"""The command line of the comparison."""

from tyro.conf import Positional

from bothways.commands.shared import emit
from bothways.configs import find


def compare(
    experiments: Positional[tuple[str, ...]] = (),
    size: str = "small",
    causal: str = "",
    masked: str = "",
    hybrid: str = "",
    workdir: str = "",
    json: bool = False,
) -> None:
    """Run the controlled experiments of GPT against BERT, and write report.html and report.json.

    Trained runs and measurements are kept; the same command resumes where it stopped.

    Args:
        experiments: Any of directions, algorithms, modes, in-context, weights, prompts, generation, dial, shares; by
            default all nine.
        size: smoke, tiny (minutes), small (on two cores an hour for the first seven, one more for dial, half of one for
            shares); or full, by your recipes.
        causal: A recipe of a causal model (shakespeare_gpt).
        masked: A recipe of a bidirectional model; by default the hybrid one without causal rows, and shakespeare_bert.
        hybrid: A recipe trained in both directions (shakespeare_hybrid).
        workdir: Directory on a disk for runs, measurements and report (runs/compare-SIZE).
        json: One JSON object per experiment.
    """
    import jax

    from bothways.compare.run import compare as run_comparison
    from bothways.compare.run import masked_only
    from bothways.rundir import on_disk

    home = on_disk(workdir or f"runs/compare-{size}")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # many small programs, alike for every seed
    both = find(hybrid or "shakespeare_hybrid")
    arms = {"causal": find(causal or "shakespeare_gpt")}
    arms |= {"masked": find(masked) if masked else masked_only(both)}
    arms |= {} if masked and not hybrid else {"hybrid": both}
    arms |= {} if masked or hybrid else {"bert": find("shakespeare_bert")}
    given = {"size": size, "causal": causal, "masked": masked, "hybrid": hybrid, "workdir": workdir}
    options = "".join(f" --{k} {v}" for k, v in given.items() if v)
    for experiment, result in run_comparison(experiments, size, arms, home, options):
        record = {
            "experiment": experiment.name,
            "verdict": result.verdict,
            "effect": result.effect,
            "finding": result.finding,
            "sure": result.sure,
        }
        text = f"{experiment.title}\n  {result.verdict}: {result.effect}\n  {result.finding}\n  {result.sure}\n"
        emit(record, json, text)
