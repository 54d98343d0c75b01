// `tessera tensors`: what a model file holds.
#include <fmt/format.h>

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "command.h"
#include "core/convert.h"
#include "core/error.h"
#include "io/gguf.h"
#include "io/safetensors.h"

namespace tessera::cli {

namespace {

struct Options {
  std::string file;
  std::string out;
  bool json = false;
};

/// A tensor of either format.
struct Row {
  std::string name;
  std::string type;
  std::vector<std::int64_t> shape;
  std::size_t bytes;
};

void print_rows(const std::vector<Row>& rows, bool json) {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  std::size_t all = 0;
  for (const Row& row : rows) {
    all += row.bytes;
    if (json) {
      list.push_back({{"name", row.name}, {"type", row.type}, {"shape", row.shape}, {"bytes", row.bytes}});
    } else {
      fmt::print("{}  {}  [{}]  {} bytes\n", row.name, row.type, fmt::join(row.shape, ", "), row.bytes);
    }
  }
  if (json) {
    print_json({{"tensors", list}, {"bytes", all}});
  } else {
    fmt::print("{} tensors, {:.1f} MB\n", rows.size(), static_cast<double>(all) / 1e6);
  }
}

/// Widens every tensor of a file into a safetensors file. `widen(name, numbers)` fills them.
template <class Widen>
void write_floats(const std::vector<Row>& rows, const std::string& path, const Widen& widen) {
  std::vector<std::vector<float>> numbers;
  std::vector<NamedTensor> tensors;
  numbers.reserve(rows.size());
  for (const Row& row : rows) {
    std::size_t elements = 1;
    for (const std::int64_t size : row.shape) elements *= static_cast<std::size_t>(size);
    numbers.emplace_back(elements);
    widen(row.name, numbers.back());
    tensors.push_back(named_tensor<float>(row.name, DType::f32, row.shape, numbers.back()));
  }
  write_safetensors(path, tensors);
}

void run_gguf(const Options& options) {
  const GgufFile file = GgufFile::open(options.file);
  std::vector<Row> rows;
  for (const auto& [name, tensor] : file.tensors()) {
    rows.push_back({name, name_of(tensor.type), tensor.shape, tensor.bytes});
  }
  if (options.out.empty()) return print_rows(rows, options.json);
  write_floats(rows, options.out, [&](const std::string& name, std::vector<float>& numbers) {
    const GgufTensor& tensor = file.tensor(name);
    dequantise(tensor.type, file.bytes(tensor).data(), std::ssize(numbers), numbers.data());
  });
}

void run_safetensors(const Options& options) {
  const SafetensorsFile file = SafetensorsFile::open(options.file);
  std::vector<Row> rows;
  for (const std::string& name : file.names()) {
    rows.push_back({name, file.info(name).dtype_name, file.info(name).shape, file.bytes(name).size()});
  }
  if (options.out.empty()) return print_rows(rows, options.json);
  write_floats(rows, options.out, [&](const std::string& name, std::vector<float>& numbers) {
    const TensorInfo& info = file.info(name);
    require(is_attention_dtype(info.dtype), "{}: tensor '{}' has dtype {}; expected F32, BF16 or F16", file.name(),
            name, info.dtype_name);
    to_float(file.bytes(name).data(), info.dtype, std::ssize(numbers), numbers.data());
  });
}

void run_tensors(const Options& options) {
  if (options.file.ends_with(".gguf")) {
    run_gguf(options);
  } else {
    run_safetensors(options);
  }
}

}  // namespace

void add_tensors(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command = add_command(app, "tensors", "List the tensors of a model file, or widen them to float32",
                                  "tessera tensors models/tessera-bytes/model.safetensors");
  command->add_option("FILE", options->file, "*.gguf or *.safetensors")->required();
  command->add_option("--out", options->out, "Write all tensors as float32 into this safetensors file");
  add_json_option(*command, options->json);
  command->callback([options] { run_tensors(*options); });
}

}  // namespace tessera::cli
