"""Pictures of captions in held-out phrasings are counted apart."""

import pytest
import torch

from cascade.data.scenes.captions import caption
from cascade.data.scenes.generate import render, sample_scene
from cascade.draws import generator
from cascade.eval.cascades.protocol import PHRASINGS, HeldOut, by_kind, verdicts
from cascade.eval.metrics.measures import HELD_OUT_PHRASINGS
from cascade.eval.sweeps.points import Sampled, _row


def pictures(scenes):
    shown = torch.stack([torch.from_numpy(render(scene, 64)) for scene in scenes])
    return shown.permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.mark.parametrize("level", ["language", "plain"])
def test_held_out_phrasings_are_counted_apart(level):
    """A painter that understands known phrasings alone paints all others blank."""
    scenes = [sample_scene(level, "val", generator(0, "val", i)) for i in range(30)]
    data = HeldOut([caption(scene) for scene in scenes], {}, scenes)
    novel = [bool(scene.wording and scene.wording.novel) for scene in scenes]
    painted = pictures(scenes)
    painted[novel] = 0.9
    found = by_kind(verdicts(painted, data), data)
    row = _row([Sampled("image_64", painted, 0, 0.0)], {**found, "intervals": {}})
    if level == "plain":
        assert not {*PHRASINGS, HELD_OUT_PHRASINGS.key} & {*found, *row}
        return
    known, held_out = (found[name] for name in PHRASINGS)
    assert (known["whole"], held_out["whole"]) == (1.0, 0.0)
    assert (known["count"], held_out["count"]) == (novel.count(False), novel.count(True))
    assert held_out["intervals"]["whole"][1] > 0
    assert row[HELD_OUT_PHRASINGS.key] == 0.0
