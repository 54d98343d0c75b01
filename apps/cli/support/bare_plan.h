// Plans without a method, for benchmarks: what a kernel costs at a given density and granularity.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "tessera/plan.h"

namespace tessera::cli {

struct BarePlan {
  std::string name;
  nlohmann::ordered_json parameters;
  Plan plan;
};

/// Builds the plan that a SPEC `name` or `name:key=value,key=value` describes; see bare_plan_help() for the names.
/// Random plans depend on their seed alone. Throws Error for unknown names (with the nearest), unknown keys and values
/// out of range.
BarePlan make_bare_plan(std::string_view spec, const Problem& problem);

/// The names with their parameters, one line each.
std::string bare_plan_help();

}  // namespace tessera::cli
