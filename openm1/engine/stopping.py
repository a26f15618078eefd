"""When a reply is over."""

from __future__ import annotations

from openm1.engine.request import Request
from openm1.types import FinishReason


def finish_reason(request: Request, eos_token_ids: frozenset[int]) -> FinishReason | None:
    """Looks at the newest token: end of sentence, stop token, stop string, length; else None."""
    params, token = request.params, request.output_ids[-1]
    if token in eos_token_ids and not params.ignore_eos:
        return "stop"
    if token in params.stop_token_ids:
        return "stop"
    if request.decode_piece is not None and request.thought.phase != "inside":
        request.answer_text += request.decode_piece(token)
        if any(text in request.answer_text for text in params.stop):
            return "stop"
    if len(request.output_ids) >= params.max_tokens:
        return "length"
    return None


def cut_at_stop(text: str, stop: tuple[str, ...]) -> str:
    """`text` before the earliest stop string."""
    found = [at for at in (text.find(s) for s in stop) if at >= 0]
    return text[: min(found)] if found else text
