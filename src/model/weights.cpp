#include "model/weights.h"

#include <algorithm>
#include <map>
#include <set>

#include "core/convert.h"
#include "core/error.h"
#include "core/parallel.h"
#include "io/json.h"

namespace tessera::model {

namespace {

constexpr std::string_view kSingleFile = "model.safetensors";
constexpr std::string_view kIndexFile = "model.safetensors.index.json";

/// The tensors of one or several files by name.
class TensorIndex {
 public:
  TensorIndex(const std::filesystem::path& folder, std::vector<SafetensorsFile>& files) : files_(files) {
    std::error_code ignored;
    if (std::filesystem::exists(folder / kSingleFile, ignored)) {
      add(folder / kSingleFile);
      place_ = (folder / kSingleFile).string();
      return;
    }
    const auto path = folder / kIndexFile;
    require(std::filesystem::exists(path, ignored), "{}: there is neither {} nor {}", folder.string(), kSingleFile,
            kIndexFile);
    place_ = path.string();
    const Json map = get<Json>(parse_json_file(path), "weight_map", place_);
    require(map.is_object(), "{}: 'weight_map' is no object", place_);
    std::set<std::string> shards;
    for (const auto& [tensor, file] : map.items()) {
      const auto shard = get<std::string>(map, tensor, place_);
      require(!shard.empty() && shard.find('/') == std::string::npos && shard.find('\0') == std::string::npos,
              "{}: tensor '{}' lies in '{}'; expected the name of a file in the same folder", place_, tensor, shard);
      shards.insert(shard);
    }
    for (const std::string& shard : shards) add(folder / shard);
    for (const auto& [tensor, file] : map.items()) {
      const auto found = by_name_.find(tensor);
      const std::string expected = (folder / file.get<std::string>()).string();
      require(found != by_name_.end() && files_[found->second].name() == expected,
              "{}: tensor '{}' is not in {} as 'weight_map' says", place_, tensor, expected);
    }
  }

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

  /// Weights that the configuration does not account for would be left out of the computation in silence.
  void check_all_used(const ModelConfig& config) const {
    for (const auto& [name, file] : by_name_) {
      const bool harmless = name.ends_with(".rotary_emb.inv_freq") || (config.tied_head && name == "lm_head.weight");
      require(harmless || used_.contains(name),
              "{}: tensor '{}' has no place in the model that config.json describes ({} layers, no biases)",
              files_[file].name(), name, config.layers);
    }
  }

 private:
  void add(const std::filesystem::path& path) {
    files_.push_back(SafetensorsFile::open(path));
    for (std::string& name : files_.back().names()) {
      const auto [place, fresh] = by_name_.emplace(std::move(name), files_.size() - 1);
      require(fresh, "{}: tensor '{}' is also in {}", path.string(), place->first, files_[place->second].name());
    }
  }

  std::vector<SafetensorsFile>& files_;
  std::map<std::string, std::size_t> by_name_;
  std::set<std::string> used_;
  std::string place_;
};

class Loader {
 public:
  Loader(TensorIndex& index, int threads, std::size_t& heap_bytes)
      : index_(index), threads_(threads), heap_bytes_(heap_bytes) {}

  Weight load(const std::string& name, const std::vector<std::int64_t>& shape) {
    const SafetensorsFile& file = index_.file_of(name);
    const TensorInfo& info = file.info(name);
    require(info.shape == shape, "{}: tensor '{}' has shape [{}]; config.json asks for [{}]", file.name(), name,
            fmt::join(info.shape, ", "), fmt::join(shape, ", "));
    require(is_attention_dtype(info.dtype), "{}: tensor '{}' has dtype {}; expected F32, BF16 or F16", file.name(),
            name, info.dtype_name);
    const std::span<const std::byte> bytes = file.bytes(name);
    Weight weight;
    if (info.dtype == DType::f32 && reinterpret_cast<std::uintptr_t>(bytes.data()) % alignof(float) == 0) {
      weight.values = {reinterpret_cast<const float*>(bytes.data()), bytes.size() / sizeof(float)};
      return weight;
    }
    const std::int64_t elements = info.elements();
    weight.storage.resize(static_cast<std::size_t>(elements));
    constexpr std::int64_t piece = 1 << 16;
    parallel_for((elements + piece - 1) / piece, threads_, [&](std::int64_t i, int) {
      const std::int64_t first = i * piece;
      to_float(bytes.data() + first * static_cast<std::int64_t>(size_of(info.dtype)), info.dtype,
               std::min(piece, elements - first), weight.storage.data() + first);
    });
    heap_bytes_ += weight.storage.size() * sizeof(float);
    weight.values = weight.storage;  // the heap block stays where it is when the weight is moved
    return weight;
  }

 private:
  TensorIndex& index_;
  int threads_;
  std::size_t& heap_bytes_;
};

}  // namespace

Weights load_weights(const std::filesystem::path& folder, const ModelConfig& config, int threads) {
  Weights weights;
  TensorIndex index(folder, weights.files);
  Loader loader(index, threads, weights.heap_bytes);
  const std::int64_t hidden = config.hidden_size;
  const std::int64_t q_rows = config.q_heads * config.head_dim;
  const std::int64_t kv_rows = config.kv_heads * config.head_dim;

  weights.embedding = loader.load("model.embed_tokens.weight", {config.vocab_size, hidden});
  for (std::int64_t i = 0; i < config.layers; ++i) {
    const std::string prefix = fmt::format("model.layers.{}.", i);
    LayerWeights layer;
    layer.attention_norm = loader.load(prefix + "input_layernorm.weight", {hidden});
    layer.q = loader.load(prefix + "self_attn.q_proj.weight", {q_rows, hidden});
    layer.k = loader.load(prefix + "self_attn.k_proj.weight", {kv_rows, hidden});
    layer.v = loader.load(prefix + "self_attn.v_proj.weight", {kv_rows, hidden});
    layer.o = loader.load(prefix + "self_attn.o_proj.weight", {hidden, q_rows});
    layer.mlp_norm = loader.load(prefix + "post_attention_layernorm.weight", {hidden});
    layer.gate = loader.load(prefix + "mlp.gate_proj.weight", {config.intermediate_size, hidden});
    layer.up = loader.load(prefix + "mlp.up_proj.weight", {config.intermediate_size, hidden});
    layer.down = loader.load(prefix + "mlp.down_proj.weight", {hidden, config.intermediate_size});
    weights.layers.push_back(std::move(layer));
  }
  weights.norm = loader.load("model.norm.weight", {hidden});
  if (!config.tied_head) weights.head = loader.load("lm_head.weight", {config.vocab_size, hidden});
  index.check_all_used(config);
  return weights;
}

}  // namespace tessera::model
