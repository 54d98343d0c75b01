#include "plan/serialise.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <numeric>

#include "core/error.h"
#include "io/json.h"

namespace tessera {

namespace {

constexpr std::string_view kFormatName = "tessera-plan";
constexpr std::string_view kFormatVersion = "1";

// ---- problem and small fields as JSON

Json to_json(const Problem& problem) {
  Json json = {{"batch", problem.batch},         {"q_heads", problem.q_heads}, {"kv_heads", problem.kv_heads},
               {"q_len", problem.q_len},         {"kv_len", problem.kv_len},   {"head_dim", problem.head_dim},
               {"value_dim", problem.value_dim}, {"causal", problem.causal}};
  if (problem.scale) json["scale"] = *problem.scale;
  if (problem.q_offset) json["q_offset"] = *problem.q_offset;
  if (problem.variable_length()) {
    json["cu_seqlens_q"] = problem.cu_seqlens_q;
    json["cu_seqlens_k"] = problem.cu_seqlens_k;
  }
  if (problem.grid) {
    json["grid"] = {
        {"extent", problem.grid->extent}, {"prefix", problem.grid->prefix}, {"suffix", problem.grid->suffix}};
  }
  return json;
}

Problem problem_from(const Json& json, const std::string& where) {
  Problem problem;
  problem.batch = get<std::int64_t>(json, "batch", where);
  problem.q_heads = get<std::int64_t>(json, "q_heads", where);
  problem.kv_heads = get<std::int64_t>(json, "kv_heads", where);
  problem.q_len = get<std::int64_t>(json, "q_len", where);
  problem.kv_len = get<std::int64_t>(json, "kv_len", where);
  problem.head_dim = get<std::int64_t>(json, "head_dim", where);
  problem.value_dim = get<std::int64_t>(json, "value_dim", where);
  problem.causal = get<bool>(json, "causal", where);
  problem.q_offset = get_optional<std::int64_t>(json, "q_offset", where);
  if (const auto scale = get_optional<double>(json, "scale", where)) {
    require(std::abs(*scale) <= double{std::numeric_limits<float>::max()}, "{}: scale is {}; expected a float", where,
            *scale);
    problem.scale = static_cast<float>(*scale);
  }
  problem.cu_seqlens_q = get_or<std::vector<std::int64_t>>(json, "cu_seqlens_q", where, {});
  problem.cu_seqlens_k = get_or<std::vector<std::int64_t>>(json, "cu_seqlens_k", where, {});
  if (json.contains("grid")) {
    const Json grid = get<Json>(json, "grid", where);
    const auto extent = get<std::vector<std::int64_t>>(grid, "extent", where);
    require(extent.size() == 3, "{}: the grid has {} extents; expected 3", where, extent.size());
    problem.grid = TokenGrid{{extent[0], extent[1], extent[2]},
                             get<std::int64_t>(grid, "prefix", where),
                             get<std::int64_t>(grid, "suffix", where)};
  }
  return problem;
}

std::vector<KeySourceInfo> sources_from(const Json& json, const std::string& where) {
  const Json list = get<Json>(json, "sources", where);
  require(list.is_array(), "{}: 'sources' is not a list", where);
  std::vector<KeySourceInfo> sources;
  for (const Json& source : list) {
    sources.push_back({get<std::string>(source, "name", where), get<std::int64_t>(source, "keys", where),
                       get<bool>(source, "repeats_allowed", where)});
  }
  return sources;
}

// ---- tensors

/// Lists of all blocks one after another.
struct Orders {
  std::vector<std::int64_t> begin;
  std::vector<std::int32_t> tokens;
};

Orders joined(const std::vector<std::vector<std::int32_t>>& orders) {
  Orders result;
  if (orders.empty()) return result;
  result.begin.push_back(0);
  for (const auto& order : orders) {
    result.tokens.insert(result.tokens.end(), order.begin(), order.end());
    result.begin.push_back(static_cast<std::int64_t>(result.tokens.size()));
  }
  return result;
}

std::vector<std::vector<std::int32_t>> orders_from(const SafetensorsFile& file, const std::string& name) {
  const auto begin = file.copy<std::int64_t>(name + "_begin");
  std::vector<std::int32_t> storage;
  const auto tokens = file.values<std::int32_t>(name, storage);
  if (begin.empty()) {
    require(tokens.empty(), "{}: {} has entries but no {}_begin", file.name(), name, name);
    return {};
  }
  require(begin.front() == 0 && std::is_sorted(begin.begin(), begin.end()) &&
              begin.back() == static_cast<std::int64_t>(tokens.size()),
          "{}: {}_begin must ascend from 0 to the {} entries of {}", file.name(), name, tokens.size(), name);
  std::vector<std::vector<std::int32_t>> orders;
  for (std::size_t b = 0; b + 1 < begin.size(); ++b) {
    orders.emplace_back(tokens.begin() + begin[b], tokens.begin() + begin[b + 1]);
  }
  return orders;
}

std::vector<PlanEntry> entries_from(const SafetensorsFile& file) {
  std::vector<std::int64_t> key_storage;
  std::vector<std::int32_t> count_storage;
  std::vector<std::uint8_t> kind_storage;
  std::vector<std::uint8_t> mask_storage;
  std::vector<std::int32_t> source_storage;
  std::vector<std::int64_t> index_storage;
  const auto key = file.values("entry_key", key_storage);
  const auto count = file.values("entry_count", count_storage);
  const auto kind = file.values("entry_kind", kind_storage);
  const auto mask = file.values("entry_mask", mask_storage);
  const auto source = file.values("entry_source", source_storage);
  const auto index = file.values("entry_mask_index", index_storage);
  const std::size_t size = key.size();
  require(count.size() == size && kind.size() == size && mask.size() == size && source.size() == size &&
              index.size() == size,
          "{}: the entry_ tensors have different sizes", file.name());
  std::vector<PlanEntry> entries(size);
  for (std::size_t i = 0; i < size; ++i) {
    require(kind[i] <= static_cast<std::uint8_t>(EntryKind::gather) &&
                mask[i] <= static_cast<std::uint8_t>(EntryMask::bitmask) && source[i] >= 0 && source[i] <= 0xFFFF,
            "{}: entry {} has kind {}, mask {}, source {}; expected 0 to 2, 0 to 2, 0 to 65535", file.name(), i,
            kind[i], mask[i], source[i]);
    entries[i] = {key[i],
                  count[i],
                  static_cast<EntryKind>(kind[i]),
                  static_cast<EntryMask>(mask[i]),
                  static_cast<std::uint16_t>(source[i]),
                  index[i]};
  }
  return entries;
}

template <class T, class Field>
std::vector<T> column(const std::vector<PlanEntry>& entries, const Field& field) {
  std::vector<T> values(entries.size());
  std::transform(entries.begin(), entries.end(), values.begin(),
                 [&](const PlanEntry& e) { return static_cast<T>(field(e)); });
  return values;
}

}  // namespace

void save(const Plan& plan, const std::filesystem::path& path) {
  Json sources = Json::array();
  for (const KeySourceInfo& source : plan.sources) {
    sources.push_back({{"name", source.name}, {"keys", source.keys}, {"repeats_allowed", source.repeats_allowed}});
  }
  const Json fields = {{"problem", to_json(plan.problem)},
                       {"tile_q", plan.tile_q},
                       {"tile_k", plan.tile_k},
                       {"plan_heads", plan.plan_heads},
                       {"plan_sequences", plan.plan_sequences},
                       {"sources", sources}};
  std::string fields_text;
  try {
    fields_text = fields.dump();
  } catch (const Json::exception&) {
    fail("{}: the name of a key source is not valid UTF-8", path.string());
  }

  const auto& entries = plan.entries;
  const auto keys = column<std::int64_t>(entries, [](const PlanEntry& e) { return e.begin; });
  const auto counts = column<std::int32_t>(entries, [](const PlanEntry& e) { return e.count; });
  const auto kinds = column<std::uint8_t>(entries, [](const PlanEntry& e) { return e.kind; });
  const auto masks = column<std::uint8_t>(entries, [](const PlanEntry& e) { return e.mask; });
  const auto source_indices = column<std::int32_t>(entries, [](const PlanEntry& e) { return e.source; });
  const auto mask_indices = column<std::int64_t>(entries, [](const PlanEntry& e) { return e.mask_index; });
  const Orders query_order = joined(plan.query_order);
  const Orders key_order = joined(plan.key_order);

  std::vector<NamedTensor> tensors;
  const auto add = [&](std::string name, DType dtype, const auto& values) {
    tensors.push_back(
        {std::move(name), dtype, {static_cast<std::int64_t>(values.size())}, std::as_bytes(std::span(values))});
  };
  add("row_begin", DType::i64, plan.row_begin);
  add("entry_begin", DType::i64, plan.entry_begin);
  add("entry_key", DType::i64, keys);
  add("entry_count", DType::i32, counts);
  add("entry_kind", DType::u8, kinds);
  add("entry_mask", DType::u8, masks);
  add("entry_source", DType::i32, source_indices);
  add("entry_mask_index", DType::i64, mask_indices);
  add("tokens", DType::i32, plan.tokens);
  add("mask_words", DType::i64, plan.mask_words);
  static_assert(sizeof(Window) == 2 * sizeof(std::int64_t), "bands are written as pairs");
  tensors.push_back(
      {"bands", DType::i64, {static_cast<std::int64_t>(plan.bands.size()), 2}, std::as_bytes(std::span(plan.bands))});
  add("query_order", DType::i32, query_order.tokens);
  add("query_order_begin", DType::i64, query_order.begin);
  add("key_order", DType::i32, key_order.tokens);
  add("key_order_begin", DType::i64, key_order.begin);
  write_safetensors(
      path, tensors,
      {{"format", std::string(kFormatName)}, {"version", std::string(kFormatVersion)}, {"plan", fields_text}});
}

Plan read_plan(const SafetensorsFile& file) {
  const auto& metadata = file.metadata();
  const auto text_of = [&](std::string_view key) {
    const auto found = metadata.find(key);
    return found == metadata.end() ? std::string() : found->second;
  };
  require(text_of("format") == kFormatName, "{}: not a plan file: metadata 'format' is '{}'; expected '{}'",
          file.name(), text_of("format").substr(0, 32), kFormatName);
  require(text_of("version") == kFormatVersion, "{}: plan format version '{}'; expected '{}'", file.name(),
          text_of("version").substr(0, 32), kFormatVersion);
  const std::string where = file.name() + ": metadata 'plan'";
  const Json fields = parse_json(text_of("plan"), where);

  Plan plan;
  plan.problem = problem_from(get<Json>(fields, "problem", where), where + ": 'problem'");
  plan.tile_q = get<std::int64_t>(fields, "tile_q", where);
  plan.tile_k = get<std::int64_t>(fields, "tile_k", where);
  plan.plan_heads = get<std::int64_t>(fields, "plan_heads", where);
  plan.plan_sequences = get<std::int64_t>(fields, "plan_sequences", where);
  plan.sources = sources_from(fields, where);
  plan.row_begin = file.copy<std::int64_t>("row_begin");
  plan.entry_begin = file.copy<std::int64_t>("entry_begin");
  plan.entries = entries_from(file);
  plan.tokens = file.copy<std::int32_t>("tokens");
  plan.mask_words = file.copy<std::uint64_t>("mask_words");
  const auto bands = file.copy<std::int64_t>("bands");
  require(bands.size() % 2 == 0, "{}: bands has {} numbers; expected pairs", file.name(), bands.size());
  plan.bands.clear();
  for (std::size_t i = 0; i < bands.size(); i += 2) plan.bands.push_back({bands[i], bands[i + 1]});
  plan.query_order = orders_from(file, "query_order");
  plan.key_order = orders_from(file, "key_order");
  try {
    validate(plan);
  } catch (const Error& error) {
    fail("{}: not a valid plan: {}", file.name(), error.what());
  }
  return plan;
}

Plan load_plan(const std::filesystem::path& path) {
  return read_plan(SafetensorsFile::open(path));
}

}  // namespace tessera
