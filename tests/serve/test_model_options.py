"""What may be set for each of several models, and which settings are refused."""

from __future__ import annotations

import shutil

import pytest

from quire.engine.messages import SamplingParams
from quire.serve.model_files import resolve_model
from quire.serve.model_options import all_options
from quire.serve.settings import ServeSettings, SettingsError, load

FILE = """
device = "cpu"
model_idle_ttl = 600
[models.small]
model = "org/small"
aliases = ["gpt-4o-mini", "mini"]
temperature = 0.2
top_k = 5
kv_cache_memory = "1GiB"
[models.small.presets.creative]
temperature = 1.1
[models."org/large"]
model = "/models/large"
pinned = true
idle_ttl = 60
"""


def options(tmp_path, text: str):
    file = tmp_path / "quire.toml"
    file.write_text(text)
    return all_options(load({"config": str(file)}, {}))


def test_each_model_has_its_own_and_shares_the_rest(tmp_path):
    small, large = options(tmp_path, FILE)
    assert small.names == (
        *("small", "gpt-4o-mini", "mini"),
        *("small:creative", "gpt-4o-mini:creative", "mini:creative"),
    )
    assert (small.settings.model, small.settings.kv_cache_memory) == ("org/small", 2**30)
    assert (large.settings.model, large.settings.kv_cache_memory) == ("/models/large", None)
    assert small.settings.device == large.settings.device == "cpu"
    assert (small.pinned, small.at_start, small.idle_ttl) == (False, True, 600.0)
    assert (large.pinned, large.at_start, large.idle_ttl) == (True, True, 60.0)


def test_sampling_of_a_model_and_its_presets_come_over_the_authors(tmp_path):
    small, _ = options(tmp_path, FILE)
    own = SamplingParams(temperature=0.7, top_p=0.9)
    assert small.sampling.over(own) == SamplingParams(temperature=0.2, top_k=5, top_p=0.9)
    creative = small.presets["creative"].over(small.sampling.over(own))
    assert creative == SamplingParams(temperature=1.1, top_k=5, top_p=0.9)


def test_models_of_a_folder_are_served_when_asked_for(tmp_path):
    demo = resolve_model(None).path
    for name in ("plain", "owner/name", "owner/other"):
        shutil.copytree(demo, tmp_path / name)
    (tmp_path / "owner" / "other" / "config.json").write_text('{"model_type": "whisper"}')
    (tmp_path / "empty").mkdir()
    settings = ServeSettings(models_from=str(tmp_path), models=(("plain", {"model": "org/own"}),))
    own, found = all_options(settings)
    assert (own.name, own.settings.model) == ("plain", "org/own")
    assert (found.name, found.settings.model) == ("owner/name", str(tmp_path / "owner" / "name"))
    assert not found.at_start
    first, *_ = all_options(ServeSettings(models_from=str(tmp_path)))
    assert (first.name, first.at_start, first.pinned) == ("quire-demo", True, False)
    with pytest.raises(SettingsError, match=r"--models-from .*: no such folder"):
        all_options(ServeSettings(models_from=str(tmp_path / "nope")))


def test_one_model_alone_is_kept():
    [only] = all_options(ServeSettings(model="org/name"))
    assert (only.name, only.pinned, only.at_start) == ("org/name", True, True)
    [demo] = all_options(ServeSettings())
    assert demo.name == "quire-demo"
    [named] = all_options(ServeSettings(served_model_name="x"))
    assert named.name == "x"


def test_one_model_alone_may_leave_when_it_is_idle():
    [only] = all_options(ServeSettings(model="org/name", model_idle_ttl=5.0))
    assert (only.pinned, only.at_start, only.idle_ttl) == (False, True, 5.0)


def test_flags_name_models_too():
    settings = load({"model": "org/a", "models": "b=org/b,c=org/c"}, {})
    assert [(o.name, o.settings.model, o.at_start) for o in all_options(settings)] == [
        ("org/a", "org/a", True),
        ("b", "org/b", False),
        ("c", "org/c", False),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[models.a]", "models.a: model is missing"),
        ("models = 5", "one table for each model"),
        ("[models]\na = 5", "one table for each model"),
        ('[models."a b"]\nmodel = "x"', "a name has letters"),
        ('[models.a]\nmodel = "x"\nport = 5', "unknown key 'port'"),
        ('[models.a]\nmodel = "x"\ntemperature = 3', "out of range"),
        ('[models.a]\nmodel = "x"\ntop_p = 0', "out of range"),
        ('[models.a]\nmodel = "x"\ntemperature = "hot"', "models.a: Expected"),
        ('[models.a]\nmodel = "x"\npinned = "perhaps"', "models.a: pinned must be yes or no"),
        ('[models.a]\nmodel = "x"\nkv_cache_memory = "much"', "kv_cache_memory must be a size"),
        ('[models.a]\nmodel = "x"\naliases = "b"', "aliases must be a list"),
        ('[models.a]\nmodel = "x"\n[models.a.presets.b]\nseed = 1', "models.a.presets.b"),
        ('[models.a]\nmodel = "x"\naliases = ["b"]\n[models.b]\nmodel = "y"', "called 'b'"),
    ],
)
def test_what_cannot_be_meant_is_refused(text, message, tmp_path):
    with pytest.raises(SettingsError, match=message):
        options(tmp_path, text)
