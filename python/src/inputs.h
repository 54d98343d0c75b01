// What attention calls read and how they run, as Python hands it over.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "arrays.h"
#include "tessera/attention.h"
#include "tessera/method.h"

namespace tessera::python {

/// AttentionInputs with the arrays that they view.
class Inputs {
 public:
  struct Parts {
    std::optional<Array> query_scale;
    float softcap = 0;
    std::optional<Array> alibi_slopes;
    std::optional<Array> sink_logits;
    std::optional<Array> key_bias;
    std::vector<std::tuple<Array, Array, std::optional<Array>>> sources;  ///< k, v, log-weight
    std::map<std::string, Array> side;
    std::optional<Array> page_table;
    std::int64_t page_size = 0;
  };
  Inputs(Array q, Array k, Array v, Parts parts);

  const AttentionInputs& views() const { return views_; }

 private:
  Array q_;
  Array k_;
  Array v_;
  Parts parts_;
  AttentionInputs views_;
};

/// State of a method across calls. Calls take turns.
struct State {
  std::unique_ptr<MethodState> state;
  std::mutex turn;
};

/// Holds the state's turn while a call uses it.
inline std::unique_lock<std::mutex> turn_of(State* state) {
  return state == nullptr ? std::unique_lock<std::mutex>() : std::unique_lock(state->turn);
}

/// A method with its parameters, shared with sessions.
struct MethodHandle {
  std::shared_ptr<const Method> method;
};

/// How a call runs and where in a model it happens.
struct CallOptions {
  std::string kernel = "automatic";
  std::string isa;  ///< empty: the best that the machine has
  int threads = 0;
  std::int64_t layer = 0;
  std::int64_t layers = 1;

  RunOptions run() const;
  PlanContext context(State* state) const;
};

nb::dict report_dict(const RunReport& report);

}  // namespace tessera::python
