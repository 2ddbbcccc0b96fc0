from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from sentence_transformers import SentenceTransformer

from bmf_matryoshka import evaluation, experiments, pairs, training
from bmf_matryoshka.errors import InputError
from bmf_matryoshka.profiles import LAPTOP, SMOKE


def test_every_option_changes_one_thing_and_fits_the_model() -> None:
    options = experiments.options(LAPTOP)
    reference = options[experiments.REFERENCE].profile
    for name, option in options.items():
        assert option.against in options
        assert option.profile.dims_for(384)
        if name not in (experiments.REFERENCE, option.against) and not (option.leak or option.passages):
            assert option.profile != reference, name
            seen = option.profile.max_steps * option.profile.batch_size
            assert seen == reference.max_steps * reference.batch_size, name
    assert len({str(option) for option in options.values()}) == len(options)


def test_the_published_table_holds_the_options_that_the_command_measures() -> None:
    root = Path(__file__).resolve().parents[1]
    published = experiments.load(root / "figures" / "experiments.json")
    options = experiments.options(LAPTOP)
    assert [(row["option"], row["why"], row["against"]) for row in published] == [
        (name, option.why, option.against) for name, option in options.items()
    ]


def test_the_published_table_says_what_chapter_04_reads_in_it() -> None:
    rows = {
        row["option"]: row
        for row in experiments.load(Path(__file__).resolve().parents[1] / "figures" / "experiments.json")
    }
    dims = [str(dim) for dim in LAPTOP.dims]
    rate = {name: row["pairs_seen"] / row["seconds"] for name, row in rows.items()}

    def differences(name: str, key: str) -> list[float]:
        return [rows[name][f"{dim} difference"][key] for dim in dims]

    leak = differences("leak, 4 epochs", "low")
    assert min(leak) > 0
    assert leak[-1] == max(leak)
    once, often = (differences(f"80 passages, {epochs}", "value") for epochs in ("1 epoch", "4 epochs"))
    assert all(more <= less for more, less in zip(often, once, strict=True))
    assert differences("no rotation", "value")[0] > -0.01
    assert -0.25 < differences("no rotation", "value")[-1] < -0.15
    for name in ("only the turn trained", "columns reversed"):
        assert max(differences(name, "high")) < 0, name
    for name in ("no layer frozen", "nothing frozen"):
        assert max(differences(name, "value")) < 0, name
        assert rate[name] < 0.6 * rate[experiments.REFERENCE], name
    assert max(differences("batches of similar length", "value")) < 0
    assert max(map(abs, differences("no length groups", "value"))) < 0.0005


def test_options_are_measured_against_the_reference_and_kept(
    course: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments, "STEPS", 2)
    few = pairs.take_passages(course, 60)
    profile = replace(SMOKE, batch_size=8, max_seq_length=24, linear_layer="map")
    table = experiments.run(profile, few, tmp_path, ["no rotation"], show_progress=False)
    assert [row["option"] for row in table] == ["the reference", "no rotation"]
    reference, without = table
    assert reference["32 difference"] is None
    difference = without["32 difference"]
    assert difference["value"] == pytest.approx(without["32"]["value"] - reference["32"]["value"])
    assert difference["low"] <= difference["value"] <= difference["high"]
    assert reference["pairs_seen"] == without["pairs_seen"] == 16
    shown = experiments.as_markdown(table).splitlines()
    assert shown[0].startswith("| option | what it is | pairs/s | 384 | 128 | 32 |")
    assert f"{difference['value']:+.3f}" in shown[3]

    def fail(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(training, "train", fail)
    assert experiments.run(profile, few, tmp_path, ["no rotation"], show_progress=False) == table
    with pytest.raises(InputError, match="no option 'nonsense': choose from the reference, no rotation, equal"):
        experiments.run(profile, few, tmp_path, ["nonsense"])

    experiments.save(table, tmp_path / "new" / "experiments.json")
    assert experiments.load(tmp_path / "new" / "experiments.json") == table
    with pytest.raises(InputError, match="is missing: python -m bmf_matryoshka experiments makes it"):
        experiments.load(tmp_path / "gone.json")


def test_merging_measures_each_weight_on_each_task(tiny: SentenceTransformer, course: pd.DataFrame) -> None:
    task = evaluation.build_task(pairs.split(pairs.take_passages(course, 20)), "all")
    rows = experiments.merging(tiny, tiny, {"tax law": task, "general": task}, (32, 8))
    assert len(rows) == 5 * 2 * 2
    assert sorted({row["weight"] for row in rows}) == [0.0, 0.25, 0.5, 0.75, 1.0]
    # Between equal weights there is nothing to see.
    assert len({row["value"] for row in rows if row["dim"] == 32}) == 1
