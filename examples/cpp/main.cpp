// One attention call with a method from the registry, and how far its output is from dense attention.
//
// usage: sparse_attention [SPEC]       for instance: sparse_attention streaming:n_local=512
#include <tessera/tessera.h>

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

namespace {

std::vector<float> random_tensor(std::size_t elements, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(elements);
  for (float& value : values) value = normal(generator);
  return values;
}

}  // namespace

int main(int argc, char** argv) try {
  const char* spec = argc > 1 ? argv[1] : "window:left=511";
  const std::int64_t tokens = 4096;
  const std::int64_t q_heads = 8;
  const std::int64_t kv_heads = 2;  // each serves four query heads
  const std::int64_t dim = 64;

  const auto q = random_tensor(q_heads * tokens * dim, 1);
  const auto k = random_tensor(kv_heads * tokens * dim, 2);
  const auto v = random_tensor(kv_heads * tokens * dim, 3);
  tessera::AttentionInputs inputs;
  inputs.q = tessera::view_of(q.data(), tessera::DType::f32, {1, q_heads, tokens, dim});
  inputs.k = tessera::view_of(k.data(), tessera::DType::f32, {1, kv_heads, tokens, dim});
  inputs.v = tessera::view_of(v.data(), tessera::DType::f32, {1, kv_heads, tokens, dim});
  const tessera::Problem problem = tessera::problem_of(inputs.q, inputs.k, inputs.v, /*causal=*/true);

  // The method chooses a plan; the plan is a plain value; run() executes any plan.
  const tessera::Plan plan = tessera::make_method(spec)->plan(problem, inputs, {});
  std::printf("%s\n", tessera::explain(plan).c_str());

  std::vector<float> sparse(q.size());
  std::vector<float> dense(q.size());
  const auto write_to = [&](std::vector<float>& out) {
    return tessera::AttentionOutputs{
        .o = tessera::mutable_view_of(out.data(), tessera::DType::f32, {1, q_heads, tokens, dim}), .lse = {}};
  };
  const tessera::RunReport report = tessera::run(plan, inputs, write_to(sparse));
  const tessera::RunReport dense_report = tessera::run(tessera::dense_plan(problem), inputs, write_to(dense));

  double difference = 0;
  double norm = 0;
  for (std::size_t i = 0; i < dense.size(); ++i) {
    difference += std::pow(sparse[i] - dense[i], 2);
    norm += std::pow(dense[i], 2);
  }
  std::printf("density %.3f, %.1f ms against %.1f ms dense, relative L2 error %.3f\n",
              tessera::statistics(plan).density, report.kernel_ms, dense_report.kernel_ms,
              std::sqrt(difference / norm));
  return 0;
} catch (const tessera::Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 2;
}
