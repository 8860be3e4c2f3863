"""dspy: a text, and typed outputs through its JSON adapter."""

import os
import sys
from typing import Literal

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import dspy

model = dspy.LM(
    "openai/quire-demo",
    api_base=sys.argv[1] + "/v1",
    api_key="none",
    temperature=0,
    max_tokens=300,
    cache=False,
    num_retries=0,
)
assert model("Hello")[0]


class Weather(dspy.Signature):
    """Tell the weather."""

    place: str = dspy.InputField()
    sky: Literal["clear", "cloudy"] = dspy.OutputField()
    degrees: int = dspy.OutputField()


# It asks models that it does not know for no form by itself.
schema = {
    "type": "object",
    "properties": {"sky": {"enum": ["clear", "cloudy"]}, "degrees": {"type": "integer"}},
    "required": ["sky", "degrees"],
    "additionalProperties": False,
}
form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": schema}}
with dspy.context(lm=model, adapter=dspy.JSONAdapter()):
    answer = dspy.Predict(Weather, response_format=form)(place="Rome")
assert answer.sky in ("clear", "cloudy")
assert isinstance(answer.degrees, int)
