// Judges a `lora_linear` by vectors, with the standard library alone:
//     g++ -std=c++17 -o consumer consumer.cpp && ./consumer DIR
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <sstream>
#include <string>
#include <vector>
using std::string, std::vector;
using Numbers = vector<double>;

// What is judged: put yours here. Arrays are flat, tokens one after another; one not given is empty.
Numbers lora_linear(const Numbers& x, const Numbers& W, const Numbers& A, const Numbers& B, const Numbers& bias,
                    const Numbers& keep, double alpha, size_t r, double p, bool use_rslora) {
  const size_t n = A.size() / r, m = B.size() / r, tokens = x.size() / n;
  const double s = alpha / (use_rslora ? std::sqrt(r) : r);
  Numbers y(tokens * m);
  for (size_t t = 0; t < tokens; t++) {
    Numbers u(r);
    for (size_t k = 0; k < r; k++)
      for (size_t i = 0; i < n; i++)
        u[k] += x[t * n + i] * (keep.empty() ? 1 : keep[t * n + i] / (1 - p)) * A[k * n + i];
    for (size_t j = 0; j < m; j++) {
      double base = bias.empty() ? 0 : bias[j], branch = 0;
      for (size_t i = 0; i < n; i++) base += x[t * n + i] * W[j * n + i];
      for (size_t k = 0; k < r; k++) branch += u[k] * B[j * r + k];
      y[t * m + j] = base + s * branch;
    }
  }
  return y;
}

// JSON: a value is a text (a string, a number or a word), a list or an object.
struct Json {
  string text;
  vector<Json> list;
  std::map<string, Json> fields;
  Json operator[](const string& key) const { return fields.count(key) ? fields.at(key) : Json(); }
  double number(double otherwise = 0) const { return text.empty() ? otherwise : std::stod(text); }
};
Json parse(std::istream& in) {
  Json value;
  char c = (in >> std::ws).get();
  if (c == '{' || c == '[') {
    for (int next; (next = (in >> std::ws).peek()) != '}' && next != ']' && in;) {
      if (next == ',') in.get();
      if (c == '[') { value.list.push_back(parse(in)); continue; }
      string key = parse(in).text;
      (in >> std::ws).get();  // the colon
      value.fields[key] = parse(in);
    }
    in.get();
  } else if (c == '"') {
    while ((c = in.get()) != '"' && in) value.text += c == '\\' ? in.get() : c;
  } else {
    for (value.text = c; string(",]} \n").find(in.peek()) == string::npos && in;) value.text += in.get();
  }
  return value;
}

// safetensors: 8 bytes with the header's length, the header in JSON, the numbers.
struct Tensors {
  string bytes;
  Json header;
  size_t start = 0;
  explicit Tensors(const string& path) {
    std::ifstream file(path, std::ios::binary);
    bytes.assign(std::istreambuf_iterator<char>(file), {});
    uint64_t length;
    std::memcpy(&length, bytes.data(), 8);
    start = 8 + length;
    std::istringstream text(bytes.substr(8, length));
    header = parse(text);
  }
  template <class T> Numbers as(size_t from, size_t to) const {
    vector<T> values((to - from) / sizeof(T));
    std::memcpy(values.data(), bytes.data() + start + from, to - from);
    return Numbers(values.begin(), values.end());
  }
  Numbers operator[](const string& name) const {
    const Json entry = header[name];
    if (entry.fields.empty()) return {};
    const string dtype = entry["dtype"].text;
    const size_t from = entry["data_offsets"].list[0].number(), to = entry["data_offsets"].list[1].number();
    if (dtype == "F32") return as<float>(from, to);
    if (dtype == "BOOL") return as<uint8_t>(from, to);
    return as<double>(from, to);
  }
};

int main(int, char** words) {
  const string folder = words[1];
  const Tensors tensors(folder + "/linear.safetensors");
  std::ifstream file(folder + "/manifest.json");
  int holds = 0, count = 0;
  for (const Json& v : parse(file)["vectors"].list) {
    if (v["level"].text != "linear" || v["method"].text != "lora_linear" || v["result"].text != "valid") continue;
    const string id = v["id"].text;
    const Json settings = v["settings"], limit = v["outputs"]["y"];
    const auto in = [&](const string& name) { return tensors[id + ".in." + name]; };
    const Numbers y = lora_linear(in("x"), in("W"), in("A"), in("B"), in("bias"), in("keep"),
                                  settings["alpha"].number(), settings["r"].number(),
                                  settings["p"].number(), settings["use_rslora"].text == "true");
    const Numbers want = tensors[id + ".out.y"], sigma = tensors[id + ".sigma.float64.y"];
    double greatest = 0, squares = 0;
    bool ok = y.size() == want.size();
    for (size_t i = 0; ok && i < y.size(); i++) {
      const double s = sigma.empty() ? 0 : sigma[i], z = y[i] == want[i] ? 0 : std::abs(y[i] - want[i]) / s;
      ok = !std::isnan(z);
      greatest = std::max(greatest, z);
      squares += z * z;
    }
    ok = ok && greatest <= limit["max_z"].number() && std::sqrt(squares / y.size()) <= limit["rms_z"].number();
    count++;
    holds += ok;
    if (!ok) std::cerr << id << "\n";
  }
  std::cout << holds << " of " << count << " hold\n";
  return holds != count;
}
