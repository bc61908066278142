// A driver for `minilora verify --cmd "node lora.mjs"`: Node alone, no package.
// The mathematics stands in `scale`, `layer` and `methods`; the rest is the protocol, and serves any.
import fs from "node:fs";
import readline from "node:readline";

const bug = process.argv[2]; // one of five mistakes on purpose: see `scale` and `layer`

// Matrices: leading axes of the shape are one axis of rows. Numbers are float64, rounded when stored.
const matrix = (rows, cols, at, shape = [rows, cols]) => {
  const data = new Float64Array(rows * cols);
  for (let i = 0; i < rows; i++) for (let j = 0; j < cols; j++) data[i * cols + j] = at(i, j);
  return { rows, cols, data, shape, at: (i, j) => data[i * cols + j] };
};
const map = (a, f) => matrix(a.rows, a.cols, (i, j) => f(a.at(i, j), i, j), a.shape);
const plus = (a, b) => map(a, (v, i, j) => v + b.at(i, j));
const scaled = (s, a) => map(a, (v) => s * v);
const turned = (a) => matrix(a.cols, a.rows, (i, j) => a.at(j, i));
const times = (a, b) => matrix(a.rows, b.cols, (i, j) => {
  let sum = 0;
  for (let k = 0; k < a.cols; k++) sum += a.at(i, k) * b.at(k, j);
  return sum;
});
const shaped = (a, shape) => ({ ...a, shape });

// What a setting or a tensor asks for that is not implemented here is skipped, and never ignored.
class Skipped extends Error {}
const refuse = (others) => {
  for (const name in others) if (others[name]) throw new Skipped(`${name} is not implemented`);
};

// The factor alpha / r, or alpha / √r.
const scale = ({ alpha, r, use_rslora, p: _, ...others }) => {
  refuse(others);
  if (bug === "scale") return alpha;
  return use_rslora ? alpha / Math.sqrt(r) : alpha / r;
};

// y = x Wᵀ + b + s (K∘x) Aᵀ Bᵀ, tokens in rows, and a function for its gradients.
const layer = ({ x, W, A, B, bias, keep, dy: _, ...others }, settings) => {
  refuse(others);
  const s = scale(settings);
  const kept = bug === "no-rescale" ? 1 : 1 / (1 - (settings.p ?? 0));
  const K = (v, i, j) => (keep ? v * keep.at(i, j) * kept : v);
  const base_K = (v, i, j) => (bug === "mask-on-base" ? K(v, i, j) : v);
  const Bt = bug === "layout" ? matrix(B.cols, B.rows, (i, j) => B.data[i * B.rows + j]) : turned(B);
  const masked = map(x, K);
  const H = times(masked, turned(A));
  const y = plus(times(map(x, base_K), turned(W)), scaled(s, times(H, Bt)));
  const back = (dy) => {
    const dH = scaled(s, times(dy, turned(Bt)));
    const dA = times(turned(dH), masked);
    const db = times(matrix(1, dy.rows, () => 1), dy);
    return {
      dx: shaped(plus(map(times(dy, W), base_K), map(times(dH, A), K)), x.shape),
      dA: bug === "dA-unscaled" ? scaled(1 / s, dA) : dA,
      dB: scaled(s, times(turned(dy), H)),
      ...(bias && { dbias: shaped(db, bias.shape) }),
    };
  };
  return [shaped(map(y, (v, _, j) => v + (bias?.data[j] ?? 0)), [...x.shape.slice(0, -1), W.rows]), back];
};

// The contract's methods: tensors and settings to tensors.
const delta = (A, B, s) => scaled(s, times(B, A));
const methods = {
  lora_linear: (t, settings) => ({ y: layer(t, settings)[0] }),
  lora_linear_vjp: (t, settings) => {
    const [y, back] = layer(t, settings);
    return { y, ...back(t.dy) };
  },
  merge: ({ W, A, B, ...others }, settings) => {
    refuse(others);
    return { W_merged: plus(W, delta(A, B, scale(settings))) };
  },
  unmerge: ({ W_merged, A, B, ...others }, settings) => {
    refuse(others);
    return { W: plus(W_merged, delta(A, B, -scale(settings))) };
  },
  combine: (t, { adapters, weights, ...others }) => {
    refuse(others);
    const each = (own, i) => delta(t[`adapters.${i}.A`], t[`adapters.${i}.B`], weights[i] * scale(own));
    return { delta_W: adapters.map(each).reduce(plus) };
  },
};

// safetensors: 8 bytes with the header's length, the header in JSON, the numbers.
const types = { F64: Float64Array, F32: Float32Array, BOOL: Uint8Array };
const read = (path) => {
  const bytes = fs.readFileSync(path);
  const start = 8 + Number(bytes.readBigUInt64LE(0));
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets }] of Object.entries(JSON.parse(bytes.subarray(8, start)))) {
    if (name === "__metadata__") continue;
    const [from, to] = data_offsets.map((offset) => start + offset);
    const data = new types[dtype](Uint8Array.from(bytes.subarray(from, to)).buffer);
    const cols = shape.at(-1) ?? 1;
    tensors[name] = { ...matrix(data.length / cols, cols, (i, j) => data[i * cols + j], shape), dtype };
  }
  return tensors;
};
const write = (path, tensors, dtype) => {
  const header = {}, numbers = [];
  let end = 0;
  for (const [name, { data, shape }] of Object.entries(tensors)) {
    const bytes = Buffer.from(new types[dtype](data).buffer);
    header[name] = { dtype, shape, data_offsets: [end, (end += bytes.length)] };
    numbers.push(bytes);
  }
  const text = Buffer.from(JSON.stringify(header)), length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  fs.writeFileSync(path, Buffer.concat([length, text, ...numbers]));
};

// The protocol: a line of JSON in, a line of JSON out.
const implementation = {
  name: "lora.mjs", version: "1.0", language: "JavaScript",
  methods: Object.keys(methods), dtypes: ["float64", "float32"],
  precision: { float32: { storage: "float32", accumulation: "float64" } },
};
const answer = (message) => {
  if (message.cmd === "start") return { protocol: 1, implementation };
  try {
    const tensors = read(message.in);
    const { dtype } = Object.values(tensors).find((a) => a.dtype !== "BOOL");
    write(message.out, methods[message.method](tensors, message.settings), dtype);
    return { ok: true };
  } catch (error) {
    if (error instanceof Skipped) return { skipped: { reason: error.message } };
    return { error: { message: String(error), traceback: error.stack } };
  }
};
for await (const line of readline.createInterface({ input: process.stdin })) {
  const message = JSON.parse(line);
  if (message.cmd === "stop") break;
  process.stdout.write(JSON.stringify({ seq: message.seq, ...answer(message) }) + "\n");
}
process.exit();
