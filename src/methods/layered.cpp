#include "methods/layered.h"

#include <algorithm>
#include <charconv>
#include <utility>
#include <vector>

#include "core/error.h"

namespace tessera {

namespace {

constexpr std::int64_t kLastLayer = 1 << 20;  ///< no model has more

struct LayerRange {
  std::int64_t first = 0;
  std::int64_t last = 0;  ///< inclusive; kLastLayer: to the end
  bool open() const { return last == kLastLayer; }
  std::string text() const {
    if (open()) return fmt::format("{}-", first);
    return first == last ? fmt::format("{}", first) : fmt::format("{}-{}", first, last);
  }
};

struct Part {
  LayerRange layers;
  std::unique_ptr<const Method> method;
};

LayerRange parse_range(const Json& value, std::string_view where) {
  const auto refuse = [&] {
    fail("{}: layers {} is not a range; expected \"3\", \"0-1\" or \"2-\"", where, value.dump());
  };
  if (!value.is_string()) refuse();
  const auto text = value.get<std::string>();
  const char* end = text.data() + text.size();
  const auto number = [&](const char* begin, std::int64_t& out) {
    const auto [after, error] = std::from_chars(begin, end, out);
    if (error != std::errc{} || out < 0 || out >= kLastLayer) refuse();
    return after;
  };
  LayerRange range;
  const char* rest = number(text.data(), range.first);
  if (rest == end) {
    range.last = range.first;
    return range;
  }
  if (*rest != '-') refuse();
  if (rest + 1 == end) {
    range.last = kLastLayer;
    return range;
  }
  if (number(rest + 1, range.last) != end || range.last < range.first) refuse();
  return range;
}

/// States of the parts, in their order.
class LayeredState final : public MethodState {
 public:
  explicit LayeredState(const std::vector<Part>& parts) {
    for (const Part& part : parts) states_.push_back(part.method->new_state());
  }
  MethodState* of(std::size_t part) const { return states_[part].get(); }
  std::size_t memory_bytes() const override {
    std::size_t bytes = 0;
    for (const auto& state : states_) bytes += state ? state->memory_bytes() : 0;
    return bytes;
  }

 private:
  std::vector<std::unique_ptr<MethodState>> states_;
};

class LayeredMethod final : public Method {
 public:
  /// `parts` ascend without gaps from layer 0.
  LayeredMethod(std::vector<Part> parts, std::string_view file) : parts_(std::move(parts)), file_(file) {
    info_ = {.name = "layers",
             .family = "layers",
             .summary = fmt::format("a method per layer, from '{}'", file_),
             .paper = "",
             .phases = {.prefill = true, .decode = true}};
    Json layers = Json::array();
    for (const Part& part : parts_) {
      const MethodInfo& info = part.method->info();
      info_.phases.prefill = info_.phases.prefill && info.phases.prefill;
      info_.phases.decode = info_.phases.decode && info.phases.decode;
      info_.own_cache = info_.own_cache || info.own_cache;
      layers.push_back({{"layers", part.layers.text()},
                        {"method", info.name},
                        {"parameters", Json::parse(part.method->parameters())}});
    }
    parameters_ = Json{{"layers", layers}}.dump();
  }

  const MethodInfo& info() const override { return info_; }
  std::string parameters() const override { return parameters_; }

  Plan plan(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const override {
    const std::size_t part = part_of(context);
    return parts_[part].method->plan(problem, inputs, context_of(part, context));
  }
  RunReport attend(const Problem& problem, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                   const PlanContext& context, Plan* executed) const override {
    const std::size_t part = part_of(context);
    return parts_[part].method->attend(problem, inputs, outputs, context_of(part, context), executed);
  }
  bool runs_its_plan() const override {
    return std::all_of(parts_.begin(), parts_.end(), [](const Part& part) { return part.method->runs_its_plan(); });
  }
  std::unique_ptr<MethodState> new_state() const override { return std::make_unique<LayeredState>(parts_); }
  std::int64_t prefill_tile() const override {
    std::int64_t tile = 1;
    for (const Part& part : parts_) tile = common_prefill_tile(tile, part.method->prefill_tile());
    return tile;
  }
  std::unique_ptr<LayerCache> new_cache(const LayerCacheShape& shape, const PlanContext& context) const override {
    const std::size_t part = part_of(context);
    return parts_[part].method->new_cache(shape, context_of(part, context));
  }
  void check_model(std::int64_t layers, std::int64_t q_heads, std::int64_t kv_heads) const override {
    check_layers(layers);
    for (const Part& part : parts_) part.method->check_model(layers, q_heads, kv_heads);
  }

 private:
  void check_layers(std::int64_t layers) const {
    const LayerRange& last = parts_.back().layers;
    require(last.open() || last.last + 1 >= layers,
            "method file '{}' covers layers 0-{}; the model has {}: layer {} "
            "has no method",
            file_, last.last, layers, last.last + 1);
    require(last.first < layers && (last.open() || last.last < layers),
            "method file '{}' names layers {}; the model has {} (0-{})", file_, last.text(), layers, layers - 1);
  }
  std::size_t part_of(const PlanContext& context) const {
    check_layers(context.layers);
    for (std::size_t i = 0; i + 1 < parts_.size(); ++i) {
      if (context.layer <= parts_[i].layers.last) return i;
    }
    return parts_.size() - 1;
  }
  static PlanContext context_of(std::size_t part, PlanContext context) {
    const auto* state = dynamic_cast<const LayeredState*>(context.state);
    context.state = state == nullptr ? nullptr : state->of(part);
    return context;
  }

  std::vector<Part> parts_;
  std::string file_;
  MethodInfo info_;
  std::string parameters_;
};

}  // namespace

std::unique_ptr<const Method> make_layered_method(const Json& object, std::string_view file) {
  require(
      object.size() == 1 && object["layers"].is_array() && !object["layers"].empty(),
      "method file '{}' is not a JSON object {{\"layers\": [{{\"layers\": \"0-1\", \"method\": name, \"parameters\": "
      "{{...}}}}, ...]}}",
      file);
  std::vector<Part> parts;
  for (const Json& item : object["layers"]) {
    const std::string where = fmt::format("method file '{}', layers[{}]", file, parts.size());
    require(item.is_object() && item.contains("layers"), "{} has no key 'layers'", where);
    Part part;
    part.layers = parse_range(item["layers"], where);
    Json method = item;
    method.erase("layers");
    part.method = make_method_of(method, where);
    parts.push_back(std::move(part));
  }
  std::stable_sort(parts.begin(), parts.end(),
                   [](const Part& a, const Part& b) { return a.layers.first < b.layers.first; });
  std::int64_t next = 0;
  for (const Part& part : parts) {
    require(part.layers.first >= next, "method file '{}': layer {} is covered twice", file, part.layers.first);
    require(part.layers.first == next, "method file '{}': layers {}-{} have no method", file, next,
            part.layers.first - 1);
    next = part.layers.last + 1;
  }
  return std::make_unique<LayeredMethod>(std::move(parts), file);
}

}  // namespace tessera
