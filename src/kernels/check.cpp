// Do the tensors fit the problem? Every public entry asks here before a kernel runs.
#include <cmath>

#include "core/error.h"
#include "tessera/attention.h"

namespace tessera {

namespace {

void check_dtype(const TensorView& tensor, std::string_view name) {
  require(tensor.data != nullptr, "{} has no data", name);
  require(is_attention_dtype(tensor.dtype), "{} has dtype {}; expected f32, bf16 or f16", name, name_of(tensor.dtype));
  require(tensor.strides[3] == 1, "{} has stride {} on its last axis; expected 1", name, tensor.strides[3]);
  const auto alignment = reinterpret_cast<std::uintptr_t>(tensor.data) % size_of(tensor.dtype);
  require(alignment == 0, "{} is not aligned to its {}-byte elements", name, size_of(tensor.dtype));
}

void check_tensor(const TensorView& tensor, std::string_view name, const std::array<std::int64_t, 4>& expected) {
  check_dtype(tensor, name);
  require(tensor.shape == expected, "{} has shape [{}]; expected [{}] (batch, heads, tokens, dim)", name,
          fmt::join(tensor.shape, ", "), fmt::join(expected, ", "));
}

void check_pages(const Problem& problem, const AttentionInputs& inputs) {
  const PageTable& pages = inputs.pages;
  require(!problem.variable_length(), "a page table needs a uniform batch; give per-sequence lengths by padding");
  require(pages.page_size > 0 && pages.page_size % 16 == 0, "page_size is {}; expected a multiple of 16",
          pages.page_size);
  const std::int64_t needed = (problem.kv_len + pages.page_size - 1) / pages.page_size;
  require(pages.pages_per_sequence >= needed, "pages_per_sequence is {}; {} keys in pages of {} need {}",
          pages.pages_per_sequence, problem.kv_len, pages.page_size, needed);
  require(static_cast<std::int64_t>(pages.table.size()) == problem.batch * pages.pages_per_sequence,
          "page table has {} entries; expected batch {} x pages_per_sequence {}", pages.table.size(), problem.batch,
          pages.pages_per_sequence);
  for (std::int64_t sequence = 0; sequence < problem.batch; ++sequence) {
    for (std::int64_t page = 0; page < needed; ++page) {
      const std::int32_t number = pages.table[static_cast<std::size_t>(sequence * pages.pages_per_sequence + page)];
      require(number >= 0 && number < inputs.k.shape[0], "page table names page {}; the pool has {}", number,
              inputs.k.shape[0]);
    }
  }
}

void check_weights(const Problem& problem, const Modifiers& modifiers) {
  if (modifiers.weights == RowWeights::softmax) return;
  require(modifiers.sink_logits.empty(), "sink_logits go with softmax weights only; got {}",
          name_of(modifiers.weights));
  if (modifiers.weights == RowWeights::softplus) return;
  const std::int64_t rows = (problem.variable_length() ? 1 : problem.batch) * problem.q_heads * problem.q_len;
  require(static_cast<std::int64_t>(modifiers.weight_factors.size()) == rows,
          "weight_factors has {} entries; expected one per row, {}", modifiers.weight_factors.size(), rows);
  require(std::isfinite(modifiers.weight_offset) && modifiers.weight_offset >= 0,
          "weight_offset is {}; expected 0 or a positive number", modifiers.weight_offset);
  require(modifiers.weight_power >= 1 && modifiers.weight_power <= 64, "weight_power is {}; expected 1 to 64",
          modifiers.weight_power);
}

void check_modifiers(const Problem& problem, const Modifiers& modifiers) {
  require(std::isfinite(modifiers.softcap) && modifiers.softcap >= 0, "softcap is {}; expected 0 (off) or positive",
          modifiers.softcap);
  const auto heads = static_cast<std::size_t>(problem.q_heads);
  require(modifiers.alibi_slopes.empty() || modifiers.alibi_slopes.size() == heads,
          "alibi_slopes has {} entries; expected q_heads {}", modifiers.alibi_slopes.size(), heads);
  require(modifiers.sink_logits.empty() || modifiers.sink_logits.size() == heads,
          "sink_logits has {} entries; expected q_heads {}", modifiers.sink_logits.size(), heads);
  require(modifiers.query_scale.empty() || static_cast<std::int64_t>(modifiers.query_scale.size()) == problem.q_len,
          "query_scale has {} entries; expected one per query, {}", modifiers.query_scale.size(), problem.q_len);
  check_weights(problem, modifiers);
  const TensorView& bias = modifiers.key_bias;
  if (bias.data == nullptr) return;
  const std::int64_t batch = problem.variable_length() ? 1 : problem.batch;
  require(bias.dtype == DType::f32, "key_bias has dtype {}; expected f32", name_of(bias.dtype));
  require((bias.batch() == 1 || bias.batch() == batch) &&
              (bias.heads() == 1 || bias.heads() == problem.kv_heads || bias.heads() == problem.q_heads) &&
              bias.tokens() == problem.kv_len && bias.dim() == 1,
          "key_bias has shape [{}]; expected [1 or {}, 1, {} or {}, {}, 1]", fmt::join(bias.shape, ", "), batch,
          problem.kv_heads, problem.q_heads, problem.kv_len);
}

}  // namespace

std::string_view name_of(RowWeights weights) {
  constexpr std::array<std::string_view, 3> names{"softmax", "softplus", "reweighted"};
  return names.at(static_cast<std::size_t>(weights));
}

void check_inputs(const Problem& problem, const AttentionInputs& inputs) {
  problem.validate();
  const std::int64_t batch = problem.variable_length() ? 1 : problem.batch;
  check_tensor(inputs.q, "q", {batch, problem.q_heads, problem.q_len, problem.head_dim});
  if (inputs.pages.used()) {
    const std::int64_t pool = inputs.k.shape[0];
    check_tensor(inputs.k, "k", {pool, problem.kv_heads, inputs.pages.page_size, problem.head_dim});
    check_tensor(inputs.v, "v", {pool, problem.kv_heads, inputs.pages.page_size, problem.value_dim});
    check_pages(problem, inputs);
  } else {
    check_tensor(inputs.k, "k", {batch, problem.kv_heads, problem.kv_len, problem.head_dim});
    check_tensor(inputs.v, "v", {batch, problem.kv_heads, problem.kv_len, problem.value_dim});
  }
  require(inputs.k.dtype == inputs.v.dtype, "k is {} and v is {}; expected one dtype", name_of(inputs.k.dtype),
          name_of(inputs.v.dtype));
  check_modifiers(problem, inputs.modifiers);
}

}  // namespace tessera
