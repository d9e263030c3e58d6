"""Answers: what the writer is shown, who writes, and that the embedder's weights are there only once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from peft import LoraConfig

from gircse.encoder import load_causal_lm
from gircse.errors import GircseError, UsageError
from gircse.model import GIRCSE
from gircse.search.answer import NOTHING_FOUND, BackboneWriter, answer, cited, within_budget
from gircse.search.endpoint import EndpointWriter
from gircse.search.search import SearchHit
from tests.tiny import tiny_backbone


def hit(name: str, text: str, similarity: float | None = 0.9) -> SearchHit:
    return SearchHit(name, f"{name}#0", 1.0, similarity, text)


def count(text: str) -> int:
    return len(text.split())


class Echo:
    """Says what it was asked last."""

    asked = 0

    def write(self, messages: Any) -> Iterator[str]:
        self.asked += 1
        yield messages[-1]["content"]


def test_passages_below_the_threshold_are_not_shown() -> None:
    writer, hits = Echo(), [hit("a", "ants dig", 0.8), hit("b", "bees fly", 0.5), hit("c", "cats sleep", None)]
    result = answer("who digs?", hits, writer, count, min_similarity=0.6)
    text = "".join(result.pieces)
    assert "[1] ants dig" in text
    assert "who digs?" in text
    assert "bees" not in text
    assert "cats" not in text
    result = answer("who digs?", hits, writer, count, min_similarity=0.81)
    assert ("".join(result.pieces), result.passages, result.best_similarity) == (NOTHING_FOUND, [], 0.8)
    assert "".join(answer("?", [], writer, count).pieces) == NOTHING_FOUND
    assert writer.asked == 1, "nothing relevant, nothing written"


def test_the_context_budget() -> None:
    hits = [hit("a", "one two three"), hit("b", "four five"), hit("c", "six")]
    assert [p.text for p in within_budget(hits, count, 5)] == ["one two three", "four five"]
    assert [p.text for p in within_budget(hits, count, 4)] == ["one two three"]
    assert [p.text for p in within_budget(hits, count, 2)] == ["one two"]
    assert [p.number for p in within_budget(hits, count, 100)] == [1, 2, 3]
    with pytest.raises(UsageError):
        within_budget(hits, count, 0)


def test_citations() -> None:
    passages = within_budget([hit(name, name) for name in "abcd"], count, 100)
    found = cited("As [3] says, and [1, 2]; [9] and [x] do not count.", passages)
    assert [passage.hit.document_id for passage in found] == ["a", "b", "c"]


def test_an_answer_is_cited_while_it_is_written() -> None:
    class Small:
        def write(self, messages: Any) -> Iterator[str]:
            yield from ("Bees ", "fly far [8]. ", "Nobody", " knows why")

    result = answer("who flies?", [hit("a", "Ants dig."), hit("b", "Bees fly far.")], Small(), count)
    assert list(result.pieces) == ["Bees fly far [2]. ", "Nobody knows why"]


# The embedder's backbone as the writer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_backbone(tmp_path_factory.mktemp("answer"))


@pytest.fixture
def model(folder: Path, tmp_path: Path) -> GIRCSE:
    """As loaded from a checkpoint: a frozen adapter that changes a lot."""
    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    trained = GIRCSE.from_backbone(str(folder), num_steps=2, max_seq_length=48, lora=lora, device="cpu")
    trained.save(str(tmp_path / "model"))
    return GIRCSE(str(tmp_path / "model"), device="cpu")


MESSAGES = [{"role": "user", "content": "Who digs nests?"}]


def test_it_writes_what_the_plain_backbone_writes_on_the_same_weights(folder: Path, model: GIRCSE) -> None:
    embedding = model.encode("ants")  # folds the adapter into the weights, as an embedder in use has it
    places = {name: parameter.data_ptr() for name, parameter in model.encoder.backbone.named_parameters()}
    writer = BackboneWriter(model.encoder, max_tokens=8)
    written = "".join(writer.write(MESSAGES))

    plain = load_causal_lm(folder)
    inputs = torch.tensor([model.encoder.tokenizer(writer._prompt(MESSAGES), add_special_tokens=False).input_ids])
    options: dict[str, Any] = {"attention_mask": torch.ones_like(inputs), "do_sample": False, "eos_token_id": [2]}
    output = plain.generate(inputs, max_new_tokens=8, pad_token_id=2, **options)  # type: ignore[operator]
    expected = model.encoder.tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True)
    assert written.strip() == str(expected).strip()
    with torch.no_grad():
        adapted = model.encoder.backbone(inputs).logits
        assert (adapted - plain(inputs).logits).abs().max() > 0.1, "the adapter is on again"

    assert {name: p.data_ptr() for name, p in model.encoder.backbone.named_parameters()} == places
    weights = sum(p.numel() for name, p in model.encoder.backbone.named_parameters() if "lora_" not in name)
    assert weights == sum(parameter.numel() for parameter in plain.parameters()), "one copy of the weights"
    torch.testing.assert_close(torch.tensor(model.encode("ants")), torch.tensor(embedding), atol=1e-5, rtol=1e-4)


def test_the_adapter_comes_back_when_reading_stops_early(model: GIRCSE) -> None:
    before = model.encode("ants")
    pieces = BackboneWriter(model.encoder, max_tokens=20).write(MESSAGES)
    next(pieces, None)
    pieces.close()  # type: ignore[attr-defined]
    torch.testing.assert_close(torch.tensor(model.encode("ants")), torch.tensor(before), atol=1e-5, rtol=1e-4)


def test_a_loop_ends_the_reply(model: GIRCSE, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []

    def third(tokens: list[int]) -> bool:
        seen.append(tokens)
        return len(tokens) == 3

    monkeypatch.setattr("gircse.search.answer.repeats", third)
    monkeypatch.setattr(BackboneWriter, "_ends", lambda _: [10**6])  # nothing else ends it
    list(BackboneWriter(model.encoder, max_tokens=8).write(MESSAGES))
    assert [len(tokens) for tokens in seen] == [1, 2, 3]


def test_too_much_context_is_refused(model: GIRCSE) -> None:
    with pytest.raises(UsageError, match="64 positions; lower --context-tokens"):
        list(BackboneWriter(model.encoder, max_tokens=60).write(MESSAGES))


# An endpoint as the writer


class _Endpoint(BaseHTTPRequestHandler):
    received: dict[str, Any] = {}  # noqa: RUF012
    status = 200
    lines: tuple[str, ...] = ()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        _Endpoint.received = {"path": self.path, "key": self.headers.get("Authorization"), **body}
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write("\n\n".join(self.lines).encode())

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Endpoint)
    Thread(target=server.serve_forever, daemon=True).start()
    _Endpoint.status = 200
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_an_endpoint_writes(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIRCSE_LLM_API_KEY", "sesame")
    events = [{"choices": [{"delta": {"content": piece}}]} for piece in ("Ants ", "dig [1].")]
    events[1:1] = [{"choices": [{"delta": {"role": "assistant"}}]}, {"choices": []}]
    _Endpoint.lines = (": comment", *(f"data: {json.dumps(event)}" for event in events), "data: [DONE]", "data: x")
    assert list(EndpointWriter(endpoint + "/", "big", 7).write(MESSAGES)) == ["Ants ", "dig [1]."]
    received = _Endpoint.received
    assert (received["path"], received["key"]) == ("/v1/chat/completions", "Bearer sesame")
    assert (received["model"], received["max_tokens"], received["messages"]) == ("big", 7, MESSAGES)
    assert received["stream"] is True


def test_what_an_endpoint_can_do_wrong(endpoint: str) -> None:
    writer = EndpointWriter(endpoint, "big", 7)
    _Endpoint.lines = ("<html>",)
    with pytest.raises(GircseError, match="no streamed chat completion"):
        list(writer.write(MESSAGES))
    _Endpoint.lines = ('data: {"no": "choices"}',)
    with pytest.raises(GircseError, match="no chat completion"):
        list(writer.write(MESSAGES))
    _Endpoint.status, _Endpoint.lines = 401, ("who are you?",)
    with pytest.raises(GircseError, match="answers 401: who are you\\?; set GIRCSE_LLM_API_KEY"):
        list(writer.write(MESSAGES))
    with pytest.raises(GircseError, match="cannot be reached"):
        list(EndpointWriter("http://127.0.0.1:9/v1", "big", 7).write(MESSAGES))
    with pytest.raises(UsageError, match="takes a URL"):
        EndpointWriter("localhost:8080", "big", 7)
