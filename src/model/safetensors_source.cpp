#include "model/safetensors_source.h"

#include <algorithm>
#include <map>
#include <set>

#include "core/convert.h"
#include "core/error.h"
#include "io/json.h"
#include "io/safetensors.h"
#include "model/weight_memory.h"

namespace tessera::model {

namespace {

constexpr std::string_view kSingleFile = "model.safetensors";
constexpr std::string_view kIndexFile = "model.safetensors.index.json";

/// The tensors of one or several files by name.
class SafetensorsSource final : public TensorSource {
 public:
  SafetensorsSource(const std::filesystem::path& folder, const LoadOptions& options) {
    std::error_code ignored;
    if (std::filesystem::exists(folder / kSingleFile, ignored)) {
      add({folder / kSingleFile}, options);
      place_ = (folder / kSingleFile).string();
      return;
    }
    const auto path = folder / kIndexFile;
    require(std::filesystem::exists(path, ignored), "{}: there is neither {} nor {}", folder.string(), kSingleFile,
            kIndexFile);
    place_ = path.string();
    const Json map = get<Json>(parse_json_file(path), "weight_map", place_);
    require(map.is_object(), "{}: 'weight_map' is no object", place_);
    std::set<std::filesystem::path> shards;
    for (const auto& [tensor, file] : map.items()) {
      const auto shard = get<std::string>(map, tensor, place_);
      require(!shard.empty() && shard.find('/') == std::string::npos && shard.find('\0') == std::string::npos,
              "{}: tensor '{}' lies in '{}'; expected the name of a file in the same folder", place_, tensor, shard);
      shards.insert(folder / shard);
    }
    add({shards.begin(), shards.end()}, options);
    for (const auto& [tensor, file] : map.items()) {
      const auto found = by_name_.find(tensor);
      const std::string expected = (folder / file.get<std::string>()).string();
      require(found != by_name_.end() && files_[found->second].name() == expected,
              "{}: tensor '{}' is not in {} as 'weight_map' says", place_, tensor, expected);
    }
  }

  bool has(const std::string& tensor) const override { return by_name_.contains(tensor); }

  std::unique_ptr<Matrix> matrix(const std::string& tensor, std::int64_t first, std::int64_t rows, std::int64_t of,
                                 std::int64_t columns) override {
    const SafetensorsFile& file = file_of(tensor);
    const TensorInfo& info = file.info(tensor);
    // A fused tensor of experts counts as rows of its last axis.
    std::vector<std::int64_t> flat = info.shape;
    if (flat.size() == 3) flat = {flat[0] * flat[1], flat[2]};
    check(file, tensor, flat, {of, columns});
    const auto row_bytes = static_cast<std::size_t>(columns) * size_of(info.dtype);
    const auto bytes = file.bytes(tensor).subspan(static_cast<std::size_t>(first) * row_bytes,
                                                  static_cast<std::size_t>(rows) * row_bytes);
    return std::make_unique<DenseMatrix>(bytes, info.dtype, rows, columns);
  }

  std::vector<float> vector(const std::string& tensor, std::int64_t size) override {
    const SafetensorsFile& file = file_of(tensor);
    const TensorInfo& info = file.info(tensor);
    check(file, tensor, info.shape, {size});
    std::vector<float> values(static_cast<std::size_t>(size));
    to_float(file.bytes(tensor).data(), info.dtype, size, values.data());
    return values;
  }

  void check_all_used(std::span<const std::string> harmless) const override {
    for (const auto& [name, file] : by_name_) {
      const bool known = used_.contains(name) || name.ends_with(".rotary_emb.inv_freq") ||
                         std::any_of(harmless.begin(), harmless.end(),
                                     [&tensor = name](const std::string& start) { return tensor.starts_with(start); });
      require(known, "{}: tensor '{}' has no place in the model that config.json describes", files_[file].name(), name);
    }
  }

  std::size_t copied_bytes() const override {
    std::size_t bytes = 0;
    for (const SafetensorsFile& file : files_) bytes += file.copied_bytes();
    return bytes;
  }

 private:
  const SafetensorsFile& file_of(const std::string& tensor) {
    const auto found = by_name_.find(tensor);
    if (found == by_name_.end()) {
      std::vector<std::string> known;
      for (const auto& [name, file] : by_name_) known.push_back(name);
      fail("{}: tensor '{}' is missing{}", place_, tensor,
           known.empty() ? std::string() : fmt::format("; the nearest name is '{}'", nearest_name(tensor, known)));
    }
    used_.insert(tensor);
    return files_[found->second];
  }

  static void check(const SafetensorsFile& file, const std::string& tensor, const std::vector<std::int64_t>& shape,
                    const std::vector<std::int64_t>& expected) {
    const TensorInfo& info = file.info(tensor);
    require(shape == expected, "{}: tensor '{}' has shape [{}]; config.json asks for [{}]", file.name(), tensor,
            fmt::join(info.shape, ", "), fmt::join(expected, ", "));
    require(is_attention_dtype(info.dtype), "{}: tensor '{}' has dtype {}; expected F32, BF16 or F16", file.name(),
            tensor, info.dtype_name);
  }

  void add(const std::vector<std::filesystem::path>& paths, const LoadOptions& options) {
    const FileMemory memory = memory_of_weights(paths, options.weights);
    for (const std::filesystem::path& path : paths) {
      files_.push_back(SafetensorsFile::open(path, memory, options.threads));
      for (std::string& name : files_.back().names()) {
        const auto [place, fresh] = by_name_.emplace(std::move(name), files_.size() - 1);
        require(fresh, "{}: tensor '{}' is also in {}", path.string(), place->first, files_[place->second].name());
      }
    }
  }

  std::vector<SafetensorsFile> files_;
  std::map<std::string, std::size_t> by_name_;
  std::set<std::string> used_;
  std::string place_;
};

}  // namespace

std::unique_ptr<TensorSource> open_safetensors(const std::filesystem::path& folder, const LoadOptions& options) {
  return std::make_unique<SafetensorsSource>(folder, options);
}

}  // namespace tessera::model
