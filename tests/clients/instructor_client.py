"""instructor: typed answers in its three ways of asking."""

import sys
from typing import Literal

import instructor
import openai
from pydantic import BaseModel


class Weather(BaseModel):
    sky: Literal["clear", "cloudy"]
    warm: bool


client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none")
# Mode.JSON leaves the form to the model: the demo model does not know it.
modes = (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA)
for mode in modes:
    typed = instructor.from_openai(client, mode=mode)
    answer = typed.chat.completions.create(
        model="quire-demo",
        response_model=Weather,
        max_retries=0,
        max_tokens=200,
        temperature=0,
        messages=[{"role": "user", "content": "How is the weather?"}],
    )
    assert isinstance(answer, Weather), answer
