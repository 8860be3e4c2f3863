"""instructor: typed answers in its three ways of asking."""

import sys
from typing import Literal

import instructor
import openai
from pydantic import BaseModel


class Weather(BaseModel):
    sky: Literal["clear", "cloudy"]
    warm: bool


demo, scripted = sys.argv[1:3]
# Mode.JSON leaves the form to the model: the demo model does not know it.
for mode, url, model in (
    (instructor.Mode.TOOLS, demo, "quire-demo"),
    (instructor.Mode.JSON_SCHEMA, demo, "quire-demo"),
    (instructor.Mode.JSON, scripted, "scripted"),
):
    client = openai.OpenAI(base_url=url + "/v1", api_key="none")
    typed = instructor.from_openai(client, mode=mode)
    answer = typed.chat.completions.create(
        model=model,
        response_model=Weather,
        max_retries=0,
        max_tokens=200,
        temperature=0,
        messages=[{"role": "user", "content": "How is the weather?"}],
    )
    assert isinstance(answer, Weather), answer
