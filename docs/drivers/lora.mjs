// A driver for `minilora verify --cmd "node lora.mjs"`: Node alone, no package.
// The mathematics stands in `methods`; the rest is the protocol, and serves any implementation.
import fs from "node:fs";
import readline from "node:readline";

const bug = process.argv[2]; // one of five mistakes on purpose: see `methods`

// Matrices: { rows, cols, at(i, j) }. Numbers are computed in float64 and rounded when stored.
const matrix = (rows, cols, at) => {
  const data = new Float64Array(rows * cols);
  for (let i = 0; i < rows; i++) for (let j = 0; j < cols; j++) data[i * cols + j] = at(i, j);
  return { rows, cols, at: (i, j) => data[i * cols + j], data };
};
const turned = (a) => matrix(a.cols, a.rows, (i, j) => a.at(j, i));
const times = (a, b) => matrix(a.rows, b.cols, (i, j) => {
  let sum = 0;
  for (let k = 0; k < a.cols; k++) sum += a.at(i, k) * b.at(k, j);
  return sum;
});
const map = (a, f) => matrix(a.rows, a.cols, (i, j) => f(a.at(i, j), i, j));
const plus = (a, b) => map(a, (v, i, j) => v + b.at(i, j));
const scaled = (s, a) => map(a, (v) => s * v);

// The factor alpha / r, or alpha / √r; what else is asked for is not supported here.
const scale = ({ alpha, r, use_rslora = false, p: _, ...others }) => {
  for (const name of Object.keys(others)) if (others[name]) throw { skipped: name };
  if (bug === "scale") return alpha;
  return use_rslora ? alpha / Math.sqrt(r) : alpha / r;
};

// y = x Wᵀ + b + s (K∘x) Aᵀ Bᵀ, tokens in rows, and a function for its gradients.
const layer = ({ x, W, A, B, bias, keep }, settings) => {
  const s = scale(settings);
  const kept = bug === "no-rescale" ? 1 : 1 / (1 - (settings.p ?? 0));
  const K = map(x, (_, i, j) => (keep ? keep.at(i, j) * kept : 1));
  const masked = map(x, (v, i, j) => v * K.at(i, j));
  const Bt = bug === "layout" ? matrix(B.cols, B.rows, (i, j) => B.data[i * B.rows + j]) : turned(B);
  const H = times(masked, turned(A));
  const base = times(bug === "mask-on-base" ? masked : x, turned(W));
  const y = map(plus(base, scaled(s, times(H, Bt))), (v, _, j) => v + (bias ? bias.at(0, j) : 0));
  const back = (dy) => {
    const dH = scaled(s, times(dy, turned(Bt)));
    const branch = map(times(dH, A), (v, i, j) => v * K.at(i, j));
    const through = map(times(dy, W), (v, i, j) => (bug === "mask-on-base" ? v * K.at(i, j) : v));
    const dA = times(turned(dH), masked);
    return {
      dx: plus(through, branch),
      dA: bug === "dA-unscaled" ? scaled(1 / s, dA) : dA,
      dB: scaled(s, times(turned(dy), H)),
      ...(bias && { dbias: matrix(1, dy.cols, (_, j) => times(matrix(1, dy.rows, () => 1), dy).at(0, j)) }),
    };
  };
  return { y, back };
};

const merged = (W, { A, B }, settings, sign) => plus(W, scaled(sign * scale(settings), times(B, A)));
const methods = {
  lora_linear: (t, settings) => ({ y: layer(t, settings).y }),
  lora_linear_vjp: (t, settings) => {
    const { y, back } = layer(t, settings);
    return { y, ...back(t.dy) };
  },
  merge: (t, settings) => ({ W_merged: merged(t.W, t, settings, 1) }),
  unmerge: (t, settings) => ({ W: merged(t.W_merged, t, settings, -1) }),
};
const shapes = (t) => ({ // of the answers, by the tensors that came in
  y: [...(t.x?.shape ?? []).slice(0, -1), t.W?.rows], dx: t.x?.shape, dA: t.A?.shape, dB: t.B?.shape,
  dbias: [t.W?.rows], W_merged: t.W?.shape, W: t.W_merged?.shape,
});

// safetensors: 8 bytes with the header's length, the header in JSON, the numbers.
const types = { F64: Float64Array, F32: Float32Array, BOOL: Uint8Array };
const read = (path) => {
  const bytes = fs.readFileSync(path);
  const start = 8 + Number(bytes.readBigUInt64LE(0));
  const tensors = {};
  for (const [name, entry] of Object.entries(JSON.parse(bytes.subarray(8, start)))) {
    if (name === "__metadata__") continue;
    const [from, to] = entry.data_offsets;
    const data = new types[entry.dtype](new Uint8Array(bytes.subarray(start + from, start + to)).buffer);
    const cols = entry.shape.at(-1) ?? 1; // leading axes are one axis of rows
    const a = matrix(data.length / cols, cols, (i, j) => data[i * cols + j]);
    tensors[name] = Object.assign(a, { shape: entry.shape, dtype: entry.dtype });
  }
  return tensors;
};
const write = (path, tensors, dtype, shape) => {
  const header = {}, parts = [];
  let offset = 0;
  for (const [name, a] of Object.entries(tensors)) {
    const data = Buffer.from(new types[dtype](a.data).buffer);
    header[name] = { dtype, shape: shape[name], data_offsets: [offset, (offset += data.length)] };
    parts.push(data);
  }
  const text = Buffer.from(JSON.stringify(header)), length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  fs.writeFileSync(path, Buffer.concat([length, text, ...parts]));
};

const implementation = {
  name: "lora.mjs", version: "1.0", language: "JavaScript",
  methods: Object.keys(methods), dtypes: ["float64", "float32"],
  precision: { float32: { storage: "float32", accumulation: "float64" } },
};
const run = (message) => {
  const tensors = read(message.in);
  const answer = methods[message.method](tensors, message.settings);
  write(message.out, answer, tensors.A.dtype, shapes(tensors));
  return { ok: true };
};
for await (const line of readline.createInterface({ input: process.stdin })) {
  const message = JSON.parse(line);
  if (message.cmd === "stop") break;
  let answer;
  try {
    answer = message.cmd === "start" ? { protocol: 1, implementation } : run(message);
  } catch (error) {
    answer = error.skipped
      ? { skipped: { reason: `${error.skipped} is not implemented` } }
      : { error: { message: String(error), traceback: error.stack } };
  }
  process.stdout.write(JSON.stringify({ seq: message.seq, ...answer }) + "\n");
}
process.exit(0);
