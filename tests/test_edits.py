"""What `cascade evaluate --edits` asks for, and how it judges."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from cascade.data.scenes.generate import UNSEEN, render, sample_scene
from cascade.draws import generator
from cascade.eval.cascades import edits
from cascade.eval.cascades.edits import Edited
from cascade.pipeline import Cascade

OF = Edited(Cascade([]), 64, seed=0)


def scenes(objects, count):
    drawn = (sample_scene("plain", "val", generator(0, "test", i)) for i in range(400))
    return [scene for scene in drawn if len(scene.objects) == objects][:count]


@pytest.mark.parametrize("part", ["color", "shape", "both"])
def test_the_desired_object_differs_in_that_alone_and_occurs_in_training(part):
    for number, scene in enumerate(scenes(2, 40)):
        wanted = edits._other(OF, scene, part, number)
        old, new = scene.objects[0], wanted.objects[0]
        assert UNSEEN[new.shape] != new.color
        assert (new.color, new.shape) != (old.color, old.shape)
        assert (new.color, new.shape) != (scene.objects[1].color, scene.objects[1].shape)
        assert part != "color" or new.shape == old.shape
        assert part != "shape" or new.color == old.color
        assert replace(new, color=old.color, shape=old.shape) == old
        assert wanted.objects[1:] == scene.objects[1:]


def perfect(monkeypatch, pictures):
    """Makes repainting return the given pictures, where they are not known."""

    def repainted(self, whole, jumps):
        kept = (c.picture * ~c.unknown[..., None] for c in self.canvases)
        new = (p * c.unknown[..., None] for p, c in zip(pictures, self.canvases))
        return [a + b for a, b in zip(kept, new)]

    monkeypatch.setattr("cascade.runs.editing.Work.repainted", repainted)


def test_perfect_repainting_is_right_and_no_repainting_wrong(monkeypatch):
    two = scenes(2, 12)
    wanted = [edits._other(OF, scene, "both", i) for i, scene in enumerate(two)]
    perfect(monkeypatch, [render(scene, 64) for scene in wanted])
    found = edits.inpainting(OF, two)
    assert (found["rate"], found["count"]) == (1, 12)
    assert found["seam"] < 1.5
    assert json.loads(json.dumps(found)) == {**found, "interval": list(found["interval"])}
    perfect(monkeypatch, [render(scene, 64) for scene in two])
    assert edits.outpainting(OF, two)["rate"] == 1
    assert edits.inpainting(OF, two)["rate"] == 0
    perfect(monkeypatch, [np.zeros((64, 64, 3), np.uint8) for _ in two])
    found = edits.inpainting(OF, two)
    assert found["rate"] == 0
    assert found["seam"] > 1.5
    assert edits.outpainting(OF, two)["rate"] == 0


def test_image_to_image_asks_for_colour_and_place(monkeypatch):
    one = scenes(1, 8)
    wanted = [edits._other(OF, scene, "color", i) for i, scene in enumerate(one)]
    moved = [replace(s, objects=(replace(s.objects[0], x=s.objects[0].x + 0.15),)) for s in wanted]
    monkeypatch.setattr("cascade.runs.editing.Work.squares", lambda self: {})
    for shown, rate in ((wanted, 1), (one, 0), (moved, 0)):
        pictures = np.stack([render(scene, 64) for scene in shown])
        made = torch.from_numpy(pictures).permute(0, 3, 1, 2)[:, None] / 127.5 - 1
        monkeypatch.setattr("cascade.runs.editing.Work.rows", lambda *_, of=made, **__: of)
        assert edits.image_to_image(OF, one)["rate"] == rate
