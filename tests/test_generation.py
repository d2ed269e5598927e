import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_project import CAPTIONS, SIZE, tiny_project

from ldm_core import random
from ldm_core.errors import UserError
from ldm_core.generation import PictureGenerator, PictureRequest, annotate, grid_image
from ldm_core.samplers.choice import SamplerChoice

REQUESTS = [
    PictureRequest("a red cat", 3),
    PictureRequest("a blue dog", 4, steps=3),
    PictureRequest("", 3, guidance=1.0),
    PictureRequest("two green birds", 5, guidance=4.0),
    PictureRequest("a red cat", 3, steps=3, guidance=0.0),
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> PictureGenerator:
    return PictureGenerator.load(tiny_project(tmp_path_factory.mktemp("teacher")))


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> PictureGenerator:
    return PictureGenerator.load(tiny_project(tmp_path_factory.mktemp("student"), "student"))


def grey_levels(a: np.ndarray, b: np.ndarray) -> int:
    """The greatest difference of two arrays of 8-bit pictures."""
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def noise(seed: int) -> torch.Tensor:
    return random.normal(seed, "picture", 0, torch.zeros(1, dtype=torch.int64), (3, SIZE, SIZE))


def to_pixels(generator: PictureGenerator, latents: torch.Tensor) -> np.ndarray:
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (generator.config.latents_mean, generator.config.latents_std)
    )
    pixels = ((latents * std + mean).clamp(-1, 1) + 1) * 127.5
    return pixels.permute(0, 2, 3, 1).round().numpy()


def test_a_picture_is_a_function_of_its_request(teacher):
    request = REQUESTS[0]
    [first], [again] = teacher.generate([request]), teacher.generate([request])
    assert np.array_equal(first, again)
    assert first.shape == (SIZE, SIZE, 3)
    assert first.dtype == np.uint8
    assert first.std() > 5  # a picture, neither black nor white all over
    for other in ({"seed": 4}, {"prompt": "a blue dog"}, {"guidance": 3.0}, {"steps": 2}):
        [changed] = teacher.generate([replace(request, **other)])
        assert grey_levels(first, changed) > 1, other


def test_alone_as_in_company(teacher):
    together = teacher.generate(REQUESTS)  # two step counts, four scales
    for request, picture in zip(REQUESTS, together, strict=True):
        [alone] = teacher.generate([request])
        assert grey_levels(alone, picture) <= 1  # neighbours share the arithmetic's order


def test_the_order_is_that_of_the_requests(teacher):
    backwards = teacher.generate(REQUESTS[::-1])
    assert grey_levels(backwards[::-1], teacher.generate(REQUESTS)) <= 1


def test_the_models_defaults_fill_in(teacher):
    explicit = PictureRequest("a red cat", 3, teacher.default_steps, teacher.default_guidance)
    assert (explicit.steps, explicit.guidance) == (5, 1.5)
    assert np.array_equal(teacher.generate([explicit]), teacher.generate([REQUESTS[0]]))


@torch.no_grad()
def test_a_teacher_takes_guided_euler_steps(teacher):
    x, scale, steps = noise(3), 2.5, 4
    cond, null = teacher.embed(["a red cat"]), teacher.embed([""])
    for index in range(steps):
        t = torch.tensor([1 - index / steps])
        with_caption, without = teacher.network(x, t, cond), teacher.network(x, t, null)
        x = x - (without + scale * (with_caption - without)) / steps
    [picture] = teacher.generate([PictureRequest("a red cat", 3, steps, scale)])
    assert grey_levels(picture[None], to_pixels(teacher, x)) <= 1


@torch.no_grad()
def test_a_student_leaps(student):
    x, steps = noise(3), 3
    cond = student.embed(["a red cat"])
    for index in range(steps):
        t, r = (torch.tensor([1 - i / steps]) for i in (index, index + 1))
        x = x - student.network(x, t, cond, r) / steps
    [picture] = student.generate([PictureRequest("a red cat", 3, steps)])
    assert grey_levels(picture[None], to_pixels(student, x)) <= 1


def test_solvers_of_the_same_path_agree_and_noise_leaves_it(teacher):
    names = ("euler", "heun", "dpmpp-2m", "unipc", "ddim")
    requests = [replace(REQUESTS[0], steps=200, sampler=SamplerChoice(name)) for name in names]
    euler, *others = teacher.generate(requests)
    for name, picture in zip(names[1:], others, strict=True):
        assert grey_levels(euler, picture) <= 4, name
    noisy = replace(requests[0], sampler=SamplerChoice("ddim", eta=1.0))
    [first], [again] = teacher.generate([noisy]), teacher.generate([noisy])
    assert np.array_equal(first, again)
    assert grey_levels(first, euler) > 8


def test_a_student_has_its_own_sampler(student):
    request = PictureRequest("a red cat", 3, sampler=SamplerChoice("heun"))
    with pytest.raises(UserError, match="sampler is heun, but .*student.* use the teacher"):
        student.check(request)


def test_every_step_is_shown(student):
    seen = []
    student.generate([PictureRequest("", 0, steps=3)], on_step=seen.append)
    assert [event.index for event in seen] == [0, 1, 2]


def test_a_students_guidance_is_folded_in(student):
    student.check(PictureRequest("a red cat", 0, guidance=1.0))
    with pytest.raises(UserError, match=r"guidance is 2\.0, but .*student.* use the teacher"):
        student.generate([PictureRequest("", 0), PictureRequest("a red cat", 0, guidance=2.0)])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps is 0; choose 1 to 1000"),
        ({"steps": 1001}, "steps is 1001"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
    ],
)
def test_what_no_model_can_draw(teacher, values, message):
    with pytest.raises(UserError, match=message):
        teacher.generate([replace(REQUESTS[0], **values)])


def test_the_greatest_seed(teacher):
    [last], [first] = (teacher.generate([replace(REQUESTS[0], seed=s)]) for s in (2**63 - 1, 0))
    assert grey_levels(last, first) > 1


def test_prompts_are_embedded_at_their_own_length(teacher):
    cond = teacher.embed([*CAPTIONS, ""])
    assert cond.mask.sum(1).tolist() == [4, 4, 8, 1]  # words and an end
    [alone] = [teacher.embed(CAPTIONS[:1])]
    torch.testing.assert_close(cond.tokens[:1, :4], alone.tokens)


def test_a_png_says_how_it_was_drawn(teacher):
    request = PictureRequest('ein "grüner" Hund 🐕', 7, steps=2)
    [picture] = teacher.generate([request])
    image = Image.open(io.BytesIO(annotate(picture, request, teacher)))
    assert np.array_equal(np.asarray(image), picture)
    assert json.loads(image.text["ldm"]) == {
        "prompt": request.prompt, "seed": 7, "steps": 2, "guidance": 1.5, "sampler": None,
        "model": teacher.digest,
    }  # fmt: skip


def test_grid():
    pictures = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 6, 3), np.uint8)
    sheet = grid_image(pictures, columns=2, gap=1)
    assert sheet.shape == (3 * 5 + 1, 2 * 7 + 1, 3)
    for index in range(5):
        top, left = 1 + index // 2 * 5, 1 + index % 2 * 7
        assert (sheet[top : top + 4, left : left + 6] == index).all()
    assert (sheet == 255).sum() == sheet.size - pictures.size
    assert grid_image(pictures).shape == (2 * 6 + 2, 3 * 8 + 2, 3)  # near a square
    assert grid_image(pictures[:1], columns=8).shape == (4 + 4, 6 + 4, 3)
