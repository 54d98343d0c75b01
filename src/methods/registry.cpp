#include "methods/registry.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <numeric>
#include <tuple>

#include "core/error.h"
#include "io/json.h"
#include "methods/layered.h"

namespace tessera {

namespace method_files {
#define TESSERA_METHOD_FILE(stem) MethodEntry stem();
#include "method_list.inc"
#undef TESSERA_METHOD_FILE
}  // namespace method_files

namespace {

std::vector<MethodEntry> collect() {
  std::vector<MethodEntry> entries;
#define TESSERA_METHOD_FILE(stem) entries.push_back(method_files::stem());
#include "method_list.inc"
#undef TESSERA_METHOD_FILE
  std::sort(entries.begin(), entries.end(), [](const MethodEntry& a, const MethodEntry& b) {
    return std::tie(a.info.family, a.info.name) < std::tie(b.info.family, b.info.name);
  });
  return entries;
}

/// The text of key=value as a JSON value of the declared type; text that does not read as one becomes a string, which
/// the check of types then refuses by name.
Json value_of(const MethodEntry& entry, const std::string& key, const std::string& text) {
  const auto declared = std::find_if(entry.parameters.begin(), entry.parameters.end(),
                                     [&](const ParameterInfo& info) { return info.name == key; });
  const bool literal = declared != entry.parameters.end() && declared->type != "string" && declared->type != "choice";
  if (!literal) return text;
  Json value = Json::parse(text, nullptr, false);
  return value.is_number() || value.is_boolean() ? value : Json(text);
}

std::unique_ptr<const Method> from_pairs(const MethodEntry& entry, std::string_view pairs) {
  Json parameters = Json::object();
  while (!pairs.empty()) {
    const std::size_t comma = std::min(pairs.find(','), pairs.size());
    const std::string_view pair = pairs.substr(0, comma);
    pairs.remove_prefix(std::min(comma + 1, pairs.size()));
    const std::size_t equals = pair.find('=');
    require(equals != std::string_view::npos && equals > 0, "{}: '{}' is not key=value", entry.info.name, pair);
    const std::string key(pair.substr(0, equals));
    require(!parameters.contains(key), "{}: parameter '{}' is given twice", entry.info.name, key);
    parameters[key] = value_of(entry, key, std::string(pair.substr(equals + 1)));
  }
  return entry.make(parameters.dump(-1, ' ', false, Json::error_handler_t::replace));
}

/// How deep a method file may name others, as the inner methods of its own.
constexpr int kMostNestedFiles = 8;

/// Counts the files that are open on this thread: one that names itself would never end.
class NestedFile {
 public:
  explicit NestedFile(const std::string& name) {
    require(depth() < kMostNestedFiles,
            "method file '{}' is the {}th inside another; expected {} at most: does one name itself?", name,
            depth() + 1, kMostNestedFiles);
    ++depth();
  }
  ~NestedFile() { --depth(); }
  NestedFile(const NestedFile&) = delete;
  NestedFile& operator=(const NestedFile&) = delete;

 private:
  static int& depth() {
    static thread_local int files = 0;
    return files;
  }
};

std::unique_ptr<const Method> from_file(const std::string& name) {
  const NestedFile nested(name);
  const Json object = parse_json_file(name);
  if (object.is_object() && object.contains("layers")) return make_layered_method(object, name);
  return make_method_of(object, fmt::format("method file '{}'", name));
}

}  // namespace

std::unique_ptr<const Method> make_method_of(const Json& object, std::string_view where) {
  require(object.is_object() && object.contains("method") && object["method"].is_string(),
          "{} is not a JSON object {{\"method\": name, \"parameters\": {{...}}}}", where);
  // "tuned" is for people: what a search wrote about itself.
  const std::vector<std::string> known{"method", "parameters", "tuned"};
  for (const auto& [key, value] : object.items()) {
    require(std::find(known.begin(), known.end(), key) != known.end(), "{}: unknown key '{}'; expected {}", where, key,
            fmt::join(known, " and "));
  }
  const MethodEntry& entry = find_method(object["method"].get<std::string>());
  const Json parameters = object.value("parameters", Json::object());
  return entry.make(parameters.dump());
}

std::span<const MethodEntry> methods() {
  static const std::vector<MethodEntry> entries = collect();
  return entries;
}

const MethodEntry& find_method(std::string_view name) {
  std::vector<std::string> known;
  for (const MethodEntry& entry : methods()) {
    if (entry.info.name == name) return entry;
    known.push_back(entry.info.name);
  }
  fail("unknown method '{}'; did you mean '{}'? (known: {})", name, nearest_name(name, known), fmt::join(known, ", "));
}

std::unique_ptr<const Method> make_method(std::string_view spec) {
  if (spec.ends_with(".json") && spec.find('=') == std::string_view::npos) {
    return from_file(std::string(spec));
  }
  const std::size_t colon = spec.find(':');
  const MethodEntry& entry = find_method(spec.substr(0, colon));
  return from_pairs(entry, colon == std::string_view::npos ? std::string_view{} : spec.substr(colon + 1));
}

void check_domain(const MethodInfo& info, const Problem& problem) {
  const Domain& domain = info.domain;
  require(problem.causal ? domain.causal : domain.bidirectional, "{}: causal is {}; expected {}: {}", info.name,
          problem.causal, !problem.causal, domain.reason);
  require(domain.variable_length || !problem.variable_length(),
          "{}: the batch has variable lengths; expected one length: {}", info.name, domain.reason);
}

void refuse_plan(const MethodInfo& info) {
  fail("method '{}' is a recurrence and has no plan; call attend()", info.name);
}

std::string shape_text(const SideInputInfo& side) {
  static constexpr std::array<std::string_view, 9> names{"1", "B", "Hq", "Hkv", "Nq", "N", "D", "Dv", "w"};
  std::vector<std::string_view> axes;
  for (const SideAxis axis : side.axes) axes.push_back(names.at(static_cast<std::size_t>(axis)));
  return fmt::format("[{}]", fmt::join(axes, ", "));
}

std::array<std::int64_t, 4> side_shape(const SideInputInfo& side, const Problem& problem) {
  const std::array<std::int64_t, 9> sizes{1,
                                          problem.variable_length() ? 1 : problem.batch,
                                          problem.q_heads,
                                          problem.kv_heads,
                                          problem.q_len,
                                          problem.kv_len,
                                          problem.head_dim,
                                          problem.value_dim,
                                          4};
  std::array<std::int64_t, 4> shape{1, 1, 1, 1};
  for (std::size_t i = 0; i < side.axes.size(); ++i) {
    shape.at(4 - side.axes.size() + i) = sizes.at(static_cast<std::size_t>(side.axes[i]));
  }
  return shape;
}

std::int64_t common_prefill_tile(std::int64_t a, std::int64_t b) {
  if (a == 0 || b == 0) return 0;
  const std::int64_t times = b / std::gcd(a, b);
  return times > kMostTokens / a ? 0 : a * times;  // no prompt is that long
}

std::unique_ptr<LayerCache> Method::new_cache(const LayerCacheShape&, const PlanContext&) const {
  return nullptr;
}

void Method::check_model(std::int64_t, std::int64_t, std::int64_t) const {}

RunReport Method::attend(const Problem& problem, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                         const PlanContext& context, Plan* executed) const {
  const auto start = std::chrono::steady_clock::now();
  Plan decided = plan(problem, inputs, context);
  const std::chrono::duration<double, std::milli> planned = std::chrono::steady_clock::now() - start;
  RunReport report = run(decided, inputs, outputs, context.run);
  report.plan_ms = planned.count();
  if (executed != nullptr) *executed = std::move(decided);
  return report;
}

RunReport Method::backward(const Problem& problem, const AttentionInputs& inputs, const SavedForward& saved,
                           const Gradients& gradients, const PlanContext& context, const Plan* executed) const {
  require(info().phases.backward, "method '{}' has no backward pass", info().name);
  if (executed != nullptr) return run_backward(*executed, inputs, saved, gradients, context.run);
  const auto start = std::chrono::steady_clock::now();
  const Plan decided = plan(problem, inputs, context);
  const std::chrono::duration<double, std::milli> planned = std::chrono::steady_clock::now() - start;
  RunReport report = run_backward(decided, inputs, saved, gradients, context.run);
  report.plan_ms = planned.count();
  return report;
}

}  // namespace tessera
