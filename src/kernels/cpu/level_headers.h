// What the kernel text uses from outside, included before its namespace opens.
#pragma once

#if defined(TESSERA_EMULATE_AVX512)
#include "support/emulate_avx512.h"
#elif defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <algorithm>
#include <array>
#include <bit>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numbers>
#include <type_traits>
#include <utility>

#include "kernels/cpu/backward.h"
#include "kernels/cpu/piece_states.h"
#include "kernels/cpu/tile.h"
