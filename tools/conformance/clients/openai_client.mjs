// The openai package for Node against a running server, as programs use it; run by tools/conformance/run.py.
import assert from "node:assert/strict";
import { appendFileSync } from "node:fs";
import { createRequire } from "node:module";

const require = createRequire(process.env.CRIADERO_MODULES + "/");
const { default: OpenAI } = await import(require.resolve("openai").replace(/\.js$/, ".mjs"));
const model = "cria-chat";
const messages = [{ role: "user", content: "Hola, ¿quién eres?" }];
const client = new OpenAI({ baseURL: process.env.CRIADERO_URL + "/v1", apiKey: "none" });
const city = {
  type: "object",
  properties: { city: { enum: ["Madrid", "Lima"] } },
  required: ["city"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "weather", parameters: city, strict: true } }];

const tests = {
  async chat() {
    const answer = await client.chat.completions.create({ model, messages, max_completion_tokens: 12, temperature: 0 });
    assert.ok(answer.choices[0].message.content);
    assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
    assert.match(answer._request_id, /^req-/);
  },
  async "a stream is the same text"() {
    const asked = { model, messages, max_tokens: 20, temperature: 0.8, seed: 7 };
    const whole = await client.chat.completions.create(asked);
    let text = "";
    let usage = null;
    const stream = await client.chat.completions.create({
      ...asked,
      stream: true,
      stream_options: { include_usage: true },
    });
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta?.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.deepEqual(usage.completion_tokens, whole.usage.completion_tokens);
  },
  async "stream helper"() {
    const stream = client.chat.completions.stream({ model, messages, max_tokens: 12, regex: "[a-z]{3,5}" });
    assert.match(await stream.finalContent(), /^[a-z]{3,5}$/);
  },
  async tools() {
    const answer = await client.chat.completions.create({
      model, messages, tools, tool_choice: "required", parallel_tool_calls: false, max_tokens: 60,
    });
    const [call] = answer.choices[0].message.tool_calls;
    assert.ok(["Madrid", "Lima"].includes(JSON.parse(call.function.arguments).city));
    const after = await client.chat.completions.create({
      model,
      messages: [...messages, answer.choices[0].message, { role: "tool", tool_call_id: call.id, content: "sunny" }],
      tools, tool_choice: "none", max_tokens: 8,
    });
    assert.ok(after.choices[0].message.content);
  },
  async "run tools"() {
    let asked = 0;
    const runner = client.chat.completions.runTools(
      {
        model, messages, tool_choice: { type: "function", function: { name: "weather" } }, parallel_tool_calls: false, max_tokens: 60,
        tools: [{
          type: "function",
          function: { name: "weather", parameters: city, parse: JSON.parse, function: () => ((asked += 1), "sunny") },
        }],
      },
      { maxChatCompletions: 2 },
    );
    await runner.done();
    assert.ok(asked >= 1);
  },
  async "structured output"() {
    const answer = await client.chat.completions.parse({
      model, messages, max_tokens: 60,
      response_format: { type: "json_schema", json_schema: { name: "city", schema: city, strict: true } },
    });
    assert.ok(["Madrid", "Lima"].includes(answer.choices[0].message.parsed.city));
  },
  async completions() {
    const answer = await client.completions.create({ model, prompt: "Hola", max_tokens: 4, temperature: 0, echo: true, logprobs: 1 });
    assert.ok(answer.choices[0].text.startsWith("Hola"));
    let text = "";
    for await (const one of await client.completions.create({ model, prompt: "Hola", max_tokens: 4, temperature: 0, stream: true }))
      text += one.choices[0]?.text ?? "";
    assert.equal("Hola" + text, answer.choices[0].text);
  },
  async embeddings() {
    const packed = await client.embeddings.create({ model, input: ["Hola", "Good morning"] }); // asks for base64
    const plain = await client.embeddings.create({ model, input: ["Hola", "Good morning"], encoding_format: "float" });
    packed.data.forEach(({ embedding }, at) =>
      embedding.forEach((value, place) => assert.ok(Math.abs(value - plain.data[at].embedding[place]) < 1e-6)));
  },
  async responses() {
    const first = await client.responses.create({ model, input: "Hola", max_output_tokens: 12, temperature: 0 });
    assert.ok(first.output_text);
    const second = await client.responses.create({
      model, input: "And you?", previous_response_id: first.id, max_output_tokens: 8,
    });
    assert.equal(second.previous_response_id, first.id);
    const kinds = [];
    for await (const event of await client.responses.create({ model, input: "Hola", max_output_tokens: 8, stream: true }))
      kinds.push(event.type);
    assert.equal(kinds[0], "response.created");
    assert.ok(["response.completed", "response.incomplete"].includes(kinds.at(-1)));
  },
  async models() {
    const found = [];
    for await (const one of client.models.list()) found.push(one.id);
    assert.ok(found.includes(model));
  },
  async "an abort frees the slot"() {
    const stream = await client.chat.completions.create({ model, messages, stream: true, ignore_eos: true });
    for await (const _ of stream) break; // leaves the loop, and so the answer
    const ending = new AbortController();
    const asked = client.chat.completions.create({ model, messages, ignore_eos: true }, { signal: ending.signal });
    setTimeout(() => ending.abort(), 20);
    await assert.rejects(asked, OpenAI.APIUserAbortError);
    assert.ok((await client.chat.completions.create({ model, messages, max_tokens: 2 })).choices);
  },
  async errors() {
    await assert.rejects(client.chat.completions.create({ model: "nobody", messages }), OpenAI.NotFoundError);
    await assert.rejects(
      client.chat.completions.create({ model, messages, temperature: 3 }),
      (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature" && error.code === "out_of_range",
    );
  },
};

for (const [name, run] of Object.entries(tests)) {
  const line = { test: `openai_client.mjs::${name}`, outcome: "passed", when: "call", text: "", began: Date.now() / 1000 };
  try {
    await run();
  } catch (error) {
    line.outcome = "failed";
    line.text = `${error.name}: ${error.message}`;
    console.error(name, error);
  }
  line.ended = Date.now() / 1000;
  appendFileSync(process.env.CRIADERO_WATCH, JSON.stringify(line) + "\n");
}
