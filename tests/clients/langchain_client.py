"""langchain-openai: text, a stream, log-probabilities, tools and structured output."""

import sys
from typing import Literal

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Weather(BaseModel):
    """How it is outside."""

    sky: Literal["clear", "cloudy"]
    warm: bool


@tool
def look(where: Literal["up", "down"]) -> str:
    """Look somewhere."""
    return where


url = sys.argv[1] + "/v1"
model = ChatOpenAI(
    base_url=url, api_key="none", model="quire-demo", temperature=0, max_tokens=200, max_retries=0
)
whole = model.invoke("Hello").content
assert whole
assert "".join(chunk.content for chunk in model.stream("Hello")) == whole
scored = model.bind(logprobs=True, top_logprobs=2).invoke("Hello")
assert "".join(e["token"] for e in scored.response_metadata["logprobs"]["content"]) == whole
[call] = model.bind_tools([look], tool_choice="look").invoke("Look!").tool_calls
assert call["name"] == "look"
assert call["args"]["where"] in ("up", "down")
for method in ("function_calling", "json_schema"):
    assert isinstance(model.with_structured_output(Weather, method=method).invoke("?"), Weather)
