"""A few faults of the soak, and that it would notice what must not happen."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import soak, soak_faults, soak_report, soak_work
from tests.processes import Job


def test_a_flipped_byte_is_as_it_was_after_a_second_time(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    soak_faults.flip(path, 0.5)
    assert path.read_bytes()[50] == 50 ^ 255
    soak_faults.flip(path, 0.5)
    assert path.read_bytes() == bytes(range(100))


def test_the_report_counts_and_says_what_an_hour_is_worth(tmp_path):
    one = {"run": "prior, 2 ranks", "kind": "a rank killed", "step": 3, "codes": [[-9, 1]]}
    struck = [{**one, "lost": lost} for lost in (2.0, 4.0, 12.0)]
    about, table = soak_report.report(soak_report.Soak(tmp_path, 0, struck=struck), [])
    assert (about["faults"], about["lost, median s"], about["lost, worst s"]) == (3, 4.0, 12.0)
    assert about["effective training time at one fault an hour"] == round(1 - 66 / 3600, 4)
    assert [column._cells for column in table.columns][1] == ["3", "3"]


@pytest.mark.slow
def test_trainings_survive_a_few_faults_and_a_difference_is_noticed(tmp_path):
    out = tmp_path / "soak"
    first = ["--out", str(out), "--runs", "prior, 2 ranks"]
    try:
        assert soak.main([*first, "--faults", "3"]) == 0
        assert soak.main([*first, "--faults", "6"]) == 0  # another sitting
    finally:
        soak_faults.forget_clock()
    about = json.loads((out / "report.json").read_text())
    assert (about["faults"], about["recovered"], about["wrong"]) == (6, 6, [])
    clean = out / "clean" / "prior-2-ranks"
    check = Job(soak_work.compare, (str(clean), str(clean)), out=tmp_path / "same")
    assert check.wait() == [0], check.output()
    weights = load_file(clean / "weights.safetensors")
    name = max(weights, key=lambda key: weights[key].numel())
    flat = weights[name].view(-1)
    flat[0] = torch.tensor(np.nextafter(flat[0].item(), np.inf, dtype=np.float32))
    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    for path in (clean / "checkpoints").iterdir():
        (other / "checkpoints" / path.name).symlink_to(path)
    save_file(weights, other / "weights.safetensors")
    check = Job(soak_work.compare, (str(other), str(clean)), out=tmp_path / "differs")
    assert check.wait() == [1], check.output()
