// The npm package `ai` against a server: text with its thought, streaming, tools in steps, a form.
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const provider = createOpenAICompatible({
  name: "openm1",
  baseURL: process.argv[2] + "/v1",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const model = provider("nano");
const prompt = "4 -9 +8 *9 +1";
const options = { model, prompt, temperature: 0, seed: 1, maxRetries: 0 };

const whole = await generateText(options);
assert.equal(whole.text, "8");
assert.match(whole.reasoningText, /^4 -9/);

const streamed = streamText(options);
let text = "";
let thought = "";
for await (const part of streamed.fullStream) {
  if (part.type === "text-delta") text += part.text;
  if (part.type === "reasoning-delta") thought += part.text;
  assert.notEqual(part.type, "error", String(part.error));
}
assert.equal(text, "8");
assert.match(thought, /^4 -9/);

const asked = [];
const add = tool({
  description: "Adds.",
  inputSchema: z.object({ a: z.number().int().min(0).max(9) }),
  execute: async ({ a }) => {
    asked.push(a);
    return String(a + 1);
  },
});
const steps = await generateText({
  ...options,
  tools: { add },
  stopWhen: stepCountIs(2),
  prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
});
assert.ok(asked.length > 0 && asked.every((a) => a >= 0 && a <= 9));
assert.equal(steps.steps.length, 2);

// Longer than what a stream hands over at once.
const tell = tool({ description: "Tells.", inputSchema: z.object({ text: z.string().min(400).max(420) }) });
const calls = streamText({ ...options, tools: { tell }, toolChoice: "required" });
let deltas = 0;
for await (const part of calls.fullStream) deltas += part.type === "tool-input-delta";
assert.ok(deltas > 2, "the arguments came in one piece");
assert.equal((await calls.toolCalls)[0].input.text.length >= 400, true);

const schema = z.object({ a: z.number().int().min(0).max(9) });
const { output } = await generateText({ ...options, output: Output.object({ schema }) });
assert.ok(output.a >= 0 && output.a <= 9);
console.log("npm ai: text, thought, stream, tools in two steps, object");
