#include "model/gguf_source.h"

#include <algorithm>
#include <array>
#include <set>
#include <utility>

#include "core/error.h"
#include "model/block_matrix.h"

namespace tessera::model {

namespace {

/// The name of a tensor in the file, and where its rows begin: experts lie one above the other.
struct Place {
  std::string name;
  std::int64_t expert = 0;
};

using Renaming = std::pair<std::string_view, std::string_view>;

constexpr std::array<Renaming, 3> kWhole{{{"model.embed_tokens.weight", "token_embd.weight"},
                                          {"model.norm.weight", "output_norm.weight"},
                                          {"lm_head.weight", "output.weight"}}};

/// Of a layer, without ".weight" and ".bias".
constexpr std::array<Renaming, 18> kOfLayer{{{"input_layernorm", "attn_norm"},
                                             {"self_attn.q_proj", "attn_q"},
                                             {"self_attn.k_proj", "attn_k"},
                                             {"self_attn.v_proj", "attn_v"},
                                             {"self_attn.qkv_proj", "attn_qkv"},
                                             {"self_attn.o_proj", "attn_output"},
                                             {"self_attn.q_norm", "attn_q_norm"},
                                             {"self_attn.k_norm", "attn_k_norm"},
                                             {"pre_feedforward_layernorm", "ffn_norm"},
                                             {"post_feedforward_layernorm", "post_ffw_norm"},
                                             {"mlp.gate_proj", "ffn_gate"},
                                             {"mlp.up_proj", "ffn_up"},
                                             {"mlp.gate_up_proj", "ffn_up"},
                                             {"mlp.down_proj", "ffn_down"},
                                             {"mlp.gate", "ffn_gate_inp"},
                                             {"gate_proj", "ffn_gate_exps"},
                                             {"up_proj", "ffn_up_exps"},
                                             {"down_proj", "ffn_down_exps"}}};

class GgufSource final : public TensorSource {
 public:
  explicit GgufSource(GgufFile file) : file_(std::move(file)) {}

  bool has(const std::string& tensor) const override {
    const auto place = place_of(tensor);
    return place && file_.tensors().contains(place->name);
  }

  std::unique_ptr<Matrix> matrix(const std::string& tensor, std::int64_t first, std::int64_t rows, std::int64_t of,
                                 std::int64_t columns) override {
    const Place place = place_or_fail(tensor);
    const GgufTensor& info = file_.tensor(place.name);
    std::vector<std::int64_t> flat = info.shape;
    if (flat.size() == 3) {
      // Experts are asked for one by one.
      require(flat[1] == of && place.expert < flat[0],
              "{}: tensor '{}' has shape [{}]; expected rows of {} for each "
              "expert",
              file_.name(), place.name, fmt::join(info.shape, ", "), of);
      first += place.expert * of;
      flat = {of, flat[2]};
    }
    check(place.name, info, flat, {of, columns});
    const std::int64_t row_bytes = bytes_of(info.type, columns);
    const auto bytes = file_.bytes(info).subspan(static_cast<std::size_t>(first * row_bytes),
                                                 static_cast<std::size_t>(rows * row_bytes));
    switch (info.type) {
      case GgmlType::f32:
        return std::make_unique<DenseMatrix>(bytes, DType::f32, rows, columns);
      case GgmlType::f16:
        return std::make_unique<DenseMatrix>(bytes, DType::f16, rows, columns);
      case GgmlType::bf16:
        return std::make_unique<DenseMatrix>(bytes, DType::bf16, rows, columns);
      default:
        return std::make_unique<BlockMatrix>(bytes, info.type, rows, columns);
    }
  }

  std::vector<float> vector(const std::string& tensor, std::int64_t size) override {
    const Place place = place_or_fail(tensor);
    const GgufTensor& info = file_.tensor(place.name);
    check(place.name, info, info.shape, {size});
    std::vector<float> numbers(static_cast<std::size_t>(size));
    dequantise(info.type, file_.bytes(info).data(), size, numbers.data());
    return numbers;
  }

  void check_all_used(std::span<const std::string>) const override {
    for (const auto& [name, info] : file_.tensors()) {
      const bool known = used_.contains(name) || name.starts_with("rope_f");  // the configuration read those
      require(known, "{}: tensor '{}' has no place in the model that the metadata describes", file_.name(), name);
    }
  }

  std::size_t copied_bytes() const override { return file_.copied_bytes(); }

 private:
  std::optional<Place> place_of(std::string_view tensor) const {
    for (const auto& [ours, theirs] : kWhole) {
      if (tensor == ours) return Place{std::string(theirs)};
    }
    constexpr std::string_view prefix = "model.layers.";
    if (!tensor.starts_with(prefix)) return std::nullopt;
    tensor.remove_prefix(prefix.size());
    const std::size_t dot = tensor.find('.');
    const std::size_t last = tensor.rfind('.');
    if (dot == std::string_view::npos || last <= dot) return std::nullopt;
    const std::string_view layer = tensor.substr(0, dot);
    const std::string_view suffix = tensor.substr(last);
    std::string_view part = tensor.substr(dot + 1, last - dot - 1);
    Place place;
    constexpr std::string_view experts = "mlp.experts.";
    if (part.starts_with(experts)) {
      part.remove_prefix(experts.size());
      const std::size_t end = part.find('.');
      if (end == std::string_view::npos) return std::nullopt;
      place.expert = std::stoll(std::string(part.substr(0, end)));
      part.remove_prefix(end + 1);
    }
    // Models with norms behind the parts call one of them so; others mean the norm before the feed-forward part.
    if (part == "post_attention_layernorm") {
      const std::string behind = fmt::format("blk.{}.post_attention_norm{}", layer, suffix);
      place.name = file_.tensors().contains(behind) ? behind : fmt::format("blk.{}.ffn_norm{}", layer, suffix);
      return place;
    }
    for (const auto& [ours, theirs] : kOfLayer) {
      if (part != ours) continue;
      place.name = fmt::format("blk.{}.{}{}", layer, theirs, suffix);
      return place;
    }
    return std::nullopt;
  }

  Place place_or_fail(const std::string& tensor) {
    auto place = place_of(tensor);
    require(place.has_value(), "{}: there is no name for '{}' in GGUF files", file_.name(), tensor);
    used_.insert(place->name);
    return *std::move(place);
  }

  void check(const std::string& name, const GgufTensor& info, const std::vector<std::int64_t>& shape,
             const std::vector<std::int64_t>& expected) const {
    require(shape == expected, "{}: tensor '{}' has shape [{}]; the metadata asks for [{}]", file_.name(), name,
            fmt::join(info.shape, ", "), fmt::join(expected, ", "));
  }

  GgufFile file_;
  std::set<std::string> used_;
};

}  // namespace

std::unique_ptr<TensorSource> open_gguf(GgufFile file) {
  return std::make_unique<GgufSource>(std::move(file));
}

}  // namespace tessera::model
