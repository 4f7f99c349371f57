"""Rows of the output, in the shape of OpenAI's batches; nothing of time is in them.

A row depends on its line, on what the manifest names and on nothing else: so a run that
was interrupted ends with the rows of one that was not.
"""

import codecs
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jchameleon.batch.lines import Line, LineRequest, key_digest
from jchameleon.models.tokenizer import Tokenizer
from jchameleon.outputs import CompletionOutput, RequestOutput
from jchameleon.runtime.outbox import Fault, TokenLogprobs

LEAST_LOGPROB = -9999.0
"""What stands for minus infinity, which JSON does not have; vLLM writes the same."""

# HTTP's codes for what ends one request; "engine" and "closed" end the run instead.
FAULT_STATUS: dict[Fault | None, int] = {
    "cancelled": 499,  # client closed request, as nginx counts it
    "unregistered": 404,
    "adapter": 424,
    "adapter_io": 503,
    "capacity": 400,
    "rejected": 429,
    "not_finite": 500,
    "internal": 500,
}


def request_id(key: str) -> str:
    """Return the id of a line's request: always the same for the same custom_id."""
    return f"req-{key_digest(key).hex()}"


def error_row(key: str, status_code: int, code: str, message: str) -> bytes:
    """Return the row of a line that failed.

    Some readers look at `error`, others at `response.status_code` or at an error in the
    body: all of them are told.
    """
    kind = "invalid_request_error" if status_code < 500 else "server_error"
    inner = {"message": message, "type": kind, "param": None, "code": code}
    error = {"code": code, "message": message}
    return _row(key, status_code, {"error": inner}, error)


def answer_row(
    line: Line,
    request: LineRequest,
    output: RequestOutput,
    *,
    model: str,
    tokenizer: Tokenizer | None,
) -> bytes:
    """Return the row of a line whose completions all ended well.

    Args:
      model: what answered, as the line calls it.
      tokenizer: None gives token ids instead of text.
    """
    shows_ids = request.returns_ids or tokenizer is None
    choices = []
    for one in output.outputs:
        choice: dict[str, Any] = {"index": one.index}
        if request.is_chat:
            choice["message"] = {"role": "assistant", "content": one.text}
        else:
            choice["text"] = one.text
        choice["logprobs"] = _logprobs(request, one, tokenizer)
        choice["finish_reason"] = one.finish_reason
        if shows_ids:
            choice["token_ids"] = list(one.token_ids)
        choices.append(choice)
    prompt_tokens = len(output.prompt_token_ids)
    output_tokens = sum(len(one.token_ids) for one in output.outputs)
    digest = key_digest(line.key).hex()
    body: dict[str, Any] = {
        "id": ("chatcmpl-" if request.is_chat else "cmpl-") + digest,
        "object": "chat.completion" if request.is_chat else "text_completion",
        "created": 0,
        "model": model,
        "choices": choices,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": output_tokens,
            "total_tokens": prompt_tokens + output_tokens,
        },
    }
    if shows_ids:
        body["prompt_token_ids"] = list(output.prompt_token_ids)
    if request.sampling.prompt_logprobs is not None:
        body["prompt_logprobs"] = [
            None if one is None else {str(i): _finite(v) for i, v in one.items()}
            for one in output.prompt_logprobs or ()
        ]
    return _row(line.key, 200, body, None)


def _row(
    key: str,
    status_code: int,
    body: Mapping[str, Any],
    error: Mapping[str, Any] | None,
) -> bytes:
    row = {
        "id": f"batch_req_{key_digest(key).hex()}",
        "custom_id": key,
        "response": {
            "status_code": status_code,
            "request_id": request_id(key),
            "body": body,
        },
        "error": error,
    }
    # ASCII: readers that cut text at U+2028 or U+0085 see one row a line too.
    return json.dumps(row, allow_nan=False).encode("ascii") + b"\n"


def _logprobs(
    request: LineRequest, one: CompletionOutput, tokenizer: Tokenizer | None
) -> dict[str, Any] | None:
    if one.logprobs is None:
        return None
    if request.is_chat:
        top = request.sampling.logprobs or 0
        return {"content": [_chat_token(i, top, tokenizer) for i in one.logprobs]}
    return _completion_logprobs(one.logprobs, tokenizer)


def _completion_logprobs(
    logprobs: Sequence[TokenLogprobs], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Return log-probabilities as completions have them: columns.

    `text_offset` counts whole characters before each token.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    offsets, chars = [], 0
    for found in logprobs:
        offsets.append(chars)
        chars += len(decoder.decode(_bytes(next(iter(found)), tokenizer)))
    return {
        "tokens": [_spelt(next(iter(found)), tokenizer) for found in logprobs],
        "token_logprobs": [_finite(next(iter(found.values()))) for found in logprobs],
        "top_logprobs": [_by_spelling(found, tokenizer) for found in logprobs],
        "text_offset": offsets,
    }


def _by_spelling(found: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[str, float]:
    """Return log-probabilities by token; of two that are spelt alike one by its id."""
    table: dict[str, float] = {}
    for token_id, value in found.items():
        spelt = _spelt(token_id, tokenizer)
        table[f"token_id:{token_id}" if spelt in table else spelt] = _finite(value)
    return table


def _chat_token(
    found: TokenLogprobs, top: int, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Return one token's log-probability as chats have it, with the `top` likeliest."""

    def entry(token_id: int, value: float) -> dict[str, Any]:
        return {
            "token": _spelt(token_id, tokenizer),
            "logprob": _finite(value),
            "bytes": list(_bytes(token_id, tokenizer)),
        }

    own, value = next(iter(found.items()))
    # The token itself stands first, however likely it is.
    best = sorted(found.items(), key=lambda item: -item[1])[:top]
    return {**entry(own, value), "top_logprobs": [entry(*item) for item in best]}


def _bytes(token_id: int, tokenizer: Tokenizer | None) -> bytes:
    return b"" if tokenizer is None else tokenizer.piece(token_id)


def _spelt(token_id: int, tokenizer: Tokenizer | None) -> str:
    """Return a token as text, or by its bytes where it is none, as OpenAI does."""
    piece = _bytes(token_id, tokenizer)
    if not piece:
        return f"token_id:{token_id}"
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _finite(value: float) -> float:
    return value if value > LEAST_LOGPROB else LEAST_LOGPROB
