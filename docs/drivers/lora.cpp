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
using std::string;

string bug;  // one of five mistakes on purpose, named on the command line: see `scale` and `layer`
struct Skipped : std::runtime_error { using std::runtime_error::runtime_error; };

// JSON: a value is a text (a string, a number or a word), a list or an object.
struct Json { string text; std::vector<Json> list; std::map<string, Json> fields; };
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
    while ((c = in.get()) != '"' && in) value.text += c == '\\' ? in.get() : c;  // \" and \\ alone
  } else {
    for (value.text = c; string(",]} ").find(in.peek()) == string::npos && in;) value.text += in.get();
  }
  return value;
}
string quoted(const string& text) {
  string out = "\"";
  for (char c : text) { if (c == '"' || c == '\\') out += '\\'; out += c; }
  return out + '"';
}

// A matrix of float or double, with the shape that it has in its file: leading axes are rows.
template <class T> struct Matrix {
  std::vector<size_t> shape;
  size_t rows = 1, cols = 1;
  std::vector<T> data;
  Matrix() = default;  // one that is not given has no data
  Matrix(std::vector<size_t> sizes) : shape(sizes), cols(sizes.empty() ? 1 : sizes.back()) {
    for (size_t i = 0; i + 1 < sizes.size(); i++) rows *= sizes[i];
    data.resize(rows * cols);
  }
  T operator()(size_t i, size_t j) const { return data[i * cols + j]; }
};
template <class T, class F> Matrix<T> matrix(std::vector<size_t> shape, F at) {
  Matrix<T> out(shape);
  for (size_t i = 0; i < out.rows; i++) for (size_t j = 0; j < out.cols; j++) out.data[i * out.cols + j] = at(i, j);
  return out;
}
template <class T> Matrix<T> turned(const Matrix<T>& a) {
  return matrix<T>({a.cols, a.rows}, [&](size_t i, size_t j) { return a(j, i); });
}
template <class T> Matrix<T> times(const Matrix<T>& a, const Matrix<T>& b, T s = 1) {  // s a b
  return matrix<T>({a.rows, b.cols}, [&](size_t i, size_t j) {
    T sum = 0;
    for (size_t k = 0; k < a.cols; k++) sum += a(i, k) * b(k, j);
    return s * sum;
  });
}

// safetensors: 8 bytes with the header's length, the header in JSON, the numbers.
template <class T> using Tensors = std::map<string, Matrix<T>>;
template <class T> Tensors<T> read(const Json& header, const char* numbers) {
  Tensors<T> tensors;
  for (auto& [name, entry] : header.fields) {
    std::vector<size_t> shape;
    for (auto& size : entry.fields.at("shape").list) shape.push_back(std::stoull(size.text));
    Matrix<T> a(shape);
    const char* from = numbers + std::stoull(entry.fields.at("data_offsets").list[0].text);
    if (entry.fields.at("dtype").text == "BOOL") a.data.assign(from, from + a.data.size());
    else std::memcpy(a.data.data(), from, a.data.size() * sizeof(T));
    tensors[name] = a;
  }
  return tensors;
}
template <class T> void write(const string& path, const Tensors<T>& tensors) {
  std::ostringstream header;
  string data;
  for (auto& [name, a] : tensors) {
    header << (data.empty() ? '{' : ',') << quoted(name) << ":{\"dtype\":\"F" << 8 * sizeof(T) << "\",\"shape\":[";
    for (size_t i = 0; i < a.shape.size(); i++) header << (i ? "," : "") << a.shape[i];
    header << "],\"data_offsets\":[" << data.size();
    data.append(reinterpret_cast<const char*>(a.data.data()), a.data.size() * sizeof(T));
    header << "," << data.size() << "]}";
  }
  uint64_t length = header.str().size() + 1;
  std::ofstream out(path, std::ios::binary);
  out.write(reinterpret_cast<char*>(&length), 8) << header.str() << '}' << data;
}

// The factor alpha / r, or alpha / √r; what else is asked for is not supported here.
double scale(std::map<string, Json>& settings) {
  for (auto& [name, value] : settings)
    if (name != "alpha" && name != "r" && name != "p" && name != "use_rslora" && value.text != "false")
      throw Skipped(name + " is not implemented");
  double alpha = std::stod(settings["alpha"].text), r = std::stod(settings["r"].text);
  if (bug == "scale") return alpha;
  return settings["use_rslora"].text == "true" ? alpha / std::sqrt(r) : alpha / r;
}

// y = x Wᵀ + b + s (K∘x) Aᵀ Bᵀ, tokens in rows, and its gradients where there is a dy.
template <class T> Tensors<T> layer(Tensors<T>& t, std::map<string, Json>& settings) {
  const Matrix<T>&x = t["x"], &W = t["W"], &A = t["A"], &B = t["B"], &bias = t["bias"], &keep = t["keep"], &dy = t["dy"];
  const T s = scale(settings), kept = bug == "no-rescale" ? 1 : 1 / (1 - std::stod("0" + settings["p"].text));
  auto K = [&](size_t i, size_t j) { return keep.data.empty() ? T(1) : keep(i, j) * kept; };
  auto base_K = [&](size_t i, size_t j) { return bug == "mask-on-base" ? K(i, j) : T(1); };
  auto masked = matrix<T>({x.rows, x.cols}, [&](size_t i, size_t j) { return x(i, j) * K(i, j); });
  auto base_x = matrix<T>({x.rows, x.cols}, [&](size_t i, size_t j) { return x(i, j) * base_K(i, j); });
  auto Bt = turned(B);
  if (bug == "layout") Bt.data = B.data;
  auto H = times(masked, turned(A)), base = times(base_x, turned(W)), branch = times(H, Bt, s);
  auto shape = x.shape;
  if (!shape.empty()) shape.back() = W.rows;
  Tensors<T> out{{"y", matrix<T>(shape, [&](size_t i, size_t j) {
    return base(i, j) + (bias.data.empty() ? 0 : bias.data[j]) + branch(i, j);
  })}};
  if (dy.data.empty()) return out;
  auto dH = times(dy, turned(Bt), s), through = times(dy, W), branch_dx = times(dH, A);
  out["dx"] = matrix<T>(x.shape, [&](size_t i, size_t j) { return through(i, j) * base_K(i, j) + branch_dx(i, j) * K(i, j); });
  out["dA"] = times(turned(dH), masked, bug == "dA-unscaled" ? 1 / s : T(1));
  out["dB"] = times(turned(dy), H, s);
  auto ones = matrix<T>({1, dy.rows}, [](size_t, size_t) { return 1; });
  if (!bias.data.empty()) (out["dbias"] = times(ones, dy)).shape = bias.shape;
  return out;
}
template <class T> Tensors<T> answer(const string& method, Tensors<T> t, std::map<string, Json>& settings) {
  if (method.rfind("lora_linear", 0) == 0) return layer(t, settings);
  const bool there = method == "merge";
  const Matrix<T>& W = t[there ? "W" : "W_merged"];
  auto delta = times(t["B"], t["A"], T(there ? scale(settings) : -scale(settings)));
  return {{there ? "W_merged" : "W", matrix<T>(W.shape, [&](size_t i, size_t j) { return W(i, j) + delta(i, j); })}};
}

void run(std::map<string, Json>& message) {
  std::ifstream file(message["in"].text, std::ios::binary);
  const string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  uint64_t length;
  std::memcpy(&length, bytes.data(), 8);
  std::istringstream text(bytes.substr(8, length));
  const Json header = parse(text);
  const string method = message["method"].text, out = message["out"].text;
  const char* numbers = bytes.data() + 8 + length;
  auto& settings = message["settings"].fields;
  if (header.fields.at("A").fields.at("dtype").text == "F64") write(out, answer(method, read<double>(header, numbers), settings));
  else write(out, answer(method, read<float>(header, numbers), settings));
}

int main(int count, char** words) {
  if (count > 1) bug = words[1];
  for (string line; std::getline(std::cin, line);) {
    std::istringstream text(line);
    auto message = parse(text).fields;
    if (message["cmd"].text == "stop") break;
    string says = "\"ok\":true";
    try {
      if (message["cmd"].text == "start")
        says = R"("protocol":1,"implementation":{"name":"lora.cpp","version":"1.0","language":"C++","dtypes":
          ["float64","float32"],"methods":["lora_linear","lora_linear_vjp","merge","unmerge"]})";
      else run(message);
    } catch (const Skipped& skipped) {
      says = "\"skipped\":{\"reason\":" + quoted(skipped.what()) + "}";
    } catch (const std::exception& error) {
      says = "\"error\":{\"message\":" + quoted(error.what()) + "}";
    }
    for (char& c : says) if (c == '\n') c = ' ';
    std::cout << "{\"seq\":" << message["seq"].text << "," << says << "}" << std::endl;  // endl flushes
  }
}
