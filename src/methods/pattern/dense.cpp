// Dense attention: the plan with every pair that the problem allows. The reference of everything else.
#include "methods/registry.h"

namespace tessera {
namespace {

struct Dense {
  struct Params {
    void visit(ParameterList&) {}
  };
  static constexpr bool reads_inputs = false;
  static MethodInfo info() {
    return {.name = "dense",
            .family = "pattern",
            .summary = "every key that the problem allows",
            .paper = "",
            .phases = {.prefill = true, .decode = true, .backward = true}};
  }

  std::int64_t prefill_tile() const { return 1; }

  Plan plan(const Problem& problem, const AttentionInputs&, const PlanContext&) const { return dense_plan(problem); }

  Params params;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(dense, tessera::Dense);
