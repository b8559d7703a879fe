"""Clients that others wrote: litellm, and schemathesis, which makes requests up from the server's OpenAPI document.

Their packages are large and belong to no extra: .ci/run installs them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from serving import Server, chat_body, data_uri, png, serving

from molmo_edge import Molmo

CUP = '<point x="10.0" y="20.0" alt="cup">cup</point>'


@pytest.fixture(scope="module")
def server(any_saying: Callable[..., Molmo]) -> Iterator[Server]:
    with serving(any_saying(CUP)) as server:
        yield server


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # otherwise its import downloads a table
    return pytest.importorskip("litellm")


@pytest.mark.slow
def test_litellm(server: Server, litellm: Any) -> None:
    given = {"model": "openai/molmo", "api_base": f"{server.url}/v1", "api_key": "none", "num_retries": 0}
    answer = litellm.completion(**given, **chat_body("Point to the cup.", data_uri(png())))
    assert answer.choices[0].message.content == CUP
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens > 5
    chunks = litellm.completion(**given, **chat_body("Point to the cup.", data_uri(png())), stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == CUP
    response = litellm.responses(**given, input="Hello")
    assert response.output[0].content[0].text == CUP
    with pytest.raises(litellm.BadRequestError, match="base64"):
        litellm.completion(**given, **chat_body("What?", "data:image/png;base64,?"))


@pytest.mark.slow
def test_schemathesis(server: Server) -> None:
    """Every operation, with requests that match the schema and requests that do not: 2,000 in all."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings

    checks = schemathesis.checks
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 10
    limits = settings(
        max_examples=int(os.environ.get("MOLMO_EDGE_FUZZ", "100")),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    sent = 0
    for operation in operations:
        modes = schemathesis.GenerationMode
        for mode in modes if operation.method == "post" else [modes.POSITIVE]:  # a GET has nothing to be wrong

            @limits
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Any) -> None:
                nonlocal sent
                sent += 1
                response = case.call(timeout=10)
                case.validate_response(
                    response,
                    checks=[
                        checks.not_a_server_error,
                        checks.status_code_conformance,
                        checks.content_type_conformance,
                        checks.response_schema_conformance,
                    ],
                )
                assert "Traceback" not in response.text

            check()
    assert sent >= 12 * limits.max_examples
    assert server.send("/v1/chat/completions", chat_body("What?", data_uri(png()))).status == 200
