"""What is done about steps that the device had no memory for."""

from __future__ import annotations

_LEAST_PROMPT = 32  # tokens of a step, below which a shorter one hardly needs less
_FORGOTTEN_AFTER = 1000  # steps, at first


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
        self._forgotten_after = _FORGOTTEN_AFTER
        self._grew = False

    def failed(self, has_prompts: bool) -> bool:
        """A step has failed, whether with prompts or of decodes alone.

        Returns whether what it computed may be tried again; if not, nothing is left to shrink.
        """
        self.count += 1
        is_first = self._steps >= self._forgotten_after
        self._steps = 0
        if self._grew:
            # Too early. A long prompt that fits in small steps only has many: it would be tried for
            # ever if prompts grew again and again before it is done.
            self._forgotten_after *= 2
            self._grew = False
        if is_first:
            return True
        if not has_prompts or self.prompt_tokens <= _LEAST_PROMPT:
            return False
        self.prompt_tokens = max(_LEAST_PROMPT, self.prompt_tokens // 2)
        return True

    def succeeded(self) -> bool:
        """A step has succeeded; returns whether prompts may be longer again."""
        self._steps += 1
        if self._steps < self._forgotten_after:
            return False
        if self.prompt_tokens == self._wanted:
            self._forgotten_after, self._grew = _FORGOTTEN_AFTER, False
            return False
        self._steps = 0
        self.prompt_tokens = min(self._wanted, 2 * self.prompt_tokens)
        self._grew = True
        return True
