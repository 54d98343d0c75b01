#include "inputs.h"

#include <utility>

#include "core/error.h"

namespace tessera::python {

Inputs::Inputs(Array q, Array k, Array v, Parts parts)
    : q_(std::move(q)), k_(std::move(k)), v_(std::move(v)), parts_(std::move(parts)) {
  views_.q = view_of(q_, "q");
  views_.k = view_of(k_, "k");
  views_.v = view_of(v_, "v");
  Modifiers& modifiers = views_.modifiers;
  modifiers.softcap = parts_.softcap;
  if (parts_.query_scale) modifiers.query_scale = span_of<float>(*parts_.query_scale, "query_scale");
  if (parts_.alibi_slopes) modifiers.alibi_slopes = span_of<float>(*parts_.alibi_slopes, "alibi_slopes");
  if (parts_.sink_logits) modifiers.sink_logits = span_of<float>(*parts_.sink_logits, "sink_logits");
  if (parts_.key_bias) modifiers.key_bias = view_of(*parts_.key_bias, "key_bias");
  for (const auto& [keys, values, weights] : parts_.sources) {
    KeySource source{.k = view_of(keys, "sources k"), .v = view_of(values, "sources v"), .log_weight = {}};
    if (weights) source.log_weight = span_of<float>(*weights, "sources log_weight");
    views_.sources.push_back(source);
  }
  for (const auto& [name, array] : parts_.side) views_.side.push_back({name, view_of(array, name)});
  if (parts_.page_table) {
    views_.pages.table = span_of<std::int32_t>(*parts_.page_table, "page_table");
    require(parts_.page_table->ndim() == 2, "page_table has {} axes; expected 2 (batch, pages)",
            parts_.page_table->ndim());
    views_.pages.pages_per_sequence = static_cast<std::int64_t>(parts_.page_table->shape(1));
    views_.pages.page_size = parts_.page_size;
  }
}

RunOptions CallOptions::run() const {
  RunOptions options;
  bool known = false;
  for (const KernelKind kind : {KernelKind::automatic, KernelKind::reference, KernelKind::query_major,
                                KernelKind::key_major, KernelKind::split_key}) {
    if (name_of(kind) != kernel) continue;
    options.kernel = kind;
    known = true;
  }
  require(known, "backend is {}; expected automatic, reference, query-major, key-major or split-key", kernel);
  if (!isa.empty()) options.isa = isa_from_name(isa);
  require(threads >= 0, "threads is {}; expected 0 (all) or more", threads);
  options.threads = threads;
  return options;
}

PlanContext CallOptions::context(State* state) const {
  return {.layer = layer, .layers = layers, .state = state == nullptr ? nullptr : state->state.get(), .run = run()};
}

nb::dict report_dict(const RunReport& report) {
  nb::dict result;
  result["kernel"] = nb::str(std::string(name_of(report.kernel)).c_str());
  result["isa"] = nb::str(std::string(name_of(report.isa)).c_str());
  result["threads"] = report.threads;
  result["workspace_bytes"] = report.workspace_bytes;
  result["plan_ms"] = report.plan_ms;
  result["kernel_ms"] = report.kernel_ms;
  result["skipped_pairs"] = report.skipped_pairs;
  return result;
}

}  // namespace tessera::python
