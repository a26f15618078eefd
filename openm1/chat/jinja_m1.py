"""M1's chat format as a Jinja template, for programs that read a saved tokenizer.

It writes the text that `M1ChatFormat.render` writes. A program that renders it and then encodes the
whole text lets users write special tokens; this project encodes with `M1ChatFormat`, which does
not.
"""

from __future__ import annotations

# A thought hugs its markers where they are single tokens; as text they stand on lines of their own.
_THOUGHT_AS_TOKENS = r"""
{%- set thought_open, thought_close = "<think>", "</think>" -%}
"""
_THOUGHT_AS_TEXT = r"""
{%- set thought_open, thought_close = "<think>\n", "\n</think>\n\n" -%}
"""

_MACROS = r"""
{%- macro sentence(header, body) -%}
  {{- "<beginning_of_sentence>" ~ header ~ "\n" ~ body ~ "<end_of_sentence>\n" -}}
{%- endmacro -%}

{#- Content is a string, nothing, or a list of text parts. -#}
{%- macro text(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- else -%}
    {%- for part in content or [] -%}
      {%- if part.type != "text" -%}
        {{- raise_exception("a content part is not of type 'text'") -}}
      {%- endif -%}
      {{- part.text -}}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}

{#- A schema is flat, or lies under "function". -#}
{%- macro schema(tool) -%}
  {%- set function = tool.function or tool -%}
  {%- set name, parameters = function.name, function.parameters or {} -%}
  {%- if function.description -%}
    {%- set about = function.description -%}
    {{- {"name": name, "description": about, "parameters": parameters} | tojson -}}
  {%- else -%}
    {{- {"name": name, "parameters": parameters} | tojson -}}
  {%- endif -%}
{%- endmacro -%}

{%- macro call_line(call) -%}
  {%- set function = call.function or call -%}
  {%- set arguments = function.arguments or {} -%}
  {{- '{"name": ' ~ function.name | tojson ~ ', "arguments": ' -}}
  {%- if arguments is string -%}
    {#- A line break in JSON is a blank between its parts: the call stays on its line. -#}
    {{- arguments | replace("\n", " ") -}}
  {%- else -%}
    {{- arguments | tojson -}}
  {%- endif -%}
  {{- "}\n" -}}
{%- endmacro -%}

{%- macro reply(message) -%}
  {%- set given = message.reasoning_content -%}
  {%- set thought = given if given is string else message.reasoning -%}
  {%- if thought is string -%}
    {{- thought_open ~ thought ~ thought_close -}}
  {%- endif -%}
  {%- set content = text(message.content) -%}
  {{- content -}}
  {%- if message.tool_calls -%}
    {%- if content and content[-1:] != "\n" -%}
      {{- "\n" -}}
    {%- endif -%}
    {{- "<tool_calls>\n" -}}
    {%- for call in message.tool_calls -%}
      {{- call_line(call) -}}
    {%- endfor -%}
    {{- "</tool_calls>" -}}
  {%- endif -%}
{%- endmacro -%}

{%- macro one_result(name, result) -%}
  {%- if not name -%}
    {{- raise_exception("a tool message needs a name, or the tool_call_id of an earlier call") -}}
  {%- endif -%}
  {{- "tool name: " ~ name ~ "\ntool result: " ~ result ~ "\n\n" -}}
{%- endmacro -%}

{#- The parts of a tool message may be results of their own, each with a name. -#}
{%- macro results(message, earlier) -%}
  {%- set parts = [] if message.content is string else message.content or [] -%}
  {%- if parts | selectattr("name", "defined") | list -%}
    {%- for part in parts -%}
      {{- one_result(part.name, text([part])) -}}
    {%- endfor -%}
  {%- else -%}
    {%- set answered = namespace(name=message.name) -%}
    {%- if not answered.name -%}
      {%- for turn in earlier -%}
        {%- for call in turn.tool_calls or [] if call.id and call.id == message.tool_call_id -%}
          {%- set answered.name = (call.function or call).name -%}
        {%- endfor -%}
      {%- endfor -%}
    {%- endif -%}
    {{- one_result(answered.name, text(message.content)) -}}
  {%- endif -%}
{%- endmacro -%}
"""

_CONVERSATION = r"""
{{- "<begin_of_document>" -}}

{%- set system = namespace(text="") -%}
{%- for message in messages if message.role in ["system", "developer"] -%}
  {%- set system.text = system.text ~ text(message.content) -%}
{%- endfor -%}
{%- if system.text -%}
  {{- sentence("system ai_setting=assistant", system.text) -}}
{%- endif -%}

{%- if tools -%}
  {{- "<beginning_of_sentence>system tool_setting=tools\n" -}}
  {{- "You are provided with these tools:\n<tools>\n" -}}
  {%- for tool in tools -%}
    {{- schema(tool) ~ "\n" -}}
  {%- endfor -%}
  {{- "</tools>\n\nIf you need to call tools, please respond with <tool_calls></tool_calls>" -}}
  {{- " XML tags, and provide tool-name and json-object of arguments," -}}
  {{- " following the format below:\n<tool_calls>\n" -}}
  {{- "{name: <tool-name-1>, arguments: <args-json-object-1>}\n...\n</tool_calls>" -}}
  {{- "<end_of_sentence>\n" -}}
{%- endif -%}

{%- set turns = messages | rejectattr("role", "in", ["system", "developer"]) | list -%}
{%- for message in turns -%}
  {%- if message.role == "user" -%}
    {{- sentence("user name=user", text(message.content)) -}}
  {%- elif message.role == "assistant" -%}
    {{- sentence("ai name=assistant", reply(message)) -}}
  {%- elif message.role == "tool" -%}
    {#- Results that follow each other share one sentence. -#}
    {%- if loop.first or loop.previtem.role != "tool" -%}
      {{- "<beginning_of_sentence>tool name=tools\n" -}}
    {%- endif -%}
    {{- results(message, turns[:loop.index0]) -}}
    {%- if loop.last or loop.nextitem.role != "tool" -%}
      {{- "<end_of_sentence>\n" -}}
    {%- endif -%}
  {%- else -%}
    {{- raise_exception("a message's role is not system, user, assistant or tool") -}}
  {%- endif -%}
{%- endfor -%}

{%- if add_generation_prompt -%}
  {{- "<beginning_of_sentence>ai name=assistant\n" -}}
{%- endif -%}
"""


def m1_chat_template(*, think_is_token: bool) -> str:
    """`think_is_token` tells whether `<think>` and `</think>` are single tokens."""
    thought = _THOUGHT_AS_TOKENS if think_is_token else _THOUGHT_AS_TEXT
    return (thought + _MACROS + _CONVERSATION).strip()


M1_CHAT_TEMPLATE = m1_chat_template(think_is_token=True)
"""The one of nano tokenizers."""
