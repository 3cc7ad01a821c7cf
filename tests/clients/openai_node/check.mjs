// OpenAI's official Node client: `node check.mjs URL MODEL KEY SCHEMAS`, in a folder where `openai` and `ajv` are
// installed. SCHEMAS is a folder with the client's own types as JSON schemas, made by tests/clients/run.py.

import assert from 'node:assert/strict';
import fs from 'node:fs';
import { createRequire } from 'node:module';
import path from 'node:path';
import { pathToFileURL } from 'node:url';

const [url, model, key, schemas] = process.argv.slice(2);
const installed = createRequire(path.join(process.cwd(), 'package.json'));
const { default: OpenAI } = await import(pathToFileURL(installed.resolve('openai')));
const { default: Ajv } = await import(pathToFileURL(installed.resolve('ajv')));

const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0, timeout: 120_000 });
const ajv = new Ajv({ strict: false, allErrors: true });
const validators = {};

function validatorOf(type) {
  const schema = JSON.parse(fs.readFileSync(path.join(schemas, `${type}.json`), 'utf8'));
  const response = schema.definitions.Response;
  if (response) {
    response.required = response.required.filter((name) => name !== 'output_text'); // added by the client
    // As OpenAI's own unfinished responses have it, though the type has no null there.
    response.properties.usage = { anyOf: [response.properties.usage, { type: 'null' }] };
  }
  return ajv.compile(schema);
}

/** The part itself, after checking it against the client's type of that name. */
function validated(type, part) {
  validators[type] ??= validatorOf(type);
  const plain = JSON.parse(JSON.stringify(part)); // without the helpers that the client puts onto replies
  assert(validators[type](plain), `${type}: ${ajv.errorsText(validators[type].errors)}: ${JSON.stringify(plain)}`);
  return part;
}

async function allValidated(type, stream) {
  const parts = [];
  for await (const part of stream) parts.push(validated(type, part));
  return parts;
}

const say = (content) => ({ role: 'user', content });
const ask = (messages, options = {}) =>
  client.chat.completions.create({ model, messages, temperature: 0, max_tokens: 60, ...options });
const askValidated = async (...body) => validated('ChatCompletion', await ask(...body));

const parameters = {
  type: 'object',
  properties: { city: { type: 'string', description: 'Name of the city' } },
  required: ['city'],
  additionalProperties: false,
};
const weather = { name: 'get_weather', description: 'Get the weather in a city', parameters };
const tools = [{ type: 'function', function: weather }];
const WEATHER_QUESTION = 'What is the weather in Lisbon?';
const WEATHER_RESULT = '{"temperature": 21, "condition": "sunny"}';
const WEATHER_ANSWER = 'It is 21 degrees and sunny in Lisbon.';
const PERSON_QUESTION = 'Extract name and age from this sentence as JSON: Paula is 31 years old.';

/** How many requests the server has cancelled so far. */
async function numCancelled() {
  const reply = await fetch(`${url}/metrics`, { headers: { Authorization: `Bearer ${key}` } });
  const counts = [...(await reply.text()).matchAll(/^turboserve_request_cancelled_total\{.*\} (\S+)$/gm)];
  return counts.reduce((sum, match) => sum + Number(match[1]), 0);
}

const steps = {
  async 'models are listed'() {
    const ids = [];
    for await (const one of client.models.list()) ids.push(validated('Model', one).id);
    assert(ids.includes(model));
  },

  async 'several turns'() {
    const messages = [say('My name is Paula and I live in Lisbon.')];
    const first = await askValidated(messages);
    messages.push(first.choices[0].message, say('What is my name?'));
    const second = await askValidated(messages);
    assert.match(second.choices[0].message.content, /Paula/);
    assert(second.usage.prompt_tokens_details.cached_tokens > 0);
  },

  async 'a stream is the whole answer'() {
    const messages = [say('Who are you?')];
    const whole = await askValidated(messages);
    const stream = await ask(messages, { stream: true, stream_options: { include_usage: true } });
    const chunks = await allValidated('ChatCompletionChunk', stream);
    const text = chunks.map((chunk) => chunk.choices[0]?.delta.content ?? '').join('');
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(chunks.at(-1).usage.total_tokens, whole.usage.total_tokens);
  },

  async 'a tool round trip'() {
    const messages = [say(WEATHER_QUESTION)];
    const called = (await askValidated(messages, { tools, tool_choice: 'required' })).choices[0];
    assert.equal(called.finish_reason, 'tool_calls');
    const [call] = called.message.tool_calls;
    assert.equal(call.function.name, 'get_weather');
    assert.deepEqual(JSON.parse(call.function.arguments), { city: 'Lisbon' });
    messages.push(called.message, { role: 'tool', tool_call_id: call.id, content: WEATHER_RESULT });
    assert.equal((await askValidated(messages, { tools })).choices[0].message.content, WEATHER_ANSWER);
  },

  async 'a streamed tool call'() {
    const options = { tools, tool_choice: 'required' };
    const stream = await ask([say(WEATHER_QUESTION)], { ...options, stream: true });
    const chunks = await allValidated('ChatCompletionChunk', stream);
    const deltas = chunks.flatMap((chunk) => chunk.choices[0]?.delta.tool_calls ?? []);
    assert.equal(deltas[0].function.name, 'get_weather');
    assert.deepEqual(JSON.parse(deltas.map((delta) => delta.function.arguments ?? '').join('')), { city: 'Lisbon' });
  },

  async 'the client runs the tool by itself'() {
    const cities = [];
    const runner = client.chat.completions.runTools({
      model,
      messages: [say(WEATHER_QUESTION)],
      temperature: 0,
      stream: true,
      tools: [
        {
          type: 'function',
          function: {
            ...weather,
            parse: JSON.parse,
            function: ({ city }) => (cities.push(city), WEATHER_RESULT),
          },
        },
      ],
    });
    assert.equal(await runner.finalContent(), WEATHER_ANSWER);
    assert.deepEqual(cities, ['Lisbon']);
  },

  async 'json by a schema'() {
    const schema = {
      type: 'object',
      properties: { name: { type: 'string' }, age: { type: 'integer' } },
      required: ['name', 'age'],
      additionalProperties: false,
    };
    const form = { type: 'json_schema', json_schema: { name: 'person', schema, strict: true } };
    const body = { model, messages: [say(PERSON_QUESTION)], response_format: form, temperature: 0 };
    const reply = await client.chat.completions.parse(body);
    assert.deepEqual(JSON.parse(reply.choices[0].message.content), { name: 'Paula', age: 31 });
  },

  async 'logprobs, whole and streamed'() {
    const options = { logprobs: true, top_logprobs: 3, max_tokens: 8 };
    const whole = (await askValidated([say('Hello!')], options)).choices[0];
    const tokens = whole.logprobs.content.map((token) => token.token);
    assert.equal(tokens.join(''), whole.message.content);
    assert(whole.logprobs.content.every((token) => token.top_logprobs.length === 3));
    const stream = await ask([say('Hello!')], { ...options, stream: true });
    const chunks = await allValidated('ChatCompletionChunk', stream);
    const streamed = chunks.flatMap((chunk) => chunk.choices[0]?.logprobs?.content ?? []);
    assert.deepEqual(streamed.map((token) => token.token), tokens);
  },

  async 'three answers'() {
    const question = [say('Tell me a short story about a cat named Misty.')];
    const options = { n: 3, temperature: 1, seed: 7, max_tokens: 30 };
    const whole = await askValidated(question, options);
    const texts = ['', '', ''];
    for (const chunk of await allValidated('ChatCompletionChunk', await ask(question, { ...options, stream: true })))
      for (const choice of chunk.choices) texts[choice.index] += choice.delta.content ?? '';
    assert.deepEqual(texts, whole.choices.map((choice) => choice.message.content));
    assert(new Set(texts).size > 1);
  },

  async embeddings() {
    const reply = await client.embeddings.create({ model, input: ['a river', 'a garden'] });
    validated('CreateEmbeddingResponse', reply);
    const floats = await client.embeddings.create({ model, input: 'a river', encoding_format: 'float' });
    const differences = floats.data[0].embedding.map((value, i) => Math.abs(value - reply.data[0].embedding[i]));
    assert(Math.max(...differences) < 1e-2);
  },

  async responses() {
    const options = { model, temperature: 0 };
    const first = await client.responses.create({ ...options, input: 'My name is Paula.' });
    validated('Response', first);
    const body = { ...options, input: 'What is my name?', previous_response_id: first.id, stream: true };
    const events = await allValidated('ResponseStreamEvent', await client.responses.create(body));
    assert.deepEqual(events.map((event) => event.sequence_number), [...events.keys()]);
    const text = events.map((event) => (event.type === 'response.output_text.delta' ? event.delta : '')).join('');
    assert.match(text, /Paula/);
    assert.equal(events.at(-1).type, 'response.completed');
    const tool = { type: 'function', strict: true, ...weather };
    const call = { ...options, input: WEATHER_QUESTION, tools: [tool], tool_choice: 'required', stream: true };
    const called = await allValidated('ResponseStreamEvent', await client.responses.create(call));
    const item = called.at(-1).response.output.find((one) => one.type === 'function_call');
    assert.deepEqual(JSON.parse(item.arguments), { city: 'Lisbon' });
    await client.responses.delete(first.id);
    await assert.rejects(client.responses.retrieve(first.id), OpenAI.NotFoundError);
  },

  async 'cancelling in mid-stream'() {
    const before = await numCancelled();
    const options = { stream: true, max_tokens: 8000, ignore_eos: true };
    let received = 0;
    for await (const chunk of await ask([say('Tell me a long story.')], options)) {
      validated('ChatCompletionChunk', chunk);
      if (++received === 4) break; // the client aborts its request
    }
    const deadline = Date.now() + 10_000; // it is gone within a step, on a loaded machine too
    while ((await numCancelled()) === before) {
      assert(Date.now() < deadline, 'nothing was cancelled in 10 s');
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
  },

  async 'errors are typed'() {
    const cases = [
      [OpenAI.BadRequestError, { temperature: 9 }, 'temperature', 'invalid_request'],
      [OpenAI.BadRequestError, { messages: [say('word '.repeat(20_000))] }, 'messages', 'context_length_exceeded'],
      [OpenAI.NotFoundError, { model: 'no-such-model' }, 'model', 'model_not_found'],
    ];
    for (const [kind, options, param, code] of cases)
      for (const stream of [false, true])
        await assert.rejects(ask([say('Hello!')], { ...options, stream }), (error) => {
          assert(error instanceof kind, `${error}`);
          assert.deepEqual([error.param, error.code], [param, code]);
          assert(error.requestID);
          return true;
        });
    const stranger = new OpenAI({ baseURL: `${url}/v1`, apiKey: 'wrong', maxRetries: 0 });
    await assert.rejects(stranger.models.retrieve(model), OpenAI.AuthenticationError);
  },
};

let numFailed = 0;
for (const [name, step] of Object.entries(steps)) {
  const started = performance.now();
  try {
    await step();
    console.log(`ok      ${name} (${((performance.now() - started) / 1000).toFixed(1)} s)`);
  } catch (error) {
    numFailed += 1;
    console.log(`FAILED  ${name}: ${error}`);
    console.error(error.stack, error.cause ?? '');
  }
}
if (numFailed) {
  console.error(`${numFailed} of ${Object.keys(steps).length} steps failed`);
  process.exit(1);
}
