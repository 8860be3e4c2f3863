// OpenAI's, Anthropic's and the AI SDK's clients: text, streams, tools and objects.
import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamText, tool } from "ai";
import OpenAI from "openai";
import { z } from "zod";

const url = process.argv[2];
const baseURL = `${url}/v1`;
const model = "quire-demo";
const messages = [{ role: "user", content: "Hello" }];

const openai = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const options = { model, messages, max_tokens: 50, temperature: 0 };
const whole = (await openai.chat.completions.create(options)).choices[0].message.content;
assert(whole);
const stream = openai.chat.completions.stream(options);
assert.equal((await stream.finalChatCompletion()).choices[0].message.content, whole);
const response = await openai.responses.create({ model, input: "Hello", temperature: 0 });
assert(response.output_text);

const anthropic = new Anthropic({ baseURL: url, apiKey: "none", maxRetries: 0 });
const asked = { model: "claude-x", messages, max_tokens: 50, temperature: 0 };
const message = await anthropic.messages.create(asked);
const streamed = await anthropic.messages.stream(asked).finalMessage();
assert.deepEqual(streamed.content, message.content);

const schema = z.object({ sky: z.enum(["clear", "cloudy"]), warm: z.boolean() });
const providers = [
  createOpenAI({ baseURL, apiKey: "none" })(model),
  createOpenAI({ baseURL, apiKey: "none" }).chat(model),
  createOpenAICompatible({ name: "quire", baseURL, supportsStructuredOutputs: true })(model),
];
for (const provider of providers) {
  const common = { model: provider, maxOutputTokens: 100, temperature: 0, maxRetries: 0 };
  const { text } = await generateText({ ...common, prompt: "Hello" });
  let pieces = "";
  for await (const piece of streamText({ ...common, prompt: "Hello" }).textStream) pieces += piece;
  assert.equal(pieces, text);
  const { object } = await generateObject({ ...common, schema, prompt: "The weather?" });
  assert(schema.safeParse(object).success);
  const look = tool({ description: "Look.", inputSchema: schema });
  const called = await generateText({
    ...common,
    prompt: "Look!",
    tools: { look },
    toolChoice: "required",
  });
  assert.equal(called.toolCalls[0].toolName, "look");
  assert(schema.safeParse(called.toolCalls[0].input).success);
}
