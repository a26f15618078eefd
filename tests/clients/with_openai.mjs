// The npm package `openai` against a server: chat, streaming, tools, responses.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "any", maxRetries: 0 });
const messages = [{ role: "user", content: "4 -9 +8 *9 +1" }];
const ask = (more) => client.chat.completions.create({ model: "nano", messages, temperature: 0, ...more });

const reply = await ask({});
assert.equal(reply.choices[0].message.content, "8");
assert.match(reply.choices[0].message.reasoning_content, /^4 -9/);

let text = "";
let chunks = 0;
for await (const chunk of await ask({ stream: true })) {
  text += chunk.choices[0]?.delta?.content ?? "";
  chunks++;
}
assert.equal(text, "8");
assert.ok(chunks > 3);

const parameters = {
  type: "object",
  properties: { a: { type: "integer", minimum: 0, maximum: 9 } },
  required: ["a"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "add", parameters } }];
const runner = client.chat.completions.stream({ model: "nano", messages, tools, tool_choice: "required", seed: 1 });
const call = (await runner.finalChatCompletion()).choices[0].message.tool_calls[0];
assert.ok(JSON.parse(call.function.arguments).a < 10);

const response = await client.responses.create({ model: "nano", input: "4 -9 +8 *9 +1", temperature: 0 });
assert.equal(response.output_text, "8");
await assert.rejects(ask({ temperature: -1 }), OpenAI.BadRequestError);
console.log("npm openai: chat, stream, tools, responses, errors");
