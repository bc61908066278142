// Judges a `lora_linear` by vectors, without crates: rustc -O --edition 2021 consumer.rs && ./consumer DIR
use std::collections::BTreeMap;
use std::{env, fs, process};

// What is judged: put yours here. Arrays are flat, tokens one after another; one not given is empty.
struct Layer {
    x: Vec<f64>,
    w: Vec<f64>,
    a: Vec<f64>,
    b: Vec<f64>,
    bias: Vec<f64>,
    keep: Vec<f64>,
    alpha: f64,
    r: usize,
    p: f64,
    use_rslora: bool,
}

fn lora_linear(l: &Layer) -> Vec<f64> {
    let (n, m, r) = (l.a.len() / l.r, l.b.len() / l.r, l.r as f64);
    let s = l.alpha / if l.use_rslora { r.sqrt() } else { r };
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(u, v)| u * v).sum::<f64>();
    let mut y = Vec::new();
    for (t, x) in l.x.chunks(n).enumerate() {
        let mut kept = x.to_vec();
        if !l.keep.is_empty() {
            kept.iter_mut().zip(&l.keep[t * n..]).for_each(|(v, k)| *v *= k / (1.0 - l.p));
        }
        let u: Vec<f64> = l.a.chunks(n).map(|row| dot(&kept, row)).collect();
        for j in 0..m {
            let base = dot(x, &l.w[j * n..][..n]) + l.bias.get(j).unwrap_or(&0.0);
            y.push(base + s * dot(&u, &l.b[j * l.r..][..l.r]));
        }
    }
    y
}

// JSON: a value is a text (a string, a number or a word), a list or an object.
#[derive(Clone, Default)]
struct Json {
    text: String,
    list: Vec<Json>,
    fields: BTreeMap<String, Json>,
}

impl Json {
    fn get(&self, key: &str) -> Json {
        self.fields.get(key).cloned().unwrap_or_default()
    }
    fn number(&self) -> f64 {
        self.text.parse().unwrap_or(0.0)
    }
}

fn blanks(bytes: &[u8], at: &mut usize) -> u8 {
    while bytes[*at].is_ascii_whitespace() || bytes[*at] == b',' || bytes[*at] == b':' {
        *at += 1;
    }
    bytes[*at]
}

fn parse(bytes: &[u8], at: &mut usize) -> Json {
    let mut value = Json::default();
    let first = blanks(bytes, at);
    if first == b'{' || first == b'[' {
        *at += 1;
        while !b"]}".contains(&blanks(bytes, at)) {
            let key = if first == b'{' { parse(bytes, at).text } else { String::new() };
            let entry = parse(bytes, at);
            if first == b'{' {
                value.fields.insert(key, entry);
            } else {
                value.list.push(entry);
            }
        }
        *at += 1;
    } else if first == b'"' {
        *at += 1;
        while bytes[*at] != b'"' {
            *at += (bytes[*at] == b'\\') as usize;
            value.text.push(bytes[*at] as char);
            *at += 1;
        }
        *at += 1;
    } else {
        while *at < bytes.len() && !b",]} \n".contains(&bytes[*at]) {
            value.text.push(bytes[*at] as char);
            *at += 1;
        }
    }
    value
}

// safetensors: 8 bytes with the header's length, the header in JSON, the numbers.
struct Tensors {
    header: Json,
    numbers: Vec<u8>,
}

impl Tensors {
    fn open(path: &str) -> Tensors {
        let bytes = fs::read(path).expect(path);
        let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        Tensors { header: parse(&bytes[8..start], &mut 0), numbers: bytes[start..].to_vec() }
    }
    fn get(&self, name: &str) -> Vec<f64> {
        let entry = self.header.get(name);
        let ends: Vec<usize> = entry.get("data_offsets").list.iter().map(|e| e.number() as usize).collect();
        if ends.is_empty() {
            return Vec::new();
        }
        let data = &self.numbers[ends[0]..ends[1]];
        match entry.get("dtype").text.as_str() {
            "F32" => data.chunks(4).map(|c| f32::from_le_bytes(c.try_into().unwrap()) as f64).collect(),
            "BOOL" => data.iter().map(|&byte| byte as f64).collect(),
            _ => data.chunks(8).map(|c| f64::from_le_bytes(c.try_into().unwrap())).collect(),
        }
    }
}

fn main() {
    let folder = env::args().nth(1).expect("the folder of the vectors");
    let tensors = Tensors::open(&format!("{folder}/linear.safetensors"));
    let manifest = parse(&fs::read(format!("{folder}/manifest.json")).unwrap(), &mut 0);
    let (mut holds, mut count) = (0, 0);
    for v in manifest.get("vectors").list {
        let is = |key: &str, value: &str| v.get(key).text == value;
        if !(is("level", "linear") && is("method", "lora_linear") && is("result", "valid")) {
            continue;
        }
        let (id, settings, limit) = (v.get("id").text, v.get("settings"), v.get("outputs").get("y"));
        let input = |name: &str| tensors.get(&format!("{id}.in.{name}"));
        let y = lora_linear(&Layer {
            x: input("x"),
            w: input("W"),
            a: input("A"),
            b: input("B"),
            bias: input("bias"),
            keep: input("keep"),
            alpha: settings.get("alpha").number(),
            r: settings.get("r").number() as usize,
            p: settings.get("p").number(),
            use_rslora: settings.get("use_rslora").text == "true",
        });
        let want = tensors.get(&format!("{id}.out.y"));
        let mut sigma = tensors.get(&format!("{id}.sigma.float64.y"));
        sigma.resize(want.len(), 0.0);
        let off = |i: usize| if y[i] == want[i] { 0.0 } else { (y[i] - want[i]).abs() / sigma[i] };
        let z: Vec<f64> = (0..y.len()).map(off).collect();
        let rms = (z.iter().map(|e| e * e).sum::<f64>() / z.len() as f64).sqrt();
        let within = z.iter().all(|&e| e <= limit.get("max_z").number()); // NaN is not
        count += 1;
        if y.len() == want.len() && within && rms <= limit.get("rms_z").number() {
            holds += 1;
        } else {
            eprintln!("{id}");
        }
    }
    println!("{holds} of {count} hold");
    process::exit((holds != count) as i32);
}
