import math

import pytest

from ldm_core.errors import BadMedia
from ldm_core.media.weighted_captions import Caption, caption_pairs, weigh


@pytest.mark.parametrize(
    ("cell", "weights", "expected"),
    [
        ("a", None, {"a": 1.0}),
        (["a", " a ", "b"], None, {"a": 0.5, "b": 0.5}),
        (["a", None, ""], None, {"a": 1.0}),
        (["a", "b"], [3, 1], {"a": 0.75, "b": 0.25}),
        (["a", "b"], ["3", "1"], {"a": 0.75, "b": 0.25}),
        (["a", "b"], 7, {"a": 0.5, "b": 0.5}),
        ([{"caption": "a", "weight": 3}, {"text": "b"}], None, {"a": 0.75, "b": 0.25}),
        ([{"caption": "a", "text": "no", "weight": 1}, "b"], [9, 1], {"a": 0.5, "b": 0.5}),
        (["a", "b", "a"], [1, 2, 1], {"a": 0.5, "b": 0.5}),
        (["a", "b"], [0, 5], {"b": 1.0}),
        (["a", "b"], [1e-46, 1], {"b": 1.0}),  # 0 in the store's 32 bits
        (["a", "b"], [1e-300, 1e-300], {"a": 0.5, "b": 0.5}),
    ],
)
def test_weights_sum_to_one(cell, weights, expected):
    captions = weigh(caption_pairs(cell, weights))
    assert {caption.text: caption.weight for caption in captions} == pytest.approx(expected)
    assert math.fsum(caption.weight for caption in captions) == pytest.approx(1)


NO_WEIGHTS = [True, [2], "1e999", 10**400, -1, math.nan, math.inf, -math.inf]


@pytest.mark.parametrize(
    "weights",
    [[0, 0], [1e308, 1e308], [1], [1, 2, 3], "much", *([1, weight] for weight in NO_WEIGHTS)],
)
def test_bad_weights(weights):
    with pytest.raises(BadMedia) as caught:
        weigh(caption_pairs(["a", "b"], weights))
    assert (caught.value.stage, caught.value.reason) == ("list", "bad weight")


@pytest.mark.parametrize("cell", [None, "", [], [None], " \n", [{"weight": 3}], {"text": None}])
def test_no_caption(cell):
    with pytest.raises(BadMedia, match="no caption"):
        weigh(caption_pairs(cell))


@pytest.mark.parametrize("cell", [3, ["a", 3], {"caption": 3}, [["a"]]])
def test_what_is_no_text(cell):
    with pytest.raises(ValueError, match="expected text or a list of texts"):
        caption_pairs(cell)


def test_half_a_surrogate_pair_is_no_caption():
    with pytest.raises(BadMedia, match="unreadable caption"):
        weigh([("a smile \ud83d", None)])


def test_order_is_kept():
    assert weigh([("z", 1), ("a", 3)]) == (Caption("z", 0.25), Caption("a", 0.75))
