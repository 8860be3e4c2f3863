"""The code of a step stays small enough to read."""

from __future__ import annotations

import code_survey as survey

MAX_LINES, MAX_PARAMETERS, MAX_FIELDS = 60, 7, 15


def test_functions_are_short() -> None:
    assert [f.name for f in survey.functions() if f.lines > MAX_LINES] == []


def test_functions_take_few_parameters() -> None:
    assert [f.name for f in survey.functions() if f.parameters > MAX_PARAMETERS] == []


def test_structs_have_few_fields() -> None:
    assert [s.name for s in survey.structs() if len(s.fields) > MAX_FIELDS] == []


def test_few_types_lie_between_a_batch_and_its_logits() -> None:
    assert len(survey.types_of_a_step()) <= 8


def test_a_step_is_uploaded_at_once() -> None:
    """Masks follow by themselves: a row's is only known when the forward pass has begun. The CPU
    copies each array where it is."""
    assert survey.uploads_of_a_step() == [
        "engine/step/runner.py:ModelRunner.sample: self._transfer.upload_one",
        "engine/step/runner.py:ModelRunner._forward: self._transfer.upload",
        "engine/step/transfer.py:Transfer.upload: mx.array",
    ]


def test_what_chooses_and_checks_operations_does_not_outgrow_them() -> None:
    assert sum(survey.lines_of(survey.MACHINERY_FILES).values()) <= 3060
    assert max(survey.lines_of(survey.SPECIFICATION_FILES).values()) <= 300
