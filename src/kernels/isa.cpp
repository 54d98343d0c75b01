// Which instruction sets this machine runs, and which one a call uses.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <array>
#include <cstdlib>
#include <string>
#include <vector>

#include "core/error.h"
#include "tessera/attention.h"

namespace tessera {

namespace {

constexpr std::array<std::string_view, 5> kIsaNames{"portable", "avx2", "avx512", "avx512_bf16", "neon"};

#if defined(__x86_64__)
/// Clang 14 does not know this feature by name.
bool has_f16c() {
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

bool find_supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::portable:
      return true;
    case Isa::neon:
      return false;
    case Isa::avx2:
      return avx2;
    case Isa::avx512:
      return avx512;
    case Isa::avx512_bf16:
      // Every machine with the one has the other, but a virtual machine may hide it.
      return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  }
#elif defined(__aarch64__)
  return isa == Isa::portable || isa == Isa::neon;  // part of every 64-bit Arm machine that runs Linux
#endif
  return isa == Isa::portable;
}

/// Asked once: on a virtual machine the question takes tens of microseconds, as long as a short decoding step.
bool supported(Isa isa) {
  static const auto known = [] {
    std::array<bool, kIsaNames.size()> answers{};
    for (std::size_t i = 0; i < answers.size(); ++i) answers[i] = find_supported(static_cast<Isa>(i));
    return answers;
  }();
  return known.at(static_cast<std::size_t>(isa));
}

}  // namespace

std::string_view name_of(Isa isa) {
  return kIsaNames.at(static_cast<std::size_t>(isa));
}

Isa isa_from_name(std::string_view name) {
  for (std::size_t i = 0; i < kIsaNames.size(); ++i) {
    if (kIsaNames[i] == name) return static_cast<Isa>(i);
  }
  fail("instruction set '{}' is unknown; known: {}", name, fmt::join(kIsaNames, ", "));
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> isas;
  for (std::size_t i = 0; i < kIsaNames.size(); ++i) {
    if (supported(static_cast<Isa>(i))) isas.push_back(static_cast<Isa>(i));
  }
  return isas;
}

Isa default_isa() {
  const char* forced = std::getenv("TESSERA_ISA");  // NOLINT(concurrency-mt-unsafe): only read
  if (forced == nullptr || *forced == '\0') return supported_isas().back();
  const Isa isa = isa_from_name(forced);
  require(supported(isa), "TESSERA_ISA={} cannot run on this machine; it has: {}", forced, [] {
    std::vector<std::string_view> names;
    for (const Isa known : supported_isas()) names.push_back(name_of(known));
    return fmt::format("{}", fmt::join(names, ", "));
  }());
  return isa;
}

}  // namespace tessera
