// Methods: named systems from the literature that turn a problem (and its Q, K) into a plan.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tessera/attention.h"
#include "tessera/core.h"
#include "tessera/plan.h"

namespace tessera {

/// What a method supports.
struct Phases {
  bool prefill = false;
  bool decode = false;
};

/// One declared parameter, as the command line, JSON and the documentation see it.
struct ParameterInfo {
  std::string name;
  std::string type;  ///< "int", "float", "bool", "choice", "string"
  std::string default_value;
  std::string minimum;  ///< empty: none
  std::string maximum;
  std::vector<std::string> choices;
  std::string description;
};

struct MethodInfo {
  std::string name;     ///< as in SPEC
  std::string family;   ///< pattern, prefill, decode, diffusion, trainable, linear
  std::string summary;  ///< one line
  std::string paper;    ///< title and arXiv id, empty for plain patterns
  Phases phases;
};

/// State that lives across calls (earlier plans, histories). Owned by the caller, keyed by sequence, layer and head
/// inside the method that uses it; methods themselves are immutable.
class MethodState {
 public:
  virtual ~MethodState() = default;
};

/// Where in a model the call happens.
struct PlanContext {
  std::int64_t layer = 0;
  std::int64_t layers = 1;
  MethodState* state = nullptr;  ///< from Method::new_state(); may be null for methods without state
  RunOptions run;                ///< threads and instruction set for the scorers
};

/// A method with bound parameters. Immutable and thread-safe.
class Method {
 public:
  virtual ~Method() = default;
  virtual const MethodInfo& info() const = 0;
  /// The parameters as a JSON object, defaults filled in.
  virtual std::string parameters() const = 0;
  /// Decides what to compute. `inputs` must fit `problem`; only q and k are read, patterns read neither.
  virtual Plan plan(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const = 0;
  /// Plans and runs. Methods with branches or corrections override it. `executed` receives the plan if not null.
  virtual RunReport attend(const Problem& problem, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                           const PlanContext& context, Plan* executed = nullptr) const;
  virtual std::unique_ptr<MethodState> new_state() const { return nullptr; }
};

/// One row of the registry.
struct MethodEntry {
  MethodInfo info;
  std::vector<ParameterInfo> parameters;
  /// From a JSON object of parameters; throws Error for unknown keys and values out of range.
  std::function<std::unique_ptr<const Method>(std::string_view parameters)> make;
};

/// All methods, sorted by family and name.
std::span<const MethodEntry> methods();
/// Throws Error that suggests the nearest name.
const MethodEntry& find_method(std::string_view name);
/// SPEC is `name`, `name:key=value,key=value` or the path of a JSON file {"method": name, "parameters": {...}}. Unknown
/// keys and values out of range throw Error with the nearest name or the range.
std::unique_ptr<const Method> make_method(std::string_view spec);
/// Reference of all methods in Markdown, written from their declarations.
std::string methods_markdown();

}  // namespace tessera
