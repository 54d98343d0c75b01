// No prefill method keeps anything of the size queries times keys: what choosing and running need at their peak,
// counted by this program's operator new, stays below one bit per pair.
#include <gtest/gtest.h>
#include <malloc.h>

#include <algorithm>
#include <atomic>
#include <cctype>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <string>
#include <vector>

#include "eval/side_inputs.h"
#include "tessera/eval.h"
#include "tessera/method.h"

namespace {

/// Bytes that operator new has given out and not got back, and the most that they were.
std::atomic<std::int64_t>& held() {
  static std::atomic<std::int64_t> bytes{0};
  return bytes;
}
std::atomic<std::int64_t>& peak() {
  static std::atomic<std::int64_t> bytes{0};
  return bytes;
}

// What operator new is made of.
// NOLINTBEGIN(cppcoreguidelines-no-malloc)

void* counted(std::size_t bytes, std::size_t alignment) {
  const std::size_t rounded = (std::max<std::size_t>(bytes, 1) + alignment - 1) / alignment * alignment;
  void* at = alignment > alignof(std::max_align_t) ? std::aligned_alloc(alignment, rounded) : std::malloc(rounded);
  if (at == nullptr) throw std::bad_alloc();
  const std::int64_t now = held() += static_cast<std::int64_t>(malloc_usable_size(at));
  for (std::int64_t most = peak(); now > most && !peak().compare_exchange_weak(most, now);) {
  }
  return at;
}

void release(void* at) noexcept {
  if (at != nullptr) held() -= static_cast<std::int64_t>(malloc_usable_size(at));
  std::free(at);
}
// NOLINTEND(cppcoreguidelines-no-malloc)

}  // namespace

void* operator new(std::size_t bytes) {
  return counted(bytes, 1);
}
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return counted(bytes, static_cast<std::size_t>(alignment));
}
void operator delete(void* at) noexcept {
  release(at);
}
void operator delete(void* at, std::size_t) noexcept {
  release(at);
}
void operator delete(void* at, std::align_val_t) noexcept {
  release(at);
}
void operator delete(void* at, std::size_t, std::align_val_t) noexcept {
  release(at);
}

namespace tessera::eval {
namespace {

class PrefillMemory : public testing::TestWithParam<std::string> {};

TEST_P(PrefillMemory, StaysBelowOneBitPerPair) {
  HeadOptions options;
  options.kind = "vertical-slash";
  options.tokens = 8192;  // few enough that what grows with the tokens alone, not their square, also counts
  options.q_heads = options.kv_heads = 1;
  options.head_dim = 32;
  const HeadData data = make_heads(options);
  AttentionInputs inputs;
  inputs.q = data.q();
  inputs.k = data.k();
  inputs.v = data.v();
  const auto method = make_method(GetParam());
  const RandomSideInputs side(method->info(), data.problem, 1);
  side.add_to(inputs);
  std::vector<float> o(static_cast<std::size_t>(options.tokens * options.head_dim));
  std::vector<float> lse(static_cast<std::size_t>(options.tokens));
  PlanContext context;
  context.run.threads = 2;
  const std::int64_t before = held();
  peak() = before;
  method->attend(data.problem, inputs,
                 {mutable_view_of(o.data(), DType::f32, {1, 1, options.tokens, options.head_dim}), lse}, context);
  const std::int64_t needed = peak() - before;
  EXPECT_GT(needed, 10'000) << "nothing was counted";
  EXPECT_LT(needed, options.tokens * options.tokens / 8);
}

INSTANTIATE_TEST_SUITE_P(, PrefillMemory,
                         testing::Values("minference", "flexprefill", "flexprefill:count=tiles", "xattention", "sale",
                                         "anchor-stripe", "proxyattn", "pbs", "dhsa", "hip:dense_layers=none",
                                         "hip:form=staged,dense_layers=none", "token-sparse", "delta-llm", "seer",
                                         "hyper", "sparge", "tri-shape"),
                         [](const auto& test) {
                           std::string name = test.param;
                           std::replace_if(
                               name.begin(), name.end(), [](unsigned char x) { return std::isalnum(x) == 0; }, '_');
                           return name;
                         });

}  // namespace
}  // namespace tessera::eval
