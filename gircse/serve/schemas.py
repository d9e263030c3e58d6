"""Bodies of requests and answers, as OpenAI, Jina and Cohere shape them. Knows fields; knows nothing of models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)

from gircse.groups import DEFAULT_INSTRUCTION
from gircse.serve.settings import MAX_ITEMS, InputType

# Inputs are checked by hand: a union of four list types would report each of 2,048 items against each of its members.

MAX_LABELS = 256
"""Classes of a request, as many as Jina's: an answer has a score for every text and class."""

_TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_INPUT_SCHEMA = {
    "title": "Input",
    "description": "A text, texts, token ids, or lists of token ids (of this model's tokenizer).",
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": MAX_ITEMS},
        _TOKEN_IDS,
        {"type": "array", "items": _TOKEN_IDS, "minItems": 1, "maxItems": MAX_ITEMS},
    ],
}
_DOCUMENTS_SCHEMA = {
    "title": "Documents",
    "description": "Texts, or objects with a text.",
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_ITEMS,
    "items": {
        "anyOf": [
            {"type": "string", "minLength": 1},
            {
                "type": "object",
                "properties": {"text": {"type": "string", "minLength": 1}},
                "required": ["text"],
                "additionalProperties": False,
            },
        ]
    },
}


def _checked_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} must be a text, not {_kind(value)}")
    if not value:
        raise ValueError(f"{where} is an empty string; leave it out")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} is not valid Unicode: it has half of a surrogate pair") from error
    return value


def _checked_ids(value: Any, where: str) -> list[int]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} must be a list of token ids that is not empty")
    if any(type(token) is not int for token in value):
        raise ValueError(f"{where} must hold whole numbers only")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "a truth value", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _parse_input(value: Any) -> list[str] | list[list[int]]:
    if isinstance(value, str):
        return [_checked_text(value, "it")]
    if not isinstance(value, list):
        raise ValueError(f"it must be a text or a list, not {_kind(value)}")
    if not value:
        raise ValueError("it is an empty list; give at least one text")
    if type(value[0]) is int:
        return [_checked_ids(value, "it")]
    if len(value) > MAX_ITEMS:
        raise ValueError(f"it has {len(value)} items; a request takes at most {MAX_ITEMS}")
    if isinstance(value[0], list):
        return [_checked_ids(item, f"item {index}") for index, item in enumerate(value)]
    return [_checked_text(item, f"item {index}") for index, item in enumerate(value)]


def _parse_documents(value: Any) -> list[str]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_ITEMS:
        raise ValueError(f"it must be a list of 1 to {MAX_ITEMS} documents")
    texts = [item["text"] if isinstance(item, dict) and set(item) == {"text"} else item for item in value]
    return [_checked_text(text, f"item {index}") for index, text in enumerate(texts)]


Input = Annotated[Any, PlainValidator(_parse_input), WithJsonSchema(_INPUT_SCHEMA)]
Documents = Annotated[Any, PlainValidator(_parse_documents), WithJsonSchema(_DOCUMENTS_SCHEMA)]
Text = Annotated[str, StringConstraints(strict=True, min_length=1)]
WholeNumber = Annotated[int, Field(strict=True)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _one_unknown_field(cls, fields: Any) -> Any:
        """Keep one field that is not known: an error for each of a million would stop the server for ten seconds."""
        if not isinstance(fields, dict):
            return fields
        unknown = next((name for name in fields if name not in cls.model_fields), None)
        kept = (*cls.model_fields, unknown) if unknown is not None else cls.model_fields
        return {name: fields[name] for name in kept if name in fields}


_NUM_STEPS = Field(default=None, ge=0, description="K, the refinement steps; the server's where not given.")
_INSTRUCTION = Field(default=None, description="What the vectors should be about.")
_MODEL = Field(default=None, description="A name from /v1/models; may be left out.")


class EmbeddingRequest(_Request):
    """OpenAI's fields, and three more: `num_steps`, `instruction` and `input_type`."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "example": {
                "input": ["a cat sleeps", "a kitten naps"],
                "num_steps": 5,
                "instruction": "Represent the animal",
            }
        },
    )
    input: Input
    model: Text | None = _MODEL
    encoding_format: Literal["float", "base64"] | None = Field(
        default="float", description="base64: little-endian float32, as OpenAI's clients ask for."
    )
    dimensions: WholeNumber | None = Field(
        default=None, ge=1, description="Keep the first so many, scaled to length 1 again."
    )
    user: Text | None = Field(default=None, max_length=256, description="Written to the log.")
    num_steps: WholeNumber | None = _NUM_STEPS
    instruction: Text | None = Field(default=None, description="What the vectors should be about; for texts only.")
    input_type: InputType | None = Field(
        default=None,
        description="What the texts are: each kind stands under the model's own prompt for it. Without an instruction.",
    )


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    total_tokens: int


class Embedding(BaseModel):
    """One vector of length 1."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingResponse(BaseModel):
    """Vectors in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class RerankRequest(_Request):
    """The fields that Jina and Cohere have in common, and two more: `num_steps` and `instruction`."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "example": {"query": "how do plants eat?", "documents": ["Rome lies on the Tiber.", "Plants eat light."]}
        },
    )
    query: Text
    documents: Documents
    model: Text | None = _MODEL
    top_n: WholeNumber | None = Field(default=None, ge=1, description="Results to return; all where not given.")
    return_documents: Annotated[bool, Field(strict=True)] = Field(
        default=False, description="Send the documents' texts back."
    )
    num_steps: WholeNumber | None = _NUM_STEPS
    instruction: Text | None = Field(
        default=None, description="What makes a document relevant; the model's query prompt where not given."
    )


class RerankDocument(BaseModel):
    """A document of the request."""

    text: str


class RerankResult(BaseModel):
    """A document's place in the request and its cosine similarity to the query."""

    index: int
    relevance_score: float
    document: RerankDocument | None = None


class RerankResponse(BaseModel):
    """Results, the most relevant first."""

    id: str
    object: Literal["list"] = "list"
    model: str
    results: list[RerankResult]
    usage: Usage


class ClassifyRequest(_Request):
    """Jina's fields, and two more: `num_steps` and `instruction`."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "example": {
                "input": ["Great service!", "When do you open?"],
                "labels": ["praise", "question"],
                "instruction": "Identify the purpose of the message",
            }
        },
    )
    input: Documents
    labels: list[Text] = Field(
        min_length=2,
        max_length=MAX_LABELS,
        json_schema_extra={"uniqueItems": True},
        description="Names of the classes, each once; an underscore is a space.",
    )
    model: Text | None = _MODEL
    num_steps: WholeNumber | None = _NUM_STEPS
    instruction: Text = Field(default=DEFAULT_INSTRUCTION, description="What the classes are about.")


class LabelScore(BaseModel):
    """The cosine similarity of a text to the name of a class."""

    label: str
    score: float


class Classification(BaseModel):
    """The class of a text, and its scores for all of them in the order of the request."""

    object: Literal["classification"] = "classification"
    index: int
    prediction: str
    score: float
    predictions: list[LabelScore]


class ClassifyResponse(BaseModel):
    """Classes in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[Classification]
    model: str
    usage: Usage


class ExplainRequest(_Request):
    """A text to look into."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"example": {"input": "who wrote Hamlet?", "num_steps": 5}}
    )
    input: Text
    num_steps: WholeNumber | None = Field(default=None, ge=1, description="K; the server's where not given.")
    instruction: Text | None = _INSTRUCTION
    top: WholeNumber = Field(default=5, ge=1, le=50, description="Vocabulary tokens listed a step.")


class SoftToken(BaseModel):
    """What one soft token is made of; `movement` is how far the step moved the vector (1 − cosine)."""

    step: int
    tokens: list[str]
    weights: list[float]
    entropy: float
    movement: float | None


class ExplainResponse(BaseModel):
    """One entry a step."""

    model: str
    steps: list[SoftToken]


class ModelCard(BaseModel):
    """OpenAI's model object; beyond it, what a client may ask this server for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "gircse"
    dimension: int
    num_steps: int
    max_num_steps: int
    max_tokens: int
    max_items: int
    prompts: dict[InputType, str] = Field(description="What stands before texts of each `input_type`.")


class ModelList(BaseModel):
    """The models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """Whether the process works and whether it takes requests."""

    status: Literal["ok", "stopping", "failed"]
    live: bool
    ready: bool


class ErrorDetail(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every refusal and failure has this body."""

    error: ErrorDetail
