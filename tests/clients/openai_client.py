"""openai: create, the stream helper, parse, tools, Responses and embeddings."""

import json
import math
import sys
from typing import Literal

import openai
from pydantic import BaseModel

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0)
MODEL = "quire-demo"
HELLO = [{"role": "user", "content": "Hello"}]
OPTIONS = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_tokens": 100}


class Weather(BaseModel):
    warm: bool
    sky: Literal["clear", "cloudy"]


whole = client.chat.completions.create(**OPTIONS).choices[0].message.content
assert whole
with client.chat.completions.stream(**OPTIONS) as stream:
    pieces = [event.delta for event in stream if event.type == "content.delta"]
    assert "".join(pieces) == whole
    assert stream.get_final_completion().choices[0].message.content == whole

parsed = client.chat.completions.parse(**OPTIONS, response_format=Weather)
assert isinstance(parsed.choices[0].message.parsed, Weather)

tool = openai.pydantic_function_tool(Weather, name="look")
called = client.chat.completions.parse(**OPTIONS, tools=[tool], tool_choice="required")
[call] = called.choices[0].message.tool_calls[:1]
assert isinstance(call.function.parsed_arguments, Weather)
calls = [
    {
        "id": each.id,
        "type": "function",
        "function": {"name": each.function.name, "arguments": each.function.arguments},
    }
    for each in called.choices[0].message.tool_calls
]
turn = {"role": "assistant", "content": None, "tool_calls": calls}
results = [{"role": "tool", "tool_call_id": each["id"], "content": "warm"} for each in calls]
after = client.chat.completions.create(**{**OPTIONS, "messages": [*HELLO, turn, *results]})
assert after.choices[0].finish_reason == "stop"

asked = {"model": MODEL, "temperature": 0, "max_output_tokens": 100}
response = client.responses.create(input="Hello", **asked)
assert response.output_text == whole
with client.responses.stream(input="Hello", **asked) as events:
    for _ in events:
        pass
    assert events.get_final_response().output_text == whole
more = client.responses.create(input="What is 1 + 2?", previous_response_id=response.id, **asked)
assert more.output_text
client.responses.delete(response.id)
formed = client.responses.parse(input="The weather?", text_format=Weather, **asked)
assert isinstance(formed.output_parsed, Weather)
look = {"type": "function", "name": "look", "parameters": Weather.model_json_schema()}
forced = client.responses.create(input="Look!", tools=[look], tool_choice="required", **asked)
assert "warm" in json.loads(forced.output[-1].arguments)

texts = ["Hello", "Goodbye", "Hello"]
vectors = client.embeddings.create(model=MODEL, input=texts).data
first, other, same = (each.embedding for each in vectors)
assert math.isclose(sum(value * value for value in first), 1, abs_tol=1e-4)
assert first != other
assert all(math.isclose(a, b, abs_tol=1e-4) for a, b in zip(first, same, strict=True))
short = client.embeddings.create(model=MODEL, input="Hello", dimensions=8, encoding_format="float")
assert len(short.data[0].embedding) == 8
