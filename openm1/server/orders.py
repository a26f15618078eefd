"""From what a client asked to orders for replies, or to the reason why not."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel
from pydantic_core import from_json

from openm1.chat.format import ChatFormat
from openm1.chat.wire import messages_from_json, tools_from_json
from openm1.engine.seeds import child_seed
from openm1.server.config import ServerConfig
from openm1.server.errors import ApiError, bad_request
from openm1.server.forms import answer_grammar, check_size, format_grammar, json_size
from openm1.server.grammar import AnswerGrammar
from openm1.server.protocol import (
    ChatRequest,
    CompletionRequest,
    Sampling,
)
from openm1.server.replies import ReplyOrder
from openm1.server.served import ServedModel
from openm1.server.thinking import Thinking, thinking_of
from openm1.types import Message, SamplingParams, ToolSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Desk:
    """Writes orders for one model under one server's limits."""

    served: ServedModel
    config: ServerConfig

    def chat(self, request: ChatRequest) -> tuple[list[ReplyOrder], Thinking]:
        """n orders for one conversation, and what its thoughts may be."""
        self.check_model(request.model)
        thinking = thinking_of(request, self.config)
        tools = self._tools(request.tools)
        choice = request.tool_choice or ("auto" if tools else "none")
        prompt_ids, snapshot_at = self.prompt(request.messages, tools if choice != "none" else ())
        grammar = answer_grammar(request, choice, tools, self.served.tokenizer, self.config)
        params = self._params(
            request,
            prompt_ids,
            request.max_tokens
            if request.max_completion_tokens is None
            else request.max_completion_tokens,
            thinking,
            top_logprobs=self._top_logprobs(request),
        )
        if grammar is not None:
            params = self._with_grammar(params, grammar)
        order = ReplyOrder(
            prompt_ids=prompt_ids,
            params=params,
            snapshot_at=snapshot_at,
            reads_calls=choice != "none",
            streams=bool(request.stream),
            wants_tokens=bool(request.logprobs),
            grammar=grammar,
        )
        return self._n_orders(order, request), thinking

    def completion(self, request: CompletionRequest) -> list[list[ReplyOrder]]:
        """n orders for each prompt."""
        self.check_model(request.model)
        n = request.n or 1
        if request.best_of not in (None, n):
            raise bad_request(f"best_of is {request.best_of}; allowed is n, {n}", "best_of")
        if request.echo and request.logprobs is not None:
            raise bad_request("echo with logprobs is not offered: prompts are not scored", "echo")
        thinking = Thinking(
            enabled=request.enable_thinking is not False,
            budget=None if request.thinking_budget in (None, -1) else request.thinking_budget,
            shown=True,
        )
        orders = []
        for prompt_ids in self._prompts(request.prompt):
            top = self._limit("logprobs", request.logprobs or 0, self.config.max_top_logprobs)
            params = self._params(
                request, prompt_ids, request.max_tokens, thinking, top_logprobs=top
            )
            form = request.response_format
            grammar = format_grammar(form, self.served.tokenizer, self.config)
            if grammar is not None:
                params = self._with_grammar(params, grammar)
            order = ReplyOrder(
                prompt_ids=prompt_ids,
                params=params,
                is_chat=False,
                streams=bool(request.stream),
                wants_tokens=request.logprobs is not None,
                grammar=grammar,
            )
            orders.append(self._n_orders(order, request))
        self._limit("n times prompts", n * len(orders), self.config.max_n)
        return orders

    def prompt(
        self, messages: Sequence[BaseModel], tools: Sequence[ToolSpec]
    ) -> tuple[list[int], tuple[int, ...]]:
        """A conversation's ids, and where the next turn's prompt may leave this one."""
        chat_format, conversation = self.chat_format, read_messages(messages)
        try:
            ids, so_far = chat_format.encode_prompt(conversation, tools)
        except ValueError as error:
            raise bad_request(str(error), "messages") from error
        return ids, () if so_far is None else (so_far,)

    @property
    def chat_format(self) -> ChatFormat:
        if self.served.chat_format is None:
            raise bad_request(
                f"{self.served.name} has no chat template; allowed is /v1/completions",
                code="no_chat_template",
            )
        return self.served.chat_format

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.served.name:
            raise ApiError(
                404,
                f"there is no model {name!r}; this server has {self.served.name!r}",
                code="model_not_found",
                param="model",
            )

    def _tools(self, tools: Sequence[BaseModel] | None) -> list[ToolSpec]:
        specs = read_tools(tools, self.config)
        names = [tool.name for tool in specs]
        if len(set(names)) < len(names):
            raise bad_request(f"tools have the names {names}; each may be there once", "tools")
        return specs

    def _with_grammar(self, params: SamplingParams, grammar: AnswerGrammar) -> SamplingParams:
        """Whoever must answer in a form must have tokens left for it: the thought gets half."""
        if params.ignore_eos:
            raise bad_request("ignore_eos would leave the grammar's answer behind", "ignore_eos")
        if not grammar.has_form:
            return replace(params, grammar=grammar)
        most = params.max_tokens // 2
        budget = params.thinking_budget
        # The grace comes on top of the budget.
        if budget is None or budget + min(budget // 16, 512) > most:
            budget = most * 16 // 17
        return replace(params, grammar=grammar, thinking_budget=budget)

    def _params(
        self,
        request: Sampling,
        prompt_ids: list[int],
        max_tokens: int | None,
        thinking: Thinking,
        *,
        top_logprobs: int,
    ) -> SamplingParams:
        given = {
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": None if request.top_k is None else max(request.top_k, 0),
            "min_p": request.min_p,
            "presence_penalty": request.presence_penalty,
            "frequency_penalty": request.frequency_penalty,
            "repetition_penalty": request.repetition_penalty,
        }
        try:
            return SamplingParams(
                **{name: value for name, value in given.items() if value is not None},
                max_tokens=self._max_tokens(len(prompt_ids), max_tokens),
                logit_bias=self._logit_bias(request.logit_bias),
                top_logprobs=top_logprobs,
                seed=secrets.randbits(63) if request.seed is None else request.seed,
                stop=self._stop(request.stop),
                stop_token_ids=tuple(request.stop_token_ids or ()),
                ignore_eos=request.ignore_eos,
                thinking=thinking.enabled,
                thinking_budget=thinking.budget,
                priority=request.priority,
            )
        except ValueError as error:
            raise bad_request(str(error)) from error

    def _max_tokens(self, num_prompt_tokens: int, wanted: int | None) -> int:
        room = self.served.context_tokens - num_prompt_tokens
        if room < 1 or (wanted is not None and wanted > room):
            asked = "" if wanted is None else f" and max_tokens {wanted}"
            raise bad_request(
                f"the prompt has {num_prompt_tokens} tokens{asked}; allowed are "
                f"{self.served.context_tokens} together",
                "messages" if wanted is None else "max_tokens",
                "context_length_exceeded",
            )
        return min(self.config.default_max_tokens, room) if wanted is None else wanted

    def _stop(self, stop: str | list[str] | None) -> tuple[str, ...]:
        strings = [stop] if isinstance(stop, str) else list(stop or ())
        self._limit("stop", len(strings), self.config.max_stop_strings, "strings")
        longest = max(map(len, strings), default=0)
        self._limit("stop", longest, self.config.max_stop_characters, "characters")
        return tuple(strings)

    def _logit_bias(self, bias: dict[str, float] | None) -> dict[int, float]:
        for index in bias or ():
            if not (index.isascii() and index.isdecimal()):
                raise bad_request(f"logit_bias has {index!r}; allowed are token ids", "logit_bias")
        return {int(index): value for index, value in (bias or {}).items()}

    def _top_logprobs(self, request: ChatRequest) -> int:
        if request.top_logprobs and not request.logprobs:
            raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
        wanted = request.top_logprobs or 0
        return self._limit("top_logprobs", wanted, self.config.max_top_logprobs)

    def _n_orders(self, order: ReplyOrder, request: Sampling) -> list[ReplyOrder]:
        n = self._limit("n", request.n or 1, self.config.max_n)
        if n == 1:
            return [order]
        seed = order.params.seed or 0
        return [
            replace(order, params=replace(order.params, seed=child_seed(seed, i))) for i in range(n)
        ]

    def _prompts(self, prompt: str | list[Any]) -> list[list[int]]:
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            prompt = [prompt]
        if not prompt:
            raise bad_request("prompt is empty; allowed is at least one", "prompt")
        return [self._prompt_ids(each) for each in prompt]

    def _prompt_ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            try:
                return self.served.tokenizer.encode(prompt, allow_special=True)
            except ValueError as error:
                raise bad_request(str(error), "prompt") from error
        return prompt

    def _limit(self, name: str, value: int, most: int, unit: str = "") -> int:
        if value > most:
            counted = f"{value} {unit}".strip()
            raise bad_request(
                f"{name} has {counted}; allowed are at most {most}"
                if unit
                else f"{name} is {value}; allowed are at most {most}",
                name,
                "limit_exceeded",
            )
        return value


def read_messages(messages: Sequence[BaseModel]) -> list[Message]:
    """Raises ApiError with what `chat.wire` finds wrong."""
    items = [message.model_dump(exclude_none=True) for message in messages]
    for item in items:
        for call in item.get("tool_calls", ()):
            _restore_arguments(call["function"])
    try:
        return messages_from_json(items)
    except ValueError as error:
        raise bad_request(str(error), "messages") from error


def _restore_arguments(function: dict[str, Any]) -> None:
    """In place: arguments that were cut off come back as they went out, and agents must be able to
    go on; what can be read of them stays."""
    arguments = function.get("arguments")
    if not isinstance(arguments, str) or not arguments.startswith("{"):
        return
    try:
        json.loads(arguments)
    except (ValueError, RecursionError):
        # What is not the beginning of an object is for `chat.wire` to refuse.
        with suppress(ValueError):
            function["arguments"] = from_json(arguments, allow_partial=True)


def read_tools(tools: Sequence[BaseModel] | None, config: ServerConfig) -> list[ToolSpec]:
    if not tools:
        return []
    if len(tools) > config.max_tools:
        raise bad_request(
            f"tools has {len(tools)} entries; allowed are at most {config.max_tools}",
            "tools",
            "limit_exceeded",
        )
    items = [tool.model_dump(exclude_none=True) for tool in tools]
    check_size(json_size(items, "tools"), "tools", config)
    try:
        return tools_from_json(items)
    except ValueError as error:
        raise bad_request(str(error), "tools") from error
