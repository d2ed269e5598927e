"""The wire format: what is accepted, what is refused, and that a refusal names field and remedy."""

import pytest
from pydantic import ValidationError

from pipelines.serving.api import (
    ApiError,
    ImageGenerationRequest,
    ModelCard,
    invalid,
    order,
)
from pipelines.serving.messages import Order

CARD = ModelCard(
    id="student",
    created=0,
    kind="student",
    digest="0123456789abcdef",
    size="64x64",
    default_steps=4,
    default_guidance=1.0,
    max_steps=16,
    max_pictures=8,
    lineage={},
)


def refusal(**body) -> ApiError:
    """The error of a body that must be refused, whichever of the two checks refuses it."""
    try:
        request = ImageGenerationRequest.model_validate(body)
    except ValidationError as error:
        # FastAPI's locations start with "body"
        return invalid([{**found, "loc": ("body", *found["loc"])} for found in error.errors()])
    with pytest.raises(ApiError) as raised:
        order(request, CARD)
    return raised.value


def test_defaults_are_the_models_and_the_seed_is_drawn_once():
    wanted = order(ImageGenerationRequest(prompt=" a circle ", n=2), CARD)
    assert (wanted.prompt, wanted.steps, wanted.guidance) == ("a circle", 4, 1.0)
    assert wanted.seeds[1] == wanted.seeds[0] + 1
    assert order(ImageGenerationRequest(prompt="a circle", n=2), CARD).seeds != wanted.seeds


def test_what_is_asked_for_is_passed_on():
    request = ImageGenerationRequest(
        prompt="x", model="student", n=2, size="64x64", seed=5, steps=7, guidance_scale=2, user="me"
    )
    assert order(request, CARD) == Order("x", (5, 6), 7, 2.0)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("prompt", "", "at least 1"),
        ("prompt", "   ", "at least 1"),
        ("prompt", "x" * 2001, "at most 2000"),
        ("prompt", 7, "string"),
        ("prompt", "\ud800", "unicode"),
        ("n", 0, "greater than or equal to 1"),
        ("n", 9, "at most 8"),
        ("n", "2", "integer"),
        ("n", 1.5, "integer"),
        ("n", True, "integer"),
        ("size", "32x32", "64x64"),
        ("size", "large", "64x64"),
        ("seed", -1, "greater than or equal to 0"),
        ("seed", 2**53, "less than or equal"),
        ("steps", 0, "greater than or equal to 1"),
        ("steps", 17, "at most 16"),
        ("guidance_scale", -0.5, "greater than or equal to 0"),
        ("guidance_scale", float("nan"), "finite"),
        ("response_format", "url", "b64_json"),
        ("model", "dall-e-3", "'student'"),
        ("quality", "hd", "known are prompt, model"),
    ],
)
def test_a_wrong_field_is_named(field, value, says):
    error = refusal(**{"prompt": "a circle", field: value})
    assert error.status == (404 if field == "model" else 422)
    assert error.body["error"]["param"] == field
    assert error.body["error"]["type"] == "invalid_request_error"
    message = error.body["error"]["message"]
    assert message.startswith(f"{field}: ")
    assert says.lower() in message.lower()
    assert len(message) < 300


def test_all_wrong_fields_are_in_the_message():
    error = refusal(n=0, steps=0)
    assert error.body["error"]["param"] == "prompt"
    assert all(f"{field}: " in str(error) for field in ("prompt", "n", "steps"))


def test_retry_after_only_where_waiting_helps():
    assert ApiError(422, "no").headers == {}
    assert ApiError(429, "full", retry_after_s=2).headers == {"Retry-After": "2"}
