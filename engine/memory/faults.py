"""What is done about steps that the device had no memory for."""

from __future__ import annotations

_LEAST_PROMPT = 32  # tokens of a step, below which a shorter one hardly needs less
_FORGOTTEN_AFTER = 1000  # steps


class MemoryFaults:
    """Shrinks what makes a step large: MLX's freed buffers first, then the prompts in it.

    Attributes:
        count: steps that failed.
        prompt_tokens: that a step may compute now.
    """

    def __init__(self, prompt_tokens: int) -> None:
        """``prompt_tokens`` that a step computes while all is well."""
        self.count = 0
        self.prompt_tokens = prompt_tokens
        self._wanted = prompt_tokens
        self._steps = _FORGOTTEN_AFTER  # since the last fault, or since prompts grew again

    def failed(self, has_prompts: bool) -> bool:
        """A step has failed, whether with prompts or of decodes alone.

        Returns whether what it computed may be tried again; if not, nothing is left to shrink.
        """
        self.count += 1
        is_first = self._steps >= _FORGOTTEN_AFTER
        self._steps = 0
        if is_first:
            return True
        if not has_prompts or self.prompt_tokens <= _LEAST_PROMPT:
            return False
        self.prompt_tokens = max(_LEAST_PROMPT, self.prompt_tokens // 2)
        return True

    def succeeded(self) -> bool:
        """A step has succeeded; returns whether prompts may be longer again."""
        self._steps += 1
        if self._steps < _FORGOTTEN_AFTER or self.prompt_tokens == self._wanted:
            return False
        self._steps = 0
        self.prompt_tokens = min(self._wanted, 2 * self.prompt_tokens)
        return True
