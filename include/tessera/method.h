// Methods: named systems from the literature that turn a problem (and its Q, K) into a plan.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tessera/attention.h"
#include "tessera/cache.h"
#include "tessera/core.h"
#include "tessera/gradient.h"
#include "tessera/plan.h"

namespace tessera {

/// What a method supports.
struct Phases {
  bool prefill = false;
  bool decode = false;
  bool backward = false;  ///< Method::backward() works
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

/// What the size of an axis of a side input follows from. `queries`: one entry per query of the call. `tokens`: one per
/// key, or only for the keys that the call adds. `width`: the method's own, such as that of a convolution.
enum class SideAxis : std::uint8_t { one, batch, q_heads, kv_heads, queries, tokens, head_dim, value_dim, width };

/// A tensor that a method reads beside q, k, v, as benchmarks and the documentation see it.
struct SideInputInfo {
  std::string name;
  std::vector<SideAxis> axes = {};  ///< of its shape; fewer than 4 leave out leading axes
  double minimum = 0;               ///< range of sensible values, from which benchmarks draw
  double maximum = 1;
  bool required = true;
  std::string description = {};
};
/// "[B, Hq, N, D]".
std::string shape_text(const SideInputInfo& side);
/// Its shape in one call, leading axes 1.
std::array<std::int64_t, 4> side_shape(const SideInputInfo& side, const Problem& problem);

/// The problems that a method is defined for; it refuses others with an Error.
struct Domain {
  bool causal = true;           ///< causal problems
  bool bidirectional = true;    ///< problems without causality
  bool variable_length = true;  ///< sequences of different lengths in one batch
  std::string reason = {};      ///< why not the others

  bool contains(const Problem& problem) const {
    return (problem.causal ? causal : bidirectional) && (variable_length || !problem.variable_length());
  }
};

/// The parameter that trades quality for cost, so that methods can be compared at equal density or error.
struct BudgetParameter {
  std::string name;
  double sparsest = 0;       ///< value of little work
  double densest = 1;        ///< value of much work, dense or as far as the method goes
  bool logarithmic = false;  ///< steps multiply, as for counts of tokens
};

struct MethodInfo {
  std::string name;     ///< as in SPEC
  std::string family;   ///< pattern, prefill, decode, diffusion, trainable, linear
  std::string summary;  ///< one line
  std::string paper;    ///< title and arXiv id, empty for plain patterns
  Phases phases;
  Domain domain = {};
  std::optional<BudgetParameter> budget = {};
  /// The parameter that says of how many tokens decoding looks at one representative, before it reads the best of them;
  /// empty: decoding searches nothing, or looks at every token.
  std::string search_block = {};
  std::vector<SideInputInfo> side = {};  ///< what AttentionInputs::side may or must hold
  bool has_plan = true;                  ///< false: a recurrence; plan() throws and attend() executes no plan
  bool own_cache = false;  ///< keeps keys and values its own way (Method::new_cache); filled in by the registry
};

/// State that lives across calls (earlier plans, histories). Owned by the caller, keyed by sequence, layer and head
/// inside the method that uses it; methods themselves are immutable.
class MethodState {
 public:
  virtual ~MethodState() = default;
  /// Bytes held beside the cache.
  virtual std::size_t memory_bytes() const { return 0; }
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
  /// Decides what to compute. `inputs` must fit `problem`; only q and k are read, patterns read neither. Throws Error
  /// for a method without plan (MethodInfo::has_plan).
  virtual Plan plan(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const = 0;
  /// Plans and runs. Methods with branches or corrections override it. `executed` receives the plan if not null;
  /// methods without plan leave it alone.
  virtual RunReport attend(const Problem& problem, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                           const PlanContext& context, Plan* executed = nullptr) const;
  /// Gradients of attend() for the same inputs; the selection is a constant. `executed` is the plan that attend() gave,
  /// or null to plan again. Throws Error where info().phases.backward is false. Methods with branches or corrections
  /// override it.
  virtual RunReport backward(const Problem& problem, const AttentionInputs& inputs, const SavedForward& saved,
                             const Gradients& gradients, const PlanContext& context,
                             const Plan* executed = nullptr) const;
  /// Whether attend() is run() of the plan alone, so that its outputs can be checked against the plan.
  virtual bool runs_its_plan() const { return true; }
  virtual std::unique_ptr<MethodState> new_state() const { return nullptr; }
  /// In which parts a prompt may come without changing what its queries attend to, as long as each part comes with all
  /// keys up to its end and the state of the parts before it: parts that begin at multiples of this many tokens and are
  /// not shorter. 0: the method needs the whole prompt, because it looks at its last queries, at all of its keys or at
  /// its length.
  virtual std::int64_t prefill_tile() const { return 0; }
  /// The cache of one layer (context.layer of context.layers) of one sequence; null: every token in pages.
  virtual std::unique_ptr<LayerCache> new_cache(const LayerCacheShape& shape, const PlanContext& context) const;
  /// Throws Error when the method was configured for another model: number of layers or of heads.
  virtual void check_model(std::int64_t layers, std::int64_t q_heads, std::int64_t kv_heads) const;
};

/// Parts that suit two values of Method::prefill_tile(): their least common multiple, 0 where either is 0.
std::int64_t common_prefill_tile(std::int64_t a, std::int64_t b);

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
/// SPEC is `name`, `name:key=value,key=value` or the path of a JSON file: {"method": name, "parameters": {...}}, or per
/// layer {"layers": [{"layers": "0-1", "method": name, "parameters": {...}}, {"layers": "2-", ...}]}, where ranges are
/// inclusive, an open one reaches to the last layer, and every layer of the model is covered once. Unknown keys and
/// values out of range throw Error with the nearest name or the range.
std::unique_ptr<const Method> make_method(std::string_view spec);
/// Reference of all methods in Markdown, written from their declarations.
std::string methods_markdown();

}  // namespace tessera
