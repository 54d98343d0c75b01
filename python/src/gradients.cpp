// Backward passes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <map>
#include <string>

#include "arrays.h"
#include "bindings.h"
#include "inputs.h"
#include "tessera/gradient.h"
#include "tessera/method.h"

namespace tessera::python {

namespace {

using OptionalOutput = std::optional<WritableArray>;

/// Where gradients go; None: not wanted.
struct Wanted {
  OptionalOutput d_q, d_k, d_v, d_key_bias, d_sink_logits;
  std::map<std::string, WritableArray> side;

  Gradients views() const {
    Gradients result;
    if (d_q) result.d_q = view_of(*d_q, "d_q");
    if (d_k) result.d_k = view_of(*d_k, "d_k");
    if (d_v) result.d_v = view_of(*d_v, "d_v");
    if (d_key_bias) result.d_key_bias = view_of(*d_key_bias, "d_key_bias");
    if (d_sink_logits) result.d_sink_logits = span_of<float>(*d_sink_logits, "d_sink_logits");
    for (const auto& [name, array] : side) result.side.push_back({name, view_of(array, name)});
    return result;
  }
};

SavedForward saved_of(const Array& o, const Array& lse, const Array& d_o, const std::optional<Array>& d_lse) {
  SavedForward saved{.o = view_of(o, "o"), .lse = span_of<float>(lse, "lse"), .d_o = view_of(d_o, "d_o"), .d_lse = {}};
  if (d_lse) saved.d_lse = span_of<float>(*d_lse, "d_lse");
  return saved;
}

nb::dict backward_plan(const Plan& plan, const Inputs& inputs, const Array& o, const Array& lse, const Array& d_o,
                       const std::optional<Array>& d_lse, const Wanted& wanted, const CallOptions& options) {
  const SavedForward saved = saved_of(o, lse, d_o, d_lse);
  const Gradients gradients = wanted.views();
  RunReport report;
  {
    const nb::gil_scoped_release release;
    report = run_backward(plan, inputs.views(), saved, gradients, options.run());
  }
  return report_dict(report);
}

nb::dict backward_method(const MethodHandle& method, const Problem& problem, const Inputs& inputs, const Array& o,
                         const Array& lse, const Array& d_o, const std::optional<Array>& d_lse, const Wanted& wanted,
                         const CallOptions& options, State* state, const Plan* executed) {
  const SavedForward saved = saved_of(o, lse, d_o, d_lse);
  const Gradients gradients = wanted.views();
  RunReport report;
  {
    const nb::gil_scoped_release release;
    const auto turn = turn_of(state);
    report = method.method->backward(problem, inputs.views(), saved, gradients, options.context(state), executed);
  }
  return report_dict(report);
}

}  // namespace

void bind_gradients(nb::module_& module) {
  nb::class_<Wanted>(module, "Gradients", "Arrays that a backward pass overwrites; None: not wanted.")
      .def(
          "__init__",
          [](Wanted* self, OptionalOutput d_q, OptionalOutput d_k, OptionalOutput d_v, OptionalOutput d_key_bias,
             OptionalOutput d_sink_logits, std::map<std::string, WritableArray> side) {
            new (self) Wanted{std::move(d_q),        std::move(d_k),           std::move(d_v),
                              std::move(d_key_bias), std::move(d_sink_logits), std::move(side)};
          },
          nb::arg("d_q") = nb::none(), nb::arg("d_k") = nb::none(), nb::arg("d_v") = nb::none(),
          nb::arg("d_key_bias") = nb::none(), nb::arg("d_sink_logits") = nb::none(),
          nb::arg("side") = std::map<std::string, WritableArray>{});
  module.def("run_backward", &backward_plan, nb::arg("plan"), nb::arg("inputs"), nb::arg("o"), nb::arg("lse"),
             nb::arg("d_o"), nb::arg("d_lse").none(), nb::arg("gradients"), nb::arg("options"),
             "Gradients of run() for a plan.");
  module.def("method_backward", &backward_method, nb::arg("method"), nb::arg("problem"), nb::arg("inputs"),
             nb::arg("o"), nb::arg("lse"), nb::arg("d_o"), nb::arg("d_lse").none(), nb::arg("gradients"),
             nb::arg("options"), nb::arg("state").none(), nb::arg("executed").none(),
             "Gradients of a method's attention; executed None: planned again.");
}

}  // namespace tessera::python
