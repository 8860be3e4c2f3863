"""litellm: text, a stream, tools and a schema, through two of its providers."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import litellm

SCHEMA = {
    "type": "object",
    "properties": {"warm": {"type": "boolean"}},
    "required": ["warm"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
for provider in ("openai", "hosted_vllm"):
    common = {
        "model": f"{provider}/quire-demo",
        "api_base": sys.argv[1] + "/v1",
        "api_key": "none",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 200,
        "temperature": 0,
    }
    whole = litellm.completion(**common).choices[0].message.content
    chunks = litellm.completion(**common, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    several = litellm.completion(**common, n=2, logprobs=True, top_logprobs=1)
    assert len(several.choices) == 2
    assert several.choices[0].logprobs.content
    called = litellm.completion(**common, tools=[TOOL], tool_choice="required")
    call = called.choices[0].message.tool_calls[0].function
    assert call.name == "look"
    assert "warm" in json.loads(call.arguments)  # hosted_vllm allows further properties
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    formed = litellm.completion(**common, response_format=form)
    assert set(json.loads(formed.choices[0].message.content)) == {"warm"}
