// Any bytes as a plan file: an Error, or a valid plan on which every operation works.
#include <cstddef>
#include <cstdint>
#include <span>

#include "plan/serialise.h"

namespace {

/// Operations take time in proportion to queries and keys, which a few bytes can claim to be many.
bool is_small(const tessera::Problem& problem) {
  return problem.batch * problem.q_heads <= 64 && problem.q_len <= 1024 && problem.kv_len <= 1024;
}

void use(const tessera::Plan& plan) {
  if (!is_small(plan.problem)) return;
  if (tessera::explain(plan).empty()) __builtin_trap();
  tessera::transpose(plan);
  if (tessera::coverage(plan, plan) != 1.0) __builtin_trap();
  tessera::validate(tessera::unite(plan, plan));
  if (plan.sources.size() != 1) return;
  const tessera::Plan rest = tessera::complement(plan);
  tessera::validate(rest);
  if (tessera::statistics(tessera::intersect(plan, rest)).planned_pairs != 0) __builtin_trap();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  tessera::Plan plan;
  try {
    plan = tessera::read_plan(tessera::SafetensorsFile::parse(std::as_bytes(std::span(data, size)), "input"));
  } catch (const tessera::Error&) {
    return 0;
  }
  use(plan);  // an Error from here on is a fault
  return 0;
}
