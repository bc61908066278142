// A driver for `minilora verify --cmd ./lora`, the standard library alone:
//     g++ -std=c++17 -o lora lora.cpp
// The mathematics stands in `scale`, `layer` and `answer`; the rest is the protocol, and serves any.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>
using std::string, std::to_string, std::vector;

string bug;  // one of five mistakes on purpose, named on the command line: see `scale` and `layer`
struct Skipped : std::runtime_error { using runtime_error::runtime_error; };

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
    for (value.text = c; string(",]} ").find(in.peek()) == string::npos && in;) value.text += in.get();
  }
  return value;
}
string quoted(const string& text) {
  string out = "\"";
  for (char c : text) (out += c == '"' || c == '\\' ? "\\" : "") += c;
  return out + '"';
}

// A matrix of float or double; leading axes of the shape are one axis of rows.
template <class T> struct Matrix {
  vector<size_t> shape;
  size_t rows = 1, cols = 1;
  vector<T> data;  // none in a matrix that was not given
  Matrix() = default;
  template <class F> Matrix(vector<size_t> sizes, F at) : shape(sizes), cols(sizes.empty() ? 1 : sizes.back()) {
    for (size_t i = 0; i + 1 < sizes.size(); i++) rows *= sizes[i];
    for (size_t i = 0; i < rows; i++) for (size_t j = 0; j < cols; j++) data.push_back(at(i, j));
  }
  T operator()(size_t i, size_t j) const { return data[i * cols + j]; }
};
template <class T> Matrix<T> turned(const Matrix<T>& a) {
  return {{a.cols, a.rows}, [&](size_t i, size_t j) { return a(j, i); }};
}
template <class T> Matrix<T> times(const Matrix<T>& a, const Matrix<T>& b, T s = 1) {  // s a b
  return {{a.rows, b.cols}, [&](size_t i, size_t j) {
    T sum = 0;
    for (size_t k = 0; k < a.cols; k++) sum += a(i, k) * b(k, j);
    return s * sum;
  }};
}
template <class T> Matrix<T> plus(const Matrix<T>& a, const Matrix<T>& b) {
  return {a.shape, [&](size_t i, size_t j) { return a(i, j) + b(i, j); }};
}

// safetensors: 8 bytes with the header's length, the header in JSON, the numbers.
template <class T> using Tensors = std::map<string, Matrix<T>>;
template <class T> Tensors<T> read(const Json& header, const char* numbers) {
  Tensors<T> tensors;
  for (auto& [name, entry] : header.fields) {
    vector<size_t> shape;
    for (auto& size : entry["shape"].list) shape.push_back(size.number());
    Matrix<T> a(shape, [](size_t, size_t) { return 0; });
    const char* from = numbers + size_t(entry["data_offsets"].list[0].number());
    if (entry["dtype"].text == "BOOL") a.data.assign(from, from + a.data.size());
    else std::memcpy(a.data.data(), from, a.data.size() * sizeof(T));
    tensors[name] = a;
  }
  return tensors;
}
template <class T> void write(const string& path, const Tensors<T>& tensors) {
  string header, data;
  for (auto& [name, a] : tensors) {
    string shape, from = to_string(data.size());
    for (size_t size : a.shape) shape += (shape.empty() ? "" : ",") + to_string(size);
    data.append(reinterpret_cast<const char*>(a.data.data()), a.data.size() * sizeof(T));
    header += (header.empty() ? "{" : ",") + quoted(name) + ":{\"dtype\":\"F" + to_string(8 * sizeof(T)) +
      "\",\"shape\":[" + shape + "],\"data_offsets\":[" + from + "," + to_string(data.size()) + "]}";
  }
  const uint64_t length = (header += "}").size();
  std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(&length), 8) << header << data;
}

// What a setting or a tensor asks for that is not implemented here is skipped, and never ignored.
bool asked(const Json& setting) { return setting.text != "false"; }
template <class T> bool asked(const Matrix<T>&) { return true; }
template <class Named> void refuse(const Named& given, const string& known) {
  for (auto& [name, value] : given)
    if (known.find(" " + name + " ") == string::npos && asked(value))
      throw Skipped(name + " is not implemented");
}

// The factor alpha / r, or alpha / √r.
double scale(const Json& settings) {
  refuse(settings.fields, " alpha r p use_rslora ");
  const double alpha = settings["alpha"].number(), r = settings["r"].number();
  if (bug == "scale") return alpha;
  return settings["use_rslora"].text == "true" ? alpha / std::sqrt(r) : alpha / r;
}

// y = x Wᵀ + b + s (K∘x) Aᵀ Bᵀ, tokens in rows, and its gradients where there is a dy.
template <class T> Tensors<T> layer(Tensors<T>& t, const Json& settings) {
  refuse(t, " x W A B bias dy keep ");
  const Matrix<T> &x = t["x"], &W = t["W"], &A = t["A"], &B = t["B"], &bias = t["bias"], &dy = t["dy"];
  const T s = scale(settings), kept = bug == "no-rescale" ? 1 : 1 / (1 - settings["p"].number());
  const auto K = [&](const Matrix<T>& a, bool drops = true) -> Matrix<T> {
    const Matrix<T>& keep = t["keep"];
    return {x.shape, [&](size_t i, size_t j) {
      return drops && !keep.data.empty() ? a(i, j) * keep(i, j) * kept : a(i, j);
    }};
  };
  const bool on_base = bug == "mask-on-base";
  Matrix<T> Bt = turned(B);
  if (bug == "layout") Bt.data = B.data;
  const Matrix<T> H = times(K(x), turned(A)), y = plus(times(K(x, on_base), turned(W)), times(H, Bt, s));
  vector<size_t> shape = x.shape;
  shape.back() = W.rows;
  Tensors<T> out;
  out["y"] = {shape, [&](size_t i, size_t j) { return y(i, j) + (bias.data.empty() ? 0 : bias.data[j]); }};
  if (dy.shape.empty()) return out;
  const Matrix<T> dH = times(dy, turned(Bt), s), ones({1, dy.rows}, [](size_t, size_t) { return 1; });
  out["dx"] = plus(K(times(dy, W), on_base), K(times(dH, A)));
  out["dA"] = times(turned(dH), K(x), bug == "dA-unscaled" ? 1 / s : T(1));
  out["dB"] = times(turned(dy), H, s);
  if (!bias.data.empty()) (out["dbias"] = times(ones, dy)).shape = bias.shape;
  return out;
}

// The contract's methods: tensors and settings to tensors.
template <class T> Tensors<T> answer(const string& method, Tensors<T> t, const Json& settings) {
  if (method == "merge" || method == "unmerge") {
    refuse(t, " W W_merged A B ");
    const bool in = method == "merge";
    const T s = in ? scale(settings) : -scale(settings);
    return {{in ? "W_merged" : "W", plus(t[in ? "W" : "W_merged"], times(t["B"], t["A"], s))}};
  }
  if (method != "combine") return layer(t, settings);
  refuse(settings.fields, " adapters weights ");
  Matrix<T> delta;
  for (size_t i = 0; i < settings["adapters"].list.size(); i++) {
    const string name = "adapters." + to_string(i);
    const T s = settings["weights"].list[i].number() * scale(settings["adapters"].list[i]);
    const Matrix<T> own = times(t[name + ".B"], t[name + ".A"], s);
    delta = i ? plus(delta, own) : own;
  }
  return {{"delta_W", delta}};
}
void run(const Json& message) {
  std::ifstream file(message["in"].text, std::ios::binary);
  const string bytes((std::istreambuf_iterator<char>(file)), {});
  uint64_t length;
  std::memcpy(&length, bytes.data(), 8);
  std::istringstream text(bytes.substr(8, length));
  const Json header = parse(text), settings = message["settings"];
  const string method = message["method"].text, out = message["out"].text;
  const char* numbers = bytes.data() + 8 + length;
  bool doubles = false;
  for (auto& [name, entry] : header.fields) doubles |= entry["dtype"].text == "F64";
  if (doubles) write(out, answer(method, read<double>(header, numbers), settings));
  else write(out, answer(method, read<float>(header, numbers), settings));
}

// The protocol: a line of JSON in, a line of JSON out.
int main(int count, char** words) {
  if (count > 1) bug = words[1];
  for (string line; std::getline(std::cin, line);) {
    std::istringstream text(line);
    const Json message = parse(text);
    string says = "\"ok\":true";
    if (message["cmd"].text == "stop") break;
    if (message["cmd"].text == "start")
      says = R"("protocol":1,"implementation":{"name":"lora.cpp","version":"1.0","language":"C++",)"
             R"("methods":["lora_linear","lora_linear_vjp","merge","unmerge","combine"],)"
             R"("dtypes":["float64","float32"]})";
    else try { run(message); }
    catch (const Skipped& skipped) { says = "\"skipped\":{\"reason\":" + quoted(skipped.what()) + "}"; }
    catch (const std::exception& error) { says = "\"error\":{\"message\":" + quoted(error.what()) + "}"; }
    std::cout << "{\"seq\":" << message["seq"].text << "," << says << "}" << std::endl;  // flushed
  }
}
