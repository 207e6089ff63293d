"""Which sampling parameters are refused, and that the field is named."""

import pytest

from conclave.worker.errors import InvalidRequest
from conclave.worker.sampling import SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.5),
        ("min_p", 1.5),
        ("presence_penalty", 3.0),
        ("frequency_penalty", -2.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("n", 0),
        ("max_tokens", -1),
        ("min_tokens", -1),
        ("seed", -1),
        ("seed", 2**64),
        ("logprobs", -1),
        ("prompt_logprobs", -1),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("stop", ["x" * 257]),
        ("logit_bias", {5: 101.0}),
        ("logit_bias", {5: float("nan")}),
        ("no_such_field", 1),
    ],
)
def test_bad_value_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams.checked({field: value})
    assert caught.value.violations[0].field.startswith(f"sampling.{field}")


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams.checked({"temperature": -1, "top_p": 2, "n": 0})
    fields = {violation.field for violation in caught.value.violations}
    assert fields == {"sampling.temperature", "sampling.top_p", "sampling.n"}


def test_rule_between_fields_names_the_first() -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams.checked({"min_tokens": 5, "max_tokens": 4})
    assert caught.value.violations[0].field == "sampling.min_tokens"
