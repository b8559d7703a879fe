"""The endpoints of `molmo-edge serve` give what the SDK gives, to OpenAI's client and to moondream's."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from serving import Server, chat_body, data_uri, png, serving

from molmo_edge import Molmo
from molmo_edge.server.stop_sequences import StopSequences

openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")

GOLDEN2 = Path(__file__).parent / "golden2"
CUPS = '<points x1="10.0" y1="20.0" x2="30.5" y2="40.0" alt="cups">cups</points>'
COUNTED = f"Counting the {CUPS} shows a total of 2."
POINTS = [
    {"x": 10.0, "y": 20.0, "label": "cups", "pixel": [3.2, 4.8]},
    {"x": 30.5, "y": 40.0, "label": "cups", "pixel": [9.8, 9.6]},
]
UNLABELED = [{**point, "label": ""} for point in POINTS]  # as they are streamed, before their label


@pytest.fixture(scope="module")
def nano() -> Iterator[Molmo]:
    with Molmo() as molmo:
        yield molmo


@pytest.fixture(scope="module")
def photo(golden: Any) -> bytes:
    data: bytes = (golden / "coffee.png").read_bytes()
    return data


@pytest.fixture(scope="module")
def of_nano(nano: Molmo) -> Iterator[Server]:
    with serving(nano) as server:
        yield server


@pytest.fixture
def cups(saying: Callable[..., Molmo]) -> Iterator[Server]:
    with serving(saying(COUNTED)) as server:
        yield server


def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def events(reply: bytes) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in reply.decode().splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def test_openai_client_gets_the_answers_of_the_sdk(nano: Molmo, of_nano: Server, photo: bytes) -> None:
    expected = nano.point(photo, "cup")
    body = chat_body("Point to the cup.", data_uri(photo))
    first = client(of_nano).chat.completions.create(model="nano", **body)
    again = client(of_nano).chat.completions.create(model="nano", **body)
    for completion in (first, again):
        (choice,) = completion.choices
        assert choice.message.content == expected.text
        assert choice.message.points == expected.to_dict()["points"]
        assert choice.finish_reason == "stop"
        assert completion.model == "nano"
        assert completion.usage.prompt_tokens == expected.usage.tokens.image + expected.usage.tokens.prompt
        assert completion.usage.completion_tokens == expected.usage.tokens.generated
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details.cached_tokens == expected.usage.tokens.image


def test_history_and_sampling_are_those_of_the_sdk(tiny_bundle: Path, photo: bytes) -> None:
    """In float32: int8 kernels, such as nano's, round differently in a run of another length, which near ties show."""
    with Molmo(tiny_bundle, threads=1, max_crops=0) as molmo, serving(molmo) as server:
        first = molmo.ask(photo, "Point to the cup.", max_new_tokens=9)
        history = [("Point to the cup.", first.text)]
        sampling: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seed": 5}
        expected = molmo.ask(photo, "Describe it.", history=history, **sampling, max_new_tokens=9)
        greedy = molmo.ask(photo, "Describe it.", history=history, max_new_tokens=9)
        body = chat_body("Point to the cup.", data_uri(photo))
        body["messages"] += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "Describe it."}]
        create = client(server).chat.completions.create
        completion = create(model="x", **body, **sampling, max_completion_tokens=9)
    assert completion.choices[0].message.content == expected.text != greedy.text
    assert completion.choices[0].finish_reason == ("stop" if expected.complete else "length")


def test_many_tokens_do_not_run_the_image_again(cups: Server) -> None:
    fake = cups.service.answerer.molmo.fake  # type: ignore[attr-defined]
    image = data_uri(png())
    cups.send("/v1/chat/completions", chat_body("How many?", image))
    cups.send("/v1/responses", {"input": "Hello", "max_output_tokens": 3})  # without an image
    fake.fed.clear()
    reply = cups.send("/v1/chat/completions", chat_body("How many?", image, max_tokens=4000)).json
    assert fake.images == 1
    ran = sum(len(rows) for rows in fake.fed)
    question = reply["usage"]["prompt_tokens"] - reply["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert ran == question + reply["usage"]["completion_tokens"]  # the step of the last id gives EOS


def test_chat_stream_has_text_and_points_as_they_come(cups: Server) -> None:
    stream = client(cups).chat.completions.create(
        model="", stream=True, stream_options={"include_usage": True}, **chat_body("How many cups?", data_uri(png()))
    )
    text, points, reasons, last, usage = "", [], [], None, None
    for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            points += (choice.delta.model_extra or {}).get("points", [])
            reasons += [choice.finish_reason] if choice.finish_reason else []
            last = choice
        usage = chunk.usage or usage
    assert (text, points, reasons) == (COUNTED, UNLABELED, ["stop"])
    assert (last.points, last.count) == (POINTS, 2)
    assert usage.completion_tokens > 10


def test_responses_have_points_beside_the_text(cups: Server) -> None:
    content = [{"type": "input_text", "text": "How many?"}, {"type": "input_image", "image_url": data_uri(png())}]
    given = {"model": "", "input": [{"role": "user", "content": content}], "instructions": "Be brief."}
    response = client(cups).responses.create(**given)
    assert response.output_text == COUNTED
    part = response.output[0].content[0]
    assert (part.points, part.count, response.status) == (POINTS, 2, "completed")
    assert response.usage.input_tokens_details.cached_tokens == 0

    text, points, whole = "", [], []
    for event in client(cups).responses.create(stream=True, **given):
        if event.type == "response.output_text.delta":
            text += event.delta
            points += (event.model_extra or {}).get("points", [])
        if event.type == "response.content_part.done":
            whole = event.part.points
    assert (text, points, whole) == (COUNTED, UNLABELED, POINTS)
    assert event.type == "response.completed"
    assert event.response.output_text == COUNTED
    short = client(cups).responses.create(**given, max_output_tokens=2)
    assert (short.status, short.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_moondream_verbs(cups: Server) -> None:
    """The requests that moondream's Python client makes."""
    image = data_uri(png())
    fractions = [{"x": 0.1, "y": 0.2}, {"x": 0.305, "y": 0.4}]
    pointed = cups.send("/v1/point", {"image_url": image, "object": "cups"}).json
    assert (pointed["points"], pointed["count"]) == (fractions, 2)
    counted = cups.send("/v1/count", {"image_url": image, "object": "cups"}).json
    assert (counted["count"], counted["points"]) == (2, fractions)
    caption = cups.send("/v1/caption", {"image_url": image, "length": "short", "stream": False}).json
    assert caption["caption"] == "Counting the cups shows a total of 2."
    settings = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 100}
    query = cups.send("/v1/query", {"image_url": image, "question": "How many?", "settings": settings}).json
    assert query["answer"] == caption["caption"]
    assert query["points"] == fractions
    assert len({pointed["request_id"], counted["request_id"], caption["request_id"], query["request_id"]}) == 4

    body = json.dumps({"image_url": image, "question": "How many?", "stream": True}).encode()
    headers = {"Content-Type": "application/json", "X-Moondream-Auth": "key"}
    request = urllib.request.Request(f"{cups.url}/v1/query", data=body, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        *chunks, last = [json.loads(line[6:]) for line in response if line.startswith(b"data: ")]
    assert "".join(chunk["chunk"] for chunk in chunks) == query["answer"]
    assert (last["completed"], last["answer"], last["points"]) == (True, query["answer"], fractions)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_sequence_ends_the_text_and_keeps_its_points(cups: Server, stream: bool) -> None:
    body = chat_body("How many?", data_uri(png()), stop=["never", " alt="], stream=stream)
    reply = cups.send("/v1/chat/completions", body)
    if stream:
        deltas = [event["choices"][0]["delta"] for event in events(reply.body)]
        text = "".join(delta.get("content", "") for delta in deltas)
        points = [point for delta in deltas for point in delta.get("points", [])]
        assert events(reply.body)[-1]["choices"][0]["finish_reason"] == "stop"
    else:
        (choice,) = reply.json["choices"]
        text, points = choice["message"]["content"], choice["message"]["points"]
        assert choice["finish_reason"] == "stop"
    assert text == COUNTED.partition(" alt=")[0]
    assert [(point["x"], point["y"]) for point in points] == [(10.0, 20.0), (30.5, 40.0)]


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_stop_sequences_are_found_across_pieces(size: int) -> None:
    text = "one two two-and-a-half three"
    for stops in ([" three"], ["two-"], ["half", "a-"], ["none"], ["threefold"], ["one"]):
        stop = StopSequences(stops)
        parts = [stop.feed(text[i : i + size]) for i in range(0, len(text), size)]
        ends = [text.index(s) for s in stops if s in text]
        assert "".join(parts) + stop.close() == text[: min(ends, default=len(text))]
        assert stop.found == bool(ends)


def test_a_picture_is_encoded_once_and_low_detail_apart(cups: Server) -> None:
    fake = cups.service.answerer.molmo.fake  # type: ignore[attr-defined]
    one, other = data_uri(png(1, (640, 480))), data_uri(png(2, (640, 480)))
    for image in (one, other, one, other, one):
        cups.send("/v1/point", {"image_url": image, "object": "cup"})
    assert fake.images == 2
    body = chat_body("How many?", one)
    full = cups.send("/v1/chat/completions", body).json["usage"]["prompt_tokens"]
    body["messages"][0]["content"][1]["image_url"]["detail"] = "low"
    low = [cups.send("/v1/chat/completions", body).json["usage"]["prompt_tokens"] for _ in range(2)]
    assert low[0] == low[1] < full
    assert fake.images == 3


def test_scenes_above_the_limit_are_forgotten(saying: Callable[..., Molmo]) -> None:
    molmo = saying("ok")
    with serving(molmo) as server:
        for i in range(3):
            server.send("/v1/caption", {"image_url": data_uri(png(i))})
        each = server.service.scenes.bytes // 3
    with serving(molmo, scene_bytes=2 * each + 1) as server:
        molmo.fake.images = 0  # type: ignore[attr-defined]
        for i in (0, 1, 0, 2, 0, 1):  # 1 is the one that was not used for longest when 2 arrives
            server.send("/v1/caption", {"image_url": data_uri(png(i))})
        assert molmo.fake.images == 4  # type: ignore[attr-defined]
        assert len(server.service.scenes) == 2
    with serving(molmo, scene_bytes=0) as server:
        for _ in range(2):
            assert server.send("/v1/caption", {"image_url": data_uri(png())}).status == 200
        assert len(server.service.scenes) == server.service.scenes.bytes == 0


def test_several_images_are_one_prompt_of_a_model_that_takes_them() -> None:
    pytest.importorskip("torch")
    one, other = png(1, (300, 200)), png(2, (120, 400))
    with Molmo(GOLDEN2 / "molmo_point") as molmo, serving(molmo) as server:
        expected = molmo.ask([one, other], "Point to the cups.", max_new_tokens=12)
        body = chat_body("Point to the cups.", data_uri(one), max_tokens=12)
        body["messages"][0]["content"].append({"type": "image_url", "image_url": {"url": data_uri(other)}})
        for cached in (0, expected.usage.tokens.image):
            reply = server.send("/v1/chat/completions", body).json
            message = reply["choices"][0]["message"]
            assert (message["content"], message["points"]) == (expected.text, expected.to_dict()["points"])
            assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == cached
        assert {point["image"] for point in message["points"]} == {2}
        assert "<POINT_" in message["content"]
        history = [("Point to the cups.", expected.text)]
        second = molmo.ask([one, other], "And now?", history=history, max_new_tokens=2)
        body["messages"] += [{"role": "assistant", "content": expected.text}, {"role": "user", "content": "And now?"}]
        reply = server.send("/v1/chat/completions", body | {"max_tokens": 2}).json
        assert reply["choices"][0]["message"]["content"] == second.text
        assert reply["usage"]["prompt_tokens"] == second.usage.tokens.image + second.usage.tokens.prompt


def test_openai_client_gets_answers_in_the_form_of_a_schema(cups: Server) -> None:
    pytest.importorskip("llguidance")

    class Found(pydantic.BaseModel):
        kind: Literal["cup", "plate"]
        full: bool

    asked = chat_body("What is there?", data_uri(png()))
    completion = client(cups).chat.completions.parse(model="molmo", response_format=Found, **asked)
    assert isinstance(completion.choices[0].message.parsed, Found)
    assert isinstance(client(cups).responses.parse(input="Hello", text_format=Found).output_parsed, Found)
    format = {"type": "json_schema", "json_schema": {"name": "a", "schema": Found.model_json_schema()}}
    chunks = events(cups.send("/v1/chat/completions", {**asked, "response_format": format, "stream": True}).body)
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == completion.choices[0].message.content
    reply = cups.send(
        "/v1/chat/completions", {**asked, "response_format": {"type": "json_object"}, "max_tokens": 3}
    ).json
    assert reply["choices"][0]["message"]["content"].startswith("{")
    assert reply["choices"][0]["finish_reason"] == "length"


def test_models_health_and_metrics(cups: Server) -> None:
    name = cups.service.model
    assert [model.id for model in client(cups).models.list()] == [name]
    assert client(cups).models.retrieve(name).id == name
    with pytest.raises(openai.NotFoundError):
        client(cups).models.retrieve("gpt-4o")
    assert cups.send("/health").json["status"] == "ok"
    cups.send("/v1/point", {"image_url": data_uri(png()), "object": "cups"})
    text = cups.send("/metrics").body.decode()
    assert 'molmo_edge_requests_total{endpoint="/v1/point",status="200"} 1.0' in text
    assert 'molmo_edge_scenes_total{cached="no"} 1.0' in text
    assert 'molmo_edge_tokens_total{kind="generated"}' in text


def test_system_messages_join_the_first_question_and_users_each_other(saying: Callable[..., Molmo]) -> None:
    with serving(saying("ok")) as server:

        def tokens(*messages: tuple[str, str]) -> int:
            body = {"messages": [{"role": role, "content": text} for role, text in messages]}
            used: int = server.send("/v1/chat/completions", body).json["usage"]["prompt_tokens"]
            return used

        whole = tokens(("user", "Be brief.\n\nWhat is this?\n\nAnd that?"))
        assert tokens(("system", "Be brief."), ("user", "What is this?"), ("user", "And that?")) == whole
        assert tokens(("user", "What is this?"), ("developer", "Be brief."), ("user", "And that?")) == whole


def test_the_openapi_document_names_every_endpoint(cups: Server) -> None:
    document = cups.send("/openapi.json").json
    assert "Origin" not in document["paths"]["/v1/point"]["post"]["responses"]["403"]["description"]
    assert {path for path in document["paths"] if "post" in document["paths"][path]} == {
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/point",
        "/v1/count",
        "/v1/caption",
        "/v1/query",
    }
    assert "422" not in document["paths"]["/v1/point"]["post"]["responses"]
