"""llm: a text, a stream, a schema and, with the scripted model, tools in several turns."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

server, scripted, folder = sys.argv[1:]
LLM = Path(sys.executable).with_name("llm")
TOOLS = """
def read_file(path: str) -> str:
    "Reads a file."
    return open(path).read()

def edit_file(path: str, old: str, new: str) -> str:
    "Replaces a text in a file."
    text = open(path).read()
    open(path, "w").write(text.replace(old, new))
    return "Done."
"""


def llm(*arguments: str) -> str:
    result = subprocess.run([LLM, *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


with tempfile.TemporaryDirectory() as home:
    os.environ |= {"LLM_USER_PATH": home, "OPENAI_API_KEY": "none"}
    models = [
        {
            "model_id": name,
            "model_name": name,
            "api_base": url + "/v1",
            "supports_tools": True,
            "supports_schema": True,
        }
        for name, url in (("quire-demo", server), ("scripted", scripted))
    ]
    (Path(home) / "extra-openai-models.yaml").write_text(json.dumps(models))
    whole = llm("-m", "quire-demo", "Hello", "--no-stream", "-o", "temperature", "0")
    assert whole.strip()
    assert llm("-m", "quire-demo", "Hello", "-o", "temperature", "0") == whole
    formed = llm("-m", "quire-demo", "The weather?", "--schema", "warm bool, sunny bool")
    assert set(json.loads(formed)) >= {"warm", "sunny"}  # it allows further properties
    notes = Path(folder) / "notes.txt"
    notes.write_text("colour = red\n")
    answer = llm("-m", "scripted", "--functions", TOOLS, "Make the colour blue in notes.txt.")
    assert "The colour is blue now." in answer
    assert notes.read_text() == "colour = blue\n"
