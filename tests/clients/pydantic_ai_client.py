"""pydantic-ai: text, a stream, and output types by a tool and by a schema."""

import asyncio
import sys
from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Weather(BaseModel):
    sky: Literal["clear", "cloudy"]
    warm: bool


provider = OpenAIProvider(base_url=sys.argv[1] + "/v1", api_key="none")
model = OpenAIChatModel("quire-demo", provider=provider)
settings = {"max_tokens": 200, "temperature": 0}


async def main() -> None:
    plain = Agent(model, model_settings=settings)
    whole = (await plain.run("Hello")).output
    async with plain.run_stream("Hello") as stream:
        assert "".join([piece async for piece in stream.stream_text(delta=True)]) == whole
    for output_type in (Weather, NativeOutput(Weather)):
        agent = Agent(model, output_type=output_type, model_settings=settings, retries=0)
        assert isinstance((await agent.run("How is the weather?")).output, Weather)


asyncio.run(main())
