"""Claims about a sweep's report: what is read is what was written, what it says is true, and how
sure it says to be is how sure it is."""

import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from cascade.cli import main
from cascade.errors import UserError
from cascade.eval.metrics.measures import ACCURACY, CLIP_SCORE, FRECHET
from cascade.eval.pages.curves import Curve, dots, tradeoff
from cascade.eval.pages.plots import PALETTE, Panel, Ratios, alike, compose, save
from cascade.eval.pages.report import text
from cascade.eval.pages.spread import spread
from cascade.eval.sweeps.answers import answers, by_held, found, held
from cascade.eval.sweeps.comparison import comparison
from cascade.eval.sweeps.figures import drawings
from cascade.eval.sweeps.findings import not_run, outcomes, scale, section, write_findings
from cascade.eval.sweeps.results import read_sweep, write_cells, write_copy, write_summary
from cascade.eval.sweeps.significance import blocks, rates_differ, two_way
from tests import made_sweeps
from tests.made_sweeps import about

TEETH = {  # growth of teeth by vitamin C (Crampton 1947), as textbooks of R have it
    ("VC", 0.5): "4.2 11.5 7.3 5.8 6.4 10 11.2 11.2 5.2 7",
    ("VC", 1): "16.5 16.5 15.2 17.3 22.5 17.3 13.6 14.5 18.8 15.5",
    ("VC", 2): "23.6 18.5 33.9 25.5 26.4 32.5 26.7 21.5 23.3 29.5",
    ("OJ", 0.5): "15.2 21.5 17.6 9.7 14.5 10 8.2 9.4 16.5 9.7",
    ("OJ", 1): "19.7 23.3 23.6 26.4 20 25.2 25.8 21.2 14.5 27.3",
    ("OJ", 2): "25.5 26.4 22.4 24.5 24.8 30.9 26.4 27.3 29.4 23",
}


# What is read


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    return made_sweeps.text_x_unet(tmp_path_factory.mktemp("sweep") / "text_x_unet")


def test_the_csv_holds_every_cell_to_the_last_digit(grid, tmp_path):
    sweep = read_sweep(grid)
    assert len(sweep.rows) == 4 * 3 * 2 * 4
    write_copy(sweep, tmp_path)
    copy = read_sweep(tmp_path / "text_x_unet.json")
    assert [dict(row) for row in copy.rows] == [dict(row) for row in sweep.rows]
    write_copy(copy, tmp_path / "again")
    for ending in ("csv", "json"):
        name = f"text_x_unet.{ending}"
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_means_and_extremes_over_seeds(grid, tmp_path):
    write_summary(read_sweep(grid), tmp_path / "summary.csv")
    lines = np.genfromtxt(tmp_path / "summary.csv", delimiter=",", names=True, dtype=None)
    line = lines[(lines["text"] == "text_96") & (lines["unet"] == "unet_m") & (lines["scale"] == 2)]
    cells = [
        json.loads((grid / f"text_96-unet_m-s{s}" / "cells.jsonl").read_text().split("\n")[1])
        for s in (0, 1)
    ]
    numbers = [cell["frechet"] for cell in cells]
    assert line["n"] == 2
    np.testing.assert_allclose(line["frechetmean"], np.mean(numbers))
    np.testing.assert_allclose(line["frechetdeviation"], np.std(numbers, ddof=1))
    np.testing.assert_allclose(line["frechetlow"], min(numbers))


def guidance(folder, values=("1", "2", "4"), **more):
    told = about({}, {"scale": list(values)}, name="guidance", **more)
    return made_sweeps.write(folder, told, lambda scale: 0.5 - 0.02 * (float(scale) - 2) ** 2)


def test_numbers_in_names_are_one_however_they_are_written(tmp_path):
    folder = guidance(tmp_path / "s", seeds=(0,))
    told = json.loads((folder / "sweep.json").read_text())
    told["choices"]["scale"] = [1, 2.0, "4.00"]
    (folder / "sweep.json").write_text(json.dumps(told))
    sweep = read_sweep(folder)
    assert [row["scale"] for row in sweep.rows] == [1, 2, 4]
    assert not_run(sweep) == ""
    assert "95 % interval of a cell over captions: about ± 0.03 in CLIP score" in scale(sweep)


def edited(folder, change):
    file = folder / "s0" / "cells.jsonl"
    file.write_text(change(file.read_text()))
    return folder


def test_a_judge_may_be_named_by_its_weights_alone_as_earlier_versions_did(tmp_path):
    """And two judges of the same weights are two."""
    new = '"judge": "new", "judge\'s weights": "123e4"'
    folder = edited(guidance(tmp_path / "s"), lambda t: t.replace('"judge": "123e4"', new, 1))
    assert len(read_sweep(folder).rows) > 1
    edited(folder, lambda text: text.replace('"judge": "123e4"', new.replace("new", "other"), 1))
    with pytest.raises(UserError, match=r"differ in protocol\.judge"):
        read_sweep(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text[:-30], "line 3 is not a cell"),
        (lambda text: text + text, "at scale 1.0, seed 0 occurs twice"),
        (lambda text: text.replace("123e4", "another", 1), "differ in protocol.judge"),
        (lambda text: text.replace('"count": 300', '"count": 30', 1), "differ in count"),
        (lambda text: re.sub('"frechet": [^,]*', '"frechet": NaN', text, count=1), "is nan"),
        (lambda text: text.replace('"scale"', '"frechet"'), "may be called frechet"),
    ],
)
def test_bad_cells_are_refused(tmp_path, change, says):
    folder = edited(guidance(tmp_path / "s"), change)
    with pytest.raises(UserError, match=says):
        read_sweep(folder)


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        (json.dumps({"name": "s"}), "no 'axes'"),
        (json.dumps(about({"a": [1]}, {"a": [1]})), "do not fit"),
        (json.dumps(about({"a": [1]}, along="b")), "do not fit"),
    ],
)
def test_what_is_no_sweep_is_refused(tmp_path, told, says):
    (tmp_path / "sweep.json").write_text(told)
    with pytest.raises(UserError, match=says):
        read_sweep(tmp_path)


def test_cells_that_are_no_longer_asked_for_are_left_out_and_counted(tmp_path):
    folder = guidance(tmp_path / "s")
    told = json.loads((folder / "sweep.json").read_text())
    told["choices"]["scale"] = ["1", "2", "3"]
    (folder / "sweep.json").write_text(json.dumps(told))
    sweep = read_sweep(folder)
    assert sweep.stale == 2
    assert {row["scale"] for row in sweep.rows} == {1, 2}
    assert not_run(sweep) == "s0 (2 of 3 cells), s1 (2 of 3 cells)"


# How sure


def test_two_way_analysis_is_the_textbooks():
    y, supplement, dose = zip(
        *((float(v), a, b) for (a, b), values in TEETH.items() for v in values.split())
    )
    found = two_way(y, supplement, dose)
    np.testing.assert_allclose(found.a.squares, 205.35, atol=5e-3)
    np.testing.assert_allclose(found.b.squares, 2426.43, atol=5e-3)
    np.testing.assert_allclose(found.interaction.squares, 108.32, atol=5e-3)
    np.testing.assert_allclose(found.error * found.df, 712.11, atol=5e-3)
    assert (found.a.df, found.b.df, found.interaction.df, found.df) == (1, 2, 2, 54)
    np.testing.assert_allclose(found.a.f, 15.572, atol=5e-4)
    np.testing.assert_allclose(found.b.f, 92.000, atol=5e-4)
    np.testing.assert_allclose([found.a.p, found.interaction.p], [0.000231, 0.021860], atol=5e-7)
    np.testing.assert_allclose(found.b.omega2, (2426.43 - 2 * 13.187) / (3452.21 + 13.187), 1e-4)
    assert found.b.permuted == 1 / 10_000
    assert found.more < 0.001


def fit(y, *columns):
    """Squares that a linear model leaves."""
    design = np.column_stack([np.ones(len(y)), *columns])
    return float(((y - design @ np.linalg.lstsq(design, y)[0]) ** 2).sum())


def test_gaps_do_not_lend_one_factors_effect_to_the_other():
    rng = np.random.default_rng(3)
    cells = [c for c in itertools.product(range(3), range(3), range(2)) if c not in {(2, 2, 1)}]
    cells = [c for c in cells if c[:2] != (0, 2)]
    a, b, _ = np.array(cells).T
    y = a + rng.normal(size=len(a))
    found = two_way(y.tolist(), a.tolist(), b.tolist(), draws=9)
    in_a, in_b = ([x == 1, x == 2] for x in (a, b))
    both = fit(y, *in_a, *in_b)
    np.testing.assert_allclose(found.a.squares, fit(y, *in_b) - both)
    np.testing.assert_allclose(found.b.squares, fit(y, *in_a) - both)
    assert found.interaction.df == 3  # of four, as a cell is missing
    only_a = two_way((100.0 * a).tolist(), a.tolist(), b.tolist(), draws=9)
    assert only_a.b.squares < 1e-6


def test_one_seed_leaves_the_interaction_as_error():
    a, b = np.indices((3, 4)).reshape(2, -1).tolist()
    y = np.random.default_rng(0).normal(size=12)
    found = two_way(y.tolist(), a, b, draws=9)
    assert found.interaction is None
    assert found.df == 6
    expected = stats.f_oneway(*(y.reshape(3, 4) - y.reshape(3, 4).mean(0) + y.mean()))
    np.testing.assert_allclose(found.a.f, expected.statistic * 6 / 9)  # without the columns' df
    with pytest.raises(ValueError, match="too few"):
        two_way([1, 2, 3], [0, 1, 1], [0, 0, 1])
    with pytest.raises(ValueError, match="two levels"):
        two_way([1, 2], [0, 0], [0, 1])


def simulated(effect_a, effect_b, sweeps=300, seed=0):
    """Of many sweeps of 3 x 3 x 2: p of a, p by permutation, p of "alike", whether a is larger."""
    rng = np.random.default_rng(seed)
    a, b, _ = np.indices((3, 3, 2)).reshape(3, -1)
    for _ in range(sweeps):
        y = effect_a * a + effect_b * b + rng.normal(size=len(a))
        found = two_way(y.tolist(), a.tolist(), b.tolist(), draws=199)
        yield found.a.p, found.a.permuted, found.more, found.a.omega2 > found.b.omega2


def test_without_an_effect_one_sweep_in_twenty_says_otherwise():
    p, permuted, alike_, _ = np.array(list(simulated(0, 2))).T
    for rate in ((p < 0.05).mean(), (permuted <= 0.05).mean()):
        assert 0.02 < rate < 0.085  # 0.05 within 2.5 standard errors
    assert (alike_ < 0.05).mean() > 0.5  # b does explain more


@pytest.mark.parametrize("effect", [0, 2])
def test_equal_factors_are_rarely_told_apart(effect):
    alike_ = np.array([sweep[2] for sweep in simulated(effect, effect)])
    assert (alike_ < 0.05).mean() < 0.085


def test_the_factor_with_the_larger_effect_is_named():
    found = np.array(list(simulated(3, 0.5, sweeps=100)))
    assert found[:, 3].all()
    assert (found[:, 2] < 0.05).mean() > 0.9


def test_two_values_are_compared_as_by_the_paired_t_test():
    table = np.random.default_rng(0).normal(size=(6, 2)) + np.arange(2)
    expected = stats.ttest_rel(*table.T)
    found = blocks(table)
    np.testing.assert_allclose([found.f, found.p], [expected.statistic**2, expected.pvalue])
    d, low, high, p = found.difference(0, 1)
    np.testing.assert_allclose(p, expected.pvalue, rtol=1e-6)
    interval = expected.confidence_interval(0.95)
    np.testing.assert_allclose([d, low, high], [table[:, 0].mean() - table[:, 1].mean(), *interval])


def test_the_permutation_test_counts_all_orders():
    table = np.array([[0.1, 0.5, 0.9], [0.2, 0.7, 0.8]])

    def between(t):
        return ((t.mean(0) - t.mean()) ** 2).sum()

    orders = list(itertools.permutations(range(3)))
    counted = [between(np.array([table[0], table[1, list(o)]])) for o in orders]
    exact = np.mean(np.array(counted) >= between(table) - 1e-12)
    found = blocks(table)
    assert found.permuted == pytest.approx(exact, abs=0.015)
    assert found.least == pytest.approx(1 / 6)


def test_the_best_of_equal_values_is_rarely_called_better():
    rng, wrong, small = np.random.default_rng(0), 0, 0
    for _ in range(200):
        found = blocks(rng.normal(size=(3, 4)) + rng.normal(size=(3, 1)), draws=99)
        best, worst = int(found.means.argmax()), int(found.means.argmin())
        wrong += found.difference(best, worst)[1] > 0
        small += found.permuted <= 0.05
    assert wrong <= 20  # 10 are to be expected
    assert 2 <= small <= 20


def test_an_interval_of_rates_is_newcombes():
    np.testing.assert_allclose(rates_differ((56 / 70, 48 / 80), (70, 80)), [0.0524, 0.3339], 1e-3)
    np.testing.assert_allclose(rates_differ((0, 0), (10, 10)), [-0.2775, 0.2775], 1e-3)


# What is said


def answer(folder, measure=ACCURACY):
    return next(a for a in answers(read_sweep(folder)) if a.measure == measure)


@pytest.mark.parametrize(("text_", "unet", "more"), [(0.15, 0.02, "text"), (0.01, 0.15, "unet")])
def test_the_factor_that_matters_is_named(tmp_path, text_, unet, more):
    folder = made_sweeps.text_x_unet(tmp_path / "s", text=text_, unet=unet, noise=0.01)
    for measure in (ACCURACY, FRECHET):
        found_ = answer(folder, measure)
        assert f"{more} explains significantly more than" in found_.sentence()
        verdict = "agrees" if more == "text" else "does not agree"
        assert found_.verdict(read_sweep(folder).expected(measure)) == verdict


def test_equal_factors_are_not_decided(tmp_path):
    folder = made_sweeps.text_x_unet(tmp_path / "s", text=0.1, unet=0.1, noise=0.02)
    assert "text and unet have significant effects; which explains more is undecided" in (
        answer(folder).sentence()
    )
    assert answer(folder).verdict(["text"]).startswith("undecided")
    chance = made_sweeps.text_x_unet(tmp_path / "c", text=0, unet=0, noise=0.05)
    assert "neither text nor unet has a significant effect" in answer(chance).sentence()


def test_the_control_is_no_size(grid, tmp_path):
    changed = shutil.copytree(grid, tmp_path / "changed")
    for file in changed.glob("untrained*/cells.jsonl"):
        file.write_text(re.sub('"accuracy": [^,]*', '"accuracy": 0.01', file.read_text()))
    before, after = answer(grid), answer(changed)
    assert before.test == after.test
    assert before.n == after.n == 18
    assert "The control, untrained, is significantly worse than text_192" in " ".join(
        found(read_sweep(changed))
    )
    gain = next(
        p.gain for p in after.control.pairs if after.control.values[p.other]["text"] == "untrained"
    )
    assert gain == pytest.approx(after.control.spreads[after.control.best].mean - 0.01)


def thresholds(folder, **more):
    loss = {"none": 0.05, "static": 0.02, "dynamic": 0.0}
    told = about({}, {"threshold": list(loss), "scale": [1, 2, 8]}, name="thresholds", **more)
    return made_sweeps.write(
        folder, told, lambda threshold, scale: 0.6 - loss[threshold] * scale, noise=0.002
    )


def test_the_question_is_of_the_first_choice_and_the_other_is_held(tmp_path):
    folder = thresholds(tmp_path / "s", along="scale")
    assert held(read_sweep(folder), ACCURACY) == {"scale": 1}  # best on average
    assert "significantly" not in answer(folder).sentence().replace("not significantly", "")
    high = thresholds(
        tmp_path / "high", along="scale", at={"scale": 8}, expected={"accuracy": "static"}
    )
    sentence = answer(high).sentence()
    assert sentence.startswith("dynamic has the best scene accuracy at scale 8: 0.59")
    assert "significantly better than none (by 0.3" in sentence
    assert answer(high).verdict(read_sweep(high).expected(ACCURACY)) == "does not agree"
    assert [c.values[c.best]["threshold"] for c in by_held(read_sweep(folder), ACCURACY)][
        2
    ] == "dynamic"


def test_less_distance_is_better(tmp_path):
    found_ = answer(thresholds(tmp_path / "s", at={"scale": 8}), FRECHET)
    assert found_.values[found_.best] == {"threshold": "dynamic"}
    assert all(pair.gain > 0 and pair.low < pair.gain < pair.high for pair in found_.pairs)


def test_trained_axes_come_before_choices(tmp_path):
    told = about({"long": [0, 65, 95]}, {"scale": [1, 2]}, along="long")
    folder = made_sweeps.write(tmp_path / "s", told, lambda long, scale: 0.4 + 0.003 * long)
    found_ = answer(folder)
    assert [values["long"] for values in found_.values] == [0, 65, 95]
    assert found_.over == "seeds"
    assert "long 95 has the best scene accuracy at scale" in found_.sentence()


def test_no_signal_and_not_run(tmp_path):
    told = about({"mix": [0, 95]}, {})
    weak = read_sweep(made_sweeps.write(tmp_path / "weak", told, lambda mix: 0.29, noise=0))
    assert found(weak) == ["no signal: the best cell's scene accuracy is 0.29, below 0.3."]
    skipped = [f"{mix}-s{seed}" for mix in (0, 95) for seed in (0, 1)]
    absent = read_sweep(made_sweeps.write(tmp_path / "no", told, lambda mix: 0.5, skip=skipped))
    assert found(absent) == ["not run."]
    assert not_run(absent) == "0-s0, 0-s1, 95-s0, 95-s1"
    assert drawings(absent) == []
    one = read_sweep(
        made_sweeps.write(tmp_path / "one", told, lambda mix: 0.5, skip=["0-s1", "95-s1"])
    )
    assert "over captions" in answers(one)[0].sentence()  # of accuracy, one seed allows that
    assert "too few seeds for a test" in answers(one)[1].sentence()


def test_steps_are_drawn_and_judged_by_evaluations(tmp_path):
    told = about({}, {"solver": ["ddim", "heun"], "steps": [4, 8, 16]}, along="steps")
    folder = made_sweeps.write(
        tmp_path / "s", told, lambda solver, steps: 0.8 - (1.6 if solver == "ddim" else 0.4) / steps
    )
    (drawing, _) = drawings(read_sweep(folder))
    axes = compose(drawing.panels[:1]).axes[0]
    line = axes.get_lines()[0]
    assert line.get_xdata().tolist() == [8, 16, 32]
    places = [axes.transData.transform((x, 0.1))[0] for x in line.get_xdata()]
    assert places[1] - places[0] == pytest.approx(places[2] - places[1])  # as ratios
    assert "heun, steps 8, 16 evaluations per picture" in " ".join(found(read_sweep(folder)))


@pytest.mark.parametrize(
    ("distance", "values", "marks"),
    [
        (FRECHET.distance, (0.008, 0.8), [0.01, 0.1]),
        (FRECHET.distance, (0.0085, 0.032), [0.01, 0.02, 0.03]),
        (CLIP_SCORE.distance, (0.02, 0.97), [0.5, 0.9, 0.95]),
    ],
)
def test_an_axis_of_ratios_goes_one_way_and_has_round_marks(distance, values, marks):
    ratios = Ratios(distance)
    assert ratios.place(values[0]) < ratios.place(values[1])
    found = ratios.tick_values(*values)
    assert set(marks) <= set(found)
    assert 2 < len(found) < 9
    assert all(min(values) <= mark <= max(values) for mark in found)


def test_a_mean_shows_the_digits_that_its_deviation_leaves():
    shown = [text(pair) for pair in [(0.71234, 0.0213), (0.5, None), (0.18, 1e-17), (1234.5, 3.2)]]
    assert shown == ["0.712 ± 0.021", "0.5", "0.18", "1234 ± 3"]  # four digits at most


# What is drawn


def luminance(colour):
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear, float(linear @ [0.2126, 0.7152, 0.0722])


def oklab(linear):
    cones = np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]])
    mixed = [[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]
    return np.array(mixed) @ np.cbrt(cones @ linear)


BLIND = {  # Machado, Oliveira and Fernandes 2009, full severity
    "protanopia": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
    "deuteranopia": [
        [0.3673, 0.8606, -0.2280],
        [0.2801, 0.6725, 0.0474],
        [-0.0118, 0.0429, 0.9689],
    ],
    "none": np.eye(3),
}


def test_colours_are_told_from_both_pages_and_from_each_other():
    for colour in PALETTE:
        _, own = luminance(colour)
        assert 1.05 / (own + 0.05) >= 3
        assert (own + 0.05) / (luminance("#14171c")[1] + 0.05) >= 3
    for matrix in map(np.array, BLIND.values()):
        seen = [oklab(np.clip(matrix @ luminance(c)[0], 0, 1)) for c in PALETTE]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 0.15


def test_curves_are_means_over_the_other_factor_and_bands_the_extremes_of_seeds(grid):
    sweep = read_sweep(grid)
    first, second = drawings(sweep)
    assert [len(d.panels) for d in (first, second)] == [2, 2]
    axes = compose(second.panels).axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines) == ["untrained", "text_32", "text_96", "text_192"]
    rows = sweep.where({"text": "text_96", "scale": 2.0})
    seeds = [np.mean([r["accuracy"] for r in rows if r["seed"] == s]) for s in (0, 1)]
    assert lines["text_96"].get_ydata()[1] == pytest.approx(np.mean(seeds))
    band = axes.collections[2].get_paths()[0].vertices
    assert sorted(set(band[band[:, 0] == 2][:, 1])) == pytest.approx(sorted(seeds))
    left, right = compose(first.panels).axes
    assert left.get_xlim() == right.get_xlim()
    assert left.get_ylim() == right.get_ylim()


def test_half_a_sweep_averages_over_what_all_have(tmp_path):
    skip = [f"text_192-unet_l-s{s}" for s in (0, 1)]
    folder = made_sweeps.text_x_unet(tmp_path / "s", skip=skip)
    titles = [panel.title for panel in drawings(read_sweep(folder))[0].panels]
    assert titles[0].endswith("mean over unet_s, unet_m")
    assert titles[1].endswith("mean over text_32, text_96")
    assert not_run(read_sweep(folder)) == "text_192-unet_l-s0, text_192-unet_l-s1"
    assert answer(folder).test is not None


def test_what_shares_no_training_is_not_compared(tmp_path):
    kept = {"untrained-unet_m-s0", "text_32-unet_m-s0", "text_96-unet_s-s0"}
    points = itertools.product(["untrained", *made_sweeps.SIZES], "sml", (0, 1))
    skip = {f"{t}-unet_{u}-s{s}" for t, u, s in points} - kept
    folder = made_sweeps.text_x_unet(tmp_path / "s", skip=skip)
    found_ = answer(folder)
    assert [v["text"] for v in found_.control.values] == ["untrained", "text_32"]
    assert "too little has run" in found_.sentence()
    assert drawings(read_sweep(folder)) == []
    shutil.rmtree(folder / "text_32-unet_m-s0")
    assert answer(folder).control is None


def test_figures_are_the_same_files_each_time(tmp_path):
    points = [spread([x, x + 0.1]) for x in (1.0, 2.0, 1.5)]
    curves = [Curve(name, points, points[::-1], i) for i, name in enumerate("ab")]
    panels = [Panel("", "x", "y", tradeoff(curves)), Panel("t", "x", "y", dots(curves, ["p", "q"]))]
    for stem in ("a", "b"):
        save(compose(alike(panels)), tmp_path / stem)
    for ending in (".svg", ".png"):
        first, second = ((tmp_path / f"{stem}{ending}").read_bytes() for stem in "ab")
        assert first == second


# The page of findings


def test_findings_are_made_again_of_their_tables(tmp_path, capsys):
    told = about({}, {"scale": [1, 2]}, name="b", expected={"accuracy": [2]})
    sweeps = [made_sweeps.write(tmp_path / "runs" / "b", told, lambda scale: 0.3 * scale)]
    sweeps.append(guidance(tmp_path / "runs" / "a"))
    page = tmp_path / "findings.md"
    write_findings(page, [read_sweep(folder) for folder in sweeps])
    page.write_text("# Mine\n\nWords.\n" + page.read_text()[page.read_text().index("\n## ") :])
    before = {p.name: p.read_bytes() for p in [page, *(tmp_path / "findings").iterdir()]}
    assert {"b.csv", "b.json", "b.svg", "b.png", "guidance.csv", "b_summary.csv"} <= set(before)
    shutil.rmtree(tmp_path / "runs")
    assert main(["report", str(tmp_path / "findings"), "--findings", str(page)]) == 0
    after = {p.name: p.read_bytes() for p in [page, *(tmp_path / "findings").iterdir()]}
    assert after == before
    words = page.read_text()
    assert words.startswith("# Mine\n\nWords.\n")
    assert words.index("## All questions") < words.index("## b") < words.index("## guidance")
    assert words.count("\n| [guidance](#guidance) | ") == 1
    assert "**Agreement.** scene accuracy: agrees." in words
    assert "![b](findings/b.svg)" in words
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "contains no sweep" in capsys.readouterr().err


def test_a_section_of_what_was_not_run_says_so(tmp_path):
    skip = [f"s{seed}" for seed in (0, 1)]
    told = about({}, {"scale": [1, 2]}, name="guidance")
    folder = made_sweeps.write(tmp_path / "s", told, lambda scale: 0.5, skip=skip)
    words = section(read_sweep(folder), tmp_path)
    assert "* not run." in words
    assert ".svg" not in words


def test_several_sweeps_have_a_page_each_and_one_of_all(tmp_path):
    guidance(tmp_path / "runs" / "one")
    shutil.copytree(tmp_path / "runs" / "one", tmp_path / "runs" / "two")
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    index = (tmp_path / "out" / "index.html").read_text()
    assert re.findall('href="([^#"]*)"', index) == ["one/report.html", "two/report.html"]
    for name in ("one", "two"):
        files = {p.name for p in (tmp_path / "out" / name).rglob("*")}
        assert {"report.html", "cells.csv", "summary.csv", "guidance.svg", "guidance.png"} <= files
    page = (tmp_path / "out" / "one" / "report.html").read_text()
    assert "significantly better than" in page
    assert not re.search(r"https?://|<script|<link|<iframe|@import|url\(", page)
    with pytest.raises(UserError, match="two sweeps are called guidance"):
        write_findings(
            tmp_path / "f.md", [read_sweep(tmp_path / "runs" / n) for n in ("one", "two")]
        )
    write_cells(read_sweep(tmp_path / "runs" / "one"), tmp_path / "cells.csv")
    assert (tmp_path / "cells.csv").read_bytes() == (tmp_path / "out/one/cells.csv").read_bytes()


@pytest.mark.parametrize("measure", [FRECHET, CLIP_SCORE])
def test_a_bad_value_that_scatters_does_not_hide_what_good_ones_differ_in(measure):
    distances = {"good": (0.010, 0.0102, 0.0101), "near": (0.0120, 0.0121, 0.0122)}
    distances["bad"] = (0.70, 0.72, 0.71)  # ten times the scatter of both
    cells = [
        {seed: {measure.key: x if measure.less else 1 - x} for seed, x in enumerate(row)}
        for row in distances.values()
    ]
    found = comparison(measure, {}, [{"what": name} for name in distances], cells, False)
    near, bad = found.pairs
    ratios = [b / a for a, b in zip(distances["good"], distances["near"])]
    assert near.gain == pytest.approx(np.prod(ratios) ** (1 / 3))  # of geometric means
    assert [near.significant, bad.significant] == [True, True]
    assert near.low * near.high == pytest.approx(near.gain**2)
    assert f"near (× {near.gain:.4g}, [" in found.sentence()


def test_each_kind_may_be_looked_at_where_it_is_best_itself(tmp_path):
    """Unguided all are one: held at a common scale, that would be all there is to see."""
    best = {"free": 1, "interval": 4}

    def score(kind, scale):
        return 0.7 if scale == 1 else 0.9 if scale == best[kind] else 0.1

    asked = {"kind": [*best], "scale": [1, 2, 4]}
    told = about({}, asked, along="scale", expected={"accuracy": ["interval"]})
    common = read_sweep(made_sweeps.write(tmp_path / "common", told, score))
    assert held(common, ACCURACY) == {"scale": 1}
    own = read_sweep(made_sweeps.write(tmp_path / "own", {**told, "at": {"scale": "own"}}, score))
    assert held(own, ACCURACY) == {"scale": "own"}
    sentence = answers(own)[0].sentence()
    assert sentence.startswith(
        "kind interval, scale 4 has the best scene accuracy, each at its best"
    )
    assert "significantly better than kind free, scale 1 (by 0." in sentence
    columns, rows = outcomes(own)
    assert columns[0] == "kind"
    assert [row[0] for row in rows] == [*best]
    accuracy = columns.index("scene accuracy, each at its best scale")
    assert rows[1][accuracy][0] > rows[0][accuracy][0] + 0.1


# What an earlier build wrote

WRITTEN = Path(__file__).parent / "written" / "sweep"


def test_a_sweep_of_an_earlier_build_is_reported_with_the_tables_that_it_had(tmp_path):
    """The build before the modules moved to their folders wrote these files, tables included."""
    assert main(["report", str(WRITTEN), "--out", str(tmp_path)]) == 0
    for name in ("cells.csv", "summary.csv"):
        assert (tmp_path / name).read_bytes() == (WRITTEN / name).read_bytes()
    page = (tmp_path / "report.html").read_text()
    assert "corruption" in page
    assert "<h2" in page
    assert "scale 1; seed 0" in page  # the grid, found by its name
    assert "Training loss of every run" in page
